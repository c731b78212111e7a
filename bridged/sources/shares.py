"""Whose the bytes are that an HTTP connection holds: so that each is let go with the request that it came for. Pure."""

from collections import deque


class Shares:
    """Of the request in hand, of those that wait behind it, and what may be the beginning of another's head.

    Where several requests came at once, or aiohttp took one of them out between two looks, bytes may be counted for a
    neighbour: the sum is right.
    """

    __slots__ = ("_begun", "_waiting", "in_hand")

    def __init__(self) -> None:
        self.in_hand = 0
        self._waiting = deque[int]()
        self._begun = 0

    @property
    def total(self) -> int:
        """Of all."""
        return self.in_hand + sum(self._waiting) + self._begun

    def came(self, size: int, waiting: int, *, in_body: bool) -> None:
        """The parser was given bytes: so many requests wait now. `in_body`: the newest one's body was being read."""
        new = waiting - len(self._waiting)
        if new > 0:
            self._waiting.extend([0] * new)
            size, self._begun = size + self._begun, 0
        elif not in_body:
            self._begun += size
            return
        if self._waiting:
            self._waiting[-1] += size
        else:
            self.in_hand += size

    def begin(self) -> None:
        """The first that waits is in hand now."""
        self.in_hand += self._waiting.popleft() if self._waiting else 0

    def merge(self, waiting: int) -> None:
        """The last that waits is none, after all: so many do."""
        if len(self._waiting) > waiting:
            self.in_hand += self._waiting.pop()

    def end(self) -> int:
        """What the request in hand took. A second time: nothing, or what came for it since."""
        size, self.in_hand = self.in_hand, 0
        return size

    def clear(self) -> None:
        """Nothing is held."""
        self.in_hand = self._begun = 0
        self._waiting.clear()
