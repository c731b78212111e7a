"""The page's door: its files, the login, and what a browser may be made to send by a page of somebody else."""

import asyncio
import re
import zipfile
from pathlib import Path

import aiohttp
import pytest
import trustme
from conftest import SLOW
from hypothesis import given
from hypothesis import strategies as st

from bridged.admin import page
from bridged.admin.sessions import GUESS_EVERY_S, GUESSES, LIFE_S, MAX_SESSIONS, Guesses, Sessions

ROOT = Path(__file__).parent.parent
TOKEN = "0123456789abcdef"
PURGE = "/api/dead-letters/purge"


def base(app):
    """Where the admin listener is."""
    return f"http://{app.config.admin.listen}"


async def say(client, app, method, path, json=None, **headers):
    """Status, headers and JSON of an answer."""
    async with client.request(method, base(app) + path, json=json, headers=headers) as got:
        return got.status, got.headers, await got.json()


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A page of our own."""
    folder = tmp_path / "page"
    (folder / "vendor").mkdir(parents=True)
    (folder / "index.html").write_text("<!doctype html><title>bridged</title>")
    (folder / "vendor" / "chart.min.js").write_text("'0123456789abcdef'")
    (folder / "secret.key").write_text("private")
    (tmp_path / "outside.txt").write_text("private")
    monkeypatch.setattr(page.Page.__init__, "__defaults__", (folder,))
    return folder


# -- files -------------------------------------------------------------------------------------------------------------


async def test_the_files(files, daemon, client):
    """Each with its type, the policy, and a tag by which a browser needs it only once; a word of ours in them isn't masked."""
    app = await daemon(admin__token=TOKEN)
    for path, kind, body in (
        ("/", "text/html", "<!doctype html><title>bridged</title>"),
        ("/page/index.html", "text/html", "<!doctype html><title>bridged</title>"),
        ("/page/vendor/chart.min.js", "text/javascript", "'0123456789abcdef'"),
    ):
        async with client.get(base(app) + path) as got:
            assert (got.status, got.content_type, await got.text()) == (200, kind, body)
            tag = got.headers["ETag"]
            policy = got.headers["Content-Security-Policy"].split("; ")
            assert policy[0] == "default-src 'self'"
            assert "frame-ancestors 'none'" in policy
            assert not [rule for rule in policy if "unsafe" in rule or "*" in rule]
            assert got.headers["Cache-Control"] == "no-cache"
            assert got.headers["X-Content-Type-Options"] == "nosniff"
            assert got.headers["Referrer-Policy"] == "no-referrer"
            assert got.headers["X-Frame-Options"] == "DENY"
        async with client.get(base(app) + path, headers={"If-None-Match": tag}) as again:
            assert (again.status, await again.read()) == (304, b"")


async def test_nothing_else_is_served(files, daemon, client):
    """Neither a listing, nor a kind that isn't a page's, nor anything outside of the folder, however it is spelled."""
    app = await daemon()
    for path in (
        "/page",
        "/page/",
        "/page/vendor",
        "/page/vendor/",
        "/page/secret.key",
        "/page/../outside.txt",
        "/page/%2e%2e/outside.txt",
        "/page/..%2foutside.txt",
        "/page//etc/passwd",
        "/page/index.html%00.js",
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", app.admin.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        got = await asyncio.wait_for(reader.read(), 20 * SLOW)
        writer.close()
        assert re.match(rb"HTTP/1.1 40[04] ", got), path
        assert b"private" not in got


def test_the_wheel_has_the_page(tmp_path):
    """What is installed serves what lies in the source."""
    build = pytest.importorskip(
        "hatchling.builders.wheel", reason="hatchling builds the wheel; without it none is built"
    )
    built = next(iter(build.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])))
    with zipfile.ZipFile(built) as wheel:
        names = set(wheel.namelist())
    ours = {path.relative_to(ROOT).as_posix() for path in page.FOLDER.rglob("*") if path.is_file()}
    assert ours <= names
    assert "bridged/app.py" in names


# -- the login ---------------------------------------------------------------------------------------------------------


async def test_without_a_token_there_is_no_login(daemon, client):
    """The page learns at once that it may ask, and its CSRF token."""
    app = await daemon()
    status, _, standing = await say(client, app, "GET", "/api/session")
    assert (status, standing["login_needed"], standing["logged_in"]) == (200, False, False)
    assert len(standing["csrf"]) >= 32
    status, headers, _ = await say(client, app, "POST", "/api/login", {"token": "anything"})
    assert (status, "Set-Cookie" in headers) == (200, False)


async def test_a_login(daemon):
    """The token once, then a cookie that no script reads and no other site sends; changes want the CSRF token as well."""
    app = await daemon(admin__token=TOKEN)
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as client:
        status, _, standing = await say(client, app, "GET", "/api/session")
        assert (status, standing["login_needed"], standing["logged_in"], standing["csrf"]) == (200, True, False, "")
        assert (await say(client, app, "GET", "/api/status"))[0] == 401

        status, headers, standing = await say(client, app, "POST", "/api/login", {"token": TOKEN})
        assert (status, standing["logged_in"]) == (200, True)
        cookie = headers["Set-Cookie"]
        assert cookie.startswith(f"bridged_session_{app.admin.port}=")
        for part in ("HttpOnly", "SameSite=Strict", "Path=/", f"Max-Age={LIFE_S:.0f}"):
            assert part in cookie
        assert "Secure" not in cookie
        assert TOKEN not in f"{cookie}{standing}"

        csrf = standing["csrf"]
        assert (await say(client, app, "GET", "/api/session"))[2] == standing
        assert (await say(client, app, "GET", "/api/status"))[0] == 200
        for wrong in ({}, {"X-CSRF-Token": "x"}, {"X-CSRF-Token": "\u00e9"}):
            status, _, refused = await say(client, app, "POST", PURGE, {"all": True}, **wrong)
            assert (status, refused["csrf"]) == (403, True)
        assert (await say(client, app, "POST", PURGE, {"all": True}, **{"X-CSRF-Token": csrf}))[0] == 200
        # A page at another port of this machine is the same site to the cookie.
        origin = {"Origin": "http://127.0.0.1:1", "X-CSRF-Token": csrf}
        assert (await say(client, app, "POST", PURGE, {"all": True}, **origin))[0] == 403

        status, headers, standing = await say(client, app, "POST", "/api/logout", {}, **{"X-CSRF-Token": csrf})
        assert (status, standing["logged_in"]) == (200, False)
        key = cookie.partition("=")[2].partition(";")[0]
        old = {"Cookie": f"bridged_session_{app.admin.port}={key}"}
        assert (await say(client, app, "GET", "/api/status", **old))[0] == 401


async def test_the_bearer_token_needs_no_csrf(daemon, client):
    """Tools stay as they are; a wrong token beside a good cookie is a wrong token."""
    app = await daemon(admin__token=TOKEN)
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    assert (await say(client, app, "POST", PURGE, {"all": True}, **bearer))[0] == 200
    _, headers, _ = await say(client, app, "POST", "/api/login", {"token": TOKEN})
    cookie = {"Cookie": headers["Set-Cookie"].partition(";")[0]}
    assert (await say(client, app, "GET", "/api/status", **cookie))[0] == 200
    assert (await say(client, app, "GET", "/api/status", **cookie, Authorization="Bearer wrong"))[0] == 401


async def test_a_proxy_that_wants_a_password_of_its_own(daemon, client):
    """A browser shows Basic authentication, which a proxy in front asks for, to us as well: whoever is logged in still is."""
    app = await daemon(admin__token=TOKEN)
    basic = {"Authorization": "Basic b3BzOnNlY3JldA=="}
    _, headers, standing = await say(client, app, "POST", "/api/login", {"token": TOKEN}, **basic)
    cookie = {"Cookie": headers["Set-Cookie"].partition(";")[0], **basic}
    assert (await say(client, app, "GET", "/api/status", **cookie))[0] == 200
    assert (await say(client, app, "GET", "/api/session", **cookie))[2]["logged_in"]
    assert (await say(client, app, "POST", PURGE, {"all": True}, **cookie))[0] == 403
    assert (await say(client, app, "POST", PURGE, {"all": True}, **cookie, **{"X-CSRF-Token": standing["csrf"]}))[
        0
    ] == 200
    assert (await say(client, app, "GET", "/api/status", **basic))[0] == 401


async def test_guesses_are_slow(daemon, client):
    """After ten wrong tokens the right one has to wait as well; programs with the bearer token don't."""
    app = await daemon(admin__token=TOKEN)
    for n in range(GUESSES):
        status, _, _ = await say(client, app, "POST", "/api/login", {"token": f"guess {n}"})
        assert status == 401
    for token in ("another", TOKEN):
        status, headers, _ = await say(client, app, "POST", "/api/login", {"token": token})
        assert status == 429
        assert 0 < int(headers["Retry-After"]) <= GUESS_EVERY_S
        assert "Set-Cookie" not in headers
    assert (await say(client, app, "GET", "/api/status", Authorization=f"Bearer {TOKEN}"))[0] == 200


async def test_a_login_by_a_page_elsewhere(daemon, client):
    """Nobody is logged in by another origin's page, nor guesses through a visitor's browser."""
    app = await daemon(admin__token=TOKEN)
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert (await say(client, app, "POST", "/api/login", {"token": TOKEN}, **headers))[0] == 403
    assert (await say(client, app, "POST", "/api/login", {"token": TOKEN}, Host="evil.example"))[0] == 421


async def test_under_tls_the_cookie_is_secure(daemon, client, tmp_path):
    """Our own TLS, or a proxy's, which the browser tells of by its Origin."""
    app = await daemon(admin__token=TOKEN)
    origin = {"Origin": f"https://{app.config.admin.listen}"}
    _, headers, _ = await say(client, app, "POST", "/api/login", {"token": TOKEN}, **origin)
    assert "Secure" in headers["Set-Cookie"]
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    second = await daemon(
        admin__token=TOKEN,
        admin__tls_cert=str(tmp_path / "cert.pem"),
        admin__tls_key=str(tmp_path / "key.pem"),
        spool__path=str(tmp_path / "second.db"),
        sources__stream__listen="[]",
    )
    url = f"https://{second.config.admin.listen}/api/login"
    async with client.post(url, json={"token": TOKEN}, ssl=False) as got:
        assert got.status == 200
        assert "Secure" in got.headers["Set-Cookie"]


# -- sessions, by themselves -------------------------------------------------------------------------------------------


def test_sessions_end():
    """By age, by number, by logging out."""
    sessions = Sessions()
    key, session = sessions.begin(0)
    assert sessions.find(key, LIFE_S - 1) is session
    assert sessions.find(key, LIFE_S) is None
    assert sessions.find("", 0) is None
    assert sessions.find("\udcff", 0) is None
    keys = [sessions.begin(1)[0] for _ in range(MAX_SESSIONS)]
    assert sessions.find(key, 1) is None
    assert session.ended
    assert all(sessions.find(one, 1) for one in keys)
    assert len(set(keys)) == MAX_SESSIONS
    last = sessions.find(keys[-1], 1)
    sessions.end(keys[-1])
    assert (sessions.find(keys[-1], 1), last.lasts(1)) == (None, False)


@given(st.lists(st.floats(0, 100), max_size=200), st.sampled_from(["192.0.2.1", "2001:db8::1", "2001:db8::2", ""]))
def test_no_more_guesses_than_the_bucket_has(pauses, address):
    """Whatever the rhythm: in any time no more than ten, and one for each ten seconds."""
    guesses, now, allowed = Guesses(), 0.0, 0
    for pause in pauses:
        now += pause
        if not guesses.wait_s(address, now):
            guesses.wrong(address, now)
            allowed += 1
        assert allowed <= GUESSES + now / GUESS_EVERY_S + 1e-6
    assert guesses.wait_s("198.51.100.7", now) == 0


def test_one_network_is_one_guesser():
    """Whoever has a /64 has 18 trillion addresses."""
    guesses = Guesses()
    for n in range(GUESSES):
        guesses.wrong(f"2001:db8::{n}", 0)
    assert guesses.wait_s("2001:db8::ffff", 0) > 0
    assert guesses.wait_s("2001:db8:0:1::1", 0) == 0
