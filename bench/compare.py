"""Another checkout beside this one, load by load: two daemons that live side by side, and are loaded in turns.

Where a machine is twice as fast at one minute as at the next, medians of whole runs say little about a change of a tenth.
Bursts of a second that follow each other meet the same machine: what counts is the ratio of each pair, its median, and
between which bounds half of them are. OTHER is the folder of another checkout (`git worktree add --detach ../before REV`), or
`bare`: the bare daemon of this one.
"""

import contextlib
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from bench import data, report
from bench.path import CELLS, arrivals, loader_options, say
from bench.processes import PROJECT, BareDaemon, BenchError, Daemon, Loader, Meter, Sink, folder

LOADS: Final = ("stream", "http-100", "http-10", "http-1")


class Burst(Struct, kw_only=True):
    """One load of one daemon."""

    committed_per_s: float
    daemon_us: float  # of CPU an event, until everything was delivered and settled


class Side:
    """A daemon and its sink."""

    def __init__(self, stack: contextlib.ExitStack, at: Path, project: Path | None) -> None:
        """`project`: the checkout that it comes from; None: the bare daemon."""
        at.mkdir()
        self._folder = at
        self._sink = stack.enter_context(Sink(at))
        self._sink.ready()
        self._daemon: Daemon | BareDaemon
        if project is None:
            self._daemon = stack.enter_context(BareDaemon(at, self._sink.port))
        else:
            self._daemon = stack.enter_context(Daemon(at, self._sink.port, project=project))
        self._daemon.ready()

    def burst(self, load: str, events_file: Path, seconds: float) -> Burst:
        """Loads it once. Raises BenchError if not everything arrives."""
        before = self._sink.report().events
        options = loader_options(CELLS[load], self._daemon, events_file, seconds=seconds)
        with Loader(self._folder, options) as loader:
            loader.ready()
            meter = Meter(self._daemon)
            loaded = loader.load(seconds + 60)
            arrived = arrivals(self._sink, self._daemon, before + loaded.events).events - before
            (cpu_s,), _ = meter.used()
        if arrived != loaded.events:
            raise BenchError(f"{load}: {loaded.events} events sent and acked, {arrived} delivered")
        committed_s = loaded.acked_at - loaded.started_at
        return Burst(committed_per_s=loaded.events / committed_s, daemon_us=cpu_s / loaded.events * 1e6)


def main(argv: Sequence[str]) -> int:
    """Prints this checkout's figures, the other's, and their ratios."""
    parser = report.options("compare", __doc__, runs=12)
    parser.add_argument("other", metavar="OTHER", help="the folder of another checkout, or bare")
    parser.add_argument("--cells", metavar="NAME,...", help=f"as for path, default {','.join(LOADS)}")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a burst, default %(default)s")
    arguments = parser.parse_args(argv)
    loads = arguments.cells.split(",") if arguments.cells else list(LOADS)
    if unknown := [load for load in loads if load not in CELLS or CELLS[load].bare]:
        parser.error(f"no such loads: {', '.join(unknown)}")
    other = None if arguments.other == "bare" else Path(arguments.other).resolve()
    if other is not None and not (other / "bridged" / "__main__.py").exists():
        parser.error(f"{other} is no checkout of bridged")
    about, bursts = report.machine(), dict[str, list[tuple[Burst, Burst]]]()
    with folder() as temporary, contextlib.ExitStack() as stack:
        events_file = temporary / "events.ndjson"
        data.write(events_file, data.DISTINCT)
        sides = [Side(stack, temporary / name, project) for name, project in (("this", PROJECT), ("other", other))]
        for load in loads:
            for number in range(arguments.runs):
                say(f"{load}: burst {number + 1} of {arguments.runs}")
                pair: dict[int, Burst] = {}
                for at in random.sample((0, 1), 2):  # neither always comes first
                    pair[at] = sides[at].burst(load, events_file, arguments.seconds)
                    time.sleep(0.2)
                bursts.setdefault(load, []).append((pair[0], pair[1]))
    say("")
    print(report.heading(about))
    print(
        f"this checkout beside {arguments.other}: medians of {arguments.runs} bursts each of {arguments.seconds:g} s;"
    )
    print("ratios this : other, median (from the lowest quarter to the highest)\n")
    head = ["load", "committed/s", "other", "ratio", "daemon us", "other", "ratio"]
    print(report.table(head, [_row(load, pairs) for load, pairs in bursts.items()]))
    report.write(arguments.json, {"machine": about, "other": arguments.other, "bursts": bursts})
    return 0


def _row(load: str, pairs: list[tuple[Burst, Burst]]) -> list[Any]:
    row: list[Any] = [load]
    for name, digits in (("committed_per_s", 0), ("daemon_us", 2)):
        ours, others = ([getattr(each, name) for each in side] for side in zip(*pairs, strict=True))
        ratios = sorted(our / other for our, other in zip(ours, others, strict=True))
        quarter = len(ratios) // 4
        row += [f"{statistics.median(side):,.{digits}f}" for side in (ours, others)]
        row.append(f"{statistics.median(ratios):.2f} ({ratios[quarter]:.2f}-{ratios[-1 - quarter]:.2f})")
    return row


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
