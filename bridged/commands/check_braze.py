"""The part of `bridged check` that is about cohorts: what the configuration amounts to, and whether Braze takes the key.

The online check sends one object that Braze must refuse (it is about nobody), or as a partner no change at all: nothing is
written, and nothing is billed. That Braze looks at the key before it looks at the object is assumed.
"""

import asyncio
from collections.abc import Iterator

from bridged.braze import requests
from bridged.braze.requests import Target
from bridged.braze.transport import Transport
from bridged.cohort_import import braze_target
from bridged.commands.printing import printable, size
from bridged.errors import ConfigError, UpstreamError
from bridged.mixpanel.verdicts import Halt, Retry, Split, Verdict
from bridged.settings import Config


def summary(settings: Config) -> Iterator[list[str]]:
    """Rows for people; none when cohorts are off."""
    cohorts = settings.cohorts
    if not cohorts.enabled:
        return
    target = braze_target(settings)
    protected = "Basic authentication" if cohorts.password else "no password"
    yield ["cohorts", f"{settings.sources.http.listen}/v1/cohorts/mixpanel ({protected}), user_id = {cohorts.user_id}"]
    yield ["Braze", f"{target.base}, {_key(target)}"]
    if target.is_partner:
        yield ["written as", "cohorts: a data point for each user that joins or leaves one"]
    else:
        yield ["written as", f"the array attribute {cohorts.attribute}: a data point for each user that is written"]
    cap = f"{cohorts.max_data_points_per_day:,} a day" if cohorts.max_data_points_per_day else "no cap"
    yield ["data points", cap]
    yield ["membership", f"{cohorts.path}, at most {size(cohorts.max_bytes)}"]


def problems(settings: Config) -> Iterator[str]:
    """What can't work."""
    if settings.cohorts.enabled:
        try:
            braze_target(settings)
        except ConfigError as error:
            yield str(error.args[0])


def warnings(settings: Config) -> Iterator[str]:
    """What will hurt later."""
    cohorts = settings.cohorts
    if cohorts.enabled and not cohorts.max_data_points_per_day:
        yield "cohorts.max_data_points_per_day is 0: the first sync of a large cohort may be a large bill"
    if cohorts.enabled and not cohorts.update_existing_only:
        yield "cohorts.update_existing_only is false: users that Braze doesn't know are created there"


def online(settings: Config) -> str:
    """What Braze says. Raises UpstreamError when it isn't a yes, with what to do about it."""
    target = braze_target(settings)
    verdict = asyncio.run(_ask(target, min(float(settings.braze.timeout) or 15.0, 15.0)))
    if isinstance(verdict, Halt):
        raise UpstreamError(f"Braze refuses us: {printable(verdict.reason)}")
    if isinstance(verdict, Retry):
        raise UpstreamError(
            f"Braze can't be asked: {printable(verdict.reason)}",
            "try again; check [braze] cluster and url, the network and any proxy",
        )
    if isinstance(verdict, Split):
        raise UpstreamError(
            f"what answers doesn't answer as Braze does: {printable(verdict.reason)}", "check [braze] url and any proxy"
        )
    return f"Braze takes the {_key(target)}; nothing was written"


async def _ask(target: Target, timeout_s: float) -> Verdict:
    async with Transport(target, timeout_s) as transport:
        return (await transport.send(requests.probe(target))).verdict


def _key(target: Target) -> str:
    return f"key of the partner {target.partner_name!r}" if target.is_partner else "REST key"
