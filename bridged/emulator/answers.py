"""What Mixpanel says, field by field. Pure.

Strict answers are JSON with a `code`; the others are a bare `1` or `0`, or, when asked to be verbose, JSON with an
integer `status` and no `code`. Troubles of the cloud's edge are not JSON at all.
"""

from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final

import msgspec

JSON: Final = "application/json"
TEXT: Final = "text/plain"
HTML: Final = "text/html"

RATE_LIMITED: Final = "Project exceeded rate limits. Please retry the request with exponential backoff."
INVALID_CREDENTIALS: Final = "Invalid credentials"
FAILED_VALIDATION: Final = "some data points in the request failed validation"
SIMPLIFIED_MERGE: Final = "identity events are not allowed when project is using simplified identity management"


class Answer(msgspec.Struct, frozen=True):
    """Everything of an answer but its headers' trifles."""

    status: int
    body: bytes
    content_type: str = JSON
    headers: dict[str, str] = {}


def as_json(status: int, body: Any) -> Answer:
    """Answer with JSON."""
    return Answer(status, msgspec.json.encode(body))


def imported(records: int, *, verbose: bool) -> Answer:
    """All records of a strict import are in; asked to be verbose, Mixpanel says 1 where it says OK otherwise."""
    return as_json(200, {"code": 200, "num_records_imported": records, "status": 1 if verbose else "OK"})


def partly_imported(records: int, failed: list[Any], error: str = FAILED_VALIDATION) -> Answer:
    """Some records of a strict import are in: `failed` says which are not."""
    body = {"code": 400, "error": error, "failed_records": failed, "num_records_imported": records}
    return as_json(400, body | {"status": "Bad Request"})


def refused(status: int, error: str, *, strict: bool = True) -> Answer:
    """Nothing of the request is in, for a reason that concerns all of it."""
    if not strict:
        return as_json(status, {"error": error, "status": 0})
    return as_json(status, {"code": status, "error": error, "status": phrase(status)})


def received(error: str = "", *, verbose: bool) -> Answer:
    """Answer an endpoint that is not strict: 200 whatever happened, the body tells success from failure."""
    if verbose:
        return as_json(200, {"error": error or None, "status": 0 if error else 1})
    return Answer(200, b"0" if error else b"1", TEXT)


def too_large(max_body_bytes: int) -> str:
    """Say how large a body may be; senders read the number."""
    return f"request exceeds max limit of {max_body_bytes} bytes"


def canned(status: int) -> Answer:
    """Return what Mixpanel, or the edge in front of it, is known to say with a status."""
    if status in {200, 400, 401, 413, 429}:
        return {
            200: imported(0, verbose=False),
            400: partly_imported(0, []),
            401: refused(401, INVALID_CREDENTIALS),
            413: refused(413, too_large(2_097_152)),
            429: refused(429, RATE_LIMITED),
        }[status]
    if status == 503:
        return Answer(status, b"upstream connect error or disconnect/reset before headers", TEXT)
    return page(status)


def scripted(status: int, body: Any, content_type: str, usual: Callable[[int], Answer]) -> Answer:
    """Answer as a fault wants it: text as it is, anything else as JSON, and nothing as the usual words."""
    if body is None:
        answer = usual(status)
    elif isinstance(body, str):
        answer = Answer(status, body.encode(), TEXT)
    else:
        answer = as_json(status, body)
    return msgspec.structs.replace(answer, content_type=content_type or answer.content_type)


def page(status: int) -> Answer:
    """Answer as a web server in between would, with a page for people."""
    title = f"{status} {phrase(status)}"
    head, body = f"<head><title>{title}</title></head>", f"<body><center><h1>{title}</h1></center></body>"
    return Answer(status, f"<html>\r\n{head}\r\n{body}\r\n</html>\r\n".encode(), HTML)


def phrase(status: int) -> str:
    """Name a status as HTTP does."""
    if status == 413:
        return "Request Entity Too Large"  # newer Pythons know it by another name
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"
