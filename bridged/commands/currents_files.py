"""Files of Currents events, made into the lines that the stream door takes: NDJSON, a JSON array, Avro, gzip of any.

Avro is what Currents' export to cloud storage writes: a flat record of an event. What Braze's Custom HTTP connector puts under
`user` and `properties` stands beside each other in it, and the customer's own properties are a JSON string. Whoever makes
JSON of such records, with their event_type, keeps that form: it is understood likewise.
"""

import contextlib
import gzip
import json
import os
import re
import shlex
import stat
import struct
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec

from bridged.backlog.archive import ArchivedEvent
from bridged.currents.schema import bare, is_json, scanned
from bridged.errors import BridgedError, ConfigError, SpoolError

SUFFIXES: Final = (".ndjson", ".jsonl", ".json", ".ndjson.gz", ".jsonl.gz", ".json.gz", ".avro", ".avro.gz")
# Currents' types that no Mixpanel event is made of. In an export they are many, and as dead letters they would crowd out others.
WITHOUT_FORM: Final = frozenset(
    {
        *("users.RandomBucketNumberUpdate", "users.UserDeleteRequest", "users.UserOrphan", "users.profile.Update"),
        *("agentconsole.AgentExecuted", "agentconsole.ToolInvocation", "contentoptimizer.ComponentStore"),
    }
)

_GZIP, _ZSTD, _AVRO = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"Obj\x01"
_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"
# Tabs: between members as good as a blank, and within a text no JSON either, so that nothing is mended by the way.
_LINE_BREAKS = bytes.maketrans(b"\r\n", b"\t\t")
_LOOK_BYTES = 1024
_BODY = re.compile(rb'\{\s*"events"\s*:\s*\[')
_DEAD_LETTER = re.compile(rb'\{\s*"id"\s*:\s*\d+\s*,\s*"first_at"\s*:')
_HAS_USER = re.compile(rb'"user"\s*:')
_NO_FILES = Path("/proc")
# What fastavro says of a codec that needs a library of its own, such as snappy.
_LACKING = re.compile(r"install one of the following libraries: \('([\w.-]+)'")
_USER = ("user_id", "external_user_id", "device_id", "timezone")
_CUSTOM = {
    "users.behaviors.CustomEvent": "custom_properties",
    "users.behaviors.Purchase": "purchase_properties",
}


class FileError(SpoolError):
    """One file can't be read to its end, or resumed: nothing of that is about the others."""


class WithoutForm(FileError):
    """A file of a type that no Mixpanel event is made of: nothing of it was sent, and nothing is wrong with it."""

    def __init__(self, path: Path, event_type: str) -> None:
        super().__init__(f"{path} holds {event_type}, of which no Mixpanel event is made")
        self.event_type = event_type


def found(paths: Iterable[Path]) -> list[Path]:
    """The files, and those below the folders, by name. Raises SpoolError for what isn't there, before anything is sent."""
    files: list[Path] = []
    for path in paths:
        try:
            files += _at(path)
        except OSError as error:
            raise SpoolError(f"can't read {path}: {error}", "may you enter its folder?") from error
    for path in files:
        real = path.resolve()
        # Devices are no files; and what /dev/stdin leads to is elsewhere.
        if real.is_relative_to(_NO_FILES) or not real.is_file():
            raise SpoolError(f"{path} has no place of its own: it is {real}", "give it as a file in a folder of yours")
    return list(dict.fromkeys(files))


def _at(path: Path) -> list[Path]:
    """Raises OSError for what may not be looked at: a folder that is passed over would be missed by nobody."""
    mode = _mode(path)
    if stat.S_ISREG(mode):
        return [path]
    if not stat.S_ISDIR(mode):
        what = "is no file" if mode else "doesn't exist"
        raise SpoolError(f"{path} {what}", "only what can be read twice can be resumed: no pipes")
    files = (Path(folder, name) for folder, _, names in os.walk(path, onerror=_raise) for name in names)
    below = sorted(file for file in files if file.name.endswith(SUFFIXES) and stat.S_ISREG(_mode(file)))
    if not below:
        raise SpoolError(f"{path} holds no file of events", f"their names end in {', '.join(SUFFIXES)}")
    return below


def _mode(path: Path) -> int:
    """What is there; 0: nothing. (`is_file` says no from Python 3.14 on where we may not look.)"""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _raise(error: OSError) -> None:
    raise error


def lines(path: Path, max_line: int, left_out: Collection[str] = WITHOUT_FORM) -> Iterator[bytes]:
    """A file's events in order, one a line. A line longer than `max_line` comes cut, still too long for the door.

    What isn't an event comes as it is: the daemon keeps it as a dead letter. Raises FileError when the file can't be read on, or
    ends within a line; WithoutForm at once for an Avro file of a type that is left out.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            file.seek(0)
            if magic.startswith(_ZSTD):
                raise FileError(f"{path} is compressed with zstd", f"unpack it first: zstd -d {shlex.quote(str(path))}")
            if magic.startswith(_AVRO):
                yield from _avro(path, file, left_out)
            elif magic.startswith(_GZIP):
                with gzip.open(file, "rb") as unpacked:
                    is_avro = unpacked.read(4) == _AVRO
                    unpacked.seek(0)
                    yield from _avro(path, unpacked, left_out) if is_avro else _text(path, unpacked, max_line)
            else:
                yield from _text(path, file, max_line)
    except (OSError, EOFError, zlib.error) as error:
        raise FileError(f"can't read {path}: {error}", "what stood before the damage was sent") from error


def _text(path: Path, file: "BinaryIO | gzip.GzipFile", max_line: int) -> Iterator[bytes]:
    # A log that was cut short under its writer (logrotate's copytruncate) begins with zeros, and is text all the same.
    if b"\0" in file.read(_LOOK_BYTES).lstrip(b"\0"):
        raise FileError(
            f"{path} is no text, and no Avro either: nothing of it was sent",
            "unpack it first (zip, tar, bzip2, xz), or write it as UTF-8: iconv -f UTF-16 -t UTF-8",
        )
    file.seek(0)
    is_first = True
    while line := file.readline(max_line + 2):
        if is_first:
            line = line.removeprefix(_BOM).lstrip(_BLANK)
            if line.startswith(b"["):
                yield from _array(path, line + file.read())
                return
            _demand_currents(path, line)
            is_first = not line
        if not line.endswith(b"\n"):
            # The last one, or too long: then the rest of it is passed over.
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(max_line)
            if not rest and line.strip() and len(line) <= max_line and not is_json(line):
                raise FileError(
                    f"{path} ends in the middle of a line, which wasn't sent",
                    "run the same command again when the file is whole; if this is all of it, end it with a newline",
                )
            line += b"\n"
        if not line.isspace() and line:
            yield _of_flat(line)


def _demand_currents(path: Path, first: bytes) -> None:
    """Raises FileError for a file whose first line shows that each of its lines would be a dead letter."""
    if first.strip() == b"{":
        raise FileError(
            f"{path} has its events spread over several lines each: nothing of it was sent",
            f"one a line: {_jq('.', path)} (of whole request bodies: jq -c '.events[]' ...)",
        )
    if _BODY.match(first):
        raise FileError(
            f"{path} holds whole request bodies: nothing of it was sent",
            f"the events of each, one a line: {_jq('.events[]', path)}",
        )
    if _another_follows(first):
        raise FileError(f"{path} has several events on a line: nothing of it was sent", f"one a line: {_jq('.', path)}")
    if _DEAD_LETTER.match(first):
        theirs = _jq('select(.stage == "door") | .event // empty', path)
        raise FileError(
            f"{path} is an export of dead letters: nothing of it was sent",
            "bridged dead-letters replay tries those again that the daemon has; of another daemon's, the events that "
            f"its door refused: {theirs}",
        )
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        msgspec.json.decode(first, type=ArchivedEvent)
        raise FileError(
            f"{path} holds events as Mixpanel gets them: nothing of it was sent", f"bridged replay sends those: {path}"
        )


def _jq(wanted: str, path: Path) -> str:
    """What to type."""
    file, wanted = shlex.quote(str(path)), shlex.quote(wanted)
    read = f"gzip -dc {file} | jq -c {wanted}" if path.suffix == ".gz" else f"jq -c {wanted} {file}"
    return f"{read} > events.ndjson"


def _another_follows(line: bytes) -> bool:
    """Whether a second object stands behind the first, as whoever strings records together writes them. The line may be cut."""
    text = line.decode(errors="replace")
    with contextlib.suppress(ValueError, RecursionError):
        _, end = json.JSONDecoder().raw_decode(text)
        return text[0] == "{" == text[end : end + _LOOK_BYTES].lstrip()[:1]
    return False


def _array(path: Path, data: bytes) -> Iterator[bytes]:
    """The elements of a JSON array, which is read as a whole. One that no parser takes costs itself, as at the HTTP door."""
    try:
        elements: Sequence[bytes] = msgspec.json.decode(data, type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        found = scanned(bare(data))
        if found is None:
            raise FileError(
                f"{path} begins as a JSON array and isn't one: {error}", "nothing of it was sent"
            ) from error
        elements = found
    for element in elements:
        if line := _on_a_line(bytes(element)):
            yield _of_flat(line + b"\n")


def _on_a_line(element: bytes) -> bytes:
    """Without the line breaks between its members."""
    try:
        return msgspec.json.format(element, indent=-1)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return element.translate(_LINE_BREAKS).strip()


# -- Avro --------------------------------------------------------------------------------------------------------------


def _avro(path: Path, file: "BinaryIO | gzip.GzipFile", left_out: Collection[str]) -> Iterator[bytes]:
    try:
        import fastavro  # noqa: PLC0415  # an extra: only who has Avro files needs it
    except ImportError as error:
        raise ConfigError(
            f"{path} is Avro, for which fastavro is missing", f"{shlex.quote(sys.executable)} -m pip install fastavro"
        ) from error
    try:
        reader = fastavro.reader(file)  # type: ignore[arg-type]  # whatever can be read
        event_type = _event_type(path, reader.writer_schema)
        _demand_form(path, event_type, left_out)
        singles = _single_precision(reader.writer_schema)
        records: Iterator[Any] = iter(reader)
        while True:
            # Whatever a library makes of damaged bytes; what we make of the record is ours, and stands outside.
            record = next(records, None)
            if record is None:
                return
            yield msgspec.json.encode(event(event_type, record, singles)) + b"\n"
    except FileError:
        raise
    except Exception as error:
        hint = "what stood before the damage was sent"
        if lacking := _LACKING.search(str(error)):
            hint = f"nothing of it was sent; {sys.executable} -m pip install {lacking[1]}"
        raise FileError(f"can't read {path} as Avro: {error!r}", hint) from error


def _demand_form(path: Path, event_type: str, left_out: Collection[str]) -> None:
    """Raises WithoutForm."""
    if event_type in left_out:
        raise WithoutForm(path, event_type)


def _of_flat(line: bytes) -> bytes:
    """A flat record on a line of JSON made into an event; any other line as it is."""
    if b'"user":' in line or _HAS_USER.search(line):  # nearly all do, and nearly all are spelled as the first
        return line
    try:
        record = msgspec.json.decode(line, type=dict[str, Any])
        event_type, own = record.pop("event_type", None), record.get("properties")
        if not isinstance(event_type, str) or isinstance(own, dict) or not any(map(record.get, _USER)):
            return line
        return msgspec.json.encode(event(event_type, record)) + b"\n"
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return line


def event(event_type: str, record: dict[str, Any], singles: Iterable[str] = ()) -> dict[str, Any]:
    """A flat record as Braze's Custom HTTP connector would send it. `singles`: its fields of single precision."""
    flat = {name: value for name, value in record.items() if value is not None}
    for name in singles:
        if name in flat:
            flat[name] = _shortest(flat[name])
    user = {name: flat.pop(name) for name in _USER if name in flat}
    whole = {"event_type": event_type, "user": user, "properties": flat}
    whole |= {name: flat.pop(name) for name in ("id", "time") if name in flat}
    if event_type in _CUSTOM and "properties" in flat:
        flat[_CUSTOM[event_type]] = _decoded(flat.pop("properties"))
    if event_type.startswith("users.messages.banner.") and "canvas_step_message_variation_id" in flat:
        # The one property that the two exports call differently, for these types alone.
        flat["canvas_step_message_variation_api_id"] = flat.pop("canvas_step_message_variation_id")
    return whole


def _decoded(properties: Any) -> Any:
    """The customer's own properties. What isn't JSON stays what it is: the daemon says so in a dead letter."""
    try:
        return msgspec.json.decode(properties)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, TypeError):
        pass
    # An object but for NaN, half a character or the like goes as it is written, or the letter would say that it is a text.
    with contextlib.suppress(ValueError, RecursionError, TypeError):
        if isinstance(json.loads(properties), dict):
            return msgspec.Raw(properties.encode().translate(_LINE_BREAKS))
    return properties


def _event_type(path: Path, schema: Any) -> str:
    """From the record's name, `dataexport.<cluster>.inner.<event type>`, else from the folder `event_type=<event type>`."""
    name = str(schema.get("name", "")) if isinstance(schema, dict) else ""
    if isinstance(schema, dict) and "." not in name and schema.get("namespace"):
        name = f"{schema['namespace']}.{name}"
    _, inner, event_type = name.partition(".inner.")
    if inner:
        return event_type
    for part in reversed(path.absolute().parts):
        if part.startswith("event_type="):
            return part.removeprefix("event_type=")
    raise FileError(
        f"{path} doesn't say of which event type it is: its record is called {name!r}",
        "keep the folders of the export (event_type=.../...)",
    )


def _single_precision(schema: Any) -> list[str]:
    kinds = {field["name"]: field["type"] for field in schema.get("fields", ()) if isinstance(field, dict)}
    return [name for name, kind in kinds.items() if kind == "float" or (isinstance(kind, list) and "float" in kind)]


def _shortest(value: Any) -> Any:
    """A number of single precision as a person would write it: 89.9, not 89.9000015258789."""
    if not isinstance(value, float):
        return value
    try:
        narrow = struct.pack("f", value)
    except OverflowError:
        return value
    spellings: Callable[[int], float] = lambda digits: float(f"{value:.{digits}g}")  # noqa: E731  # typed, and used once
    return next((short for short in map(spellings, range(6, 10)) if struct.pack("f", short) == narrow), value)


def chunks(events: Iterable[bytes], size: int, max_bytes: int) -> Iterator[list[bytes]]:
    """Lists of at most so many lines, and of fewer when they are long; what stands before an error comes before it."""
    chunk: list[bytes] = []
    held = 0
    try:
        for line in events:
            chunk.append(line)
            held += len(line)
            if len(chunk) >= size or held >= max_bytes:
                yield chunk
                chunk, held = [], 0
    except BridgedError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk
