"""Fields that Mixpanel doesn't get as they are, as Braze offers it for its own connectors: [events.transform]. Pure.

    remove   the value becomes the string "[REDACTED]"
    hash     the value becomes its SHA-256 in hex, of its UTF-8, without a salt: the same value stays recognisable

Removed can be anything, and goes whole. Of a list each element is hashed; of an object its JSON, with its names in order, of a
number or a yes or no what JSON has for it. What is absent or null stays so. A field is named as
Braze names it; "external_user_id" is the user's (and so `distinct_id`), "device_id" the device's, "properties.NAME" a property
of a custom event or a purchase.

Only the forms of types with a rule are wrapped: the others cost nothing. What is refused before it is mapped is kept as a
dead letter as it came, with the plain values, or it could not be tried again; purge it if that must not be. What Mixpanel
refuses, what waits and what is archived was mapped, and so transformed.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, Literal

REMOVED: Final = "[REDACTED]"
OWN_PREFIX: Final = "properties."
# Of the event's user.
USER_FIELDS: Final = ("external_user_id", "device_id")
# How an anonymous user's `distinct_id` begins.
DEVICE_PREFIX: Final = "$device:"

Rule = Literal["remove", "hash"]
Rules = Mapping[str, Rule]


def hashed(value: str) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()


def transformed(value: Any, rule: Rule) -> Any:
    """What is sent in a value's place."""
    if value is None:
        return None
    if rule == "remove":
        return REMOVED
    if isinstance(value, str):
        return hashed(value)
    if isinstance(value, list):
        return [transformed(one, rule) for one in value]
    # A number of the customer's own can be as telling as a string, and so can an object's names, and how many there are.
    return hashed(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


def identity(value: str | None, device_id: str | None, rules: Rules) -> str | None:
    """A `distinct_id`, of a user or of the event's device. It is hashed, whatever the rule: "[REDACTED]" would make one person
    of all.
    """
    if value is None:
        return None
    # Not by its beginning alone: a user's id may look like that of a device.
    if device_id and value == f"{DEVICE_PREFIX}{device_id}":
        return f"{DEVICE_PREFIX}{hashed(device_id)}" if "device_id" in rules else value
    return hashed(value) if "external_user_id" in rules else value


def of_struct(form: Callable[[Any], Any], rules: Rules, fields: Collection[str]) -> Callable[[Any], Any]:
    """A form of decoded properties, which first transforms the identity, the device and those of its `fields` with a rule."""
    named = [(name, rule) for name, rule in rules.items() if name == "device_id" or name in fields]

    def transforming(properties: Any) -> Any:
        properties.distinct_id = identity(properties.distinct_id, properties.device_id, rules)
        for name, rule in named:
            value = getattr(properties, name, None)
            if value is not None:
                setattr(properties, name, transformed(value, rule))
        return form(properties)

    return transforming


def of_custom(form: Callable[[Any], Any], rules: Rules) -> Callable[[Any], Any]:
    """The same for properties of the customer's own; the others are those of `of_struct`."""
    own = {name.removeprefix(OWN_PREFIX): rule for name, rule in rules.items() if name.startswith(OWN_PREFIX)}

    def transforming(properties: Any) -> Any:
        if properties.custom:
            in_place(properties.custom, own)
        return form(properties)

    return transforming


def in_place(properties: dict[str, Any], rules: Rules) -> None:
    """Transforms the members of an object that a rule names."""
    for name, rule in rules.items():
        if properties.get(name) is not None:
            properties[name] = transformed(properties[name], rule)
