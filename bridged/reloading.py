"""What may change while the daemon runs, and who notices: SIGHUP, and files of secrets that are replaced.

Most keys are read by parts that can be told; the others (a listener, the spool's file) need a restart, which loses nothing.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeVar

from bridged.apart import apart
from bridged.config import keys, replaced, value_at
from bridged.errors import ConfigError
from bridged.settings import Config

T = TypeVar("T")

# Sections, and single keys, that take effect at once...
_AT_ONCE: Final = (
    ("mixpanel",),
    ("events",),
    ("retention",),
    ("alerts",),
    *[("cohorts", name) for name in ("username", "password", "user_id", "update_existing_only")],
    *[("cohorts", name) for name in ("password_file", "max_data_points_per_day", "max_concurrency")],
    *[("braze", name) for name in ("rest_key", "rest_key_file", "data_import_key", "data_import_key_file")],
    *[("braze", name) for name in ("timeout", "probe_interval")],
    *[("sources", "http", name) for name in ("bearer_token", "bearer_token_file")],
    *[
        ("delivery", name)
        for name in (
            *("max_events_per_second", "max_bytes_per_minute", "max_concurrency"),
            *("flush_interval", "timeout", "probe_interval", "grace"),
        )
    ],
)
# ... but for these, which only the start reads.
_AT_START: Final = (("mixpanel", "export"),)
_LOOK_S: Final = 1.0
# Files are read in milliseconds; a network's folder that is away for longer is asked again.
_READ_S: Final = 5.0
# Threads that hang in files of one kind: with fewer, who has put a file in a pipe's place would have to restart.
_MAX_HANGING: Final = 3
# More is no secret; what is compared stays small.
_MAX_SECRET_BYTES: Final = 64 * 1024


def take_over(old: Config, new: Config) -> tuple[Config, list[str], list[str]]:
    """What is in force from now on, the keys that have changed in it, and those that need a restart. Pure."""
    changed, restart = [], []
    for key in keys():
        if value_at(old, key.path) == (value := value_at(new, key.path)):
            continue
        name = ".".join(key.path)
        if key.path not in _AT_START and any(key.path[: len(prefix)] == prefix for prefix in _AT_ONCE):
            old = replaced(old, key.path, value)
            changed.append(name)
        else:
            restart.append(name)
    return old, changed, restart


class Take(Protocol):
    """Takes what was read. Each gives it, or raises ConfigError, or whatever it is, that says why there is none."""

    def __call__(self, said: Callable[[], Config], certificates: Callable[[], Any], *, asked: bool) -> None:
        """`asked`: by somebody, and not only by a changed file."""


class Rereading:
    """Reads the configuration and certificates again for whoever asks, one at a time; who asks meanwhile gets another reading
    after it.

    In threads: what comes to no end, such as a pipe to which nobody writes, holds up nothing else.
    """

    def __init__(self, read: Callable[[], Config], certificates: Callable[[], Any], take: Take) -> None:
        self.asked = False  # somebody waits for the next one, and not only a changed file
        self._configuration = _Reading(read, "it, or the file of a secret,")
        self._certificates = _Reading(certificates, "the file of a certificate, or its key,")
        self._take = take
        self._wanted = asyncio.Event()

    def want(self, *, asked: bool = True) -> None:
        """The next reading begins as soon as it can."""
        self.asked = self.asked or asked
        self._wanted.set()

    async def run(self) -> None:
        """Reads when it is wanted. Until it is cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            asked, self.asked = self.asked, False
            said, certificates = await asyncio.gather(self._configuration.read(), self._certificates.read())
            self._take(said, certificates, asked=asked)


class _Reading(Generic[T]):
    """Reads some files, as long as there is patience. Threads that hang are counted: when there are too many, none is begun."""

    def __init__(self, read: Callable[[], T], what: str) -> None:
        self._read = read
        self._what = what
        self._hanging: set[asyncio.Task[T]] = set()

    async def read(self) -> Callable[[], T]:
        """What it gives raises why nothing could be read."""
        if len(self._hanging) >= _MAX_HANGING:
            return self._never_ends
        reading = asyncio.create_task(apart(self._read, "reading"), name="reading")
        try:
            done, _ = await asyncio.wait([reading], timeout=_READ_S)
        except asyncio.CancelledError:
            reading.cancel()
            raise
        if done:
            reading.exception()  # perhaps nobody asks: what can't be used is told of the configuration first
            return reading.result
        self._hanging.add(reading)
        reading.add_done_callback(self._came_back)
        return self._never_ends

    def _came_back(self, reading: "asyncio.Task[T]") -> None:
        self._hanging.discard(reading)
        if not reading.cancelled():
            reading.exception()  # nobody else asks

    def _never_ends(self) -> T:
        raise ConfigError(
            f"{self._what} couldn't be read within {_READ_S:g} s",
            "is one of them a pipe to which nobody writes, or on a disk that doesn't answer?",
        )


async def watch(files: Callable[[], Sequence[Path]], changed: Callable[[], None]) -> None:
    """Calls `changed` when what some files hold has changed, and has stayed so for a second. Until it is cancelled.

    Contents are compared, not times: a rename over the file, a symbolic link that points elsewhere (as Kubernetes and
    systemd replace secrets) and a write in place are all the same; a file that comes or goes is a change as well. The
    first look is one, too: nobody knows what the files held when the configuration was read.
    """
    known: dict[Path, bytes] = {}
    seen = known
    while True:
        await asyncio.sleep(_LOOK_S)
        looked_at = files()
        try:
            now = await apart(partial(_digests, looked_at), "secrets") if looked_at else {}
        except OSError:  # there may be no more threads: later, then
            continue
        if now != known and now == seen:
            known = now
            changed()
        seen = now


def _digests(files: Sequence[Path]) -> dict[Path, bytes]:
    """What each file holds, as a digest: no copy of a secret. One that can't be read is left out, and so is a pipe."""
    found = {}
    for file in files:
        with contextlib.suppress(OSError):
            if file.is_file():
                with file.open("rb") as opened:
                    found[file] = hashlib.blake2b(opened.read(_MAX_SECRET_BYTES)).digest()
    return found
