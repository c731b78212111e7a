"""The words that the OpenAPI document is made of: one operation, its parameters, its answers."""

from typing import Any, Final

STATUSES: Final = {
    200: "Done.",
    400: "The request can't be understood: `error` says what, `hint` what to do.",
    401: "No token, or a wrong one.",
    403: "From a page of another origin, or without the CSRF token of GET /api/session.",
    404: "There is no such thing here.",
    405: "Not this method.",
    408: "The request didn't come in time.",
    409: "Not now: another change is under way, or mixpanel.export is off.",
    411: "At the HTTP door: a body whose length the head doesn't say.",
    413: "Too large. At the HTTP door: split it.",
    415: "At the HTTP door: compressed with anything but gzip or deflate. Else: the body must be application/json.",
    421: "Under a name that is none of ours: see [admin] hosts.",
    429: "Too many wrong tokens: come again after Retry-After seconds.",
    431: "The head is too large.",
    501: "A Transfer-Encoding other than chunked.",
    503: "Not now. At the HTTP door: keep the events and come again after Retry-After seconds.",
}


def json_content(schema: dict[str, Any]) -> dict[str, Any]:
    """A body of JSON."""
    return {"application/json": {"schema": schema}}


def ref(name: str) -> dict[str, str]:
    """One of the document's schemas."""
    return {"$ref": f"#/components/schemas/{name}"}


def text_content(content_type: str) -> dict[str, Any]:
    """A body of text."""
    return {content_type: {"schema": {"type": "string"}}}


def operation(
    summary: str,
    content: dict[str, Any],
    *others: int,
    parameters: list[dict[str, Any]] | None = None,
    body: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One operation: what a 200 holds, and what else it may answer (401 unless it is said to be open)."""
    responses: dict[str, Any] = {"200": {"description": STATUSES[200], "content": content}}
    for status in sorted(others):
        responses[str(status)] = refused(status)
    described: dict[str, Any] = {"summary": summary, "responses": responses}
    if parameters:
        described["parameters"] = parameters
    if body:
        described["requestBody"] = body
    if 401 not in others:
        described["security"] = []
    return described


def refused(status: int) -> dict[str, Any]:
    """An answer that is no 200."""
    return {"description": STATUSES[status], "content": json_content(ref("Error"))}


def parameter(name: str, schema: dict[str, Any], text: str) -> dict[str, Any]:
    """Of a query."""
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": text}


def required(schema: dict[str, Any]) -> dict[str, Any]:
    """A body of JSON that has to be there."""
    return {"required": True, "content": json_content(schema)}


def object_of(**properties: dict[str, Any]) -> dict[str, Any]:
    """An object whose members are all there."""
    return {"type": "object", "properties": properties, "required": list(properties)}
