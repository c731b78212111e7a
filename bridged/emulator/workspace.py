"""A workspace of Braze's: what its endpoints do with a request and what they answer. Pure: bytes in, an `Answer` out.

Known from Braze's pages: the limits of a request (75 objects, 1,000 ids, 4 MB), one primary id an object, arrays that are
set, added to and removed from, `null` that deletes, `_update_existing_only`, that errors of single objects leave the others
alone, the 400s, 401s and 423 of the partner endpoints in their own words, the rate limits, their headers, and the price list.

Assumed where they are silent, each time the stricter or the more treacherous reading:
- a success is 201 for /users/track and 200 for the partner endpoints, with `{"message": "success"}`;
- an error of `errors` is `{"type": text, "input_array": "attributes", "index": position}`;
- a request none of whose objects can be taken is a 400 with those errors;
- an array that would hold more than 500 values refuses its object; so does a value that is no string, or too long a one;
- `attributes_processed` counts objects for users that don't exist too: they are queued, and come to nothing later;
- nothing is billed for those;
- a cohort may be given users before it has a name; it shows without one.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, Final

import msgspec

from bridged.emulator.answers import Answer, as_json
from bridged.emulator.limits import FixedWindow
from bridged.emulator.reading import JSON_TYPES, Call

MAX_OBJECTS: Final = 75
MAX_IDS: Final = 1000
MAX_ELEMENTS: Final = 500
MAX_CHARS: Final = 255
MAX_EXTERNAL_ID_BYTES: Final = 987
MAX_BODY_BYTES: Final = 4_000_000
PRIMARY_IDS: Final = ("external_id", "user_alias", "braze_id")
# Not attributes: they say whom, and how.
_CONTROL: Final = frozenset({*PRIMARY_IDS, "_update_existing_only", "_merge_objects", "push_token_import"})

Key = str | tuple[str, ...]
"""A user: the external id, or the kind of another id and its parts."""


class WorkspaceLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How much of everything a workspace may be sent."""

    max_requests: int = 3000  # of /users/track, in each window
    window_s: float = 3.0
    max_partner_requests: int = 250_000
    partner_window_s: float = 3600.0


class WorkspaceKeys(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is accepted. In place of one that isn't set, any is that isn't empty."""

    rest_key: str = ""
    forbidden_key: str = ""  # a key that exists, and lacks the permission users.track
    partner_name: str = ""
    partner_key: str = ""
    data_import_key: str = ""


class WorkspaceSummary(msgspec.Struct, kw_only=True):
    """Counts since the start or the last clear."""

    requests: int = 0
    requests_now: int = 0
    max_concurrent: int = 0
    answers: dict[str, int] = {}  # by status, and by "reset" and "hang" where no answer came
    faults: int = 0
    objects: int = 0  # updates of users and assignments to cohorts that came in requests with a good key
    applied: int = 0  # of those, the ones that were carried out
    refused: int = 0  # refused one by one, or with their whole request
    unknown: int = 0  # of users that don't exist
    created: int = 0  # users that an update brought into being
    overlaps: int = 0  # updates of a user of whom another request was under way: which comes last is chance
    points: int = 0  # data points, as Braze bills them
    users: int = 0  # that have been written, or are in a cohort
    writes: int = 0  # of users, together
    max_writes: int = 0  # of one user
    cohorts: int = 0  # of the partner endpoints


class _Refused(Exception):  # a refusal of one object, on its way to the answer
    """Why Braze doesn't take an object."""


class _Cohort(msgspec.Struct):
    name: str | None
    created_at: str | None
    members: set[Key]


class Workspace:
    """The users, the cohorts, the rules and the counts of one workspace."""

    def __init__(self, limits: WorkspaceLimits, keys: WorkspaceKeys) -> None:
        self.keys = keys  # replaced at run time to play one that is revoked
        self.counts = WorkspaceSummary()
        self.existing: set[Key] | None = None  # None: whoever is asked for exists
        self.blocked: set[str] = set()  # external ids that Braze disallows
        self.locked: set[str] = set()  # cohorts that are 423
        self.writes: Counter[Key] = Counter()
        # By attribute, then user: millions of users mostly share their few different values.
        self._attributes: dict[str, dict[Key, Any]] = {}
        self._shared: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._cohorts: dict[str, _Cohort] = {}
        self._under_way: Counter[Key] = Counter()
        self._window = FixedWindow(limits.max_requests, limits.window_s)
        self._partner_window = FixedWindow(limits.max_partner_requests, limits.partner_window_s)

    # -- requests ------------------------------------------------------------------------------------------------------

    def answer(self, call: Call, now: float) -> Answer:
        """Carry out a request. A path that ends in a slash is another path."""
        parts = call.path.split("/")
        if call.path == "/users/track":
            return self._limited(call, now, self._window, self._track)
        if len(parts) in {4, 5} and parts[1] == "partners" and parts[3] == "cohorts" and parts[4:] in ([], ["users"]):
            return self._limited(call, now, self._partner_window, self._partner)
        return said(404, "Invalid URL")

    def named(self, call: Call) -> list[Key]:
        """The users that a request is about, as far as it can be read."""
        try:
            body = msgspec.json.decode(call.body)
            return [_whom(item) for item in body["attributes"]]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError, _Refused):
            return []

    def begin(self, users: Iterable[Key]) -> None:
        """A request about these users is under way."""
        for user in users:
            self.counts.overlaps += self._under_way[user] > 0
            self._under_way[user] += 1

    def end(self, users: Iterable[Key]) -> None:
        """It has been carried out."""
        for user in users:
            self._under_way[user] -= 1
            if not self._under_way[user]:
                del self._under_way[user]

    def _limited(self, call: Call, now: float, window: FixedWindow, endpoint: Any) -> Answer:
        if call.method != "POST":
            return said(404, "Invalid URL")
        remaining, resets_at = window.admit(now)
        headers = {
            "X-RateLimit-Limit": str(window.most),
            "X-RateLimit-Remaining": str(max(0, remaining)),
            "X-RateLimit-Reset": str(int(-(-resets_at // 1))),
        }
        if remaining < 0:
            headers["X-Ratelimit-Retry-After"] = str(max(1, int(-(-(resets_at - now) // 1))))
            answer = said(429, "Rate limit exceeded")
        else:
            answer = endpoint(call)
        return msgspec.structs.replace(answer, headers=headers)

    def _body(self, call: Call) -> dict[str, Any] | Answer:
        if call.content_type.partition(";")[0].strip().lower() not in JSON_TYPES:
            return said(415, "Content-Type must be application/json")
        if len(call.body) > MAX_BODY_BYTES:
            return said(413, "Request Entity Too Large")
        try:
            body = msgspec.json.decode(call.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return said(400, "Bad syntax")
        return body if isinstance(body, dict) else said(400, "Bad syntax")

    def _track(self, call: Call) -> Answer:
        scheme, _, key = call.authorization.partition(" ")
        if (
            scheme != "Bearer"
            or not key
            or (self.keys.rest_key and key not in {self.keys.rest_key, self.keys.forbidden_key})
        ):
            return said(401, "Invalid API key")
        if key == self.keys.forbidden_key:
            return said(403, "Access Denied")
        body = self._body(call)
        if isinstance(body, Answer):
            return body
        lists = [body.get(name) or [] for name in ("attributes", "events", "purchases")]
        if not all(isinstance(each, list) for each in lists) or not any(lists):
            return said(400, "Valid data must be provided in the 'attributes', 'events', or 'purchases' fields")
        total = sum(map(len, lists))
        self.counts.objects += total
        if total > MAX_OBJECTS:
            self.counts.refused += total
            return said(400, "Max Input Length Exceeded")
        errors: list[dict[str, Any]] = []
        processed = [0, 0, 0]
        for which, (name, items) in enumerate(zip(("attributes", "events", "purchases"), lists, strict=True)):
            for index, item in enumerate(items):
                try:
                    self._update(item) if which == 0 else self._happen(item)
                    processed[which] += 1
                except _Refused as refusal:
                    errors.append({"type": str(refusal), "input_array": name, "index": index})
        self.counts.refused += len(errors)
        if len(errors) == total:
            message = "Valid data must be provided in the 'attributes', 'events', or 'purchases' fields"
            return as_json(400, {"message": message, "errors": errors})
        answer: dict[str, Any] = {"message": "success"}
        for name, items, count in zip(("attributes", "events", "purchases"), lists, processed, strict=True):
            if items:
                answer[f"{name}_processed"] = count
        return as_json(201, answer | ({"errors": errors} if errors else {}))

    def _update(self, item: object) -> None:
        """One attributes object."""
        user = _whom(item)
        assert isinstance(item, dict)  # `_whom` has looked
        if isinstance(user, str) and user in self.blocked:
            raise _Refused("provided external_id is blacklisted and disallowed")
        only_existing = item.get("_update_existing_only", False)
        if not isinstance(only_existing, bool):
            raise _Refused("_update_existing_only must be a boolean")
        values = {}
        points = 0
        for name, value in item.items():
            if name not in _CONTROL:
                values[name], cost = self._written(name, value, user)
                points += cost
        if not self._exists(user, create=not only_existing):
            self.counts.unknown += 1
            return
        for name, value in values.items():
            if value is None:
                self._attributes.get(name, {}).pop(user, None)
            else:
                self._attributes.setdefault(name, {})[user] = value
        self.counts.points += points
        self.counts.applied += 1
        self.writes[user] += 1

    def _happen(self, item: object) -> None:
        """One event or purchase: only that it is about somebody is looked at, and that it costs."""
        self._exists(_whom(item), create=True)
        self.counts.points += 1
        self.counts.applied += 1

    def _written(self, name: str, value: Any, user: Key) -> tuple[Any, int]:
        """What an attribute holds afterwards, and its data points. Raises _Refused."""
        if not name or len(name) > MAX_CHARS:
            raise _Refused(f"attribute names must have 1 to {MAX_CHARS} characters")
        if isinstance(value, list):
            return self._array(value), 1
        if isinstance(value, dict) and len(value) == 1 and (verb := next(iter(value))) in {"add", "remove"}:
            change = value[verb] if isinstance(value[verb], list) else [value[verb]]
            before = self._attributes.get(name, {}).get(user, ())
            if not isinstance(before, tuple):
                raise _Refused(f"{name} is no array")
            if verb == "add":
                return self._array([*before, *change]), len(change)
            return self._array([item for item in before if item not in change]), max(1, len(change))
        if isinstance(value, str) and len(value) > MAX_CHARS:
            raise _Refused(f"{name} must have at most {MAX_CHARS} characters")
        return value, _leaves(value)

    def _array(self, values: list[Any]) -> tuple[str, ...]:
        if not all(isinstance(value, str) and len(value) <= MAX_CHARS for value in values):
            raise _Refused(f"array attributes hold strings of at most {MAX_CHARS} characters")
        unique = tuple(dict.fromkeys(values))
        if len(unique) > MAX_ELEMENTS:
            raise _Refused(f"array attributes hold at most {MAX_ELEMENTS} elements")
        return self._shared.setdefault(unique, unique)

    def _exists(self, user: Key, *, create: bool) -> bool:
        if self.existing is None or user in self.existing:
            return True
        if create:
            self.existing.add(user)
            self.counts.created += 1
        return create

    def _partner(self, call: Call) -> Answer:
        body = self._body(call)
        if isinstance(body, Answer):
            return body
        keys, partner = self.keys, call.path.split("/")[2]
        for name, wanted, what in (
            ("partner_api_key", keys.partner_key, "Partner API key"),
            ("client_secret", keys.data_import_key, "client secret"),
        ):
            if not body.get(name) or (wanted and body[name] != wanted):
                return said(401, f"Invalid {what}")
        if keys.partner_name and partner != keys.partner_name:
            return said(401, f"Partner not enabled for client with client secret: {body['client_secret']}")
        cohort_id = body.get("cohort_id")
        if not isinstance(cohort_id, str) or not cohort_id:
            return said(400, "cohort_id must be a valid string")
        if cohort_id in self.locked:
            return said(423, "Resource locked")
        return self._assign(cohort_id, body) if call.path.endswith("/users") else self._name(cohort_id, body)

    def _name(self, cohort_id: str, body: dict[str, Any]) -> Answer:
        name, created_at = body.get("name"), body.get("created_at")
        if not isinstance(name, str) or not name:
            return said(400, "name must be a non-empty string")
        try:
            datetime.fromisoformat(created_at)  # type: ignore[arg-type]  # the TypeError is expected
        except (ValueError, TypeError):
            return said(400, "created_at must be a valid time as an ISO-8601 string")
        cohort = self._cohorts.setdefault(cohort_id, _Cohort(None, None, set()))
        cohort.name, cohort.created_at = name, created_at
        return said(200, "success")

    def _assign(self, cohort_id: str, body: dict[str, Any]) -> Answer:
        changes = body.get("cohort_changes")
        shape = "cohort_changes must be an array of objects each with key user_ids mapping to an array of strings"
        if not isinstance(changes, list):
            return said(400, shape)
        wanted: list[tuple[Key, bool]] = []
        for change in changes:
            leave = change.get("should_remove", False) if isinstance(change, dict) else None
            if not isinstance(leave, bool) or not {"user_ids", "device_ids"} & change.keys():
                return said(400, shape)
            for kind in ("user_ids", "device_ids"):
                ids = change.get(kind, [])
                if not isinstance(ids, list) or not all(isinstance(each, str) and each for each in ids):
                    return said(400, shape)
                wanted.extend((each if kind == "user_ids" else ("device_id", each), leave) for each in ids)
        self.counts.objects += len(wanted)
        if len(wanted) > MAX_IDS:
            self.counts.refused += len(wanted)
            return said(400, "Only 1,000 user_ids, device_ids, and aliases are allowed per request")
        cohort = self._cohorts.setdefault(cohort_id, _Cohort(None, None, set()))
        for user, leave in wanted:
            if not self._exists(user, create=False):
                self.counts.unknown += 1
                continue
            (cohort.members.discard if leave else cohort.members.add)(user)
            self.counts.applied += 1
            self.counts.points += 1
            self.writes[user] += 1
        return said(200, "success")

    # -- reading back --------------------------------------------------------------------------------------------------

    def users(self) -> Iterator[dict[str, Any]]:
        """Every user that was written: its id, its attributes, and how often."""
        names = list(self._attributes)
        for user, writes in list(self.writes.items()):
            who = {"external_id": user} if isinstance(user, str) else {user[0]: "/".join(user[1:])}
            held = {name: self._attributes[name][user] for name in names if user in self._attributes[name]}
            yield who | {"writes": writes, "attributes": held}

    def holding(self, attribute: str) -> Mapping[Key, Any]:
        """The users that have an attribute, and what it holds."""
        return self._attributes.get(attribute, {})

    def cohorts(self) -> Iterator[dict[str, Any]]:
        """The cohorts of the partner endpoints."""
        for cohort_id, cohort in self._cohorts.items():
            members = sorted(member if isinstance(member, str) else "/".join(member) for member in cohort.members)
            yield {
                "cohort_id": cohort_id,
                "name": cohort.name,
                "created_at": cohort.created_at,
                "members": members,
            }

    def summary(self) -> WorkspaceSummary:
        """The counts as they are now."""
        return msgspec.structs.replace(
            self.counts,
            answers=dict(self.counts.answers),
            users=len(self.writes),
            writes=self.writes.total(),
            max_writes=max(self.writes.values(), default=0),
            cohorts=len(self._cohorts),
        )

    def clear(self) -> None:
        """Forget what was written and counted; who exists, what is blocked and the keys stay."""
        self._attributes.clear()
        self._shared.clear()
        self._cohorts.clear()
        self.writes.clear()
        self._window.clear()
        self._partner_window.clear()
        self.counts = WorkspaceSummary(requests_now=self.counts.requests_now)


def said(status: int, message: str = "") -> Answer:
    """What Braze answers beside a success with numbers: a message. Without one, the usual words."""
    return as_json(status, {"message": message or _WORDS.get(status, "")})


_WORDS: Final = {
    200: "success",
    201: "success",
    401: "Invalid API key",
    403: "Access Denied",
    404: "Invalid URL",
    423: "Resource locked",
    429: "Rate limit exceeded",
    500: "Internal Server Error",
}


def _whom(item: object) -> Key:
    """The user that an object is about. Raises _Refused: exactly one primary id, else an e-mail address or a number."""
    if not isinstance(item, dict):
        raise _Refused("must be an object")
    given = [name for name in PRIMARY_IDS if name in item]
    if len(given) > 1:
        raise _Refused("only one of 'external_id', 'user_alias' or 'braze_id' is allowed")
    if not given:
        for name in ("email", "phone"):
            if isinstance(item.get(name), str) and item[name]:
                return name, item[name]
        raise _Refused("'external_id', 'user_alias', 'braze_id', 'email' or 'phone' is required")
    value = item[given[0]]
    if given[0] == "user_alias":
        parts = [value.get(name) if isinstance(value, dict) else None for name in ("alias_label", "alias_name")]
        if not all(isinstance(part, str) and part for part in parts):
            raise _Refused("user_alias must have alias_name and alias_label")
        return ("user_alias", *map(str, parts))
    if not isinstance(value, str) or not value:
        raise _Refused(f"{given[0]} must be a non-empty string")
    if given[0] == "braze_id":
        return "braze_id", value
    if len(value.encode("utf-8", "replace")) > MAX_EXTERNAL_ID_BYTES:
        raise _Refused("EXTERNAL_USER_ID_TOO_LARGE")
    return value


def _leaves(value: Any) -> int:
    """The data points of a value: every key of an object counts."""
    return sum(map(_leaves, value.values())) if isinstance(value, dict) and value else 1
