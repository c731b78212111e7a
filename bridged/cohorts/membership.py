"""Who is in which cohort, in one SQLite file: one task decides what is done next, one thread does it, every commit is fsynced.

    receive() puts a page on a list; the writer takes all of it at once, one transaction, one fsync; then the pages are
    answered. In between it merges what has come, and walks, in steps, so that no page waits for more than one of them.

It is no part of the events' path: its file, its thread and its locks are its own. A full disk refuses pages, and what is
already here waits. Any other failure ends the writer: pages are refused, and nothing is sent, until the next start.
"""

import asyncio
import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeVar

import aiosqlite
import msgspec
import structlog
from msgspec import Struct

from bridged.cohorts import looking, merging, tables, taking
from bridged.cohorts.records import CohortDetail, CohortRow, Figures, Plan, Refusal
from bridged.cohorts.taking import Block, Named, Settled
from bridged.cohorts.webhook import Page
from bridged.errors import MembershipDamaged, MembershipError, is_locked, whose
from bridged.presence import Presence, claim, demand_regular

log = structlog.get_logger()

T = TypeVar("T")

# Merging many pages at once costs a fraction of merging each, and pages that come shall not wait for it. So it waits until
# so long none has come, but not for longer than that since the first, and not beyond so many members.
_LINGER_S: Final = 0.5
_LONGEST_S: Final = 10.0
_MANY: Final = 500_000
# Pages that wait for a commit, beyond which Mixpanel is asked to come again.
_MAX_PENDING_BYTES: Final = 32 * 2**20
# New pages are refused beyond this share of the cap, so that what is here can be merged and settled.
_SHARE: Final = 0.9
# So often it is looked whether there is room again, and whether the files are still there.
_LOOK_S: Final = 1.0
_PLAN_ROWS: Final = 100_000
_PLAN_WAIT_S: Final = 5.0


class MembershipOptions(Struct, frozen=True, kw_only=True):
    """Where, how large, and what may be spent. `by_name`: Braze is told names (track), not ids (partner)."""

    path: str
    max_bytes: int = 20 * 2**30
    max_points_per_day: int = 0
    by_name: bool = True
    target: str = ""  # which workspace, and what in it, is written: another one has to be told everything


class _Work(Struct):
    pages: list[tuple[float, int, str, str]] = []
    futures: list["asyncio.Future[None]"] = []
    results: list[Settled] = []
    settled: list["asyncio.Future[None]"] = []


class Membership:
    """The cohorts' file and its one writer."""

    def __init__(self, options: MembershipOptions, clock: Callable[[], float] = time.time) -> None:
        self.options = options
        self._figures = Figures()  # as of the last commit
        self._spent = taking.Spent()
        self.rows: list[CohortRow] = []  # as of the last commit
        self.changed: Callable[[], None] = lambda: None  # set by the writer to Braze: something may be due
        self.full = ""  # why pages are refused; empty while they aren't
        self._told_full = False  # in the log, since something was last written
        self._clock = clock
        self._work = _Work()
        self._pending_bytes = 0
        self._wake = asyncio.Event()
        self._closing = False
        self._failure: BaseException | None = None
        self._distrusted: sqlite3.Error | None = None  # found outside of the writer
        self._commits = 0
        self._commit_seconds = 0.0
        self._waiting = 0  # members in pages that wait to be merged; the connection's thread's
        self._inbox_since: float | None = None  # loop time since which such pages wait
        self._page_at = 0.0  # loop time of the last page

    # -- opening and closing ------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Opens the file, starts the writer. Raises MembershipError."""
        path = Path(self.options.path)
        demand_regular(path, f"the cohorts' file {path}", MembershipError)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            hint = whose(error, path, "see cohorts.path")
            raise MembershipError(f"can't open the cohorts' file {path}: {error}", hint) from error
        try:
            claim(self._lock, f"the cohorts' file {path}", "one daemon a file: set cohorts.path", MembershipError)
            await self._open(path)
        except BaseException:
            os.close(self._lock)
            raise
        self._writer = asyncio.create_task(self._write(), name="cohorts writer")
        return self

    async def _open(self, path: Path) -> None:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            self._db = await aiosqlite.connect(path, isolation_level=None, cached_statements=128)
        except (OSError, sqlite3.Error) as error:
            hint = whose(error, path, "see cohorts.path")
            raise MembershipError(f"can't open the cohorts' file {path}: {error}", hint) from error
        try:
            await self.run(self._prepare)
            self._presence = Presence(path, MembershipDamaged)
        except BaseException as error:
            await self._db.close()
            if isinstance(error, sqlite3.Error | OSError):
                why = f"can't open the cohorts' file {path}: {error}"
                raise MembershipDamaged(why, tables.remedy(error, path)) from error
            raise

    def _prepare(self, db: sqlite3.Connection) -> None:
        tables.set_up(db, Path(self.options.path), self.options.max_bytes)
        with tables.transaction(db):
            merging.aim(db, self.options.target)
        self._waiting = db.execute("SELECT coalesce(sum(members), 0) FROM inbox").fetchone()[0]
        self._look(db)

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Runs `function(connection, *args)` on the connection's thread: one hop for a transaction."""
        # Private, but the way of every public call of aiosqlite since its first release; the version is bounded.
        result: T = await self._db._execute(function, self._db._conn, *args)  # type: ignore[no-untyped-call]  # noqa: SLF001
        return result

    async def __aexit__(self, *_exc: object) -> None:
        """Commits what is left, closes the file. Whoever cancels this waits for it: the writer is never cancelled."""
        self._closing = True
        self._wake.set()
        closing = asyncio.create_task(self._close(), name="cohorts closing")
        cancelled = None
        while not closing.done():
            try:
                await asyncio.shield(closing)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled

    async def _close(self) -> None:
        with contextlib.suppress(BaseException):
            await asyncio.shield(self._writer)
        if not self.failed:
            with contextlib.suppress(sqlite3.Error):
                await self.run(lambda db: db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
        await self._db.close()
        os.close(self._lock)

    async def ended(self) -> None:
        """Returns when the writer has ended as it was told. Raises MembershipError when it died: then the process must end."""
        await asyncio.shield(self._writer)

    @property
    def failed(self) -> bool:
        """Whether the writer has died."""
        return self._failure is not None

    @property
    def figures(self) -> Figures:
        """As of the last commit; the points as of now, since the cap and the day change without one."""
        budget = self._spent.of(self.day(), self.options.max_points_per_day)
        return msgspec.structs.replace(self._figures, points_today=budget.spent, points_left_today=budget.left)

    # -- from Mixpanel ------------------------------------------------------------------------------------------------

    def receive(self, page: Page) -> "asyncio.Future[None]":
        """Hands a page to the writer. The future is done when it is on disk, and fails if it can't be brought there.

        Raises MembershipError at once when there is no room.
        """
        self._demand_open()
        if self.full:
            raise MembershipError(self.full, "raise cohorts.max_bytes, or free space on its disk")
        ids = msgspec.json.encode(page.ids).decode()
        if self._pending_bytes and self._pending_bytes + len(ids) > _MAX_PENDING_BYTES:
            raise MembershipError("the writer of the cohorts is behind")
        head = msgspec.json.encode(merging.head_of(page)).decode()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._work.pages.append((self._clock(), len(page.ids), head, ids))
        self._work.futures.append(future)
        self._pending_bytes += len(ids)
        self._wake.set()
        return future

    # -- to Braze -----------------------------------------------------------------------------------------------------

    async def take(self, after: int, limit: int, busy: list[int]) -> Block:
        """Who is to be told to Braze next: at most `limit` users (or rows, as a partner), behind the key `after`, none of the
        busy ones, within what may be spent today. All of it is charged, and noted as perhaps known to Braze.
        """
        take = taking.take_users if self.options.by_name else taking.take_rows
        cap = self.options.max_points_per_day
        block: Block = await self._guarded(take, after, limit, busy, self.day(), cap)
        return block

    def settle(self, result: Settled) -> "asyncio.Future[None]":
        """Hands to the writer what is known now of users that were taken. The future is done when it is on disk."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._failure is not None:
            # It stays as it was noted when it was taken: perhaps known to Braze.
            future.set_exception(MembershipError("the cohorts' file is closed"))
            return future
        self._work.results.append(result)
        self._work.settled.append(future)
        self._wake.set()
        return future

    async def unannounced(self) -> dict[int, Named]:
        """As a partner: the cohorts that Braze must be told of before their members."""
        return {} if self.options.by_name else await self._guarded(taking.unannounced)

    async def announced(self, cohort: Named) -> None:
        """Braze has been told a cohort's name."""
        await self._guarded(taking.announced, cohort.id, cohort.version)

    def day(self) -> str:
        """The day to whose points is added: UTC's."""
        return datetime.fromtimestamp(self._clock(), UTC).date().isoformat()

    # -- for people ---------------------------------------------------------------------------------------------------

    async def show(self, key: str) -> CohortDetail:
        """One cohort, its sessions and its refusals. Raises UnknownCohort."""
        row = self._row(key)
        return await self.run(looking.detail, row)

    async def plan(self, key: str = "") -> Plan:
        """What is due now and what it costs, counted in steps. With a key, `rows` has only that cohort. Raises UnknownCohort."""
        with contextlib.suppress(TimeoutError):
            # What a walk has yet to pass may become due.
            async with asyncio.timeout(_PLAN_WAIT_S):
                while await self.run(looking.is_walking) and not (self.full or self.failed):
                    await asyncio.sleep(_PLAN_WAIT_S / 100)
        rows = [self._row(key)] if key else self.rows
        users, after = 0, -1
        while True:
            found, last = await self.run(
                lambda db, after: taking.due_users(db, after, _PLAN_ROWS, rows=not self.options.by_name), after
            )
            users += found
            if last is None:
                break
            after = last
        budget = await self.run(taking.budget, self.day(), self.options.max_points_per_day)
        return Plan(
            users=users,
            points=users,
            joining=self.figures.joining,
            leaving=self.figures.leaving,
            spent_today=budget.spent,
            allowed_today=budget.allowed,
            left_today=budget.left,
            fits=budget.left is None or users <= budget.left,
            rows=rows,
        )

    async def refusals(self, after: int = 0, limit: int = 100) -> list[Refusal]:
        """Users that Braze refused, by id, behind one."""
        return await self.run(looking.refusals, after, min(limit, 1000))

    async def resync(self, key: str = "", *, rejected_only: bool = False) -> int:
        """Tells Braze everything again, as if nothing were known of it, or only what it refused; of one cohort, or of all.

        Gives the number of rows that will be due. Raises UnknownCohort.
        """
        rows = [self._row(key)] if key else self.rows
        await self._begin(rows, "retry" if rejected_only else "resync")
        return sum(
            row.rejected_leaving + (row.rejected if rejected_only else row.members + row.leaving) for row in rows
        )

    async def forget(self, key: str) -> int:
        """Takes all members of a cohort out of Braze; then the cohort is gone. Gives their number. Raises UnknownCohort.

        Disconnect it in Mixpanel first: its next session would begin it anew.
        """
        row = self._row(key)
        await self._begin([row], "forget")
        return row.members

    async def _begin(self, rows: list[CohortRow], kind: Literal["retry", "resync", "forget"]) -> None:
        wanted = [(row.project, row.cohort) for row in rows]
        await self._guarded(looking.begin, wanted, kind, self._clock())
        self._wake.set()

    async def allow(self, points: int) -> Plan:
        """So many more data points today; 0: as many as what is due now needs."""
        plan = await self.plan()
        if plan.allowed_today is None:
            return plan
        if points == 0:
            points = max(0, plan.points - (plan.left_today or 0))

        def more(db: sqlite3.Connection) -> None:
            day = self.day()
            with tables.transaction(db):
                budget = taking.budget(db, day, self.options.max_points_per_day)
                # A cap that came late is exceeded already: what is allowed comes on top of that.
                over = 0 if budget.allowed is None else max(0, budget.spent - budget.allowed)
                taking.charge(db, day, 0, points + over)

        await self._guarded(more)
        self.changed()
        return await self.plan()

    def use(self, max_points_per_day: int) -> None:
        """Another cap, from now on."""
        self.options = msgspec.structs.replace(self.options, max_points_per_day=max_points_per_day)
        self.changed()

    def _row(self, key: str) -> CohortRow:
        return looking.row_of(self.rows, key)

    # -- the writer ---------------------------------------------------------------------------------------------------

    async def _guarded(self, function: Callable[..., T], *args: Any) -> T:
        """A transaction that doesn't wait for the writer, with a look at the counts behind it."""
        self._demand_open()

        def both(db: sqlite3.Connection) -> T:
            result = function(db, *args)
            self._look(db)
            return result

        try:
            return await self.run(both)
        except sqlite3.Error as error:
            try:
                self._is_full(error)
            except sqlite3.Error:
                # The writer is to end of it, wherever it was found.
                self._distrusted = error
                self._wake.set()
            raise MembershipError(f"can't write the cohorts' file {self.options.path}: {error}") from error

    async def _write(self) -> None:
        work = _Work()
        looked_at = time.monotonic()
        try:
            while True:
                work, self._work = self._work, _Work()
                self._wake.clear()
                if self._distrusted is not None:
                    raise self._distrusted  # noqa: TRY301  # what the handler below is for
                if time.monotonic() - looked_at > _LOOK_S:
                    if unsaved := await self.run(self._presence.demand):
                        raise MembershipDamaged(unsaved, "see what does that there, and start again")  # noqa: TRY301
                    looked_at = time.monotonic()
                if work.pages or work.results:
                    await self._commit(work)
                if self._closing and not (self._work.pages or (self._work.results and not self.full)):
                    return
                if not (await self._step() or self._wake.is_set()):
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._linger_s()):
                            await self._wake.wait()
        except BaseException as error:
            self._failure = error
            log.error("cohorts_failed", error=repr(error))
            for each in (work, self._work):
                for future in each.futures + each.settled:
                    if not future.done():
                        future.set_exception(MembershipError("the cohorts' file failed"))
            if isinstance(error, sqlite3.Error):
                path = Path(self.options.path)
                why = f"the cohorts' file {path} can't be trusted: {error}"
                raise MembershipDamaged(why, tables.remedy(error, path)) from error
            raise

    def _demand_open(self) -> None:
        if self._failure is not None:
            raise MembershipError(f"the cohorts' file {self.options.path} failed: {self._failure}", "see bridged's log")
        if self._closing:
            raise MembershipError("the cohorts' file is closed: bridged is stopping")

    def _linger_s(self) -> float:
        """How long nothing is done if nothing comes."""
        if self.full or self._work.results or self._inbox_since is None:
            return _LOOK_S
        return min(_LOOK_S, max(0.0, self._merge_at(self._inbox_since) - asyncio.get_running_loop().time()))

    def _merge_at(self, since: float) -> float:
        """Loop time from which on pages are merged that have waited since then."""
        return min(self._page_at + _LINGER_S, since + _LONGEST_S)

    async def _commit(self, work: _Work) -> None:
        """Pages first: they are waited for. On a full disk they are refused; results are kept until there is room."""
        started = time.perf_counter()
        self._pending_bytes -= sum(len(ids) for *_, ids in work.pages)
        try:
            if work.pages:
                await self.run(self._receive, work.pages)
                self._page_at = asyncio.get_running_loop().time()
                self._written(work.futures)
        except sqlite3.Error as error:
            self._is_full(error)
            for future in work.futures:
                if not future.done():
                    future.set_exception(MembershipError(self.full))
        try:
            if work.results:
                await self.run(self._settle, work.results)
                self._written(work.settled)
        except sqlite3.Error as error:
            self._is_full(error)
            self._work.results[:0] = work.results
            self._work.settled[:0] = work.settled
        self._commits += 1
        self._commit_seconds += time.perf_counter() - started
        self._tell()

    def _receive(self, db: sqlite3.Connection, pages: list[tuple[float, int, str, str]]) -> None:
        merging.receive(db, pages)
        self._waiting += sum(members for _, members, _, _ in pages)
        self._look(db)

    def _settle(self, db: sqlite3.Connection, results: list[Settled]) -> None:
        taking.settle(db, results, self._clock())
        self._look(db)

    async def _step(self) -> bool:
        """One step of what waits here; whether there was any."""
        try:
            done, waiting = await self.run(self._step_once, self._may_merge())
        except sqlite3.Error as error:
            self._is_full(error)
            return False
        now = asyncio.get_running_loop().time()
        self._inbox_since = None if not waiting else self._inbox_since if self._inbox_since is not None else now
        self._tell()
        return done

    def _may_merge(self) -> bool:
        since = self._inbox_since
        return since is not None and (
            self._waiting >= _MANY or asyncio.get_running_loop().time() >= self._merge_at(since)
        )

    def _step_once(self, db: sqlite3.Connection, may_merge: bool) -> tuple[bool, bool]:
        by_name = self.options.by_name
        done = merging.walk(db, by_name=by_name)
        if not done and may_merge:
            pages, members = merging.merge(db, by_name=by_name)
            self._waiting -= members
            done = pages > 0
        if done or self.full or looking.breaks_off(self.rows, self._clock()):
            # What was full may have room again: the next page finds out.
            self._look(db)
        return done, db.execute("SELECT EXISTS (SELECT 1 FROM inbox)").fetchone()[0] == 1

    def _look(self, db: sqlite3.Connection) -> None:
        """Reads the counts anew, in the connection's thread, after whatever may have changed them."""
        self.rows = rows = looking.rows(db, self._clock())
        self._spent = taking.spent(db, self.day())
        used = looking.used_bytes(db)
        near = f"the cohorts' file is near its cap: {used:,} of {self.options.max_bytes:,} bytes in {self.options.path}"
        self.full = near if used >= int(self.options.max_bytes * _SHARE) else ""
        self._figures = looking.figures(rows, self._waiting, used, commits=self._commits, seconds=self._commit_seconds)

    def _is_full(self, error: sqlite3.Error) -> None:
        """Notes that there is no room, or a lock. Raises the error if it is another one: the file can't be trusted any more."""
        if not tables.passes(error, Path(self.options.path)):
            raise error
        self.full = f"the cohorts' file {self.options.path} can't be written for now: {error}"
        if not self._told_full:
            what = "cohorts_locked" if is_locked(error) else "cohorts_full"
            log.error(what, error=str(error), path=self.options.path)
        self._told_full = True

    def _written(self, futures: "list[asyncio.Future[None]]") -> None:
        self._told_full = False
        for future in futures:
            if not future.done():
                future.set_result(None)

    def _tell(self) -> None:
        if self.figures.due:
            self.changed()
