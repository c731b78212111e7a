"""The daemon, whose k-th write or fsync of a file fails with EIO: `python -m bench.faulty K CALLS run --config FILE`.

libfiu (Debian's fiu-utils) stands between the process and the C library; SQLite meets the error as it would a disk's.
"""

import ctypes
import errno
import os
import sys
import threading
from pathlib import Path
from typing import Any, Final

CALLS: Final = {
    "write": ["posix/io/rw/pwrite"],
    "fsync": ["posix/io/sync/fsync", "posix/io/sync/fdatasync"],
}
STRUCK: Final = "the disk failed at call"
_PRELOADED: Final = ("/usr/lib/fiu/fiu_run_preload.so", "/usr/lib/fiu/fiu_posix_preload.so")


def available() -> bool:
    """Whether fiu-utils is installed."""
    return all(Path(library).is_file() for library in _PRELOADED)


def _arm(at: int, names: list[str]) -> Any:
    """From now on the call `at`, counted over all names from 1, fails, once. The result must be kept: it is what decides."""
    fiu = ctypes.CDLL("libfiu.so.0")
    calls = 0

    def decide(name: bytes, number: int, info: int, flags: int) -> int:
        nonlocal calls
        calls += 1
        if calls == at:
            os.write(2, f"{STRUCK} {at}, {name.decode()} in {threading.current_thread().name}\n".encode())
        return calls == at

    type_of_it = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    callback = type_of_it(decide)
    fiu.fiu_init(0)
    for each in names:
        if fiu.fiu_enable_external(each.encode(), 1, ctypes.c_void_p(errno.EIO), 0, callback):
            raise SystemExit(f"libfiu doesn't take {each}")
    return callback


def main() -> int:
    """Starts itself once more, with the libraries before it, and is the daemon then."""
    at, calls, *arguments = sys.argv[1:]
    if "LD_PRELOAD" not in os.environ:
        os.environ["LD_PRELOAD"] = " ".join(_PRELOADED)
        os.execv(sys.executable, [sys.executable, "-m", "bench.faulty", *sys.argv[1:]])  # ourselves
    from bridged import cli  # noqa: PLC0415  # not before there is a need

    decide = _arm(int(at), CALLS[calls])
    code = cli.main(arguments)
    del decide
    return code


if __name__ == "__main__":
    sys.exit(main())
