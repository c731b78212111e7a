"""The OpenAPI 3.1 document of the HTTP door and of the admin listener: what GET /openapi.json answers.

Every route stands here with every status that it may answer; a test holds it and the router together. The schemas are those of
the Structs that are sent, so they can't differ from them.
"""

from typing import Any, Final

import msgspec

from bridged import __version__
from bridged.admin import openapi_page
from bridged.admin.api import Counted, NewCredentials
from bridged.admin.cohorts import MAX_LISTED as MAX_REFUSALS
from bridged.admin.cohorts import MAX_POINTS, Overview, Refusals
from bridged.admin.health import Health
from bridged.admin.operations import (
    STATUSES,
    json_content,
    object_of,
    operation,
    parameter,
    ref,
    refused,
    required,
    text_content,
)
from bridged.admin.status import Status
from bridged.backlog.dead_letters import MAX_LISTED, Group, Replayed, Summary
from bridged.backlog.records import STAGES
from bridged.cohorts.records import CohortDetail, Plan

_MAX_ID: Final = 2**63 - 1


class _Dead(msgspec.Struct):
    """A page of dead letters; `next` is the `after` of the following one."""

    dead_letters: list[Summary]
    next: int | None


_FILTER: Final = [
    parameter("event_type", {"type": "string"}, "Only of this event type."),
    parameter("reason", {"type": "string"}, "Only with this in their reason, in any case."),
    parameter("exact_reason", {"type": "string"}, "Only with this very reason."),
    parameter("stage", {"enum": list(STAGES)}, "Only refused there: by our door, by bridged behind it, by Mixpanel."),
    parameter("since", {"type": "number"}, "Only refused, last, at or after this time, in seconds."),
    parameter("until", {"type": "number"}, "Only refused, last, before this time, in seconds."),
    parameter(
        "upto", {"type": "integer", "minimum": 0, "maximum": _MAX_ID}, "Only up to this id: none that came after it."
    ),
]
_IDS: Final = parameter(
    "ids", {"type": "string", "pattern": r"^\d{1,19}(,\d{1,19})*$"}, "Only these; without any other filter."
)
_PAGE: Final = [
    parameter("after", {"type": "integer", "minimum": 0, "maximum": _MAX_ID}, "The `next` of the page before."),
    parameter("before", {"type": "integer", "minimum": 0, "maximum": _MAX_ID}, "The same, with the newest first."),
    parameter(
        "order",
        {"enum": ["oldest", "newest"]},
        "Which come first; oldest. `before` goes with newest, `after` with oldest.",
    ),
    parameter("limit", {"type": "integer", "minimum": 0, "maximum": MAX_LISTED}, "At most so many; 100."),
]
_ORDER: Final = {
    "description": "Which dead letters: exactly one of the three.",
    "oneOf": [
        {
            "type": "object",
            "properties": {"ids": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": _MAX_ID}}},
            "required": ["ids"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {
                "filter": {
                    "type": "object",
                    "properties": {parameter["name"]: parameter["schema"] for parameter in _FILTER},
                    "additionalProperties": False,
                    "minProperties": 1,
                }
            },
            "required": ["filter"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {"all": {"const": True}},
            "required": ["all"],
            "additionalProperties": False,
        },
    ],
}
_LETTER: Final = {
    "type": "object",
    "description": "A dead letter with its event: as JSON if it is an object or an array, else its bytes, and their text.",
    "properties": {
        "id": {"type": "integer"},
        "first_at": {"type": "number"},
        "last_at": {"type": "number"},
        "attempts": {"type": "integer"},
        "stage": {"enum": list(STAGES)},
        "event_type": {"type": "string"},
        "reason": {"type": "string"},
        "event": {"type": ["object", "array"]},
        "event_base64": {"type": "string"},
        "event_text": {"type": "string"},
        "original": {"description": "As Braze sent it; null: it isn't kept, or isn't JSON."},
        "mapped": {
            "description": "As it was or would have been sent to Mixpanel, or would be today; null: it can't be."
        },
        "mapped_problem": {"type": "string"},
    },
    "required": ["id", "first_at", "last_at", "attempts", "stage", "event_type", "reason"],
}


def _closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


_CURRENTS: Final = operation(
    "Takes Currents events. 200: every one of them is on disk, as an event that waits, a dead letter, or skipped by choice.",
    json_content(object_of(status={"const": "ok"})),
    *(400, 401, 404, 405, 408, 411, 413, 415, 431, 501, 503),
    body={
        "description": 'Braze\'s body {"events": [...]}; an array of events or one event will do, and nothing is a probe.',
        "required": False,
        "content": {"application/json": {"schema": True}},
    },
    parameters=[
        {
            "name": "Content-Encoding",
            "in": "header",
            "required": False,
            "schema": {"enum": ["identity", "gzip", "deflate"]},
            "description": "How the body is compressed.",
        }
    ],
)

_COHORT_PAGE: Final = operation(
    "Takes a page of a cohort from Mixpanel's custom webhook. 200: it is on disk.",
    json_content(ref("CohortAnswer")),
    *(400, 401, 404, 405, 408, 411, 413, 415, 431, 501, 503),
    body={
        "description": "Mixpanel's body. What isn't named here is not looked at, and what is may be a number or a string.",
        "required": True,
        "content": json_content(
            {
                "type": "object",
                "properties": {
                    "action": {"enum": ["members", "add_members", "remove_members"]},
                    "parameters": {
                        "type": "object",
                        "properties": {
                            "mixpanel_project_id": {"type": ["string", "integer"]},
                            "mixpanel_cohort_id": {"type": ["string", "integer"]},
                            "mixpanel_cohort_name": {"type": "string"},
                            "mixpanel_session_id": {"type": "string"},
                            "page_info": {"type": "object"},
                            "members": {"type": "array", "items": {"type": "object"}},
                        },
                        "required": ["mixpanel_cohort_id", "members"],
                    },
                },
                "required": ["action", "parameters"],
            }
        ),
    },
)
# Mixpanel reads its own form of a refusal; what isn't about a page (a path, a method, a head) is told as everywhere.
for _status in (400, 401, 413, 415, 503):
    _COHORT_PAGE["responses"][str(_status)] = {
        "description": STATUSES[_status],
        "content": json_content({"anyOf": [ref("CohortAnswer"), ref("Error")]}),
    }
_COHORT_PAGE["security"] = [{"mixpanel": []}, {}]

_PATHS: Final[dict[str, dict[str, Any]]] = {
    "/healthz": {
        "get": operation(
            "Whether the process answers at all.",
            json_content(object_of(status={"const": "ok"}, version={"type": "string"}, uptime_s={"type": "number"})),
        )
    },
    "/readyz": {"get": operation("Whether it takes events and makes progress.", json_content(ref("Health")), 401)},
    "/metrics": {"get": operation("For Prometheus.", text_content("text/plain"), 401)},
    "/openapi.json": {"get": operation("This document.", json_content({"type": "object"}), 401)},
    "/api/status": {"get": operation("What the daemon does now.", json_content(ref("Status")), 401)},
    "/api/config": {
        "get": operation("The configuration in force, secrets masked.", json_content({"type": "object"}), 401),
    },
    "/api/dead-letters": {
        "get": operation(
            "Dead letters, oldest first.", json_content(ref("Listing")), 400, 401, parameters=_FILTER + _PAGE
        )
    },
    "/api/dead-letters/groups": {
        "get": operation(
            "Those that match, counted.",
            json_content({"type": "array", "items": ref("Group")}),
            400,
            401,
            parameters=_FILTER,
        )
    },
    "/api/dead-letters/export": {
        "get": operation(
            "NDJSON, with the events.", text_content("application/x-ndjson"), 400, 401, parameters=[*_FILTER, _IDS]
        )
    },
    "/api/dead-letters/{id}": {
        "get": operation(
            "One, with its event.",
            json_content(_LETTER),
            *(401, 404),
            parameters=[
                {
                    "name": "id",
                    "in": "path",
                    "required": True,
                    "schema": {"type": "integer", "minimum": 0, "maximum": _MAX_ID},
                }
            ],
        )
    },
    "/api/dead-letters/count": {
        "post": operation(
            "How many there are of them.",
            json_content(ref("Counted")),
            *(400, 401, 413, 415, 503),
            body=required(_ORDER),
        )
    },
    "/api/dead-letters/replay": {
        "post": operation(
            "Sends them again through the whole path.",
            json_content(ref("Replayed")),
            *(400, 401, 409, 413, 415, 503),
            body=required(_ORDER),
        )
    },
    "/api/dead-letters/purge": {
        "post": operation(
            "Deletes them for good.",
            json_content(object_of(purged={"type": "integer"})),
            *(400, 401, 409, 413, 415, 503),
            body=required(_ORDER),
        )
    },
    "/api/replay": {
        "post": operation(
            "Takes mapped events that were archived when they expired. Those that aren't are refused: dead letters.",
            json_content(object_of(accepted={"type": "integer"}, refused={"type": "integer"})),
            *(400, 401, 409, 413, 415, 503),
            body=required(object_of(events={"type": "array"}) | {"additionalProperties": False}),
        )
    },
    "/api/credentials": {
        "post": operation(
            "Another credential for Mixpanel, at once; in memory until the next start.",
            json_content(object_of(credential={"type": "string"}, kept={"type": "string"})),
            *(400, 401, 413, 415),
            body=required(
                {
                    "type": "object",
                    "description": "What isn't given stays; an empty string takes a value away.",
                    "properties": {name: {"type": "string"} for name in NewCredentials.__struct_fields__},
                    "additionalProperties": False,
                    "minProperties": 1,
                }
            ),
        )
    },
    "/api/cohorts": {
        "get": operation(
            "Every cohort: its members at Mixpanel, in Braze, and in between. 404: none are imported.",
            json_content(ref("Overview")),
            *(401, 404, 503),
        )
    },
    "/api/cohorts/plan": {
        "get": operation(
            "What would be written to Braze now, and what that costs.",
            json_content(ref("Plan")),
            *(401, 404, 503),
        )
    },
    "/api/cohorts/refusals": {
        "get": operation(
            "Users that Braze refused, with its words.",
            json_content(ref("Refusals")),
            *(400, 401, 404, 503),
            parameters=[
                _PAGE[0],
                parameter("limit", {"type": "integer", "minimum": 0, "maximum": MAX_REFUSALS}, "100."),
            ],
        )
    },
    "/api/cohorts/{key}": {
        "get": operation(
            "One, with Mixpanel's sessions, newest first.",
            json_content(ref("CohortDetail")),
            *(401, 404, 503),
            parameters=[
                {
                    "name": "key",
                    "in": "path",
                    "required": True,
                    "schema": {"type": "string", "minLength": 1},
                    "description": "project:cohort, or the cohort alone where one project has it.",
                }
            ],
        )
    },
    "/api/cohorts/resync": {
        "post": operation(
            "Writes all members again, whatever Braze is known to have; or only what it refused.",
            json_content(object_of(due={"type": "integer"})),
            *(400, 401, 404, 413, 415, 503),
            body=required(
                {
                    "oneOf": [
                        _closed(
                            {"cohort": {"type": "string", "minLength": 1}, "rejected_only": {"type": "boolean"}},
                            "cohort",
                        ),
                        _closed({"all": {"const": True}, "rejected_only": {"type": "boolean"}}, "all"),
                    ]
                }
            ),
        )
    },
    "/api/cohorts/forget": {
        "post": operation(
            "Takes all members out of a cohort in Braze, then forgets it.",
            json_content(object_of(leaving={"type": "integer"})),
            *(400, 401, 404, 413, 415, 503),
            body=required(_closed({"cohort": {"type": "string", "minLength": 1}}, "cohort")),
        )
    },
    "/api/cohorts/allow": {
        "post": operation(
            "Allows more data points today: so many, or with 0 as many as are due.",
            json_content(ref("Plan")),
            *(400, 401, 404, 413, 415, 503),
            body=required(
                _closed({"points": {"type": "integer", "minimum": 0, "maximum": MAX_POINTS}}, "points"),
            ),
        )
    },
    "/v1/cohorts/mixpanel": {
        "servers": [{"url": "http://127.0.0.1:8480", "description": "The HTTP door, [sources.http] listen"}],
        "post": _COHORT_PAGE,
    },
    "/v1/currents": {
        "servers": [{"url": "http://127.0.0.1:8480", "description": "The HTTP door, [sources.http] listen"}],
        "post": _CURRENTS,
    },
    **openapi_page.PATHS,
}


def document() -> dict[str, Any]:
    """The document, as plain data."""
    _, schemas = msgspec.json.schema_components(
        [
            Status,
            Health,
            Group,
            Counted,
            Replayed,
            Summary,
            _Dead,
            CohortDetail,
            Overview,
            Plan,
            Refusals,
            *openapi_page.STRUCTS,
        ],
        ref_template="#/components/schemas/{name}",
    )
    schemas["Listing"] = schemas.pop("_Dead")
    schemas["CohortAnswer"] = {
        "type": "object",
        "properties": {
            "action": {"type": "string"},
            "status": {"enum": ["success", "failure"]},
            "error": object_of(message={"type": "string"}, code={"type": "integer"}),
        },
        "required": ["action", "status"],
    }
    schemas["Error"] = object_of(error={"type": "string"})
    paths = msgspec.json.decode(msgspec.json.encode(_PATHS))
    for path, operations in paths.items():
        for method, described in operations.items():
            # /healthz is for whoever asks, by whatever name.
            if not path.startswith("/v1/") and path != "/healthz":
                refusals = (421,) if method == "get" and path != "/api/live" else (403, 421)
                described["responses"] |= {str(status): refused(status) for status in refusals}
    # It says 503 with the same body: an orchestrator reads the status, a person the reason.
    ready = paths["/readyz"]["get"]["responses"]
    ready["503"] = {"description": "Not ready: `reason` says why.", "content": json_content(ref("Health"))}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "bridged",
            "version": __version__,
            "description": "Braze Currents events to Mixpanel, Mixpanel cohorts to Braze: the HTTP door and the admin listener.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "http://127.0.0.1:8481", "description": "The admin listener, [admin] listen"}],
        "security": [{"token": []}, {}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "mixpanel": {
                    "type": "http",
                    "scheme": "basic",
                    "description": "[cohorts] username and password, which Mixpanel's custom webhook is given.",
                },
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "[sources.http] bearer_token at the HTTP door, [admin] token here, where they are set.",
                },
            },
        },
    }
