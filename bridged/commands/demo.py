"""`bridged demo`: a day of Currents events through a real daemon into an emulated Mixpanel, and a reckoning at the end.

At the same time the way back: Mixpanel's cohorts into an emulated Braze. Everything is real but those two: processes, doors,
sockets, files on disk. Both fail a few times on purpose. The exit code is 0 only if Mixpanel holds exactly the events, and
Braze exactly the members, that they should.
"""

import argparse
import asyncio
import contextlib
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
import uvloop
from msgspec import Struct

from bridged.admin.status import Status
from bridged.backlog.dead_letters import Group
from bridged.commands import demo_cohorts
from bridged.commands.demo_children import FAULTS, RATE_LIMIT, Addresses, DemoError, running
from bridged.commands.demo_day import MIN_EVENTS, Day, Identity, make
from bridged.commands.demo_play import Progress, play
from bridged.commands.printing import duration, table
from bridged.currents.table import EVENT_TYPES

EPILOG = """\
examples:
  bridged demo
  bridged demo --events 1000000
  bridged demo --rate-limit       watch it learn a limit
  bridged demo --keep             leaves all running, to be looked at
"""

_KEPT_FOLDER: Final = Path(".demo")
# Without an event more delivered for so long, the demo has failed.
_PATIENCE_S: Final = 90.0
_LOOK_S: Final = 0.25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("--events", type=_count, default=100_000, metavar="N", help="how many (default %(default)s)")
    parser.add_argument("--keep", action="store_true", help=f"leave all running, in ./{_KEPT_FOLDER}; Ctrl-C ends them")
    parser.add_argument(
        "--rate-limit", action="store_true", help="Mixpanel also answers 429 once: takes a minute longer"
    )
    parser.add_argument("--seed", type=int, default=0, help="another day (default %(default)s)")


def main(arguments: argparse.Namespace) -> int:
    """Plays the day. 0: everything is exact; 1: it isn't."""
    stop = _Stop()
    # A terminal that is closed ends it as well, unless it was started not to be (nohup).
    ends = [signal.SIGINT, signal.SIGTERM]
    ends += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
    for number in ends:
        signal.signal(number, stop)
    try:
        # Printed lines are the progress: they must not wait for a full buffer.
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a text file, always
        print(f"Making up {arguments.events:,} Currents events of yesterday, of all {len(EVENT_TYPES)} types ...")
        # No part of the task: it takes long without a turn of the loop, and there is nothing yet to be ended in order.
        day, sync = make(arguments.events, int(time.time()), arguments.seed), demo_cohorts.make(arguments.seed)
        folder = _folder(keep=arguments.keep)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_main(arguments, folder, day, sync, stop))
    finally:
        # Everything is ended: an impatient second Ctrl-C must not change the exit code.
        for number in ends:
            signal.signal(number, signal.SIG_IGN)


def _folder(*, keep: bool) -> Path:
    """Where its files are. Raises DemoError."""
    try:
        return _KEPT_FOLDER.absolute() if keep else Path(tempfile.mkdtemp(prefix="bridged-demo-"))
    except OSError as error:
        hint = "set TMPDIR to a folder of yours"
        raise DemoError(f"there is no place for the demo's files: {error}", hint) from error


class _Stop:
    """A signal handler. The first signal ends the demo; a second must not keep it from ending its children."""

    def __init__(self) -> None:
        self.task: asyncio.Task[Any] | None = None

    def __call__(self, number: int, frame: object) -> None:
        if self.task is None:
            raise KeyboardInterrupt
        if not self.task.done() and not self.task.cancelling():
            self.task.get_loop().call_soon_threadsafe(self.task.cancel)


async def _main(arguments: argparse.Namespace, folder: Path, day: Day, sync: demo_cohorts.Sync, stop: _Stop) -> int:
    stop.task = asyncio.current_task()
    good = ended = False
    try:
        good = await _demo(arguments, folder, day, sync)
    except BrokenPipeError:
        ended = True  # by who reads no more of it
        raise
    except asyncio.CancelledError:
        ended = True
        print("\ndemo: stopped; the daemon and the emulators are ended")
        return 130
    finally:
        if not arguments.keep:
            if good or ended:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                print(f"demo: the logs are in {folder}")
    return 0 if good else 1


async def _demo(arguments: argparse.Namespace, folder: Path, day: Day, sync: demo_cohorts.Sync) -> bool:
    faults = (*FAULTS, RATE_LIMIT) if arguments.rate_limit else FAULTS
    children = running(folder, faults, demo_cohorts.BRAZE_FAULTS, demo_cohorts.BLOCKED)
    async with children as addresses, aiohttp.ClientSession() as session:
        print(f"A daemon ({addresses.admin}), an emulated Mixpanel ({addresses.emulator}) and an emulated Braze")
        print(f"({addresses.braze}) are running.")
        streams = len(addresses.streams)
        print(f"Playing {day.http_events:,} events to the HTTP door, {day.stream_events:,} to {streams} streams;")
        print(f"{len(sync.members)} cohorts, {sync.received:,} members in all pages, to the webhook.\n")
        syncing = asyncio.create_task(demo_cohorts.play(session, sync, addresses), name="cohorts")
        try:
            outcome = await _play(session, day, addresses)
            synced = await syncing
        finally:
            syncing.cancel()
            await asyncio.gather(syncing, return_exceptions=True)
        groups = await _get(session, f"{addresses.admin}/api/dead-letters/groups", list[Group])
        stored = await _stored(session, addresses)
        problems = list(_problems(day, outcome, groups, stored))
        print(_report(day, outcome, groups, stored, problems))
        cohort_problems = list(demo_cohorts.problems(sync, synced))
        print(f"\n{demo_cohorts.report(sync, synced)}\n\n{_verdict_on_cohorts(cohort_problems)}")
        problems += cohort_problems
        if arguments.keep:
            print(_where_next(addresses))
            # Until Ctrl-C: an orderly end, and the exit code is the reckoning's.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            print("\ndemo: ending the daemon and the emulators")
        return not problems


class Outcome(Struct):
    """How it went."""

    status: Status
    progress: Progress
    played_s: float  # until the last ack
    delivered_s: float  # until nothing waited


async def _play(session: aiohttp.ClientSession, day: Day, addresses: Addresses) -> Outcome:
    """Plays and watches until nothing waits any more."""
    progress = Progress()
    started = time.monotonic()
    played_s = 0.0
    player = asyncio.create_task(play(day, addresses, progress), name="players")
    try:
        with _display(day) as show:
            last, last_at = -1, started
            while True:
                ended = player.done()
                if ended:
                    player.result()
                    played_s = played_s or time.monotonic() - started
                status = await _get(session, f"{addresses.admin}/api/status", Status)
                now = time.monotonic()
                show(status, now - started)
                if ended and not status.events["waiting"]:
                    return Outcome(status, progress, played_s, now - started)
                if (moved := status.events["accepted"] + status.events["delivered"]) != last:
                    last, last_at = moved, now
                if now - last_at > _PATIENCE_S:
                    raise DemoError(f"nothing has moved for {_PATIENCE_S:.0f} s: {status.sentence}")
                await _first(player, _LOOK_S if not ended else _LOOK_S / 5)
    finally:
        player.cancel()
        await asyncio.gather(player, return_exceptions=True)


async def _first(player: Awaitable[None], seconds: float) -> None:
    """Returns when the player has ended, or after so many seconds."""
    if isinstance(player, asyncio.Task) and player.done():
        await asyncio.sleep(seconds)
    else:
        await asyncio.wait([asyncio.ensure_future(player)], timeout=seconds)


# -- while it runs ----------------------------------------------------------------------------------------------------

_Show = Callable[[Status, float], None]


@contextlib.contextmanager
def _display(day: Day) -> Iterator[_Show]:
    """A live table on a terminal if rich is there; else a line a second."""
    try:
        from rich.console import Console  # noqa: PLC0415  # not everybody has it
        from rich.live import Live  # noqa: PLC0415
        from rich.progress_bar import ProgressBar  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415
    except ImportError:
        with _lines(day) as show:
            yield show
        return
    console = Console()
    if not console.is_terminal or console.is_dumb_terminal:
        with _lines(day) as show:
            yield show
        return
    rate = _Rate()
    with Live(console=console, refresh_per_second=8, transient=True) as live:

        def show_live(status: Status, elapsed_s: float) -> None:
            per_second = rate.of(status.events["delivered"], elapsed_s)
            grid = Table.grid(padding=(0, 2))
            for kind, most in (("accepted", day.expected.accepted), ("delivered", day.expected.delivered)):
                grid.add_row(
                    kind, ProgressBar(total=most, completed=status.events[kind], width=50), f"{status.events[kind]:,}"
                )
            grid.add_row("waiting", "", f"{status.events['waiting']:,}")
            grid.add_row("dead letters", "", f"{status.events['dead_lettered']:,}")
            grid.add_row("skipped", "", f"{status.events['skipped']:,}")
            grid.add_row("rate", "", f"{per_second:,.0f} events/s")
            grid.add_row("state", status.state, "")
            live.update(grid)

        yield show_live


@contextlib.contextmanager
def _lines(day: Day) -> Iterator[_Show]:
    shown = -1
    rate = _Rate()

    def show(status: Status, elapsed_s: float) -> None:
        nonlocal shown
        if int(elapsed_s) > shown:
            shown = int(elapsed_s)
            events = status.events
            print(
                f"{elapsed_s:5.1f} s  accepted {events['accepted']:>9,} of {day.expected.accepted:,}"
                f"  delivered {events['delivered']:>9,}  waiting {events['waiting']:>9,}"
                f"  dead {events['dead_lettered']:>5,}  skipped {events['skipped']:>5,}"
                f"  {rate.of(events['delivered'], elapsed_s):>7,.0f}/s  {status.state}"
            )

    yield show
    print()


class _Rate:
    """Deliveries a second since a moment ago."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, int]] = [(0.0, 0)]

    def of(self, count: int, elapsed_s: float) -> float:
        self._samples = [sample for sample in self._samples if elapsed_s - sample[0] < 2.0] or self._samples[-1:]
        at, before = self._samples[0]
        self._samples.append((elapsed_s, count))
        return (count - before) / max(elapsed_s - at, 0.01)


# -- the reckoning ----------------------------------------------------------------------------------------------------


class _Properties(Struct):
    time: int
    distinct_id: str
    insert_id: str = msgspec.field(name="$insert_id")


class _Stored(Struct):
    properties: _Properties


async def _stored(session: aiohttp.ClientSession, addresses: Addresses) -> Counter[Identity]:
    """What the emulated Mixpanel holds."""
    decode = msgspec.json.Decoder(_Stored).decode
    found: Counter[Identity] = Counter()
    tail = b""
    async with session.get(
        f"{addresses.emulator}/emulator/events", timeout=aiohttp.ClientTimeout(total=None)
    ) as answer:
        async for chunk in answer.content.iter_chunked(1 << 20):
            *lines, tail = (tail + chunk).split(b"\n")
            for line in lines:
                event = decode(line).properties
                found[Identity(event.insert_id, event.distinct_id, event.time)] += 1
    return found


async def _get(session: aiohttp.ClientSession, url: str, type_: Any) -> Any:
    try:
        async with session.get(url) as answer:
            return msgspec.json.decode(await answer.read(), type=type_)
    except (aiohttp.ClientError, msgspec.DecodeError) as error:
        raise DemoError(f"the daemon's API doesn't answer as it should: {error}") from error


def _problems(day: Day, outcome: Outcome, groups: list[Group], stored: Counter[Identity]) -> Iterator[str]:
    """Everything that isn't exactly as expected."""
    expected, events = day.expected, outcome.status.events
    if outcome.progress.http_acked != len(day.bodies):
        yield f"the HTTP door acked {outcome.progress.http_acked:,} of {len(day.bodies):,} requests"
    if outcome.progress.stream_acked != day.stream_events:
        yield f"the stream door acked {outcome.progress.stream_acked:,} of {day.stream_events:,} lines"
    wanted = {
        "accepted": expected.accepted,
        "delivered": expected.delivered,
        "dead_lettered": expected.dead_letters.total(),
        "expired": 0,
        "skipped": expected.skipped,
        "waiting": 0,
    }
    for kind, count in wanted.items():
        if events[kind] != count:
            yield f"{kind}: {events[kind]:,}, and it should be {count:,}"
    if outcome.status.imbalance:
        yield f"the books don't balance: {outcome.status.imbalance:+,}"
    reasons = _by_reason(day, groups)
    for reason in reasons | expected.dead_letters:
        if reasons[reason] != expected.dead_letters[reason]:
            yield f"dead letters {reason!r}: {reasons[reason]:,}, and it should be {expected.dead_letters[reason]:,}"
    if missing := len(expected.stored - stored.keys()):
        yield f"{missing:,} events are missing at Mixpanel"
    if foreign := len(stored.keys() - expected.stored):
        yield f"{foreign:,} events at Mixpanel were never played"
    if twice := stored.total() - len(stored):
        yield f"{twice:,} events are at Mixpanel more than once"


def _by_reason(day: Day, groups: list[Group]) -> Counter[str]:
    """Dead letters by what was expected of their reasons; others by the whole reason."""
    found: Counter[str] = Counter()
    for group in groups:
        known = (begin for begin in day.expected.dead_letters if group.reason.startswith(begin))
        found[next(known, group.reason)] += group.count
    return found


def _report(day: Day, outcome: Outcome, groups: list[Group], stored: Counter[Identity], problems: list[str]) -> str:
    events, expected = outcome.status.events, day.expected
    examples: dict[str, str] = {}
    for group in groups:
        begin = next((begin for begin in expected.dead_letters if group.reason.startswith(begin)), group.reason)
        examples.setdefault(begin, group.reason)
    rows: list[tuple[object, ...]] = [
        ("", "events", "expected", ""),
        ("accepted", events["accepted"], expected.accepted, "acked by a door: on disk"),
        ("delivered", events["delivered"], expected.delivered, "Mixpanel said that it has them"),
        ("dead-lettered", events["dead_lettered"], expected.dead_letters.total(), ""),
    ]
    for reason, count in _by_reason(day, groups).most_common():
        rows.append(("", count, expected.dead_letters[reason], examples[reason][:70]))
    rows += [
        ("skipped", events["skipped"], expected.skipped, ", ".join(outcome.status.skipped)),
        ("expired", events["expired"], 0, ""),
        ("waiting", events["waiting"], 0, ""),
        ("in Mixpanel", stored.total(), len(expected.stored), f"each once, although {expected.repeats:,} came twice"),
    ]
    verdicts = ", ".join(f"{count} {name}" for name, count in outcome.status.verdicts.items())
    per_second = events["accepted"] / outcome.played_s, events["delivered"] / outcome.delivered_s
    took = f"all acked after {duration(outcome.played_s)}, all delivered after {duration(outcome.delivered_s)}"
    lines = [
        table(rows, right=[1, 2]),
        "",
        f"  {per_second[0]:,.0f} events/s in, {per_second[1]:,.0f} out: {took}",
        f"  Mixpanel's answers: {verdicts}{' (planned)' if 'retry' in outcome.status.verdicts else ''}",
        "",
    ]
    if problems:
        lines += ["NOT EXACT:", *(f"  {problem}" for problem in problems)]
    else:
        balance = "accepted = delivered + dead-lettered + skipped + expired + waiting"
        lines.append(f"The books balance ({balance}), and Mixpanel holds exactly the events that it should.")
    return "\n".join(lines)


def _verdict_on_cohorts(problems: list[str]) -> str:
    if problems:
        return "\n".join(["NOT EXACT:", *(f"  {problem}" for problem in problems)])
    return "Braze holds exactly Mixpanel's membership."


def _where_next(addresses: Addresses) -> str:
    # To be pasted, so quoted.
    config = f"--config {shlex.quote(str(addresses.config))}"
    called = Path(sys.argv[0])
    # `make demo` runs it from a virtual environment that the shell doesn't know of.
    bridged = "bridged" if shutil.which("bridged") or called.name != "bridged" else shlex.quote(str(called))
    return f"""
All are still running; Ctrl-C ends them.
  the daemon's page         {addresses.admin}/
  its metrics               {addresses.admin}/metrics
  its status                {bridged} status {config}
  its dead letters          {bridged} dead-letters list {config}
  more events               {bridged} send-test-events {config}
  the cohorts               {bridged} cohorts list {config}
  what Mixpanel has         {addresses.emulator}/emulator/summary
  what Braze has            {addresses.braze}/emulator/users
  the logs and the spool    {addresses.folder}"""


def _count(text: str) -> int:
    try:
        number = int(text.replace("_", "").replace(",", ""))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if number < MIN_EVENTS:
        raise argparse.ArgumentTypeError(f"at least {MIN_EVENTS:,}, so that there are some of every type")
    return number
