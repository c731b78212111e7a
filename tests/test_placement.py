"""On which CPU the spool's writer runs. The decisions with a kernel that is played; the rest with the kernel's own answers."""

import contextlib
import os
import threading

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


ME = threading.get_native_id


def test_small_commits_run_where_the_loop_runs(placement, kernel):
    """And follow it from commit to commit; the kernel is told only of changes."""
    placement.place(SMALL)
    placement.place(SMALL)
    kernel.cpu = 3
    placement.place(LARGE - 1)
    assert kernel.told == [(ME(), {2}), (ME(), {3})]


def test_large_commits_run_anywhere(placement, kernel):
    """What is worth a CPU of its own gets any that the loop itself may use; and the next small one is beside it again."""
    for size in (LARGE, SMALL, LARGE, LARGE, SMALL):
        placement.place(size)
    assert kernel.told == [(ME(), {2}), (ME(), {0, 1, 2, 3}), (ME(), {2})]


@pytest.mark.parametrize("error", [PermissionError(1, "Operation not permitted"), ValueError("negative CPU number")])
def test_where_it_is_forbidden_nothing_happens(placement, kernel, error):
    """A filter of system calls answers EPERM, a sandbox -1 for the CPU: no commit fails of it, and the next one asks again."""
    kernel.error = error
    placement.place(SMALL)
    kernel.error = None
    placement.place(SMALL)
    assert kernel.told == [(ME(), {2})]


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
