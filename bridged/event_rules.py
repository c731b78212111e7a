"""What [events] may name: event types that there are, fields that they have, names that Mixpanel takes. Pure.

A slip there would be silent, and what was to be left out, removed or hashed would leave in plain: so it is an error, at the
start and at a reload. A type that the table doesn't have may be meant, since Braze adds some: then it is in `include`, or all
such types are forwarded.
"""

import difflib
from collections.abc import Iterator
from typing import Final

from bridged.currents.table import EVENT_TYPES, PROPERTY_TYPES, EventType
from bridged.mixpanel.limits import REFUSED_NAMES
from bridged.mixpanel.transforms import OWN_PREFIX, USER_FIELDS
from bridged.settings import Events

HASHABLE: Final = ("string", "array<string>")
_ROWS: Final = {row.event_type: row for row in EVENT_TYPES}
_MAX_NAME: Final = 255
# Of two parts between dots: so much alike, one is the other misspelt (Sned, Sent: Send; but not fax: sms, rcs: sms).
_MISSPELT: Final = 0.7


def problems(events: Events) -> Iterator[str]:
    """What is wrong, each with its key."""
    named = {"include": events.include, "exclude": events.exclude, "names": events.names, "transform": events.transform}
    for key, names in named.items():
        for name in names:
            if name in _ROWS:
                continue
            if meant := _meant(name):
                yield f"events.{key}: no event type {name!r}; did you mean {meant!r}?"
            elif key != "include" and name not in events.include and events.unknown != "forward":
                yield f"events.{key}: no event type {name!r}; if Braze has it, put it into events.include as well"
    for event_type, name in events.names.items():
        if problem := _name_problem(_ROWS.get(event_type), name):
            yield f"events.names: {event_type} {problem}"
    for event_type, rules in events.transform.items():
        for field, rule in rules.items():
            if problem := _rule_problem(_ROWS.get(event_type), field, rule):
                yield f"events.transform: {event_type}: {field!r} {problem}"


def unknown_included(events: Events) -> list[str]:
    """Types that are included although the table doesn't have them."""
    return [name for name in events.include if name not in _ROWS]


def _meant(name: str) -> str:
    """The type of the table that a name is a misspelling of; empty: of none."""
    ours = name.lower().split(".")
    for near in difflib.get_close_matches(name, _ROWS, 5, 0.8):
        theirs = near.lower().split(".")
        if len(ours) != len(theirs) or all(
            difflib.SequenceMatcher(None, *pair).ratio() >= _MISSPELT for pair in zip(ours, theirs, strict=True)
        ):
            return near
    return ""


def _name_problem(row: EventType | None, name: str) -> str:
    if not name.strip():
        return "has a blank name"
    if len(name) > _MAX_NAME:
        return f"has a name of more than {_MAX_NAME} characters"
    if name in REFUSED_NAMES:
        return f"is called {name!r}, for which Mixpanel refuses the whole request"
    if row is None or row.custom != "event":
        return ""
    # Of custom events: what their own names are put behind.
    if name.startswith("$"):
        return f"gets {name!r} before each custom event's name, and Mixpanel refuses names such as $identify: without $"
    if name[-1].isalnum():
        return f'gets {name!r} before each custom event\'s name, as in "{name}signed_up": write "{name} ", with a blank'
    return ""


def _rule_problem(row: EventType | None, name: str, rule: str) -> str:
    if name == "external_user_id":
        return "" if rule == "hash" else "can be hashed only: removed, all people would be one"
    if name in USER_FIELDS:
        return ""
    if row is None or not (row.properties or row.custom):
        # Its fields aren't documented: any may be there, by its own name.
        return f"is written {name.removeprefix(OWN_PREFIX)!r} here" if name.startswith(OWN_PREFIX) else ""
    if name.startswith(OWN_PREFIX) and row.custom:
        return "" if len(name) > len(OWN_PREFIX) else "names no property"
    if name not in row.properties:
        near = difflib.get_close_matches(name, row.properties, 1)
        return "is no field of it" + (f"; did you mean {near[0]!r}?" if near else "")
    kind = PROPERTY_TYPES[name]
    if rule == "hash" and kind not in HASHABLE:
        return f'is of type {kind}: only text can be hashed; "remove" takes anything'
    return ""
