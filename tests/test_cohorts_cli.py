"""`bridged cohorts`, its API, its metrics and its lines in the status, against a daemon that imports cohorts."""

import asyncio
import contextlib
import io
import json
import os
import subprocess

import msgspec
import pytest
from cohort_sender import Sender, session
from conftest import until
from prometheus_client.parser import text_string_to_metric_families
from test_cohorts_pipeline import in_braze, in_step

from bridged import cli
from bridged.cohorts.membership import Membership
from bridged.emulator.braze import BrazeConfig, BrazeEmulator

USERS = [f"u{n:03}" for n in range(30)]


@pytest.fixture
def command(tmp_path, printed):
    """Runs `bridged WORDS` in a thread against a daemon's admin address: exit code, standard output, standard error."""

    async def run(app, *words):
        path = tmp_path / "cli.toml"
        path.write_text(
            f'[admin]\nlisten = "{app.config.admin.listen}"\n[mixpanel]\ntoken = "example-token"\n', encoding="utf-8"
        )
        printed.readouterr()
        try:
            code = await asyncio.to_thread(cli.main, [*words, "--config", str(path)])
        except SystemExit as usage:
            code = usage.code
        output = printed.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
async def synced(daemon, importing, braze, client):
    """A daemon in step with Braze: two cohorts."""
    app = await daemon(**importing)
    mixpanel = Sender(client, f"http://{app.config.sources.http.listen}")
    await mixpanel.take(session("members", USERS[:20], "777", name="Power users", size=9))
    await mixpanel.take(session("members", USERS[10:], "778", name="Trial \x1b[31m"))
    await in_step(app)
    return app


def cells(output, begin):
    """The words of the line that begins with something."""
    return next(line.split() for line in output.splitlines() if line.strip().startswith(begin))


async def test_list_shows_every_cohort(synced, command):
    """Name and state of each, safe for a terminal, below a sentence about the whole."""
    code, output, _ = await command(synced, "cohorts", "list")
    assert code == 0
    assert "In step: 40 of 40 memberships in Braze" in output
    assert cells(output, "117:777") == ["117:777", "Power", "users", "20", "20", "0", "0", "0", "synced"]
    assert "\x1b" not in output
    code, output, _ = await command(synced, "cohorts", "list", "--json")
    overview = json.loads(output)
    assert [row["key"] for row in overview["cohorts"]] == ["117:777", "117:778"]
    assert overview["writer"]["state"] == "idle"
    assert overview["figures"]["members"] == 40


async def test_members_that_are_not_taken_in_yet_are_no_silence_of_mixpanels(
    daemon, importing, client, command, monkeypatch
):
    """Between a sync's first page and its cohort the list doesn't say that nothing has come."""
    monkeypatch.setattr(Membership, "_may_merge", lambda _self: False)
    app = await daemon(**importing)
    assert "Mixpanel hasn't sent one" in (await command(app, "cohorts", "list"))[1]
    await Sender(client, f"http://{app.config.sources.http.listen}").take(session("members", USERS[:5], "777"))
    await until(lambda: app.membership.figures.waiting == 5, "the members that wait")

    assert "no cohorts yet: the first pages are being taken in" in (await command(app, "cohorts", "list"))[1]


async def test_show_tells_what_became_of_a_sync(synced, command, client):
    """Received, matched, unknown, sent, waiting, rejected, the sessions; by the cohort's id alone too."""
    mixpanel = Sender(client, f"http://{synced.config.sources.http.listen}")
    [page] = session("add_members", ["u900"], "777", name="Power users")
    page["parameters"]["members"].append({"email": "nobody@example.com"})
    await mixpanel.take([page, page])
    await in_step(synced)
    code, output, _ = await command(synced, "cohorts", "show", "777")
    assert code == 0
    assert cells(output, "received")[1] == "24"
    assert cells(output, "matched")[1] == "22"
    assert cells(output, "unknown")[1] == "2"
    assert cells(output, "members")[1] == "21"
    assert cells(output, "sent")[1] == "21"
    assert cells(output, "waiting")[1] == "0"
    assert cells(output, "rejected")[1] == "0"
    assert "add_members" in output
    assert "3 of 3" in output
    code, output, _ = await command(synced, "cohorts", "show", "117:777", "--json")
    assert json.loads(output)["cohort"]["members"] == 21
    code, _, error = await command(synced, "cohorts", "show", "999")
    assert code == 1
    assert "999" in error


async def test_a_session_that_broke_off_is_said_to(synced, command, client):
    """Until then it is under way; the cohort is in step without it."""
    pages = session("members", USERS[:25], "777", name="Power users", size=5)
    await Sender(client, f"http://{synced.config.sources.http.listen}").take(pages[:2])
    await until(lambda: synced.membership.rows[0].state == "receiving", "its being merged")
    assert "under way" in (await command(synced, "cohorts", "show", "777"))[1]

    def long_ago(db):
        db.execute("UPDATE rounds SET last_page_at = last_page_at - 601 WHERE complete = 0")

    await synced.membership.run(long_ago)
    await synced.membership.resync("778")
    await in_step(synced)
    _, output, _ = await command(synced, "cohorts", "show", "777")
    assert "under way" not in output
    assert "broken off" in output


async def test_plan_and_allow(daemon, importing, braze, client, command):
    """What it would cost is told before it is spent; what is allowed is spent, all of it or so much."""
    app = await daemon(**importing | {"cohorts__max_data_points_per_day": "5"})
    mixpanel = Sender(client, f"http://{app.config.sources.http.listen}")
    await mixpanel.take(session("members", USERS))
    await until(lambda: app.cohort_writer.state == "capped" and not app.cohort_writer.in_flight, "the cap", 30)
    code, output, _ = await command(app, "cohorts", "plan")
    assert code == 0
    assert cells(output, "to write")[2] == "25"
    assert cells(output, "costs")[1] == "25"
    assert cells(output, "spent today")[2] == "5"
    assert "bridged cohorts allow" in output
    _, output, _ = await command(app, "cohorts", "list")
    assert "max_data_points_per_day" in output
    code, output, _ = await command(app, "cohorts", "plan", "--json")
    assert json.loads(output)["fits"] is False
    assert (await command(app, "cohorts", "allow", "7"))[0] == 0
    await until(lambda: braze.summary().points == 12 and not app.cohort_writer.in_flight, "seven more", 30)
    assert (await command(app, "cohorts", "allow", "0"))[0] == 2
    code, output, _ = await command(app, "cohorts", "allow", "--json")
    assert (code, json.loads(output)["allowed_today"]) == (0, len(USERS))
    await in_step(app)
    assert braze.summary().points == len(USERS)


async def test_resync_writes_everything_again(synced, braze, command):
    """Whatever became of the attribute in Braze; which cohort must be said."""
    before = braze.summary().points
    braze.workspace.clear()
    code, output, _ = await command(synced, "cohorts", "resync", "777")
    assert code == 0
    assert "20 memberships" in output
    await until(lambda: in_braze(braze, "Power users") == USERS[:20], "everybody again", 30)
    await in_step(synced)
    assert braze.summary().points == 20
    assert before == 30
    assert (await command(synced, "cohorts", "resync"))[0] == 2
    assert (await command(synced, "cohorts", "resync", "777", "--all"))[0] == 2
    code, output, _ = await command(synced, "cohorts", "resync", "--all", "--rejected", "--json")
    assert (code, json.loads(output)) == (0, {"due": 0})


async def test_refused_users_are_shown_with_brazes_words(daemon, importing, client, command):
    """In `show`, and over the API in pages."""
    async with BrazeEmulator(BrazeConfig(port=0, blocked=["u003", "u007"])) as braze:
        app = await daemon(**importing | {"braze__url": braze.url})
        mixpanel = Sender(client, f"http://{app.config.sources.http.listen}")
        await mixpanel.take(session("members", USERS))
        await in_step(app)
        _, output, _ = await command(app, "cohorts", "show", "777")
        assert cells(output, "rejected")[1] == "2"
        assert "blacklisted" in " ".join(cells(output, "u003"))
        base = f"http://127.0.0.1:{app.admin.port}/api/cohorts/refusals"
        async with client.get(f"{base}?limit=1") as answer:
            first = await answer.json()
        assert [one["external_id"] for one in first["refusals"]] == ["u003"]
        async with client.get(f"{base}?limit=1&after={first['next']}") as answer:
            assert [one["external_id"] for one in (await answer.json())["refusals"]] == ["u007"]
        async with client.get(f"{base}?limit=1001") as answer:
            assert answer.status == 400


async def test_many_refused_users_are_told_of(daemon, importing, client, command):
    """`show` lists twenty, says how many more there are and where; `--json` has them, but for those of other cohorts."""
    refused = [f"bad{n:02}" for n in range(45)]
    async with BrazeEmulator(BrazeConfig(port=0, blocked=[*refused, "other"])) as braze:
        app = await daemon(**importing | {"braze__url": braze.url})
        mixpanel = Sender(client, f"http://{app.config.sources.http.listen}")
        await mixpanel.take(session("members", ["other", *USERS], "778"))
        await mixpanel.take(session("members", [*USERS, *refused[:21]], "777"))
        await in_step(app)
        _, output, _ = await command(app, "cohorts", "show", "777")
        assert output.count("blacklisted") == 20
        assert "and 1 more: `bridged cohorts show 117:777 --json` has them all" in output
        await mixpanel.take(session("add_members", ["late", *refused[21:]], "777"))
        await in_step(app)
        _, output, _ = await command(app, "cohorts", "show", "117:777")
        assert output.count("blacklisted") == 20
        assert "and 25 more: " in output
        _, output, _ = await command(app, "cohorts", "show", "777", "--json")
        found = json.loads(output)["refusals"]
        assert sorted(one["external_id"] for one in found) == refused
        assert all("blacklisted" in one["reason"] for one in found)
        _, output, _ = await command(app, "cohorts", "show", "778")
        assert output.count("blacklisted") == 1
        assert " more" not in output


async def test_forget_takes_a_cohort_out_of_braze(synced, braze, command, monkeypatch):
    """Only when it is meant; then nobody is in it and it is gone, and the other one stays."""
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert (await command(synced, "cohorts", "forget", "777"))[0] == 2
    assert in_braze(braze, "Power users") == USERS[:20]
    code, output, _ = await command(synced, "cohorts", "forget", "777", "--yes")
    assert code == 0
    assert "20 memberships" in output
    await until(lambda: [row.key for row in synced.membership.rows] == ["117:778"], "the end of it", 30)
    assert in_braze(braze, "Power users") == []
    assert in_braze(braze, "Trial \x1b[31m") == USERS[10:]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("show", ""), 2, "bridged cohorts list"),
        (("show", "plan"), 2, "no cohort 'plan'"),
        (("allow", "x"), 2, "expected a number, got 'x'"),
        (("allow", "0"), 2, "at least 1"),
        (("allow", "9" * 14), 2, "at most 1,000,000,000,000"),
    ],
)
async def test_slips_of_a_person_are_told_in_words(synced, command, words, code, said):
    """Not in those of the API, or of the code."""
    found, output, error = await command(synced, "cohorts", *words)
    assert (found, output) == (code, "")
    assert said in error


async def test_without_cohorts_the_command_says_so(daemon, command):
    """Not a traceback, but what to set."""
    app = await daemon()
    code, _, error = await command(app, "cohorts", "list")
    assert code == 1
    assert "[cohorts] enabled" in error


async def test_status_and_metrics_tell_of_cohorts(synced, braze, client, command):
    """The paragraph of `bridged status`, and the conservation law in /metrics."""
    code, output, _ = await command(synced, "status")
    assert code == 0
    assert "cohorts: In step: 40 of 40 memberships in Braze" in output
    async with client.get(f"http://127.0.0.1:{synced.admin.port}/metrics") as answer:
        text = await answer.text()
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["bridged_cohorts",] == 2
    assert samples["bridged_cohort_memberships", "in_braze"] == 40
    assert samples["bridged_cohort_memberships_imbalance",] == 0
    assert samples["bridged_cohort_members_received", "applied"] == 40
    assert samples["bridged_cohort_points_today",] == braze.summary().points == 30
    assert samples["bridged_cohort_points_spent_total",] == 30
    assert samples["bridged_cohort_users_sent_total",] == 30
    assert samples["bridged_cohort_requests_total",] == braze.summary().requests
    assert samples["bridged_cohorts_halted",] == 0
    assert samples["bridged_alarm", "cohorts_halted"] == 0


async def test_a_reloaded_cap_is_told_at_once(daemon, importing, braze, client):
    """In /api/cohorts and in /metrics, though nothing is due and nothing is committed."""
    app = await daemon(**importing | {"cohorts__max_data_points_per_day": "100"})
    await Sender(client, f"http://{app.config.sources.http.listen}").take(session("members", USERS))
    await in_step(app)
    admin = f"http://127.0.0.1:{app.admin.port}"
    for cap, left in ((100, 70), (1000, 970), (0, None), (10, 0)):
        cohorts = msgspec.structs.replace(app.config.cohorts, max_data_points_per_day=cap)
        said = msgspec.structs.replace(app.config, cohorts=cohorts)
        app.reload(lambda said=said: said)
        async with client.get(f"{admin}/api/cohorts") as answer:
            figures = (await answer.json())["figures"]
        assert (figures["points_today"], figures["points_left_today"]) == (30, left)
        async with client.get(f"{admin}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        told = [float(line.split()[1]) for line in lines if line.startswith("bridged_cohort_points_left_today ")]
        assert told == ([] if left is None else [left])


async def test_orders_that_make_no_sense_change_nothing(synced, client, braze):
    """400 with what is wrong for bodies, 404 for cohorts that there are not."""
    base = f"http://127.0.0.1:{synced.admin.port}/api/cohorts"
    before = braze.summary().points
    for verb, body, status in (
        ("resync", {}, 400),
        ("resync", {"all": True, "cohort": "777"}, 400),
        ("resync", {"cohort": "777", "extra": 1}, 400),
        ("resync", {"cohort": "999"}, 404),
        ("forget", {}, 400),
        ("forget", {"cohort": ""}, 400),
        ("forget", {"cohort": "999"}, 404),
        ("allow", {"points": -1}, 400),
        ("allow", {}, 400),
    ):
        async with client.post(f"{base}/{verb}", json=body) as answer:
            assert (verb, body, answer.status) == (verb, body, status)
            assert (await answer.json())["error"]
    async with client.get(f"{base}/999") as answer:
        assert answer.status == 404
    await in_step(synced)
    assert braze.summary().points == before


@pytest.fixture
def small(tmp_path):
    """A tmpfs of 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(os.geteuid() != 0 and not os.environ.get("CI"), reason="mounting takes root")
async def test_a_full_disk_at_the_start_is_told_as_what_it_is(small, daemon, importing, client, command):
    """Nobody is told to move a good file away: with some space it goes on where it was."""
    config = importing | {"cohorts__path": str(small / "cohorts.db")}
    app = await daemon(**config)
    await Sender(client, f"http://{app.config.sources.http.listen}").take(session("members", USERS))
    await in_step(app)
    await app.__aexit__(None, None, None)
    with contextlib.suppress(OSError), (small / "filling").open("wb", buffering=0) as filling:
        while True:
            filling.write(bytes(4096))
    app = await daemon(**config)
    assert app.membership is None
    _, output, _ = await command(app, "status")
    assert "its disk is full: free some space" in output
    assert "move it away" not in output
    await app.__aexit__(None, None, None)
    (small / "filling").unlink()
    app = await daemon(**config)
    assert app.membership.figures.in_braze == len(USERS)
    await app.__aexit__(None, None, None)


async def test_a_damaged_file_is_told_everywhere(daemon, importing, client, command):
    """The export goes on; the status, the metrics, the alarm and the commands say what is wrong with the cohorts."""
    with open(importing["cohorts__path"], "wb") as file:  # noqa: ASYNC230, PTH123  # a few bytes
        file.write(b"no database at all, " * 1000)
    app = await daemon(**importing)
    assert app.membership is None
    code, output, _ = await command(app, "status")
    assert code == 0
    assert "cohorts: Not imported: " in output
    assert "cohorts.db" in output
    code, _, error = await command(app, "cohorts", "list")
    assert (code, "no cohorts are imported" in error) == (69, True)
    async with client.get(f"http://127.0.0.1:{app.admin.port}/metrics") as answer:
        assert "bridged_cohorts_failed 1.0" in await answer.text()
    await until(lambda: "cohorts_halted" in {one.alarm for one in app.watch.alarms.open}, "the alarm", 30)


async def test_check_tells_of_cohorts_and_asks_braze(tmp_path, braze, capsys):
    """What the configuration amounts to, what may be dear, and with --online what Braze says to the key; nothing is written."""
    path = tmp_path / "check.toml"

    async def check(key, *words, more=""):
        path.write_text(
            f"""
[mixpanel]
export = false
[cohorts]
enabled = true
password = "example-password"
{more}
[braze]
url = "{braze.url}"
{key}
""",
            encoding="utf-8",
        )
        capsys.readouterr()
        code = await asyncio.to_thread(cli.main, ["check", "--config", str(path), *words])
        output = capsys.readouterr()
        return code, output.out + output.err

    good = 'rest_key = "example-rest-key"'
    code, output = await check(good)
    assert code == 0
    assert "mixpanel_cohorts" in output
    assert "large bill" in output
    assert "no event is taken" in output
    assert cells(output, "stream door") == ["stream", "door", "closed"]
    assert "example-" not in output
    assert braze.summary().requests == 0
    code, output = await check(good, "--online", more="max_data_points_per_day = 5\nupdate_existing_only = false")
    assert (code, "Braze takes the REST key" in output) == (0, True)
    assert "5 a day" in output
    assert "are created there" in output
    code, output = await check('rest_key = "another-rest-key"', "--online")
    assert (code, "rest_key" in output) == (69, True)
    partner = 'partner_key = "example-partner-key"\ndata_import_key = "example-import-key"\npartner_name = "example"'
    code, output = await check(partner, "--online")
    assert (code, "key of the partner 'example'" in output) == (0, True)
    braze.script([{"path": "*", "status": 503}])
    assert (await check(good, "--online"))[0] == 69
    braze.script([{"status": 400}])
    assert (await check(good, "--online"))[0] == 0
    braze.script([{"status": 413}])
    assert (await check(good, "--online"))[0] == 69
    assert braze.users() == []
    assert braze.summary().points == 0
