"""What was saved on the page: a file beside the spool that goes before the configuration, key by key.

It is written whole, under another name, and takes its place by a rename, both fsynced: after a kill or a power cut there is the
old one or the new one. It is configuration, and a start refuses it like that: without it, what was to be left out, removed or
hashed would leave in plain. It holds secrets, so it is the daemon's alone to read. Nobody should have to edit it; whoever does,
finds TOML.
"""

import contextlib
import hashlib
import os
import re
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from bridged.config import Key, choices, convert, demand_good, keys, replaced, secret_problem, value_at
from bridged.config_text import toml_value
from bridged.durable import settle_file
from bridged.errors import BridgedError, ConfigError, whose
from bridged.redaction import hide
from bridged.settings import SECRETS, Config

# Sections whose keys the page may change, and single keys. All of them take effect at once.
_SECTIONS: Final = ("mixpanel", "events")
_KEYS: Final = frozenset(
    {
        ("sources", "http", "bearer_token"),
        ("retention", "max_age"),
        ("retention", "on_expiry"),
        *[("alerts", name) for name in ("webhook_url", "webhook_token", "spool_share", "undelivered")],
        *[
            ("delivery", name)
            for name in (
                *("max_events_per_second", "max_bytes_per_minute", "max_concurrency"),
                *("flush_interval", "timeout", "probe_interval"),
            )
        ],
    }
)
# Different ones, in the life of a process.
_MAX_SECRETS: Final = 200
_HEADER: Final = """\
# Saved on bridged's page: each key goes before that of config.toml and of the environment.
# Written by the daemon, at each save. To take a key back, use the page, or stop the daemon and delete its line.
"""
_HINT: Final = (
    "mend the line, or delete it to give up that setting, or rename the file to give up all; nothing was changed"
)
_NOT_OURS: Final = "run a command as root, or as who may read it; the daemon's file is to be the daemon's user's"


class BadSettings(BridgedError):
    """Values that can't be saved; `keys` says what is wrong with which."""

    http_status = 400

    def __init__(self, message: str, of: Mapping[str, str], hint: str = "nothing was changed") -> None:
        super().__init__(message, hint)
        self.keys = dict(of)


class SaveUnderWay(BridgedError):
    """Two changes at once, or one that was made without having seen the other."""

    http_status = 409


def _editable() -> Iterator[Key]:
    for key in keys():
        if key.path in _KEYS or (key.path[0] in _SECTIONS and not key.path[-1].endswith(("_file", "export"))):
            yield key


EDITABLE: Final = {".".join(key.path): key for key in _editable()}
_TABLES: Final = {key.path[:length] for key in EDITABLE.values() for length in range(1, len(key.path))}


def is_secret(key: Key) -> bool:
    """Whether nobody may read it back."""
    return key.path in SECRETS


class Saved:
    """The file and what it says. `values` are by the name of the key, e.g. "mixpanel.region"."""

    def __init__(self, spool_path: str, clock: Callable[[], float] = time.time) -> None:
        self.path = Path(f"{spool_path}.settings.toml")
        self._part = self.path.with_name(f"{self.path.name}.part")
        self.values: dict[str, Any] = {}
        self.unknown: dict[tuple[str, ...], Any] = {}  # what another version has saved, by its place: kept
        self.problem = ""  # why some of it isn't in force
        self.revision = 0  # rises with every change, also over restarts
        self._clock = clock
        self._seen: set[bytes] = set()  # of secrets that came from outside: digests
        self.revise()

    def revise(self) -> None:
        """Something that the page shows of the settings has changed."""
        self.revision = max(self.revision + 1, int(self._clock() * 1000))

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self) -> None:
        """Reads the file. Raises ConfigError if it can't be, or holds what can't be in force, whatever the configuration says.

        Keys that this version doesn't have, or not for the page, are told of in `problem`: there is nothing to put in force.
        But below [events] they may be what keeps something from leaving.
        """
        self.values, self.unknown, self.problem = {}, {}, ""
        try:
            raw = tomllib.loads(self.path.read_text(encoding="utf-8-sig"))  # some editors begin with a mark
        except OSError as error:
            if isinstance(error, FileNotFoundError | NotADirectoryError) and not os.path.lexists(self.path):
                return
            hint = whose(error, self.path, _NOT_OURS if isinstance(error, PermissionError) else _HINT)
            raise ConfigError(f"can't read what was saved on the page: {error}", hint) from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits is no TOMLDecodeError
            raise self._refused(f"it is damaged: {error}") from error
        self.values, self.unknown, wrong = _understood(raw)
        if wrong:
            raise self._refused("\n  ".join(f"{name}: {problem}" for name, problem in wrong.items()))
        if self.unknown:
            names = ", ".join(".".join(path)[:200] for path in self.unknown)
            why = "this version of bridged has no such key, or none that can be changed there"
            self.problem = f"saved on the page, and not in force: {names}; {why}. The file keeps it: {self.path}"

    def in_force(self, config: Config, *, complete: bool = True) -> Config:
        """The configuration with what was saved. Raises ConfigError if they contradict each other."""
        try:
            return applied(config, self.values, complete=complete)
        except ConfigError as error:
            raise self._refused(f"with the configuration it can't be in force: {error.args[0]}", error.hint) from error

    def _refused(self, said: str, hint: str = "") -> ConfigError:
        return ConfigError(f"{self.path}, saved on the page: {said}", "; ".join(filter(None, (_HINT, hint))))

    # -- writing ------------------------------------------------------------------------------------------------------

    def checked(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """As `checked`, of what comes from outside: each secret is masked in all that is said ever after, so they are counted."""
        new = {name: value for name, value in given.items() if name in EDITABLE and is_secret(EDITABLE[name]) and value}
        digests = {name: hashlib.sha256(repr(value).encode()).digest() for name, value in new.items()}
        if len(self._seen | set(digests.values())) > _MAX_SECRETS:
            return {}, dict.fromkeys(
                digests, "too many different secrets were tried: restart the daemon, and try again"
            )
        self._seen |= set(digests.values())
        return checked(given)

    def with_changes(self, given: Mapping[str, Any], remove: Sequence[str]) -> dict[str, Any]:
        """The values as they would be. Raises BadSettings, and changes nothing."""
        wanted, wrong = self.checked(given)
        wrong |= {name: "there is no such key, or it can't be changed here" for name in remove if name not in EDITABLE}
        wrong |= {name: "both set and removed" for name in remove if name in given}
        for name, value in wanted.items():  # the next start shall not be refused for it
            wrong |= _understood(tomllib.loads(toml({name: value})))[2]
        if wrong:
            raise BadSettings("; ".join(f"{name}: {problem}" for name, problem in wrong.items()), wrong)
        return {name: value for name, value in {**self.values, **wanted}.items() if name not in remove}

    def write(self, values: Mapping[str, Any]) -> None:
        """Puts the file in place, for good. Raises OSError, and what was there is there still. Blocks: not for the loop."""
        file = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(file, 0o600)  # also if somebody had made it
            with open(file, "wb", closefd=False) as whole:  # a descriptor
                whole.write(f"{_HEADER}{toml(values, unknown=self.unknown)}".encode())
        finally:
            os.close(file)
        settle_file(self._part, self.path)

    def sweep(self) -> None:
        """Removes what a kill left half written: it holds secrets. For whoever has the spool, and no save under way."""
        with contextlib.suppress(OSError):
            self._part.unlink()

    def write_again(self) -> bool:
        """Puts the file back if it said something and is gone; gives whether that was so. Raises OSError. Blocks."""
        if not (self.values or self.unknown) or self.path.exists():
            return False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.write(self.values)
        return True

    def overridden(self, configured: Config) -> dict[str, dict[str, Any]]:
        """By key: what the configuration says, and what was saved instead. Secrets are masked."""
        return {
            name: {
                "configured": shown(EDITABLE[name], value_at(configured, EDITABLE[name].path)),
                "saved": shown(EDITABLE[name], value),
            }
            for name, value in self.values.items()
        }


def shown(key: Key, value: Any) -> Any:
    """A value as plain data, for people; a secret is masked."""
    if is_secret(key):
        return "********" if value else ""
    return msgspec.to_builtins(value, enc_hook=str)


def applied(config: Config, values: Mapping[str, Any], *, complete: bool = True) -> Config:
    """The configuration with other values. Raises ConfigError if they contradict each other, or if it is `complete` and lacks
    a secret.
    """
    for name, value in values.items():
        config = replaced(config, EDITABLE[name].path, value)
    demand_good(config, complete=complete)
    return config


def checked(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Plain values, each as the type of its key, and what is wrong with the others."""
    found: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for name, plain in given.items():
        key = EDITABLE.get(name)
        if key is None:
            wrong[name[:200]] = "there is no such key, or it can't be changed here"
            continue
        value = plain.strip() if isinstance(plain, str) else plain
        if is_secret(key) and isinstance(value, str):
            hide([value])
            if problem := secret_problem(value):
                wrong[name] = problem
                continue
        nested: Any = value
        for part in reversed(key.path):
            nested = {part: nested}
        try:
            found[name] = value_at(convert(nested), key.path)
        except msgspec.ValidationError as error:
            # What stands behind it is msgspec's own way to say where.
            wrong[name] = str(error).partition(" - at `$")[0]
            if words := choices(key.type):
                which = f"{wrong[name]}: " if isinstance(plain, dict) else ""
                wrong[name] = f"{which}expected {' | '.join(words)}"
    return found, wrong


def toml(
    values: Mapping[str, Any], *, placeholders: bool = False, unknown: Mapping[tuple[str, ...], Any] | None = None
) -> str:
    """Values as TOML, and such as are `unknown` by their places. With `placeholders` secrets are left out, and told of in a
    comment.
    """
    sections: dict[tuple[str, ...], list[str]] = {(): []}  # before any table
    for name, key in EDITABLE.items():
        if name not in values:
            continue
        line = f"{key.path[-1]} = {toml_value(values[name])}"
        if placeholders and is_secret(key) and values[name]:
            line = f'# {key.path[-1]} = "..."  # a secret that was saved: not shown'
        sections.setdefault(key.path[:-1], []).append(line)
    for path, value in (unknown or {}).items():
        sections.setdefault(path[:-1], []).append(f"{_word(path[-1])} = {toml_value(value)}")
    lines: list[str] = []
    for section, found in sections.items():
        if found:
            lines += ["", *([f"[{'.'.join(map(_word, section))}]"] if section else []), *found]
    return "\n".join(lines) + "\n" if lines else ""


def _word(name: str) -> str:
    """A part of a key as TOML writes it."""
    return name if re.fullmatch("[A-Za-z0-9_-]+", name) else toml_value(name)


def _flat(raw: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A file's values by the places of their keys; what is below a key is its value."""
    for name, value in raw.items():
        at = (*path, name)
        if isinstance(value, dict) and ".".join(at) not in EDITABLE and len(at) < 3:
            yield from _flat(value, at)
        else:
            yield at, value


def _understood(raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[tuple[str, ...], Any], dict[str, str]]:
    """A file's values by the names of their keys, what this version doesn't know, by its place, and what is wrong with others."""
    given: dict[str, Any] = {}
    unknown: dict[tuple[str, ...], Any] = {}
    wrong: dict[str, str] = {}
    for path, value in _flat(raw):
        name = ".".join(path)
        if name in EDITABLE and EDITABLE[name].path == path:
            given[name] = value
        elif path in _TABLES:
            wrong[name] = "expected a table"
        elif name in EDITABLE or name.startswith("events."):
            wrong[name[:200]] = "there is no such key" + (": it stands in quotes" if name in EDITABLE else "")
        else:
            unknown[path] = value
    found, bad = checked(given)
    return found, unknown, wrong | bad


def read_for(config: Config) -> Saved:
    """For commands: what the daemon of a configuration has saved. Raises ConfigError as a start would, but for a folder that
    isn't for us to look into.
    """
    saved = Saved(config.spool.path)
    path, why = Path(config.spool.path), ""
    try:
        saved.read()
    except ConfigError as error:
        if not isinstance(error.__cause__, PermissionError) or os.path.lexists(saved.path):
            raise
        why = f"{error.__cause__}; {_NOT_OURS}"
    if not (why or path.is_absolute() or path.exists() or saved.path.exists()):
        why = f"spool.path is relative, and there is no {path} in {Path.cwd()}; run this in the daemon's working directory"
    if why:
        saved.problem = f"whether settings were saved on the page can't be seen: {why}"
    return saved


def in_words(name: str, before: Config, after: Config) -> str:
    """A changed key in words; of a secret, or a list, nothing but that it changed."""
    key = EDITABLE.get(name)
    if key is None or is_secret(key):
        return name
    old, new = value_at(before, key.path), value_at(after, key.path)
    if not isinstance(new, str | int | float):
        return name
    return f"{name} is {str(new) or 'empty'} (was {str(old) or 'empty'})"
