"""What nodes and other instances must be: Amazon Linux 2023, with their credentials out of reach of what runs on them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from crucible_policies.names import LABEL_SANDBOX_NODE, TAINT_SANDBOX
from crucible_policies.resource import Resource, is_on
from crucible_policies.rule import ResourceRule, StackRule

LAUNCH_TEMPLATE = "aws:ec2/launchTemplate:LaunchTemplate"
INSTANCE = "aws:ec2/instance:Instance"
LAUNCH_CONFIGURATION = "aws:ec2/launchConfiguration:LaunchConfiguration"
CLUSTER = "aws:eks/cluster:Cluster"
NODE_GROUP = "aws:eks/nodeGroup:NodeGroup"
SCALING_GROUP = "aws:autoscaling/group:Group"
# AWS's public parameters: /aws/service/ami-amazon-linux-latest/al2023-ami-... and /aws/service/eks/optimized-ami/<version>/amazon-linux-2023/...
_AL2023_IMAGE = re.compile(r"^resolve:ssm:/aws/service/.*(al2023|amazon-linux-2023)")
_LAUNCHED_BY = {NODE_GROUP: ("launchTemplate",), SCALING_GROUP: ("launchTemplate", "mixedInstancesPolicy")}


def open_metadata(found: Resource) -> Iterator[str]:
    """Tell from which instances' metadata a process may take the instance's credentials."""
    if found.type not in {LAUNCH_TEMPLATE, INSTANCE, LAUNCH_CONFIGURATION}:
        return
    if found.type == INSTANCE and "launchTemplate" in found.properties and "metadataOptions" not in found.properties:
        return  # has them from there
    options = found.properties.get("metadataOptions") or {}
    if options.get("httpEndpoint") == "disabled":
        return
    if options.get("httpTokens") != "required":
        yield "metadataOptions.httpTokens is not required, so any forwarded request gets the node's credentials; set it to required"
    # 1: a Pod, which is one hop further away, gets no answer ("Best practices for security", Amazon EKS).
    if options.get("httpPutResponseHopLimit") != 1:
        yield "metadataOptions.httpPutResponseHopLimit is not 1, so Pods reach the node's credentials; set it to 1"


def other_systems(found: Resource) -> Iterator[str]:
    """Tell what does not run Amazon Linux 2023, or cannot be known to."""
    given = found.properties
    if found.type == NODE_GROUP:
        kind = given.get("amiType")
        if not (kind or "").startswith("AL2023_"):
            yield f"amiType is {kind or 'not set'}; set it to AL2023_x86_64_STANDARD or another that begins with AL2023_"
    if found.type == CLUSTER and is_on((given.get("computeConfig") or {}).get("enabled")):
        yield "computeConfig.enabled gives nodes of EKS Auto Mode, which run Bottlerocket; leave it out"
    for kind, key in ((LAUNCH_TEMPLATE, "imageId"), (LAUNCH_CONFIGURATION, "imageId"), (INSTANCE, "ami")):
        if found.type == kind and key in given and not _AL2023_IMAGE.match(given[key]):
            yield f"{key} is {given[key]}, which does not say what it is; name AL2023 by AWS's parameter, in a launch template: resolve:ssm:/aws/service/..."


def ungoverned_groups(resources: Sequence[Resource]) -> Iterator[tuple[Resource, str]]:
    """Tell which groups' instances do not follow a launch template of this stack, which other rules have looked at."""
    templates = [each for each in resources if each.type == LAUNCH_TEMPLATE]
    for group in resources:
        if keys := _LAUNCHED_BY.get(group.type):
            sources = frozenset().union(*(group.came_from.get(key, frozenset()) for key in keys))
            if not any(template.urn in sources for template in templates):
                yield (
                    group,
                    f"{keys[0]} is no launch template of this stack, so nothing is known of its nodes; make one and name it",
                )


def unguarded_sandbox_nodes(found: Resource) -> Iterator[str]:
    """Tell which sandbox nodes take other work."""
    if found.type != NODE_GROUP or LABEL_SANDBOX_NODE not in (found.properties.get("labels") or {}):
        return
    for taint in found.properties.get("taints") or ():
        if taint.get("key") == TAINT_SANDBOX and taint.get("effect") in {"NO_SCHEDULE", "NO_EXECUTE"}:
            return
    yield f"taints lacks {TAINT_SANDBOX} with NO_SCHEDULE, so other work would share nodes with sandboxes; add it"


RULES = (
    ResourceRule(
        "imdsv2",
        "an instance or launch template whose metadata answers without a session token, or answers to Pods",
        "a Pod that reaches the metadata address is its node: it has the node's role",
        "`metadataOptions: {httpTokens: required, httpPutResponseHopLimit: 1}`",
        open_metadata,
    ),
    ResourceRule(
        "al2023-only",
        "nodes of AL2, Bottlerocket or Windows, Auto Mode, and images by an id that says nothing",
        "the installer of gVisor, nodeadm's configuration and the hardening are made for Amazon Linux 2023; AL2 gets no updates any more",
        "`amiType: AL2023_...`; elsewhere `imageId: resolve:ssm:/aws/service/...al2023...` in a launch template",
        other_systems,
    ),
    StackRule(
        "groups-follow-templates",
        "a node group or scaling group without a launch template of the same stack",
        "what EKS makes by itself lets Pods reach the metadata, and nobody has looked at its disks",
        "a launch template, and `launchTemplate` from it",
        ungoverned_groups,
    ),
    ResourceRule(
        "sandbox-nodes",
        f"a node group labelled `{LABEL_SANDBOX_NODE}` without the taint of the same name",
        "what leaves a sandbox is then beside the platform's own services",
        f"the taint `{TAINT_SANDBOX}` with effect `NO_SCHEDULE`",
        unguarded_sandbox_nodes,
    ),
)
