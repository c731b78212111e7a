"""The files of Unix sockets: whose they are, and who may take them away."""

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Mapping
from typing import Final

_MAX_PATH_BYTES: Final = 107


def demand_possible(path: str) -> None:
    """Raises OSError for a path that no socket can have: too long a one, or something else is there."""
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise OSError(errno.ENAMETOOLONG, f"the path of a socket has at most {_MAX_PATH_BYTES} bytes")
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(mode := os.stat(path).st_mode):  # noqa: PTH116
            raise FileExistsError(errno.EEXIST, f"there is a {'folder' if stat.S_ISDIR(mode) else 'file'}, no socket")


def demand_nobody_listens(path: str) -> None:
    """Raises OSError. A socket that somebody answers at is another daemon's; one that nobody does a crash left behind."""
    demand_possible(path)
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(ConnectionRefusedError, FileNotFoundError):
        probe.settimeout(1)
        probe.connect(path)
        raise OSError(errno.EADDRINUSE, f"somebody listens at {path}")


def remove(path: str, own: Mapping[str, int]) -> None:
    """Removes a socket's file, if it is ours: `own` says which inode we made at which path."""
    with contextlib.suppress(OSError):
        if os.stat(path).st_ino == own.get(path):  # noqa: PTH116
            os.unlink(path)  # noqa: PTH108
