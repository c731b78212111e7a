"""`bridged check`: is the configuration good, and with --online, do Mixpanel and Braze take the credentials?

The online check posts one record that Mixpanel must refuse (it has no event name): a refusal of the record proves that
the credential is good, and nothing is stored.
"""

import argparse
import asyncio
import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bridged import certificates, config, event_rules, options
from bridged.commands import check_braze
from bridged.commands.printing import printable, size, table
from bridged.connections import unusable_authorities
from bridged.currents.table import EVENT_TYPES, MTU_EXEMPT
from bridged.delivery.probe import probe
from bridged.errors import ConfigError, UpstreamError
from bridged.mixpanel.mapping import derived_name, mixpanel_name, selected
from bridged.mixpanel.requests import API_SECRET_RETIRED
from bridged.presence import LINKED, no_file, other_names
from bridged.saved import read_for
from bridged.settings import Config
from bridged.sources.tls import server_context
from bridged.sources.unix import demand_possible

EPILOG = """\
exit codes: 0 good, 78 the configuration is bad, 69 Mixpanel or Braze can't be reached or refuses us (--online)

examples:
  bridged check
  bridged check --config /etc/bridged/config.toml --online
"""


_SQLITE: Final = b"SQLite format 3\0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument(
        "--online",
        action="store_true",
        help="also ask Mixpanel and Braze whether they take the credentials; nothing is stored",
    )


def main(arguments: argparse.Namespace) -> int:
    """Checks, and tells what the configuration amounts to."""
    path = config.find_config(arguments.config)
    settings = config.load(path)
    saved = read_for(settings)
    settings = saved.in_force(settings)
    where = str(path) if path else "the environment"
    if problems := list(_problems(settings)):
        raise ConfigError(f"{where}: " + "\n  ".join(problems))
    if settings.mixpanel.export and not config.has_credential(settings):
        hint = "or give it on the page: `bridged run` starts without"
        if "CREDENTIALS_DIRECTORY" not in os.environ:
            hint += f"; {config.WITH_SYSTEMD}"
        raise ConfigError(f"{where}: {config.NO_CREDENTIAL}", hint)
    print(f"{path or 'no file, only the environment and the defaults'}: good")
    print(table(_summary(settings)))
    if saved.values:
        print(f"saved on the page, over the configuration ({saved.path}): {', '.join(saved.values)}")
    if saved.problem:
        print(f"warning: {saved.problem}")
    about_files = (*_other_files(settings), *certificates.warnings(settings), *unusable_authorities())
    for warning in (*about_files, *_warnings(settings), *check_braze.warnings(settings)):
        print(f"warning: {warning}")
    if arguments.online and settings.mixpanel.export:
        print(f"online: {_online(settings)}")
    if arguments.online and settings.cohorts.enabled:
        print(f"online: {check_braze.online(settings)}")
    return 0


def _problems(settings: Config) -> Iterator[str]:
    """What can't work, or would end the start, besides what is wrong with a key."""
    yield from check_braze.problems(settings)
    yield from _missing_places(settings)


def _missing_places(settings: Config) -> Iterator[str]:
    """Folders that can't be had, and certificates that can't be used: `run` would end with them."""
    folders = {"spool.path": Path(settings.spool.path).parent}
    if settings.mixpanel.export and settings.retention.on_expiry == "archive":
        folders["retention.archive_path"] = Path(settings.retention.archive_path)
    if settings.cohorts.enabled:
        folders["cohorts.path"] = Path(settings.cohorts.path).parent
    files = {"spool.path": settings.spool.path} | (
        {"cohorts.path": settings.cohorts.path} if settings.cohorts.enabled else {}
    )
    for key, file in files.items():
        if kind := no_file(Path(file)):
            yield f"{key}: {file} is {kind}: name a file{' in it' if kind == 'a folder' else ''}"
    for key, folder in folders.items():
        # It is made when it is needed, with those above it.
        path = folder.absolute()
        there = next((place for place in (path, *path.parents) if os.path.lexists(place)), path)
        if not _may_be_folder(there):
            yield f"{key}: {there} is no folder"
    http, stream, admin = settings.sources.http, settings.sources.stream, settings.admin
    for address in settings.stream_addresses:
        kind, _, socket = address.partition(":")
        if kind == "unix" and not _may_be_folder(Path(socket).parent):
            yield f"sources.stream.listen: the folder of {socket} isn't there"
        elif kind == "unix":
            try:
                demand_possible(socket)
            except PermissionError:
                pass  # the daemon may be another user's
            except OSError as error:
                yield f"sources.stream.listen: {socket}: {error.strerror}"
    for section, door in (("sources.http", http), ("sources.stream", stream), ("admin", admin)):
        # systemd's are there only while the service runs.
        if door.listen and not door.tls_cert.startswith("/run/credentials/"):
            try:
                server_context(section, door.tls_cert, door.tls_key)
            except ConfigError as error:
                yield str(error.args[0])


def _may_be_folder(path: Path) -> bool:
    """Whether it is one, or we may not look: the daemon may be another user's."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        return isinstance(error, PermissionError)


def _summary(settings: Config) -> Iterator[list[str]]:
    target, mapping = options.target(settings), options.mapping_settings(settings)
    sources = settings.sources
    protected = "bearer token" if sources.http.bearer_token else "no token"
    yield ["http door", f"{sources.http.listen} ({protected})" if sources.http.listen else "closed"]
    yield ["stream door", " ".join(settings.stream_addresses) or "closed"]
    yield ["admin", settings.admin.listen or "closed"]
    yield from check_braze.summary(settings)
    if not settings.mixpanel.export:
        yield ["export", "off: no event is taken"]
        return
    yield ["Mixpanel", target.import_url.partition("?")[0]]
    yield ["credential", f"{target.credentials.kind} {_masked(settings)}"]
    chosen = [row for row in EVENT_TYPES if selected(row, mapping)]
    yield ["event types", f"{len(chosen)} of {len(EVENT_TYPES)} selected, naming = {settings.mixpanel.naming}"]
    yield ["others", f"unknown types: {settings.events.unknown}, anonymous users: {settings.events.anonymous}"]
    yield ["spool", f"{settings.spool.path}, at most {size(settings.spool.max_bytes)}"]
    yield ["alarms", "log, metrics, status" + (", webhook" if settings.alerts.webhook_url else "; no webhook")]
    yield ["retention", f"{settings.retention.max_age} while halted, then {settings.retention.on_expiry}"]


def _masked(settings: Config) -> str:
    """Enough of the credential to recognise it by."""
    mixpanel = settings.mixpanel
    if mixpanel.service_account:
        return f"{mixpanel.service_account}, project {mixpanel.project_id}"
    secret = mixpanel.api_secret or mixpanel.token
    return f"****{secret[-4:]}" if len(secret) >= 16 else "****"


def _other_files(settings: Config) -> Iterator[str]:
    """What stands at the spool's place and never was one, or was damaged in its first bytes."""
    path, head = Path(settings.spool.path), b""
    with contextlib.suppress(OSError):  # the daemon may be another user's
        if path.is_file():
            with path.open("rb") as file:
                head = file.read(len(_SQLITE))
        if links := other_names(path):
            yield f"spool.path: {path} has {links} hard link{'' if links == 1 else 's'} beside it: {LINKED}"
    if head and head != _SQLITE:
        yield f"spool.path: {path} is no spool: the start would rename it to {path}.corrupt-<time>, and begin an empty one"


def _warnings(settings: Config) -> Iterator[str]:
    if not settings.mixpanel.export:
        return
    mapping = options.mapping_settings(settings)
    if options.target(settings).credentials.kind == "API secret":
        yield f"Mixpanel retires API secrets on {API_SECRET_RETIRED}: create a service account"
    if not settings.mixpanel.token:
        yield "mixpanel.token is empty: events carry no `token` property, as those of Braze's connector do"
    if not settings.spool.max_dead_letters:
        yield "spool.max_dead_letters is 0: what can't be delivered is dropped at once, and counted"
    if not (settings.sources.http.listen or settings.sources.stream.listen):
        yield "both doors are closed: no event can come in"
    if not settings.mixpanel.partner_id:
        yield "mixpanel.partner_id is empty: Mixpanel counts all these users as monthly tracked users"
    chosen = [row for row in EVENT_TYPES if selected(row, mapping)]
    for name in event_rules.unknown_included(settings.events):
        yield f"events.include: {name} is in no table of event types: should Braze send it, all that it holds is forwarded"
    if not chosen:
        yield "no event type is selected: everything is skipped"
    yield from _shared_names(settings)
    exempt = {name.lower(): name for name in MTU_EXEMPT}
    # The rows whose own or given name is an exempt one but for its spelling.
    for row in chosen:
        name = mixpanel_name(row, mapping)
        meant = exempt.get(name.lower()) or exempt.get((row.seed_name or "").lower())
        if meant and name != meant:
            yield (
                f'{row.event_type} becomes "{name}", and Mixpanel exempts "{meant}" from monthly tracked users: to '
                f'have it exempt, set [events.names] "{row.event_type}" = "{meant}"'
            )


def _shared_names(settings: Config) -> Iterator[str]:
    """Types that a rename has made one: it may be meant."""
    mapping = options.mapping_settings(settings)
    named: dict[str, list[str]] = {}
    for row in EVENT_TYPES:
        if selected(row, mapping) and row.custom != "event":  # its events have names of their own
            named.setdefault(mixpanel_name(row, mapping), []).append(row.event_type)
    for name in event_rules.unknown_included(settings.events):
        if name not in settings.events.exclude:
            named.setdefault(settings.events.names.get(name) or derived_name(name), []).append(name)
    for name, types in named.items():
        if len(types) > 1:
            *others, last = types
            yield f'events.names: {", ".join(others)} and {last} have one name, "{name}": in Mixpanel they can\'t be told apart'


def _online(settings: Config) -> str:
    """What Mixpanel says. Raises UpstreamError when it isn't a yes, with what to do about it."""
    found = asyncio.run(probe(options.target(settings), float(settings.delivery.timeout)))
    if not found.ok:
        raise UpstreamError(printable(found.text), found.hint)
    return f"{printable(found.text)} ({found.hint})" if found.hint else printable(found.text)
