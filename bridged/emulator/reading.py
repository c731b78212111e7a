"""From a request to its records, whatever the dialect. Pure."""

from collections.abc import Mapping
from typing import Final

import msgspec

from bridged.emulator import bodies
from bridged.errors import BadRequest

JSON_TYPES: Final = frozenset({"application/json", "text/json"})


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A request, as far as it matters."""

    path: str
    body: bytes = b""
    method: str = "POST"
    query: Mapping[str, str] = {}
    authorization: str = ""
    content_type: str = ""
    content_encoding: str = ""

    @property
    def strict(self) -> bool:
        """Whether the answer must account for every record."""
        return self.query.get("strict") == "1"

    @property
    def verbose(self) -> bool:
        """Whether the query asks for more than a digit."""
        return self.query.get("verbose") == "1"


class Sent(msgspec.Struct):
    """The records of a request, and the switches that a form holds beside them."""

    records: list[bytes]
    size: int  # of the uncompressed body
    verbose: bool
    placed: bool  # geolocation by the sender's address is switched off for the whole request


def read(call: Call, max_body_bytes: int, max_records: int, *, gzip: bool = True) -> Sent:
    """Undo the wrapping. Raises TooLarge, and BadRequest for anything that is not a list of records."""
    body = bodies.inflate(call.body, call.content_encoding if gzip else "", max_body_bytes)
    media_type = call.content_type.partition(";")[0].strip().lower()
    fields: Mapping[str, str] = call.query
    if call.method == "POST" and media_type == bodies.FORM:
        fields = {**call.query, **bodies.form(body)}
    if call.method != "POST" or media_type == bodies.FORM:
        if "data" not in fields:
            raise BadRequest("'data' is missing")
        records = bodies.records(bodies.form_data(fields["data"]), "")
    elif media_type == bodies.NDJSON or media_type in JSON_TYPES or not call.strict:
        records = bodies.records(body, media_type)
    else:
        raise BadRequest(f"unsupported content type {media_type!r}, use application/json or {bodies.NDJSON}")
    if not records:
        raise BadRequest("request must hold at least one record")
    if len(records) > max_records:
        raise BadRequest(f"request exceeds max limit of {max_records} records")
    return Sent(records, len(body), fields.get("verbose") == "1", fields.get("ip") == "0")
