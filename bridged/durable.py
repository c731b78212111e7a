"""Files that are on the disk, whole and under their names, once they are said to be. Each call blocks."""

import contextlib
import errno
import math
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Final

_COPIED_PAGES: Final = 2048  # at a time


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


def _free_bytes(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def copy(db: sqlite3.Connection, target: Path, stepped: Callable[[], None] = lambda: None) -> None:
    """A copy of a database as it is, complete or not there, for nobody else's eyes. Raises OSError, sqlite3.Error.

    `stepped` is called now and then, each time more of it is on the disk.
    """
    size = math.prod(db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
    if _free_bytes(target.parent) < size:
        raise OSError(errno.ENOSPC, f"it has {size:,} bytes, {os.strerror(errno.ENOSPC)}", str(target))
    partial = Path(f"{target}.partial")
    partial.unlink(missing_ok=True)

    def step(_status: int, _remaining: int, _total: int) -> None:
        sync(partial)
        stepped()

    try:
        os.close(os.open(partial, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        with contextlib.closing(sqlite3.connect(partial)) as copied:
            db.backup(copied, pages=_COPIED_PAGES, progress=step)
        settle_file(partial, target)
    except BaseException:
        # On a disk that is full, half a file would keep it so.
        partial.unlink(missing_ok=True)
        raise
