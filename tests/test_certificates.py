"""Certificates of our own that end, or have ended: told before and after, and the commands work on."""

import asyncio
import os
import signal
import ssl
import time
from datetime import UTC, datetime, timedelta

import pytest
import structlog
import trustme
from conftest import until
from test_admin_door import certificate  # noqa: F401  # a fixture
from test_cli import _Configured, bridged  # noqa: F401  # a fixture
from test_lifecycle import Process

from bridged import certificates, cli
from bridged.certificates import Validity
from bridged.commands.client import Daemon
from bridged.settings import Config

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
ENDED = {"not_before": NOW - 90 * DAY, "not_after": NOW - DAY}
ENDING = {"not_before": NOW - 80 * DAY, "not_after": NOW + 10 * DAY}
GOOD = {"not_before": NOW - 80 * DAY, "not_after": NOW + 15 * DAY}
UNBEGUN = {"not_before": NOW + DAY, "not_after": NOW + 90 * DAY}


@pytest.mark.parametrize("years", [(1999, 2001), (2024, 2049), (2049, 2051), (2000, 3000)])
def test_what_is_read_is_what_openssl_reads(tmp_path, years):
    """In both spellings of a time that X.509 has, with whatever stands before and behind it in the file."""
    begins, ends = [datetime(year, 2, 3, 4, 5, 6, tzinfo=UTC) for year in years]
    issued = trustme.CA().issue_cert("bridged.example", not_before=begins, not_after=ends)
    another = trustme.CA().issue_cert("another").cert_chain_pems[0].bytes()
    file, alone = tmp_path / "cert.pem", tmp_path / "alone.pem"
    alone.write_bytes(issued.cert_chain_pems[0].bytes())
    key = issued.private_key_pem.bytes()
    file.write_bytes("für uns\n".encode() + key + issued.cert_chain_pems[0].bytes() + another)
    told = ssl._ssl._test_decode_cert(str(alone))  # ssl has no other way, which is why we have ours

    assert certificates.read(str(file)) == tuple(
        ssl.cert_time_to_seconds(told[name]) for name in ("notBefore", "notAfter")
    )


@pytest.mark.parametrize("der", [b"", b"\x30", b"\x30\x80", bytes(100), b"\x30\x82\x01\x00" * 30, os.urandom(300)])
def test_what_is_no_certificate_says_nothing(tmp_path, der):
    """Whoever loads it tells what is wrong. A pipe isn't touched: it can be read once, by who listens."""
    file, pipe = tmp_path / "cert.pem", tmp_path / "pipe"
    file.write_text(ssl.DER_cert_to_PEM_cert(der))
    os.mkfifo(pipe)
    assert certificates.read(str(file)) is None
    assert certificates.read(str(pipe)) is None
    assert certificates.read(str(tmp_path)) is None
    assert certificates.read(str(tmp_path / "none")) is None


@pytest.mark.parametrize(
    ("life_days", "left_days", "soon"),
    [
        (90, 15, False),
        (90, 13.9, True),
        (90, -1, False),
        (6, 2, False),
        (6, 1.4, True),
        (1, 0.3, False),
        (1, 0.2, True),
    ],
)
def test_when_it_is_soon(life_days, left_days, soon):
    """Two weeks before; of those that live a few days, a quarter of their life: they are renewed as often."""
    now = time.time()
    validity = Validity(now + (left_days - life_days) * 86400, now + left_days * 86400)
    assert bool(validity.ends_soon(now)) is soon
    assert bool(validity.trouble(now)) is (left_days < 0)


@pytest.mark.parametrize(
    ("when", "said"),
    [(ENDED, "has ended on"), (UNBEGUN, "isn't valid before"), (ENDING, "in 10 days: renew it"), (GOOD, "")],
)
async def test_check_says_it(bridged, config, certificate, tmp_path, when, said):  # noqa: F811  # fixtures
    """As a warning, by its key: the daemon starts with it."""
    certificate(**when)
    keys = {f"admin__tls_{name}": str(tmp_path / f"{name}.pem") for name in ("cert", "key")}
    code, out, _ = await bridged(_Configured(config(**keys)), "check")
    assert code == 0
    assert ("warning: admin.tls_cert" in out) is bool(said)
    assert said in out


@pytest.mark.parametrize(
    ("when", "alarm"), [(ENDED, "certificate_ended"), (UNBEGUN, "certificate_ended"), (ENDING, "certificate_ending")]
)
async def test_an_alarm_until_another_is_shown(daemon, certificate, client, tmp_path, when, alarm):  # noqa: F811
    """Commands work on, since it is the certificate that the configuration names; the alarm says what to do, and a renewed
    one that is read at SIGHUP ends it.
    """
    certificate(**when)
    app = await daemon(admin__tls_cert=str(tmp_path / "cert.pem"), admin__tls_key=str(tmp_path / "key.pem"))
    commands = Daemon.admin(app.config)
    await until(lambda: alarm in {one.alarm for one in app.watch.alarms.open}, "the alarm")
    said = await asyncio.to_thread(commands.ask, "/api/status", dict)
    [text] = [one["text"] for one in said["alarms"] if one["alarm"] == alarm]
    assert "admin.tls_cert" in text
    assert "SIGHUP" in text
    metrics = (await asyncio.to_thread(commands.call, "GET", "/metrics")).body.decode()
    [line] = [
        line
        for line in metrics.splitlines()
        if line.startswith('bridged_certificate_ends_timestamp_seconds{listener="admin"}')
    ]
    assert float(line.split()[1]) == int(when["not_after"].timestamp())
    certificate(**GOOD)
    app.reload(lambda: app.config, app.certificates.read_again)
    assert (app.certificates.ended(), app.certificates.ending()) == ("", "")
    # Files that can't be used leave the old one, and what is known of it.
    certificate(**ENDED)
    (tmp_path / "key.pem").write_bytes(b"nonsense")
    app.reload(lambda: app.config, app.certificates.read_again)
    assert app.reload_problem
    assert (app.certificates.ended(), app.certificates.ending()) == ("", "")


@pytest.mark.parametrize("key", ["cert", "key"])
async def test_a_certificate_that_is_a_pipe_by_now(daemon, certificate, tmp_path, key):  # noqa: F811
    """Reading it, or its key, would wait for whoever writes into it: it is refused, in the log, too, and the old one stays."""
    certificate()
    app = await daemon(admin__tls_cert=str(tmp_path / "cert.pem"), admin__tls_key=str(tmp_path / "key.pem"))
    pipe = tmp_path / f"{key}.pem"
    pipe.unlink()
    os.mkfifo(pipe)
    with structlog.testing.capture_logs() as logs:
        app.reload(lambda: app.config, app.certificates.read_again)
    assert f"admin.tls_{key}" in app.reload_problem
    assert [f"admin.tls_{key}" in line["error"] for line in logs if line["event"] == "reload_failed"] == [True]


async def test_the_log_says_it_at_the_start(tmp_path, emulator, certificate):  # noqa: F811
    """And the process runs; `bridged status` by the same configuration does, too."""
    certificate(**ENDED)
    process = Process(tmp_path, emulator.url)
    keys = {f"sources__http__tls_{name}": str(tmp_path / f"{name}.pem") for name in ("cert", "key")}
    await process.start(**keys)
    try:
        await until(lambda: '"ready"' in process.said(), "the start")
        assert '"certificate"' in process.said()
        assert "sources.http.tls_cert has ended on" in process.said()
        settings = tmp_path / "test.toml"
        settings.write_text(
            f"[sources.http]\nlisten = '127.0.0.1:{process.http}'\ntls_cert = '{tmp_path}/cert.pem'\n"
            f"tls_key = '{tmp_path}/key.pem'\n[spool]\npath = '{tmp_path}/other.db'\n"
        )
        send = ["send-test-events", "--config", str(settings), "--types", "users.behaviors.CustomEvent"]
        assert await asyncio.to_thread(cli.main, send) == 0
    finally:
        assert await process.end(signal.SIGTERM) == 0


def test_only_listeners_that_are_open():
    """A certificate of a closed listener is nobody's."""
    assert certificates.listeners(Config()) == {}
