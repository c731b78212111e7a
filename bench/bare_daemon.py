"""A daemon that is the path of an event and nothing else: what bridged's promises cost is what bridged costs above this.

The same decoder, compressor, spool and libraries; every commit is fsynced before its ack. But nothing is checked, counted, kept
aside or recovered: an odd event ends the connection, a refusal of Mixpanel's the process. No properties get another name, no
pace is kept. What a fast prototype is, in short.

    python -m bench.bare_daemon HTTP_PORT STREAM_PORT SINK_PORT
"""

import asyncio
import contextlib
import gc
import queue
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Union, cast

import aiohttp
import msgspec
import uvloop
from aiohttp import web

from bridged.backlog.placement import Placement
from bridged.backlog.segment import Batch, Packer, Segment, cut, request_body
from bridged.currents.schema import Event, event_struct, properties_struct
from bridged.currents.table import CUSTOM_MEMBERS, EVENT_TYPES

_TOKEN: Final = "0123456789abcdef0123456789abcdef"
_BATCH_EVENTS: Final = 2000
_MOST_BYTES: Final = 2_000_000
_PENDING_EVENTS: Final = 20_000
_SENDERS: Final = 4


def _structs() -> dict[type[Event], Any]:
    """What each type is decoded into, and what wraps its properties for Mixpanel."""
    forms: dict[type[Event], Any] = {}
    for code, row in enumerate(EVENT_TYPES):
        own: list[tuple[Any, ...]] = [
            ("distinct_id", Any, None),
            ("insert_id", Any, msgspec.field(default=None, name="$insert_id")),
            ("time", Any, None),
            ("token", Any, None),
        ]
        if row.custom:
            own += [("name", Any, None), (CUSTOM_MEMBERS[row.custom], dict[str, Any] | None, None)]
        properties = properties_struct(row, own)
        event = event_struct(row, code, properties, msgspec.field(default_factory=properties))
        name = row.seed_name or row.name
        forms[event] = msgspec.defstruct("Form", [("properties", Any)], tag_field="event", tag=name, gc=False)
    return forms


class Path:
    """From bytes to Mixpanel."""

    def __init__(self, sink_port: int) -> None:
        self._url = f"http://127.0.0.1:{sink_port}/import?strict=1"
        self._forms = _structs()
        event: Any = Union[tuple(self._forms)]  # noqa: UP007  # a union of a computed number of types
        body: Any = msgspec.defstruct("Body", [("events", list[event])], gc=False)
        self.decode_lines = msgspec.json.Decoder(event).decode_lines
        self.decode_body: Callable[[bytes], Any] = msgspec.json.Decoder(body).decode
        self._encode_lines = msgspec.json.Encoder().encode_lines
        self._work: queue.SimpleQueue[tuple[Batch, Callable[[], None]] | list[int]] = queue.SimpleQueue()
        self._committed: asyncio.Queue[Segment] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._placement, self._pending_bytes = Placement(), 0
        threading.Thread(target=self._write, daemon=True).start()

    def take(self, events: Sequence[Any], acknowledge: Callable[[], None]) -> None:
        """Maps, encodes, hands to the writer; calls back when they are on disk."""
        forms = []
        for event in events:
            properties = event.properties
            properties.distinct_id = event.user.external_user_id
            properties.insert_id = event.id
            properties.time = event.time
            properties.token = _TOKEN
            forms.append(self._forms[type(event)](properties))
        batch = Batch(self._encode_lines(forms), bytes(len(forms)))
        self._pending_bytes += len(batch.ndjson)
        self._placement.place(self._pending_bytes)
        self._work.put((batch, acknowledge))

    def _write(self) -> None:
        """The writer's thread: all there is in one commit."""
        self._placement.adopt()
        db = sqlite3.connect("bare.db", isolation_level=None)
        db.executescript(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; CREATE TABLE segments (id INTEGER PRIMARY KEY, block)"
        )
        packer, last_id = Packer(_MOST_BYTES), 0
        while True:
            work = [self._work.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    work.append(self._work.get_nowait())
            new = [each for each in work if isinstance(each, tuple)]
            groups = cut([batch for batch, _ in new], _BATCH_EVENTS, _MOST_BYTES)
            segments = packer.pack_all(last_id + 1, time.time(), groups)
            last_id += len(segments)
            db.execute("BEGIN IMMEDIATE")
            db.executemany("INSERT INTO segments VALUES (?, ?)", [(each.id, each.block) for each in segments])
            gone = [(id_,) for each in work if isinstance(each, list) for id_ in each]
            db.executemany("DELETE FROM segments WHERE id = ?", gone)
            db.execute("COMMIT")
            self._loop.call_soon_threadsafe(self._on_disk, segments, [acknowledge for _, acknowledge in new])

    def _on_disk(self, segments: list[Segment], acknowledge: list[Callable[[], None]]) -> None:
        for each in acknowledge:
            each()
        for segment in segments:
            self._pending_bytes -= segment.raw_bytes
            self._committed.put_nowait(segment)

    async def send(self, session: aiohttp.ClientSession) -> None:
        """Delivers what is on disk, for ever. Raises at the first answer that isn't 200."""
        headers = {"Content-Type": "application/x-ndjson", "Content-Encoding": "gzip"}
        while True:
            segments = [await self._committed.get()]
            events = segments[0].events
            while events < _BATCH_EVENTS // 2 and not self._committed.empty():
                segments.append(self._committed.get_nowait())
                events += segments[-1].events
            async with session.post(self._url, data=request_body(segments), headers=headers) as answer:
                answer.raise_for_status()
            self._work.put([segment.id for segment in segments])


class _Stream(asyncio.Protocol):
    """A client that asks for acks, and gets one for all that a commit has brought."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._transport: asyncio.Transport
        self._tail: bytes | None = None  # None: the handshake hasn't come
        self._taken = self._acked = 0
        self._told = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._tail is None:
            data, self._tail = data[data.index(b"\n") + 1 :], b""
        lines, newline, tail = data.rpartition(b"\n")
        if not newline:
            self._tail += data
            return
        events = self._path.decode_lines(self._tail + lines if self._tail else lines)
        self._tail = tail
        self._taken += len(events)
        if self._taken - self._acked > _PENDING_EVENTS:
            self._transport.pause_reading()
        taken = self._taken
        self._path.take(events, lambda: self._on_disk(taken))

    def _on_disk(self, taken: int) -> None:
        self._acked = taken
        if not self._told:
            self._told = True
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        self._told = False
        self._transport.write(b'{"acked":%d}\n' % self._acked)
        if self._taken - self._acked <= _PENDING_EVENTS // 2:
            self._transport.resume_reading()


async def main(http_port: int, stream_port: int, sink_port: int) -> None:
    """Serves until a signal ends the process."""
    loop, path = asyncio.get_running_loop(), Path(sink_port)

    async def receive(request: web.BaseRequest) -> web.Response:
        written: asyncio.Future[None] = loop.create_future()
        path.take(path.decode_body(await request.read()).events, lambda: written.set_result(None))
        await written
        return web.Response(body=b"{}")

    runner = web.ServerRunner(web.Server(receive, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", http_port).start()
    await loop.create_server(lambda: _Stream(path), "127.0.0.1", stream_port)
    gc.freeze()
    print('{"ready":true}', flush=True)
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as senders:
        for _ in range(_SENDERS):
            senders.create_task(path.send(session))


if __name__ == "__main__":
    uvloop.run(main(*map(int, sys.argv[1:])))
