"""When the next request may go to Braze. Pure: `now_s` is the loop's time.

Braze tells its allowance with each answer (X-RateLimit-Limit, -Remaining, -Reset): what is left is not exceeded. A failure
makes everybody wait, with full jitter and twice as long each time, or as long as Braze says; then one small request tries.
"""

import math
import random
from typing import Final

from bridged.braze.verdicts import RateLimit

_FIRST_BACKOFF_S: Final = 1.0
_MAX_BACKOFF_S: Final = 60.0
# A window that is said to end later is no window of a rate limit.
_MAX_WINDOW_S: Final = 3600.0
_MOMENT_S: Final = 10.0


class Pace:
    """The schedule that all requests share."""

    def __init__(self, max_concurrency: int, rng: random.Random) -> None:
        self.max_concurrency = max_concurrency
        self.failures = 0  # in a row
        self.failing_since_s = 0.0  # if there are any
        self.until_s = 0.0  # nothing goes before
        self.reason = ""
        self._rng = rng
        self._failed_at = -math.inf
        self._left: int | None = None  # requests, until _resets_at
        self._resets_at = -math.inf

    def wait_s(self, now_s: float, in_flight: int) -> float:
        """Seconds until the next request may go; infinite: not before an answer has come."""
        if in_flight >= (1 if self.failures else self.max_concurrency):
            return math.inf
        wait_s = self.until_s - now_s
        if self._left is not None and self._left <= 0:
            wait_s = max(wait_s, self._resets_at - now_s)
        return max(0.0, wait_s)

    def is_spent(self, now_s: float) -> bool:
        """Whether the allowance is used up, and not only for a moment."""
        return self._left is not None and self._left <= 0 and self._resets_at - now_s > _MOMENT_S

    def sent(self, now_s: float) -> float:
        """A request goes; gives what `failed` and `succeeded` want to know of it."""
        if self._left is not None:
            self._left -= 1
            if now_s >= self._resets_at:
                self._left = None
        return now_s

    def told(self, now_s: float, limit: RateLimit | None, in_flight: int) -> None:
        """What an answer said of the allowance; `in_flight` others may not be counted in it yet."""
        if limit is None or limit.remaining is None or limit.resets_in_s is None:
            return
        self._left = limit.remaining - in_flight
        self._resets_at = now_s + min(limit.resets_in_s, _MAX_WINDOW_S)

    def succeeded(self, sent_at_s: float) -> None:
        """Braze took something: everybody may go. What had left before it failed says nothing of that failure."""
        if sent_at_s < self._failed_at:
            return
        self.failures = 0
        self.until_s = 0.0
        self.reason = ""

    def failed(self, now_s: float, sent_at_s: float, reason: str, after_s: float | None) -> None:
        """A request failed for a reason that passes. Those that went out before the last failure are the same failure."""
        self.reason = reason
        if sent_at_s >= self._failed_at or not self.failures:
            if not self.failures:
                self.failing_since_s = now_s
            self.failures += 1
            self._failed_at = now_s
            longest_s = min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(self.failures - 1, 30))
            self.until_s = max(self.until_s, now_s + self._rng.uniform(0, longest_s))
        if after_s is not None:
            self.until_s = max(self.until_s, now_s + after_s)
