"""bridged beside what a user would pick instead: events/s, CPU, memory, disk, and what kill -9 loses, in one run.

All get the same events and deliver to the same sink, and take turns, so that what else happens on the machine hits them
alike. A loader is at each one's fastest door. What counts is what has arrived: events / (first byte sent to the sink's
last batch). Each peer is verified once before: the same events must come out as from bridged, and differences are said.
"""

import argparse
import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from bench import data, report
from bench.peers import compare, starting
from bench.peers.killing import ACKED, Ledger, load_until_killed
from bench.peers.results import BRIDGED, ROWS, Killed, Results, Row, Run, absent, rows, show
from bench.peers.starting import Missing
from bench.peers.subject import Bridged, Disk, Program, Subject, cpu_s, kill, peak_mb, written_bytes
from bench.processes import BenchError, Loader, Sink, ended_by_signals, folder, machine_cpu_s
from bench.sink import Report as Arrived

_SECONDS: Final = 3.0
_VERIFIED: Final = 20_000
_KILL_EVENTS: Final = 400_000
_KILL_AFTER_S: Final = 0.8
_LONGEST_S = 120.0
_SETTLE_S = 0.3
# The sink has everything when it has got nothing new for so long, or all of it.
_QUIET_S = 4.0
_DOUBLES_S = 1.0
_FIRST_S = 20.0


def _start(row: Row, where: Path, sink: Sink) -> Subject:
    """In a folder that may hold what an earlier life left. Raises Missing, BenchError."""
    return Bridged(where, sink.port, row.door) if row.peer is None else Program(row.peer, where, sink.port)


def measure(row: Row, lines: Path, arguments: argparse.Namespace) -> Run:
    """One run: starts sink, subject and loader; waits until everything that was sent has arrived."""
    with folder() as temporary, contextlib.ExitStack() as stack:
        sink = stack.enter_context(Sink(temporary))
        sink.ready()
        where = temporary / "subject"
        where.mkdir()
        subject = _start(row, where, sink)
        stack.enter_context(subject)
        subject.ready()
        disk = stack.enter_context(Disk(where))
        load = _loader(row, subject, lines, temporary, arguments, stack)
        time.sleep(_SETTLE_S)
        cpu_before, machine_before, written_before = cpu_s(subject), machine_cpu_s(), written_bytes(subject)
        sink_before = sink.report().cpu_s
        began = time.monotonic()
        events, started_at, loader_cpu_s = load()
        arrived = _arrived(sink, subject, events)
        time.sleep(_SETTLE_S)
        spent_s, machine_s = cpu_s(subject) - cpu_before, machine_cpu_s() - machine_before
        wall_s = time.monotonic() - began
        run = Run(
            events=events,
            events_per_s=events / max(1e-9, arrived.last_at - started_at),
            cpu_us=spent_s / events * 1e6,
            peak_mb=peak_mb(subject),
            disk_bytes=disk.most,
            written_bytes=written_bytes(subject) - written_before,
        )
        ours_s = spent_s + loader_cpu_s + sink.report().cpu_s - sink_before
        run.other_cores = max(0.0, machine_s - ours_s) / wall_s
        if arrived.events != events or arrived.bad:
            run.failure = f"{events} sent, {arrived.events} delivered, {arrived.bad} requests not understood"
            run.failure += f"\n{subject.last_words()}"
        # In good order or not: it has done its work, and some take their time.
        kill(subject)
        return run


def _loader(
    row: Row,
    subject: Subject,
    lines: Path,
    temporary: Path,
    arguments: argparse.Namespace,
    stack: contextlib.ExitStack,
) -> Callable[[], tuple[int, float, float]]:
    """Gets everything ready; gives what sends it all and says: how many events, since when, at which cost."""
    if row.door == "file":
        count = min(row.file_events, arguments.events or row.file_events)
        written = _write_events(subject.folder, lines, count)

        def show() -> tuple[int, float, float]:
            started_at = time.monotonic()
            written.rename(subject.folder / "events.ndjson")
            return count, started_at, 0.0

        return show
    options = ["--door", row.door, "--port", str(subject.port), "--data", str(lines)]
    options += ["--connections", str(row.connections), "--per-request", str(row.per_request)]
    options += ["--events", str(arguments.events)] if arguments.events else ["--seconds", str(arguments.seconds)]
    loader = stack.enter_context(Loader(temporary, options))
    loader.ready()

    def run() -> tuple[int, float, float]:
        loaded = loader.load(_LONGEST_S)
        return loaded.events, loaded.started_at, loaded.cpu_s

    return run


def _write_events(where: Path, lines: Path, count: int) -> Path:
    path = where / "events.ndjson.part"
    with path.open("wb") as file:
        file.writelines(_events(lines, count))
    return path


def _events(path: Path, count: int) -> Iterator[bytes]:
    """So many different events of a file that bench.data wrote."""
    lines = data.read(path)
    for number in range(-(-count // len(lines))):
        yield from (data.patched(line, number) for line in lines[: count - number * len(lines)])


def _arrived(sink: Sink, subject: Subject, events: int, *, quiet_s: float = _QUIET_S) -> Arrived:
    """Waits until the sink has got so many events, or nothing more comes."""
    arrived = sink.report()
    quiet_since = time.monotonic()
    while arrived.events < events and time.monotonic() - quiet_since < quiet_s and subject.process.poll() is None:
        time.sleep(0.02)
        before, arrived = arrived, sink.report()
        if arrived.events != before.events:
            quiet_since = time.monotonic()
    return arrived


def keep(row: Row, lines: Path, count: int, path: Path, arguments: argparse.Namespace) -> None:
    """One life with a sink that keeps everything: so many events go in."""
    options = argparse.Namespace(**{**vars(arguments), "events": count})
    with folder() as temporary, contextlib.ExitStack() as stack:
        sink = stack.enter_context(Sink(temporary, keep=path))
        sink.ready()
        where = temporary / "subject"
        where.mkdir()
        subject = _start(row, where, sink)
        stack.enter_context(subject)
        subject.ready()
        events, _, _ = _loader(row, subject, lines, temporary, options, stack)()
        _arrived(sink, subject, events)
        # For what comes twice.
        time.sleep(_SETTLE_S)
        kill(subject)


def crash(row: Row, lines: Path, count: int) -> Killed:
    """Kill -9 under load, a restart in the same folder, and then: what of that which went in has come out?"""
    events = list(_events(lines, count))
    ids = [msgspec.json.decode(line)["id"] for line in events]
    with folder() as temporary, contextlib.ExitStack() as stack:
        path = temporary / "kept"
        sink = stack.enter_context(Sink(temporary, keep=path))
        sink.ready()
        where = temporary / "subject"
        where.mkdir()
        subject = _start(row, where, sink)
        stack.enter_context(subject)
        subject.ready()
        if row.door == "file":
            ledger = _read_until_killed(subject, sink, events)
        else:
            ledger = asyncio.run(
                load_until_killed(
                    subject,
                    row.door,
                    events,
                    lambda: sink.report().events,
                    connections=row.connections,
                    per_request=row.per_request,
                    seconds=_KILL_AFTER_S,
                )
            )
        again = _start(row, where, sink)
        stack.enter_context(again)
        again.ready()
        acks = row.door in ACKED
        promised = ledger.acked if acks else ledger.sent
        if _arrived(sink, again, len(promised)).events >= len(promised):
            # What came twice may stand for what is still to come.
            _arrived(sink, again, sys.maxsize, quiet_s=_DOUBLES_S)
        kill(again)
        came = compare.insert_ids(path)
        return Killed(
            of="acked" if acks else "sent",
            events=len(promised),
            lost=sum(ids[place] not in came for place in promised),
            doubled=came.total() - len(came),
        )


def _read_until_killed(subject: Subject, sink: Sink, events: Sequence[bytes]) -> Ledger:
    """The same for who reads a file: all of it counts as sent."""
    part = subject.folder / "events.ndjson.part"
    part.write_bytes(b"".join(events))
    part.rename(subject.folder / "events.ndjson")
    until = time.monotonic() + _FIRST_S
    while not sink.report().events and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(_KILL_AFTER_S)
    kill(subject)
    ledger = Ledger()
    ledger.sent.update(range(len(events)))
    return ledger


def run_all(arguments: argparse.Namespace) -> Results:
    """Looks who is there; verifies each once, kills each once, then measures: everyone in turn, as often as asked."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    results = Results(machine=report.machine(), settings=settings)
    with folder() as temporary:
        lines = temporary / "events.ndjson"
        data.write(lines, min(data.DISTINCT, arguments.events or data.DISTINCT))
        rows = [row for name in arguments.only if (row := _present(ROWS[name], temporary, results)) is not None]
        count = min(_VERIFIED, arguments.events or _VERIFIED)
        reference = temporary / "bridged"
        keep(BRIDGED[0], lines, count, reference, arguments)
        ours = compare.mapped(reference)
        for row in rows:
            with _failing(row, results):
                _say(f"verifying {row.name}")
                kept = temporary / f"{row.name}.kept"
                keep(row, lines, count, kept, arguments)
                results.differences[row.name] = compare.difference(ours, kept, maps=row.maps).text()
        for row in rows if arguments.kill else ():
            with _failing(row, results):
                _say(f"killing {row.name}")
                count = min(_KILL_EVENTS, arguments.events or _KILL_EVENTS)
                results.killed[row.name] = crash(row, lines, count)
        for number in range(arguments.runs):
            for row in rows:
                if row.name not in results.failed:
                    with _failing(row, results):
                        _say(f"run {number + 1} of {arguments.runs}: {row.name}")
                        run = measure(row, lines, arguments)
                        results.runs.setdefault(row.name, []).append(run)
    _say("")
    return results


def _present(row: Row, temporary: Path, results: Results) -> Row | None:
    if row.peer is not None:
        try:
            row.peer.command(temporary, 1, 1)
            results.versions[row.name] = row.peer.version()
        except Missing as missing:
            results.missing[row.name] = str(missing)
            return None
    return row


@contextlib.contextmanager
def _failing(row: Row, results: Results) -> Iterator[None]:
    """One that breaks is out, and the others go on."""
    try:
        yield
    except (BenchError, msgspec.DecodeError, OSError, KeyError) as error:
        results.failed[row.name] = f"{type(error).__name__}: {error}"


def _say(progress: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{progress}", end="", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark. 1 when one broke, or bridged lost an event; who isn't installed is listed."""
    parser = report.options("peers", __doc__, runs=3)
    parser.add_argument("--only", metavar="NAME,...", type=_names, default=list(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="length of a run, default %(default)g")
    parser.add_argument("--events", type=int, help="a run has so many events instead")
    parser.add_argument("--no-kill", dest="kill", action="store_false", help="nobody is killed")
    where = f"installs the packages from PyPI and npm into {starting.TOOLS} ($BENCH_PEERS), and ends"
    parser.add_argument("--install", action="store_true", help=where)
    arguments = parser.parse_args(argv)
    if arguments.install:
        try:
            starting.install()
        except subprocess.CalledProcessError as error:
            print(f"peers: {error}", file=sys.stderr)
            return 1
        return 0
    try:
        with ended_by_signals():
            results = run_all(arguments)
    except BenchError as error:
        print(f"peers: bridged itself: {error}", file=sys.stderr)
        return 1
    whole = show(results)
    report.write(arguments.json, {**msgspec.to_builtins(results), "rows": rows(results), "absent": absent(results)})
    return 0 if whole else 1


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(ROWS):
        raise argparse.ArgumentTypeError(f"no such peer: {', '.join(sorted(unknown))}")
    return names
