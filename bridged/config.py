"""Finds and reads the configuration, and says what is wrong with it.

`config.toml` at the top of the project is `default_toml()`, word for word; a test holds them together. Values come, the
later over the earlier, from the defaults, the file, the environment (`BRIDGED__SECTION__KEY`), and for an empty secret
from its `*_file` key or from `$CREDENTIALS_DIRECTORY/section_key` (systemd's LoadCredential).
"""

import difflib
import os
import re
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, get_args, get_origin
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from bridged import cohort_rules, event_rules
from bridged.addresses import collisions, is_loopback, split_address
from bridged.errors import ConfigError
from bridged.redaction import hide
from bridged.settings import SECRETS, Config, Seconds, Section, Size

NO_CREDENTIAL: Final = "mixpanel has no credential: set service_account, api_secret or token (or export = false)"
WITH_SYSTEMD: Final = (
    "if systemd hands secrets to the daemon: run this as root, with "
    "CREDENTIALS_DIRECTORY=/run/credentials/bridged.service (or bridged@NAME.service)"
)


_PATHS: Final = ("path", "_file", "tls_cert", "tls_key")
_PLACES: Final = (Path("config.toml"), Path("/etc/bridged/config.toml"))


class Key(NamedTuple):
    """One key of the configuration: where it stands, its struct type, its default and what it is for."""

    path: tuple[str, ...]
    type: Any
    default: Any
    description: str


def _plain(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def sections(struct: type[Struct], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type[Struct]]]:
    """Every section in it, by where it stands."""
    for field in msgspec.structs.fields(struct):
        if isinstance(field.type, type) and issubclass(field.type, Section):
            yield (*path, field.name), field.type
            yield from sections(field.type, (*path, field.name))


def keys() -> Iterator[Key]:
    """Every key, in the order of config.toml."""
    for path, struct in sections(Config):
        for field in msgspec.structs.fields(struct):
            if isinstance(field.type, type) and issubclass(field.type, Section):
                continue
            description = next(m.description or "" for m in get_args(field.type) if isinstance(m, Meta))
            default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
            yield Key((*path, field.name), _plain(field.type), default, description)


def find_config(flag: str | None) -> Path | None:
    """`--config`, else $BRIDGED_CONFIG, else ./config.toml, else /etc/bridged/config.toml, else none. Raises ConfigError."""
    if flag == "":  # as a variable of a script's that isn't set
        raise ConfigError("--config names no file", "give one, or leave --config out")
    if flag or os.environ.get("BRIDGED_CONFIG"):
        return Path(flag or os.environ["BRIDGED_CONFIG"])
    return next(filter(_may_be_there, _PLACES), None)


def _may_be_there(path: Path) -> bool:
    """Also if its folder is not for us to enter, or if it is a link to nothing: who reads it is told."""
    try:
        return bool(path.lstat())
    except OSError as error:
        return isinstance(error, PermissionError)


def load(
    path: Path | None,
    environ: Mapping[str, str] = os.environ,
    *,
    secrets: Collection[tuple[str, ...]] = SECRETS,
) -> Config:
    """The configuration of a file and an environment. `secrets`: those that are wanted. Of others no file is read, and
    nobody complains that they are missing: a command may not be allowed to read what it doesn't need.

    Raises ConfigError that names the file and the key for anything unreadable, unknown, ill-typed or contradictory.
    """
    where = str(path) if path else "the environment"
    raw = _read(path, environ)
    try:
        config = convert(raw)
    except msgspec.ValidationError as error:
        raise _explained(where, error, environ) from error
    config = _with_secrets(config, environ, secrets)
    if path and any(name.startswith("BRIDGED__") for name in environ):
        where += " and the environment"
    credentials = environ.get("CREDENTIALS_DIRECTORY")
    hint = WITH_SYSTEMD if credentials is None else ""
    if credentials and not os.path.exists(credentials):  # noqa: PTH110  # which says no where we may not look
        hint = f"{credentials} isn't there: systemd makes it when the service starts, and removes it when that ends"
    demand_good(config, where, complete=secrets is SECRETS, about_secrets=hint)
    return config


def load_admin(path: Path | None, environ: Mapping[str, str] = os.environ) -> Config:
    """Of a file that `load` refuses, [admin] alone: where the daemon that runs is asked what it thinks of it.

    Raises ConfigError if that can't be used either.
    """
    admin = _read(path, environ).get("admin", {})
    try:
        return _with_secrets(convert({"admin": admin}), environ, [("admin", "token")])
    except msgspec.ValidationError as error:
        raise _explained(str(path), error, environ) from error


def _read(path: Path | None, environ: Mapping[str, str]) -> dict[str, Any]:
    """What a file and the environment say. Raises ConfigError."""
    raw: dict[str, Any] = {}
    if path is not None:
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows begin it with a mark
        except (OSError, UnicodeDecodeError) as error:
            hint = "run this as root, or as who may read it" if isinstance(error, PermissionError) else ""
            hint = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else hint
            raise ConfigError(f"can't read the configuration {path}: {error}", hint) from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits is no TOMLDecodeError
            raise ConfigError(f"{path} is not valid TOML: {error}") from error
    _apply_environment(raw, environ)
    return raw


def demand_good(config: Config, where: str = "", *, complete: bool = True, about_secrets: str = "") -> None:
    """Raises ConfigError for what contradicts itself, and if it is `complete`, for secrets that are missing, with a hint
    `about_secrets`. From here on its secrets are masked in whatever is said.

    A credential may be missing as long as there is a page to give it on.
    """
    hide(spoken_secrets(config))
    problems, missing = list(_problems(config)), list[str]()
    if complete:
        missing += _missing_secrets(config)
        if config.mixpanel.export and not has_credential(config) and not config.admin.listen:
            missing.append(NO_CREDENTIAL)
    if problems or missing:
        told = (f"{where}: " if where else "") + "\n  ".join(problems + missing)
        about_types = "`bridged send-test-events --list` names the types" if "no event type" in told else ""
        raise ConfigError(told, about_secrets if missing else about_types)


def has_credential(config: Config) -> bool:
    """Whether there is anything to show to Mixpanel, or nothing to be shown."""
    if not config.mixpanel.export:
        return True
    return bool(config.mixpanel.service_account or config.mixpanel.api_secret or config.mixpanel.token)


def convert(raw: Mapping[str, Any]) -> Config:
    """Nested plain data as a configuration. Raises msgspec.ValidationError."""
    return msgspec.convert(raw, Config, dec_hook=_convert)


def _convert(kind: type, value: object) -> object:
    if kind in (Size, Seconds):
        return kind.parse(value)
    raise NotImplementedError(kind)


# By msgspec's names of types.
_WRITTEN: Final = {
    "str": 'text stands in quotes: "..."',
    "bool": "true or false, without quotes",
    "int": "a whole number, without quotes",
    "float": "a number, without quotes",
    "array": 'a list stands in brackets: ["..."]',
}


def _explained(where: str, error: msgspec.ValidationError, environ: Mapping[str, str]) -> ConfigError:
    """Turns msgspec's path (`$.mixpanel`) into the file's own terms (`[mixpanel]`); a variable goes by its name."""
    message, _, at = str(error).partition(" - at `$")
    place = at.rstrip("`").lstrip(".")
    within = place.partition("[")[0]  # the key, without what msgspec says of a place in its value
    unknown = re.search(r"unknown field `(.+)`", message)
    if unknown:
        known = [k.path[-1] for k in keys() if ".".join(k.path[:-1]) == place] or [
            ".".join(p) for p, _ in sections(Config)
        ]
        near = difflib.get_close_matches(unknown[1], known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return ConfigError(f"{where}: {f'[{place}]' if place else 'the top level'} has no key {unknown[1]!r}", hint)
    hint = ""
    key = next((key for key in keys() if ".".join(key.path) == within), None)
    if key is not None and _variable(key) in environ:
        where = f"the environment variable {_variable(key)}"
    if key is not None and (get_origin(key.type) is Literal or message.startswith("Invalid enum value")):
        hint = "one of: " + ", ".join(choices(key.type))
    elif place == "events.names[...]" and message.endswith("got `object`"):
        hint = 'event types have dots, so they stand in quotes: "users.messages.email.Send" = "Mail sent"'
    elif expected := re.match(r"Expected `(\w+)`, got", message):
        hint = _WRITTEN.get(expected[1], "")
    return ConfigError(f"{where}: {within or 'the top level'}: {message}", hint)


def choices(kind: Any) -> tuple[str, ...]:
    """The words that may stand in a value, wherever in it."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return next(filter(None, map(choices, get_args(kind))), ())


def _variable(key: Key) -> str:
    return "__".join(("BRIDGED", *key.path)).upper()


def _apply_environment(raw: dict[str, Any], environ: Mapping[str, str]) -> None:
    """Puts `BRIDGED__SECTION__KEY` values into `raw`: text as it is, other types as TOML writes them."""
    by_name = {_variable(key): key for key in keys()}
    by_words = {re.sub("_+", "_", name): name for name in by_name}
    for name, value in environ.items():
        if not name.startswith("BRIDGED__"):
            # With underscores lost, or too many in the wrong place. Others begin so, too: those of our own tests, Kubernetes'.
            if meant := by_words.get(re.sub("_+", "_", name)):
                raise ConfigError(f"the environment variable {name} names no key", f"did you mean {meant}?")
            continue
        key = by_name.get(name)
        if key is None:
            # Without what all of them begin with: by that they are all alike.
            near = difflib.get_close_matches(name[9:], [known[9:] for known in by_name], 1)
            hint = (
                f"did you mean BRIDGED__{near[0]}?"
                if near
                else "the names are BRIDGED__SECTION__KEY, as in config.toml"
            )
            raise ConfigError(f"the environment variable {name} names no key", hint)
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
        raise ConfigError(f"the environment variable {name}={value!r} is no TOML value", 'as true, 8, ["a"]') from error


def _with_secrets(config: Config, environ: Mapping[str, str], wanted: Iterable[tuple[str, ...]]) -> Config:
    for path in wanted:
        section: Any = config
        for name in path[:-1]:
            section = getattr(section, name)
        if getattr(section, path[-1]):
            continue
        file = getattr(section, f"{path[-1]}_file")
        credential = (
            Path(environ["CREDENTIALS_DIRECTORY"], "_".join(path)) if "CREDENTIALS_DIRECTORY" in environ else None
        )
        source = Path(file) if file else credential if credential and _may_be_there(credential) else None
        if source is None:
            continue
        try:
            secret = source.read_text(encoding="utf-8-sig").strip()  # as for the configuration: a mark of Windows
        except (OSError, UnicodeDecodeError) as error:
            # Read by root, it passes `check`; the unit's service is another user.
            hint = f"for the systemd unit put it into /etc/credstore/bridged.{'_'.join(path)} instead"
            denied = isinstance(error, PermissionError)
            raise ConfigError(f"can't read {'.'.join(path)} from {source}: {error}", hint if denied else "") from error
        if not secret:
            raise ConfigError(f"can't read {'.'.join(path)} from {source}: it is empty")
        if problem := secret_problem(secret, path):
            raise ConfigError(f"can't use {'.'.join(path)} from {source}: {problem}")
        config = replaced(config, path, secret)
    return config


# Secrets that are encoded before they are put into a header, or aren't in one.
_OF_ANY_LETTERS: Final = {
    ("mixpanel", "api_secret"),
    ("mixpanel", "service_secret"),
    ("cohorts", "password"),
    ("alerts", "webhook_url"),
}


def secret_problem(secret: str, path: tuple[str, ...] = ()) -> str:
    """What is wrong with a secret that no header can carry; it isn't quoted. Empty: nothing."""
    if path in _OF_ANY_LETTERS:
        return "" if secret.isprintable() else "expected one line of printable characters"
    if not (secret.isprintable() and secret.isascii()):
        return "expected printable ASCII, in one line: was it copied whole, and nothing else?"
    return "it has blanks around it" if secret != secret.strip() else ""


def secret_files(config: Config, environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Where secrets come from, or would, if the file were there: `*_file` keys and `$CREDENTIALS_DIRECTORY`."""
    files = []
    for path in SECRETS:
        if file := value_at(config, (*path[:-1], f"{path[-1]}_file")):
            files.append(Path(file))
        elif "CREDENTIALS_DIRECTORY" in environ:
            files.append(Path(environ["CREDENTIALS_DIRECTORY"], "_".join(path)))
    return files


def value_at(config: Config, path: tuple[str, ...]) -> Any:
    """One value, by the path of its key."""
    value: Any = config
    for name in path:
        value = getattr(value, name)
    return value


def spoken_secrets(config: Config) -> Iterator[str]:
    """Every secret that is set, and the pairs that Basic authentication makes of them."""
    for path in SECRETS:
        if secret := value_at(config, path):
            names = (config.mixpanel.service_account, config.cohorts.username)
            yield from (secret, f"{secret}:", *[f"{name}:{secret}" for name in names])


def replaced(struct: Any, path: tuple[str, ...], value: object) -> Any:
    """A copy of a section with another value at a path."""
    if len(path) > 1:
        value = replaced(getattr(struct, path[0]), path[1:], value)
    return msgspec.structs.replace(struct, **{path[0]: value})


def with_credentials(config: Config, changes: Mapping[str, str]) -> Config:
    """The configuration with other values in [mixpanel]. Raises ConfigError if they contradict each other."""
    config = msgspec.structs.replace(config, mixpanel=msgspec.structs.replace(config.mixpanel, **changes))
    hide(spoken_secrets(config))
    if problems := [*_problems(config), *_missing_secrets(config)]:
        raise ConfigError("; ".join(problems))
    return config


def _problems(config: Config) -> Iterator[str]:
    """What no type can say. Empty means that the daemon may start."""
    for path in SECRETS:
        if problem := secret_problem(value_at(config, path), path):
            yield f"{'.'.join(path)}: {problem}"
    paths = [(".".join(key.path), value_at(config, key.path)) for key in keys() if key.path[-1].endswith(_PATHS)]
    paths += [("sources.stream.listen", each.removeprefix("unix:")) for each in config.sources.stream.listen]
    for name, place in paths:
        if place.startswith("~"):
            yield f"{name}: ~ stands for no folder here: write it out"
        elif "\0" in place:
            yield f"{name}: no path holds a NUL"
    mixpanel = config.mixpanel
    if config.cohorts.enabled:
        yield from _cohort_problems(config)
    elif not mixpanel.export:
        yield "mixpanel.export and cohorts.enabled are both false: nothing is left to be done"
    yield from _url_problems("mixpanel.url", mixpanel.url, _BASE, "host, without credentials or query")
    hook = config.alerts.webhook_url
    yield from _url_problems("alerts.webhook_url", hook, r"(/\S*)?", "host/path, without a user and password")
    if mixpanel.project_id and not mixpanel.project_id.isdecimal():
        # Not quoted: it may be the secret, in the wrong line.
        yield "mixpanel.project_id: expected a number, as the project's settings show it"
    yield from event_rules.problems(config.events)
    for name, value in (("sources.http.listen", config.sources.http.listen), ("admin.listen", config.admin.listen)):
        if value:
            yield from _address_problems(name, value)
    http, stream, admin = config.sources.http, config.sources.stream, config.admin
    if bool(admin.tls_cert) != bool(admin.tls_key):
        yield "admin.tls_cert and admin.tls_key: TLS needs both"
    for value in stream.listen:
        kind, _, rest = value.partition(":")
        if kind == "tcp":
            yield from _address_problems("sources.stream.listen", rest)
            if _is_remote(rest) and not stream.allow_remote:
                yield f"sources.stream.listen: {rest} is reachable from other machines: set allow_remote = true to permit it"
        elif kind != "unix" or not rest:
            yield f'sources.stream.listen: expected "tcp:host:port" or "unix:path", got {value!r}'
    for found in collisions(http.listen, admin.listen, *stream.listen):
        yield f"{found} of two listeners: see sources.http.listen, sources.stream.listen, admin.listen"
    if config.delivery.max_batch_bytes < 2**20 or config.delivery.max_batch_bytes > 10_485_760:
        yield "delivery.max_batch_bytes: between 1MiB (the largest single event) and 10MiB"
    for name, size in (("sources.http.max_body", http.max_body), ("sources.stream.max_line", stream.max_line)):
        if size < 1024:
            yield f"{name}: at least 1KiB"
    if http.max_in_flight < 1.5 * http.max_body:
        yield "sources.http.max_in_flight: at least one and a half times sources.http.max_body"
    if stream.max_unfinished < 2 * stream.max_line:
        yield "sources.stream.max_unfinished: at least twice sources.stream.max_line"
    for name, door in (("sources.http", http), ("sources.stream", stream)):
        if bool(door.tls_cert) != bool(door.tls_key):
            yield f"{name}: tls_cert and tls_key go together"
    for name, waiting in (("delivery", config.delivery), ("braze", config.braze)):
        for key, length in (("timeout", waiting.timeout), ("probe_interval", waiting.probe_interval)):
            if length <= 0:
                yield f"{name}.{key}: more than 0s"
    # Elsewhere 0 is "no limit"; here it would be the end of every event.
    if config.retention.max_age <= 0:
        yield 'retention.max_age: more than 0s (on_expiry = "keep" is never)'
    if config.retention.on_expiry == "archive" and not config.retention.archive_path:
        yield "retention.archive_path: expected a folder"
    if config.alerts.undelivered <= 0:
        yield "alerts.undelivered: more than 0s"
    for host in admin.hosts:
        if not re.fullmatch(r"[^\s:/]+", host):
            yield f"admin.hosts: expected a name alone, without http://, port and path, got {host!r}"
    if Path(config.spool.path).name == "":
        yield f"spool.path: expected a file, got {config.spool.path!r}"
    if config.spool.max_bytes < 16 * 2**20:
        yield "spool.max_bytes: at least 16MiB"


def _cohort_problems(config: Config) -> Iterator[str]:
    cohorts, braze, http = config.cohorts, config.braze, config.sources.http
    if not http.listen:
        yield "cohorts.enabled needs sources.http.listen: Mixpanel posts them there"
    if cohorts.password and (":" in cohorts.username or not cohorts.username):
        yield "cohorts.username: expected a name without a colon"
    yield from cohort_rules.problems(config)
    yield from _url_problems("braze.url", braze.url, _BASE, "host, without credentials or query")
    if not (braze.url or braze.cluster):
        yield "braze.cluster is not set: it is in your dashboard's address (US-01, EU-02, ...)"
    if braze.partner_name and not re.fullmatch(r"[A-Za-z0-9_-]+", braze.partner_name):
        yield "braze.partner_name: expected letters, digits, - and _"


def _missing_secrets(config: Config) -> Iterator[str]:
    """What must not be without a secret."""
    mixpanel, cohorts, braze, admin, http = (
        *(config.mixpanel, config.cohorts, config.braze, config.admin),
        config.sources.http,
    )
    if mixpanel.service_account and not (mixpanel.service_secret and mixpanel.project_id):
        yield "mixpanel.service_account needs mixpanel.service_secret and mixpanel.project_id"
    if http.listen and mixpanel.export and not http.bearer_token and _is_remote(http.listen):
        yield "sources.http.listen is reachable from other machines: set sources.http.bearer_token"
    if admin.listen and not admin.token and _is_remote(admin.listen):
        yield "admin.listen is reachable from other machines: set admin.token"
    if not cohorts.enabled:
        return
    if http.listen and not cohorts.password and _is_remote(http.listen):
        yield "sources.http.listen is reachable from other machines: set cohorts.password"
    if not (braze.rest_key or braze.partner_key):
        yield "braze has no key: set rest_key (or, as one of Braze's partners, partner_key)"
    if braze.partner_key and not (braze.data_import_key and braze.partner_name):
        yield "braze.partner_key needs braze.data_import_key and braze.partner_name"


_BASE: Final = r"(/[^@\s?#]*)?"  # an address that others are made of


def _url_problems(name: str, url: str, path: str, expected: str) -> Iterator[str]:
    """Nothing is quoted: what stands before an @ is a secret."""
    if url and not re.fullmatch(rf"https?://[^/@\s]+{path}", url):
        yield f"{name}: expected http(s)://{expected}"
    elif url:
        try:
            parts = urlsplit(url)
            usable = bool((parts.hostname or "").encode("idna")) and parts.port != 0
        except ValueError:  # a part of the name that is empty, or has more than 63 letters
            usable = False
        if not usable:
            yield f"{name}: its host can't be one: is there a slip in it?"


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


def masked(config: Config) -> dict[str, Any]:
    """The configuration as plain data with every secret replaced: for logs, `check` and the API."""
    for path in SECRETS:
        if value_at(config, path):
            config = replaced(config, path, "********")
    plain: dict[str, Any] = msgspec.to_builtins(config, enc_hook=str)
    return plain
