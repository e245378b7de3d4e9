"""The public API on the real platform: every route, hostile input, idempotency at the same moment, ranges, resumed streams."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import pytest
import pytest_asyncio

from tests.support.event_stream import SentEvent, parse_events
from tests.support.folders import scratch_dir
from tests.support.platform import Client, connect, running_platform
from tests.support.waits import wait_until_async

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from crucible.local.platform import Platform

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

SSE = {"Accept": "text/event-stream"}
UNKNOWN = "ev-" + "0" * 26


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[tuple[Platform, Client]]:
    for folder in scratch_dir():
        async with running_platform(folder) as made:
            yield made


@pytest.fixture(scope="module")
def platform(running: tuple[Platform, Client]) -> Platform:
    return running[0]


@pytest.fixture(scope="module")
def admin(running: tuple[Platform, Client]) -> Client:
    return running[1]


@contextlib.asynccontextmanager
async def newcomer(platform: Platform, admin: Client, owner: str, role: str = "submitter") -> AsyncIterator[Client]:
    """A client with a key of its own, made as an admin makes it."""
    made = await admin.http.post("/v1/keys", json={"owner": owner, "role": role})
    assert made.status_code == 201, made.text
    async with connect(platform.url, made.json()["key"]) as client:
        yield client


def problem(response: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    body: dict[str, Any] = response.json()
    assert (response.status_code, body.get("type")) == (status, f"/problems/{slug}"), response.text
    assert response.headers["content-type"] == "application/problem+json"
    return body


async def read_stream(
    client: Client, path: str, *, headers: dict[str, str] | None = None, most: int | None = None
) -> tuple[list[SentEvent], str | None]:
    """Read events until the stream ends, or `most` are there; then hang up."""
    text, events, last = "", [], None
    async with client.http.stream("GET", path, headers=SSE | (headers or {})) as response:
        assert response.status_code == 200, await response.aread()
        async for part in response.aiter_text():
            text += part
            whole, cut, _ = text.rpartition("\n\n")
            events, last = parse_events(whole + cut)
            if most is not None and len(events) >= most:
                return events[:most], events[most - 1].id
    return events, last


# --- hostile bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "slug", "told"),
    [
        (b'{"code": "a\\u0000b"}', 422, "invalid-request", "NUL character at offset 1"),
        (b'{"code": "ok", "stdin": "\\u0000"}', 422, "invalid-request", "NUL character at offset 0"),
        (b'{"code": "x = \'\\ud800\'"}', 422, "invalid-request", "lone surrogate at offset 5"),
        (b'{"code": "x", "labels": {"a\\udc00": "b"}}', 422, "invalid-request", "lone surrogate"),
        (b'{"code": "x", "labels": {"a": "\\u0000"}}', 422, "invalid-request", "label value"),
        (b'{"code": ' + b"[" * 50_000, 400, "malformed-json", "nested too deeply"),
        (b'{"code": NaN}', 400, "malformed-json", "NaN"),
        (b'{"code": "a", "code": "b"}', 400, "malformed-json", "more than once"),
        (b'{"code": "\xc3\x28"}', 400, "malformed-json", "not UTF-8"),
        (b'{"code"', 400, "malformed-json", "column"),
        (b"", 400, "malformed-json", "empty"),
        (b'{"priority": 5}', 422, "invalid-request", "code"),
        (b'{"code": "x", "language": "ruby"}', 422, "invalid-request", "python"),
        (b'{"code": "x", "timeout_seconds": -1}', 422, "invalid-request", "1 to 3600"),
        (b'{"code": "x", "timeout_seconds": 1e3}', 422, "invalid-request", "timeout_seconds"),
        (b'{"code": "x", "cpu_limit": "100"}', 422, "invalid-request", "10m to 4"),
        (b'{"code": "x", "memory_limit": "1000Gi"}', 422, "invalid-request", "32Mi to 8Gi"),
        (b'{"code": "' + b"#" * 6_000_000 + b'"}', 422, "invalid-request", "1048576"),
        (b'{"code": "' + b"#" * 9_000_000 + b'"}', 413, "body-too-large", "8388608"),
    ],
    ids=lambda value: str(value[:40]) if isinstance(value, bytes) else None,
)
async def test_a_hostile_body_gets_a_clear_4xx(admin: Client, body: bytes, status: int, slug: str, told: str) -> None:
    response = await admin.http.post("/v1/evaluations", content=body, headers={"Content-Type": "application/json"})
    assert told in json.dumps(problem(response, status, slug))
    # The connection and the service are as good as before.
    assert (await admin.http.get("/v1/me")).status_code == 200


async def test_a_body_without_a_length_is_cut_off_at_the_limit(admin: Client) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 64 * 2**20:
            sent += 2**16
            yield b" " * 2**16

    with contextlib.suppress(httpx.WriteError):  # the server may hang up before all is sent
        response = await admin.http.post(
            "/v1/evaluations", content=endless(), headers={"Content-Type": "application/json"}
        )
        problem(response, 413, "body-too-large")
    assert (await admin.http.get("/v1/me")).status_code == 200


@pytest.mark.parametrize(
    "request_line", ["GET /v1/evaluations/\xff\xfe HTTP/1.1", "GET /\x00 HTTP/1.1", "\x16\x03\x01 HTTP/9"]
)
async def test_what_is_hardly_http_is_refused_and_harms_nothing(
    platform: Platform, admin: Client, request_line: str
) -> None:
    address = urlsplit(platform.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port, family=socket.AF_INET)
    writer.write(request_line.encode("latin-1") + b"\r\nHost: x\r\nConnection: close\r\n\r\n")
    status = await asyncio.wait_for(reader.readline(), 5)
    writer.close()
    assert status.split()[1:2] in ([b"400"], [b"404"], [b"401"], [b"422"], []), status
    assert (await admin.http.get("/v1/me")).status_code == 200


async def test_junk_in_a_query_never_reaches_the_database(admin: Client) -> None:
    junk = ["\x00", "' OR 1=1 --", "\u202e", "x" * 6000, "\ud7ff", "%", "999999999999999999999999"]
    for name in ("cursor", "owner", "label", "state", "reason", "priority", "since", "until", "limit"):
        for value in junk:
            response = await admin.http.get("/v1/evaluations", params={name: value})
            assert response.status_code in (200, 422), (name, value, response.text)
    for path in ("/v1/events", "/v1/dead-letters"):
        for value in [*junk, "null", "-1", "eyJhIjoxfQ==", "AAAA", "0"]:
            response = await admin.http.get(path, params={"cursor": value})
            assert response.status_code in (200, 422), (path, value, response.text)
    for value in ("null", "-1", "eyJhIjoxfQ==", "AAAA", "0", "9" * 30):
        response = await admin.http.get("/v1/evaluations", params={"cursor": value})
        assert response.status_code in (200, 422), (value, response.text)


# --- idempotency ----------------------------------------------------------------------------------------------------------------


async def test_the_same_batch_sent_at_the_same_moment_is_stored_once(admin: Client) -> None:
    batch = {"evaluations": [{"code": f"print({index})", "labels": {"once": "batch"}} for index in range(10)]}
    answers = await asyncio.gather(
        *(
            admin.http.post("/v1/evaluations/batch", json=batch, headers={"Idempotency-Key": "one-batch"})
            for _ in range(8)
        )
    )
    ids = {tuple(item["evaluation"]["id"] for item in answer.json()["items"]) for answer in answers}
    assert {answer.status_code for answer in answers} == {200}
    assert len(ids) == 1
    listed = await admin.http.get("/v1/evaluations", params={"label": "once=batch", "limit": 200})
    assert len(listed.json()["items"]) == 10


async def test_two_owners_may_use_the_same_idempotency_key(platform: Platform, admin: Client) -> None:
    headers = {"Idempotency-Key": "shared"}
    async with newcomer(platform, admin, "owner-a") as one, newcomer(platform, admin, "owner-b") as two:
        first = await one.http.post("/v1/evaluations", json={"code": "pass"}, headers=headers)
        second = await two.http.post("/v1/evaluations", json={"code": "other"}, headers=headers)
        assert (first.status_code, second.status_code) == (201, 201)
        problem(
            await one.http.post("/v1/evaluations", json={"code": "other"}, headers=headers),
            422,
            "idempotency-key-reused",
        )


# --- who sees what ----------------------------------------------------------------------------------------------------------------


async def test_owners_do_not_see_each_other_and_an_operator_sees_all(platform: Platform, admin: Client) -> None:
    async with (
        newcomer(platform, admin, "ann") as ann,
        newcomer(platform, admin, "bob") as bob,
        newcomer(platform, admin, "op", "operator") as operator,
    ):
        mine = await ann.run("print('private')")
        for path in ("", "/code", "/events", "/output", "/output/stdout"):
            problem(await bob.http.get(f"/v1/evaluations/{mine['id']}{path}"), 404, "not-found")
            assert (await operator.http.get(f"/v1/evaluations/{mine['id']}{path}")).status_code == 200
        problem(await bob.http.post(f"/v1/evaluations/{mine['id']}/cancel"), 404, "not-found")
        assert (await bob.http.get("/v1/evaluations")).json()["items"] == []
        assert (await bob.http.get("/v1/statistics")).json()["total"] == 0
        assert (await operator.http.get("/v1/statistics", params={"owner": "ann"})).json()["total"] == 1
        listed = (await operator.http.get("/v1/evaluations", params={"owner": "ann"})).json()["items"]
        assert [item["id"] for item in listed] == [mine["id"]]
        problem(await operator.http.get("/v1/keys"), 403, "forbidden")


async def test_a_key_that_was_revoked_opens_nothing(platform: Platform, admin: Client) -> None:
    async with newcomer(platform, admin, "short-lived") as client:
        key_id = (await client.http.get("/v1/me")).json()["key_id"]
        assert (await admin.http.delete(f"/v1/keys/{key_id}")).status_code == 204
        problem(await client.http.get("/v1/me"), 401, "unauthenticated")
        listed = {key["key_id"]: key for key in (await admin.http.get("/v1/keys")).json()["items"]}
        assert listed[key_id]["revoked_at"] is not None
        assert "sha256" not in json.dumps(listed)
    problem(await admin.http.delete("/v1/keys/zzzzzzzz"), 404, "not-found")


# --- lists ------------------------------------------------------------------------------------------------------------------------


async def test_pages_hold_every_match_once_also_while_more_arrive(platform: Platform, admin: Client) -> None:
    async with newcomer(platform, admin, "lister") as client:
        wanted = [
            (await client.submit("pass", labels={"page": "yes"}, priority=index % 11))["id"] for index in range(23)
        ]
        await client.submit("pass", labels={"page": "no"})
        found: list[str] = []
        path: str | None = "/v1/evaluations?label=page%3Dyes&limit=5"
        while path:
            page = (await client.http.get(path)).json()
            found += [item["id"] for item in page["items"]]
            path = page["next"]
            await client.submit("pass", labels={"page": "yes", "late": "yes"})
        assert found == wanted[::-1]
        zero = (await client.http.get("/v1/evaluations", params={"priority": 0, "label": "page=yes"})).json()["items"]
        assert {item["priority"] for item in zero} == {0}
        nothing = await client.http.get(
            "/v1/evaluations", params={"since": "2000-01-01", "until": "2000-01-02T00:00:00Z"}
        )
        assert nothing.json() == {"items": [], "next": None}


# --- output -----------------------------------------------------------------------------------------------------------------------

TWO_MIB = """
import sys
line = bytes(range(256)) * 16
for _ in range(512):
    sys.stdout.buffer.write(line)
sys.stderr.write('done')
"""
EXPECTED = bytes(range(256)) * 16 * 512


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def large(admin: Client) -> dict[str, Any]:
    ended = await admin.run(TWO_MIB)
    assert ended["state"] == "completed", ended
    return ended


async def test_a_large_output_comes_back_whole_with_its_digest(admin: Client, large: dict[str, Any]) -> None:
    response = await admin.http.get(large["links"]["stdout"])
    digest = hashlib.sha256(EXPECTED).hexdigest()
    assert response.content == EXPECTED
    assert response.headers["etag"] == f'"{digest}"'
    assert large["stdout"] == {"size": len(EXPECTED), "sha256": digest}
    assert response.headers["content-length"] == str(len(EXPECTED))
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    saved = await admin.http.get(large["links"]["stdout"], headers={"Accept": "application/octet-stream"})
    assert saved.headers["content-type"] == "application/octet-stream"
    assert saved.headers["content-disposition"] == f'attachment; filename="{large["id"]}.stdout"'
    same = await admin.http.get(large["links"]["stdout"], headers={"If-None-Match": f'"{digest}"'})
    assert (same.status_code, same.content) == (304, b"")


@pytest.mark.parametrize(
    ("header", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-99", 0, 100),
        ("bytes=1048570-1048590", 1048570, 1048591),
        ("bytes=2097000-", 2097000, 2097152),
        ("bytes=-10", 2097142, 2097152),
        ("bytes=100-99999999", 100, 2097152),
    ],
)
async def test_a_range_is_exactly_those_bytes(
    admin: Client, large: dict[str, Any], header: str, start: int, end: int
) -> None:
    response = await admin.http.get(large["links"]["stdout"], headers={"Range": header})
    assert response.status_code == 206
    assert response.content == EXPECTED[start:end]
    assert response.headers["content-range"] == f"bytes {start}-{end - 1}/{len(EXPECTED)}"


async def test_a_range_beyond_the_end_says_where_the_end_is(admin: Client, large: dict[str, Any]) -> None:
    response = await admin.http.get(large["links"]["stdout"], headers={"Range": "bytes=2097152-"})
    assert problem(response, 416, "range-not-satisfiable")["size"] == 2097152
    assert response.headers["content-range"] == "bytes */2097152"


async def test_a_range_of_an_older_output_is_answered_with_the_whole(admin: Client, large: dict[str, Any]) -> None:
    response = await admin.http.get(large["links"]["stdout"], headers={"Range": "bytes=0-9", "If-Range": '"old"'})
    assert (response.status_code, len(response.content)) == (200, len(EXPECTED))


async def test_both_streams_come_in_order_and_lose_no_byte(admin: Client, large: dict[str, Any]) -> None:
    import base64

    parts: dict[str, bytes] = {"stdout": b"", "stderr": b""}
    async with admin.http.stream("GET", large["links"]["output"]) as response:
        async for line in response.aiter_lines():
            piece = json.loads(line)
            assert piece["offset"] == len(parts[piece["stream"]])
            parts[piece["stream"]] += piece["text"].encode() if "text" in piece else base64.b64decode(piece["base64"])
    assert parts == {"stdout": EXPECTED, "stderr": b"done"}


async def test_output_is_followed_while_the_code_still_runs(admin: Client) -> None:
    code = """
import sys, time
for number in range(5):
    print('line', number, flush=True)
    print('err', number, file=sys.stderr, flush=True)
    time.sleep(0.15)
"""
    submitted = await admin.submit(code)
    one, both = await asyncio.gather(
        read_stream(admin, submitted["links"]["stdout"]), read_stream(admin, submitted["links"]["output"])
    )
    assert "".join(event.data["text"] for event in one[0][:-1]) == "".join(f"line {n}\n" for n in range(5))
    assert one[0][-1].data == {"state": "completed", "reason": "exit_zero", "exit_code": 0}
    told = [(event.data["stream"], event.data["text"]) for event in both[0][:-1]]
    assert "".join(text for stream, text in told if stream == "stderr") == "".join(f"err {n}\n" for n in range(5))
    assert len(one[0]) >= 4  # as it was written, not all at the end


async def test_followed_output_is_resumed_after_any_event(admin: Client) -> None:
    ended = await admin.run(
        "import sys\nfor n in range(20):\n    print(n, file=sys.stderr if n % 2 else sys.stdout, flush=True)"
    )
    whole, _ = await read_stream(admin, ended["links"]["output"])
    assert len(whole) >= 3
    for place, event in enumerate(whole[:-1]):
        rest, _ = await read_stream(admin, ended["links"]["output"], headers={"Last-Event-ID": event.id or ""})
        assert [(e.event, e.data) for e in rest] == [(e.event, e.data) for e in whole[place + 1 :]]


# --- events -----------------------------------------------------------------------------------------------------------------------


async def test_events_are_followed_live_and_end_with_the_last(admin: Client) -> None:
    submitted = await admin.submit("import time; time.sleep(0.2)")
    events, _ = await read_stream(admin, submitted["links"]["events"])
    assert [event.event for event in events] == ["submitted", "queued", "provisioning", "running", "completed"]
    assert [event.id for event in events] == ["1", "2", "3", "4", "5"]
    for seen in range(5):
        rest, _ = await read_stream(admin, submitted["links"]["events"], headers={"Last-Event-ID": str(seen)})
        assert [event.id for event in rest] == [str(seq) for seq in range(seen + 1, 6)]
    over = await admin.http.get(submitted["links"]["events"], headers=SSE | {"Last-Event-ID": "5"})
    assert over.status_code == 204


async def test_a_stream_of_all_events_that_keeps_breaking_off_has_no_gap_and_no_repeat(
    platform: Platform, admin: Client
) -> None:
    async with newcomer(platform, admin, "watcher") as client:
        cursor = (await client.http.get("/v1/events")).json()["cursor"]
        submitting = asyncio.create_task(_submit_many(client, 40))
        seen: list[tuple[str, int]] = []
        while len(seen) < 200:
            reading = read_stream(client, "/v1/events", headers={"Last-Event-ID": cursor}, most=min(7, 200 - len(seen)))
            events, cursor = await asyncio.wait_for(reading, 30)
            seen += [(event.data["evaluation_id"], event.data["seq"]) for event in events]
        ids = await submitting
    assert len(seen) == len(set(seen))
    assert set(seen) == {(evaluation, seq) for evaluation in ids for seq in range(1, 6)}
    for evaluation in ids:
        assert [seq for found, seq in seen if found == evaluation] == [1, 2, 3, 4, 5]


async def _submit_many(client: Client, count: int) -> list[str]:
    return [(await client.submit("pass"))["id"] for _ in range(count)]


async def test_events_of_all_can_be_read_by_pages_too(platform: Platform, admin: Client) -> None:
    async with newcomer(platform, admin, "pager") as client:
        cursor = (await client.http.get("/v1/events")).json()["cursor"]
        ended = await client.run("pass")
        seen: list[int] = []
        while True:
            page = (await client.http.get("/v1/events", params={"cursor": cursor, "limit": 2})).json()
            if not page["events"]:
                break
            assert {event["evaluation_id"] for event in page["events"]} == {ended["id"]}
            seen += [event["seq"] for event in page["events"]]
            cursor = page["cursor"]
        assert seen == [1, 2, 3, 4, 5]


# --- waiting, capacity, statistics ----------------------------------------------------------------------------------------------


async def test_what_waits_says_where_it_stands_and_why(admin: Client) -> None:
    blockers = [await admin.submit("import time; time.sleep(30)", priority=10) for _ in range(6)]
    try:
        waiting = [await admin.submit("pass", priority=1) for _ in range(3)]

        async def running() -> bool:
            capacity = (await admin.http.get("/v1/capacity")).json()
            return next(queue["running"] for queue in capacity["queues"] if queue["size_class"] == "small") >= 4

        await wait_until_async(running, timeout=20, describe="all slots of the small class to be busy")
        last = await admin.get(waiting[-1]["id"])
        assert last["state"] == "queued"
        assert last["waiting"]["reason"] == "position"
        assert last["waiting"]["ahead"] >= 2
        assert last["waiting"]["position"] == last["waiting"]["ahead"] + 1
        assert "ahead of it in the small queue" in last["waiting"]["detail"]
        capacity = (await admin.http.get("/v1/capacity")).json()
        small = next(queue for queue in capacity["queues"] if queue["size_class"] == "small")
        assert small["waiting"] >= 3
        bands = [band["priority"] for band in small["priorities"]]
        assert bands == sorted(bands, reverse=True)
        assert 1 in bands
        assert capacity["nodes"][0]["total"]["cpu_limit_millicores"] > 0
    finally:
        for blocker in blockers:
            await admin.http.post(f"/v1/evaluations/{blocker['id']}/cancel")


async def test_a_capacity_check_tells_now_from_never(admin: Client) -> None:
    now = (await admin.http.post("/v1/capacity/check", json={"memory_limit": "64Mi", "cpu_limit": "100m"})).json()
    assert now["fit"] in ("now", "later")
    never = (await admin.http.post("/v1/capacity/check", json={"memory_limit": "1000Gi"})).json()
    assert never["fit"] == "never"
    assert "8Gi" in never["reason"]
    largest = never["largest"]
    accepted = await admin.http.post(
        "/v1/capacity/check", json={"memory_limit": largest["memory_limit"], "cpu_limit": largest["cpu_limit"]}
    )
    assert accepted.json()["fit"] in ("now", "later")


async def test_statistics_count_what_happened(platform: Platform, admin: Client) -> None:
    async with newcomer(platform, admin, "counter") as client:
        await asyncio.gather(client.run("pass"), client.run("1/0"), client.run("pass", priority=9))
        statistics = (await client.http.get("/v1/statistics")).json()
        assert statistics["total"] == 3
        assert statistics["by_state"]["completed"] == 2
        assert statistics["by_reason"]["exception"] == 1
        assert statistics["by_priority"]["9"] == 1
        assert statistics["success_rate"] == pytest.approx(2 / 3)


async def test_limits_name_the_largest_of_everything(admin: Client) -> None:
    limits = (await admin.http.get("/v1/limits")).json()["request"]
    exactly = "#" * limits["code_bytes"]
    assert (await admin.http.post("/v1/evaluations", json={"code": exactly})).status_code == 201
    problem(await admin.http.post("/v1/evaluations", json={"code": exactly + "#"}), 422, "invalid-request")


# --- upkeep -----------------------------------------------------------------------------------------------------------------------


async def test_an_admin_sees_where_the_bytes_are_and_can_look_before_deleting(
    admin: Client, large: dict[str, Any]
) -> None:
    usage = (await admin.http.get("/v1/admin/storage/usage")).json()
    assert sum(backend["bytes"] for backend in usage["backends"]) >= len(EXPECTED)
    assert next(owner for owner in usage["owners"] if owner["owner"] == "local")["output_bytes"] >= len(EXPECTED)
    look = await admin.http.post("/v1/admin/storage/cleanup", json={"older_than_days": 0, "dry_run": True})
    assert look.json()["dry_run"] is True
    assert look.json()["evaluations"] >= 1
    assert (await admin.get(large["id"]))["state"] == "completed"
    moved = await admin.http.post("/v1/admin/storage/migrate", json={"target": "nowhere-known"})
    assert moved.status_code in (404, 409, 422), moved.text


async def test_dead_letters_that_are_not_there_are_not_there(admin: Client) -> None:
    assert (await admin.http.get("/v1/dead-letters")).json() == {"items": [], "total": 0, "next": None}
    problem(await admin.http.post("/v1/dead-letters/1/replay"), 404, "not-found")
    problem(await admin.http.delete("/v1/dead-letters/1"), 404, "not-found")
    batch = (await admin.http.post("/v1/dead-letters/replay", json={"ids": [1, 2**62]})).json()
    assert (batch["replayed"], batch["rejected"]) == (0, 2)


async def test_an_unknown_id_is_not_found_everywhere(admin: Client) -> None:
    for method, path in (
        ("GET", ""),
        ("GET", "?wait=30"),
        ("GET", "/code"),
        ("GET", "/events"),
        ("GET", "/output"),
        ("GET", "/output/stdout"),
        ("GET", "/output/stderr?follow=true"),
        ("POST", "/cancel"),
    ):
        problem(await admin.http.request(method, f"/v1/evaluations/{UNKNOWN}{path}"), 404, "not-found")


# --- going away -------------------------------------------------------------------------------------------------------------------


async def test_a_shutdown_ends_streams_so_that_they_are_resumed_and_loses_nothing() -> None:
    for folder in scratch_dir():
        async with running_platform(folder) as (platform, client):
            submitted = await client.submit("import time; time.sleep(60)")
            following = asyncio.create_task(read_stream(client, submitted["links"]["events"]))
            poll = asyncio.create_task(client.get(submitted["id"], wait=60))

            async def started(client: Client = client, submitted: dict[str, Any] = submitted) -> bool:
                return (await client.get(submitted["id"]))["state"] == "running"

            await wait_until_async(started, timeout=20, describe="the code to run")
            draining = asyncio.create_task(platform.drain())
            events, last = await asyncio.wait_for(following, 5)
            assert [event.event for event in events] == ["submitted", "queued", "provisioning", "running"]
            assert (await asyncio.wait_for(poll, 5))["state"] in ("running", "queued")
            refused = await client.http.post("/v1/evaluations", json={"code": "pass"})
            problem(refused, 503, "unavailable")
            assert int(refused.headers["retry-after"]) >= 1
            await draining
        async with running_platform(folder) as (platform, client):
            rest = asyncio.create_task(
                read_stream(client, submitted["links"]["events"], headers={"Last-Event-ID": last or ""})
            )
            await client.http.post(f"/v1/evaluations/{submitted['id']}/cancel")
            events, _ = await asyncio.wait_for(rest, 20)
            assert int(events[0].id or 0) == int(last or 0) + 1
            assert events[-1].event == "cancelled"
