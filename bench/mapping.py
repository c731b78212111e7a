"""What mapping costs: by itself, with its encoding, for batches with something odd in them, and by event type.

Checks look at a batch as a whole, and at its events one by one only if it has something odd in it. So the price of one
odd event is paid by its whole batch, and this shows how high it is.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from bench import data, report
from bridged.currents.table import EVENT_TYPES
from bridged.mixpanel.mapping import EventMapping, MappingSettings

BATCH = 400
_SHOWN_TYPES = 12


def main(argv: Sequence[str]) -> int:
    """Prints what mapping costs."""
    parser = report.options("mapping", __doc__)
    parser.add_argument("--events", type=int, default=20_000, help="distinct events, default %(default)s")
    arguments = parser.parse_args(argv)
    lines = data.events(arguments.events)
    mapping = EventMapping(EVENT_TYPES, MappingSettings(token="0" * 32))
    kinds: dict[str, list[bytes]] = {}
    for line in lines:
        kinds.setdefault(msgspec.json.decode(line)["event_type"], []).append(line)
    odd: dict[str, Callable[[dict[str, Any]], None]] = {
        "one event ahead of the clock": lambda event: event.update(time=int(time.time()) + 1800),
        "one without external_user_id": lambda event: event["user"].pop("external_user_id"),
        "one id that isn't Mixpanel's": lambda event: event.update(id="not one of Mixpanel's"),
        "one unknown type": lambda event: event.update(event_type="users.messages.fax.Send"),
    }
    cases = {"real mix": lines, "the 20 commonest types": _common(kinds, 20)}
    cases |= {
        f"the same, and {name}": _with_one(cases["the 20 commonest types"], change) for name, change in odd.items()
    }
    commonest = sorted(kinds, key=lambda kind: -len(kinds[kind]))[:_SHOWN_TYPES]
    cases |= {kind: (kinds[kind] * (BATCH * 5 // len(kinds[kind]) + 1))[: BATCH * 5] for kind in commonest}
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(arguments.runs):
        for name, events in cases.items():
            spent[name].append(_measure(mapping, events))
    about = report.machine()
    print(report.heading(about))
    print(f"{BATCH} events a batch; us an event, median (min-max) of {arguments.runs} runs\n")
    rows = [[name, *[report.spread(us, 2) for us in zip(*times, strict=True)]] for name, times in spent.items()]
    print(report.table(["batches of", "map", "encode"], rows))
    report.write(arguments.json, {"machine": about, "us_per_event": spent})
    return 0


def _measure(mapping: EventMapping, lines: Sequence[bytes]) -> tuple[float, float]:
    encode_lines = msgspec.json.Encoder().encode_lines
    clock = time.process_time_ns
    mapping_ns = encoding_ns = 0
    for at in range(0, len(lines), BATCH):
        decoded = mapping.schema.lines(lines[at : at + BATCH])
        started = clock()
        mapped = mapping.map(decoded, time.time())
        between = clock()
        encode_lines(mapped.forms)
        encoding_ns += clock() - between
        mapping_ns += between - started
    return mapping_ns / len(lines) / 1e3, encoding_ns / len(lines) / 1e3


def _common(kinds: dict[str, list[bytes]], count: int) -> list[bytes]:
    """Events of the commonest types, mixed as they come."""
    chosen = sorted(kinds, key=lambda kind: -len(kinds[kind]))[:count]
    # By id, which is random: the order must not be that of the types.
    return sorted((line for kind in chosen for line in kinds[kind]), key=lambda line: line.partition(b'"id":')[2][:40])


def _with_one(lines: Sequence[bytes], change: Callable[[dict[str, Any]], Any]) -> list[bytes]:
    """The same events, with the first of each batch changed."""
    changed = list(lines)
    for at in range(0, len(lines), BATCH):
        event = msgspec.json.decode(lines[at])
        change(event)
        changed[at] = msgspec.json.encode(event) + b"\n"
    return changed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
