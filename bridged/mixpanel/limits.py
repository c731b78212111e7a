"""What Mixpanel's /import refuses, known beforehand so that it never costs a batch. Pure.

Facts: Mixpanel's import-events reference (limits, required properties, refused ids). Where sources disagree the safe reading
is taken: what Mixpanel would surely refuse is refused here; what it may refuse is sent, and its answer decides.
"""

import re
from typing import Any, Final

MAX_PROPERTIES: Final = 254
MAX_ELEMENTS: Final = 254
MAX_KEYS: Final = 254
# Documented as 3, but said not to be enforced below 10 by one of Mixpanel's own: deeper is sure to fail.
MAX_DEPTH: Final = 10
MAX_EVENT_BYTES: Final = 1_000_000
EARLIEST_TIME_S: Final = 365 * 86400  # 1971-01-01
MAX_AHEAD_S: Final = 3600

REFUSED_IDS: Final = frozenset(
    {
        "00000000-0000-0000-0000-000000000000",
        "anon",
        "anonymous",
        "nil",
        "none",
        "null",
        "n/a",
        "na",
        "undefined",
        "unknown",
        "<nil>",
        "0",
        "-1",
        "true",
        "false",
        "[]",
        "{}",
    }
)
# Projects with the simplified ID merge refuse the whole request for one of these.
REFUSED_NAMES: Final = frozenset({"$identify", "$create_alias", "$merge"})
INSERT_ID: Final = re.compile(r"[A-Za-z0-9-]{1,36}")

# Names with a meaning of their own, which an event of an unknown type must not set by accident.
RESERVED_PROPERTIES: Final = frozenset(
    {
        *("token", "ip", "$ip", "time", "$time", "alias", "bucket", "$bucket", "$ignore", "$partner_id", "$source"),
        # Who it was.
        *("distinct_id", "$distinct_id", "$distinct_ids", "$distinct_id_before_identity", "mp_original_distinct_id"),
        *("$device_id", "$user_id", "$identified_id", "$anon_id", "$is_reshuffled", "$preshuffle_distinct_id"),
        # What it was, and what Mixpanel says of it.
        *("$insert_id", "$event_name", "mp_original_event_name", "$event_count", "$duration_s"),
        *("$origin_start", "$origin_end", "$failure_reason", "$failure_description", "$identity_failure_reason"),
        # Where it was: they go before `ip`.
        *("$latitude", "$longitude", "$city", "$region", "mp_country_code"),
    }
)
_RESERVED_PREFIX: Final = "$warehouse_"


def is_reserved(name: str) -> bool:
    """Whether a property of this name would mean something of its own to Mixpanel."""
    return name in RESERVED_PROPERTIES or name.startswith(_RESERVED_PREFIX)


_NESTED: Final = frozenset({dict, list})
_SHOWN_CHARS: Final = 80  # of a name


def short_name(name: str) -> str:
    """A property's name as a reason has it: of a long one its beginning and its end, so that the reason is read to its own."""
    return name if len(name) <= _SHOWN_CHARS else f"{name[: _SHOWN_CHARS - 30]}…{name[-29:]}"


def nested_problem(value: Any, depth: int = 1) -> str | None:
    """Why Mixpanel would refuse a list or an object as a property value, else None."""
    if depth > MAX_DEPTH:
        return f"nested deeper than {MAX_DEPTH}"
    if value.__class__ is dict:
        if len(value) > MAX_KEYS:
            return f"an object with more than {MAX_KEYS} keys; Mixpanel takes no more"
        value = value.values()
    elif len(value) > MAX_ELEMENTS:
        return f"a list of more than {MAX_ELEMENTS} elements; Mixpanel takes no more"
    for child in value:
        if child.__class__ in _NESTED and (problem := nested_problem(child, depth + 1)):
            return problem
    return None
