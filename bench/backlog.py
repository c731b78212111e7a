"""Millions of events waiting: how soon the daemon is ready, how fast it drains, what it needs in memory and on disk.

Mixpanel is away while the stream door fills the spool. Then the daemon is restarted, with the spool's files put out of
the page cache: after a reboot they would not be there either. Mixpanel is back, and everything is delivered; at last
the file has to become small again. All events must arrive, or the run has failed.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct, structs, to_builtins

from bench import data, path, report
from bench.processes import BenchError, Daemon, Loader, Meter, Sink, ended_by_signals, folder, free_ports
from bench.sink import Report as Arrived

READY_S: Final = 1.0
DRAINED_PER_S: Final = 500_000.0
PEAK_MB: Final = 150.0
SHRUNK: Final = 1.1
_SLOWEST_PER_S = 5_000.0
_SETTLE_S = 1.5


class Run(Struct, kw_only=True):
    """The figures of one run. Sizes are those of the spool's file and its WAL."""

    events: int
    filled_per_s: float
    fill_us: float  # of the daemon's CPU an event, while Mixpanel was away
    fill_peak_mb: float
    ready_s: float  # from the start of the process to an open door
    ready_cpu_s: float  # of the daemon, until then
    drained_per_s: float  # from the first batch to the last
    drain_us: float  # of the daemon's CPU an event, the restart included
    drain_peak_mb: float
    empty_bytes: int  # of a new spool
    full_bytes: int
    final_bytes: int
    shrunk_s: float  # from the last batch until the file was small; 0: it did not become so
    other_cores: float
    failure: str = ""


def measure(events: int, events_file: Path, shrink_s: float) -> Run:
    """Fills, restarts, drains, and waits for the file to become small."""
    with folder() as temporary:
        port = free_ports(1)[0]
        with Daemon(temporary, port) as daemon:
            daemon.ready()
            time.sleep(_SETTLE_S)
            empty_bytes = spool_bytes(temporary)
            options = path.loader_options(path.CELLS["stream"], daemon, events_file, events=events)
            with Loader(temporary, options) as loader:
                loader.ready()
                filling = Meter(daemon, loader)
                loaded = loader.load(60 + events / _SLOWEST_PER_S)
                (fill_s, _), fill_others = filling.used()
            fill_peak_mb = daemon.memory_mb("VmHWM")
            daemon.stop(hurry=True)
        full_bytes = spool_bytes(temporary)
        evict(temporary)
        with Sink(temporary, port=port) as sink:
            sink.ready()
            started_at = time.monotonic()
            with Daemon(temporary, port) as daemon:
                draining = Meter(daemon, sink)
                daemon.ready(every_s=0.005)
                ready_s, ready_cpu_s = time.monotonic() - started_at, daemon.cpu_s()
                first_at, first, arrived = _drained(sink, daemon, events)
                (drain_s, _), drain_others = draining.used()
                drain_peak_mb = daemon.memory_mb("VmHWM")
                shrunk_s, drained_at = 0.0, time.monotonic()
                while time.monotonic() - drained_at < shrink_s:
                    if spool_bytes(temporary) <= SHRUNK * empty_bytes:
                        shrunk_s = time.monotonic() - drained_at
                        break
                    time.sleep(0.25)
                final_bytes = spool_bytes(temporary)
                daemon.stop()
            failure = "" if sink.report().events == events else f"{events} sent, {sink.report().events} delivered"
    return Run(
        events=events,
        filled_per_s=events / (loaded.acked_at - loaded.started_at),
        fill_us=fill_s / events * 1e6,
        fill_peak_mb=fill_peak_mb,
        ready_s=ready_s,
        ready_cpu_s=ready_cpu_s,
        drained_per_s=(arrived.events - first) / max(arrived.last_at - first_at, 1e-3),
        drain_us=drain_s / events * 1e6,
        drain_peak_mb=drain_peak_mb,
        empty_bytes=empty_bytes,
        full_bytes=full_bytes,
        final_bytes=final_bytes,
        shrunk_s=shrunk_s,
        other_cores=statistics.mean((fill_others, drain_others)),
        failure=failure,
    )


def _drained(sink: Sink, daemon: Daemon, events: int) -> tuple[float, int, Arrived]:
    """When the first batch was seen, how many events had come by then, and what has come in the end."""
    until = time.monotonic() + 60 + events / _SLOWEST_PER_S
    while not (arrived := sink.report()).events and time.monotonic() < until:
        time.sleep(0.005)
    first_at, first = arrived.last_at, arrived.events
    while arrived.events < events and time.monotonic() < until and daemon.process.poll() is None:
        time.sleep(0.05)
        arrived = sink.report()
    return first_at, first, arrived


def spool_bytes(where: Path) -> int:
    """The spool's file and its WAL."""
    files = [where / name for name in ("spool.db", "spool.db-wal")]
    return sum(file.stat().st_size for file in files if file.exists())


def evict(where: Path) -> None:
    """Puts the spool's files out of the page cache, as after a reboot."""
    for file in where.glob("spool.db*"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def run_all(arguments: argparse.Namespace) -> list[Run]:
    """One after the other."""
    runs = []
    with folder() as temporary:
        events_file = temporary / "events.ndjson"
        data.write(events_file, max(min(data.DISTINCT, arguments.events), -(-arguments.events // 250)))
        for number in range(arguments.runs):
            path.say(f"run {number + 1} of {arguments.runs}")
            try:
                runs.append(measure(arguments.events, events_file, arguments.shrink_seconds))
            except BenchError as error:
                empty = {field.name: 0 for field in structs.fields(Run) if field.required}
                runs.append(Run(**{**empty, "events": arguments.events, "failure": str(error)}))
    path.say("")
    return runs


def show(runs: Sequence[Run]) -> None:
    """Prints the figures, each with its goal."""
    good = [run for run in runs if not run.failure]
    if not good:
        return

    def row(name: str, values: Sequence[float], digits: int, goal: float = 0.0, *, least: bool = False) -> list[str]:
        middle = statistics.median(values)
        met = middle >= goal if least else middle <= goal
        verdict = f"{'>=' if least else '<='} {goal:,g} {'met' if met else 'MISSED'}" if goal else ""
        return [name, report.spread(values, digits), verdict]

    rows = [
        row("filled, events/s", [run.filled_per_s for run in good], 0),
        row("filling, us of CPU an event", [run.fill_us for run in good], 2),
        row("filling, peak MB", [run.fill_peak_mb for run in good], 0, PEAK_MB),
        row("ready after, s", [run.ready_s for run in good], 2, READY_S),
        row("until then, s of CPU", [run.ready_cpu_s for run in good], 2),
        row("drained, events/s", [run.drained_per_s for run in good], 0, DRAINED_PER_S, least=True),
        row("draining, us of CPU an event", [run.drain_us for run in good], 2),
        row("draining, peak MB", [run.drain_peak_mb for run in good], 0, PEAK_MB),
        row("file when new, MB", [run.empty_bytes / 1e6 for run in good], 2),
        row("file when full, MB", [run.full_bytes / 1e6 for run in good], 0),
        row("file in the end, of when new", [run.final_bytes / run.empty_bytes for run in good], 2, SHRUNK),
        row("small again after, s", [run.shrunk_s for run in good], 1),
    ]
    print(report.table(["what", "median (min-max)", "goal"], rows))
    report.caution([run.other_cores for run in good])


def main(argv: Sequence[str]) -> int:
    """Prints what a long backlog costs. 1 when an event was lost or doubled; missed goals are only shown."""
    parser = report.options("backlog", __doc__, runs=1)
    parser.add_argument("--events", type=int, default=10_000_000, help="that wait, default %(default)s")
    parser.add_argument("--shrink-seconds", type=float, default=300, help="for the file, at most; default %(default)g")
    arguments = parser.parse_args(argv)
    about = report.machine()
    with ended_by_signals():
        runs = run_all(arguments)
    print(report.heading(about))
    print(f"{arguments.events:,} events waiting; {arguments.runs} runs\n")
    show(runs)
    for run in runs:
        if run.failure:
            print(f"FAILED {run.failure}")
    report.write(arguments.json, {"machine": about, "runs": to_builtins(runs)})
    return 1 if any(run.failure for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
