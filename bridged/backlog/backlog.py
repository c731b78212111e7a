"""What waits, as one ordered queue: the oldest segments in memory (the ring), the rest behind them on disk.

    committed by the spool ->  [ ring: oldest, in memory ] [ on disk only: newer ]  -> take -> leased -> settle

A new segment goes into the ring if everything before it is there and it fits; else it is read back when the ring has room.
Start-up is the same with an empty ring, and so are an overflow and an outage: all that is on disk comes by `_refill`, in
order. What was just committed takes a shorter way, by `_append` into the ring, or, as parts of what was split, leased at once.
Leases live in memory only: after a crash every row waits again, and Mixpanel knows a repetition by its `$insert_id`.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple

from msgspec import Struct

from bridged.backlog.segment import Segment, request_body
from bridged.backlog.spool import Settlement, Spool

# What is settled and can't be committed stays in memory: beyond so much, nothing new is leased.
_MAX_UNSETTLED_BYTES: Final = 32 * 2**20
# What is tried again lets others go before it, by turns. Is so much of it in memory, they are scouts: in an outage everything
# is tried again.
_MAX_LEASED_BYTES: Final = 8 * 2**20
# Halves of what was split go before everything; but after so many of them others have a turn. All of them may be refused.
_FIRST_IN_A_ROW: Final = 8


class Parcel(Struct, eq=False):
    """Segments that travel in one request: what is leased, sent, tried again and settled as one."""

    segments: list[Segment]
    attempts: int = 0  # in vain, also of what it is a half of
    strikes: int = 0  # those of them before which others were taken: then it isn't the road that is to blame
    refusals: int = 0  # those of the strikes that weren't mere failures
    in_vain_at: float | None = None  # loop time of the last of them
    in_vain_since: float | None = None  # loop time of the first, also of what it is a half of
    due_at: float = 0.0  # loop time; of a single event that was set aside
    counted_short: bool = False  # a success counted fewer events: it is sent once more
    again: bool = False  # it was tried in vain as it is
    scout: bool = False  # sent to see whether others are taken; tried in vain, it waits in the ring as before

    def half(self, segments: list[Segment]) -> "Parcel":
        """A part of it, which has its history."""
        history = (self.attempts, self.strikes, 0, self.in_vain_at, self.in_vain_since)
        return Parcel(segments, *history, scout=self.scout)

    @property
    def events(self) -> int:
        """How many events it holds."""
        return sum(len(segment.codes) for segment in self.segments)

    @property
    def raw_bytes(self) -> int:
        """Uncompressed bytes: what Mixpanel counts."""
        return sum(segment.raw_bytes for segment in self.segments)

    @property
    def codes(self) -> bytes:
        """The types of its events, one byte each, in order."""
        return b"".join(segment.codes for segment in self.segments)

    def body(self) -> bytes:
        """The gzip NDJSON to send."""
        return request_body(self.segments)


def _accepted_at(parcel: Parcel) -> float:
    return min(segment.created_at for segment in parcel.segments)


class Ring(NamedTuple):
    """How much of the backlog is in memory."""

    segments: int
    bytes: int
    leased: int  # segments


class Backlog:
    """The queue between intake and delivery. The ring and the leases are its own; what is on disk is the spool's."""

    def __init__(self, spool: Spool, ring_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self._spool = spool
        self._clock = clock
        self._ring: deque[Segment] = deque()
        self._ring_capacity = ring_bytes
        self._turned = False  # it isn't in order: scouts went back into it
        self._ring_size = 0  # bytes
        self._ring_events = 0
        self._ring_raw_bytes = 0
        # Parts have new ids, and are as old as what they are parts of: those in the ring that are older than others before them.
        self._older: dict[int, Segment] = {}
        self._newest_at = -math.inf  # in the ring
        # The newest segment that is, or was, in the ring: what comes after it is on disk only.
        self._read_to = 0
        self._leased: dict[int, Segment] = {}
        self._leased_bytes = 0
        # Leased parcels that come before everything: halves of what was split, and what was held back.
        self._again: deque[Parcel] = deque()
        # Leased parcels that were tried in vain. Others get their turn beside them: two requests that are never understood,
        # and are never given up, would stop everything.
        self._in_vain: deque[Parcel] = deque()
        self._passed_over = False  # they: somebody else had his turn last
        self._firsts = 0  # of `_again`, in a row
        # Parts that lie after `_read_to`: when it gets there, they were taken long ago.
        self._ahead: set[int] = set()
        # What was left on disk although it was read: how many segments, the first of them, and when the oldest was accepted.
        self.left = 0
        self._left_from = self._left_at = math.inf
        self._returning = False
        self._changed = asyncio.Event()
        self._flushing = False
        spool.committed = self._append
        spool.parted = self._append_parts
        spool.settled = self._changed.set

    def __repr__(self) -> str:
        return (
            f"<Backlog {len(self._ring)} in the ring, {self.on_disk} on disk only, {len(self._leased)} leased, "
            f"{self.events} events>"
        )

    @property
    def events(self) -> int:
        """Events that wait, those in flight included."""
        return self._spool.accounts.total("waiting")

    @property
    def on_disk(self) -> int:
        """Segments that are on disk only: an upper bound, ids of split segments leave gaps."""
        return max(0, self._spool.segments - len(self._ring) - len(self._leased))

    @property
    def ring(self) -> Ring:
        """What of it is in memory, for the metrics."""
        return Ring(len(self._ring), self._ring_size, len(self._leased))

    def oldest_at(self) -> float | None:
        """When the oldest waiting event was accepted, wall clock; None if nothing waits or it isn't known yet."""
        heads = [segment.created_at for segment in self._leased.values()]
        if self._ring:
            heads.append(self._oldest_in_ring().created_at)
        if self.left:
            heads.append(self._left_at)
        return min(heads, default=None)

    def _append(self, segments: Sequence[Segment]) -> None:
        for segment in segments:
            everything_before = self._read_to == segment.id - 1
            if everything_before and self._ring_size + segment.size <= self._ring_capacity:
                self._push(segment)
            else:
                break
        self._changed.set()

    def _append_parts(self, segments: Sequence[Segment], wholes: Sequence[Parcel | None]) -> None:
        """Each part travels alone: joined again, parts would be what was just refused, for ever."""
        for segment in segments:
            self._lease_one(segment)
            if self._read_to == segment.id - 1:
                self._read_to = segment.id
            else:
                self._ahead.add(segment.id)
        whole_of = zip(segments, wholes, strict=True)
        self.first([whole.half([segment]) if whole else Parcel([segment]) for segment, whole in whole_of])

    def _push(self, segment: Segment) -> None:
        self._ring.append(segment)
        self._count(segment, 1)
        self._read_to = segment.id

    def _count(self, segment: Segment, sign: Literal[1, -1]) -> None:
        self._ring_size += sign * segment.size
        self._ring_events += sign * len(segment.codes)
        self._ring_raw_bytes += sign * segment.raw_bytes
        if sign < 0:
            self._older.pop(segment.id, None)
        elif segment.created_at < self._newest_at:
            self._older[segment.id] = segment
        else:
            self._newest_at = segment.created_at

    def _oldest_in_ring(self) -> Segment:
        return min((self._ring[0], *self._older.values()), key=lambda segment: segment.created_at)

    def _pop(self, at: int) -> Segment:
        segment = self._ring[at]
        del self._ring[at]
        self._count(segment, -1)
        self._lease_one(segment)
        return segment

    def _lease_one(self, segment: Segment) -> None:
        self._leased[segment.id] = segment
        self._leased_bytes += segment.size

    def _give_back(self, segment: Segment) -> None:
        if self._leased.pop(segment.id, None) is not None:
            self._leased_bytes -= segment.size

    @property
    def _behind(self) -> bool:
        """Whether there are segments after the ring."""
        return self._read_to < self._spool.last_id

    async def _refill(self) -> None:
        """Reads what comes after the ring, until it is full or everything is in it."""
        room = max(self._ring_capacity - self._ring_size, 1)
        segments, read_to = await self._spool.read_after(self._read_to, room, but=self._ahead)
        for segment in segments:
            self._push(segment)
        self._read_to = read_to
        self._ahead = {id_ for id_ in self._ahead if id_ > read_to}

    async def take(self, max_events: int, max_bytes: int, flush_interval_s: float, *, halted: bool = False) -> Parcel:
        """Leases the oldest segments that fill one request, or what there is once it has waited for `flush_interval_s`.

        Before it come halves of what was split, and by turns with it what was tried in vain. Waits until there is something, and
        as long as too much that was settled isn't committed. Is much in memory that was tried in vain, as all is while `halted`,
        what was never taken comes as a scout. A segment larger than the limits comes alone; events are never reordered within it.
        """
        while True:
            self._changed.clear()
            if parcel := self._put_back():
                return parcel
            due_s = await self._due_s(max_events, max_bytes, flush_interval_s)
            if due_s <= 0:
                self._passed_over = True
                much = self._leased_bytes >= _MAX_LEASED_BYTES
                return self._lease(max_events, max_bytes, scout=much and (halted or bool(self._in_vain)))
            if self._in_vain:
                return self._in_vain.popleft()
            if self._again:
                return self._again.pop()  # from the other end: what is first may be all that is bad
            await self._wait(due_s)

    def _put_back(self) -> Parcel | None:
        """What of that which was taken before has its turn now, though something else may be due."""
        if self._again and self._firsts < _FIRST_IN_A_ROW:
            self._firsts += 1
            return self._again.popleft()
        self._firsts = 0
        if self._passed_over:
            self._passed_over = False
            return self._in_vain.popleft() if self._in_vain else None
        return None

    async def _due_s(self, max_events: int, max_bytes: int, flush_interval_s: float) -> float:
        """Seconds until what was never taken may go: when it fills a request, or has waited. Infinite: there is nothing."""
        while self._spool.unsettled_bytes <= _MAX_UNSETTLED_BYTES:
            self._return()
            if self._behind and not self._fills(max_events, max_bytes):
                await self._refill()
            if self._ring:
                age_s = self._clock() - self._ring[0].created_at
                # A clock that was set back must not make anybody wait until it is there again.
                at_once = age_s < 0 or self._flushing or self._fills(max_events, max_bytes)
                return 0.0 if at_once else flush_interval_s - age_s
            if not self._behind:
                break
        return math.inf

    def _fills(self, max_events: int, max_bytes: int) -> bool:
        return self._ring_events >= max_events or self._ring_raw_bytes >= max_bytes

    def _lease(self, max_events: int, max_bytes: int, *, scout: bool) -> Parcel:
        """The oldest that fill a request; for a scout the newest: what is old may be more of what fails."""
        if not scout:
            self._in_order()
        at = -1 if scout else 0
        segments = [self._pop(at)]
        events, raw_bytes = len(segments[0].codes), segments[0].raw_bytes
        while self._ring:
            head = self._ring[at]
            events += len(head.codes)
            raw_bytes += head.raw_bytes
            if events > max_events or raw_bytes > max_bytes:
                break
            segments.append(self._pop(at))
        return Parcel(segments[::-1] if scout else segments, scout=scout)

    def _in_order(self) -> None:
        if self._turned:
            self._ring, self._turned = deque(sorted(self._ring, key=lambda segment: segment.id)), False

    async def _wait(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(None if math.isinf(seconds) else seconds):
                await self._changed.wait()
        except TimeoutError:
            pass

    def settle(self, settlement: Settlement) -> None:
        """Gives leases back for good: each segment is delivered, dead-lettered, expired or replaced by its parts."""
        for segment in settlement.segments:
            self._give_back(segment)
        self._spool.settle(settlement)

    def again(self, parcel: Parcel) -> None:
        """Puts a parcel that was taken back: `take` gives it, as it is, before what was never taken."""
        self._again.append(parcel)
        self._changed.set()

    def first(self, parcels: Sequence[Parcel]) -> None:
        """Puts the halves of a parcel before everything: so what is refused for what is in it is soon alone."""
        self._again.extendleft(reversed(parcels))
        self._changed.set()

    def in_vain(self, parcel: Parcel) -> None:
        """Puts back what was tried in vain: `take` gives it by turns with others. A scout goes back into the ring."""
        if parcel.scout:
            # At the end from which scouts aren't taken: the next one is another, until all have been.
            self._turned = True
            for segment in reversed(parcel.segments):
                self._give_back(segment)
                self._ring.appendleft(segment)
                self._count(segment, 1)
        else:
            self._in_vain.append(parcel)
        self._changed.set()

    async def exchange(self, parcel: Parcel, before: float, max_events: int, max_bytes: int) -> Parcel | None:
        """Takes the oldest of what is in memory, if it was accepted before then, and puts back a parcel that was taken.

        It may be the same one. None: nothing is so old.
        """
        self._returning |= self._left_at < before
        self._return()
        if self._behind and not self._ring:
            await self._refill()
        self._in_order()
        oldest = min((parcel, *self._again, *self._in_vain), key=_accepted_at)
        in_ring = self._oldest_in_ring() if self._ring else None
        in_ring_at = math.inf if in_ring is None else in_ring.created_at
        if min(in_ring_at, _accepted_at(oldest)) >= before:
            return None
        if in_ring is not None and in_ring_at < _accepted_at(oldest):
            if in_ring is self._ring[0]:
                oldest = self._lease(max_events, max_bytes, scout=False)
            else:
                oldest = Parcel([self._pop(self._ring.index(in_ring))])
        elif oldest is parcel:
            return parcel
        else:
            (self._again if oldest in self._again else self._in_vain).remove(oldest)
        self._again.append(parcel)
        return oldest

    def leave(self, parcel: Parcel) -> None:
        """Gives a lease back, and leaves the segments on disk: they are neither given nor in memory until `come_back`."""
        for segment in parcel.segments:
            self._give_back(segment)
            self.left += 1
            self._left_from = min(self._left_from, segment.id)
            self._left_at = min(self._left_at, segment.created_at)

    def come_back(self) -> None:
        """What was left is read again, and what comes after it."""
        if self.left:
            self._returning = True
            self._changed.set()

    def _return(self) -> None:
        """If it is time: as at a start, but for what is leased. Rows that are settled must be gone, or they came again, too."""
        if self._returning and not self._spool.unsettled_bytes:
            # What was left may be newer than what waits: parts get new ids.
            first = min(self._left_from, *(segment.id for segment in self._ring), self._read_to + 1)
            self._ring.clear()
            self._ring_size = self._ring_events = self._ring_raw_bytes = 0
            self._older.clear()
            self._newest_at = -math.inf
            self._turned = self._returning = False
            self._read_to = int(first) - 1
            self._ahead = set(self._leased)
            self.left, self._left_from, self._left_at = 0, math.inf, math.inf

    def flush(self) -> None:
        """From now on nothing waits to be joined with more: the daemon is about to stop."""
        self._flushing = True
        self._changed.set()
