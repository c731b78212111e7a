"""How fast to send: two control loops and one shared backoff, fed by the verdicts. Pure: `now` is monotonic seconds.

The *rate gate* answers what a limit per rolling minute does: nothing happens until the window is spent, then every
request gets a 429. Two token buckets (events, uncompressed bytes) run at 97 % of the ceilings and are at most one
second deep, since a burst fills the window and is followed by a standstill, and comes back as an echo each time the
window has turned. A 429 tells the limit: W, the smaller of the rate and what was delivered in the last 60 s. The rate
falls to 0.9 W and follows a cubic back to W and a little above it, plus a constant, but no further: a faster rate only
burns the room that was left in the window. A window that holds more than W and brings no 429 is the proof that the
limit has grown, or another client has gone; then, or after a whole window without a 429, the rate hunts upward by a
fifth per second. A rate that only replaces what leaves the window, the echo of a minute ago, never gets to that proof:
late on the curve it is a fifth of W above what leaves.

The *concurrency gate* answers what an overloaded server does: latency grows, then requests fail. Slow start, then
additive increase while the limit is what holds us back; a decrease for an attempt whose latency leaves the band of its
mean and deviation, and a halving for timeouts, resets and 5xx.

The *backoff* is shared: one schedule, not one per request. While it lasts nothing is sent; then one single attempt, the
probe, decides between going on and a longer backoff. After a 429 it lasts at least until the window has room again by
our own count of it, so the probe isn't wasted.

An *epoch* ends with each cut. An attempt that started before the last cut says nothing about the rate after it, so it
can't cut again: of twenty attempts that meet the same wall, one counts.

Each constant was chosen on the simulated links in tests/links, where its neighbours do about as well.
"""

import math
import random
from collections import deque
from itertools import takewhile
from typing import Final, Literal, TypeAlias

import msgspec

from bridged.mixpanel.verdicts import RETRY_AFTER_CAP_S, Delivered, Halt, Reject, Retry, Split, Verdict

WINDOW_S: Final = 60.0  # Mixpanel's limit is one of a rolling minute

# The rate gate.
CEILING_SHARE: Final = 0.97  # the server's clock and the edges of its window are not ours
BUCKET_DEPTH_S: Final = 1.0
CUT: Final = 0.9
CUT_AT_MOST: Final = 0.5  # while our own count doesn't explain the 429
UNUSED_SHARE: Final = 0.25  # of the rate; below it our own count doesn't explain it
PLATEAU_S: Final = 8.0  # when the cubic is back at W
OVERSHOOT: Final = 1.1
# What is added on the way up, whatever W is: of two daemons on one project, the one with less gains more by it.
ADDED_EVENTS_PER_SECOND: Final = 1200.0
ADDED_SHARE: Final = 0.25  # of W, at most
ADDED_AFTER_S: Final = 16.0
REFILL_AFTER_S: Final = 13.0  # late on the curve: the window gets more than leaves it, so that it comes to W
REFILL_SHARE: Final = 0.2  # of W, so much more
REFILL_AT_MOST: Final = 1.6  # of W; a burst of a minute ago isn't repeated
EVIDENCE_AFTER_S: Final = 5.0  # what the window holds right after a cut is no news
HUNT_PER_S: Final = 1.2
FLOOR_EVENTS_PER_SECOND: Final = 600.0  # no cut goes below it; a real limit below it is kept by the backoff alone

# The backoff.
BACKOFF_BASE_S: Final = 2.0
BACKOFF_CAP_S: Final = 20.0  # one batch every ten seconds or so harms nobody, and shortens the way back
ROOM_BATCHES: Final = 2.0
OUTAGE_FAILURES: Final = 3  # so many in a row, without one answer between, are an outage; fewer are noise

# The concurrency gate.
START_CONCURRENCY: Final = 4
SLOW_START_TO: Final = 10
FAILURE_DECREASE: Final = 0.5
LATENCY_DECREASE: Final = 0.9
LATENCY_ALPHA: Final = 0.1
LATENCY_DEVIATIONS: Final = 3.0
LATENCY_FLOOR_S: Final = 0.1  # no smaller step above the mean is a sign of anything
LATENCY_WARM_UP: Final = 10

LONGEST_WAIT_S: Final = 1.0  # a wait for tokens is asked again at least so often, because the rate grows meanwhile
SHORTEST_WAIT_S: Final = 0.001

LimitedBy: TypeAlias = Literal["nothing", "rate", "concurrency", "backoff", "probe"]


class PaceLimits(msgspec.Struct, frozen=True):
    """The ceilings; 0 or infinity is no ceiling."""

    max_events_per_second: float = 30_000
    max_bytes_per_minute: float = 2e9
    max_concurrency: int = 20


class PaceSnapshot(msgspec.Struct, frozen=True):
    """What the pace does at one moment, for /metrics and the status. A limit that isn't there is infinite."""

    limited_by: LimitedBy
    reason: str  # of the backoff that lasts; empty when there is none
    events_per_second_limit: float
    bytes_per_second_limit: float
    delivered_per_second: float  # over the last 60 seconds
    concurrency_limit: int
    in_flight: int
    backing_off_s: float
    latency_s: float
    rate_limited_total: int
    server_errors_total: int
    network_errors_total: int
    rate_cuts_total: int
    concurrency_cuts_total: int
    backoffs_total: int


class Attempt:
    """One request on its way; opaque, ended by `Pace.judged` exactly once."""

    __slots__ = ("ended", "events", "hold_epoch", "is_probe", "load_epoch", "rate_epoch", "started")

    def __init__(self, started: float, events: int, rate_epoch: int, load_epoch: int, hold_epoch: int) -> None:
        self.started: Final = started
        self.events: Final = events
        self.rate_epoch: Final = rate_epoch
        self.load_epoch: Final = load_epoch
        self.hold_epoch: Final = hold_epoch
        self.is_probe = False
        self.ended = False


class Pace:
    """Says when the next request may go. One owner, the delivery: ask `wait_s`, tell `sent` and `judged`."""

    def __init__(self, limits: PaceLimits, rng: random.Random) -> None:
        self._rate = _RateGate(limits)
        self._load = _ConcurrencyGate(limits)
        self._hold = _Hold(rng)
        self._in_flight = 0
        # In a row, of attempts that were sent since the last backoff began.
        self._failures = 0
        self._limited_by: LimitedBy = "nothing"
        self._rate_limited_total = 0
        self._server_errors_total = 0
        self._network_errors_total = 0

    def limit_to(self, limits: PaceLimits) -> None:
        """Other ceilings from now on; what was learned below them stays."""
        self._rate.limit_to(limits)
        self._load.ceiling = max(1, limits.max_concurrency)
        self._load.limit = min(self._load.limit, float(self._load.ceiling))

    def ask_again(self, at: float) -> None:
        """A probe may go then, whoever named a later time: it was somebody else, or told somebody else."""
        self._hold.until = min(self._hold.until, at)

    @property
    def limited_by(self) -> LimitedBy:
        """What the last answer of `wait_s` was due to."""
        return self._limited_by

    @property
    def concurrency(self) -> int:
        """How many requests may be in flight."""
        return int(self._load.limit)

    def wait_s(self, now: float, events: int, bytes_: int) -> float:
        """0.0: send now. Finite: ask again after so many seconds. Infinite: ask again after an answer has come."""
        concurrency = int(self._load.limit)
        if self._hold.is_on:
            if now < self._hold.until:
                self._limited_by = "backoff"
                return max(self._hold.until - now, SHORTEST_WAIT_S)
            if self._hold.probe is not None:
                self._limited_by = "probe"
                return math.inf
            # Attempts from before the backoff may hang until they time out; the probe doesn't wait for them.
            concurrency = self._load.ceiling
        if self._in_flight >= concurrency:
            self._limited_by = "concurrency"
            return math.inf
        wait_s = self._rate.wait_s(now, events, bytes_)
        if wait_s > 0.0:
            self._limited_by = "rate"
            return min(max(wait_s, SHORTEST_WAIT_S), LONGEST_WAIT_S)
        self._limited_by = "nothing"
        return 0.0

    def sent(self, now: float, events: int, bytes_: int) -> Attempt:
        """Note a request that goes out now. It is spent whatever the answer, since refused requests count as well."""
        self._rate.spend(now, events, bytes_)
        self._in_flight += 1
        attempt = Attempt(now, events, self._rate.epoch, self._load.epoch, self._hold.epoch)
        if self._in_flight >= int(self._load.limit):
            self._load.reached_at = now
        if self._hold.is_on and self._hold.probe is None:
            attempt.is_probe = True
            self._hold.probe = attempt
        return attempt

    def judged(self, now: float, attempt: Attempt, verdict: Verdict | None) -> None:
        """Learn from the answer to an attempt, and end it. None: it was about that request alone."""
        if attempt.ended:
            raise ValueError("an attempt is judged exactly once")
        attempt.ended = True
        self._in_flight -= 1
        if self._hold.probe is attempt:
            self._hold.probe = None
        match verdict:
            case Retry():
                self._learn_from_retry(now, attempt, verdict)
            case Delivered() | Reject() | Split():
                self._learn_from_answer(now, attempt, verdict)
            case Halt() | None:
                # Says nothing about rate or load. Whoever stops for it also asks again, at long intervals.
                pass

    def snapshot(self, now: float) -> PaceSnapshot:
        """Describe the pace at this moment."""
        hold = self._hold
        return PaceSnapshot(
            limited_by="probe" if hold.probe is not None else self._limited_by,
            reason=hold.reason,
            events_per_second_limit=self._rate.rate(now),
            bytes_per_second_limit=self._rate.bytes_ceiling,
            delivered_per_second=self._rate.window.per_second(now),
            concurrency_limit=int(self._load.limit),
            in_flight=self._in_flight,
            backing_off_s=max(0.0, hold.until - now) if hold.is_on else 0.0,
            latency_s=self._load.latency_s,
            rate_limited_total=self._rate_limited_total,
            server_errors_total=self._server_errors_total,
            network_errors_total=self._network_errors_total,
            rate_cuts_total=self._rate.epoch,
            concurrency_cuts_total=self._load.epoch,
            backoffs_total=hold.epoch,
        )

    def _learn_from_answer(self, now: float, attempt: Attempt, verdict: Delivered | Reject | Split) -> None:
        """The server is there and has looked at the request."""
        self._failures = 0
        if not isinstance(verdict, Split):
            # Refused events count against the limit like those that are in.
            self._rate.window.add(now, attempt.events)
        if self._hold.is_on and attempt.hold_epoch == self._hold.epoch and now >= self._hold.until:
            self._rate.resume(now)
            self._load.resume()
            self._hold.end()
        if isinstance(verdict, Delivered):
            self._load.learn(now - attempt.started, attempt)

    def _learn_from_retry(self, now: float, attempt: Attempt, verdict: Retry) -> None:
        if verdict.kind == "rate":
            self._rate_limited_total += 1
            if attempt.rate_epoch == self._rate.epoch:
                self._rate.cut(now, attempt)
                window = self._rate.window
                is_whole = window.age_s(now) >= WINDOW_S
                room_s = window.room_in_s(now, ROOM_BATCHES * attempt.events) if is_whole else 0.0
                self._hold.begin(now, verdict.reason, at_least_s=min(room_s, BACKOFF_CAP_S))
        else:
            if verdict.kind == "server":
                self._server_errors_total += 1
            else:
                self._network_errors_total += 1
            if attempt.load_epoch == self._load.epoch:
                self._load.cut(FAILURE_DECREASE)
            if attempt.hold_epoch == self._hold.epoch:
                self._failures += 1
                if attempt.is_probe or self._failures >= OUTAGE_FAILURES:
                    self._hold.begin(now, verdict.reason)
        if verdict.after_s:
            # The server named a time: nothing goes before it, whichever attempt was told.
            self._hold.extend(now, min(verdict.after_s, RETRY_AFTER_CAP_S), verdict.reason)


class _RateGate:
    """The rate of events and bytes, and what it learns from a 429."""

    def __init__(self, limits: PaceLimits) -> None:
        self._set_ceilings(limits)
        self.window: Final = _Window()
        self.epoch = 0
        self._events: Final = _Bucket()
        self._bytes: Final = _Bucket()
        # W, and when its curve began; None: no cut, or the curve has reached the ceiling.
        self._plateau = self.ceiling
        self._began: float | None = None
        # The age of the curve at which the hunt began.
        self._hunt_from_s: float | None = None
        # From a cut to the probe that comes through, the curve stands at its beginning.
        self._is_frozen = False
        self._failed_probes = 0

    def _set_ceilings(self, limits: PaceLimits) -> None:
        self.ceiling = _ceiling(limits.max_events_per_second)
        self.bytes_ceiling = _ceiling(limits.max_bytes_per_minute / 60.0)
        self._floor = min(self.ceiling, FLOOR_EVENTS_PER_SECOND)

    def limit_to(self, limits: PaceLimits) -> None:
        """Other ceilings from now on; what was learned below them stays."""
        self._set_ceilings(limits)
        self._plateau = min(self._plateau, self.ceiling)

    def rate(self, now: float) -> float:
        """Events per second that are allowed now, by the time since the last cut and by what the window holds."""
        if self._is_frozen:
            return max(CUT * self._plateau, self._floor)
        if self._began is None:
            return self.ceiling
        age_s = now - self._began
        if self._hunt_from_s is None and (
            age_s >= WINDOW_S or (age_s >= EVIDENCE_AFTER_S and self.window.per_second(now) > self._plateau)
        ):
            self._hunt_from_s = age_s
        grown_s = age_s if self._hunt_from_s is None else self._hunt_from_s
        cubic = 1.0 + (1.0 - CUT) * ((grown_s - PLATEAU_S) / PLATEAU_S) ** 3
        added = min(ADDED_EVENTS_PER_SECOND, ADDED_SHARE * self._plateau) * min(grown_s / ADDED_AFTER_S, 1.0)
        rate = self._plateau * min(cubic, OVERSHOOT) + added
        if grown_s >= REFILL_AFTER_S:
            refill = self.window.leaving_per_second(now) + REFILL_SHARE * self._plateau
            rate = max(rate, min(refill, REFILL_AT_MOST * self._plateau))
        if self._hunt_from_s is not None:
            # The bound keeps the power finite; long before it every ceiling is passed.
            rate *= HUNT_PER_S ** min(age_s - self._hunt_from_s, 1000.0)
        if rate >= min(self.ceiling, 1e12):
            self._began = None
            return self.ceiling
        return max(rate, self._floor)

    def wait_s(self, now: float, events: int, bytes_: int) -> float:
        self._fill(now)
        return max(self._events.wait_s(events), self._bytes.wait_s(bytes_))

    def spend(self, now: float, events: int, bytes_: int) -> None:
        self._fill(now)
        self._events.spend(events)
        self._bytes.spend(bytes_)

    def cut(self, now: float, attempt: Attempt) -> None:
        """Set W. A failed probe says that the window is still full, and nothing about a rate that wasn't in use."""
        reference = self._plateau if self._is_frozen else self.rate(now)
        self._failed_probes = self._failed_probes + 1 if self._is_frozen and attempt.is_probe else 0
        held = self.window.per_second(now)
        age_s = self.window.age_s(now)
        if age_s < WINDOW_S or held < reference * UNUSED_SHARE:
            # Our own count isn't a whole window old, or we used little of the rate: others have filled the window.
            used = reference if math.isfinite(reference) else held * WINDOW_S / max(age_s, 1.0)
            held = max(held, used * CUT_AT_MOST)
        self._plateau = max(min(reference, held), self._floor)
        self._is_frozen = True
        self.epoch += 1

    def resume(self, now: float) -> None:
        """Go on after a backoff, without the tokens that were saved up meanwhile."""
        self._fill(now)
        self._events.drain()
        self._bytes.drain()
        if not self._is_frozen:
            return
        if self._failed_probes:
            # The limit lies between what the window held at the last probe that failed, and what it holds now.
            held = self.window.per_second(now)
            self._plateau = max((self._plateau + min(held, self._plateau)) / 2, self._floor)
        self._is_frozen = False
        self._began = now
        self._hunt_from_s = None

    def _fill(self, now: float) -> None:
        self._events.fill(now, self.rate(now))
        self._bytes.fill(now, self.bytes_ceiling)


class _ConcurrencyGate:
    """How many attempts may be in flight, and what it learns from latency and failures."""

    def __init__(self, limits: PaceLimits) -> None:
        self.ceiling = max(1, limits.max_concurrency)
        # The additive increase adds fractions; only the whole part counts.
        self.limit = float(min(START_CONCURRENCY, self.ceiling))
        # When the limit was last full. A success raises it only if that was so while the attempt was on its way.
        self.reached_at = -math.inf
        self.epoch = 0
        self.latency_s = 0.0
        self._deviation_s = 0.0
        self._samples = 0
        self._slow_start_to: float = SLOW_START_TO

    def learn(self, latency_s: float, attempt: Attempt) -> None:
        """Take a success: raise the limit where it was reached, lower it where the latency leaves its band."""
        band_s = max(LATENCY_DEVIATIONS * self._deviation_s, LATENCY_FLOOR_S)
        is_slow = self._samples >= LATENCY_WARM_UP and latency_s > self.latency_s + band_s
        if self._samples == 0:
            self.latency_s, self._deviation_s = latency_s, latency_s / 2
        else:
            error_s = latency_s - self.latency_s
            self.latency_s += LATENCY_ALPHA * error_s
            self._deviation_s += LATENCY_ALPHA * (abs(error_s) - self._deviation_s)
        self._samples += 1
        if is_slow:
            if attempt.load_epoch == self.epoch:
                self.cut(LATENCY_DECREASE)
        elif attempt.started <= self.reached_at:
            step = 1.0 if self.limit < self._slow_start_to else 1.0 / self.limit
            self.limit = min(self.limit + step, float(self.ceiling))

    def cut(self, factor: float) -> None:
        self.limit = max(1.0, self.limit * factor)
        self._slow_start_to = self.limit
        self.epoch += 1

    def resume(self) -> None:
        """After an outage the way back up is a slow start again."""
        self._slow_start_to = SLOW_START_TO


class _Hold:
    """The shared backoff: nothing goes before `until`, and then only the probe."""

    def __init__(self, rng: random.Random) -> None:
        self.is_on = False
        self.until = 0.0
        self.reason = ""
        self.epoch = 0
        self.probe: Attempt | None = None
        self._rng = rng
        self._bound_s = BACKOFF_BASE_S

    def begin(self, now: float, reason: str, at_least_s: float = 0.0) -> None:
        """Stop for a while: full jitter under a bound that doubles with each failed probe."""
        wait_s = max(self._rng.uniform(0.0, self._bound_s), at_least_s)
        self._bound_s = min(2.0 * self._bound_s, BACKOFF_CAP_S)
        self.until = max(self.until, now + wait_s)
        self.is_on = True
        self.reason = reason
        self.epoch += 1

    def extend(self, now: float, wait_s: float, reason: str) -> None:
        if not self.is_on:
            self.is_on = True
            self.reason = reason
            self.epoch += 1
        self.until = max(self.until, now + wait_s)

    def end(self) -> None:
        self.is_on = False
        self.reason = ""
        self._bound_s = BACKOFF_BASE_S


class _Bucket:
    """Tokens that come at a rate. It may go into debt, so that a batch that is larger than the bucket passes."""

    def __init__(self) -> None:
        self._rate = math.inf
        self._tokens = 0.0
        self._filled_at: float | None = None

    def fill(self, now: float, rate: float) -> None:
        depth = rate * BUCKET_DEPTH_S
        if self._filled_at is None:
            self._tokens = depth
        elif math.isinf(self._rate) and not math.isinf(rate):
            self._tokens = 0.0
        elif not math.isinf(rate):
            self._tokens = min(self._tokens + max(0.0, now - self._filled_at) * rate, depth)
        self._rate = rate
        self._filled_at = now

    def wait_s(self, cost: float) -> float:
        if math.isinf(self._rate):
            return 0.0
        missing_s = min(cost / self._rate, BUCKET_DEPTH_S) - self._tokens / self._rate
        return missing_s if missing_s > 1e-6 else 0.0

    def spend(self, cost: float) -> None:
        if not math.isinf(self._rate):
            self._tokens -= cost

    def drain(self) -> None:
        self._tokens = min(self._tokens, 0.0)


class _Window:
    """Our own count of Mixpanel's window: events of the last 60 seconds, in slots of a quarter of a second."""

    _SLOT_S: Final = 0.25
    _LEAVING_S: Final = 2.0

    def __init__(self) -> None:
        self._slots: deque[tuple[int, int]] = deque()
        self._began: float | None = None
        self._total = 0

    def add(self, now: float, events: int) -> None:
        if self._began is None:
            self._began = now
        slot = math.floor(now / self._SLOT_S)
        if self._slots and self._slots[-1][0] == slot:
            events_before = self._slots.pop()[1]
            self._slots.append((slot, events_before + events))
        else:
            self._slots.append((slot, events))
        self._total += events

    def age_s(self, now: float) -> float:
        """How long it has been counting."""
        return 0.0 if self._began is None else now - self._began

    def per_second(self, now: float) -> float:
        self._expire(now)
        return self._total / WINDOW_S

    def leaving_per_second(self, now: float) -> float:
        """Events per second that leave it in the next two seconds."""
        self._expire(now)
        last = math.floor((now + self._LEAVING_S - WINDOW_S) / self._SLOT_S)
        return sum(events for _, events in takewhile(lambda slot: slot[0] <= last, self._slots)) / self._LEAVING_S

    def room_in_s(self, now: float, events: float) -> float:
        """Seconds until so many events have left the window; 0 when there are fewer in it."""
        self._expire(now)
        for slot, count in self._slots:
            events -= count
            if events <= 0:
                return max(0.0, (slot + 1) * self._SLOT_S + WINDOW_S - now)
        return 0.0

    def _expire(self, now: float) -> None:
        oldest = math.floor((now - WINDOW_S) / self._SLOT_S)
        while self._slots and self._slots[0][0] <= oldest:
            self._total -= self._slots.popleft()[1]


def _ceiling(limit: float) -> float:
    return limit * CEILING_SHARE if 0.0 < limit < math.inf else math.inf
