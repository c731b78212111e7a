"""The rows of the table made into msgspec Structs and decoders.

One tagged union of all event types decodes a whole read or body in one call, at about 1 us an event. It fails as a
whole on one event that it doesn't know or that is ill-typed, so a failure is followed by one call an event: the good
ones are decoded all the same, and each bad one becomes a `Refusal` with its own reason.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Final, NamedTuple, Union, cast

import msgspec
from msgspec import Meta, Raw, Struct, ValidationError, field

from bridged.currents.table import CUSTOM_MEMBERS, PROPERTY_TYPES, EventType

# Codes stand for event types in a segment, one byte an event. Those of the table's rows are their positions.
UNKNOWN_CODE: Final = 254  # an event type that the table doesn't have
UNDECODABLE_CODE: Final = 255  # not even an event type could be read

UNKNOWN_TYPE: Final = "(unknown)"
UNDECODABLE_TYPE: Final = "(undecodable)"

_PYTHON_TYPES: Final[dict[str, Any]] = {
    "string": str | None,
    "boolean": bool | None,
    "int": int | None,
    "float": float | None,
    # 254 is Mixpanel's limit for the elements of a list.
    "array<string>": Annotated[list[str], Meta(max_length=254)] | None,
}
_CUSTOM_FIELDS: Final = {
    "": (),
    "event": (CUSTOM_MEMBERS["event"], "name"),
    "purchase": (CUSTOM_MEMBERS["purchase"],),
}
_UTF8_BOM = b"\xef\xbb\xbf"


class User(Struct, gc=False):
    """`user`: what identifies the person. Braze's `user_id` and `timezone` are not forwarded, so not decoded."""

    external_user_id: str | None = None
    device_id: str | None = None


class Event(Struct, gc=False):
    """A Currents event. A subclass a row types `properties`, and knows its code."""

    time: int
    id: str = ""
    user: User = field(default_factory=User)
    properties: Any = None

    code: ClassVar[int]


class Refusal(NamedTuple):
    """An event that can't be forwarded, why, and the bytes it came as."""

    code: int
    event_type: str
    reason: str
    original: bytes


class UnknownEvent(Event, gc=False):
    """An event of a type that the table doesn't have: its properties are what they are."""

    event_type: str = ""
    properties: dict[str, Any] | None = None

    code = UNKNOWN_CODE


class Decoded(Struct, gc=False):
    """What one read or body held."""

    events: list[Event]
    # The bytes of each event of `events`, not yet `bare`; made only when somebody asks: the common case never needs them.
    originals: Callable[[], Sequence[bytes]]
    refusals: list[Refusal]
    unknown: list[tuple[str, UnknownEvent, bytes]]  # event type, event, the bytes it came as


class _EventType(Struct, gc=False):
    event_type: str


class _RawBody(Struct, gc=False):
    events: list[Raw] | None = None
    event_type: Raw = Raw()


class _LoneBody(Struct, gc=False):
    events: tuple[Raw] | None = None


def bare(data: bytes) -> bytes:
    """A line or a body without what may stand around it."""
    return data.removeprefix(_UTF8_BOM).strip()


def properties_struct(row: EventType, own: list[tuple[Any, ...]]) -> type[Struct]:
    """A Struct of a row's properties.

    `own` are the fields that the mapping adds (as for `msgspec.defstruct`): one Struct serves to decode Braze's form and to
    encode Mixpanel's, so that nothing is copied. Absent and null are the same, and neither is encoded.
    """
    taken = {name for name, *_ in own}
    fields = [(name, _PYTHON_TYPES[PROPERTY_TYPES[name]], None) for name in row.properties if name not in taken]
    return msgspec.defstruct("Properties", [*own, *fields], omit_defaults=True, gc=False)


def event_struct(row: EventType, code: int, properties: Any, default: Any) -> type[Event]:
    """A row's `Event`, with its properties typed."""
    struct: Any = msgspec.defstruct(
        "Event",
        [("properties", properties, default)],
        bases=(Event,),
        tag_field="event_type",
        tag=row.event_type,
        gc=False,
        namespace={"code": code},
    )
    return cast("type[Event]", struct)


class Schema:
    """Decoders of everything that a door may be handed. Stateless; none of its methods raises for any input."""

    def __init__(self, rows: Sequence[EventType], structs: Sequence[type[Event]]) -> None:
        event: Any = Union[tuple(structs)]  # noqa: UP007  # a union of a computed number of types
        body: Any = msgspec.defstruct("Body", [("events", list[event])], gc=False)
        self._event = msgspec.json.Decoder(event)
        self._body = msgspec.json.Decoder(body)
        self._raw_body = msgspec.json.Decoder(_RawBody)
        self._raw_array = msgspec.json.Decoder(list[Raw])
        self._lone_body = msgspec.json.Decoder(_LoneBody)
        self._lone_array = msgspec.json.Decoder(tuple[Raw])
        self._event_type = msgspec.json.Decoder(_EventType)
        self._members = msgspec.json.Decoder(dict[str, Raw])
        self._unknown = msgspec.json.Decoder(UnknownEvent)
        self._codes = {row.event_type: code for code, row in enumerate(rows)}
        self._known_fields = {
            code: frozenset((*row.properties, *_CUSTOM_FIELDS[row.custom]))
            for code, row in enumerate(rows)
            if row.properties or row.custom
        }
        self._lenient = {code: dict(_lenient_readers(row)) for code, row in enumerate(rows)}

    def lines(self, lines: Sequence[bytes]) -> Decoded:
        """The events of NDJSON lines, with or without their newlines; blank ones hold none.

        One call a line: no slower than one call for all of them, since nobody has to count the lines then, and a bad
        line costs nothing but itself.
        """
        events: list[Event] = []
        refusals: list[Refusal] = []
        unknown: list[tuple[str, UnknownEvent, bytes]] = []
        bad: list[int] = []
        rest = iter(lines)
        while True:
            try:
                # What was decoded before a bad line stays in the list, and the iterator stands behind that line.
                events.extend(map(self._event.decode, rest))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                at = len(events) + len(bad)
                bad.append(at)
                original = bare(lines[at])
                if not original:
                    continue
                outcome = self._refused(original)
                if isinstance(outcome, UnknownEvent):
                    unknown.append((outcome.event_type, outcome, original))
                elif isinstance(outcome, Refusal):
                    refusals.append(outcome)
                else:
                    bad.pop()
                    events.append(outcome)
            else:
                break
        if not bad:
            return Decoded(events, lambda: lines, refusals, unknown)
        others = frozenset(bad)
        return Decoded(events, lambda: [line for at, line in enumerate(lines) if at not in others], refusals, unknown)

    def plain_body(self, data: bytes) -> Decoded | None:
        """The events of a Custom HTTP body `{"events": [...]}` with nothing odd in it, all at once.

        None: each of its `elements` must be looked at, as a line.
        """
        try:
            events = self._body.decode(data).events
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        if not events:  # a probe; or a lone event with a member of that name, which would be lost
            return None
        return Decoded(events, lambda: self.elements(data) or [], [], [])

    def elements(self, data: bytes) -> Sequence[bytes] | None:
        """The events of a Custom HTTP body as they came; an array or a lone event will do. None: it isn't JSON."""
        data = bare(data)
        if not data:
            return []
        try:
            if data[:1] == b"[":
                return [bytes(raw) for raw in self._raw_array.decode(data)]
            body = self._raw_body.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return scanned(data)
        events = body.events
        if events is None:
            # `{}`, `{"events": null}`: a probe. Any other object is a lone event, or a dead letter.
            return [] if _PROBE.fullmatch(data) else [data]
        if not events and bytes(body.event_type):
            return [data]
        return [bytes(raw) for raw in events]

    def lone(self, data: bytes) -> bytes | None:
        """The one element of a body; None if it has more. Ends at the second. Raises ValueError if no parser takes it."""
        data = bare(data)
        try:
            if data[:1] == b"[":
                return bytes(self._lone_array.decode(data)[0])
            events = self._lone_body.decode(data).events
        except ValidationError:
            return None
        except (msgspec.DecodeError, RecursionError) as error:
            raise ValueError(str(error)) from error
        return data if events is None else bytes(events[0])

    def _refused(self, original: bytes) -> Refusal | UnknownEvent | Event:
        """What became of a line that couldn't be decoded as it was."""
        try:
            event_type = self._event_type.decode(original).event_type
        except ValidationError:
            event_type = ""
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as malformed:
            # msgspec says of it that the input was cut off, if it ends a string.
            problem = _HALF_A_PAIR if _ENDS_IN_HALF_A_PAIR.search(original) else fault(malformed)
            return Refusal(UNDECODABLE_CODE, UNDECODABLE_TYPE, problem, original)
        if not event_type or event_type.isspace():
            return Refusal(UNDECODABLE_CODE, UNDECODABLE_TYPE, _no_event(original), original)
        code = self._codes.get(event_type, UNKNOWN_CODE)
        decode = self._unknown.decode if code == UNKNOWN_CODE else self._event.decode
        error: Exception
        try:
            # A type that the table doesn't have, or a byte order mark that stood before it.
            return cast("Event", decode(original))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as strict:
            error = strict
        # What can't even be read so is told as it was above.
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            lenient = msgspec.json.encode(self._lenient_form(original, code))
            try:
                return cast("Event", decode(lenient))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as ill_typed:
                error = ill_typed
        if code == UNKNOWN_CODE:
            return Refusal(code, event_type[:200], f"unknown event type, and {fault(error)}", original)
        return Refusal(code, event_type, fault(error), original)

    def _lenient_form(self, original: bytes, code: int) -> dict[str, Any]:
        """An event's members, with those in another spelling of the same as we want them. Raises as a decoder does."""
        # Null is as good as absent.
        members = self._members.decode(original).items()
        form: dict[str, Any] = {name: value for name, value in members if bytes(value) != b"null"}
        for name in ("user", "properties"):
            if bytes(form.get(name, b"{"))[:1] != b"{" and _nothing_if_empty(form[name]) is None:
                del form[name]
        if "time" in form:
            form["time"] = _whole_number(form["time"])
        readers = self._lenient.get(code)
        if readers and bytes(form.get("properties", b""))[:1] == b"{":
            properties = self._members.decode(form["properties"])
            others = {name: readers[name](value) for name, value in properties.items() if name in readers}
            form["properties"] = properties | others
        return form

    def unknown_fields(self, code: int, original: bytes) -> list[str]:
        """Properties of an event that its row doesn't have: fields that Braze added since. Never raises."""
        try:
            properties = msgspec.json.decode(bare(original))["properties"]
            known = self._known_fields.get(code)
            return [name for name in properties if known is not None and name not in known]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError):
            return []


def _lenient_readers(row: EventType) -> Iterator[tuple[str, Callable[[Raw], Any]]]:
    """How those of a type's properties are read that may be spelled in another way."""
    by_type = {"int": _whole_number, "array<string>": _without_nulls}
    for name in row.properties:
        if reader := by_type.get(PROPERTY_TYPES[name]):
            yield name, reader
    if row.custom:
        yield CUSTOM_MEMBERS[row.custom], _nothing_if_empty


def _whole_number(raw: Raw) -> Any:
    """3.0 is 3: JSON doesn't tell them apart, and a sender that keeps numbers as doubles may write either. Text is none."""
    value = msgspec.json.decode(raw)
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53 else raw


def _without_nulls(raw: Raw) -> Any:
    value = msgspec.json.decode(raw)
    return [one for one in value if one is not None] if isinstance(value, list) else raw


def _nothing_if_empty(raw: Raw) -> Any:
    """No members, as languages write it that take an empty object for an empty list or text."""
    return None if msgspec.json.decode(raw) in ("", []) else raw


_PLACE = re.compile(r" \(byte \d+\)$")
_HALF_A_PAIR = 'not valid JSON: half of a surrogate pair, as in "\\ud83d": a character that was cut in two'
_ENDS_IN_HALF_A_PAIR = re.compile(rb'\\u[dD][89abAB][0-9a-fA-F]{2}"')
_PROBE = re.compile(rb'\{\s*(?:"events"\s*:\s*null\s*)?\}')
# A string that doesn't end is taken to the end: looking for strings inside it would take quadratic time.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[\]{},]', re.DOTALL)


def fault(error: Exception) -> str:
    """What a decoder complains of. Not at which byte, for that differs by event, and letters are counted by their reason."""
    if isinstance(error, UnicodeDecodeError) or "Invalid UTF-8" in str(error):  # before msgspec 0.23, and since
        return "not valid UTF-8"
    kind = "ill-typed" if isinstance(error, ValidationError | RecursionError) else "not valid JSON"
    return f"{kind}: {_PLACE.sub('', str(error))}"


def _no_event(original: bytes) -> str:
    """Why something without an event_type isn't an event; in a stream or a file, what to do about it."""
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        if msgspec.json.decode(original, type=_RawBody).events:
            return "no event_type: this is a whole request body. Send the elements of its events array, one a line, or POST it"
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        members = msgspec.json.decode(original, type=dict[str, Raw])
        if {"event", "properties"} <= members.keys():
            return "no event_type: this is an event as Mixpanel gets it; bridged replay sends those of an archive"
        if "acks" in members:
            return 'no event_type: what asks the stream door for acks is {"acks":true} as the first line, nothing else'
    return "no event_type: this is not a Currents event"


def scanned(data: bytes) -> list[bytes] | None:
    """The elements of the events array of a body that no parser takes as a whole, by its brackets alone.

    So one element with NaN, a lone surrogate or a thousand brackets costs only itself. None: the brackets don't close,
    or there is more after they did, so that this is no JSON at all. JSON without events is one element: the whole.
    """
    if data[:1] not in (b"{", b"["):
        return [data] if is_json(data) else None
    is_object = data[:1] == b"{"
    depth, start, end = 0, 0, 0
    at_array = -1  # the depth of the array being cut: 1 for a bare array, 2 for {"events": [...]}
    elements: list[bytes] | None = None
    previous = b""
    for match in _TOKEN.finditer(data):
        token = match[0]
        if token in (b"[", b"{"):
            if depth == 0 and end:
                return None
            depth += 1
            is_events = is_object and depth == 2 and _is_events(previous) and data[end : match.start()].strip() == b":"
            if token == b"[" and (depth == 1 or is_events):
                # Of two members called events the last counts, as in every parser.
                at_array, start, elements = depth, match.end(), []
        elif token in (b"]", b"}"):
            if depth == at_array and elements is not None:
                elements.append(data[start : match.start()])
                at_array = -1
            depth -= 1
            if depth < 0:
                return None
        elif token == b"," and depth == at_array and elements is not None:
            elements.append(data[start : match.start()])
            start = match.end()
        previous, end = token, match.end()
    if depth != 0 or end != len(data):
        return None
    return [data] if elements is None else elements


def _is_events(token: bytes) -> bool:
    """Whether a token is the name "events", whatever escapes it is written with."""
    if token[:1] != b'"' or b"\\" not in token:
        return token == b'"events"'
    return is_json(token) and msgspec.json.decode(token) == "events"


def is_json(data: bytes) -> bool:
    """Whether a parser takes it, whatever it says."""
    try:
        msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def iter_types(rows: Sequence[EventType]) -> Iterator[tuple[int, str]]:
    """Every code with the name it is accounted under."""
    for code, row in enumerate(rows):
        yield code, row.event_type
    yield UNKNOWN_CODE, UNKNOWN_TYPE
    yield UNDECODABLE_CODE, UNDECODABLE_TYPE
