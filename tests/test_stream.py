"""The stream door over real sockets: framing, acks, back-pressure, and clients that misbehave."""

import asyncio
import contextlib
import itertools
import os
import socket
import sqlite3
import struct

import msgspec
import pytest
import uvloop
from conftest import NAMES, balanced, currents, free_port, ndjson, until
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from bridged.app import App
from bridged.backlog.segment import lines as segment_lines
from bridged.backlog.spool import Intaken, Settlement, Spool, SpoolOptions
from bridged.currents.table import EVENT_TYPES
from bridged.errors import ListenError
from bridged.intake import Intake
from bridged.mixpanel.mapping import EventMapping, MappingSettings
from bridged.sources.stream import StreamOptions, StreamSource

MAX_LINE = 5_000
ACKS = b'{"acks":true}\n'
MIB = 2**20


class Door:
    """A stream door with a spool behind it and nothing that delivers."""

    def __init__(self, path, spool, source):
        self.path, self.spool, self.source = path, spool, source

    async def connect(self, kind="tcp"):
        if kind == "unix":
            return await asyncio.open_unix_connection(str(self.path / "s.sock"))
        return await asyncio.open_connection("127.0.0.1", self.source.ports[0])

    async def talk(self, data, kind="tcp"):
        """Sends everything, says goodbye, gives what the door says until it closes."""
        reader, writer = await self.connect(kind)
        writer.write(data)
        writer.write_eof()
        answer = await asyncio.wait_for(reader.read(), 20)
        await goodbye(writer)
        return answer

    async def events(self):
        """The ids of the events that are on disk, in order."""
        return [msgspec.json.decode(line)["properties"]["$insert_id"] for line in await self.lines()]

    async def lines(self):
        segments, _ = await self.spool.read_after(0, 2**40)
        return segment_lines(segments)

    async def dead(self):
        """Reason and bytes of every dead letter."""
        query = "SELECT reason, event FROM dead_letters ORDER BY id"
        return [tuple(row) for row in await self.spool.run(lambda db: db.execute(query).fetchall())]

    def in_file(self):
        """How many events another program sees in the file."""
        with contextlib.closing(sqlite3.connect(self.path / "spool.db")) as db:
            return db.execute("SELECT coalesce(sum(length(codes)), 0) FROM segments").fetchone()[0]


@contextlib.asynccontextmanager
async def opened(path, **spool_options):
    """A door, its spool and its listeners in a folder."""
    options = SpoolOptions(path=str(path / "spool.db"), **spool_options)
    intake_mapping = EventMapping(EVENT_TYPES, MappingSettings(token="t"))
    listen = ("tcp:127.0.0.1:0", f"unix:{path}/s.sock")
    async with Spool(options, NAMES) as spool:
        intake = Intake(intake_mapping, spool)
        async with StreamSource(StreamOptions(listen=listen, max_line=MAX_LINE), intake, spool) as source:
            yield Door(path, spool, source)


@pytest.fixture
async def door(tmp_path):
    """One for a test."""
    async with opened(tmp_path) as door:
        yield door


async def goodbye(writer):
    """Closes our side, whatever the door has done to its own."""
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def batch(count, first=0):
    """Currents events, all different."""
    return [currents(seed=seed) for seed in range(first, first + count)]


def ids(events):
    """What they are known by."""
    return [event["id"] for event in events]


def acked(answer):
    """The numbers of the ack lines; fails for anything else."""
    return [msgspec.json.decode(line, type=dict[str, int])["acked"] for line in answer.splitlines()]


def reset(writer):
    """Ends a connection without a goodbye."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def test_a_handshake_is_the_first_line_or_none(door):
    """However the first line comes: one that is too long, and comes in pieces, makes no handshake of the second."""
    reader, writer = await door.connect()
    writer.write(b"x" * 20_000)
    await until(lambda: door.source.unfinished == 0 and door.spool.accounts.total("accepted") == 0)
    await asyncio.sleep(0.05)
    writer.write(b"\n" + ACKS)
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(), 20) == b""
    await goodbye(writer)

    assert [event[:3] for _, event in await door.dead()] == [b"xxx", b'{"a']


async def test_who_sends_much_lets_the_loop_turn(door, monkeypatch, turns):
    """One large read a turn: acks, deliveries and everybody else don't wait for all that a client has sent."""
    taken = []
    accept = door.source.intake.accept_lines

    def counted(lines, sender):
        if sum(map(len, lines)) > 100_000:
            taken.append(turns())
        return accept(lines, sender)

    monkeypatch.setattr(door.source.intake, "accept_lines", counted)
    events = ndjson(batch(100)) * 100
    with socket.create_connection(("127.0.0.1", door.source.ports[0])) as sock:
        await asyncio.to_thread(sock.sendall, events)
    await until(lambda: door.spool.accounts.total("accepted") == 10_000, "all of it on disk", 20)

    assert len(taken) > 10, "it came in large reads"
    assert len(set(taken)) == len(taken)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("handshake", [b"", ACKS, b'{"acks":false}\n', b' {"acks" : true}\r\n', b"\xef\xbb\xbf" + ACKS])
async def test_lines_become_events(door, kind, handshake):
    """Every line is an event; who asked for acks is told of every line but the handshake, the others of none."""
    events = batch(30)
    answer = await door.talk(handshake + ndjson(events), kind)

    assert await door.events() == ids(events)
    assert await door.dead() == []
    if b"true" in handshake:
        assert acked(answer)[-1] == 30
    else:
        assert answer == b""


async def test_acks_are_cumulative_and_never_early(door):
    """Each ack is more than the last, and what it says is in the file when it comes."""
    reader, writer = await door.connect()
    writer.write(ACKS)
    told = 0
    for at in range(0, 400, 20):
        writer.write(ndjson(batch(20, at)))
        await writer.drain()
        if at % 60 == 0:
            number = msgspec.json.decode(await asyncio.wait_for(reader.readline(), 20))["acked"]
            assert told < number <= at + 20
            assert door.in_file() >= number
            told = number
    writer.write_eof()
    rest = acked(await asyncio.wait_for(reader.read(), 20))
    await goodbye(writer)

    assert rest == sorted(set(rest))
    assert rest[-1] == 400


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n", b"\n\n\n"])
async def test_the_last_line(door, ending):
    """It may lack its newline; what follows it may be blank."""
    events = batch(3)
    answer = await door.talk(ACKS + ndjson(events).removesuffix(b"\n") + ending)

    assert await door.events() == ids(events)
    assert acked(answer)[-1] >= 3


async def test_odd_but_harmless(door):
    """CRLF, blank lines and a byte order mark cost nothing; blank lines count as lines."""
    first, second, third = batch(3)
    data = b"\xef\xbb\xbf" + ndjson([first]) + b"\n  \n" + ndjson([second]).replace(b"\n", b"\r\n") + ndjson([third])
    answer = await door.talk(data)
    assert answer == b""
    answer = await door.talk(ACKS + data)

    assert await door.events() == ids([first, second, third]) * 2
    assert await door.dead() == []
    assert acked(answer)[-1] == 5


async def test_bad_lines_cost_only_themselves(door):
    """Whatever isn't an event is a dead letter with its bytes; its neighbours are delivered, and all are acked."""
    good = batch(5)
    bad = [
        b"not json",
        b"[]",
        b"17",
        b'{"event_type":5}',
        b"\xff\xfe\x00",
        b'{"a":' * 5000,
        b"{}",
        b'"\\ud800"',
        b"{} {}",
    ]
    answer = await door.talk(ACKS + b"".join(ndjson([event]) + line + b"\n" for event in good for line in bad))

    assert await door.events() == [id_ for id_ in ids(good) for _ in bad]
    letters = await door.dead()
    assert len(letters) == len(good) * len(bad)
    assert all(line.startswith(event) for line, (_, event) in zip(bad, letters, strict=False))
    assert acked(answer)[-1] == 2 * len(good) * len(bad)


def padded(event, length):
    """An event as a line of exactly so many bytes, without the newline."""
    line = msgspec.json.encode(event)
    return line[:-1] + b" " * (length - len(line)) + b"}"


@pytest.mark.parametrize("pieces", [1, 7, 4096])
@pytest.mark.parametrize("length", [MAX_LINE - 1, MAX_LINE, MAX_LINE + 1, 10 * MAX_LINE])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
async def test_an_oversized_line_costs_only_itself(door, pieces, length, newline):
    """A line may be max_line bytes; a longer one is one dead letter, and one line of the acks, in however many pieces."""
    before, large, after = batch(3)
    data = ACKS + newline.join([msgspec.json.encode(before), padded(large, length), msgspec.json.encode(after), b""])
    reader, writer = await door.connect()
    size = -(-len(data) // pieces) if pieces < 4096 else 4096
    for at in range(0, len(data), size):
        writer.write(data[at : at + size])
        await writer.drain()
        await asyncio.sleep(0.001)
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 20)
    await goodbye(writer)

    assert acked(answer)[-1] == 3
    if length <= MAX_LINE:
        assert await door.events() == ids([before, large, after])
        assert await door.dead() == []
    else:
        assert await door.events() == ids([before, after])
        [(reason, kept)] = await door.dead()
        assert f"longer than {MAX_LINE} bytes" in reason
        assert kept == padded(large, length)[:4096]


async def test_an_oversized_line_at_the_end(door):
    """Without its newline it is still one line, and one dead letter."""
    [event] = batch(1)
    answer = await door.talk(ACKS + ndjson([event]) + b"x" * 3 * MAX_LINE)

    assert acked(answer)[-1] == 2
    assert [kept for _, kept in await door.dead()] == [b"x" * 4096]


CHUNKED = [
    ACKS,
    ndjson([currents(seed=1)]),
    b"\n",
    b"nonsense\n",
    ndjson([currents(seed=2)]).replace(b"\n", b"\r\n"),
    b"y" * (MAX_LINE + 10) + b"\n",
    padded(currents(seed=3), MAX_LINE) + b"\r\n",
    ndjson([currents("users.messages.sms.Send", seed=4)]),
    b"last",
]


class Transport(asyncio.Transport):
    """What a connection does to its transport, as seen by a test that has no socket."""

    def __init__(self):
        super().__init__()
        self.said, self.closed = b"", False

    def write(self, data):
        self.said += data

    def close(self):
        self.closed = True

    abort = close

    def is_closing(self):
        return self.closed

    def pause_reading(self):
        pass

    resume_reading = pause_reading

    def set_write_buffer_limits(self, high=None, low=None):
        pass


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, sum(map(len, CHUNKED))), max_size=30))
def test_any_chunking_gives_the_same(tmp_path_factory, cuts):
    """However the bytes are cut into packets: the same events, the same dead letters, the same count."""
    data = b"".join(CHUNKED)
    edges = sorted({0, *cuts, len(data)})

    async def feed():
        # Small: the reserve of each example's spool stays on the disk until pytest ends.
        async with opened(tmp_path_factory.mktemp("chunks"), synchronous="OFF", max_bytes=40 * 2**20) as door:
            transport = Transport()
            connection = await connected(door, transport)
            for start, end in itertools.pairwise(edges):
                connection.data_received(data[start:end])
            connection.eof_received()
            await until(lambda: transport.closed)
            return await door.events(), await door.dead(), acked(transport.said)[-1]

    events, dead, lines = uvloop.run(feed())

    sms = currents("users.messages.sms.Send", seed=4)
    assert events == ids([currents(seed=1), currents(seed=2), currents(seed=3), sms])
    assert [kept for _, kept in dead] == [b"nonsense", b"y" * 4096, b"last"]
    assert lines == len(CHUNKED) - 1


async def connected(door, transport):
    """A connection whose transport is the test's."""
    connection = door.source.accept()
    connection.connection_made(transport)
    transport.close = lambda: (setattr(transport, "closed", True), connection.connection_lost(None))
    transport.abort = transport.close
    return connection


@pytest.mark.parametrize("at", range(1, len(ACKS)))
async def test_a_handshake_in_two_packets(door, at):
    """It is a line like any other to the framing."""
    reader, writer = await door.connect()
    writer.write(ACKS[:at])
    await asyncio.sleep(0.002)
    writer.write(ACKS[at:] + ndjson(batch(2)))
    writer.write_eof()

    assert acked(await asyncio.wait_for(reader.read(), 20))[-1] == 2
    await goodbye(writer)


@pytest.mark.parametrize("cut", [0, 1, 5])
async def test_blank_lines_before_the_handshake(door, cut):
    """They cost it nothing, however they come, and aren't counted: acks count the lines after it."""
    blank = b"\n \r\n\n"
    reader, writer = await door.connect()
    writer.write(blank[:cut])
    await until(lambda: sum(not connection._acks for connection in door.source.connections) == 1)
    writer.write(blank[cut:] + ACKS + ndjson(batch(2)))
    writer.write_eof()

    assert acked(await asyncio.wait_for(reader.read(), 20))[-1] == 2
    await goodbye(writer)
    assert await door.dead() == []


@pytest.mark.parametrize("acks", [True, False])
async def test_an_event_is_no_handshake(door, acks):
    """Whatever else is in it: one that is the first line and has a member called acks was taken for a handshake, and lost."""
    event = batch(1)[0]

    assert await door.talk(ndjson([event | {"acks": acks}])) == b""
    assert door.spool.accounts.total("accepted") == 1
    assert await door.dead() == []


@pytest.mark.parametrize("line", [b'{"acks":1}\n', b'{"acks":"true"}\n', ndjson(batch(1)) + ACKS])
async def test_what_is_no_handshake_is_told_so(door, line):
    """Only the first line can be one, and only with true: else it is a dead letter that says what would be one."""
    answer = await door.talk(line)

    assert answer == b""
    [(reason, _)] = await door.dead()
    assert reason.startswith("no event_type")
    assert '{"acks":true} as the first line' in reason


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("size", [500, 400_000])
async def test_http_at_this_door_is_told_so(door, kind, finished, size):
    """Its client gets an answer, and no wait without an end; nothing of it is kept, least of all its credential."""
    body = msgspec.json.encode({"events": batch(1)}) + b" " * size
    head = b"POST /v1/currents HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Length: %d\r\n\r\n"
    reader, writer = await door.connect(kind)
    writer.write(head % len(body) + body)
    if finished:
        writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 20)
    await goodbye(writer)

    first, _, said = answer.partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 421 ")
    assert b"Content-Length: %d" % len(said) in first
    assert "[sources.http] listen" in msgspec.json.decode(said)["hint"]
    await until(lambda: not door.source.connections)
    assert door.spool.accounts.total("accepted") == door.source.unfinished == 0


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_a_line_of_http_alone(door, kind):
    """Also without its newline, and behind blank ones."""
    for line in (b"GET / HTTP/1.0", b"\r\n\nGET / HTTP/1.1\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
        assert (await door.talk(line, kind)).startswith(b"HTTP/1.1 421 ")
    await until(lambda: not door.source.connections)
    assert door.spool.accounts.total("accepted") == 0


async def test_http_behind_the_first_line_is_a_dead_letter(door):
    """Whoever has begun to send events gets no answer that he couldn't read."""
    event = batch(1)
    assert acked(await door.talk(ACKS + ndjson(event) + b"GET / HTTP/1.1\r\n"))[-1] == 2
    assert await door.events() == ids(event)
    assert [line for _, line in await door.dead()] == [b"GET / HTTP/1.1"]


# -- clients that misbehave --------------------------------------------------------------------------------------------


async def choked(door, kind="tcp"):
    """A client that asked for acks and has never read one, until its connection holds them back; and its count of lines."""
    address = ("127.0.0.1", door.source.ports[0]) if kind == "tcp" else str(door.path / "s.sock")
    sock = socket.socket(socket.AF_INET if kind == "tcp" else socket.AF_UNIX)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, address)
    await until(lambda: door.source.connections)
    [connection] = door.source.connections
    transport = connection._transport
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
    transport.set_write_buffer_limits(high=1024)
    await loop.sock_sendall(sock, ACKS)
    line = ndjson(batch(1))
    sent = 0
    while not connection._choked:
        await loop.sock_sendall(sock, line)
        sent += 1
        assert sent < 50_000, "its buffer is never full"
        if sent % 10 == 0:
            await until(lambda sent=sent: connection._committed == sent)
    for _ in range(500):
        await loop.sock_sendall(sock, line)
        sent += 1
    await until(lambda: connection._committed == sent)
    return sock, connection, sent


async def read_to_the_end(sock):
    """All that the door has to say until its orderly close."""
    heard = b""
    while part := await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 65536), 20):
        heard += part
    sock.close()
    return heard


async def test_a_client_that_never_reads_its_acks(door):
    """Everything it sends is taken; its acks are replaced by later ones and don't fill our memory."""
    sock, connection, sent = await choked(door)
    assert connection._transport.get_write_buffer_size() < 4096

    # It begins to read: the last ack comes, however many were left out.
    heard = b""
    while b'{"acked":%d}\n' % sent not in heard:
        heard += await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 65536), 20)
    numbers = acked(heard)
    assert numbers == sorted(set(numbers))
    sock.close()


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_who_reads_only_at_the_end_is_told_everything(door, kind):
    """All sent, our acks not read yet, its own side closed: the last ack comes when it reads, and only then the end."""
    sock, connection, sent = await choked(door, kind)
    sock.shutdown(socket.SHUT_WR)
    await until(lambda: connection._finishing, "the end of what it sends")

    assert acked(await read_to_the_end(sock))[-1] == sent
    await until(lambda: not door.source.connections)


@pytest.mark.parametrize("finished", [True, False])
async def test_who_reads_during_the_stop_is_told_everything(door, monkeypatch, finished):
    """A stop gives a client that is late with its acks the time that it gives everybody, and the last one in it."""
    monkeypatch.setattr("bridged.sources.stream._LINGER_S", 60)
    sock, connection, sent = await choked(door)
    if finished:
        sock.shutdown(socket.SHUT_WR)
        await until(lambda: connection._finishing, "the end of what it sends")
    stopping = asyncio.ensure_future(door.source.__aexit__(None, None, None))
    await until(lambda: connection._finishing)

    assert acked(await read_to_the_end(sock))[-1] == sent
    await asyncio.wait_for(stopping, 20)


@pytest.mark.parametrize("finished", [True, False])
async def test_who_never_reads_holds_up_no_stop(door, monkeypatch, finished):
    """An ack that nobody reads is waited for as long as the client's own end, not as long as a commit."""
    monkeypatch.setattr("bridged.sources.stream._FINISH_S", 3600)
    sock, connection, _ = await choked(door)
    if finished:
        sock.shutdown(socket.SHUT_WR)
        await until(lambda: connection._finishing, "the end of what it sends")

    await asyncio.wait_for(door.source.__aexit__(None, None, None), 20)
    await until(lambda: not door.source.connections)
    sock.close()


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_who_never_reads_and_goes_is_noticed(door, kind):
    """A last ack that waits for its client keeps no connection of one that is gone."""
    sock, connection, _ = await choked(door, kind)
    sock.shutdown(socket.SHUT_WR)
    await until(lambda: connection._finishing, "the end of what it sends")
    assert door.source.connections
    sock.close()  # with acks unread: a reset

    await until(lambda: not door.source.connections, "the end of the connection")


async def test_an_abrupt_end(door):
    """A reset loses nothing that was read, and no other client notices."""
    reader, writer = await door.connect()
    writer.write(ACKS + ndjson(batch(10)) + b'{"event_type":"users.mess')
    assert acked(await asyncio.wait_for(reader.readline(), 20)) == [10]
    reset(writer)
    await until(lambda: not door.source.connections)
    assert acked(await door.talk(ACKS + ndjson(batch(1, 10))))[-1] == 1

    assert len(await door.events()) == 11
    assert await door.dead() == []
    balanced_spool(door.spool)


async def test_a_reset_before_the_commit(door):
    """Events of a client that is gone before its commit are committed; nobody is told, and nothing complains."""
    for seed in range(20):
        _, writer = await door.connect()
        writer.write(ACKS + ndjson(batch(1, seed)))
        await writer.drain()
        reset(writer)
    await until(lambda: not door.source.connections)
    await door.talk(ndjson(batch(1, 20)))
    balanced_spool(door.spool)


def balanced_spool(spool):
    """The conservation law, without a daemon."""
    assert spool.accounts.imbalance() == 0


async def test_many_connections_one_of_them_bad(door):
    """Each client has what is its own: one that sends rubbish and resets costs the others nothing."""

    async def good(n):
        events = batch(20, 100 * n)
        answer = await door.talk(ACKS + ndjson(events), "unix" if n % 2 else "tcp")
        assert acked(answer)[-1] == 20
        return ids(events)

    async def bad():
        _, writer = await door.connect()
        writer.write(os.urandom(200_000).replace(b"\n", b"") + b"\n")
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        reset(writer)

    *sent, _ = await asyncio.gather(*map(good, range(40)), bad())

    assert sorted(await door.events()) == sorted(id_ for each in sent for id_ in each)


# -- back-pressure -----------------------------------------------------------------------------------------------------


async def fill(door):
    """Brings the spool near its cap; gives the segments to settle."""
    from bridged.backlog.segment import Batch

    found = []
    door.spool.committed = found.extend
    while not door.spool.near_cap:
        noise = os.urandom(500_000).hex().encode() + b"\n"
        await door.spool.append(Intaken([Batch(noise, b"\x03")]))
    return found


async def test_near_the_cap_clients_wait_and_nothing_is_lost(tmp_path):
    """Reading pauses, what was read is held, and both go on by themselves when there is room; oversized lines included."""
    async with opened(tmp_path, max_bytes=16 * MIB) as door:
        segments = await fill(door)
        events = batch(600)
        data = ndjson(events[:300]) + b"z" * 2 * MAX_LINE + b"\n" + ndjson(events[300:])
        reader, writer = await door.connect()
        writer.write(ACKS + data)
        writer.write_eof()
        talking = asyncio.ensure_future(reader.read())
        await until(lambda: any(connection._held for connection in door.source.connections))
        before = door.spool.accounts.total("accepted")
        await asyncio.sleep(0.1)
        assert not talking.done()
        assert door.spool.accounts.total("accepted") == before
        door.spool.settle(Settlement(segments, delivered=b"\x03" * len(segments)))

        assert acked(await asyncio.wait_for(talking, 20))[-1] == 601
        await goodbye(writer)
        assert await door.events() == ids(events)
        assert [kept for _, kept in await door.dead()] == [b"z" * 4096]
        assert not door.source.waiting


async def test_a_paused_client_does_not_keep_the_daemon_from_stopping(tmp_path):
    """What waits for room at the end was never acked: the client is told, and keeps it."""
    async with opened(tmp_path, max_bytes=16 * MIB) as door:
        await fill(door)
        reader, writer = await door.connect()
        writer.write(ACKS + ndjson(batch(10)))
        await until(lambda: any(connection._held for connection in door.source.connections))
        stopping = asyncio.ensure_future(door.source.__aexit__(None, None, None))
        answer = await asyncio.wait_for(reader.read(), 4)
        await stopping
        await goodbye(writer)

    assert b"error" in answer
    assert b"acked" not in answer


async def test_a_writer_that_is_behind_pauses_the_clients(door):
    """Memory is bounded by the pause, whatever the clients send; then everything arrives."""
    import threading

    release = threading.Event()
    busy = asyncio.ensure_future(door.spool.run(lambda _db: release.wait(20)))
    count = 8
    one = ndjson(batch(100)) * 50

    async def send():
        reader, writer = await door.connect()
        writer.write(ACKS + one)
        writer.write_eof()
        answer = await asyncio.wait_for(reader.read(), 30)
        await goodbye(writer)
        return acked(answer)[-1]

    sending = [asyncio.ensure_future(send()) for _ in range(count)]
    await until(lambda: not door.spool.room.is_set(), "a pause")
    await asyncio.sleep(0.2)
    assert door.spool.pending_bytes < 24 * MIB + count * 2 * MIB
    release.set()
    await busy

    assert await asyncio.gather(*sending) == [5000] * count


async def test_a_herd_brings_no_more_than_there_is_room_for(door, monkeypatch):
    """When the writer is behind, all connections pause, not only each after one more read."""
    import threading

    from bridged.backlog import spool as spool_module

    monkeypatch.setattr(spool_module, "_MAX_PENDING_BYTES", MIB)
    release = threading.Event()
    busy = asyncio.ensure_future(door.spool.run(lambda _db: release.wait(20)))
    one, count = ndjson(batch(100)), 100

    async def send(reader, writer):
        writer.write(ACKS + one)
        writer.write_eof()
        answer = await asyncio.wait_for(reader.read(), 30)
        await goodbye(writer)
        return acked(answer)[-1]

    clients = [await door.connect() for _ in range(count)]
    await until(lambda: len(door.source.connections) == count)
    sending = [asyncio.ensure_future(send(*client)) for client in clients]
    await until(lambda: len(door.source.waiting) == count, "a pause of everybody")
    await asyncio.sleep(0.2)
    assert door.spool.pending_bytes < 1.5 * MIB
    assert door.source.unfinished == 0
    release.set()
    await busy

    assert await asyncio.gather(*sending) == [100] * count
    assert not door.source.waiting


async def test_a_spool_that_fails_tells_the_clients(door):
    """Lines after the last ack are not on disk, and it says so; who asked for no acks is cut off without a goodbye."""
    abort = "CREATE TRIGGER no BEFORE INSERT ON segments BEGIN SELECT RAISE(ABORT, 'disk I/O error'); END"
    await door.spool.run(lambda db: db.execute(abort))
    reader, writer = await door.connect()
    silent_reader, silent_writer = await door.connect()
    writer.write(ACKS + ndjson(batch(3)))
    silent_writer.write(ndjson(batch(3)))
    answer = await asyncio.wait_for(reader.read(), 20)
    with pytest.raises(ConnectionError):
        assert await asyncio.wait_for(silent_reader.read(), 20) == b"no goodbye"
    await goodbye(writer)
    await goodbye(silent_writer)

    assert b"disk I/O error" in answer
    assert b"acked" not in answer


@pytest.mark.parametrize("acks", [b"", ACKS])
@pytest.mark.parametrize("ending", [b"\n", b""])
async def test_a_mistake_of_ours_is_no_orderly_close(door, monkeypatch, ending, acks):
    """What goes wrong where nothing should is told once, in the log; and to the client that its lines aren't on disk, by an
    error where it reads acks, by a reset where it doesn't.
    """

    def broken(*_):
        raise ZeroDivisionError("made up")

    monkeypatch.setattr(door.source.intake, "accept_lines", broken)
    with capture_logs() as said:
        reader, writer = await door.connect()
        writer.write(acks + ndjson(batch(3)).removesuffix(b"\n") + ending)
        if not ending:
            writer.write_eof()
        if acks:
            assert set(msgspec.json.decode(await asyncio.wait_for(reader.read(), 20))) == {"error"}
        else:
            with pytest.raises(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 20) == b"no goodbye"
        await until(lambda: not door.source.connections)
    await goodbye(writer)
    assert [entry["event"] for entry in said] == ["stream_failed"]
    assert said[0]["exc_info"]
    assert door.source.unfinished == 0


async def test_a_mistake_of_ours_with_what_waited_for_room(tmp_path, monkeypatch):
    """The same when there is room again: a client that has finished must not take the close for a yes."""
    async with opened(tmp_path, max_bytes=16 * MIB) as door:
        segments = await fill(door)
        reader, writer = await door.connect()
        writer.write(ndjson(batch(10)))
        writer.write_eof()
        await until(lambda: any(connection._held for connection in door.source.connections))

        def broken(*_):
            raise ZeroDivisionError("made up")

        monkeypatch.setattr(door.source.intake, "accept_lines", broken)
        with capture_logs() as said:
            door.spool.settle(Settlement(segments, delivered=b"\x03" * len(segments)))
            with pytest.raises(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 20) == b"no goodbye"
            await until(lambda: not door.source.waiting)
        await goodbye(writer)
        assert [entry["event"] for entry in said] == ["stream_failed"]


# -- the listeners -----------------------------------------------------------------------------------------------------


async def test_a_stop_commits_what_was_read(daemon, emulator, config, tmp_path):
    """The end of the daemon: what was read is on disk and acked, then the connection ends."""
    app = App(config())
    async with app:
        reader, writer = await asyncio.open_connection("127.0.0.1", app.stream.ports[0])
        writer.write(ACKS + ndjson(batch(500)))
        await until(lambda: app.spool.accounts.total("accepted") > 0)
    answer = await asyncio.wait_for(reader.read(), 20)
    await goodbye(writer)

    told = acked(answer)[-1]
    async with App(config()) as again:
        assert again.spool.accounts.total("accepted") >= told
        balanced(again)


async def test_a_torn_line_at_the_stop_is_no_orderly_close(tmp_path):
    """Without acks an orderly close says that all is on disk: with half a line it would be a lie."""
    async with opened(tmp_path) as door:
        reader, writer = await door.connect()
        writer.write(ndjson(batch(2)) + b'{"event_type":"users.me')
        await until(lambda: door.spool.accounts.total("accepted") == 2)
    with pytest.raises(ConnectionError):
        assert await asyncio.wait_for(reader.read(), 20) == b"no goodbye"
    await goodbye(writer)


@pytest.mark.parametrize("acks", [b"", ACKS])
async def test_what_comes_during_the_stop_is_never_called_safe(tmp_path, acks):
    """Bytes that arrive while the last commit runs aren't taken: no ack covers them, and no orderly close says so."""
    lines = ndjson(batch(20))
    half = lines.index(b"\n", len(lines) // 2) - 40  # within a line
    async with opened(tmp_path) as door:
        reader, writer = await door.connect()
        writer.write(acks + lines[:half])
        await until(lambda: door.spool.accounts.total("accepted") > 0)
        before = door.spool.accounts.total("accepted")
        (connection,) = door.source.connections
        connection.stop()
        connection.data_received(lines[half:])
        connection.eof_received()
        if acks:
            told = globals()["acked"](await asyncio.wait_for(reader.read(), 20))
            assert told[-1] == before
        else:
            with pytest.raises(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 20) == b"no goodbye"
        assert door.spool.accounts.total("accepted") == before
        assert not await door.dead()
    await goodbye(writer)


@pytest.mark.parametrize("finished", [False, True])
async def test_without_acks_only_who_has_finished_gets_an_orderly_end_at_the_stop(tmp_path, finished):
    """Who may still be sending must not read that all is on disk: his next lines meet nobody. Who has ended his side knows."""
    async with opened(tmp_path) as door:
        reader, writer = await door.connect()
        writer.write(ndjson(batch(2)))
        await until(lambda: door.spool.accounts.total("accepted") == 2)
        if finished:
            writer.write_eof()
            await until(lambda: all(each._finishing for each in door.source.connections))
    if finished:
        assert await asyncio.wait_for(reader.read(), 20) == b""
    else:
        with pytest.raises(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 20) == b"no goodbye"
    await goodbye(writer)


def watch(door):
    """Notes of each call of the intake who sent how many lines."""
    calls, accept = [], door.source.intake.accept_lines

    def noted(lines, sender=0):
        calls.append((sender, len(lines)))
        return accept(lines, sender)

    door.source.intake.accept_lines = noted
    return calls


async def test_crumbs_keep_nobody_waiting(door):
    """A read of very short lines is taken in many turns of the loop, in order; who else sends gets his in between."""
    calls = watch(door)
    reader, writer = await door.connect()
    writer.write(ACKS + b"y\n" * 100_000 + ndjson(batch(1)))
    writer.write_eof()
    await until(lambda: calls)
    assert acked(await door.talk(ACKS + ndjson(batch(1, 1)))) == [1]
    assert acked(await asyncio.wait_for(reader.read(), 60))[-1] == 100_001
    await goodbye(writer)

    crumbs = calls[0][0]
    honest = next(at for at, (sender, _) in enumerate(calls) if sender != crumbs)
    assert honest < len(calls) - 1, "it came last"
    assert max(count for _, count in calls) <= 2048
    assert door.spool.accounts.total("dead_lettered") == 100_000
    assert door.source.unfinished == 0


@pytest.mark.parametrize("acks", [b"", ACKS])
async def test_crumbs_that_wait_at_the_stop_are_not_called_safe(door, acks):
    """What was read but had no turn yet isn't taken any more: no ack covers it, and no orderly close says so."""
    calls = watch(door)
    reader, writer = await door.connect()
    writer.write(acks + b"y\n" * 50_000)
    await until(lambda: calls)
    (connection,) = door.source.connections
    connection.stop()
    if acks:
        told = acked(await asyncio.wait_for(reader.read(), 20))[-1]
        assert told == sum(count for _, count in calls) < 50_000
    else:
        with pytest.raises(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 20) == b"no goodbye"
    await goodbye(writer)
    await until(lambda: not door.source.connections)
    assert door.source.unfinished == 0


async def test_a_socket_that_somebody_listens_at_is_left_alone(door, tmp_path):
    """A second daemon with the same path is refused, and takes nothing away from the first."""
    second = StreamSource(StreamOptions(listen=(f"unix:{tmp_path}/s.sock",)), door.source.intake, door.spool)
    with pytest.raises(ListenError, match="somebody listens"):
        await second.__aenter__()

    assert acked(await door.talk(ACKS + ndjson(batch(1)), "unix")) == [1]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("file", "a file.*remove what is there"),
        ("folder", "a folder.*remove what is there"),
        ("link", "a symbolic link to nothing.*remove what is there"),
        ("x" * 200, "107 bytes.*shorter"),
    ],
    ids=["file", "folder", "link", "long"],
)
async def test_a_path_where_no_socket_can_be(door, tmp_path, name, said):
    """It is told what is in the way; and that stays as it is."""
    (tmp_path / "file").write_text("a letter")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    options = StreamOptions(listen=(f"unix:{tmp_path}/{name}",))
    with pytest.raises(ListenError, match=f"(?s){said}"):
        await StreamSource(options, door.source.intake, door.spool).__aenter__()
    assert (tmp_path / "file").read_text() == "a letter"


async def test_a_stale_socket_file_is_replaced(tmp_path):
    """What a killed daemon left behind doesn't keep the next from starting; an orderly end leaves nothing."""
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "s.sock"))
    stale.close()
    assert (tmp_path / "s.sock").exists()
    async with opened(tmp_path) as door:
        assert (tmp_path / "s.sock").stat().st_mode & 0o777 == 0o660
        assert acked(await door.talk(ACKS + ndjson(batch(1)), "unix")) == [1]
    assert not (tmp_path / "s.sock").exists()


async def test_a_socket_that_somebody_removes_is_made_anew(door, tmp_path):
    """With its rights, and told; who is connected stays so; nothing of it is left at the end."""
    path = tmp_path / "s.sock"
    path.chmod(0o666)
    reader, writer = await door.connect("unix")
    writer.write(ACKS + ndjson(batch(1)))
    assert acked(await reader.readline()) == [1]
    told = []
    door.source.unix.happened = lambda kind, text, severity: told.append((kind, text, severity))
    for _ in range(2):
        await asyncio.sleep(1.2)  # it is seen as it is
        path.unlink()
        await until(path.exists, "another one")
        await until(lambda: told, "the word")
        assert path.stat().st_mode & 0o777 == 0o666
        assert acked(await door.talk(ACKS + ndjson(batch(1)), "unix")) == [1]
        [(kind, text, severity)] = told
        assert (kind, severity, str(path) in text) == ("door", "warning", True)
        told.clear()
    writer.write(ndjson(batch(1)))
    assert acked(await reader.readline()) == [2]
    await goodbye(writer)

    await door.source.__aexit__(None, None, None)
    assert not path.exists()


async def test_a_socket_that_can_not_be_made_anew(door, tmp_path):
    """While something else is in its place, or its folder is away, it is told why; that is left alone, and what is ours
    comes back as soon as there is room for it.
    """
    path, sockets = tmp_path / "s.sock", door.source.unix
    path.unlink()
    with socket.socket(socket.AF_UNIX) as another:
        another.bind(str(path))
        another.listen()
        await until(lambda: sockets.lost, "the loss")
        assert "somebody listens" in sockets.lost[str(path)]
        another.setblocking(False)
        await asyncio.sleep(1.2)
        another.accept()[0].close()  # whether somebody is there was asked once
        with pytest.raises(BlockingIOError):
            another.accept()
    path.unlink()
    path.write_text("a letter")
    await until(lambda: "a file" in sockets.lost.get(str(path), ""), "the other loss")
    path.unlink()
    await until(lambda: not sockets.lost, "the way back")
    assert acked(await door.talk(ACKS + ndjson(batch(1)), "unix")) == [1]


async def test_a_socket_that_was_moved_away_and_comes_back(door, tmp_path):
    """The new one takes its place only while it is away; the old one is nobody's then."""
    path = tmp_path / "s.sock"
    path.rename(tmp_path / "away")
    await until(path.exists, "another one")
    assert acked(await door.talk(ACKS + ndjson(batch(1)), "unix")) == [1]
    assert not door.source.unix.lost


@pytest.mark.parametrize("second", ["tcp:127.0.0.1:{port}", "unix:/nowhere/at/all.sock"])
async def test_an_address_that_cannot_be_had(door, second):
    """The error names it, and the addresses before it are let go."""
    first = free_port()
    listen = (f"tcp:127.0.0.1:{first}", second.format(port=door.source.ports[0]))
    source = StreamSource(StreamOptions(listen=listen), door.source.intake, door.spool)
    with pytest.raises(ListenError, match=r"sources\.stream\.listen"):
        await source.__aenter__()
    await until(lambda: is_free(first))


def is_free(port):
    """Whether nobody listens."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
