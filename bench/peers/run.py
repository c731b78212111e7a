"""bridged beside what a user would pick instead: events/s, CPU, memory, disk, and what kill -9 loses, in one run.

All get the same events and deliver to the same sink, and take turns, so that what else happens on the machine hits them
alike. A loader is at each one's fastest door. What counts is what has arrived: events / (first byte sent to the sink's
last batch). Each peer is verified once before: the same events must come out as from bridged, and differences are said.
"""

import argparse
import asyncio
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from bench import data, report
from bench.peers import catalog, compare
from bench.peers.catalog import PEERS, PUBLISHED, Door, Missing, Peer
from bench.peers.killing import ACKED, Ledger, load_until_killed
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
_QUIET_CORES = 0.15


class Row(Struct, frozen=True, kw_only=True):
    """Who is measured, and how it is spoken to."""

    name: str
    door: Door
    connections: int = 1
    per_request: int = 1
    maps: bool = True
    disk: bool = True
    durable: str = "yes: synced"
    acks: str = "after the sync"
    tuned: str = "as installed, without rate ceilings, flush interval 200 ms"
    file_events: int = 0
    peer: Peer | None = None  # None: bridged

    def start(self, where: Path, sink: Sink) -> Subject:
        """In a folder that may hold what an earlier life left. Raises Missing, BenchError."""
        if self.peer is None:
            return Bridged(where, sink.port, self.door)
        return Program(self.peer, where, sink.port)


BRIDGED: Final = (
    Row(name="bridged", door="stream"),
    Row(name="bridged-http", door="http", connections=16, per_request=100),
)
_SHARED = ("name", "door", "connections", "per_request", "maps", "disk", "durable", "acks", "tuned", "file_events")
ROWS: Final = {
    row.name: row
    for row in (*BRIDGED, *(Row(**{key: getattr(peer, key) for key in _SHARED}, peer=peer) for peer in PEERS))
}


class Run(Struct, kw_only=True):
    """The figures of one run."""

    events: int = 0
    events_per_s: float = 0
    cpu_us: float = 0
    peak_mb: float = 0
    disk_bytes: int = 0
    written_bytes: int = 0
    other_cores: float = 0
    failure: str = ""


class Killed(Struct, kw_only=True):
    """What came of kill -9 under load and a restart."""

    of: str  # "acked", or "sent" where nothing is ever acked
    events: int
    lost: int
    doubled: int


class Results(Struct, kw_only=True):
    """Everything that was found."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    runs: dict[str, list[Run]] = {}
    differences: dict[str, str] = {}
    killed: dict[str, Killed] = {}
    missing: dict[str, str] = {}
    failed: dict[str, str] = {}
    versions: dict[str, str] = {}


def measure(row: Row, lines: Path, arguments: argparse.Namespace) -> Run:
    """One run: starts sink, subject and loader; waits until everything that was sent has arrived."""
    with folder() as temporary, contextlib.ExitStack() as stack:
        sink = stack.enter_context(Sink(temporary, check=False))
        sink.ready()
        where = temporary / "subject"
        where.mkdir()
        subject = row.start(where, sink)
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
        sink = stack.enter_context(Sink(temporary, check=False, keep=path))
        sink.ready()
        where = temporary / "subject"
        where.mkdir()
        subject = row.start(where, sink)
        stack.enter_context(subject)
        subject.ready()
        events, _, _ = _loader(row, subject, lines, temporary, options, stack)()
        _arrived(sink, subject, events)
        kill(subject)


def crash(row: Row, lines: Path, count: int) -> Killed:
    """Kill -9 under load, a restart in the same folder, and then: what of that which went in has come out?"""
    events = list(_events(lines, count))
    ids = [msgspec.json.decode(line)["id"] for line in events]
    with folder() as temporary, contextlib.ExitStack() as stack:
        path = temporary / "kept"
        sink = stack.enter_context(Sink(temporary, check=False, keep=path))
        sink.ready()
        where = temporary / "subject"
        where.mkdir()
        subject = row.start(where, sink)
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
        again = row.start(where, sink)
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
                kept = temporary / "kept"
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


# -- the tables -------------------------------------------------------------------------------------------------------


def show(results: Results) -> bool:
    """Prints the tables. False when something broke, or bridged lost an event."""
    print(report.heading(results.machine))
    print(f"median (min-max) of {results.settings['runs']} runs; loader and sink on the same cores\n")
    good = {name: [run for run in runs if not run.failure] for name, runs in results.runs.items()}
    head = ["peer", "events/s", "CPU us", "peak MB", "disk MB", "written B", "durable", "acks", "lost after kill -9"]
    table = [
        [
            name,
            report.spread([run.events_per_s for run in runs]),
            report.spread([run.cpu_us for run in runs], 2),
            report.spread([run.peak_mb for run in runs]),
            f"{statistics.median(run.disk_bytes for run in runs) / 1e6:,.1f}" if runs else "-",
            f"{statistics.median(run.written_bytes / run.events for run in runs):,.0f}" if runs else "-",
            ROWS[name].durable,
            ROWS[name].acks,
            _lost(results.killed.get(name)),
        ]
        for name, runs in good.items()
    ]
    print(report.table(head, table))
    print(
        "CPU: of all its processes and threads, an event. disk: the most its files took. written: to disk, an event.\n"
        "lost: of what was acked, or of what was sent where nothing is acked; `again` is what was delivered twice."
    )
    _show_ratios(good)
    print("\nsettings")
    for name in good:
        version = results.versions.get(name, "")
        print(f"  {name}: {ROWS[name].tuned}{f' ({version})' if version else ''}")
    print("\nwhat differs from bridged's events")
    for name, text in results.differences.items():
        print(f"  {name}: {text if ROWS[name].maps else f'{text} (not mapped)'}")
    _show_absent(results)
    others = [run.other_cores for runs in good.values() for run in runs]
    if others and statistics.median(others) > _QUIET_CORES:
        print(f"CAUTION: not a quiet machine, others used {report.spread(others, 2)} cores: rates are too low")
    failures = [f"{name}: {run.failure}" for name, runs in results.runs.items() for run in runs if run.failure]
    failures += [f"{name}: {problem}" for name, problem in results.failed.items()]
    for failure in failures:
        print(f"FAILED {failure}")
    lost = [row.name for row in BRIDGED if row.name in results.killed and results.killed[row.name].lost]
    return not failures and not lost


def _lost(killed: Killed | None) -> str:
    if killed is None:
        return "-"
    again = f", {killed.doubled:,} again" if killed.doubled else ""
    return f"{killed.lost:,} of {killed.events:,} {killed.of}{again}"


def _show_ratios(good: dict[str, list[Run]]) -> None:
    """Our daemon against the fastest of this run that does the same: maps, and writes to disk."""
    rivals = [name for name, runs in good.items() if runs and ROWS[name].peer and ROWS[name].maps and ROWS[name].disk]
    if not rivals or not good.get("bridged"):
        return

    def middle(name: str, figure: str) -> float:
        return float(statistics.median(getattr(run, figure) for run in good[name]))

    fastest = max(rivals, key=lambda name: middle(name, "events_per_s"))
    rate = middle("bridged", "events_per_s") / middle(fastest, "events_per_s")
    cost = middle("bridged", "cpu_us") / middle(fastest, "cpu_us")
    print(f"\nbridged beside {fastest}, the fastest that maps and is on disk: {rate:.2f} x events/s, {cost:.2f} x CPU")


def _show_absent(results: Results) -> None:
    here = results.runs.keys()
    print("\nmeasured elsewhere (a quiet 2-core machine, 704-byte events; compare with nothing above)")
    for each in PUBLISHED:
        if each.name not in here:
            why = results.missing.get(each.name) or each.wanted or "not asked for"
            print(f"  {each.name}: {each.events_per_s:,} events/s, {each.cpu_us:g} us; here: {why}")
    for name in results.missing.keys() - {each.name for each in PUBLISHED}:
        print(f"  {name}: not installed here, no figure: {results.missing[name]}")


def rows(results: Results) -> list[dict[str, Any]]:
    """What `--json` has for `bench report`: a row for everyone who was measured."""
    found = []
    for name, runs in results.runs.items():
        good = [run for run in runs if not run.failure]
        row, killed = ROWS[name], results.killed.get(name)
        if good:
            rates = [run.events_per_s for run in good]
            found.append(
                {
                    "name": name,
                    "door": row.door,
                    "maps": row.maps,
                    "durable": row.durable,
                    "acks": row.acks,
                    "events_per_s": {"median": statistics.median(rates), "min": min(rates), "max": max(rates)},
                    "cpu_us_per_event": statistics.median(run.cpu_us for run in good),
                    "peak_rss_mb": statistics.median(run.peak_mb for run in good),
                    "disk_bytes": statistics.median(run.disk_bytes for run in good),
                    "written_bytes_per_event": statistics.median(run.written_bytes / run.events for run in good),
                    "lost_after_kill": killed and {"lost": killed.lost, "events": killed.events, "of": killed.of},
                    "version": results.versions.get(name, ""),
                    "note": row.tuned,
                }
            )
    return found


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark. 1 when one broke, or bridged lost an event; who isn't installed is listed."""
    parser = report.options("peers", __doc__, runs=3)
    parser.add_argument("--only", metavar="NAME,...", type=_names, default=list(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="length of a run, default %(default)g")
    parser.add_argument("--events", type=int, help="a run has so many events instead")
    parser.add_argument("--no-kill", dest="kill", action="store_false", help="nobody is killed")
    where = f"installs the packages from PyPI and npm into {catalog.TOOLS} ($BENCH_PEERS), and ends"
    parser.add_argument("--install", action="store_true", help=where)
    arguments = parser.parse_args(argv)
    if arguments.install:
        try:
            catalog.install()
        except subprocess.CalledProcessError as error:
            print(f"peers: {error}", file=sys.stderr)
            return 1
        return 0
    with ended_by_signals():
        results = run_all(arguments)
    whole = show(results)
    report.write(arguments.json, {**msgspec.to_builtins(results), "peers": rows(results)})
    return 0 if whole else 1


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(ROWS):
        raise argparse.ArgumentTypeError(f"no such peer: {', '.join(sorted(unknown))}")
    return names
