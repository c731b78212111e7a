"""The part of the OpenAPI document that is about the page: its files, its login, and what only it asks so far."""

from typing import Any, Final

from bridged.activity import MAX_ENTRIES
from bridged.admin.access import Standing
from bridged.admin.api import Happened
from bridged.admin.events import EventsView, Sample
from bridged.admin.history import SPANS, Columns
from bridged.admin.live import Live
from bridged.admin.operations import json_content, object_of, operation, parameter, ref, required, text_content
from bridged.admin.selection import ROWS
from bridged.admin.settings import Changed, Connection, Settings
from bridged.delivery.probe import Finding
from bridged.saved import EDITABLE

STRUCTS: Final = (Standing, Columns, Live, Happened, Settings, Changed, Connection, Finding, EventsView, Sample)
_MAX_ID: Final = 2**63 - 1
_ANYTHING: Final = {"*/*": {"schema": {"type": "string"}}}

_EVENT_TYPE: Final = {"name": "event_type", "in": "path", "required": True, "schema": {"enum": list(ROWS)}}

PATHS: Final[dict[str, dict[str, Any]]] = {
    "/": {"get": operation("The page.", text_content("text/html"), 404)},
    # A name that isn't one of these is 404 like any other; it is told so that a machine knows what to try.
    "/page/{file}": {
        "get": operation(
            "A file of the page.",
            _ANYTHING,
            404,
            parameters=[
                {
                    "name": "file",
                    "in": "path",
                    "required": True,
                    "schema": {"type": "string", "pattern": "^[a-z][a-z0-9.-]*$"},
                }
            ],
        )
    },
    "/api/session": {"get": operation("Whether a login is needed, and the CSRF token.", json_content(ref("Standing")))},
    "/api/login": {
        "post": operation(
            "Logs a browser in: the answer sets a cookie.",
            json_content(ref("Standing")),
            *(400, 401, 413, 415, 429),
            body=required(object_of(token={"type": "string"}) | {"additionalProperties": False}),
        )
    },
    "/api/logout": {
        "post": operation(
            "Ends the session.", json_content(ref("Standing")), *(401, 413, 415), body=required({"type": "object"})
        )
    },
    "/api/live": {
        "get": operation(
            "Server-sent events: an event `status` a second, whose data is a Live.",
            text_content("text/event-stream"),
            *(401, 503),
        )
    },
    "/api/history": {
        "get": operation(
            "The charts' columns.",
            json_content(ref("Columns")),
            *(400, 401),
            parameters=[
                parameter("span", {"enum": list(SPANS)}, "Steps of 5 s, or of two minutes."),
                parameter("since", {"type": "number"}, "Only steps that ended later, in seconds."),
            ],
        )
    },
    "/api/activity": {
        "get": operation(
            "What happened, newest first.",
            json_content(ref("Happened")),
            *(400, 401),
            parameters=[
                parameter(
                    "before", {"type": "integer", "minimum": 0, "maximum": _MAX_ID}, "The `next` of the page before."
                ),
                parameter("limit", {"type": "integer", "minimum": 0, "maximum": MAX_ENTRIES}, "At most so many; 100."),
            ],
        )
    },
    "/api/settings": {
        "get": operation("Every key that the page may change.", json_content(ref("Settings")), 401),
        "put": operation(
            "Saves settings over the configuration, at once and for good. 400: `keys` says what is wrong with which.",
            json_content(ref("Changed")),
            *(400, 401, 409, 413, 415, 503),
            body=required(
                {
                    "type": "object",
                    "properties": {
                        "set": {"type": "object", "description": "Values by key, such as mixpanel.region."},
                        "remove": {
                            "type": "array",
                            "items": {"type": "string"},
                            "description": "Back to the configuration.",
                        },
                        "revision": {
                            "type": ["integer", "null"],
                            "description": "Refused with 409 if it isn't the newest.",
                        },
                    },
                    "additionalProperties": False,
                    "minProperties": 1,
                }
            ),
        ),
    },
    "/api/settings/{key}": {
        "delete": operation(
            "Back to what the configuration says.",
            json_content(ref("Changed")),
            *(400, 401, 404, 409, 413, 415, 503),
            parameters=[{"name": "key", "in": "path", "required": True, "schema": {"enum": list(EDITABLE)}}],
            body={"required": False, "content": json_content({"type": "object"})},
        )
    },
    "/api/settings/export": {
        "get": operation("What was saved, as TOML, without secrets.", text_content("text/plain"), 401)
    },
    "/api/connection": {"get": operation("What to give to Braze.", json_content(ref("Connection")), 401)},
    "/api/test-connection": {
        "post": operation(
            "Does Mixpanel take this credential? Nothing is stored, there or here.",
            json_content(ref("Finding")),
            *(400, 401, 409, 413, 415),
            body=required(
                {
                    "type": "object",
                    "properties": {
                        "mixpanel": {
                            "type": "object",
                            "description": "Members of [mixpanel] that differ from what is in force.",
                        }
                    },
                    "additionalProperties": False,
                }
            ),
        )
    },
    "/api/events": {"get": operation("Every event type, with its counts.", json_content(ref("EventsView")), 401)},
    "/api/events/{event_type}": {
        "put": operation(
            "Whether a type is forwarded, as what, and which of its fields are transformed.",
            json_content(ref("Changed")),
            *(400, 401, 404, 409, 413, 415, 503),
            parameters=[_EVENT_TYPE],
            body=required(
                {
                    "type": "object",
                    "properties": {
                        "selected": {"type": "boolean"},
                        "name": {"type": ["string", "null"], "description": "null: the default one."},
                        "transform": {"type": "object", "additionalProperties": {"enum": ["remove", "hash"]}},
                        "revision": {"type": ["integer", "null"]},
                    },
                    "additionalProperties": False,
                    "minProperties": 1,
                }
            ),
        )
    },
    "/api/events/{event_type}/sample": {
        "get": operation(
            "An example, and what it becomes.", json_content(ref("Sample")), *(401, 404), parameters=[_EVENT_TYPE]
        )
    },
    "/api/events/test": {
        "post": operation(
            "Test events through the whole path, to Mixpanel.",
            json_content(object_of(sent={"type": "integer"}, user={"type": "string"})),
            *(400, 401, 409, 413, 415, 503),
            body=required(
                {
                    "type": "object",
                    "properties": {"types": {"type": ["array", "null"], "items": {"type": "string"}}},
                    "additionalProperties": False,
                }
            ),
        )
    },
}
