"""What only TCP knows: whether a client's machine is still there, and an end that isn't orderly."""

import asyncio
import socket
import struct
from typing import Final

# A client's machine that is gone is noticed after two minutes.
_KEEPALIVE: Final = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4}


def _socket(transport: asyncio.BaseTransport) -> socket.socket | None:
    """The transport's socket, unless it is a Unix one."""
    sock: socket.socket | None = transport.get_extra_info("socket")
    return sock if sock is not None and sock.family != socket.AF_UNIX else None


def keep_alive(transport: asyncio.BaseTransport) -> None:
    """Has the kernel ask now and then whether the other side is there."""
    if (sock := _socket(transport)) is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def end_with(transport: asyncio.BaseTransport, *, reset: bool) -> None:
    """How it ends, also if the process dies: by a reset, or as if all were well. (Unix sockets know no reset.)"""
    if (sock := _socket(transport)) is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", reset, 0))


def reset(transport: asyncio.Transport) -> None:
    """Ends it at once, and not as if all were well."""
    end_with(transport, reset=True)
    transport.abort()


def file_number(transport: asyncio.BaseTransport) -> int:
    """Its file descriptor; -1 for any other socket."""
    sock = _socket(transport)
    return -1 if sock is None else sock.fileno()
