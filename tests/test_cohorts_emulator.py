"""Braze's emulator over real sockets: what it takes, what it refuses, what it bills, and every kind of trouble."""

import asyncio
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridged.braze.requests import Target, announce, change_members, track
from bridged.braze.transport import Transport
from bridged.braze.verdicts import RateLimit
from bridged.emulator.braze import BrazeConfig, BrazeEmulator
from bridged.emulator.limits import FixedWindow
from bridged.emulator.reading import Call
from bridged.emulator.workspace import Workspace, WorkspaceKeys, WorkspaceLimits
from bridged.errors import ConfigError, ListenError
from bridged.mixpanel.verdicts import Delivered, Halt, Reject, Retry, Split

JSON = "application/json"
COHORTS = "mixpanel_cohorts"


class Client:
    """A sender that can say anything."""

    def __init__(self, braze, session):
        self.braze, self.session = braze, session

    async def post(self, body, path="/users/track", *, key="key", kind=JSON, method="POST"):
        data = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
        headers = {"Authorization": f"Bearer {key}", "Content-Type": kind}
        async with self.session.request(method, self.braze.url + path, data=data, headers=headers) as response:
            self.headers = response.headers
            return response.status, await response.json(content_type=None)

    async def update(self, **attributes):
        """One object of /users/track."""
        return await self.post({"attributes": [{"external_id": "ada", **attributes}]})

    def of(self, user="ada"):
        """The attributes of a user."""
        return next((each["attributes"] for each in self.braze.users() if each.get("external_id") == user), None)


@contextlib.asynccontextmanager
async def emulator(**config):
    """An emulator on a free port and a sender for it."""
    async with (
        BrazeEmulator(BrazeConfig(port=0, **config)) as braze,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session,
    ):
        yield Client(braze, session)


@pytest.fixture
async def client():
    """A sender for an emulator that believes anybody, and where everybody exists."""
    async with emulator() as client:
        yield client


async def test_attributes_are_written(client):
    """A good request is 201 with the number of objects, and each user can be read back with how often it was written."""
    first = await client.post(
        {"attributes": [{"external_id": "ada", COHORTS: ["a", "b"]}, {"external_id": "bo", COHORTS: ["b"], "x": 1}]}
    )
    await client.update(**{COHORTS: ["b"]})

    assert first == (201, {"message": "success", "attributes_processed": 2})
    assert client.braze.users() == [
        {"external_id": "ada", "writes": 2, "attributes": {COHORTS: ("b",)}},
        {"external_id": "bo", "writes": 1, "attributes": {COHORTS: ("b",), "x": 1}},
    ]
    assert client.braze.membership(COHORTS) == {"ada": {"b"}, "bo": {"b"}}
    summary = client.braze.summary()
    assert (summary.objects, summary.applied, summary.points, summary.writes, summary.max_writes) == (3, 3, 4, 3, 2)


async def test_arrays_are_set_added_to_removed_from_and_deleted(client):
    """Values are unique, an addition keeps the rest, null deletes; each costs what Braze's price list says."""
    costs = []

    async def write(value):
        before = client.braze.summary().points
        assert (await client.update(x=value))[0] == 201
        costs.append(client.braze.summary().points - before)
        return client.of().get("x")

    assert await write(["a", "b", "a"]) == ("a", "b")
    assert await write({"add": ["c", "b"]}) == ("a", "b", "c")
    assert await write({"remove": ["a", "c"]}) == ("b",)
    assert await write({"remove": ["not there"]}) == ("b",)
    assert await write(None) is None
    assert await write({"add": "d"}) == ("d",)
    assert await write({"deep": {"one": 1, "two": 2}, "three": 3}) == {"deep": {"one": 1, "two": 2}, "three": 3}
    assert costs == [1, 2, 2, 1, 1, 1, 3]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"external_id": "ada", "braze_id": "b"}, "only one of"),
        ({"x": 1}, "is required"),
        ({"external_id": ""}, "non-empty"),
        ({"external_id": 7}, "non-empty"),
        ({"external_id": "é" * 494}, "EXTERNAL_USER_ID_TOO_LARGE"),
        ({"external_id": "dummy"}, "blacklisted"),
        ({"user_alias": {"alias_name": "n"}}, "alias_label"),
        ({"external_id": "ada", "x": ["a"] * 499 + ["b", "c"]}, ""),
        ({"external_id": "ada", "x": [str(n) for n in range(501)]}, "500 elements"),
        ({"external_id": "ada", "x": ["a" * 256]}, "255"),
        ({"external_id": "ada", "x": [1]}, "strings"),
        ({"external_id": "ada", "x": "a" * 256}, "255"),
        ({"external_id": "ada", "_update_existing_only": "yes"}, "boolean"),
        ("ada", "object"),
    ],
)
async def test_a_bad_object_leaves_the_others_alone(bad, reason):
    """It is in `errors` with its position, the rest is written; alone it is a 400. Nothing of it costs anything."""
    async with emulator(blocked=["dummy"]) as client:
        status, answer = await client.post({"attributes": [{"external_id": "bo", "x": 1}, bad]})
        alone = await client.post({"attributes": [bad]})

        assert status == 201
        if not reason:
            assert "errors" not in answer
            return
        [error] = answer["errors"]
        assert reason in error.pop("type")
        assert error == {"input_array": "attributes", "index": 1}
        assert answer["attributes_processed"] == 1
        assert alone[0] == 400
        assert [user["external_id"] for user in client.braze.users()] == ["bo"]
        assert client.braze.summary().points == 1
        assert client.braze.summary().refused == 2


async def test_other_ids_are_users_too(client):
    """An alias, a Braze id and an e-mail address name one each; with an external id the address is an attribute."""
    people = [
        {"user_alias": {"alias_label": "crm", "alias_name": "7"}, "x": 1},
        {"braze_id": "b7", "x": 2},
        {"email": "ada@example.com", "x": 3},
        {"external_id": "ada", "email": "ada@example.com"},
    ]
    assert (await client.post({"attributes": people}))[0] == 201
    ids = [{key for key in user if key not in {"writes", "attributes"}} for user in client.braze.users()]
    assert ids == [{"user_alias"}, {"braze_id"}, {"email"}, {"external_id"}]
    assert client.of() == {"email": "ada@example.com"}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"attributes": [{"external_id": str(n), "x": 1} for n in range(76)]}, 400, "Max Input Length Exceeded"),
        (
            {
                "attributes": [{"external_id": str(n), "x": 1} for n in range(75)],
                "events": [{"external_id": "1", "name": "e"}],
            },
            400,
            "Max Input Length Exceeded",
        ),
        ({"attributes": []}, 400, "Valid data"),
        ({}, 400, "Valid data"),
        ({"attributes": {"external_id": "ada"}}, 400, "Valid data"),
        (b"{", 400, "Bad syntax"),
        (b"[]", 400, "Bad syntax"),
        (b" " * 4_000_001, 413, "Too Large"),
        (b" " * 9_000_000, 413, "Too Large"),
    ],
)
async def test_a_bad_request_writes_nothing(client, body, status, message):
    """Beyond the limits, or no JSON: the whole request is refused."""
    answer = await client.post(body)
    assert answer[0] == status
    assert message in answer[1]["message"]
    assert client.braze.users() == []
    assert client.braze.summary().points == 0


async def test_who_may_write():
    """401 without the right key, 403 without the permission, 404 with a slash too many, 415 for another type."""
    async with emulator(rest_key="good", forbidden_key="old") as client:
        good = {"attributes": [{"external_id": "ada", "x": 1}]}
        assert (await client.post(good, key="bad"))[0] == 401
        assert (await client.post(good, key="old"))[0] == 403
        assert (await client.post(good, key="good", path="/users/track/"))[0] == 404
        assert (await client.post(good, key="good", path="/elsewhere"))[0] == 404
        assert (await client.post(good, key="good", method="PUT"))[0] == 404
        assert (await client.post(good, key="good", kind="text/plain"))[0] == 415
        assert client.braze.users() == []
        assert (await client.post(good, key="good"))[0] == 201
        client.braze.credentials(rest_key="new")
        assert (await client.post(good, key="good"))[0] == 401
        assert client.braze.summary().answers == {"401": 2, "403": 1, "404": 3, "415": 1, "201": 1}


async def test_users_that_do_not_exist_come_to_nothing():
    """With `_update_existing_only` they are taken, counted as processed and dropped; without, they are made."""
    async with emulator(users=["ada"]) as client:
        both = [{"external_id": name, "x": 1, "_update_existing_only": True} for name in ("ada", "bo")]
        assert await client.post({"attributes": both}) == (201, {"message": "success", "attributes_processed": 2})
        assert [user["external_id"] for user in client.braze.users()] == ["ada"]
        assert (client.braze.summary().unknown, client.braze.summary().points) == (1, 1)
        await client.post({"attributes": [{"external_id": "bo", "x": 1}]})
        assert [user["external_id"] for user in client.braze.users()] == ["ada", "bo"]
        assert client.braze.summary().created == 1
        async with client.session.post(client.braze.url + "/emulator/users", data=b'["cy"]') as response:
            assert response.status == 200
        assert (await client.post({"attributes": both}))[0] == 201
        assert client.braze.summary().unknown == 3


def test_the_rate_limit_is_a_window_of_the_clock():
    """Whole windows, one after the other; a refused request costs nothing; the headers say how it stands."""
    window = FixedWindow(2, 3.0)
    assert [window.admit(now) for now in (10.0, 10.5, 11.9, 12.0)] == [(1, 12.0), (0, 12.0), (-1, 12.0), (1, 15.0)]
    workspace = Workspace(WorkspaceLimits(max_requests=1), WorkspaceKeys())
    call = Call(
        path="/users/track",
        body=b'{"attributes":[{"external_id":"a","x":1}]}',
        authorization="Bearer k",
        content_type=JSON,
    )
    first, second, third = (workspace.answer(call, now) for now in (9.2, 9.7, 12.1))
    assert (first.status, second.status, third.status) == (201, 429, 201)
    assert first.headers == {"X-RateLimit-Limit": "1", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "12"}
    assert second.headers["X-Ratelimit-Retry-After"] == "3"
    assert workspace.counts.applied == 2


async def test_the_client_and_the_emulator_speak_the_same_language():
    """What bridged sends is taken, and what is answered is judged as what it is: both sides over one socket."""
    users = [("ada", ["Power users", "Trial"]), ("bo", [])]
    async with (
        emulator(rest_key="good", blocked=["dummy"], max_requests=6, window_s=1e6) as client,
        Transport(Target(url=client.braze.url + "/", rest_key="good"), 30) as transport,
    ):
        send = transport.send
        first = await send(track(users, COHORTS, update_existing_only=True))
        assert first.verdict == Delivered()
        assert isinstance(first.rate_limit, RateLimit)
        assert (first.rate_limit.limit, first.rate_limit.remaining) == (6, 5)
        assert client.braze.membership(COHORTS) == {"ada": {"Power users", "Trial"}}
        assert client.braze.summary().points == 2
        mixed = (await send(track([*users, ("dummy", ["x"])], COHORTS, update_existing_only=True))).verdict
        assert isinstance(mixed, Reject)
        assert list(mixed.failures) == [2]
        assert "blacklisted" in mixed.failures[2].message
        alone = (await send(track([("dummy", ["x"])], COHORTS, update_existing_only=True))).verdict
        assert isinstance(alone, Reject)
        await send(track([("ada", [])], COHORTS, update_existing_only=True))
        assert client.braze.membership(COHORTS) == {}
        client.braze.script([{"status": 400, "times": 1}, {"action": "html", "times": 1}])
        assert isinstance((await send(track(users, COHORTS, update_existing_only=True))).verdict, Split)
        portal = (await send(track(users, COHORTS, update_existing_only=True))).verdict
        assert isinstance(portal, Retry)
        assert portal.kind == "server"
        # The faults never reached the workspace: two requests are left of six.
        for _ in range(2):
            assert (await send(track(users, COHORTS, update_existing_only=True))).verdict == Delivered()
        limited = (await send(track(users, COHORTS, update_existing_only=True))).verdict
        assert isinstance(limited, Retry)
        assert limited.kind == "rate"
        assert limited.after_s is not None
        transport.use(Target(url=client.braze.url, rest_key="bad"), 30)
        client.braze.clear()
        assert isinstance((await send(track(users, COHORTS, update_existing_only=True))).verdict, Halt)


PARTNER_KEYS = {"partner_name": "mixpanel", "partner_key": "partner-key", "data_import_key": "import-key"}


async def test_the_partner_endpoints():
    """A cohort gets its name and its members, only users that exist are touched, each assignment costs a point."""
    async with emulator(**PARTNER_KEYS, users=["u1", "u2", "u3"]) as client:
        target = Target(url=client.braze.url, **PARTNER_KEYS)
        async with Transport(target, 30) as transport:
            for request in (
                announce(target, "777", "Power users", 1_790_000_000),
                change_members(target, "777", ["u1", "u2", "nobody"], []),
                change_members(target, "777", ["u3"], ["u1", "u2"]),
            ):
                assert (await transport.send(request)).verdict == Delivered()
            assert client.braze.cohorts() == [
                {
                    "cohort_id": "777",
                    "name": "Power users",
                    "created_at": "2026-09-21T14:13:20+00:00",
                    "members": ["u3"],
                }
            ]
            summary = client.braze.summary()
            assert (summary.points, summary.unknown, summary.cohorts, summary.created) == (5, 1, 1, 0)
            client.braze.workspace.locked = {"777"}
            locked = (await transport.send(change_members(target, "777", ["u1"], []))).verdict
            assert isinstance(locked, Retry)
            assert "423" in locked.reason
            for wrong in ({"partner_key": "other"}, {"data_import_key": "other"}, {"partner_name": "other"}):
                bad = Target(url=client.braze.url, **(PARTNER_KEYS | wrong))
                verdict = (await transport.send(change_members(bad, "777", ["u1"], []))).verdict
                assert isinstance(verdict, Halt)
                assert verdict.status == 401
                assert "import-key" not in verdict.reason


@pytest.mark.parametrize("keys", [{"partner_key": "p"}, {"data_import_key": "c"}])
async def test_one_key_alone_says_nothing_of_the_other(keys):
    """The one that is set must be right, the other only be there."""
    body = {"partner_api_key": "p", "client_secret": "c", "cohort_id": "7", "cohort_changes": []}
    async with emulator(**keys) as client:
        assert (await client.post(body, path="/partners/m/cohorts/users"))[0] == 200
        for wrong in ({"partner_api_key": "", "client_secret": ""}, {"partner_api_key": "x", "client_secret": "y"}):
            assert (await client.post(body | wrong, path="/partners/m/cohorts/users"))[0] == 401


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("", {"cohort_id": ""}, "cohort_id"),
        ("", {"cohort_id": 7}, "cohort_id"),
        ("", {"name": ""}, "name"),
        ("", {"created_at": "yesterday"}, "created_at"),
        ("", {"created_at": None}, "created_at"),
        ("/users", {"cohort_changes": {}}, "cohort_changes"),
        ("/users", {"cohort_changes": [{"should_remove": True}]}, "cohort_changes"),
        ("/users", {"cohort_changes": [{"user_ids": [1]}]}, "cohort_changes"),
        ("/users", {"cohort_changes": [{"user_ids": ["u"], "should_remove": "yes"}]}, "cohort_changes"),
        ("/users", {"cohort_changes": [{"user_ids": ["u"] * 600}, {"user_ids": ["u"] * 401}]}, "1,000"),
    ],
)
async def test_what_the_partner_endpoints_refuse(client, path, change, message):
    """In the words of Braze's table, and nothing is changed."""
    good = {
        "partner_api_key": "p",
        "client_secret": "c",
        "cohort_id": "7",
        "name": "n",
        "created_at": "2026-01-21T19:20:30+00:00",
        "cohort_changes": [],
    }
    status, answer = await client.post(good | change, path=f"/partners/mixpanel/cohorts{path}")
    assert status == 400
    assert message in answer["message"]
    assert client.braze.summary().points == 0
    assert (await client.post(good, path=f"/partners/mixpanel/cohorts{path}"))[0] == 200


async def test_what_is_sent_at_once_comes_about_in_any_order():
    """Two requests about one user under way together: chance decides, and the emulator counts that they overlapped."""
    outcomes = set()
    async with emulator(unordered_s=0.02) as client:
        for _ in range(20):
            await asyncio.gather(client.update(x=["one"]), client.update(x=["two"]))
            outcomes.add(client.of()["x"])
        assert outcomes == {("one",), ("two",)}
        assert client.braze.summary().overlaps > 0
        client.braze.clear()
        for n in range(5):
            await client.update(x=[str(n)])
        assert client.of()["x"] == ("4",)
        assert client.braze.summary().overlaps == 0


async def test_faults_meet_braze_requests(client):
    """The scripts of the Mixpanel emulator: a path is /users/track unless named, answers are in Braze's words."""
    client.braze.script(
        [
            {"status": 429, "times": 1, "headers": {"X-Ratelimit-Retry-After": "2"}},
            {"status": 503, "times": 1},
            {"action": "store_then_status", "times": 1},
            {"action": "reset_after_store", "times": 1},
            {"path": "/partners/m/cohorts", "status": 423},
        ]
    )
    assert await client.update(x=1) == (429, {"message": "Rate limit exceeded"})
    assert client.headers["X-Ratelimit-Retry-After"] == "2"
    assert (await client.update(x=1))[0] == 503
    assert client.braze.users() == []
    assert (await client.update(x=1))[0] == 500
    assert client.of() == {"x": 1}
    with pytest.raises(aiohttp.ClientError):
        await client.update(x=2)
    assert client.of() == {"x": 2}
    assert (await client.post({}, path="/partners/m/cohorts"))[0] == 423
    assert (await client.update(x=3))[0] == 201
    assert client.braze.summary().faults == 5


async def test_everything_can_be_read_and_changed_over_http(client):
    """What a test in another language needs: users and cohorts as NDJSON, counts, faults, keys, a clean slate."""

    async def ask(method, path, body=None):
        async with client.session.request(method, client.braze.url + path, data=body) as response:
            return response.status, await response.text()

    await client.update(x=["a"])
    assert await ask("GET", "/healthz") == (200, '{"status":"ok"}')
    _, users = await ask("GET", "/emulator/users")
    assert [json.loads(line) for line in users.splitlines()] == [
        {"external_id": "ada", "writes": 1, "attributes": {"x": ["a"]}}
    ]
    assert json.loads((await ask("GET", "/emulator/summary"))[1])["points"] == 1
    assert (await ask("POST", "/emulator/faults", b'[{"status":500}]'))[0] == 200
    assert (await client.update(x=1))[0] == 500
    assert (await ask("DELETE", "/emulator/faults"))[0] == 200
    assert (await ask("POST", "/emulator/credentials", b'{"rest_key":"k2"}'))[0] == 200
    assert (await client.update(x=1))[0] == 401
    assert (await ask("POST", "/emulator/credentials", b'{"token":"t"}'))[0] == 400
    assert (await ask("POST", "/emulator/users", b"{}"))[0] == 400
    assert (await ask("POST", "/emulator/locked", b'["7"]'))[0] == 200
    body = {"partner_api_key": "p", "client_secret": "c", "cohort_id": "7"}
    assert (await client.post(body, path="/partners/m/cohorts/users"))[0] == 423
    body = body | {"cohort_id": "8", "cohort_changes": [{"user_ids": ["ada"]}]}
    assert (await client.post(body, path="/partners/m/cohorts/users"))[0] == 200
    assert json.loads((await ask("GET", "/emulator/cohorts"))[1])["members"] == ["ada"]
    assert (await ask("POST", "/emulator/clear"))[0] == 200
    assert (await ask("GET", "/emulator/users"))[1] == ""


values = st.none() | st.lists(st.sampled_from("abcd"), max_size=5) | st.sampled_from("abcd").map(lambda x: {"add": [x]})


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["u1", "u2", "gone"]), values), max_size=20))
def test_the_workspace_holds_what_was_written(writes):
    """Against a dict that does the same: any history of arrays ends with the same sets, and the bill is the sum."""
    workspace = Workspace(WorkspaceLimits(), WorkspaceKeys())
    workspace.existing = {"u1", "u2"}
    model: dict[str, list[str]] = {}
    points = 0
    for user, value in writes:
        body = json.dumps({"attributes": [{"external_id": user, "_update_existing_only": True, "x": value}]}).encode()
        call = Call(path="/users/track", body=body, authorization="Bearer k", content_type=JSON)
        assert workspace.answer(call, 1.0).status == 201
        if user != "gone":
            points += 1
            if value is None:
                model.pop(user, None)
            else:
                kept = [*model.get(user, []), *value["add"]] if isinstance(value, dict) else value
                model[user] = list(dict.fromkeys(kept))
    assert {user: list(held) for user, held in workspace.holding("x").items()} == model
    assert workspace.summary().points == points


async def test_a_port_that_is_taken_is_named(client):
    """The option to change is in the message."""
    port = int(client.braze.url.rpartition(":")[2])
    with pytest.raises(ListenError) as caught:
        async with BrazeEmulator(BrazeConfig(port=port)):
            pass
    assert "--braze-listen" in str(caught.value)


async def test_the_command_plays_both_services(tmp_path):
    """`--braze-listen` adds a line and a server; its users, key and faults take effect; SIGTERM ends both."""
    (tmp_path / "users").write_text("ada\nbo\n")
    (tmp_path / "faults.json").write_text('[{"status":503,"times":1}]')
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bridged", "emulator", "--listen", "127.0.0.1:0", "--braze-listen", "127.0.0.1:0"),
        *("--braze-rest-key", "good", "--braze-users", str(tmp_path / "users")),
        *("--braze-faults", str(tmp_path / "faults.json")),
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    try:
        lines = [(await asyncio.wait_for(process.stdout.readline(), 30)).decode() for _ in range(2)]
        assert re.fullmatch(r"bridged emulator listens on http://127\.0\.0\.1:\d+\n", lines[0])
        assert re.fullmatch(r"bridged emulator listens as Braze on http://127\.0\.0\.1:\d+\n", lines[1])
        request = track([("ada", ["a"]), ("cy", ["a"])], COHORTS, update_existing_only=True)
        async with Transport(Target(url=lines[1].split()[-1], rest_key="bad"), 30) as transport:
            assert isinstance((await transport.send(request)).verdict, Retry)
            assert isinstance((await transport.send(request)).verdict, Halt)
            transport.use(Target(url=lines[1].split()[-1], rest_key="good"), 30)
            assert (await transport.send(request)).verdict == Delivered()
    finally:
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0


@pytest.mark.parametrize(("option", "value"), [("--braze-listen", "8491"), ("--braze-users", "/nowhere/users")])
def test_a_bad_option_of_the_command_is_named(option, value):
    """Exit 78 with the option, before anything listens."""
    import argparse

    from bridged.emulator.command import add_arguments, main

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(ConfigError, match=option):
        main(parser.parse_args(["--braze-listen", "127.0.0.1:0", option, value]))
