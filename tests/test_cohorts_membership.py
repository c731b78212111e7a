"""The membership, in a real file: rounds, sweeps, what is due, what is known after an answer."""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import until
from structlog.testing import capture_logs

from bridged.cohorts import merging, tables
from bridged.cohorts.membership import Membership, MembershipOptions
from bridged.cohorts.taking import Settled, User
from bridged.cohorts.webhook import Page
from bridged.errors import MembershipError, UnknownCohort


def page(action: str, ids: str, session: str = "s1", at: int = 1, total: int = 1, **more: Any) -> Page:
    """A page of the cohort 777; `ids` are letters."""
    given: dict[str, Any] = {"project": "117", "cohort": "777", "name": "Power users"} | more
    return Page(action=action, session=session, page=at, total=total, ids=list(ids), **given)  # type: ignore[arg-type]


async def merged(membership: Membership) -> None:
    """Returns when every page is merged and every walk has ended."""

    def idle(db: sqlite3.Connection) -> bool:
        return not db.execute("SELECT (SELECT count(*) FROM inbox) + (SELECT count(*) FROM walks)").fetchone()[0]

    async with asyncio.timeout(30):
        while not await membership.run(idle):
            assert not membership.failed
            await asyncio.sleep(0.01)


async def hear(membership: Membership, *pages: Page) -> None:
    """Receives pages in order and waits for what follows from them."""
    for each in pages:
        await membership.receive(each)
    await merged(membership)


async def wanted(membership: Membership, cohort: str = "777") -> str:
    """Who is in a cohort as Mixpanel wants it, as letters."""

    def read(db: sqlite3.Connection) -> str:
        found = db.execute(
            "SELECT external_id FROM members m JOIN users u ON u.key = m.user JOIN cohorts c ON c.id = m.cohort"
            " WHERE c.mixpanel_id = ? AND m.wanted > 0 ORDER BY 1",
            (cohort,),
        )
        return "".join(id_ for (id_,) in found)

    return await membership.run(read)


def sent_of(user: User) -> list[tuple[int, int, int]]:
    """The rows of a user as delivered."""
    return [(user.key, row.cohort, row.wanted) for row in user.rows if row.is_due]


async def deliver(membership: Membership, limit: int = 1000) -> str:
    """Takes who is due and settles all as delivered; gives the letters."""
    block = await membership.take(-1, limit, [])
    result = Settled(day=block.day)
    for user in block.users:
        result.sent += sent_of(user)
    await membership.settle(result)
    return "".join(sorted(user.external_id for user in block.users))


def balanced(membership: Membership) -> None:
    """The two laws, per cohort and in sum."""
    for row in membership.rows:
        assert row.received == row.applied + row.no_id + row.too_long + row.stale, row
        assert row.members == row.in_braze + row.joining + row.rejected, row
        assert min(row.in_braze, row.joining, row.leaving, row.rejected, row.rejected_leaving) >= 0, row


async def counted(membership: Membership) -> None:
    """The counts that triggers keep are those of the rows that are there."""

    def read(db: sqlite3.Connection) -> None:
        sums = ", ".join(f"coalesce(sum({tables._is('m', count)}), 0)" for count in tables.COUNTS)
        for cohort, *kept in db.execute(f"SELECT id, {', '.join(tables.COUNTS)} FROM cohorts").fetchall():
            assert list(db.execute(f"SELECT {sums} FROM members m WHERE cohort = ?", (cohort,)).fetchone()) == kept
        assert not db.execute("SELECT * FROM members WHERE wanted = 0 AND sent = 0 AND elsewhere = 0").fetchall()
        assert not db.execute("SELECT * FROM users WHERE key NOT IN (SELECT user FROM members)").fetchall()

    await membership.run(read)
    balanced(membership)


@pytest.fixture(autouse=True)
def _no_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are merged at once."""
    monkeypatch.setattr("bridged.cohorts.membership._LINGER_S", 0.0)


@pytest.fixture
def options(tmp_path: Path) -> MembershipOptions:
    """A file of its own."""
    return MembershipOptions(path=str(tmp_path / "cohorts.db"), target="a")


@pytest.fixture
async def membership(options: MembershipOptions) -> AsyncIterator[Membership]:
    """An empty one."""
    async with Membership(options) as opened:
        yield opened


async def test_a_full_copy_replaces(membership: Membership) -> None:
    """Absentees of a complete `members` round leave; who was never sent leaves without a trace."""
    await hear(membership, page("members", "abc"))
    assert await deliver(membership) == "abc"
    await hear(membership, page("members", "bcd", "s2"))
    assert await wanted(membership) == "bcd"
    assert membership.rows[0].leaving == 1
    assert membership.rows[0].joining == 1
    assert await deliver(membership) == "ad"
    assert membership.figures.due == 0
    assert membership.rows[0].state == "synced"
    await counted(membership)


async def test_absentees_leave_only_when_every_page_has_come(membership: Membership) -> None:
    """In any order of pages; the last one in number is not the last one to come."""
    await hear(membership, page("members", "abcdef"))
    await deliver(membership)
    await hear(membership, page("members", "c", "s2", 3, 3), page("members", "a", "s2", 1, 3))
    assert await wanted(membership) == "abcdef"
    assert membership.rows[0].state == "receiving"
    await hear(membership, page("members", "b", "s2", 2, 3))
    assert await wanted(membership) == "abc"
    await counted(membership)


async def test_a_session_that_broke_off_is_received_no_longer(
    options: MembershipOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixpanel tries for a minute, and then with its next sync: after ten the cohort is what it is without the rest, though
    nothing is committed meanwhile. A page that comes all the same goes on with it.
    """
    monkeypatch.setattr("bridged.cohorts.membership._LOOK_S", 0.05)
    now = [1_000_000.0]
    async with Membership(options, lambda: now[0]) as membership:
        await hear(membership, page("members", "ab"))
        await deliver(membership)
        await hear(membership, page("members", "a", "s2", 1, 3))
        assert (membership.rows[0].state, membership.rows[0].progress) == ("receiving", 0.3333)
        now[0] += 599
        await asyncio.sleep(0.2)
        assert membership.rows[0].state == "receiving"
        now[0] += 2
        await until(lambda: membership.rows[0].state == "synced", "its end")
        assert await wanted(membership) == "ab"
        await hear(membership, page("members", "c", "s2", 2, 3))
        assert membership.rows[0].state == "receiving"
        now[0] += 601
        await until(lambda: membership.rows[0].state == "sending", "its end")
        await hear(membership, page("members", "", "s2", 3, 3))
        assert await wanted(membership) == "ac"


async def test_a_repeated_last_page_sweeps_nobody(membership: Membership) -> None:
    """Neither at once nor after a newer session has added somebody."""
    last = page("members", "b", "s1", 2, 2)
    await hear(membership, page("members", "a", "s1", 1, 2), last)
    await hear(membership, page("add_members", "c", "s2"), last)
    assert await wanted(membership) == "abc"
    assert membership.rows[0].stale == 1
    await hear(membership, page("remove_members", "b", "s3"), last)
    assert await wanted(membership) == "ac"
    await counted(membership)


async def test_a_repeat_within_the_newest_session_changes_nothing(membership: Membership) -> None:
    """A restart from the top: the same users come again, perhaps on other pages."""
    first, second = page("members", "ab", "s1", 1, 2), page("members", "cd", "s1", 2, 2)
    await hear(membership, first, first, page("members", "a", "s1", 1, 2), second, second, first)
    assert await wanted(membership) == "abcd"
    assert await deliver(membership) == "abcd"
    await hear(membership, first, second)
    assert membership.figures.due == 0
    await counted(membership)


async def test_another_total_is_a_restart(membership: Membership) -> None:
    """Pages that were cut otherwise can't complete a round together with those before."""
    await hear(membership, page("members", "abcdef"))
    await hear(membership, page("members", "a", "s2", 1, 2), page("members", "b", "s2", 2, 3))
    assert await wanted(membership) == "abcdef"
    await hear(membership, page("members", "a", "s2", 1, 3), page("members", "c", "s2", 3, 3))
    assert await wanted(membership) == "abc"


async def test_a_new_session_replaces_one_that_has_not_ended(membership: Membership) -> None:
    """The old one's late pages change nothing, and complete nothing."""
    await hear(membership, page("members", "abc"))
    await hear(membership, page("members", "a", "s2", 1, 2), page("members", "bcd", "s3", 1, 2))
    await hear(membership, page("members", "xyz", "s2", 2, 2))
    assert await wanted(membership) == "abcd"
    await hear(membership, page("members", "e", "s3", 2, 2))
    assert await wanted(membership) == "bcde"
    detail = await membership.show("777")
    assert [(round_.session, round_.superseded, round_.complete) for round_ in detail.rounds] == [
        ("s3", False, True),
        ("s2", True, False),
        ("s1", False, True),
    ]
    await counted(membership)


async def test_diffs_beside_each_other(membership: Membership) -> None:
    """An add and a remove session may run in parallel, under two ids or one."""
    await hear(membership, page("members", "abc"))
    for add, remove, new, old in (("s2", "s3", "d", "a"), ("s4", "s4", "e", "b")):
        await hear(
            membership,
            page("add_members", new, add, 1, 2),
            page("remove_members", old, remove, 1, 2),
            page("add_members", new.upper(), add, 2, 2),
            page("remove_members", "", remove, 2, 2),
        )
    assert await wanted(membership) == "DEcde"
    await counted(membership)


async def test_a_late_diff_of_an_older_session_undoes_nothing(membership: Membership) -> None:
    """Neither a repeat nor a page that is late for the first time."""
    await hear(membership, page("members", "ab"))
    add = page("add_members", "c", "s2", 1, 2)
    await hear(membership, add, page("remove_members", "c", "s3"), add)
    assert await wanted(membership) == "ab"
    await hear(membership, page("add_members", "d", "s4"), page("add_members", "e", "s2", 2, 2))
    assert await wanted(membership) == "abd"
    assert membership.rows[0].stale == 2
    await counted(membership)


async def test_an_older_session_can_t_take_back_what_a_newer_one_said(membership: Membership) -> None:
    """Even with a page that was never seen before: the newer one knew better."""
    await hear(membership, page("members", "ab"))
    await deliver(membership)
    await hear(membership, page("remove_members", "c", "s2", 1, 2), page("add_members", "ac", "s3"))
    await hear(membership, page("remove_members", "ab", "s2", 2, 2))
    assert await wanted(membership) == "ac"
    await deliver(membership)
    await hear(membership, page("add_members", "d", "s4", 1, 2), page("remove_members", "a", "s5"))
    await hear(membership, page("add_members", "ae", "s4", 2, 2))
    assert await wanted(membership) == "cde"
    await counted(membership)


async def test_a_round_that_newer_diffs_ran_into_still_sweeps(membership: Membership) -> None:
    """That as many are in as it named is then no proof that they are the same."""
    await hear(membership, page("members", "abc"))
    await deliver(membership)
    await hear(membership, page("members", "ab", "s2", 1, 2), page("remove_members", "b", "s3"))
    await hear(membership, page("members", "", "s2", 2, 2))
    assert await wanted(membership) == "a"
    await counted(membership)


async def test_pages_without_a_session_each_stand_for_themselves(membership: Membership) -> None:
    """Consumers have seen bodies without session and page_info."""
    await hear(membership, page("members", "ab", ""), page("members", "bc", ""), page("add_members", "d", ""))
    assert await wanted(membership) == "bcd"


async def test_a_full_copy_without_page_info_takes_out_nobody_whom_it_names(membership: Membership) -> None:
    """Each of its pages says that it is the only one, and sweeps; whom a later page of the session names is in again."""
    await hear(membership, page("members", "abcdef", "s1"))
    await deliver(membership)
    await hear(membership, *(page("members", ids, "s2") for ids in ("ab", "cd", "ef")))
    assert await wanted(membership) == "abcdef"
    await counted(membership)


async def test_an_incomplete_total_never_sweeps(membership: Membership) -> None:
    """A page beyond the total, or of an unknown total, is taken, but proves no absence."""
    await hear(membership, page("members", "ab"), page("members", "c", "s2", 5, 2), page("members", "d", "s2", 1, 2))
    assert await wanted(membership) == "abcd"


async def test_a_user_who_left_while_in_flight_is_taken_out(membership: Membership) -> None:
    """Braze may have what was on its way: nobody is forgotten before it is told otherwise."""
    await hear(membership, page("members", "ab"))
    block = await membership.take(-1, 10, [])
    await hear(membership, page("remove_members", "a", "s2"))
    result = Settled(day=block.day)
    for user in block.users:
        result.sent += sent_of(user)
    await membership.settle(result)
    assert membership.rows[0].leaving == 1
    assert await deliver(membership) == "a"
    assert membership.figures.due == 0
    await counted(membership)


async def test_what_was_taken_is_perhaps_in_braze_after_a_crash(options: MembershipOptions) -> None:
    """A removal that comes between the crash and the next try is told to Braze."""
    async with Membership(options) as membership:
        await hear(membership, page("members", "ab"))
        await membership.take(-1, 10, [])
    async with Membership(options) as membership:
        await hear(membership, page("remove_members", "a", "s2"))
        assert (membership.rows[0].joining, membership.rows[0].leaving) == (1, 1)
        assert await deliver(membership) == "ab"
        await counted(membership)


async def test_what_surely_was_not_sent_goes_back(membership: Membership) -> None:
    """A removal then leaves no trace, and costs nothing."""
    await hear(membership, page("members", "a"))
    block = await membership.take(-1, 10, [])
    assert membership.figures.points_today == 1
    back = [(user.key, row.cohort, row.sent) for user in block.users for row in user.rows]
    await membership.settle(Settled(back=back, refund=1, day=block.day))
    assert membership.figures.points_today == 0
    await hear(membership, page("remove_members", "a", "s2"))
    assert membership.figures.due == 0
    await counted(membership)


async def test_a_refused_user_waits_for_a_person(membership: Membership) -> None:
    """It isn't due, is listed with Braze's words, and is due again after a resync or when Mixpanel says something else."""
    await hear(membership, page("members", "ab"))
    for attempt in (1, 2):
        block = await membership.take(-1, 10, [])
        a, *others = sorted(block.users, key=lambda user: user.external_id)
        assert [user.external_id for user in others] == ["b"][attempt - 1 :]
        refused = [(a.key, row.cohort, row.sent, row.wanted) for row in a.rows]
        sent = [row for user in others for row in sent_of(user)]
        done = Settled(sent=sent, refused=refused, reasons=[(a.key, "no")], day=block.day)
        await membership.settle(done)
        assert membership.rows[0].rejected == 1
        assert membership.figures.due == 0
        (refusal,) = await membership.refusals()
        assert (refusal.external_id, refusal.reason, refusal.attempts) == ("a", "no", attempt)
        assert refusal.cohorts == ["117:777"]
        await counted(membership)
        if attempt == 1:
            assert await membership.resync("777", rejected_only=True) == 1
            await merged(membership)
            assert membership.figures.joining == 1
    await hear(membership, page("remove_members", "a", "s2"))
    assert membership.figures.due == 0
    assert await membership.refusals() == []
    await counted(membership)


async def test_a_refusal_of_what_is_no_longer_wanted_is_none(membership: Membership) -> None:
    """What Mixpanel wants now hasn't been tried yet."""
    await hear(membership, page("members", "a"))
    block = await membership.take(-1, 10, [])
    await hear(membership, page("add_members", "", "s2", name="Another name"))
    (user,) = block.users
    refused = [(user.key, row.cohort, row.sent, row.wanted) for row in user.rows]
    await membership.settle(Settled(refused=refused, reasons=[(user.key, "no")], day=block.day))
    assert (membership.rows[0].joining, membership.rows[0].rejected) == (1, 0)
    await counted(membership)


async def refuse(membership: Membership, letters: str) -> None:
    """Takes who is due and settles some as refused, the others as delivered."""
    block = await membership.take(-1, 1000, [])
    result = Settled(day=block.day)
    for user in block.users:
        if user.external_id in letters:
            result.refused += [(user.key, row.cohort, row.sent, row.wanted) for row in user.rows if row.is_due]
            result.reasons.append((user.key, "no"))
        else:
            result.sent += sent_of(user)
    await membership.settle(result)


async def test_a_rename_tries_again_whom_braze_refused(membership: Membership) -> None:
    """All its members are written again, however the new name comes: with a diff as with a full copy. Who is to leave, and
    was refused so, has no name in it.
    """
    await hear(membership, page("members", "abc"))
    await refuse(membership, "a")
    for number, rename in enumerate((page("add_members", "", "s2"), page("members", "abc", "s3"))):
        assert (membership.rows[0].rejected, membership.figures.due) == (1, 0)
        await hear(membership, msgspec.structs.replace(rename, name=f"New {number}"))
        assert (membership.rows[0].rejected, membership.rows[0].joining) == (0, 3)
        await refuse(membership, "a")
    await hear(membership, page("remove_members", "b", "s4", name="New 1"))
    await refuse(membership, "b")
    await hear(membership, page("add_members", "", "s5", name="Newest"))
    row = membership.rows[0]
    assert (row.joining, row.rejected, row.leaving, row.rejected_leaving) == (2, 0, 0, 1)
    assert await deliver(membership) == "ac"
    await counted(membership)


async def test_a_renamed_cohort_is_written_again(membership: Membership) -> None:
    """Its members bear the old name in Braze. Who is in two cohorts is written once."""
    await hear(membership, page("members", "ab"), page("members", "b", cohort="8", name="Other"))
    assert await deliver(membership) == "ab"
    await hear(membership, page("add_members", "", "s2", name="Heavy users"))
    assert membership.rows[0].name == "Heavy users"
    assert membership.figures.joining == 2
    assert (await membership.plan()).points == 2
    assert await deliver(membership) == "ab"
    assert membership.figures.due == 0
    await counted(membership)


async def test_a_stale_page_renames_nothing(membership: Membership) -> None:
    """Else an old name would come back."""
    old = page("add_members", "a", "s1")
    await hear(membership, old, page("add_members", "b", "s2", name="New"), old)
    assert membership.rows[0].name == "New"


async def test_a_resync_tells_everything_again(membership: Membership) -> None:
    """As if nothing were known of Braze."""
    await hear(membership, page("members", "abc"))
    await deliver(membership)
    assert await membership.resync() == 3
    await merged(membership)
    assert await deliver(membership) == "abc"
    await counted(membership)


async def test_a_forgotten_cohort_leaves_braze_and_is_gone(membership: Membership) -> None:
    """Its late pages don't bring it back; a new session does."""
    full = page("members", "abc")
    await hear(membership, full)
    await deliver(membership)
    assert await membership.forget("117:777") == 3
    await merged(membership)
    await hear(membership, full)
    assert membership.rows[0].state in ("sending", "forgetting")
    assert await deliver(membership) == "abc"
    assert membership.rows == []
    await hear(membership, page("members", "a", "s2"))
    assert await wanted(membership) == "a"
    await counted(membership)


async def test_a_forgotten_cohort_is_gone_though_braze_keeps_somebody(membership: Membership) -> None:
    """Whom Braze refuses to take out can't be taken out: the log says so, and the other cohorts of that user stay."""
    await hear(membership, page("members", "abc"), page("members", "a", "s2", cohort="778"))
    await deliver(membership)
    await membership.forget("777")
    await merged(membership)
    block = await membership.take(-1, 10, [])
    result = Settled(day=block.day)
    for user in block.users:
        if user.external_id == "c":
            result.sent += sent_of(user)
        else:
            result.refused += [(user.key, row.cohort, row.sent, 0) for row in user.rows if row.is_due]
            result.reasons.append((user.key, "no"))
    with capture_logs() as logs:
        await membership.settle(result)
    assert [row.cohort for row in membership.rows] == ["778"]
    assert [line["refused"] for line in logs if line["event"] == "cohort_forgotten"] == [2]
    assert await wanted(membership, "778") == "a"
    assert await membership.refusals() == []
    await counted(membership)


async def test_another_target_has_to_be_told_everything(options: MembershipOptions) -> None:
    """Another workspace, cluster or attribute holds nothing of what the old one did."""
    async with Membership(options) as membership:
        await hear(membership, page("members", "ab"))
        await deliver(membership)
    async with Membership(options) as membership:
        assert membership.figures.due == 0
    async with Membership(msgspec.structs.replace(options, target="b")) as membership:
        await merged(membership)
        assert await deliver(membership) == "ab"


async def test_back_at_an_earlier_target_who_left_meanwhile_is_taken_out(options: MembershipOptions) -> None:
    """It still has them. Whom it never had is not written to it, and whoever is out everywhere is forgotten."""

    async def rows(membership: Membership) -> int:
        return await membership.run(lambda db: db.execute("SELECT count(*) FROM members").fetchone()[0])

    other, third = (msgspec.structs.replace(options, target=target) for target in "bc")
    async with Membership(options) as membership:
        await hear(membership, page("members", "abcd"))
        await deliver(membership)
    async with Membership(other) as membership:
        await merged(membership)
        assert await deliver(membership) == "abcd"
        await hear(membership, page("remove_members", "ab", "s2"), page("add_members", "e", "s3"))
        assert await deliver(membership) == "abe"
        assert membership.figures.due == 0
        assert membership.rows[0].state == "synced"
        assert await membership.resync("777") == 3
        await merged(membership)
        assert await deliver(membership) == "cde"
        await hear(membership, page("remove_members", "a", "s4"), page("add_members", "b", "s5"))
        await deliver(membership)
        await counted(membership)
    async with Membership(third) as membership:
        await merged(membership)
        assert await deliver(membership) == "bcde"
        await hear(membership, page("members", "ce", "s6"))
        assert await deliver(membership) == "bd"
        assert await rows(membership) == 5
    async with Membership(options) as membership:
        await merged(membership)
        assert (membership.rows[0].joining, membership.rows[0].leaving) == (2, 3)
        assert (await membership.plan()).points == 5
        assert await deliver(membership) == "abcde"
        assert await rows(membership) == 4  # a was only here
        await counted(membership)
    async with Membership(other) as membership:
        await merged(membership)
        assert await deliver(membership) == "bcde"
        assert await rows(membership) == 2
    async with Membership(third) as membership:
        await merged(membership)
        assert await deliver(membership) == "ce"
        await counted(membership)


async def test_two_changes_of_the_target_between_which_nothing_was_done(
    options: MembershipOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each member's state is known of the target that it was written to, however far the first change had come."""
    async with Membership(options) as membership:
        await hear(membership, page("members", "abcdef"))
        await deliver(membership)
        await hear(membership, page("remove_members", "a", "s2"))  # and it isn't written any more
    monkeypatch.setattr(merging, "WALK_ROWS", 2)
    whole = merging.walk
    steps = 0

    def some(db: sqlite3.Connection, *, by_name: bool) -> bool:
        nonlocal steps
        steps -= 1
        return steps >= 0 and whole(db, by_name=by_name)

    for target, steps in (("b", 1), ("c", 4)):  # the one of three steps; its rest, and one of the other
        with monkeypatch.context() as patch:
            patch.setattr(merging, "walk", some)
            async with Membership(msgspec.structs.replace(options, target=target)):
                await until(lambda: steps < 0, "those steps")  # noqa: B023  # it is awaited here
    async with Membership(msgspec.structs.replace(options, target="b")) as membership:
        await merged(membership)
        await deliver(membership)
        await hear(membership, page("members", "f", "s3"))
        await deliver(membership)
    async with Membership(options) as membership:
        await merged(membership)
        assert await deliver(membership) == "abcdef"
        assert membership.figures.in_braze == 1
        await counted(membership)


async def test_a_cohort_that_is_forgotten_is_remembered_for_no_target(options: MembershipOptions) -> None:
    """It is gone, with all that was kept of it; also if the target changes while it is being taken out."""
    other = msgspec.structs.replace(options, target="b")
    async with Membership(options) as membership:
        await hear(membership, page("members", "abc"), page("members", "ab", "s2", cohort="778"))
        await deliver(membership)
    async with Membership(other) as membership:
        await merged(membership)
        await deliver(membership)
        await hear(membership, page("remove_members", "a", "s3"))
        await deliver(membership)
        await membership.forget("777")
        await merged(membership)
        await deliver(membership)
        assert [row.cohort for row in membership.rows] == ["778"]
        await membership.forget("778")
        await merged(membership)
    async with Membership(options) as membership:
        await merged(membership)
        assert await deliver(membership) == "ab"
        assert membership.rows == []
        await counted(membership)
        assert not await membership.run(lambda db: db.execute("SELECT * FROM members").fetchall())


async def test_nothing_is_allowed_where_there_is_no_cap(membership: Membership) -> None:
    """It would count on the day that a cap comes."""
    await hear(membership, page("members", "ab"))
    assert (await membership.allow(50_000)).allowed_today is None
    membership.use(10)
    assert (await membership.plan()).allowed_today == 10


async def test_a_plan_knows_what_a_resync_makes_due(membership: Membership) -> None:
    """Asked for right behind it; and the resync counts those as well who are to leave."""
    await hear(membership, page("members", "abcd"))
    await deliver(membership)
    await hear(membership, page("remove_members", "ab", "s2"))
    assert await membership.resync("777") == 4
    assert (await membership.plan()).users == 4


async def test_a_cohort_is_in_step_since_its_own_last_write(options: MembershipOptions) -> None:
    """What another cohort is sent doesn't count, and an emptied one is in step, too."""
    now = [1_000_000.0]
    async with Membership(options, lambda: now[0]) as membership:
        await hear(membership, page("members", "a"), page("members", "b", "s2", cohort="778"))
        await deliver(membership)
        now[0] += 60
        await hear(membership, page("members", "bc", "s3", cohort="778"))
        await deliver(membership)
        assert [row.synced_at for row in membership.rows] == [1_000_000.0, 1_000_060.0]
        now[0] += 60
        await hear(membership, page("members", "", "s4"))
        await deliver(membership)
        assert [row.synced_at for row in membership.rows] == [1_000_120.0, 1_000_060.0]


async def test_the_cap_of_a_day(options: MembershipOptions) -> None:
    """No more than the cap is taken, until somebody allows more, or it is another day."""
    now = [1_000_000.0]
    capped = msgspec.structs.replace(options, max_points_per_day=2)
    async with Membership(capped, lambda: now[0]) as membership:
        await hear(membership, page("members", "abcdef"))
        plan = await membership.plan()
        assert (plan.points, plan.left_today, plan.fits) == (6, 2, False)
        assert len(await deliver(membership)) == 2
        assert await deliver(membership) == ""
        assert membership.figures.points_left_today == 0
        plan = await membership.allow(1)
        assert plan.left_today == 1
        assert len(await deliver(membership)) == 1
        now[0] += 86_400
        assert len(await deliver(membership)) == 2
        plan = await membership.allow(0)
        assert plan.fits
        assert len(await deliver(membership)) == 1
        assert membership.figures.due == 0


async def test_a_cohort_to_which_nothing_was_ever_due_is_in_step(options: MembershipOptions) -> None:
    """Since all pages of its session have come: it is empty, or who joined has left before anybody was told."""
    now = [1_000_000.0]
    async with Membership(options, lambda: now[0]) as membership:
        await hear(membership, page("members", "", "s1", 1, 2))
        assert membership.rows[0].synced_at is None
        now[0] += 60
        await hear(membership, page("members", "", "s1", 2, 2))
        assert [(row.state, row.synced_at) for row in membership.rows] == [("synced", 1_000_060.0)]
        now[0] += 60
        await hear(membership, page("members", "ab", "s2", cohort="778"))
        assert membership.rows[1].synced_at is None
        now[0] += 60
        await hear(membership, page("members", "", "s3", cohort="778"))
        assert [row.synced_at for row in membership.rows] == [1_000_060.0, 1_000_180.0]


async def test_what_is_left_today_is_told_as_of_now(options: MembershipOptions) -> None:
    """Another cap, or another day, changes it without a commit; the plan says the same."""
    now = [1_000_000.0]
    capped = msgspec.structs.replace(options, max_points_per_day=100)
    async with Membership(capped, lambda: now[0]) as membership:
        await hear(membership, page("members", "abcdef"))
        await deliver(membership)
        for cap, left in ((100, 94), (1000, 994), (0, None), (10, 4), (5, 0)):
            membership.use(cap)
            assert membership.figures.points_today == 6
            assert membership.figures.points_left_today == left == (await membership.plan()).left_today
        assert (await membership.allow(3)).left_today == membership.figures.points_left_today == 3
        now[0] += 86_400
        assert (membership.figures.points_today, membership.figures.points_left_today) == (0, 5)
        assert (await membership.plan()).left_today == 5


@pytest.mark.parametrize(("points", "goes"), [(0, 8), (3, 3)])
async def test_what_is_allowed_goes_though_the_cap_came_late(
    options: MembershipOptions, points: int, goes: int
) -> None:
    """A cap that is set below what the day has cost already takes nothing off what is allowed then."""
    async with Membership(options) as membership:
        await hear(membership, page("members", "abcdef"))
        assert await deliver(membership) == "abcdef"
        membership.use(1)
        await hear(membership, page("add_members", "ghijklmn", "s2"))
        assert await deliver(membership) == ""
        plan = await membership.allow(points)
        assert (plan.points, plan.spent_today, plan.left_today) == (8, 6, goes)
        assert len(await deliver(membership)) == goes
        assert await deliver(membership) == ""


async def test_busy_users_are_not_taken_twice(membership: Membership) -> None:
    """And blocks go round: behind the last key, then from the first on."""
    await hear(membership, page("members", "abcd"))
    one = await membership.take(-1, 2, [])
    two = await membership.take(one.last, 4, [user.key for user in one.users])
    assert {u.key for u in one.users} & {u.key for u in two.users} == set()
    assert len(one.users) + len(two.users) == 4
    again = await membership.take(two.last, 4, [user.key for user in two.users])
    assert {u.key for u in again.users} == {u.key for u in one.users}


async def test_who_a_partner_is_told_of(options: MembershipOptions) -> None:
    """Rows, not users; only of cohorts that are announced; a rename is announced, and written to nobody."""
    async with Membership(msgspec.structs.replace(options, by_name=False)) as membership:
        await hear(membership, page("members", "ab"), page("members", "bc", cohort="8", name="Other"))
        assert (await membership.take(-1, 10, [])).users == []
        first, second = sorted((await membership.unannounced()).values(), key=lambda named: named.id)
        await membership.announced(first)
        assert await deliver(membership) == "ab"
        await membership.announced(second)
        assert (await membership.plan()).points == 2
        assert await deliver(membership) == "bc"
        await hear(membership, page("add_members", "", "s2", name="New"))
        assert membership.figures.due == 0
        assert [c.name for c in (await membership.unannounced()).values()] == ["New"]
        await counted(membership)


async def test_a_partner_s_refusal_outlives_a_success_in_another_cohort(options: MembershipOptions) -> None:
    """Braze's words stay as long as it refuses the user somewhere."""
    async with Membership(msgspec.structs.replace(options, by_name=False)) as membership:
        await hear(membership, page("members", "a"), page("members", "a", "s2", cohort="778"))
        for cohort in (await membership.unannounced()).values():
            await membership.announced(cohort)
        block = await membership.take(-1, 10, [])
        [user] = block.users
        bad, good = user.rows
        refused = [(user.key, bad.cohort, bad.sent, bad.wanted)]
        await membership.settle(Settled(day=block.day, refused=refused, reasons=[(user.key, "no")]))
        await membership.settle(Settled(day=block.day, sent=[(user.key, good.cohort, 1)]))
        assert [(one.external_id, one.reason) for one in await membership.refusals()] == [("a", "no")]


async def test_steps_are_bounded_and_go_on_after_a_restart(
    options: MembershipOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep that was cut off between two steps ends as if it had not been."""
    monkeypatch.setattr(merging, "WALK_ROWS", 3)
    letters = "abcdefghijklmnopqrstuvwxyz"
    async with Membership(options) as membership:
        await hear(membership, page("members", letters))
        await deliver(membership)
    db = sqlite3.connect(options.path, isolation_level=None)
    for statement in tables.SCRATCH:
        db.execute(statement)
    head = merging.head_of(page("members", "", "s2"))
    ids = msgspec.json.encode(list("xyz")).decode()
    merging.receive(db, [(1.0, 3, msgspec.json.encode(head).decode(), ids)])
    assert merging.merge(db, by_name=True) == (1, 3)
    assert merging.walk(db, by_name=True)
    assert db.execute("SELECT leaving FROM cohorts").fetchone()[0] == 3
    db.close()
    async with Membership(options) as membership:
        await merged(membership)
        assert await wanted(membership) == "xyz"
        assert membership.rows[0].leaving == 23
        await counted(membership)


async def test_the_file_belongs_to_one_daemon(options: MembershipOptions, membership: Membership) -> None:
    """Two would send everything twice."""
    with pytest.raises(MembershipError, match="in use by another"):
        await Membership(options).__aenter__()


def test_a_newer_file_is_left_untouched(options: MembershipOptions) -> None:
    """A version that goes back must not lose what the newer one wrote."""

    async def open_it() -> None:
        async with Membership(options):
            pass

    asyncio.run(open_it())
    with sqlite3.connect(options.path) as db:
        db.execute("PRAGMA user_version = 9")
    db.close()
    before = Path(options.path).read_bytes()
    with pytest.raises(MembershipError, match="newer bridged"):
        asyncio.run(open_it())
    assert Path(options.path).read_bytes() == before


async def test_a_file_of_the_first_format_is_taken_over(options: MembershipOptions) -> None:
    """With who is in it; what it was written to is known of the last target only, and remembered from then on."""
    async with Membership(options) as membership:
        await hear(membership, page("members", "abc"))
        await deliver(membership)
    with sqlite3.connect(options.path) as db:
        db.execute("ALTER TABLE members DROP COLUMN elsewhere")
        db.execute("DELETE FROM meta WHERE name = 'targets'")
        db.execute("PRAGMA user_version = 1")
    db.close()
    async with Membership(msgspec.structs.replace(options, target="b")) as membership:
        await merged(membership)
        assert await deliver(membership) == "abc"
        await hear(membership, page("members", "ab", "s2"))
        await deliver(membership)
    async with Membership(options) as membership:
        await merged(membership)
        assert await deliver(membership) == "abc"
        await counted(membership)


async def test_a_foreign_file_is_left_untouched(options: MembershipOptions) -> None:
    """A spool, say."""
    with sqlite3.connect(options.path) as db:
        db.execute("CREATE TABLE segments (id)")
        db.execute("PRAGMA user_version = 1")
    db.close()
    with pytest.raises(MembershipError, match="not a file of bridged's cohorts"):
        await Membership(options).__aenter__()


async def test_a_full_file_refuses_pages_and_recovers(options: MembershipOptions) -> None:
    """What has come is kept; what can't be kept is Mixpanel's to send again."""
    small = msgspec.structs.replace(options, max_bytes=2**20)
    async with Membership(small) as membership:
        refused = taken = 0
        for number in range(400):
            long = Page(
                action="add_members", cohort="1", session=f"s{number}", ids=[f"{number}-{i:0>90}" for i in range(50)]
            )
            try:
                await membership.receive(long)
                taken += 50
            except MembershipError:
                refused += 50
        assert refused
        assert taken
        assert not membership.failed
    async with Membership(options) as membership:
        await merged(membership)
        assert membership.figures.members == taken
        await counted(membership)


async def test_a_full_disk_is_told_once(options: MembershipOptions) -> None:
    """One line in the log until something was written again, however often it is tried."""

    def limit(db: sqlite3.Connection, pages: int) -> None:
        db.execute(f"PRAGMA max_page_count = {pages}")

    async with Membership(options) as membership:
        with capture_logs() as logged:
            for episode in (1, 2):
                await membership.run(limit, 1)
                for attempt in range(5):
                    await until(lambda: not membership.full, "another try")
                    ids = [f"{episode}-{attempt}-{i:0>90}" for i in range(5000)]
                    with pytest.raises(MembershipError):
                        await membership.receive(Page(action="add_members", cohort="1", session="s", ids=ids))
                assert [line["event"] for line in logged] == ["cohorts_full"] * episode
                await membership.run(limit, 2**30)
                await until(lambda: not membership.full, "another try")
                await hear(membership, page("members", f"a{episode}"))


async def test_a_file_that_another_process_has_locked(options: MembershipOptions) -> None:
    """`sqlite3` with an open transaction, or a VACUUM: pages are refused until it is over, and come in again then."""
    async with Membership(options) as membership:
        await hear(membership, page("members", "ab"))
        await membership.run(lambda db: db.execute("PRAGMA busy_timeout = 10"))  # else it waits for 5 s
        with contextlib.closing(sqlite3.connect(options.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(MembershipError, match="database is locked"):
                await membership.receive(page("add_members", "c", "s2"))
            with pytest.raises(MembershipError, match="database is locked"):
                await membership.take(-1, 10, [])
            other.execute("COMMIT")
        await until(lambda: not membership.full, "another try")
        await hear(membership, page("add_members", "c", "s2"))
        assert await wanted(membership) == "abc"
        assert not membership.failed


async def test_unknown_cohorts_are_named(membership: Membership) -> None:
    """A plain id is enough as long as one project has it."""
    await hear(membership, page("members", "a"))
    with pytest.raises(UnknownCohort, match="no cohort '5'"):
        await membership.show("5")
    await hear(membership, page("members", "a", project="118"))
    with pytest.raises(UnknownCohort, match="several projects"):
        await membership.show("777")
    assert (await membership.show("118:777")).cohort.members == 1


async def test_pages_come_while_others_are_merged(membership: Membership) -> None:
    """Every page is answered, and the group of those that came together is one commit."""
    pages = [page("members", [f"u{n}-{i}" for i in range(100)], "s1", n + 1, 50) for n in range(50)]  # type: ignore[arg-type]
    await asyncio.gather(*[membership.receive(each) for each in pages])
    await until(lambda: membership.figures.members == 5000, "the merge", 30)
    assert membership.rows[0].pages == 50
    await merged(membership)
    await counted(membership)
