"""The commands: what they print, and their exit codes."""

import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROWS, currents, free_port, until

from bridged import cli, config, config_text
from bridged.commands import check
from bridged.commands.printing import duration, printable, size, table
from bridged.config import replaced
from bridged.currents.table import EVENT_TYPES

ROOT = Path(__file__).parent.parent
IN_SYSTEMDS_HANDS = "CREDENTIALS_DIRECTORY=/run/credentials/bridged.service (or bridged@NAME.service)"


def written(value):
    """A value as an environment variable holds it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {written_in(of)}" for key, of in value.items()) + "}"
    return str(value) if isinstance(value, str | config.Size | config.Seconds) else json.dumps(value)


def written_in(value):
    """A value within another."""
    return written(value) if isinstance(value, dict) else json.dumps(value)


@pytest.fixture
def no_terminal(monkeypatch):
    """Standard input is empty."""
    with Path(os.devnull).open(encoding="ascii") as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        yield


@pytest.fixture
def bridged(printed, monkeypatch):
    """Runs a command in a thread, against the configuration of a daemon: exit code, standard output, standard error."""

    async def run(app, *argv):
        for key in config.keys() if app is not None else ():
            value = app.config
            for name in key.path:
                value = getattr(value, name)
            monkeypatch.setenv("__".join(("BRIDGED", *key.path)).upper(), written(value))
        printed.readouterr()
        try:
            code = await asyncio.to_thread(cli.main, [str(word) for word in argv])
        except SystemExit as usage:
            code = usage.code
        output = printed.readouterr()
        return code, output.out, output.err

    return run


async def send(client, app, *events):
    """Brings events to the HTTP door."""
    headers = {"Authorization": f"Bearer {app.config.sources.http.bearer_token}"}
    url = f"http://{app.config.sources.http.listen}/v1/currents"
    async with client.post(url, json={"events": events}, headers=headers) as answer:
        assert answer.status == 200


def fax(id_):
    """An event of a type that nobody knows."""
    return currents(id=id_) | {"event_type": "users.messages.fax.Send"}


def process(*argv, **environ):
    """A command as a process of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("BRIDGED")}
    env = clean | {"PYTHONPATH": str(ROOT)} | environ
    command = [sys.executable, "-m", "bridged", *argv]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


# -- the command line itself ------------------------------------------------------------------------------------------


def test_help_is_light():
    """`bridged --help` imports no server, no database and no loop: it is there at once."""
    code = (
        "import sys\nfrom bridged import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit(bool({'aiohttp', 'aiosqlite', 'uvloop', 'asyncio'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )

    assert result.returncode == 0
    assert "bridged demo" in result.stdout


@pytest.mark.parametrize("command", [[], ["--help"], *([name, "--help"] for name in cli._COMMANDS)])
async def test_every_command_has_help(bridged, command):
    """Each command explains itself; no command at all is a usage error that names them."""
    code, out, err = await bridged(None, *command)

    assert code == (0 if command else 2)
    assert "usage: bridged" in out + err


@pytest.mark.parametrize(
    "argv",
    [
        ["no-such-command"],
        ["status", "--no-such-option"],
        ["dead-letters"],
        ["dead-letters", "show", "x"],
        ["dead-letters", "show", "-1"],
        ["dead-letters", "purge", "9" * 20],
        ["dead-letters", "list", "--since", "soon"],
        ["dead-letters", "list", "--since", "2026"],
        ["demo", "--events", "5"],
    ],
)
async def test_usage_errors_are_2(bridged, argv):
    """What the command line doesn't understand is exit code 2."""
    assert (await bridged(None, *argv))[0] == 2


def test_a_closed_pipe_is_no_error():
    """`bridged config --default | head -1` ends quietly."""
    command = f"{shlex.quote(sys.executable)} -m bridged config --default | head -1"
    env = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    result = subprocess.run(command, shell=True, env=env, capture_output=True, text=True, check=False)

    assert result.stdout.startswith("# bridged's configuration")
    assert result.stderr == ""


@pytest.mark.parametrize("argv", [["dead-letters", "purge", "1"], ["cohorts", "forget", "777"]])
def test_ctrl_d_is_a_no(argv):
    """The end of the input where somebody is asked: nothing is done, nobody sees a traceback."""
    ours, theirs = os.openpty()
    with open(theirs, "rb") as terminal:  # noqa: PTH123  # by its number
        os.write(ours, b"\x04")
        env = {"PYTHONPATH": str(ROOT), "BRIDGED__MIXPANEL__TOKEN": "example-token"}
        command = [sys.executable, "-m", "bridged", *argv]
        result = subprocess.run(
            command, stdin=terminal, env=env, capture_output=True, text=True, timeout=60, check=False
        )
    os.close(ours)

    assert (result.returncode, result.stderr) == (1, "")
    assert result.stdout.endswith(("nothing was deleted\n", "nothing was changed\n"))


def test_a_terminal_without_the_letters_gets_their_numbers(tmp_path):
    """What Mixpanel or a file name says has letters of all kinds; an output that takes only ASCII is no reason to fail."""
    (tmp_path / "grüße.toml").write_text("[mixpanel]\ntoken = 'example-token'\n")
    result = process("check", "--config", str(tmp_path / "grüße.toml"), PYTHONIOENCODING="ascii")

    assert (result.returncode, result.stderr) == (0, "")
    assert "gr\\xfc\\xdfe.toml: good" in result.stdout


@pytest.mark.parametrize("command", ["run", "check", "config", "status", "send-test-events"])
def test_bad_configuration_is_78(tmp_path, command):
    """A typo in the configuration is exit code 78 for every command, and the message names file, key and remedy."""
    (tmp_path / "bad.toml").write_text('[mixpanel]\ntokn = "x"\n')
    result = process(command, "--config", str(tmp_path / "bad.toml"))

    assert result.returncode == 78
    assert result.stderr == (
        f"bridged: {tmp_path}/bad.toml: [mixpanel] has no key 'tokn'\n  hint: did you mean 'token'?\n"
    )


@pytest.mark.parametrize("command", [["check"], ["dead-letters", "list"]])
@pytest.mark.parametrize("option", [["--config", "FILE"], ["--config=FILE"]])
async def test_the_configuration_may_be_named_first(bridged, tmp_path, command, option):
    """As other programs have it: to be told that "FILE" is no command helps nobody."""
    file = tmp_path / "bad.toml"
    file.write_text('[mixpanel]\ntokn = "x"\n')
    given = [word.replace("FILE", str(file)) for word in option]
    code, _, err = await bridged(None, *given, *command)

    assert (code, "has no key 'tokn'" in err) == (78, True)
    assert (await bridged(None, *given))[0] == 2


@pytest.mark.parametrize(
    "argv", [["status"], ["dead-letters", "list"], ["dead-letters", "export", "-"], ["send-test-events"]]
)
async def test_no_daemon_is_69(bridged, monkeypatch, argv):
    """Without a daemon the commands that ask one say where they looked, and what to do."""
    port = free_port()
    monkeypatch.setenv("BRIDGED__MIXPANEL__TOKEN", "example-token")
    monkeypatch.setenv("BRIDGED__ADMIN__LISTEN", f"127.0.0.1:{port}")
    monkeypatch.setenv("BRIDGED__SOURCES__HTTP__LISTEN", f"127.0.0.2:{port}")  # as free: nobody listens on it
    code, _, err = await bridged(None, *argv)

    assert code == 69
    assert f"127.0.0.{2 if argv == ['send-test-events'] else 1}:{port}" in err
    assert "hint: is it running?" in err


async def test_something_else_there_is_69(bridged, monkeypatch, emulator):
    """Another program at the daemon's address is no daemon."""
    monkeypatch.setenv("BRIDGED__MIXPANEL__TOKEN", "example-token")
    monkeypatch.setenv("BRIDGED__ADMIN__LISTEN", emulator.url.removeprefix("http://"))
    code, _, err = await bridged(None, "status")

    assert code != 0
    assert "HTTP 404" in err or "no such endpoint" in err


async def test_commands_read_only_the_secrets_that_they_use(bridged, daemon, monkeypatch, tmp_path):
    """What systemd hands to the daemon alone, or a file beside it, is nothing that looking at it needs."""
    app = await daemon(sources__http__bearer_token="bearer", admin__token="admin")
    await bridged(app, "config")
    for name, value in (
        ("MIXPANEL__TOKEN", ""),
        ("MIXPANEL__TOKEN_FILE", "not-here"),
        ("MIXPANEL__SERVICE_ACCOUNT", "its-secret-is-a-credential"),
        ("ADMIN__TOKEN", ""),
        ("SOURCES__HTTP__BEARER_TOKEN", ""),
        ("SOURCES__HTTP__LISTEN", app.config.sources.http.listen.replace("127.0.0.1", "0.0.0.0")),
        ("SPOOL__PATH", app.config.spool.path),
    ):
        monkeypatch.setenv(f"BRIDGED__{name}", value)
    code, _, err = await bridged(None, "status")
    assert (code, IN_SYSTEMDS_HANDS in err) == (69, True)
    code, _, err = await bridged(None, "send-test-events")
    assert (code, IN_SYSTEMDS_HANDS in err) == (69, True)
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "admin_token").write_text("admin")
    (tmp_path / "credentials" / "sources_http_bearer_token").write_text("bearer")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    types = ["--types", "users.messages.email.Open"]
    for argv in (["status"], ["dead-letters", "list"], ["send-test-events", *types]):
        assert (await bridged(None, *argv))[0] == 0

    code, _, err = await bridged(None, "check")
    assert (code, "mixpanel.token from not-here" in err) == (78, True)


@pytest.mark.parametrize("command", ["check", "config"])
@pytest.mark.parametrize(
    "lacking",
    [
        {"ADMIN__LISTEN": "0.0.0.0:8481"},  # its token
        {"MIXPANEL__SERVICE_ACCOUNT": "ada", "MIXPANEL__PROJECT_ID": "1"},
        {"MIXPANEL__TOKEN": "", "ADMIN__LISTEN": ""},
    ],
)
async def test_missing_secrets_may_be_with_systemd(bridged, monkeypatch, tmp_path, command, lacking):
    """Whoever isn't systemd is told where they are then; a call that was told already isn't."""
    monkeypatch.setenv("BRIDGED__SPOOL__PATH", str(tmp_path / "spool.db"))
    monkeypatch.setenv("BRIDGED__MIXPANEL__TOKEN", "example-token")
    for name, value in lacking.items():
        monkeypatch.setenv(f"BRIDGED__{name}", value)
    code, _, err = await bridged(None, command)
    assert (code, IN_SYSTEMDS_HANDS in err) == (78, True)

    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    code, _, err = await bridged(None, command)
    assert (code, "systemd" in err) == (78, False)


async def test_wrong_admin_token_is_69(bridged, daemon, monkeypatch):
    """A command with another token than the daemon's is told so."""
    app = await daemon(admin__token="right")
    await bridged(app, "status")
    monkeypatch.setenv("BRIDGED__ADMIN__TOKEN", "wrong")
    code, _, err = await bridged(None, "status")

    assert code == 69
    assert "refuses us" in err


# -- config and check -------------------------------------------------------------------------------------------------


async def test_config_default(bridged):
    """`config --default` is a configuration file; it needs none to be there."""
    code, out, _ = await bridged(None, "config", "--default")

    assert code == 0
    assert out == config_text.default_toml()
    assert tomllib.loads(out)["delivery"]["max_concurrency"] == 20


async def test_config_in_force_hides_secrets(bridged, monkeypatch):
    """`config` shows what file and environment amount to, and no secret."""
    monkeypatch.setenv("BRIDGED__MIXPANEL__TOKEN", "hunter2hunter2hunter2")
    monkeypatch.setenv("BRIDGED__DELIVERY__FLUSH_INTERVAL", "250ms")
    code, out, _ = await bridged(None, "config")

    assert code == 0
    assert json.loads(out)["mixpanel"]["token"] == "********"
    assert json.loads(out)["delivery"]["flush_interval"] == "250ms"
    assert "hunter2" not in out


async def test_saved_settings_that_are_out_of_sight_are_told(bridged, daemon, monkeypatch, tmp_path):
    """With a relative spool.path they are found from the daemon's own folder, and from elsewhere nobody is told wrong."""
    app = await daemon(spool__path="spool.db")
    await app.save({"mixpanel.naming": "current"}, [])
    assert "saved on the page, over the configuration: mixpanel.naming\n" in (await bridged(app, "status"))[1]
    assert json.loads((await bridged(app, "config"))[1])["mixpanel"]["naming"] == "current"
    monkeypatch.setenv("BRIDGED__MIXPANEL__NAMING", "seed")
    assert "can't be seen" not in (await bridged(None, "check"))[1]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    assert "spool.path is relative" in (await bridged(None, "check"))[1]
    assert "spool.path is relative" in json.loads((await bridged(None, "config"))[1])["problem"]
    monkeypatch.setenv("BRIDGED__SPOOL__PATH", str(tmp_path / "spool.db"))
    assert json.loads((await bridged(None, "config"))[1])["mixpanel"]["naming"] == "current"


async def test_check_sums_up(bridged, config):
    """`check` says in a few lines what would run, and shows just enough of the credential to recognise it by."""
    secret = "0123456789abcdef0123456789abcdef"
    code, out, _ = await bridged(_Configured(config(mixpanel__token=secret, mixpanel__naming="current")), "check")

    assert code == 0
    assert f"{len(EVENT_TYPES)} of {len(EVENT_TYPES)} selected" in out
    assert "project token ****cdef" in out
    assert secret not in out


class _Configured:
    """Something with a configuration, as a daemon has one."""

    def __init__(self, settings):
        self.config = settings


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        ({"mixpanel__api_secret": "x"}, "API secrets on 2027-03-03"),
        ({}, '"users.messages.sms.CarrierSend" = "SMS Send to Carrier"'),
        ({"mixpanel__token": "", "mixpanel__api_secret": "x"}, "no `token` property"),
        ({"mixpanel__partner_id": ""}, "monthly tracked users"),
        ({"sources__http__listen": "", "sources__stream__listen": "[]"}, "both doors are closed"),
        ({"events__message_engagement": "false", "events__customer_behavior": "false"}, "no event type is selected"),
    ],
)
async def test_check_warns(bridged, config, overrides, warning):
    """What will hurt later is said now, and is no error."""
    code, out, _ = await bridged(_Configured(config(**overrides)), "check")

    assert code == 0
    assert warning in out


@pytest.mark.parametrize(
    ("events", "types"),
    [
        (
            {"names": {"users.messages.email.Send": "Email Open"}},
            "users.messages.email.Send and users.messages.email.Open",
        ),
        (
            {"names": {"users.messages.fax.Send": "Email Open"}, "include": ("users.messages.fax.Send",)},
            "users.messages.email.Open and users.messages.fax.Send",
        ),
        (
            {"names": {"users.messages.email.Send": "Fax Send"}, "include": ("users.messages.fax.Send",)},
            "users.messages.email.Send and users.messages.fax.Send",
        ),
        (
            {"names": {"users.messages.email.Send": "E", "users.messages.email.Open": "E", "users.canvas.Entry": "E"}},
            "users.canvas.Entry, users.messages.email.Send and users.messages.email.Open",
        ),
        # Not forwarded: nothing is mixed up.
        ({"names": {"users.messages.email.Send": "Email Open"}, "exclude": ("users.messages.email.Open",)}, None),
        ({"names": {"users.messages.email.Send": "Email Sent"}}, None),
    ],
)
async def test_check_warns_of_two_types_of_one_name(bridged, config, events, types):
    """By a slip in [events.names]: in Mixpanel they can't be told apart any more. It may be meant, so it is no error."""
    settings = config()
    for key, value in events.items():
        settings = replaced(settings, ("events", key), value)
    code, out, _ = await bridged(_Configured(settings), "check")

    assert code == 0
    warnings = [line for line in out.splitlines() if "can't be told apart" in line]
    assert len(warnings) == (types is not None)
    assert all(f"events.names: {types} have one name" in line for line in warnings)


async def test_renamed_as_exempt_is_no_warning(config):
    """Once the name is Mixpanel's own spelling there is nothing to warn of."""
    names = '{"users.messages.sms.CarrierSend" = "SMS Send to Carrier"}'

    assert list(check._warnings(config(events__names=names))) == []


@pytest.mark.parametrize("key", ["include", "exclude", "names"])
async def test_unknown_type_names_are_errors(bridged, config, key):
    """A misspelt event type in the configuration would silently do nothing: check names the key and what was meant."""
    wrong = "users.messages.email.Opens"
    value = {wrong: "x"} if key == "names" else (wrong,)
    code, _, err = await bridged(_Configured(replaced(config(), ("events", key), value)), "check")

    assert code == 78
    assert f"events.{key}: no event type '{wrong}'; did you mean 'users.messages.email.Open'?" in err


async def test_check_online(bridged, config, emulator):
    """A good credential is recognised without storing anything."""
    emulator.credentials(token="example-token")
    code, out, _ = await bridged(_Configured(config()), "check", "--online")

    assert code == 0
    assert "Mixpanel takes the project token" in out
    assert emulator.events() == []


@pytest.mark.parametrize("trouble", ["wrong credential", "outage", "nobody there"])
async def test_check_online_fails_with_69(bridged, config, emulator, trouble):
    """A refused credential, a failing Mixpanel and an unreachable one are exit code 69, each with its reason."""
    overrides = {}
    if trouble == "wrong credential":
        emulator.credentials(token="another")
    elif trouble == "outage":
        emulator.script([{"status": 503}])
    else:
        overrides["mixpanel__url"] = f"http://127.0.0.1:{free_port()}"
    code, _, err = await bridged(_Configured(config(**overrides)), "check", "--online")

    assert code == 69
    assert ("refuses us, HTTP 401" if trouble == "wrong credential" else "can't be asked") in err


# -- status and test events -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slip", ["[mixpanel]\nurl = 5", '[retention]\nmax_age = "2 weeks"', "[delivery]\ntimeout = 0"])
async def test_a_daemon_is_asked_whose_file_has_a_slip(bridged, daemon, tmp_path, slip):
    """It runs on with the configuration that it has, and has an alarm for that one: that is what `status` is asked for. What
    is wrong is said first. A slip in [admin] itself leaves nobody to ask.
    """
    app = await daemon()
    file = tmp_path / "slip.toml"
    file.write_text(f'{slip}\n[admin]\nlisten = "{app.config.admin.listen}"\n')
    code, out, err = await bridged(None, "status", "--config", str(file))
    assert code == 0
    assert "nothing waiting" in out
    assert str(file) in err
    assert err.endswith("the daemon is asked nevertheless\n")
    file.write_text(f'{slip}\n[admin]\nlistne = "{app.config.admin.listen}"\n')
    assert (await bridged(None, "status", "--config", str(file)))[0] == 78


async def test_test_events_and_status(bridged, daemon, emulator):
    """One event of each selected type goes through the door; the status then tells it, for people and as JSON."""
    app = await daemon(sources__http__bearer_token="bearer", admin__token="admin", events__customer_behavior="false")
    selected = [row for row in EVENT_TYPES if row.group == "message_engagement"]
    code, out, _ = await bridged(app, "send-test-events")
    await until(lambda: len(emulator.events()) == len(selected), "delivery")

    assert code == 0
    assert out.startswith(f"{len(selected)} events accepted")
    code, out, _ = await bridged(app, "status")
    assert code == 0
    assert out.startswith("Delivering: ")
    assert f"delivered      {len(selected)}" in out.replace(",", "")
    assert f"and {len(selected) - 20} more types" in out
    code, out, _ = await bridged(app, "status", "--json")
    assert json.loads(out)["events"]["delivered"] == len(selected)


async def test_status_says_why_events_were_skipped(bridged, daemon, client):
    """And since when it knows: the count of those that were skipped outlives a restart, their reasons don't."""
    app = await daemon(events__exclude='["users.messages.email.Send"]')
    assert "skipped since this start" not in (await bridged(app, "status"))[1]
    await send(client, app, currents("users.messages.email.Send"), *[currents(user={}) | {"id": i} for i in "ab"])
    assert "  skipped since this start: 2 no external_user_id, 1 not selected\n" in (await bridged(app, "status"))[1]


async def test_test_events_of_some_types(bridged, daemon, emulator):
    """Only the named types are sent; a type that isn't selected is an error."""
    app = await daemon(events__exclude='["users.behaviors.Purchase"]')
    types = ["users.behaviors.CustomEvent", "users.messages.email.Open"]

    assert (await bridged(app, "send-test-events", "--types", *types))[0] == 0
    await until(lambda: len(emulator.events()) == 2, "delivery")
    assert (await bridged(app, "send-test-events", "--types", "users.behaviors.Purchase"))[0] == 78
    assert len((await bridged(app, "send-test-events", "--list"))[1].splitlines()) == len(EVENT_TYPES) - 1


@pytest.mark.parametrize(
    ("content", "warned"), [(b"[mixpanel]", True), (b"", False), (b"SQLite format 3\0", False), (None, False)]
)
def test_check_warns_of_a_spool_that_is_another_file(tmp_path, content, warned):
    """A slip in spool.path: the start takes whatever is there for a damaged spool, and gives it another name."""
    file = tmp_path / "other.file"
    if content is not None:
        file.write_bytes(content)
    done = process("check", BRIDGED__MIXPANEL__TOKEN="t", BRIDGED__SPOOL__PATH=str(file))
    words = f"warning: spool.path: {file} is no spool: the start would rename it to {file}.corrupt-<time>"

    assert (done.returncode, words in done.stdout) == (0, warned), done.stderr


# -- dead letters -----------------------------------------------------------------------------------------------------


async def test_dead_letters_from_list_to_purge(bridged, daemon, client, tmp_path):
    """The whole life: listed, shown, exported, replayed in vain, purged."""
    app = await daemon()
    await send(client, app, fax("a"), fax("b"), currents(id="c", time="soon"))

    code, out, _ = await bridged(app, "dead-letters", "list")
    assert code == 0
    assert out.count("unknown event type") == 3  # two rows and their group
    assert "3 dead letters" in out
    code, out, _ = await bridged(app, "dead-letters", "list", "--type", "users.messages.fax.Send", "--json")
    ids = [json.loads(line)["id"] for line in out.splitlines()]
    assert len(ids) == 2
    code, out, _ = await bridged(app, "dead-letters", "list", "--limit", "1")
    assert "there may be more: --after" in out
    code, out, _ = await bridged(app, "dead-letters", "show", ids[0])
    assert json.loads(out)["event"]["id"] == "a"
    assert (await bridged(app, "dead-letters", "show", 99))[0] == 1

    file = tmp_path / "letters.ndjson"
    code, _, err = await bridged(app, "dead-letters", "export", file)
    assert (code, "3 dead letters written" in err) == (0, True)
    assert len(file.read_text().splitlines()) == 3
    assert file.stat().st_mode & 0o777 == 0o600
    assert (await bridged(app, "dead-letters", "export", tmp_path / "no" / "folder"))[0] == 74

    code, out, _ = await bridged(app, "dead-letters", "replay", "--reason", "unknown")
    assert (code, out.splitlines()[0]) == (1, "0 replayed, 2 refused again")
    code, _, err = await bridged(app, "dead-letters", "replay", 999_999)
    assert (code, "no such dead letter" in err) == (1, True)
    code, out, _ = await bridged(app, "dead-letters", "purge", ids[0], "--yes")
    assert (code, out) == (0, "1 purged\n")
    code, out, _ = await bridged(app, "dead-letters", "purge", "--all", "--yes")
    assert (code, out) == (0, "2 purged\n")
    assert (await bridged(app, "dead-letters", "list"))[1] == "no dead letters\n"


async def test_a_replay_tells_what_is_skipped_now(bridged, daemon, client):
    """Those leave the dead letters and go nowhere: who was told that they were replayed looked for them in Mixpanel."""
    app = await daemon()
    await send(client, app, fax("a"), fax("b"), currents(id="c", time="soon"))
    skipping = replaced(app.config, ("events", "unknown"), "skip")
    app.reload(lambda: skipping)
    code, out, _ = await bridged(app, "dead-letters", "replay", "--type", "users.messages.fax.Send")

    assert (code, out) == (
        0,
        "0 replayed, 0 refused again, 2 skipped: [events] says today that they aren't forwarded\n",
    )
    assert app.spool.accounts.total("skipped") == 2
    happened = [entry.detail for entry in app.activity.entries if entry.kind == "replay"]
    assert happened == [{"replayed": 0, "refused_again": 0, "skipped": 2}]


@pytest.mark.parametrize("which", [("--all",), ("--type", "users.messages.fax.Send")])
async def test_a_purge_is_about_what_was_there_when_it_was_asked(bridged, daemon, client, monkeypatch, which):
    """The question says how many; what comes before the answer stays."""
    app = await daemon()
    await send(client, app, fax("a"), fax("b"))
    loop, asked = asyncio.get_running_loop(), []

    def meanwhile(question):
        asked.append(question)
        asyncio.run_coroutine_threadsafe(send(client, app, fax("c")), loop).result(30)
        return "y"

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", meanwhile)
    code, out, _ = await bridged(app, "dead-letters", "purge", *which)

    assert (code, out, ", 2 now, " in asked[0]) == (0, "2 purged\n", True)
    assert app.spool.dead_letters == 1


@pytest.mark.parametrize("day", ["20990131", "2099-01-31", "4073414400"])
async def test_a_day_without_dashes_is_that_day(bridged, daemon, client, day):
    """Taken for seconds since 1970 it lay in August of that year: a purge of what came since deleted all there was."""
    app = await daemon()
    await send(client, app, fax("a"))

    assert (await bridged(app, "dead-letters", "purge", "--since", day, "--yes"))[:2] == (0, "0 purged\n")
    assert (await bridged(app, "dead-letters", "purge", "--until", day, "--yes"))[:2] == (0, "1 purged\n")


async def test_an_export_replaces_a_file_only_when_told_to(bridged, daemon, client, tmp_path):
    """The first export may be the only copy of what was purged since; --force is somebody's word that it isn't."""
    app = await daemon()
    await send(client, app, fax("a"))
    file, link = tmp_path / "letters.ndjson", tmp_path / "link"
    link.symlink_to(file)
    assert (await bridged(app, "dead-letters", "export", link))[0] == 0  # the file behind the link is made
    kept = file.read_bytes()
    await bridged(app, "dead-letters", "purge", "--all", "--yes")

    for name in (file, link):
        code, _, err = await bridged(app, "dead-letters", "export", name)
        assert code == 74
        assert "is there already" in err
        assert "--force" in err
        assert file.read_bytes() == kept
    assert (await bridged(app, "dead-letters", "export", link, "--force"))[0] == 0
    assert file.read_bytes() == b""
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.glob("*.part")) == []


@pytest.mark.parametrize("end", ["whole", "no room", "interrupted"])
async def test_an_export_leaves_nothing_but_its_file(end, tmp_path):
    """A neighbour called FILE.part is somebody's own; and what is half written goes, whatever ended it."""
    folder = tmp_path / "exports"
    folder.mkdir()
    (folder / "letters.part").write_text("mine")
    letters = b'{"id":1}\n' * 1000
    hanging = asyncio.Event()

    async def door(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        more = 1 if end == "interrupted" else 0
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(letters) + more) + letters)
        await hanging.wait()
        writer.close()

    async with await asyncio.start_server(door, "127.0.0.1", 0) as server:
        process = await asyncio.create_subprocess_exec(
            *("bash", "-c", 'ulimit -f "$1"; shift; exec "$@"', "-", "1" if end == "no room" else "unlimited"),
            *(sys.executable, "-m", "bridged", "dead-letters", "export", folder / "letters"),
            env=os.environ | {"BRIDGED__ADMIN__LISTEN": f"127.0.0.1:{server.sockets[0].getsockname()[1]}"},
            cwd=ROOT,
            stderr=asyncio.subprocess.PIPE,
        )
        if end == "interrupted":
            await until(lambda: len(list(folder.iterdir())) == 2, "the file that is being written", 30)
            process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
        hanging.set()

    left = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert process.returncode == {"whole": 0, "no room": 74, "interrupted": 130}[end], err
    assert left == {"letters.part": b"mine"} | ({"letters": letters} if end == "whole" else {})


@pytest.mark.parametrize(
    "command", ["status", "dead-letters list", "dead-letters export -", "dead-letters purge --all --yes"]
)
@pytest.mark.parametrize("says", ["404 Not Found", "503 Service Unavailable"])
async def test_another_program_at_the_daemons_port_is_told_as_one(command, says):
    """Its bare "HTTP 404" told nobody who had said that, nor where."""

    async def stranger(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {says}\r\nContent-Length: 4\r\nConnection: close\r\n\r\nlost".encode())
        writer.close()

    async with await asyncio.start_server(stranger, "127.0.0.1", 0) as server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        done = await asyncio.to_thread(process, *command.split(), BRIDGED__ADMIN__LISTEN=address)

    assert done.returncode == 69
    assert done.stderr.splitlines() == [
        f"bridged: what answers at {address} is not bridged [admin] listen: HTTP {says[:3]}",
        "  hint: is another program, or another version of bridged, running there?",
    ]


async def test_an_export_whose_daemon_goes_away_is_told_as_one(tmp_path):
    """The daemon had answered: that none answers sent people to look for a wrong address."""

    async def door(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{"id":1}\n\r\n')
        writer.close()

    async with await asyncio.start_server(door, "127.0.0.1", 0) as server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        command = ("dead-letters", "export", str(tmp_path / "letters"))
        done = await asyncio.to_thread(process, *command, BRIDGED__ADMIN__LISTEN=address)

    assert done.returncode == 69
    assert f"the answer of the daemon at {address} broke off" in done.stderr
    assert "no daemon answers" not in done.stderr
    assert list(tmp_path.iterdir()) == []


async def test_an_export_into_a_pipe_leaves_it_one(bridged, daemon, client, tmp_path):
    """Whatever isn't a regular file is written into, never replaced by one."""
    app = await daemon()
    await send(client, app, fax("a"))
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    for name in (fifo, link):
        reading = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        code, _, _ = await bridged(app, "dead-letters", "export", name)
        got = os.read(reading, 2**20)
        os.close(reading)
        assert code == 0
        assert json.loads(got)["event"]["id"] == "a"
        assert fifo.is_fifo()
        assert link.is_symlink()


@pytest.mark.parametrize(
    ("name", "code", "word"),
    [("", 2, "which file"), (".", 74, "is a folder"), ("/", 74, "is a folder"), ("loop", 74, "can't write")],
)
async def test_an_export_to_no_file_is_told(bridged, daemon, tmp_path, name, code, word):
    """A folder or an empty name is a mistake in words, not a traceback."""
    (tmp_path / "loop").symlink_to("loop")
    got, _, err = await bridged(await daemon(), "dead-letters", "export", name)

    assert got == code
    assert word in err


async def test_more_reasons_than_are_listed_are_told(bridged, daemon, client):
    """Nobody takes the first twenty for all."""
    app = await daemon()
    await send(client, app, *[currents(id=str(n), time=f"soon {n}") for n in range(23)])
    assert "more reasons" not in (await bridged(app, "dead-letters", "list", "--limit", "1"))[1]
    await send(client, app, *[currents(event_type, id=event_type, time="soon") for event_type in list(ROWS)[:23]])

    assert " more reasons: see the page" in (await bridged(app, "dead-letters", "list", "--limit", "1"))[1]


async def test_no_credential_is_told_as_none(bridged, daemon):
    """Before it was given on the page, there is no project token from anywhere."""
    app = await daemon(mixpanel__token="")

    assert "credential    none\n" in (await bridged(app, "status"))[1]


@pytest.mark.parametrize("argv", [["replay"], ["replay", 1, "--all"], ["purge", "--all"], ["purge", 1, "--type", "x"]])
@pytest.mark.usefixtures("no_terminal")
async def test_dead_letters_want_clear_words(bridged, daemon, client, argv):
    """Which ones must be said in exactly one way, and a purge without a terminal wants --yes."""
    app = await daemon()
    await send(client, app, fax("a"))

    assert (await bridged(app, "dead-letters", *argv))[0] == 2
    assert app.spool.dead_letters == 1


async def test_nothing_commands_the_terminal(bridged, daemon, client):
    """What somebody sent is printed without its control characters."""
    app = await daemon()
    await send(
        client, app, currents(id="\x1b[2J", event_type="users.behaviors.CustomEvent") | {"event_type": "\x1b[31mred"}
    )

    for argv in (["list"], ["show", 1]):
        assert "\x1b" not in (await bridged(app, "dead-letters", *argv))[1]


# -- printing ---------------------------------------------------------------------------------------------------------


def test_tables_are_aligned():
    """Numbers stand to the right, with separators; nothing trails."""
    assert table([["a", 1], ["long", 1234]], right=[1]) == "  a         1\n  long  1,234"
    assert table([]) == ""


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (10 * 2**30, "10.0 GiB")]
)
def test_sizes(number, text):
    """Bytes in the unit that fits."""
    assert size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.25, "1.2 s"), (90, "90 s"), (600, "10 min"), (7200, "2 h"), (2e5, "2 d")]
)
def test_durations(seconds, text):
    """Times in the unit that fits."""
    assert duration(seconds) == text


def test_printable():
    """Text stays, control characters don't."""
    assert printable("é ok\x1b\n\u202e") == "é ok\ufffd\ufffd\ufffd"


@pytest.mark.parametrize(
    "line",
    [
        "demo --events many",
        "emulator --max-events-per-minute many",
        "backfill --events-per-second many x",
        "cohorts allow many",
        "dead-letters list --limit many",
        "dead-letters list --limit 0",
        "dead-letters list --since many",
    ],
)
async def test_an_option_of_the_wrong_kind_is_told_in_words(bridged, line):
    """Not by the name of a function."""
    code, _, err = await bridged(None, *line.split())

    assert code == 2
    assert line.split()[3 if "dead" in line else 2] in err
    assert "_" not in err.splitlines()[-1]


# -- standard input, output and error ----------------------------------------------------------------------------------


def shell(tmp_path, line):
    """A shell's line with `bridged` in it, as a process of its own: exit code, standard error."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("BRIDGED", "PYTHON"))}
    env = clean | {"PYTHONPATH": str(ROOT), "BRIDGED__ADMIN__LISTEN": "127.0.0.1:1", "BRIDGED__MIXPANEL__TOKEN": "t"}
    line = line.replace("bridged ", f"{shlex.quote(sys.executable)} -m bridged ", 1)
    command = ["/bin/sh", "-c", line]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("bridged check >&-", 0),
        ("bridged --version >&-", 0),
        ("bridged config --default <&- >&- 2>&-", 0),
        ("bridged status <&- >&-", 69),
        ("bridged dead-letters purge --all <&-", 2),
    ],
)
def test_a_closed_standard_stream_is_no_crash(tmp_path, line, code):
    """Started by something that closed them, a command does its work, and ends as it says."""
    returned, said = shell(tmp_path, line)

    assert (returned, "Traceback" in said) == (code, False), said


@pytest.mark.parametrize("command", ["check", "config", "run", "send-test-events", "dead-letters export x"])
def test_a_working_directory_that_was_removed_is_told(tmp_path, command):
    """By whoever cloned the project anew, in another window."""
    (tmp_path / "here").mkdir()
    returned, said = shell(tmp_path / "here", f"rmdir ../here; bridged {command}")

    assert returned == 74
    assert said.endswith("bridged: the working directory was removed\n  hint: cd into one that is there\n")
    assert "Traceback" not in said


@pytest.mark.parametrize("line", ["bridged check", "bridged --help", "PYTHONUNBUFFERED=1 bridged check"])
def test_output_that_cannot_be_written_is_told(tmp_path, line):
    """A full disk under standard output is an error in words, and 74."""
    returned, said = shell(tmp_path, f"{line} >/dev/full")

    assert (returned, said) == (74, "bridged: can't write to standard output: No space left on device\n")


def test_files_never_get_the_number_of_a_closed_stream(tmp_path):
    """With standard error closed, the spool must not be what a library's last words are written into."""
    program = (
        "import os, sys; from bridged.cli import main; main(['check']); "
        "n = os.open('spool', os.O_RDWR | os.O_CREAT); sys.exit(0 if n > 2 else n + 10)"
    )
    returned, said = shell(tmp_path, f'{shlex.quote(sys.executable)} -c "{program}" <&- >&- 2>&-')

    assert returned == 0, said
