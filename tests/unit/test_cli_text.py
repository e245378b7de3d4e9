"""What a stranger's program prints must not command the reader's terminal; into a pipe it goes byte for byte."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from crucible.cli.text import OutputWriter, plain, visible

pytestmark = pytest.mark.unit


def shown(*chunks: bytes, terminal: bool) -> bytes:
    stream = io.BytesIO()
    writer = OutputWriter(stream, terminal=terminal)
    for chunk in chunks:
        writer.write(chunk)
    writer.close()
    return stream.getvalue()


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\x9b31m", r"\x9b31m"),
        ("safe\rEVIL", r"safe\x0dEVIL"),
        ("a\x08b\x7f", r"a\x08b\x7f"),
        ("user\u202etxt.exe", r"user\u202etxt.exe"),
        ("zero\u200bwidth", r"zero\u200bwidth"),
        ("tag\U000e0041", r"tag\U000e0041"),
        ("line\u2028break", r"line\u2028break"),
        ("kept\tas\nit is: äöü 漢字 😀", "kept\tas\nit is: äöü 漢字 😀"),
    ],
)
def test_what_could_steer_a_terminal_is_written_out(text: str, seen: str) -> None:
    assert visible(text) == seen


@given(st.binary(max_size=300), st.integers(0, 300))
def test_a_terminal_never_receives_a_control_character(data: bytes, cut: int) -> None:
    text = shown(data[:cut], data[cut:], terminal=True).decode()
    assert not [c for c in text if c not in "\n\t" and (ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0)]


@given(st.lists(st.binary(max_size=50)))
def test_a_pipe_receives_every_byte_as_it_was(chunks: list[bytes]) -> None:
    assert shown(*chunks, terminal=False) == b"".join(chunks)


@given(st.text(alphabet="aä漢😀\n", max_size=30), st.data())
def test_a_character_that_is_cut_between_two_pieces_is_shown_whole(text: str, data: st.DataObject) -> None:
    encoded = text.encode()
    cut = data.draw(st.integers(0, len(encoded)))
    assert shown(encoded[:cut], encoded[cut:], terminal=True).decode() == text


def test_bytes_that_are_not_utf8_are_shown_as_escapes_on_a_terminal() -> None:
    assert shown(b"ok \xff\xfe \xe2\x82", terminal=True) == rb"ok \xff\xfe \xe2\x82"


def test_markup_in_a_strangers_words_is_not_read_as_markup() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    console.print(plain("[link=http://evil.example]click[/link] [red]x"))
    assert console.file.getvalue() == "[link=http://evil.example]click[/link] [red]x\n"  # type: ignore[attr-defined]
