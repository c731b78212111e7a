"""The emulator over real sockets: every shape of answer, and every kind of trouble."""

import argparse
import asyncio
import base64
import contextlib
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import aiohttp
import pytest
from conftest import until

from bridged.emulator.command import add_arguments, read_faults
from bridged.emulator.faults import Fault
from bridged.emulator.mixpanel import EmulatorConfig, MixpanelEmulator
from bridged.errors import ConfigError, ListenError

NDJSON = "application/x-ndjson"
FORM = "application/x-www-form-urlencoded"


def basic(user, password=""):
    """The value of an Authorization header."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


TOKEN = basic("token")


def event(number=0, **properties):
    """A sound event with some properties changed; `...` takes one away."""
    sound = {"time": int(time.time()) - 60, "distinct_id": f"user-{number}", "$insert_id": f"id-{number}", "ip": 0}
    merged = {key: value for key, value in (sound | properties).items() if value is not ...}
    return {"event": "Email Open", "properties": merged}


def ndjson(events):
    """A body of one event a line."""
    return b"".join(json.dumps(each).encode() + b"\n" for each in events)


class Client:
    """A sender that can say anything."""

    def __init__(self, mixpanel, session):
        self.mixpanel, self.session = mixpanel, session

    async def post(self, body, path="/import?strict=1", *, auth=TOKEN, kind=NDJSON, coding=None, **options):
        if not isinstance(body, bytes | dict):
            body = ndjson(body)
        wanted = {"Authorization": auth, "Content-Type": kind, "Content-Encoding": coding}
        headers = {key: value for key, value in wanted.items() if value}
        url = self.mixpanel.url + path
        async with self.session.post(url, data=body, headers=headers, **options) as response:
            content = await response.read()
            is_json = response.content_type == "application/json"
            return response.status, json.loads(content) if is_json else content.decode()


@contextlib.asynccontextmanager
async def emulator(**config):
    """An emulator on a free port and a sender for it."""
    timeout = aiohttp.ClientTimeout(total=20)
    async with (
        MixpanelEmulator(EmulatorConfig(port=0, **config)) as mixpanel,
        aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as session,
    ):
        yield Client(mixpanel, session)


@pytest.fixture
async def client():
    """A sender for an emulator that believes anybody."""
    async with emulator() as client:
        yield client


INVALID_CREDENTIALS = {"code": 401, "error": "Invalid credentials", "status": "Unauthorized"}
RATE_LIMITED = "Project exceeded rate limits. Please retry the request with exponential backoff."


async def test_good_batch_is_imported(client):
    """A strict import that is all good says how many records are in, and the events can be seen."""
    batch = [event(1, campaign="é😀"), event(2)]

    answer = await client.post(batch)

    assert answer == (200, {"code": 200, "num_records_imported": 2, "status": "OK"})
    stored = client.mixpanel.events()
    assert [each["properties"]["$insert_id"] for each in stored] == ["id-1", "id-2"]
    assert stored[0]["properties"]["campaign"] == "é😀"
    assert "ip" not in stored[0]["properties"]


async def test_verbose_turns_the_status_into_a_number(client):
    """Asked to be verbose, a strict success says 1 where it otherwise says OK."""
    answer = await client.post([event()], "/import/?strict=1&verbose=1")
    assert answer == (200, {"code": 200, "num_records_imported": 1, "status": 1})


async def test_partial_success_names_the_failed_records(client):
    """A 400 stores the rest of the batch and says which records failed, in their order."""
    batch = [event(0), event(1, time="soon"), event(2), {"properties": event(3)["properties"]}]

    answer = await client.post(batch)

    assert answer == (
        400,
        {
            "code": 400,
            "error": "some data points in the request failed validation",
            "status": "Bad Request",
            "num_records_imported": 2,
            "failed_records": [
                {
                    "index": 1,
                    "insert_id": "id-1",
                    "field": "properties.time",
                    "message": "'properties.time' is invalid: must be specified as seconds since epoch",
                },
                {
                    "index": 3,
                    "insert_id": "id-3",
                    "field": "event",
                    "message": "'event' must not be missing or blank",
                },
            ],
        },
    )
    assert [each["properties"]["$insert_id"] for each in client.mixpanel.events()] == ["id-0", "id-2"]


async def test_identity_events_refuse_the_whole_batch_in_words(client):
    """Projects with the simplified merge answer with strings where records are expected, and store nothing."""
    status, body = await client.post([event(), {"event": "$merge", "properties": event(1)["properties"]}])
    assert (status, body["num_records_imported"]) == (400, 0)
    assert all(isinstance(record, str) for record in body["failed_records"])
    assert client.mixpanel.events() == []


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (json.dumps([event()]).encode(), "application/json"),
        (json.dumps(event(), indent=2).encode(), "application/json; charset=utf-8"),
        (ndjson([event()]), NDJSON),
        ({"data": json.dumps([event()])}, None),
        ({"data": base64.b64encode(json.dumps(event()).encode()).decode()}, None),
        (b"data=" + base64.b64encode(json.dumps(event(note=">>>???~~~")).encode()), FORM),
    ],
)
async def test_every_dialect_is_read(client, body, kind):
    """Lists, single objects, NDJSON and forms with plain or base64 JSON, escaped or not, all carry events."""
    assert (await client.post(body, kind=kind))[0] == 200
    assert len(client.mixpanel.events()) == 1


async def test_gzip_is_the_only_coding(client):
    """Compressed bodies count with their full size; another coding is refused in so many words."""
    body = ndjson([event()])
    assert (await client.post(gzip.compress(body), coding="gzip"))[0] == 200
    assert client.mixpanel.summary().bytes_uncompressed == len(body)
    status, answer = await client.post(zlib.compress(body), coding="deflate")
    assert (status, answer["num_records_imported"]) == (400, 0)
    assert "deflate" in answer["error"]


@pytest.mark.parametrize(
    ("body", "options"),
    [
        (gzip.compress(ndjson([event()]))[:-9], {"coding": "gzip"}),
        (b"no gzip", {"coding": "gzip"}),
        (b"", {}),
        (b"[]", {"kind": "application/json"}),
        (b"[{]", {"kind": "application/json"}),
        (b'{"event":\n', {}),
        (b"{}", {"kind": "text/plain"}),
        (b"ip=0", {"kind": FORM}),
        (b"data=%%%", {"kind": FORM}),
        (b"data=%ff", {"kind": FORM}),
        (ndjson(event(n) for n in range(2001)), {}),
    ],
)
async def test_an_unreadable_request_is_refused_whole(client, body, options):
    """Corrupt gzip, no JSON, nothing at all or too many records: 400 without records, nothing stored."""
    status, answer = await client.post(body, **options)
    assert status == 400
    assert (answer["code"], answer["num_records_imported"], answer["failed_records"]) == (400, 0, [])
    assert answer["error"]
    assert client.mixpanel.events() == []


@pytest.mark.parametrize("coding", [None, "gzip"])
@pytest.mark.parametrize("size", [2001, 1_000_000])
async def test_a_body_that_is_too_large_says_how_much_fits(coding, size):
    """The answer 413 names the limit, whether the body was large as sent or only once inflated."""
    async with emulator(max_body_bytes=2000) as client:
        body = b" " * size
        status, answer = await client.post(gzip.compress(body) if coding else body, coding=coding)
    assert (status, answer) == (
        413,
        {"code": 413, "error": "request exceeds max limit of 2000 bytes", "status": "Request Entity Too Large"},
    )


async def test_an_event_of_a_megabyte_fails_alone(client):
    """One event that is too large costs its own record, not the batch."""
    status, answer = await client.post([event(0), event(1, text="x" * 1_000_000)])
    assert (status, answer["num_records_imported"]) == (400, 1)
    assert [(record["index"], record["field"]) for record in answer["failed_records"]] == [(1, "event")]


@pytest.mark.parametrize(
    ("config", "auth", "query", "status"),
    [
        ({}, None, "", 401),
        ({}, basic("anything"), "", 200),
        ({}, "Basic anything:", "", 200),
        ({}, "Basic ???", "", 401),
        ({}, "Basic", "", 401),
        ({}, "Bearer anything", "", 401),
        ({}, basic("user", "secret"), "", 401),
        ({}, basic("user", "secret"), "&project_id=7", 200),
        ({"token": "t"}, basic("t"), "", 200),
        ({"token": "t"}, basic("u"), "", 401),
        ({"token": "t"}, basic("t", "secret"), "&project_id=7", 401),
        ({"token": "t", "api_secret": "s"}, basic("s"), "", 200),
        ({"service_account": "u", "service_secret": "s"}, basic("u", "s"), "&project_id=7", 200),
        ({"service_account": "u", "service_secret": "s"}, basic("u", "s"), "", 401),
        ({"service_account": "u", "service_secret": "s"}, basic("u"), "", 401),
        ({"service_account": "u", "service_secret": "s", "project_id": "7"}, basic("u", "s"), "&project_id=8", 401),
        ({"service_account": "u", "service_secret": "s", "project_id": "7"}, basic("u", "s"), "&project_id=7", 200),
        ({"token": "t", "project_id": "7"}, basic("t"), "&project_id=8", 401),
        # Token and secret name the project themselves: with them project_id must be left out.
        ({"token": "t", "project_id": "7"}, basic("t"), "&project_id=7", 401),
        ({"token": "t", "api_secret": "s"}, basic("s"), "&project_id=7", 401),
        ({}, basic("anything"), "&project_id=7", 401),
    ],
)
async def test_credentials(config, auth, query, status):
    """Token, secret and service account open the project each in its way; anything else is 401."""
    async with emulator(**config) as client:
        answer = await client.post([event()], "/import?strict=1" + query, auth=auth)
        assert answer[0] == status
        assert status == 200 or answer[1] == INVALID_CREDENTIALS
        assert len(client.mixpanel.events()) == (status == 200)


async def test_credentials_change_at_run_time(client):
    """A credential can expire and come back; keys that don't exist are refused."""
    for token, status in (("new", 401), ("token", 200)):
        changed = await client.post(
            json.dumps({"token": token}).encode(), "/emulator/credentials", kind="application/json"
        )
        assert changed[0] == 200
        assert (await client.post([event()]))[0] == status
    status, answer = await client.post(b'{"tokn":"x"}', "/emulator/credentials")
    assert (status, "tokn" in answer["error"]) == (400, True)


@pytest.mark.parametrize("config", [{"max_events_per_minute": 10}, {"max_bytes_per_minute": 1500}])
async def test_rate_limits_count_events_and_bytes(config):
    """Beyond the minute's events or bytes the answer is 429, and records that were refused have spent them too."""
    async with emulator(**config) as client:
        assert (await client.post([event(n, time=0) for n in range(9)]))[0] == 400
        answer = await client.post([event(n) for n in range(5)])
        assert answer == (429, {"code": 429, "error": RATE_LIMITED, "status": "Too Many Requests"})
        lax = await client.post([event(n) for n in range(5)], "/import?verbose=1")
        assert lax == (429, {"error": RATE_LIMITED, "status": 0})
        client.mixpanel.clear()
        assert (await client.post([event(n) for n in range(5)]))[0] == 200


async def test_repeats_are_recognised(client):
    """The same name, time, distinct_id and id are one event, whatever else differs; any of the four makes two."""
    first = event(1, time=1_700_000_000, color="red")
    assert (await client.post([first, first]))[0] == 200
    again = event(1, time=1_700_000_000, color="blue")
    await client.post([again, event(1, time=1_700_000_001), event(1, time=1_700_000_000, distinct_id="other")])
    summary = client.mixpanel.summary()
    assert (summary.accepted, summary.stored, summary.duplicates) == (5, 3, 2)
    assert client.mixpanel.events()[0]["properties"]["color"] == "red"


async def test_stored_events_show_what_mixpanel_does_to_them(client):
    """Times ahead are overwritten, long strings cut, token and ip consumed, ignored events dropped without a word."""
    ahead = int(time.time()) + 1800
    batch = [
        event(1, time=ahead, token="token", ip="192.0.2.1"),
        event(2, text="x" * 300, nested={"list": ["é" * 300]}),
        event(3, **{"$ignore": True}),
    ]
    assert await client.post(batch) == (200, {"code": 200, "num_records_imported": 3, "status": "OK"})
    one, two = client.mixpanel.events()
    assert one["properties"]["time"] <= time.time()
    assert set(one["properties"]) == {"time", "distinct_id", "$insert_id"}
    assert two["properties"]["text"] == "x" * 255
    assert two["properties"]["nested"] == {"list": ["é" * 255]}
    assert client.mixpanel.summary().ignored == 1


async def test_numbers_that_nothing_holds_are_shown_as_they_came(client):
    """They are JSON, so they are taken; one of too many digits had nothing shown any more, one out of range became null."""
    digits = "9" * 5000
    for n, number in enumerate([digits, f"-{digits}", "1e999", "-1e999", "1.5", str(2**70)]):
        body = ndjson([event(n, odd="N", nested=["N"])]).replace(b'"N"', number.encode())
        assert (await client.post(body))[0] == 200
    shown = [each["properties"] for each in client.mixpanel.events()]
    assert [each["odd"] for each in shown] == [digits[:255], f"-{digits}"[:255], "1e999", "-1e999", 1.5, 2**70]
    assert [each["nested"] for each in shown] == [[each["odd"]] for each in shown]
    async with client.session.get(f"{client.mixpanel.url}/emulator/events") as answer:
        assert len((await answer.read()).splitlines()) == len(shown)


async def test_of_a_member_that_is_there_twice_the_last_counts(client):
    """Mixpanel's pages say nothing of it, so it is taken as any parser takes it."""
    body = ndjson([event(0, odd="N")]).replace(b'"N"', b'1,"odd":2')
    assert (await client.post(body))[0] == 200
    [shown] = client.mixpanel.events()
    assert shown["properties"]["odd"] == 2


async def test_a_time_ahead_does_not_deduplicate():
    """A sender that does not clamp is found out: its retry, a second later, is another event."""
    async with emulator() as client:
        batch = [event(1, time=int(time.time()) + 1800)]
        await client.post(batch)
        await asyncio.sleep(1.1)
        await client.post(batch)
        assert len(client.mixpanel.events()) == 2


async def test_events_without_ip_are_counted(client):
    """An event without ip would be placed where the sender stands."""
    await client.post([event(1), event(2, ip=...), event(3, ip=..., tags=[])])
    await client.post([event(4, ip=...)], "/import?strict=1&ip=0")
    assert client.mixpanel.summary().events_without_ip == 2


@pytest.mark.parametrize("ip", ["[REDACTED]", "", "127.0.0", 1, None, [], "localhost"])
@pytest.mark.parametrize("odd", [{}, {"tags": []}])
async def test_an_ip_that_is_none_is_no_ip(client, ip, odd):
    """What a sender has made of it must not pass for an address: such an event is placed where the sender stands, too."""
    await client.post([event(1, ip=ip, **odd), event(2)])
    assert client.mixpanel.summary().events_without_ip == 1


async def test_an_address_or_zero_is_an_ip(client):
    """Of either family, and 0, which says that the event is to be placed nowhere."""
    good = [0, "0", "192.0.2.1", "2001:db8::1"]
    await client.post([event(number, ip=ip) for number, ip in enumerate(good)])
    await client.post([event(10 + number, ip=ip, tags=[]) for number, ip in enumerate(good)])
    assert client.mixpanel.summary().events_without_ip == 0


@pytest.mark.parametrize(
    ("batch", "query", "answer"),
    [
        ([event()], "", "1"),
        ([event(), event(time=5)], "?strict=0", "1"),
        ([event(time=5)], "", "0"),
        ([event()], "?verbose=1", {"error": None, "status": 1}),
        (
            [event(time=5)],
            "?verbose=1",
            {"error": "'properties.time' is invalid: must not be before 1971-01-01", "status": 0},
        ),
        (b"{", "", "0"),
        (b"", "?verbose=1", {"error": "request must hold at least one record", "status": 0}),
    ],
)
async def test_an_import_that_is_not_strict_says_little(client, batch, query, answer):
    """One good record makes it a 1; a 0 gives no reason unless asked."""
    assert await client.post(batch, "/import" + query) == (200, answer)


async def test_an_import_that_is_not_strict_hides_a_wrong_credential():
    """The answer is 1 and nothing is stored: why a careful sender is strict."""
    async with emulator(token="right") as client:
        for auth in (None, basic("wrong")):
            assert await client.post([event()], "/import", auth=auth) == (200, "1")
        assert await client.post([event()], "/import", auth=basic("right")) == (200, "1")
        summary = client.mixpanel.summary()
        assert (summary.stored, summary.dropped) == (1, 2)


async def test_track_takes_its_token_from_the_event():
    """No header: a missing token is a 0, a wrong one a 1 that stores nothing, and so is an event of last week."""
    async with emulator(token="t") as client:

        async def track(*batch, query="", **options):
            return (await client.post(list(batch), "/track" + query, auth=None, **options))[1]

        assert await track(event(1, token="t", **{"$insert_id": ...})) == "1"
        assert await track(event(1)) == "0"
        assert await track(event(1), query="?verbose=1") == {
            "error": "'properties.token' must not be missing",
            "status": 0,
        }
        assert await track(event(1, token="other")) == "1"
        assert await track(event(1, token="t", time=int(time.time()) - 6 * 86400)) == "1"
        assert await track({"event": "", "properties": {"token": "t"}}) == "0"
        async with client.session.get(
            client.mixpanel.url + "/track", params={"data": json.dumps(event(2, token="t"))}
        ) as response:
            assert await response.text() == "1"
        summary = client.mixpanel.summary()
        assert (summary.stored, summary.dropped, summary.refused) == (2, 2, 3)


@pytest.mark.parametrize(("path", "key"), [("/engage", "$distinct_id"), ("/groups", "$group_id")])
async def test_profile_updates(client, path, key):
    """Updates of users and groups need a token, an id and a verb; trouble is a 200 whose body says so; gzip is not known."""
    good = {"$token": "t", key: "a", "$set": {"x": 1}}
    body = json.dumps([good]).encode()
    kind = "application/json"
    assert await client.post(body, path, kind=kind) == (200, "1")
    assert (await client.post(b'[{"$token":"t"}]', path + "?verbose=1", kind=kind))[1]["status"] == 0
    assert await client.post(gzip.compress(body), path, kind=kind, coding="gzip") == (200, "0")
    assert client.mixpanel.profile_updates() == [good]
    assert client.mixpanel.summary().profile_updates == 1


async def test_unknown_paths_are_404(client):
    """A sender with a wrong path is told so in JSON."""
    status, body = await client.post([event()], "/imports")
    assert (status, body["code"]) == (404, 404)


async def test_control_endpoints(client):
    """What a process of its own can be asked over HTTP is what the object can be asked."""
    url = client.mixpanel.url
    await client.post([event(1, token="t"), event(2, time=0)])
    async with client.session.get(url + "/emulator/events") as response:
        assert response.content_type == NDJSON
        assert [json.loads(line) for line in (await response.read()).splitlines()] == client.mixpanel.events()
    async with client.session.get(url + "/emulator/summary") as response:
        summary = await response.json()
    assert summary["events"] == {"Email Open": 1}
    assert summary["answers"] == {"400": 1}
    assert (summary["requests"], summary["accepted"], summary["refused"], summary["max_batch"]) == (1, 1, 1, 2)
    async with client.session.get(url + "/healthz") as response:
        assert response.status == 200
    assert (await client.post(b"", "/emulator/clear"))[0] == 200
    assert client.mixpanel.summary().requests == 0
    assert client.mixpanel.events() == []


async def test_faults_over_http(client):
    """Scripts are set, seen and ended over HTTP, and a bad one names its key."""
    url = client.mixpanel.url + "/emulator/faults"
    assert (await client.post(b'[{"status":503}]', "/emulator/faults"))[0] == 200
    assert (await client.post([event()]))[0] == 503
    async with client.session.get(url) as response:
        assert (await response.json())[0]["status"] == 503
    status, body = await client.post(b'[{"status":503,"foo":1}]', "/emulator/faults")
    assert (status, body["error"]) == (400, "faults[0]: Object contains unknown field `foo`")
    assert (await client.post(b"[", "/emulator/faults"))[0] == 400
    async with client.session.delete(url) as response:
        assert response.status == 200
    assert (await client.post([event()]))[0] == 200


@pytest.mark.parametrize("keep", [True, False])
async def test_nothing_but_keys_is_kept_when_asked(keep):
    """Without keeping, events are still counted and deduplicated."""
    async with emulator(keep_events=keep) as client:
        for _ in range(2):
            await client.post([event(n, time=1_700_000_000) for n in range(100)])
        summary = client.mixpanel.summary()
        assert (summary.stored, summary.duplicates) == (100, 100)
        assert len(client.mixpanel.events()) == (100 if keep else 0)


async def test_scripted_answers(client):
    """A fault may say anything: canned words for a status, its own body, its own headers."""
    client.mixpanel.script(
        [
            {"status": 429, "headers": {"Retry-After": "7"}, "times": 1},
            {"status": 503, "times": 1},
            {"status": 403, "times": 1},
            {"status": 400, "body": {"failed_records": ["words"]}, "times": 1},
            {"status": 200, "body": "soon", "content_type": "text/x", "times": 1},
            {"action": "html", "times": 1},
        ]
    )
    async with client.session.post(client.mixpanel.url + "/import?strict=1") as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "7")
        assert (await response.json())["error"] == RATE_LIMITED
    assert await client.post([event()]) == (503, "upstream connect error or disconnect/reset before headers")
    status, body = await client.post([event()])
    assert (status, "403 Forbidden" in body) == (403, True)
    assert await client.post([event()]) == (400, {"failed_records": ["words"]})
    assert await client.post([event()]) == (200, "soon")
    status, body = await client.post([event()])
    assert (status, body.startswith("<html>")) == (200, True)
    assert client.mixpanel.events() == []
    assert client.mixpanel.summary().faults == 6


@pytest.mark.parametrize(
    ("action", "stored"), [("reset", 0), ("reset_after_store", 1), ("hang", 0), ("store_then_hang", 1)]
)
async def test_answers_that_never_come(client, action, stored):
    """Resets and silence, before and after the store; the next request is served as if nothing had been."""
    client.mixpanel.script([{"action": action, "times": 1}])
    trouble = (aiohttp.ClientConnectionError, TimeoutError)
    with pytest.raises(trouble) as caught:
        await client.post([event(1)], timeout=aiohttp.ClientTimeout(total=1))
    if "reset" in action:
        assert isinstance(caught.value, ConnectionResetError | aiohttp.ClientOSError)
    assert len(client.mixpanel.events()) == stored
    assert (await client.post([event(1, time=1_700_000_000)]))[0] == 200
    await until(lambda: client.mixpanel.summary().requests_now == 0, "the end of both")


async def test_the_lie(client):
    """Stored, but answered 500: the repeat is a duplicate."""
    client.mixpanel.script([{"action": "store_then_status", "times": 1}])
    batch = [event(1)]
    assert (await client.post(batch))[0] == 500
    assert (await client.post(batch))[0] == 200
    summary = client.mixpanel.summary()
    assert (summary.stored, summary.duplicates, summary.answers) == (1, 1, {"500": 1, "200": 1})


async def test_a_truncated_answer(client):
    """The body ends before its promised length."""
    client.mixpanel.script([{"action": "truncate"}])
    with pytest.raises(aiohttp.ClientPayloadError):
        await client.post([event()])
    assert len(client.mixpanel.events()) == 1


async def test_slow_and_late_answers(client):
    """A trickled answer is whole in the end, and a delay is at least as long as asked."""
    client.mixpanel.script([{"action": "slow", "trickle_s": 0.002, "times": 1}, {"delay_s": 0.2, "times": 1}])
    for at_least in (0.1, 0.2):
        began = time.monotonic()
        assert (await client.post([event()]))[1]["num_records_imported"] == 1
        assert time.monotonic() - began >= at_least


@pytest.mark.parametrize(
    "fault", [{"action": "hang"}, {"action": "store_then_hang"}, {"delay_s": 60}, {"action": "slow", "trickle_s": 60}]
)
async def test_closing_does_not_wait_for_faults(fault):
    """Leaving the context ends what hangs, at once."""
    async with emulator() as client:
        client.mixpanel.script([fault])
        hanging = asyncio.create_task(client.post([event()]))
        await until(lambda: client.mixpanel.summary().requests_now == 1, "the request")
        left = asyncio.get_running_loop().time()
    # The shortest of them would last for a minute.
    assert asyncio.get_running_loop().time() - left < 30
    hanging.cancel()
    await asyncio.gather(hanging, return_exceptions=True)


async def test_concurrency_is_measured(client):
    """`max_concurrent` is the most requests that were under way together."""
    client.mixpanel.script([{"delay_s": 0.2}])
    await asyncio.gather(*(client.post([event(n)]) for n in range(7)))
    assert client.mixpanel.summary().max_concurrent == 7


async def test_a_client_that_leaves_half_way_is_no_trouble(client):
    """A request that is broken off while it is sent is counted and forgotten."""
    host, port = client.mixpanel.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /import?strict=1 HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhalf")
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.close()
    await writer.wait_closed()
    await until(lambda: client.mixpanel.summary().requests == 1, "the request")
    await until(lambda: client.mixpanel.summary().requests_now == 0, "its end")
    assert client.mixpanel.summary().answers == {"aborted": 1}


async def test_an_address_in_use_is_a_configuration_error(client):
    """The error says which address and what to do."""
    port = int(client.mixpanel.url.rsplit(":", 1)[1])
    with pytest.raises(ListenError, match=rf"can't listen on --listen 127\.0\.0\.1:{port}"):
        async with MixpanelEmulator(EmulatorConfig(port=port)):
            pass


def test_fault_files(tmp_path):
    """Scripts come from JSON and TOML; an error names the file, the fault and the key."""
    toml, text = tmp_path / "faults.toml", tmp_path / "faults.json"
    toml.write_text('[[faults]]\nstatus = 429\nheaders = {"Retry-After" = "3"}\n')
    text.write_text('[{"status":429,"headers":{"Retry-After":"3"}}]')
    assert read_faults(toml) == read_faults(text) == [Fault(status=429, headers={"Retry-After": "3"})]
    text.write_text('[{"status":429,"after":-1}]')
    with pytest.raises(ConfigError, match=re.escape(f"{text}: faults[0].after: Expected `int` >= 0")):
        read_faults(text)
    for broken in ("[", "\udcff"):
        text.write_bytes(broken.encode(errors="surrogateescape"))
        with pytest.raises(ConfigError, match=r"faults\.json"):
            read_faults(text)
    with pytest.raises(ConfigError, match="No such file"):
        read_faults(tmp_path / "none")


COMMAND = """
import argparse
from bridged.emulator.command import add_arguments, main
parser = argparse.ArgumentParser()
add_arguments(parser)
raise SystemExit(main(parser.parse_args()))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_command_runs_until_it_is_told_to_stop(tmp_path, number):
    """One line when it listens, options that take effect, exit 0 on a signal even while a request hangs."""
    script = tmp_path / "faults.json"
    script.write_text('[{"action":"hang","after":1}]')
    arguments = ["--listen", "127.0.0.1:0", "--token", "t", "--faults", str(script), "--no-keep"]
    root = Path(__file__).parent.parent
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", COMMAND, *arguments),
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    line = (await asyncio.wait_for(process.stdout.readline(), 20)).decode()
    assert re.fullmatch(r"bridged emulator listens on http://127\.0\.0\.1:\d+\n", line)
    url = line.split()[-1]
    async with aiohttp.ClientSession() as session:

        async def post(token):
            headers = {"Authorization": basic(token), "Content-Type": NDJSON}
            async with session.post(url + "/import?strict=1", data=ndjson([event()]), headers=headers) as response:
                return response.status

        assert await post("other") == 401
        hanging = asyncio.create_task(post("t"))
        await asyncio.sleep(0.2)
        process.send_signal(number)
        assert await asyncio.wait_for(process.wait(), 30) == 0
        with pytest.raises(aiohttp.ClientError):
            await hanging


@pytest.mark.parametrize("argument", ["--max-body-bytes=0", "--max-events-per-minute=x"])
def test_bad_numbers_are_usage_errors(argument, capsys):
    """They get argparse's own exit code 2, before anything listens."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(SystemExit) as caught:
        parser.parse_args([argument])
    assert caught.value.code == 2
    assert argument.split("=")[0] in capsys.readouterr().err
