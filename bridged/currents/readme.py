"""The README's table of event types, made from the rows: a test holds the two together. Pure."""

from collections.abc import Sequence

from bridged.currents.table import EVENT_TYPES, MTU_EXEMPT, EventType

_HEAD = ("Currents event type", "Mixpanel name (seed)", "Mixpanel name (current)", "group", "MTU-exempt")


def events_markdown(rows: Sequence[EventType] = EVENT_TYPES) -> str:
    """A Markdown table with a line a type, in the order of the rows."""
    lines = [_HEAD, ("---",) * len(_HEAD), *map(_cells, rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cells(row: EventType) -> tuple[str, ...]:
    named_by_the_event = " *its name*" if row.custom == "event" else ""
    names = (row.seed_name or row.name, row.name)
    group = row.group.replace("_", " ")
    return (f"`{row.event_type}`", *(name + named_by_the_event for name in names), group, _exempt(names))


def _exempt(names: tuple[str, ...]) -> str:
    """Mixpanel goes by the exact name: one that differs in its capitals only has to be given by hand."""
    if any(name in MTU_EXEMPT for name in names):
        return "yes"
    near = {name.casefold(): name for name in MTU_EXEMPT}
    return next((f"as `{near[name.casefold()]}`" for name in names if name.casefold() in near), "")
