"""Dead letters: to be looked at, tried again, taken elsewhere, or thrown away. They lie in the spool's file.

Whatever goes through the table does so in windows of so many rows, one hop to the connection's thread each, so that
the writer, and with it the doors, never wait for a long look at a large table.
"""

import asyncio
import base64
import contextlib
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct

from bridged.backlog.spool import DeadLetterRow, Spool, Stage
from bridged.backlog.tables import transaction
from bridged.errors import SpoolError, SpoolFull

MAX_LISTED: Final = 1000
MAX_ID: Final = 2**63 - 1
_WINDOW_ROWS: Final = 10_000
_PURGE_ROWS: Final = 1000  # a commit of its own, which the doors' commits wait for
_MAX_GROUPS: Final = 10_000  # that are kept apart
_SLICE_ROWS: Final = 500
_SLICE_BYTES: Final = 8 * 2**20
_SUMMARY_COLUMNS: Final = "id, first_at, last_at, attempts, stage, event_type, reason, length(event)"
_ROW_COLUMNS: Final = "id, first_at, last_at, attempts, stage, code, event_type, reason, event"

_LINE_BREAKS: Final = bytes.maketrans(b"\r\n", b"  ")


class Skipping(NamedTuple):
    """A dead letter that the configuration skips by now: it leaves the table, and nothing of it waits."""

    written: "asyncio.Future[None]"


Replay = Callable[[DeadLetterRow], "asyncio.Future[None] | Skipping | str"]


# Stage, event type, reason.
_Alike = tuple[Stage, str, str]
OTHERS: Final = "others: too many kinds to tell them apart"
_OTHERS: Final[_Alike] = ("mixpanel", "", OTHERS)


class Filter(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which dead letters. Empty: all of them."""

    event_type: str = ""
    reason: str = ""  # a part of it, in any case
    exact_reason: str = ""  # the whole of it
    stage: Stage | None = None
    since: float | None = None  # wall clock seconds: refused, last, at or after
    until: float | None = None  # ... before
    upto: Annotated[int, Meta(ge=0, le=MAX_ID)] | None = None  # an id: those after it came later

    def sql(self) -> tuple[str, list[Any]]:
        """As a condition, and its parameters."""
        terms: list[tuple[str, Any]] = []
        if self.event_type:
            terms.append(("event_type = ?", self.event_type))
        if self.reason:
            terms.append(("instr(lower(reason), lower(?)) > 0", self.reason))
        if self.exact_reason:
            terms.append(("reason = ?", self.exact_reason))
        if self.stage is not None:
            terms.append(("stage = ?", self.stage))
        if self.since is not None:
            terms.append(("last_at >= ?", self.since))
        if self.until is not None:
            terms.append(("last_at < ?", self.until))
        if self.upto is not None:
            terms.append(("id <= ?", self.upto))
        return " AND ".join(term for term, _ in terms) or "1", [value for _, value in terms]


class Summary(Struct):
    """A dead letter without its event."""

    id: int
    first_at: float  # wall clock seconds
    last_at: float
    attempts: int
    stage: Stage
    event_type: str
    reason: str
    bytes: int  # of the event


class Group(Struct, frozen=True):
    """How many dead letters are alike."""

    stage: Stage
    event_type: str
    reason: str
    count: int


class Replayed(Struct):
    """What a replay came to."""

    replayed: int = 0  # on their way: no dead letters any more
    refused: int = 0  # would be refused again, and stay
    skipped: int = 0  # aren't forwarded any more: no dead letters, and not on their way either
    reasons: dict[str, int] = {}  # of the refused


class _Span(NamedTuple):
    """Part of the table: ids in (low, high], so many rows and bytes of events at most."""

    low: int
    high: int
    rows: int
    bytes: int | None = None


class DeadLetters:
    """The verbs. `replay_one` is Intake.replay. One replay or purge at a time: `busy` says whether one is under way."""

    def __init__(self, spool: Spool, replay_one: Replay, clock: Callable[[], float] = time.time) -> None:
        self.busy = False
        self._spool = spool
        self._replay_one = replay_one
        self._changes = 0  # of what lies in the table: more than that some were added
        # What was counted, up to which id, and what the table was like then.
        self._known: Counter[_Alike] = Counter()
        self._known_to = 0
        self._known_of: tuple[int, int] | None = None
        self._clock = clock

    # -- looking ------------------------------------------------------------------------------------------------------

    async def list_after(self, wanted: Filter, after: int = 0, limit: int = 100) -> list[Summary]:
        """The oldest that match and come after an id."""
        limit = min(limit, MAX_LISTED)
        found: list[Summary] = []
        async for low, high in self._windows(after):
            rows = await self._read(_select, _SUMMARY_COLUMNS, wanted, _Span(low, high, limit - len(found)))
            found += [Summary(*row) for row in rows]
            if len(found) >= limit:
                break
        return found

    async def list_before(self, wanted: Filter, before: int = MAX_ID, limit: int = 100) -> list[Summary]:
        """The newest that match and come before an id, the newest first."""
        limit = min(limit, MAX_LISTED)
        found: list[Summary] = []
        while len(found) < limit:
            low = await self._read(_window_below, before, _WINDOW_ROWS)
            if low is None:
                break
            span = _Span(low - 1, before - 1, limit - len(found))
            rows = await self._read(_select, _SUMMARY_COLUMNS, wanted, span, "DESC")
            found += [Summary(*row) for row in rows]
            before = low
        return found

    async def count(self, wanted: "Filter | Sequence[int]") -> int:
        """How many match now."""
        counted = 0
        if isinstance(wanted, Filter):
            async for low, high in self._windows(0):
                counted += await self._read(_counted, low, high, wanted)
        else:
            for at in range(0, len(wanted), _SLICE_ROWS):
                counted += await self._read(_counted_ids, sorted(set(wanted[at : at + _SLICE_ROWS])))
        return counted

    async def last(self) -> int:
        """The id of the newest; 0: there is none."""
        last: int = await self._read(_last)
        return last

    async def get(self, id_: int) -> DeadLetterRow | None:
        """One dead letter, with its event."""
        rows = await self._read(_select, _ROW_COLUMNS, Filter(), _Span(id_ - 1, id_, 1))
        return DeadLetterRow(*rows[0]) if rows else None

    async def groups(self, wanted: Filter | None = None) -> list[Group]:
        """Those that match, counted by what is alike; the most frequent first. What is beyond 10,000 kinds is
        counted together, with the reason OTHERS.

        Of all of them, only those are counted that came since the last time, as long as none has gone or changed.
        """
        if wanted is None or wanted == Filter():
            key = (self._changes, self._spool.dropped_dead_letters)
            if key != self._known_of or self.busy:
                self._known, self._known_to, self._known_of = Counter(), 0, key
            counts, known_to = Counter(self._known), self._known_to
        else:
            counts, known_to, key = Counter[_Alike](), 0, None
        async for low, high in self._windows(known_to):
            for *alike, n in await self._read(_grouped, low, high, wanted or Filter()):
                kind = tuple(alike)
                counts[kind if kind in counts or len(counts) < _MAX_GROUPS else _OTHERS] += n
            known_to = high
        if key is not None and key == (self._changes, self._spool.dropped_dead_letters) and not self.busy:
            self._known, self._known_to = counts, known_to
        return [Group(*alike, count) for alike, count in counts.most_common()]

    async def slices(self, wanted: "Filter | Sequence[int]") -> AsyncIterator[list[DeadLetterRow]]:
        """Those that match now, with their events, a few at a time; ids that don't exist are passed over."""
        if isinstance(wanted, Filter):
            async for low, high in self._windows(0):
                while rows := await self._read(
                    _select, _ROW_COLUMNS, wanted, _Span(low, high, _SLICE_ROWS, _SLICE_BYTES)
                ):
                    yield [DeadLetterRow(*row) for row in rows]
                    low = rows[-1][0]  # noqa: PLW2901  # on from there
        else:
            for at in range(0, len(wanted), _SLICE_ROWS):
                ids = sorted(set(wanted[at : at + _SLICE_ROWS]))
                low = 0
                while rows := await self._read(_select_ids, ids, low, _SLICE_BYTES):
                    yield [DeadLetterRow(*row) for row in rows]
                    low = rows[-1][0]

    # -- changing -----------------------------------------------------------------------------------------------------

    async def purge(self, wanted: "Filter | Sequence[int]") -> int:
        """Deletes those that match; gives their number. The books keep them as dead-lettered."""
        with self._alone():
            purged = 0
            if isinstance(wanted, Filter):
                async for low, high in self._windows(0, _PURGE_ROWS):
                    condition, values = wanted.sql()
                    condition = f"id > ? AND id <= ? AND {condition}"
                    purged += await self._spool.purge(condition, [low, high, *values])
            else:
                for at in range(0, len(wanted), _PURGE_ROWS):
                    ids = msgspec.json.encode(wanted[at : at + _PURGE_ROWS]).decode()
                    purged += await self._spool.purge("id IN (SELECT value FROM json_each(?))", [ids])
            return purged

    async def replay(self, wanted: "Filter | Sequence[int]") -> Replayed:
        """Tries those that match again, from the beginning of the path, as fast as the spool takes them.

        A replayed one leaves the table in the commit that makes it an event that waits, or is skipped. Raises SpoolError
        when the spool can't take more: what was replayed until then is.
        """
        with self._alone():
            outcome, reasons = Replayed(), Counter[str]()
            async for rows in self.slices(wanted):
                if self._spool.near_cap:
                    raise SpoolFull("the spool is near its cap", "see why Mixpanel takes nothing, then try again")
                refused: list[tuple[int, str]] = []
                waiting, skipping = [], []
                for row in rows:
                    result = _unusable(row) or self._replay_one(row)
                    if isinstance(result, str):
                        refused.append((row.id, result))
                    elif isinstance(result, Skipping):
                        skipping.append(result.written)
                    else:
                        waiting.append(result)
                # A future that failed must not leave the others unawaited.
                results = await asyncio.gather(*waiting, *skipping, return_exceptions=True)
                outcome.replayed += results[: len(waiting)].count(None)
                outcome.skipped += results[len(waiting) :].count(None)
                await self._touch(refused)
                outcome.refused += len(refused)
                reasons.update(reason for _, reason in refused)
                for failure in results:
                    if failure is not None:
                        raise failure
            outcome.reasons = dict(reasons.most_common(100))
            return outcome

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if self.busy:
            raise SpoolError("another replay or purge of dead letters is under way", "wait for its end, and try again")
        self.busy = True
        self._changes += 1
        try:
            yield
        finally:
            self.busy = False
            self._changes += 1

    async def _touch(self, refused: list[tuple[int, str]]) -> None:
        """Notes that a replay didn't help."""
        if refused:
            now = self._clock()
            await self._read(_update, [(now, reason[:1000], id_) for id_, reason in refused])

    # -- the connection's thread --------------------------------------------------------------------------------------

    async def _windows(self, after: int, rows: int | None = None) -> AsyncIterator[tuple[int, int]]:
        """The table, as it is at the first, as ranges (after, up to] of ids, each with so many rows at most.

        What comes meanwhile isn't in them: a replay that is refused again would have no end.
        """
        last = await self.last()
        while (high := await self._read(_window, after, last, rows or _WINDOW_ROWS)) is not None:
            yield after, high
            after = high

    async def _read(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return await self._spool.run(function, *args)
        except sqlite3.Error as error:
            raise SpoolError(f"can't work on the dead letters: {error}") from error


def _last(db: sqlite3.Connection) -> int:
    last: int = db.execute("SELECT coalesce(max(id), 0) FROM dead_letters").fetchone()[0]
    return last


def _window(db: sqlite3.Connection, after: int, last: int, rows: int) -> int | None:
    query = "SELECT max(id) FROM (SELECT id FROM dead_letters WHERE id > ? AND id <= ? ORDER BY id LIMIT ?)"
    high: int | None = db.execute(query, (after, last, rows)).fetchone()[0]
    return high


def _window_below(db: sqlite3.Connection, before: int, rows: int) -> int | None:
    query = "SELECT min(id) FROM (SELECT id FROM dead_letters WHERE id < ? ORDER BY id DESC LIMIT ?)"
    low: int | None = db.execute(query, (before, rows)).fetchone()[0]
    return low


def _select(
    db: sqlite3.Connection, columns: str, wanted: Filter, span: _Span, order: Literal["ASC", "DESC"] = "ASC"
) -> list[Any]:
    condition, values = wanted.sql()
    query = f"SELECT {columns} FROM dead_letters WHERE id > ? AND id <= ? AND {condition} ORDER BY id {order} LIMIT ?"
    return _until(db.execute(query, (span.low, span.high, *values, span.rows)), span.bytes)


def _select_ids(db: sqlite3.Connection, ids: list[int], low: int, max_bytes: int) -> list[Any]:
    query = (
        f"SELECT {_ROW_COLUMNS} FROM dead_letters WHERE id > ? AND id IN (SELECT value FROM json_each(?)) ORDER BY id"
    )
    return _until(db.execute(query, (low, msgspec.json.encode(ids).decode())), max_bytes)


def _until(cursor: sqlite3.Cursor, max_bytes: int | None) -> list[Any]:
    """Rows, up to so many bytes of events (their last column), but one at least."""
    rows, size = [], 0
    with contextlib.closing(cursor):
        for row in cursor:
            rows.append(row)
            if max_bytes is not None:
                size += len(row[-1])
                if size >= max_bytes:
                    break
    return rows


def _grouped(db: sqlite3.Connection, low: int, high: int, wanted: Filter) -> list[Any]:
    condition, values = wanted.sql()
    columns = "stage, event_type, reason"
    query = f"SELECT {columns}, count(*) FROM dead_letters WHERE id > ? AND id <= ? AND {condition} GROUP BY {columns}"
    return db.execute(query, (low, high, *values)).fetchall()


def _counted(db: sqlite3.Connection, low: int, high: int, wanted: Filter) -> int:
    condition, values = wanted.sql()
    query = f"SELECT count(*) FROM dead_letters WHERE id > ? AND id <= ? AND {condition}"
    counted: int = db.execute(query, (low, high, *values)).fetchone()[0]
    return counted


def _counted_ids(db: sqlite3.Connection, ids: list[int]) -> int:
    query = "SELECT count(*) FROM dead_letters WHERE id IN (SELECT value FROM json_each(?))"
    counted: int = db.execute(query, (msgspec.json.encode(ids).decode(),)).fetchone()[0]
    return counted


def _update(db: sqlite3.Connection, values: list[tuple[float, str, int]]) -> None:
    with transaction(db):
        db.executemany("UPDATE dead_letters SET last_at = ?, attempts = attempts + 1, reason = ? WHERE id = ?", values)


# -- forms -------------------------------------------------------------------------------------------------------------


def _unusable(row: DeadLetterRow) -> str:
    """Why a dead letter can't even be tried; empty when it can. What was mapped already must be a whole event."""
    if row.stage != "door":
        event = _json(row.event)
        if not isinstance(event, dict) or b"\n" in row.event:
            return row.reason if "damaged" in row.reason else "it holds no whole event"
    return ""


def _json(data: bytes) -> Any:
    """What JSON says, or None."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def exported(row: DeadLetterRow) -> dict[str, Any]:
    """A dead letter for the world outside: `event` is the event if it is JSON, else `event_base64` its bytes.

    With `event_text` to be read by a person, if they are text.
    """
    form: dict[str, Any] = {
        name: getattr(row, name) for name in ("id", "first_at", "last_at", "attempts", "stage", "event_type", "reason")
    }
    if isinstance(_json(row.event), dict | list):
        # Its own spelling is kept: decoding and encoding again would change numbers. Only white space may be a line
        # break in JSON, and a line of NDJSON has none.
        return form | {"event": msgspec.Raw(row.event.translate(_LINE_BREAKS))}
    form["event_base64"] = base64.b64encode(row.event).decode()
    with contextlib.suppress(UnicodeDecodeError):
        form["event_text"] = row.event.decode()
    return form
