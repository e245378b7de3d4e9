"""What `pulumi up` would apply, on a real cluster: it is taken as it is, says the same as kustomize does, and done again changes nothing."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from crucible_platform.cli import manifests, stack_values
from crucible_platform.manifests import name_of, read
from crucible_platform.rehearsal import rehearse_platform
from crucible_platform.section import ROOT
from crucible_platform.stack import LOCAL

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cluster import Cluster

pytestmark = pytest.mark.cluster

MANAGER = "rendered"


@pytest.fixture(scope="module")
def rendered() -> str:
    return yaml.safe_dump_all(manifests(rehearse_platform(LOCAL, stack_values(LOCAL))))


def apply(cluster: Cluster, rendered: str) -> dict[str, str]:
    """Apply it, and return the version of each object."""
    options = ("--server-side", "--force-conflicts", f"--field-manager={MANAGER}", "-o", "json", "-f", "-")
    applied = json.loads(cluster.kubectl("apply", *options, input=rendered))
    return {name_of(each): each["metadata"]["resourceVersion"] for each in applied["items"]}


def test_what_is_rendered_is_applied_whole_and_the_second_time_changes_nothing(
    guarded_cluster: Cluster, rendered: str
) -> None:
    first = apply(guarded_cluster, rendered)
    assert first.keys() == {name_of(each) for each in yaml.safe_load_all(rendered)}
    assert apply(guarded_cluster, rendered) == first


def normal(found: dict[str, Any]) -> dict[str, Any]:
    """An object without what kustomize and we choose differently on purpose: the suffix that tells contents apart, the namespace that
    kustomize gives to policies, which are in none, and the line ends that it doubles in folded text."""
    text = re.sub(r"(gvisor-installer)-[a-z0-9]{10}\b", r"\1-suffix", json.dumps(found))
    text = re.sub(r"(\\n)+", r"\\n", text)
    found = dict(json.loads(text))
    if found["kind"].startswith("ValidatingAdmissionPolicy"):
        found["metadata"].pop("namespace", None)
    return found


@pytest.mark.parametrize("folder", ["policies", "gitops/base/gvisor"])
def test_our_reading_of_a_kustomization_is_kustomizes_own(guarded_cluster: Cluster, folder: str) -> None:
    path: Path = ROOT / folder
    theirs = yaml.safe_load_all(guarded_cluster.kubectl("kustomize", str(path)))
    expected = {name_of(each): each for each in map(normal, filter(None, theirs))}
    assert {name_of(each): each for each in map(normal, read(path))} == expected
