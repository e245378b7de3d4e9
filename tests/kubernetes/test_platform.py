"""The whole platform as `make deploy` puts it on a cluster: it works as on one machine, and goes on while its parts come and go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.deployment import deploy, find_target
from tests.support.deployed import WORKER
from tests.support.waits import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.deployed import DeployedPlatform

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

DEPLOYMENTS = ("api", "storage", "worker", "dispatcher", "monitor", "cleanup")
REPLICAS = {"api": 2, "storage": 2, "worker": 2, "dispatcher": 2, "monitor": 2, "cleanup": 1}
SERVERS = {"postgres": 1, "redis": 1, "rabbitmq": 3}
# On a machine that is busy with all of it.
PATIENCE = 120


@pytest.fixture
def no_workers(platform: DeployedPlatform) -> Iterator[DeployedPlatform]:
    """The platform while nothing takes evaluations from the broker; afterwards as many do as before."""
    platform.kubectl("scale", WORKER, "--replicas=0")
    wait_until(lambda: not platform.pods("worker"), timeout=PATIENCE, describe="the workers to go")
    try:
        yield platform
    finally:
        platform.kubectl("set", "env", WORKER, "CRUCIBLE_WORKER__SLOTS-")
        platform.kubectl("scale", WORKER, f"--replicas={REPLICAS['worker']}")
        platform.rolled_out(WORKER, timeout=PATIENCE)


def test_a_person_submits_with_the_command_and_the_code_runs_under_gvisor(platform: DeployedPlatform) -> None:
    code = "print(6 * 7); print(open('/proc/version').read()); print(__import__('os').getuid())"
    environment = {**os.environ, "CRUCIBLE_API_KEY": platform.api_key}
    command = [
        sys.executable,
        "-m",
        "crucible.cli.main",
        "submit",
        "--url",
        platform.url,
        "--code",
        code,
        "--wait",
        "--json",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, (done.stdout, done.stderr)
    evaluation = json.loads(done.stdout)["id"]
    answer, kernel, *_, user = platform.output(evaluation).splitlines()
    assert answer == "42"
    # What gVisor says of itself; the nodes' kernel is another.
    assert "-gvisor " in kernel
    assert user == "65532"


def test_output_is_seen_while_the_code_runs_and_a_cancel_ends_it(platform: DeployedPlatform) -> None:
    code = "import time\nprint('first', flush=True)\ntime.sleep(3600)"
    evaluation = platform.submit(code, timeout_seconds=300)
    wait_until(lambda: platform.output(evaluation) == "first\n", timeout=PATIENCE, describe="output of running code")
    assert platform.get(evaluation)["state"] == "running"
    platform.http.post(f"/v1/evaluations/{evaluation}/cancel").raise_for_status()
    record = platform.ended(evaluation, timeout=PATIENCE)
    assert (record["state"], record["reason"]) == ("cancelled", "cancelled_by_user")
    assert platform.output(evaluation) == "first\n"


def test_what_waits_in_rabbitmq_is_taken_in_strict_order_of_priority(no_workers: DeployedPlatform) -> None:
    platform = no_workers
    priorities = [2, 9, 5, 0, 7, 10]
    by_id = {platform.submit("pass", priority=priority): priority for priority in priorities}
    platform.kubectl("set", "env", WORKER, "CRUCIBLE_WORKER__SLOTS=1")
    platform.kubectl("scale", WORKER, "--replicas=1")
    records = platform.all_ended(list(by_id), timeout=PATIENCE)
    assert {record["state"] for record in records} == {"completed"}

    def taken(evaluation: str) -> str:
        [moment] = [event["at"] for event in platform.events(evaluation) if event["type"] == "provisioning"]
        return str(moment)

    assert [by_id[evaluation] for evaluation in sorted(by_id, key=taken)] == sorted(priorities, reverse=True)


def test_a_node_of_rabbitmq_goes_while_evaluations_wait_and_none_is_lost(no_workers: DeployedPlatform) -> None:
    platform = no_workers
    waiting = [platform.submit(f"print({number})") for number in range(10)]
    platform.kubectl("delete", "pod", "rabbitmq-0", "--grace-period=0", "--force")
    platform.kubectl("scale", WORKER, f"--replicas={REPLICAS['worker']}")
    records = platform.all_ended(waiting, timeout=PATIENCE)
    assert [(record["state"], record["exit_code"]) for record in records] == [("completed", 0)] * 10
    assert [platform.output(evaluation) for evaluation in waiting] == [f"{number}\n" for number in range(10)]
    platform.rolled_out("statefulset/rabbitmq", timeout=PATIENCE)


def test_every_service_is_restarted_while_evaluations_run_and_none_is_lost(platform: DeployedPlatform) -> None:
    # Longer than a lease: the workers that began these are gone by then, and those who watch keep them.
    code = "import time\nfor n in range(20):\n    print(n, flush=True)\n    time.sleep(2)"
    running = [platform.submit(code, key=f"restart-{number}") for number in range(8)]
    wait_until(
        lambda: all(platform.get(one)["state"] == "running" for one in running), timeout=PATIENCE, describe="all to run"
    )
    platform.kubectl("rollout", "restart", *(f"deployment/crucible-{name}" for name in DEPLOYMENTS))
    platform.rolled_out(*(f"deployment/crucible-{name}" for name in DEPLOYMENTS), timeout=PATIENCE)
    for evaluation, record in zip(running, platform.all_ended(running, timeout=PATIENCE), strict=True):
        assert (record["state"], record["exit_code"], record["attempt"]) == ("completed", 0, 1), record
        assert platform.output(evaluation) == "".join(f"{n}\n" for n in range(20))
        ends = [event for event in platform.events(evaluation) if event["type"] in ("completed", "failed", "timeout")]
        assert len(ends) == 1


def test_replicas_stand_in_different_zones_and_may_be_evicted_one_at_a_time(platform: DeployedPlatform) -> None:
    zones = {
        node["metadata"]["name"]: node["metadata"]["labels"].get("topology.kubernetes.io/zone")
        for node in json.loads(platform.cluster.kubectl("get", "nodes", "--output=json"))["items"]
    }
    budgets = {found["metadata"]["name"]: found for found in platform.objects("poddisruptionbudgets")}
    for component, replicas in (REPLICAS | SERVERS).items():
        pods = platform.pods(component)
        assert len(pods) == replicas, component
        if replicas > 1:
            assert len({zones[pod["spec"]["nodeName"]] for pod in pods}) == 2, component
        budget = budgets.get(f"crucible-{component}") or budgets[component]
        assert budget["spec"]["maxUnavailable"] == 1
        assert budget["status"]["expectedPods"] == replicas


def test_no_pod_of_the_platform_may_be_root_or_write_to_its_root(platform: DeployedPlatform) -> None:
    pods = [pod for component in (*DEPLOYMENTS, *SERVERS) for pod in platform.pods(component)]
    for pod in pods:
        name, spec = pod["metadata"]["name"], pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["priorityClassName"] == "crucible-platform", name
        assert spec["enableServiceLinks"] is False, name
        for container in spec["containers"]:
            _check_container(name, container)
    has_token = {
        pod["metadata"]["labels"]["app.kubernetes.io/component"]
        for pod in pods
        if any("serviceAccountToken" in source for volume in pod["spec"]["volumes"] for source in _sources(volume))
    }
    assert has_token == {"dispatcher", "monitor", "cleanup"}
    program = "import os; print(os.getuid(), os.access('/', os.W_OK), os.access('/opt/crucible', os.W_OK))"
    inside = platform.kubectl("exec", "deployment/crucible-api", "--", "python3", "-c", program)
    assert inside.split() == ["65532", "False", "False"]


def _check_container(name: str, container: dict[str, Any]) -> None:
    guard = container["securityContext"]
    assert guard["readOnlyRootFilesystem"] is True, name
    assert guard["allowPrivilegeEscalation"] is False, name
    assert guard["capabilities"] == {"drop": ["ALL"]}, name
    assert "@sha256:" in container["image"], name
    assert container["resources"].keys() == {"requests", "limits"}, name
    assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys(), name


def _sources(volume: dict[str, Any]) -> list[dict[str, Any]]:
    return list(volume.get("projected", {}).get("sources", []))


def test_deploying_again_keeps_every_secret_and_every_pod(platform: DeployedPlatform) -> None:
    def pods() -> set[str]:
        return {pod["metadata"]["uid"] for component in (*DEPLOYMENTS, *SERVERS) for pod in platform.pods(component)}

    def secrets() -> dict[str, Any]:
        return {found["metadata"]["name"]: found["data"] for found in platform.objects("secrets")}

    before = pods(), secrets()
    again = deploy(find_target(cluster=platform.cluster), built=platform.images)
    assert (again.url, again.api_key) == (platform.url, platform.api_key)
    assert (pods(), secrets()) == before
