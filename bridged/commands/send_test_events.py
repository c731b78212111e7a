"""`bridged send-test-events`: one example event per selected type to the daemon's HTTP door, as Braze's page does."""

import argparse
import random
import time

import msgspec

from bridged import config, options
from bridged.commands.client import ANOTHER_TOKEN, Daemon
from bridged.currents.examples import example_event
from bridged.currents.table import EVENT_TYPES, EventType
from bridged.errors import ConfigError, UpstreamError
from bridged.mixpanel.mapping import mixpanel_name, selected
from bridged.saved import read_for
from bridged.settings import Config
from bridged.sources.http import PATH

EPILOG = """\
The events are made up (people at example.com) and go all the way to Mixpanel: look for them in its Live View.

examples:
  bridged send-test-events
  bridged send-test-events --types users.behaviors.CustomEvent users.messages.email.Send
"""

_SECRETS = (("sources", "http", "bearer_token"),)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("--types", nargs="+", metavar="TYPE", default=[], help="only these (Currents' names)")
    parser.add_argument("--list", action="store_true", help="print the selected types, send nothing")


def main(arguments: argparse.Namespace) -> int:
    """Sends them in one request, as Braze does."""
    configured = config.load(config.find_config(arguments.config), secrets=_SECRETS)
    settings = read_for(configured).in_force(configured, complete=False)
    rows = _wanted(settings, arguments.types)
    if arguments.list:
        mapping = options.mapping_settings(settings)
        for row in rows:
            print(f"{row.event_type}  {mixpanel_name(row, mapping)}")
        return 0
    http = settings.sources.http
    if not http.listen:
        raise ConfigError("sources.http.listen is empty: test events go through the HTTP door", "open it")
    now_s, rng = int(time.time()), random.Random()
    events = [example_event(row, rng, now_s, every_property=True) for row in rows]
    door = Daemon(http.listen, http.bearer_token, "[sources.http] listen", http.tls_cert)
    answer = door.call("POST", PATH, {"events": events})
    if answer.status != 200:
        hint = ANOTHER_TOKEN if answer.status == 401 else "see `bridged status`"
        raise UpstreamError(f"the door answered {answer.status}: {_said(answer.body)}", hint)
    print(f"{len(events)} events accepted, one of each selected type; `bridged status` tells what becomes of them")
    return 0


def _wanted(settings: Config, names: list[str]) -> list[EventType]:
    """The selected types, or those of them that were named. Raises ConfigError."""
    mapping = options.mapping_settings(settings)
    chosen = {row.event_type: row for row in EVENT_TYPES if selected(row, mapping)}
    if not chosen:
        raise ConfigError("no event type is selected", "see [events]")
    for name in names:
        if name not in chosen:
            raise ConfigError(f"{name!r} is not a selected event type", "`bridged send-test-events --list` names them")
    return [chosen[name] for name in dict.fromkeys(names)] if names else list(chosen.values())


def _said(body: bytes) -> str:
    try:
        return str(msgspec.json.decode(body, type=dict[str, object]).get("error", ""))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body[:200].decode(errors="replace")
