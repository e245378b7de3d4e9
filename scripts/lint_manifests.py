"""Holds every kustomization of the repository against what Kubernetes accepts: what each builds, kind by kind and field by field.

    .venv/bin/python scripts/lint_manifests.py

Needs a kubectl, on the PATH or built by scripts/cluster-tools, for its kustomize; no cluster. Calico's kinds are left to
scripts/policies, which validates them as Calico does.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft4Validator

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = ROOT / "gitops" / "kubernetes-schema.json"
_FOREIGN = "projectcalico.org/"
_SHOWN = 200


def kustomizations() -> list[Path]:
    """Return the folders that can be built by themselves, which components cannot."""
    found = sorted((*ROOT.glob("gitops/**/kustomization.yaml"), *ROOT.glob("policies/**/kustomization.yaml")))
    return [
        path.parent for path in found if yaml.safe_load(path.read_text(encoding="utf-8"))["kind"] == "Kustomization"
    ]


def kubectl() -> str:
    """Return a kubectl, built first where there is none."""
    found = shutil.which("kubectl")
    if found:
        return found
    tools = subprocess.run([ROOT / "scripts" / "cluster-tools"], stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603 - our own
    return str(Path(tools.stdout.strip()) / "bin" / "kubectl")


def build(program: str, folder: Path) -> list[Any]:
    """Return what a kustomization makes.

    Raises:
        ValueError: kustomize refuses, in its own words.
    """
    done = subprocess.run([program, "kustomize", folder], capture_output=True, text=True, check=False)  # noqa: S603 - our own
    if done.returncode:
        raise ValueError(done.stderr.strip())
    return [found for found in yaml.safe_load_all(done.stdout) if found]


def mistakes(schema: dict[str, Any], found: Any) -> list[str]:
    """Return what Kubernetes would not accept of an object."""
    version, kind = found.get("apiVersion", ""), found.get("kind", "")
    if _FOREIGN in version:
        return []
    name = f"{kind} {found.get('metadata', {}).get('name')}"
    definition = schema["kinds"].get(f"{version}/{kind}")
    if definition is None:
        return [f"{name}: {version} {kind} is not in {SCHEMA.name}; add it to scripts/kubernetes_schema.py"]
    validator = Draft4Validator({"$ref": f"#/definitions/{definition}", "definitions": schema["definitions"]})
    return [
        f"{name}: {'.'.join(map(str, error.path))}: {error.message[:_SHOWN]}" for error in validator.iter_errors(found)
    ]


def main() -> int:
    """Print every mistake; the exit status is 1 if there is one."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    program = kubectl()

    def check(folder: Path) -> list[str]:
        try:
            return [line for found in build(program, folder) for line in mistakes(schema, found)]
        except ValueError as error:
            return [str(error)]

    folders = kustomizations()
    with ThreadPoolExecutor(4) as several:
        findings = list(several.map(check, folders))
    for folder, lines in zip(folders, findings, strict=True):
        for line in lines:
            print(f"{folder.relative_to(ROOT)}: {line}")  # noqa: T201 - what a linter is for
    return int(any(findings))


if __name__ == "__main__":
    sys.exit(main())
