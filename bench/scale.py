"""What the cost of an event depends on: its size, its type, bad ones beside it, and how many wait.

Each load is one connection of the stream door at full speed, with events of its own; only the events differ. For the
backlog, Mixpanel is away: events are taken with an empty spool and with a long one, and the long one is then drained,
so that the last figure is what an event costs on its way from the disk.
"""

import argparse
import contextlib
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from msgspec import Struct, to_builtins

from bench import data, path, report
from bench.processes import BenchError, Daemon, Loader, Meter, Sink, ended_by_signals, folder, free_ports
from bridged.currents.examples import example_day, example_event
from bridged.currents.table import EVENT_TYPES

GROUPS: Final = ("size", "types", "bad", "backlog")
_PUSH: Final = "users.messages.pushnotification.Send"
_CUSTOM: Final = "users.behaviors.CustomEvent"
_ROWS: Final = {row.event_type: row for row in EVENT_TYPES}
_STREAM: Final = path.CELLS["stream"]
_WORDS: Final = ("blue", "green", "left", "right", "cart", "sale", "spring", "size", "small", "gift", "home", "north")
_BACKLOG_PATIENCE_S = 300.0

Day = Callable[[random.Random, int, int], Iterable[dict[str, Any]]]


class Load(Struct, frozen=True):
    """A kind of events."""

    group: str
    name: str
    day: Day
    bad: float = 0.0  # share that can't be decoded


class Row(Struct, kw_only=True):
    """What an event of a kind costs, by run."""

    group: str
    name: str
    event_bytes: float
    daemon_us: list[float] = []
    events_per_s: list[float] = []
    peak_mb: list[float] = []
    other_cores: list[float] = []
    failures: list[str] = []


def _only(kinds: Sequence[str], more_bytes: int = 0) -> Day:
    """Events of these types in turn, each with a text of so many bytes more."""

    def day(rng: random.Random, count: int, start_s: int) -> Iterable[dict[str, Any]]:
        for number, kind in zip(range(count), itertools.cycle(kinds), strict=False):
            event = example_event(_ROWS[kind], rng, start_s + number % 86_400)
            if more_bytes:
                text = " ".join(rng.choices(_WORDS, k=more_bytes // 4))[:more_bytes]
                event["properties"].setdefault("properties", {})["note"] = text
            yield event

    return day


def _with_bad(share: float) -> Day:
    """The real mix, some of it with a time that is none or a type that nobody knows."""

    def day(rng: random.Random, count: int, start_s: int) -> Iterable[dict[str, Any]]:
        chance = random.Random(7)
        for number, event in enumerate(example_day(rng, count, start_s)):
            if chance.random() < share:
                event.update({"time": "yesterday"} if number % 2 else {"event_type": "users.messages.fax.Send"})
            yield event

    return day


def loads() -> list[Load]:
    """All but the backlog."""
    sizes = [
        Load("size", f"custom event, {more:,} bytes more", _only([_CUSTOM], more)) for more in (0, 1000, 4000, 16_000)
    ]
    types = [
        Load("types", "real mix", example_day),
        Load("types", "only pushes", _only([_PUSH])),
        Load("types", "only custom events", _only([_CUSTOM])),
        Load("types", f"all {len(EVENT_TYPES)} types alike", _only(list(_ROWS))),
    ]
    bad = [Load("bad", f"{share:.0%} bad", _with_bad(share), share) for share in (0.0, 0.01, 0.1, 1.0)]
    return [*sizes, *types, *bad]


def _wanted(events_file: Path) -> Callable[[int], int]:
    """How many of the first N events are good ones: a loader goes round and round in its file."""
    marks = (b'"time":"yesterday"', b'"users.messages.fax.Send"')
    good = [not any(mark in line for mark in marks) for line in data.read(events_file)]
    up_to = [0, *itertools.accumulate(good)]
    return lambda sent: sent // len(good) * up_to[-1] + up_to[sent % len(good)]


def measure(load: Load, row: Row, events_file: Path, seconds: float, events: int) -> None:
    """One run of a kind of events, into its row."""
    try:
        run = path.measure(_STREAM, events_file, seconds=seconds, events=events, wanted=_wanted(events_file))
    except BenchError as error:
        row.failures.append(str(error))
        return
    if run.failure:
        row.failures.append(run.failure)
        return
    row.daemon_us.append(run.daemon_us)
    row.events_per_s.append(run.delivered_per_s if load.bad < 1 else run.committed_per_s)
    row.peak_mb.append(run.peak_mb)
    row.other_cores.append(run.other_cores)


def measure_backlog(waiting: int, events_file: Path, rows: Sequence[Row]) -> None:
    """Takes events with nothing and with much waiting, then drains: a figure for each of three rows."""
    some = max(1, waiting // 5)
    with folder() as temporary, contextlib.ExitStack() as stack:
        port = free_ports(1)[0]
        daemon = stack.enter_context(Daemon(temporary, port))
        daemon.ready()

        def take(events: int, row: Row | None) -> None:
            with Loader(temporary, path.loader_options(_STREAM, daemon, events_file, events=events)) as loader:
                loader.ready()
                meter = Meter(daemon, loader)
                loaded = loader.load(_BACKLOG_PATIENCE_S)
                (used_s, _), other_cores = meter.used()
            if row is not None:
                row.daemon_us.append(used_s / events * 1e6)
                row.events_per_s.append(events / (loaded.acked_at - loaded.started_at))
                row.peak_mb.append(daemon.memory_mb("VmHWM"))
                row.other_cores.append(other_cores)

        take(some, rows[0])
        take(waiting - some, None)
        take(some, rows[1])
        total = waiting + some
        sink = stack.enter_context(Sink(temporary, port=port))
        sink.ready()
        meter = Meter(daemon, sink)
        until = time.monotonic() + _BACKLOG_PATIENCE_S
        first_at = 0.0
        while (arrived := sink.report()).events < total and time.monotonic() < until:
            first_at = first_at or (arrived.last_at if arrived.events else 0.0)
            time.sleep(0.02)
        (used_s, _), other_cores = meter.used()
        peak_mb = daemon.memory_mb("VmHWM")
        daemon.stop()
        arrived = sink.report()
        if arrived.events != total:
            rows[2].failures.append(f"{total} events sent, {arrived.events} delivered")
            return
        rows[2].daemon_us.append(used_s / total * 1e6)
        rows[2].events_per_s.append(total / max(arrived.last_at - first_at, 1e-3))
        rows[2].peak_mb.append(peak_mb)
        rows[2].other_cores.append(other_cores)


def run_all(arguments: argparse.Namespace) -> list[Row]:
    """The kinds of load take turns."""
    chosen = [load for load in loads() if load.group in arguments.groups]
    rows = []
    with folder() as temporary:
        files = [temporary / f"events-{number}" for number in range(len(chosen))]
        for load, file in zip(chosen, files, strict=True):
            path.say(f"making events: {load.name}")
            # As many bytes of each, or the largest would fill the loader's memory; and enough that no id comes twice.
            data.write(file, 200, day=load.day)
            size = file.stat().st_size / 200
            count = max(4000, min(arguments.distinct, round(arguments.distinct * 700 / size)))
            data.write(file, count, day=load.day)
            rows.append(Row(group=load.group, name=load.name, event_bytes=file.stat().st_size / count))
        waiting: list[Row] = []
        mix = temporary / "mix"
        if "backlog" in arguments.groups:
            data.write(mix, max(arguments.distinct, arguments.backlog // 250))
            size = mix.stat().st_size / max(arguments.distinct, arguments.backlog // 250)
            names = ("taken, 0 waiting", f"taken, {arguments.backlog:,} waiting", "drained, from the disk")
            waiting = [Row(group="backlog", name=name, event_bytes=size) for name in names]
        for number in range(arguments.runs):
            for load, file, row in zip(chosen, files, rows, strict=True):
                path.say(f"run {number + 1} of {arguments.runs}: {load.name}")
                measure(load, row, file, arguments.seconds, arguments.events or 0)
            if waiting:
                path.say(f"run {number + 1} of {arguments.runs}: backlog")
                try:
                    measure_backlog(arguments.backlog, mix, waiting)
                except BenchError as error:
                    waiting[0].failures.append(str(error))
    path.say("")
    return rows + waiting


def main(argv: Sequence[str]) -> int:
    """Prints the cost by kind of event. 1 when events were lost or doubled."""
    parser = report.options("scale", __doc__, runs=3)
    groups = lambda text: text.split(",")  # noqa: E731  # an option's type, used once
    parser.add_argument(
        "--groups", metavar="NAME,...", type=groups, default=list(GROUPS), help=f"of {', '.join(GROUPS)}"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a run, default %(default)g")
    parser.add_argument("--events", type=int, help="a run ends after so many events instead")
    parser.add_argument("--backlog", type=int, default=1_000_000, help="events that wait, default %(default)s")
    parser.add_argument("--distinct", type=int, default=20_000, help="events of a kind, default %(default)s")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.groups) - set(GROUPS):
        parser.error(f"no such group: {', '.join(sorted(unknown))}")
    about = report.machine()
    with ended_by_signals():
        rows = run_all(arguments)
    print(report.heading(about))
    print(f"stream door, one connection; CPU of the daemon; median (min-max) of {arguments.runs} runs\n")
    table = [
        [
            row.name,
            f"{row.event_bytes:,.0f}",
            report.spread(row.daemon_us, 2),
            f"{statistics.median(row.daemon_us) / row.event_bytes * 1000:.1f}" if row.daemon_us else "-",
            report.spread(row.events_per_s),
            report.spread(row.peak_mb),
        ]
        for row in rows
    ]
    print(report.table(["events", "bytes", "us/event", "us/kB", "events/s", "peak MB"], table))
    report.caution([cores for row in rows for cores in row.other_cores])
    failures = [f"{row.name}: {failure}" for row in rows for failure in row.failures]
    for failure in failures:
        print(f"FAILED {failure}")
    report.write(arguments.json, {"machine": about, "runs": arguments.runs, "rows": to_builtins(rows)})
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
