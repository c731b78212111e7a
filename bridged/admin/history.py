"""The last hour and the last day in columns, for the page's charts: kept in memory, bounded, gone with the process.

A look costs a few sums, every five seconds; nothing is done per event. Prometheus is where to keep it for longer.
"""

import asyncio
import math
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Literal, NamedTuple, get_args

import structlog
from msgspec import Struct

log = structlog.get_logger()

STEP_S: Final = 5.0
STEPS: Final = 720  # an hour of them
DAY_STEP: Final = 24  # steps of the hour: two minutes; as many again are a day

Span = Literal["hour", "day"]
SPANS: Final = get_args(Span)


class Totals(NamedTuple):
    """What the parts have counted, at one moment. The first may rise only; a fall is a replay, and counts as nothing."""

    accepted: int
    delivered: int
    dead_lettered: int
    rate_limited: int
    age_sum_s: float  # of what was delivered, one age a request
    ages: int
    waiting: int  # now
    latency_s: float | None  # now: the mean of requests to Mixpanel


# A point's fields in their order. Points are bytes of one block: as objects, hundreds that live for an hour among those
# that live for a moment would keep the heap from shrinking.
_POINT: Final = struct.Struct("<3d2q2dq")


class Point(NamedTuple):
    """One step."""

    at: float  # wall clock: its end
    accepted_per_s: float
    delivered_per_s: float
    waiting: int
    dead_lettered: int
    latency_s: float | None
    age_s: float | None
    rate_limited: int


class Columns(Struct, kw_only=True):
    """What /api/history answers, oldest first."""

    span: Span
    step_s: float
    at: list[float]  # wall clock seconds: the end of each step
    accepted_per_s: list[float]
    delivered_per_s: list[float]
    waiting: list[int]  # at the end of the step
    dead_lettered: list[int]  # within the step
    latency_s: list[float | None]
    age_s: list[float | None]  # of what was delivered, when it was
    rate_limited: list[int]  # answers 429 within the step


class _Lane:
    """One span: its points, and the totals at the end of the last one."""

    def __init__(self) -> None:
        self._block = bytearray(STEPS * _POINT.size)
        self._points = 0  # that there ever were; the last ones are in the block
        self._from: tuple[float, Totals] | None = None

    def points(self) -> Iterator[Point]:
        """Oldest first."""
        for number in range(max(0, self._points - STEPS), self._points):
            *before, latency_s, age_s, last = _POINT.unpack_from(self._block, number % STEPS * _POINT.size)
            yield Point._make([*before, _known(latency_s), _known(age_s), last])

    def _keep(self, point: Point) -> None:
        values = [math.nan if value is None else value for value in point]
        _POINT.pack_into(self._block, self._points % STEPS * _POINT.size, *values)
        self._points += 1

    def add(self, now: float, at: float, totals: Totals) -> None:
        """Ends a step. The first look only begins one."""
        if self._from is not None and now > self._from[0]:
            took_s, before = now - self._from[0], self._from[1]
            ages = totals.ages - before.ages
            self._keep(
                Point(
                    at=round(at, 1),
                    accepted_per_s=round(max(0, totals.accepted - before.accepted) / took_s, 1),
                    delivered_per_s=round(max(0, totals.delivered - before.delivered) / took_s, 1),
                    waiting=totals.waiting,
                    dead_lettered=max(0, totals.dead_lettered - before.dead_lettered),
                    latency_s=None if totals.latency_s is None else round(totals.latency_s, 4),
                    age_s=round((totals.age_sum_s - before.age_sum_s) / ages, 3) if ages > 0 else None,
                    rate_limited=max(0, totals.rate_limited - before.rate_limited),
                )
            )
        self._from = now, totals


class History:
    """Records always, whoever looks. `look` gives the totals of the moment."""

    def __init__(self, look: Callable[[], Totals]) -> None:
        self._look = look
        self._lanes: dict[str, _Lane] = {span: _Lane() for span in SPANS}
        self._looks = 0
        self._failed = False

    async def run(self) -> None:
        """Records until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                self.step(loop.time(), time.time(), self._look())
                self._failed = False
            except Exception as error:
                # Told once: a chart is no reason to end the daemon, nor to fill the log.
                if not self._failed:
                    log.error("history_failed", error=repr(error))
                self._failed = True
            await asyncio.sleep(STEP_S)

    def step(self, now: float, at: float, totals: Totals) -> None:
        """One look; `now` is the loop's time, `at` the wall clock's."""
        self._lanes["hour"].add(now, at, totals)
        if self._looks % DAY_STEP == 0:
            self._lanes["day"].add(now, at, totals)
        self._looks += 1

    def columns(self, span: str, since: float = 0.0) -> Columns:
        """The points of a span that ended later than `since`."""
        points = [point for point in self._lanes[span].points() if point.at > since]
        columns: Sequence[Sequence[object]] = list(zip(*points, strict=True)) or [()] * len(Point._fields)
        lists = {name: list(column) for name, column in zip(Point._fields, columns, strict=True)}
        return Columns(span=span, step_s=STEP_S if span == "hour" else STEP_S * DAY_STEP, **lists)  # type: ignore[arg-type]  # columns of the fields' types


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
