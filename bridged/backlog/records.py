"""What comes to the spool and what leaves it: events taken in, segments settled, dead letters. Pure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from msgspec import Struct

from bridged.backlog.segment import Batch, Segment

if TYPE_CHECKING:
    import asyncio

DEAD_LETTER_BYTES = 256  # of a dead letter besides its event
_SKIPPED_BYTES = 16  # of a skipped event in memory, with why it was

# Who refused an event: our door (it is kept in Currents' form), bridged itself later on, or Mixpanel (in the mapped form).
Stage = Literal["door", "bridged", "mixpanel"]
STAGES = get_args(Stage)


class DeadLetter(Struct, gc=False):
    """An event that can't be delivered, kept with the reason until somebody replays or purges it."""

    code: int  # the type it is accounted under
    event_type: str
    stage: Stage
    reason: str
    event: bytes

    @property
    def size(self) -> int:
        """What it costs on disk, in bytes."""
        return len(self.event) + DEAD_LETTER_BYTES


class DeadLetterRow(Struct):
    """A dead letter as it is kept. Times are wall clock seconds."""

    id: int
    first_at: float
    last_at: float
    attempts: int
    stage: Stage
    code: int
    event_type: str
    reason: str
    event: bytes


class Intaken(Struct, gc=False):
    """What one read or request brings: mapped events, dead letters and skipped ones, committed together."""

    batches: list[Batch] = []
    dead_letters: list[DeadLetter] = []
    skipped: bytes = b""  # an event a byte: the codes
    reasons: list[str] = []  # why they were
    # Dead letters that this replays: they leave their table in the same commit, and are no new events.
    replayed: list[DeadLetterRow] = []

    size: int = 0  # what it will take on disk, or takes in memory until then, at most, in bytes

    def __post_init__(self) -> None:
        self.size = sum([len(batch.ndjson) for batch in self.batches]) + _SKIPPED_BYTES * len(self.skipped)
        if self.dead_letters:
            self.size += sum([letter.size for letter in self.dead_letters])


class Settlement(Struct, gc=False):
    """What became of segments that were sent: their rows go, in one commit with what takes their place."""

    segments: Sequence[Segment]
    delivered: bytes = b""  # an event a byte: the codes
    expired: bytes = b""
    dead_letters: Sequence[DeadLetter] = ()
    parts: Sequence[Batch] = ()  # of one segment that was refused as a whole; they are as old as it is
    whole: Any = None  # what they are parts of, for whoever gets them
    damaged: bool = False  # the disk gave it back changed: what was in it isn't known, nor what it was

    size: int = 0  # what it keeps in memory until it is committed, in bytes
    came_bytes: int = 0  # of that, what takes the segments' place on disk, at most

    def __post_init__(self) -> None:
        self.size = sum([segment.size for segment in self.segments])
        if self.damaged:
            self.came_bytes = self.size
        elif self.dead_letters or self.parts:
            self.came_bytes = sum(letter.size for letter in self.dead_letters) + sum(len(p.ndjson) for p in self.parts)
            self.size += self.came_bytes


class Work(Struct):
    """The list that the writer takes as a whole. Each of `intaken` has its future."""

    intaken: list[Intaken] = []
    futures: list["asyncio.Future[None]"] = []
    settlements: list[Settlement] = []

    def divided(self, max_bytes: int, max_new_bytes: int) -> tuple["Work", "Work"]:
        """What brings at most so many bytes, and so many of new events, or is one thing, and the rest.

        Settlements come first: they make room.
        """
        came = [settlement.came_bytes for settlement in self.settlements]
        settled, taken = _as_many(came, max_bytes), 0
        left = max_bytes - sum(came)
        if settled == len(came) and (left > 0 or not came):
            taken = _as_many([intaken.size for intaken in self.intaken], min(left, max_new_bytes))
        return (
            Work(self.intaken[:taken], self.futures[:taken], self.settlements[:settled]),
            Work(self.intaken[taken:], self.futures[taken:], self.settlements[settled:]),
        )


def _as_many(sizes: Sequence[int], most: int) -> int:
    """How many of them, from the first on, are together at most so large; one in any case, if there is one."""
    total = 0
    for count, size in enumerate(sizes):
        total += size
        if total > most:
            return max(count, 1)
    return len(sizes)
