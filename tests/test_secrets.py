"""Secrets stay inside: canaries in every place that holds one, everything made to go wrong, and every output searched.

The Mixpanel of these tests is the worst there could be: it quotes the credential in all that it says.
"""

import asyncio
import base64
import contextlib
import json
import os
import sqlite3
import sys
from urllib.parse import quote

import aiohttp
import msgspec
import pytest
from conftest import SLOW, currents, ndjson, until

from bench import restart
from bridged import cli, config, redaction
from bridged.admin.status import Status
from bridged.commands import config as config_command

# With characters that JSON, Python, URLs and headers write in ways of their own.
CANARIES = {
    "sources__http__bearer_token": "canary-bearer/7'f+3a",
    "admin__token": "canary-admin/7'f+3a==",
    "mixpanel__token": "canary-project/7'f+3a",
    "mixpanel__api_secret": "canary-api/7'f+3a",
    "mixpanel__service_secret": 'canary-service/7"f\\3a',
}
ACCOUNT = "robot.account"


def basic(user, password):
    """As Basic authentication writes it."""
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def found(output):
    """The canaries in an output, in any form."""
    text = output if isinstance(output, str) else output.decode("utf-8", "replace")
    singing = []
    for name, secret in CANARIES.items():
        forms = {secret, quote(secret, safe=""), quote(secret), json.dumps(secret)[1:-1], repr(secret)[1:-1]}
        forms |= {basic(ACCOUNT, secret), basic(secret, ""), base64.b64encode(secret.encode()).decode().rstrip("=")}
        singing += [f"{name} as {form}" for form in forms if form in text]
    return singing + (["something with `canary-`"] if "canary-" in text else [])


@pytest.mark.parametrize("word", ["mixpanel", "accepted", "delivering"])
async def test_a_secret_that_is_a_word_of_ours(daemon, client, word):
    """It hides nothing, and masked it would take the names along by which the page and the commands know an answer."""
    app = await daemon(sources__http__bearer_token=word)
    status = f"http://{app.config.admin.listen}/api/status"
    settings = f"http://{app.config.admin.listen}/api/settings"
    async with client.get(status) as got:
        msgspec.json.decode(await got.read(), type=Status)
    async with client.get(settings) as got:
        assert "mixpanel.url" in [key["key"] for key in (await got.json())["keys"]]


@pytest.fixture(autouse=True)
def _forgotten():
    """What one test hides, the next may say."""
    forms, pattern = dict(redaction._forms), redaction._pattern
    yield
    redaction._forms.clear()
    redaction._forms.update(forms)
    redaction._in_force.clear()
    redaction._pattern = pattern


class Quoting:
    """A Mixpanel that refuses everything, with the request's own secrets in its words."""

    def __init__(self):
        self.heard = set()
        self.script = []  # statuses; the last one stays

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_exc):
        self.server.close()

    async def serve(self, reader, writer):
        """Answers one request a connection."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            credential = head.partition("Authorization: ")[2].partition("\r\n")[0]
            decoded = base64.b64decode(credential.removeprefix("Basic ")).decode()
            self.heard.add(decoded)
            status = self.script.pop(0) if len(self.script) > 1 else self.script[0]
            words = f"{credential} is {decoded} ({decoded.partition(':')[2]}) for {CANARIES['mixpanel__token']}"
            failed = [{"index": 0, "insert_id": "", "field": words, "message": words}]
            said = {"code": status, "error": words, "status": words} | (
                {"failed_records": failed} if status == 400 else {}
            )
            body = json.dumps(said).encode()
            if status == 502:
                body = f"<html>{words}</html>".encode()
            writer.write(b"HTTP/1.1 %d %s\r\nContent-Length: %d\r\n" % (status, words.encode(), len(body)))
            writer.write(b"Content-Type: application/json\r\nConnection: close\r\n\r\n" + body)
            await writer.drain()
        writer.close()


async def raw(port, sent):
    """What a listener answers to bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer), contextlib.suppress(OSError):
        writer.write(sent)
        writer.write_eof()
        return await asyncio.wait_for(reader.read(), 20 * SLOW)
    return b""


async def command(manager, *argv, **changes):
    """A command against the daemon's configuration: everything that it prints."""
    variables = {f"BRIDGED__{key.upper()}": value for key, value in (manager.settings | changes).items()}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bridged", *argv),
        cwd=manager.folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(restart.PROJECT), **variables},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    return (await process.communicate())[0], process.returncode


async def answers(manager):
    """What the admin side says, to those who may ask and to those who may not."""
    base = f"http://127.0.0.1:{manager.ports['admin']}"
    token = CANARIES["admin__token"]
    got = {}
    async with aiohttp.ClientSession() as client:
        for path in (
            *("/healthz", "/readyz", "/metrics", "/api/status", "/api/config", "/api/dead-letters", "/nowhere"),
            *("/api/dead-letters/groups", "/api/dead-letters/1", f"/api/dead-letters?limit={quote(token)}"),
            *(f"/api/dead-letters?{quote(token)}=1", f"/{quote(token)}"),
        ):
            for credential in (token, f"{token}x", ""):
                async with client.get(base + path, headers={"Authorization": f"Bearer {credential}"}) as answer:
                    assert answer.status in ((200, 400, 404, 503) if credential == token else (200, 401))
                    got[f"{path} with {credential!r}"] = f"{answer.headers}\n{await answer.text()}"
        async with client.post(
            f"{base}/api/dead-letters/purge", json={token: 1}, headers={"Authorization": f"Bearer {token}"}
        ) as answer:
            got["a purge of nonsense"] = await answer.text()
    return got


async def test_no_canary_sings(tmp_path_factory):
    """Through refusals of every kind, malformed requests, commands, and the end of the process for a broken spool."""
    folder = tmp_path_factory.mktemp("d")
    outputs = {}
    async with Quoting() as mixpanel:
        mixpanel.script = [400]
        settings = CANARIES | {
            "mixpanel__service_account": ACCOUNT,
            "mixpanel__project_id": "7",
            "delivery__probe_interval": "100ms",
            "log__level": "debug",
        }
        async with restart.Manager(folder, mixpanel.url, **settings) as manager:
            await manager.start()
            await manager.hears("READY=1")
            bearer = CANARIES["sources__http__bearer_token"]
            event = currents()
            event["user"]["external_user_id"] = "ada"
            async with aiohttp.ClientSession() as client:
                for credential, expected in ((f"{bearer}x", 401), (bearer, 200)):
                    async with client.post(
                        f"http://127.0.0.1:{manager.ports['http']}/v1/currents",
                        json={"events": [event, {"id": "odd"}]},
                        headers={"Authorization": f"Bearer {credential}"},
                    ) as answer:
                        assert answer.status == expected
                        outputs[f"the HTTP door, {expected}"] = await answer.text()
                await until(lambda: "events_rejected" in manager.log(), "the dead letter of a 400")
                mixpanel.script = [502, 401]
                async with client.post(
                    f"http://127.0.0.1:{manager.ports['http']}/v1/currents",
                    json={"events": [event]},
                    headers={"Authorization": f"Bearer {bearer}"},
                ) as answer:
                    assert answer.status == 200
            await until(
                lambda: "delivery_impeded" in manager.log() and "delivery_halted" in manager.log(), "a halt", 60
            )
            for door, name in (("http", "sources__http__bearer_token"), ("admin", "admin__token")):
                secret = CANARIES[name].encode()
                for sent in (
                    b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\0\r\n\r\n",
                    b"GET / HTTP/1.1\r\nHost: x\r\nBearer %s\r\n\r\n",
                    b"GET /%s HTTP/9.x\r\n\r\n",
                    b"%s\r\n\r\n",
                    b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 20_000 + b"%s\r\n\r\n",
                    b"POST /v1/currents HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: 9\r\n\r\n[",
                    b"POST /v1/currents HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%s\r\n",
                ):
                    answer = await raw(manager.ports[door], sent % secret)
                    if door == "admin":
                        outputs[f"{sent[:60]!r} at {door}"] = answer
            outputs["the stream door"] = await raw(
                manager.ports["stream"], b'{"acks":true}\n' + ndjson([{"id": secret} for secret in CANARIES.values()])
            )
            said = await answers(manager)
            assert any(redaction.MASK in text for text in said.values())
            outputs |= said
            commands = [
                "status",
                "status --json",
                "config",
                "check",
                "check --online",
                "dead-letters list",
                "dead-letters show 1",
            ]
            printed = await asyncio.gather(*[command(manager, *words.split()) for words in commands])
            outputs |= {words: text for words, (text, _) in zip(commands, printed, strict=True)}
            assert b"Mixpanel refuses us" in outputs["check --online"]
            for key, value in (
                ("admin__tls_cert", "x"),
                ("mixpanel__project_id", CANARIES["mixpanel__service_secret"]),
            ):
                outputs[f"a bad {key}"], code = await command(manager, "check", **{key: value})
                assert code == 78
            with contextlib.closing(sqlite3.connect(folder / "spool.db")) as db:
                text = CANARIES["mixpanel__token"].replace("'", "''")
                db.execute(f"CREATE TRIGGER no BEFORE INSERT ON segments BEGIN SELECT RAISE(ABORT, '{text}'); END")
            outputs["a broken spool"] = await raw(
                manager.ports["http"],
                b"POST /v1/currents HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s"
                % (bearer.encode(), len(msgspec.json.encode([event])), msgspec.json.encode([event])),
            )
            assert await asyncio.wait_for(manager.process.wait(), 30 * SLOW) == 74
            outputs["the log"] = manager.log()
            outputs["what systemd was told"] = str(manager.told)

    # What was to be hidden was really there to be said.
    assert f"{ACCOUNT}:{CANARIES['mixpanel__service_secret']}" in mixpanel.heard
    assert redaction.MASK in outputs["the log"]
    assert {name: found(output) for name, output in outputs.items() if found(output)} == {}


def test_the_search_finds_what_it_looks_for():
    """The test above can fail: each canary is found in each of its forms."""
    for secret in CANARIES.values():
        assert found(f"x{secret}x")
        assert found(f"Basic {basic(ACCOUNT, secret)}")
        assert found(quote(secret, safe=""))
    assert not found(redaction.MASK)


def test_a_crash_keeps_secrets(monkeypatch, capsys):
    """A bug ends a command with exit code 1 and its traceback, in which a secret is masked."""
    for key, value in CANARIES.items():
        monkeypatch.setenv(f"BRIDGED__{key.upper()}", value)
    config.load(None)

    def bug(_arguments):
        raise RuntimeError(f"with {CANARIES}")

    monkeypatch.setattr(config_command, "main", bug)
    assert cli.main(["config"]) == 1
    output = capsys.readouterr()
    assert "RuntimeError: with" in output.err
    assert "test_secrets.py" in output.err
    assert not found(output.err + output.out)


def test_short_secrets_are_no_words():
    """A secret of a few letters isn't masked: half of every sentence would be."""
    redaction.hide(["and", "", "x" * redaction.MIN_CHARACTERS])

    assert redaction.redacted("sand and xxxxxxxx") == f"sand and {redaction.MASK}"


def test_the_longest_is_masked_first():
    """One secret may be the beginning of another."""
    redaction.hide(["0123456789", "0123456789abcdef"])

    assert redaction.redacted("0123456789abcdef 0123456789") == f"{redaction.MASK} {redaction.MASK}"
    assert redaction.redacted_bytes(b"\xff0123456789") == b"\xff" + redaction.MASK.encode()


def test_secrets_that_change_all_the_time():
    """A credential that is rotated hourly, for weeks: the newest are masked, what is said doesn't become slow, and a
    configuration that names nothing new costs nothing.
    """
    always = {"BRIDGED__ADMIN__TOKEN": "the-token-that-stays"}
    redaction.hide(["the-one-in-force"], in_force=True)
    redaction.hide(
        f"an-earlier-secret-{n:03}" for n in range(redaction.MOST)
    )  # at once: each new pattern takes a while
    for n in range(60):
        config.load(None, always | {"BRIDGED__MIXPANEL__TOKEN": f"the-token-number-{n:03}"})
    for secret in ("the-token-number-059", "the-token-that-stays", "the-one-in-force"):
        assert redaction.redacted(secret) == redaction.MASK
    assert len(redaction._forms) <= redaction.MOST

    compiled = redaction._pattern
    config.load(None, always | {"BRIDGED__MIXPANEL__TOKEN": "the-token-number-059"})
    assert redaction._pattern is compiled


def test_an_old_secret_is_still_one():
    """After a reload with another one, nobody shall read the first."""
    config.load(None, {"BRIDGED__MIXPANEL__TOKEN": "the-first-token"})
    config.load(None, {"BRIDGED__MIXPANEL__TOKEN": "the-second-token"})

    assert redaction.redacted("the-first-token the-second-token") == f"{redaction.MASK} {redaction.MASK}"
