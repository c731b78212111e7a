"""The disk: full, over its quota, read-only, failing. Nothing acked is lost, and what waits is settled by itself.

Real file systems on a small scale: a tmpfs that root mounts for the test. Write and fsync errors are made in the daemon's own
process by libfiu (Debian's fiu-utils), under SQLite and not in its place.
"""

import asyncio
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from conftest import NAMES, SLOW, balanced, currents, free_port, until
from test_lifecycle import ROOT, Process, process
from test_spool import OPEN, batch, collect, letter, options, stored

from bench import disk
from bridged import durable
from bridged.app import App
from bridged.backlog import spool as spool_module
from bridged.backlog.reserve import Reserve
from bridged.backlog.spool import Intaken, Settlement, Spool
from bridged.errors import SpoolError, SpoolFull

__all__ = ["process"]

MIB = 2**20
CI = bool(os.environ.get("CI"))
needs_root = pytest.mark.skipif(os.geteuid() != 0 and not CI, reason="mounting takes root")
needs_fiu = pytest.mark.skipif(shutil.which("fiu-run") is None and not CI, reason="fiu-utils is not installed")


@pytest.fixture
def small(tmp_path):
    """A tmpfs of 32 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder, mode):
    """Makes it read-only, or what else a mount can be."""
    subprocess.run(["mount", "-o", f"remount,{mode}", str(folder)], check=True)


def fill(folder):
    """Takes what is free, to the last byte."""
    with (folder / "filler").open("ab") as file, contextlib.suppress(OSError):
        while True:
            os.write(file.fileno(), bytes(4096))
    disk = os.statvfs(folder)
    assert disk.f_bavail == 0, "it isn't full: this shows nothing"


async def fill_spool(spool, size=100_000):
    """Appends until it refuses; gives what was committed."""
    committed = collect(spool)
    with contextlib.suppress(SpoolFull):
        for n in range(2000):
            await spool.append(Intaken([batch(f"e{n}", size=size)]))
    return committed


@needs_root
async def test_new_events_are_refused_before_the_disk_is_full(small, monkeypatch):
    """The cap is far away, the disk isn't: refused in words that name disk, bytes and path, while settling works."""
    monkeypatch.setattr(spool_module, "_IDLE_S", 0.05)
    async with Spool(options(small, max_bytes=2**30), NAMES) as spool:
        committed = await fill_spool(spool)
        free = os.statvfs(small)
        assert free.f_bavail * free.f_frsize > 2 * 512 * 1024, "nothing was kept for settling"
        assert (small / "spool.db.reserve").stat().st_blocks * 512 == 4 * MIB
        assert not spool.room.is_set()
        with pytest.raises(SpoolFull, match=rf"the disk of the spool {small}/spool\.db is full: [\d,]+ bytes are free"):
            spool.append(Intaken([batch("one more")]))

        for segment in committed:
            spool.settle(Settlement([segment], delivered=segment.codes))
        await until(lambda: spool.segments == 0, "everything to be settled")
        await asyncio.wait_for(spool.room.wait(), 10 * SLOW)
        await spool.append(Intaken([batch("again")]))
        assert spool.accounts.imbalance() == 0


@needs_root
@pytest.mark.parametrize("refused", [False, True], ids=["delivered", "dead-lettered"])
async def test_a_disk_filled_to_the_last_byte_drains_by_itself(small, monkeypatch, refused):
    """Something else takes all there is: what waits is settled all the same, and the reserve comes back with the room."""
    monkeypatch.setattr(spool_module, "_IDLE_S", 0.05)
    async with Spool(options(small, max_bytes=2**30), NAMES) as spool:
        committed = await fill_spool(spool)
        fill(small)
        for at, segment in enumerate(committed):
            if refused and at % 2:
                spool.settle(Settlement([segment], dead_letters=[letter(f"{at}", size=50_000)]))
            else:
                spool.settle(Settlement([segment], delivered=segment.codes))
        await until(lambda: not spool.segments, "everything to be settled", 30)
        assert not spool.failed
        assert spool.accounts.imbalance() == 0
        assert (small / "filler").stat().st_size > 0
        (small / "filler").unlink()
        await until(lambda: not spool.near_cap, "room for new events")
        assert (small / "spool.db.reserve").stat().st_size == 4 * MIB
        await spool.append(Intaken([batch("again")]))


@contextlib.contextmanager
def eating(folder):
    """Somebody who takes what is free, all the time: what is let go is gone in the same moment."""
    end = threading.Event()

    def eat():
        with (folder / "eaten").open("ab") as file:
            while not end.is_set():
                try:
                    os.write(file.fileno(), bytes(2**16))
                except OSError:
                    end.wait(0.0005)

    eater = threading.Thread(target=eat)
    eater.start()
    try:
        yield
    finally:
        end.set()
        eater.join()


@needs_root
@pytest.mark.parametrize("refused", [False, True], ids=["delivered", "dead-lettered"])
async def test_a_disk_that_somebody_keeps_full(small, monkeypatch, refused):
    """A file that grows for ever takes what is let go: the ballast is ours all the same, and what waits is settled."""
    monkeypatch.setattr(spool_module, "_IDLE_S", 0.05)
    async with Spool(options(small, max_bytes=2**30), NAMES) as spool:
        committed = await fill_spool(spool)
        with eating(small):
            await until(lambda: os.statvfs(small).f_bavail == 0, "the disk to be full")
            for at, segment in enumerate(committed):
                if refused and at % 2:
                    spool.settle(Settlement([segment], dead_letters=[letter(f"{at}", size=30_000)]))
                else:
                    spool.settle(Settlement([segment], delivered=segment.codes))
                await asyncio.sleep(0.002)
            await until(lambda: not spool.segments, "everything to be settled", 30)
        assert not (small / "spool.db.reserve").exists(), "it was never needed: this shows nothing"
        assert spool.accounts.imbalance() == 0
        (small / "eaten").unlink()
        await until(lambda: not spool.near_cap, "room for new events")
        await spool.append(Intaken([batch("again")]))


def leave(folder, size):
    """Takes what is free, but for so many bytes."""
    disk = os.statvfs(folder)
    with (folder / "filler").open("ab") as file:
        os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - size)


@needs_root
@pytest.mark.parametrize("free", [3.0, 5.0, 7.0])
async def test_a_disk_that_is_full_between_a_commit_and_its_checkpoint(small, monkeypatch, free):
    """A burst that the WAL had room for, and the file doesn't: the ballast is enough for it, so what waits is settled."""
    monkeypatch.setattr(spool_module, "_IDLE_S", 0.05)
    async with Spool(options(small, max_bytes=2**30), NAMES) as spool:
        committed = collect(spool)
        for n in range(50):
            await spool.append(Intaken([batch(f"a{n}", size=100_000)]))
        leave(small, int(free * MIB))
        burst = [spool.append(Intaken([batch(f"b{n}", size=100_000)])) for n in range(95)]
        done = await asyncio.wait_for(asyncio.gather(*burst, return_exceptions=True), 30 * SLOW)
        assert {type(each) for each in done} <= {type(None), SpoolFull}
        fill(small)
        assert spool.accounts.total("waiting") == 50 + done.count(None)
        for segment in committed:
            spool.settle(Settlement([segment], delivered=segment.codes))
        await until(lambda: not spool.segments, "everything to be settled", 30)
        assert spool.accounts.imbalance() == 0


@needs_root
async def test_refused_events_on_a_disk_that_is_nearly_full(small, monkeypatch):
    """Dead letters are larger than what they come from: as many at a time as the reserve can bring into the file."""
    monkeypatch.setattr(spool_module, "_IDLE_S", 0.05)
    async with Spool(options(small, max_bytes=2**30), NAMES) as spool:
        committed = collect(spool)
        for n in range(60):
            await spool.append(Intaken([batch(f"a{n}", size=100_000)]))
        leave(small, int(8.5 * MIB))
        for at, segment in enumerate(committed):
            spool.settle(Settlement([segment], dead_letters=[letter(f"{at}", size=130_000)]))
        await until(lambda: not spool.segments, "everything to be settled", 30)
        assert spool.dead_letters == 60
        assert spool.accounts.imbalance() == 0


@needs_root
async def test_a_start_on_a_full_disk(small):
    """It starts where not a byte is free, gives everything back, and settles it."""
    async with Spool(options(small, max_bytes=2**30), NAMES) as spool:
        committed = await fill_spool(spool)
    fill(small)
    async with Spool(options(small, max_bytes=2**30), NAMES) as spool:
        assert await stored(spool) == [f"e{n}" for n in range(len(committed))]
        segments, _ = await spool.read_after(0, 2**40)
        for segment in segments:
            spool.settle(Settlement([segment], delivered=segment.codes))
        await until(lambda: not spool.segments, "everything to be settled", 30)
        assert spool.accounts.imbalance() == 0


@needs_root
async def test_a_start_on_a_disk_without_inodes(small):
    """There is room, and yet not for another file: it says so, and doesn't blame another user for the files."""
    remount(small, "nr_inodes=3")  # for its root, the lock and the file
    with pytest.raises(SpoolError) as caught:
        await Spool(options(small), NAMES).__aenter__()
    assert "no inodes left" in caught.value.hint


@needs_root
async def test_a_daemon_on_a_full_disk(small, config, client, emulator):
    """503 with Retry-After, a paused stream, /readyz that says why; and the backlog drains with the filler still there."""
    emulator.script([{"status": 401}])
    settings = config(spool__path=str(small / "spool.db"))
    async with App(settings) as app:
        url = f"http://{settings.sources.http.listen}/v1/currents"
        admin = f"http://{settings.admin.listen}"
        acked = 0

        async def post(n):
            events = [currents(seed=100 * n + m, id=f"{n}-{m}", canvas_name=os.urandom(2000).hex()) for m in range(20)]
            async with client.post(url, json={"events": events}) as answer:
                return answer.status, answer.headers.get("Retry-After"), await answer.text()

        for n in range(2000):
            if n == 20:
                fill(small)
            status, after, text = await post(n)
            if status != 200:
                break
            acked += 20
        assert (status, after) == (503, "30")
        await until(lambda: app.spool.near_cap)
        status, _, text = await post(9999)
        assert status == 503
        assert "the disk of the spool" in text
        async with client.get(f"{admin}/readyz") as answer:
            assert answer.status == 503
            assert "the disk of the spool" in await answer.text()
        async with client.get(f"{admin}/api/status") as answer:
            assert "New events are refused: the disk of the spool" in (await answer.json())["sentence"]

        emulator.script([])
        await until(lambda: app.spool.accounts.total("waiting") == 0, "the backlog to drain", 60)
        assert app.spool.accounts.total("delivered") == acked
        assert (small / "filler").stat().st_size > 0
        balanced(app)


async def test_the_file_is_as_small_as_before(tmp_path, monkeypatch):
    """After a backlog the file comes back to what it was, and 10 % at most."""
    monkeypatch.setattr(spool_module, "_IDLE_S", 0.01)
    monkeypatch.setattr(spool_module, "_QUIET_S", 0.05)
    path = tmp_path / "spool.db"
    async with Spool(options(tmp_path, max_bytes=512 * MIB), NAMES) as spool:
        await spool.append(Intaken([batch("a")]))
        await spool.run(lambda db: db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
        before = path.stat().st_size
        committed = collect(spool)
        for n in range(40):
            await spool.append(Intaken([batch(f"{n}", size=MIB)]))
        spool.settle(Settlement(committed, delivered=bytes([OPEN]) * 40))
        await until(lambda: spool.segments == 1)
        await until(lambda: path.stat().st_size <= before * 1.1, "the file to be as small as before")
        await until(lambda: (tmp_path / "spool.db-wal").stat().st_size == 0, "an empty WAL")


async def test_a_reserve_that_somebody_removes(tmp_path):
    """To make room, with what was made for the day when there is none: it is made again."""
    async with Spool(options(tmp_path), NAMES) as spool:
        (tmp_path / "spool.db.reserve").unlink()
        await spool.append(Intaken([batch("a")]))
        assert (tmp_path / "spool.db.reserve").exists()
        assert not spool.near_cap


def test_a_folder_that_may_not_be_entered_any_more(tmp_path, request):
    """A slip with `chmod` under the daemon, whose files are open: it neither ends nor takes the disk for a full one."""
    reserve = Reserve(tmp_path / "spool.db", 64 * MIB)
    request.getfixturevalue("an_ordinary_user")
    reserve.measure()
    assert reserve.held
    assert not reserve.short(0)


def test_the_reserve_knows_a_quota(tmp_path, monkeypatch):
    """Figures of the file system say nothing about a quota; whether there is room is asked by taking it."""
    reserve = Reserve(tmp_path / "spool.db", 64 * MIB)
    assert reserve.held
    assert not reserve.short(0)
    assert not reserve.no_room_for(MIB)

    def refuses(*_arguments):
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", refuses)
    assert reserve.no_room_for(MIB)
    reserve.release(0)
    reserve.measure()
    assert not reserve.held
    assert reserve.short(0)
    assert not (tmp_path / "spool.db.reserve").exists()


# -- errors of the disk ------------------------------------------------------------------------------------------------


class FaultyProcess(Process):
    """A daemon whose system calls can be made to fail."""

    async def start(self, *arguments, **changes):
        """Under fiu-run; the daemon is its child, and takes commands at a named pipe."""
        variables = {f"BRIDGED__{key.upper()}": value for key, value in (self.settings | changes).items()}
        self.log = (self.folder / "log").open("ab")
        self.process = await asyncio.create_subprocess_exec(
            *("fiu-run", "-x", "-f", str(self.folder / "fiu"), sys.executable, "-m", "bridged", "run", *arguments),
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **variables},
            stdout=self.log,
            stderr=self.log,
        )
        self.log.close()

    async def fault(self, *commands):
        """Switches faults on in the daemon."""
        control = await asyncio.create_subprocess_exec(
            "fiu-ctrl", "-f", str(self.folder / "fiu"), *commands, str(self.process.pid)
        )
        assert await control.wait() == 0


async def post(client, daemon, name):
    """One event; the status, or None without an answer."""
    with contextlib.suppress(Exception):
        async with client.post(
            f"http://127.0.0.1:{daemon.http}/v1/currents", json={"events": [currents(id=name)]}
        ) as answer:
            return answer.status
    return None


@needs_fiu
@pytest.mark.parametrize("calls", [["posix/io/sync/fdatasync", "posix/io/sync/fsync"], ["posix/io/rw/pwrite"]])
async def test_an_error_of_the_disk_ends_the_process(tmp_path, emulator, client, calls):
    """EIO: the event is not acked, nothing is tried again in this process, it exits 74; the next start has all that was acked."""
    daemon = FaultyProcess(tmp_path, "http://127.0.0.1:9")
    await daemon.up()
    acked = [f"a{n}" for n in range(20) if await post(client, daemon, f"a{n}") == 200]
    assert len(acked) == 20
    await daemon.fault(*[part for call in calls for part in ("-c", f"enable name={call},failinfo=5")])
    assert await post(client, daemon, "doomed") in (503, None)
    assert await daemon.exits() == 74, daemon.said()
    assert b"can't write the spool" in (tmp_path / "log").read_bytes()

    again = Process(tmp_path, emulator.url)
    await again.up()
    try:
        await until(lambda: len(delivered(emulator)) >= 20, "what was acked to be delivered")
    finally:
        await again.end(signal.SIGTERM)
    assert set(acked) <= delivered(emulator)


@pytest.mark.parametrize(
    "gone", ["", "spool.db", "spool.db-wal", "spool.db.lock"], ids=["folder", "file", "wal", "lock"]
)
async def test_files_that_are_removed_under_the_daemon(tmp_path, emulator, gone):
    """Somebody cleans up: it says so, saves what the files held, and ends; the next start delivers all that was acked."""
    folder = tmp_path / "var" / "spool"
    folder.mkdir(parents=True)
    daemon = Process(tmp_path, "http://127.0.0.1:9")
    daemon.settings["spool__path"] = str(folder / "spool.db")
    await daemon.up()
    assert await daemon.post([currents(seed=n, id=f"e{n}") for n in range(50)]) == 200
    if gone:
        (folder / gone).unlink()
    else:
        shutil.rmtree(folder)
    assert await daemon.exits() == 74, daemon.said()
    assert "removed or replaced while bridged ran; what it held was saved in" in daemon.said()

    again = Process(tmp_path, emulator.url)
    again.settings["spool__path"] = str(folder / "spool.db")
    await again.up()
    try:
        await until(lambda: len(delivered(emulator)) >= 50, "what was acked to be delivered")
    finally:
        assert await again.end() == 0, again.said()


async def test_settings_that_are_removed_with_the_spool(process, client):
    """What was saved on the page is written again with it: the next start has the credential, and the same rules."""
    folder, admin = process.folder / "spool", f"127.0.0.1:{free_port()}"
    folder.mkdir()
    process.settings |= {"spool__path": str(folder / "spool.db"), "mixpanel__token": "", "admin__listen": admin}
    await process.up()
    values = {
        "mixpanel.token": "example-token",
        "retention.max_age": "3h",
        "events.transform": {"users.messages.email.Open": {"email_address": "remove"}},
    }
    async with client.put(f"http://{admin}/api/settings", json={"set": values}) as answer:
        assert answer.status == 200, await answer.text()
    before = (folder / "spool.db.settings.toml").read_bytes()
    shutil.rmtree(folder)
    assert await process.exits() == 74, process.said()

    assert '"settings_written_again"' in process.said()
    assert "example-token" not in process.said()
    assert (folder / "spool.db.settings.toml").read_bytes() == before
    assert (folder / "spool.db.settings.toml").stat().st_mode & 0o777 == 0o600
    await process.up()
    async with client.get(f"http://{admin}/api/status") as answer:
        assert (await answer.json())["state"] != "not set up"
    assert await process.end() == 0


async def test_a_working_directory_that_is_removed_just_before_the_stop(tmp_path, config, emulator, monkeypatch):
    """Relative paths are of the start: what waits is saved there, and so is what was saved on the page."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    settings = {"spool__path": "spool.db", "delivery__grace": "10ms"}
    app = await App(config(mixpanel__url="http://127.0.0.1:9", **settings)).__aenter__()
    await app.save({"retention.max_age": "3h"}, [])
    await app.spool.append(Intaken([batch("a")]))
    shutil.rmtree(folder)
    with pytest.raises(SpoolError, match="what it held was saved in"):
        await app.__aexit__(None, None, None)
    monkeypatch.chdir(folder)
    async with App(config(mixpanel__url="http://127.0.0.1:9", **settings)) as app:
        assert await stored(app.spool) == ["a"]
        assert app.saved.values == {"retention.max_age": 3 * 3600}


async def test_an_alarm_about_files_that_can_not_be_saved(tmp_path, config, emulator, monkeypatch):
    """It names them: the spool is far from its cap, and room on its disk isn't what is missing for new events."""
    free = 0
    monkeypatch.setattr(durable, "_free_bytes", lambda _folder: free)
    app = await App(config(mixpanel__url="http://127.0.0.1:9")).__aenter__()
    await app.spool.append(Intaken([batch("a")]))
    (tmp_path / "spool.db").unlink()
    await until(lambda: app.spool.near_cap, "the doors to close")
    await until(lambda: "refusing" in [one.alarm for one in app.watch.alarms.open], "the alarm")
    [text] = [one.text for one in app.watch.alarms.open if one.alarm == "refusing"]
    assert "spool.db was removed or replaced while bridged ran; what it held can't be saved" in text
    free = 2**40
    await until(lambda: app.spool.failed, "the end")
    await app.__aexit__(None, None, None)


async def test_a_file_that_is_put_in_the_place_of_the_spool(process, tmp_path, emulator, client):
    """What the daemon held is saved beside it, and named until it is gone; put back as the README says, all of it is delivered."""
    path, other = tmp_path / "spool.db", tmp_path / "other.db"
    await process.up(mixpanel__url="http://127.0.0.1:9")
    assert await process.post([currents(seed=n, id=f"e{n}") for n in range(50)]) == 200
    other.touch()
    other.replace(path)
    assert await process.exits() == 74, process.said()
    [displaced] = tmp_path.glob("spool.db.displaced-*")
    assert f"the README says what to do with {displaced.name}" in process.said()

    admin = f"127.0.0.1:{free_port()}"
    await process.up(mixpanel__url=emulator.url, admin__listen=admin)
    [line] = [line for line in process.said().splitlines() if '"events_missing"' in line]
    assert json.loads(line)["saved"] == [str(displaced)]
    async with client.get(f"http://{admin}/api/status") as answer:
        assert str(displaced) in " ".join((await answer.json())["warnings"])
    assert await process.post([currents(seed=n, id=f"other{n}") for n in range(60)]) == 200
    assert await process.end() == 0
    path.rename(tmp_path / "spool.db.before")
    (tmp_path / "spool.db.lock").rename(tmp_path / "spool.db.before.lock")
    displaced.rename(path)
    await process.up(mixpanel__url=emulator.url, admin__listen=admin)
    await until(lambda: len(delivered(emulator)) >= 110, "what was acked to be delivered")
    assert process.said().count('"events_missing"') == 1, "what the other one had is no loss"
    async with client.get(f"http://{admin}/api/status") as answer:
        status = await answer.json()
        assert "displaced" not in " ".join(status["warnings"])
        assert (status["events"]["accepted"], status["imbalance"]) == (50, 0)
    assert await process.end() == 0


async def test_a_spool_and_a_file_of_cohorts_that_are_links(tmp_path, daemon, importing):
    """Everything of theirs, locks too, is where the links lead; nothing but what the page and alarms keep is beside them."""
    (tmp_path / "real").mkdir()
    for name in ("spool.db", "cohorts.db"):
        (tmp_path / name).symlink_to(f"real/{name}")
    app = await daemon(**importing)
    await app.spool.append(Intaken([batch("a")]))
    await app.spool.run(app.spool._presence.demand)

    there = {file.name for file in (tmp_path / "real").iterdir()}
    assert there >= {"spool.db", "spool.db-wal", "spool.db.lock", "spool.db.reserve", "cohorts.db", "cohorts.db.lock"}
    beside = {file.name for file in tmp_path.iterdir() if not file.is_symlink()}
    assert not beside & there


async def test_a_path_that_is_too_long_for_sqlite(tmp_path, daemon):
    """It is said to be, and no reserve is left behind."""
    folder = tmp_path / ("x" * 200) / ("y" * 200) / ("z" * 200)
    with pytest.raises(SpoolError, match="SQLite takes 504 at most"):
        await daemon(spool__path=str(folder / "spool.db"))
    assert [file.name for file in folder.iterdir()] == ["spool.db.lock"]


@needs_root
async def test_a_disk_that_turns_read_only(small, tmp_path, emulator, client):
    """As after an error of its file system: nothing more is acked, it exits 74, and says why until it can be written again."""
    daemon = Process(tmp_path, emulator.url)
    daemon.settings |= {"spool__path": str(small / "spool.db"), "mixpanel__url": "http://127.0.0.1:9"}
    await daemon.up()
    acked = [f"a{n}" for n in range(20) if await post(client, daemon, f"a{n}") == 200]
    # `remount,ro` is refused while files are open for writing; a file system that gives up doesn't ask.
    await daemon.end(signal.SIGKILL)
    remount(small, "ro")
    await daemon.start()
    assert await daemon.exits() == 74
    assert "Read-only file system" in daemon.said()
    remount(small, "rw")
    await daemon.up(mixpanel__url=emulator.url)
    await until(lambda: set(acked) <= delivered(emulator), "what was acked to be delivered")
    assert len(acked) == 20
    assert await daemon.end() == 0


@needs_fiu
async def test_a_write_that_the_file_system_refuses(tmp_path, emulator, client):
    """EROFS in the midst of it all: the same end as any other error of the disk, and the same beginning."""
    daemon = FaultyProcess(tmp_path, "http://127.0.0.1:9")
    await daemon.up()
    assert await post(client, daemon, "a") == 200
    await daemon.fault("-c", "enable name=posix/io/rw/pwrite,failinfo=30")
    assert await post(client, daemon, "doomed") in (503, None)
    assert await daemon.exits() == 74
    again = Process(tmp_path, emulator.url)
    await again.up()
    await until(lambda: "a" in delivered(emulator))
    assert await again.end() == 0


@needs_root
@needs_fiu
def test_a_disk_that_is_full_and_one_that_fails_at_its_kth_call(tmp_path):
    """The loop of `python -m bench disk`, short: full rounds drain with nothing freed; EIO at the k-th write or fsync, in the
    midst of the load or of the start, is the end (exit 74) and loses nothing.
    """
    summary = asyncio.run(disk.torment(tmp_path, rounds=2, calls={"write": 4, "fsync": 3}, seed=3))
    assert summary.problems == []
    assert (summary.rounds, summary.refused) == (2, 2)
    assert summary.struck == summary.lives == 7
    # SQLite takes no notice of a failing sync of the folder (the start has synced it itself by then), and the note that the
    # file was opened is no part of the spool.
    assert len(summary.survived) <= 3, summary.survived
    assert summary.totals.lost == 0
    assert summary.totals.acked > 0


def delivered(emulator):
    """The $insert_ids that Mixpanel has."""
    return {event["properties"]["$insert_id"] for event in emulator.events()}


async def test_a_limit_on_the_size_of_files_is_a_cap(tmp_path, emulator, client):
    """`ulimit -f` below spool.max_bytes: 503 before the limit, never a write that fails; what waits drains with the limit there."""
    daemon = Process(tmp_path, "http://127.0.0.1:9")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 * MIB, before[1]))
    try:
        await daemon.up()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert '"event":"file_size_limited"' in daemon.said().replace(": ", ":")
    acked, status, noise = set(), 200, random.Random(5)
    while status == 200:
        name = f"e{len(acked)}"
        event = currents("users.behaviors.CustomEvent", id=name)
        event["properties"] = {"name": "n", "custom_properties": {"text": noise.randbytes(200_000).hex()}}
        status = await daemon.post([event])
        acked |= {name} if status == 200 else set()
    assert status == 503
    assert len(acked) > 50
    assert (tmp_path / "spool.db").stat().st_size < 32 * MIB

    await daemon.end(signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 * MIB, before[1]))
    try:
        await daemon.up(mixpanel__url=emulator.url)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    await until(lambda: acked <= delivered(emulator), "what was acked to be delivered", 30)
    assert await daemon.post([currents(id="again")]) == 200
    assert await daemon.end() == 0


async def test_a_limit_on_the_size_of_files_that_leaves_no_room(daemon):
    """The start says so: the doors would answer 503 for ever, with words about a disk that is full and isn't."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6 * MIB, before[1]))
    try:
        with pytest.raises(SpoolError, match="files of 6,291,456 bytes at most, and the spool needs 8,388,608"):
            await daemon()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
