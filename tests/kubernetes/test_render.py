"""What `pulumi up` would apply, on a real cluster: it says the same as kustomize does, comes up whole, and done again changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from crucible import names
from crucible_platform.cli import manifests, stack_values, with_images
from crucible_platform.manifests import name_of, read
from crucible_platform.rehearsal import rehearse_platform
from crucible_platform.section import ROOT
from crucible_platform.stack import LOCAL
from tests.cluster import UnsupportedHereError
from tests.deployment import find_target, make_secrets
from tests.support.images import built_image
from tests.support.waits import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

MANAGER = "rendered"
IMAGES = ("gvisor-installer", "postgres", "rabbitmq", "redis", "runner")
# A node as a cloud has it, without gVisor and closed to sandboxes.
NODE = "bare"
READY_SECONDS = 240


@pytest.fixture(scope="module")
def bare(guarded_cluster: Cluster) -> Iterator[str | None]:
    """A node without gVisor, where the cluster can have one."""
    try:
        guarded_cluster.add_node(NODE, "zone-a", gvisor=False)
    except UnsupportedHereError as error:
        print(f"every node has gVisor already: {error}")
        yield None
        return
    yield NODE
    guarded_cluster.kubectl(
        "delete", "daemonset", "gvisor-installer", f"--namespace={names.NODE_NAMESPACE}", "--ignore-not-found"
    )
    guarded_cluster.remove_node(NODE)


@pytest.fixture(scope="module")
def rendered(guarded_cluster: Cluster, bare: str | None) -> str:
    """The stack `local` with the images of this checkout, which the nodes have."""
    del bare
    images = [built_image(name) for name in IMAGES]
    for image in images:
        guarded_cluster.import_image(image.archive)
    values = stack_values(LOCAL)
    values |= with_images(values, "".join(f"{image.name} {image.reference}\n" for image in images))
    return yaml.safe_dump_all(manifests(rehearse_platform(LOCAL, values)))


def apply(cluster: Cluster, rendered: str) -> dict[str, str]:
    """Apply it, and return of each object what changes with what is wanted of it: its generation, or the version of one that has none."""
    options = ("--server-side", "--force-conflicts", f"--field-manager={MANAGER}", "-o", "json", "-f", "-")
    applied = json.loads(cluster.kubectl("apply", *options, input=rendered))["items"]
    return {
        name_of(each): str(each["metadata"].get("generation") or each["metadata"]["resourceVersion"])
        for each in applied
    }


def is_ready(cluster: Cluster, workload: dict[str, Any]) -> bool:
    """Tell whether all that a workload wants runs."""
    metadata = workload["metadata"]
    found = json.loads(
        cluster.kubectl("get", workload["kind"], metadata["name"], f"--namespace={metadata['namespace']}", "-o", "json")
    )
    status = found["status"]
    if status.get("observedGeneration", 0) < found["metadata"]["generation"]:
        return False
    if found["kind"] == "DaemonSet":
        return 0 < status["desiredNumberScheduled"] == status.get("numberReady", 0)
    wanted = found["spec"].get("replicas", 1)
    return bool(status.get("readyReplicas", 0) == status.get("updatedReplicas", 0) == wanted)


def test_what_is_rendered_comes_up_whole_and_the_second_time_changes_nothing(
    guarded_cluster: Cluster, rendered: str, bare: str | None
) -> None:
    cluster = guarded_cluster
    objects = list(yaml.safe_load_all(rendered))
    make_secrets(find_target(cluster=cluster))
    first = apply(cluster, rendered)
    assert first.keys() == {name_of(each) for each in objects}
    for workload in (each for each in objects if each["kind"] in ("StatefulSet", "Deployment", "DaemonSet")):
        wait_until(
            lambda workload=workload: is_ready(cluster, workload),
            timeout=READY_SECONDS,
            poll=0.5,
            describe=f"{name_of(workload)} to be ready",
        )
    if bare:
        found = json.loads(cluster.kubectl("get", "node", bare, "-o", "json"))
        assert found["metadata"]["labels"][names.LABEL_GVISOR] == names.GVISOR_READY
        assert names.TAINT_NOT_READY not in {taint["key"] for taint in found["spec"].get("taints", [])}
    assert apply(cluster, rendered) == first


def test_the_brokers_nodes_are_one_cluster(guarded_cluster: Cluster) -> None:
    listed = guarded_cluster.kubectl(
        "exec", "--namespace=crucible", "rabbitmq-0", "--", "rabbitmqctl", "cluster_status", "--formatter", "json"
    )
    assert len(json.loads(listed)["running_nodes"]) == 3


def normal(found: dict[str, Any]) -> dict[str, Any]:
    """An object without what kustomize and we choose differently on purpose: the namespace that it gives to policies, which are in none,
    and the line ends that it doubles in folded text."""
    found = dict(json.loads(json.dumps(found).replace("\\n\\n", "\\n")))
    if found["kind"].startswith("ValidatingAdmissionPolicy"):
        found["metadata"].pop("namespace", None)
    return found


@pytest.mark.parametrize("folder", ["policies", "gitops/base/gvisor", "platform/servers"])
def test_our_reading_of_a_kustomization_is_kustomizes_own(guarded_cluster: Cluster, folder: str) -> None:
    path: Path = ROOT / folder
    theirs = yaml.safe_load_all(guarded_cluster.kubectl("kustomize", str(path)))
    expected = {name_of(each): each for each in map(normal, filter(None, theirs))}
    assert {name_of(each): each for each in map(normal, read(path))} == expected
