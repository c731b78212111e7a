"""What lies in the spool's file, and what is done to it in the connection's thread. The spool says when.

The type of an event is one byte, its position in this version's table of event types. The file holds the table that it was
written with, so that a version with another table finds what waits under the types that it came with.
"""

import contextlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from bridged.backlog.segment import Segment

SCHEMA_VERSION: Final = 1
SCHEMA: Final = """
CREATE TABLE segments (
  id INTEGER PRIMARY KEY, created_at REAL NOT NULL, raw_bytes INTEGER NOT NULL, raw_crc32 INTEGER NOT NULL,
  checksum INTEGER NOT NULL, codes BLOB NOT NULL, block BLOB NOT NULL
);
CREATE TABLE dead_letters (
  id INTEGER PRIMARY KEY AUTOINCREMENT, first_at REAL NOT NULL, last_at REAL NOT NULL, attempts INTEGER NOT NULL,
  stage TEXT NOT NULL, code INTEGER NOT NULL, event_type TEXT NOT NULL, reason TEXT NOT NULL, event BLOB NOT NULL
);
CREATE TABLE event_types (code INTEGER PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE books (id INTEGER PRIMARY KEY CHECK (id = 1), body BLOB NOT NULL);
INSERT INTO books VALUES (1, '{}');
"""
SEGMENT_COLUMNS: Final = "id, created_at, raw_bytes, raw_crc32, codes, block, checksum"
DEAD_LETTER_BYTES: Final = 256  # of a dead letter besides its event
_NEVER_RIGHT: Final = -1  # as a checksum


class Letters(NamedTuple):
    """How many dead letters, and what they cost on disk, in bytes."""

    rows: int
    bytes: int

    def less(self, other: "Letters") -> "Letters":
        """Without the others."""
        return Letters(self.rows - other.rows, self.bytes - other.bytes)

    def exceed(self, cap: "Letters") -> bool:
        """Whether they are too many, or too large."""
        return self.rows > cap.rows or self.bytes > cap.bytes


NONE: Final = Letters(0, 0)


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


def measured(db: sqlite3.Connection) -> int:
    """The bytes of the pages that hold something."""
    pages = "(SELECT page_count FROM pragma_page_count) - (SELECT freelist_count FROM pragma_freelist_count)"
    used: int = db.execute(f"SELECT ({pages}) * (SELECT page_size FROM pragma_page_size)").fetchone()[0]
    return used


def is_full(error: sqlite3.Error) -> bool:
    """Whether there was no room, in the file or on the disk; errors of the module itself have no code."""
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL


def adopt_types(db: sqlite3.Connection, names: Mapping[int, str]) -> None:
    """Translates the codes in the file, if need be, from the table that it was written with to `names`."""
    theirs = dict(db.execute("SELECT code, name FROM event_types").fetchall())
    if theirs == names:
        return
    ours = {name: code for code, name in names.items()}
    unknown = ours["(unknown)"]
    codes = bytes(ours.get(theirs.get(code, ""), unknown) for code in range(256))
    with transaction(db):
        db.execute("DELETE FROM event_types")
        db.executemany("INSERT INTO event_types VALUES (?, ?)", names.items())
        ours_of = "json_extract(?1, '$[' || code || ']')"
        db.execute(f"UPDATE dead_letters SET code = {ours_of} WHERE code != {ours_of}", (_json(list(codes)),))
        moved = [id_ for id_, of in db.execute("SELECT id, codes FROM segments") if of.translate(codes) != of]
        for id_ in moved:
            *columns, checksum = db.execute(f"SELECT {SEGMENT_COLUMNS} FROM segments WHERE id = ?", (id_,)).fetchone()
            segment = Segment(*columns)
            intact = segment.checksum == checksum
            segment.codes = segment.codes.translate(codes)
            checksum = segment.checksum if intact else _NEVER_RIGHT
            db.execute("UPDATE segments SET codes = ?, checksum = ? WHERE id = ?", (segment.codes, checksum, id_))


def delete_segments(db: sqlite3.Connection, segments: Sequence[Segment]) -> int:
    """Gives the number of those that were there."""
    ids = _json([segment.id for segment in segments])
    return db.execute("DELETE FROM segments WHERE id IN (SELECT value FROM json_each(?))", (ids,)).rowcount


def letters_that(db: sqlite3.Connection, condition: str = "1", values: Sequence[Any] = ()) -> Letters:
    """Counts the dead letters that meet a condition."""
    size = f"coalesce(sum(length(event) + {DEAD_LETTER_BYTES}), 0)"
    return Letters(*db.execute(f"SELECT count(*), {size} FROM dead_letters WHERE {condition}", values).fetchone())


def delete_letters(db: sqlite3.Connection, condition: str, values: Sequence[Any]) -> Letters:
    """Deletes the dead letters that meet a condition."""
    gone = letters_that(db, condition, values)
    db.execute(f"DELETE FROM dead_letters WHERE {condition}", values)
    return gone


def delete_replayed(db: sqlite3.Connection, ids: Sequence[int]) -> tuple[set[int], Letters]:
    """Deletes dead letters; says which of them were there."""
    condition, values = "id IN (SELECT value FROM json_each(?))", (_json(ids),)
    there = {id_ for (id_,) in db.execute(f"SELECT id FROM dead_letters WHERE {condition}", values)}
    return there, delete_letters(db, condition, values)


def delete_oldest(db: sqlite3.Connection, excess: Letters) -> Letters:
    """Deletes dead letters until the excess is gone."""
    rows = size = up_to = 0
    query = f"SELECT id, length(event) + {DEAD_LETTER_BYTES} FROM dead_letters ORDER BY id"
    with contextlib.closing(db.execute(query)) as oldest:
        for id_, of in oldest:
            if rows >= excess.rows and size >= excess.bytes:
                break
            up_to, rows, size = id_, rows + 1, size + of
    db.execute("DELETE FROM dead_letters WHERE id <= ?", (up_to,))
    return Letters(rows, size)


def _json(values: Sequence[int]) -> str:
    return msgspec.json.encode(values).decode()
