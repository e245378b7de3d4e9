"""Writes gitops/kubernetes-schema.json: what Kubernetes accepts, for the kinds that this repository has.

    .venv/bin/python scripts/kubernetes_schema.py SWAGGER.json

SWAGGER.json is api/openapi-spec/swagger.json of the Kubernetes sources of the version that tests/cluster/versions.env pins; a cluster
that runs gives the same with `kubectl get --raw /openapi/v2`. Unlike there, a field that does not exist is an error, as it is to
`kubectl apply`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parents[1] / "gitops" / "kubernetes-schema.json"
KINDS = {
    "v1": (
        "ConfigMap",
        "LimitRange",
        "Namespace",
        "PodTemplate",
        "ResourceQuota",
        "Secret",
        "Service",
        "ServiceAccount",
    ),
    "apps/v1": ("DaemonSet", "Deployment", "StatefulSet"),
    "batch/v1": ("CronJob", "Job"),
    "networking.k8s.io/v1": ("NetworkPolicy",),
    "policy/v1": ("PodDisruptionBudget",),
    "rbac.authorization.k8s.io/v1": ("ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"),
    "scheduling.k8s.io/v1": ("PriorityClass",),
    "node.k8s.io/v1": ("RuntimeClass",),
    "admissionregistration.k8s.io/v1": ("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"),
    "storage.k8s.io/v1": ("StorageClass",),
}
_REF = "#/definitions/"
_KEPT = ("type", "format", "enum", "required", "items", "additionalProperties", "properties", "$ref")
# What may be a number or a text; Kubernetes' own description of it says text only.
_EITHER = {
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString": {"type": ["integer", "string"]},
    "io.k8s.apimachinery.pkg.api.resource.Quantity": {"type": ["number", "string"]},
}


def lean(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema without what only people read, and closed where it names its properties."""
    found = {key: schema[key] for key in _KEPT if key in schema}
    if "items" in found:
        found["items"] = lean(found["items"])
    if isinstance(found.get("additionalProperties"), dict):
        found["additionalProperties"] = lean(found["additionalProperties"])
    if "properties" in found:
        found["properties"] = {name: lean(inner) for name, inner in found["properties"].items()}
        found["additionalProperties"] = False
    if "$ref" in found:
        return {"$ref": found["$ref"]}
    return found


def references(schema: Any) -> set[str]:
    """Return the names of the definitions that a schema leads to directly."""
    if isinstance(schema, dict):
        own = {schema["$ref"].removeprefix(_REF)} if isinstance(schema.get("$ref"), str) else set()
        return own.union(*map(references, schema.values()))
    return set()


def extract(swagger: dict[str, Any]) -> dict[str, Any]:
    """Return the schema: `kinds` maps `apiVersion/kind` to the name of its definition."""
    kinds = {}
    for name, definition in swagger["definitions"].items():
        for found in definition.get("x-kubernetes-group-version-kind", ()):
            version = "/".join(filter(None, (found["group"], found["version"])))
            if found["kind"] in KINDS.get(version, ()):
                kinds[f"{version}/{found['kind']}"] = name
    wanted = {f"{version}/{kind}" for version, names in KINDS.items() for kind in names}
    if missing := wanted - kinds.keys():
        raise SystemExit(f"not in that file: {', '.join(sorted(missing))}")
    definitions: dict[str, Any] = {}
    pending = set(kinds.values())
    while pending:
        name = pending.pop()
        definitions[name] = _EITHER.get(name) or lean(swagger["definitions"][name])
        pending |= references(definitions[name]) - definitions.keys()
    return {"kubernetes": swagger["info"]["version"], "kinds": kinds, "definitions": definitions}


def main() -> None:
    """Write the file."""
    schema = extract(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    TARGET.write_text(json.dumps(schema, sort_keys=True, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
