"""`bridged check --online`: what is wrong, in a person's words, and what to do."""

import contextlib
import os
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta

import pytest
import trustme
from conftest import free_port
from structlog.testing import capture_logs
from test_cli import _Configured, bridged  # noqa: F401  # a fixture
from test_wire import Proxy, port

from bridged import connections, foresight, options
from bridged.commands import check
from bridged.delivery import probe
from bridged.emulator.mixpanel import EmulatorConfig, MixpanelEmulator
from bridged.mixpanel import requests
from bridged.mixpanel.verdicts import Retry
from bridged.settings import Config, SpoolSettings

NOW, DAY = datetime.now(UTC), timedelta(days=1)
ACCOUNT = {
    "mixpanel__service_account": "ada",
    "mixpanel__service_secret": "wrong",
    "mixpanel__project_id": "7",
}


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (ACCOUNT, "not Admin or Owner of project 7"),
        ({"mixpanel__api_secret": "wrong"}, "no project of region 'us' has this API secret"),
        ({"mixpanel__token": "wrong"}, "no project of region 'us' has this token"),
    ],
)
async def test_a_wrong_credential(bridged, config, emulator, overrides, word):  # noqa: F811  # the fixture
    """Each kind is wrong in its own way; the secret isn't quoted."""
    emulator.credentials(token="right", api_secret="secret", service_account="ada", service_secret="s", project_id="7")
    code, _, err = await bridged(_Configured(config(**overrides)), "check", "--online")

    assert code == 69
    assert "refuses us, HTTP 401: Mixpanel" in err
    assert word in err
    assert "wrong," not in err.replace("secret is wrong,", "")


async def test_another_region(bridged, config, emulator, monkeypatch):  # noqa: F811  # the fixture
    """The project lives in the EU, the configuration says US: the other hosts are asked, and the right one is named."""
    emulator.credentials(token="elsewhere")
    async with MixpanelEmulator(EmulatorConfig(port=0, token="ours")) as europe:
        for region, url in (("us", emulator.url), ("eu", europe.url), ("in", emulator.url)):
            monkeypatch.setitem(requests.HOSTS, region, url)
        settings = _Configured(config(mixpanel__url="", mixpanel__token="ours"))
        code, _, err = await bridged(settings, "check", "--online")
        assert code == 69
        assert 'set [mixpanel] region = "eu"' in err
        settings = _Configured(config(mixpanel__url="", mixpanel__token="ours", mixpanel__region="eu"))
        assert (await bridged(settings, "check", "--online"))[0] == 0
        assert europe.events() == []


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        ({"retention__archive_path": "/dev/null"}, "retention.archive_path: /dev/null is no folder"),
        ({"retention__archive_path": "/dev/null/archive"}, "retention.archive_path: /dev/null is no folder"),
        ({"braze__url": "", "braze__cluster": "EU01"}, "braze.cluster: 'EU01' is no cluster of Braze's"),
        ({"spool__path": "/dev/null/spool.db"}, "spool.path: /dev/null is no folder"),
        ({"spool__path": "/tmp"}, "spool.path: /tmp is a folder: name a file in it"),
        ({"cohorts__path": "/tmp"}, "cohorts.path: /tmp is a folder: name a file in it"),
        ({"cohorts__path": "/dev/null/c/cohorts.db"}, "cohorts.path: /dev/null is no folder"),
        ({"sources__stream__listen": '["unix:nowhere/s.sock"]'}, "sources.stream.listen: the folder of nowhere/s.sock"),
        ({"sources__stream__listen": '["unix:/tmp"]'}, "sources.stream.listen: /tmp: there is a folder, no socket"),
        ({"sources__stream__listen": f'["unix:/tmp/{"x" * 108}"]'}, "xx: the path of a socket has at most 107 bytes"),
        (
            {"sources__http__tls_cert": "no.pem", "sources__http__tls_key": "no.pem"},
            "[sources.http] tls_cert = 'no.pem'",
        ),
        ({"admin__tls_cert": "/dev/null", "admin__tls_key": "/dev/null"}, "[admin] tls_cert = '/dev/null'"),
    ],
)
async def test_what_cannot_work_is_never_called_good(bridged, config, importing, overrides, word):  # noqa: F811  # the fixture
    """What `run` would end with, or delivery stumble over, is told before anything is summed up."""
    code, out, err = await bridged(_Configured(config(**importing | overrides)), "check")

    assert (code, out) == (78, "")
    assert word in err


async def test_files_that_only_the_service_has_are_taken_on_trust(bridged, config):  # noqa: F811  # the fixture
    """Copies of a certificate that systemd makes are there while the service runs, and `check` comes before its first start."""
    files = {f"sources__http__tls_{name}": f"/run/credentials/bridged.service/tls_{name}" for name in ("cert", "key")}
    code, _, err = await bridged(_Configured(config(**files)), "check")

    assert (code, err) == (0, "")


def test_a_folder_that_may_not_be_looked_at_may_be_one(tmp_path, every_pathlib, an_ordinary_user):
    """The service's is private: whoever checks its configuration as somebody else isn't told that it is none."""
    assert check._may_be_folder(tmp_path / "bridged")
    assert list(check._missing_places(Config(spool=SpoolSettings(path=str(tmp_path / "bridged" / "spool.db"))))) == []


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("https://mixpanel.invalid", "can't find mixpanel.invalid"),
        ("http://127.0.0.1:{port}", "127.0.0.1 can't be connected to: does a firewall"),
        ("https://127.0.0.1:{emulator}", "127.0.0.1 answers, and speaks no TLS: is http:// meant"),
    ],
)
async def test_no_network(bridged, config, emulator, url, word):  # noqa: F811  # the fixture
    """No name, no connection and no TLS are three things to look at."""
    settings = _Configured(config(mixpanel__url=url.format(port=free_port(), emulator=port(emulator))))
    code, _, err = await bridged(settings, "check", "--online")

    assert code == 69
    assert word in err


async def test_a_certificate_of_nobody(bridged, config, emulator):  # noqa: F811  # the fixture
    """A proxy that inspects TLS is the usual reason, and there is a remedy."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    async with Proxy(port(emulator), context=context) as proxy:
        settings = _Configured(config(mixpanel__url=f"https://127.0.0.1:{proxy.port}"))
        code, _, err = await bridged(settings, "check", "--online")

    assert code == 69
    assert "SSL_CERT_FILE" in err


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ((ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1), "127.0.0.1 speaks no TLS that is safe"),
        (None, "127.0.0.1 hangs up when TLS begins"),
    ],
    ids=["old", "closed"],
)
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
async def test_tls_that_does_not_come_about(bridged, config, versions, said):  # noqa: F811  # the fixture
    """An old version is told as one, by a server that says so; of one that only hangs up, that. No firewall stood in the way."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if versions:
        context.set_ciphers("DEFAULT@SECLEVEL=0")
        context.minimum_version, context.maximum_version = versions
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection, contextlib.suppress(ssl.SSLError):
                        if versions:
                            context.wrap_socket(connection, server_side=True)
                        else:
                            connection.recv(9999)

        serving = threading.Thread(target=serve, daemon=True)
        serving.start()
        settings = _Configured(config(mixpanel__url=f"https://127.0.0.1:{listening.getsockname()[1]}"))
        code, _, err = await bridged(settings, "check", "--online")
        listening.shutdown(socket.SHUT_RDWR)
    serving.join(20)

    assert code == 69
    assert said in err
    assert "firewall" not in err
    assert "[None]" not in err


async def test_who_takes_an_event_without_a_name_is_not_mixpanel(bridged, config, emulator):  # noqa: F811  # the fixture
    """Whatever answers 200 to all that comes proves nothing about a credential: an operator would look for his events in vain."""
    emulator.script([{"status": 200, "body": {"code": 200, "num_records_imported": 1, "status": "OK"}}])
    code, out, err = await bridged(_Configured(config()), "check", "--online")

    assert code == 69
    assert "Mixpanel takes" not in out
    assert "what answers isn't Mixpanel: it took an event without a name" in err


async def test_a_region_that_takes_everything_is_not_where_the_project_lives(config, emulator, monkeypatch):
    """The others are asked in the same way, and believed no sooner."""
    emulator.credentials(token="elsewhere")
    async with MixpanelEmulator(EmulatorConfig(port=0)) as anybody:
        anybody.script([{"status": 200, "body": {"code": 200, "num_records_imported": 1, "status": "OK"}}])
        for region, url in (("us", emulator.url), ("eu", anybody.url), ("in", emulator.url)):
            monkeypatch.setitem(requests.HOSTS, region, url)
        found = await probe.probe(options.target(config(mixpanel__url="")))

    assert (found.ok, found.problem, found.region) == (False, "credential", None)


@pytest.mark.parametrize(
    ("time", "said"),
    [
        ({"not_before": NOW - 9 * DAY, "not_after": NOW - DAY}, "has ended by this machine's clock (2"),
        ({"not_before": NOW + DAY, "not_after": NOW + 9 * DAY}, "isn't valid yet by this machine's clock (2"),
    ],
)
async def test_a_certificate_out_of_its_time(bridged, config, emulator, tmp_path, monkeypatch, time, said):  # noqa: F811
    """That is said, with our clock's time: it is the clock or the certificate, and no authority that should be named."""
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", **time).configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    async with Proxy(port(emulator), context=context) as proxy:
        settings = _Configured(config(mixpanel__url=f"https://127.0.0.1:{proxy.port}"))
        code, _, err = await bridged(settings, "check", "--online")

    assert code == 69
    assert said in err
    assert "SSL_CERT_FILE" not in err


@pytest.mark.parametrize(
    ("variable", "kind", "said"),
    [
        ("SSL_CERT_FILE", "none", "No such file or directory"),
        ("SSL_CERT_FILE", "garbage", "holds no certificate"),
        ("SSL_CERT_FILE", "empty", "it is empty"),
        ("SSL_CERT_FILE", "folder", "SSL_CERT_DIR is for those"),
        ("SSL_CERT_FILE", "nothing", "it is empty: unset it"),
        ("SSL_CERT_FILE", "closed", "everybody may read"),
        ("SSL_CERT_FILE", "good", ""),
        ("SSL_CERT_DIR", "none", "No such file or directory"),
        ("SSL_CERT_DIR", "garbage", "Not a directory"),
        ("SSL_CERT_DIR", "folder", "run `openssl rehash`"),
        ("SSL_CERT_DIR", "closed folder", "Permission denied"),
        ("SSL_CERT_DIR", "good folder", ""),
    ],
)
def test_authorities_that_can_not_be_had(tmp_path, monkeypatch, config, request, variable, kind, said):
    """OpenSSL passes over a variable that names nothing of use. It is told with why, and the hint doesn't tell to set it."""
    path = tmp_path / "ca"
    if kind in ("garbage", "empty", "closed", "good"):
        trustme.CA().cert_pem.write_to_path(str(path))
    if kind in ("garbage", "empty"):
        path.write_text("nonsense" if kind == "garbage" else "")
    if "folder" in kind:
        path.mkdir()
    if kind == "good folder":
        trustme.CA().cert_pem.write_to_path(str(path / "0a1b2c3d.0"))
    if kind.startswith("closed"):
        request.getfixturevalue("an_ordinary_user")
    monkeypatch.setenv(variable, "" if kind == "nothing" else str(path))
    found = list(connections.unusable_authorities())
    hint = probe._unreachable(options.target(config()), Retry("network", "ClientConnectorCertificateError: ..."))[1]

    assert [variable in each and said in each for each in found] == ([True] if said else [])
    assert (found[0] in hint) if said else ("inspects TLS" in hint)


async def test_a_place_that_is_not_for_a_file(bridged, config, tmp_path):  # noqa: F811  # the fixture
    """What `run` would end with isn't called good; of a spool with a second name it is said what that means."""
    pipe, spool = tmp_path / "pipe", tmp_path / "spool.db"
    os.mkfifo(pipe)
    code, _, err = await bridged(_Configured(config(spool__path=str(pipe))), "check")
    assert code == 78
    assert f"spool.path: {pipe} is a pipe: name a file" in err
    spool.write_bytes(b"SQLite format 3\0")
    (tmp_path / "backup.db").hardlink_to(spool)
    code, out, _ = await bridged(_Configured(config(spool__path=str(spool))), "check")
    assert code == 0
    assert "1 hard link beside it" in out


async def test_the_check_warns_of_authorities(bridged, config, tmp_path, monkeypatch):  # noqa: F811  # the fixture
    """Without asking anybody, and it is no reason to fail: other authorities are trusted as ever."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    code, out, _ = await bridged(_Configured(config()), "check")
    assert code == 0
    said = f"the environment variable SSL_CERT_FILE={tmp_path}/none.pem: No such file"
    assert f"warning: {said}" in out
    with capture_logs() as logged:
        foresight.warn(config())
    assert [entry["problem"].startswith(said) for entry in logged if entry["event"] == "authorities_unusable"] == [True]


@pytest.mark.parametrize(
    ("verdict", "word"),
    [
        (Retry("rate", "429"), "busy"),
        (Retry("server", "503"), "isn't well"),
        (Retry("network", "no answer within 15 s"), "says nothing"),
        (Retry("network", "no connection within 10 s"), "firewall"),
        (Retry("network", "ClientProxyConnectionError: ..."), "HTTPS_PROXY"),
        (Retry("network", "ClientConnectorDNSError: Cannot connect to host proxy.lan:3128 ssl"), "HTTPS_PROXY"),
        (Retry("network", "ClientConnectorDNSError: Cannot connect to host 127.0.0.1:443 ssl"), "find 127.0.0.1"),
        (
            Retry("network", "ClientConnectorSSLError: [[SSL: UNSUPPORTED_PROTOCOL] unsupported protocol]"),
            "no TLS that is",
        ),
        (Retry("network", "something new"), "try again"),
    ],
)
def test_every_trouble_has_advice(config, verdict, word):
    """Whatever the transport says, somebody can do something."""
    assert word in probe._unreachable(options.target(config()), verdict)[1]
