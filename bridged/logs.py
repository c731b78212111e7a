"""Logging: structlog for ours, the same form for the libraries'. To standard error, where systemd reads it."""

import logging
import sys
from typing import Any, Literal

import structlog
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web import RequestPayloadError

from bridged.redaction import MASK, SECRET_KEYS, redacted


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
        [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
        if console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[*shared, *renderer, _redact],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    root.handlers[:] = [_Structlog()]
    root.setLevel(logging.WARNING)


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
