"""The rules of the house, checked in the source: who may import whom, what deciding may not touch, how long a file may be."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "bridged"
FILES = sorted(ROOT.rglob("*.py"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())

# A room is a folder, or a file beside the folders; it imports itself and the rooms named here, which stand above it in
# this list. From the ground up: what is said, what is sent, what waits, what leaves, what comes in, who looks, who opens.
LADDER: dict[str, set[str]] = {
    "errors": set(),
    "addresses": set(),
    "redaction": set(),
    "logs": {"redaction"},
    "clock": set(),
    "apart": set(),
    "activity": {"apart", "redaction"},
    "settings": set(),
    "currents": set(),
    "mixpanel": {"currents"},
    # What the configuration may say of events, in the words of the table and of the mapping.
    "event_rules": {"currents", "mixpanel", "settings"},
    # And of cohorts.
    "cohort_rules": {"settings"},
    "config": {"addresses", "cohort_rules", "errors", "event_rules", "redaction", "settings"},
    "config_text": {"config", "settings"},
    # Those of the listeners.
    "certificates": {"errors", "settings"},
    "reloading": {"apart", "config", "errors", "settings"},
    "memory": set(),
    "connections": {"apart"},
    "durable": set(),
    # What was saved on the page, over the configuration.
    "saved": {"config", "config_text", "durable", "errors", "redaction", "settings"},
    # Facts in, notices out: it knows nobody.
    "alarms": {"apart", "connections"},
    "presence": {"durable", "errors"},
    "backlog": {"durable", "errors", "presence"},
    "delivery": {"apart", "backlog", "connections", "errors", "mixpanel", "redaction"},
    # Braze's answers are judged in the words of Mixpanel's, and asked for through the same kind of client.
    "braze": {"connections", "errors", "mixpanel", "delivery", "redaction"},
    # The way back: from Mixpanel's webhook to Braze.
    "cohorts": {"errors", "braze", "mixpanel", "presence"},
    "intake": {"errors", "currents", "mixpanel", "backlog"},
    "sources": {"addresses", "apart", "errors", "memory", "redaction", "backlog", "intake", "cohorts"},
    "open_files": {"errors", "settings"},
    # The configuration in each part's own terms.
    "options": {"addresses", "alarms", "backlog", "delivery", "mixpanel", "open_files", "settings", "sources"},
    "foresight": {"certificates", "config", "connections", "mixpanel", "options", "settings"},
    # The cohorts' parts, made from a configuration.
    "cohort_import": {"errors", "clock", "settings", "braze", "cohorts", "sources"},
    # The admin side looks at everything that runs, and changes only dead letters and, through the app, the credential.
    "admin": {
        "open_files",
        "activity",
        "addresses",
        "event_rules",
        "options",
        "saved",
        "settings",
        "errors",
        "redaction",
        "config",
        "alarms",
        "currents",
        "mixpanel",
        "backlog",
        "delivery",
        "cohorts",
    },
    # What a service manager hands over and wants to hear.
    "service": {"errors"},
    # Knows everyone.
    "app": {
        *(
            "errors",
            "clock",
            "settings",
            "config",
            "reloading",
            "memory",
            "saved",
            "open_files",
            "options",
            "foresight",
            "certificates",
            "activity",
            "apart",
            "alarms",
            "currents",
            "mixpanel",
            "backlog",
            "delivery",
            "intake",
            "cohorts",
            "cohort_import",
        ),
        *("redaction", "sources", "admin", "service"),
    },
    # Mixpanel as others know it: what it shared with the path could not find the path's mistakes.
    "emulator": {"errors"},
    # Commands talk to a daemon, or open the parts that they check.
    "commands": {
        "presence",
        "addresses",
        "certificates",
        "connections",
        "durable",
        "errors",
        "event_rules",
        "settings",
        "config",
        "config_text",
        "redaction",
        "saved",
        "options",
        "currents",
        "mixpanel",
        "backlog",
        "delivery",
        "sources",
        "cohorts",
        "braze",
        "admin",
        "cohort_import",
    },
    "cli": {"errors", "redaction", "logs", "config", "memory", "open_files", "app", "emulator", "commands"},
    "__main__": {"cli"},
}

# Deciding: bytes, numbers and `now` in, a decision out. Whatever waits, looks at the clock or speaks stands elsewhere.
PURE = [
    *sorted((ROOT / "currents").glob("*.py")),
    *sorted((ROOT / "mixpanel").glob("*.py")),
    *[ROOT / "braze" / f"{name}.py" for name in ("clusters", "requests", "verdicts")],
    ROOT / "backlog" / "records.py",
    ROOT / "backlog" / "segment.py",
    ROOT / "backlog" / "accounts.py",
    ROOT / "delivery" / "pacing.py",
    ROOT / "sources" / "shares.py",
    ROOT / "cohorts" / "webhook.py",
    ROOT / "cohorts" / "records.py",
    ROOT / "cohorts" / "pace.py",
    ROOT / "cohorts" / "strikes.py",
    ROOT / "admin" / "health.py",
    ROOT / "admin" / "sessions.py",
    ROOT / "admin" / "selection.py",
    ROOT / "alarms" / "rules.py",
    ROOT / "clock.py",
    ROOT / "event_rules.py",
    *[
        ROOT / "emulator" / f"{name}.py"
        for name in ("answers", "batch", "bodies", "credentials", "faults", "limits", "project", "reading", "store")
    ],
    *[ROOT / "emulator" / f"{name}.py" for name in ("validation", "workspace")],
]
IMPURE = {
    *("asyncio", "aiohttp", "aiosqlite", "sqlite3", "time", "socket", "threading", "uvloop"),
    *("logging", "structlog", "os", "pathlib", "subprocess", "shutil", "tempfile"),
}
# Of datetime, which may be used for what it says of a given time.
CLOCKS = {"now", "utcnow", "today"}

MAX_LINES = 480
# Longer for a reason; no longer than this.
LONGER = {
    "sources/stream.py": (
        600,
        "a connection and what all connections share: who owns which byte reads best in one place",
    ),
    "sources/http_connections.py": (580, "the same for the HTTP door"),
    "app.py": (505, "knows everyone: opening, reloading and closing mirror each other"),
    "alarms/rules.py": (505, "one table: an alarm, when it is raised and what it says read best in one place"),
    "config.py": (
        525,
        "reading, checking and writing: how a key is spelled, and what is said of it, is known in one place",
    ),
    "delivery/delivery.py": (525, "one dispatcher: the ways on for each verdict read best side by side"),
    "delivery/pacing.py": (530, "two control loops that share one schedule"),
    "cohorts/membership.py": (500, "one owner, as the spool: opening, the writer and its transactions belong together"),
    "backlog/spool.py": (
        725,
        "one owner: opening, the writer, its transaction and the rows that it reads belong together",
    ),
}


def tree(path: Path) -> ast.Module:
    """A file, parsed."""
    return ast.parse(path.read_text(encoding="utf-8"))


def for_types_only(node: ast.AST) -> bool:
    """Whether a statement is `if TYPE_CHECKING:`, whose imports never happen."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Everything below a node, but for what exists for types only."""
    for child in ast.iter_child_nodes(node):
        if not for_types_only(child):
            yield child
            yield from statements(child)


def imports(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, wherever in it."""
    for node in statements(tree(path)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides the room"
            if node.module == "bridged":
                yield from (f"bridged.{name.name}" for name in node.names)
            else:
                yield node.module or ""


def room(path: Path) -> str:
    """The room that a file belongs to."""
    parts = path.relative_to(ROOT).parts
    return parts[0].removesuffix(".py")


@every_file
def test_a_room_imports_only_rooms_below_its_own(path: Path) -> None:
    """So that a reader can take the rooms one by one, and a change in one reaches only those above it."""
    if path == ROOT / "__init__.py":
        assert list(imports(path)) == []
        return
    ours = room(path)
    for name in imports(path):
        package, _, rest = name.partition(".")
        theirs = rest.partition(".")[0]
        if package == "bridged" and theirs not in (ours, "__version__"):
            assert theirs in LADDER[ours], f"{path.relative_to(ROOT)} imports {name}: {ours} may know {LADDER[ours]}"


def test_the_ladder_has_no_rungs_that_lead_down() -> None:
    """Every room stands after those that it imports: no circles. And every room is on it."""
    order = list(LADDER)
    assert [(a, b) for a, below in LADDER.items() for b in below if order.index(b) >= order.index(a)] == []
    assert {room(path) for path in FILES} - {"__init__"} == set(LADDER)


def test_the_ladder_is_no_wider_than_needed() -> None:
    """A permission that nobody uses is an invitation."""
    used: dict[str, set[str]] = {name: set() for name in LADDER}
    for path in FILES:
        for name in imports(path) if path != ROOT / "__init__.py" else ():
            package, _, rest = name.partition(".")
            if package == "bridged" and rest.partition(".")[0] not in (room(path), "__version__"):
                used[room(path)].add(rest.partition(".")[0])
    # The commands are imported by name, when one of them is asked for.
    unused = {name: LADDER[name] - used[name] for name in LADDER if LADDER[name] - used[name] and name != "cli"}
    assert unused == {}


@pytest.mark.parametrize("path", PURE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_deciding_is_pure(path: Path) -> None:
    """What decides has no clock, no loop, no socket, no file and no log: it can be tried at a prompt, and `now` be any time."""
    assert {name.partition(".")[0] for name in imports(path)} & IMPURE == set()
    calls = [node.func for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    assert not [call.attr for call in calls if isinstance(call, ast.Attribute) and call.attr in CLOCKS]


@every_file
def test_only_known_libraries_are_imported(path: Path) -> None:
    """A new dependency is a decision, not a side effect."""
    known = {"aiohttp", "aiosqlite", "bridged", "isal", "msgspec", "prometheus_client", "rich", "structlog", "uvloop"}
    known.add("fastavro")  # an extra
    assert {name.partition(".")[0] for name in imports(path)} <= known | set(sys.stdlib_module_names)


@every_file
def test_a_value_that_comes_twice_has_a_name(path: Path) -> None:
    """Python 3.12 to 3.12.3, which is Ubuntu 24.04's, takes `?1` for a name, and warns of those that are given by their order."""
    assert not re.search(r"\?\d", path.read_text(encoding="utf-8")), path


@every_file
def test_a_file_does_one_thing(path: Path) -> None:
    """When one grows beyond the cap, ask what second thing it does; the few longer ones say why."""
    name = path.relative_to(ROOT).as_posix()
    cap, _ = LONGER.get(name, (MAX_LINES, ""))
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= cap, f"{name} has {lines} lines"
    assert name not in LONGER or lines > MAX_LINES, f"{name} needs no exception any more"
    assert {ROOT / name for name in LONGER} <= set(FILES)


@every_file
def test_a_file_is_named_for_what_it_is(path: Path) -> None:
    """Rooms without a subject collect everything."""
    vague = ("util", "helper", "manager", "handler", "common", "misc", "base")
    assert not [part for part in path.relative_to(ROOT).parts if part.removesuffix(".py").rstrip("s").endswith(vague)]


@every_file
def test_a_file_says_what_it_is(path: Path) -> None:
    """The first thing in every file is a sentence about it."""
    docstring = ast.get_docstring(tree(path))
    assert docstring is not None
    assert docstring.partition("\n")[0].endswith((".", ":", ",", ";")) or "\n" in docstring


# -- no log line an event ----------------------------------------------------------------------------------------------

LOOPS = (ast.For, ast.AsyncFor, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def logs_in_loops(path: Path) -> Iterator[int]:
    """The lines at which a log call stands inside a loop over something."""
    for loop in ast.walk(tree(path)):
        if isinstance(loop, LOOPS):
            for node in ast.walk(loop):
                call = node.func if isinstance(node, ast.Call) else None
                if isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name) and call.value.id == "log":
                    yield node.lineno  # type: ignore[attr-defined]  # a Call has one


@pytest.mark.parametrize(
    "path",
    [ROOT / "intake.py", *[path for path in FILES if room(path) in ("sources", "backlog", "delivery")]],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_no_log_line_for_each_event(path: Path) -> None:
    """At 100,000 events a second a line for each is an outage; what happens to single events is in the dead letters."""
    assert list(logs_in_loops(path)) == []


def test_the_intake_does_not_log_at_all() -> None:
    """Everything that happens there happens to events: it is counted, or kept."""
    assert not {"structlog", "logging"} & set(imports(ROOT / "intake.py"))
