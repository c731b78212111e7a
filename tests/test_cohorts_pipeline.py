"""Cohorts from Mixpanel's webhook to Braze's answer, over real sockets and a real file: whatever comes, in whatever order, Braze
ends with Mixpanel's membership, and is told no more than the difference.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from cohort_sender import ATTRIBUTE, Sender, session
from conftest import SLOW, currents, free_port, until
from structlog.testing import capture_logs

from bridged.admin.server import AdminServer
from bridged.admin.status import Status, alarm_facts
from bridged.app import App
from bridged.cohorts import pace
from bridged.commands.status import lines
from bridged.emulator.answers import Answer
from bridged.emulator.braze import BrazeConfig, BrazeEmulator

ROOT = Path(__file__).parent.parent
USERS = [f"u{n:03}" for n in range(60)]


def sender(app: App, client: aiohttp.ClientSession) -> Sender:
    """For a daemon of this process."""
    return Sender(client, f"http://{app.config.sources.http.listen}")


async def in_step(app: App, seconds: float = 30) -> None:
    """Waits until nothing is left to do, and looks that the books balance."""

    def done() -> bool:
        assert app.membership is not None
        assert app.cohort_writer is not None
        rows, figures = app.membership.rows, app.membership.figures
        return not figures.waiting and all(row.state == "synced" for row in rows) and app.cohort_writer.state == "idle"

    await until(done, "Braze in step with Mixpanel", seconds)
    balanced(app)


def balanced(app: App) -> None:
    """The conservation laws of members."""
    assert app.membership is not None
    for row in app.membership.rows:
        assert row.members == row.in_braze + row.joining + row.rejected, row
        assert row.received == row.applied + row.no_id + row.too_long + row.stale, row
    figures = app.membership.figures
    assert figures.members == figures.in_braze + figures.joining + figures.rejected


def in_braze(braze: BrazeEmulator, name: str = "Cohort 777") -> list[str]:
    """The members of a cohort, in Braze."""
    return sorted(user for user, names in braze.membership(ATTRIBUTE).items() if name in names)


# -- the whole way -----------------------------------------------------------------------------------------------------


async def test_cohorts_become_an_array_attribute(daemon, importing, braze, client):
    """Three cohorts in several pages: each user has the names of its own, and all of them in one write."""
    app = await daemon(**importing)
    braze.script([{"delay_s": 0.5, "times": 1}])  # so that the cohorts of a user can meet
    members = {"777": USERS[:40], "778": USERS[20:], "779": USERS[::2]}
    mixpanel = sender(app, client)
    for cohort, users in members.items():
        await mixpanel.take(session("members", users, cohort, size=15))
    await in_step(app)

    wanted = {user: {f"Cohort {cohort}" for cohort, users in members.items() if user in users} for user in USERS}
    assert braze.membership(ATTRIBUTE) == wanted
    summary = braze.summary()
    assert summary.overlaps == 0
    assert summary.points == app.membership.figures.points_today
    before = summary.requests

    for cohort, users in members.items():
        await mixpanel.take(session("members", users, cohort, size=7))
    await in_step(app)
    assert braze.summary().requests == before, "a repeated full sync sends nothing"


async def test_many_cohorts_of_a_user_are_one_write(daemon, importing, braze, client):
    """What gathers while Braze can't be written goes out as one array a user, at one point each."""
    braze.script([{"status": 503}])
    app = await daemon(**importing)
    mixpanel = sender(app, client)
    for number in range(12):
        await mixpanel.take(session("members", USERS, str(number)))
    await until(lambda: app.membership.figures.joining == 12 * len(USERS), "all of it merged")
    assert braze.users() == []
    braze.script([])
    await in_step(app)
    assert all(len(names) == 12 for names in braze.membership(ATTRIBUTE).values())
    assert braze.summary().max_writes == 1
    assert braze.summary().points == len(USERS)


# -- every way that pages can come -------------------------------------------------------------------------------------


def with_page_info(page: dict[str, Any], info: Any) -> dict[str, Any]:
    """A page with another page_info; None takes it away."""
    parameters = {key: value for key, value in page["parameters"].items() if key != "page_info"}
    return page | {"parameters": parameters if info is None else parameters | {"page_info": info}}


def as_strings(page: dict[str, Any]) -> dict[str, Any]:
    """Numbers as strings, as one public consumer types them."""
    return with_page_info(page, {key: str(value) for key, value in page["parameters"]["page_info"].items()})


def with_text_for_page_info(page: dict[str, Any]) -> dict[str, Any]:
    """JSON within JSON."""
    return with_page_info(page, json.dumps(page["parameters"]["page_info"]))


def raw(page: dict[str, Any]) -> dict[str, Any]:
    """Raw property names, an extra key, and no description, as seen live."""
    parameters = {key: value for key, value in page["parameters"].items() if key != "mixpanel_cohort_description"}
    members = [
        {"$distinct_id": one["mixpanel_distinct_id"], "$email": "", "Größe, in cm.": 180, "$os": None, "plan": ["a"]}
        for one in parameters["members"]
    ]
    return page | {"parameters": parameters | {"members": members, "mixpanel_integration_id": "0"}}


A, B, C = USERS[:20], USERS[10:40], USERS[35:]
FIRST = session("members", A, size=5, id_="first")
REPLACING = session("members", B, size=7, id_="replacing")
ADD = session("add_members", C, size=9, id_="diff")
REMOVE = session("remove_members", A[:5], size=2, id_="diff")
EMPTY = session("add_members", []) + session("remove_members", [])
NUMBERS = [
    page | {"parameters": page["parameters"] | {"mixpanel_cohort_id": 777, "mixpanel_project_id": 117}}
    for page in FIRST
]

CASES: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "in order": (FIRST, A),
    "pages out of order": (FIRST[::-1], A),
    "every page twice": ([page for page in FIRST for _ in range(2)], A),
    "all of it twice": (FIRST + FIRST, A),
    "restarted from the top": (FIRST[:2] + FIRST, A),
    "restarted from the top under another session": (FIRST[:3] + session("members", A, size=6), A),
    "a new session before the old one ended": (FIRST[:3] + REPLACING, B),
    "the old session's pages come late": (FIRST[:3] + REPLACING + FIRST[3:], B),
    "the old session's pages come in between": (FIRST[:3] + REPLACING[:2] + FIRST[3:] + REPLACING[2:], B),
    "a full copy replaces": (FIRST + REPLACING, B),
    "a full copy that isn't complete takes nobody out": (FIRST + REPLACING[:-1], A + B[:-2]),
    "a repeated last page sweeps nobody": (FIRST + ADD + FIRST[-1:], A + C),
    "a repeated full copy's last page after additions": (FIRST + REPLACING + ADD + REPLACING[-1:] + FIRST[-1:], B + C),
    "an empty full copy takes everybody out": (FIRST + session("members", []), []),
    "diffs": (FIRST + ADD + REMOVE, A[5:] + C),
    "removals first": (FIRST + REMOVE[::-1] + ADD[::-1], A[5:] + C),
    "diffs twice": (FIRST + ADD + REMOVE + ADD + REMOVE, A[5:] + C),
    "empty diffs": (FIRST + EMPTY + EMPTY, A),
    "additions before any full copy": (ADD, C),
    "removals of nobody we know": (REMOVE + ADD, C),
    "additions, then the full copy": (ADD + FIRST, A),
    "numbers as strings": ([as_strings(page) for page in FIRST + REPLACING[::-1]], B),
    "ids as numbers": (NUMBERS, A),
    "no page_info": ([with_page_info(page, None) for page in session("members", A) + session("add_members", C)], A + C),
    "an empty page_info": ([with_page_info(page, {}) for page in session("members", A)], A),
    "page_info as text": ([with_text_for_page_info(page) for page in FIRST + REPLACING[::-1]], B),
    "page_info as text, of a full copy that isn't complete": (
        [with_text_for_page_info(page) for page in [*FIRST, REPLACING[0]]],
        A + B[:7],
    ),
    "a page_info that can't be read, so it isn't complete": (
        FIRST + [with_page_info(page, "1 of 1") for page in session("members", B[:7])],
        A + B[:7],
    ),
    "raw property names": ([raw(page) for page in FIRST + REPLACING], B),
    "removed and added again": (FIRST + REMOVE + session("add_members", A[:5]), A),
}


def of_cohort(page: dict[str, Any], cohort: int) -> dict[str, Any]:
    """A page of another cohort, in another session."""
    parameters, number = page["parameters"], str(cohort)
    own = {
        "mixpanel_cohort_id": cohort if isinstance(parameters["mixpanel_cohort_id"], int) else number,
        "mixpanel_cohort_name": number,
        "mixpanel_session_id": f"{number} {parameters['mixpanel_session_id']}",
    }
    return page | {"parameters": parameters | own}


async def test_braze_ends_with_mixpanels_membership(daemon, importing, braze, client):
    """Each way in which a sync may come, all of them at the same time, one cohort each: every page is answered success, the
    books balance, and Braze has who it should.
    """
    app = await daemon(**importing)
    mixpanel = sender(app, client)
    cases = dict(enumerate(CASES.items()))
    async with asyncio.TaskGroup() as syncs:
        for number, (_, (pages, _)) in cases.items():
            syncs.create_task(mixpanel.take([of_cohort(page, number) for page in pages]))
    unfinished = {str(number) for number, (name, _) in cases.items() if "isn't complete" in name}

    def done() -> bool:
        rows = {row.cohort: row for row in app.membership.rows if row.cohort not in unfinished}
        is_idle = app.cohort_writer.state == "idle" and not app.membership.figures.waiting
        return (
            is_idle
            and len(rows) == len(cases) - len(unfinished)
            and all(row.state == "synced" for row in rows.values())
        )

    await until(done, "Braze in step with Mixpanel", 60)
    balanced(app)
    found = {name: in_braze(braze, str(number)) for number, (name, _) in cases.items()}
    assert found == {name: sorted(set(wanted)) for name, (_, wanted) in CASES.items()}
    assert braze.summary().overlaps == 0


async def test_a_step_at_a_time_is_the_same_as_at_once(daemon, importing, braze, client):
    """A model of Mixpanel with a random history: repeats, restarts, any order of pages, diffs and full copies, between which
    Braze may or may not come into step.
    """
    dice = random.Random(5)
    app = await daemon(**importing)
    mixpanel = sender(app, client)
    truth: dict[str, set[str]] = {}
    for _ in range(30):
        cohort = dice.choice("789")
        members = truth.get(cohort, set())
        if cohort not in truth or dice.random() < 0.3:
            truth[cohort] = set(dice.sample(USERS, dice.randrange(len(USERS))))
            pages = session("members", sorted(truth[cohort]), cohort, size=dice.randrange(1, 40))
        else:
            joining, leaving = dice.sample(USERS, 7), dice.sample(USERS, 7)
            leaving = [user for user in leaving if user not in joining]
            truth[cohort] = members.union(joining).difference(leaving)
            pages = session("add_members", joining, cohort, size=3) + session("remove_members", leaving, cohort, size=3)
        if dice.random() < 0.3:
            await mixpanel.take(pages[: dice.randrange(len(pages))])  # and again from the top
        if dice.random() < 0.3:
            pages = sorted(pages, key=lambda page: (page["action"], dice.random()))
        await mixpanel.take([page for page in pages for _ in range(1 + (dice.random() < 0.2))])
        if dice.random() < 0.15:
            await in_step(app)
    await in_step(app)
    for cohort, members in truth.items():
        assert in_braze(braze, f"Cohort {cohort}") == sorted(members)
    assert braze.summary().overlaps == 0


async def test_a_renamed_cohort_is_renamed_in_braze(daemon, importing, braze, client):
    """Braze knows a cohort by its name: the new one replaces the old one for every member."""
    app = await daemon(**importing)
    mixpanel = sender(app, client)
    await mixpanel.take(session("members", A, name="Old name"))
    await in_step(app)
    await mixpanel.take(session("add_members", C, name="New name"))
    await in_step(app)
    assert in_braze(braze, "Old name") == []
    assert in_braze(braze, "New name") == sorted({*A, *C})


OTHER_TARGETS = {
    "another attribute": {"cohorts__attribute": "other"},
    "a partner's endpoints": {
        "braze__partner_name": "example",
        "braze__partner_key": "p",
        "braze__data_import_key": "d",
    },
}


@pytest.mark.parametrize("target", OTHER_TARGETS.values(), ids=OTHER_TARGETS)
async def test_back_at_an_earlier_target_who_left_meanwhile_is_taken_out(daemon, importing, braze, client, target):
    """Braze has them there still, and nobody else would ever take them out. They cost a point each, as those who stay do."""
    for overrides, pages, wanted in (
        ({}, session("members", A), A),
        (target, session("remove_members", A[:5]) + session("add_members", C), [*A[5:], *C]),
        ({}, [], [*A[5:], *C]),
    ):
        app = await daemon(**importing | overrides)
        await sender(app, client).take(pages)
        await in_step(app)
        assert app.membership.figures.in_braze == len(wanted)
        await app.__aexit__(None, None, None)
    assert in_braze(braze) == sorted(wanted)
    assert app.cohort_writer.points_spent == len({*A, *C})


async def test_members_without_a_usable_id_are_counted(daemon, importing, braze, client):
    """No id, a device's id, one that is too long: left out, each counted; the others are in Braze."""
    app = await daemon(**importing | {"cohorts__user_id": "$braze_external_id"})
    [page] = session("members", [])
    page["parameters"]["members"] = [
        {"mixpanel_distinct_id": "x", "$braze_external_id": "ada"},
        {"mixpanel_distinct_id": "y", "braze_external_id": "bo"},
        {"mixpanel_distinct_id": "z"},
        {"$braze_external_id": "$device:123"},
        {"$braze_external_id": "a" * 988},
    ]
    await sender(app, client).take([page])
    await in_step(app)
    assert in_braze(braze) == ["ada", "bo"]
    [row] = app.membership.rows
    assert (row.received, row.applied, row.no_id, row.too_long) == (5, 2, 2, 1)


# -- Braze's troubles --------------------------------------------------------------------------------------------------


async def test_every_trouble_of_braze_ends_in_step(daemon, importing, braze, client):
    """Over the limit, overloaded, silent, lying, broken off, a portal, a 400 for all: it comes again, or is narrowed down."""
    app = await daemon(**importing | {"braze__timeout": "1s"})
    troubles: list[dict[str, Any]] = [
        # At first: Braze's word about a single user would be a refusal, and after a failure requests are small.
        {"status": 400},
        {"status": 413},
        {"status": 429, "headers": {"X-Ratelimit-Retry-After": "1"}},
        {"status": 503},
        {"action": "reset"},
        {"action": "reset_after_store"},
        {"action": "hang"},
        {"action": "store_then_status"},
        {"action": "truncate"},
        {"action": "html"},
    ]
    # With successes in between: it is not an outage, whose pauses grow.
    braze.script([{"times": 1, "after": 2 * at} | trouble for at, trouble in enumerate(troubles)])
    many = [f"m{n:04}" for n in range(2000)]
    await sender(app, client).take(session("members", many) + session("remove_members", many[:500]))
    await in_step(app, 60)
    assert in_braze(braze) == many[500:]
    assert braze.summary().faults == len(troubles)
    assert braze.summary().overlaps == 0
    assert app.membership.figures.points_today >= braze.summary().points, "the count is never below the bill"


async def test_a_user_that_braze_refuses_is_kept_with_its_words(daemon, importing, client):
    """The others go on; the refusal can be read, and is tried again when a person says so."""
    async with BrazeEmulator(BrazeConfig(port=0, blocked=["u003", "u007"])) as braze:
        app = await daemon(**importing | {"braze__url": braze.url})
        await sender(app, client).take(session("members", USERS))
        await in_step(app)
        assert in_braze(braze) == [user for user in USERS if user not in {"u003", "u007"}]
        refusals = await app.membership.refusals()
        assert [refusal.external_id for refusal in refusals] == ["u003", "u007"]
        assert all("blacklisted" in refusal.reason for refusal in refusals)
        assert app.membership.figures.rejected == 2
        points = braze.summary().points
        braze.workspace.blocked = set()
        assert await app.membership.resync(rejected_only=True) == 2
        await until(lambda: app.membership.figures.rejected == 0, "those two again", 30)
        await in_step(app)
        assert in_braze(braze) == USERS
        assert braze.summary().points == points + 2
        assert await app.membership.refusals() == []


async def test_users_that_braze_does_not_know_come_to_nothing(daemon, importing, client):
    """Nobody is created by default; with update_existing_only off everybody is."""
    async with BrazeEmulator(BrazeConfig(port=0, users=USERS[:10])) as braze:
        app = await daemon(**importing | {"braze__url": braze.url})
        await sender(app, client).take(session("members", A))
        await in_step(app)
        assert in_braze(braze) == USERS[:10]
        assert braze.summary().created == 0
    async with BrazeEmulator(BrazeConfig(port=0, users=USERS[:10])) as braze:
        other = {"braze__url": braze.url, "cohorts__update_existing_only": "false"}
        other |= {"spool__path": "other.db", "cohorts__path": "other-cohorts.db", "sources__stream__listen": "[]"}
        app = await daemon(**importing | other)
        await sender(app, client).take(session("members", A))
        await in_step(app)
        assert in_braze(braze) == sorted(A)
        assert braze.summary().created == 10


async def test_users_that_braze_does_not_count_are_told_beside_a_refused_one(daemon, importing, braze, client):
    """Three are sent, one is refused, one is counted: the third is probably unknown, as where nobody is refused."""
    errors = [{"type": "bad", "input_array": "attributes", "index": 0}]
    said = {"message": "success", "attributes_processed": 1, "errors": errors}
    braze.script([{"action": "store_then_status", "status": 201, "body": said, "times": 1}])
    app = await daemon(**importing)
    await sender(app, client).take(session("members", USERS[:3]))
    await in_step(app)
    assert app.membership.figures.rejected == 1
    assert app.cohort_writer.unknown_users == 1


async def test_a_bad_key_halts_and_a_good_one_resumes(daemon, importing, braze, client):
    """From the first 401 on nothing is lost: pages are still taken, the alarm is raised, and the next good probe goes on."""
    app = await daemon(**importing | {"braze__probe_interval": "200ms"})
    mixpanel = sender(app, client)
    await mixpanel.take(FIRST)
    await in_step(app)
    braze.credentials(rest_key="another")
    await mixpanel.take(ADD)
    await until(lambda: app.cohort_writer.state == "halted", "the halt", 30)
    refused = braze.summary().answers["401"]
    await mixpanel.take(REMOVE)
    await until(lambda: not app.membership.figures.waiting, "what came meanwhile")
    async with client.get(f"http://127.0.0.1:{app.admin.port}/api/status") as answer:
        status = await answer.json()
    assert status["cohorts"]["writer"]["state"] == "halted"
    assert "rest_key" in status["cohorts"]["sentence"]
    await until(lambda: "cohorts_halted" in {one.alarm for one in app.watch.alarms.open}, "the alarm", 30)
    assert in_braze(braze) == sorted(A)
    assert braze.summary().answers["401"] - refused < 200, "a halt is no storm"
    braze.credentials(rest_key="example-rest-key")
    await in_step(app, 90)
    assert in_braze(braze) == sorted({*A[5:], *C})
    assert app.cohort_writer.halted is None


async def test_a_braze_that_cannot_be_reached_for_long_is_an_alarm(daemon, importing, braze, client):
    """As long as events may wait for a success: nobody would know otherwise, since what never leaves spends no points."""
    app = await daemon(**importing | {"braze__url": f"http://127.0.0.1:{free_port()}", "alerts__undelivered": "1s"})
    await sender(app, client).take(FIRST)
    await until(lambda: "cohorts_halted" in {one.alarm for one in app.watch.alarms.open}, "the alarm", 60)
    assert any("Backing off" in one.text for one in app.watch.alarms.open)


class IllNowAndThen:
    """For `fake_braze`: while it is ill it says so to everybody."""

    def __init__(self, status, said):
        self.is_now = False
        self.asked = 0
        self._said = status, said

    async def answer(self, _ids):
        self.asked += 1
        return self._said if self.is_now else None


@contextlib.asynccontextmanager
async def fake_braze(answer):
    """A Braze that answers `answer(ids)`: a status and a body, or None for a success. Gives its address and whom it took."""
    taken: list[str] = []

    async def track(request):
        ids = [user["external_id"] for user in (await request.json())["attributes"]]
        refusal = await answer(ids)
        if refusal is not None:
            return web.Response(status=refusal[0], text=refusal[1], content_type="text/html")
        taken.extend(ids)
        return web.json_response({"message": "success", "attributes_processed": len(ids)}, status=201)

    app = web.Application()
    app.router.add_post("/users/track", track)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", taken
    finally:
        await runner.cleanup()


@pytest.fixture
def _soon(monkeypatch):
    """The backoff's unit is a second, here a hundredth; and what fails may do so often within a minute."""
    monkeypatch.setattr(pace, "_FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(pace, "_MAX_BACKOFF_S", 0.05)
    monkeypatch.setattr("bridged.cohorts.strikes.STRIKE_S", 0.0)


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize("status", [403, 500])
async def test_a_user_at_whom_braze_fails_stops_nobody_else(daemon, importing, client, status):
    """A failure of Braze's, or of a firewall before it, for what is in a request: the others are written at little more than
    their price, and the one is set aside when others were taken again and again and it wasn't.
    """

    async def answer(ids):
        return (status, "<h1>no</h1>") if "u030" in ids else None

    async with fake_braze(answer) as (url, taken):
        app = await daemon(**importing | {"braze__url": url, "braze__probe_interval": "100ms"})
        mixpanel = sender(app, client)
        await mixpanel.take(session("members", USERS))
        await until(lambda: set(taken) == set(USERS) - {"u030"}, "the others", 20)
        assert app.membership.figures.points_today < 3 * len(USERS)
        for late in range(8):
            await mixpanel.take(session("add_members", [f"late{late}"], id_=f"late{late}"))
            await until(lambda late=late: f"late{late}" in taken, "one more", 20)
        await until(lambda: app.membership.figures.rejected == 1, "the end of it", 20)
        [refusal] = await app.membership.refusals()
        assert refusal.external_id == "u030"
        assert str(status) in refusal.reason
        await until(lambda: app.cohort_writer.state == "idle", "nothing left to do", 20)
        assert sorted(taken) == sorted([*(set(USERS) - {"u030"}), *(f"late{late}" for late in range(8))])


@pytest.mark.usefixtures("_soon")
async def test_a_400_of_somebody_else_refuses_nobody(daemon, importing, client):
    """What a load balancer says that is ill for a while, in HTML, isn't Braze's word about a user."""
    ill = IllNowAndThen(400, "<h1>Bad Request</h1>")
    async with fake_braze(ill.answer) as (url, taken):
        app = await daemon(**importing | {"braze__url": url})
        mixpanel = sender(app, client)
        await mixpanel.take(session("members", USERS[:1]))
        await until(lambda: taken, "the first")
        ill.is_now = True
        await mixpanel.take(session("members", USERS))
        await until(lambda: ill.asked > 12, "its illness")
        ill.is_now = False
        await in_step(app)
        assert app.membership.figures.rejected == 0
        assert sorted(taken) == USERS


@pytest.mark.usefixtures("_soon")
async def test_a_request_that_is_too_much_for_a_while_becomes_smaller(daemon, importing, client):
    """Where only small requests are answered in time, small ones are sent: not one user, and then again as many as ever."""

    async def answer(ids):
        if len(ids) > 10:
            await asyncio.sleep(5)

    async with fake_braze(answer) as (url, taken):
        app = await daemon(**importing | {"braze__url": url, "braze__timeout": "500ms"})
        await sender(app, client).take(session("members", USERS))
        await in_step(app)
        assert sorted(set(taken)) == USERS
        assert app.cohort_writer.verdicts["retry"] <= 6
        assert app.membership.figures.points_today <= 4 * len(USERS)


@pytest.mark.usefixtures("_soon")
async def test_an_error_that_names_nobody_may_have_been_carried_out(daemon, importing, braze, client):
    """Braze took all of them, and then says of nobody that he is wrong: they are asked for again and counted again, and who
    leaves meanwhile is taken out.
    """
    said = {"message": "success", "errors": ["minor error"], "attributes_processed": len(USERS) - 1}
    lie = {"action": "store_then_status", "status": 201, "body": said, "times": 1}
    braze.script([lie, {"status": 503}])
    app = await daemon(**importing)
    mixpanel = sender(app, client)
    await mixpanel.take(session("members", USERS))
    await until(lambda: app.cohort_writer.verdicts["retry"], "the outage")
    assert in_braze(braze) == USERS
    assert app.membership.figures.points_today >= braze.summary().points
    await mixpanel.take(session("remove_members", USERS))
    await until(lambda: not app.membership.figures.waiting and not app.membership.figures.joining, "their leaving")
    braze.script([])
    await in_step(app)
    assert in_braze(braze) == []
    assert app.membership.figures.points_today >= braze.summary().points


async def test_one_failure_does_not_wait_for_the_window_of_the_rate_limit(daemon, importing, braze, client):
    """Braze tells the end of the window with every answer, and with a 503 too: only a 429 means that it must be waited for."""
    headers = {"X-RateLimit-Limit": "250000", "X-RateLimit-Remaining": "249000", "X-RateLimit-Reset": "9999999999"}
    braze.script([{"status": 503, "headers": headers, "times": 1}])
    app = await daemon(**importing)
    await sender(app, client).take(session("members", USERS))
    await in_step(app, 10)


async def test_a_rate_limit_that_is_used_up_for_long_is_said(daemon, importing, braze, client):
    """Nothing failed, and nothing goes: that isn't sending."""
    headers = {"X-RateLimit-Limit": "1000", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "9999999999"}
    said = {"message": "success", "attributes_processed": 5}
    braze.script([{"action": "store_then_status", "status": 201, "body": said, "headers": headers}])
    app = await daemon(**importing)
    mixpanel = sender(app, client)
    await mixpanel.take(session("members", USERS[:5]))
    await until(lambda: app.membership.figures.in_braze == 5, "the first")
    await until(lambda: app.cohort_writer.state == "idle", "its end")
    await mixpanel.take(session("add_members", USERS[5:]))
    await until(lambda: app.cohort_writer.state == "backing off", "its being said")
    assert "rate limit" in app.cohort_writer.problem


async def test_a_refused_user_is_no_reason_for_backing_off(daemon, importing, braze, client):
    """The same answer refuses somebody and uses up the rate limit: it is for that that nothing goes."""
    headers = {"X-RateLimit-Limit": "1000", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "9999999999"}
    errors = [{"type": "this one user is odd", "input_array": "attributes", "index": 0}]
    said = {"message": "success", "attributes_processed": 4, "errors": errors}
    braze.script([{"action": "store_then_status", "status": 201, "body": said, "headers": headers}])
    app = await daemon(**importing)
    mixpanel = sender(app, client)
    await mixpanel.take(session("members", USERS[:5]))
    await until(lambda: app.membership.figures.rejected == 1, "the first")
    await mixpanel.take(session("add_members", USERS[5:]))
    await until(lambda: app.cohort_writer.state == "backing off", "its being said")
    assert "rate limit" in app.cohort_writer.problem
    [refusal] = await app.membership.refusals()
    assert "odd" in refusal.reason


@pytest.mark.usefixtures("_soon")
async def test_a_bad_user_alone_keeps_no_halt_up(daemon, importing, braze, client):
    """The key is good again, and the only user that is due is one whom Braze refuses: its words about him end the halt."""
    app = await daemon(**importing | {"braze__probe_interval": "100ms"})
    mixpanel = sender(app, client)
    await mixpanel.take(session("members", USERS[:5]))
    await in_step(app)
    braze.workspace.blocked = {"bad"}
    braze.credentials(rest_key="another-good-key-now")
    await mixpanel.take(session("add_members", ["bad"]))
    await until(lambda: app.cohort_writer.state == "halted", "the halt")
    braze.credentials(rest_key="example-rest-key")
    await in_step(app)
    assert app.membership.figures.rejected == 1


@pytest.mark.usefixtures("_soon")
async def test_a_second_of_refusals_rejects_nobody(daemon, importing, client):
    """JSON or not: what passes within a minute isn't about the users, whom Braze was still taking a moment before."""
    ill = IllNowAndThen(400, '{"message": "Bad Request"}')
    async with fake_braze(ill.answer) as (url, taken):
        app = await daemon(**importing | {"braze__url": url, "braze__probe_interval": "100ms"})
        mixpanel = sender(app, client)
        await mixpanel.take(session("members", USERS[:1]))
        await until(lambda: taken, "the first")
        ill.is_now = True
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bridged.cohorts.strikes.STRIKE_S", 1.0)
            await mixpanel.take(session("members", USERS))
            await until(lambda: ill.asked > 12, "its illness")
            ill.is_now = False
            await in_step(app)
        assert app.membership.figures.rejected == 0
        assert sorted(taken) == USERS


@pytest.mark.usefixtures("_soon")
async def test_some_that_braze_refuses_are_set_aside_though_nobody_else_is_due(daemon, importing, client):
    """Thirty, twice: they are no sixty, and it isn't everybody. A halt would keep the next user waiting behind all of them."""
    refused = USERS[:30]
    async with BrazeEmulator(BrazeConfig(port=0, blocked=refused)) as braze:
        app = await daemon(**importing | {"braze__url": braze.url})
        mixpanel = sender(app, client)
        await mixpanel.take(session("members", refused))
        await until(lambda: app.membership.figures.rejected == 30, "their being set aside")
        assert app.cohort_writer.halted is None
        await mixpanel.take(session("add_members", USERS[30:]))
        await in_step(app)
        assert in_braze(braze) == USERS[30:]


async def test_what_is_looked_at_before_the_doors_are_open_is_there(daemon, importing, monkeypatch):
    """The alarms look from the first second on, and whoever opens the page while a long backlog is read: both met an error."""
    facts = []
    real = AdminServer.__aenter__

    async def entered(self):
        facts.append(alarm_facts(self._app))
        return await real(self)

    monkeypatch.setattr(AdminServer, "__aenter__", entered)
    await daemon(**importing)
    assert [each.cohorts_halted for each in facts] == [""]


# -- data points -------------------------------------------------------------------------------------------------------


async def test_the_cap_of_data_points_is_kept_until_more_is_allowed(daemon, importing, braze, client):
    """Not a point more than the day's cap; what is allowed beyond it is spent, and no more."""
    app = await daemon(**importing | {"cohorts__max_data_points_per_day": "25"})
    await sender(app, client).take(session("members", USERS))
    await until(lambda: app.cohort_writer.state == "capped" and not app.cohort_writer.in_flight, "the cap", 30)
    assert braze.summary().points <= 25
    plan = await app.membership.plan()
    assert not plan.fits
    assert plan.spent_today == braze.summary().points
    assert plan.users == len(USERS) - plan.spent_today
    await app.membership.allow(10)
    await until(
        lambda: app.cohort_writer.state == "capped" and app.membership.figures.points_today == 35, "ten more", 30
    )
    await app.membership.allow(0)
    await in_step(app)
    assert in_braze(braze) == USERS
    assert braze.summary().points == len(USERS)


async def test_what_never_left_costs_no_data_points(daemon, importing, client):
    """While nobody listens at Braze's address the day's points are kept for when somebody does."""
    port = free_port()
    limits = {"cohorts__max_data_points_per_day": "2", "braze__url": f"http://127.0.0.1:{port}"}
    app = await daemon(**importing | limits)
    await sender(app, client).take(session("members", USERS[:2]))
    await until(
        lambda: app.cohort_writer.requests >= 3 and not app.cohort_writer.in_flight, "three refused connections"
    )
    assert app.membership.figures.points_today == 0
    assert app.cohort_writer.state == "backing off"
    async with BrazeEmulator(BrazeConfig(port=port, rest_key="example-rest-key")) as braze:
        await in_step(app)
        assert in_braze(braze) == USERS[:2]
        assert braze.summary().points == app.membership.figures.points_today == 2


async def test_points_that_failures_have_spent_are_an_alarm(daemon, importing, braze, client):
    """What Braze may have carried out counts: when that was all of the day's, the import is capped, and no longer backing off."""
    braze.script([{"status": 503}])
    app = await daemon(**importing | {"cohorts__max_data_points_per_day": "2"})
    await sender(app, client).take(session("members", USERS[:2]))
    await until(lambda: app.cohort_writer.state == "capped", "the cap")
    await until(lambda: "cohorts_capped" in {one.alarm for one in app.watch.alarms.open}, "the alarm", 30)
    braze.script([])
    await app.membership.allow(0)
    await in_step(app)
    assert in_braze(braze) == USERS[:2]


# -- as a partner ------------------------------------------------------------------------------------------------------

PARTNER = {"partner_name": "example", "partner_key": "example-partner-key", "data_import_key": "example-import-key"}


async def test_as_a_partner_cohorts_are_cohorts(daemon, importing, client):
    """With a partner key: announced before their first member, changes only, renamed by name alone, 423 waited for."""
    async with BrazeEmulator(BrazeConfig(port=0, **PARTNER)) as braze:
        keys = {f"braze__{name}": value for name, value in PARTNER.items()}
        app = await daemon(**importing | keys | {"braze__url": braze.url, "braze__rest_key": ""})
        mixpanel = sender(app, client)
        braze.script([{"path": "/partners/example/cohorts/users", "status": 423, "times": 2}])
        await mixpanel.take(FIRST + ADD + REMOVE)
        await in_step(app, 60)
        [cohort] = braze.cohorts()
        assert cohort["name"] == "Cohort 777"
        assert cohort["members"] == sorted({*A[5:], *C})
        points = braze.summary().points
        await mixpanel.take(session("add_members", ["zoe"], name="New name"))
        await in_step(app)
        [cohort] = braze.cohorts()
        assert cohort["name"] == "New name"
        assert "zoe" in cohort["members"]
        assert braze.summary().points == points + 1


async def test_a_partner_s_key_that_is_refused_at_a_cohort_s_name_halts(daemon, importing, client):
    """The first request of a partner names a cohort: a refused key is a halt there, too, and ends with the right key."""
    async with BrazeEmulator(BrazeConfig(port=0, **PARTNER)) as braze:
        keys = {f"braze__{name}": value for name, value in PARTNER.items()}
        braze.credentials(partner_key="another")
        app = await daemon(
            **importing | keys | {"braze__url": braze.url, "braze__rest_key": "", "braze__probe_interval": "200ms"}
        )
        await sender(app, client).take(FIRST)
        await until(lambda: app.cohort_writer.state == "halted", "the halt", 30)
        assert "partner_key" in app.cohort_writer.problem
        braze.credentials(partner_key=PARTNER["partner_key"])
        await in_step(app, 60)
        assert app.cohort_writer.halted is None


@pytest.mark.usefixtures("_soon")
async def test_a_cohort_that_braze_locks_or_refuses_keeps_no_other_back(daemon, importing, client):
    """Its name may be locked, or no name to Braze; its members may be locked for long, which is nothing about them."""
    async with BrazeEmulator(BrazeConfig(port=0, partner_window_s=0.2, **PARTNER)) as braze:
        keys = {f"braze__{name}": value for name, value in PARTNER.items()}
        app = await daemon(
            **importing | keys | {"braze__url": braze.url, "braze__rest_key": "", "braze__probe_interval": "200ms"}
        )
        mixpanel, workspace, name = sender(app, client), braze.workspace, braze.workspace._name

        def members() -> dict[str, int]:
            return {cohort["cohort_id"]: len(cohort["members"]) for cohort in braze.cohorts()}

        workspace.locked = {"777"}
        await mixpanel.take(session("members", USERS[:3], "777") + session("members", USERS[3:6], "778"))
        await until(lambda: members() == {"778": 3}, "the other one")
        workspace.locked = set()
        await in_step(app)
        assert members() == {"777": 3, "778": 3}

        # A name that is refused: a halt only when nothing else is left to do.
        workspace._name = lambda id_, body: name(id_, body | ({"name": ""} if id_ == "779" else {}))
        await mixpanel.take(session("members", USERS[:3], "779") + session("members", USERS[:3], "780"))
        await until(lambda: members().get("780") == 3 and app.cohort_writer.state == "halted", "the other one, a halt")
        assert "Cohort 779" in app.cohort_writer.problem
        workspace._name = name
        await in_step(app)

        workspace.locked = {"777"}
        await mixpanel.take(session("add_members", USERS[10:12], "777"))
        for late in range(8):
            await mixpanel.take(session("add_members", [f"late{late}"], "778"))
            await until(lambda late=late: members()["778"] == 4 + late, "one more")
        assert app.membership.figures.rejected == 0
        workspace.locked = set()
        await in_step(app)
        assert members() == {"777": 5, "778": 11, "779": 3, "780": 3}


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize("status", [403, 500])
async def test_a_cohort_at_whose_name_braze_fails_keeps_no_other_back(daemon, importing, client, monkeypatch, status):
    """A failure of Braze's, or of a firewall before it, at one name whenever it is told: the others are written all the same,
    also when it is told again; it is when it is taken.
    """
    monkeypatch.setattr("bridged.cohorts.strikes.STRIKE_S", 0.2)
    async with BrazeEmulator(BrazeConfig(port=0, **PARTNER)) as braze:
        keys = {f"braze__{name}": value for name, value in PARTNER.items()}
        app = await daemon(
            **importing | keys | {"braze__url": braze.url, "braze__rest_key": "", "braze__probe_interval": "100ms"}
        )
        mixpanel, workspace, name = sender(app, client), braze.workspace, braze.workspace._name
        told = 0

        def fails(id_: str, body: dict[str, Any]) -> Answer:
            nonlocal told
            told += id_ == "777"
            return Answer(status=status, body=b"<h1>no</h1>") if id_ == "777" else name(id_, body)

        def members() -> dict[str, int]:
            return {cohort["cohort_id"]: len(cohort["members"]) for cohort in braze.cohorts()}

        workspace._name = fails
        await mixpanel.take(session("members", USERS[:3], "777") + session("members", USERS[3:6], "778"))
        await until(lambda: members() == {"778": 3}, "the other one")
        late = 0
        while told < 4:
            await mixpanel.take(session("add_members", [f"late{late}"], "778"))
            late += 1
            await until(lambda late=late: members() == {"778": 3 + late}, "one more")
        await mixpanel.take(session("members", USERS[6:8], "779"))
        await until(lambda: members().get("779") == 2, "a new one")
        assert app.membership.figures.rejected == 0
        workspace._name = name
        await in_step(app)
        assert members() == {"777": 3, "778": 3 + late, "779": 2}


@pytest.mark.usefixtures("_soon")
async def test_after_a_halt_what_is_sent_is_what_is_wanted_then(daemon, importing, client):
    """What was taken and hadn't left when the key was refused goes back: who has left Mixpanel meanwhile doesn't join."""
    async with BrazeEmulator(BrazeConfig(port=0, **PARTNER)) as braze:
        keys = {f"braze__{name}": value for name, value in PARTNER.items()}
        app = await daemon(
            **importing | keys | {"braze__url": braze.url, "braze__rest_key": "", "cohorts__max_concurrency": "1"}
        )
        mixpanel = sender(app, client)
        braze.script([{"path": "/partners/example/cohorts", "status": 503}])
        for cohort in range(10):
            await mixpanel.take(session("members", USERS[:5], str(cohort)))
        await until(lambda: app.membership.figures.joining == 50, "all of it merged")
        braze.script([{"path": "/partners/example/cohorts/users", "status": 401, "after": 2}])
        await until(lambda: app.cohort_writer.state == "halted", "the halt", 30)
        joined = braze.summary().points
        for cohort in range(10):
            await mixpanel.take(session("remove_members", USERS[:5], str(cohort)))
        await until(lambda: not app.membership.figures.waiting, "their leaving")
        braze.script([])
        app.cohort_writer.credentials_changed()
        await in_step(app)
        assert [cohort["members"] for cohort in braze.cohorts() if cohort["members"]] == []
        assert braze.summary().points == 2 * joined, "who had joined has left, and nobody else was told of"


# -- who may ask, and who is there -------------------------------------------------------------------------------------


async def test_a_refused_page_is_in_the_log_and_in_the_status(daemon, importing, client):
    """Mixpanel pauses a sync that is refused: whoever looks here finds out why. A storm of them is a line a minute."""
    app = await daemon(**importing)
    mixpanel = sender(app, client)
    with capture_logs() as logs:
        for _ in range(3):
            assert (await mixpanel.post({"action": "members", "parameters": {"mixpanel_cohort_id": "7"}}))[0] == 400
        assert (await Sender(client, mixpanel.url, "wrong").post(session("members", [])[0]))[0] == 401
    found = [line for line in logs if line["event"] == "cohort_page_refused"]
    assert [line["status"] for line in found] == [400, 401]
    assert "members is missing" in found[0]["reason"]
    async with client.get(f"http://127.0.0.1:{app.admin.port}/api/cohorts") as answer:
        refused = (await answer.json())["page_refused"]
    assert refused["status"] == 401
    assert "user name and password" in refused["reason"]


async def test_only_mixpanel_may_send(daemon, importing, braze, client):
    """A wrong password and none are 401, and what can't be a page is 400 with what is wrong; nothing of it counts."""
    app = await daemon(**importing)
    url = f"http://{app.config.sources.http.listen}"
    for password in ("wrong", "", "example-passwor\u00e9"):
        status, said = await Sender(client, url, password).post(FIRST[0])
        assert (status, said["status"]) == (401, "failure")
    async with client.post(url + "/v1/cohorts/mixpanel", json=FIRST[0]) as answer:
        assert answer.status == 401
    for body, word in ((b"{", "JSON"), ({"action": "destroy"}, "action"), ({"action": "members"}, "parameters")):
        status, said = await sender(app, client).post(body)
        assert (status, said["status"]) == (400, "failure")
        assert word in said["error"]["message"]
    assert app.membership.figures.pages == 0
    assert braze.summary().requests == 0


async def status_of(client: aiohttp.ClientSession, app: App, path: str, body: Any) -> int:
    """What a path of the HTTP door says to a POST."""
    async with client.post(f"http://{app.config.sources.http.listen}{path}", json=body) as answer:
        return answer.status


async def test_profile_cohorts_only(daemon, importing, braze, emulator, client):
    """No credential of Mixpanel's is needed, no event is taken, Mixpanel hears nothing; cohorts go their way."""
    app = await daemon(**importing | {"mixpanel__export": "false", "mixpanel__token": ""})
    assert await status_of(client, app, "/v1/currents", {"events": [currents()]}) == 503
    await sender(app, client).take(FIRST)
    await in_step(app)
    assert in_braze(braze) == sorted(A)
    assert emulator.summary().requests == 0
    async with client.get(f"http://127.0.0.1:{app.admin.port}/readyz") as answer:
        assert answer.status == 200
    async with client.get(f"http://127.0.0.1:{app.admin.port}/api/status") as answer:
        said = await answer.json()
        assert said["stream"] is None  # it is closed, whatever its key says
    assert (said["export"], said["state"], said["reload"]["credential"]) == (False, "idle", "none")
    in_words = "Cohorts only (mixpanel.export is false). In step: "
    assert said["sentence"].startswith(in_words)
    output = "\n".join(lines(msgspec.convert(said, Status, strict=False)))
    assert output.startswith(in_words)
    assert "credential    none; not in use: no events are exported, mixpanel.export is false\n" in output
    async with client.get(f"http://127.0.0.1:{app.admin.port}/api/connection") as answer:
        said = await answer.json()
    assert (said["export"], said["credential"], said["warnings"]) == (False, "none", [])
    braze.credentials(rest_key="another")
    await sender(app, client).take(session("members", ["new"], "779"))
    await until(lambda: app.cohort_writer.state == "halted", "the halt", 30)
    async with client.get(f"http://127.0.0.1:{app.admin.port}/api/status") as answer:
        said = await answer.json()
    assert (said["state"], "Halted: 401" in said["sentence"], said["halted"]) == ("halted", True, None)


async def test_what_waits_while_the_export_is_off(daemon, importing, emulator, client):
    """It is no reason for an alarm; and what would only add to it, or promise a delivery, is refused in words."""
    emulator.credentials(token="another")
    app = await daemon(**importing)
    assert await status_of(client, app, "/v1/currents", {"events": [currents()]}) == 200
    await app.__aexit__(None, None, None)
    app = await daemon(**importing | {"mixpanel__export": "false"})
    admin = f"http://127.0.0.1:{app.admin.port}"

    assert app.backlog.events == 1
    facts = alarm_facts(app)
    assert (facts.undelivered_s, facts.stalled) == (0.0, "")
    async with client.get(f"{admin}/api/status") as answer:
        said = await answer.json()
        assert (said["state"], "mixpanel.export" in said["sentence"], "1 waiting" in said["sentence"]) == (
            "idle",
            True,
            True,
        )
    for path, body in (
        ("events/test", {}),
        ("replay", {"events": []}),
        ("dead-letters/replay", {"all": True}),
    ):
        async with client.post(f"{admin}/api/{path}", json=body) as answer:
            assert (answer.status, "mixpanel.export" in (await answer.json())["error"]) == (409, True), path


async def test_profile_export_only(daemon, emulator, client, tmp_path):
    """Without [cohorts] there is no file, no endpoint, no metric of it; a page that comes is kept by Mixpanel (503)."""
    app = await daemon()
    assert await status_of(client, app, "/v1/cohorts/mixpanel", FIRST[0]) == 503
    assert await status_of(client, app, "/v1/currents", {"events": [currents()]}) == 200
    await until(lambda: emulator.summary().stored == 1, "the event", 30)
    admin = f"http://127.0.0.1:{app.admin.port}"
    async with client.get(f"{admin}/api/cohorts") as answer:
        assert answer.status == 404
        assert "[cohorts]" in (await answer.json())["error"]
    async with client.get(f"{admin}/metrics") as answer:
        assert "cohort_" not in await answer.text()
    assert not list(tmp_path.glob("cohorts*"))


async def test_profile_both(daemon, importing, braze, emulator, client):
    """Events one way and cohorts the other, at the same time, in one process; a Braze that is down keeps no event back."""
    braze.script([{"status": 503}])
    app = await daemon(**importing)
    await sender(app, client).take(FIRST)
    for seed in range(5):
        assert await status_of(client, app, "/v1/currents", {"events": [currents(seed=seed)]}) == 200
    await until(lambda: emulator.summary().stored == 5, "the events", 30)
    assert in_braze(braze) == []
    braze.script([])
    await in_step(app, 60)
    assert in_braze(braze) == sorted(A)


# -- kill -9 -----------------------------------------------------------------------------------------------------------


class Process:
    """A real daemon, that can be killed and started again on the same files and ports."""

    def __init__(self, folder: Path, braze_url: str) -> None:
        self.folder = folder
        http, admin = free_port(), free_port()
        self.url, self.admin = f"http://127.0.0.1:{http}", f"http://127.0.0.1:{admin}"
        (folder / "bridged.toml").write_text(
            f"""
[sources.http]
listen = "127.0.0.1:{http}"
[sources.stream]
listen = []
[mixpanel]
export = false
[spool]
path = "{folder}/spool.db"
[cohorts]
enabled = true
username = "mixpanel"
password = "example-password"
path = "{folder}/cohorts.db"
max_concurrency = 4
[braze]
url = "{braze_url}"
rest_key = "example-rest-key"
[admin]
listen = "127.0.0.1:{admin}"
"""
        )
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with (self.folder / "daemon.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "bridged", "run", "--config", str(self.folder / "bridged.toml")),
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
            )

    async def kill(self) -> None:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGKILL)
            await self.process.wait()

    async def again(self) -> None:
        await self.kill()
        await self.start()

    async def overview(self, client: aiohttp.ClientSession) -> dict[str, Any] | None:
        """What /api/cohorts says; None while nobody answers."""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with client.get(f"{self.admin}/api/cohorts", timeout=aiohttp.ClientTimeout(total=5)) as answer:
                if answer.status == 200:
                    said: dict[str, Any] = await answer.json()
                    return said
        return None

    async def wait(self, client: aiohttp.ClientSession, when: Any, what: str, seconds: float = 60) -> None:
        try:
            async with asyncio.timeout(seconds * SLOW):
                while not ((said := await self.overview(client)) and when(said)):
                    await asyncio.sleep(0.02)
        except TimeoutError:
            log = (self.folder / "daemon.log").read_text()[-2000:]
            raise AssertionError(f"waited in vain for {what}: {await self.overview(client)}\n{log}") from None


def synced(said: dict[str, Any]) -> bool:
    """Whether nothing is left to do."""
    idle = said["writer"]["state"] == "idle" and not said["figures"]["waiting"]
    return idle and bool(said["cohorts"]) and all(row["state"] == "synced" for row in said["cohorts"])


MANY = [f"user-{n:05}" for n in range(6000)]


async def test_kill_9_in_every_phase_ends_with_the_same_membership(tmp_path, client):
    """Killed while pages come, while absentees are swept out, while users are written: Mixpanel begins again from the top, the
    membership is Mixpanel's in the end, and no more was written twice than was in flight.
    """
    async with BrazeEmulator(BrazeConfig(port=0, rest_key="example-rest-key", unordered_s=0.02)) as braze:
        daemon = Process(tmp_path, braze.url)
        await daemon.start()
        try:
            await _killed(daemon, braze, client)
        finally:
            await daemon.kill()


async def _killed(daemon: Process, braze: BrazeEmulator, client: aiohttp.ClientSession) -> None:
    mixpanel = Sender(client, daemon.url)
    first, second = MANY[:4000], MANY[3000:]

    # Receiving. Braze takes nothing yet, so that the next phase is one of its own.
    braze.script([{"status": 503}])
    syncing = asyncio.create_task(mixpanel.insist(session("members", first, size=100, id_="first")))
    await daemon.wait(client, lambda said: said["figures"]["pages"] > 5, "some pages")
    await daemon.again()
    braze.script([])

    # Sending, twice; the rest of the pages comes at the same time.
    for _ in range(2):
        before = braze.summary().writes
        await until(lambda before=before: braze.summary().writes > before + 600, "some users in Braze", 60)
        await daemon.again()
    await syncing
    await daemon.wait(client, synced, "Braze in step")
    assert in_braze(braze) == first

    # Sweeping: a full copy that doesn't name most of them, killed once the last page is on disk.
    await mixpanel.insist(session("members", second, size=500, id_="second"))
    await daemon.again()
    await daemon.wait(client, synced, "Braze in step again")
    assert in_braze(braze) == second

    said = await daemon.overview(client)
    assert said is not None
    assert said["figures"]["points_today"] >= braze.summary().points, "the count is never below the bill"
    window = 4 * 75
    needed = len(first) + len(set(first) ^ set(second))
    assert needed <= braze.summary().writes <= needed + 4 * window


async def test_one_grace_for_mixpanel_and_braze(daemon, importing, client, emulator, braze):
    """Both are silent at a stop: they are waited for at the same time, or systemd's patience might not do."""
    emulator.script([{"action": "hang"}])
    braze.script([{"action": "hang"}])
    app = await daemon(**importing | {"delivery__grace": "4s"})
    await sender(app, client).take(FIRST)
    event = currents(user={"external_user_id": "ada"})
    assert await status_of(client, app, "/v1/currents", {"events": [event]}) == 200
    await until(lambda: emulator.summary().requests and braze.summary().requests, "requests in flight")
    began = time.monotonic()
    await app.__aexit__(None, None, None)

    assert 3.9 < time.monotonic() - began < 7.5 * SLOW
