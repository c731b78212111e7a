"""From the sockets to Mixpanel: every event that was taken is in exactly one place, at every moment, and arrives once."""

import asyncio
import contextlib
import random
import time

import msgspec
import pytest
from conftest import NAMES, ROWS, balanced, currents, ndjson, until

from bridged.app import App
from bridged.currents.examples import example_day
from bridged.currents.table import EVENT_TYPES
from bridged.emulator.limits import Window

ACKS = b'{"acks":true}\n'


class Traffic:
    """What a test has sent, and what must become of it."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.expected = set()  # ids that Mixpanel must have in the end
        self.dead = 0
        self.skipped = 0
        self._seed = seed * 10**6

    def event(self):
        """A good event of any type, or something else, with what must become of it."""
        self._seed += 1
        kind = self.rng.choice(list(ROWS))
        event = currents(kind, self._seed)
        match self.rng.randrange(20):
            case 0:
                self.dead += 1
                return self.rng.choice([17, "text", {"event_type": kind}, event | {"time": "soon"}, {"event_type": 1}])
            case 1:
                self.dead += 1
                return event | {"user": {"external_user_id": self.rng.choice(["unknown", "UNKNOWN", "0", "Anonymous"])}}
            case 2:
                self.dead += 1
                return event | {"event_type": "users.messages.pigeon.Send"}
            case 3:
                self.skipped += 1
                return event | {"user": {"user_id": "x"}}
        self.expected.add(event["id"])
        return event

    def events(self, count):
        """Several of them."""
        return [self.event() for _ in range(count)]


async def http(app, client, events):
    """Hands events in at the HTTP door; comes again while it is busy, as Braze does."""
    while True:
        async with client.post(f"http://127.0.0.1:{app.http.port}/v1/currents", json={"events": events}) as response:
            if response.status == 200:
                return
            assert response.status == 503
        await asyncio.sleep(0.05)


async def stream(app, events, address):
    """Hands events in at the stream door, in odd pieces, and waits for the last ack."""
    if address == "unix":
        reader, writer = await asyncio.open_unix_connection(app.config.sources.stream.listen[1].removeprefix("unix:"))
    else:
        reader, writer = await asyncio.open_connection("127.0.0.1", app.stream.ports[0])
    data = ACKS + ndjson(events)
    for at in range(0, len(data), 777):
        writer.write(data[at : at + 777])
        await writer.drain()
    writer.write_eof()
    told = (await asyncio.wait_for(reader.read(), 30)).splitlines()[-1]
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    assert msgspec.json.decode(told) == {"acked": len(events)}


@contextlib.asynccontextmanager
async def watched(app):
    """The conservation law at every step: in memory and in the file, all the time while the block runs."""

    def in_file(db):
        """The books and the rows of one and the same commit."""
        db.execute("BEGIN")
        try:
            books = msgspec.json.decode(db.execute("SELECT body FROM books").fetchone()[0], type=dict[str, list[int]])
            waiting = sum(len(codes) for (codes,) in db.execute("SELECT codes FROM segments"))
            dead = db.execute("SELECT count(*) FROM dead_letters").fetchone()[0]
        finally:
            db.execute("COMMIT")
        return [sum(column) for column in zip(*books.values(), strict=True)] or [0] * 5, waiting, dead

    async def watch():
        while True:
            balanced(app)
            (accepted, delivered, dead_lettered, expired, skipped), waiting, dead = await app.spool.run(in_file)
            assert accepted == delivered + dead_lettered + expired + skipped + waiting
            assert dead_lettered == dead
            await asyncio.sleep(0.002)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        assert not watching.done() or watching.result()
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


async def rows_agree(app):
    """The books against the rows that are in the file, when nothing moves."""

    def read(db):
        waiting = b"".join(codes for (codes,) in db.execute("SELECT codes FROM segments"))
        return len(waiting), db.execute("SELECT count(*) FROM dead_letters").fetchone()[0]

    waiting, dead = await app.spool.run(read)
    assert waiting == app.spool.accounts.total("waiting")
    assert dead == app.spool.accounts.total("dead_lettered") == app.spool.dead_letters


def arrived(emulator):
    """The ids of the events that Mixpanel has, each once."""
    found = [event["properties"]["$insert_id"] for event in emulator.events()]
    assert len(found) == len(set(found))
    return set(found)


async def drained(app, seconds=40):
    """Nothing waits any more."""
    await until(lambda: app.backlog.events == 0, f"an empty backlog ({app.delivery.last_problem})", seconds)
    balanced(app)
    await rows_agree(app)


def check(app, emulator, traffic, sent):
    """The end of every story."""
    accounts = app.spool.accounts
    assert arrived(emulator) == traffic.expected
    assert accounts.total("accepted") == sent
    assert accounts.total("dead_lettered") == traffic.dead
    assert accounts.total("skipped") == traffic.skipped
    assert accounts.total("delivered") == len(traffic.expected)
    assert accounts.total("expired") == accounts.total("waiting") == 0


@pytest.mark.parametrize("naming", ["seed", "current"])
async def test_every_type_arrives(daemon, emulator, client, naming):
    """One event of each type, through both doors, in both namings; Mixpanel refuses none."""
    app = await daemon(mixpanel__naming=naming)
    events = [currents(row.event_type, seed) for seed, row in enumerate(EVENT_TYPES)]
    others = [currents(row.event_type, 1000 + seed) for seed, row in enumerate(EVENT_TYPES)]
    await http(app, client, events)
    await stream(app, others, "unix")
    await drained(app)

    assert arrived(emulator) == {event["id"] for event in events + others}
    assert emulator.summary().refused == 0
    by_type = app.spool.accounts.by_type(NAMES)
    assert {name: counts["delivered"] for name, counts in by_type.items()} == {row.event_type: 2 for row in EVENT_TYPES}


FAULTS = {
    "health": [],
    "noise": [
        {"status": 500, "share": 0.1, "seed": 1, "times": 6},
        {"action": "reset_after_store", "share": 0.1, "seed": 2, "times": 6},
        {"action": "store_then_status", "share": 0.1, "seed": 3, "times": 6},
        {"action": "truncate", "share": 0.1, "seed": 4, "times": 6},
        {"delay_s": 0.05, "share": 0.3, "seed": 5},
    ],
    "silence": [{"action": "store_then_hang", "times": 2}, {"action": "hang", "times": 2}],
    "limits": [{"status": 429, "after": 3, "times": 2}, {"status": 413, "times": 1}],
    "expired credential": [{"status": 401, "after": 2, "times": 4}],
}


@pytest.mark.parametrize("faults", FAULTS)
async def test_nothing_is_lost_or_doubled(daemon, emulator, client, faults):
    """Both doors at once, good and bad events mixed, Mixpanel in trouble: the books balance all the time, and all arrives."""
    traffic = Traffic(seed=len(faults))
    app = await daemon(delivery__timeout="500ms", delivery__max_batch_events="100", delivery__flush_interval="10ms")
    emulator.script(FAULTS[faults])
    batches = [traffic.events(traffic.rng.randrange(1, 40)) for _ in range(45)]
    async with watched(app):
        await asyncio.gather(
            *(http(app, client, batch) for batch in batches[::3]),
            *(stream(app, batch, "tcp") for batch in batches[1::3]),
            *(stream(app, batch, "unix") for batch in batches[2::3]),
        )
        await drained(app)

    check(app, emulator, traffic, sum(map(len, batches)))
    requests = emulator.summary()
    assert requests.duplicates == requests.accepted - requests.stored


async def test_a_restart_in_the_middle(config, emulator, client):
    """Stopped again and again while Mixpanel is slow: what was acked is delivered by whoever comes next."""
    traffic = Traffic(seed=3)
    sent = 0
    emulator.script([{"delay_s": 0.1}])
    for _ in range(4):
        async with App(config(delivery__grace="0s", delivery__max_batch_events="50")) as app:
            balanced(app)
            batches = [traffic.events(30) for _ in range(6)]
            sent += 180
            async with watched(app):
                await asyncio.gather(
                    *(http(app, client, batch) for batch in batches[:3]),
                    *(stream(app, batch, "tcp") for batch in batches[3:]),
                )
    emulator.script([])
    async with App(config()) as app:
        await drained(app)
        check(app, emulator, traffic, sent)


async def test_a_backlog_larger_than_memory(config, emulator, client):
    """An outage with a tiny ring: the backlog goes to disk and comes back, complete and once."""
    events = list(example_day(random.Random(5), 12_000, int(time.time()) - 90_000))
    emulator.script([{"status": 401}])
    async with App(config(spool__ring_bytes="64KiB", delivery__probe_interval="50ms")) as app:
        async with watched(app):
            for at in range(0, len(events), 500):
                await http(app, client, events[at : at + 500])
            assert app.backlog.ring.bytes < 64 * 1024 + 200_000
            assert app.backlog.on_disk > 0
            emulator.script([])
            await drained(app)
        assert arrived(emulator) == {event["id"] for event in events}
        assert emulator.summary().refused == 0


async def test_a_rate_limit_is_kept(daemon, emulator, client):
    """Mixpanel's own limit of a minute: what doesn't fit waits, and the books balance meanwhile."""
    emulator._project.window = Window(500, 10**9)
    app = await daemon(delivery__max_batch_events="100")
    events = [currents(seed=seed) for seed in range(800)]
    for at in range(0, 800, 100):
        await http(app, client, events[at : at + 100])
    await until(lambda: app.delivery.verdicts["retry"] >= 1 and app.backlog.events == 300)
    async with watched(app):
        await asyncio.sleep(0.3)

    assert len(arrived(emulator)) == 500
    assert app.backlog.events == 300
    await rows_agree(app)
