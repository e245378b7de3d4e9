"""gVisor by Pulumi: the installer of the repository's YAML with an environment's image, once there is one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from crucible_platform.cli import manifests, stack_values
from crucible_platform.manifests import name_of, read
from crucible_platform.rehearsal import Rehearsal, rehearse_platform, unknown_properties
from crucible_platform.sandbox_runtime import FOLDER, with_images
from crucible_platform.stack import LOCAL

pytestmark = pytest.mark.unit

IMAGE = "111111111111.dkr.ecr.eu-central-1.amazonaws.com/crucible-dev/gvisor-installer@sha256:" + "0" * 64
COMPONENT = "crucible:sandbox_runtime:SandboxRuntime"


@pytest.fixture(scope="module")
def made() -> Rehearsal:
    return rehearse_platform(
        LOCAL, {**stack_values(LOCAL), "crucible:sandbox_runtime": json.dumps({"installer": IMAGE})}
    )


def images(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, each in value.items():
            if key == "image" and isinstance(each, str):
                yield each
            yield from images(each)
    elif isinstance(value, list):
        for each in value:
            yield from images(each)


def test_every_object_of_the_installer_is_there_and_known_to_the_sdk(made: Rehearsal) -> None:
    parts = made.below(made.one(COMPONENT))
    assert len(parts) == len(read(FOLDER))
    assert [unknown for each in parts for unknown in unknown_properties(each)] == []


def test_the_image_is_the_environments_wherever_there_is_one(made: Rehearsal) -> None:
    parts = made.below(made.one(COMPONENT))
    assert {image for each in parts for image in images(each.inputs)} == {IMAGE}


def test_nothing_of_it_is_there_before_what_guards_the_cluster(made: Rehearsal) -> None:
    guards = {each.urn for each in made.below(made.one("crucible:policies:Policies"))}
    assert all(guards <= each.depends_on for each in made.below(made.one(COMPONENT)))


def test_what_is_rendered_refers_to_config_maps_that_are_rendered(made: Rehearsal) -> None:
    rendered = {name_of(each): each for each in manifests(made)}
    [mounted] = [
        volume["configMap"]["name"]
        for volume in rendered["DaemonSet/crucible-node/gvisor-installer"]["spec"]["template"]["spec"]["volumes"]
        if "configMap" in volume
    ]
    assert f"ConfigMap/crucible-node/{mounted}" in rendered


def test_without_an_image_there_is_no_installer() -> None:
    assert rehearse_platform(LOCAL, stack_values(LOCAL)).of(COMPONENT) == []


def test_an_image_of_ours_that_no_environment_has_is_told() -> None:
    with pytest.raises(KeyError, match="other"):
        with_images([{"spec": {"image": "crucible.local/other:dev"}}], {})
