"""What [events] may name: a slip would let personal data out in plain, so no daemon starts or goes on with one."""

import asyncio
import sys

import msgspec
import pytest
from conftest import balanced, currents, until
from test_cli import _Configured, bridged  # noqa: F401  # a fixture
from test_page_settings import put

from bridged import event_rules
from bridged.config import demand_good, load, replaced
from bridged.errors import ConfigError
from bridged.settings import Config, Events

SEND = "users.messages.email.Send"
FAX = "users.messages.fax.Send"
LANDING = "users.messages.landingpage.Click"
CUSTOM = "users.behaviors.CustomEvent"
PURCHASE = "users.behaviors.Purchase"

WRONG = [
    # Misspelt types, in every key.
    (
        {"exclude": ("users.behaviors.Purchas",)},
        f"events.exclude: no event type 'users.behaviors.Purchas'; did you mean '{PURCHASE}'?",
    ),
    (
        {"include": ("users.messages.email.Sned",)},
        f"events.include: no event type 'users.messages.email.Sned'; did you mean '{SEND}'?",
    ),
    ({"names": {"users.messages.email.Sent": "x"}}, f"did you mean '{SEND}'?"),
    ({"transform": {"users.messages.email.Sent": {"email_address": "hash"}}}, "events.transform: no event type"),
    # Misspelt, whatever becomes of unknown types.
    ({"unknown": "forward", "exclude": ("users.message.email.Send",)}, f"did you mean '{SEND}'?"),
    # A type that nobody knows and nothing forwards.
    ({"exclude": (FAX,)}, f"events.exclude: no event type '{FAX}'; if Braze has it, put it into events.include"),
    ({"names": {FAX: "Fax"}}, "events.names: no event type"),
    ({"transform": {FAX: {"number": "hash"}}, "unknown": "skip"}, "events.transform: no event type"),
    # Fields that a type doesn't have, the envelope's among them.
    (
        {"transform": {SEND: {"email_adress": "hash"}}},
        f"events.transform: {SEND}: 'email_adress' is no field of it; did you mean 'email_address'?",
    ),
    *[
        ({"transform": {SEND: {name: "remove"}}}, f"{SEND}: {name!r} is no field of it")
        for name in ("ip", "time", "token", "distinct_id", "$insert_id", "insert_id", "properties.x")
    ],
    *[
        ({"transform": {CUSTOM: {name: "remove"}}}, f"{CUSTOM}: {name!r} is no field of it")
        for name in ("name", "custom", "custom_properties", "ip")
    ],
    ({"transform": {CUSTOM: {"properties.": "remove"}}}, "names no property"),
    ({"transform": {PURCHASE: {"price": "hash"}}}, "'price' is of type float: only text can be hashed"),
    *[
        (
            {"transform": {name: {"external_user_id": "remove"}}, "include": (FAX,)},
            f"{name}: 'external_user_id' can be hashed only",
        )
        for name in (SEND, LANDING, FAX)
    ],
    ({"transform": {LANDING: {"properties.mail": "hash"}}}, "'properties.mail' is written 'mail' here"),
    # Names that Mixpanel would not take, or nobody meant.
    ({"names": {SEND: " "}}, f"events.names: {SEND} has a blank name"),
    ({"names": {SEND: "$merge"}}, f"events.names: {SEND} is called '$merge', for which Mixpanel refuses"),
    ({"names": {SEND: "x" * 256}}, f"events.names: {SEND} has a name of more than 255 characters"),
    *[
        ({"names": {CUSTOM: name}}, f"events.names: {CUSTOM} gets '{name}' before each custom event's name")
        for name in ("Custom", "v2", "$", "$mine: ")
    ],
]
RIGHT = [
    {"include": (FAX, SEND)},
    {"include": (FAX,), "exclude": (FAX,), "names": {FAX: "Fax"}, "transform": {FAX: {"number": "hash"}}},
    {"unknown": "forward", "exclude": (FAX,), "names": {FAX: "Fax"}, "transform": {FAX: {"number": "hash"}}},
    {"transform": {LANDING: {"ip": "hash", "mail": "remove", "external_user_id": "hash", "device_id": "remove"}}},
    {"transform": {CUSTOM: {"properties.mail": "remove", "external_user_id": "hash", "platform": "hash"}}},
    {"transform": {PURCHASE: {"price": "remove", "ad_tracking_enabled": "remove"}}},
    {"names": {CUSTOM: "Custom ", SEND: "Mail", PURCHASE: "$purchase"}},
    {"names": {CUSTOM: "[Mine]"}},
]


@pytest.mark.parametrize(("events", "said"), WRONG)
def test_what_is_wrong_is_told_with_its_key(events, said):
    """A type or a field that isn't there would silently not be left out or hashed: no configuration is good with it."""
    [problem] = event_rules.problems(Events(**events))
    assert said in problem
    with pytest.raises(ConfigError) as caught:
        demand_good(replaced(Config(), ("events",), Events(**events)), complete=False)
    assert problem in str(caught.value)


@pytest.mark.parametrize("events", RIGHT)
def test_what_the_mapping_supports_is_allowed(events):
    """Types that Braze added since may be named: in `include`, or anywhere if they are forwarded."""
    assert list(event_rules.problems(Events(**events))) == []


def test_all_that_is_wrong_is_told():
    """Several slips in one key are several lines: nobody has to start the daemon once for each."""
    events = Events(exclude=("users.behaviors.Purchas", "users.messages.email.Sned"), names={SEND: " ", PURCHASE: ""})
    assert len(list(event_rules.problems(events))) == 4


SLIPS = [
    ('exclude = ["users.behaviors.Purchas"]', "events.exclude: no event type 'users.behaviors.Purchas'"),
    (
        'transform = {"users.messages.email.Sent" = {email_address = "hash"}}',
        "events.transform: no event type 'users.messages.email.Sent'; did you mean 'users.messages.email.Send'?",
    ),
    (
        'transform = {"users.messages.email.Send" = {email_adress = "hash"}}',
        "events.transform: users.messages.email.Send: 'email_adress' is no field of it",
    ),
]


@pytest.mark.parametrize(("line", "said"), SLIPS)
async def test_run_and_check_refuse_in_the_same_words(tmp_path, line, said):
    """`bridged run` used to be ready with a file that `check` calls bad, and sent in plain what should have been hashed."""
    file = tmp_path / "bad.toml"
    file.write_text(f"[mixpanel]\ntoken = 'x'\n[events]\n{line}\n")
    told = []
    for command in ("check", "run"):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bridged", command, "--config", str(file)), stderr=asyncio.subprocess.PIPE
        )
        try:
            _, err = await asyncio.wait_for(process.communicate(), 30)
        finally:
            if process.returncode is None:
                process.kill()
        assert process.returncode == 78
        told.append(err.decode())
    assert told[0] == told[1]
    assert f"{file}: {said}" in told[0]


@pytest.mark.parametrize(("line", "said"), SLIPS)
async def test_a_slip_at_a_reload_keeps_what_is_in_force(daemon, client, emulator, tmp_path, line, said):
    """At SIGHUP, too: the rules in force go on, the reason is told, and nothing leaves in plain meanwhile."""
    app = await daemon(events__transform='{"users.messages.email.Send" = {email_address = "hash"}}')
    before, file = app.config, tmp_path / "bad.toml"
    file.write_text(f"[mixpanel]\ntoken = 'x'\n[events]\n{line}\n")
    app.reload(lambda: load(file))
    assert app.config is before
    assert said in app.reload_problem
    assert app.activity.entries[-1].kind == "reload_failed"
    event = currents(SEND)
    event["properties"]["email_address"] = "ada@example.com"
    await app.intake.accept_lines([msgspec.json.encode(event)])
    await until(lambda: app.backlog.events == 0, "the delivery")
    assert "ada@example.com" not in str(emulator.events())
    balanced(app)


async def test_the_page_tells_all_that_is_wrong_with_a_key(daemon, client):
    """Of several slips in one key the last used to be told alone."""
    app = await daemon()
    status, told = await put(client, app, set={"events.exclude": ["users.behaviors.Purchas", FAX]})
    assert status == 400
    assert "users.behaviors.Purchas" in told["keys"]["events.exclude"]
    assert FAX in told["keys"]["events.exclude"]
    assert (await put(client, app, set={"events.exclude": [FAX], "events.unknown": "forward"}))[0] == 200
    # It can't be taken away from under the other.
    assert (await put(client, app, remove=["events.unknown"]))[0] == 400


async def test_check_warns_of_an_unknown_type_that_is_included(bridged, config):  # noqa: F811  # the fixture
    """It may be Braze's newest, or a slip that looks like nothing: said, and no error."""
    settings = _Configured(config(events__include=f'["{FAX}"]'))
    code, out, _ = await bridged(settings, "check")
    assert code == 0
    assert f"warning: events.include: {FAX} is in no table" in out
