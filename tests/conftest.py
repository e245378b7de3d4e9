"""What holds for every tier: how skips are reported (`support/reporting.py`)."""

from __future__ import annotations

import pytest

from tests.support.reporting import RunReport, in_ci


def pytest_configure(config: pytest.Config) -> None:
    """Register the run's report."""
    config.pluginmanager.register(RunReport(ci=in_ci()), "crucible-run-report")
