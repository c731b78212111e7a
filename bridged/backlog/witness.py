"""What the lock file remembers of the spool: whether it is to be trusted, and how many events it had accepted.

The number is written after each commit, without a sync: it is never ahead of what is on disk, whatever happens, and after
a power cut it may be behind. A spool that knows of fewer has lost commits, even where nothing in it shows that: a WAL that
was cut off with its index gone, a disk that said it had written, an old copy in its place.
"""

import contextlib
import os
import re
from typing import Final

# Digits: what is written in place has always the same length.
_WIDTH: Final = 20


class Witness:
    """The text of an open lock file: a line about the file, and one with the number."""

    def __init__(self, file: int) -> None:
        """Reads what the last process noted. Raises OSError."""
        text = os.pread(file, 2000, 0).decode(errors="replace")
        found = re.search(r"^accepted (\d{1,20})$", text, re.MULTILINE)
        self.known = text.partition("\n")[0]  # "": nothing
        self.accepted = int(found[1]) if found else 0  # events; 0: it isn't known
        self._file = file
        self._at = -1  # where the number stands

    def say(self, what: str) -> None:
        """Notes what is known of the spool. What can't be noted isn't: it is no part of any promise."""
        head = " ".join(what[:1000].split()).encode() + b"\naccepted "
        with contextlib.suppress(OSError):
            whole = head + b"%0*d\n" % (_WIDTH, self.accepted)
            os.pwrite(self._file, whole, 0)
            os.ftruncate(self._file, len(whole))
            self._at = len(head)

    def note(self, accepted: int) -> None:
        """So many events were accepted, as of a commit that is on disk."""
        self.accepted = accepted
        if self._at >= 0:
            with contextlib.suppress(OSError):
                os.pwrite(self._file, b"%0*d" % (_WIDTH, accepted), self._at)
