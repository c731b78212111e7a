"""The spool: what is acked is on disk, what is on disk is accounted for, and a full or damaged disk costs no more than it must."""

import asyncio
import contextlib
import errno
import os
import shutil
import sqlite3
import tempfile
import threading
import time
from pathlib import Path

import pytest
from conftest import NAMES, SLOW, until
from structlog.testing import capture_logs

from bridged import durable
from bridged.backlog import company, tables
from bridged.backlog import spool as spool_module
from bridged.backlog.segment import Batch, lines
from bridged.backlog.spool import DeadLetter, DeadLetterRow, Intaken, Settlement, Spool, SpoolOptions
from bridged.cohorts.membership import Membership, MembershipOptions
from bridged.errors import SpoolError, SpoolFull
from bridged.service import Progress

OPEN, SEND = 3, 5  # any two event types
MIB = 2**20


def batch(*names, code=OPEN, size=0):
    """Mapped events, one a name; `size` makes each that long, and hard to compress."""
    padding = os.urandom(size // 2).hex()
    events = [b'{"event":"%s","x":"%s"}\n' % (name.encode(), padding.encode()) for name in names]
    return Batch(b"".join(events), bytes([code]) * len(names))


def letter(name="x", code=OPEN, size=0):
    """A dead letter; `size` makes it longer by so much."""
    return DeadLetter(code, NAMES[code], "door", "because", name.encode() + b"." * size)


def options(tmp_path, **changes):
    """A spool of the test's own."""
    return SpoolOptions(path=str(tmp_path / "spool.db"), **changes)


@contextlib.contextmanager
def file_of(tmp_path):
    """The file as another program sees it."""
    db = sqlite3.connect(tmp_path / "spool.db", isolation_level=None)
    try:
        yield db
    finally:
        db.close()


def rows(tmp_path, table="segments"):
    """How many rows another program sees."""
    with file_of(tmp_path) as db:
        return db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


async def stored(spool):
    """The events of every segment, in order."""
    segments, _ = await spool.read_after(0, 2**40)
    return [line.split(b'"')[3].decode() for segment in segments for line in lines([segment])]


async def letters_of(spool):
    """The dead letters, in order."""
    found = await spool.run(lambda db: db.execute("SELECT * FROM dead_letters ORDER BY id").fetchall())
    return [DeadLetterRow(*row) for row in found]


def balances_by_type(spool, names=NAMES):
    """Whether every type's books balance, and nothing is less than nothing."""
    return not spool.accounts.problems(names)


def collect(spool):
    """A list that grows with what is committed."""
    found = []
    spool.committed = found.extend
    spool.parted = lambda parts, _wholes: found.extend(parts)
    return found


def hold(spool):
    """Makes the connection's thread busy until the event is set: what comes meanwhile waits for the next commit."""
    release = threading.Event()
    return release, asyncio.ensure_future(spool.run(lambda _db: release.wait(10)))


async def test_append_is_done_when_the_row_is_in_the_file(spool, tmp_path):
    """The future of an append means: another process sees the row."""
    future = spool.append(Intaken([batch("a", "b")]))
    assert not future.done()

    await future

    assert rows(tmp_path) == 1
    assert spool.accounts.total("waiting") == spool.accounts.total("accepted") == 2


async def test_an_append_survives_the_process(tmp_path):
    """A copy of the files, made at the moment of the ack, holds the events: nothing was left in memory."""
    async with Spool(options(tmp_path), NAMES) as spool:
        await spool.append(Intaken([batch("a")], [letter()], bytes([SEND])))
        (tmp_path / "copy").mkdir()
        for name in ("spool.db", "spool.db-wal"):
            (tmp_path / "copy" / name).write_bytes((tmp_path / name).read_bytes())

    async with Spool(options(tmp_path / "copy"), NAMES) as copy:
        assert await stored(copy) == ["a"]
        assert copy.dead_letters == 1
        assert {kind: copy.accounts.total(kind) for kind in copy.accounts.counts} == {
            "accepted": 3,
            "waiting": 1,
            "dead_lettered": 1,
            "skipped": 1,
            "delivered": 0,
            "expired": 0,
        }


async def test_what_comes_during_a_commit_shares_the_next(spool):
    """Group commit: a hundred appends that meet a busy writer are one fsync and one segment, in their order."""
    release, busy = hold(spool)
    first = spool.append(Intaken([batch("first")]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    futures = [spool.append(Intaken([batch(f"e{n}")])) for n in range(100)]
    release.set()
    await asyncio.gather(first, busy, *futures)

    assert spool.commits == 2
    assert spool.segments == 2
    assert await stored(spool) == ["first", *[f"e{n}" for n in range(100)]]


async def test_segments_are_cut_at_their_limits(tmp_path):
    """A segment holds no more events and no more bytes than a request may."""
    committed = []
    async with Spool(options(tmp_path, max_segment_events=10, max_segment_bytes=2000), NAMES) as spool:
        committed = collect(spool)
        release, busy = hold(spool)
        futures = [spool.append(Intaken([batch(*"abcd")])) for _ in range(5)]
        futures += [spool.append(Intaken([batch("large", size=1200)])) for _ in range(3)]
        release.set()
        await asyncio.gather(busy, *futures)

    assert all(segment.events <= 10 for segment in committed)
    assert all(segment.raw_bytes <= 2000 for segment in committed)
    assert sum(segment.events for segment in committed) == 23


async def test_a_learned_cap_cuts_smaller_segments(spool):
    """After Mixpanel said how much it takes, no new segment is larger; never is one larger than the options say."""
    committed = collect(spool)
    spool.cut_at(10**9)
    assert spool.max_segment_bytes == SpoolOptions(path="").max_segment_bytes
    spool.cut_at(1000)
    assert spool.max_segment_bytes == 1000
    release, busy = hold(spool)
    futures = [spool.append(Intaken([batch("x", size=600)])) for _ in range(4)]
    release.set()
    await asyncio.gather(busy, *futures)

    assert len(committed) == 4


async def test_settling_deletes_and_adds_dead_letters_in_one_transaction(spool, tmp_path):
    """There is no moment at which a refused event is nowhere, or in two places."""
    committed = collect(spool)
    await spool.append(Intaken([batch("a", "b", "c")]))
    seen = []
    spool.settle(Settlement(committed, delivered=bytes([OPEN, OPEN]), dead_letters=[letter("b")]))
    while spool.commits < 2:
        with file_of(tmp_path) as db:
            seen.append(
                db.execute("SELECT (SELECT count(*) FROM segments), (SELECT count(*) FROM dead_letters)").fetchone()
            )
        await asyncio.sleep(0)

    assert set(seen) <= {(1, 0), (0, 1)}
    assert (rows(tmp_path), rows(tmp_path, "dead_letters")) == (0, 1)
    assert spool.accounts.imbalance() == 0
    assert spool.accounts.total("delivered") == 2
    assert spool.dead_letters == 1


async def test_parts_replace_a_segment(spool):
    """A segment that was too large comes back as its halves, which are not joined again."""
    committed = collect(spool)
    await spool.append(Intaken([batch(*"abcd")]))
    spool.settle(Settlement([committed.pop()], parts=[batch(*"ab"), batch(*"cd")]))
    await until(lambda: spool.commits == 2)

    assert [segment.events for segment in committed] == [2, 2]
    assert await stored(spool) == list("abcd")
    assert spool.accounts.total("waiting") == spool.accounts.total("accepted") == 4
    assert spool.segments == 2


async def test_books_survive_and_equal_the_rows(tmp_path):
    """Accounts are the same after a restart, per event type, and `waiting` is what the rows hold."""
    async with Spool(options(tmp_path), NAMES) as spool:
        committed = collect(spool)
        await spool.append(Intaken([batch("a", "b")], [letter(code=SEND)]))
        await spool.append(Intaken([batch("c", code=SEND)], skipped=bytes([OPEN])))
        spool.settle(Settlement([committed[0]], delivered=bytes([OPEN]), expired=bytes([OPEN])))
        await until(lambda: spool.commits == 3)
        before = spool.accounts.by_type(NAMES)
        used = spool.used_bytes

    async with Spool(options(tmp_path), NAMES) as again:
        assert again.accounts.by_type(NAMES) == before
        assert again.accounts.imbalance() == 0
        assert again.accounts.total("waiting") == 1
        assert (again.segments, again.dead_letters) == (1, 1)
        assert abs(again.used_bytes - used) < MIB
        assert await stored(again) == ["c"]


async def test_a_replayed_dead_letter_moves_in_one_commit(spool, tmp_path):
    """Replaying is no new event: it leaves its table and waits, and the books still balance."""
    await spool.append(Intaken(dead_letters=[letter("a"), letter("b")]))
    [row] = await spool.run(lambda db: db.execute("SELECT * FROM dead_letters WHERE event = ?", (b"a",)).fetchall())
    await spool.append(Intaken([batch("a")], replayed=[DeadLetterRow(*row)]))

    assert rows(tmp_path, "dead_letters") == spool.dead_letters == 1
    assert spool.accounts.total("accepted") == 2
    assert spool.accounts.total("dead_lettered") == spool.accounts.total("waiting") == 1


async def test_a_replayed_dead_letter_that_is_gone_comes_as_a_new_event(spool, tmp_path):
    """The cap dropped it between the look and the replay: it leaves no table twice, and isn't taken out of the books twice."""
    await spool.append(Intaken(dead_letters=[letter("a"), letter("b", code=SEND)]))
    found = await letters_of(spool)
    await spool.purge("id = 1", [])

    await spool.append(Intaken([batch("a"), batch("b", code=SEND)], replayed=[*found, found[1]]))

    assert rows(tmp_path, "dead_letters") == spool.dead_letters == 0
    assert {kind: spool.accounts.total(kind) for kind in ("accepted", "dead_lettered", "waiting")} == {
        "accepted": 3,
        "dead_lettered": 1,
        "waiting": 2,
    }
    assert balances_by_type(spool)


async def test_a_purge_and_a_commit_that_follow_each_other_at_once(tmp_path):
    """The commit knows what the purge before it deleted, though the loop hasn't heard of it: nothing is dropped for nothing."""
    async with Spool(options(tmp_path, max_dead_letters=4), NAMES) as spool:
        await spool.append(Intaken(dead_letters=[letter(name) for name in "abcd"]))
        release, busy = hold(spool)
        purging = asyncio.ensure_future(spool.purge("id <= 2", []))
        await asyncio.sleep(0)
        future = spool.append(Intaken(dead_letters=[letter("e"), letter("f")]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        release.set()
        await asyncio.gather(busy, purging, future)

        assert [row.event for row in await letters_of(spool)] == [b"c", b"d", b"e", b"f"]
        assert (spool.dead_letters, spool.dropped_dead_letters) == (4, 0)


async def test_the_end_waits_for_no_company(tmp_path, monkeypatch):
    """A commit that waits for those who are about to join it begins when the spool is closed: nobody will."""
    monkeypatch.setattr(spool_module, "_MOMENT_S", 3600)
    monkeypatch.setattr(company, "_SPACING_S", 3600)
    async with asyncio.timeout(30 * SLOW):
        async with Spool(options(tmp_path), NAMES) as spool:
            await spool.append(Intaken([batch("first")]), 1)
            futures = [spool.append(Intaken([batch(f"e{n}")]), 1) for n in range(5)]
            await asyncio.sleep(0.05)
            assert not any(future.done() for future in futures), "nothing waits: this shows nothing"
        assert all(future.done() and future.exception() is None for future in futures)


async def test_settling_twice_is_noticed(spool):
    """What was settled before has no row any more: it is told, by the log and by the books of its type."""
    committed = collect(spool)
    await spool.append(Intaken([batch("a"), batch("b", code=SEND)]))
    spool.settle(Settlement(committed, delivered=bytes([OPEN, SEND])))
    await until(lambda: spool.commits == 2)
    with capture_logs() as logs:
        spool.settle(Settlement(committed, dead_letters=[letter("a"), letter("b", code=SEND)]))
        await until(lambda: spool.commits == 3)

    assert [entry["settled_twice"] for entry in logs if entry["event"] == "books_unbalanced"] == [1]
    assert spool.segments == 0
    assert spool.accounts.imbalance() == 0
    assert len(spool.accounts.problems(NAMES)) == 2


async def test_unsettled_bytes_are_what_is_settled_and_not_committed(tmp_path):
    """Counted from the settling to the commit, through a full disk too, so that delivery can wait for it."""
    async with Spool(options(tmp_path, max_bytes=256 * MIB), NAMES) as spool:
        told = []
        spool.settled = lambda: told.append(spool.unsettled_bytes)
        committed = collect(spool)
        await spool.append(Intaken([batch("a", size=200_000)]))
        await spool.run(lambda db: db.execute("PRAGMA max_page_count = 60").fetchall())
        spool.settle(Settlement(committed, dead_letters=[letter("a", size=8 * MIB)]))
        with pytest.raises(SpoolFull):
            await spool.append(Intaken([batch("too much", size=8 * MIB)]))
        assert spool.unsettled_bytes > 8 * MIB
        assert not told
        await spool.run(lambda db: db.execute("PRAGMA max_page_count = 10000").fetchall())
        await until(lambda: told)

        assert told == [0]


# -- full --------------------------------------------------------------------------------------------------------------


async def fill(spool, size=100_000):
    """Appends until the spool refuses; gives what was committed."""
    committed = collect(spool)
    for n in range(10_000):
        try:
            await spool.append(Intaken([batch(f"{n}", size=size)]))
        except SpoolFull:
            return committed
    raise AssertionError("it never refused")


async def test_near_its_cap_it_takes_nothing_but_settles(tmp_path):
    """The refusal comes at the door, before the file is full, so that there is always room for settling; that frees room."""
    async with Spool(options(tmp_path, max_bytes=16 * MIB), NAMES) as spool:
        committed = await fill(spool)
        assert spool.near_cap
        assert not spool.room.is_set()
        refused = [letter(f"{n}", size=100_000) for n in range(8)]
        spool.settle(Settlement(committed[:8], dead_letters=refused))
        spool.settle(Settlement(committed[8:40], delivered=bytes([OPEN]) * 32))
        await asyncio.wait_for(spool.room.wait(), 10)

        assert not spool.near_cap
        await spool.append(Intaken([batch("again")]))
        assert spool.accounts.imbalance() == 0
        assert spool.dead_letters == 8


@pytest.mark.parametrize("size", [60, 3_000, 17_000, 33_500, 70_000, 200_000])
async def test_the_cap_holds_for_segments_of_any_size(tmp_path, size):
    """What SQLite wastes in half-filled pages is part of the count: the door closes before the file is full."""
    async with Spool(options(tmp_path, max_bytes=16 * MIB, max_segment_events=1), NAMES) as spool:
        while not spool.near_cap:
            await spool.append(Intaken([batch(f"{n}", size=size) for n in range(max(1, 500_000 // size))]))
        pages = await spool.run(lambda db: db.execute("PRAGMA page_count").fetchone()[0])
        limit = await spool.run(lambda db: db.execute("PRAGMA max_page_count").fetchone()[0])

        assert limit * 0.5 < pages < limit * 0.97


async def test_a_full_file_refuses_and_goes_on(tmp_path):
    """Should the file or disk fill up after all, the events are refused, nothing is lost, and settling makes room again."""
    async with Spool(options(tmp_path, max_bytes=64 * MIB), NAMES) as spool:
        committed = collect(spool)
        await spool.append(Intaken([batch("kept", size=200_000)]))
        await spool.run(lambda db: db.execute("PRAGMA max_page_count = 60").fetchall())
        with pytest.raises(SpoolFull, match="full"):
            await spool.append(Intaken([batch("refused", size=4 * MIB)]))
        assert await stored(spool) == ["kept"]
        assert spool.pending_bytes == 0
        assert not spool.failed
        await spool.append(Intaken([batch("small")]))
        spool.settle(Settlement([committed[0]], delivered=bytes([OPEN])))
        await until(lambda: spool.segments == 1)

        assert await stored(spool) == ["small"]
        assert spool.accounts.imbalance() == 0


async def test_room_comes_back_after_a_full_disk(tmp_path):
    """Doors that paused because much was pending go on when the pending was refused: they don't wait for ever."""
    async with Spool(options(tmp_path, max_bytes=256 * MIB), NAMES) as spool:
        await spool.run(lambda db: db.execute("PRAGMA max_page_count = 60").fetchall())
        future = spool.append(Intaken([batch(*map(str, range(30)), size=MIB)]))
        assert not spool.room.is_set()
        with pytest.raises(SpoolFull):
            await future

        await asyncio.wait_for(spool.room.wait(), 10)


async def test_a_full_disk_does_not_starve_settling(tmp_path):
    """While events keep coming that find no room, what was delivered is settled all the same."""
    async with Spool(options(tmp_path, max_bytes=256 * MIB), NAMES) as spool:
        committed = collect(spool)
        await spool.append(Intaken([batch("old", size=200_000)]))
        await spool.run(lambda db: db.execute("PRAGMA max_page_count = 60").fetchall())
        spool.settle(Settlement([committed[0]], delivered=bytes([OPEN])))
        for _ in range(3):
            with pytest.raises(SpoolFull):
                await spool.append(Intaken([batch("too much", size=8 * MIB)]))

        assert spool.segments == 0
        assert spool.accounts.total("delivered") == 1


async def test_a_full_disk_does_not_keep_it_from_closing(tmp_path):
    """What can't be recorded at the end is sent again by the next start; the process doesn't hang."""
    spool = await Spool(options(tmp_path, max_bytes=256 * MIB), NAMES).__aenter__()
    committed = collect(spool)
    await spool.append(Intaken([batch("a", size=200_000)]))
    await spool.run(lambda db: db.execute("PRAGMA max_page_count = 60").fetchall())
    spool.settle(Settlement(committed, dead_letters=[letter("a", size=8 * MIB)]))
    closing = asyncio.ensure_future(spool.__aexit__(None, None, None))
    done, _ = await asyncio.wait([closing], timeout=10)
    if not done:  # let it go, so that the failure is told
        await spool.run(lambda db: db.execute("PRAGMA max_page_count = 100000").fetchall())
    await closing
    assert done, "closing waited for room that doesn't come"

    async with Spool(options(tmp_path), NAMES) as again:
        assert await stored(again) == ["a"]


async def test_room_tells_when_the_writer_is_behind(spool):
    """Doors pause when more is pending than a few commits take, and go on when it is written."""
    release, busy = hold(spool)
    futures = [spool.append(Intaken([batch("x", size=MIB)])) for _ in range(30)]
    assert not spool.room.is_set()
    assert not spool.near_cap
    release.set()
    await asyncio.gather(busy, *futures)

    assert spool.room.is_set()
    assert spool.pending_bytes == 0


async def test_skipped_events_wait_for_room_too(spool):
    """They cost nothing on disk, but memory while the writer is busy: they pause the doors as others do."""
    release, busy = hold(spool)
    for _ in range(2000):
        if not spool.room.is_set():
            break
        spool.append(Intaken(skipped=bytes([OPEN]) * 1000, reasons=["because"] * 1000))
    assert not spool.room.is_set()
    release.set()
    await busy
    await until(lambda: spool.room.is_set() and not spool.pending_bytes)
    assert balances_by_type(spool)


async def test_the_oldest_dead_letters_go_first(tmp_path):
    """Beyond the cap the oldest are dropped and counted; the books keep them as dead-lettered."""
    async with Spool(options(tmp_path, max_dead_letters=3), NAMES) as spool:
        for name in "abcde":
            await spool.append(Intaken(dead_letters=[letter(name)]))
        kept = await spool.run(lambda db: db.execute("SELECT event FROM dead_letters ORDER BY id").fetchall())

        assert [event for (event,) in kept] == [b"c", b"d", b"e"]
        assert (spool.dead_letters, spool.dropped_dead_letters) == (3, 2)
        assert spool.accounts.total("dead_lettered") == 5
        used = spool.used_bytes
    async with Spool(options(tmp_path, max_dead_letters=3), NAMES) as again:
        assert abs(again.used_bytes - used) < MIB


async def fill_with_letters(spool, size, count):
    """Dead letters of a size, in commits of a megabyte."""
    at_once = max(1, MIB // size)
    for _ in range(0, count, at_once):
        try:
            await spool.append(Intaken(dead_letters=[letter(size=size) for _ in range(at_once)]))
        except SpoolFull:
            return


@pytest.mark.parametrize("size", [60, 3_000, 17_000, 33_500, 70_000, 1_000_000])
async def test_dead_letters_never_close_the_doors(tmp_path, size):
    """However large they are, they take their share of the file at most; the oldest go, and are counted."""
    count = 20 * MIB // (size + 256)
    async with Spool(options(tmp_path, max_bytes=16 * MIB), NAMES) as spool:
        await fill_with_letters(spool, size, count)
        kept = await letters_of(spool)

        assert not spool.near_cap
        assert spool.room.is_set()
        assert sum(len(row.event) + 256 for row in kept) <= 4 * MIB
        assert spool.dead_letters == len(kept) == kept[-1].id - kept[0].id + 1 > 0
        assert spool.dropped_dead_letters == kept[0].id - 1 > 0
        assert spool.accounts.total("dead_lettered") == kept[-1].id


async def test_a_smaller_cap_is_kept_from_the_start(tmp_path):
    """Dead letters that were within the old cap don't close the doors when it is lowered: no event need come first."""
    async with Spool(options(tmp_path, max_bytes=64 * MIB), NAMES) as spool:
        await fill_with_letters(spool, 100_000, 150)
    async with Spool(options(tmp_path, max_bytes=16 * MIB), NAMES) as spool:
        await asyncio.wait_for(spool.room.wait(), 10)
        assert not spool.near_cap
        assert spool.dropped_dead_letters == 150 - spool.dead_letters > 100


async def test_the_file_shrinks_when_idle(tmp_path):
    """A backlog that was drained gives its space back to the file system, without anybody's help."""
    async with Spool(options(tmp_path, max_bytes=512 * MIB), NAMES) as spool:
        committed = collect(spool)
        for n in range(110):
            await spool.append(Intaken([batch(f"{n}", size=MIB)]))
        full = (tmp_path / "spool.db").stat().st_size
        spool.settle(Settlement(committed, delivered=bytes([OPEN]) * 110))
        await until(lambda: spool.segments == 0)

        await until(lambda: (tmp_path / "spool.db").stat().st_size < full * 0.7, "a smaller file")


async def test_the_file_shrinks_while_a_little_comes(tmp_path):
    """A few events a second, for days: what a long backlog took is given back all the same."""
    async with Spool(options(tmp_path, max_bytes=512 * MIB), NAMES) as spool:
        committed = collect(spool)
        for n in range(60):
            await spool.append(Intaken([batch(f"{n}", size=MIB)]))
        full = (tmp_path / "spool.db").stat().st_size
        spool.settle(Settlement(committed[:], delivered=bytes([OPEN]) * 60))
        for n in range(1000):
            await spool.append(Intaken([batch(f"little {n}")]))
            if (tmp_path / "spool.db").stat().st_size < full * 0.6:
                break
            await asyncio.sleep(0.02)
        else:
            pytest.fail("it stays large")


# -- files that are removed ---------------------------------------------------------------------------------------------


async def test_saving_what_was_removed_is_progress(tmp_path, monkeypatch):
    """A copy of many gigabytes keeps the thread busy for minutes: the heart beats with each step of it, and it is no hang."""
    monkeypatch.setattr(durable, "_COPIED_PAGES", 8)
    sync = durable.sync
    monkeypatch.setattr(durable, "sync", lambda path: (time.sleep(0.2), sync(path)))
    async with Spool(options(tmp_path), NAMES) as spool:
        for n in range(4):
            await spool.append(Intaken([batch(f"{n}", size=MIB)]))
        progress = Progress(spool.answer, lambda: (1, spool.progress))
        (tmp_path / "spool.db").unlink()
        await until((tmp_path / "spool.db.partial").exists, "the copy")
        for _ in range(4):
            async with asyncio.timeout(1.5 * SLOW):
                assert await progress()
        assert (tmp_path / "spool.db.partial").exists()
        with pytest.raises(SpoolError, match="what it held was saved in"):
            await spool.ended()


async def test_files_that_are_removed_just_before_the_end(tmp_path):
    """They are looked for a last time: what they held is saved, and the end says so."""
    spool = await Spool(options(tmp_path), NAMES).__aenter__()
    await spool.append(Intaken([batch("a")]))
    (tmp_path / "spool.db").unlink()
    with pytest.raises(SpoolError, match="what it held was saved in"):
        await spool.__aexit__(None)
    async with Spool(options(tmp_path), NAMES) as again:
        assert await stored(again) == ["a"]


async def test_the_end_while_removed_files_are_saved(tmp_path, monkeypatch):
    """It waits for the copy, and says where that is."""
    sync = durable.sync
    monkeypatch.setattr(durable, "sync", lambda path: (time.sleep(0.1), sync(path)))
    spool = await Spool(options(tmp_path), NAMES).__aenter__()
    await spool.append(Intaken([batch("a")]))
    (tmp_path / "spool.db").unlink()
    await until((tmp_path / "spool.db.partial").exists, "the copy")
    with pytest.raises(SpoolError, match="what it held was saved in"):
        await spool.__aexit__(None)
    async with Spool(options(tmp_path), NAMES) as again:
        assert await stored(again) == ["a"]


async def test_the_end_where_removed_files_can_not_be_saved(tmp_path, monkeypatch):
    """How much is lost is said: it is no orderly end."""
    monkeypatch.setattr(durable, "_free_bytes", lambda _folder: 0)
    spool = await Spool(options(tmp_path), NAMES).__aenter__()
    await spool.append(Intaken([batch("a", "b", "c")]))
    (tmp_path / "spool.db").unlink()
    await until(lambda: spool.near_cap, "the doors to close")
    with pytest.raises(SpoolError, match=r"can't be saved.*; 3 events that waited are lost"):
        await spool.__aexit__(None)


@pytest.mark.parametrize("drains", [True, False])
async def test_files_that_are_removed_where_there_is_no_room(tmp_path, monkeypatch, drains):
    """Nothing new is taken, and why is said; what waits is delivered from the open file; the copy is made when it can be."""
    free = 0
    monkeypatch.setattr(durable, "_free_bytes", lambda _folder: free)
    async with Spool(options(tmp_path, max_bytes=512 * MIB), NAMES) as spool:
        committed = collect(spool)
        for n in range(3):
            await spool.append(Intaken([batch(f"{n}", size=MIB)], [letter(f"l{n}")]))
        (tmp_path / "spool.db").unlink()
        await until(lambda: spool.near_cap, "the doors to close")
        with pytest.raises(SpoolFull, match=r"spool.db was removed.*can't be saved.*No space left on device"):
            await spool.append(Intaken([batch("more")]))
        assert [segment.events for segment in (await spool.read_after(0, 10**9))[0]] == [1, 1, 1]
        spool.settle(Settlement(committed[:2], delivered=bytes([OPEN]) * 2))
        await until(lambda: spool.segments == 1)
        assert not (tmp_path / "spool.db.partial").exists()
        if drains:
            spool.settle(Settlement(committed[2:], delivered=bytes([OPEN])))
            with pytest.raises(SpoolError, match="nothing waited any more"):
                await spool.ended()
        else:
            free = 2**40
            with pytest.raises(SpoolError, match="what it held was saved in"):
                await spool.ended()
    if not drains:
        async with Spool(options(tmp_path), NAMES) as again:
            assert (again.segments, again.dead_letters, again.accounts.total("delivered")) == (1, 3, 2)


# -- opening -----------------------------------------------------------------------------------------------------------


async def test_one_daemon_a_spool(spool, tmp_path):
    """A second one is refused, in words that say what to do, and the first goes on."""
    with pytest.raises(SpoolError, match="in use by another bridged") as refused:
        await Spool(options(tmp_path), NAMES).__aenter__()
    assert "spool.path" in refused.value.hint

    await spool.append(Intaken([batch("a")]))


@pytest.mark.parametrize("kind", ["spool", "cohorts"])
async def test_a_folder_without_locks(tmp_path, monkeypatch, kind):
    """A file system that knows none, as NFS may, isn't taken for another daemon."""

    def refuses(*_arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuses)
    opened = (
        Spool(options(tmp_path), NAMES) if kind == "spool" else Membership(MembershipOptions(path=str(tmp_path / "c")))
    )
    with pytest.raises(SpoolError, match=r"can't be locked: .*No locks available") as caught:
        await opened.__aenter__()
    assert "local disk" in caught.value.hint


async def test_a_file_that_another_process_has_locked(tmp_path, monkeypatch):
    """`sqlite3` with an open transaction, or a VACUUM: new events are refused until it is over, and nothing ends."""
    monkeypatch.setattr(spool_module, "_IDLE_S", 0.05)
    async with Spool(options(tmp_path), NAMES) as spool:
        committed = collect(spool)
        await spool.run(lambda db: db.execute("PRAGMA busy_timeout = 10"))  # else it waits for 5 s
        await spool.append(Intaken([batch("before")]))
        with file_of(tmp_path) as other:
            other.execute("BEGIN IMMEDIATE")
            for segment in committed:
                spool.settle(Settlement([segment], delivered=segment.codes))
            with pytest.raises(SpoolFull, match="database is locked") as caught:
                await spool.append(Intaken([batch("meanwhile")]))
            assert "another process has locked it" in caught.value.hint
            await asyncio.sleep(3 * spool_module._IDLE_S)  # it is tried again, and so is giving space back
            other.execute("COMMIT")
        await spool.append(Intaken([batch("after")]))
        await until(lambda: spool.accounts.total("delivered") == 1, "what was delivered meanwhile")
        assert spool.accounts.imbalance() == 0
    assert rows(tmp_path) == 1


async def test_the_file_is_nobody_elses(spool, tmp_path):
    """Events are about people: only the daemon's own user reads them."""
    await spool.append(Intaken([batch("a")]))

    assert {file.stat().st_mode & 0o777 for file in tmp_path.glob("spool.db*")} == {0o600}


async def test_the_spool_of_a_newer_version_is_left_untouched(tmp_path):
    """Going back a version must not cost the events that the newer one took."""
    async with Spool(options(tmp_path), NAMES):
        pass
    with file_of(tmp_path) as db:
        db.execute("PRAGMA user_version = 99")
    before = (tmp_path / "spool.db").read_bytes()

    with pytest.raises(SpoolError, match="newer bridged"):
        await Spool(options(tmp_path), NAMES).__aenter__()
    assert (tmp_path / "spool.db").read_bytes() == before
    with file_of(tmp_path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (99,)


@pytest.mark.parametrize("what", ["folder", "text", "file as parent", "database"])
async def test_a_file_that_is_no_spool(tmp_path, what):
    """Whatever lies at the path, the error is a SpoolError that names it, and the lock is free afterwards."""
    path = tmp_path / "spool.db"
    if what == "folder":
        path.mkdir()
    elif what == "text":
        path.write_text("dear diary\n" * 1000)
    elif what == "file as parent":
        path.write_text("")
        path = path / "spool.db"
    else:
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute("CREATE TABLE diary (day TEXT)")
    before = path.read_bytes() if path.is_file() else b""
    for _ in range(2):
        with pytest.raises(SpoolError, match=r"can't open the spool .*spool\.db"):
            await Spool(SpoolOptions(path=str(path)), NAMES).__aenter__()
    assert not before or path.read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        "block = CAST(substr(block, 1, 10) || X'00' || substr(block, 12) AS BLOB)",
        "block = X''",
        "codes = CAST(codes || X'03' AS BLOB)",
        "raw_bytes = raw_bytes + 1",
        "raw_crc32 = raw_crc32 + (1 << 40)",
        "raw_crc32 = -1",
        "checksum = checksum + 1",
    ],
)
async def test_a_damaged_row_is_set_aside(tmp_path, damage):
    """A row that the disk gave back changed becomes dead letters that say so; its neighbours are untouched."""
    async with Spool(options(tmp_path), NAMES) as spool:
        for name in "abc":
            await spool.append(Intaken([batch(name, name + name)]))
    with file_of(tmp_path) as db:
        db.execute(f"UPDATE segments SET {damage} WHERE id = 2")

    async with Spool(options(tmp_path), NAMES) as again:
        assert await stored(again) == ["a", "aa", "c", "cc"]
        await until(lambda: again.segments == 2)
        assert again.damaged == 1
        assert again.dead_letters == again.accounts.total("dead_lettered") >= 2
        assert again.accounts.total("waiting") == 4
        [reason] = {
            row[0] for row in await again.run(lambda db: db.execute("SELECT reason FROM dead_letters").fetchall())
        }
        assert reason == "segment 2 was damaged on disk"


SHIFTED = {code + (3 < code < 200): name for code, name in NAMES.items()} | {4: "users.messages.fax.Send"}
WITHOUT = {code - (OPEN < code < 200): name for code, name in NAMES.items() if code != OPEN}


@pytest.mark.parametrize("names", [SHIFTED, WITHOUT], ids=["a type inserted", "a type removed"])
async def test_codes_follow_their_types(tmp_path, names):
    """A version whose table is another one finds what waits, and the dead letters, under the types that they came with."""
    last = max(code for code in NAMES if code < 200)
    async with Spool(options(tmp_path), NAMES) as spool:
        every = Batch(b"".join(b"%d\n" % code for code in NAMES), bytes(NAMES))
        await spool.append(Intaken([batch("a"), batch("b", code=SEND), every], skipped=bytes([last])))
        await spool.append(Intaken([batch("c", code=0)], [letter(code=code) for code in NAMES]))
        before = spool.accounts.by_type(NAMES)

    for _ in range(2):
        async with Spool(options(tmp_path), names) as spool:
            expected = {name: counts for name, counts in before.items() if name in names.values()}
            lost = before.get(NAMES[OPEN]) if OPEN not in NAMES or names is WITHOUT else None
            if lost:
                expected["(unknown)"] = {kind: n + lost[kind] for kind, n in expected["(unknown)"].items()}
            assert spool.accounts.by_type(names) == expected
            assert balances_by_type(spool, names)
            kept = await letters_of(spool)
            assert [names[row.code] for row in kept] == [
                name if name in names.values() else "(unknown)" for name in NAMES.values()
            ]
            segments, _ = await spool.read_after(0, 2**40)
            assert spool.damaged == 0
            assert len(segments) == 2

    async with Spool(options(tmp_path), names) as spool:
        segments, _ = await spool.read_after(0, 2**40)
        codes = b"".join(segment.codes for segment in segments)
        spool.settle(Settlement(segments, delivered=codes))
        replays = [Batch(b"x\n", bytes([row.code])) for row in kept]
        await spool.append(Intaken(replays, replayed=kept))
        assert balances_by_type(spool, names)
        assert spool.accounts.total("dead_lettered") == 0


class Killed(BaseException):
    """As by SIGKILL."""


def killed_at(monkeypatch, number):
    """Every transaction before that one succeeds. Says how many there were."""
    transaction, begun = tables.transaction, [0]

    def counted(db):
        begun[0] += 1
        if begun[0] == number:
            raise Killed
        return transaction(db)

    monkeypatch.setattr(tables, "transaction", counted)
    return begun


@pytest.mark.parametrize("then", ["goes on", "goes back", "goes on with another", "is salvaged"])
async def test_codes_follow_their_types_in_steps(tmp_path, monkeypatch, then):
    """Killed between any two, the next start finds every code under its type, whatever table it goes on with."""
    monkeypatch.setattr(tables, "_STEP_BYTES", 1)
    few = [*range(2), *range(60, 63), *[code for code in NAMES if code > 200]]
    (tmp_path / "a").mkdir()
    async with Spool(options(tmp_path / "a"), NAMES) as spool:
        for at in range(2):
            mixed = Batch(b"".join(b"%d\n" % code for code in few), bytes(few))
            await spool.append(Intaken([mixed], [letter(code=few[at])], skipped=bytes([62])))
        before = spool.accounts.by_type(NAMES)
    last = max(code for code in NAMES if code < 200)
    turned = {last - code if code < 200 else code: name for code, name in NAMES.items()}
    names = {"goes back": NAMES, "goes on with another": turned}.get(then, SHIFTED)
    for number in range(1, 100):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        with monkeypatch.context() as patch:
            begun = killed_at(patch, number)
            with contextlib.suppress(Killed):
                async with Spool(options(tmp_path / "b"), SHIFTED):
                    pass
        if then == "is salvaged":
            with (tmp_path / "b" / "spool.db").open("r+b") as file:
                file.write(b"?")
        async with Spool(options(tmp_path / "b"), names) as spool:
            assert spool.accounts.by_type(names) == before
            assert balances_by_type(spool, names)
            assert spool.damaged == spool.missing == 0
            segments, _ = await spool.read_after(0, 2**40)
            assert [[names[code] for code in segment.codes] for segment in segments] == [[NAMES[c] for c in few]] * 2
            assert [names[row.code] for row in await letters_of(spool)] == [NAMES[code] for code in few[:2]]
        if begun[0] < number:
            break
    assert number > 10, "it wasn't done in steps: this shows nothing"


async def test_codes_that_change_take_little_room(tmp_path, monkeypatch):
    """A large spool is translated without a second one in its WAL."""
    monkeypatch.setattr(tables, "_STEP_BYTES", MIB)
    async with Spool(options(tmp_path), NAMES) as spool:
        for n in range(24):
            await spool.append(Intaken([batch(f"{n}", code=60, size=2 * MIB)], [letter(code=60, size=MIB // 4)]))
    wal, largest, say = tmp_path / "spool.db-wal", 0, tables.transaction

    def looked_at(db):
        nonlocal largest
        largest = max(largest, wal.stat().st_size)
        return say(db)

    monkeypatch.setattr(tables, "transaction", looked_at)
    async with Spool(options(tmp_path), SHIFTED) as spool:
        assert (await spool.read_after(0, 1))[0][0].codes == bytes([61])
    assert 0 < largest < (tmp_path / "spool.db").stat().st_size / 2


async def test_a_damaged_row_stays_damaged_when_codes_change(tmp_path):
    """Translating must not make a checksum right that was wrong."""
    async with Spool(options(tmp_path), NAMES) as spool:
        for name in "ab":
            await spool.append(Intaken([batch(name, code=SEND)]))
    with file_of(tmp_path) as db:
        db.execute("UPDATE segments SET block = X'00' WHERE id = 1")

    async with Spool(options(tmp_path), SHIFTED) as spool:
        assert await stored(spool) == ["b"]
        await until(lambda: spool.dead_letters == 1)
        assert spool.damaged == 1
        assert balances_by_type(spool, SHIFTED)
        assert [row.event_type for row in await letters_of(spool)] == [NAMES[SEND]]


# -- the end -----------------------------------------------------------------------------------------------------------


async def test_closing_commits_what_is_pending(tmp_path):
    """What was handed over before the end is on disk after it, and its futures are done."""
    async with Spool(options(tmp_path), NAMES) as spool:
        futures = [spool.append(Intaken([batch(f"{n}")])) for n in range(10)]
    assert all(future.done() and not future.exception() for future in futures)
    with pytest.raises(SpoolError, match="closed"):
        spool.append(Intaken([batch("late")]))

    async with Spool(options(tmp_path), NAMES) as again:
        assert len(await stored(again)) == 10


async def test_ended_returns_after_an_orderly_end(tmp_path):
    """Whoever watches the writer sees nothing wrong in its being told to stop."""
    async with Spool(options(tmp_path), NAMES) as spool:
        watch = asyncio.ensure_future(spool.ended())
    await watch


@pytest.mark.parametrize("trouble", ["trigger", "bug"])
async def test_a_commit_that_fails_ends_everything(tmp_path, trouble):
    """No retry on a connection that can't be trusted: every future fails, `ended` raises, nothing more is taken."""
    async with Spool(options(tmp_path), NAMES) as spool:
        await spool.append(Intaken([batch("safe")]))
        watch = asyncio.ensure_future(spool.ended())
        if trouble == "trigger":
            abort = "CREATE TRIGGER no BEFORE INSERT ON segments BEGIN SELECT RAISE(ABORT, 'disk I/O error'); END"
            await spool.run(lambda db: db.execute(abort))
            doomed = Intaken([batch("doomed")])
        else:
            doomed = Intaken([Batch("text, where bytes belong", bytes([OPEN]))])
        release, busy = hold(spool)
        futures = [spool.append(doomed)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        futures.append(spool.append(Intaken([batch("behind it")])))  # meets the writer while it dies
        release.set()
        await busy

        for future in futures:
            with pytest.raises(SpoolError):
                await asyncio.wait_for(future, 10)
        with pytest.raises(SpoolError if trouble == "trigger" else Exception):
            await watch
        assert spool.failed
        with pytest.raises(SpoolError):
            spool.append(Intaken([batch("late")]))
    with file_of(tmp_path) as db:
        db.execute("DROP TRIGGER IF EXISTS no")

    async with Spool(options(tmp_path), NAMES) as again:
        assert await stored(again) == ["safe"]
        assert again.accounts.imbalance() == 0


@pytest.mark.parametrize("fails", [False, True])
async def test_a_failed_connection_makes_no_checkpoint(tmp_path, fails):
    """What a failed commit left in the page cache must not be brought into the file by our own hand."""
    statements = []
    async with Spool(options(tmp_path), NAMES) as spool:
        await spool.append(Intaken([batch("safe")]))
        await spool.run(lambda db: db.set_trace_callback(statements.append))
        if fails:
            with pytest.raises(SpoolError):
                await spool.append(Intaken([Batch("text, where bytes belong", bytes([OPEN]))]))

    assert any("wal_checkpoint" in statement for statement in statements) is not fails


async def test_a_closer_that_is_cancelled_cancels_nothing_else(tmp_path):
    """What was handed over is committed, and the file closed, before the cancellation goes on."""
    spool = await Spool(options(tmp_path), NAMES).__aenter__()
    release, busy = hold(spool)
    future = spool.append(Intaken([batch("a")]))
    closing = asyncio.ensure_future(spool.__aexit__(None, None, None))
    for _ in range(2):
        await asyncio.sleep(0.05)
        closing.cancel()
    await asyncio.sleep(0.05)
    assert not closing.done()
    release.set()
    await asyncio.gather(busy, future)
    with pytest.raises(asyncio.CancelledError):
        await closing

    assert not spool.failed
    async with Spool(options(tmp_path), NAMES) as again:
        assert await stored(again) == ["a"]


async def test_only_a_full_disk_is_one(tmp_path):
    """A failure whose text happens to speak of full is a failure: the writer ends."""
    async with Spool(options(tmp_path), NAMES) as spool:
        abort = "CREATE TRIGGER no BEFORE INSERT ON segments BEGIN SELECT RAISE(ABORT, 'not the full truth'); END"
        await spool.run(lambda db: db.execute(abort))
        with pytest.raises(SpoolError, match="not the full truth") as failure:
            await spool.append(Intaken([batch("a")]))

        assert not isinstance(failure.value, SpoolFull)
        assert spool.failed


async def test_an_abandoned_future_disturbs_nobody(spool, tmp_path):
    """A client that went away (its future cancelled) doesn't keep its events from being committed."""
    gone = spool.append(Intaken([batch("a")]))
    gone.cancel()
    await spool.append(Intaken([batch("b")]))

    assert await stored(spool) == ["a", "b"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")
@pytest.mark.parametrize("theirs", ["spool.db.lock", "spool.db", "cohorts.db.lock"])
async def test_files_of_another_user_are_told_with_what_to_do(theirs):
    """A service after `bridged run` by root's hand: its folder is its own, and a file in it isn't. Elsewhere it is the folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / theirs).touch(0o600)
        os.chown(folder, 65534, 65534)
        opened = (
            Spool(SpoolOptions(path=str(folder / "spool.db")), NAMES)
            if theirs.startswith("spool")
            else Membership(MembershipOptions(path=str(folder / "cohorts.db")))
        )
        elsewhere = Spool(SpoolOptions(path="/root/nowhere/spool.db"), NAMES)
        os.seteuid(65534)
        try:
            with pytest.raises(SpoolError) as caught:
                await opened.__aenter__()
            with pytest.raises(SpoolError, match="hint: is the folder there, and writable"):
                await elsewhere.__aenter__()
        finally:
            os.seteuid(0)

    assert f"chown -R --reference={folder} {folder}" in caught.value.hint


async def test_space_is_given_back_without_waiting_for_a_reader(tmp_path):
    """`sqlite3` that reads for long, or a backup: new events don't stand behind a checkpoint that waits for it."""
    async with Spool(options(tmp_path), NAMES) as spool:
        committed = collect(spool)
        for n in range(40):
            await spool.append(Intaken([batch(f"e{n}", size=1_000_000)]))
        with file_of(tmp_path) as other:
            other.execute("BEGIN")
            assert other.execute("SELECT count(*) FROM segments").fetchone()[0] == len(committed)
            await spool.run(lambda db: db.execute("PRAGMA busy_timeout = 600000"))
            for segment in committed:
                spool.settle(Settlement([segment], delivered=segment.codes))
            await until(lambda: not spool.segments, "everything to be settled", 60)
            async with asyncio.timeout(60 * SLOW):
                await spool._shrink()
                await spool.append(Intaken([batch("meanwhile")]))
            other.execute("COMMIT")


@pytest.mark.usefixtures("an_ordinary_user")
async def test_a_folder_of_ours_that_is_shut():
    """After a slip with `chmod`: the files are nobody else's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chmod(name, 0o600)  # noqa: PTH101  # a Path of it would be flagged as blocking
        with pytest.raises(SpoolError) as caught:
            await Spool(options(folder), NAMES).__aenter__()
    assert caught.value.hint == f"chmod u+rwx {folder}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")
@pytest.mark.parametrize(
    ("theirs", "word"), [("spool.db-wal", "chown -R --reference="), ("", "is its folder writable")]
)
async def test_a_spool_that_can_only_be_read(theirs, word):
    """A WAL that root has copied there, or a folder that is root's: it isn't found out by the first event, and what to do is said."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)  # noqa: PTH101  # a Path of it would be flagged as blocking
        first, folder = Path(name) / "first", Path(name) / "second"
        first.mkdir()
        async with Spool(options(first), NAMES) as spool:
            await spool.append(Intaken([batch("a")]))
            shutil.copytree(first, folder)
        for file in folder.iterdir():
            if theirs or file.name not in ("spool.db-wal", "spool.db-shm"):
                os.chown(file, 65534, 65534)
            else:
                file.unlink()
        if theirs:
            os.chown(folder, 65534, 65534)
            os.chown(folder / theirs, 0, 0)
            (folder / theirs).chmod(0o644)
        else:
            folder.chmod(0o755)
        os.seteuid(65534)
        try:
            with pytest.raises(SpoolError, match="can't open the spool") as caught:
                await Spool(options(folder), NAMES).__aenter__()
        finally:
            os.seteuid(0)
        assert word in caught.value.hint
