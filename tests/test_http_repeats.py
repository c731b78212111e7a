"""The HTTP door's short way for a head that comes again: every answer must be the one that the long way would give."""

import asyncio
import contextlib
import gzip
import socket
import time

import msgspec
import pytest
from conftest import NAMES, currents, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridged.backlog.segment import lines
from bridged.backlog.spool import Spool, SpoolOptions
from bridged.currents.table import EVENT_TYPES
from bridged.intake import Intake
from bridged.mixpanel.mapping import EventMapping, MappingSettings
from bridged.sources import http
from bridged.sources.http import HttpOptions, HttpSource
from bridged.sources.http_connections import HttpConnection, HttpLimits

TOKEN = "a-token-of-this-test"
GOOD = f"Authorization: Bearer {TOKEN}"
MAX_BODY = 100_000


class Door:
    """An HTTP door that demands a token, with a spool behind it, and one connection to it."""

    def __init__(self, spool, source, reader, writer):
        self.spool, self.source, self.reader, self.writer = spool, source, reader, writer

    @property
    def by_parser(self):
        """Requests that took the long way."""
        return self.source.connections.requests_count

    async def send(self, data):
        """Bytes as they are."""
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self):
        """Status and head of the next answer; the body is checked to be JSON."""
        async with asyncio.timeout(30):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            msgspec.json.decode(await self.reader.readexactly(length))
        return int(head[9:12]), head.lower()

    async def ask(self, data):
        """The status of one request."""
        await self.send(data)
        return (await self.answer())[0]

    async def events(self):
        """The ids of the events that are on disk, in order."""
        segments, _ = await self.spool.read_after(0, 2**40)
        return [msgspec.json.decode(line)["properties"]["$insert_id"] for line in lines(segments)]


@contextlib.asynccontextmanager
async def opened(path, limits=None):
    """A door, and one connection."""
    # A small one: its reserve is made anew for each example of the property below.
    spool = Spool(SpoolOptions(path=str(path / "spool.db"), max_bytes=40 * 2**20), NAMES)
    options = HttpOptions(port=0, bearer_token=TOKEN, max_body=MAX_BODY, limits=limits or HttpLimits())
    async with spool:
        intake = Intake(EventMapping(EVENT_TYPES, MappingSettings(token="t")), spool)
        async with HttpSource(options, intake, spool) as source:
            reader, writer = await asyncio.open_connection("127.0.0.1", source.port)
            try:
                yield Door(spool, source, reader, writer)
            finally:
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()


@pytest.fixture
async def door(tmp_path):
    """One for a test."""
    async with opened(tmp_path) as door:
        yield door


def body(*seeds):
    """As Braze posts them."""
    return msgspec.json.encode({"events": [currents(seed=seed) for seed in seeds]})


def ids(*seeds):
    """What they are known by."""
    return [currents(seed=seed)["id"] for seed in seeds]


def committing_waits(monkeypatch, error=None):
    """From now on no commit is told of before the event that this gives; then, if there is one, of the error instead."""
    go, accept_body = asyncio.Event(), Intake.accept_body

    async def told(written):
        await go.wait()
        await written
        if error is not None:
            raise error

    def accept(*args):
        return asyncio.ensure_future(told(accept_body(*args)))

    monkeypatch.setattr(Intake, "accept_body", accept)
    return go


def request(payload, *headers, method="POST", path="/v1/currents"):
    """A request as bytes, by default a good one."""
    head = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(payload)}", *(headers or (GOOD,))]
    return "\r\n".join([*head, "", ""]).encode() + payload


def chunked(payload):
    """The same, by chunks of seven bytes."""
    pieces = [payload[at : at + 7] for at in range(0, len(payload), 7)]
    framed = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    head = f"POST /v1/currents HTTP/1.1\r\nHost: x\r\n{GOOD}\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head.encode() + framed + b"0\r\n\r\n"


async def test_a_repeated_head_takes_the_short_way(door):
    """Only the first request meets the parser; each is committed before it is answered, and counted."""
    for n in range(20):
        assert await door.ask(request(body(n, 100 + n))) == 200
        assert len(await door.events()) == 2 * (n + 1)

    assert door.by_parser == 1
    assert door.source.requests == 20
    assert door.source.answers == {200: 20}
    assert door.source.connections.held == 0


@pytest.mark.parametrize("cut", [1, 30, 90, 120, 200, -1])
async def test_a_repeat_in_two_pieces(door, cut):
    """Whether it is cut in its head or in its body."""
    assert await door.ask(request(body(0))) == 200
    for n in range(1, 4):
        data = request(body(n))
        await door.send(data[:cut])
        await asyncio.sleep(0.02)
        assert await door.ask(data[cut:]) == 200

    assert await door.events() == ids(0, 1, 2, 3)
    assert door.source.connections.held == 0


async def test_repeats_in_one_read(door):
    """Who doesn't wait for answers takes the short way as well, from his second burst on: else 2,500 requests a second of
    clients that never read cost a quarter of the loop, and everybody else four times as long a p99.
    """
    await door.send(b"".join(request(body(n)) for n in range(5)))
    assert [(await door.answer())[0] for _ in range(5)] == [200] * 5
    assert door.by_parser == 5
    await door.send(b"".join(request(body(n)) for n in range(5, 40)))
    assert [(await door.answer())[0] for _ in range(35)] == [200] * 35

    assert door.by_parser == 5
    assert await door.events() == ids(*range(40))
    assert door.source.connections.held == 0


@pytest.mark.parametrize("pieces", [1, 2])
async def test_what_comes_behind_a_repeat_in_one_read(door, pieces):
    """Another head, the beginning of a request, no HTTP: each is judged once the repeat before it has its answer."""
    assert await door.ask(request(body(0))) == 200
    whole = request(body(1)) + request(body(2), GOOD, "X-Other: 1") + request(body(3), GOOD, "X-Other: 1")
    whole += request(body(4), GOOD, "X-Other: 1")[:-100]
    at = len(whole) // pieces
    await door.send(whole[:at])
    if pieces > 1:
        await asyncio.sleep(0.02)
        await door.send(whole[at:])
    assert [(await door.answer())[0] for _ in range(3)] == [200] * 3
    assert await door.events() == ids(0, 1, 2, 3)
    await door.send(request(body(4), GOOD, "X-Other: 1")[-100:] + b"this is no HTTP\r\n\r\n")
    assert [(await door.answer())[0] for _ in range(2)] == [200, 400]

    assert await door.events() == ids(0, 1, 2, 3, 4)
    assert await door.reader.read() == b""


async def test_probes_that_repeat(door):
    """No events, said so: each is answered, by the short way too, and stands in no other's way."""
    for _ in range(3):
        assert await door.ask(request(b"")) == 200
        assert await door.ask(request(b'{"events":[]}')) == 200
    await door.send(request(b"") * 3 + request(body(0)))
    assert [(await door.answer())[0] for _ in range(4)] == [200] * 4

    assert door.by_parser == 1
    assert door.source.answers == {200: 10}
    assert await door.events() == ids(0)


async def test_a_head_that_only_begins_alike(door):
    """A wrong token, another path or method, or one header more is judged for what it is."""
    assert await door.ask(request(body(0))) == 200
    assert await door.ask(request(body(1), GOOD[:-1] + "!")) == 401
    assert await door.ask(request(body(0))) == 200
    assert await door.ask(request(body(1), GOOD + "x")) == 401
    assert await door.ask(request(body(0))) == 200
    assert await door.ask(request(body(1), GOOD, path="/v2/currents")) == 404
    assert await door.ask(request(body(0))) == 200
    assert await door.ask(request(gzip.compress(body(1)), GOOD, "Content-Encoding: gzip")) == 200
    assert await door.ask(request(gzip.compress(body(2)), GOOD, "Content-Encoding: gzip")) == 200

    assert await door.events() == ids(0, 0, 0, 0, 1, 2)


async def test_another_token(door):
    """A head that was good for the old token is looked at again, and so is one that came while the token was changed."""
    assert await door.ask(request(body(0))) == 200
    door.source.use(TOKEN)
    assert await door.ask(request(body(1))) == 200
    assert door.by_parser == 1
    door.source.use("another")
    assert await door.ask(request(body(2))) == 401

    door.source.use(TOKEN)
    data = request(body(3))
    await door.send(data[:-5])
    while door.by_parser < 3:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    door.source.use("another")
    assert await door.ask(data[-5:]) == 200
    assert await door.ask(request(body(4))) == 401

    assert await door.events() == ids(0, 1, 3)


async def test_the_rest_of_a_head_is_no_head(door):
    """What came behind another request began before its last piece: that piece alone, sent again, is another request."""
    begins = b"POST /v1/currents HTTP/1.1\r\nX-Quotes: "
    rest = request(body(1), GOOD, method="GET", path="/nowhere")
    await door.send(request(body(0)) + begins)
    assert (await door.answer())[0] == 200
    assert await door.ask(rest) == 200
    assert await door.ask(rest) == 404

    assert await door.events() == ids(0, 1)


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
async def test_the_first_bytes_apart(door, cut):
    """However few of a head come first: what came behind them is none by itself, though it is all that came at once."""
    data = request(body(0))
    await door.send(data[:cut])
    await until(lambda: door.source.connections.held == cut)
    assert await door.ask(data[cut:]) == 200
    assert await door.ask(request(body(1))[cut:]) == 400

    assert await door.events() == ids(0)


@pytest.mark.parametrize("shorter", range(5))
async def test_a_piece_of_a_head_as_long_as_the_body_before(door, shorter):
    """Whatever lengths a client chooses, what came is never measured by the body of a request before it."""
    begins = f"POST /v1/currents HTTP/1.1\r\nHost: x\r\n{GOOD}\r\nX-Quotes: ".encode()

    def rest(seed):
        """Neither our method nor our token, as if it were a request by itself."""
        return request(body(seed), "X: y", method="GET", path="/nowhere").replace(b"Host: x\r\n", b"")

    assert await door.ask(request(b"[]".ljust(len(begins) - shorter))) == 200
    await door.send(begins)
    await until(lambda: door.source.connections.held)
    assert await door.ask(rest(0)) == 200
    assert await door.ask(rest(1)) == 400

    assert await door.events() == ids(0)


async def test_a_piece_of_a_head_between_an_answer_and_the_wait_for_the_next(door, monkeypatch):
    """It is held, and what follows belongs to it: not to the head that was known when it came."""
    handled = HttpConnection.handled

    def handled_once(connection, *, plain):
        """And before aiohttp waits for the next request, the beginning of one comes."""
        monkeypatch.undo()
        handled(connection, plain=plain)
        asyncio.get_running_loop().call_soon(connection.data_received, b"POST /v1/currents HTTP/1.1\r\nX-Quotes: ")

    monkeypatch.setattr(HttpConnection, "handled", handled_once)
    assert await door.ask(request(body(0))) == 200
    assert await door.ask(request(body(1))) == 200
    assert door.by_parser == 2
    assert await door.ask(request(body(2), GOOD, method="GET", path="/nowhere")) == 404

    assert await door.events() == ids(0, 1)


@pytest.mark.parametrize("apart", [0, 5])
async def test_a_body_that_comes_apart_from_its_head(door, apart):
    """Many clients send two packets, and a large body is many: the head is known afterwards all the same."""
    for n in range(4):
        data = request(body(n))
        at = data.index(b"{") + apart
        await door.send(data[:at])
        await until(lambda: door.source.connections.held)
        assert await door.ask(data[at:]) == 200

    assert door.by_parser == 1
    assert await door.events() == ids(0, 1, 2, 3)


async def test_a_repeat_that_is_refused(door):
    """No JSON, too large, empty: the words, and the connection's fate, are those of a first request."""
    assert await door.ask(request(body(0))) == 200
    assert await door.ask(request(b"{")) == 400
    assert await door.ask(request(body(1))) == 200
    assert await door.ask(request(b"")) == 200
    assert await door.ask(request(body(2))) == 200
    assert await door.ask(request(b" " * (MAX_BODY + 1))) == 413

    assert await door.events() == ids(0, 1, 2)


async def test_a_repeat_whose_commit_fails(door):
    """What isn't on disk is not acked."""
    assert await door.ask(request(body(0))) == 200
    abort = "CREATE TRIGGER no BEFORE INSERT ON segments BEGIN SELECT RAISE(ABORT, 'disk I/O error'); END"
    await door.spool.run(lambda db: db.execute(abort))
    await door.send(request(body(1)))
    status, head = await door.answer()

    assert status == 503
    assert b"retry-after: " in head
    assert await door.reader.read() == b""
    assert door.by_parser == 1
    assert door.source.answers == {200: 1, 503: 1}


async def test_a_bug_of_ours_is_answered(door, monkeypatch):
    """A repeat that trips over one takes the long way, where it gets its 500: no connection that just closes."""
    assert await door.ask(request(body(0))) == 200
    monkeypatch.setattr(Intake, "accept_body", lambda *_: 1 / 0)
    await door.send(request(body(1)))

    assert (await asyncio.wait_for(door.reader.read(), 30)).startswith(b"HTTP/1.1 500 ")
    assert door.by_parser == 2
    assert door.source.answers == {200: 1, 500: 1}


async def test_a_bug_of_ours_while_it_is_committed(door, monkeypatch):
    """What became of it nobody knows, so it is 500 as well, and the last answer; the connection doesn't wait for ever."""
    assert await door.ask(request(body(0))) == 200
    go = committing_waits(monkeypatch, ZeroDivisionError())
    await door.send(request(body(1)))
    go.set()

    assert (await asyncio.wait_for(door.reader.read(), 30)).startswith(b"HTTP/1.1 500 ")
    assert door.by_parser == 1
    assert door.source.answers == {200: 1, 500: 1}
    assert not door.source._busy


async def test_the_last_repeat_is_told(tmp_path):
    """A request that waits for its commit while the door closes is answered, and told that nothing more will be."""
    async with opened(tmp_path) as door:
        assert await door.ask(request(body(0))) == 200
        door.writer.write(request(body(1)))
        while door.source.requests < 2:
            await asyncio.sleep(0)
        closing = asyncio.create_task(door.source.__aexit__())
        status, head = await door.answer()
        assert status == 200
        # Either it was committed before the door began to close, or it says so.
        assert b"connection: close" in head or await door.reader.read() == b""
        await closing
        assert await door.events() == ids(0, 1)


@pytest.mark.parametrize("known", [False, True])
async def test_a_body_on_its_way_at_the_stop(tmp_path, monkeypatch, known):
    """It is waited for, whether or not its head is known, longer than an idle connection is; then it is told the end."""
    monkeypatch.setattr("bridged.sources.http._LINGER_S", 0)
    async with opened(tmp_path) as door:
        if known:
            assert await door.ask(request(body(0))) == 200
        data = request(body(1))
        await door.send(data[:-9])
        await until(lambda: door.source.connections.held)
        assert door.by_parser == 1
        closing = asyncio.create_task(door.source.__aexit__())
        for _ in range(20):
            await asyncio.sleep(0)
        await door.send(data[-9:])
        status, head = await door.answer()
        assert status == 200
        assert b"connection: close" in head
        await closing
        assert await door.events() == ids(*([0] if known else []), 1)


async def test_a_machine_that_stands_still_at_the_stop(tmp_path):
    """For longer than an idle connection is kept: its client stood still, too, and is answered when both go on."""
    async with opened(tmp_path) as door:
        with socket.create_connection(("127.0.0.1", door.source.port), timeout=30) as client:
            client.sendall(request(body(0)))
            assert (await asyncio.to_thread(client.recv, 65536)).startswith(b"HTTP/1.1 200 ")
            closing = asyncio.create_task(door.source.__aexit__())
            await asyncio.sleep(0)
            time.sleep(2 * http._LINGER_S)  # noqa: ASYNC251  # nothing may turn meanwhile
            await asyncio.sleep(0.02)
            client.sendall(request(body(1)))
            answer = await asyncio.to_thread(client.recv, 65536)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"connection: close" in answer.lower()
        await closing
        assert await door.events() == ids(0, 1)


async def test_half_closed_after_a_repeat(door):
    """A client that has said all it wants to say still gets its answer, and then the end."""
    assert await door.ask(request(body(0))) == 200
    await door.send(request(body(1)))
    door.writer.write_eof()
    assert (await door.answer())[0] == 200
    assert await asyncio.wait_for(door.reader.read(), 30) == b""
    assert door.by_parser == 1


async def test_a_repeat_that_stops_coming(tmp_path):
    """A body that ends nowhere is 408, what it held is let go, and a client that leaves is nobody's event."""
    async with opened(tmp_path, HttpLimits(body_s=0.2, look_s=0.05)) as door:
        assert await door.ask(request(body(0))) == 200
        await door.send(request(body(1))[:-9])
        assert (await door.answer())[0] == 408
        assert await door.reader.read() == b""
        assert door.source.connections.held == 0
        assert not door.source.connections.alive
        assert await door.events() == ids(0)


async def test_repeats_count_as_held(tmp_path):
    """Many bodies that are on their way at once are bounded as a sum, by the short way as well."""
    limits = HttpLimits(max_in_flight=200_000, look_s=3600)
    async with opened(tmp_path, limits) as door:
        sockets = [await asyncio.open_connection("127.0.0.1", door.source.port) for _ in range(5)]
        for reader, writer in sockets:
            writer.write(request(body(0)))
            assert b" 200 " in await reader.readuntil(b"ok")
        for _, writer in sockets:
            writer.write(request(b" " * 90_000)[:-1])
        async with asyncio.timeout(30):
            while not door.source.answers[503]:
                await asyncio.sleep(0.01)
                assert door.source.connections.held <= limits.max_in_flight
        for _, writer in sockets:
            writer.close()
        async with asyncio.timeout(30):
            while door.source.connections.held:
                await asyncio.sleep(0.01)


async def test_idle_after_repeats(tmp_path):
    """The idle time counts from the last request, whichever way it took."""
    async with opened(tmp_path, HttpLimits(idle_s=1.0, look_s=0.05)) as door:
        for n in range(6):
            assert await door.ask(request(body(n))) == 200
            await asyncio.sleep(0.3)
        assert door.by_parser == 1
        assert await asyncio.wait_for(door.reader.read(), 30) == b""


@pytest.mark.parametrize("what", ["coming", "committing"])
async def test_a_repeat_is_not_idle(door, monkeypatch, what):
    """The end of the idle time in the middle of a repeat, which no handler has, doesn't close the connection."""
    assert await door.ask(request(body(0))) == 200
    (connection,) = door.source.connections.alive
    go = committing_waits(monkeypatch)
    data = request(body(1))
    if what == "coming":
        await door.send(data[:-9])
        await until(lambda: connection.held)
    else:
        await door.send(data)
        await until(lambda: door.source.requests == 2)
    connection._next_keepalive_close_time = 0
    connection._keepalive_handle.cancel()
    connection._process_keepalive()
    if what == "coming":
        await door.send(data[-9:])
    go.set()
    assert (await door.answer())[0] == 200
    assert door.by_parser == 1
    assert connection._keepalive_handle is not None, "or it would never be idle again"


async def test_what_waits_behind_a_repeat_is_bounded(door, monkeypatch):
    """Who doesn't wait for the answer to a repeat is read no further, and when it is answered all of it is taken."""
    count = 4000
    assert await door.ask(request(body(0))) == 200
    (connection,) = door.source.connections.alive
    go = committing_waits(monkeypatch)
    await door.send(request(body(1)))
    await until(lambda: door.source.requests == 2)
    flood = request(body(2)) * count
    door.writer.write(flood)
    await until(lambda: not connection.transport.is_reading() or connection.held == len(flood))
    # What is too much, and one read.
    assert connection.held <= 128 * 2**10 + 256 * 2**10 < len(flood)

    go.set()
    for _ in range(count + 1):
        assert (await door.answer())[0] == 200
    assert len(await door.events()) == count + 2
    assert door.source.connections.held == 0
    assert connection.transport.is_reading()


async def test_what_waits_behind_a_repeat_is_read_on(door, monkeypatch):
    """Also when it is a repeat itself, and the parser with its own pauses never sees it before it is whole."""
    assert await door.ask(request(body(0))) == 200
    (connection,) = door.source.connections.alive
    go = committing_waits(monkeypatch)
    await door.send(request(body(1)))
    await until(lambda: door.source.requests == 2)
    door.writer.write(request(b" " * 600_000))
    await until(lambda: not connection.transport.is_reading())
    go.set()
    assert (await door.answer())[0] == 200
    assert (await door.answer())[0] == 413
    assert door.by_parser == 2


async def test_what_waits_behind_a_repeat_makes_room(tmp_path, monkeypatch):
    """It counts as coming, and being the most it is what goes: not the body of whoever comes then."""
    async with opened(tmp_path, HttpLimits(max_in_flight=200_000, look_s=3600)) as door:
        assert await door.ask(request(body(0))) == 200
        go = committing_waits(monkeypatch)
        await door.send(request(body(1)))
        await until(lambda: door.source.requests == 2)
        await door.send(b" " * 120_000)
        await until(lambda: door.source.connections.held == 120_000)

        reader, writer = await asyncio.open_connection("127.0.0.1", door.source.port)
        writer.write(request(body(2)[:-1] + b" " * 90_000 + b"}"))
        assert (await door.answer())[0] == 503
        go.set()
        assert b" 200 " in await asyncio.wait_for(reader.readline(), 30)
        writer.close()
        assert await door.events() == ids(0, 1, 2)


KINDS = {
    "good": lambda n: (request(body(n)), 200, [n]),
    "two": lambda n: (request(body(n, n + 1000)), 200, [n, n + 1000]),
    "other head": lambda n: (request(body(n), GOOD, f"X-N: {n}"), 200, [n]),
    "chunked": lambda n: (chunked(body(n)), 200, [n]),
    "gzip": lambda n: (request(gzip.compress(body(n)), GOOD, "Content-Encoding: gzip"), 200, [n]),
    "empty": lambda _: (request(b""), 200, []),
    "wrong token": lambda n: (request(body(n), GOOD + "?"), 401, []),
    "no JSON": lambda _: (request(b"{"), 400, []),
    "looks like a head": lambda _: (request(request(b"")), 400, []),
    "elsewhere": lambda n: (request(body(n), GOOD, path="/"), 404, []),
}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.one_of(st.just("good"), st.sampled_from(sorted(KINDS))), min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 8000), max_size=12),
    waits=st.lists(st.booleans(), min_size=1, max_size=24),
    apart=st.lists(st.booleans(), min_size=1, max_size=12),
)
def test_any_requests_in_any_pieces(tmp_path_factory, kinds, cuts, waits, apart):
    """However a connection's bytes are cut, and whether or not the client waits for answers: each request gets its own
    answer, in order, and exactly the events of the good ones are on disk.
    """
    made = [KINDS[kind](n) for n, kind in enumerate(kinds)]

    async def conversation():
        async with opened(tmp_path_factory.mktemp("spool")) as door:
            stream, ends, whole = b"", [], set()
            for data, status, _ in made:
                if status in (401, 404):
                    # Refused for its head: if its body is still on its way, the answer is the connection's last one.
                    whole.update(range(len(stream) + 1, len(stream) + len(data)))
                stream += data
                ends.append(len(stream))
            cuts_at = {cut for cut in cuts if cut < len(stream)}
            cuts_at |= {end for n, end in enumerate(ends) if apart[n % len(apart)]}
            at, answers = 0, []
            for piece, to in enumerate(sorted((cuts_at | {len(stream)}) - whole)):
                await door.send(stream[at:to])
                at = to
                if waits[piece % len(waits)]:
                    while len(answers) < sum(end <= at for end in ends):
                        answers.append((await door.answer())[0])
                else:
                    await asyncio.sleep(0)
            while len(answers) < len(made):
                answers.append((await door.answer())[0])
            assert answers == [status for _, status, _ in made]
            assert await door.events() == ids(*(seed for _, _, seeds in made for seed in seeds))
            assert door.source.connections.held == 0

    asyncio.run(conversation())
