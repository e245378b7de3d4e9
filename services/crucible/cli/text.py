"""Text of strangers on a terminal: what evaluations print, and the words they choose, must not command the reader's terminal.

Only what is shown to a person passes through here. What goes to a pipe or a file is left byte for byte as it is.
"""

from __future__ import annotations

import codecs
import sys
import unicodedata
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from typing import BinaryIO

_KEPT = frozenset("\n\t")
# Control, format (bidirectional overrides among them), surrogate, line and paragraph separators.
_ESCAPED_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def _escape(character: str) -> str:
    code = ord(character)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def visible(text: str) -> str:
    """Return the text with every character that could steer a terminal or hide text written out as an escape.

    Line feed and tab stay. A carriage return is written out too: it would let a line overwrite itself.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character
        if character in _KEPT or unicodedata.category(character) not in _ESCAPED_CATEGORIES
        else _escape(character)
        for character in text
    )


def plain(value: object, style: str = "") -> Text:
    """Return a value for rich to show as it stands: no markup is read in it, no control character survives."""
    return Text(visible(str(value)), style=style)


class OutputWriter:
    """Writes an evaluation's output to one of our own streams: escaped for a terminal, exact for anything else."""

    def __init__(self, stream: BinaryIO, *, terminal: bool) -> None:
        self._stream = stream
        self._terminal = terminal
        # Incremental, so that a character cut in two by a chunk's end is shown whole.
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def write(self, data: bytes) -> None:
        """Write the next piece and let the reader see it at once."""
        self._stream.write(self._for_reader(data, final=False))
        self._stream.flush()

    def close(self) -> None:
        """Write what an incomplete last character left over. The stream itself stays open."""
        self._stream.write(self._for_reader(b"", final=True))
        self._stream.flush()

    def _for_reader(self, data: bytes, *, final: bool) -> bytes:
        return visible(self._decoder.decode(data, final)).encode() if self._terminal else data


def output_writers() -> dict[str, OutputWriter]:
    """Return writers for `stdout` and `stderr` of evaluations, onto our own."""
    return {
        "stdout": OutputWriter(sys.stdout.buffer, terminal=sys.stdout.isatty()),
        "stderr": OutputWriter(sys.stderr.buffer, terminal=sys.stderr.isatty()),
    }
