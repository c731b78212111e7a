"""What the demo plays, and what must come of it. Pure.

The expectation is made here, from the events alone and beside the daemon: a demo that asked the daemon what is right
would always be right. Among the sound events are some of each kind of trouble that real days bring.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import Struct

from bridged.currents.examples import DAY_S, example_day, example_event
from bridged.currents.table import EVENT_TYPES

MIN_EVENTS: Final = 1000
PER_REQUEST: Final = 100
PER_WRITE: Final = 500
_TROUBLE_EVERY: Final = 97  # one event in so many is spoilt
_REPEAT_EVERY: Final = 397  # one event in so many comes twice: Braze delivers at least once


class Identity(NamedTuple):
    """What makes two Mixpanel events the same, as far as it comes from Braze."""

    insert_id: str
    distinct_id: str
    time: int


class Expected(Struct):
    """What the books, the dead letters and Mixpanel must say in the end."""

    accepted: int = 0
    delivered: int = 0  # repeats included: Mixpanel takes them, and keeps one
    repeats: int = 0
    skipped: int = 0
    dead_letters: Counter[str] = msgspec.field(default_factory=Counter)  # by what their reason begins with
    stored: set[Identity] = msgspec.field(default_factory=set)


class Day(Struct):
    """The bytes for both doors, and the expectation."""

    bodies: list[bytes]  # for the HTTP door, one a request
    writes: list[bytes]  # for the stream door: whole lines
    http_events: int
    stream_events: int
    expected: Expected


# How an event is spoilt, and how the reason of its dead letter begins; an empty one: it is skipped.
_Spoil = Callable[[dict[str, Any]], object]
_TROUBLES: Final[tuple[tuple[_Spoil, str], ...]] = (
    (lambda event: event["user"].pop("external_user_id"), ""),
    (lambda event: event.update(event_type="users.messages.hologram.Send"), "unknown event type"),
    (lambda event: event.update(time="yesterday"), "ill-typed"),
    (lambda event: event["user"].update(external_user_id="unknown"), "user.external_user_id 'unknown'"),
    (lambda event: event.update(time=event["time"] * 1000), "time "),
)


def make(count: int, now_s: int, seed: int = 0) -> Day:
    """`count` events of yesterday, of every type through both doors."""
    rng = random.Random(seed)
    expected = Expected()
    doors: tuple[list[bytes], list[bytes]] = ([], [])
    encode = msgspec.json.Encoder().encode
    for number, event in enumerate(_events(rng, count, now_s)):
        trouble = number % _TROUBLE_EVERY == 0 and number >= 2 * len(EVENT_TYPES)
        expected.accepted += 1
        if trouble:
            # Twice each, so that each comes to both doors.
            spoil, reason = _TROUBLES[number // _TROUBLE_EVERY // 2 % len(_TROUBLES)]
            spoil(event)
            if reason:
                expected.dead_letters[reason] += 1
            else:
                expected.skipped += 1
        else:
            expected.delivered += 1
            expected.stored.add(Identity(event["id"], event["user"]["external_user_id"], event["time"]))
        line = encode(event)
        doors[number % 2].append(line)
        if not trouble and number % _REPEAT_EVERY == 1:
            # Through the other door, some time later.
            doors[1 - number % 2].append(line)
            expected.accepted += 1
            expected.delivered += 1
            expected.repeats += 1
    # What isn't JSON at all can't be an event of Braze's, but a line of a broken client.
    doors[1].append(b'{"event_type":"users.behaviors.Purchase","id":')
    expected.accepted += 1
    expected.dead_letters["not valid JSON"] += 1
    bodies = [b'{"events":[' + b",".join(part) + b"]}" for part in _parts(doors[0], PER_REQUEST)]
    writes = [b"\n".join(part) + b"\n" for part in _parts(doors[1], PER_WRITE)]
    return Day(bodies, writes, len(doors[0]), len(doors[1]), expected)


def _events(rng: random.Random, count: int, now_s: int) -> Iterator[dict[str, Any]]:
    """First one of each type for each door, then a day in its real proportions."""
    start_s = now_s // DAY_S * DAY_S - DAY_S
    for row in EVENT_TYPES:
        for _ in range(2):
            yield example_event(row, rng, start_s)
    yield from example_day(rng, count - 2 * len(EVENT_TYPES), start_s)


def _parts(lines: list[bytes], length: int) -> Iterator[list[bytes]]:
    for at in range(0, len(lines), length):
        yield lines[at : at + length]
