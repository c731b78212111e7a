"""How each peer is found on the machine and started, with its configuration written into a folder of its own.

Nothing is built here: programs come from PATH or from an environment variable (`FLUENT_BIT`, `FLUENTD`, `NODE`, `RSYSLOGD`,
`RSYSLOG_OMHTTP`, `SYSLOG_NG`, `VECTOR`), Python packages go into a virtual environment of the bench's own (`BENCH_PEERS`,
.bench-peers by default), Node's into a node_modules beside it.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct

from bench.processes import PROJECT
from bridged.currents.table import EVENT_TYPES

HERE: Final = Path(__file__).resolve().parent
TOOLS: Final = Path(os.environ.get("BENCH_PEERS", PROJECT / ".bench-peers")).resolve()
PYTHON_PACKAGES: Final = ("mixpanel", "bytewax", "msgspec")
NODE_PACKAGES: Final = ("mixpanel", "mixpanel-import")
TOKEN: Final = "0123456789abcdef0123456789abcdef"


class Command(Struct, frozen=True):
    """How to start a peer."""

    program: str
    arguments: Sequence[str]
    environment: dict[str, str] = {}


class Missing(Exception):
    """A program or a package isn't there; the message says how to get it."""


def _program(variable: str, name: str, how: str) -> str:
    path = shutil.which(os.environ.get(variable) or name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        raise Missing(f"{name}: not in PATH, and {variable} doesn't name it; {how}")
    return path


def first_line(*command: str) -> str:
    """The first line of what a program prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return (done.stdout or done.stderr).strip().partition("\n")[0]


# -- packages ---------------------------------------------------------------------


def python(*packages: str) -> str:
    """The virtual environment's Python, with the packages in it. Raises Missing."""
    path = TOOLS / "venv/bin/python"
    if not path.exists() or python_versions(*packages) is None:
        raise Missing(f"{' and '.join(packages)} from PyPI: python -m bench peers --install")
    return str(path)


def python_versions(*packages: str) -> str | None:
    """The version of the first of the packages; None if one of them isn't there."""
    script = f"from importlib.metadata import version; print(*(version(name) for name in {packages}))"
    command = [str(TOOLS / "venv/bin/python"), "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.split()[0] if done.returncode == 0 else None


def node() -> tuple[str, str]:
    """Node, and the folder with the packages."""
    program = _program("NODE", "node", "apt-get install nodejs npm")
    modules = TOOLS / "node_modules"
    if not all((modules / package).is_dir() for package in NODE_PACKAGES):
        raise Missing(f"{' and '.join(NODE_PACKAGES)} from npm: python -m bench peers --install")
    return program, str(modules)


def node_version(package: str) -> str:
    """Of an installed package."""
    return str(json.loads((TOOLS / "node_modules" / package / "package.json").read_bytes())["version"])


def install() -> None:
    """Makes the virtual environment and the node_modules. Raises CalledProcessError with what pip or npm said."""
    TOOLS.mkdir(exist_ok=True)
    if not (TOOLS / "venv/bin/python").exists():
        subprocess.run([sys.executable, "-m", "venv", TOOLS / "venv"], check=True)
    pip = [str(TOOLS / "venv/bin/python"), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    subprocess.run([*pip, *PYTHON_PACKAGES], check=True)
    if npm := shutil.which("npm"):
        quiet = ["--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts", "--loglevel=error"]
        subprocess.run([npm, "install", "--prefix", TOOLS, *quiet, *NODE_PACKAGES], check=True)
    else:
        print("npm isn't in PATH: apt-get install nodejs npm", file=sys.stderr)


# -- the commands -----------------------------------------------------------------------------------------------------


def _names() -> dict[str, str]:
    return {row.event_type: row.seed_name or row.name for row in EVENT_TYPES}


def _url(sink: int) -> str:
    return f"http://127.0.0.1:{sink}"


def python_program(file: str, program: Callable[[], str]) -> Callable[[Path, int, int], Command]:
    """A peer of this folder, run by the Python that `program` finds."""

    def command(folder: Path, port: int, sink: int) -> Command:
        (folder / "names.json").write_text(json.dumps(_names()), encoding="utf-8")
        first = str(folder / "events.ndjson") if file == "dataflow.py" else str(port)
        return Command(program(), [str(HERE / file), first, _url(sink)])

    return command


def node_program(file: str, *options: str) -> Callable[[Path, int, int], Command]:
    """A peer of this folder, run by Node; the options are its own."""

    def command(folder: Path, port: int, sink: int) -> Command:
        program, modules = node()
        (folder / "names.json").write_text(json.dumps(_names()), encoding="utf-8")
        return Command(program, [str(HERE / file), str(port), _url(sink), *options], {"NODE_PATH": modules})

    return command


def _filled(file: str, **values: object) -> str:
    text = (HERE / file).read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"@{key}@", str(value))
    return text


def fluent_bit_program() -> str:
    """Where it is. Raises Missing."""
    return _program("FLUENT_BIT", "fluent-bit", "see https://docs.fluentbit.io")


def fluent_bit(plugin: str, call: str, options: str, *, threaded: bool) -> Callable[[Path, int, int], Command]:
    """By its input plugin, and the function of mapping.lua for what comes in there."""

    def command(folder: Path, port: int, sink: int) -> Command:
        program = fluent_bit_program()
        table = ",".join(f"[{json.dumps(kind)}]={json.dumps(name)}" for kind, name in _names().items())
        (folder / "names.lua").write_text(f"NAMES={{{table}}}\n", encoding="utf-8")
        config = folder / "fluent-bit.yaml"
        values: dict[str, object] = {
            "THREADED": str(threaded).lower(),
            "INPUT": plugin,
            "CALL": call,
            "PORT": port,
            "SINK": sink,
            "OPTIONS": options,
            "HERE": HERE,
        }
        config.write_text(_filled("fluent-bit.yaml", **values), encoding="utf-8")
        return Command(program, ["-c", str(config)])

    return command


_SYSLOG_NG_EVENT = " ".join(
    [
        "$(format-json --omit-empty-values event=${name} --key .b.properties.*",
        "--rekey .b.properties.custom_properties.* --shift 32 --add-prefix 'properties.[Custom event property] '",
        "--rekey .b.properties.purchase_properties.* --shift 34 --add-prefix 'properties.[Purchase property] '",
        "--rekey .b.properties.* --shift 3",
        f"properties.token={TOKEN} properties.distinct_id=${{.b.user.external_user_id}}",
        "properties.time=int64(${.b.time}) properties.$insert_id=${.b.id} properties.$partner_id=braze",
        "properties.ip=int64(0) properties.device_id=${.b.user.device_id})",
    ]
)


def syslog_ng_program() -> str:
    """Where it is. Raises Missing."""
    how = "apt-get install syslog-ng-core syslog-ng-mod-http syslog-ng-mod-add-contextual-data"
    return _program("SYSLOG_NG", "syslog-ng", how)


def syslog_ng(*, maps: bool, disk: bool) -> Callable[[Path, int, int], Command]:
    """Which maps or passes lines on, from memory or a reliable disk-buffer."""

    def command(folder: Path, port: int, sink: int) -> Command:
        program = syslog_ng_program()
        rows = "".join(f'"{kind}","name","{name}"\n' for kind, name in _names().items())
        (folder / "names.csv").write_text(rows, encoding="utf-8")
        (folder / "queue").mkdir(exist_ok=True)
        buffer = f'disk-buffer(reliable(yes) disk-buf-size(4294967296) mem-buf-size(134217728) dir("{folder}/queue"))'
        config = folder / "syslog-ng.conf"
        config.write_text(
            _filled(
                "syslog-ng.conf",
                PORT=port,
                SINK=sink,
                BODY=_SYSLOG_NG_EVENT if maps else "${MSG}",
                BUFFER=buffer if disk else "",
                STEPS="parser(p_currents); rewrite(r_currents);" if maps else "",
                PARSERS=_filled("syslog-ng-mapping.conf", FOLDER=folder) if maps else "",
            ),
            encoding="utf-8",
        )
        state = ["-R", "queue/persist", "-c", "control", "--pidfile", "pid"]
        state = [part if part.startswith("-") else str(folder / part) for part in state]
        return Command(program, ["-F", "--no-caps", "-f", str(config), *state])

    return command


# Debian's rsyslog and syslog-ng exclude each other: one of them is unpacked somewhere else, with RSYSLOG_MODDIR, which is
# rsyslog's own variable, for its modules.
def _rsyslog_program() -> str:
    return _program("RSYSLOGD", "rsyslogd", "apt-get install rsyslog, which takes syslog-ng away")


def rsyslog_version() -> str:
    """With its name."""
    return first_line(_rsyslog_program(), "-v").partition(" compiled")[0]


def _omhttp() -> str:
    """The module of rsyslog that sends over HTTP. Raises Missing."""
    named = os.environ.get("RSYSLOG_OMHTTP")
    found = [Path(named)] if named else sorted(Path("/usr").glob("lib*/**/rsyslog/omhttp.so"))
    if not found or not found[0].exists():
        raise Missing("omhttp: Debian's rsyslog is built without it; RSYSLOG_OMHTTP names an omhttp.so of its version")
    return str(found[0].resolve())


def rsyslog(*, disk: bool) -> Callable[[Path, int, int], Command]:
    """From memory, or from a queue that is on disk altogether."""
    files = 'queue.filename="queue" queue.maxFileSize="64m" queue.maxDiskSpace="4g" queue.checkpointInterval="1000"'

    def command(folder: Path, port: int, sink: int) -> Command:
        program = _rsyslog_program()
        table = [{"index": kind, "value": name} for kind, name in _names().items()]
        lookup = {"version": 1, "nomatch": "", "type": "string", "table": table}
        (folder / "names.json").write_text(json.dumps(lookup), encoding="utf-8")
        config = folder / "rsyslog.conf"
        values: dict[str, object] = {
            "FOLDER": folder,
            "OMHTTP": _omhttp(),
            "QUEUE": "Disk" if disk else "FixedArray",
            "FILES": files if disk else "",
            "SIZE": 10_000_000 if disk else 100_000,
            "WORKERS": 1 if disk else 2,
            "PORT": port,
            "SINK": sink,
        }
        config.write_text(_filled("rsyslog.conf", **values), encoding="utf-8")
        return Command(program, ["-n", "-f", str(config), "-i", str(folder / "pid")])

    return command


def fluentd_program() -> str:
    """Where it is. Raises Missing."""
    return _program("FLUENTD", "fluentd", "gem install fluentd oj")


def fluentd(folder: Path, port: int, sink: int) -> Command:
    """One process, without the supervisor that would start it again."""
    program = fluentd_program()
    (folder / "names.json").write_text(json.dumps(_names()), encoding="utf-8")
    config = folder / "fluentd.conf"
    values: dict[str, object] = {"FOLDER": folder, "PORT": port, "SINK": sink}
    config.write_text(_filled("fluentd/fluentd.conf", **values), encoding="utf-8")
    return Command(program, ["--no-supervisor", "-c", str(config), "-p", str(HERE / "fluentd")])


def vector_program() -> str:
    """Where it is. Raises Missing."""
    return _program("VECTOR", "vector", "see https://vector.dev/docs/setup/installation")


def vector(folder: Path, port: int, sink: int) -> Command:
    """With a disk buffer."""
    program = vector_program()
    rows = "".join(f'"{kind}","{name}"\n' for kind, name in _names().items())
    (folder / "names.csv").write_text(f"event_type,name\n{rows}", encoding="utf-8")
    (folder / "data").mkdir(exist_ok=True)
    config = folder / "vector.yaml"
    values: dict[str, object] = {"FOLDER": folder, "HERE": HERE, "PORT": port, "SINK": sink}
    config.write_text(_filled("vector.yaml", **values), encoding="utf-8")
    return Command(program, ["--quiet", "--config", str(config)])
