"""Alarms: each once per episode, none in a storm, and the webhook that is nobody's trouble but its own."""

import asyncio
import random
import threading
import time
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from conftest import currents, free_port, until
from hypothesis import given, settings
from hypothesis import strategies as st

from bridged.admin.status import alarm_facts
from bridged.alarms import rules, webhook
from bridged.alarms.rules import CLEAR_AFTER_S, NAMES, Alarms, Facts
from bridged.alarms.watch import Watch
from bridged.alarms.webhook import Hook, Webhook
from bridged.app import App

GOOD = Facts(max_bytes=10 * 2**30, disk_free_bytes=100 * 2**30, skew_s=0.0)
HOUR = 3600.0


def facts(**changes):
    """The facts of a daemon without trouble, but for the changes."""
    return msgspec.structs.replace(GOOD, **changes)


class Clock:
    """Alarms that are asked once a second."""

    def __init__(self):
        self.alarms = Alarms()
        self.now = 1000.0
        self.told = []

    def run(self, seconds, **changes):
        """So many looks at the same facts; gives what was told."""
        told = []
        for _ in range(round(seconds)):
            self.now += 1.0
            told += [(notice.alarm, notice.state) for notice in self.alarms.look(facts(**changes), self.now)]
        self.told += told
        return told


# -- the decision ------------------------------------------------------------------------------------------------------


def test_nothing_is_wrong():
    """A day without trouble, with a backlog and traffic, says nothing."""
    clock = Clock()
    for hour in range(24):
        clock.run(60, waiting=5, oldest_age_s=3.0, accepted=hour * 1000, delivered=hour * 999, skew_s=2.0)

    assert clock.told == []


@pytest.mark.parametrize(("drops", "words"), [(False, "`bridged replay` sends what"), (True, "dropped for good")])
def test_what_became_of_expired_events(drops, words):
    """With on_expiry = drop there is no archive, and nothing to be replayed: nobody shall look for it."""
    clock = Clock()
    clock.run(10, halted=True)
    clock.run(10, halted=True, expired=7, drops=drops)
    text = next(each.text for each in clock.alarms.open if each.alarm == "expired")

    assert words in text
    assert ("replay" in text) is not drops


def test_the_way_of_an_expired_credential():
    """At the first refusal, at 50 % and 90 % of the time, at the first expiry, and once when it is over; nothing twice."""
    clock, max_age_s = Clock(), 100.0
    told = []
    for age_s in range(150):
        changes = {"halted": True, "waiting": 9, "oldest_age_s": min(float(age_s), 100.0), "max_age_s": max_age_s}
        new = clock.run(1, **changes, expired=max(0, age_s - 100))
        told += [(age_s, *notice) for notice in new]
    assert told == [
        (0, "halted", "raised"),
        (50, "expiring_50", "raised"),
        (90, "expiring_90", "raised"),
        (101, "expired", "raised"),
    ]

    assert clock.run(CLEAR_AFTER_S, expired=49) == []
    assert clock.run(2, expired=49) == [
        ("halted", "cleared"),
        ("expiring_50", "cleared"),
        ("expiring_90", "cleared"),
        ("expired", "cleared"),
    ]
    assert clock.run(10_000, expired=49) == []


def test_what_never_expires_is_not_announced():
    """With on_expiry = keep there is nothing to count down to."""
    clock = Clock()
    clock.run(60, halted=True, waiting=9, oldest_age_s=1e6, expires=False)

    assert clock.told == [("halted", "raised")]


def test_what_waited_for_the_end_of_an_outage_is_not_stuck():
    """For a moment it is still tried again, and others are taken already: nobody is to be told of that."""
    clock = Clock()
    clock.run(600, waiting=9, in_vain=9, in_vain_s=300.0, undelivered_s=300.0)
    clock.run(60, waiting=9, in_vain=9, in_vain_s=3600.0, undelivered_s=0.0)
    clock.run(600)

    assert clock.told == []


def test_what_was_done_about_the_expiry_is_seen():
    """With on_expiry = keep the alarm ends, though the halt lasts; a longer max_age is in its words."""
    clock, halt = Clock(), {"halted": True, "waiting": 9, "oldest_age_s": 95.0}
    clock.run(10, **halt, max_age_s=100.0)
    clock.run(10, **halt, max_age_s=950.0)
    [text, _] = [each.text for each in clock.alarms.open if each.alarm.startswith("expiring")]
    assert text.startswith("10% of retention.max_age (16 min) is over")
    clock.told.clear()
    clock.run(CLEAR_AFTER_S + 5, **halt, expires=False)

    assert clock.told == [("expiring_50", "cleared"), ("expiring_90", "cleared")]


def test_who_wants_to_be_told_at_once_is_told_of_the_end_as_well():
    """With the least alerts.undelivered nothing is below it; when nothing waits any more, it is over."""
    clock = Clock()
    clock.run(60, undelivered_after_s=0.0, waiting=1, undelivered_s=1.0)
    clock.run(60, undelivered_after_s=0.0)

    assert clock.told == [("undelivered", "raised"), ("undelivered", "cleared")]


@pytest.mark.parametrize(
    ("alarm", "bad", "neither"),
    [
        ("spool_pressure", {"used_bytes": 8 * 2**30}, {"used_bytes": 7 * 2**30}),
        ("spool_pressure", {"used_bytes": 2**30, "disk_free_bytes": 2**28}, {"used_bytes": 7 * 2**30}),
        ("spool_pressure", {"disk_free_bytes": 2**26}, {"used_bytes": 7 * 2**30}),
        ("refusing", {"refusal": "full"}, None),
        ("undelivered", {"waiting": 1, "undelivered_s": 600.0}, {"waiting": 1, "undelivered_s": 550.0}),
        ("stuck", {"waiting": 9, "in_vain": 1, "in_vain_s": 600.0}, {"in_vain": 1, "in_vain_s": 550.0}),
        ("no_progress", {"stalled": "nothing"}, None),
        ("certificate_ended", {"certificate_ended": "it has ended"}, None),
        ("certificate_ending", {"certificate_ending": "it ends"}, None),
        ("door", {"door_lost": "it was removed"}, None),
        ("clock", {"skew_s": 301.0}, {"skew_s": 290.0}),
        ("clock", {"skew_s": -301.0}, {"skew_s": None}),
        ("archive", {"archive_problem": "no such folder"}, None),
        ("configuration", {"configuration_problem": "no such file"}, None),
        ("cohorts_halted", {"cohorts_halted": "Halted: 401"}, None),
        ("cohorts_capped", {"cohorts_capped": "Stopped at the cap"}, None),
    ],
)
def test_each_fact_has_its_alarm(alarm, bad, neither):
    """It is raised once however long it lasts, doesn't end between its two thresholds, and ends once when all is good."""
    clock = Clock()
    assert clock.run(1000, **bad) == [(alarm, "raised")]
    if neither is not None:
        assert clock.run(1000, **neither) == []
    assert clock.run(1000) == [(alarm, "cleared")]


def test_pressure_names_its_reason():
    """A spool that fills up and a disk that others have filled are two things to do."""
    texts = {}
    for name, changes in (
        ("share", {"used_bytes": 9 * 2**30}),
        ("little disk", {"used_bytes": 2**30, "disk_free_bytes": 2**27}),
        ("disk", {"used_bytes": 2**27, "disk_free_bytes": 2**28}),
    ):
        clock = Clock()
        assert clock.run(10, **changes) == [("spool_pressure", "raised")]
        [texts[name]] = [each.text for each in clock.alarms.open]
    assert texts["share"].startswith("The spool fills up: 90% of what it can have (9,216 MiB of 10,240 MiB")
    assert texts["little disk"].startswith("The spool fills up: 89% of what it can have")
    assert texts["disk"].startswith(
        "The spool's disk is nearly full: 256 MiB free, fewer than 512 MiB (the spool has 128"
    )


def test_an_alarm_whose_cause_is_gone_is_ending():
    """Its figures are those of the trouble: who reads them after the recovery is told that it is about to end."""
    clock = Clock()
    clock.run(10, halted=True, waiting=99)
    assert [each.ending for each in clock.alarms.open] == [False]
    clock.run(1)
    assert [each.ending for each in clock.alarms.open] == [True]
    clock.run(1, halted=True)
    assert [each.ending for each in clock.alarms.open] == [False]


def test_an_open_alarm_has_the_figures_of_now():
    """Who reads of a halt after days is told what waits and has expired by then, not at its beginning; no notice says it."""
    clock, halt = Clock(), {"halted": True, "max_age_s": 100.0}
    clock.run(10, **halt, waiting=99, oldest_age_s=95.0)
    clock.run(10, **halt, waiting=60, oldest_age_s=99.0, expired=39)
    told = list(clock.told)
    assert clock.run(10, **halt, waiting=0, expired=99) == []

    texts = {each.alarm: each.text for each in clock.alarms.open}
    assert list(texts) == [alarm for alarm, _ in told] == ["halted", "expiring_50", "expiring_90", "expired"]
    assert "events are kept for 100 s (0 events waiting)" in texts["halted"]
    assert texts["expiring_90"].startswith(
        "Nothing is left that could expire while Mixpanel refuses us: 0 events waiting"
    )
    assert "99 so far" in texts["expired"]
    clock.run(1, waiting=7, expired=99)
    assert {each.alarm: each.text for each in clock.alarms.open} == texts, "its cause is gone"

    after = Clock()
    after.alarms.remember(clock.alarms.past(0.0), 0.0)
    after.run(10, **halt, waiting=5, expired=99)
    texts = {each.alarm: each.text for each in after.alarms.open}
    assert "5 events waiting" in texts["halted"]
    assert "99 so far" in texts["expired"], "after a restart, too"


@pytest.mark.parametrize(
    ("bad", "between", "has"),
    [
        ({"used_bytes": 8 * 2**30}, {"used_bytes": 7 * 2**30}, "The spool fills up: 70% of what it can have"),
        ({"disk_free_bytes": 2**26}, {"used_bytes": 7 * 2**30}, "The spool fills up: 70% of what it can have"),
        ({"skew_s": -301.0}, {"skew_s": -290.0}, "clock is 5 min behind"),
        ({"skew_s": -301.0}, {"skew_s": None}, "clock is 5 min behind"),
    ],
)
def test_between_its_thresholds_an_alarm_says_what_is_true(bad, between, has):
    """Figures that are no longer bad, nor good yet, or not known, make no false sentence."""
    clock = Clock()
    clock.run(10, **bad)
    clock.run(10, **between)
    [text] = [each.text for each in clock.alarms.open]
    assert has in text


@pytest.mark.parametrize(
    ("alarm", "counter"),
    [("dead_letters_dropped", "dead_letters_dropped"), ("damaged", "damaged"), ("missing", "missing")],
)
def test_what_is_counted_has_an_end(alarm, counter):
    """Damage and drops are events: raised when the count grows, over when it has stopped; what came before the first
    look isn't missed.
    """
    clock = Clock()

    assert clock.run(1000, **{counter: 1}) == [(alarm, "raised")]
    assert clock.run(3000, **{counter: 2}) == []
    assert clock.run(1000, **{counter: 2}) == [(alarm, "cleared")]
    assert clock.run(100, **{counter: 3}) == [(alarm, "raised")]


def test_a_burst_of_dead_letters():
    """Many at once and a noticeable share of the traffic, but not the trickle that large traffic always has, nor old ones."""
    clock = Clock()
    clock.run(10, dead_lettered=5000, accepted=5000)  # of an earlier life
    assert clock.told == []
    for n in range(600):  # 1 % of the traffic
        clock.run(1, dead_lettered=5000 + n, accepted=5000 + 100 * n)
    assert clock.told == []
    assert clock.run(2, dead_lettered=8000, accepted=70_000) == [("dead_letters", "raised")]
    assert clock.run(1000, dead_lettered=8000, accepted=70_000) == [("dead_letters", "cleared")]
    # A replay takes them out of the books, and some come back.
    assert clock.run(10, dead_lettered=1000, accepted=70_000) == []
    assert clock.run(10, dead_lettered=1010, accepted=70_000) == []


def test_flapping_is_one_long_episode():
    """A credential that is refused every other minute for a day isn't a notice every minute."""
    clock = Clock()
    for _ in range(24 * 30):
        clock.run(60, halted=True)
        clock.run(60)

    assert len(clock.told) <= 6
    clock.run(HOUR + 60)
    assert clock.told[-1] == ("halted", "cleared")


def test_a_restart_tells_nothing_twice():
    """What the last daemon told isn't told again by the next, its end is, with how long it lasted; flapping stays flapping."""
    before = Clock()
    for _ in range(3):
        before.run(60, halted=True)
        before.run(CLEAR_AFTER_S * 8)
    before.run(10, halted=True, configuration_problem="a slip")
    ahead_s = 1_700_000_000.0 - before.now
    kept = msgspec.json.decode(msgspec.json.encode(before.alarms.past(ahead_s)), type=dict[str, rules.Past])

    after = Clock()
    after.now = 7.0  # another boot
    after.alarms.remember(kept, 1_700_000_100.0 - after.now)
    assert {each.alarm for each in after.alarms.open} == {"halted", "configuration"}
    assert after.run(20, halted=True) == []
    assert after.run(CLEAR_AFTER_S, halted=True) == [("configuration", "cleared")]
    assert after.run(CLEAR_AFTER_S * 2) == [], "it came back often: its end takes longer"
    notices = []
    while not notices:
        after.now += 1.0
        notices = after.alarms.look(facts(), after.now)
    assert [(notice.alarm, notice.state) for notice in notices] == [("halted", "cleared")]
    assert notices[0].lasted_s > 100 + 20 + 3 * CLEAR_AFTER_S


def test_a_halt_is_over_when_something_was_taken():
    """A daemon that has asked nobody yet can't know it: what its predecessor told stays as it was."""
    before = Clock()
    before.run(10, halted=True, halt_reason="401: no")
    (told,) = before.alarms.open
    after = Clock()
    after.alarms.remember(before.alarms.past(0.0), 0.0)
    assert after.run(CLEAR_AFTER_S * 3, halt_doubtful=True) == []
    assert [one.text for one in after.alarms.open] == [told.text]
    assert after.run(CLEAR_AFTER_S * 3) == [("halted", "cleared")]


def test_the_words_are_for_people():
    """Every text can be made of any facts, is one line, and names the figures."""
    alarms = Alarms()
    alarms.look(GOOD, 0.0)
    bad = facts(
        halted=True, halt_reason="401: check the credential", waiting=1234, oldest_age_s=47 * HOUR, expired=7,
        archive_problem="p", stalled="s", dead_lettered=500, accepted=1000, dead_letters_dropped=3, damaged=2, missing=4,
        used_bytes=2**34, refusal="full", skew_s=-1000.0, configuration_problem="c", disk_free_bytes=None,
        cohorts_halted="Halted: 401", cohorts_capped="Stopped at the cap",
        door_lost="d", certificate_ended="e", certificate_ending="n",
    )  # fmt: skip
    told = {notice.alarm: notice.text for at in range(10) for notice in alarms.look(bad, 1.0 + at)}
    told |= {
        notice.alarm: notice.text
        for at, more in (
            (20.0, {"undelivered_s": 700.0, "last_problem": "503"}),
            (200.0, {"in_vain": 2, "in_vain_s": 700.0}),
            (400.0, {"in_vain": 2, "in_vain_s": 900.0}),
        )
        for notice in alarms.look(facts(waiting=3, **more), at)
        if notice.state == "raised"
    }

    assert set(told) == set(NAMES)
    assert all(text and "\n" not in text and "None" not in text for text in told.values())
    assert "1,234 events waiting, the oldest for 47 h" in told["halted"]
    assert "17 min behind" in told["clock"]
    assert "7 so far" in told["expired"]
    assert "12 min" in told["undelivered"]


ages = st.none() | st.floats(0, 400_000)
some_facts = st.builds(
    Facts,
    halted=st.booleans(),
    waiting=st.integers(0, 10**9),
    oldest_age_s=ages,
    max_age_s=st.sampled_from([0.0, 100.0, 48 * HOUR]),
    expires=st.booleans(),
    archive_problem=st.sampled_from(["", "no"]),
    undelivered_s=st.floats(0, 1e6),
    stalled=st.sampled_from(["", "yes"]),
    accepted=st.integers(0, 10**6),
    delivered=st.integers(0, 10**6),
    dead_lettered=st.integers(0, 10**6),
    expired=st.integers(0, 10**6),
    dead_letters_dropped=st.integers(0, 100),
    damaged=st.integers(0, 100),
    missing=st.integers(0, 100),
    used_bytes=st.integers(0, 2**34),
    max_bytes=st.sampled_from([0, 2**24, 2**33]),
    disk_free_bytes=st.none() | st.integers(0, 2**40),
    refusal=st.sampled_from(["", "full"]),
    certificate_ended=st.sampled_from(["", "over"]),
    certificate_ending=st.sampled_from(["", "soon"]),
    door_lost=st.sampled_from(["", "gone"]),
    skew_s=st.none() | st.floats(-1e6, 1e6),
    configuration_problem=st.sampled_from(["", "no"]),
    cohorts_halted=st.sampled_from(["", "no"]),
    cohorts_capped=st.sampled_from(["", "no"]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(some_facts, st.floats(0, 4000)), max_size=60))
def test_any_history_of_facts(history):
    """Whatever happens: raised and cleared alternate, what is open is what was raised and not cleared, no alarm is raised
    more often than the growing calm allows, and an hour and more of health ends everything, once.
    """
    alarms, now = Alarms(), 0.0
    state = dict.fromkeys(NAMES, "cleared")
    raised_at = {name: [] for name in NAMES}
    for one, seconds in history:
        now += seconds
        for notice in alarms.look(one, now):
            assert notice.state != state[notice.alarm]
            state[notice.alarm] = notice.state
            if notice.state == "raised":
                raised_at[notice.alarm].append(now)
        assert {alarm.alarm for alarm in alarms.open} == {name for name in NAMES if state[name] == "raised"}
    for times in raised_at.values():
        # Within any hour: the calm before the n-th return is 30 s, 60 s, 120 s and so on.
        assert max((sum(first <= at < first + HOUR for at in times) for first in times), default=0) <= 8
    # A rule that is told nothing has no opinion, and the counts must not grow: health is the last facts without the trouble.
    good = facts(skew_s=0.0)
    if history:
        counts = ("accepted", "delivered", "dead_lettered", "expired", "dead_letters_dropped", "damaged")
        good = msgspec.structs.replace(good, **{name: getattr(history[-1][0], name) for name in counts})
    told = []
    for _ in range(200):
        now += 60.0
        told += alarms.look(good, now)
    assert alarms.open == []
    assert sorted(notice.alarm for notice in told) == sorted(name for name in NAMES if state[name] == "raised")
    assert {notice.state for notice in told} <= {"cleared"}


# -- the webhook -------------------------------------------------------------------------------------------------------


class Chat:
    """A server that takes notices; `answers` are its next statuses, then 200."""

    def __init__(self):
        self.got = []
        self.tokens = []
        self.answers = []
        self.gate = None
        self.delay_s = 0.0  # before it answers; what it was told it has by then

    async def __aenter__(self):
        app = web.Application()
        app.router.add_post("/hook", self._take)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/hook"
        return self

    async def __aexit__(self, *_exc):
        await self._runner.cleanup()

    async def _take(self, request):
        body = await request.json()
        if self.gate is not None:
            await self.gate.wait()
        status = self.answers.pop(0) if self.answers else 200
        if status == 200:
            self.got.append(body)
            self.tokens.append(request.headers.get("Authorization"))
        await asyncio.sleep(self.delay_s)
        return web.Response(status=status, headers={"Location": "/hook"} if status == 302 else {})


@pytest.fixture
async def chat():
    """One that runs."""
    async with Chat() as running:
        yield running


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    """The backoff's unit is a second; here a hundredth."""
    monkeypatch.setattr(webhook, "_BACKOFF_S", 0.01)
    monkeypatch.setattr(webhook, "_BACKOFF_CAP_S", 0.05)


@pytest.fixture
async def sender(chat):
    """A webhook that runs."""
    hook = Webhook(Hook(chat.url, "s3cr3t"), random.Random(1))
    task = asyncio.create_task(hook.run())
    yield hook
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_notice_is_posted_once(chat, sender):
    """With its token, in order, each once."""
    for n in range(5):
        sender.put({"text": str(n)})
    await until(lambda: sender.sent == 5)

    assert [body["text"] for body in chat.got] == list("01234")
    assert set(chat.tokens) == {"Bearer s3cr3t"}
    assert sender.status == webhook.WebhookStatus(queued=0, sent=5, failures=0, dropped=0, last_error="")


async def test_a_notice_is_tried_until_it_is_taken(chat, sender):
    """5xx, 429, 404, a redirect: again, in order, with backoff, and the failure is told until a success."""
    chat.answers = [500, 429, 404, 302, 503]
    for n in range(3):
        sender.put({"text": str(n)})
    await until(lambda: sender.failures == 3)
    assert sender.status.last_error.startswith("HTTP ")
    await until(lambda: sender.sent == 3)

    assert [body["text"] for body in chat.got] == list("012")
    assert (sender.failures, sender.dropped, sender.last_error) == (5, 0, "")


async def test_a_receiver_that_is_quick_again_is_not_waited_for_as_long(chat, sender):
    """Else a dead one would hold up each notice for as long as the slowest answer ever was."""
    sender._timeout_s = 80.0
    sender.put({"text": "one"})
    await until(lambda: sender.sent == 1)
    assert sender._timeout_s == 10.0


async def test_a_slow_receiver_is_waited_for(chat, sender, monkeypatch):
    """One that needs longer for an answer than we wait at first isn't told the same for ever, and the next isn't kept from it."""
    monkeypatch.setattr(webhook, "_TIMEOUT_S", 0.05)
    sender.use(Hook(chat.url, "slow"))
    chat.delay_s = 0.3
    for n in range(3):
        sender.put({"text": str(n)})
    await until(lambda: sender.sent == 3, "all of them")

    texts = [body["text"] for body in chat.got]
    assert sorted(set(texts)) == list("012")
    # Three attempts each; a few more on a machine that stands still meanwhile.
    assert len(texts) < 3 * 4, "it learns once how slow it is"


async def test_a_notice_that_is_not_wanted_blocks_nobody(chat, sender):
    """A 400 says that this body won't do: the next ones go on."""
    chat.answers = [400]
    sender.put({"text": "a"})
    sender.put({"text": "b"})
    await until(lambda: sender.sent == 1)

    assert [body["text"] for body in chat.got] == ["b"]
    assert sender.dropped == 1


async def test_nobody_there(sender):
    """The queue is bounded, the newest stay, and the address is in no word of the error; another hook is tried at once."""
    port = free_port()
    sender.use(Hook(f"http://127.0.0.1:{port}/T0/s3cr3t"))
    for n in range(webhook._MAX_QUEUED + 7):
        sender.put({"text": str(n)})
    await until(lambda: sender.failures >= 2)

    assert sender.status.queued == webhook._MAX_QUEUED
    assert sender.dropped == 7
    assert sender.last_error == "ClientConnectorError"
    assert "s3cr3t" not in repr(sender.hook)


async def test_the_backoff_is_ended_by_another_hook(chat, sender, monkeypatch):
    """Who repairs the address needn't wait five minutes for the next attempt."""
    monkeypatch.setattr(webhook, "_BACKOFF_S", 300.0)
    monkeypatch.setattr(webhook, "_BACKOFF_CAP_S", 300.0)
    sender.use(Hook(f"http://127.0.0.1:{free_port()}/"))
    sender.put({"text": "a"})
    await until(lambda: sender.failures == 1)
    sender.put({"text": "b"})
    await asyncio.sleep(0.1)
    assert sender.failures == 1
    sender.use(Hook(chat.url))
    await until(lambda: sender.sent == 2)


async def test_no_webhook_keeps_nothing(sender):
    """Without an address notices go elsewhere: to the log, the metrics and the status."""
    sender.use(Hook())
    sender.put({"text": "a"})

    assert sender.status is None
    assert not sender._queue


# -- the daemon --------------------------------------------------------------------------------------------------------


@pytest.fixture
def _soon(monkeypatch):
    """An episode ends after half a second of calm, and the facts are looked at often."""
    monkeypatch.setattr(rules, "CLEAR_AFTER_S", 0.5)
    monkeypatch.setattr("bridged.alarms.watch._LOOK_S", 0.05)


async def post(client, app, count):
    """Hands events in at the HTTP door."""
    url = f"http://127.0.0.1:{app.http.port}/v1/currents"
    async with client.post(url, json={"events": [currents(seed=seed) for seed in range(count)]}) as answer:
        assert answer.status == 200


@pytest.mark.usefixtures("_soon")
async def test_a_halt_is_told_everywhere(daemon, emulator, client, chat):
    """Webhook, /metrics, /api/status, log: raised once at the first refusal, cleared once after the recovery."""
    emulator.credentials(token="another")
    app = await daemon(alerts__webhook_url=chat.url, admin__token="t")
    await post(client, app, 7)
    await until(lambda: chat.got, "the notice")
    head = {"headers": {"Authorization": "Bearer t"}}
    base = f"http://{app.config.admin.listen}"

    async with client.get(f"{base}/metrics", **head) as answer:
        text = await answer.text()
    assert 'bridged_alarm{name="halted"} 1.0' in text
    assert 'bridged_alarm{name="expired"} 0.0' in text
    assert 'bridged_alarms_raised_total{name="halted"} 1.0' in text
    async with client.get(f"{base}/api/status", **head) as answer:
        status = await answer.json()
    assert [alarm["alarm"] for alarm in status["alarms"]] == ["halted"]
    assert chat.url not in str(status)

    emulator.credentials(token="example-token")
    await until(lambda: len(chat.got) == 2, "the end")
    raised, cleared = chat.got
    assert (raised["alarm"], raised["state"], raised["severity"]) == ("halted", "raised", "critical")
    assert raised["text"].startswith(f"Alarm: bridged on {raised['host']}, {app.config.spool.path}: ")
    assert raised["spool"] == app.config.spool.path
    assert "7 events waiting" in raised["text"]
    assert "401" in raised["text"]
    assert raised["waiting"] == 7
    assert (cleared["alarm"], cleared["state"]) == ("halted", "cleared")
    assert cleared["text"].startswith("Resolved: ")
    assert app.watch.alarms.open == []


def spoil(path):
    """The beginning of what was written."""
    kept = Path(path).read_bytes()
    assert b'"halted"' in kept
    Path(path).write_bytes(kept[:12])


async def test_a_halt_outlives_a_restart(config, emulator, client, chat, monkeypatch):
    """Raised by one daemon, not told again by the next, and cleared by it; a file that nobody can read changes nothing."""
    monkeypatch.setattr(rules, "CLEAR_AFTER_S", 3.0)
    monkeypatch.setattr("bridged.alarms.watch._LOOK_S", 0.05)
    emulator.credentials(token="another")
    settings = config(alerts__webhook_url=chat.url)
    async with App(settings) as app:
        await post(client, app, 7)
        await until(lambda: chat.got, "the notice")
    async with App(settings) as app:
        assert [alarm.alarm for alarm in app.watch.alarms.open] == ["halted"]
        await until(lambda: app.delivery.halted, "the halt")
        emulator.credentials(token="example-token")
        await until(lambda: len(chat.got) == 2, "the end", 30)
    assert [(notice["alarm"], notice["state"]) for notice in chat.got] == [("halted", "raised"), ("halted", "cleared")]
    spoil(f"{settings.spool.path}.alarms")
    async with App(settings) as app:
        assert app.watch.alarms.open == []


async def test_a_halt_outlives_a_restart_with_nothing_waiting(config, emulator, client, chat, monkeypatch):
    """All has expired, so that no event asks: the next daemon does, is halted, and tells the end when it has come."""
    monkeypatch.setattr(rules, "CLEAR_AFTER_S", 0.5)
    monkeypatch.setattr("bridged.alarms.watch._LOOK_S", 0.05)
    emulator.credentials(token="another")
    settings = config(alerts__webhook_url=chat.url, retention__max_age="500ms")
    halts = lambda: [notice["state"] for notice in chat.got if notice["alarm"] == "halted"]  # noqa: E731
    async with App(settings) as app:
        await post(client, app, 7)
        await until(lambda: halts() and not app.backlog.events, "the notice, and the expiry")
    async with App(settings) as app:
        await until(lambda: app.delivery.halted, "the halt")
        assert halts() == ["raised"]
        emulator.credentials(token="example-token")
        await until(lambda: len(halts()) == 2, "the end")
        assert halts() == ["raised", "cleared"]
        assert app.delivery.halted is None


async def test_what_was_not_sent_yet_outlives_a_restart(config, emulator, client, chat, monkeypatch):
    """A notice that waits for its receiver when the daemon stops is sent by the next one, once, and by none after that."""
    monkeypatch.setattr("bridged.alarms.watch._LOOK_S", 0.05)
    emulator.credentials(token="another")
    async with App(config(alerts__webhook_url=f"http://127.0.0.1:{free_port()}/hook")) as app:
        await post(client, app, 7)
        await until(lambda: app.watch.webhook.failures, "the notice")
    for _ in range(2):
        async with App(config(alerts__webhook_url=chat.url)) as app:
            await until(lambda: app.delivery.halted and not app.watch.webhook.status.queued, "the halt")
            app.watch.step(asyncio.get_running_loop().time())
    assert [(notice["alarm"], notice["state"]) for notice in chat.got] == [("halted", "raised")]
    assert "7 events waiting" in chat.got[0]["text"]


@pytest.mark.usefixtures("_soon")
async def test_what_was_sent_is_not_sent_again_after_a_crash(tmp_path, chat):
    """What `.alarms` says is to be sent is soon no more than that: a daemon that ends without a word leaves it right, too."""
    spool, problem = str(tmp_path / "spool.db"), facts(configuration_problem="a slip")
    watch = Watch(lambda: problem, spool, Webhook(Hook(chat.url)))
    watching = asyncio.create_task(watch.run())
    kept = Path(f"{spool}.alarms")
    try:
        await until(lambda: watch.webhook.sent == 1, "the notice")
        await until(lambda: b"a slip" in kept.read_bytes() and b"bridged on" not in kept.read_bytes(), "the file")
        assert Watch(lambda: problem, spool, Webhook(Hook(chat.url))).webhook.status.queued == 0
    finally:
        watching.cancel()
        await asyncio.wait([watching])


@pytest.mark.usefixtures("_soon")
async def test_a_webhook_that_hangs_holds_nobody_up(daemon, emulator, client, chat):
    """Events go on, the failure is in the status, and the daemon stops in time."""
    chat.gate = asyncio.Event()
    app = await daemon(alerts__webhook_url=chat.url)
    app.reload_problem = "made up"
    await until(lambda: app.watch.webhook.status.queued == 1, "the notice")
    await post(client, app, 5)
    await until(lambda: len(emulator.events()) == 5, "the events")


@pytest.mark.usefixtures("_soon")
async def test_a_webhook_that_is_not_there_is_in_the_status(daemon, client):
    """Who looks at the status learns that alarms don't get through, without the address."""
    url = f"http://127.0.0.1:{free_port()}/s3cr3t"
    app = await daemon(alerts__webhook_url=url)
    app.reload_problem = "made up"
    await until(lambda: app.watch.webhook.last_error, "the failure")

    async with client.get(f"http://{app.config.admin.listen}/api/status") as answer:
        text = await answer.text()
    assert "alarms don't reach alerts.webhook_url: ClientConnectorError" in text
    assert "s3cr3t" not in text


async def test_an_outage_is_told(daemon, emulator, client):
    """Events that wait without a success for long: an alarm whatever the cause; a success is its end."""
    app = await daemon(alerts__undelivered="200ms")
    emulator.script([{"status": 503}])
    await post(client, app, 3)
    await until(lambda: alarm_facts(app).undelivered_s > 0.5, "the time")

    said = Alarms().look(alarm_facts(app), 0.0)
    assert [(notice.alarm, "503" in notice.text) for notice in said] == [("undelivered", True)]
    emulator.script([])
    await until(lambda: app.backlog.events == 0, "the events", 40)
    assert alarm_facts(app).undelivered_s == 0.0


@pytest.mark.parametrize("jump_s", [7200, -7200])
async def test_an_outage_after_the_clock_jumped_is_told(daemon, emulator, client, jump_s):
    """A machine that slept, or a clock that was set, makes the alarm and the probe of a stall neither blind nor too early."""
    app = await daemon(alerts__undelivered="200ms")
    emulator.script([{"status": 503}])
    await until(lambda: app.clock.uptime_s() > 0.1)
    app.clock._wall = lambda: time.time() + jump_s
    started = time.monotonic()
    await post(client, app, 3)
    await until(lambda: alarm_facts(app).undelivered_s > 0.5, "the time")
    assert alarm_facts(app).undelivered_s <= app.clock.uptime_s()
    assert alarm_facts(app).undelivered_s <= time.monotonic() - started + 1


async def test_the_clock_of_mixpanel_is_looked_at(daemon, emulator, client):
    """A Date that is far from ours is an alarm; one that is near, none."""
    app = await daemon()
    await post(client, app, 1)
    await until(lambda: app.backlog.events == 0)
    assert abs(alarm_facts(app).skew_s) < 5
    emulator.script([{"status": 503, "headers": {"Date": "Mon, 23 Nov 2015 19:53:00 GMT"}}])
    await post(client, app, 1)
    await until(lambda: abs(alarm_facts(app).skew_s) > 1e6)

    alarms = Alarms()
    told = [notice.alarm for at in range(10) for notice in alarms.look(alarm_facts(app), float(at))]
    assert told == ["clock"]


async def test_a_bug_in_the_alarms_ends_nothing(config, emulator, client, monkeypatch):
    """Whatever the rules do, events go on; and the next look is made."""
    looks = []

    def broken(self, facts, now):
        looks.append(now)
        raise ZeroDivisionError

    monkeypatch.setattr(Alarms, "look", broken)
    monkeypatch.setattr("bridged.alarms.watch._LOOK_S", 0.01)
    async with App(config()) as app:
        await until(lambda: len(looks) > 3, "some looks")
        await post(client, app, 5)
        await until(lambda: len(emulator.events()) == 5, "the events")


async def test_the_first_look_knows_the_disk(tmp_path, monkeypatch):
    """However soon something is told after the start, it says how much is free."""
    measure = Watch._disk_free
    asked = threading.Event()
    monkeypatch.setattr(Watch, "_disk_free", lambda self: asked.wait(0.2) or measure(self))
    full = Facts(max_bytes=2**30, used_bytes=2**30)
    watch = Watch(lambda: full, str(tmp_path / "spool.db"), Webhook(Hook("", "")))
    told = []
    watch.happened = lambda _kind, text, *_more, **_detail: told.append(text)
    watching = asyncio.create_task(watch.run())
    await until(lambda: told, "the alarm")
    watching.cancel()
    await asyncio.wait([watching])
    assert "an unknown number" not in told[0]
    assert "free on the disk" in told[0]
