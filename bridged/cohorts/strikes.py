"""Whether it is the user that Braze fails at, or Braze that fails. Pure: `now_s` is the loop's time.

A failure of a user alone says something only if others were taken since the last one; and what passes within a minute or two
is nobody's fault.
"""

import math
from typing import Final

STRIKES: Final = 3
STRIKE_S: Final = 60.0


class Strikes:
    """Users who failed alone, until they are taken."""

    def __init__(self) -> None:
        self._users: dict[int, tuple[int, float, float]] = {}  # how often, when that was counted, when it was tried

    def count(self, user: int, now_s: float, took_s: float) -> int:
        """A user alone has failed: how often by now, once in STRIKE_S. 0: nobody was taken since the last time. `took_s`:
        when somebody was.
        """
        times, counted_s, tried_s = self._users.get(user, (0, -math.inf, -math.inf))
        says_something = took_s > tried_s
        if says_something and now_s - counted_s >= STRIKE_S:
            times, counted_s = times + 1, now_s
        self._users[user] = (times, counted_s, now_s)
        return times if says_something else 0

    def forget(self, user: int) -> None:
        """A user was taken, or refused."""
        self._users.pop(user, None)
