"""What the sink kept of a peer, beside what it kept of bridged: the same events, and the same in them?"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

_SHOWN = 6


class Event(Struct, frozen=True):
    """What an event is, and the rest of it."""

    name: str
    distinct_id: str
    time: float
    properties: dict[str, Any]


class Difference(Struct, kw_only=True):
    """How a peer's events differ from bridged's. `properties` counts them by the name of the property."""

    missing: int = 0
    doubled: int = 0
    changed: int = 0  # in name, distinct_id or time
    properties: dict[str, int] = {}

    def text(self) -> str:
        """In a line."""
        found = [f"{count:,} {what}" for what, count in self._counts() if count]
        most = sorted(self.properties.items(), key=lambda item: -item[1])
        if most:
            shown = ", ".join(f"{name} ({count:,})" for name, count in most[:_SHOWN])
            found.append(f"other properties: {shown}{', ...' if len(most) > _SHOWN else ''}")
        return "; ".join(found) or "none"

    def _counts(self) -> Iterable[tuple[str, int]]:
        return (
            ("missing", self.missing),
            ("sent twice", self.doubled),
            ("with another name, user or time", self.changed),
        )


def kept(path: Path) -> Iterator[dict[str, Any]]:
    """All events of a file that `bench.sink --keep` wrote, in Mixpanel's form or Braze's."""
    with path.open("rb") as file:
        for line in file:
            decoded = msgspec.json.decode(line)
            yield from decoded if isinstance(decoded, list) else [decoded]


def insert_ids(path: Path) -> Counter[str]:
    """How often each event came."""
    return Counter(str(event["properties"]["$insert_id"] if "event" in event else event["id"]) for event in kept(path))


def mapped(path: Path) -> dict[str, Event]:
    """The events by $insert_id."""
    found = {}
    for event in kept(path):
        properties = dict(event["properties"])
        key = properties.pop("$insert_id")
        found[key] = Event(event["event"], properties.pop("distinct_id"), properties.pop("time"), properties)
    return found


def difference(ours: Mapping[str, Event], path: Path, *, maps: bool) -> Difference:
    """Our events beside a peer's."""
    ids = insert_ids(path)
    found = Difference(missing=len(ours.keys() - ids.keys()), doubled=ids.total() - len(ids))
    if not maps:
        return found
    properties: Counter[str] = Counter()
    for key, theirs in mapped(path).items():
        own = ours.get(key)
        if own is None:
            found.changed += 1
            continue
        found.changed += (own.name, own.distinct_id, own.time) != (theirs.name, theirs.distinct_id, theirs.time)
        if own.properties != theirs.properties:
            names = own.properties.keys() | theirs.properties.keys()
            properties.update(name for name in names if own.properties.get(name) != theirs.properties.get(name))
    found.properties = dict(properties)
    return found
