"""The whole way from Redis to RabbitMQ as an operator goes it: commands against a real platform with both brokers and a worker at each."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from crucible.cli.exit_codes import ExitCode
from tests.support.broker import declare
from tests.support.capabilities import needs
from tests.support.folders import scratch_dir
from tests.support.platform_process import PlatformProcess
from tests.support.waits import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers.rabbitmq import RabbitCluster
    from tests.servers.redis import RedisServer

pytestmark = [pytest.mark.integration, needs("rabbitmq"), needs("redis"), needs("sandbox")]

_BATCH = 20


@pytest.fixture
def platform(rabbitmq: RabbitCluster, rabbit_vhost: str, redis_server: RedisServer) -> Iterator[PlatformProcess]:
    new = rabbitmq.url(vhost=rabbit_vhost)
    declare(new)
    for folder in scratch_dir():
        process = PlatformProcess(
            folder,
            CRUCIBLE_BROKER_URL=new,
            CRUCIBLE_LEGACY_BROKER_URL=f"{redis_server.url}/2",
            CRUCIBLE_BROKER__RECONCILE_SECONDS="1",
        )
        try:
            asyncio.run(process.up())
            yield process
        finally:
            process.kill()


def crucible(platform: PlatformProcess, *arguments: str, stdin: bytes = b"", code: int = 0) -> Any:
    command = [sys.executable, "-m", "crucible.cli.main", *arguments, "--json"]
    environment = platform._environment | {"CRUCIBLE_DATA_DIR": str(platform.data_dir)}
    done = subprocess.run(command, input=stdin, capture_output=True, env=environment, timeout=120, check=False)
    assert done.returncode == code, (done.stdout, done.stderr)
    return json.loads(done.stderr if code else done.stdout)


def test_an_operator_moves_from_redis_to_rabbitmq_and_back_with_commands(platform: PlatformProcess) -> None:
    submitted: list[str] = []

    def submit() -> None:
        lines = [json.dumps({"code": f"print({n})", "priority": n % 11}) for n in range(_BATCH)]
        answer = crucible(platform, "batch", "-", stdin="\n".join(lines).encode())
        submitted.extend(item["evaluation"]["id"] for item in answer["items"])

    def migrate(*step: str, code: int = 0) -> Any:
        return crucible(platform, "broker", "migrate", *step, code=code)

    submit()
    before = migrate("status")
    assert [(side["role"], side["kind"], side["up"]) for side in before["brokers"]] == [
        ("new", "rabbitmq", True),
        ("legacy", "redis", True),
    ]
    assert "start" in migrate("drain", code=ExitCode.REFUSED)["detail"]
    assert migrate("start", "--share", "50")["phase"] == "sharing"
    submit()
    assert "drain" in migrate("finish", code=ExitCode.REFUSED)["detail"]
    assert migrate("drain", "--wait")["drained"] is True
    submit()
    assert migrate("finish")["phase"] == "finished"
    submit()
    assert migrate("rollback")["phase"] == "legacy"
    submit()

    def all_ended() -> bool:
        return bool(crucible(platform, "stats")["by_state"] == {"completed": len(submitted)})

    wait_until(all_ended, timeout=60, poll=0.5, describe=f"{len(submitted)} evaluations to complete")
    listed = crucible(platform, "list", "--limit", "200")["items"]
    assert sorted(item["id"] for item in listed) == sorted(submitted)
    assert {item["attempt"] for item in listed} == {1}
