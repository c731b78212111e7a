"""The daemon's own OpenAPI document: complete, valid, and true when a machine tries what it says."""

import os
import re
from collections import Counter
from pathlib import Path

import jsonschema_rs
import msgspec
import pytest
import schemathesis
from cohort_sender import session
from conftest import currents
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import CHECKS

from bench.processes import Daemon, Sink, folder, get
from bridged.admin.openapi import document

# Ten find what is wrong often enough; a nightly run may try thousands.
EXAMPLES = int(os.environ.get("BRIDGED_SCHEMATHESIS_EXAMPLES", "10"))
TRIED = Counter()  # requests, by method and path; `pytest -s` tells
SCHEMA = schemathesis.openapi.from_dict(document())
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
DOOR = "/v1/currents"
COHORTS = "/v1/cohorts/mixpanel"
IMPORTING = """
[cohorts]
enabled = true
path = "cohorts.db"
[braze]
url = "http://127.0.0.1:9"
rest_key = "example-rest-key"
"""
# Its answer has no end; tests/test_page_live.py listens to it.
ENDLESS = {("GET", "/api/live")}
METHODS = ("get", "post", "put", "delete", "patch")


def described():
    """Method and path of every operation of the document."""
    return {
        (method.upper(), path) for path, item in document()["paths"].items() for method in METHODS if method in item
    }


async def test_every_route_is_described(daemon):
    """Both ways: no route without a description, no description without a route; HEAD comes with GET."""
    app = await daemon()
    served = {
        (route.method, route.resource.canonical)
        for route in app.admin._runner.app.router.routes()
        if route.method != "HEAD"
    }
    assert described() == served | {("POST", DOOR), ("POST", COHORTS)}


async def test_every_answer_of_the_doors_is_described_and_counted(daemon, client):
    """What README says that the HTTP door answers stands in the document, and in /metrics before it is first given."""
    app = await daemon()
    table = README.partition("## Answers of the HTTP door")[2].partition("\n## ")[0]
    told = {
        status for row in re.findall(r"^\| (\d[^|]*)\|", table, re.MULTILINE) for status in re.findall(r"\d{3}", row)
    }
    async with client.get(f"http://127.0.0.1:{app.admin.port}/metrics") as response:
        counted = set(re.findall(r'bridged_requests_total\{status="(\d+)"\}', await response.text()))
    # 408 is for who is too slow, which Braze isn't.
    for path in (DOOR, COHORTS):
        assert set(document()["paths"][path]["post"]["responses"]) == counted == told | {"408"}, path


async def test_it_is_served(daemon, client):
    """GET /openapi.json is the document; with [admin] token it is asked for."""
    app = await daemon(admin__token="secret")
    url = f"http://127.0.0.1:{app.admin.port}/openapi.json"
    async with client.get(url) as response:
        assert response.status == 401
    async with client.get(url, headers={"Authorization": "Bearer secret"}) as response:
        assert response.status == 200
        assert await response.json() == msgspec.json.decode(msgspec.json.encode(document()))


def test_every_reference_leads_somewhere():
    """And every schema is one."""
    whole = document()
    for name in re.findall(r"#/components/schemas/(\w+)", msgspec.json.encode(whole).decode()):
        assert name in whole["components"]["schemas"]
    for schema in whole["components"]["schemas"].values():
        jsonschema_rs.meta.validate(schema | {"$schema": "https://json-schema.org/draft/2020-12/schema"})


@pytest.fixture(scope="module")
def real():
    """A daemon as a process of its own, with some dead letters, and a cohort that no Braze takes."""
    with folder() as at, Sink(at, check=False) as sink:
        sink.ready()
        with Daemon(at, sink.port, more=IMPORTING) as running:
            running.ready()
            post(running.http_port, msgspec.json.encode(session("members", ["ada", "bo"])[0]), COHORTS)
            poison = [currents(seed=seed) | {"time": -seed} for seed in range(1, 20)] + ["text", 17, {}]
            post(running.http_port, msgspec.json.encode({"events": [*poison, currents()]}))
            yield running
            print(f"{TRIED.total():,} requests to {len(TRIED)} operations")
            # Whatever was asked of it, it is well.
            assert get(running.admin_port, "/readyz")
            assert running.process.poll() is None
            running.stop()


def post(port, body, path=DOOR):
    """One request to the door."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("POST", path, body)
    assert connection.getresponse().status == 200
    connection.close()


@pytest.mark.parametrize(("method", "path"), sorted(described() - ENDLESS))
def test_what_it_says_is_true(real, method, path):
    """Machine-made requests, valid and not: each answer has a status and a body that the document tells of, and no 5xx but 503."""
    base = f"http://127.0.0.1:{real.http_port if path.startswith('/v1/') else real.admin_port}"
    operation = SCHEMA[path][method]
    names = (
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
        "response_headers_conformance",
    )
    checks = CHECKS.get_by_names(list(names))

    def attempt(case):
        TRIED[method, path] += 1
        response = case.call(base_url=base, timeout=20)
        assert response.status_code < 500 or response.status_code == 503
        case.validate_response(response, checks=checks)

    for mode in schemathesis.GenerationMode:
        once = settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        try:
            once(given(case=operation.as_strategy(generation_mode=mode))(attempt))()
        except Unsatisfiable:
            # Where nothing is asked, or any text in the path, nothing can be asked wrongly.
            assert mode is schemathesis.GenerationMode.NEGATIVE
            asked = document()["paths"][path][method.lower()]
            assert "requestBody" not in asked
            assert all(one["in"] == "path" and one["schema"]["type"] == "string" for one in asked.get("parameters", ()))
