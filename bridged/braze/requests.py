"""What a request to Braze looks like: address, headers, body, and what it costs. Pure.

Facts: Braze's references of /users/track, of the user attributes object, of the cohort import for partners, and of data
points. No address ends in a slash: /users/track/ is another one to Braze.
"""

from collections.abc import Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from bridged.braze.clusters import host

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


class Credentials(Struct, frozen=True, kw_only=True):
    """Who we are at Braze: a REST key, or what Braze gives to its partners. With a partner key that way is used."""

    rest_api_key: str = ""
    partner_name: str = ""
    partner_api_key: str = ""
    client_secret: str = ""  # Braze's dashboard calls it the data import key

    @property
    def is_partner(self) -> bool:
        """Whether cohorts are written as a partner."""
        return bool(self.partner_api_key)

    def __repr__(self) -> str:
        return f"<Credentials {'partner key' if self.is_partner else 'REST key'}>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """For `rich`, which would list the fields otherwise."""
        return [("kind", "partner key" if self.is_partner else "REST key")]


class Target(Struct, frozen=True, kw_only=True):
    """Where requests go, and as whom."""

    credentials: Credentials
    cluster: str = "US-01"
    url: str = ""  # overrides the cluster's host: an emulator, a proxy

    @property
    def base(self) -> str:
        """Scheme and host, without a slash at the end. Raises KeyError for a cluster that isn't Braze's."""
        return self.url.rstrip("/") or host(self.cluster)

    def headers(self) -> dict[str, str]:
        """The headers of every request: a partner's credentials are in the body."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if not self.credentials.is_partner:
            headers["Authorization"] = f"Bearer {self.credentials.rest_api_key}"
        return headers


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


class UserCohorts(Struct, frozen=True):
    """All the cohorts that a user is to be in, by the names that the attribute shows."""

    external_id: str
    cohorts: Sequence[str]


def refusal(user: UserCohorts) -> str:
    """Why Braze would refuse this user, as far as its pages say; empty when it wouldn't. Spares a request its partial error."""
    if not user.external_id:
        return "the external id is empty"
    size = len(user.external_id.encode())
    if size > MAX_EXTERNAL_ID_BYTES:
        return f"the external id has {size} bytes, Braze takes {MAX_EXTERNAL_ID_BYTES}"
    if len(user.cohorts) > MAX_ELEMENTS:
        return f"the user is in {len(user.cohorts)} cohorts, an array attribute holds {MAX_ELEMENTS}"
    if any(len(cohort) > MAX_VALUE_CHARS for cohort in user.cohorts):
        return f"a cohort's name has more than {MAX_VALUE_CHARS} characters"
    return ""


def track(users: Sequence[UserCohorts], attribute: str, *, update_existing_only: bool) -> Request:
    """The whole array of each user, at most 75 of them, each once.

    The array is set, not added to: that costs one data point however many cohorts changed, and sending it again changes
    nothing. The last cohort to leave takes the attribute along (null), since a page says that null deletes, and none what
    an empty array does.
    """
    _check(len(users), MAX_OBJECTS)
    objects = [
        {
            "external_id": user.external_id,
            "_update_existing_only": update_existing_only,
            attribute: list(user.cohorts) or None,
        }
        for user in users
    ]
    return Request(TRACK_PATH, msgspec.json.encode({"attributes": objects}), len(users), len(users))


def partner_cohort(credentials: Credentials, cohort_id: str, name: str, created_at: str) -> Request:
    """Make a cohort known, or rename it; `created_at` is ISO 8601. To be sent before its first users. No data points."""
    body = _partner(credentials, cohort_id) | {"name": name, "created_at": created_at}
    return Request(f"/partners/{credentials.partner_name}/cohorts", msgspec.json.encode(body), 1, 0)


def partner_users(credentials: Credentials, cohort_id: str, add: Sequence[str], remove: Sequence[str]) -> Request:
    """Changes of one cohort, at most 1,000 ids together. Positions in its verdict: the additions, then the removals."""
    total = len(add) + len(remove)
    _check(total, MAX_IDS)
    changes: list[dict[str, Any]] = []
    if add:
        changes.append({"user_ids": list(add)})
    if remove:
        changes.append({"user_ids": list(remove), "should_remove": True})
    body = _partner(credentials, cohort_id) | {"cohort_changes": changes}
    return Request(f"/partners/{credentials.partner_name}/cohorts/users", msgspec.json.encode(body), total, total)


def _partner(credentials: Credentials, cohort_id: str) -> dict[str, Any]:
    return {
        "partner_api_key": credentials.partner_api_key,
        "client_secret": credentials.client_secret,
        "cohort_id": cohort_id,
    }


def _check(objects: int, most: int) -> None:
    if not 1 <= objects <= most:
        raise ValueError(f"a request holds 1 to {most} objects, not {objects}")
