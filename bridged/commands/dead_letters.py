"""`bridged dead-letters`: look at them, try them again, take them elsewhere, delete them. Asks the running daemon."""

import argparse
import contextlib
import json
import os
import secrets
import stat
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from bridged.admin.api import Counted, Listing
from bridged.backlog.dead_letters import MAX_ID, MAX_LISTED, Group, Replayed
from bridged.backlog.records import STAGES
from bridged.commands.client import Daemon
from bridged.commands.printing import agreed, printable, table
from bridged.durable import settle_file
from bridged.errors import BridgedError

EPILOG = """\
examples:
  bridged dead-letters list --type users.behaviors.CustomEvent --limit 20
  bridged dead-letters show 42
  bridged dead-letters replay --reason "unknown event type"     after the configuration was changed
  bridged dead-letters export - | jq -c .event
  bridged dead-letters purge --until 2026-01-31 --yes
"""
_GROUPS_SHOWN = 20
_SHOWN_CHARS = 120  # of a reason
_SECONDS_DIGITS = 10  # of the seconds since 1970, since 2001


class FileError(BridgedError):
    """A file that the user named can't be written."""

    exit_code = 74


class UsageError(BridgedError):
    """The arguments contradict each other."""

    exit_code = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommands and their options."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    filters = argparse.ArgumentParser(add_help=False)
    filters.add_argument("--type", metavar="TYPE", default="", help="only of this event type (Currents' name)")
    filters.add_argument("--reason", metavar="TEXT", default="", help="only with this in their reason")
    filters.add_argument(
        "--stage",
        choices=STAGES,
        help="only refused by our door, by bridged behind it (too large, damaged), or by Mixpanel",
    )
    filters.add_argument(
        "--since",
        metavar="TIME",
        type=_time,
        help="only refused then or later: 2026-01-31[T14:00], local time unless with +00:00",
    )
    filters.add_argument("--until", metavar="TIME", type=_time, help="only refused before")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS, help="the configuration (see `bridged --help`)"
    )

    verb = verbs.add_parser("list", parents=[common, filters], help="what there is, and why")
    verb.add_argument(
        "--limit", type=_from_one, default=50, metavar="N", help="at most so many, oldest first (default %(default)s)"
    )
    verb.add_argument("--after", type=int, default=0, metavar="ID", help="go on after this one")
    verb.add_argument("--json", action="store_true", help="one JSON object a line")
    verb = verbs.add_parser("show", parents=[common], help="one of them, with its event")
    verb.add_argument("id", type=_from_one, help="its number in the list")
    verb = verbs.add_parser("export", parents=[common, filters], help="NDJSON with the events, into a file")
    verb.add_argument("file", help="where to; - is standard output")
    verb.add_argument("--force", action="store_true", help="replace the file, if there is one")
    for name, text in (("replay", "try them again"), ("purge", "delete them for good")):
        verb = verbs.add_parser(name, parents=[common, filters], help=text)
        verb.add_argument(
            "ids", type=_from_one, nargs="*", metavar="ID", help="only these, by their numbers in the list"
        )
        verb.add_argument("--all", action="store_true", help="all of them")
        if name == "purge":
            verb.add_argument("--yes", action="store_true", help="don't ask")


def main(arguments: argparse.Namespace) -> int:
    """Does what the verb says."""
    daemon = Daemon.configured(arguments.config)
    verbs = {"list": _list, "show": _show, "export": _export, "replay": _replay, "purge": _purge}
    return verbs[arguments.verb](daemon, arguments)


def _list(daemon: Daemon, arguments: argparse.Namespace) -> int:
    left, after = arguments.limit, arguments.after
    found = []
    while left > 0 and after is not None:
        limit = min(left, MAX_LISTED)
        page = daemon.ask("/api/dead-letters", Listing, after=after, limit=limit, **_filter(arguments))
        found += page.dead_letters
        left, after = left - len(page.dead_letters), page.next
    if arguments.json:
        for letter in found:
            print(json.dumps({name: getattr(letter, name) for name in letter.__struct_fields__}))
        return 0
    if not found:
        print("no dead letters" + (" that match" if _filter(arguments) else ""))
        return 0
    head = ("id", "refused", "tries", "by", "event type", "reason")
    rows = [[str(d.id), _when(d.last_at), str(d.attempts), d.stage, d.event_type, _brief(d.reason)] for d in found]
    print(table([head, *rows], right=[0, 2], indent=""))
    if not _filter(arguments):
        groups = daemon.ask("/api/dead-letters/groups", list[Group])
        total = sum(group.count for group in groups)
        print(f"\n{total:,} dead letters")
        print(table([[g.count, g.stage, g.event_type, _brief(g.reason)] for g in groups[:_GROUPS_SHOWN]], right=[0]))
        if len(groups) > _GROUPS_SHOWN:
            print(f"  and {len(groups) - _GROUPS_SHOWN:,} more reasons: see the page, or GET /api/dead-letters/groups")
    if after is not None:
        print(f"\nthere may be more: --after {after}")
    return 0


def _brief(reason: str) -> str:
    """A line's worth of it: its beginning and its end, where Mixpanel's words say what is wrong."""
    return reason if len(reason) <= _SHOWN_CHARS else f"{reason[: _SHOWN_CHARS - 41]}…{reason[-40:]}"


def _show(daemon: Daemon, arguments: argparse.Namespace) -> int:
    letter = daemon.ask(f"/api/dead-letters/{arguments.id}", dict[str, Any])
    # ASCII: an event holds whatever somebody sent, and must not command the terminal.
    print(json.dumps(letter, indent=2))
    return 0


def _export(daemon: Daemon, arguments: argparse.Namespace) -> int:
    pieces = daemon.stream("/api/dead-letters/export", **_filter(arguments))
    if arguments.file == "-":
        for piece in pieces:
            sys.stdout.buffer.write(piece)
        return 0
    path, is_new = _target(arguments.file, replace=arguments.force)
    # Nothing half-written ever stands under the name that was asked for. A pipe or a device is no file to be replaced.
    part: Path | None = None
    count = 0
    try:
        if is_new:
            # Known before it is there, so that it goes whenever we are interrupted; for nobody else's eyes.
            part = path.parent / f".bridged-export-{secrets.token_hex(8)}.part"
            opened = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        else:
            opened = os.open(path, os.O_WRONLY)
        with os.fdopen(opened, "wb") as file:
            for piece in pieces:
                file.write(piece)
                count += piece.count(b"\n")
        if part is not None:
            settle_file(part, path)
            part = None
    except OSError as error:
        raise FileError(f"can't write {path}: {error}", "is the folder there, and is there room?") from error
    finally:
        if part is not None:
            with contextlib.suppress(OSError):
                part.unlink()
    print(f"{count:,} dead letters written to {path}", file=sys.stderr)
    return 0


def _target(name: str, *, replace: bool) -> tuple[Path, bool]:
    """Where an export goes, behind any symbolic links, and whether it becomes a file there. Raises UsageError, FileError."""
    if not name:
        raise UsageError("export to which file?", "give a name, or - for standard output")
    path = Path(name)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return Path(os.path.realpath(path)), True
    except OSError as error:
        raise FileError(f"can't write {path}: {error}") from error
    if stat.S_ISDIR(mode):
        raise FileError(f"{path} is a folder", "give the name of a file")
    if not stat.S_ISREG(mode):
        return path, False
    if not replace:
        raise FileError(f"{path} is there already", "give another name, or --force to replace it")
    return Path(os.path.realpath(path)), True


def _replay(daemon: Daemon, arguments: argparse.Namespace) -> int:
    result = daemon.order("/api/dead-letters/replay", _order(arguments), Replayed)
    skipped = f", {result.skipped:,} skipped: [events] says today that they aren't forwarded" if result.skipped else ""
    print(f"{result.replayed:,} replayed, {result.refused:,} refused again{skipped}")
    if result.reasons:
        print(table([[count, _brief(reason)] for reason, count in result.reasons.items()], right=[0]))
    if arguments.ids and not result.replayed + result.refused + result.skipped:
        raise BridgedError("no such dead letter", "see bridged dead-letters list: what was replayed or purged is gone")
    return 0 if not result.refused else 1


def _purge(daemon: Daemon, arguments: argparse.Namespace) -> int:
    order = _order(arguments)
    if not arguments.yes:
        some = f"{len(arguments.ids)} dead letters" if arguments.ids else "the dead letters that match"
        what = "ALL dead letters" if arguments.all else some
        if not sys.stdin.isatty():
            raise UsageError(f"purge deletes {what} for good", "say --yes if that is what you want")
        if not arguments.ids:
            counted = daemon.order("/api/dead-letters/count", order, Counted)
            what = f"{what}, {counted.count:,} now,"
            # Nobody's yes is about what comes while it is thought over.
            order = {"filter": order.get("filter", {}) | {"upto": counted.upto}}
        if not agreed(f"Delete {what} for good?"):
            print("nothing was deleted")
            return 1
    purged = daemon.order("/api/dead-letters/purge", order, dict[str, int])["purged"]
    print(f"{purged:,} purged")
    return 0


def _order(arguments: argparse.Namespace) -> dict[str, Any]:
    wanted = _filter(arguments)
    if bool(arguments.ids) + bool(wanted) + arguments.all != 1:
        raise UsageError("which dead letters?", "give ids, or filters such as --type and --reason, or --all")
    if wanted:
        return {"filter": wanted}
    return {"ids": arguments.ids} if arguments.ids else {"all": True}


def _filter(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {
        "event_type": arguments.type,
        "reason": arguments.reason,
        "stage": arguments.stage,
        "since": arguments.since,
        "until": arguments.until,
    }
    return {key: value for key, value in given.items() if value not in (None, "")}


def _from_one(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_ID:
        raise argparse.ArgumentTypeError(f"expected a number from 1, got {text!r}")
    return int(text)


def _time(text: str) -> float:
    try:
        # Fewer digits are a day, 20260131, or a slip: as seconds they would lie so long ago that all there is came since.
        is_seconds = text.isdecimal() and len(text) >= _SECONDS_DIGITS
        return float(text) if is_seconds else datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a time such as 2026-01-31 or 2026-01-31T14:00, got {text!r}"
        ) from None


def _when(seconds: float) -> str:
    return printable(time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)))
