"""The demo: its expectation is right by itself, its exit code is the truth, and it leaves nothing behind."""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import msgspec
import pytest
from conftest import heard

from bridged.admin.cohorts import CohortsStatus, WriterStatus
from bridged.admin.status import Status
from bridged.backlog.dead_letters import Group
from bridged.cohorts.records import Figures
from bridged.commands import demo, demo_children, demo_cohorts, demo_day
from bridged.commands.demo_play import Progress
from bridged.currents.table import EVENT_TYPES

ROOT = Path(__file__).parent.parent
NOW_S = 1_760_000_000


@pytest.fixture(scope="module")
def day():
    """A small day."""
    return demo_day.make(1500, NOW_S)


def start(tmp_path, *argv, python=()):
    """The demo as a process of its own; what an operator's environment holds must not matter to it."""
    env = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}
    env |= {"BRIDGED__MIXPANEL__TOKEN": "a-real-one", "HTTP_PROXY": "http://127.0.0.1:1"}
    command = [sys.executable, *python, "-m", "bridged", "demo", *argv]
    with heard(signal.SIGHUP):
        return subprocess.Popen(
            command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


def ours(tmp_path):
    """Processes that were started with a file of this test."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(tmp_path).encode() in words:
                found.append(words)
    return found


# -- the day ----------------------------------------------------------------------------------------------------------


def test_every_type_through_both_doors(day):
    """Both doors get events of every type, and of every kind of trouble."""
    http = Counter(event["event_type"] for body in day.bodies for event in json.loads(body)["events"])
    stream = Counter(
        json.loads(line)["event_type"]
        for write in day.writes
        for line in write.splitlines()
        if line.endswith(b"}")  # but for the one that isn't JSON
    )

    for row in EVENT_TYPES:
        assert http[row.event_type] > 0, row.event_type
        assert stream[row.event_type] > 0, row.event_type
    assert (http.total(), stream.total() + 1) == (day.http_events, day.stream_events)


def test_expectation_adds_up(day):
    """The expectation is itself balanced, and all troubles occur."""
    expected = day.expected

    assert expected.accepted == day.http_events + day.stream_events
    assert expected.accepted == expected.delivered + expected.skipped + expected.dead_letters.total()
    assert expected.delivered == len(expected.stored) + expected.repeats
    assert len(expected.dead_letters) == 5
    assert expected.skipped > 0
    assert expected.repeats > 0


def test_same_seed_same_day():
    """A day can be played again."""
    assert demo_day.make(1000, NOW_S, 3).bodies == demo_day.make(1000, NOW_S, 3).bodies
    assert demo_day.make(1000, NOW_S, 3).bodies != demo_day.make(1000, NOW_S, 4).bodies


# -- the reckoning ----------------------------------------------------------------------------------------------------


@pytest.fixture
def exact(day):
    """An outcome that is exactly as expected."""
    expected = day.expected
    events = {
        "accepted": expected.accepted,
        "delivered": expected.delivered,
        "dead_lettered": expected.dead_letters.total(),
        "expired": 0,
        "skipped": expected.skipped,
        "waiting": 0,
    }
    nothing = dict.fromkeys(field.name for field in msgspec.structs.fields(Status))
    status = Status(**nothing | {"events": events, "imbalance": 0})
    progress = Progress(len(day.bodies), day.stream_events, ended=True)
    groups = [Group("door", "x", f"{reason} ...", count) for reason, count in expected.dead_letters.items()]
    return demo.Outcome(status, progress, 1.0, 1.0), groups, Counter(expected.stored)


def test_exact_is_no_problem(day, exact):
    """What is as expected passes."""
    assert list(demo._problems(day, *exact)) == []


@pytest.mark.parametrize("kind", ["accepted", "delivered", "dead_lettered", "expired", "skipped", "waiting"])
def test_one_event_off_is_a_problem(day, exact, kind):
    """One event too many in any column is found."""
    exact[0].status.events[kind] += 1

    assert any(problem.startswith(f"{kind}: ") for problem in demo._problems(day, *exact))


def test_wrong_events_at_mixpanel_are_problems(day, exact):
    """One event missing, one foreign, one twice: each is found although the counts agree."""
    outcome, groups, stored = exact
    gone = next(iter(stored))
    del stored[gone]
    stored[gone._replace(distinct_id="somebody-else")] = 1
    stored[next(iter(stored))] += 1

    problems = list(demo._problems(day, outcome, groups, stored))
    assert problems == [
        "1 events are missing at Mixpanel",
        "1 events at Mixpanel were never played",
        "1 events are at Mixpanel more than once",
    ]


def test_wrong_reasons_and_acks_are_problems(day, exact):
    """A dead letter for another reason, an ack that didn't come and unbalanced books are found."""
    outcome, groups, stored = exact
    groups[0] = Group("door", "x", "another reason", groups[0].count)
    outcome.progress.http_acked -= 1
    outcome.progress.stream_acked -= 1
    outcome.status.imbalance = 1

    assert len(list(demo._problems(day, outcome, groups, stored))) == 5


# -- the way back -----------------------------------------------------------------------------------------------------


@pytest.fixture
def in_step():
    """A sync, and an outcome that is exactly as expected."""
    sync = demo_cohorts.make()
    members = sum(map(len, sync.members.values()))
    refused = len(sync.members)
    figures = Figures(members=members, in_braze=members - refused, rejected=refused, received=sync.received)
    status = CohortsStatus(sentence="", figures=figures, writer=WriterStatus(state="idle", problem=""))
    in_braze = {name: users - {demo_cohorts.BLOCKED} for name, users in sync.members.items()}
    return sync, demo_cohorts.SyncOutcome(status, 1, 1.0, in_braze, 1, 1)


def test_the_sync_is_one_of_mixpanels(in_step):
    """Several cohorts, pages that come twice, empty diffs and a second full copy; the refused user is in each."""
    pages = [json.loads(body) for bodies in in_step[0].bodies for body in bodies]
    keys = [
        (page["action"], *page["parameters"]["page_info"].values(), page["parameters"]["mixpanel_session_id"])
        for page in pages
    ]
    assert len(set(keys)) < len(keys)
    assert {page["action"] for page in pages} == {"members", "add_members", "remove_members"}
    assert any(not page["parameters"]["members"] for page in pages)
    assert all(demo_cohorts.BLOCKED in users for users in in_step[0].members.values())
    assert demo_cohorts.make(3).bodies == demo_cohorts.make(3).bodies != demo_cohorts.make(4).bodies


def test_one_member_off_is_a_problem(in_step):
    """Nothing is wrong as expected; one missing, one too many, a cohort of no one's, a wrong figure: each is found."""
    sync, outcome = in_step
    assert list(demo_cohorts.problems(sync, outcome)) == []
    name = next(iter(outcome.in_braze))
    gone = outcome.in_braze[name].pop()
    assert any("1 members are missing" in problem for problem in demo_cohorts.problems(sync, outcome))
    outcome.in_braze[name] |= {gone, demo_cohorts.BLOCKED}
    assert any("1 users are in Braze" in problem for problem in demo_cohorts.problems(sync, outcome))
    outcome.in_braze[name].discard(demo_cohorts.BLOCKED)
    outcome.in_braze["another"] = {gone}
    assert any("'another'" in problem for problem in demo_cohorts.problems(sync, outcome))
    del outcome.in_braze["another"]
    outcome.status.figures = msgspec.structs.replace(outcome.status.figures, leaving=1)
    assert list(demo_cohorts.problems(sync, outcome)) == ["cohort memberships leaving: 1, and it should be 0"]


# -- the whole --------------------------------------------------------------------------------------------------------


def test_demo_is_exact(tmp_path):
    """A real run: exit code 0, the table, every process ended, every file removed."""
    process = start(tmp_path, "--events", "30000")
    output, _ = process.communicate(timeout=120)

    assert process.returncode == 0, output
    assert "Mixpanel holds exactly the events that it should" in output
    assert "Braze holds exactly Mixpanel's membership" in output
    assert "unknown event type" in output
    assert "retry (planned)" in output
    assert ours(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_what_lies_in_the_working_directory_is_not_the_demos(tmp_path):
    """A folder of somebody's scripts, one of which is called like a module: the children are those of who started them."""
    (tmp_path / "random.py").write_text("raise SystemExit('somebody else')")
    (tmp_path / "bridged").mkdir()
    (tmp_path / "bridged" / "__init__.py").write_text("raise SystemExit('another version')")
    process = start(tmp_path, "--events", "1000", python=("-P",))
    output, _ = process.communicate(timeout=120)

    assert process.returncode == 0, output


@pytest.mark.parametrize("name", [".demo", ".demo/config.toml"])
def test_files_that_cannot_be_written_are_told(tmp_path, name):
    """A folder of somebody else's, or one that is none: in words, and nothing is left running."""
    if name == ".demo":
        (tmp_path / name).write_text("a file")
    else:
        (tmp_path / name).mkdir(parents=True)
    process = start(tmp_path, "--events", "1000", "--keep")
    output, _ = process.communicate(timeout=60)

    assert process.returncode == 1
    assert "bridged: can't write the demo's files: " in output
    assert f"{tmp_path}/{name}" in output
    assert "Traceback" not in output
    assert ours(tmp_path) == []


def test_no_place_for_its_files_is_told(monkeypatch):
    """Every temporary folder is full or read-only."""
    monkeypatch.setattr(tempfile, "mkdtemp", Mock(side_effect=FileNotFoundError(2, "No usable temporary directory")))

    with pytest.raises(demo_children.DemoError) as caught:
        demo._folder(keep=False)
    assert "set TMPDIR to a folder of yours" in caught.value.hint


def test_what_it_says_can_be_pasted(tmp_path):
    """Also where the folder has a space; and its configuration is one in a folder of any name."""
    folder = tmp_path / 'my "project\\'
    folder.mkdir()
    addresses = demo_children.Addresses(
        folder, "e", "b", "http://1:1", "http://1:2", [], "bearer", folder / "config.toml"
    )
    words = shlex.split(next(line for line in demo._where_next(addresses).splitlines() if " status " in line))
    assert words[-1] == str(folder / "config.toml")
    assert tomllib.loads(demo_children._config(addresses, "token"))["spool"]["path"] == str(folder / "spool.db")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_demo_can_be_stopped(tmp_path, number):
    """Ctrl-C in the middle, even twice, ends the children as well; and so does a terminal that is closed."""
    process = start(tmp_path, "--events", "20000")
    lines = iter(process.stdout.readline, "")
    next(line for line in lines if "are running" in line)
    process.send_signal(number)
    time.sleep(0.1)
    process.send_signal(number)
    rest = "".join(lines)
    process.wait(timeout=60)
    process.stdout.close()

    assert process.returncode == 130
    assert "Traceback" not in rest
    assert ours(tmp_path) == []
    assert list(tmp_path.iterdir()) == []  # a spool's reserve alone has 64 MiB


def test_who_reads_no_more_of_it_ends_it(tmp_path):
    """As `bridged demo | head` does: nothing is left running, nor any file."""
    process = start(tmp_path, "--events", "1000")
    assert "Making up" in process.stdout.readline()
    process.stdout.close()
    process.wait(timeout=60)

    assert ours(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_long_day_can_be_stopped_while_it_is_made_up(tmp_path):
    """It would take minutes: nobody waits for them, and nothing is left."""
    process = start(tmp_path, "--events", "100000000")
    assert "Making up" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)

    assert (process.returncode, rest) == (130, "")
    assert list(tmp_path.iterdir()) == []


def test_keep_leaves_it_running(tmp_path):
    """With --keep the daemon and the emulator answer after the table, until Ctrl-C; the exit code is still the truth. Another
    demo leaves its files alone meanwhile.
    """
    process = start(tmp_path, "--events", "1000", "--keep")
    lines = iter(process.stdout.readline, "")
    metrics = next(line for line in lines if "/metrics" in line).split()[-1]
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(metrics, timeout=10) as answer:
        assert b"bridged_events_delivered_total" in answer.read()
    second = start(tmp_path, "--events", "1000", "--keep")
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 1
    assert f"another demo is running in {tmp_path}/.demo" in said
    process.send_signal(signal.SIGINT)
    rest = "".join(lines)
    process.wait(timeout=60)
    process.stdout.close()

    assert process.returncode == 0, rest
    assert ours(tmp_path) == []
    assert (tmp_path / ".demo" / "daemon.log").exists()
