"""The admin listener: what is around every request, and where each question goes. Who may ask is `access`' business.

A head and a body come in time, and the body is no larger than 16 MiB; of a stranger, than a login. Answers pass the redaction,
but for the export of dead letters, which is the events as they are, and the page's own files.
"""

import asyncio
import contextlib
import functools
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec
from aiohttp import web

from bridged import __version__
from bridged.addresses import of_this_machine, split_address
from bridged.admin import metrics, openapi
from bridged.admin.access import Access
from bridged.admin.answers import Verbatim, json
from bridged.admin.api import Api
from bridged.admin.events import EventsApi
from bridged.admin.health import Commits
from bridged.admin.history import History
from bridged.admin.live import Broadcast
from bridged.admin.page import Page
from bridged.admin.settings import SettingsApi
from bridged.admin.status import health, totals
from bridged.config import keys
from bridged.errors import BridgedError, ConfigError, ListenError, about_pem
from bridged.open_files import admin_connections
from bridged.redaction import redacted_bytes, spare
from bridged.saved import BadSettings

if TYPE_CHECKING:
    from bridged.app import App

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_MAX_BODY_BYTES: Final = 16 * 2**20
_MAX_LOGIN_BYTES: Final = 4096
_BODY_S: Final = 30.0
# The rest of a body that was refused is read for so long, so that the answer arrives.
_LINGER_S: Final = 2.0
_LAST_ANSWER_S: Final = 2.0  # to who has closed his sending side
_HEAD_S: Final = 30.0  # from the connecting, or the last answer
_HANDSHAKE_S: Final = 10.0  # as at the doors, and so is a client's goodbye after ours
_GOODBYE_S: Final = 1.0
_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class _Connection(web.RequestHandler):
    """aiohttp's, but for its answer to what is no HTTP: that would repeat the bytes, and a credential with them."""

    __slots__ = ("_server", "half_closed", "is_known")

    def __init__(self, server: "_Server", **options: Any) -> None:
        super().__init__(server, **options)
        self._server = server
        self.half_closed = False  # nothing more will be asked on it
        self.is_known = False  # something was asked on it by somebody who may

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """One that has made room for others during its handshake of TLS ends."""
        super().connection_made(transport)
        if self not in self._server.alive:
            self.end()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Its place is free."""
        self._server.alive.pop(self, None)
        super().connection_lost(exc)

    def eof_received(self) -> bool | None:  # type: ignore[override]  # asyncio lets it answer; aiohttp always closes
        """Who has said all still wants the answer, as `nc -N` does. (A stream of events is none that could end.)"""
        asked = bool(self._messages) or (self._request_count > 0 and self._waiter is None)
        if self.transport is None or not asked or self.ssl_context is not None:
            return None  # aiohttp's: it is closed
        self.half_closed = True
        self._loop.call_later(_LAST_ANSWER_S, self.transport.close)
        return True

    @property
    def is_last(self) -> bool:
        """Whether the request in hand is the last one."""
        return self.half_closed and not self._messages

    def end(self) -> None:
        """At once: what a stranger doesn't read is waited for by nobody."""
        if self.transport is not None:
            self.transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Logs, and answers with the status alone."""
        if status < HTTPStatus.INTERNAL_SERVER_ERROR:
            message = f"{status}: the request can't be understood ({type(exc).__name__})\n"
        return super().handle_error(request, status, exc, message)


class _Full(asyncio.Protocol):
    """For a connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Resets it."""
        transport.abort()  # type: ignore[attr-defined]  # every transport of a socket has it


class _Server(web.Server):
    """aiohttp's, with so many connections and no more: whoever may not ask anything could take the doors' files.

    Nor can he keep out who may: a newcomer takes the place of the oldest that has shown nothing to be known by.
    """

    def __init__(self, handler: Any, request_factory: Any) -> None:
        super().__init__(handler, request_factory=request_factory)
        self._most = admin_connections()
        self.alive: dict[_Connection, None] = {}  # oldest first; from the first packet on, so a handshake takes a place

    def __call__(self) -> _Connection | _Full:  # type: ignore[override]  # or an end to it
        if len(self.alive) >= self._most and not self._displace():
            return _Full()
        options = {"keepalive_timeout": _HEAD_S, "lingering_time": _LINGER_S, "access_log": None}  # none at all
        connection = _Connection(self, loop=self._loop, **options)
        self.alive[connection] = None
        return connection

    def _displace(self) -> bool:
        """Whether there was one. (A handshake that came to nothing, of which nobody tells, is among them.)"""
        stranger = next((each for each in self.alive if not each.is_known), None)
        if stranger is not None:
            del self.alive[stranger]
            stranger.end()
        return stranger is not None


class _Site(web.BaseSite):
    """Where it listens. aiohttp's own sites give a handshake of TLS a minute, and its end half of one."""

    __slots__ = ("_where",)

    def __init__(self, runner: web.AppRunner, tls: ssl.SSLContext | None, **where: Any) -> None:
        super().__init__(runner, ssl_context=tls)
        self._where: dict[str, Any] = where

    @property
    def name(self) -> str:
        """For aiohttp, which asks."""
        return "admin"

    async def start(self) -> None:
        """Listens. Raises OSError."""
        await super().start()
        how: dict[str, Any] = {"ssl": self._ssl_context, "backlog": self._backlog}
        if self._ssl_context is not None:
            how |= {"ssl_handshake_timeout": _HANDSHAKE_S, "ssl_shutdown_timeout": _GOODBYE_S}
        server: Any = self._runner.server
        self._server = await asyncio.get_running_loop().create_server(server, **how, **self._where)


class _Runner(web.AppRunner):
    """aiohttp has no way to say which class its connections are of, so this asks an application for its two functions."""

    async def _make_server(self) -> _Server:
        await super()._make_server()  # starts the application; what it gives is what we replace
        app = self._app
        return _Server(app._handle, request_factory=app._make_request)  # noqa: SLF001  # as aiohttp does


class AdminServer:
    """Serves /healthz, /readyz, /metrics and the API."""

    def __init__(self, app: "App", sockets: Sequence[socket.socket] = ()) -> None:
        """Listens at `sockets`, which were opened elsewhere, else at [admin] listen."""
        self.port = 0  # known once it listens
        self.commits = Commits()  # also while it doesn't listen: the alarms ask as well
        self._app = app
        self._sockets = sockets
        self._metrics = metrics.Metrics(app)
        self._access = Access(app)
        self._live = Broadcast(app, self._access.lasts)
        self._history = History(lambda: totals(app))
        self._tls: ssl.SSLContext | None = None
        # The names by which the page and the commands know our answers.
        spare(_our_words())

    async def __aenter__(self) -> Self:
        admin = self._app.config.admin
        if admin.tls_cert:
            self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            _load(self._tls, admin.tls_cert, admin.tls_key)
        access = self._access
        around = [self._answers, access.host, access.authentication, access.origin, self._body]
        web_app = web.Application(middlewares=around, client_max_size=_MAX_BODY_BYTES)
        web_app.on_response_prepare.append(self._head)
        router = web_app.router
        router.add_get("/healthz", self._healthz)
        router.add_get("/readyz", self._readyz)
        router.add_get("/metrics", self._metrics_text)
        router.add_get("/openapi.json", self._openapi)
        access.add_routes(router)
        Page().add_routes(router)
        router.add_get("/api/live", self._live.answer, allow_head=False)
        Api(self._app, self._history).add_routes(router)
        SettingsApi(self._app).add_routes(router)
        EventsApi(self._app).add_routes(router)
        self._runner = _Runner(web_app, shutdown_timeout=2.0)
        await self._runner.setup()
        try:
            async for site in self._sites():
                await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise ListenError(f"can't listen on admin.listen = {admin.listen!r}", error) from error
        self.port = access.port = self._runner.addresses[0][1]
        self._recording = asyncio.create_task(self._history.run(), name="history")
        return self

    async def _sites(self) -> AsyncIterator[web.BaseSite]:
        for sock in self._sockets:
            yield _Site(self._runner, self._tls, sock=sock)
        if not self._sockets:
            host, port = split_address(self._app.config.admin.listen)
            where = {"host": await of_this_machine(host), "port": port, "reuse_address": True}
            yield _Site(self._runner, self._tls, **where)

    async def __aexit__(self, *_exc: object) -> None:
        self._recording.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._recording
        self._live.close()
        await self._runner.cleanup()

    @property
    def connections(self) -> int:
        """How many there are now."""
        server = self._runner.server
        return len(server.alive) if isinstance(server, _Server) else 0

    def renew(self, load: Callable[[ssl.SSLContext], None]) -> None:
        """Has connections to come see another certificate."""
        if self._tls is not None:
            load(self._tls)

    # -- around every request -----------------------------------------------------------------------------------------

    @web.middleware
    async def _answers(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Every refusal as JSON: what happened, and what to do. No answer holds a secret."""
        try:
            answer = await handler(request)
        except BridgedError as error:
            told: dict[str, object] = {"error": error.args[0], "hint": error.hint}
            if isinstance(error, BadSettings):
                told["keys"] = error.keys
            answer = json(told, error.http_status)
        except UnicodeEncodeError:
            # Bytes that are no UTF-8 can come with a path or a header, and be said or looked for nowhere.
            answer = json({"error": "the request's head holds what is no text", "hint": "it must be UTF-8"}, 400)
        except web.HTTPException as error:
            answer = json({"error": error.text, "hint": ""}, error.status)
            for name in ("Allow", "WWW-Authenticate"):
                if name in error.headers:
                    answer.headers[name] = error.headers[name]
        if isinstance(answer, web.Response) and isinstance(answer.body, bytes) and not isinstance(answer, Verbatim):
            answer.body = redacted_bytes(answer.body)
        return answer

    async def _head(self, request: web.Request, answer: web.StreamResponse) -> None:
        """What every answer carries, whoever made it; when its head is about to be sent."""
        answer.headers["Server"] = "bridged"  # and not which Python and aiohttp, who have said it already
        for name, value in _HEADERS.items():
            answer.headers.setdefault(name, value)
        if isinstance(request.protocol, _Connection) and request.protocol.is_last:
            answer.force_close()

    @web.middleware
    async def _body(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        is_stranger = self._access.is_stranger(request)
        if not is_stranger:
            request.protocol.is_known = True  # type: ignore[attr-defined]  # our server makes no other
        # What is answered 404 or 405 needs none.
        if request.can_read_body and request.match_info.http_exception is None:
            if is_stranger:
                request = request.clone(client_max_size=_MAX_LOGIN_BYTES)
                if (request.content_length or 0) > _MAX_LOGIN_BYTES:
                    raise web.HTTPRequestEntityTooLarge(_MAX_LOGIN_BYTES)
            try:
                async with asyncio.timeout(_BODY_S):
                    await request.read()  # which keeps it, for the handler
            except TimeoutError:
                raise web.HTTPRequestTimeout(text=f"the body didn't come within {_BODY_S:g} s") from None
            except (ConnectionError, web.RequestPayloadError) as error:
                raise web.HTTPBadRequest(text="the body ends too early, or isn't packed as its head says") from error
        return await handler(request)

    # -- for machines -------------------------------------------------------------------------------------------------

    async def _healthz(self, request: web.Request) -> web.Response:
        uptime_s = round(self._app.clock.uptime_s(), 1)
        return json({"status": "ok", "version": __version__, "uptime_s": uptime_s})

    async def _readyz(self, request: web.Request) -> web.Response:
        answer = health(self._app)
        return json(answer, 200 if answer.ready else 503)

    async def _openapi(self, request: web.Request) -> web.Response:
        return json(openapi.document())

    async def _metrics_text(self, request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), headers={"Content-Type": metrics.CONTENT_TYPE})


@functools.cache
def _our_words() -> str:
    return msgspec.json.encode(openapi.document()).decode() + " ".join(".".join(key.path) for key in keys())


def _load(context: ssl.SSLContext, cert: str, key: str) -> None:
    """Raises ConfigError that names the files."""
    try:
        # An encrypted key would be asked for at the terminal.
        context.load_cert_chain(cert, key, password=b"")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(
            f"can't use admin.tls_cert = {cert!r} with admin.tls_key = {key!r}: {error}", about_pem(error)
        ) from error
