"""The webhook's body: documented shapes, shapes that were seen live, and everything else."""

import contextlib
import json
import string
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridged.cohorts import webhook
from bridged.cohorts.webhook import MAX_ID_BYTES, UNKNOWN_TOTAL, Reader
from bridged.errors import BadRequest

READER = Reader("distinct_id")


def body(members: Any, action: str = "members", **parameters: Any) -> bytes:
    """A body with as little in it as is needed."""
    return json.dumps(
        {"action": action, "parameters": {"mixpanel_cohort_id": "777", "members": members} | parameters}
    ).encode()


def test_the_documented_shape() -> None:
    """Every field, ids as strings."""
    page = READER.read(
        body(
            [{"email": "ada@example.com", "mixpanel_distinct_id": "user-1", "first_name": "Ada", "last_name": "E"}],
            mixpanel_project_id="117",
            mixpanel_cohort_name="Power users",
            mixpanel_cohort_description="description",
            mixpanel_session_id="37163825",
            page_info={"total_pages": 10, "page_count": 6},
        )
    )
    assert (page.project, page.cohort, page.name, page.description) == ("117", "777", "Power users", "description")
    assert (page.session, page.total, page.page, page.ids, page.received) == ("37163825", 10, 6, ["user-1"], 1)


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"total_pages": "10", "page_count": "6"}, (10, 6)),
        ({"total_pages": 10.0, "page_count": 6}, (10, 6)),
        (None, (1, 1)),
        ({}, (1, 1)),
        ("nonsense", (UNKNOWN_TOTAL, 1)),
        ("", (UNKNOWN_TOTAL, 1)),
        ([3, 1], (UNKNOWN_TOTAL, 1)),
        ('{"total_pages":3,"page_count":1}', (3, 1)),
        ('{"total_pages": "3", "page_count": 2.0}', (3, 2)),
        ("null", (1, 1)),
        ("[" * 100_000, (UNKNOWN_TOTAL, 1)),
        ({"total_pages": None, "page_count": None}, (1, 1)),
        ({"total_pages": "three", "page_count": 2}, (UNKNOWN_TOTAL, 2)),
        ({"total_pages": [3]}, (UNKNOWN_TOTAL, 1)),
        ({"total_pages": 1, "page_count": "first"}, (UNKNOWN_TOTAL, 1)),
        ({"total_pages": 3}, (3, 1)),
        ({"page_count": 3}, (UNKNOWN_TOTAL, 3)),
        ({"total_pages": 0, "page_count": 1}, (1, 1)),
        ({"total_pages": 0, "page_count": 0}, (1, 1)),
        ({"total_pages": True, "page_count": -4}, (UNKNOWN_TOTAL, 1)),
        ({"total_pages": "9" * 400, "page_count": 1}, (UNKNOWN_TOTAL, 1)),
    ],
)
def test_page_info_is_read_leniently(info: Any, expected: tuple[int, int]) -> None:
    """Numbers as strings and nothing at all were seen live; what is there and can't be read proves no absence."""
    page = READER.read(body([], page_info=info))
    assert (page.total, page.page) == expected


@pytest.mark.parametrize(
    ("user_id", "member", "expected"),
    [
        ("distinct_id", {"mixpanel_distinct_id": "a", "$distinct_id": "b"}, "a"),
        ("distinct_id", {"$distinct_id": "b", "$email": "x", "Weird. key!": [1, {"a": 2}]}, "b"),
        ("distinct_id", {"distinct_id": 12345678901234567890}, "12345678901234567890"),
        ("$distinct_id", {"mixpanel_distinct_id": "a"}, "a"),
        ("$braze_external_id", {"mixpanel_distinct_id": "a", "$braze_external_id": "e"}, "e"),
        ("$braze_external_id", {"braze_external_id": "e"}, "e"),
        ("$user_id", {"user_id": 7}, "7"),
        ("CRM id", {"CRM id": " c1 "}, " c1 "),
    ],
)
def test_where_the_id_stands(user_id: str, member: dict[str, Any], expected: str) -> None:
    """Raw names and cleaned ones; numbers are text."""
    assert Reader(user_id).read(body([member])).ids == [expected]


@pytest.mark.parametrize(
    "member",
    [
        *[{"mixpanel_distinct_id": value} for value in ("", " ", None, True, [], {}, "a\0b", "$device:ab-cd")],
        *[{}, {"email": "x"}, None, 7, "user-1", ["user-1"]],
    ],
)
def test_a_member_without_a_usable_id_costs_only_itself(member: Any) -> None:
    """It is counted; the page is taken."""
    page = READER.read(body([{"mixpanel_distinct_id": "a"}, member, {"mixpanel_distinct_id": "b"}]))
    assert (page.ids, page.no_id, page.too_long, page.received) == (["a", "b"], 1, 0, 3)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        *[(b"12345.0", "12345"), (b"1e7", "10000000"), (b"12345678", "12345678"), (b"0.5", "0.5")],
        *[(b"9007199254740993.0", "9007199254740993"), (b"1.2345678901234567e16", "12345678901234567")],
        *[(b"12345678901234567.5", "12345678901234567.5"), (b"1e400", f"1{400 * '0'}"), (b"1e99999", "1e99999")],
    ],
)
def test_a_whole_number_is_an_id_without_a_point(number: bytes, expected: str) -> None:
    """Mixpanel's numbers are floats: 12345.0 is who is 12345 in Braze, and beyond 2^53 each digit is meant, too; also where
    something else in the body makes the reading a loose one.
    """
    for members in ([{"distinct_id": 7}], [8, {"distinct_id": 7}], [{"email": "NaN", "distinct_id": 7}]):
        sent = body(members).replace(b"7}", number + b"}").replace(b'"NaN"', b"NaN")
        assert READER.read(sent).ids == [expected]


def test_an_empty_value_hides_no_id_under_the_next_key() -> None:
    """The first key may be there with nothing in it; also where a member that is none makes the reading a loose one."""
    given = {"mixpanel_distinct_id": "", "$distinct_id": "u1"}
    assert READER.read(body([given])).ids == ["u1"]
    assert READER.read(body([given, 7])).ids == ["u1"]


def test_ids_longer_than_braze_takes_are_counted() -> None:
    """Bytes, not characters."""
    ids = ["x" * MAX_ID_BYTES, "x" * (MAX_ID_BYTES + 1), "é" * 493, "é" * 494]
    page = READER.read(body([{"mixpanel_distinct_id": id_} for id_ in ids]))
    assert (page.ids, page.too_long) == ([ids[0], ids[2]], 2)


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"", "the body is empty"),
        (b" \n", "the body is empty"),
        (b"{", "not JSON"),
        (b"[]", "expected action and parameters"),
        (b'{"action": "members"}', "parameters is missing"),
        (b'{"action": "members", "parameters": 5}', "expected action and parameters"),
        (b'{"action": "explode", "parameters": {}}', 'got "explode"'),
        (b'{"parameters": {}}', "got nothing"),
        (body([], mixpanel_cohort_id=None), "mixpanel_cohort_id"),
        (body(None), "members is missing"),
        (body({"a": 1}), "expected an array"),
        (b"[" * 100_000, "."),
        (b'{"action":"members","parameters":{"mixpanel_cohort_id":"1","members":' + b"[" * 100_000, "."),
        ('{"action": "mémbers"'.encode("latin-1"), "not JSON"),
    ],
)
def test_true_errors_of_the_client_say_what_is_wrong(sent: bytes, why: str) -> None:
    """A sync that is answered 400 is paused, so only these are."""
    with pytest.raises(BadRequest, match=why):
        READER.read(sent)


def test_half_a_character_costs_only_its_member() -> None:
    """A name that was cut off within an emoji is JSON that strict readers refuse; an id with one names nobody."""
    members = (
        rb'[{"first_name":"Ada \ud83d","mixpanel_distinct_id":"a"},{"mixpanel_distinct_id":"b\ude00"},'
        rb'{"mixpanel_distinct_id":"c\ud83d\ude00"}]'
    )
    sent = b'{"action":"members","parameters":{"mixpanel_cohort_id":"1","mixpanel_cohort_name":"\\ud83d","members":%s}}'
    page = READER.read(sent % members)
    assert (page.ids, page.no_id, page.name) == (["a", "c\N{GRINNING FACE}"], 1, "")


@pytest.mark.parametrize(
    ("change", "ids"),
    [
        (lambda sent: b"\xef\xbb\xbf" + sent, ["a", "b"]),
        (lambda sent: sent.replace(b'"Ada"', b"NaN"), ["a", "b"]),
        (lambda sent: sent.replace(b'"Ada"', b"-Infinity"), ["a", "b"]),
        (lambda sent: sent.replace(b"Ada", b"Ad\xc3"), ["a", "b"]),
        (lambda sent: sent.replace(b'"b"', b'"b\xf0\x9f"'), ["a"]),
        (lambda sent: sent.replace(b'"b"', b"NaN"), ["a"]),
        (lambda sent: sent + b"\r\n", ["a", "b"]),
    ],
)
def test_what_other_readers_take_for_json_pauses_no_sync(change: Any, ids: list[str]) -> None:
    """A mark of the encoding, numbers that are none, characters cut in half: at most they cost their member."""
    sent = body([{"mixpanel_distinct_id": "a", "name": "Ada"}, {"mixpanel_distinct_id": "b"}])
    page = READER.read(change(sent))
    assert (page.ids, page.received) == (ids, 2)


def test_nobody_to_add_is_nothing_to_do() -> None:
    """Quiet intervals still call with empty lists, and perhaps with none."""
    for action in ("add_members", "remove_members"):
        assert READER.read(body([], action)).ids == []
        assert READER.read(body(None, action)).ids == []


def test_the_answers() -> None:
    """As Mixpanel reads them."""
    assert json.loads(webhook.success("members")) == {"action": "members", "status": "success"}
    answer = {"action": "members", "status": "failure", "error": {"message": "why", "code": 400}}
    assert json.loads(webhook.failure("members", "why", 400)) == answer
    assert webhook.action_of(b'{"action": "members"}') == "members"
    assert webhook.action_of(b'{"action": ["members"]}') == webhook.action_of(b"nonsense") == ""


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["mixpanel_distinct_id", "$distinct_id", "distinct_id", "email"]) | st.text(
    string.printable, max_size=4
)
sent_members = st.lists(st.dictionaries(names, values, max_size=4) | values, max_size=8)


@settings(deadline=None)
@given(sent_members, values, values, st.sampled_from(webhook.ACTIONS))
def test_whatever_the_members_are_all_are_counted(members: list[Any], info: Any, name: Any, action: str) -> None:
    """Received == usable + no_id + too_long, whatever stands in a page; and every id is text that SQLite gives back."""
    page = READER.read(body(members, action, page_info=info, mixpanel_cohort_name=name, mixpanel_session_id=info))
    assert page.received == len(members)
    assert page.page >= 0
    assert page.total >= 1
    assert all(id_ and "\0" not in id_ and len(id_.encode()) <= MAX_ID_BYTES for id_ in page.ids)
    msgspec.json.encode(page.ids)


@settings(deadline=None)
@given(st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode()))
def test_whatever_comes_is_a_page_or_a_bad_request(sent: bytes) -> None:
    """Nothing else is ever raised."""
    with contextlib.suppress(BadRequest):
        READER.read(sent)
    webhook.action_of(sent)
