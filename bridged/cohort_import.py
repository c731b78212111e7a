"""The way back, opened from a configuration: the membership, the transport to Braze, and the writer between them."""

import asyncio
import contextlib
import os
import random
from typing import Self

import structlog

from bridged.braze import clusters
from bridged.braze.requests import Target
from bridged.braze.transport import Transport
from bridged.clock import Clock
from bridged.cohorts.membership import Membership, MembershipOptions
from bridged.cohorts.pace import Pace
from bridged.cohorts.writer import CohortWriter, WriterOptions
from bridged.errors import ConfigError, MembershipError
from bridged.settings import Config
from bridged.sources.cohorts import CohortOptions

log = structlog.get_logger()


def braze_target(config: Config) -> Target:
    """Where cohorts go, and as whom. Raises ConfigError for a cluster that Braze doesn't have."""
    braze = config.braze
    try:
        url = braze.url or clusters.host(braze.cluster)
    except ValueError as error:
        raise ConfigError(f"braze.cluster: {error}") from None
    return Target(
        url=url,
        rest_key=braze.rest_key,
        partner_name=braze.partner_name,
        partner_key=braze.partner_key,
        data_import_key=braze.data_import_key,
    )


def membership_options(config: Config) -> MembershipOptions:
    """What the configuration says about the membership."""
    cohorts, target_ = config.cohorts, braze_target(config)
    written = f"partner {target_.partner_name}" if target_.is_partner else f"attribute {cohorts.attribute}"
    return MembershipOptions(
        path=os.path.realpath(cohorts.path),
        max_bytes=cohorts.max_bytes,
        max_points_per_day=cohorts.max_data_points_per_day,
        by_name=not target_.is_partner,
        target=f"{target_.base} {written}",
    )


def writer_options(config: Config) -> WriterOptions:
    """What the configuration says about how users are written."""
    return WriterOptions(
        attribute=config.cohorts.attribute,
        update_existing_only=config.cohorts.update_existing_only,
        probe_interval_s=config.braze.probe_interval,
    )


def cohort_options(config: Config) -> CohortOptions:
    """What the configuration says about the cohorts' door."""
    cohorts = config.cohorts
    return CohortOptions(username=cohorts.username, password=cohorts.password, user_id=cohorts.user_id)


class CohortImport:
    """The parts, as an async context manager. Leaving it gives requests in flight the grace."""

    def __init__(self, config: Config, clock: Clock, hurry: asyncio.Event) -> None:
        """`hurry`, set: nobody waits for Braze. Raises ConfigError for a cluster that Braze doesn't have."""
        self._config = config
        self._hurry = hurry
        self._transport = Transport(braze_target(config), config.braze.timeout)
        self._exit = contextlib.AsyncExitStack()
        self.membership = Membership(membership_options(config), clock.latest)
        pace = Pace(config.cohorts.max_concurrency, random.Random())
        self.writer = CohortWriter(self.membership, self._transport, pace, writer_options(config), clock.latest)

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self.membership)
            await stack.enter_async_context(self._transport)
            self._writing = asyncio.create_task(self.writer.run(), name="cohort writer")
            stack.push_async_callback(self._stop)
            self._exit = stack.pop_all()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._exit.aclose()

    async def _stop(self) -> None:
        """What is in flight when the grace is over is sent again by the next start."""
        if not (self._writing.done() or self.membership.failed):
            drain = asyncio.create_task(self.writer.drain(self._config.delivery.grace), name="cohorts drain")
            hurried = asyncio.create_task(self._hurry.wait(), name="cohorts hurry")
            await asyncio.wait({drain, self._writing, hurried}, return_when=asyncio.FIRST_COMPLETED)
            drain.cancel()
            hurried.cancel()
            with contextlib.suppress(MembershipError, asyncio.CancelledError):
                await drain
        self._writing.cancel()
        try:
            await self._writing
        except asyncio.CancelledError:
            pass
        except Exception as error:
            # If it is why the process ends, `ended` has raised it; if not, the process ends anyway.
            log.error("cohort_writer_failed", error=repr(error))

    def use(self, config: Config) -> None:
        """Another configuration. Raises ConfigError, and changes nothing, if it can't be used."""
        aimed, before = braze_target(config), self._transport.target
        self._transport.use(aimed, config.braze.timeout)
        self._config = config
        self.membership.use(config.cohorts.max_data_points_per_day)
        self.writer.use(writer_options(config), config.cohorts.max_concurrency)
        if aimed != before:
            self.writer.credentials_changed()

    async def ended(self) -> None:
        """Returns when the file's writer has ended as it was told. Raises what one of the parts died of."""
        ends = {asyncio.create_task(self.membership.ended()), asyncio.create_task(raised(self._writing))}
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in ends:
                task.cancel()
            await asyncio.gather(*ends, return_exceptions=True)


async def raised(task: "asyncio.Task[None]") -> None:
    """Returns when a task has ended. Raises what it died of."""
    try:
        await asyncio.shield(task)
    except ExceptionGroup as group:
        # The first is the reason; if it is one for people, they shall read it as such.
        raise group.exceptions[0] from group
