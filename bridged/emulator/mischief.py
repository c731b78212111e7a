"""Answers that go wrong on the wire: resets, silence, half an answer, a trickle."""

import asyncio
import contextlib
import socket
import struct
from typing import Final

from aiohttp import web

from bridged.emulator.answers import Answer, phrase

_LINGER_ZERO: Final = struct.pack("ii", 1, 0)  # a socket closed with this says reset instead of goodbye
_POLL_S: Final = 0.05  # how often a silent connection looks whether the client has gone


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
