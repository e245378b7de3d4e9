"""Reads the repository's own YAML for Kubernetes as kustomize would, for `pulumi up`, which should need no other program for it.

Of kustomize it knows what `policies/`, `gitops/base/gvisor` and `platform/servers` use: resources, components, patches by file, a namespace for all, and
ConfigMaps made of files. It refuses whatever else a kustomization says. A test of the cluster tier holds it to `kubectl kustomize`, object by object.
"""

from __future__ import annotations

import hashlib
import json
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

Object = dict[str, Any]

FILE = "kustomization.yaml"
_KNOWN = frozenset(
    {"apiVersion", "kind", "resources", "components", "patches", "namespace", "configMapGenerator", "generatorOptions"}
)
# What others are in, or are judged by, and so must be there before them.
FIRST = frozenset({"Namespace", "PriorityClass", "RuntimeClass", "ServiceAccount"})
# By what an entry of a list is known, where a patch means one of it and not the whole list ("patchMergeKey" in Kubernetes' API).
_MERGE_KEYS = {"containers": "name", "volumes": "name", "volumeMounts": "mountPath"}
# Kinds without a namespace, among those that the repository has ("kubectl api-resources --namespaced=false").
_CLUSTER_WIDE = frozenset(
    {
        "ClusterRole",
        "ClusterRoleBinding",
        "Namespace",
        "PriorityClass",
        "RuntimeClass",
        "ValidatingAdmissionPolicy",
        "ValidatingAdmissionPolicyBinding",
    }
)


class ManifestError(Exception):
    """A kustomization says something that is not known here, or that cannot be; the text names the file."""


def read(folder: Path, *, components: Sequence[Path] = ()) -> list[Object]:
    """Return the objects of a kustomization, in its order.

    Args:
        folder: of the kustomization.
        components: folders of components that are added to it.

    Raises:
        ManifestError: it says what is not known here, or a patch is of nothing.
    """
    objects = _build(folder, [])
    for component in components:
        objects = _build(component, objects)
    return objects


def name_of(found: Object) -> str:
    """Return what an object is called among all: its kind, namespace and name."""
    metadata = found["metadata"]
    return "/".join(part for part in (found["kind"], metadata.get("namespace"), metadata["name"]) if part)


def _build(folder: Path, base: list[Object]) -> list[Object]:
    path = folder / FILE
    said = yaml.safe_load(path.read_text(encoding="utf-8"))
    if unknown := said.keys() - _KNOWN:
        raise ManifestError(f"{path}: {', '.join(sorted(unknown))} is not known here; see {__name__}")
    objects = [*base, *(each for entry in said.get("resources", []) for each in _resource(folder / entry))]
    for entry in said.get("components", []):
        objects = _build(folder / entry, objects)
    renamed: dict[str, str] = {}
    for entry in said.get("configMapGenerator", []):
        made = _config_map(folder, entry, fixed=said.get("generatorOptions", {}).get("disableNameSuffixHash", False))
        renamed[entry["name"]] = made["metadata"]["name"]
        objects.append(made)
    objects = [_with_references(each, renamed) for each in objects]
    for entry in said.get("patches", []):
        if not {"path"} <= entry.keys() <= {"path", "target"}:
            raise ManifestError(f"{path}: patches: only `path` and `target` are known here")
        patches = _documents(folder / entry["path"])
        if target := entry.get("target"):
            objects = _patched(objects, _aimed(patches, target, objects, path), path)
        else:
            objects = _patched(objects, patches, path)
    if namespace := said.get("namespace"):
        objects = [_in_namespace(each, namespace) for each in objects]
    return objects


def _resource(path: Path) -> list[Object]:
    return _build(path, []) if path.is_dir() else _documents(path)


def _documents(path: Path) -> list[Object]:
    return [found for found in yaml.safe_load_all(path.read_text(encoding="utf-8")) if found]


def _config_map(folder: Path, entry: Object, *, fixed: bool) -> Object:
    if unknown := entry.keys() - {"name", "namespace", "files"}:
        raise ManifestError(f"{folder / FILE}: configMapGenerator: {', '.join(sorted(unknown))} is not known here")
    data = {}
    for each in entry["files"]:
        key, _, file = each.rpartition("=")
        data[key or file.rpartition("/")[2]] = (folder / file).read_text(encoding="utf-8")
    # Another content is another object, so that what uses it rolls out.
    metadata = {"name": entry["name"] if fixed else f"{entry['name']}-{_suffix(data)}"}
    if "namespace" in entry:
        metadata["namespace"] = entry["namespace"]
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _suffix(data: dict[str, str]) -> str:
    """Return the same suffix as kustomize would, so that what one of us has made the other has not to make again.

    That is a digest of the content as Go writes JSON, without the name, with letters in the place of what could make a word ("hasher.go" in sigs.k8s.io/kustomize).
    """
    text = json.dumps(
        {"data": data, "kind": "ConfigMap", "name": ""}, sort_keys=True, ensure_ascii=False, separators=(",", ":")
    )
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return hashlib.sha256(text.encode()).hexdigest()[:10].translate(str.maketrans("013ae", "ghkmt"))


def _with_references(found: Object, renamed: dict[str, str]) -> Object:
    """Return an object whose references to ConfigMaps that were made have the names that they were given."""
    if not renamed or found["kind"] == "ConfigMap":
        return found

    def visit(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            if key in ("configMap", "configMapRef", "configMapKeyRef") and value.get("name") in renamed:
                value = {**value, "name": renamed[value["name"]]}
            return {inner: visit(each, inner) for inner, each in value.items()}
        return [visit(each, key) for each in value] if isinstance(value, list) else value

    return dict(visit(found))


def _patched(objects: list[Object], patches: list[Object], path: Path) -> list[Object]:
    by_name = {name_of(each): each for each in objects}
    for patch in patches:
        if name_of(patch) not in by_name:
            raise ManifestError(f"{path}: patches: there is no {name_of(patch)} to patch")
        by_name[name_of(patch)] = _merged(by_name[name_of(patch)], patch, path)
    return list(by_name.values())


def _aimed(patches: list[Object], target: Object, objects: list[Object], path: Path) -> list[Object]:
    """Return a patch for each object that the target means; by which name the patch goes itself says nothing then."""
    if target.keys() != {"kind", "labelSelector"}:
        raise ManifestError(f"{path}: patches: a target is known here by `kind` and `labelSelector`")
    label, _, value = target["labelSelector"].partition("=")
    meant = [
        each
        for each in objects
        if each["kind"] == target["kind"] and each["metadata"].get("labels", {}).get(label) == value
    ]
    if not meant:
        raise ManifestError(f"{path}: patches: there is no {target['kind']} with {target['labelSelector']} to patch")
    own = ("name", "namespace")
    return [
        {**patch, "metadata": {key: each["metadata"][key] for key in own if key in each["metadata"]}}
        for patch in patches
        for each in meant
    ]


def _merged(old: Object, new: Object, path: Path) -> Object:
    merged = deepcopy(old)
    for key, value in new.items():
        if isinstance(value, list) and any(isinstance(each, dict) for each in value):
            merged[key] = _merged_list(key, merged.get(key, []), value, path)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merged(merged[key], value, path)
        else:
            merged[key] = value
    return merged


def _merged_list(key: str, old: list[Object], new: list[Object], path: Path) -> list[Object]:
    """Return a list in which entries of the same name are merged; what is new comes first, as with kustomize."""
    if not (known_by := _MERGE_KEYS.get(key)):
        raise ManifestError(f"{path}: patches: a list ({key}) is not known here")
    added = {each[known_by]: each for each in new}
    kept = [_merged(each, added.pop(each[known_by], {}), path) for each in old]
    return [*added.values(), *kept]


def _in_namespace(found: Object, namespace: str) -> Object:
    """Return an object that is in a namespace, and whose bindings mean service accounts that are."""
    moved = deepcopy(found)
    if moved["kind"] not in _CLUSTER_WIDE:
        moved["metadata"]["namespace"] = namespace
    for subject in _service_accounts(moved):
        subject["namespace"] = namespace
    return moved


def _service_accounts(found: Object) -> Iterator[Object]:
    return (
        subject
        for subject in found.get("subjects") or []
        if subject.get("kind") == "ServiceAccount" and "namespace" not in subject
    )
