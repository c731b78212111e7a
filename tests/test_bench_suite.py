"""The benchmarks that take minutes, in seconds: real processes, tiny loads. Counts and shapes are checked, never a time."""

import json
import signal
import time
from pathlib import Path

import pytest
from test_bench import bench, finished

from bench import data, latency, memory, openloop, outage, page, report, scale
from bench.openloop import percentile
from bench.processes import Daemon, OpenLoader, Sink, get
from bench.sink import Arrival
from bridged.currents.table import EVENT_TYPES
from bridged.delivery.transport import Transport
from bridged.mixpanel.mapping import EventMapping, MappingSettings
from bridged.mixpanel.requests import Credentials, Target
from bridged.mixpanel.verdicts import Reject

RUNS = {
    "path": ("--events", "500", "--runs", "1", "--cells", "stream"),
    "latency": ("--runs", "1", "--rates", "1000", "--seconds", "0.5"),
    "scale": ("--runs", "1", "--events", "3000", "--distinct", "1000", "--backlog", "5000", "--groups", "bad,backlog"),
    "spool": ("--runs", "1", "--seconds", "0.01"),
    "pace": ("--runs", "2", "--links", "s1,s7"),
    "memory": ("--runs", "1", "--hours", "0.0005", "--rate", "1000", "--seconds", "0.3", "--idle-seconds", "0.2"),
    "backlog": ("--events", "30000", "--shrink-seconds", "0"),
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Runs a benchmark once, for all tests: its figures and what it printed. It must succeed, and leave nothing else."""
    folder = tmp_path_factory.mktemp("results")
    printed = {}

    def run(name):
        if name not in printed:
            code, out, err = finished(name, *RUNS[name], "--json", f"{name}.json", cwd=folder)
            assert code == 0, out + err
            printed[name] = out
            assert {entry.name for entry in folder.iterdir()} == {f"{each}.json" for each in printed}
        return json.loads((folder / f"{name}.json").read_text()), printed[name]

    run.folder = folder
    return run


def test_latency_counts_every_ack_and_every_delivery(ran):
    """Both doors at a fixed rate: each event that was due was acked and delivered once, and acked before it was delivered."""
    figures, out = ran("latency")
    assert [(run["door"], run["events"], run["failure"]) for run in figures["runs"]] == [
        ("http", 500, ""),
        ("stream", 500, ""),
    ]
    for run in figures["runs"]:
        assert 0 < run["ack_p50_ms"] <= run["ack_p99_ms"] <= run["ack_p999_ms"] <= run["ack_max_ms"]
        assert run["ack_p50_ms"] < run["delivered_p50_ms"] <= run["delivered_p99_ms"]
        assert run["late_p50_ms"] <= run["ack_p50_ms"]
    assert "delivered p99" in out


def test_backlog_restarts_and_drains_to_the_last_event(ran):
    """What waited is delivered after the restart: the run fails if one event is missing."""
    figures, out = ran("backlog")
    (run,) = figures["runs"]
    assert run["failure"] == ""
    assert run["events"] == 30_000
    assert run["full_bytes"] > 10 * run["empty_bytes"]
    assert run["final_bytes"] > 0
    assert "drained, events/s" in out


def test_scale_knows_what_is_to_be_delivered_of_bad_events(ran):
    """Only the good ones arrive, the books know of the others, and a backlog drains whole."""
    figures, _ = ran("scale")
    names = [
        "0% bad",
        "1% bad",
        "10% bad",
        "100% bad",
        "taken, 0 waiting",
        "taken, 5,000 waiting",
        "drained, from the disk",
    ]
    assert [row["name"] for row in figures["rows"]] == names
    assert all(len(row["daemon_us"]) == 1 and not row["failures"] for row in figures["rows"])


def test_memory_soaks_and_loses_nothing(ran):
    """Idle, full speed and a soak of seconds: samples, a slope, and every event delivered."""
    figures, out = ran("memory")
    assert figures["failures"] == []
    assert 0 < figures["resident_mb"]["idle"][0] < figures["resident_mb"]["full speed"][0]
    soak = figures["soak"]
    assert soak["events"] == soak["delivered"] == 1800
    assert len(soak["samples"]) >= 5
    assert "goal < 1: too short to tell" in out


def test_an_outage_ends_in_the_archive_and_comes_back(tmp_path, monkeypatch):
    """Every event expires, none before its time, all are in the archive, and a replay delivers each of them."""
    monkeypatch.chdir(tmp_path)
    run = outage.measure(5_000, 3, 60)

    assert run.problems == []
    assert (run.archived, run.distinct, run.delivered) == (5_000, 5_000, 5_000)


async def test_the_sink_refuses_what_mixpanel_does(tmp_path):
    """The record by which a daemon that was halted asks for its credential is no event, however often it asks."""
    with Sink(tmp_path) as sink:
        sink.ready()
        target = Target(url=f"http://127.0.0.1:{sink.port}", credentials=Credentials(token="example-token"))
        async with Transport(target, 10) as transport:
            verdict = await transport.ask()
        assert isinstance(verdict, Reject)
        assert (sink.report().requests, sink.report().events) == (1, 0)


def test_pace_prints_its_goals(ran):
    """The model gives the same figures for the same seeds, and the goals are held against them."""
    figures, out = ran("pace")
    assert list(figures["outcomes"]) == ["s1_alone", "s7_outage"]
    assert [each["rate_limited_share"] for each in figures["outcomes"]["s1_alone"]] == [0, 0]
    assert "s1_alone: no 429, on any seed: 0: met" in out


def test_the_kinds_of_events_are_what_their_names_say(tmp_path):
    """Sizes grow as they say, all types are there, and bad ones are refused while the others are mapped."""
    mapping = EventMapping(EVENT_TYPES, MappingSettings(token="0" * 32))
    for load in scale.loads():
        data.write(tmp_path / "events", 400, day=load.day)
        lines = [data.patched(line, 0) for line in data.read(tmp_path / "events")]
        mapped = mapping.map(mapping.schema.lines(lines), 2e9)
        wanted = scale._wanted(tmp_path / "events")(400)
        assert len(mapped.codes) == wanted, load.name
        assert len(mapped.codes) + len(mapped.refusals) == 400, load.name
        assert abs(1 - wanted / 400 - load.bad) < 0.05, load.name
        if "types alike" in load.name:
            assert len({json.loads(line)["event_type"] for line in lines}) == len(EVENT_TYPES)
        if "16,000" in load.name:
            assert sum(map(len, lines)) / 400 > 16_000


def test_a_slope_is_a_straight_line_by_least_squares():
    """Noise around a rise of 2 MB an hour is a rise of 2 MB an hour."""
    samples = [(at * 60.0, 60 + at / 30 + (0.5 if at % 2 else -0.5)) for at in range(121)]
    assert memory.slope_per_h(samples) == pytest.approx(2.0, abs=0.1)
    assert memory.slope_per_h(samples[:1]) == 0.0


def test_an_open_loop_charges_a_standstill_to_every_request_that_was_due(tmp_path):
    """A daemon that is stopped for half a second delays all that was due meanwhile: no coordinated omission."""
    data.write(tmp_path / "events", 1000)
    with Sink(tmp_path) as sink:
        sink.ready()
        with Daemon(tmp_path, sink.port) as daemon:
            daemon.ready()
            options = ["--door", "http", "--port", str(daemon.http_port), "--data", str(tmp_path / "events")]
            options += ["--connections", "1", "--rate", "1000", "--seconds", "3"]
            with OpenLoader(tmp_path, options) as loader:
                loader.ready()
                loader.say()
                while not json.loads(get(daemon.admin_port, "/api/status"))["events"]["accepted"]:
                    time.sleep(0.01)
                daemon.process.send_signal(signal.SIGSTOP)
                try:
                    time.sleep(0.5)
                finally:
                    daemon.process.send_signal(signal.SIGCONT)
                loaded = loader.loaded(120)
            status = json.loads(get(daemon.admin_port, "/api/status"))["events"]
            daemon.stop()
    assert (loaded.requests, loaded.acked, loaded.events) == (300, 300, 3000)
    assert status["accepted"] == 3000
    # A sixth of the requests was due during it. One connection that waits for each answer would have noticed it once.
    assert loaded.max_ms >= 450
    assert loaded.p99_ms >= 400


def test_all_ends_what_it_started_at_sigterm(tmp_path):
    """A suite that is told to stop leaves no benchmark, no daemon and no folder."""
    options = ("all", "--only", "path", "--results", "results", "--page", "page")
    with bench(*options, cwd=tmp_path, start_new_session=True) as process:
        below = []
        deadline = time.monotonic() + 120
        while len(below) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
            below = children(process.pid)
            below += [pid for child in below for pid in children(child)]
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert len(below) >= 4, "the benchmark, its loader, daemon and sink"
    assert not any(Path(f"/proc/{pid}").exists() for pid in below)
    assert [entry.name for entry in tmp_path.iterdir()] == ["results"]


def children(pid):
    """The processes that one has started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def test_delivered_latency_is_each_events_own(tmp_path):
    """The time at which an event was due comes from its id; one that came twice is told."""
    data.write(tmp_path / "events", 40)
    order = latency.order_of(tmp_path / "events")
    ids = list(order)
    loaded = openloop.Report(
        **dict.fromkeys(openloop.Report.__struct_fields__, 0) | {"started_at": 100.0, "interval_s": 0.5}
    )
    # Request 2 of round 0, and request 1 of round 1, of four requests a round: due at 101.0 and 102.5.
    arrivals = [Arrival(101.2, [ids[20] + "00"]), Arrival(103.5, [ids[10] + "01"])]
    found, problem = latency.latencies(arrivals, loaded, order, 10)
    assert found == pytest.approx([0.2, 1.0])
    assert problem == ""
    assert latency.latencies([*arrivals, arrivals[0]], loaded, order, 10)[1] == "1 events came twice"
    assert percentile([1.0, 2.0, 3.0], 0.99) == 3.0


def test_all_makes_a_page_with_plots(tmp_path):
    """`all` leaves a file a benchmark and a page; what other benchmarks left there is on the page too."""
    results = tmp_path / "results"
    results.mkdir()
    row = {"name": "naive bridge", "door": "http", "durable": "no", "events_per_s": [1, 3], "cpu_us_per_event": 18.0}
    peers = {
        "machine": {},
        "rows": [row, {"name": "broken", "failure": "it is"}],
        "absent": [{"name": "x", "why": "y"}],
    }
    peers["machine"] = dict.fromkeys(("cpu", "cores", "kernel", "filesystem", "load_average", "python", "sqlite"), 0)
    (results / "peers.json").write_text(json.dumps(peers))
    code, out, err = finished("all", "--only", "floor", "--results", "results", "--page", "page", cwd=tmp_path)
    assert code == 0, out + err
    assert json.loads((results / "floor.json").read_text())["machine"]["bridged"]
    text = (tmp_path / "page" / "README.md").read_text()
    assert "| naive bridge | http | no | 2 (1-3) | 18.0 |" in text
    assert "x: y" in text
    assert "## The floor" in text
    assert (tmp_path / "page" / "throughput.png").read_bytes().startswith(b"\x89PNG")


def test_every_section_of_the_page_is_made_from_what_its_benchmark_writes(ran, tmp_path):
    """All of them, through the page and its plots: no key of one is unknown to the other."""
    for name in RUNS:
        ran(name)
    assert page.main(["--results", str(ran.folder), "--page", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.count("\n## ") == len(RUNS)
    pictures = {file.name for file in tmp_path.glob("*.png")}
    assert pictures == {"throughput.png", "latency.png", "memory.png", "scale.png"}
    assert all(f"]({name})" in text for name in pictures)


def test_the_page_says_when_the_machine_was_not_quiet():
    """Figures from a busy machine look like any others: what others used stands beside them."""
    run = {
        "events": 1,
        "ready_s": 1,
        "drained_per_s": 1,
        "drain_us": 1,
        "drain_peak_mb": 1,
        "shrunk_s": 1,
        "failure": "",
    }
    run |= {"final_bytes": 1, "empty_bytes": 1}
    about = dict.fromkeys(("cpu", "cores", "kernel", "filesystem", "load_average", "python", "sqlite"), 0)
    for cores, said in ((0.05, False), (1.2, True)):
        results = {"backlog": {"machine": about, "runs": [run | {"other_cores": cores}]}}
        assert ("Not a quiet machine: others used 1.20 cores" in "\n".join(page.page(results, {}))) is said


def test_the_page_is_made_of_what_can_be_read(tmp_path, capsys):
    """A file that a broken run left is named and left out; decode and mapping are on the page as they are written."""
    results = tmp_path / "results"
    results.mkdir()
    (results / "path.json").write_text('{"machine": {')
    for name in ("decode", "mapping"):
        code, out, err = finished(
            *(name, "--runs", "2", "--events", "300", "--json", str(results / f"{name}.json")), cwd=tmp_path
        )
        assert code == 0, out + err
    assert page.main(["--results", str(results), "--page", str(tmp_path / "page")]) == 0
    assert "left out: " in capsys.readouterr().err
    text = (tmp_path / "page" / "README.md").read_text()
    assert "| stream door | " in text
    assert "| real mix | " in text


def test_figures_of_another_shape_are_left_out(tmp_path, capsys):
    """An older version's, or somebody's own: named, and the others are on the page."""
    (tmp_path / "path.json").write_text("{}")
    (tmp_path / "memory.json").write_text('{"machine": {}, "resident_mb": [1, 2], "soak": null}')
    figures = {"machine": report.machine(), "us_per_event": {"a way": [1.5]}}
    (tmp_path / "decode.json").write_text(json.dumps(figures))
    assert page.main(["--results", str(tmp_path), "--page", str(tmp_path)]) == 0
    err = capsys.readouterr().err
    assert "path.json: not what `python -m bench path` writes" in err
    assert "memory.json: not what" in err
    assert "a way" in (tmp_path / "README.md").read_text()


def test_the_page_says_that_there_are_no_results(tmp_path, capsys):
    """An empty folder is no page."""
    assert page.main(["--results", str(tmp_path), "--page", str(tmp_path / "page")]) == 1
    assert "run `python -m bench all` first" in capsys.readouterr().err
    assert not (tmp_path / "page").exists()
