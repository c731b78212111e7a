"""Compressed bodies, expanded piece by piece: what a bomb costs is bounded before it goes off."""

from collections.abc import Iterator
from typing import Final

from isal import isal_zlib

from bridged.errors import BadRequest, TooLarge

WINDOW_BITS: Final = {"gzip": 31, "x-gzip": 31, "deflate": 15}

# Events shrink to a tenth or, when they are all alike, to a fiftieth. What is small anyway may shrink as it likes.
_MAX_RATIO: Final = 100
_FREE_BYTES: Final = 2**20
# A piece takes some 0.2 ms: between two of them others get their turn.
PIECE_BYTES: Final = 2**18
_SLICE_BYTES: Final = 2**16
# What may stand behind the last member: tapes and blocks are filled up with zeros, and whoever pipes may add a newline.
_PADDING: Final = b"\0\r\n"
# Tools that compress in parallel make a member of each 64 KiB or more. Each costs a decompressor of its own.
_MAX_MEMBERS: Final = 1000


def expanded(body: bytes, window_bits: int, limit: int) -> Iterator[bytes]:
    """One or more compressed members, in pieces of at most 256 KiB.

    Raises BadRequest for damaged ones, TooLarge for more than `limit` bytes, for more than a hundredfold of `body` and for
    too many members.
    """
    most = min(limit, max(_FREE_BYTES, _MAX_RATIO * len(body)))
    if window_bits == WINDOW_BITS["deflate"] and not _is_wrapped(body):
        window_bits = -window_bits
    size, members = 0, 0
    member = None
    try:
        for at in range(0, len(body), _SLICE_BYTES):
            rest = body[at : at + _SLICE_BYTES]
            while rest:
                if member is None:
                    if members and not (rest := rest.lstrip(_PADDING)):
                        break
                    members += 1
                    if members > _MAX_MEMBERS:
                        raise TooLarge(f"the compressed body has more than {_MAX_MEMBERS} members", "split it")
                    member = isal_zlib.decompressobj(window_bits)
                piece = member.decompress(rest, min(PIECE_BYTES, most + 1 - size))
                size += len(piece)
                if size > most:
                    raise TooLarge(
                        f"the body is larger than {limit:d} bytes"
                        if most == limit
                        else f"the body expands to more than {_MAX_RATIO} times its size"
                    )
                yield piece
                rest = member.unused_data if member.eof else member.unconsumed_tail
                if member.eof:
                    member = None
        while member is not None and not member.eof:
            # What the decompressor still holds of its last input.
            piece = member.decompress(b"", min(PIECE_BYTES, most + 1 - size))
            size += len(piece)
            if size > most:
                raise TooLarge(f"the body is larger than {most:d} bytes")
            if not piece:
                if not member.eof:
                    raise BadRequest("the compressed body is cut off")
                break
            yield piece
    except isal_zlib.IsalError as error:  # type: ignore[misc]  # a class, which its stub calls an instance
        raise BadRequest(f"the compressed body is damaged: {error}") from error


def _is_wrapped(body: bytes) -> bool:
    """Whether it begins as zlib does. By the letter of HTTP `deflate` is that; some clients send the bare stream."""
    return body[0] & 15 == 8 and int.from_bytes(body[:2]) % 31 == 0
