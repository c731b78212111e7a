"""A head that comes again is one byte for byte, but for the digits of its Content-Length."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridged.sources.known_head import KnownHead

HEAD = b"POST /v1/currents HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\nAuthorization: Bearer secret\r\n\r\n"


def known(head=HEAD):
    """A head that has a length."""
    found = KnownHead.of(head)
    assert found is not None
    return found


@pytest.mark.parametrize("name", [b"Content-Length:", b"content-length: ", b"CONTENT-LENGTH: \t"])
def test_another_length_frames_another_body(name):
    """However the header is spelled, and whatever it is first."""
    head = HEAD.replace(b"Content-Length: ", name)
    for length in (0, 7, 12, 123_456):
        again = head.replace(b"12\r", b"%d\r" % length)
        assert known(head).framed(again + b"and more") == (len(again), len(again) + length)


def test_a_head_without_a_length_is_not_known():
    """Nothing says where its body ends."""
    assert KnownHead.of(b"POST /v1/currents HTTP/1.1\r\nHost: x\r\n\r\n") is None


@pytest.mark.parametrize("length", [b"", b"-1", b"+1", b"1 2", b"1_2", b"0x1", b"\xb2", b"1234567890"])
def test_no_length_is_no_repeat(length):
    """What the parser refuses isn't taken on the way around it."""
    assert known().framed(HEAD.replace(b"12\r", length + b"\r")) is None


@given(at=st.integers(0, len(HEAD) - 1), byte=st.integers(0, 255))
def test_one_other_byte_is_another_head(at, byte):
    """Whether in the path, a header's name or the credential: only the digits may differ."""
    other = HEAD[:at] + bytes([byte]) + HEAD[at + 1 :]
    is_digit = at in (HEAD.index(b"12\r"), HEAD.index(b"12\r") + 1) and bytes([byte]).isdigit()
    assert (known().framed(other) is not None) == (is_digit or other == HEAD)


@given(to=st.integers(0, len(HEAD) - 1))
def test_a_part_of_a_head_is_none(to):
    """It may go on in another way."""
    assert known().framed(HEAD[:to]) is None
