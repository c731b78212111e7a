"""The plots of the page. Imports matplotlib when it draws: the page is made without it, too."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from bench import report

_OURS: Final = "#1f5fa8"
_THEIRS: Final = "#9aa5b1"
_INK: Final = "#333333"
_DOORS: Final = {"http": "#c2571a", "stream": "#1f5fa8"}


def draw(results: dict[str, Any], everybody: Sequence[dict[str, Any]], folder: Path) -> dict[str, str]:
    """Draws what there are figures for; gives the file names by section."""
    import matplotlib as mpl  # noqa: PLC0415  # an extra: the page is made without it

    mpl.use("Agg")
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.color": _INK})
    pictures = {}
    if everybody:
        whose = "peers" if "peers" in results else "path"
        pictures[whose] = _throughput(everybody, folder / "throughput.png", results[whose].get("machine", {}))
    drawers: dict[str, Callable[[dict[str, Any], Path], str]] = {
        "latency": _latency,
        "memory": _memory,
        "scale": _scale,
    }
    for name, drawer in drawers.items():
        if name in results and (file := drawer(results[name], folder / f"{name}.png")):
            pictures[name] = file
    return pictures


def _save(figure: Any, file: Path, about: dict[str, Any]) -> str:
    """Writes it, with the machine below."""
    if about:
        figure.text(0.01, 0.005, f"{report.heading(about)}, {about.get('at', '')[:10]}", fontsize=6, color="#777777")
    figure.tight_layout(rect=(0, 0.025, 1, 1))
    figure.savefig(file, dpi=130)
    return file.name


def _throughput(rows: Sequence[dict[str, Any]], file: Path, about: dict[str, Any]) -> str:
    """Two panels of bars: events/s, and CPU an event; whiskers from the least to the most."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # as above

    def figures(row: dict[str, Any], name: str) -> list[float]:
        value = row.get(name)
        return [] if value is None else [float(v) for v in (value if isinstance(value, list) else [value])]

    shown = [row for row in rows if figures(row, "events_per_s")]
    shown.sort(key=lambda row: statistics.median(figures(row, "events_per_s")))
    figure = Figure(figsize=(10, 1.2 + 0.32 * len(shown)))
    for at, (name, title, unit) in enumerate(
        (("events_per_s", "events a second", 1e3), ("cpu_us_per_event", "CPU, microseconds an event", 1.0)), 1
    ):
        axes = figure.add_subplot(1, 2, at)
        labels = [f"{row['name']} ({row['door']})" if row.get("door") else row["name"] for row in shown]
        for place, row in enumerate(shown):
            values = [value / unit for value in figures(row, name)]
            if not values:
                continue
            middle = statistics.median(values)
            whiskers = [[middle - min(values)], [max(values) - middle]]
            colour = _OURS if row["name"].startswith("bridged") else _THEIRS
            axes.barh(place, middle, color=colour, xerr=whiskers, error_kw={"ecolor": _INK, "elinewidth": 0.8})
            axes.text(
                max(values), place, f"  {middle:,.0f}k" if unit > 1 else f"  {middle:,.1f}", va="center", fontsize=8
            )
        axes.set_yticks(range(len(shown)), labels if at == 1 else [""] * len(shown))
        axes.set_title(title, loc="left", fontsize=10)
        axes.margins(x=0.15)
        axes.xaxis.set_major_formatter("{x:,g}k" if unit > 1 else "{x:,g}")
    return _save(figure, file, about)


def _latency(figures: dict[str, Any], file: Path) -> str:
    """Milliseconds against the rate: acks on the left, deliveries on the right."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # as above

    good = [run for run in figures["runs"] if not run["failure"]]
    if not good:
        return ""
    figure = Figure(figsize=(10, 4))
    panels = (
        (
            "from due to ack, on disk",
            (("ack_p50_ms", "p50", "-"), ("ack_p99_ms", "p99", "--"), ("ack_p999_ms", "p99.9", ":")),
        ),
        ("from due to Mixpanel", (("delivered_p50_ms", "p50", "-"), ("delivered_p99_ms", "p99", "--"))),
    )
    for at, (title, lines) in enumerate(panels, 1):
        axes = figure.add_subplot(1, 2, at)
        for door in dict.fromkeys(run["door"] for run in good):
            rates = sorted({run["rate"] for run in good if run["door"] == door})
            for name, label, style in lines:
                middle = [
                    statistics.median(run[name] for run in good if (run["door"], run["rate"]) == (door, rate))
                    for rate in rates
                ]
                axes.plot(rates, middle, style, color=_DOORS[door], marker="o", markersize=3, label=f"{door}, {label}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("events a second, as offered")
        axes.set_ylabel("milliseconds")
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(visible=True, which="major", color="#e5e5e5", linewidth=0.6)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,g}")
        axes.legend(frameon=False, fontsize=8)
    return _save(figure, file, figures["machine"])


def _memory(figures: dict[str, Any], file: Path) -> str:
    """The soak: resident memory over time, with its straight line."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # as above

    soak = figures["soak"]
    if not soak or len(soak["samples"]) < 2:
        return ""
    figure = Figure(figsize=(10, 3))
    axes = figure.add_subplot()
    times, mb = zip(*soak["samples"], strict=True)
    axes.plot([at / 60 for at in times], mb, color=_OURS, linewidth=1)
    axes.axvline(soak["warm_up_s"] / 60, color=_THEIRS, linewidth=0.8, linestyle=":")
    axes.set_ylim(0, max(mb) * 1.25)
    axes.set_xlabel("minutes")
    axes.set_ylabel("resident MB")
    slope = f"{soak['slope_mb_per_h']:+.2f} MB/h after the warm-up"
    axes.set_title(f"{soak['rate']:,.0f} events/s: {slope}", loc="left", fontsize=10)
    return _save(figure, file, figures["machine"])


def _scale(figures: dict[str, Any], file: Path) -> str:
    """CPU an event by kind of event."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # as above

    rows = [row for row in figures["rows"] if row["daemon_us"]][::-1]
    if not rows:
        return ""
    colours = {"size": "#1f5fa8", "types": "#c2571a", "bad": "#7a3e9d", "backlog": "#2d7d46"}
    figure = Figure(figsize=(8, 1 + 0.28 * len(rows)))
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        middle = statistics.median(row["daemon_us"])
        axes.barh(place, middle, color=colours.get(row["group"], _THEIRS))
        axes.text(middle, place, f"  {middle:.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_title("CPU, microseconds an event", loc="left", fontsize=10)
    axes.margins(x=0.1)
    return _save(figure, file, figures["machine"])
