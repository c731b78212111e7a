"""The page of results: Markdown with plots, from what `--json` and `python -m bench all` left in a folder.

Each section is made from one file, and left out where there is none. The plots need matplotlib (`pip install
'bridged[bench]'`); without it the page has its tables only.
"""

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from bench import plots, report

_PROJECT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = _PROJECT / "bench" / "results"
PAGE: Final = _PROJECT / "docs" / "bench"

Figures = dict[str, Any]
Row = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """Writes the page. 1 when there is nothing to write about."""
    parser = argparse.ArgumentParser(prog="python -m bench report", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="a folder with JSON files; default %(default)s")
    parser.add_argument("--page", type=Path, default=PAGE, help="a folder for README.md and plots; default %(default)s")
    arguments = parser.parse_args(argv)
    results: dict[str, Figures] = {}
    for file in sorted(arguments.results.glob("*.json")):
        try:
            figures = msgspec.json.decode(file.read_bytes(), type=Figures)
            if file.stem in SECTIONS:
                SECTIONS[file.stem][1](figures)
                report.heading(figures["machine"])
            results[file.stem] = figures
        except (OSError, msgspec.MsgspecError) as error:
            print(f"left out: {file}: {error}", file=sys.stderr)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            print(f"left out: {file}: not what `python -m bench {file.stem}` writes: {error!r}", file=sys.stderr)
    if not set(results) & set(SECTIONS):
        print(f"no results in {arguments.results}: run `python -m bench all` first", file=sys.stderr)
        return 1
    arguments.page.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, str] = {}
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is missing (pip install 'bridged[bench]')", file=sys.stderr)
    else:
        pictures = plots.draw(results, rows_of_everybody(results), arguments.page)
    (arguments.page / "README.md").write_text("\n".join(page(results, pictures)) + "\n", encoding="utf-8")
    print(f"written: {arguments.page / 'README.md'}{f' and {len(pictures)} plots' if pictures else ''}")
    return 0


def page(results: dict[str, Figures], pictures: dict[str, str]) -> list[str]:
    """The lines of the page."""
    lines = ["# Results", "", "Made by `python -m bench report`; method and goals are in `bench/README.md`.", ""]
    for name, (title, section) in SECTIONS.items():
        if name not in results:
            continue
        about = results[name].get("machine", {})
        lines += [f"## {title}", ""]
        if picture := pictures.get(name):
            lines += [f"![{title}]({picture})", ""]
        lines += [*section(results[name]), ""]
        noisy = statistics.median(other_cores(results[name]) or [0.0])
        if noisy > report.QUIET_CORES:
            lines += [f"**Not a quiet machine: others used {noisy:.2f} cores. Rates are too low.**", ""]
        lines += [f"<sub>{report.heading(about)}; bridged {_version(about)}, {about.get('at', '')}</sub>", ""]
    return lines


def other_cores(figures: Any) -> list[float]:
    """What others used of the machine, in every run, wherever it stands."""
    if isinstance(figures, list):
        return [cores for each in figures for cores in other_cores(each)]
    if not isinstance(figures, dict):
        return []
    found = []
    for key, value in figures.items():
        if key == "other_cores":
            found += [float(cores) for cores in (value if isinstance(value, list) else [value])]
        else:
            found += other_cores(value)
    return found


def _version(about: Figures) -> str:
    commit = about.get("commit", "")
    return f"{about.get('bridged', '')}{f' ({commit})' if commit else ''}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table; the first column is text, the others are figures."""
    marks = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(row)} |" for row in [head, marks, *rows]]


def figures_of(row: Row, name: str) -> list[float]:
    """One figure a run; a bare number is a run."""
    value = row.get(name)
    if value is None:
        return []
    return [float(each) for each in (value if isinstance(value, list) else [value])]


def rows_of_everybody(results: dict[str, Figures]) -> list[Row]:
    """Bridged and its peers as they ran side by side; bridged's own loads where no peer ran."""
    if "peers" in results:
        return [row for row in results["peers"]["rows"] if not row.get("failure")]
    rows = []
    for name, runs in results.get("path", {}).get("cells", {}).items():
        good = [run for run in runs if not run["failure"]]
        if good:
            row: Row = {"name": f"bridged, {name}", "durable": "synced before ack"}
            row["events_per_s"] = [run["delivered_per_s"] for run in good]
            row["cpu_us_per_event"] = [run["daemon_us"] for run in good]
            row["peak_rss_mb"] = [run["peak_mb"] for run in good]
            rows.append(row)
    return rows


def _path(figures: Figures) -> list[str]:
    rows = []
    floor = statistics.median(each["decode"] + each["encode"] + each["gzip"] for each in figures["floors"])
    for name, runs in figures["cells"].items():
        good = [run for run in runs if not run["failure"]]
        spread = {key: report.spread([run[key] for run in good]) for key in ("committed_per_s", "delivered_per_s")}
        us = [run["daemon_us"] for run in good]
        times = f"{statistics.median(us) / floor:.1f}" if us else "-"
        peak = report.spread([run["peak_mb"] for run in good])
        rows.append([name, spread["committed_per_s"], spread["delivered_per_s"], report.spread(us, 2), times, peak])
    head = ["load", "committed/s", "delivered/s", "daemon us", "x floor", "peak MB"]
    return [*markdown(head, rows), "", f"Floor of the same run: {floor:.2f} us an event."]


def _peers(figures: Figures) -> list[str]:
    rows = []
    for row in figures["rows"]:
        lost = row.get("lost_after_kill")
        rows.append(
            [
                row["name"],
                str(row.get("door", "")),
                str(row.get("durable", "")),
                report.spread(figures_of(row, "events_per_s")),
                report.spread(figures_of(row, "cpu_us_per_event"), 1),
                report.spread(figures_of(row, "peak_rss_mb")),
                "-" if row.get("bytes_on_disk") is None else f"{row['bytes_on_disk'] / 1e6:,.1f}",
                str(row.get("acks", "")),
                "-" if lost is None else f"{lost:,} of {row.get('lost_after_kill_of', '')}",
                str(row.get("failure", "")),
            ]
        )
    head = ["who", "door", "durable", "events/s", "CPU us/event", "peak MB", "disk MB", "acks", "lost after kill -9"]
    head += ["failure"]
    lines = markdown(head, rows)
    for absent in figures.get("absent", []):
        lines += ["", f"{absent['name']}: {absent.get('why', 'not installed')}{_published(absent)}"]
    return lines


def _published(absent: Row) -> str:
    """What others say of it, and who."""
    figures = absent.get("published")
    if not figures:
        return ""
    if isinstance(figures, dict):
        figures = ", ".join(f"{name} {value}" for name, value in figures.items() if value is not None)
    return f"; published: {figures} ({absent.get('source', '')})"


def _latency(figures: Figures) -> list[str]:
    columns = ("ack_p50_ms", "ack_p99_ms", "ack_p999_ms", "delivered_p50_ms", "delivered_p99_ms")
    rows = []
    for door, rate in dict.fromkeys((run["door"], run["rate"]) for run in figures["runs"]):
        good = [run for run in figures["runs"] if (run["door"], run["rate"]) == (door, rate) and not run["failure"]]
        cells = [report.spread([run[name] for run in good], 2 if "ack" in name else 0) for name in columns]
        rows.append([f"{door}, {rate:,.0f}/s", *cells, report.spread([run["daemon_cores"] for run in good], 3)])
    head = ["load", "ack p50", "ack p99", "ack p99.9", "delivered p50", "delivered p99", "cores"]
    per = figures["settings"]["per_request"]
    return [*markdown(head, rows), "", f"Milliseconds from when a request of {per} events was due; open loop."]


def _backlog(figures: Figures) -> list[str]:
    good = [run for run in figures["runs"] if not run["failure"]]
    rows = []
    if good:
        shown = {
            "events waiting": ("events", 0),
            "ready after, s": ("ready_s", 2),
            "drained, events/s": ("drained_per_s", 0),
            "draining, us of CPU an event": ("drain_us", 2),
            "peak MB": ("drain_peak_mb", 0),
            "small again after, s": ("shrunk_s", 1),
        }
        rows = [[name, report.spread([run[key] for run in good], digits)] for name, (key, digits) in shown.items()]
        ratio = [run["final_bytes"] / run["empty_bytes"] for run in good]
        rows.append(["file in the end, of when new", report.spread(ratio, 2)])
    return markdown(["what", "median (min-max)"], rows)


def _scale(figures: Figures) -> list[str]:
    rows = [
        [
            row["name"],
            f"{row['event_bytes']:,.0f}",
            report.spread(row["daemon_us"], 2),
            report.spread(row["events_per_s"]),
            report.spread(row["peak_mb"]),
        ]
        for row in figures["rows"]
    ]
    return markdown(["events", "bytes", "us/event", "events/s", "peak MB"], rows)


def _memory(figures: Figures) -> list[str]:
    rows = [[name, report.spread(mb, 1)] for name, mb in figures["resident_mb"].items()]
    lines = markdown(["state", "resident MB"], rows)
    if soak := figures["soak"]:
        load = f"{soak['rate']:,.0f} events/s for {soak['seconds'] / 60:.0f} min"
        slope = f"{soak['slope_mb_per_h']:+.2f} MB/h after {soak['warm_up_s'] / 60:.0f} min"
        lines += ["", f"Soak: {load}: {slope}, peak {soak['peak_mb']:.0f} MB."]
    return lines


def _pace(figures: Figures) -> list[str]:
    rows = []
    for scenario, every in figures["outcomes"].items():
        share = [
            report.spread([100 * each[name] for each in every], 2) for name in ("delivered_share", "rate_limited_share")
        ]
        rows.append(
            [
                scenario,
                *share,
                *[report.spread([each[n] for each in every], 1) for n in ("longest_gap_s", "recovery_s")],
            ]
        )
    head = ["scenario", "% of the allowed", "% 429", "longest gap, s", "recovery, s"]
    return [*markdown(head, rows), "", f"{figures['runs']} seeds each."]


def _floor(figures: Figures) -> list[str]:
    rows = [
        [step, report.spread([each[step] for each in figures["floor"]], 2)]
        for step in ("decode", "map", "encode", "gzip")
    ]
    return markdown(["step", "us/event"], rows)


def _mapping(figures: Figures) -> list[str]:
    rows = [
        [load, *[report.spread(us, 2) for us in zip(*runs, strict=True)]]
        for load, runs in figures["us_per_event"].items()
    ]
    return markdown(["batches of", "map, us/event", "encode, us/event"], rows)


def _ways(figures: Figures) -> list[str]:
    rows = [[way, report.spread(us, 2)] for way, us in figures["us_per_event"].items()]
    return markdown(["way", "us/event"], rows)


def _spool(figures: Figures) -> list[str]:
    modes = figures["events_per_s"]
    groups = list(next(iter(modes.values()), {}))
    rows = [[group, *[report.spread(mode.get(group, [])) for mode in modes.values()]] for group in groups]
    return markdown(["events a commit", *modes], rows)


SECTIONS: Final[dict[str, tuple[str, Callable[[Figures], list[str]]]]] = {
    "path": ("Events/s through the whole daemon, and what one costs", _path),
    "peers": ("Side by side", _peers),
    "latency": ("How long an event takes, by rate", _latency),
    "backlog": ("A long backlog", _backlog),
    "scale": ("What the cost depends on", _scale),
    "memory": ("Memory", _memory),
    "pace": ("What the pace makes of Mixpanel's limits", _pace),
    "spool": ("What durability costs, events/s", _spool),
    "floor": ("The floor", _floor),
    "decode": ("Ways to decode", _ways),
    "mapping": ("What mapping costs", _mapping),
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
