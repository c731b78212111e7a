"""The pace: single rules, a simulated Mixpanel on a virtual clock (tests/links), and what must hold on any link.

The simulation is a heap of events in virtual time: no clock, no sleep, ten minutes in a tenth of a second.
"""

import heapq
import math
import random
import tomllib
from collections import deque
from itertools import count, pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridged.delivery.pacing import Attempt, Pace, PaceLimits, PaceSnapshot
from bridged.mixpanel.verdicts import Delivered, Failure, Halt, Reject, Retry, Split, Verdict

LINKS = Path(__file__).parent / "links"
SEEDS = range(6)
BATCH = 2000
RATE_LIMITED = Retry("rate", "429")
FAILED = Retry("server", "503")
UNLIMITED = PaceLimits(max_events_per_second=0, max_bytes_per_minute=0)


# -- single rules --------------------------------------------------------------------------------------------------------


class Bench:
    """A pace and its clock, with a step for each thing that may happen."""

    def __init__(self, limits: PaceLimits = UNLIMITED, seed: int = 1) -> None:
        self.pace = Pace(limits, random.Random(seed))
        self.now = 1000.0

    def wait_s(self, events: int = BATCH, bytes_: int = 0) -> float:
        return self.pace.wait_s(self.now, events, bytes_)

    def send(self, events: int = BATCH, bytes_: int = 0) -> Attempt:
        """Send when the pace lets it go."""
        while (wait_s := self.wait_s(events, bytes_)) > 0.0:
            assert not math.isinf(wait_s), self.limited_by()
            self.now += wait_s
        return self.pace.sent(self.now, events, bytes_)

    def fill(self) -> list[Attempt]:
        """Send until an answer is needed."""
        attempts = []
        while not math.isinf(self.wait_s()):
            attempts.append(self.send())
        return attempts

    def answer(self, attempt: Attempt, verdict: Verdict, latency_s: float = 0.0) -> None:
        self.now += latency_s
        self.pace.judged(self.now, attempt, verdict)

    def deliver(self, times: int, latency_s: float = 0.2) -> None:
        """Rounds of a full concurrency that all go well."""
        for _ in range(times):
            attempts = self.fill()
            self.now += latency_s
            for attempt in attempts:
                self.pace.judged(self.now, attempt, Delivered())

    def limited_by(self) -> str:
        return self.pace.limited_by

    @property
    def snapshot(self) -> PaceSnapshot:
        return self.pace.snapshot(self.now)


def test_without_ceilings_only_concurrency_limits() -> None:
    """A ceiling of 0 is no ceiling, as the benchmarks need it."""
    bench = Bench()
    assert len(bench.fill()) == 4
    assert bench.limited_by() == "concurrency"
    assert math.isinf(bench.snapshot.events_per_second_limit)
    assert math.isinf(bench.snapshot.bytes_per_second_limit)


def test_concurrency_starts_slowly_and_ends_at_its_ceiling() -> None:
    """4, one more for each success up to 10, then one more a round, and never more than the ceiling."""
    bench = Bench(msgspec.structs.replace(UNLIMITED, max_concurrency=15))
    seen = []
    for _ in range(40):
        bench.deliver(1)
        seen.append(bench.snapshot.concurrency_limit)
    assert seen == sorted(seen)
    assert seen[0] == 8
    assert seen[1] == 10
    assert seen[-1] == 15


def test_concurrency_grows_only_when_it_was_reached() -> None:
    """A limit that nobody used proves nothing."""
    bench = Bench()
    for _ in range(100):
        bench.answer(bench.send(), Delivered(), 0.1)
    assert bench.snapshot.concurrency_limit == 4


def test_loopback_noise_never_lowers_concurrency() -> None:
    """Between 0 and 50 ms there is no latency worth a reaction."""
    bench, rng = Bench(), random.Random(5)
    for _ in range(500):
        bench.deliver(1, rng.choice([0.0, 0.0, 0.0, 0.001, 0.05]))
    assert bench.snapshot.concurrency_cuts_total == 0


def test_latency_outside_its_band_lowers_concurrency_once() -> None:
    """A server that queues is given less to do; one slow round is one reason."""
    bench = Bench()
    bench.deliver(30, 0.2)
    before = bench.snapshot.concurrency_limit
    bench.deliver(1, 2.0)
    assert bench.snapshot.concurrency_cuts_total == 1
    assert bench.snapshot.concurrency_limit < before
    bench.deliver(40, 2.0)
    assert bench.snapshot.concurrency_limit >= before, "what has become usual is no reason any more"


def test_failures_halve_concurrency_once_per_epoch() -> None:
    """Many attempts that meet one failure are one failure; so many in a row are an outage and start the backoff."""
    bench = Bench()
    bench.deliver(10)
    before = bench.snapshot.concurrency_limit
    attempts = bench.fill()
    bench.answer(attempts[0], FAILED)
    assert bench.snapshot.concurrency_limit == before // 2
    assert bench.snapshot.backing_off_s == 0.0, "a single failure is noise"
    for attempt in attempts[1:]:
        bench.answer(attempt, Retry("network", "reset"))
    snapshot = bench.snapshot
    assert snapshot.concurrency_limit == before // 2
    assert snapshot.concurrency_cuts_total == snapshot.backoffs_total == 1
    assert snapshot.backing_off_s > 0.0
    assert snapshot.reason == "reset"
    assert snapshot.server_errors_total == 1
    assert snapshot.network_errors_total == len(attempts) - 1


def test_backoff_lets_one_probe_through() -> None:
    """After the backoff one single attempt decides; a good answer opens again."""
    bench = Bench()
    for attempt in bench.fill():
        bench.answer(attempt, FAILED)
    assert 0.0 < bench.wait_s() <= 2.0
    assert bench.limited_by() == "backoff"
    probe = bench.send()
    assert math.isinf(bench.wait_s())
    assert bench.limited_by() == "probe"
    bench.answer(probe, Delivered())
    assert bench.wait_s() == 0.0
    assert bench.snapshot.reason == ""


@pytest.mark.parametrize("verdict", [FAILED, RATE_LIMITED, Retry("network", "timeout")])
def test_failed_probes_lengthen_the_backoff_up_to_a_bound(verdict: Retry) -> None:
    """Full jitter under a doubling bound: short at first, never longer than 20 s, so the way back is short."""
    waits: list[list[float]] = []
    for seed in range(30):
        bench = Bench(seed=seed)
        for attempt in bench.fill():
            bench.answer(attempt, verdict)
        waits.append([])
        for _ in range(8):
            waits[-1].append(bench.snapshot.backing_off_s)
            bench.answer(bench.send(), verdict)
    for step, bound in enumerate([2, 4, 8, 16, 20, 20, 20, 20]):
        column = [row[step] for row in waits]
        assert max(column) <= bound
        assert max(column) > bound / 2, "the bound is used"
        assert min(column) < bound / 2, "the jitter is full"


def test_attempts_that_hang_do_not_hold_up_the_probe() -> None:
    """Attempts from before the backoff may take until their timeout; the probe goes beside them."""
    bench = Bench()
    bench.deliver(10)
    attempts = bench.fill()
    for attempt in attempts[:3]:
        bench.answer(attempt, FAILED)
    probe = bench.send()
    bench.answer(probe, Delivered())
    bench.answer(attempts[3], Retry("network", "timeout"))
    assert bench.snapshot.backing_off_s == 0.0, "what comes late from before is no news"


def test_probe_never_exceeds_the_most_concurrency() -> None:
    """With one attempt allowed at all, an attempt that hangs is waited for."""
    bench = Bench(msgspec.structs.replace(UNLIMITED, max_concurrency=1))
    for _ in range(3):
        bench.answer(bench.send(), FAILED)
    probe = bench.send()
    assert math.isinf(bench.wait_s())
    bench.answer(probe, FAILED)
    assert not math.isinf(bench.wait_s())


def test_rate_limit_cuts_once_per_epoch() -> None:
    """Of many attempts that meet the wall one counts, and the new rate comes from what was delivered."""
    bench = Bench(PaceLimits())
    while bench.now < 1060.0:
        bench.deliver(1)
    per_second = bench.snapshot.delivered_per_second
    assert per_second == pytest.approx(29_100, rel=0.05)
    cuts = bench.snapshot.concurrency_cuts_total
    attempts = [bench.send() for _ in range(4)]
    for attempt in attempts:
        bench.answer(attempt, RATE_LIMITED)
    snapshot = bench.snapshot
    assert snapshot.rate_cuts_total == snapshot.backoffs_total == 1
    assert snapshot.rate_limited_total == 4
    assert snapshot.events_per_second_limit == pytest.approx(0.9 * min(per_second, 29_100), rel=0.02)
    assert snapshot.concurrency_cuts_total == cuts, "a 429 says nothing about load"
    assert bench.wait_s() >= 0.01


def test_rate_grows_back_to_the_ceiling_when_nothing_objects() -> None:
    """The way up: back to W, a little above it, and after a window without a 429 to the ceiling."""
    bench = Bench(PaceLimits())
    while bench.now < 1080.0:
        bench.answer(bench.send(), Delivered(), 0.2)
    bench.answer(bench.send(), RATE_LIMITED)
    bench.answer(bench.send(), Delivered())
    limits = []
    for _ in range(120):
        limits.append(bench.snapshot.events_per_second_limit)
        bench.now += 1.0
    plateau = limits[0] / 0.9
    assert limits == sorted(limits)
    assert limits[8] == pytest.approx(plateau + 600, rel=0.02)
    assert limits[50] == pytest.approx(plateau * 1.1 + 1200, rel=0.02)
    assert limits[-1] == 29_100


def test_rate_without_a_ceiling_is_cut_and_given_back() -> None:
    """Where there is no ceiling a 429 makes a limit, and the hunt ends in no limit again."""
    bench = Bench()
    bench.deliver(5)
    bench.answer(bench.send(), RATE_LIMITED)
    bench.answer(bench.send(), Delivered())
    assert math.isfinite(bench.snapshot.events_per_second_limit)
    bench.deliver(20)
    assert bench.limited_by() == "concurrency"
    bench.now += 60.0
    bench.deliver(1)
    bench.now += 3600.0
    assert math.isinf(bench.snapshot.events_per_second_limit)


def test_an_early_429_halves_the_rate_at_most() -> None:
    """A daemon that has just started knows little of the window; one 429 must not make it crawl for a minute."""
    bench = Bench(PaceLimits())
    bench.answer(bench.send(), RATE_LIMITED)
    assert bench.snapshot.events_per_second_limit == pytest.approx(0.9 * 0.5 * 29_100)
    assert bench.snapshot.backing_off_s <= 2.0
    assert bench.snapshot.rate_limited_total == 1


def test_long_retry_after_does_not_let_the_rate_grow_meanwhile() -> None:
    """Ten minutes of silence prove nothing about the limit: the rate goes on from the cut."""
    bench = Bench(PaceLimits())
    while bench.now < 1060.0:
        bench.deliver(1)
    bench.answer(bench.send(), Retry("rate", "429", 600.0))
    limit = bench.snapshot.events_per_second_limit
    probe = bench.send()
    assert bench.now >= 1660.0
    bench.answer(probe, Delivered())
    assert bench.snapshot.events_per_second_limit == pytest.approx(limit, rel=0.01)


@pytest.mark.parametrize("kind", ["rate", "server"])
def test_retry_after_is_honoured_and_bounded(kind: str) -> None:
    """The server's word is kept by everybody, also when it came to an attempt that is too old to cut; ten minutes at most."""
    bench = Bench(PaceLimits())
    old, older = bench.send(), bench.send()
    bench.answer(old, msgspec.convert({"kind": kind, "reason": "r", "after_s": 30.0}, Retry))
    assert bench.snapshot.backing_off_s == pytest.approx(30.0)
    bench.answer(older, Retry("server", "r", 100_000.0))
    assert bench.snapshot.backing_off_s == pytest.approx(600.0)
    assert bench.wait_s() == pytest.approx(600.0)


def test_retry_after_during_the_probe_is_kept() -> None:
    """A probe that comes through doesn't overrule a time that the server named meanwhile."""
    bench = Bench()
    attempts = bench.fill()
    for attempt in attempts[:3]:
        bench.answer(attempt, FAILED)
    probe = bench.send()
    bench.answer(attempts[3], Retry("server", "503", 50.0))
    bench.answer(probe, Delivered())
    assert bench.wait_s() == pytest.approx(50.0)
    bench.answer(bench.send(), Delivered())
    assert bench.wait_s() == 0.0


@pytest.mark.parametrize("verdict", [Reject({0: Failure("time", "bad")}), Split("413"), Halt(401, "no")])
def test_refusals_do_not_slow_down(verdict: Verdict) -> None:
    """A bad event, a large batch or a wrong credential says nothing about rate or load."""
    bench = Bench(PaceLimits())
    bench.deliver(20)
    before = bench.snapshot
    for _ in range(50):
        bench.answer(bench.send(), verdict)
    after = bench.snapshot
    assert after.events_per_second_limit == before.events_per_second_limit
    assert after.concurrency_limit == before.concurrency_limit
    assert after.backoffs_total == 0


def test_halt_leaves_the_probe_to_be_tried_again() -> None:
    """A credential that expires during a backoff doesn't end it, nor does it block the next probe."""
    bench = Bench()
    for attempt in bench.fill():
        bench.answer(attempt, FAILED)
    bench.answer(bench.send(), Halt(401, "no"))
    probe = bench.send()
    assert math.isinf(bench.wait_s())
    bench.answer(probe, Delivered())
    assert bench.wait_s() == 0.0


@pytest.mark.parametrize("verdict", [Reject({}), Split("413")])
def test_any_understanding_answer_ends_the_backoff(verdict: Verdict) -> None:
    """A server that looks at a request is there again, whatever it thinks of the events."""
    bench = Bench()
    for attempt in bench.fill():
        bench.answer(attempt, FAILED)
    bench.answer(bench.send(), verdict)
    assert bench.wait_s() == 0.0


def test_bytes_have_a_bucket_of_their_own() -> None:
    """Large events meet the byte ceiling long before the event ceiling."""
    bench = Bench(PaceLimits(max_bytes_per_minute=600e6))
    start, sent = bench.now, 0
    while bench.now < start + 30.0:
        bench.answer(bench.send(1000, 2_000_000), Delivered(), 0.01)
        sent += 2_000_000
    assert bench.limited_by() == "nothing"
    assert sent / 30.0 == pytest.approx(9.7e6, rel=0.06)


def test_batch_larger_than_the_bucket_passes_into_debt() -> None:
    """With ceilings of almost nothing a full batch still goes, and is paid for afterwards."""
    bench = Bench(PaceLimits(max_events_per_second=10, max_concurrency=1))
    bench.answer(bench.send(), Delivered())
    start = bench.now
    assert bench.wait_s() == 1.0, "asked again every second, since the rate may change"
    assert bench.limited_by() == "rate"
    bench.send()
    assert bench.now - start == pytest.approx(2000 / 9.7, rel=0.02)


def test_attempt_ends_once() -> None:
    """Counting an answer twice would let one more attempt out each time."""
    bench = Bench()
    attempt = bench.send()
    bench.answer(attempt, Delivered())
    with pytest.raises(ValueError, match="exactly once"):
        bench.answer(attempt, Delivered())
    assert bench.snapshot.in_flight == 0


def test_delivered_rate_forgets_after_a_minute() -> None:
    """The count of the window is one of the last 60 seconds."""
    bench = Bench()
    bench.deliver(3)
    assert bench.snapshot.delivered_per_second > 0
    bench.now += 60.5
    assert bench.snapshot.delivered_per_second == 0


# -- simulated links -------------------------------------------------------------------------------------------------------


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


def load(path: Path) -> Link:
    """Read one link; a key that doesn't exist is an error."""
    return msgspec.convert(tomllib.loads(path.read_text()), Link)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("path", sorted(LINKS.glob("*.toml")), ids=lambda path: path.stem)
def test_link_gives_what_is_expected(path: Path, seed: int) -> None:
    """On each simulated link, delivery, 429s, standstill and recovery stay within the tolerated ranges."""
    link = load(path)
    simulation = Simulation(link, seed)
    simulation.run()
    outcome = simulation.outcome()
    assert link.expect
    for name, (low, high) in link.expect.items():
        assert low <= getattr(outcome, name) <= high, f"{name}: {outcome}"


# -- any link ----------------------------------------------------------------------------------------------------------------

HEALTHY_AT_S = 150.0
HEALTHY_S = 180.0

phases = st.builds(
    Phase,
    from_s=st.floats(1.0, HEALTHY_AT_S - 1.0),
    limit=st.sampled_from([100.0, 1000.0, 8000.0, 30_000.0, 1e6]),
    others=st.sampled_from([0.0, 500.0, 20_000.0]),
    failing=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    latency_factor=st.sampled_from([0.01, 1.0, 10.0]),
    knee=st.sampled_from([0, 0, 1, 5]),
    down=st.sampled_from(["", "", "refused", "hang"]),
)
pace_limits = st.builds(
    PaceLimits,
    max_events_per_second=st.sampled_from([0.0, 50.0, 3000.0, 30_000.0, math.inf]),
    max_bytes_per_minute=st.sampled_from([0.0, 60e6, 2e9]),
    max_concurrency=st.sampled_from([1, 2, 20]),
)


@settings(max_examples=150, deadline=None)
@given(troubles=st.lists(phases, max_size=4), limits=pace_limits, counts=st.booleans(), seed=st.integers(0, 1000))
def test_any_link_is_kept_within_the_limits_and_left_alive(
    troubles: list[Phase], limits: PaceLimits, counts: bool, seed: int
) -> None:
    """Whatever the server did: never too many at once or in a minute, one probe in a backoff, and alive again in time."""
    healthy = [Phase(0.0, limit=1e7), Phase(HEALTHY_AT_S, limit=1e7)]
    link = Link(
        title="any",
        expectation="",
        phases=sorted([*troubles, *healthy], key=lambda phase: phase.from_s),
        expect={},
        duration_s=HEALTHY_AT_S + HEALTHY_S,
        latency_s=1.0,
        counts_refused=counts,
        limits=limits,
    )
    simulation = Simulation(link, seed)
    simulation.run()

    # One batch may go into debt, hence the slack.
    for ceiling, cost in (
        (limits.max_events_per_second * 60.0, BATCH),
        (limits.max_bytes_per_minute, BATCH * link.bytes_per_event),
    ):
        if 0.0 < ceiling < math.inf:
            most = 1.05 * ceiling / cost + 1
            assert all(
                after - before > 60.0
                for before, after in zip(simulation.sent, simulation.sent[int(most) :], strict=False)
            )

    # A backoff, an attempt that hangs, and the debt of one batch.
    pays_s = max(
        BATCH / limits.max_events_per_second if limits.max_events_per_second else 0.0,
        60.0 * BATCH * link.bytes_per_event / limits.max_bytes_per_minute if limits.max_bytes_per_minute else 0.0,
    )
    bound_s = 20.0 + 2 * link.timeout_s + 2 * pays_s
    assert any(HEALTHY_AT_S < at < HEALTHY_AT_S + bound_s for at in simulation.delivered)
