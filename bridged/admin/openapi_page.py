"""The part of the OpenAPI document that is about the page: its files, its login, and what only it asks so far."""

from typing import Any, Final

from bridged.activity import MAX_ENTRIES
from bridged.admin.access import Standing
from bridged.admin.api import Happened
from bridged.admin.history import SPANS, Columns
from bridged.admin.live import Live
from bridged.admin.operations import json_content, object_of, operation, parameter, ref, required, text_content

STRUCTS: Final = (Standing, Columns, Live, Happened)
_MAX_ID: Final = 2**63 - 1
_ANYTHING: Final = {"*/*": {"schema": {"type": "string"}}}

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
}
