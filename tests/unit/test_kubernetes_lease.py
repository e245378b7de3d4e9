"""Who leads, decided step by step on a clock of the test's own. A dictionary stands in for the API server's store, with its rule that a
change to what has changed since is refused; `tests/kubernetes` has the real one.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from crucible.kubernetes import lease as leases
from crucible.kubernetes.api import ApiError, Endpoint, KubernetesApi
from crucible.kubernetes.lease import Lease

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.unit

SECONDS = 6.0


class Clock:
    """The one clock of the process."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Store:
    """Leases by name."""

    def __init__(self) -> None:
        self.leases: dict[str, dict[str, Any]] = {}
        self.down = False
        self.version = 0
        self.asked: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.down:
            raise httpx.ConnectError("refused", request=request)
        self.asked.append(request.method)
        body = json.loads(request.content or b"{}")
        if request.method == "POST":
            return self.create(body["metadata"]["name"], body)
        name = request.url.path.rpartition("/")[2]
        if name not in self.leases:
            return self.refusal(404, "NotFound")
        if request.method == "PATCH":
            return self.patch(self.leases[name], body)
        return httpx.Response(200, json=self.leases[name])

    def create(self, name: str, body: dict[str, Any]) -> httpx.Response:
        return self.refusal(409, "AlreadyExists") if name in self.leases else self.put(name, body)

    def patch(self, known: dict[str, Any], body: dict[str, Any]) -> httpx.Response:
        if body["metadata"]["resourceVersion"] != known["metadata"]["resourceVersion"]:
            return self.refusal(409, "Conflict")
        return self.put(known["metadata"]["name"], {**known, "spec": known["spec"] | body["spec"]})

    def put(self, name: str, lease: dict[str, Any]) -> httpx.Response:
        self.version += 1
        lease["metadata"] = lease["metadata"] | {"resourceVersion": str(self.version)}
        self.leases[name] = lease
        return httpx.Response(200, json=lease)

    @staticmethod
    def refusal(code: int, reason: str) -> httpx.Response:
        return httpx.Response(code, json={"code": code, "reason": reason, "message": reason})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(leases, "time", clock)
    return clock


@pytest.fixture
def store() -> Store:
    return Store()


def lease_of(store: Store, holder: str) -> Lease:
    api = KubernetesApi(Endpoint("http://kubernetes.test", tls=False))
    api._http = httpx.AsyncClient(base_url=api.server, transport=httpx.MockTransport(store))
    return Lease(api, "here", "lead", holder=holder, seconds=SECONDS)


async def test_one_holds_it_and_the_other_waits(store: Store, clock: Clock) -> None:
    one, two = lease_of(store, "one"), lease_of(store, "two")
    assert (await one.try_hold(), await two.try_hold()) == (True, False)
    for _ in range(20):
        clock.now += SECONDS / 3
        assert (await one.try_hold(), await two.try_hold()) == (True, False)
        assert (one.held, two.held) == (True, False)


async def test_a_holder_that_falls_silent_gives_up_before_anyone_takes_over(store: Store, clock: Clock) -> None:
    one, two = lease_of(store, "one"), lease_of(store, "two")
    await one.try_hold()
    await two.try_hold()
    given_up = taken = None
    for tenth in range(200):
        clock.now += 0.1
        if given_up is None and not one.held:
            given_up = tenth
        if taken is None and await two.try_hold():
            taken = tenth
    assert given_up is not None
    assert taken is not None
    assert given_up < taken
    assert taken * 0.1 < SECONDS + 1.5  # whole seconds are what the API has
    assert store.leases["lead"]["spec"]["leaseTransitions"] == 1


async def test_a_silent_holders_lease_is_taken_when_it_runs_out_and_without_asking_who_has_it(
    store: Store, clock: Clock
) -> None:
    one, two = lease_of(store, "one"), lease_of(store, "two")
    await one.try_hold()
    assert one.free_in() == float("inf")
    await two.try_hold()
    assert two.free_in() == SECONDS
    clock.now += SECONDS - 1
    assert two.free_in() == 1
    clock.now += 1.01
    assert two.free_in() == 0
    store.asked.clear()
    assert await two.try_hold() is True
    assert store.asked == ["PATCH"]


async def test_a_holder_that_has_renewed_since_it_was_seen_keeps_its_lease(store: Store, clock: Clock) -> None:
    one, two = lease_of(store, "one"), lease_of(store, "two")
    await one.try_hold()
    await two.try_hold()
    clock.now += SECONDS + 0.01
    assert await one.try_hold() is True
    assert await two.try_hold() is False
    assert (one.held, two.free_in()) == (True, SECONDS)


async def test_a_lease_that_was_deleted_is_made_again(store: Store, clock: Clock) -> None:
    one = lease_of(store, "one")
    await one.try_hold()
    store.leases.clear()
    assert await one.try_hold() is True
    assert store.leases["lead"]["spec"]["holderIdentity"] == "one"


async def test_wall_clocks_that_disagree_change_nothing(store: Store, clock: Clock) -> None:
    one, two = lease_of(store, "one"), lease_of(store, "two")
    await one.try_hold()
    store.leases["lead"]["spec"]["renewTime"] = "1999-01-01T00:00:00.000000Z"
    assert await two.try_hold() is False


async def test_of_two_that_reach_for_it_at_once_one_has_it(store: Store, clock: Clock) -> None:
    one, two = lease_of(store, "one"), lease_of(store, "two")
    await one.try_hold()
    await one.release()
    found = json.loads(json.dumps(store.leases["lead"]))
    assert await two._take(found, clock.now) is True
    assert await one._take(found, clock.now) is False
    assert (one.held, two.held) == (False, True)


async def test_what_is_released_is_free_at_once(store: Store, clock: Clock) -> None:
    one, two = lease_of(store, "one"), lease_of(store, "two")
    await one.try_hold()
    await one.release()
    assert not one.held
    assert await two.try_hold() is True


async def test_without_an_answer_it_is_held_until_it_has_run_out(store: Store, clock: Clock) -> None:
    one = lease_of(store, "one")
    await one.try_hold()
    store.down = True
    with pytest.raises(ApiError):
        await one.try_hold()
    assert one.held
    clock.now += SECONDS * 2 / 3
    assert not one.held
