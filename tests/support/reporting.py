"""What a test run says about what it did not do.

A skipped test is a hole in what a green run shows. So the run ends with every skip, its reason and how to make it run;
and in CI (`CI=true`) a skip fails, unless it was made by naming a missing capability (`capabilities.needs`) that CI may
lack. The unit tier's time is reported beside its budget; it is a figure, not a test, since a busy machine is no defect.
"""

from __future__ import annotations

import gc
import os
import time
from collections import defaultdict
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.capabilities import capability, why_missing
from tests.support.unit_tier import BUDGET_SECONDS

TESTS = Path(__file__).parents[1]
# The property that marks a report as a capability skip; it also lands in the JUnit report.
MISSING = "missing-capability"
UNEXPLAINED = (
    "skipped without naming a capability, which fails in CI: use tests.support.capabilities.needs(...), "
    "or delete the test"
)


@dataclass(frozen=True)
class Skip:
    """One test that did not run."""

    test: str
    reason: str
    how_to_run: str


class RunReport:
    """Turns skips into failures where they may not be, and gathers what the run's last lines say."""

    def __init__(self, *, ci: bool) -> None:
        self._ci = ci
        self._skips: list[Skip] = []
        self._unit_tests = 0
        self._started = time.monotonic()

    def pytest_configure(self, config: pytest.Config) -> None:
        """Declare the marker that `needs` puts on tests."""
        config.addinivalue_line("markers", "needs(*capabilities): skipped where the machine lacks one of them")

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Give each test the marker of the tier whose folder it is in, and count the unit tier."""
        for item in items:
            tier = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
            if tier in ("unit", "integration"):
                item.add_marker(tier)
            self._unit_tests += tier == "unit"
        if self._unit_tests < len(items):
            self._unit_tests = 0  # The budget is the unit tier's alone.

    def pytest_collection_finish(self) -> None:
        """Take what is loaded by now out of the garbage collector's rounds, which otherwise cost the unit tier a tenth of its time."""
        gc.collect()
        gc.freeze()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Skip, or in CI fail, a test whose needs this machine does not meet."""
        for marker in item.iter_markers("needs"):
            for name in marker.args:
                if reason := why_missing(name):
                    self._miss(item, name, reason)

    def _miss(self, item: pytest.Item, name: str, reason: str) -> None:
        missing = capability(name)
        if self._ci and missing.required_in_ci:
            pytest.fail(f"CI must have {name!r}, but {reason}. To have it: {missing.how_to_run}", pytrace=False)
        item.user_properties.append((MISSING, name))
        pytest.skip(f"needs {name}: {reason}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Record a skip, and fail it in CI if it names no capability."""
        report = yield
        if not report.skipped or hasattr(report, "wasxfail"):
            return report
        name = dict(report.user_properties).get(MISSING)
        if name is None and self._ci:
            report.outcome = "failed"
            report.longrepr = f"{UNEXPLAINED} (it said: {_said(report.longrepr)})"
            return report
        how = capability(str(name)).how_to_run if name else "remove the skip from the test"
        self._skips.append(Skip(report.nodeid, _said(report.longrepr), how))
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        """Treat a whole module that skips itself in the same way."""
        report = yield
        if report.outcome == "skipped":
            if self._ci:
                report.outcome = "failed"
                report.longrepr = f"{UNEXPLAINED} (it said: {_said(report.longrepr)})"
            else:
                self._skips.append(Skip(report.nodeid, _said(report.longrepr), "remove the skip from the module"))
        return report

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what did not run, why and how to run it, and what the unit tier took."""
        groups: dict[tuple[str, str], list[str]] = defaultdict(list)
        for skip in self._skips:
            groups[skip.reason, skip.how_to_run].append(skip.test)
        if groups:
            terminalreporter.section("not run")
        for (reason, how), tests in groups.items():
            terminalreporter.write_line(f"{len(tests)} skipped: {reason}\n  to run: {how}")
            for test in tests:
                terminalreporter.write_line(f"    {test}")
        if self._unit_tests:
            terminalreporter.write_line(unit_tier_line(time.monotonic() - self._started, _processor_seconds()))


def unit_tier_line(took: float, processor: float) -> str:
    """Say what the unit tier took beside its budget; the processor's share tells slow tests from a busy machine."""
    if took <= BUDGET_SECONDS:
        verdict = ""
    elif processor <= BUDGET_SECONDS:
        verdict = "; over budget, on a machine that was busy with other things"
    else:
        verdict = "; OVER BUDGET: pytest --durations=10 names the slow tests"
    return f"unit tier: {took:.1f} s of its {BUDGET_SECONDS} s budget, {processor:.1f} s of it on a processor{verdict}"


def _processor_seconds() -> float:
    """Return the processor time of this run and of the programs that it ran."""
    return sum(os.times()[:4])


def _said(longrepr: object) -> str:
    """Return the reason in a skip's report, which pytest keeps as (file, line, "Skipped: reason")."""
    text = str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)
    return text.removeprefix("Skipped: ")


def in_ci() -> bool:
    """Tell whether this run counts as CI: `CI` is set to something other than nothing, 0 or false."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")
