"""What holds for every tier: how skips are reported (`support/reporting.py`)."""

from __future__ import annotations

import signal

import pytest

from tests.support.reporting import RunReport, in_ci


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what a person may want of a run."""
    group = parser.getgroup("crucible")
    group.addoption(
        "--skip-network-isolation",
        action="store_true",
        help="leave out what needs a cluster that enforces network policies; in CI that fails",
    )
    group.addoption(
        "--resource-cleanup",
        # The levels of tests/support/cluster_resources.py, which takes long to import.
        choices=["none", "pods", "all"],
        default="all",
        help="what to remove of what tests made in a cluster: nothing, the Pods, or all; what failed tests made stays with --keep-failed",
    )
    group.addoption("--keep-failed", action="store_true", help="leave in the cluster what failed tests made there")


def pytest_configure(config: pytest.Config) -> None:
    """Register the run's report, and start from the signal that tests send to programs of ours doing what it does by default."""
    # A shell that starts this in the background has it ignore Ctrl-C, and everything that it starts would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.pluginmanager.register(RunReport(ci=in_ci()), "crucible-run-report")
