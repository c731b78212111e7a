"""Crash images: whatever part of the unsynced writes a power cut keeps, the spool opens and holds what was acked."""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import sqlite3
from pathlib import Path

import pytest
from conftest import NAMES, until
from test_bench import bench, finished
from test_spool import batch, options, stored

from bench import images
from bench.images import Machine, Op
from bridged.backlog.pages import Pages
from bridged.backlog.spool import Intaken, Settlement, Spool
from bridged.backlog.tables import PAGE_BYTES, checkpoint


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The log of a run of the real spool, and the folder in which it left its files."""
    where = tmp_path_factory.mktemp("log")
    return images.record(where, 120, seed=1), where / "recorded"


def test_every_image_opens_and_holds_what_was_acked(recorded, tmp_path):
    """200 images over one run: integrity_check, books, no damaged row, nothing acked missing, nothing settled back."""
    summary = asyncio.run(images.check(recorded[0], 200, 1, tmp_path))
    assert summary.problems == []
    assert summary.images == 200


def test_the_log_is_the_run(recorded):
    """Carried out as a whole it gives the files that the run left, byte by byte; and it holds what an image depends on."""
    ops, folder = recorded
    machine = Machine()
    for op in ops:
        machine.step(op)
    for name, file in machine._files.items():
        content = bytearray(file.durable)
        for op in file.pending:
            images.apply(content, op)
        assert content == (folder / name).read_bytes(), name
    assert {op.kind for op in ops} == {"write", "sync", "truncate", "create", "unlink", "folder", "mark"}
    assert len(machine.promised.acked) > 100
    assert len(machine.promised.settled) > 50


def test_images_of_an_unsafe_spool_are_found_out(tmp_path):
    """The control: with synchronous=NORMAL commits are acked before they are synced, and images must show it."""
    ops = images.record(tmp_path, 40, 2, synchronous="NORMAL")
    summary = asyncio.run(images.check(ops, 60, 2, tmp_path))
    assert "acked batches are lost" in str(summary.problems)


def test_what_is_synced_stays_and_the_rest_may_go():
    """A synced write is in every image, an unsynced one is there, torn at 512 bytes, or not."""
    machine = Machine()
    new = bytes([2]) * 1024
    for op in (
        Op("create", "spool.db"),
        Op("write", "spool.db", 0, bytes([1]) * 1024),
        Op("sync", "spool.db"),
        Op("folder"),
        Op("write", "spool.db", 0, new),
    ):
        machine.step(op)
    dice = random.Random(0)
    seen = {machine.image(dice)["spool.db"] for _ in range(300)}
    old, half = bytes([1]) * 512, bytes([2]) * 512
    assert seen == {old + old, old + half, half + old, half + half}
    machine.step(Op("sync", "spool.db"))
    assert {machine.image(dice)["spool.db"] for _ in range(50)} == {new}


async def test_the_head_of_a_frame_over_an_older_page(tmp_path):
    """A cut that keeps the heads of a new WAL's frames and not their pages: what an older WAL left there was settled."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    wal, frame = tmp_path / "a" / "spool.db-wal", 24 + PAGE_BYTES
    async with Spool(options(tmp_path / "a"), NAMES) as spool:
        await spool.run(lambda db: checkpoint(db, "RESTART"))
        await spool.append(Intaken([batch(f"old{n}") for n in range(3)]))
        segments, _ = await spool.read_after(0, 2**30)
        spool.settle(Settlement(segments, delivered=b"".join(segment.codes for segment in segments)))
        await until(lambda: not spool.unsettled_bytes)
        await spool.run(lambda db: checkpoint(db, "RESTART"))
        shutil.copy(tmp_path / "a" / "spool.db", tmp_path / "b")
        old = wal.read_bytes()
        await spool.append(Intaken([batch("new")]))
        new = wal.read_bytes()
    salts = new[16:24]
    assert len(new) == len(old)
    assert salts != old[16:24], "the WAL began anew: else this shows nothing"
    heads = [at for at in range(32, len(new), frame) if new[at + 8 : at + 16] == salts]
    torn = bytearray(old)
    torn[:32] = new[:32]
    for at in heads:
        torn[at : at + 24] = new[at : at + 24]
    (tmp_path / "b" / "spool.db-wal").write_bytes(torn)
    with contextlib.closing(Pages(tmp_path / "b" / "spool.db")) as read:
        there = [table for at in heads for table, _ in read._rows_of(torn[at + 24 : at + frame], 2)]
    assert "segments" in there, "the old rows aren't behind a new head: this shows nothing"

    async with Spool(options(tmp_path / "b"), NAMES) as spool:
        assert await stored(spool) == []
        assert (spool.accounts.total("accepted"), spool.accounts.total("delivered")) == (3, 3)


def test_a_file_that_was_removed_may_be_back():
    """Names are synced with their folder alone; what was removed and not synced may still be there."""
    machine = Machine()
    for op in (Op("create", "spool.db"), Op("folder"), Op("create", "spool.db-wal"), Op("unlink", "spool.db")):
        machine.step(op)
    dice = random.Random(0)
    seen = {tuple(sorted(name for name in machine.image(dice) if "shm" not in name)) for _ in range(200)}
    assert seen == {("spool.db",), ("spool.db", "spool.db-wal"), ("spool.db-wal",)}


def test_a_lost_row_is_noticed(recorded, tmp_path):
    """The check itself: an image of the finished run in which one acked row is missing is a problem."""
    ops, folder = recorded
    machine = Machine()
    for op in ops:
        machine.step(op)
    whole = {"spool.db": (folder / "spool.db").read_bytes()}
    assert asyncio.run(images.opened(tmp_path / "whole", whole, machine.promised)) == []
    file = tmp_path / "spool.db"
    file.write_bytes(whole["spool.db"])
    with sqlite3.connect(file) as db:
        db.execute("DELETE FROM segments WHERE id = (SELECT max(id) FROM segments)")
    db.close()
    (tmp_path / "less").mkdir()
    problems = asyncio.run(images.opened(tmp_path / "less", {"spool.db": file.read_bytes()}, machine.promised))
    assert "acked batches are lost" in str(problems)


def test_few_images_on_many_cores_are_made(tmp_path):
    """Shared among runs and processes, none falls under the table: nothing was shown by "0 crash images, all open"."""
    assert images.shares(7, 3) == [2, 2, 3]
    code, out, err = finished("images", "--images", "3", "--runs", "2", "--commits", "20", cwd=tmp_path)
    assert code == 0, out + err
    assert "3 crash images of" in out
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_all_processes(tmp_path):
    """A terminal sends it to each of them. The workers leave it to the parent, which ends them and removes what they wrote."""
    there = Path(images.fast_folder() or "/tmp")  # where that is
    before = set(there.iterdir())
    options = ("images", "--images", "20", "--runs", "10", "--commits", "200")
    with bench(*options, cwd=tmp_path, start_new_session=True) as process:
        assert process.stdout.readline().startswith("2 images, 0 problems")
        os.killpg(process.pid, signal.SIGINT)
        try:
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGINT
    assert "KeyboardInterrupt" not in err
    assert list(tmp_path.iterdir()) == []
    assert not [path for path in set(there.iterdir()) - before if path.name.startswith("bridged-images-")]
