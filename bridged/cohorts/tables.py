"""What lies in the cohorts' file. What is done to it stands in `merging` (from Mixpanel) and `taking` (to Braze).

    inbox     pages as they came, committed and answered; merged into the rest in order, many at a time
    cohorts   one row each; triggers keep the counts of its members true, whatever statement moves them
    rounds    one row a session of Mixpanel's. Their ids rise: a row of members is stamped with the last that spoke of it
    pages     which pages of a round have come
    users     external ids, once
    members   who is in which cohort: as Mixpanel wants it, and as Braze is known to have it
    walks     passes over all members (sweeps, renames, ...) in steps of bounded size, and how far each has come
    refusals  users that Braze refused
    spending  data points by UTC day

`wanted` is 0 (out) or the version of the cohort's name under which the user is to be in; `sent` is 0, a version, or -1: a
request that may or may not have been carried out. A row is due while they differ. -1 is committed before the request
leaves, so that nobody whom Braze may have is ever forgotten.

All of that is about the target that is written: a workspace, and in it an attribute or a partner. `elsewhere` has a bit for
each earlier one that may still have the user in the cohort, for the day on which it is the target again. A row that is out
on both sides, and nowhere else, is deleted.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from bridged.errors import LOCKED, MembershipError, is_locked

PAGE_BYTES: Final = 4096
APPLICATION_ID: Final = 0x62726300
_WAL_BYTES: Final = 64 * 2**20
_CACHE_KB: Final = 32768
_NO_ROOM_BYTES: Final = 2**20

COUNTS: Final = ("in_braze", "joining", "leaving", "rejected", "rejected_leaving")
DUE: Final = "wanted <> sent AND rejected = 0"
SCHEMA: Final = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE inbox (
  id INTEGER PRIMARY KEY AUTOINCREMENT, received_at REAL NOT NULL, members INTEGER NOT NULL, head TEXT NOT NULL,
  ids TEXT NOT NULL
);
CREATE TABLE cohorts (
  id INTEGER PRIMARY KEY AUTOINCREMENT, project TEXT NOT NULL, mixpanel_id TEXT NOT NULL, name TEXT NOT NULL,
  description TEXT NOT NULL, created_at REAL NOT NULL, version INTEGER NOT NULL DEFAULT 1,
  announced INTEGER NOT NULL DEFAULT 0, forgotten INTEGER NOT NULL DEFAULT 0,
  in_braze INTEGER NOT NULL DEFAULT 0, joining INTEGER NOT NULL DEFAULT 0, leaving INTEGER NOT NULL DEFAULT 0,
  rejected INTEGER NOT NULL DEFAULT 0, rejected_leaving INTEGER NOT NULL DEFAULT 0,
  pages INTEGER NOT NULL DEFAULT 0, received INTEGER NOT NULL DEFAULT 0, applied INTEGER NOT NULL DEFAULT 0,
  no_id INTEGER NOT NULL DEFAULT 0, too_long INTEGER NOT NULL DEFAULT 0, stale INTEGER NOT NULL DEFAULT 0,
  last_page_at REAL, synced_at REAL, UNIQUE (project, mixpanel_id)
);
CREATE TABLE rounds (
  id INTEGER PRIMARY KEY AUTOINCREMENT, cohort INTEGER NOT NULL, session TEXT NOT NULL, action TEXT NOT NULL,
  total INTEGER NOT NULL, started_at REAL NOT NULL, last_page_at REAL NOT NULL, pages INTEGER NOT NULL DEFAULT 0,
  complete INTEGER NOT NULL DEFAULT 0, superseded INTEGER NOT NULL DEFAULT 0,
  received INTEGER NOT NULL DEFAULT 0, no_id INTEGER NOT NULL DEFAULT 0, too_long INTEGER NOT NULL DEFAULT 0,
  stale INTEGER NOT NULL DEFAULT 0, seen INTEGER NOT NULL DEFAULT 0, joined INTEGER NOT NULL DEFAULT 0,
  "left" INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX newest_round ON rounds (cohort);
CREATE INDEX rounds_of ON rounds (cohort, session, action);
CREATE TABLE pages (round INTEGER NOT NULL, page INTEGER NOT NULL, PRIMARY KEY (round, page)) WITHOUT ROWID;
CREATE TABLE users (key INTEGER PRIMARY KEY, external_id TEXT NOT NULL UNIQUE);
CREATE TABLE members (
  user INTEGER NOT NULL, cohort INTEGER NOT NULL, stamp INTEGER NOT NULL, wanted INTEGER NOT NULL,
  sent INTEGER NOT NULL, rejected INTEGER NOT NULL, PRIMARY KEY (user, cohort)
) WITHOUT ROWID;
CREATE INDEX due ON members (user, cohort) WHERE {DUE};
CREATE TABLE walks (
  id INTEGER PRIMARY KEY AUTOINCREMENT, cohort INTEGER NOT NULL, kind TEXT NOT NULL, round INTEGER NOT NULL,
  cursor INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE refusals (
  user INTEGER PRIMARY KEY, reason TEXT NOT NULL, attempts INTEGER NOT NULL, first_at REAL NOT NULL, last_at REAL NOT NULL
);
CREATE TABLE spending (day TEXT PRIMARY KEY, points INTEGER NOT NULL, allowed INTEGER NOT NULL) WITHOUT ROWID
"""


def _is(row: str, count: str) -> str:
    """Whether a row of members belongs to a count of its cohort."""
    differs = f"{row}.wanted <> {row}.sent"
    return {
        "in_braze": f"({row}.wanted > 0 AND {row}.wanted = {row}.sent)",
        "joining": f"({row}.wanted > 0 AND {differs} AND {row}.rejected = 0)",
        "leaving": f"({row}.wanted = 0 AND {differs} AND {row}.rejected = 0)",
        "rejected": f"({row}.wanted > 0 AND {differs} AND {row}.rejected = 1)",
        "rejected_leaving": f"({row}.wanted = 0 AND {differs} AND {row}.rejected = 1)",
    }[count]


def _counted(*terms: tuple[str, str]) -> str:
    """The statement of a trigger: each count of the cohort plus or minus what each row (new, old) is."""
    sums = [f"{count} = {count} {' '.join(f'{sign} {_is(row, count)}' for sign, row in terms)}" for count in COUNTS]
    return f"BEGIN UPDATE cohorts SET {', '.join(sums)} WHERE id = {terms[0][1]}.cohort; END"


_MOVES: Final = "wanted, sent, rejected"
_CHANGED: Final = "(old.wanted, old.sent, old.rejected) <> (new.wanted, new.sent, new.rejected)"
TRIGGERS: Final = (
    f"CREATE TRIGGER came AFTER INSERT ON members {_counted(('+', 'new'))}",
    f"CREATE TRIGGER went AFTER DELETE ON members {_counted(('-', 'old'))}",
    f"CREATE TRIGGER moved AFTER UPDATE OF {_MOVES} ON members WHEN {_CHANGED} {_counted(('+', 'new'), ('-', 'old'))}",
)
# Of the connection alone, in memory: what one transaction works on.
SCRATCH: Final = (
    "CREATE TEMP TABLE batch (user INTEGER PRIMARY KEY)",
    "CREATE TEMP TABLE taken (user INTEGER NOT NULL, cohort INTEGER NOT NULL, PRIMARY KEY (user, cohort)) WITHOUT ROWID",
)
# The first leads from format 1 to 2. Each runs in one transaction with the number of the format.
MIGRATIONS: Final[tuple[str, ...]] = ("ALTER TABLE members ADD COLUMN elsewhere INTEGER NOT NULL DEFAULT 0",)
NEWEST: Final = 1 + len(MIGRATIONS)


def set_up(db: sqlite3.Connection, path: Path, max_bytes: int) -> None:
    """Makes a new file's tables, or brings an older format up to ours. Raises MembershipError for a newer one, untouched."""
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    if version > NEWEST:
        raise MembershipError(
            f"the cohorts' file {path} was written by a newer bridged (version {version}, this one knows {NEWEST})",
            "it was left untouched: run the newer version, or set cohorts.path",
        )
    application = db.execute("PRAGMA application_id").fetchone()[0]
    tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if (version or tables) and application != APPLICATION_ID:
        raise MembershipError(f"{path} is not a file of bridged's cohorts", "set cohorts.path to one, or to a new file")
    if not tables:
        db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute(f"PRAGMA wal_autocheckpoint = {_WAL_BYTES // PAGE_BYTES}")
    db.execute(f"PRAGMA journal_size_limit = {2 * _WAL_BYTES}")
    db.execute(f"PRAGMA cache_size = -{_CACHE_KB}")
    db.execute("PRAGMA temp_store = MEMORY")
    db.execute("PRAGMA secure_delete = OFF")
    db.execute(f"PRAGMA max_page_count = {max_bytes // PAGE_BYTES}")
    if version < NEWEST:
        with transaction(db):
            if version == 0:
                for statement in (*SCHEMA.split(";"), *TRIGGERS):
                    db.execute(statement)
                version = 1
            for migration in MIGRATIONS[version - 1 :]:
                db.execute(migration)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {NEWEST}")
    for statement in SCRATCH:
        db.execute(statement)


def passes(error: Exception, path: Path) -> bool:
    """Whether it is no reason to end: the file is locked for now, or has no room."""
    return is_locked(error) or is_full(error, path)


def is_full(error: Exception, path: Path) -> bool:
    """Whether an error says that there is no room. Without any, SQLite's index of the WAL fails with an error of I/O."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)
    if code == sqlite3.SQLITE_FULL or code & 0xFF not in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
        return code == sqlite3.SQLITE_FULL
    with contextlib.suppress(OSError):
        disk = os.statvfs(path.parent)
        return disk.f_bavail * disk.f_frsize < _NO_ROOM_BYTES
    return False


def remedy(error: Exception, path: Path) -> str:
    """What a person can do about a file that can't be used."""
    if is_locked(error):
        return f"{LOCKED}, and start bridged again"
    if is_full(error, path):
        return "its disk is full: free some space, and start bridged again"
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return "move it away, start bridged again, and reconnect the cohorts in Mixpanel for a full sync"
    return "look at its disk and its permissions, and start bridged again"


def collect(db: sqlite3.Connection, among: str, values: Sequence[object] = ()) -> None:
    """Deletes rows that are out everywhere, and users who are in no cohort. `among` is a condition on `{}`, a user's key."""
    db.execute(
        f"DELETE FROM members WHERE {among.format('user')} AND wanted = 0 AND sent = 0 AND elsewhere = 0", values
    )
    for table, key in (("refusals", "user"), ("users", "key")):
        nowhere = f"NOT EXISTS (SELECT 1 FROM members WHERE members.user = {table}.{key})"
        db.execute(f"DELETE FROM {table} WHERE {among.format(key)} AND {nowhere}", values)


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All of it, or nothing."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
