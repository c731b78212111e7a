"""Whether a commit waits for those who are about to join it. It costs the same for one as for many: some 0.4 ms of CPU.

Who sends, waits for the answer and sends again would only lose by waiting for others: a commit begins at once when everybody
who has sent lately waits for it. Who sends without waiting, or on many connections at a rate of their own, loses nothing
but a few milliseconds, and only where there is a crowd. Pure: `now` is an argument.
"""

import math
from typing import Final

# Fewer calls than these are committed at once, unless so many have sent lately: some thousand calls a second.
_CROWD: Final = 3
_CROWD_LATELY: Final = 16
# From the beginning of one commit to that of the next, at most.
_SPACING_S: Final = 0.004
# So much is worth a commit of its own.
_ENOUGH_BYTES: Final = 2**20
# Whoever has sent nothing for twice as long is no longer waited for.
_LATELY_S: Final = 0.01


class Company:
    """Who has sent lately, by the numbers of their connections, and who of them waits for the next commit."""

    def __init__(self) -> None:
        self._waiting: set[int] = set()
        self._calls = 0  # of those who wait; more than there are of them if somebody doesn't wait for answers
        self._lately: set[int] = set()
        self._before: set[int] = set()
        self._expected = 0  # how many have sent lately
        self._turned = self._began = -math.inf

    def join(self, sender: int) -> bool:
        """Somebody has brought something for the next commit. Whether that may have been the last who was waited for."""
        self._waiting.add(sender)
        self._calls += 1
        return self._calls == self._expected

    def leave(self, now: float) -> None:
        """The commit begins, with all that was brought."""
        if now - self._turned > _LATELY_S:
            self._before, self._lately, self._turned = self._lately, set(), now
        self._lately |= self._waiting
        self._expected = len(self._lately | self._before)
        self._waiting, self._calls, self._began = set(), 0, now

    def more_to_come(self, size: int, now: float) -> bool:
        """Whether the next commit, of so many bytes by now, should wait a moment."""
        crowd = self._calls >= _CROWD or (self._calls > 0 and self._expected >= _CROWD_LATELY)
        if not crowd or size >= _ENOUGH_BYTES or now - self._began >= _SPACING_S:
            return False
        return self._calls > len(self._waiting) or not self._waiting.issuperset(self._lately | self._before)
