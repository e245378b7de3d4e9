"""The repository's YAML, read as kustomize would: what is known of it, and what is refused. The cluster tier holds it to kustomize itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from crucible_platform.manifests import ManifestError, name_of, read
from crucible_platform.objects import kind_of
from crucible_platform.policies import PoliciesConfig, policies
from crucible_platform.section import ROOT

pytestmark = pytest.mark.unit

ENVIRONMENTS = ("dev", "staging", "production", "local")
MAP = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "one"}, "data": {"a": "1", "b": "2"}}


def kustomization(folder: Path, said: dict[str, object], **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(said))
    for name, content in files.items():
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_an_environments_policies_have_its_own_quota_and_no_object_twice(environment: str) -> None:
    found = policies(PoliciesConfig(images={}), environment)
    names = [name_of(each) for each in found]
    assert len(set(names)) == len(names)
    (quota,) = (each for each in found if each["kind"] == "ResourceQuota")
    own = yaml.safe_load((ROOT / "policies/quota/environments" / environment / "resource-quota.yaml").read_text())
    assert own["spec"]["hard"].items() <= quota["spec"]["hard"].items()


def test_the_images_that_may_run_are_those_of_the_configuration() -> None:
    image = "registry.example.org/runner@sha256:" + "0" * 64
    (listed,) = (
        each for each in policies(PoliciesConfig(images={"python": image}), "dev") if each["kind"] == "ConfigMap"
    )
    assert listed["data"] == {"python": image}


def test_a_patch_changes_what_it_names_and_leaves_the_rest(tmp_path: Path) -> None:
    folder = kustomization(
        tmp_path,
        {"kind": "Kustomization", "resources": ["map.yaml"], "patches": [{"path": "patch.yaml"}]},
        map=MAP,
        patch={**MAP, "data": {"b": "3"}},
    )
    assert read(folder) == [{**MAP, "data": {"a": "1", "b": "3"}}]


def test_a_patch_with_a_target_changes_all_that_it_means_and_of_their_lists_what_it_names(tmp_path: Path) -> None:
    def workload(name: str, label: str) -> dict[str, object]:
        containers = [{"name": "server", "command": ["old", "way"], "image": name}, {"name": "other"}]
        metadata = {"name": name, "labels": {"part": label}}
        return {
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": metadata,
            "spec": {"containers": containers},
        }

    patch = {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": "all"},
        "spec": {"containers": [{"name": "server", "command": ["new"]}, {"name": "added"}]},
    }
    said = {
        "kind": "Kustomization",
        "resources": ["one.yaml", "two.yaml", "three.yaml"],
        "patches": [{"path": "patch.yaml", "target": {"kind": "StatefulSet", "labelSelector": "part=ours"}}],
    }
    one, two, three = workload("one", "ours"), workload("two", "ours"), workload("three", "theirs")
    found = read(kustomization(tmp_path, said, one=one, two=two, three=three, patch=patch))
    for each, name in zip(found[:2], ("one", "two"), strict=True):
        assert each["metadata"]["name"] == name
        assert each["spec"]["containers"] == [
            {"name": "added"},
            {"name": "server", "command": ["new"], "image": name},
            {"name": "other"},
        ]
    assert found[2] == three


def test_a_config_map_of_files_is_named_by_its_content_and_so_is_what_refers_to_it(tmp_path: Path) -> None:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "pod"},
        "spec": {"volumes": [{"name": "v", "configMap": {"name": "made"}}]},
    }
    said = {
        "kind": "Kustomization",
        "namespace": "here",
        "resources": ["pod.yaml"],
        "configMapGenerator": [{"name": "made", "files": ["text.yaml"]}],
    }
    names = []
    for text in ("one", "two", "one"):
        (found, made) = read(kustomization(tmp_path, said, pod=pod, text=text))
        assert made["data"] == {"text.yaml": text}
        assert found["spec"]["volumes"][0]["configMap"]["name"] == made["metadata"]["name"]
        assert found["metadata"]["namespace"] == made["metadata"]["namespace"] == "here"
        names.append(made["metadata"]["name"])
    assert names[0] == names[2] != names[1]


def test_a_namespace_for_all_is_not_for_what_is_the_clusters_and_is_for_the_accounts_of_its_bindings(
    tmp_path: Path,
) -> None:
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "b"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "r"},
        "subjects": [{"kind": "ServiceAccount", "name": "s"}, {"kind": "Group", "name": "g"}],
    }
    folder = kustomization(tmp_path, {"kind": "Kustomization", "namespace": "here", "resources": ["b.yaml"]}, b=binding)
    (found,) = read(folder)
    assert "namespace" not in found["metadata"]
    assert [subject.get("namespace") for subject in found["subjects"]] == ["here", None]


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"kind": "Kustomization", "replacements": []}, "replacements is not known here"),
        ({"kind": "Kustomization", "patches": [{"patch": "{}"}]}, "only `path` and `target` are known here"),
        ({"kind": "Kustomization", "patches": [{"path": "map.yaml"}]}, "there is no ConfigMap/one to patch"),
        (
            {"kind": "Kustomization", "patches": [{"path": "map.yaml", "target": {"kind": "Secret"}}]},
            "by `kind` and `labelSelector`",
        ),
        (
            {
                "kind": "Kustomization",
                "resources": ["map.yaml"],
                "patches": [{"path": "map.yaml", "target": {"kind": "ConfigMap", "labelSelector": "a=b"}}],
            },
            "there is no ConfigMap with a=b to patch",
        ),
        ({"kind": "Kustomization", "configMapGenerator": [{"name": "x", "literals": ["a=b"]}]}, "literals is not known here"),
        (
            {"kind": "Kustomization", "resources": ["map.yaml"], "patches": [{"path": "list.yaml"}]},
            r"a list \(args\) is not known here",
        ),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_and_not_left_out(tmp_path: Path, said: dict[str, object], says: str) -> None:
    folder = kustomization(tmp_path, said, map=MAP, list={**MAP, "args": [{"a": 1}]})
    with pytest.raises(ManifestError, match=says):
        read(folder)


def test_a_kind_that_the_sdk_does_not_have_is_told() -> None:
    assert kind_of("rbac.authorization.k8s.io/v1", "Role").__name__ == "Role"
    with pytest.raises(ValueError, match="policy/v1 Unknown: the SDK has no such kind"):
        kind_of("policy/v1", "Unknown")
