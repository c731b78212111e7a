"""What hostile clients cost: a thousand connections that are slow, endless, explosive or deaf, with an honest client beside.

Five processes: the sink, two daemons as installed, the hostile clients, and here the honest one, which posts a hundred events at
a time to the first daemon, over a connection that it keeps, and now and then over a new one. Every connection that a daemon
ends is made again.

All share the cores, so hostile clients slow everybody down, whomever they aim at. The control shows by how much: for as long as
they attack the first daemon they attack the second one, in turns, and the honest client posts to the first all the while. What
is judged is the difference. The daemon passes when its memory grows by 64 MB at most and the honest client was answered 200
each time, in a p99 of at most twice the control's.
"""

import argparse
import asyncio
import contextlib
import gzip
import http.client
import random
import resource
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

import msgspec
from msgspec import Struct

from bench import data
from bench.processes import Child, Daemon, Sink, ended_by_signals, folder, get

GROWTH_MB: Final = 64.0
SLOWDOWN: Final = 2.0
_EVENTS: Final = 100
_PAUSE_S: Final = 0.02
_PATH = "/v1/currents"
_HEAD = f"POST {_PATH} HTTP/1.1\r\nHost: x\r\n".encode()


class Report(Struct, kw_only=True):
    """The figures of one run."""

    connections: int
    attacks: dict[str, int]  # how many of each kind were made
    posts: int  # of the honest client, while under attack
    failures: list[str]  # those that weren't answered 200
    alone_p50_ms: float
    alone_p99_ms: float
    control_p50_ms: float  # while a neighbour was under attack
    control_p99_ms: float
    p50_ms: float
    p99_ms: float
    rss_before_mb: float
    rss_peak_mb: float
    delivered: int  # events that the sink has
    acked: int  # events that the honest client was told are safe

    @property
    def growth_mb(self) -> float:
        """Of the daemon's resident memory."""
        return self.rss_peak_mb - self.rss_before_mb


# -- the hostile clients: a process of their own ------------------------------------------------------------------------


async def _send_slowly(writer: asyncio.StreamWriter, start: bytes, endless: bytes, pause_s: float) -> None:
    writer.write(start)
    while True:
        writer.write(endless)
        await writer.drain()
        await asyncio.sleep(pause_s)


async def _attack(kind: str, http_port: int, stream_port: int) -> None:
    """One connection's life."""
    door = stream_port if kind in {"line", "endless line", "deaf to acks", "held line"} else http_port
    reader, writer = await asyncio.open_connection("127.0.0.1", door, limit=2**12)
    drop = asyncio.ensure_future(_drop(reader)) if "deaf" not in kind else None
    sending: asyncio.Future[None]
    if kind == "head":
        sending = asyncio.ensure_future(_send_slowly(writer, _HEAD + b"X: ", b"x", 1.0))
    elif kind == "body":
        sending = asyncio.ensure_future(_send_slowly(writer, _HEAD + b"Content-Length: 99999\r\n\r\n{", b" ", 1.0))
    elif kind == "held body":
        start = _HEAD + b"Content-Length: 8000000\r\n\r\n" + b" " * 300_000
        sending = asyncio.ensure_future(_send_slowly(writer, start, b" ", 1.0))
    elif kind == "chunks":
        # 10 GB, if anybody let it come to that.
        sending = asyncio.ensure_future(
            _send_slowly(
                writer, _HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"4000\r\n" + b" " * 0x4000 + b"\r\n", 0.2
            )
        )
    elif kind == "bomb":
        request = _HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(_BOMB) + _BOMB
        sending = asyncio.ensure_future(_send_slowly(writer, b"", request, 2.0))
    elif kind == "deaf":
        sending = asyncio.ensure_future(_send_slowly(writer, b"", (_HEAD + b"Content-Length: 0\r\n\r\n") * 5, 2.0))
    elif kind == "line":
        sending = asyncio.ensure_future(_send_slowly(writer, b'{"acks":true}\n{"event', b"x", 1.0))
    elif kind == "held line":
        sending = asyncio.ensure_future(_send_slowly(writer, b"x" * 500_000, b"x", 1.0))
    elif kind == "endless line":
        sending = asyncio.ensure_future(_send_slowly(writer, b"", b"x" * 2**14, 0.2))
    elif kind == "deaf to acks":
        sending = asyncio.ensure_future(_send_slowly(writer, b'{"acks":true}\n', b"\n" * 20, 0.5))
    else:
        sending = asyncio.ensure_future(asyncio.sleep(3600))
    tasks = [task for task in (sending, drop) if task is not None]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        writer.transport.abort()
        await asyncio.wait(tasks)


async def _drop(reader: asyncio.StreamReader) -> None:
    while await reader.read(4096):
        pass


KINDS: Final = (
    *("idle", "head", "body", "held body", "chunks", "bomb", "deaf"),
    *("line", "held line", "endless line", "deaf to acks"),
)
_BOMB = b""


async def _attack_with(kinds: Sequence[str], connections: int, http_port: int, stream_port: int) -> None:
    made: Counter[str] = Counter()

    async def one(number: int) -> None:
        kind = kinds[number % len(kinds)]
        # Else all of a kind would send in the same moment: a test of bursts, and not of many that are slow.
        await asyncio.sleep(random.uniform(0, 2))
        while True:
            made[kind] += 1
            with contextlib.suppress(OSError):
                await _attack(kind, http_port, stream_port)
            await asyncio.sleep(random.uniform(0.5, 1.5))

    tasks = [asyncio.create_task(one(number)) for number in range(connections)]
    print(flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=10)
    print(msgspec.json.encode(made).decode(), flush=True)


class _Attackers(Child):
    def __init__(self, at: Path, kinds: Sequence[str], connections: int, daemon: Daemon) -> None:
        arguments = [",".join(kinds), str(connections), str(daemon.http_port), str(daemon.stream_port)]
        super().__init__("attackers", ["-m", "bench.hostile", "--attack", *arguments], at)


# -- the honest one ----------------------------------------------------------------------------------------------------


class _Honest:
    """Posts, one after the other, and remembers how long each took."""

    def __init__(self, port: int, seed: int) -> None:
        self.latencies_ms: list[float] = []
        self.failures: list[str] = []
        self.acked = 0
        self._port = port
        self._numbers = iter(range(seed, seed + 10**9, _EVENTS))
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def post(self, seconds: float) -> None:
        """For so long; every tenth request over a new connection."""
        until, count = time.monotonic() + seconds, 0
        while time.monotonic() < until:
            count += 1
            body = b'{"events":[' + b",".join(data.events(_EVENTS, next(self._numbers))) + b"]}"
            if count % 10 == 0:
                self._connection.close()
            started = time.perf_counter()
            try:
                self._connection.request("POST", _PATH, body)
                answer = self._connection.getresponse()
                answer.read()
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(repr(error))
                self._connection.close()
            else:
                self.latencies_ms.append((time.perf_counter() - started) * 1000)
                if answer.status == 200:
                    self.acked += _EVENTS
                else:
                    self.failures.append(str(answer.status))
            time.sleep(_PAUSE_S)
        self._connection.close()


def _percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1] if len(values) > 1 else float("nan")


class _Memory:
    """The most that a process had resident, looked at 20 times a second."""

    def __init__(self, of: Child) -> None:
        self.peak_mb = 0.0
        self._of = of
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.05):
            self.peak_mb = max(self.peak_mb, self._of.memory_mb("VmRSS"))


def measure(
    connections: int,
    seconds: float,
    alone_s: float,
    rounds: int,
    kinds: Sequence[str] = KINDS,
    max_connections: int = 8000,
) -> Report:
    """One run. Raises BenchError when a process doesn't do what it should."""
    attacks: Counter[str] = Counter()
    with folder() as at, folder() as beside, Sink(at, check=True) as sink:
        sink.ready()
        one, other = (Daemon(where, sink.port, max_connections=max_connections) for where in (at, beside))
        with one as daemon, other as neighbour:
            daemon.ready()
            neighbour.ready()
            _Honest(daemon.http_port, 0).post(0.5)  # warm
            alone, control, honest = (_Honest(daemon.http_port, n * 10**6) for n in (1, 20, 40))
            alone.post(alone_s)
            before_mb = daemon.memory_mb("VmRSS")
            with _Memory(daemon) as memory:
                for number in range(2 * rounds):
                    aim, posting = (daemon, honest) if number % 2 else (neighbour, control)
                    with _Attackers(at, kinds, connections, aim) as attackers:
                        attackers.hear(30)
                        posting.post(seconds / rounds)
                        attackers.say()
                        made = msgspec.json.decode(attackers.hear(60), type=dict[str, int])
                    if aim is daemon:
                        attacks.update(made)
            get(daemon.admin_port, "/readyz")
            neighbour.stop()
            daemon.stop()
        report = sink.report()
    everybody = (alone, control, honest)
    return Report(
        connections=connections,
        attacks=attacks,
        posts=len(honest.latencies_ms),
        failures=[failure for each in everybody for failure in each.failures],
        alone_p50_ms=_percentile(alone.latencies_ms, 50),
        alone_p99_ms=_percentile(alone.latencies_ms, 99),
        control_p50_ms=_percentile(control.latencies_ms, 50),
        control_p99_ms=_percentile(control.latencies_ms, 99),
        p50_ms=_percentile(honest.latencies_ms, 50),
        p99_ms=_percentile(honest.latencies_ms, 99),
        rss_before_mb=before_mb,
        rss_peak_mb=memory.peak_mb,
        delivered=report.distinct,
        acked=sum(each.acked for each in everybody),
    )


def main(argv: Sequence[str]) -> int:
    """Runs it and says how it went; 1 when a bar was missed."""
    parser = argparse.ArgumentParser(prog="python -m bench hostile", description=__doc__)
    parser.add_argument("--connections", type=int, default=1000, help="hostile ones, of all kinds alike (1000)")
    parser.add_argument("--max-connections", type=int, default=8000, help="that the daemon takes at a door (8000)")
    parser.add_argument("--seconds", type=float, default=60.0, help="under attack (60)")
    parser.add_argument("--rounds", type=int, default=3, help="how often the attack and its control take turns (3)")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"which attacks, of: {', '.join(KINDS)}")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.kinds.split(",")) - set(KINDS):
        parser.error(f"no such attack: {', '.join(sorted(unknown))}")
    _allow_files(arguments.connections)
    seconds, rounds = arguments.seconds, arguments.rounds
    with ended_by_signals():
        attacks, most = arguments.kinds.split(","), arguments.max_connections
        report = measure(arguments.connections, seconds, min(20.0, seconds), rounds, attacks, most)
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(report.attacks.items()))
    made, failed = sum(report.attacks.values()), len(report.failures)
    slower = report.p99_ms / report.control_p99_ms
    print(f"{report.connections:,} hostile connections for {arguments.seconds:g} s, made {made:,} times: {kinds}")
    print(f"honest: {report.posts} posts of {_EVENTS} events, {failed} not answered 200 {report.failures[:5]}")
    print(f"  alone            p50 {report.alone_p50_ms:6.1f} ms, p99 {report.alone_p99_ms:6.1f} ms")
    print(f"  neighbour's foes p50 {report.control_p50_ms:6.1f} ms, p99 {report.control_p99_ms:6.1f} ms (the control)")
    print(
        f"  our own foes     p50 {report.p50_ms:6.1f} ms, p99 {report.p99_ms:6.1f} ms ({slower:.1f}x; bar {SLOWDOWN:g}x)"
    )
    print(f"memory: {report.rss_before_mb:.0f} MB before, {report.rss_peak_mb:.0f} MB at most")
    print(f"  +{report.growth_mb:.0f} MB (bar {GROWTH_MB:g})")
    print(f"acked {report.acked:,} events, delivered {report.delivered:,}")
    met = (
        report.growth_mb <= GROWTH_MB
        and report.p99_ms <= SLOWDOWN * report.control_p99_ms
        and not report.failures
        and report.delivered >= report.acked
    )
    return 0 if met else 1


def _allow_files(connections: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 200
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


if __name__ == "__main__":
    _, _, kinds, count, http_port, stream_port = sys.argv
    _allow_files(int(count))
    _BOMB = gzip.compress(bytes(2**24), 9)
    asyncio.run(_attack_with(kinds.split(","), int(count), int(http_port), int(stream_port)))
