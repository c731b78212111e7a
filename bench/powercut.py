"""Cuts the power under the daemon, again and again, under load from both doors; then counts. Needs root.

The spool lies on an ext4 of its own, on a loop device. The cut is ext4's own shutdown (EXT4_IOC_SHUTDOWN with
NOLOGFLUSH, which file system developers test crash consistency with): from that moment on nothing reaches the device, and
what was only in the page cache or in the journal's memory is gone. The ledger lies elsewhere. After each cut the disk is
mounted again and looked at before the daemon is: every acked event must be in the file, or have been delivered.

The control is the same loop with the same daemon, but for `synchronous=NORMAL`: it must lose something.
"""

import argparse
import asyncio
import contextlib
import fcntl
import os
import random
import shutil
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, Self

import msgspec
from msgspec import Struct

from bench.ledger import BAD_NUMBER, NUMBER, Faults, Load, Subject, Tee, Totals, verdict
from bench.processes import BenchError, ended_by_signals, folder
from bridged.backlog.segment import Segment, lines
from bridged.backlog.tables import SEGMENT_COLUMNS

_SHUTDOWN: Final = 0x8004587D  # _IOR('X', 125, __u32)
_NO_LOG_FLUSH: Final = struct.pack("I", 2)
_START_S = 30.0
_PER_ROUND = 25
# So long after the last commit the spool begins to give space back; the cut falls around it.
_IDLE_S = 1.0


class Disk:
    """An ext4 of its own whose power can be cut. Raises BenchError where there are no loop devices to be had."""

    def __init__(self, where: Path, mib: int = 192) -> None:
        self.path = where / "disk"
        self._image = where / "disk.img"
        self._mib = mib
        self._device = ""

    def __enter__(self) -> Self:
        self.path.mkdir()
        with self._image.open("wb") as file:
            file.truncate(self._mib * 2**20)
        _command("mkfs.ext4", "-q", "-F", str(self._image))
        self._device = _command("losetup", "--find", "--show", str(self._image)).strip()
        try:
            _command("mount", self._device, str(self.path))
        except BaseException:
            _command("losetup", "--detach", self._device)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(BenchError):  # if it is mounted at all
            _command("umount", str(self.path))
        _command("losetup", "--detach", self._device)
        self._image.unlink()

    def cut(self) -> None:
        """From now on nothing reaches the device."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, _NO_LOG_FLUSH)
        finally:
            os.close(descriptor)

    def power_on(self) -> None:
        """Mounts it again, as a machine does that starts. Nobody may have a file open on it."""
        _command("umount", str(self.path))
        _command("mount", self._device, str(self.path))


def _command(*arguments: str) -> str:
    # Who has become root by `su` may have nobody's PATH.
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    try:
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, timeout=60)
    except FileNotFoundError as error:
        raise BenchError(f"{arguments[0]} isn't installed: apt-get install e2fsprogs mount") from error
    if done.returncode:
        raise BenchError(f"{' '.join(arguments)}: {done.stderr.strip()} (root and loop devices are needed)")
    return done.stdout


class Look(Struct):
    """What is in a spool's files, without touching them."""

    numbers: set[int]
    integrity: str
    checkpoints: int  # the WAL's own count


def look(spool: Path, beside: Path) -> Look:
    """Reads a copy of a spool."""
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    wal = spool.with_name(spool.name + "-wal")
    for file in (spool, wal):
        if file.exists():
            shutil.copy(file, beside)
    head = (beside / wal.name).read_bytes()[:32] if wal.exists() else b""
    with contextlib.closing(sqlite3.connect(beside / spool.name)) as db:
        integrity = str(db.execute("PRAGMA integrity_check").fetchone()[0])
        try:
            rows = db.execute(f"SELECT {SEGMENT_COLUMNS} FROM segments").fetchall()
            letters = [body for (body,) in db.execute("SELECT event FROM dead_letters")]
        except sqlite3.OperationalError as error:
            if "no such table" not in str(error):
                raise
            rows = letters = []  # the cut took the very first commits: everything is lost, which is for others to judge
    numbers = set()
    for *columns, checksum in rows:
        segment = Segment(*columns)
        if segment.checksum == checksum:
            numbers |= {int(found[1], 16) for line in lines([segment]) if (found := NUMBER.search(line))}
    numbers |= {int(found[1], 16) for body in letters if (found := BAD_NUMBER.search(body))}
    return Look(numbers, integrity, struct.unpack(">I", head[12:16])[0] if len(head) == 32 else 0)


class Summary(Struct):
    """What came of it."""

    cuts: int
    checkpointed: int  # cuts before which the WAL was started anew, since the cut before
    vacuumed: int  # cuts while space was being given back
    totals: Totals
    lost: int  # acked, and not on the disk after a cut
    problems: list[str]

    def text(self, synchronous: str, seed: int, seconds: float) -> str:
        """For people."""
        totals = self.totals
        kinds = f"{self.checkpointed} with a checkpoint since the cut before, {self.vacuumed} around a vacuum"
        books = f"delivered {totals.stored}, dead letters {totals.dead}"
        return "\n".join(
            [
                f"synchronous={synchronous}: {self.cuts} power cuts in {seconds:.0f} s, seed {seed} ({kinds})",
                f"acked {totals.acked} of {totals.sent} events sent: lost {self.lost}; {books}",
                *[f"PROBLEM: {problem}" for problem in self.problems],
            ]
        )


class _Scene(Struct):
    disk: Disk
    subject: Subject
    tee: Tee
    load: Load
    dice: random.Random
    summary: Summary
    most_s: float
    checkpoints: int = 0


async def torment(
    where: Path,
    cuts: int,
    seed: int,
    synchronous: Literal["FULL", "NORMAL"] = "FULL",
    *,
    most_s: float = 0.6,
    every_vacuum: int = 25,
) -> Summary:
    """Cuts so many times; with NORMAL until the first loss. One in `every_vacuum` falls while space is given back."""
    dice = random.Random(seed)
    # Large and incompressible ones fill the WAL and bring checkpoints.
    fillers = [dice.randbytes(dice.choice([10, 10, 500, 1000])).hex() for _ in range(500)]
    summary = Summary(0, 0, 0, Totals(), 0, [])
    with Disk(where) as disk:
        subject = Subject(where, disk.path / "spool.db")
        if synchronous != "FULL":
            subject.program = ["-m", "bench.powercut", synchronous]
        with subject.start_emulator():
            async with Tee(subject.emulator_port) as tee:
                subject.configure(tee, "120MiB")
                load = Load(tee, subject.http_port, subject.stream_port, pause_s=0.01, fillers=fillers)
                scene = _Scene(disk, subject, tee, load, dice, summary, most_s)
                try:
                    async with load.running():
                        while summary.cuts < cuts and not summary.problems:
                            await _life(scene, synchronous, every_vacuum)
                            if synchronous == "FULL" and (summary.cuts % _PER_ROUND == 0 or summary.cuts == cuts):
                                load.open.clear()
                                subject.start(tee.ledger)
                                summary.problems += await verdict(subject, tee, summary.totals)
                                print(f"{summary.cuts} cuts", file=sys.stderr, flush=True)
                finally:
                    if subject.daemon is not None:
                        await subject.kill(tee)
        if synchronous != "FULL":
            summary.totals.acked, summary.totals.sent = tee.ledger.acked, tee.ledger.sent
    return summary


async def _life(scene: _Scene, synchronous: str, every_vacuum: int) -> None:
    subject, load, tee, dice, summary = scene.subject, scene.load, scene.tee, scene.dice, scene.summary
    vacuum = synchronous == "FULL" and summary.cuts % every_vacuum == every_vacuum - 1
    # What is delivered leaves the disk: only what can't be is a proof.
    outage = vacuum or synchronous != "FULL" or dice.random() < 0.6
    subject.script(Faults.outage() if outage else Faults())
    load.first_ack.clear()
    load.open.set()
    started = subject.start(tee.ledger)
    while not load.first_ack.is_set():
        subject.must_live()
        if time.monotonic() - started > _START_S:
            raise BenchError(f"no event was taken within {_START_S:g} s of the start")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await load.first_ack.wait()
    if vacuum:
        await asyncio.sleep(3.0)
        load.open.clear()
        subject.script(Faults())
        await subject.drained()
        await asyncio.sleep(_IDLE_S + dice.uniform(-0.05, 0.15))
        summary.vacuumed += 1
    else:
        await asyncio.sleep(dice.uniform(0.0, scene.most_s))
    subject.must_live()
    for _ in range(3):
        await asyncio.sleep(0)  # acks that have arrived are read
    scene.disk.cut()
    cut_at = time.monotonic()
    # What was under way goes on for a moment.
    await asyncio.sleep(dice.choice([0.0, 0.02]))
    await subject.kill(tee)
    scene.disk.power_on()
    summary.cuts += 1
    found = await asyncio.to_thread(look, subject.spool, subject.folder / "look")
    summary.checkpointed += found.checkpoints != scene.checkpoints
    scene.checkpoints = found.checkpoints
    if found.integrity != "ok":
        summary.problems.append(f"cut {summary.cuts}: integrity_check says {found.integrity}")
    tee.ledger.withdraw(cut_at, found.numbers)
    if lost := tee.ledger.lost_on(found.numbers):
        summary.lost += len(lost)
        summary.problems.append(f"cut {summary.cuts}: {len(lost)} acked events are not on the disk: {lost[:5]}")


def control(synchronous: Literal["NORMAL"], argv: Sequence[str]) -> int:
    """`bridged` with another `synchronous`, and nothing else that differs."""
    from bridged import cli, options  # noqa: PLC0415  # not of use to who only looks on

    real = options.spool_options
    options.spool_options = lambda config: msgspec.structs.replace(real(config), synchronous=synchronous)
    return cli.main(argv)


def main(argv: Sequence[str]) -> int:
    """Runs both loops, prints a summary; 1 if FULL lost anything, or NORMAL nothing."""
    parser = argparse.ArgumentParser(prog="python -m bench powercut", description=__doc__.partition("\n")[0])
    parser.add_argument("--cuts", type=int, default=500, help="default %(default)s")
    parser.add_argument(
        "--control", type=int, default=20, help="cuts with NORMAL, until something is lost (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="default %(default)s")
    arguments = parser.parse_args(argv)
    failed = False
    synchronous: Literal["NORMAL", "FULL"]
    for synchronous, cuts in (("NORMAL", arguments.control), ("FULL", arguments.cuts)):
        if not cuts:
            continue
        started = time.monotonic()
        with ended_by_signals(), folder() as where:
            summary = asyncio.run(torment(where, cuts, arguments.seed, synchronous))
        print(summary.text(synchronous, arguments.seed, time.monotonic() - started), flush=True)
        if synchronous == "NORMAL":
            failed |= summary.lost == 0
            print("the control lost something: the cut is one" if summary.lost else "PROBLEM: the control lost nothing")
        else:
            failed |= bool(summary.problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(control("NORMAL", sys.argv[2:]))
