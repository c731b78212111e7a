"""Single events that are refused incomprehensibly, or fail though others are taken: they wait, and ask now and then. Pure."""

import heapq
from collections.abc import Iterator
from typing import Final

from bridged.backlog.backlog import Parcel

# A success lets so many of them ask again: if they are taken, they do the same for others.
_RELEASED: Final = 2
# And they may be one of so many requests in flight: each may hang until it times out, and must not take all the places.
_SHARE: Final = 4
# So many are in memory, some 2 KB each. There may be more on disk that wait for room here.
_MOST: Final = 10_000


class Aside:
    """Who waits, the first that is due first, and who was let go and has no answer yet. Times are the loop's."""

    def __init__(self) -> None:
        self._waiting: list[tuple[float, int, Parcel]] = []  # a heap: there may be many
        self._asking: set[int] = set()  # by their segments

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether there are so many that the next one has to wait elsewhere."""
        return len(self._waiting) >= _MOST

    @property
    def has_room(self) -> bool:
        """Whether those who wait elsewhere may come: when half of them is gone, so that it is worth it."""
        return len(self._waiting) <= _MOST // 2

    def put(self, parcel: Parcel) -> None:
        """Until `due_at` it waits, and then for somebody's success, or its turn."""
        heapq.heappush(self._waiting, (parcel.due_at, parcel.segments[0].id, parcel))

    def next(self) -> Parcel:
        """Lets the next one ask, due or not. There must be one."""
        _, id_, parcel = heapq.heappop(self._waiting)
        self._asking.add(id_)
        return parcel

    def due(self, now: float, concurrency: int) -> Iterator[Parcel]:
        """Lets those ask that are due, as far as there is room for them among so many requests."""
        room = max(1, concurrency // _SHARE) - len(self._asking)
        for _ in range(min(room, _RELEASED)):
            if self._waiting and self._waiting[0][0] <= now:
                yield self.next()

    def answered(self, id_: int) -> None:
        """Whoever asked with this segment has its answer, or is gone."""
        self._asking.discard(id_)

    def take_older(self, before: float) -> list[Parcel]:
        """Takes out those that were accepted before then, wall clock."""
        older = [parcel for *_, parcel in self._waiting if parcel.segments[0].created_at < before]
        if older:
            self._waiting = [entry for entry in self._waiting if entry[2].segments[0].created_at >= before]
            heapq.heapify(self._waiting)
        return older
