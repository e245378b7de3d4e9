"""What a benchmark prints: one line per figure, each with the reference that it was measured beside."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass
class Figure:
    """One line of the result."""

    name: str
    value: str
    reference: str = ""
    ratio: str = ""
    goal: str = ""


def percentile(values: Sequence[float], share: float) -> float:
    """Return the nearest-rank percentile of values; `share` is 0 to 1."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def show(figures: Sequence[Figure], *, as_json: bool) -> None:
    """Print the result, as a table or as one JSON document."""
    if as_json:
        print(json.dumps([asdict(figure) for figure in figures], indent=2))
        return
    rows = [
        ("figure", "measured", "reference", "ratio", "goal"),
        *((each.name, each.value, each.reference, each.ratio, each.goal) for each in figures),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
