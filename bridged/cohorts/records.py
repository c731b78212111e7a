"""What the membership tells whoever asks: cohorts, sessions, refusals, plans and figures. Pure."""

from typing import Final

from msgspec import Struct

MAX_REFUSALS: Final = 1000
# Mixpanel tries a page again for a minute, then with its next sync, in half an hour: a session that was silent for so long
# has broken off.
BROKEN_OFF_S: Final = 600.0


class CohortRow(Struct, frozen=True, kw_only=True):
    """A cohort as of the last commit.

    members == in_braze + joining + rejected, and received == applied + no_id + too_long + stale.
    """

    key: str  # project:cohort
    project: str
    cohort: str
    name: str
    description: str
    members: int  # wanted: Mixpanel's membership as of the last page that was merged
    in_braze: int  # of those, known to be in Braze
    joining: int  # of those, to be written
    rejected: int  # of those, refused by Braze; tried again by a resync
    leaving: int  # to be taken out of Braze
    rejected_leaving: int  # Braze refused to take them out
    state: str  # receiving | sweeping | renaming | resyncing | forgetting | sending | synced
    progress: float  # of that, 0 to 1
    pages: int
    received: int  # members in all pages so far
    applied: int
    no_id: int
    too_long: int
    stale: int  # in pages of sessions that newer ones have overtaken
    last_page_at: float | None  # wall clock
    synced_at: float | None  # wall clock: when nothing was due any more


class RoundRow(Struct, frozen=True, kw_only=True):
    """A session of Mixpanel's."""

    session: str
    action: str
    started_at: float
    last_page_at: float
    total_pages: int
    pages: int  # that came, each counted once
    complete: bool
    superseded: bool  # by a newer one, before it was complete
    received: int
    no_id: int
    too_long: int
    stale: int
    joined: int
    left: int


class Refusal(Struct, frozen=True, kw_only=True):
    """A user that Braze refused, with its words."""

    id: int
    external_id: str
    cohorts: list[str]  # keys
    reason: str
    attempts: int
    first_at: float
    last_at: float


class CohortDetail(Struct, frozen=True, kw_only=True):
    """A cohort, its sessions, the newest first, and whom of it Braze refuses, the first 1,000."""

    cohort: CohortRow
    rounds: list[RoundRow]
    refusals: list[Refusal]


class Plan(Struct, frozen=True, kw_only=True):
    """What is due now, and what it costs. Points are Braze's data points; days are UTC's."""

    users: int  # to be written (with a partner key: users times cohorts)
    points: int
    joining: int
    leaving: int
    spent_today: int
    allowed_today: int | None  # None: no cap
    left_today: int | None
    fits: bool
    rows: list[CohortRow]


class Figures(Struct, frozen=True, kw_only=True):
    """Sums over all cohorts as of the last commit; the points as of now."""

    cohorts: int = 0
    members: int = 0
    in_braze: int = 0
    joining: int = 0
    leaving: int = 0
    rejected: int = 0
    rejected_leaving: int = 0
    pages: int = 0
    received: int = 0
    applied: int = 0
    no_id: int = 0
    too_long: int = 0
    stale: int = 0
    waiting: int = 0  # members in pages that are on disk and not merged yet
    points_today: int = 0
    points_left_today: int | None = None
    file_bytes: int = 0
    commits: int = 0
    commit_seconds: float = 0.0

    @property
    def due(self) -> int:
        """Users times cohorts that Braze is to be told."""
        return self.joining + self.leaving


class PageRefused(Struct, kw_only=True):
    """The last of Mixpanel's pages that was refused: its sync is paused then."""

    at: float  # wall clock, seconds
    status: int  # HTTP
    reason: str
