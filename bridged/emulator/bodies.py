"""From the bytes of a request to the bytes of its records. Pure.

Formats: a JSON list, one JSON object, NDJSON with one record a line, and the form `data=<JSON or base64 of JSON>` of
the older clients. The only content coding is gzip; several gzip members one after the other are one body, as the
format's standard says.
"""

import base64
import binascii
import json
import math
from typing import Any, Final, NoReturn
from urllib.parse import parse_qsl

import msgspec
from isal import isal_zlib

from bridged.emulator.answers import too_large
from bridged.errors import BadRequest, TooLarge

NDJSON: Final = "application/x-ndjson"
FORM: Final = "application/x-www-form-urlencoded"
_GzipError: type[Exception] = isal_zlib.IsalError  # type: ignore[assignment]  # its stub has an instance for the class
_GZIP: Final = 31  # zlib's number for "gzip header and trailer required"
_raw_list = msgspec.json.Decoder(list[msgspec.Raw])
_any = msgspec.json.Decoder()


def inflate(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Undo the content coding; never grows past `max_bytes`, however small the bomb."""
    encoding = encoding.strip().lower()
    if encoding in {"gzip", "x-gzip"}:
        body = _gunzip(body, max_bytes)
    elif encoding not in {"", "identity"}:
        raise BadRequest(f"unsupported content encoding {encoding!r}, use gzip")
    if len(body) > max_bytes:
        raise TooLarge(too_large(max_bytes))
    return body


def _gunzip(body: bytes, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    room = max_bytes + 1
    while True:
        member = isal_zlib.decompressobj(wbits=_GZIP)
        try:
            part = member.decompress(body, room)
        except _GzipError as error:
            raise BadRequest(f"body is not valid gzip: {error}") from error
        parts.append(part)
        room -= len(part)
        if room <= 0:
            raise TooLarge(too_large(max_bytes))
        if not member.eof:
            raise BadRequest("body is not valid gzip: it ends too early")
        body = member.unused_data
        if not body:
            return parts[0] if len(parts) == 1 else b"".join(parts)


def form(body: bytes) -> dict[str, str]:
    """Read an URL-encoded form; where a key repeats the last one counts."""
    try:
        return dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=100))
    except ValueError as error:
        raise BadRequest(f"form can't be read: {error}") from error


def form_data(value: str) -> bytes:
    """Return the JSON of a form's `data`, which may be in base64.

    The Node client does not escape the plus signs of its base64, so they arrive as spaces.
    """
    text = value.strip()
    if text[:1] in {"[", "{"}:
        return text.encode(errors="surrogatepass")
    try:
        return base64.b64decode(text.replace(" ", "+").replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest("'data' is neither JSON nor base64") from error


def records(body: bytes, content_type: str) -> list[bytes]:
    """Cut a body into the bytes of its records; whether each is JSON is seen when it is decoded."""
    if content_type == NDJSON:
        return [line for line in body.split(b"\n") if line and not line.isspace()]
    text = body.strip()
    if text[:1] != b"[":
        return [text] if text else []
    try:
        return [bytes(item) for item in _raw_list.decode(text)]
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRequest(f"body is not JSON: {error}") from error


def loose(record: bytes) -> Any:
    """Decode one record, forgiving bytes that are not UTF-8.

    Lone surrogates stand for them, so that `check` refuses this record alone; a number that nothing of ours holds stays the
    text that it is written as. Raises BadRequest when it is not JSON.
    """
    try:
        return _any.decode(record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        text = record.decode("utf-8", "surrogateescape")
        return json.loads(text, parse_constant=_refuse_constant, parse_int=_int, parse_float=_float)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"body is not JSON: {error}") from error


def _int(digits: str) -> int | str:
    try:
        return int(digits)
    except ValueError:  # more than 4,300 of them
        return digits


def _float(digits: str) -> float | str:
    number = float(digits)
    return number if math.isfinite(number) else digits


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
