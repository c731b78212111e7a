"""Between us and Mixpanel, a wire that does what wires do: every fault is the right class of trouble, and nothing is lost.

The proxy stands on loopback before the emulator; each new connection meets the next fault of its list, then none.
"""

import asyncio
import contextlib
import gzip
import ipaddress
import random
import socket
import ssl
import struct
from datetime import UTC, datetime, timedelta

import aiohttp
import msgspec
import pytest
import trustme
from conftest import balanced, currents, until
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bridged.connections import Connector
from bridged.delivery import delivery, pacing
from bridged.mixpanel.verdicts import Retry

TIMEOUT = "500ms"


class Proxy:
    """A TCP proxy whose faults are methods of this class, by name."""

    def __init__(self, port, faults=(), context=None):
        self.faults = list(faults)
        self.context = context
        self._target = port
        self._tasks = set()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.context)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_exc):
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader, writer):
        task = asyncio.current_task()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        fault = getattr(self, self.faults.pop(0)) if self.faults else self.none
        with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
            await fault(reader, writer)
        with contextlib.suppress(OSError):
            writer.close()

    # -- what faults are made of ---------------------------------------------------------------------------------------

    async def _request(self, reader):
        """The whole of a request."""
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
        return head + await reader.readexactly(int(length.split(b":")[1]))

    async def _answer(self, request):
        """What the emulator says to it, whole."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._target)
        writer.write(request.replace(b"HTTP/1.1\r\n", b"HTTP/1.1\r\nConnection: close\r\n", 1))
        answer = await reader.read()
        writer.close()
        return answer

    def _reset(self, writer):
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async def _made_up(self, reader, writer, status, body, *headers):
        await self._request(reader)
        head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
        writer.write("\r\n".join(head).encode() + body)
        await writer.drain()

    # -- faults --------------------------------------------------------------------------------------------------------

    async def none(self, reader, writer):
        """Everything goes through, request after request."""
        while True:
            writer.write(await self._answer(await self._request(reader)))
            await writer.drain()
            break

    async def delay(self, reader, writer):
        """Late, but in time."""
        answer = await self._answer(await self._request(reader))
        await asyncio.sleep(0.2)
        writer.write(answer)
        await writer.drain()

    async def delay_beyond(self, reader, writer):
        """Taken, and then too late."""
        answer = await self._answer(await self._request(reader))
        await asyncio.sleep(1.5)
        writer.write(answer)

    async def silence(self, reader, writer):
        """Nothing is ever read or said."""
        await asyncio.sleep(30)

    async def reset_at_once(self, reader, writer):
        """Connected, and reset."""
        self._reset(writer)

    async def reset_in_request(self, reader, writer):
        """In the middle of the body."""
        await reader.readexactly(300)
        self._reset(writer)

    async def reset_in_answer(self, reader, writer):
        """Taken, and half an answer."""
        answer = await self._answer(await self._request(reader))
        writer.write(answer[: len(answer) - 20])
        await writer.drain()
        await asyncio.sleep(0.05)
        self._reset(writer)

    async def half_closed(self, reader, writer):
        """The other side has said all that it will: nothing. It still listens."""
        writer.write_eof()
        while await reader.read(1000):
            pass

    async def half_closed_in_answer(self, reader, writer):
        """Taken; the answer ends early, in good order."""
        answer = await self._answer(await self._request(reader))
        writer.write(answer[: len(answer) - 20])
        writer.write_eof()
        while await reader.read(1000):
            pass

    async def trickle(self, reader, writer):
        """Taken; one byte at a time, slower than our patience."""
        for byte in await self._answer(await self._request(reader)):
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.05)

    async def trickled_request(self, reader, writer):
        """Read one byte at a time: slow, but it goes through."""
        request = bytearray()
        while not request.endswith(b"\r\n\r\n"):
            request += await reader.readexactly(1)
        length = next(line for line in bytes(request).split(b"\r\n") if line.lower().startswith(b"content-length:"))
        for _ in range(int(length.split(b":")[1])):
            request += await reader.readexactly(1)
        writer.write(await self._answer(bytes(request)))
        await writer.drain()

    async def truncated_gzip(self, reader, writer):
        """A 200 in gzip that breaks off, at the length that it promised."""
        body = gzip.compress(b'{"code":200,"num_records_imported":20,"status":"OK"}')[:-12]
        await self._made_up(reader, writer, "200 OK", body, "Content-Encoding: gzip", "Content-Type: application/json")

    async def html(self, reader, writer):
        """A portal says 200 in Mixpanel's place."""
        await self._made_up(reader, writer, "200 OK", b"<html>Please log in</html>", "Content-Type: text/html")

    async def empty(self, reader, writer):
        """A 200 that says nothing."""
        await self._made_up(reader, writer, "200 OK", b"")

    async def one(self, reader, writer):
        """The other mode's yes, which is none."""
        await self._made_up(reader, writer, "200 OK", b"1")

    async def redirect_loop(self, reader, writer):
        """To itself: whoever follows never comes back."""
        await self._made_up(
            reader, writer, "307 Temporary Redirect", b"", f"Location: http://127.0.0.1:{self.port}/import"
        )

    async def early_refusal(self, reader, writer):
        """503 before the body was read, and closed."""
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()

    async def garbage(self, reader, writer):
        """Not HTTP."""
        await self._request(reader)
        writer.write(bytes(range(256)) * 10)
        await writer.drain()


def port(emulator):
    """Where it listens."""
    return int(emulator.url.rpartition(":")[2])


def batch(count=20):
    """Currents events, all different."""
    return [currents(seed=seed) for seed in range(count)]


async def delivered(app, client, emulator):
    """Brings events in and sees all of them arrive; gives what Mixpanel has."""
    events = batch()
    async with client.post(f"http://127.0.0.1:{app.http.port}/v1/currents", json={"events": events}) as answer:
        assert answer.status == 200
    await until(lambda: app.backlog.events == 0, f"an empty backlog: {app.delivery.last_problem}", 30)
    balanced(app)
    assert app.spool.accounts.total("delivered") == len(events)
    assert app.spool.dead_letters == 0
    assert {event["properties"]["$insert_id"] for event in emulator.events()} == {event["id"] for event in events}


FAULTS = {
    "delay": "delivered",
    "trickled_request": "delivered",
    "delay_beyond": "network",
    "silence": "network",
    "reset_at_once": "network",
    "reset_in_request": "network",
    "reset_in_answer": "network",
    "half_closed": "network",
    "half_closed_in_answer": "network",
    "trickle": "network",
    "truncated_gzip": "network or server",
    "garbage": "network",
    "html": "server",
    "empty": "server",
    "one": "server",
    "early_refusal": "network or server",
    "redirect_loop": "halt",
}
# The emulator had taken the events when the fault came: they are there twice, and known as the same.
TAKEN = ("delay_beyond", "reset_in_answer", "half_closed_in_answer", "trickle")


def test_every_fault_is_tried():
    """A new fault can't be forgotten in the table."""
    methods = {name for name in vars(Proxy) if not name.startswith("_")} - {"none"}
    assert methods == set(FAULTS)


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_is_the_right_class_and_nothing_is_lost(daemon, client, emulator, fault, monkeypatch):
    """Once or twice the fault, then health: each event is delivered, in the books once, twice on the wire only if it was
    taken before.
    """
    judged = []
    note = delivery.Delivery._note
    monkeypatch.setattr(delivery.Delivery, "_note", lambda self, text: (judged.append(text), note(self, text))[1])
    async with Proxy(port(emulator), [fault, fault]) as proxy:
        app = await daemon(mixpanel__url=f"http://127.0.0.1:{proxy.port}", delivery__timeout=TIMEOUT)
        await delivered(app, client, emulator)

    kinds = {text.partition(":")[0] for text in judged}
    verdicts = set(app.delivery.verdicts) - {"delivered"}
    match FAULTS[fault]:
        case "delivered":
            assert (kinds, verdicts) == (set(), set())
        case "halt":
            assert verdicts == {"halt"}
            assert "redirected to" in judged[0]
        case expected:
            assert verdicts == {"retry"}
            assert kinds <= set(expected.split(" or "))
    assert bool(emulator.summary().duplicates) == (fault in TAKEN)


async def test_all_of_them_in_a_row(daemon, client, emulator, monkeypatch):
    """Twenty events through a wire that has every fault, one after the other. The backoff is cut short."""
    monkeypatch.setattr(pacing, "BACKOFF_BASE_S", 0.02)
    monkeypatch.setattr(pacing, "BACKOFF_CAP_S", 0.1)
    faults = [name for name in FAULTS if name not in ("silence", "delay_beyond")]
    async with Proxy(port(emulator), faults) as proxy:
        app = await daemon(
            mixpanel__url=f"http://127.0.0.1:{proxy.port}",
            delivery__timeout="300ms",
            delivery__max_batch_events="5",
        )
        await delivered(app, client, emulator)


# -- certificates ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority():
    """A certificate authority that this machine trusts, in these tests."""
    return trustme.CA()


@pytest.fixture
def _trusted(authority, tmp_path, monkeypatch):
    """As an operator makes an authority known to a daemon."""
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


def server(certificate):
    """A server's context."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


def certificates(authority):
    """The bad ones, by what is wrong with them."""
    past = datetime.now(UTC) - timedelta(days=2)
    return {
        "expired": authority.issue_cert("127.0.0.1", not_before=past - timedelta(days=9), not_after=past),
        "another host": authority.issue_cert("api.mixpanel.example"),
        "unknown authority": trustme.CA().issue_cert("127.0.0.1"),
    }


@pytest.mark.usefixtures("_trusted")
@pytest.mark.parametrize("wrong", ["expired", "another host", "unknown authority"])
async def test_a_certificate_that_cannot_be_trusted(daemon, client, emulator, authority, wrong):
    """Not one event and no credential goes to such a server; all of them to the one that comes afterwards."""
    async with Proxy(port(emulator), context=server(certificates(authority)[wrong])) as proxy:
        app = await daemon(mixpanel__url=f"https://127.0.0.1:{proxy.port}")
        url = f"http://127.0.0.1:{app.http.port}/v1/currents"
        async with client.post(url, json={"events": batch()}) as answer:
            assert answer.status == 200
        await until(lambda: app.delivery.verdicts["retry"], "the refusal")
        assert "ertificate" in app.delivery.last_problem
        assert emulator.summary().requests == 0
        assert app.backlog.events == 20
    async with Proxy(port(emulator), context=server(authority.issue_cert("127.0.0.1"))) as proxy:
        app.transport.use(msgspec.structs.replace(app.transport.target, url=f"https://127.0.0.1:{proxy.port}"), 5.0)
        await until(lambda: app.backlog.events == 0, "the delivery", 30)
    assert len(emulator.events()) == 20
    balanced(app)


def of_few_words(name, issuer, key, signer, extension):
    """A certificate that says no more than it must: nothing by which its issuer's key could be told from others."""
    names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, each)]) for each in (name, issuer)]
    builder = x509.CertificateBuilder(*reversed(names), key.public_key(), 1 + random.getrandbits(64))
    now = datetime.now(UTC)
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    return builder.add_extension(extension, critical=False).sign(signer, hashes.SHA256())


@pytest.mark.parametrize("strict", [False, True])
async def test_a_private_authority_of_few_words(emulator, tmp_path, monkeypatch, strict):
    """As those of proxies that inspect TLS are. Python 3.13 and later are strict by default, and would refuse what it signs."""
    ours, its = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    authority = of_few_words("ours", "ours", ours, ours, x509.BasicConstraints(ca=True, path_length=None))
    certificate = of_few_words("here", "ours", its, ours, here)
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (tmp_path / "ca.pem").write_bytes(authority.public_bytes(pem))
    key = its.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    (tmp_path / "server.pem").write_bytes(certificate.public_bytes(pem) + key)
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(tmp_path / "server.pem")
    default = ssl.create_default_context

    def context(*arguments, **named):
        made = default(*arguments, **named)
        made.verify_flags |= ssl.VERIFY_X509_STRICT if strict else 0
        return made

    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    monkeypatch.setattr(ssl, "create_default_context", context)
    async with Proxy(port(emulator), context=served) as proxy, aiohttp.ClientSession(connector=Connector()) as session:
        await session.post(f"https://127.0.0.1:{proxy.port}/import", data=b"[]")
    assert emulator.summary().requests == 1


@pytest.mark.usefixtures("_trusted")
async def test_a_handshake_that_never_ends(daemon, client, emulator):
    """A port that takes connections and says nothing isn't waited for longer than the timeout."""
    async with Proxy(port(emulator), ["silence"] * 50) as proxy:
        app = await daemon(mixpanel__url=f"https://127.0.0.1:{proxy.port}", delivery__timeout=TIMEOUT)
        verdict = await asyncio.wait_for(app.transport.send(b"", 0, list), 5)

    assert isinstance(verdict, Retry)
    assert verdict.kind == "network"
