"""Segments: whatever is cut, packed and joined comes out of any gunzip as it went in; damage is seen."""

import gzip
import random
import zlib
from collections.abc import Callable, Iterator
from itertools import tee

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isal import igzip, isal_zlib

from bridged.backlog.segment import Batch, Packer, Segment, cut, lines, request_body

event_lines = st.binary(max_size=60).map(lambda line: line.replace(b"\n", b" ") + b"\n")
batches = st.lists(
    st.lists(event_lines, min_size=1, max_size=6).map(lambda each: Batch(b"".join(each), bytes(len(each)))), max_size=12
)


def made_of(ndjson: bytes, id_: int = 1, codes: bytes | None = None) -> Segment:
    """A segment of these lines."""
    return Packer().pack(id_, 1.5, ndjson, bytes(ndjson.count(b"\n")) if codes is None else codes)


def by_zlib(body: bytes) -> bytes:
    """What zlib makes of a body that must be one gzip member, whole, and nothing after it."""
    inflate = zlib.decompressobj(wbits=31)
    raw = inflate.decompress(body) + inflate.flush()
    assert inflate.eof
    assert inflate.unused_data == b""
    return raw


READERS: list[Callable[[bytes], bytes]] = [gzip.decompress, igzip.decompress, by_zlib]


@settings(deadline=None)
@given(batches, st.integers(1, 10), st.integers(100, 1000), st.data())
def test_any_grouping_is_one_gzip_of_the_very_bytes(
    appended: list[Batch], max_events: int, max_bytes: int, data: st.DataObject
) -> None:
    """Cut at any limits, joined in any groups, read by three independent readers: the concatenation, byte for byte."""
    segments = Packer(max_bytes).pack_all(1, 0.0, cut(appended, max_events, max_bytes))
    assert [segment.id for segment in segments] == list(range(1, len(segments) + 1))
    raw = b"".join(batch.ndjson for batch in appended)
    out = []
    while segments:
        count = data.draw(st.integers(1, len(segments)))
        group, segments = segments[:count], segments[count:]
        bodies = {read(request_body(group)) for read in READERS}
        assert len(bodies) == 1
        out.append(bodies.pop())
        assert len(out[-1]) == sum(segment.raw_bytes for segment in group)
        assert lines(group) == out[-1].split(b"\n")[:-1]
        assert len(lines(group)) == sum(segment.events for segment in group)
    assert b"".join(out) == raw


def test_what_outgrows_the_packers_memory_is_compressed_all_the_same() -> None:
    """An event larger than a segment, or bytes that nothing makes smaller, are packed as any other; so is what comes after."""
    packer = Packer(max_bytes=1000)
    noise = random.Random(7).randbytes(100_000).replace(b"\n", b" ") + b"\n"
    segments = [packer.pack(id_, 1.5, ndjson, b"\x01") for id_, ndjson in enumerate([b"a\n", noise, b"b\n"])]

    assert by_zlib(request_body(segments)) == b"a\n" + noise + b"b\n"


@given(batches, st.integers(1, 10), st.integers(1, 500))
def test_cuts_keep_order_and_limits(appended: list[Batch], max_events: int, max_bytes: int) -> None:
    """Batches stay whole and in order; a cut exceeds a limit only when it is a single batch, and none is needlessly small."""
    groups = list(cut(appended, max_events, max_bytes))
    assert [batch for group in groups for batch in group] == appended
    cuts = [(b"".join(b.ndjson for b in group), b"".join(b.codes for b in group)) for group in groups]
    alone = {(batch.ndjson, batch.codes) for batch in appended}
    for ndjson, codes in cuts:
        assert ndjson.count(b"\n") == len(codes)
        assert (len(codes) <= max_events and len(ndjson) <= max_bytes) or (ndjson, codes) in alone
    rest: Iterator[Batch] = iter(appended)
    for ndjson, codes in cuts[:-1]:
        size = 0
        while size < len(ndjson):
            size += len(next(rest).ndjson)
        rest, ahead = tee(rest)
        first = next(ahead)
        assert len(codes) + len(first.codes) > max_events or len(ndjson) + len(first.ndjson) > max_bytes


def test_nothing_to_cut() -> None:
    """No batches, no segments."""
    assert list(cut([], 10, 10)) == []


@pytest.mark.parametrize("count", [0, 1, 3])
def test_empty_segments_and_no_segments_at_all(count: int) -> None:
    """Edge of the format: nothing is still one whole gzip member."""
    body = request_body([made_of(b"")] * count)
    assert [read(body) for read in READERS] == [b""] * 3
    assert lines([made_of(b"")] * count) == []


@pytest.mark.parametrize("size", [1, 100, 65_535, 65_536, 3_000_000])
def test_sizes_around_the_borders_of_deflate(size: int) -> None:
    """Stored blocks, windows and lengths have their own borders; text that can't be compressed meets them."""
    noise = bytes(range(256)) * (size // 256 + 1)
    for text in (b"x" * size, noise[:size].replace(b"\n", b" ")):
        segments = [made_of(text + b"\n"), made_of(b"tail\n"), made_of(text + b"\n")]
        assert {read(request_body(segments)) for read in READERS} == {text + b"\ntail\n" + text + b"\n"}


def test_facts_of_a_segment() -> None:
    """What the spool and the pace count by."""
    segment = made_of(b"{}\n{}\n", id_=7, codes=b"\x01\x02")
    assert (segment.id, segment.created_at, segment.events, segment.raw_bytes) == (7, 1.5, 2, 6)
    assert segment.raw_crc32 == zlib.crc32(b"{}\n{}\n")
    assert segment.size >= len(segment.block) + len(segment.codes)


def test_the_length_in_the_trailer_is_counted_modulo_4_gib() -> None:
    """As gzip has it. Limits keep requests far below, but a wrong limit must not end the sender."""
    huge = made_of(b"{}\n")
    huge.raw_bytes = 2**32 - 1
    assert request_body([huge, huge])[-4:] == b"\xfe\xff\xff\xff"


NDJSON = b'{"event":"Email Open","properties":{"time":1}}\n' * 5


@given(st.data())
def test_a_single_flipped_bit_is_seen(data: st.DataObject) -> None:
    """A disk that gives back one wrong bit, in the codes or in the block, is caught before anything is sent."""
    segment = made_of(NDJSON)
    checksum = segment.checksum
    name = data.draw(st.sampled_from(["codes", "block"]))
    damaged = bytearray(getattr(segment, name))
    bit = data.draw(st.integers(0, 8 * len(damaged) - 1))
    damaged[bit // 8] ^= 1 << bit % 8
    setattr(segment, name, bytes(damaged))
    assert segment.checksum != checksum


@given(st.sampled_from(["id", "raw_bytes", "raw_crc32"]), st.integers(0, 31))
def test_a_changed_number_is_seen(name: str, bit: int) -> None:
    """So are the numbers that a request is made with, and a block under another row's id."""
    segment = made_of(NDJSON, id_=3)
    checksum = segment.checksum
    setattr(segment, name, getattr(segment, name) ^ (1 << bit))
    assert segment.checksum != checksum


def test_codes_and_block_do_not_run_into_each_other() -> None:
    """A byte that moves from the one to the other is damage, too."""
    segment = made_of(NDJSON)
    checksum = segment.checksum
    codes, block = segment.codes, segment.block
    segment.codes, segment.block = codes[:-1], codes[-1:] + block
    moved = segment.checksum
    segment.codes, segment.block = codes + block[:1], block[1:]
    assert checksum not in (moved, segment.checksum)


def test_a_damaged_block_raises_and_nothing_else() -> None:
    """Reading the lines of a damaged segment is an error of one known kind, or gives lines; never a crash."""
    segment = made_of(NDJSON)
    whole = segment.block
    failed = 0
    for at in range(len(whole)):
        for flip in (1, 0x80, 0xFF):
            segment.block = whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :]
            try:
                lines([segment])
            except isal_zlib.error:
                failed += 1
    assert failed
