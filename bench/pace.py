"""How well the pace uses what Mixpanel allows: the rate loops on the links of tests/links, on many seeds.

Nothing is measured: the pace is the daemon's own, Mixpanel and the clock are a model (see `bench.link`), so a run of
ten minutes takes a tenth of a second, and the same seed gives the same figures on any machine. S1 to S7 are the
documented limit alone, a hidden limit, one that falls and comes back, another client, a brown-out, refused requests
that count, and an outage. And two daemons on one project, which know nothing of each other.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
from msgspec import Struct, to_builtins

from bench import path, report
from bench.link import LINKS, Link, Neighbours, Outcome, Simulation, load


class Goal(Struct, frozen=True):
    """What a figure of a scenario is to be, on every seed or in the median of them."""

    scenarios: str  # the beginnings of their names
    field: str
    met: Callable[[float], bool]
    words: str
    worst: Callable[[Sequence[float]], float]


GOALS: Final = (
    Goal("s1_", "delivered_share", lambda share: share >= 0.97, ">= 97 % delivered, median", statistics.median),
    Goal("s1_", "rate_limited_share", lambda share: share == 0.0, "no 429, on any seed", max),
    Goal("s2_", "delivered_share", lambda share: share >= 0.93, ">= 93 % delivered, median", statistics.median),
    Goal("s2_", "rate_limited_share", lambda share: share <= 0.02, "<= 2 % 429, median", statistics.median),
    Goal("s6_", "delivered_share", lambda share: share >= 0.93, ">= 93 % delivered, median", statistics.median),
    Goal("s6_", "rate_limited_share", lambda share: share <= 0.02, "<= 2 % 429, median", statistics.median),
    *(
        Goal(scenario, "recovery_s", lambda seconds: seconds <= 30.0, "recovery <= 30 s, on any seed", max)
        for scenario in ("s3_", "s4_", "s7_", "s8_")
    ),
)


def outcomes(link: Link, seeds: int) -> list[Outcome]:
    """What a link came to, by seed."""
    found = []
    for seed in range(seeds):
        simulation = Simulation(link, seed)
        simulation.run()
        found.append(simulation.outcome())
    return found


def smaller_share(seed: int) -> float:
    """Of two daemons on one project, where the documented limit is all there is."""
    neighbours = Neighbours(msgspec.structs.replace(load(LINKS / "s1_alone.toml"), duration_s=900.0), seed)
    neighbours.run()
    return neighbours.smaller_share()


def main(argv: Sequence[str]) -> int:
    """Prints a line a scenario, and the goals. 1 when a run left the ranges that its link allows."""
    parser = report.options("pace", __doc__, runs=100)
    parser.add_argument("--links", metavar="NAME,...", type=lambda text: text.split(","), default=[], help="s1,s2, ...")
    arguments = parser.parse_args(argv)
    found: dict[str, list[Outcome]] = {}
    failures = []
    # In the order of their numbers: s2 before s10.
    files = sorted(LINKS.glob("*.toml"), key=lambda file: int(file.stem.partition("_")[0][1:]))
    for file in files:
        if arguments.links and file.stem.partition("_")[0] not in arguments.links:
            continue
        path.say(file.stem)
        link = load(file)
        found[file.stem] = outcomes(link, arguments.runs)
        for name, (low, high) in link.expect.items():
            outside = [seed for seed, o in enumerate(found[file.stem]) if not low <= getattr(o, name) <= high]
            if outside:
                failures.append(f"{file.stem}: {name} outside {low:g}-{high:g} on seeds {outside}")
    shares = []
    if not arguments.links:
        path.say("two daemons")
        shares = [smaller_share(seed) for seed in range(arguments.runs)]
    path.say("")
    print(f"{arguments.runs} seeds; median (min-max)\n")
    rows = []
    for scenario, every in found.items():
        percent = [
            report.spread([100 * getattr(o, name) for o in every], 2)
            for name in ("delivered_share", "rate_limited_share")
        ]
        seconds = [report.spread([getattr(o, name) for o in every], 1) for name in ("longest_gap_s", "recovery_s")]
        rows.append([scenario, *percent, *seconds])
    print(report.table(["scenario", "% of the allowed", "% 429", "longest gap, s", "recovery, s"], rows))
    print()
    for goal in GOALS:
        for scenario, every in found.items():
            if scenario.startswith(goal.scenarios):
                worst = goal.worst([getattr(outcome, goal.field) for outcome in every])
                print(f"{scenario}: {goal.words}: {worst:.4g}: {'met' if goal.met(worst) else 'MISSED'}")
    if shares:
        share = statistics.median(shares)
        words = "what the one with less gets of its half, after five minutes: >= 80 %, median"
        print(f"two daemons: {words}: {share:.4g} (from {min(shares):.4g}): {'met' if share >= 0.8 else 'MISSED'}")
    for failure in failures:
        print(f"OUTSIDE {failure}")
    figures = {
        "machine": report.machine(),
        "runs": arguments.runs,
        "outcomes": to_builtins(found),
        "outside": failures,
        "smaller_shares": shares,
    }
    report.write(arguments.json, msgspec.to_builtins(figures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
