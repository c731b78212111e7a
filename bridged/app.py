"""The daemon: opens everything in the order of an event's path, from the disk outward, and knows everyone.

    spool -> backlog -> delivery -> intake -> doors -> admin
    membership -> cohort writer -> the HTTP door         the way back, beside it

What is off (mixpanel.export, cohorts.enabled) isn't there, but for the spool, which then lies still.

Leaving the block is the shutdown, in reverse: doors close and finish their requests, senders get their grace, the writer commits,
SQLite closes. A task that dies takes the process down, and systemd starts it again: start-up is recovery.
"""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import structlog

from bridged import __version__, foresight, memory, open_files, options, reloading
from bridged.activity import Activity
from bridged.admin.server import AdminServer
from bridged.admin.status import alarm_facts, status
from bridged.alarms.watch import Watch
from bridged.alarms.webhook import Webhook
from bridged.apart import InOrder
from bridged.backlog.archive import Archive
from bridged.backlog.backlog import Backlog
from bridged.backlog.spool import Spool
from bridged.certificates import Certificates, Renewed
from bridged.clock import Clock
from bridged.cohort_import import CohortImport, cohort_options, raised
from bridged.cohorts.membership import Membership
from bridged.cohorts.writer import CohortWriter
from bridged.config import (
    NO_CREDENTIAL,
    demand_good,
    has_credential,
    secret_files,
    spoken_secrets,
    with_credentials,
)
from bridged.currents.schema import iter_types
from bridged.currents.table import EVENT_TYPES
from bridged.delivery.delivery import Delivery
from bridged.delivery.pacing import Pace
from bridged.delivery.transport import Transport
from bridged.errors import BridgedError, ConfigError, MembershipDamaged, SpoolError
from bridged.intake import Intake
from bridged.mixpanel.mapping import EventMapping
from bridged.redaction import hide, redacted
from bridged.saved import Saved, SaveUnderWay, applied, in_words
from bridged.service import Listeners, Notifier, Progress, told_to_stop
from bridged.settings import Config
from bridged.sources.cohorts import CohortSource
from bridged.sources.http import HttpSource
from bridged.sources.stream import StreamOptions, StreamSource

log = structlog.get_logger()

TYPE_NAMES = dict(iter_types(EVENT_TYPES))


class App:
    """The parts of a running daemon, as an async context manager. `config` is what is in force."""

    def __init__(self, config: Config, listeners: Listeners | None = None, source: Callable[[], str] = str) -> None:
        """`source`: what the configuration is read from, in words."""
        self.saved = Saved(str(Path(config.spool.path).absolute()))  # on the page: goes before the configuration
        self.saved.read()
        self.base = config  # what the file and the environment last said
        config = self.saved.in_force(config)
        if self.saved.problem:
            log.warning("saved_settings_ignored", problem=self.saved.problem)
        self.config = config
        hide(spoken_secrets(config), in_force=True)
        self.given: dict[str, str] = {}  # of [mixpanel], by the API: goes before both
        self.restart_needed: list[str] = []  # keys that have changed and can't be taken over
        self.reload_problem = ""  # why the last changed configuration wasn't taken over
        self._configured = config  # what the configuration last said, with what was saved
        self._source = source
        self._saving = False
        self.certificates = Certificates(config)
        self.clock = Clock(time.time, time.monotonic)
        self.started_at = self.clock.started_at
        self._files = InOrder("files beside the spool")  # writes them: the loop mustn't wait for their disk
        self.activity = Activity(f"{config.spool.path}.activity", do=self._files.put)
        self.hurry = asyncio.Event()  # set: the shutdown doesn't wait for Mixpanel
        self.membership: Membership | None = None  # None: no cohorts are imported
        self.cohort_writer: CohortWriter | None = None
        self.cohorts: CohortSource | None = None  # opened last: whoever looks before that finds none
        self.cohorts_problem = ""  # why cohorts are enabled and yet not imported
        self._importing: CohortImport | None = None
        self._drain: asyncio.Task[None] | None = None  # the end has begun
        self._listeners = listeners or Listeners([])
        self._exit = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            try:
                await self._open(stack)
            except BaseException:
                self.hurry.set()  # why it can't start is told at once
                raise
            self._exit = stack.pop_all()
        return self

    async def _open(self, stack: contextlib.AsyncExitStack) -> None:
        config, delivery = self.config, self.config.delivery
        stack.push(self._keep_settings)
        self.spool = await stack.enter_async_context(
            Spool(options.spool_options(config), TYPE_NAMES, self.clock.latest)
        )
        self.saved.sweep()
        await stack.enter_async_context(self._files)
        self._begin_activity(stack)
        self.backlog = Backlog(self.spool, config.spool.ring_bytes, self.clock.latest)
        self.transport = await stack.enter_async_context(Transport(options.target(config), delivery.timeout))
        self.delivery = Delivery(
            self.backlog,
            self.spool,
            self.transport,
            Pace(options.pace_limits(config), random.Random()),
            options.delivery_options(config),
            Archive(config.retention.archive_path),
            lambda code: TYPE_NAMES.get(code, ""),
            self.clock.earliest,
        )
        self.delivery.happened = self.activity.tell
        delivering = self.delivery.run() if config.mixpanel.export else _nothing()
        self._delivering = asyncio.create_task(delivering, name="delivery")
        stack.push_async_callback(self._stop_delivering)
        if config.cohorts.enabled:
            await self._open_cohorts(stack, config)
            stack.callback(self._begin_drain)  # before the cohorts', so that one grace does for both
        self.mapping = EventMapping(EVENT_TYPES, options.mapping_settings(config))
        self.intake = Intake(self.mapping, self.spool, delivery.max_batch_events, self.clock.latest)
        webhook = Webhook(options.hook(config))
        self.watch = Watch(lambda: alarm_facts(self), config.spool.path, webhook, self._files.put)
        self.watch.happened = self.activity.tell
        self.delivery.doubtful = any(one.alarm == "halted" for one in self.watch.alarms.open)
        stack.push_async_callback(_end, asyncio.create_task(self.watch.run(), name="alarms"))
        # Opened before the doors, so that a daemon that recovers a long backlog can be looked at.
        self.admin = AdminServer(self, self._listeners.take(config.admin.listen))
        if config.admin.listen:
            await stack.enter_async_context(self.admin)
        stream = options.stream_options(config)
        if not config.mixpanel.export:
            # The socket unit may hold this door's sockets all the same: a key names them.
            for sock in [sock for address in stream.listen for sock in self._listeners.take(address)]:
                sock.close()
            stream = StreamOptions(listen=())
        self.stream = StreamSource(stream, self.intake, self.spool, self._listeners.take)
        self.stream.unix.happened = self.activity.tell
        await stack.enter_async_context(self.stream)
        self.http: HttpSource | None = None
        if config.sources.http.listen:
            sockets = self._listeners.take(config.sources.http.listen)
            # As it is now: the page may have changed the token meanwhile.
            self.cohorts = CohortSource(cohort_options(self.config), self.membership, self.cohorts_problem)
            taking = self.intake if config.mixpanel.export else None
            door = HttpSource(options.http_options(self.config), taking, self.spool, sockets, self.cohorts)
            self.http = await stack.enter_async_context(door)
        self._listeners.demand_none_left()

    async def _open_cohorts(self, stack: contextlib.AsyncExitStack, config: Config) -> None:
        """Damage there is no reason to stop the export."""
        importing = CohortImport(config, self.clock, self.hurry)
        try:
            await stack.enter_async_context(importing)
        except MembershipDamaged as error:
            self._cohorts_failed(error)
            return
        self._importing, self.membership, self.cohort_writer = importing, importing.membership, importing.writer

    def _cohorts_failed(self, error: BaseException) -> None:
        """Notes why no cohorts are imported. Raises it when nothing else is done here: the process ends."""
        said, hint = str(error.args[0]) if error.args else repr(error), getattr(error, "hint", "")
        self.cohorts_problem = redacted(f"{said}; {hint}" if hint else said)
        if not self.config.mixpanel.export:
            raise error
        log.error("cohorts_failed", error=self.cohorts_problem)

    def _begin_activity(self, stack: contextlib.AsyncExitStack) -> None:
        """Once the spool is ours, and until it is closed: its file stands beside the spool's."""
        self.activity.open()
        before = self.activity.entries[-1] if self.activity.entries else None
        killed = before is not None and before.kind != "stopped"
        how = "after a crash, a kill or a power cut" if killed else "" if before else "with an empty list"
        text = f"bridged {__version__} started {how}".strip()
        self.activity.tell("started", text, "warning" if killed else "info", salvaged=self.spool.set_aside)

        def ended(kind: type[BaseException] | None, error: BaseException | None, _traceback: Any) -> None:
            if error is None or isinstance(error, asyncio.CancelledError):
                self.activity.tell("stopped", "bridged stopped", waiting=self.spool.accounts.total("waiting"))
            else:
                self.activity.tell("stopped", f"bridged stopped: {error}", "critical")
            self.activity.close()

        stack.push(ended)

    def _keep_settings(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        """Whoever removed the spool's folder has removed them, too: the next start shall not be another daemon."""
        try:
            if isinstance(error, SpoolError) and self.saved.write_again():
                log.warning("settings_written_again", file=str(self.saved.path), keys=sorted(self.saved.values))
        except OSError as why:
            log.error("settings_lost", file=str(self.saved.path), keys=sorted(self.saved.values), error=str(why))

    def _begin_drain(self) -> None:
        """The doors are closed: what is waiting gets the grace, the rest stays in the spool."""
        if not (self._drain is not None or self._delivering.done() or self.spool.failed):
            self._drain = asyncio.create_task(self.delivery.drain(self.config.delivery.grace), name="drain")

    async def _stop_delivering(self) -> None:
        self._begin_drain()
        if self._drain is not None:
            hurried = asyncio.create_task(self.hurry.wait(), name="hurry")
            await asyncio.wait({self._drain, self._delivering, hurried}, return_when=asyncio.FIRST_COMPLETED)
            self._drain.cancel()
            hurried.cancel()
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

    def reload(
        self, read: Callable[[], Config], certificates: Callable[[], Renewed] = dict, *, asked: bool = True
    ) -> None:
        """Takes over what can change while it runs (see `reloading`); a configuration that can't be used changes nothing.

        `certificates`: what the files of the listeners hold by now. Neither reads a disk that may hang.
        Not `asked`: a file of a secret has changed, and if it says what is known already, nobody hears of it.
        """
        try:
            base = read()
            said = self.saved.in_force(base)
            self._demand_usable(said, self._source())
            given = self.given_beside(said)
            before = with_credentials(
                self.config, {name: getattr(self._configured.mixpanel, name) for name in self.given}
            )
            config, changed, restart = reloading.take_over(before, said)
            self._use(with_credentials(config, given))
        except Exception as error:
            # Whatever it is: a slip in a file must not end a daemon that works.
            self.reload_problem = ""
            self._not_taken_over("configuration", error)
            return
        self.reload_problem = ""
        doors: dict[str, Any] = {"admin": self.admin, "sources.stream": self.stream, "sources.http": self.http}
        for problem in self.certificates.renew(certificates, doors):
            self._not_taken_over("certificate", problem)
        self.base, self._configured, self.given, self.restart_needed = base, said, given, restart
        self.saved.revise()
        if asked or changed:
            log.info("reloaded", changed=changed, restart_needed_for=restart)
            self.activity.tell(
                "reloaded", "The configuration was read again", changed=changed, restart_needed_for=restart
            )

    def _not_taken_over(self, what: str, error: Exception) -> None:
        """Tells it wherever somebody may look."""
        why = str(error.args[0]) if isinstance(error, BridgedError) else str(error) or repr(error)
        why = " ".join(why.split())
        self.reload_problem = f"{self.reload_problem}; {why}".removeprefix("; ")
        log.error("reload_failed", error=str(error), hint=f"the {what} in force is the old one")
        self.activity.tell("reload_failed", f"The {what} can't be used: {why}", "critical")

    def given_beside(self, said: Config) -> dict[str, str]:
        """What the API gave, as far as it would go before this configuration: it goes when another credential is said."""
        return self.given if options.target(said).credentials == options.target(self._configured).credentials else {}

    def take_credentials(self, given: dict[str, str]) -> None:
        """Other values in [mixpanel], at once and in memory only. Raises ConfigError, and changes nothing, if unusable."""
        config = with_credentials(self.config, given)
        if config.mixpanel.service_account and given.get("api_secret"):
            raise ConfigError(
                "api_secret would have no effect beside the service account that is in force",
                'send "service_account": "" along to use the API secret',
            )
        if not has_credential(config):
            raise ConfigError(NO_CREDENTIAL)
        self._use(config)
        self.given |= given
        self.saved.revise()
        self.activity.tell("credentials", "A credential was given by the API, until the next start", keys=sorted(given))
        log.info("credentials_given", kind=self.transport.target.credentials.kind, keys=sorted(given))

    async def save(self, given: Mapping[str, Any], remove: Sequence[str]) -> list[str]:
        """Settings of the page: on disk for good, then in force; gives the keys that have changed.

        Raises BadSettings or ConfigError for what can't be, SpoolError if the disk doesn't take it; nothing is changed then.
        """
        if self._saving:
            raise SaveUnderWay("another change of the settings is being saved", "look at it, and try again")
        self._saving = True
        try:
            before = self.saved.values
            values = self.saved.with_changes(given, remove)
            self._demand_usable(applied(self.base, values))
            try:
                await asyncio.to_thread(self.saved.write, values)
                try:
                    changed = self._take_saved(values)
                except BaseException:
                    await asyncio.to_thread(self.saved.write, before)
                    raise
            except OSError as error:
                # It may have its name already, and only that it is for good could not be had.
                with contextlib.suppress(OSError):
                    await asyncio.to_thread(self.saved.write, before)
                raise SpoolError(
                    f"the settings can't be saved in {self.saved.path}: {error}",
                    "is there room, and is the folder writable?",
                ) from error
        finally:
            self._saving = False
        return changed

    def _demand_usable(self, config: Config, source: str = "") -> None:
        """Raises ConfigError for what would stop a delivery that works, or can't be in force beside what needs a restart."""
        before, after = (reloading.take_over(self.config, said)[0] for said in (self._configured, config))
        where = f"{source}: " if source else ""
        demand_good(after, f"{where}until a restart, with the keys that need one as they were")
        if has_credential(before) and not has_credential(after):
            raise ConfigError(where + NO_CREDENTIAL)

    def _take_saved(self, values: dict[str, Any]) -> list[str]:
        """Puts what is on disk now in force."""
        said = applied(self.base, values)
        given = self.given_beside(said)
        before = with_credentials(self.config, {name: getattr(self._configured.mixpanel, name) for name in self.given})
        config, changed, restart = reloading.take_over(before, said)
        self._use(with_credentials(config, given))
        self._configured, self.given, self.restart_needed = said, given, restart
        self.saved.values = values
        self.saved.revise()
        if changed:
            log.info("settings_saved", changed=changed)
            what = ", ".join(in_words(name, before, config) for name in changed)
            self.activity.tell("settings", f"Settings were saved: {what}", changed=changed)
        return changed

    def _use(self, config: Config) -> None:
        """Puts a configuration in force. First what may fail; then nothing waits, so everybody changes at the same moment."""
        settings = options.mapping_settings(config)
        mapping = self.mapping
        if settings != options.mapping_settings(self.config):
            mapping = EventMapping(EVENT_TYPES, settings)
        aimed = options.target(config)
        is_other = aimed != self.transport.target
        self.transport.use(aimed, config.delivery.timeout)
        self.delivery.use(
            options.delivery_options(config), options.pace_limits(config), Archive(config.retention.archive_path)
        )
        self.mapping = mapping
        self.intake.use(mapping)
        self.watch.webhook.use(options.hook(config))
        if self._importing is not None:
            self._importing.use(config)
        # These are opened after the admin listener, where somebody may have saved something meanwhile.
        if self.cohorts is not None:
            self.cohorts.use(cohort_options(config))
        if door := getattr(self, "http", None):
            door.use(config.sources.http.bearer_token)
        self.config = config
        hide(spoken_secrets(config), in_force=True)
        if is_other:
            self.delivery.credentials_changed()

    async def watch_secrets(self, changed: Callable[[], None]) -> None:
        """Calls `changed` when a file of a secret has changed. Until it is cancelled."""
        await reloading.watch(lambda: secret_files(self._configured), changed)

    def sentence(self) -> str:
        """What it does now, in words."""
        return status(self, []).sentence

    def writing(self) -> tuple[int, int]:
        """Bytes that wait for a commit, and how far the writer is."""
        return self.spool.pending_bytes, self.spool.progress

    async def ask_the_writer(self) -> None:
        """Comes back when the spool's thread has done what it was busy with, or some of what takes long."""
        await self.spool.answer()

    async def until(self, stop: asyncio.Event) -> None:
        """Returns when `stop` is set. Raises what a part died of."""
        waits = {
            asyncio.create_task(stop.wait(), name="stop"),
            asyncio.create_task(self.spool.ended(), name="writer's end"),
            asyncio.create_task(self._delivery_ended(), name="delivery's end"),
        }
        if self._importing is not None:
            waits.add(asyncio.create_task(self._cohorts_ended(self._importing), name="cohorts' end"))
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _cohorts_ended(self, importing: CohortImport) -> None:
        try:
            await importing.ended()
        except Exception as error:
            self._cohorts_failed(error)
        await asyncio.Event().wait()

    async def _delivery_ended(self) -> None:
        await raised(self._delivering)
        raise SpoolError("the delivery ended by itself")


async def _nothing() -> None:
    """Delivers nothing, for ever."""
    await asyncio.Event().wait()


async def _end(task: "asyncio.Task[None]") -> None:
    """Ends a task that nothing depends on. What it died of, if it did, is told."""
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        pass
    except Exception as error:
        log.error("task_failed", task=task.get_name(), error=repr(error))


async def run(config: Config, reload: Callable[[], Config], source: Callable[[], str] = str) -> None:
    """Runs the daemon until SIGTERM or SIGINT; a second one skips the grace.

    SIGHUP reads the configuration again, and so does a changed secret.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    service = Notifier(os.environ, os.getpid())
    app = App(config, Listeners.handed_over(os.environ, os.getpid()), source)

    def end() -> None:
        (app.hurry if stop.is_set() else stop).set()

    def take(said: Callable[[], Config], certificates: Callable[[], Renewed], *, asked: bool) -> None:
        app.reload(said, certificates, asked=asked)
        if asked and not rereading.asked:  # else the next one tells it
            service.ready(app.sentence())

    def read_again() -> None:
        service.reloading()
        rereading.want()

    rereading = reloading.Rereading(reload, app.certificates.read_again, take)
    foresight.warn(app.config)
    open_files.allow(app.config)
    memory.give_back_large_blocks()
    starting = asyncio.create_task(service.starting(stop, app.hurry, app.config.delivery.grace), name="starting")
    heartbeat = service.heartbeat(Progress(app.ask_the_writer, app.writing), app.sentence)
    async with told_to_stop(end), app, heartbeat:
        await _end(starting)
        log.info(
            "ready",
            version=__version__,
            http=config.sources.http.listen,
            stream=list(config.stream_addresses),
            admin=config.admin.listen,
            mixpanel=app.transport.target.import_url.partition("?")[0],
            spool=options.spool_options(config).path,
            waiting=app.backlog.events,
        )
        loop.add_signal_handler(signal.SIGHUP, read_again)
        service.ready(app.sentence())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})  # one may have come since `cli` blocked them
        memory.settle()
        beside = [
            asyncio.create_task(rereading.run(), name="rereading"),
            asyncio.create_task(app.watch_secrets(lambda: rereading.want(asked=False)), name="secrets"),
            asyncio.create_task(memory.keep_small(), name="memory"),
        ]
        try:
            await app.until(stop)
        finally:
            for task in beside:
                await _end(task)
        log.info("stopping", waiting=app.backlog.events)
        service.stopping(f"Stopping: {app.backlog.events} events waiting, safe on disk")
        ending = asyncio.create_task(service.ending(lambda: app.spool.progress), name="ending")
    await _end(ending)
    log.info("stopped")
