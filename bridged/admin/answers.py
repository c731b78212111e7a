"""What the endpoints of the API share: JSON out, JSON in, and numbers of a query."""

import re
from typing import Any, Final, TypeVar

import msgspec
from aiohttp import web

from bridged.errors import BadRequest
from bridged.settings import Config

T = TypeVar("T")

# msgspec's words for what stands in JSON, and a person's.
_KINDS: Final = {
    "object": "an object {...}",
    "array": "a list [...]",
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "null": "null",
}
_WHERE: Final = re.compile(r"(.*?)(?: - at `\$\.?(.*)`)?", re.DOTALL)
_SAYINGS: Final = (
    (re.compile(r"Expected `([^`]+)`, got `([^`]+)`"), "expected {0}, not {1}"),
    (re.compile(r"Object contains unknown field `(.+)`", re.DOTALL), "there is no {0!r} here"),
    (re.compile(r"Object missing required field `(.+)`"), "{0!r} is missing"),
    (re.compile(r"Invalid enum value (.+)", re.DOTALL), "{0} is none of its values"),
    (re.compile(r"Input data was truncated"), "it is no whole JSON"),
)


class Verbatim(web.Response):
    """An answer that comes from us alone, byte for byte: nothing in it is looked for or masked."""


def json(said: Any, status_code: int = 200) -> web.Response:
    """An answer in JSON."""
    return web.Response(status=status_code, body=msgspec.json.encode(said) + b"\n", content_type="application/json")


def demand_export(config: Config) -> None:
    """Raises HTTPConflict where no events are taken, and none are sent."""
    if not config.mixpanel.export:
        raise web.HTTPConflict(text="no events are taken here, nor sent: set mixpanel.export = true, and restart")


async def body(request: web.Request, type_: type[T]) -> T:
    """The body of a POST, decoded. Raises BadRequest."""
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(text="the body must be JSON, with Content-Type: application/json")
    try:
        return msgspec.json.decode(await request.read(), type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the body can't be understood: {in_words(error)}", "nothing was changed") from error


def in_words(error: Exception) -> str:
    """What msgspec says of a body, for a person: first where, then what. What it says otherwise is left as it is."""
    match = _WHERE.fullmatch(str(error))
    assert match is not None  # anything matches
    said, where = match[1], match[2]
    for pattern, told in _SAYINGS:
        if found := pattern.fullmatch(said):
            said = told.format(*map(_kinds, found.groups()))
            break
    return (f"{where}: {said}" if where else said)[:300]


def _kinds(text: str) -> str:
    kinds = text.split(" | ")
    return " or ".join(_KINDS[kind] for kind in kinds) if all(kind in _KINDS for kind in kinds) else text


def number(query: dict[str, str], name: str, default: int, most: int) -> int:
    """Takes a number out of a query. Raises BadRequest."""
    text = query.pop(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) <= 19 and int(text) <= most):
        raise BadRequest(f"{name}: a number up to {most}, not {text[:40]!r}")
    return int(text)
