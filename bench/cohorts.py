"""What a cohort costs: a first full sync from Mixpanel's webhook to Braze, a second one, and SIGKILL in every phase.

    python -m bench cohorts --members 1000000
    python -m bench cohorts --members 50000 --kills 9

Four processes: the loader (this one), the daemon with cohorts only, and the emulator, which plays Braze. Ids are random
UUIDs in random order, the worst for an index. The loader has a few connections at once, more than Mixpanel is known to use.
"""

import argparse
import asyncio
import contextlib
import random
import signal
import socket
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec

from bench import report
from bench.processes import BenchError, Child, ended_by_signals, folder, free_ports

_ATTRIBUTE: Final = "mixpanel_cohorts"
_NAME: Final = "Power users"
_PATIENCE_S: Final = 1800.0
_IN_FLIGHT: Final = 8 * 75  # users: the daemon's default of 8 requests


class Braze(Child):
    """`bridged emulator` as Braze, without a rate limit."""

    def __init__(self, where: Path) -> None:
        mixpanel, self.port = free_ports(2)
        arguments = ["--listen", f"127.0.0.1:{mixpanel}", "--braze-listen", f"127.0.0.1:{self.port}"]
        super().__init__("emulator", ["-m", "bridged", "emulator", *arguments, "--braze-requests", str(10**9)], where)
        self.hear(30)


class Importer(Child):
    """`bridged run`, with cohorts only."""

    def __init__(self, where: Path, braze: int, number: int = 0) -> None:
        self.http_port, self.admin_port = free_ports(2)
        config = where / "config.toml"
        config.write_text(
            f"""
[sources.http]
listen = "127.0.0.1:{self.http_port}"
[sources.stream]
listen = []
[mixpanel]
export = false
[cohorts]
enabled = true
password = "webhook-password"
[braze]
url = "http://127.0.0.1:{braze}"
rest_key = "rest-key-of-the-benchmark"
[admin]
listen = "127.0.0.1:{self.admin_port}"
[log]
format = "json"
level = "warning"
""",
            encoding="utf-8",
        )
        super().__init__(f"daemon-{number}", ["-m", "bridged", "run", "--config", str(config)], where)

    async def ready(self, session: aiohttp.ClientSession) -> None:
        """Returns when it is."""
        until = time.monotonic() + 60
        while True:
            try:
                await self.state(session)
                # The doors open after the admin side.
                socket.create_connection(("127.0.0.1", self.http_port), 1).close()
            except (aiohttp.ClientError, OSError):
                if self.process.poll() is not None or time.monotonic() > until:
                    raise BenchError(f"the daemon isn't ready:\n{self.last_words()}") from None
                await asyncio.sleep(0.05)
            else:
                return

    async def state(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        """What /api/cohorts says."""
        async with session.get(f"http://127.0.0.1:{self.admin_port}/api/cohorts") as response:
            answer: dict[str, Any] = await response.json()
            return answer


def page(ids: Sequence[str], session_id: str, at: int, total: int, action: str = "members") -> bytes:
    """A page as Mixpanel documents it."""
    members = [
        {
            "email": f"{id_[:8]}@example.com",
            "mixpanel_distinct_id": id_,
            "first_name": "Ada",
            "last_name": "Example",
            "phone_number": "+15550100001",
        }
        for id_ in ids
    ]
    parameters = {
        "mixpanel_project_id": "117",
        "mixpanel_cohort_name": _NAME,
        "mixpanel_cohort_id": "777",
        "mixpanel_cohort_description": "",
        "mixpanel_session_id": session_id,
        "page_info": {"total_pages": total, "page_count": at},
        "members": members,
    }
    return msgspec.json.encode({"action": action, "parameters": parameters})


def pages(ids: Sequence[str], size: int, session_id: str) -> list[bytes]:
    """A full copy."""
    total = -(-len(ids) // size)
    return [page(ids[at * size : (at + 1) * size], session_id, at + 1, total) for at in range(total)]


async def post(daemon: Importer, bodies: Sequence[bytes], connections: int) -> float:
    """Posts pages over some connections; gives the seconds until the last was answered. Raises if one isn't a success."""
    url = f"http://127.0.0.1:{daemon.http_port}/v1/cohorts/mixpanel"
    waiting = iter(bodies)

    async def one(session: aiohttp.ClientSession) -> None:
        for body in waiting:
            async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
                said = await response.read()
                if response.status != 200:
                    raise BenchError(f"answered {response.status}: {said[:200]!r}")

    auth = aiohttp.BasicAuth("mixpanel", "webhook-password")
    connector = aiohttp.TCPConnector(limit=connections)
    async with aiohttp.ClientSession(auth=auth, connector=connector) as session:
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(connections):
                group.create_task(one(session))
        return time.perf_counter() - started


async def wait_for(daemon: Importer, session: aiohttp.ClientSession, *, sent: bool) -> dict[str, Any]:
    """Returns when everything is merged and swept and, if asked, sent."""
    until = time.monotonic() + _PATIENCE_S
    while time.monotonic() < until:
        if daemon.process.poll() is not None:
            raise BenchError(f"the daemon ended:\n{daemon.last_words()}")
        state = await daemon.state(session)
        figures = state["figures"]
        walking = any(row["state"] in {"sweeping", "renaming", "forgetting", "receiving"} for row in state["cohorts"])
        if not figures["waiting"] and not walking and not (sent and figures["joining"] + figures["leaving"]):
            return state
        await asyncio.sleep(0.1)
    raise BenchError("it didn't end in time")


async def summary(braze: Braze, session: aiohttp.ClientSession) -> dict[str, Any]:
    """What Braze has counted."""
    async with session.get(f"http://127.0.0.1:{braze.port}/emulator/summary") as response:
        answer: dict[str, Any] = await response.json()
        return answer


async def held(braze: Braze, session: aiohttp.ClientSession) -> set[str]:
    """Who is in the cohort, as Braze has it."""
    found = set()
    async with session.get(f"http://127.0.0.1:{braze.port}/emulator/users") as response:
        async for line in response.content:
            user = msgspec.json.decode(line)
            if _NAME in (user["attributes"].get(_ATTRIBUTE) or ()):
                found.add(user["external_id"])
    return found


def _size_mb(where: Path) -> float:
    return sum(each.stat().st_size for each in where.glob("cohorts.db*")) / 1e6


async def full_sync(options: argparse.Namespace, where: Path) -> dict[str, Any]:
    """A first full sync and a second one."""
    dice = random.Random(options.seed)
    ids = [str(uuid.UUID(int=dice.getrandbits(128))) for _ in range(options.members)]
    bodies = pages(ids, options.page, "first")
    figures: dict[str, Any] = {"members": len(ids), "body_mb": sum(map(len, bodies)) / 1e6}
    timeout = aiohttp.ClientTimeout(total=None)
    with Braze(where) as braze, Importer(where, braze.port) as daemon:
        async with aiohttp.ClientSession(timeout=timeout) as session:
            await daemon.ready(session)
            figures["start_rss_mb"] = daemon.memory_mb("VmRSS")
            started = time.perf_counter()
            received_s = await post(daemon, bodies, options.connections)
            figures["received_per_s"] = len(ids) / received_s
            figures["receiving_cpu_us"] = daemon.cpu_s() / len(ids) * 1e6
            figures["received_rss_mb"] = daemon.memory_mb("VmHWM")
            await wait_for(daemon, session, sent=False)
            figures["merged_s"] = time.perf_counter() - started
            figures["merging_cpu_us"] = daemon.cpu_s() / len(ids) * 1e6
            state = await wait_for(daemon, session, sent=True)
            figures["synced_s"] = time.perf_counter() - started
            figures["sending_cpu_us"] = daemon.cpu_s() / len(ids) * 1e6
            figures["commits"] = state["figures"]["commits"]
            del bodies
            points = (await summary(braze, session))["points"]
            figures["points"] = points
            if await held(braze, session) != set(ids):
                raise BenchError("Braze hasn't exactly Mixpanel's membership")
            dice.shuffle(ids)
            again = pages(ids, options.page, "second")
            started = time.perf_counter()
            figures["again_received_per_s"] = len(ids) / await post(daemon, again, options.connections)
            await wait_for(daemon, session, sent=True)
            figures["again_s"] = time.perf_counter() - started
            figures["again_points"] = (await summary(braze, session))["points"] - points
            figures["peak_rss_mb"] = daemon.memory_mb("VmHWM")
            figures["cpu_s"] = daemon.cpu_s()
            figures["file_mb"] = _size_mb(where)
    return figures


async def kills(options: argparse.Namespace, where: Path) -> list[dict[str, Any]]:
    """SIGKILL while it receives, sweeps and sends, in turn; Mixpanel starts again from the top under a new session."""
    dice = random.Random(options.seed)
    everybody = [f"user-{number:08d}" for number in range(options.members * 2)]
    now: list[str] = []
    results = []
    timeout = aiohttp.ClientTimeout(total=None)
    with contextlib.ExitStack() as stack:
        braze = stack.enter_context(Braze(where))
        session = await _entered(aiohttp.ClientSession(timeout=timeout))
        try:
            daemon = stack.enter_context(Importer(where, braze.port))
            await daemon.ready(session)
            for number in range(options.kills):
                phase = ("receive", "sweep", "send")[number % 3]
                before, now = set(now), dice.sample(everybody, options.members)
                spent = (await summary(braze, session))["points"]
                daemon, state = await _killed(options, stack, (where, braze, daemon), session, phase, now, number, dice)
                await wait_for(daemon, session, sent=True)
                needed = len(before ^ set(now))
                spent = (await summary(braze, session))["points"] - spent
                if await held(braze, session) != set(now):
                    raise BenchError(f"after kill {number} ({phase}) Braze hasn't exactly Mixpanel's membership")
                results.append({"phase": phase, "state": state, "needed": needed, "needless": spent - needed})
                print(
                    f"kill {number + 1}: {phase}, {needed:,} users to write, {spent - needed:,} written twice",
                    flush=True,
                )
                if spent - needed > _IN_FLIGHT:
                    raise BenchError(f"more than one in-flight window ({_IN_FLIGHT}) was written twice")
        finally:
            await session.close()
    return results


async def _entered(session: aiohttp.ClientSession) -> aiohttp.ClientSession:
    return await session.__aenter__()


async def _killed(
    options: argparse.Namespace,
    stack: contextlib.ExitStack,
    processes: tuple[Path, Braze, Importer],
    session: aiohttp.ClientSession,
    phase: str,
    now: list[str],
    number: int,
    dice: random.Random,
) -> tuple[Importer, str]:
    """One full sync with a kill in it; gives the daemon that came after, and what the cohort did when it was killed."""
    where, braze, daemon = processes
    doing = "receiving"
    first = pages(now, options.page, f"session-{number}")
    if phase == "receive":
        posting = asyncio.create_task(post(daemon, first, options.connections))
        # At any moment of the receiving, which takes some tenths of a second.
        await asyncio.sleep(dice.uniform(0.0, 0.5))
    else:
        await post(daemon, first, options.connections)
        posting = None
        while True:
            state = await daemon.state(session)
            (row,) = state["cohorts"]
            doing = "merging" if state["figures"]["waiting"] else row["state"]
            if phase == "sweep" and row["state"] == "sweeping":
                break
            if (
                phase == "send"
                and not state["figures"]["waiting"]
                and row["state"] == "sending"
                and row["progress"] > 0
            ):
                await asyncio.sleep(dice.uniform(0.0, 0.3))
                break
            if row["state"] == "synced" and not state["figures"]["waiting"]:
                break
            await asyncio.sleep(0.002)
    daemon.process.send_signal(signal.SIGKILL)
    daemon.process.wait(30)
    interrupted = False
    if posting is not None:
        interrupted = (await asyncio.gather(posting, return_exceptions=True))[0] is not None
    # What was on its way when the daemon died is carried out; how often, the emulator counts.
    await asyncio.sleep(0.5)
    daemon = stack.enter_context(Importer(where, braze.port, number + 1))
    await daemon.ready(session)
    if posting is not None and interrupted:
        await post(daemon, pages(now, options.page, f"again-{number}"), options.connections)
    return daemon, doing


def main(argv: Sequence[str]) -> int:
    """Runs it, prints, gives the exit code."""
    parser = report.options("cohorts", __doc__, runs=1)
    parser.add_argument("--members", type=int, default=1_000_000, help="default %(default)s")
    parser.add_argument(
        "--page", type=int, default=1000, help="members a page; default %(default)s, as Mixpanel's diffs"
    )
    parser.add_argument("--connections", type=int, default=8, help="default %(default)s")
    parser.add_argument("--kills", type=int, default=0, help="kill it so often instead")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    about = report.machine()
    print(report.heading(about), flush=True)
    with ended_by_signals():
        try:
            if options.kills:
                with folder() as where:
                    results = asyncio.run(kills(options, where))
                report.write(options.json, {"machine": about, "kills": results})
                return 0
            runs = []
            for _ in range(options.runs):
                with folder() as where:
                    runs.append(asyncio.run(full_sync(options, where)))
        except BenchError as error:
            print(error, file=sys.stderr)
            return 1
    names = list(runs[0])
    print(report.table(["figure", "value"], [[name, report.spread([run[name] for run in runs], 1)] for name in names]))
    report.write(options.json, {"machine": about, "runs": runs})
    return 0
