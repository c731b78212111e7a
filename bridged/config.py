"""The configuration: msgspec Structs whose annotations are its documentation.

`config.toml` at the top of the project is `default_toml()`, word for word; a test holds them together. Values come, the
later over the earlier, from the defaults, the file, the environment (`BRIDGED__SECTION__KEY`), and for an empty secret
from its `*_file` key or from `$CREDENTIALS_DIRECTORY/section_key` (systemd's LoadCredential).
"""

import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import msgspec
from msgspec import Meta, Struct

from bridged.errors import ConfigError

_SIZE_UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_TIME_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Size(int):
    """A number of bytes, written `"10GiB"`, `"2GB"` or as a plain integer."""

    @classmethod
    def parse(cls, value: object) -> "Size":
        """Raises ValueError for anything but a non-negative integer or a number with a unit."""
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
            return cls(value)
        match = (
            re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*([kKMGT]?i?B?)", value.strip()) if isinstance(value, str) else None
        )
        unit = match[2].replace("K", "k").replace("kiB", "KiB") if match else None
        if match is None or unit not in _SIZE_UNITS:
            raise ValueError(f'expected a size such as "512MiB", "2GB" or 1000000, got {value!r}')
        number = float(match[1]) if "." in match[1] else int(match[1])
        return cls(round(number * _SIZE_UNITS[unit]))

    def __str__(self) -> str:
        for unit, factor in sorted(_SIZE_UNITS.items(), key=lambda item: -item[1]):
            if unit not in ("", "B") and self and int(self) % factor == 0:
                return f"{int(self) // factor}{unit}"
        return f"{int(self)}B"


class Seconds(float):
    """A length of time in seconds, written `"1s"`, `"250ms"`, `"48h"` or as a plain number of seconds."""

    @classmethod
    def parse(cls, value: object) -> "Seconds":
        """Raises ValueError for anything but a non-negative number or a number with a unit."""
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 10**18:
            return cls(value)
        match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*(ms|s|m|h|d)", value.strip()) if isinstance(value, str) else None
        if match is None:
            raise ValueError(f'expected a time such as "250ms", "1s" or "48h", got {value!r}')
        return cls(float(match[1]) * _TIME_UNITS[match[2]])

    def __str__(self) -> str:
        # 48h stays 48h: people think of a retention in hours.
        for unit in ("h", "m", "s"):
            if self and float(self) % _TIME_UNITS[unit] == 0:
                return f"{int(self / _TIME_UNITS[unit])}{unit}"
        return f"{round(self * 1000)}ms"


class _Section(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A table of config.toml."""


class HttpSource(_Section, frozen=True, kw_only=True):
    """Braze's Custom HTTP connector posts here: POST /v1/currents."""

    listen: Annotated[str, Meta(description='host:port of the HTTP door; "" closes it.')] = "127.0.0.1:8480"
    bearer_token: Annotated[
        str,
        Meta(description="Braze sends it as `Authorization: Bearer ...`. Required when listen is not loopback."),
    ] = ""
    bearer_token_file: Annotated[str, Meta(description="A file that holds bearer_token.")] = ""
    max_body: Annotated[Size, Meta(description="Larger bodies (after gunzip) are answered 413; Braze splits them.")] = (
        Size(16 * 2**20)
    )
    max_connections: Annotated[
        int, Meta(ge=1, description="More are answered 503, unless one that asked for nothing yet can make room.")
    ] = 1000
    max_in_flight: Annotated[
        Size, Meta(description="Bytes of all bodies not yet handed on. Beyond it the slowest body is answered 503.")
    ] = Size(24 * 2**20)
    tls_cert: Annotated[
        str, Meta(description="PEM file: the certificate and its chain. Set, the door speaks HTTPS.")
    ] = ""
    tls_key: Annotated[str, Meta(description="PEM file: the private key of tls_cert, unencrypted.")] = ""


class StreamSource(_Section, frozen=True, kw_only=True):
    """NDJSON, one Currents event a line, over TCP and Unix sockets."""

    listen: Annotated[
        tuple[str, ...],
        Meta(description='"tcp:host:port" and "unix:path", any number; [] closes the door.'),
    ] = ("tcp:127.0.0.1:8482", "unix:bridged.sock")
    max_line: Annotated[Size, Meta(description="A longer line becomes one dead letter (its first 4 KiB are kept).")] = (
        Size(2**20)
    )
    allow_remote: Annotated[
        bool,
        Meta(description="Permits tcp: addresses beyond loopback. The stream has no authentication of its own."),
    ] = False
    max_connections: Annotated[
        int, Meta(ge=1, description="More are closed at once, unless one that never sent a line can make room.")
    ] = 1000
    max_unfinished: Annotated[
        Size,
        Meta(
            description="Bytes of all lines without their end, or waiting for room. Beyond it the oldest are cut off."
        ),
    ] = Size(12 * 2**20)
    tls_cert: Annotated[str, Meta(description="PEM file: the certificate and its chain, for the tcp: addresses.")] = ""
    tls_key: Annotated[str, Meta(description="PEM file: the private key of tls_cert, unencrypted.")] = ""


class Sources(_Section, frozen=True, kw_only=True):
    """The doors."""

    http: HttpSource = HttpSource()
    stream: StreamSource = StreamSource()


class Mixpanel(_Section, frozen=True, kw_only=True):
    """Where events go, and as whom."""

    url: Annotated[str, Meta(description="Overrides the region's host (an emulator, a proxy).")] = ""
    region: Annotated[Literal["us", "eu", "in"], Meta(description="us | eu | in: where the project's data lives.")] = (
        "us"
    )
    token: Annotated[
        str, Meta(description="The project token. Put into every event; alone, it is the credential as well.")
    ] = ""
    token_file: Annotated[str, Meta(description="A file that holds token.")] = ""
    api_secret: Annotated[str, Meta(description="The project's API secret. Mixpanel retires it on 2027-03-03.")] = ""
    api_secret_file: Annotated[str, Meta(description="A file that holds api_secret.")] = ""
    service_account: Annotated[
        str, Meta(description="A service account's user name; preferred. Needs service_secret and project_id.")
    ] = ""
    service_secret: Annotated[str, Meta(description="The service account's secret.")] = ""
    service_secret_file: Annotated[str, Meta(description="A file that holds service_secret.")] = ""
    project_id: Annotated[str, Meta(description="The project's numeric id; only with a service account.")] = ""
    naming: Annotated[
        Literal["seed", "current"],
        Meta(description="seed | current: the spelling of event and property names (see README, Events)."),
    ] = "seed"
    partner_id: Annotated[
        str, Meta(description="The `$partner_id` of every event: marks it as Braze's, for Mixpanel's MTU exemption.")
    ] = "braze"


class Events(_Section, frozen=True, kw_only=True):
    """Which events are forwarded."""

    message_engagement: Annotated[bool, Meta(description="Forward the message engagement events.")] = True
    customer_behavior: Annotated[bool, Meta(description="Forward the customer behaviour events.")] = True
    include: Annotated[
        tuple[str, ...], Meta(description="Event types forwarded although their group is off (Currents' names).")
    ] = ()
    exclude: Annotated[
        tuple[str, ...], Meta(description="Event types not forwarded although their group is on (Currents' names).")
    ] = ()
    unknown: Annotated[
        Literal["dead_letter", "forward", "skip"],
        Meta(description="dead_letter | forward | skip: what happens to an event type that is not in the table."),
    ] = "dead_letter"
    anonymous: Annotated[
        Literal["skip", "device", "dead_letter"],
        Meta(
            description=(
                "skip | device | dead_letter: events of users without external_user_id. "
                "device sends `$device:<device_id>`, and skips where there is none."
            )
        ),
    ] = "skip"
    names: Annotated[
        dict[str, str],
        Meta(description='Mixpanel event name by event type, e.g. "users.messages.sms.CarrierSend" = "SMS Carrier".'),
    ] = {}


class SpoolSettings(_Section, frozen=True, kw_only=True):
    """What waits, on disk."""

    path: Annotated[str, Meta(description="The SQLite file; relative to the working directory.")] = "spool.db"
    max_bytes: Annotated[Size, Meta(description="Near this size the doors answer 503 and pause reading.")] = Size(
        10 * 2**30
    )
    ring_bytes: Annotated[
        Size, Meta(description="Waiting segments also kept in memory, so that they aren't re-read.")
    ] = Size(32 * 2**20)
    max_dead_letters: Annotated[
        int,
        Meta(ge=0, description="Beyond this many, or a quarter of max_bytes, the oldest are dropped (and counted)."),
    ] = 1_000_000


class DeliverySettings(_Section, frozen=True, kw_only=True):
    """What leaves, and how fast."""

    max_events_per_second: Annotated[
        float, Meta(ge=0, description="Mixpanel's ceiling for a project; bridged stays at 97 % of it. 0: no ceiling.")
    ] = 30000
    max_bytes_per_minute: Annotated[
        Size, Meta(description="Mixpanel's ceiling in uncompressed bytes; bridged stays at 97 % of it. 0: no ceiling.")
    ] = Size(2 * 10**9)
    max_concurrency: Annotated[int, Meta(ge=1, le=64, description="Requests in flight at most.")] = 20
    max_batch_events: Annotated[int, Meta(ge=1, le=2000, description="Events in a request at most.")] = 2000
    max_batch_bytes: Annotated[
        Size,
        Meta(
            description="Uncompressed bytes in a request at most. The docs say 10MB, the error text 2 MiB: safe is 2MB."
        ),
    ] = Size(2 * 10**6)
    flush_interval: Annotated[Seconds, Meta(description="A batch that isn't full waits this long for more.")] = Seconds(
        1
    )
    timeout: Annotated[Seconds, Meta(description="A request without an answer for so long is tried again.")] = Seconds(
        60
    )
    probe_interval: Annotated[
        Seconds, Meta(description="While Mixpanel refuses the credential: one small request so often.")
    ] = Seconds(60)
    grace: Annotated[Seconds, Meta(description="At SIGTERM: time for requests in flight; the rest stays on disk.")] = (
        Seconds(10)
    )


class Retention(_Section, frozen=True, kw_only=True):
    """What happens to events that can't be delivered because the credential is refused."""

    max_age: Annotated[Seconds, Meta(description="While halted, older events expire.")] = Seconds(48 * 3600)
    on_expiry: Annotated[
        Literal["archive", "drop", "keep"],
        Meta(
            description=(
                "archive | drop | keep: into files that `bridged replay` sends later; for good, as the "
                "hosted connector does; never."
            )
        ),
    ] = "archive"
    archive_path: Annotated[str, Meta(description="The folder of the archive files.")] = "archive"


class Admin(_Section, frozen=True, kw_only=True):
    """API, /metrics, /healthz, /readyz."""

    listen: Annotated[str, Meta(description='host:port of the admin listener; "" closes it.')] = "127.0.0.1:8481"
    token: Annotated[
        str, Meta(description="Demanded as `Authorization: Bearer ...`. Required when listen is not loopback.")
    ] = ""
    token_file: Annotated[str, Meta(description="A file that holds token.")] = ""


class Log(_Section, frozen=True, kw_only=True):
    """Logs go to standard error."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="debug | info | warning | error.")
    ] = "info"
    format: Annotated[
        Literal["auto", "console", "json"], Meta(description="auto | console | json: auto is console on a terminal.")
    ] = "auto"


class Config(_Section, frozen=True, kw_only=True):
    """Everything; see the sections."""

    sources: Sources = Sources()
    mixpanel: Mixpanel = Mixpanel()
    events: Events = Events()
    spool: SpoolSettings = SpoolSettings()
    delivery: DeliverySettings = DeliverySettings()
    retention: Retention = Retention()
    admin: Admin = Admin()
    log: Log = Log()


SECRETS = (
    ("sources", "http", "bearer_token"),
    ("mixpanel", "token"),
    ("mixpanel", "api_secret"),
    ("mixpanel", "service_secret"),
    ("admin", "token"),
)


class Key(NamedTuple):
    """One key of the configuration: where it stands, its struct type, its default and what it is for."""

    path: tuple[str, ...]
    type: Any
    default: Any
    description: str


def _plain(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _sections(struct: type[Struct], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type[Struct]]]:
    for field in msgspec.structs.fields(struct):
        if isinstance(field.type, type) and issubclass(field.type, _Section):
            yield (*path, field.name), field.type
            yield from _sections(field.type, (*path, field.name))


def keys() -> Iterator[Key]:
    """Every key, in the order of config.toml."""
    for path, struct in _sections(Config):
        for field in msgspec.structs.fields(struct):
            if isinstance(field.type, type) and issubclass(field.type, _Section):
                continue
            description = next(m.description or "" for m in get_args(field.type) if isinstance(m, Meta))
            default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
            yield Key((*path, field.name), _plain(field.type), default, description)


def find_config(flag: str | None) -> Path | None:
    """`--config`, else $BRIDGED_CONFIG, else ./config.toml, else /etc/bridged/config.toml, else none at all."""
    if flag or os.environ.get("BRIDGED_CONFIG"):
        return Path(flag or os.environ["BRIDGED_CONFIG"])
    return next((p for p in (Path("config.toml"), Path("/etc/bridged/config.toml")) if p.exists()), None)


def load(path: Path | None, environ: Mapping[str, str] = os.environ) -> Config:
    """The configuration of a file and an environment.

    Raises ConfigError that names the file and the key for anything unreadable, unknown, ill-typed or contradictory.
    """
    where = str(path) if path else "the environment"
    raw: dict[str, Any] = {}
    if path is not None:
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"can't read the configuration {path}: {error}") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from error
    _apply_environment(raw, environ)
    try:
        config = msgspec.convert(raw, Config, dec_hook=_convert)
    except msgspec.ValidationError as error:
        raise _explained(where, error) from error
    config = _with_secrets(config, environ)
    problems = list(_problems(config))
    if problems:
        raise ConfigError(f"{where}: " + "\n  ".join(problems))
    return config


def _convert(kind: type, value: object) -> object:
    if kind in (Size, Seconds):
        return kind.parse(value)
    raise NotImplementedError(kind)


def _explained(where: str, error: msgspec.ValidationError) -> ConfigError:
    """Turns msgspec's path (`$.mixpanel`) into the file's own terms (`[mixpanel]`)."""
    message, _, at = str(error).partition(" - at `$")
    place = at.rstrip("`").lstrip(".")
    unknown = re.search(r"unknown field `(.+)`", message)
    if unknown:
        known = [k.path[-1] for k in keys() if ".".join(k.path[:-1]) == place] or [
            ".".join(p) for p, _ in _sections(Config)
        ]
        near = difflib.get_close_matches(unknown[1], known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return ConfigError(f"{where}: {f'[{place}]' if place else 'the top level'} has no key {unknown[1]!r}", hint)
    return ConfigError(f"{where}: {place or 'the top level'}: {message}")


def _apply_environment(raw: dict[str, Any], environ: Mapping[str, str]) -> None:
    """Puts `BRIDGED__SECTION__KEY` values into `raw`: text as it is, other types as TOML writes them."""
    by_name = {"__".join(("BRIDGED", *key.path)).upper(): key for key in keys()}
    for name, value in environ.items():
        if not name.startswith("BRIDGED__"):
            continue
        key = by_name.get(name)
        if key is None:
            near = difflib.get_close_matches(name, by_name, 1)
            raise ConfigError(
                f"the environment variable {name} names no key", f"did you mean {near[0]}?" if near else ""
            )
        table = raw
        for section in key.path[:-1]:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{name}: {section} is not a section")
        table[key.path[-1]] = (
            _number_or(value)
            if key.type in (Size, Seconds)
            else value
            if key.type is str or get_origin(key.type) is Literal
            else _toml(name, value)
        )


def _number_or(value: str) -> Any:
    """`30` is a number, as in a file; `30s` is text."""
    try:
        return int(value)
    except ValueError:
        return value


def _toml(name: str, value: str) -> Any:
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the environment variable {name}={value!r} is not a TOML value: {error}") from error


def _with_secrets(config: Config, environ: Mapping[str, str]) -> Config:
    for path in SECRETS:
        section: Any = config
        for name in path[:-1]:
            section = getattr(section, name)
        if getattr(section, path[-1]):
            continue
        file = getattr(section, f"{path[-1]}_file")
        credential = (
            Path(environ["CREDENTIALS_DIRECTORY"], "_".join(path)) if "CREDENTIALS_DIRECTORY" in environ else None
        )
        source = Path(file) if file else credential if credential and credential.exists() else None
        if source is None:
            continue
        try:
            secret = source.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"can't read {'.'.join(path)} from {source}: {error}") from error
        if not secret:
            raise ConfigError(f"can't read {'.'.join(path)} from {source}: it is empty")
        config = _replaced(config, path, secret)
    return config


def _replaced(struct: Any, path: tuple[str, ...], value: object) -> Any:
    if len(path) > 1:
        value = _replaced(getattr(struct, path[0]), path[1:], value)
    return msgspec.structs.replace(struct, **{path[0]: value})


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` as a pair. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"expected host:port, got {address!r}")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _problems(config: Config) -> Iterator[str]:
    """What no type can say. Empty means that the daemon may start."""
    mixpanel = config.mixpanel
    if mixpanel.service_account and not (mixpanel.service_secret and mixpanel.project_id):
        yield "mixpanel.service_account needs mixpanel.service_secret and mixpanel.project_id"
    if not (mixpanel.service_account or mixpanel.api_secret or mixpanel.token):
        yield "mixpanel has no credential: set service_account, api_secret or token"
    if mixpanel.url and not re.fullmatch(r"https?://[^/@\s]+(/[^@\s?#]*)?", mixpanel.url):
        # Not quoted: what stands before an @ is a secret.
        yield "mixpanel.url: expected http(s)://host, without credentials or query"
    if mixpanel.project_id and not mixpanel.project_id.isdecimal():
        yield f"mixpanel.project_id: expected a number, got {mixpanel.project_id!r}"
    for event_type, name in config.events.names.items():
        if not name.strip():
            yield f"events.names: {event_type} has a blank name"
    for name, value in (("sources.http.listen", config.sources.http.listen), ("admin.listen", config.admin.listen)):
        if value:
            yield from _address_problems(name, value)
    http, stream, admin = config.sources.http, config.sources.stream, config.admin
    if http.listen and not http.bearer_token and _is_remote(http.listen):
        yield "sources.http.listen is reachable from other machines: set sources.http.bearer_token"
    if admin.listen and not admin.token and _is_remote(admin.listen):
        yield "admin.listen is reachable from other machines: set admin.token"
    for value in stream.listen:
        kind, _, rest = value.partition(":")
        if kind == "tcp":
            yield from _address_problems("sources.stream.listen", rest)
            if _is_remote(rest) and not stream.allow_remote:
                yield f"sources.stream.listen: {rest} is reachable from other machines: set allow_remote = true to permit it"
        elif kind != "unix" or not rest:
            yield f'sources.stream.listen: expected "tcp:host:port" or "unix:path", got {value!r}'
    if config.delivery.max_batch_bytes < 2**20 or config.delivery.max_batch_bytes > 10_485_760:
        yield "delivery.max_batch_bytes: between 1MiB (the largest single event) and 10MiB"
    if stream.max_line < 1024:
        yield "sources.stream.max_line: at least 1KiB"
    if http.max_in_flight < 1.5 * http.max_body:
        yield "sources.http.max_in_flight: at least one and a half times sources.http.max_body"
    if stream.max_unfinished < 2 * stream.max_line:
        yield "sources.stream.max_unfinished: at least twice sources.stream.max_line"
    for name, door in (("sources.http", http), ("sources.stream", stream)):
        if bool(door.tls_cert) != bool(door.tls_key):
            yield f"{name}: tls_cert and tls_key go together"
    if config.spool.max_bytes < 16 * 2**20:
        yield "spool.max_bytes: at least 16MiB"


def _address_problems(name: str, value: str) -> Iterator[str]:
    try:
        split_address(value)
    except ValueError as error:
        yield f"{name}: {error}"


def _is_remote(address: str) -> bool:
    try:
        return not is_loopback(split_address(address)[0])
    except ValueError:
        return False


def default_toml() -> str:
    """Every key at its default with its description: the text of config.toml."""
    lines = [
        "# bridged's configuration: every key, at its default. Only mixpanel needs yours.",
        "# A key can also be set by the environment: [mixpanel] token is BRIDGED__MIXPANEL__TOKEN.",
    ]
    section: tuple[str, ...] = ()
    docs = {path: struct.__doc__ or "" for path, struct in _sections(Config)}
    for key in keys():
        if key.path[:-1] != section:
            section = key.path[:-1]
            lines += ["", f"# {docs[section]}", f"[{'.'.join(section)}]"]
        lines += [f"# {key.description}", f"{key.path[-1]} = {_toml_value(key.default)}"]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, Size | Seconds):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, dict):
        return "{}"
    return msgspec.json.encode(value).decode()


def masked(config: Config) -> dict[str, Any]:
    """The configuration as plain data with every secret replaced: for logs, `check` and the API."""
    for path in SECRETS:
        section: Any = config
        for name in path[:-1]:
            section = getattr(section, name)
        if getattr(section, path[-1]):
            config = _replaced(config, path, "********")
    plain: dict[str, Any] = msgspec.to_builtins(config, enc_hook=str)
    return plain
