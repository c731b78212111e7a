"""The body of Mixpanel's custom-webhook destination, read as leniently as it is sent, and what is answered. Pure.

    {"action": "members" | "add_members" | "remove_members",
     "parameters": {"mixpanel_project_id", "mixpanel_cohort_id", "mixpanel_cohort_name", "mixpanel_cohort_description",
                    "mixpanel_session_id", "page_info": {"total_pages", "page_count"}, "members": [{...}, ...]}}

Seen live, besides what is documented: no page_info, numbers as strings, keys of other integrations, raw property names.
Mixpanel pauses a sync that is answered 400, so only what leaves no doubt that it can't be meant is refused.
"""

import json
import re
from decimal import Decimal, DecimalException
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from bridged.errors import BadRequest

Action = Literal["members", "add_members", "remove_members"]
ACTIONS: Final[tuple[Action, ...]] = ("members", "add_members", "remove_members")
# Braze refuses longer external ids (EXTERNAL_USER_ID_TOO_LARGE).
MAX_ID_BYTES: Final = 987
MAX_NAME: Final = 255  # characters of a string in an attribute
# Who was never identified has no external id in Braze: Mixpanel names the device instead.
_ANONYMOUS: Final = "$device:"
UNKNOWN_TOTAL: Final = 2**40
_NOTHING: Final = (None, "")  # the id may stand under the next key
_QUOTED: Final = 60  # characters of something wrong that are repeated to its sender


class Page(Struct, kw_only=True):
    """A request of Mixpanel's. `page` counts from 1; without page_info it is one of one."""

    action: Action
    project: str = ""
    cohort: str
    name: str = ""  # empty: it was not told
    description: str = ""
    session: str = ""  # empty: it was not told, and the page stands for itself
    total: int = 1
    page: int = 1
    ids: list[str]
    no_id: int = 0  # members without a usable id
    too_long: int = 0  # members whose id is longer than Braze takes

    @property
    def received(self) -> int:
        """Members in it, usable or not."""
        return len(self.ids) + self.no_id + self.too_long


class _Envelope(Struct):
    action: Any = None
    parameters: Any = None


class _Parameters(Struct):
    cohort: Any = msgspec.field(default=None, name="mixpanel_cohort_id")
    project: Any = msgspec.field(default=None, name="mixpanel_project_id")
    name: Any = msgspec.field(default=None, name="mixpanel_cohort_name")
    description: Any = msgspec.field(default=None, name="mixpanel_cohort_description")
    session: Any = msgspec.field(default=None, name="mixpanel_session_id")
    page_info: Any = None
    members: msgspec.Raw = msgspec.Raw()


class _Body(Struct):
    action: Any = None
    parameters: _Parameters | None = None


def keys_of(user_id: str) -> tuple[str, ...]:
    """The keys of a member under which an id may stand, for what `[cohorts] user_id` says."""
    if user_id in ("distinct_id", "$distinct_id", "mixpanel_distinct_id"):
        return ("mixpanel_distinct_id", "$distinct_id", "distinct_id")
    bare = user_id.removeprefix("$")
    return (user_id, f"${bare}" if bare == user_id else bare)


class Reader:
    """Reads pages; made once for a `user_id`, since that decides which key of a member is looked at."""

    def __init__(self, user_id: str) -> None:
        self.user_id = user_id
        self._keys = keys_of(user_id)
        names = [f"id{at}" for at in range(len(self._keys))]
        member = msgspec.defstruct(
            "Member", [(name, Any, None) for name in names], rename=dict(zip(names, self._keys, strict=True))
        )
        self._body = msgspec.json.Decoder(_Body, float_hook=_number)
        self._members = msgspec.json.Decoder(list[member], float_hook=_number)  # type: ignore[valid-type]  # made at run time
        self._loose = msgspec.json.Decoder(list[Any], float_hook=_number)

    def read(self, body: bytes) -> Page:
        """The page in a body. Raises BadRequest, which says what is wrong, in Mixpanel's own names."""
        if not body or body.isspace():
            raise BadRequest("the body is empty: expected JSON with action and parameters")
        try:
            return self._read(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            mended = _mended(body)
            if mended is None:
                raise BadRequest(f"the body is not JSON: {error}") from None
        try:
            return self._read(mended)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadRequest(f"the body is not JSON: {error}") from None

    def _read(self, body: bytes) -> Page:
        try:
            said = self._body.decode(body)
        except msgspec.ValidationError:
            raise BadRequest("the body is not the cohort webhook's: expected action and parameters") from None
        if said.action not in ACTIONS:
            raise BadRequest(f"action: expected one of {', '.join(ACTIONS)}, got {_quoted(said.action)}")
        parameters = said.parameters
        if parameters is None:
            raise BadRequest("parameters is missing")
        cohort = _text(parameters.cohort)
        if not cohort:
            raise BadRequest(f"parameters.mixpanel_cohort_id: expected an id, got {_quoted(parameters.cohort)}")
        members = bytes(parameters.members)
        if members in (b"", b"null"):
            # Nobody to add is nothing to do; but nobody at all would be everybody's leaving.
            if said.action == "members":
                raise BadRequest("parameters.members is missing: an empty cohort is []")
            members = b"[]"
        ids, no_id, too_long = self._ids(members)
        total, page = _page(parameters.page_info)
        return Page(
            action=said.action,
            project=_text(parameters.project),
            cohort=cohort,
            name=_text(parameters.name)[:MAX_NAME],
            description=_text(parameters.description),
            session=_text(parameters.session),
            total=total,
            page=page,
            ids=ids,
            no_id=no_id,
            too_long=too_long,
        )

    def _ids(self, members: bytes) -> tuple[list[str], int, int]:
        try:
            found = [
                next((value for value in candidates if value not in _NOTHING), None)
                for candidates in map(msgspec.structs.astuple, self._members.decode(members))
            ]
        except msgspec.ValidationError:
            # Something among them is no object. It costs itself.
            try:
                loose = self._loose.decode(members)
            except msgspec.ValidationError:
                raise BadRequest("parameters.members: expected an array of objects") from None
            found = [
                next((each[key] for key in self._keys if each.get(key) not in _NOTHING), None)
                if isinstance(each, dict)
                else None
                for each in loose
            ]
        ids, too_long = [], 0
        for value in found:
            text = value if type(value) is str else _text(value)
            if not text or text.isspace() or "\0" in text or text.startswith(_ANONYMOUS):
                continue
            if len(text) * 4 > MAX_ID_BYTES and len(text.encode()) > MAX_ID_BYTES:
                too_long += 1
                continue
            ids.append(text)
        return ids, len(found) - len(ids) - too_long, too_long


def _mended(body: bytes) -> bytes | None:
    """What other readers take for JSON: a mark of the encoding before it, NaN, half a character, bytes that are none.

    A property that was cut off within an emoji is no reason to pause a sync. NUL takes the place of what is no character, so
    that an id with it is no id. None: it isn't JSON to anybody.
    """
    try:
        said = json.loads(
            body.decode("utf-8-sig", "surrogateescape"), parse_constant=lambda _: None, parse_float=_number
        )
        text = json.dumps(said, ensure_ascii=False)
    except (ValueError, RecursionError):
        return None
    return re.sub("[\ud800-\udfff]", r"\\u0000", text).encode()


def action_of(body: bytes) -> str:
    """What a body that was refused asked for, for the answer; empty if that can't be said."""
    try:
        action = msgspec.json.decode(body, type=_Envelope).action
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    return action if action in ACTIONS else ""


def success(action: str) -> bytes:
    """The answer to a page that is committed."""
    return msgspec.json.encode({"action": action, "status": "success"})


def failure(action: str, message: str, code: int) -> bytes:
    """The answer to one that isn't. Mixpanel shows the message to whoever set the sync up."""
    return msgspec.json.encode({"action": action, "status": "failure", "error": {"message": message, "code": code}})


def _text(value: object) -> str:
    """A scalar as Mixpanel means it: ids come as strings and as numbers."""
    if isinstance(value, str):
        return value.strip() if "\0" not in value else ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return ""


def _number(text: str) -> int | str:
    """A number with a point or an exponent, as it is written: a float is another one beyond 2^53. Whole ones lose the point."""
    try:
        number = Decimal(text)
        # What is longer than an id needs no digits.
        if number.adjusted() < MAX_ID_BYTES and number == number.to_integral_value():
            return int(number)
    except DecimalException:
        pass
    return text


_JSON: Final = msgspec.json.Decoder(float_hook=_number)


def _page(info: object) -> tuple[int, int]:
    """total_pages and page_count; neither told: one of one. They may come as text, which holds the JSON.

    A page of an unknown total, and one beyond it, belong to a round that can't be completed: who is absent from it stays.
    So does one whose numbers are there and can't be read.
    """
    if isinstance(info, str):
        try:
            info = _JSON.decode(info)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            return UNKNOWN_TOTAL, 1
    if info is None:
        return 1, 1
    if not isinstance(info, dict):
        return UNKNOWN_TOTAL, 1
    said = info.get("total_pages"), info.get("page_count")
    total, page = map(_count, said)
    if said == (None, None):
        return 1, 1
    if total is None or (page is None and said[1] is not None):
        return UNKNOWN_TOTAL, page or 1
    if page is None or total == 0:
        page = page or 1
    return max(1, total), page


def _count(value: object) -> int | None:
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
        value = int(value.strip()[:15])
    return min(value, UNKNOWN_TOTAL) if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _quoted(value: object) -> str:
    if value is None:
        return "nothing"
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."
