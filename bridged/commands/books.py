"""What became of the events that a command has sent: the running daemon's books, before and after. Who can't ask says nothing."""

from collections.abc import Iterator
from typing import Final, TypeVar
from urllib.parse import urlencode

import msgspec
from msgspec import Struct

from bridged.backlog.dead_letters import Group
from bridged.commands.client import Daemon
from bridged.commands.printing import table
from bridged.errors import BridgedError

T = TypeVar("T")

_TIMEOUT_S: Final = 5.0
_REASONS_SHOWN: Final = 10


class _Status(Struct):
    started_at: float
    uptime_s: float
    events: dict[str, int]
    skipped: dict[str, int]


class Books:
    """A daemon's, from when this was made. They are about all senders: whatever is said of them is about a time."""

    def __init__(self, daemon: Daemon | None) -> None:
        """None: there is nobody to ask."""
        self._daemon = daemon
        self._before = self.asked("/api/status", _Status)

    def asked(self, path: str, type_: type[T]) -> T | None:
        """What the admin API answers to a GET. None: nobody does, in time and in a form that we know."""
        if self._daemon is None:
            return None
        try:
            answer = self._daemon.call("GET", path, timeout_s=_TIMEOUT_S)
            return msgspec.json.decode(answer.body, type=type_) if answer.status == 200 else None
        except (BridgedError, msgspec.DecodeError, UnicodeDecodeError):
            return None

    def meanwhile(self, acked: int) -> Iterator[str]:
        """In words, what became dead letters and what was skipped since; nothing if these aren't the books of who acked."""
        before = self._before
        after = self.asked("/api/status", _Status) if before is not None and acked else None
        if before is None or after is None:
            return
        more = {kind: after.events.get(kind, 0) - before.events.get(kind, 0) for kind in after.events}
        letters, skipped = more.get("dead_lettered", 0), more.get("skipped", 0)
        if more.get("accepted", 0) < acked or (letters <= 0 and skipped <= 0):
            return
        told = [f"{letters:,} more dead letter{'' if letters == 1 else 's'}"] if letters > 0 else []
        told += [f"{skipped:,} more skipped"] if skipped > 0 else []
        yield f"  meanwhile, in the daemon's books: {', '.join(told)} (of other senders, too, if there were any)"
        rows = sorted((*self._of_letters(before, letters), *_of_skips(before, after)), key=lambda row: -row[0])
        if rows:
            yield table(rows[:_REASONS_SHOWN], right=[0], indent="    ")
        if len(rows) > _REASONS_SHOWN:
            yield f"    and {len(rows) - _REASONS_SHOWN:,} more reasons"
        if letters > 0:
            yield "  see `bridged dead-letters list`; `bridged dead-letters replay` tries them again, after the cause is gone"

    def _of_letters(self, before: _Status, letters: int) -> Iterator[tuple[int, str]]:
        """Their reasons, unless others were touched meanwhile, by a replay."""
        since = urlencode({"since": before.started_at + before.uptime_s})  # by the daemon's clock
        groups = self.asked(f"/api/dead-letters/groups?{since}", list[Group]) or [] if letters > 0 else []
        if sum(group.count for group in groups) <= letters:
            yield from ((group.count, f"dead letters: {group.event_type}: {group.reason[:100]}") for group in groups)


def _of_skips(before: _Status, after: _Status) -> Iterator[tuple[int, str]]:
    """Their reasons, which the daemon counts from its start."""
    if after.started_at == before.started_at:
        for reason, count in after.skipped.items():
            if (more := count - before.skipped.get(reason, 0)) > 0:
                yield more, f"skipped: {reason}"
