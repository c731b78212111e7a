"""The HTTP door: Braze's Custom HTTP connector posts Currents events here. (And Mixpanel its cohorts: see `cohorts`.)

Answers, in Braze's terms (what the connector does with each is in its documentation):

    200  every event is on disk: in a segment, as a dead letter, or skipped by choice. Also for no events: a credentials probe
    400  the body is not JSON at all, or the head no HTTP. Braze then sends its events one by one, and drops those that are
         answered 400 again
    401  no token or a wrong one
    404, 405  not this address, not this method
    408  the head or the body didn't come in time
    411  a body whose length the head doesn't say
    413  larger than max_body, or compressed more than a hundredfold. Braze splits the batch
    415  compressed with anything but gzip or deflate
    431  the head is too large
    501  a Transfer-Encoding other than chunked
    503  no room in the spool, or a writer that is behind; too many connections, or too much at once; mixpanel.export is false;
         or a field twice that the head may have once, which is a proxy's doing. Braze keeps the events and tries again
"""

import asyncio
import hmac
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Self

import msgspec
import structlog
from aiohttp import HttpVersion11, web
from aiohttp.http_exceptions import HttpProcessingError
from msgspec import Struct

from bridged.addresses import of_this_machine
from bridged.backlog.spool import Spool
from bridged.errors import (
    BadRequest,
    BridgedError,
    ListenError,
    NothingTaken,
    SpoolError,
    SpoolFull,
    TooLarge,
    Unauthorized,
)
from bridged.intake import Intake
from bridged.redaction import redacted
from bridged.sources import cohorts, tls
from bridged.sources.cohorts import CohortSource
from bridged.sources.expansion import PIECE_BYTES, WINDOW_BITS, expanded
from bridged.sources.http_answers import REFUSALS, RETRY_AFTER_S, TAKEN, Nobody, Ok, said, whole
from bridged.sources.http_connections import MAX_HEAD_BYTES, HttpConnection, HttpConnections, HttpLimits

log = structlog.get_logger()

PATH = "/v1/currents"
# What makes a body, or its answer, more than plain bytes.
_UNUSUAL = ("Content-Encoding", "Transfer-Encoding", "Expect", "Upgrade")
# Of a compressed body. What expands to nothing takes its time too: a piece of it several ms.
_PIECES_AT_ONCE = 4
# Answers to heads that we would rather not see again.
_LAST = (411, 431, 501)
# How long a request waits for a writer that is behind, before Braze is asked to come again.
_ROOM_S = 5.0
# So long a probe, which says no length, waits for its answer: who sends a body to it does so at once.
_BEHIND_S = 0.25
# At the end: so long an idle connection is kept for a request that is on its way, and for one of which something came.
_LINGER_S = 0.25
_FINISH_S = 5.0


class HttpOptions(Struct, frozen=True, kw_only=True):
    """Where, for whom, and how large."""

    host: str = "127.0.0.1"
    port: int = 8480
    bearer_token: str = ""
    max_body: int = 16 * 2**20
    tls_cert: str = ""
    tls_key: str = ""
    limits: HttpLimits = HttpLimits()


class HttpSource:
    """An aiohttp low-level server: no router and no middlewares between the socket and the intake."""

    connections: HttpConnections

    def __init__(
        self,
        options: HttpOptions,
        intake: Intake | None,
        spool: Spool,
        sockets: Sequence[socket.socket] = (),
        cohorts: CohortSource | None = None,
    ) -> None:
        """Listens at `sockets`, which were opened elsewhere and outlive it, else at the options' address.

        `intake` None: no events are taken.
        """
        self.answers: Counter[int] = Counter()  # by status
        self.port = options.port
        self._options = options
        self._intake = intake
        self._cohorts = cohorts
        self._spool = spool
        self._sockets = sockets
        self._large = asyncio.Semaphore()  # who expands a large body
        self._credential = options.bearer_token.encode() or None
        self._ok = Ok()
        self._busy = 0  # requests that have no answer yet
        self.stopping = False
        self._servers: list[asyncio.Server] = []

    @property
    def requests(self) -> int:
        """How many were answered, whatever by, or will be."""
        return self.answers.total() + self._busy

    def use(self, bearer_token: str) -> None:
        """Another token from the next request on."""
        if bearer_token != self._options.bearer_token:
            self._options = msgspec.structs.replace(self._options, bearer_token=bearer_token)
            self._credential = bearer_token.encode() or None
            self.connections.forget_heads()

    async def __aenter__(self) -> Self:
        options = self._options
        self._tls = tls.server_context("sources.http", options.tls_cert, options.tls_key)
        # As it came and expanded, and some for the head and the sizes of chunks. What is more than all may be never fits.
        most = min(2 * options.max_body + 2**21, options.limits.max_in_flight)
        limits = msgspec.structs.replace(options.limits, max_request=most)
        self.connections = HttpConnections(self._handle, self, limits, self.answers, REFUSALS)
        wheres: list[dict[str, Any]] = [{"sock": sock} for sock in self._sockets]
        try:
            hosts = [] if wheres else await of_this_machine(options.host)
            for where in wheres or [{"host": hosts, "port": options.port, "reuse_address": True}]:
                server = await asyncio.get_running_loop().create_server(
                    self.connections, backlog=1024, **tls.options(self._tls), **where
                )
                self._servers.append(server)
        except OSError as error:
            await self.connections.close(0)
            raise ListenError(f"can't listen on sources.http.listen = {options.host}:{options.port}", error) from error
        self.port = self._servers[0].sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Stops accepting, lets requests finish; one that is on its way is answered too, and told that it is the last."""
        self.stopping = True
        for server in self._servers:
            server.close()
        finish_until, looks = time.monotonic() + _FINISH_S, 0
        # What is held has no answer yet, and needn't have met the parser: the body of a repeat on its way. Idle ones are
        # kept for so many looks, and not by the clock: when a machine stands still, so do those who are about to send.
        while self.connections.connections and (
            time.monotonic() < finish_until if self._busy or self.connections.held else looks < _LINGER_S / 0.005
        ):
            looks += 1
            await asyncio.sleep(0.005)
        await self.connections.close(_LINGER_S)

    def renew(self, load: Callable[[ssl.SSLContext], None]) -> None:
        """Has connections to come see another certificate."""
        if self._tls is not None:
            load(self._tls)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self._busy += 1
        connection: HttpConnection = request.protocol  # type: ignore[assignment]  # its server makes no other
        credential = self._credential
        response: web.StreamResponse | None = None
        try:
            response = await self._answer(request, connection)
        finally:
            self._busy -= 1
            connection.answered = True
            connection.release()
            usual = not any(name in request.headers for name in _UNUSUAL) and credential is self._credential
            connection.handled(plain=usual and response is self._ok)
        if isinstance(response, web.Response):
            response.headers["Server"] = "bridged"  # and not which Python and aiohttp
        if response is not self._ok and (response.status in _LAST or self._last(request, connection)):
            response.force_close()
        return response

    async def _answer(self, request: web.BaseRequest, connection: HttpConnection) -> web.StreamResponse:
        """What became of a request, in words."""
        response: web.StreamResponse
        try:
            if sum(map(len, chain.from_iterable(request.raw_headers))) > MAX_HEAD_BYTES:
                raise web.HTTPRequestHeaderFieldsTooLarge(text="the request's head is too large")
            if self._cohorts is not None and request.path.strip("/") == cohorts.PATH[1:]:
                response = await self._accept_cohort(request, connection, self._cohorts)
            else:
                await self._accept(request, connection)
                # Who doesn't read his answers gets the kind that waits until he does.
                plain = request.keep_alive and request.version == HttpVersion11 and not connection.writing_paused
                response = self._ok
                if not plain or self._last(request, connection):
                    response = web.Response(body=TAKEN, content_type="application/json")
        except (ConnectionError, RuntimeError) as error:
            # Who reads from a connection that is gone already is told so by a RuntimeError.
            if isinstance(error, RuntimeError) and connection.transport is not None:
                raise
            # aiohttp keeps it with its traceback, and so with the connection, until the next collection of garbage.
            error.__traceback__ = None
            return Nobody()
        except BridgedError as error:
            return self._refusal(error)
        except web.HTTPException as error:
            # Its Content-Type is that of its own text.
            headers = {name: value for name, value in error.headers.items() if name.lower() == "allow"}
            response = web.json_response({"error": error.text}, status=error.status, headers=headers)
        self.answers[response.status] += 1
        return response

    def _last(self, request: web.BaseRequest, connection: HttpConnection) -> bool:
        """Whether this is the last answer: we stop, nothing more comes, or the rest of a body that was refused does.

        That is read for a while, so that the answer arrives.
        """
        return self.stopping or connection.last_answer or not request.content.is_eof()

    async def _accept(self, request: web.BaseRequest, connection: HttpConnection) -> None:
        """Takes one request up to its commit. Raises what its answer says, ConnectionError when the client is gone."""
        # Whatever slashes a proxy has put around it: after a 404 Braze drops the events.
        if request.path.strip("/") != PATH[1:]:
            raise web.HTTPNotFound(
                text=f"nothing here; Currents events go to POST {PATH}, cohorts to POST {cohorts.PATH}"
            )
        if self._intake is None:
            # After a 404 Braze would drop them; so somebody has five days to notice.
            hint = f"set it to true, or stop the export in Braze; cohorts go to POST {cohorts.PATH}"
            raise NothingTaken("no events are taken: mixpanel.export is false", hint)
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
        body = await self._body(request, connection)
        if not self._spool.room.is_set():
            await self._wait_for_room()
        if connection.transport is None:
            # Refused or gone meanwhile: what nobody can be told of is not taken.
            raise ConnectionResetError
        written = self._intake.accept_body(body, id(connection))
        # The spool holds the events now.
        del body
        connection.release()
        await written

    async def _accept_cohort(
        self, request: web.BaseRequest, connection: HttpConnection, source: CohortSource
    ) -> web.Response:
        """The same for a page of a cohort, whose refusals are told in Mixpanel's form."""
        body, headers = b"", {}
        try:
            source.authorize(request.headers.get("Authorization", ""))
            if request.method != "POST":
                raise web.HTTPMethodNotAllowed(request.method, ["POST"], text="cohorts are posted")
            body = await self._body(request, connection)
            if connection.transport is None:
                raise ConnectionResetError
            status, said = 200, await source.take(body)
        except BridgedError as error:
            status, said = error.http_status, source.refusal(error, body)
            headers = self._headers_of(error, 'Basic realm="bridged"')
        except web.HTTPException as error:
            status, said = error.status, source.refused(error.status, error.text or error.reason, body)
            headers = {"Allow": "POST"} if error.status == 405 else {}
        return web.Response(body=said, status=status, headers=headers, content_type="application/json")

    async def _body(self, request: web.BaseRequest, connection: HttpConnection) -> bytes:
        """A whole body, expanded. Raises what its answer says."""
        body = await self._read(request, connection)
        if "Content-Encoding" in request.headers:
            body = await self._decoded(request, connection, body)
        if len(body) > self._options.max_body:
            raise TooLarge(f"the body is larger than {self._options.max_body:d} bytes")
        return body

    async def _read(self, request: web.BaseRequest, connection: HttpConnection) -> bytes:
        coding = ", ".join(request.headers.getall("Transfer-Encoding", [])).strip(", ").lower()
        if coding not in ("", "chunked"):
            raise web.HTTPNotImplemented(text=f"Transfer-Encoding {coding[:40]!r}: chunked is understood")
        if not request.can_read_body:
            if "Content-Length" not in request.headers:
                await self._demand_nothing_behind(connection)
            return b""
        try:
            if request.content.is_eof():
                # Small bodies come with their head: no waiting.
                return request.content.read_nowait(-1)
            return await self._read_slowly(request)
        except (web.RequestPayloadError, HttpProcessingError) as error:
            # Its frames hold the request, whose body holds it, until the next collection of garbage.
            error.__traceback__ = None
            raise BadRequest(f"the body can't be read: {type(error).__name__}") from error

    async def _demand_nothing_behind(self, connection: HttpConnection) -> None:
        """Raises HTTPLengthRequired if a body comes all the same, perhaps a packet later: a 200 would say that it is on disk."""
        loop = asyncio.get_running_loop()
        until = loop.time() + _BEHIND_S
        while not (connection.garbage_follows or connection.last_answer or self.stopping) and loop.time() < until:
            await asyncio.sleep(0.01)
        if connection.garbage_follows:
            raise web.HTTPLengthRequired(text="a body without a Content-Length: the head must say how long it is")

    async def _decoded(self, request: web.BaseRequest, connection: HttpConnection, body: bytes) -> bytes:
        """The body without its Content-Encoding; never more of it in memory than max_body."""
        codings = [each.strip() for each in ",".join(request.headers.getall("Content-Encoding")).lower().split(",")]
        coding = ", ".join(each for each in codings if each not in ("", "identity"))
        if not coding or not body:
            return body
        if coding not in WINDOW_BITS:
            raise web.HTTPUnsupportedMediaType(
                text=f"Content-Encoding {coding[:40]!r}: gzip and deflate are understood"
            )
        whole = bytearray()
        for number, piece in enumerate(expanded(body, WINDOW_BITS[coding], self._options.max_body), start=1):
            whole += piece
            if len(whole) >= PIECE_BYTES or number >= _PIECES_AT_ONCE:
                break
        else:
            return bytes(whole)
        # One large body at a time, begun anew so that those who wait hold nothing: a thousand bombs take no more than one.
        del piece, whole
        whole = bytearray()
        async with self._large:
            for piece in expanded(body, WINDOW_BITS[coding], self._options.max_body):
                if not connection.hold_expanded(len(piece)):
                    whole.clear()
                    raise ConnectionResetError
                whole += piece
                # Others get their turn between two pieces.
                await asyncio.sleep(0)
            return bytes(whole)

    async def _read_slowly(self, request: web.BaseRequest) -> bytes:
        """A body that comes in pieces. How long it may take is the connections' business: they end it."""
        limit = self._options.max_body
        if (request.content_length or 0) > limit:
            raise TooLarge(f"the body is larger than {limit:d} bytes")
        asks = request.headers.get("Expect", "").lower() == "100-continue" and request.version >= HttpVersion11
        if asks and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = bytearray()
        while chunk := await request.content.readany():
            body += chunk
            del chunk  # while the next is waited for, it would be held twice
            if len(body) > limit:
                raise TooLarge(f"the body is larger than {limit:d} bytes")
        return bytes(body)

    async def _wait_for_room(self) -> None:
        try:
            async with asyncio.timeout(_ROOM_S):
                # All who wait are woken at once, and the first may take all the room there is: look again.
                while not self._spool.room.is_set():
                    await self._spool.room.wait()
        except TimeoutError:
            raise SpoolFull("the spool's writer is behind") from None

    def _refusal(self, error: BridgedError) -> web.Response:
        self.answers[error.http_status] += 1
        if error.http_status == 400:
            self.connections.bad.note(redacted(error.args[0]))
        headers = self._headers_of(error, 'Bearer realm="bridged"')
        return web.Response(
            body=said(error), content_type="application/json", status=error.http_status, headers=headers
        )

    def _headers_of(self, error: BridgedError, challenge: str) -> dict[str, str]:
        headers = {"Retry-After": str(RETRY_AFTER_S)} if error.http_status == 503 else {}
        if error.http_status == 401:
            headers["WWW-Authenticate"] = challenge
        return headers

    # -- requests whose head is known: `connections` tells them -----------------------------------------------------------

    def accept_again(self, body: bytes, sender: int) -> "asyncio.Future[None] | None":
        """What `_accept` does with a plain body while there is room. None: it must do it, and find the right words."""
        fits = len(body) <= self._options.max_body
        if self._intake is None or self.stopping or not fits or not self._spool.room.is_set():
            return None
        try:
            written = self._intake.accept_body(body, sender)
        except Exception:
            # A refusal, or a bug of ours: that is answered by 500 where it happens again.
            return None
        self._busy += 1
        return written

    def answer_again(self, written: "asyncio.Future[None]") -> tuple[bytes, bool]:
        """What `_handle` answers after the commit, or instead of it."""
        self._busy -= 1
        error = SpoolError("the spool was closed") if written.cancelled() else written.exception()
        if error is None:
            self.answers[200] += 1
            return self._ok.whole() if not self.stopping else whole(200, TAKEN, {"Connection": "close"}), self.stopping
        if not isinstance(error, BridgedError):
            log.error("request_failed", exc_info=error)
            error = BridgedError("a bug of the bridge", "its log says more")
        self.answers[error.http_status] += 1
        headers = {"Connection": "close", **self._headers_of(error, "")}
        return whole(error.http_status, said(error), headers), True
