"""The spool: everything that waits, in one SQLite file. One task writes, one thread executes, every commit is fsynced.

    append() and settle() put work on a list; the writer takes all of it at once, one transaction, one fsync; then the futures
    of append() are done, and the doors may ack. While it commits, the next list grows: that is the group commit.

Why it is as it is:
- One connection does all writes and every checkpoint: SQLite before 3.51.3 can corrupt a WAL that two connections reset at once.
- Few, large statements: each one gives the interpreter lock away and has to win it back from a busy loop.
- The books are one row, written by the commit whose events they count, so that they are true after any crash.
- A failed fsync is never retried on the same connection: what is in the page cache after it can't be trusted. The spool
  fails, the process ends, and start-up, which is recovery, reads what is really on disk.
- The writer ends by a message, never by cancellation: a cancelled await doesn't stop a statement.
"""

import asyncio
import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar

import aiosqlite
import structlog
from msgspec import Struct, structs

from bridged.backlog import salvage, tables
from bridged.backlog.accounts import Accounts, changes
from bridged.backlog.company import Company
from bridged.backlog.placement import Placement
from bridged.backlog.records import DeadLetter, DeadLetterRow, Intaken, Settlement, Stage, Work
from bridged.backlog.reserve import Reserve, reserve_of, within_file_limit
from bridged.backlog.segment import Batch, Packer, Segment, cut
from bridged.backlog.tables import NONE, SEGMENT_COLUMNS, Letters
from bridged.backlog.witness import Witness
from bridged.errors import SpoolError, SpoolFull, is_locked, whose
from bridged.presence import LINKED, Presence, claim, demand_alone, demand_regular, other_names

__all__ = ["DeadLetter", "DeadLetterRow", "Intaken", "Settlement", "Spool", "SpoolOptions", "Stage"]

log = structlog.get_logger()

_IDLE_S = 1.0
_MOMENT_S = 0.001  # as fine as the loop's clock
# New events of one commit, if more are waiting: few enough that it is done before the doors fill what may wait meanwhile.
_COMMIT_BYTES = 8 * 2**20
# What is waiting for the writer, beyond which the doors pause: the commit that is being written, and more than the next.
_MAX_PENDING_BYTES = 24 * 2**20
# Free space kept in the file, for the next burst; and what is given back at a time, while nothing else is to be done.
_KEPT_FREE_PAGES = 16 * 2**20 // tables.PAGE_BYTES
_SHRINK_PAGES = 16 * 2**20 // tables.PAGE_BYTES
# After so many seconds without anything to do no burst is expected: all of it is given back.
_QUIET_S = 10
# What waits for a commit where little comes.
_LITTLE_BYTES = 2**16
# The file is measured again when so much came or went: rows don't fill their pages, some only half.
_MEASURE_BYTES = 2**20
# Dead letters may take a quarter of the file: however large they are, they must not close the doors.
_LETTERS_SHARE = 4

T = TypeVar("T")


class SpoolOptions(Struct, frozen=True, kw_only=True):
    """How large, and how cut."""

    path: str
    max_bytes: int = 10 * 2**30
    max_dead_letters: int = 1_000_000
    max_segment_events: int = 2000
    max_segment_bytes: int = 2_000_000
    # FULL is the promise. NORMAL and OFF exist as controls: to show what they lose, and what FULL costs.
    synchronous: Literal["FULL", "NORMAL", "OFF"] = "FULL"


class Spool:
    """The SQLite file and its writer. The doors ask `room`, `near_cap`, `refusal`; the path is `append`, `settle`, `cut_at`."""

    def __init__(
        self,
        options: SpoolOptions,
        names: Mapping[int, str],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.accounts = Accounts()  # true as of the last commit
        # Set by the backlog: new segments, and the parts of ones that were too large. Ids rise from each call to the next.
        self.committed: Callable[[list[Segment]], None] = lambda _segments: None
        self.parted: Callable[[list[Segment], list[Any]], None] = lambda _segments, _wholes: None
        self.settled: Callable[[], None] = lambda: None  # settlements were committed
        self.commits = 0
        self._company = Company()
        self._placement = Placement()
        self._gathered: asyncio.Future[None] | None = None  # what the writer waits for before a commit
        self.commit_seconds = 0.0
        self.damaged = 0  # segments that were set aside because their checksum was wrong
        self.missing = 0  # events that an earlier life had accepted, and that the file knew nothing of at the start
        self.set_aside: list[str] = []  # damaged files that salvages have left beside it
        self.dropped_dead_letters = 0
        self.last_id = 0  # of the newest segment
        self.segments = 0  # rows
        self.used_bytes = 0  # of the pages in use: measured, and estimated between two measurements
        self.pending_bytes = 0  # appended, not committed
        self.unsettled_bytes = 0  # settled, not committed: on a full disk that may take long
        self.room = asyncio.Event()  # set: the doors may read on
        self.room.set()
        self._options = options = structs.replace(options, max_bytes=within_file_limit(options.max_bytes))
        self._names = names
        self._clock = clock
        self._max_segment_bytes = options.max_segment_bytes
        self._work = Work()
        self._wake = asyncio.Event()
        self._closing = False
        self._failure: BaseException | None = None
        self._corruption: SpoolError | None = None
        self._unsaved: SpoolFull | None = None  # its files were removed, and what they held can't be saved yet
        self._types_checksum = tables.types_checksum(names)
        self._idle_s = 0.0  # so long nothing was to be done
        self._moved_bytes = 0  # what came and went since the file was measured
        # The connection's thread alone changes it, with each commit: the next one must know what the last one left.
        self._letters = NONE
        self._packer = Packer(options.max_segment_bytes)
        self._letters_cap = Letters(options.max_dead_letters, options.max_bytes // _LETTERS_SHARE)

    # -- opening and closing ------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Opens the file, recovers what it holds, starts the writer. Raises SpoolError."""
        path = Path(self._options.path)
        demand_regular(path, f"the spool {path}", SpoolError)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            hint = whose(error, path, "is the folder there, and writable?")
            raise SpoolError(f"can't open the spool {path}: {error}", hint) from error
        try:
            claim(self._lock, f"the spool {path}", "one daemon a spool: set spool.path", SpoolError)
            if links := other_names(path):
                demand_alone(path, f"the spool {path}", SpoolError)
                log.warning("spool_has_other_names", links=links, spool=str(path), hint=LINKED)
            self._witness = Witness(self._lock)
            self._found = await asyncio.to_thread(salvage.recover, path, self._names, self._witness.known)
            await self._open(path)
            self.set_aside, self.displaced = salvage.files_beside(path)
            self._ask_witness()
        except BaseException:
            os.close(self._lock)
            raise
        self.damaged += self._found.damaged
        if self._letters.exceed(self._letters_cap):
            self.settle(Settlement(()))  # the cap is smaller than it was: the first commit drops what is too much
        self._writer = asyncio.create_task(self._write(), name="spool writer")
        return self

    def _ask_witness(self) -> None:
        """Whether everything is there that was accepted; from now on what there is counts."""
        accepted = self.accounts.total("accepted")
        self.missing = max(0, self._witness.accepted - accepted)
        if self.missing:
            hint = "see the README on what was saved, if it was; or was the WAL cut off, or an old copy put there?"
            log.error("events_missing", events=self.missing, saved=self.displaced, spool=self._options.path, hint=hint)
        self._witness.accepted = accepted
        self._witness.say(salvage.KNOWN)

    async def _open(self, path: Path) -> None:
        try:
            # What is in it is nobody else's business; and a path that can't be had is found out before SQLite is asked.
            # Not before the lock is ours: closing a file drops SQLite's own locks on it, of the whole process.
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            self._reserve = Reserve(path, self._options.max_bytes)
            self._db = await aiosqlite.connect(path, isolation_level=None, cached_statements=64)
        except (OSError, sqlite3.Error) as error:
            hint = whose(error, path, "is it a file, and writable?")
            raise SpoolError(f"can't open the spool {path}: {error}", hint) from error
        try:
            await self.run(self._prepare)
            self._presence = Presence(path, SpoolError)
        except BaseException as error:
            await self._db.close()
            if isinstance(error, sqlite3.Error | OSError):
                hint = whose(error, path, "is its folder writable?")
                raise SpoolError(f"can't open the spool {path}: {error}", hint) from error
            raise

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Runs `function(connection, *args)` on the connection's thread: one hop for a transaction, not one a statement."""
        # Private, but the way of every public call of aiosqlite since its first release; the version is bounded.
        try:
            result: T = await self._db._execute(function, self._db._conn, *args)  # type: ignore[no-untyped-call]  # noqa: SLF001
        except sqlite3.Error as error:
            if tables.is_corrupt(error):
                self._distrust(error)
            raise
        return result

    def _distrust(self, error: sqlite3.Error) -> None:
        """The file isn't what was written: the process ends, and its start, which is recovery, salvages what is intact."""
        log.error("spool_corrupt", error=str(error), spool=self._options.path, hint="it is salvaged by the next start")
        self._witness.say(f"{salvage.DISTRUSTED}: {error}")
        self._corruption = SpoolError(
            f"the spool {self._options.path} is damaged: {error}", "start again: the start salvages what is intact"
        )
        self._wake.set()

    def _prepare(self, db: sqlite3.Connection) -> None:
        """Makes or checks the file and reads what it holds. Runs in the connection's thread, before anything else."""
        options, path = self._options, Path(self._options.path)
        self._placement.adopt()
        tables.set_up(db, options.synchronous, options.max_bytes, self._reserve.wal_bytes)
        tables.migrate(db, path, self._names, tables.MIGRATIONS)
        if self._found.damaged_rows or self._found.strays or self._found.letters:
            salvage.repair(db, self._found)
        tables.adopt_types(db, self._names)
        codes = {name: code for code, name in self._names.items()}
        self.accounts.load(db.execute("SELECT body FROM books").fetchone()[0], codes)
        rows = db.execute("SELECT id, codes FROM segments ORDER BY id")
        # Many at a time: counting costs something for each type that occurs, however few its events are.
        while some := rows.fetchmany(100):
            self.segments, self.last_id = self.segments + len(some), some[-1][0]
            self.accounts.add("waiting", b"".join([codes_ for _, codes_ in some]))
        self._letters = tables.letters_that(db)
        self.used_bytes = tables.measured(db)
        tables.settle_folder(path)  # the WAL is there by now
        if not self._reserve.held:
            self._reserve.give(0)
        if problems := self.accounts.problems(self._names):
            log.error("books_unbalanced", problems=problems[:10], spool=options.path)
        self._look_for_room()

    async def __aexit__(self, kind: type[BaseException] | None, *_exc: object) -> None:
        """Commits what is left, closes the file. Whoever cancels this waits for it: the writer is never cancelled.

        Raises what the writer died of on the way.
        """
        was_well, self._closing = not self.failed, True
        self._wake.set()
        _end(self._gathered)
        closing = asyncio.create_task(self._close(), name="spool closing")
        cancelled = None
        while not closing.done():
            try:
                await asyncio.shield(closing)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled
        if kind is None and was_well and self._failure is not None:
            raise self._failure

    async def _close(self) -> None:
        with contextlib.suppress(BaseException):
            await asyncio.shield(self._writer)
        if not self.failed:  # else the connection can't be trusted
            with contextlib.suppress(sqlite3.Error):
                await self.run(lambda db: db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
        await self._db.close()
        os.close(self._lock)

    async def ended(self) -> None:
        """Returns when the writer has ended as it was told. Raises SpoolError when it died: then the process must end."""
        await asyncio.shield(self._writer)

    @property
    def failed(self) -> bool:
        """Whether the writer has died: nothing can be taken any more, and the process is about to end."""
        return self._failure is not None

    @property
    def progress(self) -> int:
        """Rises with each commit, and with each step in saving files that were removed."""
        return self.commits + self._presence.copied

    async def answer(self) -> None:
        """Comes back when the thread has done what it was busy with; a long copy is well when it gets on."""
        await self._presence.got_on(asyncio.ensure_future(self.run(lambda _db: None)))

    @property
    def max_bytes(self) -> int:
        """What its file may take: as configured, or less where the process may write no larger files."""
        return self._options.max_bytes

    @property
    def dead_letters(self) -> int:
        """How many are kept."""
        return self._letters.rows

    # -- the two verbs of the path ------------------------------------------------------------------------------------

    @property
    def near_cap(self) -> bool:
        """Whether new events are refused, so that there is always room to settle the old ones: in the file and on the disk."""
        if self._unsaved is not None:
            return True
        limit = self._options.max_bytes - reserve_of(self._options.max_bytes)
        return self.used_bytes + self.pending_bytes >= limit or self._reserve.short(self.pending_bytes)

    @property
    def free_bytes(self) -> int:
        """What is free on its disk, besides the reserve, as of the last commit or, when idle, second."""
        return self._reserve.free_bytes

    def refusal(self, size: int = 0) -> SpoolFull:
        """Why new events, of so many bytes, are refused, while they are: which of the two limits it is, with its figures."""
        if self._unsaved is not None:
            return self._unsaved
        options, reserve = self._options, self._reserve
        if reserve.short(self.pending_bytes + size):
            needed = (1 if reserve.held else 2) * reserve.bytes
            return SpoolFull(
                f"the disk of the spool {options.path} is full: {reserve.free_bytes:,} bytes are free,"
                f" {needed:,} are kept to settle what waits",
                "free space on that disk; what waits is delivered meanwhile",
            )
        return SpoolFull(
            f"the spool is near its cap: {self.used_bytes:,} of {options.max_bytes:,} bytes in {options.path}, "
            f"{self.pending_bytes:,} about to be written, {reserve_of(options.max_bytes):,} kept to settle what waits",
            "raise spool.max_bytes, or see why Mixpanel takes nothing",
        )

    def append(self, intaken: Intaken, sender: int = 0) -> "asyncio.Future[None]":
        """Hands events to the writer. The future is done when they are on disk, and fails if they can't be brought there.

        `sender` is the number of a connection. No batch may be larger than a segment. Raises SpoolFull at once when the spool
        is near its cap.
        """
        if self._failure is not None or self._closing:
            raise SpoolError("the spool is closed")
        if self.near_cap and not intaken.replayed:
            self.room.clear()
            raise self.refusal()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._work.intaken.append(intaken)
        self._work.futures.append(future)
        if self._company.join(sender):
            _end(self._gathered)
        self.pending_bytes += intaken.size
        if self.pending_bytes > _MAX_PENDING_BYTES:
            self.room.clear()
        self._wake.set()
        return future

    def settle(self, settlement: Settlement) -> None:
        """Records what became of segments, with the next commit. Until then a crash means that they are sent again."""
        self._work.settlements.append(settlement)
        self.unsettled_bytes += settlement.size
        self._wake.set()

    def cut_at(self, max_bytes: int) -> None:
        """From now on segments hold at most so many uncompressed bytes: Mixpanel said that it takes no more."""
        self._max_segment_bytes = min(self._options.max_segment_bytes, max_bytes)

    @property
    def max_segment_bytes(self) -> int:
        """Uncompressed bytes of a segment at most."""
        return self._max_segment_bytes

    # -- the writer ---------------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        work = Work()
        looked_at = time.monotonic()
        try:
            while not (self._closing and not self._work.intaken and not self._work.settlements):
                self._wake.clear()
                if self._corruption is not None:
                    raise self._corruption  # noqa: TRY301  # what the handler below is for
                if time.monotonic() - looked_at > _IDLE_S:
                    await self._look_after_files()
                    looked_at = time.monotonic()
                if self._work.intaken or self._work.settlements:
                    await self._gather()
                    work = self._next()
                    self._idle_s = 0.0
                    await self._commit(work)
                elif not await self._woken_within(_IDLE_S):
                    self._idle_s += _IDLE_S
                    await self._shrink()
                    self._look_for_room()
            await self._look_after_files()  # a last time: what was removed a moment ago would be gone
        except BaseException as error:
            self._failure = error
            # Nobody else will: neither for what it was committing, nor for what came meanwhile.
            _fail([*work.futures, *self._work.futures], SpoolError(f"the spool's writer has failed: {error}"))
            self.room.set()  # there will be none: who waits for it is told
            raise

    async def _look_after_files(self) -> None:
        """Raises SpoolError when they were removed and saved: then the process ends. While they can't be, for want of room,
        nothing new is taken, what waits is delivered from the file that is open, and with it the copy becomes smaller.
        """
        unsaved = await self.run(self._presence.demand)
        if unsaved:
            hint = "make room there: it is tried again each second; what waits is delivered meanwhile"
            if self._unsaved is None:
                log.error("spool_removed", error=unsaved, waiting=self.accounts.total("waiting"), hint=hint)
            self._unsaved = SpoolFull(unsaved, hint)
            if self._closing or not (self.segments or self._work.intaken or self._work.settlements):
                waiting = self.accounts.total("waiting")
                fate = f"{waiting:,} events that waited are lost" if waiting else "nothing waited any more"
                raise SpoolError(f"{unsaved}; {fate}", "see what does that there, and start again")
        elif self._unsaved is not None:  # somebody has put them back
            self._unsaved = None
        self._look_for_room()
        # Where a few events always come it would never be idle.
        if self.pending_bytes < _LITTLE_BYTES and not self._closing:
            await self._shrink()

    async def _gather(self) -> None:
        """Lets those join the next commit who are about to: a few milliseconds, where there is a crowd."""
        loop = asyncio.get_running_loop()
        while self._company.more_to_come(self.pending_bytes, time.monotonic()) and not self._closing:
            self._gathered = loop.create_future()
            timer = loop.call_later(_MOMENT_S, _end, self._gathered)
            await self._gathered
            timer.cancel()

    def _next(self) -> Work:
        """What one commit takes: all there is, or as much as is good for one, and as the reserve has room for.

        A disk can become full between a commit and the checkpoint that brings it into the file. The ballast must be enough
        for that, or the WAL could never be made short again, and nothing be settled.
        """
        self._company.leave(time.monotonic())
        work, self._work = self._work.divided(self._reserve.commit_bytes, _COMMIT_BYTES)
        return work

    async def _woken_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        return self._wake.is_set()

    async def _commit(self, work: Work) -> None:
        batches = [batch for intaken in work.intaken for batch in intaken.batches]
        size = sum(intaken.size for intaken in work.intaken)
        if work.intaken and self._must_refuse(work, size):
            self.pending_bytes -= size
            _fail(work.futures, self.refusal(size))
            self._look_for_room()
            if work.settlements:
                await self._commit(Work([], [], work.settlements))
            return
        self._placement.place(size + sum([settlement.came_bytes for settlement in work.settlements]))
        try:
            committed = await self.run(self._transact, work, batches)
        except sqlite3.Error as error:
            self.pending_bytes -= size
            passes = tables.passes(error) or await asyncio.to_thread(self._is_out_of_room, error, size)
            hint = await asyncio.to_thread(whose, error, Path(self._options.path), "")
            failure = (SpoolFull if passes else SpoolError)(
                f"can't write the spool {self._options.path}: {error}", hint
            )
            _fail(work.futures, failure)
            if not passes:
                raise failure from error
            if locked := is_locked(error):
                log.warning("spool_locked", error=str(error), hint=hint)
            else:
                await self.run(self._make_room, size)
            self._look_for_room()
            if work.intaken and work.settlements:
                # What was delivered must be recorded before anything else: alone it needs hardly any room.
                await self._commit(Work([], [], work.settlements))
            elif len(work.settlements) > 1 and not locked:
                # Half of it needs half of the room; a checkpoint in between gives it back.
                half = len(work.settlements) // 2
                self._work.settlements[:0] = work.settlements[half:]
                await self._commit(Work([], [], work.settlements[:half]))
            elif not self._closing:  # at the end nobody makes room any more: they are sent again by the next start
                self._work.settlements += work.settlements
                await asyncio.sleep(_IDLE_S)
            return
        segments = committed.segments
        self.accounts = committed.accounts
        self.pending_bytes -= size
        self.last_id += len(segments)
        self.segments += len(segments) - committed.settled
        if committed.settled_twice:
            log.error("books_unbalanced", settled_twice=committed.settled_twice, spool=self._options.path)
        if committed.used_bytes is None:
            self.used_bytes += committed.grown_bytes
            self._moved_bytes += committed.moved_bytes
        else:
            self.used_bytes = committed.used_bytes
            self._moved_bytes = 0
        self.dropped_dead_letters += committed.dropped_dead_letters
        self.commits += 1
        self.commit_seconds += committed.seconds
        self._look_for_room()
        wholes = [settlement.whole for settlement in work.settlements for _ in settlement.parts]
        new = len(segments) - len(wholes)
        if new:
            self.committed(segments[:new])
        if wholes:
            self.parted(segments[new:], wholes)
        if work.settlements:
            self.unsettled_bytes -= sum([settlement.size for settlement in work.settlements])
            self.settled()
        for future in work.futures:
            if not future.done():
                future.set_result(None)
        if self._reserve.short(0):
            # Something else takes the room: now, while there is some, the WAL is brought into the file.
            try:
                await self.run(self._make_room, 0)
            except sqlite3.Error as error:
                raise SpoolError(f"can't write the spool {self._options.path}: {error}") from error
            self._look_for_room()

    def _must_refuse(self, work: Work, size: int) -> bool:
        """Whether the room that new events were let in for is gone: what is left is for settling what waits."""
        needed = size if size > self._reserve.commit_bytes else 0  # one body that is larger than a commit should be
        refused = self._unsaved is not None or self._reserve.short(needed)
        return refused and not all(intaken.replayed for intaken in work.intaken)

    def _look_for_room(self) -> None:
        if not self.near_cap and self.pending_bytes <= _MAX_PENDING_BYTES // 2:
            self.room.set()
        elif self.near_cap:
            self.room.clear()

    def _transact(self, db: sqlite3.Connection, work: Work, batches: list[Batch]) -> "_Committed":
        """One transaction, in the connection's thread. Changes nothing but the file and, at its end, `_letters`."""
        started = time.perf_counter()
        now = self._clock()
        groups = cut(batches, self._options.max_segment_events, self._max_segment_bytes)
        segments = self._packer.pack_all(self.last_id + 1, now, groups)
        # Parts aren't joined again, or a segment that was too large would come back as it was.
        parts = [(part, settled.segments[0]) for settled in work.settlements for part in settled.parts]
        behind = self.last_id + 1 + len(segments)
        # A part is as old as what it is part of: splitting must not put off its expiry.
        segments += [
            self._packer.pack(at, of.created_at, p.ndjson, p.codes) for at, (p, of) in enumerate(parts, behind)
        ]
        letters = [letter for intaken in work.intaken for letter in intaken.dead_letters]
        letters += [letter for settlement in work.settlements for letter in settlement.dead_letters]
        damaged = [segment for settlement in work.settlements if settlement.damaged for segment in settlement.segments]
        gone = [segment for settlement in work.settlements for segment in settlement.segments]
        replayed = {row.id: row for intaken in work.intaken for row in intaken.replayed}
        change = changes(work.intaken, work.settlements)
        went, settled = NONE, 0

        with tables.transaction(db):
            if gone:
                settled = tables.delete_segments(db, gone)
            if replayed:
                there, went = tables.delete_replayed(db, list(replayed))
                # These were accepted long ago, and may have another code today. One that the cap dropped meanwhile stays
                # dead-lettered in the books: it comes as a new event.
                again = bytes([replayed[id_].code for id_ in there])
                change.remove("accepted", again)
                change.remove("dead_lettered", again)
            tables.insert_segments(db, segments)
            accounts = self.accounts.after(change)
            letters += salvage.recount(db, accounts, damaged, self._names) if damaged else ()
            letter_bytes = sum(letter.size for letter in letters)
            came_bytes = sum(segment.size for segment in segments) + letter_bytes
            rows = [(now, now, 1, d.stage, d.code, d.event_type, d.reason[:1000], d.event) for d in letters]
            kept = self._letters.less(went).more(Letters(len(letters), letter_bytes))
            dropped = tables.keep_letters(db, rows, kept, self._letters_room())
            tables.write_books(db, accounts.dump(self._names), self._types_checksum)
            went_bytes = sum(segment.size for segment in gone) + went.bytes + dropped.bytes
            moved_bytes = came_bytes + went_bytes
            used_bytes = tables.measured(db) if self._moved_bytes + moved_bytes > _MEASURE_BYTES else None
        self._letters = kept.less(dropped)
        if work.intaken:
            self._witness.note(accounts.total("accepted"))
        self._reserve.measure()
        seconds = time.perf_counter() - started
        return _Committed(
            segments,
            accounts,
            settled,
            len(gone) - settled,
            came_bytes - went_bytes,
            moved_bytes,
            used_bytes,
            dropped.rows,
            seconds,
        )

    def _letters_room(self) -> Letters:
        """What the dead letters may take: less than their share where it is needed to settle what waits. In the thread."""
        options = self._options
        left = options.max_bytes - reserve_of(options.max_bytes) // 2 - self.used_bytes + self._letters.bytes
        return Letters(self._letters_cap.rows, max(0, min(self._letters_cap.bytes, left)))

    def _is_out_of_room(self, error: sqlite3.Error, size: int) -> bool:
        """Whether a write failed for want of room: SQLite tells a full disk from other errors, but not a full quota."""
        code = getattr(error, "sqlite_errorcode", 0)
        writing = code in {sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE}
        return writing and self._reserve.no_room_for(2 * size)

    def _make_room(self, db: sqlite3.Connection, size: int) -> None:
        """What can be done about a full disk: a checkpoint, which empties the WAL, and if need be without the ballast."""
        path = Path(self._options.path)
        if self._reserve.no_room_for(2 * size):
            pages = db.execute("PRAGMA page_count").fetchone()[0]
            size_on_disk = path.stat().st_size if path.exists() else 0
            self._reserve.release(max(0, pages * tables.PAGE_BYTES - size_on_disk))
        try:
            # Not cut: its blocks are what the next settlements are written to.
            db.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
        except sqlite3.Error as error:
            if not (tables.passes(error) or self._is_out_of_room(error, size)):
                raise
        self._reserve.measure()

    async def _shrink(self) -> None:
        """Looks for room on the disk, and gives it a little of the free space back; for when there is little else to do."""
        short = self._reserve.short(0)  # then it needs it now, and has little for the WAL that moves the pages
        quiet = short or self._idle_s >= _QUIET_S or self._unsaved is not None
        kept = 0 if quiet else _KEPT_FREE_PAGES
        # Pages are moved through the WAL: there must be room for them.
        step = min(
            _SHRINK_PAGES, (self._reserve.wal_bytes if short else self._reserve.free_bytes // 2) // tables.PAGE_BYTES
        )

        def shrink(db: sqlite3.Connection) -> None:
            self._reserve.measure()
            if db.execute("PRAGMA freelist_count").fetchone()[0] > kept:
                # As a script: `execute` takes one step of a statement without columns, which is one page.
                db.executescript(f"PRAGMA incremental_vacuum({step})")
                # The file itself is cut by a checkpoint only.
                tables.checkpoint(db, "RESTART" if short else "TRUNCATE")

        try:
            await self.run(shrink)
        except sqlite3.Error as error:
            # A disk that is full can't even be told of free space; that is no reason to end.
            if not (tables.passes(error) or await asyncio.to_thread(self._is_out_of_room, error, 0)):
                raise SpoolError(f"can't write the spool {self._options.path}: {error}") from error

    # -- for the rooms beside it --------------------------------------------------------------------------------------

    async def read_after(self, id_: int, max_bytes: int, but: Container[int] = ()) -> tuple[list[Segment], int]:
        """The oldest intact segments after `id_`, up to so many bytes, and the id up to which everything was read.

        Those in `but` are passed over, damaged or not: who has them in memory settles them.
        """

        def read(db: sqlite3.Connection) -> list[tuple[Segment, bool]]:
            rows: list[tuple[Segment, bool]] = []
            size = 0
            query = f"SELECT {SEGMENT_COLUMNS} FROM segments WHERE id > ? ORDER BY id"
            with contextlib.closing(db.execute(query, (id_,))) as cursor:
                for row in cursor:
                    segment = tables.segment_of(row)
                    rows.append((segment, segment.checksum == row[-1]))
                    size += segment.size
                    if size >= max_bytes:
                        break
            return rows

        segments = []
        last_id = self.last_id
        try:
            rows = await self.run(read)
        except sqlite3.Error as error:
            raise SpoolError(f"can't read the spool {self._options.path}: {error}") from error
        for segment, intact in rows:
            if segment.id in but:
                continue
            if intact:
                segments.append(segment)
            else:
                self._set_aside(segment)
        return segments, rows[-1][0].id if rows else last_id

    def _set_aside(self, segment: Segment) -> None:
        """A row that the disk gave back changed: its events are lost, and are counted as dead letters that say so."""
        self.damaged += 1
        log.error("segment_damaged", segment=segment.id, events=segment.events, spool=self._options.path)
        self.settle(Settlement([segment], damaged=True))

    async def purge(self, condition: str, values: Sequence[Any]) -> int:
        """Deletes the dead letters that meet a condition; gives their number. The books keep them as dead-lettered."""

        def delete(db: sqlite3.Connection) -> tuple[int, int]:
            with tables.transaction(db):
                gone = tables.delete_letters(db, condition, values)
            self._letters = self._letters.less(gone)
            return gone.rows, tables.measured(db)

        try:
            purged, self.used_bytes = await self.run(delete)
        except sqlite3.Error as error:
            raise SpoolError(f"can't work on the dead letters: {error}") from error
        self._moved_bytes = 0
        self._look_for_room()
        return purged


class _Committed(NamedTuple):
    segments: list[Segment]
    accounts: Accounts
    settled: int  # rows
    settled_twice: int  # segments that had no row any more
    grown_bytes: int
    moved_bytes: int
    used_bytes: int | None  # None: not measured
    dropped_dead_letters: int
    seconds: float


def _end(waiting: "asyncio.Future[None] | None") -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)


def _fail(futures: Sequence["asyncio.Future[None]"], failure: SpoolError) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(failure)
            future.exception()  # a door that is gone must not make the loop complain
