"""How much a test of many takes on: what a run for every change can afford, or all that the platform is held to.

`make test-storm` sets CRUCIBLE_TEST_SCALE=full. What is tested is the same, in the same order; only the numbers differ.
"""

from __future__ import annotations

import os

_VARIABLE = "CRUCIBLE_TEST_SCALE"
_SCALES = ("change", "full")


def at_scale(*, change: int, full: int) -> int:
    """Return the number of this run's scale: `change` unless CRUCIBLE_TEST_SCALE says `full`.

    Raises:
        ValueError: the variable says something else.
    """
    scale = os.environ.get(_VARIABLE, "change")
    if scale not in _SCALES:
        raise ValueError(f"{_VARIABLE}={scale}: say {' or '.join(_SCALES)}")
    return full if scale == "full" else change
