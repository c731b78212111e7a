"""/metrics: read from the parts when Prometheus asks. Plain ints everywhere: nothing here is on an event's path.

Counts of events are the books, so they go on after a restart; the others begin at 0 with each start.

A count stands here at 0 before the first thing that it counts: Prometheus sees no increase in a series that begins with it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from bridged import __version__
from bridged.admin.status import TYPE_NAMES, health, oldest_age_s
from bridged.backlog.accounts import ENDS
from bridged.currents.schema import UNDECODABLE_CODE, UNKNOWN_CODE
from bridged.mixpanel.verdicts import Delivered, Halt, Reject, Retry, Split

if TYPE_CHECKING:
    from bridged.app import App

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_BOOKS: Final = {
    "accepted": "Events that were committed to the spool, and so acked.",
    "delivered": "Events that Mixpanel said are in.",
    "expired": "Events that became too old while delivery was halted.",
    "skipped": "Events that are not forwarded by choice: not selected, or without a user.",
}


# What can become fewer: a counter that falls would look like a restart.
_GAUGES = {
    "dead_lettered": "Events that couldn't be delivered, by the door or by Mixpanel. A replay takes its events out again.",
    "waiting": "Events that are on disk and not delivered yet.",
}
_VERDICTS: Final = tuple(verdict.__name__.lower() for verdict in (Delivered, Retry, Split, Reject, Halt))
_ANSWERS: Final = (200, 400, 401, 404, 405, 408, 411, 413, 415, 431, 501, 503)


class Metrics:
    """The registry of one daemon."""

    def __init__(self, app: "App") -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_BridgedCollector(app))
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)


class _BridgedCollector(Collector):
    def __init__(self, app: "App") -> None:
        self._app = app

    def describe(self) -> Iterable[Metric]:
        """Nothing: the parts can't be asked before they are there."""
        return ()

    def collect(self) -> Iterator[Metric]:
        yield from self._events()
        yield from self._spool()
        yield from self._doors()
        yield from self._delivery()
        yield from self._certificates()
        yield from self._alarms()
        yield from self._cohorts()
        yield _gauge(
            "ready",
            "1 if /readyz says so: events are taken, and those that wait make progress.",
            health(self._app).ready,
        )
        build = GaugeMetricFamily("bridged_build_info", "Always 1; the version is the label.", labels=["version"])
        build.add_metric([__version__], 1)
        yield build

    def _events(self) -> Iterator[Metric]:
        app, accounts = self._app, self._app.spool.accounts
        yield _gauge(
            "export", "1 when events are taken ([mixpanel] export); 0: cohorts only.", app.config.mixpanel.export
        )
        # What becomes of a type's events is counted from their acceptance on.
        types = sorted(
            {UNKNOWN_CODE, UNDECODABLE_CODE} | {code for code, count in accounts.counts["accepted"].items() if count}
        )
        for kind in ("accepted", *ENDS):
            if kind not in _GAUGES:
                yield _counters(f"events_{kind}", _BOOKS[kind], "event_type", _named(accounts.counts[kind], types))
        for kind, text in _GAUGES.items():
            gauge = GaugeMetricFamily(f"bridged_events_{kind}", text, labels=["event_type"])
            for name, count in _named(accounts.counts[kind], types).items():
                gauge.add_metric([name], count)
            yield gauge
        yield _gauge(
            "books_imbalance",
            "accepted - delivered - dead_lettered - expired - skipped - waiting: anything but 0 is a bug.",
            accounts.imbalance(),
        )
        yield _gauge(
            "oldest_event_age_seconds", "How long the oldest waiting event has waited.", oldest_age_s(app) or 0
        )
        yield _gauge("dead_letters", "Dead letters that are kept.", app.spool.dead_letters)
        yield _counter(
            "dead_letters_dropped",
            "Dead letters that were dropped: more than spool.max_dead_letters, or a quarter of spool.max_bytes.",
            app.spool.dropped_dead_letters,
        )

    def _spool(self) -> Iterator[Metric]:
        spool, ring = self._app.spool, self._app.backlog.ring
        yield _gauge("spool_bytes", "What everything in the spool takes.", spool.used_bytes)
        yield _gauge("spool_max_bytes", "What the spool may take.", spool.max_bytes)
        yield _gauge(
            "spool_near_cap", "1 while new events are refused because the spool is near its cap.", spool.near_cap
        )
        yield _gauge("spool_pending_bytes", "Bytes that wait for their commit.", spool.pending_bytes)
        yield _gauge("spool_segments", "Segments in the spool.", spool.segments)
        yield _gauge("ring_segments", "Waiting segments that are in memory too.", ring.segments)
        yield _gauge("ring_bytes", "Bytes of those.", ring.bytes)
        yield _gauge("leased_segments", "Segments that are in a request or about to be.", ring.leased)
        yield _counter("segments_damaged", "Segments that the disk gave back changed.", spool.damaged)
        yield _gauge("events_missing", "Accepted events that the spool knew nothing of at the start.", spool.missing)
        yield _gauge("spool_files_set_aside", "Damaged files that are kept beside the spool.", len(spool.set_aside))
        yield _gauge("spool_disk_free_bytes", "Free on the spool's disk, besides its reserve there.", spool.free_bytes)
        yield _counter("commits", "Commits to the spool.", spool.commits)
        yield _counter("commit_seconds", "Time that commits took.", spool.commit_seconds)

    def _doors(self) -> Iterator[Metric]:
        # The doors are opened after the admin listener.
        app = self._app
        http, stream = (getattr(app, name, None) for name in ("http", "stream"))
        if http is not None:
            by_status = {str(status): count for status, count in (dict.fromkeys(_ANSWERS, 0) | http.answers).items()}
            yield _counters("requests", "Requests at the HTTP door, by answer.", "status", by_status)
            yield _gauge("http_connections", "Connections at the HTTP door.", len(http.connections.alive))
            yield _counter("http_connections_refused", "Closed because there were too many.", http.connections.refused)
            yield _gauge("http_held_bytes", "Bytes of bodies that aren't handed on yet.", http.connections.held)
        if stream is not None:
            yield _gauge("stream_connections", "Connections at the stream door.", len(stream.connections))
            yield _counter(
                "stream_connections_accepted",
                "Connections that were made to the stream door.",
                stream.accepted_connections,
            )
            yield _counter("stream_connections_refused", "Closed because there were too many.", stream.refused)
            yield _gauge("stream_unfinished_bytes", "Of lines without an end, or waiting for room.", stream.unfinished)
        unknown = CounterMetricFamily(
            "bridged_unknown_fields",
            "Fields that Braze sends and this version doesn't forward, seen in samples.",
            labels=["event_type", "field"],
        )
        for (code, field), seen in app.intake.unknown_fields.items():
            unknown.add_metric([TYPE_NAMES.get(code, ""), field], seen)
        yield unknown
        yield _counters("skips", "Skipped events since this start, by reason.", "reason", app.intake.reasons)

    def _certificates(self) -> Iterator[Metric]:
        gauge = GaugeMetricFamily(
            "bridged_certificate_ends_timestamp_seconds", "When a listener's certificate ends.", labels=["listener"]
        )
        for section, validity in self._app.certificates.shown.items():
            if validity is not None:
                gauge.add_metric([section], validity.ends)
        yield gauge

    def _alarms(self) -> Iterator[Metric]:
        watch = self._app.watch
        raised = {one.alarm for one in watch.alarms.open}
        alarm = GaugeMetricFamily("bridged_alarm", "1 while an alarm is raised.", labels=["name"])
        for name in watch.alarms.raised:
            alarm.add_metric([name], name in raised)
        yield alarm
        yield _counters("alarms_raised", "Alarms raised since this start.", "name", watch.alarms.raised)
        webhook = watch.webhook
        yield _counter("webhook_sent", "Notices that the webhook took.", webhook.sent)
        yield _counter("webhook_failures", "Attempts that it didn't take.", webhook.failures)
        yield _counter("webhook_dropped", "Notices given up: refused for good, or too many at once.", webhook.dropped)

    def _delivery(self) -> Iterator[Metric]:
        delivery, pace = self._app.delivery, self._app.delivery.pace
        verdicts = dict.fromkeys(_VERDICTS, 0) | delivery.verdicts
        yield _counters("verdicts", "Mixpanel's answers, by what they mean.", "verdict", verdicts)
        halt, retention = delivery.halted, self._app.config.retention
        yield _gauge("delivery_halted", "1 while Mixpanel refuses the credential or the address.", halt is not None)
        yield _gauge(
            "delivery_halt_status",
            "The HTTP status that halted delivery; 0: not halted, or by more than one answer.",
            halt.status if halt else 0,
        )
        yield _gauge(
            "max_age_seconds",
            "How old waiting events may become while delivery is halted; infinite: they don't expire.",
            math.inf if retention.on_expiry == "keep" else retention.max_age,
        )
        yield _counter(
            "events_uncounted", "Events of successful requests that Mixpanel's count left out.", delivery.uncounted
        )
        yield _gauge(
            "events_set_aside",
            "Single events that are refused incomprehensibly, or fail though others are taken.",
            delivery.set_aside,
        )
        if (skew_s := self._app.transport.clock_skew_s) is not None:
            yield _gauge("clock_skew_seconds", "Our wall clock less Mixpanel's.", skew_s)
        yield _gauge("delivered_timestamp_seconds", "When Mixpanel last took events.", delivery.delivered_at or 0)
        yield _gauge("requests_in_flight", "Requests to Mixpanel without an answer yet.", pace.in_flight)
        yield _gauge("concurrency_limit", "Requests to Mixpanel at a time, as learned.", pace.concurrency_limit)
        yield _gauge("rate_limit_events_per_second", "Events a second, as learned.", pace.events_per_second_limit)
        yield _gauge("rate_limit_bytes_per_second", "Uncompressed bytes a second.", pace.bytes_per_second_limit)
        yield _gauge("delivered_events_per_second", "Over the last minute.", pace.delivered_per_second)
        yield _gauge("backoff_remaining_seconds", "Until something is sent again.", pace.backing_off_s)
        yield _gauge("request_latency_seconds", "Mixpanel's answers, smoothed.", pace.latency_s)
        yield _counter("rate_limited", "Answers 429.", pace.rate_limited_total)
        yield _counter("server_errors", "Answers 5xx and what isn't Mixpanel's.", pace.server_errors_total)
        yield _counter("network_errors", "Requests without an answer.", pace.network_errors_total)
        yield _counter("rate_cuts", "Times that the rate was cut.", pace.rate_cuts_total)
        yield _counter("concurrency_cuts", "Times that the concurrency was cut.", pace.concurrency_cuts_total)
        yield _counter("backoffs", "Times that everything paused.", pace.backoffs_total)

    def _cohorts(self) -> Iterator[Metric]:
        membership, writer = self._app.membership, self._app.cohort_writer
        if self._app.config.cohorts.enabled:
            failed = bool(self._app.cohorts_problem)
            yield _gauge("cohorts_failed", "1 when cohorts are enabled, and can't be imported: see the log.", failed)
        if membership is None or writer is None:
            return
        figures = membership.figures
        yield _gauge("cohorts", "Cohorts that Mixpanel has sent.", figures.cohorts)
        ends = {
            "in_braze": figures.in_braze,
            "joining": figures.joining,
            "rejected": figures.rejected,
            "leaving": figures.leaving,
            "rejected_leaving": figures.rejected_leaving,
        }
        text = "Memberships (users times cohorts): known to be in Braze, to be written, refused, to be taken out."
        memberships = GaugeMetricFamily("bridged_cohort_memberships", text, labels=["state"])
        for state, count in ends.items():
            memberships.add_metric([state], count)
        yield memberships
        yield _gauge(
            "cohort_memberships_imbalance",
            "Mixpanel's members - in_braze - joining - rejected: anything but 0 is a bug.",
            figures.members - figures.in_braze - figures.joining - figures.rejected,
        )
        # Of the cohorts that there are: they become fewer when one is forgotten.
        text = "Members in the pages of these cohorts so far, by what became of them."
        received = GaugeMetricFamily("bridged_cohort_members_received", text, labels=["end"])
        for end in ("applied", "no_id", "too_long", "stale"):
            received.add_metric([end], getattr(figures, end))
        yield received
        yield _gauge("cohort_pages", "Pages of Mixpanel's of these cohorts that were committed.", figures.pages)
        yield _gauge("cohort_members_waiting", "Members in pages that are on disk and not merged yet.", figures.waiting)
        yield _gauge("cohort_points_today", "Data points that Braze bills for this day (UTC).", figures.points_today)
        if figures.points_left_today is not None:
            yield _gauge("cohort_points_left_today", "Until the day's cap.", figures.points_left_today)
        yield _counter("cohort_points_spent", "Data points since this start, of what Braze took.", writer.points_spent)
        yield _counter("cohort_users_sent", "Updates of users that Braze took.", writer.users_sent)
        yield _counter("cohort_users_unknown", "Updates that Braze took and didn't count.", writer.unknown_users)
        yield _counter("cohort_requests", "Requests to Braze.", writer.requests)
        yield _gauge("cohort_requests_in_flight", "Requests to Braze without an answer yet.", writer.in_flight)
        yield _counters("cohort_verdicts", "Braze's answers, by what they mean.", "verdict", writer.verdicts)
        yield _gauge("cohorts_halted", "1 while Braze refuses the key or the address.", writer.state == "halted")
        yield _gauge("cohorts_capped", "1 while the day's data points are spent.", writer.state == "capped")
        yield _gauge("cohorts_delivered_timestamp_seconds", "When Braze last took an update.", writer.delivered_at or 0)
        yield _gauge("cohorts_file_bytes", "What the membership takes on disk.", figures.file_bytes)
        yield _counter("cohort_commits", "Commits to the membership.", figures.commits)
        yield _counter("cohort_commit_seconds", "Time that those took.", figures.commit_seconds)


def _named(counts: Mapping[int, int], codes: Iterable[int]) -> dict[str, int]:
    return {TYPE_NAMES.get(code, f"({code})"): counts.get(code, 0) for code in codes}


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"bridged_{name}", text, value=float(value))


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"bridged_{name}", text, value=value)


def _counters(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(f"bridged_{name}", text, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family
