"""Power cuts under load: on a real ext4 that loses what wasn't synced, what was acked is there when the power is back."""

import asyncio
import os
import time

import pytest

from bench import powercut
from bench.ledger import Ledger

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 and not os.environ.get("CI"), reason="mounting a file system needs root"
)


def test_power_cuts_lose_nothing(tmp_path):
    """20 cuts at seeded moments: after each, integrity_check is content and every acked event is in the file or delivered.

    At the end all of them are delivered or dead letters, and the books say so.
    """
    summary = asyncio.run(powercut.torment(tmp_path, 20, seed=5, most_s=0.15))
    assert summary.problems == []
    assert (summary.cuts, summary.lost, summary.totals.lost) == (20, 0, 0)
    assert summary.totals.acked > 20 * 100
    assert summary.checkpointed > 0


def test_the_cut_is_one(tmp_path):
    """The control: the same daemon with synchronous=NORMAL loses what it acked, or the test above proves nothing."""
    summary = asyncio.run(powercut.torment(tmp_path, 8, seed=6, synchronous="NORMAL", most_s=0.3))
    assert summary.lost > 0


def test_a_disk_is_always_put_away(tmp_path):
    """Nothing stays mounted and no loop device stays in use, whatever happens to the daemon on it."""

    def attached():
        return powercut._command("losetup", "--list", "--noheadings", "--output", "BACK-FILE")

    def cut_and_fail():
        with powercut.Disk(tmp_path, 32) as disk:
            assert str(tmp_path) in attached()
            disk.cut()
            (disk.path / "file").write_text("x")

    with pytest.raises(OSError, match="Input/output"):
        cut_and_fail()
    assert str(tmp_path) not in attached()
    assert not os.path.ismount(tmp_path / "disk")


def test_only_acks_of_a_running_machine_count():
    """What was acked after the power had gone is taken back where it isn't on the disk; what was acked before stays a promise."""
    ledger = Ledger()
    ledger.ack(ledger.take(2))
    cut_at = time.monotonic()
    ledger.ack(ledger.take(2))
    ledger.withdraw(cut_at, {3})
    assert ledger.lost_on({3}) == [0, 1]
    assert ledger.acked == 3
