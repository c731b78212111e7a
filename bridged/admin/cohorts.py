"""The cohorts at the admin side: the endpoints under /api/cohorts, and what the status says of them.

    GET  /api/cohorts                 the import at a glance, and every cohort: its members at Mixpanel, in Braze, in between
    GET  /api/cohorts/plan            what would be written now, and its data points
    GET  /api/cohorts/refusals        ?after= limit= (<= 1000): users that Braze refused, with its words
    GET  /api/cohorts/KEY             one, with Mixpanel's sessions, newest first
    POST /api/cohorts/resync          {"cohort": KEY} or {"all": true}: write all of it again; "rejected_only": what was refused
    POST /api/cohorts/forget          {"cohort": KEY}: its members leave it in Braze, then it is gone here
    POST /api/cohorts/allow           {"points": N}: so many data points more today; 0: as many as are due

KEY is project:cohort, or the cohort alone where one project has it. All are 404 while [cohorts] is off, 503 when it is broken.
"""

import time
from typing import TYPE_CHECKING, Annotated, Final

from aiohttp import web
from msgspec import Meta, Struct

from bridged.admin.answers import body, json, number
from bridged.cohorts.records import CohortRow, Figures, PageRefused, Refusal
from bridged.errors import BadRequest, MembershipError

if TYPE_CHECKING:
    from bridged.app import App
    from bridged.cohorts.membership import Membership

MAX_LISTED: Final = 1000
MAX_ID: Final = 2**63 - 1
MAX_POINTS: Final = 10**12


class ResyncOrder(Struct, forbid_unknown_fields=True):
    """What to write again: one cohort, or all."""

    cohort: str = ""
    all: bool = False
    rejected_only: bool = False


class ForgetOrder(Struct, forbid_unknown_fields=True):
    """Which cohort to take out of Braze."""

    cohort: Annotated[str, Meta(min_length=1)]


class Allowance(Struct, forbid_unknown_fields=True):
    """Data points beyond [cohorts] max_data_points_per_day, today. 0: as many as are due now."""

    points: Annotated[int, Meta(ge=0, le=MAX_POINTS)]


class Refusals(Struct):
    """A page of refusals; `next` is the `after` of the following one."""

    refusals: list[Refusal]
    next: int | None


class BrazeHalt(Struct, kw_only=True):
    """Why nothing is written to Braze until a person or time changes something."""

    since: float  # wall clock, seconds
    status: int  # HTTP; 0: it took more than one answer
    reason: str


class WriterStatus(Struct, kw_only=True):
    """What is written to Braze. Counts are since this start."""

    state: str  # idle | sending | backing off | halted | capped | off
    problem: str  # what Braze or the network last said that was no success
    halted: BrazeHalt | None = None
    delivered_at: float | None = None  # wall clock, seconds: the last success
    requests: int = 0
    in_flight: int = 0
    users_sent: int = 0
    points_spent: int = 0  # on those
    unknown_users: int = 0  # that Braze didn't count: probably it doesn't know them
    verdicts: dict[str, int] = {}  # on Braze's answers


class CohortsStatus(Struct, kw_only=True):
    """The import of cohorts at a glance."""

    sentence: str
    figures: Figures
    writer: WriterStatus
    page_refused: PageRefused | None = None  # since this start


class Overview(CohortsStatus, kw_only=True):
    """The same, with every cohort."""

    cohorts: list[CohortRow]


def cohorts_status(app: "App") -> CohortsStatus | None:
    """The status of the import, now; None: [cohorts] is off."""
    membership, writer = app.membership, app.cohort_writer
    figures = membership.figures if membership is not None else Figures()
    if app.cohorts_problem:
        off = WriterStatus(state="off", problem=app.cohorts_problem)
        return CohortsStatus(sentence=f"Not imported: {app.cohorts_problem}", figures=figures, writer=off)
    if membership is None or writer is None:
        return None
    halt = writer.halted
    said = sentence(writer.state, writer.problem, figures)
    return CohortsStatus(
        sentence=f"Refusing Mixpanel's pages: {membership.full}. {said}" if membership.full else said,
        figures=figures,
        writer=WriterStatus(
            state=writer.state,
            problem=writer.problem,
            halted=None
            if halt is None
            else BrazeHalt(since=writer.halted_at or time.time(), status=halt.status, reason=halt.reason),
            delivered_at=writer.delivered_at,
            requests=writer.requests,
            in_flight=writer.in_flight,
            users_sent=writer.users_sent,
            points_spent=writer.points_spent,
            unknown_users=writer.unknown_users,
            verdicts=dict(writer.verdicts),
        ),
        page_refused=app.cohorts.last_refusal if app.cohorts is not None else None,
    )


def trouble(app: "App") -> tuple[str, str]:
    """For the alarms: why no cohorts are imported, and that the day's data points are spent; empty when it isn't so."""
    status = cohorts_status(app)
    if status is None:
        return "", ""
    is_broken = (
        status.writer.state in ("halted", "off")
        or bool(app.membership is not None and app.membership.full)
        # As for events: a Braze that can't be reached for so long needs somebody.
        or (app.cohort_writer is not None and app.cohort_writer.failing_s >= float(app.config.alerts.undelivered))
    )
    return status.sentence if is_broken else "", status.sentence if status.writer.state == "capped" else ""


def sentence(state: str, problem: str, figures: Figures) -> str:
    """What the import does, in words."""
    held = f"{figures.in_braze:,} of {figures.members:,} memberships in Braze"
    if refused := figures.rejected + figures.rejected_leaving:
        held += f", {refused:,} refused by it"
    due = f"{figures.due:,} to write"
    spent = f"{figures.points_today:,} data points today"
    match state:
        case "halted":
            return f"Halted: {problem}. {due}, all of it safe on disk"
        case "capped":
            return (
                f"Stopped at [cohorts] max_data_points_per_day: {spent}, {due}. `bridged cohorts plan` says what it costs, "
                "`bridged cohorts allow` lets it go on"
            )
        case "backing off":
            return f"Backing off: {problem}. {held}, {due}"
    if figures.waiting:
        return f"Taking in {figures.waiting:,} members of Mixpanel's pages; {held}, {due}; {spent}"
    return f"{'Sending' if state == 'sending' else 'In step'}: {held}, {due}; {spent}"


class CohortsApi:
    """The endpoints."""

    def __init__(self, app: "App") -> None:
        self._app = app

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Declares every endpoint."""
        router.add_get("/api/cohorts", self._list)
        router.add_get("/api/cohorts/plan", self._plan)
        router.add_get("/api/cohorts/refusals", self._refusals)
        router.add_get("/api/cohorts/{key}", self._show)
        router.add_post("/api/cohorts/resync", self._resync)
        router.add_post("/api/cohorts/forget", self._forget)
        router.add_post("/api/cohorts/allow", self._allow)

    @property
    def _membership(self) -> "Membership":
        if self._app.cohorts_problem:
            raise MembershipError(f"no cohorts are imported: {self._app.cohorts_problem}", "see the log for what to do")
        if self._app.membership is None:
            raise web.HTTPNotFound(text="no cohorts are imported: [cohorts] enabled is false")
        return self._app.membership

    async def _list(self, request: web.Request) -> web.Response:
        cohorts, status = self._membership.rows, cohorts_status(self._app)
        assert status is not None  # there is a membership
        said = {name: getattr(status, name) for name in CohortsStatus.__struct_fields__}
        return json(Overview(**said, cohorts=cohorts))

    async def _plan(self, request: web.Request) -> web.Response:
        return json(await self._membership.plan())

    async def _refusals(self, request: web.Request) -> web.Response:
        query = dict(request.query)
        after, limit = number(query, "after", 0, MAX_ID), number(query, "limit", 100, MAX_LISTED)
        rows = await self._membership.refusals(after, limit)
        return json(Refusals(rows, rows[-1].id if rows and len(rows) == limit else None))

    async def _show(self, request: web.Request) -> web.Response:
        return json(await self._membership.show(request.match_info["key"]))

    async def _resync(self, request: web.Request) -> web.Response:
        order = await body(request, ResyncOrder)
        if bool(order.cohort) == order.all:
            raise BadRequest("which cohort?", 'either "cohort" or {"all": true}')
        due = await self._membership.resync(order.cohort, rejected_only=order.rejected_only)
        return json({"due": due})

    async def _forget(self, request: web.Request) -> web.Response:
        order = await body(request, ForgetOrder)
        return json({"leaving": await self._membership.forget(order.cohort)})

    async def _allow(self, request: web.Request) -> web.Response:
        order = await body(request, Allowance)
        return json(await self._membership.allow(order.points))
