"""The demo's child processes: a daemon and an emulator on free ports of this machine, in one folder."""

import asyncio
import contextlib
import fcntl
import os
import random
import secrets
import shlex
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
from msgspec import Struct

from bridged.config_text import toml_value
from bridged.errors import BridgedError

_START_S: Final = 20.0
_END_S: Final = 20.0
_LONGEST_UNIX_PATH: Final = 100  # the kernel's limit is 108 with the NUL
_OURS: Final = (
    *("config.toml", "faults.json", "braze-faults.json"),
    *(f"{name}.db{ending}" for name in ("spool", "cohorts") for ending in ("", "-wal", "-shm", ".lock")),
)
_LOGS: Final = ("daemon.log", "emulator.log")

# What goes wrong at Mixpanel while the demo runs: two overloads, a slow answer, an answer that is lost after the events
# were stored. None of it may cost or double an event.
FAULTS: Final[tuple[dict[str, Any], ...]] = (
    {"after": 1, "times": 2, "status": 503},
    {"after": 2, "times": 1, "delay_s": 0.7},
    {"after": 4, "times": 1, "action": "reset_after_store"},
)
# Takes half a minute or more: after it bridged is careful, as Mixpanel's limit is one of a rolling minute.
RATE_LIMIT: Final[dict[str, Any]] = {"after": 9, "times": 1, "status": 429}


class DemoError(BridgedError):
    """The demo can't go on."""


class Addresses(Struct):
    """Where everything listens."""

    folder: Path
    emulator: str
    braze: str
    http: str
    admin: str
    streams: list[str]
    bearer_token: str
    config: Path


@contextlib.asynccontextmanager
async def running(
    folder: Path,
    faults: Sequence[dict[str, Any]] = FAULTS,
    braze_faults: Sequence[dict[str, Any]] = (),
    blocked: str = "",
) -> AsyncIterator[Addresses]:
    """Starts both, waits until they are ready; ends both, and nothing else, at the end. Raises DemoError.

    `folder` is absolute.
    """
    async with contextlib.AsyncExitStack() as stack:
        emulator_port, braze_port, http_port, stream_port, admin_port = _free_ports(5)
        addresses = Addresses(
            folder=folder,
            emulator=f"http://127.0.0.1:{emulator_port}",
            braze=f"http://127.0.0.1:{braze_port}",
            http=f"http://127.0.0.1:{http_port}",
            admin=f"http://127.0.0.1:{admin_port}",
            streams=[f"tcp:127.0.0.1:{stream_port}"],
            bearer_token=secrets.token_urlsafe(16),
            config=folder / "config.toml",
        )
        unix = folder / "bridged.sock"
        if len(str(unix).encode()) < _LONGEST_UNIX_PATH:
            addresses.streams.append(f"unix:{unix}")
        token = secrets.token_hex(16)
        try:
            _write(addresses, token, {"faults.json": faults, "braze-faults.json": braze_faults})
        except OSError as error:
            hint = "start it in a folder of yours; what another user's demo left there is in the way"
            raise DemoError(f"can't write the demo's files: {error}", hint) from error
        emulator = ["emulator", "--listen", f"127.0.0.1:{emulator_port}", "--token", token]
        emulator += ["--faults", str(folder / "faults.json"), "--braze-listen", f"127.0.0.1:{braze_port}"]
        emulator += ["--braze-rest-key", token, "--braze-faults", str(folder / "braze-faults.json")]
        emulator += ["--braze-blocked", blocked] if blocked else []
        await _start(stack, "emulator", emulator, folder, f"{addresses.emulator}/healthz")
        daemon = ["run", "--config", str(addresses.config)]
        await _start(stack, "daemon", daemon, folder, f"{addresses.admin}/readyz")
        yield addresses


def _write(addresses: Addresses, token: str, scripts: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """The files that the two are started with; what an earlier demo left is removed."""
    addresses.folder.mkdir(parents=True, exist_ok=True)
    _demand_free(addresses.folder)
    for name in (*_OURS, *_LOGS):
        (addresses.folder / name).unlink(missing_ok=True)
    for name, faults in scripts.items():
        (addresses.folder / name).write_bytes(msgspec.json.encode(faults))
    # It holds tokens, although nobody could use them for anything.
    with os.fdopen(
        os.open(addresses.config, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
    ) as file:
        file.write(_config(addresses, token))


def _demand_free(folder: Path) -> None:
    """Raises DemoError while the daemon of another demo is using the folder."""
    lock = folder / "spool.db.lock"
    if not lock.exists():
        return
    with lock.open("rb") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DemoError(
                f"another demo is running in {folder}",
                f"end it with Ctrl-C; if its terminal is gone, end what `pgrep -af {shlex.quote(str(folder))}` shows",
            ) from None


def _config(addresses: Addresses, token: str) -> str:
    streams = toml_value(tuple(addresses.streams))
    return f"""\
# The configuration of the demo's daemon.
[sources.http]
listen = "{addresses.http.removeprefix("http://")}"
bearer_token = "{addresses.bearer_token}"
[sources.stream]
listen = {streams}
[mixpanel]
url = "{addresses.emulator}"
token = "{token}"
[spool]
path = {toml_value(str(addresses.folder / "spool.db"))}
[cohorts]
enabled = true
username = "mixpanel"
password = "{addresses.bearer_token}"
path = {toml_value(str(addresses.folder / "cohorts.db"))}
[braze]
url = "{addresses.braze}"
rest_key = "{token}"
[admin]
listen = "{addresses.admin.removeprefix("http://")}"
"""


async def _start(stack: contextlib.AsyncExitStack, name: str, arguments: list[str], folder: Path, url: str) -> None:
    """Starts a child in a session of its own: Ctrl-C reaches the demo alone, and it ends its children in order."""
    path = folder / f"{name}.log"
    with path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "bridged", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(),
            start_new_session=True,
        )
    stack.push_async_callback(_end, process)
    try:
        async with asyncio.timeout(_START_S), aiohttp.ClientSession() as session:
            while process.returncode is None:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(url) as answer:
                        if answer.status == 200:
                            return
                await asyncio.sleep(0.05)
    except TimeoutError:
        pass
    tail = "\n  ".join(path.read_text(errors="replace").splitlines()[-5:])
    raise DemoError(f"the {name} didn't start:\n  {tail}", f"its log is {path}" if path.exists() else "")


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(_END_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def _environment() -> dict[str, str]:
    """Ours, without what would turn the demo into something else: settings of a real daemon, proxies, modules that lie in
    the working directory and are called like ours or Python's.
    """
    foreign = ("BRIDGED_", "CREDENTIALS_DIRECTORY")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(foreign) and not name.lower().endswith("_proxy")
    }
    paths = [environment.get("PYTHONPATH", "")]
    if (home := str(Path(__file__).parents[2])) == sys.path[0]:
        paths.insert(0, home)  # `python -m bridged` in a clone: we are found there, and nowhere else
    return environment | {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now; below those that the kernel gives to outgoing connections, so they stay free."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in ports:
                ports.append(port)
    return ports
