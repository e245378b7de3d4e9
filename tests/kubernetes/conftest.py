"""The cluster that the tests of this tier share.

It is brought up for the run under a name of its own and taken down after it. To save that time while writing tests:

    make cluster-up
    CRUCIBLE_CLUSTER_REUSE=1 .venv/bin/pytest tests/kubernetes/test_cluster.py

uses the one that is up, and leaves it.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.cluster import Cluster, open_cluster
from tests.support.capabilities import miss
from tests.support.cluster_probes import why_gvisor_is_not_real, why_policies_are_not_enforced
from tests.support.cluster_resources import CleanupLevel, KubernetesResourceManager, reap
from tests.support.reporting import in_ci

if TYPE_CHECKING:
    from tests.support.deployed import DeployedPlatform

FAILED = pytest.StashKey[bool]()

# The first test waits for the cluster; it has its programs by then, since `make test-cluster` builds them.
TIMEOUT_SECONDS = 300


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests of this tier more time, unless they say how much they need, and let those of the bare cluster come first.

    Once policies are in force, none but their own identity may change Calico's.
    """
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(TIMEOUT_SECONDS))
    items.sort(key=lambda item: item.path.name != "test_cluster.py")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster with nothing in it but what every cluster has: a control plane and a worker in each of two zones."""
    if os.environ.get("CRUCIBLE_CLUSTER_REUSE"):
        reused = open_cluster()
        reused.up()
        yield reused
        return
    made = open_cluster(f"test-{os.getpid()}")
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture(scope="session")
def runner_image(cluster: Cluster) -> str:
    """The image that evaluations run in, by digest, on every node."""
    from tests.support.images import built_image

    image = built_image("runner")
    cluster.import_image(image.archive)
    return image.reference


@pytest.fixture(scope="session")
def guarded_cluster(cluster: Cluster) -> Cluster:
    """The cluster with all of `policies/` in force, Calico's included."""
    from tests.support.policies import apply_policies, run_script

    apply_policies(cluster)
    code, said = run_script(cluster, "apply")
    assert code == 0, said
    return cluster


@pytest.fixture(scope="session")
def platform(cluster: Cluster) -> DeployedPlatform:
    """The whole platform of this checkout on the cluster, as `make deploy` puts it there.

    With CRUCIBLE_PLATFORM_REUSE=1 what is deployed is used as it is, where there is something.
    """
    from tests.deployment import build, deploy, find_deployed, find_target
    from tests.support.deployed import DeployedPlatform

    target, images = find_target(cluster=cluster), build()
    reuse = os.environ.get("CRUCIBLE_PLATFORM_REUSE")
    deployed = find_deployed(target) if reuse else deploy(target, built=images)
    return DeployedPlatform(cluster, deployed.url, deployed.api_key, images)


@pytest.fixture
def resources(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[KubernetesResourceManager]:
    """Makes objects in the namespace `default` that go with the test, or stay as --resource-cleanup and --keep-failed say."""
    manager = KubernetesResourceManager(
        cluster,
        request.node.nodeid,
        namespace="default",
        level=CleanupLevel(request.config.getoption("--resource-cleanup")),
        keep_failed=request.config.getoption("--keep-failed"),
    )
    reap(cluster, "default")
    yield manager
    manager.failed = request.node.stash.get(FAILED, False)
    manager.cleanup()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note for fixtures whether the test failed."""
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


@pytest.fixture(scope="session")
def enforced_policies(cluster: Cluster, runner_image: str, request: pytest.FixtureRequest) -> None:
    """The cluster enforces network policies: found out by trying. Where it does not, or nobody wants to know, the test is skipped."""
    if request.config.getoption("--skip-network-isolation"):
        miss("network policies", "--skip-network-isolation was given", ci=in_ci())
    if reason := why_policies_are_not_enforced(cluster, runner_image):
        miss("network policies", reason, ci=in_ci())


@pytest.fixture(scope="session")
def real_gvisor(cluster: Cluster, runner_image: str) -> None:
    """The cluster's sandboxes run under gVisor: found out by asking one for its kernel. Where they do not, the test is skipped."""
    if reason := why_gvisor_is_not_real(cluster, runner_image):
        miss("gvisor", reason, ci=in_ci())
