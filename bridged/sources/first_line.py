"""What the first line of a stream may be besides an event: a handshake, or HTTP that came to the wrong door. Pure."""

import re
from typing import Final

import msgspec
from msgspec import UNSET, Struct, UnsetType

_HTTP: Final = re.compile(rb"[A-Z]+ \S+ HTTP/\d\.\d\r?\n?")
_MISDIRECTED: Final = (
    b'{"error":"this is the stream door, which speaks no HTTP",'
    b'"hint":"events are posted to /v1/currents at [sources.http] listen; here they come one a line"}\n'
)
# What a client of HTTP understands. Braze drops the events after a 400 or a 404, and tries again after this.
NO_HTTP: Final = (
    b"HTTP/1.1 421 Misdirected Request\r\nContent-Type: application/json\r\nServer: bridged\r\n"
    b"Content-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(_MISDIRECTED), _MISDIRECTED)
)


class _Handshake(Struct):
    acks: bool
    event_type: UnsetType = UNSET  # with one it is an event, whatever else is in it


def handshake(lines: list[bytes]) -> bool | None:
    """Whether there shall be acks, by the first line that isn't blank; None: there is none yet. Takes it out, if it is one."""
    del lines[: next((at for at, line in enumerate(lines) if not line.isspace()), len(lines))]
    if not lines:
        return None
    try:
        acks = msgspec.json.decode(lines[0].removeprefix(b"\xef\xbb\xbf"), type=_Handshake).acks
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    del lines[0]
    return acks


def is_http(line: bytes) -> bool:
    """Whether a request of HTTP begins with it."""
    return _HTTP.fullmatch(line) is not None
