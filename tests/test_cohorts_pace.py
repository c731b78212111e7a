"""When the next request may go to Braze: what it asks for is kept, whatever was on its way when it asked."""

import asyncio
import random

from aiohttp import web
from cohort_sender import Sender, session
from conftest import until

from bridged.cohorts.pace import Pace
from bridged.cohorts.strikes import STRIKE_S, STRIKES, Strikes, Turns


def test_a_success_that_was_on_its_way_ends_no_wait() -> None:
    """Two requests leave; one is told to wait, the other succeeds: the wait is Braze's word, and stands."""
    pace = Pace(8, random.Random(0))
    first, second = pace.sent(0.0), pace.sent(0.1)
    pace.failed(1.0, first, "rate", 30.0)
    pace.succeeded(second)
    assert pace.wait_s(1.5, 0) >= 29.0
    assert pace.failures == 1


def test_a_success_after_the_wait_lets_everybody_go() -> None:
    """One request tries first; when it has succeeded all may go."""
    pace = Pace(8, random.Random(0))
    pace.failed(1.0, pace.sent(0.0), "rate", 30.0)
    assert pace.wait_s(31.0, 0) == 0.0
    assert pace.wait_s(31.0, 1) == float("inf")
    pace.succeeded(pace.sent(31.0))
    assert pace.wait_s(31.1, 7) == 0.0
    assert pace.failures == 0


async def test_nobody_is_sent_while_braze_wants_us_to_wait(daemon, importing, client):
    """A 429 with its header among answers that are successes, over sockets: the next request comes after the time it says."""
    asked_at = 0.0
    times = []

    async def braze(request):
        nonlocal asked_at
        body = await request.json()
        loop = asyncio.get_running_loop()
        times.append(loop.time())
        if len(times) == 1:
            asked_at = loop.time()
            return web.json_response({"message": "slow down"}, status=429, headers={"X-Ratelimit-Retry-After": "2"})
        # Those that left together with it succeed after it was refused.
        await asyncio.sleep(0.2)
        users = len(body["attributes"])
        return web.json_response({"message": "success", "attributes_processed": users}, status=201)

    runner = web.AppRunner(web.Application())
    runner.app.router.add_post("/users/track", braze)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        app = await daemon(**importing | {"braze__url": f"http://{host}:{port}"})
        mixpanel = Sender(client, f"http://{app.config.sources.http.listen}")
        await mixpanel.take(session("members", [f"u{n}" for n in range(300)]))
        await until(lambda: app.membership.figures.in_braze == 300, "the sync", 30)
    finally:
        await runner.cleanup()
    together = [at for at in times if at < asked_at + 1.0]
    assert 2 <= len(together) < len(times)
    assert min(at for at in times if at not in together) >= asked_at + 1.9


def test_an_outage_strikes_nobody() -> None:
    """However often a user fails alone while nobody is taken, it is one strike at most."""
    strikes = Strikes()
    strikes.took_s = 0.0
    assert [strikes.count(7, at * STRIKE_S) for at in range(1, 10)] == [1] + [0] * 8
    assert strikes.resting(9 * STRIKE_S) == []


def test_who_fails_alone_while_others_are_taken_is_struck_out() -> None:
    """From the second strike on once a minute, since it isn't tried in between; until it is taken itself."""
    strikes = Strikes()
    found = []
    for minute in range(STRIKES):
        strikes.took_s = 100.0 + minute * STRIKE_S
        found.append(strikes.count(7, strikes.took_s + 1))
    strikes.took_s += 2
    assert found == [1, 2, 3, 4]
    assert strikes.resting(strikes.took_s) == [7]
    assert strikes.resting(strikes.took_s + STRIKE_S) == []
    strikes.forget(7)
    assert strikes.count(7, strikes.took_s + 3) == 1


def test_what_braze_says_itself_of_a_user_is_a_strike() -> None:
    """Whether others are taken or not; but it isn't asked the same again before a minute is over."""
    strikes = Strikes()
    assert strikes.count(7, 100.0, sure=True) == 1
    assert strikes.resting(101.0) == [7]
    assert strikes.resting(100.0 + STRIKE_S) == []
    assert strikes.count(7, 100.0 + STRIKE_S, sure=True) == 2
    strikes.clear()
    assert strikes.resting(101.0 + STRIKE_S) == []


def test_cohorts_whose_names_fail_take_turns() -> None:
    """Others go first, for a minute and until something is taken; among those that fail, whoever has waited longest."""
    turns = Turns()
    turns.told("a", 0.0, taken=False)
    assert turns.next(["a", "b"], {"a", "b"}, 1.0) == ["b"]
    turns.told("b", 1.0, taken=False)
    assert turns.next(["a", "b"], {"a", "b"}, 2.0) == ["a", "b"]  # all of them: Braze itself, perhaps
    turns.told("a", 2.0, taken=False)
    assert turns.next(["a", "b"], {"a", "b"}, 3.0) == ["b", "a"]
    assert turns.next(["a", "b"], {"a", "b", "c"}, 3.0) == []  # whose name is known
    turns.told("b", 3.0, taken=True)
    assert turns.failing == {"a"}
    assert turns.next(["a"], {"a", "b"}, 2.0 + STRIKE_S - 1) == []
    assert turns.next(["a"], {"a", "b"}, 2.0 + STRIKE_S) == ["a"]
