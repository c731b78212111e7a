"""Addresses as the configuration writes them: what their parts are, who reaches them, and what a name stands for here."""

import asyncio
import errno
import ipaddress
import socket
from typing import Any, Final

_NOT_HERE: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` as a pair. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or any(map(str.isspace, host)) or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"expected host:port, got {address!r}")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def of_this_machine(host: str) -> list[str]:
    """What to listen at: of a name's addresses those that this machine has. `localhost` is ::1, too, where IPv6 is off.

    Without any, or for a name that nobody knows, the name itself: whoever listens at it says what is wrong.
    """
    try:
        found = await asyncio.to_thread(socket.getaddrinfo, host, 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return [host]
    return list(dict.fromkeys(str(at[0]) for family, _, _, _, at in found if _is_here(family, at))) or [host]


def _is_here(family: int, at: Any) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(at)
    except OSError as error:
        return error.errno not in _NOT_HERE
    return True
