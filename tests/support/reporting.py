"""What a test run says about what it did not do.

A skipped test is a hole in what a green run shows. So the run ends with every skip, its reason and how to make it run;
and in CI (`CI=true`) a skip fails, unless it was made by naming a missing capability (`capabilities.needs`) that CI may
lack. A module that skips itself fails everywhere. The unit tier's time is reported beside its budget; it is a figure, not a
test, since a busy machine is no defect.
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

from tests.support.capabilities import capability, miss, missing_in, why_missing
from tests.support.unit_tier import BUDGET_SECONDS

TESTS = Path(__file__).parents[1]
# The property that marks a report as a capability skip; it also lands in the JUnit report.
MISSING = "missing-capability"
INSTEAD = "use tests.support.capabilities.needs(...), or delete the test"


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
        self._tiers: set[str] = set()
        self._started = time.monotonic()

    def pytest_configure(self, config: pytest.Config) -> None:
        """Declare the marker that `needs` puts on tests."""
        config.addinivalue_line("markers", "needs(*capabilities): skipped where the machine lacks one of them")

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Give each test the marker of the tier whose folder it is in."""
        for item in items:
            tier = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
            if marker := {"unit": "unit", "integration": "integration", "kubernetes": "cluster"}.get(tier):
                item.add_marker(marker)

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
                    miss(name, reason, ci=self._ci)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Note in the report which capability a skip names; in CI, turn one that names none into a failure."""
        report = yield
        if _is_skip(report) and (name := missing_in(_said(report))):
            report.user_properties.append((MISSING, name))
        elif self._ci and _is_skip(report):
            report.outcome = "failed"
            report.longrepr = (
                f"skipped without naming a capability, which fails in CI: {INSTEAD} (it said: {_said(report)})"
            )
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        """Fail a whole module that skips itself, anywhere: a module's `pytestmark` can name a capability."""
        report = yield
        if report.outcome == "skipped":
            report.outcome = "failed"
            report.longrepr = f"a module may not skip itself: {INSTEAD} (it said: {_said(report)})"
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what was skipped, and which tier this is. Where tests run in several processes, the reports meet here."""
        self._tiers.add(report.nodeid.partition("::")[0].rpartition("/")[0])
        if _is_skip(report):
            name = dict(report.user_properties).get(MISSING)
            how = capability(str(name)).how_to_run if name else "remove the skip from the test"
            self._skips.append(Skip(report.nodeid, _said(report), how))

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
        if self._tiers == {"tests/unit"}:
            terminalreporter.write_line(unit_tier_line(time.monotonic() - self._started, _processor_seconds()))


def unit_tier_line(took: float, processor: float) -> str:
    """Say what the unit tier took beside its budget; the processors' share tells slow tests from a busy machine."""
    over = "" if took <= BUDGET_SECONDS else "; OVER BUDGET: pytest --durations=10 names the slow tests"
    return f"unit tier: {took:.1f} s of its {BUDGET_SECONDS} s budget, with {processor:.1f} s of processor time{over}"


def _processor_seconds() -> float:
    """Return the processor time of this run and of the programs that it ran."""
    return sum(os.times()[:4])


def _is_skip(report: pytest.TestReport) -> bool:
    return report.skipped and not hasattr(report, "wasxfail")


def _said(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return the reason in a skip's report, which pytest keeps as (file, line, "Skipped: reason")."""
    said = report.longrepr
    return (str(said[2]) if isinstance(said, tuple) else str(said)).removeprefix("Skipped: ")


def in_ci() -> bool:
    """Tell whether this run counts as CI: `CI` is set to something other than nothing, 0 or false."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")
