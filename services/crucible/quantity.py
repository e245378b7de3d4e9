"""Kubernetes resource quantities: parse, compare and print them.

The grammar is Kubernetes' own (apimachinery `resource.Quantity`): a decimal number with an optional binary suffix (Ki, Mi, Gi,
Ti, Pi, Ei), decimal suffix (m, k, M, G, T, P, E) or decimal exponent (`1e3`). Only what a resource limit needs is kept: values
are non-negative, CPU resolves to whole millicores and memory to whole bytes, both rounded up as the API server does.
"""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Decimal

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_SUFFIXES: dict[str, Decimal] = {
    "m": Decimal("0.001"),
    "": Decimal(1),
    "k": Decimal(10**3),
    "M": Decimal(10**6),
    "G": Decimal(10**9),
    "T": Decimal(10**12),
    "P": Decimal(10**15),
    "E": Decimal(10**18),
    "Ki": Decimal(2**10),
    "Mi": Decimal(2**20),
    "Gi": Decimal(2**30),
    "Ti": Decimal(2**40),
    "Pi": Decimal(2**50),
    "Ei": Decimal(2**60),
}
_PATTERN = re.compile(
    r"(?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:(?P<suffix>[KMGTPE]i|[mkMGTPE])|[eE](?P<exponent>[+-]?[0-9]{1,2}))?"
)
# 64-bit signed, as in Kubernetes: a larger quantity cannot be stored by the API server.
_MAX_VALUE = Decimal(2**63 - 1)
_MAX_TEXT = 32


class QuantityError(ValueError):
    """The text is not a usable Kubernetes quantity; the message says why and shows what would be accepted."""


def _parse(text: str, example: str) -> Decimal:
    match = _PATTERN.fullmatch(text) if len(text) <= _MAX_TEXT and text.isascii() else None
    if match is None:
        shown = text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "…"
        raise QuantityError(f"{shown!r} is not a Kubernetes quantity; write for example {example}")
    value = Decimal(match["number"])
    value = value.scaleb(int(match["exponent"])) if match["exponent"] else value * _SUFFIXES[match["suffix"] or ""]
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
    return int((_parse(text, '"250m" or "2"') * 1000).to_integral_value(ROUND_CEILING))


def parse_memory(text: str) -> int:
    """Return the bytes that a memory quantity asks for, rounded up (`"256Mi"` -> 268435456).

    Raises:
        QuantityError: not a quantity, zero, or beyond 64 bits.
    """
    return int(_parse(text, '"256Mi" or "1Gi"').to_integral_value(ROUND_CEILING))


def format_cpu(millicores: int) -> str:
    """Print millicores the way people write them: whole cores bare, the rest with `m`."""
    return str(millicores // 1000) if millicores % 1000 == 0 else f"{millicores}m"


def format_memory(size: int) -> str:
    """Print bytes with the largest binary suffix that loses nothing; parsing it gives `size` again."""
    for suffix, unit in (("Gi", GIB), ("Mi", MIB), ("Ki", KIB)):
        if size and size % unit == 0:
            return f"{size // unit}{suffix}"
    return str(size)
