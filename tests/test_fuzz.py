"""Inputs that nobody sends, a few thousand of them: the promises of bench/fuzz.py, with hypothesis to make and to shrink them."""

import random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bench import fuzz
from bench.fuzz import Broken, Fuzzer

EXAMPLES = fuzz.corpus()
FRAMER = Fuzzer()
VARIANTS = [{}, {"unknown": "forward", "anonymous": "device"}, {"unknown": "skip", "anonymous": "dead_letter"}]
QUICK = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example]
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=40)
    | st.sampled_from(["", "0", "unknown", "anon", "$x", "users.behaviors.CustomEvent"]),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=12), inner, max_size=6),
    max_leaves=20,
)
changes = st.lists(
    st.tuples(st.integers(0, 3000), st.integers(0, 60), st.sampled_from(fuzz.TOKENS) | st.binary(max_size=12)),
    max_size=6,
)


@st.composite
def damaged(draw):
    """An example of some event type with some of its bytes replaced."""
    data = bytearray(draw(st.sampled_from(EXAMPLES)))
    for at, length, token in draw(changes):
        data[at % (len(data) + 1) : at % (len(data) + 1) + length] = token
    return bytes(data)


@st.composite
def ill_typed(draw):
    """An example of some event type with other values in some of its places."""
    import msgspec

    event = msgspec.json.decode(draw(st.sampled_from(EXAMPLES)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.sampled_from([event, event.get("user"), event.get("properties")]))
        if isinstance(place, dict) and place:
            place[draw(st.sampled_from(sorted(place)) | st.text(max_size=10))] = draw(json_values)
    try:
        return msgspec.json.encode(event)
    except (UnicodeEncodeError, OverflowError):
        import json

        return json.dumps(event).encode()


@pytest.fixture(scope="module", params=VARIANTS, ids=["defaults", "forwarding", "skipping"])
def fuzzer(request):
    """One for each way to treat what is unknown or anonymous."""
    return Fuzzer(**request.param)


@QUICK
@given(parts=st.lists(damaged() | ill_typed() | st.binary(max_size=60), min_size=1, max_size=4))
def test_any_lines(fuzzer, parts):
    """Nothing raises, each line ends in one place, and Mixpanel takes all that goes on."""
    fuzzer.lines(b"\n".join(parts))


@QUICK
@given(parts=st.lists(damaged() | ill_typed(), max_size=4), bare=st.booleans())
def test_any_body(fuzzer, parts, bare):
    """The same for bodies; only what is no JSON at all is refused."""
    array = b"[" + b",".join(parts) + b"]"
    fuzzer.body(array if bare else b'{"events":' + array + b"}")


@QUICK
@given(
    parts=st.lists(
        st.sampled_from(
            [
                b"\n",
                b"\r\n",
                b"\n\n",
                b'{"acks":true}\n',
                b'{"acks"',
                b"x",
                b"y" * 4990,
                b"z" * 5001,
                b"z" * 5002,
                b"q" * 20_000,
                b"\r",
            ]
        )
        | st.binary(max_size=20),
        max_size=12,
    ),
    cuts=st.lists(st.integers(0, 60_000), max_size=20),
)
@example(parts=[b"q" * 20_000, b"\n", b'{"acks":true}\n'], cuts=[17_200])  # an oversized first line in pieces
def test_any_packets(parts, cuts):
    """However a stream is cut, its lines are the same, and nothing counts as unfinished after its end."""
    FRAMER.framed(b"".join(parts), cuts)


@pytest.mark.parametrize("way", [0, 1, 77])
def test_the_own_engine(way):
    """The mutations of `python -m bench fuzz`: a thousand of each way, and all ends are reached."""
    source, fuzzer = random.Random(way), Fuzzer()
    for _ in range(1000):
        fuzz.attempt(fuzzer, fuzz.mutated(b"\n".join(source.choices(EXAMPLES, k=2)), source), way)
    assert all(fuzzer.ends[end] for end in (("framed lines",) if way == 77 else ("events", "dead letters")))


def test_the_judge_can_say_no(monkeypatch):
    """The negative control: an event that Mixpanel would refuse, a line that ends nowhere, and lines that differ are seen."""
    fuzzer = Fuzzer()
    line = EXAMPLES[0]
    monkeypatch.setattr(fuzz, "_RULES", fuzz.validation.Rules(token="of another project"))
    with pytest.raises(Broken, match="Mixpanel would refuse"):
        fuzzer.lines(line)
    monkeypatch.undo()
    monkeypatch.setattr(fuzzer.intake, "accept_lines", len)
    with pytest.raises(Broken, match="1 lines, 0"):
        fuzzer.lines(line)
    monkeypatch.setattr(
        fuzz._Framed,
        "accept_lines",
        lambda self, lines, _sender: self.calls.append((len(lines), False)) or fuzz._Never(),
    )
    with pytest.raises(Broken, match="other lines"):
        fuzzer.framed(b"a\nb\nc\n", [3])
