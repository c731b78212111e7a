"""What the page is told while it is open: the stream of the status, the charts' columns, what happened."""

import asyncio
import json
import resource
import shutil
from pathlib import Path

import aiohttp
import msgspec
from conftest import SLOW, currents, until

from bridged.activity import MAX_ENTRIES, TOGETHER_S, Activity
from bridged.admin import live
from bridged.admin.history import DAY_STEP, STEP_S, STEPS, History, Totals
from bridged.app import App

TOKEN = "0123456789abcdef"


def base(app):
    """Where the admin listener is."""
    return f"http://{app.config.admin.listen}"


async def event(response):
    """The next event of a stream: its name and data."""
    name = ""
    while True:
        line = (await asyncio.wait_for(response.content.readline(), 30 * SLOW)).decode().rstrip("\n")
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            return name, json.loads(line.removeprefix("data: "))


# -- the stream --------------------------------------------------------------------------------------------------------


async def test_the_stream_tells_what_happens(daemon, client):
    """One status after the other; what was accepted meanwhile is in the next one. Two who listen see the same."""
    app = await daemon()
    async with client.get(base(app) + "/api/live") as first, client.get(base(app) + "/api/live") as second:
        assert first.content_type == "text/event-stream"
        name, data = await event(first)
        assert (name, data["status"]["events"]["accepted"]) == ("status", 0)
        assert data["activity_id"] == app.activity.last_id
        async with client.post(
            f"http://{app.config.sources.http.listen}/v1/currents", json={"events": [currents()]}
        ) as posted:
            assert posted.status == 200
        seen = []
        for response in (first, second):
            while True:
                data = (await event(response))[1]
                if data["status"]["events"]["delivered"] == 1:
                    break
            seen.append(data["status"]["by_type"])
        assert seen[0] == seen[1]
        assert app.admin._live.listeners == 2
    await until(lambda: app.admin._live.listeners == 0, "both to be gone", 30)


async def test_one_snapshot_serves_everybody(daemon, client, monkeypatch):
    """Ten listeners cost one status a second, nobody listening costs none."""
    app = await daemon()
    made = []
    real = live.status
    monkeypatch.setattr(live, "status", lambda *args: made.append(1) or real(*args))
    responses = [await client.get(base(app) + "/api/live") for _ in range(10)]
    for response in responses:
        for _ in range(3):
            await event(response)
        response.close()
    # Each has had three; had each its own, it would be thirty.
    assert 2 <= len(made) <= 12
    await until(lambda: app.admin._live.listeners == 0, "all to be gone", 30)
    before = len(made)
    await asyncio.sleep(1.5)
    assert len(made) == before


async def test_there_is_an_end_to_listeners(daemon, client, monkeypatch):
    """One too many is told so, and is let in when another has gone."""
    monkeypatch.setattr(live, "MAX_LISTENERS", 2)
    app = await daemon()
    responses = [await client.get(base(app) + "/api/live") for _ in range(2)]
    async with client.get(base(app) + "/api/live") as third:
        assert third.status == 503
        assert "close a window" in (await third.json())["error"]
    responses[0].close()
    await until(lambda: app.admin._live.listeners == 1, "the first to be gone", 30)
    async with client.get(base(app) + "/api/live") as third:
        assert (await event(third))[0] == "status"
    responses[1].close()


async def test_who_does_not_read_is_dropped(daemon, client, monkeypatch):
    """It holds nothing back from the others meanwhile, and its place is free afterwards."""
    # More than the kernel takes for somebody who doesn't read.
    large = b": " + b"x" * 2**20 + b"\n"
    real = live.Broadcast._latest
    monkeypatch.setattr(live.Broadcast, "_latest", lambda self, now: large + real(self, now))
    monkeypatch.setattr(live, "EVERY_S", 0.05)
    monkeypatch.setattr(live, "_STUCK_S", 0.5)
    app = await daemon()
    _, writer = await asyncio.open_connection("127.0.0.1", app.admin.port, limit=1024)
    writer.write(b"GET /api/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await until(lambda: app.admin._live.listeners == 1, "the listener")
    async with aiohttp.ClientSession(read_bufsize=2**22) as session, session.get(base(app) + "/api/live") as other:
        while app.admin._live.listeners == 2:
            assert (await event(other))[0] == "status"
        assert app.admin._live.listeners == 1
        assert (await event(other))[0] == "status"
    writer.close()


async def test_a_page_elsewhere_may_not_listen(daemon, client):
    """It couldn't read a word, but it would take the places."""
    app = await daemon()
    for headers in (
        {"Origin": "http://evil.example"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        async with client.get(base(app) + "/api/live", headers=headers) as refused:
            assert refused.status == 403


async def test_the_stream_ends_with_the_session(daemon):
    """Who logs out in one window hears nothing more in the other."""
    app = await daemon(admin__token=TOKEN)
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as client:
        async with client.get(base(app) + "/api/live") as refused:
            assert refused.status == 401
        async with client.post(base(app) + "/api/login", json={"token": TOKEN}) as got:
            csrf = (await got.json())["csrf"]
        async with client.get(base(app) + "/api/live") as listening:
            assert (await event(listening))[0] == "status"
            async with client.post(base(app) + "/api/logout", json={}, headers={"X-CSRF-Token": csrf}) as got:
                assert got.status == 200
            await asyncio.wait_for(listening.content.read(), 30 * SLOW)
            assert listening.content.at_eof()


async def test_a_stop_does_not_wait_for_listeners(daemon, client):
    """The daemon ends at once, however many windows are open."""
    app = await daemon()
    response = await client.get(base(app) + "/api/live")
    assert (await event(response))[0] == "status"
    await app.admin.__aexit__(None, None, None)
    assert app.admin._live.listeners == 0
    response.close()
    # The fixture ends it once more: what was ended stays so.


async def test_no_secret_is_in_the_stream(daemon, client, emulator):
    """Mixpanel, or whoever plays it, quotes the credential in its refusal; the stream masks it like any answer."""
    app = await daemon(mixpanel__token="canary-project-3a", mixpanel__api_secret="canary-secret-7f")
    app.delivery.last_problem = "they said canary-secret-7f and canary-project-3a"
    async with client.get(base(app) + "/api/live") as response:
        _, data = await event(response)
    assert "canary" not in json.dumps(data)
    assert "********" in data["status"]["last_problem"]


# -- the charts --------------------------------------------------------------------------------------------------------


def totals(n, **changes):
    """What the parts have counted after n steps of the same."""
    steady = Totals(
        accepted=500 * n,
        delivered=400 * n,
        dead_lettered=n,
        rate_limited=2 * n,
        age_sum_s=3.0 * n,
        ages=2 * n,
        waiting=99 * n,
        latency_s=0.25,
    )
    return steady._replace(**changes)


def test_steps_of_the_hour_and_the_day():
    """Rates are per second, counts within the step; both spans are bounded however long it runs."""
    history = History(lambda: totals(0))
    for n in range(2 * STEPS * DAY_STEP):
        history.step(1000 + n * STEP_S, 5000 + n * STEP_S, totals(n))
    hour, day = history.columns("hour"), history.columns("day")
    assert (hour.step_s, day.step_s) == (STEP_S, 120)
    for columns, steps in ((hour, 1), (day, DAY_STEP)):
        assert len(columns.at) == STEPS
        assert set(columns.accepted_per_s) == {100}
        assert set(columns.delivered_per_s) == {80}
        assert set(columns.dead_lettered) == {steps}
        assert set(columns.rate_limited) == {2 * steps}
        assert set(columns.age_s) == {1.5}
        assert {b - a for a, b in zip(columns.at, columns.at[1:], strict=False)} == {columns.step_s}
    assert hour.waiting[-1] == 99 * (2 * STEPS * DAY_STEP - 1)
    late = history.columns("hour", since=hour.at[-3])
    assert (late.at, late.waiting) == (hour.at[-2:], hour.waiting[-2:])


def test_what_has_not_happened_has_no_figure():
    """No point before there is a step, no age where nothing was delivered; a replay's fall is no negative rate."""
    history = History(lambda: totals(0))
    assert history.columns("hour").at == []
    history.step(0, 0, totals(3))
    assert history.columns("hour").at == history.columns("day").waiting == []
    history.step(5, 5, totals(3, dead_lettered=0, latency_s=None))
    point = history.columns("hour")
    assert (point.dead_lettered, point.age_s, point.latency_s, point.accepted_per_s) == ([0], [None], [None], [0])


async def test_the_daemon_records(daemon, client, monkeypatch):
    """Always, and what it says agrees with the books; an odd question is told what may be asked."""
    monkeypatch.setattr("bridged.admin.history.STEP_S", 0.05)
    app = await daemon()
    await asyncio.sleep(0.2)
    async with client.post(
        f"http://{app.config.sources.http.listen}/v1/currents",
        data=msgspec.json.encode({"events": [currents(seed=n) for n in range(7)]}),
    ) as posted:
        assert posted.status == 200
    await until(lambda: app.spool.accounts.total("delivered") == 7, "the delivery")

    async def ask():
        async with client.get(base(app) + "/api/history?span=hour") as got:
            return await got.json()

    until_s = asyncio.get_running_loop().time() + 30 * SLOW
    while not any((columns := await ask())["delivered_per_s"]):
        assert asyncio.get_running_loop().time() < until_s
    assert any(columns["accepted_per_s"])
    assert [age for age in columns["age_s"] if age is not None]
    for query in ("span=year", "span=hour&x=1", "since=now", "since=nan"):
        async with client.get(f"{base(app)}/api/history?{query}") as got:
            assert got.status == 400, query


# -- what happened -----------------------------------------------------------------------------------------------------


def test_it_outlives_the_process(tmp_path):
    """Everything that was told is there for the next one, in order, with ids that go on."""
    path = tmp_path / "activity"
    first = Activity(path)
    first.open()
    first.tell("started", "one")
    first.tell("halted", "two", "critical", status=401)
    # As after a kill: nothing is closed.
    second = Activity(path)
    second.open()
    assert [(entry.id, entry.text, entry.severity) for entry in second.entries] == [
        (1, "one", "info"),
        (2, "two", "critical"),
    ]
    second.tell("resumed", "three")
    assert second.last_id == 3
    assert path.stat().st_mode & 0o777 == 0o600
    first.close()
    second.close()


def test_a_crash_costs_the_last_line_at_most(tmp_path):
    """Whatever is left of the file: each whole line is there, no other, and the next one is readable again."""
    path = tmp_path / "activity"
    activity = Activity(path)
    activity.open()
    for n in range(5):
        activity.tell("alarm_raised", f"text {n}")
    activity.close()
    whole = path.read_bytes()
    for length in range(0, len(whole) + 1, 7):
        path.write_bytes(whole[:length])
        again = Activity(path)
        again.open()
        lines = whole[:length].count(b"\n")
        assert [entry.text for entry in again.entries][:lines] == [f"text {n}" for n in range(lines)]
        assert len(again.entries) <= lines + 1
        again.tell("started", "next")
        again.close()
        third = Activity(path)
        third.open()
        third.close()
        assert third.entries[-1].text == "next"
    path.write_bytes(b"\xff\x00not json\n" + whole)
    again = Activity(path)
    again.open()
    again.close()
    assert len(again.entries) == 5


def test_it_is_bounded(tmp_path):
    """In memory and on disk, however much happens; alike ones in a row are one."""
    clock = [1000.0]
    path = tmp_path / "activity"
    activity = Activity(path, lambda: clock[0])
    activity.open()
    for n in range(10 * MAX_ENTRIES):
        activity.tell("settings", f"text {n}")
    assert len(activity.entries) == MAX_ENTRIES
    size = path.stat().st_size
    assert size < 2**20
    for _ in range(1000):
        clock[0] += 1
        activity.tell("settings", "the same")
    assert activity.entries[-1].count == 1000
    assert activity.entries[-1].last_at - activity.entries[-1].at == 999
    assert path.stat().st_size - size < 4096
    assert activity.entries[-2].text == f"text {10 * MAX_ENTRIES - 1}"
    clock[0] += TOGETHER_S
    activity.tell("settings", "the same")
    assert activity.entries[-1].count == 1
    ids = [entry.id for entry in activity.newest(MAX_ENTRIES)]
    assert ids == sorted(ids, reverse=True)
    activity.close()
    again = Activity(path)
    again.open()
    assert [entry.id for entry in again.newest(2)] == ids[:2]
    again.close()


def test_splits_push_out_nothing_else(tmp_path):
    """Each with its own words, as when a proxy's page has a number: they are one entry, with the newest words."""
    clock = [1000.0]
    path = tmp_path / "activity"
    activity = Activity(path, lambda: clock[0])
    activity.open()
    activity.tell("halted", "halted")
    for n in range(2 * MAX_ENTRIES):
        clock[0] += 0.5
        activity.tell("split", f"A request was split: {n}")
    activity.tell("resumed", "resumed")
    activity.close()
    again = Activity(path)
    again.open()

    for told in (activity, again):
        assert [entry.text for entry in told.entries] == [
            "halted",
            f"A request was split: {2 * MAX_ENTRIES - 1}",
            "resumed",
        ]
        assert told.entries[1].count == 2 * MAX_ENTRIES
    again.close()


def test_a_disk_that_takes_half_a_line(tmp_path):
    """It costs that line, and not the one after it, which would stand behind it otherwise."""
    path = tmp_path / "activity"
    activity = Activity(path)
    activity.open()
    activity.tell("settings", "one")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 40, limits[1]))
    try:
        activity.tell("settings", "two")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    activity.tell("halted", "three")
    activity.tell("resumed", "four")
    activity.close()

    again = Activity(path)
    again.open()
    assert [entry.text for entry in again.entries] == ["one", "three", "four"]
    again.close()


def test_a_disk_that_takes_nothing(tmp_path):
    """It goes on in memory."""
    activity = Activity(tmp_path / "no such folder" / "activity")
    activity.open()
    activity.tell("started", "one")
    assert [entry.text for entry in activity.entries] == ["one"]
    full = Activity("/dev/full")
    full.tell("started", "one")
    assert full.last_id == 1


async def test_what_a_daemon_tells(daemon, client, emulator, config):
    """A start, a refusal, the alarm, the resumption, the end: in order; and a start after a kill says so."""
    emulator.credentials(api_secret="right")
    app = await daemon(mixpanel__api_secret="wrong", delivery__probe_interval="50ms")
    async with client.post(
        f"http://{app.config.sources.http.listen}/v1/currents", json={"events": [currents()]}
    ) as posted:
        assert posted.status == 200
    kinds = lambda: [entry.kind for entry in app.activity.entries]  # noqa: E731
    await until(lambda: {"halted", "alarm_raised"} <= set(kinds()), "the halt and its alarm", 30)
    app.take_credentials({"api_secret": "right"})
    await until(lambda: "resumed" in kinds(), "the resumption", 30)
    assert [kind for kind in kinds() if not kind.startswith("alarm")] == ["started", "halted", "credentials", "resumed"]
    halt = next(entry for entry in app.activity.entries if entry.kind == "halted")
    assert (halt.severity, halt.detail["status"]) == ("critical", 401)
    file = Path(f"{app.config.spool.path}.activity")
    await until(lambda: '"resumed"' in file.read_text(), "the line")
    killed = Activity(file)
    killed.open()
    killed.close()
    assert [entry.text for entry in killed.entries][: len(app.activity.entries)] == [
        e.text for e in app.activity.entries
    ]


async def test_starts_and_stops(config, tmp_path):
    """An orderly end is told, and so is a start that comes after none."""
    async with App(config()) as app:
        assert app.activity.entries[-1].kind == "started"
    async with App(config()) as app:
        assert [entry.kind for entry in app.activity.entries] == ["started", "stopped", "started"]
        assert app.activity.entries[-1].severity == "info"
        file = Path(f"{app.config.spool.path}.activity")
        await until(lambda: file.read_text().count('"started"') == 2, "the line")
        await asyncio.to_thread(shutil.copy, file, tmp_path / "killed")
    await asyncio.to_thread(shutil.copy, tmp_path / "killed", f"{app.config.spool.path}.activity")
    async with App(config()) as app:
        assert "after a crash" in app.activity.entries[-1].text


async def test_activity_page_by_page(daemon, client):
    """Newest first; `next` goes on where the page ended."""
    app = await daemon()
    app.activity.tell("reloaded", "first")
    app.activity.tell("reloaded", "second")

    async def ask(query=""):
        async with client.get(f"{base(app)}/api/activity{query}") as got:
            return got.status, await got.json()

    status, page = await ask()
    texts = [entry["text"] for entry in page["activity"]]
    assert (status, texts[:2], page["next"]) == (200, ["second", "first"], None)
    assert texts[-1].startswith("bridged ")
    _, page = await ask("?limit=1")
    assert [entry["text"] for entry in page["activity"]] == ["second"]
    _, page = await ask(f"?limit=1&before={page['next']}")
    assert [entry["text"] for entry in page["activity"]] == ["first"]
    assert (await ask("?limit=x"))[0] == (await ask("?y=1"))[0] == 400
