"""Kubernetes resource quantities: parse, compare and print them.

The grammar is Kubernetes' own (apimachinery `resource.Quantity`): a decimal number with an optional binary suffix (Ki, Mi, Gi,
Ti, Pi, Ei), decimal suffix (n, u, m, k, M, G, T, P, E) or decimal exponent (`1e3`). Only what a resource limit needs is kept:
values are positive, CPU resolves to whole millicores and memory to whole bytes, both rounded up as the API server does.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

KIB = 1024
MIB = 1024**2
GIB = 1024**3

# Fractions, since rounding up is only right if nothing was rounded before.
_SUFFIXES: dict[str, Fraction] = {
    "n": Fraction(1, 10**9),
    "u": Fraction(1, 10**6),
    "m": Fraction(1, 10**3),
    "": Fraction(1),
    "k": Fraction(10**3),
    "M": Fraction(10**6),
    "G": Fraction(10**9),
    "T": Fraction(10**12),
    "P": Fraction(10**15),
    "E": Fraction(10**18),
    "Ki": Fraction(2**10),
    "Mi": Fraction(2**20),
    "Gi": Fraction(2**30),
    "Ti": Fraction(2**40),
    "Pi": Fraction(2**50),
    "Ei": Fraction(2**60),
}
_PATTERN = re.compile(
    r"\+?(?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:(?P<suffix>[KMGTPE]i|[numkMGTPE])|[eE](?P<exponent>[+-]?[0-9]{1,2}))?"
)
# 64-bit signed, as in Kubernetes: a larger quantity cannot be stored by the API server.
_MAX_VALUE = 2**63 - 1
_MAX_TEXT = 32


class QuantityError(ValueError):
    """The text is not a usable Kubernetes quantity; the message says why and shows what would be accepted."""


def _parse(text: str, example: str) -> Fraction:
    match = _PATTERN.fullmatch(text) if len(text) <= _MAX_TEXT else None
    if match is None:
        shown = text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "..."
        raise QuantityError(f"{shown!a} is not a Kubernetes quantity; write for example {example}")
    scale = Fraction(10) ** int(match["exponent"]) if match["exponent"] else _SUFFIXES[match["suffix"] or ""]
    value = Fraction(match["number"]) * scale
    if value <= 0:
        raise QuantityError(f"{text!r} must be greater than zero; write for example {example}")
    if value > _MAX_VALUE:
        raise QuantityError(f"{text!r} is larger than Kubernetes can store; write for example {example}")
    return value


def parse_cpu(text: str) -> int:
    """Return the millicores that a CPU quantity asks for, rounded up (`"0.5"` -> 500, `"250m"` -> 250).

    Raises:
        QuantityError: not a quantity, zero, or beyond 64 bits.
    """
    return math.ceil(_parse(text, '"250m" or "2"') * 1000)


def parse_memory(text: str) -> int:
    """Return the bytes that a memory quantity asks for, rounded up (`"256Mi"` -> 268435456).

    Raises:
        QuantityError: not a quantity, zero, or beyond 64 bits.
    """
    return math.ceil(_parse(text, '"256Mi" or "1Gi"'))


def format_cpu(millicores: int) -> str:
    """Print millicores the way people write them: whole cores bare, the rest with `m`; parsing it gives them again."""
    return str(millicores // 1000) if millicores % 1000 == 0 else f"{millicores}m"


def format_memory(size: int) -> str:
    """Print bytes with the largest binary suffix that loses nothing; parsing it gives `size` again."""
    for suffix, unit in (("Gi", GIB), ("Mi", MIB), ("Ki", KIB)):
        if size and size % unit == 0:
            return f"{size // unit}{suffix}"
    return str(size)
