"""RabbitMQ, Redis and PostgreSQL by Pulumi: the repository's YAML with a stack's images and sizes, on volumes that are encrypted."""

from __future__ import annotations

import json
from typing import Any

import pytest
import typer

from crucible_platform.cli import RUNNER, stack_values, with_images
from crucible_platform.rehearsal import Rehearsal, Rehearsed, rehearse_platform, unknown_properties
from crucible_platform.section import ROOT
from crucible_platform.servers import NAMES, STORAGE_CLASS
from crucible_platform.stack import EXAMPLE_FILE, LOCAL, ORGANISATION_VARIABLE, ConfigError, load_local
from tests.support.stacks import image, whole_stack

pytestmark = pytest.mark.unit

COMPONENT = "crucible:servers:Servers"
STATEFUL_SET = "kubernetes:apps/v1:StatefulSet"


@pytest.fixture(scope="module")
def made() -> dict[str, Rehearsal]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ORGANISATION_VARIABLE, str(ROOT / EXAMPLE_FILE))
        return {stack: rehearse_platform(stack, whole_stack(stack)) for stack in ("production", LOCAL)}


def stateful_sets(found: Rehearsal) -> dict[str, Rehearsed]:
    return {each.inputs["metadata"]["name"]: each for each in found.of(STATEFUL_SET)}


def claim(server: Rehearsed) -> dict[str, Any]:
    (found,) = server.inputs["spec"]["volumeClaimTemplates"]
    return dict(found["spec"])


def test_on_aws_every_volume_is_encrypted_by_the_stacks_own_key_and_waits_for_its_pod(
    made: dict[str, Rehearsal],
) -> None:
    found = made["production"]
    kind = found.one("kubernetes:storage.k8s.io/v1:StorageClass")
    assert kind.inputs["parameters"]["encrypted"] == "true"
    assert "volumes" in kind.inputs["parameters"]["kmsKeyId"]
    assert kind.inputs["volumeBindingMode"] == "WaitForFirstConsumer"
    assert kind.inputs["reclaimPolicy"] == "Retain"
    for server in stateful_sets(found).values():
        assert claim(server)["storageClassName"] == STORAGE_CLASS
        assert kind.urn in server.depends_on


def test_elsewhere_the_clusters_own_kind_of_volume_is_taken(made: dict[str, Rehearsal]) -> None:
    assert made[LOCAL].of("kubernetes:storage.k8s.io/v1:StorageClass") == []
    for server in stateful_sets(made[LOCAL]).values():
        assert "storageClassName" not in claim(server)


@pytest.mark.parametrize("stack", ["production", LOCAL])
def test_each_server_has_its_image_and_its_size(made: dict[str, Rehearsal], stack: str) -> None:
    sizes = json.loads(stack_values(stack)["crucible:servers"])["volumes_gib"]
    found = stateful_sets(made[stack])
    assert found.keys() == set(NAMES)
    for name, server in found.items():
        assert claim(server)["resources"]["requests"]["storage"] == f"{sizes[name]}Gi"
        assert [each["image"] for each in server.inputs["spec"]["template"]["spec"]["containers"]] == [image(name)]


def test_all_is_known_to_the_sdk_and_comes_after_what_guards_the_cluster(made: dict[str, Rehearsal]) -> None:
    for found in made.values():
        parts = [each for each in found.below(found.one(COMPONENT)) if "StorageClass" not in each.type]
        assert [unknown for each in parts for unknown in unknown_properties(each)] == []
        guards = {each.urn for each in found.below(found.one("crucible:policies:Policies"))}
        assert all(guards <= each.depends_on for each in parts)


def test_before_there_are_images_there_are_no_servers() -> None:
    assert rehearse_platform(LOCAL, stack_values(LOCAL)).of(COMPONENT) == []


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"images": {"redis": image("redis")}}, "name postgres, rabbitmq, redis, or none; postgres, rabbitmq is too much or missing"),
        ({"images": {"redis": "redis:7"}}, "crucible:servers.images.redis: "),
        ({"volumes_gib": {"postgres": 0, "rabbitmq": 1, "redis": 1}}, "crucible:servers.volumes_gib.postgres: "),
        ({"volumes_gib": {"postgres": 1, "rabbitmq": 1}}, "crucible:servers.volumes_gib.redis: it is missing"),
        ({"replicas": 5}, "crucible:servers.replicas: there is no such key"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_by_its_key(changed: dict[str, Any], says: str) -> None:
    values = whole_stack(LOCAL)
    wrong = json.dumps(json.loads(values["crucible:servers"]) | changed)
    with pytest.raises(ConfigError) as caught:
        load_local({**values, "crucible:servers": wrong})
    assert says in str(caught.value)


def test_an_image_that_was_not_built_is_named_with_the_command_that_builds_it() -> None:
    with pytest.raises(typer.BadParameter, match="make images NAMES='gvisor-installer postgres rabbitmq redis'"):
        with_images(stack_values(LOCAL), f"{RUNNER} {image(RUNNER)}\n")
