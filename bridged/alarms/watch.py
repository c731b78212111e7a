"""The look at the facts, once a second, and the four places where a notice goes: the log, the webhook, metrics, the status.

What was told is kept in `<spool>.alarms`, so that a restart tells nothing twice, and the end of what began before it; with it
what the webhook's receiver has yet to take.
"""

import asyncio
import contextlib
import shutil
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from bridged.alarms.rules import Alarms, Facts, Notice, Past
from bridged.alarms.webhook import Webhook
from bridged.apart import at_once

log = structlog.get_logger()

_LOOK_S: Final = 1.0
_DISK_LOOK_S: Final = 5.0


class Watch:
    """Owns the alarms. `look` gives the facts of the moment."""

    def __init__(
        self,
        look: Callable[[], Facts],
        spool_path: str,
        webhook: Webhook,
        do: Callable[[Callable[[], None], str], bool] = at_once,
    ) -> None:
        """`do`: by whom the file is written, in order; gives False if he has too much to do."""
        self.alarms = Alarms()
        self.webhook = webhook
        self.disk_free_bytes: int | None = None
        self._look = look
        self._folder = Path(spool_path).resolve().parent
        self._measured = asyncio.Event()  # the disk's free bytes, once at least
        self._host = socket.gethostname()
        self._spool = str(Path(spool_path).absolute())  # which of the daemons there
        self._failed = False
        self.happened: Callable[..., None] = lambda *_what, **_detail: None  # set by whoever keeps what happened
        self._kept = Path(f"{spool_path}.alarms")
        self._unsent: list[dict[str, Any]] = []  # as kept
        self._do = do
        self._behind = False  # what is to be kept could not be handed over
        self._remember()

    async def run(self) -> None:
        """Looks until it is cancelled. Whatever goes wrong here is told, and is nobody else's trouble."""
        try:
            await self._run()
        finally:
            self._keep_unsent(asyncio.get_running_loop().time())

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.webhook.run(), name="webhook")
            tasks.create_task(self._look_at_disk(), name="disk")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._measured.wait()
            while True:
                try:
                    self.step(asyncio.get_running_loop().time())
                    self._failed = False
                except Exception as error:
                    # Told once: a bug in a rule must not end the daemon, nor fill the log.
                    if not self._failed:
                        log.error("alarms_failed", error=repr(error))
                    self._failed = True
                await asyncio.sleep(_LOOK_S)

    def step(self, now: float) -> None:
        """One look; `now` is the loop's time."""
        facts = msgspec.structs.replace(self._look(), disk_free_bytes=self.disk_free_bytes)
        notices = self.alarms.look(facts, now)
        for notice in notices:
            self._tell(notice, facts)
        if notices:
            self._keep(now)
        self._keep_unsent(now)

    def _remember(self) -> None:
        """What can't be read is forgotten: then something is told twice."""
        with contextlib.suppress(OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            past = msgspec.json.decode(self._kept.read_bytes(), type=dict[str, Past])
            self.alarms.remember(past, time.time() - time.monotonic())
            unsent = [body for one in past.values() for body in one.unsent]
            for body in sorted(unsent, key=lambda body: str(body.get("at"))):
                self.webhook.put(body)
            self._unsent = unsent

    def _keep_unsent(self, now: float) -> None:
        """If it has changed: a notice that was sent isn't to be sent again."""
        if self._behind or self.webhook.queued != self._unsent:
            self._keep(now)

    def _keep(self, now: float) -> None:
        past = self.alarms.past(time.time() - now)
        self._unsent = self.webhook.queued
        for body in self._unsent:
            past.setdefault(str(body.get("alarm")), Past()).unsent.append(body)
        self._behind = not self._do(partial(_replace, self._kept, msgspec.json.encode(past)), "alarms")

    def _tell(self, notice: Notice, facts: Facts) -> None:
        if notice.state == "cleared":
            log.info("alarm_cleared", alarm=notice.alarm, text=notice.text, lasted_s=round(notice.lasted_s))
        elif notice.severity == "critical":
            log.error("alarm_raised", alarm=notice.alarm, text=notice.text)
        else:
            log.warning("alarm_raised", alarm=notice.alarm, text=notice.text)
        self.webhook.put(self._body(notice, facts))
        severity = notice.severity if notice.state == "raised" else "info"
        self.happened(
            f"alarm_{notice.state}", notice.text, severity, alarm=notice.alarm, lasted_s=round(notice.lasted_s)
        )

    def _body(self, notice: Notice, facts: Facts) -> dict[str, Any]:
        """As chat programs take it (`text`), and for programs what it says in fields."""
        mark = "Resolved" if notice.state == "cleared" else "Alarm" if notice.severity == "critical" else "Warning"
        at = datetime.now(UTC).isoformat(timespec="seconds")
        return {
            "text": f"{mark}: bridged on {self._host}, {self._spool}: {notice.text}",
            "source": "bridged",
            "host": self._host,
            "spool": self._spool,
            "alarm": notice.alarm,
            "state": notice.state,
            "severity": notice.severity,
            "at": at,
            "lasted_s": round(notice.lasted_s),
            "waiting": facts.waiting,
            "oldest_age_s": None if facts.oldest_age_s is None else round(facts.oldest_age_s),
            "spool_bytes": facts.used_bytes,
        }

    async def _look_at_disk(self) -> None:
        """On its own: a disk that is ill may not answer, and then the alarms are needed most."""
        while True:
            self.disk_free_bytes = await asyncio.to_thread(self._disk_free)
            self._measured.set()
            await asyncio.sleep(_DISK_LOOK_S)

    def _disk_free(self) -> int | None:
        try:
            return shutil.disk_usage(self._folder).free
        except OSError:
            return None


def _replace(file: Path, content: bytes) -> None:
    """Alarms come when a disk is full, too: then it stays as it is. No sync: what a power cut undoes is told twice."""
    part = file.with_name(f"{file.name}.partial")
    with contextlib.suppress(OSError):
        part.write_bytes(content)
        part.chmod(0o600)
        part.replace(file)
