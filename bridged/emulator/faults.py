"""What goes wrong on purpose: scripts of faults, and which fault a request meets. Pure.

A script is a list. Each fault sees the requests to its path that no fault before it has taken; it skips the first
`after` of them, then takes each with probability `share`, until it has taken `times`. So `[{"status": 500, "times":
2}, {"action": "reset", "times": 1}]` is two answers 500, then one reset, then health.
"""

import random
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from bridged.errors import ConfigError

Action = Literal[
    "reset",  # the connection is reset, nothing is stored
    "reset_after_store",  # the events are stored, then the connection is reset
    "hang",  # nothing is stored, and no answer ever comes
    "store_then_hang",  # the events are stored, and no answer ever comes
    "store_then_status",  # the lie: the events are stored, the answer is `status` (500)
    "truncate",  # the answer stops half way through its promised length
    "slow",  # the answer comes byte by byte, `trickle_s` apart
    "html",  # 200 with a page of HTML, nothing is stored: a proxy that answers for Mixpanel
]


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of trouble and the requests that meet it.

    Without `status`, `truncate` and `slow` spoil the true answer; a fault with only `delay_s` just makes it late.
    """

    path: str = "/import"  # "*" for every endpoint of Mixpanel's
    after: Annotated[int, Meta(ge=0)] = 0
    times: Annotated[int, Meta(ge=1)] | None = None
    share: Annotated[float, Meta(gt=0, le=1)] = 1.0
    seed: int = 0
    status: Annotated[int, Meta(ge=200, le=599)] | None = None
    body: Any | UnsetType = (
        UNSET  # a string is sent as it is, anything else as JSON; unset: what Mixpanel says with that status
    )
    content_type: str = ""
    headers: dict[str, str] = {}
    delay_s: Annotated[float, Meta(ge=0)] = 0.0
    trickle_s: Annotated[float, Meta(gt=0)] = 0.05
    action: Action | None = None

    def __post_init__(self) -> None:
        if self.status is None and self.action is None and not self.delay_s:
            raise ValueError("needs a `status`, an `action` or a `delay_s`: it does nothing")
        if self.status is not None and self.action in {"reset", "reset_after_store", "hang", "store_then_hang", "html"}:
            raise ValueError(f"`status` has no meaning beside `action` = {self.action!r}")
        if self.body is not UNSET and self.status is None:
            raise ValueError("`body` needs a `status`")
        if self.path != "*" and not self.path.startswith("/"):
            raise ValueError(f"`path` must start with a slash or be '*', not {self.path!r}")
        if any(sign in text for pair in self.headers.items() for text in pair for sign in "\r\n\0"):
            raise ValueError("`headers` must not hold line breaks")

    @property
    def stores(self) -> bool:
        """Whether the request is carried out before it is spoilt."""
        if self.action in {"reset_after_store", "store_then_hang", "store_then_status"}:
            return True
        return self.status is None and self.action not in {"reset", "hang", "html"}


# Where requests go, as patterns and in words: a fault anywhere else would never happen, and nobody would know.
_MIXPANEL: Final = (r"/(import|track|engage|groups)", "/import, /track, /engage, /groups")
_BRAZE: Final = (r"/users/track|/partners/[^/]+/cohorts(/users)?", "/users/track, /partners/NAME/cohorts, .../users")


def parse_faults(data: object, where: str = "faults", default_path: str = "") -> list[Fault]:
    """Read a script: a list of faults, or an object whose only key `faults` is that list.

    Raises ConfigError with the index and the key at fault; `where` begins its text. `default_path` is the `path` of those
    that name none: with one they are Braze's.
    """
    pattern, paths = _BRAZE if default_path else _MIXPANEL
    if isinstance(data, Mapping):
        unknown = sorted(str(key) for key in data if key != "faults")
        if unknown:
            raise ConfigError(f"{where}: unknown key {unknown[0]!r}", "the only key is `faults`, a list")
        data = data.get("faults", [])
    if not isinstance(data, list | tuple):
        raise ConfigError(f"{where}: must be a list of faults, not {type(data).__name__}")
    faults = []
    for index, item in enumerate(data):
        try:
            named = {"path": default_path, **item} if default_path and isinstance(item, Mapping) else item
            fault = item if isinstance(item, Fault) else msgspec.convert(named, Fault)
        except msgspec.ValidationError as error:
            message, _, path = str(error).partition(" - at `$")
            raise ConfigError(
                f"{where}[{index}]{path.rstrip('`')}: {message}",
                f"a fault's keys are {', '.join(Fault.__struct_fields__)}",
            ) from error
        if fault.path != "*" and not re.fullmatch(pattern, fault.path.rstrip("/")):
            raise ConfigError(f"{where}[{index}].path: nothing answers at {fault.path!r}", f"{paths}, or * for all")
        faults.append(fault)
    return faults


class _Turn(msgspec.Struct):
    """A fault and how far it has got."""

    fault: Fault
    dice: random.Random
    seen: int = 0
    taken: int = 0


class Script:
    """The faults in force and their progress; `pick` is called once a request, in order of arrival."""

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        self._turns = [_Turn(fault, random.Random(fault.seed)) for fault in faults]

    @property
    def faults(self) -> list[Fault]:
        """The script as it was given."""
        return [turn.fault for turn in self._turns]

    def pick(self, path: str) -> Fault | None:
        """Return the fault that this request meets, if any, and count it."""
        path = path.rstrip("/") or "/"
        for turn in self._turns:
            fault = turn.fault
            if fault.path != "*" and (fault.path.rstrip("/") or "/") != path:
                continue
            if fault.times is not None and turn.taken >= fault.times:
                continue
            turn.seen += 1
            if turn.seen <= fault.after:
                continue
            if fault.share < 1 and turn.dice.random() >= fault.share:
                continue
            turn.taken += 1
            return fault
        return None
