"""What a run of all peers found, as tables and as figures for a page."""

import statistics
from typing import Any, Final

from msgspec import Struct

from bench import report
from bench.peers.catalog import PEERS, PUBLISHED, Door, Peer

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
    for row in BRIDGED:
        if (killed := results.killed.get(row.name)) and killed.lost:
            failures.append(f"{row.name}: lost {killed.lost} acked events")
        if (text := results.differences.get(row.name, "none")) != "none":
            failures.append(f"{row.name}: its own events differ from run to run: {text}")
    for failure in failures:
        print(f"FAILED {failure}")
    return not failures


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
    print("\nmeasured elsewhere (compare with nothing above)")
    for each in absent(results):
        print(f"  {each['name']}: {each['published']} ({each['source']}); here: {each['why']}")
    for name in results.missing.keys() - {each.name for each in PUBLISHED}:
        print(f"  {name}: not installed here, no figure: {results.missing[name]}")


def rows(results: Results) -> list[dict[str, Any]]:
    """What `--json` has for a page: a row for everyone who was measured, with the figures of each run."""
    found = []
    for name, runs in results.runs.items():
        good = [run for run in runs if not run.failure]
        row, killed = ROWS[name], results.killed.get(name)
        found.append(
            {
                "name": name,
                "door": f"http-{row.per_request}" if row.door == "http" else row.door,
                "maps": row.maps,
                "disk": row.disk,
                "durable": row.durable,
                "acks": row.acks,
                "events_per_s": [run.events_per_s for run in good],
                "cpu_us_per_event": [run.cpu_us for run in good],
                "peak_rss_mb": [run.peak_mb for run in good],
                "bytes_on_disk": max((run.disk_bytes for run in good), default=None),
                "written_bytes_per_event": [run.written_bytes / run.events for run in good],
                "lost_after_kill": killed and killed.lost,
                "lost_after_kill_of": killed and f"{killed.events} {killed.of}",
                "differs": results.differences.get(name, ""),
                "events": sum(run.events for run in good),
                "version": results.versions.get(name, ""),
                "note": row.tuned,
                "failure": next((run.failure for run in runs if run.failure), ""),
            }
        )
    return found


def absent(results: Results) -> list[dict[str, Any]]:
    """Who was not measured in this run, with what was measured elsewhere: never to be mixed with this run's figures."""
    return [
        {
            "name": each.name,
            "why": results.missing.get(each.name, "not asked for"),
            "published": each.figures,
            "source": f"measured elsewhere: {each.source}",
        }
        for each in PUBLISHED
        if each.name not in results.runs
    ]
