"""Tags by which costs and owners are found.

The platform's provider gives its default tags to all that it makes. What the engine shows of that differs: AWS's real provider puts the
result, default tags included, into each taggable resource's `tagsAll` before policies see it (provider/tags.go of pulumi-aws), and nothing
into resources that take no tags. So `tagsAll` is asked first, and else the provider's `defaultTags` together with the resource's `tags`:
default tags satisfy the rule for what takes no tags, too, and there is no list here of what does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from crucible_policies.names import REQUIRED_TAGS
from crucible_policies.resource import Resource, is_on
from crucible_policies.rule import ResourceRule

SCALING_GROUP = "aws:autoscaling/group:Group"
LAUNCH_TEMPLATE = "aws:ec2/launchTemplate:LaunchTemplate"
# What a launch template makes, and default tags do not reach.
LAUNCHED = ("instance", "volume")


def missing_tags(found: Resource) -> Iterator[str]:
    """Tell which required tags something of AWS is without."""
    if not found.type.startswith("aws:"):
        return
    given = found.properties
    if found.type == SCALING_GROUP:
        # Its tags are a list, and default tags are not given to it.
        own = {
            each.get("key"): each.get("value")
            for each in given.get("tags") or ()
            if is_on(each.get("propagateAtLaunch"))
        }
        if missing := _missing(own):
            yield f"tags lacks {missing} with propagateAtLaunch, since default tags do not reach a scaling group; add them"
        return
    if missing := _missing(_effective(found)):
        yield f"tags lacks {missing}; make it by the platform's provider, whose defaultTags has them"
    if found.type == LAUNCH_TEMPLATE:
        said = {each.get("resourceType"): each.get("tags") or {} for each in given.get("tagSpecifications") or ()}
        for kind in LAUNCHED:
            if missing := _missing(said.get(kind, {})):
                yield f"tagSpecifications lacks {missing} for {kind}, since default tags do not reach what it launches; add them"


def _effective(found: Resource) -> Mapping[str, Any]:
    if "tagsAll" in found.properties:
        tags: Mapping[str, Any] = found.properties["tagsAll"]
        return tags
    defaults = found.provider.get("defaultTags") or {}
    if isinstance(defaults, str):  # as providers are given what is more than text
        defaults = json.loads(defaults)
    return {**(defaults.get("tags") or {}), **(found.properties.get("tags") or {})}


def _missing(tags: Mapping[Any, Any]) -> str:
    return ", ".join(tag for tag in REQUIRED_TAGS if not tags.get(tag))


RULES = (
    ResourceRule(
        "required-tags",
        f"anything of AWS without the tags {', '.join(f'`{tag}`' for tag in REQUIRED_TAGS)}, instances and volumes of launch templates included",
        "a cost that nobody is known for is a cost that nobody ends, and what has no owner is not looked after",
        "the platform's provider, by `opts`; launch templates and scaling groups name the tags themselves",
        missing_tags,
    ),
)
