"""The process's memory: what the allocator keeps, and what the collector of garbage looks at."""

import asyncio
import contextlib
import ctypes
import gc
from typing import Final

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
# What a read or a slice of events makes is smaller: giving that back each time would cost a tenth of all (measured).
_LARGE_BYTES: Final = 2**20
_KEPT_FREE_BYTES: Final = 2**23
_TRIM_S: Final = 60.0
# Before all objects are looked at: with 5,000 connections that takes 250 ms, and by default (10) they pay it every 10 s when
# a fifth of them changes in that time (measured).
_YOUNG_COLLECTIONS: Final = 100


def give_back_large_blocks() -> None:
    """Large blocks go back to the system when they are freed, for good: by default glibc soon keeps them all.

    A thousand clients with long bodies and lines leave a heap of holes else, twice as large as what is in use (measured).
    """
    with contextlib.suppress(AttributeError, OSError):  # another libc, which has no such thing
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_FREE_BYTES)


def give_back_holes() -> None:
    """What is free in the heap goes back to the system, between used blocks too. Takes some milliseconds for 100 MB.

    Slow bodies that come and are refused side by side leave holes as large as half of what they hold at most (measured).
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


async def keep_small() -> None:
    """Gives back, once a minute, what no burst needs any more. Until it is cancelled.

    Each burst that is larger than all before leaves the heap a little larger, for good (1 MB an hour, measured).
    """
    while True:
        await asyncio.sleep(_TRIM_S)
        await asyncio.to_thread(give_back_holes)


def only_grows() -> None:
    """The start makes what lives as long as the process: no collection of garbage until `settle` (an eighth of a start)."""
    gc.disable()


def settle() -> None:
    """What is there now stays: no collection of garbage looks at it again, which would take some 30 ms each time."""
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], _YOUNG_COLLECTIONS)
    gc.enable()
