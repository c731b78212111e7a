"""What the HTTP door answers, in bytes or for aiohttp to write; which of it when is the door's business."""

import re
import time
from email.utils import formatdate
from http import HTTPStatus
from typing import Final

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import LineTooLong

from bridged.errors import BridgedError
from bridged.redaction import redacted

TAKEN: Final = b'{"status":"ok"}\n'
RETRY_AFTER_S: Final = 30
_TWICE: Final = re.compile(r"Duplicate '([\w-]+)' header")  # as aiohttp says it
_MAX_WHY: Final = 200


class Ok(web.StreamResponse):
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

    def whole(self) -> bytes:
        """Head and body."""
        now_s = time.monotonic() // 1
        if now_s != self._made_at:
            self._made_at = now_s
            self._answer = whole(200, TAKEN, {"Date": formatdate(usegmt=True)})
        return self._answer

    async def prepare(self, request: web.BaseRequest) -> None:
        """Writes all of it."""
        if request.transport is not None:
            request.transport.write(self.whole())

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to be written."""


def whole(status: int, body: bytes, headers: dict[str, str]) -> bytes:
    """A whole answer, written without aiohttp."""
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "Content-Type: application/json", "Server: bridged"]
    lines += [f"Content-Length: {len(body)}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode() + body


def _refusal(status: int, why: str) -> bytes:
    """The answer to what isn't there to be handled: too slow, too large, too much. It is a connection's last one."""
    retry = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else {}
    body = msgspec.json.encode({"error": why, "hint": ""}) + b"\n"
    return whole(status, body, {**retry, "Connection": "close"})


REFUSALS: Final = {
    status: _refusal(status, why)
    for status, why in (
        (408, "the request didn't come in time"),
        (413, "the request is larger than can be taken"),
        (431, "the request's head is too large"),
        (503, "too much is coming in at once"),
    )
}


class Nobody(web.StreamResponse):
    """The answer when the client is gone, or was refused: there is none, and its connection ends."""

    async def prepare(self, request: web.BaseRequest) -> None:
        """What aiohttp takes for what it is. Thrown by the handler, it would be kept with all that the request held."""
        raise ConnectionResetError


def said(error: BridgedError) -> bytes:
    """The body of the answer to what can't be taken."""
    return msgspec.json.encode({"error": redacted(error.args[0]), "hint": redacted(error.hint)})


def malformed(error: BaseException | None) -> tuple[int, str, str]:
    """What is answered to what is no HTTP as it should be: the status, what it is called, and why. No byte of it is in there.

    A good request that a proxy has added to, or coded, is none of those: for a 400 Braze would drop its events.
    """
    # The lines below the first one quote what came.
    why = str(getattr(error, "message", "")).partition("\n")[0].rstrip(":")[:_MAX_WHY] or type(error).__name__
    if isinstance(error, LineTooLong) or "Too many headers" in str(error):
        return 431, "the request's head is too large", type(error).__name__
    if (twice := _TWICE.search(why)) and twice[1].lower() != "host":
        return 503, f"the head has {twice[1]} twice: something in between adds it", why
    if "invalid `transfer-encoding`" in why.lower():
        return 501, "the Transfer-Encoding is another than chunked", why
    return 400, "this is not HTTP as it should be", why
