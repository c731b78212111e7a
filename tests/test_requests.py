"""Addresses and credentials of requests: where they go, as whom, and that no secret shows."""

import base64
import io
import pprint

import pytest
from msgspec import to_builtins
from multidict import CIMultiDict
from yarl import URL

from bridged.mixpanel.requests import HOSTS, Credentials, Target

SECRETS = {"token": "s3cr3t-token", "api_secret": "s3cr3t-api", "service_secret": "s3cr3t-service"}


def credentials(*names: str) -> Credentials:
    """Credentials of which these are set."""
    values = {"service_account": "robot", "project_id": "4711"} | SECRETS
    return Credentials(**{name: values[name] for name in names})


def decoded(header: str) -> str:
    """What a Basic header says."""
    kind, _, value = header.partition(" ")
    assert kind == "Basic"
    return base64.b64decode(value, validate=True).decode()


SERVICE = ("service_account", "service_secret", "project_id")


@pytest.mark.parametrize(
    ("names", "kind", "user"),
    [
        (("token",), "project token", "s3cr3t-token:"),
        (("token", "api_secret"), "API secret", "s3cr3t-api:"),
        (("api_secret",), "API secret", "s3cr3t-api:"),
        (("token", "api_secret", *SERVICE), "service account", "robot:s3cr3t-service"),
        (SERVICE, "service account", "robot:s3cr3t-service"),
    ],
)
def test_the_strongest_credential_is_used(names: tuple[str, ...], kind: str, user: str) -> None:
    """Service account before API secret before token; the last two are a user without a password."""
    assert credentials(*names).kind == kind
    assert decoded(credentials(*names).authorization()) == user


def test_credentials_of_any_alphabet() -> None:
    """The header stays ASCII."""
    header = Credentials(service_account="Zoë", service_secret="пароль:x", project_id="1").authorization()
    assert header.isascii()
    assert decoded(header) == "Zoë:пароль:x"


@pytest.mark.parametrize(("region", "host"), HOSTS.items())
def test_the_region_chooses_the_host(region: str, host: str) -> None:
    """Each region has its own host, over TLS; strict=1 always: without it Mixpanel says 1 to what it drops."""
    target = Target(region=region, credentials=credentials("token"))  # type: ignore[arg-type]
    assert target.import_url == f"{host}/import?strict=1"
    assert host.startswith("https://")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9000", "http://127.0.0.1:9000/"])
def test_a_url_overrides_the_region(url: str) -> None:
    """An emulator or a proxy takes the host's place, with or without its slash."""
    target = Target(url=url, region="eu", credentials=credentials("token"))
    assert target.import_url == "http://127.0.0.1:9000/import?strict=1"


def test_project_id_goes_with_service_accounts_only() -> None:
    """Other credentials name the project themselves: Mixpanel wants no second one."""
    assert URL(Target(credentials=credentials(*SERVICE)).import_url).query == {"strict": "1", "project_id": "4711"}
    for names in (("token", "project_id"), ("api_secret", "project_id")):
        assert URL(Target(credentials=credentials(*names)).import_url).query == {"strict": "1"}


def test_headers_say_what_the_body_is() -> None:
    """A segment as it lies in the spool: NDJSON, gzip."""
    headers = CIMultiDict(Target(credentials=credentials("token")).headers())
    assert (headers["Content-Type"], headers["Content-Encoding"]) == ("application/x-ndjson", "gzip")
    assert decoded(headers["Authorization"]) == "s3cr3t-token:"


@pytest.mark.parametrize("names", [("token",), ("token", "api_secret"), SERVICE, ("token", "api_secret", *SERVICE)])
def test_no_secret_shows(names: tuple[str, ...]) -> None:
    """Neither credentials nor a target that holds them show a secret when they are printed, logged or formatted."""
    target = Target(credentials=credentials(*names))
    shown = io.StringIO()
    pprint.pprint([target, target.credentials, {"a": target}], stream=shown)
    text = shown.getvalue() + f"{target} {target!r} {target.credentials} {target.credentials!r} {target.import_url}"
    assert not [secret for secret in SECRETS.values() if secret in text]
    assert target.credentials.kind in repr(target)


def test_no_secret_shows_in_a_rich_console() -> None:
    """`rich` asks objects in a way of its own."""
    target = Target(credentials=credentials("token", "api_secret", *SERVICE))
    rich = pytest.importorskip("rich.pretty")
    text = rich.pretty_repr(target) + rich.pretty_repr(target.credentials)
    assert not [secret for secret in SECRETS.values() if secret in text]


def test_credentials_compare_by_value() -> None:
    """A reload that changes nothing is seen to change nothing; a new secret is seen."""
    assert credentials("token") == credentials("token") != credentials("api_secret")
    assert set(to_builtins(credentials())) == {"token", "api_secret", "service_account", "service_secret", "project_id"}
