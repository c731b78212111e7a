"""Damage: whatever happens to the spool's files, it starts, delivers what is intact, counts the rest, and deletes nothing."""

import asyncio
import contextlib
import errno
import os
import random
import shutil
import sqlite3
from pathlib import Path

import pytest
from conftest import NAMES, until
from msgspec import structs
from structlog.testing import capture_logs
from test_spool import OPEN, balances_by_type, batch, file_of, letter, options, stored

from bench import corrupt
from bridged.backlog import pages, salvage
from bridged.backlog.backlog import Backlog
from bridged.backlog.spool import Intaken, Settlement, Spool
from bridged.errors import SpoolError


@pytest.fixture(scope="module", params=corrupt.SEGMENTS)
def master(request, tmp_path_factory):
    """The files of a living spool, and the events in them."""
    folder = tmp_path_factory.mktemp("master")
    return folder, corrupt.make_master(folder, request.param)


@pytest.mark.parametrize("file", corrupt.FILES)
def test_random_damage(master, file):
    """Bits flipped and bytes cut off anywhere: it starts, one bit costs one segment at most, and no loss goes unsaid."""
    folder, events = master
    cases = [what for what in corrupt.damages(folder, 170, 60, seed=random.randrange(2**32)) if what.file == file][
        : 8 if file == "spool.db-shm" else 32
    ]
    outcomes = [(what, corrupt.case(folder, events, what)) for what in cases]

    assert [(what, outcome.wrong) for what, outcome in outcomes if outcome.wrong] == []
    assert all(outcome.seconds < 5 for _, outcome in outcomes)
    if file != "spool.db-shm":
        assert any(outcome.damaged or outcome.set_aside for _, outcome in outcomes), "nothing was hit: it shows nothing"


def test_the_master_is_whole(master):
    """The control: without damage everything is given back, and nothing is set aside."""
    folder, events = master
    outcome = corrupt.case(folder, events, corrupt.Damage("spool.db-shm", 0, None))

    assert (outcome.missing, outcome.damaged, outcome.set_aside, outcome.wrong) == (0, 0, 0, [])


def test_a_wal_that_the_file_has_outrun(tmp_path):
    """What is cut off a WAL that had been brought into the file costs nothing: its rest must not be read over the file."""
    events = corrupt.make_master(tmp_path, corrupt.SEGMENTS[0])
    half = (tmp_path / "spool.db-wal").stat().st_size // 2
    outcome = corrupt.case(tmp_path, events, corrupt.Damage("spool.db-wal", None, half))

    assert (outcome.missing, outcome.damaged, outcome.set_aside, outcome.wrong) == (0, 0, 1, [])


async def filled(tmp_path, count=30, size=3000):
    """A closed spool with segments, dead letters and books."""
    async with Spool(options(tmp_path), NAMES) as spool:
        for n in range(count):
            await spool.append(Intaken([batch(f"e{n}", size=size)], [letter(f"l{n}")]))
        segments, _ = await spool.read_after(0, 1)
        spool.settle(Settlement(segments, delivered=segments[0].codes))
        await until(lambda: spool.segments == count - 1)
    return tmp_path / "spool.db"


DAMAGES = {
    "magic": (0, b"Not SQLite at all"),
    "page size": (16, b"\x10\x00"),
    "format version": (60, b"\x00\x00\x00\x03"),
    "schema": (32768 - 900, bytes(800)),
    "whole first page": (0, bytes(32768)),
    "free list": (32, b"\xff\xff\xff\xff\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("what", DAMAGES)
async def test_a_damaged_head(tmp_path, what):
    """A file that SQLite can't open any more gives every segment and dead letter back; it is kept under a name with a time."""
    path = await filled(tmp_path)
    at, data = DAMAGES[what]
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    damaged = path.read_bytes()
    with capture_logs() as logs:
        async with Spool(options(tmp_path), NAMES) as spool:
            assert await stored(spool) == [f"e{n}" for n in range(1, 30)]
            assert spool.dead_letters == 30
            assert balances_by_type(spool)
            assert spool.accounts.total("delivered") == 1
            assert spool.accounts.total("accepted") == 60
            if what != "free list":
                assert len(spool.set_aside) == 1
                assert "corrupt-2" in spool.set_aside[0]
    [aside] = tmp_path.glob("spool.db.corrupt-*Z")
    assert aside.read_bytes() == damaged
    assert {"spool_damaged", "spool_salvaged"} <= {entry["event"] for entry in logs}
    async with Spool(options(tmp_path), NAMES) as again:
        assert len(await stored(again)) == 29
        assert balances_by_type(again)
        assert len(again.set_aside) == 1


def spoil(path):
    """A head that SQLite can't open."""
    with path.open("r+b") as file:
        file.write(b"Not SQLite at all")


async def test_a_name_that_looks_like_a_pattern(tmp_path):
    """A spool may be called [eu]: the fresh file takes its place all the same, and what was set aside is found."""
    named = structs.replace(options(tmp_path), path=str(tmp_path / "spool[eu]*?.db"))
    async with Spool(named, NAMES) as spool:
        await spool.append(Intaken([batch("a")]))
    spoil(Path(named.path))
    for _ in range(2):
        async with Spool(named, NAMES) as spool:
            assert await stored(spool) == ["a"]
            assert len(spool.set_aside) == 1


async def test_lost_segments_are_counted_as_dead_letters(tmp_path):
    """Half of the file is gone: what is left is delivered, and the books say how many events were lost, and where they were."""
    path = await filled(tmp_path, count=60, size=60_000)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    async with Spool(options(tmp_path), NAMES) as spool:
        left = len(await stored(spool))
        assert 0 < left < 59
        assert balances_by_type(spool)
        # The books were in the half that is left, or they begin with what is there.
        rows = await spool.run(
            lambda db: db.execute("SELECT reason FROM dead_letters WHERE reason LIKE '%lost%'").fetchall()
        )
        if rows:
            assert rows[0][0].startswith(f"{59 - left} events were lost")
            assert "spool.db.corrupt-" in rows[0][0]


async def test_damaged_books(tmp_path):
    """A changed digit in the books is seen, and doesn't stay as an imbalance for ever."""
    await filled(tmp_path)
    with file_of(tmp_path) as db:
        db.execute("UPDATE books SET body = CAST(replace(CAST(body AS TEXT), '60', '70') AS BLOB)")
        db.execute("UPDATE books SET body = '{}' WHERE body IS NULL")
        db.execute("UPDATE books SET checksum = checksum + 1")
    async with Spool(options(tmp_path), NAMES) as spool:
        assert balances_by_type(spool)
        assert len(await stored(spool)) == 29
        assert len(spool.set_aside) == 1


@pytest.mark.parametrize("length", [0, 1, 99, 511])
async def test_a_file_cut_to_nothing(tmp_path, length):
    """SQLite would take it for a new file and delete its WAL: it is set aside, and said."""
    path = await filled(tmp_path)
    with path.open("r+b") as file:
        file.truncate(length)
    async with Spool(options(tmp_path), NAMES) as spool:
        assert len(spool.set_aside) == 1
        await spool.append(Intaken([batch("new")]))


async def test_a_wal_whose_middle_is_damaged(tmp_path):
    """SQLite drops the commits behind a wrong frame without a word: they are found, and the WAL is kept."""
    (tmp_path / "a").mkdir()
    async with Spool(options(tmp_path / "a"), NAMES) as spool:
        await spool.append(Intaken([batch("e0", size=50_000)]))
        await spool.run(lambda db: db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
        for n in range(1, 6):
            await spool.append(Intaken([batch(f"e{n}", size=50_000)], [letter(f"l{n}")]))
        shutil.copytree(tmp_path / "a", tmp_path / "b")
    wal = bytearray((tmp_path / "b" / "spool.db-wal").read_bytes())
    wal[60] ^= 1  # the first frame's page
    (tmp_path / "b" / "spool.db-wal").write_bytes(wal)
    with sqlite3.connect(f"file:{tmp_path}/b/spool.db?mode=ro", uri=True) as db:
        assert db.execute("SELECT count(*) FROM segments").fetchone() == (1,), "SQLite sees them: this shows nothing"
    db.close()

    async with Spool(options(tmp_path / "b"), NAMES) as spool:
        found = await stored(spool)
        assert set(found) >= {"e0", "e2", "e3", "e4", "e5"}
        assert balances_by_type(spool)
        assert spool.dead_letters >= 4
        assert len(spool.set_aside) == 1


async def test_a_wal_that_is_cut_to_nothing_under_the_daemon(tmp_path):
    """What was acked after that stands behind a hole, and a kill may come before it is in the file: it is found."""
    (tmp_path / "a").mkdir()
    async with Spool(options(tmp_path / "a"), NAMES) as spool:
        for n in range(3):
            await spool.append(Intaken([batch(f"before{n}", size=20_000)]))
        os.truncate(tmp_path / "a" / "spool.db-wal", 0)
        for n in range(5):
            await spool.append(Intaken([batch(f"after{n}", size=20_000)], [letter(f"l{n}")]))
        shutil.copytree(tmp_path / "a", tmp_path / "b")
    async with Spool(options(tmp_path / "b"), NAMES) as spool:
        assert {name for name in await stored(spool) if name.startswith("after")} == {f"after{n}" for n in range(5)}
        assert balances_by_type(spool)
        assert len(spool.set_aside) == 1


async def test_a_damaged_wal_that_there_is_no_room_to_keep(tmp_path, monkeypatch):
    """It is said how much is missing, nothing is left on the full disk, start after start; and nothing is changed."""
    (tmp_path / "a").mkdir()
    async with Spool(options(tmp_path / "a"), NAMES) as spool:
        for n in range(6):
            await spool.append(Intaken([batch(f"e{n}", size=50_000)]))
        shutil.copytree(tmp_path / "a", tmp_path / "b")
    wal = tmp_path / "b" / "spool.db-wal"
    damaged = bytearray(wal.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    wal.write_bytes(damaged)

    def full(source, target):
        Path(target).write_bytes(Path(source).read_bytes()[:1000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        for _ in range(2):
            with pytest.raises(SpoolError, match=r"spool.db-wal is damaged.*No space left") as refused:
                await Spool(options(tmp_path / "b"), NAMES).__aenter__()
            assert f"make room for {len(damaged):,} bytes" in refused.value.hint
    assert not list((tmp_path / "b").glob("*.corrupt-*"))
    assert wal.read_bytes() == damaged
    async with Spool(options(tmp_path / "b"), NAMES) as spool:
        assert len(await stored(spool)) >= 5
        assert len(spool.set_aside) == 1


async def test_a_wal_without_its_file(tmp_path):
    """The file is gone, the WAL isn't: what was committed last is in it, and SQLite would delete it."""
    (tmp_path / "a").mkdir()
    async with Spool(options(tmp_path / "a"), NAMES) as spool:
        for n in range(4):
            await spool.append(Intaken([batch(f"e{n}", size=50_000)]))
        shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "spool.db").unlink()
    async with Spool(options(tmp_path / "b"), NAMES) as spool:
        assert await stored(spool) == ["e0", "e1", "e2", "e3"]
        assert balances_by_type(spool)
        assert len(spool.set_aside) == 1


@pytest.mark.parametrize("codes", [b"\x03\x05\x03", b"\x03", b"\x03" * 9, b"\xff\xff\xff", b""], ids=repr)
async def test_a_row_that_is_damaged_while_the_daemon_runs(tmp_path, codes):
    """What the disk gives back may be wrong where it says which events the row holds: the books know, and go on balancing."""
    async with Spool(options(tmp_path), NAMES) as spool:
        backlog = Backlog(spool, 1)  # nothing fits into the ring: all is read back
        await spool.append(Intaken([batch("a", "b", "c")]))
        await spool.append(Intaken([batch("d")]))
        await spool.append(Intaken([batch("e", "f")]))
        await spool.run(lambda db: damage(db, 1, codes))
        parcel = await asyncio.wait_for(backlog.take(1, 10**6, 0), 5)
        await until(lambda: not spool.unsettled_bytes)
        assert spool.damaged == 1
        assert balances_by_type(spool)
        assert [parcel.events, spool.segments] == [1, 2]
        found = {kind: spool.accounts.total(kind) for kind in ("accepted", "dead_lettered", "waiting")}
        assert found == {"accepted": 6, "dead_lettered": 3, "waiting": 3}
        assert spool.dead_letters == 3
        # A second one, before the first commit after it is done.
        await spool.run(lambda db: damage(db, 3, codes))
        backlog.settle(Settlement(parcel.segments, delivered=parcel.codes))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(backlog.take(1, 10**6, 0), 0.2)
        await until(lambda: not spool.unsettled_bytes)
        assert balances_by_type(spool)
    async with Spool(options(tmp_path), NAMES) as spool:
        assert balances_by_type(spool)
        found = {kind: spool.accounts.total(kind) for kind in ("accepted", "delivered", "dead_lettered", "waiting")}
        assert found == {"accepted": 6, "delivered": 1, "dead_lettered": 5, "waiting": 0}
        assert await spool.run(lambda db: db.execute("SELECT count(*) FROM dead_letters").fetchone()) == (5,)


def damage(db, id_, codes):
    """What a disk may do."""
    db.execute("UPDATE segments SET codes = ? WHERE id = ?", (codes, id_))


async def test_commits_that_were_cut_off_are_noticed(tmp_path):
    """The WAL's index remembers how many frames were committed: a WAL that has fewer was damaged."""
    (tmp_path / "a").mkdir()
    async with Spool(options(tmp_path / "a"), NAMES) as spool:
        for n in range(4):
            await spool.append(Intaken([batch(f"e{n}", size=50_000)]))
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        shutil.copytree(tmp_path / "a", tmp_path / "c")
    wal = tmp_path / "b" / "spool.db-wal"
    with wal.open("r+b") as file:
        file.truncate(wal.stat().st_size - 40_000)
    for name, loses in (("b", True), ("c", False)):
        with capture_logs() as logs:
            async with Spool(options(tmp_path / name), NAMES) as spool:
                assert (await stored(spool) != ["e0", "e1", "e2", "e3"]) is loses
                assert bool(spool.set_aside) is loses
        assert ("wal_damaged" in {entry["event"] for entry in logs}) is loses


@pytest.mark.parametrize("harm", ["the WAL is cut off", "the WAL is gone", "an old copy", "the file is gone", "none"])
async def test_what_nothing_in_the_file_shows_is_noticed(tmp_path, harm):
    """The newest commits are gone without a trace: the lock file knows how many events there were. Told once, and counted."""
    (tmp_path / "a").mkdir()
    async with Spool(options(tmp_path / "a"), NAMES) as spool:
        for n in range(4):
            await spool.append(Intaken([batch(f"e{n}", size=50_000)], [letter(f"l{n}")]))
            if n == 1:
                await spool.run(lambda db: db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
                shutil.copytree(tmp_path / "a", tmp_path / "old")
        shutil.copytree(tmp_path / "a", tmp_path / "b")
    b, wal = tmp_path / "b", tmp_path / "b" / "spool.db-wal"
    if harm != "none":
        (b / "spool.db-shm").unlink()
        wal.unlink() if harm != "the WAL is cut off" else os.truncate(wal, wal.stat().st_size // 2 + 9_000)
    if harm == "an old copy":
        shutil.copy(tmp_path / "old" / "spool.db", b / "spool.db")
    if harm == "the file is gone":
        (b / "spool.db").unlink()
    missing = {"the WAL is cut off": 2, "the file is gone": 8, "none": 0}.get(harm, 4)
    with capture_logs() as logs:
        async with Spool(options(b), NAMES) as spool:
            assert spool.missing == missing
            assert spool.accounts.total("accepted") == 8 - missing
            await spool.append(Intaken([batch("new")]))
    assert ("events_missing" in {entry["event"] for entry in logs}) is bool(missing)
    async with Spool(options(b), NAMES) as spool:
        assert spool.missing == 0, "told twice"


async def test_corruption_that_shows_later(tmp_path):
    """A read that SQLite calls malformed ends the process; the next start looks at everything and salvages: no crash loop."""
    path = await filled(tmp_path, count=60, size=60_000)
    async with Spool(options(tmp_path), NAMES) as spool:
        pages_ = path.stat().st_size // 32768
        with path.open("r+b") as file:
            file.seek((pages_ // 2) * 32768)
            file.write(bytes(range(256)) * 128 * 8)
        await spool.run(lambda db: db.execute("PRAGMA cache_size = 1").fetchall())
        await spool.run(lambda db: db.execute("PRAGMA shrink_memory").fetchall())
        with pytest.raises(SpoolError):
            await spool.read_after(0, 2**40)
        with pytest.raises(SpoolError, match="damaged"):
            await asyncio.wait_for(spool.ended(), 10)
        assert spool.failed
    assert (tmp_path / "spool.db.lock").read_text().startswith(salvage.DISTRUSTED)

    async with Spool(options(tmp_path), NAMES) as again:
        assert 0 < len(await stored(again)) < 59
        assert balances_by_type(again)
        assert len(again.set_aside) == 1
    assert (tmp_path / "spool.db.lock").read_text().startswith(f"{salvage.KNOWN}\n")


@pytest.mark.parametrize("step", range(6))
async def test_a_salvage_that_is_interrupted(tmp_path, monkeypatch, step):
    """Killed between any two of its steps, the next start goes on: nothing is lost, nothing is there twice."""
    path = await filled(tmp_path)
    (tmp_path / "spool.db-wal").write_bytes(b"")
    (tmp_path / "spool.db-shm").write_bytes(b"")
    with path.open("r+b") as file:
        file.write(b"?")

    class Killed(BaseException):
        pass

    steps = iter(range(100))
    replace = type(path).replace

    def dies(self, target):
        if next(steps) == step:
            raise Killed
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "replace", dies)
        try:
            async with Spool(options(tmp_path), NAMES):
                pass
        except Killed:
            assert step < 5
    async with Spool(options(tmp_path), NAMES) as spool:
        assert await stored(spool) == [f"e{n}" for n in range(1, 30)]
        assert spool.dead_letters == 30
        assert balances_by_type(spool)
        assert len(spool.set_aside) == 1


async def test_pages_reads_what_sqlite_reads(tmp_path):
    """The control of the page reader: on a whole file it finds exactly the rows that SQL gives, small and overflowing ones."""
    async with Spool(options(tmp_path), NAMES) as spool:
        for size in (10, 5_000, 31_000, 33_000, 70_000, 300_000):
            await spool.append(Intaken([batch("x", size=size)], [letter(size=size)], bytes([OPEN])))
        segments, _ = await spool.read_after(0, 2**40)
        spool.settle(Settlement(segments[1:3], delivered=bytes([OPEN, OPEN])))
        await until(lambda: spool.segments == 4)
        by_sql = await spool.run(
            lambda db: (
                db.execute("SELECT id, created_at, raw_bytes, raw_crc32, codes, block FROM segments").fetchall(),
                db.execute("SELECT * FROM dead_letters").fetchall(),
                db.execute("SELECT body, checksum FROM books").fetchall(),
                db.execute("SELECT code, name FROM event_types").fetchall(),
            )
        )
        read = pages.Pages(tmp_path / "spool.db")
        found = list(read.rows())
        read.close()
    for table, rows in zip(("segments", "dead_letters", "books", "event_types"), by_sql, strict=True):
        assert sorted(row for name, row in found if name == table) == rows


@pytest.mark.parametrize("count", [3, 60, 400])
async def test_a_start_reads_the_leaves_ahead(tmp_path, monkeypatch, count):
    """All leaves of the segments are asked for at once, and nothing else; a file whose pages point in a circle ends it, too."""
    path = tmp_path / "spool.db"
    async with Spool(options(tmp_path, max_segment_bytes=20_000), NAMES) as spool:
        for n in range(count):
            await spool.append(Intaken([batch(f"{n}-{m}", size=20) for m in range(50)]))
    with contextlib.closing(sqlite3.connect(path)) as db:
        (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'segments'").fetchone()
    read = pages.Pages(path)
    leaves = {n for n in range(1, read.count + 1) for table, _ in read._rows_of(read.page(n), n) if table == "segments"}
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _fd, at, size, _advice: asked.append(at // size + 1))
    read.read_ahead(root)

    assert sorted(asked) == (sorted(leaves) if leaves != {root} else [])

    cells = (pages.PAGE_BYTES - 12) // 2 - 2  # all of them the same one
    page = b"\x05\0\0" + cells.to_bytes(2, "big") + b"\0\0\0" + root.to_bytes(4, "big")
    page += (pages.PAGE_BYTES - 4).to_bytes(2, "big") * cells
    with path.open("r+b") as file:
        file.seek((root - 1) * pages.PAGE_BYTES)
        file.write(page.ljust(pages.PAGE_BYTES - 4, b"\0") + root.to_bytes(4, "big"))
    read.read_ahead(root)
    read.close()


@pytest.mark.parametrize("flip", [0x01, 0x80])
async def test_damage_in_the_schemas_own_text(tmp_path, flip):
    """A table's name or statement that one bit has changed, into no text at all perhaps: every start succeeds all the same."""
    await filled(tmp_path)
    path = tmp_path / "spool.db"
    whole = path.read_bytes()
    names = [at for at in range(pages.PAGE_BYTES) if whole.startswith(b"segments", at)]
    assert names
    for at in [at + n for at in names for n in (0, 5)] + [whole.index(b"CREATE TABLE segments") + n for n in (3, 25)]:
        for file in tmp_path.glob("spool.db*"):
            file.unlink()
        path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
        async with Spool(options(tmp_path), NAMES) as spool:
            assert spool.accounts.imbalance() == 0
            assert spool.accounts.total("waiting") == 29
