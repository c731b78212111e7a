"""From Currents events to Mixpanel events. Pure: `now_s` is an argument.

The properties of an event are decoded into a Struct that also has room for what Mixpanel wants (`distinct_id`, `$insert_id`
...). Mapping sets those in place, and the same Struct is encoded: nothing is copied, and no Python loop visits the properties.

An event that is plain, as nearly all are, costs a few comparisons; only an odd one is looked at closely.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import Raw, Struct, field

from bridged.currents.schema import (
    UNKNOWN_CODE,
    UNKNOWN_TYPE,
    Decoded,
    Event,
    Refusal,
    Schema,
    bare,
    event_struct,
    properties_struct,
)
from bridged.currents.table import (
    CURRENT_PROPERTY_NAMES,
    CUSTOM_EVENT_PREFIX,
    CUSTOM_MEMBERS,
    CUSTOM_PROPERTY_PREFIX,
    PURCHASE_PROPERTY_PREFIX,
    SEED_PROPERTY_NAMES,
    EventType,
)
from bridged.mixpanel import insert_ids, transforms
from bridged.mixpanel.limits import (
    EARLIEST_TIME_S,
    MAX_AHEAD_S,
    MAX_DEPTH,
    MAX_PROPERTIES,
    REFUSED_IDS,
    REFUSED_NAMES,
    is_reserved,
    nested_problem,
    short_name,
)

_NESTED: Final = frozenset({dict, list})
_ODD_VALUES: Final = _NESTED | {type(None)}
# As all reasons without a number that differs by event: such letters are counted by their reason.
_TOO_DEEP: Final = f"nested deeper than {MAX_DEPTH}"
_TOO_MANY: Final = f"more than {MAX_PROPERTIES} properties; Mixpanel takes no more"
# What a time may be in that isn't in seconds, and how many are one.
_UNITS: Final = {"milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
_YEAR_S: Final = 366 * 86400
_NO_USERS: Final = REFUSED_IDS | {None, ""}
# The fields that every Mixpanel event has besides the row's own (contract: the import-events reference).
_ENVELOPE: Final[list[tuple[Any, ...]]] = [
    ("distinct_id", Any, None),
    ("insert_id", Any, field(default=None, name="$insert_id")),
    ("time", Any, None),
    ("ip", Any, None),  # and the constants that follow it: see `_constants`
    ("device_id", Any, None),
]


# From decoded properties with the envelope set in them. Raises Refused.
_Form: TypeAlias = Callable[[Any], Struct]


class MappingSettings(Struct, frozen=True, kw_only=True):
    """What the configuration says about mapping."""

    token: str = ""
    partner_id: str = "braze"
    naming: Literal["seed", "current"] = "seed"
    message_engagement: bool = True
    customer_behavior: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    unknown: Literal["dead_letter", "forward", "skip"] = "dead_letter"
    anonymous: Literal["skip", "device", "dead_letter"] = "skip"
    names: Mapping[str, str] = {}
    # By event type and field: see `transforms`.
    transform: Mapping[str, Mapping[str, Literal["remove", "hash"]]] = {}


class Skip(NamedTuple):
    """An event that isn't forwarded by choice: counted, not kept."""

    code: int
    reason: str


class Mapped(Struct, gc=False):
    """A batch ready to be encoded: `forms[i]` is the Mixpanel event of type `codes[i]`."""

    forms: list[Struct]
    codes: bytes
    skips: list[Skip]
    refusals: list[Refusal]


class Refused(Exception):
    """Raised by a form for an event that Mixpanel would not take; the message is the reason."""


class _NamedForm(Struct, gc=False):
    """A Mixpanel event whose name comes with the event."""

    event: str
    properties: Any


def selected(row: EventType, settings: MappingSettings) -> bool:
    """Whether events of a type are forwarded: exclude wins over include, include over the group."""
    if row.event_type in settings.exclude:
        return False
    return row.event_type in settings.include or getattr(settings, row.group)


def mixpanel_name(row: EventType, settings: MappingSettings) -> str:
    """The event name of a type; for custom events, what comes before the name."""
    name = row.name if settings.naming == "current" else row.seed_name or row.name
    return settings.names.get(row.event_type, CUSTOM_EVENT_PREFIX if row.custom == "event" else name)


class EventMapping:
    """Every event type as configured. Holds no state between calls."""

    def __init__(self, rows: Sequence[EventType], settings: MappingSettings) -> None:
        structs, forms = zip(*(_struct(row, code, settings) for code, row in enumerate(rows)), strict=True)
        self.schema = Schema(rows, structs)
        # By the type of a decoded event: its code, and what makes its properties into what is encoded for Mixpanel.
        self._forms: dict[type[Event], tuple[int, _Form]] = dict(zip(structs, enumerate(forms), strict=True))
        self._constants = _constants(settings)
        self._settings = settings
        self._rows = rows
        self._deselected = frozenset(code for code, row in enumerate(rows) if not selected(row, settings))
        self._by_name = {
            name: code
            for code, row in enumerate(rows)
            for name in (row.name, row.seed_name or row.name, mixpanel_name(row, settings))
        }
        self._prefixes = {
            prefix: code
            for code, row in enumerate(rows)
            if row.custom == "event"
            for prefix in (CUSTOM_EVENT_PREFIX, mixpanel_name(row, settings))
        }
        # Rows whose fields Braze hasn't documented yet: all that comes is forwarded.
        undocumented = {code for code, row in enumerate(rows) if not (row.properties or row.custom)}
        self._special = self._deselected | undocumented

    def type_name(self, code: int) -> str:
        """The event type that a code stands for."""
        return self._rows[code].event_type if code < len(self._rows) else UNKNOWN_TYPE

    def code_of(self, name: str) -> int:
        """The code of the type that an event of this Mixpanel name was made from, in whichever spelling."""
        code = self._by_name.get(name)
        if code is None:
            # A custom event: its type's name is only how it begins.
            begins = (code for prefix, code in self._prefixes.items() if name.startswith(prefix))
            code = next(begins, UNKNOWN_CODE)
        return code

    @property
    def token(self) -> str:
        """The project token that events get; empty: none."""
        return self._settings.token

    def map(self, decoded: Decoded, now_s: float) -> Mapped:
        """The Mixpanel forms of what was decoded. Changes the decoded events in place; never raises for any event."""
        forms: list[Struct] = []
        codes: list[int] = []
        skips: list[Skip] = []
        refusals: list[Refusal] = []
        for refusal in decoded.refusals:
            if unwanted := self._unwanted(refusal.code, refusal.event_type):
                skips.append(Skip(refusal.code, unwanted))
            else:
                refusals.append(refusal)
        originals: Sequence[bytes] = ()
        forms_of, special, constants = self._forms, self._special, self._constants
        latest_s = int(now_s)  # compared with integers, which costs half of what a float does
        plain_ids = insert_ids.are_plain([event.id for event in decoded.events])
        for index, event in enumerate(decoded.events):
            code, form = forms_of[type(event)]
            user, properties = event.user, event.properties
            if (
                user.external_user_id in _NO_USERS
                or not EARLIEST_TIME_S <= event.time <= latest_s
                or code in special
                or not (plain_ids or insert_ids.is_plain(event.id))
            ):
                originals = originals or decoded.originals()
                event_type, original = self._rows[code].event_type, bare(originals[index])
                outcome = (
                    self._whole(event_type, event, original, now_s)
                    if code in special
                    else self._conform(event, code, event_type, original, now_s)
                )
                if outcome is not None:
                    _file(outcome, code, forms, codes, skips, refusals)
                    continue
            properties.distinct_id = user.external_user_id
            properties.insert_id = event.id
            properties.time = event.time
            properties.ip = constants
            properties.device_id = user.device_id or None
            try:
                forms.append(form(properties))
                codes.append(code)
            except (Refused, RecursionError) as error:
                reason = _TOO_DEEP if isinstance(error, RecursionError) else str(error)
                originals = originals or decoded.originals()
                event_type = self._rows[code].event_type
                refusals.append(Refusal(code, event_type, reason, bare(originals[index])))
        for event_type, unknown, original in decoded.unknown:
            outcome = self._whole(event_type, unknown, original, now_s)
            _file(outcome, UNKNOWN_CODE, forms, codes, skips, refusals)
        return Mapped(forms, bytes(codes), skips, refusals)

    def _conform(
        self, event: Event, code: int, event_type: str, original: bytes, now_s: float
    ) -> Skip | Refusal | None:
        """Makes identity, time and id conform, in place. None: the event may be forwarded."""
        user = event.user
        if not user.external_user_id:
            if self._settings.anonymous == "dead_letter":
                return Refusal(code, event_type, "no user.external_user_id", original)
            if self._settings.anonymous == "skip" or not user.device_id:
                return Skip(code, "no external_user_id")
            user.external_user_id = f"{transforms.DEVICE_PREFIX}{user.device_id}"
        elif user.external_user_id in REFUSED_IDS:
            reason = f"user.external_user_id {user.external_user_id!r} is a placeholder that Mixpanel refuses"
            return Refusal(code, event_type, reason, original)
        if event.time > now_s:
            if event.time > now_s + MAX_AHEAD_S:
                ours = datetime.fromtimestamp(now_s, UTC)  # to the hour: such letters are counted by their reason
                reason = (
                    f"time is more than 1 h ahead, our clock says {ours:%Y-%m-%d %H h} UTC{_unit(event.time, now_s)}"
                )
                return Refusal(code, event_type, reason, original)
            # Mixpanel would overwrite it, differently at each try: clamped once, before it is committed.
            event.time = int(now_s)
        elif event.time < EARLIEST_TIME_S:
            return Refusal(code, event_type, "time is before 1971", original)
        if not insert_ids.is_plain(event.id):
            event.id = insert_ids.made(event.id, original)
        return None

    def _whole(self, event_type: str, event: Event, original: bytes, now_s: float) -> Struct | Skip | Refusal:
        """An event of a type that the table doesn't have, or has no fields for: it goes with all its properties, or not."""
        settings, code = self._settings, event.code
        if unwanted := self._unwanted(code, event_type):
            return Skip(code, unwanted)
        if code != UNKNOWN_CODE:
            name = mixpanel_name(self._rows[code], settings)
        elif event_type in settings.include or settings.unknown == "forward":
            name = settings.names.get(event_type) or derived_name(event_type)
        else:
            return Refusal(code, event_type[:200], "unknown event type", original)
        if name in REFUSED_NAMES:
            return Refusal(code, event_type[:200], f"an event called {name}: Mixpanel refuses it", original)
        rules = settings.transform.get(event_type, {})
        event_type = event_type[:200]
        outcome = self._conform(event, code, event_type, original, now_s)
        if outcome is not None:
            return outcome
        own, user = event.properties or {}, event.user
        try:
            # By the names that they came under, and before ours are among them: a rule for `ip` means the event's own.
            transforms.in_place(own, rules)
        except RecursionError:
            return Refusal(code, event_type, _TOO_DEEP, original)
        user.external_user_id = transforms.identity(user.external_user_id, user.device_id, rules)
        if user.device_id and "device_id" in rules:
            user.device_id = transforms.transformed(user.device_id, rules["device_id"])
        envelope = self._envelope(event)
        properties = open_properties(own, envelope) | envelope
        # Of what the rules leave: they may remove what Mixpanel would refuse.
        if problem := _properties_problem(properties):
            return Refusal(code, event_type, problem, original)
        return _NamedForm(name, properties)

    def _unwanted(self, code: int, event_type: str) -> str:
        """Why events of a type are skipped, whatever is in them; empty: they aren't."""
        settings = self._settings
        if code != UNKNOWN_CODE:
            return "not selected" if code in self._deselected else ""
        if event_type in settings.exclude:
            return "not selected"
        return "unknown event type" if settings.unknown == "skip" and event_type not in settings.include else ""

    def _envelope(self, event: Event) -> dict[str, Any]:
        """What Mixpanel wants of every event, as `_ENVELOPE` and the constants have it for the others."""
        user, settings = event.user, self._settings
        members = {"distinct_id": user.external_user_id, "$insert_id": event.id, "time": event.time, "ip": 0}
        optional = {"token": settings.token, "$partner_id": settings.partner_id, "device_id": user.device_id}
        return members | {key: value for key, value in optional.items() if value}


def _file(
    outcome: Struct | Skip | Refusal,
    code: int,
    forms: list[Struct],
    codes: list[int],
    skips: list[Skip],
    refusals: list[Refusal],
) -> None:
    """Puts what became of an odd event where it belongs."""
    if isinstance(outcome, Skip):
        skips.append(outcome)
    elif isinstance(outcome, Refusal):
        refusals.append(outcome)
    else:
        forms.append(outcome)
        codes.append(code)


def _unit(time: int, now_s: float) -> str:
    """What a time looks like that can't be in seconds: in this unit it would lie in the past, or little ahead."""
    for unit, in_one_s in _UNITS.items():
        if EARLIEST_TIME_S * in_one_s <= time <= (int(now_s) + _YEAR_S) * in_one_s:
            return f"; it looks like {unit}, Currents sends seconds"
    return ""


def derived_name(event_type: str) -> str:
    """A Mixpanel name for a type that the table doesn't have: `users.messages.fax.SendLate` -> `Fax Send Late`."""
    words = [part for part in re.split(r"[.\s_]+", event_type) if part not in ("users", "messages", "behaviors", "")]
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", " ".join(words)) or event_type
    return " ".join(word[:1].upper() + word[1:] for word in spaced.split(" "))


def open_properties(properties: dict[str, Any], envelope: Mapping[str, Any]) -> dict[str, Any]:
    """The properties of an event whose fields aren't documented: all of them, but none that Mixpanel would act upon, nor one
    that its `envelope` has.

    Spelled as those of types that came after the seed page.
    """
    return {_open_name(name, properties, envelope): value for name, value in properties.items() if value is not None}


def _open_name(name: str, beside: Mapping[str, Any], envelope: Mapping[str, Any]) -> str:
    spelled = CURRENT_PROPERTY_NAMES.get(name, name)
    if spelled != name and spelled not in beside:
        return spelled
    if name in envelope or is_reserved(name):
        name = f"braze_{name}"
        while name in beside:
            name = f"braze_{name}"
    return name


def _properties_problem(properties: Mapping[str, Any]) -> str | None:
    if len(properties) > MAX_PROPERTIES:
        return _TOO_MANY
    for name, value in properties.items():
        if value.__class__ in (dict, list) and (problem := nested_problem(value)):
            return f"property {short_name(name)!r} is {problem}"
    return None


def _struct(row: EventType, code: int, settings: MappingSettings) -> tuple[type[Event], _Form]:
    """A row's Event, as configured, and its form."""
    if not (row.properties or row.custom):
        # What comes is forwarded as it is; so its transformations are made in `_whole`.
        return event_struct(row, code, dict[str, Any] | None, None), partial(_NamedForm, "")
    current = settings.naming == "current" or row.seed_name is None
    spelling = CURRENT_PROPERTY_NAMES if current else SEED_PROPERTY_NAMES
    renames = {name: spelling[name] for name in row.properties if name in spelling}
    name, rules = mixpanel_name(row, settings), settings.transform.get(row.event_type)
    own = [*_ENVELOPE, *((f"renamed_{old}", Any, field(default=None, name=new)) for old, new in renames.items())]
    if row.custom:
        own.append(("custom", dict[str, Any] | None, field(default=None, name=CUSTOM_MEMBERS[row.custom])))
        own += [("name", str | None, None)] if row.custom == "event" else []
    properties = properties_struct(row, own)
    form: _Form
    if row.custom:
        form = _custom_form(row.custom, name, len(properties.__struct_fields__), settings)
        form = transforms.of_custom(form, rules) if rules else form
    else:
        form = msgspec.defstruct("Form", [("properties", Any)], tag_field="event", tag=name, gc=False)
    if renames:
        form = _renaming([(old, f"renamed_{old}") for old in renames], form)
    if rules:
        form = transforms.of_struct(form, rules, row.properties)
    return event_struct(row, code, properties, field(default_factory=properties)), form


def _constants(settings: MappingSettings) -> Raw:
    """`ip`, and behind it the other members that are the same for every event, encoded once: msgspec writes a Raw as it is."""
    members = {"token": settings.token, "$partner_id": settings.partner_id}
    others = msgspec.json.encode({key: value for key, value in members.items() if value})[1:-1]
    return Raw(b"0," + others if others else b"0")


def _renaming(renames: list[tuple[str, str]], form: _Form) -> _Form:
    def renamed(properties: Any) -> Struct:
        for old, new in renames:
            setattr(properties, new, getattr(properties, old))
            setattr(properties, old, None)
        return form(properties)

    return renamed


def _custom_form(custom: str, name: str, fields: int, settings: MappingSettings) -> _Form:
    """The form of a type that carries properties of the customer's own: they get a prefix, their values stay.

    They are encoded by themselves, and follow the constants.
    """
    is_event = custom == "event"
    prefixes = _Prefixes(CUSTOM_PROPERTY_PREFIX if is_event else PURCHASE_PROPERTY_PREFIX)
    constants = bytes(_constants(settings))
    encode = msgspec.json.Encoder().encode
    others = bool(settings.token) + bool(settings.partner_id)
    surely_few = MAX_PROPERTIES - fields - others

    def form(properties: Any) -> Struct:
        event_name = name
        if is_event:
            if not properties.name or properties.name.isspace():
                raise Refused("properties.name, the custom event's name, is missing or blank")
            event_name += properties.name
            properties.name = None
        own, properties.custom = properties.custom, None
        prefixed = {}
        for key, value in (own or {}).items():
            if value.__class__ in _ODD_VALUES:
                if value is None:
                    continue
                if problem := nested_problem(value):
                    raise Refused(f"property {short_name(key)!r} is {problem}")
            prefixed[prefixes[key]] = value
        if prefixed:
            if len(prefixed) > surely_few:
                documented = [getattr(properties, each) for each in properties.__struct_fields__]
                count = len(prefixed) + others + len(documented) - documented.count(None)
                if count > MAX_PROPERTIES:
                    raise Refused(_TOO_MANY)
            properties.ip = Raw(constants + b"," + encode(prefixed)[1:-1])
        return _NamedForm(event_name, properties)

    return form


class _Prefixes(dict[str, str]):
    """A property's name with its prefix; remembers the names of the customer's properties, which are few."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def __missing__(self, name: str) -> str:
        prefixed = self._prefix + name
        if len(self) < 4096 and len(name) < 256:
            self[name] = prefixed
        return prefixed
