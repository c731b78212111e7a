"""The open-loop loader: requests go when they are due, whether or not those before them were answered.

The time of every request is fixed before the first one goes: so many events a second, evenly. Its latency counts from
that time, not from when it could be sent: a daemon that stands still for a second is charged with every request that
was due in that second. (A loader that waits for an answer before it asks again would count one.)

One thread and `select`, whose timeout is exact to some 50 us: the timers of uvloop and of asyncio's epoll are rounded
to milliseconds, which is what is to be measured. It speaks as `bench.loader` does: `{"ready":true}`, a line to start,
a report.
"""

import argparse
import array
import contextlib
import gc
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from bench import data

# When the last request has been due for so long, what isn't acked is given up.
_PATIENCE_S = 60.0


class Report(Struct, kw_only=True):
    """What a loader did. Times are of the monotonic clock, which all processes of a machine share."""

    events: int
    requests: int
    acked: int  # requests
    busy: int  # answers 503
    started_at: float
    interval_s: float  # request k was due at started_at + k * interval_s
    acked_at: float
    cpu_s: float
    p50_ms: float  # from when a request was due to its ack
    p99_ms: float
    p999_ms: float
    max_ms: float
    late_p50_ms: float  # from when it was due to its first byte: what the loader, and waiting for a connection, add
    late_p99_ms: float


class _Connection:
    """A socket with what waits to be sent on it, and the requests on it that wait for their ack, oldest first."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.out = b""
        self.waiting: deque[tuple[int, int, bytes]] = deque()  # number, events sent up to and with it, bytes
        self._in = b""

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, chunk: bytes = b"") -> None:
        """Sends what the socket takes, and keeps the rest for when it takes more."""
        self.out += chunk
        with contextlib.suppress(BlockingIOError):
            self.out = self.out[self.socket.send(self.out) :]

    def receive(self) -> bytes:
        """What has come and wasn't taken yet. Raises RuntimeError when the daemon has closed it."""
        try:
            got = self.socket.recv(1 << 16)
        except BlockingIOError:
            return self._in
        if not got:
            raise RuntimeError("the daemon closed a connection that waited for acks")
        self._in += got
        return self._in

    def took(self, size: int) -> None:
        self._in = self._in[size:]


class OpenLoop:
    """Sends on schedule, and counts."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._is_stream = arguments.door == "stream"
        per_request = arguments.per_request
        form = data.ndjson if self._is_stream else data.http_request
        self._feed = data.Feed(data.read(arguments.data), per_request, form)
        self._interval_s = per_request / arguments.rate
        self._requests = round(arguments.seconds / self._interval_s)
        self._connections = [
            _Connection(arguments.port) for _ in range(1 if self._is_stream else arguments.connections)
        ]
        self._idle = deque(self._connections)
        self._due: deque[int] = deque()  # requests that had no connection yet
        self._latencies = array.array("d")
        self._late = array.array("d")
        self._started_at = self._acked_at = 0.0
        self._events = self._sent = self._busy = 0
        self._again: list[tuple[float, _Connection, bytes]] = []

    def run(self) -> Report:
        """Sends everything; returns when everything is acked, or nothing more comes."""
        cpu_s = time.process_time()
        if self._is_stream:
            self._connections[0].send(b'{"acks":true}\n')
        started_at = self._started_at = time.monotonic() + 0.01
        number, ends_at = 0, started_at + self._requests * self._interval_s + _PATIENCE_S
        while len(self._latencies) < self._requests:
            now = time.monotonic()
            if now > ends_at:
                break
            while number < self._requests and started_at + number * self._interval_s <= now:
                self._due.append(number)
                number += 1
            while self._due and self._idle:
                self._send(self._due.popleft())
            self._repeat(now)
            next_at = started_at + number * self._interval_s if number < self._requests else now + 0.1
            writers = [connection for connection in self._connections if connection.out]
            timeout_s = min(max(0.0, next_at - time.monotonic()), 0.1)
            readable, writable, _ = select.select(self._connections, writers, [], timeout_s)
            for connection in writable:
                connection.send()
            for connection in readable:
                self._read(connection)
        return self._report(time.process_time() - cpu_s)

    def _send(self, number: int) -> None:
        chunk, events = self._feed.take(sys.maxsize)
        self._events += events
        self._sent += 1
        connection = self._idle[0] if self._is_stream else self._idle.popleft()
        self._late.append(time.monotonic() - self._started_at - number * self._interval_s)
        connection.waiting.append((number, self._events, chunk))
        connection.send(chunk)

    def _read(self, connection: _Connection) -> None:
        data_ = connection.receive()
        if self._is_stream:
            complete, newline, _ = data_.rpartition(b"\n")
            if newline:
                connection.took(len(complete) + 1)
                # Acks are cumulative: the last one says it all.
                ack = msgspec.json.decode(complete.rpartition(b"\n")[2])
                if "acked" not in ack:
                    raise RuntimeError(f"the daemon said {ack}")
                while connection.waiting and connection.waiting[0][1] <= ack["acked"]:
                    self._acked(connection)
            return
        head = data_.find(b"\r\n\r\n")
        if head < 0 or len(data_) < head + 4 + _content_length(data_[:head]):
            return
        connection.took(len(data_))
        status = data_[9:12]
        if status == b"200":
            self._acked(connection)
            self._idle.append(connection)
        elif status == b"503":
            self._busy += 1
            self._again.append((time.monotonic() + 0.05, connection, connection.waiting[0][2]))
        else:
            raise RuntimeError(f"the daemon answered {data_[:500]!r}")

    def _acked(self, connection: _Connection) -> None:
        number, _, _ = connection.waiting.popleft()
        self._acked_at = time.monotonic()
        self._latencies.append(self._acked_at - self._started_at - number * self._interval_s)

    def _repeat(self, now: float) -> None:
        """What the daemon had no room for goes again, and its latency counts on."""
        while self._again and self._again[0][0] <= now:
            _, connection, chunk = self._again.pop(0)
            connection.send(chunk)

    def _report(self, cpu_s: float) -> Report:
        latencies, late = sorted(self._latencies) or [0.0], sorted(self._late) or [0.0]
        return Report(
            events=self._events,
            requests=self._sent,
            acked=len(self._latencies),
            busy=self._busy,
            started_at=self._started_at,
            interval_s=self._interval_s,
            acked_at=self._acked_at,
            cpu_s=cpu_s,
            p50_ms=percentile(latencies, 0.5) * 1e3,
            p99_ms=percentile(latencies, 0.99) * 1e3,
            p999_ms=percentile(latencies, 0.999) * 1e3,
            max_ms=latencies[-1] * 1e3,
            late_p50_ms=percentile(late, 0.5) * 1e3,
            late_p99_ms=percentile(late, 0.99) * 1e3,
        )


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of them doesn't exceed."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def _content_length(head: bytes) -> int:
    at = head.find(b"Content-Length: ") + 16
    end = head.find(b"\r\n", at)
    return int(head[at : end if end >= 0 else None])


def main(argv: Sequence[str]) -> int:
    """Runs a loader; its report is on standard output."""
    parser = argparse.ArgumentParser(prog="python -m bench.openloop", description=__doc__.partition("\n")[0])
    parser.add_argument("--door", choices=("stream", "http"), required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--data", type=Path, required=True, help="a file that bench.data wrote")
    parser.add_argument("--connections", type=int, default=64, help="HTTP; the stream is one connection")
    parser.add_argument("--per-request", type=int, default=10, help="events a request, or a write to the stream")
    parser.add_argument("--rate", type=float, required=True, help="events a second")
    parser.add_argument("--seconds", type=float, required=True)
    loop = OpenLoop(parser.parse_args(argv))
    # Millions of bytes objects make no cycles.
    gc.freeze()
    gc.disable()
    print('{"ready":true}', flush=True)
    if not sys.stdin.readline():
        raise RuntimeError("nobody waits for this loader")
    print(msgspec.json.encode(loop.run()).decode(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
