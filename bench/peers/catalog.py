"""The peers: what each is, and at which settings it was fastest. One that isn't on the machine is listed, not an error."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

from msgspec import Struct

from bench.peers import starting
from bench.peers.starting import Command

# What a peer is given events by. "lines": NDJSON over TCP, nobody acks. "http": requests as
# Braze makes them. "stream": bridged's own, with acks. "file": a file of lines.
Door = Literal["stream", "http", "lines", "file"]


class Peer(Struct, frozen=True, kw_only=True):
    """One row of the table."""

    name: str
    door: Door
    maps: bool  # makes the Mixpanel event of each Currents event, or passes on what came
    disk: bool  # keeps events in files until they are delivered
    durable: str  # what an event survives once the peer has it
    acks: str  # when the sender is told
    tuned: str  # for the table of settings
    # Writes the configuration into the folder; (folder, listening port, sink's port) -> how to start. Raises Missing.
    command: Callable[[Path, int, int], Command]
    version: Callable[[], str]
    connections: int = 1
    per_request: int = 1
    file_events: int = 0  # of a run, where the door is a file and nothing limits what is sent


class Published(Struct, frozen=True):
    """What was measured elsewhere. Never part of a ratio."""

    name: str
    figures: str
    source: str = "a quiet 2-core machine, 704-byte events"


_MEMORY = "no: memory"
_NO_SYNC = "no: never synced"

PEERS: Final = (
    Peer(
        name="syslog-ng-lines",
        door="lines",
        maps=False,
        disk=False,
        durable=_MEMORY,
        acks="never",
        tuned="no mapping: lines as they came, uncompressed; memory queue, flow control, batches of 2,000, 2 workers",
        command=starting.syslog_ng(maps=False, disk=False),
        version=lambda: starting.first_line(starting.syslog_ng_program(), "--version"),
    ),
    Peer(
        name="syslog-ng-lines-disk",
        door="lines",
        maps=False,
        disk=True,
        durable=_NO_SYNC,
        acks="never",
        tuned="as syslog-ng-lines, with disk-buffer(reliable(yes)), 128 MB of it in memory",
        command=starting.syslog_ng(maps=False, disk=True),
        version=lambda: starting.first_line(starting.syslog_ng_program(), "--version"),
    ),
    Peer(
        name="syslog-ng-map",
        door="lines",
        maps=True,
        disk=False,
        durable=_MEMORY,
        acks="never",
        tuned="json-parser, add-contextual-data for names, format-json; the rest as syslog-ng-lines",
        command=starting.syslog_ng(maps=True, disk=False),
        version=lambda: starting.first_line(starting.syslog_ng_program(), "--version"),
    ),
    Peer(
        name="syslog-ng-map-disk",
        door="lines",
        maps=True,
        disk=True,
        durable=_NO_SYNC,
        acks="never",
        tuned="as syslog-ng-map, with disk-buffer(reliable(yes)), 128 MB of it in memory",
        command=starting.syslog_ng(maps=True, disk=True),
        version=lambda: starting.first_line(starting.syslog_ng_program(), "--version"),
    ),
    Peer(
        name="fluent-bit",
        door="lines",
        maps=True,
        disk=True,
        durable=_NO_SYNC,
        acks="never",
        tuned="in_tcp in a thread, Lua as its processor, filesystem storage, uncompressed, 2 workers, flush 0.2 s",
        command=starting.fluent_bit(
            "tcp", "mixpanel_event", "format: json\n      chunk_size: 1024\n      buffer_size: 4096", threaded=True
        ),
        version=lambda: starting.first_line(starting.fluent_bit_program(), "--version"),
    ),
    Peer(
        name="fluent-bit-http",
        door="http",
        maps=True,
        disk=True,
        durable=_NO_SYNC,
        acks="before a sync",
        tuned="as fluent-bit, in the engine's thread (in its own it acks before the file); 100 events a request, 16 at once",
        command=starting.fluent_bit(
            "http",
            "mixpanel_events",
            "successful_response_code: 200\n      buffer_max_size: 64M\n      buffer_chunk_size: 512K",
            threaded=False,
        ),
        version=lambda: starting.first_line(starting.fluent_bit_program(), "--version"),
        connections=16,
        per_request=100,
    ),
    Peer(
        name="rsyslog-map",
        door="lines",
        maps=True,
        disk=False,
        durable=_MEMORY,
        acks="never",
        tuned="imptcp, mmjsonparse, a lookup table for names, omhttp in batches of 2,000; FixedArray queue, 2 workers",
        command=starting.rsyslog(disk=False),
        version=starting.rsyslog_version,
    ),
    Peer(
        name="rsyslog-map-disk",
        door="lines",
        maps=True,
        disk=True,
        durable=_NO_SYNC,
        acks="never",
        tuned="as rsyslog-map, with lines as they came in a Disk queue, which has 1 worker; a checkpoint each 1,000",
        command=starting.rsyslog(disk=True),
        version=starting.rsyslog_version,
    ),
    Peer(
        name="fluentd",
        door="lines",
        maps=True,
        disk=True,
        durable=_NO_SYNC,
        acks="never",
        tuned="in_tcp, oj, a filter of the user's own, file buffer, chunks of 2,000, 2 flush threads, kept connections",
        command=starting.fluentd,
        version=lambda: starting.first_line(starting.fluentd_program(), "--version"),
    ),
    Peer(
        name="vector",
        door="lines",
        maps=True,
        disk=True,
        durable="no: synced later",
        acks="never",
        tuned="socket source, remap, disk buffer of 4 GB, batches of 2,000, 4 at once; by its documentation, not tried yet",
        command=starting.vector,
        version=lambda: starting.first_line(starting.vector_program(), "--version"),
    ),
    Peer(
        name="naive",
        door="http",
        maps=True,
        disk=False,
        durable=_MEMORY,
        acks="once in memory",
        tuned="aiohttp on uvloop, msgspec, zlib level 1 in threads, batches of 2,000, 4 senders; 100 events a request",
        command=starting.python_program("naive.py", lambda: sys.executable),
        version=lambda: "bench/peers/naive.py",
        connections=16,
        per_request=100,
    ),
    Peer(
        name="bytewax",
        door="file",
        maps=True,
        disk=False,
        durable="no: its input is",
        acks="no door: a file",
        tuned="an item is a batch of 2,000 lines, recovery on, epochs of 1 s, msgspec, zlib level 1",
        command=starting.python_program("dataflow.py", lambda: starting.python("bytewax", "msgspec")),
        version=lambda: starting.python_versions("bytewax") or "",
        file_events=250_000,
    ),
    Peer(
        name="mixpanel-pypi",
        door="lines",
        maps=True,
        disk=False,
        durable=_MEMORY,
        acks="never",
        tuned="BufferedConsumer(50), its most; 2 threads; keep-alive",
        command=starting.python_program("consumer.py", lambda: starting.python("mixpanel")),
        version=lambda: starting.python_versions("mixpanel") or "",
    ),
    Peer(
        name="mixpanel-npm",
        door="lines",
        maps=True,
        disk=False,
        durable=_MEMORY,
        acks="never",
        tuned="import_batch of 50, its most; 16 requests at once; keep-alive",
        command=starting.node_program("batches.js"),
        version=lambda: starting.node_version("mixpanel"),
    ),
    Peer(
        name="mixpanel-import",
        door="lines",
        maps=True,
        disk=False,
        durable=_MEMORY,
        acks="never",
        tuned="as it comes",
        command=starting.node_program("import.js"),
        version=lambda: starting.node_version("mixpanel-import"),
    ),
    Peer(
        name="mixpanel-import-tuned",
        door="lines",
        maps=True,
        disk=False,
        durable=_MEMORY,
        acks="never",
        tuned="compressionLevel 1, fastMode, abridged, 4 workers, highWater 2,000",
        command=starting.node_program(
            "import.js",
            json.dumps({"compressionLevel": 1, "fastMode": True, "abridged": True, "workers": 4, "highWater": 2000}),
        ),
        version=lambda: starting.node_version("mixpanel-import"),
    ),
)

PUBLISHED: Final = (
    Published("syslog-ng-lines", "589,000 events/s, 2.5 us"),
    Published("syslog-ng-map-disk", "77,000 events/s, 21.7 us"),
    Published("fluent-bit", "96,000 events/s, 17.4 us"),
    Published("fluent-bit-http", "68,000 events/s, 19.1 us"),
    Published("rsyslog-map-disk", "55,000 events/s, 31.2 us"),
    Published("fluentd", "13,000 events/s, 47 us"),
    Published(
        "vector",
        "TCP to HTTP, no mapping: 26.7 MiB/s, where Fluent Bit did 19.6",
        "the README of github.com/vectordotdev/vector, by its own test harness; CPU, memory and loss not stated",
    ),
    Published("bytewax", "117,000 events/s, 8.1 us"),
    Published("naive", "70,000 events/s, 18.2 us"),
    Published("mixpanel-npm", "97,000 events/s, 11.9 us"),
    Published("mixpanel-pypi", "16,000 events/s, 61 us"),
    Published("mixpanel-import-tuned", "70,000 events/s, 19.9 us"),
    Published("mixpanel-import", "3,500 events/s, 242 us"),
)
