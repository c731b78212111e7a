"""Whether an open SQLite file still has its names: one that was removed takes everything with it when the daemon ends.

As long as the daemon runs the files are there, only nobody can find them: what they hold is copied to where it belongs.
"""

import asyncio
import fcntl
import os
import sqlite3
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bridged import durable
from bridged.errors import BridgedError

_SUFFIXES: Final = ("", "-wal", ".lock")
_LOOK_S: Final = 0.25


def claim(file: int, what: str, otherwise: str, error: Callable[[str, str], BridgedError]) -> None:
    """Makes an open lock file this process's own. Raises the error, with the hint `otherwise` if another one has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise error(f"{what} is in use by another bridged", otherwise) from None
    except OSError as why:
        hint = "put it on a local disk: it needs locks, which NFS and the like may not have"
        raise error(f"{what} can't be locked: {why}", hint) from why


def demand_regular(path: Path, what: str, error: Callable[[str, str], BridgedError]) -> None:
    """Raises the error for what is there and is no file, before anything is made beside it."""
    if (kind := no_file(path)) != "":
        raise error(f"can't open {what}: it is {kind}, no file", "name a file, or a path where nothing is yet")


def no_file(path: Path) -> str:
    """What is there, if it is no file, in words; empty: a file, or nothing, or we may not look."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return ""
    return "" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "a device")


_KINDS: Final = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}

LINKED: Final = (
    "what is written goes to each of them, so a hard link is no backup; never start a daemon on one: copy the file"
)


def other_names(path: Path) -> int:
    """How many hard links there are to a file besides the one that we know. Raises OSError but for a file that isn't there."""
    try:
        return path.stat().st_nlink - 1
    except FileNotFoundError:
        return 0


def demand_alone(path: Path, what: str, error: Callable[[str, str], BridgedError]) -> None:
    """Raises the error if another process has a database open by another name of its file, where our lock says nothing.

    Its WAL has that other name, too: two that write by two names destroy the file. Not while this process has it open: closing a
    file drops all its locks.
    """
    with path.open("rb") as file:
        # SQLite's own: whoever has a database in WAL mode open shares these bytes.
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _SHARED_FIRST, _SHARED_SIZE, 0)
        kind, *_, pid = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    if kind != fcntl.F_UNLCK:
        raise error(
            f"{what} is in use by process {pid}, by another name of the file (a hard link)",
            "end that, then give each daemon a file of its own, and remove the link",
        )


_FLOCK: Final = "hhqqi"  # Linux's, as C lays it out
_SHARED_FIRST: Final = 0x40000002
_SHARED_SIZE: Final = 510


class Presence:
    """Knows the files of an open database and its lock. Used in the connection's thread, once a second."""

    def __init__(self, path: Path, error: Callable[[str, str], BridgedError]) -> None:
        """The files are there, and `error` is what is raised when they aren't any more. Raises OSError."""
        self.copied = 0  # steps of the copy that is being made
        self._path = path
        self._error = error
        self._files = {suffix: Path(f"{path}{suffix}").stat() for suffix in _SUFFIXES}

    def demand(self, db: sqlite3.Connection) -> str:
        """Raises the error if a file was removed or replaced. What it held is in a file with a name by then.

        Gives words instead if that can't be done, for want of room mostly: there may be some later.
        """
        gone = [f"{self._path}{suffix}" for suffix, known in self._files.items() if not self._is_there(suffix, known)]
        if not gone:
            return ""
        what = f"{' and '.join(gone)} {'was' if len(gone) == 1 else 'were'} removed or replaced while bridged ran"
        hint = "see what does that there, and start again"
        try:
            saved = self._save(db)
        except (OSError, sqlite3.Error) as error:
            return f"{what}; what it held can't be saved: {error}"
        if saved != self._path:
            hint = f"another file is in its place, and the next start takes that: the README says what to do with {saved.name}"
        raise self._error(f"{what}; what it held was saved in {saved}", hint)

    async def got_on(self, behind: "asyncio.Future[None]") -> None:
        """Comes back when a hop through the thread does, or a copy that it is behind has got on; the hop ends with that."""
        copied = self.copied
        try:
            while not behind.done() and copied == self.copied:
                await asyncio.wait([behind], timeout=_LOOK_S)
        finally:
            behind.cancel()

    def _is_there(self, suffix: str, known: os.stat_result) -> bool:
        try:
            return os.path.samestat(Path(f"{self._path}{suffix}").stat(), known)
        except FileNotFoundError:
            return False
        except OSError:  # the next write tells what is wrong
            return True

    def _save(self, db: sqlite3.Connection) -> Path:
        # First, so that no WAL is left that would be taken for the copy's.
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        if self._is_there("", self._files[""]):
            return self._path
        self._path.parent.mkdir(parents=True, exist_ok=True)
        target = self._path
        if target.exists():
            target = Path(f"{target}.displaced-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
        durable.copy(db, target, self._stepped)
        return target

    def _stepped(self) -> None:
        self.copied += 1
