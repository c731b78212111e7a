"""Where expired events go: gzip NDJSON files of Mixpanel events, which `bridged replay` sends when the credential works again."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from bridged.backlog.segment import Segment, request_body


class Archive:
    """A folder of files that are complete or not there: written beside, fsynced, renamed. Nobody else's business: mode 0600."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def write(self, segments: Sequence[Segment]) -> str:
        """Writes some segments as one file; gives its name. Blocks until it is on disk. Raises OSError, and leaves nothing."""
        if not self._path.is_dir():
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _sync(self._path.parent)
        accepted = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(segments[0].created_at))
        events = sum(segment.events for segment in segments)
        # The id makes the name unique within a spool, and a second try the same file.
        target = self._path / f"{accepted}-{segments[0].id:010d}-{events}.ndjson.gz"
        partial = target.with_suffix(".partial")
        try:
            with os.fdopen(os.open(partial, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(request_body(segments))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        except OSError:
            # On a disk that is full, half a file would keep it so.
            partial.unlink(missing_ok=True)
            raise
        _sync(self._path)
        return str(target)


def _sync(folder: Path) -> None:
    """Brings what is in a folder, as names, to the disk."""
    opened = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
