"""Whose fault it is: what a request is told may be meant for what is in it, or for everybody. No clock, no waiting.

A sick proxy refuses whatever passes, and a rule of one refuses a single event for ever: the answers are the same. The
difference is whether others are taken. A parcel that is told something again, although a request that left after the
last time was taken, has a strike:

    Split   its halves are tried; a single event is set aside, and given up (a dead letter) after six strikes of
            this kind
    Retry   the same again; after two strikes its halves, a single event is set aside for ever: what fails isn't given up
    Halt    everything stops; after one strike as for Split, if the status can be about what is in a request

While nothing is taken at all what fails is split too, between its segments, which costs nothing: it may be too large for
something on the way, as everything else then is. After a while segments are cut as well, to see, one of them down to a
single event: each may hold an event that fails. So after minutes of 429: one request may hold more than a minute's limit.

Where a part of what failed is taken, and nothing that failed comes through as it is, many requests hold something that
fails: for a moment each that fails is split at once, a single event set aside. Where many fail at random, two strikes are
no proof: as long as some of what failed comes through as it is, so many are needed that chance explains them no more.
"""

import math
from typing import Final, Literal

from bridged.backlog.backlog import Parcel
from bridged.mixpanel.verdicts import Delivered, Halt, Reject, Retry, Split, Verdict

Fate = Literal["again", "split", "aside", "give up", "halt"]

_STRIKES_TO_SPLIT: Final = 2
_MOST_STRIKES_TO_SPLIT: Final = 20
_BY_CHANCE: Final = 0.02  # what has so small a chance to fail so often fails for what is in it
_APART_S: Final = 15.0  # so long the success of a part says that others fail for what is in them, too
_LATEST: Final = 0.05  # how much the latest answer counts among those before it
_REFUSALS_TO_GIVE_UP: Final = 6
_FAILURES_TO_SPLIT: Final = 5  # in a row
_FAILURES_TO_CUT: Final = 20
_FAILURES_IN_AN_OUTAGE: Final = 40
# Of requests in a row. A poison event among 2,000 is alone after some 22, half of which are understood in between; but after a
# restart some hundreds that are set aside may stand side by side, and are told apart anew.
_REFUSALS_OF_ALL: Final = 500
SMALLEST_CAP_BYTES: Final = 16 * 1024  # what is smaller isn't too large
_REMEMBERED_S: Final = 600.0
# Of 429 alone, more than two of Mixpanel's minutes: no room was ever in one of them for a request of this size.
_LIMITED_S: Final = 180.0
_DOUBT_S: Final = 120.0
_CUTS: Final = 12  # then one more for as many failures
# A single event waits so long before it may ask again, and with each strike twice as long.
_ASIDE_S: Final = 5.0
# About who sends, and not what: the credential, the plan, a proxy's credential, and what is no answer at all.
_ABOUT_ALL: Final = frozenset({0, 401, 402, 407})


class Blame:
    """Knows when the latest request left that was taken, and what failed since. The parcels hold their own histories."""

    def __init__(self) -> None:
        self._taken_at = -math.inf
        self._failures = 0  # in a row
        self._cuts = 0  # of segments, meanwhile, that were not smaller than those before
        self._smallest = math.inf  # events of what was cut
        self._refusals = 0  # in a row
        self._limited_since: float | None = None  # loop time of the first 429 since something was taken
        self._about_content: dict[int, float] = {}  # by status: loop time until which it is taken for that
        self._failing = 0.0  # share of what is sent for the first time
        self._passing = 0.0  # share of what failed before, and is sent again as it is, that is taken
        self._apart_at = -math.inf  # loop time at which a part of what had failed was taken

    def heard(self, parcel: Parcel, verdict: Verdict, now: float) -> None:
        """How failures come: to any request, or to the same ones again. Single events that are set aside have been told apart."""
        if not isinstance(verdict, Delivered | Reject | Retry) or parcel.due_at or _is_rate(verdict):
            return
        failed = isinstance(verdict, Retry)
        if parcel.again:
            self._passing += _LATEST * ((not failed) - self._passing)
        elif not parcel.attempts:
            self._failing += _LATEST * (failed - self._failing)
        elif not failed:
            self._apart_at = now

    def _tells_apart(self, verdict: Verdict, now: float) -> bool:
        """Whether what failed is split at once. Not what hangs: that is sooner told with many others than each for itself.

        Nor when so many have failed in a row: what came through meanwhile was a gap in an outage.
        """
        answered = isinstance(verdict, Retry) and verdict.kind == "server" and self._failures < _FAILURES_IN_AN_OUTAGE
        return answered and now - self._apart_at < _APART_S and self._passing < _BY_CHANCE

    def _strikes_to_split(self) -> int:
        if self._passing < _BY_CHANCE or self._failing < _BY_CHANCE:
            return _STRIKES_TO_SPLIT
        needed = math.ceil(math.log(_BY_CHANCE) / math.log(min(self._failing, 0.99)))
        return min(max(needed, _STRIKES_TO_SPLIT), _MOST_STRIKES_TO_SPLIT)

    def taken(self, sent_at: float) -> None:
        """A request that left then was taken, in whole or in part. Loop time."""
        self._taken_at = max(self._taken_at, sent_at)
        self._failures = self._cuts = self._refusals = 0
        self._smallest = math.inf
        self._limited_since = None

    @property
    def all_refused(self) -> bool:
        """Whether no single poison event explains it any more: something refuses everything, and would make it dead letters."""
        return self._refusals >= _REFUSALS_OF_ALL

    def spares_others(self, parcel: Parcel, verdict: Verdict, now: float) -> bool:
        """Whether a failure is no reason for others to wait: it is about what is in the request.

        A scout comes back as it is, whatever is told apart: at a pace, then.
        """
        return self._is_its_own(parcel, verdict) or (self._tells_apart(verdict, now) and not parcel.scout)

    def _is_its_own(self, parcel: Parcel, verdict: Verdict) -> bool:
        """Whether others, that left after it was last tried in vain, were taken: the road is well, then."""
        return not _is_rate(verdict) and parcel.in_vain_at is not None and self._taken_at > parcel.in_vain_at

    def fate(self, parcel: Parcel, verdict: Split | Retry | Halt, now: float, *, halted: bool) -> Fate:
        """Notes in its history that a parcel was tried in vain, and says what becomes of it."""
        parcel.attempts += 1
        parcel.again = True
        if parcel.scout and not isinstance(verdict, Halt):
            return "again"
        if isinstance(verdict, Retry) and verdict.kind == "rate":
            self._limited_since = now if self._limited_since is None else self._limited_since
            if now - self._limited_since < _LIMITED_S:
                return "again"
            self._failures = max(self._failures, _FAILURES_TO_CUT)
        else:
            self._limited_since = None
        if self._is_its_own(parcel, verdict):
            parcel.strikes += 1
            parcel.refusals += not isinstance(verdict, Retry)
        parcel.in_vain_at = now
        parcel.in_vain_since = now if parcel.in_vain_since is None else parcel.in_vain_since
        self._failures += isinstance(verdict, Retry)
        fate = self._fate(parcel, verdict, now, halted=halted)
        # What was set aside asks again and again, and is no further proof.
        if not isinstance(verdict, Retry) and fate != "halt" and not (too_large(parcel, verdict) or parcel.due_at):
            self._refusals += 1
        if fate == "split":
            parcel.strikes = min(parcel.strikes, 1)  # its halves are told apart sooner than it was, but each for itself
        return fate

    def _fate(self, parcel: Parcel, verdict: Split | Retry | Halt, now: float, *, halted: bool) -> Fate:
        single = parcel.events == 1
        match verdict:
            case Retry() if parcel.strikes >= self._strikes_to_split():
                return "aside" if single else "split"
            case Retry() if self._tells_apart(verdict, now):
                # A single event can't be told apart any further; as it is, it would be asked for as fast as it fails.
                parcel.strikes = max(parcel.strikes, 1)
                return "aside" if single else "split"
            case Retry() if self._passing >= _BY_CHANCE and not _is_rate(verdict):
                return "again"  # it can't be too large: such as it come through
            case Retry() if len(parcel.segments) > 1:
                return "split" if self._failures >= _FAILURES_TO_SPLIT else "again"
            case Retry():
                return "again" if single or not self._spends_a_cut(parcel) else "split"
            case Halt() if halted or verdict.status in _ABOUT_ALL:
                return "halt"
            case Halt():
                # Once a status was about what is in a request, the next one is first taken for the same, while others are taken.
                known = now <= self._about_content.get(verdict.status, -math.inf) and now - self._taken_at < _DOUBT_S
                if not (parcel.strikes or known):
                    return "halt"
                self._about_content[verdict.status] = now + _REMEMBERED_S
        if not single:
            return "split"
        if isinstance(verdict, Split) and verdict.too_large and parcel.raw_bytes > (verdict.max_bytes or math.inf):
            return "give up"  # the limit that was named is proof enough
        return "aside" if halted or parcel.refusals < _REFUSALS_TO_GIVE_UP else "give up"

    def _spends_a_cut(self, parcel: Parcel) -> bool:
        """Whether a segment is cut, to see: one down to a single event, some others, and then another for as many failures."""
        beyond = self._failures - _FAILURES_TO_CUT
        if beyond < 0:
            return False
        if parcel.events < self._smallest:
            self._smallest = parcel.events
            return True
        if self._cuts >= _CUTS + beyond // _FAILURES_TO_CUT:
            return False
        self._cuts += 1
        return True


def _is_rate(verdict: Verdict) -> bool:
    return isinstance(verdict, Retry) and verdict.kind == "rate"


def too_large(parcel: Parcel, verdict: Split | Retry | Halt) -> bool:
    """Whether it is refused for its size, and not for what is in it."""
    is_large = parcel.raw_bytes >= SMALLEST_CAP_BYTES and parcel.events > 1
    return isinstance(verdict, Split) and verdict.too_large and is_large


def why_refused(parcel: Parcel, verdict: Split | Retry | Halt) -> str:
    """Why something is split, set aside or given up. A halt's advice is for when everything is refused: here others pass."""
    if not (isinstance(verdict, Halt) and verdict.said):
        return verdict.reason
    what = "this event alone" if parcel.events == 1 else "something in this request"
    return f"{verdict.status}: Mixpanel, or something before it, refuses {what}, and takes others {verdict.said}"


def aside_s(parcel: Parcel, verdict: Split | Retry | Halt, probe_interval_s: float) -> float:
    """How long a single event waits before it may ask again. What fails is asked for ever, and so less often in the end."""
    most_s = 10 * probe_interval_s if isinstance(verdict, Retry) else probe_interval_s
    return min(_ASIDE_S * 2.0 ** min(parcel.strikes, 10), most_s)
