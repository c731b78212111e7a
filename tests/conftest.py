"""Fixtures: a real emulator, a real daemon in this process, real sockets and a real file. No mocks."""

import asyncio
import codecs
import contextlib
import fcntl
import inspect
import itertools
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import aiohttp
import aioresponses
import msgspec
import pytest
import structlog
import uvloop
from hypothesis import settings

from bench import processes
from bridged.app import App
from bridged.backlog.spool import Spool, SpoolOptions
from bridged.config import load
from bridged.currents.examples import example_event
from bridged.currents.schema import iter_types
from bridged.currents.table import EVENT_TYPES
from bridged.emulator.braze import BrazeConfig, BrazeEmulator
from bridged.emulator.mixpanel import EmulatorConfig, MixpanelEmulator
from bridged.mixpanel.mapping import EventMapping, MappingSettings
from bridged.settings import Config

# Patience for slow machines: every wait of a test is so many times longer.
SLOW = float(os.environ.get("BRIDGED_TEST_SLOW", "1"))
NAMES = dict(iter_types(EVENT_TYPES))
ROWS = {row.event_type: row for row in EVENT_TYPES}
_LONGEST = "test_stalls.py"  # of the files
_LONG = {_LONGEST, "test_corruption.py", "test_expiry.py", "test_hostile.py"}


def pytest_configure(config: pytest.Config) -> None:
    """The suite tries the same every time, so that a failure is the change's; a seed or a long run looks for more.

    No example has a deadline: a machine that stands still for a moment is no failure.
    """
    if config.getoption("--hypothesis-profile") is None:
        long_run = {"BRIDGED_MODEL_RUNS", "BRIDGED_TROUBLE_RUNS"} & os.environ.keys()
        same = config.getoption("--hypothesis-seed") is None and not long_run
        settings.register_profile("this suite", derandomize=same, deadline=None)
        settings.load_profile("this suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest comes first: no worker is left alone with it when the others are done."""
    items.sort(key=lambda item: item.path.name != _LONGEST)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """In what takes long, coverage isn't counted: that is two thirds of the time, for lines that shorter tests come to as well.

    (pytest-cov has a mark for it, which does nothing in a worker of xdist: beneath the one that it pauses is another counter.)
    """
    if item.path.name not in _LONG and not item.get_closest_marker("hypothesis"):
        return (yield)
    here, in_threads = sys.gettrace(), threading.gettrace()
    sys.settrace(None)
    threading.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(here)
        threading.settrace(in_threads)


def _ports() -> Iterator[int]:
    """Ports below those that the kernel gives to outgoing connections; of tests that run beside each other, each has its own."""
    # Those from 20,000 on are the benchmarks'.
    for first in range(12_000, 20_000, 1_000):
        # Never closed: it is ours until the process ends.
        claim = os.open(
            f"{tempfile.gettempdir()}/bridged-tests-{os.getuid()}-ports-{first}", os.O_CREAT | os.O_RDWR, 0o600
        )
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            os.close(claim)
    # Each once, before any comes again: who has asked for one may not have bound it yet.
    return itertools.cycle(random.Random(os.urandom(8)).sample(range(first, first + 1_000), 1_000))


_PORTS = _ports()


@pytest.fixture
def an_ordinary_user(tmp_path: Path) -> Iterator[None]:
    """Who may not enter `tmp_path`, whoever runs the tests."""
    codecs.lookup("utf-8-sig")  # loaded when it is first asked for: from a folder that may be root's alone
    tmp_path.chmod(0)
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)
        tmp_path.chmod(0o700)


@pytest.fixture(params=["as it is", "3.14"])
def every_pathlib(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.14 says no where we may not look, and those before raise PermissionError."""
    if request.param == "3.14":
        for name, function in (("exists", os.path.exists), ("is_dir", os.path.isdir), ("is_file", os.path.isfile)):
            monkeypatch.setattr(Path, name, lambda path, function=function: function(path))


@contextlib.contextmanager
def heard(number: int) -> Iterator[None]:
    """Whoever runs the tests may ignore a signal, as `nohup` does and a shell for the background: a child of this block hears it."""
    before = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(number, before)


def free_port() -> int:
    """A port that nobody listens at."""
    while True:
        port = next(_PORTS)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(("127.0.0.1", port))
            return port


# The benchmarks' loops are tests, too: two of them beside each other mustn't choose the same port.
processes.free_ports = lambda count: [free_port() for _ in range(count)]


def currents(event_type: str = "users.messages.email.Open", seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A Currents event; `changes` replace its top-level members."""
    return example_event(ROWS[event_type], random.Random(seed), int(time.time()) - 60) | changes


def ndjson(events: list[Any]) -> bytes:
    """Events as the stream door takes them."""
    return b"".join(msgspec.json.encode(event) + b"\n" for event in events)


async def until(condition: Callable[[], Any], what: str = "the condition", seconds: float = 30) -> None:
    """Waits for a condition; fails with its name."""
    deadline = time.monotonic() + seconds * SLOW
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        await asyncio.sleep(0.01)


def balanced(app: App) -> None:
    """The conservation law, against the rows that are really there."""
    accounts = app.spool.accounts
    assert accounts.imbalance() == 0
    for name, counts in accounts.by_type(NAMES).items():
        ends = sum(counts[kind] for kind in ("delivered", "dead_lettered", "expired", "skipped", "waiting"))
        assert counts["accepted"] == ends, f"{name}: {counts}"
        assert min(counts.values()) >= 0, f"{name}: {counts}"


def pytest_asyncio_loop_factories(config: Any, item: Any) -> dict[str, Any]:
    """Every test runs on the loop that the daemon runs on: its transports differ from asyncio's own."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
def mapping() -> EventMapping:
    """The mapping with a token and all else at its default."""
    return EventMapping(EVENT_TYPES, MappingSettings(token="example-token"))


@pytest.fixture
async def spool(tmp_path: Path) -> AsyncIterator[Spool]:
    """An empty spool in a real file."""
    async with Spool(SpoolOptions(path=str(tmp_path / "spool.db")), NAMES) as opened:
        yield opened


@pytest.fixture
async def emulator() -> AsyncIterator[MixpanelEmulator]:
    """A Mixpanel on loopback, in this process."""
    async with MixpanelEmulator(EmulatorConfig(port=0)) as running:
        yield running


@pytest.fixture
async def turns() -> AsyncIterator[Callable[[], int]]:
    """How often the loop has turned so far."""
    loop, turn = asyncio.get_running_loop(), 0

    def turned() -> None:
        nonlocal turn, following
        turn += 1
        following = loop.call_soon(turned)

    following = loop.call_soon(turned)
    yield lambda: turn
    following.cancel()


@pytest.fixture
def config(tmp_path: Path, emulator: MixpanelEmulator) -> Callable[..., Config]:
    """A configuration on free ports; `overrides` are environment-style: mixpanel__naming="current"."""

    def make(**overrides: str) -> Config:
        environ = {
            "mixpanel__url": emulator.url,
            "mixpanel__token": "example-token",
            "spool__path": str(tmp_path / "spool.db"),
            "sources__http__listen": f"127.0.0.1:{free_port()}",
            "sources__stream__listen": f'["tcp:127.0.0.1:{free_port()}", "unix:{tmp_path}/s.sock"]',
            "admin__listen": f"127.0.0.1:{free_port()}",
            "delivery__flush_interval": "50ms",
            "delivery__probe_interval": "100ms",
            "delivery__grace": "2s",
            "retention__archive_path": str(tmp_path / "archive"),
        } | overrides
        return load(None, {f"BRIDGED__{key.upper()}": value for key, value in environ.items()})

    return make


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    """For requests to the doors."""
    async with aiohttp.ClientSession() as session:
        yield session


Daemon = Callable[..., Awaitable[App]]


@pytest.fixture
async def daemon(config: Callable[..., Config]) -> AsyncIterator[Daemon]:
    """Starts daemons in this process, and ends them with the test.

    `app = await daemon(mixpanel__naming="current")`
    """
    running: list[App] = []

    async def start(**overrides: str) -> App:
        app = App(config(**overrides))
        await app.__aenter__()
        running.append(app)
        return app

    yield start
    for app in reversed(running):
        await app.__aexit__(None, None, None)


@pytest.fixture
async def braze() -> AsyncIterator[BrazeEmulator]:
    """A Braze on loopback, in this process. What is sent at once comes about in any order."""
    async with BrazeEmulator(BrazeConfig(port=0, rest_key="example-rest-key", unordered_s=0.005)) as running:
        yield running


@pytest.fixture
def importing(braze: BrazeEmulator, tmp_path: Path) -> dict[str, str]:
    """Overrides of the configuration that import cohorts into that Braze: `await daemon(**importing)`."""
    return {
        "cohorts__enabled": "true",
        "cohorts__username": "mixpanel",
        "cohorts__password": "example-password",
        "cohorts__path": str(tmp_path / "cohorts.db"),
        "braze__url": braze.url,
        "braze__rest_key": "example-rest-key",
    }


@pytest.fixture
def answers() -> Iterator[aioresponses.aioresponses]:
    """The client's own answers, made up. For the exception table of the transport only: no socket is ever opened."""
    with pytest.MonkeyPatch.context() as patch:
        if "stream_writer" in inspect.signature(aiohttp.ClientResponse.__init__).parameters:
            # aioresponses 0.7.9 doesn't know what aiohttp 3.14 demands (aioresponses#289).
            class Response(aiohttp.ClientResponse):
                def __init__(self, *args: Any, **kwargs: Any) -> None:
                    kwargs.setdefault("stream_writer", Mock(output_size=0))
                    super().__init__(*args, **kwargs)

            patch.setattr(aioresponses.core, "ClientResponse", Response)
        with aioresponses.aioresponses() as made_up:
            yield made_up


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Iterator[pytest.CaptureFixture[str]]:
    """What a command prints; what the daemon logs meanwhile, in this same process, isn't of it and goes elsewhere."""
    structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.__stderr__))
    yield capsys
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees the configuration of whoever runs it."""
    for name in list(os.environ):
        if name.startswith("BRIDGED__") or name in ("BRIDGED_CONFIG", "CREDENTIALS_DIRECTORY"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
