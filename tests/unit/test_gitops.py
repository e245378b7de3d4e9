"""The manifests say the same as the code: names, ports, settings, secrets and times are in both by necessity."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509

from crucible import names
from crucible.settings import KubernetesSettings, Settings, env_name
from tests.deployment.certificates import RENEWED_BEFORE, authority, certificate
from tests.deployment.rollout import pending
from tests.deployment.secret_values import read_secrets, secret_objects, secret_values
from tests.support.scripts import load_script

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
BASE = ROOT / "gitops" / "base"
LOCAL = ROOT / "gitops" / "overlays" / "local"
SERVERS = ROOT / "platform" / "servers"
SERVICES = ("api", "storage", "worker", "dispatcher", "monitor", "cleanup")
CALLS_KUBERNETES = {"dispatcher", "monitor", "cleanup"}


@cache
def documents(path: Path) -> list[dict[str, Any]]:
    return [found for found in yaml.load_all(path.read_text(), yaml.CSafeLoader) if found]


def one(path: Path, kind: str, name: str | None = None) -> dict[str, Any]:
    [found] = [d for d in documents(path) if d["kind"] == kind and name in (None, d["metadata"]["name"])]
    return found


def environment(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_namespaces_classes_and_the_sandboxs_own_needs_are_those_of_the_code() -> None:
    spaces = {found["metadata"]["name"] for found in documents(ROOT / "policies" / "namespaces.yaml")}
    assert spaces == {names.PLATFORM_NAMESPACE, names.EVALUATION_NAMESPACE, names.NODE_NAMESPACE}
    priorities = {d["metadata"]["name"]: d for d in documents(ROOT / "policies" / "quota" / "priority-classes.yaml")}
    assert priorities.keys() == {names.PRIORITY_PLATFORM, names.PRIORITY_EVALUATION}
    assert priorities[names.PRIORITY_EVALUATION]["value"] < priorities[names.PRIORITY_PLATFORM]["value"]
    assert priorities[names.PRIORITY_EVALUATION]["preemptionPolicy"] == "Never"
    runtime = one(ROOT / "policies" / "admission" / "runtime-class.yaml", "RuntimeClass")
    assert (runtime["metadata"]["name"], runtime["handler"]) == (names.RUNTIME_CLASS, names.RUNTIME_HANDLER)
    assert runtime["scheduling"]["nodeSelector"] == {names.LABEL_GVISOR: names.GVISOR_READY}
    overhead, settings = runtime["overhead"]["podFixed"], KubernetesSettings()
    assert overhead == {
        "cpu": f"{settings.overhead_cpu_millis}m",
        "memory": f"{settings.overhead_memory_bytes // 1024**2}Mi",
    }


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_runs_its_own_command_on_its_own_port_with_no_more_than_it_needs(service: str) -> None:
    path = BASE / f"{service}.yaml"
    deployment = one(path, "Deployment")
    pod = deployment["spec"]["template"]
    [container] = pod["spec"]["containers"]
    port = getattr(Settings(), service).port
    assert container["command"] == ["crucible", "serve", service]
    assert container["ports"] == [{"name": "http", "containerPort": port}]
    assert pod["metadata"]["labels"] == {
        "app.kubernetes.io/name": f"crucible-{service}",
        names.LABEL_COMPONENT: service,
        names.LABEL_PART_OF: names.PART_OF,
    }
    assert pod["spec"]["serviceAccountName"] == service
    # Its ServiceAccount gives no token by itself.
    assert pod["spec"].get("automountServiceAccountToken", False) is (service in CALLS_KUBERNETES)
    assert container["resources"].keys() == {"requests", "limits"}
    selector = deployment["spec"]["selector"]
    assert one(path, "PodDisruptionBudget")["spec"]["selector"] == selector
    spread = [constraint["topologyKey"] for constraint in pod["spec"]["topologySpreadConstraints"]]
    assert spread == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]
    if any(found["kind"] == "Service" for found in documents(path)):
        found = one(path, "Service")
        assert found["spec"]["selector"] == selector["matchLabels"]
        assert found["spec"]["ports"][0]["port"] == port
        assert container["lifecycle"]["preStop"]["sleep"]["seconds"] > 0


def test_every_setting_exists_and_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = environment(BASE / "settings.env") | environment(LOCAL / "settings.env")
    known = {env_name(name) for name in Settings.model_fields}
    for section, field in Settings.model_fields.items():
        known |= {env_name(section, name) for name in getattr(field.annotation, "model_fields", {})}
    assert {name for name in wanted if name.startswith("CRUCIBLE_")} <= known
    for name, value in wanted.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.storage_url == f"http://crucible-storage:{settings.storage.port}"
    assert settings.dispatcher_url == f"http://crucible-dispatcher:{settings.dispatcher.port}"
    for service in SERVICES:
        assert getattr(settings, service).host == "0.0.0.0"
    # The last replica's folder must not be the only one that has an output.
    assert settings.storage.objects_url == "database"
    worker = one(BASE / "worker.yaml", "Deployment")["spec"]["template"]["spec"]
    assert worker["terminationGracePeriodSeconds"] >= settings.worker.drain_seconds + 15


# What a server that mounts the whole of a Secret reads of it.
CERTIFICATE = [{"key": key} for key in ("ca.crt", "tls.crt", "tls.key")]
ALL_OF = {
    "postgres": [{"key": "password"}],
    "redis": [{"key": "password"}],
    "rabbitmq": [{"key": "erlang-cookie"}, {"key": "definitions.json"}],
    "redis-tls": CERTIFICATE,
    "rabbitmq-tls": CERTIFICATE,
}


def _secret_keys(value: Any) -> set[tuple[str, str]]:
    if isinstance(value, list):
        return set().union(*map(_secret_keys, value))
    if not isinstance(value, dict):
        return set()
    own = {(value["secretKeyRef"]["name"], value["secretKeyRef"]["key"])} if "secretKeyRef" in value else set()
    if name := value.get("secretName"):
        own |= {(name, item["key"]) for item in value.get("items", ALL_OF.get(name, []))}
    return own.union(*map(_secret_keys, value.values()))


def test_every_secret_that_a_manifest_names_is_made_and_made_once() -> None:
    first = secret_values({})
    manifests = [*BASE.glob("*.yaml"), *SERVERS.glob("*/*.yaml")]
    wanted = {key for path in manifests for document in documents(path) for key in _secret_keys(document)}
    assert {("crucible-storage", "database-url"), ("rabbitmq-tls", "tls.key"), ("postgres", "password")} <= wanted
    assert wanted <= {(name, key) for name, content in first.items() for key in content}
    assert secret_values(read_secrets(secret_objects(first))) == first
    other = secret_values({})
    assert not {value for content in first.values() for value in content.values()} & {
        value for content in other.values() for value in content.values()
    }


def test_a_key_that_is_lost_is_made_up_again_and_the_others_stay() -> None:
    first = secret_values({})
    again = secret_values({name: content for name, content in first.items() if name != "redis"})
    assert again["redis"] != first["redis"]
    assert again["postgres"] == first["postgres"]
    assert again["crucible-worker"] == first["crucible-worker"]
    assert again["rabbitmq-tls"] == first["rabbitmq-tls"]


def subject(content: dict[str, str]) -> tuple[set[str], datetime]:
    """The names that a certificate bears, and when it ends."""
    found = x509.load_pem_x509_certificate(content["tls.crt"].encode())
    bears = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return set(bears.get_values_for_type(x509.DNSName)), found.not_valid_after_utc


def test_a_certificate_is_kept_until_it_nears_its_end_or_bears_other_names() -> None:
    signer = authority({})
    assert authority(signer) == signer
    made = certificate(signer, ["redis", "redis.crucible"], {})
    assert made["ca.crt"] == signer["ca.crt"]
    named, ends = subject(made)
    assert named == {"redis", "redis.crucible"}
    assert certificate(signer, ["redis", "redis.crucible"], made, now=ends - RENEWED_BEFORE - timedelta(days=1)) == made
    renewed = certificate(signer, ["redis", "redis.crucible"], made, now=ends - RENEWED_BEFORE)
    assert subject(renewed)[1] > ends
    assert renewed["tls.key"] != made["tls.key"]
    assert subject(certificate(signer, ["other"], made))[0] == {"other"}
    assert certificate(authority({}), ["redis", "redis.crucible"], made)["ca.crt"] != made["ca.crt"]


def test_each_node_of_rabbitmq_has_its_name_in_the_certificate_since_erlang_takes_no_star() -> None:
    replicas = one(SERVERS / "rabbitmq" / "rabbitmq.yaml", "StatefulSet")["spec"]["replicas"]
    named, _ = subject(secret_values({})["rabbitmq-tls"])
    for number in range(replicas):
        assert {f"rabbitmq-{number}.rabbitmq", f"rabbitmq-{number}.rabbitmq.crucible.svc.cluster.local"} <= named
    assert not [name for name in named if "*" in name]


def test_the_check_of_manifests_finds_what_kubernetes_would_refuse() -> None:
    lint = load_script("lint_manifests")
    schema = json.loads(lint.SCHEMA.read_text())
    deployment = one(BASE / "api.yaml", "Deployment")
    assert lint.mistakes(schema, deployment) == []
    wrong = json.loads(json.dumps(deployment))
    wrong["spec"]["replica"] = wrong["spec"].pop("replicas")
    wrong["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"] = "http"
    found = "\n".join(lint.mistakes(schema, wrong))
    assert "replica" in found
    assert "containerPort" in found
    assert "not in kubernetes-schema.json" in lint.mistakes(schema, {"apiVersion": "v2", "kind": "Pod"})[0]
    assert lint.mistakes(schema, {"apiVersion": "crd.projectcalico.org/v1", "kind": "GlobalNetworkPolicy"}) == []


@pytest.mark.parametrize(
    ("kind", "spec", "status", "lacks"),
    [
        ("Deployment", {"replicas": 2}, {"observedGeneration": 1}, "not seen yet"),
        ("Deployment", {"replicas": 2}, {"observedGeneration": 2, "updatedReplicas": 1}, "1 of 2 updated"),
        (
            "StatefulSet",
            {"replicas": 3},
            {"observedGeneration": 2, "updatedReplicas": 3, "readyReplicas": 2, "replicas": 3},
            "2 of 3 ready",
        ),
        (
            "Deployment",
            {},
            {"observedGeneration": 2, "updatedReplicas": 1, "readyReplicas": 1, "replicas": 2},
            "old replicas still end",
        ),
        (
            "Deployment",
            {"replicas": 2},
            {"observedGeneration": 2, "updatedReplicas": 2, "readyReplicas": 2, "replicas": 2},
            None,
        ),
        ("Job", {}, {"active": 1}, "not done"),
        ("Job", {}, {"succeeded": 1}, None),
    ],
)
def test_a_rollout_is_over_when_the_new_replicas_serve_and_the_old_are_gone(
    kind: str, spec: dict[str, Any], status: dict[str, Any], lacks: str | None
) -> None:
    workload = {"kind": kind, "metadata": {"name": "x", "generation": 2}, "spec": spec, "status": status}
    assert pending(workload) == lacks
