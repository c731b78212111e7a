"""The membership against a model: pages in any order, repeats, new sessions, every verdict, and a crash at any moment."""

import os
import random
import shutil
import sqlite3
import tempfile
from pathlib import Path

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bridged.cohorts import looking, merging, tables, taking
from bridged.cohorts.taking import Block, Settled, User
from bridged.cohorts.webhook import Page

COHORTS = ["7", "8"]
USERS = list("abcdefgh")
DAY = "2026-01-01"


class Round:
    """A session as the model knows it."""

    def __init__(self, number: int, session: str, action: str, total: int) -> None:
        self.number, self.session, self.action, self.total = number, session, action, total
        self.pages: set[int] = set()
        self.over = False


class Model:
    """What Mixpanel has said, page by page, in the simplest way that could work."""

    def __init__(self) -> None:
        self.numbers = 0
        self.rounds: dict[str, list[Round]] = {cohort: [] for cohort in COHORTS}
        self.spoken: dict[str, dict[str, tuple[bool, int]]] = {cohort: {} for cohort in COHORTS}  # in or out, by whom
        self.names: dict[str, str] = {}
        self.unsure: set[tuple[str, str]] = set()

    def hear(self, page: Page) -> None:
        rounds = self.rounds[page.cohort]
        known = next(
            (r for r in reversed(rounds) if page.session and (r.session, r.action) == (page.session, page.action)), None
        )
        newer = rounds[rounds.index(known) + 1 :] if known else []
        if known and (
            any(each.action in ("members", "forget", page.action) for each in newer)
            or (newer and page.page in known.pages)
        ):
            return
        if known is None or known.total != page.total:
            for each in rounds:
                each.over |= page.action in ("members", each.action)
            self.numbers += 1
            known = Round(self.numbers, page.session, page.action, page.total)
            rounds.append(known)
        if page.name:
            self.names[page.cohort] = page.name
        spoken = self.spoken[page.cohort]
        for user in page.ids:
            into = page.action != "remove_members"
            before = spoken.get(user)
            if before is None or before[1] < known.number:
                if into or before is not None:
                    spoken[user] = (into, known.number)
            elif into and not before[0]:
                # Whoever was out on both sides is forgotten: then an older round that speaks for the first time is believed.
                self.unsure.add((page.cohort, user))
        known.pages.add(page.page)
        if not known.over and known.pages >= set(range(1, known.total + 1)):
            known.over = True
            if page.action == "members":
                for user, (_, number) in list(spoken.items()):
                    if number < known.number:
                        spoken[user] = (False, known.number)

    def forget(self, cohort: str) -> None:
        self.numbers += 1
        self.rounds[cohort].append(Round(self.numbers, "", "forget", 0))
        for user in self.spoken[cohort]:
            self.spoken[cohort][user] = (False, self.numbers)
        self.unsure = {each for each in self.unsure if each[0] != cohort}

    def lose(self, cohort: str) -> None:
        """Nothing is known of it any more, its sessions neither."""
        self.rounds[cohort] = []
        self.spoken[cohort] = {}
        self.unsure = {each for each in self.unsure if each[0] != cohort}

    def wanted(self, user: str) -> set[str]:
        return {self.names[cohort] for cohort, spoken in self.spoken.items() if spoken.get(user, (False, 0))[0]}


class Cohorts(RuleBasedStateMachine):
    """One file, a Braze that carries out what it is sent, and the model."""

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.dice = random.Random(seed)
        self.model = Model()
        self.target = "a"
        self.brazes: dict[str, dict[str, set[str]]] = {}  # by target
        # By target, (user, cohort's name): Braze refused to take it out, or nobody ever asks it to.
        self.keeps: dict[str, set[tuple[str, str]]] = {}
        self.billed = 0
        self.flights: list[Block] = []
        self.sessions = 0
        self.history: list[Page] = []
        self.open()

    def open(self) -> None:
        self.db = sqlite3.connect(self.folder / "cohorts.db", isolation_level=None)
        tables.set_up(self.db, self.folder / "cohorts.db", 2**30)
        # What a crash of the process does to the file doesn't depend on it.
        self.db.execute("PRAGMA synchronous = OFF")
        self.braze = self.brazes.setdefault(self.target, {})
        self.kept = self.keeps.setdefault(self.target, set())
        with tables.transaction(self.db):
            merging.aim(self.db, self.target)

    # -- from Mixpanel ----------------------------------------------------------------------------------------------

    def receive(self, page: Page) -> None:
        head, ids = msgspec.json.encode(merging.head_of(page)).decode(), msgspec.json.encode(page.ids).decode()
        there = "SELECT 1 FROM cohorts WHERE mixpanel_id = :id UNION ALL SELECT 1 FROM inbox WHERE json_extract(head, '$[2]') = :id"
        if not self.db.execute(there, {"id": page.cohort}).fetchone():
            # Forgotten, and out of Braze.
            self.model.lose(page.cohort)
        merging.receive(self.db, [(1.0, len(page.ids), head, ids)])
        self.model.hear(page)
        self.history.append(page)

    @rule(data=st.data())
    def late_repeat(self, data: st.DataObject) -> None:
        """A page that has come before, word for word."""
        if self.history:
            self.receive(data.draw(st.sampled_from(self.history)))

    @rule(cohort=st.sampled_from(COHORTS), ids=st.lists(st.sampled_from(USERS), min_size=2, max_size=6, unique=True))
    def diffs(self, cohort: str, ids: list[str]) -> None:
        """An add and a remove session of two pages each, at the same time."""
        self.sessions += 1
        name = self.model.names.get(cohort, "One")
        half = len(ids) // 2
        sent = [
            Page(
                action=action,
                cohort=cohort,
                session=f"{action[0]}{self.sessions}",
                page=at + 1,
                total=2,
                ids=of[at::2],
                name=name,
            )  # type: ignore[arg-type]
            for action, of in (("add_members", ids[:half]), ("remove_members", ids[half:]))
            for at in range(2)
        ]
        self.dice.shuffle(sent)
        for each in sent:
            self.receive(each)

    @rule(
        cohort=st.sampled_from(COHORTS),
        action=st.sampled_from(["members", "members", "add_members", "remove_members"]),
        session=st.integers(0, 3),
        at=st.integers(1, 3),
        total=st.integers(1, 3),
        ids=st.lists(st.sampled_from(USERS), max_size=6),
        name=st.sampled_from(["", "", "One", "Two"]),
    )
    def page(self, cohort: str, action: str, session: int, at: int, total: int, ids: list[str], name: str) -> None:
        """A page of the newest session or of one of the three before, or of none."""
        name = name or self.model.names.get(cohort, "One")
        of = f"s{max(0, self.sessions - session)}" if session < 3 else ""
        self.receive(Page(action=action, cohort=cohort, session=of, page=at, total=total, ids=ids, name=name))  # type: ignore[arg-type]

    @rule()
    def new_session(self) -> None:
        self.sessions += 1

    @rule(cohort=st.sampled_from(COHORTS), ids=st.sets(st.sampled_from(USERS)), pages=st.integers(1, 3))
    def full_copy(self, cohort: str, ids: set[str], pages: int) -> None:
        """A whole session, its pages in any order, one of them twice."""
        self.sessions += 1
        name = self.model.names.get(cohort, "One")
        session = f"s{self.sessions}"
        sent = [
            Page(
                action="members",
                cohort=cohort,
                session=session,
                page=at + 1,
                total=pages,
                ids=sorted(ids)[at::pages],
                name=name,
            )
            for at in range(pages)
        ]
        sent.append(self.dice.choice(sent))
        self.dice.shuffle(sent)
        for each in sent:
            self.receive(each)

    @rule(steps=st.integers(1, 4))
    def step(self, steps: int) -> None:
        """Some of what waits is merged or walked."""
        for _ in range(steps):
            if not merging.walk(self.db, by_name=True):
                merging.merge(self.db, by_name=True)

    def drain(self) -> None:
        while merging.walk(self.db, by_name=True) or merging.merge(self.db, by_name=True)[0]:
            pass

    @rule(cohort=st.sampled_from(COHORTS))
    def forget(self, cohort: str) -> None:
        self.drain()
        looking.begin(self.db, [("", cohort)], "forget", 1.0)
        if self.db.execute("SELECT count(*) FROM cohorts WHERE mixpanel_id = ?", (cohort,)).fetchone()[0]:
            self.leave_behind(cohort, set(self.brazes) - {self.target})
            self.model.forget(cohort)
            self.drain()

    def leave_behind(self, cohort: str, targets: set[str]) -> None:
        """A cohort that is forgotten is taken out of the target of then: what others have of it they keep."""
        for target in targets:
            for user in self.model.spoken[cohort]:
                self.keeps[target] |= {(user, name) for name in self.brazes[target].get(user, ())}

    @rule(cohort=st.sampled_from(COHORTS), kind=st.sampled_from(["resync", "retry"]))
    def again(self, cohort: str, kind: str) -> None:
        looking.begin(self.db, [("", cohort)], kind, 1.0)  # type: ignore[arg-type]

    # -- to Braze ---------------------------------------------------------------------------------------------------

    @rule(limit=st.integers(1, 5), after=st.integers(-1, 6))
    def take(self, limit: int, after: int) -> None:
        busy = [user.key for block in self.flights for user in block.users]
        block = taking.take_users(self.db, after, limit, busy, DAY, 0)
        assert not {user.key for user in block.users} & set(busy)
        if block.users:
            self.flights.append(block)

    def carry_out(self, block: Block, user: User) -> None:
        self.braze[user.external_id] = {block.cohorts[row.cohort].name for row in user.rows if row.wanted}
        self.kept -= {each for each in self.kept if each[0] == user.external_id}
        self.billed += 1

    def deliver(self, block: Block) -> None:
        result = Settled(day=DAY)
        for user in block.users:
            self.carry_out(block, user)
            result.sent += [
                (user.key, row.cohort, block.cohorts[row.cohort].version if row.wanted else 0)
                for row in user.rows
                if row.is_due
            ]
        taking.settle(self.db, [result], 1.0)

    @rule(data=st.data())
    def land(self, data: st.DataObject) -> None:
        """Each user of a flight meets a fate of its own, as after a split."""
        if not self.flights:
            return
        block = self.flights.pop(data.draw(st.integers(0, len(self.flights) - 1)))
        result = Settled(day=DAY)
        for user in block.users:
            due = [row for row in user.rows if row.is_due]
            match data.draw(st.sampled_from(["sent", "sent", "refused", "back", "lost", "lost unseen"])):
                case "sent":
                    self.carry_out(block, user)
                    version = {row.cohort: block.cohorts[row.cohort].version for row in due}
                    result.sent += [(user.key, row.cohort, version[row.cohort] if row.wanted else 0) for row in due]
                case "refused":
                    result.refused += [(user.key, row.cohort, row.sent, row.wanted) for row in due]
                    result.reasons.append((user.key, "no"))
                    self.kept |= {(user.external_id, block.cohorts[row.cohort].name) for row in due if not row.wanted}
                    result.refund += 1
                case "back":
                    result.back += [(user.key, row.cohort, row.sent) for row in due]
                    result.refund += 1
                case "lost":
                    self.carry_out(block, user)
                case "lost unseen":
                    pass
        taking.settle(self.db, [result], 1.0)

    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        """What was in flight was carried out, or wasn't; nobody will hear of it."""
        self.lose_flights(data)
        self.db.close()
        self.open()

    def lose_flights(self, data: st.DataObject) -> None:
        for block in self.flights:
            for user in block.users:
                if data.draw(st.booleans()):
                    self.carry_out(block, user)
        self.flights.clear()

    @rule(to=st.sampled_from("abc"), data=st.data())
    def retarget(self, to: str, data: st.DataObject) -> None:
        """A restart with another attribute, say, of which the file may know more or less."""
        self.lose_flights(data)
        if to != self.target:
            for (cohort,) in self.db.execute("SELECT mixpanel_id FROM cohorts WHERE forgotten = 1").fetchall():
                self.leave_behind(cohort, set(self.brazes))
        self.target = to
        self.db.close()
        self.open()

    # -- what always holds ------------------------------------------------------------------------------------------

    @invariant()
    def the_counts_are_those_of_the_rows(self) -> None:
        if not hasattr(self, "db"):
            return
        sums = ", ".join(f"coalesce(sum({tables._is('m', count)}), 0)" for count in tables.COUNTS)
        for cohort, *kept in self.db.execute(f"SELECT id, {', '.join(tables.COUNTS)} FROM cohorts").fetchall():
            assert list(self.db.execute(f"SELECT {sums} FROM members m WHERE cohort = ?", (cohort,)).fetchone()) == kept
        for row in looking.rows(self.db, 1.0):
            assert row.received == row.applied + row.no_id + row.too_long + row.stale
            assert row.members == row.in_braze + row.joining + row.rejected
        assert not self.db.execute("SELECT * FROM users WHERE key NOT IN (SELECT user FROM members)").fetchall()
        assert not self.db.execute("SELECT * FROM members WHERE wanted = 0 AND sent = 0 AND elsewhere = 0").fetchall()

    @invariant()
    def what_braze_bills_is_never_more_than_what_is_counted(self) -> None:
        if hasattr(self, "db"):
            assert taking.budget(self.db, DAY, 0).spent >= self.billed

    @rule()
    def settle_everything(self) -> None:
        """However it came here: when all is delivered, Braze has exactly what Mixpanel said."""
        for block in self.flights:
            self.deliver(block)
        self.flights.clear()
        self.drain()
        looking.begin(self.db, [("", cohort) for cohort in COHORTS], "retry", 1.0)
        self.drain()
        users, _ = taking.due_users(self.db, -1, 1000, rows=False)
        block = taking.take_users(self.db, -1, 1000, [], DAY, 0)
        assert len(block.users) == users
        self.deliver(block)
        assert taking.take_users(self.db, -1, 1000, [], DAY, 0).users == []
        for cohort, user in self.model.unsure:
            found = self.db.execute(
                "SELECT 1 FROM members m JOIN users u ON u.key = m.user JOIN cohorts c ON c.id = m.cohort"
                " WHERE c.mixpanel_id = ? AND u.external_id = ? AND m.wanted > 0",
                (cohort, user),
            ).fetchone()
            into, number = self.model.spoken[cohort][user]
            self.model.spoken[cohort][user] = (found is not None, number)
            assert into is False or found is not None
        self.model.unsure.clear()
        rows = "SELECT u.external_id, c.name FROM members m JOIN users u ON u.key = m.user JOIN cohorts c ON c.id = m.cohort"
        # A cohort that is forgotten is gone though Braze refused to take somebody out: nobody asks again.
        self.kept -= set(self.db.execute(f"{rows} WHERE m.sent <> 0 OR m.wanted > 0").fetchall())
        for user in USERS:
            kept = {name for of, name in self.kept if of == user}
            assert self.braze.get(user, set()) - kept == self.model.wanted(user) - kept, user

    def teardown(self) -> None:
        if hasattr(self, "db"):
            self.settle_everything()
            for target in list(self.brazes):
                self.target = target
                self.db.close()
                self.open()
                self.settle_everything()
            self.db.close()
            shutil.rmtree(self.folder)


TestCohorts = Cohorts.TestCase
TestCohorts.settings = settings(
    max_examples=int(os.environ.get("BRIDGED_MODEL_RUNS", "80")), stateful_step_count=50, deadline=None
)
