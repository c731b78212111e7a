"""Dead letters: found, shown, tried again exactly once, exported as they are, purged, and always accounted for."""

import asyncio
import base64
import collections
import json
import socket
import urllib.parse

import msgspec
import pytest
from conftest import balanced, currents, until

from bridged.addresses import split_address
from bridged.backlog import dead_letters
from bridged.backlog.dead_letters import DeadLetters, Filter, exported
from bridged.backlog.spool import DeadLetter, DeadLetterRow, Intaken
from bridged.commands import dead_letters as command
from bridged.errors import SpoolError, SpoolFull

OPEN = "users.messages.email.Open"


def letters(count, stage="door", event_type=OPEN, reason="because", event=b'{"x":1}'):
    """Dead letters with three reasons, in turn."""
    return [DeadLetter(0, event_type, stage, f"{reason} {n % 3}", event) for n in range(count)]


async def ids(verbs, wanted=None):
    """The ids of what `slices` gives."""
    return [row.id async for rows in verbs.slices(wanted or Filter()) for row in rows]


@pytest.fixture
async def verbs(spool):
    """The verbs over a spool of 25 dead letters of two kinds; a replay is refused for even ids."""
    await spool.append(Intaken([], letters(20)))
    await spool.append(Intaken([], letters(5, "mixpanel", "users.behaviors.Purchase", "properties.price: 100% WRONG")))

    def replay(row):
        return "no" if row.id % 2 == 0 else spool.append(Intaken([], [], bytes([row.code]), replayed=[row]))

    return DeadLetters(spool, replay)


# -- the verbs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        (Filter(), 25),
        (Filter(event_type="users.behaviors.Purchase"), 5),
        (Filter(event_type="users.behaviors.Purch"), 0),
        (Filter(reason="because 1"), 7),
        (Filter(reason="WRONG"), 5),
        (Filter(reason="wrong 0"), 2),
        (Filter(reason="100%"), 5),
        (Filter(reason="1_0"), 0),
        (Filter(stage="mixpanel"), 5),
        (Filter(since=0), 25),
        (Filter(until=1), 0),
        (Filter(stage="door", reason="wrong"), 0),
    ],
)
async def test_filters(verbs, wanted, count, monkeypatch):
    """Each filter means what it says (a reason is text, not a pattern), whatever the size of the windows."""
    for window in (3, 10_000):
        monkeypatch.setattr(dead_letters, "_WINDOW_ROWS", window)
        assert len(await verbs.list_after(wanted, limit=1000)) == count
        assert len(await ids(verbs, wanted)) == count


async def test_pages(verbs, monkeypatch):
    """Paging by the last id sees each one once, in order, across windows."""
    monkeypatch.setattr(dead_letters, "_WINDOW_ROWS", 4)
    seen, after = [], 0
    while page := await verbs.list_after(Filter(), after, 7):
        seen += [summary.id for summary in page]
        after = page[-1].id

    assert seen == list(range(1, 26))


async def test_groups(verbs, monkeypatch):
    """What is alike is counted together, over all windows, the most frequent first."""
    monkeypatch.setattr(dead_letters, "_WINDOW_ROWS", 4)
    groups = await verbs.groups()

    assert sum(group.count for group in groups) == 25
    assert [group.count for group in groups] == [7, 7, 6, 2, 2, 1]


@pytest.mark.parametrize(
    "wanted",
    [
        Filter(),
        Filter(reason="because 1"),
        Filter(exact_reason="because 1"),
        Filter(exact_reason="because"),
        Filter(until=1),
    ],
)
@pytest.mark.parametrize("window", [1, 4, 1000])
async def test_newest_first(verbs, monkeypatch, wanted, window):
    """The pages from the newest on are those from the oldest on, in reverse; and a count is their number."""
    monkeypatch.setattr(dead_letters, "_WINDOW_ROWS", window)
    expected = (await ids(verbs, wanted))[::-1]
    found, before = [], dead_letters.MAX_ID
    while page := await verbs.list_before(wanted, before, 3):
        found += [row.id for row in page]
        before = page[-1].id
    assert found == expected
    assert await verbs.count(wanted) == len(expected)
    assert await verbs.count([*expected, 10**6]) == len(expected)
    assert sum(group.count for group in await verbs.groups(wanted)) == len(expected)


async def test_groups_of_too_many_kinds(spool, verbs, monkeypatch):
    """A million reasons of their own are no million groups: what is beyond some thousand kinds is counted together."""
    monkeypatch.setattr(dead_letters, "_MAX_GROUPS", 10)
    for n in range(30):
        await spool.append(Intaken([], letters(1, reason=f"another {n}")))
    for wanted in (None, None, Filter(reason="another")):
        groups = await verbs.groups(wanted)
        assert sum(group.count for group in groups) == (55 if wanted is None else 30)
        assert len(groups) == 11
        assert groups[0].reason == dead_letters.OTHERS


async def test_groups_are_counted_on(spool, verbs):
    """What came since is added to what was counted; what went or changed meanwhile is not in it any more."""

    async def agree():
        rows = await verbs.list_after(Filter(), limit=1000)
        alike = collections.Counter((row.stage, row.event_type, row.reason) for row in rows)
        told = {(group.stage, group.event_type, group.reason): group.count for group in await verbs.groups()}
        assert told == alike

    await agree()
    await spool.append(Intaken([], letters(7, reason="another")))
    assert verbs._known_to == 25
    await agree()
    assert verbs._known_to == 32
    await verbs.purge(Filter(exact_reason="another 1"))
    await agree()
    await verbs.replay(Filter(reason="because"))
    await agree()
    await verbs.purge([row.id for row in await verbs.list_before(Filter(), limit=3)])
    await agree()


async def test_slices_are_bounded(spool, verbs, monkeypatch):
    """However large the events, only so many bytes are in memory at once; ids that don't exist are passed over."""
    monkeypatch.setattr(dead_letters, "_SLICE_BYTES", 10)

    assert [len(rows) async for rows in verbs.slices(Filter())] == [2] * 12 + [1]
    assert await ids(verbs, [99, 3, 1, 3, -5, 2]) == [1, 2, 3]


async def test_purge_frees_room_and_keeps_the_books(spool, verbs):
    """A purge deletes what matches, gives the bytes back, and leaves the count of dead-lettered events as it was."""
    used, before = spool.used_bytes, spool.accounts.total("dead_lettered")

    assert await verbs.purge(Filter(stage="mixpanel")) == 5
    assert spool.dead_letters == 20
    assert spool.used_bytes < used
    assert await verbs.purge([1, 2, 2, 999]) == 2
    assert await verbs.purge(Filter()) == 18
    assert spool.dead_letters == 0
    assert spool.accounts.total("dead_lettered") == before
    assert spool.accounts.imbalance() == 0


async def test_purge_while_dead_letters_come(spool, verbs, monkeypatch):
    """The count is that of the rows, whatever comes between the windows."""
    monkeypatch.setattr(dead_letters, "_PURGE_ROWS", 2)
    purging = asyncio.ensure_future(verbs.purge(Filter(stage="door")))
    for _ in range(10):
        await spool.append(Intaken([], letters(1, "mixpanel")))
    assert await purging == 20

    [(count,)] = await spool.run(lambda db: db.execute("SELECT count(*) FROM dead_letters").fetchall())
    assert spool.dead_letters == count == len(await ids(verbs))


@pytest.mark.parametrize("verb", ["purge", "replay", "slices", "count"])
async def test_what_comes_meanwhile_is_left_alone(spool, verbs, monkeypatch, verb):
    """Each verb ends with what was there when it began, however fast more comes, and nobody's unseen letter is purged."""
    monkeypatch.setattr(dead_letters, "_WINDOW_ROWS", 2)
    monkeypatch.setattr(dead_letters, "_PURGE_ROWS", 2)
    read = verbs._read

    async def comes_first(function, *args):
        result = await read(function, *args)
        await spool.append(Intaken([], letters(1)))
        return result

    monkeypatch.setattr(verbs, "_read", comes_first)
    async with asyncio.timeout(20):
        if verb == "slices":
            assert len(await ids(verbs)) == 25
        elif verb == "replay":
            assert (await verbs.replay(Filter())).replayed == 13
        else:
            assert await getattr(verbs, verb)(Filter()) == 25
    assert (await verbs.list_before(Filter(), limit=1))[0].id > 25


@pytest.mark.parametrize("verb", ["purge", "replay"])
@pytest.mark.parametrize("which", [{}, {"stage": "door"}])
async def test_only_what_was_counted(daemon, client, verb, which):
    """Who was told of two, and says yes when there are three, means the two."""
    app = await daemon()
    await app.spool.append(Intaken([], letters(2)))
    _, counted = await call(client, app, "POST", "/count", json={"filter": which} if which else {"all": True})
    await app.spool.append(Intaken([], letters(1)))
    status, done = await call(client, app, "POST", f"/{verb}", json={"filter": which | {"upto": counted["upto"]}})

    assert (status, counted["count"]) == (200, 2)
    assert sum(value for value in done.values() if isinstance(value, int)) == 2
    assert app.spool.dead_letters == (1 if verb == "purge" else 3)
    assert [row["attempts"] for row in (await call(client, app, "GET", ""))[1]["dead_letters"]][-1] == 1
    for wrong in (-1, 2**63):
        assert (await call(client, app, "POST", f"/{verb}", json={"filter": {"upto": wrong}}))[0] == 400, wrong


async def test_a_replay_that_is_refused_again_ends(spool):
    """Each letter is tried once a replay, although Mixpanel's refusal brings it back under another id."""
    await spool.append(Intaken([], letters(25, "mixpanel")))

    def refused(row):
        again = DeadLetter(row.code, row.event_type, row.stage, row.reason, row.event)
        return spool.append(Intaken([], [again], bytes([row.code]), replayed=[row]))

    verbs = DeadLetters(spool, refused)
    async with asyncio.timeout(20):
        assert (await verbs.replay(Filter())).replayed == 25
    assert spool.dead_letters == 25
    assert await ids(verbs) == list(range(26, 51))


async def test_purge_lets_the_doors_read_on(spool, verbs):
    """Room that a purge made is noticed although nothing is committed."""
    spool.room.clear()
    await verbs.purge([1])

    assert spool.room.is_set()


async def test_replay_counts_and_touches(spool, verbs):
    """A replayed one leaves; one that is refused again stays, with the new reason and one more attempt."""
    result = await verbs.replay(Filter(stage="door"))

    assert (result.replayed, result.refused, result.reasons) == (10, 10, {"no": 10})
    assert spool.dead_letters == 15
    row = await verbs.get(2)
    assert (row.attempts, row.reason) == (2, "no")
    assert row.last_at > row.first_at
    assert await verbs.get(1) is None
    assert spool.accounts.imbalance() == 0


async def test_replay_stops_when_the_spool_is_full(spool, verbs):
    """Near its cap the spool isn't burdened with old events on top: the replay ends, and nothing is lost."""
    spool.used_bytes += 10 * 2**30
    with pytest.raises(SpoolFull):
        await verbs.replay(Filter())

    assert spool.dead_letters == 25
    assert not verbs.busy


async def test_one_at_a_time(spool, verbs):
    """Two replays of the same row at once would deliver it twice: the second is refused."""
    first = asyncio.create_task(verbs.replay(Filter()))
    await asyncio.sleep(0)
    with pytest.raises(SpoolError, match="under way"):
        await verbs.replay(Filter())
    with pytest.raises(SpoolError, match="under way"):
        await verbs.purge(Filter())
    await first

    assert not verbs.busy


@pytest.mark.parametrize("event", [b"", b"\x1f\x8b\x08 not an event", b"[1]", b'{"a":1}\n{"a":2}'])
async def test_what_is_no_event_is_never_sent(spool, event):
    """What is left of a damaged segment can't be replayed: it would only spoil a batch."""
    await spool.append(Intaken([], letters(1, "mixpanel", event=event)))
    verbs = DeadLetters(spool, lambda _row: pytest.fail("it was tried"))

    result = await verbs.replay([1])
    assert (result.replayed, result.refused) == (0, 1)


@pytest.mark.parametrize(
    ("event", "key"),
    [(b'{"n":1.50,"big":12345678901234567890123}', "event"), (b"NaN", "event_base64"), (b"\xff", "event_base64")],
)
def test_export_keeps_the_event_as_it_is(event, key):
    """An event that is JSON is exported in its own spelling; anything else as its bytes."""
    row = DeadLetterRow(1, 0.0, 0.0, 1, "door", 0, OPEN, "because", event)
    line = msgspec.json.encode(exported(row))

    if key == "event":
        assert b'"event":' + event in line
    else:
        assert base64.b64decode(json.loads(line)[key]) == event


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (b'{"n":NaN,"name":"\\udc00"}', '{"n":NaN,"name":"\\udc00"}'),
        (b"nonsense", "nonsense"),
        (b"3", "3"),
        (b"\xff", None),
        (b'{"a":1}', None),
    ],
)
def test_what_is_no_event_can_be_read_if_it_is_text(event, text):
    """NaN, or half of a surrogate pair, in plain ASCII: nobody reads base64. What is JSON is there as such."""
    row = DeadLetterRow(1, 0.0, 0.0, 1, "door", 0, OPEN, "because", event)

    assert json.loads(msgspec.json.encode(exported(row))).get("event_text") == text


def test_a_line_of_the_list_has_the_end_of_a_reason():
    """There Mixpanel's words say what is wrong: a property's name may fill the line before it."""
    reason = f"properties.{'a' * 70}…: properties.{'a' * 70}… is invalid: string should be valid utf8"
    shown = command._brief(reason)

    assert len(shown) == 120
    assert shown.startswith("properties.aaa")
    assert shown.endswith("is invalid: string should be valid utf8")
    assert command._brief("short") == "short"


def test_export_is_one_line_an_event():
    """An event that came with line breaks between its members is still one line of NDJSON."""
    row = DeadLetterRow(1, 0.0, 0.0, 1, "door", 0, OPEN, "because", b'{\r\n  "id": "a\\nb"\n}')
    line = msgspec.json.encode(exported(row))

    assert b"\n" not in line
    assert json.loads(line)["event"] == {"id": "a\nb"}


# -- the API ----------------------------------------------------------------------------------------------------------


async def send(client, app, *events):
    """Brings events to the HTTP door."""
    url = f"http://{app.config.sources.http.listen}/v1/currents"
    async with client.post(url, json={"events": events}) as answer:
        assert answer.status == 200


async def call(client, app, method, path, **kwargs):
    """The status and the JSON of an answer of the API."""
    async with client.request(method, f"http://{app.config.admin.listen}/api/dead-letters{path}", **kwargs) as answer:
        return answer.status, await answer.json()


def fax(id_):
    """An event of a type that nobody knows."""
    return currents(id=id_) | {"event_type": "users.messages.fax.Send"}


async def test_replay_after_a_change_delivers_once(daemon, client, emulator):
    """Refused by one configuration, replayed under another: delivered exactly once, and the books move with it."""
    app = await daemon()
    await send(client, app, fax("a"), fax("b"), currents(id="c"))
    await until(lambda: app.spool.accounts.total("delivered") == 1, "delivery")
    await app.__aexit__(None, None, None)

    app = await daemon(events__unknown="forward")
    status, result = await call(client, app, "POST", "/replay", json={"all": True})
    await until(lambda: not app.backlog.events, "delivery")

    assert (status, result) == (200, {"replayed": 2, "refused": 0, "skipped": 0, "reasons": {}})
    assert sorted(event["properties"]["$insert_id"] for event in emulator.events()) == ["a", "b", "c"]
    assert app.spool.accounts.total("delivered") == 3
    assert app.spool.dead_letters == app.spool.accounts.total("dead_lettered") == 0
    assert await call(client, app, "POST", "/replay", json={"all": True}) == (200, {**result, "replayed": 0})
    balanced(app)


async def test_what_mixpanel_refused_is_replayed_as_it_was(daemon, client, emulator):
    """An event that Mixpanel refused goes again byte for byte, with the same `$insert_id`."""
    failed = {"index": 0, "insert_id": "a", "field": "properties.price", "message": "too dear"}
    body = {"code": 400, "error": "some data points in the request failed validation"}
    body |= {"failed_records": [failed], "num_records_imported": 0, "status": "Bad Request"}
    emulator.script([{"status": 400, "body": body, "times": 1}])
    app = await daemon()
    await send(client, app, currents(id="a"))
    await until(lambda: app.spool.dead_letters, "the dead letter")

    listing = (await call(client, app, "GET", "?stage=mixpanel"))[1]
    shown = (await call(client, app, "GET", f"/{listing['dead_letters'][0]['id']}"))[1]
    replayed = (await call(client, app, "POST", "/replay", json={"filter": {"reason": "too dear"}}))[1]
    await until(lambda: app.spool.accounts.total("delivered") == 1, "delivery")

    assert shown["event"]["properties"]["$insert_id"] == "a"
    assert replayed["replayed"] == 1
    assert [event["properties"]["$insert_id"] for event in emulator.events()] == ["a"]
    balanced(app)


async def test_listing_and_export(daemon, client):
    """The API lists with filters and pages, and exports every one with its event."""
    app = await daemon()
    await send(client, app, *(fax(f"{n}") for n in range(5)), currents(id="x", time="soon"))

    page = (await call(client, app, "GET", "?event_type=users.messages.fax.Send&limit=2"))[1]
    rest = (await call(client, app, "GET", f"?event_type=users.messages.fax.Send&after={page['next']}"))[1]
    groups = (await call(client, app, "GET", "/groups"))[1]
    async with client.get(f"http://{app.config.admin.listen}/api/dead-letters/export") as answer:
        exports = [json.loads(line) for line in (await answer.text()).splitlines()]

    assert [len(page["dead_letters"]), len(rest["dead_letters"]), rest["next"]] == [2, 3, None]
    assert [group["count"] for group in groups] == [5, 1]
    assert sorted(export["event"]["id"] for export in exports) == ["0", "1", "2", "3", "4", "x"]


async def test_who_leaves_an_export_is_no_error(daemon, client, caplog):
    """As `export - | head` does: nothing is logged, and the daemon answers on."""
    app = await daemon()
    large = fax("a")
    large["properties"]["note"] = "x" * 500_000
    for n in range(20):
        await send(client, app, large | {"id": f"{n}"})
    await until(lambda: app.spool.dead_letters == 20, "the dead letters")
    others = set(asyncio.all_tasks())
    sock = socket.create_connection(split_address(app.config.admin.listen))
    sock.sendall(b"GET /api/dead-letters/export HTTP/1.1\r\nHost: localhost\r\n\r\n")
    sock.setblocking(False)
    assert await asyncio.get_running_loop().sock_recv(sock, 100)
    answering = set(asyncio.all_tasks()) - others
    assert answering
    sock.close()

    await until(lambda: all(task.done() for task in answering), "the end of the answer")
    assert [record.getMessage() for record in caplog.records] == []
    assert (await call(client, app, "GET", "?limit=1"))[0] == 200


@pytest.mark.parametrize(
    "order",
    [
        {},
        {"all": False},
        {"all": True, "ids": [1]},
        {"filter": {}},
        {"filter": {"typo": 1}},
        {"ids": [0]},
        {"ids": ["1"]},
        {"ids": [2**63]},
        {"alll": True},
        [],
    ],
)
async def test_unclear_orders_are_refused(daemon, client, order):
    """Nothing is replayed or purged unless the order says exactly what."""
    app = await daemon()
    await send(client, app, fax("a"))

    for verb in ("/replay", "/purge"):
        assert (await call(client, app, "POST", verb, json=order))[0] == 400
    assert app.spool.dead_letters == 1


@pytest.mark.parametrize("query", ["?limit=1001", "?limit=-1", "?after=x", "?stage=moon", "?typo=1", "?since=then"])
async def test_unclear_queries_are_refused(daemon, client, query):
    """A filter that isn't understood must not be taken for none."""
    app = await daemon()

    status, body = await call(client, app, "GET", query)
    assert status == 400
    assert body["error"]


async def test_unknown_ids_are_404(daemon, client):
    """There is no dead letter 7, and none with a number beyond any."""
    app = await daemon()

    for id_ in ("7", "9999999999999999999"):
        assert (await call(client, app, "GET", f"/{id_}"))[0] == 404


async def test_second_replay_is_409(daemon, client):
    """While one replay is under way, another replay or purge is told to wait."""
    app = await daemon()
    await send(client, app, *(fax(f"{n}") for n in range(300)))
    answers = await asyncio.gather(*(call(client, app, "POST", "/replay", json={"all": True}) for _ in range(5)))

    statuses = sorted(status for status, _ in answers)
    assert statuses[0] == 200
    assert set(statuses) <= {200, 409}
    balanced(app)


async def test_the_page_looks_at_them(daemon, client, emulator):
    """Newest first, page by page, by an exact reason; one with both its forms; a count before anything is deleted."""
    app = await daemon(mixpanel__token="example-token-1")
    url = f"http://{app.config.admin.listen}/api/dead-letters"
    events = [currents(seed=n) | {"time": -n} for n in range(1, 6)] + [
        currents("users.messages.sms.Send", seed=9) | {"id": 7}
    ]
    async with client.post(f"http://{app.config.sources.http.listen}/v1/currents", json={"events": events}) as got:
        assert got.status == 200

    async def ask(path=""):
        async with client.get(url + path) as got:
            return got.status, await got.json()

    _, page = await ask("?order=newest&limit=4")
    assert [row["id"] for row in page["dead_letters"]] == [6, 5, 4, 3]
    _, page = await ask(f"?order=newest&limit=4&before={page['next']}")
    assert ([row["id"] for row in page["dead_letters"]], page["next"]) == ([2, 1], None)
    for query in ("?order=sideways", "?before=3", "?order=newest&after=3"):
        assert (await ask(query))[0] == 400
    _, groups = await ask("/groups?event_type=users.messages.email.Open")
    assert sum(group["count"] for group in groups) == 5
    query = urllib.parse.urlencode({"exact_reason": groups[0]["reason"], "order": "newest"})
    assert len((await ask(f"?{query}"))[1]["dead_letters"]) == groups[0]["count"]

    status, letter = await ask("/1")
    assert (status, letter["original"], letter["mapped"]) == (200, letter["event"], None)
    assert "ill-typed" in letter["mapped_problem"]
    app.activity.tell("reloaded", "so that the next entry is another")
    for order, count in (
        ({"all": True}, 6),
        ({"ids": [1, 2, 99]}, 2),
        ({"filter": {"exact_reason": groups[0]["reason"]}}, groups[0]["count"]),
    ):
        async with client.post(f"{url}/count", json=order) as got:
            assert await got.json() == {"count": count, "upto": 6}
    for query, status, lines in (
        ("2,1,99", 200, 2),
        ("2,x", 400, 1),
        ("2&stage=door", 400, 1),
        (",".join("1" * 1001), 400, 1),
    ):
        async with client.get(f"{url}/export?ids={query}") as got:
            assert (got.status, len((await got.read()).splitlines())) == (status, lines), query
    async with client.post(f"{url}/purge", json={"ids": [1, 2, 99]}) as got:
        assert await got.json() == {"purged": 2}
    assert (app.activity.entries[-1].kind, app.activity.entries[-1].detail) == ("purge", {"purged": 2})

    # What Mixpanel refuses is kept as it was sent; its token is masked.
    emulator.script(
        [
            {
                "status": 400,
                "body": '{"code":400,"error":"some data points in the request failed validation",'
                '"failed_records":[{"index":0,"$insert_id":"","field":"properties.x","message":"no"}],"num_records_imported":0}',
            }
        ]
    )
    async with client.post(
        f"http://{app.config.sources.http.listen}/v1/currents", json={"events": [currents(seed=77)]}
    ) as got:
        assert got.status == 200
    await until(lambda: app.spool.dead_letters == 5, "the refusal", 30)
    _, letter = await ask("/7")
    assert (letter["original"], letter["mapped"]["event"], letter["mapped"]) == (None, "Email Open", letter["event"])
    assert letter["mapped"]["properties"]["token"] == "********"
    balanced(app)
