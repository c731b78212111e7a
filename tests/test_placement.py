"""On which CPU the spool's writer runs. Real threads, and the kernel's own answer."""

import os
import threading

import pytest

from bridged.backlog.placement import Placement
from bridged.backlog.records import Intaken
from bridged.backlog.segment import Batch
from bridged.backlog.spool import Spool, SpoolOptions

SMALL, LARGE = 1000, 2**20
OPEN = 3


@pytest.fixture
def thread():
    """Another thread, placed: its Placement and its number."""
    placement, numbers, done = Placement(), [], threading.Event()

    def live():
        placement.adopt()
        numbers.append(threading.get_native_id())
        started.set()
        done.wait()

    started = threading.Event()
    living = threading.Thread(target=live)
    living.start()
    started.wait()
    yield placement, numbers[0]
    done.set()
    living.join()


@pytest.fixture
def one_cpu():
    """The calling thread on one CPU alone: gives it, and all that there are."""
    everywhere = os.sched_getaffinity(0)
    one = max(everywhere)
    os.sched_setaffinity(0, {one})
    yield one, everywhere
    os.sched_setaffinity(0, everywhere)


def test_small_commits_run_beside_the_loop(thread, one_cpu):
    """The writer's thread may run on the CPU of whoever places it, and on no other."""
    placement, number = thread
    placement.place(SMALL)
    assert os.sched_getaffinity(number) == {one_cpu[0]}


def test_large_commits_run_anywhere(thread):
    """What is worth a CPU of its own gets any that the loop itself may use; and the next small one is beside it again."""
    placement, number = thread
    for _ in range(2):
        placement.place(SMALL)
        assert len(os.sched_getaffinity(number)) == 1
        placement.place(LARGE)
        assert os.sched_getaffinity(number) == os.sched_getaffinity(0)


def test_where_it_is_forbidden_nothing_changes(thread, monkeypatch):
    """A filter of system calls answers EPERM: commits run where they always did, and it is tried again."""
    placement, number = thread
    everywhere = os.sched_getaffinity(0)

    def forbidden(*_arguments):
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patched:
        patched.setattr(os, "sched_setaffinity", forbidden)
        placement.place(SMALL)
    assert os.sched_getaffinity(number) == everywhere
    placement.place(SMALL)
    assert len(os.sched_getaffinity(number)) == 1


def test_who_is_not_told_which_cpu_it_is_goes_on(thread):
    """Some sandboxes have no such system call: -1, and no commit may fail of it."""
    placement, number = thread
    placement._where = lambda: -1
    placement.place(SMALL)
    assert os.sched_getaffinity(number) == os.sched_getaffinity(0)


def test_without_sched_getcpu_nothing_is_placed(thread, monkeypatch):
    """Another system, or another libc."""
    monkeypatch.setattr("ctypes.PyDLL", lambda _name: object())
    placement = Placement()
    placement.adopt()
    placement.place(SMALL)
    assert os.sched_getaffinity(0) == os.sched_getaffinity(thread[1])


async def test_the_spools_writer_is_placed(tmp_path, one_cpu):
    """By each commit: the thread is the one that SQLite runs in, and the loop's own affinity stays as it was."""
    async with Spool(SpoolOptions(path=str(tmp_path / "spool.db")), {OPEN: "open", 254: "(unknown)"}) as spool:
        number = await spool.run(lambda _db: threading.get_native_id())
        await spool.append(Intaken([Batch(b"{}\n", bytes([OPEN]))]))
        assert os.sched_getaffinity(number) == {one_cpu[0]}
        os.sched_setaffinity(0, one_cpu[1])
        await spool.append(Intaken([Batch(b"{}\n" * 500_000, bytes([OPEN]) * 500_000)]))
        assert os.sched_getaffinity(number) == one_cpu[1] == os.sched_getaffinity(0)
