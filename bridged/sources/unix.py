"""The files of Unix sockets: whose they are, who may take them away, and what is done when somebody did."""

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import structlog

from bridged.apart import apart

log = structlog.get_logger()

_MAX_PATH_BYTES: Final = 107
_MODE: Final = 0o660
_BACKLOG: Final = 1024
_LOOK_S: Final = 1.0
# So long the end waits for folders, which may hang; what is left there the next start takes away.
_REMOVE_S: Final = 2.0


def demand_possible(path: str) -> None:
    """Raises OSError for a path that no socket can have: too long a one, or something else is there."""
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise OSError(errno.ENAMETOOLONG, f"the path of a socket has at most {_MAX_PATH_BYTES} bytes")
    if os.path.islink(path) and not os.path.exists(path):  # noqa: PTH110, PTH114
        raise FileExistsError(errno.EEXIST, f"there is a symbolic link to nothing, {os.readlink(path)}")  # noqa: PTH115
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


@dataclass(slots=True)
class _Socket:
    """One that we listen at."""

    path: str
    server: asyncio.Server
    file: os.stat_result | None  # as we last saw it
    ours: bool  # or whose who handed it over
    lost: str = ""  # why nobody finds us there
    other: tuple[int, ...] = ()  # the file that was in the way when it could not be made anew


class Sockets:
    """A door's Unix sockets. A file of ours that is gone is made anew: without it nobody finds the door.

    Files are looked at, made and removed beside the loop: their folders may hang.
    (As long as a socket is open its inode isn't given to another file, so the number says whose the file is.)
    """

    def __init__(self, accept: Callable[[], asyncio.Protocol]) -> None:
        self.happened: Callable[..., None] = lambda *_what, **_detail: None  # set by whoever keeps what happened
        self._accept = accept
        self._sockets: list[_Socket] = []

    @property
    def lost(self) -> dict[str, str]:
        """Paths at which nobody finds us, and why."""
        return {each.path: each.lost for each in self._sockets if each.lost}

    async def listen(self, path: str) -> None:
        """Makes a socket. Raises OSError."""
        sock, file = await apart(partial(_bound, path), "socket's file")
        self._sockets.append(_Socket(path, await self._serve(sock), file, ours=True))

    async def take(self, sock: socket.socket) -> None:
        """One that was handed over; its file belongs to whoever made it."""
        path = os.fsdecode(sock.getsockname())
        file = await apart(partial(_look_at, path), "socket's file")
        self._sockets.append(_Socket(path, await self._serve(sock), file, ours=False))

    async def _serve(self, sock: socket.socket) -> asyncio.Server:
        # (uvloop has the option in every Python, asyncio since 3.13.)
        loop = asyncio.get_running_loop()
        how = {"sock": sock, "backlog": _BACKLOG, "cleanup_socket": False}
        try:
            return await loop.create_unix_server(self._accept, **how)  # type: ignore[arg-type]
        except BaseException:
            sock.close()
            raise

    async def close(self) -> None:
        """Nobody can connect any more. Files of ours go, if their folders answer in time."""
        for each in self._sockets:
            each.server.close()
        if not (ours := [each for each in self._sockets if each.ours]):
            return
        removing = asyncio.ensure_future(apart(partial(_remove, ours), "sockets' files"))
        done, _ = await asyncio.wait([removing], timeout=_REMOVE_S)
        if not done or removing.exception() is not None:
            removing.cancel()
            log.warning("sockets_left", sockets=[each.path for each in ours], hint="the next start takes them away")

    async def watch(self) -> None:
        """Looks at the files until it is cancelled."""
        # Of those that were handed over some have no file, or one of a folder that we don't know.
        watched = [each for each in self._sockets if each.path.startswith("/") or each.ours]
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                found = await apart(lambda: [_look_at(each.path) for each in watched], "sockets' files")
            except OSError:  # there may be no more threads: later, then
                continue
            for each, file in zip(watched, found, strict=True):
                await self._look_after(each, file)

    async def _look_after(self, one: _Socket, found: os.stat_result | None) -> None:
        if _is_same(found, one.file):
            one.file = found  # somebody may have given it to another group
            if one.lost:
                one.lost = ""
                log.info("socket_found", socket=one.path)
        elif not one.ours:
            _lose(one, "it was removed or replaced: restart the .socket unit that made it")
        elif found is None or _identity(found) != one.other:
            await self._make_anew(one, found)

    async def _make_anew(self, one: _Socket, found: os.stat_result | None) -> None:
        try:
            sock, file = await apart(partial(_bound, one.path, one.file), "socket's file")
            server = await self._serve(sock)
        except OSError as error:
            if found is not None:
                one.other = _identity(found)
            _lose(one, f"it was removed or replaced, and can't be made anew: {error.strerror or error}")
            return
        one.server.close()
        one.server, one.file, one.lost, one.other = server, file, "", ()
        log.warning("socket_made_anew", socket=one.path, hint="somebody has removed its file: see who does that there")
        self.happened("door", f"Somebody removed the socket {one.path}: it was made anew", "warning")


def _bound(path: str, before: os.stat_result | None = None) -> tuple[socket.socket, os.stat_result]:
    """A socket that listens at a path, and its file, which is as that `before` was. Raises OSError, and leaves none open."""
    demand_nobody_listens(path)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.setblocking(False)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108  # a socket that nobody listens at
        sock.bind(path)
        if before is not None:
            with contextlib.suppress(OSError):  # a group that isn't ours
                os.chown(path, -1, before.st_gid)
        os.chmod(path, _MODE if before is None else stat.S_IMODE(before.st_mode))  # noqa: PTH101
        sock.listen(_BACKLOG)
        return sock, os.stat(path)  # noqa: PTH116
    except OSError:
        sock.close()
        raise


def _remove(sockets: Sequence[_Socket]) -> None:
    for each in sockets:
        if _is_same(_look_at(each.path), each.file):
            with contextlib.suppress(OSError):
                os.unlink(each.path)  # noqa: PTH108


def _lose(one: _Socket, why: str) -> None:
    if one.lost != why:
        log.error("socket_lost", socket=one.path, error=why, hint="nobody who comes now finds the stream door there")
    one.lost = why


def _look_at(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)  # noqa: PTH116
    except OSError:
        return None


def _is_same(one: os.stat_result | None, other: os.stat_result | None) -> bool:
    return one is not None and other is not None and os.path.samestat(one, other)


def _identity(found: os.stat_result) -> tuple[int, ...]:
    """Of a file that isn't ours: when it is gone, the next one may get its inode."""
    return found.st_dev, found.st_ino, found.st_ctime_ns
