"""The backlog: what is taken, when, and in which order; the ring and the disk behind it are one queue."""

import asyncio
import random
import sqlite3

import pytest
from conftest import NAMES, until

from bridged.backlog.backlog import Backlog
from bridged.backlog.segment import Batch, lines
from bridged.backlog.spool import DeadLetter, Intaken, Settlement, Spool, SpoolOptions

CODE = 3


class Clock:
    """Wall clock that a test sets."""

    def __init__(self):
        self.now = 1_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    """For the spool and the backlog of a test."""
    return Clock()


@pytest.fixture
async def spool(tmp_path, clock):
    """One that tells the test's time."""
    async with Spool(SpoolOptions(path=str(tmp_path / "spool.db")), NAMES, clock) as opened:
        yield opened


def batch(*names, size=0):
    """Mapped events, one a name, each at least `size` bytes."""
    return Batch(b"".join(name.encode().ljust(size, b".") + b"\n" for name in names), bytes([CODE]) * len(names))


def names(parcel):
    """What a parcel holds."""
    return [line.rstrip(b".").decode() for line in lines(parcel.segments)]


async def put(spool, *batches):
    """One commit a batch: a segment each."""
    for each in batches:
        await spool.append(Intaken([each]))


async def take(backlog, max_events=100, max_bytes=10**6, flush_interval_s=0.0):
    """The next parcel; fails if it doesn't come."""
    return await asyncio.wait_for(backlog.take(max_events, max_bytes, flush_interval_s), 10)


def deliver(backlog, parcel):
    """What a success does."""
    backlog.settle(Settlement(parcel.segments, delivered=parcel.codes))


async def is_waiting(task):
    """Whether a task is still waiting after it had every opportunity."""
    await asyncio.sleep(0.05)
    return not task.done()


async def test_small_segments_are_joined_in_order(spool, clock):
    """What waits travels in one request, oldest first, and is leased: it isn't given twice."""
    backlog = Backlog(spool, 10**6, clock)
    await put(spool, batch("a", "b"), batch("c"), batch("d"))
    parcel = await take(backlog)
    assert names(parcel) == ["a", "b", "c", "d"]
    assert (parcel.events, parcel.raw_bytes, parcel.codes) == (4, 8, bytes([CODE]) * 4)
    assert backlog.ring.leased == 3

    again = asyncio.ensure_future(take(backlog))
    assert await is_waiting(again)
    await put(spool, batch("e"))
    assert names(await again) == ["e"]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_events": 3}, [["a", "b", "c"], ["d", "e"]]),
        ({"max_events": 2}, [["a", "b"], ["c"], ["d", "e"]]),
        ({"max_events": 1}, [["a", "b"], ["c"], ["d", "e"]]),  # a segment that is too large comes alone
        ({"max_bytes": 61}, [["a", "b", "c"], ["d", "e"]]),
        ({"max_bytes": 60}, [["a", "b"], ["c"], ["d", "e"]]),
        ({"max_bytes": 1}, [["a", "b"], ["c"], ["d", "e"]]),
    ],
)
async def test_a_parcel_stays_within_the_limits(spool, clock, limits, expected):
    """Segments are joined up to so many events and bytes, and never cut."""
    backlog = Backlog(spool, 10**6, clock)
    await put(spool, batch("a", "b", size=20), batch("c", size=18), batch("d", "e", size=20))

    assert [names(await take(backlog, **limits)) for _ in expected] == expected


async def test_it_waits_for_the_flush_interval(spool, clock):
    """A batch that isn't full waits for more, from the moment its oldest event was accepted."""
    backlog = Backlog(spool, 10**6, clock)
    await put(spool, batch("a"))
    taking = asyncio.ensure_future(take(backlog, max_events=3, flush_interval_s=5))
    assert await is_waiting(taking)
    clock.now += 4.9
    await put(spool, batch("b"))
    assert await is_waiting(taking)
    clock.now += 0.2
    await put(spool, batch("c", "d"))

    assert names(await taking) == ["a", "b"]  # c and d would be one too many


async def test_a_full_batch_does_not_wait(spool, clock):
    """Events or bytes enough for a request go at once."""
    backlog = Backlog(spool, 10**6, clock)
    await put(spool, batch("a"), batch("b"))
    assert names(await take(backlog, max_events=2, flush_interval_s=3600)) == ["a", "b"]
    await put(spool, batch("c", size=50))
    assert names(await take(backlog, max_bytes=50, flush_interval_s=3600)) == ["c"]


async def test_a_clock_that_is_set_back_makes_nobody_wait(spool, clock):
    """Segments from the future are due at once, not when the clock gets there."""
    backlog = Backlog(spool, 10**6, clock)
    await put(spool, batch("a"))
    clock.now -= 3600

    assert names(await take(backlog, flush_interval_s=30)) == ["a"]


async def test_flush_ends_the_waiting(spool, clock):
    """At the end nothing waits for company."""
    backlog = Backlog(spool, 10**6, clock)
    await put(spool, batch("a"))
    taking = asyncio.ensure_future(take(backlog, flush_interval_s=3600))
    assert await is_waiting(taking)
    backlog.flush()

    assert names(await taking) == ["a"]


async def test_a_parcel_to_send_again_comes_first(spool, clock):
    """It is the same parcel, it needs no new event to be noticed, and it needn't be full."""
    backlog = Backlog(spool, 10**6, clock)
    await put(spool, batch("a"))
    first = await take(backlog)
    taking = asyncio.ensure_future(take(backlog, flush_interval_s=3600))
    await put(spool, batch("b"))
    assert await is_waiting(taking)
    backlog.again(first)

    assert await taking is first


@pytest.mark.parametrize("ring_bytes", [0, 1, 200, 10**6])
async def test_the_order_is_kept_whatever_fits_into_memory(spool, clock, ring_bytes):
    """Ring and disk are one queue: nothing is given twice, passed over or out of order."""
    backlog = Backlog(spool, ring_bytes, clock)
    expected = [f"e{n}" for n in range(60)]
    taken = []
    for at in range(0, 60, 6):
        await put(spool, *[batch(name, size=30) for name in expected[at : at + 6]])
        for _ in range(2):
            parcel = await take(backlog, max_events=2)
            taken += names(parcel)
            deliver(backlog, parcel)
    while len(taken) < 60:
        taken += names(await take(backlog, max_events=2))
    assert taken == expected


async def test_the_ring_is_bounded(spool, clock):
    """An outage grows the file, not the memory."""
    backlog = Backlog(spool, 5_000, clock)
    for n in range(30):
        await put(spool, batch(*[f"{n}-{m}" for m in range(100)]))
        assert backlog.ring.bytes <= 5_000
    assert backlog.on_disk > 10
    await take(backlog, max_events=100)
    segment = 1_000

    assert backlog.ring.bytes <= 5_000 + segment


async def test_a_restart_gives_everything_that_wasnt_settled(tmp_path, clock):
    """Leases are memory: after a crash what was in flight waits again, and only what was settled is gone."""
    options = SpoolOptions(path=str(tmp_path / "spool.db"))
    async with Spool(options, NAMES, clock) as spool:
        backlog = Backlog(spool, 10**6, clock)
        await put(spool, batch("a"), batch("b"), batch("c"), batch("d"))
        deliver(backlog, await take(backlog, max_events=1))
        assert names(await take(backlog, max_events=1)) == ["b"]
        parcel = await take(backlog, max_events=1)
        backlog.settle(Settlement(parcel.segments, parts=[batch("c1"), batch("c2")]))
        assert backlog.events == 4

    async with Spool(options, NAMES, clock) as spool:
        backlog = Backlog(spool, 10**6, clock)
        assert backlog.oldest_at() is None
        parcel = await take(backlog)
        assert names(parcel) == ["b", "d", "c1", "c2"]  # a restart forgets that parts were split
        assert backlog.oldest_at() == clock.now
        assert repr(backlog).startswith("<Backlog 0 in the ring, 0 on disk only, 4 leased")


@pytest.mark.parametrize("ring_bytes", [1, 10**6])
async def test_parts_are_not_joined_again(spool, clock, ring_bytes):
    """Parts of what was refused come before everything and each alone, also while the backlog is on disk."""
    backlog = Backlog(spool, ring_bytes, clock)
    await put(spool, batch("a", "b"), *[batch(f"e{n}") for n in range(5)])
    parcel = await take(backlog, max_events=2)
    assert names(parcel) == ["a", "b"]
    backlog.settle(Settlement(parcel.segments, parts=[batch("a"), batch("b")]))
    await put(spool, batch("last"))
    assert names(await take(backlog)) == ["a"]
    deliver(backlog, await take(backlog))
    await put(spool)
    rest = []
    while len(rest) < 6:
        rest += names(await take(backlog))

    assert rest == ["e0", "e1", "e2", "e3", "e4", "last"]


async def test_parts_are_as_old_after_a_restart(tmp_path, clock):
    """They come behind what is newer, and are told of, and expire, by their own age; what is younger stays."""
    options, hour_s = SpoolOptions(path=str(tmp_path / "spool.db")), 3600.0
    async with Spool(options, NAMES, clock) as spool:
        backlog = Backlog(spool, 10**6, clock)
        await put(spool, batch("a1", "a2"))
        accepted_at = clock.now
        clock.now += 40 * hour_s
        await put(spool, batch("b"), batch("c"))
        parcel = await take(backlog, max_events=2)
        backlog.settle(Settlement(parcel.segments, parts=[batch("a1"), batch("a2")], whole=parcel))
        await until(lambda: not spool.unsettled_bytes)
    clock.now += 10 * hour_s
    async with Spool(options, NAMES, clock) as spool:
        backlog = Backlog(spool, 10**6, clock)
        first = await backlog.take(1, 10**6, 0, halted=True)
        assert backlog.oldest_at() == accepted_at
        expired = []
        while (old := await backlog.exchange(first, clock.now - 48 * hour_s, 2000, 10**6)) is not None:
            expired += names(old)
            backlog.settle(Settlement(old.segments, expired=old.codes))
            first = await take(backlog)
        assert expired == ["a1", "a2"]
        assert backlog.oldest_at() == accepted_at + 40 * hour_s
        left = [*names(first), *[name for _ in range(backlog.ring.segments) for name in names(await take(backlog))]]
        assert sorted(left) == ["b", "c"]


async def test_parts_have_the_history_of_what_they_are_parts_of(spool, clock):
    """Also when a full disk makes the writer try settlements in another order."""
    backlog = Backlog(spool, 10**6, clock)
    await put(spool, batch("a", "b"), batch("c", "d"))
    parcels = [await take(backlog, max_events=2) for _ in range(2)]
    for strikes, parcel in enumerate(parcels):
        parcel.strikes = strikes
    transact, failures = spool._transact, [1, 2]

    def full(*arguments):
        if failures:
            failures.pop()
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        return transact(*arguments)

    spool._transact = full
    for parcel in parcels:
        one, other = names(parcel)
        backlog.settle(Settlement(parcel.segments, parts=[batch(one), batch(other)], whole=parcel))
    found = {}
    while len(found) < 4:
        part = await take(backlog)
        found |= dict.fromkeys(names(part), part.strikes)

    assert not failures
    assert found == {"a": 0, "b": 0, "c": 1, "d": 1}


async def test_parts_that_were_damaged_on_disk_are_settled_once(spool, clock):
    """A part that is out is in memory, and intact: reading past its row neither gives it again nor sets it aside."""
    backlog = Backlog(spool, 1, clock)
    await put(spool, batch("a", "b"), batch("c"), batch("d"))
    parcel = await take(backlog, max_events=2)
    backlog.settle(Settlement(parcel.segments, parts=[batch("a"), batch("b")]))
    await until(lambda: spool.commits == 4)
    parts = [await take(backlog), await take(backlog)]
    await spool.run(lambda db: db.execute("UPDATE segments SET block = X'00' WHERE id > 3"))
    await put(spool, batch("e"))
    rest = [names(await take(backlog, max_events=1)) for _ in range(3)]

    assert [names(part) for part in parts] == [["a"], ["b"]]
    assert rest == [["c"], ["d"], ["e"]]
    for part in parts:
        deliver(backlog, part)
    await until(lambda: backlog.events == 3)
    assert spool.damaged == spool.dead_letters == 0
    assert spool.accounts.problems(NAMES) == []


async def test_what_was_left_on_disk_comes_back(spool, clock):
    """Once, with what lies behind it and isn't out; not before the rows that were settled meanwhile are gone."""
    backlog = Backlog(spool, 10**6, clock)
    await put(spool, *[batch(f"e{n}") for n in range(6)])
    parcels = [await take(backlog, max_events=1) for _ in range(5)]
    clock.now += 5
    for at in (3, 1):
        backlog.leave(parcels[at])
    assert (backlog.left, backlog.ring.leased, backlog.oldest_at()) == (2, 3, clock.now - 5)
    assert names(await take(backlog)) == ["e5"]
    deliver(backlog, parcels[2])
    backlog.come_back()
    assert names(await take(backlog, max_events=1)) == ["e1"]
    assert backlog.left == 0
    await put(spool, batch("e6"))
    assert names(await take(backlog)) == ["e3", "e6"]
    assert spool.accounts.imbalance() == 0


@pytest.mark.parametrize("ring_bytes", [1, 10**6])
async def test_what_was_left_hides_nothing_that_was_never_taken(spool, clock, ring_bytes):
    """Parts have newer ids than what waits before them: when one comes back, all of that is still given, each once."""
    backlog = Backlog(spool, ring_bytes, clock)
    await put(spool, batch("a", "b"), *[batch(f"e{n}") for n in range(5)])
    parcel = await take(backlog, max_events=2)
    backlog.settle(Settlement(parcel.segments, parts=[batch("a"), batch("b")]))
    await put(spool, batch("last"))
    part = await take(backlog)
    assert names(part) == ["a"]
    backlog.leave(part)
    deliver(backlog, await take(backlog))
    await until(lambda: not spool.unsettled_bytes)
    backlog.come_back()
    rest = []
    while len(rest) < 7:
        parcel = await take(backlog)
        rest += names(parcel)
        deliver(backlog, parcel)

    assert sorted(rest) == ["a", "e0", "e1", "e2", "e3", "e4", "last"]
    await until(lambda: backlog.events == 0)


async def test_nothing_new_is_leased_while_settling_is_behind(spool, clock, monkeypatch):
    """With a full disk settlements stay in memory: what is out may come again, but no more is taken until they are committed."""
    monkeypatch.setattr("bridged.backlog.backlog._MAX_UNSETTLED_BYTES", 1000)
    backlog = Backlog(spool, 10**6, clock)
    await put(spool, batch("a"), batch("b"), batch("c"))
    first, second = [await take(backlog, max_events=1) for _ in range(2)]
    pages = await spool.run(lambda db: db.execute("PRAGMA max_page_count").fetchone()[0])
    await spool.run(lambda db: db.execute("PRAGMA max_page_count = 1").fetchall())
    backlog.settle(Settlement(first.segments, dead_letters=[DeadLetter(CODE, "", "mixpanel", "no", b"x" * 2**22)]))
    taking = asyncio.ensure_future(take(backlog))
    assert await is_waiting(taking)
    backlog.again(second)
    assert await taking is second
    taking = asyncio.ensure_future(take(backlog))
    assert await is_waiting(taking)
    await spool.run(lambda db: db.execute(f"PRAGMA max_page_count = {pages}").fetchall())

    assert names(await taking) == ["c"]
    assert spool.unsettled_bytes == 0


async def test_settled_parcels_are_forgotten(spool, clock):
    """What is settled leaves memory, disk and count."""
    backlog = Backlog(spool, 10**6, clock)
    await put(spool, batch("a"), batch("b"))
    deliver(backlog, await take(backlog))
    await until(lambda: backlog.events == 0)

    assert backlog.ring == (0, 0, 0)
    assert backlog.on_disk == 0
    assert backlog.oldest_at() is None


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_was_put_back_is_given_again_and_nothing_twice(spool, clock, monkeypatch, seed):
    """In any order: taken, delivered, put back, split, left on disk and back; with parts, scouts, and a ring of any size."""
    dice = random.Random(seed)
    monkeypatch.setattr("bridged.backlog.backlog._MAX_LEASED_BYTES", dice.choice([100, 10**6]))
    backlog = Backlog(spool, dice.choice([1, 600, 10**6]), clock)
    accepted, delivered, out, halted, taking = [], [], [], False, None

    async def taken(patience):
        nonlocal taking
        if taking is None:
            taking = asyncio.ensure_future(backlog.take(dice.choice([1, 3, 100]), 10**6, 0.0, halted=halted))
        for _ in range(patience):
            if taking.done():
                out.append(taking.result())
                taking = None
                there = [name for parcel in out for name in names(parcel)] + delivered
                assert len(there) == len(set(there)), "given twice"
                return
            await asyncio.sleep(0.001)

    def part_with(parcel, what):
        if what == "deliver" or (parcel.scout and what != "in vain"):
            deliver(backlog, parcel)
            delivered.extend(names(parcel))
        elif what == "leave" and parcel.events == 1:
            backlog.leave(parcel)
        elif what == "split" and len(parcel.segments) > 1:
            backlog.first([parcel.half(parcel.segments[:1]), parcel.half(parcel.segments[1:])])
        elif what == "split" and parcel.events > 1:
            backlog.settle(Settlement(parcel.segments, parts=[batch(name) for name in names(parcel)], whole=parcel))
        elif what == "again":
            backlog.again(parcel)
        else:
            backlog.in_vain(parcel)

    for step in range(200):
        match dice.choice(["put", "take", "take", "take", "part", "part", "return", "halt", "exchange"]):
            case "put":
                events = [f"e{step}-{n}" for n in range(dice.choice([1, 1, 3]))]
                accepted += events
                await put(spool, batch(*events))
                clock.now += 1
            case "take":
                await taken(3)
            case "part" if out:
                parcel = out.pop(dice.randrange(len(out)))
                part_with(parcel, dice.choice(["deliver", "leave", "leave", "split", "again", "in vain", "in vain"]))
            case "return":
                backlog.come_back()
            case "halt":
                halted = not halted
            case "exchange" if out and taking is None and not out[-1].scout:
                parcel = out.pop()
                out.append(await backlog.exchange(parcel, clock.now - 5, 3, 10**6) or parcel)
        ages = [each.created_at for each in (*backlog._ring, *backlog._leased.values())]
        ages += [backlog._left_at] if backlog.left else []
        assert backlog.oldest_at() == min(ages, default=None)
    halted = False
    async with asyncio.timeout(20):
        while backlog.events:
            while out:
                part_with(out.pop(), "deliver")
            backlog.come_back()
            await taken(5)
    taking.cancel()
    assert sorted(delivered) == sorted(accepted)
    assert spool.accounts.imbalance() == 0
