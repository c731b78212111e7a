"""A model of Mixpanel and its rolling minute on a virtual clock, and a sender with an endless backlog on it.

The simulation is a heap of events in virtual time: no clock, no sleep, ten minutes in a tenth of a second. The links it
runs on are the scenarios in tests/links, each with what is expected of it. `bench pace` runs them on many seeds, and the
tests on a few.
"""

import heapq
import math
import random
import tomllib
from collections import deque
from itertools import count, pairwise
from pathlib import Path
from typing import Final

import msgspec

from bridged.delivery.pacing import Attempt, Pace, PaceLimits
from bridged.mixpanel.verdicts import Delivered, Retry, Verdict

LINKS: Final = Path(__file__).resolve().parents[1] / "tests" / "links"
BATCH: Final = 2000  # events of a request
RATE_LIMITED: Final = Retry("rate", "429")
FAILED: Final = Retry("server", "503")


class Phase(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the server is like from one moment on."""

    from_s: float
    limit: float = 30_000.0  # events per second, over a rolling minute
    others: float = 0.0  # events per second that other clients take from the same limit, before us
    failing: float = 0.0  # share of the requests that end in a 503
    latency_factor: float = 1.0
    knee: int = 0  # requests in service at once, the others wait for their turn; 0: any number
    down: str = ""  # "refused": every connection fails at once; "hang": every request times out


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A simulated Mixpanel, and what the pace must make of it."""

    title: str
    expectation: str
    phases: list[Phase]
    expect: dict[str, tuple[float, float]]
    duration_s: float = 600.0
    warm_up_s: float = 120.0
    latency_s: float = 0.25
    latency_sigma: float = 0.4
    timeout_s: float = 10.0
    counts_refused: bool = False  # requests that get a 429 take their share of the window too
    bytes_per_event: int = 500
    recovers_at_s: list[float] = []
    limits: PaceLimits = PaceLimits()

    def phase(self, now: float) -> Phase:
        """The phase that is on at a moment."""
        return next(phase for phase in reversed(self.phases) if phase.from_s <= now)

    def allowed(self, now: float) -> float:
        """Events per second that the server would take from us."""
        phase = self.phase(now)
        if phase.down:
            return 0.0
        rate = max(0.0, phase.limit - phase.others)
        if phase.knee:
            mean_s = self.latency_s * phase.latency_factor * math.exp(self.latency_sigma**2 / 2)
            rate = min(rate, phase.knee / mean_s * BATCH)
        return rate * (1.0 - phase.failing)


class Outcome(msgspec.Struct, frozen=True):
    """What a run came to after its warm-up; each field may have a range in the link's expectations."""

    delivered_share: float
    rate_limited_share: float
    longest_gap_s: float
    recovery_s: float
    max_in_flight: float


class Server:
    """Mixpanel's limit: so many events in any 60 seconds."""

    def __init__(self, link: Link, rng: random.Random) -> None:
        self._link = link
        self._rng = rng
        self._window: deque[tuple[float, float]] = deque()
        self._content = 0.0
        self._others_at = 0.0
        self._busy: list[float] = []

    def answer(self, now: float) -> tuple[float, Verdict]:
        """Seconds until the answer to a batch that is sent now, and what it says."""
        link, phase = self._link, self._link.phase(now)
        if phase.down == "refused":
            return 0.01, Retry("network", "refused")
        if phase.down == "hang":
            return link.timeout_s, Retry("network", "timeout")
        self._let_others_send(now)
        latency_s = link.latency_s * phase.latency_factor * self._rng.lognormvariate(0.0, link.latency_sigma)
        if self._content + BATCH > phase.limit * 60.0:
            if link.counts_refused:
                self._take(now, BATCH)
            return min(latency_s, 0.1), RATE_LIMITED
        if phase.knee:
            self._busy = sorted(end for end in self._busy if end > now)
            begin = now if len(self._busy) < phase.knee else self._busy[-phase.knee]
            self._busy.append(begin + latency_s)
            latency_s += begin - now
        if latency_s > link.timeout_s:
            self._take(now, BATCH)
            return link.timeout_s, Retry("network", "timeout")
        if self._rng.random() < phase.failing:
            return latency_s, FAILED
        self._take(now, BATCH)
        return latency_s, Delivered()

    def _take(self, now: float, events: float) -> None:
        self._window.append((now, events))
        self._content += events

    def _expire(self, now: float) -> None:
        while self._window and self._window[0][0] <= now - 60.0:
            self._content -= self._window.popleft()[1]

    def _let_others_send(self, now: float) -> None:
        step_s = 0.1
        while self._others_at + step_s <= now:
            self._others_at += step_s
            phase = self._link.phase(self._others_at)
            if phase.others:
                self._expire(self._others_at)
                if self._content + phase.others * step_s <= phase.limit * 60.0:
                    self._take(self._others_at, phase.others * step_s)
        self._expire(now)


class Simulation:
    """A sender with an endless backlog on a link. Checks at every step what must hold at any time."""

    def __init__(self, link: Link, seed: int) -> None:
        self.link = link
        self.pace = Pace(link.limits, random.Random(seed + 1))
        self.sent: list[float] = []
        self.delivered: list[float] = []
        self.rate_limited: list[float] = []
        self.max_in_flight = 0
        self._server = Server(link, random.Random(seed))
        self._answers: list[tuple[float, int, Attempt, Verdict, bool]] = []
        self._number = count()
        self._probes = 0

    def run(self) -> None:
        """Goes through the link's time."""
        now = 0.0
        bytes_ = BATCH * self.link.bytes_per_event
        while now < self.link.duration_s:
            wait_s = self.pace.wait_s(now, BATCH, bytes_)
            if wait_s == 0.0:
                self._send(now, bytes_)
            elif self._answers and self._answers[0][0] <= now + wait_s:
                now = self._take_answer()
            else:
                assert not math.isinf(wait_s), "it waits for an answer, and nothing is in flight"
                assert wait_s >= 0.001, "it spins"
                now += wait_s

    def _send(self, now: float, bytes_: int) -> None:
        before = self.pace.snapshot(now)
        assert before.backing_off_s == 0.0, "a request goes out during the backoff"
        attempt = self.pace.sent(now, BATCH, bytes_)
        is_probe = bool(before.reason)
        self._probes += is_probe
        assert self._probes <= 1, "two probes at once"
        latency_s, verdict = self._server.answer(now)
        heapq.heappush(self._answers, (now + latency_s, next(self._number), attempt, verdict, is_probe))
        self.sent.append(now)
        self.max_in_flight = max(self.max_in_flight, len(self._answers))
        assert len(self._answers) <= self.link.limits.max_concurrency
        assert self.pace.snapshot(now).in_flight == len(self._answers)

    def _take_answer(self) -> float:
        now, _, attempt, verdict, is_probe = heapq.heappop(self._answers)
        self._probes -= is_probe
        self.pace.judged(now, attempt, verdict)
        if isinstance(verdict, Delivered):
            self.delivered.append(now)
        elif verdict is RATE_LIMITED:
            self.rate_limited.append(now)
        return now

    def outcome(self) -> Outcome:
        """Sum the run up, from the end of the warm-up."""
        link = self.link
        delivered = [at for at in self.delivered if link.warm_up_s <= at < link.duration_s]
        sent = sum(at >= link.warm_up_s for at in self.sent)
        possible = sum(link.allowed(second + 0.5) for second in range(int(link.warm_up_s), int(link.duration_s)))
        ends = [link.warm_up_s, *delivered, link.duration_s]
        return Outcome(
            delivered_share=len(delivered) * BATCH / possible,
            rate_limited_share=sum(at >= link.warm_up_s for at in self.rate_limited) / sent,
            longest_gap_s=max(after - before for before, after in pairwise(ends)),
            recovery_s=max((self._recovery_s(at) for at in link.recovers_at_s), default=0.0),
            max_in_flight=self.max_in_flight,
        )

    def _recovery_s(self, at: float) -> float:
        """Seconds until five seconds in a row have 90 % of what the server takes, within our ceiling."""
        wanted = 5 * 0.9 * min(self.link.allowed(at), 0.97 * self.link.limits.max_events_per_second)
        for second in range(int(self.link.duration_s - at)):
            begin = at + second
            if BATCH * sum(begin <= moment < begin + 5 for moment in self.delivered) >= wanted:
                return second
        return math.inf


class Neighbours:
    """Two daemons on one project, who know nothing of each other: the second starts when the first has all of the limit."""

    def __init__(self, link: Link, seed: int) -> None:
        self.link = link
        self.delivered: list[list[float]] = [[], []]
        self._server = Server(link, random.Random(seed))
        self._paces = [Pace(link.limits, random.Random(2 * seed + n)) for n in range(2)]
        self._asks_at = [0.0, link.warm_up_s]  # the pace again, unless an answer comes before
        self._answers: list[tuple[float, int, int, Attempt, Verdict]] = []
        self._number = count()

    def run(self) -> None:
        """Goes through the link's time."""
        while True:
            which = min(range(2), key=lambda n: self._asks_at[n])
            now = self._asks_at[which]
            if self._answers and self._answers[0][0] <= now:
                now, _, which, attempt, verdict = heapq.heappop(self._answers)
                self._paces[which].judged(now, attempt, verdict)
                if isinstance(verdict, Delivered):
                    self.delivered[which].append(now)
            if now >= self.link.duration_s:
                return
            self._send(which, now)

    def _send(self, which: int, now: float) -> None:
        pace, bytes_ = self._paces[which], BATCH * self.link.bytes_per_event
        while (wait_s := pace.wait_s(now, BATCH, bytes_)) == 0.0:
            attempt = pace.sent(now, BATCH, bytes_)
            latency_s, verdict = self._server.answer(now)
            heapq.heappush(self._answers, (now + latency_s, next(self._number), which, attempt, verdict))
        self._asks_at[which] = now + wait_s

    def smaller_share(self, after_s: float = 300.0) -> float:
        """What the one with less got of what would be its half, from so long after the second's start on."""
        begin = self.link.warm_up_s + after_s
        shares = [sum(at >= begin for at in delivered) for delivered in self.delivered]
        return min(shares) / (sum(shares) / 2)


def load(path: Path) -> Link:
    """Read one link; a key that doesn't exist is an error."""
    return msgspec.convert(tomllib.loads(path.read_text()), Link)
