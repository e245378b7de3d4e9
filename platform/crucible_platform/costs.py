"""What a stack costs in a month by being there, from what its rehearsal registers and list prices that state their date.

An estimate that leaves something out says so: a type of resource that is neither priced nor known to cost nothing is listed as such. What is paid for
by use (data, requests, log entries) is in no estimate made before anything has run.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from crucible_platform.rehearsal import Rehearsal, Rehearsed

PRICES = Path(__file__).parents[1] / "prices" / "us-east-1.yaml"

# They cost nothing by being there ("pricing" pages of VPC, IAM, CloudWatch, EventBridge, S3, ECR, SNS).
FREE = frozenset(
    {
        "aws:cloudwatch/logGroup:LogGroup",
        "aws:ec2/defaultSecurityGroup:DefaultSecurityGroup",
        "aws:ec2/flowLog:FlowLog",
        "aws:ec2/internetGateway:InternetGateway",
        "aws:ec2/launchTemplate:LaunchTemplate",
        "aws:ec2/route:Route",
        "aws:ec2/routeTable:RouteTable",
        "aws:ec2/routeTableAssociation:RouteTableAssociation",
        "aws:ec2/securityGroup:SecurityGroup",
        "aws:ec2/subnet:Subnet",
        "aws:ec2/vpc:Vpc",
        "aws:kms/alias:Alias",
        "aws:vpc/securityGroupEgressRule:SecurityGroupEgressRule",
        "aws:vpc/securityGroupIngressRule:SecurityGroupIngressRule",
    }
)
# What is in the cluster costs nothing but the nodes, except for what brings a volume or a load balancer with it.
_PAID_IN_CLUSTER = frozenset(
    {"kubernetes:core/v1:PersistentVolumeClaim", "kubernetes:core/v1:Service", "kubernetes:apps/v1:StatefulSet"}
)
_FREE_PREFIXES = (
    "aws:iam/",
    "aws:s3/",
    "aws:ecr/",
    "aws:eks/access",
    "aws:eks/addon",
    "aws:eks/podIdentity",
    "kubernetes:",
    "pulumi:",
)


@dataclass(frozen=True)
class Prices:
    """A price list.

    Attributes:
        region: where they hold.
        as_of: year and month in which they were read.
        monthly: USD a month for one of each item that is there all the time.
    """

    region: str
    as_of: str
    monthly: dict[str, float]


@dataclass
class Estimate:
    """What a stack costs in a month.

    Attributes:
        parts: component -> item -> how many there are and USD a month for all of them.
        unpriced: what may cost something, and is in no part: types, or items without a price.
    """

    parts: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    unpriced: set[str] = field(default_factory=set)

    @property
    def total(self) -> float:
        """USD a month for all that is priced."""
        return sum(usd for items in self.parts.values() for _, usd in items.values())


def load_prices(path: Path = PRICES) -> Prices:
    """Return a price list."""
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    hours = found["hours_a_month"]
    return Prices(
        found["region"],
        str(found["as_of"]),
        {**{item: usd * hours for item, usd in found["hourly"].items()}, **found["monthly"]},
    )


def estimate(found: Rehearsal, prices: Prices) -> Estimate:
    """Return what a rehearsed stack costs in a month in the region of the prices."""
    by_urn = {each.urn: each for each in found.resources}
    amounts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    made = Estimate()
    for each in found.resources:
        if not each.custom or _is_free(each.type):
            continue
        if each.type not in _ITEMS:
            made.unpriced.add(each.type)
            continue
        for item, count in _ITEMS[each.type](each, found):
            if item in prices.monthly:
                amounts[_component(each, by_urn)][item] += count
            else:
                made.unpriced.add(item)
    for part, items in sorted(amounts.items()):
        made.parts[part] = {item: (count, count * prices.monthly[item]) for item, count in sorted(items.items())}
    return made


def _is_free(kind: str) -> bool:
    return kind in FREE or (kind.startswith(_FREE_PREFIXES) and kind not in _PAID_IN_CLUSTER)


def _component(each: Rehearsed, by_urn: dict[str, Rehearsed]) -> str:
    top = each
    while top.parent in by_urn:
        top = by_urn[top.parent]
    return top.type.removeprefix("crucible:").partition(":")[0]


def _one(item: str) -> Callable[[Rehearsed, Rehearsal], Iterator[tuple[str, float]]]:
    def items(_: Rehearsed, __: Rehearsal) -> Iterator[tuple[str, float]]:
        yield item, 1

    return items


def _endpoint(each: Rehearsed, _: Rehearsal) -> Iterator[tuple[str, float]]:
    if each.inputs["vpcEndpointType"] == "Interface":
        yield "interface-endpoint", len(each.inputs["subnetIds"])


def _node_group(each: Rehearsed, found: Rehearsal) -> Iterator[tuple[str, float]]:
    """Count the nodes that it begins with, each with the disk of its launch template; of several instance types the first is tried first."""
    nodes = each.inputs["scalingConfig"]["desiredSize"]
    yield each.inputs["instanceTypes"][0], nodes
    template_id = each.inputs["launchTemplate"]["id"]
    for template in found.of("aws:ec2/launchTemplate:LaunchTemplate"):
        if template_id == f"{template.name}-id":
            for mapping in template.inputs["blockDeviceMappings"]:
                yield "gp3-gib", nodes * mapping["ebs"]["volumeSize"]


_ITEMS: dict[str, Callable[[Rehearsed, Rehearsal], Iterator[tuple[str, float]]]] = {
    "aws:ec2/eip:Eip": _one("public-ipv4"),
    "aws:ec2/natGateway:NatGateway": _one("nat-gateway"),
    "aws:ec2/vpcEndpoint:VpcEndpoint": _endpoint,
    "aws:eks/cluster:Cluster": _one("eks-cluster"),
    "aws:eks/nodeGroup:NodeGroup": _node_group,
    "aws:kms/key:Key": _one("kms-key"),
}
