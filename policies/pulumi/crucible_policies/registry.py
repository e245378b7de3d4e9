"""Which image runs: the one that was tested, by a name that nobody can move to another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from crucible_policies.resource import Resource
from crucible_policies.rule import ResourceRule
from crucible_policies.workloads import objects, pods

REPOSITORY = "aws:ecr/repository:Repository"
FUNCTION = "aws:lambda/function:Function"


def movable_tags(found: Resource) -> Iterator[str]:
    """Tell in which repositories a tag may be put on another image."""
    if found.type == REPOSITORY and found.properties.get("imageTagMutability") != "IMMUTABLE":
        said = found.properties.get("imageTagMutability")
        yield f"imageTagMutability is {said or 'not set, which means MUTABLE'}; set it to IMMUTABLE"


def moving(image: str) -> str | None:
    """Tell why an image's name may be another image tomorrow; None if it may not."""
    name, digest, _ = image.partition("@sha256:")
    if digest:
        return None
    _, colon, tag = name.rpartition("/")[2].partition(":")
    if not colon:
        return f"{image}, which has no tag and so means latest"
    return image if tag.lower() == "latest" else None


def moving_images(found: Resource) -> Iterator[str]:
    """Tell which containers and functions run whatever is newest."""
    for where, image in _images(found):
        if isinstance(image, str) and (said := moving(image)):
            yield f"{where} is {said}; name a version, best by its digest (name@sha256:...)"


def _images(found: Resource) -> Iterator[tuple[str, Any]]:
    if found.type == FUNCTION and "imageUri" in found.properties:
        yield "imageUri", found.properties["imageUri"]
    for pod in (pod for made in objects(found) for pod in pods(made)):
        for where, container in pod.containers():
            yield f"{where}.image", container.get("image")
        for number, volume in enumerate(pod.spec.get("volumes") or ()):
            yield f"{pod.where}.volumes[{number}].image.reference", (volume.get("image") or {}).get("reference")


RULES = (
    ResourceRule(
        "ecr-immutable",
        "an image repository in which a tag may be put on another image",
        "what was tested under a tag must be what runs under it; a stolen push right must not change what is deployed",
        "`imageTagMutability: IMMUTABLE`",
        movable_tags,
    ),
    ResourceRule(
        "images-pinned",
        "`latest`, or an image without a tag, in Pods, in what makes Pods, and in functions",
        "two nodes then run two programs under one name, and a roll-back brings nothing back",
        "a version, best by digest",
        moving_images,
    ),
)
