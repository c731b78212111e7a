"""What people and metrics are told of the membership, and the walks that people begin. Runs in the connection's thread."""

import sqlite3
from typing import Literal

import msgspec

from bridged.cohorts.merging import begin_walk
from bridged.cohorts.records import BROKEN_OFF_S, MAX_REFUSALS, CohortDetail, CohortRow, Figures, Refusal, RoundRow
from bridged.cohorts.tables import transaction
from bridged.errors import UnknownCohort

_DOING = {
    "forget": "forgetting",
    "sweep": "sweeping",
    "rename": "renaming",
    "resync": "resyncing",
    "retarget": "resyncing",
    "retry": "resyncing",
}


class _Counted(msgspec.Struct, array_like=True):
    id: int
    project: str
    cohort: str
    name: str
    description: str
    forgotten: int
    in_braze: int
    joining: int
    leaving: int
    rejected: int
    rejected_leaving: int
    pages: int
    received: int
    applied: int
    no_id: int
    too_long: int
    stale: int
    last_page_at: float | None
    synced_at: float | None
    walk: str | None
    walked: int | None
    page: int | None
    of: int | None


_COLUMNS = (
    "id, project, mixpanel_id, name, description, forgotten, in_braze, joining, leaving, rejected, rejected_leaving,"
    " pages, received, applied, no_id, too_long, stale, last_page_at, synced_at"
)


def rows(db: sqlite3.Connection, now: float) -> list[CohortRow]:
    """All cohorts, by project and id. A session that has broken off is received no longer."""
    coming = "WHERE r.id = c.newest AND complete + superseded = 0 AND r.last_page_at > :since"
    one = (
        f"SELECT json_array({_COLUMNS}, (SELECT kind FROM walks w WHERE w.cohort = c.id ORDER BY w.id LIMIT 1),"
        " (SELECT cursor FROM walks w WHERE w.cohort = c.id ORDER BY w.id LIMIT 1),"
        f" (SELECT pages FROM rounds r {coming}), (SELECT total FROM rounds r {coming})) AS row"
        " FROM (SELECT *, (SELECT max(id) FROM rounds WHERE cohort = cohorts.id) AS newest FROM cohorts) c"
        " ORDER BY project, mixpanel_id"
    )
    found = db.execute(f"SELECT json_group_array(json(row)) FROM ({one})", {"since": now - BROKEN_OFF_S}).fetchone()[0]
    last = db.execute("SELECT coalesce(max(key), 1) FROM users").fetchone()[0]
    return [_row(each, last) for each in msgspec.json.decode(found, type=list[_Counted])]


def _row(c: _Counted, last: int) -> CohortRow:
    members = c.in_braze + c.joining + c.rejected
    total = members + c.leaving + c.rejected_leaving
    if c.walk is not None:
        state, progress = _DOING[c.walk], min(1.0, (c.walked or 0) / last)
    elif c.of is not None:
        state, progress = "receiving", min(1.0, (c.page or 0) / c.of)
    elif c.forgotten:
        state, progress = "forgetting", 0.0
    elif c.joining + c.leaving:
        state, progress = "sending", (total - c.joining - c.leaving) / total
    else:
        state, progress = "synced", 1.0
    return CohortRow(
        key=f"{c.project}:{c.cohort}",
        project=c.project,
        cohort=c.cohort,
        name=c.name,
        description=c.description,
        members=members,
        in_braze=c.in_braze,
        joining=c.joining,
        rejected=c.rejected,
        leaving=c.leaving,
        rejected_leaving=c.rejected_leaving,
        state=state,
        progress=round(progress, 4),
        pages=c.pages,
        received=c.received,
        applied=c.applied,
        no_id=c.no_id,
        too_long=c.too_long,
        stale=c.stale,
        last_page_at=c.last_page_at,
        synced_at=c.synced_at,
    )


def breaks_off(rows: list[CohortRow], now: float) -> bool:
    """Whether a session has broken off since the rows were read."""
    return any(row.state == "receiving" and (row.last_page_at or 0) <= now - BROKEN_OFF_S for row in rows)


def row_of(rows: list[CohortRow], key: str) -> CohortRow:
    """The row of `project:cohort`, or of a plain cohort id that only one project has. Raises UnknownCohort."""
    found = [row for row in rows if key in (row.key, row.cohort)]
    if not found:
        known = ", ".join(row.key for row in rows[:20])
        raise UnknownCohort(f"no cohort {key!r}", f"known are: {known}" if known else "none has come yet")
    if len(found) > 1:
        raise UnknownCohort(f"several projects have a cohort {key!r}", f"say {' or '.join(r.key for r in found)}")
    return found[0]


def figures(cohorts: list[CohortRow], waiting: int, used: int, *, commits: int, seconds: float) -> Figures:
    """Sums over all cohorts, but for the data points."""
    names = (
        *("members", "in_braze", "joining", "leaving", "rejected", "rejected_leaving"),
        *("pages", "received", "applied", "no_id", "too_long", "stale"),
    )
    return Figures(
        cohorts=len(cohorts),
        waiting=waiting,
        file_bytes=used,
        commits=commits,
        commit_seconds=seconds,
        **{name: sum(getattr(row, name) for row in cohorts) for name in names},
    )


def is_walking(db: sqlite3.Connection) -> bool:
    """Whether a walk is under way."""
    return db.execute("SELECT 1 FROM walks LIMIT 1").fetchone() is not None


def used_bytes(db: sqlite3.Connection) -> int:
    """The bytes of the pages that hold something."""
    pages = "(SELECT page_count FROM pragma_page_count) - (SELECT freelist_count FROM pragma_freelist_count)"
    used: int = db.execute(f"SELECT ({pages}) * (SELECT page_size FROM pragma_page_size)").fetchone()[0]
    return used


def rounds_of(db: sqlite3.Connection, project: str, cohort: str) -> list[RoundRow]:
    """The sessions of a cohort, the newest first."""
    found = db.execute(
        "SELECT session, action, started_at, last_page_at, total, pages, complete, superseded, received, no_id, too_long,"
        ' stale, joined, "left" FROM rounds WHERE cohort = (SELECT id FROM cohorts WHERE project = ? AND mixpanel_id = ?)'
        " ORDER BY id DESC LIMIT 50",
        (project, cohort),
    ).fetchall()
    names = RoundRow.__struct_fields__
    return [msgspec.convert(dict(zip(names, row, strict=True)), RoundRow, strict=False) for row in found]


def refusals(db: sqlite3.Connection, after: int, limit: int, of: tuple[str, str] | None = None) -> list[Refusal]:
    """Users that Braze refused and still refuses, by id; `of`: in one cohort, a project and an id in it."""
    rejected = "FROM members m JOIN cohorts c ON c.id = m.cohort WHERE m.user = r.user AND m.rejected = 1"
    in_it = f"EXISTS (SELECT 1 {rejected}{' AND c.project = ? AND c.mixpanel_id = ?' if of else ''})"
    found = db.execute(
        f"SELECT r.user, u.external_id, (SELECT json_group_array(c.project || ':' || c.mixpanel_id) {rejected}),"
        f" r.reason, r.attempts, r.first_at, r.last_at FROM refusals r JOIN users u ON u.key = r.user WHERE r.user > ?"
        f" AND {in_it} ORDER BY r.user LIMIT ?",
        (after, *(of or ()), limit),
    ).fetchall()
    return [
        Refusal(
            id=user,
            external_id=external_id,
            cohorts=msgspec.json.decode(cohorts, type=list[str]),
            reason=reason,
            attempts=attempts,
            first_at=first_at,
            last_at=last_at,
        )
        for user, external_id, cohorts, reason, attempts, first_at, last_at in found
    ]


def detail(db: sqlite3.Connection, row: CohortRow) -> CohortDetail:
    """A cohort with its sessions and its first refusals."""
    return CohortDetail(
        cohort=row,
        rounds=rounds_of(db, row.project, row.cohort),
        refusals=refusals(db, 0, MAX_REFUSALS, (row.project, row.cohort)),
    )


def begin(
    db: sqlite3.Connection, wanted: list[tuple[str, str]], kind: Literal["retry", "resync", "forget"], now: float
) -> None:
    """Begins a walk over each of some cohorts. One transaction."""
    with transaction(db):
        for project, mixpanel_id in wanted:
            found = db.execute(
                "SELECT id FROM cohorts WHERE project = ? AND mixpanel_id = ?", (project, mixpanel_id)
            ).fetchone()
            if found is None:
                continue
            round_ = 0
            if kind == "forget":
                round_ = (
                    db.execute(
                        "INSERT INTO rounds (cohort, session, action, total, started_at, last_page_at, complete)"
                        " VALUES (?, '', 'forget', 0, ?, ?, 1)",
                        (found[0], now, now),
                    ).lastrowid
                    or 0
                )
                db.execute("UPDATE cohorts SET forgotten = 1 WHERE id = ?", (found[0],))
            if kind == "resync":
                db.execute("UPDATE cohorts SET announced = 0 WHERE id = ?", (found[0],))
            begin_walk(db, found[0], kind, round_)
