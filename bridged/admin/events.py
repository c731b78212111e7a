"""The event types on the page: selection, names, transformations, samples, test events.

GET  /api/events                   both groups, and every type with its counts
PUT  /api/events/TYPE              {"selected": true, "name": "SMS Carrier", "transform": {"email_address": "hash"}}
GET  /api/events/TYPE/sample       an example event of Braze's, and what it becomes under the settings in force
POST /api/events/test              {"types": [...]}: one example of each through the whole path, to Mixpanel
"""

import random
import time
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec
from aiohttp import web
from msgspec import UNSET, Struct, UnsetType

from bridged import options
from bridged.admin.answers import body, demand_export, json
from bridged.admin.selection import ROWS, TITLES, TypeView, UnknownSeen, view, with_selected
from bridged.admin.settings import Change, saved
from bridged.admin.status import TYPE_NAMES
from bridged.backlog.accounts import KINDS
from bridged.config import value_at
from bridged.currents.examples import example_event
from bridged.errors import BadRequest
from bridged.mixpanel.mapping import EventMapping, selected
from bridged.settings import Config

if TYPE_CHECKING:
    from bridged.app import App

# Everybody can tell a test event in Mixpanel by its user.
TEST_USER: Final = "bridged-test"


class GroupView(Struct):
    """One of the two groups of the seed page."""

    group: str
    title: str
    selected: bool


class EventsView(Struct, kw_only=True):
    """What GET /api/events answers."""

    revision: int
    groups: list[GroupView]
    unknown: str  # what becomes of a type that the table doesn't have
    anonymous: str  # and of an event without a user
    others: dict[str, dict[str, int]]  # counts of what is no type of the table
    types: list[TypeView]


class TypeChange(Struct, forbid_unknown_fields=True):
    """What isn't given stays. `name` null: the default name."""

    selected: bool | UnsetType = UNSET
    name: str | UnsetType | None = UNSET
    transform: dict[str, Literal["remove", "hash"]] | UnsetType = UNSET
    revision: int | None = None


class Sample(Struct, kw_only=True):
    """What an event of a type looks like on both sides."""

    currents: dict[str, Any]
    outcome: Literal["mapped", "skipped", "dead_letter"]
    reason: str  # of the latter two
    mixpanel: Any  # null, if it isn't mapped


class TestEvents(Struct, forbid_unknown_fields=True):
    """Which types; null: all that are selected."""

    types: list[str] | None = None


class EventsApi:
    """The endpoints."""

    def __init__(self, app: "App") -> None:
        self._app = app

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Declares every endpoint."""
        router.add_get("/api/events", self._events)
        router.add_post("/api/events/test", self._test)
        router.add_put("/api/events/{event_type}", self._change)
        router.add_get("/api/events/{event_type}/sample", self._sample)

    async def _events(self, request: web.Request) -> web.Response:
        app, settings = self._app, options.mapping_settings(self._app.config)
        by_type = app.spool.accounts.by_type(TYPE_NAMES)
        unknown: dict[str, list[UnknownSeen]] = {}
        for (code, field), seen in app.intake.unknown_fields.most_common():
            unknown.setdefault(app.mapping.type_name(code), []).append(UnknownSeen(field, seen))
        none = dict.fromkeys(KINDS, 0)
        return json(
            EventsView(
                revision=app.saved.revision,
                groups=[GroupView(group, title, getattr(settings, group)) for group, title in TITLES.items()],
                unknown=settings.unknown,
                anonymous=settings.anonymous,
                others={name: counts for name, counts in by_type.items() if name not in ROWS},
                types=[
                    view(row, settings, by_type.get(name, none), unknown.get(name, [])) for name, row in ROWS.items()
                ],
            )
        )

    async def _change(self, request: web.Request) -> web.Response:
        row = _row(request)
        change = await body(request, TypeChange)
        settings = options.mapping_settings(self._app.config)
        changes: dict[str, Any] = {}
        if change.selected is not UNSET:
            changes |= with_selected(row, settings, change.selected)
        if change.name is not UNSET:
            names = {name: given for name, given in settings.names.items() if name != row.event_type}
            changes["events.names"] = names | ({row.event_type: change.name} if change.name is not None else {})
        if change.transform is not UNSET:
            rules = {name: dict(of) for name, of in settings.transform.items() if name != row.event_type}
            changes["events.transform"] = rules | ({row.event_type: change.transform} if change.transform else {})
        if not changes:
            raise BadRequest("what of it?", "selected, name or transform")
        return await saved(self._app, _change_to(changes, self._app.base, change.revision))

    async def _sample(self, request: web.Request) -> web.Response:
        row = _row(request)
        # Always the same one, so that what a change does is all that changes.
        event = example_event(row, random.Random(row.event_type), int(time.time()) - 60, every_property=True)
        return json(sample(self._app.mapping, event))

    async def _test(self, request: web.Request) -> web.Response:
        wanted = (await body(request, TestEvents)).types
        demand_export(self._app.config)
        settings = options.mapping_settings(self._app.config)
        chosen = {name: row for name, row in ROWS.items() if selected(row, settings)}
        for name in wanted if wanted is not None else ():
            if name not in chosen:
                raise BadRequest(f"{name[:80]!r} is not a selected event type", "tick it first")
        rows = list(chosen.values()) if wanted is None else [chosen[name] for name in dict.fromkeys(wanted)]
        if not rows:
            raise BadRequest("no event type is selected", "tick one first")
        now_s, rng = int(time.time()), random.Random()
        events = [example_event(row, rng, now_s, every_property=True) for row in rows]
        for event in events:
            event["user"]["external_user_id"] = TEST_USER
        await self._app.intake.accept_body(msgspec.json.encode({"events": events}))
        self._app.activity.tell("test_events", f"{len(events)} test events were sent", user=TEST_USER)
        return json({"sent": len(events), "user": TEST_USER})


def _row(request: web.Request) -> Any:
    row = ROWS.get(name := request.match_info["event_type"])
    if row is None:
        raise web.HTTPNotFound(text=f"there is no event type {name[:80]!r}")
    return row


def _change_to(wanted: dict[str, Any], base: Config, revision: int | None) -> Change:
    """What is as the configuration has it anyway needs no override, and gets rid of one."""
    same = [name for name, value in wanted.items() if _plain(value_at(base, tuple(name.split(".")))) == value]
    return Change(set={name: of for name, of in wanted.items() if name not in same}, remove=same, revision=revision)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def sample(mapping: EventMapping, event: dict[str, Any]) -> Sample:
    """What becomes of one event of Currents under a mapping."""
    mapped = mapping.map(mapping.schema.lines([msgspec.json.encode(event)]), time.time())
    if mapped.forms:
        encoded = msgspec.json.decode(msgspec.json.encode(mapped.forms[0]))
        return Sample(currents=event, outcome="mapped", reason="", mixpanel=encoded)
    if mapped.skips:
        return Sample(currents=event, outcome="skipped", reason=mapped.skips[0].reason, mixpanel=None)
    reason = mapped.refusals[0].reason if mapped.refusals else "it holds no event"
    return Sample(currents=event, outcome="dead_letter", reason=reason, mixpanel=None)
