"""What an open page costs: the daemon's CPU an event with and without a browser that shows it, in turns.

    python -m bench page --runs 5

A real Chromium, headless, shows the overview of the daemon that is being loaded: its stream, its charts. It takes its own
share of the same cores, so the rate says little; the daemon's own CPU time says what the page costs the daemon. Beside it
the same without load: CPU per second of a daemon that does nothing else, with and without the page.
"""

import argparse
import contextlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from bench import data, report
from bench.processes import BenchError, Daemon, Loader, Sink, ended_by_signals, folder

GOAL_SHARE: Final = 0.02
_START_S: Final = 60.0
_SETTLE_S: Final = 3.0  # the page has its files and its history, and lives on its stream alone
_LONGEST_S: Final = 300.0
_FLAGS: Final = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--remote-debugging-port=0"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


class Run(Struct, kw_only=True):
    """One daemon's life."""

    is_open: bool
    events: int
    events_per_s: float  # until the last ack
    daemon_us: float  # of CPU an event
    idle_share: float  # of one core, before the load


class Results(Struct, kw_only=True):
    """Everything that `--json` writes."""

    machine: dict[str, Any]
    runs: list[Run]


def measure(arguments: argparse.Namespace, *, is_open: bool) -> Run:
    """One run: a fresh daemon, looked at or not; idle for a while, then loaded."""
    with folder() as temporary, contextlib.ExitStack() as stack:
        sink = stack.enter_context(Sink(temporary, check=False))
        sink.ready()
        daemon = stack.enter_context(Daemon(temporary, sink.port))
        daemon.ready()
        options = ["--door", "stream", "--port", str(daemon.stream_port), "--data", str(arguments.data)]
        options += ["--connections", "1", "--per-request", "1", "--seconds", str(arguments.seconds)]
        loader = stack.enter_context(Loader(temporary, options))
        loader.ready()
        if is_open:
            stack.enter_context(browser(temporary, daemon.admin_port))
        time.sleep(_SETTLE_S)
        idle_before = precise_cpu_s(daemon.process.pid)
        time.sleep(arguments.seconds)
        idle_share = (precise_cpu_s(daemon.process.pid) - idle_before) / arguments.seconds
        before = daemon.cpu_s()
        loaded = loader.load(_LONGEST_S)
        while sink.report().events < loaded.events:
            if daemon.process.poll() is not None:
                raise BenchError(f"the daemon ended:\n{daemon.last_words()}")
            time.sleep(0.05)
        spent_s = daemon.cpu_s() - before
        if is_open and not watchers(daemon.admin_port):
            raise BenchError("the browser went away")
        return Run(
            is_open=is_open,
            events=loaded.events,
            events_per_s=loaded.events / (loaded.acked_at - loaded.started_at),
            daemon_us=spent_s / loaded.events * 1e6,
            idle_share=idle_share,
        )


@contextlib.contextmanager
def browser(temporary: Path, port: int) -> Iterator[None]:
    """Shows the page until the end of the block. Raises BenchError when it doesn't connect."""
    program = shutil.which("chromium")
    if program is None:
        raise BenchError("this needs Debian's chromium: apt-get install chromium")
    profile = f"--user-data-dir={temporary / 'profile'}"
    with (temporary / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            [program, *_FLAGS, profile, f"http://127.0.0.1:{port}/"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + _START_S
        while not watchers(port):
            if process.poll() is not None or time.monotonic() > until:
                raise BenchError(f"no browser:\n{(temporary / 'chromium.log').read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        if process.poll() is None:
            process.kill()
            process.wait()


def precise_cpu_s(pid: int) -> float:
    """Processor time of all threads that are alive, to the nanosecond: an idle daemon uses less than a tick a second."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text(encoding="ascii").split()[0]) for task in tasks) / 1e9


def watchers(port: int) -> int:
    """Connections that are open to a port of the loopback."""
    lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    fields = [line.split() for line in lines]
    return sum(1 for each in fields if each[1] == f"0100007F:{port:04X}" and each[3] == "01")


def main(argv: Sequence[str]) -> int:
    """Measures and prints; 1 when the page costs more than it may."""
    parser = report.options("page", __doc__)
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="of idling, and of load, a run (default %(default)s)"
    )
    arguments = parser.parse_args(argv)
    runs: list[Run] = []
    try:
        with ended_by_signals(), folder() as temporary:
            arguments.data = temporary / "events.ndjson"
            data.write(arguments.data, data.DISTINCT)
            for number in range(arguments.runs):
                # In turns, and in another order each time: what grows or cools meanwhile hits both alike.
                runs += [measure(arguments, is_open=is_open) for is_open in (number % 2 == 0, number % 2 == 1)]
    except BenchError as error:
        print(error, file=sys.stderr)
        return 1
    results = Results(machine=report.machine(), runs=runs)
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(results)))
    return 0 if show(results) else 1


def show(results: Results) -> bool:
    """Prints the figures. False when the page costs too much."""
    print(report.heading(results.machine))
    sides = {"closed": [run for run in results.runs if not run.is_open], "open": [r for r in results.runs if r.is_open]}
    rows = [
        [
            name,
            report.spread([run.events_per_s for run in runs]),
            report.spread([run.daemon_us for run in runs], 2),
            report.spread([100 * run.idle_share for run in runs], 2),
        ]
        for name, runs in sides.items()
    ]
    print(report.table(["page", "events/s", "daemon us an event", "idle daemon, % of a core"], rows))
    idle = {name: statistics.median(run.idle_share for run in runs) for name, runs in sides.items()}
    # Pair by pair: what else the machine did meanwhile was much the same for both.
    pairs = [one.daemon_us / other.daemon_us - 1 for one, other in zip(sides["open"], sides["closed"], strict=True)]
    loaded = statistics.median(pairs)
    alone = idle["open"] - idle["closed"]
    spread = report.spread([100 * pair for pair in pairs], 1)
    print(
        f"\nCPU an event with the page open, against without: {spread} %; the page alone: {100 * alone:.2f} % of a core"
    )
    met = loaded <= GOAL_SHARE
    print(f"goal {100 * GOAL_SHARE:g} %: {'met' if met else 'MISSED'}")
    return met
