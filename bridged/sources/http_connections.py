"""The HTTP door's connections: how long each may take, how many there may be, and how much they may hold.

aiohttp frames the requests; it has no timers for slow clients and no caps. These are here, without a timer or a task for any
request: one look at every connection a second, at a clock that is as coarse.

    a head     must be complete head_s after the connection was made, or after its first byte
    a body     must be complete body_s after its head, plus a second for each min_bytes_per_s that came
    an answer  must be taken before as long has passed
    the sum    of all bytes that came and aren't handed on, compressed and expanded, is at most max_in_flight. Beyond it
               the body that has been coming for longest is refused: who is slow pays, not who comes last
    the count  is at most max_connections. Beyond it who has asked for nothing yet makes room, or is idle, or slow
    a client's count is at most max_connections_per_client

The same head again isn't parsed, authenticated and answered by a task of its own again. Measured in this process, without the
commit: a request with one event costs 35 us instead of 60.
"""

import asyncio
import re
from collections import Counter
from typing import Any, Final, Protocol

from aiohttp import web
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import RequestHandler, _ErrInfo
from msgspec import Struct, json

from bridged import memory
from bridged.sources.clients import BadRequests, Clients, Refusals
from bridged.sources.http_answers import RETRY_AFTER_S, malformed
from bridged.sources.known_head import KnownHead
from bridged.sources.shares import Shares

# Who came just now isn't slow.
_NEW_S: Final = 1.0
# An idle connection for so long may be closed when others need it.
_SPARE_S: Final = 10.0
_LOOKED_AT_ONCE: Final = 50
# Who holds more than this at a look has much that is slow: what it leaves of the heap is given back.
_MUCH_BYTES: Final = 8 * 2**20
# Of a head: a connection may keep it for as long as it lasts. aiohttp bounds each line and their number (128), no sum.
MAX_HEAD_BYTES: Final = 16 * 2**10
_MAX_BEHIND_BYTES: Final = 128 * 2**10  # a repeat, while it is being committed: then reading pauses
_MAX_UNWANTED_BYTES: Final = 64 * 2**20
_LENGTH: Final = re.compile(rb"\n[Cc]ontent-[Ll]ength:[ \t]*(\d{1,12})[ \t]*\r")


class HttpLimits(Struct, frozen=True, kw_only=True):
    """What a connection and all of them may take: seconds and bytes."""

    max_connections: int = 8000
    max_connections_per_client: int = 0  # 0: no limit
    max_in_flight: int = 24 * 2**20
    max_request: int = 24 * 2**20  # of one request: its bytes as they came, and expanded; the door says it by max_body
    head_s: float = 10.0
    body_s: float = 30.0
    idle_s: float = 65.0
    min_bytes_per_s: int = 64 * 2**10
    look_s: float = 1.0


class Repeats(Protocol):
    """Who takes the body of a request whose head is known."""

    def accept_again(self, body: bytes, sender: int) -> "asyncio.Future[None] | None":
        """Takes it: done when it is committed. None: nothing was taken, and it needs more than a plain answer."""

    def answer_again(self, written: "asyncio.Future[None]") -> tuple[bytes, bool]:
        """The whole answer, and whether it is the connection's last one."""


class HttpConnections(web.Server):
    """All connections of the door. Owns the sum of what they hold, and the clock that they are judged by."""

    def __init__(
        self, handler: Any, repeats: Repeats, limits: HttpLimits, answers: Counter[int], refusals: dict[int, bytes]
    ) -> None:
        super().__init__(handler)
        self.repeats = repeats
        self.refusals = refusals  # whole answers, by status
        self.limits = limits
        self.clients = Clients(limits.max_connections_per_client)
        self.answers = answers  # by status
        self.alive: dict[HttpConnection, None] = {}  # oldest first
        self.unused: dict[HttpConnection, None] = {}  # those that have never asked for anything
        self.holding: dict[HttpConnection, None] = {}  # those of which something came that isn't handed on
        self.held = 0
        self.refused = 0  # connections, for want of room
        self.bad = BadRequests()
        self._refusals = Refusals("sources.http")
        self._loop = asyncio.get_running_loop()
        self.now = self._loop.time()
        self._idle: list[HttpConnection] = []  # for long, and which for longest is last
        self._idle_at = self.now  # as of then
        self._look: asyncio.Handle = self._loop.call_later(limits.look_s, self._look_at_all)

    def __call__(self) -> Any:
        """The protocol of a new connection."""
        if len(self.alive) >= self.limits.max_connections and not self._spare_one():
            self.refused += 1
            self.answers[503] += 1
            return _Refusal(self.refusals[503])
        connection = HttpConnection(self, self._loop)
        connection.since = self._loop.time()  # the last look may be long ago: it would be forgotten before it is made
        self.alive[connection] = self.unused[connection] = None
        return connection

    def _make_request(self, message: Any, payload: Any, protocol: Any, *rest: Any) -> web.BaseRequest:
        """Called when a request leaves the queue; until its handler's task begins, nothing else tells of it."""
        protocol.begin(payload)
        return super()._make_request(message, payload, protocol, *rest)

    def _spare_one(self) -> bool:
        """Ends a connection that nobody would miss; if there is none, one whose request has been coming for long."""
        spare = next(iter(self.unused), None)
        if spare is None or self.now - spare.since < _NEW_S:
            spare = self._idle_for_long() or next(
                (each for each in self.holding if self.now - each.since >= _NEW_S and each.arriving), None
            )
        if spare is not None:
            self.refused += 1
            spare.refuse(503 if spare.held and not spare.unused else None)
        return spare is not None

    def _idle_for_long(self) -> "HttpConnection | None":
        if self._idle_at != self.now:
            # Once a look: with thousands of connections there is no time to go through them for each newcomer.
            self._idle_at, self._idle = self.now, [each for each in reversed(self.alive) if each.idle]
        while self._idle:
            connection = self._idle.pop()
            if connection.idle and self.now - connection.since >= _SPARE_S:
                return connection
        return None

    def make_room(self, asking: "HttpConnection") -> bool:
        """Refuses whose body has been coming for longest, until there is room. Whether `asking` may go on."""
        while self.held > self.limits.max_in_flight:
            # In the order in which they came: with thousands of them there is no time to compare.
            next(each for each in self.holding if each is asking or each.arriving).refuse(503)
        return asking.transport is not None

    def forget_heads(self) -> None:
        """What a head meant may have changed: the next one is looked at again."""
        for connection in self.alive:
            connection.forget_head()

    def _look_at_all(self) -> None:
        self.now = self._loop.time()
        self._refusals.look(self.refused, self.now)
        self.bad.look(self.now)
        if self.held > _MUCH_BYTES:
            memory.give_back_holes()
        turns = max(1, -(-len(self.alive) // _LOOKED_AT_ONCE))
        self._judge(list(self.alive), self.limits.look_s / turns)

    def _judge(self, connections: "list[HttpConnection]", turn_s: float) -> None:
        """Some of them at a time, until the next look is due: thousands that end together would keep everybody waiting."""
        rest = connections[_LOOKED_AT_ONCE:]
        try:
            for connection in connections[:_LOOKED_AT_ONCE]:
                connection.judge(self.now)
        finally:
            then = (self._judge, rest, turn_s) if rest else (self._look_at_all,)
            self._look = self._loop.call_later(turn_s, *then)

    async def close(self, grace_s: float) -> None:
        """Ends the idle connections, and the others when their requests are answered or the grace is over."""
        # What came before the listener was closed is being handled after this.
        await asyncio.sleep(0)
        self.pre_shutdown()
        await self.shutdown(grace_s)
        self._look.cancel()


class HttpConnection(RequestHandler):
    """One client."""

    __slots__ = (
        *("_before", "_behind", "_coming", "_committing", "_half_closed", "_head", "_known", "_missing", "_received"),
        *("_client", "_room", "_shares", "_unwanted", "answered", "held", "payload", "since"),
    )

    def __init__(self, room: HttpConnections, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            room,
            loop=loop,
            access_log=None,  # type: ignore[arg-type]  # none at all, as its own code has it
            keepalive_timeout=room.limits.idle_s,
            auto_decompress=False,
            lingering_time=room.limits.body_s,
            read_bufsize=2**15,
            max_line_size=MAX_HEAD_BYTES,
            max_field_size=MAX_HEAD_BYTES,
        )
        self.held = 0  # bytes that came, or were expanded, and aren't handed on
        self._shares = Shares()  # of `held`
        self.since = room.now  # connected, or the first byte of a head, or its last, as of the last look
        self._room = room
        self._client: str | None = None  # whose it is
        self.payload: StreamReader = EMPTY_PAYLOAD  # of the request that was taken last
        self.answered = False  # that request, whose body may still be coming
        self._half_closed = False
        self._unwanted = 0  # bytes of a refused body
        self._head = b""  # of the request that the parser was given last
        self._received = 0  # bytes of that request, and of what came behind it
        self._before = -1  # requests, at its first byte
        self._known: KnownHead | None = None  # the last request's
        self._coming: list[bytes] = []  # a repeated head and what there is of its body
        self._missing = 0  # bytes of that body
        self._committing = False  # a repeat has no answer yet
        self._behind: list[bytes] = []  # what came meanwhile

    def begin(self, payload: StreamReader) -> None:
        """A request leaves the queue."""
        self.payload, self.answered = payload, False
        self._shares.begin()

    @property
    def unused(self) -> bool:
        """Whether it has never asked for anything."""
        return not self._request_count

    @property
    def idle(self) -> bool:
        """Whether it asks for nothing."""
        return not self.held and self._waits_for_a_head()

    def _waits_for_a_head(self) -> bool:
        return self._waiter is not None and not (self._waiter.done() or self._committing or self._coming)

    @property
    def arriving(self) -> bool:
        """Whether a head or a body is on its way."""
        if self._messages or self._current_request is not None:
            return self._body_is_coming()
        return self.held > 0

    @property
    def garbage_follows(self) -> bool:
        """Whether what came behind the request that is being handled is no HTTP."""
        return bool(self._messages) and isinstance(self._messages[0][0], _ErrInfo)

    def _body_is_coming(self) -> bool:
        if self._coming:
            return True
        if self.answered and not self._messages:
            return False
        payload = self._messages[-1][1] if self._messages else self.payload
        return not payload.is_eof() and payload.exception() is None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """One that is one too many of its client's is refused; one that made room during its handshake of TLS ends."""
        super().connection_made(transport)
        if self not in self._room.alive:
            self.refuse(None)
            return
        self._client = self._room.clients.enter(transport)
        if self._client is None:
            self._room.refused += 1
            self.refuse(503)

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Counts what came, and hands it to the parser, unless it is the last request's head again."""
        if self._committing or self._coming:
            self._go_on(data)
            return
        if self._repeated(data):
            return
        count = self._request_count
        if not self.held:
            self.since = self._room.now
        wanted = not self.answered or self._waiter is not None or self._messages or self.payload.is_eof()
        if not wanted:
            # The rest of a body that has its answer already: it is read, so that the answer arrives, and dropped.
            self._unwanted += len(data)
            if self._unwanted > _MAX_UNWANTED_BYTES:
                self.refuse(None)
                return
        elif not self.hold(len(data)):
            return
        self._parse(data, counted=bool(wanted))
        if self._request_count != count:
            self._room.unused.pop(self, None)
            self.since = self._room.now
            self._unwanted = 0
        elif self.held > MAX_HEAD_BYTES and self._waits_for_a_head():
            self.refuse(431)

    def _parse(self, data: bytes, *, counted: bool) -> None:
        """A request at a time: where the parser fails, it forgets those that it has completed in the same call."""
        to = self._end(data, 0)
        self._feed(data[:to], counted=counted)
        while to < len(data) and not self._broken_off():
            at, to = to, self._end(data, to)
            self._feed(data[at:to], counted=counted)
        self._broken_off()

    def _feed(self, data: bytes, *, counted: bool) -> None:
        if data and self._between_requests():
            self._head, self._received, self._before = data[: data.find(b"\r\n\r\n") + 4], 0, self._request_count
        self._received += len(data)
        in_body = self._body_is_coming()
        super().data_received(data)
        if counted:
            self._shares.came(len(data), len(self._messages), in_body=in_body)

    def _between_requests(self) -> bool:
        """Whether the parser found one request in what it was given since it stood there last, and that ended with it.

        Never again, once a head came in pieces, a body by chunks, or something behind it: then it alone knows where it stands.
        """
        payload = self._messages[-1][1] if self._messages else self.payload
        whole = self._request_count == self._before + 1 and payload.is_eof()
        return whole and self._received == len(self._head) + payload.total_bytes

    def _end(self, data: bytes, at: int) -> int:
        """Where in `data` the request ends that goes on, or begins, at `at`. A guess: the parser takes its bytes in any pieces.

        (Where a chunked body ends the parser alone knows.)
        """
        if self._buffer_paused:
            return len(data)
        message, payload = self._messages[-1] if self._messages else (self._current_request, self.payload)
        if message is not None and not isinstance(message, _ErrInfo) and self._body_is_coming():
            length = message.headers.get("Content-Length", "")
            missing = int(length) - payload.total_bytes if length.isdecimal() else 0
            return at + missing if missing > 0 else len(data)
        body_at = data.find(b"\r\n\r\n", at) + 4
        if body_at < 4:
            return len(data)
        found = _LENGTH.search(data, at, body_at)
        return body_at + (int(found[1]) if found else 0)

    def _broken_off(self) -> bool:
        """Whether what came is no HTTP, which its request has been told then."""
        if not (self._messages and isinstance(error := self._messages[-1][0], _ErrInfo)):
            return False
        self._break_off(error)
        return True

    def _break_off(self, error: _ErrInfo) -> None:
        """What came is no HTTP. Amid a body its request says so, which aiohttp would let wait for the rest for ever."""
        error.exc.__traceback__ = None  # as in `handle_error`, which may never get it
        payload = self._messages[-2][1] if len(self._messages) > 1 else self.payload
        if not payload.is_eof():
            del self._messages[-1]
            self._shares.merge(len(self._messages))
            if self.answered and not self._messages:
                payload.feed_eof()
            else:
                payload.set_exception(error.exc)
                self._lingering_time = 0.0  # no rest will come that could be read

    def hold(self, size: int) -> bool:
        """Counts bytes. False: they are too many, the client has been told so, and the connection is closing."""
        if self.transport is None:
            return False
        room = self._room
        if not self.held:
            room.holding[self] = None
        self.held += size
        room.held += size
        if self.held > room.limits.max_request:
            self.refuse(413)
            return False
        return room.held <= room.limits.max_in_flight or room.make_room(self)

    def hold_expanded(self, size: int) -> bool:
        """The same, of what the body of the request in hand expands to."""
        self._shares.in_hand += size
        return self.hold(size)

    def release(self) -> None:
        """The request in hand is done with: what came of it is gone, and if no other has come behind it, all is."""
        done = self._shares.end()
        if self._messages:
            self._let_go(min(done, self.held))
        else:
            self._let_go(self.held)
            self._shares.clear()

    def _let_go(self, size: int) -> None:
        self.held -= size
        self._room.held -= size
        if not self.held:
            self._room.holding.pop(self, None)

    def eof_received(self) -> bool | None:  # type: ignore[override]  # asyncio lets it answer; aiohttp always closes
        """A client that has said all it wants to say still wants its answers. (TLS knows no half-closed connections.)"""
        asked = bool(self._messages) or not (self._waits_for_a_head() or (self.answered and not self.payload.is_eof()))
        if not asked or self._body_is_coming() or self.ssl_context is not None:
            return None
        self._half_closed = True
        return True

    @property
    def last_answer(self) -> bool:
        """Whether nothing more can be asked on it."""
        return self._half_closed and not self._messages

    # -- the same head again -------------------------------------------------------------------------------------------

    def handled(self, *, plain: bool) -> None:
        """The request that the parser had is answered. `plain`: by a 200, and the same head shall be answered likewise."""
        whole = plain and not self._messages and self._between_requests()
        self._known = KnownHead.of(self._head) if whole else None

    def forget_head(self) -> None:
        """The next request is the parser's. One that is coming was let in already."""
        self._known = None

    def _repeated(self, data: bytes) -> bool:
        """Takes what begins with a known head. False: nothing was done, the parser shall have it."""
        if self._known is None or self.held or self.writing_paused or not self._waits_for_a_head():
            return False
        framed = self._known.framed(data)
        if framed is None:
            return False
        body_at, body_to = framed
        if body_to <= len(data):
            return self._take(data, body_at, body_to)
        if body_to > self._room.limits.max_request // 2:
            return False
        self.since = self._room.now
        if self.hold(len(data)):
            self._coming, self._missing = [data], body_to - len(data)
        return True

    def _go_on(self, data: bytes) -> None:
        """More of a body, or what comes behind a request that has no answer yet."""
        if self._committing:
            self._wait_behind(data)
            return
        if not self.hold(len(data)):
            return
        self._coming.append(data)
        self._missing -= len(data)
        if self._missing <= 0:
            whole, self._coming = b"".join(self._coming), []
            self._let_go(self.held)
            body_at = whole.find(b"\r\n\r\n") + 4
            if not self._take(whole, body_at, len(whole) + self._missing):
                self._known = None  # else it would be tried again
                self.data_received(whole)

    def _take(self, data: bytes, body_at: int, to: int) -> bool:
        """Takes a request's body, and keeps what came behind it. False: nothing was done."""
        written = self._room.repeats.accept_again(data[body_at:to], id(self))
        if written is None:
            return False
        if to < len(data):
            self._wait_behind(data[to:])
        self._committing, self.since = True, self._room.now
        self._next_keepalive_close_time = self._room.now + self._room.limits.idle_s
        written.add_done_callback(self._answer)
        return True

    def _wait_behind(self, data: bytes) -> None:
        if self.hold(len(data)):
            self._behind.append(data)
            if self.held > _MAX_BEHIND_BYTES:
                self._pause_reading_for_buffer()

    def _answer(self, written: "asyncio.Future[None]") -> None:
        answer, is_last = self._room.repeats.answer_again(written)
        self._committing = False
        if self.transport is None:
            return
        self.transport.write(answer)
        self._next_keepalive_close_time = self._room.now + self._room.limits.idle_s
        behind, self._behind = self._behind, []
        if is_last or (self._half_closed and not behind):
            self.force_close()
            self._forget()
        elif behind:
            self._let_go(self.held)
            if self._buffer_paused:
                self._resume_reading_for_buffer()
            self.data_received(b"".join(behind))

    def _process_keepalive(self) -> None:
        # aiohttp takes for idle whose handler waits, and of repeats no handler knows.
        if self._coming or self._committing:
            self._next_keepalive_close_time = self._loop.time() + self._room.limits.idle_s
        super()._process_keepalive()

    # -- the end -------------------------------------------------------------------------------------------------------

    def judge(self, now: float) -> None:
        """Ends what takes too long."""
        limits, age = self._room.limits, now - self.since
        if self.transport is None:
            # A handshake of TLS that came to nothing: asyncio has forgotten it.
            if age > 2 * limits.head_s:
                self._forget()
        elif self.writing_paused:
            if age > limits.body_s:
                self.transport.abort()
        elif self._waits_for_a_head():
            if self._half_closed or (self.unused and not self.held and age > limits.head_s):
                self.refuse(None)
            elif self.held and age > limits.head_s:
                self.refuse(408)
        elif self._body_is_coming() and age > limits.body_s + self.held / limits.min_bytes_per_s:
            self.refuse(408)

    def refuse(self, status: int | None) -> None:
        """Says why (None: nothing, to who has asked nothing), closes, and forgets what came."""
        transport = self.transport
        if transport is not None:
            if status is not None:
                self._room.answers[status] += 1
                transport.write(self._room.refusals[status])
            self.force_close()
            if transport.get_write_buffer_size():
                transport.abort()
        self._forget()

    def connection_lost(self, exc: BaseException | None) -> None:
        """What it held is gone with it."""
        self._forget()
        self._room.clients.leave(self._client)
        super().connection_lost(exc)

    def _forget(self) -> None:
        for payload in [message[1] for message in self._messages] + [self.payload]:
            # Nobody will read it, and aiohttp holds it until the next collection of garbage.
            if payload is not EMPTY_PAYLOAD:
                payload._buffer.clear()  # noqa: SLF001  # nothing public drops what a reader holds
        if self.answered:
            self.payload.feed_eof()  # else aiohttp waits for the rest of what was refused, though nobody can send it
        self.payload = EMPTY_PAYLOAD  # it knows the connection
        self._coming.clear()
        self._behind.clear()
        self._shares.clear()
        self._room.held -= self.held
        self.held = 0
        self._room.holding.pop(self, None)
        self._room.alive.pop(self, None)
        self._room.unused.pop(self, None)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """The answer to what is no HTTP, or to a bug of ours. aiohttp would log and repeat the bytes of the former."""
        if status >= 500:
            self._room.answers[status] += 1
            response = super().handle_error(request, status, exc, message)
            response.headers["Server"] = "bridged"
            return response
        status, what, why = malformed(exc)
        if status == 400:
            self._room.bad.note(f"{what}: {type(exc).__name__}")
        self._room.answers[status] += 1
        # Its traceback holds the connection, which holds it, until the next collection of garbage.
        exc = exc and exc.with_traceback(None)
        said = json.encode({"error": what, "hint": why}) + b"\n"
        response = web.Response(status=status, body=said, content_type="application/json")
        response.force_close()
        response.headers["Server"] = "bridged"
        if status == 503:
            response.headers["Retry-After"] = str(RETRY_AFTER_S)
        return response


class _Refusal(asyncio.Protocol):
    """A connection too many: an answer, and the end."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self._answer)  # type: ignore[attr-defined]  # a stream server makes nothing else
        transport.close()
