"""`$insert_id`, by which Mixpanel recognises the repetition of an event: Braze's id where it may be one, else a hash."""

import hashlib
from typing import Final

import msgspec

from bridged.mixpanel.limits import INSERT_ID, REFUSED_IDS

_BYTES: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-"
_NONE: Final = REFUSED_IDS | {""}
_NIL_UUID: Final = "00000000-0000-0000-0000-000000000000"


def are_plain(ids: list[str]) -> bool:
    """Whether all ids are surely good as they are, as Braze's UUIDs are: three operations in C for a whole batch."""
    joined = "".join(ids)
    return (
        set(map(len, ids)) == {36}
        # Of what Mixpanel refuses as an id only this one is as long as a UUID.
        and _NIL_UUID not in joined
        and not joined.encode("utf-8", "surrogatepass").translate(None, _BYTES)
    )


def is_plain(id_: str) -> bool:
    """Whether an id is good as it is."""
    return INSERT_ID.fullmatch(id_) is not None and id_.lower() not in REFUSED_IDS


def made(id_: str, original: bytes) -> str:
    """One for an event whose id isn't good: the same for the same event, or Mixpanel could not recognise its repetition.

    A placeholder is no id: as one it would make all events of a user and a day that have it repetitions of the first.
    """
    own = b"" if id_.strip().lower() in _NONE else id_.encode()
    return hashlib.sha256(own or _minified(original)).hexdigest()[:36]


def _minified(original: bytes) -> bytes:
    """An event without the blanks between its members: each door, and each tool before it, has its own."""
    try:
        return msgspec.json.format(original, indent=-1)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return original
