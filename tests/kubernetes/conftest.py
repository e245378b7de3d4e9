"""The cluster that the tests of this tier share.

It is brought up for the run under a name of its own and taken down after it. To save that time while writing tests:

    make cluster-up
    CRUCIBLE_CLUSTER_REUSE=1 .venv/bin/pytest tests/kubernetes/test_cluster.py

uses the one that is up, and leaves it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cluster import Cluster, open_cluster


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
