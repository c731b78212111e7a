"""Whether it is the user, or a cohort's name, that Braze refuses or fails at, or Braze itself. Pure: `now_s` is the loop's time.

A user alone who fails has a strike if Braze says so itself, or if others were taken since it last failed. After Braze's own
word, or from the second strike on, it rests for a minute: what passes within one or two is nobody's fault.
"""

import math
from collections.abc import Collection
from typing import Final

REFUSALS: Final = 2  # in Braze's own words
STRIKES: Final = 4  # failures, and answers that may be a firewall's
STRIKE_S: Final = 60.0


class Strikes:
    """Users who failed alone, until they are taken."""

    def __init__(self) -> None:
        self.took_s = -math.inf  # when somebody was taken
        # How often, when it failed last, whether Braze said so itself.
        self._users: dict[int, tuple[int, float, bool]] = {}

    def count(self, user: int, now_s: float, *, sure: bool = False) -> int:
        """A user alone has failed: how often by now. 0: nobody was taken since the last time. `sure`: in Braze's own words."""
        times, failed_s, _ = self._users.get(user, (0, -math.inf, False))
        says_something = sure or self.took_s > failed_s
        self._users[user] = (times + says_something, now_s, sure)
        return times + 1 if says_something else 0

    def knows(self, user: int) -> bool:
        """Whether a user has failed alone before: refused again after its rest, it is no further one that is."""
        return user in self._users

    def resting(self, now_s: float) -> list[int]:
        """Who isn't to be tried yet."""
        return [
            user
            for user, (times, failed_s, sure) in self._users.items()
            if now_s - failed_s < STRIKE_S and (sure or (times > 1 and self.took_s > failed_s))
        ]

    def forget(self, user: int) -> None:
        """A user was taken, or set aside."""
        self._users.pop(user, None)

    def clear(self) -> None:
        """It wasn't they."""
        self._users.clear()


class Turns:
    """Cohorts whose names Braze didn't take, and which let the others go first."""

    def __init__(self) -> None:
        self.took_s = -math.inf  # when a name or a user was taken
        self._failed_s: dict[str, float] = {}  # when each failed last, until it is taken

    @property
    def failing(self) -> set[str]:
        """Whose names weren't taken."""
        return set(self._failed_s)

    def next(self, unknown: Collection[str], due: Collection[str], now_s: float) -> list[str]:
        """Whose names are to be told now: but for who failed a minute ago, or since when nothing was taken. Where nobody else
        is due it is their turn, of whoever has waited longest first.
        """
        well = [cohort for cohort in unknown if not self._lets_others_go(cohort, now_s)]
        if well or any(cohort not in unknown for cohort in due):
            return well
        return sorted(unknown, key=lambda cohort: self._failed_s[cohort])

    def told(self, cohort: str, now_s: float, *, taken: bool) -> None:
        """Braze was told a name."""
        if taken:
            self.took_s = now_s
            self._failed_s.pop(cohort, None)
        else:
            self._failed_s[cohort] = now_s

    def _lets_others_go(self, cohort: str, now_s: float) -> bool:
        failed_s = self._failed_s.get(cohort)
        return failed_s is not None and (now_s - failed_s < STRIKE_S or self.took_s <= failed_s)
