"""The daemon: opens everything in the order of an event's path, from the disk outward, and knows everyone.

    spool -> backlog -> delivery -> intake -> doors -> admin

Leaving the block is the shutdown, in reverse: doors close and finish their requests, senders get their grace, the writer commits,
SQLite closes. A task that dies takes the process down, and systemd starts it again: start-up is recovery.
"""

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Callable
from typing import Any, Self

import msgspec
import structlog

from bridged import __version__
from bridged.admin.server import AdminServer
from bridged.backlog.archive import Archive
from bridged.backlog.backlog import Backlog
from bridged.backlog.spool import Spool, SpoolOptions
from bridged.clock import Clock
from bridged.config import Config, split_address
from bridged.currents.schema import iter_types
from bridged.currents.table import EVENT_TYPES
from bridged.delivery.delivery import Delivery, DeliveryOptions
from bridged.delivery.pacing import Pace, PaceLimits
from bridged.delivery.transport import Transport
from bridged.errors import ConfigError, SpoolError
from bridged.intake import Intake
from bridged.mixpanel.mapping import EventMapping, MappingSettings
from bridged.mixpanel.requests import API_SECRET_RETIRED, Credentials, Target
from bridged.sources.http import HttpOptions, HttpSource
from bridged.sources.stream import StreamOptions, StreamSource

log = structlog.get_logger()

TYPE_NAMES = dict(iter_types(EVENT_TYPES))


def mapping_settings(config: Config) -> MappingSettings:
    """What the configuration says about mapping."""
    events, mixpanel = config.events, config.mixpanel
    return MappingSettings(
        token=mixpanel.token,
        partner_id=mixpanel.partner_id,
        naming=mixpanel.naming,
        message_engagement=events.message_engagement,
        customer_behavior=events.customer_behavior,
        include=events.include,
        exclude=events.exclude,
        unknown=events.unknown,
        anonymous=events.anonymous,
        names=events.names,
    )


def target(config: Config) -> Target:
    """Where the configuration says that requests go, and as whom."""
    mixpanel = config.mixpanel
    credentials = Credentials(
        token=mixpanel.token,
        api_secret=mixpanel.api_secret,
        service_account=mixpanel.service_account,
        service_secret=mixpanel.service_secret,
        project_id=mixpanel.project_id,
    )
    return Target(url=mixpanel.url, region=mixpanel.region, credentials=credentials)


def spool_options(config: Config) -> SpoolOptions:
    """What the configuration says about the spool."""
    return SpoolOptions(
        path=config.spool.path,
        max_bytes=config.spool.max_bytes,
        max_dead_letters=config.spool.max_dead_letters,
        max_segment_events=config.delivery.max_batch_events,
        max_segment_bytes=config.delivery.max_batch_bytes,
    )


class App:
    """The parts of a running daemon, as an async context manager."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.clock = Clock(time.time, time.monotonic)
        self.started_at = self.clock.started_at
        self._exit = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            await self._open(stack)
            self._exit = stack.pop_all()
        return self

    async def _open(self, stack: contextlib.AsyncExitStack) -> None:
        config, delivery = self.config, self.config.delivery
        self.spool = await stack.enter_async_context(Spool(spool_options(config), TYPE_NAMES, self.clock.latest))
        self.backlog = Backlog(self.spool, config.spool.ring_bytes, self.clock.latest)
        self.transport = await stack.enter_async_context(
            Transport(target(config), delivery.timeout, delivery.max_concurrency)
        )
        limits = PaceLimits(
            max_events_per_second=delivery.max_events_per_second,
            max_bytes_per_minute=delivery.max_bytes_per_minute,
            max_concurrency=delivery.max_concurrency,
        )
        self.delivery = Delivery(
            self.backlog,
            self.spool,
            self.transport,
            Pace(limits, random.Random()),
            DeliveryOptions(
                max_batch_events=delivery.max_batch_events,
                max_batch_bytes=delivery.max_batch_bytes,
                flush_interval_s=delivery.flush_interval,
                probe_interval_s=delivery.probe_interval,
                max_age_s=config.retention.max_age,
                on_expiry=config.retention.on_expiry,
            ),
            Archive(config.retention.archive_path),
            lambda code: TYPE_NAMES.get(code, ""),
            self.clock.earliest,
        )
        self._delivering = asyncio.create_task(self.delivery.run(), name="delivery")
        stack.push_async_callback(self._stop_delivering)
        self.mapping = EventMapping(EVENT_TYPES, mapping_settings(config))
        self.intake = Intake(self.mapping, self.spool, delivery.max_batch_events, self.clock.latest)
        # Opened before the doors, so that a daemon that recovers a long backlog can be looked at.
        self.admin = AdminServer(self)
        if config.admin.listen:
            await stack.enter_async_context(self.admin)
        self.stream = StreamSource(
            StreamOptions(listen=config.sources.stream.listen, max_line=config.sources.stream.max_line),
            self.intake,
            self.spool,
        )
        await stack.enter_async_context(self.stream)
        self.http: HttpSource | None = None
        if config.sources.http.listen:
            host, port = split_address(config.sources.http.listen)
            http = config.sources.http
            options = HttpOptions(host=host, port=port, bearer_token=http.bearer_token, max_body=http.max_body)
            self.http = await stack.enter_async_context(HttpSource(options, self.intake, self.spool))

    async def _stop_delivering(self) -> None:
        """The doors are closed: what is waiting gets the grace, the rest stays in the spool."""
        if not self._delivering.done() and not self.spool.failed:
            drain = asyncio.create_task(self.delivery.drain(self.config.delivery.grace), name="drain")
            await asyncio.wait({drain, self._delivering}, return_when=asyncio.FIRST_COMPLETED)
            drain.cancel()
        self._delivering.cancel()
        try:
            await self._delivering
        except asyncio.CancelledError:
            pass
        except Exception as error:
            # If it is why the process ends, `until` has raised it; if not, the process ends anyway.
            log.error("delivery_failed", error=repr(error))

    async def __aexit__(self, *exc: Any) -> None:
        await self._exit.__aexit__(*exc)

    def reload(self, read: Callable[[], Config]) -> None:
        """Takes over [mixpanel] url, region and credentials; a configuration that can't be used changes nothing.

        `token` stays what it was in events: they are mapped with it. Everything else needs a restart, which loses nothing.
        """
        try:
            config = read()
        except ConfigError as error:
            log.error("reload_failed", error=str(error), hint="the configuration in force is the old one")
            return
        self.transport.target = target(config)
        self.delivery.credentials_changed()
        others = config != msgspec.structs.replace(self.config, mixpanel=config.mixpanel)
        log.info("reloaded", restart_needed_for_other_keys=others)

    async def until(self, stop: asyncio.Event) -> None:
        """Returns when `stop` is set. Raises what a part died of."""
        waits = {
            asyncio.create_task(stop.wait(), name="stop"),
            asyncio.create_task(self.spool.ended(), name="writer's end"),
            asyncio.create_task(self._delivery_ended(), name="delivery's end"),
        }
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _delivery_ended(self) -> None:
        try:
            await asyncio.shield(self._delivering)
        except ExceptionGroup as group:
            # The first is the reason; if it is one for people, they shall read it as such.
            raise group.exceptions[0] from group
        raise SpoolError("the delivery ended by itself")


async def run(config: Config, reload: Callable[[], Config]) -> None:
    """Runs the daemon until SIGTERM or SIGINT. SIGHUP reads the configuration again, for another credential."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    warn(config)
    async with App(config) as app:
        log.info(
            "ready",
            version=__version__,
            http=config.sources.http.listen,
            stream=list(config.sources.stream.listen),
            admin=config.admin.listen,
            mixpanel=app.transport.target.import_url.partition("?")[0],
            waiting=app.backlog.events,
        )
        loop.add_signal_handler(signal.SIGHUP, app.reload, reload)
        await app.until(stop)
        log.info("stopping", waiting=app.backlog.events)
    log.info("stopped")


def warn(config: Config) -> None:
    """Says at start-up what will hurt later."""
    kind = target(config).credentials.kind
    if kind == "API secret":
        log.warning(
            "api_secret_retires", on=API_SECRET_RETIRED, hint="create a service account and set service_account"
        )
    if not config.mixpanel.token:
        log.warning(
            "no_project_token", hint="events carry no `token` property; set mixpanel.token as Braze's connector does"
        )
