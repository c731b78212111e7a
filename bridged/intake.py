"""The only way in: decode, map, encode, append. One call per read or request, everything in it synchronous up to the commit.

The future that it gives is done when every event of the call is on disk: forwarded ones in a segment, refused ones as dead
letters, skipped ones in the books. It is the one await between a socket and its ack.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import msgspec
from msgspec import Struct

from bridged.backlog.archive import ArchivedEvent
from bridged.backlog.dead_letters import Skipping
from bridged.backlog.segment import Batch
from bridged.backlog.spool import DeadLetter, DeadLetterRow, Intaken, Spool
from bridged.currents.schema import UNDECODABLE_CODE, UNDECODABLE_TYPE, Decoded, Refusal, Schema, bare, fault
from bridged.errors import BadRequest, TooLarge
from bridged.mixpanel.limits import MAX_EVENT_BYTES
from bridged.mixpanel.mapping import EventMapping

# Each type is looked at for fields that its row doesn't have once in so many seconds.
_SAMPLE_S = 1.0
_MAX_UNKNOWN_FIELDS = 1000
# Braze's bodies are some 70 kB; from here on it is worth a look whether a body is made of events at all, and it is sliced.
_LARGE_BODY_BYTES = 256 * 1024
# And from here on whether it is made of pieces so small that looking at each would take seconds (up to 0.2 s a MiB, measured).
_VAST_BODY_BYTES = 4 * 2**20
# Events decoded, mapped and encoded at a time: what they are made into stays in the processor's cache. (8 % measured on reads
# of a stream; 17 % on bodies of 1,000 events, although telling those apart beforehand costs something.)
_SLICE_EVENTS = 100
# An event of Currents is larger than this. Of smaller elements a body has few, or it is none.
_LEAST_EVENT_BYTES = 64
_FEW_ELEMENTS = 1000
# Reasons have no number that differs by event: such letters are counted by their reason. How large each is, is told beside it.
_TOO_LARGE = f"too large as a Mixpanel event: Mixpanel takes less than {MAX_EVENT_BYTES} bytes"


class Intake:
    """Takes bytes from any door. Owns the counts of unknown fields and of reasons; everything else belongs to the spool."""

    def __init__(
        self, mapping: EventMapping, spool: Spool, max_batch_events: int = 2000, clock: Callable[[], float] = time.time
    ) -> None:
        self.unknown_fields: Counter[tuple[int, str]] = Counter()  # (code, field): times seen in a sample
        self.reasons: Counter[str] = Counter()  # why events were skipped
        self._mapping = mapping
        self._schema: Schema = mapping.schema
        self._spool = spool
        self._max_batch_events = max_batch_events
        self._clock = clock
        self._encode_lines = msgspec.json.Encoder().encode_lines
        self._sampled: set[int] = set()
        self._sampled_until = 0.0

    def use(self, mapping: EventMapping) -> None:
        """Maps with another configuration from the next call on. What is on disk stays as it was mapped."""
        self._mapping, self._schema = mapping, mapping.schema

    def accept_lines(self, lines: Sequence[bytes], sender: int = 0) -> "asyncio.Future[None]":
        """NDJSON lines; `sender` is the number of their connection. Raises SpoolError when the spool can't take them."""
        return self._append(self._sliced(lines), sender)

    def accept_body(self, data: bytes, sender: int = 0) -> "asyncio.Future[None]":
        """A Custom HTTP body; `sender` is the number of its connection.

        Raises BadRequest if it isn't JSON at all, TooLarge if it must be split, SpoolError when the spool can't take it.
        """
        intaken = None
        if len(data) <= _LARGE_BODY_BYTES:
            intaken = self._whole(data)
        elif len(data) > _VAST_BODY_BYTES and _of_small_pieces(data):
            intaken = self._lone(data)
        if intaken is None:
            intaken = self._sliced(self._elements(data))
        spool = self._spool
        if intaken.size or spool.pending_bytes or spool.near_cap or spool.failed:
            return self._append(intaken, sender)
        # A probe, while nobody waits for a commit: it makes none of its own. (One that is under way it waits for.)
        answered = asyncio.get_running_loop().create_future()
        answered.set_result(None)
        return answered

    def _append(self, intaken: Intaken, sender: int) -> "asyncio.Future[None]":
        written = self._spool.append(intaken, sender)
        if intaken.reasons:
            written.add_done_callback(partial(self._count, intaken.reasons))
        return written

    def _count(self, reasons: list[str], written: "asyncio.Future[None]") -> None:
        """Why events were skipped, once they are in the books: what the spool couldn't take comes again."""
        if not written.cancelled() and written.exception() is None:
            self.reasons.update(reasons)

    def _whole(self, data: bytes) -> Intaken | None:
        """A body taken at once. None: its elements must be taken one by one."""
        decoded = self._schema.plain_body(data)
        try:
            return None if decoded is None else self._intaken(decoded)
        except Exception:  # a mistake of ours: `_slice` finds whose event it is, and tells
            return None

    def _elements(self, data: bytes) -> Sequence[bytes]:
        """What a body is made of. Raises BadRequest, and TooLarge for what can't be events."""
        elements = self._schema.elements(data)
        if elements is None:
            raise BadRequest("the body is not JSON", 'Braze posts {"events": [...]}')
        _demand_events(len(elements), len(data))
        return elements

    def _lone(self, data: bytes) -> Intaken:
        """A vast body of small pieces: what it is made of isn't looked at, or everybody else would have to wait.

        Raises BadRequest, and TooLarge unless it is a lone element, which can't be split.
        """
        try:
            element = self._schema.lone(data)
        except ValueError as error:
            raise BadRequest("the body is not JSON", 'Braze posts {"events": [...]}') from error
        if element is None:
            raise TooLarge("the body has too many small pieces", "split it")
        reason = f"too large, and not looked at: Mixpanel takes less than {MAX_EVENT_BYTES} bytes"
        return Intaken(dead_letters=[DeadLetter(UNDECODABLE_CODE, UNDECODABLE_TYPE, "door", reason, element)])

    def accept_oversized(self, head: bytes, limit: int) -> "asyncio.Future[None]":
        """A line that was longer than the door takes, of which only the beginning is left."""
        reason = f"the line is longer than {limit:d} bytes; only its beginning was kept"
        refusal = Refusal(UNDECODABLE_CODE, UNDECODABLE_TYPE, reason, head)
        return self._spool.append(self._intaken(Decoded([], list, [refusal], [])))

    def replay(self, row: DeadLetterRow) -> "asyncio.Future[None] | Skipping | str":
        """Tries a dead letter again. A string is the reason why it would become one again; nothing was changed then."""
        if row.stage != "door":
            if len(row.event) >= MAX_EVENT_BYTES:
                return _TOO_LARGE
            batch = Batch(self._with_token(row.event) + b"\n", bytes([row.code]))
            return self._spool.append(Intaken([batch], replayed=[row]))
        mapped = self._as_accepted(row.code, self._slice([row.event]))
        if mapped.dead_letters or not (mapped.batches or mapped.skipped):
            return mapped.dead_letters[0].reason if mapped.dead_letters else "it holds no event"
        mapped.replayed = [row]
        written = self._spool.append(mapped)
        return written if mapped.batches else Skipping(written)

    def both_forms(self, row: DeadLetterRow) -> dict[str, object]:
        """A dead letter as Braze sent it (`original`) and as Mixpanel got or would get it (`mapped`); None: not known.

        What was refused behind the door is kept as it was mapped; `mapped_problem` says why there is no mapped form of the other.
        """
        if row.stage != "door":
            return {"original": None, "mapped": _raw(row.event), "mapped_problem": ""}
        try:
            mapped = self._mapping.map(self._schema.lines([row.event]), self._clock())
        except Exception as error:  # a mistake of ours, as in `_slice`
            return {"original": _raw(row.event), "mapped": None, "mapped_problem": _mistake(error)}
        if not mapped.forms:
            reasons = [refusal.reason for refusal in mapped.refusals] + [skip.reason for skip in mapped.skips]
            problem = reasons[0] if reasons else "it holds no event"
            return {"original": _raw(row.event), "mapped": None, "mapped_problem": problem}
        return {"original": _raw(row.event), "mapped": mapped.forms[0], "mapped_problem": ""}

    def _with_token(self, event: bytes) -> bytes:
        """A mapped event with the project token of today, if it has one at all: for events that come back after a while.

        Mixpanel knows a repetition by other properties. All else keeps its spelling.
        """
        token = msgspec.json.encode(self._mapping.token)
        try:
            members = msgspec.json.decode(event, type=dict[str, msgspec.Raw])
            properties = msgspec.json.decode(members["properties"], type=dict[str, msgspec.Raw])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError):
            return event
        if not self._mapping.token or bytes(properties.get("token", token)) == token:
            return event
        properties["token"] = msgspec.Raw(token)
        members["properties"] = msgspec.Raw(msgspec.json.encode(properties))
        return msgspec.json.encode(members)

    @staticmethod
    def _as_accepted(code: int, mapped: Intaken) -> Intaken:
        """The books go on under the type that it was accepted as, whatever it is today: what was counted never falls."""
        batches = [Batch(batch.ndjson, bytes([code]) * len(batch.codes)) for batch in mapped.batches]
        return Intaken(batches, mapped.dead_letters, bytes([code]) * len(mapped.skipped))

    def accept_archived(self, lines: Sequence[bytes]) -> tuple["asyncio.Future[None]", int]:
        """Events that expired and were archived: mapped already, so they go on as they are. They count as accepted anew.

        A line that isn't a mapped event becomes a dead letter; the number says how many were. Raises TooLarge for what can't
        be events, SpoolError when the spool can't take them.
        """
        _demand_events(len(lines), sum(map(len, lines)))
        batches, letters = [], []
        for line in filter(None, map(bytes.strip, lines)):
            try:
                name = msgspec.json.decode(line, type=ArchivedEvent).event
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                reason = f"not an archived event: {fault(error)}"
                letters.append(DeadLetter(UNDECODABLE_CODE, UNDECODABLE_TYPE, "door", reason, line))
            else:
                batches.append(
                    Batch(self._with_token(line).replace(b"\n", b" ") + b"\n", bytes([self._mapping.code_of(name)]))
                )
        return self._spool.append(Intaken(batches, letters)), len(letters)

    def _sliced(self, lines: Sequence[bytes]) -> Intaken:
        """What became of some events, a line each."""
        if len(lines) <= _SLICE_EVENTS:
            return self._slice(lines)
        slices = (lines[at : at + _SLICE_EVENTS] for at in range(0, len(lines), _SLICE_EVENTS))
        return _joined([self._slice(part) for part in slices])

    def _slice(self, lines: Sequence[bytes]) -> Intaken:
        """A few of them. What we fail on, by a mistake of ours, is a dead letter like any other, and costs only itself."""
        try:
            return self._intaken(self._schema.lines(lines))
        except Exception as error:
            if len(lines) > 1:
                return _joined([self._slice([line]) for line in lines])
            letter = DeadLetter(UNDECODABLE_CODE, UNDECODABLE_TYPE, "door", _mistake(error), bare(lines[0]))
            return Intaken(dead_letters=[letter])

    def _intaken(self, decoded: Decoded) -> Intaken:
        now_s = self._clock()
        mapped = self._mapping.map(decoded, now_s)
        self._sample(decoded, mapped.codes, now_s)
        letters: list[DeadLetter] = []
        batches = list(self._encoded(mapped.forms, mapped.codes, letters))
        if not letters and not mapped.refusals and not mapped.skips:
            return Intaken(batches)
        letters += [DeadLetter(r.code, r.event_type, "door", r.reason, bytes(r.original)) for r in mapped.refusals]
        reasons = [skip.reason for skip in mapped.skips]
        return Intaken(batches, letters, bytes(skip.code for skip in mapped.skips), reasons)

    def _encoded(self, forms: Sequence[Struct], codes: bytes, letters: list[DeadLetter]) -> Iterator[Batch]:
        """The NDJSON of mapped events, in batches that fit a segment; events too large for Mixpanel become dead letters."""
        if not forms:
            return
        if len(forms) > self._max_batch_events:
            for at in range(0, len(forms), self._max_batch_events):
                to = at + self._max_batch_events
                yield from self._encoded(forms[at:to], codes[at:to], letters)
            return
        ndjson = self._encode_lines(forms)
        whole = len(ndjson) <= self._spool.max_segment_bytes
        if whole and (len(ndjson) < MAX_EVENT_BYTES or max(map(len, ndjson.split(b"\n"))) < MAX_EVENT_BYTES):
            yield Batch(ndjson, codes)
        elif len(forms) > 1:
            half = len(forms) // 2
            yield from self._encoded(forms[:half], codes[:half], letters)
            yield from self._encoded(forms[half:], codes[half:], letters)
        elif len(ndjson) <= MAX_EVENT_BYTES:  # with its newline
            # Larger than what Mixpanel last said it takes, but alone: it decides.
            yield Batch(ndjson, codes)
        else:
            # What is kept is the mapped event: a replay doesn't map it again.
            event = ndjson.removesuffix(b"\n")
            event_type = self._mapping.type_name(codes[0])
            letters.append(DeadLetter(codes[0], event_type, "bridged", _TOO_LARGE, event))

    def _sample(self, decoded: Decoded, codes: bytes, now_s: float) -> None:
        """Looks for fields that Braze added: one event of each type a second."""
        if not self._sampled_until - _SAMPLE_S <= now_s < self._sampled_until:
            self._sampled.clear()
            self._sampled_until = now_s + _SAMPLE_S
        if self._sampled.issuperset(codes):
            return
        fresh = set(codes) - self._sampled
        self._sampled |= fresh
        originals = decoded.originals()
        for event, original in zip(decoded.events, originals, strict=False):
            if event.code in fresh:
                fresh.remove(event.code)
                for name in self._schema.unknown_fields(event.code, original):
                    if len(self.unknown_fields) < _MAX_UNKNOWN_FIELDS or (event.code, name) in self.unknown_fields:
                        self.unknown_fields[event.code, name[:100]] += 1
            if not fresh:
                return


def _raw(event: bytes) -> msgspec.Raw | None:
    """An event as JSON, in its own spelling; None if it is none."""
    try:
        msgspec.json.decode(event)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return msgspec.Raw(event)


def _joined(parts: Sequence[Intaken]) -> Intaken:
    """One call's parts as one, so that they are committed together."""
    return Intaken(
        [batch for part in parts for batch in part.batches],
        [letter for part in parts for letter in part.dead_letters],
        b"".join([part.skipped for part in parts]),
        [reason for part in parts for reason in part.reasons],
    )


def _mistake(error: Exception) -> str:
    return f"bridged failed on it: {type(error).__name__}: {error}"


def _demand_events(elements: int, size: int) -> None:
    """Raises TooLarge for so many elements in so many bytes that they can't be events: each would be a dead letter."""
    if elements > max(_FEW_ELEMENTS, size // _LEAST_EVENT_BYTES):
        raise TooLarge("the body has too many elements", "split it")


def _of_small_pieces(data: bytes) -> bool:
    """Whether a body has more elements, brackets or strings than events of such a size usually have."""
    # Events of Currents have a comma in some 30 bytes, a quote in 8, a bracket in 200; nested ones a few more.
    most = {b",": len(data) // 8, b'"': len(data) // 3, b"[": len(data) // 24, b"{": len(data) // 24}
    return any(data.count(piece) > limit for piece, limit in most.items())
