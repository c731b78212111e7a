"""Does Mixpanel take a credential? Asked with one record that it must refuse, so that nothing is stored.

The record has no event name: a refusal of the record proves that the credential is good, and whoever takes it isn't Mixpanel.
For `bridged check --online` and the page's "Test connection", which tell what is wrong in the same words.
"""

import os
from datetime import UTC, datetime
from typing import Final, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from bridged.connections import unusable_authorities
from bridged.delivery.transport import CLOSED_IN_HANDSHAKE, Transport
from bridged.errors import ConfigError
from bridged.mixpanel.requests import HOSTS, Region, Target
from bridged.mixpanel.verdicts import Delivered, Halt, Reject, Retry, Split, Verdict

_TIMEOUT_S: Final = 15.0
_IN_THE_WAY: Final = "is a proxy or portal in the way? check [mixpanel] url and region"
# Mixpanel refuses what is an hour ahead; from a few minutes on somebody should look.
_SKEWED_S: Final = 300.0

Problem = Literal["", "credential", "project", "region", "network", "clock", "busy", "upstream", "settings"]


class Finding(Struct, kw_only=True):
    """What came of it. `hint` says what to do."""

    ok: bool
    problem: Problem
    text: str
    hint: str = ""
    region: Region | None = None  # where it would work
    clock_skew_s: float | None = None  # our wall clock less Mixpanel's; None: not known


async def probe(target: Target, timeout_s: float = 0.0) -> Finding:
    """Asks, and says what is wrong if something is. Never raises but for cancellation; takes up to a minute at worst."""
    if not target.credentials.given:
        return Finding(
            ok=False,
            problem="settings",
            text="no credential is given",
            hint="a service account is best: see its three fields",
        )
    try:
        verdict, skew_s = await _ask(target, timeout_s)
    except ConfigError as error:
        return Finding(ok=False, problem="network", text=str(error.args[0]), hint=error.hint)
    found = await _judged(target, verdict, timeout_s)
    found.clock_skew_s = None if skew_s is None else round(skew_s, 1)
    if found.ok and skew_s is not None and abs(skew_s) > _SKEWED_S:
        way = "ahead" if skew_s > 0 else "behind"
        found.problem = "clock"
        found.text += f"; but this machine's clock is {abs(skew_s) / 60:.0f} minutes {way} of Mixpanel's"
        found.hint = "set the clock, by NTP: Mixpanel refuses events from the future"
    return found


async def _judged(target: Target, verdict: Verdict, timeout_s: float) -> Finding:
    match verdict:
        case Reject():
            return Finding(
                ok=True, problem="", text=f"Mixpanel takes the {target.credentials.kind}; nothing was stored"
            )
        case Delivered():
            return Finding(
                ok=False,
                problem="upstream",
                text="what answers isn't Mixpanel: it took an event without a name, which Mixpanel refuses",
                hint=_IN_THE_WAY,
            )
        case Halt():
            # The reason begins with the status, if there was one.
            said = f"Mixpanel refuses us{', HTTP' if verdict.status else ':'} {verdict.reason}"
            if verdict.status != 401:
                return Finding(ok=False, problem="project" if verdict.status == 404 else "credential", text=said)
            return await _refused(target, said, timeout_s)
        case Retry():
            said = f"Mixpanel can't be asked: {verdict.reason}"
            problem, hint = _unreachable(target, verdict)
            return Finding(ok=False, problem=problem, text=said, hint=hint)
        case Split():
            return Finding(
                ok=False,
                problem="upstream",
                text=f"what answers doesn't answer as Mixpanel does: {verdict.reason}",
                hint=_IN_THE_WAY,
            )


async def _refused(target: Target, said: str, timeout_s: float) -> Finding:
    """Why a 401, as far as can be found out: by asking the other regions, too, unless the address is given."""
    credentials = target.credentials
    for region in HOSTS if not target.url else ():
        other = msgspec.structs.replace(target, region=region)
        if region != target.region and isinstance((await _ask(other, timeout_s))[0], Reject):
            hint = f'Mixpanel takes it in another region, where the project lives: set [mixpanel] region = "{region}"'
            return Finding(ok=False, problem="region", text=said, hint=hint, region=region)
    match credentials.kind:
        case "service account":
            # Whether the name, the secret or the project is wrong, Mixpanel doesn't tell.
            hint = (
                "the service account's user name or secret is wrong, or it has expired, or it is not Admin or Owner of "
                f"project {credentials.project_id}: see Settings > Project settings > Service accounts"
            )
        case "API secret":
            hint = (
                f"no project of region {target.region!r} has this API secret: see Settings > Project settings > Overview, "
                "or better, create a service account"
            )
        case _:
            hint = f"no project of region {target.region!r} has this token: see Settings > Project settings > Overview"
    return Finding(ok=False, problem="credential", text=said, hint=hint)


def _unreachable(target: Target, verdict: Retry) -> tuple[Problem, str]:
    """What to do about a network that doesn't lead to Mixpanel."""
    host = urlsplit(target.import_url).hostname
    if verdict.kind == "rate":
        return "busy", "it is there, and busy with this project: try again in a minute"
    if verdict.kind == "server":
        return (
            "upstream",
            "something answers, but it isn't well, or isn't Mixpanel: try again; is a proxy or portal in the way?",
        )
    if "DNS" in verdict.reason and f" {host}:" not in verdict.reason:
        return "network", "this machine can't find the proxy in HTTPS_PROXY or HTTP_PROXY: is its name right?"
    for sign, advice in _NETWORK:
        if sign in verdict.reason:
            return "network", advice.format(host=host, now=f"{datetime.now(UTC):%Y-%m-%d %H:%M}", trusted=_trusted())
    return "network", "try again; check the network and any proxy"


def _trusted() -> str:
    """What to do about an authority that isn't known."""
    if unusable := next(unusable_authorities(), ""):
        return unusable
    if file := os.environ.get("SSL_CERT_FILE"):
        return f"if a proxy here inspects TLS, its authority is not in SSL_CERT_FILE ({file}); if none does, stop"
    return "if a proxy here inspects TLS, name its authority in SSL_CERT_FILE; if none does, stop"


_OLD_TLS: Final = (
    "{host} speaks no TLS that is safe, as Mixpanel does (1.2, 1.3): is a proxy in the way that inspects TLS?"
)
# By a part of the transport's words, the first that is there.
_NETWORK: Final = (
    ("speak HTTP", "something answers at {host} that is no web server: is it the right port, and http:// or https://?"),
    ("DNS", "this machine can't find {host}: is it on a network, and does its DNS work?"),
    ("roxy", "the proxy in HTTPS_PROXY or HTTP_PROXY doesn't let us through: is its address right, and is it running?"),
    (
        "certificate has expired",
        "the certificate of {host} has ended by this machine's clock ({now} UTC): is it right? then it has to be renewed there",
    ),
    (
        "certificate is not yet valid",
        "the certificate of {host} isn't valid yet by this machine's clock ({now} UTC): is it right? set it by NTP",
    ),
    ("PROTOCOL_VERSION", _OLD_TLS),  # it says so of ours
    ("UNSUPPORTED_PROTOCOL", _OLD_TLS),  # and we of the one that it chose
    (
        CLOSED_IN_HANDSHAKE,
        "{host} hangs up when TLS begins: does it speak TLS 1.2 or newer, is it the right port, or is a proxy in the way?",
    ),
    ("ertificate", "{host} can't prove to be it: {trusted}"),
    (
        "ClientConnectorSSLError",
        "{host} answers, and speaks no TLS: is http:// meant, or another port, or is a proxy in the way?",
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


async def _ask(target: Target, timeout_s: float) -> tuple[Verdict, float | None]:
    """The verdict, and how far our clock is from Mixpanel's. Raises ConfigError for a proxy that can't be used."""
    async with Transport(target, min(timeout_s or _TIMEOUT_S, _TIMEOUT_S)) as transport:
        return await transport.ask(), transport.clock_skew_s
