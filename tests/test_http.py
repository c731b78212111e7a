"""The HTTP door, answer for answer: what Braze is told decides what it does with the events."""

import asyncio
import base64
import contextlib
import gzip
import os
import random
import socket
import sqlite3
import struct
import tomllib
import zlib
from pathlib import Path

import aiohttp
import msgspec
import pytest
from conftest import NAMES, currents, until
from packaging.requirements import Requirement

from bridged.backlog.segment import Batch, lines
from bridged.backlog.spool import Intaken, Settlement, Spool, SpoolOptions
from bridged.currents.table import EVENT_TYPES
from bridged.errors import ListenError, SpoolError
from bridged.intake import Intake
from bridged.mixpanel.mapping import EventMapping, MappingSettings
from bridged.sources.http import HttpOptions, HttpSource
from bridged.sources.http_connections import HttpLimits

TOKEN = "s3cret-Token._~+/="
MAX_BODY = 200_000
MIB = 2**20


class Door:
    """An HTTP door with a spool behind it and nothing that delivers."""

    def __init__(self, path, spool, source):
        self.path, self.spool, self.source = path, spool, source
        self.url = f"http://127.0.0.1:{source.port}/v1/currents"

    async def post(self, client, body=b"", *, query="", method="POST", path=None, **headers):
        """Status and answer of one request."""
        url = self.url if path is None else f"http://127.0.0.1:{self.source.port}{path}"
        names = {name.replace("_", "-"): value for name, value in headers.items() if value is not None}
        async with client.request(method, url + query, data=body, headers=names) as response:
            return response.status, response.headers, await response.read()

    async def events(self):
        """The ids of the events that are on disk, in order."""
        segments, _ = await self.spool.read_after(0, 2**40)
        return [msgspec.json.decode(line)["properties"]["$insert_id"] for line in lines(segments)]

    async def dead(self):
        """Reason and bytes of every dead letter."""
        query = "SELECT reason, event FROM dead_letters ORDER BY id"
        return [tuple(row) for row in await self.spool.run(lambda db: db.execute(query).fetchall())]

    def in_file(self):
        """How many events another program sees in the file."""
        with contextlib.closing(sqlite3.connect(self.path / "spool.db")) as db:
            return db.execute("SELECT coalesce(sum(length(codes)), 0) FROM segments").fetchone()[0]

    async def raw(self, data, *, pause=None):
        """Sends bytes as they are (`pause`: in two halves), gives all that is answered until the door closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.source.port)
        half = len(data) if pause is None else pause
        writer.write(data[:half])
        await writer.drain()
        if pause is not None:
            await asyncio.sleep(0.05)
            writer.write(data[half:])
        answer = await asyncio.wait_for(reader.read(), 20)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        return answer


@contextlib.asynccontextmanager
async def opened(path, token="", **spool_options):
    """A door and its spool in a folder."""
    options = SpoolOptions(path=str(path / "spool.db"), **spool_options)
    async with Spool(options, NAMES) as spool:
        intake = Intake(EventMapping(EVENT_TYPES, MappingSettings(token="t")), spool)
        http = HttpOptions(port=0, bearer_token=token, max_body=MAX_BODY)
        async with HttpSource(http, intake, spool) as source:
            yield Door(path, spool, source)


@pytest.fixture
async def door(tmp_path):
    """One for a test, without a token."""
    async with opened(tmp_path) as door:
        yield door


@pytest.fixture
async def locked(tmp_path):
    """One that demands the token."""
    async with opened(tmp_path, TOKEN) as door:
        yield door


def batch(count, first=0):
    """Currents events, all different."""
    return [currents(seed=seed) for seed in range(first, first + count)]


def ids(events):
    """What they are known by."""
    return [event["id"] for event in events]


def body(events):
    """As Braze posts them."""
    return msgspec.json.encode({"events": events})


def request(payload, *headers, method="POST", path="/v1/currents"):
    """A request as bytes; the connection ends after it."""
    head = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", f"Content-Length: {len(payload)}", *headers]
    return "\r\n".join([*head, "", ""]).encode("latin-1") + payload


# -- 200 ---------------------------------------------------------------------------------------------------------------


async def test_200_means_on_disk(door, client):
    """When the answer comes, another program sees the events in the file."""
    events = batch(100)
    status, headers, answer = await door.post(client, body(events))
    assert door.in_file() == 100

    assert status == 200
    assert headers["Content-Type"].startswith("application/json")
    assert msgspec.json.decode(answer) == {"status": "ok"}
    assert await door.events() == ids(events)


@pytest.mark.parametrize("probe", [b"", b"{}", b'{"events":[]}', b'{"events":null}', b" \r\n", b"[]"])
async def test_no_events_is_a_credentials_probe(locked, client, probe):
    """Nothing happens but the check of the token, which is made for an empty body as well."""
    assert (await locked.post(client, probe, Authorization=f"Bearer {TOKEN}"))[0] == 200
    assert (await locked.post(client, probe, Authorization="Bearer wrong"))[0] == 401
    assert (await locked.post(client, probe))[0] == 401
    assert locked.spool.accounts.total("accepted") == 0


async def test_what_braze_may_add(door, client):
    """Query parameters, the version header, slashes (as of a proxy's `proxy_pass http://door/`) and any content type change
    nothing.
    """
    for n, (query, path, headers) in enumerate(
        [
            ("?workspace=eu&x=%20y", None, {}),
            ("", None, {"Braze_Currents_Version": "1"}),
            ("", None, {"Braze_Currents_Version": "2", "Content_Type": "text/plain; charset=latin-1"}),
            ("", "/v1/currents/", {}),
            ("", "/v1/currents//?a", {"Accept_Encoding": "br"}),
            ("", "//v1/currents", {}),
        ]
    ):
        assert (await door.post(client, body(batch(1, n)), query=query, path=path, **headers))[0] == 200
    assert await door.events() == ids(batch(6))


@pytest.mark.parametrize("form", ["array", "lone event"])
async def test_other_forms_of_events(door, client, form):
    """An array without its envelope, or one event without an array, is understood."""
    events = batch(1)
    assert (await door.post(client, msgspec.json.encode(events if form == "array" else events[0])))[0] == 200
    assert await door.events() == ids(events)


def custom(properties):
    """A custom event with properties as they are written."""
    head = (
        b'{"event_type":"users.behaviors.CustomEvent","time":1700000000,"user":{"external_user_id":"u"},"properties":'
    )
    return head + properties + b"}"


POISON = [
    b"17",
    b"null",
    b'"text"',
    b"[]",
    b"{}",
    b'{"event_type":"users.messages.email.Open"}',
    b'{"event_type":"users.messages.email.Open","time":"now","id":"a"}',
    b'{"event_type":"users.messages.email.Open","time":1700000000.5,"id":"a","user":{"external_user_id":"u"}}',
    b'{"event_type":"users.messages.email.Open","time":1e999,"id":"a","user":{"external_user_id":"u"}}',
    b'{"event_type":"users.messages.email.Open","time":99999999999999999999999,"user":{"external_user_id":"u"}}',
    b'{"event_type":"users.messages.email.Open","time":-1,"user":{"external_user_id":"u"}}',
    b'{"event_type":"users.messages.email.Open","time":1700000000,"user":["u"]}',
    b'{"event_type":"users.messages.email.Open","time":1700000000,"user":{"external_user_id":"unknown"}}',
    b'{"event_type":"users.messages.email.Open","time":1700000000,"id":"\xff","user":{"external_user_id":"u"}}',
    b'{"event_type":"users.messages.email.Open","time":1700000000,"id":"\\ud800","user":{"external_user_id":"u"}}',
    b'{"event_type":"users.unheard.Of","time":1700000000,"id":"a","user":{"external_user_id":"u"}}',
    custom(b"{}"),
    custom(b'{"name":"x","custom_properties":{"a":%s}}' % (b"[" * 600 + b"]" * 600)),
    custom(b'{"name":"x","custom_properties":{%s}}' % b",".join(b'"k%d":1' % n for n in range(300))),
    custom(b'{"name":"x","custom_properties":{"a":NaN}}'),
]
# Odd, but Mixpanel takes them, in some form.
ODD = [
    custom(b'{"name":"x","custom_properties":{"a":%s}}' % number)
    for number in (b"123456789012345678901234567890", b"-99999999999999999999", b"1e999", b"1E-400", b"0.1e1", b"-0")
] + [
    b'{"event_type":"users.messages.email.Open","time":1700000000,"id":"","user":{"external_user_id":"\\u0000"}}',
    b'{"event_type":"users.messages.email.Open","time":1700000000,"id":"\\n/\xc3\xa9","user":{"external_user_id":"u"}}',
    b'{"event_type":"users.messages.email.Open","time":1700000000,"user":{"external_user_id":"u"},"properties":null}',
    b'{"event_type":"users.messages.email.Open","time":1700000000,"user":{"external_user_id":"u"},"new":{"a":[1]}}',
]


@pytest.mark.parametrize("poison", POISON, ids=range(len(POISON)))
async def test_a_poison_event_costs_only_itself(door, client, poison):
    """Never 400 for the content of an event, or Braze drops it for good: it is a dead letter, its neighbours are taken."""
    good = batch(4)
    encoded = [msgspec.json.encode(event) for event in good]
    payload = b'{"events":[' + b",".join([*encoded[:2], poison, *encoded[2:]]) + b"]}"
    status, _, answer = await door.post(client, payload)

    assert (status, answer) == (200, b'{"status":"ok"}\n')
    assert sorted(await door.events()) == sorted(ids(good))
    [(reason, kept)] = await door.dead()
    assert reason
    assert kept == poison
    assert door.spool.accounts.imbalance() == 0


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
async def test_an_odd_event_ends_somewhere(door, client, odd):
    """Numbers beyond 64 bits, empty ids, control characters: taken or a dead letter, but never an error of the door."""
    good = batch(2)
    payload = b'{"events":[' + b",".join([msgspec.json.encode(good[0]), odd, msgspec.json.encode(good[1])]) + b"]}"
    status, _, _ = await door.post(client, payload)

    assert status == 200
    stored = await door.events()
    assert set(ids(good)) <= set(stored)
    assert len(stored) + len(await door.dead()) == 3
    assert door.spool.accounts.imbalance() == 0


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload", [b"not json", b'{"events":[', b'{"events":[{}]', b"\x00\x01\x02", b"event_type=x&id=y"]
)
async def test_400_is_only_for_what_is_no_json(door, client, payload):
    """The one refusal of content: a body that was cut off or is something else altogether."""
    status, _, answer = await door.post(client, payload)

    assert status == 400
    assert "error" in msgspec.json.decode(answer)
    assert door.spool.accounts.total("accepted") == 0


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Basic {TOKEN}",
        TOKEN,
        "Bearer wrong",
    ],
)
async def test_401(locked, client, authorization):
    """Without the very token nothing is taken, and nothing of it is said."""
    status, headers, answer = await locked.post(client, body(batch(1)), Authorization=authorization)

    assert status == 401
    assert headers["WWW-Authenticate"].startswith("Bearer")
    assert TOKEN.encode() not in answer
    assert locked.spool.accounts.total("accepted") == 0


async def test_the_right_token(locked, client):
    """Every character that a bearer token may have."""
    assert (await locked.post(client, body(batch(1)), Authorization=f"Bearer {TOKEN}"))[0] == 200


@pytest.mark.parametrize("value", [b"\xff\xfe\xc3", b"Bearer \xe9t\xe9", b"Bearer \xc3\xa9"])
async def test_a_credential_that_is_no_text(locked, value):
    """Bytes that aren't UTF-8 are a wrong token, not a failure of the door."""
    answer = await locked.raw(request(b"", "Authorization: " + value.decode("latin-1")))

    assert answer.startswith(b"HTTP/1.1 40")
    assert b"500" not in answer.splitlines()[0]


async def test_401_comes_before_everything_else(locked, client):
    """Who has no token learns nothing about methods."""
    assert (await locked.post(client, method="GET"))[0] == 401


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/currents/x", "/v2/currents", "/V1/CURRENTS", "/../v1/currents/.."])
async def test_404(door, client, path):
    """Only one address is the door's; the answer says which."""
    status, _, answer = await door.post(client, body(batch(1)), path=path)

    assert status == 404
    assert b"/v1/currents" in answer


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"])
async def test_405(door, client, method):
    """Events are posted."""
    status, headers, _ = await door.post(client, method=method)

    assert status == 405
    assert headers["Allow"] == "POST"
    assert headers["Server"] == "bridged", "which versions we run is nobody's business"


async def test_what_is_no_http_is_told_so(door):
    """400, in our words, and without a word about what we run."""
    head, _, said = (await door.raw(b"nonsense\r\n\r\n")).partition(b"\r\n\r\n")

    assert head.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
    assert "error" in msgspec.json.decode(said)
    assert b"\r\nServer: bridged" in head
    assert b"aiohttp" not in head


async def test_every_answer_is_ours(door):
    """Also those that are made without a handler, for what is too slow, too large or too much."""
    assert all(b"\r\nServer: bridged\r\n" in answer for answer in door.source.connections.refusals.values())


async def test_a_bug_of_ours_is_told_so(door, monkeypatch):
    """500, and without a word about what we run."""
    monkeypatch.setattr(Intake, "accept_body", lambda *_: 1 / 0)
    head, _, _ = (await door.raw(request(body(batch(1))))).partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 500 ")
    assert b"\r\nServer: bridged" in head
    assert b"aiohttp" not in head


def chunked(payload, size=16_000, *headers):
    """A request with a chunked body."""
    head = ["POST /v1/currents HTTP/1.1", "Host: x", "Connection: close", "Transfer-Encoding: chunked", *headers]
    pieces = [payload[at : at + size] for at in range(0, len(payload), size)]
    encoded = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    return "\r\n".join([*head, "", ""]).encode() + encoded


def sized(length):
    """A body with one event of exactly so many bytes."""
    empty = body([currents(seed=1)])
    return empty[:-1] + b" " * (length - len(empty)) + b"}"


@pytest.mark.parametrize("way", ["length", "chunked", "gzip", "chunked gzip"])
async def test_413(door, way):
    """At the limit a body is taken; one byte more is too large, however it comes: Braze then splits it."""
    for length, status in ((MAX_BODY, b"200"), (MAX_BODY + 1, b"413"), (MAX_BODY * 30, b"413")):
        payload = sized(length)
        packed = gzip.compress(payload)
        data = {
            "length": request(payload),
            "chunked": chunked(payload),
            "gzip": request(packed, "Content-Encoding: gzip"),
            "chunked gzip": chunked(packed, 1000, "Content-Encoding: gzip"),
        }[way]
        answer = await door.raw(data)
        assert answer.split(b" ")[1] == status, length
    assert len(await door.events()) == 1


async def test_413_by_the_length_alone(door):
    """A client that announces too much is told before it has sent it."""
    head = f"POST /v1/currents HTTP/1.1\r\nHost: x\r\nContent-Length: {10**12}\r\n\r\n".encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", door.source.port)
    writer.write(head)
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)
    writer.close()

    assert b" 413 " in answer


def bare_deflate(data):
    """As some clients take the word: without zlib's wrapper."""
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    ("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("deflate", bare_deflate)]
)
async def test_compressed_bodies(door, client, coding, pack):
    """A proxy in between may compress."""
    events = batch(20)
    packed = pack(body(events))
    assert (await door.post(client, packed, Content_Encoding=coding))[0] == 200
    assert await door.events() == ids(events)
    assert (await door.post(client, packed[: len(packed) // 2], Content_Encoding=coding))[0] == 400


@pytest.mark.parametrize(
    ("coding", "status"),
    [
        ("gzip, identity", 200),
        ("identity, GZIP", 200),
        ("gzip,", 200),
        ("", 400),
        ("identity,identity", 400),
        ("br", 415),
    ],
)
async def test_codings_that_are_none(door, client, coding, status):
    """`identity` and nothing at all say nothing: what is left says how a body is compressed."""
    assert (await door.post(client, gzip.compress(body(batch(1))), Content_Encoding=coding))[0] == status


async def test_codings_on_several_lines(door):
    """They are one list, as of every such field."""
    for first, second in (("identity", "gzip"), ("gzip", "identity")):
        sent = request(gzip.compress(body(batch(1))), f"Content-Encoding: {first}", f"Content-Encoding: {second}")
        assert (await door.raw(sent)).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("coding", ["", "identity, identity"])
async def test_a_body_that_is_not_compressed_after_all(door, client, coding):
    """With such a header it is read as it is."""
    assert (await door.post(client, body(batch(1)), Content_Encoding=coding))[0] == 200


async def test_a_compressed_body_that_never_fits(tmp_path, client):
    """As it came and expanded it is more than all bodies may be: 413, so that it is split. After a 503 it would come for ever."""
    limits = HttpLimits(max_in_flight=3 * 2**19)
    options = SpoolOptions(path=str(tmp_path / "spool.db"))
    async with Spool(options, NAMES) as spool:
        intake = Intake(EventMapping(EVENT_TYPES, MappingSettings(token="t")), spool)
        async with HttpSource(HttpOptions(port=0, max_body=2**20, limits=limits), intake, spool) as source:
            door = Door(tmp_path, spool, source)
            for size, status in ((800_000, 200), (1_000_000, 413)):
                filling = base64.b64encode(random.Random(size).randbytes(size * 3 // 4))
                payload = sized(1000)[:-1] + b',"x":"' + filling + b'"}'
                assert (await door.post(client, payload))[0] == 200
                packed = gzip.compress(payload)
                assert (await door.post(client, packed, Content_Encoding="gzip"))[0] == status
            assert source.connections.held == 0


@pytest.mark.parametrize("damage", ["cut", "flipped", "no gzip at all"])
async def test_a_damaged_gzip_body(door, damage):
    """It is no JSON, so 400; nothing of it is taken, and the next request is."""
    packed = bytearray(gzip.compress(body([currents(seed=seed) for seed in range(50)])))
    if damage == "cut":
        del packed[len(packed) // 2 :]
    elif damage == "flipped":
        packed[len(packed) // 2] ^= 0xFF
    else:
        packed[:] = b"hello"
    answer = await door.raw(request(bytes(packed), "Content-Encoding: gzip"))

    assert answer.startswith(b"HTTP/1.1 400")
    assert door.spool.accounts.total("accepted") == 0
    assert (await door.raw(request(body(batch(1))))).startswith(b"HTTP/1.1 200")


async def test_503_near_the_cap(tmp_path, client):
    """Braze keeps the events and comes again; when there is room they are taken."""
    async with opened(tmp_path, max_bytes=16 * MIB) as door:
        committed = []
        door.spool.committed = committed.extend
        while not door.spool.near_cap:
            await door.spool.append(Intaken([Batch(os.urandom(500_000).hex().encode() + b"\n", b"\x03")]))
        status, headers, answer = await door.post(client, body(batch(1)))
        assert status == 503
        assert int(headers["Retry-After"]) > 0
        assert b"cap" in answer
        door.spool.settle(Settlement(committed, delivered=b"\x03" * len(committed)))
        await asyncio.wait_for(door.spool.room.wait(), 10)

        assert (await door.post(client, body(batch(1))))[0] == 200


async def test_503_when_the_commit_fails(door, client):
    """What isn't on disk is not acked: no 2xx, but an answer that makes Braze come again."""
    abort = "CREATE TRIGGER no BEFORE INSERT ON segments BEGIN SELECT RAISE(ABORT, 'disk I/O error'); END"
    await door.spool.run(lambda db: db.execute(abort))
    for _ in range(2):
        status, headers, _ = await door.post(client, body(batch(1)))
        assert status == 503
        assert "Retry-After" in headers


async def test_who_waits_for_room_is_told_that_the_writer_has_failed(door, client):
    """At once: a daemon whose disk fails ended 5 s later than it could for a request that waited for room in vain."""
    door.spool.room.clear()
    waiting = asyncio.create_task(door.post(client, body(batch(1))))
    await until(lambda: door.source._busy, "the request")
    abort = "CREATE TRIGGER no BEFORE INSERT ON segments BEGIN SELECT RAISE(ABORT, 'disk I/O error'); END"
    await door.spool.run(lambda db: db.execute(abort))
    with pytest.raises(SpoolError):
        await door.spool.append(Intaken([Batch(b"{}\n", b"\x03")]))
    status, _, answer = await waiting

    assert status == 503
    assert b"the spool is closed" in answer


# -- connections -------------------------------------------------------------------------------------------------------


async def test_many_requests_on_one_connection(door):
    """Keep-alive, as Braze does it."""
    connector = aiohttp.TCPConnector(limit=1)
    async with aiohttp.ClientSession(connector=connector) as session:
        for n in range(200):
            assert (await door.post(session, body(batch(1, n))))[0] == 200
    assert door.source.requests == 200
    assert await door.events() == ids(batch(200))


async def test_refusals_do_not_break_a_connection(locked):
    """Refused and accepted requests take turns on one connection."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session:
        for n in range(5):
            assert (await locked.post(session, body(batch(1, n)), Authorization="Bearer no"))[0] == 401
            assert (await locked.post(session, b"{", Authorization=f"Bearer {TOKEN}"))[0] == 400
            assert (await locked.post(session, body(batch(1, n)), Authorization=f"Bearer {TOKEN}"))[0] == 200
    assert await locked.events() == ids(batch(5))
    assert locked.source.answers == {200: 5, 400: 5, 401: 5}


async def test_pipelined_requests(door):
    """Requests that come together are answered in order, each with its own answer."""
    first = request(body(batch(2))).replace(b"Connection: close\r\n", b"")
    second = request(b"no", path="/nowhere").replace(b"Connection: close\r\n", b"")
    third = request(body(batch(2, 2)))
    answer = await door.raw(first + second + third)

    assert [line for line in answer.split(b"\r\n") if b"HTTP/1.1 " in line] != []
    assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"404", b"200"]
    assert await door.events() == ids(batch(4))


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_a_chunked_body(door, size):
    """A body whose length nobody knew."""
    events = batch(3)
    answer = await door.raw(chunked(body(events), size))

    assert answer.startswith(b"HTTP/1.1 200")
    assert await door.events() == ids(events)


@pytest.mark.parametrize("pause", [10, 90, 150, 1000])
async def test_a_slow_body(door, pause):
    """Head and body may come in pieces."""
    events = batch(3)
    answer = await door.raw(request(body(events)), pause=pause)

    assert answer.startswith(b"HTTP/1.1 200")
    assert await door.events() == ids(events)


async def test_a_client_that_waits_to_be_asked(door):
    """`Expect: 100-continue`: some clients send a large body only after a word from the server."""
    payload = body(batch(1))
    head = request(payload, "Expect: 100-continue")[: -len(payload)]
    reader, writer = await asyncio.open_connection("127.0.0.1", door.source.port)
    writer.write(head)
    assert b"100" in await asyncio.wait_for(reader.readline(), 5)
    assert await reader.readline() == b"\r\n"
    writer.write(payload)
    assert b" 200 " in await asyncio.wait_for(reader.readline(), 5)
    writer.close()


async def test_a_client_that_leaves(door, client):
    """A body that never ends because the client has gone is nobody's event, and holds nobody up."""
    for cut in (1, 30, 300):
        _, writer = await asyncio.open_connection("127.0.0.1", door.source.port)
        data = request(body(batch(5)))
        writer.write(data[:-cut])
        await writer.drain()
        writer.close()
    assert (await door.post(client, body(batch(1))))[0] == 200
    assert await door.events() == ids(batch(1))


@pytest.mark.parametrize("by_reset", [False, True])
async def test_a_client_that_leaves_before_the_rest_of_a_refused_body(locked, by_reset):
    """It is forgotten at once: waited for, as for one who is there, it would keep 10 kB and, unless it was reset, one of
    the connections that there may be, for half a minute. It needs no token for that.
    """
    data = request(body(batch(1)))
    for _ in range(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", locked.source.port)
        writer.write(data[:-9])
        assert b" 401 " in await asyncio.wait_for(reader.readuntil(b"}"), 20)
        if by_reset:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()

    async with asyncio.timeout(5):
        while locked.source.connections.connections:
            await asyncio.sleep(0.01)
    assert not locked.source.connections.alive
    assert locked.source.answers == {401: 20}


async def test_fifty_clients_one_of_them_broken(door):
    """Each is served, whatever one of them does."""

    async def good(n):
        async with aiohttp.ClientSession() as session:
            for m in range(4):
                assert (await door.post(session, body(batch(5, 1000 * n + 5 * m))))[0] == 200

    async def broken():
        for data in (b"\x00" * 1000, b"GET", b"POST /v1/currents HTTP/9.9\r\n\r\n", request(b"x" * 1000)[:-500]):
            _, writer = await asyncio.open_connection("127.0.0.1", door.source.port)
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(0.01)
            writer.transport.abort()

    await asyncio.gather(*map(good, range(49)), broken())

    assert len(await door.events()) == 49 * 20
    assert door.spool.accounts.imbalance() == 0


async def test_group_commit_over_http(door):
    """Many clients share a commit: the disk isn't synced for each."""

    async def one(session, n):
        assert (await door.post(session, body(batch(1, n))))[0] == 200

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(one(session, n) for n in range(200)))

    assert door.spool.commits < 150
    assert len(await door.events()) == 200


async def test_an_address_that_is_taken(door):
    """The error names the key and the address."""
    second = HttpSource(HttpOptions(port=door.source.port), door.source._intake, door.spool)
    with pytest.raises(ListenError, match=rf"sources\.http\.listen = 127\.0\.0\.1:{door.source.port}"):
        await second.__aenter__()


def test_what_is_required_has_what_the_door_is_built_on():
    """An installation keeps the aiohttp that it has, if it satisfies us: with 3.14.3 every request broke off, unanswered. What
    a later one makes of its insides has to be looked at first.
    """
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {each.name: each.specifier for each in map(Requirement, project["dependencies"])}

    assert list(required["uvloop"].filter(["0.22.1", "0.23.0"])) == ["0.23.0"]  # a 408 got lost with the former
    assert list(required["aiohttp"].filter(["3.14.0", "3.14.3", "3.14.4", "3.15.0"])) == ["3.14.4"]
    assert aiohttp.__version__ in required["aiohttp"]
