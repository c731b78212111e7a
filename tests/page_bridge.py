"""A bridge to look at in a browser: `bridged run` and `bridged emulator` as processes, with a folder and ports of their own."""

import base64
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from conftest import SLOW, free_port

PATIENCE_S = 30 * SLOW

TOKEN = "0123456789abcdef0123456789abcdef"
ACCOUNT = "bridged.1a2b3c.mp-service-account"
SECRET = "the-secret-of-the-service-account"
PROJECT = "1234567"


def until(condition: Callable[[], Any], what: str) -> Any:
    """Waits for a condition, and gives what it gave; fails with its name."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:g} s in vain for {what}"
        time.sleep(0.05)
    return found


class Bridge:
    """The two processes, and the senders' and the operator's way to them. Ends what it has started."""

    def __init__(
        self,
        folder: Path,
        *,
        connected: bool = True,
        admin_token: str = "",
        cohort_points: int | None = None,
        europe: str = "",
        export: bool = True,
    ) -> None:
        """With `cohort_points`, cohorts are imported too, into an emulated Braze, and so many data points a day are paid for.

        Without `export` that is all that there is.

        With `europe`, no address is configured: the regions are our emulator and, for the EU, that address.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.admin_token = folder, admin_token
        self.braze = f"127.0.0.1:{free_port()}" if cohort_points is not None else ""
        self.mixpanel = f"http://127.0.0.1:{free_port()}"
        self.http = f"http://127.0.0.1:{free_port()}"
        self.admin = f"http://127.0.0.1:{free_port()}"
        self._regions = {"us": self.mixpanel, "in": self.mixpanel, "eu": europe} if europe else {}
        credential = (
            f'token = "{TOKEN}"\nservice_account = "{ACCOUNT}"\nservice_secret = "{SECRET}"\nproject_id = "{PROJECT}"'
        )
        cohorts = f"""
[cohorts]
enabled = true
username = "mixpanel"
password = "{SECRET}"
path = "{folder}/cohorts.db"
max_data_points_per_day = {cohort_points}
[braze]
url = "http://{self.braze}"
rest_key = "{SECRET}"
"""
        (folder / "config.toml").write_text(f"""
[sources.http]
listen = "{self.http[7:]}"
[sources.stream]
listen = []
[mixpanel]
url = "{"" if europe else self.mixpanel}"
export = {str(export).lower()}
{credential if connected else ""}
[spool]
path = "{folder}/spool.db"
[retention]
archive_path = "{folder}/archive"
[delivery]
flush_interval = "100ms"
probe_interval = "500ms"
grace = "1s"
[admin]
listen = "{self.admin[7:]}"
{f'token = "{admin_token}"' if admin_token else ""}
{cohorts if self.braze else ""}
""")
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self._start_emulator()
        self.start()
        until(lambda: answers(f"{self.mixpanel}/healthz"), "the emulator")
        return self

    def __exit__(self, *_exc: object) -> None:
        for name in list(self._children):
            self.end(name)

    def _start_emulator(self, *blocked: str) -> None:
        account = ("--token", TOKEN, "--service-account", f"{ACCOUNT}:{SECRET}", "--project-id", PROJECT)
        braze = ("--braze-listen", self.braze, "--braze-rest-key", SECRET) if self.braze else ()
        refused = [part for user in blocked for part in ("--braze-blocked", user)]
        self._start("emulator", "emulator", "--listen", self.mixpanel[7:], *account, *braze, *refused)

    def start(self) -> None:
        """Starts the daemon; returns when its doors are open."""
        self._start("daemon", "run", "--config", str(self.folder / "config.toml"))
        until(lambda: answers(f"{self.admin}/healthz") and answers(f"{self.http}/v1/currents"), "the daemon")

    def _start(self, name: str, *arguments: str) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
        program = ["-m", "bridged"]
        if self._regions and name == "daemon":
            elsewhere = f"from bridged.mixpanel.requests import HOSTS; HOSTS.update({self._regions})"
            program = ["-c", f"{elsewhere}\nimport runpy; runpy.run_module('bridged', run_name='__main__')"]
        with (self.folder / f"{name}.log").open("ab") as log:
            self._children[name] = subprocess.Popen(
                [sys.executable, *program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=environment,
            )

    def end(self, name: str = "daemon", number: int = signal.SIGTERM) -> None:
        """Ends one of the two."""
        child = self._children.pop(name)
        child.send_signal(number)
        try:
            child.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            raise

    # -- the sides ----------------------------------------------------------------------------------------------------

    def post(self, events: list[Any], bearer: str = "") -> int:
        """What Braze does; gives the status of the answer."""
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        status, _ = call("POST", f"{self.http}/v1/currents", {"events": events}, headers)
        return status

    def sync(self, cohort: str, name: str, members: list[str], session: str = "session", password: str = SECRET) -> int:
        """What Mixpanel does with a cohort; gives the status of the answer."""
        parameters = {
            "mixpanel_project_id": "117",
            "mixpanel_cohort_id": cohort,
            "mixpanel_cohort_name": name,
            "mixpanel_session_id": session,
            "page_info": {"total_pages": 1, "page_count": 1},
            "members": [{"mixpanel_distinct_id": member} for member in members],
        }
        login = base64.b64encode(f"mixpanel:{password}".encode()).decode()
        page = {"action": "members", "parameters": parameters}
        return call("POST", f"{self.http}/v1/cohorts/mixpanel", page, {"Authorization": f"Basic {login}"})[0]

    def ask(self, path: str) -> Any:
        """The admin API."""
        headers = {"Authorization": f"Bearer {self.admin_token}"} if self.admin_token else {}
        status, body = call("GET", self.admin + path, None, headers)
        assert status == 200, body
        return body

    def arrived(self) -> list[dict[str, Any]]:
        """The events that Mixpanel shows."""
        connection = http.client.HTTPConnection(self.mixpanel[7:], timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request("GET", "/emulator/events")
            return [json.loads(line) for line in connection.getresponse().read().splitlines()]

    def mixpanel_says(self, faults: list[dict[str, Any]]) -> None:
        """The emulator's script of faults."""
        assert call("POST", f"{self.mixpanel}/emulator/faults", faults)[0] == 200

    def mixpanel_accepts(self, **credentials: str) -> None:
        """Which credential is right from now on."""
        assert call("POST", f"{self.mixpanel}/emulator/credentials", credentials)[0] == 200

    def braze_refuses(self, *users: str) -> None:
        """Begins both emulators anew; Braze's refuses these users, and no others."""
        self.end("emulator")
        self._start_emulator(*users)
        until(lambda: answers(f"http://{self.braze}/healthz"), "the emulator")

    def braze_accepts(self, **keys: str) -> None:
        """Which key is Braze's from now on."""
        assert call("POST", f"http://{self.braze}/emulator/credentials", keys)[0] == 200

    def events(self) -> dict[str, int]:
        """The books."""
        return self.ask("/api/status")["events"]


def answers(url: str) -> bool:
    """Whether somebody speaks HTTP there."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        return bool(call("GET", url, None)[0])
    return False


def call(method: str, url: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """A request of JSON; the answer's status and body."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        payload = None if body is None else json.dumps(body)
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        connection.request(method, target, payload, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        text = response.read()
    with contextlib.suppress(ValueError):
        return response.status, json.loads(text)
    return response.status, text


__all__ = ["Bridge", "answers", "call", "until"]
