"""Where the daemon's CPU goes under a load: by thread and by part, in us an event (needs perf, and the right to use it).

The kernel's share is told apart by the system call that it was for. A sample is of whoever runs at that moment, so the
shares are of CPU, not of time: what waits for a disk or for the interpreter's lock is in no row.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct, to_builtins

from bench import data, path, report
from bench.processes import BenchError, Daemon, Loader, Meter, OpenLoader, Sink, folder

LOADS: Final = ("stream", "http-100", "http-10", "stream@30000", "http@30000")
_HERTZ: Final = 997  # beside the rhythm of anything else
_SETTLE_S = 0.5
# Of the end of a shared object's path: the part that it belongs to. The first that is found.
_OBJECTS: Final = {
    "msgspec": "msgspec: decode, encode",
    "isal": "compression",
    "sqlite": "SQLite",
    "uvloop": "uvloop",
    "_http_": "aiohttp's parser",
    "python": "interpreter",
    "libc": "libc: memory, copying",
}
# Of a system call's name.
_CALLS: Final = {
    "fsync|fdatasync": "kernel: fsync",
    "pread|pwrite|ftruncate|fallocate|statfs|fcntl|lseek": "kernel: file",
    "epoll|futex|poll|nanosleep|sched_yield": "kernel: waiting and waking",
    "mmap|munmap|madvise|brk|mremap": "kernel: memory",
    "read|recv|write|send|accept|close|shutdown": "kernel: sockets",
}
_CALL = re.compile(r"^(?:__(?:x64|arm64|se|do|ia32)_|k)sys_(\w+)")
_FRAME = re.compile(r"^\s+[0-9a-f]+ (.*) \((.*)\)$")
_HEAD = re.compile(r"^\s*(\d+)\s*$")


class Profile(Struct, kw_only=True):
    """One load's CPU, by (thread, part)."""

    load: str
    events: int
    daemon_us: float  # of CPU an event, by the kernel's books
    daemon_cores: float
    samples: int
    parts: list[tuple[str, str, float]]  # thread, part, its share: 0 to 1, the largest first
    symbols: list[tuple[str, float]]  # the functions that were met most, with their shares
    other_cores: float


def samples(script: Iterable[str]) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """(thread, frames of (symbol, shared object), the innermost first) of each sample that `perf script` prints."""
    thread, frames = 0, list[tuple[str, str]]()
    for line in script:
        if head := _HEAD.match(line):
            if frames:
                yield thread, frames
            thread, frames = int(head[1]), []
        elif frame := _FRAME.match(line):
            frames.append((frame[1], frame[2]))
    if frames:
        yield thread, frames


def part(frames: Sequence[tuple[str, str]]) -> str:
    """What a sample was for."""
    _, where = frames[0]
    if where.startswith("[") and "vdso" not in where:
        names = [symbol for symbol, at in frames if at.startswith("[")]
        if any("page_fault" in name for name in names):
            return "kernel: memory"
        calls = [found[1] for name in names if (found := _CALL.match(name))]
        # The outermost: what the program asked for.
        asked = next(reversed(calls), "")
        return next((what for pattern, what in _CALLS.items() if re.search(pattern, asked)), "kernel: other")
    name = "/".join(Path(where).parts[-2:])
    return next((what for known, what in _OBJECTS.items() if known in name), "other")


def summed(
    script: Iterable[str], main_thread: int
) -> tuple[int, list[tuple[str, str, float]], list[tuple[str, float]]]:
    """How many samples there were, and the shares of parts and of functions."""
    parts, symbols = Counter[tuple[str, str]](), Counter[str]()
    for thread, frames in samples(script):
        parts["loop" if thread == main_thread else "writer", part(frames)] += 1
        symbols[frames[0][0].partition("+")[0]] += 1
    total = max(1, parts.total())
    return (
        parts.total(),
        [(thread, what, n / total) for (thread, what), n in parts.most_common()],
        [(name, n / total) for name, n in symbols.most_common(15)],
    )


def profile(load: str, seconds: float, events_file: Path) -> Profile:
    """One run, with a daemon and a spool of its own. Raises BenchError when perf can't look at it."""
    with folder() as temporary, Sink(temporary) as sink:
        sink.ready()
        name, _, rate = load.partition("@")
        with Daemon(temporary, sink.port, flush_interval="1s" if rate else "200ms") as daemon:
            daemon.ready()
            with _loader(temporary, daemon, name, rate, seconds, events_file) as loader:
                loader.ready()
                time.sleep(_SETTLE_S)
                meter, began = Meter(daemon, sink, loader), time.monotonic()
                record = ["perf", "record", "-q", "-g", "-F", str(_HERTZ), "-p", str(daemon.process.pid)]
                recorder = subprocess.Popen(
                    [*record, "-o", "perf.data", "--", "sleep", str(seconds)],
                    cwd=temporary,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                try:
                    loaded = loader.load(seconds + 120)
                    used, other_cores = meter.used()
                    wall_s = time.monotonic() - began
                    _, said = recorder.communicate(timeout=60)
                finally:
                    recorder.kill()
                    recorder.wait()
                if recorder.returncode:
                    raise BenchError(f"perf can't look at the daemon: {said.strip()[:500]}")
            daemon.stop()
        script = subprocess.run(
            ["perf", "script", "-i", "perf.data", "-F", "tid,ip,sym,dso"],
            cwd=temporary,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        count, parts, symbols = summed(script.stdout.splitlines(), daemon.process.pid)
        if not count:
            raise BenchError(f"perf saw nothing of the daemon: {script.stderr.strip()[:500]}")
        return Profile(
            load=load,
            events=loaded.events,
            daemon_us=used[0] / max(1, loaded.events) * 1e6,
            daemon_cores=used[0] / wall_s,
            samples=count,
            parts=parts,
            symbols=symbols,
            other_cores=other_cores,
        )


def _loader(
    temporary: Path, daemon: Daemon, name: str, rate: str, seconds: float, events_file: Path
) -> Loader | OpenLoader:
    if not rate:
        return Loader(temporary, path.loader_options(path.CELLS[name], daemon, events_file, seconds=seconds))
    port = daemon.stream_port if name == "stream" else daemon.http_port
    options = ["--door", name, "--port", str(port), "--data", str(events_file), "--rate", rate]
    return OpenLoader(temporary, [*options, "--per-request", "10", "--connections", "64", "--seconds", str(seconds)])


def show(profiles: Sequence[Profile]) -> None:
    """A table of parts by load, in us an event."""
    head = ["thread: part", *(each.load for each in profiles)]
    keys: dict[tuple[str, str], float] = {}
    for each in profiles:
        for thread, what, share in each.parts:
            keys[thread, what] = keys.get((thread, what), 0) + share
    rows = [["all", *(f"{each.daemon_us:.1f}" for each in profiles)]]
    rows.append(["cores", *(f"{each.daemon_cores:.2f}" for each in profiles)])
    for thread, what in sorted(keys, key=lambda key: (key[0], -keys[key])):
        shares = [{(t, w): s for t, w, s in each.parts}.get((thread, what), 0) for each in profiles]
        cells = [f"{share * each.daemon_us:.2f}" for share, each in zip(shares, profiles, strict=True)]
        if max(shares) >= 0.005:
            rows.append([f"{thread}: {what}", *cells])
    print("us of the daemon's CPU an event\n")
    print(report.table(head, rows))
    for each in profiles:
        named = ", ".join(f"{name} {share:.1%}" for name, share in each.symbols[:8])
        print(f"\n{each.load}: {each.samples:,} samples; {named}")
    report.caution([each.other_cores for each in profiles])


def main(argv: Sequence[str]) -> int:
    """Prints where the CPU goes. 1 when perf can't look."""
    parser = argparse.ArgumentParser(prog="python -m bench profile", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--json", type=report.writable, metavar="FILE", help="writes all figures there")
    parser.add_argument(
        "--loads",
        type=lambda text: text.split(","),
        default=list(LOADS),
        metavar="NAME,...",
        help="those of `path`, and stream@RATE, http@RATE: open loop, 10 events a request; default %(default)s",
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="length of a run, default %(default)g")
    arguments = parser.parse_args(argv)
    for load in arguments.loads:
        name, _, rate = load.partition("@")
        if not (name in {"stream", "http"} and rate.isdigit() if rate else name in path.CELLS):
            parser.error(f"no such load: {load}")
    if shutil.which("perf") is None:
        print(
            "profile: perf isn't installed: `apt-get install linux-perf` (Ubuntu: linux-tools-generic)", file=sys.stderr
        )
        return 1
    about = report.machine()
    profiles = []
    with folder() as temporary:
        events_file = temporary / "events.ndjson"
        data.write(events_file, data.DISTINCT)
        try:
            for load in arguments.loads:
                path.say(load)
                profiles.append(profile(load, arguments.seconds, events_file))
        except BenchError as error:
            print(f"profile: {error}", file=sys.stderr)
            return 1
    path.say("")
    print(report.heading(about))
    show(profiles)
    report.write(arguments.json, {"machine": about, "profiles": to_builtins(profiles)})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
