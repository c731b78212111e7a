"""What Mixpanel refuses, known beforehand: exact at its borders, and never itself a reason to fail."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridged.currents.table import CURRENT_PROPERTY_NAMES, EVENT_TYPES, SEED_PROPERTY_NAMES
from bridged.mixpanel.limits import (
    EARLIEST_TIME_S,
    INSERT_ID,
    MAX_DEPTH,
    MAX_ELEMENTS,
    MAX_KEYS,
    MAX_PROPERTIES,
    REFUSED_IDS,
    is_reserved,
    nested_problem,
)


def nested(kind: type, depth: int) -> Any:
    """Lists or objects, one inside the other."""
    value: Any = "x"
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


@pytest.mark.parametrize("kind", [list, dict])
def test_depth(kind: type) -> None:
    """Ten deep is sent, eleven is refused; a thousand deep is refused as fast, and without a RecursionError."""
    assert nested_problem(nested(kind, MAX_DEPTH)) is None
    for depth in (MAX_DEPTH + 1, 900):
        assert nested_problem(nested(kind, depth)) == f"nested deeper than {MAX_DEPTH}"


def test_width() -> None:
    """Lists and objects are counted each on its own, at any depth."""
    assert nested_problem([0] * MAX_ELEMENTS) is None
    assert nested_problem({str(n): n for n in range(MAX_KEYS)}) is None
    assert nested_problem([[0] * MAX_ELEMENTS] * MAX_ELEMENTS) is None
    assert nested_problem([0] * (MAX_ELEMENTS + 1)) == "a list of more than 254 elements; Mixpanel takes no more"
    assert nested_problem({"a": [{str(n): n for n in range(MAX_KEYS + 1)}]}) == (
        "an object with more than 254 keys; Mixpanel takes no more"
    )


def judged_slowly(value: Any, depth: int = 1) -> bool:
    """Whether a value is within the limits, written down once more in another way."""
    children = value if isinstance(value, list) else list(value.values())
    inner = [child for child in children if isinstance(child, list | dict)]
    return depth <= MAX_DEPTH and len(children) <= 254 and all(judged_slowly(child, depth + 1) for child in inner)


scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=3)
trees = st.recursive(
    st.lists(scalars, max_size=3),
    lambda inner: (
        st.lists(inner | scalars, max_size=3)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
        | inner.map(lambda value: nested(list, 4) if not value else [[[value]]])
        | st.builds(lambda count, value: [value] * count, st.sampled_from([1, 254, 255]), scalars)
    ),
    max_leaves=12,
)


@given(trees)
def test_any_value_is_judged_by_the_same_rules(value: Any) -> None:
    """Every list and object counts wherever it stands; scalars never do."""
    assert (nested_problem(value) is None) == judged_slowly(value)


def test_insert_ids_are_ascii() -> None:
    """Letters and digits of other alphabets are none to Mixpanel; neither is a newline at the end."""
    assert INSERT_ID.fullmatch("a-Z9")
    assert not any(map(INSERT_ID.fullmatch, ["é", "٣", "a\n", "a_b", "a b", "", "a" * 37]))


def test_the_figures_are_mixpanels() -> None:
    """Where its pages disagree (255, fewer than 255) the lower reading is taken."""
    assert (MAX_PROPERTIES, MAX_ELEMENTS, MAX_KEYS) == (254, 254, 254)
    assert EARLIEST_TIME_S == 31_536_000
    assert len(REFUSED_IDS) == 17


def test_no_documented_property_is_reserved() -> None:
    """What the table forwards under its own name never means something else to Mixpanel."""
    names = {name for row in EVENT_TYPES for name in row.properties}
    sent = names | set(SEED_PROPERTY_NAMES.values()) | set(CURRENT_PROPERTY_NAMES.values())
    assert not [name for name in sent if is_reserved(name)]
