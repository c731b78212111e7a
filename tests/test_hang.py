"""What hangs: a disk that stands still, a folder that doesn't answer. Nobody else waits for it, and the end comes all the same.

Calls that come to no end are made by a `threading.Event` in their place, or by a file system that is really frozen.
"""

import asyncio
import os
import shutil
import subprocess
import threading
from functools import partial
from pathlib import Path

import pytest
import structlog
from conftest import SLOW, currents, until
from test_alarms import chat

from bridged import apart
from bridged.activity import MAX_ENTRIES, Activity
from bridged.apart import InOrder
from bridged.app import App

__all__ = ["chat"]

CI = bool(os.environ.get("CI"))


class Hanging:
    """Calls that wait here while it is so, whoever makes them; `since` says that somebody does."""

    def __init__(self):
        self.since = threading.Event()
        self._over = threading.Event()
        self._over.set()

    def begin(self):
        self._over.clear()

    def end(self):
        self._over.set()

    def wait(self):
        if not self._over.is_set():
            self.since.set()
            self._over.wait(60 * SLOW)


@pytest.fixture
def hanging():
    """Something that hangs when it is told to, and no longer than the test."""
    one = Hanging()
    yield one
    one.end()


async def post(client, app, *events):
    """Hands events in at the HTTP door; gives the status."""
    url = f"http://{app.config.sources.http.listen}/v1/currents"
    async with client.post(url, json={"events": list(events)}) as answer:
        return answer.status


async def healthy(client, app):
    """Whether who looks is answered."""
    async with client.get(f"http://{app.config.admin.listen}/healthz") as answer:
        return answer.status == 200


# -- the spool's disk --------------------------------------------------------------------------------------------------


@pytest.fixture
def activity_hangs(monkeypatch, hanging):
    """Whoever writes a line of the activity waits."""
    write = os.write

    def waiting(file, data):
        if Path(f"/proc/self/fd/{file}").readlink().name.endswith(".activity"):
            hanging.wait()
        return write(file, data)

    monkeypatch.setattr(os, "write", waiting)
    return hanging


async def test_a_disk_that_hangs_holds_no_alarm_up(daemon, client, emulator, chat, activity_hangs):  # the fixture
    """While the files beside the spool can't be written the webhook is called, who looks is answered, events are delivered and
    a configuration is taken over; when the disk comes back, it is all in the files, in order.
    """
    app = await daemon(alerts__webhook_url=chat.url)
    activity_hangs.begin()
    app.activity.tell("reloaded", "made up")
    await until(activity_hangs.since.is_set, "that it hangs")
    app.reload_problem = "a slip"
    await until(lambda: chat.got, "the notice")
    assert chat.got[0]["alarm"] == "configuration"
    assert await healthy(client, app)
    app.reload(lambda: app.config)
    assert await post(client, app, currents()) == 200
    await until(lambda: len(emulator.events()) == 1, "the delivery")
    file, kept = Path(f"{app.config.spool.path}.activity"), Path(f"{app.config.spool.path}.alarms")
    assert "a slip" not in file.read_text()
    activity_hangs.end()
    await until(lambda: file.read_text().count("\n") == len(app.activity.entries), "the lines")
    await until(lambda: b"configuration" in kept.read_bytes(), "the alarms")
    again = Activity(file)
    again.open()
    again.close()
    assert [entry.id for entry in again.entries] == [entry.id for entry in app.activity.entries]


async def test_the_end_waits_for_no_disk_for_ever(config, activity_hangs, monkeypatch):
    """The daemon ends, and says that something was not written."""
    monkeypatch.setattr(apart, "_DRAIN_S", 0.2)
    with structlog.testing.capture_logs() as logs:
        async with App(config()) as app:
            activity_hangs.begin()
            app.activity.tell("reloaded", "made up")
            await until(activity_hangs.since.is_set, "that it hangs")
    assert [line["what"] for line in logs if line["event"] == "not_written"] == ["files beside the spool"]


async def test_an_orderly_end_has_it_all_on_disk(config, monkeypatch):
    """However slow the disk is: the last line is the end's."""
    write = os.write

    def slowly(file, data):
        if Path(f"/proc/self/fd/{file}").readlink().name.endswith(".activity"):
            threading.Event().wait(0.05)
        return write(file, data)

    monkeypatch.setattr(os, "write", slowly)
    async with App(config()) as app:
        for number in range(10):
            app.activity.tell("settings", f"text {number}")
    again = Activity(f"{app.config.spool.path}.activity")
    again.open()
    again.close()
    told = [entry.text for entry in again.entries]
    assert told[1:] == [*[f"text {number}" for number in range(10)], "bridged stopped"]


async def test_what_waits_for_a_disk_is_bounded(tmp_path, hanging):
    """Of what has no place the list has it all the same: the file is written anew with the next line. What is named takes the
    place of what waits under the same name.
    """
    done, path = [], tmp_path / "activity"
    files = InOrder("files")
    hanging.begin()
    async with files:
        activity = Activity(path, do=files.put)
        activity.open()
        files.put(hanging.wait)
        await until(hanging.since.is_set, "that it hangs")
        files.put(partial(done.append, "old"), "alarms")
        for number in range(2 * MAX_ENTRIES):
            activity.tell("settings", f"text {number}")
        assert not files.put(partial(done.append, "too much"))
        assert files.put(partial(done.append, "new"), "alarms")
        hanging.end()
        await until(lambda: files.put(partial(done.append, "the last")), "room")
        activity.tell("settings", "the last")
        activity.close()
    assert done == ["new", "the last"]
    again = Activity(path)
    again.open()
    again.close()
    assert [entry.text for entry in again.entries] == [entry.text for entry in activity.entries]


async def test_a_bug_in_one_piece_of_work_ends_no_other():
    """It is told, and the next one is done."""
    done = []
    with structlog.testing.capture_logs() as logs:
        async with InOrder("files") as files:
            files.put(lambda: 1 / 0)
            files.put(partial(done.append, "next"))
    assert (done, [line["event"] for line in logs]) == (["next"], ["task_failed"])
    assert not files.put(partial(done.append, "too late"))


@pytest.fixture
def freezable(tmp_path):
    """A file system of its own, in a file, as root can freeze it; where there is no such thing, no test."""
    if os.geteuid() != 0 or any(shutil.which(tool) is None for tool in ("mkfs.ext4", "fsfreeze")):
        pytest.skip("freezing takes root, and e2fsprogs")
    image, folder = tmp_path / "image", tmp_path / "frozen"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(512 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,nodiscard", str(image)], check=True)
    if subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=False).returncode:
        pytest.skip("there are no loop devices")
    yield folder
    subprocess.run(["fsfreeze", "-u", str(folder)], check=False, stderr=subprocess.DEVNULL)
    subprocess.run(["umount", "-l", str(folder)], check=True)


async def test_a_file_system_that_is_frozen(freezable, config, client, chat):  # the fixture
    """As snapshots of virtual machines do it: the loop goes on, and who is to be told is told before the thaw."""
    settings = config(spool__path=str(freezable / "spool.db"), alerts__webhook_url=chat.url)
    async with App(settings) as app:
        await asyncio.to_thread(subprocess.run, ["fsfreeze", "-f", str(freezable)], check=True)
        try:
            app.activity.tell("reloaded", "made up")
            posting = asyncio.ensure_future(post(client, app, currents()))
            app.reload_problem = "a slip"
            await until(lambda: chat.got, "the notice")
            assert await healthy(client, app)
            assert not posting.done()
        finally:
            await asyncio.to_thread(subprocess.run, ["fsfreeze", "-u", str(freezable)], check=True)
        assert await posting == 200
    assert "bridged stopped" in await asyncio.to_thread(Path(f"{settings.spool.path}.activity").read_text)
