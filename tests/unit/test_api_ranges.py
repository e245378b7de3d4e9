"""Range headers, by RFC 9110."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible.api.ranges import Span, UnsatisfiableError, parse_range

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("header", "size", "expected"),
    [
        ("bytes=0-0", 10, Span(0, 1)),
        ("bytes=0-9", 10, Span(0, 10)),
        ("bytes=2-4", 10, Span(2, 5)),
        ("bytes=5-", 10, Span(5, 10)),
        ("bytes=-3", 10, Span(7, 10)),
        ("bytes=-30", 10, Span(0, 10)),
        ("bytes=4-400", 10, Span(4, 10)),
        ("BYTES= 1-2 ", 10, Span(1, 3)),
    ],
)
def test_one_range_of_bytes_is_understood(header: str, size: int, expected: Span) -> None:
    assert parse_range(header, size) == expected


@pytest.mark.parametrize(
    "header",
    [None, "", "bytes=", "bytes=-", "bytes=5-2", "bytes=0-1,4-5", "lines=1-2", "bytes=a-b", "bytes=0-" + "9" * 30],
)
def test_what_is_not_one_range_of_bytes_counts_as_absent(header: str | None) -> None:
    assert parse_range(header, 10) is None


@pytest.mark.parametrize(
    ("header", "size"), [("bytes=10-", 10), ("bytes=10-20", 10), ("bytes=-0", 10), ("bytes=0-0", 0)]
)
def test_a_range_without_any_byte_is_unsatisfiable(header: str, size: int) -> None:
    with pytest.raises(UnsatisfiableError):
        parse_range(header, size)


def test_content_range_names_the_size_only_once_it_is_final() -> None:
    assert Span(2, 5).content_range(10) == "bytes 2-4/10"
    assert Span(2, 5).content_range(None) == "bytes 2-4/*"


@given(st.text(max_size=30), st.integers(0, 10**12))
def test_any_text_gives_a_range_inside_the_output_or_none(header: str, size: int) -> None:
    try:
        span = parse_range(header, size)
    except UnsatisfiableError:
        return
    assert span is None or 0 <= span.start < span.end <= size


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(1, 1000))
def test_a_range_is_what_slicing_gives(first: int, last: int, size: int) -> None:
    data = bytes(index % 251 for index in range(size))
    try:
        span = parse_range(f"bytes={first}-{last}", size)
    except UnsatisfiableError:
        assert first >= size
        return
    if last < first:
        assert span is None
    else:
        assert span is not None
        assert data[span.start : span.end] == data[first : last + 1]
