"""On which CPU the writer's thread runs: on the loop's while commits are small, on any when they are large.

The two take turns with the interpreter's lock, many times a commit, and while one waits for it the other wakes it in vain for
each socket that it reads. Between two CPUs each of these is an interrupt, which on a virtual machine costs more than what the
turn is for; on one it costs hardly anything. A large commit is compressed for milliseconds without the lock, which is worth
a CPU of its own. (Measured on two virtual CPUs, with 10 events a request: a fifth less CPU, a fifth more events a second.)

The loop itself stays where the kernel wants it, and the writer follows it, from commit to commit. Where a filter of system
calls forbids it all is as it would be.
"""

import contextlib
import ctypes
import functools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

# Uncompressed: some 1,500 events, which take 1 to 2 ms to compress.
_LARGE_BYTES: Final = 2**20
# What a child asks the kernel. prctl's PR_SET_DUMPABLE first: its end is worth no core.
_ASK: Final = "import ctypes, os; ctypes.CDLL(None).prctl(4, 0); os.sched_setaffinity(0, os.sched_getaffinity(0))"
_ASK_S: Final = 5.0


@functools.cache
def _allowed() -> bool:
    """Whether a thread may be placed, by this process.

    A filter of system calls may answer by ending whoever asks (systemd's does, unless it is told an error), so a child asks:
    a fresh interpreter, as what is forked from threads may wait for ever for a lock that none of them gives back.
    """
    try:
        # As proc(5) has it: 0, none; 2, a filter.
        if "\nSeccomp:\t0" in Path("/proc/self/status").read_text(encoding="ascii", errors="replace"):
            return hasattr(os, "sched_setaffinity")
        command = [sys.executable, "-I", "-S", "-c", _ASK]
        asked = subprocess.run(command, capture_output=True, check=False, timeout=_ASK_S)  # noqa: S603  # ours alone
    except (OSError, ValueError, subprocess.SubprocessError):  # no child, no interpreter's name, or no answer
        return False
    return asked.returncode == 0


class Placement:
    """Of one thread, by whoever hands it its work."""

    def __init__(self) -> None:
        self._thread: int | None = None  # None: not known yet
        self._cpu: int | None = None  # the only one that it may run on; None: on any
        self._where: Callable[[], int] | None = None  # None: nobody can be placed
        with contextlib.suppress(AttributeError, OSError):  # another system, another libc, a static interpreter
            if _allowed():
                # Of its caller. PyDLL: the lock is kept for so short a call.
                self._where = ctypes.PyDLL(None).sched_getcpu

    def adopt(self) -> None:
        """It is the calling thread that is placed."""
        self._thread = threading.get_native_id()

    def place(self, size: int) -> None:
        """Where it shall run for a commit of so many bytes. The kernel is told when that changes."""
        if self._thread is None or self._where is None:
            return
        cpu = self._where() if size < _LARGE_BYTES else None
        if cpu == self._cpu:
            return
        # That CPU was taken away just now; or it is -1, a ValueError, where nobody tells which it is.
        with contextlib.suppress(OSError, ValueError):
            # Any: all that the loop's thread may run on.
            os.sched_setaffinity(self._thread, os.sched_getaffinity(0) if cpu is None else {cpu})
            self._cpu = cpu
