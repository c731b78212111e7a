"""Answers that go wrong on the wire: resets, silence, half an answer, a trickle."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from typing import Final

from aiohttp import web
from msgspec import UNSET

from bridged.emulator import answers
from bridged.emulator.answers import Answer, phrase
from bridged.emulator.faults import Fault

_LINGER_ZERO: Final = struct.pack("ii", 1, 0)  # a socket closed with this says reset instead of goodbye
_POLL_S: Final = 0.05  # how often a silent connection looks whether the client has gone


async def fail(
    request: web.Request,
    fault: Fault,
    closing: asyncio.Event,
    carry_out: Callable[[], Answer],
    usual: Callable[[int], Answer],
    count: Callable[[str], None],
    respond: Callable[[Answer, dict[str, str]], web.Response],
) -> web.StreamResponse:
    """Let a fault happen. `usual` is what the service says with a status, `count` counts answers and their absence."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(closing.wait(), fault.delay_s)
    answer = carry_out() if fault.stores else answers.page(200)
    if fault.action in {"reset", "reset_after_store"}:
        count("reset")
        return reset(request)
    if fault.action in {"hang", "store_then_hang"}:
        count("hang")
        return await hang(request, closing)
    if fault.status is not None or fault.action == "store_then_status":
        body = None if fault.body is UNSET else fault.body
        answer = answers.scripted(fault.status or 500, body, fault.content_type, usual)
    if fault.action == "truncate":
        count("truncated")
        return truncate(request, answer)
    if fault.action == "slow":
        count(str(answer.status))
        return await trickle(request, answer, fault.trickle_s, closing)
    return respond(answer, fault.headers)


def reset(request: web.Request) -> web.Response:
    """Reset the connection."""
    transport = request.transport
    if transport is not None:
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        transport.abort()
    return web.Response()  # goes nowhere: the server sees that the connection is gone


async def hang(request: web.Request, closing: asyncio.Event) -> web.Response:
    """Say nothing until the client goes away or the emulator closes."""
    while request.transport is not None and not request.transport.is_closing() and not closing.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(closing.wait(), _POLL_S)
    return reset(request)


def truncate(request: web.Request, answer: Answer) -> web.Response:
    """Promise the whole answer, send half of its body and close."""
    transport = request.transport
    if transport is not None:
        head = (
            f"HTTP/1.1 {answer.status} {phrase(answer.status)}\r\nContent-Type: {answer.content_type}\r\n"
            f"Content-Length: {len(answer.body)}\r\n\r\n"
        )
        transport.write(head.encode() + answer.body[: len(answer.body) // 2])
        transport.close()
    return web.Response()


async def trickle(request: web.Request, answer: Answer, gap_s: float, closing: asyncio.Event) -> web.StreamResponse:
    """Send the answer byte by byte."""
    response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
    response.content_length = len(answer.body)
    try:
        await response.prepare(request)
        for index in range(len(answer.body)):
            await response.write(answer.body[index : index + 1])
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(closing.wait(), gap_s)
            if closing.is_set():
                return reset(request)
        await response.write_eof()
    except ConnectionError:
        pass  # the client has had enough
    return response
