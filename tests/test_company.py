"""Who is waited for before a commit begins."""

from hypothesis import given
from hypothesis import strategies as st

from bridged.backlog.company import Company


def company(*senders: int, before: tuple[int, ...] = (), began: float = 0.0) -> Company:
    """With those who wait now, and those that were in the last commit."""
    made = Company()
    for sender in before:
        made.join(sender)
    made.leave(began)
    for sender in senders:
        made.join(sender)
    return made


def test_nobody_waits_for_nobody():
    """When all who have sent lately wait for their answers, nobody else can come: the commit begins."""
    assert not company(1, 2, 3, 4, before=(1, 2, 3, 4)).more_to_come(100, 0.001)
    assert not company(1, 2, 3, 4).more_to_come(100, 0.001)


def test_the_rest_of_a_crowd_is_waited_for():
    """Those of the last commit have their answers, and are about to send again."""
    assert company(1, 2, 3, before=(4, 5)).more_to_come(100, 0.001)
    assert not company(1, 2, before=(4, 5)).more_to_come(100, 0.001), "but two are no crowd"


def test_one_of_a_large_crowd_waits_for_the_others():
    """Where so many have sent within a moment more are about to come, though only one waits; and nobody waits for none."""
    many = tuple(range(10, 30))
    assert company(1, before=many).more_to_come(100, 0.001)
    assert not company(1, before=many).more_to_come(100, 0.0041)
    assert not company(1, before=many[:8]).more_to_come(100, 0.001)
    assert not company(before=many).more_to_come(0, 0.001)


def test_who_sends_without_waiting_joins_more_than_once():
    """A stream brings more in a moment, whoever else waits."""
    assert company(1, 1, 1, before=(1,)).more_to_come(100, 0.001)


def test_it_is_a_moment_only():
    """4 ms from one commit to the next; and not when it is a lot already."""
    assert company(1, 1, 1).more_to_come(100, 0.0039)
    assert not company(1, 1, 1).more_to_come(100, 0.0041)
    assert not company(1, 1, 1).more_to_come(2**20, 0.001)


def test_who_is_gone_is_forgotten():
    """A connection that ended, or pauses, is in nobody's way for long."""
    made = company(1, 2, 3, 4, before=(5,))
    for at in (0.011, 0.022):
        made.leave(at)
        for sender in (1, 2, 3, 4):
            made.join(sender)
    assert not made.more_to_come(100, 0.023)


@given(
    st.lists(st.tuples(st.integers(1, 6), st.floats(0, 0.003)), max_size=60),
    st.floats(0, 1e9),
)
def test_every_wait_ends(arrivals, start):
    """Whoever comes, and whenever: 4 ms after the last commit began the next one begins, and an empty one never waits."""
    made, now, began = Company(), start, start
    made.leave(now)
    for sender, later in arrivals:
        now += later
        made.join(sender)
        if not made.more_to_come(1, now):
            made.leave(now)
            began = now
        assert not made.more_to_come(1, began + 0.005)
    made.leave(now)
    assert not made.more_to_come(0, now)


def test_the_last_of_a_crowd_is_noticed():
    """It wakes who waits for it: nobody waits until the next look."""
    made = company(1, 2, 3, before=(1, 2, 3, 4))
    assert made.more_to_come(100, 0.001)
    assert made.join(4)
    assert not made.more_to_come(100, 0.001)
