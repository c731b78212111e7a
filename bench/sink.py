"""The sink: a bare Mixpanel in a process of its own. It takes every batch, counts its events, and says 200.

The emulator checks every event as Mixpanel does, which costs more than the daemon that is to be measured; the sink only
gunzips and counts newlines. With `--check` it also keeps every `$insert_id`, to tell whether one came twice. With
`--keep FILE` it writes all that it gets there, for `bench peers`, whose peers send other forms than bridged does.

It prints `{"port":N}` when it listens, and a `Report` for every line that comes on its standard input. It ends with
its input. With `--arrivals` it keeps every body with the time at which it was there, and a line that names a file makes
it write there what was in them: afterwards, when nothing is measured any more.
"""

import argparse
import asyncio
import base64
import gc
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import parse_qs

import msgspec
import uvloop
from isal import isal_zlib
from msgspec import Struct

_INSERT_ID = re.compile(rb'"\$insert_id":"([^"]*)"')
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CONTINUE = re.compile(rb"\r\nexpect: *100-continue", re.IGNORECASE)
_GzipError: type[Exception] = isal_zlib.IsalError  # type: ignore[assignment]  # its stub has an instance for the class
_FORM = b"data="
_REFUSED = (
    b'{"code":400,"error":"some data points in the request failed validation","num_records_imported":0,'
    b'"failed_records":[{"index":0,"insert_id":"","field":"event","message":"an event must have a name"}]}'
)
_GZIP = 31  # zlib's number for "with a gzip header and trailer"


class Report(Struct, kw_only=True):
    """What has come so far. `last_at` is of the monotonic clock, which all processes of a machine share."""

    events: int = 0
    distinct: int = 0  # only with --check
    requests: int = 0
    bad: int = 0  # requests that were not understood: answered 400
    bytes: int = 0  # compressed
    last_at: float = 0.0
    cpu_s: float = 0.0


class Arrival(Struct, array_like=True):
    """A batch: when it was there, by the monotonic clock, and the `$insert_id` of its events."""

    at: float
    ids: list[str]


class Sink:
    """The counts, shared by all connections."""

    def __init__(self, *, check: bool = False, arrivals: bool = False, keep: Path | None = None) -> None:
        self._report = Report()
        self._check = check
        self._arrivals = arrivals
        self._arrived: list[tuple[float, bytes]] = []
        self._ids: set[bytes] = set()
        self._keep = keep

    def take(self, body: bytes) -> bytes:
        """Counts a request; gives the answer."""
        report = self._report
        report.requests += 1
        try:
            raw, events = _read(body)
        except (_GzipError, ValueError):
            report.bad += 1
            return _answer(b"400 Bad Request", b'{"code":400,"error":"unreadable","status":"Bad Request"}')
        if events == 1 and b'"event":""' in raw:
            # A daemon that was halted asks so whether its credential is good again: Mixpanel refuses the record.
            return _answer(b"400 Bad Request", _REFUSED)
        report.events += events
        report.bytes += len(body)
        if self._check:
            self._ids.update(_INSERT_ID.findall(raw))
        if self._keep:
            with self._keep.open("ab") as file:
                file.write(_plain(raw).rstrip(b"\n") + b"\n")
        report.last_at = time.monotonic()
        if self._arrivals:
            self._arrived.append((report.last_at, body))
        if body.startswith(_FORM):
            # What the official clients want to hear, the one with verbose=1 in its form and the one without.
            return _answer(b"200 OK", b'{"status":1,"error":null}' if b"verbose=1" in body[-100:] else b"1")
        return _answer(b"200 OK", b'{"code":200,"num_records_imported":%d,"status":"OK"}' % events)

    def write_arrivals(self, path: Path) -> None:
        """Writes every batch that was kept."""
        arrivals = [
            Arrival(at, [id_.decode() for id_ in _INSERT_ID.findall(isal_zlib.decompress(body, _GZIP))])
            for at, body in self._arrived
        ]
        path.write_bytes(msgspec.msgpack.encode(arrivals))

    def report(self) -> Report:
        self._report.distinct = len(self._ids)
        self._report.cpu_s = time.process_time()
        return self._report


def _read(body: bytes) -> tuple[bytes, int]:
    """The text of a body, and its events: gzip or not; NDJSON, an array, or a form that holds an array."""
    if body.startswith(b"\x1f\x8b"):
        # The last four bytes of gzip are the size of what it holds: no guessing, no growing.
        raw = isal_zlib.decompress(body, _GZIP, max(16, int.from_bytes(body[-4:], "little")))
    elif body.startswith((b"{", b"[", _FORM)):
        raw = body
    else:
        raise ValueError("nothing that Mixpanel takes")
    if raw.startswith(b"["):
        return raw, raw.count(b'"$insert_id"')
    if raw.startswith(_FORM):
        if b"%24insert_id" not in raw:
            raw = base64.b64decode(raw.removeprefix(_FORM), validate=True)
            return raw, raw.count(b'"$insert_id"')
        return raw, raw.count(b"%24insert_id")
    # Seven times as fast as raw.count(b"\n"), which looks at every byte by itself in some Pythons.
    return raw, len(raw) - len(raw.replace(b"\n", b"")) + (not raw.endswith(b"\n"))


def _plain(raw: bytes) -> bytes:
    return parse_qs(raw)[b"data"][0] if raw.startswith(_FORM) else raw


def _answer(status: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


class _Connection(asyncio.Protocol):
    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._transport: asyncio.Transport
        self._buffer = bytearray()
        self._wanted = 0  # bytes of the request that is coming in; 0: its head isn't complete
        self._head = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream server makes nothing else

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        while True:
            if not self._wanted:
                end = buffer.find(b"\r\n\r\n")
                if end < 0:
                    return
                length = _LENGTH.search(buffer, 0, end + 4)
                self._head = end + 4
                self._wanted = self._head + (int(length[1]) if length else 0)
                if _CONTINUE.search(buffer, 0, end + 4):
                    self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            if len(buffer) < self._wanted:
                return
            self._transport.write(self._sink.take(bytes(buffer[self._head : self._wanted])))
            del buffer[: self._wanted]
            self._wanted = 0


async def run(arguments: argparse.Namespace) -> None:
    """Serves until its standard input ends."""
    loop = asyncio.get_running_loop()
    sink = Sink(check=arguments.check, arrivals=arguments.arrivals, keep=arguments.keep)
    server = await loop.create_server(lambda: _Connection(sink), "127.0.0.1", arguments.port)
    gc.freeze()
    gc.disable()
    print(msgspec.json.encode({"port": server.sockets[0].getsockname()[1]}).decode(), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        if path := line.strip():
            sink.write_arrivals(Path(path))
        print(msgspec.json.encode(sink.report()).decode(), flush=True)
    server.close()


def main(argv: Sequence[str]) -> int:
    """Runs a sink."""
    parser = argparse.ArgumentParser(prog="python -m bench.sink", description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="keep every $insert_id, to find doubled events")
    parser.add_argument("--arrivals", action="store_true", help="keep every body, to tell when each event came")
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="write all bodies there: arrays and objects, a line each"
    )
    arguments = parser.parse_args(argv)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
