"""The headline: events/s through the whole daemon, committed with synchronous=FULL and delivered, and their cost.

Three processes on the same cores: a loader at a door, the daemon as installed, a sink that takes the place of Mixpanel.
Every run has a daemon and a spool of its own; the kinds of load take turns, so that what else happens on the machine
hits them alike. A run in which the sink did not get exactly the events that were sent has failed, whatever its speed.
"""

import argparse
import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from bench import data, floor, report
from bench.floor import Floor
from bench.loader import Report as LoaderReport
from bench.processes import BareDaemon, BenchError, Daemon, Emulator, Loader, Meter, Sink, ended_by_signals, folder, get
from bench.sink import Report as SinkReport

PEAK_MB: Final = 120.0
IDLE_MB: Final = 55.0
_VERIFIED_EVENTS = 50_000
_LONGEST_S = 300.0
_SETTLE_S = 0.3
_ROUNDS = data.MAX_ROUNDS - 6
_FASTEST_PER_S = 1_000_000  # no machine takes more, so far
# The sink has everything when it has got nothing new for so long, or all of it.
_QUIET_S = 15.0


class Cell(Struct, frozen=True, kw_only=True):
    """A kind of load, and what it should reach."""

    door: str
    connections: int
    per_request: int = 0
    goal: float = 0  # events/s
    goal_us: float = 0  # of daemon CPU an event
    goal_floors: float = 0  # the same, in multiples of the floor
    bare: bool = False  # the bare daemon in bridged's place: what the promises cost is what is above it


# What is measured when no loads are named.
USUAL: Final = {
    "stream": Cell(door="stream", connections=1, goal=350_000, goal_us=3.0, goal_floors=1.7),
    "stream-4": Cell(door="stream", connections=4),
    "http-1000": Cell(door="http", connections=4, per_request=1000),
    "http-100": Cell(door="http", connections=16, per_request=100, goal=250_000, goal_us=4.0),
    "http-10": Cell(door="http", connections=64, per_request=10, goal=110_000),
    "http-1": Cell(door="http", connections=64, per_request=1, goal=22_000),
}
CONNECTIONS: Final = (1, 4, 16, 64)
CELLS: Final = (
    USUAL
    | {f"stream-{n}": Cell(door="stream", connections=n) for n in CONNECTIONS[2:]}
    | {
        f"http-{size}x{n}": Cell(door="http", connections=n, per_request=size)
        for size in (1000, 100, 10, 1)
        for n in CONNECTIONS
    }
    | {
        f"{name}-bare": Cell(door=cell.door, connections=cell.connections, per_request=cell.per_request, bare=True)
        for name, cell in USUAL.items()
    }
)


class Run(Struct, kw_only=True):
    """The figures of one run."""

    events: int
    requests: int
    committed_per_s: float  # first byte sent to last ack
    delivered_per_s: float  # first byte sent to the sink's last batch
    daemon_us: float  # of CPU an event, until everything was delivered
    loader_us: float
    sink_us: float
    daemon_cores: float
    peak_mb: float
    idle_mb: float
    p50_ms: float
    p99_ms: float
    busy: int
    sink_requests: int
    other_cores: float  # what the rest of the machine used meanwhile: 0 on a quiet one
    failure: str = ""


def measure(
    cell: Cell,
    events_file: Path,
    *,
    seconds: float = 0.0,
    events: int = 0,
    check: bool = False,
    emulator: bool = False,
    wanted: Callable[[int], int] = lambda sent: sent,
) -> Run:
    """One run: starts the three, loads, waits until everything is delivered, ends them.

    It lasts for so many seconds, or events if they are given. `wanted` tells how many of the events that were sent are
    to be delivered.
    """
    with folder() as temporary, contextlib.ExitStack() as stack:
        sink: Sink | Emulator = Emulator(temporary) if emulator else Sink(temporary, check=check)
        stack.enter_context(sink)
        sink.ready()
        daemon = BareDaemon(temporary, sink.port) if cell.bare else Daemon(temporary, sink.port)
        stack.enter_context(daemon)
        daemon.ready()
        options = loader_options(cell, daemon, events_file, seconds=seconds, events=events)
        loader = stack.enter_context(Loader(temporary, options))
        loader.ready()
        time.sleep(_SETTLE_S)
        idle_mb = daemon.memory_mb("VmRSS")
        sink_before = sink.report()
        meter = Meter(daemon, sink, loader)
        loaded = loader.load(_LONGEST_S)
        arrived = arrivals(sink, daemon, wanted(loaded.events))
        (daemon_cpu_s, _, _), other_cores = meter.used()
        peak_mb = daemon.memory_mb("VmHWM")
        # The bare daemon keeps none.
        books = (
            msgspec.json.decode(get(daemon.admin_port, "/api/status"))["events"] if isinstance(daemon, Daemon) else None
        )
        daemon.stop()
        run = _figures(loaded, arrived, sink_before, daemon_cpu_s)
        run.idle_mb, run.peak_mb, run.other_cores = idle_mb, peak_mb, other_cores
        # After the daemon's end: whatever it was going to send twice, it has sent.
        run.failure = _failure(sink.report(), wanted(loaded.events), check=check)
        run.failure = run.failure or ("" if books is None else _unbalanced(books, loaded.events))
        return run


def loader_options(
    cell: Cell, daemon: Daemon | BareDaemon, events_file: Path, *, seconds: float = 0.0, events: int = 0
) -> list[str]:
    """What tells a loader to load a daemon like this."""
    port = daemon.stream_port if cell.door == "stream" else daemon.http_port
    options = ["--door", cell.door, "--port", str(port), "--data", str(events_file)]
    options += ["--connections", str(cell.connections), "--per-request", str(cell.per_request or 1)]
    return [*options, *(["--events", str(events)] if events else ["--seconds", str(seconds)])]


def arrivals(sink: Sink | Emulator, daemon: Daemon | BareDaemon, events: int) -> SinkReport:
    """Waits until the sink has got everything, or nothing more comes."""
    arrived = sink.report()
    quiet_since = time.monotonic()
    while arrived.events < events and time.monotonic() - quiet_since < _QUIET_S and daemon.process.poll() is None:
        time.sleep(0.02)
        before, arrived = arrived, sink.report()
        if arrived.events != before.events:
            quiet_since = time.monotonic()
    # The answer to the last batch, and the commit that settles it, belong to what the events cost.
    time.sleep(_SETTLE_S)
    return arrived


def _figures(loaded: LoaderReport, arrived: SinkReport, sink_before: SinkReport, daemon_cpu_s: float) -> Run:
    events = max(1, loaded.events)
    delivered_s = max(arrived.last_at, loaded.acked_at) - loaded.started_at
    return Run(
        events=loaded.events,
        requests=loaded.requests,
        committed_per_s=events / (loaded.acked_at - loaded.started_at),
        delivered_per_s=events / delivered_s,
        daemon_us=daemon_cpu_s / events * 1e6,
        loader_us=loaded.cpu_s / events * 1e6,
        sink_us=(arrived.cpu_s - sink_before.cpu_s) / events * 1e6,
        daemon_cores=daemon_cpu_s / delivered_s,
        peak_mb=0,
        idle_mb=0,
        p50_ms=loaded.p50_ms,
        p99_ms=loaded.p99_ms,
        busy=loaded.busy,
        sink_requests=arrived.requests,
        other_cores=0,
    )


def _failure(arrived: SinkReport, events: int, *, check: bool) -> str:
    if arrived.bad:
        return f"{arrived.bad} requests that the sink didn't understand"
    if arrived.events != events:
        return f"{events} events sent and acked, {arrived.events} delivered"
    if check and arrived.distinct != events:
        return f"{events} events sent, {arrived.distinct} different ones delivered"
    return ""


def _unbalanced(books: dict[str, int], events: int) -> str:
    """What is wrong with the daemon's own books."""
    ends = sum(books[kind] for kind in ("delivered", "dead_lettered", "expired", "skipped", "waiting"))
    return "" if books["accepted"] == events == ends else f"{events} events sent, and the books say {books}"


class Results(Struct, kw_only=True):
    """Everything that `--json` writes."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    floors: list[Floor] = msgspec.field(default_factory=list)
    cells: dict[str, list[Run]] = msgspec.field(default_factory=dict)
    verified: dict[str, str] = msgspec.field(default_factory=dict)  # by cell: "" or what was wrong


def run_all(arguments: argparse.Namespace) -> Results:
    """Verifies every kind of load once, then measures: floor, cell, cell, ... as often as was asked for."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    results = Results(machine=report.machine(), settings=settings)
    with folder() as temporary:
        arguments.data = temporary / "events.ndjson"
        data.write(arguments.data, _distinct(arguments.events, arguments.seconds))
        lines = [data.patched(line, 0) for line in data.read(arguments.data)[: floor.EVENTS]]
        for name in arguments.cells if not arguments.emulator else ():
            say(f"verifying {name}")
            events = min(_VERIFIED_EVENTS, arguments.events or _VERIFIED_EVENTS)
            if CELLS[name].per_request == 1:
                events = min(events, 10_000)
            results.verified[name] = _attempt(name, arguments, check=True, events=events).failure
        for number in range(arguments.runs):
            results.floors.append(floor.measure(lines))
            for name in arguments.cells:
                if results.verified.get(name):
                    continue  # what loses events has no speed
                say(f"run {number + 1} of {arguments.runs}: {name}")
                results.cells.setdefault(name, []).append(_attempt(name, arguments))
    say("")
    return results


def _distinct(events: int | None, seconds: float) -> int:
    """So many that no id comes twice in a run."""
    if events:
        return max(min(data.DISTINCT, events), -(-events // _ROUNDS))
    return max(data.DISTINCT, math.ceil(seconds * _FASTEST_PER_S / _ROUNDS))


def _attempt(name: str, arguments: argparse.Namespace, *, check: bool = False, events: int | None = None) -> Run:
    """A run; one that breaks is a failed run, and the others go on."""
    try:
        return measure(
            CELLS[name],
            arguments.data,
            seconds=arguments.seconds,
            events=events or arguments.events or 0,
            check=check,
            emulator=arguments.emulator,
        )
    except BenchError as error:
        figures = {field.name: 0 for field in msgspec.structs.fields(Run) if field.required}
        return msgspec.convert({**figures, "failure": str(error)}, Run)


def say(progress: str) -> None:
    """Overwrites the line that tells a person how far it is."""
    if sys.stderr.isatty():
        print(f"\r\033[K{progress}", end="", file=sys.stderr, flush=True)


def show(results: Results) -> bool:
    """Prints the tables. False when a run failed."""
    runs = len(results.floors)
    floors = results.floors
    print(report.heading(results.machine))
    if results.machine["filesystem"] == "tmpfs":
        print("CAUTION: the spool was on tmpfs, where fsync does nothing: no figure of durability")
    print(
        f"{floors[0].event_bytes:.0f} bytes an event; median (min-max) of {runs} runs; CPU in us an event; "
        f"loader and sink on the same cores\n"
    )
    bottom = statistics.median(f.total for f in floors)
    head = [
        "load",
        "committed/s",
        "delivered/s",
        "goal",
        "daemon us",
        "x floor",
        "loader us",
        "sink us",
        "cores",
        "peak MB",
    ]
    rows = []
    for name, every in results.cells.items():
        good = [run for run in every if not run.failure]
        cell = CELLS[name]
        met = bool(good) and statistics.median(run.delivered_per_s for run in good) >= cell.goal
        rows.append(
            [
                name,
                report.spread([run.committed_per_s for run in good]),
                report.spread([run.delivered_per_s for run in good]),
                f"{cell.goal:,.0f} {'met' if met else 'MISSED'}" if cell.goal else "-",
                report.spread([run.daemon_us for run in good], 2),
                f"{statistics.median(run.daemon_us for run in good) / bottom:.1f}" if good else "-",
                report.spread([run.loader_us for run in good], 2),
                report.spread([run.sink_us for run in good], 2),
                f"{statistics.median(run.daemon_cores for run in good):.2f}" if good else "-",
                report.spread([run.peak_mb for run in good]),
            ]
        )
    print(report.table(head, rows))
    _show_floor(floors)
    _show_goals(results)
    report.caution([run.other_cores for every in results.cells.values() for run in every if not run.failure])
    for name, every in results.cells.items():
        good = [run for run in every if not run.failure]
        if good and CELLS[name].door == "http":
            median = {key: statistics.median(getattr(run, key) for run in good) for key in ("p50_ms", "p99_ms")}
            print(f"{name}: request to 200 in {median['p50_ms']:.1f} ms (p50), {median['p99_ms']:.1f} ms (p99)")
    return _show_failures(results)


def _show_floor(floors: list[Floor]) -> None:
    parts = ", ".join(
        f"{name} {report.spread([getattr(f, name) for f in floors], 2)}" for name in ("decode", "encode", "gzip")
    )
    print(f"\nfloor: {report.spread([f.total for f in floors], 2)} us an event = {parts}")
    print(f"       mapping, which it leaves out: {report.spread([f.map for f in floors], 2)}")


def _show_goals(results: Results) -> None:
    good = {name: [run for run in every if not run.failure] for name, every in results.cells.items()}
    every = [run for runs in good.values() for run in runs]
    if not every:
        return
    for name, runs in good.items():
        if runs and CELLS[name].goal_us:
            middle = statistics.median(run.daemon_us for run in runs)
            goal = CELLS[name].goal_us
            print(f"{name}: {middle:.2f} us of daemon CPU an event, goal {goal:g}: {_met(middle, goal)}")
            if floors := CELLS[name].goal_floors:
                ratio = middle / statistics.median(floor_.total for floor_ in results.floors)
                print(f"{name}: {ratio:.2f} times the floor, goal {floors:g}: {_met(ratio, floors)}")
        bare = good.get(f"{name}-bare")
        if runs and bare:
            times = [
                statistics.median(getattr(run, key) for run in runs)
                / statistics.median(getattr(run, key) for run in bare)
                for key in ("daemon_us", "delivered_per_s")
            ]
            print(f"{name}: {times[0]:.2f} times the CPU of the bare daemon, {times[1]:.2f} of its events/s")
    ours = {name: runs for name, runs in good.items() if runs and not CELLS[name].bare}
    if not ours:
        return
    peak = max(statistics.median(run.peak_mb for run in runs) for runs in ours.values())
    idle = statistics.median(run.idle_mb for runs in ours.values() for run in runs)
    print(f"peak RSS: {peak:.0f} MB, goal {PEAK_MB:g}: {_met(peak, PEAK_MB)}")
    print(f"idle RSS: {idle:.0f} MB, goal {IDLE_MB:g}: {_met(idle, IDLE_MB)}")


def _met(value: float, goal: float) -> str:
    return "met" if value <= goal else "MISSED"


def _show_failures(results: Results) -> bool:
    if results.verified:
        whole = [name for name, problem in results.verified.items() if not problem]
        print(f"verified, nothing lost and nothing doubled: {', '.join(whole) or 'none'}")
    failures = [f"verification of {name}: {problem}" for name, problem in results.verified.items() if problem]
    for name, every in results.cells.items():
        failures += [f"run {n} of {name}: {run.failure}" for n, run in enumerate(every, 1) if run.failure]
    said: set[str] = set()
    for failure in failures:
        which, _, problem = failure.partition(": ")
        # One cause fails many runs: the whole story once, then its last line.
        print(f"FAILED {which}: {problem.splitlines()[-1] if problem in said else problem}")
        said.add(problem)
    return not failures


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark. 1 when an event was lost or doubled, or a process broke; missed goals are only shown."""
    parser = report.options("path", __doc__)
    parser.add_argument(
        "--cells",
        metavar="NAME,...",
        type=_cells,
        default=list(USUAL),
        help=f"default {','.join(USUAL)}; each also as NAME-bare, on a daemon that keeps no promises; stream-16, stream-64; "
        f"http-NxC, C connections with N events a request: N of 1000, 100, 10, 1, C of {', '.join(map(str, CONNECTIONS))}",
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a run, default %(default)g")
    parser.add_argument("--events", type=int, help="a run ends after so many events instead")
    parser.add_argument("--emulator", action="store_true", help="`bridged emulator` in the sink's place")
    arguments = parser.parse_args(argv)
    with ended_by_signals():
        results = run_all(arguments)
    whole = show(results)
    report.write(arguments.json, msgspec.to_builtins(results))
    return 0 if whole else 1


def _cells(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(CELLS):
        raise argparse.ArgumentTypeError(f"no such load: {', '.join(sorted(unknown))}")
    return names


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
