"""What the policies repeat of the code's names and figures, they repeat rightly; and how `scripts/policies` compares."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from crucible import names
from crucible.kubernetes.api import Object
from crucible.limits import Limits
from crucible.quantity import parse_cpu, parse_memory
from crucible.settings import KubernetesSettings
from tests.support.scripts import load_script

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
POLICIES = ROOT / "policies"


def documents(path: str) -> list[Object]:
    return list(yaml.safe_load_all((POLICIES / path).read_text(encoding="utf-8")))


def named(path: str, kind: str, name: str) -> Object:
    (found,) = [item for item in documents(path) if item["kind"] == kind and item["metadata"]["name"] == name]
    return found


def test_the_namespaces_are_the_codes() -> None:
    made = {item["metadata"]["name"] for item in documents("namespaces.yaml")}
    assert made == {names.PLATFORM_NAMESPACE, names.EVALUATION_NAMESPACE, names.NODE_NAMESPACE}


def test_the_runtime_class_is_the_codes_and_takes_what_the_dispatcher_reckons_with() -> None:
    found = named("admission/runtime-class.yaml", "RuntimeClass", names.RUNTIME_CLASS)
    assert found["handler"] == names.RUNTIME_HANDLER
    settings, overhead = KubernetesSettings(), found["overhead"]["podFixed"]
    assert parse_cpu(overhead["cpu"]) == settings.overhead_cpu_millis
    assert parse_memory(overhead["memory"]) == settings.overhead_memory_bytes
    assert found["scheduling"]["nodeSelector"] == {names.LABEL_GVISOR: names.GVISOR_READY}
    assert [toleration["key"] for toleration in found["scheduling"]["tolerations"]] == [names.TAINT_SANDBOX]


def test_the_limit_range_lets_the_smallest_and_the_largest_evaluation_in_and_no_larger_one() -> None:
    (bounds,) = named("quota/limit-range.yaml", "LimitRange", "evaluations")["spec"]["limits"]
    limits = Limits()
    assert parse_memory(bounds["max"]["memory"]) == limits.memory_max_bytes
    assert parse_cpu(bounds["max"]["cpu"]) == limits.cpu_max_millis
    assert parse_memory(bounds["min"]["memory"]) == limits.memory_min_bytes
    assert parse_cpu(bounds["min"]["cpu"]) <= limits.cpu_min_millis


def test_the_priorities_are_the_codes_and_evaluations_are_below_all_else() -> None:
    platform = named("quota/priority-classes.yaml", "PriorityClass", names.PRIORITY_PLATFORM)
    evaluation = named("quota/priority-classes.yaml", "PriorityClass", names.PRIORITY_EVALUATION)
    assert platform["value"] > 0 > evaluation["value"]
    assert evaluation["preemptionPolicy"] == "Never"


def test_the_admission_speaks_of_what_the_code_speaks_of() -> None:
    text = (POLICIES / "admission" / "evaluation-pods.yaml").read_text(encoding="utf-8")
    for word in (
        names.RUNTIME_CLASS,
        names.SERVICE_ACCOUNT_EVALUATION,
        names.LABEL_EVALUATION,
        names.LABEL_ATTEMPT,
        names.LABEL_MANAGED_BY,
        names.MANAGED_BY,
        names.CONTAINER,
        names.PRIORITY_EVALUATION,
        names.TAINT_SANDBOX,
        names.EVALUATION_NAMESPACE,
    ):
        assert word in text


@pytest.mark.parametrize("folder", ["admission", "rbac", "quota", "network", "network/platform"])
def test_no_file_of_a_folder_is_left_out_of_its_kustomization(folder: str) -> None:
    path = POLICIES / folder
    listed = set(yaml.safe_load((path / "kustomization.yaml").read_text(encoding="utf-8"))["resources"])
    there = {file.name for file in path.glob("*.yaml")} - {"kustomization.yaml"}
    assert there <= listed


# --- scripts/policies -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("policies")


@pytest.mark.parametrize(
    ("wanted", "found", "difference"),
    [
        ({"order": 1}, {"order": 1, "tier": "default"}, None),
        ({"order": 1}, {"order": 2}, "spec.order is 2 and should be 1"),
        ({"order": 1}, {}, "spec.order is missing"),
        ({"egress": [{"action": "Deny"}]}, {"egress": [{"action": "Deny", "source": {}}]}, None),
        ({"egress": [{"action": "Deny"}]}, {"egress": [{"action": "Allow"}]}, "spec.egress[0].action is 'Allow'"),
        ({"egress": [{"action": "Deny"}]}, {"egress": []}, "spec.egress is []"),
        ({"types": ["Ingress"]}, {"types": ["Ingress", "Egress"]}, "spec.types is"),
    ],
)
def test_what_calico_adds_is_no_difference_and_everything_else_is(
    script: ModuleType, wanted: Any, found: Any, difference: str | None
) -> None:
    said = script.differs(wanted, found, "spec")
    assert said is None if difference is None else str(said).startswith(difference)


def test_calicos_policies_all_carry_our_prefix_and_a_name_of_their_own(script: ModuleType) -> None:
    assert set(script.load(script.POLICIES)) == {
        "crucible-evaluations",
        "crucible-quarantine",
        "crucible-api-server",
        "crucible-metadata-address",
    }


def test_a_folder_without_policies_is_a_mistake(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(script.PolicyError, match="no policies"):
        script.load(tmp_path)
