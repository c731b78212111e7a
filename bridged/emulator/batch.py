"""Sorting the records of one request: what is stored, under which key, and what is refused. Pure.

The records of a sound sender take the short way through `is_plain`; the key work for them is done for the whole batch
at once. Any other record is decoded fully and judged by `check`.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from bridged.emulator import bodies
from bridged.emulator.validation import INSERT_ID_LETTERS, Record, Rules, check, is_placed, is_plain, stored_time

IDENTITY_EVENTS: Final = frozenset({"$identify", "$create_alias", "$merge"})
_decode = msgspec.json.Decoder(Record).decode
_serial = itertools.count()  # stands in for an `$insert_id` that is missing: such events never are the same


class Failed(msgspec.Struct):
    """A refused record, as the answer tells it."""

    index: int
    insert_id: str
    field: str
    message: str


class Batch(msgspec.Struct):
    """The outcome for the records of a request."""

    indexes: Sequence[int]  # where the events are that are taken, beside their keys and names
    keys: list[int]
    names: list[str]
    times: dict[int, int] = {}  # by index: what replaces the time of an event
    failed: list[Failed] = []
    ignored: int = 0
    without_ip: int = 0
    identity: bool = False  # a verb of the original ID merge is among them


def sort(records: list[bytes], now_s: int, rules: Rules) -> Batch:
    """Judge every record. Raises BadRequest when one is not JSON at all."""
    try:
        decoded: Sequence[Record | None] = [_decode(record) for record in records]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        decoded = [_decode_or_none(record) for record in records]
    foreign = b"".join([event.properties.insert_id.encode() for event in decoded if event]).translate(
        None, INSERT_ID_LETTERS
    )
    plain: list[Record] = []
    indexes: list[int] = []
    rest: list[int] = []
    for index, (event, record) in enumerate(zip(decoded, records, strict=True)):
        if (
            event
            and is_plain(event, record, now_s, rules)
            and (not foreign or _sound(event))
            and (record.isascii() or _is_utf8(record))
        ):
            plain.append(event)
            indexes.append(index)
        else:
            rest.append(index)
    ips = [event.properties.ip for event in plain]
    batch = Batch(
        # A range costs nothing to keep.
        indexes if rest else range(len(records)),
        [hash((event.event, (of := event.properties).time, of.distinct_id, of.insert_id)) for event in plain],
        [event.event for event in plain],
        # Nearly all senders say 0, always.
        without_ip=0 if ips.count(0) == len(ips) else sum(not is_placed(ip) for ip in ips),
    )
    indexes.extend([index for index in rest if _takes_odd(batch, index, records[index], now_s, rules)])
    return batch


def _takes_odd(batch: Batch, index: int, record: bytes, now_s: int, rules: Rules) -> bool:
    """Judge a record that is not plain, and note everything about it but its place."""
    event = bodies.loose(record)
    failure = check(event, len(record), now_s, rules)
    properties: Any = event.get("properties") if isinstance(event, dict) else None
    if failure:
        insert_id = properties.get("$insert_id", "") if isinstance(properties, dict) else ""
        shown = insert_id if isinstance(insert_id, str) else str(insert_id)
        failed = Failed(index, _printable(shown), _printable(failure[0]), _printable(failure[1]))
        batch.failed.append(failed)
        return False
    name = event["event"]
    batch.identity = batch.identity or name in IDENTITY_EVENTS
    batch.without_ip += not is_placed(properties.get("ip"))
    if properties.get("$ignore"):
        batch.ignored += 1
        return False
    time = stored_time(properties.get("time"), now_s)
    if time is not None:
        batch.times[index] = time
    batch.keys.append(_key(name, properties, time))
    batch.names.append(name)
    return True


def _key(name: str, properties: dict[str, Any], time: int | None) -> int:
    insert_id = properties.get("$insert_id")
    if not isinstance(insert_id, str) or not insert_id:
        return hash((name, next(_serial), None))
    distinct_id = properties.get("distinct_id")
    if not isinstance(distinct_id, str):
        distinct_id = repr(distinct_id)
    return hash((name, properties["time"] if time is None else time, distinct_id, insert_id))


def _decode_or_none(record: bytes) -> Record | None:
    try:
        return _decode(record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _sound(event: Record) -> bool:
    return not event.properties.insert_id.encode().translate(None, INSERT_ID_LETTERS)


def _is_utf8(record: bytes) -> bool:
    """Whether the whole record is text: the typed decoder skips the strings it does not need."""
    try:
        record.decode()
    except UnicodeDecodeError:
        return False
    return True


def _printable(text: str) -> str:
    """Replace what came from bytes that are not UTF-8, so that the answer is."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
