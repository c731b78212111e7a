"""The intake over a real spool: everything that a door hands over is on disk, in one of three places, when its future is done."""

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import NAMES, currents, ndjson
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_mapping import GOOD, NOW_S, ODD, TRUNCATED
from test_schema import junk

from bridged.backlog.dead_letters import DeadLetters, Filter, Skipping
from bridged.backlog.segment import lines as lines_of
from bridged.backlog.spool import DeadLetterRow, Spool, SpoolOptions
from bridged.currents.schema import UNDECODABLE_CODE, UNKNOWN_CODE
from bridged.currents.table import EVENT_TYPES
from bridged.errors import BadRequest, SpoolError, SpoolFull, TooLarge
from bridged.intake import Intake
from bridged.mixpanel.limits import MAX_EVENT_BYTES
from bridged.mixpanel.mapping import EventMapping, MappingSettings
from bridged.settings import Size

OPEN = "users.messages.email.Open"
CUSTOM = "users.behaviors.CustomEvent"
CODES = {row.event_type: code for code, row in enumerate(EVENT_TYPES)}


@pytest.fixture
def intake(mapping: EventMapping, spool: Spool) -> Intake:
    """An intake with the default mapping, over a real spool."""
    return Intake(mapping, spool)


async def sent(spool: Spool) -> list[Any]:
    """The Mixpanel events that wait, a list a segment."""
    segments, _ = await spool.read_after(0, 2**40)
    return [[json.loads(line) for line in lines_of([segment])] for segment in segments]


async def letters(spool: Spool) -> list[DeadLetterRow]:
    """The dead letters, with their events."""
    found = DeadLetters(spool, lambda _row: "")
    return [row async for rows in found.slices(Filter()) for row in rows]


def totals(spool: Spool) -> dict[str, int]:
    """Where events are, without the places that hold none."""
    assert spool.accounts.imbalance() == 0
    return {kind: n for kind in spool.accounts.counts if (n := spool.accounts.total(kind))}


def large(size: int, **changes: Any) -> dict[str, Any]:
    """A custom event whose Mixpanel form is exactly so many bytes long."""
    event = currents(CUSTOM, id="a", user={"external_user_id": "u"}, **changes)
    event["properties"] = {"name": "n", "custom_properties": {"a": ""}}
    by = EventMapping(EVENT_TYPES, MappingSettings(token="example-token"))
    (form,) = by.map(by.schema.lines([msgspec.json.encode(event)]), event["time"]).forms
    event["properties"]["custom_properties"]["a"] = "x" * (size - len(msgspec.json.encode(form)))
    return event


# -- what ends where ---------------------------------------------------------------------------------------------------

MIXED = [
    currents(OPEN),
    currents(CUSTOM),
    currents(OPEN, user={}),
    currents(OPEN, user={"external_user_id": "0"}),
    currents(event_type="users.messages.landingpage.Click"),
    currents() | {"event_type": "users.messages.fax.Send"},
]


@pytest.mark.parametrize("as_body", [False, True])
async def test_every_event_ends_in_one_place(intake: Intake, spool: Spool, as_body: bool) -> None:
    """Forwarded ones wait, refused ones are dead letters, skipped ones are counted: by type, in one commit."""
    raw = [*map(msgspec.json.encode, MIXED), b"[]" if as_body else b"nonsense"]
    future = intake.accept_body(b'{"events":[%s]}' % b",".join(raw)) if as_body else intake.accept_lines(raw)
    assert totals(spool) == {}
    await future
    assert totals(spool) == {"accepted": 7, "waiting": 3, "dead_lettered": 3, "skipped": 1}
    by_type = spool.accounts.by_type(NAMES)
    assert {kind: n for kind, n in by_type[OPEN].items() if n} == {
        "accepted": 3,
        "waiting": 1,
        "dead_lettered": 1,
        "skipped": 1,
    }
    assert by_type["(unknown)"]["dead_lettered"] == by_type["(undecodable)"]["dead_lettered"] == 1
    assert [len(segment) for segment in await sent(spool)] == [3]
    kept = {row.event: (row.stage, row.code) for row in await letters(spool)}
    codes = {raw[3]: CODES[OPEN], raw[5]: UNKNOWN_CODE, raw[6]: UNDECODABLE_CODE}
    assert kept == {event: ("door", code) for event, code in codes.items()}
    assert intake.reasons == {"no external_user_id": 1}


PROBES = [b"", b"{}", b'{"events":[]}', b"[]"]


@pytest.mark.parametrize("body", PROBES)
async def test_a_probe_makes_no_commit(intake: Intake, spool: Spool, body: bytes) -> None:
    """Nothing to store, and nobody who waits: thousands of them a second must not keep the writer busy."""
    before = spool.commits
    await intake.accept_body(body)

    assert spool.commits == before
    assert totals(spool) == {}


@pytest.mark.parametrize("body", PROBES)
async def test_a_probe_waits_for_a_commit_that_is_under_way(intake: Intake, spool: Spool, body: bytes) -> None:
    """A spool that can't be written isn't one that should say yes."""
    abort = "CREATE TRIGGER no BEFORE INSERT ON segments BEGIN SELECT RAISE(ABORT, 'disk I/O error'); END"
    await spool.run(lambda db: db.execute(abort))
    event = intake.accept_body(b'{"events":[%s]}' % msgspec.json.encode(currents(OPEN)))
    probe = intake.accept_body(body)

    assert not probe.done()
    for each in (event, probe):
        with pytest.raises(SpoolError):
            await each
    with pytest.raises(SpoolError):
        await intake.accept_lines([msgspec.json.encode(currents(OPEN))])
    with pytest.raises(SpoolError):  # until the process has ended
        await intake.accept_body(body)


@pytest.mark.parametrize("body", PROBES)
async def test_a_full_spool_refuses_a_probe(intake: Intake, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or Braze would be told that all is well, and its next events be refused."""
    monkeypatch.setattr(Spool, "near_cap", property(lambda _: True))
    with pytest.raises(SpoolFull):
        intake.accept_body(body)


async def test_a_body_that_is_not_json_changes_nothing(intake: Intake, spool: Spool) -> None:
    """400, and nothing is kept: Braze has it still."""
    with pytest.raises(BadRequest):
        intake.accept_body(b'{"events":[{')
    await intake.accept_body(b"")
    assert totals(spool) == {}


async def test_the_beginning_of_an_oversized_line_is_kept(intake: Intake, spool: Spool) -> None:
    """A line that no door takes is an event that somebody sent: it is counted, and what is left of it kept."""
    await intake.accept_oversized(b'{"event_type":', Size(1000))
    assert totals(spool) == {"accepted": 1, "dead_lettered": 1}
    (row,) = await letters(spool)
    assert (row.code, row.event) == (UNDECODABLE_CODE, b'{"event_type":')
    assert "1000 bytes" in row.reason


@pytest.mark.parametrize("count", [1, 99, 100, 101, 250])
async def test_the_lines_of_a_call_are_committed_together(intake: Intake, spool: Spool, count: int) -> None:
    """Many lines are worked on in slices; the ack is still for all, none is lost or moved at the borders."""
    events = [currents(OPEN, id=f"n{n}") for n in range(count)]
    events[count // 2] = currents(OPEN, id="skipped", user={})
    await intake.accept_lines(ndjson(events).splitlines(keepends=True))
    ids = [event["properties"]["$insert_id"] for segment in await sent(spool) for event in segment]
    assert ids == [event["id"] for event in events if event["id"] != "skipped"]
    assert spool.commits == 1
    assert spool.accounts.total("skipped") == 1


async def test_a_full_spool_takes_nothing(mapping: EventMapping, tmp_path: Path) -> None:
    """The door learns it at once, and keeps or refuses the events; the books know nothing of them."""
    async with Spool(SpoolOptions(path=str(tmp_path / "small.db"), max_bytes=4 * 2**20), NAMES) as spool:
        intake = Intake(mapping, spool)
        with pytest.raises(SpoolFull):
            intake.accept_lines([msgspec.json.encode(currents())])
        with pytest.raises(SpoolFull):
            intake.accept_body(msgspec.json.encode(currents()))
        assert totals(spool) == {}


# -- how events are cut ------------------------------------------------------------------------------------------------


async def test_batches_are_cut_by_events(mapping: EventMapping, tmp_path: Path) -> None:
    """No request may hold more events than Mixpanel takes, however many come in one body."""
    options = SpoolOptions(path=str(tmp_path / "s.db"), max_segment_events=7)
    async with Spool(options, NAMES) as spool:
        intake = Intake(mapping, spool, max_batch_events=7)
        events = [currents(OPEN, id=f"n{n}") for n in range(25)]
        await intake.accept_body(msgspec.json.encode({"events": events}))
        segments = await sent(spool)
        assert [len(segment) for segment in segments] == [7, 7, 7, 4]
        assert [e["properties"]["$insert_id"] for segment in segments for e in segment] == [e["id"] for e in events]


async def test_batches_are_cut_by_bytes(mapping: EventMapping, tmp_path: Path) -> None:
    """Nor more bytes: a batch is halved until it fits; one event that is larger alone is sent alone."""
    options = SpoolOptions(path=str(tmp_path / "s.db"), max_segment_bytes=3000)
    async with Spool(options, NAMES) as spool:
        intake = Intake(mapping, spool)
        events = [large(size, time=1_790_000_000) | {"id": f"n{n}"} for n, size in enumerate([900, 950, 5000, 990, 20])]
        events[4] = currents(OPEN, id="n4", time=1_790_000_000)
        await intake.accept_body(msgspec.json.encode({"events": events}))
        segments, _ = await spool.read_after(0, 2**40)
        assert [s.raw_bytes <= 3000 or s.events == 1 for s in segments] == [True] * len(segments)
        ids = [e["properties"]["$insert_id"] for segment in await sent(spool) for e in segment]
        assert ids == [e["id"] for e in events]
        assert totals(spool) == {"accepted": 5, "waiting": 5}


@pytest.mark.parametrize("company", [0, 3])
async def test_an_event_at_mixpanels_limit(intake: Intake, spool: Spool, company: int) -> None:
    """A byte below the limit is sent, at the limit is a dead letter, whatever comes with it."""
    others = [currents(OPEN, id=f"n{n}") for n in range(company)]
    for size in (MAX_EVENT_BYTES - 1, MAX_EVENT_BYTES):
        await intake.accept_body(msgspec.json.encode({"events": [*others, large(size), *others]}))
    assert totals(spool) == {"accepted": 2 + 4 * company, "waiting": 1 + 4 * company, "dead_lettered": 1}
    (row,) = await letters(spool)
    assert f"{MAX_EVENT_BYTES} bytes" in row.reason
    assert row.code == CODES[CUSTOM]


async def test_an_event_at_the_limit_with_a_smaller_cap(mapping: EventMapping, tmp_path: Path) -> None:
    """What Mixpanel once said that it takes cuts batches, but doesn't make a dead letter of an event it may take."""
    async with Spool(SpoolOptions(path=str(tmp_path / "s.db")), NAMES) as spool:
        spool.cut_at(500_000)
        await Intake(mapping, spool).accept_body(msgspec.json.encode(large(MAX_EVENT_BYTES - 1)))
        assert totals(spool) == {"accepted": 1, "waiting": 1}


# -- what nobody means well ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_body", [False, True])
@pytest.mark.parametrize("depth", [300, 600, 900])
async def test_a_transformed_value_nested_too_deep_costs_only_itself(spool: Spool, as_body: bool, depth: int) -> None:
    """A rule walks through it before anybody asks how deep it is: one dead letter, and its neighbours wait."""
    rules = {CUSTOM: {"properties.plan": "hash"}}
    by = Intake(EventMapping(EVENT_TYPES, MappingSettings(token="t", transform=rules)), spool)
    deep = msgspec.json.encode(
        currents(CUSTOM, id="deep") | {"properties": {"name": "n", "custom_properties": {"plan": 0}}}
    )
    deep = deep.replace(b'"plan":0', b'"plan":' + b"[" * depth + b"]" * depth)
    lines = [msgspec.json.encode(currents(CUSTOM, id="a")), deep, msgspec.json.encode(currents(CUSTOM, id="b"))]
    if as_body:
        await by.accept_body(b'{"events":[%s]}' % b",".join(lines))
    else:
        await by.accept_lines(lines)
    assert totals(spool) == {"accepted": 3, "waiting": 2, "dead_lettered": 1}
    assert [letter.event for letter in await letters(spool)] == [deep]


@pytest.mark.parametrize("as_body", [False, True])
async def test_a_mistake_of_ours_costs_only_the_event_that_meets_it(
    intake: Intake, spool: Spool, monkeypatch: pytest.MonkeyPatch, as_body: bool
) -> None:
    """Whatever is raised: a sender would be answered 500 for ever, or be cut off, and its good events with it.

    Nor can it be what ends a replay of all, or keeps it from being looked at.
    """
    really = EventMapping.map

    def buggy(self: EventMapping, decoded: Any, now_s: float) -> Any:
        if any(getattr(event, "id", "") == "bad" for event in decoded.events):
            raise ZeroDivisionError("a bug")
        return really(self, decoded, now_s)

    monkeypatch.setattr(EventMapping, "map", buggy)
    lines = [msgspec.json.encode(currents(OPEN, id=id_)) for id_ in ("a", "bad", "b")]
    if as_body:
        await intake.accept_body(b'{"events":[%s]}' % b",".join(lines))
    else:
        await intake.accept_lines(lines)
    assert totals(spool) == {"accepted": 3, "waiting": 2, "dead_lettered": 1}
    (letter,) = await letters(spool)
    reason = "bridged failed on it: ZeroDivisionError: a bug"
    assert (letter.event, letter.reason) == (lines[1], reason)
    assert await replayed(intake, spool) == [reason]
    shown = intake.both_forms(letter)
    assert (shown["original"], shown["mapped"], shown["mapped_problem"]) == (msgspec.Raw(lines[1]), None, reason)
    monkeypatch.undo()
    assert await replayed(intake, spool) == [None]
    assert totals(spool) == {"accepted": 3, "waiting": 3}


@pytest.mark.parametrize(("size", "pad"), [(200_000, b""), (200_000, b"      "), (2**22, b"      "), (2**23, b"")])
async def test_a_body_of_crumbs_is_no_body(intake: Intake, spool: Spool, size: int, pad: bytes) -> None:
    """Each would be a dead letter a hundred times as large as it is, and push out those of others: Braze splits a 413."""
    crumb = b"1" + pad + b","
    with pytest.raises(TooLarge, match=r"too many (elements|small pieces)"):
        intake.accept_body(b"[" + crumb * (size // len(crumb)) + b"1]")
    assert totals(spool) == {}
    await intake.accept_body(b"[" + crumb * 500 + b"1]")
    assert totals(spool) == {"accepted": 501, "dead_lettered": 501}


@pytest.mark.parametrize(
    ("value", "count", "events"),
    [
        ([{"id": 4000, "q": 1}] * 150, 1, 100),
        ([[52.5, 13.4]] * 150, 1, 1000),
        ([1000] * 250, 220, 1),
        ([0] * 250, 20, 300),
        ({f"k{n}": "" for n in range(250)}, 20, 30),
    ],
    ids=["cart", "route", "numbers", "flags", "keys"],
)
async def test_events_of_many_small_values_are_events(
    intake: Intake, spool: Spool, value: Any, count: int, events: int
) -> None:
    """Whatever Mixpanel takes is taken, in bodies of any usual size."""
    event = currents(CUSTOM, properties={"name": "n", "custom_properties": {f"v{n}": value for n in range(count)}})
    body = msgspec.json.encode({"events": [event] * events})
    assert 250_000 < len(body) < 2**22
    await intake.accept_body(body)
    assert totals(spool) == {"accepted": events, "waiting": events}


@pytest.mark.parametrize("form", [b"%s", b"[%s]", b'{"events":[%s]}', b'\xef\xbb\xbf{"events": [%s]}\n'])
async def test_a_vast_event_of_crumbs_is_a_dead_letter(intake: Intake, spool: Spool, form: bytes) -> None:
    """It can't be split, so it is no 413; two of them are one, and no time is spent on any."""
    event = b'{"event_type":"users.behaviors.CustomEvent","properties":{"a":[%s[]]}}' % (b"[]," * 2**22)
    await intake.accept_body(form % event)
    assert totals(spool) == {"accepted": 1, "dead_lettered": 1}
    (letter,) = await letters(spool)
    assert letter.event == event
    assert "too large, and not looked at" in letter.reason
    with pytest.raises(TooLarge if form != b"%s" else BadRequest):
        intake.accept_body(form % (event + b"," + event))
    with pytest.raises(BadRequest):
        intake.accept_body(form % event[:-1])
    assert totals(spool) == {"accepted": 1, "dead_lettered": 1}


async def test_events_under_an_escaped_name_are_found_one_by_one(intake: Intake, spool: Spool) -> None:
    """Every parser reads the name `events` there; one of them is nested too deep for any, and costs only itself."""
    good = msgspec.json.encode(currents(OPEN))
    for depth in range(970, 1000):
        deep = b'{"event_type":"users.messages.email.Open","x":' + b"[" * depth + b"]" * depth + b"}"
        await intake.accept_body(b'{"\\u0065vents":[%s,%s]}' % (good, deep))
    assert totals(spool)["accepted"] == 60
    assert totals(spool)["waiting"] >= 30


async def test_skips_are_counted_with_the_books(intake: Intake, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the spool didn't take comes again: its reason counts then."""
    anonymous = msgspec.json.encode(currents(OPEN, user={}))

    def full(*_: Any) -> Any:
        raise SpoolFull("no room")

    with monkeypatch.context() as patch:
        patch.setattr(spool, "append", full)
        with pytest.raises(SpoolFull):
            intake.accept_lines([anonymous])
    assert intake.reasons == {}
    await intake.accept_lines([anonymous])
    assert intake.reasons == {"no external_user_id": 1}
    assert totals(spool) == {"accepted": 1, "skipped": 1}


# -- dead letters tried again ------------------------------------------------------------------------------------------


async def replayed(intake: Intake, spool: Spool) -> list[str | None]:
    """Tries every dead letter again: None, "skipped", or the reason why it stays."""
    tried = []
    for outcome in [intake.replay(row) for row in await letters(spool)]:
        if isinstance(outcome, str):
            tried.append(outcome)
        elif isinstance(outcome, Skipping):
            tried.append(await outcome.written or "skipped")
        else:
            tried.append(await outcome)
    return tried


async def test_replay_with_another_configuration(intake: Intake, spool: Spool) -> None:
    """A type that is known now, or an id policy that changed: the event goes on, and was accepted once."""
    unknown = currents(time=1_790_000_000) | {"event_type": "users.messages.fax.Send"}
    await intake.accept_lines([msgspec.json.encode(unknown)])
    assert await replayed(intake, spool) == ["unknown event type"]
    assert totals(spool) == {"accepted": 1, "dead_lettered": 1}

    forwarding = Intake(EventMapping(EVENT_TYPES, MappingSettings(token="t", unknown="forward")), spool)
    assert await replayed(forwarding, spool) == [None]
    assert totals(spool) == {"accepted": 1, "waiting": 1}
    assert [event["event"] for segment in await sent(spool) for event in segment] == ["Fax Send"]
    assert (await letters(spool), spool.dead_letters) == ([], 0)


async def test_replay_into_a_skip(intake: Intake, spool: Spool) -> None:
    """What the configuration skips today is skipped, and is no dead letter any more."""
    await intake.accept_lines([msgspec.json.encode(currents() | {"event_type": "users.messages.fax.Send"})])
    skipping = Intake(EventMapping(EVENT_TYPES, MappingSettings(unknown="skip")), spool)
    assert await replayed(skipping, spool) == ["skipped"]
    assert totals(spool) == {"accepted": 1, "skipped": 1}


async def test_replay_of_an_event_that_was_written_over_lines(intake: Intake, spool: Spool) -> None:
    """A body may hold its events with line breaks; kept as they came, they can be read again."""
    pretty = json.dumps(currents(OPEN, user={"external_user_id": "0"}), indent=2).encode()
    await intake.accept_body(b'{"events":[%s]}' % pretty)
    (row,) = await letters(spool)
    row.event = row.event.replace(b'"0"', b'"someone"')
    outcome = intake.replay(row)
    assert not isinstance(outcome, str)
    await outcome
    assert totals(spool) == {"accepted": 1, "waiting": 1}


async def test_replay_of_what_mixpanel_refused_sends_the_same_bytes(intake: Intake, spool: Spool) -> None:
    """It was mapped when it came: a second mapping could change it, and Mixpanel couldn't see that it is the same."""
    event = b'{"event":"x","properties":{"$insert_id":"a"}}'
    row = DeadLetterRow(1, 0.0, 0.0, 1, "mixpanel", 3, NAMES[3], "because", event)
    outcome = intake.replay(row)
    assert not isinstance(outcome, str)
    await outcome
    segments, _ = await spool.read_after(0, 2**40)
    assert [(lines_of([s]), s.codes) for s in segments] == [([event], b"\x03")]


async def test_events_that_are_too_large_have_one_reason(intake: Intake, spool: Spool) -> None:
    """However large each is: dead letters are counted by their reason, and their size is told beside it."""
    for more in range(3):
        await intake.accept_body(msgspec.json.encode(large(MAX_EVENT_BYTES + more)))
    assert [letter.stage for letter in await letters(spool)] == ["bridged"] * 3
    assert {letter.reason for letter in await letters(spool)} == {
        "too large as a Mixpanel event: Mixpanel takes less than 1000000 bytes"
    }


async def test_replay_of_an_event_that_is_too_large(intake: Intake, spool: Spool) -> None:
    """What was kept of it is its Mixpanel form, and it says so: it stays, for the reason that it is here."""
    await intake.accept_body(msgspec.json.encode(large(MAX_EVENT_BYTES)))
    (row,) = await letters(spool)
    assert (row.stage, json.loads(row.event)["event"]) == ("bridged", "[Braze Custom Event] n")
    assert await replayed(intake, spool) == [row.reason]


@pytest.mark.parametrize("event", [b"", b" ", b"nonsense", b"{}", b"{}{}"])
async def test_replay_of_what_is_no_event(intake: Intake, spool: Spool, event: bytes) -> None:
    """It stays, with a reason, and nothing is changed."""
    row = DeadLetterRow(1, 0.0, 0.0, 1, "door", UNDECODABLE_CODE, "", "because", event)
    assert isinstance(intake.replay(row), str)
    await intake.accept_body(b"")
    assert totals(spool) == {}


# -- events from the archive -------------------------------------------------------------------------------------------


async def test_archived_events_go_on_as_they_are(intake: Intake, spool: Spool) -> None:
    """They were mapped when they came: their bytes stay, so that Mixpanel knows a repetition; they count as new ones."""
    archived = [
        b'{"event":"Email Open","properties":{"$insert_id":"a", "time" :1}}',
        b'{"event":"Fax Send","properties":{"$insert_id":"b","time":2}}',
    ]
    committed, _ = intake.accept_archived([archived[0] + b"\n", b"\n", b"  " + archived[1] + b"\r\n"])
    await committed
    segments, _ = await spool.read_after(0, 2**40)
    assert [(lines_of([segment]), segment.codes) for segment in segments] == [
        (archived, bytes([CODES[OPEN], UNKNOWN_CODE]))
    ]
    assert totals(spool) == {"accepted": 2, "waiting": 2}


NOT_ARCHIVED = [
    b'{"event":"Email Open","properties":{}}',
    b'{"event":"Email Open","properties":[]}',
    b'{"event":"Email Open","properties":{"$insert_id":7,"time":1}}',
]


@pytest.mark.parametrize("line", [*ODD, *TRUNCATED, *GOOD[:2], *NOT_ARCHIVED])
async def test_what_is_no_archived_event_is_a_dead_letter(intake: Intake, spool: Spool, line: bytes) -> None:
    """A damaged file, or one that is something else, costs its own lines, and no line gets lost."""
    good = b'{"event":"Email Open","properties":{"$insert_id":"a","time":1}}'
    committed, refused = intake.accept_archived([line, good, line])
    await committed
    assert refused == (2 if line.strip() else 0)
    expected = {"accepted": 3, "waiting": 1, "dead_lettered": 2} if line.strip() else {"accepted": 1, "waiting": 1}
    assert totals(spool) == expected
    assert {row.event for row in await letters(spool)} == ({line} if line.strip() else set())


# -- fields that Braze added -------------------------------------------------------------------------------------------


async def test_new_fields_are_sampled(mapping: EventMapping, spool: Spool) -> None:
    """One event of each type a second is looked at; a second later, or if the clock was set back, again."""
    now_s = 1_790_000_000.0
    intake = Intake(mapping, spool, clock=lambda: now_s)
    event = currents(OPEN, time=1_700_000_000)
    event["properties"] |= {"brand_new": 1}
    other = currents("users.messages.email.Send", time=1_700_000_000)
    other["properties"] |= {"brand_new": 1, "x" * 300: 2}
    raw = ndjson([event, event, other]).splitlines()
    seen = []
    for step in (0, 0.5, 0.6, -3600):
        now_s += step
        intake.accept_lines(raw)
        await intake.accept_body(b"[%s]" % b",".join(raw))
        seen.append(intake.unknown_fields[CODES[OPEN], "brand_new"])
    assert seen == [1, 1, 2, 3]
    assert set(intake.unknown_fields) == {
        (CODES[OPEN], "brand_new"),
        (CODES["users.messages.email.Send"], "brand_new"),
        (CODES["users.messages.email.Send"], "x" * 100),
    }


async def test_the_memory_for_new_fields_is_bounded(mapping: EventMapping, spool: Spool) -> None:
    """A client that makes up names must not fill the memory."""
    now_s = 1_790_000_000.0
    intake = Intake(mapping, spool, clock=lambda: now_s)
    for n in range(3):
        now_s += 2
        event = currents(OPEN, time=1_700_000_000)
        event["properties"] |= {f"new{n}_{m}": m for m in range(700)}
        await intake.accept_lines([msgspec.json.encode(event)])
    assert len(intake.unknown_fields) == 1000


# -- whatever comes ----------------------------------------------------------------------------------------------------

calls = st.one_of(
    st.tuples(st.just("lines"), st.lists(junk | st.sampled_from([*GOOD, *ODD, *TRUNCATED]), max_size=6)),
    st.tuples(st.just("body"), junk),
    st.tuples(
        st.just("body"), st.lists(st.sampled_from([*GOOD, *ODD]), max_size=6).map(lambda e: b"[%s]" % b",".join(e))
    ),
    st.tuples(st.just("oversized"), st.binary(max_size=20)),
    st.tuples(st.just("replay"), st.just(b"")),
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(calls, max_size=5), st.sampled_from(["dead_letter", "forward", "skip"]))
def test_no_input_to_a_door_ever_crashes_it(made: list[tuple[str, Any]], unknown: Any) -> None:
    """Any bytes in any order give a future or BadRequest, nothing else; and every event that was taken is somewhere."""

    async def accepted(path: str) -> None:
        async with Spool(SpoolOptions(path=path, max_segment_bytes=2000, synchronous="OFF"), NAMES) as spool:
            settings_ = MappingSettings(token="t", unknown=unknown)
            intake = Intake(EventMapping(EVENT_TYPES, settings_), spool, 3, clock=lambda: NOW_S)
            lines = bodies = 0
            for kind, data in made:
                if kind == "lines":
                    await intake.accept_lines(data)
                    lines += sum(bool(line.removeprefix(b"\xef\xbb\xbf").strip()) for line in data)
                elif kind == "body":
                    before = spool.accounts.total("accepted")
                    try:
                        await intake.accept_body(data)
                    except BadRequest:
                        continue
                    bodies += spool.accounts.total("accepted") - before
                elif kind == "oversized":
                    await intake.accept_oversized(data, 10)
                    lines += 1
                else:
                    await replayed(intake, spool)
                assert spool.accounts.total("accepted") == lines + bodies
                ends = ("waiting", "dead_lettered", "skipped")
                assert spool.accounts.total("accepted") == sum(map(spool.accounts.total, ends))
                assert spool.accounts.total("dead_lettered") == spool.dead_letters == len(await letters(spool))
                assert spool.accounts.total("waiting") == sum(len(segment) for segment in await sent(spool))

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(accepted(f"{folder}/spool.db"))
