"""SIGKILL under load from both doors, with a Mixpanel that fails: what was acked is delivered, or a dead letter."""

import asyncio

from bench.crash import torment
from bench.ledger import Ledger, Subject

# Acks before the commit, and gives a kill time to come between: what every daemon that "acks, then writes" does.
HASTY = """
import asyncio, sys
from bridged import cli
from bridged.backlog.spool import Spool
append, commit = Spool.append, Spool._commit
def hasty(self, intaken, sender=0):
    append(self, intaken, sender)
    done = asyncio.get_running_loop().create_future()
    done.set_result(None)
    return done
async def slow(self, work):
    await asyncio.sleep(0.05)
    await commit(self, work)
Spool.append, Spool._commit = hasty, slow
sys.exit(cli.main(sys.argv[1:]))
"""


def test_kills_lose_nothing(tmp_path):
    """30 kills at seeded moments, a quarter of them during start-up: no acked event is lost, the books agree with Mixpanel
    and with the dead letters, and what was sent again was the same bytes and not more than was in flight.
    """
    summary = asyncio.run(torment(tmp_path, 30, seed=7, least_s=0.02, most_s=0.3, per_round=30, pause_s=0.01))
    assert summary.problems == []
    assert summary.kills == 30
    assert summary.early > 0
    assert summary.totals.lost == 0
    assert summary.totals.acked > 30 * 100
    assert summary.totals.dead > 0
    assert summary.totals.retried > 0  # Mixpanel did fail
    assert summary.totals.doubled <= summary.allowed


def test_a_daemon_that_acks_before_the_commit_is_found_out(tmp_path, monkeypatch):
    """The control: the same loop with a daemon that acks too soon must report losses, or it proves nothing."""
    (tmp_path / "hasty.py").write_text(HASTY)
    configure = Subject.configure

    def hasty(self, *arguments, **options):
        self.program = [str(tmp_path / "hasty.py")]
        configure(self, *arguments, **options)

    monkeypatch.setattr(Subject, "configure", hasty)
    summary = asyncio.run(torment(tmp_path, 4, seed=8, least_s=0.1, most_s=0.3, per_round=4, pause_s=0.005))
    assert summary.totals.lost > 0
    assert "neither delivered nor dead letters" in str(summary.problems)


def line(number, more=""):
    """A mapped event."""
    return b'{"event":"x","properties":{"$insert_id":"%08x-0000","more":"%b"}}' % (number, more.encode())


def test_the_ledger_tells_a_repetition_after_a_kill_from_a_wrong_one():
    """Judged event by event: after a failure and after a kill it may come again; other bytes, or without cause, it may not."""
    ledger = Ledger()
    ledger.take(4)
    ledger.life = 1
    assert ledger.passed([line(0)]) == [0]
    ledger.passed([line(0)])
    assert (ledger.retried, ledger.doubled.total(), ledger.problems) == (1, 0, [])
    ledger.succeeded([0])
    ledger.life = 2
    ledger.passed([line(0)])
    assert (ledger.retried, ledger.doubled[2], ledger.problems) == (1, 1, [])
    ledger.succeeded([0])
    ledger.passed([line(0)])
    assert "though Mixpanel had taken it" in ledger.problems.pop()
    ledger.passed([line(1)])
    ledger.passed([line(1, "changed")])
    assert "other bytes" in ledger.problems.pop()
    ledger.passed([line(9)])
    assert "never sent" in ledger.problems.pop()
    ledger.succeeded([1])
    ledger.life, ledger.killed_at[2] = 3, 10**9
    ledger.passed([line(1)])
    assert "long after" in ledger.problems.pop()


def test_the_ledger_knows_what_is_missing():
    """What was acked and is nowhere is lost; what wasn't acked was not promised."""
    ledger = Ledger(first=10)
    ledger.ack(ledger.take(5)[:3])
    ledger.take(5)
    assert (ledger.acked, ledger.sent) == (3, 10)
    assert ledger.lost({10, 12, 15}) == [11]
