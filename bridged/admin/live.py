"""/api/live: what the page shows, pushed once a second as server-sent events.

One snapshot serves everybody who listens in that second, made by the first who asks for it; while nobody listens, none is made.
A listener that doesn't read fills its own socket, is passed over meanwhile, and dropped after ten seconds.
"""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec
from aiohttp import web

from bridged.admin.status import Status, status
from bridged.redaction import redacted_bytes

if TYPE_CHECKING:
    from bridged.app import App

MAX_LISTENERS: Final = 32
EVERY_S: Final = 1.0
_RETRY_MS: Final = 2000
# What a socket takes without being read, in both kernels and ours, is some hundred kB; then it is a matter of time.
_STUCK_S: Final = 10.0


class Live(msgspec.Struct):
    """The data of an event `status`. The others say that something has changed, and is to be asked for again."""

    status: Status
    settings_revision: int
    activity_id: int  # of the newest entry
    cohorts_revision: int


class Broadcast:
    """Who listens, and the newest snapshot."""

    def __init__(self, app: "App", lasts: Callable[[web.Request], bool]) -> None:
        """`lasts` says whether whoever asked may listen on."""
        self.listeners = 0
        self._app = app
        self._lasts = lasts
        self._snapshot = b""
        self._made_at = -EVERY_S  # loop time
        self._closing = asyncio.Event()

    def close(self) -> None:
        """Ends every stream: the daemon stops."""
        self._closing.set()

    def _latest(self, now: float) -> bytes:
        """The snapshot of this second."""
        # A little younger is as good: nobody's second begins exactly with another's.
        if now - self._made_at >= 0.9 * EVERY_S:
            app = self._app
            cohorts = app.membership.figures.commits if app.membership else 0
            live = Live(status(app, []), app.saved.revision, app.activity.last_id, cohorts)
            self._snapshot = b"event: status\ndata: " + redacted_bytes(msgspec.json.encode(live)) + b"\n\n"
            self._made_at = now
        return self._snapshot

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """One listener, until it goes, may no longer listen, or doesn't read."""
        if self.listeners >= MAX_LISTENERS:
            raise web.HTTPServiceUnavailable(text=f"{MAX_LISTENERS} listen already: close a window")
        headers = {"Content-Type": "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no"}
        response = web.StreamResponse(headers=headers)
        self.listeners += 1
        try:
            await self._stream(request, response)
        finally:
            self.listeners -= 1
        return response

    async def _stream(self, request: web.Request, response: web.StreamResponse) -> None:
        loop = asyncio.get_running_loop()
        await response.prepare(request)
        await response.write(f"retry: {_RETRY_MS}\n\n".encode())
        while not self._closing.is_set() and self._lasts(request):
            try:
                async with asyncio.timeout(_STUCK_S):
                    await response.write(self._latest(loop.time()))
            except (TimeoutError, ConnectionError):
                # What it didn't read is thrown away with the connection.
                if request.transport is not None:
                    request.transport.abort()
                return
            try:
                async with asyncio.timeout(EVERY_S - loop.time() % EVERY_S or EVERY_S):
                    await self._closing.wait()
            except TimeoutError:
                pass
