"""Which alarms are raised and cleared: facts and `now` in, notices out. Pure.

An alarm is an episode: raised once, cleared once. Each rule says of the facts that they are bad, good, or neither: between
a raising and a clearing threshold nothing changes. An alarm is raised when its rule has said bad for `raise_after_s`, and
cleared when it has said good for a while. That while doubles each time that the alarm comes back within an hour of its last
end: whatever flaps becomes one long episode, not a storm.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal, TypeAlias

from msgspec import Struct

Severity: TypeAlias = Literal["critical", "warning"]
Says: TypeAlias = Literal["bad", "neither", "good"]

CLEAR_AFTER_S: Final = 30.0
LONGEST_CLEAR_AFTER_S: Final = 3600.0
# An alarm that comes back so soon after its end is the same trouble.
COMES_BACK_S: Final = 3600.0

# Dead letters: so many within so long, and this share of the events that came or went in that time.
BURST_S: Final = 300.0
BURST_LETTERS: Final = 20
BURST_SHARE: Final = 0.02
_BURST_SLOTS: Final = 30

SKEW_S: Final = 300.0
_RENEWED: Final = ". A renewed file is read at SIGHUP, or by a restart"
CALM: Final = 0.85  # of a raising threshold: below it the facts are good again
SMALLEST_DISK_RESERVE_BYTES: Final = 64 * 2**20
LARGEST_DISK_RESERVE_BYTES: Final = 2**30


class Facts(Struct, frozen=True, kw_only=True):
    """What alarms depend on. Ages in seconds; None: there is no such moment, or it isn't known."""

    halted: bool = False
    halt_reason: str = ""
    halt_doubtful: bool = False  # an earlier daemon was halted, and this one had no answer yet
    waiting: int = 0  # events
    oldest_age_s: float | None = None
    max_age_s: float = 48 * 3600.0
    expires: bool = True  # retention.on_expiry is not keep
    drops: bool = False  # it is drop
    archive_problem: str = ""  # why expired events can't be archived
    undelivered_s: float = 0.0  # how long events have waited without one success
    undelivered_after_s: float = 600.0  # from then on it is an alarm
    last_problem: str = ""
    in_vain: int = 0  # events that fail or are refused, and aren't given up
    in_vain_s: float = 0.0  # for how long, the first of them
    stalled: str = ""  # health's words, when events wait without an answer and without a known reason
    accepted: int = 0  # of the books, as the others here
    delivered: int = 0
    dead_lettered: int = 0
    expired: int = 0
    dead_letters_dropped: int = 0
    damaged: int = 0  # segments, or whole files
    missing: int = 0  # events that were acknowledged, and gone from the spool at the start
    used_bytes: int = 0  # of the spool
    max_bytes: int = 0
    spool_share: float = 0.8
    disk_free_bytes: int | None = None
    refusal: str = ""  # why the doors refuse new events: the spool is near its cap, or can't be written
    skew_s: float | None = None  # our wall clock less Mixpanel's
    cohorts_halted: str = ""  # why cohorts aren't imported
    cohorts_capped: str = ""  # that the day's data points are spent
    door_lost: str = ""  # what of a door nobody finds any more, and why
    certificate_ended: str = ""  # which listener's certificate nobody takes, and why
    certificate_ending: str = ""  # which soon ends
    configuration_problem: str = ""  # why a changed one wasn't taken over, or something of it isn't in force


class Notice(Struct, frozen=True, kw_only=True):
    """What a person is told: an alarm began or ended."""

    alarm: str
    state: Literal["raised", "cleared"]
    severity: Severity
    text: str
    lasted_s: float = 0.0  # of one that is cleared


class Open(Struct, kw_only=True):
    """An alarm that is raised."""

    alarm: str
    severity: Severity
    since: float  # of the clock that `now` is of
    text: str  # with the figures of the last look that wasn't good
    ending: bool = False  # the facts are good again: if they stay so for a while, it is cleared


class Past(Struct, kw_only=True):
    """What a daemon leaves its successor of an alarm. Times are of the wall clock."""

    since: float | None = None  # it is raised
    ended_at: float | None = None
    came_back: int = 0
    text: str = ""
    unsent: list[dict[str, Any]] = []  # notices that wait for their receiver, as they are posted


class _Memory:
    """What the rules remember of earlier facts: how the counts grew."""

    def __init__(self) -> None:
        self.grew: dict[str, int] = {}
        self.expired = 0  # since the halt began, or the start
        self._last: Facts | None = None
        self._slots: deque[tuple[float, int, int]] = deque()  # began at, dead letters, events that came or went

    def note(self, facts: Facts, now: float) -> None:
        last = self._last
        if last is None:
            # The books go on from an earlier life; what is counted since the start began at 0.
            books = ("accepted", "delivered", "dead_lettered", "expired")
            last = Facts(**{name: getattr(facts, name) for name in books})
        self._last = facts
        counts = ("accepted", "delivered", "dead_lettered", "expired", "dead_letters_dropped", "damaged", "missing")
        # A replay takes dead letters out of the books: what they grow by next is what is new.
        self.grew = {name: max(0, getattr(facts, name) - getattr(last, name)) for name in counts}
        self.expired = (self.expired if facts.halted else 0) + self.grew["expired"]
        letters = self.grew["dead_lettered"]
        moved = max(self.grew["accepted"], self.grew["delivered"] + letters)
        if not self._slots or now >= self._slots[-1][0] + BURST_S / _BURST_SLOTS:
            self._slots.append((now, 0, 0))
        began, of_letters, of_moved = self._slots[-1]
        self._slots[-1] = (began, of_letters + letters, of_moved + moved)
        while self._slots[0][0] <= now - BURST_S:
            self._slots.popleft()

    def burst(self) -> tuple[int, float]:
        """Dead letters of the last five minutes, and their share of what came or went."""
        letters = sum(slot[1] for slot in self._slots)
        return letters, letters / max(sum(slot[2] for slot in self._slots), 1)


class _Rule(Struct, frozen=True, kw_only=True):
    name: str
    severity: Severity
    says: Callable[[Facts, _Memory], Says]
    text: Callable[[Facts, _Memory], str]  # empty: nothing is known any more, it stays as it was
    end: str
    raise_after_s: float = 0.0
    calm_s: float = 0.0  # how long it must have been good; 0: CLEAR_AFTER_S. What only happens at moments wants longer


def _said(bad: bool, good: bool) -> Says:
    return "bad" if bad else "good" if good else "neither"


def _room(facts: Facts) -> tuple[float, bool]:
    """What share of what it can have the spool has, and whether the disk is nearly full for everybody."""
    free = facts.disk_free_bytes
    capacity = facts.max_bytes if free is None else min(facts.max_bytes, facts.used_bytes + free)
    share = facts.used_bytes / capacity if capacity > 0 else 1.0
    return share, free is not None and free < _disk_reserve_bytes(facts)


def _disk_reserve_bytes(facts: Facts) -> int:
    return min(max(facts.max_bytes // 20, SMALLEST_DISK_RESERVE_BYTES), LARGEST_DISK_RESERVE_BYTES)


def _pressure(facts: Facts, memory: _Memory) -> Says:
    share, is_disk_full = _room(facts)
    return _said(share >= facts.spool_share or is_disk_full, share < facts.spool_share * CALM and not is_disk_full)


def _pressing(facts: Facts, memory: _Memory) -> str:
    share, is_disk_full = _room(facts)
    has = f"{_mib(facts.used_bytes)} of {_mib(facts.max_bytes)}"
    free = f"{_mib(facts.disk_free_bytes)} free"
    if share >= facts.spool_share or not is_disk_full:
        return f"The spool fills up: {share:.0%} of what it can have ({has}, {free} on the disk), {_waiting(facts)}"
    return (
        f"The spool's disk is nearly full: {free}, fewer than {_mib(_disk_reserve_bytes(facts))} (the spool has {has}), "
        f"{_waiting(facts)}. Make room on it"
    )


def _burst(facts: Facts, memory: _Memory) -> Says:
    letters, share = memory.burst()
    # Some are new: when only the events that they are compared with grow old, nothing has happened.
    bad = memory.grew["dead_lettered"] > 0 and letters >= BURST_LETTERS and share >= BURST_SHARE
    return _said(bad, letters < BURST_LETTERS / 2 or share < BURST_SHARE / 2)


def _skewed(facts: Facts, memory: _Memory) -> Says:
    skew_s = SKEW_S if facts.skew_s is None else abs(facts.skew_s)  # neither, if it isn't known
    return _said(skew_s > SKEW_S, skew_s < SKEW_S * CALM)


def _grew(name: str) -> Callable[[Facts, _Memory], Says]:
    return lambda _, memory: _said(memory.grew[name] > 0, good=True)


def _is(name: str) -> Callable[[Facts, _Memory], Says]:
    return lambda facts, _: _said(bool(getattr(facts, name)), good=True)


def _waiting(facts: Facts) -> str:
    age = "" if facts.oldest_age_s is None else f", the oldest for {_duration(facts.oldest_age_s)}"
    return f"{facts.waiting:,} event{'' if facts.waiting == 1 else 's'} waiting{age}"


def _duration(seconds: float) -> str:
    for unit, length, limit in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < limit:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


def _expiring(percent: int, severity: Severity) -> _Rule:
    def says(facts: Facts, memory: _Memory) -> Says:
        expires, age_s = facts.halted and facts.expires, facts.oldest_age_s or 0.0
        return _said(expires and age_s >= percent / 100 * facts.max_age_s, not expires)

    def text(facts: Facts, memory: _Memory) -> str:
        share = (facts.oldest_age_s or 0.0) / max(facts.max_age_s, 1.0)
        over = f"{share:.0%} of retention.max_age ({_duration(facts.max_age_s)}) is over"
        said = f"{over if facts.waiting else 'Nothing is left that could expire'} while Mixpanel refuses us: {_waiting(facts)}"
        return f"{said}. Repair the credential, or events expire. {facts.halt_reason}"

    end = "Nothing expires any more"
    return _Rule(name=f"expiring_{percent}", severity=severity, says=says, text=text, end=end)


RULES: Final = (
    _Rule(
        name="halted",
        severity="critical",
        says=lambda facts, _: _said(facts.halted, good=not facts.halt_doubtful),
        text=lambda facts, _: (
            f"Delivery is halted, events are kept{f' for {_duration(facts.max_age_s)}' if facts.expires else ''} "
            f"({_waiting(facts)}): {facts.halt_reason}"
            if facts.halted
            else ""
        ),
        end="Delivery goes on",
    ),
    _expiring(50, "warning"),
    _expiring(90, "critical"),
    _Rule(
        name="expired",
        severity="critical",
        says=lambda facts, memory: _said(memory.grew["expired"] > 0, good=not facts.halted),
        text=lambda facts, memory: (
            f"Events have begun to expire: {memory.expired:,} so far, older than retention.max_age "
            f"({_duration(facts.max_age_s)}). "
            f"{'They are dropped for good' if facts.drops else '`bridged replay` sends what was archived'}. {facts.halt_reason}"
            if memory.expired
            else ""
        ),
        end="No more events expire",
    ),
    _Rule(
        name="archive",
        severity="critical",
        says=_is("archive_problem"),
        text=lambda facts, _: f"Expired events can't be archived, and are kept: {facts.archive_problem}",
        end="Expired events are archived again",
    ),
    _Rule(
        name="undelivered",
        severity="critical",
        says=lambda facts, _: _said(
            not facts.halted and facts.waiting > 0 and facts.undelivered_s >= facts.undelivered_after_s,
            good=facts.halted or not facts.waiting or facts.undelivered_s < facts.undelivered_after_s * CALM,
        ),
        text=lambda facts, _: (
            f"Nothing has been delivered for {_duration(facts.undelivered_s)}: {_waiting(facts)}. "
            f"{facts.last_problem or 'Mixpanel says nothing'}"
        ),
        end="Events are delivered again",
    ),
    _Rule(
        name="stuck",
        severity="warning",
        says=lambda facts, _: _said(
            not facts.halted and facts.undelivered_s < facts.undelivered_after_s <= facts.in_vain_s,
            good=facts.in_vain_s < facts.undelivered_after_s * CALM,
        ),
        text=lambda facts, _: (
            f"{facts.in_vain:,} {'event is' if facts.in_vain == 1 else 'events are'} tried in vain, the first for "
            f"{_duration(facts.in_vain_s)}, although others are taken: Mixpanel, or something on the way, fails at them. They "
            "are kept and tried again; the log says what they are told"
        ),
        end="Nothing is tried in vain any more",
        raise_after_s=120.0,  # after an outage what waited is among it, for a moment
    ),
    _Rule(
        name="no_progress",
        severity="critical",
        says=_is("stalled"),
        text=lambda facts, _: f"No progress, and no known cause: {facts.stalled}",
        end="There is progress again",
    ),
    _Rule(
        name="spool_pressure",
        severity="warning",
        says=_pressure,
        text=_pressing,
        end="The spool has room again",
        raise_after_s=5.0,
    ),
    _Rule(
        name="refusing",
        severity="critical",
        says=_is("refusal"),
        text=lambda facts, _: f"New events are refused (503, reading paused): {facts.refusal}; {_waiting(facts)}",
        end="New events are taken again",
    ),
    _Rule(
        name="door",
        severity="critical",
        says=_is("door_lost"),
        text=lambda facts, _: f"Nobody finds a door any more: {facts.door_lost}",
        end="The doors are found again",
    ),
    _Rule(
        name="certificate_ended",
        severity="critical",
        says=_is("certificate_ended"),
        text=lambda facts, _: f"Who checks certificates doesn't come in: {facts.certificate_ended}{_RENEWED}",
        end="The certificates are good again",
    ),
    _Rule(
        name="certificate_ending",
        severity="warning",
        says=_is("certificate_ending"),
        text=lambda facts, _: f"A certificate needs to be renewed: {facts.certificate_ending}{_RENEWED}",
        end="No certificate ends soon",
    ),
    _Rule(
        name="dead_letters",
        severity="warning",
        says=_burst,
        text=lambda _, memory: (
            f"{memory.burst()[0]:,} dead letters within {_duration(BURST_S)}, {memory.burst()[1]:.0%} of the events: see "
            "`bridged dead-letters list`"
        ),
        end="Dead letters are rare again",
    ),
    _Rule(
        name="dead_letters_dropped",
        severity="critical",
        says=_grew("dead_letters_dropped"),
        text=lambda facts, _: (
            f"The oldest dead letters are dropped for good ({facts.dead_letters_dropped:,} since the start): there are more "
            "than spool.max_dead_letters, or they fill a quarter of spool.max_bytes"
        ),
        end="No more dead letters are dropped",
        calm_s=3600.0,
    ),
    _Rule(
        name="damaged",
        severity="critical",
        says=_grew("damaged"),
        text=lambda facts, _: (
            f"Data in the spool was damaged on disk ({facts.damaged:,} since the start): what is left of it is kept aside. "
            "Check the disk"
        ),
        end="No more damage was found",
        calm_s=3600.0,
    ),
    _Rule(
        name="missing",
        severity="critical",
        says=_grew("missing"),
        text=lambda facts, _: (
            f"At the start the spool knew nothing of {facts.missing:,} events that it had accepted before: what of them wasn't "
            "delivered is in a file `.displaced-` beside it, if there is one (see the README), else lost. Was its WAL cut off, "
            "or an old copy put in its place? Check the disk"
        ),
        end="No more events are missing",
        calm_s=3600.0,
    ),
    _Rule(
        name="clock",
        severity="warning",
        says=_skewed,
        text=lambda facts, _: (
            ""
            if facts.skew_s is None
            else f"This machine's clock is {_duration(abs(facts.skew_s))} {'ahead of' if facts.skew_s > 0 else 'behind'} "
            "Mixpanel's: times of events, what expires when, and which events are dead letters for being more than an hour "
            "ahead depend on it"
        ),
        end="This machine's clock is right again",
        raise_after_s=5.0,
    ),
    _Rule(
        name="cohorts_halted",
        severity="critical",
        says=_is("cohorts_halted"),
        text=lambda facts, _: f"Cohorts. {facts.cohorts_halted}",
        end="Cohorts are imported again",
    ),
    _Rule(
        name="cohorts_capped",
        severity="warning",
        says=_is("cohorts_capped"),
        text=lambda facts, _: f"Cohorts. {facts.cohorts_capped}",
        end="Cohorts are written to Braze again",
        raise_after_s=5.0,
    ),
    _Rule(
        name="configuration",
        severity="warning",
        says=_is("configuration_problem"),
        text=lambda facts, _: f"Configuration: {facts.configuration_problem}",
        end="The configuration is good again",
    ),
)
NAMES: Final = tuple(rule.name for rule in RULES)


def _mib(size: int | None) -> str:
    return "an unknown number of bytes" if size is None else f"{size / 2**20:,.0f} MiB"


class _Episode:
    """What is known of one alarm."""

    def __init__(self) -> None:
        self.open: Open | None = None
        self.bad_since: float | None = None
        self.good_since: float | None = None
        self.ended_at: float | None = None
        self.came_back = 0


class Alarms:
    """The alarms of one daemon. One owner asks `look` about every second."""

    def __init__(self) -> None:
        self.raised: dict[str, int] = dict.fromkeys(NAMES, 0)  # times, since the start
        self._memory = _Memory()
        self._episodes = {rule.name: _Episode() for rule in RULES}

    @property
    def open(self) -> list[Open]:
        """Those that are raised, in the order of the rules."""
        return [episode.open for episode in self._episodes.values() if episode.open is not None]

    def past(self, ahead_s: float) -> dict[str, Past]:
        """What is worth remembering after a restart. `ahead_s`: the wall clock less the clock that `now` is of."""
        return {
            name: Past(
                since=None if (is_open := episode.open) is None else is_open.since + ahead_s,
                ended_at=None if episode.ended_at is None else episode.ended_at + ahead_s,
                came_back=episode.came_back,
                text="" if is_open is None else is_open.text,
            )
            for name, episode in self._episodes.items()
            if episode.open is not None or episode.ended_at is not None
        }

    def remember(self, past: Mapping[str, Past], ahead_s: float) -> None:
        """Goes on where the last daemon ended: what it told isn't told again, and the end of it is."""
        for rule in RULES:
            if (of := past.get(rule.name)) is not None:
                episode = self._episodes[rule.name]
                episode.came_back = of.came_back
                episode.ended_at = None if of.ended_at is None else of.ended_at - ahead_s
                if of.since is not None:
                    since = of.since - ahead_s
                    episode.open = Open(alarm=rule.name, severity=rule.severity, since=since, text=of.text)

    def look(self, facts: Facts, now: float) -> list[Notice]:
        """What has begun and ended since the last look. `now` is monotonic seconds."""
        self._memory.note(facts, now)
        return [notice for rule in RULES for notice in self._step(rule, self._episodes[rule.name], facts, now)]

    def _step(self, rule: _Rule, episode: _Episode, facts: Facts, now: float) -> Iterator[Notice]:
        says = rule.says(facts, self._memory)
        episode.bad_since = (now if episode.bad_since is None else episode.bad_since) if says == "bad" else None
        episode.good_since = (now if episode.good_since is None else episode.good_since) if says == "good" else None
        if episode.open is not None:
            episode.open.ending = says == "good"
            if says != "good":
                episode.open.text = rule.text(facts, self._memory) or episode.open.text
        if episode.open is None:
            if episode.bad_since is not None and now - episode.bad_since >= rule.raise_after_s:
                is_back = episode.ended_at is not None and now - episode.ended_at < COMES_BACK_S
                episode.came_back = episode.came_back + 1 if is_back else 0
                text = rule.text(facts, self._memory)
                episode.open = Open(alarm=rule.name, severity=rule.severity, since=now, text=text)
                self.raised[rule.name] += 1
                yield Notice(alarm=rule.name, state="raised", severity=rule.severity, text=text)
        elif episode.good_since is not None and now - episode.good_since >= _clear_after_s(rule, episode.came_back):
            lasted_s = now - episode.open.since
            episode.open, episode.ended_at = None, now
            text = f"{rule.end}, after {_duration(lasted_s)}. {_waiting(facts)}"
            yield Notice(alarm=rule.name, state="cleared", severity=rule.severity, text=text, lasted_s=lasted_s)


def _clear_after_s(rule: _Rule, came_back: int) -> float:
    return min((rule.calm_s or CLEAR_AFTER_S) * 2.0 ** min(came_back, 10), LONGEST_CLEAR_AFTER_S)
