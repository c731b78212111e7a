"""Opens what a power cut could have left: crash images, made from a recorded write log of the real spool.

    record    a spool commits, settles, shrinks, closes and opens under strace: every write, truncation, fsync, creation and
              removal of its files, and between them, in order, what it had promised by then
    make      at any point of that log: what was synced is there; of what wasn't, any part: each write whole, torn at 512
              bytes, or missing, each truncation done or not, creations and removals up to any point
    open      by the real spool: it opens, integrity_check is content, the books are right, no row is damaged, every batch
              that was acked and not settled is there, and none that was settled is

What is in shared memory (-shm) is rubbish after a power cut, and is rubbish here.
"""

import argparse
import asyncio
import contextlib
import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, Final, Literal

from msgspec import Struct

from bench.processes import PROJECT, BenchError, ended_by_signals, folder
from bridged.app import TYPE_NAMES
from bridged.backlog import spool as spools
from bridged.backlog.segment import Batch, Segment, lines
from bridged.backlog.spool import DeadLetter, Intaken, Settlement, Spool, SpoolOptions

_SECTOR: Final = 512
_MAX_BYTES: Final = 64 * 2**20
_NAME: Final = "spool.db"
_CODE: Final = 3
_OURS: Final = (signal.SIGINT, signal.SIGHUP)
_TRACED: Final = "pwrite64,write,fdatasync,fsync,ftruncate,openat,unlink"
# Ways to change a file that the model doesn't know: a log that holds one can't be used.
_UNKNOWN: Final = "fallocate,rename,renameat,renameat2,pwritev,pwritev2,writev,truncate,msync,link"

# -- record ------------------------------------------------------------------------------------------------------------


def _mark(what: str, numbers: Sequence[int]) -> None:
    os.write(1, f"{what} {' '.join(map(str, numbers))}\n".encode())


def _numbers(segments: Sequence[Segment]) -> list[int]:
    return sorted({int(line.split(b" ", 1)[0]) for line in lines(segments)})


class _Recorder:
    """A spool that is used as the daemon uses it, and what it promises, told on standard output before or after."""

    def __init__(self, options: SpoolOptions, seed: int) -> None:
        self.dice = random.Random(seed)
        self.options = options
        self.number = 0
        self.there: list[Segment] = []

    async def run(self, commits: int) -> None:
        while commits > 0:
            async with Spool(self.options, TYPE_NAMES) as spool:
                spool.committed = self.there.extend
                # Smaller steps than the daemon's: more checkpoints, and space given back, in a log that is short.
                pages = self.dice.choice([8, 16, 64])
                await spool.run(lambda db, pages=pages: db.execute(f"PRAGMA wal_autocheckpoint = {pages}").fetchall())
                for _ in range(min(commits, self.dice.randrange(20, 200))):
                    await self._commit(spool)
                    commits -= 1

    async def _commit(self, spool: Spool) -> None:
        dice = self.dice
        futures = []
        acked = []
        for _ in range(dice.choice([0, 1, 1, 1, 3])):
            number, self.number = self.number, self.number + 1
            size = dice.choice([10, 100, 3000, 30_000])
            body = b"%d %b\n" % (number, dice.randbytes(size // 2).hex().encode())
            bad = dice.randrange(10) == 0
            letter = DeadLetter(_CODE, "", "door", "no", body)
            _mark("appending", [number])
            if bad:
                _mark("letters", [number])
            intaken = Intaken(dead_letters=[letter]) if bad else Intaken([Batch(body, bytes([_CODE]))])
            futures.append(spool.append(intaken))
            acked.append(number)
        settled: list[Segment] = []
        if len(self.there) > dice.choice([5, 15, 60]):
            settled = dice.sample(self.there, dice.randrange(1, len(self.there)))
            _mark("settling", _numbers(settled))
            codes = b"".join(segment.codes for segment in settled)
            spool.settle(Settlement(settled, delivered=codes))
        for future in futures:
            await future
        if acked:
            _mark("acked", acked)
        while spool.unsettled_bytes:
            await asyncio.sleep(0)
        if settled:
            gone = {segment.id for segment in settled}
            self.there[:] = [segment for segment in self.there if segment.id not in gone]
            _mark("settled", _numbers(settled))
        if dice.randrange(12) == 0:
            await spool._shrink()  # noqa: SLF001  # as after a second without work
        if dice.randrange(60) == 0:
            _mark("purging", [])
            await spool.purge("1", ())


def record_here(path: str, synchronous: Literal["FULL", "NORMAL"], commits: int, seed: int) -> None:
    """Runs in a process of its own, under strace."""
    spools._KEPT_FREE_PAGES = spools._SHRINK_PAGES = 4  # noqa: SLF001  # of 512
    options = SpoolOptions(path=path, max_bytes=_MAX_BYTES, synchronous=synchronous)
    asyncio.run(_Recorder(options, seed).run(commits))


class Op(Struct):
    """A line of the log."""

    kind: Literal["write", "sync", "truncate", "create", "unlink", "folder", "mark"]
    name: str = ""  # of the file
    at: int = 0  # offset, or size
    data: bytes = b""


def record(where: Path, commits: int, seed: int, synchronous: Literal["FULL", "NORMAL"] = "FULL") -> list[Op]:
    """The log of a run of so many commits; its files stay in `recorded`. Raises BenchError where strace can't be used."""
    spool, trace = where / "recorded" / _NAME, where / "trace"
    spool.parent.mkdir()
    arguments = ["strace", "-f", "--seccomp-bpf", "-y", "-xx", "-s", "70000", "-e", f"trace={_TRACED},{_UNKNOWN}"]
    arguments += ["-e", "signal=none", "-o", str(trace), sys.executable, "-m", "bench.images"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(
            [*arguments, str(spool), synchronous, str(commits), str(seed)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise BenchError("strace isn't installed: it records what the spool writes") from error
    if done.returncode:
        raise BenchError(f"the recorded spool ended with {done.returncode}: {done.stderr[-2000:]}")
    with trace.open("rb") as file:
        ops = list(read(file, spool))
    trace.unlink()
    return ops


_CALL = re.compile(rb"(\d+) +(?:<\.\.\. )?(\w+)(?: resumed>)?")
_PATH = re.compile(rb"\d+<((?:\\x[0-9a-f]{2})*)>")
_QUOTED = re.compile(rb'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')


def _bytes(escaped: bytes) -> bytes:
    return bytes.fromhex(escaped.replace(b"\\x", b"").decode())


def read(trace: Any, spool: Path) -> Iterator[Op]:
    """What a trace tells about the files of a spool. A write counts from its beginning, a sync from its end."""
    parent, there = os.fsencode(spool.parent), set[str]()
    names = {os.fsencode(spool.parent / name): name for name in (_NAME, f"{_NAME}-wal", f"{_NAME}-journal")}
    begun: dict[bytes, bytes] = {}
    for line in trace:
        found = _CALL.match(line)
        if found is None:
            continue
        process, call = found[1], found[2]
        resumed = b" resumed>" in line[:60]
        unfinished = line.rstrip().endswith(b"<unfinished ...>")
        if resumed:
            line = begun.pop(process) + line  # noqa: PLW2901  # the whole call
        elif unfinished:
            begun[process] = line
        ends = not unfinished
        failed = ends and re.search(rb"\) += -1 ", line) is not None
        if call in {b"write", b"pwrite64"} and not resumed:
            path, data = _PATH.search(line), _QUOTED.search(line)
            assert path is not None
            assert data is not None
            file = names.get(_bytes(path[1]))
            if line.split(b"(", 1)[1].startswith(b"1<"):
                yield Op("mark", data=_bytes(data[1]))
            elif file:
                if data[2] or failed or call == b"write":
                    raise BenchError(f"the trace has a write that can't be replayed: {line[:200]!r}")
                yield Op("write", file, int(re.split(rb"[,) ]+", line[data.end() :])[2]), _bytes(data[1]))
        elif failed or (unfinished and call != b"ftruncate") or (resumed and call == b"ftruncate"):
            continue
        elif call in {b"fsync", b"fdatasync"}:
            path = _PATH.search(line)
            assert path is not None
            if _bytes(path[1]) == parent:
                yield Op("folder")
            elif file := names.get(_bytes(path[1])):
                yield Op("sync", file)
        elif call == b"ftruncate":
            path = _PATH.search(line)
            assert path is not None
            if file := names.get(_bytes(path[1])):
                yield Op("truncate", file, int(re.split(rb"[,) ]+", line[path.end() :])[1]))
        elif call in {b"openat", b"unlink"}:
            path = _QUOTED.search(line)
            assert path is not None
            file = names.get(_bytes(path[1]))
            if file and call == b"unlink":
                there.discard(file)
                yield Op("unlink", file)
            elif file and b"O_CREAT" in line and file not in there:
                there.add(file)
                yield Op("create", file)
        elif os.fsencode(spool.name) in _unescaped(line).replace(os.fsencode(f"{spool.name}.reserve"), b""):
            raise BenchError(f"the trace has a call that the model doesn't know: {line[:200]!r}")


def _unescaped(line: bytes) -> bytes:
    return re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), line[:4000])


# -- make --------------------------------------------------------------------------------------------------------------


class File(Struct, eq=False):
    """An inode: what is synced, and what happened to it since."""

    durable: bytearray
    pending: list[Op]


def apply(content: bytearray, op: Op, sectors: Sequence[bool] | None = None) -> None:
    """Carries out a write or a truncation; of a torn write only some sectors."""
    if op.kind == "truncate":
        if op.at < len(content):
            del content[op.at :]
        else:
            content.extend(bytes(op.at - len(content)))
        return
    for n, at in enumerate(range(0, len(op.data), _SECTOR)) if sectors is not None else [(0, 0)]:
        if sectors is not None and not sectors[n]:
            continue
        piece = op.data if sectors is None else op.data[at : at + _SECTOR]
        start = op.at + at
        if start > len(content):
            content.extend(bytes(start - len(content)))
        content[start : start + len(piece)] = piece


class Promised(Struct):
    """What the spool had said by a moment, in numbers of batches."""

    appending: set[int]
    acked: set[int]
    settling: set[int]
    settled: set[int]
    letters: set[int]
    purging: set[int]

    def hear(self, mark: bytes) -> None:
        """One line of what it said."""
        what, *numbers = mark.split()
        getattr(self, what.decode()).update(map(int, numbers))
        if what == b"purging":
            self.purging |= self.letters


class Machine:
    """The files as the log goes on, and what a cut could leave of them."""

    def __init__(self) -> None:
        self.promised = Promised(set(), set(), set(), set(), set(), set())
        self._files: dict[str, File] = {}
        self._durable: dict[str, File] = {}  # names that are synced
        self._changes: list[tuple[str, File | None]] = []  # to names, since then

    def step(self, op: Op) -> None:
        """The next line of the log."""
        match op.kind:
            case "mark":
                for mark in op.data.splitlines():
                    self.promised.hear(mark)
            case "create":
                self._files[op.name] = File(bytearray(), [])
                self._changes.append((op.name, self._files[op.name]))
            case "unlink":
                del self._files[op.name]
                self._changes.append((op.name, None))
            case "folder":
                self._durable = dict(self._files)
                self._changes.clear()
            case "sync":
                file = self._files[op.name]
                for pending in file.pending:
                    apply(file.durable, pending)
                file.pending.clear()
            case _:
                self._files[op.name].pending.append(op)

    def image(self, dice: random.Random) -> dict[str, bytes]:
        """What could be on the disk if the power were cut now."""
        names: dict[str, File | None] = dict(self._durable)
        names.update(self._changes[: dice.randint(0, len(self._changes))])
        # What is kept of everything that wasn't synced: nothing, all, or anything.
        keep = dice.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        torn = dice.choice([0.0, 0.2, 1.0])
        made = {}
        for name, file in names.items():
            if file is not None:
                content = bytearray(file.durable)
                for op in file.pending:
                    if dice.random() < keep:
                        apply(content, op, _tear(op, dice) if op.kind == "write" and dice.random() < torn else None)
                made[name] = bytes(content)
        if _NAME in made and dice.random() < 0.3:
            made[f"{_NAME}-shm"] = dice.randbytes(32768)
        return made


def _tear(op: Op, dice: random.Random) -> list[bool]:
    count = -(-len(op.data) // _SECTOR)
    if dice.random() < 0.5:
        kept = dice.randint(0, count)
        return [n < kept for n in range(count)]
    return [dice.random() < 0.5 for _ in range(count)]


# -- open --------------------------------------------------------------------------------------------------------------


def _put(where: Path, image: dict[str, bytes]) -> None:
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir(parents=True)
    for name, content in image.items():
        (where / name).write_bytes(content)


async def opened(where: Path, image: dict[str, bytes], promised: Promised) -> list[str]:
    """Opens an image as a start of the daemon does; gives what is wrong with it."""
    _put(where, image)
    wrong = []
    async with Spool(SpoolOptions(path=str(where / _NAME), max_bytes=_MAX_BYTES), TYPE_NAMES) as spool:
        segments, _ = await spool.read_after(0, 2**40)
        numbers = _numbers(segments)

        def rest(db: Any) -> tuple[str, list[bytes]]:
            letters = [event for (event,) in db.execute("SELECT event FROM dead_letters")]
            return db.execute("PRAGMA integrity_check").fetchone()[0], letters

        integrity, letters = await spool.run(rest)
        there = {*numbers, *(int(letter.split(b" ", 1)[0]) for letter in letters)}
        if integrity != "ok":
            wrong.append(f"integrity_check: {integrity}")
        if spool.damaged:
            wrong.append(f"{spool.damaged} damaged rows")
        if problems := spool.accounts.problems(TYPE_NAMES):
            wrong.append(f"the books: {problems}")
        if len(promised.acked) > spool.accounts.total("accepted"):
            wrong.append(f"{spool.accounts.total('accepted')} accepted, {len(promised.acked)} acked")
    lost = promised.acked - promised.settling - promised.purging - there
    if lost:
        wrong.append(f"{len(lost)} acked batches are lost: {sorted(lost)[:5]}")
    if back := there & promised.settled:
        wrong.append(f"{len(back)} settled batches are back: {sorted(back)[:5]}")
    if strange := there - promised.appending:
        wrong.append(f"batches that nobody appended: {sorted(strange)[:5]}")
    return wrong


class Summary(Struct):
    """What came of it."""

    images: int
    problems: list[str]


async def check(ops: Sequence[Op], images: int, seed: int, where: Path) -> Summary:
    """Makes so many images, spread evenly over the log, and opens them."""
    dice = random.Random(seed)
    machine, summary = Machine(), Summary(0, [])
    for at, op in enumerate(ops, 1):
        machine.step(op)
        due = images * at // len(ops)
        while summary.images < due and len(summary.problems) < 20:
            summary.images += 1
            image = machine.image(dice)
            try:
                wrong = await opened(where / "image", image, machine.promised)
            except Exception as error:
                wrong = [f"it doesn't open: {error!r}"]
            summary.problems += [f"seed {seed}, image {summary.images} after call {at}: {text}" for text in wrong]
    return summary


def fast_folder() -> str | None:
    """Where images are quickest to write: they are as good in memory as anywhere."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _check_in_process(job: tuple[list[Op], int, int, Path]) -> Summary:
    ops, images, seed, where = job
    mine = where / str(seed)
    mine.mkdir()
    try:
        return asyncio.run(check(ops, images, seed, mine))
    finally:
        shutil.rmtree(mine)


@contextlib.contextmanager
def _pool(processes: int) -> Iterator[Pool]:
    """Processes that leave a terminal's signals to us: for one that ended by itself the pool might wait for ever."""
    resource_tracker.ensure_running()  # its start would let them through again
    signal.pthread_sigmask(signal.SIG_BLOCK, _OURS)
    try:
        pool = multiprocessing.get_context("spawn").Pool(processes)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OURS)
    try:
        with pool:
            yield pool
    finally:
        pool.join()


def shares(of: int, among: int) -> list[int]:
    """As even as can be, and not one is lost."""
    return [of * (at + 1) // among - of * at // among for at in range(among)]


def main(argv: Sequence[str]) -> int:
    """Records, makes, opens, prints a summary; 1 if an image was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench images", description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=100_000, help="default %(default)s")
    parser.add_argument("--commits", type=int, default=2000, help="of the recorded run (%(default)s)")
    parser.add_argument("--runs", type=int, default=10, help="recorded runs, among which they are shared (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default %(default)s")
    arguments = parser.parse_args(argv)
    started, images, problems, calls = time.monotonic(), 0, list[str](), 0
    processes = os.cpu_count() or 1
    with ended_by_signals(), folder() as where, contextlib.ExitStack() as stack:
        fast = stack.enter_context(tempfile.TemporaryDirectory(prefix="bridged-images-", dir=fast_folder()))
        pool = stack.enter_context(_pool(processes))
        for run, share in enumerate(shares(arguments.images, arguments.runs)):
            # A log is held in memory as a whole, so each run is a part of the commits.
            ops = record(where, max(1, arguments.commits // arguments.runs), arguments.seed * 1000 + run)
            shutil.rmtree(where / "recorded")
            calls += len(ops)
            seeds = itertools.count((arguments.seed * 1000 + run) * 100)
            jobs = [(ops, most, next(seeds), Path(fast)) for most in shares(share, processes)]
            for summary in pool.imap_unordered(_check_in_process, jobs):
                images += summary.images
                problems += summary.problems
            print(f"{images} images, {len(problems)} problems, {time.monotonic() - started:.0f} s", flush=True)
    print(
        f"{images} crash images of {calls} recorded calls ({arguments.commits} commits), seed {arguments.seed}: ",
        end="",
    )
    print("all open, nothing acked is missing" if not problems else f"{len(problems)} problems")
    print("\n".join(problems[:20]))
    return 1 if problems else 0


if __name__ == "__main__":
    record_here(sys.argv[1], "NORMAL" if sys.argv[2] == "NORMAL" else "FULL", int(sys.argv[3]), int(sys.argv[4]))
