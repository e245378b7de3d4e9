"""What holds for every tier: how skips are reported (`support/reporting.py`)."""

from __future__ import annotations

import signal

import pytest

from tests.support.reporting import RunReport, in_ci


def pytest_configure(config: pytest.Config) -> None:
    """Register the run's report, and start from the signal that tests send to programs of ours doing what it does by default."""
    # A shell that starts this in the background has it ignore Ctrl-C, and everything that it starts would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.pluginmanager.register(RunReport(ci=in_ci()), "crucible-run-report")
