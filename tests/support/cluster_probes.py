"""Whether a cluster really isolates, found out by trying: a policy that denies everything and a connection all the same; the kernel that a
sandbox says it has.

That a plugin is installed says little: kindnet takes every NetworkPolicy and enforces none, and a RuntimeClass may lead to any runtime.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from crucible import names
from tests.support.waits import WaitTimeoutError, wait_until

if TYPE_CHECKING:
    from tests.support.policies import HasKubectl

MANIFEST = Path(__file__).with_name("cluster_probe.yaml")
START_SECONDS = 60
# A policy is in force within 0.2 s where there is anything that enforces it; this is what a busy machine may make of that.
ENFORCED_SECONDS = 15


def _probe_namespace(cluster: HasKubectl, image: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """Return a namespace of the probe's own, with the objects that are made in it by their names."""
    namespace = f"crucible-probe-{secrets.token_hex(3)}"
    found = {}
    for document in yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8")):
        document["metadata"]["namespace"] = namespace
        for container in document["spec"].get("containers", []):
            container["image"] = image
        found[document["metadata"]["name"]] = document
    cluster.kubectl("create", "namespace", namespace)
    cluster.kubectl("label", "namespace", namespace, f"{names.DOMAIN}/test=probe")
    return namespace, found


def _log(cluster: HasKubectl, namespace: str, pod: str) -> list[str]:
    return cluster.kubectl("logs", "--namespace", namespace, pod, check=False).splitlines()


def why_policies_are_not_enforced(cluster: HasKubectl, image: str, *, within: float = ENFORCED_SECONDS) -> str | None:
    """Have one Pod connect to another, deny everything, and see whether it still can. None if it cannot.

    Args:
        cluster: which one.
        image: one with Python.
        within: seconds that a policy may take.
    """
    namespace, objects = _probe_namespace(cluster, image)

    def create(name: str) -> None:
        cluster.kubectl("apply", "-f", "-", input=json.dumps(objects[name]))

    def address() -> str:
        path = "jsonpath={.status.podIP}"
        return cluster.kubectl("get", "pod", "server", "--namespace", namespace, "-o", path)

    try:
        create("server")
        where = wait_until(address, timeout=START_SECONDS, poll=0.5, describe="the probe's server to have an address")
        objects["client"]["spec"]["containers"][0]["args"].append(where)
        create("client")
        wait_until(
            lambda: "open" in _log(cluster, namespace, "client"),
            timeout=START_SECONDS,
            poll=0.5,
            describe="the probe's Pods to reach each other before any policy",
        )
        create("deny-all")
        wait_until(
            lambda: _log(cluster, namespace, "client")[-1:] == ["closed"],
            timeout=within,
            poll=0.5,
            describe="a policy that denies everything to be enforced",
        )
    except WaitTimeoutError as error:
        return str(error)
    finally:
        cluster.kubectl("delete", "namespace", namespace, "--wait=false")
    return None


def why_gvisor_is_not_real(cluster: HasKubectl, image: str) -> str | None:
    """Ask a Pod of the RuntimeClass which kernel it has. None if it is gVisor's."""
    namespace, objects = _probe_namespace(cluster, image)
    try:
        cluster.kubectl("apply", "-f", "-", input=json.dumps(objects["kernel"]))
        said = wait_until(
            lambda: _log(cluster, namespace, "kernel"),
            timeout=START_SECONDS,
            poll=0.5,
            describe=f"a Pod with RuntimeClass {names.RUNTIME_CLASS} to run",
        )
    except WaitTimeoutError as error:
        return str(error)
    finally:
        cluster.kubectl("delete", "namespace", namespace, "--wait=false")
    return None if said[-1] == "gvisor" else f"its kernel is {said[-1]}"
