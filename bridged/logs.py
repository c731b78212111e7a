"""Logging: structlog for ours, the same form for the libraries'. To standard error, where systemd reads it.

Whoever reads it may be gone, or not read, and its disk may be full: then lines are lost, and counted, and nothing else happens.
"""

import io
import logging
import os
import select
import stat
import sys
import threading
from collections import deque
from typing import Any, Final, Literal, TextIO

import structlog
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web import RequestPayloadError

from bridged.redaction import MASK, SECRET_KEYS, redacted

# Of lines that nobody has read yet.
_MAX_UNREAD_BYTES: Final = 2**20


def setup(level: str, format_: Literal["auto", "console", "json"]) -> None:
    """Sets up logging for the process. The last step takes the secrets out of each line, whatever brought them in."""
    console = format_ == "console" or (format_ == "auto" and sys.stderr.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        _mask_keyed,
    ]
    renderer: list[Any] = (
        # Never with local variables, which hold secrets in pieces that nothing recognises.
        [structlog.dev.ConsoleRenderer(colors=_colours(), exception_formatter=structlog.dev.plain_traceback)]
        if console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[*shared, *renderer, _redact],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=lambda *_: _Lines(sys.stderr),
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    root.handlers[:] = [_Structlog()]
    root.setLevel(logging.WARNING)


def _colours() -> bool:
    """Whether whoever reads it sees colours, and wants them (no-color.org): in a file they are noise."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Output(io.TextIOBase):
    """Standard error as a stream that never raises; nor does it wait, unless it is a file.

    A pipe, a socket or a terminal takes no more while nobody reads: a thread of its own writes to them, in order.
    """

    def __init__(self, stream: TextIO) -> None:
        """Raises OSError for a stream without a descriptor."""
        self._file = stream.fileno()
        self._stream = stream
        self._waits = not stat.S_ISREG(os.fstat(self._file).st_mode)
        self._changed = threading.Condition()
        self._unread: deque[bytes] = deque()
        self._unread_bytes = 0  # with what is being written
        self._lost = 0  # lines
        self._torn = False  # part of a line was written, and its end never will be
        self._thread: threading.Thread | None = None

    def fileno(self) -> int:
        """Its descriptor."""
        return self._file

    def isatty(self) -> bool:
        """Whether a person reads it."""
        return self._stream.isatty()

    def writable(self) -> bool:
        """That it is."""
        return True

    def write(self, text: str, /) -> int:
        """Hands text over, whole lines if possible."""
        line = text.encode("utf-8", "backslashreplace")
        if not self._waits:
            self._put(line)
            return len(text)
        with self._changed:
            if self._unread_bytes + len(line) > _MAX_UNREAD_BYTES:
                self._lost += line.count(b"\n")
                return len(text)
            self._unread.append(line)
            self._unread_bytes += len(line)
            try:
                if self._thread is None:
                    thread = threading.Thread(target=self._write_on, name="log", daemon=True)
                    thread.start()
                    self._thread = thread
            except RuntimeError:  # there may be no more
                self._write_here()
            self._changed.notify_all()
        return len(text)

    def drain(self, seconds: float) -> None:
        """Comes back when everything is written, or after so many seconds. For the end."""
        with self._changed:
            self._changed.wait_for(lambda: not self._unread_bytes, seconds)

    def _write_here(self) -> None:
        """Without a thread: as much as can be written without waiting."""
        writable = select.poll()
        writable.register(self._file, select.POLLOUT)
        while self._unread and writable.poll(0):
            line = self._unread.popleft()
            self._put(line)
            self._unread_bytes -= len(line)

    def _write_on(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._unread)
                line = self._unread.popleft()
            self._put(line)
            with self._changed:
                self._unread_bytes -= len(line)
                self._changed.notify_all()

    def _put(self, line: bytes) -> None:
        left = memoryview(b"\n" + line if self._torn else line)
        begun = False
        while left:
            try:
                written = os.write(self._file, left)
            except BlockingIOError:
                # Somebody else has made it so, as some parents do of the pipes that they give.
                writable = select.poll()
                writable.register(self._file, select.POLLOUT)
                writable.poll()
            except OSError:
                self._torn = self._torn or begun
                with self._changed:
                    self._lost += line.count(b"\n")
                return
            else:
                left, begun = left[written:], True
        self._torn = False
        if self._lost and self._unread_bytes < _MAX_UNREAD_BYTES // 2:
            with self._changed:
                lost, self._lost = self._lost, 0
            structlog.get_logger().warning(
                "log_lines_lost", lines=lost, hint="nobody read the log, or its disk was full"
            )


class _Lines:
    """What structlog hands each line to. One write a line: no lock is needed, and a line about lost ones may come in between."""

    def __init__(self, stream: TextIO | Output) -> None:
        self._stream = stream

    def msg(self, line: str) -> None:
        self._stream.write(f"{line}\n")
        self._stream.flush()

    log = debug = info = warning = error = critical = exception = msg


class _Structlog(logging.Handler):
    """Libraries' log records, in our form."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger()
        error = record.exc_info[1] if record.exc_info else None
        if _quotes_a_request(error):
            # A malformed request. Its message and its traceback quote header bytes, and so may hold a credential.
            log.warning("bad_request", error=type(error).__name__)
            return
        # structlog knows the five standard levels only.
        level = max(logging.DEBUG, min(logging.CRITICAL, record.levelno // 10 * 10))
        log.log(level, record.getMessage(), logger=record.name, exc_info=record.exc_info)


def _quotes_a_request(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is about bytes that a client sent."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, HttpProcessingError | RequestPayloadError):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _mask_keyed(_logger: Any, _name: str, line: Any) -> Any:
    """What is called a secret is masked, even one that is too short to be found anywhere else."""
    for key in line:
        if key.lower().endswith(SECRET_KEYS) and isinstance(line[key], str) and line[key]:
            line[key] = MASK
    return line


def _redact(_logger: Any, _name: str, line: Any) -> str:
    return redacted(str(line))
