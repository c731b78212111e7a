"""What all benchmarks share: their options, the machine's name, tables, and JSON."""

import argparse
import datetime as dt
import importlib.metadata
import os
import platform
import sqlite3
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from bridged import __version__

# Beyond so many cores others on the machine are in the way.
QUIET_CORES: Final = 0.15


def options(name: str, doc: str | None, *, runs: int = 5) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(prog=f"python -m bench {name}", description=(doc or "").partition("\n\n")[0])
    parser.add_argument("--runs", type=_count, default=runs, help="default %(default)s")
    parser.add_argument("--json", type=writable, metavar="FILE", help="writes all figures there")
    return parser


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def writable(text: str) -> Path:
    """Before anything is measured: nobody wants to hear it after an hour."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} can't be written: its folder must be there, and yours to write to")
    return path


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = ""
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    packages = ("aiohttp", "aiosqlite", "isal", "msgspec", "uvloop")
    return {
        "cpu": model or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 10**6,
        "kernel": platform.release(),
        "filesystem": filesystem(Path.cwd()),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        **{package: importlib.metadata.version(package) for package in packages},
        "bridged": __version__,
        "commit": _commit(),
        "at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """Of what is measured; "+" if files differ from it; empty where there is no git, or no repository."""
    project = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(project)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        if head.returncode:
            return ""
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "bridged"], capture_output=True, check=False)
    except OSError:
        return ""
    return head.stdout.strip() + ("+" if changed.returncode else "")


def filesystem(path: Path) -> str:
    """The type of the file system that holds a path: on tmpfs an fsync costs nothing, and means nothing."""
    best, kind = "", "unknown"
    for line in _lines("/proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        point = before.split()[4].rstrip("/")
        if len(point) >= len(best) and (f"{path.resolve()}/").startswith(f"{point}/"):
            best, kind = point, after.split()[0]
    return kind


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def heading(about: dict[str, Any]) -> str:
    """The machine in one line."""
    return (
        f"{about['cpu']}, {about['cores']} cores, Linux {about['kernel']}, {about['filesystem']}, load "
        f"{about['load_average']}; Python {about['python']}, SQLite {about['sqlite']}"
    )


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median first, then the range: never one number."""
    if not values:
        return "-"
    low, middle, high = min(values), statistics.median(values), max(values)
    if len(values) == 1:
        return f"{middle:,.{digits}f}"
    return f"{middle:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns, as wide as they must be; the first is text, the others are figures."""
    widths = [max(len(row[at]) for row in [head, *rows]) for at in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(widths[at]) if at == 0 else cell.rjust(widths[at]) for at, cell in enumerate(row)).rstrip()
        for row in [head, *rows]
    )


def write(path: Path | None, figures: dict[str, Any]) -> None:
    """Writes the figures for `--json`."""
    if path is not None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(figures)) + b"\n")


def caution(other_cores: Sequence[float]) -> None:
    """Says so if the machine was not quiet while it was measured."""
    if other_cores and statistics.median(other_cores) > QUIET_CORES:
        print(f"CAUTION: not a quiet machine, others used {spread(other_cores, 2)} cores: rates are too low")
