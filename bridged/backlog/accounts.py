"""The books: what became of every event, per event type. Pure.

    accepted = delivered + dead_lettered + expired + skipped + waiting

`waiting` isn't kept but counted, from the segments that are there; the equation is therefore a check and not a definition.
"""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Final, Self

import msgspec

from bridged.backlog.records import Intaken, Settlement

ENDS: Final = ("delivered", "dead_lettered", "expired", "skipped")
KINDS: Final = ("accepted", *ENDS, "waiting")


class Accounts:
    """Counts per event type. One belongs to the spool's last commit; others are the changes of one commit."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[int]] = {kind: Counter() for kind in KINDS}

    def add(self, kind: str, codes: bytes) -> None:
        """Counts events, one code each."""
        counts = self.counts[kind]
        for code, n in _tally(codes):
            counts[code] = counts.get(code, 0) + n

    def remove(self, kind: str, codes: bytes) -> None:
        """Takes events out of a count: they moved to another."""
        counts = self.counts[kind]
        for code, n in _tally(codes):
            counts[code] = counts.get(code, 0) - n

    def after(self, change: Self) -> Self:
        """These books with the changes of a commit; they themselves stay as they are, and what didn't change is theirs, too."""
        then = type(self)()
        for kind, changed in change.counts.items():
            counts = self.counts[kind]
            if changed:
                counts = Counter()
                # A Counter's own update takes ten times as long, and this is done for every commit.
                dict.update(counts, self.counts[kind])
                for code, n in changed.items():
                    counts[code] = counts.get(code, 0) + n
            then.counts[kind] = counts
        return then

    def total(self, kind: str) -> int:
        """A count over all event types."""
        return self.counts[kind].total()

    def imbalance(self) -> int:
        """Accepted events that are nowhere (positive), or events that were never accepted (negative). Always 0."""
        return self.total("accepted") - sum(self.total(kind) for kind in (*ENDS, "waiting"))

    def problems(self, names: Mapping[int, str]) -> list[str]:
        """What is wrong with the books of single types, where the totals may hide it. Always empty."""
        found = []
        for name, counts in self.by_type(names).items():
            found += [f"{name}: {n} {kind}" for kind, n in counts.items() if n < 0]
            missing = counts["accepted"] - sum(counts[kind] for kind in (*ENDS, "waiting"))
            if missing > 0:
                found.append(f"{name}: {missing} accepted events are nowhere")
            elif missing < 0:
                found.append(f"{name}: {-missing} more events than were accepted")
        return found

    def by_type(self, names: Mapping[int, str]) -> dict[str, dict[str, int]]:
        """Counts per event type, of the types that were seen."""
        seen = sorted({code for counts in self.counts.values() for code, n in counts.items() if n})
        return {names.get(code, f"({code})"): {kind: self.counts[kind][code] for kind in KINDS} for code in seen}

    def dump(self, names: Mapping[int, str]) -> bytes:
        """The books as JSON, by event type: codes may change between versions. `waiting` is not written."""
        kept = [self.counts[kind] for kind in ("accepted", *ENDS)]
        codes = sorted(set().union(*kept))
        rows = zip(*[map(counts.get, codes, repeat(0)) for counts in kept], strict=True)
        named = [names.get(code) or f"({code})" for code in codes]
        return msgspec.json.encode(dict(zip(named, rows, strict=True)))

    def load(self, data: bytes, codes: Mapping[str, int]) -> None:
        """Reads what `dump` wrote; a type that no longer exists is accounted as unknown."""
        for name, row in msgspec.json.decode(data, type=dict[str, list[int]]).items():
            for kind, n in zip(("accepted", *ENDS), row, strict=True):
                self.counts[kind][codes.get(name, codes["(unknown)"])] += n


def changes(intaken: Sequence[Intaken], settlements: Sequence[Settlement]) -> Accounts:
    """What a commit changes in the books, but for what is replayed, and for what was damaged: that is recounted."""
    change = Accounts()
    taken = b"".join([batch.codes for one in intaken for batch in one.batches])
    refused = bytes([letter.code for one in intaken for letter in one.dead_letters])
    skipped = b"".join([one.skipped for one in intaken])
    change.add("accepted", taken + refused + skipped)
    change.add("waiting", taken)
    change.add("dead_lettered", refused)
    change.add("skipped", skipped)
    for settlement in settlements:
        if settlement.damaged:
            continue
        change.remove("waiting", b"".join([segment.codes for segment in settlement.segments]))
        for part in settlement.parts:
            change.add("waiting", part.codes)
        change.add("delivered", settlement.delivered)
        change.add("expired", settlement.expired)
        change.add("dead_lettered", bytes([letter.code for letter in settlement.dead_letters]))
    return change


@functools.lru_cache(maxsize=4)  # what is accepted is waiting, and what is delivered was: asked for twice in a row
def _tally(codes: bytes) -> tuple[tuple[int, int], ...]:
    """How often each code occurs. Taking one code out at a time, in C, is the fastest way for codes that are few."""
    found = []
    while codes:
        code = codes[:1]
        rest = codes.replace(code, b"")
        found.append((code[0], len(codes) - len(rest)))
        codes = rest
    return tuple(found)
