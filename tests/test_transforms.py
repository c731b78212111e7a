"""Field transformations: what Mixpanel gets instead of a value, type by type, and that the others are as without any."""

import functools
import hashlib
import random

import msgspec
import pytest
from conftest import currents
from hypothesis import given as tries
from hypothesis import settings
from hypothesis import strategies as st

from bridged.currents.examples import example_event
from bridged.currents.table import EVENT_TYPES, PROPERTY_TYPES
from bridged.mixpanel.mapping import EventMapping, MappingSettings
from bridged.mixpanel.transforms import REMOVED, hashed

NOW = 1_763_900_000


@functools.lru_cache(maxsize=64)
def mapping_of(given_):
    """Made once for the same settings, which are JSON: it takes a while."""
    return EventMapping(EVENT_TYPES, MappingSettings(token="t", **msgspec.json.decode(given_)))


def mapped(event, **given_):
    """An event's Mixpanel form, as it is sent."""
    mapping = mapping_of(msgspec.json.encode(given_))
    found = mapping.map(mapping.schema.lines([msgspec.json.encode(event)]), NOW)
    assert found.refusals == []
    [form] = found.forms
    return msgspec.json.decode(msgspec.json.encode(form))


def test_the_words():
    """The two that Braze offers, to the letter: a hash is the same everywhere, so that tables can still be joined."""
    assert hashed("ada@example.com") == hashlib.sha256(b"ada@example.com").hexdigest()
    assert hashed("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert hashed("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert REMOVED == "[REDACTED]"


GOLDEN = [
    # Of a type with fields of its own.
    (
        "users.messages.email.Send",
        {"email_address": "hash", "campaign_name": "remove"},
        {"properties": {"email_address": "abc", "campaign_name": "Spring", "campaign_id": "c1"}},
        {"email_address": hashed("abc"), "campaign_name": REMOVED, "campaign_id": "c1"},
    ),
    # What is called otherwise at Mixpanel is named as Braze names it.
    (
        "users.behaviors.app.SessionStart",
        {"device_model": "hash"},
        {"properties": {"device_model": "abc", "platform": "ios"}},
        {"device_model": hashed("abc"), "platform": "ios"},
    ),
    # What is no text can be removed, as at Braze: where somebody was.
    (
        "users.behaviors.Location",
        {"latitude": "remove", "longitude": "remove", "ad_tracking_enabled": "remove"},
        {"properties": {"latitude": 45.76, "longitude": 0.0, "ad_tracking_enabled": False, "altitude": 170.0}},
        {"latitude": REMOVED, "longitude": REMOVED, "ad_tracking_enabled": REMOVED, "altitude": 170.0},
    ),
    # Null and absent stay so.
    (
        "users.messages.email.Send",
        {"email_address": "hash", "campaign_name": "remove"},
        {"properties": {"email_address": None, "campaign_id": "c1"}},
        {"campaign_id": "c1"},
    ),
    # The person and the device.
    (
        "users.messages.email.Send",
        {"external_user_id": "hash", "device_id": "remove"},
        {"user": {"external_user_id": "abc", "device_id": "d"}, "properties": {}},
        {"distinct_id": hashed("abc"), "device_id": REMOVED},
    ),
    # The customer's own.
    (
        "users.behaviors.CustomEvent",
        {"properties.coupon": "hash", "properties.note": "remove", "properties.tags": "hash", "properties.n": "hash"},
        {
            "properties": {
                "name": "bought",
                "custom_properties": {
                    "coupon": "abc",
                    "note": "x",
                    "tags": ["abc", ""],
                    "n": 1,
                    "kept": "k",
                    "no": None,
                },
            }
        },
        {
            "[Custom event property] coupon": hashed("abc"),
            "[Custom event property] note": REMOVED,
            "[Custom event property] tags": [hashed("abc"), hashed("")],
            "[Custom event property] n": hashed("1"),
            "[Custom event property] kept": "k",
        },
    ),
    (
        "users.behaviors.Purchase",
        {"product_id": "hash", "properties.gift": "remove", "external_user_id": "hash", "device_id": "hash"},
        {
            "user": {"external_user_id": "abc", "device_id": "abc"},
            "properties": {
                "product_id": "abc",
                "price": 1.5,
                "purchase_properties": {"gift": "for Ada", "device_id": "own"},
            },
        },
        {
            "productId": hashed("abc"),
            "price": 1.5,
            "[Purchase property] gift": REMOVED,
            "[Purchase property] device_id": "own",
            "distinct_id": hashed("abc"),
            "device_id": hashed("abc"),
        },
    ),
]


@pytest.mark.parametrize(("event_type", "rules", "changes", "expected"), GOLDEN)
def test_golden(event_type, rules, changes, expected):
    """What is named is transformed, nothing else, and the plain value is nowhere in what is sent."""
    event = currents(event_type) | {"time": NOW - 9, "id": "0f8fad5b-d9cb-469f-a165-70867728950e"} | changes
    sent = mapped(event, transform={event_type: rules})["properties"]
    plain = mapped(event)["properties"]
    assert {name: sent[name] for name in expected} == expected
    assert {name for name in sent if sent[name] != plain[name]} <= set(expected)
    assert sent.keys() == plain.keys()


@pytest.mark.parametrize("rule", ["remove", "hash"])
@pytest.mark.parametrize("value", [{"ada@x.com": [1, {"k": "v"}], "n": None}, [{"ada@x.com": True}], {"ada@x.com": {}}])
def test_nothing_of_an_object_is_left(rule, value):
    """Its names may be as telling as its values, and so may how many there are: it is one value, and goes as one."""
    event = currents("users.behaviors.CustomEvent") | {"time": NOW - 9}
    event["properties"] = {"name": "n", "custom_properties": {"secret": value, "kept": value}}
    sent = mapped(event, transform={"users.behaviors.CustomEvent": {"properties.secret": rule}})["properties"]
    assert sent["[Custom event property] kept"] == value
    found = sent["[Custom event property] secret"]
    assert "ada" not in str(found)
    if rule == "remove":
        assert found == REMOVED
    else:
        text = msgspec.json.encode(value[0] if isinstance(value, list) else value, order="sorted").decode()
        assert found == ([hashed(text)] if isinstance(value, list) else hashed(text))


def test_a_list_is_removed_whole():
    """As all that is removed; hashed it keeps its elements, each of which stays recognisable."""
    event = currents("users.behaviors.CustomEvent") | {"time": NOW - 9}
    event["properties"] = {"name": "n", "custom_properties": {"tags": ["a", "b"]}}
    sent = mapped(event, transform={"users.behaviors.CustomEvent": {"properties.tags": "remove"}})["properties"]
    assert sent["[Custom event property] tags"] == REMOVED


def test_an_anonymous_user_is_a_device():
    """With `anonymous = "device"` the id of the device is in the distinct_id: its rule holds there, too, always as a hash."""
    event = currents("users.messages.email.Send") | {"time": NOW - 9, "user": {"device_id": "abc"}}
    for rule, device in (("hash", hashed("abc")), ("remove", REMOVED)):
        rules = {"users.messages.email.Send": {"device_id": rule}}
        sent = mapped(event, transform=rules, anonymous="device")["properties"]
        assert (sent["distinct_id"], sent["device_id"]) == (f"$device:{hashed('abc')}", device)
    rules = {"users.messages.email.Send": {"external_user_id": "hash"}}
    assert mapped(event, transform=rules, anonymous="device")["properties"]["distinct_id"] == "$device:abc"


def test_types_without_documented_fields():
    """Types that the table doesn't know, and those of which Braze has documented no fields, forward all: by the same rules."""
    undocumented = [row.event_type for row in EVENT_TYPES if not (row.properties or row.custom)]
    for event_type in [*undocumented, "users.messages.fax.Send"]:
        event = {
            "event_type": event_type,
            "id": "0f8fad5b-d9cb-469f-a165-70867728950e",
            "time": NOW - 9,
            "user": {"external_user_id": "abc"},
            "properties": {"number": "abc", "pages": 3},
        }
        rules = {event_type: {"number": "hash", "external_user_id": "hash"}}
        sent = mapped(event, transform=rules, unknown="forward")["properties"]
        assert (sent["number"], sent["pages"], sent["distinct_id"]) == (hashed("abc"), 3, hashed("abc"))


def test_every_field_of_every_type():
    """Each text of each type can be hashed, all at once; and with rules for other types only, each is the very same."""
    texts = {
        row.event_type: {name: "hash" for name in row.properties if PROPERTY_TYPES[name] in ("string", "array<string>")}
        for row in EVENT_TYPES
    }
    halves = [dict(list(texts.items())[at::2]) for at in (0, 1)]
    for row in EVENT_TYPES:
        event = example_event(row, random.Random(7), NOW - 60, every_property=True)
        plain = mapped(event)["properties"]
        sent = mapped(event, transform=texts)["properties"]
        changed = {name for name in plain if plain[name] != sent[name]}
        there = [name for name in texts[row.event_type] if event["properties"].get(name) is not None]
        assert len(changed) == len(there), row.event_type
        others = next(half for half in halves if row.event_type not in half)
        assert mapped(event, transform=others)["properties"] == plain


@tries(st.text(max_size=20), st.sampled_from(["hash", "remove"]))
@settings(deadline=None)
def test_any_text(value, rule):
    """Whatever the text: it is mapped, and not to be found in what is sent."""
    event = currents("users.behaviors.CustomEvent") | {"time": NOW - 9}
    event["properties"] = {"name": "n", "custom_properties": {"secret": f"<{value}>"}}
    sent = mapped(event, transform={"users.behaviors.CustomEvent": {"properties.secret": rule}})
    expected = REMOVED if rule == "remove" else hashed(f"<{value}>")
    assert sent["properties"]["[Custom event property] secret"] == expected


def test_without_rules_nothing_is_wrapped():
    """The hot path of a type without a rule is the very form that it was."""
    with_rule = EventMapping(
        EVENT_TYPES, MappingSettings(transform={"users.messages.email.Send": {"email_address": "hash"}})
    )
    codes = {row.event_type: code for code, row in enumerate(EVENT_TYPES)}
    by_code = dict(with_rule._forms.values())
    names = {name: getattr(by_code[code], "__qualname__", "") for name, code in codes.items()}
    assert [name for name, form in names.items() if "transforming" in form] == ["users.messages.email.Send"]


OPEN_TYPES = ["users.messages.landingpage.Click", "users.messages.survey.Response", "users.messages.fax.Send"]
ENVELOPE = ("ip", "time", "token", "distinct_id", "$insert_id", "$partner_id")


def open_event(event_type, properties):
    """An event of a type whose fields nobody has documented."""
    return {
        "event_type": event_type,
        "id": "0f8fad5b-d9cb-469f-a165-70867728950e",
        "time": NOW - 9,
        "user": {"external_user_id": "ada", "device_id": "abc"},
        "properties": properties,
    }


@pytest.mark.parametrize("event_type", OPEN_TYPES)
def test_what_we_put_beside_undocumented_fields_stays(event_type):
    """A rule means what came from Braze: `ip`, `time` of the envelope were redacted, so that the event was refused for good, and
    `distinct_id` made one person of all; while the event's own `ip`, which is sent as `braze_ip`, was sent in plain.
    """
    own = dict.fromkeys((*ENVELOPE, "alias", "$user_id", "mail"), "plain")
    rules = {event_type: dict.fromkeys(own, "remove")}
    sent = mapped(open_event(event_type, own), transform=rules, unknown="forward")["properties"]
    assert "plain" not in sent.values()
    assert (sent["braze_ip"], sent["braze_alias"], sent["mail"]) == (REMOVED,) * 3
    ours = mapped(open_event(event_type, {}), unknown="forward")["properties"]
    assert {name: sent[name] for name in ours} == ours
    assert (ours["distinct_id"], ours["time"], ours["ip"]) == ("ada", NOW - 9, 0)


@pytest.mark.parametrize("event_type", OPEN_TYPES)
def test_person_and_device_of_undocumented_types(event_type):
    """Of the envelope these two are transformed, as of documented types; a property of the same name is, too."""
    rules = {event_type: {"external_user_id": "hash", "device_id": "remove"}}
    event = open_event(event_type, {"device_id": "plain", "external_user_id": "plain"})
    sent = mapped(event, transform=rules, unknown="forward")["properties"]
    assert (sent["distinct_id"], sent["device_id"]) == (hashed("ada"), REMOVED)
    assert "plain" not in sent.values()
    event["user"] = {"device_id": "abc"}
    sent = mapped(event, transform=rules, unknown="forward", anonymous="device")["properties"]
    assert (sent["distinct_id"], sent["device_id"]) == (f"$device:{hashed('abc')}", REMOVED)


@pytest.mark.parametrize("depth", [11, 900])
@pytest.mark.parametrize("event_type", [*OPEN_TYPES, "users.behaviors.CustomEvent"])
def test_what_the_rules_take_away_can_be_too_deep(event_type, depth):
    """What is left decides whether Mixpanel takes an event: of every type `remove` saves one whose removed value it would refuse."""
    deep = functools.reduce(lambda inner, _: [inner], range(depth), "x")
    event, rule, name = open_event(event_type, {"blob": deep}), "blob", "blob"
    if event_type == "users.behaviors.CustomEvent":
        event["properties"] = {"name": "n", "custom_properties": event["properties"]}
        rule, name = "properties.blob", "[Custom event property] blob"
    sent = mapped(event, transform={event_type: {rule: "remove"}}, unknown="forward")["properties"]
    assert sent[name] == REMOVED


@pytest.mark.parametrize("event_type", OPEN_TYPES)
def test_what_is_too_deep_to_be_hashed_is_refused(event_type):
    """As one that is too deep to be sent, whatever the depth that this Python can walk: with its reason, and nobody fails on it."""
    mapping = mapping_of(msgspec.json.encode({"transform": {event_type: {"blob": "hash"}}, "unknown": "forward"}))
    for depth in (50, 300, 600, 900):
        # Of a list each element is hashed: what is too deep stands within an object.
        blob = functools.reduce(lambda inner, _: {"a": inner}, range(depth), "x")
        found = mapping.map(mapping.schema.lines([msgspec.json.encode(open_event(event_type, {"blob": [blob]}))]), NOW)
        assert len(found.forms) + len(found.refusals) == 1
        assert all("nested deeper" in refusal.reason for refusal in found.refusals)


def test_a_long_name_of_a_type_has_its_rules():
    """The name is cut for the books, and was looked up by what was left of it."""
    event_type = f"users.messages.{'fax' * 80}.Send"
    rules = {event_type: {"mail": "remove"}}
    sent = mapped(open_event(event_type, {"mail": "plain"}), transform=rules, unknown="forward")["properties"]
    assert sent["mail"] == REMOVED


@pytest.mark.parametrize("event_type", ["users.messages.email.Send", "users.behaviors.CustomEvent"])
def test_what_we_put_beside_documented_fields_stays(event_type):
    """A rule that names no field of the type does nothing: `ip` took the token and $partner_id along, `time` was lost."""
    names = (
        *ENVELOPE,
        "insert_id",
        "custom",
        "name",
        "custom_properties",
        "renamed_product_id",
        "properties",
        "__class__",
    )
    event = currents(event_type) | {"time": NOW - 9}
    rules = {event_type: dict.fromkeys(names, "remove")}
    assert mapped(event, transform=rules) == mapped(event)


@pytest.mark.parametrize("event_type", ["users.messages.email.Send", *OPEN_TYPES])
def test_a_user_whose_id_looks_like_that_of_a_device(event_type):
    """It is a user's all the same, and hashed by the user's rule: it was sent in plain."""
    event = open_event(event_type, {}) | {"user": {"external_user_id": "$device:ada", "device_id": "abc"}}
    for rules in ({"external_user_id": "hash"}, {"external_user_id": "hash", "device_id": "hash"}):
        sent = mapped(event, transform={event_type: rules}, unknown="forward", anonymous="device")["properties"]
        assert sent["distinct_id"] == hashed("$device:ada")
    sent = mapped(event, transform={event_type: {"device_id": "hash"}}, unknown="forward")["properties"]
    assert (sent["distinct_id"], sent["device_id"]) == ("$device:ada", hashed("abc"))
