"""What was saved on the page: a file beside the spool that goes before the configuration, key by key.

It is written whole, under another name, and takes its place by a rename, both fsynced: after a kill or a power cut there is the
old one or the new one. One that can't be read is set aside and told of, and the configuration alone is in force. It holds
secrets, so it is the daemon's alone to read. Nobody should have to edit it; whoever does, finds TOML.
"""

import contextlib
import hashlib
import os
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from bridged.config import Key, choices, convert, demand_good, keys, replaced, secret_problem, toml_value, value_at
from bridged.durable import settle_file
from bridged.errors import BridgedError, ConfigError
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


def is_secret(key: Key) -> bool:
    """Whether nobody may read it back."""
    return key.path in SECRETS


class Saved:
    """The file and what it says. `values` are by the name of the key, e.g. "mixpanel.region"."""

    def __init__(self, spool_path: str, clock: Callable[[], float] = time.time) -> None:
        self.path = Path(f"{spool_path}.settings.toml")
        self._part = self.path.with_name(f"{self.path.name}.part")
        self.values: dict[str, Any] = {}
        self.problem = ""  # why some of it, or all, isn't in force
        self.revision = 0  # rises with every change, also over restarts
        self._clock = clock
        self._seen: set[bytes] = set()  # of secrets that came from outside: digests
        self.revise()

    def revise(self) -> None:
        """Something that the page shows of the settings has changed."""
        self.revision = max(self.revision + 1, int(self._clock() * 1000))

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self, *, set_aside: bool = False) -> None:
        """Reads the file. Never raises: `problem` says what is wrong. A file that makes no sense is renamed, if so wished."""
        self.values, self.problem = {}, ""
        try:
            raw = tomllib.loads(self.path.read_text(encoding="utf-8-sig"))  # some editors begin with a mark
        except FileNotFoundError:
            return
        except OSError as error:
            self.problem = f"the settings that were saved on the page can't be read: {error}"
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            self.problem = (
                f"the settings that were saved on the page are not in force: {self.path} is damaged ({error})"
            )
            if set_aside:
                self._set_aside()
        else:
            found, wrong = checked(dict(_flat(raw)))
            self.values = found
            if wrong:
                said = "; ".join(f"{name}: {problem}" for name, problem in wrong.items())
                self.problem = f"of the settings that were saved on the page, these are not in force: {said}"

    def _set_aside(self) -> None:
        aside = self.path.with_name(f"{self.path.name}.broken-{int(self._clock())}")
        try:
            self.path.rename(aside)
        except OSError as error:
            self.problem += f"; it can't be set aside: {error}"
        else:
            self.problem += f"; it was set aside as {aside.name}"

    def in_force(self, config: Config, *, complete: bool = True) -> Config:
        """The configuration with what was saved, but for a value that is bad, or contradicts it: `problem` says so.

        Without all of it, if it isn't that simple; but with what of [events] is in order: what is left out, removed or hashed
        there must not leave because something else is wrong.
        """
        try:
            return applied(config, self.values, complete=complete)
        except ConfigError as error:
            said = " ".join(str(error.args[0]).split())
        for names in (*([name] for name in self.values), _bad_alone(config, self.values)):
            values = {name: value for name, value in self.values.items() if name not in names}
            with contextlib.suppress(ConfigError):
                found = applied(config, values, complete=complete)
                these = f"these are not in force: {', '.join(names)}: {said}"
                self.problem += ("; " if self.problem else "") + f"of the settings that were saved on the page, {these}"
                self.values = values
                return found
        kept: list[str] = []
        events = {name: value for name, value in self.values.items() if name.startswith("events.")}
        for name in (*events, *events):  # twice: one may need another that comes after it
            if name not in kept:
                with contextlib.suppress(ConfigError):
                    config = applied(config, {name: events[name]}, complete=complete)
                    kept.append(name)
        what = f"only {', '.join(kept)} {'is' if len(kept) == 1 else 'are'}" if kept else "none is"
        self.problem = f"of the settings that were saved on the page {what} in force: with the configuration, {said}"
        return config

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
        if wrong:
            raise BadSettings("; ".join(f"{name}: {problem}" for name, problem in wrong.items()), wrong)
        return {name: value for name, value in {**self.values, **wanted}.items() if name not in remove}

    def write(self, values: Mapping[str, Any]) -> None:
        """Puts the file in place, for good. Raises OSError, and what was there is there still. Blocks: not for the loop."""
        file = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(file, 0o600)  # also if somebody had made it
            with open(file, "wb", closefd=False) as whole:  # a descriptor
                whole.write(f"{_HEADER}{toml(values)}".encode())
        finally:
            os.close(file)
        settle_file(self._part, self.path)

    def sweep(self) -> None:
        """Removes what a kill left half written: it holds secrets. For whoever has the spool, and no save under way."""
        with contextlib.suppress(OSError):
            self._part.unlink()

    def write_again(self) -> bool:
        """Puts the file back if it said something and is gone; gives whether that was so. Raises OSError. Blocks."""
        if not self.values or self.path.exists():
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


def _bad_alone(config: Config, values: Mapping[str, Any]) -> list[str]:
    """Values that a configuration can't have, whatever the others are. Those of [events] may need each other."""
    events = {name: value for name, value in values.items() if name.startswith("events.")}
    groups = [events, *({name: value} for name, value in values.items())]
    good: set[str] = set()
    for group in groups:
        with contextlib.suppress(ConfigError):
            applied(config, group, complete=False)
            good |= group.keys()
    return [name for name in values if name not in good]


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
                wrong[name] = f"expected {' | '.join(words)}"
    return found, wrong


def toml(values: Mapping[str, Any], *, placeholders: bool = False) -> str:
    """Values as TOML. With `placeholders` secrets are left out, and told of in a comment."""
    lines: list[str] = []
    section: tuple[str, ...] = ()
    for name, key in EDITABLE.items():
        if name not in values:
            continue
        if key.path[:-1] != section:
            section = key.path[:-1]
            lines += ["", f"[{'.'.join(section)}]"]
        if placeholders and is_secret(key) and values[name]:
            lines.append(f'# {key.path[-1]} = "..."  # a secret that was saved: not shown')
        else:
            lines.append(f"{key.path[-1]} = {toml_value(values[name])}")
    return "\n".join(lines) + "\n" if lines else ""


def _flat(raw: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """A file's values by the names of their keys; what is below a key is its value."""
    for name, value in raw.items():
        at = (*path, name)
        dotted = ".".join(at)
        if isinstance(value, dict) and dotted not in EDITABLE and len(at) < 3:
            yield from _flat(value, at)
        else:
            yield dotted, value


def read_for(config: Config) -> Saved:
    """For commands: what the daemon of a configuration has saved. The file stays where it is, whatever is in it."""
    saved = Saved(config.spool.path)
    saved.read()
    path = Path(config.spool.path)
    if not (path.is_absolute() or path.exists() or saved.values or saved.problem):
        saved.problem = (
            f"whether settings were saved on the page can't be seen: spool.path is relative, and there is no {path} in "
            f"{Path.cwd()}; from the daemon's working directory it could, once it has run"
        )
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
