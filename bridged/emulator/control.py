"""The emulator's own endpoints, beside Mixpanel's.

GET    /healthz                 200 once it listens
GET    /emulator/summary        the counts, as JSON
GET    /emulator/events         the different events as Mixpanel would show them, as NDJSON
GET    /emulator/faults         the script in force
POST   /emulator/faults         replaces the script
DELETE /emulator/faults         ends it
POST   /emulator/credentials    changes what is accepted, key by key
POST   /emulator/clear          forgets events and counts

Braze's has, instead of the events:

GET    /emulator/users          every user that was written, as NDJSON: attributes, and how often
POST   /emulator/users          a JSON list of external ids: from now on these exist, and no others
GET    /emulator/cohorts        the cohorts of the partner endpoints, as NDJSON
POST   /emulator/locked         a JSON list of cohort ids: these are 423
"""

from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

import msgspec
from aiohttp import web

from bridged.emulator.credentials import Credentials
from bridged.errors import BridgedError, ConfigError

if TYPE_CHECKING:
    from bridged.emulator.braze import BrazeEmulator
    from bridged.emulator.mixpanel import MixpanelEmulator

_CHUNK_BYTES: Final = 1 << 20


def add_routes(
    app: web.Application,
    emulator: "MixpanelEmulator | BrazeEmulator",
    stream_path: str = "/emulator/events",
    credentials: type[msgspec.Struct] = Credentials,
) -> None:
    """Give the application the emulator's own endpoints. `credentials` are the names that can be changed."""

    async def health(request: web.Request) -> web.StreamResponse:
        return _json({"status": "ok"})

    async def summary(request: web.Request) -> web.StreamResponse:
        return _json(emulator.summary())

    async def stream(request: web.Request) -> web.StreamResponse:
        return await _ndjson(request, emulator.stream())

    async def get_faults(request: web.Request) -> web.StreamResponse:
        return _json(emulator.faults)

    async def post_faults(request: web.Request) -> web.StreamResponse:
        script: Any = await _body(request)
        emulator.script(script)
        return _json(emulator.faults)

    async def delete_faults(request: web.Request) -> web.StreamResponse:
        emulator.script([])
        return _json(emulator.faults)

    async def post_credentials(request: web.Request) -> web.StreamResponse:
        changes: Any = await _body(request)
        try:
            msgspec.convert(changes, credentials)  # the names and the types
        except msgspec.ValidationError as error:
            raise ConfigError(
                f"credentials: {error}", f"the keys are {', '.join(credentials.__struct_fields__)}"
            ) from error
        emulator.credentials(**changes)
        return _json({"status": "ok"})

    async def clear(request: web.Request) -> web.StreamResponse:
        emulator.clear()
        return _json({"status": "ok"})

    app.router.add_get("/healthz", health)
    app.router.add_get("/emulator/summary", summary)
    app.router.add_get(stream_path, stream)
    app.router.add_get("/emulator/faults", get_faults)
    app.router.add_post("/emulator/faults", _checked(post_faults))
    app.router.add_delete("/emulator/faults", delete_faults)
    app.router.add_post("/emulator/credentials", _checked(post_credentials))
    app.router.add_post("/emulator/clear", clear)


def add_workspace_routes(app: web.Application, emulator: "BrazeEmulator") -> None:
    """Give the application what only Braze's emulator has."""

    async def cohorts(request: web.Request) -> web.StreamResponse:
        return await _ndjson(request, (msgspec.json.encode(each) + b"\n" for each in emulator.workspace.cohorts()))

    async def post_users(request: web.Request) -> web.StreamResponse:
        emulator.workspace.existing = set(await _names(request))
        return _json({"status": "ok"})

    async def post_locked(request: web.Request) -> web.StreamResponse:
        emulator.workspace.locked = set(await _names(request))
        return _json({"status": "ok"})

    app.router.add_get("/emulator/cohorts", cohorts)
    app.router.add_post("/emulator/users", _checked(post_users))
    app.router.add_post("/emulator/locked", _checked(post_locked))


_Endpoint = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _checked(endpoint: _Endpoint) -> _Endpoint:
    async def checked(request: web.Request) -> web.StreamResponse:
        try:
            return await endpoint(request)
        except BridgedError as error:
            return _json({"error": str(error.args[0]), "hint": error.hint}, status=400)

    return checked


async def _ndjson(request: web.Request, lines: Iterable[bytes]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    chunk = bytearray()
    for line in lines:
        chunk += line
        if len(chunk) >= _CHUNK_BYTES:
            await response.write(bytes(chunk))
            chunk.clear()
    await response.write(bytes(chunk))
    await response.write_eof()
    return response


async def _names(request: web.Request) -> list[str]:
    names = await _body(request)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError("the body must be a JSON list of strings")
    return names


async def _body(request: web.Request) -> Any:
    try:
        return msgspec.json.decode(await request.read())
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the body is not JSON: {error}") from error


def _json(body: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(body), content_type="application/json")
