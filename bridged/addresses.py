"""Addresses as the configuration writes them: what their parts are, who reaches them, and what a name stands for here."""

import asyncio
import errno
import ipaddress
import itertools
import os
import socket
from collections.abc import Iterator
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


def collisions(*addresses: str) -> Iterator[str]:
    """What no two listeners can have, in words: host:port, with or without tcp:, and unix:path. Port 0 is a free one each time.

    Of names only localhost's addresses are known without asking.
    """
    wanted = [address.removeprefix("tcp:") for address in addresses if address]
    for one, other in dict.fromkeys(pair for pair in itertools.combinations(wanted, 2) if _collide(*pair)):
        yield f"{one} is the address" if one == other else f"{one} and {other} are one address"


def _collide(one: str, other: str) -> bool:
    if one.startswith("unix:") and other.startswith("unix:"):
        return os.path.normpath(one[5:]) == os.path.normpath(other[5:])
    try:
        (host, port), (another, same_port) = split_address(one), split_address(other)
    except ValueError:
        return False
    return port == same_port != 0 and any(_both(here, there) for here in _places(host) for there in _places(another))


def _places(host: str) -> list[str]:
    return ["127.0.0.1", "::1"] if host == "localhost" else [host]


def _both(host: str, another: str) -> bool:
    """Whether who connects to one of two addresses would be at the other, too."""
    try:
        here, there = ipaddress.ip_address(host), ipaddress.ip_address(another)
    except ValueError:
        return host == another
    return here == there or (here.version == there.version and (here.is_unspecified or there.is_unspecified))


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
