"""Which time it is, by two witnesses, so that a wall clock that jumps expires nothing and delays nothing. Pure.

The wall clock can be set by anybody, by days and both ways. The steady clock can't, but says only how long this process
has run. Both started together; when they disagree, somebody set the wall clock, rightly or wrongly, and each question is
asked so that the answer errs on the harmless side:

- `latest` is for when something was accepted, and for whether a Currents event is ahead of its time: only one that is ahead
  by both clocks is refused at the door.
- `earliest` is for whether something is too old to be kept: what was accepted at the latest is judged by the earliest, so
  nothing expires before it has really waited for so long, however often the wall clock jumps while the daemon runs. It may
  expire later, by as much as the clocks disagree.

What is between two processes can't be seen: a jump while the daemon is down counts as time that passed, and a daemon that
starts goes by the wall clock that it finds. Delays, retries and probes never ask here: they go by the loop's own clock.
"""

from collections.abc import Callable


class Clock:
    """`wall` and `steady` give seconds; `steady` never jumps."""

    def __init__(self, wall: Callable[[], float], steady: Callable[[], float]) -> None:
        self.started_at = wall()  # wall clock
        self._wall = wall
        self._steady = steady
        self._steady_at_start = steady()

    def uptime_s(self) -> float:
        """Seconds since the start."""
        return self._steady() - self._steady_at_start

    def latest(self) -> float:
        """The later of what both clocks say: for births."""
        return max(self._wall(), self.started_at + self.uptime_s())

    def earliest(self) -> float:
        """The earlier of what both clocks say: for ages."""
        return min(self._wall(), self.started_at + self.uptime_s())
