"""Logs: one form for ours and the libraries', and no credential in them."""

import json
import logging

import pytest
import structlog
from aiohttp.http_exceptions import BadStatusLine

from bridged import logs, redaction


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
