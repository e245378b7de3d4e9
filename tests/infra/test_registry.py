"""The image registry: tags that stay, a key of its own, and what is kept for how long."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from crucible_platform.place import Place
from crucible_platform.registry import IMAGES, Registry, RegistryConfig, expiry
from crucible_platform.rehearsal import Rehearsal, Rehearsed, rehearse, unknown_properties
from crucible_platform.section import ROOT

pytestmark = pytest.mark.unit

REPOSITORY, EXPIRY = "aws:ecr/repository:Repository", "aws:ecr/lifecyclePolicy:LifecyclePolicy"
KEY = "aws:kms/key:Key"


def rehearsed(stack: str, config: RegistryConfig) -> tuple[Rehearsal, Registry]:
    made: list[Registry] = []
    place = Place("111111111111", "eu-central-1", stack)
    found = rehearse(lambda: made.append(Registry(config, place)), stack=stack)
    return found, made[0]


@pytest.fixture(scope="module")
def dev() -> tuple[Rehearsal, Registry]:
    return rehearsed("dev", RegistryConfig())


def repositories(found: Rehearsal) -> list[Rehearsed]:
    return found.of(REPOSITORY)


def refused(**fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        RegistryConfig.model_validate(fields)
    [only] = caught.value.errors()
    return f"{'.'.join(map(str, only['loc']))}: {only['msg']}"


def test_every_image_that_is_built_here_has_a_repository_and_nothing_else_has_one() -> None:
    assert sorted(IMAGES) == sorted(each.parent.name for each in ROOT.glob("services/images/*/Dockerfile"))


def test_a_repository_is_called_after_its_stack_and_image(dev: tuple[Rehearsal, Registry]) -> None:
    found, registry = dev
    assert {each.inputs["name"] for each in repositories(found)} == {f"crucible-dev/{image}" for image in IMAGES}
    assert registry.urls.keys() == registry.arns.keys() == set(IMAGES)


def test_a_tag_never_comes_to_mean_another_image(dev: tuple[Rehearsal, Registry]) -> None:
    for each in repositories(dev[0]):
        assert each.inputs["imageTagMutability"] == "IMMUTABLE"
        assert "imageTagMutabilityExclusionFilters" not in each.inputs


def test_what_is_pushed_is_scanned(dev: tuple[Rehearsal, Registry]) -> None:
    for each in repositories(dev[0]):
        assert each.inputs["imageScanningConfiguration"] == {"scanOnPush": True}


def test_images_are_encrypted_under_a_key_of_the_account_that_is_rotated(dev: tuple[Rehearsal, Registry]) -> None:
    key = dev[0].one(KEY, "crucible-dev-registry")
    assert key.inputs["enableKeyRotation"] is True
    for each in repositories(dev[0]):
        [encryption] = each.inputs["encryptionConfigurations"]
        assert encryption["encryptionType"] == "KMS"
        assert encryption["kmsKey"].endswith("/crucible-dev-registry")


def test_a_repository_with_images_is_not_deleted_and_productions_is_by_no_mistake() -> None:
    for stack, kept in (("staging", False), ("production", True)):
        found, _ = rehearsed(stack, RegistryConfig(images=("service",)))
        [repository] = repositories(found)
        assert not repository.inputs.get("forceDelete")
        assert [repository.protected, found.one(KEY).protected] == [kept, kept]


def test_every_repository_says_what_expires(dev: tuple[Rehearsal, Registry]) -> None:
    found, _ = dev
    said = {each.inputs["repository"]: json.loads(each.inputs["policy"]) for each in found.of(EXPIRY)}
    assert said == {f"crucible-dev/{image}": expiry(RegistryConfig()) for image in IMAGES}


def test_leftovers_expire_by_age_and_images_by_count_alone() -> None:
    untagged, tagged = expiry(RegistryConfig(untagged_days=3, kept_images=20))["rules"]
    assert untagged["selection"] == {
        "tagStatus": "untagged",
        "countType": "sinceImagePushed",
        "countUnit": "days",
        "countNumber": 3,
    }
    assert tagged["selection"] == {
        "tagStatus": "tagged",
        "tagPatternList": ["*"],
        "countType": "imageCountMoreThan",
        "countNumber": 20,
    }
    # The order in which ECR asks them, of which each has one.
    assert [untagged["rulePriority"], tagged["rulePriority"]] == [1, 2]


def test_the_provider_knows_every_property(dev: tuple[Rehearsal, Registry]) -> None:
    assert [said for each in dev[0].resources if each.custom for said in unknown_properties(each)] == []


@pytest.mark.parametrize("name", ["", "Service", "crucible/service", "service:1", "-service", "service-", "a b"])
def test_an_images_name_is_one_that_ecr_takes(name: str) -> None:
    assert refused(images=[name]).startswith("images.0: ")


def test_a_registry_for_nothing_is_refused() -> None:
    assert refused(images=[]).startswith("images: Value error, names none")


def test_an_image_has_one_repository() -> None:
    assert refused(images=["service", "runner", "service"]) == "images: Value error, names service twice"


@pytest.mark.parametrize(("field", "value"), [("untagged_days", 0), ("kept_images", 9), ("kept_images", 1001)])
def test_so_few_are_not_kept_that_nothing_could_be_gone_back_to(field: str, value: int) -> None:
    assert refused(**{field: value}).startswith(f"{field}: ")
