"""The table of event types: complete, without slips, and in step with tests/samples."""

import json
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from bridged.currents import table
from bridged.currents.table import (
    CURRENT_PROPERTY_NAMES,
    CUSTOM_EVENT_PREFIX,
    EVENT_TYPES,
    MTU_EXEMPT,
    PROPERTY_TYPES,
    SEED_PROPERTY_NAMES,
    EventType,
    check,
)

SAMPLES = Path(__file__).parent / "samples"
SEED = [row for row in EVENT_TYPES if row.seed_name is not None]
LATER = [row for row in EVENT_TYPES if row.seed_name is None]
CUSTOMER_MADE = {"": set(), "event": {"name", "custom_properties"}, "purchase": {"purchase_properties"}}

every_row = pytest.mark.parametrize("row", EVENT_TYPES, ids=lambda row: row.event_type)


def sample(row: EventType) -> Any:
    """Return the golden of a type: the Currents event, and the Mixpanel event in both namings."""
    return json.loads((SAMPLES / f"{row.event_type}.json").read_text(encoding="utf-8"))


def named(row: EventType, **changes: Any) -> EventType:
    """Return `row` with changes, under names that no other row has."""
    return msgspec.structs.replace(row, event_type="users.Other", name="Other", seed_name=None, **changes)


def test_41_types_of_the_seed_and_58_later_ones() -> None:
    """No type gets lost, and none slips from the types with two spellings to those with one."""
    assert (len(SEED), len(LATER)) == (41, 58)


def test_no_name_stands_for_two_types() -> None:
    """Neither Braze's names nor Mixpanel's, in either naming, are given twice."""
    assert len({row.event_type for row in EVENT_TYPES}) == len(EVENT_TYPES)
    assert len({row.name for row in EVENT_TYPES}) == len(EVENT_TYPES)
    assert len({row.seed_name or row.name for row in EVENT_TYPES}) == len(EVENT_TYPES)


def test_only_four_types_have_two_names() -> None:
    """The two namings differ exactly where Braze renamed an event."""
    assert {row.seed_name: row.name for row in SEED if row.seed_name != row.name} == {
        "Campaign Conversion Event": "Campaign Conversion",
        "Canvas Conversion Event": "Canvas Conversion",
        "SMS Send To Carrier": "SMS Carrier Send",
        "SMS Inbound Receipt": "SMS Inbound Received",
    }


def test_every_type_belongs_to_one_of_two_groups() -> None:
    """The two switches of the configuration reach every type: messages are engagement, the rest is told by its row."""
    assert {row.group for row in EVENT_TYPES} == set(get_args(table.Group))
    messages = [
        row for row in EVENT_TYPES if row.event_type.startswith(("users.messages.", "users.campaigns.", "users.canvas"))
    ]
    assert {row.group for row in messages} == {"message_engagement"}
    assert {row.name for row in SEED if row.group == "customer_behavior"} == {
        "[Braze Custom Event]",
        "Purchase",
        "First Session",
        "Session Start",
        "Session End",
        "News Feed Impression",
        "Location",
        "Install Attribution",
        "Uninstall",
    }


def test_every_property_has_one_known_type_and_a_reader() -> None:
    """A property is a string everywhere or nowhere; a type for a property that no row names is a leftover."""
    used = {name for row in EVENT_TYPES for name in row.properties}
    assert used == set(PROPERTY_TYPES)
    assert set(PROPERTY_TYPES.values()) == set(get_args(table.PropertyType))
    kinds = (table._STRINGS, table._BOOLEANS, table._INTS, table._FLOATS, table._STRING_ARRAYS)
    assert sum(len(kind) for kind in kinds) == len(PROPERTY_TYPES)


def test_what_all_events_share_stays_outside_the_rows() -> None:
    """device_id and what the customer's own code adds are mapped once for all types, so no row may repeat them."""
    apart = {"device_id", "name", "custom_properties", "purchase_properties"}
    assert not apart & set(PROPERTY_TYPES)
    assert {row.event_type: row.custom for row in EVENT_TYPES if row.custom} == {
        "users.behaviors.CustomEvent": "event",
        "users.behaviors.Purchase": "purchase",
    }


def test_a_row_without_properties_says_why() -> None:
    """Only types whose properties aren't published may come without any."""
    assert all(row.note == table.FIELDS_UNKNOWN for row in EVENT_TYPES if not row.properties)


def test_mtu_exempt_names_are_ours_but_one() -> None:
    """The exempt names match what the seed naming sends; Mixpanel spells the carrier's event in a way of its own."""
    sent = {row.seed_name or row.name for row in EVENT_TYPES}
    assert MTU_EXEMPT - sent == {"SMS Send to Carrier"}


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        (lambda row: (row, msgspec.structs.replace(row, name="Other", seed_name=None)), "event type"),
        (lambda row: (row, msgspec.structs.replace(row, event_type="users.Other")), "current name 'Email Open'"),
        (lambda row: (row, msgspec.structs.replace(named(row), seed_name=row.name)), "seed name 'Email Open'"),
        (lambda row: (named(row, properties=("url", "favourite_colour")),), "no type for favourite_colour"),
        (lambda row: (named(row, properties=("url", "esp", "url")),), "twice in its properties: url"),
        (lambda row: (named(row, properties=("card_id", "content_card_id")),), "twice in its properties: card_id"),
    ],
)
def test_a_slip_is_refused_with_the_name_of_its_row(rows: Any, complaint: str) -> None:
    """Whoever edits the table learns at once which row is wrong, instead of losing events later."""
    bad = rows(next(row for row in EVENT_TYPES if row.name == "Email Open"))
    with pytest.raises(ValueError, match=complaint) as caught:
        check(bad, PROPERTY_TYPES)
    assert str(caught.value).startswith(f"{bad[-1].event_type}: ")


def test_every_type_has_its_sample_and_every_sample_its_type() -> None:
    """A new row without a golden, or a golden that outlived its row, is noticed."""
    assert {path.stem for path in SAMPLES.glob("*.json")} == {row.event_type for row in EVENT_TYPES}


@every_row
def test_sample_carries_exactly_the_row(row: EventType) -> None:
    """The samples cover every property of every type, and nothing that the table doesn't know."""
    event = sample(row)["currents"]
    assert event["event_type"] == row.event_type
    assert set(event["properties"]) == set(row.properties) | CUSTOMER_MADE[row.custom]
    assert event["user"]["device_id"]


@every_row
@pytest.mark.parametrize("naming", ["seed", "current"])
def test_names_of_the_row_are_those_of_its_sample(row: EventType, naming: str) -> None:
    """The event and property names that the table yields are those of the independently made golden."""
    golden = sample(row)
    spelled_as_seed = naming == "seed" and row.seed_name is not None
    name = row.seed_name if spelled_as_seed else row.name
    if row.custom == "event":
        name = CUSTOM_EVENT_PREFIX + golden["currents"]["properties"]["name"]
    renames = SEED_PROPERTY_NAMES if spelled_as_seed else CURRENT_PROPERTY_NAMES
    envelope = {"distinct_id", "$insert_id", "time", "token", "$partner_id", "ip", "device_id"}
    documented = {renames.get(name, name) for name in row.properties}
    sent = set(golden[naming]["properties"])
    assert golden[naming]["event"] == name
    assert {name for name in sent if not name.startswith("[")} == envelope | documented
