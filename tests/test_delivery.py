"""Delivery, end to end: for each answer of Mixpanel's, what becomes of the events. The emulator remembers what arrived."""

import asyncio
import gzip
import io

import msgspec
import pytest
from conftest import balanced, currents, until

from bridged import event_rules
from bridged.app import App
from bridged.delivery import delivery
from bridged.emulator.mixpanel import EmulatorConfig, MixpanelEmulator
from bridged.mixpanel.verdicts import Delivered

FOREVER = "1h"


class Recorder(MixpanelEmulator):
    """Also keeps the bodies of all requests, answered or not."""

    def __init__(self, config):
        super().__init__(config)
        self.bodies = []

    async def _read(self, request):
        call = await super()._read(request)
        self.bodies.append(call.body)
        return call


@pytest.fixture
async def emulator():
    """One that remembers bodies too."""
    async with Recorder(EmulatorConfig(port=0)) as running:
        yield running


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    """A changed credential waits for two seconds after the last request; here for less."""
    monkeypatch.setattr(delivery, "_EARLY_PROBE_S", 0.1)


def mapped(letter):
    """The Mixpanel event of a dead letter of Mixpanel's stage."""
    return msgspec.json.decode(letter[2])


def batch(count, first=0):
    """Currents events, all different."""
    return [currents(seed=seed) for seed in range(first, first + count)]


def poison(seed=10**6):
    """An event that our door lets through and Mixpanel refuses."""
    return currents(seed=seed) | {"user": {"external_user_id": "UNKNOWN"}}


async def post(client, app, events):
    """Hands events in at the HTTP door: they are on disk when this returns."""
    body = io.BytesIO(msgspec.json.encode({"events": events}))
    async with client.post(f"http://127.0.0.1:{app.http.port}/v1/currents", data=body) as response:
        assert response.status == 200


def arrived(emulator):
    """The ids of the events that Mixpanel has, each once."""
    ids = [event["properties"]["$insert_id"] for event in emulator.events()]
    assert len(ids) == len(set(ids))
    return set(ids)


def ids(events):
    """What Mixpanel will know them by."""
    return {event["id"] for event in events}


async def settled(app, seconds=20):
    """Nothing waits any more, and the books balance."""
    await until(lambda: app.backlog.events == 0, f"an empty backlog: {app.delivery.last_problem}", seconds)
    balanced(app)


async def dead(app):
    """Type, reason and event of every dead letter."""
    rows = await app.spool.run(
        lambda db: db.execute("SELECT stage, reason, event FROM dead_letters ORDER BY id").fetchall()
    )
    return [tuple(row) for row in rows]


async def quiet(emulator):
    """How many requests have come, once none comes any more."""
    seen = -1
    while seen != emulator.summary().requests:
        seen = emulator.summary().requests
        await asyncio.sleep(0.2)
    return seen


async def test_delivered(daemon, emulator, client):
    """Everything arrives once, in few requests, and is forgotten."""
    app = await daemon()
    events = batch(50)
    for at in range(0, 50, 10):
        await post(client, app, events[at : at + 10])
    await settled(app)

    assert arrived(emulator) == ids(events)
    assert emulator.summary().requests <= 5
    assert app.spool.accounts.total("delivered") == 50
    assert app.delivery.verdicts == {"delivered": app.delivery.verdicts["delivered"]}
    assert app.delivery.delivered_at is not None


async def test_the_requests_are_what_mixpanel_wants(daemon, emulator, client):
    """Nothing is refused, nothing would be placed at our own address, and no batch is too large."""
    app = await daemon()
    await post(client, app, batch(2500))
    await settled(app)
    summary = emulator.summary()

    assert (summary.refused, summary.duplicates, summary.events_without_ip) == (0, 0, 0)
    assert summary.max_batch <= 2000
    assert summary.stored == 2500


async def test_partial_refusal(daemon, emulator, client):
    """A 400 with failed records: the good ones are in and aren't sent again, the bad ones are dead letters in Mixpanel's words."""
    app = await daemon()
    good = batch(20)
    await post(client, app, [*good[:7], poison(1001), *good[7:], poison(1002)])
    await settled(app)

    assert arrived(emulator) == ids(good)
    assert emulator.summary().duplicates == 0
    letters = await dead(app)
    assert [stage for stage, _, _ in letters] == ["mixpanel"] * 2
    assert all(reason.startswith("properties.distinct_id: ") for _, reason, _ in letters)
    assert [poison(seed)["id"].encode() in event for seed, (_, _, event) in zip((1001, 1002), letters, strict=True)]
    assert app.spool.accounts.total("delivered") == 20


@pytest.mark.parametrize(
    "body",
    [
        {"code": 400, "error": "some of it", "status": "Bad Request"},
        "no JSON at all",
        {"code": 400, "failed_records": ["something is wrong"], "num_records_imported": 0},
    ],
)
async def test_a_refusal_that_names_nobody(daemon, emulator, client, body):
    """Nothing is believed: the batch is split until each event has had its own answer."""
    app = await daemon()
    events = batch(4)
    emulator.script([{"status": 400, "body": body, "times": 3}])
    await post(client, app, events)
    await settled(app)

    dead_letters = len(await dead(app))
    assert len(arrived(emulator)) + dead_letters == 4
    assert dead_letters <= 1
    assert emulator.summary().duplicates == 0


async def test_one_poison_event_in_a_batch_that_is_refused_whole(daemon, emulator, client, monkeypatch):
    """`$identify` makes the whole request a 400 of strings: splitting isolates it, all others are delivered.

    (The configuration knows that name; what else Mixpanel refuses so nobody does.)
    """
    monkeypatch.setattr(event_rules, "REFUSED_NAMES", frozenset())
    name = "users.messages.email.Open"
    app = await daemon(events__names='{"users.messages.email.Click" = "$identify"}')
    good = [currents(name, seed=seed) for seed in range(40)]
    bad = currents("users.messages.email.Click", seed=77)
    await post(client, app, [*good[:25], bad, *good[25:]])
    await settled(app, 40)

    assert arrived(emulator) == ids(good)
    [(stage, reason, event)] = await dead(app)
    assert stage == "mixpanel"
    assert "identity" in reason
    assert bad["id"].encode() in event


async def test_too_large(daemon, client, config):
    """A 413 teaches the cap: the batch comes in smaller parts, later ones are cut smaller from the start, nothing is lost."""
    async with MixpanelEmulator(EmulatorConfig(port=0, max_body_bytes=20_000)) as small:
        app = await daemon(mixpanel__url=small.url)
        events = batch(100)
        await post(client, app, events)
        await settled(app)
        assert arrived(small) == ids(events)
        assert small.summary().answers["413"] >= 1
        refused = small.summary().answers["413"]
        await post(client, app, batch(100, 100))
        await settled(app)

        assert small.summary().answers["413"] == refused
        assert small.summary().stored == 200
        assert await dead(app) == []


async def test_a_single_event_that_is_too_large(daemon, client):
    """It alone becomes a dead letter, with the reason, at once: the limit that was named is proof enough."""
    async with MixpanelEmulator(EmulatorConfig(port=0, max_body_bytes=3_000)) as small:
        app = await daemon(mixpanel__url=small.url)
        good = batch(5)
        large = currents("users.behaviors.CustomEvent", seed=9)
        large["properties"]["custom_properties"] = {"essay": "x" * 5_000}
        await post(client, app, [*good, large])
        await settled(app)

        assert arrived(small) == ids(good)
        [(_, reason, event)] = await dead(app)
        assert "413" in reason
        assert large["id"].encode() in event


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 429},
        {"status": 429, "headers": {"Retry-After": "1"}},
        {"status": 500},
        {"status": 503},
        {"status": 502, "body": "<html>bad gateway</html>", "content_type": "text/html"},
        {"status": 408},
        {"status": 418},
        {"action": "html"},
        {"action": "reset"},
        {"action": "truncate"},
        {"action": "hang"},
        {"action": "reset_after_store"},
        {"action": "store_then_hang"},
        {"action": "store_then_status"},
    ],
    ids=lambda fault: "-".join(map(str, fault.values())),
)
async def test_trouble_that_passes(daemon, emulator, client, fault):
    """Whatever it is: the same bytes are sent again, without a new event to wake anybody, and arrive once."""
    app = await daemon(delivery__timeout="400ms")
    emulator.script([fault | {"times": 1}])
    events = batch(10)
    await post(client, app, events)
    await settled(app)

    assert arrived(emulator) == ids(events)
    assert len(emulator.bodies) == 2
    assert emulator.bodies[0] == emulator.bodies[1]
    assert await dead(app) == []
    assert emulator.summary().duplicates in (0, 10)


async def test_retry_after_is_kept(daemon, emulator, client):
    """Nothing is sent while the server asks us to wait."""
    app = await daemon()
    emulator.script([{"status": 503, "headers": {"Retry-After": "300"}, "times": 1}])
    await post(client, app, batch(3))
    await until(lambda: app.delivery.verdicts["retry"] == 1)
    await post(client, app, batch(3, 3))

    assert await quiet(emulator) == 1
    assert app.delivery.pace.backing_off_s > 200
    assert app.backlog.events == 6
    balanced(app)


async def test_expired_credentials(daemon, emulator, client):
    """Nothing is lost or sent in vain: one request asks now and then, and delivery resumes by itself."""
    app = await daemon(delivery__probe_interval="50ms")
    emulator.credentials(token="another")
    for at in range(0, 60, 20):
        await post(client, app, batch(20, at))
    await until(lambda: app.delivery.halted is not None)
    before = app.delivery.verdicts["halt"]
    await until(lambda: app.delivery.verdicts["halt"] >= before + 5, "some probes")
    assert app.delivery.in_flight <= 1
    assert app.delivery.halted.status == 401
    assert "credential" in app.delivery.halted.reason
    assert app.backlog.events == 60
    assert arrived(emulator) == set()
    balanced(app)

    emulator.credentials(token="example-token")
    await settled(app)
    assert app.delivery.halted is None
    assert arrived(emulator) == ids(batch(60))
    assert await dead(app) == []


@pytest.mark.parametrize("fault", [{"status": 401}, {"status": 402}, {"status": 403}, {"status": 404}, {"status": 302}])
async def test_a_halt_is_quiet(daemon, emulator, client, fault):
    """While halted the next request waits for its time, however much comes in."""
    app = await daemon(delivery__probe_interval=FOREVER, delivery__max_concurrency="1")
    emulator.script([fault])
    for at in range(0, 30, 10):
        await post(client, app, batch(10, at))
    await until(lambda: app.delivery.halted is not None)

    assert await quiet(emulator) == 1
    assert app.backlog.events == 30
    balanced(app)


@pytest.mark.parametrize(
    "fault", [{"status": 503}, {"action": "reset"}, {"status": 400, "body": "no"}, {"status": 413}]
)
async def test_a_probe_that_meets_other_trouble(daemon, emulator, client, fault):
    """Whatever a probe is told, it is one request: the halt lasts, and the next probe is due after the interval."""
    app = await daemon(delivery__probe_interval=FOREVER, delivery__max_concurrency="1")
    emulator.script([{"status": 401, "times": 1}, fault])
    await post(client, app, batch(50))
    await until(lambda: app.delivery.halted is not None)
    app.delivery.credentials_changed()
    await until(lambda: emulator.summary().requests == 2)

    assert await quiet(emulator) == 2
    assert app.delivery.halted is not None
    assert app.backlog.events == 50
    balanced(app)


async def test_new_credentials_are_tried_at_once(daemon, emulator, client):
    """Whoever changed them needn't wait for the next probe."""
    app = await daemon(delivery__probe_interval=FOREVER)
    emulator.script([{"status": 401, "times": 1}])
    await post(client, app, batch(5))
    await until(lambda: app.delivery.halted is not None)
    app.delivery.credentials_changed()
    await settled(app)

    assert arrived(emulator) == ids(batch(5))


async def test_a_refusal_of_everything_is_no_poison(daemon, emulator, client):
    """A proxy that answers 400 to all must not make dead letters of the whole backlog: delivery halts."""
    app = await daemon(delivery__probe_interval=FOREVER)
    emulator.script([{"status": 400, "body": "I don't like you"}])
    await post(client, app, batch(400))
    await until(lambda: app.delivery.halted is not None, seconds=30)
    await quiet(emulator)

    assert await dead(app) == []
    assert app.backlog.events == 400
    balanced(app)


async def test_single_events_refused_with_all_others_are_kept(daemon, emulator, client):
    """Events that come one by one while everything is refused: none becomes a dead letter, all arrive afterwards."""
    app = await daemon(delivery__probe_interval="50ms", delivery__flush_interval="0s")
    emulator.script([{"status": 400, "body": "I don't like you"}])
    events = batch(60)
    for event in events:
        await post(client, app, [event])
    await until(lambda: emulator.summary().answers.get("400", 0) > 100)
    assert await dead(app) == []
    emulator.script([])
    await settled(app)

    assert arrived(emulator) == ids(events)
    assert await dead(app) == []


async def test_size_alone_never_halts(daemon, emulator, client):
    """A proxy that answers 413 without a number makes requests smaller, and nothing else: tests/test_stalls.py has one
    that answers so to everything.
    """
    app = await daemon()
    emulator.script([{"status": 413, "body": "<html>too large</html>", "content_type": "text/html", "times": 30}])
    await post(client, app, batch(300))
    await settled(app)

    assert app.delivery.halted is None
    assert arrived(emulator) | {letter["properties"]["$insert_id"] for letter in map(mapped, await dead(app))} == ids(
        batch(300)
    )


async def test_a_lone_event_that_is_too_large_for_a_proxy_is_kept(daemon, emulator, client):
    """Which size would do isn't said, and nothing else was taken since: the proxy may be set wrong, and is mended."""
    app = await daemon(delivery__probe_interval="50ms")
    emulator.script([{"status": 413, "body": "too large"}])
    large = currents("users.behaviors.CustomEvent", id="large")
    large["properties"] = {"name": "n", "custom_properties": {"text": "x" * 20_000}}
    await post(client, app, [large])
    await until(lambda: emulator.summary().answers.get("413", 0) > 5)
    assert await dead(app) == []
    emulator.script([])
    await settled(app)

    assert arrived(emulator) == {"large"}


async def test_a_probe_is_small(daemon, emulator, client):
    """While the credential is refused, what asks is one segment, not all that waits."""
    app = await daemon(delivery__probe_interval="100ms")
    emulator.script([{"status": 401}])
    for at in range(0, 100, 10):
        await post(client, app, batch(10, at))
    await until(lambda: app.delivery.halted is not None)
    emulator.bodies.clear()
    await until(lambda: len(emulator.bodies) >= 3)

    assert max(gzip.decompress(body).count(b"\n") for body in emulator.bodies[1:]) <= 10
    emulator.script([])
    await settled(app)
    assert arrived(emulator) == ids(batch(100))


async def test_only_what_is_too_old_expires(daemon, emulator, client, tmp_path):
    """What waited with older events, but is younger than max_age, waits on."""
    app = await daemon(delivery__probe_interval="100ms", retention__max_age="2s")
    emulator.script([{"status": 401}])
    await post(client, app, batch(5))
    await until(lambda: app.delivery.halted is not None)
    await asyncio.sleep(1.2)
    await post(client, app, batch(5, 5))
    await until(lambda: app.spool.accounts.total("expired") > 0)

    assert app.spool.accounts.total("expired") == 5
    emulator.script([])
    await settled(app)
    assert arrived(emulator) == ids(batch(5, 5))


async def test_expiry_archives_what_is_too_old(daemon, emulator, client, tmp_path):
    """While halted, what is older than max_age is moved to a file; the books say so."""
    app = await daemon(delivery__probe_interval=FOREVER, retention__max_age="1ms")
    emulator.script([{"status": 401}])
    await post(client, app, batch(10))
    await settled(app)

    assert app.spool.accounts.total("expired") == 10
    assert len(list((tmp_path / "archive").glob("*.ndjson.gz"))) == 1


async def test_an_archive_that_cannot_be_written(daemon, emulator, client, tmp_path):
    """Expired events are kept until it can; the daemon goes on."""
    (tmp_path / "archive").write_text("in the way")
    app = await daemon(delivery__probe_interval="100ms", retention__max_age="1ms")
    emulator.script([{"status": 401}])
    await post(client, app, batch(10))
    await until(lambda: app.delivery.halted is not None)
    await asyncio.sleep(0.3)
    assert app.backlog.events == 10
    (tmp_path / "archive").unlink()
    await settled(app)

    assert app.spool.accounts.total("expired") == 10


async def test_concurrency_is_bounded(daemon, emulator, client):
    """No more requests at once than configured, and the rest waits in the spool."""
    app = await daemon(delivery__max_concurrency="2", delivery__max_batch_events="10")
    emulator.script([{"delay_s": 0.05, "times": 10}])
    await post(client, app, batch(300))
    await settled(app)

    assert emulator.summary().max_concurrent <= 2
    assert arrived(emulator) == ids(batch(300))


async def test_a_bug_in_a_sender_ends_the_daemon(config, emulator, client, monkeypatch):
    """A task that dies takes the process down, at once, and what it had is still in the spool."""
    app = App(config(delivery__grace="5m"))
    async with app:
        original = app.transport.send

        async def send(body, events, insert_ids):
            await original(body, events, insert_ids)
            raise ZeroDivisionError

        monkeypatch.setattr(app.transport, "send", send)
        await post(client, app, batch(5))
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(app.until(asyncio.Event()), 10)
        assert app.backlog.events == 5

    async with App(config()) as again:
        await settled(again)
        assert arrived(emulator) == ids(batch(5))


async def test_a_stop_waits_for_what_is_in_flight(config, emulator, client):
    """Within its grace the daemon delivers what waits; the flush interval doesn't hold it up."""
    app = App(config(delivery__flush_interval=FOREVER, delivery__grace="20s"))
    async with app:
        emulator.script([{"delay_s": 0.3, "times": 1}])
        await post(client, app, batch(5))
        assert app.backlog.events == 5

    assert arrived(emulator) == ids(batch(5))


async def test_a_request_that_is_cut_off_by_the_stop_is_sent_again(config, emulator, client):
    """After the grace a request without an answer is given up; its events wait for the next start."""
    emulator.script([{"action": "store_then_hang", "times": 1}])
    async with App(config(delivery__grace="0s", delivery__flush_interval="0s")) as app:
        await post(client, app, batch(5))
        await until(lambda: arrived(emulator) == ids(batch(5)))

    async with App(config()) as again:
        await settled(again)
        assert arrived(emulator) == ids(batch(5))
        assert emulator.summary().duplicates == 5


def test_a_success_counts_for_the_verdicts():
    """The name of a verdict is its class's: metrics and status rely on it."""
    assert type(Delivered()).__name__.lower() == "delivered"
