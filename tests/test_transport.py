"""The one HTTP client call: whatever the network does is a verdict with a reason that can be shown to anybody."""

import asyncio
import contextlib
import gzip
import json
import socket
import ssl
import threading

import aiohttp
import pytest
import uvloop
from aiohttp.client_reqrep import ConnectionKey
from conftest import free_port, until
from yarl import URL

from bridged.delivery import transport as module
from bridged.delivery.probe import probe
from bridged.delivery.transport import Transport
from bridged.emulator.mixpanel import EmulatorConfig, MixpanelEmulator
from bridged.errors import ConfigError
from bridged.mixpanel import verdicts
from bridged.mixpanel.requests import Credentials, Target
from bridged.mixpanel.verdicts import Delivered, Halt, Retry, Split

SECRET = "0123456789abcdef0123456789abcdef"
KEY = ConnectionKey("api.mixpanel.com", 443, True, True, None, None, None)
REFUSED = ConnectionRefusedError(111, "Connect call failed ('203.0.113.1', 443)")
BODY = gzip.compress(b'{"event":"a","properties":{"time":1700000000,"distinct_id":"u","$insert_id":"i","ip":0}}\n')


@contextlib.asynccontextmanager
async def transport(url="", timeout_s=5.0, credentials=None):
    """A transport to an address."""
    target = Target(url=url, credentials=credentials or Credentials(token=SECRET))
    async with Transport(target, timeout_s) as opened:
        yield opened


async def send(opened, body=BODY, events=1):
    """One request, which must come to an end."""
    return await asyncio.wait_for(opened.send(body, events, lambda: ["i"]), 20)


async def read_request(reader):
    """Head and body of one."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    return head, await reader.readexactly(int(length[0].split(b":")[1]) if length else 0)


@contextlib.asynccontextmanager
async def server(answer=b"", *, read=True):
    """A server that says some bytes to every request and closes. Gives its port and the heads of the requests."""
    heads = []

    async def serve(reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            if read:
                heads.append((await read_request(reader))[0])
            writer.write(answer)
            await writer.drain()
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield listening.sockets[0].getsockname()[1], heads
    finally:
        listening.close()
        await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch):
    """The proxies of whoever runs the tests are not the subject."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    module.proxy_for.cache_clear()
    yield
    module.proxy_for.cache_clear()


@pytest.mark.parametrize(
    ("exception", "reason"),
    [
        (TimeoutError(), "no answer within 5 s"),
        (aiohttp.ServerTimeoutError("read"), "no answer within 5 s"),
        (aiohttp.ConnectionTimeoutError("connect"), "no connection within 10 s"),
        (aiohttp.SocketTimeoutError("read"), "no answer within 5 s"),
        (
            aiohttp.ClientConnectorError(KEY, REFUSED),
            "ClientConnectorError: Cannot connect to host api.mixpanel.com:443",
        ),
        (aiohttp.ClientConnectorDNSError(KEY, OSError(-2, "Name or service not known")), "ClientConnectorDNSError: "),
        (aiohttp.ClientConnectorSSLError(KEY, ssl.SSLError(1, "wrong version")), "ClientConnectorSSLError: "),
        (
            aiohttp.ClientConnectorCertificateError(KEY, ssl.SSLCertVerificationError(1, "self-signed certificate")),
            "ClientConnectorCertificateError: ",
        ),
        (aiohttp.ClientProxyConnectionError(KEY, REFUSED), "ClientProxyConnectionError: "),
        (aiohttp.ServerDisconnectedError(), "ServerDisconnectedError: Server disconnected"),
        (aiohttp.ClientOSError(104, "Connection reset by peer"), "ClientOSError: [Errno 104] Connection reset by peer"),
        (aiohttp.ClientPayloadError("Response payload is not completed: <ContentLengthError>"), "the answer broke off"),
        (
            aiohttp.ClientPayloadError("400, message: Can not decode"),
            "ClientPayloadError: 400, message: Can not decode",
        ),
        (aiohttp.ClientConnectorError(KEY, ConnectionResetError()), "[it closed the connection in the TLS handshake]"),
        (aiohttp.ClientConnectorError(KEY, ConnectionAbortedError("SSL takes too long")), "[SSL takes too long]"),
        (aiohttp.ClientConnectionError("closed"), "ClientConnectionError: closed"),
        (aiohttp.ClientError(f"Authorization: Basic {SECRET}"), "ClientError: "),
        (ConnectionResetError(104, "Connection reset by peer"), "[Errno 104] Connection reset by peer"),
        (BrokenPipeError(32, "Broken pipe"), "[Errno 32] Broken pipe"),
        (ssl.SSLError(1, "bad record mac"), "bad record mac"),
        (OSError(24, "Too many open files"), "[Errno 24] Too many open files"),
        (socket.gaierror(-3, "Temporary failure in name resolution"), "Temporary failure in name resolution"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_every_exception_of_the_network_means_try_again(answers, exception, reason):
    """The same verdict for all of them, with the cause in words and without a credential."""
    async with transport() as opened:
        answers.post(opened.target.import_url, exception=exception)
        verdict = await send(opened)

    assert isinstance(verdict, Retry)
    assert verdict.kind == "network"
    assert reason in verdict.reason
    assert SECRET not in verdict.reason
    assert "\n" not in verdict.reason


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "can't be read"),
        (b"\x15\x03\x01\x00\x02\x02\x16", "can't be read"),
        (b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 20_000 + b"\r\n\r\n{}", "can't be read: Got more than"),
    ],
    ids=["ssh", "tls", "long"],
)
async def test_what_is_no_http_is_no_status(sent, said):
    """The library calls it 400, which no server has said: a person would look for a mistake in the request."""

    async def serve(reader, writer):
        await reader.read(10)
        writer.write(sent)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with Transport(Target(url=url, credentials=Credentials(token="t")), 5.0) as opened:
            verdict = await opened.ask()
        found = await probe(Target(url=url, credentials=Credentials(token="t")))

    assert isinstance(verdict, Retry)
    assert verdict.kind == "network"
    assert "it doesn't speak HTTP" in verdict.reason
    assert said in verdict.reason
    assert "400" not in verdict.reason
    assert "no web server" in found.hint


async def test_no_timeout_configured(answers):
    """With timeout = 0 there is no limit to name."""
    async with transport(timeout_s=0.0) as opened:
        answers.post(opened.target.import_url, exception=TimeoutError())
        verdict = await send(opened)

    assert verdict == Retry("network", "no answer in time")


async def test_a_bug_is_no_network_trouble(answers):
    """What isn't the network's isn't translated: it ends the daemon instead of being tried for ever."""
    async with transport() as opened:
        answers.post(opened.target.import_url, exception=ZeroDivisionError())
        with pytest.raises(ZeroDivisionError):
            await send(opened)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"action": "hang"}, "no answer within 0.3 s"),
        ({"action": "slow", "trickle_s": 0.05}, "no answer within 0.3 s"),
        ({"action": "truncate"}, "the answer broke off"),
        ({"action": "reset"}, ""),
        ({"action": "reset_after_store"}, ""),
    ],
)
async def test_trouble_on_a_real_wire(emulator, fault, reason):
    """Silence, a trickle, half an answer and a reset, over a socket; the next request works."""
    emulator.script([fault | {"times": 1}])
    async with transport(emulator.url, 0.3) as opened:
        verdict = await send(opened)
        assert isinstance(verdict, Retry)
        assert verdict.kind == "network"
        assert reason in verdict.reason
        assert verdict.reason

    async with transport(emulator.url) as opened:
        assert await send(opened) == Delivered()


async def test_a_web_page_is_no_success(emulator):
    """A 200 of somebody else's is not Mixpanel's."""
    emulator.script([{"action": "html"}])
    async with transport(emulator.url) as opened:
        verdict = await send(opened)

    assert isinstance(verdict, Retry)
    assert verdict.kind == "server"
    assert emulator.events() == []


async def test_the_credential_is_the_targets_of_the_moment(emulator):
    """A target that is replaced is used by the next request, on the same connection."""
    emulator.credentials(token="new")
    async with transport(emulator.url) as opened:
        assert isinstance(await send(opened), Halt)
        opened.target = Target(url=emulator.url, credentials=Credentials(token="new"))
        assert await send(opened) == Delivered()


@pytest.mark.parametrize(
    "credentials",
    [
        Credentials(token="t"),
        Credentials(token="t", api_secret="s"),
        Credentials(token="t", service_account="a", service_secret="b", project_id="7"),
    ],
    ids=lambda credentials: credentials.kind,
)
async def test_every_kind_of_credential_opens_the_project(credentials):
    """A token, a secret and a service account, each as Mixpanel wants it."""
    wanted = {name: getattr(credentials, name) for name in credentials.__struct_fields__}
    async with (
        MixpanelEmulator(EmulatorConfig(port=0, **wanted)) as emulator,
        transport(emulator.url, credentials=credentials) as opened,
    ):
        assert await send(opened) == Delivered()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: nine\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 9\r\n\r\nnot gzip!",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: unheard-of\r\nContent-Length: 9\r\n\r\nnot gzip!",
    ],
)
async def test_answers_that_are_no_http(answer):
    """A broken server, or something that isn't one, is a reason to try again."""
    async with server(answer) as (port, _), transport(f"http://127.0.0.1:{port}") as opened:
        verdict = await send(opened)

    assert isinstance(verdict, Retry)
    assert verdict.reason


async def test_an_endless_answer_is_not_read_to_its_end():
    """What answers may not be Mixpanel: memory is bounded."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n"
    async with server(head + b"x" * 20_000_000) as (port, _), transport(f"http://127.0.0.1:{port}") as opened:
        verdict = await send(opened)

    assert isinstance(verdict, Retry)
    assert verdict.kind == "server"


async def test_large_answers_are_judged_one_by_one(turns, monkeypatch):
    """Each takes a moment in which nothing else happens, and as many may come at once as requests are in flight: the loop turns
    between them. A verdict comes for each all the same.
    """
    judged_at = []

    def judge(*answer):
        judged_at.append(turns())
        return verdicts.judge(*answer)

    monkeypatch.setattr(module, "judge", judge)
    records = [{"index": 0, "insert_id": "a", "field": "f", "message": "m" * 80}] * 20_000
    said = json.dumps({"error": "x", "failed_records": records}).encode()
    head = b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(said)
    async with server(head + said) as (port, _), transport(f"http://127.0.0.1:{port}", 60.0) as opened:
        many = await asyncio.gather(*[opened.send(BODY, 2000, lambda: ["i"] * 2000) for _ in range(12)])

    assert {type(verdict) for verdict in many} == {Split}
    assert len(set(judged_at)) == len(many)


async def test_a_redirect_is_not_followed():
    """The body and the credential go to Mixpanel and nowhere else."""
    async with server() as (elsewhere, heads):
        answer = f"HTTP/1.1 307 Moved\r\nLocation: http://127.0.0.1:{elsewhere}/\r\nContent-Length: 0\r\n\r\n".encode()
        async with server(answer) as (port, _), transport(f"http://127.0.0.1:{port}") as opened:
            assert isinstance(await send(opened), Halt)
    assert heads == []


async def test_no_server_and_no_such_host():
    """Refused connections, unknown hosts and TLS against a plain port, for real."""
    async with server(b"HTTP/1.1 400 Bad Request\r\n\r\n", read=False) as (plain, _):
        for url in (f"http://127.0.0.1:{free_port()}", "http://mixpanel.invalid", f"https://127.0.0.1:{plain}"):
            async with transport(url) as opened:
                verdict = await send(opened)
                assert isinstance(verdict, Retry)
                assert verdict.kind == "network"
                assert verdict.reason


def test_a_name_server_that_says_nothing_holds_up_no_end(monkeypatch):
    """A look-up can't be cancelled: the request ends in time, and so does the loop."""
    answers, said = threading.Event(), []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: answers.wait())

    async def ask():
        async with transport("http://mixpanel.example", timeout_s=0.2) as opened:
            said.append(await send(opened))

    def live():
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(ask())

    life = threading.Thread(target=live, daemon=True)
    life.start()
    life.join(20)
    assert not life.is_alive()
    assert said == [Retry("network", "no answer within 0.2 s")]
    answers.set()


@pytest.mark.parametrize("said", [b"OK", b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"], ids=["200", "400"])
async def test_what_was_said_while_nobody_asked_is_no_answer(said):
    """A proxy that is out of step answers on an idle connection: the next request is sent all the same, over another."""
    said = OK if said == b"OK" else said
    bodies, may_speak = [], asyncio.Event()

    async def serve(reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                bodies.append((await read_request(reader))[1])
                writer.write(OK)
                if len(bodies) == 1:
                    await may_speak.wait()
                    writer.write(said)
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with transport(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}") as opened:
        assert await send(opened) == Delivered()
        [[[idle, _]]] = opened._session.connector._conns.values()
        may_speak.set()
        await until(lambda: idle.should_close, "the words on the idle connection")
        other = gzip.compress(b"another")
        assert await send(opened, other) == Delivered()
    listening.close()

    assert bodies == [BODY, other]


# -- proxies -----------------------------------------------------------------------------------------------------------

OK = b'HTTP/1.1 200 OK\r\nContent-Length: 52\r\n\r\n{"code":200,"num_records_imported":1,"status":"OK"}\n\n'


async def test_a_proxy_of_the_environment_is_used(monkeypatch):
    """Many a machine has no other way out; its credential goes to the proxy only."""
    async with server(OK) as (port, heads):
        monkeypatch.setenv("http_proxy", f"http://me:{SECRET}@127.0.0.1:{port}")
        async with transport("http://mixpanel.invalid") as opened:
            assert await send(opened) == Delivered()
    assert heads[0].startswith(b"POST http://mixpanel.invalid/import?strict=1 HTTP/1.1\r\n")
    assert b"proxy-authorization: basic" in heads[0].lower()


async def test_hosts_without_a_proxy(monkeypatch):
    """NO_PROXY is heeded."""
    async with server(OK) as (port, heads):
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        async with transport(f"http://127.0.0.1:{port}") as opened:
            assert await send(opened) == Delivered()
    assert heads[0].startswith(b"POST /import?strict=1 HTTP/1.1\r\n")


@pytest.mark.parametrize("url", ["https://api..mixpanel.com", f"https://{'a' * 70}.example.com", "http://[::1"])
async def test_an_address_that_no_request_can_have(url):
    """No name service is even asked: it halts with what to look at, and nothing is lost; it is no reason to end."""
    async with transport() as opened:
        opened.target = Target(url=url, credentials=Credentials(token=SECRET))
        for verdict in (await send(opened), await opened.ask()):
            assert isinstance(verdict, Halt)
            assert "no request can be made with this address" in verdict.reason
            assert "[mixpanel] url" in verdict.reason


async def test_an_address_that_the_client_refuses(answers):
    """The same, and what it quotes of the address is kept from people."""
    async with transport() as opened:
        answers.post(opened.target.import_url, exception=aiohttp.InvalidURL(URL(f"https://me:{SECRET}@example.com")))
        verdict = await send(opened)

    assert isinstance(verdict, Halt)
    assert SECRET not in verdict.reason


@pytest.mark.parametrize(
    "proxy",
    [
        *("socks5://127.0.0.1:1", "http://", "//x", "http://127.0.0.1:notaport"),
        *("http://proxy..corp:3128", f"http://{'a' * 64}:3128"),
    ],
)
async def test_a_proxy_that_cannot_be(monkeypatch, proxy):
    """A slip in the environment is told at the start, by the variable's name and without its value."""
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(ConfigError, match="HTTP_PROXY") as error:
        async with transport("http://mixpanel.invalid"):
            pass

    assert proxy not in error.value.args[0]


@pytest.mark.parametrize(("status", "halts"), [(407, True), (403, False), (502, False)])
async def test_a_proxy_that_opens_no_tunnel(monkeypatch, status, halts):
    """That it wants a credential halts, as without TLS; all else it says is about the way, and never about the events."""
    async with server(b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n" % status) as (port, heads):
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        async with transport("https://mixpanel.invalid") as opened:
            verdict = await send(opened)

    assert heads[0].startswith(b"CONNECT mixpanel.invalid:443 ")
    assert isinstance(verdict, Halt if halts else Retry)
    assert str(status) in verdict.reason


async def test_a_proxy_that_is_not_there(monkeypatch):
    """Its own password isn't told."""
    monkeypatch.setenv("https_proxy", f"http://me:{SECRET}@127.0.0.1:{free_port()}")
    async with transport() as opened:
        verdict = await send(opened)

    assert isinstance(verdict, Retry)
    assert SECRET not in verdict.reason
