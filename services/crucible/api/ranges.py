"""HTTP range requests (RFC 9110, section 14) over an output stream: one range of bytes, or the whole.

Several ranges in one request are answered with the whole, as the RFC allows: their multipart form is costly and rarely wanted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_RANGE = re.compile(r"bytes=[ \t]*(?P<first>[0-9]*)-(?P<last>[0-9]*)[ \t]*", re.IGNORECASE)
# No output is longer than a number of this many digits; longer ones only cost time.
_DIGITS_MAX = 19


class UnsatisfiableError(ValueError):
    """The range begins at or after the end, or asks for no byte at all."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes from `start` up to, not including, `end`."""

    start: int
    end: int

    @property
    def length(self) -> int:
        """Bytes in it."""
        return self.end - self.start

    def content_range(self, size: int | None) -> str:
        """Return the Content-Range value; `size` is None while the whole is still growing."""
        return f"bytes {self.start}-{self.end - 1}/{'*' if size is None else size}"


def parse_range(header: str | None, size: int) -> Span | None:
    """Return what a Range header asks for of `size` bytes, or None for the whole.

    A header that is not one range of bytes counts as absent, as the RFC says.

    Raises:
        UnsatisfiableError: nothing of the range exists.
    """
    match = _RANGE.fullmatch(header or "")
    if match is None or len(match["first"]) > _DIGITS_MAX or len(match["last"]) > _DIGITS_MAX:
        return None
    first, last = match["first"], match["last"]
    if not first and not last:
        return None
    if not first:
        start, end = max(0, size - int(last)), size
    elif last and int(last) < int(first):
        return None
    else:
        start, end = int(first), min(size, int(last) + 1) if last else size
    if start >= end:
        raise UnsatisfiableError(f"bytes {header} of {size}")
    return Span(start, end)
