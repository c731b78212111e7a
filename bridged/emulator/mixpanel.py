"""The server: sockets and faults around a `Project`. Its own endpoints, beside Mixpanel's, are in `control.py`."""

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Final, Self

import msgspec
from aiohttp import web

from bridged.emulator import answers, control, mischief
from bridged.emulator.answers import Answer
from bridged.emulator.credentials import Credentials
from bridged.emulator.faults import Fault, Script, parse_faults
from bridged.emulator.project import Limits, Project
from bridged.emulator.reading import Call
from bridged.emulator.store import Summary
from bridged.errors import ListenError

_ENDPOINTS: Final = ("/import", "/track", "/engage", "/groups")


class EmulatorConfig(Limits, frozen=True, kw_only=True):
    """Where the emulator listens, whom it believes, what it bears and what goes wrong."""

    host: str = "127.0.0.1"
    port: int = 8490  # 0: any free one
    token: str = ""
    api_secret: str = ""
    service_account: str = ""
    service_secret: str = ""
    project_id: str = ""
    faults: list[Fault] = msgspec.field(default_factory=list)
    keep_events: bool = True  # False: count and deduplicate only


class MixpanelEmulator:
    """A Mixpanel on loopback, in the running loop: `async with MixpanelEmulator(config) as mixpanel: mixpanel.url`."""

    def __init__(self, config: EmulatorConfig | None = None) -> None:
        self.config = config or EmulatorConfig()
        self.url = ""  # known once it listens
        wanted = {key: getattr(self.config, key) for key in Credentials.__struct_fields__}
        self._project = Project(self.config, Credentials(**wanted), keep=self.config.keep_events)
        self._script = Script(parse_faults(self.config.faults))
        self._closing = asyncio.Event()  # ends every wait, so that closing never waits for a fault
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application()
        for path in _ENDPOINTS:
            app.router.add_route("*", path, self._serve)
            app.router.add_route("*", path + "/", self._serve)
        control.add_routes(app, self)
        app.router.add_route("*", "/{path:.*}", self._unknown)
        self._runner = web.AppRunner(
            app, access_log=None, auto_decompress=False, read_bufsize=1 << 20, shutdown_timeout=1.0
        )
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self.config.host, self.config.port, backlog=1024).start()
        except OSError as error:
            await self._runner.cleanup()
            raise ListenError(
                f"the emulator can't listen on --listen {self.config.host}:{self.config.port}", error
            ) from error
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        if self._runner:
            await self._runner.cleanup()

    def events(self) -> list[dict[str, Any]]:
        """Return the different events that were stored, as Mixpanel would show them."""
        return list(self._project.store.events())

    def profile_updates(self) -> list[dict[str, Any]]:
        """Return the updates of users and groups, as they came."""
        return list(self._project.profile_updates)

    def summary(self) -> Summary:
        """Return the counts."""
        return self._project.summary()

    def script(self, faults: Iterable[Fault | Mapping[str, Any]]) -> None:
        """Replace the script of faults, and start it from its beginning."""
        self._script = Script(parse_faults(list(faults)))

    def credentials(self, **changes: str) -> None:
        """Change what is accepted from now on; what is not named stays."""
        self._project.credentials = msgspec.structs.replace(self._project.credentials, **changes)

    @property
    def faults(self) -> list[Fault]:
        """The script in force."""
        return self._script.faults

    def stream(self) -> Iterator[bytes]:
        """Go through the different events as lines of NDJSON."""
        for event in self._project.store.events():
            yield msgspec.json.encode(event) + b"\n"

    def clear(self) -> None:
        """Forget events and counts; faults and credentials stay."""
        self._project.clear()

    async def _unknown(self, request: web.Request) -> web.StreamResponse:
        return self._respond(self._project.answer(Call(path=request.path), time.time()))

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        """One request to Mixpanel: meet its fault, if any, and be answered."""
        counts = self._project.counts
        counts.requests += 1
        counts.requests_now += 1
        counts.max_concurrent = max(counts.max_concurrent, counts.requests_now)
        fault = self._script.pick(request.path)
        try:
            try:
                call = await self._read(request)
            except (ConnectionError, web.RequestPayloadError):
                self._count("aborted")  # the client left before it had sent everything
                return web.Response()
            if fault is None:
                return self._respond(self._project.answer(call, time.time()))
            counts.faults += 1
            return await mischief.fail(
                *(request, fault, self._closing, lambda: self._project.answer(call, time.time()), answers.canned),
                *(self._count, self._respond),
            )
        finally:
            self._project.counts.requests_now -= 1

    async def _read(self, request: web.Request) -> Call:
        """Read the whole body, but keep only a little more than is allowed: the rest is let go by."""
        room = self.config.max_body_bytes + self.config.max_body_bytes // 100 + 1024
        size = 0
        chunks = []
        async for chunk in request.content.iter_any():
            size += len(chunk)
            if size - len(chunk) <= room:
                chunks.append(chunk)
        self._project.counts.bytes_received += size
        headers = request.headers
        return Call(
            path=request.path,
            method=request.method,
            query=request.query,
            # What did not fit is too large whatever its coding, so let it be judged as it came.
            content_encoding=headers.get("Content-Encoding", "") if size <= room else "",
            body=chunks[0] if len(chunks) == 1 else b"".join(chunks),
            authorization=headers.get("Authorization", ""),
            content_type=headers.get("Content-Type", ""),
        )

    def _respond(self, answer: Answer, headers: Mapping[str, str] | None = None) -> web.Response:
        self._count(str(answer.status))
        return web.Response(
            status=answer.status,
            body=answer.body,
            headers={**(headers or {}), "Content-Type": answer.content_type},
        )

    def _count(self, answer: str) -> None:
        answers_so_far = self._project.counts.answers
        answers_so_far[answer] = answers_so_far.get(answer, 0) + 1
