"""What a bad disk loses: full to the last byte, and failing at its k-th write or fsync; a ledger outside counts. Needs root.

Full: the spool lies on a small tmpfs. Mixpanel takes nothing, the doors take until something else has taken all the room
there is; then Mixpanel takes again, and what waits must be delivered within a minute, with not a byte freed by anybody.

EIO: lives of a daemon under load, whose first, second, third ... write (or fsync) fails, once. Each must end with exit
code 74 at that, try nothing again, and have lost nothing that was acked; the next life is its recovery. (But for the syncs
of the folder, of which SQLite takes no notice when they fail; the start has synced it by then.)
"""

import argparse
import asyncio
import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct

from bench import faulty
from bench.ledger import Faults, Load, Subject, Tee, Totals, verdict
from bench.processes import BenchError, ended_by_signals, folder, get

_EXIT_IO: Final = 74
_ROOMY_MIB = 1024  # for the lives that an error ends
_PER_VERDICT = 20
# So long a life may last until the call that fails has come, and end after it.
_LIFE_S = 20.0


class Summary(Struct):
    """What came of it."""

    rounds: int  # the disk was full so often
    refused: int  # of them with a door that said so
    drain_s: list[float]  # from Mixpanel's recovery until nothing waited, sorted
    lives: int  # that an error of the disk was planned for
    struck: int  # that met it
    survived: list[str]  # those that met it beside the spool's own files, and went on
    totals: Totals
    problems: list[str]

    def text(self, seed: int, seconds: float) -> str:
        """For people."""
        totals, drains = self.totals, self.drain_s or [0.0]
        return "\n".join(
            [
                f"seed {seed}, {seconds:.0f} s",
                (
                    f"disk full {self.rounds} times, refused in {self.refused}; drained each time with nothing freed: "
                    f"p50 {drains[len(drains) // 2]:.2f} s, most {drains[-1]:.2f} s"
                ),
                (
                    f"EIO in {self.struck} of {self.lives} lives: {self.struck - len(self.survived)} ended with exit code "
                    f"{_EXIT_IO}, {len(self.survived)} went on {self.survived[:3]}"
                ),
                f"acked {totals.acked} of {totals.sent} events sent: lost {totals.lost}",
                f"delivered {totals.stored}, dead letters {totals.dead}; the books agree: {not self.problems}",
                *[f"PROBLEM: {problem}" for problem in self.problems],
            ]
        )


@contextlib.contextmanager
def small_disk(where: Path, mib: int) -> Iterator[Path]:
    """A tmpfs of so many MiB."""
    disk = where / "small"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)  # what stands here
    except FileNotFoundError as error:
        raise BenchError("mount isn't installed: apt-get install mount") from error
    if done.returncode:
        raise BenchError(f"mounting a tmpfs takes root: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def _make_roomy(disk: Path) -> None:
    """Else what waits fills it in the lives with an outage, and nothing more is written: the k-th write never comes."""
    subprocess.run(["mount", "-o", f"remount,size={_ROOMY_MIB}m", str(disk)], check=True)


def fill(disk: Path) -> None:
    """Takes what is free, to the last byte."""
    with (disk / "filler").open("ab", buffering=0) as file:
        for size in (2**16, 1):
            with contextlib.suppress(OSError):
                while os.statvfs(disk).f_bavail:
                    file.write(bytes(size))


async def torment(where: Path, *, rounds: int, calls: dict[str, int], seed: int, mib: int = 32) -> Summary:
    """So many rounds of a full disk, then a life for each k up to `calls` of each kind. Judges now and then."""
    dice = random.Random(seed)
    summary = Summary(0, 0, [], 0, 0, [], Totals(), [])
    with small_disk(where, mib) as disk:
        subject = Subject(where, disk / "spool.db")
        with subject.start_emulator():
            async with Tee(subject.emulator_port) as tee:
                subject.configure(tee)
                fillers = [dice.randbytes(dice.choice([10, 10, 400, 2000])).hex() for _ in range(500)]
                load = Load(tee, subject.http_port, subject.stream_port, pause_s=0.01, fillers=fillers)
                try:
                    async with load.running():
                        await _full(subject, tee, load, disk, summary, rounds, dice)
                        _make_roomy(disk)
                        await _failing(subject, tee, load, summary, calls, dice)
                finally:
                    if subject.daemon is not None:
                        await subject.kill(tee)
    summary.drain_s.sort()
    return summary


async def _full(
    subject: Subject, tee: Tee, load: Load, disk: Path, summary: Summary, rounds: int, dice: random.Random
) -> None:
    while summary.rounds < rounds and not summary.problems:
        subject.start(tee.ledger)
        for _ in range(min(_PER_VERDICT, rounds - summary.rounds)):
            subject.script(Faults.outage())
            before = tee.ledger.acked
            load.open.set()
            await _taken(subject, tee, before)
            await asyncio.sleep(dice.uniform(0, 0.5))
            fill(disk)
            before = tee.ledger.acked
            await asyncio.sleep(dice.uniform(0.2, 1.0))
            # Nothing was taken in the second half: the doors were shut.
            refused = tee.ledger.acked == before
            for _ in range(100):
                if refused:
                    break
                before = tee.ledger.acked
                await asyncio.sleep(0.1)
                refused = tee.ledger.acked == before
            summary.refused += refused
            load.open.clear()
            subject.script(Faults())
            started = time.monotonic()
            await subject.drained()
            summary.drain_s.append(time.monotonic() - started)
            if not (disk / "filler").stat().st_size:
                summary.problems.append("the disk was never full: this shows nothing")
            (disk / "filler").unlink()
            summary.rounds += 1
        # What the kernel still holds of the load would be taken, unacked, while the books are compared.
        await subject.kill(tee)
        subject.start(tee.ledger)
        summary.problems += await verdict(subject, tee, summary.totals)
        print(f"full {summary.rounds} times", file=sys.stderr, flush=True)


async def _taken(subject: Subject, tee: Tee, before: int) -> None:
    """Returns when events are acked by any door. Raises BenchError, with what the daemon says, if it dies or none are."""
    until = time.monotonic() + _LIFE_S * 3
    while tee.ledger.acked <= before:
        subject.must_live()
        if time.monotonic() > until:
            assert subject.daemon is not None
            status = await asyncio.to_thread(get, subject.admin_port, "/api/status")
            raise BenchError(f"no event is taken: {status!r}\n{subject.daemon.last_words()}")
        await asyncio.sleep(0.05)


async def _failing(
    subject: Subject, tee: Tee, load: Load, summary: Summary, calls: dict[str, int], dice: random.Random
) -> None:
    plan = [(kind, at) for kind, most in calls.items() for at in range(1, most + 1)]
    while plan and not summary.problems:
        subject.script(Faults.seeded(dice.randrange(10**6)))
        for kind, at in plan[:_PER_VERDICT]:
            load.open.set()
            await _life(subject, tee, load, summary, kind, at)
        del plan[:_PER_VERDICT]
        load.open.clear()
        subject.program = ["-m", "bridged"]
        subject.start(tee.ledger)
        summary.problems += await verdict(subject, tee, summary.totals)
        print(f"EIO in {summary.struck} lives", file=sys.stderr, flush=True)


async def _life(subject: Subject, tee: Tee, load: Load, summary: Summary, kind: str, at: int) -> None:
    """One life, up to its error."""
    subject.program = ["-m", "bench.faulty", str(at), kind]
    subject.start(tee.ledger)
    daemon = subject.daemon
    assert daemon is not None
    until, struck_at = time.monotonic() + _LIFE_S, 0.0
    while daemon.process.poll() is None:
        now = time.monotonic()
        if not struck_at and faulty.STRUCK in daemon.last_words():
            struck_at = now
            load.first_ack.clear()
        # One that takes events after the error has met it in something else than the spool.
        if now > until or (struck_at and load.first_ack.is_set() and now > struck_at + 2.0):
            break
        await asyncio.sleep(0.01)
    code, words = daemon.process.poll(), daemon.last_words()
    summary.lives += 1
    summary.struck += faulty.STRUCK in words
    if code is None:
        if faulty.STRUCK in words:
            summary.survived.append(f"{kind} {at}: {words[words.index(faulty.STRUCK) :].splitlines()[0]}")
        await subject.kill(tee)
        return
    if code != _EXIT_IO or faulty.STRUCK not in words:
        summary.problems.append(f"with the {kind} {at} failing it ended with exit code {code}:\n{words}")
    await subject.kill(tee)


def main(argv: Sequence[str]) -> int:
    """Runs it, prints a summary; 1 if anything was lost or wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench disk", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=200, help="of a full disk (%(default)s)")
    parser.add_argument(
        "--calls", type=int, default=250, help="k up to which writes, and then fsyncs, fail (%(default)s)"
    )
    parser.add_argument("--mib", type=int, default=32, help="of the disk (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default %(default)s")
    arguments = parser.parse_args(argv)
    if arguments.calls and not faulty.available():
        raise BenchError("fiu-utils isn't installed: apt-get install fiu-utils, or go without (--calls 0)")
    started = time.monotonic()
    calls = dict.fromkeys(faulty.CALLS, arguments.calls)
    with ended_by_signals(), folder() as where:
        summary = asyncio.run(
            torment(where, rounds=arguments.rounds, calls=calls, seed=arguments.seed, mib=arguments.mib)
        )
    print(summary.text(arguments.seed, time.monotonic() - started))
    return 1 if summary.problems else 0
