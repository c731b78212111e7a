"""Files that are on the disk, whole and under their names, once they are said to be. Each call blocks."""

import contextlib
import os
import sqlite3
from pathlib import Path


def sync(path: Path) -> None:
    """Brings a file to the disk, or what is in a folder, as names. Raises OSError."""
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def settle_file(partial: Path, target: Path) -> None:
    """Gives a complete file its name, for good. Raises OSError."""
    sync(partial)
    partial.replace(target)
    sync(target.parent)


def copy(db: sqlite3.Connection, target: Path) -> None:
    """A copy of a database as it is, complete or not there, for nobody else's eyes. Raises OSError, sqlite3.Error."""
    partial = Path(f"{target}.partial")
    partial.unlink(missing_ok=True)
    os.close(os.open(partial, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    with contextlib.closing(sqlite3.connect(partial)) as copied:
        db.backup(copied)
    settle_file(partial, target)
