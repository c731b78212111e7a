"""What an answer of Mixpanel's /import?strict=1 means: one pure function, one verdict, read by everybody.

    200  the JSON of the strict mode, with its count             Delivered
    200  the JSON names failed records                           judged as a 400
    200  anything else (HTML of a portal, "1", "0", empty)       Retry(server)
    400  failed records that add up                              Reject: the others are in, nothing is sent again
    400  anything that can't be understood                       Split
    413  too large                                               Split, with the cap when the text tells it
    401 402 403 404                                              Halt
    3xx 405 407 414 415                                          Halt: the address or a proxy is wrong, not the events
    429                                                          Retry(rate)
    408, 5xx, 1xx, other 2xx, everything else                    Retry(server)

Two rules decide every case that isn't in Mixpanel's documentation. Only a proof is a success: an answer that merely
isn't an error may come from a captive portal, a proxy or the non-strict mode, which says "1" to events it then drops.
And nothing is given up without a name: `Split` narrows a refusal down until one event stands alone, whose fate
`delivery/blame.py` decides; `Retry` and `Halt` keep everything. Sending an event twice is harmless, since
Mixpanel drops the copy by its `$insert_id`.

A 200 without a count is none: every answer of the strict mode has one. One that counts fewer events than were sent is
still a success: Mixpanel documents that a 200 means all of them, and the count may leave out what it knows already or what
the project's owner blocks. The request is sent once more, since it may have been another's answer; then the difference is
kept and shown. One that counts more is the answer to some other request, from a proxy that is out of step.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, Literal, TypeAlias

import msgspec
from msgspec import Raw

from bridged.mixpanel.limits import short_name

RETRY_AFTER_CAP_S: Final = 600.0
QUOTE_CHARS: Final = 200

# A body is read no further than this for a quotation.
_QUOTE_BYTES: Final = 8192
# A cap below this is no cap of a batch; it is some other number in the text.
_SMALLEST_CAP_BYTES: Final = 1024
# So many failed records are looked at, or one an event: an event may fail in several of its fields. What names more isn't
# about this request, and would keep everybody waiting.
_FEW_RECORDS: Final = 100
_UTF8_BOM: Final = b"\xef\xbb\xbf"


class Failure(msgspec.Struct, frozen=True):
    """Why Mixpanel refused one event."""

    field: str
    message: str


class Delivered(msgspec.Struct, frozen=True):
    """Every event of the request is in. `short`: so many of them the answer doesn't count."""

    short: int = 0


class Retry(msgspec.Struct, frozen=True):
    """Nothing is known to be in: send the same bytes again later."""

    kind: Literal["rate", "server", "network", "locked"]  # locked: Braze alone says so
    reason: str
    after_s: float | None = None


class Split(msgspec.Struct, frozen=True):
    """The request as a whole can't be taken: send its halves; a single event is set aside, or given up with this reason."""

    reason: str
    max_bytes: int | None = None
    too_large: bool = False
    """It is the size that was refused, not what is in it."""
    perhaps_in: bool = False
    """Part of it may have been carried out: Braze alone says so."""


class Reject(msgspec.Struct, frozen=True):
    """These events, by their position in the request, are refused for good; all the others are in.

    `short`: so many of the others the answer doesn't count.
    """

    failures: dict[int, Failure]
    short: int = 0


class Halt(msgspec.Struct, frozen=True):
    """No request can succeed until a person, or time, changes something: stop and keep everything."""

    status: int
    reason: str
    said: str = ""
    """By whoever answered, without our advice."""


Verdict: TypeAlias = Delivered | Retry | Split | Reject | Halt

# What to check, in the words of the configuration. The answer's own text is appended.
_HALTS: Final = {
    401: (
        "Mixpanel doesn't accept the credentials. Check that [mixpanel] token, api_secret or service_account is spelled"
        " right and not expired or revoked, that it belongs to this project and [mixpanel] region, and that a service"
        " account is Admin or Owner of project_id"
    ),
    402: "Mixpanel wants a payment: check the project's plan and its event quota",
    403: (
        "Mixpanel knows the credentials but they may not import into this project: check the role of the service"
        " account and project_id"
    ),
    404: "nothing answers at this address: check [mixpanel] url and region",
    405: "the address takes no POST: check [mixpanel] url and region",
    407: "a proxy on the way wants credentials of its own: check the proxy settings of this machine",
    414: "the address is too long for the server: check [mixpanel] url",
    415: "the address takes no gzip NDJSON, so it is not Mixpanel's /import: check [mixpanel] url and any proxy",
}
_EDGE_403: Final = (
    "the edge in front of Mixpanel blocks this machine's address or this request before the credentials are looked at: "
    "try from another network address, or ask Mixpanel's support to unblock this one"
)

_TAG: Final = re.compile(r"<[^<>]*>")
# Applied in this order. The last one is any long run without a separator: tokens and secrets of Mixpanel are 32
# letters and digits, while ids with hyphens stay readable.
_SECRETS: Final = (
    (re.compile(r"(?i)\b(basic|bearer)\s+[\w+/=.~-]{6,}"), r"\1 [redacted]"),
    # From the beginning of a run, so that one without an @ is read to its end once and not from each of its characters.
    (re.compile(r"(?<![^/\s@]):*+[^/\s@:]++:[^/\s@]++@|(?<=//)[^/\s@]++@"), "[redacted]@"),
    (
        re.compile(
            r"(?i)((?:token|secret|password|api_?key|authorization))(\\?[\"']?\s*[:=]\s*)\\?[\"']?[^\s\"'\\&,;}]+"
        ),
        r"\1\2[redacted]",
    ),
    (re.compile(r"[A-Za-z0-9]{28,}"), "[redacted]"),
)
_CAP: Final = re.compile(r"(?i)\b(\d{1,12})(?:\.0)?\s*(bytes?|b|kb|kib|mb|mib)\b")
_CAP_UNITS: Final = {"k": 1000, "ki": 1024, "m": 1000**2, "mi": 1024**2}
_INTEGER: Final = re.compile(r"\s*([0-9]{1,15})\s*")
_SECONDS: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*")


def judge(
    status: int, headers: Mapping[str, str], body: bytes, insert_ids: Callable[[], Sequence[str]], events: int
) -> Verdict:
    """Turn one answer to a request of `events` events into a verdict; never raises, whatever the answer.

    `insert_ids` gives the ids of the events in the order of the request. It is called only to find out which event a
    failed record means, since getting at the ids costs a look into the body.
    """
    if status == 200:
        return _judge_ok(headers, body, insert_ids, events)
    if status == 400:
        return _judge_partial(_parse(body), body, insert_ids, events)
    if status == 413:
        return Split(_said("413: the request is too large for Mixpanel", body), _find_cap(body), too_large=True)
    if status == 429:
        return Retry("rate", _said("429: over the project's rate limit", body), _retry_after(headers))
    if status in _HALTS:
        advice = _EDGE_403 if status == 403 and _is_html(headers, body) else _HALTS[status]
        return Halt(status, _said(f"{status}: {advice}", body), _quoted(body))
    if 300 <= status < 400:
        said = f"redirected to {clean(_header(headers, 'location') or 'nowhere')}"
        advice = "check [mixpanel] url, and whether a portal or proxy is in the way"
        return Halt(status, f"{status}: {said}: {advice}", f"({said})")
    return Retry("server", _said(f"{status}: {_retry_cause(status)}", body), _retry_after(headers))


def clock_skew_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """How far our wall clock is ahead of the answer's Date; None without one. Good to a second or two."""
    date = _http_date(_header(headers, "date"))
    return None if date is None else now_s - date.timestamp()


def clean(text: str) -> str:
    """Make foreign text safe to show: one printable line of at most 200 characters, without tags and credentials."""
    line = _one_line(_TAG.sub(" ", text[:_QUOTE_BYTES]))
    for pattern, replacement in _SECRETS:
        line = pattern.sub(replacement, line)
    return _cut(line)


def _one_line(text: str) -> str:
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(text.split())


def _cut(line: str) -> str:
    return line if len(line) <= QUOTE_CHARS else line[: QUOTE_CHARS - 1] + "…"


def _judge_ok(headers: Mapping[str, str], body: bytes, insert_ids: Callable[[], Sequence[str]], events: int) -> Verdict:
    """A 200 is a success only when its JSON says that every event is in."""
    answer = _parse(body)
    after_s = _retry_after(headers)
    if answer is None:
        cause = (
            "a web page, so a portal or proxy answered in Mixpanel's place"
            if _is_html(headers, body)
            else "no strict answer"
        )
        return Retry("server", _said(f"200 with {cause}", body), after_s)
    if answer.get("failed_records"):
        return _judge_partial(answer, body, insert_ids, events)
    code, said, count = answer.get("code"), answer.get("status"), _integer(answer.get("num_records_imported"))
    says_ok = isinstance(said, str) and said.upper() == "OK"
    ok = (code is None or _integer(code) == 200) and (said is None or says_ok or _integer(said) == 1)
    # The count is what no other answer has: the mode that isn't strict says 1 to events that it drops.
    if not ok or count is None or (code is None and said is None) or answer.get("error"):
        return Retry("server", _said("200 that doesn't say that the events are in", body), after_s)
    if count > events:
        return Retry("server", _said(f"200 that counts {count} events of {events}: an answer to another request", body))
    return Delivered(events - count)


def _judge_partial(
    answer: dict[str, Any] | None, body: bytes, insert_ids: Callable[[], Sequence[str]], events: int
) -> Verdict:
    """A 400 is a partial success, if the failed records and the imported ones add up to what was sent."""
    if answer is None:
        return Split(_said("400 without the JSON of a strict answer", body))
    named = answer.get("failed_records")
    if not isinstance(named, list) or not named:
        return Split(_said("400 that names no failed record", body))
    if len(named) > max(events, _FEW_RECORDS):
        return Split(_said("400 with more failed records than events were sent", body))
    try:
        records = [msgspec.json.decode(record) for record in named]
    except (msgspec.DecodeError, ValueError, RecursionError):
        return Split(_said("400 without the JSON of a strict answer", body))
    has_count = answer.get("num_records_imported") is not None
    imported = _integer(answer.get("num_records_imported"))
    if has_count and imported is None:
        return Split(_said("400 whose count of imported events can't be read", body))
    failures: dict[int, list[Failure]] | None
    if events == 1 and not imported and not _names_another(records, insert_ids):
        # Whatever else the records look like, they can only be about the one event.
        failures = {0: [_failure(record, answer) for record in records]}
    else:
        failures = _resolve(records, insert_ids, events)
    if failures is None:
        return Split(f"400 with failed records that can't be matched to events: {_records_text(records, answer)}")
    if imported is not None and imported + len(failures) != events:
        return Split(
            f"400 that doesn't add up: {imported} imported and {len(failures)} failed of {events}: "
            f"{_records_text(records, answer)}"
        )
    return Reject({index: _merge(failures[index]) for index in sorted(failures)})


def _resolve(
    records: list[Any], insert_ids: Callable[[], Sequence[str]], events: int
) -> dict[int, list[Failure]] | None:
    """Find the event that each failed record means; None when one of them means none.

    The id is trusted before the index; one that is none of ours speaks of another request, from a proxy that is out of
    step, and its index says nothing here. An event may fail twice (two fields), and an id may be twice in a request (the
    source repeats itself): a record first takes the position where index and id agree, then the first free one with its id.
    """
    found: dict[int, list[Failure]] = {}
    unplaced: list[tuple[str, Failure]] = []
    ids: Sequence[str] | None = None
    for record in records:
        if not isinstance(record, dict):
            return None
        index = _integer(record.get("index"))
        if index is not None and index >= events:
            index = None
        insert_id = _id_of(record)
        failure = _failure(record, {})
        if not insert_id:
            if index is None:
                return None
            found.setdefault(index, []).append(failure)
            continue
        if ids is None:
            ids = insert_ids()
        if index is not None and index < len(ids) and ids[index] == insert_id:
            found.setdefault(index, []).append(failure)
        else:
            unplaced.append((insert_id, failure))
    if not unplaced:
        return found
    positions: dict[str, list[int]] = {}
    for position, insert_id in enumerate(ids or ()):
        if position < events:
            positions.setdefault(insert_id, []).append(position)
    for insert_id, failure in unplaced:
        candidates = positions.get(insert_id)
        if not candidates:
            return None
        place = next((position for position in candidates if position not in found), candidates[0])
        found.setdefault(place, []).append(failure)
    return found


def _id_of(record: Any) -> str:
    """The id of the event that a failed record names, in either spelling; empty: none."""
    insert_id = (record.get("insert_id") or record.get("$insert_id")) if isinstance(record, dict) else None
    return insert_id if isinstance(insert_id, str) else ""


def _names_another(records: list[Any], insert_ids: Callable[[], Sequence[str]]) -> bool:
    """Whether a record names an event that isn't in the request."""
    named = {insert_id for record in records if (insert_id := _id_of(record))}
    return bool(named) and not named.issubset(insert_ids())


def _failure(record: Any, answer: dict[str, Any]) -> Failure:
    """Read one failed record, which is an object or, from some projects, a bare string."""
    if isinstance(record, dict):
        field, message = record.get("field"), record.get("message")
    else:
        field, message = None, record
    if message and not isinstance(message, str):
        message = msgspec.json.encode(message).decode()  # several, or in another shape: still the reason
    # They name a property, whatever its name looks like: a secret that is known was masked before, nothing else is.
    name = _one_line(field[:_QUOTE_BYTES]) if isinstance(field, str) else ""
    words = _one_line(message[:_QUOTE_BYTES]) if message else ""
    if (short := short_name(name)) != name:
        words = words.replace(name, short)  # so that what is wrong with it isn't cut off
    if not words and isinstance(error := answer.get("error"), str):
        words = clean(error)
    return Failure(short, _cut(words) or "refused without a message")


def _merge(failures: list[Failure]) -> Failure:
    """Make one failure of all that were said about one event."""
    distinct = list(dict.fromkeys(failures))
    if len(distinct) == 1:
        return distinct[0]
    fields = dict.fromkeys(failure.field for failure in distinct if failure.field)
    return Failure(_cut(", ".join(fields)), _cut("; ".join(failure.message for failure in distinct)))


def _records_text(records: list[Any], answer: dict[str, Any]) -> str:
    return _merge([_failure(record, answer) for record in records[:5]]).message


class _Members(msgspec.Struct):
    """What is read of an answer, as it came: what isn't Mixpanel's may hold millions of lists, and take seconds to be read."""

    code: Raw = Raw(b"null")
    status: Raw = Raw(b"null")
    error: Raw = Raw(b"null")
    num_records_imported: Raw = Raw(b"null")
    failed_records: Raw = Raw(b"null")


def _parse(body: bytes) -> dict[str, Any] | None:
    """Read a JSON object; None for anything else. Failed records are only counted: a list of `Raw`."""
    try:
        members = msgspec.json.decode(body.removeprefix(_UTF8_BOM), type=_Members)
        return {name: _read(getattr(members, name)) for name in members.__struct_fields__}
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None


def _read(member: Raw) -> Any:
    """A list's elements aren't looked at; nor is an object of which it only matters that there is something in it."""
    data = bytes(member)
    if data[:1] == b"[":
        return msgspec.json.decode(member, type=list[Raw])
    return member if data[:1] == b"{" and len(data) > _QUOTE_BYTES else msgspec.json.decode(member)


def _integer(value: Any) -> int | None:
    """Read a count or an index: a number or a string of digits, not negative; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value if value >= 0 else None
    if isinstance(value, float):
        return int(value) if value.is_integer() and value >= 0 else None
    if isinstance(value, str) and (match := _INTEGER.fullmatch(value)):
        return int(match[1])
    return None


def _said(what: str, body: bytes) -> str:
    """Append what the answer says, at most 200 characters of it."""
    return f"{what} {_quoted(body)}"


def _quoted(body: bytes) -> str:
    answer = _parse(body)
    error = answer.get("error") if answer else None
    text = clean(error if isinstance(error, str) else body[:_QUOTE_BYTES].decode(errors="replace"))
    return f"(it says: {text})" if text else "(it says nothing)"


def _retry_cause(status: int) -> str:
    if status == 408:
        return "Mixpanel waited too long for the request"
    if status >= 500:
        return "Mixpanel, or the edge in front of it, has a failure of its own"
    return "an answer that Mixpanel isn't known to give, and no proof of a success"


def _is_html(headers: Mapping[str, str], body: bytes) -> bool:
    return "html" in (_header(headers, "content-type") or "").lower() or body.lstrip()[:1] == b"<"


def _find_cap(body: bytes) -> int | None:
    """Find the largest request that the text of a 413 allows, as in "exceeds max limit of 2097152 bytes"."""
    text = body[:_QUOTE_BYTES].decode(errors="replace")
    limit = text.lower().find("limit")
    match = (_CAP.search(text, limit) if limit >= 0 else None) or _CAP.search(text)
    if match is None:
        return None
    cap = int(match[1]) * _CAP_UNITS.get(match[2].lower().removesuffix("b"), 1)
    return cap if cap >= _SMALLEST_CAP_BYTES else None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Read Retry-After, bounded: seconds, or a date as seen from the answer's own Date, so no clock of ours matters."""
    value = _header(headers, "retry-after")
    if value is None:
        return None
    if match := _SECONDS.fullmatch(value):
        return min(float(match[1]), RETRY_AFTER_CAP_S)
    then, now = _http_date(value), _http_date(_header(headers, "date"))
    if then is None or now is None:
        return None
    return min(max((then - now).total_seconds(), 0.0), RETRY_AFTER_CAP_S)


def _http_date(value: str | None) -> datetime | None:
    if value is None:
        return None
    try:
        date = parsedate_to_datetime(value)
        return date.replace(tzinfo=UTC) if date.tzinfo is None else date
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _header(headers: Mapping[str, str], name: str) -> str | None:
    """Look a header up in any spelling: the client's mapping ignores case, a plain dict doesn't."""
    if name in headers:
        return headers[name]
    return next((value for key, value in headers.items() if key.lower() == name), None)
