"""What happened, for people: halts, restarts, changed settings, alarms. A bounded list, kept in a file beside the spool.

A line is handed over when it happens, for another thread to write, and not fsynced: a crash may cost the last ones. The file is
never rewritten in place, so what a crash leaves of its last line costs that line alone; when it has grown, a shorter one takes
its place by a rename. A disk that takes no line, or hangs, costs the file, and nothing else.
"""

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import structlog
from msgspec import Struct

from bridged.apart import at_once
from bridged.redaction import redacted

log = structlog.get_logger()

MAX_ENTRIES: Final = 1000
# A file with more lines is replaced by one that holds what is kept.
_MAX_LINES: Final = 4 * MAX_ENTRIES
_MAX_TEXT: Final = 1000
_MAX_FILE_BYTES: Final = 16 * 2**20
# Alike ones in a row within so long are one: a hundred splits are no news.
TOGETHER_S: Final = 60.0

Kind = Literal[
    "started",
    "stopped",
    "halted",
    "resumed",
    "split",
    "expired",
    "reloaded",
    "reload_failed",
    "settings",
    "credentials",
    "alarm_raised",
    "alarm_cleared",
    "replay",
    "purge",
    "test_events",
    "door",
]
Severity = Literal["info", "warning", "critical"]


class Entry(Struct, kw_only=True):
    """Something that happened, `count` times between `at` and `last_at` (wall clock seconds)."""

    id: int
    at: float
    last_at: float
    count: int = 1
    kind: str  # a Kind, of this version or another
    severity: Severity = "info"
    text: str
    detail: dict[str, str | int | float | bool | list[str] | None] = {}


class Activity:
    """The list, and what is to be in its file. `tell` never raises, and never waits for the disk."""

    def __init__(
        self,
        path: str | Path,
        clock: Callable[[], float] = time.time,
        do: Callable[[Callable[[], None]], bool] = at_once,
    ) -> None:
        """`do`: by whom the file is written, in order; gives False if he has too much to do."""
        self.entries: deque[Entry] = deque(maxlen=MAX_ENTRIES)  # the newest last
        self.last_id = 0
        self._path = Path(path)
        self._file = _File(self._path)
        self._do = do
        self._clock = clock
        self._lines = 0
        self._rest = False  # the last entry has happened more often than its line says
        self._behind = False  # a line had no place: the whole list is to be written

    def open(self) -> None:
        """Reads what is there, and goes on behind it. A file that can't be read is begun anew."""
        try:
            with self._path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _MAX_FILE_BYTES))
                for line in file:
                    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                        self._put(msgspec.json.decode(line, type=Entry))
        except FileNotFoundError:
            pass
        except OSError as error:
            self._file.complain(error)
        self._begin_file()

    def close(self) -> None:
        """The file is closed, when all is in it; what is told from now on is kept in memory only."""
        self._write_rest()
        if self._behind:
            self._begin_file()
        self._do(self._file.close)

    def tell(self, kind: Kind, text: str, severity: Severity = "info", **detail: Any) -> None:
        """Notes what has happened, now. Secrets are masked."""
        now, text = round(self._clock(), 3), redacted(text)[:_MAX_TEXT]
        last = self.entries[-1] if self.entries else None
        if last is not None and _alike(last, kind, text) and 0 <= now - last.last_at < TOGETHER_S:
            entry = msgspec.structs.replace(last, last_at=now, count=last.count + 1, id=self.last_id + 1, text=text)
            self.entries.pop()
            # A file that grew by a line each time would be all about one thing.
            worth_a_line = entry.count & (entry.count - 1) == 0
        else:
            plain = msgspec.json.decode(redacted(msgspec.json.encode(detail).decode()))
            entry = Entry(
                id=self.last_id + 1, at=now, last_at=now, kind=kind, severity=severity, text=text, detail=plain
            )
            worth_a_line = True
            self._write_rest()
        self._put(entry)
        if worth_a_line:
            self._write(entry)
        self._rest = not worth_a_line

    def newest(self, limit: int, before: int | None = None) -> list[Entry]:
        """The newest first; with `before`, those whose id is lower."""
        found = [entry for entry in reversed(self.entries) if before is None or entry.id < before]
        return found[:limit]

    def _put(self, entry: Entry) -> None:
        # A later line about the same thing replaces the one before it.
        last = self.entries[-1] if self.entries else None
        if last is not None and last.at == entry.at and _alike(last, entry.kind, entry.text):
            self.entries.pop()
        if entry.id > self.last_id:
            self.entries.append(entry)
            self.last_id = entry.id

    def _write_rest(self) -> None:
        """The last entry as it is now, if its line says less."""
        if self._rest:
            self._rest = False
            self._write(self.entries[-1])

    def _write(self, entry: Entry) -> None:
        if self._behind or self._lines >= _MAX_LINES:
            self._begin_file()
            return
        self._lines += 1
        self._behind = not self._do(partial(self._file.add, entry))

    def _begin_file(self) -> None:
        self._lines = len(self.entries)
        self._behind = not self._do(partial(self._file.begin, list(self.entries)))


class _File:
    """The file, in the hands of whoever writes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = -1
        self._torn = False  # the disk took only a part of the last line
        self._failed = False

    def begin(self, entries: Sequence[Entry]) -> None:
        """A file of these, under its name when it is whole; open for more."""
        part = self._path.with_name(f"{self._path.name}.part")
        try:
            file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                with open(file, "wb", closefd=False) as whole:  # a descriptor
                    whole.write(msgspec.json.Encoder().encode_lines(entries))
                part.replace(self._path)
            except BaseException:
                os.close(file)
                raise
        except OSError as error:
            self.complain(error)
            return
        self.close()
        self._file, self._torn = file, False

    def add(self, entry: Entry) -> None:
        """Writes a line, if the file is open."""
        if self._file < 0:
            return
        line = b"\n" * self._torn + msgspec.json.encode(entry) + b"\n"
        try:
            self._torn = os.write(self._file, line) < len(line)
        except OSError as error:
            self.complain(error)

    def close(self) -> None:
        """Nothing is added any more."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def complain(self, error: OSError) -> None:
        """Says once that nothing is kept."""
        if not self._failed:
            log.warning(
                "activity_not_kept", error=str(error), hint="it is in memory only; is the spool's folder writable?"
            )
        self._failed = True


def _alike(entry: Entry, kind: str, text: str) -> bool:
    """Of splits each may have its own words, as a CDN's pages have ids: so many would push out all else."""
    return entry.kind == kind and (entry.text == text or kind == "split")
