"""What lies in the spool's file, and what is done to it in the connection's thread. The spool says when.

The type of an event is one byte, its position in this version's table of event types. The file holds the table that it was
written with, so that a version with another table finds what waits under the types that it came with.

A new format is one more entry in MIGRATIONS. It is gone to in one transaction a step, forward only; a file of a format
that is newer than this version knows is not touched.
"""

import contextlib
import errno
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
from isal import isal_zlib

from bridged import durable
from bridged.backlog.records import DEAD_LETTER_BYTES
from bridged.backlog.segment import Segment
from bridged.errors import SpoolError, is_locked

PAGE_BYTES: Final = 32768
# In the file's header, beside `user_version`: the format a second time, so that a flipped bit isn't taken for a newer one.
APPLICATION_ID: Final = 0x62720000
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
CREATE TABLE books (id INTEGER PRIMARY KEY CHECK (id = 1), body BLOB NOT NULL, checksum INTEGER NOT NULL);
"""
SEGMENT_COLUMNS: Final = "id, created_at, raw_bytes, raw_crc32, codes, block, checksum"
_ROWS: Final = 16  # of segments, in one statement
_NEVER_RIGHT: Final = -1  # as a checksum
_STEP_BYTES: Final = 2**22  # that one transaction rewrites, of many


class Migration(NamedTuple):
    """A step from one format to the next, in one transaction with the number of the format."""

    step: Callable[[sqlite3.Connection], None]
    rewrites: bool  # what is there is changed, not only added to: the file is copied first


# The first leads from format 1 to 2.
MIGRATIONS: Final[Sequence[Migration]] = ()


class Letters(NamedTuple):
    """How many dead letters, and what they cost on disk, in bytes."""

    rows: int
    bytes: int

    def less(self, other: "Letters") -> "Letters":
        """Without the others."""
        return Letters(self.rows - other.rows, self.bytes - other.bytes)

    def more(self, other: "Letters") -> "Letters":
        """With the others."""
        return Letters(self.rows + other.rows, self.bytes + other.bytes)

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


def checkpoint(db: sqlite3.Connection, kind: str) -> None:
    """Brings the WAL into the file, or as much of it as nobody else reads: that is not waited for, the next one does the rest."""
    timeout_ms = db.execute("PRAGMA busy_timeout").fetchone()[0]
    db.execute("PRAGMA busy_timeout = 0")
    try:
        db.execute(f"PRAGMA wal_checkpoint({kind})").fetchall()
    finally:
        db.execute(f"PRAGMA busy_timeout = {timeout_ms}")


def passes(error: sqlite3.Error) -> bool:
    """Whether it is no reason to end: the file is locked for now, or there was no room, in the file or on the disk."""
    return is_locked(error) or getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL


def set_up(db: sqlite3.Connection, synchronous: str, max_bytes: int, wal_bytes: int) -> None:
    """What holds for a connection that writes; for a new file also what holds for the file."""
    # A damaged text must be readable, to be seen.
    db.text_factory = lambda data: data.decode("utf-8", "replace")
    if not format_of(db):
        db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute(f"PRAGMA synchronous = {synchronous}")
    db.execute(f"PRAGMA journal_size_limit = {4 * wal_bytes}")
    db.execute(f"PRAGMA wal_autocheckpoint = {wal_bytes // PAGE_BYTES}")
    db.execute("PRAGMA temp_store = MEMORY")
    # Debian's SQLite overwrites what it deletes, through the WAL: every segment would be written twice as often.
    db.execute("PRAGMA secure_delete = OFF")
    db.execute("PRAGMA cache_size = -4096")
    page = db.execute("PRAGMA page_size").fetchone()[0]
    db.execute(f"PRAGMA max_page_count = {max_bytes // page}")
    with transaction(db):
        pass  # a WAL that is somebody else's is found out before any door is open


def format_of(db: sqlite3.Connection) -> int:
    """The number of the file's format; 0: it is empty."""
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    return version


def newest(migrations: Sequence[Migration]) -> int:
    """The format that this version writes."""
    return 1 + len(migrations)


def refuse_newer(path: str | Path, version: int, migrations: Sequence[Migration]) -> None:
    """Raises SpoolError if the format is one that this version doesn't know."""
    if version > newest(migrations):
        raise SpoolError(
            f"the spool {path} was written by a newer bridged (version {version}, this one knows {newest(migrations)})",
            "it was left untouched: run the newer version, or set spool.path",
        )


def migrate(db: sqlite3.Connection, path: Path, names: Mapping[int, str], migrations: Sequence[Migration]) -> None:
    """Makes a new file's tables, or brings those of an older format up to ours; killed in the midst, it begins again.

    Raises SpoolError if the format is newer, or if there is no room for the copy that is made before data are rewritten.
    """
    version = format_of(db)
    refuse_newer(path, version, migrations)
    if version == 0:
        with transaction(db):
            for statement in filter(str.strip, SCHEMA.split(";")):
                db.execute(statement)
            db.executemany("INSERT INTO event_types VALUES (?, ?)", names.items())
            db.execute("INSERT INTO books VALUES (1, ?, ?)", (b"{}", books_checksum(b"{}", types_checksum(names))))
            _stamp(db, 1)
        version = 1
    if any(migration.rewrites for migration in migrations[version - 1 :]):
        copy(db, Path(f"{path}.version-{version}"))
    for number, migration in enumerate(migrations[version - 1 :], version + 1):
        with transaction(db):
            migration.step(db)
            _stamp(db, number)


def _stamp(db: sqlite3.Connection, version: int) -> None:
    db.execute(f"PRAGMA application_id = {APPLICATION_ID + version}")
    db.execute(f"PRAGMA user_version = {version}")


def copy(db: sqlite3.Connection, target: Path) -> None:
    """A copy of the file before it is changed. Raises SpoolError."""
    try:
        durable.copy(db, target)
    except (OSError, sqlite3.Error) as error:
        raise SpoolError(
            f"can't copy the spool to {target} before it is changed: {error}",
            "make room for a second file of its size; nothing was changed",
        ) from error


def settle_folder(path: Path) -> None:
    """What was made in a spool's folder is there for good. SQLite does it for its WAL, and takes no notice when it fails.

    Raises SpoolError.
    """
    try:
        durable.sync(path.parent)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that know no such thing
            raise SpoolError(f"can't write the folder {path.parent} of the spool: {error}") from error


def one_code_a_name(names: Mapping[int, str]) -> bytes:
    """For `translate`: while codes are exchanged for others, two of them have one name, and are counted as one."""
    codes = {name: code for code, name in names.items()}
    return bytes(codes[names[code]] if code in names else code for code in range(256))


def types_checksum(names: Mapping[int, str]) -> int:
    """CRC-32 of a table of event types."""
    return isal_zlib.crc32(msgspec.json.encode(sorted(names.items())))


def books_checksum(body: bytes, types: int) -> int:
    """CRC-32 of the books and of the table of event types, given as its checksum, that the file's codes refer to."""
    return isal_zlib.crc32(body, types)


def is_corrupt(error: BaseException) -> bool:
    """Whether SQLite found that the file isn't what was written, or the disk doesn't give it back."""
    code = getattr(error, "sqlite_errorcode", 0)
    unreadable = (sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_READ)
    return code & 0xFF in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB} or code in unreadable


def segment_of(row: Sequence[Any]) -> Segment:
    """A row of SEGMENT_COLUMNS. Raises sqlite3.DatabaseError if the values are not even of their kinds."""
    columns = row[:-1]
    if tuple(map(type, columns)) != (int, float, int, int, bytes, bytes):
        error = sqlite3.DatabaseError(f"the columns of segment {columns[0]} are not what was written")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error
    return Segment(*columns)


def intact(row: Sequence[Any]) -> bool:
    """Whether a row of SEGMENT_COLUMNS is what was written."""
    try:
        return bool(segment_of(row).checksum == row[-1])
    except sqlite3.DatabaseError:
        return False


def adopt_types(db: sqlite3.Connection, names: Mapping[int, str]) -> None:
    """Translates the codes in the file, if need be, from the table that it was written with to `names`.

    In steps of a bounded size, killed between any two of which the next start goes on, of whatever version: at every moment the
    table in the file says what each code in it means. So no code may mean two things: those that are to mean something else are
    first exchanged for codes that nobody uses, under the same names.
    """
    while (theirs := _types(db)) != names:
        shifted = {code: name for code, name in theirs.items() if names.get(code, name) != name}
        if shifted:
            of = {name: code for code, name in theirs.items() if code not in shifted}
            unused = (code for code in range(256) if code not in theirs and code not in names)
            to = {code: of[name] if name in of else of.setdefault(name, next(unused)) for code, name in shifted.items()}
            meanwhile = theirs | {to[code]: name for code, name in shifted.items()}
            then: Mapping[int, str] = {code: name for code, name in meanwhile.items() if code not in shifted}
        else:
            of = {name: code for code, name in names.items()}
            to = {code: of.get(name, of["(unknown)"]) for code, name in theirs.items() if names.get(code) != name}
            meanwhile, then = {**theirs, **names}, names
        _say_types(db, meanwhile)
        _translate(db, bytes(to.get(code, code) for code in range(256)))
        _say_types(db, then)


def _types(db: sqlite3.Connection) -> dict[int, str]:
    return dict(db.execute("SELECT code, name FROM event_types").fetchall())


def _say_types(db: sqlite3.Connection, names: Mapping[int, str]) -> None:
    with transaction(db):
        db.execute("DELETE FROM event_types")
        db.executemany("INSERT INTO event_types VALUES (?, ?)", names.items())
        body = db.execute("SELECT body FROM books").fetchone()[0]
        write_books(db, body, types_checksum(names))


def _translate(db: sqlite3.Connection, codes: bytes) -> None:
    """Exchanges each code for the one at its place in `codes`."""
    to = "json_extract(:codes, '$[' || code || ']')"
    for low, high in _windows(db, "dead_letters", "event"):
        values = {"codes": _json(list(codes)), "low": low, "high": high}
        with transaction(db):
            db.execute(f"UPDATE dead_letters SET code = {to} WHERE id > :low AND id <= :high AND code != {to}", values)
    for low, high in _windows(db, "segments", "block"):
        found = db.execute("SELECT id, codes FROM segments WHERE id > ? AND id <= ?", (low, high)).fetchall()
        with transaction(db):
            for id_ in [id_ for id_, of in found if of.translate(codes) != of]:
                row = db.execute(f"SELECT {SEGMENT_COLUMNS} FROM segments WHERE id = ?", (id_,)).fetchone()
                segment = segment_of(row)
                segment.codes = segment.codes.translate(codes)
                checksum = segment.checksum if intact(row) else _NEVER_RIGHT
                db.execute("UPDATE segments SET codes = ?, checksum = ? WHERE id = ?", (segment.codes, checksum, id_))


def _windows(db: sqlite3.Connection, table: str, column: str) -> Iterator[tuple[int, int]]:
    """The rows as ranges (low, high] of ids, with as much in the column as one transaction may bring into the WAL."""
    low = db.execute(f"SELECT coalesce(min(id), 0) - 1 FROM {table}").fetchone()[0]
    while True:
        high, size = low, 0
        with contextlib.closing(
            db.execute(f"SELECT id, length({column}) FROM {table} WHERE id > ? ORDER BY id", (low,))
        ) as rows:
            for id_, of in rows:
                high, size = id_, size + of + DEAD_LETTER_BYTES
                if size >= _STEP_BYTES:
                    break
        if high == low:
            return
        yield low, high
        low = high


def write_books(db: sqlite3.Connection, body: bytes, types: int) -> None:
    """The books, within the transaction whose events they count."""
    db.execute("UPDATE books SET body = ?, checksum = ?", (body, books_checksum(body, types)))


def insert_segments(db: sqlite3.Connection, segments: Sequence[Segment]) -> None:
    """Rows, many in one statement: each one gives the interpreter's lock away, and has to win it back."""
    for at in range(0, len(segments), _ROWS):
        some, values = segments[at : at + _ROWS], []
        for s in some:
            values += [s.id, s.created_at, s.raw_bytes, s.raw_crc32, s.codes, s.block, s.checksum]
        places = ", ".join(["(?, ?, ?, ?, ?, ?, ?)"] * len(some))
        db.execute(f"INSERT INTO segments ({SEGMENT_COLUMNS}) VALUES {places}", values)


def insert_letters(db: sqlite3.Connection, rows: Sequence[Sequence[Any]]) -> None:
    """New dead letters: first_at, last_at, attempts, stage, code, event_type, reason, event."""
    db.executemany(
        "INSERT INTO dead_letters (first_at, last_at, attempts, stage, code, event_type, reason, event)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        rows,
    )


def keep_letters(db: sqlite3.Connection, rows: Sequence[Sequence[Any]], kept: Letters, cap: Letters) -> Letters:
    """The same where no more than `cap` may be kept of `kept`, which counts the new ones. Gives those that had to go.

    They are the oldest, and go first: there may be no room for both.
    """
    gone = delete_oldest(db, kept.less(cap)) if kept.exceed(cap) else NONE
    if rows:
        insert_letters(db, rows)
    kept = kept.less(gone)
    return gone.more(delete_oldest(db, kept.less(cap))) if kept.exceed(cap) else gone


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
