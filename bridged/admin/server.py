"""The admin listener: who may ask, and where each question goes.

With [admin] token set, every path but /healthz wants it as `Authorization: Bearer ...`.
"""

import hmac
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Self

import structlog
from aiohttp import web

from bridged import __version__
from bridged.admin import metrics
from bridged.admin.api import Api, json
from bridged.admin.status import health
from bridged.config import split_address
from bridged.errors import BridgedError, ListenError

if TYPE_CHECKING:
    from bridged.app import App

log = structlog.get_logger()

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class AdminServer:
    """Serves /healthz, /readyz, /metrics and the API."""

    def __init__(self, app: "App") -> None:
        self.port = 0  # known once it listens
        self._app = app
        self._metrics = metrics.Metrics(app)
        token = app.config.admin.token
        self._credential = f"Bearer {token}".encode() if token else None

    async def __aenter__(self) -> Self:
        web_app = web.Application(middlewares=[self._errors, self._authentication], client_max_size=16 * 2**20)
        router = web_app.router
        router.add_get("/healthz", self._healthz)
        router.add_get("/readyz", self._readyz)
        router.add_get("/metrics", self._metrics_text)
        Api(self._app).add_routes(router)
        self._runner = web.AppRunner(web_app, access_log=None, shutdown_timeout=2.0)
        await self._runner.setup()
        host, port = split_address(self._app.config.admin.listen)
        try:
            await web.TCPSite(self._runner, host, port, reuse_address=True).start()
        except OSError as error:
            await self._runner.cleanup()
            raise ListenError(
                f"can't listen on admin.listen = {self._app.config.admin.listen!r}: {error}",
                "is another bridged running? choose another port",
            ) from error
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._runner.cleanup()

    # -- around every request -----------------------------------------------------------------------------------------

    @web.middleware
    async def _errors(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Every refusal as JSON: what happened, and what to do."""
        try:
            return await handler(request)
        except BridgedError as error:
            answer = json({"error": error.args[0], "hint": error.hint}, error.http_status)
        except web.HTTPException as error:
            answer = json({"error": error.text, "hint": ""}, error.status)
            for name in ("Allow", "WWW-Authenticate"):
                if name in error.headers:
                    answer.headers[name] = error.headers[name]
        return answer

    @web.middleware
    async def _authentication(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        if self._credential is not None and request.path != "/healthz":
            given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
            if not hmac.compare_digest(given, self._credential):
                raise web.HTTPUnauthorized(
                    text="wrong or missing token: send [admin] token as `Authorization: Bearer ...`",
                    headers={"WWW-Authenticate": 'Bearer realm="bridged"'},
                )
        return await handler(request)

    # -- for machines -------------------------------------------------------------------------------------------------

    async def _healthz(self, request: web.Request) -> web.Response:
        uptime_s = round(self._app.clock.uptime_s(), 1)
        return json({"status": "ok", "version": __version__, "uptime_s": uptime_s})

    async def _readyz(self, request: web.Request) -> web.Response:
        answer = health(self._app)
        return json(answer, 200 if answer.ready else 503)

    async def _metrics_text(self, request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), headers={"Content-Type": metrics.CONTENT_TYPE})
