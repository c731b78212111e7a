"""What an outage costs that lasts longer than events are kept: Mixpanel refuses the credential until all of them have expired.

Millions of events come in while it does; none may expire before its time, all must be in the archive in the end, the spool's
file must become small again by itself, and `bridged replay` must bring each of them to a Mixpanel that is back. The 48 hours
are a minute or two here (`--max-age`): the daemon's own clock is the real one.
"""

import argparse
import gzip
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from bench import data, path, report
from bench.backlog import SHRUNK, spool_bytes
from bench.processes import Child, Daemon, Loader, Sink, ended_by_signals, folder, free_ports, get

_SETTLE_S: Final = 1.5
_LATE_S: Final = 60.0  # given up then


class Run(Struct, kw_only=True):
    """The figures of one outage."""

    events: int
    max_age_s: float
    early_s: float  # the most that anything expired before its time; 0: nothing did
    late_s: float  # from when the last event should have expired until all had
    archived: int
    files: int
    peak_mb: float
    empty_bytes: int
    full_bytes: int
    final_bytes: int
    shrunk_s: float  # from the last expiry until the file was small; 0: it did not become so
    replayed_s: float
    delivered: int
    distinct: int
    problems: list[str]


def measure(events: int, max_age_s: int, shrink_s: float) -> Run:
    """One outage, from the first event to the last one that a replay has delivered."""
    with folder() as temporary:
        data.write(temporary / "events.ndjson", data.DISTINCT)
        port = free_ports(1)[0]
        more = f'[retention]\nmax_age = "{max_age_s}s"\non_expiry = "archive"\narchive_path = "archive"\n'
        with Daemon(temporary, port, probe_interval="2s", more=more) as daemon:
            daemon.ready()
            time.sleep(_SETTLE_S)
            empty_bytes = spool_bytes(temporary)
            refusing = ["-m", "bridged", "emulator", "--listen", f"127.0.0.1:{port}", "--token", "another", "--no-keep"]
            with Child("emulator", refusing, temporary) as emulator:
                emulator.hear(30)
                options = path.loader_options(path.CELLS["stream"], daemon, temporary / "events.ndjson", events=events)
                accepted: list[tuple[float, int]] = [(time.monotonic(), 0)]
                expired: list[tuple[float, int]] = []
                with Loader(temporary, options) as loader:
                    loader.ready()
                    loader.say()
                    while loader.process.poll() is None and accepted[-1][1] < events:
                        _look(daemon, accepted, expired)
                    loader.loaded(120)
                full_bytes = spool_bytes(temporary)
                until = accepted[-1][0] + max_age_s + _LATE_S
                while (not expired or expired[-1][1] < events) and time.monotonic() < until:
                    _look(daemon, accepted, expired)
                all_expired_at = time.monotonic()
                all_accepted_at = min([at for at, known in accepted if known >= events], default=all_expired_at)
            shrunk_s = _shrunk(temporary, empty_bytes, shrink_s)
            final_bytes, peak_mb = spool_bytes(temporary), daemon.memory_mb("VmHWM")
            archive = sorted((temporary / "archive").glob("*.gz"))
            archived = sum(gzip.decompress(file.read_bytes()).count(b"\n") for file in archive)
            with Sink(temporary, port=port, check=True) as sink:
                sink.ready()
                started_at = time.monotonic()
                replay = [sys.executable, "-m", "bridged", "replay", "--config", str(temporary / "config.toml")]
                done = subprocess.run([*replay, *map(str, archive)], capture_output=True, text=True, check=False)
                path.arrivals(sink, daemon, events)
                replayed_s = time.monotonic() - started_at
                daemon.stop()
                arrived = sink.report()
    early_s = max([0.0, *[_accepted_at(accepted, count) + max_age_s - at for at, count in expired if count]])
    problems = [] if not done.returncode else [f"replay ended with {done.returncode}: {done.stderr[-500:]}"]
    if not expired or expired[-1][1] != events:
        problems.append(f"{events} events accepted, {expired[-1][1] if expired else 0} expired")
    if archived != events:
        problems.append(f"{events} events expired, {archived} in the archive")
    if arrived.distinct != events:
        problems.append(f"{events} events replayed, {arrived.distinct} delivered: {done.stderr[-500:]}")
    if early_s > 1.0:  # two looks apart, each of them a request
        problems.append(f"something expired {early_s:.1f} s before its time")
    if not shrunk_s:
        problems.append(f"the spool's file still takes {final_bytes:,} bytes")
    return Run(
        events=events,
        max_age_s=max_age_s,
        early_s=early_s,
        late_s=max(0.0, all_expired_at - all_accepted_at - max_age_s),
        archived=archived,
        files=len(archive),
        peak_mb=peak_mb,
        empty_bytes=empty_bytes,
        full_bytes=full_bytes,
        final_bytes=final_bytes,
        shrunk_s=shrunk_s,
        replayed_s=replayed_s,
        delivered=arrived.events,
        distinct=arrived.distinct,
        problems=problems,
    )


def _look(daemon: Daemon, accepted: list[tuple[float, int]], expired: list[tuple[float, int]]) -> None:
    """Notes when how many events had been accepted, as of before the look, and how many had expired, as of after it."""
    time.sleep(0.1)
    before = time.monotonic()
    books: dict[str, Any] = msgspec.json.decode(get(daemon.admin_port, "/api/status"))["events"]
    accepted.append((before, books["accepted"]))
    expired.append((time.monotonic(), books["expired"]))


def _accepted_at(accepted: list[tuple[float, int]], count: int) -> float:
    """The latest time at which fewer than so many events were known to be accepted: the youngest of them is no older."""
    return max(at for at, known in accepted if known < count)


def _shrunk(temporary: Path, empty_bytes: int, shrink_s: float) -> float:
    """How long it took until the spool's file was small; 0: it did not become so."""
    began = time.monotonic()
    while time.monotonic() - began < shrink_s:
        if spool_bytes(temporary) <= SHRUNK * empty_bytes:
            return time.monotonic() - began
        time.sleep(0.25)
    return 0.0


def main(argv: Sequence[str]) -> int:
    """Prints what became of the events. 1 when one was lost, expired too early, or the file stayed large."""
    parser = argparse.ArgumentParser(prog="python -m bench outage", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--events", type=int, default=5_000_000, help="default %(default)s")
    parser.add_argument(
        "--max-age", type=int, default=90, help="seconds that stand for the 48 hours, default %(default)s"
    )
    parser.add_argument(
        "--shrink-seconds", type=float, default=300.0, help="for the file, at most; default %(default)g"
    )
    arguments = parser.parse_args(argv)
    with ended_by_signals():
        run = measure(arguments.events, arguments.max_age, arguments.shrink_seconds)
    print(report.heading(report.machine()))
    rows = [
        ["events accepted while Mixpanel refused the credential", f"{run.events:,}"],
        [f"expired before their {run.max_age_s:g} s were over, s", f"{run.early_s:.1f}"],
        ["all of them expired after their time was over, s", f"{run.late_s:.1f}"],
        ["in the archive", f"{run.archived:,} in {run.files} files"],
        ["peak MB", f"{run.peak_mb:.0f}"],
        ["the spool when full, MB", f"{run.full_bytes / 1e6:,.0f}"],
        ["afterwards, of when new", f"{run.final_bytes / run.empty_bytes:.2f} after {run.shrunk_s:.0f} s"],
        ["replayed and delivered", f"{run.distinct:,} in {run.replayed_s:.0f} s, {run.delivered - run.distinct} twice"],
    ]
    print(report.table(["what", ""], rows))
    for problem in run.problems:
        print(f"FAILED {problem}")
    return 1 if run.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
