"""From the inbox into the membership: which pages still count, whom they name, and whom a complete round no longer names.

Everything here runs in the connection's thread, in the order in which pages were committed, in steps of bounded size, each
of which is one transaction: killed between two, the next start goes on where the last one ended.

Which pages count. A session is (cohort, mixpanel_session_id, action). When its first page comes it is given a round, whose
id is higher than all before: the first page of a session that was never seen is taken for the newest, since nothing in it
could say otherwise. A later page of a known session is stale, and changes nothing, if

- a newer round of the same action, a newer `members` round, or a `forget`, has begun: Mixpanel runs the syncs of a cohort
  one after the other, so the older one is over, and what it failed to say the newer one repeats; or
- this very page has come before, and any newer round has begun: then it is a late repeat.

So an `add_members` and a `remove_members` session may run side by side, under one session id or two, in any order. A row
remembers the round that last spoke of it, and an older one can't take it back. A repeat within the newest round is merged
again, which changes nothing: a restart from the top under the same session id may have cut its pages elsewhere. Another
total under the same session id is such a restart, and gets a new round.

`members` replaces: when the pages 1 to total of its round have all come, and only then, a walk takes out whoever was
stamped by an older round. A round is completed once, so a repeated last page sweeps nobody.
"""

import json
import sqlite3
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

import msgspec
import structlog
from msgspec import Struct

from bridged.cohorts.tables import collect, transaction
from bridged.cohorts.webhook import Page

log = structlog.get_logger()

WalkKind = Literal["sweep", "rename", "resync", "retarget", "retry", "forget"]
# Each touches a page of its own, and SQLite keeps what was there until the statement ends: memory, 4 KiB a member.
MERGE_MEMBERS: Final = 20_000
_MERGE_PAGES: Final = 500
WALK_ROWS: Final = 50_000
# Enough to know a late repeat by for two days of syncs every half hour.
_ROUNDS_KEPT: Final = 200


class Head(Struct, array_like=True):
    """A page in the inbox, but for its ids."""

    action: str
    project: str
    cohort: str
    name: str
    description: str
    session: str
    total: int
    page: int
    no_id: int
    too_long: int


def head_of(page: Page) -> Head:
    """What is kept of a page besides its ids."""
    return Head(
        page.action,
        page.project,
        page.cohort,
        page.name,
        page.description,
        page.session,
        page.total,
        page.page,
        page.no_id,
        page.too_long,
    )


class _Waiting(Struct, array_like=True):
    id: int
    received_at: float
    members: int
    head: Head


class _Place(NamedTuple):
    """What a page is about."""

    cohort: int
    round: int
    action: str


def receive(db: sqlite3.Connection, rows: list[tuple[float, int, str, str]]) -> None:
    """Commits pages: received_at, members, head and ids, the latter two as JSON."""
    with transaction(db):
        db.executemany("INSERT INTO inbox (received_at, members, head, ids) VALUES (?, ?, ?, ?)", rows)


def merge(db: sqlite3.Connection, *, by_name: bool) -> tuple[int, int]:
    """Merges the first pages of the inbox; gives how many, and how many members they have. One transaction.

    Ends early where a round is complete: its walk comes before the pages behind it. `by_name`: Braze knows a cohort by its
    name, so that a renamed one must be written again.
    """
    first = f"SELECT id, received_at, members, head FROM inbox ORDER BY id LIMIT {_MERGE_PAGES}"
    one_row = f"SELECT json_group_array(json_array(id, received_at, members, json(head))) FROM ({first})"
    waiting = msgspec.json.decode(db.execute(one_row).fetchone()[0], type=list[_Waiting])
    merged, done, pages, completed = 0, 0, 0, False
    with transaction(db):
        run: list[int] = []  # ids in the inbox, of one place
        of: _Place | None = None
        for page in waiting:
            place = _place(db, page, by_name=by_name)
            if of is not None and place != of:
                _apply(db, of, run, by_name=by_name)
                run, of = [], None
            if place is not None:
                run.append(page.id)
                of = place
                completed = _came(db, place.round, page.head) and place.action == "members"
            merged += page.members
            pages += 1
            done = page.id
            if completed or merged >= MERGE_MEMBERS:
                break
        if of is not None:
            _apply(db, of, run, by_name=by_name)
            if completed:
                _sweep_if_needed(db, of.cohort, of.round)
        db.execute("DELETE FROM inbox WHERE id <= ?", (done,))
        _end(db)
    return pages, merged


def _place(db: sqlite3.Connection, page: _Waiting, *, by_name: bool) -> _Place | None:
    """The cohort and the round of a page, made if they are new; None: it is stale. Counts the page."""
    head = page.head
    found = db.execute(
        "SELECT id, name FROM cohorts WHERE project = ? AND mixpanel_id = ?", (head.project, head.cohort)
    ).fetchone()
    if found is None:
        name = head.name or f"Cohort {head.cohort}"
        cohort = _inserted(
            db,
            "INSERT INTO cohorts (project, mixpanel_id, name, description, created_at) VALUES (?, ?, ?, ?, ?)",
            (head.project, head.cohort, name, head.description, page.received_at),
        )
    else:
        cohort, name = found
    known = None
    if head.session:
        known = db.execute(
            "SELECT id, total FROM rounds WHERE cohort = ? AND session = ? AND action = ? ORDER BY id DESC LIMIT 1",
            (cohort, head.session, head.action),
        ).fetchone()
    stale = known is not None and _is_stale(db, cohort, known[0], head)
    restarted = known is not None and not stale and known[1] != head.total
    round_ = _begin(db, cohort, page) if known is None or restarted else known[0]
    received = page.members + head.no_id + head.too_long
    stale_members = page.members if stale else 0
    counts = "received = received + ?, no_id = no_id + ?, too_long = too_long + ?, stale = stale + ?, last_page_at = ?"
    values = (received, head.no_id, head.too_long, stale_members, page.received_at)
    db.execute(f"UPDATE rounds SET {counts} WHERE id = ?", (*values, round_))
    db.execute(
        f"UPDATE cohorts SET {counts}, pages = pages + 1, applied = applied + ? WHERE id = ?",
        (*values, page.members - stale_members, cohort),
    )
    if stale:
        return None
    if head.name and head.name != name:
        db.execute("UPDATE cohorts SET name = ?, version = version + 1 WHERE id = ?", (head.name, cohort))
        if by_name:
            begin_walk(db, cohort, "rename")
    if head.description:
        db.execute("UPDATE cohorts SET description = ? WHERE id = ?", (head.description, cohort))
    return _Place(cohort, round_, head.action)


def _begin(db: sqlite3.Connection, cohort: int, page: _Waiting) -> int:
    """A new round. What it overtakes can't be completed any more."""
    head = page.head
    overtaken = "add_members remove_members members" if head.action == "members" else head.action
    db.execute(
        "UPDATE rounds SET superseded = 1 WHERE cohort = ? AND complete = 0"
        " AND action IN (SELECT value FROM json_each(?))",
        (cohort, json.dumps(overtaken.split())),
    )
    round_ = _inserted(
        db,
        "INSERT INTO rounds (cohort, session, action, total, started_at, last_page_at) VALUES (?, ?, ?, ?, ?, ?)",
        (cohort, head.session, head.action, head.total, page.received_at, page.received_at),
    )
    db.execute("UPDATE cohorts SET forgotten = 0 WHERE id = ?", (cohort,))
    old = "SELECT id FROM rounds WHERE cohort = ? ORDER BY id DESC LIMIT -1 OFFSET ?"
    db.execute(f"DELETE FROM pages WHERE round IN ({old})", (cohort, _ROUNDS_KEPT))
    db.execute(f"DELETE FROM rounds WHERE id IN ({old})", (cohort, _ROUNDS_KEPT))
    return round_


def _inserted(db: sqlite3.Connection, statement: str, values: Sequence[object]) -> int:
    id_ = db.execute(statement, values).lastrowid
    assert id_ is not None
    return id_


def _is_stale(db: sqlite3.Connection, cohort: int, round_: int, head: Head) -> bool:
    """See the top of the file."""
    newer = "SELECT 1 FROM rounds WHERE cohort = ? AND id > ?"
    if db.execute(f"{newer} AND action IN ('members', 'forget', ?) LIMIT 1", (cohort, round_, head.action)).fetchone():
        return True
    if db.execute(f"{newer} LIMIT 1", (cohort, round_)).fetchone() is None:
        return False
    repeat = db.execute("SELECT 1 FROM pages WHERE round = ? AND page = ?", (round_, head.page)).fetchone()
    return repeat is not None


def _came(db: sqlite3.Connection, round_: int, head: Head) -> bool:
    """Notes that a page of a round has come. Whether the round is complete by it, and wasn't before."""
    if not db.execute("INSERT OR IGNORE INTO pages (round, page) VALUES (?, ?)", (round_, head.page)).rowcount:
        return False
    inside = 1 <= head.page <= head.total
    db.execute("UPDATE rounds SET pages = pages + ? WHERE id = ?", (inside, round_))
    completes = "UPDATE rounds SET complete = 1 WHERE id = ? AND complete = 0 AND superseded = 0 AND pages = total"
    return bool(db.execute(completes, (round_,)).rowcount)


_MEMBERS_OF: Final = "SELECT in_braze + joining + rejected FROM cohorts WHERE id = ?"


def _apply(db: sqlite3.Connection, of: _Place, run: list[int], *, by_name: bool) -> None:
    """Moves the members that pages of one round name."""
    cohort, round_, action = of
    before = db.execute(_MEMBERS_OF, (cohort,)).fetchone()[0]
    pages = json.dumps(run)
    ids = "SELECT j.value AS id FROM inbox i, json_each(i.ids) j WHERE i.id IN (SELECT value FROM json_each(?))"
    # In order, so that each page of the index is touched once.
    if action != "remove_members":
        db.execute(
            f"INSERT INTO users (external_id) SELECT id FROM ({ids} ORDER BY 1) WHERE true ON CONFLICT DO NOTHING",
            (pages,),
        )
    db.execute("DELETE FROM temp.batch")
    db.execute(
        f"INSERT OR IGNORE INTO temp.batch SELECT u.key FROM ({ids} ORDER BY 1) CROSS JOIN users u ON u.external_id = id",
        (pages,),
    )
    if action == "remove_members":
        db.execute(
            "UPDATE members SET stamp = :round, wanted = 0, rejected = 0"
            " WHERE user IN (SELECT user FROM temp.batch) AND cohort = :cohort AND stamp < :round",
            {"round": round_, "cohort": cohort},
        )
        collect(db, "{} IN (SELECT user FROM temp.batch)")
    else:
        version = db.execute("SELECT version FROM cohorts WHERE id = ?", (cohort,)).fetchone()[0] if by_name else 1
        stamped = db.execute(
            "INSERT INTO members (user, cohort, stamp, wanted, sent, rejected)"
            " SELECT user, ?, ?, ?, 0, 0 FROM temp.batch WHERE true"
            " ON CONFLICT (user, cohort) DO UPDATE SET stamp = excluded.stamp, wanted = excluded.wanted,"
            " rejected = iif(members.wanted = excluded.wanted, members.rejected, 0) WHERE members.stamp < excluded.stamp",
            (cohort, round_, version),
        ).rowcount
        db.execute("UPDATE rounds SET seen = seen + ? WHERE id = ?", (stamped, round_))
    moved = db.execute(_MEMBERS_OF, (cohort,)).fetchone()[0] - before
    db.execute(
        'UPDATE rounds SET joined = joined + max(0, :moved), "left" = "left" + max(0, -:moved) WHERE id = :round',
        {"moved": moved, "round": round_},
    )


def _sweep_if_needed(db: sqlite3.Connection, cohort: int, round_: int) -> None:
    """A complete round takes out whom it didn't name, unless it named all there are."""
    seen = db.execute("SELECT seen FROM rounds WHERE id = ?", (round_,)).fetchone()[0]
    members = db.execute(_MEMBERS_OF, (cohort,)).fetchone()[0]
    newer = db.execute("SELECT 1 FROM rounds WHERE cohort = ? AND id > ? LIMIT 1", (cohort, round_)).fetchone()
    # Under a newer round rows bear its stamp, and the two counts don't speak of the same rows.
    if newer is not None or seen != members:
        begin_walk(db, cohort, "sweep", round_)


# -- walks -------------------------------------------------------------------------------------------------------------


def begin_walk(db: sqlite3.Connection, cohort: int, kind: WalkKind, round_: int = 0) -> None:
    """A pass over all members of a cohort, from the first on; one of the same kind that has begun starts again."""
    db.execute("DELETE FROM walks WHERE cohort = ? AND kind = ?", (cohort, kind))
    db.execute("INSERT INTO walks (cohort, kind, round) VALUES (?, ?, ?)", (cohort, kind, round_))


# So many targets have a bit of their own; one more shares the first one's.
_TARGETS: Final = 62


def aim(db: sqlite3.Connection, target: str) -> None:
    """Notes what is written from now on. Another target is told everything that is wanted, and who is out of it since it was
    the last time; of the one before it is remembered whom it has.
    """
    found = dict(db.execute("SELECT name, value FROM meta WHERE name IN ('target', 'targets')"))
    last = found.get("target", target)
    targets = msgspec.json.decode(found.get("targets", "[]"), type=list[str]) or [last]
    if target != last:
        again = target in targets
        targets += [] if again else [target]
        was, now = (targets.index(each) % _TARGETS for each in (last, target))
        # One that has begun isn't begun anew: it ends first, since what it hasn't passed is known of its own two.
        db.execute(
            "INSERT INTO walks (cohort, kind, round) SELECT id, 'retarget', ? FROM cohorts", (was * _TARGETS + now,)
        )
        db.execute("UPDATE cohorts SET announced = 0")
        log.warning("cohorts_resync", why="another target", was=last, now=target, again=again)
    values = {"target": target, "targets": msgspec.json.encode(targets).decode()}
    db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", values.items())


# What a walk does to the rows that it passes. In place of a round a retarget has the numbers of two targets.
_WAS: Final = f"(1 << (:round / {_TARGETS}))"
_NOW: Final = f"(1 << (:round % {_TARGETS}))"
_STEPS: Final[dict[str, str]] = {
    "sweep": "wanted = 0, rejected = 0 WHERE {} AND stamp < :round AND wanted > 0",
    "forget": "wanted = 0, rejected = 0, elsewhere = 0, stamp = :round WHERE {} AND stamp < :round",
    "rename": "wanted = :version, rejected = 0 WHERE {} AND wanted > 0 AND wanted <> :version",
    "resync": "wanted = iif(wanted > 0, :version, 0), sent = -1, rejected = 0 WHERE {} AND (wanted > 0 OR sent <> 0)",
    "retarget": (
        "wanted = iif(wanted > 0, :version, 0), rejected = 0,"
        f" sent = iif(wanted > 0 OR sent <> 0 OR elsewhere & {_NOW}, -1, 0),"
        f" elsewhere = iif(:forgotten, 0, (iif(sent <> 0, elsewhere | {_WAS}, elsewhere & ~{_WAS})) & ~{_NOW})"
        " WHERE {}"
    ),
    "retry": "rejected = 0 WHERE {} AND rejected = 1",
}
_PASSED: Final = "cohort = :cohort AND user > :after AND user <= :up_to"


def walk(db: sqlite3.Connection, *, by_name: bool) -> bool:
    """One step of the oldest walk; whether there was one. One transaction."""
    found = db.execute("SELECT id, cohort, kind, round, cursor FROM walks ORDER BY id LIMIT 1").fetchone()
    if found is None:
        return False
    id_, cohort, kind, round_, cursor = found
    with transaction(db):
        up_to = db.execute(
            f"SELECT max(user) FROM (SELECT user FROM members WHERE user > ? ORDER BY user LIMIT {WALK_ROWS})",
            (cursor,),
        ).fetchone()[0]
        if up_to is None:
            db.execute("DELETE FROM walks WHERE id = ?", (id_,))
            _end(db)
            return True
        version, forgotten = db.execute("SELECT version, forgotten FROM cohorts WHERE id = ?", (cohort,)).fetchone()
        before = db.execute(_MEMBERS_OF, (cohort,)).fetchone()[0]
        db.execute(
            f"UPDATE members SET {_STEPS[kind].format(_PASSED)}",
            {
                "cohort": cohort,
                "after": cursor,
                "up_to": up_to,
                "round": round_,
                "version": version if by_name else 1,
                "forgotten": forgotten,
            },
        )
        collect(db, "{0} > ? AND {0} <= ?", (cursor, up_to))
        left = before - db.execute(_MEMBERS_OF, (cohort,)).fetchone()[0]
        db.execute('UPDATE rounds SET "left" = "left" + ? WHERE id = ?', (left, round_))
        db.execute("UPDATE walks SET cursor = ? WHERE id = ?", (up_to, id_))
    return True


def _end(db: sqlite3.Connection) -> None:
    """What may be so after any step: a cohort can be buried, and one whose pages have all come is in step without a write."""
    bury(db)
    incomplete = "EXISTS (SELECT 1 FROM rounds WHERE cohort = cohorts.id AND complete + superseded = 0)"
    db.execute(
        "UPDATE cohorts SET synced_at = last_page_at"
        f" WHERE synced_at IS NULL AND joining + leaving = 0 AND NOT {incomplete}"
    )


def bury(db: sqlite3.Connection) -> None:
    """Deletes the cohorts that were to be forgotten and of which nothing is left, in Braze neither, but for what it refuses."""
    empty = "forgotten = 1 AND in_braze + joining + leaving + rejected = 0"
    # A page that waits may be a late repeat, which is known by the rounds.
    walked = "id NOT IN (SELECT cohort FROM walks) AND NOT EXISTS (SELECT 1 FROM inbox)"
    found = db.execute(f"SELECT id, name, rejected_leaving FROM cohorts WHERE {empty} AND {walked}").fetchall()
    for cohort, name, refused in found:
        if refused:
            log.warning("cohort_forgotten", cohort=name, refused=refused, why="Braze refuses to take these users out")
            db.execute("DELETE FROM temp.batch")
            db.execute("INSERT INTO temp.batch SELECT user FROM members WHERE cohort = ?", (cohort,))
            stuck = "cohort = ? AND user IN (SELECT user FROM temp.batch)"
            db.execute(f"UPDATE members SET sent = 0, rejected = 0 WHERE {stuck}", (cohort,))
            collect(db, "{} IN (SELECT user FROM temp.batch)")
        db.execute("DELETE FROM pages WHERE round IN (SELECT id FROM rounds WHERE cohort = ?)", (cohort,))
        db.execute("DELETE FROM rounds WHERE cohort = ?", (cohort,))
        db.execute("DELETE FROM cohorts WHERE id = ?", (cohort,))
