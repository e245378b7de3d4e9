"""Dead letters on the real platform: a sandbox that is killed from outside until no attempt is left, and what is done about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import pytest

from tests.support.platform import Client, running_platform
from tests.support.waits import wait_until_async

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration

CODE = "import sys, time\nprint(sys.stdin.read(), flush=True)\ntime.sleep(60)"


def wrapped() -> set[psutil.Process]:
    """The processes under this one that hold something in: a sandbox each, or a server that other tests of the run share."""
    return {child for child in psutil.Process().children(recursive=True) if child.name() == "bwrap"}


async def kill_its_sandbox(client: Client, name: str, servers: set[psutil.Process]) -> None:
    async def runs() -> bool:
        return (await client.get(name))["state"] == "running" and len(wrapped() - servers) == 1

    await wait_until_async(runs, timeout=20, describe=f"{name} to run in a sandbox", tolerate=(psutil.NoSuchProcess,))
    (sandbox,) = wrapped() - servers
    sandbox.kill()


async def test_a_dead_letter_is_listed_replayed_whole_once_and_deleted(folder: Path) -> None:
    servers = wrapped()
    async with running_platform(folder, storage={"max_attempts": 2}) as (_, client):
        submitted = await client.submit(CODE, stdin="kept", priority=8, labels={"a": "b"}, timeout_seconds=90)
        await kill_its_sandbox(client, submitted["id"], servers)

        async def tried_again() -> bool:
            return (await client.get(submitted["id"]))["attempt"] == 2

        await wait_until_async(tried_again, timeout=20, describe="a second attempt")
        await kill_its_sandbox(client, submitted["id"], servers)
        ended = await client.ended(submitted["id"])
        assert (ended["state"], ended["reason"], ended["exit_code"]) == ("failed", "sandbox_error", None)

        page = (await client.http.get("/v1/dead-letters")).json()
        [letter] = page["items"]
        assert (letter["evaluation_id"], letter["attempts"], page["total"]) == (submitted["id"], 2, 1)

        answer = await client.http.post(f"/v1/dead-letters/{letter['id']}/replay")
        assert answer.status_code in (200, 201), answer.text
        replay = answer.json()
        assert replay["replay_of"] == submitted["id"]
        same = ("priority", "labels", "timeout_seconds", "memory_limit", "cpu_limit", "code_sha256")
        assert [replay[name] for name in same] == [submitted[name] for name in same]
        assert (await client.http.post(f"/v1/dead-letters/{letter['id']}/replay")).status_code == 409

        async def reads_its_input() -> bool:
            return await client.output(replay["id"]) == b"kept\n"

        await wait_until_async(reads_its_input, timeout=20, describe="the replay to find the same standard input")
        await client.http.post(f"/v1/evaluations/{replay['id']}/cancel")
        assert (await client.http.delete(f"/v1/dead-letters/{letter['id']}")).status_code == 204
        assert (await client.http.get("/v1/dead-letters")).json()["items"] == []
        assert (await client.get(submitted["id"]))["state"] == "failed"
