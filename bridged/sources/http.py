"""The HTTP door: Braze's Custom HTTP connector posts Currents events here.

Answers, in Braze's terms (what the connector does with each is in its documentation):

    200  every event is on disk: in a segment, as a dead letter, or skipped by choice. Also for no events: a credentials probe
    400  the body is not JSON at all. Braze then sends its events one by one and drops those that are answered 400 again
    401  no token or a wrong one
    404, 405  not this address, not this method
    413  larger than max_body. Braze splits the batch
    415  compressed with anything but gzip or deflate
    503  the spool is near its cap, or can't be written. Braze keeps the events and tries again
"""

import asyncio
import hmac
import time
from email.utils import formatdate
from typing import Self

import structlog
from aiohttp import HttpVersion11, web
from aiohttp.http_exceptions import HttpProcessingError
from isal import isal_zlib
from msgspec import Struct

from bridged.backlog.spool import Spool
from bridged.errors import BadRequest, BridgedError, ListenError, SpoolFull, TooLarge, Unauthorized
from bridged.intake import Intake

log = structlog.get_logger()

PATH = "/v1/currents"
_OK = b'{"status":"ok"}\n'
# How long a request waits for a writer that is behind, before Braze is asked to come again.
_ROOM_S = 5.0
_BODY_S = 60.0
_RETRY_AFTER_S = 30
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}


class HttpOptions(Struct, frozen=True, kw_only=True):
    """Where, for whom, and how large."""

    host: str = "127.0.0.1"
    port: int = 8480
    bearer_token: str = ""
    max_body: int = 16 * 2**20


class _Ok(web.StreamResponse):
    """The 200 of HTTP/1.1 and a connection that stays: the same bytes for everybody, written at once.

    Stateless, so one serves all requests. Measured: with one event a request, a tenth of what the daemon spends.
    """

    def __init__(self) -> None:
        super().__init__()
        self._answer = b""
        self._made_at = -1.0  # monotonic, whole seconds

    @property
    def keep_alive(self) -> bool:
        """It does."""
        return True

    async def prepare(self, request: web.BaseRequest) -> None:
        """Writes all of it."""
        now_s = time.monotonic() // 1
        if now_s != self._made_at:
            self._made_at = now_s
            head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(_OK)}\r\n"
            self._answer = f"{head}Date: {formatdate(usegmt=True)}\r\nServer: bridged\r\n\r\n".encode() + _OK
        if request.transport is not None:
            request.transport.write(self._answer)

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to be written."""


class HttpSource:
    """An aiohttp low-level server: no router and no middlewares between the socket and the intake."""

    def __init__(self, options: HttpOptions, intake: Intake, spool: Spool) -> None:
        self.requests = 0
        self.answers: dict[int, int] = {}  # by status
        self.port = options.port
        self._options = options
        self._intake = intake
        self._spool = spool
        self._credential = options.bearer_token.encode() or None
        self._ok = _Ok()

    async def __aenter__(self) -> Self:
        server = web.Server(self._handle, access_log=None, keepalive_timeout=75.0, auto_decompress=False)
        self._runner = web.ServerRunner(server, shutdown_timeout=5.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._options.host, self._options.port, reuse_address=True, backlog=1024)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise ListenError(
                f"can't listen on sources.http.listen = {self._options.host}:{self._options.port}: {error}",
                "is another bridged running? choose another port",
            ) from error
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Stops accepting, lets requests finish."""
        await self._runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.requests += 1
        try:
            await self._accept(request)
        except BridgedError as error:
            return self._refusal(error)
        except web.HTTPException as error:
            self.answers[error.status] = self.answers.get(error.status, 0) + 1
            # Its Content-Type is that of its own text.
            headers = {name: value for name, value in error.headers.items() if name.lower() == "allow"}
            return web.json_response({"error": error.text}, status=error.status, headers=headers)
        self.answers[200] = self.answers.get(200, 0) + 1
        if request.keep_alive and request.version == HttpVersion11:
            return self._ok
        return web.Response(body=_OK, content_type="application/json")

    async def _accept(self, request: web.BaseRequest) -> None:
        """Takes one request up to its commit. Raises what its answer says."""
        if request.path.rstrip("/") != PATH:
            raise web.HTTPNotFound(text=f"nothing here; Currents events go to POST {PATH}")
        if self._credential is not None:
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            token = given.strip().encode("utf-8", "surrogateescape")
            if not hmac.compare_digest(token, self._credential) or scheme.lower() != "bearer":
                raise Unauthorized("wrong or missing bearer token", "it is [sources.http] bearer_token")
        if request.method != "POST":
            raise web.HTTPMethodNotAllowed(request.method, ["POST"], text="Currents events are posted")
        if self._spool.near_cap:
            raise self._spool.refusal()
        if not self._spool.room.is_set():
            # Before the body is read: until then TCP holds it, not we.
            await self._wait_for_room()
        body = self._decoded(request, await self._read(request))
        if not self._spool.room.is_set():
            await self._wait_for_room()
        await self._intake.accept_body(body)

    async def _read(self, request: web.BaseRequest) -> bytes:
        if not request.can_read_body:
            return b""
        try:
            if request.content.is_eof():
                # Small bodies come with their head: no waiting, no timer.
                return request.content.read_nowait(-1)
            async with asyncio.timeout(_BODY_S):
                return await self._read_slowly(request)
        except TimeoutError:
            raise web.HTTPRequestTimeout(text=f"the body didn't come within {_BODY_S:g} s") from None
        except (web.RequestPayloadError, HttpProcessingError) as error:
            raise BadRequest(f"the body can't be read: {type(error).__name__}") from error

    def _decoded(self, request: web.BaseRequest, body: bytes) -> bytes:
        """The body without its Content-Encoding; never more of it in memory than max_body."""
        coding = request.headers.get("Content-Encoding", "identity").strip().lower()
        limit = self._options.max_body
        if coding in _WINDOW_BITS and body:
            body = _expanded(body, _WINDOW_BITS[coding], limit)
        elif coding != "identity" and body:
            raise web.HTTPUnsupportedMediaType(
                text=f"Content-Encoding {coding[:40]!r}: gzip and deflate are understood"
            )
        if len(body) > limit:
            raise TooLarge(f"the body is larger than {limit} bytes")
        return body

    async def _read_slowly(self, request: web.BaseRequest) -> bytes:
        limit = self._options.max_body
        if (request.content_length or 0) > limit:
            raise TooLarge(f"the body is larger than {limit} bytes")
        if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        chunks, size = [], 0
        while chunk := await request.content.readany():
            chunks.append(chunk)
            size += len(chunk)
            if size > limit:
                raise TooLarge(f"the body is larger than {limit} bytes")
        return b"".join(chunks)

    async def _wait_for_room(self) -> None:
        try:
            async with asyncio.timeout(_ROOM_S):
                # All who wait are woken at once, and the first may take all the room there is: look again.
                while not self._spool.room.is_set():
                    await self._spool.room.wait()
        except TimeoutError:
            raise SpoolFull("the spool's writer is behind") from None

    def _refusal(self, error: BridgedError) -> web.Response:
        self.answers[error.http_status] = self.answers.get(error.http_status, 0) + 1
        headers = {"Retry-After": str(_RETRY_AFTER_S)} if error.http_status == 503 else {}
        if error.http_status == 401:
            headers["WWW-Authenticate"] = 'Bearer realm="bridged"'
        return web.json_response(
            {"error": error.args[0], "hint": error.hint}, status=error.http_status, headers=headers
        )


def _expanded(body: bytes, window_bits: int, limit: int) -> bytes:
    """One or more compressed members. Raises BadRequest for damaged ones, TooLarge for more than `limit` bytes."""
    expanded = b""
    try:
        while body:
            member = isal_zlib.decompressobj(window_bits)
            expanded += member.decompress(body, limit + 1 - len(expanded))
            if len(expanded) > limit:
                raise TooLarge(f"the body is larger than {limit} bytes")
            if not member.eof:
                raise BadRequest("the compressed body is cut off")
            body = member.unused_data
    except isal_zlib.IsalError as error:  # type: ignore[misc]  # a class, which its stub calls an instance
        raise BadRequest(f"the compressed body is damaged: {error}") from error
    return expanded
