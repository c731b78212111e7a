"""The books: what became of every event, per event type. Pure.

    accepted = delivered + dead_lettered + expired + skipped + waiting

`waiting` isn't kept but counted, from the segments that are there; the equation is therefore a check and not a definition.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Final

import msgspec

ENDS: Final = ("delivered", "dead_lettered", "expired", "skipped")
KINDS: Final = ("accepted", *ENDS, "waiting")


class Accounts:
    """Counts per event type. One belongs to the spool's last commit; others are the changes of one commit."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[int]] = {kind: Counter() for kind in KINDS}

    def add(self, kind: str, codes: bytes) -> None:
        """Counts events, one code each."""
        for code, n in _tally(codes):
            self.counts[kind][code] += n

    def remove(self, kind: str, codes: bytes) -> None:
        """Takes events out of a count: they moved to another."""
        for code, n in _tally(codes):
            self.counts[kind][code] -= n

    def apply(self, change: "Accounts") -> None:
        """Adds the changes of a commit."""
        for kind, counts in change.counts.items():
            mine = self.counts[kind]
            for code, n in counts.items():
                mine[code] += n

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

    def dump(self, names: Mapping[int, str], change: "Accounts | None" = None) -> bytes:
        """The books as JSON, by event type: codes may change between versions. `waiting` is not written.

        With `change`, as they will be after that commit.
        """
        kept = ("accepted", *ENDS)
        rows: dict[str, list[int]] = {}
        for position, kind in enumerate(kept):
            counts: Mapping[int, int] = self.counts[kind]
            if change is not None and change.counts[kind]:
                counts = dict(counts)
                for code, n in change.counts[kind].items():
                    counts[code] = counts.get(code, 0) + n
            for code, n in counts.items():
                if n:
                    rows.setdefault(names.get(code, f"({code})"), [0] * len(kept))[position] = n
        return msgspec.json.encode(rows)

    def load(self, data: bytes, codes: Mapping[str, int]) -> None:
        """Reads what `dump` wrote; a type that no longer exists is accounted as unknown."""
        for name, row in msgspec.json.decode(data, type=dict[str, list[int]]).items():
            for kind, n in zip(("accepted", *ENDS), row, strict=True):
                self.counts[kind][codes.get(name, codes["(unknown)"])] += n


def _tally(codes: bytes) -> list[tuple[int, int]]:
    """How often each code occurs. Taking one code out at a time, in C, is the fastest way for codes that are few."""
    found = []
    while codes:
        code = codes[:1]
        rest = codes.replace(code, b"")
        found.append((code[0], len(codes) - len(rest)))
        codes = rest
    return found
