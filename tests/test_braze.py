"""What is sent to Braze, and what each answer of Braze means: its documented ones, odd ones, and any answer at all."""

import asyncio
import contextlib
from typing import Any

import msgspec
import pytest
from aiohttp import web
from conftest import free_port, until
from hypothesis import given, settings
from hypothesis import strategies as st

from bridged.braze import requests
from bridged.braze.clusters import HOSTS, host
from bridged.braze.requests import (
    MAX_IDS,
    MAX_OBJECTS,
    Target,
    announce,
    change_members,
    refusal,
    track,
)
from bridged.braze.transport import Transport
from bridged.braze.verdicts import RateLimit, judge, rate_limit
from bridged.mixpanel.verdicts import Delivered, Failure, Halt, Reject, Retry, Split, Verdict
from bridged.redaction import hide

NOW = 1_790_000_000.0
PARTNER = Target(
    url="", partner_name="mixpanel", partner_key="example-partner-key", data_import_key="example-import-key"
)
KEY = "00000000-example-rest-key"


def rest(url: str = "") -> Target:
    """With a REST key."""
    return Target(url=url, rest_key=KEY)


# -- requests ----------------------------------------------------------------------------------------------------------


def test_every_cluster_has_its_host():
    """All fifteen instances of Braze's table, in any case of letters; no other name is taken for one."""
    assert len(HOSTS) == 15
    assert host("us-08") == "https://rest.iad-08.braze.com"
    assert host("US-10") == "https://rest.us-10.braze.com"
    assert host("EU-02") == "https://rest.fra-02.braze.eu"
    assert {host(name) for name in ("AU-01", "ID-01", "JP-01", "KR-01")} == {
        f"https://rest.{name}-01.braze.com" for name in ("au", "id", "jp", "kr")
    }
    with pytest.raises(ValueError, match="US-08, US-10"):
        host("US-09")


def test_a_track_request_sets_the_whole_array_of_each_user():
    """One object a user, the key in a header and not in the body, no slash at the end, a point for each."""
    users = [("ada", ["Power users", "Trial"]), ("bo", [])]

    request = track(users, "mixpanel_cohorts", update_existing_only=True)

    assert msgspec.json.decode(request.body) == {
        "attributes": [
            {"external_id": "ada", "_update_existing_only": True, "mixpanel_cohorts": ["Power users", "Trial"]},
            {"external_id": "bo", "_update_existing_only": True, "mixpanel_cohorts": None},
        ]
    }
    assert (request.path, request.objects, request.points) == ("/users/track", 2, 2)
    target = rest("http://127.0.0.1:1/")
    assert target.base == "http://127.0.0.1:1"
    assert target.headers()["Authorization"] == "Bearer 00000000-example-rest-key"
    assert target.headers()["Content-Type"] == "application/json"


def test_a_request_holds_as_much_as_braze_takes_and_no_more():
    """75 users, 1,000 ids; more is a mistake of the caller's, not a request."""
    users = [(f"u{n}", ["a"]) for n in range(MAX_OBJECTS + 1)]
    assert track(users[:-1], "x", update_existing_only=True).objects == 75
    with pytest.raises(ValueError, match="76"):
        track(users, "x", update_existing_only=True)
    with pytest.raises(ValueError, match="0"):
        track([], "x", update_existing_only=True)
    ids = [f"u{n}" for n in range(MAX_IDS)]
    assert change_members(PARTNER, "777", ids[:600], ids[600:]).points == 1000
    with pytest.raises(ValueError, match="1001"):
        change_members(PARTNER, "777", ids, ["one more"])


def test_the_partner_requests_have_their_shape():
    """The credentials are in the body, removals are marked, additions come first; no header tells a key."""
    users = change_members(PARTNER, "777", ["user-0001", "user-0002"], ["user-0003"])
    cohort = announce(PARTNER, "777", "Power users", 1769023230.9)

    keys = {"partner_api_key": "example-partner-key", "client_secret": "example-import-key", "cohort_id": "777"}
    changes = [{"user_ids": ["user-0001", "user-0002"]}, {"user_ids": ["user-0003"], "should_remove": True}]
    assert (users.path, users.objects) == ("/partners/mixpanel/cohorts/users", 3)
    assert msgspec.json.decode(users.body) == keys | {"cohort_changes": changes}
    assert (cohort.path, cohort.objects, cohort.points) == ("/partners/mixpanel/cohorts", 1, 0)
    assert msgspec.json.decode(cohort.body) == keys | {
        "name": "Power users",
        "created_at": "2026-01-21T19:20:30+00:00",
    }
    assert "Authorization" not in PARTNER.headers()


def test_a_probe_is_about_nobody():
    """It costs nothing, whoever takes it."""
    assert (requests.probe(rest()).body, requests.probe(rest()).points) == (b'{"attributes":[{}]}', 0)
    assert msgspec.json.decode(requests.probe(PARTNER).body)["cohort_changes"] == []


def test_nothing_shows_a_credential():
    """Whoever prints a target, a credential or a request in an error message prints no secret."""
    shown = f"{PARTNER!r} {rest()!r} {change_members(PARTNER, '7', ['u'], [])!r}"
    assert "example" not in shown


@pytest.mark.parametrize(
    ("user", "reason"),
    [
        (("u", ["a"] * 500), ""),
        (("é" * 493, ["a" * 255]), ""),
        (("é" * 494, []), "988 bytes"),
        (("", ["a"]), "empty"),
        (("u", ["a"] * 501), "501 cohorts"),
        (("u", ["a" * 256]), "255 characters"),
    ],
)
def test_what_braze_would_refuse_is_known_before(user, reason):
    """The limits that Braze's pages state cost no request."""
    assert reason in refusal(user)
    assert bool(reason) == bool(refusal(user))


# -- verdicts ----------------------------------------------------------------------------------------------------------

SUCCESS = {"message": "success", "attributes_processed": 3}
BAD_ID = {"type": "BLACKLISTED_EXTERNAL_USER_ID", "input_array": "attributes", "index": 1}


def verdict(
    status: int, body: Any = b"", headers: dict[str, str] | None = None, objects: int = 3, *, partner=False
) -> Verdict:
    """The judgement of an answer with JSON, or with bytes as they are."""
    content = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return judge(status, headers or {}, content, objects, NOW, partner=partner)


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (201, SUCCESS, Delivered()),
        (200, SUCCESS, Delivered()),
        (201, {"message": "success"}, Delivered()),
        (201, {"message": "success", "attributes_processed": 1}, Delivered(2)),
        (201, {"message": "success", "attributes_processed": 9, "errors": []}, Delivered()),
        (201, SUCCESS | {"attributes_processed": 2, "errors": [BAD_ID]}, Reject({1: Failure("", BAD_ID["type"])})),
        (
            201,
            SUCCESS | {"errors": [BAD_ID, BAD_ID | {"type": "again"}, {"type": "no array named", "index": 0}]},
            Reject({0: Failure("", "no array named"), 1: Failure("", f"{BAD_ID['type']}; again")}),
        ),
        # However the position is spelled.
        (201, SUCCESS | {"attributes_processed": 1, "errors": [BAD_ID]}, Reject({1: Failure("", BAD_ID["type"])}, 1)),
        (201, SUCCESS | {"errors": [BAD_ID | {"index": "1"}]}, Reject({1: Failure("", BAD_ID["type"])})),
        (201, SUCCESS | {"errors": [BAD_ID | {"index": 1.0}]}, Reject({1: Failure("", BAD_ID["type"])})),
        (201, {"message": "success", "errors": [BAD_ID | {"index": "-1"}]}, Split),
        (201, {"message": "success", "errors": [BAD_ID | {"index": 1.5}]}, Split),
        # Errors that name nobody: all are counted, or it must be found out whom they mean.
        (201, SUCCESS | {"errors": ["something minor"]}, Delivered()),
        (201, SUCCESS | {"attributes_processed": 2, "errors": ["something minor"]}, Split),
        (201, {"message": "success", "errors": [BAD_ID | {"index": 3}]}, Split),
        (201, {"message": "success", "errors": [BAD_ID | {"index": True}]}, Split),
        (201, {"message": "success", "errors": [BAD_ID | {"input_array": "events"}]}, Split),
        (201, {"message": "success", "errors": {"odd": "shape"}}, Split),
        # A 400 is carried out for nobody.
        (400, {"message": "Max Input Length Exceeded"}, Split),
        (400, {"message": "no", "errors": [BAD_ID]}, Split),
        (
            400,
            {"message": "no", "errors": [BAD_ID | {"index": n, "type": f"t{n}"} for n in range(3)]},
            Reject({n: Failure("", f"t{n}") for n in range(3)}),
        ),
        (400, b"<html>Bad Request</html>", Split),
        (413, b"too large", Split),
        (401, {"message": "Invalid API key"}, (401, "rest_key")),
        (402, b"", (402, "contract")),
        (403, {"message": "Access Denied"}, (403, "users.track")),
        (404, b"", (404, "cluster")),
        (405, b"", (405, "POST")),
        (407, b"", (407, "proxy")),
        (415, b"", (415, "JSON")),
        (302, b"", (302, "redirected to nowhere")),
        # No proof of a success is none.
        (200, b"<html>Welcome to the airport</html>", ("server", "web page")),
        (200, b"ok", ("server", "no JSON object")),
        (201, b"", ("server", "says nothing")),
        (201, [1], ("server", "no JSON object")),
        (200, {"message": "queued"}, ("server", "doesn't say success")),
        (204, b"", ("server", "no JSON object")),
        (408, b"", ("server", "408")),
        (409, b"", ("server", "no proof")),
        (423, {"message": "Resource locked"}, ("locked", "locked")),
        (429, {"message": "Over limit"}, ("rate", "Over limit")),
        (500, b"", ("server", "failure of its own")),
        (503, b"<html>x</html>", ("server", "503")),
        (101, b"", ("server", "101")),
    ],
)
def test_an_answer_has_its_verdict(status, body, expected):
    """The table of the module, line by line."""
    found = verdict(status, body)

    match expected:
        case (str(kind), words):
            assert isinstance(found, Retry)
            assert found.kind == kind
            assert words in found.reason
        case (int(code), words):
            assert isinstance(found, Halt)
            assert found.status == code
            assert words in found.reason
        case type():
            assert isinstance(found, expected)
        case _:
            assert found == expected


@pytest.mark.parametrize("status", [201, 400])
@pytest.mark.parametrize(
    "body",
    [
        {"message": "success", "errors": ["the external_id is bad"]},
        {"message": "success", "errors": [{"type": "the external_id is bad", "index": 17}]},
        {"message": "success", "errors": "the external_id is bad"},
    ],
)
def test_a_user_alone_is_the_one_that_is_meant(status, body):
    """Narrowing down ends: errors about a single object need no position."""
    assert verdict(status, body, objects=1) == Reject({0: Failure("", "the external_id is bad")})


def test_a_user_alone_that_is_refused_without_words():
    """A 400 to one user is a refusal in Braze's own JSON only; whatever else, and a 413, is somebody's on the way, and quoted."""
    found = verdict(400, {}, objects=1)
    assert isinstance(found, Reject)
    assert found.failures[0].message
    for status in (400, 413):
        found = verdict(status, b"<h1>Bad Request</h1>", objects=1)
        assert isinstance(found, Retry)
        assert "Bad Request" in found.reason


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (200, {"message": "success"}, Delivered),
        (201, {}, Delivered),
        (200, {"message": "ok"}, Delivered),
        (204, b"", Delivered),
        (200, b"<html></html>", Retry),
        (200, b"plain", Retry),
        (200, {"message": "x", "errors": ["y"]}, Retry),
        (400, {"message": "cohort_id must be a valid string"}, Split),
        (401, {"message": "Invalid Partner API key"}, Halt),
        (423, {"message": "Resource locked"}, Retry),
    ],
)
def test_the_partner_endpoints_are_judged_by_what_is_known_of_them(status, body, expected):
    """Their success has no documented body, so any JSON without errors is one; a page never is."""
    assert isinstance(verdict(status, body, partner=True), expected)


@pytest.mark.parametrize(
    ("headers", "after_s"),
    [
        ({}, None),
        ({"X-Ratelimit-Retry-After": "7"}, 7.0),
        ({"x-ratelimit-retry-after": "1.5", "X-RateLimit-Reset": str(int(NOW) + 90)}, 1.5),
        ({"Retry-After": "9"}, 9.0),
        ({"X-RateLimit-Reset": str(int(NOW) + 90)}, 90.0),
        ({"X-RateLimit-Reset": str(int(NOW) - 5)}, 0.0),
        # Braze's clock counts, not ours: 1790000000 is Monday 14:13:20.
        ({"X-RateLimit-Reset": "1790000030", "Date": "Mon, 21 Sep 2026 14:13:10 GMT"}, 40.0),
        ({"X-Ratelimit-Retry-After": "86400"}, 600.0),
        ({"X-RateLimit-Reset": "9999999999"}, 600.0),
        ({"X-Ratelimit-Retry-After": "soon"}, None),
        ({"X-Ratelimit-Retry-After": "-1"}, None),
    ],
)
def test_a_429_says_when_to_come_again(headers, after_s):
    """Braze's own header first, then the usual one, then the end of the window; never longer than ten minutes."""
    found = verdict(429, {"message": "x"}, headers)
    assert isinstance(found, Retry)
    assert found.after_s == after_s


@pytest.mark.parametrize("status", [423, 500, 503])
def test_the_end_of_the_window_is_about_the_rate_limit(status):
    """It stands in every answer; what failed for another reason comes again sooner, unless Braze says when."""
    window = {"X-RateLimit-Reset": str(int(NOW) + 90)}
    assert verdict(status, {"message": "x"}, window).after_s is None
    assert verdict(status, {"message": "x"}, window | {"Retry-After": "9"}).after_s == 9.0


def test_the_allowance_is_read():
    """On every answer, in any spelling; what isn't there or can't be read is unknown."""
    headers = {"x-ratelimit-limit": "3000", "X-RateLimit-Remaining": "12", "X-RATELIMIT-RESET": str(int(NOW) + 2)}
    assert rate_limit(headers, NOW) == RateLimit(3000, 12, 2.0)
    assert rate_limit({"X-RateLimit-Remaining": "0"}, NOW) == RateLimit(None, 0, None)
    assert rate_limit({"X-RateLimit-Remaining": "many"}, NOW) is None
    assert rate_limit({}, NOW) is None


def test_an_answer_that_quotes_a_secret_is_not_quoted():
    """Braze's own words for a 401 of a partner hold the client secret."""
    said = {"message": "Partner not enabled for client with client secret: 2345-abc-77"}
    found = verdict(401, said, partner=True)
    assert isinstance(found, Halt)
    assert "2345" not in found.reason


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["index", "type", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(
    status=st.integers(100, 599),
    answer=st.dictionaries(st.sampled_from(["message", "errors", "attributes_processed"]), json_values)
    | st.binary(max_size=40),
    headers=st.dictionaries(
        st.sampled_from(["X-RateLimit-Reset", "X-Ratelimit-Retry-After", "Date", "Content-Type"]), st.text(max_size=12)
    ),
    objects=st.integers(1, 75),
    partner=st.booleans(),
)
def test_any_answer_has_a_verdict_that_can_be_carried_out(status, answer, headers, objects, partner):
    """Nothing raises, no position is beyond the request, nothing is a success but a 2xx, a single user is never split."""
    found = verdict(status, answer, headers, objects, partner=partner)
    rate_limit(headers, NOW)

    if isinstance(found, Delivered):
        assert 200 <= status < 300
        assert 0 <= found.short <= objects
    if isinstance(found, Reject):
        assert found.failures
        assert all(0 <= index < objects for index in found.failures)
        assert 0 <= found.short <= objects - len(found.failures)
    if isinstance(found, Split):
        assert objects > 1


# -- transport ---------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def server(answer):
    """A Braze that answers with `answer(request)`."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_a_request_goes_out_and_its_verdict_comes_back():
    """Over a socket: path, header and body as made, the verdict and the allowance as answered."""
    seen = []

    async def answer(request):
        seen.append((request.method, request.path, request.headers["Authorization"], await request.json()))
        return web.json_response(
            SUCCESS, status=201, headers={"X-RateLimit-Limit": "3000", "X-RateLimit-Remaining": "7"}
        )

    request = track([("ada", ["a"])], "cohorts", update_existing_only=False)
    async with server(answer) as url, Transport(rest(url), 20) as transport:
        outcome = await transport.send(request)

    assert outcome.verdict == Delivered()
    assert outcome.rate_limit == RateLimit(3000, 7, None)
    assert seen == [("POST", "/users/track", "Bearer 00000000-example-rest-key", msgspec.json.decode(request.body))]


async def test_a_redirect_is_not_followed():
    """The key must not go wherever an answer points."""
    paths = []

    async def answer(request):
        paths.append(request.path)
        raise web.HTTPFound("/elsewhere")

    async with server(answer) as url, Transport(rest(url), 20) as transport:
        outcome = await transport.send(track([("ada", ["a"])], "x", update_existing_only=True))

    assert isinstance(outcome.verdict, Halt)
    assert paths == ["/users/track"]


async def test_whatever_the_network_does_is_tried_again():
    """Nobody listens, nobody answers, the answer breaks off: Retry(network), no exception, and word of whether it had left."""
    request = track([("ada", ["a"])], "x", update_existing_only=True)
    gate = asyncio.Event()

    async def hang(request):
        await gate.wait()
        return web.Response()

    async def cut(request):
        request.transport.write(b"HTTP/1.1 201 Created\r\nContent-Length: 100\r\n\r\n{")
        request.transport.close()
        return web.Response()

    async def be_silent(reader, writer):
        await gate.wait()
        writer.close()

    outcomes = []
    async with Transport(rest(f"http://127.0.0.1:{free_port()}"), 20) as transport:
        outcomes.append(await transport.send(request))
        transport.use(rest("http://braze.invalid"), 20)
        outcomes.append(await transport.send(request))
        async with await asyncio.start_server(be_silent, "127.0.0.1", 0) as silent:
            transport.use(rest(f"https://127.0.0.1:{silent.sockets[0].getsockname()[1]}"), 0.2)
            outcomes.append(await transport.send(request))
            gate.set()
        gate.clear()
        async with server(cut) as url:
            transport.use(rest(url), 20)
            outcomes.append(await transport.send(request))
        async with server(hang) as url:
            transport.use(rest(url), 0.2)
            outcomes.append(await transport.send(request))
            gate.set()
    for outcome in outcomes:
        assert isinstance(outcome.verdict, Retry)
        assert outcome.verdict.kind == "network"
    assert [outcome.left for outcome in outcomes] == [False, False, False, True, True]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (Target(url="http://127.0.0.1:1", rest_key=f"{KEY}\r\nX-Other: 1"), "header"),
        (Target(url="http://127.0.0.1:99999", rest_key=KEY), "99999"),
        (Target(url=f"http://{'a' * 64}.example", rest_key=KEY), "label"),
    ],
)
async def test_a_request_that_cannot_be_made_is_a_halt(target, words):
    """A key that no header can hold and an address that is none are for a person to change; the key isn't quoted."""
    hide([KEY])

    async def answer(request):
        raise AssertionError

    async with server(answer) as url, Transport(target, 20) as transport:
        if target.url.endswith(":1"):
            transport.use(msgspec.structs.replace(target, url=url), 20)
        outcome = await transport.send(track([("ada", ["a"])], "x", update_existing_only=True))

    assert isinstance(outcome.verdict, Halt), outcome
    assert words in outcome.verdict.reason
    assert "[braze]" in outcome.verdict.reason
    assert KEY not in outcome.verdict.reason
    assert not outcome.left


async def test_an_answer_that_echoes_the_key_is_masked():
    """The daemon's secrets are known to `redaction`: no verdict quotes them."""
    hide([KEY])

    async def answer(request):
        return web.json_response({"message": f"bad key {KEY}"}, status=401)

    async with server(answer) as url, Transport(rest(url), 20) as transport:
        outcome = await transport.send(track([("ada", ["a"])], "x", update_existing_only=True))

    assert isinstance(outcome.verdict, Halt)
    assert "example-rest-key" not in outcome.verdict.reason


async def test_what_was_said_while_nobody_asked_is_no_answer():
    """A proxy that is out of step says a success on an idle connection: the next request goes out all the same, on another."""
    success = msgspec.json.encode(SUCCESS)
    success = b"HTTP/1.1 201 Created\r\nContent-Length: %d\r\n\r\n%s" % (len(success), success)
    asked = []
    said = asyncio.Event()

    async def serve(reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                asked.append(await reader.readexactly(int(length.partition(b":")[2])))
                writer.write(success)
                if len(asked) == 1:
                    await said.wait()
                    writer.write(success)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        async with Transport(rest(url), 5) as transport:
            first, second = (track([(user, ["a"])], "x", update_existing_only=True) for user in ("ada", "bo"))
            assert (await transport.send(first)).verdict == Delivered()
            [[[idle, _]]] = transport._session.connector._conns.values()
            said.set()
            await until(lambda: idle.should_close, "the words on the idle connection")
            outcome = await transport.send(second)

    assert outcome.verdict == Delivered()
    assert asked == [first.body, second.body]


async def test_a_key_that_no_request_can_hold_is_a_halt():
    """Whatever let it through: who imports says what is wrong, and goes on when it is corrected."""
    request = track([("ada", ["a"])], "x", update_existing_only=True)

    async def answer(_request):
        return web.json_response(SUCCESS, status=201)

    async with server(answer) as url, Transport(Target(url=url, rest_key="two\nlines"), 5) as transport:
        outcome = await transport.send(request)
        assert isinstance(outcome.verdict, Halt)
        assert "rest_key is one line" in outcome.verdict.reason
        assert not outcome.left
        transport.use(rest(url), 5)
        assert (await transport.send(request)).verdict == Delivered()
