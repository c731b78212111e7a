"""The whole way back, over real sockets: Mixpanel's webhook, the file, and a Braze that carries out what it is sent."""

import asyncio
import base64
import io
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from conftest import Daemon, until

from bridged.app import App
from bridged.cohorts.strikes import STRIKE_S
from bridged.emulator.braze import BrazeConfig, BrazeEmulator
from bridged.errors import MembershipDamaged, MembershipError

PATH = "/v1/cohorts/mixpanel"
KEY = "braze-rest-key-of-tests"
BASIC = "Basic " + base64.b64encode(b"mixpanel:webhook-password").decode()


@pytest.fixture(autouse=True)
def _no_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are merged at once."""
    monkeypatch.setattr("bridged.cohorts.membership._LINGER_S", 0.0)


@pytest.fixture
async def braze() -> AsyncIterator[BrazeEmulator]:
    """A Braze on loopback."""
    async with BrazeEmulator(BrazeConfig(port=0, rest_key=KEY)) as running:
        yield running


Importer = Callable[..., Any]


@pytest.fixture
def importer(daemon: Daemon, braze: BrazeEmulator, tmp_path: Path) -> Importer:
    """Starts daemons that import cohorts into that Braze."""

    async def start(**overrides: str) -> App:
        return await daemon(
            **{
                "cohorts__enabled": "true",
                "cohorts__password": "webhook-password",
                "cohorts__path": str(tmp_path / "cohorts.db"),
                "braze__url": braze.url,
                "braze__rest_key": KEY,
                "braze__probe_interval": "100ms",
            }
            | overrides
        )

    return start


def body(
    action: str, ids: list[str], session: str = "s1", page: int = 1, total: int = 1, **more: Any
) -> dict[str, Any]:
    """As Mixpanel documents it."""
    parameters = {
        "mixpanel_project_id": "117",
        "mixpanel_cohort_name": "Power users",
        "mixpanel_cohort_id": "777",
        "mixpanel_cohort_description": "description",
        "mixpanel_session_id": session,
        "page_info": {"total_pages": total, "page_count": page},
        "members": [{"email": f"{id_}@example.com", "mixpanel_distinct_id": id_, "first_name": "Ada"} for id_ in ids],
    }
    return {"action": action, "parameters": parameters | more}


async def post(app: App, client: aiohttp.ClientSession, sent: Any, **headers: str) -> tuple[int, Any]:
    """Posts a page as Mixpanel does."""
    assert app.http is not None
    url = f"http://127.0.0.1:{app.http.port}{PATH}"
    async with client.post(url, json=sent, headers={"Authorization": BASIC} | headers) as response:
        return response.status, await response.json()


async def synced(app: App) -> None:
    """Waits until everything that was received is known to be in Braze."""
    assert app.membership is not None
    assert app.cohort_writer is not None
    membership, writer = app.membership, app.cohort_writer
    await until(
        lambda: (
            not (membership.figures.waiting or membership.figures.due or writer.in_flight)
            and all(row.state == "synced" for row in membership.rows)
        ),
        f"the sync, which is {writer.state}: {writer.problem}",
        30,
    )


async def test_the_loop_is_closed(importer: Importer, braze: BrazeEmulator, client: aiohttp.ClientSession) -> None:
    """A full copy, diffs and a full copy again: Braze ends with exactly Mixpanel's membership, and no write is needless."""
    app = await importer()
    everybody = [f"user-{number}" for number in range(500)]
    for page in range(5):
        sent = body("members", everybody[page * 100 : page * 100 + 100], page=page + 1, total=5)
        assert await post(app, client, sent) == (200, {"action": "members", "status": "success"})
    await synced(app)
    assert braze.membership("mixpanel_cohorts") == {id_: {"Power users"} for id_ in everybody}
    points = braze.summary().points
    assert points == 500
    for action, ids in (("add_members", ["new-1", "new-2"]), ("remove_members", everybody[:3])):
        assert (await post(app, client, body(action, ids, "s2")))[0] == 200
    await synced(app)
    now = [*everybody[3:], "new-1", "new-2"]
    assert {user for user, held in braze.membership("mixpanel_cohorts").items() if held} == set(now)
    assert braze.summary().points == points + 5
    await post(app, client, body("members", now, "s3"))
    await synced(app)
    assert braze.summary().points == points + 5
    assert app.membership.figures.points_today == points + 5


async def test_all_cohorts_of_a_user_are_one_write(
    importer: Importer, braze: BrazeEmulator, client: aiohttp.ClientSession
) -> None:
    """The array is set whole; two cohorts of one name are one element."""
    app = await importer(braze__url="http://127.0.0.1:9")
    ids = ["a", "b"]
    for number, name in enumerate(["One", "Two", "Two"]):
        more = {"mixpanel_cohort_id": number, "mixpanel_cohort_name": name}
        await post(app, client, body("members", ids, f"s{number}", **more))
    await until(lambda: app.membership.figures.joining == 6)
    await app.__aexit__(None, None, None)
    again = await importer()
    await synced(again)
    assert braze.membership("mixpanel_cohorts") == {"a": {"One", "Two"}, "b": {"One", "Two"}}
    assert braze.summary().points == 2


async def test_an_outage_is_a_pause(importer: Importer, braze: BrazeEmulator, client: aiohttp.ClientSession) -> None:
    """Errors, resets, lies and silence: everything is tried again, and nothing twice at the same time."""
    braze.script(
        [
            {"status": 500, "times": 1},
            {"action": "reset", "times": 1},
            {"action": "store_then_status", "times": 1},
            {"action": "html", "times": 1},
            {"status": 429, "headers": {"X-Ratelimit-Retry-After": "1"}, "times": 1},
        ]
    )
    app = await importer()
    ids = [f"user-{number}" for number in range(200)]
    await post(app, client, body("members", ids))
    await synced(app)
    assert braze.membership("mixpanel_cohorts") == {id_: {"Power users"} for id_ in ids}
    assert braze.summary().overlaps == 0
    assert app.cohort_writer.verdicts["retry"] >= 5


async def test_a_refused_user_costs_only_itself(
    importer: Importer, braze: BrazeEmulator, client: aiohttp.ClientSession
) -> None:
    """Braze's words are kept; after a resync of the refused it is tried again."""
    braze.workspace.blocked = {"user-7", "user-8"}
    app = await importer()
    ids = [f"user-{number}" for number in range(100)]
    await post(app, client, body("members", ids))
    await until(lambda: app.membership.figures.rejected == 2 and not app.membership.figures.due)
    refusals = await app.membership.refusals()
    assert sorted((each.external_id, each.reason) for each in refusals) == [
        (id_, "provided external_id is blacklisted and disallowed") for id_ in ("user-7", "user-8")
    ]
    (row,) = app.membership.rows
    assert (row.members, row.in_braze, row.rejected) == (100, 98, 2)
    assert app.membership.figures.points_today == braze.summary().points == 98
    braze.workspace.blocked = set()
    await app.membership.resync(rejected_only=True)
    await until(lambda: app.membership.rows[0].in_braze == 100)
    assert await app.membership.refusals() == []


async def test_a_bad_key_halts_and_a_good_one_resumes(
    importer: Importer, braze: BrazeEmulator, client: aiohttp.ClientSession
) -> None:
    """Everything is kept; a probe is one user; the key works again without a restart."""
    braze.credentials(rest_key="another-key-that-is-good")
    app = await importer()
    ids = [f"user-{number}" for number in range(300)]
    await post(app, client, body("members", ids))
    writer = app.cohort_writer
    await until(lambda: writer.state == "halted", "the halt", 30)
    assert "rest_key" in writer.problem
    seen = braze.summary().requests
    await until(lambda: braze.summary().requests > seen + 2, "three probes", 30)
    assert app.membership.figures.joining == 300
    await until(lambda: app.membership.figures.points_today <= 1, "the points given back")
    braze.credentials(rest_key=KEY)
    await synced(app)
    assert writer.halted is None
    assert len(braze.membership("mixpanel_cohorts")) == 300


async def test_a_refusal_of_everybody_halts(
    importer: Importer, braze: BrazeEmulator, client: aiohttp.ClientSession
) -> None:
    """A million users aren't a million dead letters because of one wrong attribute."""
    app = await importer()
    ids = [f"user-{number}" for number in range(1000)]
    braze.script([{"status": 400, "body": {"message": "the attribute is reserved"}}])
    await post(app, client, body("members", ids))
    await until(lambda: app.cohort_writer.state == "halted", seconds=60)
    assert "reserved" in app.cohort_writer.problem
    assert app.membership.figures.rejected < 200
    braze.script([])
    # Who was refused by an answer that was under way at the halt rests for a minute.
    await until(lambda: not app.membership.figures.due, seconds=STRIKE_S + 30)
    await app.membership.resync(rejected_only=True)
    await until(lambda: app.membership.rows[0].in_braze == 1000)


async def test_one_answer_400_refuses_nobody_for_good(
    importer: Importer, braze: BrazeEmulator, client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user alone is believed to be at fault when Braze takes others, or says so twice."""
    monkeypatch.setattr("bridged.cohorts.strikes.STRIKE_S", 0.0)
    braze.script([{"status": 400, "times": 1}])
    app = await importer()
    await post(app, client, body("members", ["a"]))
    await synced(app)
    assert braze.membership("mixpanel_cohorts") == {"a": {"Power users"}}
    braze.workspace.blocked = {"b"}
    await post(app, client, body("add_members", ["b"], "s2"))
    await until(lambda: app.membership.figures.rejected == 1)


async def test_the_cap_of_a_day_is_kept_until_more_is_allowed(
    importer: Importer, braze: BrazeEmulator, client: aiohttp.ClientSession
) -> None:
    """Not one data point more."""
    app = await importer(cohorts__max_data_points_per_day="100")
    await post(app, client, body("members", [f"user-{number}" for number in range(250)]))
    await until(lambda: app.cohort_writer.state == "capped")
    assert braze.summary().points == 100
    plan = await app.membership.plan()
    assert (plan.points, plan.left_today, plan.fits) == (150, 0, False)
    await app.membership.allow(0)
    await synced(app)
    assert braze.summary().points == 250


async def test_as_a_partner(importer: Importer, braze: BrazeEmulator, client: aiohttp.ClientSession) -> None:
    """Cohorts are announced, members are told as changes, a rename is one request."""
    braze.credentials(
        partner_name="mixpanel", partner_key="partner-key-of-tests", data_import_key="import-key-of-tests"
    )
    app = await importer(braze__partner_key="partner-key-of-tests", braze__data_import_key="import-key-of-tests")
    ids = [f"user-{number}" for number in range(2500)]
    await post(app, client, body("members", ids))
    await post(app, client, body("members", ids[:10], mixpanel_cohort_id=8, mixpanel_cohort_name="Ten"))
    await synced(app)
    held = {cohort["cohort_id"]: cohort for cohort in braze.cohorts()}
    assert {id_: cohort["name"] for id_, cohort in held.items()} == {"777": "Power users", "8": "Ten"}
    assert (len(held["777"]["members"]), len(held["8"]["members"])) == (2500, 10)
    points = braze.summary().points
    assert points == 2510
    await post(app, client, body("members", ids[5:], "s2", mixpanel_cohort_name="Heavy users"))
    await synced(app)
    await until(lambda: braze.cohorts()[0]["name"] == "Heavy users" or braze.cohorts()[1]["name"] == "Heavy users")
    assert braze.summary().points == points + 5


async def test_who_is_unknown_to_braze_is_sent_once(
    importer: Importer, braze: BrazeEmulator, client: aiohttp.ClientSession
) -> None:
    """Braze takes an update for nobody: it counts as sent, and nobody is made."""
    braze.workspace.existing = {"user-1"}
    app = await importer()
    await post(app, client, body("members", ["user-1", "user-2"]))
    await synced(app)
    assert braze.membership("mixpanel_cohorts") == {"user-1": {"Power users"}}
    assert braze.summary().created == 0


async def test_what_mixpanel_is_told(importer: Importer, client: aiohttp.ClientSession) -> None:
    """True errors of the client are 400 and 401 and say what is wrong; everything else is 503 or a success."""
    app = await importer()
    bad: list[tuple[Any, str]] = [
        ({"action": "explode", "parameters": {}}, "action"),
        ({"action": "members"}, "parameters is missing"),
        ({"action": "members", "parameters": {"members": []}}, "mixpanel_cohort_id"),
        ({"action": "members", "parameters": {"mixpanel_cohort_id": "1"}}, "members is missing"),
        ([1, 2], "expected action"),
    ]
    for sent, why in bad:
        status, answer = await post(app, client, sent)
        assert (status, answer["status"], answer["error"]["code"]) == (400, "failure", 400)
        assert why in answer["error"]["message"]
    status, answer = await post(app, client, body("members", ["a"]), Authorization="Basic d3Jvbmc6d3Jvbmc=")
    assert (status, answer["status"]) == (401, "failure")
    for header in ("", "Basic", "Basic ###", "Bearer webhook-password"):
        assert (await post(app, client, body("members", ["a"]), Authorization=header))[0] == 401
    url = f"http://127.0.0.1:{app.http.port}{PATH}"
    async with client.get(url, headers={"Authorization": BASIC}) as answer:
        said = await answer.json()
        assert (answer.status, said["status"], said["error"]["code"]) == (405, "failure", 405)
        assert answer.headers["Allow"] == "POST"
    async with client.post(url, data=b"{}", headers={"Authorization": BASIC, "Content-Encoding": "br"}) as answer:
        said = await answer.json()
        assert (answer.status, said["status"]) == (415, "failure")
        assert "gzip" in said["error"]["message"]
    async with client.post(url, data=io.BytesIO(b" " * (17 * 2**20)), headers={"Authorization": BASIC}) as answer:
        assert answer.status == 413
        assert "larger than 16777216 bytes" in (await answer.json())["error"]["message"]
    assert (await post(app, client, body("add_members", [])))[0] == 200
    app.membership.options = msgspec.structs.replace(app.membership.options, max_bytes=1)
    await post(app, client, body("add_members", ["a"]))
    status, answer = await post(app, client, body("add_members", ["a"]))
    assert (status, answer["action"], answer["status"]) == (503, "add_members", "failure")
    assert "near its cap" in answer["error"]["message"]


async def test_cohorts_only(importer: Importer, braze: BrazeEmulator, client: aiohttp.ClientSession) -> None:
    """Without an export no credential of Mixpanel's is needed, and no event is taken."""
    app = await importer(mixpanel__export="false", mixpanel__token="")
    await post(app, client, body("members", ["a"]))
    await synced(app)
    assert braze.membership("mixpanel_cohorts") == {"a": {"Power users"}}
    async with client.post(f"http://127.0.0.1:{app.http.port}/v1/currents", json={"events": []}) as response:
        # After a 404 Braze would drop its events. Who looks for them here is told that there are none, and where cohorts go.
        assert (response.status, "Retry-After" in response.headers) == (503, True)
        assert "mixpanel.export is false" in (said := await response.text())
        assert PATH in said


async def test_export_only(daemon: Daemon, client: aiohttp.ClientSession) -> None:
    """Cohorts that are off are no reason for Mixpanel to pause a sync for good."""
    app = await daemon()
    assert app.membership is None
    status, answer = await post(app, client, body("members", ["a"]))
    assert (status, answer["status"]) == (503, "failure")


async def test_the_rate_limit_is_kept(importer: Importer, client: aiohttp.ClientSession) -> None:
    """What Braze says is left in its window isn't exceeded, but for the first requests, which know nothing yet."""
    async with BrazeEmulator(BrazeConfig(port=0, rest_key=KEY, max_requests=10, window_s=1.0)) as slow:
        app = await importer(braze__url=slow.url)
        ids = [f"user-{number}" for number in range(75 * 30)]
        await post(app, client, body("members", ids))
        await synced(app)
        assert len(slow.membership("mixpanel_cohorts")) == len(ids)
        assert slow.summary().answers.get("429", 0) <= 8


async def test_a_damaged_file_stops_cohorts_and_nothing_else(
    importer: Importer, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """The export goes on; Mixpanel is told to come again; without an export the process ends, for somebody to see."""
    (tmp_path / "cohorts.db").write_bytes(b"this is no database" * 1000)
    app = await importer()
    assert app.membership is None
    assert "cohorts.db" in app.cohorts_problem
    status, answer = await post(app, client, body("members", ["a"]))
    assert status == 503
    # Of the truth, not of the switch; and only to who knows the password.
    assert "not a database" in answer["error"]["message"]
    status, answer = await post(app, client, body("members", ["a"]), Authorization="Basic d3Jvbmc6d3Jvbmc=")
    assert status == 401
    assert "database" not in answer["error"]["message"]
    async with client.post(f"http://127.0.0.1:{app.http.port}/v1/currents", json={"events": []}) as response:
        assert response.status == 200
    with pytest.raises(MembershipDamaged):
        await importer(mixpanel__export="false", spool__path=str(tmp_path / "other.db"))


async def test_damage_found_while_it_runs(
    importer: Importer, braze: BrazeEmulator, client: aiohttp.ClientSession
) -> None:
    """Pages are refused from then on; nothing that was answered is lost, and the next start goes on."""
    app = await importer()
    await post(app, client, body("members", ["a"]))
    await synced(app)
    stop = asyncio.Event()
    running = asyncio.create_task(app.until(stop))
    membership = app.membership

    def fail(_db: Any) -> None:
        raise sqlite3.DatabaseError("database disk image is malformed")

    with pytest.raises(MembershipError):
        await membership._guarded(fail)
    await until(lambda: app.cohorts_problem)
    assert membership.failed
    status, answer = await post(app, client, body("members", ["b"], "s2"))
    assert status == 503
    assert "malformed" in answer["error"]["message"]
    assert not running.done()
    stop.set()
    await running
    await app.__aexit__(None, None, None)
    again = await importer()
    await post(again, client, body("members", ["b"], "s2"))
    await synced(again)
    assert {user for user, names in braze.membership("mixpanel_cohorts").items() if names} == {"b"}


async def test_files_that_are_removed_while_it_runs(
    importer: Importer, braze: BrazeEmulator, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """Cohorts end within a second or two, and say where what the file held was saved; the next start goes on from there."""
    app = await importer()
    await post(app, client, body("members", ["a", "b"]))
    await synced(app)
    stop = asyncio.Event()
    running = asyncio.create_task(app.until(stop))
    for suffix in ("", "-wal", "-shm", ".lock"):
        (tmp_path / f"cohorts.db{suffix}").unlink()
    await until(lambda: app.cohorts_problem)
    assert (
        f"removed or replaced while bridged ran; what it held was saved in {tmp_path}/cohorts.db" in app.cohorts_problem
    )
    status, _ = await post(app, client, body("members", ["c"], "s2"))
    assert status == 503
    stop.set()
    await running
    await app.__aexit__(None, None, None)
    again = await importer()
    await post(again, client, body("remove_members", ["a"], "s2"))
    await synced(again)
    assert {user for user, held in braze.membership("mixpanel_cohorts").items() if held} == {"b"}


async def test_the_day_s_points_and_the_key_can_change_while_it_runs(
    importer: Importer, braze: BrazeEmulator, client: aiohttp.ClientSession
) -> None:
    """By SIGHUP or a replaced secret file: no restart."""
    braze.credentials(rest_key="the-next-key-of-tests")
    app = await importer(cohorts__max_data_points_per_day="1", braze__probe_interval="1h")
    await post(app, client, body("members", ["a", "b"]))
    await until(lambda: app.cohort_writer.state == "halted")
    said = msgspec.structs.replace(
        app.config,
        cohorts=msgspec.structs.replace(app.config.cohorts, max_data_points_per_day=10, password="another-password"),
        braze=msgspec.structs.replace(app.config.braze, rest_key="the-next-key-of-tests"),
    )
    app.reload(lambda: said)
    assert app.reload_problem == ""
    assert app.restart_needed == []
    await synced(app)
    assert (await post(app, client, body("add_members", ["c"])))[0] == 401
