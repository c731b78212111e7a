"""The demo's second half, the way back: Mixpanel sends cohorts, and Braze must end with exactly Mixpanel's membership.

The pages and the expectation are made here, beside the daemon. Like Mixpanel's real syncs they begin with full copies in
pages, one of which comes twice, go on with additions and removals, some of them empty, and a copy that replaces another.
"""

import asyncio
import base64
import random
import time
from collections.abc import Iterator
from typing import Any, Final

import aiohttp
import msgspec
from msgspec import Struct

from bridged.admin.cohorts import CohortsStatus, Overview
from bridged.commands.demo_children import Addresses, DemoError
from bridged.commands.printing import table

PATH: Final = "/v1/cohorts/mixpanel"
ATTRIBUTE: Final = "mixpanel_cohorts"
BLOCKED: Final = "spam-user"
"""The emulated Braze refuses this user, as the real one does with those that it takes for dummies."""
# What goes wrong at Braze: over the limit once, and an answer that is lost after the users were written.
BRAZE_FAULTS: Final[tuple[dict[str, Any], ...]] = (
    {"after": 3, "times": 1, "status": 429, "headers": {"X-Ratelimit-Retry-After": "1"}},
    {"after": 9, "times": 1, "action": "reset_after_store"},
)
_PAGE: Final = 1000
_PROJECT: Final = "117"
_SIZES: Final = (("777", "Power users", 3000), ("778", "Trial ends soon", 2000), ("779", "Churn risk", 1200))
_USERS: Final = 4000
_PATIENCE_S: Final = 60.0
_LOOK_S: Final = 0.1


class Sync(Struct):
    """What Mixpanel sends, cohort by cohort, and who is in which in the end."""

    bodies: list[list[bytes]]  # those of one cohort come one after the other, as its syncs do
    members: dict[str, set[str]]  # by name of the cohort: Mixpanel's membership
    received: int  # members in all pages


class SyncOutcome(Struct):
    """How it went."""

    status: CohortsStatus
    pages: int
    took_s: float
    in_braze: dict[str, set[str]]  # by name of the cohort
    points: int  # as the emulated Braze bills them
    most_writes: int  # of one user


def make(seed: int = 0) -> Sync:
    """A few thousand users in three cohorts."""
    rng = random.Random(seed)
    users = [f"user-{number:05}" for number in range(_USERS)]
    sync = Sync([], {}, 0)
    for id_, name, size in _SIZES:
        pages: list[dict[str, Any]] = []
        members = {*rng.sample(users, size), BLOCKED}
        copy = _session(id_, name, "members", sorted(members), "first")
        pages += [*copy, copy[0]] if len(copy) == 1 else [*copy[:2], copy[1], *copy[2:]]
        outside = sorted(set(users) - members)
        joining, leaving = rng.sample(outside, size // 20), rng.sample(sorted(members - {BLOCKED}), size // 25)
        pages += _session(id_, name, "add_members", joining, "diff") + _session(
            id_, name, "remove_members", leaving, "diff"
        )
        pages += _session(id_, name, "add_members", [], "quiet") + _session(id_, name, "remove_members", [], "quiet")
        members = members.union(joining).difference(leaving)
        if id_ == _SIZES[-1][0]:
            # A full copy again: whoever it doesn't name has left.
            members = {*rng.sample(sorted(members), size // 2), *rng.sample(outside, size // 10), BLOCKED}
            pages += _session(id_, name, "members", sorted(members), "again")
        sync.members[name] = members
        sync.received += sum(len(page["parameters"]["members"]) for page in pages)
        sync.bodies.append([msgspec.json.encode(page) for page in pages])
    return sync


def _session(id_: str, name: str, action: str, members: list[str], session: str) -> list[dict[str, Any]]:
    """The pages of one session, in the shape of Mixpanel's custom webhook."""
    parts = [members[at : at + _PAGE] for at in range(0, len(members), _PAGE)] or [[]]
    return [
        {
            "action": action,
            "parameters": {
                "mixpanel_project_id": _PROJECT,
                "mixpanel_cohort_id": id_,
                "mixpanel_cohort_name": name,
                "mixpanel_cohort_description": "",
                "mixpanel_session_id": f"{id_}-{session}",
                "page_info": {"total_pages": len(parts), "page_count": number},
                "members": [_member(user) for user in part],
            },
        }
        for number, part in enumerate(parts, start=1)
    ]


def _member(user: str) -> dict[str, str]:
    return {"mixpanel_distinct_id": user, "email": f"{user}@example.com", "first_name": "Ada", "last_name": "Example"}


async def play(session: aiohttp.ClientSession, sync: Sync, addresses: Addresses) -> SyncOutcome:
    """Posts all pages and waits until Braze is in step. Raises DemoError."""
    started = time.monotonic()
    await asyncio.gather(*(_post(session, bodies, addresses) for bodies in sync.bodies))
    pages = sum(map(len, sync.bodies))
    status = await _in_step(session, addresses, pages)
    took_s = time.monotonic() - started
    in_braze: dict[str, set[str]] = {name: set() for name in sync.members}
    async with session.get(f"{addresses.braze}/emulator/users", timeout=aiohttp.ClientTimeout(total=None)) as answer:
        for line in (await answer.read()).splitlines():
            user = msgspec.json.decode(line)
            for name in user["attributes"].get(ATTRIBUTE, ()):
                in_braze.setdefault(name, set()).add(user["external_id"])
    async with session.get(f"{addresses.braze}/emulator/summary") as answer:
        summary = msgspec.json.decode(await answer.read())
    return SyncOutcome(status, pages, took_s, in_braze, summary["points"], summary["max_writes"])


async def _post(session: aiohttp.ClientSession, bodies: list[bytes], addresses: Addresses) -> None:
    basic = base64.b64encode(f"mixpanel:{addresses.bearer_token}".encode()).decode()
    headers = {"Authorization": f"Basic {basic}", "Content-Type": "application/json"}
    for body in bodies:
        async with session.post(addresses.http + PATH, data=body, headers=headers) as answer:
            said = await answer.read()
        if answer.status != 200 or msgspec.json.decode(said)["status"] != "success":
            raise DemoError(f"the webhook answered {answer.status}: {said.decode(errors='replace')[:200]}")


async def _in_step(session: aiohttp.ClientSession, addresses: Addresses, pages: int) -> CohortsStatus:
    """Waits until everything is merged and written."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        async with session.get(f"{addresses.admin}/api/cohorts") as answer:
            said = await answer.read()
        if answer.status != 200:
            raise DemoError(f"the daemon's API doesn't answer as it should: {said.decode(errors='replace')[:200]}")
        overview = msgspec.json.decode(said, type=Overview)
        figures = overview.figures
        merged = figures.pages == pages and not figures.waiting
        if merged and all(row.state == "synced" for row in overview.cohorts) and overview.writer.state == "idle":
            return overview
        if time.monotonic() > deadline:
            raise DemoError(f"Braze is not in step after {_PATIENCE_S:.0f} s: {overview.sentence}")
        await asyncio.sleep(_LOOK_S)


def problems(sync: Sync, outcome: SyncOutcome) -> Iterator[str]:
    """Everything that isn't exactly as expected."""
    for name in {**sync.members, **outcome.in_braze}:
        wanted, found = sync.members.get(name, set()) - {BLOCKED}, outcome.in_braze.get(name, set())
        if missing := len(wanted - found):
            yield f"cohort {name!r}: {missing:,} members are missing in Braze"
        if foreign := len(found - wanted):
            yield f"cohort {name!r}: {foreign:,} users are in Braze that Mixpanel doesn't have"
    figures = outcome.status.figures
    members = sum(map(len, sync.members.values()))
    wanted_figures = {
        "members": members,
        "in_braze": members - len(sync.members),
        "rejected": len(sync.members),  # the one user, in each
        "received": sync.received,
        "joining": 0,
        "leaving": 0,
    }
    for name, count in wanted_figures.items():
        if getattr(figures, name) != count:
            yield f"cohort memberships {name}: {getattr(figures, name):,}, and it should be {count:,}"


def report(sync: Sync, outcome: SyncOutcome) -> str:
    """The table, and what it cost."""
    rows: list[tuple[object, ...]] = [("cohort", "Mixpanel", "Braze", "")]
    for name, members in sync.members.items():
        note = f"without {BLOCKED}, whom Braze refuses" if BLOCKED in members else ""
        rows.append((name, len(members), len(outcome.in_braze[name]), note))
    writer = outcome.status.writer
    verdicts = ", ".join(f"{count} {name}" for name, count in writer.verdicts.items())
    sent = f"{writer.users_sent:,} updates of users in {writer.requests} requests, {outcome.points:,} data points"
    lines = [
        table(rows, right=[1, 2]),
        "",
        f"  {sync.received:,} members in {outcome.pages} pages, in step with Braze after {outcome.took_s:.1f} s",
        f"  {sent}, at most {outcome.most_writes} updates of one user",
        f"  Braze's answers: {verdicts}{' (planned)' if 'retry' in writer.verdicts else ''}",
    ]
    return "\n".join(lines)
