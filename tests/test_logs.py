"""Logs: one form for ours and the libraries', and no credential in them."""

import contextlib
import io
import json
import logging
import os
import resource
import select
import subprocess
import sys

import aiohttp
import pytest
import structlog
from aiohttp.http_exceptions import BadStatusLine
from conftest import free_port, until
from test_lifecycle import batch, process

from bridged import logs, redaction

__all__ = ["process"]


@pytest.fixture(autouse=True)
def _restored():
    """Logging is global: each test leaves it as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def lines(capsys):
    """What was logged."""
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_json_lines_on_standard_error(capsys):
    """Ours come as one JSON object a line with time and level; those below the level don't come."""
    logs.setup("info", "json")
    structlog.get_logger().debug("hidden")
    structlog.get_logger().info("batch_delivered", events=3)

    (line,) = lines(capsys)
    assert (line["event"], line["level"], line["events"]) == ("batch_delivered", "info", 3)
    assert line["timestamp"].endswith("Z")


def test_libraries_speak_the_same(capsys):
    """A library's warning has our form and its logger's name, even at a level of its own; its chatter is left out."""
    logs.setup("info", "json")
    logging.getLogger("some.library").warning("careful: %s", "100%")
    logging.getLogger("some.library").log(35, "odd level")
    logging.getLogger("some.library").info("chatter")

    first, second = lines(capsys)
    assert (first["event"], first["level"], first["logger"]) == ("careful: 100%", "warning", "some.library")
    assert second["event"] == "odd level"


def test_malformed_requests_leak_nothing(capsys):
    """The record of aiohttp about a malformed request quotes its header bytes; ours doesn't."""
    logs.setup("debug", "json")
    error = BadStatusLine("Authorization: Bearer hunter2")
    logging.getLogger("aiohttp.server").error("Error handling request", exc_info=error)

    output = capsys.readouterr().err
    assert "bad_request" in output
    assert "hunter2" not in output


def test_bugs_keep_their_traceback(capsys):
    """An error of our own in a handler is logged with where it happened."""
    logs.setup("info", "json")
    try:
        1 / 0  # noqa: B018  # the bug
    except ZeroDivisionError:
        logging.getLogger("aiohttp.server").exception("Error handling request")

    (line,) = lines(capsys)
    assert line["level"] == "error"
    assert "test_logs.py" in line["exception"]


def test_console_is_for_people(capsys):
    """The console form is text, not JSON."""
    logs.setup("info", "console")
    structlog.get_logger().info("batch_delivered", events=3)

    text = capsys.readouterr().err
    assert "batch_delivered" in text
    assert not text.startswith("{")


@pytest.mark.parametrize(
    ("terminal", "environ", "coloured"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colours_are_for_a_terminal_that_has_them(monkeypatch, terminal, environ, coloured):
    """A file, or whoever doesn't want them, gets plain text."""
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    output = io.StringIO()
    output.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", output)
    logs.setup("info", "console")
    structlog.get_logger().info("batch_delivered", events=3)

    assert "batch_delivered" in output.getvalue()
    assert ("\x1b[" in output.getvalue()) is coloured


@pytest.mark.parametrize("format_", ["json", "console"])
def test_secrets_are_masked_in_every_line(capsys, format_):
    """Wherever one stands: in a value, in a library's message, in a traceback; and no local variable is shown at all."""
    secret = "canary'0123456789\\abcdef"
    redaction.hide([secret])
    logs.setup("info", format_)
    structlog.get_logger().info("said", value=secret, nested={"of": [secret.encode()]})
    logging.getLogger("some.library").warning("it is %s", secret)
    try:
        local = [secret[:-1]]  # a piece, which nothing would recognise
        raise RuntimeError(secret + str(len(local)))  # noqa: TRY301  # its frame has the local
    except RuntimeError:
        logging.getLogger("asyncio").exception("a bug")

    output = capsys.readouterr().err
    assert output.count(redaction.MASK) >= 4
    assert "canary" not in output
    assert "test_logs.py" in output


@pytest.mark.parametrize("format_", ["json", "console"])
def test_a_short_secret_is_masked_under_its_name(capsys, format_):
    """Too short to be looked for everywhere, it isn't said where the key says what it is; what isn't a secret is."""
    logs.setup("info", format_)
    structlog.get_logger().info(
        "said", api_secret="abc123", Authorization="Bearer abc123", token="", token_kind="abcxyz"
    )

    output = capsys.readouterr().err
    assert "abc123" not in output
    assert output.count(redaction.MASK) == 2
    assert "abcxyz" in output


def test_errors_that_come_of_a_malformed_request(capsys):
    """One that was raised while another was handled: its traceback would quote both."""
    logs.setup("debug", "json")
    error = RuntimeError("then this")
    error.__cause__ = BadStatusLine("Authorization: Bearer hunter2")
    logging.getLogger("aiohttp.server").error("Error handling request", exc_info=error)

    (line,) = lines(capsys)
    assert line["event"] == "bad_request"


# -- where nobody reads ------------------------------------------------------------------------------------------------


@pytest.fixture
def standard_error(monkeypatch):
    """Puts a descriptor in the place of standard error, as `run` does."""
    streams = []

    def put(descriptor):
        stream = os.fdopen(descriptor, "w")
        streams.append(stream)
        output = logs.Output(stream)
        monkeypatch.setattr("sys.stderr", output)
        logs.setup("info", "json")
        return output

    yield put
    for stream in streams:
        stream.close()


def events_in(data):
    """The lines of a log, by their event, and how many lines each says are lost."""
    found = [json.loads(line) for line in data.decode().splitlines() if line]
    return [line["event"] for line in found], sum(line.get("lines", 0) for line in found)


async def test_a_reader_that_is_gone_loses_lines_and_nothing_else(tmp_path, standard_error):
    """A pipe without a reader raises nothing in whoever logs; once there is one again, it reads how many lines it has missed."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    first = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    output = standard_error(os.open(path, os.O_WRONLY))
    os.close(first)
    structlog.get_logger().info("one")
    logging.getLogger("asyncio").warning("two")
    output.drain(5)

    second = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    structlog.get_logger().info("three")
    output.drain(5)
    data = os.read(second, 65536)
    if data.count(b"\n") < 2:
        await until(lambda: select.select([second], [], [], 0)[0], "the notice")
        data += os.read(second, 65536)
    os.close(second)
    assert events_in(data) == (["three", "log_lines_lost"], 2)


async def test_a_reader_that_does_not_read_keeps_nobody_waiting(standard_error):
    """A full pipe: who logs goes on, what is kept is bounded, and what is read later is in order, with the number of the lost."""
    reader, writer = os.pipe()
    output = standard_error(writer)
    for number in range(20_000):
        structlog.get_logger().info(str(number), text="x" * 100)
    assert output._unread_bytes <= logs._MAX_UNREAD_BYTES

    data = b""
    while b"log_lines_lost" not in data or not data.endswith(b"\n"):
        await until(lambda: select.select([reader], [], [], 0)[0], "more")
        data += os.read(reader, 2**20)
    os.close(reader)
    (*numbers, last), lost = events_in(data)
    assert last == "log_lines_lost"
    assert numbers == sorted(numbers, key=int)
    assert 1000 < len(numbers) == 20_000 - lost


def test_a_log_on_a_full_disk_loses_lines_and_nothing_else(tmp_path, standard_error):
    """A file that takes no more, in the middle of a line: whoever logs goes on, and the next line that fits stands alone."""
    file = tmp_path / "log"
    standard_error(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        structlog.get_logger().info("one")
        logging.getLogger("asyncio").warning("two")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    structlog.get_logger().info("three")

    torn, rest = file.read_bytes().split(b"\n", 1)
    assert len(torn) == 20
    assert events_in(rest) == (["three", "log_lines_lost"], 2)


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "not reading"])
async def test_the_daemon_lives_without_a_reader_of_its_log(process, gone):
    """Whoever reads standard error is gone, or stuck: events are taken, the admin side answers, and SIGTERM ends it in order."""
    reader, writer = os.pipe()
    if gone:
        os.close(reader)
    else:
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while os.write(writer, b"x" * 4096):
                pass
        os.set_blocking(writer, True)
    admin = f"127.0.0.1:{free_port()}"
    await process.start(stderr=writer, admin__listen=admin)
    os.close(writer)
    await process.ready()
    assert await process.post(batch(3)) == 200
    async with aiohttp.ClientSession() as session, session.get(f"http://{admin}/healthz") as answer:
        assert answer.status == 200
    assert await process.end() == 0
    if not gone:
        os.close(reader)


def test_a_start_that_fails_without_a_reader_says_so_by_its_exit_code(tmp_path):
    """A broken pipe is not the end of the daemon, nor its success: what went wrong is in the exit code all the same."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "bridged", "run"]
    environment = os.environ | {"BRIDGED__SPOOL__PATH": str(tmp_path), "BRIDGED__MIXPANEL__TOKEN": "example-token"}
    result = subprocess.run(command, env=environment, stderr=writer, timeout=60, check=False)
    os.close(writer)

    assert result.returncode == 74
