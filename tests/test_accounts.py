"""The books: what goes in comes out, by event type, and the equation is checked, not assumed."""

from typing import Any

import msgspec
import pytest
from conftest import NAMES
from hypothesis import given
from hypothesis import strategies as st

from bridged.backlog.accounts import ENDS, KINDS, Accounts
from bridged.currents.schema import UNKNOWN_CODE

CODES = {name: code for code, name in NAMES.items()}
codes = st.lists(st.sampled_from(sorted(NAMES)), max_size=50).map(bytes)
entries = st.lists(st.tuples(st.sampled_from(KINDS), codes), max_size=20)


def booked(entries: list[tuple[str, bytes]]) -> Accounts:
    """Books with these entries."""
    accounts = Accounts()
    for kind, of in entries:
        accounts.add(kind, of)
    return accounts


@given(entries)
def test_what_is_added_is_counted_by_type(entered: list[tuple[str, bytes]]) -> None:
    """Every event counts once, under its kind and its type."""
    accounts = booked(entered)
    for kind in KINDS:
        everything = b"".join(of for each, of in entered if each == kind)
        assert accounts.total(kind) == len(everything)
        assert {code: n for code, n in accounts.counts[kind].items() if n} == {
            c: everything.count(c) for c in everything
        }


@given(entries)
def test_dump_and_load(entered: list[tuple[str, bytes]]) -> None:
    """What one process wrote the next reads, but for `waiting`, which it counts from the segments that are there."""
    accounts, again = booked(entered), Accounts()
    again.load(accounts.dump(NAMES), CODES)
    for kind in ("accepted", *ENDS):
        assert +again.counts[kind] == +accounts.counts[kind]
    assert again.total("waiting") == 0


@given(entries, entries)
def test_a_change_is_applied_as_a_whole(before: list[tuple[str, bytes]], change: list[tuple[str, bytes]]) -> None:
    """Books and a commit's change together are the books of both, removals included."""
    as_they_were = booked(before)
    accounts = as_they_were.after(booked(change))
    assert {k: +c for k, c in accounts.counts.items()} == {k: +c for k, c in booked(before + change).counts.items()}
    taken = Accounts()
    for kind, of in change:
        taken.remove(kind, of)
    accounts = accounts.after(taken)
    assert {k: +c for k, c in accounts.counts.items()} == {k: +c for k, c in booked(before).counts.items()}
    assert as_they_were.counts == booked(before).counts  # a commit that fails changes nothing


@given(st.lists(st.tuples(st.sampled_from([*ENDS, "waiting"]), codes), max_size=10))
def test_the_books_balance_when_every_accepted_event_is_somewhere(ends: list[tuple[str, bytes]]) -> None:
    """The equation: accepted = delivered + dead_lettered + expired + skipped + waiting; one too few or too many is seen."""
    accounts = booked([*ends, *(("accepted", of) for _, of in ends)])
    assert accounts.imbalance() == 0
    accounts.add("accepted", b"\x00")
    assert accounts.imbalance() == 1
    accounts.add("delivered", b"\x00\x00")
    assert accounts.imbalance() == -1


def test_problems_are_seen_by_type() -> None:
    """Books can balance as a whole and be wrong: one type has too many, another too few, or less than nothing waits."""
    accounts = booked([("accepted", bytes([0, 1])), ("delivered", bytes([0])), ("waiting", bytes([1]))])
    assert accounts.problems(NAMES) == []
    accounts.remove("waiting", bytes([1]))
    accounts.add("waiting", bytes([0]))
    assert accounts.imbalance() == 0
    assert accounts.problems(NAMES) == [
        f"{NAMES[0]}: 1 more events than were accepted",
        f"{NAMES[1]}: 1 accepted events are nowhere",
    ]
    accounts.remove("waiting", bytes([0, 0]))
    accounts.add("delivered", bytes([0]))
    assert accounts.problems(NAMES)[0] == f"{NAMES[0]}: -1 waiting"


def test_a_type_that_no_longer_exists_is_accounted_as_unknown() -> None:
    """Whoever goes back to an older version keeps the totals, and books that balance."""
    body = msgspec.json.encode({"users.messages.fax.Send": [3, 1, 0, 0, 0], "(unknown)": [2, 2, 0, 0, 0]})
    accounts = Accounts()
    accounts.load(body, CODES)
    assert accounts.counts["accepted"] == {UNKNOWN_CODE: 5}
    assert accounts.counts["delivered"] == {UNKNOWN_CODE: 3}
    assert accounts.imbalance() == 2


def test_codes_without_a_name_survive() -> None:
    """A code that this version has no name for is written and shown with its number."""
    accounts = booked([("accepted", bytes([200, 200]))])
    assert accounts.by_type(NAMES) == {"(200)": {kind: 2 * (kind == "accepted") for kind in KINDS}}
    again = Accounts()
    again.load(accounts.dump(NAMES), CODES)
    assert again.total("accepted") == 2


def test_by_type_names_what_was_seen() -> None:
    """Types that never came aren't listed; those that did have every kind, zeros included."""
    accounts = booked([("accepted", bytes([0, 0, 1])), ("waiting", bytes([0]))])
    assert accounts.by_type(NAMES) == {
        NAMES[0]: {kind: {"accepted": 2, "waiting": 1}.get(kind, 0) for kind in KINDS},
        NAMES[1]: {kind: {"accepted": 1}.get(kind, 0) for kind in KINDS},
    }


@pytest.mark.parametrize("body", [b"", b"[]", b'{"a":"b"}', b"\xff"])
def test_books_that_cannot_be_read_are_not_taken_for_empty(body: Any) -> None:
    """Starting with zeros would hide that something is wrong with the file."""
    with pytest.raises((msgspec.DecodeError, UnicodeDecodeError)):
        Accounts().load(body, CODES)
