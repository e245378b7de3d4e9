"""Which kind of cluster it is: the one that KUBECONFIG names, kind where a Docker engine is found, otherwise namespaces."""

from __future__ import annotations

import os

from tests.cluster import machine
from tests.cluster.base import Cluster
from tests.cluster.external import ExternalCluster
from tests.cluster.kind import KindCluster, kind_works
from tests.cluster.namespaces import NamespaceCluster
from tests.cluster.state import Home


def open_cluster(name: str | None = None) -> Cluster:
    """Return the cluster of this name, up or not; `CRUCIBLE_CLUSTER` or `crucible` if none is given."""
    kubeconfig = os.environ.get("KUBECONFIG")
    if kubeconfig and not Home.owns(kubeconfig):
        return ExternalCluster(name)
    return KindCluster(name) if kind_works() else NamespaceCluster(name)


def why_no_cluster() -> str | None:
    """Return why this machine can have no cluster of any kind, or None if it can."""
    if isinstance(open_cluster(), NamespaceCluster):
        return machine.why_unusable()
    return None
