"""The cluster that the tests of this tier share.

It is brought up for the run under a name of its own and taken down after it. To save that time while writing tests:

    make cluster-up
    CRUCIBLE_CLUSTER_REUSE=1 .venv/bin/pytest tests/kubernetes/test_cluster.py

uses the one that is up, and leaves it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster, open_cluster

# The first test waits for the cluster; it has its programs by then, since `make test-cluster` builds them.
TIMEOUT_SECONDS = 300


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests of this tier more time, unless they say how much they need."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(TIMEOUT_SECONDS))


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
