"""A real Kubernetes cluster of several nodes on one machine, for tests and for people: no Docker, no registry.

Each node is a set of Linux namespaces with a disk, a network and an init of its own, and runs what a real node runs: containerd,
runc, gVisor, the kubelet, kube-proxy and Calico's enforcement, all built from the modules that `modules/` pins. Since a node is a
set of processes, its power can be cut and its cable pulled. `docs/test-cluster.md` says more.
"""

from tests.cluster.base import Cluster, Node
from tests.cluster.choice import open_cluster
from tests.cluster.errors import ClusterError, UnsupportedHereError

__all__ = ["Cluster", "ClusterError", "Node", "UnsupportedHereError", "open_cluster"]
