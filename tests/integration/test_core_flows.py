"""Whole lives of evaluations on the real platform: submit, run in a real sandbox, read back what happened and why."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import pytest_asyncio

from tests.support.folders import scratch_dir
from tests.support.platform import Client, running_platform
from tests.support.waits import wait_for, wait_until_async

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from crucible.local.platform import Platform

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def platform_and_client() -> AsyncIterator[tuple[Platform, Client]]:
    for folder in scratch_dir():
        async with running_platform(folder) as running:
            yield running


@pytest.fixture(scope="module")
def client(platform_and_client: tuple[Platform, Client]) -> Client:
    return platform_and_client[1]


async def test_an_evaluation_passes_through_every_state_and_tells_why_it_ended(client: Client) -> None:
    submitted = await client.submit("print('hello')")
    assert submitted["state"] in {"queued", "provisioning", "running"}
    ended = await client.ended(submitted["id"])
    assert (ended["state"], ended["reason"], ended["exit_code"]) == ("completed", "exit_zero", 0)
    assert await client.output(ended["id"]) == b"hello\n"
    events = (await client.http.get(f"/v1/evaluations/{ended['id']}/events")).json()["events"]
    assert [event["type"] for event in events] == ["submitted", "queued", "provisioning", "running", "completed"]
    assert [event["seq"] for event in events] == [1, 2, 3, 4, 5]
    assert ended["submitted_at"] <= ended["provisioning_at"] <= ended["started_at"] <= ended["finished_at"]
    assert ended["peak_memory_bytes"] > 2**20
    assert ended["cpu_seconds"] > 0


async def test_the_submitted_code_is_read_back_exactly(client: Client) -> None:
    code = "# مرحبا \u202eabc\u202c 👩‍🔬\nprint('é' * 3)\n"
    ended = await client.run(code)
    assert (await client.http.get(f"/v1/evaluations/{ended['id']}/code")).json()["code"] == code
    assert (await client.output(ended["id"])).decode() == "ééé\n"


CAUSES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a clean end": ("pass", {}, {"state": "completed", "reason": "exit_zero", "exit_code": 0}),
    "an exit code": ("import sys; sys.exit(3)", {}, {"state": "failed", "reason": "exit_nonzero", "exit_code": 3}),
    "a message as exit": ("raise SystemExit('bye')", {}, {"state": "failed", "reason": "exit_nonzero", "exit_code": 1}),
    "an exception": ("1/0", {}, {"state": "failed", "reason": "exception", "exit_code": 1, "exception_type": "ZeroDivisionError"}),
    "a syntax error": ("def (", {}, {"state": "failed", "reason": "exception", "exit_code": 1, "exception_type": "SyntaxError"}),
    "a signal": ("import os; os.kill(os.getpid(), 11)", {}, {"state": "failed", "reason": "signal", "exit_code": None, "signal": 11}),
    "its time limit": ("while True: pass", {"timeout_seconds": 1}, {"state": "timeout", "reason": "wall_clock", "exit_code": None}),
    "its memory limit": ("x = []\nwhile True: x.append(bytearray(2**20))", {"memory_limit": "64Mi"}, {"state": "failed", "reason": "oom_killed", "exit_code": None}),
}  # fmt: skip


@pytest.mark.parametrize("cause", CAUSES)
async def test_the_cause_of_the_end_is_named(client: Client, cause: str) -> None:
    code, fields, expected = CAUSES[cause]
    ended = await client.run(code, **fields)
    assert {name: ended[name] for name in expected} == expected, ended
    assert ended["detail"]


async def test_the_text_of_an_exception_is_on_standard_error(client: Client) -> None:
    ended = await client.run("def f():\n    return 1/0\nf()\n")
    stderr = (await client.output(ended["id"], "stderr")).decode()
    assert "ZeroDivisionError: division by zero" in stderr
    assert 'File "/code/main.py", line 2, in f' in stderr
    assert "runner" not in stderr
    assert await client.output(ended["id"], "stdout") == b""


async def test_no_output_appears_after_the_time_limit(client: Client) -> None:
    code = "import time\nprint('early', flush=True)\ntime.sleep(10)\nprint('late', flush=True)"
    ended = await client.run(code, timeout_seconds=1)
    assert ended["state"] == "timeout"
    assert await client.output(ended["id"]) == b"early\n"
    assert ended["run_seconds"] < 3


async def test_json_output_comes_back_to_the_byte(client: Client) -> None:
    value = {"score": 0.5, "text": "a'b\"c\\n", "unicode": "é\u2028", "nested": [1, [2, None]]}
    ended = await client.run(f"import json; print(json.dumps({value!r}, ensure_ascii=False))")
    assert json.loads(await client.output(ended["id"])) == value


async def test_several_megabytes_of_output_come_back_whole(client: Client) -> None:
    expected = hashlib.sha256(b"".join(b"%07d\n" % n for n in range(700_000))).hexdigest()
    ended = await client.run("for n in range(700_000): print('%07d' % n)", cpu_limit="1")
    assert ended["state"] == "completed"
    output = await client.output(ended["id"])
    assert len(output) == 5_600_000
    assert hashlib.sha256(output).hexdigest() == expected == ended["stdout"]["sha256"]


async def test_many_at_once_all_complete_with_their_own_output(client: Client) -> None:
    submitted = await asyncio.gather(*(client.submit(f"print({n} ** 2)") for n in range(30)))
    results = await wait_for(client, [one["id"] for one in submitted])
    assert {one.status for one in results} == {"completed"}
    lives = {tuple(moment.type for moment in one.timeline[:5]) for one in results}
    assert lives == {("submitted", "queued", "provisioning", "running", "completed")}
    outputs = [await client.output(one.evaluation_id) for one in results]
    assert outputs == [b"%d\n" % n**2 for n in range(30)]


async def test_many_fast_failures_leave_nothing_stuck(client: Client) -> None:
    body = {"evaluations": [{"code": f"import sys; print({n}); sys.exit({n % 3})"} for n in range(60)]}
    answer = (await client.http.post("/v1/evaluations/batch", json=body)).json()
    assert answer["accepted"] == 60
    for n, item in enumerate(answer["items"]):
        ended = await client.ended(item["evaluation"]["id"])
        assert ended["exit_code"] == n % 3
        assert await client.output(ended["id"]) == b"%d\n" % n


def processes_with(marker: str) -> list[psutil.Process]:
    """Every process on this machine whose command line or environment carries the marker."""
    found = []
    for process in psutil.process_iter():
        try:
            if marker in " ".join(process.cmdline()) or marker in process.environ().values():
                found.append(process)
        except psutil.Error:
            continue
    return found


async def test_cancelling_what_waits_ends_it_at_once_and_it_never_runs(client: Client) -> None:
    blockers = [await client.submit("import time; time.sleep(30)", priority=10, cpu_limit="100m") for _ in range(4)]
    waiting = await client.submit("print('ran')", priority=0)
    assert (await client.get(waiting["id"]))["waiting"]["position"] >= 1
    response = await client.http.post(f"/v1/evaluations/{waiting['id']}/cancel")
    assert response.json()["state"] == "cancelled"
    for blocker in blockers:
        await client.http.post(f"/v1/evaluations/{blocker['id']}/cancel")
    ended = [await client.ended(blocker["id"]) for blocker in blockers]
    assert {one["reason"] for one in ended} == {"cancelled_by_user"}
    assert await client.output(waiting["id"]) == b""
    assert (await client.get(waiting["id"]))["started_at"] is None


async def test_cancelling_a_running_evaluation_leaves_no_process(client: Client) -> None:
    code = "import os, time\nfor _ in range(3):\n    os.fork()\nprint('up', flush=True)\ntime.sleep(60)"
    running = await client.submit(code)

    async def printed() -> bool:
        return (await client.output(running["id"])).count(b"up") == 8

    await wait_until_async(printed, timeout=20, describe="all eight processes to run")
    assert processes_with(running["id"])
    response = await client.http.post(f"/v1/evaluations/{running['id']}/cancel")
    assert response.status_code in (200, 202)
    ended = await client.ended(running["id"])
    assert (ended["state"], ended["reason"]) == ("cancelled", "cancelled_by_user")
    await wait_until_async(lambda: not processes_with(running["id"]), timeout=5, describe="its processes to be gone")


async def test_cancelling_twice_and_after_the_end_changes_nothing(client: Client) -> None:
    ended = await client.run("print(1)")
    for _ in range(2):
        response = await client.http.post(f"/v1/evaluations/{ended['id']}/cancel")
        assert response.status_code == 200
        assert response.json()["state"] == "completed"


async def test_cancels_racing_with_the_whole_life_leave_exactly_one_end(client: Client) -> None:
    async def one(n: int) -> str:
        submitted = await client.submit("print('x')", cpu_limit="1")
        for _ in range(n % 12):
            await client.get(submitted["id"])
        await client.http.post(f"/v1/evaluations/{submitted['id']}/cancel")
        return str(submitted["id"])

    for name in await asyncio.gather(*(one(n) for n in range(40))):
        ended = await client.ended(name)
        assert ended["state"] in {"completed", "cancelled"}
        events = (await client.http.get(f"/v1/evaluations/{name}/events")).json()["events"]
        terminal = [event for event in events if event["type"] in {"completed", "cancelled", "failed", "timeout"}]
        assert len(terminal) == 1, events


async def test_one_idempotency_key_gives_one_evaluation_also_when_concurrent(client: Client) -> None:
    async def submit() -> tuple[int, str]:
        response = await client.http.post(
            "/v1/evaluations", json={"code": "print('once')"}, headers={"Idempotency-Key": "same-for-all"}
        )
        return response.status_code, response.json()["id"]

    answers = await asyncio.gather(*(submit() for _ in range(20)))
    assert len({name for _, name in answers}) == 1
    assert sorted(status for status, _ in answers) == [200] * 19 + [201]


async def test_what_is_queued_starts_in_strict_priority_order(client: Client) -> None:
    blockers = [
        await client.submit("import time; time.sleep(30)", priority=10, cpu_limit="100m", memory_limit="64Mi")
        for _ in range(4)
    ]
    await asyncio.gather(*(started(client, blocker["id"]) for blocker in blockers))
    priorities = [n * 7 % 11 for n in range(44)]
    body = {"evaluations": [{"code": "pass", "priority": priority, "cpu_limit": "1"} for priority in priorities]}
    items = (await client.http.post("/v1/evaluations/batch", json=body)).json()["items"]
    # One slot only: the other three stay held while all of it drains.
    await client.http.post(f"/v1/evaluations/{blockers[0]['id']}/cancel")
    ended = [await client.ended(item["evaluation"]["id"]) for item in items]
    for blocker in blockers[1:]:
        await client.http.post(f"/v1/evaluations/{blocker['id']}/cancel")
    order = sorted(ended, key=lambda one: one["provisioning_at"])
    assert [(one["priority"], one["submitted_at"], one["id"]) for one in order] == [
        (one["priority"], one["submitted_at"], one["id"])
        for one in sorted(ended, key=lambda one: (-one["priority"], items_index(items, one["id"])))
    ]


def items_index(items: list[dict[str, Any]], name: str) -> int:
    return next(n for n, item in enumerate(items) if item["evaluation"]["id"] == name)


async def started(client: Client, name: str) -> None:
    async def runs() -> bool:
        return bool((await client.get(name))["state"] == "running")

    await wait_until_async(runs, timeout=20, describe=f"{name} to run")


async def test_large_evaluations_do_not_block_small_ones(client: Client) -> None:
    large = [
        await client.submit("import time; time.sleep(30)", priority=10, memory_limit="1Gi", cpu_limit="100m")
        for _ in range(6)
    ]
    small = await client.run("print('small')", priority=0)
    assert small["state"] == "completed"
    for one in large:
        await client.http.post(f"/v1/evaluations/{one['id']}/cancel")
    for one in large:
        await client.ended(one["id"])


async def test_the_list_matches_reality_in_every_state(client: Client) -> None:
    label = {"suite": "list-accuracy"}
    done = await client.run("pass", labels=label)
    failed = await client.run("1/0", labels=label)
    running = await client.submit("import time; time.sleep(30)", labels=label)
    await started(client, running["id"])
    expected = {"completed": [done["id"]], "failed": [failed["id"]], "running": [running["id"]], "queued": []}
    for state, names in expected.items():
        page = (
            await client.http.get("/v1/evaluations", params={"state": state, "label": "suite=list-accuracy"})
        ).json()
        assert [one["id"] for one in page["items"]] == names, state
    await client.http.post(f"/v1/evaluations/{running['id']}/cancel")
    page = (await client.http.get("/v1/evaluations", params={"label": "suite=list-accuracy"})).json()
    assert [one["id"] for one in page["items"]] == [running["id"], failed["id"], done["id"]]
