"""A peer, or bridged, as a process that can be measured and killed."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.peers.catalog import Door, Peer
from bench.processes import BenchError, Child, Daemon, free_ports

_START_S = 30.0
_LISTEN = "0A"
_BLOCK = 512
_TICKS = os.sysconf("SC_CLK_TCK")


class Program(Child):
    """A peer. What it costs is summed over all processes that it started."""

    def __init__(self, peer: Peer, folder: Path, sink_port: int) -> None:
        self.port = free_ports(1)[0]
        self._door = peer.door
        (folder / "ready").unlink(missing_ok=True)
        command = peer.command(folder, self.port, sink_port)
        super().__init__("peer", command.arguments, folder, program=command.program, extra=command.environment)

    def ready(self) -> None:
        """Returns when somebody listens, or reads. No connection is made: some peers begin with their first one."""
        until = time.monotonic() + _START_S
        while not ((self.folder / "ready").exists() if self._door == "file" else _listens(self.port)):
            if self.process.poll() is not None or time.monotonic() > until:
                raise BenchError(f"{self.name} isn't ready:\n{self.last_words()}")
            time.sleep(0.02)

    def processes(self) -> list[int]:
        """It and its descendants."""
        found = [self.process.pid]
        for pid in found:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    found += map(int, children.read_text(encoding="ascii").split())
        return found


class Bridged(Daemon):
    """bridged as installed."""

    def __init__(self, folder: Path, sink_port: int, door: Door) -> None:
        super().__init__(folder, sink_port)
        self.port = self.http_port if door == "http" else self.stream_port

    def processes(self) -> list[int]:
        """Only itself."""
        return [self.process.pid]


Subject = Program | Bridged


def cpu_s(subject: Subject) -> float:
    """Processor time of all its processes and threads so far."""
    total = 0.0
    for pid in subject.processes():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
            # User and system, its own and that of those who have ended.
            total += sum(map(int, fields[11:15])) / _TICKS
    return total


def peak_mb(subject: Subject) -> float:
    """The most that was ever resident, of all its processes."""
    return sum(_field(pid, "status", "VmHWM:") * 1024 / 1e6 for pid in subject.processes())


def written_bytes(subject: Subject) -> int:
    """What it made the kernel write to disk, sooner or later."""
    return sum(_field(pid, "io", "write_bytes:") for pid in subject.processes())


def kill(subject: Subject) -> None:
    """SIGKILL to all of it: no time for a last word."""
    for pid in reversed(subject.processes()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    subject.process.wait()


def _field(pid: int, file: str, key: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/{file}").read_text(encoding="ascii").splitlines():
            if line.startswith(key):
                return int(line.split()[1])
    return 0


def _listens(port: int) -> bool:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                return True
    return False


class Disk:
    """Watches a folder: the most bytes that its files ever took on disk."""

    def __init__(self, folder: Path) -> None:
        self.most = 0
        self._folder = folder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            # A folder may go while it is looked through.
            with contextlib.suppress(OSError):
                self.most = max(self.most, sum(self._sizes()))

    def _sizes(self) -> Iterator[int]:
        for path in self._folder.rglob("*"):
            if not path.name.startswith("events.ndjson"):  # the input isn't the peer's
                with contextlib.suppress(OSError):
                    yield path.stat().st_blocks * _BLOCK
