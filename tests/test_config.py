"""The configuration: from files, the environment and secrets' files; its errors name the file and the key."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridged.addresses import is_loopback, split_address
from bridged.config import (
    find_config,
    has_credential,
    keys,
    load,
    masked,
    secret_problem,
)
from bridged.config_text import default_toml
from bridged.errors import ConfigError
from bridged.settings import SECRETS, Config, Seconds, Size

TOKEN = {"BRIDGED__MIXPANEL__TOKEN": "example-token"}


def written(tmp_path: Path, text: str, *, token: bool = True) -> Path:
    """A configuration file."""
    path = tmp_path / "some.toml"
    path.write_text(('mixpanel.token = "example-token"\n' if token else "") + text, encoding="utf-8")
    return path


def from_environment(**values: str) -> Config:
    """The configuration of an environment alone: mixpanel__naming="current"."""
    return load(None, TOKEN | {f"BRIDGED__{name.upper()}": value for name, value in values.items()})


def complaint(path: Path | None, **environ: str) -> str:
    """What is wrong with a configuration, in words."""
    with pytest.raises(ConfigError) as caught:
        load(path, {f"BRIDGED__{name.upper()}": value for name, value in environ.items()})
    assert caught.value.exit_code == 78
    return str(caught.value)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[mixpanel]\ntokn = 'x'", ["[mixpanel]", "'tokn'", "did you mean 'token'"]),
        ("[sources.http]\nlisten_on = 'x'", ["[sources.http]", "'listen_on'", "'listen'"]),
        ("[delivery]\ncolour = 'red'", ["[delivery]", "'colour'", "max_concurrency"]),
        ("[mixpnel]\ntoken = 'x'", ["'mixpnel'", "did you mean 'mixpanel'"]),
        ("nonsense = 1", ["the top level", "'nonsense'", "known here"]),
        ("[mixpanel]\nregion = 'mars'", ["mixpanel.region", "mars", "one of: us, eu, in"]),
        ("[events.transform]\n'a.B' = { c = 'drop' }", ["events.transform: ", "drop", "one of: remove, hash"]),
        ("[events.names]\nusers.messages.email.Send = 'x'", ["events.names", "in quotes"]),
        ("[delivery]\nmax_concurrency = 'many'", ["delivery.max_concurrency", "int"]),
        ("[delivery]\nmax_concurrency = 0", ["delivery.max_concurrency", "1"]),
        ("[delivery]\nmax_batch_events = 2001", ["delivery.max_batch_events", "2000"]),
        ("[mixpanel]\nproject_id = 5", ["mixpanel.project_id", "str", 'in quotes: "..."']),
        ("[events]\nexclude = 'x'", ["events.exclude", "array", 'in brackets: ["..."]']),
        ("[cohorts]\nenabled = 'true'", ["cohorts.enabled", "true or false, without quotes"]),
        ("[delivery]\nmax_concurrency = '7'", ["delivery.max_concurrency", "a whole number, without quotes"]),
        ("[delivery]\nmax_events_per_second = '7'", ["delivery.max_events_per_second", "a number, without quotes"]),
        (f"[delivery]\nmax_concurrency = {'9' * 5000}", ["not valid TOML"]),
        (f"[delivery]\nmax_concurrency = {'[' * 5000}", ["not valid TOML"]),
        ("[events.names]\n'users.X' = 5", ["events.names", "str"]),
        ("[spool]\nmax_bytes = '10 gigs'", ["spool.max_bytes", "10 gigs", "512MiB"]),
        ("[spool]\nmax_bytes = -1", ["spool.max_bytes", "-1"]),
        ("[delivery]\nflush_interval = 'soon'", ["delivery.flush_interval", "soon", "250ms"]),
        ("[delivery]\nflush_interval = true", ["delivery.flush_interval", "True"]),
        ("[retention]\nmax_age = inf", ["retention.max_age"]),
        ("[retention]\nmax_age = nan", ["retention.max_age"]),
        (f"[retention]\nmax_age = '{'9' * 400}h'", ["retention.max_age"]),
        (f"[spool]\nmax_bytes = '{'9' * 400}GB'", ["spool.max_bytes"]),
        ("mixpanel = 5", ["mixpanel"]),
        ("[mixpanel", ["not valid TOML"]),
        ("[log]\nlevel = 'loud'", ["log.level", "loud"]),
    ],
)
def test_an_error_names_the_file_and_the_key(tmp_path: Path, text: str, parts: list[str]) -> None:
    """Whoever mistyped finds the place at once; a name that is nearly right is suggested."""
    path = written(tmp_path, text, token=False)
    message = complaint(path)
    assert [part for part in [str(path), *parts] if part not in message] == []


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    """Some editors put one before the first line."""
    path = tmp_path / "some.toml"
    path.write_bytes(b"\xef\xbb\xbf[mixpanel]\ntoken = 't'\n")
    assert load(path, {}).mixpanel.token == "t"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_another_encoding_is_told_as_one(tmp_path: Path, encoding: str) -> None:
    """As editors on Windows offer it; their line ends are none of anybody's business."""
    path = tmp_path / "some.toml"
    path.write_bytes("# Grüße\r\n[mixpanel]\r\ntoken = 't'\r\n".encode(encoding))
    assert "hint: save it as UTF-8" in complaint(path)
    path.write_bytes(path.read_bytes().decode(encoding).encode())
    assert load(path, {}).mixpanel.token == "t"


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    """A missing file, and one that isn't text, are named."""
    path = tmp_path / "some.toml"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in complaint(path)
    assert str(tmp_path) in complaint(tmp_path)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("admin.listen = ''", ["no credential", "token"]),
        ("mixpanel.service_account = 'robot'", ["service_secret", "project_id"]),
        ("mixpanel.token = 't'\nmixpanel.url = 'api.mixpanel.com'", ["mixpanel.url", "http"]),
        ("mixpanel.token = 't'\nmixpanel.url = 'https://api..mixpanel.com'", ["mixpanel.url", "host"]),
        (f"mixpanel.token = 't'\nmixpanel.url = 'https://{'a' * 64}.example.com'", ["mixpanel.url", "host"]),
        ("mixpanel.token = 't'\nmixpanel.url = 'http://[::1'", ["mixpanel.url", "host"]),
        ("mixpanel.token = 't'\nmixpanel.url = 'http://localhost:70000'", ["mixpanel.url", "host"]),
        ("mixpanel.token = 't'\nalerts.webhook_url = 'https://hooks..example.com/x'", ["alerts.webhook_url", "host"]),
        (
            "cohorts.enabled = true\nbraze.rest_key = 'k'\nbraze.url = 'https://rest..braze.com'",
            ["braze.url", "host"],
        ),
        ("mixpanel.token = 't'\nadmin.listen = 'nowhere'", ["admin.listen", "host:port"]),
        ("mixpanel.token = 't'\nsources.http.listen = '127.0.0.1:70000'", ["sources.http.listen", "70000"]),
        ("mixpanel.token = 't'\nsources.stream.listen = ['udp:1.2.3.4:5']", ["sources.stream.listen", "udp:1.2.3.4:5"]),
        ("mixpanel.token = 't'\nsources.stream.listen = ['unix:']", ["sources.stream.listen"]),
        ("mixpanel.token = 't'\nsources.stream.listen = ['tcp:8482']", ["sources.stream.listen", "8482"]),
        ("mixpanel.token = 't'\ndelivery.max_batch_bytes = '1MB'", ["delivery.max_batch_bytes"]),
        ("mixpanel.token = 't'\ndelivery.max_batch_bytes = '11MiB'", ["delivery.max_batch_bytes"]),
        ("mixpanel.token = 't'\nspool.max_bytes = '1MiB'", ["spool.max_bytes", "16MiB"]),
        ("mixpanel.token = 't'\nspool.path = ''", ["spool.path", "a file"]),
        ("mixpanel.token = 't'\nspool.path = '/'", ["spool.path", "a file"]),
        ("mixpanel.token = 't'\nsources.http.max_body = 0", ["sources.http.max_body", "at least 1KiB"]),
        ("mixpanel.token = 't'\nspool.path = '~/spool.db'", ["spool.path: ~ stands for no folder here"]),
        ('mixpanel.token = "t"\nspool.path = "a\\u0000b"', ["spool.path: no path holds a NUL"]),
        ("mixpanel.token = 't'\nadmin.listen = ' 127.0.0.1:8481'", ["admin.listen: expected host:port, got ' 127."]),
        (
            "mixpanel.token = 't'\nsources.stream.listen = ['unix:~/s.sock']",
            ["sources.stream.listen: ~ stands for no folder"],
        ),
        ("mixpanel.token = 't'\ndelivery.timeout = 0", ["delivery.timeout", "more than 0s"]),
        ("mixpanel.token = 't'\nretention.max_age = 0", ["retention.max_age", "more than 0s", "keep"]),
        ("mixpanel.token = 't'\nretention.archive_path = ''", ["retention.archive_path", "a folder"]),
        ("mixpanel.token = 't'\nalerts.undelivered = 0", ["alerts.undelivered", "more than 0s"]),
        ("mixpanel.token = 't'\nadmin.hosts = ['b.example:8443']", ["admin.hosts", "a name alone", "b.example:8443"]),
        ("mixpanel.token = 't'\nadmin.hosts = ['https://b.example']", ["admin.hosts", "a name alone"]),
        ("mixpanel.token = 't'\ndelivery.probe_interval = '0ms'", ["delivery.probe_interval", "more than 0s"]),
        ("mixpanel.token = 't'\nsources.http.listen = '127.0.0.1:8482'", ["127.0.0.1:8482", "two listeners"]),
        ("mixpanel.token = 't'\nsources.http.listen = 'localhost:8481'", ["localhost:8481 and 127.0.0.1:8481", "two"]),
        ("mixpanel.token = 't'\nsources.http.listen = 'localhost:8482'", ["localhost:8482 and 127.0.0.1:8482", "two"]),
        (
            "mixpanel.token = 't'\nsources.http = {listen = '0.0.0.0:8481', bearer_token = 'x'}",
            ["0.0.0.0:8481 and 127.0.0.1:8481", "two listeners"],
        ),
        (
            "mixpanel.token = 't'\nsources.stream.listen = ['unix:a.sock', 'unix:./a.sock']",
            ["unix:a.sock and unix:./a.sock", "two listeners"],
        ),
        ("mixpanel.token = 't'\nsources.http.listen = 'http://127.0.0.1:8480'", ["sources.http.listen", "host:port"]),
    ],
)
def test_contradictions_are_told_before_the_start(tmp_path: Path, text: str, parts: list[str]) -> None:
    """What no type can say is checked as well, and names its key."""
    path = written(tmp_path, text, token=False)
    message = complaint(path)
    assert [part for part in [str(path), *parts] if part not in message] == []


def test_all_contradictions_are_told_at_once(tmp_path: Path) -> None:
    """Nobody likes to be sent back again and again."""
    message = complaint(written(tmp_path, "spool.max_bytes = 1\nadmin.listen = 'x'\nmixpanel.url = 'x'"))
    assert all(name in message for name in ("spool.max_bytes", "admin.listen", "mixpanel.url"))


# -- the environment ---------------------------------------------------------------------------------------------------


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    """A container's deployment sets one key without writing a file; what it doesn't set stays."""
    path = written(tmp_path, "[mixpanel]\nregion = 'eu'\nnaming = 'current'\n", token=False)
    config = load(path, TOKEN | {"BRIDGED__MIXPANEL__REGION": "in", "UNRELATED": "x", "BRIDGED_CONFIG": "x"})
    assert (config.mixpanel.region, config.mixpanel.naming, config.mixpanel.token) == ("in", "current", "example-token")


@pytest.mark.parametrize("text", ["123", "true", "[1]", '"quoted"', "", "1e5", "a = b", "zwölf"])
def test_text_is_taken_as_it_is(text: str) -> None:
    """A token of digits is a token: text needs no quotes, and loses none."""
    assert from_environment(mixpanel__partner_id=text).mixpanel.partner_id == text
    assert load(None, {"BRIDGED__MIXPANEL__TOKEN": "123"}).mixpanel.token == "123"


def test_other_types_are_written_as_in_toml() -> None:
    """Numbers, switches, lists and tables."""
    config = from_environment(
        sources__stream__listen='["unix:a.sock", "tcp:127.0.0.1:0"]',
        sources__http__max_body="1MiB",
        events__customer_behavior="false",
        events__names='{"users.messages.sms.Send" = "SMS"}',
        events__exclude='["users.messages.sms.Send"]',
        delivery__max_concurrency="7",
        delivery__max_events_per_second="1.5",
        delivery__flush_interval="250ms",
        spool__max_bytes="20000000",
        retention__on_expiry="keep",
    )
    assert config.sources.stream.listen == ("unix:a.sock", "tcp:127.0.0.1:0")
    assert config.sources.http.max_body == 2**20
    assert config.events.customer_behavior is False
    assert config.events.names == {"users.messages.sms.Send": "SMS"}
    assert config.events.exclude == ("users.messages.sms.Send",)
    assert (config.delivery.max_concurrency, config.delivery.max_events_per_second) == (7, 1.5)
    assert config.delivery.flush_interval == 0.25
    assert config.spool.max_bytes == 20_000_000
    assert config.retention.on_expiry == "keep"


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("mixpanel__tokn", "x", ["BRIDGED__MIXPANEL__TOKN", "did you mean BRIDGED__MIXPANEL__TOKEN"]),
        ("foo", "x", ["BRIDGED__FOO", "the names are BRIDGED__SECTION__KEY"]),
        ("nothing", "x", ["BRIDGED__NOTHING"]),
        ("mixpanel", "x", ["BRIDGED__MIXPANEL"]),
        ("delivery__max_concurrency", "many", ["BRIDGED__DELIVERY__MAX_CONCURRENCY", "many"]),
        ("delivery__max_concurrency", "", ["BRIDGED__DELIVERY__MAX_CONCURRENCY"]),
        ("delivery__max_concurrency", "0", ["delivery.max_concurrency", "the environment"]),
        ("events__exclude", "a.b", ["BRIDGED__EVENTS__EXCLUDE"]),
        ("delivery__flush_interval", "x", ["delivery.flush_interval"]),
    ],
)
def test_a_wrong_variable_is_named(name: str, value: str, parts: list[str]) -> None:
    """A variable that is ignored because of a slip would be worse than one that stops the start."""
    message = complaint(None, **{name: value})
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    "listen",
    [
        ["tcp:127.0.0.1:0", "tcp:127.0.0.1:0"],
        ["tcp:127.0.0.1:8482", "tcp:[::1]:8482"],
        ["tcp:127.0.0.1:8482", "tcp:127.0.0.2:8482"],
        ["tcp:127.0.0.1:8482", "tcp:[::]:8482"],
        ["tcp:127.0.0.1:8482", "tcp:one.example:8482"],
        ["unix:a.sock", "unix:b/a.sock", "unix:8480", "unix:8481"],
    ],
)
def test_listeners_that_are_no_neighbours_are_let_be(tmp_path: Path, listen: list[str]) -> None:
    """What only looks alike is nobody's mistake; what a name stands for isn't looked up."""
    path = written(tmp_path, f"sources.stream = {{listen = {listen}, allow_remote = true}}")
    assert load(path, {}).sources.stream.listen == tuple(listen)


@pytest.mark.parametrize("name", ["BRIDGED_MIXPANEL__TOKEN", "BRIDGED_MIXPANEL_TOKEN", "BRIDGED___MIXPANEL_TOKEN"])
def test_a_variable_with_an_underscore_too_few_is_told(name: str) -> None:
    """It would be ignored without a word; what isn't like a key belongs to somebody else."""
    with pytest.raises(ConfigError) as caught:
        load(None, TOKEN | {name: "x"})
    assert name in str(caught.value)
    assert "did you mean BRIDGED__MIXPANEL__TOKEN?" in str(caught.value)
    load(None, TOKEN | {"BRIDGED_CONFIG": "x", "BRIDGED_ADMIN_SERVICE_HOST": "10.0.0.1", "BRIDGED_PORT_8480_TCP": "x"})


def test_a_section_that_is_none_is_told(tmp_path: Path) -> None:
    """A variable for a key below something that the file says is a number."""
    assert "mixpanel" in complaint(written(tmp_path, "mixpanel = 5", token=False), mixpanel__region="eu")


def test_a_bad_variable_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    """Who looks for it in the file finds another value there, or none."""
    path = written(tmp_path, "spool.max_bytes = '10GiB'")
    said = complaint(path, spool__max_bytes="10 gigs")
    assert "BRIDGED__SPOOL__MAX_BYTES" in said
    assert str(path) not in said
    assert f"{path} and the environment: spool.max_bytes: at least" in complaint(path, spool__max_bytes="1MiB")


def test_every_key_has_its_variable() -> None:
    """All keys of config.toml can be set by the environment, to what config.toml says."""
    environ = {}
    for key in keys():
        if isinstance(key.default, bool):
            value = str(key.default).lower()
        elif isinstance(key.default, tuple):
            value = str(list(key.default)).replace("'", '"')
        else:
            value = str(key.default)
        environ["__".join(("BRIDGED", *key.path)).upper()] = value
    assert load(None, environ | TOKEN) == load(None, TOKEN)


# -- secrets -----------------------------------------------------------------------------------------------------------


def value_at(config: Any, path: tuple[str, ...]) -> Any:
    """The value of a key."""
    for name in path:
        config = getattr(config, name)
    return config


def variable(path: tuple[str, ...], ending: str = "") -> str:
    """The environment variable of a key."""
    return ("__".join(("BRIDGED", *path)) + ending).upper()


def secret(path: tuple[str, ...], text: str) -> str:
    """A secret that the key takes."""
    return f"https://example.com/{text}" if path[-1].endswith("url") else text


@pytest.mark.parametrize("path", SECRETS, ids=".".join)
def test_secrets_come_from_files(tmp_path: Path, path: tuple[str, ...]) -> None:
    """The key itself, else its *_file, else systemd's credential; a newline at the end of a file is an editor's."""
    named, credentials = tmp_path / "named", tmp_path / "credentials"
    credentials.mkdir()
    named.write_text(secret(path, "from-file\n"))
    (credentials / "_".join(path)).write_text(secret(path, "from-systemd\n"))
    environ = {} if path == ("mixpanel", "token") else dict(TOKEN)
    environ |= {"CREDENTIALS_DIRECTORY": str(credentials)}
    assert value_at(load(None, environ), path) == secret(path, "from-systemd")
    environ |= {variable(path, "_file"): str(named)}
    assert value_at(load(None, environ), path) == secret(path, "from-file")
    environ |= {variable(path): secret(path, "itself")}
    assert value_at(load(None, environ), path) == secret(path, "itself")


@pytest.mark.parametrize("path", SECRETS, ids=".".join)
@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff"])
def test_a_secrets_file_that_holds_none_is_an_error(
    tmp_path: Path, path: tuple[str, ...], content: bytes | None
) -> None:
    """Missing, unreadable or empty: a door must not stand open because a file lost its content."""
    named = tmp_path / "named"
    if content is not None:
        named.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(None, TOKEN | {variable(path, "_file"): str(named), variable(path): ""})
    assert ".".join(path) in str(caught.value)
    assert str(named) in str(caught.value)


@pytest.mark.parametrize("path", SECRETS, ids=".".join)
@pytest.mark.parametrize("text", ["s3cr3t-\nsecond line", "s3cr3t-\x00", "s3cr3t-\x7f"])
def test_a_secret_that_no_header_holds_is_told_by_its_key(tmp_path: Path, path: tuple[str, ...], text: str) -> None:
    """Wherever it comes from, where the configuration is read, and without a quotation: later it is somebody's traceback."""
    named = tmp_path / "named"
    named.write_text(secret(path, text), encoding="utf-8")
    for environ, where in (
        ({variable(path): secret(path, text)}, "the environment"),
        ({variable(path, "_file"): str(named)}, str(named)),
    ):
        with pytest.raises(ConfigError) as caught:
            load(None, TOKEN | environ | {variable(path): environ.get(variable(path), "")})
        said = str(caught.value)
        assert ".".join(path) in said
        assert where in said
        assert "printable" in said
        assert "s3cr3t" not in said


def test_blanks_around_a_secret_are_told_and_around_a_files_are_not_meant(tmp_path: Path) -> None:
    """A header would lose them. In a file they, and the mark that editors on Windows make, are the editor's."""
    assert "admin.token: it has blanks" in complaint(None, mixpanel__token="t", admin__token=" abc ")
    named = tmp_path / "named"
    named.write_bytes(b"\xef\xbb\xbf abc \r\n")
    assert from_environment(admin__token_file=str(named)).admin.token == "abc"


def test_no_credential_directory_or_no_such_credential(tmp_path: Path) -> None:
    """The directory of systemd holds what the unit gives it, and nothing else is asked of it."""
    assert load(None, TOKEN | {"CREDENTIALS_DIRECTORY": str(tmp_path)}).admin.token == ""
    assert load(None, TOKEN | {"CREDENTIALS_DIRECTORY": str(tmp_path / "missing")}).admin.token == ""


def test_systemds_copies_are_gone_when_the_service_is(tmp_path):
    """Who looks for a secret there before the first start, or after the last, is told why there is none."""
    with pytest.raises(ConfigError) as refused:
        load(None, {"BRIDGED__ADMIN__LISTEN": "", "CREDENTIALS_DIRECTORY": str(tmp_path / "missing")})
    assert "missing isn't there: systemd makes it when the service starts" in refused.value.hint


def test_masked_never_shows_a_secret() -> None:
    """For logs, `check` and the API: every secret is replaced, whatever holds it; an unset one stays empty."""
    environ = {variable(path): secret(path, f"s3cr3t-{'-'.join(path)}") for path in SECRETS}
    config = load(None, environ | {"BRIDGED__MIXPANEL__PROJECT_ID": "1", "BRIDGED__MIXPANEL__SERVICE_ACCOUNT": "a"})
    assert "s3cr3t" not in str(masked(config))
    assert masked(config)["mixpanel"]["service_account"] == "a"
    assert masked(load(None, TOKEN))["mixpanel"]["api_secret"] == ""
    assert masked(load(None, TOKEN))["spool"]["max_bytes"] == "10GiB"


def test_every_secret_has_its_file_key_and_is_known_as_secret() -> None:
    """A new secret can't be forgotten in the list: whatever has a *_file is one."""
    files = {key.path for key in keys() if key.path[-1].endswith("_file")}
    assert {(*path[:-1], f"{path[-1]}_file") for path in SECRETS} == files
    words = ("token", "secret", "password", "webhook_url", "rest_key", "partner_key", "import_key")
    assert {key.path for key in keys() if key.path[-1].endswith(words)} == set(SECRETS)


# -- listeners ---------------------------------------------------------------------------------------------------------

REMOTE = ["0.0.0.0:1", "[::]:1", "192.0.2.1:1", "example.com:1", "[2001:db8::1]:1"]
LOCAL = ["127.0.0.1:1", "127.9.9.9:1", "localhost:1", "[::1]:1"]


@pytest.mark.parametrize("address", REMOTE)
def test_listeners_that_others_reach_demand_a_token(address: str) -> None:
    """Nobody opens a door to the network by mistake; with a token, or with allow_remote for the stream, it is meant."""
    assert "sources.http.bearer_token" in complaint(None, mixpanel__token="t", sources__http__listen=address)
    assert "admin.token" in complaint(None, mixpanel__token="t", admin__listen=address)
    stream = f'["unix:a.sock", "tcp:{address}"]'
    assert "allow_remote" in complaint(None, mixpanel__token="t", sources__stream__listen=stream)
    assert from_environment(sources__http__listen=address, sources__http__bearer_token="x")
    assert from_environment(admin__listen=address, admin__token="x")
    assert from_environment(sources__stream__listen=stream, sources__stream__allow_remote="true")


@pytest.mark.parametrize("address", LOCAL)
def test_loopback_needs_no_token(address: str) -> None:
    """On one's own machine everything works from the start."""
    stream = f'["tcp:{address}"]'
    for listen in ({"sources__http__listen": address}, {"admin__listen": address}, {"sources__stream__listen": stream}):
        assert from_environment(**listen)
    assert is_loopback(split_address(address)[0])


def test_every_listener_can_be_closed() -> None:
    """A daemon with one door, or only a backlog to deliver, is a daemon."""
    config = from_environment(sources__http__listen="", sources__stream__listen="[]", admin__listen="")
    assert (config.sources.http.listen, config.sources.stream.listen, config.admin.listen) == ("", (), "")


@pytest.mark.parametrize("address", ["", "8480", ":8480", "host:", "host:port", "host:-1", "host:65536", "host:1.5"])
def test_addresses_that_are_none(address: str) -> None:
    """It takes both, host and port."""
    with pytest.raises(ValueError, match="host:port"):
        split_address(address)


# -- sizes and times ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        (0, 0),
        ("10", 10),
        ("10B", 10),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("1.5MiB", 1_572_864),
        (" 2 GB ", 2 * 10**9),
        ("10GiB", 10 * 2**30),
        ("1TB", 10**12),
        (10**6, 10**6),
    ],
)
def test_sizes(text: object, size: int) -> None:
    """Decimal and binary units, each meaning what it says."""
    assert Size.parse(text) == size


@pytest.mark.parametrize(
    "text", ["", "B", "ten", "-1", -1, 1.5, True, None, "1 XB", "1iB", "1e3", "0x10", "1KB2", [], "inf"]
)
def test_what_is_no_size(text: object) -> None:
    """Refused, and quoted in the reason."""
    with pytest.raises(ValueError, match="expected a size"):
        Size.parse(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("1s", 1), ("1.5m", 90), ("48h", 172_800), ("2d", 172_800), (0, 0), (0.1, 0.1)],
)
def test_times(text: object, seconds: float) -> None:
    """Numbers are seconds; units mean what they say."""
    assert Seconds.parse(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "s", "1", "-1s", -1, True, None, "1 week", "1e3s", float("inf"), float("nan"), "inf"]
)
def test_what_is_no_time(text: object) -> None:
    """Refused, and quoted in the reason. A number as text has no unit: seconds or milliseconds?"""
    with pytest.raises(ValueError, match="expected a time"):
        Seconds.parse(text)


@given(st.integers(0, 10**18 - 1) | st.integers(2**53, 10**18 - 1))
def test_a_size_is_written_so_that_it_reads_the_same(size: int) -> None:
    """config.toml and `check` show sizes with units; nothing is rounded away."""
    assert Size.parse(str(Size(size))) == size


@given(st.integers(0, 10**12))
def test_a_time_is_written_so_that_it_reads_the_same(milliseconds: int) -> None:
    """Down to a millisecond."""
    assert Seconds.parse(str(Seconds(milliseconds / 1000))) == pytest.approx(milliseconds / 1000)


@given(st.floats(0, 10**12, allow_subnormal=False))
def test_a_time_of_a_file_is_the_same_when_it_is_saved(seconds: float) -> None:
    """However short: 0.4 ms that became "0ms" would be refused by the next start, and all saved settings with it."""
    assert Seconds.parse(str(Seconds(seconds))) == pytest.approx(seconds, rel=1e-12)


@given(st.text(max_size=12) | st.binary(max_size=3) | st.floats() | st.integers() | st.lists(st.none(), max_size=1))
def test_any_value_is_a_size_or_a_value_error(value: Any) -> None:
    """So that every wrong value becomes an error with its file and key, never a traceback."""
    for kind in (Size, Seconds):
        try:
            parsed = kind.parse(value)
        except ValueError:
            continue
        assert 0 <= parsed < math.inf


# -- where the file is -------------------------------------------------------------------------------------------------


def test_where_the_configuration_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--config, else $BRIDGED_CONFIG, else ./config.toml, else /etc/bridged/config.toml, else none."""
    system = Path("/etc/bridged/config.toml")
    assert find_config(None) == (system if system.exists() else None)
    (tmp_path / "config.toml").touch()
    assert find_config(None) == Path("config.toml")
    monkeypatch.setitem(os.environ, "BRIDGED_CONFIG", "/elsewhere.toml")
    assert find_config(None) == Path("/elsewhere.toml")
    assert find_config("flag.toml") == Path("flag.toml")
    with pytest.raises(ConfigError, match="--config names no file"):  # and none of the others is taken instead
        find_config("")


def test_what_may_not_be_looked_at_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_pathlib: None, an_ordinary_user: None
) -> None:
    """A folder of root's: whether the file is there can't be known, so it is told as one that can't be read."""
    monkeypatch.setattr("bridged.config._PLACES", (tmp_path / "config.toml",))
    assert find_config(None) == tmp_path / "config.toml"
    said = complaint(find_config(None))
    assert str(tmp_path / "config.toml") in said
    assert "hint: run this as root, or as who may read it" in said
    with pytest.raises(ConfigError, match=f"can't read admin.token from {tmp_path}"):
        load(None, {"CREDENTIALS_DIRECTORY": str(tmp_path)}, secrets=[("admin", "token")])


def test_a_secret_that_is_roots_alone_says_where_the_service_finds_it(tmp_path: Path, an_ordinary_user: None) -> None:
    """`check` as root reads it, the service doesn't: its hint is systemd's way."""
    with pytest.raises(ConfigError) as caught:
        load(None, TOKEN | {"BRIDGED__ADMIN__TOKEN_FILE": str(tmp_path / "secret")})
    assert "/etc/credstore/bridged.admin_token" in str(caught.value)


def test_the_default_is_a_configuration_but_for_its_credential(tmp_path: Path) -> None:
    """What is written out is what is used, key by key."""
    path = tmp_path / "config.toml"
    path.write_text(default_toml())
    assert not has_credential(load(path, {}))
    assert load(path, TOKEN) == load(None, TOKEN)


def test_a_password_may_have_any_letters() -> None:
    """It is encoded before it is put into a header; only a line break, or what can't be seen, is a mistake for sure."""
    secrets = {"mixpanel.api_secret": "geheim-Grüße", "cohorts.password": "Müller-geheim-123456"}
    assert [secret_problem(secret, tuple(key.split("."))) for key, secret in secrets.items()] == ["", ""]
    assert secret_problem("two\nlines", ("cohorts", "password"))
    assert secret_problem("Grüße", ("admin", "token"))
