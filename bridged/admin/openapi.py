"""The OpenAPI 3.1 document of the HTTP door and of the admin listener: what GET /openapi.json answers.

Every route stands here with every status that it may answer; a test holds it and the router together. The schemas are those of
the Structs that are sent, so they can't differ from them.
"""

from typing import Any, Final

import msgspec

from bridged import __version__
from bridged.admin.api import NewCredentials
from bridged.admin.cohorts import MAX_LISTED as MAX_REFUSALS
from bridged.admin.cohorts import MAX_POINTS, Overview, Refusals
from bridged.admin.health import Health
from bridged.admin.status import Status
from bridged.backlog.dead_letters import MAX_LISTED, Group, Replayed, Summary
from bridged.cohorts.records import CohortDetail, Plan

_MAX_ID: Final = 2**63 - 1
_STATUSES: Final = {
    200: "Done.",
    400: "The request can't be understood: `error` says what, `hint` what to do.",
    401: "No token, or a wrong one.",
    403: "From a page of another origin.",
    404: "There is no such thing here.",
    405: "Not this method.",
    408: "The request didn't come in time.",
    409: "Another replay or purge is under way.",
    413: "Too large. At the HTTP door: split it.",
    415: "At the HTTP door: compressed with anything but gzip or deflate. Else: the body must be application/json.",
    421: "Under a name that is none of ours: see [admin] hosts.",
    431: "The head is too large.",
    503: "Not now. At the HTTP door: keep the events and come again after Retry-After seconds.",
}


class _Dead(msgspec.Struct):
    """A page of dead letters; `next` is the `after` of the following one."""

    dead_letters: list[Summary]
    next: int | None


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _text(content_type: str) -> dict[str, Any]:
    return {content_type: {"schema": {"type": "string"}}}


def _operation(
    summary: str,
    content: dict[str, Any],
    *others: int,
    parameters: list[dict[str, Any]] | None = None,
    body: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One operation: what a 200 holds, and what else it may answer (401 unless it is said to be open)."""
    responses: dict[str, Any] = {"200": {"description": _STATUSES[200], "content": content}}
    for status in sorted(others):
        responses[str(status)] = _refused(status)
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if parameters:
        operation["parameters"] = parameters
    if body:
        operation["requestBody"] = body
    if 401 not in others:
        operation["security"] = []
    return operation


def _refused(status: int) -> dict[str, Any]:
    return {"description": _STATUSES[status], "content": _json(_ref("Error"))}


def _parameter(name: str, schema: dict[str, Any], text: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": text}


_FILTER: Final = [
    _parameter("event_type", {"type": "string"}, "Only of this event type."),
    _parameter("reason", {"type": "string"}, "Only with this in their reason, in any case."),
    _parameter("stage", {"enum": ["door", "mixpanel"]}, "Only refused there."),
    _parameter("since", {"type": "number"}, "Only refused, last, at or after this time, in seconds."),
    _parameter("until", {"type": "number"}, "Only refused, last, before this time, in seconds."),
]
_PAGE: Final = [
    _parameter("after", {"type": "integer", "minimum": 0, "maximum": _MAX_ID}, "The `next` of the page before."),
    _parameter("limit", {"type": "integer", "minimum": 0, "maximum": MAX_LISTED}, "At most so many; 100."),
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
    "description": "A dead letter with its event: as JSON if it is an object or an array, else its bytes.",
    "properties": {
        "id": {"type": "integer"},
        "first_at": {"type": "number"},
        "last_at": {"type": "number"},
        "attempts": {"type": "integer"},
        "stage": {"enum": ["door", "mixpanel"]},
        "event_type": {"type": "string"},
        "reason": {"type": "string"},
        "event": {"type": ["object", "array"]},
        "event_base64": {"type": "string"},
    },
    "required": ["id", "first_at", "last_at", "attempts", "stage", "event_type", "reason"],
}


def _required(schema: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": _json(schema)}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


_CURRENTS: Final = _operation(
    "Takes Currents events. 200: every one of them is on disk, as an event that waits, a dead letter, or skipped by choice.",
    _json(_object(status={"const": "ok"})),
    *(400, 401, 404, 405, 408, 413, 415, 431, 503),
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

_COHORT_PAGE: Final = _operation(
    "Takes a page of a cohort from Mixpanel's custom webhook. 200: it is on disk.",
    _json(_ref("CohortAnswer")),
    *(400, 401, 404, 405, 408, 413, 415, 431, 503),
    body={
        "description": "Mixpanel's body. What isn't named here is not looked at, and what is may be a number or a string.",
        "required": True,
        "content": _json(
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
        "description": _STATUSES[_status],
        "content": _json({"anyOf": [_ref("CohortAnswer"), _ref("Error")]}),
    }
_COHORT_PAGE["security"] = [{"mixpanel": []}, {}]

_PATHS: Final[dict[str, dict[str, Any]]] = {
    "/healthz": {
        "get": _operation(
            "Whether the process answers at all.",
            _json(_object(status={"const": "ok"}, version={"type": "string"}, uptime_s={"type": "number"})),
        )
    },
    "/readyz": {"get": _operation("Whether it takes events and makes progress.", _json(_ref("Health")), 401)},
    "/metrics": {"get": _operation("For Prometheus.", _text("text/plain"), 401)},
    "/openapi.json": {"get": _operation("This document.", _json({"type": "object"}), 401)},
    "/api/status": {"get": _operation("What the daemon does now.", _json(_ref("Status")), 401)},
    "/api/config": {
        "get": _operation("The configuration in force, secrets masked.", _json({"type": "object"}), 401),
    },
    "/api/dead-letters": {
        "get": _operation("Dead letters, oldest first.", _json(_ref("Listing")), 400, 401, parameters=_FILTER + _PAGE)
    },
    "/api/dead-letters/groups": {
        "get": _operation("All of them, counted.", _json({"type": "array", "items": _ref("Group")}), 401)
    },
    "/api/dead-letters/export": {
        "get": _operation("NDJSON, with the events.", _text("application/x-ndjson"), 400, 401, parameters=_FILTER)
    },
    "/api/dead-letters/{id}": {
        "get": _operation(
            "One, with its event.",
            _json(_LETTER),
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
    "/api/dead-letters/replay": {
        "post": _operation(
            "Sends them again through the whole path.",
            _json(_ref("Replayed")),
            *(400, 401, 409, 413, 415, 503),
            body=_required(_ORDER),
        )
    },
    "/api/dead-letters/purge": {
        "post": _operation(
            "Deletes them for good.",
            _json(_object(purged={"type": "integer"})),
            *(400, 401, 409, 413, 415, 503),
            body=_required(_ORDER),
        )
    },
    "/api/replay": {
        "post": _operation(
            "Takes mapped events that were archived when they expired.",
            _json(_object(accepted={"type": "integer"})),
            *(400, 401, 413, 415, 503),
            body=_required(_object(events={"type": "array"}) | {"additionalProperties": False}),
        )
    },
    "/api/credentials": {
        "post": _operation(
            "Another credential for Mixpanel, at once; in memory until the next start.",
            _json(_object(credential={"type": "string"}, kept={"type": "string"})),
            *(400, 401, 413, 415),
            body=_required(
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
        "get": _operation(
            "Every cohort: its members at Mixpanel, in Braze, and in between. 404: none are imported.",
            _json(_ref("Overview")),
            *(401, 404, 503),
        )
    },
    "/api/cohorts/plan": {
        "get": _operation(
            "What would be written to Braze now, and what that costs.",
            _json(_ref("Plan")),
            *(401, 404, 503),
        )
    },
    "/api/cohorts/refusals": {
        "get": _operation(
            "Users that Braze refused, with its words.",
            _json(_ref("Refusals")),
            *(400, 401, 404, 503),
            parameters=[
                _PAGE[0],
                _parameter("limit", {"type": "integer", "minimum": 0, "maximum": MAX_REFUSALS}, "100."),
            ],
        )
    },
    "/api/cohorts/{key}": {
        "get": _operation(
            "One, with Mixpanel's sessions, newest first.",
            _json(_ref("CohortDetail")),
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
        "post": _operation(
            "Writes all members again, whatever Braze is known to have; or only what it refused.",
            _json(_object(due={"type": "integer"})),
            *(400, 401, 404, 413, 415, 503),
            body=_required(
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
        "post": _operation(
            "Takes all members out of a cohort in Braze, then forgets it.",
            _json(_object(leaving={"type": "integer"})),
            *(400, 401, 404, 413, 415, 503),
            body=_required(_closed({"cohort": {"type": "string", "minLength": 1}}, "cohort")),
        )
    },
    "/api/cohorts/allow": {
        "post": _operation(
            "Allows more data points today: so many, or with 0 as many as are due.",
            _json(_ref("Plan")),
            *(400, 401, 404, 413, 415, 503),
            body=_required(
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
}


def document() -> dict[str, Any]:
    """The document, as plain data."""
    _, schemas = msgspec.json.schema_components(
        [Status, Health, Group, Replayed, Summary, _Dead, CohortDetail, Overview, Plan, Refusals],
        ref_template="#/components/schemas/{name}",
    )
    schemas["Listing"] = schemas.pop("_Dead")
    schemas["CohortAnswer"] = {
        "type": "object",
        "properties": {
            "action": {"type": "string"},
            "status": {"enum": ["success", "failure"]},
            "error": _object(message={"type": "string"}, code={"type": "integer"}),
        },
        "required": ["action", "status"],
    }
    schemas["Error"] = _object(error={"type": "string"})
    paths = msgspec.json.decode(msgspec.json.encode(_PATHS))
    for path, operations in paths.items():
        for method, operation in operations.items():
            if not path.startswith("/v1/"):
                refusals = (403, 421) if method == "post" else (421,)
                operation["responses"] |= {str(status): _refused(status) for status in refusals}
    # It says 503 with the same body: an orchestrator reads the status, a person the reason.
    ready = paths["/readyz"]["get"]["responses"]
    ready["503"] = {"description": "Not ready: `reason` says why.", "content": _json(_ref("Health"))}
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
