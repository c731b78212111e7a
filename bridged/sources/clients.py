"""How many connections each client has, and what is refused: one alone must not take every place at a door.

A client is an IPv4 address or an IPv6 network of 64 bits. Whoever is on this machine (loopback, a Unix socket) isn't
counted: a proxy in front of the door brings everybody from there.
"""

import asyncio
import ipaddress
import math
from collections import Counter
from typing import Final

import structlog

log = structlog.get_logger()

_NETWORK_BITS: Final = 64
LOCAL: Final = ""
_TELL_S: Final = 60.0


def client_of(peername: object) -> str:
    """Whom a connection comes from, given its transport's `peername`."""
    if not isinstance(peername, tuple) or not peername:
        return LOCAL
    try:
        address = ipaddress.ip_address(str(peername[0]).partition("%")[0])
    except ValueError:
        return LOCAL
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    if address.is_loopback:
        return LOCAL
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((int(address), _NETWORK_BITS), strict=False))
    return str(address)


class Clients:
    """Counts the connections of a door."""

    def __init__(self, most: int) -> None:
        """At most `most` of one client; 0: any number."""
        self.connections: Counter[str] = Counter()
        self._most = most

    def enter(self, transport: asyncio.BaseTransport) -> str | None:
        """Whose connection it is, to be given to `leave` at its end; None: there are too many of his."""
        client = client_of(transport.get_extra_info("peername")) if self._most else LOCAL
        if client != LOCAL:
            if self.connections[client] >= self._most:
                return None
            self.connections[client] += 1
        return client

    def leave(self, client: str | None) -> None:
        """One less."""
        if client:
            self.connections[client] -= 1
            if not self.connections[client]:
                del self.connections[client]


class Refusals:
    """Tells in the log, a line a minute, that a door refuses connections: its clients see a reset, or that it is too much."""

    def __init__(self, door: str) -> None:
        self._door = door
        self._told = 0
        self._told_at = -math.inf

    def look(self, refused: int, now: float) -> None:
        """`refused`: so many so far."""
        if refused > self._told and now - self._told_at >= _TELL_S:
            log.warning(
                "connections_refused",
                door=self._door,
                connections=refused - self._told,
                hint="more than max_connections of this door, or than max_connections_per_client from one address"
                " (a proxy's, if there is one before it)",
            )
            self._told, self._told_at = refused, now


class BadRequests:
    """Tells in the log, a line a minute, that requests are answered 400: nothing of them is kept, so nothing else tells."""

    def __init__(self) -> None:
        self._untold = 0
        self._why = ""  # of the last one; nothing of what came is in it
        self._told_at = -math.inf

    def note(self, why: str) -> None:
        """One more."""
        self._untold, self._why = self._untold + 1, why

    def look(self, now: float) -> None:
        """Says what hasn't been said, if it is time."""
        if self._untold and now - self._told_at >= _TELL_S:
            log.warning(
                "requests_refused",
                status=400,
                requests=self._untold,
                last=self._why,
                hint="an event that is alone in such a request is dropped by Braze; a proxy in between may spoil them",
            )
            self._untold, self._told_at = 0, now
