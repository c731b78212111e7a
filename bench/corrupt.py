"""What damage costs: bits flipped and bytes cut off in a spool's files, and a start for each.

Two master copies with a backlog, dead letters and books, each in the middle of its life: the WAL of one holds commits that
were just brought into the file, that of the other commits that were not. Each case damages a copy, starts a spool on it,
and asks:

- does it start, and how long does that take?
- is every event that is given back one that was taken, byte for byte?
- do the books balance, and is the damaged file kept?
- what was lost: events of segments that the damage didn't touch must all be there.
"""

import asyncio
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import structlog
import uvloop
from msgspec import Struct

from bench import report
from bench.processes import ended_by_signals, folder
from bridged.backlog.segment import Batch, lines
from bridged.backlog.spool import DeadLetter, Intaken, Settlement, Spool, SpoolOptions
from bridged.currents.schema import iter_types
from bridged.currents.table import EVENT_TYPES

NAMES: Final = dict(iter_types(EVENT_TYPES))
FILES: Final = ("spool.db", "spool.db-wal", "spool.db-shm")
# The last commit of so many has just been brought into the file, whole WAL and all; those after it are in the WAL alone.
SEGMENTS: Final = (60, 66)


class Damage(NamedTuple):
    """What is done to one file: a bit that is flipped, or a length that it is cut to."""

    file: str
    bit: int | None
    length: int | None


class Outcome(Struct):
    """What a start made of it."""

    seconds: float
    missing: int  # events of the master that are not given back
    damaged: int  # segments that were seen to be wrong
    set_aside: int  # files
    wrong: list[str]  # promises that were broken


def make_master(target: Path, segments: int) -> dict[bytes, int]:
    """Fills a folder with the files of a living spool; gives its events, each with the number of its segment."""
    return asyncio.run(_make_master(target, segments))


async def _make_master(target: Path, commits: int) -> dict[bytes, int]:
    chance = random.Random(1)
    events: dict[bytes, int] = {}
    with folder() as temporary:
        async with Spool(_options(temporary), NAMES) as spool:
            for n in range(commits):
                size = chance.choice((20, 200, 2_000, 40_000))
                taken = [
                    b'{"event":"%d-%d","x":"%s"}' % (n, m, chance.randbytes(size).hex().encode()) for m in range(3)
                ]
                codes = bytes(chance.choice((3, 5)) for _ in taken)
                letters = [DeadLetter(3, NAMES[3], "door", "because", b"letter %d" % n)] if n % 5 == 0 else []
                await spool.append(Intaken([Batch(b"\n".join([*taken, b""]), codes)], letters, bytes([5])))
                events |= dict.fromkeys(taken, n + 1)
                if n == SEGMENTS[0] // 2:
                    segments, _ = await spool.read_after(0, 2**30)
                    gone = segments[::4]
                    spool.settle(Settlement(gone, delivered=b"".join([segment.codes for segment in gone])))
                    for segment in gone:
                        for line in lines([segment]):
                            del events[line]
                    await spool.run(lambda db: db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
            for name in FILES:
                shutil.copyfile(temporary / name, target / name)
            (target / "spool.db.lock").write_text("spool")
    return events


def _options(folder_: Path) -> SpoolOptions:
    return SpoolOptions(path=str(folder_ / "spool.db"), max_bytes=64 * 2**20, max_segment_events=3)


def damages(master: Path, flips: int, truncations: int, seed: int) -> list[Damage]:
    """So many cases, spread over the files by their sizes, but for the first pages, which get more than their share."""
    chance = random.Random(seed)
    sizes = {name: (master / name).stat().st_size for name in FILES}
    found = []
    for n in range(flips):
        name = chance.choices(FILES, [6, 5, 1])[0]
        span = min(sizes[name], 2000) if n % 5 == 0 else sizes[name]
        found.append(Damage(name, chance.randrange(8 * span), None))
    for n in range(truncations):
        name = FILES[n % 3]
        edge = chance.choice((0, 1, 99, 100, 512, 32768, 65536, sizes[name] - 1))
        found.append(Damage(name, None, min(edge, sizes[name]) if n % 4 == 0 else chance.randrange(sizes[name])))
    return found


def damage(target: Path, what: Damage) -> None:
    """Does it."""
    file = target / what.file
    if what.bit is not None:
        data = bytearray(file.read_bytes())
        data[what.bit // 8] ^= 1 << what.bit % 8
        file.write_bytes(data)
    else:
        with file.open("r+b") as opened:
            opened.truncate(what.length)


async def start(target: Path, events: dict[bytes, int], *, one_bit: bool) -> Outcome:
    """Starts a spool on damaged files and holds what it gives against what was taken."""
    started = time.perf_counter()
    wrong = []
    async with Spool(_options(target), NAMES) as spool:
        seconds = time.perf_counter() - started
        segments, _ = await spool.read_after(0, 2**30)
        given = Counter(line for segment in segments for line in lines([segment]))
        if strangers := [line for line in given if line not in events]:
            # Delivered already, and in pages that the damage made look alive: harmless, for each has its $insert_id.
            wrong += [f"{line[:40]!r} was never taken" for line in strangers if not line.startswith(b'{"event":"')]
        if twice := sum(n - 1 for n in given.values()):
            wrong.append(f"{twice} events were given twice")
        if problems := spool.accounts.problems(NAMES):
            wrong.append(f"the books don't balance: {problems[:2]}")
        missing = [line for line in events if line not in given]
        if one_bit and len({events[line] for line in missing}) > 1:
            wrong.append(f"one bit cost {len({events[line] for line in missing})} segments")
        if missing and not (spool.damaged or spool.set_aside):
            wrong.append(f"{len(missing)} events were lost without a word")
        await spool.append(Intaken([Batch(b"new\n", bytes([3]))]))
        return Outcome(seconds, len(missing), spool.damaged, len(spool.set_aside), wrong)


def case(master: Path, events: dict[bytes, int], what: Damage) -> Outcome:
    """One case, on a copy."""
    with folder() as temporary:
        for name in (*FILES, "spool.db.lock"):
            shutil.copyfile(master / name, temporary / name)
        damage(temporary, what)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            try:
                return runner.run(start(temporary, events, one_bit=what.bit is not None))
            except Exception as error:
                return Outcome(0.0, 0, 0, 0, [f"it did not start: {error!r}"])


def main(argv: Sequence[str]) -> int:
    """Runs the cases; exit code 1 if a promise was broken."""
    parser = report.options("corrupt", __doc__, runs=1)
    parser.add_argument("--flips", type=int, default=1000, help="single bits, default %(default)s")
    parser.add_argument("--truncations", type=int, default=100, help="files cut off, default %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of the places, default %(default)s")
    arguments = parser.parse_args(argv)
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory(), processors=[lambda *_: ""])
    outcomes = []
    for segments in SEGMENTS:
        with ended_by_signals(), folder() as master:
            events = make_master(master, segments)
            flips, truncations = -(-arguments.flips // len(SEGMENTS)), -(-arguments.truncations // len(SEGMENTS))
            cases = damages(master, flips, truncations, arguments.seed)
            outcomes += [(what, case(master, events, what)) for what in cases]
    rows = []
    for name in FILES:
        for kind in ("flips", "truncations"):
            mine = [o for what, o in outcomes if what.file == name and (what.bit is not None) == (kind == "flips")]
            if mine:
                rows.append([f"{name} {kind}", *map(str, _figures(mine))])
    about = report.machine()
    print(report.heading(about))
    print(f"{len(events)} events in the master; events and files are sums over the cases\n")
    head = [
        "cases",
        "harmless",
        "segments damaged",
        "set aside",
        "events missing",
        "slowest start, s",
        "broken promises",
    ]
    print(report.table(["", *head], rows))
    broken = [(what, outcome.wrong) for what, outcome in outcomes if outcome.wrong]
    for what, wrong in broken[:20]:
        print(what, wrong)
    report.write(arguments.json, {"machine": about, "rows": rows, "broken": [str(b) for b in broken]})
    return 1 if broken else 0


def _figures(mine: Sequence[Outcome]) -> list[object]:
    harmless = sum(not (o.missing or o.damaged or o.set_aside or o.wrong) for o in mine)
    return [
        len(mine),
        harmless,
        sum(o.damaged for o in mine),
        sum(o.set_aside for o in mine),
        sum(o.missing for o in mine),
        f"{max(o.seconds for o in mine):.2f}",
        sum(bool(o.wrong) for o in mine),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
