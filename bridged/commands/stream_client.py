"""A client of the stream door that keeps a line until its ack has come: plain sockets, one thread, a bounded window.

When the connection is lost what wasn't acked is sent again on the next one; the daemon may have some of it on disk, so that
much can be there twice, and Mixpanel recognises it by its `$insert_id`.
"""

import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from bridged.errors import UpstreamError

WINDOW_LINES: Final = 10_000
WINDOW_BYTES: Final = 4 * 2**20
_PIECE_BYTES: Final = 2**16
_STEP_S: Final = 1.0


class _Lost(Exception):
    """The connection is of no use any more."""


class StreamClient:
    """Sends lines, counts acks. Owns the connection and the lines without an ack."""

    def __init__(
        self,
        connect: Callable[[], socket.socket],
        acked: Callable[[int], None],
        look: Callable[[], None],
        patience_s: float = 60.0,
    ) -> None:
        """`connect` raises OSError. `acked` hears of lines that are on disk, in the order they were sent. `look` is called
        about once a second. A lost connection is made again for `patience_s`; the first one isn't.
        """
        self._connect = connect
        self._acked = acked
        self._look = look
        self._patience_s = patience_s
        self._unacked: deque[bytes] = deque()
        self._unacked_bytes = 0
        self._told = 0  # lines of this connection that were acked
        self._ever_acked = False
        self._out = bytearray()  # not handed to the kernel yet
        self._in = bytearray()  # the beginning of an answer
        self._sock: socket.socket | None = None
        self._give_up_at: float | None = None  # monotonic; None: all is well
        try:
            self._open()
        except OSError as error:
            raise UpstreamError(
                f"nobody takes events at the stream door: {error}",
                "is the daemon running? give both the same --config, or --to ADDRESS",
            ) from error

    @property
    def unacked(self) -> int:
        """Lines that were sent, or are about to be, and have no ack."""
        return len(self._unacked)

    def send(self, lines: Sequence[bytes]) -> None:
        """Sends whole lines; comes back when they are on their way and the window has room again.

        Raises UpstreamError when the daemon is gone for too long.
        """
        self._unacked.extend(lines)
        self._unacked_bytes += sum(map(len, lines))
        self._out += b"".join(lines)
        while self._out or len(self._unacked) > WINDOW_LINES or self._unacked_bytes > WINDOW_BYTES:
            self._step(_STEP_S)

    def pause_until(self, then: float) -> None:
        """Sends nothing new until `then`, monotonic seconds, but listens."""
        while (left := then - time.monotonic()) > 0:
            self._step(min(left, _STEP_S))

    def drain(self, within_s: float | None = None) -> bool:
        """Waits for the acks of all that was sent, for so long or for ever; whether they have come."""
        until = None if within_s is None else time.monotonic() + within_s
        while self._unacked and (until is None or time.monotonic() < until):
            self._step(_STEP_S if until is None else 0.1)
        return not self._unacked

    def close(self) -> None:
        """Ends the connection."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _open(self) -> socket.socket:
        sock = self._connect()
        sock.setblocking(False)
        self._sock = sock
        self._told = 0
        self._in.clear()
        self._out = bytearray(b'{"acks":true}\n')
        for line in self._unacked:
            self._out += line
        return sock

    def _step(self, timeout_s: float) -> None:
        """Sends and receives what can be now, or waits for it a little."""
        self._look()
        try:
            sock = self._sock or self._open()
            readable, writable, _ = select.select([sock], [sock] if self._out else [], [], timeout_s)
            # In this order: what the daemon has to say may be why it takes no more.
            if readable:
                self._receive(sock)
            if writable:
                with memoryview(self._out) as out:
                    sent = _unless_it_must_wait(lambda: sock.send(out[:_PIECE_BYTES]), 0)
                del self._out[:sent]
        except (OSError, _Lost) as error:
            self._lose(error)

    def _receive(self, sock: socket.socket) -> None:
        # Until nothing is left: what TLS has read already select doesn't see.
        while (data := _unless_it_must_wait(lambda: sock.recv(_PIECE_BYTES), None)) is not None:
            if not data:
                raise _Lost("the daemon has closed the connection")
            self._in += data
            *answers, rest = self._in.split(b"\n")
            self._in = rest
            for answer in answers:
                self._hear(bytes(answer))
            if not isinstance(sock, ssl.SSLSocket):
                return

    def _hear(self, answer: bytes) -> None:
        try:
            said = msgspec.json.decode(answer, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            what = f"what answers isn't bridged's stream door: {answer[:100]!r}"
            if self._ever_acked:
                raise _Lost(what) from error
            hint = "it is the address of [sources.stream] listen that is wanted"
            raise UpstreamError(f"no events were taken: {what}", hint) from error
        if "error" in said:
            raise _Lost(str(said["error"]))
        fresh = int(said.get("acked", 0)) - self._told
        if not 0 <= fresh <= len(self._unacked):
            raise _Lost(f"it acks lines that it wasn't sent: {answer[:100]!r}")
        self._told += fresh
        for _ in range(fresh):
            self._unacked_bytes -= len(self._unacked.popleft())
        if fresh:
            self._give_up_at = None
            self._ever_acked = True
            self._acked(fresh)

    def _lose(self, error: Exception) -> None:
        self.close()
        now = time.monotonic()
        if self._give_up_at is None:
            self._give_up_at = now + self._patience_s
        if now >= self._give_up_at:
            raise UpstreamError(
                f"the daemon takes no more events: {error}", "see `bridged status`; then run the same command again"
            ) from error
        time.sleep(0.2)


def _unless_it_must_wait(call: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return call()
    except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return otherwise
