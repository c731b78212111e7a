"""The benchmarks run, and the headline one loses nothing. What they measure is for a quiet machine to say."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import heard

from bench import data, floor, path
from bench.__main__ import QUESTIONS
from bench.sink import Report as Arrived

PROJECT = Path(__file__).resolve().parents[1]


def bench(*arguments, cwd, **options):
    """Starts a benchmark in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with heard(signal.SIGHUP):
        return subprocess.Popen(
            [sys.executable, "-m", "bench", *arguments],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )


def finished(*arguments, cwd):
    """Its exit code and what it printed."""
    with bench(*arguments, cwd=cwd) as process:
        try:
            out, err = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise
    return process.returncode, out, err


def test_path_delivers_every_event_and_prints_a_table(tmp_path):
    """Loader, daemon and sink as processes: nothing is lost or doubled, and nothing is left behind. The bare daemon, too."""
    cells = ["stream", "http-100", "stream-bare", "http-100-bare"]
    code, out, err = finished(
        *("path", "--events", "2000", "--runs", "1", "--cells", ",".join(cells), "--json", "figures.json"),
        cwd=tmp_path,
    )
    assert code == 0, out + err
    assert f"verified, nothing lost and nothing doubled: {', '.join(cells)}" in out
    assert "times the CPU of the bare daemon" in out
    assert "floor:" in out
    figures = json.loads((tmp_path / "figures.json").read_text())
    for cell in cells:
        (run,) = figures["cells"][cell]
        assert run["failure"] == ""
        assert run["events"] == 2000
        assert 0 < run["idle_mb"] <= run["peak_mb"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["figures.json"]


def test_who_presses_ctrl_c_until_it_ends_gets_the_same_exit_code():
    """Also in the interpreter's last moments, when it has given the signals back."""
    waiting = "from bench.processes import ended_by_signals\nwith ended_by_signals():\n print(flush=True)\n input()"
    with subprocess.Popen(
        [sys.executable, "-c", waiting], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.0005)
    assert process.returncode == 128 + signal.SIGINT


def test_compare_puts_another_checkout_beside_this_one(tmp_path):
    """Both daemons get every burst whole; what is no checkout is told before anything is started."""
    for other in (str(PROJECT), "bare"):
        code, out, err = finished(
            *("compare", other, "--runs", "1", "--seconds", "0.1", "--cells", "stream,http-10", "--json", "pairs.json"),
            cwd=tmp_path,
        )
        assert code == 0, out + err
        assert f"this checkout beside {other}" in out
        pairs = json.loads((tmp_path / "pairs.json").read_text())["bursts"]
        assert all(burst["committed_per_s"] > 0 < burst["daemon_us"] for load in pairs.values() for burst in load[0])
        assert list(pairs) == ["stream", "http-10"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["pairs.json"]
    code, _, err = finished("compare", str(tmp_path), cwd=tmp_path)
    assert code == 2
    assert "is no checkout of bridged" in err


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("path", [signal.SIGTERM]),
        ("path", [signal.SIGHUP]),
        ("path", [signal.SIGINT] * 3),
        ("compare", [signal.SIGTERM]),
    ],
)
def test_a_benchmark_ends_its_processes_at_a_signal(tmp_path, name, numbers):
    """A benchmark that is told to stop, or whose terminal is closed, leaves no daemon and no folder; also when Ctrl-C is
    pressed again meanwhile.
    """
    command = [name, *(["bare"] if name == "compare" else []), "--cells", "stream", "--seconds", "60"]
    with bench(*command, cwd=tmp_path, start_new_session=True) as process:
        children = []
        deadline = time.monotonic() + 120
        while len(children) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.1)  # two at once may be one
        _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + numbers[0], err
    assert len(children) >= 3
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["floor", "decode", "mapping"])
def test_benchmarks_of_one_process_run(tmp_path, name):
    """They print a table and write JSON."""
    code, out, err = finished(name, "--runs", "1", "--events", "500", "--json", "figures.json", cwd=tmp_path)
    assert code == 0, out + err
    assert "us" in out
    assert json.loads((tmp_path / "figures.json").read_text())["machine"]["cores"] >= 1


def test_spool_shows_its_control(tmp_path):
    """The grid has a bare write and fsync beside SQLite's modes."""
    code, out, err = finished("spool", "--runs", "1", "--seconds", "0.02", cwd=tmp_path)
    assert code == 0, out + err
    assert "write + fsync" in out
    assert "FULL" in out


def test_without_a_name_the_benchmarks_are_listed(tmp_path):
    """And an unknown one is a usage error. bench/README.md knows them all."""
    code, out, _ = finished(cwd=tmp_path)
    assert code == 0
    assert "path" in out
    assert finished("speed", cwd=tmp_path)[0] == 2
    readme = (PROJECT / "bench/README.md").read_text()
    for name in QUESTIONS:
        assert f"\n{name} " in f"\n{out}"
        assert f"python -m bench {name} " in readme, name


def test_a_long_run_has_as_many_different_events_as_it_needs():
    """A loader can go round 256 times: `--seconds 60` failed where 50,000 are sent six times a second."""
    assert path._distinct(None, 4.0) == path._distinct(10_000_000, 4.0) == data.DISTINCT
    assert path._distinct(2_000, 4.0) == 2_000
    assert path._distinct(None, 60.0) * data.MAX_ROUNDS >= 60_000_000
    assert path._distinct(50_000_000, 4.0) * data.MAX_ROUNDS >= 50_000_000


def test_an_attack_that_is_none_is_a_usage_error(tmp_path):
    """A slip was an idle connection, and the run passed."""
    code, _, err = finished("hostile", "--kinds", "idle,bodies", cwd=tmp_path)
    assert code == 2
    assert "no such attack: bodies" in err


def test_a_path_that_is_too_long_for_a_socket_is_said(tmp_path):
    """A benchmark that needs a Unix socket says so, where a stranger's folder is deep."""
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    code, _, err = finished("restart", "--restarts", "1", cwd=deep)
    assert code == 1
    assert "run it in a folder with a short path" in err
    assert "Traceback" not in err
    assert list(deep.iterdir()) == []


@pytest.mark.parametrize("options", [("--runs", "0"), ("--json", "nowhere/figures.json"), ("--json", ".")])
def test_what_cannot_end_well_does_not_begin(tmp_path, options):
    """No runs, or a file that can't be written, is said before anything is measured, and without a traceback."""
    code, out, err = finished("floor", *options, cwd=tmp_path)
    assert code == 2
    assert out == ""
    assert f"argument {options[0]}" in err
    assert "Traceback" not in err


def test_a_folder_that_takes_nothing_is_said(tmp_path):
    """A benchmark keeps its spools where it is run; where it can't, it says so."""
    code, _, err = finished("path", "--cells", "stream", "--events", "100", "--runs", "1", cwd="/proc")
    assert code == 1
    assert "no folder can be made in the working directory" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("-m", "bench", "images", "--images", "10", "--runs", "1"), "images: strace isn't installed"),
        (("-m", "bench", "disk", "--rounds", "1", "--calls", "0"), "disk: mount isn't installed"),
        (("-S", "-m", "bench", "path"), "has no package msgspec: install it, or use .venv/bin/python"),
    ],
)
def test_what_a_machine_lacks_is_said(tmp_path, arguments, why):
    """A tool, or an environment: in words, without a traceback, and nothing is left."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT), "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert why in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_benchmark_of_one_process_ends_at_a_signal(tmp_path, number):
    """Quietly, with the code that a shell knows."""
    with bench("pace", "--runs", "100000", cwd=tmp_path, start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while not _handles_sigterm(process):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "Traceback" not in err


def _handles_sigterm(process):
    """Whether it has a handler of its own: Python has none."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (caught,) = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:")]
    return caught >> (signal.SIGTERM - 1) & 1


def test_a_run_that_lost_or_doubled_events_has_failed(tmp_path, capsys):
    """Counting is enough while nothing is wrong; the ids tell when one loss hides one double."""
    assert not path._failure(Arrived(events=10, distinct=10), 10, check=True)
    assert path._failure(Arrived(events=9), 10, check=False) == "10 events sent and acked, 9 delivered"
    assert path._failure(Arrived(events=10, distinct=9), 10, check=True)
    assert path._failure(Arrived(events=10, bad=1), 10, check=False)

    run = dict.fromkeys(path.Run.__struct_fields__, 0) | {"failure": "9 of 10"}
    results = path.Results(
        machine={"filesystem": "tmpfs"}
        | dict.fromkeys(("cpu", "cores", "kernel", "load_average", "python", "sqlite"), 0),
        settings={},
        floors=[floor.measure(data.events(50))],
        cells={"stream": [path.Run(**run)] * 2},
    )
    assert not path.show(results)
    out = capsys.readouterr().out
    assert "FAILED run 2 of stream: 9 of 10" in out
    assert "CAUTION: the spool was on tmpfs" in out


def test_every_round_of_a_feed_has_ids_of_its_own(tmp_path):
    """Or the sink could not tell a doubled event from a repeated one."""
    data.write(tmp_path / "events", 30)
    feed = data.Feed(data.read(tmp_path / "events"), 7, data.ndjson)
    ids = []
    while len(ids) < 100:
        chunk, events = feed.take(100 - len(ids))
        lines = [json.loads(line) for line in chunk.splitlines()]
        assert len(lines) == events
        ids += [line["id"] for line in lines]
    assert len(ids) == len(set(ids)) == 100
    with pytest.raises(ValueError, match="ids would repeat"):
        data.patched(b"", data.MAX_ROUNDS)
