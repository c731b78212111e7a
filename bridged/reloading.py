"""What may change while the daemon runs, and who notices: SIGHUP, and files of secrets that are replaced.

Most keys are read by parts that can be told; the others (a listener, the spool's file) need a restart, which loses nothing.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

from bridged.apart import apart
from bridged.config import keys, replaced, value_at
from bridged.errors import ConfigError
from bridged.settings import Config

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
    """Takes what was read: `said` gives the configuration, or raises why there is none."""

    def __call__(self, said: Callable[[], Config], *, asked: bool) -> None:
        """`asked`: by somebody, and not only by a changed file."""


class Rereading:
    """Reads the configuration again for whoever asks, one at a time; who asks meanwhile gets another reading after it.

    In a thread: what comes to no end, such as a pipe to which nobody writes, holds up nothing else.
    """

    def __init__(self, read: Callable[[], Config], take: Take) -> None:
        self.asked = False  # somebody waits for the next one, and not only a changed file
        self._read = read
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
            reading = asyncio.ensure_future(apart(self._read, "configuration"))
            try:
                done, _ = await asyncio.wait([reading], timeout=_READ_S)
                self._take(reading.result if done else _never_ends, asked=asked)
            finally:
                reading.cancel()


def _never_ends() -> Config:
    raise ConfigError(
        f"it, or the file of a secret, couldn't be read within {_READ_S:g} s",
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
        now = await asyncio.to_thread(_digests, looked_at) if looked_at else {}
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
