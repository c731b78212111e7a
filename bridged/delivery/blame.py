"""Whose fault it is: what a request is told may be meant for what is in it, or for everybody. No clock, no waiting.

A sick proxy refuses whatever passes, and a rule of one refuses a single event for ever: the answers are the same. The
difference is whether others are taken. A parcel that is told something again, although a request that left after the
last time was taken, has a strike:

    Split   its halves are tried; a single event is set aside, and given up (a dead letter) after eight strikes of
            this kind
    Retry   the same again; after two strikes its halves, a single event is set aside for ever: what fails isn't given up
    Halt    everything stops; after one strike as for Split, if the status can be about what is in a request

While nothing is taken at all what fails is split too, but only between its segments, which costs nothing: it may be too
large for something on the way, as everything else then is.
"""

import math
from typing import Final, Literal

from bridged.backlog.backlog import Parcel
from bridged.mixpanel.verdicts import Halt, Retry, Split

Fate = Literal["again", "split", "aside", "give up", "halt"]

STRIKES_TO_SPLIT: Final = 2
REFUSALS_TO_GIVE_UP: Final = 8
FAILURES_TO_SPLIT: Final = 5  # in a row
# A single event waits so long before it may ask again, and with each strike twice as long.
_ASIDE_S: Final = 5.0
# About who sends, and not what: the credential, the plan, a proxy's credential, and what is no answer at all.
_ABOUT_ALL: Final = frozenset({0, 401, 402, 407})


class Blame:
    """Knows when the latest request left that was taken, and what failed since. The parcels hold their own histories."""

    def __init__(self) -> None:
        self._taken_at = -math.inf
        self._failures = 0  # in a row

    def taken(self, sent_at: float) -> None:
        """A request that left then was taken, in whole or in part. Loop time."""
        self._taken_at = max(self._taken_at, sent_at)
        self._failures = 0

    def fate(self, parcel: Parcel, verdict: Split | Retry | Halt, now: float, *, halted: bool) -> Fate:
        """Notes in its history that a parcel was tried in vain, and says what becomes of it."""
        if isinstance(verdict, Retry) and verdict.kind == "rate":
            return "again"
        parcel.attempts += 1
        if parcel.in_vain_at is not None and self._taken_at > parcel.in_vain_at:
            parcel.strikes += 1
            parcel.refusals += not isinstance(verdict, Retry)
        parcel.in_vain_at = now
        parcel.in_vain_since = now if parcel.in_vain_since is None else parcel.in_vain_since
        self._failures += isinstance(verdict, Retry)
        fate = self._fate(parcel, verdict, halted=halted)
        if fate == "split":
            parcel.strikes = min(parcel.strikes, 1)  # its halves are told apart sooner than it was, but each for itself
        return fate

    def _fate(self, parcel: Parcel, verdict: Split | Retry | Halt, *, halted: bool) -> Fate:
        single = parcel.events == 1
        match verdict:
            case Retry() if parcel.strikes >= STRIKES_TO_SPLIT:
                return "aside" if single else "split"
            case Retry():
                return "split" if self._failures >= FAILURES_TO_SPLIT and len(parcel.segments) > 1 else "again"
            case Halt() if halted or not parcel.strikes or verdict.status in _ABOUT_ALL:
                return "halt"
        if not single:
            return "split"
        if isinstance(verdict, Split) and verdict.too_large and parcel.raw_bytes > (verdict.max_bytes or math.inf):
            return "give up"  # the limit that was named is proof enough
        return "aside" if halted or parcel.refusals < REFUSALS_TO_GIVE_UP else "give up"


def aside_s(parcel: Parcel, most_s: float) -> float:
    """How long a single event waits before it may ask again."""
    return min(_ASIDE_S * 2.0 ** min(parcel.strikes, 10), most_s)
