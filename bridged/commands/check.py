"""`bridged check`: is the configuration good, and with --online, do Mixpanel and Braze take the credentials?

The online check posts one record that Mixpanel must refuse (it has no event name): a refusal of the record proves that
the credential is good, and nothing is stored.
"""

import argparse
import asyncio
import difflib
import secrets
import time
from collections.abc import Iterator
from typing import Final
from urllib.parse import urlsplit

import msgspec
from isal import igzip

from bridged import app, config
from bridged.commands import check_braze
from bridged.commands.printing import printable, size, table
from bridged.config import with_credentials
from bridged.currents.table import EVENT_TYPES, MTU_EXEMPT
from bridged.delivery.transport import Transport
from bridged.errors import ConfigError, UpstreamError
from bridged.mixpanel.mapping import mixpanel_name, selected
from bridged.mixpanel.requests import API_SECRET_RETIRED, HOSTS
from bridged.mixpanel.verdicts import Delivered, Halt, Reject, Retry, Split, Verdict
from bridged.settings import Config

EPILOG = """\
exit codes: 0 good, 78 the configuration is bad, 69 Mixpanel or Braze can't be reached or refuses us (--online)

examples:
  bridged check
  bridged check --config /etc/bridged/config.toml --online
"""


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
    where = str(path) if path else "the environment"
    if problems := list(_problems(settings)):
        raise ConfigError(f"{where}: " + "\n  ".join(problems), "`bridged send-test-events --list` names the types")
    print(f"{path or 'no file, only the environment and the defaults'}: good")
    print(table(_summary(settings)))
    for warning in (*_warnings(settings), *check_braze.warnings(settings)):
        print(f"warning: {warning}")
    if arguments.online and settings.mixpanel.export:
        print(f"online: {_online(settings)}")
    if arguments.online and settings.cohorts.enabled:
        print(f"online: {check_braze.online(settings)}")
    return 0


def _problems(settings: Config) -> Iterator[str]:
    """Names of event types that don't exist. An unknown type may be included by name: then it is meant."""
    known = [row.event_type for row in EVENT_TYPES]
    events = settings.events
    for key, names in (("include", events.include), ("exclude", events.exclude), ("names", tuple(events.names))):
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                yield f"events.{key}: no event type {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _summary(settings: Config) -> Iterator[list[str]]:
    target, mapping = app.target(settings), app.mapping_settings(settings)
    sources = settings.sources
    protected = "bearer token" if sources.http.bearer_token else "no token"
    yield ["http door", f"{sources.http.listen} ({protected})" if sources.http.listen else "closed"]
    yield ["stream door", " ".join(sources.stream.listen) or "closed"]
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


def _warnings(settings: Config) -> Iterator[str]:
    if not settings.mixpanel.export:
        return
    mapping = app.mapping_settings(settings)
    if app.target(settings).credentials.kind == "API secret":
        yield f"Mixpanel retires API secrets on {API_SECRET_RETIRED}: create a service account"
    if not settings.mixpanel.token:
        yield "mixpanel.token is empty: events carry no `token` property, as those of Braze's connector do"
    if not (settings.sources.http.listen or settings.sources.stream.listen):
        yield "both doors are closed: no event can come in"
    if not settings.mixpanel.partner_id:
        yield "mixpanel.partner_id is empty: Mixpanel counts all these users as monthly tracked users"
    chosen = [row for row in EVENT_TYPES if selected(row, mapping)]
    if not chosen:
        yield "no event type is selected: everything is skipped"
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


def _online(settings: Config) -> str:
    """What Mixpanel says. Raises UpstreamError when it isn't a yes, with what to do about it."""
    verdict = asyncio.run(_ask(settings))
    kind = app.target(settings).credentials.kind
    if isinstance(verdict, Halt):
        raise UpstreamError(
            f"Mixpanel refuses us, HTTP {verdict.status}: {printable(verdict.reason)}",
            _refused(settings) if verdict.status == 401 else "",
        )
    if isinstance(verdict, Retry):
        raise UpstreamError(f"Mixpanel can't be asked: {printable(verdict.reason)}", _unreachable(settings, verdict))
    if isinstance(verdict, Split):
        raise UpstreamError(
            f"what answers doesn't answer as Mixpanel does: {printable(verdict.reason)}",
            "is a proxy or portal in the way? check [mixpanel] url and region",
        )
    return f"Mixpanel takes the {kind}; nothing was stored"


def _refused(settings: Config) -> str:
    """Why a 401, as far as can be found out: by asking the other regions, too, unless the address is given."""
    mixpanel = settings.mixpanel
    for region in HOSTS if not mixpanel.url else ():
        other = with_credentials(settings, {"region": region})
        if region != mixpanel.region and isinstance(asyncio.run(_ask(other)), Reject | Delivered):
            return f'Mixpanel takes it in another region, where the project lives: set [mixpanel] region = "{region}"'
    match app.target(settings).credentials.kind:
        case "service account":
            return (
                "the service account's user name or secret is wrong, or it has expired, or it is not Admin or Owner of "
                f"project {mixpanel.project_id}: see Settings > Project settings > Service accounts"
            )
        case "API secret":
            return (
                f"no project of region {mixpanel.region!r} has this API secret: see Settings > Project settings > Overview, "
                "or better, create a service account"
            )
    return f"no project of region {mixpanel.region!r} has this token: see Settings > Project settings > Overview"


def _unreachable(settings: Config, verdict: Retry) -> str:
    """What to do about a network that doesn't lead to Mixpanel."""
    host = urlsplit(app.target(settings).import_url).hostname
    if verdict.kind == "rate":
        return "it is there, and busy with this project: try again in a minute"
    if verdict.kind == "server":
        return "something answers, but it isn't well, or isn't Mixpanel: try again; is a proxy or portal in the way?"
    for sign, advice in _NETWORK:
        if sign in verdict.reason:
            return advice.format(host=host)
    return "try again; check the network and any proxy"


# By a part of the transport's words, the first that is there.
_NETWORK: Final = (
    ("DNS", "this machine can't find {host}: is it on a network, and does its DNS work?"),
    ("roxy", "the proxy in HTTPS_PROXY or HTTP_PROXY doesn't let us through: is its address right, and is it running?"),
    (
        "ertificate",
        "{host} can't prove to be it: if a proxy here inspects TLS, name its authority in SSL_CERT_FILE; if none does, stop",
    ),
    (
        "no connection",
        "nobody answers at {host}: does a firewall let this machine out? set HTTPS_PROXY if it needs a proxy",
    ),
    (
        "ClientConnectorError",
        "{host} can't be connected to: does a firewall let this machine out? set HTTPS_PROXY if it needs a proxy",
    ),
    ("no answer", "{host} takes the connection and says nothing: try again; is a proxy or firewall in the way?"),
)


async def _ask(settings: Config) -> Verdict:
    insert_id = f"bridged-check-{secrets.token_hex(8)}"
    properties: dict[str, object] = {"time": int(time.time()), "distinct_id": "bridged-check", "$insert_id": insert_id}
    if settings.mixpanel.token:
        properties["token"] = settings.mixpanel.token
    record = msgspec.json.encode({"event": "", "properties": properties}) + b"\n"
    timeout_s = min(float(settings.delivery.timeout) or 15.0, 15.0)
    async with Transport(app.target(settings), timeout_s) as transport:
        return await transport.send(igzip.compress(record, 1), 1, lambda: [insert_id])
