"""The files of Unix sockets: whose they are, who may take them away, and what is done when somebody did."""

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import Callable
from typing import Final

import structlog

log = structlog.get_logger()

_MAX_PATH_BYTES: Final = 107
_MODE: Final = 0o660
_LOOK_S: Final = 1.0


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


class Sockets:
    """A door's Unix sockets. A file of ours that is gone is made anew: without it nobody finds the door.

    (As long as a socket is open its inode isn't given to another file, so the number says whose the file is.)
    """

    def __init__(self, accept: Callable[[], asyncio.Protocol]) -> None:
        self.lost: dict[str, str] = {}  # paths at which nobody finds us, and why
        self.happened: Callable[..., None] = lambda *_what, **_detail: None  # set by whoever keeps what happened
        self._accept = accept
        self._servers: dict[str, asyncio.Server] = {}
        self._files: dict[str, os.stat_result | None] = {}  # as we last saw them: ours, and those that we were handed
        self._others: dict[str, tuple[int, ...]] = {}  # what was in the way of a socket of ours

    async def listen(self, path: str) -> None:
        """Makes a socket. Raises OSError."""
        demand_nobody_listens(path)
        self._servers[path] = await self._made(path)

    async def take(self, sock: socket.socket) -> None:
        """One that was handed over; its file belongs to whoever made it."""
        loop, path = asyncio.get_running_loop(), os.fsdecode(sock.getsockname())
        # (uvloop has the option in every Python, typeshed since 3.13.)
        server = await loop.create_unix_server(self._accept, sock=sock, backlog=1024, cleanup_socket=False)  # type: ignore[call-arg]
        self._servers[f"handed over: {path}"] = server
        if path.startswith("/"):  # others have no file, or one of a folder that we don't know
            self._files[path] = _look_at(path)

    def close(self) -> None:
        """Nobody can connect any more. Files of ours go."""
        for path, server in self._servers.items():
            server.close()
            if (known := self._files.get(path)) is not None and _is_same(_look_at(path), known):
                with contextlib.suppress(OSError):
                    os.unlink(path)  # noqa: PTH108

    async def watch(self) -> None:
        """Looks at the files until it is cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for path, found in (await asyncio.to_thread(self._look)).items():
                await self._look_after(path, found)

    def _look(self) -> dict[str, os.stat_result | None]:
        return {path: _look_at(path) for path in self._files}

    async def _look_after(self, path: str, found: os.stat_result | None) -> None:
        if _is_same(found, self._files[path]):
            self._files[path] = found  # somebody may have given it to another group
            if self.lost.pop(path, None):
                log.info("socket_found", socket=path)
        elif path not in self._servers:
            self._lose(path, "it was removed or replaced: restart the .socket unit that made it")
        elif found is None or _identity(found) != self._others.get(path):
            await self._make_anew(path, found)

    async def _make_anew(self, path: str, found: os.stat_result | None) -> None:
        try:
            demand_possible(path)
            if found is not None:
                await asyncio.to_thread(demand_nobody_listens, path)
            server = await self._made(path, self._files[path])
        except OSError as error:
            if found is not None:
                self._others[path] = _identity(found)
            self._lose(path, f"it was removed or replaced, and can't be made anew: {error.strerror or error}")
            return
        self._servers[path].close()
        self._servers[path] = server
        self._others.pop(path, None)
        self.lost.pop(path, None)
        log.warning("socket_made_anew", socket=path, hint="somebody has removed its file: see who does that there")
        self.happened("door", f"Somebody removed the socket {path}: it was made anew", "warning")

    def _lose(self, path: str, why: str) -> None:
        if self.lost.get(path) != why:
            log.error("socket_lost", socket=path, error=why, hint="nobody who comes now finds the stream door there")
        self.lost[path] = why

    async def _made(self, path: str, before: os.stat_result | None = None) -> asyncio.Server:
        server = await asyncio.get_running_loop().create_unix_server(self._accept, path, backlog=1024)
        if before is not None:
            with contextlib.suppress(OSError):  # a group that isn't ours
                os.chown(path, -1, before.st_gid)
        os.chmod(path, _MODE if before is None else stat.S_IMODE(before.st_mode))  # noqa: PTH101
        self._files[path] = os.stat(path)  # noqa: PTH116
        return server


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
