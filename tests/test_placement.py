"""On which CPU the spool's writer runs. The decisions with a kernel that is played; the rest with the kernel's own answers."""

import contextlib
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bridged.backlog.placement import Placement
from bridged.backlog.records import Intaken
from bridged.backlog.segment import Batch
from bridged.backlog.spool import Spool, SpoolOptions

SMALL, LARGE = 1000, 2**20
OPEN = 3
NAMES = {OPEN: "open", 254: "(unknown)"}


class Kernel:
    """Where the loop runs, and what it was told of threads."""

    def __init__(self):
        self.cpu, self.told, self.error = 2, [], None

    def sched_setaffinity(self, thread, cpus):
        """As in `os`."""
        if self.error is not None:
            raise self.error
        self.told.append((thread, cpus))


@pytest.fixture
def kernel(monkeypatch):
    """One that is played, with four CPUs."""
    played = Kernel()
    monkeypatch.setattr(os, "sched_setaffinity", played.sched_setaffinity)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _thread: {0, 1, 2, 3})
    return played


@pytest.fixture
def placement(kernel):
    """Of this thread."""
    made = Placement()
    made._where = lambda: kernel.cpu
    made.adopt()
    return made


def test_small_commits_run_where_the_loop_runs(placement, kernel):
    """And follow it from commit to commit; the kernel is told only of changes."""
    placement.place(SMALL)
    placement.place(SMALL)
    kernel.cpu = 3
    placement.place(LARGE - 1)
    assert kernel.told == [(threading.get_native_id(), {2}), (threading.get_native_id(), {3})]


def test_large_commits_run_anywhere(placement, kernel):
    """What is worth a CPU of its own gets any that the loop itself may use; and the next small one is beside it again."""
    for size in (LARGE, SMALL, LARGE, LARGE, SMALL):
        placement.place(size)
    assert kernel.told == [
        (threading.get_native_id(), {2}),
        (threading.get_native_id(), {0, 1, 2, 3}),
        (threading.get_native_id(), {2}),
    ]


@pytest.mark.parametrize("error", [OSError(22, "Invalid argument"), ValueError("negative CPU number")])
def test_no_commit_fails_of_it(placement, kernel, error):
    """A CPU that was taken away just now, a sandbox that says -1 for it: the next commit asks again."""
    kernel.error = error
    placement.place(SMALL)
    kernel.error = None
    placement.place(SMALL)
    assert kernel.told == [(threading.get_native_id(), {2})]


def test_nobody_is_placed_before_there_is_a_thread(kernel):
    """Least of all the loop, which is whom the kernel takes for thread 0."""
    Placement().place(SMALL)
    assert kernel.told == []


@pytest.mark.parametrize("error", [AttributeError("sched_getcpu"), OSError("Dynamic loading not supported")])
def test_without_sched_getcpu_nobody_is_placed(kernel, monkeypatch, error):
    """Another system, another libc, or an interpreter that is linked statically: the spool opens all the same."""

    def missing(_name):
        raise error

    monkeypatch.setattr("ctypes.PyDLL", missing)
    placement = Placement()
    placement.adopt()
    placement.place(SMALL)
    assert kernel.told == []


# A filter of system calls, as systemd and container runtimes set them: `answer` for sched_setaffinity, and all others pass.
FILTERED = """
import ctypes, platform, struct, sys
number = {"x86_64": 203, "aarch64": 122}[platform.machine()]
program = b"".join(struct.pack("HBBI", *step) for step in (
    (0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, int(sys.argv[1], 0)), (0x06, 0, 0, 0x7FFF0000)))
steps = ctypes.create_string_buffer(program)
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
for call in ((38, 1, 0, 0, 0), (22, 2, ctypes.byref(Program(4, ctypes.addressof(steps))))):
    assert libc.prctl(*call) == 0, ctypes.get_errno()
from bridged.backlog.placement import Placement
placement = Placement()
placement.adopt()
placement.place(1000)
print("placed" if placement._cpu is not None else "not placed")
"""
KILL, EPERM, ALLOW = "0x80000000", "0x00050001", "0x7fff0000"


@pytest.mark.skipif(platform.machine() not in {"x86_64", "aarch64"}, reason="the filter is written for these")
@pytest.mark.parametrize(("answer", "said"), [(KILL, "not placed"), (EPERM, "not placed"), (ALLOW, "placed")])
def test_a_filter_of_system_calls_is_asked_by_a_child(answer, said):
    """One that ends whoever places a thread must not end the daemon at its first commit; one that allows it changes nothing."""
    command = [sys.executable, "-c", FILTERED, answer]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert (result.returncode, result.stdout.strip()) == (0, said), result.stderr


async def test_the_spools_writer_is_placed_by_its_commits(tmp_path):
    """The thread that SQLite runs in is moved by the real kernel, and the loop's own affinity stays as it was."""
    everywhere = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, everywhere)
    except OSError as error:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no thread can be placed here: {error}")
    async with Spool(SpoolOptions(path=str(tmp_path / "spool.db")), NAMES) as spool:
        number = await spool.run(lambda _db: threading.get_native_id())
        assert os.sched_getaffinity(number) == everywhere
        with contextlib.ExitStack() as stack:
            stack.callback(os.sched_setaffinity, 0, everywhere)
            os.sched_setaffinity(0, {max(everywhere)})
            await spool.append(Intaken([Batch(b"{}\n", bytes([OPEN]))]))
            assert os.sched_getaffinity(number) == {max(everywhere)}
        await spool.append(Intaken([Batch(b'{"x":"%s"}\n' % (b"x" * 900_000), bytes([OPEN]))] * 2))
        assert os.sched_getaffinity(number) == os.sched_getaffinity(0) == everywhere
