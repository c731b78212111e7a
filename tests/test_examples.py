"""The made-up events: the same for the same seed, complete, and shaped like real ones."""

import random
import re
from itertools import islice, pairwise
from typing import Any

import msgspec
import pytest

from bridged.currents import examples
from bridged.currents.examples import DAY_S, REAL_MIX, example_day, example_event
from bridged.currents.table import EVENT_TYPES, PROPERTY_TYPES, EventType

START_S = 1_790_000_000
PYTHON_TYPES: dict[str, type] = {
    "string": str,
    "boolean": bool,
    "int": int,
    "float": float,
    "array<string>": list,
}
CUSTOMER_MADE = {"": set(), "event": {"name", "custom_properties"}, "purchase": {"purchase_properties"}}

every_row = pytest.mark.parametrize("row", EVENT_TYPES, ids=lambda row: row.event_type)


@pytest.fixture(scope="module")
def day() -> list[dict[str, Any]]:
    """Return a day's events, for tests that only look at them."""
    return list(example_day(random.Random(1), 20_000, START_S))


def test_the_same_seed_makes_the_same_day() -> None:
    """A benchmark or a failing test can be repeated with the very same bytes; another seed makes other events."""
    days = [msgspec.json.encode(list(example_day(random.Random(seed), 500, START_S))) for seed in (7, 7, 8)]
    assert days[0] == days[1]
    assert days[0] != days[2]


def test_a_day_is_made_as_it_is_read() -> None:
    """Millions of events can be streamed without being held."""
    assert len(list(islice(example_day(random.Random(1), 100_000, START_S), 3))) == 3


@every_row
def test_every_property_is_there_with_its_type(row: EventType) -> None:
    """With every_property an event carries its row's properties, no more, no fewer, none null and none ill-typed."""
    event = example_event(row, random.Random(2), START_S, every_property=True)
    properties = event["properties"]
    assert set(properties) == set(row.properties) | CUSTOMER_MADE[row.custom]
    assert {
        name for name in row.properties if type(properties[name]) is not PYTHON_TYPES[PROPERTY_TYPES[name]]
    } == set()
    assert set(event["user"]) == {"user_id", "external_user_id", "device_id", "timezone"}


@every_row
def test_an_ordinary_event_stays_within_its_row(row: EventType) -> None:
    """Ordinary events leave properties out, but never invent any, and keep the form that Braze sends."""
    rng = random.Random(3)
    for event in (example_event(row, rng, START_S) for _ in range(20)):
        assert list(event) == ["event_type", "id", "time", "user", "properties"]
        assert (event["event_type"], event["time"]) == (row.event_type, START_S)
        assert set(event["properties"]) <= set(row.properties) | CUSTOMER_MADE[row.custom]
        assert {"user_id", "external_user_id"} <= set(event["user"])


def test_a_message_comes_from_a_campaign_or_a_canvas(day: list[dict[str, Any]]) -> None:
    """As in real data an event seldom has both origins; both origins occur."""
    origins = [{"campaign_id", "canvas_id"} & set(event["properties"]) for event in day]
    assert {"campaign_id", "canvas_id"} not in origins
    assert {"campaign_id"} in origins
    assert {"canvas_id"} in origins


def test_ids_are_unique_uuids(day: list[dict[str, Any]]) -> None:
    """No event of a day looks like a repetition of another."""
    ids = {event["id"] for event in day}
    assert len(ids) == len(day)
    assert all(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", each) for each in ids)


def test_people_recur_and_stay_who_they_are(day: list[dict[str, Any]]) -> None:
    """A person has one Braze id, one device and one address, however often they are seen."""
    people = {event["user"]["external_user_id"] for event in day}
    pairs = {(event["user"]["external_user_id"], event["user"]["user_id"]) for event in day}
    assert len(pairs) == len(people) < len(day)
    assert len({user_id for _, user_id in pairs}) == len(people)


def test_mean_size_is_that_of_real_events(day: list[dict[str, Any]]) -> None:
    """Benchmarks weigh events as heavy as real ones."""
    mean = sum(len(msgspec.json.encode(event)) for event in day) / len(day)
    assert 500 <= mean <= 900


def test_the_mix_names_every_type() -> None:
    """Every type occurs on a day, customer-made events make up about a seventh, purchases are few."""
    assert set(REAL_MIX) == {row.event_type for row in EVENT_TYPES}
    assert min(REAL_MIX.values()) > 0
    total = sum(REAL_MIX.values())
    assert 0.13 < REAL_MIX["users.behaviors.CustomEvent"] / total < 0.17
    assert REAL_MIX["users.behaviors.Purchase"] / total < 0.02


def test_times_fill_the_day_and_stay_in_it(day: list[dict[str, Any]]) -> None:
    """Events come nearly in order over the whole day, none before it or after it."""
    times = [event["time"] for event in day]
    assert START_S <= min(times) < START_S + 600
    assert START_S + DAY_S - 600 < max(times) < START_S + DAY_S
    assert all(later - earlier > -120 for earlier, later in pairwise(times))


def test_custom_events_carry_a_few_properties_some_nested(day: list[dict[str, Any]]) -> None:
    """Customer-made properties come in small numbers; arrays and objects among them are exercised."""
    events = [event["properties"] for event in day if event["event_type"] == "users.behaviors.CustomEvent"]
    assert all(2 <= len(event["custom_properties"]) <= 7 for event in events)
    kinds = {type(value) for event in events for value in event["custom_properties"].values()}
    assert {str, int, float, bool, list, dict} <= kinds


def test_nobody_real_is_in_the_data(day: list[dict[str, Any]]) -> None:
    """Phones are of the range kept for fiction, mail and links of example domains, addresses of documentation blocks."""
    rng = random.Random(4)
    full = [example_event(row, rng, START_S, every_property=True) for row in EVENT_TYPES]
    text = msgspec.json.encode(day + full).decode()
    phones = [
        value for event in day + full for name, value in event["properties"].items() if name.endswith("phone_number")
    ]
    assert phones
    assert all(re.fullmatch(r"\+1\d{3}55501\d\d", phone) for phone in phones)
    assert {host.rsplit(".", 2)[-2] for host in re.findall(r"https?://([^/\"]+)", text)} == {"example"}
    assert set(re.findall(r"@([\w.]+)", text)) == {"example.com"}


def test_every_maker_has_a_property() -> None:
    """A value for a property that the table doesn't know is a leftover."""
    assert set(examples._VALUES) <= set(PROPERTY_TYPES)
    assert set(examples._SELDOM) <= set(PROPERTY_TYPES)
