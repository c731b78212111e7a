"""A request's head that comes again. Pure.

A client's requests differ by their bodies: the same head again, but for its Content-Length, means what it meant the last
time, and needs no parser.
"""

import hmac
from typing import NamedTuple, Self

_NAME = b"\r\ncontent-length:"
_MOST_DIGITS = 9


class KnownHead(NamedTuple):
    """A head that was understood: what is before the digits of its Content-Length, and what is behind them."""

    before: bytes
    after: bytes

    @classmethod
    def of(cls, head: bytes) -> Self | None:
        """A whole head. None: it doesn't say how long its body is."""
        at = head.lower().find(_NAME)
        if at < 0:
            return None
        at += len(_NAME)
        to = head.find(b"\r\n", at)
        length = head[at:to]
        return cls(head[: to - len(length.lstrip())], head[to:])

    def framed(self, data: bytes) -> tuple[int, int] | None:
        """Where the body begins in `data`, and where it ends there or beyond it. None: it doesn't begin with this head.

        Heads hold a credential: they are compared in constant time.
        """
        digits_at = len(self.before)
        digits_to = data.find(b"\r", digits_at, digits_at + _MOST_DIGITS)
        body_at = digits_to + len(self.after)
        if (
            digits_to < 0
            or not hmac.compare_digest(data[:digits_at], self.before)
            or not hmac.compare_digest(data[digits_to:body_at], self.after)
            or not (digits := data[digits_at:digits_to]).isdigit()
        ):
            return None
        return body_at, body_at + int(digits)
