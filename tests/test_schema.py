"""The decoders: no input makes them raise, none makes them lose count, and the scanner cuts as a parser would."""

import json
from typing import Any

import msgspec
import pytest
from conftest import currents
from hypothesis import given, settings
from hypothesis import strategies as st

from bridged.currents.schema import UNDECODABLE_CODE, UNKNOWN_CODE, Decoded, Schema, iter_types, scanned
from bridged.currents.table import EVENT_TYPES
from bridged.mixpanel.mapping import EventMapping, MappingSettings

SCHEMA: Schema = EventMapping(EVENT_TYPES, MappingSettings()).schema


def body_of(schema: Schema, data: bytes) -> Decoded | None:
    """A Custom HTTP body as the intake takes it. None: it isn't JSON."""
    plain = schema.plain_body(data)
    elements = schema.elements(data) if plain is None else None
    return plain if elements is None else schema.lines(elements)


CODES = {row.event_type: code for code, row in enumerate(EVENT_TYPES)}

# What real bodies are made of, whole or broken: arbitrary bytes alone would never get past the first bracket.
PIECES = [
    b'{"events":[',
    b'{"events":',
    b"]}",
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b":",
    b'"',
    b"\\",
    b'\\"',
    b'"events"',
    b'"event_type":',
    b'"users.messages.email.Open"',
    b'"users.behaviors.CustomEvent"',
    b'"properties":{"name":"n","custom_properties":{"a":[1]}}',
    b'"time":1',
    b'"user":{"external_user_id":"u"}',
    b'"id":"\\ud800"',
    b"null",
    b"true",
    b"NaN",
    b"1e999",
    b"-" + b"9" * 4400,
    b"18446744073709551616",
    b"\xef\xbb\xbf",
    b"\xff",
    b"\x00",
    b" ",
    b"\n",
    b"\r\n",
    b"[" * 2000,
    msgspec.json.encode(currents()),
    b"[" + msgspec.json.encode(currents("users.messages.survey.Response")) + b"]",
]
junk = st.one_of(
    st.binary(max_size=200),
    st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join),
    st.lists(st.sampled_from(PIECES) | st.binary(max_size=4), max_size=12).map(b"".join),
)


def outcomes(decoded: Decoded) -> int:
    """Into how many pieces an input came apart."""
    return len(decoded.events) + len(decoded.refusals) + len(decoded.unknown)


def decoded_body(data: bytes) -> Decoded:
    """What a body held that is JSON."""
    decoded = body_of(SCHEMA, data)
    assert decoded is not None
    return decoded


@settings(deadline=None, max_examples=300)
@given(st.lists(junk, max_size=8))
def test_every_line_has_one_outcome(lines: list[bytes]) -> None:
    """Whatever the bytes: each line that isn't blank is an event, a refusal or an unknown type, and blank ones nothing."""
    decoded = SCHEMA.lines(lines)
    assert outcomes(decoded) == sum(bool(line.removeprefix(b"\xef\xbb\xbf").strip()) for line in lines)
    originals = decoded.originals()
    assert len(originals) >= len(decoded.events)
    for event, original in zip(decoded.events, originals, strict=False):
        assert SCHEMA.lines([original]).events[0].code == event.code
        assert isinstance(SCHEMA.unknown_fields(event.code, original), list)


@settings(deadline=None, max_examples=500)
@given(junk)
def test_no_body_raises(data: bytes) -> None:
    """Whatever the bytes: a body is decoded, or isn't JSON; and for every event there are the bytes it came as."""
    decoded = body_of(SCHEMA, data)
    if decoded is not None:
        for event, original in zip(decoded.events, decoded.originals(), strict=True):
            assert SCHEMA.lines([bytes(original)]).events[0].code == event.code


@given(junk, st.integers(0, 255))
def test_looking_for_unknown_fields_never_raises(data: bytes, code: int) -> None:
    """A sample is taken of whatever was accepted; it must not be the thing that fails."""
    assert isinstance(SCHEMA.unknown_fields(code, data), list)


# -- lines -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n", b" \t\n"])
def test_line_endings(ending: bytes) -> None:
    """Lines may keep their newline, of any system, and blanks around them."""
    line = msgspec.json.encode(currents())
    decoded = SCHEMA.lines([line + ending, ending, b"  " + line + ending])
    assert (len(decoded.events), outcomes(decoded)) == (2, 2)


def test_a_byte_order_mark_is_no_part_of_an_event() -> None:
    """Files written by some systems begin with one."""
    line = msgspec.json.encode(currents())
    decoded = SCHEMA.lines([b"\xef\xbb\xbf" + line, line])
    assert [event.code for event in decoded.events] == [CODES["users.messages.email.Open"]] * 2
    assert outcomes(decoded_body(b"\xef\xbb\xbf" + b'{"events":[%s]}' % line)) == 1


def test_two_events_on_a_line_are_no_event() -> None:
    """Acks count lines: a line that holds two is kept as one dead letter, and nothing of it is sent."""
    line = msgspec.json.encode(currents())
    decoded = SCHEMA.lines([line + line, line])
    assert (len(decoded.events), len(decoded.refusals)) == (1, 1)
    assert decoded.refusals[0].original == line + line


@pytest.mark.parametrize(
    ("line", "code", "reason"),
    [
        (b"nonsense", UNDECODABLE_CODE, "not valid JSON"),
        (b'{"event_type":"users.messages.email.Open"', UNDECODABLE_CODE, "not valid JSON"),
        (b'{"event_type":"users.messages.email.Open","id":"\\ud83d"}', UNDECODABLE_CODE, "half of a surrogate pair"),
        (b'{"event_type":"users.messages.email.Open","id":"\\ud83d', UNDECODABLE_CODE, "truncated"),
        (b"{}", UNDECODABLE_CODE, "no event_type"),
        (b"5", UNDECODABLE_CODE, "no event_type: this is not a Currents event"),
        (b'{"events":[{"event_type":"users.messages.email.Open"}]}', UNDECODABLE_CODE, "a whole request body"),
        (b'{"event":"Email Open","properties":{}}', UNDECODABLE_CODE, "as Mixpanel gets it; bridged replay"),
        (b'{"event_type":null}', UNDECODABLE_CODE, "no event_type"),
        (b'{"event_type":" "}', UNDECODABLE_CODE, "no event_type"),
        (b'{"event_type":"users.messages.email.Open"}', CODES["users.messages.email.Open"], "time"),
        (b'{"event_type":"users.messages.email.Open","time":"1"}', CODES["users.messages.email.Open"], "$.time"),
        (
            b'{"event_type":"users.messages.email.Open","time":1,"properties":{"url":"u","send_time":"x"}}',
            CODES["users.messages.email.Open"],
            "$.properties.send_time",
        ),
        (
            b'{"event_type":"users.messages.email.Open","time":1,"id":"\xe9"}',
            CODES["users.messages.email.Open"],
            "not valid UTF-8",
        ),
        (b'{"event_type":"\xe9","time":1}', UNDECODABLE_CODE, "not valid UTF-8"),
        (b'{"event_type":"x.y","time":1,"id":"\xe9"}', UNKNOWN_CODE, "unknown event type, and not valid UTF-8"),
        (b'{"event_type":"x.y","time":1.5}', UNKNOWN_CODE, "unknown event type, and ill-typed"),
        (b'{"event_type":"x.y","time":1,"properties":[1]}', UNKNOWN_CODE, "$.properties"),
    ],
)
def test_a_refusal_says_what_is_wrong(line: bytes, code: int, reason: str) -> None:
    """A dead letter is accounted under its type as far as that can be read, and names the field at fault."""
    (refusal,) = SCHEMA.lines([line]).refusals
    assert (refusal.code, refusal.original) == (code, line)
    assert reason in refusal.reason


@pytest.mark.parametrize(
    "line",
    [
        b'{"event_type":"users.messages.email.Open","time":1,"id":"%s","n":NaN}',
        b'{"event_type":"users.messages.email.Open","time":1,"user":{"device_id":"%s"},"properties":{"url":"\\udc00"}}',
        b'{"event_type":"users.messages.email.Open","time":1,"id":"%s\xe9"}',
        b'{"event_type":"x.y","time":1,"id":"%s\xe9"}',
        b'{"event_type":"users.messages.email.Open","id":"%s","time":nonsense}',
    ],
    ids=["NaN", "surrogate", "utf-8", "utf-8 of an unknown type", "nonsense"],
)
def test_the_same_fault_has_the_same_reason(line: bytes) -> None:
    """Wherever it lies in the event: dead letters are counted by their reason, and a thousand of one kind are one group."""
    refusals = SCHEMA.lines([line % (b"x" * length) for length in range(30)]).refusals
    (reason,) = {refusal.reason for refusal in refusals}
    assert len(refusals) == 30
    assert "position" not in reason


def test_bad_lines_cost_the_same_however_many_there_are() -> None:
    """A client that sends nonsense must not stop the loop: by the square this would take minutes."""
    good = msgspec.json.encode(currents())
    decoded = SCHEMA.lines([b"nonsense", good] * 50_000)
    assert (len(decoded.refusals), len(decoded.events)) == (50_000, 50_000)
    assert len(decoded.originals()) == 50_000


# -- bodies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "probe",
    [
        b"",
        b"  \n",
        b"\xef\xbb\xbf",
        b"{}",
        b" { } ",
        b'{"events":[]}',
        b'{ "events" : null }',
        b"[]",
        b'{"events":[],"a":1}',
    ],
)
def test_a_body_without_events_is_a_probe(probe: bytes) -> None:
    """Braze checks a credential with nothing in hand: there is no event in it, and nothing is wrong with it."""
    assert outcomes(decoded_body(probe)) == 0


@pytest.mark.parametrize(
    "body",
    [
        b"nonsense",
        b"{",
        b"}",
        b"[",
        b"]",
        b'{"events":[',
        b'{"events":[{]}',
        b'"open',
        b"NaN",
        b"{}}",
        b"\xff",
        b"[1]]",
        b"1 2",
        b"[1] x",
        b'{"events":[NaN]} x',
    ],
)
def test_what_is_not_json(body: bytes) -> None:
    """Only this is answered 400; Braze then sends the events one by one."""
    assert body_of(SCHEMA, body) is None


@pytest.mark.parametrize(
    "form", [b"%s", b"[%s]", b'{"events":[%s]}', b'{"a":{"events":[1]},"events":[%s]}', b' {"events" : [ %s ] }\n']
)
def test_forms_of_a_body(form: bytes) -> None:
    """Braze's own form; an array or a lone event will do; so a batch can be resent by hand, or with other members."""
    event = msgspec.json.encode(currents())
    decoded = decoded_body(form % event)
    assert [each.code for each in decoded.events] == [CODES["users.messages.email.Open"]]
    assert [bytes(each) for each in decoded.originals()] == [event]


@pytest.mark.parametrize("events", [[], None, {}, 5])
def test_a_lone_event_is_no_probe(events: Any) -> None:
    """Not even one with a member of its own that is called events: answered 200, it would be lost."""
    event = msgspec.json.encode(currents() | {"events": events})
    decoded = decoded_body(event)
    assert [each.code for each in decoded.events] == [CODES["users.messages.email.Open"]]
    assert [bytes(each) for each in decoded.originals()] == [event]


@pytest.mark.parametrize(
    "body",
    [
        b"5",
        b'"text"',
        b"null",
        b'{"a":1}',
        b'{"events":5}',
        b'{"events":{}}',
        b'{"a":"\xff"}',
        b'{"a":%s}' % (b"1" * 5000),
    ],
)
def test_json_without_events_is_one_dead_letter(body: bytes) -> None:
    """It may be something of worth in a form we don't know: kept, not answered 400, never lost."""
    decoded = decoded_body(body)
    assert [refusal.original for refusal in decoded.refusals] == [body]
    assert outcomes(decoded) == 1


def test_two_bodies_in_one_are_not_json() -> None:
    """Taking the first and answering 200 would lose the second."""
    body = b'{"events":[%s]}' % msgspec.json.encode(currents())
    assert body_of(SCHEMA, body + body) is None
    assert body_of(SCHEMA, body.replace(b"]", b",NaN]") + body) is None
    assert body_of(SCHEMA, b"[1],[2]") is None


def test_the_last_of_two_members_called_events_counts() -> None:
    """As in every parser, whether or not one of them can be parsed."""
    one, other = (msgspec.json.encode(currents(id=name)) for name in ("one", "other"))
    for first in (one, b"NaN"):
        decoded = decoded_body(b'{"events":[%s],"events":[%s]}' % (first, other))
        assert [event.id for event in decoded.events] == ["other"]


def test_a_member_called_events_inside_an_element_is_part_of_it() -> None:
    """The scanner cuts at the array of the body, not at one of the customer's."""
    inner = b'{"events":[1,2],"x":NaN}'
    assert scanned(b'{"events":[%s,%s]}' % (inner, inner)) == [inner, inner]
    assert scanned(b"[%s,%s]" % (inner, inner)) == [inner, inner]
    # Not JSON, but nothing of it may get lost.
    assert scanned(b'[1,"events":[2],3]') == [b"1", b'"events":[2]', b"3"]


tricky_text = st.text(st.sampled_from('[]{},:"\\/ ab\néevents'), max_size=12) | st.sampled_from(
    ["events", '"', "\\", ""]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | tricky_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(tricky_text, inner, max_size=4),
    max_leaves=20,
)
spacings = st.sampled_from([(None, (",", ":")), (None, (", ", ": ")), (1, (",", " : "))])


def written(value: Any, spacing: Any, ascii_only: bool) -> bytes:
    """JSON, in one of the ways that people write it."""
    indent, separators = spacing
    return json.dumps(value, indent=indent, separators=separators, ensure_ascii=ascii_only).encode()


@settings(deadline=None, max_examples=300)
@given(st.lists(json_values, max_size=5), spacings, st.booleans())
def test_the_scanner_cuts_an_array_as_a_parser_does(array: list[Any], spacing: Any, ascii_only: bool) -> None:
    """Brackets, commas, quotes and escapes inside strings don't mislead it."""
    found = scanned(written(array, spacing, ascii_only))
    assert found is not None
    assert [json.loads(each) for each in found if each.strip()] == array


@settings(deadline=None, max_examples=300)
@given(
    st.dictionaries(tricky_text, json_values, max_size=3), st.lists(json_values, max_size=4), spacings, st.booleans()
)
def test_the_scanner_finds_the_events_of_a_body(
    others: dict[str, Any], events: list[Any], spacing: Any, ascii_only: bool
) -> None:
    """Whatever other members a body has before and after, and however deep they are."""
    body = written(others | {"events": events} | {"z": others}, spacing, ascii_only)
    found = scanned(body)
    assert found is not None
    assert [json.loads(each) for each in found if each.strip()] == events
    elements = SCHEMA.elements(body)
    assert [each.strip() for each in elements or []] == [each.strip() for each in found if each.strip()]


@settings(deadline=None, max_examples=300)
@given(json_values, spacings)
def test_the_scanner_takes_other_json_as_one(value: Any, spacing: Any) -> None:
    """JSON that holds no array of events is one element, whole: nothing gets lost."""
    body = written(value, spacing, ascii_only=True)
    if isinstance(value, list) or (isinstance(value, dict) and isinstance(value.get("events"), list)):
        return
    assert scanned(body) == [body]


@pytest.mark.parametrize("body", [b'"' + b'\\"' * 500_000, b'{"events":[{"a":"' + b'\\"x' * 300_000, b'["' * 400_000])
def test_the_scanner_looks_at_each_byte_once(body: bytes) -> None:
    """A body is up to 16 MiB, and the loop is one: by the square of a string that doesn't end this would take an hour."""
    assert body_of(SCHEMA, body) is None


# -- fields that Braze added -------------------------------------------------------------------------------------------


def test_unknown_fields_are_noticed() -> None:
    """A property that the row doesn't have is named; what the row, the customer or the door account for is not."""
    event = currents("users.behaviors.Purchase")
    event["properties"] |= {"brand_new": 1, "purchase_properties": {"a": 1}}
    code = CODES["users.behaviors.Purchase"]
    assert SCHEMA.unknown_fields(code, msgspec.json.encode(event)) == ["brand_new"]
    assert SCHEMA.unknown_fields(CODES["users.messages.landingpage.Click"], msgspec.json.encode(event)) == []


@pytest.mark.parametrize(
    ("event_type", "names"),
    [
        ("users.behaviors.Purchase", ["productId", "distinct_id", "name", "ip", "custom", "renamed_product_id"]),
        ("users.behaviors.CustomEvent", ["token", "$insert_id", "time"]),
        ("users.messages.contentcard.Click", ["card_id", "device_id", "name", "custom_properties"]),
    ],
)
def test_fields_named_as_ours_are_unknown_all_the_same(event_type: str, names: list[str]) -> None:
    """What the mapping itself writes under a name isn't forwarded when it comes from Braze, so it is told of."""
    line = msgspec.json.encode({"event_type": event_type, "time": 1, "properties": dict.fromkeys(names, "x")})
    for before in (b"", b"\xef\xbb\xbf"):
        assert SCHEMA.unknown_fields(CODES[event_type], before + line) == names


@pytest.mark.parametrize("row", EVENT_TYPES, ids=lambda row: row.event_type)
@pytest.mark.parametrize("naming", ["seed", "current"])
def test_documented_fields_are_known(row: Any, naming: str) -> None:
    """No documented field is ever reported as new, in either naming."""
    schema = EventMapping((row,), MappingSettings(naming=naming)).schema  # type: ignore[arg-type]
    event = {"event_type": row.event_type, "time": 1, "properties": dict.fromkeys(row.properties)}
    assert schema.unknown_fields(0, msgspec.json.encode(event)) == []


def test_codes_are_positions_and_names_are_told_once() -> None:
    """Every code has one name, and the two codes for what has no row are beyond every row."""
    names = dict(iter_types(EVENT_TYPES))
    assert len(set(names.values())) == len(names) == len(EVENT_TYPES) + 2
    assert len(EVENT_TYPES) <= UNKNOWN_CODE
    assert {UNKNOWN_CODE, UNDECODABLE_CODE} <= set(names)


# -- other spellings of the same ---------------------------------------------------------------------------------------

CLICK = "users.messages.sms.ShortLinkClick"
PURCHASE = "users.behaviors.Purchase"
ATTEMPTS = next(row.event_type for row in EVENT_TYPES if "attempt_count" in row.properties)


@pytest.mark.parametrize("time", [b"1789999990.0", b"1.78999999e9", b"178999999E1", b"1789999990.000"])
@pytest.mark.parametrize("event_type", ["users.messages.email.Open", "users.messages.survey.Response", "x.y"])
def test_a_whole_number_may_be_written_as_a_float(time: bytes, event_type: str) -> None:
    """JSON has one kind of number: what a relay that keeps them as doubles hands on is the same event, and was all lost."""
    decoded = SCHEMA.lines([b'{"time":%s,"event_type":"%s","id":"a"}' % (time, event_type.encode())])
    assert decoded.refusals == []
    [event] = decoded.events or [unknown for _, unknown, _ in decoded.unknown]
    assert (event.time, type(event.time)) == (1789999990, int)


def property_of(event_type: str, name: str, value: bytes) -> Any:
    """A property, decoded from these bytes; the reason, where it is refused."""
    line = b'{"event_type":"%s","time":1,"properties":{"%s":%s}}' % (event_type.encode(), name.encode(), value)
    decoded = SCHEMA.lines([line])
    return decoded.refusals[0].reason if decoded.refusals else getattr(decoded.events[0].properties, name)


def test_what_of_a_property_is_the_same() -> None:
    """As for the time: 3.0 is 3; a list's nulls are nothing; no customer's properties are none, however that is written."""
    assert property_of(ATTEMPTS, "attempt_count", b"3.0") == 3
    assert property_of(ATTEMPTS, "attempt_count", b"-0.0") == 0
    assert property_of(CLICK, "suspected_bot_click_reason", b'[null,"a",null,"b"]') == ["a", "b"]
    assert property_of(CLICK, "suspected_bot_click_reason", b"[null]") == []
    for nothing in (b'""', b"[]", b" [ ] ", b"null"):
        line = b'{"event_type":"%s","time":1,"properties":{"purchase_properties":%s,"price":3}}'
        decoded = SCHEMA.lines([line % (PURCHASE.encode(), nothing)])
        assert (decoded.events[0].properties.custom, decoded.events[0].properties.price) == (None, 3.0)


@pytest.mark.parametrize("event_type", ["users.messages.email.Open", "users.messages.survey.Response", "x.y"])
def test_no_members_may_be_an_empty_list(event_type: str) -> None:
    """PHP writes `{}` so, of the user and of all properties as of the customer's own: such an event was a dead letter."""
    for nothing in (b"[]", b"[ ]", b'""'):
        line = b'{"event_type":"%s","time":1,"user":%s,"properties":%s}' % (event_type.encode(), nothing, nothing)
        without = b'{"event_type":"%s","time":1}' % event_type.encode()
        found, plain = SCHEMA.lines([line]), SCHEMA.lines([without])
        assert found.events == plain.events
        assert [event for _, event, _ in found.unknown] == [event for _, event, _ in plain.unknown]
        assert len(plain.events + plain.unknown) == 1
        assert SCHEMA.lines([line]).refusals == []
    for something in (b"[1]", b'"x"', b"0", b"false"):
        for member in (b"user", b"properties"):
            [refusal] = SCHEMA.lines(
                [b'{"event_type":"%s","time":1,"%s":%s}' % (event_type.encode(), member, something)]
            ).refusals
            assert f"$.{member.decode()}" in refusal.reason


def test_the_reason_says_where() -> None:
    """Also of what the lenient reading fails at: it said `$[...]`, and left out which property it was."""
    for name, properties in (
        ("custom_properties", b'{"name":"n","custom_properties":{"a":{"b":1e999}}}'),
        ("name", b'{"name":1e999,"custom_properties":{}}'),
    ):
        line = b'{"event_type":"users.behaviors.CustomEvent","time":1,"properties":%s}' % properties
        [refusal] = SCHEMA.lines([line]).refusals
        assert f"$.properties.{name}" in refusal.reason


@pytest.mark.parametrize(
    ("event_type", "name", "value"),
    [
        (ATTEMPTS, "attempt_count", b"3.5"),
        (ATTEMPTS, "attempt_count", b'"3"'),
        (ATTEMPTS, "attempt_count", b"true"),
        (ATTEMPTS, "attempt_count", b"1e300"),
        (ATTEMPTS, "attempt_count", b"[3.0]"),
        (CLICK, "suspected_bot_click_reason", b"[1]"),
        (CLICK, "suspected_bot_click_reason", b'"a"'),
        (PURCHASE, "price", b'"9.99"'),
        (PURCHASE, "purchase_properties", b'"x"'),
        (PURCHASE, "purchase_properties", b"[1]"),
        (PURCHASE, "purchase_properties", b"0"),
        ("users.messages.email.Open", "machine_open", b"true"),
    ],
)
def test_what_of_a_property_is_not_the_same(event_type: str, name: str, value: bytes) -> None:
    """A property of another type stays a dead letter that names it: text is no number, and nobody guesses."""
    assert f"$.properties.{name}" in property_of(event_type, name, value)


def test_what_is_mended_leaves_the_rest_as_it_came() -> None:
    """The customer's own numbers keep their spelling, and what is wrong besides is what the reason tells."""
    line = (
        b'{"event_type":"%s","time":1.0,"properties":{"purchase_properties":{"a":3.0,"b":[null]}}}' % PURCHASE.encode()
    )
    [event] = SCHEMA.lines([line]).events
    assert msgspec.json.encode(event.properties.custom) == b'{"a":3.0,"b":[null]}'
    [refusal] = SCHEMA.lines([line.replace(b"{}", b"").replace(b'{"a":3.0,"b":[null]}', b"5")]).refusals
    assert "$.properties.purchase_properties" in refusal.reason
