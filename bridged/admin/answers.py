"""What the endpoints of the API share: JSON out, JSON in, and numbers of a query."""

from typing import Any, TypeVar

import msgspec
from aiohttp import web

from bridged.errors import BadRequest

T = TypeVar("T")


class Verbatim(web.Response):
    """An answer that comes from us alone, byte for byte: nothing in it is looked for or masked."""


def json(said: Any, status_code: int = 200) -> web.Response:
    """An answer in JSON."""
    return web.Response(status=status_code, body=msgspec.json.encode(said) + b"\n", content_type="application/json")


async def body(request: web.Request, type_: type[T]) -> T:
    """The body of a POST, decoded. Raises BadRequest."""
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(text="the body must be JSON, with Content-Type: application/json")
    try:
        return msgspec.json.decode(await request.read(), type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the body can't be understood: {error}") from error


def number(query: dict[str, str], name: str, default: int, most: int) -> int:
    """Takes a number out of a query. Raises BadRequest."""
    text = query.pop(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) <= 19 and int(text) <= most):
        raise BadRequest(f"{name}: a number up to {most}, not {text[:40]!r}")
    return int(text)
