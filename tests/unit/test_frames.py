"""Frames: any cutting of the byte stream gives the same frames, and what is no frame is said to be none."""

from __future__ import annotations

import binascii
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.frames import (
    HEADER,
    MAX_AT_MS,
    MAX_LINE,
    MAX_PAYLOAD,
    Decoder,
    Frame,
    FrameError,
    Kind,
    LineDecoder,
    decode_all,
    encode_all,
)

pytestmark = pytest.mark.unit

fewer = settings(max_examples=50)
few = settings(max_examples=15)
FRAMES = st.lists(
    st.builds(Frame, st.sampled_from(Kind), st.integers(0, MAX_AT_MS), st.binary(max_size=60)), max_size=8
)


def _cut(data: bytes, cuts: list[int]) -> list[bytes]:
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@fewer
@given(FRAMES, st.lists(st.integers(0, 600), max_size=12))
def test_any_cutting_of_the_stream_gives_the_same_frames(frames: list[Frame], cuts: list[int]) -> None:
    decoder = Decoder()
    found = [frame for piece in _cut(encode_all(frames), cuts) for frame in decoder.feed(piece)]
    assert found == frames
    assert decoder.pending == 0


@fewer
@given(FRAMES)
def test_a_whole_body_decodes_to_what_was_encoded(frames: list[Frame]) -> None:
    assert decode_all(encode_all(frames)) == frames


@fewer
@given(FRAMES.filter(bool), st.data())
def test_a_body_that_ends_inside_a_frame_is_refused(frames: list[Frame], data: st.DataObject) -> None:
    body = encode_all(frames)
    last = HEADER.size + len(frames[-1].payload)
    with pytest.raises(FrameError, match="ends inside a frame"):
        decode_all(body[: len(body) - data.draw(st.integers(1, last - 1))])


@fewer
@given(st.lists(st.binary(max_size=200), max_size=10))
def test_garbage_is_refused_or_waited_on_and_never_held_beyond_one_frame(pieces: list[bytes]) -> None:
    decoder = Decoder()
    for piece in pieces:
        with contextlib.suppress(FrameError):
            for frame in decoder.feed(piece):
                assert len(frame.payload) <= MAX_PAYLOAD
        assert decoder.pending <= HEADER.size + MAX_PAYLOAD + sum(map(len, pieces))


@pytest.mark.parametrize(
    "header",
    [
        HEADER.pack(0, 0, 0),
        HEADER.pack(5, 0, 0),
        HEADER.pack(255, 0, 0),
        HEADER.pack(Kind.STDOUT, 0, MAX_PAYLOAD + 1),
        HEADER.pack(Kind.STDOUT, MAX_AT_MS + 1, 0),
    ],
)
def test_an_impossible_header_is_refused_after_the_good_frames_and_for_ever(header: bytes) -> None:
    good = Frame(Kind.STDOUT, 1, b"good")
    decoder = Decoder()
    frames = decoder.feed(good.encode() + header)
    assert next(frames) == good
    with pytest.raises(FrameError):
        next(frames)
    with pytest.raises(FrameError):
        list(decoder.feed(good.encode()))


def test_an_iteration_that_stops_early_goes_on_where_it_stopped() -> None:
    frames = [Frame(Kind.STDOUT, number, b"x") for number in range(4)]
    decoder = Decoder()
    assert next(decoder.feed(encode_all(frames))) == frames[0]
    assert list(decoder.feed(b"")) == frames[1:]


def test_the_largest_frame_travels_and_a_larger_one_is_not_made() -> None:
    largest = Frame(Kind.STDERR, 0, bytes(MAX_PAYLOAD))
    assert decode_all(largest.encode()) == [largest]
    for frame in (Frame(Kind.STDERR, 0, bytes(MAX_PAYLOAD + 1)), Frame(Kind.STDERR, -1, b"")):
        with pytest.raises(FrameError, match="no frame holds"):
            frame.encode()


@few
@given(FRAMES, st.lists(st.binary(max_size=40).filter(lambda line: b"\n" not in line), max_size=4), st.data())
def test_any_cutting_of_a_log_gives_its_frames_whatever_stands_between_them(
    frames: list[Frame], words: list[bytes], data: st.DataObject
) -> None:
    lines = [frame.encode_line() for frame in frames]
    for word in words:
        lines.insert(data.draw(st.integers(0, len(lines))), word + b"!\n")  # "!" is not in base64's alphabet
    log = b"".join(lines)
    decoder = LineDecoder()
    cuts = data.draw(st.lists(st.integers(0, len(log)), max_size=12))
    assert [frame for piece in _cut(log, cuts) for frame in decoder.feed(piece)] == frames
    assert decoder.pending == 0
    assert decoder.strays.count("!") >= len(words)


@few
@given(FRAMES.filter(bool), st.data())
def test_a_log_that_breaks_off_gives_what_is_whole_and_reading_goes_on_there(
    frames: list[Frame], data: st.DataObject
) -> None:
    log = b"".join(frame.encode_line() for frame in frames)
    at = data.draw(st.integers(0, len(log) - 1))
    decoder = LineDecoder()
    before = list(decoder.feed(log[:at]))
    assert before == frames[: log[:at].count(b"\n")]
    assert before + list(decoder.feed(log[at:])) == frames


def test_a_line_that_was_torn_and_ended_by_another_is_no_frame_and_harms_none() -> None:
    good = Frame(Kind.REPORT, 7, b"{}")
    for torn in range(1, len(good.encode_line()) - 1):
        decoder = LineDecoder()
        log = good.encode_line()[:torn] + b"\n" + good.encode_line()
        assert list(decoder.feed(log)) == [good]


def test_several_frames_in_a_line_are_no_frame() -> None:
    two = Frame(Kind.REPORT, 7, encode_all([Frame(Kind.STDOUT, 1, b"abc")] * 2)).encode_line()
    decoder = LineDecoder()
    assert [frame.kind for frame in decoder.feed(two)] == [Kind.REPORT]
    assert list(decoder.feed(binascii.b2a_base64(encode_all([Frame(Kind.REPORT, 1, b"abc")] * 2)))) == []


def test_a_line_without_an_end_is_not_kept() -> None:
    decoder = LineDecoder()
    largest = Frame(Kind.STDOUT, 0, bytes(MAX_PAYLOAD))
    assert len(largest.encode_line()) == MAX_LINE + 1
    for _ in range(3):
        assert list(decoder.feed(b"A" * MAX_LINE)) == []
        assert decoder.pending <= MAX_LINE
    assert list(decoder.feed(b"AAAA\n" + largest.encode_line())) == [largest]
    assert len(decoder.strays) <= 4096
