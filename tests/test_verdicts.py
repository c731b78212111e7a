"""What each answer of Mixpanel means: the recorded ones, the odd ones, and any answer at all."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridged.mixpanel import verdicts
from bridged.mixpanel.verdicts import Delivered, Failure, Halt, Reject, Retry, Split, Verdict, clean, judge

ANSWERS = Path(__file__).parent / "answers"
BAD_TIME = Failure("properties.time", "'properties.time' is invalid: must be specified as seconds since epoch")


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A recorded answer, and the request it was given to."""

    note: str
    seen: str
    status: int
    headers: dict[str, str]
    body: Any
    events: int
    ids_at: dict[str, str] = {}

    def judge(self) -> Verdict:
        ids = [self.ids_at.get(str(index), f"id-{index}") for index in range(self.events)]
        body = self.body if isinstance(self.body, str) else json.dumps(self.body)
        return judge(self.status, self.headers, body.encode(), lambda: ids, self.events)


# A type stands for a verdict whose words don't matter here.
EXPECTED: dict[str, Any] = {
    "200_strict": Delivered(),
    "200_strict_verbose": Delivered(),
    "200_loose_plain_one": ("server", "no strict answer"),
    "200_loose_plain_zero": ("server", "no strict answer"),
    "200_loose_verbose": ("server", "doesn't say that the events are in"),
    "200_loose_verbose_failed": ("server", "some error occurred"),
    "200_portal": ("server", "web page"),
    "400_dollar_insert_id": Reject(
        {
            0: BAD_TIME,
            3: Failure("properties.utm_source", "properties.utm_source is invalid: string should be valid utf8"),
        }
    ),
    "400_insert_id": Reject({0: BAD_TIME}),
    "400_no_event_name": Reject({1: Failure("event", "'event' must not be missing or blank")}),
    "400_no_distinct_id": Reject(
        {0: Failure("properties.distinct_id", "'properties.distinct_id' is invalid: must not be missing")}
    ),
    "400_id_with_colon": Reject(
        {0: Failure("$insert_id", "'$insert_id' is invalid: must only contain alphanumeric or hyphen '-' characters")}
    ),
    "400_strings": Split,
    "401": (401, "credentials"),
    "403_edge": (403, "edge"),
    "403_api": (403, "role"),
    "408": ("server", "408"),
    "413": Split(
        "413: the request is too large for Mixpanel (it says: request exceeds max limit of 2097152 bytes)",
        2097152,
        too_large=True,
    ),
    "414_edge": (414, "url"),
    "429": ("rate", "Project exceeded rate limits"),
    "429_loose": ("rate", "Project exceeded rate limits"),
    "500_edge": ("server", "Internal Server Error"),
    "502_json": ("server", "a temporary failure occurred"),
    "503_envoy": ("server", "upstream connect error"),
    "track_200_ok": ("server", "no strict answer"),
}


@pytest.mark.parametrize("path", sorted(ANSWERS.glob("*.json")), ids=lambda path: path.stem)
def test_recorded_answer_gets_its_verdict(path: Path) -> None:
    """Every answer that Mixpanel is known to give is understood; a recording without an expectation fails."""
    verdict = msgspec.json.decode(path.read_bytes(), type=Answer).judge()
    match EXPECTED[path.stem]:
        case type() as kind:
            assert isinstance(verdict, kind)
        case (str() as kind, words):
            assert isinstance(verdict, Retry)
            assert verdict.kind == kind
            assert words in verdict.reason
        case (int() as status, words):
            assert isinstance(verdict, Halt)
            assert verdict.status == status
            assert words in verdict.reason
        case expected:
            assert verdict == expected


def test_every_expectation_has_a_recording() -> None:
    """A recording that is renamed or lost is noticed."""
    assert EXPECTED.keys() == {path.stem for path in ANSWERS.glob("*.json")}


def say(
    status: int,
    body: Any,
    events: int = 3,
    ids: Sequence[str] = ("a", "b", "c"),
    headers: Mapping[str, str] | None = None,
) -> Verdict:
    """Judge an answer given by its JSON, its text or its bytes."""
    match body:
        case bytes():
            raw = body
        case str():
            raw = body.encode()
        case _:
            raw = json.dumps(body).encode()
    return judge(status, headers or {}, raw, lambda: ids, events)


def refuse(records: Any, imported: Any = 2) -> dict[str, Any]:
    """Build the body of a 400 to three events."""
    return {"code": 400, "error": "not valid", "num_records_imported": imported, "failed_records": records}


def record(index: Any, message: Any = "bad", **more: Any) -> dict[str, Any]:
    """Build one failed record."""
    return {"index": index, "field": "f", "message": message, **more}


BAD = Failure("f", "bad")


# -- 200 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {"code": 200, "num_records_imported": 3, "status": "OK"},
        {"code": 200, "num_records_imported": 3},
        {"status": "ok", "num_records_imported": 3, "error": None},
        {"code": "200", "num_records_imported": "3", "status": 1, "failed_records": []},
    ],
)
def test_success_is_what_counts_every_event(body: Any) -> None:
    """Spellings of one and the same proof are all a success."""
    assert say(200, body) == Delivered()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"OK",
        b"[]",
        b"null",
        b"3",
        b'{"code": 200, "num_records_im',
        {},
        {"num_records_imported": 3},
        {"code": 200, "status": 1},
        {"error": None, "status": 1},
        {"code": 200, "status": "OK"},
        {"code": 200, "status": "OK", "num_records_imported": None},
        {"code": 200, "status": "OK", "num_records_imported": "x"},
        {"code": 200, "status": "OK", "num_records_imported": 3, "error": "no"},
        {"code": 429, "status": "OK", "num_records_imported": 3},
        {"code": 200, "status": "error", "num_records_imported": 3},
        {"code": 200, "status": 0, "num_records_imported": 3},
    ],
)
def test_ok_without_proof_is_tried_again(body: Any) -> None:
    """A 200 alone is no success: the events stay until an answer counts them."""
    verdict = say(200, body)
    assert isinstance(verdict, Retry)
    assert verdict.kind == "server"


@pytest.mark.parametrize(("imported", "short"), [(0, 3), (2, 1), (3, 0)])
def test_ok_of_the_strict_mode_is_a_success_whatever_it_counts(imported: Any, short: int) -> None:
    """A 200 means all: events that Mixpanel knows already, or that are blocked, must not end as dead letters."""
    assert say(200, {"code": 200, "status": "OK", "num_records_imported": imported}) == Delivered(short)


def test_a_byte_order_mark_stands_in_nobodys_way() -> None:
    """What writes it before its answers writes it before all of them: the same events would be sent for ever."""
    said = {"code": 200, "num_records_imported": 3, "status": "OK"}
    assert say(200, b"\xef\xbb\xbf" + json.dumps(said).encode()) == Delivered()
    assert say(400, b"\xef\xbb\xbf" + json.dumps(refuse([record(1)])).encode()) == Reject({1: BAD})


def test_ok_that_counts_more_than_was_sent_is_no_proof() -> None:
    """It is the answer to some other request, so of ours nothing is known."""
    verdict = say(200, {"code": 200, "status": "OK", "num_records_imported": 4})
    assert isinstance(verdict, Retry)
    assert "4 events of 3" in verdict.reason


def test_ok_with_failed_records_is_judged_as_a_partial_success() -> None:
    """A status that something on the way has rewritten doesn't hide the refused records."""
    assert say(200, refuse([record(1)])) == Reject({1: BAD})


# -- 400 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("records", "imported", "failed"),
    [
        ([record(1)], 2, {1}),
        ([record("1")], 2, {1}),
        ([record(1.0)], "2", {1}),
        ([record(0), record(2)], 1, {0, 2}),
        ([record(1)], None, {1}),
        ([record(0), record(1), record(2)], 0, {0, 1, 2}),
        ([record(1, insert_id="b")], 2, {1}),
        # the id is trusted before the index
        ([record(0, insert_id="c")], 2, {2}),
        ([record(99, **{"$insert_id": "c"})], 2, {2}),
        ([record(None, insert_id="c")], 2, {2}),
        ([record(1, insert_id="a"), record(0, insert_id="b")], 1, {0, 1}),
        # no id: the index
        ([record(1, insert_id="")], 2, {1}),
        ([record(1, insert_id=None)], 2, {1}),
        ([record(1, insert_id=7)], 2, {1}),
        # one event, two fields
        ([record(1), record(1)], 2, {1}),
    ],
)
def test_partial_success_rejects_by_index_and_id(records: Any, imported: Any, failed: set[int]) -> None:
    """Exactly the failed records are given up, and each is the event that Mixpanel meant."""
    verdict = say(400, refuse(records, imported))
    assert isinstance(verdict, Reject)
    assert verdict.failures.keys() == failed
    assert set(verdict.failures.values()) == {BAD}


@pytest.mark.parametrize("key", ["insert_id", "$insert_id"])
def test_an_id_that_is_none_of_ours_speaks_of_another_request(key: str) -> None:
    """From a proxy that is out of step: by its index, a good event was given up, and what another request lost called delivered."""
    for records, imported in (([record(1, **{key: "zzz"})], 2), ([record(0), record(1, **{key: "zzz"})], 1)):
        verdict = say(400, refuse(records, imported))
        assert isinstance(verdict, Split)
        assert "can't be matched" in verdict.reason
        assert BAD.message in verdict.reason
    assert isinstance(say(400, refuse([record(0, **{key: "zzz"})], 0), events=1), Split)
    assert say(400, refuse([record(0, **{key: "a"})], 0), events=1) == Reject({0: BAD})
    assert say(400, refuse([record(9, **{key: "a"})], 0), events=1) == Reject({0: BAD})


def test_partial_success_without_a_count_is_a_rejection() -> None:
    """The count may be missing; the records alone say enough."""
    body = refuse([record(1)])
    del body["num_records_imported"]
    assert say(400, body) == Reject({1: BAD})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"Bad Request",
        b"<html>400</html>",
        [],
        {},
        {"code": 400, "error": "malformed"},
        refuse([]),
        refuse(None),
        refuse({"index": 1}),
        refuse("1"),
        refuse(["no identity events"], 0),
        refuse([record(1), "and a string"], 1),
        refuse([None]),
        refuse([record(3)]),
        refuse([record(-1)]),
        refuse([record(None)]),
        refuse([record(True)]),
        refuse([record("one")]),
        refuse([record(1.5)]),
        refuse([record("9" * 5000)]),
        refuse([record(99, insert_id="zzz")]),
        refuse([{"message": "who?"}]),
        # what doesn't add up
        refuse([record(1)], 0),
        refuse([record(1)], 3),
        refuse([record(1), record(1)], 1),
        refuse([record(0), record(1)], 2),
        refuse([record(1)], "many"),
        refuse([record(1)], -1),
    ],
)
def test_refusal_that_cannot_be_understood_is_split(body: Any) -> None:
    """Nothing is given up, and nothing is called delivered, on the word of an answer that makes no sense."""
    verdict = say(400, body)
    assert isinstance(verdict, Split)
    assert verdict.reason.startswith("400")
    assert verdict.max_bytes is None


def test_refusal_of_a_single_event_keeps_the_words_of_mixpanel() -> None:
    """Whatever a record looks like, in a request of one event it is about that event."""
    assert say(400, refuse(["no identity events"], 0), events=1) == Reject({0: Failure("", "no identity events")})
    assert say(400, refuse([record(17)], 0), events=1) == Reject({0: BAD})
    assert say(400, refuse([{}], None), events=1) == Reject({0: Failure("", "not valid")})
    assert say(400, {"failed_records": [{}]}, events=1) == Reject({0: Failure("", "refused without a message")})
    for message, words in ((["a", "b"], '["a","b"]'), ({"why": "c"}, '{"why":"c"}'), ([], "refused without a message")):
        assert say(400, {"failed_records": [record(0, message)]}, events=1) == Reject({0: Failure("f", words)})
    assert isinstance(say(400, refuse([record(0)], 1), events=1), Split)


@pytest.mark.parametrize(
    "name",
    [
        *("subscriptionRenewalReminderCount", "password: secret plan", "api_key=abc", "token", "Basic subscription"),
        *("user@example.com", "<b>tag</b>", "http://u:p@h/x"),
    ],
)
def test_a_failed_record_names_its_property(name: str) -> None:
    """However the customer has called it: without the name nobody finds what to mend."""
    field = f"properties.{name}"
    message = f"{field} is invalid: string should be valid utf8"
    assert say(400, refuse([record(1, message, field=field)])) == Reject({1: Failure(field, message)})
    told = say(400, refuse(["properties.apiToken:x is invalid"]))
    assert "properties.apiToken:x is invalid" in verdict_reason(told)


def test_a_long_name_does_not_push_out_what_is_wrong() -> None:
    """A property's name may be longer than all that is told of an event: its beginning and its end are enough."""
    field = "properties." + "the_name_of_a_property_" * 12 + "end"
    verdict = say(400, refuse([record(1, f"{field} is invalid: string should be valid utf8", field=field)]))
    assert isinstance(verdict, Reject)
    [failure] = verdict.failures.values()
    assert failure.field.startswith("properties.the_name_of")
    assert failure.field.endswith("_property_end")
    assert len(failure.field) == 80
    assert failure.message == f"{failure.field} is invalid: string should be valid utf8"


@pytest.mark.parametrize(
    ("status", "member", "element"),
    [
        (400, "failed_records", record(0, "m" * 80, insert_id="a")),
        (400, "failed_records", []),
        (400, "others", []),
        (200, "error", []),
        (503, "error", []),
    ],
)
def test_what_holds_more_than_was_sent_is_counted_only(
    monkeypatch: pytest.MonkeyPatch, status: int, member: str, element: Any
) -> None:
    """An answer of some MB with ten thousands of records, or millions of lists, is never about this request: whoever looked at each
    of them would keep everybody waiting for seconds. A verdict comes all the same.
    """
    looked_at = []

    def decode(data: Any, **wanted: Any) -> Any:
        found = msgspec.json.decode(data, **wanted)
        looked_at.append(wanted or not isinstance(found, dict | list))
        return found

    stand_in = SimpleNamespace(json=SimpleNamespace(decode=decode), DecodeError=msgspec.DecodeError)
    monkeypatch.setattr(verdicts, "msgspec", stand_in)
    verdict = say(status, json.dumps({member: [element] * 60_000}), events=2000)

    assert isinstance(verdict, Split if status == 400 else Retry)
    assert looked_at
    assert all(looked_at)


def test_few_events_may_fail_in_many_fields() -> None:
    """Some more records than events are understood: an event alone has no smaller part that could tell."""
    records = [{"index": 0, "field": f"f{at}", "message": f"m{at}"} for at in range(5)]
    verdict = say(400, refuse(records, 0), events=1)
    assert verdict == Reject({0: Failure("f0, f1, f2, f3, f4", "m0; m1; m2; m3; m4")})


def test_two_failures_of_one_event_are_both_told() -> None:
    """A dead letter names everything that is wrong with its event."""
    records = [record(1, "too old"), {"index": 1, "field": "g", "message": "too long"}]
    assert say(400, refuse(records)) == Reject({1: Failure("f, g", "too old; too long")})


def test_id_that_is_twice_in_a_request_takes_both_places() -> None:
    """The source repeats itself; two records with one id are two events, also when their indices are off."""
    records = [record(1, insert_id="a"), record(7, insert_id="a")]
    verdict = say(400, refuse(records, 1), ids=["a", "a", "c"])
    assert isinstance(verdict, Reject)
    assert verdict.failures.keys() == {0, 1}


def test_id_beyond_the_request_is_no_event_of_it() -> None:
    """A list of ids that is longer than the request can't put a failure outside of it."""
    assert isinstance(say(400, refuse([record(9, insert_id="d")]), ids=["a", "b", "c", "d"]), Split)


def test_ids_are_looked_up_only_when_a_record_has_one() -> None:
    """Getting at the ids means decoding the request again, so it is left for the case that needs it."""

    def never() -> Sequence[str]:
        raise AssertionError("not needed")

    assert judge(400, {}, json.dumps(refuse([record(1)])).encode(), never, 3) == Reject({1: BAD})
    assert isinstance(judge(503, {}, b"", never, 3), Retry)


# -- the other statuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cap"),
    [
        ("request exceeds max limit of 2097152 bytes", 2097152),
        ("sent 99999999 bytes, limit is 10 MB", 10_000_000),
        ("at most 512 KiB", 524288),
        ("limit of 12 bytes", None),
        ("too large", None),
        ("<html>413 nginx/1.2.3</html>", None),
        ("limit of " + "9" * 40 + " bytes", None),
    ],
)
def test_too_large_tells_the_cap(text: str, cap: int | None) -> None:
    """The cap that Mixpanel names is learnt; a number that can't be one isn't."""
    verdict = say(413, {"code": 413, "error": text})
    assert isinstance(verdict, Split)
    assert verdict.max_bytes == cap


@pytest.mark.parametrize("status", [301, 302, 304, 307, 308, 401, 402, 403, 404, 405, 407, 414, 415])
def test_what_only_a_person_can_mend_halts(status: int) -> None:
    """Nothing is lost and nothing is hammered while a credential, an address or a proxy is wrong."""
    verdict = say(status, "", headers={"Location": "https://me:secret@portal.example/login"})
    assert isinstance(verdict, Halt)
    assert verdict.status == status
    assert "check" in verdict.reason.lower()
    assert "secret@" not in verdict.reason


@pytest.mark.parametrize(
    "status",
    [0, 100, 101, 199, 201, 202, 204, 206, 226, 406, 408, 409, 418, 422, 425, 499, 500, 502, 503, 504, 520, 599, 999],
)
def test_everything_else_is_tried_again(status: int) -> None:
    """An answer that Mixpanel isn't known to give is neither a success nor a loss, even if its body looks like one."""
    verdict = say(status, {"code": 200, "num_records_imported": 3, "status": "OK"})
    assert isinstance(verdict, Retry)
    assert verdict.kind == "server"
    assert str(status) in verdict.reason


@pytest.mark.parametrize(
    ("headers", "after_s"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"Retry-After": " 1.5 "}, 1.5),
        ({"RETRY-AFTER": "0"}, 0.0),
        ({"retry-after": "86400"}, 600.0),
        ({"retry-after": "9" * 5000}, 600.0),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "Mon, 02 Nov 2026 10:00:30 GMT", "date": "Mon, 02 Nov 2026 10:00:00 GMT"}, 30.0),
        ({"retry-after": "Mon, 02 Nov 2026 09:00:00 GMT", "date": "Mon, 02 Nov 2026 10:00:00 GMT"}, 0.0),
        ({"retry-after": "Tue, 03 Nov 2026 10:00:00 GMT", "date": "Mon, 02 Nov 2026 10:00:00 -0000"}, 600.0),
        ({"retry-after": "Mon, 02 Nov 2026 10:00:30 GMT"}, None),
        ({"retry-after": "Mon, 02 Nov 2026 10:00:30 GMT", "date": "yesterday"}, None),
    ],
)
def test_retry_after_is_read_and_bounded(headers: dict[str, str], after_s: float | None) -> None:
    """Seconds or a date, seen from the server's own clock; never longer than ten minutes."""
    for status in (429, 503):
        verdict = say(status, "", headers=headers)
        assert isinstance(verdict, Retry)
        assert verdict.after_s == after_s


# -- the words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Basic c2VjcmV0OnNlY3JldA==",
        "Bearer secret-secret-secret",
        "https://user:secret@host/import",
        '{"properties": {"token": "secret", "a": 1}}',
        '{\\"token\\": \\"secret\\"}',
        "api_secret=secret&strict=1",
        "token 0123456789abcdef0123456789abcdef is unknown",
    ],
)
def test_credentials_are_not_quoted(text: str) -> None:
    """An answer that echoes the request can't bring a credential into the log or the page."""
    for shown in (clean(text), *(verdict_reason(say(status, text)) for status in (200, 400, 401, 413, 429, 500))):
        assert "redacted" in shown
        for secret in ("c2VjcmV0", "secret-secret", "user:secret", '"secret"', "=secret", "0123456789abcdef"):
            assert secret not in shown


@given(st.text(alphabet="ab:/@ ", max_size=40))
def test_whatever_could_be_a_password_is_hidden(text: str) -> None:
    """Of `user:password@` and `//user@`, wherever they stand and whatever stands around them, nothing is left but colons."""
    line = " ".join(text.split())
    hidden = re.sub(r"[^/\s@:]+:[^/\s@]+@|(?<=//)[^/\s@]+@", "[redacted]@", line)

    assert re.sub(r":*\[redacted\]", "[]", clean(text)) == re.sub(r":*\[redacted\]", "[]", hidden)


class Reading:
    """A pattern that counts what it may read: from each place where it can begin, as far as it gets."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self.pattern, self.texts, self.read = pattern, 0, 0

    def sub(self, replacement: str, text: str) -> str:
        # With what it looks for at the end: what it finds then is what it would have to read to find nothing.
        sought = f"{text}:a@"
        found = [(at, self.pattern.match(sought, at)) for at in range(len(sought))]
        self.read += sum(1 if match is None else match.end() - at for at, match in found)
        self.texts += len(sought)
        assert self.read <= 3 * self.texts
        return self.pattern.sub(replacement, text)


@pytest.mark.parametrize("unit", ["a", "a:", ":", "a.", "://", "//a:"])
def test_a_megabyte_of_messages_is_read_once(monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    """Texts without a space, many of them: whoever looks for a user and a password in them reads each character once, and not all
    that follows it again from each. The event loop waits meanwhile.
    """
    [position] = [at for at, (pattern, _) in enumerate(verdicts._SECRETS) if pattern.search("//ada:secret@")]
    secrets: list[Any] = list(verdicts._SECRETS)
    reading = Reading(secrets[position][0])
    secrets[position] = (reading, secrets[position][1])
    monkeypatch.setattr(verdicts, "_SECRETS", secrets)
    for _ in range(132):
        clean(unit * (8000 // len(unit)))

    assert reading.texts > 2**20


def test_quotation_is_short_and_printable() -> None:
    """No body can flood the log or drive the terminal."""
    reason = verdict_reason(say(500, "\x1b[31m\u202e\r\nnasty\x00" + "long and boring " * 10_000))
    assert reason.isprintable()
    assert len(reason) < 300
    assert len(clean("word " * 1000)) == 200


def test_ids_stay_readable() -> None:
    """What looks like an id of an event, with hyphens, is no credential."""
    assert clean("see 0f2c5f1e-1111-4b6e-9a55-3d6a4c1be001") == "see 0f2c5f1e-1111-4b6e-9a55-3d6a4c1be001"


def verdict_reason(verdict: Verdict) -> str:
    """Take the words of a verdict that has some."""
    assert isinstance(verdict, Retry | Split | Halt)
    return verdict.reason


# -- any answer ----------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
records = st.fixed_dictionaries(
    {},
    optional={
        "index": st.integers(-2, 6) | json_values,
        "insert_id": st.sampled_from("abcdz") | json_values,
        "$insert_id": st.sampled_from("abcdz") | json_values,
        "field": st.text(max_size=5) | json_values,
        "message": st.text(max_size=5) | json_values,
    },
)
answers = st.fixed_dictionaries(
    {},
    optional={
        "code": st.sampled_from([200, 400]) | json_values,
        "status": st.sampled_from(["OK", 1, 0]) | json_values,
        "error": st.none() | json_values,
        "num_records_imported": st.integers(-1, 6) | json_values,
        "failed_records": st.lists(records | json_values, max_size=5) | json_values,
    },
)
bodies = st.binary(max_size=64) | json_values.map(msgspec.json.encode) | answers.map(msgspec.json.encode)
header_maps = st.dictionaries(
    st.sampled_from(["Retry-After", "retry-after", "Date", "Content-Type", "Location"]) | st.text(max_size=5),
    st.sampled_from(["1", "text/html", "Mon, 02 Nov 2026 10:00:30 GMT", "Mon, 99 Nov 99999 10:00:30 GMT"])
    | st.text(max_size=20),
    max_size=4,
)


@given(
    status=st.sampled_from([200, 400, 413, 429, 503]) | st.integers(0, 1000),
    headers=header_maps,
    body=bodies,
    ids=st.lists(st.sampled_from("abcd"), max_size=5),
    events=st.none() | st.integers(0, 6),
)
def test_any_answer_gets_a_sane_verdict(
    status: int, headers: dict[str, str], body: bytes, ids: list[str], events: int | None
) -> None:
    """No answer raises, names an event that wasn't sent, or passes for a success without being a 200."""
    events = len(ids) if events is None else events
    verdict = judge(status, headers, body, lambda: ids, events)
    match verdict:
        case Delivered():
            assert status == 200
        case Reject(failures):
            assert status in {200, 400}
            assert failures
            assert all(0 <= index < events for index in failures)
            assert all(len(failure.message) <= 200 for failure in failures.values())
        case Retry():
            assert verdict.after_s is None or 0.0 <= verdict.after_s <= 600.0
        case Split():
            assert status in {200, 400, 413}
        case Halt():
            assert 300 <= status < 500
    if not isinstance(verdict, Delivered | Reject):
        assert verdict.reason.isprintable()
        assert len(verdict.reason) < 600


def test_deep_nesting_is_no_trap() -> None:
    """A body made to exhaust the decoder is just one more answer that isn't understood."""
    assert isinstance(say(200, b"[" * 100_000), Retry)
    assert isinstance(say(400, b'{"a":' * 100_000), Split)
