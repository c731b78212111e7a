"""Who may ask the admin side what: names, tokens, origins, TLS, and what nobody gets beyond loopback without saying so."""

import asyncio
import contextlib
import gzip
import io
import os
import random
import ssl
import tomllib
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import aiohttp
import pytest
import trustme
from conftest import SLOW, balanced, currents, free_port, until
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bench import restart
from bridged import cli
from bridged.admin import server
from bridged.commands.client import Daemon, this_certificate
from bridged.config import load
from bridged.config_text import default_toml
from bridged.errors import ConfigError, UpstreamError
from bridged.sources.tls import server_context

PURGE = "/api/dead-letters/purge"


async def answer(client, app, method, path, headers, body=None):
    """Status, and what went wrong."""
    url = f"http://{app.config.admin.listen}{path}"
    async with client.request(method, url, headers=headers, data=body) as response:
        return response.status, (await response.json()).get("error", "")


# -- names -------------------------------------------------------------------------------------------------------------


async def test_a_name_of_ours(daemon, client):
    """What a browser or a tool calls us by: localhost, any address, and what [admin] hosts names."""
    app = await daemon(admin__hosts='["Bridged.lan"]')
    hosts = ["localhost", "LOCALHOST:8481", "localhost.", "127.0.0.1", "127.0.0.1:1", "[::1]:8481", "10.1.2.3:8481"]

    for host in (*hosts, "bridged.lan", "BRIDGED.lan:80"):
        assert (await answer(client, app, "GET", "/api/status", {"Host": host})) == (200, ""), host


@pytest.mark.parametrize("count", [1, 2])
async def test_who_has_said_all_gets_his_answer(daemon, count):
    """`printf ... | nc -N`, as a check of health may be: half-closed, it is answered, and then closed."""
    app = await daemon()
    reader, writer = await asyncio.open_connection("127.0.0.1", app.admin.port)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * count)
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 1.5 * SLOW)
    assert answer.count(b"HTTP/1.1 200 OK") == count
    writer.close()
    # Who has said nothing is waited for by nobody, and neither is who listens to a stream of events.
    for asked in (b"", b"GET /api/live HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        reader, writer = await asyncio.open_connection("127.0.0.1", app.admin.port)
        writer.write(asked)
        writer.write_eof()
        await asyncio.wait_for(reader.read(), 10 * SLOW)
        writer.close()


async def test_a_name_that_is_not_ours(daemon, client):
    """A page that makes its own name point at this machine (DNS rebinding) learns nothing; the answer names the key."""
    app = await daemon()
    hosts = [
        "evil.example",
        "evil.example:8481",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "[::1",
        "",
        "a@[::1@b",
    ]

    for host in hosts:
        for path in ("/api/status", "/metrics", "/readyz", "/nowhere"):
            status, error = await answer(client, app, "GET", path, {"Host": host})
            assert (status, "[admin] hosts" in error) == (421, True), (host, path)


async def test_a_probe_of_life_needs_no_name(daemon, client):
    """/healthz says nothing that anybody may not know, and load balancers ask by names of their own."""
    app = await daemon(admin__token="0123456789abcdef")

    assert (await answer(client, app, "GET", "/healthz", {"Host": "balancer.example"}))[0] == 200


# -- the token ---------------------------------------------------------------------------------------------------------


async def test_a_wrong_token(daemon, client):
    """Everything but /healthz wants the token, questions and orders alike; a wrong name is told before a wrong token."""
    app = await daemon(admin__token="0123456789abcdef")
    wrong = [
        "",
        "Bearer",
        "Bearer 0123456789abcde",
        "Bearer 0123456789abcdefg",
        "Basic 0123456789abcdef",
        "Bearer \u00e9",
    ]

    for given in wrong:
        headers = {"Authorization": given, "Content-Type": "application/json"}
        for method, path in (
            ("GET", "/api/status"),
            ("GET", "/metrics"),
            ("GET", "/readyz"),
            ("POST", PURGE),
            ("GET", "/x"),
        ):
            status, error = await answer(client, app, method, path, headers)
            assert (status, "0123456789abcdef" in error) == (401, False), (given, path)
        assert (await answer(client, app, "GET", "/api/status", headers | {"Host": "evil.example"}))[0] == 421
    right = {"Authorization": "bearer 0123456789abcdef"}
    assert (await answer(client, app, "GET", "/api/status", right))[0] == 200


@pytest.mark.parametrize("listen", ["0.0.0.0:8481", "[::]:8481", "192.0.2.1:8481", "bridged.example:8481"])
def test_beyond_loopback_only_with_a_token(listen):
    """A configuration that shows the admin side to other machines must have a token, from wherever."""
    environ = {"BRIDGED__MIXPANEL__TOKEN": "t", "BRIDGED__ADMIN__LISTEN": listen}

    with pytest.raises(ConfigError, match=r"set admin\.token"):
        load(None, environ)
    assert load(None, environ | {"BRIDGED__ADMIN__TOKEN": "0123456789abcdef"}).admin.listen == listen


# -- orders ------------------------------------------------------------------------------------------------------------


async def purge(client, app, headers):
    """The order to purge everything, with the headers that a browser adds; {host} is ours."""
    headers = {name: value.format(host=app.config.admin.listen) for name, value in headers.items()}
    return await answer(client, app, "POST", PURGE, headers | {"Content-Type": "application/json"}, b'{"all": true}')


async def dead_letter(client, app):
    """Makes one."""
    async with client.post(
        f"http://{app.config.sources.http.listen}/v1/currents", json={"events": [{"x": 1}]}
    ) as posted:
        assert posted.status == 200


async def test_a_page_elsewhere_changes_nothing(daemon, client):
    """An order that a browser sends for another origin's page is refused, and has no effect."""
    app = await daemon()
    await dead_letter(client, app)

    for headers in (
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://[::1"},
        {"Origin": "http://{host}", "Sec-Fetch-Site": "cross-site"},
    ):
        refusal = (403, "a page of another origin may not change anything here")
        assert await purge(client, app, headers) == refusal, headers
    assert app.spool.dead_letters == 1


async def test_a_proxy_that_keeps_the_name_to_itself(daemon, client):
    """Our own page is refused behind it; the hint says what the proxy has to do."""
    app = await daemon()
    url = f"http://{app.config.admin.listen}/api/login"
    headers = {"Origin": "https://bridged.example", "Sec-Fetch-Site": "same-origin"}
    async with client.post(url, json={"token": "x"}, headers=headers) as got:
        told = await got.json()
    assert (got.status, "Host" in told["hint"], "https://bridged.example" in told["hint"]) == (403, True, True)


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        ("https://bridged.example", "bridged.example:443", 200),
        ("http://bridged.example", "Bridged.example:80", 200),
        ("https://bridged.example", "bridged.example:80", 403),
        ("https://bridged.example:8443", "bridged.example:443", 403),
        ("null", "bridged.example:443", 403),
    ],
)
async def test_a_proxy_that_says_the_port_that_browsers_leave_out(daemon, client, origin, host, status):
    """`proxy_set_header Host $host:$server_port` is in many a recipe, and means the same origin."""
    app = await daemon(admin__hosts='["bridged.example"]')
    async with client.get(f"http://{app.config.admin.listen}/api/session") as told:
        csrf = (await told.json())["csrf"]
    assert (await purge(client, app, {"Origin": origin, "Host": host, "X-CSRF-Token": csrf}))[0] == status


async def test_our_own_page_and_tools_may(daemon, client):
    """Tools send neither header; our own page the right ones, and the CSRF token; a proxy in front may have ended the TLS."""
    app = await daemon()
    async with client.get(f"http://{app.config.admin.listen}/api/session") as told:
        csrf = (await told.json())["csrf"]

    for headers in (
        {},
        {"Sec-Fetch-Site": "same-origin", "Origin": "http://{host}"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "https://{host}"},
    ):
        await dead_letter(client, app)
        if headers:
            for wrong in ({}, {"X-CSRF-Token": ""}, {"X-CSRF-Token": csrf[:-1]}):
                status, error = await purge(client, app, headers | wrong)
                assert (status, "X-CSRF-Token" in error) == (403, True), headers
            assert app.spool.dead_letters == 1
        assert await purge(client, app, headers | {"X-CSRF-Token": csrf} if headers else {}) == (200, ""), headers
        assert app.spool.dead_letters == 0
    balanced(app)


async def test_a_form_is_no_order(daemon, client):
    """What a form can send is refused by its type; and nobody answers the question that comes before other requests."""
    app = await daemon()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        status, error = await answer(client, app, "POST", PURGE, {"Content-Type": kind}, b'{"all": true}')
        assert (status, "application/json" in error) == (415, True), kind
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    async with client.options(f"http://{app.config.admin.listen}{PURGE}", headers=preflight) as asked:
        assert asked.status == 403
        assert not [name for name in asked.headers if name.startswith("Access-Control-")]


@pytest.mark.parametrize(
    "line",
    [
        b"Origin: http://\xff",
        b"Origin: http://\xed\xa0\x80",
        b"Host: \xff",
        b"X-CSRF-Token: \xff",
        b"Cookie: \xff=\xff",
    ],
)
async def test_what_is_no_text_is_no_mistake_of_ours(daemon, caplog, line):
    """Bytes that are no UTF-8 are refused like anything else that is wrong; nobody without a token fills the log with them."""
    app = await daemon(admin__token="0123456789abcdef")
    head = b"" if line.startswith(b"Host") else b"Host: localhost\r\n"
    head += line + b"\r\nContent-Type: application/json\r\nContent-Length: 13\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", app.admin.port)
    writer.write(b"POST /api/login HTTP/1.1\r\n" + head + b'{"token":"x"}')
    got = await asyncio.wait_for(reader.readuntil(b"\r\n"), 10 * SLOW)
    writer.close()

    assert 400 <= int(got.split(b" ")[1]) < 500
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_answers_are_nobodys_to_embed(daemon, client):
    """No page may frame an answer, guess its type or keep it."""
    app = await daemon()
    for path in ("/api/status", "/nowhere", "/healthz"):
        async with client.get(f"http://{app.config.admin.listen}{path}") as got:
            assert got.headers["X-Frame-Options"] == "DENY"
            assert got.headers["X-Content-Type-Options"] == "nosniff"
            assert got.headers["Cache-Control"] == "no-store"
            assert got.headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert got.headers["Server"] == "bridged"


# -- size and time -----------------------------------------------------------------------------------------------------


async def test_a_body_that_is_too_large(daemon, client):
    """16 MiB and no more, told in the API's own words."""
    app = await daemon()
    headers = {"Content-Type": "application/json"}
    status, error = await answer(client, app, "POST", "/api/replay", headers, io.BytesIO(b" " * (16 * 2**20 + 1)))

    assert status == 413
    assert error


async def raw(app, head, body=b""):
    """The answer to a request of which no more is sent than this; the connection stays open meanwhile."""
    reader, writer = await asyncio.open_connection("127.0.0.1", app.admin.port)
    writer.write(head.replace("\n", "\r\n").encode() + b"\r\n" + body)
    try:
        return await asyncio.wait_for(reader.readuntil(b"\r\n"), 10 * SLOW)
    finally:
        writer.close()


LOGIN = "POST /api/login HTTP/1.1\nHost: localhost\nContent-Type: application/json\n"


async def test_a_stranger_takes_no_memory(daemon, client):
    """Without the token no more than a login is read: 413 beyond 4 KiB, however it is declared or packed; with it, 16 MiB."""
    app = await daemon(admin__token="0123456789abcdef")
    packed = gzip.compress(b'{"token": "' + b"x" * 5000)

    assert b" 413 " in await raw(app, LOGIN + "Content-Length: 16000000\n", b'{"token":"')
    assert b" 413 " in await raw(app, LOGIN + "Transfer-Encoding: chunked\n", b"1400\r\n" + b"x" * 5120 + b"\r\n")
    assert b" 413 " in await raw(app, LOGIN + f"Content-Encoding: gzip\nContent-Length: {len(packed)}\n", packed)
    for path in ("/", "/page/api.js", "/healthz"):
        head = f"GET {path} HTTP/1.1\nHost: localhost\nContent-Length: 16000000\n"
        assert b" 413 " in await raw(app, head, b"x"), path
    headers = {"Content-Type": "application/json"}
    assert (await answer(client, app, "POST", "/api/login", headers, b'{"token": "0123456789abcdef"}'))[0] == 200
    headers["Authorization"] = "Bearer 0123456789abcdef"
    assert (await answer(client, app, "POST", PURGE, headers, b" " * 5000 + b'{"all": true}'))[0] == 200


async def test_no_body_is_read_for_nothing(daemon):
    """What is answered 404 or 405 anyway is answered at once."""
    app = await daemon()
    for path, status in (("/", b" 405 "), ("/nowhere", b" 404 ")):
        assert status in await raw(app, f"POST {path} HTTP/1.1\nHost: localhost\nContent-Length: 16000000\n", b"x")


async def test_who_leaves_is_no_error(daemon, caplog):
    """A login that is given up leaves no traceback behind, or anybody could fill the disk of the log."""
    app = await daemon(admin__token="0123456789abcdef")
    _, writer = await asyncio.open_connection("127.0.0.1", app.admin.port)
    writer.write((LOGIN + "Content-Length: 100\n\n").replace("\n", "\r\n").encode() + b'{"token":"')
    await until(lambda: app.admin.connections == 1)
    await asyncio.sleep(0.1 * SLOW)
    writer.transport.abort()
    await until(lambda: app.admin.connections == 0)
    await asyncio.sleep(0.1)

    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_damaged_body(daemon):
    """What isn't packed as it says is the sender's mistake, and no 500."""
    app = await daemon()
    assert b" 400 " in await raw(app, LOGIN + "Content-Encoding: gzip\nContent-Length: 8\n", b"not gzip")


KNOWN = "GET /api/status HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer 0123456789abcdef\r\n\r\n"


async def ask(reader, writer):
    """Whether somebody who may ask is answered."""
    writer.write(KNOWN.encode())
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10 * SLOW)
    await reader.readexactly(int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0]))
    return b" 200 " in head


async def known(app):
    """A connection on which somebody who may has asked."""
    reader, writer = await asyncio.open_connection("127.0.0.1", app.admin.port)
    assert await ask(reader, writer)
    return reader, writer


async def test_so_many_connections_and_no_more(daemon, monkeypatch):
    """Who opens one connection after the other takes none of the doors' files; when they have gone, others may come."""
    monkeypatch.setattr(server, "admin_connections", lambda: 4)
    app = await daemon(admin__token="0123456789abcdef")
    opened = [await known(app) for _ in range(4)]
    head = "GET /healthz HTTP/1.1\nHost: localhost\n"
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await raw(app, head)
    for _, writer in opened:
        writer.close()
    await until(lambda: app.admin.connections == 0)

    assert b" 200 " in await raw(app, head)


async def test_who_shows_no_token_keeps_nobody_out(daemon, monkeypatch):
    """However many connections strangers hold, and whatever they ask: who comes next has a place, and who is known keeps his."""
    monkeypatch.setattr(server, "admin_connections", lambda: 4)
    app = await daemon(admin__token="0123456789abcdef")
    reader, writer = await known(app)
    sent = (b"", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", LOGIN.replace("\n", "\r\n").encode())
    strangers = [await asyncio.open_connection("127.0.0.1", app.admin.port) for _ in sent]
    for (_, stranger), words in zip(strangers, sent, strict=True):
        stranger.write(words)
    await until(lambda: app.admin.connections == 4)
    friends = [await known(app) for _ in sent]
    for stranger, opened in strangers:
        with contextlib.suppress(ConnectionError):
            await asyncio.wait_for(stranger.read(), 10 * SLOW)
        opened.close()

    assert app.admin.connections == 4
    assert await ask(reader, writer)
    for _, opened in [*friends, (reader, writer)]:
        opened.close()


async def test_many_at_once_are_no_more(daemon, monkeypatch):
    """Those that are accepted in one turn of the loop are counted one by one."""
    monkeypatch.setattr(server, "admin_connections", lambda: 4)
    app = await daemon(admin__token="0123456789abcdef")
    opened = await asyncio.gather(*[asyncio.open_connection("127.0.0.1", app.admin.port) for _ in range(40)])
    ended = [asyncio.ensure_future(reader.read()) for reader, _ in opened]
    await until(lambda: sum(one.done() for one in ended) >= 36, "the end of those that are too many")

    for _, writer in opened:
        writer.close()
    await asyncio.gather(*ended, return_exceptions=True)


async def test_a_handshake_takes_a_place_and_is_not_waited_for(daemon, certificate, tmp_path, monkeypatch):
    """Over TLS, too, silent ones keep nobody out; who made room during his handshake is gone, and who never ends it soon is."""
    monkeypatch.setattr(server, "admin_connections", lambda: 2)
    monkeypatch.setattr(server, "_HANDSHAKE_S", 2.0 * SLOW)
    trust = certificate("127.0.0.1")
    app = await daemon(
        admin__token="0123456789abcdef",
        admin__tls_cert=str(tmp_path / "cert.pem"),
        admin__tls_key=str(tmp_path / "key.pem"),
    )
    early = [await asyncio.open_connection("127.0.0.1", app.admin.port) for _ in range(2)]
    await until(lambda: app.admin.connections == 2, "those who have said nothing yet")
    reader, writer = await asyncio.open_connection("127.0.0.1", app.admin.port, ssl=trust)
    assert await ask(reader, writer)
    assert app.admin.connections == 2
    for silent, opened in early:
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(silent.read(), 30 * SLOW) == b""
        opened.close()
    writer.close()


@pytest.mark.parametrize(
    ("sent", "end"),
    [
        (
            b"POST /api/replay HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n[",
            b" 408 ",
        ),
        (b"GET /api/status HTTP/1.1\r\nHost: local", b""),
        (b"", b""),
    ],
)
async def test_who_is_slow_is_sent_away(daemon, monkeypatch, sent, end):
    """A body that doesn't come is answered 408; a head that doesn't is the end of the connection."""
    monkeypatch.setattr(server, "_BODY_S", 0.2)
    monkeypatch.setattr(server, "_HEAD_S", 0.2)
    app = await daemon()
    reader, writer = await asyncio.open_connection("127.0.0.1", app.admin.port)
    writer.write(sent)

    got = await asyncio.wait_for(reader.read(), 20 * SLOW)
    assert got[8 : 8 + len(end)] == end
    assert bool(got) == bool(end)
    writer.close()


async def test_what_is_no_http_is_not_repeated(daemon):
    """The answer of aiohttp itself to a malformed request quotes it."""
    app = await daemon()
    reader, writer = await asyncio.open_connection("127.0.0.1", app.admin.port)
    writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer hunter2\x00\r\n\r\n")
    got = await reader.read()
    writer.close()

    assert got.partition(b" ")[2].startswith(b"400 ")
    assert b"hunter2" not in got


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path):
    """Writes a certificate of a private authority: for a name, of which nobody on this machine has heard."""

    def write(name="bridged.example", **time):
        authority = trustme.CA()
        issued = authority.issue_cert(name, **time)
        issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
        issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
        context = ssl.create_default_context()
        authority.configure_trust(context)
        return context

    return write


async def test_tls(daemon, certificate, tmp_path):
    """Browsers come with the name and the authority, commands know the certificate itself; plain HTTP gets nothing."""
    trusted = certificate()
    app = await daemon(admin__tls_cert=str(tmp_path / "cert.pem"), admin__tls_key=str(tmp_path / "key.pem"))
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", app.admin.port, ssl=trusted, server_hostname="bridged.example"
    )
    writer.write(b"GET /api/status HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()

    commands = Daemon.admin(app.config)
    assert (await asyncio.to_thread(commands.ask, "/api/status", dict))["state"] == "idle"
    async with aiohttp.ClientSession() as plain:
        with pytest.raises(aiohttp.ClientError):
            await plain.get(f"http://{app.config.admin.listen}/healthz")


def certified(subject, issuer, key, signer):
    """A certificate as two lines of openssl make it: not a word on what it is for."""
    now = datetime.now(UTC)
    name = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, each)]) for each in (subject, issuer)]
    builder = x509.CertificateBuilder(*reversed(name), key.public_key(), 1 + random.getrandbits(64))
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    if subject == issuer:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize("strict", [False, True])
async def test_a_certificate_of_a_private_authority(daemon, tmp_path, monkeypatch, strict):
    """With its chain in the file, as the key wants it; Python 3.13 and later are strict by default, and would refuse it."""
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    chain = certified("bridged", "ours", keys[0], keys[1]) + certified("ours", "ours", keys[1], keys[1])
    (tmp_path / "cert.pem").write_bytes(chain)
    (tmp_path / "key.pem").write_bytes(
        keys[0].private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    default = ssl.create_default_context

    def context(*arguments, **named):
        made = default(*arguments, **named)
        made.verify_flags |= ssl.VERIFY_X509_STRICT if strict else 0
        return made

    monkeypatch.setattr(ssl, "create_default_context", context)
    app = await daemon(admin__tls_cert=str(tmp_path / "cert.pem"), admin__tls_key=str(tmp_path / "key.pem"))

    assert (await asyncio.to_thread(Daemon.admin(app.config).ask, "/api/status", dict))["state"] == "idle"


def test_a_certificate_that_systemd_hands_over_while_the_service_runs():
    """With the service stopped there is no copy of it: that is told, and not a mistake in the configuration."""
    with pytest.raises(ConfigError) as caught:
        this_certificate("/run/credentials/bridged.service/tls_cert", "[admin] tls_cert")
    assert "does it run?" in caught.value.hint


async def test_commands_take_no_other_certificate(daemon, certificate, tmp_path):
    """Who stands at our address with another certificate doesn't get the token."""
    certificate()
    app = await daemon(
        admin__tls_cert=str(tmp_path / "cert.pem"),
        admin__tls_key=str(tmp_path / "key.pem"),
        admin__token="0123456789abcdef",
    )
    commands = Daemon.admin(app.config)
    certificate()

    with pytest.raises(UpstreamError, match="CERTIFICATE_VERIFY_FAILED") as caught:
        await asyncio.to_thread(commands.ask, "/api/status", dict)
    assert "another certificate than [admin] tls_cert" in str(caught.value)
    assert "have the daemon read it" in caught.value.hint


@pytest.mark.parametrize(
    "load", [partial(server_context, "sources.http"), partial(server._load, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))]
)
def test_a_key_that_is_roots_alone_says_how_the_service_gets_it(tmp_path, load, an_ordinary_user):
    """`check` as root reads it, the service doesn't: its hint is systemd's way."""
    with pytest.raises(ConfigError) as caught:
        load(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))
    assert "LoadCredential=" in caught.value.hint


async def test_test_events_go_to_a_door_with_tls(daemon, certificate, tmp_path):
    """The HTTP door's own certificate is asked for, and its own key is named when it can't be read."""
    certificate()
    door = {f"sources__http__tls_{name}": str(tmp_path / f"{name}.pem") for name in ("cert", "key")}
    app = await daemon(**door)
    address = app.config.sources.http.listen
    settings = tmp_path / "test.toml"
    settings.write_text(
        f"[sources.http]\nlisten = '{address}'\ntls_cert = '{tmp_path}/cert.pem'\ntls_key = '{tmp_path}/key.pem'\n"
        f"bearer_token = '{app.config.sources.http.bearer_token}'\n[spool]\npath = '{tmp_path}/other.db'\n"
    )
    send = ["send-test-events", "--config", str(settings), "--types", "users.behaviors.CustomEvent"]
    assert await asyncio.to_thread(cli.main, send) == 0
    settings.write_text(settings.read_text().replace("cert.pem", "gone.pem"))
    assert await asyncio.to_thread(cli.main, send) == 78


async def test_a_renewed_certificate_is_taken_over(daemon, certificate, tmp_path):
    """At SIGHUP, without a restart; files that don't fit together leave the old one in force."""
    certificate()
    app = await daemon(admin__tls_cert=str(tmp_path / "cert.pem"), admin__tls_key=str(tmp_path / "key.pem"))
    certificate()
    commands = Daemon.admin(app.config)
    app.reload(lambda: app.config, app.certificates.read_again)
    assert (await asyncio.to_thread(commands.ask, "/api/status", dict))["state"] == "idle"

    old = (tmp_path / "cert.pem").read_bytes()
    certificate()
    (tmp_path / "cert.pem").write_bytes(old)
    app.reload(lambda: app.config, app.certificates.read_again)
    said = await asyncio.to_thread(commands.ask, "/api/status", dict)
    assert (said["state"], "admin.tls_cert" in said["reload"]["problem"]) == ("idle", True)
    assert ["admin.tls_cert" in entry.text for entry in app.activity.newest(3) if entry.kind == "reload_failed"] == [
        True
    ]
    certificate()
    app.reload(lambda: app.config, app.certificates.read_again)
    assert app.reload_problem == ""


@pytest.mark.parametrize("broken", ["cert.pem", "key.pem", "both", "half"])
async def test_files_that_are_no_certificate(daemon, certificate, tmp_path, broken):
    """A configuration that can't be used is told with the names of the keys and the files."""
    certificate()
    for name in ("cert.pem", "key.pem"):
        if broken in (name, "both"):
            (tmp_path / name).write_text("nothing")
    key = "" if broken == "half" else str(tmp_path / "key.pem")

    with pytest.raises(ConfigError, match=r"admin\.tls_cert"):
        await daemon(admin__tls_cert=str(tmp_path / "cert.pem"), admin__tls_key=key)


# -- what listens ------------------------------------------------------------------------------------------------------


def listening(pid):
    """Every address at which a process listens or takes datagrams, from the kernel's own tables."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(entry).removeprefix("socket:[").rstrip("]"))  # noqa: PTH115
    found = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            # 0A: listening. A datagram socket that isn't connected (07) takes from anybody.
            if fields[9] in inodes and fields[3] in ("0A", "07"):
                address, _, port = fields[1].partition(":")
                found.add((table, address, int(port, 16)))
    return found


async def test_nothing_listens_beyond_loopback(tmp_path_factory, emulator):
    """With every address at its default but for free ports, only 127.0.0.1 is listened at: so says the kernel."""
    folder = tmp_path_factory.mktemp("d")
    defaults = tomllib.loads(default_toml())
    hosts = [
        defaults["sources"]["http"]["listen"],
        defaults["admin"]["listen"],
        *defaults["sources"]["stream"]["listen"],
    ]
    assert {host.removeprefix("tcp:").rpartition(":")[0] for host in hosts if not host.startswith("unix:")} == {
        "127.0.0.1"
    }
    async with restart.Manager(folder, emulator.url) as manager:
        await manager.start(handed_over=False)
        await manager.hears("READY=1")
        event = currents()
        event["user"]["external_user_id"] = "ada"
        async with (
            aiohttp.ClientSession() as client,
            client.post(f"http://127.0.0.1:{manager.ports['http']}/v1/currents", json={"events": [event]}) as posted,
        ):
            assert posted.status == 200
        await until(emulator.events, "the event")
        seen = listening(manager.process.pid)
        await manager.stop()

    assert seen == {("tcp", "0100007F", port) for port in manager.ports.values()}


@pytest.mark.parametrize("key", ["sources__http__listen", "sources__stream__listen"])
def test_doors_beyond_loopback_must_be_meant(key):
    """The HTTP door demands a bearer token then, the stream door that it is said twice."""
    address = f"0.0.0.0:{free_port()}"
    value = f'["tcp:{address}"]' if "stream" in key else address
    environ = {"BRIDGED__MIXPANEL__TOKEN": "t", f"BRIDGED__{key.upper()}": value}

    with pytest.raises(ConfigError, match="reachable from other machines"):
        load(None, environ)
