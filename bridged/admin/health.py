"""Is the daemon well? Two answers to two questions. Pure: every age is an argument.

*Alive* (/healthz): the process and its event loop answer at all. Anything else would make a supervisor restart a daemon
that is only waiting for Mixpanel, which helps nobody.

*Ready* (/readyz): progress. Not ready means that new events would be refused (starting, spool near its cap, writer
dead) or not be answered (a disk that hangs), or that events wait and nothing has been asked or judged for so long
that no orderly wait explains it. A halt (Mixpanel refuses the credential) and a backoff are orderly: the doors are open
and keep what comes, so the daemon stays ready, or an orchestrator would cut the intake off and turn an outage of Mixpanel
into a loss at the source. Both are told in the body, and by `bridged_delivery_halted`, which is what an alarm should look at.
"""

from typing import Final

from msgspec import Struct

# A commit takes milliseconds; on a disk that is busy with other things, seconds.
HANGS_S: Final = 30.0
# An orderly wait for one answer is at most the request's timeout; twice that and this much is none.
STALL_MARGIN_S: Final = 60.0


class Facts(Struct, frozen=True, kw_only=True):
    """What readiness depends on. Ages in seconds; None: there is no such moment."""

    doors_open: bool
    writer_failed: bool
    uncommitted_s: float = 0.0  # how long events have waited for a commit
    near_cap: bool
    refusal: str = "the spool is near its cap"  # why, when it is
    exporting: bool = True  # else what waits waits for that, and nobody is late
    halted: bool
    backing_off: bool
    waiting: int  # events
    uptime_s: float
    oldest_age_s: float | None
    asked_age_s: float | None  # since the last request left, or its answer came, whatever it said
    paced: bool = False  # the rate that is allowed makes the next request wait
    pause_s: float = 0.0  # so long may be between two requests: to fill one, or until what is set aside asks again
    timeout_s: float  # of one request


class Health(Struct, frozen=True):
    """The answer of /readyz."""

    ready: bool
    reason: str  # empty when there is nothing to say
    waiting: int
    halted: bool
    backing_off: bool
    stalled_s: float
    uncommitted_s: float  # how long events have waited to be written


def judge(facts: Facts) -> Health:
    """Whether the daemon takes events and gets on with them."""
    stalled_s = _stalled_s(facts)
    ready, reason = _decision(facts, stalled_s)
    ages = (round(stalled_s, 1), round(facts.uncommitted_s, 1))
    return Health(ready, reason, facts.waiting, facts.halted, facts.backing_off, *ages)


def _decision(facts: Facts, stalled_s: float) -> tuple[bool, str]:
    if facts.writer_failed:
        return False, "the spool's writer has failed: the process is about to end"
    if not facts.doors_open:
        return False, "the doors are not open"
    if hangs := _hanging(facts.uncommitted_s):
        return False, hangs
    if facts.near_cap:
        return False, f"{facts.refusal}: new events are refused"
    if is_stall(stalled_s, facts.timeout_s):
        return False, f"{facts.waiting} events wait, and Mixpanel has not been heard of for {stalled_s:.0f} s"
    if facts.halted:
        return True, "delivery is halted; events are taken and kept"
    if facts.backing_off:
        return True, "delivery is backing off; events are taken and kept"
    return True, ""


def no_progress(well: Health, timeout_s: float) -> str:
    """What no orderly wait explains, in an alarm's words; empty: there is progress."""
    if is_stall(well.stalled_s, timeout_s):
        return f"{well.waiting:,} events wait, and Mixpanel has not been heard of for {well.stalled_s:.0f} s"
    return _hanging(well.uncommitted_s)


def _hanging(uncommitted_s: float) -> str:
    """That events have waited for a commit for longer than any takes; empty: they have not."""
    if uncommitted_s <= HANGS_S:
        return ""
    return f"events have waited for {uncommitted_s:.0f} s to be written, and nobody is answered: does the spool's disk hang?"


class Commits:
    """Since when the spool's writer has made none, although events wait for it. `now` is monotonic seconds."""

    def __init__(self) -> None:
        self._progress = -1
        self._since = 0.0

    def uncommitted_s(self, writing: tuple[int, int], now: float) -> float:
        """To be asked about once a second, with the bytes that wait, and a figure that rises with each commit."""
        pending_bytes, progress = writing
        if not pending_bytes or progress != self._progress:
            self._progress, self._since = progress, now
        return now - self._since


def is_stall(stalled_s: float, timeout_s: float) -> bool:
    """Whether events have waited without an answer for longer than anything orderly takes."""
    return stalled_s > 2 * timeout_s + STALL_MARGIN_S


def _stalled_s(facts: Facts) -> float:
    """How long events have waited without an answer of any kind; 0 while there is a reason to wait.

    The smallest of three ages, so that one clock that was set forward can't make a stall.
    """
    if not facts.waiting or not facts.exporting or facts.halted or facts.backing_off or facts.paced:
        return 0.0
    ages = [facts.uptime_s, facts.oldest_age_s, facts.asked_age_s]
    return max(0.0, min(age for age in ages if age is not None) - facts.pause_s)
