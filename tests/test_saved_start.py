"""What was saved on the page, at a start: all of it is in force, or there is no start. Without it something could leave in plain."""

import datetime as dt
import hashlib
import math
import tempfile
import tomllib

import pytest
from conftest import currents, free_port, until
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import _Configured, bridged  # noqa: F401  # a fixture
from test_lifecycle import process  # noqa: F401  # a fixture
from test_page_settings import post, put, say

from bridged.app import App
from bridged.commands.config import read_for
from bridged.config import load, replaced
from bridged.errors import ConfigError
from bridged.saved import EDITABLE, BadSettings, Saved, checked

SEND = "users.messages.email.Send"
FAX = "users.messages.fax.Send"  # of a Braze to come
RULES = {SEND: {"email_address": "hash"}, FAX: {"number": "remove"}}


def file_of(config):
    """Where the daemon of a configuration saves."""
    return Saved(config.spool.path).path


# -- a start that is refused -------------------------------------------------------------------------------------------


async def test_a_rule_that_no_longer_fits_ends_the_start(process, client):  # noqa: F811  # the fixture
    """A type that was included is not any more: without its rule all others of the key would go, and what they hash leave in
    plain. So no daemon runs, at the second start as at the first, nothing is changed, and with the type all is in force again.
    """
    admin = f"127.0.0.1:{free_port()}"
    process.settings |= {"admin__listen": admin, "events__include": f'["{FAX}"]'}
    await process.up()
    wanted = {"events.transform": RULES, "events.exclude": [FAX], "sources.http.bearer_token": "token-of-the-door"}
    async with client.put(f"http://{admin}/api/settings", json={"set": wanted}) as answer:
        assert answer.status == 200, await answer.text()
    assert await process.end() == 0
    file = process.folder / "spool.db.settings.toml"
    before, names = file.read_bytes(), sorted(path.name for path in process.folder.iterdir())

    for _ in range(2):
        (process.folder / "log").unlink()
        await process.start(events__include="[]")
        assert await process.exits() == 78
        said = process.said()
        assert f"bridged: {file}, saved on the page: " in said
        for key in ("events.transform", "events.exclude"):
            assert f"{key}: no event type '{FAX}'" in said
        assert "nothing was changed" in said
        assert "Traceback" not in said
        assert "token-of-the-door" not in said
        assert file.read_bytes() == before
        assert sorted(path.name for path in process.folder.iterdir()) == names

    await process.up()
    assert await process.post([currents()]) == 401
    async with client.get(f"http://{admin}/api/config") as answer:
        assert (await answer.json())["events"]["transform"] == RULES
    assert await process.end() == 0


SAVED = {
    "a rule of another version": (
        f'[events]\ntransform = {{ "{SEND}" = {{ email_address = "encrypt" }} }}\n',
        "'encrypt': expected",
    ),
    "no such type": ('[events]\nexclude = ["users.messages.email.Sned"]\n', "did you mean"),
    "no such type among good ones": (f'[events]\nexclude = ["{SEND}", "{FAX}"]\n', "events.exclude: no event type"),
    "no such field": (f'[events.transform]\n"{SEND}" = {{ nonsense = "hash" }}\n', "'nonsense' is no field"),
    "a key of events that is unknown": ('[events]\nhashed = ["a"]\n', "events.hashed: there is no such key"),
    "a table of events that is unknown": ("[[events.rules]]\na = 1\n", "events.rules: there is no such key"),
    "a key in quotes": (f'"events.exclude" = ["{SEND}"]\n', "it stands in quotes"),
    "no table": ("events = 1\n", "events: expected a table"),
    "no region": ('[mixpanel]\nregion = "mars"\n', "mixpanel.region: expected us | eu | in"),
    "no address": ('[mixpanel]\nurl = "https://api..mixpanel.com"\n', "mixpanel.url: its host"),
    "no token": ("[sources.http]\nbearer_token = 5\n", "sources.http.bearer_token: Expected `str`"),
    "half a credential": ('[mixpanel]\nservice_account = "robot"\n', "mixpanel.service_account needs"),
    "no time": ('[retention]\nmax_age = "for ever"\n', "retention.max_age: "),
    "two that are wrong": ('[mixpanel]\nregion = "mars"\nnaming = "x"\n', "mixpanel.naming: expected seed | current"),
    "cut off": (f'[events]\nexclude = ["{SEND}"', "it is damaged"),
    "no text": (b"\xff\x00", "it is damaged"),
    "a number without end": (f"[delivery]\nmax_concurrency = {'9' * 5000}\n", "it is damaged"),
}


@pytest.mark.parametrize("text", SAVED, ids=SAVED)
async def test_what_cannot_be_in_force_ends_the_start(config, bridged, text):  # noqa: F811  # the fixture
    """Bad by itself or with the configuration, or no TOML: the daemon and every command that reads the file refuse it alike, say
    where and what, and leave it as it is.
    """
    raw, part = SAVED[text]
    settings_ = config()
    file, raw = file_of(settings_), raw if isinstance(raw, bytes) else raw.encode()
    file.write_bytes(raw)
    with pytest.raises(ConfigError) as refused:
        App(settings_)
    assert str(file) in str(refused.value)
    assert part in str(refused.value)
    assert "nothing was changed" in refused.value.hint
    for command in (["check"], ["config"], ["send-test-events", "--list"]):
        if (text, command[0]) == ("half a credential", "send-test-events"):
            continue  # it reads no credential, and so misses none
        code, out, err = await bridged(_Configured(settings_), *command)
        assert (code, out, part in err) == (78, "", True), command
    assert (file.read_bytes(), len(list(file.parent.iterdir()))) == (raw, 1)


@pytest.mark.parametrize("make", ["mkdir", "symlink"])
async def test_a_file_that_cannot_be_read_ends_the_start(config, bridged, make):  # noqa: F811  # the fixture
    """Whatever it holds isn't in force, and a save would be in its place. So of a link to nothing: a disk may not be there yet."""
    settings_ = config()
    file = file_of(settings_)
    file.mkdir() if make == "mkdir" else file.symlink_to("nothing")
    with pytest.raises(ConfigError, match=r"can't read what was saved on the page: "):
        App(settings_)
    code, _, err = await bridged(_Configured(settings_), "check")
    assert (code, "can't read what was saved on the page" in err) == (78, True)


def test_a_folder_that_is_not_for_us(config, an_ordinary_user):
    """A command says that it can't see what was saved: it may need nothing of it. A start has nothing to go on with."""
    settings_ = config()
    assert "can't be seen: [Errno 13] Permission denied" in read_for(settings_).problem
    with pytest.raises(ConfigError, match=r"can't read what was saved on the page: .*Permission denied"):
        App(settings_)


def test_a_file_that_is_not_for_us(config, an_ordinary_user):
    """As root it was made, or copied: the start and the commands are refused, with whose it is to be."""
    with tempfile.TemporaryDirectory() as folder:
        settings_ = config(spool__path=f"{folder}/spool.db")
        file_of(settings_).write_text("")
        file_of(settings_).chmod(0)
        for start in (App, read_for):
            with pytest.raises(
                ConfigError, match=r"can't read what was saved on the page: .*Permission denied"
            ) as refused:
                start(settings_)
            assert "chown" in refused.value.hint


async def test_a_reload_refuses_what_a_start_would(daemon, client, bridged):  # noqa: F811  # the fixture
    """The configuration can't take away what the saved rules need: the old one stays in force, and the alarm says just that."""
    app = await daemon(events__include=f'["{FAX}"]')
    assert (await put(client, app, set={"events.transform": RULES}))[0] == 200
    without = replaced(app.base, ("events", "include"), ())
    app.reload(lambda: without)
    assert f"{app.saved.path}, saved on the page: " in app.reload_problem
    assert f"events.transform: no event type '{FAX}'" in app.reload_problem
    assert app.config.events.transform == RULES
    await until(lambda: [one for one in app.watch.alarms.open if one.alarm == "configuration"], "the alarm", 30)
    [alarm] = [one for one in app.watch.alarms.open if one.alarm == "configuration"]
    assert "a changed configuration can't be used, the old one is in force: " in alarm.text
    with pytest.raises(ConfigError, match="no event type"):
        App(without)
    assert (await bridged(_Configured(without), "check"))[0] == 78


@given(begin=st.integers(0, 1000), end=st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_what_is_left_of_a_file(tmp_path_factory, begin, end):
    """Whatever is cut out of it: the start is refused, or all that the file still says to protect something is in force."""
    wanted = {
        "sources.http.bearer_token": "token-of-the-door",
        "mixpanel.region": "eu",
        "mixpanel.token": "token-of-the-project",
        "events.include": [FAX],
        "events.exclude": ["users.messages.sms.Send", "users.behaviors.Purchase"],
        "events.transform": RULES,
    }
    spool = tmp_path_factory.getbasetemp() / "left.db"
    file = Saved(str(spool))
    file.write(checked(wanted)[0])
    whole = file.path.read_bytes()
    cut = whole[: min(begin, end)] + (whole[max(begin, end) :] if begin < end else b"")
    file.path.write_bytes(cut)
    config = load(None, {"BRIDGED__MIXPANEL__TOKEN": "t", "BRIDGED__SPOOL__PATH": str(spool)})
    try:
        app = App(config)
    except ConfigError:
        assert file.path.read_bytes() == cut
        return
    said, config = tomllib.loads(cut.decode()), app.config
    for section, name in (path.split(".") for path in wanted if path.count(".") == 1):
        if name in said.get(section, {}):
            found = getattr(getattr(config, section), name)
            assert (list(found) if isinstance(found, tuple) else found) == said[section][name]
    token = said.get("sources", {}).get("http", {}).get("bearer_token", "")
    assert config.sources.http.bearer_token == token
    assert not set(said.get("events", {})) - {"include", "exclude", "transform"}


# -- what another version has saved ------------------------------------------------------------------------------------

OF_ANOTHER_VERSION = f"""\
version = 2
"a b" = [1, {{ c = "d" }}]
[mixpanel]
naming = "current"
frobnicate = {{ a = [nan, inf, 1e300], "b.c" = 1979-05-27T07:32:00Z }}
token_file = "somewhere"
[mixpanel."of another"]
date = 1979-05-27
time = 07:32:00.5
number = {2**80}
[privacy]
level = "high"
[events]
exclude = ["{SEND}"]
[sources]
kafka = true
"""


async def test_what_another_version_has_saved_is_kept(daemon, config, client, bridged):  # noqa: F811  # the fixture
    """As after a downgrade: keys that this one doesn't have aren't in force, which is told, and they stand in the file after a save
    as before; all else is in force.
    """
    settings_ = config()
    file = file_of(settings_)
    file.write_text(OF_ANOTHER_VERSION)
    names = (
        "version",
        "a b",
        "mixpanel.frobnicate",
        "mixpanel.token_file",
        "mixpanel.of another.date",
        "privacy.level",
    )
    app = await daemon()
    assert (app.config.mixpanel.naming, app.config.events.exclude) == ("current", (SEND,))
    assert file.read_text() == OF_ANOTHER_VERSION
    assert [name for name in names if name not in app.saved.problem] == []
    code, out, _ = await bridged(_Configured(settings_), "check")
    assert (code, f"warning: {app.saved.problem}" in out) == (0, True)
    await until(lambda: [one for one in app.watch.alarms.open if one.alarm == "configuration"], "the alarm", 30)
    [alarm] = [one for one in app.watch.alarms.open if one.alarm == "configuration"]
    assert app.saved.problem in alarm.text
    assert "can't be used" not in alarm.text
    assert (await post(client, app, [currents()])) == 200

    assert (await put(client, app, set={"mixpanel.region": "eu"}, remove=["events.exclude"]))[0] == 200
    before, after = tomllib.loads(OF_ANOTHER_VERSION), tomllib.loads(file.read_text())
    assert math.isnan(after["mixpanel"]["frobnicate"]["a"].pop(0))
    assert math.isnan(before["mixpanel"]["frobnicate"]["a"].pop(0))
    assert after.pop("mixpanel") == before.pop("mixpanel") | {"region": "eu"}
    before.pop("events")
    assert after == before
    assert after["a b"] == [1, {"c": "d"}]
    assert "frobnicate" in app.saved.problem  # still so
    async with client.get(f"http://{app.config.admin.listen}/api/settings/export") as got:
        assert tomllib.loads(await got.text()) == {"mixpanel": {"naming": "current", "region": "eu"}}
    _, told = await say(client, app, "GET", "/api/settings")
    assert told["problem"] == app.saved.problem
    assert App(app.base).config == app.config


def anything():
    """Whatever TOML can say."""
    names = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    zones = st.just(dt.UTC) | st.none()
    plain = st.booleans() | st.integers() | st.floats(allow_nan=False) | names | st.dates() | st.times()
    plain |= st.datetimes(timezones=zones)
    return st.dictionaries(
        names, st.recursive(plain, lambda of: st.lists(of, max_size=3) | st.dictionaries(names, of, max_size=3))
    )


def _without_empty(value, depth=0):
    """Tables above the third part of a key that hold nothing say nothing."""
    if not isinstance(value, dict) or depth > 2:
        return value
    inner = {name: _without_empty(of, depth + 1) for name, of in value.items()}
    return {name: of for name, of in inner.items() if depth == 2 or of != {}}


@given(raw=anything())
@settings(max_examples=80, deadline=None)
def test_anything_that_another_version_may_have_saved(tmp_path_factory, raw):
    """Whatever its keys and values are, they read the same after a save, beside what this version saves."""
    spool = str(tmp_path_factory.getbasetemp() / "kept.db")
    file = Saved(spool)
    file.unknown = {("of another", "version"): raw} if raw else {}
    file.unknown |= {(name,): value for name, value in raw.items() if name not in ("mixpanel", "of another")}
    file.write(checked({"mixpanel.region": "eu", "events.exclude": [SEND]})[0])
    text = file.path.read_text()
    again = Saved(spool)
    try:
        again.read()
    except ConfigError:  # names such as "events": another test's
        assert {".".join(path) for path in file.unknown} & {"events", "sources", "delivery", "retention", "alerts"}
        return
    again.write(again.values)
    assert again.path.read_text() == text or _without_empty(tomllib.loads(text)) == _without_empty(
        tomllib.loads(again.path.read_text())
    )
    assert again.values == {"mixpanel.region": "eu", "events.exclude": (SEND,)}


# -- what is saved can be read -----------------------------------------------------------------------------------------


@given(
    name=st.sampled_from([name for name in EDITABLE if name.startswith(("delivery.", "retention.max", "alerts."))]),
    number=st.integers(0, 10**20) | st.floats(0, 1e20),
    unit=st.sampled_from(["", "B", "kB", "TB", "TiB", "ms", "s", "h", "d"]),
)
@settings(max_examples=100, deadline=None)
def test_whatever_is_saved_starts(tmp_path_factory, name, number, unit):
    """A value that the page takes is one that the next start reads: else it would be refused, and nobody had touched the file."""
    file = Saved(str(tmp_path_factory.getbasetemp() / "starts.db"))
    for value in (number, f"{number}{unit}"):
        try:
            values = file.with_changes({name: value}, [])
        except BadSettings:
            continue
        file.write(values)
        again = Saved(str(tmp_path_factory.getbasetemp() / "starts.db"))
        again.read()
        assert list(again.values) == [name]


@pytest.mark.parametrize(
    ("name", "value"),
    [("retention.max_age", "999999999999999999d"), ("delivery.max_bytes_per_minute", 10**18 + 1)],
)
async def test_a_value_that_could_not_be_read_again_is_not_saved(daemon, client, name, value):
    """It is written in another unit, with more digits than are read: the next start would be refused."""
    app = await daemon()
    status, told = await put(client, app, set={name: value})
    assert (status, list(told["keys"])) == (400, [name]), told
    assert not app.saved.path.exists()


async def test_a_hashed_address_stays_hashed(daemon, client, emulator):
    """Through a stop and a start, beside keys of another version: the next event leaves as the page had it."""
    app = await daemon()
    assert (await put(client, app, set={"events.transform": {SEND: {"email_address": "hash"}}}))[0] == 200
    with app.saved.path.open("a") as file:
        file.write('[privacy]\nlevel = "high"\n')
    await app.__aexit__(None, None, None)
    app = await daemon()
    event = currents(SEND)
    event["properties"]["email_address"] = "ada@example.com"
    assert await post(client, app, [event]) == 200
    await until(lambda: app.spool.accounts.total("delivered") == 1, "the delivery")
    [sent] = emulator.events()
    assert sent["properties"]["email_address"] == hashlib.sha256(b"ada@example.com").hexdigest()
