"""The admin listener: health, readiness, metrics, status, and who may ask."""

import asyncio
import re
import threading

import msgspec
import pytest
from conftest import NAMES, SLOW, balanced, currents, until
from prometheus_client.parser import text_string_to_metric_families

from bridged.admin import health
from bridged.admin.health import Facts, judge
from bridged.admin.status import Status, alarm_facts
from bridged.admin.status import health as judge_now
from bridged.backlog.spool import DeadLetter, Intaken
from bridged.commands.status import lines
from bridged.currents.schema import UNKNOWN_CODE, UNKNOWN_TYPE
from bridged.currents.table import EVENT_TYPES
from bridged.errors import ListenError

GOOD = Facts(
    doors_open=True,
    writer_failed=False,
    near_cap=False,
    halted=False,
    backing_off=False,
    waiting=0,
    uptime_s=10_000,
    oldest_age_s=None,
    asked_age_s=None,
    timeout_s=60,
)


def facts(**changes):
    """The facts of a healthy daemon, but for the changes."""
    return Facts(**{name: getattr(GOOD, name) for name in GOOD.__struct_fields__} | changes)


def base(app):
    """Where the admin listener is."""
    return f"http://{app.config.admin.listen}"


async def post(client, app, events):
    """Brings events to the HTTP door."""
    url = f"http://{app.config.sources.http.listen}/v1/currents"
    async with client.post(url, json={"events": events}) as answer:
        assert answer.status == 200


async def ask(client, app, path, **kwargs):
    """The status and the JSON of an answer."""
    async with client.get(base(app) + path, **kwargs) as answer:
        return answer.status, await answer.json()


async def metrics(client, app):
    """Every sample, by its name with labels."""
    async with client.get(base(app) + "/metrics") as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        text = await answer.text()
    families = [family.name for family in text_string_to_metric_families(text)]  # raises if the format is wrong
    assert len(families) == len(set(families))
    samples = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


# -- the decision -----------------------------------------------------------------------------------------------------


def test_idle_is_ready():
    """A daemon with nothing to do for hours is ready: idleness is no stall."""
    assert judge(GOOD).ready
    assert not judge(GOOD).reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"doors_open": False}, "doors are not open"),
        ({"writer_failed": True}, "writer has failed"),
        ({"near_cap": True}, "near its cap"),
        ({"uncommitted_s": 31.0}, "have waited for 31 s to be written"),
        ({"waiting": 5, "oldest_age_s": 500, "asked_age_s": 400}, "not been heard of for 400 s"),
        ({"waiting": 5, "oldest_age_s": 500, "asked_age_s": None}, "not been heard of for 500 s"),
    ],
)
def test_not_ready(changes, reason):
    """Readiness ends when new events would be refused, and when events wait without any answer."""
    health = judge(facts(**changes))

    assert not health.ready
    assert reason in health.reason


@pytest.mark.parametrize(
    "changes",
    [
        {"halted": True, "waiting": 5, "oldest_age_s": 9000, "asked_age_s": 9000},
        {"backing_off": True, "waiting": 5, "oldest_age_s": 9000, "asked_age_s": 9000},
        {"uncommitted_s": 29.0},
        {"waiting": 5, "oldest_age_s": 9000, "asked_age_s": 179},
        {"waiting": 5, "oldest_age_s": 179, "asked_age_s": 9000},
        {"waiting": 5, "oldest_age_s": 9000, "asked_age_s": None, "uptime_s": 20},
        {"paced": True, "waiting": 5, "oldest_age_s": 9000, "asked_age_s": 9000},
        {"pause_s": 3600, "waiting": 5, "oldest_age_s": 9000, "asked_age_s": 3700},
    ],
)
def test_orderly_waiting_is_ready(changes):
    """A halt, a backoff, the rate, a recent request or answer, a young event, a recent start, and what is configured are no
    stall: the doors must stay in service.
    """
    assert judge(facts(**changes)).ready


def test_what_waits_for_the_export_is_no_stall():
    """With mixpanel.export off nothing is sent, and nobody is late."""
    assert judge(facts(exporting=False, waiting=5, oldest_age_s=9000, asked_age_s=None)).ready


# -- the listener -----------------------------------------------------------------------------------------------------


async def test_health_and_readiness(daemon, client):
    """A running daemon answers 200 to both, readiness with its details."""
    app = await daemon()

    assert (await ask(client, app, "/healthz"))[0] == 200
    status, body = await ask(client, app, "/readyz")
    assert status == 200
    assert body == {
        "ready": True,
        "reason": "",
        "waiting": 0,
        "halted": False,
        "backing_off": False,
        "stalled_s": 0.0,
        "uncommitted_s": 0.0,
    }


async def test_halted_stays_ready_and_says_so(daemon, client, emulator):
    """With a refused credential the intake stays in service: /readyz is 200, and everything says that delivery is halted."""
    emulator.credentials(token="another-token")
    app = await daemon(delivery__probe_interval="1h")
    await post(client, app, [currents(id=str(n)) for n in range(3)])
    await until(lambda: app.delivery.halted, "the halt")

    code, ready = await ask(client, app, "/readyz")
    status = (await ask(client, app, "/api/status"))[1]

    assert (code, ready["halted"]) == (200, True)
    assert status["state"] == "halted"
    assert status["halted"]["status"] == 401
    assert re.match(r"Halted since \d\d:\d\d [A-Z]\w+, HTTP 401: Mixpanel .*3 events safe on disk", status["sentence"])
    assert status["health"]["ready"]
    samples = await metrics(client, app)
    assert samples["bridged_delivery_halted"] == 1
    assert samples['bridged_events_waiting{event_type="users.messages.email.Open"}'] == 3
    assert samples["bridged_oldest_event_age_seconds"] > 0


async def test_who_stops_is_not_ready(daemon, client):
    """While its doors are closed, and the last requests end, a daemon that stops takes nothing new."""
    app = await daemon()
    ended = asyncio.ensure_future(app.http.__aexit__(None, None, None))
    await asyncio.sleep(0)

    status, body = await ask(client, app, "/readyz")
    assert (status, body["reason"]) == (503, "the doors are not open")
    await ended


async def test_a_disk_that_hangs_is_not_ready(daemon, client, monkeypatch):
    """Who gets no answer, because nothing is committed any more, shall be told apart; when the disk comes back, all is well."""
    monkeypatch.setattr(health, "HANGS_S", 0.5)
    app = await daemon()
    hung, go = threading.Event(), threading.Event()

    def hang(_db):
        hung.set()
        go.wait(60)

    hanging = asyncio.ensure_future(app.spool.run(hang))
    try:
        await asyncio.to_thread(hung.wait, 10)
        assert (await ask(client, app, "/readyz"))[0] == 200
        posting = asyncio.ensure_future(post(client, app, [currents()]))
        await until(lambda: "nobody is answered" in judge_now(app).reason, "that it is told", 20)
        status, body = await ask(client, app, "/readyz")
        assert (status, "does the spool's disk hang?" in body["reason"]) == (503, True)
        await until(lambda: "no_progress" in {one.alarm for one in app.watch.alarms.open}, "the alarm", 20)
    finally:
        go.set()
        await hanging
    await posting
    assert (await ask(client, app, "/readyz"))[0] == 200


async def test_near_the_cap_is_not_ready(daemon, client, emulator):
    """A daemon that refuses new events says 503, with the reason."""
    emulator.credentials(token="another-token")
    app = await daemon(spool__max_bytes="16MiB")
    app.spool.used_bytes += 16 * 2**20

    status, body = await ask(client, app, "/readyz")
    assert status == 503
    assert "near its cap" in body["reason"]
    assert (await ask(client, app, "/api/status"))[1]["state"] == "refusing"
    assert (await metrics(client, app))["bridged_spool_near_cap"] == 1


async def test_metrics_are_the_books(daemon, client):
    """Every event of every type is in /metrics under what became of it, and the equation holds there too."""
    app = await daemon()
    events = [currents(row.event_type, seed) for seed, row in enumerate(EVENT_TYPES)]
    await post(client, app, events)
    await post(client, app, [currents(user={}), currents() | {"event_type": "users.messages.fax.Send"}])
    await until(lambda: app.spool.accounts.total("delivered") == len(EVENT_TYPES), "delivery")

    samples = await metrics(client, app)
    for row in EVENT_TYPES:
        assert samples[f'bridged_events_delivered_total{{event_type="{row.event_type}"}}'] == 1
    assert samples['bridged_events_dead_lettered{event_type="(unknown)"}'] == 1
    assert samples['bridged_events_skipped_total{event_type="users.messages.email.Open"}'] == 1
    total = {
        kind: sum(value for name, value in samples.items() if name.startswith(f"bridged_events_{kind}"))
        for kind in ("accepted", "delivered", "dead_lettered", "expired", "skipped", "waiting")
    }
    assert total.pop("accepted") == sum(total.values()) == len(EVENT_TYPES) + 2
    assert samples["bridged_books_imbalance"] == 0
    assert samples["bridged_dead_letters"] == 1
    assert samples['bridged_requests_total{status="200"}'] == 2
    assert samples['bridged_verdicts_total{verdict="delivered"}'] >= 1
    assert samples["process_resident_memory_bytes"] > 0
    assert any(name.startswith("bridged_build_info{") for name in samples)
    balanced(app)


async def test_unknown_fields_are_told(daemon, client):
    """A field that Braze adds is counted and shown, since it isn't forwarded."""
    app = await daemon()
    event = currents()
    event["properties"]["brand_new_field"] = 1
    await post(client, app, [event])

    samples = await metrics(client, app)
    name = 'bridged_unknown_fields_total{event_type="users.messages.email.Open",field="brand_new_field"}'
    assert samples[name] == 1
    status = (await ask(client, app, "/api/status"))[1]
    assert status["unknown_fields"] == [
        {"event_type": "users.messages.email.Open", "field": "brand_new_field", "seen": 1}
    ]
    assert any("doesn't know" in warning for warning in status["warnings"])


async def test_status_of_a_day(daemon, client):
    """The status counts, names the dead letters' reasons, and says what the daemon does in words."""
    app = await daemon(mixpanel__api_secret="a-secret")
    idle = (await ask(client, app, "/api/status"))[1]
    await post(client, app, [currents(id="a"), currents(id="b", time="soon"), currents(id="c", user={})])
    await until(lambda: app.spool.accounts.total("delivered") == 1, "delivery")

    status = (await ask(client, app, "/api/status"))[1]
    assert idle["sentence"] == "Idle: nothing waiting"
    assert status["state"] == "delivering"
    assert status["events"] == {
        "accepted": 3,
        "delivered": 1,
        "dead_lettered": 1,
        "expired": 0,
        "skipped": 1,
        "waiting": 0,
    }
    assert status["by_type"] == {"users.messages.email.Open": status["events"]}
    (reason,) = status["dead_letters"]["reasons"]
    assert (reason["stage"], reason["count"]) == ("door", 1)
    assert status["skipped"] == {"no external_user_id": 1}
    assert status["imbalance"] == 0
    assert any("2027-03-03" in warning for warning in status["warnings"])


async def test_a_problem_is_told_and_forgotten(daemon, client, emulator):
    """A failed request is told; it is tried again although nothing new comes, and then nothing is wrong any more."""
    emulator.script([{"status": 503, "times": 1}, {"delay_s": 0.5, "times": 1}])
    app = await daemon()
    await post(client, app, [currents(id="a")])
    await until(lambda: app.delivery.last_problem, "the failure")
    await until(lambda: app.spool.accounts.total("delivered") == 1, "delivery")

    assert (await ask(client, app, "/api/status"))[1]["last_problem"] == ""
    assert [event["properties"]["$insert_id"] for event in emulator.events()] == ["a"]


async def test_token_guards_everything_but_healthz(daemon, client):
    """With [admin] token set, nothing but liveness is told without it; the comparison survives any bytes."""
    app = await daemon(admin__token="let-me-in")

    for path in ("/readyz", "/metrics", "/api/status", "/api/config", "/api/dead-letters", "/nowhere"):
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer \xe9\u20ac"}):
            async with client.get(base(app) + path, headers=header) as answer:
                assert answer.status == 401, path
                assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        async with client.get(base(app) + path, headers={"Authorization": "Bearer let-me-in"}) as answer:
            assert answer.status == (404 if path == "/nowhere" else 200), path
    assert (await ask(client, app, "/healthz"))[0] == 200


async def test_secrets_stay_inside(daemon, client, capfd):
    """The configuration that the API shows has no secret in it, nor have the status, the metrics and the log."""
    app = await daemon(
        mixpanel__api_secret="very-secret",
        sources__http__bearer_token="bearer-secret",
        alerts__webhook_url="http://127.0.0.1:9/hook-secret",
        alerts__webhook_token="token-secret",
    )
    app.reload_problem = "made up, so that the webhook is tried"
    await until(lambda: app.watch.webhook.failures, "the attempt")
    text = ""
    for path in ("/api/config", "/api/status", "/metrics"):
        async with client.get(base(app) + path) as answer:
            text += await answer.text()
    text += "".join(capfd.readouterr())
    assert "********" in text
    assert "webhook_failed" in text
    for secret in ("very-secret", "bearer-secret", "example-token", "hook-secret", "token-secret"):
        assert secret not in text


async def test_orders_are_posts_of_json(daemon, client):
    """What changes something can't be caused by a link or a form: only by a POST with a JSON content type."""
    app = await daemon()
    url = base(app) + "/api/dead-letters/purge"

    async with client.get(url) as answer:
        assert answer.status == 405
    async with client.post(url, data=b'{"all":true}', headers={"Content-Type": "text/plain"}) as answer:
        assert answer.status == 415
    async with client.post(url, json={"all": True}) as answer:
        assert answer.status == 200


async def test_a_method_that_is_none_of_a_path(daemon, client):
    """It is told so, and which there are, whatever is in the body; a path that isn't there is 404."""
    app = await daemon()
    for method in ("PUT", "DELETE", "POST"):
        async with client.request(method, base(app) + "/api/status") as answer:
            assert (answer.status, answer.headers["Allow"]) == (405, "GET,HEAD")
        async with client.request(method, base(app) + "/api/nothing") as answer:
            assert answer.status == 404


async def test_admin_answers_while_the_doors_are_busy(daemon, client):
    """A scrape in the middle of traffic sees books that balance: they are read as of a commit."""
    app = await daemon()

    async def traffic():
        for n in range(20):
            await post(client, app, [currents(id=f"{n}-{m}") for m in range(50)])

    task = asyncio.create_task(traffic())
    while not task.done():
        assert (await metrics(client, app))["bridged_books_imbalance"] == 0
    await task


async def test_a_taken_port_is_told(daemon, client):
    """A second daemon at the same admin address says which key is wrong, and the first goes on."""
    app = await daemon()
    with pytest.raises(ListenError, match=r"admin\.listen"):
        await daemon(spool__path="other.db", admin__listen=app.config.admin.listen)

    assert (await ask(client, app, "/healthz"))[0] == 200


# -- what was hidden ---------------------------------------------------------------------------------------------------


async def status_lines(client, app):
    """What `bridged status` prints."""
    async with client.get(base(app) + "/api/status") as answer:
        return "\n".join(lines(msgspec.json.decode(await answer.read(), type=Status)))


async def test_a_learned_cap_is_told(daemon, client, emulator):
    """After a 413 requests are smaller for a while: who wonders about the rate finds it in the status."""
    app = await daemon()
    assert "request size  at most 1.9 MiB\n" in await status_lines(client, app)
    emulator.script([{"status": 413, "body": {"error": "request exceeds max limit of 20000 bytes"}, "times": 1}])
    await post(client, app, [currents(seed=seed) for seed in range(200)])
    await until(lambda: app.delivery.learned_batch_bytes == 20_000, "the cap")

    assert "request size  at most 19.5 KiB, learned from an answer 413" in await status_lines(client, app)
    assert (await ask(client, app, "/api/status"))[1]["pace"]["batch_bytes_learned"]


async def test_what_is_tried_again_is_told(daemon, client, emulator):
    """How often the oldest was tried in vain, and nothing any more once it is delivered, or was split."""
    app = await daemon()
    emulator.script([{"status": 503, "times": 3}, {"status": 413, "times": 1}])
    await post(client, app, [currents(seed=seed) for seed in range(5)])
    await until(lambda: app.delivery.retrying and app.delivery.retrying.attempts == 3, "three attempts", 20)
    assert "tried again   1 requests; the oldest 3 times in vain" in await status_lines(client, app)
    await until(lambda: app.backlog.events == 0, "delivery", 40)

    assert app.delivery.retrying is None
    assert "tried again" not in await status_lines(client, app)


@pytest.mark.parametrize(
    ("configured", "faults"),
    [
        ({}, [{"status": 503, "headers": {"Retry-After": "2"}, "times": 1}, {"action": "hang"}]),
        ({"delivery__flush_interval": "1h"}, []),
        ({"delivery__probe_interval": "1h"}, [{"status": 400, "body": "no"}]),
        ({"delivery__max_events_per_second": "1", "delivery__max_batch_events": "1"}, [{"status": 503, "times": 1}]),
    ],
    ids=["after Retry-After", "to fill a request", "set aside", "the rate"],
)
async def test_an_orderly_pause_is_no_stall(daemon, client, emulator, monkeypatch, configured, faults):
    """Whatever pause was asked for, by us or by Mixpanel: the doors stay in service while it lasts, and when it ends."""
    monkeypatch.setattr("bridged.admin.health.STALL_MARGIN_S", 1.0)
    app = await daemon(delivery__timeout="200ms", **configured)
    emulator.script(faults)
    told = []
    await post(client, app, [currents(seed=seed) for seed in range(9)])
    until_then = asyncio.get_running_loop().time() + 3.5
    while asyncio.get_running_loop().time() < until_then:
        told.append(judge_now(app).reason)
        await asyncio.sleep(0.02)

    assert app.backlog.events
    assert not [reason for reason in told if "not been heard of" in reason]


async def test_what_mixpanel_says_to_what_is_set_aside_is_told(daemon, client, emulator):
    """All that waits is refused oddly: the sentence, the last problem and the alarm say so, and not that all goes on."""
    app = await daemon(delivery__probe_interval="1h")
    emulator.script([{"status": 400, "body": "the gateway says no"}])
    await post(client, app, [currents(seed=seed) for seed in range(2)])
    await until(lambda: app.delivery.set_aside == 2, "the events")
    _, status = await ask(client, app, "/api/status")

    assert status["sentence"].endswith("2 events waiting, 2 of them kept aside: refused, or failing")
    assert "the gateway says no" in status["last_problem"]
    assert "the gateway says no" in alarm_facts(app).last_problem


async def test_a_spool_without_room_is_told_though_nothing_is_set_up(daemon, client, monkeypatch):
    """Nothing leaves without a credential, and then nothing comes in any more: who looks must see the second as well."""
    app = await daemon(mixpanel__token="")
    await post(client, app, [currents()])
    monkeypatch.setattr(type(app.spool), "near_cap", property(lambda _: True))
    _, status = await ask(client, app, "/api/status")

    assert status["state"] == "not set up"
    assert "New events are refused: the spool" in status["sentence"]


async def test_one_request_that_tries_again_is_told(daemon, client, emulator):
    """It is the only one, and hangs: that isn't a delivery."""
    app = await daemon(delivery__timeout="1h", delivery__max_concurrency="1")
    emulator.script([{"status": 503, "times": 3}, {"action": "hang"}])
    await post(client, app, [currents()])
    await until(lambda: emulator.summary().requests == 4, "the fourth request", 20)
    _, status = await ask(client, app, "/api/status")

    assert status["state"] == "backing off"
    assert status["sentence"].startswith("Trying again with one request, after 503")
    app.hurry.set()


async def test_events_that_mixpanel_does_not_count_are_told(daemon, client, emulator):
    """They are in, as far as Mixpanel's words go; somebody who misses them must find a trace."""
    app = await daemon()
    emulator.script([{"status": 200, "body": {"code": 200, "num_records_imported": 1, "status": "OK"}}])
    await post(client, app, [currents(seed=seed) for seed in range(3)])
    await until(lambda: app.backlog.events == 0, "the delivery")

    assert "warning: Mixpanel took 2 events that its answers don't count" in await status_lines(client, app)


async def test_what_is_kept_aside_is_told(daemon, client, emulator):
    """One lone event, refused incomprehensibly: nobody can say whose fault it is, but it isn't hidden."""
    app = await daemon()
    emulator.script([{"status": 400, "body": "no"}])
    await post(client, app, [currents(seed=1)])
    await until(lambda: app.delivery.set_aside == 1, "the event")
    # Now and then it is tried again, and isn't aside meanwhile: each is asked until it was asked between two tries.
    async with asyncio.timeout(30 * SLOW):
        while "kept aside    1 single events" not in (text := await status_lines(client, app)):
            await asyncio.sleep(0.01)
    assert "warning: 1 single event(s) are refused for a reason that can't be understood" in text
    async with asyncio.timeout(30 * SLOW):
        while (await metrics(client, app))["bridged_events_set_aside"] != 1:
            await asyncio.sleep(0.01)

    emulator.script([])
    await post(client, app, [currents(seed=2)])
    await until(lambda: app.backlog.events == 0, "delivery")
    assert app.delivery.set_aside == 0
    assert len(emulator.events()) == 2


async def test_an_alarm_is_a_line_of_the_status(daemon, client, emulator):
    """With its name, its weight and its words; beside a delivery that goes on again, with word of its end."""
    emulator.credentials(token="another")
    app = await daemon()
    await post(client, app, [currents(seed=1)])
    await until(lambda: app.watch.alarms.open, "the alarm")

    assert re.search(
        r"^ALARM halted \(critical\) since 20..-.*: Delivery is halted", await status_lines(client, app), re.MULTILINE
    )
    emulator.credentials(token="example-token")
    await until(lambda: app.watch.alarms.open[0].ending, "the recovery")
    assert ", ending (its cause is gone): Delivery is halted" in await status_lines(client, app)


async def test_no_counter_falls_when_a_replay_finds_another_type(daemon, client, emulator):
    """A dead letter that was accepted as one type is another one to a later version: in the books it stays what it was
    accepted as, so that no type's counter falls, which would look like a restart.
    """
    app = await daemon()
    event = msgspec.json.encode(currents(seed=1))
    letter = DeadLetter(UNKNOWN_CODE, UNKNOWN_TYPE, "door", "nobody knew it", event)
    await app.spool.append(Intaken([], [letter]))
    before = await metrics(client, app)
    assert before['bridged_events_accepted_total{event_type="(unknown)"}'] == 1
    async with client.post(base(app) + "/api/dead-letters/replay", json={"all": True}) as answer:
        assert (await answer.json())["replayed"] == 1
    await until(lambda: app.spool.accounts.total("delivered") == 1, "delivery")

    after = await metrics(client, app)
    books = [name for name in before if name.startswith("bridged_events") and "_total" in name]
    assert [name for name in books if after[name] < before[name]] == []
    assert app.spool.accounts.by_type(NAMES).keys() == {"(unknown)"}
    assert emulator.events()[0]["event"] == "Email Open"
    balanced(app)


async def test_a_lost_socket_is_told(daemon, client, tmp_path):
    """While it can't be made anew: an alarm, a warning, and no readiness if it was the only door."""
    path = tmp_path / "d" / "s.sock"
    path.parent.mkdir()
    app = await daemon(sources__stream__listen=f'["unix:{path}"]', sources__http__listen="")
    base = f"http://{app.config.admin.listen}"
    path.unlink()
    path.parent.rmdir()
    await until(lambda: app.stream.unix.lost, "the loss")
    async with client.get(f"{base}/readyz") as got:
        assert got.status == 503
    await until(lambda: "door" in {one.alarm for one in app.watch.alarms.open}, "the alarm")
    async with client.get(f"{base}/api/status") as got:
        said = await got.json()
    assert any(str(path) in warning and "removed" in warning for warning in said["warnings"])
    path.parent.mkdir()
    await until(path.exists, "another one")
    async with client.get(f"{base}/readyz") as got:
        assert got.status == 200
    assert any(entry.kind == "door" for entry in app.activity.entries)
