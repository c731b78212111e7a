"""The processes of a benchmark. Each is ended by whoever started it, whatever happens, and by its own id."""

import contextlib
import http.client
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import msgspec

from bench.loader import Report as LoaderReport
from bench.openloop import Report as OpenLoopReport
from bench.sink import Arrival
from bench.sink import Report as SinkReport

PROJECT = Path(__file__).resolve().parents[1]
_TICKS = os.sysconf("SC_CLK_TCK")
_START_S = 60.0
_END_S = 30.0


class BenchError(Exception):
    """A process that did not do what it should; the message holds what it last said."""


class Child:
    """A process in a session of its own (Ctrl-C reaches the benchmark alone, which then ends its children in order)."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        folder: Path,
        *,
        program: str = sys.executable,
        extra: Mapping[str, str] = {},
        project: Path = PROJECT,
    ) -> None:
        """`extra`: variables of its environment; `project`: the checkout that it comes from."""
        self.name = name
        self.folder = folder
        self._log = folder / f"{name}.log"
        # A stray configuration in the environment must not change what is measured.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("BRIDGED_")}
        environment |= extra
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(project), os.environ.get("PYTHONPATH", "")]))
        with self._log.open("wb") as log, _signals_held():
            self.process = subprocess.Popen(
                [program, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                cwd=folder,
                env=environment,
                start_new_session=True,
            )
            _running.append(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()

    def end(self) -> None:
        """Ends the process if it still runs."""
        _running.remove(self)
        process = self.process
        for end in (process.terminate, process.kill):
            if process.poll() is None:
                end()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_END_S)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                # Its other end is gone: there is nothing to flush.
                with contextlib.suppress(OSError):
                    pipe.close()

    def say(self, what: str = "") -> None:
        """Writes a line to its standard input; an empty one is the sign to start, or to report."""
        assert self.process.stdin is not None
        self.process.stdin.write(what.encode() + b"\n")

    def hear(self, timeout_s: float) -> bytes:
        """The next line of its standard output. Raises BenchError when there is none in time."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        line = self.process.stdout.readline() if ready else b""
        if not line:
            raise BenchError(f"the {self.name} {'ended' if ready else 'said nothing in time'}:\n{self.last_words()}")
        return line

    def last_words(self) -> str:
        """The end of what it wrote to standard error."""
        return self._log.read_text(errors="replace")[-2000:]

    # -- what the kernel knows of it ----------------------------------------------------------------------------------

    def cpu_s(self) -> float:
        """Processor time of all its threads so far, user and system."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def memory_mb(self, what: str) -> float:
        """VmRSS: what is resident now. VmHWM: the most that ever was."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{what}:"):
                return int(line.split()[1]) * 1024 / 1e6
        return 0.0


class Loader(Child):
    """bench.loader, connected and ready."""

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        super().__init__("loader", ["-m", "bench.loader", *arguments], folder)

    def ready(self) -> None:
        """Returns when it could start at once."""
        self.hear(_START_S)

    def load(self, timeout_s: float) -> LoaderReport:
        """Sends everything; returns when everything is acked."""
        self.say()
        return self.loaded(timeout_s)

    def loaded(self, timeout_s: float) -> LoaderReport:
        """What it did, once it was told to start."""
        return msgspec.json.decode(self.hear(timeout_s), type=LoaderReport)


class OpenLoader(Child):
    """bench.openloop, connected and ready."""

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        super().__init__("loader", ["-m", "bench.openloop", *arguments], folder)

    def ready(self) -> None:
        """Returns when it could start at once."""
        self.hear(_START_S)

    def load(self, timeout_s: float) -> OpenLoopReport:
        """Sends everything when it is due; returns when everything is acked."""
        self.say()
        return self.loaded(timeout_s)

    def loaded(self, timeout_s: float) -> OpenLoopReport:
        """What it did, once it was told to start."""
        return msgspec.json.decode(self.hear(timeout_s), type=OpenLoopReport)


class Sink(Child):
    """bench.sink, listening."""

    def __init__(
        self, folder: Path, *, check: bool = False, port: int = 0, arrivals: bool = False, keep: Path | None = None
    ) -> None:
        options = [*(["--check"] if check else []), *(["--arrivals"] if arrivals else []), "--port", str(port)]
        options += ["--keep", str(keep)] if keep else []
        super().__init__("sink", ["-m", "bench.sink", *options], folder)
        self.port = port

    def ready(self) -> None:
        """Returns when it listens."""
        self.port = msgspec.json.decode(self.hear(_START_S))["port"]

    def report(self) -> SinkReport:
        """What has come so far."""
        self.say()
        return msgspec.json.decode(self.hear(_START_S), type=SinkReport)

    def arrivals(self) -> list[Arrival]:
        """With `arrivals`: when each batch came, and what was in it."""
        path = self.folder / "arrivals"
        self.say(str(path))
        self.hear(_START_S * 4)
        return msgspec.msgpack.decode(path.read_bytes(), type=list[Arrival])


class Emulator(Child):
    """`bridged emulator` in the sink's place: a Mixpanel that checks every event, at several times the cost."""

    def __init__(self, folder: Path) -> None:
        self.port = free_ports(1)[0]
        most = str(10**12)
        arguments = ["--listen", f"127.0.0.1:{self.port}", "--no-keep", "--max-events-per-minute", most]
        super().__init__("emulator", ["-m", "bridged", "emulator", *arguments, "--max-bytes-per-minute", most], folder)

    def ready(self) -> None:
        """Returns when it listens."""
        self.hear(_START_S)

    def report(self) -> SinkReport:
        """What has come so far."""
        summary: dict[str, Any] = msgspec.json.decode(get(self.port, "/emulator/summary"))
        events = summary["accepted"]
        return SinkReport(
            events=events,
            distinct=events - summary["duplicates"],
            requests=summary["requests"],
            last_at=time.monotonic(),
            cpu_s=self.cpu_s(),
        )


class Daemon(Child):
    """`bridged run` with a configuration and a spool of its own, all ceilings off unless they are asked for."""

    def __init__(
        self,
        folder: Path,
        sink_port: int,
        *,
        python: Sequence[str] = (),
        flush_interval: str = "200ms",
        ceilings: bool = False,
        probe_interval: str = "60s",
        max_connections: int = 8000,
        more: str = "",
        project: Path = PROJECT,
    ) -> None:
        """`python`: options of the interpreter; `more`: further tables of the configuration; `project`: whose daemon it is."""
        self.http_port, self.stream_port, self.admin_port = free_ports(3)
        config = folder / "config.toml"
        # As installed but for: no rate ceiling, and a run's last, unfilled batch doesn't wait a whole second for more.
        limits = "" if ceilings else "max_events_per_second = 0\nmax_bytes_per_minute = 0\n"
        config.write_text(
            f"""
[sources.http]
listen = "127.0.0.1:{self.http_port}"
max_connections = {max_connections}
[sources.stream]
listen = ["tcp:127.0.0.1:{self.stream_port}"]
max_connections = {max_connections}
[mixpanel]
url = "http://127.0.0.1:{sink_port}"
token = "0123456789abcdef0123456789abcdef"
[spool]
path = "spool.db"
[delivery]
{limits}flush_interval = "{flush_interval}"
probe_interval = "{probe_interval}"
[admin]
listen = "127.0.0.1:{self.admin_port}"
[log]
format = "json"
{more}
""",
            encoding="utf-8",
        )
        command = [*python, "-m", "bridged", "run", "--config", str(config)]
        super().__init__("daemon", command, folder, project=project)

    def ready(self, every_s: float = 0.02) -> None:
        """Returns when /readyz says so and both doors are open."""
        until = time.monotonic() + _START_S
        while True:
            try:
                get(self.admin_port, "/readyz")
                for port in (self.http_port, self.stream_port):
                    socket.create_connection(("127.0.0.1", port), 1).close()
            except (OSError, http.client.HTTPException, BenchError) as error:
                if self.process.poll() is not None or time.monotonic() > until:
                    raise BenchError(f"the daemon isn't ready ({error}):\n{self.last_words()}") from error
                time.sleep(every_s)
            else:
                return

    def stop(self, *, hurry: bool = False) -> None:
        """SIGTERM, and a second one to skip the grace. Raises BenchError if it does not end in good order."""
        self.process.terminate()
        if hurry:
            time.sleep(0.1)  # two signals at once may be one
            self.process.terminate()
        try:
            code = self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            raise BenchError(f"the daemon did not end within {_END_S:g} s of SIGTERM") from None
        if code != 0:
            raise BenchError(f"the daemon ended with exit code {code}:\n{self.last_words()}")


class BareDaemon(Child):
    """bench.bare_daemon, in the daemon's place."""

    def __init__(self, folder: Path, sink_port: int) -> None:
        self.http_port, self.stream_port = free_ports(2)
        ports = [str(port) for port in (self.http_port, self.stream_port, sink_port)]
        super().__init__("bare daemon", ["-m", "bench.bare_daemon", *ports], folder)

    def ready(self) -> None:
        """Returns when both doors are open."""
        self.hear(_START_S)

    def stop(self) -> None:
        """SIGTERM, which it doesn't listen to."""
        self.process.terminate()
        self.process.wait(_END_S)


def get(port: int, path: str) -> bytes:
    """The body of a page. Raises BenchError for anything but 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise BenchError(f"{path} answered {response.status}: {body[:200]!r}")
    return body


class Meter:
    """What processes, and the rest of the machine, use from now on."""

    def __init__(self, *children: Child) -> None:
        self._children = children
        self._before = [child.cpu_s() for child in children]
        self._own_s = time.process_time()
        self._machine_s = machine_cpu_s()
        self._at = time.monotonic()

    def used(self) -> tuple[list[float], float]:
        """CPU seconds of each process so far, and the cores that others kept busy: 0 on a quiet machine."""
        wall_s = max(time.monotonic() - self._at, 1e-3)
        used = [child.cpu_s() - before for child, before in zip(self._children, self._before, strict=True)]
        others_s = machine_cpu_s() - self._machine_s - sum(used) - (time.process_time() - self._own_s)
        return used, max(0.0, others_s) / wall_s


def machine_cpu_s() -> float:
    """Processor time of the whole machine that was not idle so far; what a hypervisor took counts as well."""
    user, nice, system, _idle, _iowait, *interrupts_and_stolen = (
        Path("/proc/stat").read_text(encoding="ascii").split()[1:9]
    )
    return sum(map(int, [user, nice, system, *interrupts_and_stolen])) / _TICKS


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on at this moment.

    None of those that the system gives to connections: while a daemon is dead, somebody's connection would take its port, or
    one to the port would meet itself, and the next life couldn't listen. Nor of the lower ones, which the tests give to daemons
    of their own.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    sockets: list[socket.socket] = []
    ports_below = range(20_000, lowest) if lowest >= 22_000 else range(1025, 65_536)
    for port in random.SystemRandom().sample(ports_below, 1000):  # not as a test has seeded it
        with contextlib.suppress(OSError):
            sockets.append(socket.create_server(("127.0.0.1", port)))
        if len(sockets) == count:
            break
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    if len(ports) < count:
        raise BenchError("too few ports are free on the loopback")
    return ports


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A temporary folder in the working directory: on its disk, where /tmp may be memory."""
    try:
        path = Path(tempfile.mkdtemp(prefix=".bench-", dir=Path.cwd()))
    except OSError as error:
        raise SystemExit(
            f"bench: no folder can be made in the working directory, which holds the spools: {error}"
        ) from None
    try:
        yield path
    finally:
        # Those whose `with` a signal came before.
        for child in [child for child in _running if child.folder.is_relative_to(path)]:
            child.end()
        shutil.rmtree(path, ignore_errors=True)


class _Signals:
    """While a process is being started signals wait until it is known, so that it can be ended; one is enough to leave."""

    held = False
    waiting = 0
    leaving = False


_running: list[Child] = []


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    _Signals.held = True
    try:
        yield
    finally:
        _Signals.held = False
        if number := _Signals.waiting:
            _Signals.waiting = 0
            _Signals.leaving = True
            raise SystemExit(128 + number)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Makes SIGTERM, SIGINT and SIGHUP an exception, so that every `with` ends its process and removes its folder.

    A second one doesn't interrupt that. What is under nohup goes on when its terminal is closed.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        if _Signals.leaving:
            return
        if _Signals.held:
            _Signals.waiting = number
        else:
            _Signals.leaving = True
            raise SystemExit(128 + number)

    _Signals.leaving = False
    ending = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        ending.append(signal.SIGHUP)
    before = {number: signal.signal(number, leave) for number in ending}
    try:
        yield
    finally:
        for number, handler in before.items():
            # The interpreter's last moments are no time for another Ctrl-C: it would be what ended us.
            signal.signal(number, signal.SIG_IGN if _Signals.leaving else handler)
