"""`bridged replay`: hands archived events back to the daemon, a file at a time."""

import argparse
import gzip
import zlib
from pathlib import Path

import msgspec

from bridged import config
from bridged.commands.client import Daemon
from bridged.errors import BridgedError, SpoolError

EPILOG = """\
A file that the daemon has taken, every event of it on disk, is renamed to FILE.replayed, so that a second call passes it over.
Events that Mixpanel has already are recognised by their $insert_id.

examples:
  bridged replay archive/*.ndjson.gz
"""
# Events in a request: what the daemon takes in one go without keeping others waiting.
_SLICE = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("files", nargs="+", metavar="FILE", type=Path, help="what [retention] archived: gzip NDJSON")


def main(arguments: argparse.Namespace) -> int:
    """Replays them in the order given; stops at the first that can't be."""
    daemon = Daemon.admin(config.load(config.find_config(arguments.config)))
    for path in arguments.files:
        try:
            lines = gzip.decompress(path.read_bytes()).splitlines()
        except (OSError, EOFError, zlib.error) as error:
            raise SpoolError(f"can't read {path}: {error}", "archive files are gzip NDJSON") from error
        try:
            for at in range(0, len(lines), _SLICE):
                events = [msgspec.Raw(line) for line in lines[at : at + _SLICE] if line.strip()]
                daemon.order("/api/replay", {"events": events}, dict[str, int])
        except BridgedError as error:
            error.hint = error.hint or f"{path} was replayed in part; replaying it again is harmless"
            raise
        path.rename(path.with_name(f"{path.name}.replayed"))
        print(f"{path}: {len(lines)} events back in the spool")
    return 0
