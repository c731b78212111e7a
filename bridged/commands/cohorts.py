"""`bridged cohorts`: Mixpanel's cohorts on their way into Braze, and what that costs. Asks the running daemon."""

import argparse
import sys
import time
from typing import Any
from urllib.parse import quote

import msgspec

from bridged.admin.cohorts import MAX_POINTS, Overview
from bridged.cohorts.records import BROKEN_OFF_S, CohortDetail, CohortRow, Plan, RoundRow
from bridged.commands.client import Daemon
from bridged.commands.dead_letters import UsageError
from bridged.commands.printing import agreed, printable, table

EPILOG = """\
examples:
  bridged cohorts list
  bridged cohorts show 117:777          one of them: Mixpanel's sessions, and whom Braze refused
  bridged cohorts plan                  what would be written now, and its data points
  bridged cohorts allow 50000           so many data points beyond max_data_points_per_day, today
  bridged cohorts resync 777            write all its members again, whatever Braze is known to have
  bridged cohorts resync --all --rejected    try again what Braze refused
  bridged cohorts forget 777 --yes      take all its members out of it in Braze

A cohort is project:cohort, or the cohort's id alone where one project has it.
"""

# Other addresses of the API.
_NO_COHORTS = ("", "plan", "refusals")
_REFUSALS_SHOWN = 20
_ROUNDS_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommands and their options."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS, help="the configuration (see `bridged --help`)"
    )
    common.add_argument("--json", action="store_true", help="print the API's answer as it is")

    verbs.add_parser("list", parents=[common], help="every cohort, and how far it is")
    verb = verbs.add_parser("show", parents=[common], help="one of them, with Mixpanel's sessions and Braze's refusals")
    verb.add_argument("cohort", metavar="COHORT")
    verbs.add_parser("plan", parents=[common], help="what would be written now, and what Braze bills for it")
    verb = verbs.add_parser("allow", parents=[common], help="go beyond max_data_points_per_day, today")
    verb.add_argument(
        "points", metavar="POINTS", nargs="?", type=_points, default=0, help="without: all that is due now"
    )
    verb = verbs.add_parser("resync", parents=[common], help="write members again, whatever Braze is known to have")
    verb.add_argument("cohort", metavar="COHORT", nargs="?", default="")
    verb.add_argument("--all", action="store_true", help="of all cohorts")
    verb.add_argument("--rejected", action="store_true", help="only those that Braze refused")
    verb = verbs.add_parser("forget", parents=[common], help="take its members out of it in Braze, and forget it")
    verb.add_argument("cohort", metavar="COHORT")
    verb.add_argument("--yes", action="store_true", help="don't ask")


def main(arguments: argparse.Namespace) -> int:
    """Does what the verb says."""
    daemon = Daemon.configured(arguments.config)
    verbs = {"list": _list, "show": _show, "plan": _plan, "allow": _allow, "resync": _resync, "forget": _forget}
    return verbs[arguments.verb](daemon, arguments)


def _list(daemon: Daemon, arguments: argparse.Namespace) -> int:
    if arguments.json:
        return _raw(daemon.ask("/api/cohorts", msgspec.Raw))
    overview = daemon.ask("/api/cohorts", Overview)
    print(printable(overview.sentence))
    none = "the first pages are being taken in" if overview.figures.waiting else "Mixpanel hasn't sent one"
    print(_cohorts(overview.cohorts) if overview.cohorts else f"no cohorts yet: {none}")
    if refused := overview.page_refused:
        print(printable(f"a page of Mixpanel's was refused {_when(refused.at)}, {refused.status}: {refused.reason}"))
    if unknown := overview.writer.unknown_users:
        print(f"{unknown:,} updates were taken and not counted by Braze: probably users that it doesn't know")
    return 0


def _show(daemon: Daemon, arguments: argparse.Namespace) -> int:
    if arguments.cohort in _NO_COHORTS:
        raise UsageError(f"no cohort {arguments.cohort!r}", "`bridged cohorts list` has their keys, e.g. 117:777")
    path = f"/api/cohorts/{quote(arguments.cohort, safe=':')}"
    if arguments.json:
        return _raw(daemon.ask(path, msgspec.Raw))
    detail = daemon.ask(path, CohortDetail)
    row = detail.cohort
    facts: list[tuple[str, object, str]] = [
        ("received", row.received, f"members in {row.pages:,} pages, repeats included"),
        ("matched", row.applied, "with an id for Braze, in a page that still counted"),
        (
            "unknown",
            row.no_id + row.too_long,
            f"{row.no_id:,} without the id that [cohorts] user_id names, {row.too_long:,} too long",
        ),
        ("stale", row.stale, "in late pages of sessions that newer ones have overtaken"),
        ("members", row.members, "at Mixpanel, as far as they could be matched"),
        ("sent", row.in_braze, "of those: Braze has them"),
        ("waiting", row.joining + row.leaving, f"{row.joining:,} to join, {row.leaving:,} to leave"),
        ("rejected", row.rejected + row.rejected_leaving, "by Braze, one by one"),
        ("points", row.joining + row.leaving, "data points that what waits costs, at most: see `bridged cohorts plan`"),
    ]
    print(printable(f"{row.key}  {row.name}"))
    if row.description:
        print(printable(f"  {row.description}"))
    print(f"  {_state(row)}, last page {_when(row.last_page_at)}, in step with Braze {_when(row.synced_at)}\n")
    print(table(facts, right=[1]))
    if detail.rounds:
        print("\nMixpanel's sessions, the newest first")
        head = ("began", "action", "pages", "received", "joined", "left", "", "session")
        print(table([head, *map(_round, detail.rounds[:_ROUNDS_SHOWN])], right=[2, 3, 4, 5]))
    if refused := detail.refusals[:_REFUSALS_SHOWN]:
        print("\nrefused by Braze")
        print(table([(r.external_id, f"{r.attempts}x", _when(r.last_at), r.reason[:100]) for r in refused]))
    if (more := row.rejected + row.rejected_leaving - len(refused)) > 0:
        print(printable(f"  and {more:,} more: `bridged cohorts show {row.key} --json` has {_how_many(detail)}"))
    return 0


def _plan(daemon: Daemon, arguments: argparse.Namespace) -> int:
    if arguments.json:
        return _raw(daemon.ask("/api/cohorts/plan", msgspec.Raw))
    _print_plan(daemon.ask("/api/cohorts/plan", Plan))
    return 0


def _allow(daemon: Daemon, arguments: argparse.Namespace) -> int:
    order = {"points": arguments.points}
    if arguments.json:
        return _raw(daemon.order("/api/cohorts/allow", order, msgspec.Raw))
    plan = daemon.order("/api/cohorts/allow", order, Plan)
    if plan.allowed_today is None:
        print("there is no cap: [cohorts] max_data_points_per_day is 0")
    else:
        print(f"{plan.allowed_today:,} data points are allowed today (UTC), {plan.spent_today:,} are spent")
    return 0


def _resync(daemon: Daemon, arguments: argparse.Namespace) -> int:
    if bool(arguments.cohort) == arguments.all:
        raise UsageError("which cohort?", "give one, or --all")
    order: dict[str, Any] = {"all": True} if arguments.all else {"cohort": arguments.cohort}
    answer = daemon.order("/api/cohorts/resync", order | {"rejected_only": arguments.rejected}, dict[str, int])
    if arguments.json:
        return _raw(msgspec.json.encode(answer))
    print(f"{answer['due']:,} memberships will be written again: see `bridged cohorts plan` for what it costs")
    return 0


def _forget(daemon: Daemon, arguments: argparse.Namespace) -> int:
    if not arguments.yes:
        what = f"takes all members out of cohort {arguments.cohort} in Braze"
        if not sys.stdin.isatty():
            raise UsageError(f"forget {what}", "say --yes if that is what you want")
        if not agreed(f"This {what}. Go on?"):
            print("nothing was changed")
            return 1
    answer = daemon.order("/api/cohorts/forget", {"cohort": arguments.cohort}, dict[str, int])
    if arguments.json:
        return _raw(msgspec.json.encode(answer))
    print(f"{answer['leaving']:,} memberships will be taken out of Braze; then the cohort is gone from the list")
    print("As long as Mixpanel's sync is on, its next page brings the cohort back: pause it there too.")
    return 0


def _raw(answer: msgspec.Raw | bytes) -> int:
    print(bytes(answer).decode().rstrip("\n"))
    return 0


def _cohorts(rows: list[CohortRow]) -> str:
    head = ("cohort", "name", "members", "in Braze", "joining", "leaving", "rejected", "state")
    body = [
        (r.key, r.name[:40], r.members, r.in_braze, r.joining, r.leaving, r.rejected + r.rejected_leaving, _state(r))
        for r in rows
    ]
    return table([head, *body], right=range(2, 7), indent="")


def _print_plan(plan: Plan) -> None:
    allowed = "no cap" if plan.allowed_today is None else f"of {plan.allowed_today:,} allowed"
    rows: list[tuple[str, object, str]] = [
        ("to write", plan.users, f"users, for {plan.joining:,} memberships that begin and {plan.leaving:,} that end"),
        ("costs", plan.points, "data points"),
        ("spent today", plan.spent_today, f"data points (UTC), {allowed}"),
    ]
    print(table(rows, right=[1]))
    if not plan.fits:
        print(
            f"\nThat is more than today's cap leaves ({plan.left_today or 0:,}): the rest waits for tomorrow, "
            "or for `bridged cohorts allow`."
        )
    if plan.rows:
        print(f"\n{_cohorts(plan.rows)}")


def _state(row: CohortRow) -> str:
    return row.state if row.progress in (0.0, 1.0) else f"{row.state} {row.progress:.0%}"


def _round(one: RoundRow) -> tuple[object, ...]:
    total = f"{one.pages:,} of {one.total_pages:,}" if one.total_pages < 2**30 else f"{one.pages:,}"
    silent = time.time() - one.last_page_at >= BROKEN_OFF_S
    open_ = "broken off" if silent else "under way"
    outcome = "complete" if one.complete else "overtaken" if one.superseded else open_
    left = one.left
    return _when(one.started_at), one.action, total, one.received, one.joined, left, outcome, one.session[:36]


def _how_many(detail: CohortDetail) -> str:
    """How many of the refusals are in the API's answer."""
    if detail.cohort.rejected + detail.cohort.rejected_leaving <= len(detail.refusals):
        return "them all"
    return f"{len(detail.refusals):,} of them, /api/cohorts/refusals all"


def _points(text: str) -> int:
    try:
        number = int(text.replace("_", "").replace(",", ""))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if number > MAX_POINTS:
        raise argparse.ArgumentTypeError(f"at most {MAX_POINTS:,}; without a number as many as are due")
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1; without a number as many as are due")
    return number


def _when(seconds: float | None) -> str:
    return "never" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
