"""`bridged replay`: hands archived events back to the daemon, a file at a time, gzip or plain NDJSON."""

import argparse
import gzip
import itertools
import shlex
import stat
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from bridged.backlog.archive import ArchivedEvent
from bridged.commands.client import Daemon
from bridged.errors import BridgedError, SpoolError

EPILOG = """\
A file that the daemon has taken, every event of it on disk, is renamed to FILE.replayed, so that a second call passes it over;
pipes, devices, links and what has such a name already keep theirs.
Events that Mixpanel has already are recognised by their $insert_id: to replay a file again is harmless.

examples:
  bridged replay archive
  bridged replay archive/20260301T*.ndjson.gz
"""
_SUFFIX = ".replayed"
_ARCHIVED = ".ndjson.gz"
# Events in a request: what the daemon takes in one go without keeping others waiting.
_SLICE = 2000
_SLICE_BYTES = 4 * 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument(
        "files", nargs="+", metavar="FILE", type=Path, help="what [retention] archived: gzip NDJSON, or their folder"
    )


def main(arguments: argparse.Namespace) -> int:
    """Replays them in the order given; goes on behind one that can't be read. 1: some were refused; 74: a file kept its name."""
    daemon = Daemon.configured(arguments.config)
    code = 0
    bad: list[SpoolError] = []
    for path in (file for given in arguments.files for file in _files(given)):
        try:
            lines = _lines(path)
        except SpoolError as error:
            bad.append(error)
            continue
        taken = refused = 0
        try:
            for events in _slices(lines):
                refused += daemon.order("/api/replay", {"events": events}, dict[str, int]).get("refused", 0)
                taken += len(events)
        except BridgedError as error:
            part = f"{path}: {taken} of its {len(lines)} events were replayed; replaying it again is harmless"
            error.hint = f"{error.hint}; {part}" if error.hint else part
            raise
        said = f", {refused} refused: see bridged dead-letters list" if refused else ""
        print(f"{path}: {len(lines) - refused} events back in the spool{said}")
        code = code or int(bool(refused))
        try:
            _put_aside(path)
        except OSError as error:
            # The others are sent all the same: to stop here would have this one sent again.
            print(f"bridged: {path} was replayed, but can't be renamed: {error}", file=sys.stderr)
            print("  hint: don't replay it again; move it away", file=sys.stderr)
            code = SpoolError.exit_code
    if len(bad) == 1:
        raise bad[0]
    if bad:
        each = "\n  ".join(f"{error.args[0]} ({error.hint})" for error in bad)
        raise SpoolError(f"{len(bad)} files weren't replayed:\n  {each}", "the others were")
    return code


def _files(given: Path) -> list[Path]:
    """Of a folder, the archive's files that are in it, the oldest first: there may be more than a command line takes."""
    try:
        if not stat.S_ISDIR(given.stat().st_mode):
            return [given]
        files = sorted(file for file in given.iterdir() if file.name.endswith(_ARCHIVED))
    except OSError as error:
        raise _unreadable(given, error) from error
    if not files:
        print(f"{given}: no {_ARCHIVED} files in it")
    return files


def _put_aside(path: Path) -> None:
    """Gives a file its new name, one that no other has. What isn't a regular file keeps its own. Raises OSError."""
    if path.name.endswith(_SUFFIX) or not stat.S_ISREG(path.lstat().st_mode):
        return
    endings = itertools.chain([_SUFFIX], (f".{number}{_SUFFIX}" for number in itertools.count(2)))
    path.rename(next(new for ending in endings if not (new := path.with_name(path.name + ending)).exists()))


def _lines(path: Path) -> list[bytes]:
    """The events of a file, all of it looked at before any is sent. Raises SpoolError that names the file and the line."""
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error
    lines = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            msgspec.json.decode(line, type=ArchivedEvent)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            said = f"{path}, line {number} is no archived event: {error}"
            raise SpoolError(said, f"nothing of the file was sent; {_what_to_do(line)}") from error
        lines.append(line)
    return lines


def _unreadable(path: Path, error: Exception) -> SpoolError:
    hint = "archive files are gzip NDJSON, or NDJSON"
    if isinstance(error, PermissionError):
        # The service's folder is its own to enter, and root's.
        hint = "run this as root, or as who may read it"
    elif isinstance(error, EOFError):
        # Only then: what is unpacked of one that is damaged in its midst may look like events, and be none.
        unpack = f"gzip -dc {shlex.quote(str(path))} > left.ndjson"
        hint = (
            f"it is cut off; what is left of it: {unpack}; delete the last line, which is cut off, too, and replay that"
        )
    return SpoolError(f"can't read {path}: {error}", hint)


def _what_to_do(line: bytes) -> str:
    """With what was taken for an archived event."""
    try:
        members = set(msgspec.json.decode(line, type=dict[str, msgspec.Raw]))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        members = set()
    if {"stage", "reason"} <= members:
        return (
            "it looks like an export of dead letters: bridged dead-letters replay tries those again that the daemon has"
        )
    if "event_type" in members:
        return "it looks like an event of Currents: bridged backfill sends those"
    return "replay takes what [retention] archived"


def _slices(lines: Sequence[bytes]) -> Iterator[list[msgspec.Raw]]:
    """As much as the daemon takes in one request."""
    events: list[msgspec.Raw] = []
    size = 0
    for line in lines:
        if events and (len(events) >= _SLICE or size + len(line) > _SLICE_BYTES):
            yield events
            events, size = [], 0
        events.append(msgspec.Raw(line))
        size += len(line)
    if events:
        yield events
