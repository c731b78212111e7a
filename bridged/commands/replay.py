"""`bridged replay`: hands archived events back to the daemon, a file at a time, gzip or plain NDJSON."""

import argparse
import gzip
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from bridged import config
from bridged.commands.client import Daemon
from bridged.errors import BridgedError, SpoolError

EPILOG = """\
A file that the daemon has taken, every event of it on disk, is renamed to FILE.replayed, so that a second call passes it over.
Events that Mixpanel has already are recognised by their $insert_id: to replay a file again is harmless.

examples:
  bridged replay archive/*.ndjson.gz
"""
# Events in a request: what the daemon takes in one go without keeping others waiting.
_SLICE = 2000
_SLICE_BYTES = 4 * 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("files", nargs="+", metavar="FILE", type=Path, help="what [retention] archived: gzip NDJSON")


def main(arguments: argparse.Namespace) -> int:
    """Replays them in the order given; stops at the first that can't be."""
    daemon = Daemon.admin(config.load(config.find_config(arguments.config)))
    for path in arguments.files:
        lines = _lines(path)
        try:
            for events in _slices(lines):
                daemon.order("/api/replay", {"events": events}, dict[str, int])
        except BridgedError as error:
            error.hint = error.hint or f"{path} was replayed in part; replaying it again is harmless"
            raise
        path.rename(path.with_name(f"{path.name}.replayed"))
        print(f"{path}: {len(lines)} events back in the spool")
    return 0


def _lines(path: Path) -> list[bytes]:
    """The events of a file, all of it looked at before any is sent. Raises SpoolError that names the file and the line."""
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise SpoolError(f"can't read {path}: {error}", "archive files are gzip NDJSON, or NDJSON") from error
    lines = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            msgspec.json.decode(line, type=dict[str, msgspec.Raw])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise SpoolError(f"{path}, line {number} is no event: {error}", "nothing of the file was sent") from error
        lines.append(line)
    return lines


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
