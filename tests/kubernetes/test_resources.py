"""What tests make in a cluster is removed by their own label: exactly as much as the level says, and never what is another's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.cluster_resources import (
    LABEL_TEST,
    CleanupLevel,
    KubernetesResourceManager,
    find,
    label_value,
    reap,
)
from tests.support.waits import wait_until

if TYPE_CHECKING:
    from tests.cluster import Cluster

pytestmark = pytest.mark.cluster

NAMESPACE = "test-resources"


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[str]:
    cluster.kubectl("create", "namespace", NAMESPACE)
    yield NAMESPACE
    cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def config_map(name: str, **labels: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": labels}, "data": {"a": "b"}}


def job(name: str, image: str) -> dict[str, Any]:
    container = {"name": "one", "image": image, "command": ["python3", "-c", "import signal; signal.pause()"]}
    # Its one process has no handler for SIGTERM, so as the first of its container it would wait for the whole of a grace period.
    spec = {
        "restartPolicy": "Never",
        "containers": [container],
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 0,
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {"backoffLimit": 0, "template": {"spec": spec}},
    }


def kinds(manager: KubernetesResourceManager) -> set[str]:
    return {one.kind for one in manager.found()}


def fail_within(manager: KubernetesResourceManager, name: str) -> None:
    with manager:
        manager.create(config_map(name))
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("level", "left"),
    [
        (CleanupLevel.NONE, {"jobs.batch", "pods", "configmaps"}),
        (CleanupLevel.PODS, {"jobs.batch", "configmaps"}),
        (CleanupLevel.ALL, set()),
    ],
)
def test_as_much_is_removed_as_the_level_says(
    cluster: Cluster, namespace: str, runner_image: str, level: CleanupLevel, left: set[str]
) -> None:
    manager = KubernetesResourceManager(cluster, f"level-{level}", namespace=namespace, level=level)
    with manager:
        manager.create(config_map(f"level-{level}"))
        manager.create(job(f"level-{level}", runner_image))
        wait_until(lambda: "pods" in kinds(manager), timeout=30, poll=0.2, describe="the Job's Pod to be made")

    assert kinds(manager) == left


def test_only_what_carries_the_tests_own_label_is_removed(cluster: Cluster, namespace: str) -> None:
    another = KubernetesResourceManager(cluster, "another", namespace=namespace)
    another.create(config_map("anothers"))
    plain = KubernetesResourceManager(cluster, "nobody", namespace=namespace).labelled(config_map("platforms"))
    del plain["metadata"]["labels"][LABEL_TEST]
    cluster.kubectl("create", "-f", "-", input=json.dumps(plain))

    with KubernetesResourceManager(cluster, "own", namespace=namespace) as own:
        own.create(config_map("owns"))

    left = cluster.kubectl("get", "configmaps", "-n", namespace, "-o", "name")
    assert "configmap/anothers" in left
    assert "configmap/platforms" in left
    assert "configmap/owns" not in left


def test_what_a_failed_test_made_is_kept_where_that_was_asked_for(cluster: Cluster, namespace: str) -> None:
    for keep, left in ((True, {"configmaps"}), (False, set())):
        manager = KubernetesResourceManager(cluster, f"failed-{keep}", namespace=namespace, keep_failed=keep)
        with pytest.raises(ZeroDivisionError):
            fail_within(manager, f"failed-{keep}".lower())
        assert kinds(manager) == left


def test_a_decorated_function_leaves_nothing_behind(cluster: Cluster, namespace: str) -> None:
    manager = KubernetesResourceManager(cluster, "decorated", namespace=namespace)

    @manager
    def test() -> set[str]:
        manager.create(config_map("decorated"))
        return kinds(manager)

    assert test() == {"configmaps"}
    assert kinds(manager) == set()


def test_the_fixture_names_the_test(resources: KubernetesResourceManager, request: pytest.FixtureRequest) -> None:
    made = resources.create(config_map("by-fixture"))

    assert made["metadata"]["labels"][LABEL_TEST] == label_value(request.node.nodeid)
    assert [one.name for one in resources.found()] == ["by-fixture"]


def test_what_is_old_is_reaped_whosever_it_was_and_what_is_new_is_not(cluster: Cluster, namespace: str) -> None:
    killed = KubernetesResourceManager(cluster, "killed-run", namespace=namespace)
    killed.create(config_map("left-behind"))
    later = datetime.now(UTC) + timedelta(hours=1)

    assert reap(cluster, namespace) == []
    assert "left-behind" in {one.name for one in reap(cluster, namespace, now=later)}
    assert find(cluster, namespace, LABEL_TEST) == []


def test_a_tests_name_becomes_a_label_whatever_it_holds() -> None:
    assert label_value("tests/kubernetes/test_x.py::test_it[a b]") == "tests-kubernetes-test_x.py-test_it-a-b"
    assert len(label_value("x" * 100)) == 63
