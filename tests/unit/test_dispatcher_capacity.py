"""The books of a node: what is promised never exceeds what is there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible.contracts import Fit
from crucible.dispatcher.capacity import Ledger
from crucible.evaluation import Resources
from crucible.quantity import MIB

pytestmark = pytest.mark.unit

TOTAL = Resources(cpu_millis=2000, memory_bytes=1024 * MIB)


def wanted(cpu: int = 500, memory: int = 256) -> Resources:
    return Resources(cpu_millis=cpu, memory_bytes=memory * MIB)


@pytest.fixture
def ledger() -> Ledger:
    return Ledger("here", "bubblewrap", TOTAL)


def test_an_empty_node_takes_all_that_it_has(ledger: Ledger) -> None:
    answer = ledger.check(TOTAL)

    assert (answer.fit, answer.reason, answer.largest) == (Fit.NOW, None, TOTAL)


@pytest.mark.parametrize("request_", [wanted(cpu=2001), wanted(memory=1025)])
def test_more_than_the_node_has_never_fits_and_the_answer_says_what_would(ledger: Ledger, request_: Resources) -> None:
    answer = ledger.check(request_)

    assert answer.fit is Fit.NEVER
    assert answer.reason is not None
    assert "the largest node has 2 CPU and 1Gi" in answer.reason
    assert answer.largest == TOTAL


def test_what_is_short_is_named_with_how_much_is_free(ledger: Ledger) -> None:
    ledger.reserve("a", wanted(cpu=1500, memory=900))

    answer = ledger.check(wanted(cpu=600, memory=200))

    assert answer.fit is Fit.LATER
    assert answer.reason == "500m of 2 CPU and 124Mi of 1Gi memory free now, held by 1 running"


def test_a_check_takes_nothing(ledger: Ledger) -> None:
    ledger.check(TOTAL)

    assert ledger.report().free_cpu_millis == 2000


def test_a_refused_reservation_takes_nothing(ledger: Ledger) -> None:
    ledger.reserve("a", wanted(cpu=1500))
    refused = ledger.reserve("b", wanted(cpu=600))

    assert refused.fit is Fit.LATER
    assert (ledger.report().free_cpu_millis, ledger.report().sandboxes) == (500, 1)


def test_reserving_twice_holds_once_and_releasing_twice_is_harmless(ledger: Ledger) -> None:
    assert ledger.reserve("a", wanted()).fit is Fit.NOW
    assert ledger.reserve("a", wanted()).fit is Fit.NOW
    assert ledger.report().free_cpu_millis == 1500

    ledger.release("a")
    ledger.release("a")
    ledger.release("never there")
    report = ledger.report()
    assert (report.free_cpu_millis, report.free_memory_bytes, report.sandboxes) == (2000, 1024 * MIB, 0)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(1, 2500), st.integers(1, 1200)), max_size=60))
def test_the_books_balance_whatever_happens(steps: list[tuple[bool, int, int, int]]) -> None:
    ledger = Ledger("here", "bubblewrap", TOTAL)
    held: dict[int, Resources] = {}
    for reserve, holder, cpu, memory in steps:
        if reserve:
            resources = wanted(cpu, memory)
            if ledger.reserve(holder, resources).fit is Fit.NOW:
                held.setdefault(holder, resources)
        else:
            ledger.release(holder)
            held.pop(holder, None)
        report = ledger.report()
        assert 0 <= report.free_cpu_millis == 2000 - sum(each.cpu_millis for each in held.values())
        assert 0 <= report.free_memory_bytes == 1024 * MIB - sum(each.memory_bytes for each in held.values())
        assert report.sandboxes == len(held)
