"""How long an event takes, at a given rate: from when it was due to its ack, and to its arrival at Mixpanel.

Open loop: the rate stands, whatever the daemon does (see `bench.openloop`). The daemon is as installed, with a flush
interval of 1 s; only Mixpanel's ceilings are off, since 100,000 events/s are above them and would only fill the spool.
The sink notes when each batch was there, and afterwards each event of each batch is held against the time at which it
was due. A run in which an event was lost, doubled or never acked has failed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct, structs, to_builtins

from bench import data, path, report
from bench.openloop import Report as Loaded
from bench.openloop import percentile
from bench.processes import BenchError, Daemon, Meter, OpenLoader, Sink, ended_by_signals, folder
from bench.sink import Arrival

RATES: Final = (1_000, 5_000, 30_000, 100_000)
FLUSH_S: Final = 1.0
_DELIVERED_S = 60.0
_SETTLE_S = 0.3


class Run(Struct, kw_only=True):
    """The figures of one run; milliseconds from when a request was due."""

    door: str
    rate: float  # events/s
    events: int
    ack_p50_ms: float
    ack_p99_ms: float
    ack_p999_ms: float
    ack_max_ms: float
    delivered_p50_ms: float
    delivered_p99_ms: float
    daemon_cores: float  # while the load lasted
    daemon_us: float  # of CPU an event, until everything was delivered
    late_p50_ms: float  # of the loader itself: from when a request was due to its first byte
    late_p99_ms: float
    busy: int
    other_cores: float
    failure: str = ""


class Goal(Struct, frozen=True):
    """At a rate, a figure is not to exceed this."""

    door: str
    rate: float
    field: str
    most: float
    words: str


GOALS: Final = (
    Goal("http", 5_000, "ack_p50_ms", 2.0, "ack p50 in ms"),
    Goal("http", 5_000, "ack_p99_ms", 10.0, "ack p99 in ms"),
    Goal("http", 5_000, "delivered_p99_ms", FLUSH_S * 1e3 + 50, "delivered p99 in ms"),
    Goal("stream", 5_000, "ack_p50_ms", 2.0, "ack p50 in ms"),
    Goal("stream", 5_000, "ack_p99_ms", 10.0, "ack p99 in ms"),
    Goal("stream", 5_000, "delivered_p99_ms", FLUSH_S * 1e3 + 50, "delivered p99 in ms"),
    Goal("http", 30_000, "daemon_cores", 0.12, "cores of the daemon"),
    Goal("stream", 30_000, "daemon_cores", 0.12, "cores of the daemon"),
)


def measure(door: str, rate: float, arguments: argparse.Namespace, events_file: Path, order: dict[str, int]) -> Run:
    """One run, with a daemon and a spool of its own."""
    with folder() as temporary, Sink(temporary, arrivals=True) as sink:
        sink.ready()
        with Daemon(temporary, sink.port, flush_interval=f"{FLUSH_S:g}s") as daemon:
            daemon.ready()
            port = daemon.stream_port if door == "stream" else daemon.http_port
            options = ["--door", door, "--port", str(port), "--data", str(events_file), "--rate", str(rate)]
            options += ["--per-request", str(arguments.per_request), "--connections", str(arguments.connections)]
            with OpenLoader(temporary, [*options, "--seconds", str(arguments.seconds)]) as loader:
                loader.ready()
                time.sleep(_SETTLE_S)
                before = sink.report()
                meter = Meter(daemon, sink, loader)
                loaded = loader.load(arguments.seconds + 120)
                while_loaded_s = meter.used()[0][0]
                until = time.monotonic() + _DELIVERED_S
                while (arrived := sink.report()).events < loaded.events and time.monotonic() < until:
                    time.sleep(0.05)
                time.sleep(_SETTLE_S)
                (daemon_s, _, _), other_cores = meter.used()
            daemon.stop()
        failure = "" if not arrived.bad else f"{arrived.bad} requests that the sink didn't understand"
        if loaded.acked < loaded.requests or sink.report().events - before.events != loaded.events:
            failure = f"{loaded.events} events sent in {loaded.requests} requests, {loaded.acked} of them acked, "
            failure += f"{sink.report().events} events delivered"
        delivered, problem = latencies(sink.arrivals(), loaded, order, arguments.per_request)
        return Run(
            door=door,
            rate=rate,
            events=loaded.events,
            ack_p50_ms=loaded.p50_ms,
            ack_p99_ms=loaded.p99_ms,
            ack_p999_ms=loaded.p999_ms,
            ack_max_ms=loaded.max_ms,
            delivered_p50_ms=percentile(delivered, 0.5) * 1e3,
            delivered_p99_ms=percentile(delivered, 0.99) * 1e3,
            daemon_cores=while_loaded_s / max(loaded.acked_at - loaded.started_at, 1e-3),
            daemon_us=daemon_s / max(1, loaded.events) * 1e6,
            late_p50_ms=loaded.late_p50_ms,
            late_p99_ms=loaded.late_p99_ms,
            busy=loaded.busy,
            other_cores=other_cores,
            failure=failure or problem,
        )


def order_of(events_file: Path) -> dict[str, int]:
    """Where in the file each event is, by its id without the two digits that tell the round."""
    return {line.partition(b'"id":"')[2][:34].decode(): number for number, line in enumerate(data.read(events_file))}


def latencies(
    arrivals: Sequence[Arrival], loaded: Loaded, order: dict[str, int], per_request: int
) -> tuple[list[float], str]:
    """Seconds from due to arrived of each event, in order of size; and what is wrong, if an event came twice."""
    requests = len(order) // per_request
    found: dict[str, float] = {}
    events = 0
    for arrival in arrivals:
        events += len(arrival.ids)
        for id_ in arrival.ids:
            due = int(id_[34:], 16) * requests + order[id_[:34]] // per_request
            found[id_] = arrival.at - loaded.started_at - due * loaded.interval_s
    return sorted(found.values()) or [0.0], f"{events - len(found)} events came twice" if events != len(found) else ""


def run_all(arguments: argparse.Namespace) -> list[Run]:
    """Rates and doors take turns."""
    runs = []
    with folder() as temporary:
        events_file = temporary / "events.ndjson"
        distinct = max(data.DISTINCT, round(max(arguments.rates) * arguments.seconds / 250))
        # Each round is as long as the others, in requests.
        data.write(events_file, -(-distinct // arguments.per_request) * arguments.per_request)
        order = order_of(events_file)
        for number in range(arguments.runs):
            for rate in arguments.rates:
                for door in arguments.doors:
                    path.say(f"run {number + 1} of {arguments.runs}: {door}, {rate:,.0f} events/s")
                    try:
                        runs.append(measure(door, rate, arguments, events_file, order))
                    except BenchError as error:
                        empty = {field.name: 0 for field in structs.fields(Run) if field.required}
                        runs.append(Run(**{**empty, "door": door, "rate": rate, "failure": str(error)}))
    path.say("")
    return runs


def show(runs: Sequence[Run], arguments: argparse.Namespace) -> None:
    """Prints the table and the goals."""
    per = arguments.per_request
    print(
        f"{per} events a request, {arguments.seconds:g} s; ms from when a request was due, median (min-max) of "
        f"{arguments.runs} runs; flush interval {FLUSH_S:g} s\n"
    )
    columns = {
        "ack p50": ("ack_p50_ms", 2),
        "p99": ("ack_p99_ms", 2),
        "p99.9": ("ack_p999_ms", 1),
        "delivered p50": ("delivered_p50_ms", 0),
        "delivered p99": ("delivered_p99_ms", 0),
        "daemon cores": ("daemon_cores", 3),
        "us/event": ("daemon_us", 1),
        "loader late p99": ("late_p99_ms", 2),
    }
    rows = []
    for rate in arguments.rates:
        for door in arguments.doors:
            good = [run for run in runs if (run.door, run.rate) == (door, rate) and not run.failure]
            figures = [report.spread([getattr(run, name) for run in good], digits) for name, digits in columns.values()]
            rows.append([f"{door}, {rate:,.0f}/s", *figures])
    print(report.table(["load", *columns], rows))
    print()
    for goal in GOALS:
        good = [run for run in runs if (run.door, run.rate) == (goal.door, goal.rate) and not run.failure]
        if good:
            middle = statistics.median(getattr(run, goal.field) for run in good)
            verdict = "met" if middle <= goal.most else "MISSED"
            print(f"{goal.door} at {goal.rate:,.0f}/s: {goal.words} {middle:.3g}, goal {goal.most:g}: {verdict}")
    report.caution([run.other_cores for run in runs if not run.failure])
    for run in runs:
        if run.failure:
            print(f"FAILED {run.door} at {run.rate:,.0f}/s: {run.failure}")


def main(argv: Sequence[str]) -> int:
    """Prints latencies by rate and door. 1 when an event was lost or doubled; missed goals are only shown."""
    parser = report.options("latency", __doc__, runs=3)
    numbers = lambda text: [float(rate) for rate in text.split(",")]  # noqa: E731  # an option's type, used once
    parser.add_argument("--rates", metavar="N,...", type=numbers, default=list(RATES), help="events/s")
    parser.add_argument("--doors", metavar="NAME,...", type=lambda text: text.split(","), default=["http", "stream"])
    parser.add_argument("--per-request", type=int, default=10, help="events a request, default %(default)s")
    parser.add_argument("--connections", type=int, default=64, help="of the HTTP door, default %(default)s")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a run, default %(default)g")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.doors) - {"http", "stream"}:
        parser.error(f"no such door: {', '.join(sorted(unknown))}")
    about = report.machine()
    with ended_by_signals():
        runs = run_all(arguments)
    print(report.heading(about))
    show(runs, arguments)
    settings = {"per_request": arguments.per_request, "seconds": arguments.seconds, "runs": arguments.runs}
    report.write(arguments.json, {"machine": about, "settings": settings, "runs": to_builtins(runs)})
    return 1 if any(run.failure for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
