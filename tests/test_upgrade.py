"""Formats: every released one opens, a step to a newer one is all or nothing, a newer file is refused as it lies there."""

import asyncio
import contextlib
import gzip
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import NAMES, balanced, until
from test_lifecycle import Process
from test_spool import balances_by_type, batch, file_of, letter, options, stored

from bridged.app import App
from bridged.backlog import tables
from bridged.backlog.segment import Batch
from bridged.backlog.spool import Intaken, Settlement, Spool, SpoolOptions
from bridged.errors import SpoolError

SPOOLS = sorted((Path(__file__).parent / "spools").glob("version-*.db.gz"))
ROOT = Path(__file__).parent.parent


def mapped(n):
    """An event as the mapping makes them, made up."""
    return (
        b'{"event":"Email Open","properties":{"token":"example-token","distinct_id":"user-%d","time":1763900000,'
        b'"$insert_id":"sample-%d","$partner_id":"braze","ip":0}}\n' % (n, n)
    )


async def make(path):
    """A spool of the present format: what tests/spools/README.md says."""
    clock = 1763900000.0

    def now():
        return clock

    async with Spool(SpoolOptions(path=str(path), max_segment_events=8), NAMES, now) as spool:
        numbers = iter(range(100))
        for n in range(9):
            clock += 1
            size = 8 if n < 4 else 4
            events = b"".join(mapped(next(numbers)) for _ in range(size))
            letters = [letter(f"letter {n}")] if n < 5 else []
            await spool.append(
                Intaken([Batch(events, bytes([3 if n % 2 else 5]) * size)], letters, bytes([7] * (n < 3)))
            )
        segments, _ = await spool.read_after(0, 2**30)
        codes = [segment.codes for segment in segments]
        spool.settle(Settlement([segments[0]], delivered=codes[0]))
        spool.settle(Settlement([segments[4]], delivered=codes[4][:2], expired=codes[4][2:]))
        await until(lambda: spool.segments == 7)
        clock += 1


def test_there_is_a_file_of_every_format():
    """A format that is released without a file here can't be tried any more."""
    assert [path.name for path in SPOOLS] == [
        f"version-{n}.db.gz" for n in range(1, tables.newest(tables.MIGRATIONS) + 1)
    ]


@pytest.mark.parametrize("packed", SPOOLS, ids=lambda path: path.name)
async def test_a_spool_of_a_released_format(packed, tmp_path, config, emulator):
    """It opens, everything that waits in it is delivered, its dead letters are there, and its books balance."""
    (tmp_path / "spool.db").write_bytes(gzip.decompress(packed.read_bytes()))
    with file_of(tmp_path) as db:
        waiting = db.execute("SELECT sum(length(codes)) FROM segments").fetchone()[0]
    async with App(config()) as app:
        before = {kind: app.spool.accounts.total(kind) for kind in app.spool.accounts.counts}
        await until(lambda: app.spool.accounts.total("waiting") == 0, "what waits to be delivered")
        assert before["accepted"] == sum(n for kind, n in before.items() if kind != "accepted")
        # By now some of it may have been delivered before it was looked at.
        assert app.spool.accounts.total("delivered") == before["delivered"] + before["waiting"] >= waiting
        assert app.spool.dead_letters == 5
        assert app.spool.set_aside == []
        assert app.spool.damaged == 0
        balanced(app)
    assert len(list(emulator.events())) == waiting


def add_column(db):
    """A made-up step."""
    db.execute("ALTER TABLE dead_letters ADD COLUMN note TEXT NOT NULL DEFAULT ''")


def reverse_reasons(db):
    """A made-up step that rewrites."""
    for id_, reason in db.execute("SELECT id, reason FROM dead_letters").fetchall():
        db.execute("UPDATE dead_letters SET reason = ? WHERE id = ?", (reason[::-1], id_))
    hook = os.environ.get("BRIDGED_TEST_STEP")
    if hook:
        print("in the midst", flush=True)
        signal.pause()


STEPS = (tables.Migration(add_column, rewrites=False), tables.Migration(reverse_reasons, rewrites=True))


async def filled(tmp_path, letters=0):
    """A closed spool of format 1."""
    async with Spool(options(tmp_path), NAMES) as spool:
        if letters:
            await spool.append(Intaken([], [letter(f"more {n}") for n in range(letters)]))
        for n in range(5):
            await spool.append(Intaken([batch(f"e{n}")], [letter(f"l{n}")]))
    return tmp_path / "spool.db"


def migrated(path, steps=STEPS):
    """Goes through the steps, in a connection of its own."""
    db = sqlite3.connect(path, isolation_level=None)
    try:
        tables.set_up(db, "FULL", 2**30, 2**20)
        tables.migrate(db, path, NAMES, steps)
        return (
            tables.format_of(db),
            db.execute("PRAGMA application_id").fetchone()[0] - tables.APPLICATION_ID,
            [reason for (reason,) in db.execute("SELECT DISTINCT reason FROM dead_letters")],
        )
    finally:
        db.close()


async def test_steps_are_taken_in_order_once(tmp_path):
    """Each step changes the number of the format with what it does; what is rewritten was copied before."""
    path = await filled(tmp_path)
    assert migrated(path, STEPS[:1]) == (2, 2, ["because"])
    assert list(tmp_path.glob("*.version-*")) == []
    assert migrated(path) == (3, 3, ["esuaceb"])
    assert migrated(path) == (3, 3, ["esuaceb"])
    [copy] = tmp_path.glob("*.version-*")
    assert copy.name == "spool.db.version-2"
    db = sqlite3.connect(copy)
    assert db.execute("SELECT DISTINCT reason FROM dead_letters").fetchall() == [("because",)]
    assert db.execute("PRAGMA user_version").fetchone() == (2,)
    db.close()


async def test_a_step_that_fails_changes_nothing(tmp_path):
    """An error in the midst of a step leaves the format before it, whole."""
    path = await filled(tmp_path)

    def fails(db):
        db.execute("DELETE FROM dead_letters")
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        migrated(path, (STEPS[0], tables.Migration(fails, rewrites=False)))
    assert migrated(path, STEPS[:1]) == (2, 2, ["because"])


async def test_killed_in_the_midst_of_a_step(tmp_path):
    """SIGKILL inside the transaction: the file is of the old format, with everything, and the next try succeeds."""
    path = await filled(tmp_path)
    for _ in range(3):
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, str(Path(__file__)), "--migrate", str(path)),
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "BRIDGED_TEST_STEP": "1"},
            stdout=subprocess.PIPE,
        )
        assert await asyncio.wait_for(child.stdout.readline(), 60) == b"begins\n"
        assert await asyncio.wait_for(child.stdout.readline(), 60) == b"in the midst\n"
        child.kill()
        await child.wait()
        with file_of(tmp_path) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (2,)
            assert db.execute("SELECT DISTINCT reason FROM dead_letters").fetchall() == [("because",)]
    assert migrated(path) == (3, 3, ["esuaceb"])
    with file_of(tmp_path) as db:
        assert db.execute("SELECT count(*) FROM segments").fetchone() == (5,)


async def test_killed_at_any_moment_of_a_migration(tmp_path):
    """SIGKILL before, in and after the copy, the steps and their commits: one format or the next, whole, and the next try succeeds.

    `BRIDGED_MIGRATION_KILLS=200` is the long run.
    """
    path = await filled(tmp_path, letters=3000)
    pristine = path.read_bytes()
    kills, formats = int(os.environ.get("BRIDGED_MIGRATION_KILLS", "6")), set()
    most_s = 0.0
    for n in range(-1, kills):
        for file in tmp_path.glob("spool.db*"):
            file.unlink()
        path.write_bytes(pristine)
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, str(Path(__file__)), "--migrate", str(path)),
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
            stdout=subprocess.PIPE,
        )
        assert await asyncio.wait_for(child.stdout.readline(), 60) == b"begins\n"
        if n < 0:  # one that ends by itself says how long it takes
            started = time.monotonic()
            await child.wait()
            most_s = time.monotonic() - started
        else:
            await asyncio.sleep(most_s * random.random())
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
        with file_of(tmp_path) as db:
            [(version,)] = db.execute("PRAGMA user_version")
            reasons = [reason for (reason,) in db.execute("SELECT DISTINCT reason FROM dead_letters")]
            assert reasons == (["esuaceb"] if version == 3 else ["because"])
            assert db.execute("SELECT count(*) FROM dead_letters").fetchone() == (3005,)
            assert db.execute("PRAGMA quick_check").fetchone() == ("ok",)
        formats.add(version)
        assert migrated(path) == (3, 3, ["esuaceb"])
        with file_of(tmp_path) as db:
            assert db.execute("SELECT count(*) FROM segments").fetchone() == (5,)
    assert formats <= {1, 2, 3}
    assert kills < 100 or formats == {1, 2, 3}, "it was never killed in the midst: this shows nothing"


@pytest.mark.parametrize("number", [2, 99])
@pytest.mark.parametrize("stamped", [False, True])
async def test_a_newer_file_is_refused_as_it_is(tmp_path, number, stamped):
    """Not a byte is changed, and the words say what to do."""
    path = await filled(tmp_path)
    with file_of(tmp_path) as db:
        db.execute(f"PRAGMA user_version = {number}")
        if stamped:
            db.execute(f"PRAGMA application_id = {tables.APPLICATION_ID + number}")
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(SpoolError, match=f"newer bridged .version {number}") as refused:
            await Spool(options(tmp_path), NAMES).__aenter__()
        assert "untouched" in refused.value.hint
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*corrupt*"))


async def test_a_second_daemon_is_refused(tmp_path, emulator):
    """Two real processes: the second exits 74 and says why, the first goes on; and after its end the spool is free."""
    (tmp_path / "second").mkdir()
    first = Process(tmp_path, emulator.url)
    second = Process(tmp_path / "second", emulator.url)
    second.settings["spool__path"] = str(tmp_path / "spool.db")
    await first.up()
    try:
        await second.start()
        assert await second.exits() == 74
        assert "is in use by another bridged" in second.said()
        assert "spool.path" in second.said()
        assert first.process.returncode is None
    finally:
        assert await first.end() == 0
    await second.up()
    assert await second.end() == 0


async def test_a_spool_without_migrations_to_do_is_copied_nowhere(tmp_path):
    """The present format opens as it is."""
    await filled(tmp_path)
    async with Spool(options(tmp_path), NAMES) as spool:
        assert await stored(spool) == [f"e{n}" for n in range(5)]
        assert balances_by_type(spool)
    assert {file.name for file in tmp_path.glob("spool.db*")} <= {"spool.db", "spool.db.lock", "spool.db.reserve"}


if __name__ == "__main__":
    if sys.argv[1] == "--migrate":
        print("begins", flush=True)
        migrated(Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(make(Path(folder) / "spool.db"))
            Path(sys.argv[1]).write_bytes(gzip.compress((Path(folder) / "spool.db").read_bytes(), 9, mtime=0))
