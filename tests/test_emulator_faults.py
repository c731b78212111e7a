"""Scripts of faults: what they may say, and which request meets which fault. Pure."""

import pytest

from bridged.emulator.faults import Fault, Script, parse_faults
from bridged.errors import ConfigError


def picks(script, count, path="/import"):
    """What the next requests meet, in short."""
    taken = [script.pick(path) for _ in range(count)]
    return [fault and (fault.status or fault.action) for fault in taken]


def test_faults_happen_in_turn():
    """A script is read as a story: two answers 500, one reset, then health."""
    script = Script(parse_faults([{"status": 500, "times": 2}, {"action": "reset", "times": 1}]))
    assert picks(script, 5) == [500, 500, "reset", None, None]


def test_after_skips_the_first_requests():
    """`after` counts the requests that the fault has seen, so the first n pass."""
    script = Script(parse_faults([{"status": 503, "after": 2, "times": 1}]))
    assert picks(script, 5) == [None, None, 503, None, None]


def test_without_times_a_fault_lasts():
    """No `times` means for ever."""
    assert picks(Script(parse_faults([{"status": 401}])), 50) == [401] * 50


def test_share_is_a_reproducible_probability():
    """The same seed gives the same requests their faults, another seed gives others, and the share is about right."""
    one = picks(Script([Fault(status=500, share=0.3, seed=7)]), 1000)
    assert one == picks(Script([Fault(status=500, share=0.3, seed=7)]), 1000)
    assert one != picks(Script([Fault(status=500, share=0.3, seed=8)]), 1000)
    assert 250 < one.count(500) < 350


def test_faults_apply_to_their_path():
    """A fault belongs to one endpoint, whose trailing slash does not matter, or to all."""
    script = Script([Fault(status=500, path="/track"), Fault(status=502, path="*", times=1)])
    assert picks(script, 1, "/track/") == [500]
    assert picks(script, 2, "/engage") == [502, None]


def test_a_fault_that_is_taken_hides_the_request_from_the_next():
    """Only requests that reach a fault count for its `after`."""
    script = Script([Fault(status=500, times=2), Fault(status=502, after=1)])
    assert picks(script, 5) == [500, 500, None, 502, 502]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("no", "faults: must be a list of faults, not str"),
        ({"fault": []}, "faults: unknown key 'fault'"),
        ([{"status": 500}, {"statuss": 500}], "faults[1]: Object contains unknown field `statuss`"),
        ([{"status": "500"}], "faults[0].status: Expected `int | null`, got `str`"),
        ([{"status": 99}], "faults[0].status: Expected `int` >= 200"),
        ([{"status": 500, "share": 0}], "faults[0].share: Expected `float` > 0.0"),
        ([{"action": "explode"}], "faults[0].action: Invalid enum value 'explode'"),
        ([{"status": 500, "times": 0}], "faults[0].times: Expected `int` >= 1"),
        ([{}], "faults[0]: needs a `status`, an `action` or a `delay_s`: it does nothing"),
        ([{"action": "hang", "status": 500}], "faults[0]: `status` has no meaning beside `action` = 'hang'"),
        ([{"action": "slow", "body": "x"}], "faults[0]: `body` needs a `status`"),
        ([{"status": 500, "path": "/imports"}], "faults[0].path: nothing answers at '/imports'"),
        ([{"status": 500, "path": "/users/track"}], "faults[0].path: nothing answers at '/users/track'"),
        ([{"status": 500, "path": "import"}], "faults[0]: `path` must start with a slash or be '*', not 'import'"),
        ([{"status": 500, "headers": {"X": "a\r\nb"}}], "faults[0]: `headers` must not hold line breaks"),
        ([7], "faults[0]: Expected `object`, got `int`"),
    ],
)
def test_bad_scripts_name_index_and_key(script, message):
    """The error says which fault and which of its keys is wrong, and the hint lists the keys there are."""
    with pytest.raises(ConfigError) as caught:
        parse_faults(script)
    assert str(caught.value).startswith(message)


def test_scripts_may_be_wrapped_and_mixed():
    """A TOML file has to name its list; in Python faults may be objects already."""
    fault = Fault(status=500)
    assert parse_faults({"faults": [{"status": 500}, fault]}) == [fault, fault]
    assert parse_faults({}) == []


@pytest.mark.parametrize(
    ("fault", "stores"),
    [
        (Fault(status=500), False),
        (Fault(action="reset"), False),
        (Fault(action="hang"), False),
        (Fault(action="html"), False),
        (Fault(action="truncate", status=500), False),
        (Fault(action="truncate"), True),
        (Fault(action="slow"), True),
        (Fault(delay_s=1), True),
        (Fault(action="reset_after_store"), True),
        (Fault(action="store_then_hang"), True),
        (Fault(action="store_then_status", status=503), True),
    ],
)
def test_each_fault_knows_whether_the_events_are_stored(fault, stores):
    """The difference between trouble before and after the store is what a sender has to survive."""
    assert fault.stores == stores


def test_a_fault_of_braze_s_is_at_one_of_its_paths():
    """Of any partner; and one at a path of Mixpanel's would never happen."""
    paths = ["/users/track", "/users/track/", "/partners/m/cohorts", "/partners/m/cohorts/users", "*"]
    script = [{"path": path, "status": 500} for path in paths]
    assert [fault.path for fault in parse_faults([*script, {"status": 503}], default_path="/users/track")] == [
        *paths,
        "/users/track",
    ]
    with pytest.raises(ConfigError, match=r"faults\[0\].path: nothing answers at '/import'"):
        parse_faults([{"path": "/import", "status": 500}], default_path="/users/track")
