"""The events of every benchmark: made-up Currents events of the real type mix, encoded before any clock starts.

A file holds so many distinct events. A loader goes round and round in it, so the ids must change with every round, or
the sink could not tell a doubled event from a repeated one. The last two characters of every id are two bytes that
occur nowhere else, and two `bytes.replace` over a chunk (a memchr and a memcpy, 0.1 us an event) turn them into the
number of the round: the loader shares its cores with the daemon, so it must not think.
"""

import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from bridged.currents.examples import example_day

DISTINCT: Final = 50_000
MAX_ROUNDS: Final = 256

_HIGH, _LOW = b"\0", b"\1"
_HEX = [b"%x" % digit for digit in range(16)]
_ID = re.compile(rb'("id":"[0-9a-f-]{34})[0-9a-f]{2}"')


def write(
    path: Path,
    count: int,
    seed: int = 1,
    *,
    day: Callable[[random.Random, int, int], Iterable[dict[str, Any]]] = example_day,
) -> None:
    """Writes so many distinct events, one a line, with room for the round in their ids. `day` makes them."""
    # All of them in the past: an event that is ahead of the clock would leave the common path.
    start_s = int(time.time()) - 2 * 86_400
    encode = msgspec.json.Encoder().encode
    with path.open("wb") as file:
        for event in day(random.Random(seed), count, start_s):
            line, found = _ID.subn(lambda match: match[1] + _HIGH + _LOW + b'"', encode(event), count=1)
            if found != 1:
                raise AssertionError(f"no id to patch: {line[:200]!r}")
            file.write(line + b"\n")


def read(path: Path) -> list[bytes]:
    """The lines of a file, each with its newline; ids still want their round."""
    return path.read_bytes().splitlines(keepends=True)


def patched(data: bytes, number: int) -> bytes:
    """The events of one round."""
    if number >= MAX_ROUNDS:
        raise ValueError(f"more than {MAX_ROUNDS} rounds: ids would repeat; more distinct events are needed")
    return data.replace(_HIGH, _HEX[number >> 4]).replace(_LOW, _HEX[number & 15])


def events(count: int, seed: int = 1) -> list[bytes]:
    """So many lines, complete: for benchmarks of one process."""
    encode = msgspec.json.Encoder().encode
    start_s = int(time.time()) - 2 * 86_400
    return [encode(event) + b"\n" for event in example_day(random.Random(seed), count, start_s)]


class Feed:
    """An endless supply of chunks, each of so many events. `form` makes a chunk of lines, before the clock starts."""

    def __init__(self, lines: Sequence[bytes], per_chunk: int, form: Callable[[Sequence[bytes]], bytes]) -> None:
        self._lines = lines
        self._per_chunk = per_chunk
        self._form = form
        self._chunks = [form(lines[at : at + per_chunk]) for at in range(0, len(lines), per_chunk)]
        self._at = 0
        self._round = 0

    def take(self, most: int) -> tuple[bytes, int]:
        """The next chunk and how many events it holds: `most` or fewer."""
        first = self._at * self._per_chunk
        events = min(self._per_chunk, len(self._lines) - first)
        chunk = self._chunks[self._at]
        if events > most:
            chunk, events = self._form(self._lines[first : first + most]), most
        chunk = patched(chunk, self._round)
        self._at += 1
        if self._at == len(self._chunks):
            self._at = 0
            self._round += 1
        return chunk, events


def ndjson(lines: Sequence[bytes]) -> bytes:
    """A chunk for the stream door."""
    return b"".join(lines)


def http_request(lines: Sequence[bytes]) -> bytes:
    """A request for the HTTP door, as Braze's Custom HTTP connector makes it."""
    body = b'{"events":[' + b",".join([line[:-1] for line in lines]) + b"]}"
    return (
        b"POST /v1/currents HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (len(body), body)
    )
