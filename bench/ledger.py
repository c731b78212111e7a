"""What bench.crash and bench.powercut share: a daemon to torment, load through both doors, and the ledger that judges it.

    load (two doors) -> the daemon, a process that may die -> tee -> the emulator, a process with faults

The ledger lives in the tormentor's process, outside of what fails. It knows of every event, by its number, when it was
acked, and from the tee when Mixpanel was sent it, in which life of the daemon, with which bytes, and whether Mixpanel's
answer came. An event that wasn't acked is never sent again by the load: whatever comes twice is the daemon's doing.
"""

import asyncio
import contextlib
import re
import sqlite3
import time
from array import array
from collections import Counter, deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final, Self

import msgspec
from isal import isal_zlib
from msgspec import Struct

from bench.processes import BenchError, Child, free_ports, get

# Small enough that a window in flight means something; large enough for requests of many segments.
MAX_CONCURRENCY: Final = 4
MAX_BATCH_EVENTS: Final = 500
IN_FLIGHT: Final = MAX_CONCURRENCY * MAX_BATCH_EVENTS
# How old a success may be that a kill undoes: it is recorded by the next commit, which takes milliseconds on a quiet disk.
UNSETTLED_S: Final = 2.0
TIMEOUT_S: Final = 1.0
_HTTP_EVENTS = 100
_STREAM_EVENTS = 50
_EVERY_BAD = 97  # one in so many is of a type that nobody knows: a dead letter
_PATIENCE_S = 60.0
NUMBER = re.compile(rb'"\$insert_id":"([0-9a-f]{8})-')
BAD_NUMBER = re.compile(rb'"id":"([0-9a-f]{8})-')


class Faults(Struct, frozen=True):
    """What Mixpanel does wrong: shares of requests."""

    script: tuple[dict[str, Any], ...] = ()

    @classmethod
    def seeded(cls, seed: int) -> "Faults":
        """Every fault that a network and a tired server have, together one request in ten or so."""
        shares: list[tuple[float, dict[str, Any]]] = [
            (0.02, {"status": 503}),
            (0.01, {"status": 500}),
            (0.005, {"status": 429}),
            (0.02, {"action": "reset"}),
            (0.02, {"action": "reset_after_store"}),
            (0.01, {"action": "hang"}),
            (0.02, {"action": "store_then_hang"}),
            (0.01, {"action": "store_then_status"}),
            (0.01, {"action": "truncate"}),
        ]
        return cls(tuple({**fault, "share": share, "seed": seed * 100 + n} for n, (share, fault) in enumerate(shares)))

    @classmethod
    def outage(cls) -> "Faults":
        """Nothing is taken: everything that is acked must wait on disk."""
        return cls(({"status": 503},))


class Ledger:
    """What became of every event since the last verdict, by its number. `problems` must stay empty."""

    def __init__(self, first: int = 0) -> None:
        self.first = first
        self.acked_at = array("d")  # monotonic; 0: not acked
        self._digest = array("Q")  # of the bytes that Mixpanel was sent; 0: never
        self._life = array("i")  # in which Mixpanel's success was passed on; -1: never
        self._answered_at = array("d")
        self._told = bytearray()  # 1: some life was told of success
        self.life = 0
        self.killed_at: dict[int, float] = {}  # by life
        self.doubled: Counter[int] = Counter()  # by life: events sent again though an earlier life was told of success
        self.retried = 0  # events sent again because nobody was told of success
        self.problems: list[str] = []

    @property
    def sent(self) -> int:
        """Events that the load has sent."""
        return len(self.acked_at)

    @property
    def acked(self) -> int:
        """Events that were acked."""
        return self.sent - self.acked_at.count(0.0)

    def take(self, count: int) -> range:
        """Numbers of new events."""
        first = self.first + self.sent
        self.acked_at.extend([0.0] * count)
        self._answered_at.extend([0.0] * count)
        self._digest.extend([0] * count)
        self._life.extend([-1] * count)
        self._told.extend(b"\0" * count)
        return range(first, first + count)

    def ack(self, numbers: range) -> None:
        """The door said that these are on disk."""
        now = time.monotonic()
        for number in numbers:
            self.acked_at[number - self.first] = now

    def passed(self, lines: list[bytes]) -> list[int]:
        """The daemon sends Mixpanel these events; gives their numbers."""
        numbers = []
        for line in lines:
            found = NUMBER.search(line)
            at = int(found[1], 16) - self.first if found else -1
            if not 0 <= at < self.sent:
                self.problem(f"an event that was never sent, or was settled long ago: {line[:300]!r}")
                continue
            numbers.append(at)
            digest = hash(line) & 0xFFFF_FFFF_FFFF_FFFF or 1
            if not self._digest[at]:
                self._digest[at] = digest
                continue
            if self._digest[at] != digest:
                self.problem(f"event {at + self.first} was sent again with other bytes: {line[:300]!r}")
            if self._life[at] < 0:
                self.retried += 1
            elif self._life[at] == self.life:
                self.problem(f"event {at + self.first} was sent again though Mixpanel had taken it")
            else:
                self.doubled[self.life] += 1
                # Lives that ended before they got to it don't count.
                if self._answered_at[at] < self.killed_at.get(self._life[at], 0.0) - UNSETTLED_S:
                    self.problem(f"event {at + self.first} was sent again long after Mixpanel had taken it")
                self._life[at] = -1
        return numbers

    def succeeded(self, places: list[int]) -> None:
        """Mixpanel's success is passed on to the daemon."""
        now = time.monotonic()
        for at in places:
            self._life[at] = self.life
            self._answered_at[at] = now

    def told(self, places: list[int]) -> None:
        """Mixpanel's success is passed on to the daemon, maybe too late for it to be read."""
        for at in places:
            self._told[at] = 1

    def problem(self, text: str) -> None:
        """Kept, but for the thousandth of its kind."""
        if len(self.problems) < 20:
            self.problems.append(text)

    def lost(self, there: set[int]) -> list[int]:
        """Numbers that were acked and aren't there."""
        acked = (at + self.first for at, when in enumerate(self.acked_at) if when)
        return [number for number in acked if number not in there]

    def lost_on(self, disk: set[int]) -> list[int]:
        """Numbers that were acked, aren't on this disk, and of which the daemon was never told that Mixpanel took them."""
        return [number for number in self.lost(disk) if not self._told[number - self.first]]

    def withdraw(self, since: float, disk: set[int]) -> None:
        """Takes back acks that came after the power had gone, of events that aren't on this disk: no machine sends those.

        An fsync that ext4's shutdown comes upon can return success: jbd2 no longer knows the transaction that it has aborted.
        That a daemon doesn't ack after an fsync that failed is `bench.disk`'s to show.
        """
        for at, when in enumerate(self.acked_at):
            if when > since and at + self.first not in disk:
                self.acked_at[at] = 0.0


def event(number: int, filler: str = "") -> bytes:
    """A Currents event, one line; now and then one that can only become a dead letter."""
    kind = "users.ledger.Unknown" if bad(number) else "users.behaviors.CustomEvent"
    return (
        b'{"event_type":"%b","id":"%08x-0000-4000-8000-000000000000","time":%d,"user":{"external_user_id":"user-%d"},'
        b'"properties":{"name":"ledger","custom_properties":{"number":%d,"filler":"%b"}}}\n'
        % (kind.encode(), number, _TIME_S + number % 3600, number % 1000, number, filler.encode())
    )


# In the past, and the same for all lives.
_TIME_S = int(time.time()) - 86_400


def bad(number: int) -> bool:
    """Whether an event is one of those that must become dead letters."""
    return number % _EVERY_BAD == 0


class Tee:
    """Stands between the daemon and the emulator, passes every byte on, and tells the ledger. Faults pass as they are."""

    def __init__(self, upstream_port: int) -> None:
        self.ledger = Ledger()
        self.port = 0
        self.requests = 0
        self._upstream_port = upstream_port
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, limit=2**20)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def quiet(self) -> None:
        """Returns when every connection is gone: the daemon is dead, and what it had sent is on the ledger."""
        await asyncio.sleep(0.005)
        while self._tasks:
            await asyncio.sleep(0.001)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        upstream: asyncio.StreamWriter | None = None
        try:
            answers, upstream = await asyncio.open_connection("127.0.0.1", self._upstream_port, limit=2**20)
            while await self._exchange(reader, writer, answers, upstream):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            # What was reset above is reset below: an orderly end would be another fault.
            writer.transport.abort()
            if upstream is not None:
                upstream.transport.abort()

    async def _exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        answers: asyncio.StreamReader,
        upstream: asyncio.StreamWriter,
    ) -> bool:
        ledger = self.ledger
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(_content_length(head))
        started = time.monotonic()
        self.requests += 1
        places = ledger.passed(isal_zlib.decompress(body, 31).split(b"\n")[:-1])
        upstream.write(head + body)
        gone = asyncio.create_task(reader.read(1))  # nobody pipelines: it returns when the daemon gives up
        answering = asyncio.create_task(_answer(answers))
        try:
            await asyncio.wait({gone, answering}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                return False
            answer, complete = answering.result()
            # An answer that crosses the daemon's timeout may or may not be read.
            in_time = time.monotonic() - started < TIMEOUT_S / 2
            if complete and answer[9:12] == b"200":
                ledger.told(places)
                if in_time and not gone.done():
                    ledger.succeeded(places)
            writer.write(answer)
            await writer.drain()
            if not complete:
                return False
        finally:
            for task in (gone, answering):
                task.cancel()
            await asyncio.gather(gone, answering, return_exceptions=True)
        return True


async def _answer(reader: asyncio.StreamReader) -> tuple[bytes, bool]:
    """An answer, and whether all of it came."""
    head = await reader.readuntil(b"\r\n\r\n")
    try:
        return head + await reader.readexactly(_content_length(head)), True
    except asyncio.IncompleteReadError as error:
        return head + error.partial, False


def _content_length(head: bytes) -> int:
    found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return int(found[1]) if found else 0


class Load:
    """Both doors, kept busy through every death of the daemon. `first_ack` is set again and again: clear it."""

    def __init__(self, tee: Tee, http_port: int, stream_port: int, *, pause_s: float, fillers: list[str]) -> None:
        self.first_ack = asyncio.Event()  # an answer 200 of the HTTP door
        self.open = asyncio.Event()
        self._tee = tee
        self._http_port = http_port
        self._stream_port = stream_port
        self._pause_s = pause_s
        self._fillers = fillers

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Loads while `open` is set, until the block is left."""
        tasks = [asyncio.create_task(self._for_ever(door)) for door in (self._http, self._stream)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception):
                    raise result

    async def _for_ever(self, door: Any) -> None:
        while True:
            await self.open.wait()
            # The daemon dies, or isn't there yet: whatever wasn't acked was not promised.
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await door()
            await asyncio.sleep(0.005)

    def _lines(self, numbers: range) -> list[bytes]:
        return [event(number, self._fillers[number % len(self._fillers)]) for number in numbers]

    async def _http(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._http_port)
        try:
            while self.open.is_set():
                ledger = self._tee.ledger
                numbers = ledger.take(_HTTP_EVENTS)
                body = b'{"events":[' + b",".join([line[:-1] for line in self._lines(numbers)]) + b"]}"
                head = b"POST /v1/currents HTTP/1.1\r\nHost: ledger\r\nContent-Type: application/json\r\n"
                writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                answer, complete = await _answer(reader)
                if not complete:
                    return
                if answer[9:12] == b"200":
                    ledger.ack(numbers)
                    self.first_ack.set()
                elif answer[9:12] not in {b"503", b"500"}:
                    ledger.problem(f"the HTTP door answered {answer[:200]!r}")
                await asyncio.sleep(self._pause_s)
        finally:
            writer.transport.abort()

    async def _stream(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._stream_port)
        ledger = self._tee.ledger
        waiting: deque[range] = deque()
        acking = asyncio.create_task(self._acks(reader, ledger, waiting))
        try:
            writer.write(b'{"acks":true}\n')
            while self.open.is_set() and not acking.done():
                numbers = ledger.take(_STREAM_EVENTS)
                waiting.append(numbers)
                writer.write(b"".join(self._lines(numbers)))
                await writer.drain()
                await asyncio.sleep(self._pause_s)
            if not self.open.is_set():
                await asyncio.wait({acking}, timeout=0.2)  # acks that are under way
        finally:
            writer.transport.abort()
            acking.cancel()
            await asyncio.gather(acking, return_exceptions=True)

    async def _acks(self, reader: asyncio.StreamReader, ledger: Ledger, waiting: deque[range]) -> None:
        before = 0
        while line := await reader.readline():
            answer = msgspec.json.decode(line)
            if "acked" not in answer:
                return
            for _ in range(answer["acked"] - before):
                ledger.ack(waiting[0][:1])
                waiting[0] = waiting[0][1:]
                if not waiting[0]:
                    waiting.popleft()
            before = answer["acked"]


class Subject:
    """The daemon, which dies and is started again on the same ports and the same spool; and the emulator, which isn't."""

    def __init__(self, folder: Path, spool: Path) -> None:
        self.folder = folder
        self.spool = spool
        self.http_port, self.stream_port, self.admin_port, self.emulator_port = free_ports(4)
        self.daemon: Child | None = None
        self.program = ["-m", "bridged"]

    def start_emulator(self) -> Child:
        """Ends with its `with`."""
        most = str(10**12)
        limits = ["--max-events-per-minute", most, "--max-bytes-per-minute", most]
        address = f"127.0.0.1:{self.emulator_port}"
        child = Child("emulator", ["-m", "bridged", "emulator", "--listen", address, *limits], self.folder)
        child.hear(30)
        return child

    def configure(self, tee: Tee, max_bytes: str = "1GiB") -> None:
        """Writes the daemon's configuration."""
        (self.folder / "config.toml").write_text(
            f"""
[sources.http]
listen = "127.0.0.1:{self.http_port}"
[sources.stream]
listen = ["tcp:127.0.0.1:{self.stream_port}"]
[mixpanel]
url = "http://127.0.0.1:{tee.port}"
token = "0123456789abcdef0123456789abcdef"
[spool]
path = "{self.spool}"
max_bytes = "{max_bytes}"
[delivery]
max_events_per_second = 0
max_bytes_per_minute = 0
max_batch_events = {MAX_BATCH_EVENTS}
max_concurrency = {MAX_CONCURRENCY}
flush_interval = "50ms"
timeout = "{TIMEOUT_S:g}s"
grace = "2s"
[admin]
listen = "127.0.0.1:{self.admin_port}"
[log]
format = "json"
""",
            encoding="utf-8",
        )

    def start(self, ledger: Ledger) -> float:
        """Starts a life; gives the time, monotonic."""
        ledger.life += 1
        arguments = [*self.program, "run", "--config", str(self.folder / "config.toml")]
        self.daemon = Child("daemon", arguments, self.folder)
        return time.monotonic()

    async def kill(self, tee: Tee) -> None:
        """SIGKILL, and the end of it."""
        assert self.daemon is not None
        self.daemon.process.kill()
        self.daemon.process.wait()
        tee.ledger.killed_at[tee.ledger.life] = time.monotonic()
        self.daemon.end()
        self.daemon = None
        await tee.quiet()

    def stop(self) -> None:
        """SIGTERM. Raises BenchError if it doesn't end in good order."""
        assert self.daemon is not None
        self.daemon.process.terminate()
        code = self.daemon.process.wait(20)
        self.daemon.end()
        words = self.daemon.last_words()
        self.daemon = None
        if code != 0:
            raise BenchError(f"the daemon ended with exit code {code}:\n{words}")

    def must_live(self) -> None:
        """Raises BenchError if the daemon died by itself."""
        assert self.daemon is not None
        if self.daemon.process.poll() is not None:
            raise BenchError(f"the daemon ended by itself:\n{self.daemon.last_words()}")

    def script(self, faults: Faults) -> None:
        """What the emulator does wrong from now on."""
        post(self.emulator_port, "/emulator/faults", msgspec.json.encode(list(faults.script)))

    async def drained(self) -> dict[str, Any]:
        """Waits until nothing waits; gives the daemon's status."""
        status: dict[str, Any] = {}
        until = time.monotonic() + _PATIENCE_S
        while True:
            self.must_live()
            with contextlib.suppress(OSError, BenchError):
                status = msgspec.json.decode(await asyncio.to_thread(get, self.admin_port, "/api/status"))
                if status["http"] and status["events"]["waiting"] == 0:
                    return status
            if time.monotonic() > until:
                assert self.daemon is not None
                raise BenchError(
                    f"what waits wasn't delivered within {_PATIENCE_S:g} s: {status}\n{self.daemon.last_words()}"
                )
            await asyncio.sleep(0.02)


def post(port: int, path: str, body: bytes) -> None:
    """Posts to the emulator's own endpoints. Raises BenchError for anything but 200."""
    import http.client  # noqa: PLC0415  # beside `get`, for this alone

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST", path, body)
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise BenchError(f"{path} answered {response.status}: {answer[:200]!r}")
    finally:
        connection.close()


def dead_letters(spool: Path) -> set[int]:
    """The numbers of the dead letters in a spool that nobody has open."""
    with contextlib.closing(sqlite3.connect(spool)) as db:
        rows = db.execute("SELECT event FROM dead_letters")
        return {int(found[1], 16) for (body,) in rows if (found := BAD_NUMBER.search(body))}


class Totals(Struct):
    """Over all rounds."""

    acked: int = 0
    sent: int = 0
    stored: int = 0  # different events at Mixpanel
    dead: int = 0
    doubled: int = 0  # sent again after a kill, though Mixpanel's success had been passed on
    retried: int = 0
    most_doubled: int = 0  # in one life
    repeated: int = 0  # events that Mixpanel recognised as repetitions
    lost: int = 0


async def verdict(subject: Subject, tee: Tee, totals: Totals) -> list[str]:
    """Drains a subject that is alive and gets no load, stops it, and judges. Gives what is wrong, and opens a new ledger."""
    ledger = tee.ledger
    subject.script(Faults())
    status = await subject.drained()
    problems = list(ledger.problems)
    stored = Counter[int]()
    for line in (await asyncio.to_thread(get, subject.emulator_port, "/emulator/events")).splitlines():
        found = NUMBER.search(line)
        stored[int(found[1], 16) if found else -1] += 1
    summary = msgspec.json.decode(get(subject.emulator_port, "/emulator/summary"))
    subject.stop()
    dead = {number for number in dead_letters(subject.spool) if number >= ledger.first}
    if twice := [number for number, times in stored.items() if times > 1]:
        problems.append(f"{len(twice)} events are two events to Mixpanel: {twice[:5]}")
    lost = ledger.lost(stored.keys() | dead)
    if lost:
        problems.append(f"{len(lost)} acked events are neither delivered nor dead letters: {lost[:5]}")
    # The half of a line with which a client went away is a dead letter, too: nobody was promised that one.
    if wrong := [n for n in stored if bad(n)] + [n for n in dead if not bad(n) and ledger.acked_at[n - ledger.first]]:
        problems.append(f"{len(wrong)} events went the wrong way: {wrong[:5]}")
    totals.acked += ledger.acked
    totals.sent += ledger.sent
    totals.stored += len(stored)
    totals.dead += len(dead)
    totals.doubled += ledger.doubled.total()
    totals.most_doubled = max(totals.most_doubled, *ledger.doubled.values(), 0)
    totals.retried += ledger.retried
    totals.repeated += summary["duplicates"]
    totals.lost += len(lost)
    books = status["events"]
    told = {"delivered": totals.stored, "dead_lettered": totals.dead, "expired": 0, "skipped": 0, "waiting": 0}
    if wrong_books := {kind: (books[kind], n) for kind, n in told.items() if books[kind] != n} or status["imbalance"]:
        problems.append(f"the books (first) differ from what happened: {wrong_books}")
    if not totals.acked <= books["accepted"] <= totals.sent:
        problems.append(f"{books['accepted']} events accepted, {totals.acked} acked, {totals.sent} sent")
    for name, counts in status["by_type"].items():
        if counts["accepted"] != sum(n for kind, n in counts.items() if kind != "accepted"):
            problems.append(f"the books of {name} don't balance: {counts}")
    post(subject.emulator_port, "/emulator/clear", b"")
    fresh = Ledger(ledger.first + ledger.sent)
    fresh.life = ledger.life
    tee.ledger = fresh
    return problems
