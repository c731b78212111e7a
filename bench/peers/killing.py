"""What SIGKILL under load loses: a load that remembers what it got rid of, and what of it came out in the end."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec

from bench import data
from bench.peers.catalog import Door
from bench.peers.subject import Subject, kill

_LINES = 200
_LAST_WORDS_S = 5.0
# So many events have arrived, and are acked where there are acks, before a peer dies: it is at work by then.
_ENOUGH = 5_000
_ENOUGH_S = 20.0
ACKED: Final = ("stream", "http")


class Ledger:
    """Events, by their place in the data. The kernel has taken what was sent; the subject has promised what is acked."""

    def __init__(self) -> None:
        self.sent: set[int] = set()
        self.acked: set[int] = set()


async def load_until_killed(
    subject: Subject,
    door: Door,
    lines: Sequence[bytes],
    arrived: Callable[[], int],
    *,
    connections: int,
    per_request: int,
    seconds: float,
) -> Ledger:
    """Sends events, each once, as fast as they are taken; kills the subject so long after enough have arrived."""
    ledger = Ledger()
    if door == "http":
        starts = iter(range(0, len(lines), per_request))
        clients = [_requests(subject.port, lines, per_request, starts, ledger) for _ in range(connections)]
    else:
        clients = [_stream(subject.port, lines, ledger, acks=door == "stream")]
    tasks = [asyncio.create_task(client) for client in clients]
    enough = min(_ENOUGH, len(lines) // 4)
    until = time.monotonic() + _ENOUGH_S
    while time.monotonic() < until:
        if await asyncio.to_thread(arrived) >= enough and (len(ledger.acked) >= enough or door not in ACKED):
            break
        await asyncio.sleep(0.02)
    await asyncio.sleep(seconds)
    await asyncio.to_thread(kill, subject)
    # What it said before it died is still to be read.
    _, waiting = await asyncio.wait(tasks, timeout=_LAST_WORDS_S)
    for task in waiting:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception) and not isinstance(outcome, OSError | EOFError):
            raise outcome
    return ledger


async def _requests(port: int, lines: Sequence[bytes], per_request: int, starts: Iterator[int], ledger: Ledger) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer):
        for start in starts:
            events = range(start, min(start + per_request, len(lines)))
            writer.write(data.http_request(lines[start : events.stop]))
            await writer.drain()
            ledger.sent.update(events)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            _, _, length = head.partition(b"content-length:")
            await reader.readexactly(int(length.partition(b"\r\n")[0]) if length else 0)
            if b" 200 " in head[:13]:
                ledger.acked.update(events)


async def _stream(port: int, lines: Sequence[bytes], ledger: Ledger, *, acks: bool) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    # `sent` is what the kernel took: nothing waits in this process.
    writer.transport.set_write_buffer_limits(0)

    async def read_acks() -> None:
        while line := await reader.readline():
            if line.endswith(b"\n"):
                ledger.acked.update(range(len(ledger.acked), msgspec.json.decode(line)["acked"]))

    reading = asyncio.create_task(read_acks())
    try:
        if acks:
            writer.write(b'{"acks":true}\n')
        for start in range(0, len(lines), _LINES):
            chunk = lines[start : start + _LINES]
            writer.write(b"".join(chunk))
            await writer.drain()
            ledger.sent.update(range(start, start + len(chunk)))
        await reading
    except OSError:
        # The acks that came before the end count as well.
        with contextlib.suppress(OSError):
            await reading
    finally:
        reading.cancel()
        writer.close()
