"""The peers: what each is, how it is found, how it is started, and at which settings it was fastest.

A peer that isn't on the machine is listed, not an error. Nothing is built here: programs come from PATH or from an
environment variable (`FLUENT_BIT`, `SYSLOG_NG`), Python packages go into a virtual environment of the bench's own
(`BENCH_PEERS`, .bench-peers by default), Node's into a node_modules beside it.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal

from msgspec import Struct

from bench.processes import PROJECT
from bridged.currents.table import EVENT_TYPES

HERE: Final = Path(__file__).resolve().parent
TOOLS: Final = Path(os.environ.get("BENCH_PEERS", PROJECT / ".bench-peers")).resolve()
PYTHON_PACKAGES: Final = ("mixpanel", "bytewax", "msgspec")
NODE_PACKAGES: Final = ("mixpanel", "mixpanel-import")
TOKEN: Final = "0123456789abcdef0123456789abcdef"

# What a peer is given events by. "lines": NDJSON over TCP, nobody acks. "http": requests as
# Braze makes them. "stream": bridged's own, with acks. "file": a file of lines.
Door = Literal["stream", "http", "lines", "file"]


class Command(Struct, frozen=True):
    """How to start a peer."""

    program: str
    arguments: Sequence[str]
    environment: dict[str, str] = {}


class Missing(Exception):
    """A program or a package isn't there; the message says how to get it."""


class Peer(Struct, frozen=True, kw_only=True):
    """One row of the table."""

    name: str
    door: Door
    maps: bool  # makes the Mixpanel event of each Currents event, or passes on what came
    disk: bool  # keeps events in files until they are delivered
    durable: str  # what an event survives once the peer has it
    acks: str  # when the sender is told
    tuned: str  # for the table of settings
    # Writes the configuration into the folder; (folder, listening port, sink's port) -> how to start. Raises Missing.
    command: Callable[[Path, int, int], Command]
    version: Callable[[], str]
    connections: int = 1
    per_request: int = 1
    file_events: int = 0  # of a run, where the door is a file and nothing limits what is sent


class Published(Struct, frozen=True):
    """What was measured elsewhere: on a quiet machine of 2 cores, with 704-byte events. Never part of a ratio."""

    name: str
    events_per_s: int
    cpu_us: float
    wanted: str  # how to have it measured here


def _program(variable: str, name: str, how: str) -> str:
    path = shutil.which(os.environ.get(variable) or name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        raise Missing(f"{name}: not in PATH, and {variable} doesn't name it; {how}")
    return path


def _first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return (done.stdout or done.stderr).strip().partition("\n")[0]


# -- bridged's rivals for whom there is a package ---------------------------------------------------------------------


def python(*packages: str) -> str:
    """The virtual environment's Python, with the packages in it. Raises Missing."""
    path = TOOLS / "venv/bin/python"
    if not path.exists() or _python_versions(*packages) is None:
        raise Missing(f"{' and '.join(packages)} from PyPI: python -m bench peers --install")
    return str(path)


def _python_versions(*packages: str) -> str | None:
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


def _node_version(package: str) -> str:
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


def _python_program(file: str, program: Callable[[], str]) -> Callable[[Path, int, int], Command]:
    def command(folder: Path, port: int, sink: int) -> Command:
        (folder / "names.json").write_text(json.dumps(_names()), encoding="utf-8")
        first = str(folder / "events.ndjson") if file == "dataflow.py" else str(port)
        return Command(program(), [str(HERE / file), first, _url(sink)])

    return command


def _node_program(file: str, *options: str) -> Callable[[Path, int, int], Command]:
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


def _fluent_bit_program() -> str:
    return _program("FLUENT_BIT", "fluent-bit", "see https://docs.fluentbit.io")


def _fluent_bit(plugin: str, call: str, options: str, *, threaded: bool) -> Callable[[Path, int, int], Command]:
    def command(folder: Path, port: int, sink: int) -> Command:
        program = _fluent_bit_program()
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


def _syslog_ng_program() -> str:
    how = "apt-get install syslog-ng-core syslog-ng-mod-http syslog-ng-mod-add-contextual-data"
    return _program("SYSLOG_NG", "syslog-ng", how)


def _syslog_ng(*, maps: bool, disk: bool) -> Callable[[Path, int, int], Command]:
    def command(folder: Path, port: int, sink: int) -> Command:
        program = _syslog_ng_program()
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


_MEMORY = "no: memory"
_NO_SYNC = "no: never synced"

PEERS: Final = (
    Peer(
        name="syslog-ng-lines",
        door="lines",
        maps=False,
        disk=False,
        durable=_MEMORY,
        acks="never",
        tuned="no mapping: lines as they came, uncompressed; memory queue, flow control, batches of 2,000, 2 workers",
        command=_syslog_ng(maps=False, disk=False),
        version=lambda: _first_line(_syslog_ng_program(), "--version"),
    ),
    Peer(
        name="syslog-ng-lines-disk",
        door="lines",
        maps=False,
        disk=True,
        durable=_NO_SYNC,
        acks="never",
        tuned="as syslog-ng-lines, with disk-buffer(reliable(yes)), 128 MB of it in memory",
        command=_syslog_ng(maps=False, disk=True),
        version=lambda: _first_line(_syslog_ng_program(), "--version"),
    ),
    Peer(
        name="syslog-ng-map",
        door="lines",
        maps=True,
        disk=False,
        durable=_MEMORY,
        acks="never",
        tuned="json-parser, add-contextual-data for names, format-json; the rest as syslog-ng-lines",
        command=_syslog_ng(maps=True, disk=False),
        version=lambda: _first_line(_syslog_ng_program(), "--version"),
    ),
    Peer(
        name="syslog-ng-map-disk",
        door="lines",
        maps=True,
        disk=True,
        durable=_NO_SYNC,
        acks="never",
        tuned="as syslog-ng-map, with disk-buffer(reliable(yes)), 128 MB of it in memory",
        command=_syslog_ng(maps=True, disk=True),
        version=lambda: _first_line(_syslog_ng_program(), "--version"),
    ),
    Peer(
        name="fluent-bit",
        door="lines",
        maps=True,
        disk=True,
        durable=_NO_SYNC,
        acks="never",
        tuned="in_tcp in a thread, Lua as its processor, filesystem storage, uncompressed, 2 workers, flush 0.2 s",
        command=_fluent_bit(
            "tcp", "mixpanel_event", "format: json\n      chunk_size: 1024\n      buffer_size: 4096", threaded=True
        ),
        version=lambda: _first_line(_fluent_bit_program(), "--version"),
    ),
    Peer(
        name="fluent-bit-http",
        door="http",
        maps=True,
        disk=True,
        durable=_NO_SYNC,
        acks="before a sync",
        tuned="as fluent-bit, in the engine's thread (in its own it acks before the file); 100 events a request, 16 at once",
        command=_fluent_bit(
            "http",
            "mixpanel_events",
            "successful_response_code: 200\n      buffer_max_size: 64M\n      buffer_chunk_size: 512K",
            threaded=False,
        ),
        version=lambda: _first_line(_fluent_bit_program(), "--version"),
        connections=16,
        per_request=100,
    ),
    Peer(
        name="naive",
        door="http",
        maps=True,
        disk=False,
        durable=_MEMORY,
        acks="once in memory",
        tuned="aiohttp on uvloop, msgspec, zlib level 1 in threads, batches of 2,000, 4 senders; 100 events a request",
        command=_python_program("naive.py", lambda: sys.executable),
        version=lambda: "bench/peers/naive.py",
        connections=16,
        per_request=100,
    ),
    Peer(
        name="bytewax",
        door="file",
        maps=True,
        disk=False,
        durable="no: its input is",
        acks="no door: a file",
        tuned="an item is a batch of 2,000 lines, recovery on, epochs of 1 s, msgspec, zlib level 1",
        command=_python_program("dataflow.py", lambda: python("bytewax", "msgspec")),
        version=lambda: _python_versions("bytewax") or "",
        file_events=250_000,
    ),
    Peer(
        name="mixpanel-pypi",
        door="lines",
        maps=True,
        disk=False,
        durable=_MEMORY,
        acks="never",
        tuned="BufferedConsumer(50), its most; 2 threads; keep-alive",
        command=_python_program("consumer.py", lambda: python("mixpanel")),
        version=lambda: _python_versions("mixpanel") or "",
    ),
    Peer(
        name="mixpanel-npm",
        door="lines",
        maps=True,
        disk=False,
        durable=_MEMORY,
        acks="never",
        tuned="import_batch of 50, its most; 16 requests at once; keep-alive",
        command=_node_program("batches.js"),
        version=lambda: _node_version("mixpanel"),
    ),
    Peer(
        name="mixpanel-import",
        door="lines",
        maps=True,
        disk=False,
        durable=_MEMORY,
        acks="never",
        tuned="as it comes",
        command=_node_program("import.js"),
        version=lambda: _node_version("mixpanel-import"),
    ),
    Peer(
        name="mixpanel-import-tuned",
        door="lines",
        maps=True,
        disk=False,
        durable=_MEMORY,
        acks="never",
        tuned="compressionLevel 1, fastMode, abridged, 4 workers, highWater 2,000",
        command=_node_program(
            "import.js",
            json.dumps({"compressionLevel": 1, "fastMode": True, "abridged": True, "workers": 4, "highWater": 2000}),
        ),
        version=lambda: _node_version("mixpanel-import"),
    ),
)

_ELSEWHERE = "not measured by this bench"
PUBLISHED: Final = (
    Published("syslog-ng-lines", 589_000, 2.5, ""),
    Published("syslog-ng-map-disk", 77_000, 21.7, ""),
    Published("fluent-bit", 96_000, 17.4, ""),
    Published("fluent-bit-http", 68_000, 19.1, ""),
    Published("rsyslog mapping to a disk queue", 55_000, 31.2, "Debian's rsyslog has no omhttp"),
    Published("fluentd", 13_000, 47, _ELSEWHERE),
    Published("bytewax", 117_000, 8.1, ""),
    Published("naive", 70_000, 18.2, ""),
    Published("mixpanel-npm", 97_000, 11.9, ""),
    Published("mixpanel-pypi", 16_000, 61, ""),
    Published("mixpanel-import-tuned", 70_000, 19.9, ""),
    Published("mixpanel-import", 3_500, 242, ""),
)
