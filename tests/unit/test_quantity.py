"""Kubernetes quantities: every form is understood exactly, and nothing else is."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible.quantity import GIB, KIB, MIB, QuantityError, format_cpu, format_memory, parse_cpu, parse_memory

pytestmark = pytest.mark.unit

# What the API server gives for each (resource.MustParse(text).Value() and .MilliValue()).
MEMORY = {
    "1": 1,
    "1.": 1,
    "+7": 7,
    ".5": 1,
    "100m": 1,
    "1500m": 2,
    "1u": 1,
    "2n": 1,
    "1k": 10**3,
    "1M": 10**6,
    "1.5G": 1_500_000_000,
    "2T": 2 * 10**12,
    "3P": 3 * 10**15,
    "1E": 10**18,
    "1Ki": KIB,
    "256Mi": 256 * MIB,
    "0.5Gi": GIB // 2,
    "1Ti": 2**40,
    "1Pi": 2**50,
    "1Ei": 2**60,
    "1e3": 1000,
    "1E3": 1000,
    "12e-1": 2,
    "1e+2": 100,
    "9223372036854775807": 2**63 - 1,
}
CPU = {
    "1": 1000,
    "250m": 250,
    "0.5": 500,
    "0.0001": 1,
    "1500u": 2,
    "100n": 1,
    "2k": 2_000_000,
    "1e-3": 1,
    "1.0005": 1001,
}
JUNK = [
    "",
    " ",
    "abc",
    "Mi",
    ".",
    "-1",
    "-256Mi",
    "--1",
    "+-1",
    "1 Mi",
    " 1Mi",
    "1Mi ",
    "1Mi\n",
    "1mi",
    "1MI",
    "1KB",
    "1K",
    "1ki",
    "1MiB",
    "1e",
    "1e3Mi",
    "1e1000",
    "1e3.5",
    "1.2.3",
    "1,5Gi",
    "1_000",
    "0x10",
    "NaN",
    "nan",
    "inf",
    "Infinity",
    "1\x00",
    "\u0661\u0662",  # Arabic-Indic digits, which int() accepts
    "1\uff2d",  # a full-width M
    "\ud800",
    "9" * 33,
]
UNUSABLE = ["0", "0Mi", "0e9", "0.000", "9223372036854775808", "8Ei", "99E", "1e99"]


def test_memory_is_understood_as_kubernetes_does() -> None:
    assert {text: parse_memory(text) for text in MEMORY} == MEMORY


def test_cpu_is_understood_as_kubernetes_does() -> None:
    assert {text: parse_cpu(text) for text in CPU} == CPU


@pytest.mark.parametrize(("parse", "example"), [(parse_memory, "256Mi"), (parse_cpu, "250m")])
def test_anything_else_is_refused_with_an_example_in_plain_ascii(parse: Callable[[str], int], example: str) -> None:
    for text in [*JUNK, *UNUSABLE]:
        with pytest.raises(QuantityError) as refused:
            parse(text)
        assert example in str(refused.value)
        assert str(refused.value).isascii()
        assert len(str(refused.value)) < 250


@given(st.text())
def test_no_text_raises_anything_but_a_quantity_error(text: str) -> None:
    for parse in (parse_memory, parse_cpu):
        try:
            assert parse(text) > 0
        except QuantityError:
            continue


@given(st.integers(1, 2**63 - 1))
def test_printed_memory_parses_to_the_same_bytes(size: int) -> None:
    assert parse_memory(format_memory(size)) == size


@given(st.integers(1, 10**12))
def test_printed_cpu_parses_to_the_same_millicores(millicores: int) -> None:
    assert parse_cpu(format_cpu(millicores)) == millicores


_DIGITS = st.text("0123456789", min_size=1, max_size=12)
_SCALES = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "Ki": KIB,
    "Mi": MIB,
    "Gi": GIB,
    "m": Fraction(1, 1000),
    "e3": 1000,
}


@st.composite
def quantities(draw: st.DrawFn) -> tuple[str, Fraction]:
    """A quantity as text, with its exact value worked out another way."""
    whole, rest, suffix = draw(_DIGITS), draw(_DIGITS), draw(st.sampled_from(list(_SCALES)))
    value = (int(whole) + Fraction(int(rest), 10 ** len(rest))) * _SCALES[suffix]
    return f"{whole}.{rest}{suffix}", value


@given(quantities())
def test_a_quantity_is_rounded_up_from_its_exact_value(quantity: tuple[str, Fraction]) -> None:
    text, value = quantity
    if 0 < value <= 2**63 - 1:
        assert parse_memory(text) == math.ceil(value)
        assert parse_cpu(text) == math.ceil(value * 1000)


@given(quantities(), quantities())
def test_a_larger_quantity_never_parses_to_less(left: tuple[str, Fraction], right: tuple[str, Fraction]) -> None:
    (small, low), (large, high) = sorted((left, right), key=lambda pair: pair[1])
    if low > 0 and high <= 2**63 - 1:
        assert parse_memory(small) <= parse_memory(large)
        assert parse_cpu(small) <= parse_cpu(large)


def test_digits_beyond_a_float_are_not_lost() -> None:
    assert parse_memory("1." + "0" * 29 + "1") == 2
