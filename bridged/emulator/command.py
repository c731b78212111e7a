"""`bridged emulator`: the emulator as a process of its own."""

import argparse
import asyncio
import contextlib
import gc
import signal
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from bridged.emulator.braze import TRACK, BrazeConfig, BrazeEmulator
from bridged.emulator.faults import Fault, parse_faults
from bridged.emulator.mixpanel import EmulatorConfig, MixpanelEmulator
from bridged.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    default = EmulatorConfig()
    add = parser.add_argument
    add(
        "--listen",
        metavar="HOST:PORT",
        default=f"{default.host}:{default.port}",
        help="default %(default)s; port 0: any",
    )
    add("--faults", metavar="FILE", type=Path, help="a script of faults, JSON or TOML")
    add("--token", default="", help="the project's token; without any credential every well-formed one is accepted")
    add("--api-secret", default="", help="the project's API secret")
    add(
        "--service-account",
        metavar="USER:SECRET",
        default="",
        help="a service account; requests must name a project_id",
    )
    add("--project-id", default="", help="the only project_id that is accepted")
    add("--max-events-per-minute", type=_positive, default=default.max_events_per_minute, help="default %(default)s")
    add("--max-bytes-per-minute", type=_positive, default=default.max_bytes_per_minute, help="default %(default)s")
    add("--max-body-bytes", type=_positive, default=default.max_body_bytes, help="default %(default)s")
    add("--no-keep", action="store_true", help="count and deduplicate events, but don't keep them")
    braze = parser.add_argument_group("Braze", "a second server that plays Braze's side of the cohorts").add_argument
    braze("--braze-listen", metavar="HOST:PORT", default="", help="without it there is no Braze; port 0: any")
    braze("--braze-rest-key", metavar="KEY", default="", help="the only REST key; without it any is accepted")
    braze("--braze-partner-key", metavar="KEY", default="", help="the partner key of the partner endpoints")
    braze("--braze-import-key", metavar="KEY", default="", help="the workspace's data import key")
    braze("--braze-users", metavar="FILE", type=Path, help="the external ids that exist, one a line; without it all do")
    braze(
        "--braze-blocked", metavar="ID", action="append", default=[], help="an external id that is refused, repeatable"
    )
    braze("--braze-faults", metavar="FILE", type=Path, help="a script of faults, as --faults; `path` is /users/track")
    braze("--braze-requests", metavar="N", type=_positive, default=3000, help="in 3 s, then 429; default %(default)s")
    braze(
        "--braze-unordered",
        metavar="SECONDS",
        type=float,
        default=0.0,
        help="carry requests out within so long, in any order",
    )


def main(args: argparse.Namespace) -> int:
    """Run until SIGTERM or SIGINT."""
    host, port = _address(args.listen)
    account, colon, secret = args.service_account.partition(":")
    if args.service_account and not (account and colon and secret):
        raise ConfigError("--service-account must be USER:SECRET")
    config = EmulatorConfig(
        host=host,
        port=port,
        token=args.token,
        api_secret=args.api_secret,
        service_account=account,
        service_secret=secret,
        project_id=args.project_id,
        max_events_per_minute=args.max_events_per_minute,
        max_bytes_per_minute=args.max_bytes_per_minute,
        max_body_bytes=args.max_body_bytes,
        faults=read_faults(args.faults) if args.faults else [],
        keep_events=not args.no_keep,
    )
    braze = _braze_config(args) if args.braze_listen else None
    # Events make no cycles and stay for good: looking for garbage among millions of them finds nothing.
    gc.freeze()
    gc.set_threshold(100_000, 50, 1000)
    uvloop.run(_run(config, braze))
    return 0


def read_faults(path: Path, default_path: str = "") -> list[Fault]:
    """Read a script of faults from a file; `default_path` is that of a fault which names none."""
    try:
        text = path.read_bytes()
        data: Any = tomllib.loads(text.decode()) if path.suffix == ".toml" else msgspec.json.decode(text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (ValueError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: {error}", "a file that is not called *.toml is read as JSON") from error
    return parse_faults(data, f"{path}: faults", default_path)


def _braze_config(args: argparse.Namespace) -> BrazeConfig:
    host, port = _address(args.braze_listen, "--braze-listen")
    try:
        users = args.braze_users.read_text(encoding="utf-8").splitlines() if args.braze_users else None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--braze-users {args.braze_users}: {error}", "one external id a line, in UTF-8") from error
    return BrazeConfig(
        host=host,
        port=port,
        rest_key=args.braze_rest_key,
        partner_key=args.braze_partner_key,
        data_import_key=args.braze_import_key,
        users=users,
        blocked=args.braze_blocked,
        faults=read_faults(args.braze_faults, TRACK) if args.braze_faults else [],
        max_requests=args.braze_requests,
        unordered_s=args.braze_unordered,
    )


async def _run(config: EmulatorConfig, braze: BrazeConfig | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as running:
        mixpanel = await running.enter_async_context(MixpanelEmulator(config))
        print(f"bridged emulator listens on {mixpanel.url}", flush=True)
        if braze:
            print(
                f"bridged emulator listens as Braze on {(await running.enter_async_context(BrazeEmulator(braze))).url}",
                flush=True,
            )
        await stop.wait()


def _address(text: str, option: str = "--listen") -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{option} must be HOST:PORT, not {text!r}")
    return host.strip("[]") or "127.0.0.1", int(port)


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
