"""How much a project may send in a minute. Pure: `now` is an argument."""

from collections import deque

import msgspec

# Requests this close together are booked as one, so that a flood of small ones stays cheap to remember.
SLOT_S = 0.05


class _Slot(msgspec.Struct):
    opened_at: float
    last_at: float  # the slot leaves the window a minute after its last request, never sooner
    events: int
    size: int


class Window:
    """Events and uncompressed bytes of a rolling minute, as one number each."""

    def __init__(self, max_events: int, max_bytes: int, seconds: float = 60.0) -> None:
        self.max_events = max_events
        self.max_bytes = max_bytes
        self.seconds = seconds
        self.events = 0
        self.size = 0
        self._slots: deque[_Slot] = deque()  # oldest first; its sums are `events` and `size`

    def admit(self, now: float, events: int, size: int) -> bool:
        """Book a request if it still fits in the minute that ends now; one that does not fit costs nothing.

        One that is larger than a minute's allowance fits in an empty minute: refused for ever, it would stop its sender.
        """
        self._forget(now)
        if self._slots and (self.events + events > self.max_events or self.size + size > self.max_bytes):
            return False
        self.events += events
        self.size += size
        if self._slots and now - self._slots[-1].opened_at < SLOT_S:
            slot = self._slots[-1]
            slot.last_at = now
            slot.events += events
            slot.size += size
        else:
            self._slots.append(_Slot(now, now, events, size))
        return True

    def clear(self) -> None:
        """Forget the past minute."""
        self._slots.clear()
        self.events = self.size = 0

    def _forget(self, now: float) -> None:
        while self._slots and self._slots[0].last_at <= now - self.seconds:
            slot = self._slots.popleft()
            self.events -= slot.events
            self.size -= slot.size


class FixedWindow:
    """Requests in windows that follow one another on the clock, as Braze counts them."""

    def __init__(self, most: int, seconds: float) -> None:
        self.most = most
        self.seconds = seconds
        self._began = 0.0
        self._count = 0

    def admit(self, now: float) -> tuple[int, float]:
        """Book a request: how many more fit (less than 0: not even this one, which costs nothing), and until when."""
        began = now // self.seconds * self.seconds
        if began != self._began:
            self._began, self._count = began, 0
        if self._count >= self.most:
            return -1, began + self.seconds
        self._count += 1
        return self.most - self._count, began + self.seconds

    def clear(self) -> None:
        """Forget the window."""
        self._count = 0
