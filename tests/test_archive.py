"""Expiry while halted: archived, dropped or kept, and the way back."""

import errno
import gzip
import json
import os
from pathlib import Path

import aiohttp
import msgspec
import pytest
from conftest import Daemon, balanced, currents, ndjson, until

from bridged.backlog.archive import Archive
from bridged.backlog.segment import Packer
from bridged.emulator.mixpanel import MixpanelEmulator

EVENTS = [currents(seed=seed) for seed in range(30)]


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    """Archive files are complete gzip NDJSON, and nothing partial is left beside them."""
    pack = Packer().pack
    segments = [pack(7, 1_790_000_000.0, b'{"a":1}\n', b"\x01"), pack(8, 1_790_000_001.0, b'{"b":2}\n', b"\x02")]

    name = Archive(str(tmp_path / "archive")).write(segments)

    assert gzip.decompress(Path(name).read_bytes()) == b'{"a":1}\n{"b":2}\n'
    assert [path.name for path in (tmp_path / "archive").iterdir()] == ["20260921T141320Z-0000000007-2.ndjson.gz"]


def test_other_events_get_another_name(tmp_path: Path) -> None:
    """Ids are given again after a restart: what an earlier life archived, or replayed, under the same name stays as it is."""
    pack = Packer().pack
    archive = Archive(str(tmp_path / "archive"))
    bodies = [b'{"a":1}\n', b'{"b":2}\n', b'{"c":3333}\n', b'{"d":4}\n']
    names = [Path(archive.write([pack(7, 1_790_000_000.0, body, b"\x01")])) for body in bodies[:3]]
    names[0].rename(names[0].with_name(f"{names[0].name}.replayed"))
    archive.write([pack(7, 1_790_000_000.0, bodies[3], b"\x01")])

    stem = "20260921T141320Z-0000000007-1"
    found = {file.name: gzip.decompress(file.read_bytes()) for file in (tmp_path / "archive").iterdir()}
    endings = [".ndjson.gz.replayed", "-2.ndjson.gz", "-3.ndjson.gz", "-4.ndjson.gz"]
    assert found == {f"{stem}{ending}": body for ending, body in zip(endings, bodies, strict=True)}


def test_a_second_try_is_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a crash before the rows were gone the same events come again, and have their file: none of it is doubled or read in
    vain, when a look at the size says that it is another.
    """
    pack = Packer().pack
    archive = Archive(str(tmp_path / "archive"))
    other, same = [pack(7, 1_790_000_000.0, body, b"\x01") for body in (b'{"other":1}\n', b'{"b":2}\n')]
    names = [archive.write([other]), archive.write([same])]
    read, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(str(path)), read_bytes(path))[1])

    assert archive.write([same]) == names[1]
    assert read == [names[1]]
    assert sorted(map(str, (tmp_path / "archive").iterdir())) == sorted(names)


@pytest.mark.parametrize("failing", ["archive", "outside"])
def test_a_folder_that_cannot_be_brought_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """A file whose name may vanish isn't left as if it were archived, nor a folder; the second try makes both."""
    segment = Packer().pack(7, 1_790_000_000.0, b'{"a":1}\n', b"\x01")
    folder = tmp_path / "outside" / "archive"
    folder.parent.mkdir()
    fsync, broken, synced = os.fsync, True, []

    def sync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        if broken and synced[-1] == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        Archive(str(folder)).write([segment])
    assert not list(folder.parent.rglob("*.*"))
    assert folder.exists() is (failing == "archive")
    broken = False
    synced.clear()

    assert Path(Archive(str(folder)).write([segment])).exists()
    assert ("outside" in synced) is (failing == "outside")
    assert synced[-1] == "archive"


async def _halted(daemon: Daemon, emulator: MixpanelEmulator, **overrides: str):
    """A daemon whose credential is refused, with 30 events waiting."""
    emulator.credentials(token="another")
    app = await daemon(**overrides)
    await app.intake.accept_lines(ndjson(EVENTS).splitlines())
    await until(lambda: app.delivery.halted, "the halt")
    return app


async def test_expired_events_are_archived_and_replayed(
    daemon: Daemon, emulator: MixpanelEmulator, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """Events too old for a refused credential leave as files, and a replay brings every one of them to Mixpanel."""
    app = await _halted(daemon, emulator, retention__max_age="100ms")
    await until(lambda: app.spool.accounts.total("expired") == 30, "the expiry")
    balanced(app)
    assert app.backlog.events == 0

    emulator.credentials(token="example-token")
    archived = [
        json.loads(line)
        for path in sorted((tmp_path / "archive").iterdir())
        for line in gzip.decompress(path.read_bytes()).splitlines()
    ]
    url = f"http://{app.config.admin.listen}/api/replay"
    async with client.post(url, json={"events": archived}) as response:
        assert (response.status, await response.json()) == (200, {"accepted": 30, "refused": 0})

    await until(lambda: len(emulator.events()) == 30, "the delivery")
    await until(lambda: app.spool.accounts.total("delivered") == 30, "the books")
    balanced(app)
    assert {event["properties"]["$insert_id"] for event in emulator.events()} == {event["id"] for event in EVENTS}
    # Accounted under the type that it was, not as unknown.
    assert app.spool.accounts.counts["delivered"].keys() == app.spool.accounts.counts["expired"].keys()


async def test_a_replay_of_what_cannot_be_events(daemon: Daemon, client: aiohttp.ClientSession) -> None:
    """Millions of numbers would push out the dead letters of others: they are refused whole, as the door does."""
    app = await daemon()
    url = f"http://{app.config.admin.listen}/api/replay"
    async with client.post(url, json={"events": [0] * 100_000}) as response:
        assert (response.status, "split it" in await response.text()) == (413, True)
    assert app.spool.dead_letters == 0


async def test_a_replay_of_something_else_is_counted_as_refused(daemon: Daemon, client: aiohttp.ClientSession) -> None:
    """Who replays is told how much of it was no archived event."""
    app = await daemon()
    good = {"event": "Email Open", "properties": {"$insert_id": "a", "time": 1}}
    url = f"http://{app.config.admin.listen}/api/replay"
    async with client.post(url, json={"events": [good, EVENTS[0], 7]}) as response:
        assert (response.status, await response.json()) == (200, {"accepted": 1, "refused": 2})

    assert app.spool.dead_letters == 2


async def test_dropped_events_are_gone_and_counted(daemon: Daemon, emulator: MixpanelEmulator, tmp_path: Path) -> None:
    """`drop` is what the hosted connector does: nothing is kept, but the books say how much."""
    app = await _halted(daemon, emulator, retention__max_age="100ms", retention__on_expiry="drop")
    await until(lambda: app.spool.accounts.total("expired") == 30, "the expiry")

    balanced(app)
    assert not (tmp_path / "archive").exists()


@pytest.mark.parametrize("retention", [{"retention__on_expiry": "keep", "retention__max_age": "1ms"}, {}])
async def test_kept_events_wait_for_the_credential(
    daemon: Daemon, emulator: MixpanelEmulator, retention: dict[str, str]
) -> None:
    """`keep` never expires, and no policy expires what is younger than max_age; all of it is delivered in the end."""
    app = await _halted(daemon, emulator, **retention)
    probes = app.delivery.verdicts["halt"]
    await until(lambda: app.delivery.verdicts["halt"] >= probes + 3, "three probes")
    assert app.spool.accounts.total("expired") == 0

    emulator.credentials(token="example-token")

    await until(lambda: len(emulator.events()) == 30, "the delivery")
    await until(lambda: app.spool.accounts.total("delivered") == 30, "the books")
    assert app.delivery.halted is None


async def test_a_line_that_is_no_mapped_event_becomes_a_dead_letter(daemon: Daemon) -> None:
    """A file that isn't an archive costs nobody anything, and nothing of it is lost."""
    app = await daemon()
    lines = [b'{"hello":1}', b"", b"nonsense", msgspec.json.encode(EVENTS[0])]
    committed, refused = app.intake.accept_archived(lines)
    await committed

    assert refused == 3
    assert app.spool.accounts.total("dead_lettered") == 3
    balanced(app)
