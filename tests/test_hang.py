"""What hangs: a disk that stands still, a folder that doesn't answer. Nobody else waits for it, and the end comes all the same.

Calls that come to no end are made by a `threading.Event` in their place, or by a file system that is really frozen.
"""

import asyncio
import errno
import gc
import os
import shutil
import ssl
import subprocess
import threading
from functools import partial
from pathlib import Path

import pytest
import structlog
import uvloop
from conftest import SLOW, balanced, currents, until
from test_admin_door import certificate
from test_alarms import chat

from bridged import apart, certificates, reloading
from bridged.activity import MAX_ENTRIES, Activity
from bridged.apart import InOrder
from bridged.app import App
from bridged.backlog.archive import Archive
from bridged.config import replaced
from bridged.delivery import archiver
from bridged.errors import ConfigError
from bridged.settings import Config
from bridged.sources import unix

__all__ = ["certificate", "chat"]

CI = bool(os.environ.get("CI"))


class Hanging:
    """Calls that wait here while it is so, whoever makes them; `since` says that somebody does."""

    def __init__(self):
        self.since = threading.Event()
        self.returned = False  # somebody has waited to the end
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
            self.returned = True


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
    assert "a slip" not in await asyncio.to_thread(file.read_text)
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


# -- the archive's folder ----------------------------------------------------------------------------------------------


@pytest.fixture
def archive_hangs(monkeypatch, hanging):
    """Whoever writes a file of the archive waits."""
    write = Archive.write

    def waiting(archive, segments):
        hanging.wait()
        return write(archive, segments)

    monkeypatch.setattr(Archive, "write", waiting)
    monkeypatch.setattr(archiver, "_ANSWERS_S", 0.2)
    return hanging


def delivered(emulator):
    """How many events Mixpanel has."""
    return len(emulator.events())


@pytest.mark.parametrize("fails", [False, True])
async def test_an_archive_that_hangs_holds_no_delivery_up(
    daemon, client, emulator, tmp_path, archive_hangs, monkeypatch, fails
):
    """The halt ends when the credential works, though a file is being written for ever; what is in that is nobody else's till
    then, and the alarm says so. When the folder answers the file is whole, or the events are delivered: never both.
    """
    app = await daemon(retention__max_age="1s", delivery__probe_interval="50ms")
    emulator.script([{"status": 401}])
    archive_hangs.begin()
    assert await post(client, app, *[currents(seed=n) for n in range(5)]) == 200
    await until(archive_hangs.since.is_set, "the file")
    await until(lambda: "doesn't answer" in app.delivery.archiver.problem, "that it is told")
    # Nobody has an event to probe with, and the halt ends all the same.
    emulator.script([])
    await until(lambda: app.delivery.halted is None, "the end of the halt")
    assert await post(client, app, *[currents(seed=n) for n in range(5, 9)]) == 200
    await until(lambda: app.spool.accounts.total("delivered") == 4, "the delivery of what came later")
    assert (delivered(emulator), app.spool.accounts.total("waiting"), app.delivery.archiver.events) == (4, 5, 5)
    await until(lambda: "archive" in {one.alarm for one in app.watch.alarms.open}, "the alarm")
    if fails:
        (tmp_path / "archive").write_text("in the way")
    archive_hangs.end()
    await until(lambda: app.spool.accounts.total("waiting") == 0, "the settlement")
    fates = (app.spool.accounts.total("expired"), delivered(emulator), len(list(tmp_path.glob("archive/*.gz"))))
    assert fates == ((0, 9, 0) if fails else (5, 4, 1))
    await until(lambda: not app.delivery.archiver.problem, "that all is well")
    balanced(app)


async def test_one_file_of_the_archive_at_a_time(daemon, client, emulator, archive_hangs):
    """While one hangs nothing else expires; what comes later is kept, and goes when the folder answers."""
    app = await daemon(retention__max_age="1ms", delivery__probe_interval="50ms")
    emulator.script([{"status": 401}])
    archive_hangs.begin()
    await post(client, app, currents(seed=1))
    await until(archive_hangs.since.is_set, "the file")
    probes = app.delivery.verdicts.total()
    await post(client, app, currents(seed=2))
    await until(lambda: app.delivery.verdicts.total() > probes + 2, "probes with what came later")
    assert (app.delivery.archiver.events, app.spool.accounts.total("expired")) == (1, 0)
    archive_hangs.end()
    await until(lambda: app.spool.accounts.total("expired") == 2, "the expiry")
    balanced(app)


async def test_the_end_while_an_archive_hangs(config, client, emulator, archive_hangs):
    """It comes without waiting for the folder, and the next daemon has the events."""
    emulator.script([{"status": 401}])
    async with App(config(retention__max_age="1ms")) as app:
        archive_hangs.begin()
        await post(client, app, *[currents(seed=n) for n in range(5)])
        await until(lambda: app.delivery.archiver.problem, "that it hangs")
    emulator.script([])
    async with App(config()) as app:
        await until(lambda: app.spool.accounts.total("delivered") == 5, "the delivery")
        balanced(app)


async def test_the_end_waits_for_a_file_that_is_being_written(
    config, client, emulator, tmp_path, archive_hangs, monkeypatch
):
    """A moment: else the next start would deliver what is in the archive."""
    monkeypatch.setattr(archiver, "_ANSWERS_S", 30 * SLOW)
    monkeypatch.setattr(archiver, "_END_S", 20 * SLOW)
    emulator.script([{"status": 401}])
    async with App(config(retention__max_age="1ms", delivery__grace=f"{20 * SLOW}s")) as app:
        archive_hangs.begin()
        await post(client, app, *[currents(seed=n) for n in range(5)])
        await until(archive_hangs.since.is_set, "the file")
        asyncio.get_running_loop().call_later(0.3, archive_hangs.end)
    assert app.spool.accounts.total("expired") == 5
    assert len(list(tmp_path.glob("archive/*.gz"))) == 1


# -- files that are read again -----------------------------------------------------------------------------------------


async def test_the_folder_of_a_certificate_that_hangs(
    daemon, certificate, client, emulator, tmp_path, hanging, monkeypatch
):
    """At SIGHUP the configuration is taken over, and it is told that the certificate couldn't be read; the old one is shown,
    doors and page answer. When the folder answers, the next SIGHUP has the new one.
    """
    monkeypatch.setattr(reloading, "_READ_S", 0.3)
    certificate()
    keys = {f"sources__stream__tls_{name}": str(tmp_path / f"{name}.pem") for name in ("cert", "key")}
    app = await daemon(**keys)
    content = certificates._content

    def waiting(file):
        hanging.wait()
        return content(file)

    monkeypatch.setattr(certificates, "_content", waiting)
    certificate()
    hanging.begin()
    said = replaced(app.config, ("delivery", "timeout"), 7.0)
    rereading = reloading.Rereading(lambda: said, app.certificates.read_again, app.reload)
    reading = asyncio.create_task(rereading.run())
    with structlog.testing.capture_logs() as logs:
        rereading.want()
        await until(hanging.since.is_set, "that it hangs")
        assert await healthy(client, app)
        await until(lambda: app.reload_problem, "the end of its patience")
    assert "certificate" in app.reload_problem
    assert [line["event"] for line in logs if line["event"].startswith("reload")] == ["reload_failed", "reloaded"]
    assert app.config.delivery.timeout == 7.0
    assert await post(client, app, currents()) == 200
    await until(lambda: delivered(emulator) == 1, "the delivery")
    shown = lambda: ssl.get_server_certificate(("127.0.0.1", app.stream.ports[0]))  # noqa: E731
    old = await asyncio.to_thread(shown)
    hanging.end()
    monkeypatch.setattr(reloading, "_READ_S", 20 * SLOW)
    rereading.want()
    await until(lambda: not app.reload_problem, "the next reading")
    new = await asyncio.to_thread(shown)
    assert old != new == (tmp_path / "cert.pem").read_text()
    reading.cancel()


async def test_what_is_shown_is_what_was_tried(daemon, certificate, tmp_path):
    """The files may be others, or gone, a moment after they were read: nothing but what was tried is shown."""
    certificate()
    keys = {f"sources__stream__tls_{name}": str(tmp_path / f"{name}.pem") for name in ("cert", "key")}
    app = await daemon(**keys)
    certificate()
    new = (tmp_path / "cert.pem").read_text()
    found = app.certificates.read_again()
    (tmp_path / "cert.pem").write_text("nonsense")
    (tmp_path / "key.pem").unlink()
    app.reload(lambda: app.config, lambda: found)
    assert app.reload_problem == ""

    def failing():
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    app.reload(lambda: app.config, failing)
    assert os.strerror(errno.EMFILE) in app.reload_problem
    assert await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", app.stream.ports[0])) == new
    assert "PRIVATE" not in repr(found)


async def test_readings_that_hang_are_few(hanging, monkeypatch):
    """SIGHUPs while a configuration can't be read leave three threads, not one each; those that come later are told the same.
    Once it can be read, it is.
    """
    monkeypatch.setattr(reloading, "_READ_S", 0.05)
    began, taken = [], []

    def read():
        began.append(True)
        hanging.wait()
        return Config()

    def take(said, _certificates, *, asked):
        try:
            taken.append((said(), asked))
        except ConfigError as error:
            taken.append((str(error), asked))

    hanging.begin()
    rereading = reloading.Rereading(read, dict, take)
    reading = asyncio.create_task(rereading.run())
    for number in range(1, 7):
        rereading.want()
        await until(lambda number=number: len(taken) == number, "the word")
    assert len(began) == 3
    assert all("couldn't be read within" in said for said, _ in taken)
    hanging.end()
    monkeypatch.setattr(reloading, "_READ_S", 20 * SLOW)

    def read_at_last():
        rereading.want()
        return taken[-1][0] == Config()

    await until(read_at_last, "a reading")
    reading.cancel()


async def test_a_certificate_that_nobody_asks_about_is_no_bug():
    """A configuration that can't be used is told, and nothing else: not that of the certificates nobody has heard."""
    bugs, taken = [], []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: bugs.append(context["message"]))

    def failing():
        raise OSError("there may be no more threads")

    rereading = reloading.Rereading(failing, failing, lambda _said, _certificates, *, asked: taken.append(asked))
    reading = asyncio.create_task(rereading.run())
    rereading.want()
    await until(lambda: taken, "the word")
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    gc.collect()
    assert bugs == []


# -- the end -----------------------------------------------------------------------------------------------------------


def test_the_end_waits_for_no_folder_of_others(tmp_path, hanging, monkeypatch):
    """Of secrets, and of a Unix socket: whoever looks there is left alone when the loop ends."""
    monkeypatch.setattr(reloading, "_LOOK_S", 0.01)
    monkeypatch.setattr(unix, "_LOOK_S", 0.01)
    monkeypatch.setattr(unix, "_REMOVE_S", 0.1)
    monkeypatch.setattr(reloading, "_digests", lambda _files: hanging.wait())
    look_at, looks = unix._look_at, []

    def waiting(path):
        looks.append(path)
        hanging.wait()
        return look_at(path)

    async def scene():
        sockets = unix.Sockets(asyncio.Protocol)
        await sockets.listen(str(tmp_path / "s.sock"))
        monkeypatch.setattr(unix, "_look_at", waiting)
        hanging.begin()
        tasks = [
            asyncio.create_task(reloading.watch(lambda: [tmp_path / "secret"], lambda: None)),
            asyncio.create_task(sockets.watch()),
        ]
        await until(lambda: hanging.since.is_set() and looks, "that they hang")
        await asyncio.sleep(0.2)
        assert len(looks) == 1, "one look at a time"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await sockets.close()

    with structlog.testing.capture_logs() as logs:
        uvloop.run(scene())
    assert not hanging.returned
    assert [line["event"] for line in logs] == ["sockets_left"]


async def test_a_socket_is_made_anew_beside_the_loop(daemon, client, tmp_path, hanging, monkeypatch):
    """Its folder hangs while that is done: who looks is answered. When it answers, the door is found again."""
    monkeypatch.setattr(unix, "_LOOK_S", 0.05)
    app = await daemon()
    demand_possible = unix.demand_possible

    def waiting(path):
        hanging.wait()
        demand_possible(path)

    monkeypatch.setattr(unix, "demand_possible", waiting)
    hanging.begin()
    path = tmp_path / "s.sock"
    path.unlink()
    await until(hanging.since.is_set, "that it hangs")
    assert await healthy(client, app)
    hanging.end()
    await until(path.is_socket, "the new one")
    _, writer = await asyncio.open_unix_connection(str(path))
    writer.close()
