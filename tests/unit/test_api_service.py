"""The API over stand-ins of storage and the dispatcher (tests/support/fake_storage.py): access, acceptance, cancel, drain, outages.

What depends on the real parts is in tests/integration/test_api_*.py.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import stamina
import structlog

from crucible.api.app import Api, make_api_app
from crucible.api.outputs import OutputChangedError
from crucible.clients import DispatcherClient, StorageClient, http_client
from crucible.contracts import DeadLetter, EvaluationRecord, Role
from crucible.evaluation import Reason, Resources, State
from crucible.frames import Kind
from crucible.problems import KINDS
from crucible.quantity import GIB, MIB
from crucible.settings import Settings
from tests.support.event_stream import OpenStream, open_stream, parse_events
from tests.support.fake_storage import TOKEN, FakePlatform
from tests.support.waits import wait_until_async

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from contextlib import AbstractAsyncContextManager

    from fastapi import FastAPI

pytestmark = pytest.mark.unit

SSE = ("Accept", "text/event-stream")


class Bench:
    """An API in this process, and callers of it."""

    def __init__(self, fake: FakePlatform, api: Api, app: FastAPI) -> None:
        self.fake = fake
        self.api = api
        self.app = app
        self.key = fake.key("ann")
        self.http = self.caller(self.key)

    def caller(self, key: str | None) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://api", headers=headers)

    async def submit(self, code: str = "pass", **fields: Any) -> str:
        response = await self.http.post("/v1/evaluations", json={"code": code, **fields})
        assert response.status_code == 201, response.text
        return response.json()["id"]  # type: ignore[no-any-return]

    def stream(self, path: str, *headers: tuple[str, str], query: str = "") -> AbstractAsyncContextManager[OpenStream]:
        return open_stream(self.app, path, [("Authorization", f"Bearer {self.key}"), *headers], query)


@pytest.fixture(autouse=True)
def _calls_are_tried_again_without_waiting() -> Iterator[None]:
    stamina.set_testing(testing=True, attempts=3, cap=True)
    yield
    stamina.set_testing(testing=False)


# Made once: FastAPI derives the dependencies of every route anew for each app, which takes longer than most tests.
_shared_app: list[FastAPI] = []


@asynccontextmanager
async def make_bench(
    *, outage: str = "", node: Resources | None = None, own_app: bool = False, **api_settings: Any
) -> AsyncIterator[Bench]:
    """Start an API over stand-ins. `own_app`: with health routes of its own, which the app that tests share has not."""
    fake = FakePlatform()
    fake.outage.add(outage)
    if node is not None:
        fake.node = fake.node.model_copy(update={"total": node})
    async with AsyncExitStack() as stack:
        storage = await stack.enter_async_context(http_client(fake.storage_app, TOKEN))
        dispatcher = await stack.enter_async_context(http_client(fake.dispatcher_app, TOKEN))
        settings = Settings(api=api_settings)  # type: ignore[arg-type]
        api = Api(settings, StorageClient(storage), DispatcherClient(dispatcher), fake.bus)
        await api.start()
        stack.push_async_callback(api.aclose)
        if not _shared_app:
            _shared_app.append(make_api_app(api))
        app = make_api_app(api) if own_app else _shared_app[0]
        app.state.api = api
        bench = Bench(fake, api, app)
        await stack.enter_async_context(bench.http)
        yield bench


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with make_bench() as made:
        yield made


def problem(response: httpx.Response, slug: str) -> dict[str, Any]:
    """Hold an answer to what every problem must be, and return its body."""
    body: dict[str, Any] = response.json()
    assert (response.status_code, body["type"]) == (KINDS[slug].status, f"/problems/{slug}"), response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert body["status"] == response.status_code
    assert body["title"]
    assert body["detail"]
    assert body["instance"] == response.headers["x-request-id"]
    if KINDS[slug].retryable:
        assert int(response.headers["retry-after"]) >= 1
    return body


# --- access -----------------------------------------------------------------------------------------------------------------


async def test_without_a_valid_key_nothing_is_answered(bench: Bench) -> None:
    wrong = ("", "Bearer", "Bearer ", "Basic abc", "Bearer nonsense", "Bearer crk_12345678_" + "x" * 43, "Bearer \xff")
    async with bench.caller(None) as http:
        responses = [await http.get("/v1/evaluations")]
        for header in wrong:
            headers = {b"Authorization": header.encode("latin-1")}
            responses.append(await http.get("/v1/evaluations", headers=headers))  # type: ignore[arg-type]
    for response in responses:
        problem(response, "unauthenticated")
        assert response.headers["www-authenticate"] == "Bearer"


async def test_an_expired_key_is_refused_also_while_it_is_cached(bench: Bench) -> None:
    soon = datetime.now(UTC) + timedelta(milliseconds=150)
    async with bench.caller(bench.fake.key("bob", expires_at=soon)) as http:
        assert (await http.get("/v1/me")).status_code == 200

        async def refused() -> bool:
            return (await http.get("/v1/me")).status_code == 401

        await wait_until_async(refused, timeout=2, describe="the key to expire")


async def test_a_verified_key_is_not_looked_up_again_for_a_while(bench: Bench) -> None:
    for _ in range(5):
        await bench.http.get("/v1/me")
    assert sum(call.startswith("GET /internal/keys/") for call in bench.fake.calls) == 1


async def test_a_wrong_key_does_not_ask_storage_each_time(bench: Bench) -> None:
    async with bench.caller("crk_12345678_" + "x" * 43) as http:
        for _ in range(5):
            problem(await http.get("/v1/me"), "unauthenticated")
    assert sum(call.startswith("GET /internal/keys/") for call in bench.fake.calls) == 1


async def test_a_key_revoked_here_stops_at_once(bench: Bench) -> None:
    async with bench.caller(bench.fake.key("root", Role.ADMIN)) as admin:
        assert (await bench.http.get("/v1/me")).json()["owner"] == "ann"
        assert (await admin.delete(f"/v1/keys/{bench.key.split('_')[1]}")).status_code == 204
    problem(await bench.http.get("/v1/me"), "unauthenticated")


async def test_an_admin_cannot_revoke_the_key_in_hand(bench: Bench) -> None:
    key = bench.fake.key("root", Role.ADMIN)
    async with bench.caller(key) as admin:
        problem(await admin.delete(f"/v1/keys/{key.split('_')[1]}"), "conflict")


async def test_a_new_key_is_shown_once_and_works(bench: Bench) -> None:
    async with bench.caller(bench.fake.key("root", Role.ADMIN)) as admin:
        made = await admin.post("/v1/keys", json={"owner": "carol", "role": "operator", "expires_in_days": 1})
        assert made.status_code == 201
        assert made.headers["cache-control"] == "no-store"
        key = made.json()["key"]
        assert key not in (await admin.get("/v1/keys")).text
    async with bench.caller(key) as carol:
        assert (await carol.get("/v1/me")).json() == {
            "owner": "carol",
            "role": "operator",
            "key_id": made.json()["details"]["key_id"],
        }


ADMIN_ONLY = [
    ("GET", "/v1/dead-letters"),
    ("POST", "/v1/dead-letters/replay"),
    ("POST", "/v1/dead-letters/1/replay"),
    ("DELETE", "/v1/dead-letters/1"),
    ("GET", "/v1/keys"),
    ("POST", "/v1/keys"),
    ("DELETE", "/v1/keys/12345678"),
    ("GET", "/v1/admin/storage/usage"),
    ("POST", "/v1/admin/storage/cleanup"),
    ("POST", "/v1/admin/storage/migrate"),
]


async def test_only_an_admin_reaches_the_upkeep(bench: Bench) -> None:
    async with bench.caller(bench.fake.key("op", Role.OPERATOR)) as operator:
        for method, path in ADMIN_ONLY:
            for caller in (bench.http, operator):
                assert "needs the role admin" in problem(await caller.request(method, path), "forbidden")["detail"]


async def test_no_route_of_the_api_answers_without_a_key(bench: Bench) -> None:
    async with bench.caller(None) as nobody:
        spec = (await nobody.get("/openapi.json")).json()
        for path, item in spec["paths"].items():
            if not path.startswith("/v1/"):
                continue
            for method in item:
                concrete = path.format(evaluation_id="ev-" + "0" * 26, stream="stdout", letter_id=1, key_id="12345678")
                problem(await nobody.request(method, concrete), "unauthenticated")


async def test_another_owners_evaluation_is_not_there(bench: Bench) -> None:
    mine = await bench.submit()
    async with bench.caller(bench.fake.key("bob")) as bob:
        for path in ("", "/code", "/events", "/output", "/output/stdout", "/output/stderr"):
            theirs = await bob.get(f"/v1/evaluations/{mine}{path}")
            absent = await bob.get(f"/v1/evaluations/ev-{'0' * 26}{path}")
            assert problem(theirs, "not-found")["detail"].replace(mine, "X") == problem(absent, "not-found")[
                "detail"
            ].replace("ev-" + "0" * 26, "X")
        problem(await bob.post(f"/v1/evaluations/{mine}/cancel"), "not-found")
        assert (await bob.get("/v1/evaluations")).json()["items"] == []
        problem(await bob.get("/v1/evaluations", params={"owner": "ann"}), "forbidden")
        problem(await bob.get("/v1/statistics", params={"owner": "ann"}), "forbidden")
        problem(await bob.get("/v1/events", params={"owner": "ann"}), "forbidden")
    assert bench.fake.entries[mine].record.state is State.QUEUED


async def test_an_operator_sees_everything_and_leaves_a_trail(bench: Bench) -> None:
    mine = await bench.submit()
    async with bench.caller(bench.fake.key("op", Role.OPERATOR)) as operator:
        assert [item["id"] for item in (await operator.get("/v1/evaluations")).json()["items"]] == [mine]
        with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logs:
            await operator.get(f"/v1/evaluations/{mine}/code")
            ended = await operator.post(f"/v1/evaluations/{mine}/cancel")
    assert (ended.status_code, ended.json()["reason"]) == (200, "cancelled_by_operator")
    trail = [entry for entry in logs if entry["event"] == "audit"]
    assert [entry["action"] for entry in trail] == ["read-code", "cancel"]
    assert {(entry["actor"], entry["owner"], entry["evaluation_id"]) for entry in trail} == {("op", "ann", mine)}


# --- acceptance ---------------------------------------------------------------------------------------------------------------


async def test_an_accepted_evaluation_is_shown_for_people_and_for_programs(bench: Bench) -> None:
    response = await bench.http.post(
        "/v1/evaluations", json={"code": "print(1)", "memory_limit": "1.5Gi", "cpu_limit": "1", "labels": {"a": "b"}}
    )
    body = response.json()
    assert response.status_code == 201
    assert response.headers["location"] == body["links"]["self"] == f"/v1/evaluations/{body['id']}"
    assert (body["state"], body["size_class"], body["priority"]) == ("queued", "large", 5)
    assert (body["memory_limit"], body["memory_limit_bytes"]) == ("1536Mi", 1536 * MIB)
    assert (body["cpu_limit"], body["cpu_limit_millicores"]) == ("1", 1000)
    assert body["waiting"]["reason"] == "position"
    assert body["labels"] == {"a": "b"}
    assert "code" not in body
    read = (await bench.http.get(response.headers["location"])).json()
    assert read["waiting"]["position"] == 1
    assert read["waiting"]["detail"] == "next in the large queue; none is running"


BROKEN_RULES: list[tuple[dict[str, Any], str, str]] = [
    ({"code": ""}, "code", "empty"),
    ({"code": " \n\t"}, "code", "empty"),
    ({"code": "a\x00b"}, "code", "NUL character at offset 1"),
    ({"stdin": "\x00"}, "stdin", "NUL character at offset 0"),
    ({"code": "x" * (MIB + 1)}, "code", f"{MIB + 1} bytes"),
    ({"code": "é" * (MIB // 2 + 1)}, "code", f"{MIB + 2} bytes"),
    ({"priority": 11}, "priority", "0 to 10"),
    ({"priority": -1}, "priority", "0 to 10"),
    ({"timeout_seconds": 3601}, "timeout_seconds", "1 to 3600"),
    ({"timeout_seconds": 0}, "timeout_seconds", "1 to 3600"),
    ({"timeout_seconds": -5}, "timeout_seconds", "1 to 3600"),
    ({"memory_limit": "1000Gi"}, "memory_limit", "32Mi to 8Gi"),
    ({"memory_limit": "lots"}, "memory_limit", "not a Kubernetes quantity"),
    ({"cpu_limit": "100"}, "cpu_limit", "10m to 4"),
    ({"profile": "huge\x00"}, "profile", "not a profile"),
    ({"image": "evil/image:latest"}, "image", "not a runtime image"),
    ({"labels": {"crucible.dev/x": "1"}}, "labels", "label key"),
    ({"labels": {"a": "\u202eevil"}}, "labels", "label value"),
    ({"language": "ruby"}, "language", "python"),
    ({"debug": True}, "debug", "not permitted"),
]


async def test_a_request_beyond_a_limit_is_told_what_would_be_accepted(bench: Bench) -> None:
    for fields, field, told in BROKEN_RULES:
        response = await bench.http.post("/v1/evaluations", json={"code": "pass", **fields})
        [violation] = problem(response, "invalid-request")["violations"]
        assert violation["field"] == field
        assert told in json.dumps(violation)
    assert bench.fake.entries == {}


async def test_six_megabytes_of_code_are_refused_clearly(bench: Bench) -> None:
    body = problem(await bench.http.post("/v1/evaluations", json={"code": "#" * 6_000_000}), "invalid-request")
    assert body["violations"][0]["limit"] == str(MIB)
    body = problem(await bench.http.post("/v1/evaluations", json={"code": "#" * 9_000_000}), "body-too-large")
    assert body["limit"] == 8 * MIB


async def test_right_to_left_text_passes_unchanged(bench: Bench) -> None:
    code = "print('\u202eשלום\u202c مرحبا 👩‍👩‍👧')"  # noqa: RUF001 - Hebrew
    evaluation = await bench.submit(code)
    assert (await bench.http.get(f"/v1/evaluations/{evaluation}/code")).json()["code"] == code


async def test_what_no_node_could_ever_take_is_refused_from_what_is_known_of_them() -> None:
    async with make_bench(node=Resources(cpu_millis=1000, memory_bytes=GIB)) as small:
        await wait_until_async(small.api.largest_known, timeout=2, describe="the nodes to be known")
        calls = len(small.fake.calls)
        response = await small.http.post("/v1/evaluations", json={"code": "pass", "memory_limit": "2Gi"})
    assert "at most 1Gi memory with 1 CPU" in problem(response, "never-fits")["detail"]
    assert [call for call in small.fake.calls[calls:] if "keys" not in call] == []


async def test_while_the_dispatcher_is_silent_nothing_is_refused_for_its_size() -> None:
    async with make_bench(outage="dispatcher", node=Resources(cpu_millis=1, memory_bytes=1)) as silent:
        await silent.submit(memory_limit="2Gi")


async def test_an_idempotency_key_gives_one_evaluation_and_is_not_for_another_request(bench: Bench) -> None:
    headers = {"Idempotency-Key": "night-1"}
    first = await bench.http.post("/v1/evaluations", json={"code": "pass", "priority": 5}, headers=headers)
    again = await bench.http.post("/v1/evaluations", json={"priority": 5, "code": "pass"}, headers=headers)
    other = await bench.http.post("/v1/evaluations", json={"code": "other"}, headers=headers)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"]
    assert again.headers["location"] == first.headers["location"]
    assert problem(other, "idempotency-key-reused")["evaluation_id"] == first.json()["id"]


async def test_an_idempotency_key_of_another_form_is_refused(bench: Bench) -> None:
    for key in ["", "a b", "x" * 256, "\x7f", "é"]:
        headers = {b"Idempotency-Key": key.encode("latin-1")}
        response = await bench.http.post("/v1/evaluations", json={"code": "pass"}, headers=headers)  # type: ignore[arg-type]
        assert problem(response, "invalid-request")["violations"][0]["field"] == "Idempotency-Key"


async def test_an_owner_over_quota_is_told_to_come_back(bench: Bench) -> None:
    async with make_bench(max_active_per_owner=2) as small:
        await small.submit()
        first = await small.submit()
        assert problem(await small.http.post("/v1/evaluations", json={"code": "x"}), "quota-exceeded")["limit"] == 2
        small.fake.end(first)
        await small.submit()


async def test_an_owner_that_submits_too_fast_is_told_to_slow_down_and_others_are_not() -> None:
    async with make_bench(rate_per_second=3 / 60) as slow:
        for _ in range(3):
            await slow.submit()
        body = problem(await slow.http.post("/v1/evaluations", json={"code": "x"}), "rate-limited")
        assert (body["limit"], body["remaining"]) == (3, 0)
        async with slow.caller(slow.fake.key("bob")) as bob:
            assert (await bob.post("/v1/evaluations", json={"code": "x"})).status_code == 201


async def test_an_outage_of_storage_is_a_503_that_may_be_tried_again(bench: Bench) -> None:
    await bench.http.get("/v1/me")
    bench.fake.outage.add("storage")
    problem(await bench.http.get(f"/v1/evaluations/ev-{'0' * 26}"), "unavailable")


# --- batches ------------------------------------------------------------------------------------------------------------------


async def test_each_item_of_a_batch_has_its_own_outcome(bench: Bench) -> None:
    items = [{"code": "a"}, {"code": ""}, {"code": "b", "priority": 9}, 7, {"code": "c\x00"}]
    response = await bench.http.post("/v1/evaluations/batch", json={"evaluations": items})
    body = response.json()
    assert response.status_code == 207
    assert (body["accepted"], body["rejected"]) == (2, 3)
    assert [item["status"] for item in body["items"]] == ["accepted", "rejected", "accepted", "rejected", "rejected"]
    assert [item["index"] for item in body["items"]] == [0, 1, 2, 3, 4]
    assert body["items"][2]["evaluation"]["priority"] == 9
    assert [item["problem"]["status"] for item in body["items"] if item["problem"]] == [422, 400, 422]
    assert len(bench.fake.entries) == 2
    assert bench.fake.calls.count("POST /internal/evaluations") == 1


async def test_a_batch_may_be_sent_again_with_its_idempotency_key(bench: Bench) -> None:
    batch = {"evaluations": [{"code": "a"}, {"code": "b"}]}
    headers = {"Idempotency-Key": "batch-1"}
    first = await bench.http.post("/v1/evaluations/batch", json=batch, headers=headers)
    again = await bench.http.post("/v1/evaluations/batch", json=batch, headers=headers)
    assert (first.status_code, again.status_code) == (200, 200)
    assert [item["status"] for item in again.json()["items"]] == ["existing", "existing"]
    assert [item["evaluation"]["id"] for item in first.json()["items"]] == [
        item["evaluation"]["id"] for item in again.json()["items"]
    ]
    assert len(bench.fake.entries) == 2


async def test_a_batch_of_which_nothing_was_accepted_is_a_problem_that_lists_every_item(bench: Bench) -> None:
    response = await bench.http.post("/v1/evaluations/batch", json={"evaluations": [{"code": ""}, {}]})
    body = problem(response, "batch-rejected")
    assert [item["problem"]["violations"][0]["field"] for item in body["items"]] == ["code", "code"]


async def test_a_batch_that_only_the_quota_refuses_says_when_to_come_back() -> None:
    async with make_bench(max_active_per_owner=1) as small:
        await small.submit()
        response = await small.http.post("/v1/evaluations/batch", json={"evaluations": [{"code": "a"}, {"code": "b"}]})
        assert problem(response, "quota-exceeded")["rejected"] == 2


async def test_a_batch_of_another_shape_is_refused_whole(bench: Bench) -> None:
    shapes: list[tuple[Any, str]] = [
        ({"evaluations": []}, "invalid-request"),
        ({"evaluations": [{"code": "x"}] * 101}, "invalid-request"),
        ({"evaluations": {}}, "invalid-request"),
        ({}, "invalid-request"),
        ({"evaluations": [{"code": "x"}], "more": 1}, "invalid-request"),
        ([{"code": "x"}], "malformed-json"),
    ]
    for body, slug in shapes:
        problem(await bench.http.post("/v1/evaluations/batch", json=body), slug)
    assert bench.fake.entries == {}


# --- cancel -------------------------------------------------------------------------------------------------------------------


async def test_what_waits_is_cancelled_at_once_and_again_without_harm(bench: Bench) -> None:
    evaluation = await bench.submit()
    for _ in range(2):
        response = await bench.http.post(f"/v1/evaluations/{evaluation}/cancel")
        assert (response.status_code, response.json()["reason"]) == (200, "cancelled_by_user")
    assert response.json()["links"]["cancel"] is None


async def test_what_runs_is_cancelled_by_ending_its_sandbox(bench: Bench) -> None:
    evaluation = await bench.submit()
    bench.fake.run(evaluation)
    response = await bench.http.post(f"/v1/evaluations/{evaluation}/cancel")
    assert (response.status_code, response.json()["state"]) == (200, "cancelled")
    assert bench.fake.stopped == [evaluation]


async def test_a_cancel_settles_what_has_no_sandbox_after_all(bench: Bench) -> None:
    evaluation = await bench.submit()
    bench.fake.run(evaluation)
    bench.fake.sandboxes.clear()
    response = await bench.http.post(f"/v1/evaluations/{evaluation}/cancel")
    assert (response.status_code, response.json()["state"]) == (200, "cancelled")


async def test_a_cancel_is_on_record_while_the_dispatcher_is_silent(bench: Bench) -> None:
    evaluation = await bench.submit()
    bench.fake.run(evaluation)
    bench.fake.outage.add("dispatcher")
    response = await bench.http.post(f"/v1/evaluations/{evaluation}/cancel")
    assert (response.status_code, response.json()["state"]) == (202, "running")
    assert response.json()["waiting"]["reason"] == "cancelling"


async def test_a_cancel_does_not_change_how_something_ended(bench: Bench) -> None:
    evaluation = await bench.submit()
    bench.fake.run(evaluation)
    bench.fake.end(evaluation)
    response = await bench.http.post(f"/v1/evaluations/{evaluation}/cancel")
    assert (response.status_code, response.json()["state"]) == (200, "completed")


# --- waiting for the end ----------------------------------------------------------------------------------------------------


async def test_a_long_poll_answers_as_soon_as_the_evaluation_ends(bench: Bench) -> None:
    evaluation = await bench.submit()
    waiting = asyncio.create_task(bench.http.get(f"/v1/evaluations/{evaluation}", params={"wait": 30}))
    await wait_until_async(lambda: bench.api.streams.count == 1, timeout=2, describe="the long-poll to listen")
    bench.fake.run(evaluation)
    assert not waiting.done()
    bench.fake.end(evaluation)
    assert (await asyncio.wait_for(waiting, 2)).json()["state"] == "completed"


async def test_a_long_poll_gives_up_when_its_time_is_over(bench: Bench) -> None:
    evaluation = await bench.submit()
    response = await bench.http.get(f"/v1/evaluations/{evaluation}", params={"wait": 0.05})
    assert (response.status_code, response.json()["state"]) == (200, "queued")


async def test_a_long_poll_cannot_be_held_for_ever(bench: Bench) -> None:
    evaluation = await bench.submit()
    for wait in ["61", "-1", "nan", "inf", "long"]:
        problem(await bench.http.get(f"/v1/evaluations/{evaluation}", params={"wait": wait}), "invalid-request")


# --- events ---------------------------------------------------------------------------------------------------------------------


async def test_an_evaluations_events_are_followed_to_the_last_and_no_further(bench: Bench) -> None:
    evaluation = await bench.submit()
    async with bench.stream(f"/v1/evaluations/{evaluation}/events", SSE) as stream:
        first = [await stream.event(), await stream.event()]
        assert [(event.event, event.id) for event in first if event] == [("submitted", "1"), ("queued", "2")]
        bench.fake.run(evaluation)
        bench.fake.write(evaluation, b"hello")
        bench.fake.end(evaluation)
        rest = await stream.rest()
    assert [(event.event, event.id) for event in rest] == [("provisioning", "3"), ("running", "4"), ("completed", "5")]
    assert rest[-1].data["reason"] == "exit_zero"


async def test_an_end_between_two_readings_of_a_stream_is_told_too(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = await bench.submit()
    bench.fake.run(evaluation)
    look = bench.api.storage.get

    async def ends_just_before(evaluation_id: str) -> EvaluationRecord:
        if bench.api.streams.count:
            # The stream has read that there is nothing new, and now looks whether anything is to come.
            monkeypatch.setattr(bench.api.storage, "get", look)
            bench.fake.end(evaluation)
        return await look(evaluation_id)

    monkeypatch.setattr(bench.api.storage, "get", ends_just_before)
    headers = (SSE, ("Last-Event-ID", "4"))
    async with bench.stream(f"/v1/evaluations/{evaluation}/events", *headers) as stream:
        assert [event.event for event in await stream.rest()] == ["completed"]


async def test_a_stream_is_resumed_after_the_last_event_that_was_seen(bench: Bench) -> None:
    evaluation = await bench.submit()
    bench.fake.run(evaluation)
    bench.fake.end(evaluation)
    path = f"/v1/evaluations/{evaluation}/events"
    for seen in range(5):
        response = await bench.http.get(path, headers=dict([SSE]) | {"Last-Event-ID": str(seen)})
        events, _ = parse_events(response.text)
        assert [event.id for event in events] == [str(seq) for seq in range(seen + 1, 6)]
    over = await bench.http.get(path, headers=dict([SSE]) | {"Last-Event-ID": "5"})
    assert (over.status_code, over.content) == (204, b"")


async def test_a_stream_is_not_resumed_from_nonsense(bench: Bench) -> None:
    evaluation = await bench.submit()
    for seen in ["x", "-1", "1.5", "9" * 40]:
        headers = dict([SSE]) | {"Last-Event-ID": seen}
        problem(await bench.http.get(f"/v1/evaluations/{evaluation}/events", headers=headers), "invalid-request")
        problem(await bench.http.get(f"/v1/evaluations/{evaluation}/output/stdout", headers=headers), "invalid-request")


async def test_the_stream_of_all_events_goes_on_from_its_cursor_without_gaps_or_repeats(bench: Bench) -> None:
    async with bench.stream("/v1/events", SSE) as stream:
        assert await stream.status() == 200
        await wait_until_async(lambda: bench.api.streams.count == 1, timeout=2, describe="the stream to listen")
        first = await bench.submit()
        seen = [await stream.event(), await stream.event()]
        last = stream.last_id
    second = await bench.submit()
    bench.fake.run(first)
    async with bench.stream("/v1/events", SSE, ("Last-Event-ID", last or "")) as stream:
        seen += [await stream.event() for _ in range(4)]
    told = [(event.data["evaluation_id"], event.data["seq"]) for event in seen if event]
    assert told == [(first, 1), (first, 2), (second, 1), (second, 2), (first, 3), (first, 4)]


async def test_a_stream_of_all_events_can_be_resumed_before_anything_happened(bench: Bench) -> None:
    await bench.submit()
    async with bench.stream("/v1/events", SSE) as stream:
        assert await stream.status() == 200
        await wait_until_async(lambda: bench.api.streams.count == 1, timeout=2, describe="the stream to listen")
        bench.api.drain()
        assert await stream.event() is None
        cursor = stream.last_id
    bench.api.streams.closing = False
    bench.fake.store(next(iter(bench.fake.entries.values())).new.model_copy(update={"id": "ev-" + "1" * 26}))
    async with bench.stream("/v1/events", SSE, ("Last-Event-ID", cursor or "")) as stream:
        event = await stream.event()
    assert event is not None
    assert event.data["evaluation_id"] == "ev-" + "1" * 26


async def test_a_submitter_hears_only_of_its_own(bench: Bench) -> None:
    async with bench.stream("/v1/events", SSE) as stream:
        await wait_until_async(lambda: bench.api.streams.count == 1, timeout=2, describe="the stream to listen")
        async with bench.caller(bench.fake.key("bob")) as bob:
            await bob.post("/v1/evaluations", json={"code": "secret"})
        mine = await bench.submit()
        event = await stream.event()
    assert event is not None
    assert event.data["evaluation_id"] == mine


async def test_events_can_be_read_by_the_page_as_well(bench: Bench) -> None:
    start = (await bench.http.get("/v1/events")).json()
    assert start["events"] == []
    mine = await bench.submit()
    page = (await bench.http.get("/v1/events", params={"cursor": start["cursor"]})).json()
    assert [(event["evaluation_id"], event["type"]) for event in page["events"]] == [
        (mine, "submitted"),
        (mine, "queued"),
    ]


# --- output -----------------------------------------------------------------------------------------------------------------------


async def test_output_is_followed_as_it_grows_and_never_cuts_a_character(bench: Bench) -> None:
    evaluation = await bench.submit()
    bench.fake.run(evaluation)
    async with bench.stream(f"/v1/evaluations/{evaluation}/output/stdout", query="follow=true") as stream:
        bench.fake.write(evaluation, "aé".encode()[:2])
        first = await stream.event()
        bench.fake.write(evaluation, "é".encode()[1:] + b"\xff!")
        second = await stream.event()
        bench.fake.end(evaluation)
        rest = await stream.rest()
    assert first is not None
    assert second is not None
    assert first.data == {"stream": "stdout", "offset": 0, "text": "a"}
    assert second.data == {"stream": "stdout", "offset": 1, "base64": "w6n/IQ=="}
    assert [event.event for event in rest] == ["end"]
    assert rest[0].data == {"state": "completed", "reason": "exit_zero", "exit_code": 0}


async def test_output_that_ends_inside_a_character_loses_no_byte(bench: Bench) -> None:
    evaluation = await bench.submit()
    bench.fake.run(evaluation)
    bench.fake.write(evaluation, b"ok\xc3")
    bench.fake.end(evaluation)
    text = (await bench.http.get(f"/v1/evaluations/{evaluation}/output/stdout", params={"follow": "true"})).text
    assert [event.data for event in parse_events(text)[0]][:2] == [
        {"stream": "stdout", "offset": 0, "text": "ok"},
        {"stream": "stdout", "offset": 2, "base64": "ww=="},
    ]


async def test_output_of_a_void_attempt_is_taken_back(bench: Bench) -> None:
    evaluation = await bench.submit()
    bench.fake.run(evaluation)
    path = f"/v1/evaluations/{evaluation}/output"
    async with bench.stream(f"{path}/stdout", SSE) as one, bench.stream(path, SSE) as both:
        bench.fake.write(evaluation, b"first try")
        before = [await one.event(), await both.event()]
        bench.fake.requeue(evaluation)
        bench.fake.run(evaluation)
        bench.fake.write(evaluation, b"second")
        bench.fake.end(evaluation)
        after = [await one.rest(), await both.rest()]
    assert [event.data["text"] for event in before if event] == ["first try", "first try"]
    for events in after:
        assert [event.event for event in events] == ["reset", "output", "end"]
        assert events[0].data == {"attempt": 2}
        assert (events[1].data["text"], events[1].data["offset"]) == ("second", 0)


async def test_followed_output_is_resumed_where_it_broke_off(bench: Bench) -> None:
    evaluation = await bench.submit()
    bench.fake.run(evaluation)
    pieces = [
        (Kind.STDOUT, b"one "),
        (Kind.STDERR, b"ERR "),
        (Kind.STDOUT, b"two "),
        (Kind.STDERR, b"OR"),
        (Kind.STDOUT, b"3"),
    ]
    for kind, data in pieces:
        bench.fake.write(evaluation, data, kind)
    bench.fake.end(evaluation)
    path = f"/v1/evaluations/{evaluation}/output"
    whole, _ = parse_events((await bench.http.get(path, headers=dict([SSE]))).text)
    assert [(event.data["stream"], event.data["offset"], event.data["text"]) for event in whole[:-1]] == [
        ("stdout", 0, "one "),
        ("stderr", 0, "ERR "),
        ("stdout", 4, "two "),
        ("stderr", 4, "OR"),
        ("stdout", 8, "3"),
    ]
    for place, event in enumerate(whole[:-1]):
        resumed, _ = parse_events(
            (await bench.http.get(path, headers=dict([SSE]) | {"Last-Event-ID": event.id or ""})).text, event.id
        )
        assert resumed == whole[place + 1 :]
    one, _ = parse_events((await bench.http.get(f"{path}/stdout", headers=dict([SSE]) | {"Last-Event-ID": "1-4"})).text)
    assert one[0].data == {"stream": "stdout", "offset": 4, "text": "two 3"}


async def test_both_streams_are_read_in_order_as_lines_of_json(bench: Bench) -> None:
    evaluation = await bench.submit()
    bench.fake.run(evaluation)
    for number in range(600):
        bench.fake.write(evaluation, b"%d\n" % number, Kind.STDERR if number % 3 else Kind.STDOUT)
    bench.fake.write(evaluation, b"\xfe", Kind.STDERR)
    response = await bench.http.get(f"/v1/evaluations/{evaluation}/output")
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert response.headers["content-type"] == "application/x-ndjson"
    assert [line["text"] for line in lines[:-1]] == [f"{number}\n" for number in range(600)]
    assert lines[-1]["base64"] == "/g=="
    assert [line["stream"] for line in lines[:3]] == ["stdout", "stderr", "stderr"]


async def test_output_is_sent_as_data_that_no_browser_runs(bench: Bench) -> None:
    evaluation = await bench.submit()
    bench.fake.run(evaluation)
    bench.fake.write(evaluation, b"<script>alert(1)</script>")
    bench.fake.end(evaluation)
    for path in ("output/stdout", "output/stderr", "output", "code"):
        for accept in ("text/html", "*/*", "application/octet-stream", "text/event-stream"):
            response = await bench.http.get(f"/v1/evaluations/{evaluation}/{path}", headers={"Accept": accept})
            assert response.headers["x-content-type-options"] == "nosniff"
            assert "sandbox" in response.headers["content-security-policy"]
            assert "html" not in response.headers["content-type"]


async def test_a_large_output_passes_through_in_pieces(bench: Bench) -> None:
    evaluation = await bench.submit()
    bench.fake.run(evaluation)
    for _ in range(5):
        bench.fake.write(evaluation, b"x" * MIB)
    bench.fake.write(evaluation, b"end")
    bench.fake.end(evaluation)
    async with bench.stream(f"/v1/evaluations/{evaluation}/output/stdout") as stream:
        await stream.finished()
        assert stream.sizes() == [MIB] * 5 + [3]


async def test_an_answer_breaks_off_rather_than_mix_two_attempts(bench: Bench) -> None:
    evaluation = await bench.submit()
    bench.fake.run(evaluation)
    bench.fake.write(evaluation, b"x" * MIB)
    bench.fake.write(evaluation, b"y" * MIB)
    entry = bench.fake.entries[evaluation]
    seen = entry.record
    bench.fake.requeue(evaluation)
    bench.fake.write(evaluation, b"z")
    entry.record = entry.record.model_copy(update={"stdout": seen.stdout})
    with structlog.testing.capture_logs():
        async with bench.stream(f"/v1/evaluations/{evaluation}/output/stdout") as stream:
            with pytest.raises(OutputChangedError):
                await stream.finished()


# --- drain ------------------------------------------------------------------------------------------------------------------------


async def test_while_draining_nothing_new_is_taken_and_everything_else_goes_on() -> None:
    async with make_bench(own_app=True) as bench:
        evaluation = await bench.submit()
        assert (await bench.http.get("/readyz")).status_code == 200
        bench.api.drain()
        problem(await bench.http.post("/v1/evaluations", json={"code": "pass"}), "unavailable")
        problem(await bench.http.post("/v1/evaluations/batch", json={"evaluations": [{"code": "pass"}]}), "unavailable")
        assert (await bench.http.get(f"/v1/evaluations/{evaluation}")).status_code == 200
        assert (await bench.http.get("/readyz")).status_code == 503
        assert (await bench.http.get("/healthz")).status_code == 200


async def test_a_drain_ends_streams_and_long_polls_so_that_they_are_resumed(bench: Bench) -> None:
    evaluation = await bench.submit()
    bench.fake.run(evaluation)
    path = f"/v1/evaluations/{evaluation}"
    poll = asyncio.create_task(bench.http.get(path, params={"wait": 60}))
    async with (
        bench.stream(f"{path}/events", SSE) as events,
        bench.stream(f"{path}/output", SSE) as both,
        bench.stream(f"{path}/output/stdout", SSE) as one,
        bench.stream("/v1/events", SSE) as everything,
    ):
        await wait_until_async(lambda: bench.api.streams.count == 5, timeout=2, describe="all to listen")
        bench.api.drain()
        assert len(await events.rest()) == 4
        assert await both.rest() == await one.rest() == await everything.rest() == []
        assert (await asyncio.wait_for(poll, 2)).json()["state"] == "running"
    assert bench.api.streams.count == 0


async def test_a_reader_that_goes_away_leaves_no_listener(bench: Bench) -> None:
    evaluation = await bench.submit()
    async with bench.stream(f"/v1/evaluations/{evaluation}/events", SSE) as stream:
        await stream.event()
        assert bench.api.streams.count == 1
    assert bench.api.streams.count == 0


async def test_a_stream_ends_when_storage_fails_so_that_its_reader_resumes(bench: Bench) -> None:
    evaluation = await bench.submit()
    async with bench.stream(f"/v1/evaluations/{evaluation}/events", SSE) as stream:
        await stream.event()
        await stream.event()
        bench.fake.outage.add("storage")
        bench.fake.run(evaluation)
        assert await stream.event() is None


# --- dead letters -----------------------------------------------------------------------------------------------------------------


async def test_dead_letters_are_replayed_once_each(bench: Bench) -> None:
    evaluation = await bench.submit("print('again')")
    bench.fake.letters[1] = DeadLetter(
        id=1,
        evaluation_id=evaluation,
        owner="ann",
        reason=Reason.NODE_LOST,
        detail=None,
        attempts=3,
        created_at=bench.fake.now(),
    )
    async with bench.caller(bench.fake.key("root", Role.ADMIN)) as admin:
        assert (await admin.get("/v1/dead-letters")).json()["total"] == 1
        response = await admin.post("/v1/dead-letters/replay", json={"ids": [1, 1, 99]})
        items = response.json()["items"]
        assert [item["status"] for item in items] == ["replayed", "rejected", "rejected"]
        assert [item["problem"]["type"] for item in items[1:]] == ["/problems/conflict", "/problems/not-found"]
        assert items[0]["evaluation"]["replay_of"] == evaluation
        problem(await admin.post("/v1/dead-letters/1/replay"), "conflict")
        problem(await admin.post("/v1/dead-letters/replay", json={"ids": [0]}), "invalid-request")
        problem(await admin.post("/v1/dead-letters/replay", json={"ids": [1] * 101}), "invalid-request")


# --- odds and ends ------------------------------------------------------------------------------------------------------------------


JUNK = [
    ("GET", "/nowhere", "not-found"),
    ("GET", "/v1/evaluations/", "not-found"),
    ("PATCH", "/v1/evaluations", "method-not-allowed"),
    ("PUT", "/v1/me", "method-not-allowed"),
    ("GET", "/v1/evaluations/batch", "method-not-allowed"),
    ("DELETE", "/v1/dead-letters/replay", "method-not-allowed"),
    ("GET", "/v1/evaluations/not-an-id", "invalid-request"),
    ("GET", "/v1/evaluations/%00", "invalid-request"),
    ("GET", "/v1/evaluations/%ff%fe", "invalid-request"),
    ("GET", "/v1/evaluations?cursor=%00", "invalid-request"),
    ("GET", "/v1/evaluations?cursor=" + "x" * 5000, "invalid-request"),
    ("GET", "/v1/evaluations?label=%00", "invalid-request"),
    ("GET", "/v1/evaluations?label=a", "invalid-request"),
    ("GET", "/v1/evaluations?owner=%00", "invalid-request"),
    ("GET", "/v1/evaluations?state=dead", "invalid-request"),
    ("GET", "/v1/evaluations?limit=0", "invalid-request"),
    ("GET", "/v1/evaluations?limit=201", "invalid-request"),
    ("GET", "/v1/evaluations?priority=" + "9" * 5000, "invalid-request"),
    ("GET", "/v1/evaluations?since=yesterday", "invalid-request"),
    ("GET", "/problems/unknown", "not-found"),
    ("GET", "/problems/%00", "invalid-request"),
]


async def test_junk_is_answered_with_a_clean_problem(bench: Bench) -> None:
    for method, path, slug in JUNK:
        response = await bench.http.request(method, path)
        problem(response, slug)


async def test_a_wrong_method_is_told_the_right_ones(bench: Bench) -> None:
    for path, allowed in (
        ("/v1/evaluations", "GET, POST"),
        ("/v1/evaluations/batch", "POST"),
        ("/v1/dead-letters/replay", "POST"),
        ("/v1/keys", "GET, POST"),
        ("/v1/keys/12345678", "DELETE"),
        ("/v1/me", "GET"),
    ):
        response = await bench.http.request("PATCH", path)
        problem(response, "method-not-allowed")
        assert response.headers["allow"] == allowed


async def test_times_at_the_edge_of_the_calendar_are_times(bench: Bench) -> None:
    for when in ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00", "2026-01-31", "2026-01-31T12:00:00"):
        response = await bench.http.get("/v1/evaluations", params={"since": when, "until": when})
        assert response.status_code == 200, response.text


async def test_every_problem_is_explained_to_anyone(bench: Bench) -> None:
    async with bench.caller(None) as nobody:
        for slug, kind in KINDS.items():
            page = (await nobody.get(f"/problems/{slug}")).json()
            assert (page["status"], page["title"], page["advice"]) == (kind.status, kind.title, kind.advice)


async def test_the_front_points_to_the_documentation() -> None:
    async with make_bench(own_app=True) as bench, bench.caller(None) as nobody:
        front = await nobody.get("/")
        assert "/openapi.json" in front.text
        assert front.headers["content-type"].startswith("text/plain")
        for path in ("/docs", "/openapi.json", "/health", "/healthz", "/readyz", "/metrics"):
            assert (await nobody.get(path)).status_code == 200


async def test_a_capacity_check_answers_now_or_never_and_names_the_largest(bench: Bench) -> None:
    async def check(**body: str) -> dict[str, Any]:
        response = await bench.http.post("/v1/capacity/check", json=body)
        assert response.status_code == 200, response.text
        return response.json()  # type: ignore[no-any-return]

    assert (await check())["fit"] == "now"
    never = await check(memory_limit="6Gi")
    assert (never["fit"], never["reason"], never["largest"]["memory_limit"]) == (
        "never",
        "no node is that large",
        "4Gi",
    )
    beyond = await check(memory_limit="1000Gi")
    assert beyond["fit"] == "never"
    assert "32Mi to 8Gi" in beyond["reason"]
    bad = await bench.http.post("/v1/capacity/check", json={"memory_limit": "x", "profile": "y", "cpu_limit": "z"})
    assert {v["field"] for v in problem(bad, "invalid-request")["violations"]} == {
        "memory_limit",
        "cpu_limit",
        "profile",
    }


async def test_limits_are_the_ones_that_requests_are_held_to(bench: Bench) -> None:
    body = (await bench.http.get("/v1/limits")).json()
    assert body["request"] == json.loads(bench.api.limits.model_dump_json())
    assert body["max_active_per_owner"] == bench.api.settings.api.max_active_per_owner


async def test_the_next_page_keeps_the_filters(bench: Bench) -> None:
    for _ in range(3):
        await bench.submit()
    page = (await bench.http.get("/v1/evaluations?state=queued&state=running&limit=2")).json()
    assert page["next"] == "/v1/evaluations?state=queued&state=running&limit=2&cursor=more"
    assert len(page["items"]) == 2
