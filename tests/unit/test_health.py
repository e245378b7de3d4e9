"""Health: a service's own, from memory, fast, and honest about a check that breaks or a loop that stands still."""

from __future__ import annotations

from types import SimpleNamespace

import httpx
import pytest

from crucible import health as module
from crucible.health import Health, Heartbeat
from crucible.service import make_app

pytestmark = pytest.mark.unit


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(module, "time", clock)
    return clock


def client(health: Health) -> httpx.AsyncClient:
    app = make_app("storage", health, title="t", description="d")
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service")


async def test_a_healthy_service_says_so_on_all_three_paths() -> None:
    health = Health("storage", "1.2.3")
    health.add("database", lambda: None)
    async with client(health) as http:
        for path, status in (("/healthz", "ok"), ("/readyz", "ready"), ("/health", "healthy")):
            answer = await http.get(path)
            assert (answer.status_code, answer.json()["status"]) == (200, status)
        report = (await http.get("/health")).json()
    assert (report["service"], report["version"], report["checks"]) == ("storage", "1.2.3", {"database": "ok"})


async def test_a_problem_takes_it_out_of_service_but_does_not_get_it_killed() -> None:
    health = Health("storage", "1")
    health.add("database", lambda: "no connection for 7 s")
    health.add("relay", lambda: None)
    async with client(health) as http:
        assert (await http.get("/healthz")).status_code == 200
        ready = await http.get("/readyz")
        detail = await http.get("/health")
    assert ready.status_code == 503
    assert ready.json() == {"status": "not ready", "problems": {"database": "no connection for 7 s"}}
    assert detail.json()["status"] == "unhealthy"
    assert detail.json()["checks"] == {"database": "no connection for 7 s", "relay": "ok"}


async def test_a_draining_service_is_alive_and_not_ready() -> None:
    health = Health("api", "1")
    health.draining = True
    async with client(health) as http:
        assert (await http.get("/healthz")).status_code == 200
        ready = await http.get("/readyz")
    assert ready.status_code == 503
    assert "draining" in ready.json()["problems"]["lifecycle"]


async def test_a_check_that_breaks_is_a_problem_of_its_own_and_hides_no_other() -> None:
    health = Health("api", "1")
    health.add("broken", lambda: str(1 // 0))
    health.add("other", lambda: "is wrong")
    async with client(health) as http:
        ready = await http.get("/readyz")
    assert ready.status_code == 503
    assert ready.json()["problems"] == {"broken": "the check itself failed: ZeroDivisionError", "other": "is wrong"}


def test_uptime_counts_from_the_start(clock: SimpleNamespace) -> None:
    health = Health("api", "1")
    clock.now += 12.34
    assert health.report()["uptime_seconds"] == 12.3


def test_a_loop_that_stands_still_is_seen_once_its_last_beat_is_too_old(clock: SimpleNamespace) -> None:
    heartbeat = Heartbeat(10.0)
    clock.now += 10.0
    assert heartbeat.check() is None
    clock.now += 1.0
    assert heartbeat.check() == "no progress for 11 s (limit 10 s)"
    heartbeat.beat()
    assert heartbeat.check() is None
