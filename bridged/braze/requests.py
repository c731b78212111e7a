"""What a request to Braze looks like: address, headers, body, and what it costs. Pure.

Facts: Braze's references of /users/track, of the user attributes object, of the cohort import for partners, and of data
points. No address ends in a slash: /users/track/ is another one to Braze.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from msgspec import Struct

MAX_OBJECTS: Final = 75
"""Attribute objects in a /users/track request (old contracts: 75 of each kind; we send one kind)."""
MAX_IDS: Final = 1000
"""Ids in a request to the partner endpoint, additions and removals together."""
MAX_ELEMENTS: Final = 500
"""Values in an array attribute, and so cohorts that a user can be in."""
MAX_EXTERNAL_ID_BYTES: Final = 987
MAX_VALUE_CHARS: Final = 255
"""Of a string in an array attribute."""

TRACK_PATH: Final = "/users/track"


class Target(Struct, frozen=True, kw_only=True):
    """Where requests go, and as whom: with a REST key or, when a partner key is set, as one of Braze's partners."""

    url: str  # scheme and host: `clusters.host`, an emulator or a proxy
    rest_key: str = ""
    partner_name: str = ""
    partner_key: str = ""
    data_import_key: str = ""  # names the workspace in a partner's requests

    @property
    def base(self) -> str:
        """The address without a slash at the end."""
        return self.url.rstrip("/")

    @property
    def is_partner(self) -> bool:
        """Whether cohorts are written as a partner."""
        return bool(self.partner_key)

    def headers(self) -> dict[str, str]:
        """The headers of every request: a partner's credentials are in the body."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if not self.is_partner:
            headers["Authorization"] = f"Bearer {self.rest_key}"
        return headers

    def __repr__(self) -> str:
        return f"<Target {self.url} with a {'partner key' if self.is_partner else 'REST key'}>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """For `rich`, which would list the fields otherwise."""
        return [("url", self.url)]


class Request(Struct, frozen=True):
    """One POST. The body of a partner's request holds credentials: never show it."""

    path: str
    body: bytes
    objects: int  # users, or 1 for a cohort: what a verdict's positions count
    points: int  # data points that Braze bills when it takes all of it

    def __repr__(self) -> str:
        return f"<Request {self.path} of {self.objects}>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """For `rich`, which would list the body otherwise."""
        return [("path", self.path), ("objects", self.objects)]


User = tuple[str, Sequence[str]]
"""An external id, and all the cohorts that the user is to be in, by the names that the attribute shows."""


def refusal(user: User) -> str:
    """Why Braze would refuse this user, as far as its pages say; empty when it wouldn't. Spares a request its partial error."""
    external_id, cohorts = user
    if not external_id:
        return "the external id is empty"
    size = len(external_id.encode())
    if size > MAX_EXTERNAL_ID_BYTES:
        return f"the external id has {size} bytes, Braze takes {MAX_EXTERNAL_ID_BYTES}"
    if len(cohorts) > MAX_ELEMENTS:
        return f"the user is in {len(cohorts)} cohorts, an array attribute holds {MAX_ELEMENTS}"
    if any(len(cohort) > MAX_VALUE_CHARS for cohort in cohorts):
        return f"a cohort's name has more than {MAX_VALUE_CHARS} characters"
    return ""


def track(users: Sequence[User], attribute: str, *, update_existing_only: bool) -> Request:
    """The whole array of each user, at most 75 of them, each once.

    The array is set, not added to: that costs one data point however many cohorts changed, and sending it again changes
    nothing. The last cohort to leave takes the attribute along (null), since a page says that null deletes, and none what
    an empty array does.
    """
    _check(len(users), MAX_OBJECTS)
    objects = [
        {"external_id": external_id, "_update_existing_only": update_existing_only, attribute: list(cohorts) or None}
        for external_id, cohorts in users
    ]
    return Request(TRACK_PATH, msgspec.json.encode({"attributes": objects}), len(users), len(users))


def announce(target: Target, cohort_id: str, name: str, created_at: float) -> Request:
    """Make a cohort known to the partner endpoint, or rename it. To be sent before its first users. No data points.

    `created_at`: seconds since 1970.
    """
    created = datetime.fromtimestamp(created_at, UTC).isoformat(timespec="seconds")
    body = _partner(target, cohort_id) | {"name": name, "created_at": created}
    return Request(f"/partners/{target.partner_name}/cohorts", msgspec.json.encode(body), 1, 0)


def change_members(target: Target, cohort_id: str, joining: Sequence[str], leaving: Sequence[str]) -> Request:
    """Changes of one cohort, at most 1,000 ids together. Positions in its verdict: those that join, then those that leave."""
    total = len(joining) + len(leaving)
    _check(total, MAX_IDS)
    changes: list[dict[str, Any]] = []
    if joining:
        changes.append({"user_ids": list(joining)})
    if leaving:
        changes.append({"user_ids": list(leaving), "should_remove": True})
    body = _partner(target, cohort_id) | {"cohort_changes": changes}
    return Request(f"/partners/{target.partner_name}/cohorts/users", msgspec.json.encode(body), total, total)


def probe(target: Target) -> Request:
    """Asks whether the key is good, and writes nothing: an object about nobody, which is refused; as a partner, no change."""
    if target.is_partner:
        body = msgspec.json.encode(_partner(target, "bridged-check") | {"cohort_changes": []})
        return Request(f"/partners/{target.partner_name}/cohorts/users", body, 1, 0)
    return Request(TRACK_PATH, b'{"attributes":[{}]}', 1, 0)


def _partner(target: Target, cohort_id: str) -> dict[str, Any]:
    return {"partner_api_key": target.partner_key, "client_secret": target.data_import_key, "cohort_id": cohort_id}


def _check(objects: int, most: int) -> None:
    if not 1 <= objects <= most:
        raise ValueError(f"a request holds 1 to {most} objects, not {objects}")
