"""What an answer of Braze's means, in the same words as an answer of Mixpanel's: one pure function, one verdict.

    2xx  JSON that says "success", no errors                     Delivered
    2xx  "success" and errors that name objects                  Reject: the others are in, nothing is sent again
    2xx  "success" and errors that name none                     Delivered if all are counted, else Split
    2xx  anything else (a portal's page, no JSON, no "success")  Retry(server)
    400  errors that name every object, or a single object       Reject
    400  no JSON, to a single object                             Retry(server): not Braze's word about it
    400  anything else                                           Split
    413  too large                                               Split
    413  a single object                                         Retry(server): no size that Braze refuses
    401 402 403 404                                              Halt
    3xx 405 407 411 414 415                                      Halt: the address or a proxy is wrong, not the users
    423  locked (partner endpoints)                              Retry(locked): nothing is in, others may go
    429                                                          Retry(rate)
    408, 5xx, 1xx, everything else                               Retry(server)

Known from Braze's pages: the message "success", `attributes_processed`, `errors` beside a success for single objects, a
400 for the whole request, 401, 403, 404, 415, 429 with X-Ratelimit-Retry-After, the X-RateLimit headers, 5xx to be tried
again; that a request with errors is carried out for all other objects, and a 400 for none.

Assumed, because those pages don't say it:
- an error of `errors` is an object with `index` (the position in the list), `input_array` ("attributes") and `type` (the
  text), as other public clients read it; an error of another array isn't about our objects. A bare string names nobody;
- any 2xx may be the success: 201 is written on the page of the synchronous twin only;
- `attributes_processed` may be lower than what was sent without anything being wrong (users that don't exist): what is
  missing, besides those that have an error, is kept as `short` and shown;
- the partner endpoints' success has no documented body: any JSON object without `errors`, or no body at all, is one;
- 423 passes by itself;
- X-RateLimit-Reset is in seconds since 1970, and is compared with the answer's own Date if it has one.

What can't be known from any answer: whether the user existed. With `_update_existing_only` Braze takes an update for
nobody, says "success", and drops it later.
"""

import contextlib
import math
import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Final

import msgspec
from msgspec import Struct

from bridged.mixpanel.verdicts import (
    RETRY_AFTER_CAP_S,
    Delivered,
    Failure,
    Halt,
    Reject,
    Retry,
    Split,
    Verdict,
    clean,
)

_QUOTE_BYTES: Final = 8192
_SECONDS: Final = re.compile(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*")

_DIGITS: Final = re.compile(r"[0-9]{1,9}")

_HALTS: Final = {
    401: (
        "Braze doesn't accept the key. Check that [braze] rest_key (or partner_key and data_import_key) is spelled"
        " right and not revoked, and that the workspace is on [braze] cluster"
    ),
    402: "Braze wants a payment: check the contract",
    403: (
        "Braze knows the key but it may not do this: it needs the permission users.track (a key that lacks it can't be"
        " changed, make another), and the account must be active"
    ),
    404: "nothing answers at this address: check [braze] cluster and url, and partner_name if there is one",
    405: "the address takes no POST: check [braze] cluster and url",
    407: "a proxy on the way wants credentials of its own: check the proxy settings of this machine",
    411: "a proxy on the way doesn't pass the body on: check [braze] url and any proxy",
    414: "the address is too long for the server: check [braze] url",
    415: "the address takes no JSON, so it is not Braze's: check [braze] url and any proxy",
}


class RateLimit(Struct, frozen=True):
    """What an answer says about the allowance: requests in the window, those left, seconds until it starts anew."""

    limit: int | None
    remaining: int | None
    resets_in_s: float | None


def judge(
    status: int, headers: Mapping[str, str], body: bytes, objects: int, now_s: float, *, partner: bool
) -> Verdict:
    """Turn one answer to a request of `objects` objects into a verdict; never raises, whatever the answer.

    `now_s` is our wall clock, for want of the answer's own Date. `partner`: the request went to a partner endpoint.
    """
    if 200 <= status < 300:
        return _judge_ok(status, headers, body, objects, partner=partner)
    if status == 400:
        return _judge_refused(body, objects)
    if status == 413:
        if objects == 1:
            return Retry("server", _said("413 to a single object, so a proxy answered in Braze's place", body))
        return Split(_said("413: the request is too large for Braze", body), too_large=True)
    if status == 423:
        return Retry("locked", _said("423: Braze has locked the cohort for now", body), _wait_s(headers, now_s))
    if status == 429:
        return Retry("rate", _said("429: over Braze's rate limit", body), _wait_s(headers, now_s, limited=True))
    if status in _HALTS:
        return Halt(status, _said(f"{status}: {_HALTS[status]}", body))
    if 300 <= status < 400:
        to = clean(_header(headers, "location") or "nowhere")
        return Halt(
            status, f"{status}: redirected to {to}: check [braze] cluster and url, and whether a portal is in the way"
        )
    if status >= 500:
        cause = "Braze, or the edge in front of it, has a failure of its own"
    elif status == 408:
        cause = "Braze waited too long for the request"
    else:
        cause = "an answer that Braze isn't known to give, and no proof of a success"
    return Retry("server", _said(f"{status}: {cause}", body), _wait_s(headers, now_s))


def rate_limit(headers: Mapping[str, str], now_s: float) -> RateLimit | None:
    """Read the X-RateLimit headers; None when an answer has none of them that can be read."""
    limit, remaining = _number(headers, "x-ratelimit-limit"), _number(headers, "x-ratelimit-remaining")
    resets_in_s = _resets_in_s(headers, now_s)
    if limit is None and remaining is None and resets_in_s is None:
        return None
    return RateLimit(_floor(limit), _floor(remaining), resets_in_s)


def _judge_ok(status: int, headers: Mapping[str, str], body: bytes, objects: int, *, partner: bool) -> Verdict:
    """A 2xx is a success only when its JSON says so."""
    if partner and not body.strip():
        return Delivered()
    answer = _parse(body)
    if answer is None:
        is_page = "html" in (_header(headers, "content-type") or "").lower() or body.lstrip()[:1] == b"<"
        cause = "a web page, so a portal or proxy answered in Braze's place" if is_page else "no JSON object"
        return Retry("server", _said(f"{status} with {cause}", body))
    message, errors = answer.get("message"), answer.get("errors") or []
    says_success = isinstance(message, str) and message.strip().lower() == "success"
    if not says_success and not (partner and not errors):
        return Retry("server", _said(f"{status} that doesn't say success", body))
    counted = answer.get("attributes_processed")
    processed = counted if isinstance(counted, int) and not isinstance(counted, bool) and counted >= 0 else None
    if errors:
        return _judge_partial(status, answer, errors, objects, processed)
    return Delivered(0 if processed is None else max(0, objects - processed))


def _judge_partial(status: int, answer: dict[str, Any], errors: Any, objects: int, processed: int | None) -> Verdict:
    """A success with errors: the objects that they name are refused, and all others are in."""
    if objects == 1:
        # Whatever the errors look like, they can only be about the one object.
        return Reject({0: _merged(errors, answer)})
    named = _named(errors, objects)
    if named is not None:
        return Reject(named, 0 if processed is None else max(0, objects - len(named) - processed))
    if processed == objects:
        return Delivered()
    return Split(f"{status} with errors that name no user: {_merged(errors, answer).message}", perhaps_in=True)


def _judge_refused(body: bytes, objects: int) -> Verdict:
    """A 400: nothing is in. Narrow it down until the object at fault stands alone."""
    answer = _parse(body)
    if answer is None and objects == 1:
        return Retry("server", _said("400 without Braze's JSON, so a proxy answered in its place", body))
    answer = answer or {}
    errors = answer.get("errors") or []
    if objects == 1:
        said = _merged(errors, answer)
        return Reject({0: said if said.message else Failure("", _said("400: refused", body))})
    named = _named(errors, objects)
    if named is not None and len(named) == objects:
        return Reject(named)
    return Split(_said("400: Braze refuses the request as a whole", body))


def _named(errors: Any, objects: int) -> dict[int, Failure] | None:
    """The objects that errors name, in order; None when one of them names none of ours."""
    found: dict[int, list[Any]] = {}
    for error in errors if isinstance(errors, list) else [errors]:
        index = _index(error.get("index")) if isinstance(error, dict) else None
        if index is None or index >= objects or error.get("input_array", "attributes") != "attributes":
            return None
        found.setdefault(index, []).append(error)
    return {index: _merged(found[index], {}) for index in sorted(found)} or None


def _index(value: Any) -> int | None:
    """A position, as the number that it is, or spelled in digits."""
    if isinstance(value, str) and _DIGITS.fullmatch(value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _merged(errors: Any, answer: dict[str, Any]) -> Failure:
    """Make one failure of the first few errors; the answer's message where they say nothing."""
    texts = []
    for error in (errors if isinstance(errors, list) else [errors])[:5]:
        text = (error.get("type") or error.get("message") or error.get("error")) if isinstance(error, dict) else error
        texts.append(clean(text if isinstance(text, str) else _json(error)))
    if not any(texts):
        message = answer.get("message")
        texts = [clean(message if isinstance(message, str) else "")]
    return Failure("", clean("; ".join(dict.fromkeys(text for text in texts if text))))


def _wait_s(headers: Mapping[str, str], now_s: float, *, limited: bool = False) -> float | None:
    """How long Braze wants us to wait, bounded: its own header, then the usual one, then (`limited`) the end of the window."""
    for name in ("x-ratelimit-retry-after", "retry-after"):
        seconds = _number(headers, name)
        if seconds is not None:
            return min(seconds, RETRY_AFTER_CAP_S)
    resets_in_s = _resets_in_s(headers, now_s) if limited else None
    return None if resets_in_s is None else min(resets_in_s, RETRY_AFTER_CAP_S)


def _resets_in_s(headers: Mapping[str, str], now_s: float) -> float | None:
    reset = _number(headers, "x-ratelimit-reset")
    if reset is None:
        return None
    # Our clock may be wrong; Braze's two times are of one clock.
    with contextlib.suppress(ValueError, TypeError, IndexError, OverflowError):
        now_s = parsedate_to_datetime(_header(headers, "date") or "").timestamp()
    return max(0.0, reset - now_s)


def _number(headers: Mapping[str, str], name: str) -> float | None:
    match = _SECONDS.fullmatch(_header(headers, name) or "")
    return float(match[1]) if match else None


def _floor(number: float | None) -> int | None:
    return None if number is None else math.floor(number)


def _header(headers: Mapping[str, str], name: str) -> str | None:
    """Look a header up in any spelling: the client's mapping ignores case, a plain dict doesn't."""
    return next((value for key, value in headers.items() if key.lower() == name), None)


def _parse(body: bytes) -> dict[str, Any] | None:
    """Read a JSON object; None for anything else."""
    try:
        answer = msgspec.json.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None


def _json(value: Any) -> str:
    try:
        return msgspec.json.encode(value)[:_QUOTE_BYTES].decode(errors="replace")
    except (ValueError, RecursionError):
        return ""


def _said(what: str, body: bytes) -> str:
    """Append what the answer says, at most 200 characters of it."""
    answer = _parse(body)
    message = answer.get("message") if answer else None
    text = clean(message if isinstance(message, str) else body[:_QUOTE_BYTES].decode(errors="replace"))
    return f"{what} (it says: {text})" if text else f"{what} (it says nothing)"
