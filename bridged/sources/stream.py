"""The stream door: NDJSON over TCP and Unix sockets, one Currents event a line.

A client that sends `{"acks":true}` as its first line is told `{"acked":N}`: so many of its lines, counted from the one after
the handshake, are on disk. Acks are cumulative and coalesced; one that the client doesn't read is replaced by the next,
so it never grows our memory. `{"error":"..."}` means that the lines after the last ack are not on disk; the connection
ends then. Who sends no handshake learns the same, over TCP, from an orderly close, which comes after his own: everything sent
is on disk; else, also if the daemon stops or is killed, the connection is reset.

A connection reads on only while the spool has room; otherwise TCP makes the client wait.

A client may be silent for hours, so nothing here is timed. What is bounded is the number of connections, and the sum of lines
without their end and of lines that wait for room: beyond it, whose have been there for longest are cut off. TLS knows no
half-closed connections: a client that speaks it waits for its last ack before it closes.
"""

import asyncio
import io
import select
import socket
import ssl
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any, Self

import msgspec
import structlog
from msgspec import Struct

from bridged.addresses import of_this_machine
from bridged.backlog.spool import Spool
from bridged.errors import ListenError, SpoolError, SpoolFull
from bridged.intake import Intake
from bridged.sources import tcp, tls
from bridged.sources.clients import Clients, Refusals
from bridged.sources.first_line import NO_HTTP, handshake, is_http
from bridged.sources.unix import Sockets

log = structlog.get_logger()

_KEPT_OF_OVERSIZED = 4096
# At the end: so long we wait for commits and acks, and for clients that were told the end to close their side.
_FINISH_S = 5.0
_LINGER_S = 0.5
_LOOK_S = 1.0
_MUCH_BYTES = 128 * 1024
# Some 130 bytes each in the largest read. Of shorter ones, which are no events, there would be too many for one turn.
_LINES_A_TURN = 2048
# Of those that waited for room: the largest reads of so many fill what was made.
_READ_ON_AT_ONCE = 48
# Who came just now isn't slow; who has sent no line for so long may be closed when others need the place.
_NEW_S = 1.0
_SPARE_S = 10.0


class StreamOptions(Struct, frozen=True, kw_only=True):
    """Where (`tcp:host:port`, `unix:path`), and how long a line may be."""

    listen: tuple[str, ...] = ()
    max_line: int = 2**20
    max_connections: int = 8000
    max_connections_per_client: int = 0  # 0: no limit
    max_unfinished: int = 8 * 2**20
    tls_cert: str = ""
    tls_key: str = ""


class StreamSource:
    """The listeners and their connections."""

    def __init__(
        self,
        options: StreamOptions,
        intake: Intake,
        spool: Spool,
        handed_over: Callable[[str], list[socket.socket]] = lambda _address: [],
    ) -> None:
        """`handed_over` gives the sockets that listen at an address already, and outlive us."""
        self.connections: dict[_Connection, None] = {}
        self.unused: dict[_Connection, None] = {}  # those that never sent a line, oldest first
        self.holding: dict[_Connection, None] = {}  # those with unfinished bytes, whose are oldest first
        self.accepted_connections = 0
        self.refused = 0  # connections, for want of room
        self._refusals = Refusals("sources.stream")
        self.unfinished = 0  # bytes of lines without their end, or that wait for room
        self.now = 0.0  # monotonic, as of the last look
        self.ports: list[int] = []  # of the TCP listeners, in order
        self.max_line = options.max_line
        self.intake = intake
        self.spool = spool
        self.waiting: dict[_Connection, None] = {}  # those that read on when the spool has room, in this order
        self._anybody_waits = asyncio.Event()
        self.clients = Clients(options.max_connections_per_client)
        self._options = options
        self._handed_over = handed_over
        self._servers: list[asyncio.Server] = []  # of TCP
        self.unix = Sockets(self.accept)

    async def __aenter__(self) -> Self:
        self._tls = tls.server_context("sources.stream", self._options.tls_cert, self._options.tls_key)
        if self._tls is not None:
            # Unread by who never reads, they would make a reset of his close, which drops what we have yet to read.
            self._tls.num_tickets = 0
        self._look_at_all()
        self._room = asyncio.get_running_loop().create_task(self._read_on_with_room(), name="paused streams")
        for address in self._options.listen:
            try:
                if sockets := self._handed_over(address):
                    for sock in sockets:
                        await self._listen_at(sock)
                else:
                    await self._listen(address)
            except OSError as error:
                self._look.cancel()
                self._room.cancel()
                await self._close_doors()
                raise ListenError(f"can't listen on {address} of sources.stream.listen", error) from error
        self._watching = asyncio.create_task(self.unix.watch(), name="sockets' files")
        return self

    async def _listen(self, address: str) -> None:
        kind, _, rest = address.partition(":")
        if kind == "unix":
            await self.unix.listen(rest)
            return
        host, _, port = rest.rpartition(":")
        await self._serve(host=await of_this_machine(host.strip("[]")), port=int(port))

    async def _listen_at(self, sock: socket.socket) -> None:
        if sock.family == socket.AF_UNIX:
            await self.unix.take(sock)
        else:
            await self._serve(sock=sock)

    async def _serve(self, **where: Any) -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(self.accept, backlog=1024, **where, **tls.options(self._tls))
        self._servers.append(server)
        self.ports.append(server.sockets[0].getsockname()[1])

    async def _close_doors(self) -> None:
        for server in self._servers:
            server.close()
        await self.unix.close()

    async def __aexit__(self, *_exc: object) -> None:
        """Stops accepting, commits what was read, sends the last acks, closes."""
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        await self._close_doors()
        for connection in list(self.connections):
            connection.stop()
        loop = asyncio.get_running_loop()
        linger_until, finish_until = loop.time() + _LINGER_S, loop.time() + _FINISH_S
        while self.connections:
            told = all(connection.told_the_end for connection in self.connections)
            if loop.time() >= (linger_until if told else finish_until):
                break
            await asyncio.sleep(0.005)
        for connection in list(self.connections):
            connection.abort()
        self._look.cancel()
        self._room.cancel()
        await asyncio.gather(self._room, return_exceptions=True)

    def renew(self, load: Callable[[ssl.SSLContext], None]) -> None:
        """Has connections to come see another certificate."""
        if self._tls is not None:
            load(self._tls)

    # -- what all connections share -----------------------------------------------------------------------------------

    def accept(self) -> "_Connection":
        """A new connection. If there is no place for it, one that never sent a line gives up its own, or it has none.

        Before the handshake of TLS: who never ends that takes a place too.
        """
        connection = _Connection(self)
        if len(self.connections) >= self._options.max_connections:
            self.refused += 1
            spare = next(iter(self.unused), None)
            if spare is None or self.now - spare.since < _SPARE_S:
                return connection
            spare.refuse("too many connections")
            self.leave(spare)
        self.connections[connection] = self.unused[connection] = None
        self.accepted_connections += 1
        return connection

    def leave(self, connection: "_Connection") -> None:
        """Its place is free."""
        self.connections.pop(connection, None)
        self.unused.pop(connection, None)
        self.waiting.pop(connection, None)

    def hold(self, size: int) -> None:
        """Counts unfinished bytes; cuts off whose have been there for longest when they are too many."""
        self.unfinished += size
        while size > 0 and self.unfinished > self._options.max_unfinished:
            chosen = next(iter(self.holding))
            if self.now - chosen.since < _NEW_S:  # nobody is slow: who holds most
                chosen = max(self.holding, key=lambda c: c.unfinished)
            chosen.refuse("too many lines without an end, or too many that wait for room")

    def wait_for_room(self, asking: "_Connection") -> None:
        """Has `asking` wait; and, if it is the writer who is behind, all who would bring him more before he has caught up.

        (While the spool is near its cap, which may last, who only listens should still be seen to leave.)
        """
        if asking not in self.waiting:
            for connection in [asking] if self.spool.near_cap else self.connections.keys() - self.waiting.keys():
                if connection.connected:
                    self.waiting[connection] = None
                    connection.stop_reading()
            self._anybody_waits.set()

    async def _read_on_with_room(self) -> None:
        """Lets them read on when there is room: in their order, and no more at once than it may be enough for."""
        room = self.spool.room
        while True:
            await self._anybody_waits.wait()
            await room.wait()
            for connection in list(islice(self.waiting, _READ_ON_AT_ONCE)):
                if room.is_set() and connection.take_held() and room.is_set():
                    self.waiting.pop(connection, None)
                    connection.read_on()
            if not self.waiting:
                self._anybody_waits.clear()
            await asyncio.sleep(0)

    def read_on_next_turn(self, connection: "_Connection") -> None:
        """Reads on from a connection when the loop has turned."""
        asyncio.get_running_loop().call_soon(connection.read_on)

    def _look_at_all(self) -> None:
        """Once a second: ends connections whose clients are gone. Those that are paused don't read, and so don't see it."""
        loop = asyncio.get_running_loop()
        self.now = loop.time()
        self._refusals.look(self.refused, self.now)
        for connection in [each for each in self.unused if self.now - each.since > 2 * tls.HANDSHAKE_S]:
            if not connection.connected:  # a handshake that came to nothing: asyncio has forgotten it
                self.leave(connection)
        poll, by_fd = select.poll(), {}
        for connection in self.connections:
            if (fd := connection.paused_fd()) >= 0:
                poll.register(fd, 0)  # errors and the end of both directions are told unasked
                by_fd[fd] = connection
        for fd, _ in poll.poll(0) if by_fd else ():
            by_fd[fd].abort()
        self._look = loop.call_later(_LOOK_S, self._look_at_all)


class _Connection(asyncio.Protocol):
    """One client. Owns its framing, its count of lines and its acks."""

    def __init__(self, source: StreamSource) -> None:
        self._source = source
        self._transport: asyncio.Transport
        self.connected = False  # and, if it speaks TLS, agreed
        self._client: str | None = None  # whose it is
        self.since = source.now  # connected, or the oldest of its unfinished bytes came
        self.unfinished = 0  # bytes
        self._tail: bytes | bytearray = b""  # the beginning of a line whose end hasn't come
        self._rest = b""  # what was read behind the lines of this turn of the loop
        self._oversized = b""  # the beginning of a line too long to keep; its end is being skipped
        self._held: list[tuple[list[bytes], bool]] = []  # calls of _accept that wait for room in the spool
        self._held_bytes = 0
        self._lines = 0  # handed to the intake
        self._committed = 0  # on disk
        self._told = 0  # acked to the client
        self._pending = 0  # calls of the intake whose future isn't done
        self._acks: bool | None = None  # None: the first line hasn't come
        self._ack_scheduled = False
        self._choked = False  # the client doesn't read its acks
        self._finishing = False  # no more lines are taken: close when everything is on disk
        self._dropped = False  # something came when no more was taken
        self._stopped = False  # it is we who end it, and its own end hasn't come
        self._is_tls = False
        self.told_the_end = False  # the last ack and the end of our side are written, or wait for it to read

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream server makes nothing else
        self.connected = True
        if self not in self._source.connections:
            self._cut_off()
            return
        self._client = self._source.clients.enter(transport)
        if self._client is None:
            self._source.refused += 1
            self._source.leave(self)
            self._cut_off()
            return
        self._is_tls = transport.get_extra_info("sslcontext") is not None
        # Acks that aren't read stay few: the next one says more.
        self._transport.set_write_buffer_limits(high=1024)
        tcp.keep_alive(transport)
        if not self._is_tls:
            # A client without acks goes by how the connection ends: it must not look orderly if we are killed.
            tcp.end_with(transport, reset=True)

    def connection_lost(self, exc: Exception | None) -> None:
        self._source.leave(self)
        self._source.clients.leave(self._client)
        self._forget()

    def paused_fd(self) -> int:
        """The file descriptor of a TCP connection that doesn't read; -1 for any other."""
        return tcp.file_number(self._transport) if self in self._source.waiting else -1

    # -- framing ------------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._frame(data)
        waits = self in self._source.waiting
        if waits or ((len(data) >= _MUCH_BYTES or self._rest) and not self._finishing):
            # libuv would read on, up to 32 times: commits, acks and everybody else would wait for as many milliseconds.
            self.stop_reading(within_read=True)
            if not waits:
                self._source.read_on_next_turn(self)

    def stop_reading(self, *, within_read: bool = False) -> None:
        """What comes stays in the kernel, and TCP makes the client wait."""
        if self._is_tls:
            tls.stop_reading(self._transport, within_read=within_read)
        else:
            self._transport.pause_reading()

    def _start_reading(self) -> None:
        if self._is_tls:
            tls.start_reading(self._transport)
        else:
            self._transport.resume_reading()

    def read_on(self) -> None:
        """Unless something else is in its way, or it has ended meanwhile. What was read already comes first."""
        if self not in self._source.waiting and not self._finishing and not self._transport.is_closing():
            if not self._rest:
                self._start_reading()
                return
            rest, self._rest = self._rest, b""
            self._frame(rest)
            self._source.read_on_next_turn(self)

    def _frame(self, data: bytes) -> None:
        """Cuts what came into lines, and takes them: no more of them than others can wait for."""
        try:
            if self._finishing:
                # Read already, but never to be taken: the end must not look as if it were on disk.
                self._dropped = True
                return
            if (self._tail or self._oversized) and b"\n" not in data:
                self._lengthen(data)
            else:
                # As fast as `readlines`; a split would copy as much, and a count alone costs more.
                pieces = io.BytesIO(data)
                lines = list(islice(pieces, _LINES_A_TURN))
                self._rest = pieces.read()
                if self._tail:
                    lines[0] = b"".join((self._tail, lines[0]))
                self._tail = b"" if lines[-1].endswith(b"\n") else lines.pop()
                if lines:
                    self._take(lines)
            if len(self._tail) > self._source.max_line + 1:  # the one may be the \r of a line that isn't too long
                self._oversized, self._tail = bytes(self._tail[:_KEPT_OF_OVERSIZED]), b""
            if self._tail or self._rest or self.unfinished:
                self._weigh()
        except Exception as error:
            self._mistaken(error)

    def _lengthen(self, data: bytes) -> None:
        """One more piece of a line: in place, since adding bytes would copy the line for each piece."""
        if self._oversized:
            return
        if not isinstance(self._tail, bytearray):
            self._tail = bytearray(self._tail)
        self._tail += data

    def _weigh(self) -> None:
        """Tells the source what is unfinished here."""
        size, before = len(self._tail) + len(self._rest) + self._held_bytes, self.unfinished
        if not size:
            self._source.holding.pop(self, None)
        elif not before:
            self.since = self._source.now
            self._source.holding[self] = None
        self.unfinished = size
        self._source.hold(size - before)

    def _forget(self) -> None:
        """Nothing of what is unfinished will be taken."""
        self._held, self._held_bytes, self._tail, self._rest = [], 0, b"", b""
        self._source.unfinished -= self.unfinished
        self.unfinished = 0
        self._source.holding.pop(self, None)

    def eof_received(self) -> bool:
        """A last line may lack its newline. Keeps our side open until everything is on disk."""
        try:
            while self._rest and not self._finishing:  # only over TLS, which tells the end while reading is paused
                rest, self._rest = self._rest, b""
                self._frame(rest)
            if (self._tail or self._oversized) and not self._finishing:
                line, self._tail = self._tail, b""
                self._take([bytes(line)])
                self._weigh()
            self._stopped = False
            self.finish()
        except Exception as error:
            self._mistaken(error)
        return not self._is_tls

    def _take(self, lines: list[bytes]) -> None:
        """Hands on whole lines, in order. The first may be the handshake, or the end of an oversized one."""
        if self._acks is None:
            self._source.unused.pop(self, None)
        if self._oversized:
            head, self._oversized = self._oversized, b""
            self._acks = self._acks or False  # if it was the first line, it was no handshake
            del lines[0]
            self._accept([head], oversized=True)
        if self._acks is None and lines:
            self._acks = handshake(lines)
            if self._acks is False and lines and is_http(lines[0]):
                self._answer_http()
                return
            if self._acks:
                tcp.end_with(self._transport, reset=False)  # it goes by its acks, and shall get the last one
        if len(lines) and max(map(len, lines)) > self._source.max_line:
            for line in lines:
                if len(line.removesuffix(b"\n").removesuffix(b"\r")) > self._source.max_line:
                    self._accept([line[:_KEPT_OF_OVERSIZED]], oversized=True)
                else:
                    self._accept([line])
        elif lines:
            self._accept(lines)

    def _answer_http(self) -> None:
        """Who speaks HTTP is told so in HTTP, and nothing of it is kept: its head may hold a credential."""
        self._forget()
        self._transport.write(NO_HTTP)
        # It goes by the answer; so that this arrives, the rest of the request is read and dropped.
        self._acks = self._stopped = True
        self.finish()

    # -- to the intake, and back --------------------------------------------------------------------------------------

    def _accept(self, lines: list[bytes], *, oversized: bool = False) -> None:
        """Hands on some lines, or the beginning of an oversized one; holds them, in order, while there is no room."""
        if self._held:
            self._hold(lines, oversized=oversized)
            return
        if self._transport.is_closing():
            return
        intake, limit = self._source.intake, self._source.max_line
        try:
            future = intake.accept_oversized(lines[0], limit) if oversized else intake.accept_lines(lines, id(self))
        except SpoolFull:
            self._hold(lines, oversized=oversized)
            self._source.wait_for_room(self)
            return
        except SpoolError as error:
            self._fail(error)
            return
        self._lines += len(lines)
        self._follow(future)

    def _hold(self, lines: list[bytes], *, oversized: bool) -> None:
        self._held.append((lines, oversized))
        self._held_bytes += sum(map(len, lines))
        self._weigh()

    def _follow(self, future: "asyncio.Future[None]") -> None:
        self._pending += 1
        future.add_done_callback(partial(self._on_disk, self._lines))
        if not self._source.spool.room.is_set():
            self._source.wait_for_room(self)

    def _on_disk(self, lines: int, future: "asyncio.Future[None]") -> None:
        self._pending -= 1
        if future.cancelled() or (error := future.exception()) is not None:
            self._fail(error if not future.cancelled() else None)
            return
        self._committed = lines
        if not self._ack_scheduled:
            # Many futures of one commit are done at once: one ack for all of them.
            self._ack_scheduled = True
            asyncio.get_running_loop().call_soon(self._ack)

    def _ack(self) -> None:
        self._ack_scheduled = False
        if self._transport.is_closing():
            return
        if self._acks and self._told < self._committed and not self._choked:
            self._told = self._committed
            self._transport.write(b'{"acked":%d}\n' % self._told)
        if self._finishing and not self._pending and not self._held:
            if self._acks and self._told < self._committed:
                self.told_the_end = True  # by `resume_writing`: it has yet to read what it was told before
            elif (self._tail or self._oversized or self._dropped or self._stopped) and not self._acks:
                # Something of it isn't on disk; or may be on its way, and an orderly end would say that it is.
                self._cut_off()
            elif self._stopped and self._acks and self._transport.can_write_eof():
                # Closing now, with something unread, would be a reset, and could take the last ack with it. (TLS has its own.)
                self.told_the_end = True
                self._transport.write_eof()
                self._transport.resume_reading()
            else:
                tcp.end_with(self._transport, reset=False)
                self._close()

    def _fail(self, error: BaseException | None) -> None:
        """Lines after the last ack are not on disk: says so and ends."""
        if self._transport.is_closing():
            return
        self._finishing = True
        self._forget()
        if self._acks and not self._choked:
            message = str(error.args[0]) if error is not None and error.args else "stopped"
            self._transport.write(msgspec.json.encode({"error": message}) + b"\n")
            self._close()
        else:
            self._cut_off()

    def _close(self) -> None:
        if self._is_tls:
            tls.start_reading(self._transport)  # the client's goodbye
        self._transport.close()

    def _mistaken(self, error: Exception) -> None:
        """A mistake of ours: left to the loop, it would be an orderly close."""
        log.error("stream_failed", exc_info=error)
        self._fail(SpoolError("internal error"))

    def _cut_off(self) -> None:
        """An orderly close would say that everything is on disk."""
        tcp.reset(self._transport)

    # -- back-pressure ------------------------------------------------------------------------------------------------

    def take_held(self) -> bool:
        """Takes what waited for room, now that there is some. Whether it was enough."""
        held, self._held, self._held_bytes = self._held, [], 0
        try:
            for lines, oversized in held:
                self._accept(lines, oversized=oversized)
        except Exception as error:
            self._mistaken(error)
        if held and not self._transport.is_closing():
            self._weigh()
        return not self._held

    def pause_writing(self) -> None:
        self._choked = True

    def resume_writing(self) -> None:
        self._choked = False
        self._ack()

    # -- the end ------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Takes no more; closes when everything taken is on disk and acked."""
        self._finishing = True
        self._ack()

    def stop(self) -> None:
        """As `finish`, but what waits for room won't get it any more: the client keeps it."""
        if not self.connected:
            self._source.leave(self)
        elif self._held:
            self._fail(SpoolError("the daemon stops"))
        elif not self._transport.is_closing():
            self._rest, self._dropped = b"", self._dropped or bool(self._rest)
            # What isn't read stays in the kernel, which resets the connection at its close: the client knows. One that
            # reads acks knows already, and gets an orderly end.
            self._stopped = not self._finishing
            self.stop_reading()
            self.finish()

    def refuse(self, why: str) -> None:
        """Ends it for the sake of the others: what isn't acked stays with the client."""
        self._forget()
        if self.connected:
            self._fail(SpoolError(why))

    def abort(self) -> None:
        """Closes at once."""
        self._transport.abort()
