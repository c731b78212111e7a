"""What the daemon does now, as one Struct: what /api/status answers, `bridged status` prints and the page shows."""

import asyncio
import math
import time
from typing import TYPE_CHECKING, Literal

import msgspec
from msgspec import Struct

from bridged import __version__
from bridged.admin.cohorts import CohortsStatus, cohorts_status, trouble
from bridged.admin.health import Facts, Health, judge, no_progress
from bridged.admin.history import Totals
from bridged.admin.sentence import HaltStatus, State, in_words, of_cohorts
from bridged.alarms.rules import Facts as AlarmFacts
from bridged.alarms.webhook import WebhookStatus
from bridged.backlog.dead_letters import Group
from bridged.currents.schema import iter_types
from bridged.currents.table import EVENT_TYPES
from bridged.delivery.pacing import WINDOW_S, PaceSnapshot
from bridged.mixpanel.requests import API_SECRET_RETIRED
from bridged.saved import EDITABLE, is_secret

if TYPE_CHECKING:
    from bridged.app import App

TYPE_NAMES = dict(iter_types(EVENT_TYPES))


class SpoolStatus(Struct, kw_only=True):
    """What is on disk."""

    path: str
    bytes: int
    max_bytes: int
    near_cap: bool  # new events are refused
    disk_free_bytes: int  # besides what the spool keeps in reserve there
    segments: int
    segments_damaged: int
    events_missing: int  # accepted in an earlier life, and unknown to the file when this one began
    set_aside: list[str]  # damaged files, kept beside it
    commits: int
    commit_seconds: float


class AlarmStatus(Struct, kw_only=True):
    """Something that needs a person, and isn't over."""

    alarm: str
    severity: str
    since: float  # wall clock, seconds
    text: str  # with the figures of now, or of when its cause was last there
    ending: bool  # its cause is gone; it is over when that has lasted for a while


class RetryStatus(Struct, kw_only=True):
    """What is tried again, the oldest first."""

    parcels: int  # requests' worth
    attempts: int  # in vain, of the oldest
    age_s: float  # of the oldest: since it was accepted


class ReloadStatus(Struct, kw_only=True):
    """What the configuration says and what is in force."""

    credential: str  # which kind is in force, if events are exported; "none"
    credential_from: Literal["configuration", "page", "api"]  # the last is gone with the next start
    restart_needed: list[str]  # keys that were changed since the start and can't be taken over
    problem: str  # why the last change wasn't taken over; empty when it was


class DeadLetterStatus(Struct, kw_only=True):
    """What can't be delivered and waits for a person."""

    kept: int
    dropped: int  # the oldest, since this start, because there were too many
    reasons: list[Group]  # the most frequent first


class PaceStatus(Struct, kw_only=True):
    """How fast delivery may go and does. None: no limit, or not known yet."""

    limited_by: str
    delivered_per_second: float  # over the last minute
    events_per_second_limit: float | None
    bytes_per_second_limit: float | None
    concurrency_limit: int
    in_flight: int
    latency_s: float | None
    backing_off_s: float
    reason: str  # of the backoff
    batch_bytes: int  # uncompressed, a request at most
    batch_bytes_learned: bool  # from an answer 413: less than configured, for ten minutes


class HttpDoorStatus(Struct, kw_only=True):
    """The HTTP door, since this start."""

    listen: str
    requests: int
    answers: dict[int, int]  # by HTTP status


class StreamDoorStatus(Struct, kw_only=True):
    """The stream door, since this start."""

    listen: tuple[str, ...]
    connections: int  # now
    accepted_connections: int


class UnknownField(Struct, kw_only=True):
    """A field that Braze sends and our table doesn't have. It is not forwarded."""

    event_type: str
    field: str
    seen: int  # in samples: one event of a type a second


class Status(Struct, kw_only=True):
    """Everything at a glance. Counts of events are since the spool was made, other counts since this start."""

    version: str
    started_at: float  # wall clock, seconds
    uptime_s: float
    export: bool  # whether events are taken and sent; false: cohorts only, and state and sentence are about them
    state: State
    sentence: str  # the state in words
    health: Health
    events: dict[str, int]  # accepted = delivered + dead_lettered + expired + skipped + waiting
    by_type: dict[str, dict[str, int]]  # the same, per event type
    imbalance: int  # of that equation: always 0
    oldest_age_s: float | None  # of what waits
    expires_in_s: float | None  # until the oldest of what waits expires; None: never, as far as can be told now
    delivered_at: float | None  # wall clock, seconds: the last success
    last_problem: str  # what Mixpanel or the network last said that was no success
    spool: SpoolStatus
    dead_letters: DeadLetterStatus
    pace: PaceStatus
    halted: HaltStatus | None
    http: HttpDoorStatus | None  # None: closed
    stream: StreamDoorStatus | None
    alarms: list[AlarmStatus]
    cohorts: CohortsStatus | None  # None: none are imported
    webhook: WebhookStatus | None  # None: there is none
    reload: ReloadStatus
    overridden: list[str]  # keys of the configuration that were saved on the page
    retrying: RetryStatus | None
    set_aside: int  # single events that are refused incomprehensibly, or fail: tried again now and then
    clock_skew_s: float | None  # our wall clock less Mixpanel's
    verdicts: dict[str, int]  # on Mixpanel's answers
    skipped: dict[str, int]  # reasons, since this start
    unknown_fields: list[UnknownField]
    warnings: list[str]


def credential_from(app: "App") -> Literal["configuration", "page", "api"]:
    """Where the credential in force, or a part of it, was given."""
    by_page = any(name.startswith("mixpanel.") and is_secret(EDITABLE[name]) for name in app.saved.values)
    return "api" if app.given else "page" if by_page else "configuration"


def health(app: "App") -> Health:
    """Whether the daemon is ready, now."""
    delivery, pace, times = app.delivery, app.delivery.pace, app.config.delivery
    return judge(
        Facts(
            doors_open=_doors_open(app),
            writer_failed=app.spool.failed,
            uncommitted_s=app.admin.commits.uncommitted_s(app.writing(), asyncio.get_running_loop().time()),
            near_cap=app.spool.near_cap,
            refusal=str(app.spool.refusal().args[0]),
            exporting=app.config.mixpanel.export,
            halted=delivery.halted is not None,
            backing_off=pace.backing_off_s > 0,
            waiting=app.backlog.events,
            uptime_s=app.clock.uptime_s(),
            oldest_age_s=oldest_age_s(app, app.clock.latest()),
            asked_age_s=delivery.asked_age_s,
            paced=pace.limited_by == "rate",
            pause_s=max(times.flush_interval, times.probe_interval if delivery.set_aside else 0.0),
            timeout_s=float(times.timeout),
        )
    )


def _refusal(app: "App") -> str:
    """Why new events are refused; empty: they are taken."""
    return str(app.spool.refusal().args[0]) if app.spool.near_cap else ""


def alarm_facts(app: "App") -> AlarmFacts:
    """What the alarms depend on, now."""
    delivery, spool, config = app.delivery, app.spool, app.config
    cohorts_halted, cohorts_capped = trouble(app)
    well, age_s, total = health(app), oldest_age_s(app), spool.accounts.total
    # Since the last success, but no longer than the oldest event has waited, by the later clock, or the daemon has run.
    ages = (oldest_age_s(app, app.clock.latest()), delivery.success_age_s, app.clock.uptime_s())
    late = well.waiting and config.mixpanel.export
    undelivered_s = max(0.0, min(age for age in ages if age is not None)) if late else 0.0
    return AlarmFacts(
        halted=delivery.halted is not None,
        halt_reason=delivery.halted.reason if delivery.halted else "",
        halt_doubtful=delivery.doubtful and config.mixpanel.export and delivery.success_age_s is None,
        waiting=well.waiting,
        oldest_age_s=age_s,
        max_age_s=float(config.retention.max_age),
        expires=config.retention.on_expiry != "keep",
        drops=config.retention.on_expiry == "drop",
        archive_problem=delivery.archiver.problem,
        undelivered_s=undelivered_s,
        undelivered_after_s=float(config.alerts.undelivered),
        last_problem=delivery.last_problem,
        in_vain=delivery.in_vain,
        in_vain_s=delivery.in_vain_s,
        stalled=no_progress(well, float(config.delivery.timeout)),
        accepted=total("accepted"),
        delivered=total("delivered"),
        dead_lettered=total("dead_lettered"),
        expired=total("expired"),
        dead_letters_dropped=spool.dropped_dead_letters,
        damaged=spool.damaged,
        missing=spool.missing,
        used_bytes=spool.used_bytes,
        max_bytes=spool.max_bytes,
        spool_share=config.alerts.spool_share,
        refusal=_refusal(app),
        skew_s=app.transport.clock_skew_s,
        door_lost=_lost(app),
        certificate_ended=app.certificates.ended(),
        certificate_ending=app.certificates.ending(),
        configuration_problem=_configuration_problem(app),
        cohorts_halted=cohorts_halted,
        cohorts_capped=cohorts_capped,
    )


def _configuration_problem(app: "App") -> str:
    said = f"a changed configuration can't be used, the old one is in force: {app.reload_problem}"
    return "; ".join(filter(None, (app.reload_problem and said, app.saved.problem)))


def totals(app: "App") -> Totals:
    """What the charts are made of, now."""
    total, pace, delivery = app.spool.accounts.total, app.delivery.pace, app.delivery
    return Totals(
        accepted=total("accepted"),
        delivered=total("delivered"),
        dead_lettered=total("dead_lettered"),
        rate_limited=pace.rate_limited_total,
        age_sum_s=delivery.age_sum_s,
        ages=delivery.ages,
        waiting=app.backlog.events,
        latency_s=_finite(pace.latency_s) or None,
    )


def _lost(app: "App") -> str:
    """The sockets that nobody finds any more, and why; empty: there are none."""
    stream = getattr(app, "stream", None)
    return "; ".join(f"{path}: {why}" for path, why in stream.unix.lost.items()) if stream else ""


def _open_alarms(app: "App") -> list[AlarmStatus]:
    ahead_s = time.time() - asyncio.get_running_loop().time()
    return [
        AlarmStatus(
            alarm=one.alarm,
            severity=one.severity,
            since=round(one.since + ahead_s, 3),
            text=one.text,
            ending=one.ending,
        )
        for one in app.watch.alarms.open
    ]


def _retrying(app: "App") -> RetryStatus | None:
    oldest = app.delivery.retrying
    if oldest is None:
        return None
    age_s = max(0.0, app.clock.earliest() - oldest.created_at)
    return RetryStatus(parcels=oldest.parcels, attempts=oldest.attempts, age_s=round(age_s, 1))


def _expires_in_s(app: "App") -> float | None:
    """Only while nothing can be delivered does anything expire."""
    retention, age_s = app.config.retention, oldest_age_s(app)
    if app.delivery.halted is None or retention.on_expiry == "keep" or age_s is None:
        return None
    return round(max(0.0, float(retention.max_age) - age_s), 1)


def _doors_open(app: "App") -> bool:
    """Whether the last door is open; they are opened after the admin listener, and closed before it."""
    http = getattr(app, "http", None)
    if http:
        return not http.stopping
    if not hasattr(app, "http") or app.config.sources.http.listen:
        return False
    # Without the HTTP door: one that somebody finds is enough.
    return not app.stream.unix.lost or len(app.stream.unix.lost) < len(app.config.sources.stream.listen)


def oldest_age_s(app: "App", now_s: float | None = None) -> float | None:
    """How long the oldest waiting event has waited; None when nothing waits."""
    oldest_at = app.backlog.oldest_at()
    return None if oldest_at is None else max(0.0, (now_s or app.clock.earliest()) - oldest_at)


def status(app: "App", reasons: list[Group]) -> Status:
    """The status, now; `reasons` are the dead letters', which only the spool's thread can count."""
    spool, delivery, config = app.spool, app.delivery, app.config
    accounts, now = spool.accounts, time.time()
    pace = _since_start(app.delivery.pace, app.clock.uptime_s())
    halt, halted = delivery.halted, None
    if halt is not None:
        halted = HaltStatus(since=delivery.halted_at or now, status=halt.status, reason=halt.reason)
    # The doors are opened after the admin listener.
    http, stream = getattr(app, "http", None), getattr(app, "stream", None)
    well = health(app)
    credentials, cohorts = app.transport.target.credentials, cohorts_status(app)
    if config.mixpanel.export:
        given = credentials.given
        state, sentence = in_words(well, halted, pace, _refusal(app), delivery.set_aside, given=given)
    else:
        state, sentence = of_cohorts(well, cohorts)
    return Status(
        version=__version__,
        started_at=app.started_at,
        uptime_s=round(app.clock.uptime_s(), 3),
        export=config.mixpanel.export,
        state=state,
        sentence=sentence,
        health=well,
        events={kind: accounts.total(kind) for kind in accounts.counts},
        by_type=accounts.by_type(TYPE_NAMES),
        imbalance=accounts.imbalance(),
        oldest_age_s=oldest_age_s(app),
        expires_in_s=_expires_in_s(app),
        delivered_at=delivery.delivered_at,
        last_problem=delivery.last_problem,
        spool=SpoolStatus(
            path=config.spool.path,
            bytes=spool.used_bytes,
            max_bytes=spool.max_bytes,
            near_cap=spool.near_cap,
            disk_free_bytes=spool.free_bytes,
            segments=spool.segments,
            segments_damaged=spool.damaged,
            events_missing=spool.missing,
            set_aside=spool.set_aside,
            commits=spool.commits,
            commit_seconds=round(spool.commit_seconds, 6),
        ),
        dead_letters=DeadLetterStatus(kept=spool.dead_letters, dropped=spool.dropped_dead_letters, reasons=reasons),
        pace=_pace(pace, app),
        halted=halted,
        http=HttpDoorStatus(listen=config.sources.http.listen, requests=http.requests, answers=dict(http.answers))
        if http
        else None,
        stream=StreamDoorStatus(
            listen=config.sources.stream.listen,
            connections=len(stream.connections),
            accepted_connections=stream.accepted_connections,
        )
        if stream and config.stream_addresses
        else None,
        alarms=_open_alarms(app),
        cohorts=cohorts,
        webhook=app.watch.webhook.status,
        reload=ReloadStatus(
            credential=credentials.kind if credentials.given else "none",
            credential_from=credential_from(app),
            restart_needed=app.restart_needed,
            problem=app.reload_problem,
        ),
        overridden=sorted(app.saved.values),
        retrying=_retrying(app),
        set_aside=delivery.set_aside,
        clock_skew_s=None if app.transport.clock_skew_s is None else round(app.transport.clock_skew_s, 1),
        verdicts=dict(delivery.verdicts),
        skipped=dict(app.intake.reasons),
        unknown_fields=[
            UnknownField(event_type=TYPE_NAMES.get(code, ""), field=field, seen=seen)
            for (code, field), seen in app.intake.unknown_fields.most_common()
        ],
        warnings=_warnings(app),
    )


def _since_start(pace: PaceSnapshot, uptime_s: float) -> PaceSnapshot:
    """The pace's rate is one of the last minute: while there is no whole minute yet, of the time since the start."""
    share = min(max(uptime_s, 1.0), WINDOW_S) / WINDOW_S
    return msgspec.structs.replace(pace, delivered_per_second=pace.delivered_per_second / share)


def _pace(pace: PaceSnapshot, app: "App") -> PaceStatus:
    learned = app.delivery.learned_batch_bytes
    return PaceStatus(
        limited_by=pace.limited_by,
        delivered_per_second=round(pace.delivered_per_second, 1),
        events_per_second_limit=_finite(pace.events_per_second_limit),
        bytes_per_second_limit=_finite(pace.bytes_per_second_limit),
        concurrency_limit=pace.concurrency_limit,
        in_flight=pace.in_flight,
        latency_s=_finite(pace.latency_s) or None,
        backing_off_s=round(pace.backing_off_s, 3),
        reason=pace.reason,
        batch_bytes=int(app.config.delivery.max_batch_bytes) if learned is None else learned,
        batch_bytes_learned=learned is not None,
    )


def _finite(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _warnings(app: "App") -> list[str]:
    """What a person should do something about."""
    config, spool = app.config, app.spool
    found = []
    if problems := spool.accounts.problems(TYPE_NAMES):
        found.append(f"the books don't balance: {'; '.join(problems[:3])}. This is a bug: please report it")
    if spool.damaged:
        found.append(f"{spool.damaged} segments were damaged on disk: check the disk; they are kept as dead letters")
    if spool.missing:
        found.append(
            f"{spool.missing} events that were accepted before are unknown to the spool: what wasn't delivered is lost"
        )
    if spool.displaced:
        found.append(
            "the spool was replaced under bridged, and what it held isn't delivered from there by itself: the README says "
            f"what to do with {', '.join(spool.displaced[-3:])}"
        )
    if spool.set_aside:
        found.append(
            "the spool was damaged and salvaged: check the disk; what was damaged is kept as "
            + ", ".join(f"{kept}*" for kept in spool.set_aside[-3:])
        )
    if spool.dropped_dead_letters:
        found.append(
            f"{spool.dropped_dead_letters} dead letters, the oldest, were dropped: there were more than "
            "spool.max_dead_letters, or they took more than a quarter of spool.max_bytes"
        )
    if lost := _lost(app):
        found.append(f"nobody finds this door any more: {lost}")
    if app.given:
        found.append(
            "the credential in force was given by the API and is gone with the next start: put it into the configuration"
        )
    if app.saved.problem:
        found.append(app.saved.problem)
    if app.restart_needed:
        found.append(f"a restart is needed for {', '.join(app.restart_needed)}")
    if (webhook := app.watch.webhook.status) and webhook.last_error:
        found.append(f"alarms don't reach alerts.webhook_url: {webhook.last_error}, {webhook.queued} wait")
    if app.delivery.set_aside:
        found.append(
            f"{app.delivery.set_aside} single event(s) are refused for a reason that can't be understood, or fail: kept aside, "
            "and tried again now and then when others are taken"
        )
    if app.delivery.uncounted:
        found.append(
            f"Mixpanel took {app.delivery.uncounted:,} events that its answers don't count, twice: are some blocked in the "
            "project (Lexicon)? They are counted as delivered"
        )
    if config.mixpanel.api_secret and not config.mixpanel.service_account:
        found.append(f"Mixpanel retires API secrets on {API_SECRET_RETIRED}: create a service account")
    if config.mixpanel.export and not config.mixpanel.token:
        found.append("mixpanel.token is empty: events carry no `token` property, as those of Braze's connector do")
    if app.intake.unknown_fields:
        count = len(app.intake.unknown_fields)
        found.append(
            f"Braze sends {count} field(s) that this version doesn't know and doesn't forward: see the unknown fields"
        )
    return found
