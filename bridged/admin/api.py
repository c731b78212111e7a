"""The JSON API under /api/: what the commands, the page and the operator's own tools ask and order.

    GET  /api/status                  the Status of admin/status.py
    GET  /api/config                  the configuration in force, secrets masked, and which keys were saved on the page
    GET  /api/history                 ?span=hour|day since=: columns for charts
    GET  /api/activity                ?before= limit=: what happened, newest first
    GET  /api/dead-letters            ?event_type= reason= exact_reason= stage= since= until= upto= order=oldest|newest
                                      after=|before= limit= (<= 1000)
    GET  /api/dead-letters/groups     counted by stage, event type and reason; the same filters
    GET  /api/dead-letters/export     NDJSON, with the events; the same filters, or ids=1,2,3
    GET  /api/dead-letters/ID         one, with its event as it came and as it was mapped, as far as there are both
    POST /api/dead-letters/count      how many an order, such as the following, would be about, and the
                                      filter "upto" that leaves out what comes from now on
    POST /api/dead-letters/replay     {"ids": [...]} or {"filter": {...}} or {"all": true}
    POST /api/dead-letters/purge      likewise
    POST /api/credentials             {"token", "api_secret", "service_account", "service_secret", "project_id"}: those that
                                      are given are in force at once, until the next start or another one in the
                                      configuration. Kept in memory only, never sent back.
    POST /api/replay                  {"events": [...]}: mapped events that were archived when they expired; what isn't one
                                      is refused: a dead letter

    /api/cohorts...                   see admin/cohorts.py

What changes something is a POST of JSON, and only that. Errors are {"error": what happened, "hint": what to do}.
"""

import contextlib
import math
import time
from typing import TYPE_CHECKING, Final

import msgspec
from aiohttp import web
from msgspec import Struct

from bridged import config
from bridged.activity import MAX_ENTRIES, Entry
from bridged.admin.answers import body, demand_export, in_words, json, number
from bridged.admin.cohorts import CohortsApi
from bridged.admin.history import SPANS, History
from bridged.admin.status import status
from bridged.backlog.dead_letters import MAX_ID, MAX_LISTED, DeadLetters, Filter, Group, Summary, exported
from bridged.errors import BadRequest, ConfigError

if TYPE_CHECKING:
    from bridged.app import App

# Counting the reasons goes through the whole table: the status uses an old count for so many times what it took.
_PATIENCE: Final = 30.0
_TOP_REASONS: Final = 20


class Listing(Struct):
    """A page of dead letters; `next` is the `after` of the following one."""

    dead_letters: list[Summary]
    next: int | None


class Happened(Struct):
    """A page of what happened, the newest first; `next` is the `before` of the following one."""

    activity: list[Entry]
    next: int | None


class Counted(Struct):
    """How many an order would be about; with `upto` in its filter it is about those, and none that came since."""

    count: int
    upto: int


class Order(Struct, forbid_unknown_fields=True):
    """Which dead letters to replay or purge: exactly one of the three."""

    ids: list[int] | None = None
    filter: Filter | None = None
    all: bool = False

    def wanted(self) -> Filter | list[int]:
        """As the dead letters want it. Raises BadRequest."""
        if (self.ids is not None) + (self.filter is not None) + self.all != 1:
            raise BadRequest("which dead letters?", 'exactly one of "ids", "filter" and "all"')
        if self.filter is not None:
            if self.filter == Filter():
                raise BadRequest("the filter is empty", '{"all": true} means all of them')
            return self.filter
        if self.ids is not None and any(not 0 < id_ <= MAX_ID for id_ in self.ids):
            raise BadRequest("ids are positive numbers")
        return Filter() if self.ids is None else self.ids


class NewCredentials(Struct, forbid_unknown_fields=True):
    """The body of a change of credentials. What isn't given stays; "" takes a value away."""

    token: str | None = None
    api_secret: str | None = None
    service_account: str | None = None
    service_secret: str | None = None
    project_id: str | None = None

    def given(self) -> dict[str, str]:
        """The members that are there. Raises BadRequest."""
        found = {name: value.strip() for name in self.__struct_fields__ if (value := getattr(self, name)) is not None}
        if not found:
            raise BadRequest("which credential?", f"the members are {', '.join(self.__struct_fields__)}")
        if not all(value.isprintable() and value.isascii() for value in found.values()):
            raise BadRequest("a credential is printable ASCII", "was it copied whole, and nothing else?")
        return found


class Archived(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a replay of archived events."""

    events: list[msgspec.Raw]


class Api:
    """The endpoints. Owns the dead letters' verbs, so that there is one replay at a time."""

    def __init__(self, app: "App", history: History) -> None:
        self._app = app
        self._history = history
        self._dead_letters = DeadLetters(app.spool, app.intake.replay)
        self._groups: list[Group] = []
        self._groups_of: object = None  # what the dead letters were like when they were counted
        self._groups_until = 0.0  # monotonic

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Declares every endpoint."""
        router.add_get("/api/status", self._status)
        router.add_get("/api/config", self._config)
        router.add_get("/api/history", self._columns)
        router.add_get("/api/activity", self._activity)
        router.add_get("/api/dead-letters", self._list)
        router.add_get("/api/dead-letters/groups", self._all_groups)
        router.add_get("/api/dead-letters/export", self._export)
        router.add_get(r"/api/dead-letters/{id:\d{1,19}}", self._show)
        router.add_post("/api/dead-letters/count", self._count)
        router.add_post("/api/dead-letters/replay", self._replay)
        router.add_post("/api/dead-letters/purge", self._purge)
        router.add_post("/api/replay", self._replay_archived)
        router.add_post("/api/credentials", self._credentials)
        CohortsApi(self._app).add_routes(router)

    async def _status(self, request: web.Request) -> web.Response:
        return json(status(self._app, (await self._counted())[:_TOP_REASONS]))

    async def _config(self, request: web.Request) -> web.Response:
        app = self._app
        return json(config.masked(app.config) | {"overridden": app.saved.overridden(app.base)})

    async def _columns(self, request: web.Request) -> web.Response:
        query = dict(request.query)
        span, since = query.pop("span", "hour"), _time(query.pop("since", "0"))
        if query or span not in SPANS:
            raise BadRequest("the history is asked for by span and since", f"span is {' or '.join(SPANS)}")
        return json(self._history.columns(span, since))

    async def _activity(self, request: web.Request) -> web.Response:
        query = dict(request.query)
        limit, before = number(query, "limit", 100, MAX_ENTRIES), number(query, "before", MAX_ID, MAX_ID)
        _demand_nothing_else(query)
        entries = self._app.activity.newest(limit, before)
        return json(Happened(entries, entries[-1].id if entries and len(entries) == limit else None))

    async def _counted(self) -> list[Group]:
        """The dead letters by reason, not newer than need be."""
        spool, now = self._app.spool, time.monotonic()
        key = (spool.dead_letters, spool.dropped_dead_letters, spool.accounts.total("dead_lettered"))
        if key != self._groups_of and now >= self._groups_until:
            self._groups = await self._dead_letters.groups()
            self._groups_of = key
            took_s = time.monotonic() - now
            self._groups_until = now + took_s * _PATIENCE if took_s > 0.05 else 0.0
        return self._groups

    async def _all_groups(self, request: web.Request) -> web.Response:
        return json(await self._dead_letters.groups(_filter(dict(request.query))))

    async def _count(self, request: web.Request) -> web.Response:
        wanted = (await body(request, Order)).wanted()
        # Asked for first: what comes while they are counted is in neither.
        upto = await self._dead_letters.last()
        if isinstance(wanted, Filter):
            wanted = msgspec.structs.replace(wanted, upto=upto if wanted.upto is None else min(upto, wanted.upto))
        return json(Counted(await self._dead_letters.count(wanted), upto))

    async def _list(self, request: web.Request) -> web.Response:
        query = dict(request.query)
        limit, order = number(query, "limit", 100, MAX_LISTED), query.pop("order", "oldest")
        if order not in ("oldest", "newest"):
            raise BadRequest("order: oldest or newest")
        if order == "oldest":
            after = number(query, "after", 0, MAX_ID)
            rows = await self._dead_letters.list_after(_filter(query), after, limit)
        else:
            before = number(query, "before", MAX_ID, MAX_ID)
            rows = await self._dead_letters.list_before(_filter(query), before, limit)
        return json(Listing(rows, rows[-1].id if rows and len(rows) == limit else None))

    async def _show(self, request: web.Request) -> web.Response:
        id_ = int(request.match_info["id"])
        row = await self._dead_letters.get(id_) if id_ <= MAX_ID else None
        if row is None:
            raise web.HTTPNotFound(text=f"there is no dead letter {id_}")
        return json(exported(row) | self._app.intake.both_forms(row))

    async def _export(self, request: web.Request) -> web.StreamResponse:
        query = dict(request.query)
        wanted = _ids(query.pop("ids")) if query.get("ids") else _filter(query)
        if isinstance(wanted, list):
            _demand_nothing_else(query)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        with contextlib.suppress(ConnectionError):  # who asked has gone
            await response.prepare(request)
            async for rows in self._dead_letters.slices(wanted):
                await response.write(msgspec.json.Encoder().encode_lines([exported(row) for row in rows]))
            await response.write_eof()
        return response

    async def _replay(self, request: web.Request) -> web.Response:
        wanted = (await body(request, Order)).wanted()
        demand_export(self._app.config)
        self._demand_quiet()
        outcome = await self._dead_letters.replay(wanted)
        replayed, refused, skipped = outcome.replayed, outcome.refused, outcome.skipped
        text = "Dead letters were replayed"
        self._app.activity.tell("replay", text, replayed=replayed, refused_again=refused, skipped=skipped)
        return json(outcome)

    async def _purge(self, request: web.Request) -> web.Response:
        wanted = (await body(request, Order)).wanted()
        self._demand_quiet()
        purged = await self._dead_letters.purge(wanted)
        self._app.activity.tell("purge", "Dead letters were deleted for good", "warning", purged=purged)
        return json({"purged": purged})

    async def _replay_archived(self, request: web.Request) -> web.Response:
        """Mapped events that were archived: `{"events": [...]}`. Answered when they are on disk, as such or as dead letters."""
        events = (await body(request, Archived)).events
        demand_export(self._app.config)
        committed, refused = self._app.intake.accept_archived([bytes(event) for event in events])
        await committed
        return json({"accepted": len(events) - refused, "refused": refused})

    async def _credentials(self, request: web.Request) -> web.Response:
        """Another credential, at once."""
        given = (await body(request, NewCredentials)).given()
        try:
            self._app.take_credentials(given)
        except ConfigError as error:
            raise BadRequest(f"nothing was changed: {error.args[0]}", error.hint) from error
        kind = self._app.transport.target.credentials.kind
        return json({"credential": kind, "kept": "in memory, until the next start"})

    def _demand_quiet(self) -> None:
        if self._dead_letters.busy:
            raise web.HTTPConflict(text="another replay or purge of dead letters is under way: wait for its end")


def _demand_nothing_else(query: dict[str, str]) -> None:
    if query:
        raise BadRequest(f"the query has a part that means nothing here: {next(iter(query))[:40]!r}")


def _ids(text: str) -> list[int]:
    ids = text.split(",")
    if len(ids) > MAX_LISTED:
        raise BadRequest(f"ids: {MAX_LISTED} at most")
    return [number({"ids": one}, "ids", 0, MAX_ID) for one in ids]


def _time(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise BadRequest(f"expected a time in seconds, not {text[:40]!r}")
    return seconds


def _filter(query: dict[str, str]) -> Filter:
    """The rest of a query as a filter."""
    try:
        return msgspec.convert({key: value for key, value in query.items() if value}, Filter, strict=False)
    except msgspec.ValidationError as error:
        names = ", ".join(field.name for field in msgspec.structs.fields(Filter))
        raise BadRequest(f"the query can't be understood: {in_words(error)}", f"the filters are {names}") from error
