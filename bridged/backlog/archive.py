"""Where expired events go: gzip NDJSON files of Mixpanel events, which `bridged replay` sends when the credential works again."""

import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from bridged.backlog.segment import Segment, request_body
from bridged.durable import sync


class _Properties(Struct):
    insert_id: str = msgspec.field(name="$insert_id")
    time: int


class ArchivedEvent(Struct):
    """What a line of an archive file has at least: by these Mixpanel knows a repetition."""

    event: str
    properties: _Properties


class Archive:
    """A folder of files that are complete or not there: written beside, fsynced, renamed. Nobody else's business: mode 0600."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def write(self, segments: Sequence[Segment]) -> str:
        """Writes some segments as one file; gives its name. Blocks until it is on disk. Raises OSError, and leaves nothing."""
        if not self.path.is_dir():
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                sync(self.path.parent)
            except OSError:
                # Found there at the next try, it would be taken for one that is on disk.
                self.path.rmdir()
                raise
        body = request_body(segments)
        target = self._target(segments, body)
        if target.exists():
            # A second try of what is there already.
            sync(self.path)
            return str(target)
        partial = target.with_suffix(".partial")
        try:
            with os.fdopen(os.open(partial, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        except OSError:
            # On a disk that is full, half a file would keep it so.
            partial.unlink(missing_ok=True)
            raise
        try:
            sync(self.path)
        except OSError:
            target.unlink(missing_ok=True)
            raise
        return str(target)

    def _target(self, segments: Sequence[Segment], body: bytes) -> Path:
        """The first name that no other events have, nor had before they were replayed.

        A second try finds its own file. Ids alone don't tell: after a restart one may be given again, within the same second.
        """
        accepted = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(segments[0].created_at))
        events = sum(segment.events for segment in segments)
        stem = f"{accepted}-{segments[0].id:010d}-{events}"
        names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        targets = (self.path / f"{name}.ndjson.gz" for name in names)
        return next(
            target
            for target in targets
            if not (_is_other(target, body) or _is_other(target.with_name(f"{target.name}.replayed"), body))
        )


def _is_other(file: Path, body: bytes) -> bool:
    """Whether a file is there, and holds something else. Mostly its size says so."""
    try:
        if file.stat().st_size != len(body):
            return True
    except FileNotFoundError:
        return False
    try:
        return file.read_bytes() != body
    except OSError:
        # Whatever it holds: it stays.
        return True
