"""What keeps refusing stops nobody else, for ever or for hours: the path behind the doors, on a time that passes at once.

Real: spool, backlog, delivery, pace, archive. Made up: the time, and Mixpanel, which answers by what is in a request.
"""

import asyncio
import gzip
import os
import random
import re

import hypothesis.strategies as st
import msgspec
import pytest
import structlog
from conftest import NAMES
from hypothesis import HealthCheck, example, given, settings
from test_backlog_model import START_S, Loop

from bridged.backlog.archive import Archive
from bridged.backlog.backlog import Backlog, Parcel
from bridged.backlog.segment import Batch, Segment
from bridged.backlog.spool import Intaken, Spool, SpoolOptions
from bridged.clock import Clock
from bridged.delivery.blame import Blame
from bridged.delivery.delivery import Delivery, DeliveryOptions
from bridged.delivery.pacing import Pace, PaceLimits
from bridged.mixpanel.verdicts import Delivered, Failure, Halt, Reject, Retry, Split, judge

CODE = 3
NUMBER = re.compile(rb'"i-(\d+)"')
HOUR_S = 3600.0
POISON = (100_001, 100_002)


def event(number, **more):
    """A mapped event."""
    properties = {"time": 1, "distinct_id": "ada", "$insert_id": f"i-{number}"} | more
    return msgspec.json.encode({"event": "Email Open", "properties": properties}) + b"\n"


class Mixpanel:
    """In the transport's place. `answer` gives the verdict for the numbers of the events in a request."""

    def __init__(self, answer):
        self.answer = answer
        self.latency = lambda _: 0.1
        self.target = object()
        self.requests = self.asked = 0
        self.got = set()

    async def ask(self):
        """Nothing is sent but a record that can't be stored."""
        self.asked += 1
        verdict = self.answer([])
        return Reject({0: Failure("event", "no name")}) if isinstance(verdict, Delivered) else verdict

    async def send(self, body, _events, _insert_ids):
        """A tenth of a second later, if nothing else is said."""
        numbers = [int(found) for found in NUMBER.findall(gzip.decompress(body))]
        await asyncio.sleep(self.latency(numbers))
        self.requests += 1
        verdict = self.answer(numbers)
        if isinstance(verdict, Delivered):
            self.got.update(numbers)
        return verdict


class Road:
    """Spool to Mixpanel, on the loop's made-up time."""

    def __init__(self, folder, answer, *, max_bytes=2**26, max_dead_letters=10**6, **options):
        self.loop = loop = asyncio.get_running_loop()
        clock = Clock(lambda: START_S + loop.time(), loop.time)
        spool = SpoolOptions(
            path=str(folder / "spool.db"), synchronous="OFF", max_bytes=max_bytes, max_dead_letters=max_dead_letters
        )
        self.spool = Spool(spool, NAMES, clock.latest)
        self.backlog = Backlog(self.spool, 32 * 2**20, clock.latest)
        self.mixpanel = Mixpanel(answer)
        self.happened = []
        self.delivery = Delivery(
            self.backlog,
            self.spool,
            self.mixpanel,
            Pace(PaceLimits(), random.Random(1)),
            DeliveryOptions(**({"flush_interval_s": 0.0} | options)),
            Archive(str(folder / "archive")),
            lambda code: NAMES.get(code, ""),
            clock.earliest,
        )
        self.delivery.happened = lambda kind, *_what, **_detail: self.happened.append(kind)

    async def __aenter__(self):
        run = self.spool.run

        async def counted(function, *args):
            with self.loop.working():
                return await run(function, *args)

        self.spool.run = counted
        with self.loop.working():
            await self.spool.__aenter__()
        self.delivering = asyncio.create_task(self.delivery.run())
        return self

    async def __aexit__(self, *_exc):
        assert self.spool.accounts.imbalance() == 0
        self.delivering.cancel()
        await asyncio.gather(self.delivering, return_exceptions=True)
        with self.loop.working():
            await self.spool.__aexit__(None, None, None)

    async def put(self, *numbers):
        """Events, as one segment."""
        lines = b"".join(event(number) for number in numbers)
        await self.spool.append(Intaken([Batch(lines, bytes([CODE] * len(numbers)))]))

    async def at(self, seconds):
        """Time passes until then."""
        await asyncio.sleep(seconds - self.loop.time())

    def books(self):
        """Where events are, without the places that hold none."""
        accounts = self.spool.accounts
        return {kind: n for kind in accounts.counts if (n := accounts.total(kind))}


@pytest.fixture
def play():
    """Runs a coroutine on a made-up time."""
    loop = Loop()
    yield loop.run_until_complete
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


@pytest.mark.parametrize(
    ("verdict", "fate"),
    [
        (Retry("server", "500: a bug"), "waiting"),
        (Retry("network", "reset"), "waiting"),
        (Halt(403, "a rule of the edge"), "dead_lettered"),
        (Halt(302, "redirected to a page that explains it"), "dead_lettered"),
        (Halt(401, "odd, but about the credential"), "waiting"),
        (Split("400 of a rule"), "dead_lettered"),
        (Split("413 without a number", None, too_large=True), "dead_lettered"),
    ],
    ids=["500", "network", "403", "302", "401", "400", "413"],
)
def test_two_requests_that_are_never_taken_stop_nobody(play, tmp_path, verdict, fate):
    """What came back goes before what is fresh, but by turns: all good events arrive, minutes later at most.

    What can be about the event ends with a dead letter; what fails without a word is never given up.
    """

    async def scene():
        async with Road(tmp_path, lambda numbers: verdict if set(POISON) & set(numbers) else Delivered()) as road:
            for number in POISON:
                await road.put(number)
            await road.at(30)
            for number in range(60):
                await road.put(number)
                await asyncio.sleep(30)
            await road.at(HOUR_S)
            assert road.mixpanel.got == set(range(60))
            assert road.books() == {"accepted": 62, "delivered": 60, fate: 2}
            if fate == "waiting" and isinstance(verdict, Retry):
                assert road.delivery.in_vain == 2
                assert road.delivery.in_vain_s > 1000

    play(scene())


def test_a_refusal_of_everybody_is_not_taken_for_one_of_an_event(play, tmp_path):
    """A firewall's rule met one event, and minutes later the account may not import any more: both are a 403."""
    removed = []

    async def scene():
        answer = lambda numbers: Halt(403, "no") if removed or POISON[0] in numbers else Delivered()  # noqa: E731
        async with Road(tmp_path, answer) as road:
            for number in range(300):
                await road.put(number, *POISON[:1] * (number == 20))
                await asyncio.sleep(1)
            assert road.delivery.halted is None
            removed.append(True)
            for number in range(300, 315):
                await road.put(number)
                await asyncio.sleep(20)
            assert road.delivery.halted is not None
            removed.clear()
            await asyncio.sleep(HOUR_S)
            assert road.mixpanel.got == set(range(315))

    play(scene())


def test_a_halt_ends_although_nothing_waits(play, tmp_path):
    """All has expired meanwhile: the halt asks with a record that can't be stored, once a minute, and is over when that works."""

    async def scene():
        async with Road(tmp_path, lambda _: Halt(401, "no"), max_age_s=100.0) as road:
            await road.put(1)
            await road.at(1000)
            assert road.books() == {"accepted": 1, "expired": 1}
            assert road.delivery.halted is not None
            assert 10 <= road.mixpanel.asked <= 16
            road.mixpanel.answer = lambda _: Delivered()
            await road.at(1070)
            assert road.delivery.halted is None

    play(scene())


def test_a_success_that_counts_too_few_is_asked_for_once_more(play, tmp_path):
    """It may have been the answer to something else; a repetition is harmless. The second time it is believed, and so are others
    for a while: Mixpanel has a reason, and not every request must be sent twice.
    """
    counts = [1, 0]

    async def scene():
        async with Road(tmp_path, lambda _: Delivered(counts.pop(0) if counts else 2)) as road:
            await road.put(1, 2)
            await road.at(5)
            assert (road.mixpanel.requests, road.delivery.uncounted) == (2, 0)
            await road.put(3, 4)
            await road.at(10)
            assert (road.mixpanel.requests, road.delivery.uncounted) == (4, 2)
            await road.put(5, 6)
            await road.at(15)
            assert (road.mixpanel.requests, road.delivery.uncounted) == (5, 4)
            await road.at(1000)
            await road.put(7, 8)
            await road.at(1010)
            assert (road.mixpanel.requests, road.delivery.uncounted) == (7, 6)
            assert road.books() == {"accepted": 8, "delivered": 8}

    play(scene())


def test_events_that_fail_for_ever_are_no_reason_for_others_to_wait(play, tmp_path):
    """A bug of the far end: one event in 20 s fails always. An hour later 180 of them are set aside, and the others go on."""

    async def scene():
        failing = lambda numbers: Retry("server", "500") if any(n >= 10**6 for n in numbers) else Delivered()  # noqa: E731
        async with Road(tmp_path, failing) as road:
            for second in range(3600):
                poison = [10**6 + second] if second % 20 == 0 else []
                await road.put(*range(20 * second, 20 * second + 20), *poison)
                await asyncio.sleep(1)
            await asyncio.sleep(60)
            books = road.books()
            assert 180 <= books["waiting"] < 400
            assert road.delivery.set_aside > 150
            # They don't hold up the end of the daemon either.
            road.mixpanel.answer = lambda _: Delivered()
            await asyncio.sleep(30)
            started = road.loop.time()
            road.mixpanel.answer = failing
            if road.backlog.events == road.delivery.set_aside:
                await road.delivery.drain(60.0)
                assert road.loop.time() - started < 1

    play(scene())


@pytest.mark.parametrize("verdict", [Split("400 of a rule"), Halt(403, "a rule")], ids=["400", "403"])
def test_many_that_were_set_aside_stand_first_after_a_restart(play, tmp_path, verdict):
    """What was known of them is gone, and they stand side by side: good events behind them arrive all the same, soon."""

    async def scene():
        refusing = lambda numbers: verdict if any(n >= 10**6 for n in numbers) else Delivered()  # noqa: E731
        async with Road(tmp_path, refusing) as road:
            for number in range(200):
                await road.put(10**6 + number)
            await road.put(*range(100))
            for number in range(100, 1900):
                await asyncio.sleep(1)
                await road.put(number)
            await asyncio.sleep(5)
            assert road.mixpanel.got == set(range(1900))
            assert road.delivery.halted is None

    play(scene())


def test_an_event_that_fails_beside_others_is_not_asked_for_as_fast_as_it_fails(play, tmp_path):
    """As soon as it stands alone it waits, and asks now and then: the others, whose success says that it is about this one, would
    else pay for hundreds of requests.
    """
    alone = []

    def answer(numbers):
        if numbers == [5]:
            alone.append(asyncio.get_running_loop().time())
        return Retry("server", "500") if 5 in numbers else Delivered()

    async def scene():
        async with Road(tmp_path, answer) as road:
            road.mixpanel.latency = lambda _: 0.001
            await road.put(*range(10))
            for number in range(10, 70):
                await asyncio.sleep(1)
                await road.put(number)
            await asyncio.sleep(1)
            assert road.mixpanel.got == set(range(70)) - {5}
            assert road.delivery.set_aside == 1
            assert 2 <= len(alone) <= 8

    play(scene())


def test_a_scout_that_fails_is_told_to_the_pace():
    """While things are told apart no failure is a reason for others to wait, but a scout's: it comes back as it is, at once."""
    blame, failed = Blame(), Retry("server", "500")
    half, scout, other = (Parcel([Segment(id_, 0.0, 100, 0, bytes([CODE]), b"")]) for id_ in (1, 2, 3))
    half.attempts, scout.scout = 1, True
    blame.heard(half, Delivered(), 1.0)

    assert blame.spares_others(other, failed, 2.0)
    assert not blame.spares_others(scout, failed, 2.0)


def test_an_outage_in_the_midst_of_telling_apart_is_one(play, tmp_path):
    """Single events that fail one after the other are soon no matter of each: everything waits, at a pace, and is kept."""
    failing = lambda numbers: Retry("server", "500") if 5 in numbers else Delivered()  # noqa: E731

    async def scene():
        async with Road(tmp_path, failing) as road:
            await road.put(*range(10))
            while road.mixpanel.got != set(range(10)) - {5}:
                await asyncio.sleep(0.1)
            road.mixpanel.answer = lambda _: Retry("server", "503")
            for number in range(10, 2010):
                await road.put(number)
                await asyncio.sleep(0.01)
            requests = road.mixpanel.requests
            await asyncio.sleep(HOUR_S)
            assert road.mixpanel.requests < requests + 4000
            assert road.delivery.set_aside < 100
            assert not any(kind == "dead_lettered" for kind in road.books())
            road.mixpanel.answer = lambda _: Delivered()
            await asyncio.sleep(HOUR_S)
            assert road.books() == {"accepted": 2010, "delivered": 2010}

    play(scene())


def test_each_segment_holds_an_event_that_fails(play, tmp_path):
    """No request succeeds, as in an outage: after a while a segment is cut, to see, and what succeeds then tells."""

    async def scene():
        failing = lambda numbers: Retry("server", "500") if any(n % 50 == 0 for n in numbers) else Delivered()  # noqa: E731
        async with Road(tmp_path, failing) as road:
            for at in range(0, 2000, 100):
                await road.put(*range(at, at + 100))
            await road.at(2 * HOUR_S)
            assert road.mixpanel.got == {n for n in range(2000) if n % 50}

    play(scene())


def test_an_outage_holds_little_in_memory(play, tmp_path):
    """By turns with what came back, fresh requests are tried: a few, not the whole backlog."""

    async def scene():
        async with Road(tmp_path, lambda _: Retry("server", "503")) as road:
            for at in range(0, 20_000, 100):
                await road.put(*range(at, at + 100))
            await road.at(HOUR_S)
            assert road.backlog.ring.leased * 100 <= 40 * 2000
            road.mixpanel.answer = lambda _: Delivered()
            await road.at(2 * HOUR_S)
            assert road.books() == {"accepted": 20_000, "delivered": 20_000}

    play(scene())


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_many_events_that_always_fail_stop_nobody(play, tmp_path, share):
    """Each request holds some of them, so that nothing is taken: soon they are told apart, and all others arrive. An outage that
    comes meanwhile is one all the same: few requests, and all is kept.
    """
    rng = random.Random(2)
    bad = {number for number in range(6000) if rng.random() < share}

    async def scene():
        failing = lambda numbers: Retry("server", "500") if bad.intersection(numbers) else Delivered()  # noqa: E731
        async with Road(tmp_path, failing) as road:
            for at in range(0, 6000, 2000):
                await road.put(*range(at, at + 2000))
            while len(road.mixpanel.got) < 1000:
                await asyncio.sleep(1)
            assert road.loop.time() < HOUR_S
            road.mixpanel.answer = lambda _: Retry("server", "503")
            requests = road.mixpanel.requests
            await asyncio.sleep(HOUR_S)
            assert road.mixpanel.requests < requests + 4000
            road.mixpanel.answer = failing
            for later in range(10_000, 11_800):
                await road.put(later)
                await asyncio.sleep(2)
            await asyncio.sleep(5)
            assert road.mixpanel.got == set(range(6000)) - bad | set(range(10_000, 11_800))
            assert road.books() == {"accepted": 7800, "delivered": 7800 - len(bad), "waiting": len(bad)}

    play(scene())


def test_an_outage_that_pauses_for_a_moment_is_one_outage(play, tmp_path):
    """A few requests come through a Mixpanel that is down, and are parts of what had failed: no proof against all the others.
    They wait like before, whole, and no limit is learned.
    """

    async def scene():
        down = Retry("server", "503")
        async with Road(tmp_path, lambda _: down) as road:
            for at in range(0, 12_000, 100):
                await road.put(*range(at, at + 100))
            await road.at(30)
            answers = [Delivered()] * 3
            road.mixpanel.answer = lambda _: answers.pop() if answers else down
            while answers:
                await asyncio.sleep(0.1)
            requests = road.mixpanel.requests
            await asyncio.sleep(60)
            assert road.mixpanel.requests < requests + 100
            assert road.spool.segments < 240
            assert road.delivery.learned_batch_bytes is None
            road.mixpanel.answer = lambda _: Delivered()
            await road.at(HOUR_S)
            assert road.books() == {"accepted": 12_000, "delivered": 12_000}

    play(scene())


@pytest.mark.parametrize("share", [0.7, 0.8])
def test_what_fails_at_random_is_not_taken_apart(play, tmp_path, share):
    """It comes through as it is: in smaller requests as many would fail, and there would be thousands of them."""
    rng = random.Random(1)

    async def scene():
        sick = lambda _: Retry("server", "503") if rng.random() < share else Delivered()  # noqa: E731
        async with Road(tmp_path, sick) as road:
            for at in range(0, 100_000, 2000):
                await road.put(*range(at, at + 2000))
            await road.at(HOUR_S)
            assert road.books() == {"accepted": 100_000, "delivered": 100_000}
            assert road.mixpanel.requests < 500

    play(scene())


def test_more_that_fails_than_may_be_in_memory(play, tmp_path, monkeypatch):
    """A burst of one kind of event that always fails is all that is tried again: scouts from behind it find that others are taken."""
    monkeypatch.setattr("bridged.backlog.backlog._MAX_LEASED_BYTES", 8_000)

    async def scene():
        failing = lambda numbers: Retry("server", "500") if any(n >= 10**6 for n in numbers) else Delivered()  # noqa: E731
        async with Road(tmp_path, failing, max_batch_events=50) as road:
            await road.put(*range(10))
            for number in range(10**6, 10**6 + 1000, 50):
                await road.put(*range(number, number + 50))
            for number in range(10, 3600, 10):
                await road.put(*range(number, number + 10))
                await asyncio.sleep(10)
            await asyncio.sleep(60)
            assert road.mixpanel.got == set(range(3600))

    play(scene())


@pytest.mark.parametrize(
    ("verdict", "events", "each", "hours", "most_bytes"),
    [
        (Retry("server", "503"), 5_000, 50, 3, 16_000),
        (Halt(401, "no"), 5_000, 25, 12, 10_000),
        (Halt(302, "a portal"), 5_000, 25, 12, 10_000),
    ],
    ids=["503", "401", "302"],
)
def test_an_outage_or_a_halt_with_much_waiting_holds_little_in_memory(
    play, tmp_path, monkeypatch, verdict, events, each, hours, most_bytes
):
    """Scouts that fail, and what asks for the first time while all is refused, wait in the ring again: however long it lasts, and
    however often it asks, no more is leased; and in the end nothing is missing.
    """
    monkeypatch.setattr("bridged.backlog.backlog._MAX_LEASED_BYTES", 8_000)

    async def scene():
        async with Road(tmp_path, lambda _: verdict, max_batch_events=50, on_expiry="keep") as road:
            for at in range(0, events, each):
                await road.put(*range(at, at + each))
            await road.at(hours * HOUR_S)
            assert 0 < road.backlog._leased_bytes < most_bytes
            road.mixpanel.answer = lambda _: Delivered()
            await road.at((hours + 1) * HOUR_S)
            assert road.mixpanel.got == set(range(events))
            assert road.books() == {"accepted": events, "delivered": events}
            assert road.backlog.ring == (0, 0, 0)

    play(scene())


@pytest.mark.parametrize("before", [Halt(401, "no"), Retry("server", "503")], ids=["halt", "outage"])
def test_with_much_in_memory_everything_expires_when_it_is_due(play, tmp_path, monkeypatch, before):
    """What asks may be the newest: the oldest doesn't wait for its answer."""
    monkeypatch.setattr("bridged.backlog.backlog._MAX_LEASED_BYTES", 8_000)
    answers = [before]

    async def scene():
        async with Road(tmp_path, lambda _: answers[0], max_batch_events=50, max_age_s=4 * HOUR_S) as road:
            for at in range(0, 20_000, 50):
                await road.put(*range(at, at + 50))
                await asyncio.sleep(1)
            answers[0] = Halt(401, "no")
            for seconds in range(50, 400, 50):
                await road.at(4 * HOUR_S + seconds + 1.5)
                assert 50 * seconds <= road.books()["expired"] <= 50 * (seconds + 2)
            await road.at(5 * HOUR_S)
            assert road.books() == {"accepted": 20_000, "expired": 20_000}

    play(scene())


def test_whoever_is_aside_and_hangs_takes_a_part_of_the_places(play, tmp_path):
    """Each that may ask again hangs for a minute: three quarters of the requests stay for others."""

    async def scene():
        hanging, most = set(), 0
        async with Road(tmp_path, lambda n: Retry("network", "timeout") if n[0] >= 10**6 else Delivered()) as road:
            send = road.mixpanel.send

            async def noted(body, events, insert_ids):
                nonlocal most
                number = min(int(found) for found in NUMBER.findall(gzip.decompress(body)))
                if number < 10**6:
                    return await send(body, events, insert_ids)
                hanging.add(number)
                most = max(most, len(hanging) if road.delivery.set_aside > 50 else 0)
                try:
                    return await send(body, events, insert_ids)
                finally:
                    hanging.discard(number)

            road.mixpanel.send = noted
            road.mixpanel.latency = lambda numbers: 60.0 if min(numbers) >= 10**6 else 0.1
            for number in range(60):
                await road.put(10**6 + number)
            for second in range(7200):
                await road.put(second)
                await asyncio.sleep(1)
            assert road.delivery.set_aside > 50
            assert 0 < most <= 20 // 4 + 1  # and the one a minute

    play(scene())


def test_a_mended_credential_is_asked_for_while_much_expires(play, tmp_path):
    """The age was lowered, and a file takes a second: the probe is sent when it is due, not when all has been archived."""

    async def scene():
        async with Road(tmp_path, lambda _: Halt(401, "no"), max_age_s=100.0, max_batch_events=1) as road:
            for number in range(500):
                await road.put(number)
            write = road.delivery.archiver._archive.write

            def slow(too_old):
                road.loop.made_up.now += 1
                if road.loop.time() > 120:
                    road.mixpanel.answer = lambda _: Delivered()
                return write(too_old)

            road.delivery.archiver._archive.write = slow
            await road.at(HOUR_S)
            books = road.books()
            assert books["expired"] < 150
            assert books["delivered"] == 500 - books["expired"]

    play(scene())


def test_a_success_that_counts_too_few_ends_a_halt(play, tmp_path):
    """The credential works: what a count leaves out says nothing about that."""

    async def scene():
        async with Road(tmp_path, lambda _: Halt(401, "no")) as road:
            await road.put(1, 2)
            await road.at(10)
            road.mixpanel.answer = lambda _: Delivered(1)
            await road.at(61.5)
            assert road.delivery.halted is None

    play(scene())


def test_the_alarm_about_the_archive_ends_with_the_halt(play, tmp_path):
    """What couldn't be archived was kept, and is delivered: nothing is wrong with the folder that anybody needs to know."""

    async def scene():
        async with Road(tmp_path, lambda _: Halt(401, "no"), max_age_s=100.0) as road:
            (tmp_path / "archive").write_bytes(b"in the way")
            await road.put(1)
            await road.at(150)
            assert road.delivery.archiver.problem
            road.mixpanel.answer = lambda _: Delivered()
            await road.at(300)
            assert road.books() == {"accepted": 1, "delivered": 1}
            assert not road.delivery.archiver.problem

    play(scene())


def test_of_what_is_set_aside_a_part_is_in_memory(play, tmp_path, monkeypatch):
    """The rest waits on disk, is counted with it, and comes when there is room again; all else arrives meanwhile."""
    monkeypatch.setattr("bridged.delivery.aside._MOST", 20)

    async def scene():
        failing = lambda numbers: Retry("server", "500") if any(n % 10 == 0 for n in numbers) else Delivered()  # noqa: E731
        async with Road(tmp_path, failing) as road:
            await road.put(*range(1, 1001))
            for number in range(1001, 8001, 10):
                await road.put(*range(number, number + 9))
                await asyncio.sleep(2)
            assert road.mixpanel.got == {number for number in range(1, 8000) if number % 10}
            assert road.delivery.set_aside == road.delivery.in_vain == road.backlog.events == 100
            assert road.backlog.ring.leased <= 20
            assert road.backlog.oldest_at() == START_S
            road.mixpanel.answer = lambda _: Delivered()
            for number in range(8001, 8100):
                await road.put(number)
                await asyncio.sleep(20)
            assert road.delivery.set_aside == road.backlog.left == 0
            assert road.mixpanel.got >= set(range(1, 1001))
            assert set(road.books()) == {"accepted", "delivered"}

    play(scene())


def test_what_was_left_on_disk_expires_when_it_is_due(play, tmp_path, monkeypatch):
    """With the others that are as old, though a halt came before there was room for it in memory."""
    monkeypatch.setattr("bridged.delivery.aside._MOST", 20)

    async def scene():
        failing = lambda numbers: Retry("server", "500") if min(numbers, default=9) < 100 else Delivered()  # noqa: E731
        async with Road(tmp_path, failing, max_age_s=4 * HOUR_S) as road:
            await road.put(*range(200))
            for number in range(1000, 2000):
                await road.put(number)
                await asyncio.sleep(2)
            assert road.backlog.left > 50
            road.mixpanel.answer = lambda _: Halt(401, "no")
            await road.at(2 * HOUR_S)
            await road.put(*range(3000, 3100))
            await road.at(4 * HOUR_S - 1)
            assert "expired" not in road.books()
            await road.at(4 * HOUR_S + 60)
            assert road.books() == {"accepted": 1300, "delivered": 1100, "expired": 100, "waiting": 100}

    play(scene())


def test_one_event_alone_asks_again(play, tmp_path):
    """One odd answer, from a proxy, say, while nothing else is there: nobody's success could tell that it may go."""

    async def scene():
        odd = [Split("400 of a proxy")]
        async with Road(tmp_path, lambda _: odd.pop() if odd else Delivered()) as road:
            await road.put(1)
            await road.at(10)
            assert road.delivery.set_aside == 1
            await road.at(130)
            assert road.books() == {"accepted": 1, "delivered": 1}

    play(scene())


def test_a_poison_event_alone_asks_for_ever_and_halts_nothing(play, tmp_path):
    """Nothing else comes for half a day: it is no proof that everything is refused."""

    async def scene():
        async with Road(tmp_path, lambda _: Split("odd")) as road:
            await road.put(1)
            await road.at(12 * HOUR_S)
            assert road.delivery.halted is None
            assert road.books() == {"accepted": 1, "waiting": 1}

    play(scene())


def test_a_mixpanel_that_is_mended_gets_what_was_set_aside(play, tmp_path):
    """All that waits was refused oddly, and delivery halted: it is tried again, and nothing expires."""

    async def scene():
        async with Road(tmp_path, lambda _: Split("odd"), max_age_s=4 * HOUR_S) as road:
            await road.put(*range(1000))
            await road.at(3 * HOUR_S)
            assert road.delivery.halted is not None
            road.mixpanel.answer = lambda _: Delivered()
            await road.at(6 * HOUR_S)
            assert road.delivery.halted is None
            assert road.books() == {"accepted": 1000, "delivered": 1000}

    play(scene())


def test_whoever_is_aside_expires_by_his_own_age(play, tmp_path):
    """The younger of two was set aside first, since its answer came sooner."""

    async def scene():
        async with Road(tmp_path, lambda _: Split("odd"), max_age_s=100.0, probe_interval_s=HOUR_S) as road:
            road.mixpanel.latency = lambda numbers: 20.0 if numbers == [1] else 0.1
            await road.put(1)
            await road.at(10)
            await road.put(2)
            await road.at(25)
            assert road.delivery.set_aside == 2
            road.mixpanel.answer = lambda _: Halt(401, "no")
            await road.put(3)
            await road.at(102)
            assert road.books() == {"accepted": 3, "expired": 1, "waiting": 2}
            await road.at(112)
            assert road.books() == {"accepted": 3, "expired": 2, "waiting": 1}

    play(scene())


def test_size_is_no_reason_for_small_requests(play, tmp_path):
    """A proxy that answers 413 to everything: it halts and keeps everything, as for a 400, and drops no dead letters."""

    async def scene():
        refusing = lambda _: Split("413 of a proxy", None, too_large=True)  # noqa: E731  # an answer like the others
        async with Road(tmp_path, refusing, max_dead_letters=100) as road:
            await road.put(*range(1000))
            await road.at(HOUR_S)
            assert road.delivery.halted is not None
            assert road.books() == {"accepted": 1000, "waiting": 1000}
            road.mixpanel.answer = lambda _: Delivered()
            await road.at(2 * HOUR_S)
            assert road.books() == {"accepted": 1000, "delivered": 1000}

    play(scene())


@pytest.mark.parametrize(
    "verdict",
    [Retry("server", "500: a bug"), Retry("network", "reset"), Halt(403, "a rule"), Split("400 of a rule")],
    ids=["500", "network", "403", "400"],
)
def test_the_companions_of_a_poison_event_arrive(play, tmp_path, verdict):
    """One event of a segment makes the far end fail, or halt everything: the others are told from it, in minutes."""

    async def scene():
        async with Road(tmp_path, lambda numbers: verdict if 100 in numbers else Delivered()) as road:
            await road.put(*range(200))
            for number in range(1000, 1300):
                await asyncio.sleep(2)
                await road.put(number)
            await asyncio.sleep(1)
            assert road.mixpanel.got == set(range(200)) - {100} | set(range(1000, 1300))
            assert road.delivery.halted is None

    play(scene())


@pytest.mark.parametrize("trickle", [True, False])
def test_what_is_too_large_for_something_on_the_way_shrinks(play, tmp_path, trickle):
    """A gateway fails at requests of more than 300 events, and doesn't say why: the backlog of an outage arrives all the same."""
    failing = [True]

    def answer(numbers):
        return Retry("server", "502") if failing or len(numbers) > 300 else Delivered()

    async def scene():
        async with Road(tmp_path, answer) as road:
            for at in range(0, 20_000, 100):
                await road.put(*range(at, at + 100))
            await road.at(600)
            failing.clear()
            for number in range(20_000, 20_400):
                await asyncio.sleep(2)
                if trickle:
                    await road.put(number)
            await asyncio.sleep(1)
            assert road.books() == {"accepted": 20_000 + 400 * trickle, "delivered": 20_000 + 400 * trickle}

    play(scene())


@pytest.mark.parametrize("numbered", [False, True])
def test_problems_that_take_turns_fill_no_log(play, tmp_path, numbered):
    """Two, or each with a number of its own, as a CDN writes it: a line in ten seconds. The last one is told however soon it
    came after another.
    """
    rng = random.Random(3)

    def answer(_numbers):
        now = asyncio.get_running_loop().time()
        if now > 600:
            return Retry("server", "the last")
        number = f" (Ray ID: {rng.random()})" if numbered else ""
        return rng.choice([Delivered(), Retry("server", f"503{number}"), Retry("network", f"reset{number}")])

    async def scene():
        async with Road(tmp_path, answer) as road:
            with structlog.testing.capture_logs() as logs:
                for number in range(700):
                    await road.put(number)
                    await asyncio.sleep(1)
        told = [line["reason"] for line in logs if line["event"] == "delivery_impeded"]
        assert 20 <= len(told) <= 62
        assert told[-1] == "server: the last"

    play(scene())


def test_splits_fill_no_log(play, tmp_path):
    """Something on the way takes 40 events at most: each request of a backlog is split again and again. That is a line a minute, with
    how many there were; each is there for who asks for all that happens.
    """

    async def scene():
        small = lambda numbers: Split("413", None, too_large=True) if len(numbers) > 40 else Delivered()  # noqa: E731
        async with Road(tmp_path, small) as road:
            with structlog.testing.capture_logs() as logs:
                for at in range(0, 20_000, 500):
                    await road.put(*range(at, at + 500))
                    await asyncio.sleep(3)
                await asyncio.sleep(60)
                await road.put(*range(20_000, 20_500))
                await asyncio.sleep(60)
            assert road.books() == {"accepted": 20_500, "delivered": 20_500}
        each = [line for line in logs if line["event"] == "parcel_split"]
        told = [line for line in logs if line["event"] == "parcels_split"]
        assert len(each) > 400
        assert {line["log_level"] for line in each} == {"debug"}
        assert told[0]["parcels"] == 1
        assert 3 <= len(told) <= 5
        assert sum(line["parcels"] for line in told) > 400

    play(scene())


def test_a_rule_about_one_event_is_told_as_such(play, tmp_path):
    """Of a 403 that meets one event, while others pass, the letter says so, and keeps the words of whoever refused: another address
    for this machine would change nothing.
    """
    rule = judge(403, {"content-type": "text/html"}, b"<html>Request blocked. Rule 7</html>", list, 1)

    async def scene():
        async with Road(tmp_path, lambda numbers: rule if POISON[0] in numbers else Delivered()) as road:
            await road.put(1, 2, POISON[0], 3)
            for number in range(10, 600):
                await road.put(number)
                await asyncio.sleep(1)
            with road.loop.working():
                [(reason,)] = await road.spool.run(lambda db: db.execute("SELECT reason FROM dead_letters").fetchall())
            told = "403: Mixpanel, or something before it, refuses this event alone, and takes others"
            assert reason == f"{told} (it says: Request blocked. Rule 7)"

    play(scene())


def test_halts_that_end_at_once_fill_no_log(play, tmp_path):
    """A share of the requests is refused, and what is in flight with them is taken. Then all are: that is told, though later."""
    rng = random.Random(3)

    def answer(_numbers):
        now = asyncio.get_running_loop().time()
        return Halt(401, "no") if now > 600 or rng.random() < 0.2 else Delivered()

    async def scene():
        async with Road(tmp_path, answer, max_batch_events=10, probe_interval_s=10.0) as road:
            with structlog.testing.capture_logs() as logs:
                for number in range(0, 700 * 50, 50):
                    await road.put(*[number + at for at in range(10)])
                    await road.put(*[number + at for at in range(10, 50)])
                    await asyncio.sleep(1)
            told = [line["event"] for line in logs if line["event"] in ("delivery_halted", "delivery_resumed")]
            assert road.delivery.halted
            assert told[-1] == "delivery_halted"
            assert 10 <= told.count("delivery_halted") == road.happened.count("halted") <= 36
            assert told.count("delivery_resumed") == road.happened.count("resumed") < 36

    play(scene())


@pytest.mark.parametrize(("limit", "refused_count"), [(1000, False), (3000, True)])
def test_a_limit_that_is_smaller_than_a_request_stops_nothing(play, tmp_path, limit, refused_count):
    """There is never room for a full request in a minute, or only until it has been asked for: smaller ones are tried."""
    minute = []

    def answer(numbers):
        now = asyncio.get_running_loop().time()
        minute[:] = [(at, events) for at, events in minute if at > now - 60]
        fits = sum(events for _, events in minute) + len(numbers) <= limit
        if fits or refused_count:
            minute.append((now, len(numbers)))
        return Delivered() if fits else Retry("rate", "429")

    async def scene():
        async with Road(tmp_path, answer) as road:
            for at in range(0, 6000, 2000):
                await road.put(*range(at, at + 2000))
            await road.at(2 * HOUR_S)
            assert road.books() == {"accepted": 6000, "delivered": 6000}

    play(scene())


@pytest.mark.parametrize("other", [Retry("server", "503"), Split("400"), Halt(403, "a rule")])
def test_a_429_between_other_failures_is_no_sign_of_a_limit(other):
    """Only minutes of 429 and nothing else say that a request is larger than the limit allows: then segments are cut, to see."""
    blame, limited = Blame(), Retry("rate", "429")
    parcels = [Parcel([Segment(id_, 0.0, 10_000, 0, bytes([CODE] * 100), b"")]) for id_ in (1, 2)]
    assert blame.fate(parcels[0], limited, 1.0, halted=False) == "again"
    blame.fate(parcels[1], other, 100.0, halted=False)
    assert blame.fate(parcels[0], limited, 200.0, halted=False) == "again"
    assert blame.fate(parcels[0], limited, 390.0, halted=False) == "split"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_a_sick_proxy_makes_no_dead_letters(play, tmp_path, share):
    """For half a minute it refuses, at random, whatever passes: that is no proof against any event."""
    rng = random.Random(7)

    def answer(_numbers):
        sick = asyncio.get_running_loop().time() < 30 and rng.random() < share
        return Split("400 <html>Bad Request</html>") if sick else Delivered()

    async def scene():
        async with Road(tmp_path, answer) as road:
            for number in range(1000):
                await road.put(number)
                await asyncio.sleep(0.05)
            await asyncio.sleep(300)
            assert road.books() == {"accepted": 1000, "delivered": 1000}
            assert road.delivery.halted is None

    play(scene())


@pytest.mark.parametrize("poison", [64, 200])
def test_many_poison_events_are_soon_told_from_a_refusal_of_everything(play, tmp_path, poison):
    """Halves are tried depth first, so that something is understood soon: a few minutes, and only they are dead letters."""

    async def scene():
        bad = set(range(0, 2000, 2000 // poison))
        async with Road(tmp_path, lambda numbers: Split("odd") if bad & set(numbers) else Delivered()) as road:
            await road.put(*range(2000))
            for later in range(10_000, 12_400):
                await asyncio.sleep(1)
                await road.put(later)
            await asyncio.sleep(5)
            assert road.mixpanel.got == set(range(2000)) - bad | set(range(10_000, 12_400))
            assert road.books() == {"accepted": 4400, "delivered": 4400 - len(bad), "dead_lettered": len(bad)}

    play(scene())


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_a_spool_near_its_cap_whose_events_are_refused_drains(play, tmp_path, share):
    """Dead letters are larger than what they come from: the oldest go before they take the room to settle the others."""
    rng = random.Random(1)

    def refused(numbers):
        bad = range(int(len(numbers) * share))
        return Reject({at: Failure("properties", "no") for at in bad})

    async def scene():
        async with Road(tmp_path, lambda _: Retry("server", "503"), max_bytes=40 * 2**20) as road:
            number = 0
            while not road.spool.near_cap:
                lines = b"".join(event(number + at, x=f"{rng.getrandbits(1600):0400x}") for at in range(1000))
                await road.spool.append(Intaken([Batch(lines, bytes([CODE] * 1000))]))
                number += 1000
            road.mixpanel.answer = refused
            await road.at(road.loop.time() + HOUR_S)
            books = road.books()
            assert set(books) <= {"accepted", "delivered", "dead_lettered"}
            assert books["dead_lettered"] == pytest.approx(number * share, rel=0.01)
            assert road.spool.dead_letters + road.spool.dropped_dead_letters == books["dead_lettered"]
            assert not road.spool.near_cap

    play(scene())


TOLD = {
    "400": Split("400 <html>"),
    "413": Split("413", None, too_large=True),
    "403": Halt(403, "403 <html>"),
    "401": Halt(401, "401"),
    "302": Halt(302, "to a portal"),
    "500": Retry("server", "500"),
    "reset": Retry("network", "reset"),
    "429": Retry("rate", "429"),
}
trouble = st.tuples(
    st.sampled_from(sorted(TOLD)), st.sampled_from([0.2, 0.9, 1.0]), st.sampled_from([5.0, 30.0, 200.0])
)
poison = st.dictionaries(st.integers(0, 399), st.sampled_from(["400", "403", "500", "reset", "413"]), max_size=4)


@settings(
    max_examples=int(os.environ.get("BRIDGED_TROUBLE_RUNS", "10")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@example([], {192: "reset", 214: "400", 289: "403"}, 1158677336, 1)  # who was aside took each probe of the halt
@example(  # what had failed often was given up at the first refusal of a sick proxy
    [("413", 0.2, 200.0), ("500", 0.2, 200.0), ("413", 0.2, 30.0)],
    {255: "400", 163: "400", 233: "reset", 210: "reset"},
    3504740819,
    7,
)
@given(st.lists(trouble, max_size=4), poison, st.integers(0, 2**32), st.sampled_from([1, 7, 100]))
def test_whatever_happened_good_events_arrive(tmp_path_factory, troubles, poison, seed, together):
    """Troubles of all kinds, one after the other, and events that are refused or fail for what is in them: an hour later all
    others have been delivered, none of them is a dead letter, and nothing halts.
    """
    rng = random.Random(seed)
    ends, at = [], 20.0
    for kind, share, seconds in troubles:
        at += seconds
        ends.append((at, kind, share))

    def answer(numbers):
        now = asyncio.get_running_loop().time()
        kind, share = next(((kind, share) for end, kind, share in ends if now < end), ("", 0.0))
        if now > 20 and rng.random() < share:
            return TOLD[kind]
        return next((TOLD[poison[number]] for number in numbers if number in poison), Delivered())

    async def scene():
        async with Road(tmp_path_factory.mktemp("road"), answer) as road:
            for first in range(0, 400, together):
                await road.put(*range(first, min(first + together, 400)))
                await asyncio.sleep(rng.choice([0.0, 0.1, 1.0]))
            for number in range(1000, 2800):
                await asyncio.sleep(2)
                await road.put(number)
            await asyncio.sleep(5)
            left = {*range(400), *range(1000, 2800)} - road.mixpanel.got
            assert left == set(poison), (ends, poison, seed, together, sorted(left), road.books())
            books = road.books()
            for_ever = sum(kind in ("500", "reset") for kind in poison.values())
            assert books.get("dead_lettered", 0) + books.get("waiting", 0) == len(poison)
            assert books.get("waiting", 0) >= for_ever
            assert road.delivery.halted is None

    loop = Loop()
    try:
        loop.run_until_complete(scene())
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
