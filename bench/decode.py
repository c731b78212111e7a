"""What decoding costs, and what it costs to keep a bad event from harming its neighbours.

The project's decoders for both doors, with and without an event of an unknown type in each batch; beside them one call
of the tagged union for a whole batch (which fails as a whole), an envelope with raw properties and a decoder a type,
and plain dicts.
"""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
from msgspec import Raw, Struct

from bench import data, report
from bridged.currents.schema import Schema
from bridged.currents.table import EVENT_TYPES
from bridged.mixpanel.mapping import EventMapping, MappingSettings

BATCH = 400
_UNKNOWN = b'{"event_type":"users.messages.fax.Send","id":"c0ffee","time":1700000000,"user":{},"properties":{}}\n'


class _User(Struct, gc=False):
    external_user_id: str | None = None
    device_id: str | None = None


class _Envelope(Struct, gc=False):
    event_type: str
    time: int
    id: str
    user: _User
    properties: Raw


def main(argv: Sequence[str]) -> int:
    """Prints what each way costs."""
    parser = report.options("decode", __doc__)
    parser.add_argument("--events", type=int, default=20_000, help="distinct events, default %(default)s")
    arguments = parser.parse_args(argv)
    lines = data.events(arguments.events)
    batches = [lines[at : at + BATCH] for at in range(0, len(lines), BATCH)]
    schema = EventMapping(EVENT_TYPES, MappingSettings()).schema
    union = msgspec.json.Decoder(schema._event.type).decode_lines  # noqa: SLF001  # its parts are what this is about
    plain = msgspec.json.Decoder().decode_lines
    envelope = _by_envelope(lines)
    odd = [[*batch, _UNKNOWN] for batch in batches]
    ways: dict[str, list[Callable[[], object]]] = {
        "stream door": [partial(schema.lines, batch) for batch in batches],
        "stream door, one unknown type a batch": [partial(schema.lines, batch) for batch in odd],
        "HTTP door": [partial(schema.plain_body, _body(batch)) for batch in batches],
        "HTTP door, one unknown type a body": [partial(_odd_body, schema, _body(batch)) for batch in odd],
        "union, one call a batch": [partial(union, b"".join(batch)) for batch in batches],
        "envelope, a decoder a type": [partial(envelope, b"".join(batch)) for batch in batches],
        "dict": [partial(plain, b"".join(batch)) for batch in batches],
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.runs):
        for name, calls in ways.items():
            started = time.process_time_ns()
            for call in calls:
                call()
            spent[name].append((time.process_time_ns() - started) / len(lines) / 1e3)
    about = report.machine()
    print(report.heading(about))
    print(f"{len(lines)} events, {BATCH} a batch; us an event, median (min-max) of {arguments.runs} runs\n")
    print(report.table(["way", "us/event"], [[name, report.spread(us, 2)] for name, us in spent.items()]))
    report.write(arguments.json, {"machine": about, "us_per_event": spent})
    return 0


def _body(lines: Sequence[bytes]) -> bytes:
    return b'{"events":[' + b",".join(line[:-1] for line in lines) + b"]}"


def _odd_body(schema: Schema, body: bytes) -> object:
    """As the intake takes it: at once, in vain, then element by element."""
    return schema.plain_body(body) or schema.lines(schema.elements(body) or [])


def _by_envelope(lines: Sequence[bytes]) -> Callable[[bytes], object]:
    """Properties by type, each with the optional fields that these lines have."""
    names: dict[str, set[str]] = {}
    for line in lines:
        event = msgspec.json.decode(line)
        names.setdefault(event["event_type"], set()).update(event["properties"])
    decoders = {
        kind: msgspec.json.Decoder(
            msgspec.defstruct("Properties", [(name, object, None) for name in sorted(fields)], gc=False)
        ).decode
        for kind, fields in names.items()
    }
    envelopes = msgspec.json.Decoder(_Envelope).decode_lines

    def decode(batch: bytes) -> object:
        return [(event, decoders[event.event_type](event.properties)) for event in envelopes(batch)]

    return decode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
