"""What is too old, on its way into the archive: one file at a time, beside the loop. A folder that hangs holds up nobody."""

import asyncio
import math
from collections.abc import Sequence
from functools import partial
from typing import Final

import structlog

from bridged.apart import apart
from bridged.backlog.archive import Archive
from bridged.backlog.segment import Segment

log = structlog.get_logger()

# A file takes milliseconds, on a slow network some seconds; a folder that needs longer is told.
_ANSWERS_S: Final = 30.0
# After a failure, if probes are no more frequent.
_RETRY_S: Final = 60.0
# So long the end waits for the file that is being written: what is archived shall not be delivered by the next start as well.
_END_S: Final = 2.0


class Archiver:
    """Owns the archive, and the events of which a file is being written: nobody else has them until that has ended."""

    def __init__(self, archive: Archive) -> None:
        self.events = 0  # that it has
        self._segments: Sequence[Segment] = ()
        self._archive = archive
        self._failed = ""  # why the last file couldn't be written
        self._hangs = ""  # where it doesn't answer
        self._not_before = -math.inf  # loop time

    @property
    def problem(self) -> str:
        """Why nothing can be archived; empty: it can, as far as is known."""
        return self._hangs or self._failed

    @property
    def is_free(self) -> bool:
        """Whether another file may be begun: one after the other, and some time after a failure."""
        return not self.events and asyncio.get_running_loop().time() >= self._not_before

    def use(self, archive: Archive) -> None:
        """Another folder, for files to come. If it is wrong still, that is found soon."""
        self._archive, self._not_before = archive, -math.inf
        self.forget()

    def forget(self) -> None:
        """That a file couldn't be written: what was to be in it is wanted elsewhere."""
        self._failed = ""

    def take(self, segments: Sequence[Segment]) -> None:
        """Events that are to be written next. It must be free."""
        self._segments = segments
        self.events = sum(len(segment.codes) for segment in segments)

    async def write(self, probe_interval_s: float) -> str:
        """Writes what it has taken, fsynced; gives the file's name. Raises OSError if that can't be: then whoever awaits has the
        events again, and until the next probe no file is begun.
        """
        writing = asyncio.ensure_future(apart(partial(self._archive.write, self._segments), "archive"))
        try:
            done, _ = await asyncio.wait([writing], timeout=_ANSWERS_S)
            if not done:
                self._hangs = f"the folder {self._archive.path} doesn't answer"
                log.error("archive_hangs", folder=str(self._archive.path), events=self.events, after_s=_ANSWERS_S)
            file = await writing
        except OSError as error:
            log.error("archive_failed", error=str(error), hint="see retention.archive_path")
            self._failed = str(error)
            self._not_before = asyncio.get_running_loop().time() + min(probe_interval_s, _RETRY_S)
            raise
        finally:
            writing.cancel()
            self._segments, self.events, self._hangs = (), 0, ""
        self._failed = ""
        return file

    async def end(self, within_s: float) -> None:
        """No other file is begun. Gives the one that is being written some time, unless its folder is known to hang."""
        self._not_before = math.inf
        until = asyncio.get_running_loop().time() + min(within_s, _END_S)
        while self.events and not self._hangs and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.01)
