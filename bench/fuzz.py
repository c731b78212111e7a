"""Inputs that nobody sends, by the million: examples of every event type, changed at random, into decoder, framer and mapping.

What must hold for any input whatever: nothing raises; every line ends in one place (an event, a dead letter, skipped); what goes
on is NDJSON that Mixpanel takes, by the rules of the emulator, which shares no code with the mapping; and however bytes are cut
into packets, the framer finds the same lines. With atheris (--engine atheris) the changes follow the coverage of the code.
"""

import argparse
import asyncio
import contextlib
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from bridged.backlog.spool import Intaken, Spool
from bridged.currents.examples import example_event
from bridged.currents.table import EVENT_TYPES
from bridged.emulator import validation
from bridged.errors import BadRequest, TooLarge
from bridged.intake import Intake
from bridged.mixpanel.mapping import EventMapping, MappingSettings
from bridged.sources.stream import StreamOptions, StreamSource, _Connection

NOW_S: Final = 1_790_000_000
MAX_LINE: Final = 5000
_RULES: Final = validation.Rules(token="t")  # no secret: the project of the fuzzer
_BOM: Final = b"\xef\xbb\xbf"

TOKENS: Final = (
    *(
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"1e400",
        b"-1e400",
        b"1e-400",
        b"1" * 400,
        b"-" + b"9" * 30,
        b"0.1e1",
        b"-0",
        b"01",
        b"0x10",
    ),
    *(
        b"18446744073709551616",
        b"9223372036854775807",
        b"-9223372036854775809",
        b"1.0",
        b"1e3",
        b"true",
        b"null",
        b'""',
        b"{}",
        b"[]",
    ),
    *(
        b'"\\ud800"',
        b'"\\udc00\\ud800"',
        b'"\\u0000"',
        b"\x00",
        b"\xff",
        b"\xc0\xaf",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\xe2\x80\xa8",
        _BOM,
    ),
    *(
        b'"' + b"x" * 300 + b'"',
        b"[" * 600,
        b'{"a":' * 600,
        b"[[[[[1]]]]]",
        b'{"a":{"a":{"a":{"a":1}}}}',
        b"[" + b"1," * 300 + b"1]",
    ),
    *(
        b'"time":',
        b'"id":',
        b'"user":',
        b'"event_type":',
        b'"properties":',
        b'"external_user_id":',
        b'"custom_properties":',
        b'"events":',
    ),
    *(
        b'"unknown"',
        b'"anon"',
        b'"$insert_id"',
        b'"distinct_id"',
        b'"$identify"',
        b"\n",
        b"\r\n",
        b"\r",
        b" ",
        b"\t",
        b"\x1a",
        b"\x7f",
    ),
    *(
        b",",
        b":",
        b'"',
        b"\\",
        b"\\u",
        b"{",
        b"}",
        b"[",
        b"]",
        b"1790003599",
        b"1790003601",
        b"31535999",
        b"31536000",
        b"1790000000000",
    ),
)


class _Never:
    """A commit that never comes: nothing is acked."""

    def add_done_callback(self, callback: object) -> None:
        pass


class Ledger:
    """Takes the place of the spool: what a commit would hold, without the disk."""

    near_cap = False
    pending_bytes = 1  # somebody waits for a commit: what holds no event comes here, too
    max_segment_bytes = 2_000_000

    def __init__(self) -> None:
        self.taken: list[Intaken] = []

    def append(self, intaken: Intaken, _sender: int = 0) -> Any:
        """Keeps it; the future is nobody's here."""
        self.taken.append(intaken)
        return _Never()


class Broken(AssertionError):
    """A promise that an input broke."""


class Fuzzer:
    """Everything between the bytes of a door and the spool, and the promises that it makes."""

    def __init__(self, **settings: Any) -> None:
        mapping = EventMapping(EVENT_TYPES, MappingSettings(**{"token": "t"} | settings))
        self.ledger = Ledger()
        self.intake = Intake(mapping, cast("Spool", self.ledger), clock=lambda: NOW_S)
        self.ends: Counter[str] = Counter()

    def lines(self, data: bytes) -> None:
        """As the stream door hands lines on."""
        lines = data.splitlines(keepends=True) if b"\r" not in data else [part + b"\n" for part in data.split(b"\n")]
        self.ledger.taken.clear()
        self.intake.accept_lines(lines)
        self._judge(sum(1 for line in lines if line.removeprefix(_BOM).strip()))

    def body(self, data: bytes) -> None:
        """As the HTTP door does. Only what is no JSON at all may be refused."""
        self.ledger.taken.clear()
        try:
            self.intake.accept_body(data)
        except BadRequest:
            self.ends["refused"] += 1
            with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                msgspec.json.decode(data.removeprefix(_BOM))
                raise Broken("JSON was refused") from None
        except TooLarge:
            self.ends["too large"] += 1
        else:
            self._judge(None)

    def _judge(self, expected: int | None) -> None:
        events = letters = skipped = 0
        for taken in self.ledger.taken:
            letters += len(taken.dead_letters)
            skipped += len(taken.skipped)
            for letter in taken.dead_letters:
                _demand(bool(letter.reason), "a dead letter without a reason")
                _demand(not letter.reason.startswith("bridged failed"), letter.reason)
            for batch in taken.batches:
                events += len(batch.codes)
                lines = batch.ndjson.split(b"\n")
                _demand(lines.pop() == b"", "a batch without its last newline")
                _demand(len(lines) == len(batch.codes), "a batch with more or fewer lines than codes")
                for line in lines:
                    failure = validation.check(msgspec.json.decode(line), len(line), NOW_S, _RULES)
                    _demand(failure is None, f"Mixpanel would refuse it: {failure} {line[:300]!r}")
        self.ends["events"] += events
        self.ends["dead letters"] += letters
        self.ends["skipped"] += skipped
        if expected is not None:
            _demand(events + letters + skipped == expected, f"{expected} lines, {events} + {letters} + {skipped} ends")

    def framed(self, data: bytes, cuts: Sequence[int]) -> None:
        """However it is cut, the framer hands on the same lines, in order, and counts the same."""
        whole, pieces = _Framed(), _Framed()
        whole.feed([data])
        edges = sorted({0, *(cut % (len(data) + 1) for cut in cuts), len(data)})
        pieces.feed([data[a:b] for a, b in itertools.pairwise(edges)])
        _demand(whole.calls == pieces.calls, "cut otherwise, other lines")
        _demand(pieces.source.unfinished == 0, "bytes that are counted as unfinished for ever")
        self.ends["framed lines"] += len(whole.calls)


def _demand(condition: bool, what: str) -> None:
    if not condition:
        raise Broken(what)


class _Room:
    """The part of a spool that the framer looks at."""

    class room:  # noqa: N801  # named as the spool's own
        @staticmethod
        def is_set() -> bool:
            return True


class _Source(StreamSource):
    """Connections that nobody has to be read from."""

    def read_on_next_turn(self, connection: _Connection) -> None:
        pass


class _Framed:
    """The framer, with an intake that only writes down what it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple[bytes, bool]] = []
        self.source = _Source(StreamOptions(max_line=MAX_LINE), cast("Intake", self), cast("Spool", _Room()))
        self._connection = self.source.accept()
        self._connection.connection_made(_Transport())

    def accept_lines(self, lines: Sequence[bytes], _sender: int = 0) -> _Never:
        self.calls += [(bytes(line), False) for line in lines]
        return _Never()

    def accept_oversized(self, head: bytes, limit: int) -> _Never:
        self.calls.append((bytes(head), True))
        return _Never()

    def feed(self, pieces: Sequence[bytes]) -> None:
        """All of a client's bytes, and its end."""
        for piece in pieces:
            if piece:
                self._connection.data_received(piece)
        self._connection.eof_received()


class _Transport(asyncio.Transport):
    def is_closing(self) -> bool:
        return False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def close(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def write(self, data: object) -> None:
        _demand(b'{"error"' not in cast("bytes", data), "a mistake of ours, in the log")


# -- inputs ------------------------------------------------------------------------------------------------------------


def corpus(seed: int = 1) -> list[bytes]:
    """An example of every event type, as JSON."""
    source = random.Random(seed)
    return [msgspec.json.encode(example_event(row, source, NOW_S - 60)) for row in EVENT_TYPES]


def mutated(data: bytes, source: random.Random) -> bytes:
    """Changed in one to six places."""
    changed = bytearray(data)
    for _ in range(source.randint(1, 6)):
        at = source.randrange(len(changed) + 1)
        to = min(len(changed), at + source.choice((0, 1, 2, 4, 8, 30, 100)))
        kind = source.randrange(6)
        if kind == 0:
            changed[at:to] = source.choice(TOKENS)
        elif kind == 1:
            del changed[at:to]
        elif kind == 2:
            changed[at:at] = changed[at:to]
        elif kind == 3 and at < len(changed):
            changed[at] = source.randrange(256)
        elif kind == 4 and (end := changed.find(b":", at)) >= 0:
            # A value for another: still JSON, of another type.
            stop = min((p for p in (changed.find(b",", end), changed.find(b"}", end)) if p >= 0), default=len(changed))
            changed[end + 1 : stop] = source.choice(TOKENS)
        elif kind == 5:
            changed[at:at] = source.randbytes(source.randint(1, 8))
    return bytes(changed)


def attempt(fuzzer: Fuzzer, data: bytes, way: int) -> None:
    """One execution: as lines, as a body, as the stream of a client."""
    if way == 0:
        fuzzer.lines(data)
    elif way == 1:
        fuzzer.body(b'{"events":[' + data.replace(b"\n", b",") + b"]}" if len(data) % 3 else data)
    else:
        fuzzer.framed(data * (1 + len(data) % 8), [way, way // 7, way // 3, len(data) // 2])


def _own(seconds: float, seed: int, settings: dict[str, Any]) -> int:
    source, fuzzer, examples = random.Random(seed), Fuzzer(**settings), corpus(seed)
    started, count = time.monotonic(), 0
    while (took := time.monotonic() - started) < seconds:
        for _ in range(200):
            data = mutated(b"\n".join(source.choices(examples, k=source.choice((1, 1, 2, 5)))), source)
            way = source.choice((0, 0, 1, 1, source.randrange(2, 10_000)))
            try:
                attempt(fuzzer, data, way)
            except Exception as error:
                file = Path(tempfile.gettempdir(), f"bridged-fuzz-{seed}-{count}.bin")
                file.write_bytes(data)
                print(f"BROKEN by {file} (way {way}): {error!r}")
                raise
            count += 1
    print(f"{count:,} executions in {took:.0f} s, nothing broken; {dict(fuzzer.ends)}")
    return 0


def _atheris(seconds: float, seed: int, settings: dict[str, Any]) -> int:
    import atheris  # type: ignore[import-untyped,import-not-found,unused-ignore]  # noqa: PLC0415  # not there on every Python

    for module in ("bridged.currents.schema", "bridged.mixpanel.mapping", "bridged.intake", "bridged.sources.stream"):
        for name, thing in list(vars(sys.modules[module]).items()):
            for method_name, method in (
                list(vars(thing).items()) if isinstance(thing, type) and thing.__module__ == module else ()
            ):
                if callable(method) and hasattr(method, "__code__"):
                    setattr(thing, method_name, atheris.instrument_func(method))
            if callable(thing) and hasattr(thing, "__code__") and thing.__module__ == module:
                setattr(sys.modules[module], name, atheris.instrument_func(thing))
    fuzzer = Fuzzer(**settings)

    def one(data: bytes) -> None:
        if data:
            attempt(fuzzer, data[1:], (0, 1, 2 + data[0])[data[0] % 3])

    with tempfile.TemporaryDirectory() as folder:
        for number, example in enumerate(corpus(seed)):
            Path(folder, f"{number}.json").write_bytes(bytes([number % 3]) + example)
        atheris.Setup(
            [sys.argv[0], folder, f"-max_total_time={int(seconds)}", f"-seed={seed}", "-max_len=4096", "-verbosity=1"],
            one,
        )
        atheris.Fuzz()  # ends the process
    return 0


def main(argv: Sequence[str]) -> int:
    """Fuzzes for so long; 1 and the input's file when something broke."""
    parser = argparse.ArgumentParser(prog="python -m bench fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--engine", choices=("own", "atheris"), default="own", help="atheris follows the coverage, slower"
    )
    parser.add_argument("--unknown", choices=("dead_letter", "forward", "skip"), default="dead_letter")
    parser.add_argument("--anonymous", choices=("skip", "device", "dead_letter"), default="skip")
    arguments = parser.parse_args(argv)
    engine = _own if arguments.engine == "own" else _atheris
    settings = {"unknown": arguments.unknown, "anonymous": arguments.anonymous}
    return engine(arguments.minutes * 60, arguments.seed, settings)
