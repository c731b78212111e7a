"""What a service manager (systemd) and the daemon say to each other: readiness, progress, and sockets handed over.

    NOTIFY_SOCKET                        one datagram a message: READY=1, RELOADING=1, STOPPING=1, WATCHDOG=1, STATUS=...,
                                         EXTEND_TIMEOUT_USEC=...
    WATCHDOG_USEC, WATCHDOG_PID          silence for so long means that we hang, and are to be restarted
    LISTEN_FDS, LISTEN_PID               listening sockets from file descriptor 3 on, which outlive us: nobody is refused
                                         while the daemon restarts, the kernel lets them wait

The protocols are sd_notify(3) and sd_listen_fds(3): a datagram and three numbers, so there is no library in between.
"""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Final

import structlog

from bridged.errors import ConfigError

log = structlog.get_logger()

_FIRST_FD: Final = 3
# Beats in the time that the manager waits for one: a beat that comes late is no reason to be killed.
_BEATS: Final = 3
# So often a long start, or end, says that it goes on.
_STARTING_S: Final = 20.0


@contextlib.asynccontextmanager
async def told_to_stop(tell: Callable[[], None]) -> AsyncIterator[None]:
    """Within the block SIGTERM and SIGINT call `tell`, on the loop; from its end on they do nothing.

    The loop's own handlers are gone when it closes, and a signal in the interpreter's last moments, a second Ctrl-C, would
    make a death of an orderly end. To block them wouldn't help: libuv's threads take them, too.
    """
    loop, numbers = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(tell))
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)


class Notifier:
    """Tells the service manager, if there is one."""

    def __init__(self, environ: Mapping[str, str], pid: int) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        usec = environ.get("WATCHDOG_USEC", "")
        ours = environ.get("WATCHDOG_PID", str(pid)) == str(pid)
        # How long it takes silence, in seconds; 0: it doesn't listen for a heartbeat.
        self.watchdog_s = int(usec) / 1e6 if self._address and ours and usec.isdecimal() else 0.0

    def tell(self, *assignments: str) -> None:
        """Sends assignments such as `READY=1`. A manager that can't be told is no reason to stop working."""
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto("\n".join(assignments).encode(), self._address)

    async def starting(self, stop: asyncio.Event, hurry: asyncio.Event, grace_s: float) -> None:
        """Asks for more time, until it is cancelled: a start that salvages a large file is not to be ended and begun anew.

        Told to `stop` it asks for no more, and ends the process if the start isn't over after the grace, or at the `hurry`. What
        the spool's thread does can't be interrupted; and it may be killed at any moment.
        """
        while not await _is_set(stop, _STARTING_S):
            self._extend()
        log.info(
            "stop_waits_for_start",
            hint=f"the start isn't over: it is given up after {grace_s:g} s, or at a second signal",
        )
        await _is_set(hurry, grace_s)
        os._exit(0)

    async def ending(self, progress: Callable[[], int]) -> None:
        """The same for the end, as long as `progress` rises: what removed files held may be many gigabytes, to be saved."""
        before = progress()
        while True:
            await asyncio.sleep(_STARTING_S)
            if (now := progress()) == before:
                return
            self._extend()
            before = now

    def _extend(self) -> None:
        self.tell(f"EXTEND_TIMEOUT_USEC={round(3 * _STARTING_S * 1e6)}")

    def ready(self, sentence: str) -> None:
        """The doors are open, or open again with another configuration."""
        self.tell("READY=1", status_line(sentence))

    def reloading(self) -> None:
        """The configuration is read again; `ready` ends it. The clock is the one that systemd compares with (253 and later)."""
        self.tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, sentence: str) -> None:
        """The doors close; what is in flight gets its grace."""
        self.tell("STOPPING=1", status_line(sentence))

    @contextlib.asynccontextmanager
    async def heartbeat(
        self, progress: Callable[[], Awaitable[bool]], sentence: Callable[[], str]
    ) -> AsyncIterator[None]:
        """Within the block, one WATCHDOG=1 for each time that `progress` comes back and says yes.

        A blocked loop doesn't get here, and a writer that hangs doesn't come back: both are silence. An outage of
        Mixpanel is neither: a restart would not end it.
        """
        beating = asyncio.create_task(self._beat(progress, sentence), name="heartbeat")
        try:
            yield
        finally:
            beating.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await beating

    async def _beat(self, progress: Callable[[], Awaitable[bool]], sentence: Callable[[], str]) -> None:
        silent = False
        while self.watchdog_s:
            try:
                well = await progress()
                said = status_line(sentence())
            except Exception as error:
                # Silence, too: whatever it is, a start is the way out of it.
                log.error("heartbeat_failed", error=repr(error))
                return
            if well:
                self.tell("WATCHDOG=1", said)
            elif not silent:
                log.error("no_progress", hint="the service manager restarts the daemon if this lasts")
            silent = not well
            await asyncio.sleep(self.watchdog_s / _BEATS)


async def _is_set(event: asyncio.Event, seconds: float) -> bool:
    """Whether it is, within so many seconds."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


def status_line(sentence: str) -> str:
    """`STATUS=`, in one line whatever is in the sentence."""
    return f"STATUS={' '.join(sentence.split())}"


class Progress:
    """Whether the spool's writer gets on: its thread answers, and what waits for a commit doesn't wait for ever."""

    def __init__(self, hop: Callable[[], Awaitable[object]], writing: Callable[[], tuple[int, int]]) -> None:
        self._hop = hop  # through the thread, behind whatever it is busy with
        self._writing = writing  # (bytes that wait for a commit, a figure that rises with each)
        self._before = (0, 0)

    async def __call__(self) -> bool:
        """Comes back when the thread does; says whether the writer's task gives it what waits."""
        await self._hop()
        before, self._before = self._before, self._writing()
        # The same bytes wait behind the same commit, and the thread has nothing to do: the writer's task hangs.
        return not before[0] or before != self._before


class Listeners:
    """Listening sockets that were handed over, each to be taken by the key of the configuration that names its address.

    By address, not by name: a unit has one FileDescriptorName for all its sockets, and what the configuration demands of an
    address beyond loopback (a token) is true of the sockets as well. Closes what nobody takes.
    """

    def __init__(self, sockets: list[socket.socket]) -> None:
        self._sockets = sockets

    @classmethod
    def handed_over(cls, environ: Mapping[str, str], pid: int) -> "Listeners":
        """Those that the environment tells of. Raises ConfigError when they aren't there or don't listen."""
        count = environ.get("LISTEN_FDS", "0")
        if environ.get("LISTEN_PID") != str(pid) or not count.isdecimal():
            return cls([])
        sockets = []
        for fd in range(_FIRST_FD, _FIRST_FD + int(count)):
            try:
                sock = socket.socket(fileno=fd)
                listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            except OSError as error:
                raise ConfigError(f"LISTEN_FDS={count}: file descriptor {fd} is no socket: {error}") from error
            if sock.type != socket.SOCK_STREAM or not listens:
                raise ConfigError(
                    f"LISTEN_FDS={count}: the socket {_address(sock)} doesn't listen for streams",
                    "ListenStream= and Accept=no",
                )
            sock.set_inheritable(False)
            sock.setblocking(False)
            sockets.append(sock)
        return cls(sockets)

    def take(self, address: str) -> list[socket.socket]:
        """Those that listen at `host:port` or `unix:path`; the name localhost has two addresses. They are the caller's now."""
        wanted = {address.removeprefix("tcp:").replace("[", "").replace("]", "")}
        host, _, port = next(iter(wanted)).rpartition(":")
        if host == "localhost":
            wanted = {f"127.0.0.1:{port}", f"::1:{port}"}
        found = [sock for sock in self._sockets if _address(sock) in wanted]
        self._sockets = [sock for sock in self._sockets if sock not in found]
        return found

    def demand_none_left(self) -> None:
        """Raises ConfigError for a socket that no key names: whoever connects to it would wait for ever."""
        left = ", ".join(_address(sock) for sock in self._sockets)
        self.close()
        if left:
            raise ConfigError(
                f"systemd hands over sockets that no `listen` key names: {left}",
                "write the same addresses into the .socket unit and the configuration",
            )

    def close(self) -> None:
        """Closes what nobody has taken."""
        for sock in self._sockets:
            sock.close()
        self._sockets = []


def _address(sock: socket.socket) -> str:
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{name if isinstance(name, str) else name.decode(errors='replace')}"
    return f"{name[0]}:{name[1]}"
