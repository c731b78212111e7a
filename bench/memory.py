"""What the daemon keeps in memory: with nothing to do, at full speed, and over an hour at a moderate rate.

An hour's slope is a straight line through the samples, by least squares, after a warm-up: what the allocator and the
caches take once is no leak. Everything that was sent must have been delivered, or the run has failed: a daemon that
takes nothing needs no memory.
"""

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

from msgspec import Struct, to_builtins

from bench import data, path, report
from bench.processes import BenchError, Daemon, Meter, OpenLoader, Sink, ended_by_signals, folder

GOALS_MB: Final = {"idle": 55.0, "full speed": 120.0}
GOAL_SLOPE: Final = 1.0  # MB/h
# Of a shorter soak 0.1 MB, a tenth of a percent, is already more than the goal.
_SLOPE_NEEDS_S = 1800.0
_IDLE_S = 5.0
_DELIVERED_S = 30.0


class Soak(Struct, kw_only=True):
    """RSS over time at a constant rate. A sample is (seconds since the load began, MB)."""

    rate: float  # events/s
    seconds: float
    warm_up_s: float
    events: int
    delivered: int
    slope_mb_per_h: float
    first_mb: float  # at the end of the warm-up
    last_mb: float
    peak_mb: float
    ack_p50_ms: float  # from when a request was due
    ack_p99_ms: float
    daemon_us: float  # of CPU an event
    other_cores: float
    samples: list[tuple[float, float]]
    failure: str = ""


def slope_per_h(samples: Sequence[tuple[float, float]]) -> float:
    """The straight line through samples, by least squares; 0 when there are too few for one."""
    if len(samples) < 2:
        return 0.0
    return statistics.linear_regression([at for at, _ in samples], [mb for _, mb in samples]).slope * 3600


def idle_mb(seconds: float) -> float:
    """A daemon that nobody talks to."""
    with folder() as temporary, Sink(temporary) as sink:
        sink.ready()
        with Daemon(temporary, sink.port, flush_interval="1s", ceilings=True) as daemon:
            daemon.ready()
            time.sleep(seconds)
            resident_mb = daemon.memory_mb("VmRSS")
            daemon.stop()
            return resident_mb


def soak(arguments: argparse.Namespace) -> Soak:
    """A daemon as installed, a constant rate through the HTTP door, and a look at its RSS every few seconds."""
    seconds = arguments.hours * 3600
    warm_up_s = min(600.0, seconds / 4)
    every_s = max(0.1, min(10.0, seconds / 60))
    with folder() as temporary, contextlib.ExitStack() as stack:
        # Enough distinct events that no id comes twice.
        distinct = max(min(data.DISTINCT, round(arguments.rate * seconds)), round(arguments.rate * seconds / 250))
        data.write(temporary / "events.ndjson", -(-distinct // arguments.per_request) * arguments.per_request)
        sink = stack.enter_context(Sink(temporary))
        sink.ready()
        daemon = stack.enter_context(Daemon(temporary, sink.port, flush_interval="1s", ceilings=True))
        daemon.ready()
        options = ["--door", "http", "--port", str(daemon.http_port), "--data", str(temporary / "events.ndjson")]
        options += ["--per-request", str(arguments.per_request), "--rate", str(arguments.rate)]
        loader = stack.enter_context(OpenLoader(temporary, [*options, "--seconds", str(seconds)]))
        loader.ready()
        meter, samples, began = Meter(daemon, sink, loader), [], time.monotonic()
        loader.say()
        while (at := time.monotonic() - began) < seconds and loader.process.poll() is None:
            samples.append((round(at, 1), daemon.memory_mb("VmRSS")))
            if len(samples) % 60 == 0:
                path.say(f"soak: {at / 60:.0f} of {seconds / 60:.0f} minutes, {samples[-1][1]:.1f} MB")
            time.sleep(every_s)
        loaded = loader.loaded(120)
        used, other_cores = meter.used()
        until = time.monotonic() + _DELIVERED_S
        while (arrived := sink.report()).events < loaded.events and time.monotonic() < until:
            time.sleep(0.1)
        peak_mb = daemon.memory_mb("VmHWM")
        daemon.stop()
        warm = [sample for sample in samples if sample[0] >= warm_up_s]
        return Soak(
            rate=arguments.rate,
            seconds=seconds,
            warm_up_s=warm_up_s,
            events=loaded.events,
            delivered=arrived.events,
            slope_mb_per_h=slope_per_h(warm),
            first_mb=warm[0][1] if warm else 0.0,
            last_mb=samples[-1][1] if samples else 0.0,
            peak_mb=peak_mb,
            ack_p50_ms=loaded.p50_ms,
            ack_p99_ms=loaded.p99_ms,
            daemon_us=used[0] / max(1, loaded.events) * 1e6,
            other_cores=other_cores,
            samples=samples,
            failure="" if arrived.events == loaded.events else f"{loaded.events} sent, {arrived.events} delivered",
        )


def main(argv: Sequence[str]) -> int:
    """Prints memory at rest, at full speed, and its slope. 1 when an event was lost; missed goals are only shown."""
    parser = report.options("memory", __doc__, runs=3)
    parser.add_argument("--hours", type=float, default=1.0, help="length of the soak; 0: none; default %(default)g")
    parser.add_argument("--rate", type=float, default=5000, help="of the soak, events/s, default %(default)g")
    parser.add_argument("--per-request", type=int, default=10, help="of the soak, default %(default)s")
    parser.add_argument("--seconds", type=float, default=10.0, help="at full speed, default %(default)g")
    parser.add_argument("--idle-seconds", type=float, default=_IDLE_S, help="default %(default)g")
    arguments = parser.parse_args(argv)
    about = report.machine()
    figures: dict[str, list[float]] = {"idle": [], "full speed": []}
    others: list[float] = []
    failures: list[str] = []
    soaked = None
    with ended_by_signals(), folder() as temporary:
        events = temporary / "events.ndjson"
        data.write(events, data.DISTINCT)
        for number in range(arguments.runs):
            path.say(f"run {number + 1} of {arguments.runs}: idle, then full speed")
            figures["idle"].append(idle_mb(arguments.idle_seconds))
            run = path.measure(path.CELLS["stream"], events, seconds=arguments.seconds)
            figures["full speed"].append(run.peak_mb)
            others.append(run.other_cores)
            failures += [run.failure] if run.failure else []
        if arguments.hours:
            try:
                soaked = soak(arguments)
            except BenchError as error:
                failures.append(f"the soak: {error}")
    path.say("")
    print(report.heading(about))
    print(f"resident MB, median (min-max) of {arguments.runs} runs; full speed: the most that ever was, stream door\n")
    rows = [[name, report.spread(mb, 1), f"{GOALS_MB[name]:g}"] for name, mb in figures.items()]
    print(report.table(["state", "MB", "goal"], rows))
    if soaked is not None:
        failures += [f"the soak: {soaked.failure}"] if soaked.failure else []
        verdict = "met" if soaked.slope_mb_per_h < GOAL_SLOPE else "MISSED"
        if soaked.seconds - soaked.warm_up_s < _SLOPE_NEEDS_S:
            verdict = "too short to tell"
        print(
            f"\nsoak: {soaked.rate:,.0f} events/s for {soaked.seconds / 60:.0f} min, {soaked.events:,} events: "
            f"{soaked.first_mb:.1f} MB after {soaked.warm_up_s / 60:.0f} min, {soaked.last_mb:.1f} at the end, peak "
            f"{soaked.peak_mb:.1f}; {soaked.slope_mb_per_h:+.2f} MB/h, goal < {GOAL_SLOPE:g}: {verdict}; "
            f"{soaked.daemon_us:.1f} us of CPU an event; acks after {soaked.ack_p50_ms:.1f} ms (p50), "
            f"{soaked.ack_p99_ms:.1f} ms (p99)"
        )
    report.caution([*others, *([soaked.other_cores] if soaked else [])])
    for failure in failures:
        print(f"FAILED {failure}")
    out: dict[str, Any] = {"machine": about, "resident_mb": figures, "soak": to_builtins(soaked)}
    out |= {"failures": failures, "other_cores": others}
    report.write(arguments.json, out)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
