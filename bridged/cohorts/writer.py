"""What leaves for Braze: takes who is due, writes, judges the answers, keeps the pace, settles.

One dispatcher owns the order, each request in flight is a task of its own, and no user is in two of them at once: Braze
doesn't promise to carry requests out in order. For a verdict there is one way on:

    Delivered   settled
    Reject      settled; the refused ones are kept with Braze's words, and tried again when somebody says so
    Split       its halves, one after the other; a single user who is refused is a Reject
    Retry       put back: later, whoever is due then, as Mixpanel wants them then; one user, then twice as many each time
    Halt        put back; one user a minute asks whether the key works again

It may be what is in a request that Braze, or a firewall before it, fails at: a 403 is narrowed down, too, and a user who only
ever failed alone, while others were taken in between, is refused.

With a REST key a user is written as a whole: the array attribute of all names, one data point. With a partner key it is
told who joins and who leaves which cohort, and of a cohort's name before its first members.
"""

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import structlog
from msgspec import Struct

from bridged.braze import requests
from bridged.braze.requests import Request
from bridged.braze.transport import Outcome, Transport
from bridged.cohorts.membership import Membership
from bridged.cohorts.pace import Pace
from bridged.cohorts.strikes import REFUSALS, STRIKES, Strikes, Turns
from bridged.cohorts.taking import Block, Parcel, Row, Settled, User
from bridged.errors import MembershipError
from bridged.mixpanel.verdicts import Delivered, Halt, Reject, Retry, Split

log = structlog.get_logger()

# A changed key is tried before the next probe is due, but never sooner than so long after the last one.
_EARLY_PROBE_S: Final = 2.0
# While the day's points are spent: so often somebody looks whether there is another day.
_LOOK_S: Final = 10.0
# So many requests, or users, refused without one success in between: it isn't they who are wrong.
_IN_VAIN_TO_HALT: Final = 50
_PUT_BACK_S: Final = 1.0


class WriterOptions(Struct, frozen=True, kw_only=True):
    """How users are written, and how often a halt is probed."""

    attribute: str = "mixpanel_cohorts"
    update_existing_only: bool = True
    probe_interval_s: float = 60.0


class CohortWriter:
    """The dispatcher and its senders. Owns the pace, the halt, and who is in flight."""

    def __init__(
        self,
        membership: Membership,
        transport: Transport,
        pace: Pace,
        options: WriterOptions,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.halted: Halt | None = None
        self.halted_at: float | None = None  # wall clock
        self.problem = ""  # the last words that were no success
        self.verdicts: Counter[str] = Counter()
        self.requests = 0
        self.users_sent = 0  # with a partner key: users times cohorts
        self.points_spent = 0  # on those, since the start
        self.unknown_users = 0  # that Braze's counts left out: perhaps it doesn't know them
        self.delivered_at: float | None = None  # wall clock
        self.pace = pace
        self._membership = membership
        self._transport = transport
        self._options = options
        self._clock = clock
        self._news = asyncio.Event()  # something landed, or may be due
        self._ready: list[Parcel] = []
        self._busy: Counter[int] = Counter()  # parcels by user: those that are taken and not settled
        self._in_flight: set[asyncio.Task[None]] = set()
        self._after = -1  # the key behind which the next block begins
        self._probe_at = 0.0  # loop time
        self._sent_at = 0.0  # loop time of the last request
        self._in_vain = 0  # users refused, and answers 403, since the last success
        self._strikes = Strikes()
        self._turns = Turns()
        self._most = requests.MAX_IDS  # users a request: small after a failure, which may be one of size or time
        self._capped = False  # there was nobody to take: the day's points are spent
        self._stopping = False
        membership.changed = self._news.set

    @property
    def in_flight(self) -> int:
        """Requests that wait for their answer."""
        return len(self._in_flight)

    @property
    def failing_s(self) -> float:
        """Seconds since the first of the failures without a success between them; 0: the last request didn't fail."""
        return asyncio.get_running_loop().time() - self.pace.failing_since_s if self.pace.failures else 0.0

    @property
    def state(self) -> str:
        """One of: idle | sending | backing off | halted | capped."""
        if self.halted is not None:
            return "halted"
        figures = self._membership.figures
        # Before the backoff: when that is over, nothing goes either.
        if self._capped and figures.points_left_today == 0 and figures.due and not self._busy:
            return "capped"
        if self.pace.failures or (figures.due and self.pace.is_spent(asyncio.get_running_loop().time())):
            return "backing off"
        return "sending" if figures.due or self._in_flight else "idle"

    def use(self, options: WriterOptions, max_concurrency: int) -> None:
        """Other options, from the next request on."""
        self._options = options
        self.pace.max_concurrency = max_concurrency
        self._news.set()

    def credentials_changed(self) -> None:
        """Another key is in force: if we are halted, it is tried now."""
        self._probe_at = min(self._probe_at, self._sent_at + _EARLY_PROBE_S)
        self._news.set()

    async def run(self) -> None:
        """Writes until it is cancelled. A sender that dies of a bug takes the daemon down: start-up is recovery."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as senders:
            while True:
                self._news.clear()
                wait_s = self._wait_s(loop.time())
                if wait_s <= 0 and not self._stopping and (self._ready or await self._filled()):
                    # Braze may have said something meanwhile.
                    if self._wait_s(loop.time()) <= 0:
                        self._send(senders, self._ready.pop(0))
                    continue
                if wait_s <= 0:
                    wait_s = _LOOK_S
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(wait_s, _LOOK_S)):
                        await self._news.wait()

    def _wait_s(self, now_s: float) -> float:
        wait_s = self.pace.wait_s(now_s, len(self._in_flight))
        if self.halted is not None:
            return max(wait_s, self._probe_at - now_s, math.inf if self._in_flight else 0.0)
        return wait_s

    def _send(self, senders: asyncio.TaskGroup, parcel: Parcel) -> None:
        self._sent_at = asyncio.get_running_loop().time()
        self._probe_at = self._sent_at + self._options.probe_interval_s
        task = senders.create_task(self._deliver(parcel), name="cohort sender")
        self._in_flight.add(task)
        task.add_done_callback(self._landed)

    def _landed(self, task: "asyncio.Task[None]") -> None:
        self._in_flight.discard(task)
        self._news.set()

    async def drain(self, grace_s: float) -> None:
        """Takes nothing new; returns when nothing is in flight, or after the grace."""
        self._stopping = True
        loop = asyncio.get_running_loop()
        until = loop.time() + grace_s
        while loop.time() < until and self._in_flight:
            await asyncio.sleep(0.01)
        # Charged and noted as perhaps known to Braze: harmless if the disk doesn't take it, and nobody waits for it then.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PUT_BACK_S):
                await self._put_back_ready()

    # -- taking -------------------------------------------------------------------------------------------------------

    async def _filled(self) -> bool:
        """The same, and no on a full disk."""
        try:
            return await self._fill()
        except MembershipError as error:
            if self._membership.failed:
                raise
            if self.problem != error.args[0]:
                log.error("cohorts_untaken", error=error.args[0])
            self.problem = error.args[0]
            return False

    async def _fill(self) -> bool:
        """Takes the next block and cuts it into parcels; whether there is any."""
        membership = self._membership
        trying = self.halted is not None or self.pace.failures > 0
        free = self.pace.max_concurrency - len(self._in_flight)
        if not (membership.options.by_name or await self._announced()) or not membership.figures.due:
            return False
        per_request = min(self._most, requests.MAX_OBJECTS if membership.options.by_name else requests.MAX_IDS)
        limit = 1 if trying else per_request * free
        # While some are being taken nobody is busy yet, and points that had come back may be spent again.
        self._capped = self._capped and membership.figures.points_left_today == 0
        resting = [] if self.halted else self._strikes.resting(asyncio.get_running_loop().time())
        block = await membership.take(self._after, limit, [*self._busy, *resting])
        self._after = block.last if block.users else -1
        self._capped = not block.users and membership.figures.points_left_today == 0
        self._ready = list(self._parcels(block, per_request))
        self._busy.update(user.key for parcel in self._ready for user in parcel.users)
        return bool(self._ready)

    def _parcels(self, block: Block, per_request: int) -> Iterator[Parcel]:
        if self._membership.options.by_name:
            for at in range(0, len(block.users), per_request):
                yield Parcel(block.users[at : at + per_request], block)
            return
        by_cohort: dict[int, list[User]] = {}
        for user in block.users:
            for row in user.rows:
                by_cohort.setdefault(row.cohort, []).append(User(user.key, user.external_id, (row,)))
        for cohort, users in by_cohort.items():
            for at in range(0, len(users), per_request):
                yield Parcel(users[at : at + per_request], block, block.cohorts[cohort])

    async def _announced(self) -> bool:
        """Tells Braze the names that it doesn't know; whether anybody may go. Whose name isn't taken keeps back nobody else."""
        loop, refused = asyncio.get_running_loop(), dict[str, Halt]()
        unknown = {cohort.mixpanel_id: cohort for cohort in (await self._membership.unannounced()).values()}
        due = {row.cohort for row in self._membership.rows if row.joining + row.leaving}
        for id_ in self._turns.next(unknown, due, loop.time()):
            cohort = unknown[id_]
            self._sent_at = loop.time()
            self._probe_at = self._sent_at + self._options.probe_interval_s
            request = requests.announce(self._transport.target, id_, cohort.name, cohort.created_at)
            verdict = (await self._ask(request)).verdict
            self._turns.told(id_, loop.time(), taken=isinstance(verdict, Delivered))
            match verdict:
                case Delivered():
                    await self._membership.announced(cohort)
                    self._resume()
                case Reject(failures):
                    what = f"Braze doesn't take the cohort {id_} ({cohort.name})"
                    refused[id_] = Halt(400, f"{what}: {failures[0].message}")
                case Retry("locked"):
                    pass
                case Halt(403) if self.delivered_at and self.halted is None and due - self._turns.failing:
                    pass  # a firewall's, perhaps, about this name; if it is about the key, the next request meets it
                case _:
                    if isinstance(verdict, Halt):
                        self._halt(verdict)
                    return False
        why = next(iter(refused.values()), None)
        if why is not None:
            self.problem = why.reason
            if not due - self._turns.failing:
                self._halt(why)
                return False
        return True

    # -- sending ------------------------------------------------------------------------------------------------------

    async def _deliver(self, parcel: Parcel) -> None:
        result = Settled(day=parcel.block.day)
        try:
            await self._write(parcel, result)
            if result.reasons:
                log.warning("users_rejected", users=len(result.reasons), reason=result.reasons[0][1])
            await self._membership.settle(result)
        finally:
            self._release(parcel.users)

    def _release(self, users: Sequence[User]) -> None:
        for user in users:
            self._busy[user.key] -= 1
            if not self._busy[user.key]:
                del self._busy[user.key]

    async def _write(self, parcel: Parcel, result: Settled) -> None:
        """Sends a parcel and adds what became of it to the result."""
        parcel = self._without_hopeless(parcel, result)
        if not parcel.users:
            return
        target = self._transport.target
        outcome = await self._ask(self._request(parcel))
        verdict = outcome.verdict
        outdated = target is not self._transport.target
        match verdict:
            case Delivered(short):
                self._took(parcel, {}, result)
                self.unknown_users += short
            case Reject(failures, short) if len(failures) < len(parcel.users):
                self._took(parcel, {at: failure.message for at, failure in failures.items()}, result)
                self.unknown_users += short
            case Reject(failures):
                self._refused(parcel, {at: failure.message for at, failure in failures.items()}, result)
            case Split(perhaps_in=perhaps_in):
                if perhaps_in:
                    result.refund -= len(parcel.users)
                    parcel.users = [user.perhaps_in() for user in parcel.users]
                await self._write_halves(parcel, result)
            case Retry(kind, reason):
                # Whether it was carried out can't be known, but of what was over a rate limit, or locked, or never left.
                if kind in ("rate", "locked") or not outcome.left:
                    self._back(parcel, result)
                else:
                    self._most = 1
                    if len(parcel.users) == 1 and self._strike(parcel.users[0]) >= STRIKES:
                        self._refuse(parcel, {0: reason}, result)
                        result.refund -= 1
            case Halt(403) if len(parcel.users) > 1 and not (self.halted or self._all_in_vain) and self.delivered_at:
                self._in_vain += 1
                await self._write_halves(parcel, result)
            case Halt(status, reason):
                self._most = 1
                self._in_vain += 1
                strikes = self._strike(parcel.users[0]) if status == 403 and len(parcel.users) == 1 else 0
                if strikes >= STRIKES:
                    self._refuse(parcel, {0: reason}, result)
                    return
                if not outdated and (not strikes or self._all_in_vain):
                    self._halt(verdict)
                self._back(parcel, result)

    async def _write_halves(self, parcel: Parcel, result: Settled) -> None:
        for half in parcel.halves():
            if self.halted is None and not self.pace.failures:
                await self._write(half, result)
            else:
                self._back(half, result)

    def _strike(self, user: User, *, sure: bool = False) -> int:
        return self._strikes.count(user.key, asyncio.get_running_loop().time(), sure=sure)

    def _refused(self, parcel: Parcel, failures: dict[int, str], result: Settled) -> None:
        """All of them were refused. Whether each for itself is known when Braze says so again a while later."""
        if self.halted is not None and self.halted.status:
            self._resume()  # in its own words, to a key and an address that are good
        self._in_vain += sum(not self._strikes.knows(parcel.users[at].key) for at in failures)
        if self._all_in_vain or self.halted is not None:
            self._halt(Halt(0, f"Braze refuses every user, whoever it is: {failures[0]}"))
            self._strikes.clear()
            self._back(parcel, result)
            return
        own = {at: why for at, why in failures.items() if self._strike(parcel.users[at], sure=True) >= REFUSALS}
        self._refuse(parcel, own, result)
        others = [user for at, user in enumerate(parcel.users) if at not in own]
        self._back(Parcel(others, parcel.block, parcel.cohort), result)

    @property
    def _all_in_vain(self) -> bool:
        return self._in_vain >= _IN_VAIN_TO_HALT

    async def _ask(self, request: Request) -> Outcome:
        """Sends a request; the pace and the books know of it."""
        loop = asyncio.get_running_loop()
        sent_at = self.pace.sent(loop.time())
        self.requests += 1
        outcome = await self._transport.send(request)
        verdict = outcome.verdict
        self.verdicts[type(verdict).__name__.lower()] += 1
        self.pace.told(loop.time(), outcome.rate_limit, max(0, len(self._in_flight) - 1))
        if isinstance(verdict, Retry):
            self.pace.failed(loop.time(), sent_at, f"{verdict.kind}: {verdict.reason}", verdict.after_s)
            if self.problem != verdict.reason:
                log.warning("braze_retry", kind=verdict.kind, reason=verdict.reason)
            self.problem = verdict.reason
            await self._put_back_ready()
        elif isinstance(verdict, Halt):
            self.problem = verdict.reason
            await self._put_back_ready()
        else:
            self.pace.succeeded(sent_at)
            if self.pace.is_spent(loop.time()):
                self.problem = "Braze's rate limit is used up until its window ends"
        return outcome

    def _request(self, parcel: Parcel) -> Request:
        options = self._options
        if parcel.cohort is None:
            users = [(user.external_id, _names(user, parcel.block)) for user in parcel.users]
            return requests.track(users, options.attribute, update_existing_only=options.update_existing_only)
        # In the order of the request: those that join come first.
        parcel.users.sort(key=lambda user: not user.rows[0].wanted)
        joining = [user.external_id for user in parcel.users if user.rows[0].wanted]
        leaving = [user.external_id for user in parcel.users if not user.rows[0].wanted]
        return requests.change_members(self._transport.target, parcel.cohort.mixpanel_id, joining, leaving)

    def _without_hopeless(self, parcel: Parcel, result: Settled) -> Parcel:
        """Those whom Braze surely refuses are refused here."""
        if parcel.cohort is not None:
            return parcel
        hopeless = {
            at: why
            for at, user in enumerate(parcel.users)
            if (why := requests.refusal((user.external_id, _names(user, parcel.block))))
        }
        if hopeless:
            self._refuse(parcel, hopeless, result)
            users = [user for at, user in enumerate(parcel.users) if at not in hopeless]
            return Parcel(users, parcel.block)
        return parcel

    # -- what became of it --------------------------------------------------------------------------------------------

    def _took(self, parcel: Parcel, failures: dict[int, str], result: Settled) -> None:
        """Braze has all but the failures."""
        self._resume()
        self._in_vain = 0
        self._strikes.took_s = self._turns.took_s = asyncio.get_running_loop().time()
        self._most = max(self._most, min(2 * len(parcel.users), requests.MAX_IDS))
        self.delivered_at = self._clock()
        self.users_sent += len(parcel.users) - len(failures)
        self.points_spent += len(parcel.users) - len(failures)
        for at, user in enumerate(parcel.users):
            self._strikes.forget(user.key)
            if at not in failures:
                result.sent += [(user.key, row.cohort, self._version(parcel, row)) for row in user.rows if row.is_due]
        if failures:
            self._refuse(parcel, failures, result)

    def _version(self, parcel: Parcel, row: Row) -> int:
        """What Braze has now of a row: the version of the name that was sent, 1 where names don't matter, 0 when it is out."""
        if not row.wanted:
            return 0
        return parcel.block.cohorts[row.cohort].version if parcel.cohort is None else 1

    def _refuse(self, parcel: Parcel, failures: dict[int, str], result: Settled) -> None:
        for at, why in failures.items():
            user = parcel.users[at]
            self._strikes.forget(user.key)
            result.refused += [(user.key, row.cohort, row.sent, row.wanted) for row in user.rows if row.is_due]
            result.reasons.append((user.key, why))
        result.refund += len(failures)
        # It keeps nobody else back; a rate limit that is used up does, and is said.
        if not self.pace.is_spent(asyncio.get_running_loop().time()):
            self.problem = next(iter(failures.values()), self.problem)

    def _back(self, parcel: Parcel, result: Settled) -> None:
        """Nothing of it was carried out."""
        for user in parcel.users:
            result.back += [(user.key, row.cohort, row.sent) for row in user.rows if row.is_due]
        result.refund += len(parcel.users)

    async def _put_back_ready(self) -> None:
        """What was taken and hasn't left goes back: when it is tried again, Mixpanel may want something else."""
        ready, self._ready = self._ready, []
        for parcel in ready:
            result = Settled(day=parcel.block.day)
            self._back(parcel, result)
            try:
                await self._membership.settle(result)
            finally:
                self._release(parcel.users)

    def _halt(self, why: Halt) -> None:
        self.problem = why.reason
        self._probe_at = asyncio.get_running_loop().time() + self._options.probe_interval_s
        if self.halted is None:
            self.halted_at = self._clock()
            log.error("braze_halted", status=why.status, reason=why.reason)
        self.halted = why

    def _resume(self) -> None:
        if self.halted is not None:
            log.info("braze_resumed", after_s=round(self._clock() - (self.halted_at or 0)))
        self.halted = self.halted_at = None


def _names(user: User, block: Block) -> list[str]:
    """The names of all cohorts that the user is to be in, in order, each once."""
    return sorted({block.cohorts[row.cohort].name for row in user.rows if row.wanted})
