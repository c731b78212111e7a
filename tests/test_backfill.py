"""`bridged backfill`: every event of the files reaches Mixpanel, once, however often the command is interrupted."""

import asyncio
import bz2
import contextlib
import gzip
import json
import lzma
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import fastavro
import msgspec
import pytest
import trustme
from conftest import SLOW, balanced, currents, free_port, heard, ndjson, until
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from bridged import cli
from bridged.app import App
from bridged.backlog.dead_letters import DeadLetters
from bridged.commands import currents_files
from bridged.commands.backfill import Progress
from bridged.commands.books import Books
from bridged.commands.client import Daemon
from bridged.commands.stream_client import StreamClient
from bridged.currents.schema import is_json
from bridged.currents.table import EVENT_TYPES, PROPERTY_TYPES
from bridged.errors import SpoolError, UpstreamError

MAX_LINE = 2**20
unhurried = effort(deadline=None, max_examples=60)  # a busy machine is no failure


@pytest.fixture
def settings(tmp_path):
    """A configuration file for the command, of what a running daemon has."""

    def make(app):
        stream = app.config.sources.stream
        at = tmp_path / "backfill.toml"
        text = f"[mixpanel]\ntoken = 'example-token'\n[admin]\nlisten = {app.config.admin.listen!r}\n"
        text += f"[sources.stream]\nlisten = {json.dumps(list(stream.listen))}\n"
        if stream.tls_cert:
            text += f"tls_cert = {stream.tls_cert!r}\ntls_key = {stream.tls_key!r}\n"
        at.write_text(text, encoding="utf-8")
        return at

    return make


@pytest.fixture
def backfill(settings, printed):
    """Runs the command in a thread: exit code, standard output, standard error."""

    async def run(app, *argv):
        words = ["backfill", "--config", str(settings(app)), *map(str, argv)]
        printed.readouterr()
        code = await asyncio.to_thread(cli.main, words)
        output = printed.readouterr()
        return code, output.out, output.err

    return run


async def start(settings, *argv):
    """Starts the command as a process of its own."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bridged", "backfill", "--config", settings, *map(str, argv)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )


def written(path, n, **changes):
    """A file of so many events, numbered by their ids."""
    path.write_bytes(ndjson([currents(id=f"{path.stem}-{i}", **changes) for i in range(n)]))
    return path


def acked(path):
    """What the file beside it says."""
    return json.loads(path.with_name(f"{path.name}.backfill").read_bytes())["acked"]


async def arrived(app, emulator, n):
    """Waits until so many events have an end; gives the ids that Mixpanel has, sorted."""
    total = app.spool.accounts.total
    await until(lambda: total("accepted") >= n and app.backlog.events == 0, f"{n} events, have {total('accepted')}", 60)
    assert total("accepted") == n
    balanced(app)
    return sorted({event["properties"]["$insert_id"] for event in emulator.events()})


# -- what a file holds -------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@unhurried
@given(events=st.lists(st.dictionaries(st.text(max_size=6), JSON, max_size=4), max_size=8), data=st.data())
def test_the_same_events_in_every_spelling(tmp_path_factory, events, data):
    """NDJSON with blank lines, a byte order mark or no last newline, a pretty array, gzip in one or more members: the same."""
    path = tmp_path_factory.mktemp("files") / "events.json"
    blank = st.sampled_from([b"", b"\n", b"  \r\n", b"\n\n"])
    body = b"".join(data.draw(blank) + msgspec.json.encode(event) + b"\n" for event in events) + data.draw(blank)
    if data.draw(st.booleans(), "no last newline"):
        body = body.rstrip()
    if data.draw(st.booleans(), "array"):
        body = json.dumps(events, indent=data.draw(st.sampled_from([None, 2]))).encode()
    body = data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"]), "mark") + body
    if data.draw(st.booleans(), "gzip"):
        cut = data.draw(st.integers(0, len(body)))
        body = gzip.compress(body[:cut]) + gzip.compress(body[cut:])
    path.write_bytes(body)

    lines = list(currents_files.lines(path, MAX_LINE))

    assert all(line.endswith(b"\n") and line.count(b"\n") == 1 for line in lines)
    assert [json.loads(line) for line in lines] == events


@unhurried
@given(
    sizes=st.lists(st.sampled_from([1, 49, 50, 51, 52, 53, 200]), min_size=1, max_size=6),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_a_line_that_is_too_long_costs_itself(tmp_path_factory, sizes, end):
    """It comes cut, but still too long for the door, which keeps it as a dead letter; its neighbours are whole."""
    path = tmp_path_factory.mktemp("files") / "events.ndjson"
    path.write_bytes("".join("x" * size + end for size in sizes).encode())

    lines = [line.strip() for line in currents_files.lines(path, 50)]

    assert [min(len(line), 51) for line in lines] == [min(size, 51) for size in sizes]


def test_damage_costs_what_is_behind_it(tmp_path):
    """Of a cut gzip file all whole lines before the cut come, then an error that names the file."""
    path = tmp_path / "events.ndjson.gz"
    body = gzip.compress(os.urandom(200_000).hex().encode().replace(b"0", b"\n"))
    path.write_bytes(body[: len(body) // 2])
    lines = []
    with pytest.raises(SpoolError, match=r"can't read .*events\.ndjson\.gz"):
        lines.extend(currents_files.lines(path, MAX_LINE))
    assert len(lines) > 1000


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_last_line_that_is_no_whole_event_waits_for_its_end(tmp_path, end):
    """Without a newline it may be cut off: it doesn't come, and the error says so. With one it is what somebody wrote."""
    path = tmp_path / "events.ndjson"
    path.write_bytes(b'{"a":1}\n{"b":' + end)
    lines = []
    if end:
        lines.extend(currents_files.lines(path, MAX_LINE))
    else:
        with pytest.raises(SpoolError, match=r"events\.ndjson ends in the middle of a line"):
            lines.extend(currents_files.lines(path, MAX_LINE))

    assert lines == [b'{"a":1}\n', b'{"b":\n'][: 1 + len(end)]


def test_what_is_no_file_of_events(tmp_path, every_pathlib):
    """Told before anything is sent: a pipe, a folder without events, a missing file; and zstd, with the way out."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    for name, words in (("pipe", "is no file"), ("empty", "holds no file of events"), ("gone", "doesn't exist")):
        with pytest.raises(SpoolError, match=words):
            currents_files.found([tmp_path / name])
    with pytest.raises(SpoolError, match="name too long"):  # as one in a folder that may not be entered
        currents_files.found([tmp_path / ("x" * 300)])
    packed = tmp_path / "events.ndjson.zst"
    packed.write_bytes(b"\x28\xb5\x2f\xfd....")
    with pytest.raises(SpoolError, match="zstd -d"):
        list(currents_files.lines(packed, MAX_LINE))
    with tempfile.NamedTemporaryFile(dir="/dev/shm", suffix=".ndjson") as in_memory:  # where the test is about it
        assert currents_files.found([Path(in_memory.name)]) == [Path(in_memory.name)]
    # As /dev/stdin can be, when it is a file without a name: beside it nothing may be written.
    (tmp_path / "link.ndjson").symlink_to("/proc/version")
    with pytest.raises(SpoolError, match="has no place of its own"):
        currents_files.found([tmp_path / "link.ndjson"])


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    "bad",
    [
        b'{"a":\n NaN}',
        b'{"a":"cut \\ud83d"}',
        b'{"a":"a\ttab"}',
        b'{"a":"two\r\nlines"}',
        b"[" * 200_000 + b"]" * 200_000,  # 3.14 takes as many as the stack has room for
    ],
)
def test_an_element_that_no_parser_takes_costs_only_itself(tmp_path, bad, indent):
    """Of an array, too: nothing of the whole file was sent. It comes on one line, is a dead letter as at the HTTP door, and no
    other event than it was: a line break within a text isn't mended by the way.
    """
    good = json.dumps([{"n": 1}], indent=indent).encode()[1:-1]
    path = tmp_path / "events.json"
    path.write_bytes(b"\xef\xbb\xbf [%s,\r\n%s , %s,]\n" % (good, bad, good))
    first, costly, last = currents_files.lines(path, MAX_LINE)
    assert first == last == b'{"n":1}\n'
    assert costly.split() == bad.split()
    assert costly.count(b"\n") == 1
    assert not is_json(costly)
    path.write_bytes(b"[%s,%s" % (good, bad))
    with pytest.raises(SpoolError, match="begins as a JSON array and isn't one"):
        list(currents_files.lines(path, MAX_LINE))


def test_what_is_no_text_makes_no_dead_letters(tmp_path):
    """Packed otherwise, or in another encoding: its pieces between accidental newlines were hundreds of dead letters."""
    text = b"".join(json.dumps(currents(id=os.urandom(8).hex())).encode() + b"\n" for _ in range(500))
    for name, body in {
        "utf16.json": text.decode().encode("utf-16"),
        "x.zip": b"PK\x03\x04\x14\0\0\0\x08\0" + os.urandom(9000),
        "x.bz2": bz2.compress(text),
        "x.xz": lzma.compress(text),
        "x.tar.gz": gzip.compress(b"x.ndjson".ljust(512, b"\0") + text),
    }.items():
        (tmp_path / name).write_bytes(body)
        with pytest.raises(SpoolError, match="is no text") as caught:
            list(currents_files.lines(tmp_path / name, MAX_LINE))
        assert "unpack it first" in caught.value.hint
    rotated = tmp_path / "rotated.ndjson"
    rotated.write_bytes(b"\0" * 5000 + b"\n" + text)
    assert len(list(currents_files.lines(rotated, MAX_LINE))) == 501


@pytest.mark.parametrize("mode", [0, 0o400, 0o600])
def test_a_closed_folder_within_is_not_passed_over(tmp_path, every_pathlib, an_ordinary_user, mode):
    """Nobody would miss its events: nothing is sent before somebody has opened it, or left it out."""
    with tempfile.TemporaryDirectory() as export:
        for hour in ("01", "02"):
            folder = Path(export, hour)
            folder.mkdir()
            written(folder / "events.ndjson", 1)
        folder.chmod(mode)
        with pytest.raises(SpoolError, match=f"can't read {export}: .*Permission denied.*{folder}"):
            currents_files.found([Path(export)])
        folder.chmod(0o700)
        assert len(currents_files.found([Path(export)])) == 2


# -- into a daemon -----------------------------------------------------------------------------------------------------


async def test_files_arrive_and_are_not_sent_again(backfill, daemon, emulator, tmp_path):
    """A file, a folder, a bad line: all counted and acked; a second call passes over what was sent, and sends what was added."""
    app = await daemon()
    one = written(tmp_path / "one.ndjson", 1200)
    folder = tmp_path / "day" / "hour"
    folder.mkdir(parents=True)
    (folder / "two.json.gz").write_bytes(gzip.compress(json.dumps([currents(id="two-0"), {"no": "event"}]).encode()))

    with one.open("ab") as file:
        file.write(b'{"time": 1, "event_type": "' + b"x" * (MAX_LINE + 100) + b'"}\n')

    code, out, _ = await backfill(app, one, tmp_path / "day")

    assert code == 0
    assert "2 files: 1,203 events read, 1,203 acked, 0 not" in out
    assert "2 are no Currents events" in out
    assert len(await arrived(app, emulator, 1203)) == 1201
    assert app.spool.accounts.total("dead_lettered") == 2

    with one.open("ab") as file:
        file.write(ndjson([currents(id="one-more")]))
    code, out, _ = await backfill(app, one, tmp_path / "day")

    assert code == 0
    assert "1 file: 1 events read, 1 acked, 0 not" in out
    assert "1 more had been sent whole" in out
    assert "1,203 events had been acked before" in out
    assert "one-more" in await arrived(app, emulator, 1204)


async def test_what_became_of_the_events_is_told(backfill, daemon, client, tmp_path):
    """All were acked, and nothing said that all were refused or skipped: what the books have more than before is told, with the
    reasons and what to do. What was there before isn't.
    """
    app = await daemon(events__exclude='["users.canvas.Entry"]')
    wrong = currents("users.behaviors.Purchase", properties={"price": "9.99"})
    skipped = [currents("users.canvas.Entry"), *[currents(user={}) for _ in range(3)]]
    url = f"http://{app.config.sources.http.listen}/v1/currents"
    async with client.post(url, json={"events": [wrong, {"no": "event"}, *skipped]}) as answer:
        assert answer.status == 200
    path = tmp_path / "events.ndjson"
    unknown = currents() | {"event_type": "users.messages.fax.Send"}
    path.write_bytes(ndjson([currents(), *[wrong] * 5, *[unknown] * 2, *skipped]))

    code, out, _ = await backfill(app, path)

    assert (code, "12 events read, 12 acked, 0 not" in out) == (0, True)
    assert "  meanwhile, in the daemon's books: 7 more dead letters, 4 more skipped" in out
    assert "    5  dead letters: users.behaviors.Purchase: ill-typed: Expected `float | null`" in out
    assert "    2  dead letters: users.messages.fax.Send: unknown event type\n" in out
    assert "    3  skipped: no external_user_id\n" in out
    assert "    1  skipped: not selected\n" in out
    assert "no event_type" not in out
    assert "see `bridged dead-letters list`" in out

    code, out, _ = await backfill(app, written(tmp_path / "good.ndjson", 3))

    assert (code, "3 acked, 0 not" in out, "meanwhile" in out) == (0, True, False)

    path = tmp_path / "many.ndjson"
    path.write_bytes(ndjson([wrong | {"event_type": f"users.messages.fax{n}.Send"} for n in range(12)] + skipped))
    code, out, _ = await backfill(app, path)

    assert "    3  skipped: no external_user_id\n" in out
    assert out.count("unknown event type") + out.count("skipped: ") == 10
    assert "    and 4 more reasons\n" in out


@pytest.mark.parametrize(
    "asked", ["nobody", "no address", "without its token", "another daemon", "a daemon that isn't the door's"]
)
async def test_only_the_books_of_who_acked_are_told(backfill, config, daemon, tmp_path, monkeypatch, asked):
    """Where they can't be asked, or are another daemon's, nothing is said of dead letters: it could be false."""
    app = await daemon(admin__token="secret" if asked == "without its token" else "")
    another = {
        "spool__path": str(tmp_path / "another.db"),
        "sources__stream__listen": f'["tcp:127.0.0.1:{free_port()}"]',
    }
    other = await daemon(**another)
    path = tmp_path / "events.ndjson"
    path.write_bytes(ndjson([{"no": "event"}] * 3))
    listen = {"nobody": f"127.0.0.1:{free_port()}", "no address": "", "another daemon": other.config.admin.listen}
    if asked in listen or asked == "without its token":
        monkeypatch.setenv("BRIDGED__ADMIN__LISTEN", listen.get(asked, app.config.admin.listen))
        code, out, err = await backfill(app, path)
    else:
        code, out, err = await backfill(other, "--to", app.config.sources.stream.listen[0], path)

    assert (code, err) == (0, "")
    assert "3 acked, 0 not" in out
    assert "3 are no Currents events" in out
    assert "meanwhile" not in out


async def test_books_that_are_changed_by_somebody_else(daemon, client):
    """A replay meanwhile touches old letters, a purge takes the new ones out: the number is told, and reasons that aren't of these
    aren't.
    """
    app = await daemon()
    url = f"http://{app.config.sources.http.listen}/v1/currents"
    asked = Daemon.admin(app.config)

    async def refused(*events):
        async with client.post(url, json={"events": events}) as answer:
            assert answer.status == 200

    async def meanwhile(change):
        books = await asyncio.to_thread(Books, asked)
        await change
        return await asyncio.to_thread(lambda: list(books.meanwhile(1)))

    async def touched():
        async with client.post(f"http://{app.config.admin.listen}/api/dead-letters/replay", json={"all": True}):
            pass
        await refused({"b": 1})

    async def purged():
        await refused({"c": 1})
        async with client.post(f"http://{app.config.admin.listen}/api/dead-letters/purge", json={"all": True}):
            pass

    await refused({"a": 1}, {"a": 2})
    assert any("1  dead letters: (undecodable): no event_type" in line for line in await meanwhile(refused({"a": 3})))
    for change in (touched(), purged()):
        said = await meanwhile(change)
        assert "1 more dead letter (" in said[0]
        assert "no event_type" not in "".join(said)
    assert await meanwhile(asyncio.sleep(0)) == []


async def test_old_events_are_warned_of(backfill, daemon, emulator, tmp_path):
    """Mixpanel takes them and hides what is older than the project's retention; those ahead are dead letters."""
    app = await daemon()
    now, year = int(time.time()), 365 * 86_400
    events = [currents(id=f"e{i}", time=now - age) for i, age in enumerate((60, 3 * year, 6 * year, -7200))]
    path = tmp_path / "old.ndjson"
    path.write_bytes(ndjson(events))

    code, out, err = await backfill(app, path)

    assert code == 0
    assert "older than two years" in err
    assert "2 are older than two years, 1 of them than five" in out
    assert "1 are more than an hour ahead" in out
    assert len(await arrived(app, emulator, 4)) == 3


async def test_a_time_written_as_a_float_is_an_event(backfill, daemon, emulator, tmp_path):
    """The daemon takes it as a whole number: the summary said that all of them are no Currents events."""
    app = await daemon()
    path = tmp_path / "doubles.ndjson"
    path.write_bytes(ndjson([currents(id=f"e{i}", time=float(int(time.time()) - 60)) for i in range(3)]))

    code, out, _ = await backfill(app, path)

    assert (code, "no Currents events" in out) == (0, False)
    assert len(await arrived(app, emulator, 3)) == 3


async def test_no_faster_than_asked(backfill, daemon, emulator, tmp_path):
    """So many events take so long, and all arrive."""
    app = await daemon()
    path = written(tmp_path / "slow.ndjson", 300)
    began = time.monotonic()
    assert (await backfill(app, "--events-per-second", "200", path))[0] == 0
    # The last chunk of twenty doesn't wait for itself.
    assert time.monotonic() - began >= (300 - 20) / 200 - 0.1
    assert len(await arrived(app, emulator, 300)) == 300


@pytest.mark.parametrize("kind", ["unix", "tls"])
async def test_other_ways_to_the_door(backfill, daemon, emulator, tmp_path, kind):
    """Over the Unix socket, and over TLS with the certificate that the configuration names."""
    changes = {}
    if kind == "tls":
        certificate = trustme.CA().issue_cert("localhost")
        certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
        for blob in certificate.cert_chain_pems:
            blob.write_to_path(str(tmp_path / "cert.pem"), append=True)
        changes = {
            "sources__stream__tls_cert": f"{tmp_path}/cert.pem",
            "sources__stream__tls_key": f"{tmp_path}/key.pem",
        }
    app = await daemon(**changes)
    path = written(tmp_path / "events.ndjson", 12_000)
    to = ["--to", f"unix:{tmp_path}/s.sock"] if kind == "unix" else []

    code, out, err = await backfill(app, *to, path)

    assert code == 0, err
    assert "12,000 acked" in out
    assert len(await arrived(app, emulator, 12_000)) == 12_000


# -- interruptions -----------------------------------------------------------------------------------------------------


async def test_kill_in_the_middle_and_go_on(backfill, settings, daemon, emulator, tmp_path):
    """Two times `kill -9`: no line is lost, and none that was acked is sent again, so what comes twice is what had no ack."""
    app = await daemon()
    total, path, sent = 6000, written(tmp_path / "events.ndjson", 6000), 0
    for stop_at in (1000, 3000):
        process = await start(settings(app), "--events-per-second", "4000", path)
        state = path.with_name("events.ndjson.backfill")
        await until(lambda: state.exists() and state.stat().st_size and acked(path) >= stop_at, "acks", 60)  # noqa: B023
        process.kill()
        await process.communicate()
        await until(lambda: not app.stream.connections, "the end of the connection")
        # All that the daemon took is in its books when it has closed the connection and committed.
        await app.spool.run(lambda _db: None)
        known = acked(path)
        twice = app.spool.accounts.total("accepted") - sent - known
        assert stop_at <= known <= total
        assert 0 <= twice <= 10_500
        sent += twice

    code, out, _ = await backfill(app, path)

    assert code == 0
    assert f"{total - known:,} acked, 0 not" in out
    assert acked(path) == total
    assert len(await arrived(app, emulator, total + sent)) == total


async def test_ctrl_c_waits_for_the_last_acks(backfill, settings, daemon, emulator, tmp_path):
    """Then not one line is sent twice."""
    app = await daemon()
    path = written(tmp_path / "events.ndjson", 4000)
    process = await start(settings(app), "--events-per-second", "2000", path)
    state = path.with_name("events.ndjson.backfill")
    await until(lambda: state.exists() and state.stat().st_size and acked(path) >= 500, "acks", 60)
    process.send_signal(signal.SIGINT)
    output, _ = await process.communicate()

    assert process.returncode == 130, output
    assert b"interrupted" in output
    assert acked(path) < 4000
    assert (await backfill(app, path))[0] == 0
    assert len(await arrived(app, emulator, 4000)) == 4000


async def test_the_daemon_restarts_meanwhile(backfill, config, emulator, tmp_path):
    """The command waits for the daemon to come back, and sends again only what had no ack."""
    path, total = written(tmp_path / "events.ndjson", 6000), 6000
    same = config()
    async with App(same) as app:
        running = asyncio.create_task(backfill(app, "--events-per-second", "3000", path))
        await until(lambda: app.spool.accounts.total("accepted") >= 1500, "the first events", 60)
    async with App(same) as app:
        code, out, err = await asyncio.wait_for(running, 60 * SLOW)
        assert code == 0, err
        assert "6,000 events read, 6,000 acked, 0 not" in out
        await until(lambda: app.backlog.events == 0, "delivery", 60)
        balanced(app)
        # An orderly end sends the last acks, so nothing is doubled but what was between the sockets.
        assert total <= app.spool.accounts.total("accepted") <= total + 500
        assert len({event["properties"]["$insert_id"] for event in emulator.events()}) == total


async def test_a_file_that_was_cut_off_goes_on_where_it_ended(backfill, daemon, emulator, tmp_path):
    """Half an event at its end is neither sent nor counted: when the file is whole, it is an event like the others."""
    app = await daemon()
    path = written(tmp_path / "events.ndjson", 20)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])

    code, out, err = await backfill(app, path)

    assert (code, "ends in the middle of a line" in err) == (74, True)
    assert "1 file: 19 events read, 19 acked, 0 not" in out
    path.write_bytes(whole)
    code, out, err = await backfill(app, path)
    assert code == 0, err
    assert "1 file: 1 events read, 1 acked, 0 not" in out
    assert len(await arrived(app, emulator, 20)) == 20
    assert app.spool.accounts.total("dead_lettered") == 0


async def test_damaged_files_do_not_stop_the_others(backfill, daemon, emulator, tmp_path):
    """All others are sent, and at the end every bad one is named with what is wrong with it, and the exit code is 74."""
    app = await daemon()
    for n in range(5):
        body = gzip.compress(ndjson([currents(id=f"f{n}-{i}") for i in range(3000 if n == 1 else 50)]))
        (tmp_path / f"f{n}.json.gz").write_bytes(body)
    whole = (tmp_path / "f1.json.gz").read_bytes()
    (tmp_path / "f1.json.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "f2.json.gz.backfill").write_bytes(b"mine")

    code, out, err = await backfill(app, tmp_path)

    readable = acked(tmp_path / "f1.json.gz")
    assert code == 74
    assert "2 files weren't sent to their ends" in err
    assert f"can't read {tmp_path}/f1.json.gz" in err
    assert f"rm {tmp_path}/f2.json.gz.backfill" in err
    assert 0 < readable < 3000
    assert f"{150 + readable:,} events read, {150 + readable:,} acked, 0 not" in out
    (tmp_path / "f1.json.gz").write_bytes(whole)
    (tmp_path / "f2.json.gz.backfill").unlink()
    code, out, err = await backfill(app, tmp_path)
    assert code == 0, err
    assert "3 more had been sent whole" in out
    assert len(await arrived(app, emulator, 3200)) == 3200


async def test_a_damaged_file_goes_on_when_it_is_mended(backfill, daemon, emulator, tmp_path):
    """What stood before the damage is acked, the exit code is 74, and a mended file goes on there."""
    app = await daemon()
    whole = gzip.compress(ndjson([currents(id=f"e{i}") for i in range(3000)]))
    path = tmp_path / "events.ndjson.gz"
    path.write_bytes(whole[: len(whole) // 2])

    code, out, err = await backfill(app, path)

    assert code == 74
    assert "can't read" in err
    readable = []
    with pytest.raises(SpoolError):
        readable.extend(currents_files.lines(path, MAX_LINE))
    assert 0 < len(readable) == acked(path) < 3000
    assert f"{len(readable):,} acked, 0 not" in out
    path.write_bytes(whole)
    assert (await backfill(app, path))[0] == 0
    assert len(await arrived(app, emulator, 3000)) == 3000

    written(path, 3)
    code, _, err = await backfill(app, path)
    assert code == 74
    assert "isn't the file" in err
    assert "rm " in err


async def test_refusals_name_the_way_out(backfill, daemon, tmp_path, monkeypatch):
    """No daemon, no place for the state, two at once, no fastavro: an exit code and a hint each."""
    app = await daemon()
    path = written(tmp_path / "events.ndjson", 2)

    code, _, err = await backfill(app, "--to", "unix:/nowhere.sock", path)
    assert (code, "is the daemon running?" in err) == (69, True)
    for to in ("tcp:8482", "tcp:localhost", "tcp:127.0.0.1:99999"):
        code, _, err = await backfill(app, "--to", to, path)
        assert code == 78
        assert f"--to '{to}' is no address" in err
        assert "hint: tcp:HOST:PORT" in err
    code, _, err = await backfill(app, "--to", "udp:1", path)
    assert (code, "is no address" in err) == (78, True)
    with monkeypatch.context() as patch:
        patch.setenv("BRIDGED__MIXPANEL__EXPORT", "false")
        patch.setenv("BRIDGED__COHORTS__ENABLED", "true")
        patch.setenv("BRIDGED__BRAZE__CLUSTER", "EU-01")
        code, _, err = await backfill(app, path)
    assert (code, "mixpanel.export is false" in err) == (78, True)
    code, _, err = await backfill(app, "--state", "/proc/nowhere", path)
    assert (code, "--state" in err) == (74, True)
    with Progress(path, None):
        code, _, err = await backfill(app, path)
    assert (code, "another `bridged backfill`" in err) == (74, True)
    state = path.with_name("events.ndjson.backfill")
    state.write_bytes(b"mine")
    code, _, err = await backfill(app, path)
    assert (code, "isn't what bridged wrote" in err) == (74, True)
    (tmp_path / "events.avro").write_bytes(b"Obj\x01")
    monkeypatch.setitem(sys.modules, "fastavro", None)
    code, _, err = await backfill(app, tmp_path / "events.avro")
    assert (code, "pip install fastavro" in err) == (78, True)


def test_the_state_stands_beside_the_file_itself(tmp_path):
    """Not beside a link to it, such as /dev/stdin; so it is one, by whichever name the file is called."""
    for folder in ("data", "links"):
        (tmp_path / folder).mkdir()
    path, link = written(tmp_path / "data" / "events.ndjson", 1), tmp_path / "links" / "stdin"
    link.symlink_to(path)
    for state in (None, tmp_path / "state"):
        for name in (path, link):
            with Progress(name, state) as progress:
                assert progress.state.acked == (name == link)
                progress.add(1)

    assert [name.name for name in (tmp_path / "links").iterdir()] == ["stdin"]
    assert sorted(name.name for name in path.parent.iterdir()) == ["events.ndjson", "events.ndjson.backfill"]
    assert len(list((tmp_path / "state").iterdir())) == 1


def test_the_state_can_be_elsewhere(tmp_path):
    """For folders that can't be written: files of one name in two folders don't share it."""
    for hour in ("01", "02"):
        (tmp_path / hour).mkdir()
        written(tmp_path / hour / "events.ndjson", 1)
        with Progress(tmp_path / hour / "events.ndjson", tmp_path / "state") as progress:
            assert progress.state.acked == 0
            progress.add(int(hour))
    assert len(list((tmp_path / "state").iterdir())) == 2
    assert [path.name for path in (tmp_path / "01").iterdir()] == ["events.ndjson"]
    with Progress(tmp_path / "02" / "events.ndjson", tmp_path / "state") as progress:
        assert progress.state.acked == 2


# -- a door that isn't one ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b'{"error":"the daemon stops"}\n', "the daemon stops"),
        (b'{"acked":99}\n', "acks lines that it wasn't sent"),
        (b"HTTP/1.1 400 Bad Request\n", "isn't bridged's stream door"),
        (b"", "closed the connection"),
    ],
)
def test_a_door_that_takes_nothing(answer, words):
    """The client gives up after its patience, says why, and nobody was told of an ack."""
    told = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(1000)
                        connection.sendall(answer)
                        connection.shutdown(socket.SHUT_WR)
                        while connection.recv(1000):
                            pass

        threading.Thread(target=serve, daemon=True).start()
        client = StreamClient(
            lambda: socket.create_connection(server.getsockname()[:2]), told.append, lambda: None, patience_s=0.3
        )
        client_sends = lambda: (client.send([b"{}\n"]), client.drain())  # noqa: E731  # whichever notices
        with pytest.raises(UpstreamError, match=words):
            client_sends()
        assert (told, client.unacked) == ([], 1)
        client.close()
        server.shutdown(socket.SHUT_RDWR)


def test_another_door_is_told_at_once():
    """The HTTP door's port, by a slip: there is nothing to wait for, and nothing that would be better another time."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                connection.recv(1000)
                connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        client = StreamClient(
            lambda: socket.create_connection(server.getsockname()[:2]), lambda _: None, lambda: None, patience_s=3600
        )
        with pytest.raises(UpstreamError, match="isn't bridged's stream door") as told:
            client.drain(client.send([b"{}\n"]))
        assert "sources.stream" in told.value.hint
        client.close()


def test_a_door_that_says_nothing_is_told(tmp_path):
    """A full daemon reads no more and says nothing: the same line again and again looked like a command that hangs."""
    file = tmp_path / "events.ndjson"
    file.write_bytes(ndjson([currents()]))
    impatient = (
        "import sys\nfrom bridged import cli\nfrom bridged.commands import backfill\n"
        "backfill._SPEAK_S = backfill._SILENT_S = 0.01\nsys.exit(cli.main(sys.argv[1:]))"
    )
    with socket.create_server(("127.0.0.1", 0)) as deaf, heard(signal.SIGINT):
        process = subprocess.Popen(
            [sys.executable, "-c", impatient, "backfill", file, "--to", f"tcp:127.0.0.1:{deaf.getsockname()[1]}"],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            said = next(line for line in process.stderr if "no ack for" in line)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)

    assert said.startswith("events.ndjson: 0 events acked, 1 on their way")
    assert said.endswith(" s: `bridged status` may say why\n")
    assert process.returncode == 130


# -- Avro --------------------------------------------------------------------------------------------------------------


def flat(event):
    """An event as Currents' export to cloud storage holds it: its own inverse of what the command does."""
    record = {"id": event["id"], "time": event["time"], **event["user"], **event["properties"]}
    for name in ("custom_properties", "purchase_properties"):
        if name in record:
            record["properties"] = json.dumps(record.pop(name))
    if "banner" in event["event_type"] and "canvas_step_message_variation_api_id" in record:
        record["canvas_step_message_variation_id"] = record.pop("canvas_step_message_variation_api_id")
    return record


def avro(path, event_type, records, name, codec="null"):
    """Writes an export's file. All but four fields may be null, and some are that no record fills."""
    kinds = {"string": "string", "boolean": "boolean", "int": "int", "float": "float"}
    types = {name: kinds.get(kind, {"type": "array", "items": "string"}) for name, kind in PROPERTY_TYPES.items()}
    types |= {"time_ms": "long", "push_token_created_at": "long", "push_token_updated_at": "long"}
    names = sorted({key for record in records for key in record} | {"a_field_of_next_year"})
    fields = [
        {"name": key, "type": "int" if key == "time" else "string"}
        if key in ("id", "time")
        else {"name": key, "type": ["null", types.get(key, "string")], "default": None}
        for key in names
    ]
    schema = {"type": "record", "name": name, "fields": fields}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        fastavro.writer(file, fastavro.parse_schema(schema), records, codec=codec)


async def mapped_over_http(app, emulator, client, events):
    """What Mixpanel gets of events that come through the other door: names and properties, sorted."""
    url = f"http://{app.config.sources.http.listen}/v1/currents"
    async with client.post(url, json={"events": events}) as answer:
        assert answer.status == 200
    await arrived(app, emulator, len(events))
    return sorted((event["event"], event["properties"]) for event in emulator.events())


async def test_an_export_arrives_as_the_connector_would_have_sent_it(backfill, daemon, emulator, client, tmp_path):
    """Every event type, in Avro and over HTTP: Mixpanel gets the same events, to the last property."""
    app = await daemon()
    events = [currents(row.event_type, seed) for seed, row in enumerate(EVENT_TYPES)]
    over_http = await mapped_over_http(app, emulator, client, events)
    assert len(over_http) == len(events)
    emulator.clear()
    export = tmp_path / "currents" / "dataexport.prod-01.S3.integration.1a2b"
    for n, event in enumerate(events):
        folder = export / f"event_type={event['event_type']}" / "date=2026-10-01-12" / "version=6" / "us-01"
        name = f"dataexport.prod_01.inner.{event['event_type']}" if n % 2 else "whatever"
        avro(folder / "x+0+1.avro", event["event_type"], [flat(event)], name, "deflate" if n % 3 else "null")
    orphan = {"id": "o", "time": 1, "user_id": "u", "orphaned_by_id": "v"}
    avro(export / "event_type=users.UserOrphan" / "x.avro", "users.UserOrphan", [orphan], "whatever")
    for packed in list(export.rglob("x+0+1.avro"))[::4]:  # by whoever copied the export
        packed.with_name("x+0+1.avro.gz").write_bytes(gzip.compress(packed.read_bytes()))
        packed.unlink()

    code, out, err = await backfill(app, "--state", tmp_path / "state", tmp_path / "currents")

    assert code == 0, err
    assert out.startswith(f"{len(events)} files: ")
    assert "  1 file of types without a Mixpanel form passed over: users.UserOrphan\n" in out
    assert f"{len(events)} acked, 0 not" in out
    await arrived(app, emulator, 2 * len(events))
    from_avro = sorted((event["event"], event["properties"]) for event in emulator.events())
    assert [name for name, _ in from_avro] == [name for name, _ in over_http]
    for ours, theirs in zip(from_avro, over_http, strict=True):
        assert ours == theirs


@pytest.mark.parametrize("how", ["include", "unknown", "on the page", "by the file"])
async def test_a_type_without_a_form_that_is_forwarded_is_sent(
    backfill, daemon, client, emulator, tmp_path, monkeypatch, how
):
    """Whole files of it were left out without a word, and were done for good. What the daemon forwards counts, if it can be asked;
    what was passed over before is sent then.
    """
    kind = "users.profile.Update"
    record = {"id": "a", "time": int(time.time()), "external_user_id": "ada", "update_source": "x"}
    path = tmp_path / f"event_type={kind}" / "x.avro"
    avro(path, kind, [record], "whatever")
    given = {"include": {"events__include": f'["{kind}"]'}, "unknown": {"events__unknown": "forward"}}
    app = await daemon(**given.get(how, {"events__include": f'["{kind}"]'} if how == "by the file" else {}))
    if how == "on the page":
        _, out, _ = await backfill(app, path)
        assert "0 files: 0 events" in out
        assert "1 file of types without a Mixpanel form passed over: users.profile.Update" in out
        url = f"http://{app.config.admin.listen}/api/settings"
        async with client.put(url, json={"set": {"events.include": [kind]}}) as answer:
            assert answer.status == 200
    elif how == "by the file":
        monkeypatch.setenv("BRIDGED__ADMIN__LISTEN", "")
        monkeypatch.setenv("BRIDGED__EVENTS__INCLUDE", f'["{kind}"]')

    _, out, err = await backfill(app, path)

    assert "1 file: 1 events read, 1 acked" in out, err
    assert "passed over" not in out
    await arrived(app, emulator, 1)
    [event] = emulator.events()
    assert event["event"] == "Profile Update"


async def test_a_type_without_a_form_that_is_excluded_is_not_sent(backfill, daemon, tmp_path):
    """Although all others that nobody knows are."""
    kind = "users.profile.Update"
    avro(tmp_path / f"event_type={kind}" / "x.avro", kind, [{"id": "a", "time": 1}], "whatever")
    app = await daemon(events__unknown="forward", events__exclude=f'["{kind}"]')
    _, out, _ = await backfill(app, tmp_path)
    assert "1 file of types without a Mixpanel form passed over: users.profile.Update" in out


@pytest.mark.parametrize("form", ["lines", "array"])
async def test_flat_records_as_json_are_the_same_events(backfill, daemon, emulator, client, tmp_path, form):
    """As somebody makes JSON of an export: all of them were skipped for want of an external_user_id, which they have."""
    app = await daemon()
    events = [currents(row.event_type, seed) for seed, row in enumerate(EVENT_TYPES)]
    over_http = await mapped_over_http(app, emulator, client, events)
    emulator.clear()
    records = [{"event_type": event["event_type"], "a_field_of_next_year": None} | flat(event) for event in events]
    path = tmp_path / "events.json"
    path.write_bytes(json.dumps(records, indent=2).encode() if form == "array" else ndjson(records))

    code, out, err = await backfill(app, path)

    assert (code, f"{len(events)} acked, 0 not" in out) == (0, True), err
    await arrived(app, emulator, 2 * len(events))
    assert sorted((event["event"], event["properties"]) for event in emulator.events()) == over_http


@pytest.mark.parametrize(
    "line",
    [
        b'{"event_type":"users.canvas.Entry","time":1,"user" : {"external_user_id":"ada"},"user_id":"b"}\n',
        b'{"event_type":"users.canvas.Entry","time":1,"external_user_id":"ada","properties":{"canvas_id":"c"}}\n',
        b'{"event_type":"users.canvas.Entry","time":1,"properties":{"canvas_id":"c"}}\n',
        b'{"event_type":"users.canvas.Entry","time":1,"canvas_id":"c"}\n',
        b'{"time":1,"external_user_id":"ada"}\n',
        b'{"event_type":"users.canvas.Entry","external_user_id":"ada","time":1e999}\n',
        b'[{"event_type":1}, 2]\n',
        b"no JSON\n",
    ],
)
def test_what_is_no_flat_record_comes_as_it_is(tmp_path, line):
    """An event as the connector sends it, however little is in it, and what the daemon says of as a dead letter."""
    path = tmp_path / "events.ndjson"
    path.write_bytes(ndjson([currents()]) + line)
    assert list(currents_files.lines(path, MAX_LINE))[1] == line


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ('{"a":"cut \\ud83d"}', "half of a surrogate pair"),
        ('{\r\n "a": 1e999\n}', "out of range"),
        ('{"a":NaN}', "malformed"),
        ('{"a":1}, "b":{}', "custom_properties"),
        ("no JSON at all", "custom_properties"),
    ],
)
async def test_customer_made_properties_that_no_parser_takes_say_what_is_wrong(
    backfill, daemon, emulator, tmp_path, own, reason
):
    """They are a text in the export: the dead letter names the place in it, as at the door, and not that it is a text. One
    that is no object at all stays what it is, and costs its own event only.
    """
    app = await daemon()
    custom = "users.behaviors.CustomEvent"
    good, bad = flat(currents(custom, 1)), flat(currents(custom, 2)) | {"properties": own}
    avro(tmp_path / f"event_type={custom}" / "x.avro", custom, [bad, good], "whatever")
    code, out, err = await backfill(app, "--state", tmp_path / "state", tmp_path)
    assert (code, "2 acked, 0 not" in out) == (0, True), err
    assert await arrived(app, emulator, 2) == [good["id"]]
    [group] = await DeadLetters(app.spool, app.intake.replay).groups()
    assert reason in group.reason


def test_an_avro_file_that_is_damaged_or_nameless(tmp_path):
    """The records before the damage come; a file that doesn't say its type is told as such."""
    path = tmp_path / "event_type=users.messages.email.Open" / "x.avro"
    records = [flat(currents(id=f"e{i}")) for i in range(5000)]
    avro(path, "users.messages.email.Open", records, "whatever")
    path.write_bytes(path.read_bytes()[:-1000])
    lines = []
    with pytest.raises(SpoolError, match="as Avro"):
        lines.extend(currents_files.lines(path, MAX_LINE))
    assert 0 < len(lines) < 5000
    avro(tmp_path / "x.avro", "users.messages.email.Open", records[:1], "whatever")
    with pytest.raises(SpoolError, match="doesn't say of which event type"):
        list(currents_files.lines(tmp_path / "x.avro", MAX_LINE))


async def test_an_archive_is_for_the_other_command(backfill, daemon, tmp_path):
    """A folder of archived events, which are mapped already, was thousands of dead letters: it is told, and left alone."""
    app = await daemon()
    (tmp_path / "archive").mkdir()
    line = b'{"event":"Email Open","properties":{"distinct_id":"a","$insert_id":"b","time":1,"ip":0}}\n'
    (tmp_path / "archive" / "20260301T000000Z-0000000001-2.ndjson.gz").write_bytes(gzip.compress(line * 2))

    code, _, err = await backfill(app, tmp_path / "archive")

    assert code == 74
    assert "holds events as Mixpanel gets them" in err
    assert "bridged replay" in err
    assert app.spool.accounts.total("accepted") == 0


async def test_an_export_of_dead_letters_is_for_another_command(backfill, daemon, client, tmp_path):
    """Each of its lines became a dead letter anew: it is told, and left alone. What is said to type makes a file of its events."""
    app = await daemon()
    wrong = currents("users.behaviors.Purchase", id="p", properties={"price": "9.99"})
    url = f"http://{app.config.sources.http.listen}/v1/currents"
    async with client.post(url, json={"events": [wrong, "no event"]}) as answer:
        assert answer.status == 200
    path = tmp_path / "letters.ndjson"
    async with client.get(f"http://{app.config.admin.listen}/api/dead-letters/export") as answer:
        path.write_bytes(await answer.read())

    code, _, err = await backfill(app, path)

    assert code == 74
    assert "is an export of dead letters: nothing of it was sent" in err
    assert "bridged dead-letters replay tries those again" in err
    assert app.spool.accounts.total("accepted") == 2
    if shutil.which("jq"):
        command = err.partition("its door refused: ")[2].strip()
        await asyncio.to_thread(subprocess.run, command, shell=True, cwd=tmp_path, check=True)
        [line] = currents_files.lines(tmp_path / "events.ndjson", MAX_LINE)
        assert json.loads(line) == wrong


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b"\n \r\n"])
def test_events_spread_over_lines_are_told(tmp_path, before):
    """As jq writes them, and so does whoever saves a request body to look at it: each line was a dead letter of its own."""
    path = tmp_path / "events.json"
    for text in (json.dumps(currents(), indent=2), json.dumps({"events": [currents()]}, indent=4)):
        path.write_bytes(before + text.replace("\n", "\r\n").encode())
        with pytest.raises(SpoolError, match="spread over several lines") as caught:
            list(currents_files.lines(path, MAX_LINE))
        assert "jq -c" in caught.value.hint
    path.write_bytes(before + json.dumps(currents()).encode() + b"\n{\n")
    assert len(list(currents_files.lines(path, MAX_LINE))) == 2


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("count", [2, 2000])
@pytest.mark.parametrize("form", ["bodies", "a body", "strung together"])
def test_files_of_other_shapes_are_told(tmp_path, form, count, packed):
    """Each line of them was a dead letter, and of a long one only its beginning was kept. What is said to type makes them good."""
    events = [json.dumps(currents(seed=seed)) for seed in range(count)]
    body = f'{{"events": [{", ".join(events)}]}}'
    text = {"bodies": f"{body}\n{body}\n", "a body": body, "strung together": "".join(events)}[form].encode()
    path = tmp_path / f"events of today.json{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(text) if packed else text)
    with pytest.raises(SpoolError, match="nothing of it was sent") as caught:
        list(currents_files.lines(path, MAX_LINE))
    if shutil.which("jq"):
        subprocess.run(caught.value.hint.partition(": ")[2], shell=True, cwd=tmp_path, check=True)
        lines = list(currents_files.lines(tmp_path / "events.ndjson", MAX_LINE))
        assert len(lines) == count * (2 if form == "bodies" else 1)


@pytest.mark.parametrize("first", [b'{"a":1}}\n', b'{"a":1},{"b":2}\n', b'1{"a":1}\n', b'"{"{\n'])
def test_one_bad_line_at_the_beginning_stops_no_file(tmp_path, first):
    """As of a log that was cut: it costs only itself."""
    path = tmp_path / "events.ndjson"
    path.write_bytes(first + ndjson([currents()]))
    assert len(list(currents_files.lines(path, MAX_LINE))) == 2


@pytest.mark.parametrize("codec", ["snappy", "zstandard", "lz4"])
def test_a_codec_that_needs_a_library_names_it(tmp_path, codec):
    """It said that what stood before the damage was sent, of a file that is whole, and not what to install."""
    path = tmp_path / "x.avro"
    name = "dataexport.S3.inner.users.messages.email.Open"
    try:
        avro(path, "users.messages.email.Open", [flat(currents(id="a"))], name, codec)
    except ValueError:
        avro(path, "users.messages.email.Open", [flat(currents(id="a"))], name)
        told = b"avro.codec" + bytes([2 * len(codec)]) + codec.encode()
        path.write_bytes(path.read_bytes().replace(b"avro.codec\x08null", told))
        with pytest.raises(SpoolError, match=codec) as caught:
            list(currents_files.lines(path, MAX_LINE))
        assert "nothing of it was sent" in caught.value.hint
        assert " -m pip install " in caught.value.hint
    else:
        assert len(list(currents_files.lines(path, MAX_LINE))) == 1


@unhurried
@given(cents=st.integers(0, 9_999_999))
def test_a_price_of_single_precision_is_the_price(cents):
    """Avro's float has seven digits; what Mixpanel sums up must not get the other nine."""
    price = cents / 100
    narrow = currents_files.struct.unpack("f", currents_files.struct.pack("f", price))[0]
    record = {"id": "p", "time": 1, "price": narrow}
    assert currents_files.event("users.behaviors.Purchase", record, ["price"])["properties"]["price"] == price
