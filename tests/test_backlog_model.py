"""Backlog and spool against a model: whatever happens in whatever order, every event is in exactly one place."""

import asyncio
import contextlib
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
from conftest import NAMES
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bridged.backlog.backlog import Backlog
from bridged.backlog.segment import Batch, lines
from bridged.backlog.spool import DeadLetter, Intaken, Settlement, Spool, SpoolOptions

CODES = st.sampled_from([3, 5, 255])
SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


class BacklogModel(RuleBasedStateMachine):
    """The model: a queue of segments, the parcels that are out, and what became of the rest."""

    @initialize(ring_bytes=st.sampled_from([0, 100, 400, 10**6]))
    def open_first(self, ring_bytes):
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(prefix="bridged-model-"))
        self.path = self.folder / "0" / "spool.db"
        self.ring_bytes = ring_bytes
        self.number = 0
        self.queue = []  # segments in order, each a list of event names
        self.codes = {}
        self.out = []  # (parcel, its segments as in the queue)
        self.again = []  # the same, given back
        self.gone = {"delivered": set(), "dead_lettered": set()}
        self.run(self.open())

    def run(self, awaitable):
        return self.loop.run_until_complete(asyncio.wait_for(awaitable, 20))

    async def open(self):
        # No fsync: the model is about order and places; what a commit is worth is tested elsewhere.
        options = SpoolOptions(path=str(self.path), synchronous="OFF")
        self.spool = await Spool(options, NAMES).__aenter__()
        self.backlog = Backlog(self.spool, self.ring_bytes)

    def teardown(self):
        with contextlib.suppress(AttributeError):  # not even opened
            self.run(self.spool.__aexit__(None, None, None))
            self.loop.close()
            shutil.rmtree(self.folder)

    def batch(self, size, code):
        """New events, and the batch that holds them."""
        names = [f"e{self.number + n}" for n in range(size)]
        self.number += size
        self.codes |= dict.fromkeys(names, code)
        return names, self.as_batch(names)

    def as_batch(self, names):
        return Batch(b"".join(b"%s\n" % name.encode() for name in names), bytes(self.codes[name] for name in names))

    async def settled(self, settlement):
        """Settles, and waits for the commit."""
        before = self.spool.commits
        self.backlog.settle(settlement)
        while self.spool.commits == before:
            await asyncio.sleep(0)

    # -- what may happen ----------------------------------------------------------------------------------------------

    @rule(sizes=SIZES, code=CODES)
    def append(self, sizes, code):
        """One commit each, so that the model knows the segments."""
        for size in sizes:
            names, batch = self.batch(size, code)
            self.run(self.append_batch(batch))
            self.queue.append(names)

    async def append_batch(self, batch):
        await self.spool.append(Intaken([batch]))

    @precondition(lambda self: self.queue or self.again)
    @rule(max_events=st.integers(1, 10))
    def take(self, max_events):
        parcel = self.run(self.backlog.take(max_events, 10**6, 0.0))
        if self.again:
            expected, segments = self.again.pop(0)
            assert expected is None or parcel is expected
        else:
            count = len(parcel.segments)
            segments, self.queue = self.queue[:count], self.queue[count:]
            assert count == 1 or parcel.events <= max_events
        taken = [line.decode() for line in lines(parcel.segments)]
        assert taken == [name for segment in segments for name in segment]
        self.out.append((parcel, segments))

    @precondition(lambda self: not self.queue and not self.again)
    @rule()
    def take_nothing(self):
        """With nothing there, nobody is given anything; and who stops waiting loses nothing."""

        async def attempt():
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(self.backlog.take(10, 10**6, 0.0), 0.002)
            return None

        assert self.run(attempt()) is None

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def deliver(self, data):
        parcel, segments = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        self.run(self.settled(Settlement(parcel.segments, delivered=parcel.codes)))
        self.gone["delivered"] |= {name for segment in segments for name in segment}

    @precondition(lambda self: self.out)
    @rule(data=st.data(), every=st.integers(1, 3))
    def refuse_some(self, data, every):
        parcel, segments = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        names = [name for segment in segments for name in segment]
        refused = names[::every]
        letters = [DeadLetter(self.codes[name], "", "mixpanel", "no", name.encode()) for name in refused]
        delivered = [name for name in names if name not in refused]
        codes = bytes(self.codes[name] for name in delivered)
        self.run(self.settled(Settlement(parcel.segments, delivered=codes, dead_letters=letters)))
        self.gone["dead_lettered"] |= set(refused)
        self.gone["delivered"] |= set(delivered)

    @precondition(lambda self: any(parcel.events > 1 for parcel, _ in self.out))
    @rule()
    def split(self):
        at = next(at for at, (parcel, _) in enumerate(self.out) if parcel.events > 1)
        parcel, segments = self.out.pop(at)
        names = [name for segment in segments for name in segment]
        halves = [names[: len(names) // 2], names[len(names) // 2 :]]
        self.run(self.settled(Settlement(parcel.segments, parts=[self.as_batch(half) for half in halves])))
        # They come before everything, each alone. The parcels aren't known yet.
        self.again += [(None, [half]) for half in halves]

    @precondition(lambda self: self.out)
    @rule()
    def give_back(self):
        parcel, segments = self.out.pop(0)
        self.backlog.again(parcel)
        self.again.append((parcel, segments))

    @rule(orderly=st.booleans())
    def restart(self, orderly):
        """A crash is a copy of the files as they are while the spool is open."""
        number = int(self.path.parent.name) + 1
        crashed = self.folder / str(number)
        if not orderly:
            shutil.copytree(self.path.parent, crashed)
        self.run(self.spool.__aexit__(None, None, None))
        if not orderly:
            shutil.rmtree(self.path.parent)
            self.path = crashed / "spool.db"
        # Leases are memory: everything that wasn't settled is in the queue again, in the order of its rows.
        waiting = [segment for _, segments in [*self.out, *self.again] for segment in segments] + self.queue
        self.out, self.again = [], []
        self.run(self.open())
        read, _ = self.run(self.spool.read_after(0, 2**40))
        order = [lines([segment])[0].decode() for segment in read]
        assert sorted(order) == sorted(segment[0] for segment in waiting)
        self.queue = sorted(waiting, key=lambda segment: order.index(segment[0]))

    # -- what must always hold ----------------------------------------------------------------------------------------

    @invariant()
    def every_event_is_in_one_place(self):
        waiting = [name for segment in self.queue for name in segment]
        waiting += [name for _, segments in [*self.out, *self.again] for segment in segments for name in segment]
        accounts = self.spool.accounts
        assert accounts.imbalance() == 0
        assert accounts.total("accepted") == self.number
        assert accounts.total("waiting") == self.backlog.events == len(waiting)
        assert accounts.total("delivered") == len(self.gone["delivered"])
        assert accounts.total("dead_lettered") == len(self.gone["dead_lettered"]) == self.spool.dead_letters
        assert len(waiting) + len(self.gone["delivered"]) + len(self.gone["dead_lettered"]) == self.number

    @invariant()
    def the_file_holds_what_waits(self):
        def read(db):
            return db.execute("SELECT codes FROM segments").fetchall()

        stored = b"".join(codes for (codes,) in self.run(self.spool.run(read)))
        waiting = [name for segment in self.queue for name in segment]
        waiting += [name for _, segments in [*self.out, *self.again] for segment in segments for name in segment]
        assert sorted(stored) == sorted(self.codes[name] for name in waiting)


BacklogModel.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBacklogModel = BacklogModel.TestCase
