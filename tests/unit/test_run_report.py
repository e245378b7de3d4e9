"""The run's own report, tried on small runs inside this one."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest

from tests.support import capabilities
from tests.support.capabilities import Capability, needs
from tests.support.reporting import RunReport, unit_tier_line
from tests.support.unit_tier import NetworkInUnitTierError

pytestmark = pytest.mark.unit
pytest_plugins = ["pytester"]

SKIPS = """
    import pytest
    from tests.support.capabilities import miss, needs

    @pytest.fixture
    def cupboard(): miss("optional", "there is no cupboard", ci=True)

    def test_of_a_fixture(cupboard): raise AssertionError("ran")

    @needs("optional")
    def test_optional(): raise AssertionError("ran")

    @needs("vital")
    def test_vital(): raise AssertionError("ran")

    @needs("there")
    def test_there(): pass

    @pytest.mark.skip(reason="no time")
    def test_lazy(): raise AssertionError("ran")
"""
SKIPPED_MODULE = """
    import pytest
    pytest.skip("not today", allow_module_level=True)
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], pytest.RunResult]]:
    """Run the two files above under a report of their own, on a machine with made-up capabilities."""
    for made_up in (
        Capability("optional", lambda: "the cupboard is bare", "fill the cupboard"),
        Capability("vital", lambda: "the pump is broken", "mend the pump", required_in_ci=True),
        Capability("there", lambda: None, "nothing to do"),
    ):
        monkeypatch.setitem(capabilities._CAPABILITIES, made_up.name, made_up)
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function")
    pytester.makepyfile(test_skips=SKIPS, test_skipped_module=SKIPPED_MODULE)
    yield lambda ci: pytester.runpytest_inprocess("--continue-on-collection-errors", plugins=[RunReport(ci=ci)])
    capabilities.why_missing.cache_clear()


def test_a_developers_run_skips_and_says_what_why_and_how_to_run_it(run: Callable[[bool], pytest.RunResult]):
    result = run(False)
    result.assert_outcomes(passed=1, skipped=4, errors=1)
    result.stdout.fnmatch_lines(
        [
            "a module may not skip itself: * (it said: not today)",
            "*= not run =*",
            "1 skipped: needs optional: there is no cupboard",
            "  to run: fill the cupboard",
            "    *::test_of_a_fixture",
            "1 skipped: needs optional: the cupboard is bare",
            "  to run: fill the cupboard",
            "    *::test_optional",
            "1 skipped: needs vital: the pump is broken",
            "1 skipped: no time",
            "    *::test_lazy",
        ]
    )


def test_ci_fails_skips_that_name_no_capability_and_capabilities_it_must_have(run: Callable[[bool], pytest.RunResult]):
    result = run(True)
    result.assert_outcomes(passed=1, skipped=2, errors=3)
    result.stdout.fnmatch_lines(
        [
            "CI must have 'vital', but the pump is broken. To have it: mend the pump",
            "skipped without naming a capability, which fails in CI: * (it said: no time)",
            "1 skipped: needs optional: the cupboard is bare",
        ]
    )


def test_the_unit_tiers_time_is_told_beside_its_budget():
    assert unit_tier_line(4, 3.5) == "unit tier: 4.0 s of its 10 s budget, with 3.5 s of processor time"
    assert "OVER BUDGET" in unit_tier_line(16, 12)


def test_an_unknown_capability_is_a_mistake_that_names_the_known_ones():
    with pytest.raises(LookupError, match=r"no capability is called 'sandbx'.*sandbox"):
        needs("sandbx")


@pytest.mark.parametrize(
    "reach",
    [
        lambda: socket.create_connection(("127.0.0.1", 9), timeout=0.1),
        lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).sendto(b"x", ("::1", 9)),
        lambda: socket.socket().bind(("127.0.0.1", 0)),
        lambda: socket.gethostbyname("localhost"),
    ],
    ids=["connect", "send", "listen", "look-up"],
)
def test_a_unit_test_cannot_reach_the_network(reach: Callable[[], object]):
    with pytest.raises(NetworkInUnitTierError):
        reach()


def test_a_unit_test_may_use_unix_sockets():
    left, right = socket.socketpair()
    with left, right:
        left.sendall(b"hello")
        assert right.recv(5) == b"hello"
