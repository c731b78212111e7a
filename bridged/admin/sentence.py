"""What the daemon does now, in one sentence. Pure but for the local time of day."""

import time
from typing import Literal

from msgspec import Struct

from bridged.admin.health import Health
from bridged.delivery.pacing import PaceSnapshot

State = Literal["not set up", "idle", "delivering", "backing off", "halted", "stalled", "refusing"]


class HaltStatus(Struct, kw_only=True):
    """Why nothing is sent until a person or time changes something."""

    since: float  # wall clock, seconds
    status: int  # HTTP; 0: it took more than one answer
    reason: str


def in_words(
    well: Health, halted: HaltStatus | None, pace: PaceSnapshot, refusal: str, set_aside: int, *, given: bool | None
) -> tuple[State, str]:
    """The state and the sentence. `refusal`: why new events are refused, if they are; `given`: whether Mixpanel's credential
    is; None: nothing is exported.
    """
    refused = f". New events are refused: {refusal}" if refusal else ""
    if given is False:
        safe = f". {well.waiting:,} events wait, safe on disk" if well.waiting else ""
        return "not set up", f"Not set up: Mixpanel's credential isn't given yet{safe}{refused}"
    if given is None and well.ready and well.waiting:
        return "idle", f"Exports nothing (mixpanel.export): {well.waiting:,} waiting, safe on disk"
    waiting = f"{well.waiting:,} events" if well.waiting != 1 else "1 event"
    if halted is not None:
        since = time.strftime(
            "%H:%M" if time.time() - halted.since < 43_200 else "%Y-%m-%d %H:%M", time.localtime(halted.since)
        )
        # With a status, the reason begins with it.
        why = f", HTTP {halted.reason}" if halted.status else f": {halted.reason}"
        return "halted", f"Halted since {since}{why}. {waiting} safe on disk{refused}"
    if refusal:
        return "refusing", f"Refusing new events: {refusal}; {waiting} waiting"
    if not well.ready:
        return "stalled", f"Not ready: {well.reason}"
    if pace.limited_by == "probe":
        return "backing off", f"Trying again with one request, after {pace.reason}. {waiting} safe on disk"
    if pace.backing_off_s > 0:
        return "backing off", f"Backing off for {pace.backing_off_s:.0f} s: {pace.reason}. {waiting} safe on disk"
    rate = f"{pace.delivered_per_second:,.0f} events/s" if pace.delivered_per_second >= 1 else "a trickle"
    if well.waiting:
        aside = f", {set_aside:,} of them kept aside: refused, or failing" if set_aside else ""
        return "delivering", f"Delivering: {rate}, {waiting} waiting{aside}"
    if pace.delivered_per_second > 0:
        return "delivering", f"Delivering: {rate}, nothing waiting"
    return "idle", "Idle: nothing waiting"
