"""A configuration as text: config.toml, and a value in it."""

from datetime import date, time
from typing import Any

import msgspec

from bridged.config import keys, sections
from bridged.settings import Config, Seconds, Size


def default_toml() -> str:
    """Every key at its default with its description: the text of config.toml."""
    lines = [
        "# bridged's configuration: every key, at its default. Only mixpanel needs yours.",
        "# A key can also be set by the environment: [mixpanel] token is BRIDGED__MIXPANEL__TOKEN.",
    ]
    section: tuple[str, ...] = ()
    docs = {path: struct.__doc__ or "" for path, struct in sections(Config)}
    for key in keys():
        if key.path[:-1] != section:
            section = key.path[:-1]
            lines += ["", f"# {docs[section]}", f"[{'.'.join(section)}]"]
        lines += [f"# {key.description}", f"{key.path[-1]} = {toml_value(key.default)}"]
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """A value as TOML writes it; what `tomllib` reads back is the same."""
    if isinstance(value, Size | Seconds):
        return f'"{value}"'
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(value)  # JSON has no nan, and bounds to its numbers
    if isinstance(value, dict):
        members = ", ".join(f"{toml_value(name)} = {toml_value(of)}" for name, of in value.items())
        return f"{{ {members} }}" if members else "{}"
    # A string of JSON is one of TOML, but for one character that only JSON takes raw.
    return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
