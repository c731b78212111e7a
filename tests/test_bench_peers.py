"""`bench peers` runs with whoever is installed, counts right, and says what a peer lost or changed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from isal import igzip

from bench import data, sink
from bench.peers import compare, results, starting
from bench.peers.catalog import PEERS
from bench.peers.starting import Missing
from bridged.currents.table import EVENT_TYPES
from bridged.mixpanel.mapping import EventMapping, MappingSettings

PROJECT = Path(__file__).resolve().parents[1]
TOKEN = "0123456789abcdef0123456789abcdef"
COLLECTORS = ("syslog-ng", "rsyslog", "fluent", "vector")


def peers(*arguments, cwd, **environment):
    """Its exit code and what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", "peers", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(PROJECT), **environment},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_naive_bridge_runs_beside_bridged_and_the_absent_are_listed(tmp_path):
    """Both deliver what was sent; kill -9 loses nothing that bridged acked; a missing program is no error."""
    absent = ("bytewax", "fluent-bit", "rsyslog-map-disk", "fluentd", "vector")
    code, out, err = peers(
        *("--only", f"bridged,naive,{','.join(absent)}", "--runs", "1", "--events", "3000", "--json", "figures.json"),
        cwd=tmp_path,
        BENCH_PEERS=str(tmp_path / "nowhere"),
        **dict.fromkeys(("FLUENT_BIT", "FLUENTD", "RSYSLOGD", "VECTOR"), str(tmp_path / "no-such-program")),
    )
    assert code == 0, out + err
    assert "FAILED" not in out
    figures = json.loads((tmp_path / "figures.json").read_text())
    by_name = {row["name"]: row for row in figures["rows"]}
    assert set(by_name) == {"bridged", "naive"}
    for row in by_name.values():
        assert row["failure"] == ""
        assert all(len(row[figure]) == 1 for figure in ("events_per_s", "cpu_us_per_event", "peak_rss_mb"))
        assert row["events_per_s"][0] > 0
        assert row["cpu_us_per_event"][0] > 0
        assert row["peak_rss_mb"][0] > 1
    assert by_name["bridged"]["bytes_on_disk"] > 0
    assert by_name["bridged"]["lost_after_kill"] == 0
    assert by_name["bridged"]["lost_after_kill_of"].endswith(" acked")
    assert figures["differences"]["bridged"] == "none"
    for problem in ("missing", "twice", "another"):
        assert problem not in figures["differences"]["naive"]
    assert set(figures["missing"]) == set(absent)
    assert "python -m bench peers --install" in figures["missing"]["bytewax"]
    assert "fluent-bit: 96,000 events/s, 17.4 us (measured elsewhere: " in out
    listed = {each["name"]: each for each in figures["absent"]}
    assert all(listed[name]["published"] and listed[name]["source"] for name in absent)
    assert "github.com/vectordotdev/vector" in listed["vector"]["source"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["figures.json"]


def test_the_official_python_client_delivers_every_event(tmp_path):
    """Forms of 50 events each: the sink counts them, and they are the events that bridged sends."""
    # The test group has the package already; what is made on demand is this folder.
    (tmp_path / "tools/venv/bin").mkdir(parents=True)
    launcher = tmp_path / "tools/venv/bin/python"
    launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="ascii")
    launcher.chmod(0o755)
    (tmp_path / "work").mkdir()
    code, out, err = peers(
        *("--only", "mixpanel-pypi", "--runs", "1", "--events", "2000", "--no-kill", "--json", "figures.json"),
        cwd=tmp_path / "work",
        BENCH_PEERS=str(tmp_path / "tools"),
    )
    assert code == 0, out + err
    figures = json.loads((tmp_path / "work/figures.json").read_text())
    if "mixpanel-pypi" in figures["missing"]:
        pytest.fail(figures["missing"]["mixpanel-pypi"])
    assert [each["events"] for each in figures["runs"]["mixpanel-pypi"]] == [2000]
    assert "another" not in figures["differences"]["mixpanel-pypi"]


@pytest.mark.parametrize("name", [peer.name for peer in PEERS if peer.name.startswith(COLLECTORS)])
def test_a_peers_configuration_is_whole(tmp_path, monkeypatch, name):
    """No placeholder is left in it, both ports are in it, and each event type has a name in its table."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n", encoding="ascii")
    program.chmod(0o755)
    for variable in ("FLUENT_BIT", "FLUENTD", "RSYSLOGD", "RSYSLOG_OMHTTP", "SYSLOG_NG", "VECTOR"):
        monkeypatch.setenv(variable, str(program))
    (peer,) = [peer for peer in PEERS if peer.name == name]
    (tmp_path / "work").mkdir()
    command = peer.command(tmp_path / "work", 40001, 40002)
    assert command.program == str(program)
    texts = {file.name: file.read_text() for file in (tmp_path / "work").iterdir() if file.is_file()}
    (config,) = [text for file, text in texts.items() if any(each.endswith(file) for each in command.arguments)]
    assert not re.search(r"@[A-Z_]+@", config), config
    assert "40001" in config
    assert "40002" in config
    (table,) = [text for file, text in texts.items() if file.startswith("names.")]
    assert all(f'"{row.event_type}"' in table for row in EVENT_TYPES)
    for file in re.findall(r"\S*/bench/peers/[\w./-]+", f"{config}\n{' '.join(command.arguments)}"):
        assert Path(file.strip('"')).exists(), file


def test_rsyslog_without_omhttp_is_missing_and_not_broken(tmp_path, monkeypatch):
    """Debian's rsyslog has no omhttp: who has only that is told so, before anything runs."""
    monkeypatch.setenv("RSYSLOGD", sys.executable)
    monkeypatch.setenv("RSYSLOG_OMHTTP", str(tmp_path / "omhttp.so"))
    with pytest.raises(Missing, match="built without it; RSYSLOG_OMHTTP names"):
        starting.rsyslog(disk=True)(tmp_path, 1, 1)


@pytest.mark.parametrize("form", ["ndjson", "ndjson-gzip", "lines", "array", "array-gzip", "form", "base64"])
def test_the_sink_counts_and_keeps_every_form(tmp_path, form):
    """What clients make of the same three events: all count three, and all are read back."""
    from base64 import b64encode
    from urllib.parse import urlencode

    mapping = EventMapping(EVENT_TYPES, MappingSettings(token=TOKEN))
    lines = data.events(3)
    ndjson = msgspec.json.Encoder().encode_lines(mapping.map(mapping.schema.lines(lines), 2e9).forms)
    array = b"[" + b",".join(ndjson.splitlines()) + b"]"
    body = {
        "ndjson": ndjson,
        "ndjson-gzip": igzip.compress(ndjson),
        "lines": b"".join(lines).rstrip(b"\n"),
        "array": array,
        "array-gzip": igzip.compress(array),
        "form": urlencode({"data": array, "verbose": 1, "ip": 0}).encode(),
        "base64": b"data=" + b64encode(array),
    }[form]
    taker = sink.Sink(keep=tmp_path / "kept")
    answer = taker.take(body)
    assert b" 200 OK" in answer
    assert taker.report().events == 3
    ids = compare.insert_ids(tmp_path / "kept")
    assert sorted(ids) == sorted(json.loads(line)["id"] for line in lines)
    if form == "form":
        assert answer.endswith(b'{"status":1,"error":null}')
    assert b"400" in taker.take(b"\xff no form at all")
    assert taker.report().bad == 1


def test_differences_are_told(tmp_path):
    """Missing, doubled and changed events, and properties that aren't the same."""

    def event(key, name="Email Send", **properties):
        return {"event": name, "properties": {"$insert_id": key, "distinct_id": "u", "time": 1, **properties}}

    (tmp_path / "ours").write_bytes(msgspec.json.encode([event("a"), event("b"), event("c", x=1)]))
    theirs = [event("a"), event("a"), event("b", name="users.messages.email.Send")]
    (tmp_path / "theirs").write_bytes(msgspec.json.encode(theirs))
    ours = compare.mapped(tmp_path / "ours")
    found = compare.difference(ours, tmp_path / "theirs", maps=True)
    assert (found.missing, found.doubled, found.changed) == (1, 1, 1)
    assert "1 missing; 1 sent twice; 1 with another name, user or time" in found.text()
    (tmp_path / "theirs").write_bytes(msgspec.json.encode([event("a"), event("b"), event("c", x="1")]))
    assert compare.difference(ours, tmp_path / "theirs", maps=True).text() == "other properties: x (1)"


def test_a_row_that_lost_acked_events_fails_the_run(capsys):
    """A peer may lose what it likes; bridged may not."""

    def found(**killed):
        return results.Results(
            machine=dict.fromkeys(("cpu", "cores", "kernel", "load_average", "python", "sqlite", "filesystem"), 0),
            settings={"runs": 1},
            runs={name: [results.Run(events=10, events_per_s=5, cpu_us=2)] for name in ("bridged", "naive")},
            killed={name: results.Killed(of="acked", events=10, lost=lost, doubled=0) for name, lost in killed.items()},
        )

    assert results.show(found(bridged=0, naive=4))
    assert "4 of 10 acked" in capsys.readouterr().out
    assert not results.show(found(bridged=1, naive=0))
