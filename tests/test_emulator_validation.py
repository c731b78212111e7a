"""The rules for records, the sorting of a batch and the rolling minute: pure, so no server here."""

import gzip
import json
import string

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridged.emulator.batch import sort
from bridged.emulator.bodies import inflate, loose, records
from bridged.emulator.limits import Window
from bridged.emulator.validation import (
    EARLIEST_MS,
    EARLIEST_S,
    INSERT_ID_LETTERS,
    MAX_AHEAD_S,
    REFUSED_IDS,
    Rules,
    check,
    stored_time,
)
from bridged.errors import BadRequest, TooLarge

unhurried = settings(deadline=None)  # a busy machine is no failure
NOW = 1_800_000_000
RULES = Rules()
LAX = Rules(strict=False)
SOUND = {"time": NOW - 60, "distinct_id": "user-1", "$insert_id": "5b1c7c0e-0001", "ip": 0}


def event(**properties):
    """A sound event with some properties changed; `...` takes one away."""
    merged = {key: value for key, value in (SOUND | properties).items() if value is not ...}
    return {"event": "Email Open", "properties": merged}


def verdict(record, rules=RULES):
    """What the rule book says of a record."""
    return check(record, len(json.dumps(record)), NOW, rules)


def nested(depth, kind=dict):
    """Objects or lists inside each other."""
    value = "leaf"
    for _ in range(depth):
        value = {"k": value} if kind is dict else [value]
    return value


def test_sound_event_is_taken():
    """An event with all that is required passes."""
    assert verdict(event()) is None


@pytest.mark.parametrize(
    ("record", "field", "message"),
    [
        ("text", "", "record is invalid: must be an object"),
        ({"properties": SOUND}, "event", "'event' must not be missing or blank"),
        ({"event": " ", "properties": SOUND}, "event", "'event' must not be missing or blank"),
        ({"event": 7, "properties": SOUND}, "event", "'event' is invalid: must be a string"),
        ({"event": "\udcff", "properties": SOUND}, "event", "'event' is invalid: string should be valid utf8"),
        ({"event": "x"}, "properties", "'properties' must not be missing"),
        ({"event": "x", "properties": []}, "properties", "'properties' is invalid: must be an object"),
        (event(time=...), "properties.time", "'properties.time' is invalid: must not be missing"),
        (
            event(distinct_id=...),
            "properties.distinct_id",
            "'properties.distinct_id' is invalid: must not be missing",
        ),
        (event(distinct_id=7), "properties.distinct_id", "'properties.distinct_id' is invalid: must be a string"),
        (
            event(distinct_id="Anonymous"),
            "properties.distinct_id",
            "'properties.distinct_id' is invalid: 'Anonymous' is not allowed",
        ),
        (event(**{"$insert_id": ...}), "$insert_id", "'$insert_id' is invalid: must not be missing"),
        (event(**{"$insert_id": ""}), "$insert_id", "'$insert_id' is invalid: must not be missing"),
        (event(**{"$insert_id": 12}), "$insert_id", "'$insert_id' is invalid: must be a string"),
        (event(**{"$insert_id": "null"}), "$insert_id", "'$insert_id' is invalid: 'null' is not allowed"),
        (
            event(**{"$insert_id": "a" * 37}),
            "$insert_id",
            "'$insert_id' is invalid: must not be longer than 36 bytes",
        ),
        (
            event(**{"$insert_id": "a:b"}),
            "$insert_id",
            "'$insert_id' is invalid: must only contain alphanumeric or hyphen '-' characters",
        ),
        (
            event(utm_source="\udcff"),
            "properties.utm_source",
            "properties.utm_source is invalid: string should be valid utf8",
        ),
        (
            event(**{"k\udcff": 1}),
            "properties",
            "'properties' is invalid: property name should be valid utf8",
        ),
        (event(a=["\udcff"]), "properties.a", "properties.a is invalid: string should be valid utf8"),
        (event(a={"\udcff": 1}), "properties.a", "properties.a is invalid: string should be valid utf8"),
    ],
)
def test_refusals_name_field_and_reason(record, field, message):
    """Each refusal carries the field and the words that a sender will show to a person."""
    assert verdict(record) == (field, message)


@pytest.mark.parametrize("time", ["1800000000", 1.5e9, True, None, [], "now"])
def test_time_must_be_an_integer(time):
    """Strict imports refuse times that are text, fractions or anything else."""
    assert verdict(event(time=time))[0] == "properties.time"


@pytest.mark.parametrize(
    ("time", "taken"),
    [
        (EARLIEST_S, True),
        (EARLIEST_S - 1, False),
        (0, False),
        (-5, False),
        (EARLIEST_MS, True),
        (EARLIEST_MS - 1, False),
        (NOW * 1000, True),
        (NOW + MAX_AHEAD_S, True),
        (NOW + MAX_AHEAD_S + 1, False),
        ((NOW + MAX_AHEAD_S) * 1000, True),
        ((NOW + MAX_AHEAD_S) * 1000 + 1, False),
        (10**30, False),
    ],
)
def test_time_has_a_floor_and_a_ceiling(time, taken):
    """Seconds and milliseconds are told apart, and both edges are exact."""
    failure = verdict(event(time=time))
    assert (failure is None) == taken
    assert taken or failure[0] == "properties.time"


@pytest.mark.parametrize(
    ("time", "stored"),
    [
        (NOW, None),
        (NOW - 1, None),
        (NOW + 1, NOW),
        (NOW * 1000, None),
        (NOW * 1000 + 1, NOW * 1000),
        (None, NOW),
        (NOW - 0.5, None),
        (NOW + 0.5, NOW),
        (str(NOW - 7), NOW - 7),
        (f"{NOW - 7}.5", NOW - 7),
        (str(NOW + 7), NOW),
    ],
)
def test_the_hour_ahead_is_overwritten(time, stored):
    """A time that lies ahead becomes the time of arrival, in its own unit; any other is kept, one with a fraction or in a
    string as well.
    """
    assert stored_time(time, NOW) == stored


@pytest.mark.parametrize("refused", sorted(REFUSED_IDS))
def test_placeholder_ids_are_refused_in_any_case(refused):
    """Ids that stand for nobody would fold many users into one."""
    assert verdict(event(distinct_id=refused))[0] == "properties.distinct_id"
    assert verdict(event(distinct_id=refused.upper()))[0] == "properties.distinct_id"


def test_empty_distinct_id_means_no_user():
    """An empty distinct_id is the documented way of saying that there is no user."""
    assert verdict(event(distinct_id="")) is None


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({f"p{n}": n for n in range(250)}, None),
        ({f"p{n}": n for n in range(251)}, "properties"),
        ({"a": list(range(254))}, None),
        ({"a": list(range(255))}, "properties.a"),
        ({"a": {str(n): n for n in range(254)}}, None),
        ({"a": {str(n): n for n in range(255)}}, "properties.a"),
        ({"a": nested(10)}, None),
        ({"a": nested(11)}, "properties.a"),
        ({"a": nested(10, list)}, None),
        ({"a": nested(11, list)}, "properties.a"),
        ({"a": nested(5000, list)}, "properties.a"),
        ({"a": ["x" * 100] * 79}, None),
        ({"a": ["x" * 100] * 80}, "properties.a"),
        ({"a": "x" * 100_000}, None),
        ({"a": 10**40}, None),
    ],
)
def test_size_of_properties_is_bounded(extra, field):
    """Number, keys, elements, depth and bytes of properties have exact limits; a long string does not matter."""
    failure = check(event(**extra), 1000, NOW, RULES)
    assert (failure and failure[0]) == field


def test_event_must_be_smaller_than_a_megabyte():
    """The limit itself is already too much."""
    assert check(event(), 999_999, NOW, RULES) is None
    assert check(event(), 1_000_000, NOW, RULES)[0] == "event"


def test_foreign_token_is_refused_when_the_project_is_known():
    """The credential names the project; a record that contradicts it fails, one that says nothing passes."""
    rules = Rules(token="mine")
    assert verdict(event(token="mine"), rules) is None
    assert verdict(event(), rules) is None
    assert verdict(event(token="other"), rules)[0] == "properties.token"
    assert verdict(event(token="other")) is None


@pytest.mark.parametrize(
    ("record", "taken"),
    [
        (event(distinct_id="anon", **{"$insert_id": ...}), True),
        (event(time=...), True),
        (event(time="1700000000"), True),
        (event(time="soon"), False),
        (event(time=float("inf")), False),
        (event(time=12), False),
    ],
)
def test_lax_rules_overlook_ids_but_not_times(record, taken):
    """The endpoints that are not strict take events without ids, as their clients send them."""
    assert (check(record, 100, NOW, LAX) is None) == taken


def encode(record):
    """A record as a sender writes it."""
    return json.dumps(record, separators=(",", ":")).encode()


def outcome(lines, rules=RULES):
    """The places of the records that a batch takes, and of those that fail."""
    batch = sort(lines, NOW, rules)
    return sorted(batch.indexes), [failed.index for failed in batch.failed]


insert_ids = st.one_of(
    st.text(INSERT_ID_LETTERS.decode(), max_size=38), st.sampled_from(sorted(REFUSED_IDS)), st.text(max_size=38)
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.text(string.printable + "é😀{[,\\", max_size=30))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner)),
    max_leaves=8,
)
times = st.one_of(
    st.integers(EARLIEST_S - 10, EARLIEST_S + 10),
    st.integers(NOW - 10, NOW + MAX_AHEAD_S + 10),
    st.integers(NOW * 1000 - 10, (NOW + MAX_AHEAD_S) * 1000 + 10),
    scalars,
)
events = st.fixed_dictionaries(
    {
        "event": st.one_of(st.just("Email Open"), st.sampled_from(["[Braze] {x}", "$merge", " ", ""]), scalars),
        "properties": st.builds(
            lambda extra, known: SOUND | extra | known,
            st.dictionaries(st.text(max_size=5), values, max_size=5),
            st.fixed_dictionaries(
                {},
                optional={
                    "time": times,
                    "distinct_id": st.one_of(st.sampled_from(["", "anon", "user"]), scalars),
                    "$insert_id": insert_ids,
                    "token": st.sampled_from(["mine", "other"]),
                    "$ignore": scalars,
                },
            ),
        ),
    }
)


@unhurried
@given(st.lists(events, max_size=6), st.sampled_from([RULES, LAX, Rules(token="mine")]))
def test_the_short_way_agrees_with_the_rule_book(batch, rules):
    """`is_plain` only ever skips work: what a batch takes and refuses is what `check` says of each record alone."""
    if not rules.strict:
        batch = [record for record in batch if record["properties"].get("distinct_id") != "anon"]
    lines = [encode(record) for record in batch]
    refused = [i for i, line in enumerate(lines) if check(json.loads(line), len(line), NOW, rules)]
    kept = [i for i, record in enumerate(batch) if i not in refused and not record["properties"].get("$ignore")]

    taken, failed = outcome(lines, rules)

    assert (taken, failed) == (kept, refused)


@unhurried
@given(st.binary(max_size=60), st.sampled_from([b'"x"', b'{"a":%s}', b'{"event":"x","properties":{"p":"%s"}}']))
def test_any_bytes_are_judged_or_called_bad(junk, shape):
    """No body makes the emulator fail in a way that is not a refusal."""
    line = shape.replace(b"%s", junk)
    try:
        batch = sort([line], NOW, RULES)
    except BadRequest:
        return
    assert [failed.index for failed in batch.failed] == [0]
    msgspec.json.encode(batch.failed)


@unhurried
@given(events)
def test_a_record_with_bad_utf8_fails_alone(record):
    """Bytes that are not UTF-8, even in a property that nothing looks at, cost their own record only."""
    bad = encode(event(note="NOTE")).replace(b"NOTE", b"caf\xe9")
    taken, failed = outcome([encode(record)])
    assert outcome([encode(record), bad, encode(event())]) == ([*taken, 2], [*failed, 1])


@pytest.mark.parametrize("escape", [b"\\ud800", b"\\udc00", b"\\uD800 x", b"\\udc00\\ud800"])
def test_half_a_surrogate_pair_is_not_text(escape):
    """An escape that stands for no character is bad UTF-8 too."""
    bad = encode(event(note="NOTE")).replace(b"NOTE", escape)
    batch = sort([bad, encode(event(note="ok"))], NOW, RULES)
    assert [(failed.index, failed.field) for failed in batch.failed] == [(0, "properties.note")]


def test_a_whole_surrogate_pair_is_text():
    """An emoji that is written as two escapes is taken."""
    assert outcome([encode(event(note="😀"))]) == ([0], [])


def test_a_refused_record_shows_its_insert_id():
    """The answer repeats the id, so that a sender can cross-check the index."""
    batch = sort([encode(event(**{"$insert_id": "no_underscore"}))], NOW, RULES)
    assert batch.failed[0].insert_id == "no_underscore"


def test_nan_and_broken_json_are_bad_requests():
    """What is not JSON at all refuses the request."""
    for line in (b'{"event":', b'{"event":NaN}', b"[" * 100_000, b"\xff"):
        with pytest.raises(BadRequest):
            loose(line)


def test_bodies_are_cut_into_records():
    """NDJSON, a list and a single object give the bytes of each record, blank lines aside."""
    assert records(b'{"a":1}\n\n {"b":2} \r\n', "application/x-ndjson") == [b'{"a":1}', b' {"b":2} \r']
    assert records(b' [{"a": 1}, 2]', "application/json") == [b'{"a": 1}', b"2"]
    assert records(b'{"a":1}', "application/json") == [b'{"a":1}']
    assert records(b" ", "application/json") == []
    with pytest.raises(BadRequest):
        records(b'[{"a":1}', "application/json")


def test_inflating_is_bounded():
    """A bomb is refused after little more than the limit, and a body of exactly the limit is not."""
    assert len(inflate(gzip.compress(b"0" * 1000), "gzip", 1000)) == 1000
    for size in (1001, 50_000_000):
        with pytest.raises(TooLarge, match="max limit of 1000 bytes"):
            inflate(gzip.compress(b"0" * size), "gzip", 1000)


def test_joined_gzip_members_are_one_body():
    """A body may be several gzip members one after the other; what follows the last must be one too."""
    body = gzip.compress(b"one\n") + gzip.compress(b"two\n")
    assert inflate(body, "gzip", 8) == b"one\ntwo\n"
    with pytest.raises(TooLarge):
        inflate(body, "gzip", 7)
    with pytest.raises(BadRequest):
        inflate(body + b"junk", "gzip", 1000)


@unhurried
@given(st.binary(max_size=200), st.integers(0, 300))
def test_spoilt_gzip_is_a_bad_request(data, cut):
    """A body that stops early or is no gzip at all is refused, never half read."""
    body = gzip.compress(data)
    with pytest.raises(BadRequest):
        inflate(body[: min(cut, len(body) - 1)], "gzip", 1000)
    with pytest.raises(BadRequest):
        inflate(b"x" + data, "gzip", 1000)


def test_window_refuses_what_does_not_fit_and_forgets_after_a_minute():
    """Events and bytes are both limited, a refusal costs nothing, and room comes back after a minute, not before."""
    window = Window(10, 1000)
    assert window.admit(0.0, 6, 100)
    assert not window.admit(1.0, 5, 1)
    assert window.admit(1.0, 4, 1)
    assert not window.admit(59.9, 1, 1)
    assert window.admit(60.0, 6, 1)
    assert not window.admit(60.5, 0, 1000)
    assert window.admit(62.0, 4, 900)
    window.clear()
    assert window.admit(62.0, 10, 1000)


def test_a_request_larger_than_the_allowance_passes_in_an_empty_minute():
    """A small allowance makes a sender slow; it doesn't stop one that sends 2,000 at a time for ever."""
    window = Window(1000, 1000)
    assert window.admit(0.0, 500, 1)
    assert not window.admit(59.0, 2000, 1)
    assert window.admit(60.0, 2000, 1)
    assert not window.admit(119.0, 1, 1)
    assert window.admit(120.0, 1, 5000)


@unhurried
@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 9), st.integers(0, 900)), max_size=40))
def test_window_never_exceeds_its_limits_in_any_minute(requests):
    """Whatever the moments, no span of one minute holds more than allowed."""
    window = Window(20, 2000)
    now, booked = 0.0, []
    for gap, events_, size in requests:
        now += gap
        if window.admit(now, events_, size):
            booked.append((now, events_, size))
        recent = [entry for entry in booked if entry[0] > now - 60]
        assert sum(entry[1] for entry in recent) <= 20
        assert sum(entry[2] for entry in recent) <= 2000
