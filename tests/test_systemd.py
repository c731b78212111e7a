"""Life under systemd: the units, readiness, the heartbeat, sockets handed over, and restarts that nobody notices.

The tests play systemd: they hold the listening sockets, and listen at NOTIFY_SOCKET. The units are judged by systemd's own tools.
"""

import asyncio
import configparser
import contextlib
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SLOW, currents, free_port, ndjson, until

from bench import restart
from bench.processes import BenchError
from bridged import app as app_module
from bridged import service
from bridged.errors import ConfigError
from bridged.service import Listeners, Notifier, Progress
from bridged.settings import SECRETS, Config

ROOT = Path(__file__).parent.parent
UNITS = sorted((ROOT / "systemd").iterdir())
# Low, so that a test needn't wait; high enough for a machine that is busy.
WATCHDOG_S = 1.2 * SLOW


def needs(tool):
    """A tool of the Debian package systemd. CI must have it: there a missing one is a failure."""
    if shutil.which(tool) is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{tool} is not installed: apt-get install systemd")


class Unit(configparser.RawConfigParser):
    """A unit file. Keys may come more than once: `several` has all values."""

    def __init__(self, path):
        super().__init__(strict=False, delimiters=("=",), comment_prefixes=("#",), interpolation=None)
        self.optionxform = str
        self.text = path.read_text()
        self.read_string(self.text)

    def several(self, key):
        """All values of a key, in order."""
        return re.findall(rf"^{key}=(.*)$", self.text, re.MULTILINE)


@pytest.fixture
def installed(tmp_path):
    """The units in a folder, with a program that is there: that is all that may differ from an installation."""
    for unit in UNITS:
        text = unit.read_text().replace("/usr/local/bin/bridged", "/bin/true")
        (tmp_path / unit.name).write_text(text)
    return tmp_path


@pytest.fixture
def folder(tmp_path_factory):
    """A folder whose path is short enough for the address of a Unix socket."""
    return tmp_path_factory.mktemp("d")


@pytest.fixture
async def manager(folder, emulator):
    """A service manager whose daemon hasn't been started."""
    async with restart.Manager(folder, emulator.url, watchdog_s=WATCHDOG_S) as running:
        yield running


async def post(port, events):
    """One request on a connection of its own: the head of the answer, in lower case."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request(events))
        return (await reader.readuntil(b"\r\n\r\n")).lower()
    finally:
        writer.close()


def request(events):
    """As bytes."""
    body = b'{"events":[' + b",".join(ndjson(events).splitlines()) + b"]}"
    return b"POST /v1/currents HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body


# -- the units ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [unit.name.replace("@", "@shop") for unit in UNITS])
def test_a_unit_is_one_that_systemd_understands(installed, name):
    """`systemd-analyze verify` has nothing to say: no unknown key, no value that it can't read."""
    needs("systemd-analyze")
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(installed / name)], capture_output=True, text=True, check=False
    )

    assert (result.returncode, result.stdout + result.stderr) == (0, "")


def test_verify_would_find_a_mistake(installed):
    """The check above can fail: a key that doesn't exist is told."""
    needs("systemd-analyze")
    unit = installed / "bridged.service"
    unit.write_text(unit.read_text().replace("WatchdogSec=", "WatchdogSex="))
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )

    assert "WatchdogSex" in result.stdout + result.stderr


@pytest.mark.parametrize("name", ["bridged.socket", "bridged@shop.socket"])
def test_a_unix_door_can_be_given_to_a_group(installed, name):
    """The line that says so has only to lose its mark: without it root alone may connect."""
    needs("systemd-analyze")
    unit = installed / name.replace("@shop", "@")
    text = unit.read_text()
    assert "\n#SocketGroup=" in text
    unit.write_text(text.replace("\n#SocketGroup=", "\nSocketGroup="))
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(installed / name)], capture_output=True, text=True, check=False
    )

    assert (result.returncode, result.stdout + result.stderr) == (0, "")
    assert Unit(unit).several("SocketMode") == ["0660"]


@pytest.mark.parametrize("name", ["bridged.service", "bridged@shop.service"])
def test_a_service_is_hardened(installed, name):
    """`systemd-analyze security` calls its exposure 1.5 or less, of 10."""
    needs("systemd-analyze")
    shutil.copy(installed / "bridged@.service", installed / "bridged@shop.service")
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=15", "--no-pager", str(installed / name)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stdout + result.stderr
    assert "Overall exposure level" in result.stdout


def test_the_writer_may_be_placed():
    """The one system call that it takes comes back last: systemd reads these lines in order."""
    for name in ("bridged.service", "bridged@.service"):
        filters = Unit(ROOT / "systemd" / name).several("SystemCallFilter")
        assert filters == ["@system-service", "~@privileged @resources", "sched_setaffinity"]


def test_an_instance_is_the_service_with_a_name():
    """The template is the service, but for what an instance has of its own: configuration, secrets, spool, description."""
    plain = (ROOT / "systemd/bridged.service").read_text().partition("[Unit]")[2]
    for old, new in (
        ("bridged: Braze", "bridged for %i: Braze"),
        ("%S/bridged", "%S/bridged-%i"),
        ("StateDirectory=bridged", "StateDirectory=bridged-%i"),
        ("/etc/bridged/config.toml", "/etc/bridged/%i.toml"),
        (":bridged.", ":bridged.%i."),
    ):
        assert old in plain
        plain = plain.replace(old, new)

    assert (ROOT / "systemd/bridged@.service").read_text().partition("[Unit]")[2] == plain


def test_an_instance_has_a_folder_beside_the_services():
    """Not within it: of a dynamic user `/var/lib/bridged` is a link into a private folder, and nothing can be made below it."""
    plain, instance = (
        Unit(ROOT / "systemd" / name).several("StateDirectory") for name in ("bridged.service", "bridged@.service")
    )

    assert not any("/" in folder for folder in plain + instance)
    assert plain != [folder.replace("%i", "shop") for folder in instance]


def test_a_reload_that_would_change_nothing_is_refused():
    """The daemon reads what systemd copied at the start: systemd shall say so, instead of a success that is none."""
    for name in ("bridged.service", "bridged@.service"):
        unit = Unit(ROOT / "systemd" / name)
        assert unit.several("ExecStart") == ["/usr/local/bin/bridged run --config ${CREDENTIALS_DIRECTORY}/config.toml"]
        assert unit.several("ExecReload") == []


def test_the_process_may_be_measured():
    """The collector of `process_*` reads /proc/stat, and gives nothing at all where the unit hides it."""
    for name in ("bridged.service", "bridged@.service"):
        assert Unit(ROOT / "systemd" / name).several("ProcSubset") == ["all"]


def test_every_secret_may_be_a_credential():
    """Each secret of the configuration can stand in a file of its own, under the name that the daemon looks for."""
    loaded = [line.partition(":")[0] for line in Unit(ROOT / "systemd/bridged.service").several("LoadCredential")]

    assert loaded == ["config.toml", *("_".join(path) for path in SECRETS)]


def test_the_sockets_are_those_of_the_defaults():
    """With a configuration at its defaults the socket unit can be enabled as it is; and it listens on loopback only."""
    config = Config()
    wanted = {config.sources.http.listen, config.admin.listen}
    wanted |= {address.removeprefix("tcp:") for address in config.sources.stream.listen if address.startswith("tcp:")}
    listens = Unit(ROOT / "systemd/bridged.socket").several("ListenStream")

    assert set(listens) == wanted
    assert all(address.startswith("127.0.0.1:") for address in listens)


# -- what the daemon says ----------------------------------------------------------------------------------------------


async def test_ready_is_said_when_the_doors_are_open(manager):
    """At READY=1 every door answers at once; STATUS= is one sentence; STOPPING=1 comes before the end, and is the last."""
    await manager.start(handed_over=False)
    await manager.hears("READY=1")
    assert (await post(manager.ports["http"], [currents()])).startswith(b"http/1.1 200 ")
    for address in (manager.ports["stream"], manager.ports["admin"]):
        (await asyncio.open_connection("127.0.0.1", address))[1].close()
    (await asyncio.open_unix_connection(str(manager.folder / "doors.sock")))[1].close()
    await manager.stop()

    first, *_, last = [message.split("\n") for _, message in manager.told]
    assert first[0] == "READY=1"
    assert re.fullmatch(r"STATUS=\S.*", first[1])
    assert last[0] == "STOPPING=1"
    assert not any("READY=1" in message for _, message in manager.told[1:])


async def test_not_ready_without_doors(manager):
    """A daemon that can't open a door never says READY=1."""
    taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    manager.settings["sources__http__listen"] = f"127.0.0.1:{taken.sockets[0].getsockname()[1]}"
    await manager.start(handed_over=False)

    with pytest.raises(BenchError, match="exit code 74"):
        await manager.hears("READY=1")
    taken.close()


@pytest.mark.parametrize("good", [True, False])
async def test_a_reload_is_told(manager, good):
    """SIGHUP: RELOADING=1 with systemd's clock, then READY=1, with a new configuration as with one that can't be used."""
    secret = manager.folder / "token"
    secret.write_text("example-token")
    manager.settings |= {"mixpanel__token": "", "mixpanel__token_file": str(secret)}
    await manager.start()
    await manager.hears("READY=1")
    manager.told.clear()
    secret.write_text("another-token" if good else "")
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    manager.process.send_signal(signal.SIGHUP)
    await manager.hears("READY=1")

    said = [message.split("\n") for _, message in manager.told if "WATCHDOG=1" not in message]
    assert [message[0] for message in said] == ["RELOADING=1", "READY=1"]
    name, _, usec = said[0][1].partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(usec) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert ("reload_failed" in manager.log()) is not good
    await manager.stop()


async def test_a_socket_of_a_unit_that_is_gone(manager):
    """It is told, and not made anew: the unit's next socket would find another there."""
    await manager.start()
    await manager.hears("READY=1")
    (manager.folder / "doors.sock").unlink()
    await until(lambda: '"socket_lost"' in manager.log(), "the word")
    assert "restart the .socket unit" in manager.log()
    await asyncio.sleep(1.2)
    assert not (manager.folder / "doors.sock").exists()
    await manager.stop()


async def test_nobody_to_tell(folder, emulator):
    """Without a service manager, or with one that is gone, the daemon works as ever."""
    async with restart.Manager(folder, emulator.url) as manager:
        (folder / "notify").unlink()
        await manager.start()
        await until(lambda: '"ready"' in manager.log(), seconds=30)
        assert (await post(manager.ports["http"], [currents()])).startswith(b"http/1.1 200 ")
        manager.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(manager.process.wait(), 20 * SLOW) == 0


def test_whom_to_tell():
    """NOTIFY_SOCKET may be abstract (@); a watchdog that is meant for another process, or is none, is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        name = f"bridged-test-{os.getpid()}"
        listener.bind(f"\0{name}")
        Notifier({"NOTIFY_SOCKET": f"@{name}"}, 7).ready("All\nis  well")
        assert listener.recv(1000) == b"READY=1\nSTATUS=All is well"

    address = {"NOTIFY_SOCKET": "/nowhere"}
    assert Notifier(address | {"WATCHDOG_USEC": "3000000"}, 7).watchdog_s == 3
    assert Notifier(address | {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "7"}, 7).watchdog_s == 3
    assert Notifier(address | {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "8"}, 7).watchdog_s == 0
    assert Notifier({"WATCHDOG_USEC": "3000000"}, 7).watchdog_s == 0
    Notifier({}, 7).ready("nobody listens")
    Notifier(address, 7).ready("nobody listens any more")


async def test_a_start_that_takes_long(tmp_path, monkeypatch):
    """A salvage of many gigabytes says that it goes on, and systemd doesn't end it after TimeoutStartSec, to begin anew."""
    monkeypatch.setattr(service, "_STARTING_S", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        notifier, never = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")}, 7), asyncio.Event()
        starting = asyncio.create_task(notifier.starting(never, never, 0))
        for _ in range(2):
            said = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(manager, 100), 10)
            assert said == b"EXTEND_TIMEOUT_USEC=150000"
        starting.cancel()


async def test_an_end_that_takes_long(tmp_path, monkeypatch):
    """Saving what removed files held says that it goes on, as long as it does, and isn't cut off after TimeoutStopSec."""
    monkeypatch.setattr(service, "_STARTING_S", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        steps = iter([0, 1, 2, 2])
        await asyncio.wait_for(Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")}, 7).ending(lambda: next(steps)), 10)
        for _ in range(2):
            assert manager.recv(100) == b"EXTEND_TIMEOUT_USEC=150000"
        with pytest.raises(BlockingIOError):
            manager.recv(100)


async def test_a_start_that_is_to_end(tmp_path, monkeypatch, config):
    """Who stops it while it starts gives it no more time: systemd may end it, and the next start begins anew."""
    monkeypatch.setattr(service, "_STARTING_S", 0.02)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    opened, hold, loop = app_module.App._open, asyncio.Event(), asyncio.get_running_loop()

    async def open_late(app, stack):
        await hold.wait()
        await opened(app, stack)

    monkeypatch.setattr(app_module.App, "_open", open_late)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        running = asyncio.create_task(app_module.run(config(delivery__grace="1h"), config))
        try:
            assert await asyncio.wait_for(loop.sock_recv(manager, 100), 10) == b"EXTEND_TIMEOUT_USEC=60000"
            os.kill(os.getpid(), signal.SIGTERM)
            said = b"EXTEND_TIMEOUT_USEC=60000"
            for _ in range(200):
                try:
                    said = await asyncio.wait_for(loop.sock_recv(manager, 100), 0.5)
                except TimeoutError:
                    break
            else:
                pytest.fail(f"it goes on: {said}")
            hold.set()
            await asyncio.wait_for(running, 20)
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)


# -- the heartbeat -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["halted", "down"])
async def test_the_heart_beats_while_there_is_progress(manager, emulator, trouble):
    """A restart would not end an outage of Mixpanel, so that is no reason for one: the writer is idle, and well."""
    if trouble == "halted":
        emulator.credentials(token="another-token")
    else:
        manager.settings["mixpanel__url"] = f"http://127.0.0.1:{free_port()}"
    await manager.start()
    await manager.hears("READY=1")
    event = currents()
    event["user"]["external_user_id"] = "ada"
    assert (await post(manager.ports["http"], [event])).startswith(b"http/1.1 200 ")
    await until(lambda: "delivery_halted" in manager.log() or "delivery_impeded" in manager.log())
    seen = len(manager.beats())
    await until(lambda: len(manager.beats()) >= seen + 3, "three more beats", 60)
    await manager.stop()


async def test_a_process_that_stands_still_is_noticed(manager):
    """A daemon that doesn't run at all: the silence lasts for the watchdog's time within twice of it."""
    await manager.start()
    await manager.hears("WATCHDOG=1")
    manager.process.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    last_beat = await manager.misses_a_beat()
    manager.process.send_signal(signal.SIGCONT)

    assert last_beat <= stopped + WATCHDOG_S
    await manager.stop()


BLOCKS = """
import signal, sys, time
from bridged.cli import main
signal.signal(signal.SIGUSR1, lambda *_: time.sleep(600))
sys.exit(main())
"""


async def test_a_loop_that_is_blocked_is_noticed(manager, monkeypatch):
    """The loop waits in the midst of something, while the writer's thread is well: no beat comes."""
    command = '"-m", "bridged", "run"'
    assert command in restart._HAND_OVER
    monkeypatch.setattr(restart, "_HAND_OVER", restart._HAND_OVER.replace(command, f'"-c", {BLOCKS!r}, "run"'))
    await manager.start()
    await manager.hears("WATCHDOG=1")
    manager.process.send_signal(signal.SIGUSR1)
    blocked = time.monotonic()
    assert await manager.misses_a_beat() <= blocked + WATCHDOG_S


async def test_a_reload_that_hangs_is_no_hang(manager):
    """The heart beats on while a secret's file is a pipe to which nobody writes: a restart would wait for it, too."""
    secret = manager.folder / "token"
    secret.write_text("example-token")
    manager.settings |= {"mixpanel__token": "", "mixpanel__token_file": str(secret)}
    await manager.start()
    await manager.hears("READY=1")
    manager.told.clear()
    secret.unlink()
    os.mkfifo(secret)
    manager.process.send_signal(signal.SIGHUP)
    await manager.hears("RELOADING=1")
    beats = len(manager.beats())
    await until(lambda: len(manager.beats()) > beats + 2, "heartbeats")
    assert not manager.has_heard("READY=1")
    await manager.hears("READY=1")
    assert "reload_failed" in manager.log()
    await manager.stop()


async def test_a_writer_that_hangs_is_noticed(manager):
    """SQLite's thread doesn't come back from a statement; the loop turns and answers, but no beat comes."""
    await manager.start()
    await manager.hears("WATCHDOG=1")
    with contextlib.closing(sqlite3.connect(manager.folder / "spool.db")) as db:
        endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
        db.execute(f"CREATE TRIGGER endless BEFORE INSERT ON segments BEGIN {endless}; END")
    hung = time.monotonic()
    event = currents()
    event["user"]["external_user_id"] = "ada"
    posted = asyncio.ensure_future(post(manager.ports["http"], [event]))
    last_beat = await manager.misses_a_beat()

    assert last_beat <= hung + WATCHDOG_S
    reader, writer = await asyncio.open_connection("127.0.0.1", manager.ports["admin"])
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    writer.close()
    assert not posted.done()
    # What systemd does next; a start is recovery.
    manager.process.send_signal(signal.SIGABRT)
    assert await asyncio.wait_for(manager.process.wait(), 20 * SLOW) == -signal.SIGABRT
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        await posted


async def test_a_writer_that_takes_nothing_is_noticed():
    """The thread answers, but the same bytes wait behind the same commit: that is no progress."""
    now = [(0, 5), (0, 5), (700, 5), (700, 5), (700, 5), (700, 6), (900, 6), (0, 6), (0, 6)]
    readings = iter(now)

    async def hop():
        pass

    progress = Progress(hop, lambda: next(readings))

    assert [await progress() for _ in now] == [True, True, True, False, False, True, True, True, True]


# -- sockets that are handed over --------------------------------------------------------------------------------------


async def test_restarts_under_load_refuse_nobody(folder):
    """Eight restarts, three kinds of senders: nobody is refused or cut off without an answer, and nothing acked is lost."""
    figures = await restart.measure(folder, 8)

    assert figures.trouble == {}
    assert figures.lost == 0
    assert figures.acked > 1000
    assert figures.ended >= 8


async def test_restarts_without_a_manager_do_refuse(folder):
    """The control: a daemon that opens its own doors does refuse, and the harness sees it; still nothing acked is lost."""
    figures = await restart.measure(folder, 1, handed_over=False)

    assert figures.trouble["connecting: ConnectionRefusedError"] > 0
    assert figures.lost == 0


async def test_connections_wait_while_there_is_no_daemon(manager):
    """Who connects before the start, or between two, is served by the next; the sockets and their file stay."""
    early = asyncio.ensure_future(post(manager.ports["http"], [currents()]))
    await asyncio.sleep(0.1)
    for _ in range(2):
        await manager.start()
        await manager.hears("READY=1")
        assert (await asyncio.wait_for(early, 20 * SLOW)).startswith(b"http/1.1 200 ")
        await manager.stop()
        assert (manager.folder / "doors.sock").exists()
        _, writer = await asyncio.open_unix_connection(str(manager.folder / "doors.sock"))
        writer.close()
        early = asyncio.ensure_future(post(manager.ports["http"], [currents()]))
    early.cancel()


async def test_a_socket_that_no_key_names(manager):
    """Whoever connects to it would wait for ever: the daemon says which address, and how to put it right."""
    manager.settings["sources__http__listen"] = f"127.0.0.1:{free_port()}"
    await manager.start()

    assert await asyncio.wait_for(manager.process.wait(), 20 * SLOW) == 78
    assert f"127.0.0.1:{manager.ports['http']}" in manager.log()
    assert "Traceback" not in manager.log()


async def test_cohorts_only_with_the_sockets_of_everything(manager):
    """The socket unit as it is shipped holds the stream door, too: it is named by its key, and closed like the door."""
    manager.settings |= {
        "mixpanel__export": "false",
        "cohorts__enabled": "true",
        "cohorts__password": "webhook-password",
        "cohorts__path": str(manager.folder / "cohorts.db"),
        "braze__url": "http://127.0.0.1:9",
        "braze__rest_key": "rest-key-of-tests",
    }
    await manager.start()
    await manager.hears("READY=1")
    await manager.stop()
    assert '"stream": []' in manager.log()

    manager.settings["sources__stream__listen"] = "[]"
    await manager.start()
    assert await asyncio.wait_for(manager.process.wait(), 20 * SLOW) == 78
    assert f"127.0.0.1:{manager.ports['stream']}" in manager.log()


def test_sockets_are_known_by_their_address(tmp_path):
    """As the configuration writes them, IPv6 and localhost included; what is taken is not closed by whoever is left."""
    try:
        six = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    four = socket.create_server(("127.0.0.1", 0))
    path = tmp_path / "s"
    unix = restart._unix_server(path)
    with six, four, unix:
        listeners = Listeners([six, four, unix])
        assert listeners.take(f"tcp:[::1]:{six.getsockname()[1]}") == [six]
        assert listeners.take(f"[::1]:{six.getsockname()[1]}") == []
        assert listeners.take(f"tcp:localhost:{four.getsockname()[1]}") == [four]
        assert listeners.take("") == []
        with pytest.raises(ConfigError, match=f"unix:{re.escape(str(path))}"):
            listeners.demand_none_left()
        assert four.fileno() > 0
        assert unix.fileno() == -1


@pytest.mark.parametrize(
    "environ", [{}, {"LISTEN_FDS": "1", "LISTEN_PID": "1"}, {"LISTEN_PID": "7"}, {"LISTEN_FDS": "x", "LISTEN_PID": "7"}]
)
def test_sockets_for_somebody_else(environ):
    """Nothing was handed over to this process: file descriptors 3 and on are its own business."""
    Listeners.handed_over(environ, 7).demand_none_left()


async def test_systemds_own_tool_hands_over(folder, emulator):
    """systemd-socket-activate starts the daemon at the first connection, which is answered."""
    needs("systemd-socket-activate")
    port = free_port()
    settings = {
        "mixpanel__url": emulator.url,
        "mixpanel__token": "example-token",
        "spool__path": str(folder / "spool.db"),
        "sources__http__listen": f"127.0.0.1:{port}",
        "sources__stream__listen": "[]",
        "admin__listen": "",
    }
    names = [f"BRIDGED__{key.upper()}={value}" for key, value in settings.items()]
    with (folder / "log").open("wb") as log:
        activated = await asyncio.create_subprocess_exec(
            *("systemd-socket-activate", f"--listen=127.0.0.1:{port}", "-E", f"PYTHONPATH={ROOT}"),
            *(word for name in names for word in ("-E", name)),
            *(sys.executable, "-m", "bridged", "run"),
            cwd=folder,
            stderr=log,
        )
    try:
        await until(lambda: "Listening" in (folder / "log").read_text(), "the tool's sockets")
        assert (await asyncio.wait_for(post(port, [currents()]), 30 * SLOW)).startswith(b"http/1.1 200 ")
        activated.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(activated.wait(), 20 * SLOW) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            activated.kill()
        await activated.wait()


# -- the end -----------------------------------------------------------------------------------------------------------


async def test_a_request_that_crosses_the_end_is_answered(manager):
    """On a connection that is open when the daemon stops: the next request is answered, and told that it is the last."""
    await manager.start()
    await manager.hears("READY=1")
    reader, writer = await asyncio.open_connection("127.0.0.1", manager.ports["http"])
    writer.write(request([currents()]))
    assert b"connection: close" not in (await reader.readuntil(b"\r\n\r\n")).lower()
    await reader.readline()
    manager.process.send_signal(signal.SIGTERM)
    await manager.hears("STOPPING=1")
    writer.write(request([currents()]))

    answer = (await reader.readuntil(b"\r\n\r\n")).lower()
    assert answer.startswith(b"http/1.1 200 ")
    assert b"connection: close" in answer
    await reader.readline()
    assert await reader.read() == b""
    writer.close()
    assert await asyncio.wait_for(manager.process.wait(), 20 * SLOW) == 0


async def test_a_stream_ends_in_good_order(manager):
    """A client in the middle of sending reads its last ack and an orderly end, never a reset."""
    await manager.start()
    await manager.hears("READY=1")
    reader, writer = await asyncio.open_connection("127.0.0.1", manager.ports["stream"])
    lines = ndjson([currents(seed=seed) for seed in range(50)])

    async def send():
        writer.write(b'{"acks":true}\n')
        with contextlib.suppress(OSError):
            while True:
                writer.write(lines)
                await writer.drain()
                await asyncio.sleep(0)

    sending = asyncio.ensure_future(send())
    await reader.readline()
    manager.process.send_signal(signal.SIGTERM)
    acks = (await reader.read()).splitlines()
    sending.cancel()
    writer.close()

    assert all(line.startswith(b'{"acked":') for line in acks)
    assert await asyncio.wait_for(manager.process.wait(), 20 * SLOW) == 0


async def test_a_second_signal_skips_the_grace(manager, emulator):
    """An operator in a hurry needn't wait for Mixpanel: the rest stays in the spool, and the end is an orderly one."""
    emulator.script([{"action": "hang"}])
    manager.settings |= {"delivery__grace": "1h", "delivery__timeout": "2h"}
    await manager.start()
    await manager.hears("READY=1")
    event = currents()
    event["user"]["external_user_id"] = "ada"
    assert (await post(manager.ports["http"], [event])).startswith(b"http/1.1 200 ")
    manager.process.send_signal(signal.SIGTERM)
    await manager.hears("STOPPING=1")
    await asyncio.sleep(1)
    assert manager.process.returncode is None
    manager.process.send_signal(signal.SIGTERM)

    assert await asyncio.wait_for(manager.process.wait(), 20 * SLOW) == 0
    with contextlib.closing(sqlite3.connect(manager.folder / "spool.db")) as db:
        assert db.execute("SELECT sum(length(codes)) FROM segments").fetchone() == (1,)
