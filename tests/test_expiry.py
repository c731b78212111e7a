"""The 48-hour rule, to the second: what expires while a credential is refused, where it goes, and the way back."""

import asyncio
import contextlib
import errno
import gzip
import itertools
import os
import random
from pathlib import Path

import msgspec
import pytest
from conftest import NAMES, balanced, currents, ndjson, until
from test_cli import bridged  # noqa: F401  # a fixture

from bridged import cli
from bridged.backlog.archive import Archive
from bridged.backlog.backlog import Backlog
from bridged.backlog.segment import Batch
from bridged.backlog.spool import Intaken, Spool, SpoolOptions
from bridged.commands import replay
from bridged.delivery import archiver
from bridged.delivery import delivery as module
from bridged.delivery.delivery import Delivery, DeliveryOptions
from bridged.delivery.pacing import Pace, PaceLimits
from bridged.delivery.transport import Transport
from bridged.errors import SpoolFull
from bridged.mixpanel.requests import Credentials, Target

CODE = 3
DAY = 86_400.0


class Clock:
    """The wall clock of a test."""

    def __init__(self):
        self.now = 1_790_000_000.0

    def __call__(self):
        return self.now


def event(n):
    """A mapped event."""
    return msgspec.json.encode(
        {"event": "Email Open", "properties": {"time": 1_789_999_000, "distinct_id": "ada", "$insert_id": f"i-{n}"}}
    )


class Road:
    """Spool, backlog and delivery by a test's clock, in front of an emulator."""

    def __init__(self, folder, url, clock, **options):
        self.clock = clock
        self._folder, self._url = folder, url
        self._options = DeliveryOptions(**({"flush_interval_s": 0.0, "probe_interval_s": 3600.0} | options))

    async def __aenter__(self):
        async with contextlib.AsyncExitStack() as stack:
            options = SpoolOptions(path=str(self._folder / "spool.db"))
            self.spool = await stack.enter_async_context(Spool(options, NAMES, self.clock))
            self.backlog = Backlog(self.spool, 32 * 2**20, self.clock)
            transport = Transport(Target(url=self._url, credentials=Credentials(token="wrong")), 5.0)
            transport = await stack.enter_async_context(transport)
            self.delivery = Delivery(
                self.backlog,
                self.spool,
                transport,
                Pace(PaceLimits(), random.Random(1)),
                self._options,
                Archive(str(self._folder / "archive")),
                lambda code: NAMES.get(code, ""),
                self.clock,
            )
            self._task = asyncio.create_task(self.delivery.run())
            stack.push_async_callback(self._stop)
            self._exit = stack.pop_all()
        return self

    async def __aexit__(self, *exc):
        await self._exit.__aexit__(*exc)

    async def _stop(self):
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def put(self, *numbers):
        """Events, accepted now, as one segment."""
        await self.spool.append(
            Intaken([Batch(b"".join(event(n) + b"\n" for n in numbers), bytes([CODE] * len(numbers)))])
        )

    @property
    def expired(self):
        """How many have."""
        return self.spool.accounts.total("expired")

    async def looked(self):
        """Returns when delivery has looked at what waits a few times."""
        await asyncio.sleep(0.1)

    def archived(self):
        """What is in the archive, in order of the files' names."""
        files = sorted((self._folder / "archive").glob("*.ndjson.gz"))
        return [msgspec.json.decode(line)["properties"]["$insert_id"] for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]  # fmt: skip


@pytest.fixture
def clock():
    """One that stands still unless told."""
    return Clock()


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch):
    """While halted, a look every hundredth of a second instead of every second."""
    monkeypatch.setattr(module, "_HALTED_LOOK_S", 0.01)


@pytest.mark.parametrize("on_expiry", ["archive", "drop", "keep"])
async def test_expiry_is_exact_to_the_second(tmp_path, emulator, clock, on_expiry):
    """Ten segments a second apart: at 48 h exactly none has expired, a millisecond later the first has and no other, and so
    on; `keep` keeps all of them. The books balance at each step, and the archive holds exactly what is gone.
    """
    emulator.credentials(token="right")
    began = clock.now
    async with Road(tmp_path, emulator.url, clock, max_age_s=2 * DAY, on_expiry=on_expiry) as path:
        for n in range(10):
            clock.now = began + n
            await path.put(2 * n, 2 * n + 1)
        await until(lambda: path.delivery.halted is not None, "the halt")
        clock.now = began + 2 * DAY
        await path.looked()
        assert path.expired == 0
        for n in range(10):
            clock.now = began + 2 * DAY + n
            await path.looked()
            assert path.expired == (0 if on_expiry == "keep" else 2 * n)
            clock.now += 0.001
            if on_expiry == "keep":
                await path.looked()
                assert path.expired == 0
                continue
            await until(lambda n=n: path.expired == 2 * n + 2, "the expiry")
            await path.looked()
            assert path.expired == 2 * n + 2
            assert path.spool.accounts.imbalance() == 0
        expected = [f"i-{n}" for n in range(20)] if on_expiry == "archive" else []
        assert path.archived() == expected
        assert path.backlog.events == (20 if on_expiry == "keep" else 0)


async def test_what_came_back_from_a_refusal_expires_in_the_order_of_its_age(tmp_path, emulator, clock):
    """Many requests are refused at once, the newest first: still the oldest is the first that goes."""
    emulator.script([{"status": 401, "delay_s": delay_s, "times": 1} for delay_s in (1.6, 1.5, 1.4, 1.3)])
    began = clock.now
    async with Road(tmp_path, emulator.url, clock, max_age_s=100.0, on_expiry="archive") as path:
        for n in range(4):
            clock.now = began + 10 * n
            await path.put(n)
            await until(lambda n=n: emulator.summary().requests > n, "the request")
        await until(lambda: path.delivery.verdicts["halt"] == 4, "the refusals")
        for n in range(4):
            clock.now = began + 10 * n + 100.5
            await until(lambda n=n: path.expired == n + 1, "the expiry")
            await path.looked()
            assert path.expired == n + 1

        assert path.archived() == ["i-0", "i-1", "i-2", "i-3"]


async def test_what_was_split_expires_by_its_own_age(tmp_path, emulator, clock):
    """A request of an old segment and a young one is refused as a whole: its halves don't become as old as its oldest event."""
    emulator.script([{"status": 400, "body": "no", "times": 1}, {"status": 401}])
    began = clock.now
    async with Road(tmp_path, emulator.url, clock, max_age_s=100.0, flush_interval_s=40.0) as path:
        await path.put(1)
        clock.now = began + 50.0  # both are due
        await path.put(2)
        await until(lambda: path.delivery.verdicts["halt"] == 2, "the refusals")
        clock.now = began + 100.5
        await until(lambda: path.expired == 1, "the first expiry")
        await path.looked()
        assert (path.expired, path.archived()) == (1, ["i-1"])
        clock.now = began + 150.5
        await until(lambda: path.expired == 2, "the second expiry")

        assert path.archived() == ["i-1", "i-2"]


async def test_a_single_event_that_is_kept_aside_expires_too(tmp_path, emulator, clock):
    """Refused incomprehensibly while nothing else succeeds: it waits for a success, but not for ever."""
    emulator.script([{"status": 400, "body": "no", "times": 1}, {"status": 401}])
    async with Road(tmp_path, emulator.url, clock, max_age_s=100.0) as path:
        await path.put(1)
        await until(lambda: path.delivery.set_aside == 1, "the event")
        await path.put(2)
        await until(lambda: path.delivery.halted is not None, "the halt")
        clock.now += 99.0
        await path.looked()
        assert path.expired == 0
        clock.now += 2.0
        await until(lambda: path.expired == 2, "the expiry")

        assert path.delivery.set_aside == 0
        assert sorted(path.archived()) == ["i-1", "i-2"]


async def test_nothing_expires_while_nothing_is_refused(tmp_path, emulator, clock):
    """An outage isn't a refusal: events of any age wait for its end."""
    emulator.script([{"status": 503}])
    async with Road(tmp_path, emulator.url, clock, max_age_s=1.0) as path:
        await path.put(1)
        await until(lambda: path.delivery.verdicts["retry"] > 0, "the outage")
        clock.now += 30 * DAY
        await path.looked()
        assert path.expired == 0
        assert path.backlog.events == 1


async def test_rows_go_after_the_fsync(tmp_path, emulator, clock, monkeypatch):
    """First the file is on disk, then its folder, and only then the rows leave the spool."""
    steps = []
    fsync, settle = os.fsync, Backlog.settle

    def synced(descriptor):
        steps.append("folder" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Backlog, "settle", lambda self, settlement: (steps.append("rows"), settle(self, settlement))[1])
    emulator.credentials(token="right")
    async with Road(tmp_path, emulator.url, clock, max_age_s=1.0) as path:
        await path.put(1)
        await until(lambda: path.delivery.halted is not None, "the halt")
        steps.clear()  # the start's own
        clock.now += 2.0
        await until(lambda: path.expired == 1, "the expiry")

    assert steps[-3:] == ["file", "folder", "rows"]
    assert set(steps[:-3]) <= {"folder"}, "the folder may have been made"
    assert (tmp_path / "archive").stat().st_mode & 0o777 == 0o700
    assert [file.stat().st_mode & 0o777 for file in (tmp_path / "archive").iterdir()] == [0o600]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
async def test_a_file_that_cannot_be_brought_to_disk(tmp_path, emulator, clock, monkeypatch, number):
    """The events are kept, nothing partial is left, it is told, and it is tried again later, with success."""
    fsync, write, broken, left = os.fsync, Archive.write, True, []

    def failing(descriptor):
        if broken and Path(f"/proc/self/fd/{descriptor}").is_file():
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    def watched(archive, segments):
        try:
            return write(archive, segments)
        except OSError:
            # Looked at in the writing thread: by the time that the test could look, the next try may be under way.
            left.append(list((tmp_path / "archive").iterdir()))
            raise

    monkeypatch.setattr(os, "fsync", failing)
    monkeypatch.setattr(Archive, "write", watched)
    monkeypatch.setattr(archiver, "_RETRY_S", 0.05)
    emulator.credentials(token="right")
    async with Road(tmp_path, emulator.url, clock, max_age_s=1.0) as path:
        await path.put(1, 2)
        await until(lambda: path.delivery.halted is not None, "the halt")
        clock.now += 2.0
        await until(lambda: path.delivery.archiver.problem, "the failure")
        await path.looked()
        assert (path.expired, path.backlog.events) == (0, 2)
        assert left
        assert not any(left)
        assert os.strerror(number) in path.delivery.archiver.problem
        broken = False
        await until(lambda: path.expired == 2, "the expiry")

        assert path.delivery.archiver.problem == ""
        assert path.archived() == ["i-1", "i-2"]


# -- the way back ------------------------------------------------------------------------------------------------------


@pytest.fixture
async def expired(daemon, emulator, tmp_path):
    """A daemon whose 30 events expired into files, and whose credential is good again."""
    emulator.credentials(token="another")
    app = await daemon(retention__max_age="100ms")
    await app.intake.accept_lines(ndjson([currents(seed=seed) for seed in range(30)]).splitlines())
    await until(lambda: app.spool.accounts.total("expired") == 30, "the expiry")
    emulator.credentials(token="example-token")
    return app


async def test_a_replay_and_a_second_one(expired, bridged, emulator, tmp_path):  # noqa: F811  # the fixture
    """`bridged replay` sends every event once and puts the file aside; a second replay of the same file changes nothing at
    Mixpanel, which knows each event by its $insert_id.
    """
    files = sorted((tmp_path / "archive").glob("*.ndjson.gz"))
    assert files
    code, out, _ = await bridged(expired, "replay", *files)
    assert code == 0
    assert out.count("back in the spool") == len(files)
    await until(lambda: len(emulator.events()) == 30, "the delivery")
    first = {event["properties"]["$insert_id"]: event for event in emulator.events()}
    assert sorted((tmp_path / "archive").iterdir()) == [file.with_name(f"{file.name}.replayed") for file in files]

    again = sorted((tmp_path / "archive").iterdir())
    assert (await bridged(expired, "replay", *again))[0] == 0
    await until(lambda: expired.spool.accounts.total("delivered") == 60, "the second delivery")
    assert {event["properties"]["$insert_id"]: event for event in emulator.events()} == first
    assert emulator.summary().duplicates == 30
    balanced(expired)


async def test_a_plain_file_is_replayed_as_well(expired, bridged, emulator, tmp_path):  # noqa: F811  # the fixture
    """Whoever unpacked an archive to look at it can hand it back as it is; empty lines are nothing."""
    files = sorted((tmp_path / "archive").glob("*.ndjson.gz"))
    plain = tmp_path / "plain.ndjson"
    plain.write_bytes(b"\n".join(gzip.decompress(file.read_bytes()) for file in files))
    code, out, _ = await bridged(expired, "replay", plain)

    assert (code, out) == (0, f"{plain}: 30 events back in the spool\n")
    await until(lambda: len(emulator.events()) == 30, "the delivery")


async def test_a_folder_is_replayed(expired, bridged, emulator, tmp_path):  # noqa: F811  # the fixture
    """A long halt makes more files than a command line takes: their folder does, the oldest first, and what isn't one stays."""
    folder = tmp_path / "archive"
    files = sorted(folder.glob("*.ndjson.gz"))
    (folder / "notes.txt").write_text("not an event")
    code, out, _ = await bridged(expired, "replay", folder)
    assert code == 0
    assert [line.partition(":")[0] for line in out.splitlines()] == [str(file) for file in files]
    await until(lambda: len(emulator.events()) == 30, "the delivery")

    code, out, _ = await bridged(expired, "replay", folder)
    assert (code, out) == (0, f"{folder}: no .ndjson.gz files in it\n")
    assert (folder / "notes.txt").exists()


def test_an_archive_that_may_not_be_entered_is_told(tmp_path, capsys, every_pathlib, an_ordinary_user):
    """The service's folder is its own and root's: somebody else is told so, in words, for a folder as for a file in it."""
    for given in (tmp_path / "archive", tmp_path / "archive" / "a.ndjson.gz", tmp_path):
        assert cli.main(["replay", "--config", os.devnull, str(given)]) == 74
        said = capsys.readouterr().err
        assert said.startswith(f"bridged: can't read {given}: [Errno 13]")
        assert said.endswith("hint: run this as root, or as who may read it\n")


ARCHIVED = b'{"event":"Email Open","properties":{"$insert_id":"a","time":1}}\n'


async def test_only_a_file_of_its_own_is_put_aside(daemon, bridged, tmp_path):  # noqa: F811  # the fixture
    """A pipe or a link keeps its name, and an earlier file of that name stays."""
    app = await daemon()
    file, link, fifo = tmp_path / "file", tmp_path / "link", tmp_path / "fifo"
    file.write_bytes(ARCHIVED)
    link.symlink_to(file)
    os.mkfifo(fifo)
    writing = asyncio.create_task(asyncio.to_thread(fifo.write_bytes, ARCHIVED))
    assert (await bridged(app, "replay", fifo, link))[0] == 0
    await writing
    assert fifo.is_fifo()
    assert link.is_symlink()
    assert (await bridged(app, "replay", file))[0] == 0
    file.write_bytes(ARCHIVED * 2)
    assert (await bridged(app, "replay", file, tmp_path / "file.replayed"))[0] == 0

    found = {path.name: path.read_bytes() for path in tmp_path.glob("*.replayed*")}
    assert found == {"file.replayed": ARCHIVED, "file.2.replayed": ARCHIVED * 2}


async def test_a_replay_that_is_stopped_says_how_far_it_came(daemon, bridged, tmp_path, monkeypatch):  # noqa: F811  # the fixture
    """Whoever goes on with it knows what is there already; the file keeps its name."""
    app = await daemon()
    file = tmp_path / "file"
    file.write_bytes(ARCHIVED * 5)
    monkeypatch.setattr(replay, "_SLICE", 2)
    take, calls = type(app.intake).accept_archived, itertools.count()

    def full_at_last(*given):
        if next(calls) == 2:
            raise SpoolFull("the spool is full", "make room")
        return take(*given)

    monkeypatch.setattr(type(app.intake), "accept_archived", full_at_last)
    code, _, err = await bridged(app, "replay", file)

    assert code != 0
    assert "the spool is full" in err
    assert f"{file}: 4 of its 5 events were replayed; replaying it again is harmless" in err
    assert file.exists()


async def test_a_file_that_cannot_be_renamed_is_told(daemon, bridged, tmp_path, monkeypatch):  # noqa: F811  # the fixture
    """All the files are sent, each once; the exit code is that of a disk, and a sentence says what not to do."""
    app = await daemon()
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(ARCHIVED)

    def read_only(path, _target):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "rename", read_only)
    code, out, err = await bridged(app, "replay", *files)

    assert code == 74
    assert out.count("1 events back in the spool") == 2
    assert "a was replayed, but can't be renamed" in err
    assert "don't replay it again" in err
    assert app.spool.accounts.total("accepted") == 2


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (ARCHIVED + b"nonsense\n", "line 2 is no archived event"),
        (gzip.compress(b"[]", mtime=0), "line 1 is no archived event"),
        (gzip.compress(b"x" * 100, mtime=0)[:-9], "can't read"),
        (ndjson([currents()]), "bridged backfill"),
        (b'\n{"id":1,"stage":"door","event_type":"x","reason":"because","event":{"id":"a"}}\n', "dead-letters replay"),
    ],
)
async def test_a_file_that_is_no_archive(daemon, bridged, tmp_path, content, word):  # noqa: F811  # the fixture
    """Told with its line, before anything of it is sent; the file stays where it is."""
    app = await daemon()
    file = tmp_path / "file"
    file.write_bytes(content)
    code, _, err = await bridged(app, "replay", file)

    assert code == 74
    assert word in err
    assert file.exists()
    assert app.spool.accounts.total("accepted") == 0


async def test_damaged_files_do_not_stop_the_others(expired, bridged, emulator, tmp_path):  # noqa: F811  # the fixture
    """One that was copied in half stood in the way of all behind it, at each call; it is named at the end, and stays."""
    folder = tmp_path / "archive"
    files = sorted(folder.glob("*.ndjson.gz"))
    for name in ("0", "1"):
        (folder / f"{name}.ndjson.gz").write_bytes(files[0].read_bytes()[:-9])
    code, out, err = await bridged(expired, "replay", folder)

    assert (code, out.count("back in the spool")) == (74, len(files))
    assert "2 files weren't replayed" in err
    assert all(f"can't read {folder / name}.ndjson.gz" in err for name in ("0", "1"))
    assert len(list(folder.glob("*.ndjson.gz"))) == 2
    await until(lambda: len(emulator.events()) == 30, "the delivery")
    (folder / "0.ndjson.gz").unlink()
    code, _, err = await bridged(expired, "replay", folder)
    assert (code, f"can't read {folder / '1'}.ndjson.gz" in err) == (74, True)


async def test_what_is_left_of_a_file_that_was_cut_off_can_be_sent(daemon, bridged, tmp_path):  # noqa: F811  # the fixture
    """By what the hint says to type: it told only what archive files are, and the events before the cut stayed there.

    Of one that is damaged in its midst nothing is said: what gzip makes of that may look like events and be none.
    """
    app = await daemon()
    packed = gzip.compress(b"".join(ARCHIVED.replace(b'"a"', b'"%d"' % n) for n in range(30_000)), mtime=0)
    half = len(packed) // 2
    file, left = tmp_path / "an archive.ndjson.gz", tmp_path / "left.ndjson"
    file.write_bytes(packed[:half] + bytes([packed[half] ^ 255]) + packed[half + 1 :])
    assert "gzip -dc" not in (await bridged(app, "replay", file))[2]
    file.write_bytes(packed[:half])
    _, _, err = await bridged(app, "replay", file)
    command = err.partition("what is left of it: ")[2].partition(";")[0]
    typed = await asyncio.create_subprocess_shell(command, cwd=tmp_path, stderr=asyncio.subprocess.DEVNULL)
    await typed.wait()
    lines = left.read_bytes().splitlines(keepends=True)
    left.write_bytes(b"".join(lines[:-1]))

    assert (await bridged(app, "replay", left))[0] == 0
    assert app.spool.accounts.total("accepted") == len(lines) - 1 > 10_000


def test_slices_fit_a_request():
    """Events near a megabyte don't make a request that the daemon refuses; none is left out."""
    lines = [b"%d" % n + b" " * 900_000 for n in range(20)]
    slices = list(replay._slices(lines))

    assert [bytes(event) for events in slices for event in events] == lines
    assert max(sum(len(bytes(event)) for event in events) for events in slices) <= 5 * 2**20
    assert [len(events) for events in replay._slices([b"1"] * 4001)] == [2000, 2000, 1]
