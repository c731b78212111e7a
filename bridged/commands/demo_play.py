"""The demo's players: each brings its share of the day to a door, as a good client would, and counts what was acked."""

import asyncio
import contextlib
from collections.abc import Iterator

import aiohttp
import msgspec
from msgspec import Struct

from bridged.commands.demo_children import Addresses, DemoError
from bridged.commands.demo_day import Day
from bridged.sources.http import PATH

_HTTP_CLIENTS = 4


class Progress(Struct):
    """What the doors said so far."""

    http_acked: int = 0  # requests
    stream_acked: int = 0  # lines
    ended: bool = False


class _Ack(Struct):
    acked: int = 0
    error: str = ""


async def play(day: Day, addresses: Addresses, progress: Progress) -> None:
    """Plays the whole day through both doors at once. Raises DemoError when a door refuses it."""
    bodies = iter(day.bodies)
    shares = [day.writes[at :: len(addresses.streams)] for at in range(len(addresses.streams))]
    headers = {"Authorization": f"Bearer {addresses.bearer_token}", "Content-Type": "application/json"}
    try:
        async with aiohttp.ClientSession(headers=headers) as session, asyncio.TaskGroup() as players:
            for _ in range(_HTTP_CLIENTS):
                players.create_task(_post(session, addresses.http + PATH, bodies, progress))
            for address, share in zip(addresses.streams, shares, strict=True):
                players.create_task(_stream(address, share, progress))
    except ExceptionGroup as group:
        causes = list(_leaves(group))
        if not all(isinstance(cause, DemoError | OSError | aiohttp.ClientError) for cause in causes):
            raise
        # What a door said tells more than a connection that broke.
        cause = next((cause for cause in causes if isinstance(cause, DemoError)), causes[0])
        raise DemoError(f"the daemon doesn't go on: {cause}", f"see {addresses.folder}/daemon.log") from None
    progress.ended = True


def _leaves(group: ExceptionGroup[Exception]) -> Iterator[Exception]:
    for error in group.exceptions:
        if isinstance(error, ExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


async def _post(session: aiohttp.ClientSession, url: str, bodies: Iterator[bytes], progress: Progress) -> None:
    for body in bodies:
        while True:
            async with session.post(url, data=body) as answer:
                said = await answer.text()
            if answer.status == 200:
                break
            if answer.status != 503:
                raise DemoError(f"the HTTP door answered {answer.status}: {said}")
            await asyncio.sleep(1)
        progress.http_acked += 1


async def _stream(address: str, writes: list[bytes], progress: Progress) -> None:
    kind, _, rest = address.partition(":")
    if kind == "unix":
        reader, writer = await asyncio.open_unix_connection(rest)
    else:
        host, _, port = rest.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
    lines = sum(write.count(b"\n") for write in writes)
    try:
        async with asyncio.TaskGroup() as both:
            both.create_task(_read_acks(reader, lines, progress))
            writer.write(b'{"acks":true}\n')
            for write in writes:
                writer.write(write)
                await writer.drain()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _read_acks(reader: asyncio.StreamReader, lines: int, progress: Progress) -> None:
    """Returns when the last line is acked."""
    acked = 0
    while acked < lines:
        ack = msgspec.json.decode(await reader.readline() or b'{"error":"it was closed"}', type=_Ack)
        if ack.error:
            raise DemoError(f"the stream door ended after {acked} of {lines} lines: {ack.error}")
        progress.stream_acked += ack.acked - acked
        acked = ack.acked
