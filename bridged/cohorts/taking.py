"""From the membership to Braze: who is due, what a request carries, and what is known after its answer.

Everything here runs in the connection's thread. A block is taken in one transaction that notes, before anything leaves, that
Braze may have it; results are settled in another. Points are charged when a block is taken and given back for what surely
wasn't carried out: after a crash too many are counted, never too few.
"""

import sqlite3
from collections.abc import Iterator
from typing import Final, NamedTuple

import msgspec
from msgspec import Struct

from bridged.cohorts.merging import bury
from bridged.cohorts.tables import DUE, collect, transaction

MAX_BLOCK: Final = 10_000


class Row(Struct, array_like=True, frozen=True):
    """A user in a cohort, as it was when it was taken. `wanted` > 0: is to be in."""

    cohort: int
    wanted: int
    sent: int
    rejected: int

    @property
    def is_due(self) -> bool:
        """Whether Braze doesn't have it as it is wanted; also when it refused it before."""
        return self.wanted != self.sent


class User(Struct, array_like=True, frozen=True):
    """A user with all rows (to be written as a whole), or with those that are due (to be written as changes)."""

    key: int
    external_id: str
    rows: tuple[Row, ...]

    def perhaps_in(self) -> "User":
        """The same after a request that Braze may have carried out."""
        rows = (msgspec.structs.replace(row, sent=-1) if row.is_due else row for row in self.rows)
        return User(self.key, self.external_id, tuple(rows))


class Named(Struct, array_like=True, frozen=True):
    """What Braze is told of a cohort."""

    id: int
    mixpanel_id: str
    name: str
    version: int
    created_at: float


class Block(NamedTuple):
    """What was taken: charged to `day`, each user (or row) once."""

    users: list[User]
    cohorts: dict[int, Named]
    day: str
    last: int  # the highest key: the next block begins behind it


class Parcel(Struct):
    """What one request carries: whole users, or with a partner key the changes of one cohort."""

    users: list[User]
    block: Block
    cohort: Named | None = None  # with a partner key

    def halves(self) -> Iterator["Parcel"]:
        """Two of half the size."""
        middle = len(self.users) // 2
        for users in (self.users[:middle], self.users[middle:]):
            yield Parcel(users, self.block, self.cohort)


class Budget(NamedTuple):
    """The data points of a day. `left` is None without a cap."""

    spent: int
    allowed: int | None
    left: int | None


class Spent(NamedTuple):
    """What a day has cost, and what was allowed on it beyond the cap."""

    day: str = ""
    points: int = 0
    allowed: int = 0

    def of(self, day: str, cap: int) -> Budget:
        """The budget under a cap (0: none), on this day or on another, which nothing is known of yet."""
        _, points, more = self if day == self.day else Spent(day)
        return Budget(points, cap + more if cap else None, max(0, cap + more - points) if cap else None)


class Settled(Struct):
    """What is known of users that had been taken."""

    sent: list[tuple[int, int, int]] = []  # user, cohort, version that Braze has now (0: out)
    refused: list[tuple[int, int, int, int]] = []  # user, cohort, sent before, wanted then
    back: list[tuple[int, int, int]] = []  # user, cohort, sent before: nothing was carried out
    reasons: list[tuple[int, str]] = []  # by user
    refund: int = 0
    day: str = ""

    def add(self, other: "Settled") -> None:
        """Takes another's along. Both are of one day."""
        self.sent += other.sent
        self.refused += other.refused
        self.back += other.back
        self.reasons += other.reasons
        self.refund += other.refund
        self.day = other.day


def spent(db: sqlite3.Connection, day: str) -> Spent:
    """What a day has cost so far."""
    return Spent(day, *(db.execute("SELECT points, allowed FROM spending WHERE day = ?", (day,)).fetchone() or ()))


def budget(db: sqlite3.Connection, day: str, cap: int) -> Budget:
    """What was spent on a day, and what may be. `cap` 0: no cap."""
    return spent(db, day).of(day, cap)


def charge(db: sqlite3.Connection, day: str, points: int, allowed: int = 0) -> None:
    """Adds to what was spent on a day, and to what may be."""
    db.execute(
        "INSERT INTO spending (day, points, allowed) VALUES (:day, max(0, :points), :allowed) ON CONFLICT (day) DO UPDATE SET"
        " points = max(0, points + :points), allowed = allowed + :allowed",
        {"day": day, "points": points, "allowed": allowed},
    )


def cohorts_named(db: sqlite3.Connection, condition: str = "1") -> dict[int, Named]:
    """What Braze is told of each cohort."""
    rows = f"SELECT json_array(id, mixpanel_id, name, version, created_at) AS row FROM cohorts WHERE {condition}"
    found = db.execute(f"SELECT json_group_array(json(row)) FROM ({rows})").fetchone()[0]
    return {each.id: each for each in msgspec.json.decode(found, type=list[Named])}


def unannounced(db: sqlite3.Connection) -> dict[int, Named]:
    """Cohorts whose name, or a change of it, a partner hasn't told Braze; those nobody is in need not be."""
    return cohorts_named(db, "announced <> version AND joining + in_braze + leaving > 0")


def announced(db: sqlite3.Connection, cohort: int, version: int) -> None:
    """Braze knows a cohort by its name of this version."""
    with transaction(db):
        db.execute("UPDATE cohorts SET announced = ? WHERE id = ?", (version, cohort))


def _allowed(db: sqlite3.Connection, limit: int, day: str, cap: int) -> int:
    """How many may be taken. None during a walk: whom it has yet to pass would be written a second time."""
    if db.execute("SELECT 1 FROM walks LIMIT 1").fetchone():
        return 0
    left = budget(db, day, cap).left
    return min(limit, MAX_BLOCK, limit if left is None else left)


def take_users(db: sqlite3.Connection, after: int, limit: int, busy: list[int], day: str, cap: int) -> Block:
    """The next users behind a key, and from the first on again, but for the busy ones; each with all rows. One transaction."""
    with transaction(db):
        limit = _allowed(db, limit, day, cap)
        db.execute("DELETE FROM temp.batch")
        for low, high in ((after, 2**62), (-1, after)):
            db.execute(
                "INSERT OR IGNORE INTO temp.batch SELECT DISTINCT user FROM members INDEXED BY due"
                f" WHERE {DUE} AND user > ? AND user <= ? AND user NOT IN (SELECT value FROM json_each(?))"
                " ORDER BY user LIMIT max(0, ? - (SELECT count(*) FROM temp.batch))",
                (low, high, msgspec.json.encode(busy).decode(), limit),
            )
        rows = (
            "(SELECT json_group_array(json_array(m.cohort, m.wanted, m.sent, m.rejected)) FROM members m"
            " WHERE m.user = b.user)"
        )
        users, last = _users(db, "temp.batch b", rows, after)
        db.execute(
            "UPDATE members SET sent = -1 WHERE user IN (SELECT user FROM temp.batch) AND wanted <> sent AND sent <> -1"
        )
        charge(db, day, len(users))
        return Block(users, cohorts_named(db), day, last)


def take_rows(db: sqlite3.Connection, after: int, limit: int, busy: list[int], day: str, cap: int) -> Block:
    """The same for changes: users with the rows that are due, of cohorts that are announced; `limit` counts rows."""
    with transaction(db):
        limit = _allowed(db, limit, day, cap)
        db.execute("DELETE FROM temp.taken")
        for low, high in ((after, 2**62), (-1, after)):
            db.execute(
                "INSERT OR IGNORE INTO temp.taken SELECT user, cohort FROM members INDEXED BY due"
                f" WHERE {DUE} AND user > ? AND user <= ? AND user NOT IN (SELECT value FROM json_each(?))"
                " AND cohort IN (SELECT id FROM cohorts WHERE announced = version)"
                " ORDER BY user, cohort LIMIT max(0, ? - (SELECT count(*) FROM temp.taken))",
                (low, high, msgspec.json.encode(busy).decode(), limit),
            )
        rows = (
            "(SELECT json_group_array(json_array(m.cohort, m.wanted, m.sent, m.rejected)) FROM temp.taken t"
            " JOIN members m ON m.user = t.user AND m.cohort = t.cohort WHERE t.user = b.user)"
        )
        users, last = _users(db, "(SELECT DISTINCT user FROM temp.taken) b", rows, after)
        db.execute(
            "UPDATE members SET sent = -1 WHERE (user, cohort) IN (SELECT user, cohort FROM temp.taken) AND sent <> -1"
        )
        charge(db, day, sum(len(user.rows) for user in users))
        return Block(users, cohorts_named(db), day, last)


def _users(db: sqlite3.Connection, of: str, rows: str, after: int) -> tuple[list[User], int]:
    # One row of one statement: each step of a cursor would have to win the interpreter back from a busy loop.
    one = f"SELECT json_array(b.user, u.external_id, json({rows})) AS user FROM {of} JOIN users u ON u.key = b.user"
    found = db.execute(f"SELECT json_group_array(json(user)) FROM ({one})").fetchone()[0]
    users = msgspec.json.decode(found, type=list[User])
    behind = [user.key for user in users if user.key > after]
    return users, max(behind or [user.key for user in users], default=-1)


def settle(db: sqlite3.Connection, results: list[Settled], now: float) -> None:
    """Notes what is known now. One transaction."""
    with transaction(db):
        db.execute("DELETE FROM temp.batch")
        for result in results:
            _settle(db, result, now)
        collect(db, "{} IN (SELECT user FROM temp.batch)")
        written = {row[1] for result in results for row in (*result.sent, *result.refused)}
        in_step = "joining + leaving = 0 AND id IN (SELECT value FROM json_each(?))"
        db.execute(f"UPDATE cohorts SET synced_at = ? WHERE {in_step}", (now, msgspec.json.encode(written).decode()))
        bury(db)


def _settle(db: sqlite3.Connection, result: Settled, now: float) -> None:
    columns = ("user", "cohort", "sent", "wanted")
    values_of = ", ".join(f"json_extract(value, '$[{at}]') AS {name}" for at, name in enumerate(columns))
    each = f"SELECT {values_of} FROM json_each(?)"
    row = "members.user = j.user AND members.cohort = j.cohort"
    changes = (
        (result.sent, "sent = j.sent, rejected = 0"),
        (result.refused, "sent = j.sent, rejected = (members.wanted = j.wanted)"),
        (result.back, "sent = j.sent"),
    )
    for values, change in changes:
        if values:
            given = msgspec.json.encode(values).decode()
            db.execute(f"UPDATE members SET {change} FROM ({each}) j WHERE {row}", (given,))
            db.execute(
                "INSERT OR IGNORE INTO temp.batch SELECT json_extract(value, '$[0]') FROM json_each(?)", (given,)
            )
    if result.sent:
        given = msgspec.json.encode([user for user, *_ in result.sent]).decode()
        elsewhere = "EXISTS (SELECT 1 FROM members WHERE user = refusals.user AND rejected = 1)"
        db.execute(f"DELETE FROM refusals WHERE user IN (SELECT value FROM json_each(?)) AND NOT {elsewhere}", (given,))
    if result.reasons:
        db.execute(
            "INSERT INTO refusals (user, reason, attempts, first_at, last_at)"
            " SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), 1, :now, :now FROM json_each(:reasons) WHERE true"
            " ON CONFLICT (user) DO UPDATE SET reason = excluded.reason, attempts = attempts + 1, last_at = :now",
            {"now": now, "reasons": msgspec.json.encode(result.reasons).decode()},
        )
    if result.refund:
        charge(db, result.day, -result.refund)


def due_users(db: sqlite3.Connection, after: int, limit: int, *, rows: bool) -> tuple[int, int | None]:
    """How many users (or rows) are due behind a key, among the next `limit` rows; the key to go on from, None: that's all."""
    what = "count(*)" if rows else "count(DISTINCT user)"
    # A user's rows stand together, so the last one of a step is left to the next.
    found, last, seen = db.execute(
        f"SELECT {what}, max(user), count(*) FROM (SELECT user FROM members INDEXED BY due WHERE {DUE} AND user > ?"
        " ORDER BY user LIMIT ?)",
        (after, limit),
    ).fetchone()
    if seen < limit:
        return found, None
    mine = db.execute(f"SELECT count(*) FROM members INDEXED BY due WHERE {DUE} AND user = ?", (last,)).fetchone()[0]
    inside = db.execute(
        f"SELECT count(*) FROM (SELECT user FROM members INDEXED BY due WHERE {DUE} AND user > ? ORDER BY user LIMIT ?)"
        " WHERE user = ?",
        (after, limit, last),
    ).fetchone()[0]
    return found + (mine - inside if rows else 0), last
