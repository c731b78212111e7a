"""What start-up does about a damaged file: looks for damage, sets the file aside, and brings what is intact into a fresh one.

    finish an interrupted salvage -> read the WAL's frames -> let SQLite check the file -> salvage, if it must be

Nothing of the user's is deleted: the damaged files get a name with the time, and stay until somebody removes them.
All of it happens before the spool's connection is opened.
"""

import contextlib
import glob
import os
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import msgspec
import structlog
from msgspec import Struct

from bridged import durable
from bridged.backlog import tables
from bridged.backlog.accounts import ENDS, Accounts
from bridged.backlog.pages import Pages, Row
from bridged.backlog.records import DeadLetter
from bridged.backlog.reserve import room_to_open
from bridged.backlog.segment import Segment
from bridged.backlog.tables import MIGRATIONS, PAGE_BYTES, SEGMENT_COLUMNS
from bridged.errors import SpoolError, whose

log = structlog.get_logger()

# Larger files aren't read in full at every start: what is wrong in them is found when it is read, or when SQLite finds it.
CHECKED_BYTES: Final = 2**30
# What the lock file says of a spool that SQLite found damaged while it was in use; what it says of any other.
DISTRUSTED: Final = "distrusted"
KNOWN: Final = "spool"
_SUFFIXES: Final = ("", "-wal", "-shm")
_MAX_PATH_BYTES: Final = 504  # 512 with "-journal"


class Found(Struct):
    """What start-up found out about the file before it was opened."""

    damaged: int = 0  # segments that were set aside
    damaged_rows: list[int] = []  # ids of segments whose checksum is wrong, in a file that is whole otherwise
    strays: list[Segment] = []  # acked segments of WAL frames that SQLite doesn't read
    letters: list[Row] = []  # dead letters of such frames


def recover(path: Path, names: Mapping[int, str], known: str) -> Found:
    """Makes sure that the file can be opened. `known`: what the lock file says about it.

    Raises SpoolError when it was written by a newer version, is no spool at all, or can't be salvaged for want of room.
    """
    if (length := len(os.fsencode(path.absolute()))) > _MAX_PATH_BYTES:
        said = f"its path has {length} bytes, and SQLite takes {_MAX_PATH_BYTES} at most"
        raise SpoolError(f"can't open the spool {path}: {said}", "set spool.path to a shorter one")
    _finish(path)
    wal = Path(f"{path}-wal")
    if not path.exists() and wal.is_file() and wal.stat().st_size:
        # Its file is gone. SQLite would make a new one and delete the WAL, and with it what was committed last.
        path.touch(0o600)
    if not path.is_file():
        return Found()
    try:
        room_to_open(path)
        _roll_back(path)
        pages = Pages(path)
        if pages.wal.outrun:
            pages.close()
            _set_wal_aside(path, pages)
            pages = Pages(path)
    except OSError as error:
        raise SpoolError(f"can't open the spool {path}: {error}", whose(error, path, "is it readable?")) from error
    with contextlib.closing(pages):
        found = Found()
        if pages.wal.torn:
            found.strays, found.letters = pages.strays()
        reason = ""
        if (size := path.stat().st_size) >= PAGE_BYTES:
            reason = _examine(path, pages, found, in_full=known.startswith(DISTRUSTED))
        elif size or pages.wal.frames or known:
            # SQLite would take it for a new one, and delete its WAL.
            reason = f"it has only {size} bytes"
        if reason:
            if not pages.is_spool() and not known:
                raise SpoolError(
                    f"can't open the spool {path}: it is not a spool of bridged ({reason})",
                    "it was left untouched: set spool.path, or move it away",
                )
            _salvage(path, pages, names, reason, found)
            found.damaged_rows, found.damaged = [], pages.damaged
        elif pages.wal.certain:
            _keep_wal(path, pages, found)
    return found


def _roll_back(path: Path) -> None:
    """Ends a transaction of before the WAL, in which the file was made: who only reads it can't, and couldn't open it."""
    if Path(f"{path}-journal").is_file():
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("SELECT count(*) FROM sqlite_master").fetchone()


def _keep_wal(path: Path, pages: Pages, found: Found) -> None:
    """A copy of a damaged WAL, which SQLite writes over, for whoever wants to look at it. Raises SpoolError without room."""
    aside = f"{path}.corrupt-{_stamp()}"
    for suffix in _SUFFIXES[1:]:
        try:
            shutil.copyfile(f"{path}{suffix}", f"{aside}{suffix}")
        except FileNotFoundError:
            pass
        except OSError as error:
            for begun in _SUFFIXES[1:]:  # each start would leave some, on a disk that is full
                Path(f"{aside}{begun}").unlink(missing_ok=True)
            raise SpoolError(
                f"{path}{suffix} is damaged, and can't be kept before it is written over: {error}",
                f"make room for {pages.wal.size:,} bytes on this disk; nothing was changed",
            ) from error
    log.error(
        "wal_damaged",
        kept_as=f"{aside}-wal",
        frames_missing=pages.wal.missing,
        segments_found=len(found.strays),
        hint="check the disk: the newest commits were damaged or cut off, and what isn't found of them is lost",
    )


def _set_wal_aside(path: Path, pages: Pages) -> None:
    """Leaves the file without its WAL: it holds all that is left of that, and what came after."""
    aside = f"{path}.corrupt-{_stamp()}"
    for suffix in _SUFFIXES[1:]:
        with contextlib.suppress(FileNotFoundError):
            Path(f"{path}{suffix}").rename(f"{aside}{suffix}")
    log.error(
        "wal_damaged",
        kept_as=f"{aside}-wal",
        frames_missing=pages.wal.missing,
        hint="check the disk: the WAL was damaged or cut off; the file itself holds what was copied into it before",
    )


def files_beside(path: Path) -> tuple[list[str], list[str]]:
    """What is kept beside the spool until somebody looks at it: damaged files, and what `presence` saved; one name each."""
    name = glob.escape(path.name)
    damaged = {str(file).removesuffix("-wal").removesuffix("-shm") for file in path.parent.glob(f"{name}.corrupt-*")}
    displaced = [str(file) for file in path.parent.glob(f"{name}.displaced-*Z")]
    return sorted(damaged), sorted(displaced)


# -- looking -----------------------------------------------------------------------------------------------------------


def _examine(path: Path, pages: Pages, found: Found, *, in_full: bool) -> str:
    """Why the file can't be used; empty if it can. Reads it as SQLite does, and changes nothing.

    Raises SpoolError if it was written by a newer version.
    """
    in_full = in_full or path.stat().st_size <= CHECKED_BYTES
    try:
        db = sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True, isolation_level=None)
    except sqlite3.Error as error:
        return str(error)
    with contextlib.closing(db):
        db.text_factory = lambda data: data.decode("utf-8", "replace")
        try:
            version = tables.format_of(db)
            stamp = db.execute("PRAGMA application_id").fetchone()[0] - tables.APPLICATION_ID
            if stamp != version and (stamp ^ version).bit_count() == 1:
                return f"its format is said to be {version} in one place and {stamp} in another"
            tables.refuse_newer(path, version, MIGRATIONS)
            if version == 0:
                empty = not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
                return "" if empty else "it has tables, and no format"
            if version < tables.newest(MIGRATIONS):
                in_full = False
            if in_full and (problem := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                return f"SQLite: {problem}"
            return _examine_rows(pages, db, found, in_full=in_full)
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
            if tables.is_corrupt(error) or code == sqlite3.SQLITE_ERROR:
                return f"SQLite: {error}"
            hint = whose(error, path, "is its folder writable?")
            raise SpoolError(f"can't open the spool {path}: {error}", hint) from error
        except UnicodeDecodeError as error:
            return f"SQLite quotes what is no text any more: {error}"


def _examine_rows(pages: Pages, db: sqlite3.Connection, found: Found, *, in_full: bool) -> str:
    theirs = dict(db.execute("SELECT code, name FROM event_types").fetchall())
    (body, checksum), *others = db.execute("SELECT body, checksum FROM books").fetchall() or [(b"", 0)]
    if others or type(body) is not bytes or checksum != tables.books_checksum(body, tables.types_checksum(theirs)):
        return "its books are damaged"
    kinds = "typeof(event) != 'blob' OR typeof(reason) != 'text' OR code NOT BETWEEN 0 AND 255"
    if db.execute(f"SELECT count(*) FROM dead_letters WHERE {kinds}").fetchone()[0]:
        return "its dead letters are damaged"
    if root := db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'segments'").fetchone():
        pages.read_ahead(*root)
    last, where = None, "" if in_full else "WHERE typeof(codes) != 'blob'"
    for row in db.execute(f"SELECT {SEGMENT_COLUMNS} FROM segments {where}"):
        if last is not None and row[0] <= last:
            return "its segments are out of order"
        last = row[0]
        if not tables.intact(row):
            found.damaged_rows.append(row[0])
    return ""


# -- salvaging ---------------------------------------------------------------------------------------------------------


def _stamp() -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())


def _salvage(path: Path, pages: Pages, names: Mapping[int, str], reason: str, found: Found) -> None:
    """Writes what is intact into a fresh file, sets the damaged one aside, and puts the fresh one in its place."""
    started, stamp = time.monotonic(), _stamp()
    while Path(f"{path}.corrupt-{stamp}").exists():
        time.sleep(0.2)
        stamp = _stamp()
    aside, partial = f"{path}.corrupt-{stamp}", Path(f"{path}.salvage-partial")
    log.error("spool_damaged", file=str(path), reason=reason, kept_as=aside)
    try:
        partial.unlink(missing_ok=True)
        os.close(os.open(partial, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        with contextlib.closing(sqlite3.connect(partial, isolation_level=None)) as db:
            report = _fill(db, pages, names, found, Path(aside).name)
        durable.settle_file(partial, Path(f"{path}.salvaged-{stamp}"))
        _finish(path)
    except (OSError, sqlite3.Error) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise SpoolError(
            f"the spool {path} is damaged ({reason}), and what is intact can't be brought into a fresh file: {error}",
            f"make room for a second file of its size on this disk, or move {path}* away; nothing was changed",
        ) from error
    log.error("spool_salvaged", file=str(path), kept_as=aside, seconds=round(time.monotonic() - started, 3), **report)


def _fill(db: sqlite3.Connection, pages: Pages, names: Mapping[int, str], found: Found, aside: str) -> dict[str, Any]:
    """Everything that is intact, with books that balance: what they miss is lost, and counted as dead-lettered."""
    # Straight into the file: it is nobody's until it is whole.
    for setting in (
        f"page_size = {PAGE_BYTES}",
        "auto_vacuum = INCREMENTAL",
        "journal_mode = OFF",
        "synchronous = OFF",
    ):
        db.execute(f"PRAGMA {setting}")
    theirs: dict[int, str] = {}
    books: list[Row] = []
    accounts, kept = Accounts(), Counter[int]()
    tables.migrate(db, Path(), {}, MIGRATIONS)
    db.execute("BEGIN")
    segments = letters = 0
    for table, row in pages.rows():
        if table == "segments":
            segment = Segment(*row)
            if _is_new(db, "segments", segment.id):
                tables.insert_segments(db, [segment])
                accounts.add("waiting", segment.codes)
                segments += 1
        elif table == "dead_letters":
            if _is_new(db, "dead_letters", row[0]):
                db.execute("INSERT INTO dead_letters VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
                kept[row[5]] += 1
                letters += 1
        elif table == "event_types":
            theirs[row[0]] = row[1]
        else:
            books.append(row)
    types = next((of for of in (theirs, names) if _right(books, of) is not None), None)
    if types is None:
        known = set(names.values())
        types = {code: theirs.get(code, name) if theirs.get(code) in known else name for code, name in names.items()}
        # Without books, what is there is all that is known.
        accounts.add("dead_lettered", b"".join(bytes([code]) * n for code, n in kept.items()))
        accounts.counts["accepted"] = accounts.counts["waiting"] + accounts.counts["dead_lettered"]
    else:
        same = tables.one_code_a_name(types)
        waiting, accounts.counts["waiting"] = accounts.counts["waiting"], Counter()
        for code, n in waiting.items():
            accounts.counts["waiting"][same[code]] += n
        accounts.load(_right(books, types) or b"{}", {name: code for code, name in types.items()})
    lost, surplus = correct(accounts)
    now = time.time()
    rows = [
        (
            now,
            now,
            1,
            "bridged",
            code,
            types.get(code, ""),
            f"{n} events were lost: the spool was damaged, see {aside}",
            b"",
        )
        for code, n in lost.items()
    ]
    tables.insert_letters(db, rows)
    db.executemany("INSERT INTO event_types VALUES (?, ?)", types.items())
    tables.write_books(db, accounts.dump(types), tables.types_checksum(types))
    db.execute("COMMIT")
    db.execute("PRAGMA journal_mode = WAL")
    return {
        "segments": segments,
        "segments_damaged": pages.damaged,
        "dead_letters": letters,
        "events_waiting": accounts.total("waiting"),
        "events_lost": sum(lost.values()),
        "events_more_than_accounted": sum(surplus.values()),
        "books_lost": not any(_right(books, of) is not None for of in (theirs, names)),
    }


def _is_new(db: sqlite3.Connection, table: str, id_: int) -> bool:
    return db.execute(f"SELECT 1 FROM {table} WHERE id = ?", (id_,)).fetchone() is None


def _right(books: Sequence[Row], types: Mapping[int, str]) -> bytes | None:
    """The books whose checksum is right for a table of event types."""
    checksum = tables.types_checksum(types)
    return next((body for body, given in books if tables.books_checksum(body, checksum) == given), None)


def correct(accounts: Accounts) -> tuple[Counter[int], Counter[int]]:
    """Makes the books balance, by type: what is nowhere is lost, and dead-lettered; what is too much was accepted.

    Gives both, by code. For damaged files only: books that don't balance without damage are a bug that must be seen.
    """
    lost, surplus = Counter[int](), Counter[int]()
    for code in {code for counts in accounts.counts.values() for code in counts}:
        missing = accounts.counts["accepted"][code] - sum(accounts.counts[kind][code] for kind in (*ENDS, "waiting"))
        if missing > 0:
            lost[code] = missing
        elif missing < 0:
            surplus[code] = -missing
    accounts.counts["dead_lettered"] += lost
    accounts.counts["accepted"] += surplus
    return lost, surplus


def _finish(path: Path) -> None:
    """The exchange of files, from wherever it was interrupted: as long as the fresh file has its own name, it isn't done."""
    for fresh in sorted(path.parent.glob(f"{glob.escape(path.name)}.salvaged-*")):
        stamp = fresh.name.removeprefix(f"{path.name}.salvaged-")
        for suffix in _SUFFIXES:
            damaged, aside = Path(f"{path}{suffix}"), Path(f"{path}.corrupt-{stamp}{suffix}")
            if damaged.exists() and not aside.exists():
                damaged.replace(aside)
        durable.settle_file(fresh, path)


# -- in a file that is whole otherwise ---------------------------------------------------------------------------------


def repair(db: sqlite3.Connection, found: Found) -> None:
    """Sets damaged rows aside as dead letters, and brings strays in, in one transaction with the books.

    Codes are still those of the file.
    """
    now, books = time.time(), Accounts()
    names = dict(db.execute("SELECT code, name FROM event_types").fetchall())
    same = tables.one_code_a_name(names)
    books.load(db.execute("SELECT body FROM books").fetchone()[0], {name: code for code, name in names.items()})
    newest = db.execute("SELECT coalesce(max(id), 0) FROM segments").fetchone()[0]
    strays = [segment for segment in found.strays if segment.id > newest]
    newest = db.execute("SELECT coalesce(max(id), 0) FROM dead_letters").fetchone()[0]
    letters = [row for row in found.letters if row[0] > newest]
    ids = msgspec.json.encode(found.damaged_rows).decode()
    damaged = "id IN (SELECT value FROM json_each(?))"
    with tables.transaction(db):
        columns = "id, CAST(block AS BLOB), CAST(codes AS BLOB)"
        blocks = db.execute(f"SELECT {columns} FROM segments WHERE {damaged}", (ids,)).fetchall()
        db.execute(f"DELETE FROM segments WHERE {damaged}", (ids,))
        for (codes,) in db.execute("SELECT codes FROM segments"):
            books.add("waiting", codes.translate(same))
        # Books that don't balance although nothing is damaged are a bug, which must be seen.
        lost, surplus = correct(books) if blocks else (Counter[int](), Counter[int]())
        tables.insert_letters(db, _letters_of(blocks, list(lost.elements()), names, now))
        tables.insert_segments(db, strays)
        for segment in strays:
            books.add("accepted", segment.codes.translate(same))
        tables.insert_letters(db, [row[1:] for row in letters])
        refused = bytes([same[row[5]] for row in letters])
        books.add("accepted", refused)
        books.add("dead_lettered", refused)
        tables.write_books(db, books.dump(names), tables.types_checksum(names))
    if blocks:
        log.error(
            "segments_damaged",
            ids=[id_ for id_, *_ in blocks][:100],
            events_lost=sum(lost.values()),
            events_more_than_accounted=sum(surplus.values()),
            hint="check the disk; they are kept as dead letters",
        )
    if strays or letters:
        log.warning("torn_commit_recovered", segments=len(strays), dead_letters=len(letters))
    found.damaged += len(blocks)


def recount(
    db: sqlite3.Connection, accounts: Accounts, damaged: Sequence[Segment], names: Mapping[int, str]
) -> list[DeadLetter]:
    """Of rows that were found damaged while the daemon runs, and are gone by now: a dead letter for each event that is lost.

    Their codes may be what was damaged: what waits is counted anew, and the books are made to balance.
    """
    counts = {kind: Counter(of) for kind, of in accounts.counts.items()} | {"waiting": Counter[int]()}
    accounts.counts = counts  # its own: the books may share theirs with those that are in force if this fails
    for (codes,) in db.execute("SELECT CAST(codes AS BLOB) FROM segments"):
        accounts.add("waiting", codes or b"")
    lost, _ = correct(accounts)
    rows = _letters_of([(each.id, each.block, each.codes) for each in damaged], list(lost.elements()), names, 0.0)
    return [DeadLetter(code, name, "bridged", reason, event) for *_, code, name, reason, event in rows]


def _letters_of(blocks: Sequence[Row], codes: list[int], names: Mapping[int, str], now: float) -> list[Row]:
    """A dead letter for each lost event. Which row an event was in isn't known for sure: the rows share them in order."""
    letters: list[Row] = []
    for n, (id_, block, row_codes) in enumerate(((id_, block or b"", of or b"") for id_, block, of in blocks), 1):
        share = len(codes) if n == len(blocks) else min(len(codes), len(row_codes))
        reason = f"segment {id_} was damaged on disk"
        for at, code in enumerate(codes[:share]):
            letters.append((now, now, 1, "bridged", code, names.get(code, ""), reason, b"" if at else block))
        del codes[:share]
    return letters
