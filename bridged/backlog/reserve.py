"""The room on the disk: how much is free, and a ballast file that is given up when there is none.

On a full disk SQLite can't even delete: a deletion is written to the WAL first, and a checkpoint may have to make the file
longer. So the spool takes new events only while so much is free that settling can go on, and should something else fill
the disk to the last byte all the same, the ballast is let go. It is larger than the WAL becomes, and a checkpoint that
succeeds frees the WAL: what waits can then be settled, piece by piece, without anybody's help. It is made again when
there is room. Whoever has filled the disk may be writing still, and would take what is let go: the blocks are given to the
file and the WAL in the same moment, and the WAL isn't cut while the disk is short.

Measured by the spool with its commits, and once a second when it is idle; never for an event.
"""

import contextlib
import ctypes
import errno
import os
import resource
import time
from pathlib import Path
from typing import Final

import structlog

from bridged.errors import SpoolError

log = structlog.get_logger()

_MIB: Final = 2**20
# The ballast is twice what the WAL may grow to before a checkpoint, and leaves as much for a commit.
_WAL_SHARE: Final = 4
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_KEEP_SIZE: Final = 1  # of Linux's fallocate: blocks behind the end of a file
_STEP_BYTES: Final = 2**18
_NOT_SUPPORTED: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def reserve_of(max_bytes: int) -> int:
    """What is kept of a file, or of a disk, that may hold so many bytes."""
    return min(64 * _MIB, max(4 * _MIB, max_bytes // 10))


def within_file_limit(max_bytes: int) -> int:
    """What a file may take, if it may take so much: `ulimit -f`, systemd's LimitFSIZE, bounds each file of a process.

    Reached, it would look like a disk that fails; known, it is a cap like ours. Raises SpoolError if nothing fits below it.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit == resource.RLIM_INFINITY or limit >= max_bytes:
        return int(max_bytes)  # a configured size is a kind of its own
    if limit < (needed := 2 * reserve_of(limit)):
        said = f"the process may write files of {limit:,} bytes at most, and the spool needs {needed:,}"
        raise SpoolError(said, "raise the limit: ulimit -f, LimitFSIZE=")
    hint = "the limit is taken for the cap; raise it (ulimit -f, LimitFSIZE=), or set spool.max_bytes below it"
    log.warning("file_size_limited", limit_bytes=limit, max_bytes=max_bytes, hint=hint)
    return limit


def room_to_open(spool: Path) -> None:
    """Lets the ballast go if there is not even room for the WAL's index, without which SQLite opens nothing."""
    disk = os.statvfs(spool.parent)
    if disk.f_bavail * disk.f_frsize < _MIB:
        Path(f"{spool}.reserve").unlink(missing_ok=True)


class Reserve:
    """The ballast `<spool>.reserve` and the free space beside it. Used in the connection's thread; its figures are for all."""

    def __init__(self, spool: Path, max_bytes: int) -> None:
        """Raises OSError when the folder can't be looked at."""
        self._spool = spool
        self._path = Path(f"{spool}.reserve")
        self._folder = spool.parent
        disk = os.statvfs(self._folder)
        # A disk that is smaller than the cap must not be all reserve.
        self.bytes = min(reserve_of(max_bytes), max(2 * _MIB, disk.f_blocks * disk.f_frsize // 8))
        self.wal_bytes = min(4 * _MIB, self.bytes // _WAL_SHARE)  # at which it is brought into the file
        # What one commit may bring: beside it there is room for what the WAL held before, and for what it takes to settle.
        self.commit_bytes = self.bytes // 2
        self.free_bytes = 0  # for us, besides the ballast, as measured last
        self._possible = True
        self._try_again_at = 0.0  # monotonic: an attempt that failed is not repeated with every commit
        self._held = self._is_whole()
        self.measure()
        if self.free_bytes < max_bytes - (spool.stat().st_size if spool.exists() else 0):
            hint = "new events are refused when it is full; set spool.max_bytes to what there is"
            log.warning("disk_smaller_than_cap", free_bytes=self.free_bytes, max_bytes=max_bytes, hint=hint)

    @property
    def held(self) -> bool:
        """Whether the ballast is there, or this file system can't have one."""
        return self._held or not self._possible

    def short(self, pending_bytes: int) -> bool:
        """Whether there is too little room for new events, of which so many bytes are on their way already."""
        # Each byte is written twice: to the WAL, and from there to the file.
        return not self.held or self.free_bytes - 2 * pending_bytes < self.bytes

    def measure(self) -> None:
        """Looks how much is free, and makes the ballast if there is room for it and as much again."""
        self.free_bytes = self._free()
        self._held = self._held and not self._is_gone()  # whoever needs room finds it, and doesn't know what it is for
        if not self.held and self.free_bytes >= 2 * self.bytes:
            self._hold()
            self.free_bytes = self._free()

    def release(self, growth: int) -> None:
        """Gives the ballast up, the disk is full: `growth` bytes of it to the file, for a checkpoint, and the rest to the WAL."""
        if not self._held:
            return
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
        self.give(growth)
        log.error("disk_reserve_released", bytes=self.bytes, file=str(self._path), hint="free space on this disk")
        self._held = False
        self.free_bytes = self._free()

    def give(self, growth: int) -> None:
        """Makes what is free, up to the size of the ballast, blocks of the file and the WAL, so that nobody else takes it."""
        wal = Path(f"{self._spool}-wal")
        given = _extend(self._spool, growth)
        _extend(wal, self.bytes - min(given, self.bytes))

    def no_room_for(self, size: int) -> bool:
        """Whether the file system, or a quota on it, has no room for so many bytes more: asked of it, not of its figures."""
        probe = Path(f"{self._path}.probe")
        try:
            self._allocate(probe, max(size, _MIB))
        except OSError as error:
            return error.errno in _NO_ROOM
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)
        return False

    def _free(self) -> int:
        try:
            disk = os.statvfs(self._folder)
        except OSError:  # the next write tells what is wrong with it
            return self.free_bytes
        return disk.f_bavail * disk.f_frsize

    def _is_gone(self) -> bool:
        """No if it can't be seen: a folder that may not be entered any more has taken no room."""
        try:
            self._path.stat()
        except OSError as error:
            return isinstance(error, FileNotFoundError)
        return False

    def _is_whole(self) -> bool:
        """Whether the last process left a ballast as large as ours."""
        try:
            found = self._path.stat()
        except OSError:
            return False
        return found.st_size == self.bytes <= found.st_blocks * 512

    def _hold(self) -> None:
        now_s = time.monotonic()
        if now_s < self._try_again_at:
            return
        try:
            # As much again must really be there: a quota isn't in the figures, and would be met again at once.
            self._allocate(self._path, 2 * self.bytes)
            os.truncate(self._path, self.bytes)
        except OSError as error:
            self._try_again_at = now_s + 1.0
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
            if error.errno in _NOT_SUPPORTED:
                self._possible = False
                log.warning("disk_reserve_impossible", error=str(error), file=str(self._path))
            return
        self._held = True

    @staticmethod
    def _allocate(path: Path, size: int) -> None:
        """Makes a file that has its blocks, without writing them where the file system knows how."""
        file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(file, min(size, os.fstat(file).st_size))
            os.posix_fallocate(file, 0, size)
        finally:
            os.close(file)


def _extend(path: Path, size: int) -> int:
    """Gives a file that this process has open so many bytes of blocks behind its end, or as many as there are.

    By the file descriptor that SQLite has: opening and closing another would drop its locks.
    """
    given = 0
    with contextlib.suppress(OSError, AttributeError):  # another libc, or a file system that knows no such thing
        file = path.stat()
        fallocate = ctypes.CDLL(None).fallocate
        fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        with os.scandir("/proc/self/fd") as opened:
            numbers = [int(entry.name) for entry in opened]
        for number in numbers:
            with contextlib.suppress(OSError):  # the one that listed them
                if os.path.samestat(os.fstat(number), file):
                    while given < size and not fallocate(
                        number, _KEEP_SIZE, file.st_size + given, min(_STEP_BYTES, size - given)
                    ):
                        given += min(_STEP_BYTES, size - given)
                    break
    return given
