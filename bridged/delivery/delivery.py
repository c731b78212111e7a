"""What leaves: takes parcels from the backlog, sends them, judges the answers, keeps the pace, settles.

One dispatcher owns the pace and the order; each parcel in flight is a task of its own. For a verdict there is one way on:

    Delivered   settle
    Reject      settle; the refused ones become dead letters with Mixpanel's words
    Split       its halves are tried, those of a single segment replace it in the spool
    Retry       the same bytes again, when the pace says so
    Halt        everything is kept, and one parcel a minute asks whether the credential works again

Unless `blame` says that others are taken: then what fails or would halt is split, and a single event is set aside.
"""

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Literal

import structlog
from msgspec import Struct

from bridged.backlog import segment as segments
from bridged.backlog.archive import Archive
from bridged.backlog.backlog import Backlog, Parcel
from bridged.backlog.segment import Batch, Segment
from bridged.backlog.spool import DeadLetter, Settlement, Spool
from bridged.delivery.archiver import Archiver
from bridged.delivery.aside import Aside
from bridged.delivery.blame import SMALLEST_CAP_BYTES, Blame, aside_s, too_large, why_refused
from bridged.delivery.pacing import Attempt, Pace, PaceLimits
from bridged.delivery.transport import Transport
from bridged.mixpanel.verdicts import Delivered, Failure, Halt, Reject, Retry, Split, Verdict

log = structlog.get_logger()

# While halted: so often somebody looks whether what waits has become too old.
_HALTED_LOOK_S = 1.0
# A changed credential is tried before the next probe is due, but never sooner than so long after the last one: a file
# that changes all the time must not make a storm.
_EARLY_PROBE_S = 2.0
_SMALLEST_GUESS_BYTES = 256 * 1024
# What was learned from a 413, or a short count, is forgotten after so long: what was mended must not cost anything for ever.
_LEARNED_S = 600.0
# The same problem is logged no more often, though successes lie in between, and another one: two may take turns.
_SAME_PROBLEM_S, _OTHER_PROBLEM_S = 60.0, 10.0
# So many halts are told in a minute: where a share of the requests is refused, what is in flight ends each at once.
_HALTS_TOLD, _HALTS_TOLD_S = 3, 60.0
# Splits are told no more often, with their number: a limit on the way can split each request of a backlog many times.
_SPLITS_TOLD_S = 60.0


class DeliveryOptions(Struct, frozen=True, kw_only=True):
    """How parcels are cut, when they are tried, and how long they are kept while nothing can be delivered."""

    max_batch_events: int = 2000
    max_batch_bytes: int = 2_000_000
    flush_interval_s: float = 1.0
    probe_interval_s: float = 60.0
    max_age_s: float = 48 * 3600.0
    on_expiry: Literal["archive", "drop", "keep"] = "archive"


class Retrying(Struct, frozen=True):
    """The parcel that has been tried in vain for longest."""

    attempts: int
    created_at: float  # wall clock: when its oldest event was accepted
    parcels: int  # so many are tried again


class Delivery:
    """The dispatcher and its senders. Owns the pace, the parcels to try again, and the halt."""

    def __init__(
        self,
        backlog: Backlog,
        spool: Spool,
        transport: Transport,
        pace: Pace,
        options: DeliveryOptions,
        archive: Archive,
        names: Callable[[int], str],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.halted: Halt | None = None
        self.halted_at: float | None = None  # wall clock
        self.doubtful = False  # it was halted when the last daemon ended; until something is taken nobody knows better
        self.verdicts: Counter[str] = Counter()
        self.delivered_at: float | None = None  # wall clock, of the last success
        self.last_problem = ""
        self.age_sum_s = 0.0  # of parcels when they were delivered: since their oldest event was accepted
        self.ages = 0  # so many
        self.happened: Callable[..., None] = lambda *_what, **_detail: None  # set by whoever keeps what happened
        self.uncounted = 0  # events of successful requests that Mixpanel's count left out
        self._backlog = backlog
        self._spool = spool
        self._transport = transport
        self._pace = pace
        self._options = options
        self.archiver = Archiver(archive)
        self._names = names
        self._clock = clock
        self._max_batch_bytes = options.max_batch_bytes
        self._learned_until = math.inf  # loop time at which a learned cap is forgotten
        self._in_flight: set[asyncio.Task[None]] = set()
        self._answered = asyncio.Event()
        self._probe_at = 0.0  # loop time
        self._sent_at = -math.inf  # loop time of the last request
        self._asked_at = -math.inf  # of that, or of the last verdict of any kind
        self._retried: dict[int, Parcel] = {}  # those that were tried in vain and will be again, by their first segment
        self._understood_at: float | None = None  # loop time of the last success, in whole or in part
        self._blame = Blame()
        self._told = False  # the halt that lasts, or the last one
        self._told_at: deque[float] = deque(maxlen=_HALTS_TOLD)  # loop times, of the latest that were
        self._noted_at = -math.inf  # loop time at which a problem was logged
        self._noted = ""
        self._splits, self._splits_told_at = 0, -math.inf  # so many since they were told; loop time
        self._short_until = -math.inf  # loop time; till then a count that is short is believed: it was confirmed
        self._aside = Aside()

    @property
    def in_flight(self) -> int:
        """Requests that wait for their answer."""
        return len(self._in_flight)

    @property
    def success_age_s(self) -> float | None:
        """Seconds since Mixpanel last took a request, in whole or in part; None: not since the start."""
        return None if self._understood_at is None else asyncio.get_running_loop().time() - self._understood_at

    @property
    def asked_age_s(self) -> float | None:
        """Seconds since the last request left, or its answer came; None: there was none."""
        return None if math.isinf(self._asked_at) else asyncio.get_running_loop().time() - self._asked_at

    @property
    def set_aside(self) -> int:
        """Single events that are refused incomprehensibly, or fail though others are taken: tried again now and then."""
        return len(self._aside) + self._backlog.left

    @property
    def learned_batch_bytes(self) -> int | None:
        """What Mixpanel last said that a request may hold, in uncompressed bytes; None: nothing smaller than ours."""
        return None if math.isinf(self._learned_until) else self._max_batch_bytes

    @property
    def retrying(self) -> Retrying | None:
        """The oldest parcel that is tried again; None: there is none."""
        oldest = min(self._retried.values(), key=lambda parcel: parcel.segments[0].created_at, default=None)
        return None if oldest is None else Retrying(oldest.attempts, oldest.segments[0].created_at, len(self._retried))

    @property
    def in_vain(self) -> int:
        """Events that were tried in vain and wait to be tried again."""
        return sum(each.events for each in self._retried.values()) + self._backlog.left

    @property
    def in_vain_s(self) -> float:
        """Seconds for which something has been tried in vain, whatever else was taken; 0: nothing is."""
        since = [each.in_vain_since for each in self._retried.values() if each.in_vain_since is not None]
        return asyncio.get_running_loop().time() - min(since) if since else 0.0

    @property
    def pace(self) -> Any:
        """What the pace does now, for the metrics and the status."""
        return self._pace.snapshot(asyncio.get_running_loop().time())

    async def run(self) -> None:
        """Delivers until it is cancelled. A sender that dies of a bug takes the daemon down: start-up is recovery."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as senders:
            senders.create_task(self._try_aside(), name="aside")
            senders.create_task(self._ask(), name="ask")
            while True:
                parcel = await self._take()
                if loop.time() > self._learned_until:
                    self._forget()
                if parcel.raw_bytes > self._max_batch_bytes and parcel.events > 1:
                    # Mixpanel said meanwhile that it takes less.
                    self._retried.pop(parcel.segments[0].id, None)
                    parcel.scout = False  # parts of a segment travel alone
                    self._split(parcel, f"larger than {self._max_batch_bytes} bytes")
                    continue
                parcel, too_old = await self._may_go(parcel)
                if too_old:
                    self._expire(parcel, too_old, senders)
                    continue
                if self.halted is not None and len(parcel.segments) > 1:
                    # A probe is small: what it tells is worth one segment.
                    put_back = self._backlog.in_vain if parcel.scout else self._backlog.again
                    put_back(parcel.half(parcel.segments[1:]))
                    parcel = parcel.half(parcel.segments[:1])
                self._asked_at = self._sent_at = loop.time()
                attempt = self._pace.sent(self._sent_at, parcel.events, parcel.raw_bytes)
                task = senders.create_task(self._deliver(parcel, attempt), name="sender")
                self._in_flight.add(task)
                task.add_done_callback(self._landed)

    def _landed(self, task: "asyncio.Task[None]") -> None:
        self._in_flight.discard(task)
        self._answered.set()  # not sooner: who is woken asks what is in flight

    async def _take(self) -> Parcel:
        limits = (self._options.max_batch_events, self._max_batch_bytes, self._options.flush_interval_s)
        return await self._backlog.take(*limits, halted=self.halted is not None)

    async def _may_go(self, parcel: Parcel) -> tuple[Parcel, list[Segment]]:
        """Returns when the pace lets a parcel go; while halted, when it is time for a probe, or with what is too old of it.

        While halted another takes the parcel's place if it is too old: what was refused at once comes back in any order, and
        scouts are the newest. A probe goes first: what is too old is taken as well if the credential works again.
        """
        loop = asyncio.get_running_loop()
        while True:
            self._answered.clear()
            if self.halted is None:
                wait_s = self._pace.wait_s(loop.time(), parcel.events, parcel.raw_bytes)
            elif self._in_flight or loop.time() < self._probe_at:
                before = self._too_old_before()
                for parcel_aside in self._aside.take_older(before):
                    self._backlog.again(parcel_aside)
                limits = (self._options.max_batch_events, self._max_batch_bytes)
                if oldest := await self._backlog.exchange(parcel, before, *limits):
                    return oldest, [each for each in oldest.segments if each.created_at < before]
                wait_s = _HALTED_LOOK_S if self._in_flight else min(self._probe_at - loop.time(), _HALTED_LOOK_S)
            else:
                wait_s = 0.0
            if wait_s <= 0:
                # A probe, while halted: whatever comes of it, the next is due no sooner.
                self._probe_at = loop.time() + self._options.probe_interval_s
                return parcel, []
            try:
                async with asyncio.timeout(None if math.isinf(wait_s) else wait_s):
                    await self._answered.wait()
            except TimeoutError:
                pass

    async def _deliver(self, parcel: Parcel, attempt: Attempt) -> None:
        verdict: Verdict = Retry("network", "the request was cancelled")
        target, loop = self._transport.target, asyncio.get_running_loop()
        sent_at = loop.time()
        try:
            verdict = await self._transport.send(
                parcel.body(), parcel.events, lambda: segments.insert_ids(parcel.segments)
            )
        finally:
            # What an old address or credential is told says nothing about the new one.
            outdated = target != self._transport.target
            # What fails although others are taken is no reason for those to wait.
            its_own = isinstance(verdict, Retry) and verdict.after_s is None
            its_own = its_own and self._blame.spares_others(parcel, verdict, loop.time())
            unheard = its_own or (outdated and isinstance(verdict, Retry))
            self._pace.judged(loop.time(), attempt, None if unheard else verdict)
        first = parcel.segments[0]
        self._aside.answered(first.id)
        self._blame.heard(parcel, verdict, loop.time())
        self._asked_at = loop.time()
        self.verdicts[type(verdict).__name__.lower()] += 1
        match verdict:
            case Delivered(short) if short and not parcel.counted_short and loop.time() > self._short_until:
                # Mixpanel may have a reason; or it was the answer to something else. A repetition is harmless, and tells.
                parcel.counted_short = True
                self._backlog.again(parcel)
                if self.halted is not None:
                    self._resume(sent_at)
            case Delivered(short):
                if short:
                    if loop.time() > self._short_until:
                        log.warning(
                            "events_uncounted", events=short, of=parcel.events, hint="see the status's warnings"
                        )
                    self._short_until = loop.time() + _LEARNED_S
                self.uncounted += short
                self.age_sum_s += max(0.0, self._clock() - first.created_at)
                self.ages += 1
                self._retried.pop(first.id, None)
                self._resume(sent_at)
                self._backlog.settle(Settlement(parcel.segments, delivered=parcel.codes))
            case Reject(failures):
                self._retried.pop(first.id, None)
                self._resume(sent_at)
                self._reject(parcel, failures)
            case Halt() if outdated:
                self._backlog.again(parcel)
            case _:
                self._not_taken(parcel, verdict, outdated=outdated)

    def _too_old_before(self) -> float:
        """What was accepted before then, wall clock, is older than it may get while nothing can be delivered."""
        if self.halted is None or self._options.on_expiry == "keep" or not self.archiver.is_free:
            return -math.inf
        return self._clock() - self._options.max_age_s

    def _expire(self, parcel: Parcel, too_old: list[Segment], senders: asyncio.TaskGroup) -> None:
        """Archived or dropped, as configured. What is younger waits on."""
        first, gone = parcel.segments[0].id, {segment.id for segment in too_old}
        self._aside.answered(first)
        tried = self._retried.pop(first, None) is not None
        if younger := [segment for segment in parcel.segments if segment.id not in gone]:
            self._backlog.again(parcel.half(younger))
            parcel = parcel.half(too_old)
        if self._options.on_expiry == "archive":
            self.archiver.take(parcel.segments)
            senders.create_task(self._archive(parcel, tried=tried), name="archive")
        else:
            self._expired(parcel, "")

    async def _archive(self, parcel: Parcel, *, tried: bool) -> None:
        """Beside the dispatcher: the folder may hang. Until it answers nobody else has the parcel, nor does anything expire."""
        try:
            file = await self.archiver.write(self._options.probe_interval_s)
        except OSError:
            # Kept, then, and used for probes: a folder that can't be written is no reason to drop anything.
            if tried:
                self._retried[parcel.segments[0].id] = parcel
            self._backlog.again(parcel)
        else:
            self._expired(parcel, file)
        self._answered.set()

    def _expired(self, parcel: Parcel, file: str) -> None:
        codes = parcel.codes
        log.error("events_expired", events=len(codes), max_age_s=self._options.max_age_s, archived_as=file)
        fate = "archived" if file else "dropped"
        self.happened("expired", f"Events expired and were {fate}", "critical", events=len(codes), archived_as=file)
        self._backlog.settle(Settlement(parcel.segments, expired=codes))

    # -- one method a verdict -----------------------------------------------------------------------------------------

    def _reject(self, parcel: Parcel, failures: dict[int, Failure]) -> None:
        events, codes = segments.lines(parcel.segments), parcel.codes
        letters = [
            DeadLetter(codes[at], self._names(codes[at]), "mixpanel", _reason(failure), events[at])
            for at, failure in sorted(failures.items())
        ]
        delivered = bytes(code for at, code in enumerate(codes) if at not in failures)
        log.warning("events_rejected", events=len(letters), reason=letters[0].reason if letters else "")
        self._backlog.settle(Settlement(parcel.segments, delivered=delivered, dead_letters=letters))

    def _not_taken(self, parcel: Parcel, verdict: Split | Retry | Halt, *, outdated: bool) -> None:
        now = asyncio.get_running_loop().time()
        # What is refused is kept, with its history; while everything is, that would soon be the whole backlog.
        parcel.scout &= isinstance(verdict, Retry) or self.halted is not None
        fate = self._blame.fate(parcel, verdict, now, halted=self.halted is not None)
        if isinstance(verdict, Retry):
            self._note(f"{verdict.kind}: {verdict.reason}")
            if not outdated:
                self._probe_at = now + self._options.probe_interval_s
        elif isinstance(verdict, Halt) and fate == "halt":
            self._halt(verdict)
        elif self._blame.all_refused:
            self._halt(Halt(0, f"every request is refused, whatever is in it: {verdict.reason}"))
        elif fate == "aside":
            self._note(why_refused(parcel, verdict))
        if fate in ("split", "give up"):
            self._retried.pop(parcel.segments[0].id, None)
        elif fate == "aside" or (isinstance(verdict, Retry) and not parcel.scout):
            self._retried[parcel.segments[0].id] = parcel
        match fate:
            case "split":
                self._learn_from(parcel, verdict)
                self._split(parcel, why_refused(parcel, verdict))
            case "aside" if self._aside.is_full:
                self._backlog.leave(self._retried.pop(parcel.segments[0].id))
            case "aside":
                parcel.due_at = now + aside_s(parcel, verdict, self._options.probe_interval_s)
                self._aside.put(parcel)
            case "give up":
                self._give_up(parcel, why_refused(parcel, verdict))
            case "again" | "halt":
                self._backlog.in_vain(parcel)

    def _give_up(self, parcel: Parcel, reason: str) -> None:
        (event,), (code,) = segments.lines(parcel.segments), parcel.codes
        log.warning("event_rejected", reason=reason)
        letter = DeadLetter(code, self._names(code), "mixpanel", reason, event)
        self._backlog.settle(Settlement(parcel.segments, dead_letters=[letter]))

    def _split(self, parcel: Parcel, reason: str) -> None:
        """Tries the halves of a parcel: of its segments while it has several, whose ages differ, then of the events of one."""
        self.happened("split", f"A request was split: {reason}", events=parcel.events, raw_bytes=parcel.raw_bytes)
        now, what = asyncio.get_running_loop().time(), {"events": parcel.events, "raw_bytes": parcel.raw_bytes}
        log.debug("parcel_split", **what, reason=reason)
        self._splits += 1
        if now - self._splits_told_at >= _SPLITS_TOLD_S:
            log.info("parcels_split", parcels=self._splits, **what, reason=reason)
            self._splits, self._splits_told_at = 0, now
        if len(parcel.segments) > 1:
            half = len(parcel.segments) // 2
            self._backlog.first([parcel.half(parcel.segments[:half]), parcel.half(parcel.segments[half:])])
            return
        events, codes = segments.lines(parcel.segments), parcel.codes
        half = len(events) // 2
        parts = [Batch(b"\n".join([*events[at:to], b""]), codes[at:to]) for at, to in ((0, half), (half, len(events)))]
        self._backlog.settle(Settlement(parcel.segments, parts=parts, whole=parcel))

    async def _try_aside(self) -> None:
        """One of the events set aside asks now and then: there may be no other request whose success could tell."""
        while True:
            await asyncio.sleep(self._options.probe_interval_s)
            if self._aside:
                # By turns with others: while halted there is one request in the same time, and it must not always be this one.
                self._backlog.in_vain(self._aside.next())

    async def _ask(self) -> None:
        """Without an event to probe with, as when all have expired, a halt, or a doubt, asks all the same whether it is over."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_HALTED_LOOK_S)
            halted = self.halted or (self.doubtful and self._understood_at is None)
            # What is being archived nobody can probe with.
            if not halted or self._backlog.events > self.archiver.events or loop.time() < self._probe_at:
                continue
            self._sent_at = sent_at = loop.time()
            self._probe_at = sent_at + self._options.probe_interval_s
            target = self._transport.target
            verdict = await self._transport.ask()
            if isinstance(verdict, Delivered | Reject):
                self._resume(sent_at)
            elif isinstance(verdict, Halt) and target == self._transport.target:
                self._halt(verdict)

    def _learn_from(self, parcel: Parcel, verdict: Split | Retry | Halt) -> None:
        if isinstance(verdict, Split) and too_large(parcel, verdict):
            self._learn(verdict.max_bytes, parcel.raw_bytes)
        elif isinstance(verdict, Retry) and parcel.strikes and parcel.raw_bytes > _SMALLEST_GUESS_BYTES:
            self._learn(None, parcel.raw_bytes)

    def _learn(self, max_bytes: int | None, refused_bytes: int) -> None:
        """Makes requests smaller from now on: as the answer says, or half of what was refused if it says nothing useful."""
        if max_bytes is None or max_bytes >= refused_bytes:
            max_bytes = max(refused_bytes // 2, _SMALLEST_GUESS_BYTES)
        # One odd answer must not mean tiny requests for ever; below this a split finds the limit each time.
        max_bytes = max(max_bytes, SMALLEST_CAP_BYTES)
        if max_bytes < self._max_batch_bytes:
            log.warning("batch_cap_learned", max_bytes=max_bytes)
            self._max_batch_bytes = max_bytes
            self._learned_until = asyncio.get_running_loop().time() + _LEARNED_S
            self._spool.cut_at(max_bytes)

    def _forget(self) -> None:
        """Tries again what was too large a while ago."""
        log.info("batch_cap_forgotten", max_bytes=self._options.max_batch_bytes)
        self._max_batch_bytes = self._options.max_batch_bytes
        self._learned_until = math.inf
        self._spool.cut_at(self._max_batch_bytes)

    def _halt(self, verdict: Halt) -> None:
        now = asyncio.get_running_loop().time()
        self._probe_at = now + self._options.probe_interval_s
        if self.halted is None:
            self.halted_at, self._told = self._clock(), False
        if not self._told and (len(self._told_at) < _HALTS_TOLD or now - self._told_at[0] >= _HALTS_TOLD_S):
            self._told = True
            self._told_at.append(now)
            log.error("delivery_halted", status=verdict.status, reason=verdict.reason, waiting=self._backlog.events)
            self.happened("halted", f"Delivery halted: {verdict.reason}", "critical", status=verdict.status)
        self.halted = verdict
        self._note(verdict.reason)

    def _resume(self, sent_at: float) -> None:
        self.delivered_at = self._clock()
        self._understood_at = now = asyncio.get_running_loop().time()
        self._blame.taken(sent_at)
        self.last_problem = ""
        self.archiver.forget()
        for parcel in self._aside.due(now, self._pace.concurrency):
            self._backlog.in_vain(parcel)
        if self._aside.has_room:
            self._backlog.come_back()
        if self.halted is not None:
            halted = {"halted_s": round(self._clock() - (self.halted_at or 0)), "waiting": self._backlog.events}
            if self._told:
                log.info("delivery_resumed", **halted)
                self.happened("resumed", "Delivery resumed", **halted)
            self.halted = self.halted_at = None
            self._answered.set()

    def _note(self, problem: str) -> None:
        now = asyncio.get_running_loop().time()
        again = problem == self._noted
        due = not (again and problem == self.last_problem)
        if due and now - self._noted_at >= (_SAME_PROBLEM_S if again else _OTHER_PROBLEM_S):
            log.warning("delivery_impeded", reason=problem)
            self._noted, self._noted_at = problem, now
        self.last_problem = problem

    def credentials_changed(self) -> None:
        """Asks soon, if not at once, whether the credential works now: the transport has another."""
        now = asyncio.get_running_loop().time()
        self._probe_at = min(self._probe_at, max(now, self._sent_at + _EARLY_PROBE_S))
        self._pace.ask_again(self._probe_at)  # whoever said how long to wait may be somebody else
        self._answered.set()

    def use(self, options: DeliveryOptions, limits: PaceLimits, archive: Archive) -> None:
        """Other options and ceilings from now on; `max_batch_events` and `max_batch_bytes` are those of the start."""
        now = asyncio.get_running_loop().time()
        self._options = options
        self.archiver.use(archive)
        self._pace.limit_to(limits)
        self._probe_at = min(self._probe_at, now + options.probe_interval_s)
        self._answered.set()

    async def drain(self, grace_s: float) -> None:
        """Gives requests in flight, and what is waiting, so much time; the rest stays in the spool."""
        self._backlog.flush()
        loop = asyncio.get_running_loop()
        until = loop.time() + grace_s
        while loop.time() < until and self.halted is None:
            idle = (
                self._backlog.events <= self.set_aside + self.archiver.events
                or loop.time() + self.pace.backing_off_s > until
            )
            if idle and not self._in_flight:
                break  # nothing more would be sent
            await asyncio.sleep(0.01)
        await self.archiver.end(grace_s)


def _reason(failure: Failure) -> str:
    return f"{failure.field}: {failure.message}" if failure.field else failure.message
