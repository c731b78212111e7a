"""The path from intake to settlement as a state machine: whatever happens in whatever order, every event is in one place.

Real: the intake, the spool and its SQLite file, the backlog, the delivery, the dead letters, the archive. Made up: the
time, which passes only when nothing else is to be done, and Mixpanel, which keeps each request until a rule answers it.
`BRIDGED_MODEL_RUNS=10000 BRIDGED_MODEL_STEPS=50` is the long run.
"""

import asyncio
import contextlib
import gzip
import os
import random
import re
import selectors
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import msgspec
from conftest import NAMES
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bridged.apart import apart
from bridged.backlog.archive import Archive
from bridged.backlog.backlog import Backlog
from bridged.backlog.dead_letters import DeadLetters, Filter
from bridged.backlog.segment import lines
from bridged.backlog.spool import Spool, SpoolOptions
from bridged.clock import Clock
from bridged.currents.table import EVENT_TYPES
from bridged.delivery import archiver, aside
from bridged.delivery.delivery import Delivery, DeliveryOptions
from bridged.delivery.pacing import Pace, PaceLimits
from bridged.errors import SpoolError
from bridged.intake import Intake
from bridged.mixpanel.mapping import EventMapping, MappingSettings
from bridged.mixpanel.verdicts import Delivered, Failure, Halt, Reject, Retry, Split

MOST_ASIDE = aside._MOST
START_S = 1_700_000_000
MAX_AGE_S = 60.0
PROBE_S = 10.0
KINDS = ("users.behaviors.CustomEvent", "users.messages.email.Open", "users.nobody.knows.This")
MAPPING = EventMapping(EVENT_TYPES, MappingSettings(token="example-token"))
INSERT_ID = re.compile(rb'"(?:\$insert_id|id)":"e-(\d+)"')


class Selector(selectors.DefaultSelector):
    """Time passes at once when there is nothing to do; while a thread works, it stands still."""

    now = 0.0
    busy = 0

    def select(self, timeout=None):
        found = super().select(0)
        if found or timeout == 0:
            return found
        if self.busy or timeout is None:
            return super().select(0.05)
        self.now += max(timeout, 1e-6)
        return []


class Loop(asyncio.SelectorEventLoop):
    """An event loop on the made-up time."""

    def __init__(self):
        self.made_up = Selector()
        super().__init__(self.made_up)

    def time(self):
        return self.made_up.now

    @contextlib.contextmanager
    def working(self):
        """A thread has something to do."""
        self.made_up.busy += 1
        try:
            yield
        finally:
            self.made_up.busy -= 1

    def run_in_executor(self, executor, func, *args):
        future = super().run_in_executor(executor, func, *args)
        self.made_up.busy += 1
        future.add_done_callback(self._worked)
        return future

    def _worked(self, _future):
        self.made_up.busy -= 1


async def counted_apart(work, name):
    """In the place of `apart`: time stands still for that thread, too."""
    loop = asyncio.get_running_loop()
    with loop.working() if isinstance(loop, Loop) else contextlib.nullcontext():
        return await apart(work, name)


archiver.apart = counted_apart


def numbers(data):
    """The events in some lines."""
    return [int(found) for found in INSERT_ID.findall(data)]


class Crash(Exception):
    """The end of a process, as its threads see it."""


class Mixpanel:
    """In the transport's place. Requests wait here until the machine answers them."""

    def __init__(self):
        self.target = object()  # as whom: the delivery compares it
        self.waiting = []  # (lines, future)
        self.stored = {}  # number: the bytes

    async def ask(self):
        """Only events are answered here."""
        return Retry("network", "no answer")

    async def send(self, body, events, insert_ids):
        """Never raises but for cancellation."""
        sent = gzip.decompress(body).splitlines()
        assert len(sent) == events
        entry = (sent, asyncio.get_running_loop().create_future())
        self.waiting.append(entry)
        try:
            return await entry[1]
        finally:
            self.waiting.remove(entry)

    def store(self, sent):
        """Takes events; those that it has are repetitions, which must be the same bytes."""
        for line in sent:
            (number,) = numbers(line)
            assert self.stored.setdefault(number, line) == line


class PathModel(RuleBasedStateMachine):
    """What was accepted, and where it may be."""

    @initialize(
        ring_bytes=st.sampled_from([0, 400, 10**6]),
        on_expiry=st.sampled_from(["archive", "drop", "keep"]),
        batch=st.sampled_from([3, 10]),
        most_aside=st.sampled_from([0, MOST_ASIDE]),
    )
    def open_first(self, ring_bytes, on_expiry, batch, most_aside):
        aside._MOST = most_aside
        self.loop = Loop()
        self.folder = Path(tempfile.mkdtemp(prefix="bridged-model-"))
        self.generation = 0
        self.ring_bytes, self.on_expiry, self.batch = ring_bytes, on_expiry, batch
        self.jumped_s = 0.0
        self.full = self.hasty = False
        self.number = 0
        self.accepted = Counter()  # by number: how often; more than once if it was replayed from an archive
        self.skipped = 0
        self.born = {}  # by number: true time of its acceptance
        self.asked = []  # (numbers, skipped, future): not known to be on disk
        self.purged = Counter()
        self.expired = set()  # numbers that a settlement called expired
        self.archived = set()  # numbers that were ever in an archive file
        self.mixpanel = Mixpanel()
        self.run(self.open())

    def copy_files(self):
        """What a crash in this moment leaves. The ballast is only moved: it is large, and nothing is read from it."""
        left = self.folder / str(self.generation + 1)
        shutil.copytree(self.path.parent, left, ignore=shutil.ignore_patterns("*.reserve"))
        for ballast in self.path.parent.glob("*.reserve"):
            os.link(ballast, left / ballast.name)

    def run(self, awaitable):
        return self.loop.run_until_complete(awaitable)

    @property
    def path(self):
        return self.folder / str(self.generation) / "spool.db"

    @property
    def archive(self):
        return self.folder / "archive"

    async def open(self):
        loop, options = self.loop, SpoolOptions(path=str(self.path), synchronous="OFF")
        # The daemon's clocks: the wall clock of this machine may be set.
        clock = Clock(lambda: START_S + loop.time() + self.jumped_s, loop.time)
        self.spool = spool = Spool(options, NAMES, clock.latest)
        run, settle = spool.run, spool.settle

        async def counted(function, *args):
            with loop.working():
                return await run(function, *args)

        def watched(settlement):
            if settlement.expired:
                for number in numbers(b"\n".join(lines(settlement.segments))):
                    assert loop.time() - self.born[number] >= MAX_AGE_S - 1e-3, "expired too soon"
                    self.expired.add(number)
            settle(settlement)

        spool.run, spool.settle = counted, watched
        with loop.working():
            await spool.__aenter__()
        self.backlog = Backlog(spool, self.ring_bytes, clock.latest)
        self.delivery = Delivery(
            self.backlog,
            spool,
            self.mixpanel,
            Pace(PaceLimits(max_concurrency=3), random.Random(0)),
            DeliveryOptions(
                max_batch_events=self.batch,
                flush_interval_s=0.5,
                probe_interval_s=PROBE_S,
                max_age_s=MAX_AGE_S,
                on_expiry=self.on_expiry,
            ),
            Archive(str(self.archive)),
            lambda code: NAMES.get(code, ""),
            clock.earliest,
        )
        self.intake = Intake(MAPPING, spool, self.batch, clock.latest)
        self.letters = DeadLetters(spool, self.intake.replay, clock.latest)
        self.delivering = asyncio.create_task(self.delivery.run())
        await self.quiet()

    async def quiet(self):
        """Everything that can be done without time passing is done."""
        calm = 0
        while calm < 15:
            await asyncio.sleep(0)
            calm = 0 if self.loop.made_up.busy else calm + 1
        assert not self.delivering.done(), self.delivering
        assert not self.spool.failed
        self.hear()

    def hear(self):
        """What is known to be on disk is promised."""
        for entry in [entry for entry in self.asked if entry[2].done()]:
            self.asked.remove(entry)
            taken, skipped, future = entry
            if future.exception() is None:
                self.promise(taken)
                self.skipped += skipped

    def promise(self, taken):
        for number in taken:
            self.accepted[number] += 1

    async def close(self):
        """Ends the delivery without a word, and lets go of the spool."""
        self.delivering.cancel()
        await asyncio.gather(self.delivering, return_exceptions=True)
        with self.loop.working():
            await self.spool.__aexit__(None, None, None)

    async def rows(self):
        """What is in the file: the numbers of the events that wait, and of the dead letters."""

        def letters(db):
            return b"\n".join(event for (event,) in db.execute("SELECT event FROM dead_letters"))

        segments, _ = await self.spool.read_after(0, 2**40)
        return Counter(numbers(b"\n".join(lines(segments)))), Counter(numbers(await self.spool.run(letters)))

    def teardown(self):
        if hasattr(self, "delivering"):
            try:
                self.run(self.drain())
            finally:
                self.run(self.close())
        if hasattr(self, "loop"):
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()
            shutil.rmtree(self.folder)
        aside._MOST = MOST_ASIDE

    async def drain(self):
        """Whatever happened before: when Mixpanel takes everything, nothing waits soon after."""
        await self.set_full(False)
        await asyncio.sleep(5)
        # A success: what was refused while nothing was understood is tried again after one.
        await self.take([KINDS[0]])
        self.delivery.credentials_changed()
        for _ in range(300):
            for sent, future in list(self.mixpanel.waiting):
                self.mixpanel.store(sent)
                future.set_result(Delivered())
            await self.quiet()
            if not self.backlog.events and not self.asked:
                break
            await asyncio.sleep(1)
        assert self.backlog.events == 0
        await self.check()

    async def take(self, kinds, anonymous=0):
        taken, body = [], []
        for n, kind in enumerate([*kinds, *[KINDS[0]] * anonymous]):
            number, self.number = self.number, self.number + 1
            user = {"external_user_id": f"user-{number % 3}"} if n < len(kinds) else {"user_id": "x"}
            event = {"event_type": kind, "id": f"e-{number}", "time": START_S - 60, "user": user}
            body.append(msgspec.json.encode(event | {"properties": {"name": "bought"}}))
            if n < len(kinds):
                taken.append(number)
        with contextlib.suppress(SpoolError):
            self.ask(taken, anonymous, self.intake.accept_lines(body))

    def ask(self, taken, skipped, future):
        """Notes what is on its way to the disk, and when it gets there."""
        future.add_done_callback(lambda _: self.born.update(dict.fromkeys(taken, self.loop.time())))
        self.asked.append((taken, skipped, future))

    async def set_full(self, full):
        self.full = full
        pages = "SELECT page_count FROM pragma_page_count"

        def limit(db):
            most = db.execute(pages).fetchone()[0] if full else 2**20
            db.execute(f"PRAGMA max_page_count = {most}").fetchall()

        await self.spool.run(limit)

    # -- what may happen ----------------------------------------------------------------------------------------------

    @rule(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=5), anonymous=st.integers(0, 1))
    def accept(self, kinds, anonymous):
        """Comes in, is committed, and waits until it is due."""
        self.run(self.take(kinds, anonymous))
        self.run(self.quiet())
        self.run(asyncio.sleep(0.6))
        self.run(self.quiet())

    @rule(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))
    def accept_in_haste(self, kinds):
        """Comes in; what comes next doesn't wait for the commit."""
        self.run(self.take(kinds))
        self.hasty = True

    @rule(
        which=st.integers(0, 2),
        verdict=st.sampled_from(["ok", "partial", "all", "odd", "large", "rate", "server", "lie", "halt"]),
    )
    def answer(self, which, verdict):
        """Mixpanel answers one of the requests."""
        # No preconditions: a thread has its say in what waits when, and hypothesis wants to see the same choices again.
        if not self.mixpanel.waiting:
            return
        sent, future = self.mixpanel.waiting[which % len(self.mixpanel.waiting)]
        match verdict:
            case "ok":
                self.mixpanel.store(sent)
                future.set_result(Delivered())
            case "partial" | "all":
                every = 1 if verdict == "all" else 2
                refused = {at: Failure("properties", "no") for at in range(0, len(sent), every)}
                self.mixpanel.store([line for at, line in enumerate(sent) if at not in refused])
                future.set_result(Reject(refused))
            case "odd":
                future.set_result(Split("nobody understands this"))
            case "large":
                future.set_result(Split("too large", None, too_large=True))
            case "rate":
                future.set_result(Retry("rate", "429"))
            case "server":
                future.set_result(Retry("server", "503"))
            case "lie":  # it took everything, and the answer was lost
                self.mixpanel.store(sent)
                future.set_result(Retry("network", "no answer"))
            case "halt":
                future.set_result(Halt(401, "unauthorized"))
        self.run(self.quiet())

    @rule(which=st.integers(0, 2))
    def deliver(self, which):
        """As above: it happens more often."""
        self.answer(which, "ok")

    @rule(probes=st.sampled_from([1, 3, 8]))
    def credentials_expire(self, probes):
        """Everything that is asked is refused, for a while."""
        for _ in range(probes):
            for _, future in list(self.mixpanel.waiting):
                future.set_result(Halt(401, "unauthorized"))
            self.run(self.quiet())
            self.run(asyncio.sleep(PROBE_S))
        self.run(self.quiet())

    @rule(seconds=st.sampled_from([0.6, 2.0, 11.0, 30.0, 65.0]))
    def time_passes(self, seconds):
        self.run(asyncio.sleep(seconds))
        self.run(self.quiet())

    @rule(hours=st.sampled_from([-48, -1, 1, 48]))
    def wall_clock_is_set(self, hours):
        """It doesn't count as time that passed."""
        self.jumped_s += hours * 3600
        self.run(self.quiet())

    @rule()
    def credentials_change(self):
        """A halt asks at once whether they work."""

        async def changed():
            self.delivery.credentials_changed()
            await self.quiet()

        self.run(changed())

    @rule(full=st.booleans())
    def disk_is_full(self, full):
        """Not a page more than now; or room again."""
        self.run(self.set_full(full))
        self.run(self.quiet())

    @rule(orderly=st.booleans())
    def restart(self, orderly):
        """A crash is a copy of the files between two transactions: what is in memory is gone."""

        def copy(_db):
            self.copy_files()

        async def ended():
            if orderly:
                await self.close()
                self.hear()
                await self.start()
                return
            self.hear()  # what was acked by now is promised
            await self.spool.run(copy)
            await self.start_from_copy()

        self.run(ended())

    @rule(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3), committed=st.booleans())
    def crash_in_a_commit(self, kinds, committed):
        """A crash in the midst of the writer's work, just before a transaction or just behind it: what is acked by then is there."""
        spool, transact = self.spool, self.spool._transact

        def crash(*args):
            if committed:
                transact(*args)
            self.copy_files()
            raise Crash

        async def crashed():
            spool._transact = crash
            await self.take(kinds)
            while not spool.failed and (self.loop.made_up.busy or spool._wake.is_set()):
                await asyncio.sleep(0.001)  # time passes: on a full disk the writer sleeps
            if spool.failed:
                await self.start_from_copy()
            else:  # a full disk: nothing was taken
                spool._transact = transact

        self.run(crashed())

    async def start(self):
        """A start goes by the wall clock that it finds: what happened to it before is the past."""
        self.jumped_s = 0.0
        self.full = False
        await self.open()

    async def start_from_copy(self):
        """What a crash left. What was acked by now is promised; what wasn't may be there, as a whole, or not."""
        unacked = []
        for taken, skipped, future in self.asked:
            if future.done() and future.exception() is None:
                self.promise(taken)
                self.skipped += skipped
            else:
                unacked.append((taken, skipped, future))
        self.asked.clear()
        await self.close()
        shutil.rmtree(self.path.parent)
        self.generation += 1
        await self.start()
        waiting, letters = await self.rows()
        for taken, _, future in unacked:
            there = {n for n in taken if n in waiting or n in letters or n in self.mixpanel.stored}
            assert there in (set(), set(taken)), future
            if there:
                self.promise(taken)

    @rule()
    def replay_dead_letters(self):
        """Those that Mixpanel refused wait again; those that nobody can map stay."""

        async def replayed():
            await self.letters.replay(Filter(stage="mixpanel"))

        with contextlib.suppress(SpoolError):
            self.run(replayed())
        self.run(self.quiet())

    @rule()
    def purge_dead_letters(self):
        async def purged():
            _, before = await self.rows()
            try:
                await self.letters.purge(Filter())
            finally:
                _, after = await self.rows()
                self.purged += before - after

        with contextlib.suppress(SpoolError):
            self.run(purged())

    @rule()
    def replay_archives(self):
        """As `bridged replay`: events that are accepted anew; a file that was taken is put away."""
        for file in self.archive.glob("*.gz"):
            archived = gzip.decompress(file.read_bytes()).splitlines()
            with contextlib.suppress(SpoolError):
                self.run(self.replay_file(file, archived))

    async def replay_file(self, file, archived):
        future, _ = self.intake.accept_archived(archived)
        self.ask(numbers(b"\n".join(archived)), 0, future)
        await self.quiet()
        if future.done() and future.exception() is None:
            file.unlink()

    # -- what must always hold ----------------------------------------------------------------------------------------

    @invariant()
    def every_event_is_in_one_place(self):
        if self.hasty:
            self.hasty = False
        else:
            self.run(self.check())

    async def check(self):
        """The conservation law per type, the rows, and the ledger: what was promised is somewhere, and where it should be."""
        await self.quiet()
        if self.asked:  # a full disk makes it wait
            return
        accounts = self.spool.accounts
        assert accounts.imbalance() == 0
        assert accounts.problems(NAMES) == []
        total = accounts.total
        assert total("accepted") == self.accepted.total() + self.skipped
        assert total("skipped") == self.skipped
        waiting, letters = await self.rows()
        assert self.spool.damaged == 0
        assert total("waiting") == waiting.total() == self.backlog.events
        assert total("dead_lettered") == letters.total() + self.purged.total()
        for file in self.archive.glob("*.gz"):
            self.archived.update(numbers(gzip.decompress(file.read_bytes())))
        expired = self.archived if self.on_expiry == "archive" else self.expired
        # What is nowhere in the file was delivered, or expired.
        gone = self.accepted.copy()
        for place in (waiting, letters, self.purged):
            gone.subtract(place)
        assert min(gone.values(), default=0) >= 0, "an event is in two places"
        assert gone.total() == total("delivered") + total("expired")
        assert total("expired") == 0 or self.on_expiry != "keep"
        for number, times in gone.items():
            assert times == 0 or number in self.mixpanel.stored or number in expired, f"event {number} is lost"


PathModel.TestCase.settings = settings(
    max_examples=int(os.environ.get("BRIDGED_MODEL_RUNS", "100")),
    stateful_step_count=int(os.environ.get("BRIDGED_MODEL_STEPS", "30")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestPathModel = PathModel.TestCase
