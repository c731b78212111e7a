"""A Braze on loopback: sockets and faults around a `Workspace`. Its own endpoints, beside Braze's, are in `control.py`."""

import asyncio
import contextlib
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Self

import msgspec
from aiohttp import web

from bridged.emulator import control, mischief
from bridged.emulator.answers import Answer
from bridged.emulator.faults import Fault, Script, parse_faults
from bridged.emulator.reading import Call
from bridged.emulator.workspace import (
    MAX_BODY_BYTES,
    Workspace,
    WorkspaceKeys,
    WorkspaceLimits,
    WorkspaceSummary,
    said,
)
from bridged.errors import ListenError

TRACK: Final = "/users/track"


class BrazeConfig(WorkspaceLimits, frozen=True, kw_only=True):
    """Where the emulator listens, whom it believes, who exists and what goes wrong."""

    host: str = "127.0.0.1"
    port: int = 8491  # 0: any free one
    rest_key: str = ""
    forbidden_key: str = ""
    partner_name: str = ""
    partner_key: str = ""
    data_import_key: str = ""
    users: list[str] | None = None  # the external ids that exist; None: all do
    blocked: list[str] = msgspec.field(default_factory=list)
    faults: list[Fault] = msgspec.field(default_factory=list)
    unordered_s: float = 0.0
    """Each request is carried out at a random moment within so many seconds, then answered: what is sent at the same time
    comes about in any order, as Braze says of its own."""


class BrazeEmulator:
    """In the running loop: `async with BrazeEmulator(config) as braze: braze.url`."""

    def __init__(self, config: BrazeConfig | None = None) -> None:
        self.config = config or BrazeConfig()
        self.url = ""  # known once it listens
        wanted = {key: getattr(self.config, key) for key in WorkspaceKeys.__struct_fields__}
        self.workspace = Workspace(self.config, WorkspaceKeys(**wanted))
        self.workspace.existing = None if self.config.users is None else set(self.config.users)
        self.workspace.blocked = set(self.config.blocked)
        self._script = Script(parse_faults(self.config.faults, default_path=TRACK))
        self._closing = asyncio.Event()  # ends every wait, so that closing never waits for a fault
        self._dice = random.Random(0)
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=2 * MAX_BODY_BYTES)
        control.add_routes(app, self, stream_path="/emulator/users", credentials=WorkspaceKeys)
        control.add_workspace_routes(app, self)
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self.config.host, self.config.port, backlog=1024).start()
        except OSError as error:
            await self._runner.cleanup()
            raise ListenError(
                f"the emulator can't listen on --braze-listen {self.config.host}:{self.config.port}", error
            ) from error
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._closing.set()
        if self._runner:
            await self._runner.cleanup()

    def users(self) -> list[dict[str, Any]]:
        """Every user that was written."""
        return list(self.workspace.users())

    def cohorts(self) -> list[dict[str, Any]]:
        """The cohorts of the partner endpoints."""
        return list(self.workspace.cohorts())

    def membership(self, attribute: str) -> dict[str, set[str]]:
        """By external id: what an array attribute holds. Users without it are not in it."""
        return {str(user): set(value) for user, value in self.workspace.holding(attribute).items()}

    def summary(self) -> WorkspaceSummary:
        """Return the counts."""
        return self.workspace.summary()

    def script(self, faults: Iterable[Fault | Mapping[str, Any]]) -> None:
        """Replace the script of faults, and start it from its beginning. A fault without a `path` means /users/track."""
        self._script = Script(parse_faults(list(faults), default_path=TRACK))

    def credentials(self, **changes: str) -> None:
        """Change what is accepted from now on; what is not named stays."""
        self.workspace.keys = msgspec.structs.replace(self.workspace.keys, **changes)

    @property
    def faults(self) -> list[Fault]:
        """The script in force."""
        return self._script.faults

    def stream(self) -> Iterator[bytes]:
        """Go through the users as lines of NDJSON."""
        for user in self.workspace.users():
            yield msgspec.json.encode(user) + b"\n"

    def clear(self) -> None:
        """Forget what was written and counted; faults, keys and who exists stay."""
        self.workspace.clear()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        """One request to Braze: meet its fault, if any, and be answered."""
        counts = self.workspace.counts
        counts.requests += 1
        counts.requests_now += 1
        counts.max_concurrent = max(counts.max_concurrent, counts.requests_now)
        fault = self._script.pick(request.path)
        try:
            try:
                body = await request.read()
            except web.HTTPRequestEntityTooLarge:
                return self._respond(said(413, "Request Entity Too Large"))
            except (ConnectionError, web.RequestPayloadError):
                self._count("aborted")  # the client left before it had sent everything
                return web.Response()
            call = Call(
                path=request.path,
                method=request.method,
                body=body,
                authorization=request.headers.get("Authorization", ""),
                content_type=request.headers.get("Content-Type", ""),
            )
            await self._wait_for_its_turn(call)
            if fault is None:
                return self._respond(self._answer(call))
            counts.faults += 1
            return await mischief.fail(
                *(request, fault, self._closing, lambda: self._answer(call), said, self._count, self._respond)
            )
        finally:
            self.workspace.counts.requests_now -= 1

    async def _wait_for_its_turn(self, call: Call) -> None:
        if not self.config.unordered_s:
            return
        users = self.workspace.named(call)
        self.workspace.begin(users)
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), self._dice.uniform(0.0, self.config.unordered_s))
        finally:
            self.workspace.end(users)

    def _answer(self, call: Call) -> Answer:
        return self.workspace.answer(call, time.time())

    def _respond(self, answer: Answer, headers: Mapping[str, str] | None = None) -> web.Response:
        self._count(str(answer.status))
        every = {**answer.headers, **(headers or {}), "Content-Type": answer.content_type}
        return web.Response(status=answer.status, body=answer.body, headers=every)

    def _count(self, answer: str) -> None:
        answers_so_far = self.workspace.counts.answers
        answers_so_far[answer] = answers_so_far.get(answer, 0) + 1
