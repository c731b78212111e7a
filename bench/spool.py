"""What durability costs: events a commit x SQLite's `synchronous`, beside a bare write and fsync of the same bytes.

The spool's own `append`, awaited before the next, so that every group is a commit of its own: what group
commit is for is the difference between the lines. FULL is what the daemon
uses; NORMAL and OFF show what it pays for its promise.
"""

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec
import uvloop

from bench import data, report
from bench.processes import ended_by_signals, folder
from bridged.backlog.segment import Batch, Packer
from bridged.backlog.spool import Intaken, Settlement, Spool, SpoolOptions
from bridged.currents.schema import iter_types
from bridged.currents.table import EVENT_TYPES
from bridged.mixpanel.mapping import EventMapping, MappingSettings

GROUPS: Final = (1, 10, 100, 1000, 2000)
_CONTROL: Final = "write + fsync"
_MODES: Final[tuple[Literal["FULL", "NORMAL", "OFF"], ...]] = ("FULL", "NORMAL", "OFF")


def main(argv: Sequence[str]) -> int:
    """Prints the grid."""
    parser = report.options("spool", __doc__, runs=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a measurement, default %(default)g")
    arguments = parser.parse_args(argv)
    about = report.machine()
    with ended_by_signals():
        per_s = _grid(arguments.runs, arguments.seconds)
    print(report.heading(about))
    print(f"events/s, one commit at a time, each settled with the next; median (min-max) of {arguments.runs} runs\n")
    rows = [[f"{group:,}", *[report.spread(grid[group]) for grid in per_s.values()]] for group in GROUPS]
    print(report.table(["events a commit", *per_s], rows))
    report.write(arguments.json, {"machine": about, "events_per_s": per_s})
    return 0


def _grid(runs: int, seconds: float) -> dict[str, dict[int, list[float]]]:
    """Events/s by mode and group."""
    per_s: dict[str, dict[int, list[float]]] = {}
    for group in GROUPS * runs:
        batch = _batch(group)
        with folder() as temporary:
            rate = _control(temporary / "control", batch, seconds)
        per_s.setdefault(_CONTROL, {}).setdefault(group, []).append(rate)
        for mode in _MODES:
            with folder() as temporary, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                rate = runner.run(_commits(temporary / "spool.db", mode, batch, seconds))
            per_s.setdefault(mode, {}).setdefault(group, []).append(rate)
    return per_s


def _batch(events: int) -> Batch:
    mapping = EventMapping(EVENT_TYPES, MappingSettings(token="0" * 32))
    mapped = mapping.map(mapping.schema.lines(data.events(events)), time.time())
    return Batch(msgspec.json.Encoder().encode_lines(mapped.forms), mapped.codes)


def _control(path: Path, batch: Batch, seconds: float) -> float:
    """Compresses, appends to a file and fsyncs: the least that a durable event can cost on this disk."""
    commits, packer = 0, Packer()
    started = time.perf_counter()
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    try:
        while time.perf_counter() - started < seconds:
            os.write(file, packer.pack(commits, 0.0, batch.ndjson, batch.codes).block)
            os.fsync(file)
            commits += 1
    finally:
        os.close(file)
    return commits * len(batch.codes) / (time.perf_counter() - started)


async def _commits(path: Path, synchronous: Literal["FULL", "NORMAL", "OFF"], batch: Batch, seconds: float) -> float:
    options = SpoolOptions(path=str(path), synchronous=synchronous)
    async with Spool(options, dict(iter_types(EVENT_TYPES))) as spool:
        # As when it is delivered: every commit also removes what the one before it brought.
        spool.committed = lambda segments: spool.settle(Settlement(segments, delivered=batch.codes))
        commits = 0
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            await spool.append(Intaken([batch]))
            commits += 1
        return commits * len(batch.codes) / (time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
