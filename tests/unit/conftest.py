"""What holds for every unit test: it has no network, and asks chance a few times each run rather than often in one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest

from tests.support.unit_tier import no_network

# Every run draws others, so that many small runs see what one large one would. More before a release, or after a change of what is tested.
EXAMPLES = int(os.environ.get("CRUCIBLE_TEST_EXAMPLES", "25"))
hypothesis.settings.register_profile("unit", max_examples=EXAMPLES)
hypothesis.settings.load_profile("unit")


@pytest.fixture(autouse=True)
def _no_network() -> Iterator[None]:
    with no_network():
        yield
