"""Settings that are saved on the page: over the configuration, at once, and for good."""

import asyncio
import hashlib
import json
import os
import stat
import string
import tomllib
from pathlib import Path

import aiohttp
import msgspec
import pytest
from conftest import balanced, currents, free_port, until
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import _Configured, bridged  # noqa: F401  # a fixture
from test_lifecycle import Process

from bridged import saved
from bridged.app import App
from bridged.config import load, replaced, value_at
from bridged.errors import SpoolError
from bridged.saved import EDITABLE, BadSettings, Saved, applied, checked, is_secret, toml

TOKEN = {"BRIDGED__MIXPANEL__TOKEN": "t"}
CANARY = "canary-secret-7f3a"


def base(app):
    """Where the admin listener is."""
    return f"http://{app.config.admin.listen}"


async def say(client, app, method, path, body=None):
    """Status and JSON of an answer."""
    async with client.request(method, base(app) + path, json={} if body is None and method != "GET" else body) as got:
        return got.status, await got.json()


async def put(client, app, **change):
    """PUT /api/settings; `set` with dots for double underscores."""
    return await say(client, app, "PUT", "/api/settings", change)


async def post(client, app, events, token=""):
    """The HTTP door's answer."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    url = f"http://{app.config.sources.http.listen}/v1/currents"
    async with client.post(url, json={"events": events}, headers=headers) as got:
        return got.status


async def setting(client, app, name):
    """One key of GET /api/settings."""
    _, told = await say(client, app, "GET", "/api/settings")
    return next(key for key in told["keys"] if key["key"] == name)


# -- the file ----------------------------------------------------------------------------------------------------------


def values():
    """Good values of any keys."""
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    names = st.sampled_from(["users.messages.email.Send", "users.behaviors.CustomEvent", "a b.c\"d'"])
    kinds = {
        "mixpanel.url": st.just("http://127.0.0.1:1"),
        "mixpanel.region": st.sampled_from(["us", "eu", "in"]),
        "mixpanel.token": st.text(string.ascii_letters + string.punctuation, max_size=20),
        "mixpanel.naming": st.sampled_from(["seed", "current"]),
        "mixpanel.partner_id": text,
        "events.message_engagement": st.booleans(),
        "events.exclude": st.lists(text, max_size=3),
        "events.names": st.dictionaries(names, text, max_size=3),
        "events.transform": st.dictionaries(
            names, st.dictionaries(text, st.sampled_from(["remove", "hash"])), max_size=3
        ),
        "retention.max_age": st.sampled_from(["48h", "1500ms", 7, 0.25, "90m"]),
        "delivery.max_bytes_per_minute": st.sampled_from(["2GB", "10MiB", 12345, 0]),
        "delivery.max_events_per_second": st.floats(0, 1e9) | st.integers(0, 10**6),
        "delivery.max_concurrency": st.integers(1, 64),
        "alerts.spool_share": st.floats(0.001, 1),
    }
    return st.fixed_dictionaries({}, optional=kinds)


@given(plain=values())
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_read(tmp_path_factory, plain):
    """Any value of any key comes back as it was, through the file, whatever characters are in it."""
    found, wrong = checked(plain)
    assert wrong == {}
    file = Saved(str(tmp_path_factory.getbasetemp() / "any.db"), lambda: 1.0)
    file.write(found)
    again = Saved(str(tmp_path_factory.getbasetemp() / "any.db"))
    again.read()
    assert (again.values, again.problem) == (found, "")
    assert file.path.stat().st_mode & 0o777 == 0o600


def test_the_export_has_no_secret():
    """It is TOML that config.toml could hold; a secret is a comment."""
    found, _ = checked({"mixpanel.api_secret": CANARY, "mixpanel.region": "eu", "events.exclude": ["a"]})
    text = toml(found, placeholders=True)
    assert CANARY not in text
    assert "# api_secret" in text
    assert tomllib.loads(text) == {"mixpanel": {"region": "eu"}, "events": {"exclude": ["a"]}}
    assert load(None, TOKEN) == applied(load(None, TOKEN), {})


def test_which_keys_there_are():
    """No listener, no path and no file can be changed by whoever holds a browser; and each key takes effect at once."""
    for name in EDITABLE:
        assert not name.endswith(("_file", "path", ".listen", "tls_key", "tls_cert"))
        assert not name.startswith(("admin.", "spool.", "log."))
    from bridged.reloading import take_over

    config = load(None, TOKEN)
    for name, key in EDITABLE.items():
        changed = replaced(config, key.path, "other")
        assert take_over(config, changed)[1:] == ([name], [])


@pytest.mark.parametrize(
    ("given_", "part"),
    [
        ({"mixpanel.region": "mars"}, "us"),
        ({"mixpanel.region": None}, "us | eu | in"),
        ({"mixpanel.regoin": "us"}, "no such key"),
        ({"admin.token": "x"}, "can't be changed here"),
        ({"mixpanel.token_file": "/etc/shadow"}, "can't be changed here"),
        ({"delivery.max_concurrency": 0}, "1"),
        ({"delivery.max_concurrency": "many"}, "int"),
        ({"retention.max_age": "for ever"}, "48h"),
        ({"events.exclude": "users.x"}, "array"),
        ({"events.transform": {"a": {"b": "encrypt"}}}, "hash"),
        ({"mixpanel.api_secret": "a\nb"}, "printable"),
    ],
)
def test_what_cannot_be_saved(tmp_path, given_, part):
    """Each key with what is wrong with it."""
    file = Saved(str(tmp_path / "x.db"))
    with pytest.raises(BadSettings) as refused:
        file.with_changes(given_, [])
    [(name, problem)] = refused.value.keys.items()
    assert (name, part in problem) == (next(iter(given_)), True), problem


@pytest.mark.parametrize("change", [lambda text: b"\xef\xbb\xbf" + text, lambda text: text.replace(b"\n", b"\r\n")])
def test_what_an_editor_does_to_the_file(tmp_path, change):
    """A mark at its beginning, or other ends of lines, cost nothing: it says what it said."""
    file = Saved(str(tmp_path / "any.db"))
    found, _ = checked({"mixpanel.naming": "current", "events.names": {"users.messages.email.Send": "Sent \u00e9"}})
    file.write(found)
    file.path.write_bytes(change(file.path.read_bytes()))
    file.read()
    assert (file.values, file.problem) == (found, "")


# -- a running daemon --------------------------------------------------------------------------------------------------


async def test_a_save(daemon, client, config, emulator):
    """In force at once without a restart or a loss, visible as an override, and in force again after the next start."""
    app = await daemon()
    assert await post(client, app, [currents()]) == 200
    status, told = await put(
        client, app, set={"mixpanel.naming": "current", "events.names": {"users.messages.email.Open": "Opened"}}
    )
    assert (status, told["changed"], told["restart_needed"]) == (200, ["mixpanel.naming", "events.names"], [])
    assert await post(client, app, [currents(seed=1)]) == 200
    await until(lambda: app.spool.accounts.total("delivered") == 2, "the delivery")
    assert sorted(event["event"] for event in emulator.events()) == ["Email Open", "Opened"]

    key = await setting(client, app, "mixpanel.naming")
    assert (key["configured"], key["saved"], key["value"], key["overridden"]) == ("seed", "current", "current", True)
    _, shown = await say(client, app, "GET", "/api/config")
    assert shown["overridden"]["mixpanel.naming"] == {"configured": "seed", "saved": "current"}
    assert shown["mixpanel"]["naming"] == "current"
    _, told = await say(client, app, "GET", "/api/status")
    assert told["overridden"] == ["events.names", "mixpanel.naming"]
    assert app.activity.entries[-1].kind == "settings"
    assert "mixpanel.naming is current (was seed)" in app.activity.entries[-1].text
    assert (await put(client, app, set={"mixpanel.project_id": "7"}))[0] == 200
    assert app.activity.entries[-1].text == "Settings were saved: mixpanel.project_id is 7 (was empty)"
    assert (await put(client, app, remove=["mixpanel.project_id"]))[0] == 200
    async with client.get(base(app) + "/api/settings/export") as got:
        assert tomllib.loads(await got.text())["mixpanel"] == {"naming": "current"}
        assert "attachment" in got.headers["Content-Disposition"]
    balanced(app)

    again = App(app.base)
    assert again.config.mixpanel.naming == "current"
    assert again.config == app.config

    status, told = await say(client, app, "DELETE", "/api/settings/mixpanel.naming")
    assert (status, told["changed"]) == (200, ["mixpanel.naming"])
    assert (await say(client, app, "DELETE", "/api/settings/admin.token"))[0] == 404
    assert app.config.mixpanel.naming == "seed"
    assert App(app.base).config.mixpanel.naming == "seed"


async def test_a_save_that_cannot_be(daemon, client):
    """400 with the key, and neither the file nor anything in force has changed."""
    app = await daemon()
    assert (await put(client, app, set={"mixpanel.partner_id": "x"}))[0] == 200
    before, file = app.config, app.saved.path.read_bytes()
    for change, key in (
        ({"set": {"mixpanel.region": "mars"}}, "mixpanel.region"),
        ({"set": {"mixpanel.service_account": "robot"}}, "mixpanel.service_account"),
        ({"set": {"mixpanel.url": "ftp://x"}}, "mixpanel.url"),
        ({"set": {"mixpanel.project_id": "seven"}}, "mixpanel.project_id"),
        ({"set": {"events.exclude": ["users.messages.email.Sned"]}}, "events.exclude"),
        ({"set": {"events.names": {"users.messages.email.Send": " "}}}, "events.names"),
        ({"set": {"events.transform": {"users.messages.email.Send": {"nonsense": "hash"}}}}, "events.transform"),
        ({"remove": ["admin.token"]}, "admin.token"),
        ({"set": {"mixpanel.region": "eu"}, "remove": ["mixpanel.region"]}, "mixpanel.region"),
    ):
        status, told = await put(client, app, **change)
        assert (status, list(told["keys"])) == (400, [key]), told
        assert (app.config, app.saved.path.read_bytes()) == (before, file)
    assert (await put(client, app, set={"mixpanel.token": ""}))[0] == 400
    for body in ({}, {"set": 1}, {"other": {}}, []):
        assert (await say(client, app, "PUT", "/api/settings", body))[0] == 400


@pytest.mark.parametrize(
    ("path", "sent", "said"),
    [
        ("/api/settings", {"set": 1}, "set: expected an object {...}, not a whole number"),
        ("/api/settings", {"remove": "x"}, "remove: expected a list [...], not text"),
        ("/api/settings", {"remove": [True]}, "remove[0]: expected text, not true or false"),
        ("/api/settings", {"sett": {}}, "there is no 'sett' here"),
        ("/api/settings", [], "expected an object {...}, not a list [...]"),
        ("/api/settings", {"revision": "x"}, "revision: expected a whole number or null, not text"),
        (
            "/api/events/users.messages.email.Open",
            {"transform": {"a": "b"}},
            "transform[...]: 'b' is none of its values",
        ),
    ],
)
async def test_a_body_of_another_shape(daemon, client, path, sent, said):
    """What is wrong and where, in words that aren't a library's; nothing has changed."""
    app = await daemon()
    status, told = await say(client, app, "PUT", path, sent)
    assert (status, told) == (
        400,
        {"error": f"the body can't be understood: {said}", "hint": "nothing was changed"},
    )
    async with client.put(base(app) + path, data=b'{"set', headers={"Content-Type": "application/json"}) as got:
        assert (await got.json())["error"] == "the body can't be understood: it is no whole JSON"
    assert app.saved.values == {}


async def test_what_the_configuration_says_is_not_the_pages_fault(daemon, client):
    """A name for a type that the table doesn't have may stand in config.toml; the page saves other things all the same."""
    app = await daemon(
        events__names='{"users.messages.fax.Send" = "Fax"}', events__include='["users.messages.fax.Send"]'
    )
    assert (await put(client, app, set={"events.exclude": ["users.messages.sms.Send"]}))[0] == 200
    kind = "users.messages.email.Send"
    assert (await say(client, app, "PUT", f"/api/events/{kind}", {"name": "Mail"}))[0] == 200
    assert app.config.events.names == {"users.messages.fax.Send": "Fax", kind: "Mail"}
    assert (await put(client, app, set={"events.names": {"users.nothing": "x"}}))[0] == 400


async def test_two_windows(daemon, client):
    """Who has not seen the other's change is told so, instead of undoing it."""
    app = await daemon()
    revision = app.saved.revision
    status, told = await put(client, app, set={"mixpanel.partner_id": "one"}, revision=revision)
    assert status == 200
    assert (await put(client, app, set={"mixpanel.partner_id": "two"}, revision=revision))[0] == 409
    assert app.config.mixpanel.partner_id == "one"
    assert (await put(client, app, set={"mixpanel.partner_id": "two"}, revision=told["revision"]))[0] == 200
    both = await asyncio.gather(*[put(client, app, set={"mixpanel.partner_id": name}) for name in "ab"])
    assert sorted(status for status, _ in both) in ([200, 200], [200, 409])
    assert App(app.base).config == app.config
    assert Saved(app.config.spool.path).revision > told["revision"]


async def test_a_disk_that_takes_no_file(daemon, client, monkeypatch):
    """503 in words, and what was in force is."""
    app = await daemon()
    before = app.config

    def fails(self, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Saved, "write", fails)
    status, told = await put(client, app, set={"mixpanel.naming": "current"})
    assert (status, "No space left" in told["error"]) == (503, True)
    assert app.config is before
    assert app.saved.values == {}
    with pytest.raises(SpoolError):
        await app.save({"mixpanel.naming": "current"}, [])


async def test_a_folder_that_cannot_be_synced(daemon, client, monkeypatch):
    """The file had its name already when the disk failed: what was answered, "not saved", holds after the next start, too."""
    app = await daemon()
    assert (await put(client, app, set={"mixpanel.partner_id": "before"}))[0] == 200
    real, fails = os.fsync, [True]

    def fsync(file):
        if fails and stat.S_ISDIR(os.fstat(file).st_mode):
            fails.pop()
            raise OSError(5, "Input/output error")
        real(file)

    monkeypatch.setattr(saved.os, "fsync", fsync)
    assert (await put(client, app, set={"mixpanel.partner_id": "after"}))[0] == 503
    assert (fails, app.config.mixpanel.partner_id, App(app.base).config.mixpanel.partner_id) == ([], "before", "before")


async def test_a_reload_keeps_what_was_saved(daemon, client):
    """The configuration changes below it: what wasn't saved follows, what was saved stays; a removal shows what is below."""
    app = await daemon()
    assert (await put(client, app, set={"mixpanel.naming": "current"}))[0] == 200
    said = replaced(replaced(app.base, ("mixpanel", "partner_id"), "new"), ("mixpanel", "naming"), "seed")
    app.reload(lambda: said)
    assert (app.config.mixpanel.naming, app.config.mixpanel.partner_id) == ("current", "new")
    assert app.reload_problem == ""
    app.reload(lambda: replaced(said, ("mixpanel", "token"), ""))
    assert "no credential" in app.reload_problem
    assert app.config.mixpanel.token == "example-token"


# -- secrets -----------------------------------------------------------------------------------------------------------


async def test_a_secret_goes_in_and_not_out(daemon, client, emulator):
    """A credential that is saved is in force, and in no answer; the file is the daemon's alone."""
    emulator.credentials(api_secret=CANARY)
    app = await daemon()
    assert (await put(client, app, set={"mixpanel.api_secret": CANARY}))[0] == 200
    assert await post(client, app, [currents()]) == 200
    await until(lambda: app.spool.accounts.total("delivered") == 1, "the delivery")
    said = []
    for path in ("settings", "settings/export", "config", "status", "activity", "connection", "events"):
        async with client.get(f"{base(app)}/api/{path}") as got:
            said.append(await got.text())
    said.append(json.dumps(await put(client, app, set={"mixpanel.api_secret": CANARY, "mixpanel.region": "mars"})))
    said.append(json.dumps(await put(client, app, set={"mixpanel.api_secret": f"{CANARY}\n\x00"})))
    said.append(await asyncio.to_thread(Path(f"{app.config.spool.path}.activity").read_text))
    assert CANARY not in "".join(said)
    key = await setting(client, app, "mixpanel.api_secret")
    assert (key["set"], key["overridden"], "value" in key, "saved" in key) == (True, True, False, False)
    assert app.saved.path.stat().st_mode & 0o777 == 0o600
    _, told = await say(client, app, "GET", "/api/connection")
    assert (told["credential"], told["credential_from"]) == ("API secret", "page")
    assert (await say(client, app, "GET", "/api/status"))[1]["reload"]["credential_from"] == "page"


async def test_a_secret_is_not_sent_elsewhere(daemon, client, emulator):
    """Whoever may change the address doesn't learn the secret that way: it is to be given with it."""
    app = await daemon(mixpanel__api_secret=CANARY)
    elsewhere = {"mixpanel.url": "http://127.0.0.1:9"}
    status, told = await put(client, app, set=elsewhere)
    assert (status, list(told["keys"])) == (400, ["mixpanel.api_secret", "mixpanel.token"])
    status, told = await say(client, app, "POST", "/api/test-connection", {"mixpanel": {"url": "http://127.0.0.1:9"}})
    assert (status, list(told["keys"])) == (400, ["mixpanel.api_secret", "mixpanel.token"])
    assert app.config.mixpanel.url == emulator.url
    elsewhere["mixpanel.token"] = "another-token"
    assert (await put(client, app, set={"mixpanel.url": emulator.url}))[0] == 200
    assert (await put(client, app, set=elsewhere | {"mixpanel.api_secret": "another"}))[0] == 200
    # Nor in two steps: what the configuration holds doesn't follow to an address of the page's.
    for change, wanted in (
        ({"remove": ["mixpanel.api_secret"]}, ["mixpanel.api_secret"]),
        ({"set": {"mixpanel.url": "http://127.0.0.1:8"}}, ["mixpanel.api_secret", "mixpanel.token"]),
    ):
        status, told = await put(client, app, **change)
        assert (status, list(told["keys"])) == (400, wanted)
    assert (await say(client, app, "DELETE", "/api/settings/mixpanel.api_secret"))[0] == 400
    assert app.config.mixpanel.api_secret == "another"
    assert (await put(client, app, remove=["mixpanel.api_secret", "mixpanel.url", "mixpanel.token"]))[0] == 200
    assert (app.config.mixpanel.api_secret, app.config.mixpanel.url) == (CANARY, emulator.url)


async def test_a_secret_given_by_the_api_is_not_sent_elsewhere(daemon, client, emulator):
    """It is in force, so it stays at the address that it was given for: alone, beside what is saved, and with the project token."""
    app = await daemon(mixpanel__api_secret="the-old-secret")
    elsewhere = {"mixpanel.url": "http://127.0.0.1:9"}
    token = {"mixpanel.token": "another-token"}
    assert (await say(client, app, "POST", "/api/credentials", {"api_secret": CANARY}))[0] == 200

    status, told = await put(client, app, set=elsewhere | token)
    assert (status, list(told["keys"])) == (400, ["mixpanel.api_secret"])
    test = {"mixpanel": {"url": "http://127.0.0.1:9", "token": "another-token"}}
    assert (await say(client, app, "POST", "/api/test-connection", test))[0] == 400
    # What the configuration says already doesn't replace it.
    said_already = {"mixpanel.api_secret": "the-old-secret", "mixpanel.token": "example-token"}
    status, told = await put(client, app, set=elsewhere | said_already)
    assert (status, list(told["keys"])) == (400, ["mixpanel.api_secret"])
    assert app.config.mixpanel.url == emulator.url
    assert (await put(client, app, set={"mixpanel.partner_id": "p"}))[0] == 200
    assert app.config.mixpanel.api_secret == CANARY
    assert (await put(client, app, set=elsewhere | token | {"mixpanel.api_secret": "another"}))[0] == 200
    assert app.config.mixpanel.api_secret == "another"
    # Given for the new address, it stays there.
    assert (await say(client, app, "POST", "/api/credentials", {"api_secret": CANARY}))[0] == 200
    assert (await put(client, app, set={"mixpanel.partner_id": "q"}))[0] == 200


async def test_secrets_without_end(daemon, client, monkeypatch):
    """Each is masked in all that is said ever after, which costs: somebody who tries thousands is stopped, nobody else."""
    monkeypatch.setattr(saved, "_MAX_SECRETS", 3)
    app = await daemon()
    for n in (1, 2, 2, 3, 1):
        assert (await put(client, app, set={"mixpanel.api_secret": f"{CANARY}-{n}"}))[0] == 200
    status, told = await put(client, app, set={"mixpanel.api_secret": f"{CANARY}-4"})
    assert (status, "too many" in told["keys"]["mixpanel.api_secret"]) == (400, True)
    assert CANARY not in json.dumps(told)
    status, told = await say(client, app, "POST", "/api/test-connection", {"mixpanel": {"api_secret": f"{CANARY}-5"}})
    assert (status, "too many" in told["error"]) == (400, True)
    assert (await put(client, app, set={"mixpanel.region": "eu"}))[0] == 200


async def test_brazes_token(daemon, client):
    """A new one is demanded at once, by the door that is open."""
    app = await daemon()
    assert (await put(client, app, set={"sources.http.bearer_token": "new-token-for-braze"}))[0] == 200
    assert await post(client, app, [currents()]) == 401
    assert await post(client, app, [currents()], token="new-token-for-braze") == 200
    _, told = await say(client, app, "GET", "/api/connection")
    assert told["bearer_token_set"]
    assert "new-token-for-braze" not in json.dumps(told)


# -- from nothing, and through a kill ----------------------------------------------------------------------------------


async def test_a_fresh_daemon_is_set_up_by_the_page(daemon, client, emulator):
    """No credential at all: it runs, keeps what comes, asks Mixpanel nothing; the credential is tested, saved, and it delivers."""
    emulator.credentials(service_account="robot", service_secret="s3cret-s3cret", project_id="7", token="t0ken")
    app = await daemon(mixpanel__token="")
    _, told = await say(client, app, "GET", "/api/status")
    assert (told["state"], told["health"]["ready"]) == ("not set up", True)
    assert await post(client, app, [currents()]) == 200
    await until(lambda: app.delivery.halted is not None, "the halt")
    assert emulator.summary().requests == 0
    _, told = await say(client, app, "GET", "/api/connection")
    assert told["credential"] == "none"
    wrong = {"service_account": "robot", "service_secret": "wrong-wrong", "project_id": "7", "token": "t0ken"}
    status, told = await say(client, app, "POST", "/api/test-connection", {"mixpanel": wrong})
    assert (status, told["ok"], told["problem"]) == (200, False, "credential")
    right = wrong | {"service_secret": "s3cret-s3cret"}
    status, told = await say(client, app, "POST", "/api/test-connection", {"mixpanel": right})
    assert (told["ok"], told["problem"]) == (True, ""), told
    assert emulator.events() == []
    assert (await put(client, app, set={f"mixpanel.{name}": value for name, value in right.items()}))[0] == 200
    await until(lambda: app.spool.accounts.total("delivered") == 1, "the delivery", 30)
    assert (await say(client, app, "GET", "/api/status"))[1]["state"] in ("delivering", "idle")
    balanced(app)


async def test_what_a_test_finds(daemon, client, emulator):
    """No network, nothing that is Mixpanel, no value that can be: each in its own words."""
    app = await daemon()
    for given_, expected in (
        ({}, ""),
        ({"url": "http://127.0.0.1:9"}, "network"),
        ({"url": "http://mixpanel.invalid"}, "network"),
        ({"url": f"http://{app.config.sources.http.listen}"}, "project"),
    ):
        given_["token"] = "example-token"  # else it stays where it was given for
        status, told = await say(client, app, "POST", "/api/test-connection", {"mixpanel": given_})
        assert (status, told["problem"]) == (200, expected), told
        assert told["text"]
        assert bool(told["hint"]) == (expected == "network")
    for given_ in ({"region": "mars"}, {"naem": "x"}, {"service_account": "x"}, {"token_file": "/etc/passwd"}):
        status, told = await say(client, app, "POST", "/api/test-connection", {"mixpanel": given_})
        assert (status, len(told["keys"])) == (400, 1), told
    assert app.saved.values == {}


async def test_what_a_kill_left_half_written(daemon, tmp_path):
    """It holds secrets, and the next save may never come: the start removes it."""
    half = tmp_path / "spool.db.settings.toml.part"
    half.write_text('[mixpanel]\napi_secret = "0123456')
    await daemon()
    assert not half.exists()


async def test_a_kill_while_it_is_saved(tmp_path, emulator, client):
    """Kill -9 at any moment: after the start the file is the old one or the new one, and what was answered is in force."""
    process = Process(tmp_path, emulator.url)
    process.settings["admin__listen"] = f"127.0.0.1:{free_port()}"
    url = f"http://{process.settings['admin__listen']}/api/settings"
    answered = [-1]

    async def save():
        while True:
            async with client.put(url, json={"set": {"mixpanel.partner_id": str(answered[0] + 1)}}) as got:
                assert got.status == 200, await got.text()
            answered[0] += 1

    for round_ in range(3):
        await process.up()
        try:
            async with client.get(url) as got:
                told = {key["key"]: key for key in (await got.json())["keys"]}
            if round_:
                assert int(told["mixpanel.partner_id"]["value"]) in (answered[0], answered[0] + 1)
                answered[0] = int(told["mixpanel.partner_id"]["value"])
            wanted = answered[0] + 3 + round_
            saving = asyncio.create_task(save())
            await until(lambda wanted=wanted: answered[0] > wanted or saving.done(), "some saves", 30)  # noqa: B023  # at once
        finally:
            process.process.kill()
            await process.process.wait()
        [end] = await asyncio.gather(saving, return_exceptions=True)
        assert isinstance(end, aiohttp.ClientError), end


# -- events ------------------------------------------------------------------------------------------------------------


async def test_a_type_is_ticked_renamed_and_transformed(daemon, client, emulator):
    """Each is a saved setting of its own, in force for the next event; what is back at its default is no override."""
    app = await daemon()
    kind = "users.messages.email.Send"
    path = f"/api/events/{kind}"
    event = currents(kind)
    event["properties"]["email_address"] = "ada@example.com"
    assert (
        await say(
            client,
            app,
            "PUT",
            path,
            {"name": "Mail", "transform": {"email_address": "hash", "external_user_id": "hash"}},
        )
    )[0] == 200
    assert await post(client, app, [event]) == 200
    await until(lambda: app.spool.accounts.total("delivered") == 1, "the delivery")
    [sent] = emulator.events()
    assert sent["event"] == "Mail"
    assert sent["properties"]["email_address"] == hashlib.sha256(b"ada@example.com").hexdigest()
    assert sent["properties"]["distinct_id"] == hashlib.sha256(event["user"]["external_user_id"].encode()).hexdigest()

    assert (await say(client, app, "PUT", path, {"selected": False}))[0] == 200
    assert await post(client, app, [currents(kind, seed=2)]) == 200
    assert app.spool.accounts.total("skipped") == 1
    _, told = await say(client, app, "GET", "/api/events")
    row = next(row for row in told["types"] if row["event_type"] == kind)
    assert (row["selected"], row["name"], row["default_name"], row["renamed"]) == (False, "Mail", "Email Send", True)
    assert row["transform"] == {"email_address": "hash", "external_user_id": "hash"}
    assert (row["counts"]["delivered"], row["counts"]["skipped"]) == (1, 1)
    assert set(app.saved.values) == {"events.names", "events.transform", "events.exclude"}
    assert (await say(client, app, "PUT", path, {"selected": True, "name": None, "transform": {}}))[0] == 200
    assert app.saved.values == {}

    # The group goes off, one of it stays on.
    assert (await put(client, app, set={"events.message_engagement": False}))[0] == 200
    assert (await say(client, app, "PUT", path, {"selected": True}))[0] == 200
    _, told = await say(client, app, "GET", "/api/events")
    assert [group["selected"] for group in told["groups"]] == [False, True]
    assert [row["event_type"] for row in told["types"] if row["selected"] and row["group"] == "message_engagement"] == [
        kind
    ]
    for body, status in (({}, 400), ({"name": 1}, 400), ({"transform": {"x": "hash"}}, 400), ({"selected": 1}, 400)):
        assert (await say(client, app, "PUT", path, body))[0] == status
    assert (await say(client, app, "PUT", "/api/events/users.nothing", {"selected": True}))[0] == 404


async def test_samples_of_every_type(daemon, client):
    """Each has an example, and what Mixpanel would get under the settings in force."""
    app = await daemon()
    await put(client, app, set={"events.exclude": ["users.messages.sms.Send"]})
    _, told = await say(client, app, "GET", "/api/events")
    for row in told["types"]:
        status, sample = await say(client, app, "GET", f"/api/events/{row['event_type']}/sample")
        assert (status, sample["currents"]["event_type"]) == (200, row["event_type"])
        if row["selected"]:
            assert (sample["outcome"], sample["mixpanel"]["event"].startswith(row["name"])) == ("mapped", True)
        else:
            assert (sample["outcome"], sample["reason"], sample["mixpanel"]) == ("skipped", "not selected", None)
    assert (await say(client, app, "GET", "/api/events/users.nothing/sample"))[0] == 404
    assert app.spool.accounts.total("accepted") == 0


async def test_test_events(daemon, client, emulator):
    """One of each selected type through the whole path, under a user that everybody recognises."""
    app = await daemon(events__exclude='["users.messages.sms.Send"]')
    status, told = await say(client, app, "POST", "/api/events/test", {"types": ["users.messages.email.Open"] * 2})
    assert (status, told) == (200, {"sent": 1, "user": "bridged-test"})
    await until(lambda: app.spool.accounts.total("delivered") == 1, "the delivery")
    assert emulator.events()[0]["properties"]["distinct_id"] == "bridged-test"
    for types in (["users.messages.sms.Send"], ["users.nothing"], []):
        assert (await say(client, app, "POST", "/api/events/test", {"types": types}))[0] == 400
    status, told = await say(client, app, "POST", "/api/events/test", {})
    await until(lambda: app.spool.accounts.total("delivered") == 1 + told["sent"], "the delivery")
    assert app.spool.accounts.total("dead_lettered") == 0
    balanced(app)


async def test_the_commands_tell(daemon, client, bridged):  # noqa: F811  # the fixture
    """`bridged config` shows both values of a key, `check` names it, and neither says a secret."""
    app = await daemon()
    saved_ = {
        "mixpanel.naming": "current",
        "mixpanel.api_secret": CANARY,
        "events.exclude": ["users.messages.sms.Send"],
    }
    assert (await put(client, app, set=saved_))[0] == 200
    code, out, _ = await bridged(_Configured(app.base), "config")
    told = json.loads(out)
    assert (code, told["mixpanel"]["naming"]) == (0, "current")
    assert told["overridden"]["mixpanel.naming"] == {"configured": "seed", "saved": "current"}
    code, checked_, _ = await bridged(_Configured(app.base), "check")
    assert (code, "saved on the page" in checked_, "mixpanel.api_secret" in checked_) == (0, True, True)
    assert "API secret" in checked_
    _, listed, _ = await bridged(_Configured(app.base), "send-test-events", "--list")
    assert "users.messages.sms.Send " not in listed
    assert CANARY not in out + checked_ + listed


async def test_check_wants_a_credential(config, bridged):  # noqa: F811  # the fixture
    """The daemon starts without one, for the page to give it; `check` says that it is missing, and names bad transformations."""
    code, _, err = await bridged(_Configured(config(mixpanel__token="")), "check")
    assert (code, "no credential" in err, "on the page" in err) == (78, True, True)
    bad = replaced(config(), ("events", "transform"), {"users.messages.email.Send": {"nonsense": "hash"}})
    code, _, err = await bridged(_Configured(bad), "check")
    assert (code, "events.transform: users.messages.email.Send: 'nonsense' is no field" in err) == (78, True)


def test_masks():
    """A secret that was saved is one for `bridged config` as well."""
    found, _ = checked({"mixpanel.api_secret": CANARY, "mixpanel.region": "eu"})
    file = Saved("nowhere.db")
    file.values = found
    told = file.overridden(load(None, TOKEN))
    assert told == {
        "mixpanel.api_secret": {"configured": "", "saved": "********"},
        "mixpanel.region": {"configured": "us", "saved": "eu"},
    }
    assert [name for name, key in EDITABLE.items() if is_secret(key)] == [
        "sources.http.bearer_token",
        "mixpanel.token",
        "mixpanel.api_secret",
        "mixpanel.service_secret",
        "alerts.webhook_url",
        "alerts.webhook_token",
    ]
    assert msgspec.json.encode(told)
    assert value_at(applied(load(None, TOKEN), found), ("mixpanel", "region")) == "eu"
    assert saved.read_for(load(None, TOKEN)).values == {}
