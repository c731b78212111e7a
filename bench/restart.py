"""What a restart costs the senders: a service manager that holds the doors' sockets restarts the daemon under load.

    python -m bench restart --restarts 100

The manager is this process: it opens the sockets, hands them over as systemd does, listens at NOTIFY_SOCKET and checks what it is
told. Three kinds of senders keep a ledger of what was acked: one connection a request, one connection for many requests,
and the stream with acks. None of them may be refused or cut off without an answer, and nothing acked may be lost.
"""

import argparse
import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import msgspec
from msgspec import Struct

from bench.processes import PROJECT, BenchError, folder
from bridged.currents.examples import example_event
from bridged.currents.table import EVENT_TYPES
from bridged.emulator.mixpanel import EmulatorConfig, MixpanelEmulator

# Execs the daemon with the sockets from file descriptor 3 on, and with its own process id, as a manager's child does.
_HAND_OVER: Final = """
import fcntl, os, sys
fds = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in sys.argv[1].split(",")]
for at, fd in enumerate(fds): os.dup2(fd, 3 + at)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)))
os.execv(sys.executable, [sys.executable, "-m", "bridged", "run", *sys.argv[2:]])
"""
_PATIENCE_S: Final = 60.0
_OPEN = next(row for row in EVENT_TYPES if row.event_type == "users.messages.email.Open")


class Manager:
    """What systemd is to a daemon: its sockets, its NOTIFY_SOCKET, its watchdog. Give its folder a short path."""

    def __init__(self, folder: Path, mixpanel_url: str, *, watchdog_s: float = 60.0, **settings: str) -> None:
        self.folder = folder
        self.sockets = {
            "http": socket.create_server(("127.0.0.1", 0), backlog=1024),
            "stream": socket.create_server(("127.0.0.1", 0), backlog=1024),
            "admin": socket.create_server(("127.0.0.1", 0)),
            "unix": _unix_server(folder / "doors.sock"),
        }
        self.ports = {name: sock.getsockname()[1] for name, sock in self.sockets.items() if name != "unix"}
        self.watchdog_s = watchdog_s
        self.told: list[tuple[float, str]] = []  # (monotonic, message): all of this start
        self.process: asyncio.subprocess.Process
        self.settings = {
            "mixpanel__url": mixpanel_url,
            "mixpanel__token": "example-token",
            "spool__path": str(folder / "spool.db"),
            "sources__http__listen": f"127.0.0.1:{self.ports['http']}",
            "sources__stream__listen": f'["tcp:127.0.0.1:{self.ports["stream"]}", "unix:{folder}/doors.sock"]',
            "admin__listen": f"127.0.0.1:{self.ports['admin']}",
            "delivery__flush_interval": "20ms",
            "delivery__grace": "1s",
            "log__format": "json",
        } | settings

    async def __aenter__(self) -> Self:
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(self.folder / "notify"))
        self._notify.setblocking(False)
        asyncio.get_running_loop().add_reader(self._notify, self._hear)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        if hasattr(self, "process") and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        asyncio.get_running_loop().remove_reader(self._notify)
        self._notify.close()
        for sock in self.sockets.values():
            sock.close()

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                self.told.append((time.monotonic(), self._notify.recv(65536).decode()))

    async def start(self, *, handed_over: bool = True) -> None:
        """Starts the daemon. Not handed over: it opens its doors itself, and closes them; then they stay its own."""
        self.told.clear()
        if not handed_over:
            for sock in self.sockets.values():
                sock.close()
        variables = {f"BRIDGED__{key.upper()}": value for key, value in self.settings.items()}
        fds = [sock.fileno() for sock in self.sockets.values()] if handed_over else []
        arguments = ["-c", _HAND_OVER, ",".join(map(str, fds))] if handed_over else ["-m", "bridged", "run"]
        with (self.folder / "log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, *arguments),
                cwd=self.folder,
                env={
                    "PATH": os.environ["PATH"],
                    "PYTHONPATH": str(PROJECT),
                    "NOTIFY_SOCKET": str(self.folder / "notify"),
                    "WATCHDOG_USEC": str(round(self.watchdog_s * 1e6)),
                    **variables,
                },
                pass_fds=fds,
                stdout=log,
                stderr=log,
            )

    async def hears(self, assignment: str) -> None:
        """Returns when the daemon has said so since its start. Raises BenchError when it ended before, or doesn't."""
        deadline = time.monotonic() + _PATIENCE_S
        while not self.has_heard(assignment):
            if self.process.returncode is not None or time.monotonic() > deadline:
                raise BenchError(f"no {assignment} (exit code {self.process.returncode}):\n{self.log()[-2000:]}")
            await asyncio.sleep(0.005)

    def has_heard(self, assignment: str) -> bool:
        """Whether the daemon has said so since its start."""
        return any(assignment in message.split("\n") for _, message in self.told)

    def beats(self) -> list[float]:
        """When each heartbeat of this start came, monotonic."""
        self._hear()
        return [at for at, message in self.told if "WATCHDOG=1" in message.split("\n")]

    async def misses_a_beat(self) -> float:
        """Returns when the watchdog's time has passed in silence, with the moment of the last beat: now systemd would kill."""
        deadline = time.monotonic() + _PATIENCE_S
        while not (beats := self.beats()) or time.monotonic() - beats[-1] < self.watchdog_s:
            if time.monotonic() > deadline:
                raise BenchError(f"the daemon's heart still beats: {len(beats)} times so far")
            await asyncio.sleep(0.02)
        return beats[-1]

    def log(self) -> str:
        """What the daemon logged, in all its starts."""
        return (self.folder / "log").read_text(errors="replace")

    async def stop(self) -> float:
        """SIGTERM; the seconds that it took. Raises BenchError unless the daemon says STOPPING=1 and ends with 0."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        code = await asyncio.wait_for(self.process.wait(), _PATIENCE_S)
        self._hear()
        if code != 0 or not self.has_heard("STOPPING=1"):
            raise BenchError(
                f"exit code {code}, and it said {[message for _, message in self.told]}:\n{self.log()[-2000:]}"
            )
        return time.monotonic() - began


def _unix_server(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(str(path))
    except OSError as error:
        sock.close()
        raise BenchError(
            f"no Unix socket can be made at {path}: {error}; run it in a folder with a short path"
        ) from error
    sock.listen(1024)
    return sock


class Ledger:
    """What the senders saw, outside of everything that is restarted."""

    def __init__(self) -> None:
        self.acked: set[str] = set()
        self.trouble: Counter[str] = Counter()  # what must not happen
        self.ends = 0  # connections that the daemon ended in good order
        self.longest_s = 0.0  # from a request to its answer, the connecting included
        self.stopped = False
        event = example_event(_OPEN, random.Random(1), int(time.time()) - 60)
        event["user"]["external_user_id"] = "ada"
        self._event = event
        self._count = 0

    def events(self, count: int) -> list[dict[str, Any]]:
        """New ones."""
        first, self._count = self._count, self._count + count
        return [
            self._event | {"id": f"{number:08x}-0000-4000-8000-000000000000"} for number in range(first, first + count)
        ]

    async def connect(self, open_: Callable[[], Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """A connection; a refusal is the trouble that this is all about."""
        try:
            return await open_()  # type: ignore[no-any-return]  # one of asyncio's two
        except OSError as error:
            self.trouble[f"connecting: {type(error).__name__}"] += 1
            await asyncio.sleep(0.05)
            return None

    async def post(self, port: int, *, keep_alive: bool) -> None:
        """Requests, one after the other; each batch until it is acked."""
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        name = "keep-alive" if keep_alive else "a connection a request"
        while not self.stopped:
            batch = self.events(10)
            body = msgspec.json.encode({"events": batch})
            head = f"POST /v1/currents HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            request = head.encode() + (b"\r\n" if keep_alive else b"Connection: close\r\n\r\n") + body
            began = time.monotonic()
            answered = False
            while not answered:
                connection = connection or await self.connect(lambda: asyncio.open_connection("127.0.0.1", port))
                if connection is None:
                    continue
                reader, writer = connection
                try:
                    writer.write(request)
                    answer = await reader.readuntil(b"\r\n\r\n")
                    length = int(answer.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
                    await reader.readexactly(length)
                except (OSError, asyncio.IncompleteReadError) as error:
                    self.trouble[f"{name}: no answer, {type(error).__name__}"] += 1
                    answer = b""
                answered = answer.startswith(b"HTTP/1.1 200 ")
                if answer and not answered:
                    self.trouble[f"{name}: {answer.decode().splitlines()[0]}"] += 1
                if not answer or not keep_alive or b"connection: close" in answer.lower():
                    self.ends += keep_alive
                    await _closed(writer)
                    connection = None
            self.acked.update(event["id"] for event in batch)
            self.longest_s = max(self.longest_s, time.monotonic() - began)
            await asyncio.sleep(0.002)
        if connection is not None:
            await _closed(connection[1])

    async def stream(self, name: str, open_: Callable[[], Any]) -> None:
        """Lines without a pause; what has no ack when the connection ends is sent again."""
        waiting: list[dict[str, Any]] = []
        while not self.stopped or waiting:
            connection = await self.connect(open_)
            if connection is None:
                continue
            reader, writer = connection
            writer.write(b'{"acks":true}\n' + _lines(waiting))
            sending = asyncio.ensure_future(self._send(writer, waiting))
            told = 0
            try:
                while line := await reader.readline():
                    ack = msgspec.json.decode(line)
                    if "acked" not in ack:
                        self.trouble[f"{name}: {ack}"] += 1
                        continue
                    self.acked.update(event["id"] for event in waiting[: ack["acked"] - told])
                    del waiting[: ack["acked"] - told]
                    told = ack["acked"]
                self.ends += not self.stopped
            except BrokenPipeError:
                # Our write met the orderly end; a reset is another error.
                self.ends += not self.stopped
            except OSError as error:
                self.trouble[f"{name}: {type(error).__name__}"] += 1
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await sending
            await _closed(writer)

    async def _send(self, writer: asyncio.StreamWriter, waiting: list[dict[str, Any]]) -> None:
        while not self.stopped:
            batch = self.events(10)
            waiting += batch
            writer.write(_lines(batch))
            await writer.drain()
            await asyncio.sleep(0.002)
        writer.write_eof()


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def _lines(events: list[dict[str, Any]]) -> bytes:
    return b"".join(msgspec.json.encode(event) + b"\n" for event in events)


@contextlib.asynccontextmanager
async def load(manager: Manager, ledger: Ledger) -> AsyncIterator[None]:
    """All kinds of senders; at the end they finish what they have begun."""
    ports = manager.ports
    clients = [
        ledger.post(ports["http"], keep_alive=False),
        ledger.post(ports["http"], keep_alive=True),
        ledger.post(ports["http"], keep_alive=True),
        ledger.stream("stream", lambda: asyncio.open_connection("127.0.0.1", ports["stream"])),
        ledger.stream("unix", lambda: asyncio.open_unix_connection(str(manager.folder / "doors.sock"))),
    ]
    tasks = [asyncio.ensure_future(client) for client in clients]
    try:
        yield
        ledger.stopped = True
        await asyncio.wait_for(asyncio.gather(*tasks), _PATIENCE_S)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Figures(Struct):
    """What came of it."""

    restarts: int
    seconds: float
    acked: int  # events
    lost: int
    trouble: dict[str, int]  # refused, cut off or unanswered, by kind
    ended: int  # connections that were ended in good order
    longest_stop_s: float
    longest_answer_s: float


async def measure(
    where: Path, restarts: int, report: Callable[[str], None] = lambda _line: None, *, handed_over: bool = True
) -> Figures:
    """Restarts under load; drains; compares the ledger with what Mixpanel has."""
    began = time.monotonic()
    ledger, longest_stop_s = Ledger(), 0.0
    async with MixpanelEmulator(EmulatorConfig(port=0)) as mixpanel, Manager(where, mixpanel.url) as manager:
        await manager.start(handed_over=handed_over)
        await manager.hears("READY=1")
        async with load(manager, ledger):
            for number in range(restarts):
                await manager.hears("READY=1")
                await asyncio.sleep(random.uniform(0.05, 0.3))
                longest_stop_s = max(longest_stop_s, await manager.stop())
                await manager.start(handed_over=handed_over)
                if number % 10 == 9:
                    report(f"{number + 1} restarts, {len(ledger.acked)} events acked, trouble: {dict(ledger.trouble)}")
            await manager.hears("READY=1")
        deadline = time.monotonic() + _PATIENCE_S
        while lost := ledger.acked - {event["properties"]["$insert_id"] for event in mixpanel.events()}:
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(0.1)
        await manager.stop()
    return Figures(
        restarts=restarts,
        seconds=round(time.monotonic() - began, 1),
        acked=len(ledger.acked),
        lost=len(lost),
        trouble=dict(ledger.trouble),
        ended=ledger.ends,
        longest_stop_s=round(longest_stop_s, 2),
        longest_answer_s=round(ledger.longest_s, 2),
    )


def main(argv: Sequence[str]) -> int:
    """Prints the figures; exit code 1 if anybody was refused, cut off, or lost something."""
    parser = argparse.ArgumentParser(prog="python -m bench restart", description=__doc__.partition("\n")[0])
    parser.add_argument("--restarts", type=int, default=100, help="default %(default)s")
    parser.add_argument(
        "--control", action="store_true", help="the daemon opens its own doors: to show what is refused"
    )
    arguments = parser.parse_args(argv)
    with folder() as where:
        told = partial(print, file=sys.stderr, flush=True)
        figures = asyncio.run(measure(where, arguments.restarts, told, handed_over=not arguments.control))
    print(msgspec.json.format(msgspec.json.encode(figures), indent=2).decode())
    return 1 if figures.lost or figures.trouble else 0
