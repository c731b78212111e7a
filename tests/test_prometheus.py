"""contrib/prometheus and contrib/grafana, by Prometheus' own judgement: its checks, its unit tests, and a real one that scrapes a daemon."""

import asyncio
import json
import re
import subprocess
from pathlib import Path

import aiohttp
import msgspec
import pytest
from conftest import currents, free_port, until

from bridged.alarms import rules as alarm_rules
from bridged.alarms.rules import NAMES
from bridged.currents.table import EVENT_TYPES

ROOT = Path(__file__).parent.parent
CONTRIB = ROOT / "contrib" / "prometheus"
RULES = (CONTRIB / "bridged.rules.yml").read_text(encoding="utf-8")
TESTS = (CONTRIB / "tests.yml").read_text(encoding="utf-8")
DASHBOARD = json.loads((ROOT / "contrib" / "grafana" / "bridged.json").read_text(encoding="utf-8"))
ALERTS = re.findall(r"- alert: (\w+)", RULES)
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def promtool(*arguments, cwd=CONTRIB):
    """Runs promtool, which must agree."""
    done = subprocess.run(["promtool", *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# -- promtool ----------------------------------------------------------------------------------------------------------


def test_the_rules_and_the_configuration_are_valid():
    """As Prometheus itself reads them, its linter's opinion included."""
    assert f"{len(ALERTS)} rules found" in promtool("check", "rules", "--lint-fatal", "bridged.rules.yml")
    promtool("check", "config", "--lint-fatal", "prometheus.yml")


def test_each_alert_calls_when_it_should_and_not_otherwise():
    """contrib/prometheus/tests.yml is true, and names every alert as one that fires: a rule that never can is noticed."""
    assert "SUCCESS" in promtool("test", "rules", "tests.yml")
    assert set(re.findall(r'alertname="(\w+)"', TESTS)) == set(ALERTS)


# -- what they say -----------------------------------------------------------------------------------------------------


def test_every_alert_says_what_to_do():
    """A severity, a summary that names the instance, a description; and the run book's sections exist."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Run book")[2].partition("\n## ")[0]
    for alert, text in zip(ALERTS, re.split(r"- alert: \w+\n", RULES)[1:], strict=True):
        assert re.search(r"severity: (critical|warning)\}", text), alert
        assert re.search(r"summary: .*\$labels\.instance", text), alert
        assert "description: >-" in text, alert
        for section in re.findall(r"Run book: ([\w' ]+)\.", " ".join(text.split())):
            assert f"**{section}.**" in readme, f"{alert} sends to {section!r}"


def test_no_alarm_of_the_daemon_goes_unheard():
    """Those that the catch-all leaves out exist, so each has a rule of its own; all others are in it. What the daemon calls
    critical isn't for tomorrow there.
    """
    left_out = set(re.search(r'bridged_alarm\{name!~"([^"]+)"\}', RULES)[1].split("|"))
    critical = set(re.search(r'bridged_alarm\{name=~"([^"]+)"\} == 1', RULES)[1].split("|"))
    assert critical < left_out < set(NAMES)
    assert {"archive", "damaged", "dead_letters_dropped"} <= critical
    assert {rule.name: rule.severity for rule in alarm_rules.RULES if rule.name not in left_out - critical} == {
        name: "critical" if name in critical else "warning" for name in set(NAMES) - (left_out - critical)
    }


def test_the_dashboard_is_one():
    """Grafana's own demands: ids that differ, panels that don't overlap, a data source that can be chosen; and words."""
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    for panel in PANELS:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len(set(references)) > 0
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {"datasource", "instance"}


@pytest.mark.parametrize(("on_expiry", "max_age"), [("archive", 172_800), ("keep", float("inf"))])
async def test_counts_begin_before_what_they_count(daemon, client, emulator, on_expiry, max_age):
    """`increase` sees nothing in a series that begins with its first event: what alerts look at is there at 0."""
    emulator.credentials(token="another-token")
    app = await daemon(delivery__probe_interval="1h", retention__on_expiry=on_expiry)

    async def metrics():
        async with client.get(f"http://{app.config.admin.listen}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    fresh = await metrics()
    for name in ('requests_total{status="401"}', 'verdicts_total{verdict="halt"}', "delivery_halt_status"):
        assert fresh[f"bridged_{name}"] == 0
    for kind in ("dead_lettered", "expired_total", "waiting"):
        assert fresh[f'bridged_events_{kind}{{event_type="(undecodable)"}}'] == 0
    assert fresh["bridged_max_age_seconds"] == max_age

    url = f"http://{app.config.sources.http.listen}/v1/currents"
    async with client.post(url, json={"events": [currents()]}) as answer:
        assert answer.status == 200
    await until(lambda: app.delivery.halted, "the halt")
    halted = await metrics()
    assert halted["bridged_delivery_halt_status"] == 401
    assert halted['bridged_verdicts_total{verdict="halt"}'] == 1
    for kind in ("dead_lettered", "expired_total", "delivered_total"):
        assert halted[f'bridged_events_{kind}{{event_type="users.messages.email.Open"}}'] == 0


# -- a real Prometheus -------------------------------------------------------------------------------------------------


@pytest.fixture
async def prometheus(tmp_path):
    """Starts a real Prometheus with contrib's configuration, faster and at a target of the test's; gives its address."""
    processes = []

    async def start(target):
        port = free_port()
        example = (CONTRIB / "prometheus.yml").read_text(encoding="utf-8")
        (tmp_path / "bridged.rules.yml").write_text(RULES, encoding="utf-8")
        ours = example.replace("127.0.0.1:8481", target).replace("15s", "500ms")
        (tmp_path / "prometheus.yml").write_text(ours, encoding="utf-8")
        log = (tmp_path / "prometheus.log").open("wb")
        process = await asyncio.create_subprocess_exec(
            "prometheus",
            f"--config.file={tmp_path}/prometheus.yml",
            f"--storage.tsdb.path={tmp_path}/tsdb",
            f"--web.listen-address=127.0.0.1:{port}",
            stdout=log,
            stderr=log,
        )
        log.close()
        processes.append(process)
        return f"http://127.0.0.1:{port}"

    yield start
    for process in processes:
        process.kill()
        await process.wait()


async def ask(client, base, path, **query):
    """What Prometheus' API answers; an error of its own is one of the test."""
    async with client.get(f"{base}/api/v1/{path}", params=query) as answer:
        body = await answer.json()
    assert body["status"] == "success", (query, body)
    return body["data"]


def written(expression):
    """A panel's expression as Grafana sends it."""
    return expression.replace("$__rate_interval", "3s").replace("$instance", ".*")


def selectors(expression):
    """The metrics that an expression names, each with the labels that it asks for."""
    for name, labels in re.findall(r"\b(bridged_\w+|process_\w+|up)\b(?:\{([^}]*)\})?", expression):
        yield name, set(re.findall(r"(\w+)\s*[=!]~?", labels))


async def under_load(client, app, emulator, stop):
    """Every type of event, good and bad, through both doors, until told to stop; Mixpanel is not always well."""
    emulator.script([{"status": 429, "share": 0.2, "seed": 1}, {"status": 503, "share": 0.1, "seed": 2}])
    url = f"http://{app.config.sources.http.listen}/v1/currents"
    new = currents()
    new["properties"]["brand_new_field"] = 1
    _, writer = await asyncio.open_connection("127.0.0.1", app.stream.ports[0])
    n = 0
    while not stop.is_set():
        events = [currents(row.event_type, n, id=f"{n}-{i}") for i, row in enumerate(EVENT_TYPES)]
        bad = [currents(user={}), currents(time="soon")]
        async with client.post(url, json={"events": [new | {"id": f"new-{n}"}, *events, *bad]}) as answer:
            assert answer.status == 200
        writer.write(b"not JSON\n" + msgspec.json.encode(currents(id=f"s-{n}")) + b"\n")
        await writer.drain()
        n += 1
        await asyncio.sleep(0.05)
    writer.close()


@pytest.fixture
async def watched(daemon, emulator, client, prometheus):
    """A daemon under load that a real Prometheus has scraped for a while: its address, and what exists there."""
    app = await daemon(delivery__grace="100ms")
    stop = asyncio.Event()
    load = asyncio.create_task(under_load(client, app, emulator, stop))
    base = await prometheus(app.config.admin.listen)
    samples = 0
    deadline = asyncio.get_running_loop().time() + 60
    # Enough for a rate over three seconds, and for the rules to have been evaluated.
    while samples < 8:
        assert asyncio.get_running_loop().time() < deadline, "Prometheus doesn't scrape"
        assert not load.done(), load
        await asyncio.sleep(0.2)
        try:
            found = await ask(client, base, "query", query="count_over_time(bridged_ready[1m])")
            samples = float(found["result"][0]["value"][1]) if found["result"] else 0
        except aiohttp.ClientError:
            continue
    yield base
    stop.set()
    await load
    emulator.script([])


async def test_every_expression_finds_what_it_names(watched, client):
    """Against a daemon under load: no panel without data, no rule with an error, no metric or label that doesn't exist."""
    existing = {}
    for series in await ask(client, watched, "series", **{"match[]": '{job="bridged"}'}):
        existing.setdefault(series.pop("__name__"), set()).update(series)

    panels = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
    annotations = [(one["name"], one["expr"]) for one in DASHBOARD["annotations"]["list"]]
    groups = (await ask(client, watched, "rules"))["groups"]
    rules = [(rule["name"], rule["query"]) for group in groups for rule in group["rules"]]
    assert [name for name, _ in rules] == ALERTS

    for title, expression in panels + annotations + rules:
        named = list(selectors(expression))
        assert named, f"{title}: {expression}"
        for metric, labels in named:
            assert metric in existing, f"{title} names {metric}, which the daemon doesn't have"
            assert labels <= existing[metric], f"{title}: {metric} has only the labels {existing[metric]}"
        grouped = {
            label.strip()
            for labels in re.findall(r"\b(?:by|without|on)\s*\(([^)]*)\)", expression)
            for label in labels.split(",")
        }
        assert grouped <= set().union(*(existing[metric] for metric, _ in named)), f"{title}: {expression}"

    empty = panels
    deadline = asyncio.get_running_loop().time() + 30
    while empty and asyncio.get_running_loop().time() < deadline:  # a scrape that came too late leaves a gap
        empty = [
            (title, expression)
            for title, expression in empty
            if not (await ask(client, watched, "query", query=written(expression)))["result"]
        ]
    assert empty == []
    for _, expression in annotations:
        await ask(client, watched, "query", query=written(expression))
    for group in groups:
        for rule in group["rules"]:
            assert (rule["health"], rule.get("lastError", "")) == ("ok", ""), rule["name"]


async def test_a_refused_credential_calls(daemon, emulator, client, prometheus):
    """From Mixpanel's 401 to a pending alert with its words filled in, through the real daemon and the real rules."""
    emulator.credentials(token="another-token")
    app = await daemon(delivery__probe_interval="1h")
    url = f"http://{app.config.sources.http.listen}/v1/currents"
    async with client.post(url, json={"events": [currents()]}) as answer:
        assert answer.status == 200
    await until(lambda: app.delivery.halted, "the halt")
    base = await prometheus(app.config.admin.listen)
    alerts = {}
    deadline = asyncio.get_running_loop().time() + 60
    # BridgedDown is pending until the first scrape has been judged, BridgedNothingArrives between two slow ones without an event.
    while set(alerts) - {"BridgedNothingArrives"} != {"BridgedCredentialRejected"}:
        assert asyncio.get_running_loop().time() < deadline, alerts
        await asyncio.sleep(0.2)
        try:
            alerts = {one["labels"]["alertname"]: one for one in (await ask(client, base, "alerts"))["alerts"]}
        except aiohttp.ClientError:
            continue
    assert app.config.admin.listen in alerts["BridgedCredentialRejected"]["annotations"]["summary"]
