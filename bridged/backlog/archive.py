"""Where expired events go: gzip NDJSON files of Mixpanel events, which `bridged replay` sends when the credential works again."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from bridged.backlog.segment import Segment, request_body


class Archive:
    """A folder of files that are complete or not there: written beside, fsynced, renamed."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def write(self, segments: Sequence[Segment]) -> str:
        """Writes some segments as one file; gives its name. Blocks until it is on disk. Raises OSError."""
        self._path.mkdir(parents=True, exist_ok=True)
        accepted = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(segments[0].created_at))
        events = sum(segment.events for segment in segments)
        # The id makes the name unique within a spool, and a second try the same file.
        target = self._path / f"{accepted}-{segments[0].id:010d}-{events}.ndjson.gz"
        partial = target.with_suffix(".partial")
        with partial.open("wb") as file:
            file.write(request_body(segments))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
        folder = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return str(target)
