"""Credentials that are refused, and the ways another one comes in without a restart: files, SIGHUP, the API."""

import asyncio
import gzip
import itertools
import signal
import threading
import time

import msgspec
import pytest
from conftest import SLOW, balanced, currents, free_port, until
from test_lifecycle import Process

from bridged import reloading
from bridged.app import App
from bridged.config import keys, load, replaced, secret_files, value_at
from bridged.delivery import delivery
from bridged.emulator.mixpanel import EmulatorConfig, MixpanelEmulator
from bridged.errors import ConfigError
from bridged.settings import SECRETS, Config

RESUME_S = 5.0


class Watched(MixpanelEmulator):
    """Also keeps when each request came, with how many events, and as whom."""

    def __init__(self, config):
        super().__init__(config)
        self.calls = []
        self.tokens = {}  # by the id of the event

    async def _read(self, request):
        call = await super()._read(request)
        lines = gzip.decompress(call.body).splitlines()
        for properties in (msgspec.json.decode(line)["properties"] for line in lines):
            self.tokens[properties["$insert_id"]] = properties.get("token")
        self.calls.append((time.monotonic(), len(lines), request.headers.get("Authorization")))
        return call


@pytest.fixture
async def emulator():
    """One that knows only the API secret `right`."""
    async with Watched(EmulatorConfig(port=0)) as running:
        running.credentials(api_secret="right")
        yield running


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    """A changed credential waits for two seconds after the last request; here for less. (Not in the test of the process.)"""
    monkeypatch.setattr(delivery, "_EARLY_PROBE_S", 0.2)


def batch(count, first=0):
    """Currents events, all different."""
    return [currents(seed=seed) for seed in range(first, first + count)]


async def post(client, app, events):
    """Hands events in at the HTTP door."""
    async with client.post(f"http://127.0.0.1:{app.http.port}/v1/currents", json={"events": events}) as answer:
        assert answer.status == 200


async def give(client, app, body):
    """POST /api/credentials; gives status and JSON."""
    async with client.post(f"http://{app.config.admin.listen}/api/credentials", json=body) as answer:
        return answer.status, await answer.json()


async def ask(client, app):
    """/api/status."""
    async with client.get(f"http://{app.config.admin.listen}/api/status") as answer:
        return await answer.json()


async def halted(daemon, client, count=5, **overrides):
    """A daemon with a wrong credential, an hour between probes, and some events that wait."""
    app = await daemon(**({"mixpanel__api_secret": "wrong", "delivery__probe_interval": "1h"} | overrides))
    await post(client, app, batch(count))
    await until(lambda: app.delivery.halted is not None, "the halt")
    return app


async def resumed(app, since):
    """Everything was delivered, and soon."""
    await until(lambda: app.backlog.events == 0, "the delivery", 20)
    balanced(app)
    return time.monotonic() - since


# -- probes ------------------------------------------------------------------------------------------------------------


async def test_probes_keep_their_interval_in_a_storm_of_reloads(daemon, client, emulator):
    """However often a configuration that says the same is read again: no probe beyond the interval's, each of one segment."""
    app = await halted(daemon, client, 1)
    for n in range(1, 10):
        await post(client, app, batch(10, 10 * n))
    before = len(emulator.calls)
    for _ in range(100):
        app.reload(lambda: app.config)
        await asyncio.sleep(0.01)

    assert len(emulator.calls) == before
    assert app.delivery.halted is not None


async def test_a_credential_that_changes_all_the_time_is_no_storm(daemon, client, emulator, monkeypatch):
    """Each other wrong credential may be tried before its time, but not faster than one request in so many seconds."""
    monkeypatch.setattr(delivery, "_EARLY_PROBE_S", 0.5)
    app = await halted(daemon, client)
    before = len(emulator.calls)
    started = time.monotonic()
    for n in itertools.count():
        app.take_credentials({"api_secret": f"wrong-{n}"})
        await asyncio.sleep(0.02)
        if time.monotonic() - started > 1.2:
            break
    probes, took_s = len(emulator.calls) - before, time.monotonic() - started

    assert 1 <= probes <= took_s / 0.5 + 1


async def test_an_answer_to_the_old_credential_says_nothing_about_the_new_one(daemon, client, emulator):
    """A refusal that was under way while the credential was changed doesn't put off the new one's probe for a minute."""
    app = await daemon(mixpanel__api_secret="wrong", delivery__probe_interval="1h")
    emulator.script([{"delay_s": 0.7, "times": 1}])
    await post(client, app, batch(5))
    await until(lambda: emulator.calls, "the request")
    app.take_credentials({"api_secret": "right"})
    await until(lambda: app.backlog.events == 0, "the delivery", RESUME_S)

    assert app.delivery.halted is None
    assert app.delivery.verdicts == {"halt": 1, "delivered": 1}


async def test_two_hours_of_refusal_in_short(daemon, client, emulator):
    """120 intervals without a good credential: one probe each at most, nothing lost, and then everything arrives."""
    interval_s = 0.02
    app = await daemon(mixpanel__api_secret="wrong", delivery__probe_interval="20ms", delivery__flush_interval="0s")
    await post(client, app, batch(50))
    await until(lambda: app.delivery.halted is not None, "the halt")
    before, started = len(emulator.calls), time.monotonic()
    for n in range(1, 20):
        await post(client, app, batch(50, 50 * n))
    await until(lambda: time.monotonic() - started > 120 * interval_s, "two hours", 20)
    probes = emulator.calls[before:]

    assert len(probes) <= (time.monotonic() - started) / interval_s + 1
    assert max(events for _, events, _ in probes) <= 50
    app.take_credentials({"api_secret": "right"})
    await until(lambda: app.backlog.events == 0, "the delivery", 20)
    assert {event["properties"]["$insert_id"] for event in emulator.events()} == {e["id"] for e in batch(1000)}
    balanced(app)


# -- the API -----------------------------------------------------------------------------------------------------------


async def test_a_credential_by_the_api(daemon, client, emulator):
    """In force at once, never sent back, and the status says that it is gone with the next start."""
    app = await halted(daemon, client)
    given_at = time.monotonic()
    status, answer = await give(client, app, {"api_secret": "right"})
    assert (status, answer) == (200, {"credential": "API secret", "kept": "in memory, until the next start"})

    assert await resumed(app, given_at) < RESUME_S
    told = await ask(client, app)
    assert told["reload"]["credential_from"] == "api"
    assert any("gone with the next start" in warning for warning in told["warnings"])
    assert "right" not in msgspec.json.encode(told["reload"]).decode()
    async with client.get(f"http://{app.config.admin.listen}/api/config") as answer:
        assert (await answer.json())["mixpanel"]["api_secret"] == "********"


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "which credential"),
        ({"token": ""}, "no credential"),
        ({"service_account": "a"}, "service_secret"),
        ({"service_account": "a", "service_secret": "b", "project_id": "seven"}, "project_id"),
        ({"tokn": "x"}, "tokn"),
        ({"token": 7}, "token"),
        ({"token": "a\nb"}, "printable"),
        ([], "a list"),
    ],
)
async def test_a_credential_that_cannot_be(daemon, client, body, word):
    """400 with the reason; what is in force stays in force, and nothing that was sent comes back."""
    app = await daemon()
    before = app.transport.target
    status, answer = await give(client, app, body)

    assert status == 400
    assert word in answer["error"]
    assert app.transport.target == before
    assert app.given == {}


async def test_a_credential_without_effect_is_refused(daemon, client):
    """An API secret beside a service account would be passed over: it is told, and how to mean it."""
    account = {"service_account": "a", "service_secret": "b", "project_id": "7"}
    app = await daemon()
    assert (await give(client, app, account))[1]["credential"] == "service account"
    status, answer = await give(client, app, {"api_secret": "s"})
    assert (status, '"service_account": ""' in answer["hint"]) == (400, True)

    assert (await give(client, app, {"api_secret": "s", "service_account": ""}))[1]["credential"] == "API secret"
    assert (await give(client, app, account))[1]["credential"] == "service account"


async def test_what_the_api_gave_outlives_a_reload_that_says_nothing_new(daemon, client, config, emulator):
    """A SIGHUP for something else doesn't bring the bad credential back; a new one in the configuration does its work."""
    app = await halted(daemon, client)
    await give(client, app, {"api_secret": "right"})
    await until(lambda: app.backlog.events == 0, "the delivery")
    said = app._configured
    app.reload(lambda: replaced(said, ("delivery", "timeout"), 7.0))
    assert app.transport.target.credentials.api_secret == "right"
    assert app.given == {"api_secret": "right"}
    assert app.config.delivery.timeout == 7.0

    app.reload(lambda: replaced(said, ("mixpanel", "api_secret"), "newest"))
    assert app.transport.target.credentials.api_secret == "newest"
    assert app.given == {}


# -- the token inside events -------------------------------------------------------------------------------------------


async def test_new_events_carry_the_new_token_and_old_ones_keep_theirs(daemon, client, emulator):
    """What is on disk is frozen; what comes afterwards has the new token. Both arrive: the credential names the project."""
    app = await halted(daemon, client, 3)
    app.take_credentials({"token": "new-token", "api_secret": "right"})
    await post(client, app, batch(3, 100))
    await until(lambda: app.backlog.events == 0, "the delivery")

    assert {emulator.tokens[event["id"]] for event in batch(3)} == {"example-token"}
    assert {emulator.tokens[event["id"]] for event in batch(3, 100)} == {"new-token"}
    assert len(emulator.events()) == 6


async def test_events_refused_for_their_old_token_are_replayed_with_the_new_one(daemon, client, emulator):
    """If Mixpanel should refuse the old token in an event: a dead letter, and a replay gives it the token of the moment.
    Nothing else in it changes, so that a repetition is still known as one.
    """
    app = await halted(daemon, client, 3)
    emulator.credentials(token="new-token", api_secret="right")
    app.take_credentials({"token": "new-token", "api_secret": "right"})
    await until(lambda: app.spool.accounts.total("dead_lettered") == 3, "the refusal")
    url = f"http://{app.config.admin.listen}/api/dead-letters/replay"
    async with client.post(url, json={"all": True}) as answer:
        assert (await answer.json())["replayed"] == 3
    await until(lambda: app.spool.accounts.total("delivered") == 3, "the delivery")

    balanced(app)
    assert {event["properties"]["$insert_id"] for event in emulator.events()} == {event["id"] for event in batch(3)}


@pytest.mark.parametrize("line", [
    b'{"event":"a","properties":{"token":"old","time":1700000000,"$insert_id":"i","x":1e400,"y":1.10,"z":{"token":"old"}}}',
    b'{"event":"a","properties":{"time":1700000000,"$insert_id":"i","token":"old"}}',
])  # fmt: skip
async def test_only_the_token_is_rewritten(daemon, line):
    """Numbers keep their spelling, nested tokens are not ours, and everything else stays byte for byte."""
    app = await daemon(mixpanel__token="new")

    assert app.intake._with_token(line) == line.replace(b'"token":"old"', b'"token":"new"', 1)
    assert app.intake._with_token(b'{"event":"a","properties":{"time":1}}') == b'{"event":"a","properties":{"time":1}}'
    assert app.intake._with_token(b"no JSON") == b"no JSON"


async def test_a_changed_selection_and_name_are_taken_over(daemon, client, emulator):
    """Event selection and names are those of the configuration at the moment an event comes in."""
    app = await daemon(mixpanel__api_secret="right")
    await post(client, app, batch(1))
    said = app._configured
    said = replaced(said, ("events", "names"), {"users.messages.email.Open": "Mail Read"})
    said = replaced(said, ("events", "exclude"), ("users.messages.email.Click",))
    app.reload(lambda: said)
    await post(client, app, [*batch(1, 1), currents("users.messages.email.Click", seed=2)])
    await until(lambda: app.backlog.events == 0, "the delivery")

    assert sorted(event["event"] for event in emulator.events()) == ["Email Open", "Mail Read"]
    assert app.spool.accounts.total("skipped") == 1
    balanced(app)


# -- what a reload takes over ------------------------------------------------------------------------------------------


def _other(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return type(value)(value + 1)
    if isinstance(value, str):
        return value + "1"
    return (*value, "x") if isinstance(value, tuple) else {"x": "y"}


@pytest.mark.parametrize("key", list(keys()), ids=lambda key: ".".join(key.path))
def test_every_key_is_taken_over_or_wants_a_restart(key):
    """One or the other, by name, and never both: what is in force is what is said to be."""
    new = replaced(Config(), key.path, _other(key.default))
    in_force, changed, restart = reloading.take_over(Config(), new)

    assert sorted(changed + restart) == [".".join(key.path)]
    assert in_force == (new if changed else Config())


@pytest.mark.parametrize("secret", sorted(SECRETS), ids=".".join)
def test_the_file_of_a_secret_needs_a_restart_only_if_the_secret_does(secret):
    """What it holds is in force at once: nobody restarts a daemon for nothing."""
    file = (*secret[:-1], f"{secret[-1]}_file")
    of_secret, of_file = (reloading.take_over(Config(), replaced(Config(), path, "x"))[2] for path in (secret, file))

    assert bool(of_secret) == bool(of_file)


async def test_a_reload_names_what_needs_a_restart(daemon, client):
    """By key, in the status too; it is forgotten when the configuration is as it was."""
    app = await daemon()
    said = app.config
    app.reload(lambda: replaced(replaced(said, ("spool", "max_bytes"), 2**30), ("admin", "token"), "x"))
    assert app.restart_needed == ["spool.max_bytes", "admin.token"]
    assert app.config.spool.max_bytes == said.spool.max_bytes
    assert "a restart is needed for spool.max_bytes, admin.token" in (await ask(client, app))["warnings"]

    app.reload(lambda: said)
    assert app.restart_needed == []


@pytest.mark.parametrize("export", ["true", "false"])
async def test_what_is_exported_waits_for_the_restart(daemon, client, importing, export):
    """Only the start opens what takes events and delivers them: until then nothing says that it does, or doesn't."""
    app = await daemon(**importing, mixpanel__export=export)
    said = replaced(app.config, ("mixpanel", "export"), export == "false")
    app.reload(lambda: replaced(said, ("delivery", "timeout"), 7.0))

    assert app.reload_problem == ""
    assert app.restart_needed == ["mixpanel.export"]
    assert app.config.mixpanel.export is (export == "true")
    assert app.config.delivery.timeout == 7.0
    assert "a restart is needed for mixpanel.export" in (await ask(client, app))["warnings"]
    async with client.get(f"http://{app.config.admin.listen}/metrics") as response:
        assert f"bridged_export {float(export == 'true')}" in (await response.text()).splitlines()
    app.hurry.set()


async def test_what_still_runs_keeps_its_credential(daemon, client, importing):
    """Whoever switches the export off and takes its credential away at once would stop a delivery that goes on until the
    restart; so would whoever does it in two steps. One that had none anyway isn't in the way of anything.
    """
    app = await daemon(**importing)
    off = replaced(app.config, ("mixpanel", "export"), False)
    app.reload(lambda: replaced(off, ("mixpanel", "token"), ""))
    assert "no credential" in app.reload_problem
    app.reload(lambda: off)
    assert app.reload_problem == ""
    app.reload(lambda: replaced(off, ("mixpanel", "token"), ""))
    assert "no credential" in app.reload_problem
    assert app.config.mixpanel.token == "example-token"


async def test_what_never_had_a_credential_needs_none(daemon, client, importing):
    """An export that waits for its credential can be switched off without one, and read again."""
    app = await daemon(**importing, mixpanel__token="")
    for _ in range(2):
        app.reload(lambda: replaced(app.config, ("mixpanel", "export"), False))
        assert app.reload_problem == ""
        assert app.restart_needed == ["mixpanel.export"]


async def test_a_token_stays_while_its_door_is_open_to_others(daemon, client, importing):
    """What takes effect at once must fit what needs a restart: a door to other machines isn't left without its token."""
    port = free_port()
    app = await daemon(
        **importing, sources__http__listen=f"0.0.0.0:{port}", sources__http__bearer_token="example-bearer"
    )
    said = replaced(app.config, ("sources", "http", "listen"), f"127.0.0.1:{port}")
    app.reload(lambda: replaced(said, ("sources", "http", "bearer_token"), ""))

    assert "sources.http.bearer_token" in app.reload_problem
    assert "until a restart" in app.reload_problem
    assert app.config.sources.http.bearer_token == "example-bearer"
    app.reload(lambda: said)
    assert (app.reload_problem, app.restart_needed) == ("", ["sources.http.listen"])


async def test_ceilings_and_retention_change_while_it_runs(daemon, client, emulator, tmp_path):
    """The pace, the timeout, the age and the archive's place are those of the last configuration."""
    app = await halted(daemon, client, retention__on_expiry="keep", retention__max_age="1ms")
    said = app.config
    for path, value in (
        (("delivery", "max_events_per_second"), 1000.0),
        (("delivery", "max_concurrency"), 2),
        (("delivery", "timeout"), 3.0),
        (("retention", "on_expiry"), "archive"),
        (("retention", "archive_path"), str(tmp_path / "elsewhere")),
    ):
        said = replaced(said, path, value)
    app.reload(lambda: said)

    assert app.delivery.pace.events_per_second_limit == pytest.approx(970)
    assert app.delivery.pace.concurrency_limit == 2
    assert app.transport._timeout.total == 3.0
    await until(lambda: app.spool.accounts.total("expired") == 5, "the expiry")
    assert len(list((tmp_path / "elsewhere").glob("*.ndjson.gz"))) == 1


@pytest.mark.parametrize("error", [ConfigError("bad", "mend it"), OSError("gone"), ZeroDivisionError("a bug")])
async def test_a_bad_configuration_changes_nothing_and_says_so(daemon, client, error):
    """In the log, the status and an alarm; the next good one ends that."""
    app = await daemon()
    before, aimed, mapping = app.config, app.transport.target, app.intake._mapping

    def broken():
        raise error

    app.reload(broken)
    assert (app.config, app.transport.target, app.intake._mapping) == (before, aimed, mapping)
    assert (await ask(client, app))["reload"]["problem"] == error.args[0]
    app.reload(lambda: before)
    assert app.reload_problem == ""


# -- files -------------------------------------------------------------------------------------------------------------


def _in_place(file, text):
    file.write_text(text)


def _renamed(file, text):
    beside = file.with_suffix(".new")
    beside.write_text(text)
    beside.replace(file)


def _kubernetes(file, text):
    """`token` -> `..data/token`, `..data` -> a folder with a time; `..data` is swapped by a rename."""
    folder = file.parent
    version = folder / f"..{time.monotonic_ns()}"
    version.mkdir()
    (version / file.name).write_text(text)
    (folder / "..swap").symlink_to(version.name)
    (folder / "..swap").replace(folder / "..data")
    if not file.is_symlink():
        file.unlink(missing_ok=True)
        file.symlink_to(f"..data/{file.name}")


@pytest.mark.parametrize("write", [_in_place, _renamed, _kubernetes])
@pytest.mark.parametrize("how", ["secret_file", "directory"])
async def test_a_changed_file_is_noticed(daemon, client, emulator, tmp_path, monkeypatch, write, how):
    """However it is replaced, and whoever names it: delivered soon, without a signal or a restart. (Ten times faster than
    in earnest; the test of the process keeps to the real times.)
    """
    monkeypatch.setattr(reloading, "_LOOK_S", 0.1)
    monkeypatch.setattr(delivery, "_EARLY_PROBE_S", 0.2)
    folder = tmp_path / "secrets"
    folder.mkdir()
    file = folder / ("secret" if how == "secret_file" else "mixpanel_api_secret")
    write(file, "wrong\n")
    environ = {f"BRIDGED__{name.upper()}": value for name, value in {
        "mixpanel__url": emulator.url,
        "spool__path": str(tmp_path / "spool.db"),
        "sources__http__listen": f"127.0.0.1:{free_port()}",
        "sources__stream__listen": "[]",
        "admin__listen": "",
        "delivery__probe_interval": "1h",
        "delivery__flush_interval": "0s",
    }.items()}  # fmt: skip
    if how == "secret_file":
        environ["BRIDGED__MIXPANEL__API_SECRET_FILE"] = str(file)
    else:
        environ["CREDENTIALS_DIRECTORY"] = str(folder)
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    async with App(load(None, environ)) as app:
        read_again = lambda: app.reload(lambda: load(None, environ), asked=False)  # noqa: E731  # short
        watching = asyncio.create_task(app.watch_secrets(read_again))
        await post(client, app, batch(5))
        await until(lambda: app.delivery.halted is not None, "the halt")
        await asyncio.sleep(0.4)  # the first look
        before = len(emulator.calls)
        write(file, "right\n")
        took_s = await resumed(app, time.monotonic())
        watching.cancel()

    assert took_s < RESUME_S
    assert len(emulator.calls) == before + 1


async def test_a_file_that_is_lost_or_empty_changes_nothing(tmp_path, monkeypatch):
    """One look in a second: what is half written isn't taken, a lost file is a change like any other, a pipe is left alone."""
    monkeypatch.setattr(reloading, "_LOOK_S", 0.05)
    file, calls = tmp_path / "token", []
    file.write_text("a")
    watching = asyncio.create_task(reloading.watch(lambda: [file, tmp_path / "none"], lambda: calls.append(1)))
    await until(lambda: len(calls) == 1, "the first look")
    file.touch()
    await asyncio.sleep(0.3)
    assert len(calls) == 1
    file.unlink()
    await until(lambda: len(calls) == 2, "the loss")
    file.write_text("b")
    await until(lambda: len(calls) == 3, "the new one")
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching


async def test_one_reading_at_a_time(monkeypatch):
    """Whoever asks meanwhile gets one more, all together; the last one wins; one that never ends is given up and told."""
    monkeypatch.setattr(reloading, "_READ_S", 0.2)
    began, ends, taken = [], threading.Event(), []

    def read():
        began.append(ends.wait(20 * SLOW))
        return Config()

    def take(said, _certificates, *, asked):
        try:
            taken.append((said(), asked))
        except ConfigError as error:
            taken.append((str(error), asked))

    rereading = reloading.Rereading(read, dict, take)
    reading = asyncio.create_task(rereading.run())
    rereading.want()
    await until(lambda: taken, "the end of its patience")
    assert "couldn't be read within 0.2 s" in taken[0][0]
    assert "pipe" in taken[0][0]
    assert began == []
    monkeypatch.setattr(reloading, "_READ_S", 20 * SLOW)
    rereading.want(asked=False)
    await asyncio.sleep(0.1)
    for asked in (True, False, False):
        rereading.want(asked=asked)
    await asyncio.sleep(0.1)
    assert len(taken) == 1
    ends.set()
    await until(lambda: len(taken) == 3, "the others")
    await asyncio.sleep(0.1)
    reading.cancel()

    assert taken[1:] == [(Config(), False), (Config(), True)]
    assert len(began) == 3


def test_where_secrets_come_from(tmp_path):
    """A key's own file goes before systemd's credential, there or not."""
    environ = {"BRIDGED__MIXPANEL__TOKEN": "x", "CREDENTIALS_DIRECTORY": str(tmp_path)}
    file = tmp_path / "s"
    file.write_text("s")
    config = load(None, environ | {"BRIDGED__MIXPANEL__API_SECRET_FILE": str(file)})
    found = secret_files(config, environ)

    assert file in found
    assert tmp_path / "mixpanel_api_secret" not in found
    assert tmp_path / "mixpanel_token" in found
    assert value_at(config, ("mixpanel", "api_secret")) == "s"


async def test_the_process_notices_a_file_and_a_signal(tmp_path, emulator):
    """As `bridged run`: a rotated file, then a changed configuration with SIGHUP, then one that is broken; all in one life."""
    process = Process(tmp_path, emulator.url)
    secret, toml = tmp_path / "secret", tmp_path / "config.toml"
    secret.write_text("wrong")
    toml.write_text(f'[mixpanel]\napi_secret_file = "{secret}"\n')
    await process.start("--config", str(toml), delivery__probe_interval="1h")
    try:
        await process.ready()
        assert await process.post(batch(5)) == 200
        await until(lambda: "delivery_halted" in process.said(), "the halt")
        secret.write_text("right")
        await until(lambda: process.waiting() == 0, "the delivery", RESUME_S)

        emulator.credentials(api_secret="third")
        assert await process.post(batch(5, 10)) == 200
        await until(lambda: process.said().count('"delivery_halted"') == 2, "the second halt")
        toml.write_text('[mixpanel]\napi_secret = "third"\n[spool]\nmax_dead_letters = 7\n')
        process.process.send_signal(signal.SIGHUP)
        await until(lambda: process.waiting() == 0, "the delivery", RESUME_S)
        assert '"restart_needed_for": ["spool.max_dead_letters"]' in process.said()

        toml.write_text("[mixpanel]\ntokn = 1\n")
        process.process.send_signal(signal.SIGHUP)
        await until(lambda: "reload_failed" in process.said(), "the word")
        assert await process.post(batch(1, 20)) == 200
        await until(lambda: process.waiting() == 0, "the delivery")
        assert await process.end() == 0
    finally:
        if process.process.returncode is None:
            process.process.kill()
            await process.process.wait()
    for word in ("wrong", "right", "third"):
        assert f'"{word}"' not in process.said()


async def test_a_credential_dies_in_the_middle_of_traffic(daemon, client, emulator):
    """Twenty requests in flight are refused at once: none is lost, one probe at a time asks, and all arrive exactly once."""
    app = await daemon(mixpanel__api_secret="right", delivery__max_batch_events="20", delivery__probe_interval="1h")
    emulator.script([{"delay_s": 0.05}])
    posting = asyncio.create_task(post(client, app, batch(1000)))
    await until(lambda: len(emulator.calls) > 3, "some requests")
    emulator.credentials(api_secret="next")
    await until(lambda: app.delivery.halted is not None, "the halt")
    await posting
    await until(lambda: app.delivery.in_flight == 0, "the last answers")
    calls = len(emulator.calls)
    app.reload(lambda: replaced(app._configured, ("mixpanel", "api_secret"), "next"))
    await until(lambda: app.backlog.events == 0, "the delivery", 20)

    assert len(emulator.calls) > calls
    assert emulator.summary().duplicates == 0
    assert len(emulator.events()) == 1000
    balanced(app)


async def test_what_an_old_address_says_later_holds_nobody_up(daemon, client, emulator):
    """Its answer, with a Retry-After of ten minutes, was under way when the address was changed: the new one never said so."""
    async with MixpanelEmulator(EmulatorConfig(port=0)) as other:
        app = await daemon(mixpanel__url=other.url, mixpanel__api_secret="right")
        other.script([{"status": 503, "headers": {"Retry-After": "600"}, "delay_s": 0.5}])
        await post(client, app, batch(5))
        await until(lambda: app.delivery.in_flight, "the request")
        app.reload(lambda: replaced(app._configured, ("mixpanel", "url"), emulator.url))
        await until(lambda: app.backlog.events == 0, "the delivery")

    assert len(emulator.events()) == 5


async def test_no_reload_comes_too_late_or_too_early(config):
    """A reload while the daemon closes doesn't raise."""
    app = App(config())
    async with app:
        said = app.config
    app.reload(lambda: replaced(said, ("mixpanel", "token"), "other"))
    assert isinstance(app.config, Config)
