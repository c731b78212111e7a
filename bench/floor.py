"""The floor: the least that an event can cost in one Python process, with no socket, no disk and no second thread.

The project's own decoder, mapping, encoder and compressor, over batches of 400 events of the real mix, each step
clocked for itself. (So many come with one read of a busy socket. Batches of 2,000 fall out of the processor's cache,
and cost half as much again.) The floor is decode + encode + gzip; mapping is shown beside it. What the daemon costs
above it is what mapping, doors, durability, delivery and accounting cost.
"""

import gc
import statistics
import sys
import time
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from bench import data, report
from bridged.backlog.segment import Packer
from bridged.currents.table import EVENT_TYPES
from bridged.mixpanel.mapping import EventMapping, MappingSettings

BATCH = 400
EVENTS = 20_000
_PASSES = 5


class Floor(Struct, kw_only=True):
    """Microseconds of processor time for an event."""

    decode: float
    map: float
    encode: float
    gzip: float
    event_bytes: float
    mapped_bytes: float
    gzip_bytes: float

    @property
    def total(self) -> float:
        """The floor: decode + encode + gzip."""
        return self.decode + self.encode + self.gzip


def measure(lines: Sequence[bytes]) -> Floor:
    """Goes through the events a few times; gives the median pass of each step."""
    mapping = EventMapping(EVENT_TYPES, MappingSettings(token="0123456789abcdef0123456789abcdef"))
    encode_lines = msgspec.json.Encoder().encode_lines
    packer = Packer()
    batches = [lines[at : at + BATCH] for at in range(0, len(lines), BATCH)]
    clock = time.process_time_ns
    passes: list[tuple[int, int, int, int]] = []
    mapped_bytes = gzip_bytes = 0
    gc.collect()
    for _ in range(_PASSES):
        spent = [0, 0, 0, 0]
        mapped_bytes = gzip_bytes = 0
        for batch in batches:
            now_s = time.time()
            at = [clock()]
            decoded = mapping.schema.lines(batch)
            at.append(clock())
            mapped = mapping.map(decoded, now_s)
            at.append(clock())
            ndjson = encode_lines(mapped.forms)
            at.append(clock())
            segment = packer.pack(1, now_s, ndjson, mapped.codes)
            at.append(clock())
            spent = [total + after - before for total, before, after in zip(spent, at, at[1:], strict=False)]
            mapped_bytes += len(ndjson)
            gzip_bytes += len(segment.block)
            if mapped.refusals or mapped.skips:
                raise AssertionError(
                    f"the example events aren't all forwarded: {mapped.refusals[:1]} {mapped.skips[:1]}"
                )
        passes.append((spent[0], spent[1], spent[2], spent[3]))
    count = len(lines)
    decode, map_, encode, gzip = (statistics.median(step) / count / 1e3 for step in zip(*passes, strict=True))
    return Floor(
        decode=decode,
        map=map_,
        encode=encode,
        gzip=gzip,
        event_bytes=sum(map(len, lines)) / count,
        mapped_bytes=mapped_bytes / count,
        gzip_bytes=gzip_bytes / count,
    )


def main(argv: Sequence[str]) -> int:
    """Prints the floor."""
    parser = report.options("floor", __doc__)
    parser.add_argument("--events", type=int, default=EVENTS, help="distinct events, default %(default)s")
    arguments = parser.parse_args(argv)
    about = report.machine()
    lines = data.events(arguments.events)
    floors = [measure(lines) for _ in range(arguments.runs)]
    print(report.heading(about))
    print(
        f"{floors[0].event_bytes:.0f} bytes as a Currents event, {floors[0].mapped_bytes:.0f} mapped, "
        f"{floors[0].gzip_bytes:.0f} compressed; us an event, median (min-max) of {arguments.runs} runs\n"
    )
    rows = [[name, report.spread([getattr(f, name) for f in floors], 2)] for name in ("decode", "encode", "gzip")]
    rows.append(["floor", report.spread([f.total for f in floors], 2)])
    rows.append(["mapping, besides", report.spread([f.map for f in floors], 2)])
    print(report.table(["step", "us/event"], rows))
    report.write(arguments.json, {"machine": about, "floor": floors})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
