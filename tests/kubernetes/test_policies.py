"""The network policies on a cluster whose network enforces them: who reaches whom, what a namespace cannot undo, and what a quarantine cuts.

The policies are the repository's own, with another namespace put in, so that nothing here meets a platform that is deployed.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from crucible import names
from tests.support.policies import POLICIES, run_script, try_kubectl
from tests.support.waits import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster import Cluster

pytestmark = pytest.mark.cluster

PROGRAMS = Path(__file__).parent / "programs"
CALICO = POLICIES / "network" / "calico"
WRITER = "--as=system:serviceaccount:crucible:policies"
COMPONENT = "app.kubernetes.io/component"
SCRAPES = "crucible.dev/scrapes-metrics"
# Longer than any answer that comes takes on a busy machine.
CONNECT_SECONDS = 2.0

PLATFORM, OUTSIDE, MONITORING = "test-platform", "test-outside", "test-monitoring"


@dataclass(frozen=True)
class Place:
    """A Pod: where, with which labels, and what it listens on."""

    namespace: str
    name: str
    labels: dict[str, str]
    ports: tuple[int, ...] = ()


def component(name: str, *ports: int) -> Place:
    return Place(PLATFORM, name, {COMPONENT: name}, ports)


PLACES = [
    component("api", 8080),
    component("storage", 8082),
    component("dispatcher", 8090),
    component("worker", 8088),
    component("monitor", 8086),
    component("cleanup", 8087),
    component("postgres", 5432),
    component("redis", 6379),
    component("rabbitmq", 4369, 5671, 5672, 15671, 15672, 15692, 25672),
    # A second node of the broker, which only asks.
    Place(PLATFORM, "rabbitmq-peer", {COMPONENT: "rabbitmq"}),
    component("setup"),
    Place(PLATFORM, "operator", {"crucible.dev/access": "operator"}),
    Place(PLATFORM, "stranger", {}),
    Place(OUTSIDE, "outside", {}, (8080,)),
    Place(MONITORING, "prometheus", {}),
]
API_SERVER, DNS, METADATA, ELSEWHERE = "the API server", "DNS", "the metadata address", "another namespace"
SERVED = {f"{place.name}:{port}" for place in PLACES if place.namespace == PLATFORM for port in place.ports}
METRICS = {"api:8080", "storage:8082", "dispatcher:8090", "worker:8088", "monitor:8086", "cleanup:8087"}

# Exactly what each may reach. The rest of all that there is must be closed.
REACHES: dict[str, set[str]] = {
    "api": {"storage:8082", "dispatcher:8090", "redis:6379", DNS},
    "storage": {"postgres:5432", "redis:6379", "rabbitmq:5671", "rabbitmq:15671", DNS},
    "dispatcher": {"storage:8082", API_SERVER, DNS},
    "worker": {"storage:8082", "dispatcher:8090", "rabbitmq:5671", DNS},
    "monitor": {"storage:8082", API_SERVER, DNS},
    "cleanup": {"storage:8082", API_SERVER, DNS},
    "postgres": set(),
    "redis": set(),
    "rabbitmq": {DNS},
    "rabbitmq-peer": {"rabbitmq:4369", "rabbitmq:25672", DNS},
    "setup": {"storage:8082", "postgres:5432", "rabbitmq:15671", DNS},
    "operator": {"rabbitmq:15671", DNS},
    "stranger": set(),
    "outside": {"api:8080", API_SERVER, DNS, METADATA},
    "prometheus": METRICS | {"rabbitmq:15692", API_SERVER, DNS, METADATA, ELSEWHERE},
}


def pod(place: Place, image: str, *command: str, runtime: str | None = None) -> dict[str, Any]:
    """Return a Pod that the Pod Security level `restricted` takes."""
    security = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    spec = {
        "terminationGracePeriodSeconds": 0,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
        "tolerations": [{"key": names.TAINT_SANDBOX, "operator": "Exists"}],
        "volumes": [{"name": "programs", "configMap": {"name": "programs"}}],
        "containers": [
            {
                "name": "program",
                "image": image,
                "imagePullPolicy": "Never",
                "command": ["python3", "-u", *command],
                "securityContext": security,
                "resources": {"requests": {"cpu": "5m", "memory": "16Mi"}},
                "volumeMounts": [{"name": "programs", "mountPath": "/programs"}],
            }
        ],
    }
    if runtime:
        spec["runtimeClassName"] = runtime
    metadata = {"name": place.name, "namespace": place.namespace, "labels": place.labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def listener(place: Place, image: str) -> dict[str, Any]:
    return pod(place, image, "/programs/listen.py", *map(str, place.ports or (1024,)))


def make_namespace(cluster: Cluster, name: str, labels: dict[str, str] | None = None) -> None:
    metadata = {"name": name, "labels": labels or {}}
    cluster.kubectl(
        "apply", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    )
    files = [f"--from-file={file}" for file in sorted(PROGRAMS.glob("*.py"))]
    made = cluster.kubectl(
        "create", "configmap", "programs", "--namespace", name, *files, "--dry-run=client", "-o", "yaml"
    )
    cluster.kubectl("apply", "-f", "-", input=made)


def apply(cluster: Cluster, *things: dict[str, Any]) -> None:
    cluster.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(things))


def addresses(cluster: Cluster, *places: tuple[str, str]) -> dict[tuple[str, str], str]:
    """Wait until Pods run, and return their addresses."""
    for namespace in sorted({namespace for namespace, _ in places}):
        named = [f"pod/{name}" for there, name in places if there == namespace]
        cluster.kubectl("wait", "--namespace", namespace, "--for=condition=Ready", "--timeout=90s", *named)
    found = json.loads(cluster.kubectl("get", "pods", "--all-namespaces", "-o", "json"))["items"]
    ips = {(item["metadata"]["namespace"], item["metadata"]["name"]): item["status"].get("podIP") for item in found}
    return {place: ips[place] for place in places}


def reached(cluster: Cluster, place: tuple[str, str], targets: list[str]) -> set[str]:
    """Have a Pod try to connect to every target at once; returns those that answered."""
    namespace, name = place
    program = ("python3", "/programs/connect.py", str(CONNECT_SECONDS))
    said = cluster.kubectl("exec", "--namespace", namespace, name, "--", *program, *targets)
    return set(json.loads(said))


def in_namespace(name: str, namespace: str, to: str) -> dict[str, Any]:
    """Return one of Calico's policies, for a namespace of the test's own."""
    text = (CALICO / f"{name}.yaml").read_text(encoding="utf-8")
    document = yaml.safe_load(text.replace(f"'{namespace}'", f"'{to}'"))
    # Not with our prefix: what has it must be in a file.
    document["metadata"]["name"] = f"{to}-{name}"
    return dict(document)


# --- the way in -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of Calico's policies, for a test to change."""
    for file in CALICO.glob("*.yaml"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def restored(guarded_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, whose policies are put right again after the test."""
    yield guarded_cluster
    drop(guarded_cluster, "crucible-extra")
    code, said = run_script(guarded_cluster, "apply")
    assert code == 0, said


def drop(cluster: Cluster, name: str) -> None:
    kind = "globalnetworkpolicies.crd.projectcalico.org"
    cluster.kubectl("delete", kind, f"default.{name}", "--ignore-not-found", WRITER)


def test_what_the_repository_says_is_what_the_cluster_has(guarded_cluster: Cluster) -> None:
    code, said = run_script(guarded_cluster, "check")
    assert code == 0, said


# What is spoilt; how; and what the complaint names.
SPOILT: dict[str, tuple[dict[str, Any], str]] = {
    "selector": ({"selector": "locked = yes"}, "Selector = 'locked = yes'"),
    "type": ({"types": ["Egres"]}, "Types[0] = 'Egres'"),
    "action": ({"egress": [{"action": "Refuse"}]}, "Action"),
    "net": ({"egress": [{"action": "Deny", "destination": {"nets": ["10.0.0.0/33"]}}]}, "Nets"),
    "field": ({"selectr": "all()"}, "not recognized or is in the wrong location: selectr"),
}


def test_malformed_policies_fail_the_apply_each_with_its_mistake_and_nothing_is_applied(
    guarded_cluster: Cluster, folder: Path
) -> None:
    base = yaml.safe_load((CALICO / "quarantine.yaml").read_text(encoding="utf-8"))
    # Sorts before the malformed ones, and is new: had the files been applied in turn, it would be there.
    extra = {**base, "metadata": {"name": "crucible-extra"}}
    (folder / "a.yaml").write_text(yaml.safe_dump(extra), encoding="utf-8")
    for name, (change, _) in SPOILT.items():
        bad = {**base, "metadata": {"name": f"crucible-spoilt-{name}"}, "spec": {**base["spec"], **change}}
        (folder / f"z-{name}.yaml").write_text(yaml.safe_dump(bad), encoding="utf-8")
    code, said = run_script(guarded_cluster, "apply", str(folder))
    assert code == 1
    assert "nothing was applied" in said
    complaints = {name: line for name in SPOILT for line in said.splitlines() if f"crucible-spoilt-{name}:" in line}
    assert complaints.keys() == SPOILT.keys()
    for name, (_, complaint) in SPOILT.items():
        assert complaint in complaints[name]
    assert "crucible-extra" not in guarded_cluster.calicoctl("get", "globalnetworkpolicy")


def plain_policy() -> str:
    """A malformed policy as someone would give it to kubectl, which the API server would store."""
    spec = {"selector": "locked = yes", "types": ["Egres"]}
    document = {
        "apiVersion": "crd.projectcalico.org/v1",
        "kind": "GlobalNetworkPolicy",
        "metadata": {"name": "default.crucible-extra"},
        "spec": spec,
    }
    return json.dumps(document)


def test_the_way_that_does_not_validate_is_closed_even_to_administrators(guarded_cluster: Cluster) -> None:
    code, said = try_kubectl(guarded_cluster, "apply", "-f", "-", input=plain_policy())
    assert code != 0
    assert "may not write Calico objects" in said
    kind = "globalnetworkpolicies.crd.projectcalico.org"
    for change in (("delete", kind), ("annotate", kind)):
        rest = ("a=b",) if change[0] == "annotate" else ()
        code, said = try_kubectl(guarded_cluster, *change, "default.crucible-evaluations", *rest)
        assert code != 0
        assert "may not write Calico objects" in said


def test_what_is_malformed_missing_changed_or_unknown_in_the_cluster_is_found(restored: Cluster) -> None:
    restored.kubectl("create", "-f", "-", WRITER, input=plain_policy())
    kind = "globalnetworkpolicies.crd.projectcalico.org"
    restored.kubectl("delete", kind, "default.crucible-metadata-address", WRITER)
    restored.kubectl(
        "patch", kind, "default.crucible-evaluations", WRITER, "--type=merge", "-p", '{"spec":{"order":5000}}'
    )
    code, said = run_script(restored, "check")
    assert code == 1
    assert "crucible-extra: is malformed in the cluster" in said
    assert "crucible-extra: is in the cluster and in no file" in said
    assert "crucible-metadata-address: is not in the cluster" in said
    assert "crucible-evaluations: spec.order is 5000" in said


# --- who reaches whom -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def matrix(guarded_cluster: Cluster, runner_image: str) -> Iterator[tuple[dict[str, set[str]], dict[str, set[str]]]]:
    """What each Pod reaches without and with the policies."""
    cluster = guarded_cluster
    make_namespace(cluster, PLATFORM)
    make_namespace(cluster, OUTSIDE)
    make_namespace(cluster, MONITORING, {SCRAPES: "true"})
    try:
        apply(cluster, *(listener(place, runner_image) for place in PLACES))
        where = addresses(cluster, *((place.namespace, place.name) for place in PLACES))
        targets = {
            f"{place.name}:{port}": f"{where[place.namespace, place.name]}:{port}"
            for place in PLACES
            if place.namespace == PLATFORM
            for port in place.ports
        }
        targets[ELSEWHERE] = f"{where[OUTSIDE, 'outside']}:8080"
        targets[API_SERVER] = service(cluster, "default", "kubernetes", 443)
        targets[DNS] = service(cluster, "kube-system", "kube-dns", 53)
        targets[METADATA] = "169.254.169.254:80"
        before = ask_all(cluster, targets)
        policies = cluster.kubectl("kustomize", str(POLICIES / "network" / "platform"))
        apply(
            cluster,
            *({**d, "metadata": {**d["metadata"], "namespace": PLATFORM}} for d in yaml.safe_load_all(policies)),
        )
        for name in ("api-server", "metadata-address"):
            put_calico(cluster, in_namespace(name, names.PLATFORM_NAMESPACE, PLATFORM))

        def closed() -> bool:
            return not reached(cluster, (PLATFORM, "stranger"), list(targets.values()))

        wait_until(closed, timeout=30, describe="the policies to be in force")
        yield before, ask_all(cluster, targets)
    finally:
        for name in ("api-server", "metadata-address"):
            drop(cluster, f"{PLATFORM}-{name}")
        cluster.kubectl("delete", "namespace", PLATFORM, OUTSIDE, MONITORING, "--wait=false", "--ignore-not-found")


def service(cluster: Cluster, namespace: str, name: str, port: int) -> str:
    address = cluster.kubectl("get", "service", name, "--namespace", namespace, "-o", "jsonpath={.spec.clusterIP}")
    return f"{address}:{port}"


def put_calico(cluster: Cluster, document: dict[str, Any]) -> None:
    """Write a valid policy of a test's own, as the one identity that may."""
    metadata = {"name": f"default.{document['metadata']['name']}"}
    stored = {
        "apiVersion": "crd.projectcalico.org/v1",
        "kind": document["kind"],
        "metadata": metadata,
        "spec": document["spec"],
    }
    cluster.kubectl("create", "-f", "-", WRITER, input=json.dumps(stored))


def ask_all(cluster: Cluster, targets: dict[str, str]) -> dict[str, set[str]]:
    """Have every Pod try everything but itself."""

    def ask(place: Place) -> set[str]:
        found = reached(cluster, (place.namespace, place.name), list(targets.values()))
        return {name for name, target in targets.items() if target in found} - own(place.name)

    with ThreadPoolExecutor(8) as at_once:
        return dict(zip((place.name for place in PLACES), at_once.map(ask, PLACES), strict=True))


def own(name: str) -> set[str]:
    """Return what a Pod listens on itself."""
    return {ELSEWHERE} if name == "outside" else {target for target in SERVED if target.startswith(f"{name}:")}


Matrix = tuple[dict[str, set[str]], dict[str, set[str]]]


@pytest.mark.parametrize("name", REACHES)
def test_without_policies_everything_is_reached(matrix: Matrix, name: str) -> None:
    """The control: what is closed afterwards is closed by the policies."""
    assert matrix[0][name] == (SERVED | {API_SERVER, DNS, METADATA, ELSEWHERE}) - own(name)


@pytest.mark.parametrize("name", REACHES)
def test_each_reaches_exactly_what_it_needs(matrix: Matrix, name: str) -> None:
    assert matrix[1][name] == REACHES[name]


# --- the second line, and the quarantine ----------------------------------------------------------------------------------

ALLOW_ALL = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "allow-all"},
    "spec": {"podSelector": {}, "policyTypes": ["Ingress", "Egress"], "ingress": [{}], "egress": [{}]},
}
SECOND = "test-second-line"


@pytest.fixture(scope="module")
def pair(guarded_cluster: Cluster, runner_image: str) -> Iterator[tuple[Cluster, str, str]]:
    """Two Pods of one namespace: where each listens."""
    cluster = guarded_cluster
    make_namespace(cluster, SECOND)
    places = [Place(SECOND, name, {}, (8080,)) for name in ("suspect", "neighbour")]
    try:
        apply(cluster, *(listener(place, runner_image) for place in places))
        where = addresses(cluster, *((SECOND, place.name) for place in places))
        yield cluster, f"{where[SECOND, 'suspect']}:8080", f"{where[SECOND, 'neighbour']}:8080"
    finally:
        drop(cluster, f"{SECOND}-evaluations")
        cluster.kubectl("delete", "namespace", SECOND, "--wait=false", "--ignore-not-found")


def talks(cluster: Cluster, name: str) -> int:
    """Return how many answers a Pod that talks has had."""
    return cluster.kubectl("logs", "--namespace", SECOND, name, check=False).count("answer ")


def test_a_quarantine_cuts_what_is_open_and_a_label_alone_does_not(
    pair: tuple[Cluster, str, str], runner_image: str
) -> None:
    cluster, _, neighbour = pair
    talker = Place(SECOND, "talker", {})
    apply(cluster, pod(talker, runner_image, "/programs/talk.py", neighbour))
    wait_until(lambda: talks(cluster, "talker") > 3, timeout=60, describe="the talk to begin")
    cluster.kubectl("label", "pod", "talker", "--namespace", SECOND, "crucible.dev/quarantine=true")

    def closed() -> bool:
        return not reached(cluster, (SECOND, "talker"), [neighbour])

    wait_until(closed, timeout=20, describe="the quarantine to close the Pod off for what is new")
    before = talks(cluster, "talker")
    wait_until(lambda: talks(cluster, "talker") > before + 3, timeout=20, describe="the open connection to go on")
    code, said = run_script(cluster, "quarantine", SECOND, "talker", "--image", runner_image)
    assert code == 0, said
    assert "connections of" in said
    after = talks(cluster, "talker")
    assert closed()
    assert talks(cluster, "talker") == after
    code, said = run_script(cluster, "release", SECOND, "talker")
    assert code == 0, said
    wait_until(lambda: not closed(), timeout=20, describe="the Pod to reach its neighbour again")


def test_a_namespaces_own_policy_cannot_open_what_the_clusters_policy_closes(pair: tuple[Cluster, str, str]) -> None:
    cluster, suspect, neighbour = pair
    apply(cluster, {**ALLOW_ALL, "metadata": {"name": "allow-all", "namespace": SECOND}})
    dns = service(cluster, "kube-system", "kube-dns", 53)
    assert reached(cluster, (SECOND, "suspect"), [neighbour, dns]) == {neighbour, dns}
    put_calico(cluster, in_namespace("evaluations", names.EVALUATION_NAMESPACE, SECOND))

    def closed() -> bool:
        return not reached(cluster, (SECOND, "suspect"), [neighbour, dns])

    wait_until(closed, timeout=20, describe="the cluster's policy to close the namespace")
    assert reached(cluster, (SECOND, "neighbour"), [suspect]) == set()
