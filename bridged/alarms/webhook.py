"""Notices on their way to a person: one POST of JSON each, tried again until it is taken, never in anybody's way.

The queue is bounded, the oldest go first, and what didn't get through is counted and shown: an alarm must not be a fault.
"""

import asyncio
import random
from collections import deque
from typing import Any, Final

import aiohttp
import msgspec
import structlog
from msgspec import Struct

from bridged import __version__
from bridged.connections import Connector

log = structlog.get_logger()

_MAX_QUEUED: Final = 100
_TIMEOUT_S: Final = 10.0
# Twice as long each time that it wasn't enough: who is slow has most likely taken the notice, and shall not be told it for ever.
_LONGEST_TIMEOUT_S: Final = 80.0
_BACKOFF_S: Final = 1.0
_BACKOFF_CAP_S: Final = 300.0
# These say that it is this notice that isn't wanted; whatever else is no success may be another time.
_UNWANTED: Final = (400, 413, 422)


class Hook(Struct, frozen=True):
    """Where notices are posted, and as whom. Both may be secrets: they are never shown."""

    url: str = ""
    token: str = ""

    def __repr__(self) -> str:
        return f"<Hook {'set' if self.url else 'unset'}>"


class WebhookStatus(Struct, kw_only=True):
    """What became of the notices since the start."""

    queued: int
    sent: int
    failures: int  # attempts
    dropped: int  # refused for good, or too many at once
    last_error: str  # empty after a success


class Webhook:
    """The sender. `put` is all that others call; `run` is its task."""

    def __init__(self, hook: Hook, rng: random.Random | None = None) -> None:
        self.hook = hook
        self.sent = self.failures = self.dropped = 0
        self.last_error = ""
        self._timeout_s = _TIMEOUT_S
        self._queue: deque[dict[str, Any]] = deque()
        self._changed = asyncio.Event()
        self._rng = rng or random.Random()

    @property
    def status(self) -> WebhookStatus | None:
        """For people; None while there is no webhook."""
        if not self.hook.url:
            return None
        return WebhookStatus(
            queued=len(self._queue),
            sent=self.sent,
            failures=self.failures,
            dropped=self.dropped,
            last_error=self.last_error,
        )

    @property
    def queued(self) -> list[dict[str, Any]]:
        """What waits, oldest first."""
        return list(self._queue)

    def use(self, hook: Hook) -> None:
        """Another address or token from now on: what waits is tried there at once."""
        if hook != self.hook:
            self.hook = hook
            self._timeout_s = _TIMEOUT_S
            self._changed.set()

    def put(self, body: dict[str, Any]) -> None:
        """Queues a notice. Without a webhook it does nothing."""
        if not self.hook.url:
            return
        if len(self._queue) >= _MAX_QUEUED:
            self._queue.popleft()
            self.dropped += 1
        self._queue.append(body)
        self._changed.set()

    async def run(self) -> None:
        """Posts what is queued, one after the other, until it is cancelled."""
        async with aiohttp.ClientSession(
            connector=Connector(),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": f"bridged/{__version__}"},
            trust_env=True,  # a proxy, as for the events; here its cost doesn't matter
        ) as session:
            failed = 0  # in a row
            while True:
                self._changed.clear()
                if not self.hook.url:
                    self._queue.clear()
                if not self._queue:
                    await self._changed.wait()
                    continue
                body = self._queue[0]
                problem = await self._post(session, body)
                # The queue may have turned over meanwhile.
                is_first = bool(self._queue) and self._queue[0] is body
                if not problem:
                    failed, self.last_error = 0, ""
                    self.sent += 1
                    if is_first:
                        self._queue.popleft()
                    continue
                self.failures += 1
                if problem != self.last_error:
                    log.warning("webhook_failed", error=problem, queued=len(self._queue))
                self.last_error = problem
                if problem in {f"HTTP {status}" for status in _UNWANTED}:
                    self.dropped += 1
                    if is_first:
                        self._queue.popleft()
                    continue
                failed += 1
                await self._pause(min(_BACKOFF_S * 2.0 ** min(failed - 1, 20), _BACKOFF_CAP_S))

    async def _pause(self, seconds: float) -> None:
        """Waits, with jitter; another hook ends it, another notice doesn't."""
        hook, loop = self.hook, asyncio.get_running_loop()
        until = loop.time() + seconds * self._rng.uniform(0.5, 1.0)
        while self.hook is hook and (left_s := until - loop.time()) > 0:
            self._changed.clear()
            try:
                async with asyncio.timeout(left_s):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _post(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> str:
        """What went wrong, without address, token or any word of the answer; empty when nothing did."""
        hook, timeout_s = self.hook, self._timeout_s
        headers, asked_at = {"Content-Type": "application/json"}, asyncio.get_running_loop().time()
        if hook.token:
            headers["Authorization"] = f"Bearer {hook.token}"
        try:
            async with session.post(
                hook.url,
                data=msgspec.json.encode(body),
                headers=headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=timeout_s),
            ) as response:
                took_s = asyncio.get_running_loop().time() - asked_at
                self._timeout_s = min(timeout_s, max(_TIMEOUT_S, 2 * took_s))
                return "" if 200 <= response.status < 300 else f"HTTP {response.status}"
        except TimeoutError:
            self._timeout_s = min(2 * timeout_s, _LONGEST_TIMEOUT_S)
            return f"no answer within {timeout_s:g} s"
        except Exception as error:
            # Whatever it is, it is no reason to stop telling people. Its text may quote the address, which may be a secret.
            return type(error).__name__
