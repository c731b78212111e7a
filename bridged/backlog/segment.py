"""The segment: unit of durability and of delivery. Pure.

A segment is up to 2,000 Mixpanel events, encoded as NDJSON and compressed once, when it is committed: a *block* of raw
deflate that ends on a byte boundary. Blocks joined behind a gzip header and before an empty final block are one
ordinary gzip member (RFC 1951 and 1952), so a request is made of any number of segments without compressing anything
again: what was committed is what is sent. Measured: joining by gunzip and gzip would cost 1.7 us an event, half of
all that the path costs; this costs nothing that can be measured.
"""

import io
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import msgspec
from isal import isal_zlib
from msgspec import Struct

_GZIP_HEADER: Final = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
_FINAL_BLOCK: Final = b"\x03\x00"


class Batch(Struct, gc=False):
    """Mapped events on their way into a segment: NDJSON and, an event a byte, the codes of their types."""

    ndjson: bytes
    codes: bytes


class Segment(Struct, gc=False):
    """A row of the spool."""

    id: int
    created_at: float  # wall clock, seconds
    raw_bytes: int  # of the NDJSON
    raw_crc32: int  # of the NDJSON
    codes: bytes  # an event a byte
    block: bytes  # raw deflate, ends on a byte boundary, without a final block

    @property
    def events(self) -> int:
        """How many events it holds."""
        return len(self.codes)

    @property
    def size(self) -> int:
        """What it costs, in memory and on disk, in bytes."""
        return len(self.block) + len(self.codes) + 64

    @property
    def checksum(self) -> int:
        """CRC-32 of everything in the row that delivery relies on."""
        # As wide as SQLite's integers: a damaged one must be seen, not fail to be packed.
        head = struct.pack("<qdqqq", self.id, self.created_at, self.raw_bytes, self.raw_crc32, len(self.codes))
        return isal_zlib.crc32(self.block, isal_zlib.crc32(self.codes, isal_zlib.crc32(head)))


class Packer:
    """Compresses events into segments. For one thread: its memory is used again for each of them.

    A thread that lets the interpreter's lock go gets it back from a busy loop milliseconds later, and compressing as the zlib
    module does lets it go for each buffer of output, seven times a segment: under load the writer then spends its time
    waiting. This way it is once. (Measured beside a thread that never rests: 130 segments/s instead of 21.)
    """

    def __init__(self, max_bytes: int = 2_000_000) -> None:
        """`max_bytes`: of the NDJSON of a segment; a larger one is compressed all the same, as slowly as ever."""
        # Private, but made for exactly this, and isal.igzip's own threads stand on it; the version is bounded. What can't be
        # compressed grows by less than a tenth.
        self._compress = isal_zlib._ParallelCompress(max_bytes + max_bytes // 8 + 1024, 1).compress_and_crc  # noqa: SLF001

    def pack(self, id_: int, created_at: float, ndjson: bytes | memoryview, codes: bytes) -> Segment:
        """One segment."""
        try:
            block, crc32 = self._compress(ndjson, b"")
        except OverflowError:
            deflate = isal_zlib.compressobj(1, isal_zlib.DEFLATED, -15)
            block = deflate.compress(ndjson) + deflate.flush(isal_zlib.Z_FULL_FLUSH)
            crc32 = isal_zlib.crc32(ndjson)
        return Segment(id_, created_at, len(ndjson), crc32, codes, block)

    def pack_all(self, first_id: int, created_at: float, groups: Iterable[Sequence[Batch]]) -> list[Segment]:
        """Each group of batches as a segment.

        One after the other is joined in the same memory: getting 1.4 MB anew for each, from the system, costs as much as a
        tenth of compressing it.
        """
        segments = []
        with io.BytesIO() as joined:
            for id_, group in enumerate(groups, first_id):
                joined.seek(0)
                joined.writelines([batch.ndjson for batch in group])
                codes = b"".join([batch.codes for batch in group])
                with joined.getbuffer() as memory, memory[: joined.tell()] as ndjson:
                    segments.append(self.pack(id_, created_at, ndjson, codes))
        return segments


def request_body(segments: Sequence[Segment]) -> bytes:
    """The gzip NDJSON body of some segments, as /import takes it."""
    crc, size = 0, 0
    for segment in segments:
        crc = isal_zlib.crc32_combine(crc, segment.raw_crc32, segment.raw_bytes)
        size += segment.raw_bytes
    trailer = struct.pack("<II", crc, size & 0xFFFFFFFF)
    return b"".join([_GZIP_HEADER, *[segment.block for segment in segments], _FINAL_BLOCK, trailer])


def lines(segments: Sequence[Segment]) -> list[bytes]:
    """The events of some segments, one NDJSON line each, without the newlines. Raises isal_zlib.error if damaged."""
    raw = b"".join(isal_zlib.decompress(segment.block + _FINAL_BLOCK, -15) for segment in segments)
    return raw.split(b"\n")[:-1]


class _InsertId(Struct):
    insert_id: str = msgspec.field(default="", name="$insert_id")


class _Mapped(Struct):
    properties: _InsertId


def insert_ids(segments: Sequence[Segment]) -> list[str]:
    """The `$insert_id` of each event, "" for one that has none."""
    decode, ids = msgspec.json.Decoder(_Mapped).decode, []
    for line in lines(segments):
        try:
            ids.append(decode(line).properties.insert_id)
        except msgspec.DecodeError:
            ids.append("")
    return ids


def cut(batches: Iterable[Batch], max_events: int, max_bytes: int) -> Iterator[list[Batch]]:
    """Batches, in order, in as few groups as the limits of a segment allow. No batch may exceed them alone."""
    group: list[Batch] = []
    events = size = 0
    for batch in batches:
        if group and (events + len(batch.codes) > max_events or size + len(batch.ndjson) > max_bytes):
            yield group
            group, events, size = [], 0, 0
        group.append(batch)
        events += len(batch.codes)
        size += len(batch.ndjson)
    if group:
        yield group
