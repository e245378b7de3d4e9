"""The nodes: in each zone a group for the platform, and one for sandboxes which nothing else may use.

A group of more zones than one is balanced by AWS, which takes nodes away where a volume still is, and cannot be told in which zone the
next one is wanted; hence one for each. What a node is told at its first boot are files, `platform/node_config/<role>.yaml`; what its
group has to say as well, labels and taints, is here, because an autoscaler must know of them before there is any node.
"""

from __future__ import annotations

import base64
import re
from email.mime.base import MIMEBase
from email.mime.multipart import MIMEMultipart
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

import pulumi
import pulumi_aws as aws
from pydantic import AfterValidator, Field, model_validator

from crucible import names
from crucible_platform.encryption import key
from crucible_platform.iam import by_service, role
from crucible_platform.section import Section

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crucible_platform.cluster import Cluster
    from crucible_platform.iam import Role
    from crucible_platform.network import Network, ZoneNetwork
    from crucible_platform.place import Place

NODE_CONFIG = Path(__file__).parents[1] / "node_config"
NODE_CONFIG_TYPE = ("application", "node.eks.aws")
# Any would do that the files do not have. One that changed would replace every node.
_BOUNDARY = "crucible-node-config"

LABEL_ROLE = f"{names.DOMAIN}/role"
LABEL_ZONE = f"{names.DOMAIN}/zone"

# Where AL2023's image has its root ("AMI root device", Amazon EC2 user guide).
_ROOT = "/dev/xvda"
# EKS's default quota for a group, which it raises when asked.
_MOST_NODES = 450


class NodeRole(StrEnum):
    """What a node is for."""

    PLATFORM = "platform"
    SANDBOX = "sandbox"


Architecture = Literal["x86_64", "arm64"]
_OF_IMAGE: dict[str, Architecture] = {"AL2023_x86_64_STANDARD": "x86_64", "AL2023_ARM_64_STANDARD": "arm64"}
_INSTANCE_TYPE = re.compile(r"[a-z0-9-]+\.[a-z0-9-]+")
_NAME = re.compile(r"(?P<family>[a-z]+)(?P<generation>\d+)(?P<more>[a-z-]*)\.")


def architecture(instance_type: str) -> Architecture | None:
    """Return what an instance type's name tells of its processors, or None if it does not.

    A `g` behind the generation is a Graviton ("Amazon EC2 instance type naming conventions", Amazon EC2 instance types guide), and so is
    all of the a1, which is older than that rule.
    """
    match = _NAME.match(instance_type)
    if not match:
        return None
    return "arm64" if match["more"].startswith("g") or match["family"] == "a" else "x86_64"


def _instance_types(types: tuple[str, ...]) -> tuple[str, ...]:
    if wrong := [each for each in types if not _INSTANCE_TYPE.fullmatch(each)]:
        raise ValueError(f"{wrong[0]!r} is no instance type, such as m7i.xlarge")
    return types


class NodeGroupConfig(Section):
    """A zone's group of one role. Each zone has one like it."""

    instance_types: Annotated[tuple[str, ...], AfterValidator(_instance_types)] = Field(
        min_length=1,
        max_length=20,
        description="Instance types, the preferred one first. The autoscaler expects as many CPUs and as much memory of all as of the first",
    )
    ami_type: Literal["AL2023_x86_64_STANDARD", "AL2023_ARM_64_STANDARD"] = Field(
        default="AL2023_x86_64_STANDARD",
        description="Amazon Linux 2023, x86 or ARM. x86 for sandboxes: gVisor replaces a program's system calls by jumps there, "
        "and did not on ARM when it was released (gvisor.dev, 2023-04-28)",
    )
    capacity_type: Literal["ON_DEMAND", "SPOT"] = Field(
        default="ON_DEMAND",
        description="`SPOT` is cheaper and may be taken away within two minutes, and what runs there with it",
    )
    minimum: int = Field(ge=0, le=_MOST_NODES, description="Nodes that there are at least, in each zone")
    desired: int = Field(
        ge=0, le=_MOST_NODES, description="Nodes that there are at first, in each zone; later, the autoscaler decides"
    )
    maximum: int = Field(ge=1, le=_MOST_NODES, description="Nodes that there are at most, in each zone")
    disk_gib: int = Field(
        default=100, ge=20, le=1000, description="Size of a node's disk, GiB: system, images, logs and what Pods write"
    )

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if not self.minimum <= self.desired <= self.maximum:
            raise ValueError(
                f"minimum {self.minimum}, desired {self.desired} and maximum {self.maximum} are not in that order"
            )
        wanted = _OF_IMAGE[self.ami_type]
        if wrong := [each for each in self.instance_types if architecture(each) not in (wanted, None)]:
            raise ValueError(f"{', '.join(wrong)}: not {wanted}, which ami_type {self.ami_type} is for")
        return self


class NodesConfig(Section):
    """The nodes."""

    platform: NodeGroupConfig
    sandbox: NodeGroupConfig
    max_unavailable: int = Field(
        default=1,
        ge=1,
        le=100,
        description="Nodes of a group that an update replaces at a time; one zone follows another",
    )
    ami_release: Annotated[str, Field(pattern=r"^1\.[0-9]+\.[0-9]+-[0-9]{8}$")] | None = Field(
        default=None,
        description="Release of the image, such as `1.36.4-20260923`. Unset, a group keeps the one that was the latest when it was made "
        "or last went to another version of Kubernetes",
    )
    detailed_monitoring: bool = Field(
        default=False,
        description="Metrics of instances every minute in place of every five, each billed as one of CloudWatch's",
    )

    @model_validator(mode="after")
    def _platform_runs_in_each_zone(self) -> Self:
        if self.platform.minimum < 1:
            raise ValueError(
                "platform.minimum is 0; a zone without a platform node loses its broker and its volumes' users"
            )
        return self

    def group(self, of: NodeRole) -> NodeGroupConfig:
        """Return the part of a role."""
        return self.platform if of is NodeRole.PLATFORM else self.sandbox


def user_data(of: NodeRole) -> str:
    """Return what an instance gets as its user data: the role's NodeConfig as a part of a MIME document, into which EKS merges its own.

    Always the same for the same file, since a change of it replaces every node.

    Raises:
        UnicodeEncodeError: the file has characters that would need an encoding, which nodeadm does not undo.
    """
    text = (NODE_CONFIG / f"{of}.yaml").read_text(encoding="utf-8")
    text.encode("ascii")
    document = MIMEMultipart("mixed", boundary=_BOUNDARY)
    part = MIMEBase(*NODE_CONFIG_TYPE)
    part.set_payload(text)
    document.attach(part)
    return document.as_string()


def labels(of: NodeRole, zone: str) -> dict[str, str]:
    """Return the labels of a group's nodes. That of a sandbox is in its NodeConfig as well, where the kubelet takes the same from both."""
    sandbox = {names.LABEL_SANDBOX_NODE: "true"} if of is NodeRole.SANDBOX else {}
    return {LABEL_ROLE: of.value, LABEL_ZONE: zone, **sandbox}


def taints(of: NodeRole) -> list[aws.eks.NodeGroupTaintArgs]:
    """Return the taints of a group's nodes, which must be those of its NodeConfig: if EKS names any, the kubelet goes by these alone.

    The gVisor installer lifts the second one, and EKS does not put it back ("Prevent Pods from being scheduled on specific nodes",
    Amazon EKS user guide).
    """
    if of is NodeRole.PLATFORM:
        return []
    return [
        aws.eks.NodeGroupTaintArgs(key=each, value="true", effect="NO_SCHEDULE")
        for each in (names.TAINT_SANDBOX, names.TAINT_NOT_READY)
    ]


class NodeGroups(pulumi.ComponentResource):
    """Both groups of each zone.

    Attributes:
        role_arns: what the nodes of each role may do.
    """

    def __init__(
        self,
        config: NodesConfig,
        place: Place,
        network: Network,
        cluster: Cluster,
        *,
        way_out: Sequence[pulumi.Resource],
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        """Make them.

        Args:
            config: what the stack says of them.
            place: where.
            network: its private subnets.
            cluster: which they join.
            way_out: by which a node reaches what it needs to join, and so must be there first; none where endpoints have it all.
            opts: the provider.
        """
        super().__init__("crucible:node_groups:NodeGroups", place.name, None, opts)
        self._way_out = way_out
        self._config = config
        self._place = place
        self._cluster = cluster
        self._below = pulumi.ResourceOptions(parent=self)
        disks = self._disk_key()
        self.role_arns: dict[NodeRole, pulumi.Output[str]] = {}
        for each in NodeRole:
            own = self._role(each)
            self.role_arns[each] = own.arn
            template = self._template(each, disks)
            before: list[pulumi.Resource] = []
            for zone in network.zones:
                before = [self._group(each, zone, own, template, before)]
        self.register_outputs({"role_arns": {of.value: arn for of, arn in self.role_arns.items()}})

    def _disk_key(self) -> aws.kms.Key:
        account = self._place.account
        # EC2 Auto Scaling starts the nodes and nothing but the key's policy lets it ("Required AWS KMS key policy for use with encrypted
        # volumes"). It is named by a condition: KMS refuses a principal that is not there yet, and in a new account it is not.
        scaling = "aws-service-role/autoscaling.amazonaws.com/AWSServiceRoleForAutoScaling"
        return key(
            "nodes",
            self._place,
            description="Encrypts the disks of nodes",
            used_by={
                "Principal": {"AWS": "*"},
                "Condition": {
                    "StringEquals": {
                        "kms:CallerAccount": account,
                        "aws:PrincipalArn": f"arn:aws:iam::{account}:role/{scaling}",
                    }
                },
            },
            lent=True,
            opts=self._below,
        )

    def _role(self, of: NodeRole) -> Role:
        return role(
            f"node-{of}",
            self._place,
            by_service("ec2.amazonaws.com"),
            managed=[
                # Not AmazonEKSWorkerNodeMinimalPolicy: it has nothing but Pod Identity, and a node asks EC2 for its own name before it
                # joins ("Amazon EKS node IAM role", Amazon EKS user guide).
                "AmazonEKSWorkerNodePolicy",
                "AmazonEC2ContainerRegistryPullOnly",
                # A shell without SSH, for whoever IAM lets.
                "AmazonSSMManagedInstanceCore",
            ],
            description=f"What {of} nodes may do",
            opts=self._below,
        )

    def _template(self, of: NodeRole, disks: aws.kms.Key) -> aws.ec2.LaunchTemplate:
        name = f"{self._place.name}-{of}"
        # The provider's default tags reach what Pulumi makes, and these Auto Scaling makes.
        tags = {"Name": name, **self._place.tags}
        return aws.ec2.LaunchTemplate(
            name,
            name=name,
            description=f"{of} nodes",
            user_data=base64.b64encode(user_data(of).encode("ascii")).decode("ascii"),
            metadata_options=aws.ec2.LaunchTemplateMetadataOptionsArgs(
                http_endpoint="enabled",
                http_tokens="required",
                # A Pod is one hop further away, and so gets no answer, nor the node's role.
                http_put_response_hop_limit=1,
                instance_metadata_tags="disabled",
            ),
            block_device_mappings=[
                aws.ec2.LaunchTemplateBlockDeviceMappingArgs(
                    device_name=_ROOT,
                    ebs=aws.ec2.LaunchTemplateBlockDeviceMappingEbsArgs(
                        volume_type="gp3",
                        volume_size=self._config.group(of).disk_gib,
                        encrypted="true",
                        kms_key_id=disks.arn,
                        delete_on_termination="true",
                    ),
                )
            ],
            monitoring=aws.ec2.LaunchTemplateMonitoringArgs(enabled=self._config.detailed_monitoring),
            tag_specifications=[
                aws.ec2.LaunchTemplateTagSpecificationArgs(resource_type=each, tags=tags)
                for each in ("instance", "volume", "network-interface")
            ],
            update_default_version=True,
            opts=self._below,
        )

    def _group(
        self,
        of: NodeRole,
        zone: ZoneNetwork,
        own: Role,
        template: aws.ec2.LaunchTemplate,
        before: list[pulumi.Resource],
    ) -> aws.eks.NodeGroup:
        config = self._config.group(of)
        return aws.eks.NodeGroup(
            f"{self._place.name}-{of}-{zone.zone}",
            cluster_name=self._cluster.name,
            # Only the beginning, so that one that replaces another can be there first. EKS adds 26 characters and takes 63; the cluster
            # has the stack's name.
            node_group_name_prefix=f"{of}-{zone.zone}-",
            node_role_arn=own.arn,
            subnet_ids=[zone.private_subnet_id],
            version=self._cluster.version,
            release_version=self._config.ami_release,
            ami_type=config.ami_type,
            capacity_type=config.capacity_type,
            instance_types=list(config.instance_types),
            scaling_config=aws.eks.NodeGroupScalingConfigArgs(
                min_size=config.minimum, desired_size=config.desired, max_size=config.maximum
            ),
            update_config=aws.eks.NodeGroupUpdateConfigArgs(max_unavailable=self._config.max_unavailable),
            launch_template=aws.eks.NodeGroupLaunchTemplateArgs(
                id=template.id, version=pulumi.Output.format("{0}", template.latest_version)
            ),
            labels=labels(of, zone.zone),
            taints=taints(of),
            opts=pulumi.ResourceOptions(
                parent=self,
                # One zone after the other: what is wrong with an image or a template is seen in the first, and the others go on.
                depends_on=[*self._cluster.ready, *self._way_out, *own.policies, *before],
                ignore_changes=["scalingConfig.desiredSize"],
            ),
        )
