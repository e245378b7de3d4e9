"""How long waits for evaluations last: the four things that decide, on a clock of their own; and the wait that obeys them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import httpx
import pytest

from crucible.quantity import GIB, MIB
from tests.support.patience import (
    CONSTRAINED,
    POWERFUL,
    STANDARD,
    Cluster,
    FixedPatience,
    Patience,
    free_in_quota,
    memory_of_nodes,
    profile_for,
)
from tests.support.platform import Client
from tests.support.waits import WaitTimeoutError, calibrated, wait_for

pytestmark = pytest.mark.unit

ROOMY = Cluster(memory_bytes=16 * GIB, free_bytes=5 * GIB)


def patience(cluster: Cluster | None = ROOMY, **options: Any) -> Patience:
    return Patience(cluster, environ={}, **options)


# --- quota ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "seconds"), [(1, 20), (10, 20), (11, 30), (100, 110)])
def test_what_does_not_fit_at_once_waits_in_waves(count: int, seconds: int) -> None:
    assert patience().budget(count) == seconds


def test_memory_bounds_a_wave_before_the_profile_does() -> None:
    assert patience(Cluster(16 * GIB, GIB)).budget(4) == 30
    assert patience(Cluster(16 * GIB, GIB), evaluation_bytes=256 * MIB).budget(4) == 20


def test_a_full_cluster_still_runs_one_at_a_time() -> None:
    assert patience(Cluster(16 * GIB, 0)).budget(3) == 40


def test_an_unknown_cluster_gets_the_fall_back() -> None:
    assert patience(None).budget(100) == 60


@pytest.mark.parametrize(
    ("status", "left"),
    [
        ({"hard": {"limits.memory": "2Gi"}, "used": {"limits.memory": "512Mi"}}, 3 * GIB // 2),
        ({"hard": {"limits.memory": "2Gi"}, "used": {"limits.memory": "0"}}, 2 * GIB),
        ({"hard": {"limits.memory": "1G"}, "used": {"limits.memory": "1Gi"}}, 0),
        ({"hard": {"limits.memory": "0"}}, 0),
        ({"hard": {"pods": "10"}}, None),
    ],
)
def test_a_quota_is_read_in_whatever_units_it_is_written(status: dict[str, Any], left: int | None) -> None:
    assert free_in_quota(status) == left


def test_the_memory_of_nodes_adds_up_across_units() -> None:
    assert memory_of_nodes(["1Gi", "1024Mi", "1048576Ki", "1073741824"]) == 4 * GIB


# --- profiles and calibration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "profile"),
    [(8 * GIB - 1, CONSTRAINED), (8 * GIB, STANDARD), (32 * GIB - 1, STANDARD), (32 * GIB, POWERFUL), (None, STANDARD)],
)
def test_the_profile_follows_the_memory(memory: int | None, profile: object) -> None:
    assert profile_for(memory) is profile


def test_the_environment_overrides_the_memory_and_auto_does_not() -> None:
    assert Patience(ROOMY, environ={"CLUSTER_PROFILE": "constrained"}).budget(10) == 60
    assert Patience(ROOMY, environ={"CLUSTER_PROFILE": "auto"}).profile is STANDARD
    with pytest.raises(LookupError, match="CLUSTER_PROFILE=huge is none of: auto, constrained, standard, powerful"):
        Patience(ROOMY, environ={"CLUSTER_PROFILE": "huge"})


@pytest.mark.parametrize(("measured", "slowness"), [(None, 1), (0.5, 1), (3, 1), (6, 2), (31, 3), (600, 3)])
def test_a_slow_baseline_prolongs_every_wait_and_a_fast_one_shortens_none(measured: float, slowness: float) -> None:
    slow = patience(baseline_seconds=measured)
    assert slow.slowness == slowness
    assert slow.budget(10) == 20 * slowness


# --- progress ---------------------------------------------------------------------------------------------------------------


def test_a_wait_ends_with_its_budget_if_nothing_moves() -> None:
    waiting = patience()
    waiting.begin(10, now=100)
    assert waiting.left(100) == 20
    assert waiting.left(120) == 0


def test_progress_carries_a_wait_past_its_budget_but_not_past_its_limit() -> None:
    waiting = patience(limit_seconds=40)
    waiting.begin(10, now=0)
    waiting.moved(19)
    assert waiting.left(20) == 9
    waiting.moved(39)
    assert waiting.left(39) == 1


def test_a_fixed_wait_is_not_prolonged_by_anything() -> None:
    waiting = FixedPatience(5)
    waiting.begin(100, now=0)
    waiting.moved(4)
    assert waiting.left(4) == 1


def test_the_computed_time_is_logged_with_how_it_came_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "tests.patience"):
        patience(baseline_seconds=6).begin(11, now=0)
    assert (
        "waiting 60 s for 11 evaluations: room for 10, profile standard (x1, 10 at once), slowness x2.00" in caplog.text
    )


# --- the wait itself --------------------------------------------------------------------------------------------------------


class Scene:
    """An API in which evaluations end at given times, a clock that only waiting moves, and news of what ended."""

    def __init__(self, ends: dict[str, float], *, telling: bool = True) -> None:
        self.now = 0.0
        self.asked: list[str] = []
        self._ends = ends
        self._telling = telling
        transport = httpx.MockTransport(self._answer)
        self.client = Client(httpx.AsyncClient(base_url="http://api", transport=transport))

    def clock(self) -> float:
        return self.now

    def _answer(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/capacity":
            limits = {"memory_limit": "16Gi", "memory_limit_bytes": 16 * GIB}
            return httpx.Response(200, json={"nodes": [{"total": limits, "free": limits}]})
        if request.url.path == "/v1/events":
            ended = {"evaluation_id": "ev-1"}
            self.now = 5.0
            return httpx.Response(200, text=f"id: x\n\nevent: completed\ndata: {json.dumps(ended)}\n\n")
        if request.method == "POST":
            return httpx.Response(201, json={"id": "ev-1"})
        one = request.url.path.split("/")[3]
        if request.url.path.endswith("/events"):
            return httpx.Response(200, json={"events": [{"type": "completed", "at": "2026-01-01T00:00:00Z"}]})
        self.asked.append(one)
        # A long poll that is answered when its time is over.
        self.now += float(request.url.params.get("wait", 0))
        ended = self.now >= self._ends[one]
        return httpx.Response(200, json={"id": one, "state": "completed" if ended else "running"})

    async def next(self, outstanding: Sequence[str], seconds: float) -> Collection[str] | None:
        due = min([self._ends[one] for one in outstanding if self._telling], default=float("inf"))
        if due > self.now + seconds:
            self.now += seconds
            return None
        self.now = max(self.now, due)
        return {one for one in outstanding if self._ends[one] <= self.now}

    async def wait(self, ids: list[str], **options: Any) -> list[Any]:
        return await wait_for(self.client, ids, news=self, clock=self.clock, **options)


@pytest.fixture
def three() -> Iterator[Scene]:
    return Scene({"ev-1": 3, "ev-2": 1, "ev-3": 7})  # type: ignore[return-value]


async def test_each_end_is_told_in_the_order_asked_for_with_its_time_and_what_happened(three: Scene) -> None:
    results = await three.wait(["ev-1", "ev-2", "ev-3"], patience=patience())
    assert [(one.evaluation_id, one.status, one.duration) for one in results] == [
        ("ev-1", "completed", 3),
        ("ev-2", "completed", 1),
        ("ev-3", "completed", 7),
    ]
    assert results[0].timeline[0].type == "completed"
    assert results[0].result["id"] == "ev-1"


async def test_only_what_was_told_of_is_asked_for_again(three: Scene) -> None:
    await three.wait(["ev-1", "ev-2", "ev-3"], patience=patience())
    assert three.asked == ["ev-1", "ev-2", "ev-3", "ev-2", "ev-1", "ev-3"]


async def test_a_wait_that_fails_names_what_is_outstanding_and_how_the_time_came_about() -> None:
    scene = Scene({"ev-1": 1, "ev-2": 1000})
    with pytest.raises(
        WaitTimeoutError, match=r"waited 20\.0 s for 1 of 2 evaluations to end; at last ev-2 was running"
    ):
        await scene.wait(["ev-1", "ev-2"], patience=patience())


async def test_an_end_that_nobody_told_of_is_seen_before_the_wait_is_over() -> None:
    scene = Scene({"ev-1": 4}, telling=False)
    (result,) = await scene.wait(["ev-1"], patience=patience())
    assert result.duration == 20


async def test_a_simple_wait_lasts_as_long_as_it_was_told_and_asks_nobody_how_long() -> None:
    with pytest.raises(WaitTimeoutError, match=r"waited 2\.0 s for 1 of 1 evaluations .*as the test says"):
        await Scene({"ev-1": 9}).wait(["ev-1"], simple=True, seconds=2)


async def test_the_event_stream_ends_a_wait_and_the_capacity_decides_how_long_it_may_be() -> None:
    scene = Scene({"ev-1": 5})
    result = await wait_for(scene.client, "ev-1", clock=scene.clock)
    assert (result.status, result.timeline[0].type) == ("completed", "completed")


async def test_calibration_measures_a_trivial_evaluation_and_judges_the_cluster_by_it() -> None:
    scene = Scene({"ev-1": 6})
    slow = await calibrated(scene.client, clock=scene.clock)
    # The long poll was answered after 20 s, far beyond the 3 s that it should take.
    assert slow.slowness == 3
    assert slow.budget(10) == 60
