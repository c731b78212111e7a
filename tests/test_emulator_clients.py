"""The unmodified official clients against the emulator: if they are content, it speaks the dialect."""

import asyncio
import json
import os
import shutil
import time
from collections import Counter
from pathlib import Path

import mixpanel as official
import pytest

from bridged.emulator.mixpanel import EmulatorConfig, MixpanelEmulator

TOKEN = "0123456789abcdef"
NODE = Path(__file__).parent / "clients" / "node"
OUTSIDE = dict(os.environ)  # npm may need a proxy
LOCAL = {key: value for key, value in OUTSIDE.items() if not key.lower().endswith("_proxy")}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    """The clients honour proxies from the environment; loopback needs none."""
    for key in os.environ.keys() - LOCAL.keys():
        monkeypatch.delenv(key)


@pytest.fixture
async def emulator():
    """An emulator that knows its project."""
    config = EmulatorConfig(port=0, token=TOKEN, service_account="account", service_secret="secret", project_id="42")
    async with MixpanelEmulator(config) as emulator:
        yield emulator


def urls(emulator):
    """Where the Python client shall send."""
    paths = {"events_url": "/track", "people_url": "/engage", "groups_url": "/groups", "import_url": "/import"}
    return {name: emulator.url + path for name, path in paths.items()}


def account(secret="secret"):
    """The service account that opens the project."""
    return official.ServiceAccountCredentials("account", secret, "42")


async def test_python_client_tracks_and_updates_profiles(emulator):
    """track, people_set and group_set of the Python client succeed and arrive."""

    def send():
        with official.Mixpanel(TOKEN, consumer=official.Consumer(**urls(emulator))) as client:
            client.track("user-1", "py track", {"note": "é+&="})
            client.people_set("user-1", {"name": "Ada"})
            client.people_append("user-1", {"tags": "new"})
            client.group_set("company", "acme", {"plan": "free"})

    await asyncio.to_thread(send)

    (event,) = emulator.events()
    assert (event["event"], event["properties"]["note"]) == ("py track", "é+&=")
    assert "token" not in event["properties"]
    assert [update.get("$set") for update in emulator.profile_updates()] == [{"name": "Ada"}, None, {"plan": "free"}]
    assert emulator.summary().events_without_ip == 0


async def test_python_client_imports(emulator):
    """import_data with a service account stores the event; with a wrong one the client notices nothing, and nothing comes."""

    def send(secret):
        consumer = official.Consumer(**urls(emulator), credentials=account(secret))
        with official.Mixpanel(TOKEN, consumer=consumer) as client:
            client.import_data(None, "user-1", "py import", int(time.time()) - 86400 * 30, {"note": secret})

    await asyncio.to_thread(send, "secret")
    await asyncio.to_thread(send, "wrong")

    assert [event["properties"]["note"] for event in emulator.events()] == ["secret"]
    assert emulator.summary().dropped == 1


async def test_a_time_with_a_fraction_is_a_time(emulator):
    """The Python client's are floats: such an event has its own day, and is recognised when it is sent again."""

    def send():
        consumer = official.Consumer(**urls(emulator), credentials=account())
        with official.Mixpanel(TOKEN, consumer=consumer) as client:
            for _ in range(2):
                client.import_data(None, "user-1", "py import", 1_700_000_000.5, {"$insert_id": "same"})

    await asyncio.to_thread(send)

    (event,) = emulator.events()
    assert event["properties"]["time"] == 1_700_000_000.5
    assert emulator.summary().duplicates == 1


async def test_python_client_reads_our_refusals(emulator):
    """Validation, rate limits and HTML reach the client's user as its exception, with our words in it."""

    def send(moment):
        consumer = official.Consumer(**urls(emulator), credentials=account())
        with official.Mixpanel(TOKEN, consumer=consumer) as client:
            client.import_data(None, "user-1", "py import", moment)

    with pytest.raises(official.MixpanelException, match="must not be before 1971-01-01"):
        await asyncio.to_thread(send, 5)
    emulator.script([{"status": 429, "body": {"error": "slow down", "status": 0}, "times": 1}, {"action": "html"}])
    with pytest.raises(official.MixpanelException, match="slow down"):
        await asyncio.to_thread(send, 1_700_000_000)
    with pytest.raises(official.MixpanelException, match="Cannot interpret"):
        await asyncio.to_thread(send, 1_700_000_000)


async def test_python_buffered_consumer(emulator):
    """BufferedConsumer's batches of 50 arrive whole, on every endpoint."""

    def send():
        consumer = official.BufferedConsumer(**urls(emulator), credentials=account())
        with official.Mixpanel(TOKEN, consumer=consumer) as client:
            for number in range(120):
                client.track(f"user-{number}", "py buffered")
                client.import_data(None, f"user-{number}", "py imported", 1_700_000_000 + number)
                client.people_set(f"user-{number}", {"number": number})
            consumer.flush()

    await asyncio.to_thread(send)

    summary = emulator.summary()
    assert summary.events == {"py buffered": 120, "py imported": 120}
    assert (summary.profile_updates, summary.max_batch, summary.answers) == (120, 50, {"200": 9})


async def run(*command, folder, env):
    """What a command prints; it must succeed."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=folder, env=env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await asyncio.wait_for(process.communicate(), 180)
    assert process.returncode == 0, (output + errors).decode()
    return output


async def test_node_client(emulator, tmp_path):
    """Every call of the Node client gets the answer it understands, and what it sent has arrived, odd base64 included."""
    assert shutil.which("npm"), "this test needs Node.js and npm"
    for name in ("package.json", "send.js"):
        shutil.copy(NODE / name, tmp_path)
    await run("npm", "install", "--no-audit", "--no-fund", "--no-package-lock", folder=tmp_path, env=OUTSIDE)
    # Over plain HTTP this client sends its old API key instead of a credential, which only an open project bears.
    emulator.credentials(token="", service_account="")

    told = json.loads(await run("node", "send.js", emulator.url.rsplit(":", 1)[1], TOKEN, folder=tmp_path, env=LOCAL))

    bad = told.pop("import_bad")
    assert bad == "Mixpanel Server Error: 'properties.time' is invalid: must not be before 1971-01-01"
    assert told == dict.fromkeys(told)
    events = emulator.events()
    assert Counter(event["event"] for event in events) == {
        "node track": 2,
        "node foreign": 1,
        "node track_batch": 3,
        "node import": 1,
        "node batch": 120,
    }
    assert {event["properties"].get("awkward") for event in events} == {">>>???~~~ÿÿÿ", None}
    assert len(emulator.profile_updates()) == 3
