"""A wall clock that jumps, while the daemon runs: nothing young expires, nothing is refused as from the future, no retry is late."""

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import hypothesis.strategies as st
import msgspec
import pytest
from conftest import SLOW, currents, free_port, until
from hypothesis import given

from bridged.clock import Clock

PROJECT = Path(__file__).resolve().parents[1]
JUMP_S = 48 * 3600
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.floats(0, 100_000)),
        st.tuples(st.just("jump"), st.floats(-200_000, 200_000)),
        st.tuples(st.just("birth"), st.just(0.0)),
    ),
    max_size=30,
)


class Times:
    """The two clocks, and the truth."""

    def __init__(self, now=1.7e9):
        self.true = 0.0
        self.offset = now


def clock(times):
    """A Clock on them."""
    return Clock(lambda: times.offset + times.true, lambda: 5.0 + times.true)


@given(STEPS)
def test_nothing_gets_older_than_it_is(steps):
    """However the wall clock jumps while the process runs: no age is more than the time that really passed."""
    times = Times()
    subject, births = clock(times), []
    for what, amount in steps:
        if what == "wait":
            times.true += amount
        elif what == "jump":
            times.offset += amount
        else:
            births.append((times.true, subject.latest()))
        assert abs(subject.uptime_s() - times.true) < 1e-3
        for true, born in births:
            assert subject.earliest() - born <= times.true - true + 1e-3


@given(st.floats(0, 10**6), st.floats(0, 10**6))
def test_without_jumps_ages_are_exact(before, after):
    """As long as nobody sets the clock, an age is the time that passed."""
    times = Times()
    subject = clock(times)
    times.true += before
    born = subject.latest()
    times.true += after
    assert subject.earliest() - born == pytest.approx(after, abs=1e-3)


def test_a_time_that_one_clock_finds_possible_is_possible():
    """A clock set back by two days doesn't turn what happens now into events from the future; nor does one that was late."""
    times = Times()
    subject = clock(times)
    times.offset -= JUMP_S
    assert subject.latest() == pytest.approx(1.7e9)
    times.offset += 2 * JUMP_S
    assert subject.latest() == pytest.approx(1.7e9 + JUMP_S)


# -- a real daemon under libfaketime -----------------------------------------------------------------------------------


@pytest.fixture
def faketime():
    """The library that lies about the time."""
    found = [*Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")]
    if not found and not os.environ.get("CI"):
        pytest.skip("libfaketime isn't installed (Debian: faketime)")
    return str(found[0])


class Process:
    """A daemon whose wall clock is ours."""

    def __init__(self, folder, library, emulator):
        self.http, self.admin = free_port(), free_port()
        self._offset = folder / "offset"
        self.jump(0)
        settings = {
            "mixpanel__url": emulator.url,
            "mixpanel__token": "example-token",
            "spool__path": str(folder / "spool.db"),
            "sources__http__listen": f"127.0.0.1:{self.http}",
            "sources__stream__listen": "[]",
            "admin__listen": f"127.0.0.1:{self.admin}",
            "delivery__flush_interval": "50ms",
            "delivery__probe_interval": "150ms",
            "delivery__grace": "1s",
            "retention__archive_path": str(folder / "archive"),
        }
        environment = {
            **os.environ,
            **{f"BRIDGED__{key.upper()}": value for key, value in settings.items()},
            "PYTHONPATH": str(PROJECT),
            "LD_PRELOAD": library,
            "FAKETIME_TIMESTAMP_FILE": str(self._offset),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bridged", "run"], env=environment, cwd=folder, stderr=log, stdout=log
            )

    def jump(self, seconds):
        """Sets its wall clock to so much more than the true time, from this moment on."""
        fresh = self._offset.with_suffix(".new")
        fresh.write_text(f"{seconds:+d}")
        fresh.replace(self._offset)

    async def status(self, client):
        """What it says of itself."""
        async with client.get(f"http://127.0.0.1:{self.admin}/api/status") as response:
            return msgspec.json.decode(await response.read())

    async def ready(self, client):
        """Returns when it takes events."""
        deadline = time.monotonic() + 60 * SLOW
        while True:
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            with contextlib.suppress(OSError):
                async with client.get(f"http://127.0.0.1:{self.admin}/readyz") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.02)

    async def post(self, client, first, count):
        """Events that happened just now, by the true clock."""
        events = [currents(seed=n, id=f"clock-{n}", time=int(time.time())) for n in range(first, first + count)]
        async with client.post(f"http://127.0.0.1:{self.http}/v1/currents", json={"events": events}) as response:
            assert response.status == 200


async def test_a_daemon_whose_clock_jumps_by_two_days(faketime, emulator, client, tmp_path):
    """Halted, with max_age 48h: after +48 h, after -48 h and back nothing has expired, events are taken, and when the
    credential works again everything is delivered at once. Then, at -48 h, a retry comes as soon as at any other time.
    """
    emulator.credentials(api_secret="another")
    daemon = Process(tmp_path, faketime, emulator)
    try:
        await daemon.ready(client)
        assert abs((await daemon.status(client))["started_at"] - time.time()) < 60
        await daemon.post(client, 0, 10)
        for n, offset in enumerate((JUMP_S + 600, -JUMP_S - 600, 3 * JUMP_S, 0), 1):
            daemon.jump(offset)
            await daemon.post(client, n * 10, 10)
            # Several looks at what is too old, each with a probe.
            requests = emulator.summary().requests
            await until(lambda before=requests: emulator.summary().requests >= before + 4, "probes")
            status = await daemon.status(client)
            assert status["events"]["expired"] == 0, offset
            assert status["events"]["dead_lettered"] == 0, offset
            assert status["events"]["waiting"] == (n + 1) * 10, offset
            assert status["health"]["ready"], offset
            assert 0 <= status["uptime_s"] < 300 * SLOW, offset
        daemon.jump(-JUMP_S)
        emulator.credentials(api_secret="")
        await until(lambda: emulator.summary().stored == 50, "everything is delivered", seconds=20)
        emulator.script([{"status": 503, "times": 2}])
        daemon.jump(JUMP_S)
        await daemon.post(client, 50, 10)
        daemon.jump(-JUMP_S)
        await until(lambda: emulator.summary().stored == 60, "the retry", seconds=20)
        assert emulator.summary().faults == 2
    finally:
        daemon.process.terminate()
        assert daemon.process.wait(20) == 0, (tmp_path / "log").read_text()
