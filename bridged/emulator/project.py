"""A project of Mixpanel's: what each endpoint does with a request and what it answers. Pure: bytes in, an `Answer` out.

Decisions where the documentation is silent, all of them the stricter or the more treacherous reading:
- a strict import without an Authorization header is 401 even when any credential would do;
- an import that is not strict, with a wrong credential, is answered `1` and stores nothing, as users have reported;
- a record whose `token` property contradicts the configured token is a failed record: the credential names the
  project;
- more records than allowed, a body that is not JSON and an empty one are 400 without failed records: nothing is
  stored, so a sender that takes an odd 400 for success loses events here;
- `$identify`, `$create_alias` and `$merge` make the whole request a 400 whose failed records are strings, as projects
  with the simplified ID merge do;
- the minute's allowance is shared by `/import` and `/track` and is spent by refused records too, but not by a request
  that is refused whole; a request that is larger than it passes when nothing did for a minute.
"""

from typing import Any

import msgspec

from bridged.emulator import answers, bodies
from bridged.emulator.answers import Answer
from bridged.emulator.batch import Batch, sort
from bridged.emulator.credentials import Credentials
from bridged.emulator.limits import Window
from bridged.emulator.reading import Call, Sent, read
from bridged.emulator.store import Source, Store, Summary
from bridged.emulator.validation import EARLIEST_MS, Rules
from bridged.errors import DoorError

PROFILE_VERBS = frozenset({"$set", "$set_once", "$add", "$append", "$union", "$remove", "$unset", "$delete"})
PROFILE_IDS = {"/engage": "$distinct_id", "/groups": "$group_id"}
TRACK_HORIZON_S = 5 * 24 * 3600


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How much of everything a project may send."""

    max_events_per_minute: int = 1_800_000
    max_bytes_per_minute: int = 2_000_000_000
    max_body_bytes: int = 10_000_000
    max_event_bytes: int = 1_000_000
    max_events_per_request: int = 2000


class Project:
    """The rules, the store and the counts of one project."""

    def __init__(self, limits: Limits, credentials: Credentials, *, keep: bool) -> None:
        self.limits = limits
        self.credentials = credentials  # replaced at run time to play one that expires
        self.store = Store(keep=keep)
        self.window = Window(limits.max_events_per_minute, limits.max_bytes_per_minute)
        self.counts = Summary()
        self.profile_updates: list[dict[str, Any]] = []

    def answer(self, call: Call, now: float) -> Answer:
        """Carry out a request."""
        path = call.path.rstrip("/")
        strict = path == "/import" and call.strict
        try:
            if path == "/import":
                return self._import(call, now)
            if path == "/track":
                return self._track(call, now)
            if path in PROFILE_IDS:
                return self._profiles(call, PROFILE_IDS[path])
        except DoorError as error:
            if error.http_status != 400:
                return answers.refused(error.http_status, str(error), strict=strict)
            if strict:
                return answers.partly_imported(0, [], str(error))
            return answers.received(str(error), verbose=call.verbose)
        return answers.refused(404, f"no such endpoint: {call.path}")

    def summary(self) -> Summary:
        """Return the counts as they are now."""
        return msgspec.structs.replace(
            self.counts,
            stored=len(self.store),
            events=dict(self.store.names),
            answers=dict(self.counts.answers),
        )

    def clear(self) -> None:
        """Forget events, profiles, counts and the past minute; requests under way stay counted as such."""
        self.store.clear()
        self.window.clear()
        self.profile_updates.clear()
        self.counts = Summary(requests_now=self.counts.requests_now)

    def _import(self, call: Call, now: float) -> Answer:
        authorized = self.credentials.accepts(call.authorization, call.query.get("project_id", ""))
        if call.strict and not authorized:
            return answers.refused(401, answers.INVALID_CREDENTIALS)
        sent = self._read(call)
        if not self.window.admit(now, len(sent.records), sent.size):
            return answers.refused(429, answers.RATE_LIMITED, strict=call.strict)
        if not call.strict:
            # The oldest clients send no header but an API key, which nobody has checked for years.
            if not authorized and (call.authorization or self.credentials.closed):
                self.counts.dropped += len(sent.records)
                return answers.received(verbose=sent.verbose)
            return self._received(sent, now)
        batch = self._sort(sent, now, strict=True)
        if batch.identity:
            self.counts.refused += len(sent.records)
            return answers.partly_imported(0, [answers.SIMPLIFIED_MERGE])
        accepted = self._store(batch, sent, lambda: self._parse(call).records)
        if batch.failed:
            return answers.partly_imported(accepted, batch.failed)
        return answers.imported(accepted, verbose=sent.verbose)

    def _track(self, call: Call, now: float) -> Answer:
        sent = self._read(call)
        if not self.window.admit(now, len(sent.records), sent.size):
            return answers.refused(429, answers.RATE_LIMITED, strict=False)
        named: list[bytes] = []  # records that name a project, be it a wrong one
        taken: list[bytes] = []
        for record in sent.records:
            event = bodies.loose(record)
            properties = event.get("properties") if isinstance(event, dict) else None
            if isinstance(properties, dict) and properties.get("token"):
                named.append(record)
                if self._tracks(properties, now):
                    taken.append(record)
        self.counts.refused += len(sent.records) - len(named)
        self.counts.dropped += len(named) - len(taken)
        if not named:
            return answers.received("'properties.token' must not be missing", verbose=sent.verbose)
        if not taken:
            return answers.received(verbose=sent.verbose)
        sent.records = taken
        return self._received(sent, now)

    def _tracks(self, properties: dict[str, Any], now: float) -> bool:
        """Whether a tracked event comes to something; the answer is 1 even when it does not."""
        if self.credentials.token and properties["token"] != self.credentials.token:
            return False
        time = properties.get("time")
        if not isinstance(time, int | float):
            return True
        return (time / 1000 if time >= EARLIEST_MS else time) >= now - TRACK_HORIZON_S

    def _profiles(self, call: Call, id_key: str) -> Answer:
        # These endpoints don't know gzip: compressed bytes are just not JSON to them.
        sent = self._read(call, gzip=False)
        updates = [bodies.loose(record) for record in sent.records]
        good = [
            update
            for update in updates
            if isinstance(update, dict) and update.get("$token") and id_key in update and PROFILE_VERBS & update.keys()
        ]
        self.counts.refused += len(updates) - len(good)
        self.counts.profile_updates += len(good)
        if self.store.keep:
            self.profile_updates.extend(good)
        error = "" if good else f"an update needs $token, {id_key} and an operation"
        return answers.received(error, verbose=sent.verbose)

    def _received(self, sent: Sent, now: float) -> Answer:
        """Store what is good and say 1 if anything was."""
        batch = self._sort(sent, now, strict=False)
        accepted = self._store(batch, sent, lambda: sent.records)
        return answers.received("" if accepted else batch.failed[0].message, verbose=sent.verbose)

    def _read(self, call: Call, *, gzip: bool = True) -> Sent:
        sent = self._parse(call, gzip=gzip)
        self.counts.bytes_uncompressed += sent.size
        self.counts.max_batch = max(self.counts.max_batch, len(sent.records))
        return sent

    def _parse(self, call: Call, *, gzip: bool = True) -> Sent:
        return read(call, self.limits.max_body_bytes, self.limits.max_events_per_request, gzip=gzip)

    def _sort(self, sent: Sent, now: float, *, strict: bool) -> Batch:
        rules = Rules(max_event_bytes=self.limits.max_event_bytes, token=self.credentials.token, strict=strict)
        return sort(sent.records, int(now), rules)

    def _store(self, batch: Batch, sent: Sent, source: Source) -> int:
        """Store what a batch holds and count it; returns how many records were accepted."""
        counts = self.counts
        new = self.store.add(batch, source)
        counts.accepted += len(batch.keys) + batch.ignored
        counts.duplicates += len(batch.keys) - new
        counts.ignored += batch.ignored
        counts.refused += len(batch.failed)
        if not sent.placed:
            counts.events_without_ip += batch.without_ip
        return len(batch.keys) + batch.ignored
