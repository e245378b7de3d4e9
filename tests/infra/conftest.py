"""What holds for every test of the infrastructure: it is a unit test, and it has no network."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.unit_tier import no_network


@pytest.fixture(autouse=True)
def _no_network() -> Iterator[None]:
    with no_network():
        yield
