"""`bridged status`: what the running daemon does, for a person or as JSON."""

import argparse
import time
from collections.abc import Iterator

import msgspec

from bridged.admin.cohorts import CohortsStatus
from bridged.admin.status import AlarmStatus, Status
from bridged.commands.client import Daemon
from bridged.commands.printing import duration, printable, size, table

_TYPES_SHOWN = 20

EPILOG = """\
examples:
  bridged status                 what a person wants to know
  bridged status --json | jq .   everything: the answer of GET /api/status
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("--json", action="store_true", help="print the answer of /api/status as it is")


def main(arguments: argparse.Namespace) -> int:
    """Asks, prints. 69 when no daemon answers."""
    daemon = Daemon.configured(arguments.config)
    if arguments.json:
        print(bytes(daemon.ask("/api/status", msgspec.Raw)).decode())
    else:
        print("\n".join(lines(daemon.ask("/api/status", Status))))
    return 0


def lines(status: Status) -> Iterator[str]:
    """The status as text."""
    yield printable(status.sentence)
    yield f"bridged {status.version}, up {duration(status.uptime_s)}, {'ready' if status.health.ready else 'NOT READY'}"
    if status.last_problem and status.state != "halted":
        yield f"last problem: {printable(status.last_problem)}"
    yield from (_alarm(alarm) for alarm in status.alarms)
    yield from (f"warning: {printable(warning)}" for warning in status.warnings)
    if status.overridden:
        yield f"saved on the page, over the configuration: {', '.join(status.overridden)}"
    yield from ("", "events", table([*status.events.items()], right=[1]))
    if status.skipped:
        by_count = sorted(status.skipped.items(), key=lambda item: -item[1])
        yield f"  skipped since this start: {', '.join(f'{count:,} {printable(reason)}' for reason, count in by_count)}"
    if status.oldest_age_s is not None:
        yield f"  the oldest has waited {duration(status.oldest_age_s)}"
    yield from ("", *_spool(status))
    yield from ("", *_pace(status))
    yield from ("", *_doors(status))
    if status.cohorts is not None:
        yield from ("", *_cohorts(status.cohorts))
    if status.dead_letters.kept:
        yield from ("", *_dead_letters(status))
    if status.by_type:
        kinds = list(status.events)
        rows = [["event type", *kinds]]
        types = sorted(status.by_type.items(), key=lambda item: -item[1]["accepted"])
        more = len(types) - _TYPES_SHOWN
        del types[_TYPES_SHOWN:]
        yield from (
            "",
            table(rows + [[name, *(counts[k] for k in kinds)] for name, counts in types], right=range(1, 7)),
        )
        if more > 0:
            yield f"  and {more} more types: see --json"
    if status.unknown_fields:
        yield from ("", "unknown fields, which Braze sends and this version doesn't forward (seen in samples)")
        yield table([[f.event_type, f.field, f.seen] for f in status.unknown_fields[:20]], right=[2])


def _alarm(alarm: AlarmStatus) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(alarm.since))
    ending = ", ending (its cause is gone)" if alarm.ending else ""
    return f"ALARM {alarm.alarm} ({alarm.severity}) since {since}{ending}: {printable(alarm.text)}"


def _spool(status: Status) -> Iterator[str]:
    spool = status.spool
    share = spool.bytes / spool.max_bytes if spool.max_bytes else 0.0
    commit_ms = 1000 * spool.commit_seconds / spool.commits if spool.commits else 0.0
    yield "spool"
    rows: list[list[object]] = [
        ["file", spool.path],
        ["used", f"{size(spool.bytes)} of {size(spool.max_bytes)} ({share:.1%})"],
        ["segments", f"{spool.segments:,}"],
        ["commits", f"{spool.commits:,}, {commit_ms:.1f} ms each"],
    ]
    if spool.segments_damaged:
        rows.append(["damaged", f"{spool.segments_damaged:,} segments"])
    if spool.events_missing:
        rows.append(["missing", f"{spool.events_missing:,} events"])
    yield table(rows)


def _pace(status: Status) -> Iterator[str]:
    pace = status.pace
    yield "delivery"
    latency = "none yet" if pace.latency_s is None else f"{1000 * pace.latency_s:.0f} ms"
    rate = "no limit" if pace.events_per_second_limit is None else f"{pace.events_per_second_limit:,.0f} events/s"
    learned = ", learned from an answer 413" if pace.batch_bytes_learned else ""
    origins = {"api": "given by the API", "page": "saved on the page", "configuration": "from the configuration"}
    source = origins[status.reload.credential_from]
    credential = status.reload.credential + (f", {source}" if status.reload.credential != "none" else "")
    unused = "" if status.export else "; not in use: no events are exported, mixpanel.export is false"
    verdicts = ", ".join(f"{count:,} {name}" for name, count in status.verdicts.items()) or "none yet"
    rows = [
        ["rate", f"{pace.delivered_per_second:,.0f} events/s over the last minute, at most {rate}"],
        ["requests", f"{pace.in_flight} in flight, at most {pace.concurrency_limit}"],
        ["latency", latency],
        ["limited by", pace.limited_by],
        ["request size", f"at most {size(pace.batch_bytes)}{learned}"],
        ["credential", credential + unused],
        ["answers", verdicts],
    ]
    if status.retrying is not None:
        retrying = status.retrying
        oldest = f"the oldest {retrying.attempts:,} times in vain, accepted {duration(retrying.age_s)} ago"
        rows.append(["tried again", f"{retrying.parcels:,} requests; {oldest}"])
    if status.set_aside:
        rows.append(["kept aside", f"{status.set_aside:,} single events, tried again when others are taken"])
    if status.webhook is not None:
        hook = status.webhook
        problem = f", last error: {hook.last_error}" if hook.last_error else ""
        rows.append(["webhook", f"{hook.sent:,} sent, {hook.queued:,} wait, {hook.failures:,} failures{problem}"])
    yield table(rows)


def _doors(status: Status) -> Iterator[str]:
    yield "doors"
    rows = []
    if status.http is not None:
        answers = ", ".join(f"{count:,} x {code}" for code, count in sorted(status.http.answers.items()))
        rows.append(
            ["http", status.http.listen, f"{status.http.requests:,} requests{': ' if answers else ''}{answers}"]
        )
    if status.stream is not None:
        made = status.stream.accepted_connections
        rows.append(
            ["stream", " ".join(status.stream.listen), f"{status.stream.connections:,} connections of {made:,}"]
        )
    yield table(rows) or "  none is open"


def _cohorts(cohorts: CohortsStatus) -> Iterator[str]:
    figures, writer = cohorts.figures, cohorts.writer
    yield f"cohorts: {printable(cohorts.sentence)}"
    verdicts = ", ".join(f"{count:,} {name}" for name, count in writer.verdicts.items()) or "none yet"
    rows: list[list[object]] = [
        [
            "received",
            f"{figures.received:,} members in {figures.pages:,} pages, {figures.no_id + figures.too_long:,} without an id",
        ],
        ["in Braze", f"{figures.in_braze:,} of {figures.members:,} memberships of {figures.cohorts:,} cohorts"],
        ["waiting", f"{figures.joining:,} to join, {figures.leaving:,} to leave"],
        ["data points", f"{figures.points_today:,} today (UTC)"],
        ["answers", verdicts],
    ]
    if rejected := figures.rejected + figures.rejected_leaving:
        rows.append(["rejected", f"{rejected:,} memberships: see `bridged cohorts show`"])
    if writer.unknown_users:
        rows.append(["not counted", f"{writer.unknown_users:,} updates: probably users that Braze doesn't know"])
    if refused := cohorts.page_refused:
        rows.append(["page refused", f"{refused.status}: {refused.reason}"])
    if writer.problem and writer.state not in ("halted", "off", "backing off"):
        rows.append(["last problem", writer.problem])
    yield table(rows)


def _dead_letters(status: Status) -> Iterator[str]:
    letters = status.dead_letters
    dropped = f", {letters.dropped:,} dropped" if letters.dropped else ""
    yield f"dead letters: {letters.kept:,} kept{dropped}"
    yield table([[g.count, g.stage, g.event_type, g.reason[:100]] for g in letters.reasons[:10]], right=[0])
    yield "  see: bridged dead-letters list"
