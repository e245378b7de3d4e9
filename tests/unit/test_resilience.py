"""Calls between services: repeated only where that may help and cannot harm, bounded, and held back while the other is down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import purgatory.domain.model
import pytest
import stamina

from crucible import metrics, resilience
from crucible.resilience import RETRYABLE_STATUSES, CallFailedError, ServiceCaller

pytestmark = pytest.mark.unit

ATTEMPTS = 5
Answer = httpx.Response | Exception | int


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    with stamina.set_testing(True, attempts=ATTEMPTS, cap=True):
        yield


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The breaker's clock; set `now` to let time pass."""
    clock = SimpleNamespace(now=1000.0, time=lambda: clock.now)
    monkeypatch.setattr(purgatory.domain.model, "time", clock)
    return clock


class Service:
    """A service that answers what it is told to: the given answers in turn, then the last one for ever."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer) if isinstance(answer, int) else answer


@asynccontextmanager
async def calling(service: Callable[[httpx.Request], Any], target: str = "storage") -> AsyncIterator[ServiceCaller]:
    async with httpx.AsyncClient(transport=httpx.MockTransport(service), base_url="http://service") as client:
        yield ServiceCaller(target, client)


async def outcome(service: Service, *, idempotent: bool = True, **kwargs: Any) -> tuple[int | CallFailedError, int]:
    """Call once; return the status or the error, and how many requests that took."""
    async with calling(service) as caller:
        try:
            answer: int | CallFailedError = (
                await caller.call("POST", "/x", idempotent=idempotent, **kwargs)
            ).status_code
        except CallFailedError as error:
            answer = error
    return answer, len(service.requests)


# --- what is repeated -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", sorted(RETRYABLE_STATUSES))
async def test_a_failure_that_may_pass_is_tried_again(status: int) -> None:
    assert await outcome(Service(status, status, 200)) == (200, 3)


@pytest.mark.parametrize(
    "error",
    [
        httpx.ConnectError("refused"),
        httpx.ConnectTimeout("slow"),
        httpx.PoolTimeout("busy"),
        httpx.ReadTimeout("slow"),
        httpx.ReadError("reset"),
        httpx.WriteError("reset"),
        httpx.RemoteProtocolError("closed"),
    ],
)
async def test_a_lost_connection_is_tried_again_where_the_call_may_be_repeated(error: Exception) -> None:
    assert await outcome(Service(error, 200)) == (200, 2)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 410, 413, 422, 500, 501])
async def test_a_failure_that_trying_again_cannot_help_is_not_tried_again(status: int) -> None:
    answer, requests = await outcome(Service(status))
    assert isinstance(answer, CallFailedError)
    assert (answer.status, requests) == (status, 1)


async def test_attempts_are_bounded_and_the_last_failure_is_told() -> None:
    answer, requests = await outcome(Service(503))
    assert isinstance(answer, CallFailedError)
    assert (answer.status, requests) == (503, ATTEMPTS)


@pytest.mark.parametrize(
    "answer",
    [
        httpx.ReadTimeout("slow"),
        httpx.ReadError("reset"),
        httpx.WriteError("reset"),
        httpx.RemoteProtocolError("closed"),
        502,
        504,
    ],
)
async def test_a_call_that_may_have_had_its_effect_is_not_repeated_unless_that_is_harmless(answer: Answer) -> None:
    failed, requests = await outcome(Service(answer, 200), idempotent=False)
    assert isinstance(failed, CallFailedError)
    assert requests == 1


@pytest.mark.parametrize(
    "answer",
    [httpx.ConnectError("refused"), httpx.ConnectTimeout("slow"), httpx.PoolTimeout("busy"), 408, 425, 429, 503],
)
async def test_a_call_that_never_had_its_effect_is_repeated_whatever_it_does(answer: Answer) -> None:
    assert await outcome(Service(answer, 200), idempotent=False) == (200, 2)


async def test_a_mistake_of_ours_is_not_repeated() -> None:
    answer, requests = await outcome(Service(httpx.UnsupportedProtocol("ftp")))
    assert isinstance(answer, CallFailedError)
    assert requests == 1


async def test_a_status_that_the_caller_knows_is_an_answer() -> None:
    assert await outcome(Service(404), ok=(200, 404)) == (404, 1)
    assert await outcome(Service(503), ok=(200, 503)) == (503, 1)


async def test_retries_are_counted() -> None:
    count = metrics.REGISTRY.get_sample_value
    before = count("service_call_retries_total", {"target": "storage"}) or 0
    await outcome(Service(503, 503, 200))
    assert count("service_call_retries_total", {"target": "storage"}) == before + 2


async def test_pauses_grow_are_jittered_and_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def record(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(stamina._core, "_smart_sleep", record)
    stamina.set_testing(False)
    service = Service(503)
    async with calling(service) as caller:
        caller._attempts = 9
        with pytest.raises(CallFailedError):
            await caller.call("GET", "/x")
    assert len(pauses) == 8
    for number, pause in enumerate(pauses):
        least = min(0.05 * 2**number, 2.0)
        assert least <= pause <= min(least + 0.05, 2.0)
    assert len({pause - 0.05 * 2**number for number, pause in enumerate(pauses[:4])}) == 4


async def test_no_attempt_begins_after_the_retry_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resilience, "_RETRY_WINDOW_S", 1e-9)
    stamina.set_testing(False)
    _, requests = await outcome(Service(503))
    assert requests == 1


async def test_an_attempt_that_hangs_is_given_up_also_where_httpx_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resilience, "_ATTEMPT_LIMIT_S", 0.01)

    async def hang(_: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async with calling(hang) as caller:
        with pytest.raises(CallFailedError, match="TimeoutError"):
            await caller.call("POST", "/x", idempotent=False)


# --- what a failure says --------------------------------------------------------------------------------------------------


async def test_a_problem_of_the_other_side_is_passed_on() -> None:
    problem = {"type": "/problems/stale-attempt", "detail": "attempt 2 is void", "more": 1}
    answer, _ = await outcome(Service(httpx.Response(409, json=problem)))
    assert isinstance(answer, CallFailedError)
    assert (answer.slug, answer.status, answer.target) == ("stale-attempt", 409, "storage")
    assert str(answer) == "storage: attempt 2 is void"
    assert answer.problem["more"] == 1


@pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b'"text"', b"null", b'{"type": 5}', b'{"type": ""}', b"\xff"])
async def test_an_answer_that_is_no_problem_has_no_slug(body: bytes) -> None:
    answer, _ = await outcome(Service(httpx.Response(400, content=body)))
    assert isinstance(answer, CallFailedError)
    assert answer.slug is None
    assert "400" in str(answer)


# --- the breaker ----------------------------------------------------------------------------------------------------------


async def fail(caller: ServiceCaller, times: int) -> CallFailedError:
    for _ in range(times):
        with pytest.raises(CallFailedError) as failed:
            await caller.call("POST", "/x", idempotent=False)
    return failed.value


def is_open(target: str) -> float | None:
    return metrics.REGISTRY.get_sample_value("circuit_breaker_open", {"target": target})


async def test_after_ten_failures_in_a_row_calls_fail_at_once_with_503(clock: SimpleNamespace) -> None:
    service = Service(httpx.ReadTimeout("dead"))
    async with calling(service, "dead") as caller:
        await fail(caller, 9)
        assert is_open("dead") == 0
        await fail(caller, 1)
        assert is_open("dead") == 1
        held_back = await fail(caller, 50)
    assert (len(service.requests), held_back.status) == (10, 503)
    assert "held back" in str(held_back)


async def test_a_call_held_back_is_not_retried_and_keeps_no_growing_traceback(clock: SimpleNamespace) -> None:
    async with calling(Service(httpx.ReadTimeout("dead"))) as caller:
        await fail(caller, 10)
        depths = set()
        for _ in range(5):
            cause = (await fail(caller, 1)).__cause__
            traceback, depth = cause.__traceback__ if cause else None, 0
            while traceback:
                traceback, depth = traceback.tb_next, depth + 1
            depths.add(depth)
    assert depths == {0}


async def test_it_recovers_after_its_time_with_the_first_answer(clock: SimpleNamespace) -> None:
    service = Service(*[httpx.ReadTimeout("dead")] * 10, 200)
    async with calling(service, "back") as caller:
        await fail(caller, 10)
        clock.now += 1.9
        await fail(caller, 1)
        assert len(service.requests) == 10
        clock.now += 0.2
        assert (await caller.call("GET", "/x")).status_code == 200
        assert is_open("back") == 0
        # And the count of failures begins anew.
        service.answers = [httpx.ReadTimeout("dead")]
        await fail(caller, 9)
        assert is_open("back") == 0


async def test_it_opens_again_at_once_if_the_service_is_still_down(clock: SimpleNamespace) -> None:
    service = Service(httpx.ReadTimeout("dead"))
    async with calling(service, "down") as caller:
        await fail(caller, 10)
        clock.now += 3
        await fail(caller, 5)
        assert is_open("down") == 1
    assert len(service.requests) == 11


@pytest.mark.parametrize("status", [400, 404, 409, 422, 429, 500])
async def test_answers_of_a_living_service_do_not_open_it(clock: SimpleNamespace, status: int) -> None:
    service = Service(status)
    async with calling(service) as caller:
        await fail(caller, 8)
    assert len(service.requests) >= 8
    async with calling(service) as caller:
        last = await fail(caller, 30)
    assert last.status == status


@pytest.mark.parametrize("status", [502, 503, 504])
async def test_answers_that_say_down_open_it(clock: SimpleNamespace, status: int) -> None:
    service = Service(status)
    async with calling(service) as caller:
        await fail(caller, 30)
    assert len(service.requests) == 10


async def test_failures_count_only_in_a_row(clock: SimpleNamespace) -> None:
    error = httpx.ReadTimeout("slow")
    service = Service(*([error] * 9 + [200]) * 5)
    async with calling(service) as caller:
        for _ in range(5):
            await fail(caller, 9)
            assert (await caller.call("POST", "/x", idempotent=False)).status_code == 200
    assert len(service.requests) == 50


async def test_a_caller_that_goes_away_says_nothing_about_the_service(clock: SimpleNamespace) -> None:
    async def hang(_: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async with calling(hang, "slow") as caller:
        for _ in range(20):
            polling = asyncio.create_task(caller.call("GET", "/long-poll"))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            polling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await polling
        assert is_open("slow") == 0


async def test_one_service_that_is_down_does_not_close_another(clock: SimpleNamespace) -> None:
    async with calling(Service(503), "a") as dead, calling(Service(200), "b") as alive:
        await fail(dead, 12)
        assert (await alive.call("GET", "/x")).status_code == 200
