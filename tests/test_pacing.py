"""The pace: single rules, a simulated Mixpanel on a virtual clock (bench/link.py, tests/links), and what must hold on any link."""

import math
import random
import statistics
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.link import BATCH, FAILED, LINKS, RATE_LIMITED, Link, Phase, Simulation, load
from bench.pace import smaller_share
from bridged.delivery.pacing import Attempt, Pace, PaceLimits, PaceSnapshot
from bridged.mixpanel.verdicts import Delivered, Failure, Halt, Reject, Retry, Split, Verdict

SEEDS = range(6)
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


def test_another_credential_need_not_wait_for_what_the_old_one_was_told() -> None:
    """A time that the server named is over when somebody else asks: one request goes, and what it is told counts."""
    bench = Bench()
    bench.deliver(3)
    bench.answer(bench.send(), Retry("server", "503", after_s=600.0))
    assert bench.snapshot.backing_off_s == pytest.approx(600.0)
    bench.pace.ask_again(bench.now + 2.0)
    assert bench.wait_s() == pytest.approx(2.0)
    bench.now += 2.0
    assert bench.wait_s() == 0.0
    bench.answer(bench.send(), Delivered())
    assert bench.snapshot.backing_off_s == 0.0


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


@pytest.mark.parametrize("seed", [20, 42, 53, 82])
def test_a_limit_that_came_back_is_found_out_although_the_window_holds_an_echo(seed: int) -> None:
    """What leaves the window leaves as fast as the raised rate fills it: more is sent then, or it would stay below W."""
    simulation = Simulation(load(LINKS / "s3_limit_drops.toml"), seed)
    simulation.run()
    assert simulation.outcome().recovery_s <= 30


def test_two_daemons_on_one_project_come_to_share_its_limit() -> None:
    """The second finds the window full, and the one with less gains more on the way up: after five minutes they are even."""
    assert statistics.median(smaller_share(seed) for seed in range(5)) >= 0.8


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
