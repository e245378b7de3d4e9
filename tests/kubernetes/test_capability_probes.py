"""The probes that say whether a cluster isolates: they believe one that does, and find out one that only says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.cluster_probes import why_gvisor_is_not_real, why_policies_are_not_enforced

if TYPE_CHECKING:
    from tests.cluster import Cluster

pytestmark = pytest.mark.cluster


class Pretending:
    """A cluster that takes every NetworkPolicy and enforces none, as kindnet does, and whose RuntimeClass leads to its ordinary runtime."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    @property
    def kubeconfig(self) -> Path:
        return self._cluster.kubeconfig

    def kubectl_command(self, *arguments: str) -> list[str | Path]:
        return self._cluster.kubectl_command(*arguments)

    def kubectl(self, *arguments: str, input: str | None = None, check: bool = True) -> str:  # noqa: A002 - as the cluster's
        document = json.loads(input) if input else {"kind": "", "spec": {}}
        if document["kind"] == "NetworkPolicy":
            return "networkpolicy.networking.k8s.io/deny-all created"
        document["spec"].pop("runtimeClassName", None)
        return self._cluster.kubectl(*arguments, input=json.dumps(document) if input else None, check=check)


def test_a_cluster_that_enforces_policies_is_believed(cluster: Cluster, runner_image: str) -> None:
    assert why_policies_are_not_enforced(cluster, runner_image) is None


def test_a_cluster_that_takes_policies_and_ignores_them_is_found_out(cluster: Cluster, runner_image: str) -> None:
    said = why_policies_are_not_enforced(Pretending(cluster), runner_image, within=2)
    assert said is not None
    assert "for a policy that denies everything to be enforced" in said


def test_a_cluster_that_really_has_gvisor_is_believed(cluster: Cluster, runner_image: str) -> None:
    assert why_gvisor_is_not_real(cluster, runner_image) is None


def test_a_runtime_class_that_leads_elsewhere_is_found_out(cluster: Cluster, runner_image: str) -> None:
    said = why_gvisor_is_not_real(Pretending(cluster), runner_image)
    assert said is not None
    assert said.startswith("its kernel is Linux")
