"""The daemon as a process: signals, kills, restarts, and what it says when it can't run."""

import asyncio
import contextlib
import errno
import os
import random
import resource
import signal
import socket
import sqlite3
import sys
from pathlib import Path

import aiohttp
import msgspec
import pytest
from conftest import SLOW, currents, free_port, ndjson, until

from bridged.emulator.mixpanel import EmulatorConfig, MixpanelEmulator
from bridged.errors import whose

ROOT = Path(__file__).parent.parent
ACKS = b'{"acks":true}\n'


class Process:
    """A daemon in a process of its own."""

    def __init__(self, folder, url):
        self.folder = folder
        self.http, self.tcp = free_port(), free_port()
        self.settings = {
            "mixpanel__url": url,
            "mixpanel__token": "example-token",
            "spool__path": str(folder / "spool.db"),
            "sources__http__listen": f"127.0.0.1:{self.http}",
            "sources__stream__listen": f'["tcp:127.0.0.1:{self.tcp}", "unix:{folder}/s.sock"]',
            "admin__listen": "",
            "delivery__flush_interval": "20ms",
            "delivery__probe_interval": "100ms",
            "delivery__grace": "1s",
            "log__format": "json",
        }

    async def start(self, *arguments, before=(), stderr=None, **changes):
        """Starts it, without waiting for anything."""
        variables = {f"BRIDGED__{key.upper()}": value for key, value in (self.settings | changes).items()}
        self.log = (self.folder / "log").open("ab")
        self.process = await asyncio.create_subprocess_exec(
            *(*before, sys.executable, "-m", "bridged", "run", *arguments),
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **variables},
            stdout=self.log,
            stderr=stderr or self.log,
        )
        self.log.close()

    async def ready(self):
        """Waits until the doors are open."""
        for _ in range(int(1000 * SLOW)):
            assert self.process.returncode is None, self.said()
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self.http)
                writer.close()
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"it isn't ready: {self.said()}")

    async def up(self, **changes):
        """Starts it and waits for its doors."""
        await self.start(**changes)
        await self.ready()

    async def end(self, number=signal.SIGTERM, seconds=10):
        """Sends a signal and gives the exit code."""
        self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), seconds * SLOW)

    async def exits(self, seconds=20):
        """The exit code of one that ends by itself."""
        return await asyncio.wait_for(self.process.wait(), seconds * SLOW)

    def said(self):
        """Its log, of all starts."""
        return (self.folder / "log").read_text()

    async def post(self, events):
        """Hands events in at the HTTP door."""
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"http://127.0.0.1:{self.http}/v1/currents", json={"events": events}) as response,
        ):
            return response.status

    def waiting(self):
        """How many events are in the spool's file."""
        with contextlib.closing(sqlite3.connect(self.folder / "spool.db")) as db:
            return db.execute("SELECT coalesce(sum(length(codes)), 0) FROM segments").fetchone()[0]


@pytest.fixture
async def process(tmp_path, emulator):
    """One that is gone after the test, whatever happens."""
    running = Process(tmp_path, emulator.url)
    yield running
    if hasattr(running, "process") and running.process.returncode is None:
        running.process.kill()
        await running.process.wait()


def batch(count, first=0):
    """Currents events, all different."""
    return [currents(seed=seed) for seed in range(first, first + count)]


def ids(events):
    """What they are known by."""
    return {event["id"] for event in events}


def arrived(emulator):
    """The ids of the events that Mixpanel has."""
    return {event["properties"]["$insert_id"] for event in emulator.events()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_stopped_while_idle(process, number):
    """An orderly end: exit code 0, nothing alarming in the log, no socket file left."""
    await process.up()
    assert await process.end(number) == 0

    events = [msgspec.json.decode(line) for line in process.said().splitlines()]
    assert [event["event"] for event in events] == ["ready", "stopping", "stopped"]
    assert events[0]["spool"] == str(process.folder / "spool.db")
    assert not (process.folder / "s.sock").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_told_to_stop_until_it_is_gone(process, number):
    """Also in the interpreter's last moments, when its loop has given the signals back, the exit code is that of an orderly end."""
    await process.up()
    while process.process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.process.send_signal(number)
        await asyncio.sleep(0.0005)

    assert process.process.returncode == 0, process.said()


async def test_stopped_while_busy(process, emulator):
    """A stop in the middle of the traffic: every event that was acked is delivered, now or by the next start."""
    emulator.script([{"delay_s": 0.2}])
    await process.up(delivery__max_batch_events="20", delivery__max_concurrency="2")
    ledger = Ledger(process, 1)
    clients = [asyncio.ensure_future(ledger.http()), asyncio.ensure_future(ledger.stream())]
    await until(lambda: len(ledger.acked) > 500, "some traffic", 20)
    assert await process.end() == 0
    await asyncio.gather(*clients)

    emulator.script([])
    await process.up()
    await until(lambda: ledger.acked <= arrived(emulator), "what was acked", 30)
    await until(lambda: process.waiting() == 0, "an empty spool", 20)
    assert await process.end() == 0


async def test_stopped_while_mixpanel_hangs(process, emulator):
    """The grace is kept to, the events stay in the spool, and the next start delivers them."""
    emulator.script([{"action": "hang"}])
    await process.up(delivery__grace="300ms", delivery__timeout="1h")
    assert await process.post(batch(20)) == 200
    await until(lambda: emulator.summary().requests > 0)
    assert await process.end() == 0
    assert process.waiting() == 20
    assert arrived(emulator) == set()

    emulator.script([])
    await process.up()
    await until(lambda: arrived(emulator) == ids(batch(20)), "the events")
    assert await process.end() == 0


async def test_stopped_while_halted(process, emulator):
    """With a credential that is refused there is nothing to wait for: the grace isn't used up."""
    emulator.script([{"status": 401}])
    await process.up(delivery__grace="1h", delivery__probe_interval="1h")
    assert await process.post(batch(5)) == 200
    await until(lambda: "delivery_halted" in process.said())

    assert await process.end() == 0
    assert process.waiting() == 5


async def test_a_client_without_acks_sees_that_it_was_killed(process, emulator):
    """An orderly close would say that everything is on disk: half a line isn't, and the last whole ones needn't be."""
    await process.up()
    reader, writer = await asyncio.open_connection("127.0.0.1", process.tcp)
    writer.write(ndjson(batch(1)) + b'{"half a line')
    await until(lambda: arrived(emulator) == ids(batch(1)))  # it was read, and so was the rest
    await process.end(signal.SIGKILL)
    with pytest.raises(ConnectionResetError):
        assert await asyncio.wait_for(reader.read(), 20) == b"no goodbye"
    writer.close()


async def test_stopped_during_a_long_backoff(process, emulator):
    """Nothing would be sent within the grace: it isn't used up."""
    emulator.script([{"status": 503, "headers": {"Retry-After": "600"}}])
    await process.up(delivery__grace="5m", delivery__flush_interval="0s")
    assert await process.post(batch(5)) == 200
    await until(lambda: "delivery_impeded" in process.said())

    assert await process.end() == 0
    assert process.waiting() == 5


async def test_stopped_with_a_client_that_stays(process, emulator):
    """Idle connections and half-sent requests don't keep the daemon from ending."""
    await process.up()
    _, idle = await asyncio.open_connection("127.0.0.1", process.http)
    _, half = await asyncio.open_connection("127.0.0.1", process.http)
    half.write(b"POST /v1/currents HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    _, stream = await asyncio.open_connection("127.0.0.1", process.tcp)
    stream.write(ACKS + ndjson(batch(1)) + b'{"half a line')
    await until(lambda: arrived(emulator) == ids(batch(1)))

    assert await process.end(seconds=15) == 0
    for writer in (idle, half, stream):
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


class Ledger:
    """Clients that send until the daemon goes away, and write down what was acked."""

    def __init__(self, process, seed):
        self.process = process
        self.acked = set()
        self._rng = random.Random(seed)
        self._next = seed * 10**6

    def events(self):
        """The next few."""
        count = self._rng.randrange(1, 60)
        self._next += count
        return [currents(seed=self._next - n) for n in range(count)]

    async def http(self):
        """One request after the other."""
        async with aiohttp.ClientSession() as session:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                while True:
                    events = self.events()
                    url = f"http://127.0.0.1:{self.process.http}/v1/currents"
                    async with session.post(url, json={"events": events}) as response:
                        await response.read()
                        if response.status == 200:
                            self.acked |= ids(events)

    async def stream(self):
        """Lines without waiting; the acks as they come."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.process.tcp)
        sent = []

        async def read():
            told = 0
            while line := await reader.readline():
                if not line.endswith(b"\n") or b"acked" not in line:
                    continue
                number = msgspec.json.decode(line)["acked"]
                assert told < number <= len(sent)
                self.acked.update(sent[told:number])
                told = number

        reading = asyncio.ensure_future(read())
        with contextlib.suppress(OSError):
            writer.write(ACKS)
            while not reading.done() and not writer.is_closing():
                events = self.events()
                sent += [event["id"] for event in events]
                writer.write(ndjson(events))
                await writer.drain()
                await asyncio.sleep(0.001)
        with contextlib.suppress(OSError):
            await reading
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_killed_under_load(process, emulator):
    """Five kills at odd moments, on one spool: every event that was ever acked arrives, and the books balance."""
    emulator.script([{"delay_s": 0.1, "share": 0.5, "seed": 1}, {"action": "store_then_hang", "share": 0.1, "seed": 2}])
    acked = set()
    for seed in range(1, 6):
        await process.up(delivery__max_batch_events="200", delivery__timeout="2s")
        ledger = Ledger(process, seed)
        clients = [
            asyncio.ensure_future(client()) for client in (ledger.http, ledger.http, ledger.stream, ledger.stream)
        ]
        await until(lambda ledger=ledger: len(ledger.acked) > 100, "some traffic", 20)
        await asyncio.sleep(random.Random(seed).uniform(0, 0.3))
        assert await process.end(signal.SIGKILL) == -signal.SIGKILL
        await asyncio.gather(*clients)
        acked |= ledger.acked
    emulator.script([])
    await process.up()
    await until(lambda: process.waiting() == 0, "an empty spool", 40)

    assert await process.end() == 0
    assert acked <= arrived(emulator)
    assert "books_unbalanced" not in process.said()
    assert "segment_damaged" not in process.said()
    with contextlib.closing(sqlite3.connect(process.folder / "spool.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        books = msgspec.json.decode(db.execute("SELECT body FROM books").fetchone()[0])
    [accepted, delivered, *others] = [sum(column) for column in zip(*books.values(), strict=True)]
    assert accepted == delivered
    assert others == [0, 0, 0]


# -- what it says when it can't run ------------------------------------------------------------------------------------


async def test_a_new_credential_is_taken_over_at_sighup(process, emulator):
    """An operator repairs the credential without a restart; a configuration that can't be used changes nothing."""
    emulator.credentials(token="right")
    secret = process.folder / "token"
    secret.write_text("wrong")
    await process.up(mixpanel__token="", mixpanel__token_file=str(secret))
    events = batch(5)
    for event in events:
        event["user"]["external_user_id"] = "ada"
    assert await process.post(events) == 200
    await until(lambda: "delivery_halted" in process.said())
    secret.unlink()
    process.process.send_signal(signal.SIGHUP)
    await until(lambda: "reload_failed" in process.said())
    secret.write_text("right")
    process.process.send_signal(signal.SIGHUP)
    await until(lambda: "delivery_resumed" in process.said())
    await until(lambda: process.waiting() == 0)

    assert await process.end() == 0


async def test_a_wish_during_the_start_is_granted_after_it(process):
    """SIGHUP before the daemon is ready doesn't end it: what has changed since the start has read it is taken over."""
    secret = process.folder / "token"
    os.mkfifo(secret)
    await process.start(mixpanel__token="", mixpanel__token_file=str(secret))

    async def tell(token, number=0):
        """Writes when somebody waits at the other end; sends a signal before."""
        pipes = []

        def opened():
            with contextlib.suppress(OSError):
                pipes.append(os.open(secret, os.O_WRONLY | os.O_NONBLOCK))
            return pipes

        await until(opened, f"whoever reads {token}", 30)
        process.process.send_signal(number)
        with os.fdopen(pipes[0], "w") as pipe:
            pipe.write(token)

    await tell("first", signal.SIGHUP)
    await until(lambda: "ready" in process.said() or process.process.returncode, "the start", 30)
    assert process.process.returncode is None
    await tell("second")
    await until(lambda: "reloaded" in process.said())

    assert await process.end() == 0
    events = [msgspec.json.decode(line) for line in process.said().splitlines()]
    assert [event["event"] for event in events] == ["ready", "reloaded", "stopping", "stopped"]
    assert events[1]["changed"] == ["mixpanel.token"]


async def test_a_configuration_that_is_never_read_to_its_end(process, emulator, client):
    """A pipe to which nobody writes, in the configuration's place or in a secret's: at SIGHUP events go on, who looks is
    answered, the next SIGHUP finds the file that is there by then, and SIGTERM ends it at once.
    """
    toml, secret = process.folder / "config.toml", process.folder / "token"
    secret.write_text("example-token")
    toml.write_text(f'[mixpanel]\ntoken_file = "{secret}"\n')
    admin = f"127.0.0.1:{free_port()}"
    process.settings |= {"admin__listen": admin}
    del process.settings["mixpanel__token"]
    await process.start("--config", str(toml))
    await process.ready()
    for file in (toml, secret):
        good = file.read_text()
        before = process.said().count('"reloaded"')
        file.unlink()
        os.mkfifo(file)
        process.process.send_signal(signal.SIGHUP)
        await asyncio.sleep(0.3)
        async with client.get(f"http://{admin}/healthz") as answer:
            assert answer.status == 200
        assert await process.post(batch(5)) == 200
        await until(lambda: process.waiting() == 0, "the delivery")
        file.unlink()
        file.write_text(good)
        process.process.send_signal(signal.SIGHUP)
        await until(lambda before=before: process.said().count('"reloaded"') > before, "the next SIGHUP", 30)
        assert "couldn't be read within 5 s" in process.said()
    toml.write_text("")
    process.process.send_signal(signal.SIGHUP)
    await until(lambda: f"{toml}: mixpanel has no credential" in process.said(), "which file has none")
    toml.unlink()
    os.mkfifo(toml)
    process.process.send_signal(signal.SIGHUP)
    await asyncio.sleep(0.3)

    assert await process.end(seconds=5) == 0
    assert "stopped" in process.said().splitlines()[-1]


@pytest.mark.parametrize(("limit", "doors"), [(64, 8), (128, 32), (300, 75)])
async def test_few_open_files(process, emulator, limit, doors):
    """Idle connections can't take them all: the doors take fewer, and who looks and what is delivered still get theirs. So
    does the admin side, where anybody may connect.
    """
    admin = f"127.0.0.1:{free_port()}"
    await process.start(before=("sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh"), admin__listen=admin)
    await process.ready()
    ports = (process.tcp, int(admin.rpartition(":")[2])) * 100
    idle = [socket.create_connection(("127.0.0.1", port)) for port in ports]
    async with aiohttp.ClientSession() as session:
        for _ in range(3):
            async with session.get(f"http://{admin}/healthz") as answer:
                assert answer.status == 200
        assert await process.post(batch(5)) == 200
        await until(lambda: arrived(emulator) == ids(batch(5)), "the events")
    for connection in idle:
        connection.close()
    assert await process.end() == 0

    [said] = [
        line for line in map(msgspec.json.decode, process.said().splitlines()) if line["event"] == "few_open_files"
    ]
    assert (said["allowed"], said["http_connections"], said["stream_connections"]) == (limit, doors, doors)
    assert "Too many open files" not in process.said()


@pytest.mark.parametrize("limit", [8, 16, 20, 63])
async def test_too_few_open_files(process, limit):
    """One line that names the limit, whatever of a start it would have been enough for; and nothing is made."""
    await process.start(before=("sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh"))
    assert await process.exits() == 78
    assert f"may open {limit} files at most" in process.said()
    assert "LimitNOFILE=" in process.said()
    assert "Traceback" not in process.said()
    assert [file.name for file in process.folder.iterdir()] == ["log"]


NO_THREADS = """
import sys, threading
def start(thread): raise RuntimeError("can't start new thread")
threading.Thread.start = start
from bridged.cli import main
sys.exit(main(sys.argv[4:]))
"""


@pytest.mark.parametrize("stderr", [None, asyncio.subprocess.PIPE], ids=["file", "pipe"])
async def test_no_more_threads(process, stderr):
    """A limit on processes that leaves none for a start: told with what raises it, also where a thread writes the log."""
    await process.start(before=(sys.executable, "-c", NO_THREADS), stderr=stderr)
    assert await process.exits() == 74
    said = (await process.process.stderr.read()).decode() if stderr else process.said()
    assert "bridged: the process may make no more threads\n  hint: raise the limit: TasksMax=" in said
    assert "Traceback" not in said


async def test_a_limit_that_may_be_raised(process):
    """A soft limit, as some shells have it, is no reason to fail."""
    await process.start(before=("sh", "-c", 'ulimit -S -n 20; exec "$@"', "sh"))
    await process.ready()
    assert await process.end() == 0


def test_whose_a_file_is_behind_a_link(tmp_path):
    """`chown -R` doesn't go through a link, as the folder of systemd's DynamicUser is one: the hint names what it leads to."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    hint = whose(PermissionError(errno.EACCES, "no"), tmp_path / "link" / "spool.db", "otherwise")
    assert hint.endswith(f"chown -R --reference={tmp_path}/real {tmp_path}/real")


@pytest.mark.parametrize("of", ["open", "sqlite"])
def test_a_spool_for_which_there_is_no_more_file(tmp_path, of):
    """The hint names the limit: the folder's owner has nothing to do with it. (SQLite doesn't say why it can't open.)"""
    error = OSError(errno.EMFILE, "Too many open files")
    if of == "sqlite":
        error = sqlite3.OperationalError("unable to open database file")
        error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        hint = whose(error, tmp_path / "spool.db", "otherwise")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "ulimit -n" in hint


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "link"])
async def test_a_spool_that_is_no_file(process, kind):
    """It is told before anything is made: no lock, journal or ballast is left beside what somebody has put there."""
    folder = process.folder / "there"
    folder.mkdir()
    path = folder / "spool.db"
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path if kind == "pipe" else folder / "pipe")
    if kind == "link":
        path.symlink_to(folder / "pipe")
    before = sorted(folder.iterdir())
    await process.start(spool__path=str(path))

    assert await process.exits() == 74
    assert f"it is a {'pipe' if kind == 'link' else kind}, no file" in process.said()
    assert sorted(folder.iterdir()) == before


async def test_two_names_of_one_spool(process, tmp_path, emulator):
    """A hard link has a lock and a WAL of its own: a second daemon on it would destroy both. It is refused while the first
    one runs. A backup by hard links is none, and is told, but no reason not to start.
    """
    await process.up()
    (tmp_path / "other").mkdir()
    link = tmp_path / "other" / "spool.db"
    link.hardlink_to(process.folder / "spool.db")
    second = Process(tmp_path / "other", emulator.url)
    second.settings["spool__path"] = str(link)
    await second.start()
    assert await second.exits() == 74
    assert f"in use by process {process.process.pid}" in second.said()
    assert "hard link" in second.said()
    assert await process.post(batch(5)) == 200
    await until(lambda: process.waiting() == 0, "the delivery")
    assert await process.end() == 0

    await process.up()
    assert "spool_has_other_names" in process.said()
    assert await process.post(batch(5, 10)) == 200
    assert await process.end() == 0


async def test_two_daemons_on_one_spool(process, tmp_path, emulator):
    """The second says so and ends; the first doesn't notice."""
    await process.up()
    second = Process(tmp_path, emulator.url)
    await second.start(sources__stream__listen="[]")

    assert await second.exits() == 74
    assert "in use by another bridged" in second.said()
    assert "Traceback" not in second.said()
    assert await process.post(batch(1)) == 200
    assert await process.end() == 0


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"mixpanel__region": "mars"}, "region"),
        ({"mixpanel__tokn": "x"}, "TOKEN"),
        ({"sources__http__listen": "nowhere"}, "host:port"),
        ({"mixpanel__token": ""}, "credential"),
    ],
)
async def test_a_configuration_that_is_wrong(process, changes, word):
    """Exit code 78, and words that name the key."""
    await process.start(**changes)

    assert await process.exits() == 78
    assert word in process.said()
    assert "Traceback" not in process.said()


async def test_a_configuration_that_is_not_there(process):
    """A file that was asked for must be there."""
    await process.start("--config", "nowhere.toml")

    assert await process.exits() == 78
    assert "nowhere.toml" in process.said()


@pytest.mark.parametrize("door", ["http", "stream"])
async def test_a_port_that_is_taken(process, door):
    """Exit code 74, the key and the address; no traceback, and no socket file left behind."""
    taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = taken.sockets[0].getsockname()[1]
    listen = {
        "http": {"sources__http__listen": f"127.0.0.1:{port}"},
        "stream": {"sources__stream__listen": f'["tcp:127.0.0.1:{port}"]'},
    }[door]
    await process.start(**listen)

    assert await process.exits() == 74
    assert f"sources.{door}.listen" in process.said()
    assert f"127.0.0.1:{port}" in process.said()
    assert "Traceback" not in process.said()
    taken.close()


async def test_a_start_that_fails_says_so_at_once(process, emulator):
    """With events waiting, and a Mixpanel that doesn't answer: nobody waits for the grace to hear that a port is taken."""
    emulator.script([{"action": "hang"}])
    await process.up(delivery__grace="0s")
    assert await process.post(batch(5)) == 200
    assert await process.end() == 0
    taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = taken.sockets[0].getsockname()[1]
    await process.start(delivery__grace="1h", delivery__timeout="1h", sources__http__listen=f"127.0.0.1:{port}")

    assert await process.exits() == 74
    assert "sources.http.listen" in process.said()
    assert process.waiting() == 5
    taken.close()


@pytest.mark.parametrize(("grace", "signals"), [("0s", 1), ("1h", 2)])
async def test_stopped_while_it_starts(process, grace, signals):
    """A start that takes long is given up after the grace, or at a second signal: whatever the spool's thread does meanwhile."""
    await process.up()
    assert await process.post(batch(5)) == 200
    assert await process.end() == 0
    with contextlib.closing(sqlite3.connect(process.folder / "spool.db", isolation_level=None)) as busy:
        busy.execute("BEGIN IMMEDIATE")  # its own transaction waits for this one, for five seconds, and then fails
        await process.start(delivery__grace=grace)
        await until(lambda: "spool.db" in opened(process.process.pid), "the start", 30)
        process.process.send_signal(signal.SIGTERM)
        if signals == 2:
            await until(lambda: "isn't over" in process.said(), "what it says of it")
            process.process.send_signal(signal.SIGTERM)
        assert await process.exits() == 0


def opened(pid):
    """The names of the files that a process has open."""
    names = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            names.add(file.readlink().name)
    return names


async def test_a_spool_that_cannot_be_written(process, emulator):
    """The request is not acked, and the process ends with 74 and the reason: whoever restarts it sees it."""
    await process.up()
    with contextlib.closing(sqlite3.connect(process.folder / "spool.db")) as db:
        db.execute("CREATE TRIGGER no BEFORE INSERT ON segments BEGIN SELECT RAISE(ABORT, 'disk I/O error'); END")
    with contextlib.suppress(aiohttp.ClientError):
        assert await process.post(batch(1)) == 503

    assert await process.exits() == 74
    assert "disk I/O error" in process.said()
    assert "Traceback" not in process.said()


async def test_mixpanel_is_down_at_the_start(process, tmp_path):
    """No reason not to start: events are taken, and delivered when it is there."""
    port = free_port()
    await process.up(mixpanel__url=f"http://127.0.0.1:{port}")
    assert await process.post(batch(10)) == 200
    await until(lambda: "delivery_impeded" in process.said())
    async with MixpanelEmulator(EmulatorConfig(port=port)) as late:
        await until(lambda: arrived(late) == ids(batch(10)), "the events", 30)
    assert await process.end() == 0
