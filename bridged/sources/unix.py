"""The files of Unix sockets: whose they are, and who may take them away."""

import contextlib
import os
import socket
from collections.abc import Mapping


def demand_nobody_listens(path: str) -> None:
    """Raises FileExistsError. A socket that somebody answers at is another daemon's; one that nobody does a crash left behind."""
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(ConnectionRefusedError, FileNotFoundError):
        probe.settimeout(1)
        probe.connect(path)
        raise FileExistsError(f"somebody listens at {path}")


def remove(path: str, own: Mapping[str, int]) -> None:
    """Removes a socket's file, if it is ours: `own` says which inode we made at which path."""
    with contextlib.suppress(OSError):
        if os.stat(path).st_ino == own.get(path):  # noqa: PTH116
            os.unlink(path)  # noqa: PTH108
