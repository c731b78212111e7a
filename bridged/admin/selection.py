"""What the settings say about each event type, for the page: selection, name, transformed fields. Pure."""

from typing import Any, Final

from msgspec import Struct

from bridged.currents.table import EVENT_TYPES, PROPERTY_TYPES, EventType
from bridged.event_rules import HASHABLE
from bridged.mixpanel.mapping import MappingSettings, mixpanel_name, selected
from bridged.mixpanel.transforms import USER_FIELDS

ROWS: Final = {row.event_type: row for row in EVENT_TYPES}
TITLES: Final = {"message_engagement": "Message engagement events", "customer_behavior": "Customer behavior events"}


class Field(Struct):
    """A field that Braze documents for a type."""

    field: str
    type: str
    hashable: bool  # what is no text can be removed only


class UnknownSeen(Struct):
    """A field that the table doesn't have; `seen` in samples, since the start."""

    field: str
    seen: int


class TypeView(Struct, kw_only=True):
    """An event type as the page shows it."""

    event_type: str
    group: str
    name: str  # Mixpanel's event name in force; of custom events what it begins with
    default_name: str
    renamed: bool
    selected: bool
    later: bool  # it came after the seed page
    custom: str  # event | purchase: it has properties of the customer's own
    fields: list[Field]
    transform: dict[str, str]
    counts: dict[str, int]
    unknown_fields: list[UnknownSeen]


def view(row: EventType, settings: MappingSettings, counts: dict[str, int], unknown: list[UnknownSeen]) -> TypeView:
    """One type."""
    default = mixpanel_name(row, _without_names(settings))
    name = mixpanel_name(row, settings)
    return TypeView(
        event_type=row.event_type,
        group=row.group,
        name=name,
        default_name=default,
        renamed=row.event_type in settings.names,
        selected=selected(row, settings),
        later=row.seed_name is None,
        custom=row.custom,
        fields=fields_of(row),
        transform=dict(settings.transform.get(row.event_type, {})),
        counts=counts,
        unknown_fields=unknown,
    )


def fields_of(row: EventType) -> list[Field]:
    """Its fields, the user's first."""
    own = [Field(name, "string", hashable=True) for name in USER_FIELDS]
    return own + [
        Field(name, PROPERTY_TYPES[name], hashable=PROPERTY_TYPES[name] in HASHABLE) for name in row.properties
    ]


def _without_names(settings: MappingSettings) -> MappingSettings:
    return MappingSettings(naming=settings.naming)


def with_selected(row: EventType, settings: MappingSettings, wanted: bool) -> dict[str, Any]:
    """The lists of [events] by which a type is forwarded, or not; the others stay as they are."""
    include = tuple(name for name in settings.include if name != row.event_type)
    exclude = tuple(name for name in settings.exclude if name != row.event_type)
    if wanted != getattr(settings, row.group):
        if wanted:
            include = (*include, row.event_type)
        else:
            exclude = (*exclude, row.event_type)
    return {"events.include": list(include), "events.exclude": list(exclude)}
