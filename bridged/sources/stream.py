"""The stream door: NDJSON over TCP and Unix sockets, one Currents event a line.

A client that sends `{"acks":true}` as its first line is told `{"acked":N}`: so many of its lines, counted from the one after
the handshake, are on disk. Acks are cumulative and coalesced; one that the client doesn't read is replaced by the next,
so it never grows our memory. `{"error":"..."}` means that the lines after the last ack are not on disk; the connection
ends then. Who sends no handshake learns the same, over TCP, from an orderly close: it comes when everything sent is on disk;
else the connection is reset.

A connection reads on only while the spool has room; otherwise TCP makes the client wait.
"""

import asyncio
import contextlib
import io
import os
import socket
import struct
from collections.abc import Callable
from functools import partial
from typing import Self

import msgspec
import structlog
from msgspec import Struct

from bridged.backlog.spool import Spool
from bridged.errors import ListenError, SpoolError, SpoolFull
from bridged.intake import Intake

log = structlog.get_logger()

_KEPT_OF_OVERSIZED = 4096
# At the end: so long we wait for commits and acks, and for clients that were told the end to close their side.
_FINISH_S = 5.0
_LINGER_S = 0.5


class StreamOptions(Struct, frozen=True, kw_only=True):
    """Where (`tcp:host:port`, `unix:path`), and how long a line may be."""

    listen: tuple[str, ...] = ()
    max_line: int = 2**20


class _Handshake(Struct):
    acks: bool


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
        self.connections: set[_Connection] = set()
        self.accepted_connections = 0
        self.ports: list[int] = []  # of the TCP listeners, in order
        self.max_line = options.max_line
        self.intake = intake
        self.spool = spool
        self.tasks: set[asyncio.Task[None]] = set()
        self._options = options
        self._handed_over = handed_over
        self._servers: list[asyncio.Server] = []
        self._own: dict[str, int] = {}  # path of a Unix socket that we made: its inode

    async def __aenter__(self) -> Self:
        for address in self._options.listen:
            try:
                if sockets := self._handed_over(address):
                    for sock in sockets:
                        self._servers.append(await self._listen_at(sock))
                else:
                    self._servers.append(await self._listen(address))
            except OSError as error:
                for server in self._servers:
                    server.close()
                raise ListenError(
                    f"can't listen on {address} of sources.stream.listen: {error}",
                    "is another bridged running? choose another address",
                ) from error
        return self

    async def _listen(self, address: str) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        kind, _, rest = address.partition(":")
        if kind == "unix":
            _demand_nobody_listens(rest)
            server = await loop.create_unix_server(partial(_Connection, self), rest, backlog=1024)
            os.chmod(rest, 0o660)  # noqa: PTH101  # at start-up, before anybody is served
            self._own[rest] = os.stat(rest).st_ino  # noqa: PTH116
        else:
            host, _, port = rest.rpartition(":")
            server = await loop.create_server(partial(_Connection, self), host.strip("[]"), int(port), backlog=1024)
            self.ports.append(server.sockets[0].getsockname()[1])
        return server

    async def _listen_at(self, sock: socket.socket) -> asyncio.Server:
        loop, protocol = asyncio.get_running_loop(), partial(_Connection, self)
        if sock.family == socket.AF_UNIX:
            # Its file belongs to whoever made it. (uvloop has the option in every Python, typeshed since 3.13.)
            return await loop.create_unix_server(protocol, sock=sock, backlog=1024, cleanup_socket=False)  # type: ignore[call-arg]
        self.ports.append(sock.getsockname()[1])
        return await loop.create_server(protocol, sock=sock, backlog=1024)

    async def __aexit__(self, *_exc: object) -> None:
        """Stops accepting, commits what was read, sends the last acks, closes."""
        for server in self._servers:
            server.close()
        for address in self._options.listen:
            if address.startswith("unix:"):
                _remove(address.removeprefix("unix:"), self._own)
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
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


def _demand_nobody_listens(path: str) -> None:
    """A socket that somebody answers at is another daemon's; one that nobody does is what a crash left behind."""
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(ConnectionRefusedError, FileNotFoundError):
        probe.settimeout(1)
        probe.connect(path)
        raise FileExistsError(f"somebody listens at {path}")


def _remove(path: str, own: dict[str, int]) -> None:
    with contextlib.suppress(OSError):
        if os.stat(path).st_ino == own.get(path):  # noqa: PTH116
            os.unlink(path)  # noqa: PTH108


class _Connection(asyncio.Protocol):
    """One client. Owns its framing, its count of lines and its acks."""

    def __init__(self, source: StreamSource) -> None:
        self._source = source
        self._transport: asyncio.Transport
        self._tail = b""  # the beginning of a line whose end hasn't come
        self._oversized = b""  # the beginning of a line too long to keep; its end is being skipped
        self._held: list[tuple[list[bytes], bool]] = []  # calls of _accept that wait for room in the spool
        self._paused = False  # a task waits for room, and reads on then
        self._lines = 0  # handed to the intake
        self._committed = 0  # on disk
        self._told = 0  # acked to the client
        self._pending = 0  # calls of the intake whose future isn't done
        self._acks: bool | None = None  # None: the first line hasn't come
        self._ack_scheduled = False
        self._choked = False  # the client doesn't read its acks
        self._finishing = False  # no more lines are taken: close when everything is on disk
        self._dropped = False  # something came when no more was taken
        self._stopped = False  # it is we who end it
        self.told_the_end = False  # the last ack and the end of our side are written

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream server makes nothing else
        self._source.connections.add(self)
        self._source.accepted_connections += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self._source.connections.discard(self)

    # -- framing ------------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._finishing:
            # Read already, but never to be taken: the end must not look as if it were on disk.
            self._dropped = True
            return
        # The fastest way to find the lines; a split would copy as much, and a count alone costs more.
        lines = io.BytesIO(data).readlines()
        lines[0] = self._tail + lines[0]
        self._tail = b"" if lines[-1].endswith(b"\n") else lines.pop()
        if lines:
            self._take(lines)
        if len(self._tail) > self._source.max_line + 1:  # the one may be the \r of a line that isn't too long
            self._oversized = self._oversized or self._tail[:_KEPT_OF_OVERSIZED]
            self._tail = b""

    def eof_received(self) -> bool:
        """A last line may lack its newline. Keeps our side open until everything is on disk."""
        if (self._tail or self._oversized) and not self._finishing:
            line, self._tail = self._tail, b""
            self._take([line])
        self.finish()
        return True

    def _take(self, lines: list[bytes]) -> None:
        """Hands on whole lines, in order. The first may be the handshake, or the end of an oversized one."""
        if self._oversized:
            head, self._oversized = self._oversized, b""
            del lines[0]
            self._accept([head], oversized=True)
        if self._acks is None and lines:
            self._acks = self._handshake(lines)
        if len(lines) and max(map(len, lines)) > self._source.max_line:
            for line in lines:
                if len(line.removesuffix(b"\n").removesuffix(b"\r")) > self._source.max_line:
                    self._accept([line[:_KEPT_OF_OVERSIZED]], oversized=True)
                else:
                    self._accept([line])
        elif lines:
            self._accept(lines)

    def _handshake(self, lines: list[bytes]) -> bool:
        try:
            acks = msgspec.json.decode(lines[0], type=_Handshake).acks
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return False
        del lines[0]
        return acks

    # -- to the intake, and back --------------------------------------------------------------------------------------

    def _accept(self, lines: list[bytes], *, oversized: bool = False) -> None:
        """Hands on some lines, or the beginning of an oversized one; holds them, in order, while there is no room."""
        if self._held:
            self._held.append((lines, oversized))
            return
        if self._transport.is_closing():
            return
        intake, limit = self._source.intake, self._source.max_line
        try:
            future = intake.accept_oversized(lines[0], limit) if oversized else intake.accept_lines(lines)
        except SpoolFull:
            self._held.append((lines, oversized))
            self._pause()
            return
        except SpoolError as error:
            self._fail(error)
            return
        self._lines += len(lines)
        self._follow(future)

    def _follow(self, future: "asyncio.Future[None]") -> None:
        self._pending += 1
        future.add_done_callback(partial(self._on_disk, self._lines))
        if not self._source.spool.room.is_set():
            self._pause()

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
            if (self._tail or self._oversized or self._dropped) and not self._acks:
                self._cut_off()
            elif self._stopped and self._acks and not self.told_the_end and self._transport.can_write_eof():
                # Closing now, with something unread, would be a reset, and could take the last ack with it. (TLS has its own.)
                self.told_the_end = True
                self._transport.write_eof()
                self._transport.resume_reading()
            else:
                self._transport.close()

    def _fail(self, error: BaseException | None) -> None:
        """Lines after the last ack are not on disk: says so and ends."""
        if self._transport.is_closing():
            return
        self._finishing = True
        self._held = []
        if self._acks and not self._choked:
            message = str(error.args[0]) if error is not None and error.args else "stopped"
            self._transport.write(msgspec.json.encode({"error": message}) + b"\n")
            self._transport.close()
        else:
            self._cut_off()

    def _cut_off(self) -> None:
        """Resets the connection: an orderly close would say that everything is on disk. (Unix sockets know no reset.)"""
        sock = self._transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    # -- back-pressure ------------------------------------------------------------------------------------------------

    def _pause(self) -> None:
        if self._paused:
            return
        self._paused = True
        self._transport.pause_reading()
        task = asyncio.get_running_loop().create_task(self._resume_with_room(), name="paused stream")
        self._source.tasks.add(task)
        task.add_done_callback(self._source.tasks.discard)

    async def _resume_with_room(self) -> None:
        room = self._source.spool.room
        while not self._transport.is_closing():
            if not room.is_set():
                # All who wait are woken at once, and the first may take all the room there is: look again.
                await room.wait()
                continue
            held, self._held = self._held, []
            for lines, oversized in held:
                self._accept(lines, oversized=oversized)
            if not self._held and room.is_set():
                break
        self._paused = False
        if not self._finishing and not self._transport.is_closing():
            self._transport.resume_reading()

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
        if self._held:
            self._fail(SpoolError("the daemon stops"))
        elif not self._transport.is_closing():
            # What isn't read stays in the kernel, which resets the connection at its close: the client knows. One that
            # reads acks knows already, and gets an orderly end.
            self._stopped = not self._finishing
            self._transport.pause_reading()
            self.finish()

    def abort(self) -> None:
        """Closes at once."""
        self._transport.abort()
