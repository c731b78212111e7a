"""Which records Mixpanel takes. Pure: the time of day is an argument, nothing is read and nothing waits.

`check` is the rule book: one decoded record in, None or (field, message) out. `is_plain` is the short cut in front of
it: it looks at one line of NDJSON and the few typed properties that every event has, and says yes only where the rule
book would find nothing. Nearly all traffic of a sound sender is plain, which is what makes the emulator cheap enough
to share a benchmark's cores.

Where Mixpanel's documentation is silent or contradicts itself the stricter reading stands here, because an emulator
that forgives hides the sender's mistake until it meets the real service:
- at most 254 properties, keys of an object and elements of a list (the pages say both "fewer than" and "up to" 255);
- an object or list is at most 8 KB, though the outcome beyond it is not written down;
- refused ids are refused in any case of letters;
- a missing distinct_id is refused, as projects with the original ID merge do, while the identity events are refused
  as projects with the simplified merge do (see `project.py`): a sender that suits both projects passes.

Two readings are the laxer ones. Ten levels of objects and lists below `properties`, where the pages say three: by one of
Mixpanel's own only ten is enforced, and a sender that kept to three would give up events that Mixpanel takes. And JSON as its
standard has it, of which the pages say nothing: numbers that no double holds (1e400, 400 digits) are taken, and of a member
that is there twice the last.
"""

import re
from ipaddress import ip_address
from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, Meta

Failure = tuple[str, str]

EARLIEST_S: Final = 31_536_000  # 1971-01-01
EARLIEST_MS: Final = EARLIEST_S * 1000  # any number this large means milliseconds: as seconds it is the year 2969
MAX_AHEAD_S: Final = 3600
MAX_KEYS: Final = 254
MAX_DEPTH: Final = 10
MAX_NESTED_BYTES: Final = 8192
MAX_INSERT_ID_BYTES: Final = 36
# 255 different keys need more bytes than this, so a shorter line can't have them.
SHORT_LINE: Final = 1500

REFUSED_IDS: Final = frozenset(
    {"00000000-0000-0000-0000-000000000000", "anon", "anonymous", "nil", "none", "null", "n/a", "na", "undefined"}
    | {"unknown", "<nil>", "0", "-1", "true", "false", "[]", "{}"},
)
INSERT_ID_LETTERS: Final = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-"
_insert_id = re.compile("[A-Za-z0-9-]+").fullmatch


class Properties(msgspec.Struct, gc=False):
    """The properties that are judged on every event; the others are skipped while decoding."""

    time: Annotated[int, Meta(ge=EARLIEST_S)]
    distinct_id: str
    insert_id: Annotated[str, Meta(min_length=1, max_length=MAX_INSERT_ID_BYTES)] = msgspec.field(name="$insert_id")
    token: Any = UNSET
    ip: Any = UNSET
    ignore: Any = msgspec.field(name="$ignore", default=UNSET)


class Record(msgspec.Struct, gc=False):
    """An event as a sound sender writes it; one that does not decode as this goes the long way."""

    event: Annotated[str, Meta(min_length=1)]
    properties: Properties


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What a project asks of a record."""

    max_event_bytes: int = 1_000_000
    token: str = ""  # the project's, when known: a record that names another is refused
    strict: bool = True


def is_plain(record: Record, line: bytes, now_s: int, rules: Rules) -> bool:
    """Whether `check` would surely find nothing.

    Two things are the caller's: the alphabet of `$insert_id`, done for a batch at once, and that the line is UTF-8.
    """
    properties = record.properties
    time = properties.time
    return (
        (time <= now_s or EARLIEST_MS <= time <= now_s * 1000)
        # Exactly the two braces of the record and of its properties, or one of them in a string: the long way then.
        and line.find(b"{", 1) == line.rfind(b"{")
        and (len(line) < SHORT_LINE or (len(line) < MAX_NESTED_BYTES and line.count(b",") < MAX_KEYS))
        and (b"[" not in line or (line.count(b"[") <= MAX_DEPTH and line.count(b",") < MAX_KEYS))
        and properties.distinct_id.lower() not in REFUSED_IDS
        and properties.insert_id.lower() not in REFUSED_IDS
        and properties.ignore is UNSET
        and (properties.token is UNSET or not rules.token or properties.token == rules.token)
        and not record.event.isspace()
        and record.event[0] != "$"
        and len(line) < rules.max_event_bytes
        and (b"\\" not in line or (b"\\ud" not in line and b"\\uD" not in line))
    )


def check(event: object, size: int, now_s: int, rules: Rules) -> Failure | None:
    """Judge one decoded record of `size` bytes: None when it is taken, else the field at fault and why.

    Not strict means what `/track` and the old form of `/import` do: the ids are not looked at, and the time only where
    there is one.
    """
    if not isinstance(event, dict):
        return "", "record is invalid: must be an object"
    if size >= rules.max_event_bytes:
        return "event", f"'event' is invalid: must be smaller than {rules.max_event_bytes} bytes"
    name = event.get("event")
    if name is None or (isinstance(name, str) and not name.strip()):
        return "event", "'event' must not be missing or blank"
    if not isinstance(name, str):
        return "event", "'event' is invalid: must be a string"
    if not _is_utf8(name):
        return "event", "'event' is invalid: string should be valid utf8"
    properties = event.get("properties")
    if properties is None:
        return "properties", "'properties' must not be missing"
    if not isinstance(properties, dict):
        return "properties", "'properties' is invalid: must be an object"
    return (
        _check_time(properties, now_s, strict=rules.strict)
        or (_check_ids(properties) if rules.strict else None)
        or _check_token(properties, rules.token)
        or _check_values(properties)
    )


def is_placed(ip: object) -> bool:
    """Whether an event's `ip` is an address, or the 0 that places it nowhere; else it is placed where its sender stands."""
    if not isinstance(ip, str):
        return ip == 0
    try:
        return ip == "0" or bool(ip_address(ip))
    except ValueError:
        return False


def stored_time(value: object, now_s: int) -> int | None:
    """Return the time that replaces `value`: the hour ahead that is allowed is overwritten with now; None keeps it.

    Where it isn't strict a time may be text, or have a fraction, as the Python client's has.
    """
    if isinstance(value, str):
        return stored_time(int(float(value)), now_s) or int(float(value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return now_s
    if value >= EARLIEST_MS:
        return now_s * 1000 if value > now_s * 1000 else None
    return now_s if value > now_s else None


def _check_time(properties: dict[str, Any], now_s: int, *, strict: bool) -> Failure | None:
    field = "properties.time"
    value = properties.get("time")
    if value is None:
        return (field, "'properties.time' is invalid: must not be missing") if strict else None
    if not strict and isinstance(value, str | float):
        try:
            value = int(float(value))
        except (ValueError, OverflowError):
            return field, "'properties.time' is invalid: must be specified as seconds since epoch"
    if isinstance(value, bool) or not isinstance(value, int):
        return field, "'properties.time' is invalid: must be specified as seconds since epoch"
    seconds = value / 1000 if value >= EARLIEST_MS else value
    if seconds < EARLIEST_S:
        return field, "'properties.time' is invalid: must not be before 1971-01-01"
    if seconds > now_s + MAX_AHEAD_S:
        return field, "'properties.time' is invalid: must not be more than one hour in the future"
    return None


def _check_ids(properties: dict[str, Any]) -> Failure | None:
    distinct_id = properties.get("distinct_id")
    field = "properties.distinct_id"
    if distinct_id is None:
        return field, "'properties.distinct_id' is invalid: must not be missing"
    if not isinstance(distinct_id, str):
        return field, "'properties.distinct_id' is invalid: must be a string"
    if distinct_id.lower() in REFUSED_IDS:
        return field, f"'properties.distinct_id' is invalid: '{distinct_id}' is not allowed"
    insert_id = properties.get("$insert_id")
    if insert_id is None or insert_id == "":
        return "$insert_id", "'$insert_id' is invalid: must not be missing"
    if not isinstance(insert_id, str):
        return "$insert_id", "'$insert_id' is invalid: must be a string"
    if insert_id.lower() in REFUSED_IDS:
        return "$insert_id", f"'$insert_id' is invalid: '{insert_id}' is not allowed"
    if not _insert_id(insert_id):
        return "$insert_id", "'$insert_id' is invalid: must only contain alphanumeric or hyphen '-' characters"
    if len(insert_id) > MAX_INSERT_ID_BYTES:
        return "$insert_id", f"'$insert_id' is invalid: must not be longer than {MAX_INSERT_ID_BYTES} bytes"
    return None


def _check_token(properties: dict[str, Any], token: str) -> Failure | None:
    if token and properties.get("token", token) != token:
        return "properties.token", "'properties.token' is invalid: does not match the project of the credentials"
    return None


def _check_values(properties: dict[str, Any]) -> Failure | None:
    if len(properties) > MAX_KEYS:
        return "properties", f"'properties' is invalid: must have fewer than {MAX_KEYS + 1} properties"
    for key, value in properties.items():
        if not _is_utf8(key):
            return "properties", "'properties' is invalid: property name should be valid utf8"
        if isinstance(value, str):
            reason = "" if _is_utf8(value) else "string should be valid utf8"
        elif isinstance(value, dict | list):
            reason = _fault_inside(value)
        else:
            continue
        if reason:
            return f"properties.{key}", f"properties.{key} is invalid: {reason}"
    return None


def _fault_inside(root: dict[str, Any] | list[Any]) -> str:
    """Return what is wrong with an object or a list, or nothing; without recursion, as a bad one abuses the depth."""
    waiting: list[tuple[Any, int]] = [(root, 1)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, str):
            if not _is_utf8(value):
                return "string should be valid utf8"
        elif isinstance(value, dict | list):
            if depth > MAX_DEPTH:
                return f"must not be nested more than {MAX_DEPTH} levels deep"
            if len(value) > MAX_KEYS:
                kind = "keys" if isinstance(value, dict) else "elements"
                return f"must have fewer than {MAX_KEYS + 1} {kind}"
            inner = (*value, *value.values()) if isinstance(value, dict) else value
            waiting.extend((item, depth + 1) for item in inner)
    if len(msgspec.json.encode(root)) > MAX_NESTED_BYTES:
        return f"must not be larger than {MAX_NESTED_BYTES} bytes"
    return ""


def _is_utf8(text: str) -> bool:
    """Whether the text came from valid UTF-8: `bodies.loose` leaves a lone surrogate where it did not."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
