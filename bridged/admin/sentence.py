"""What the daemon does now, in one sentence. Pure but for the local time of day."""

import time
from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from bridged.admin.health import Health
from bridged.delivery.pacing import PaceSnapshot

if TYPE_CHECKING:
    from bridged.admin.cohorts import CohortsStatus

# `capped` is said only of cohorts, where they are all that there is.
State = Literal["not set up", "idle", "delivering", "backing off", "halted", "stalled", "refusing", "capped"]


class HaltStatus(Struct, kw_only=True):
    """Why nothing is sent until a person or time changes something."""

    since: float  # wall clock, seconds
    status: int  # HTTP; 0: it took more than one answer
    reason: str


def in_words(
    well: Health, halted: HaltStatus | None, pace: PaceSnapshot, refusal: str, set_aside: int, *, given: bool
) -> tuple[State, str]:
    """The state and the sentence. `refusal`: why new events are refused, if they are; `given`: whether Mixpanel's credential
    is.
    """
    refused = f". New events are refused: {refusal}" if refusal else ""
    if not given:
        safe = f". {well.waiting:,} events wait, safe on disk" if well.waiting else ""
        return "not set up", f"Not set up: Mixpanel's credential isn't given yet{safe}{refused}"
    waiting = f"{well.waiting:,} events" if well.waiting != 1 else "1 event"
    if halted is not None:
        since = time.strftime(
            "%H:%M %Z" if time.time() - halted.since < 43_200 else "%Y-%m-%d %H:%M %Z", time.localtime(halted.since)
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


def of_cohorts(well: Health, cohorts: "CohortsStatus | None") -> tuple[State, str]:
    """The same where no events are exported: then it is about the cohorts."""
    if not well.ready or cohorts is None:
        return "stalled", f"Not ready: {well.reason}"
    said = f"Cohorts only (mixpanel.export is false). {cohorts.sentence}"
    if well.waiting:
        said += f". Events from before: {well.waiting:,} waiting, safe on disk"
    figures = cohorts.figures
    match cohorts.writer.state:
        case "halted" | "off":
            return "halted", said
        case "capped":
            return "capped", said
        case "backing off":
            return "backing off", said
    return ("delivering" if figures.due or figures.waiting else "idle"), said
