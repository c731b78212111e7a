"""What has arrived: each event once, and the counts. Pure.

Two events are the same when name, time, distinct_id and `$insert_id` are, as in Mixpanel's own deduplication; a
repeat changes nothing, not even when its other properties differ. Only a 64-bit hash of the four is kept as the key:
among ten million events the odds of mistaking two for one are a few in a million. Requests are kept as
they came, still compressed, with the places of their new events; how Mixpanel would show those is worked out when
somebody asks.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import msgspec

from bridged.emulator.batch import Batch
from bridged.emulator.bodies import loose

Source = Callable[[], list[bytes]]

MAX_STRING: Final = 255
CONSUMED: Final = ("ip", "token")  # read at ingestion and not part of the stored event


class Summary(msgspec.Struct, kw_only=True):
    """Counts since the start or the last clear."""

    requests: int = 0
    requests_now: int = 0
    max_concurrent: int = 0
    max_batch: int = 0
    bytes_received: int = 0
    bytes_uncompressed: int = 0
    answers: dict[str, int] = {}  # by status, and by "reset" and "hang" where no answer came
    faults: int = 0
    accepted: int = 0  # records said to be imported: stored, duplicates and ignored ones
    stored: int = 0  # different events
    duplicates: int = 0
    ignored: int = 0  # dropped for `$ignore`
    refused: int = 0  # records that failed validation
    dropped: int = 0  # records of requests that were answered 1 and came to nothing: a wrong credential, an old /track
    events_without_ip: int = 0  # these would be given the place of whoever sent them
    profile_updates: int = 0
    events: dict[str, int] = {}  # different events, by name


class _Kept(msgspec.Struct):
    """A request, where in it the events are that were new, and the times that replaced theirs."""

    source: Source
    indexes: Sequence[int]
    times: dict[int, int]


class Store:
    """The events and their number by name."""

    def __init__(self, *, keep: bool) -> None:
        self.keep = keep
        self.names: Counter[str] = Counter()
        self._keys: set[int] = set()
        self._kept: list[_Kept] = []

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, batch: Batch, source: Source) -> int:
        """Take the events of a request, which `source` can produce again; returns how many of them are new."""
        keys = self._keys
        before = len(keys)
        fresh = set(batch.keys)
        indexes, names = batch.indexes, batch.names
        if len(fresh) == len(batch.keys) and fresh.isdisjoint(keys):
            keys |= fresh
        else:
            new = []
            for place, key in enumerate(batch.keys):
                if key not in keys:
                    keys.add(key)
                    new.append(place)
            indexes = [indexes[place] for place in new]
            names = [names[place] for place in new]
        self.names.update(names)
        if self.keep and indexes:
            self._kept.append(_Kept(source, indexes, batch.times))
        return len(keys) - before

    def events(self) -> Iterator[dict[str, Any]]:
        """Go through the events as Mixpanel would show them, in order of arrival."""
        for kept in list(self._kept):
            records = kept.source()
            for index in sorted(kept.indexes):
                yield _shown(loose(records[index]), kept.times.get(index))

    def clear(self) -> None:
        """Forget everything."""
        self._keys.clear()
        self._kept.clear()
        self.names.clear()


def _shown(event: dict[str, Any], time: int | None) -> dict[str, Any]:
    properties = {key[:MAX_STRING]: _cut(value) for key, value in event["properties"].items() if key not in CONSUMED}
    if time is not None:
        properties["time"] = time
    return {"event": event["event"][:MAX_STRING], "properties": properties}


def _cut(value: Any) -> Any:
    if isinstance(value, str):
        return value[:MAX_STRING]
    if isinstance(value, list):
        return [_cut(item) for item in value]
    if isinstance(value, dict):
        return {key[:MAX_STRING]: _cut(item) for key, item in value.items()}
    return value
