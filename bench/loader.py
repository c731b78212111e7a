"""The loader: a process that sends events to one door as fast as the door takes them, and waits for every ack.

It is told what to do on the command line, says `{"ready":true}` when everything is prepared and connected, starts when
a line comes on its standard input, and says what happened in one line of JSON. It shares its cores with the daemon, so
it does as little as it can: prepared chunks, no HTTP library.
"""

import argparse
import asyncio
import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import uvloop
from msgspec import Struct

from bench import data

# A write of so many events to the stream: some 140 kB.
STREAM_CHUNK = 200
_WRITE_AHEAD_BYTES = 512 * 1024
_BUSY_S = 0.05


class Report(Struct, kw_only=True):
    """What a loader did. Times are of the monotonic clock, which all processes of a machine share."""

    events: int
    requests: int
    busy: int  # answers 503
    started_at: float
    acked_at: float
    cpu_s: float
    p50_ms: float  # from a request's first byte to its answer; 0 for the stream
    p99_ms: float


class Load:
    """What is to be sent, shared by all connections. Ends after so many events or at a time, whatever is given."""

    def __init__(self, feed: data.Feed, events: int | None, seconds: float | None) -> None:
        self.events = 0  # handed out
        self.requests = 0
        self.busy = 0
        self.latencies: list[float] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.started_at = 0.0
        self._feed = feed
        self._limit = events or sys.maxsize
        self._seconds = seconds or float("inf")
        self._open = 0

    def start(self, connections: int) -> None:
        self._open = connections
        self.started_at = time.monotonic()

    def take(self) -> tuple[bytes, int] | None:
        """The next chunk and its events; None when everything has been sent."""
        if self.events >= self._limit or time.monotonic() - self.started_at >= self._seconds:
            return None
        chunk, events = self._feed.take(self._limit - self.events)
        self.events += events
        self.requests += 1
        return chunk, events

    def finished(self) -> None:
        """One connection has sent its share, and all of it is acked."""
        self._open -= 1
        if not self._open and not self.done.done():
            self.done.set_result(None)

    def failed(self, problem: str) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(problem))


class _Connection(asyncio.Protocol):
    def __init__(self, load: Load) -> None:
        self._load = load
        self._transport: asyncio.Transport
        self._buffer = b""
        self._finished = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a client of a stream socket gets nothing else

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._finished:
            self._load.failed(f"the daemon closed a connection that waited for acks: {exc}")

    def _finish(self) -> None:
        if not self._finished:
            self._finished = True
            self._load.finished()

    def start(self) -> None:
        raise NotImplementedError


class StreamConnection(_Connection):
    """Writes while the socket takes it; done when the last line is acked."""

    _sent = 0
    _acked = 0
    _paused = False
    _all_sent = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._transport.set_write_buffer_limits(high=_WRITE_AHEAD_BYTES)

    def start(self) -> None:
        self._transport.write(b'{"acks":true}\n')
        self._pump()

    def _pump(self) -> None:
        while not self._paused:
            taken = self._load.take()
            if taken is None:
                self._all_sent = True
                self._look()
                return
            chunk, events = taken
            self._sent += events
            self._transport.write(chunk)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._pump()

    def data_received(self, data: bytes) -> None:
        complete, newline, self._buffer = (self._buffer + data).rpartition(b"\n")
        if not newline:
            return
        # Acks are cumulative: the last one says it all.
        ack = msgspec.json.decode(complete.rpartition(b"\n")[2])
        if "acked" not in ack:
            self._load.failed(f"the daemon said {ack}")
            return
        self._acked = ack["acked"]
        self._look()

    def _look(self) -> None:
        if self._all_sent and self._acked >= self._sent:
            self._finish()


class LinesConnection(StreamConnection):
    """For who never acks: done, and its half closed, when the kernel has taken the last line."""

    def start(self) -> None:
        self._pump()

    def data_received(self, data: bytes) -> None:
        """Nothing that it says is an ack."""

    def _look(self) -> None:
        if self._transport.get_write_buffer_size():
            asyncio.get_running_loop().call_later(0.002, self._look)
        else:
            self._finish()
            self._transport.write_eof()


class HttpConnection(_Connection):
    """One request at a time: the next one goes when the answer to the last one is there."""

    _request = b""
    _sent_at = 0.0

    def start(self) -> None:
        taken = self._load.take()
        if taken is None:
            self._finish()
            return
        self._request = taken[0]
        self._send()

    def _send(self) -> None:
        self._sent_at = time.monotonic()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer = self._buffer + data if self._buffer else data
        head = buffer.find(b"\r\n\r\n")
        if head < 0 or len(buffer) < head + 4 + _content_length(buffer[:head]):
            return
        self._buffer = b""
        status = buffer[9:12]
        if status == b"200":
            self._load.latencies.append(time.monotonic() - self._sent_at)
            self.start()
        elif status == b"503":
            self._load.busy += 1
            asyncio.get_running_loop().call_later(_BUSY_S, self._send)
        else:
            self._load.failed(f"the daemon answered {buffer[:500]!r}")


def _content_length(head: bytes) -> int:
    at = head.lower().find(b"content-length: ") + 16
    end = head.find(b"\r\n", at)
    return int(head[at : end if end >= 0 else None])


DOORS: dict[str, tuple[type[_Connection], Callable[[Sequence[bytes]], bytes]]] = {
    "stream": (StreamConnection, data.ndjson),
    "http": (HttpConnection, data.http_request),
    "lines": (LinesConnection, data.ndjson),  # bench.peers: no acks
}


async def run(arguments: argparse.Namespace) -> Report:
    """Connects, waits to be told to start, sends everything, waits for every ack."""
    loop = asyncio.get_running_loop()
    lines = data.read(arguments.data)
    kind, form = DOORS[arguments.door]
    per_chunk = arguments.per_request if kind is HttpConnection else STREAM_CHUNK
    load = Load(data.Feed(lines, per_chunk, form), arguments.events, arguments.seconds)
    del lines
    connections = [
        (await loop.create_connection(lambda: kind(load), "127.0.0.1", arguments.port))[1]
        for _ in range(arguments.connections)
    ]
    # Millions of bytes objects make no cycles.
    gc.freeze()
    gc.disable()
    print('{"ready":true}', flush=True)
    if not await asyncio.to_thread(sys.stdin.readline):
        raise RuntimeError("nobody waits for this loader")
    load.start(len(connections))
    cpu_s = time.process_time()
    for connection in connections:
        connection.start()
    await load.done
    acked_at = time.monotonic()
    latencies = sorted(load.latencies) or [0.0]
    return Report(
        events=load.events,
        requests=load.requests,
        busy=load.busy,
        started_at=load.started_at,
        acked_at=acked_at,
        cpu_s=time.process_time() - cpu_s,
        p50_ms=latencies[len(latencies) // 2] * 1e3,
        p99_ms=latencies[len(latencies) * 99 // 100] * 1e3,
    )


def main(argv: Sequence[str]) -> int:
    """Runs a loader; its report is on standard output."""
    parser = argparse.ArgumentParser(prog="python -m bench.loader", description=__doc__.partition("\n")[0])
    parser.add_argument("--door", choices=list(DOORS), required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--data", type=Path, required=True, help="a file that bench.data wrote")
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--per-request", type=int, default=100, help="events a request (HTTP)")
    parser.add_argument("--events", type=int, help="ends after so many events")
    parser.add_argument("--seconds", type=float, help="ends after so long")
    arguments = parser.parse_args(argv)
    if not (arguments.events or arguments.seconds):
        parser.error("--events or --seconds")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        report = runner.run(run(arguments))
    print(msgspec.json.encode(report).decode(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
