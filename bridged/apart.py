"""Work in a thread of its own, which nobody waits for at the end.

The end of the process waits for the loop's own threads, for as long as they take; what may never come back is not for them.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


async def apart(work: Callable[[], T], name: str) -> T:
    """What `work` gives or raises. Cancelled, it is left to itself."""
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

    threading.Thread(target=run, name=name, daemon=True).start()
    done: T = await found
    return done
