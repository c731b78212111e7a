"""Kills the daemon, again and again, under load from both doors and with a Mixpanel that fails; then counts.

Every acked event is delivered or a dead letter; what Mixpanel was sent twice was the same bytes, and not more of it than
was in flight, or answered and not yet recorded, when the daemon died; the books say what happened. The same seed kills
at the same moments.
"""

import argparse
import asyncio
import contextlib
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from bench.ledger import IN_FLIGHT, Faults, Load, Subject, Tee, Totals, verdict
from bench.processes import BenchError, ended_by_signals, folder

_START_S = 30.0
# One kill in so many comes while the daemon starts, and so recovers.
_EVERY_EARLY = 4


class Summary(Struct):
    """What came of it."""

    kills: int
    early: int  # before a door was open
    totals: Totals
    restart_s: list[float]  # from start to the first 200, sorted
    problems: list[str]

    @property
    def allowed(self) -> int:
        """Events that may be doubled: a window in flight a kill, and one that was answered while a commit was under way."""
        return 2 * IN_FLIGHT * self.kills

    def text(self, seed: int, seconds: float) -> str:
        """For people."""
        totals, times = self.totals, self.restart_s or [0.0]
        return "\n".join(
            [
                f"{self.kills} kills ({self.early} of them during start-up) in {seconds:.0f} s, seed {seed}",
                f"acked {totals.acked} of {totals.sent} events sent: lost {totals.lost}",
                f"delivered {totals.stored}, dead letters {totals.dead}; the books agree: {not self.problems}",
                (
                    f"sent again after a kill though Mixpanel had answered: {totals.doubled}, the same bytes (at most "
                    f"{totals.most_doubled} in one life; {IN_FLIGHT} may be in flight)"
                ),
                f"sent again after a fault: {totals.retried}; Mixpanel recognised {totals.repeated} repetitions",
                (
                    f"from start to first 200: p50 {times[len(times) // 2]:.2f} s, p99 {times[len(times) * 99 // 100]:.2f} s, "
                    f"most {times[-1]:.2f} s ({len(times)} starts)"
                ),
                *[f"PROBLEM: {problem}" for problem in self.problems],
            ]
        )


async def torment(
    where: Path, kills: int, seed: int, *, least_s: float, most_s: float, per_round: int = 50, pause_s: float = 0.02
) -> Summary:
    """Kills so many times, at seeded moments after the doors are open or during start-up; judges after every round."""
    dice = random.Random(seed)
    subject = Subject(where, where / "spool.db")
    fillers = [dice.randbytes(dice.choice([10, 10, 10, 400])).hex() for _ in range(500)]
    summary = Summary(0, 0, Totals(), [], [])
    with subject.start_emulator():
        async with Tee(subject.emulator_port) as tee:
            subject.configure(tee)
            load = Load(tee, subject.http_port, subject.stream_port, pause_s=pause_s, fillers=fillers)
            try:
                async with load.running():
                    while summary.kills < kills and not summary.problems:
                        subject.script(Faults.seeded(seed + summary.kills))
                        for _ in range(min(per_round, kills - summary.kills)):
                            await _life(subject, tee, load, dice, summary, (least_s, most_s))
                        load.open.clear()
                        subject.start(tee.ledger)
                        summary.problems += await verdict(subject, tee, summary.totals)
                        print(f"{summary.kills} kills", file=sys.stderr, flush=True)
                    if summary.totals.doubled > summary.allowed:
                        summary.problems.append(f"{summary.totals.doubled} events doubled, {summary.allowed} allowed")
            finally:
                if subject.daemon is not None:
                    await subject.kill(tee)
    summary.restart_s.sort()
    return summary


async def _life(
    subject: Subject, tee: Tee, load: Load, dice: random.Random, summary: Summary, window: tuple[float, float]
) -> None:
    load.first_ack.clear()
    load.open.set()
    started = subject.start(tee.ledger)
    if dice.randrange(_EVERY_EARLY) == 0:
        # From the first instruction to a little after the doors open: imports, recovery, the first commits.
        restart_s = summary.restart_s[-1] if summary.restart_s else 0.5
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(dice.uniform(0.3, 1.1) * restart_s):
                await load.first_ack.wait()
        summary.early += not load.first_ack.is_set()
    else:
        while not load.first_ack.is_set():
            subject.must_live()
            if time.monotonic() - started > _START_S:
                raise BenchError(f"no event was taken within {_START_S:g} s of the start")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await load.first_ack.wait()
        summary.restart_s.append(time.monotonic() - started)
        await asyncio.sleep(dice.uniform(*window))
        subject.must_live()
    await subject.kill(tee)
    summary.kills += 1


def main(argv: Sequence[str]) -> int:
    """Runs it, prints a summary; 1 if anything was lost or wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench crash", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=1000, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default %(default)s")
    parser.add_argument(
        "--least", type=float, default=0.2, help="seconds of load before a kill, at least (%(default)s)"
    )
    parser.add_argument("--most", type=float, default=3.0, help="and at most (%(default)s)")
    parser.add_argument(
        "--pause", type=float, default=0.02, help="seconds between two requests of the load (%(default)s)"
    )
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    with ended_by_signals(), folder() as where:
        summary = asyncio.run(
            torment(
                where,
                arguments.kills,
                arguments.seed,
                least_s=arguments.least,
                most_s=arguments.most,
                pause_s=arguments.pause,
            )
        )
    print(summary.text(arguments.seed, time.monotonic() - started))
    return 1 if summary.problems else 0
