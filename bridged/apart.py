"""Work in threads of their own, which nobody waits for at the end: each piece by itself, or one after the other.

The end of the process waits for the loop's own threads, for as long as they take; what may never come back is not for them.
"""

import asyncio
import contextlib
import errno
import threading
from collections.abc import Callable
from typing import Any, Final, Self, TypeVar

import structlog

log = structlog.get_logger()

T = TypeVar("T")

_MAX_WAITING: Final = 1000
# So long the end waits for what was handed over.
_DRAIN_S: Final = 5.0


async def apart(work: Callable[[], T], name: str) -> T:
    """What `work` gives or raises. Cancelled, it is left to itself. Raises OSError also if there may be no more threads."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[Any] = loop.create_future()

    def tell(result: Any, error: Exception | None) -> None:
        if not found.done() and error is not None:
            found.set_exception(error)
        elif not found.done():
            found.set_result(result)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except Exception as failed:
            error = failed
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell, result, error)

    try:
        threading.Thread(target=run, name=name, daemon=True).start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, str(error)) from error
    done: T = await found
    return done


def at_once(work: Callable[[], None], _name: str = "") -> bool:
    """In the place of `InOrder.put`, where whoever hands work over may wait for it."""
    work()
    return True


class InOrder:
    """One thread that does what is handed over, one piece after the other: a disk that hangs holds up nobody else.

    As an async context manager: the thread runs within the block, and its end waits a bounded time for what is left.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._waiting: dict[object, Callable[[], None]] = {}  # by name, or by nothing that anybody else has
        self._closed = False

    def put(self, work: Callable[[], None], name: str = "") -> bool:
        """Hands work over; False if too much waits already. With a name it takes the place of what waits under that."""
        key = name or object()
        with self._changed:
            if self._closed or (key not in self._waiting and len(self._waiting) >= _MAX_WAITING):
                return False
            self._waiting[key] = work
            self._changed.notify_all()
        return True

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        threading.Thread(target=self._run, name=self._name, daemon=True).start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        await asyncio.wait([self._ended], timeout=_DRAIN_S)
        if not self._ended.done():
            log.warning("not_written", what=self._name, hint=f"the disk didn't answer within {_DRAIN_S:g} s")

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    break
                work = self._waiting.pop(next(iter(self._waiting)))
            try:
                work()
            except Exception as error:
                # A bug in one piece is no reason to do none any more.
                log.error("task_failed", task=self._name, error=repr(error))
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)
