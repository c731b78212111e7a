"""The mapping, from the bytes that Braze sends to the bytes that Mixpanel gets: decode, map, encode, nothing in between."""

import json
import random
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from conftest import ROWS
from conftest import currents as currents_now
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schema import body_of

from bridged.currents.examples import example_event
from bridged.currents.schema import UNDECODABLE_CODE, UNKNOWN_CODE, UNKNOWN_TYPE, Refusal
from bridged.currents.table import EVENT_TYPES, EventType
from bridged.mixpanel.limits import INSERT_ID, MAX_PROPERTIES, REFUSED_IDS
from bridged.mixpanel.mapping import EventMapping, MappingSettings, Skip, derived_name, mixpanel_name

SAMPLES = Path(__file__).parent / "samples"
NOW_S = 1_790_000_100.5
OPEN = "users.messages.landingpage.Click"
CUSTOM = "users.behaviors.CustomEvent"
PURCHASE = "users.behaviors.Purchase"
UNHEARD_OF = "users.messages.fax.SendLate"

every_row = pytest.mark.parametrize("row", EVENT_TYPES, ids=lambda row: row.event_type)


def currents(event_type: str = "users.messages.email.Open", **changes: Any) -> dict[str, Any]:
    """A Currents event of a minute before NOW_S."""
    return currents_now(event_type, **({"time": 1_790_000_000} | changes))


class Outcome(NamedTuple):
    """What became of some events: the encoded Mixpanel events, and the rest."""

    forms: list[bytes]
    codes: bytes
    skips: list[Skip]
    refusals: list[Refusal]

    @property
    def events(self) -> list[Any]:
        """The Mixpanel events as JSON objects."""
        return [json.loads(form) for form in self.forms]


def code_of(event_type: str) -> int:
    """Its code in the whole table."""
    return [row.event_type for row in EVENT_TYPES].index(event_type)


def made(rows: tuple[EventType, ...] = EVENT_TYPES, **changes: Any) -> EventMapping:
    """A mapping with these settings; with few rows it is made faster."""
    return EventMapping(rows, MappingSettings(**({"token": "example-token"} | changes)))


DEFAULT = made()
BY_NAMING = {"seed": DEFAULT, "current": made(naming="current")}


def mapped(*events: Any, by: EventMapping = DEFAULT, as_body: bool = False) -> Outcome:
    """The outcome of events, each an object or its bytes, that come as lines or as one body."""
    raw = [event if isinstance(event, bytes) else msgspec.json.encode(event) for event in events]
    decoded = body_of(by.schema, b'{"events":[%s]}' % b",".join(raw)) if as_body else by.schema.lines(raw)
    assert decoded is not None
    found = by.map(decoded, NOW_S)
    forms = [msgspec.json.encode(form) for form in found.forms]
    return Outcome(forms, found.codes, found.skips, found.refusals)


def properties_of(event: dict[str, Any], by: EventMapping = DEFAULT) -> Any:
    """The properties that Mixpanel gets for an event that is forwarded."""
    (form,) = mapped(event, by=by).events
    return form["properties"]


def reason_of(event: Any, by: EventMapping = DEFAULT) -> str:
    """Why an event is a dead letter; its bytes are kept as they came."""
    outcome = mapped(event, by=by)
    assert (outcome.forms, outcome.codes, outcome.skips) == ([], b"", [])
    (refusal,) = outcome.refusals
    assert refusal.original == (event if isinstance(event, bytes) else msgspec.json.encode(event))
    return refusal.reason


def custom_event(custom: Any, name: Any = "viewed_product") -> dict[str, Any]:
    """A custom event with these properties of the customer's."""
    return currents(CUSTOM, properties={"name": name, "custom_properties": custom})


def exactly(value: Any) -> str:
    """A JSON value as text that is equal for equal JSON only: `==` takes true for 1."""
    return json.dumps(value, sort_keys=True)


# -- goldens -----------------------------------------------------------------------------------------------------------


@every_row
@pytest.mark.parametrize("naming", ["seed", "current"])
@pytest.mark.parametrize("as_body", [False, True], ids=["line", "body"])
def test_every_type_maps_to_its_golden(row: EventType, naming: str, as_body: bool) -> None:
    """Each type, in both spellings and through both doors, becomes exactly the event that was written down by hand."""
    golden = json.loads((SAMPLES / f"{row.event_type}.json").read_text(encoding="utf-8"))
    outcome = mapped(golden["currents"], by=BY_NAMING[naming], as_body=as_body)
    assert (outcome.skips, outcome.refusals) == ([], [])
    assert outcome.codes == bytes([EVENT_TYPES.index(row)])
    (event,) = outcome.events
    assert exactly(event) == exactly(golden[naming])


@every_row
def test_null_is_absent(row: EventType) -> None:
    """A documented property that is null is left out, as one that isn't there: Mixpanel would store a null."""
    bare = currents(row.event_type, properties={"name": "n"} if row.custom == "event" else {})
    nulls = bare | {"properties": bare["properties"] | dict.fromkeys(row.properties)}
    assert mapped(nulls).forms == mapped(bare).forms != []


@pytest.mark.parametrize("member", ["id", "user", "properties"])
def test_a_null_member_is_absent(member: str) -> None:
    """Braze leaves out what is missing, but null must not cost the event: it is read as absent."""
    event = currents()
    without = {key: value for key, value in event.items() if key != member}
    one, other = mapped(event | {member: None}), mapped(without)
    assert (one.skips, one.refusals) == (other.skips, other.refusals)
    if member != "id":  # without an id the bytes decide, and they differ
        assert one.forms == other.forms


@pytest.mark.parametrize("row", [row for row in EVENT_TYPES if row.properties], ids=lambda row: row.event_type)
def test_undocumented_properties_are_dropped(row: EventType) -> None:
    """A field that Braze adds is not forwarded before somebody looked at it; reserved names can't slip in this way."""
    event = example_event(row, random.Random(1), 1_790_000_000)
    extra = {"brand_new": 1, "distinct_id": "x", "token": "x", "$insert_id": "x", "ip": 1, "time": 1, "$partner_id": 1}
    extra |= {"device_id": "x", "$os": "x", "$device": "x"}
    assert mapped(event | {"properties": event["properties"] | extra}).forms == mapped(event).forms


def test_user_id_and_timezone_stay_at_braze() -> None:
    """Only external_user_id and device_id identify somebody at Mixpanel; neither Braze's own id nor the zone is sent."""
    user = {"user_id": "braze-1", "external_user_id": "a", "device_id": "d", "timezone": "Asia/Tokyo"}
    properties = properties_of(currents(user=user))
    assert (properties["distinct_id"], properties["device_id"]) == ("a", "d")
    assert not {"user_id", "timezone", "braze-1", "Asia/Tokyo"} & (set(properties) | set(map(str, properties.values())))


def test_an_empty_token_and_partner_are_left_out() -> None:
    """With a service account no token need be known: then the property is absent, not empty."""
    for event_type in ("users.messages.email.Open", CUSTOM, OPEN):
        assert not {"token", "$partner_id"} & set(properties_of(currents(event_type), made(token="", partner_id="")))
        properties = properties_of(currents(event_type), made(token="t", partner_id="p"))
        assert (properties["token"], properties["$partner_id"], properties["ip"]) == ("t", "p", 0)


# -- identity ----------------------------------------------------------------------------------------------------------

ANONYMOUS = [{}, {"external_user_id": None}, {"external_user_id": ""}, {"user_id": "braze-1"}]


@pytest.mark.parametrize("user", ANONYMOUS)
@pytest.mark.parametrize("event_type", ["users.messages.email.Open", CUSTOM, OPEN])
def test_anonymous_users_by_policy(user: dict[str, Any], event_type: str) -> None:
    """Absent, null and empty ids are the same. skip: counted; dead_letter: kept; device: the device stands for the user."""
    event = currents(event_type, user=user)
    with_device = currents(event_type, user=user | {"device_id": "d-1"})
    skip = Skip(EVENT_TYPES.index(ROWS[event_type]), "no external_user_id")
    assert mapped(event).skips == mapped(with_device).skips == [skip]
    assert mapped(event, by=made(anonymous="device")).skips == [skip]
    assert properties_of(with_device, made(anonymous="device"))["distinct_id"] == "$device:d-1"
    assert properties_of(with_device, made(anonymous="device"))["device_id"] == "d-1"
    assert "external_user_id" in reason_of(with_device, made(anonymous="dead_letter"))


@pytest.mark.parametrize("refused", sorted(REFUSED_IDS))
def test_an_id_that_mixpanel_refuses_is_a_dead_letter(refused: str) -> None:
    """Mixpanel refuses placeholders as ids: the event is kept with a reason that names it, and never costs a batch."""
    assert repr(refused) in reason_of(currents(user={"external_user_id": refused}))
    assert repr(refused) in reason_of(currents(OPEN, user={"external_user_id": refused}))


@pytest.mark.parametrize("odd", ["Zoë \N{SNOWMAN}", "a b", "00", "O'Hara", "x" * 300, "-2", "\u0000"])
def test_ids_of_any_spelling_are_sent_as_they_are(odd: str) -> None:
    """Only what Mixpanel documents as refused is refused; an id is never rewritten."""
    assert properties_of(currents(user={"external_user_id": odd}))["distinct_id"] == odd


# -- time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event_type", ["users.messages.email.Open", CUSTOM, OPEN, UNHEARD_OF])
def test_time_is_sent_as_received_unless_it_is_ahead(event_type: str) -> None:
    """Past times stay; up to an hour ahead is clamped to now, once, since Mixpanel would do so anew at each try."""
    by = made(unknown="forward")
    times = [365 * 86400, 1_000_000_000, int(NOW_S), int(NOW_S) + 1, int(NOW_S) + 3600]
    event = {"event_type": event_type, "id": "a", "user": {"external_user_id": "u"}, "properties": {"name": "n"}}
    sent = [properties_of(event | {"time": time_s}, by)["time"] for time_s in times]
    assert sent == [365 * 86400, 1_000_000_000, int(NOW_S), int(NOW_S), int(NOW_S)]


@pytest.mark.parametrize(
    ("time", "reason"),
    [
        (int(NOW_S) + 3601, "more than 1 h ahead"),
        (1_790_000_000_000, "; it looks like milliseconds, Currents sends seconds"),
        (1_790_000_000_000_000, "; it looks like microseconds, Currents sends seconds"),
        (1_790_000_000_000_000_000, "; it looks like nanoseconds, Currents sends seconds"),
        (10**30, "h UTC"),
        (365 * 86400 - 1, "before 1971"),
        (0, "before 1971"),
        (-1, "before 1971"),
        ("1790000000", "Expected `int`, got `str`"),
        (1790000000.5, "Expected `int`, got `float`"),
        (True, "Expected `int`"),
        (None, "time"),
    ],
)
def test_a_time_that_mixpanel_would_refuse_is_a_dead_letter(time: Any, reason: str) -> None:
    """More than an hour ahead, before 1971 or not a whole number of seconds: kept, with what is wrong."""
    assert reason in reason_of(currents(time=time))
    assert reason in reason_of(currents(OPEN, time=time))


@pytest.mark.parametrize("time", [20_261_129_120_000, 10**30, 4 * 10**9, 10**39])
def test_a_time_that_is_in_no_unit_is_not_said_to_be(time: int) -> None:
    """A date written as a number, or nonsense: a person who was told of milliseconds would look for the wrong mistake."""
    assert "it looks like" not in reason_of(currents(time=time))


def test_times_of_long_ago_have_one_reason() -> None:
    """A million of them are one group of dead letters."""
    assert len({reason_of(currents(time=time)) for time in range(100)}) == 1


def test_our_clock_is_in_the_reason_to_the_hour() -> None:
    """One that is days behind makes a dead letter of everything: the reason shows it, and is the same for all of an hour."""
    reasons = {reason_of(currents(time=int(NOW_S) + days * 86400)) for days in (1, 2, 3)}
    assert reasons == {
        f"time is more than 1 h ahead, our clock says {datetime.fromtimestamp(NOW_S, UTC):%Y-%m-%d %H} h UTC"
    }


# -- $insert_id --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("good", ["2ea9f717-0bb8-492f-bf05-91166742c9fb", "A", "-", "x" * 36])
def test_a_conform_id_is_the_insert_id(good: str) -> None:
    """Braze's own id is what makes a repetition recognisable, by Mixpanel and by people."""
    assert properties_of(currents(id=good))["$insert_id"] == good


@pytest.mark.parametrize("placeholder", ["NULL", "Anon", "N/A", "Undefined", "TRUE"])
def test_a_placeholder_in_capitals_is_no_insert_id(placeholder: str) -> None:
    """Mixpanel refuses it in any case of letters, so it becomes a hash as the others do."""
    assert len(properties_of(currents(id=placeholder))["$insert_id"]) == 36


@given(st.one_of(st.text(max_size=60), st.sampled_from(sorted(REFUSED_IDS)), st.from_regex(INSERT_ID, fullmatch=True)))
def test_any_id_becomes_conform_and_always_the_same(given_id: str) -> None:
    """Mixpanel takes [A-Za-z0-9-]{1,36} and no placeholder. An id that isn't so becomes a hash, the same at every try."""
    event = currents(id=given_id)
    first, other = properties_of(event)["$insert_id"], properties_of(event | {"time": 1_790_000_001})["$insert_id"]
    assert re.fullmatch(r"[A-Za-z0-9-]{1,36}", first)
    assert first.lower() not in REFUSED_IDS
    assert properties_of(event)["$insert_id"] == first
    is_none = given_id.strip().lower() in REFUSED_IDS | {""}
    assert (other == first) != is_none


@pytest.mark.parametrize("placeholder", ["", " ", "0", "undefined", "Null", "00000000-0000-0000-0000-000000000000"])
def test_events_that_share_a_placeholder_are_different_events(placeholder: str) -> None:
    """Mixpanel keeps one of those of a user and a day that have the same `$insert_id`: the other would vanish, delivered."""
    one, other = custom_event({"n": 1}) | {"id": placeholder}, custom_event({"n": 2}) | {"id": placeholder}
    first, second = (event["properties"]["$insert_id"] for event in mapped(one, other).events)
    assert first != second
    assert properties_of(one)["$insert_id"] == first


def test_without_an_id_the_bytes_make_one() -> None:
    """The same event repeated has the same id, another event has another, through either door and in any company."""
    events = [currents(time=1_790_000_000 + n) for n in range(2)]
    for event in events:
        del event["id"]
    ids = [event["properties"]["$insert_id"] for event in mapped(*events).events]
    assert ids[0] != ids[1]
    assert [event["properties"]["$insert_id"] for event in mapped(*reversed(events), as_body=True).events] == ids[::-1]
    assert properties_of(events[0])["$insert_id"] == ids[0]


@pytest.mark.parametrize("event_type", ["users.behaviors.CustomEvent", OPEN, UNHEARD_OF])
def test_without_an_id_the_spelling_makes_none(event_type: str) -> None:
    """Blanks between its members are no part of an event: by HTTP, as a line and out of an array it is the same one."""
    event = {k: v for k, v in custom_event({"a": [1.50, "b  c"]}).items() if k != "id"} | {"event_type": event_type}
    spellings = [
        json.dumps(event, separators=(",", ":")).encode(),
        json.dumps(event).encode(),
        json.dumps(event, indent=2).encode(),
        json.dumps(event, indent="\t").replace("\n", "\r\n").encode(),
    ]
    by = made(unknown="forward")
    assert len({properties_of(line, by=by)["$insert_id"] for line in spellings}) == 1
    another = spellings[0].replace(b"b  c", b"b c")
    assert properties_of(another, by=by)["$insert_id"] != properties_of(spellings[0], by=by)["$insert_id"]


def test_a_byte_order_mark_is_no_part_of_the_bytes_that_are_kept() -> None:
    """A dead letter is JSON without it, and an event without an id gets the same one with and without it."""
    odd = [{k: v for k, v in currents().items() if k != "id"}, custom_event({"a": nested(20)}), currents(time=1)]
    lines = [msgspec.json.encode(event) for event in odd]
    assert mapped(*(b"\xef\xbb\xbf" + line for line in lines)) == mapped(*lines)


@pytest.mark.parametrize("event_type", ["users.messages.email.Open", OPEN])
def test_an_empty_device_id_is_left_out(event_type: str) -> None:
    """Of documented types and of others alike: nobody's device is called nothing."""
    event = currents(event_type, user={"external_user_id": "ada", "device_id": ""})
    assert "device_id" not in properties_of(event)


def test_a_list_that_mixpanel_refuses_is_a_dead_letter() -> None:
    """Of a documented property, too: the reason names it and what Mixpanel takes."""
    event = currents("users.messages.sms.InboundReceive")
    event["properties"]["media_urls"] = ["https://example.com/a"] * 254
    assert len(properties_of(event)["media_urls"]) == 254
    event["properties"]["media_urls"].append("one more")
    reason = reason_of(event)
    assert "media_urls" in reason
    assert "254" in reason


# -- what the customer's code adds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "", " ", "\t\n"])
def test_a_custom_event_without_a_name_is_a_dead_letter(name: str | None) -> None:
    """Mixpanel refuses blank names; all nameless events under one prefix would be worse than none."""
    assert "name" in reason_of(custom_event({"a": 1}, name))


@pytest.mark.parametrize(
    "name", ["x", "a" * 1000, "Achat terminé \N{PARTY POPPER}", '"quoted" \\ and\nbroken', " padded "]
)
def test_custom_event_names_are_kept_behind_the_prefix(name: str) -> None:
    """What the customer called the event is what people look for; Mixpanel truncates names, it doesn't refuse them."""
    (event,) = mapped(custom_event({}, name)).events
    assert event["event"] == f"[Braze Custom Event] {name}"
    assert "name" not in event["properties"]


VALUES: dict[str, Any] = {
    "text": "Zoë",
    "empty": "",
    "no": False,
    "zero": 0,
    "big": 2**64,
    "huge": -(10**100),
    "float": 0.1,
    "list": [1, "a", None, {"b": [True]}],
    "object": {"a": {"b": None}},
    "": "a blank name",
}


@pytest.mark.parametrize(
    ("event_type", "member", "prefix"),
    [
        (CUSTOM, "custom_properties", "[Custom event property] "),
        (PURCHASE, "purchase_properties", "[Purchase property] "),
    ],
)
def test_customer_made_properties_keep_their_values(event_type: str, member: str, prefix: str) -> None:
    """Names get their prefix, values stay what they are whatever their type or size; null is absent, inside it stays."""
    event = currents(event_type)
    event["properties"] |= {member: VALUES | {"absent": None}}
    properties = properties_of(event)
    assert exactly({k: v for k, v in properties.items() if k.startswith("[")}) == exactly(
        {prefix + name: value for name, value in VALUES.items()}
    )
    assert member not in properties


@pytest.mark.parametrize("custom", [None, {}, {"a": None}])
def test_no_customer_made_properties_at_all(custom: Any) -> None:
    """Null, none, or only nulls: the event goes, without an empty leftover."""
    assert not any("ustom" in name for name in properties_of(custom_event(custom)))


def test_reserved_names_are_harmless_behind_the_prefix() -> None:
    """A customer's `bucket`, `token` or `$ignore` means nothing to Mixpanel once it has the prefix."""
    reserved = ["bucket", "$bucket", "token", "distinct_id", "$insert_id", "time", "ip", "$ignore", "device_id"]
    bare = properties_of(custom_event({}))
    properties = properties_of(custom_event(dict.fromkeys(reserved, "evil")))
    assert {name for name, value in properties.items() if value == "evil"} == {
        f"[Custom event property] {name}" for name in reserved
    }
    assert {name: value for name, value in properties.items() if value != "evil"} == bare


def nested(depth: int) -> Any:
    """A list in a list ..., so many deep."""
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (nested(11), "deeper than 10"),
        ({"a": {"b": nested(9)}}, "deeper than 10"),
        (list(range(255)), "a list of more than 254"),
        ({str(n): n for n in range(255)}, "an object with more than 254"),
        ([{"a": list(range(255))}], "a list of more than 254"),
    ],
)
def test_values_that_mixpanel_refuses_are_dead_letters(value: Any, reason: str) -> None:
    """Too deep, too long or too wide: refused at the door, with the property's name, wherever the event came from."""
    for event in (custom_event({"bad": value}), currents(OPEN, properties={"bad": value})):
        assert reason in reason_of(event)
        assert "'bad'" in reason_of(event)


def test_what_is_too_much_has_one_reason_however_much_it_is() -> None:
    """Dead letters are counted by their reason."""
    values: list[Any] = [list(range(n)) for n in (255, 300)] + [{str(i): i for i in range(n)} for n in (255, 300)]
    assert len({reason_of(custom_event({"bad": value})) for value in values}) == 2
    for event_type in (CUSTOM, OPEN):
        many = [{f"p{at}": at for at in range(n)} for n in (300, 400)]
        events = [custom_event(own) if event_type == CUSTOM else currents(OPEN, properties=own) for own in many]
        assert {reason_of(event) for event in events} == {"more than 254 properties; Mixpanel takes no more"}


def test_a_long_name_does_not_hide_what_is_wrong_with_it() -> None:
    """What is shown of a reason has its end: of a name as long as all of it, the beginning and the end are enough."""
    name = "the_name_of_a_property_" * 40 + "end"
    for event in (custom_event({name: nested(11)}), currents(OPEN, properties={name: nested(11)})):
        reason = reason_of(event)
        assert reason.startswith("property 'the_name_of_a_")
        assert reason.endswith("_property_end' is nested deeper than 10")
        assert len(reason) < 120


@pytest.mark.parametrize("value", [nested(10), list(range(254)), {str(n): n for n in range(254)}])
def test_values_at_the_limit_are_sent(value: Any) -> None:
    """What Mixpanel may take is sent: its answer decides."""
    assert exactly(properties_of(custom_event({"a": value}))["[Custom event property] a"]) == exactly(value)
    assert exactly(properties_of(currents(OPEN, properties={"a": value}))["a"]) == exactly(value)


@pytest.mark.parametrize("event_type", [CUSTOM, OPEN])
def test_as_many_properties_as_mixpanel_takes_and_no_more(event_type: str) -> None:
    """All properties together count, nulls and absent ones don't."""

    def event(count: int) -> dict[str, Any]:
        own = {f"p{n}": n for n in range(count)} | {"null": None}
        return custom_event(own) if event_type == CUSTOM else currents(OPEN, properties=own)

    envelope = len(properties_of(event(1))) - 1
    assert len(properties_of(event(MAX_PROPERTIES - envelope))) == MAX_PROPERTIES
    assert f"more than {MAX_PROPERTIES} properties" in reason_of(event(MAX_PROPERTIES + 1 - envelope))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=12), json_values, max_size=6))
def test_any_customer_made_properties_arrive_unchanged(custom: dict[str, Any]) -> None:
    """Whatever JSON the customer's code sends within the limits comes out under its prefix, byte by byte the same value."""
    properties = properties_of(custom_event(custom))
    prefix = "[Custom event property] "
    arrived = {name.removeprefix(prefix): value for name, value in properties.items() if name.startswith(prefix)}
    assert exactly(arrived) == exactly({name: value for name, value in custom.items() if value is not None})


# -- unknown types, and types whose fields aren't published ------------------------------------------------------------


def test_unknown_types_by_policy() -> None:
    """dead_letter keeps, skip counts, forward sends under a derived name; always accounted as unknown."""
    event = currents() | {"event_type": UNHEARD_OF, "properties": {"pages": 2, "none": None}}
    refused, skipped = mapped(event), mapped(event, by=made(unknown="skip"))
    assert [(r.code, r.event_type, r.reason) for r in refused.refusals] == [
        (UNKNOWN_CODE, UNHEARD_OF, "unknown event type")
    ]
    assert skipped.skips == [Skip(UNKNOWN_CODE, "unknown event type")]
    sent = mapped(event, by=made(unknown="forward"))
    assert (sent.codes, sent.events[0]["event"]) == (bytes([UNKNOWN_CODE]), "Fax Send Late")
    assert sent.events[0]["properties"]["pages"] == 2
    assert "none" not in sent.events[0]["properties"]


@pytest.mark.parametrize(
    ("event_type", "name"),
    [
        ("users.messages.fax.SendLate", "Fax Send Late"),
        ("users.behaviors.app.Reinstall", "App Reinstall"),
        ("agentconsole.ToolInvocation", "Agentconsole Tool Invocation"),
        ("users.messages", "Users.messages"),
        ("snake_case here", "Snake Case Here"),
        ("...", "..."),
        ("ünïcode.ÉtéBleu", "Ünïcode ÉtéBleu"),
    ],
)
def test_derived_names(event_type: str, name: str) -> None:
    """A name for a type nobody has named: readable, the same every time, never blank."""
    assert derived_name(event_type) == name


@given(st.text(min_size=1).filter(lambda text: not text.isspace()))
def test_a_derived_name_is_never_blank(event_type: str) -> None:
    """Mixpanel refuses blank names."""
    assert derived_name(event_type).strip()


@pytest.mark.parametrize("name", ["$identify", "$merge", "users.$identify"])
def test_an_unknown_type_is_no_identity_event(name: str) -> None:
    """Forwarded, it made Mixpanel refuse all that was in the same request, and each time that was split to single events."""
    outcome = mapped(currents() | {"event_type": name}, currents(), by=made(unknown="forward"))
    assert [event["event"] for event in outcome.events] == ["Email Open"]
    assert [(each.code, each.event_type) for each in outcome.refusals] == [(UNKNOWN_CODE, name)]
    assert "Mixpanel refuses it" in outcome.refusals[0].reason


@pytest.mark.parametrize("blank", ["", " ", "\n\t"])
def test_a_blank_event_type_is_no_event(blank: str) -> None:
    """Even when unknown types are forwarded: it would be an event without a name, which Mixpanel refuses."""
    outcome = mapped(currents() | {"event_type": blank}, by=made(unknown="forward"))
    assert (outcome.forms, [r.code for r in outcome.refusals]) == ([], [UNDECODABLE_CODE])


def test_single_unknown_types_can_be_included_excluded_and_named() -> None:
    """include, exclude and names hold for types that this version doesn't know, too."""
    event = currents() | {"event_type": UNHEARD_OF}
    assert mapped(event, by=made(include=(UNHEARD_OF,), names={UNHEARD_OF: "Fax"})).events[0]["event"] == "Fax"
    by = made(unknown="forward", exclude=(UNHEARD_OF,), include=(UNHEARD_OF,))
    assert mapped(event, by=by).skips == [Skip(UNKNOWN_CODE, "not selected")]


def test_all_properties_of_an_undocumented_type_are_forwarded() -> None:
    """Types whose fields Braze hasn't published keep everything, but nothing that Mixpanel would act upon."""
    own = {"page": "Sale", "nested": {"a": [1]}, "big": 2**70, "none": None}
    names = ["token", "distinct_id", "bucket", "$ignore", "time", "$insert_id", "ip"]
    names += ["$city", "$region", "mp_country_code", "$latitude", "$failure_reason", "$duration_s", "$warehouse_type"]
    reserved = dict.fromkeys(names, "evil")
    properties = properties_of(currents(OPEN, properties=own | reserved))
    assert {name for name, value in properties.items() if value == "evil"} == {f"braze_{name}" for name in reserved}
    assert exactly({name: properties.get(name) for name in own}) == exactly(own)
    assert "none" not in properties


def test_a_property_that_is_called_otherwise_takes_no_others_place() -> None:
    """One whose new name the event has already gets another, in whichever order they came; neither is lost."""
    own = {"time": 1, "braze_time": 2, "braze_braze_ip": 3, "braze_ip": 4, "ip": 5}
    for properties in (own, dict(reversed(own.items()))):
        mapped = properties_of(currents(OPEN, properties=properties))
        kept = {name: value for name, value in mapped.items() if name.startswith("braze_")}
        assert kept == {
            "braze_braze_time": 1,
            "braze_time": 2,
            "braze_braze_ip": 3,
            "braze_ip": 4,
            "braze_braze_braze_ip": 5,
        }


@pytest.mark.parametrize("event_type", [OPEN, UNHEARD_OF])
def test_an_undocumented_types_own_device_id_is_kept_beside_the_users(event_type: str) -> None:
    """It was lost to the user's, although all properties of such a type are forwarded. Without one of the user it keeps its name."""
    by = made(unknown="forward")
    event = currents() | {"event_type": event_type, "properties": {"device_id": "own"}}
    for device, kept in (("theirs", {"device_id": "theirs", "braze_device_id": "own"}), (None, {"device_id": "own"})):
        properties = properties_of(event | {"user": {"external_user_id": "ada", "device_id": device}}, by=by)
        assert {name: value for name, value in properties.items() if "device_id" in name} == kept


@pytest.mark.parametrize("naming", ["seed", "current"])
@pytest.mark.parametrize("event_type", [OPEN, "users.messages.survey.Response", UNHEARD_OF])
def test_undocumented_types_are_spelled_as_all_that_came_later(event_type: str, naming: str) -> None:
    """The device of a landing page is in the column that those of other later types are in, whatever the naming."""
    by = made(naming=naming, unknown="forward")
    own = {"device_model": "Pixel 9", "os_version": "16", "content_card_id": "c", "product_id": "p"}
    properties = properties_of(currents() | {"event_type": event_type, "properties": own}, by=by)
    expected = {"$device": "Pixel 9", "$os": "16", "card_id": "c", "product_id": "p"}
    assert {name: properties.get(name) for name in (*own, *expected)} == dict.fromkeys(own) | expected
    both = {"device_model": "a", "$device": "b"}
    properties = properties_of(currents() | {"event_type": event_type, "properties": both}, by=by)
    assert both.items() <= properties.items()


@pytest.mark.parametrize("properties", [None, {}])
def test_an_undocumented_type_may_have_no_properties(properties: Any) -> None:
    """What Braze sends for it isn't known: nothing at all is possible."""
    event = currents(OPEN, properties=properties)
    assert mapped(event).events[0]["event"] == "Landing Page Click"
    del event["properties"]
    assert mapped(event).events[0]["event"] == "Landing Page Click"


# -- selection and names -----------------------------------------------------------------------------------------------


@every_row
def test_groups_select_types(row: EventType) -> None:
    """Each switch reaches exactly its own group; include brings one type back, exclude takes one out and wins."""
    event = example_event(row, random.Random(1), 1_790_000_000)
    off: dict[str, Any] = {row.group: False}
    on = {group: group == row.group for group in ("message_engagement", "customer_behavior")}
    only = (row.event_type,)
    forwarded = [
        bool(mapped(event, by=made((row,), **choice)).forms)
        for choice in (
            on,
            off,
            off | {"include": only},
            on | {"exclude": only},
            off | {"include": only, "exclude": only},
        )
    ]
    assert forwarded == [True, False, True, False, False]
    assert mapped(event, by=made((row,), **off)).skips == [Skip(0, "not selected")]


@every_row
def test_names_can_be_given(row: EventType) -> None:
    """[events.names] wins over both namings; for custom events it replaces the prefix."""
    event = example_event(row, random.Random(1), 1_790_000_000)
    by = made((row,), names={row.event_type: "Mine: "}, naming="current")
    own_name = event["properties"].get("name", "") if row.custom == "event" else ""
    assert mapped(event, by=by).events[0]["event"] == f"Mine: {own_name}"


def test_later_types_have_one_spelling() -> None:
    """Types that came after the seed are named alike in both namings; the four renamed ones aren't."""
    seed, current = MappingSettings(naming="seed"), MappingSettings(naming="current")
    differ = {row.event_type for row in EVENT_TYPES if mixpanel_name(row, seed) != mixpanel_name(row, current)}
    assert differ == {
        "users.campaigns.Conversion",
        "users.canvas.Conversion",
        "users.messages.sms.CarrierSend",
        "users.messages.sms.InboundReceive",
    }


def test_every_code_has_a_name() -> None:
    """Books and dead letters name the type; codes beyond the table are unknown ones."""
    assert [DEFAULT.type_name(code) for code in range(len(EVENT_TYPES))] == [row.event_type for row in EVENT_TYPES]
    assert DEFAULT.type_name(UNKNOWN_CODE) == UNKNOWN_TYPE


@every_row
@pytest.mark.parametrize("naming", ["seed", "current"])
def test_the_type_can_be_told_from_the_mixpanel_event(row: EventType, naming: str) -> None:
    """What comes back from the archive is accounted under the type that it was, whatever the naming is now."""
    golden = json.loads((SAMPLES / f"{row.event_type}.json").read_text(encoding="utf-8"))
    for by in BY_NAMING.values():
        assert by.type_name(by.code_of(golden[naming]["event"])) == row.event_type


def test_the_type_of_a_renamed_event_can_be_told() -> None:
    """Names that were given count as well, the beginning of custom events' names included; others are unknown."""
    by = made(names={CUSTOM: "Mine: ", "users.messages.sms.Send": "Text"})
    assert by.type_name(by.code_of("Mine: signed_up")) == CUSTOM
    assert by.type_name(by.code_of("Text")) == by.type_name(by.code_of("SMS Send")) == "users.messages.sms.Send"
    assert by.code_of("Fax Send") == by.code_of("") == UNKNOWN_CODE


# -- one odd event among many ------------------------------------------------------------------------------------------

GOOD = [
    msgspec.json.encode(example_event(row, random.Random(seed), 1_790_000_000))
    for row in EVENT_TYPES
    for seed in (1, 2)
]
ALONE = {line: mapped(line).forms[0] for line in GOOD}


def odd(**changes: Any) -> bytes:
    """An event that can't be forwarded as it is."""
    return msgspec.json.encode(currents(id="odd") | changes)


# Each is refused, skipped or made conform; none may touch its neighbours. All have their brackets in order.
ODD = [
    odd(user={}),
    odd(user={"external_user_id": "unknown"}),
    odd(id="has spaces and is far too long for an insert id"),
    odd(id=""),
    odd(time=10**12),
    odd(time=int(NOW_S) + 60),
    odd(time="yesterday"),
    odd(event_type=UNHEARD_OF),
    odd(event_type=OPEN, properties={"a": nested(50)}),
    odd(event_type=CUSTOM, properties={"name": ""}),
    odd(event_type=CUSTOM, properties={"name": "n", "custom_properties": {"a": nested(50)}}),
    odd(properties={"url": 5}),
    odd(properties=[]),
    b'{"event_type":"users.messages.email.Open","id":"\\ud800","time":1}',
    b'{"event_type":"users.messages.email.Open","time":NaN}',
    b'{"event_type":"users.messages.email.Open","time":1,"id":"\xff"}',
    b'{"event_type":"users.behaviors.CustomEvent","time":1,"properties":{"custom_properties":{"a":1e999}}}',
    b'{"event_type":"users.behaviors.CustomEvent","time":' + b"9" * 5000 + b"}",
    b"[" * 5000 + b"]" * 5000,
    b'{"a":' * 5000 + b"1" + b"}" * 5000,
    b'{"events":[{}]}',
    b"{}",
    b"[]",
    b"null",
    b'"]},{["',
    b"nonsense",
    b"1",
]
# A string that doesn't end takes the brackets after it along: only a line can hold it.
TRUNCATED = [b'{"event_type":"users.messages.email.Op', b'{"event_type":"a\\', b"{", b"]", b"\xff\xfe", b""]


@settings(deadline=None)
@given(st.lists(st.sampled_from(GOOD) | st.sampled_from(ODD), max_size=12), st.booleans())
def test_a_good_event_is_the_same_in_any_company(events: list[bytes], as_body: bool) -> None:
    """One odd event never changes the others: each good one's bytes are those it has alone, in order, none missing."""
    outcome = mapped(*events, as_body=as_body)
    good = [ALONE[event] for event in events if event in ALONE]
    assert [form for form in outcome.forms if form in good] == good
    assert len(outcome.forms) + len(outcome.skips) + len(outcome.refusals) == len(events)
    assert len(outcome.codes) == len(outcome.forms)


@settings(deadline=None)
@given(st.lists(st.sampled_from([*GOOD, *ODD, *TRUNCATED]), max_size=12))
def test_a_broken_line_costs_only_itself(lines: list[bytes]) -> None:
    """Lines stand for themselves: even a string or a bracket that doesn't end stops at the line's end."""
    outcome = mapped(*lines)
    assert sorted(f for f in outcome.forms if f in ALONE.values()) == sorted(ALONE[x] for x in lines if x in ALONE)
    assert len(outcome.forms) + len(outcome.skips) + len(outcome.refusals) == len([x for x in lines if x])


@pytest.mark.parametrize("poison", ODD, ids=range(len(ODD)))
@pytest.mark.parametrize("bare", [False, True])
def test_a_poison_event_in_a_body_costs_only_itself(poison: bytes, bare: bool) -> None:
    """Braze must not have to send a hundred events one by one because no parser takes one of them."""
    array = b"[%s,%s,%s]" % (GOOD[0], poison, GOOD[2])
    decoded = body_of(DEFAULT.schema, array if bare else b'{"events":%s}' % array)
    assert decoded is not None
    outcome = DEFAULT.map(decoded, NOW_S)
    forms = [msgspec.json.encode(form) for form in outcome.forms]
    assert {ALONE[GOOD[0]], ALONE[GOOD[2]]} <= set(forms)
    assert len(forms) + len(outcome.skips) + len(outcome.refusals) == 3
    assert all(refusal.original == poison for refusal in outcome.refusals)


def test_the_reason_and_the_bytes_of_a_refused_event_are_its_own() -> None:
    """In a batch of several odd ones each dead letter holds what came, not its neighbour."""
    events = [custom_event({"a": nested(20 + n)}) | {"id": f"n{n}"} for n in range(5)]
    events += [currents(user={"external_user_id": each}) for each in ("0", "unknown")]
    for as_body in (False, True):
        refusals = mapped(GOOD[4], *events, GOOD[6], as_body=as_body).refusals
        assert sorted(r.original for r in refusals) == sorted(map(msgspec.json.encode, events))
        assert all(("'unknown'" in r.reason) == (b'"unknown"' in r.original) for r in refusals)


# -- ill-typed events of what isn't wanted -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event_type", "settings_", "skip"),
    [
        (CUSTOM, {"customer_behavior": False}, Skip(code_of(CUSTOM), "not selected")),
        (CUSTOM, {"exclude": (CUSTOM,)}, Skip(code_of(CUSTOM), "not selected")),
        (OPEN, {"message_engagement": False}, Skip(code_of(OPEN), "not selected")),
        (UNHEARD_OF, {"unknown": "skip"}, Skip(UNKNOWN_CODE, "unknown event type")),
        (UNHEARD_OF, {"unknown": "forward", "exclude": (UNHEARD_OF,)}, Skip(UNKNOWN_CODE, "not selected")),
        (UNHEARD_OF, {"unknown": "skip", "include": (UNHEARD_OF,)}, None),
        (UNHEARD_OF, {}, None),
        (CUSTOM, {}, None),
    ],
)
@pytest.mark.parametrize("changes", [{"time": "yesterday"}, {"properties": [1]}, {"user": {"external_user_id": 5}}])
def test_what_is_switched_off_makes_no_dead_letters(
    event_type: str, settings_: dict[str, Any], skip: Skip | None, changes: dict[str, Any]
) -> None:
    """Switched off is skipped and counted, ill-typed or not: such dead letters pushed out those that somebody wants."""
    by = made(EVENT_TYPES, **settings_)
    outcome = mapped(currents() | {"event_type": event_type} | changes, by=by)
    assert outcome.forms == []
    assert outcome.skips == ([] if skip is None else [skip])
    assert len(outcome.refusals) == (skip is None)
