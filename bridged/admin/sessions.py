"""Who is logged in to the page, and who guesses: random keys and their ends. Pure: `now` is monotonic seconds."""

import hashlib
import ipaddress
import secrets
from typing import Final

from msgspec import Struct

LIFE_S: Final = 12 * 3600.0
MAX_SESSIONS: Final = 64
# Wrong tokens that an address may send in a row, and how soon it may send one more.
GUESSES: Final = 10
GUESS_EVERY_S: Final = 10.0
MAX_ADDRESSES: Final = 1000


class Session(Struct, eq=False):
    """One login. `csrf` is what its changes have to bring along, in a header."""

    csrf: str
    expires_at: float
    ended: bool = False

    def lasts(self, now: float) -> bool:
        """Whether it is one still."""
        return not self.ended and now < self.expires_at


class Sessions:
    """In memory: a restart ends them all. When there are too many the oldest ends."""

    def __init__(self) -> None:
        # By digest: what is compared with what a stranger sends is nothing that he could guess byte by byte.
        self._by_digest: dict[bytes, Session] = {}

    def begin(self, now: float) -> tuple[str, Session]:
        """A new one, with the key that its cookie holds."""
        self._by_digest = {digest: known for digest, known in self._by_digest.items() if known.lasts(now)}
        while len(self._by_digest) >= MAX_SESSIONS:
            self._by_digest.pop(next(iter(self._by_digest))).ended = True
        key, session = secrets.token_urlsafe(32), Session(secrets.token_urlsafe(32), now + LIFE_S)
        self._by_digest[_digest(key)] = session
        return key, session

    def find(self, key: str, now: float) -> Session | None:
        """The session of a cookie; None: there is none, or it is over."""
        session = self._by_digest.get(_digest(key))
        return session if session is not None and session.lasts(now) else None

    def end(self, key: str) -> None:
        """Logs out."""
        session = self._by_digest.pop(_digest(key), None)
        if session is not None:
            session.ended = True


class Guesses:
    """Wrong tokens, by the address that they came from: a bucket each, so that a guess costs time."""

    def __init__(self) -> None:
        self._spent: dict[str, tuple[float, float]] = {}  # by address: guesses that count still, as of when

    def wait_s(self, address: str, now: float) -> float:
        """0.0: it may try. Else when to come again."""
        spent = self._now(address, now)
        return max(0.0, spent + 1 - GUESSES) * GUESS_EVERY_S

    def wrong(self, address: str, now: float) -> None:
        """Counts one."""
        spent = self._now(address, now)
        self._spent.pop(_network(address), None)
        while len(self._spent) >= MAX_ADDRESSES:
            del self._spent[next(iter(self._spent))]
        self._spent[_network(address)] = (spent + 1, now)

    def _now(self, address: str, now: float) -> float:
        spent, at = self._spent.get(_network(address), (0.0, now))
        return max(0.0, spent - (now - at) / GUESS_EVERY_S)


def _network(address: str) -> str:
    """What one guesser has: an IPv4 address, or a /64 of IPv6."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if parsed.version == 4:
        return address
    return str(ipaddress.ip_network((parsed, 64), strict=False))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
