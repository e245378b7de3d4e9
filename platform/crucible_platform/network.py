"""The VPC: public and private subnets in each zone, each private one with a route table of its own.

A zone must be able to lose its way out, or have it moved, without the others noticing; hence a route table each, to which `nat`
adds the default route. What AWS itself serves is reached through endpoints and not through NAT: cheaper for S3, and still there when
NAT is not. The module knows nothing of Kubernetes but the tags by which a load balancer finds its subnets.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Network
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import pulumi
import pulumi_aws as aws
from pydantic import AfterValidator, Field

from crucible_platform.encryption import RetentionDays, log_group
from crucible_platform.iam import Allow, by_service, role
from crucible_platform.section import Section, Zone

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crucible_platform.place import Place

# AWS takes /16 to /28 for a VPC ("VPC CIDR blocks", Amazon VPC user guide). Beyond /20 a zone has too few addresses for Pods.
LARGEST_VPC, SMALLEST_VPC = 16, 20


class Endpoint(StrEnum):
    """An AWS service that is reached without leaving the VPC."""

    ECR_API = "ecr.api"
    ECR_IMAGES = "ecr.dkr"
    STS = "sts"
    SSM = "ssm"
    SSM_MESSAGES = "ssmmessages"
    LOGS = "logs"
    EC2 = "ec2"
    SECRETS_MANAGER = "secretsmanager"
    POD_IDENTITY = "eks-auth"


def _distinct(zones: tuple[Zone, ...]) -> tuple[Zone, ...]:
    if len(set(zones)) != len(zones):
        raise ValueError("names a zone twice")
    if len({zone[:-1] for zone in zones}) > 1:
        raise ValueError("names zones of more than one region")
    return zones


class NetworkConfig(Section):
    """The VPC."""

    zones: Annotated[tuple[Zone, ...], AfterValidator(_distinct)] = Field(
        min_length=2,
        max_length=3,
        description="Availability zones. Two at least: one may fail. Adding one at the end changes nothing of the others",
    )
    endpoints: frozenset[Endpoint] = Field(
        default=frozenset(Endpoint),
        description="AWS services reached inside the VPC. Each costs 7.30 USD a month and zone in us-east-1, "
        "and 0.01 USD a GB; that of S3 costs nothing and is always there",
    )
    flow_log_days: RetentionDays = Field(
        default=90, description="How long the log of accepted and refused connections is kept, days"
    )


@dataclass(frozen=True)
class ZonePlan:
    """The addresses of a zone."""

    zone: str
    public: IPv4Network
    private: IPv4Network


def plan_subnets(vpc: IPv4Network, zones: Sequence[str]) -> tuple[ZonePlan, ...]:
    """Give each zone a quarter of the VPC for its private subnet and a sixteenth for its public one.

    Nearly everything is private: every Pod takes an address there, and only load balancers and NAT are public. The last quarter
    holds the public subnets of up to three zones and leaves a sixteenth free. Adding a zone moves nothing.

    Raises:
        ValueError: the VPC is larger than AWS takes or too small for Pods.
    """
    if not LARGEST_VPC <= vpc.prefixlen <= SMALLEST_VPC:
        size = f"/{vpc.prefixlen} has {vpc.num_addresses} addresses"
        raise ValueError(f"{vpc}: a VPC is a /{LARGEST_VPC} to a /{SMALLEST_VPC}, and {size}; every Pod takes one")
    *private, last = vpc.subnets(prefixlen_diff=2)
    public = islice(last.subnets(prefixlen_diff=2), len(zones))
    return tuple(ZonePlan(*each) for each in zip(zones, public, private, strict=False))


@dataclass(frozen=True)
class ZoneNetwork:
    """What there is in a zone."""

    zone: str
    public_subnet_id: pulumi.Output[str]
    private_subnet_id: pulumi.Output[str]
    private_route_table_id: pulumi.Output[str]


class Network(pulumi.ComponentResource):
    """A VPC with subnets in each zone.

    Attributes:
        vpc_id: the VPC.
        cidr: its addresses.
        internet: the public subnets' route to the internet, for what must not be made before it.
        zones: one entry for each of the configuration's zones, in its order.
    """

    def __init__(
        self, config: NetworkConfig, place: Place, *, cidr: IPv4Network, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        """Make it.

        Raises:
            ValueError: `cidr` has no room for the zones.
        """
        name = place.name
        super().__init__("crucible:network:Network", name, None, opts)
        self._name = name
        self._below = pulumi.ResourceOptions(parent=self)
        self.cidr = cidr
        vpc = aws.ec2.Vpc(
            name,
            cidr_block=str(cidr),
            enable_dns_hostnames=True,
            enable_dns_support=True,
            tags={"Name": name},
            opts=self._below,
        )
        self.vpc_id = vpc.id
        # Adopted and emptied: what forgets to name a security group can then reach nothing.
        aws.ec2.DefaultSecurityGroup(
            f"{name}-default", vpc_id=vpc.id, tags={"Name": f"{name}-default"}, opts=self._below
        )
        gateway = aws.ec2.InternetGateway(name, vpc_id=vpc.id, tags={"Name": name}, opts=self._below)
        public_routes = aws.ec2.RouteTable(
            f"{name}-public", vpc_id=vpc.id, tags={"Name": f"{name}-public"}, opts=self._below
        )
        way_out = aws.ec2.Route(
            f"{name}-public",
            route_table_id=public_routes.id,
            destination_cidr_block="0.0.0.0/0",
            gateway_id=gateway.id,
            opts=self._below,
        )
        # What stands in a public subnet works once that is so.
        self.internet = way_out
        self.zones = tuple(self._zone(plan, public_routes) for plan in plan_subnets(cidr, config.zones))
        self._s3_endpoint(place, public_routes)
        self._endpoints(config, place)
        self._flow_log(config, place)
        self.register_outputs({"vpc_id": self.vpc_id})

    def _zone(self, plan: ZonePlan, public_routes: aws.ec2.RouteTable) -> ZoneNetwork:
        public = self._subnet("public", plan.zone, plan.public, "kubernetes.io/role/elb")
        private = self._subnet("private", plan.zone, plan.private, "kubernetes.io/role/internal-elb")
        name = f"{self._name}-private-{plan.zone}"
        private_routes = aws.ec2.RouteTable(name, vpc_id=self.vpc_id, tags={"Name": name}, opts=self._below)
        for kind, subnet, routes in (("public", public, public_routes), ("private", private, private_routes)):
            aws.ec2.RouteTableAssociation(
                f"{self._name}-{kind}-{plan.zone}", subnet_id=subnet.id, route_table_id=routes.id, opts=self._below
            )
        return ZoneNetwork(plan.zone, public.id, private.id, private_routes.id)

    def _subnet(self, kind: str, zone: str, cidr: IPv4Network, role: str) -> aws.ec2.Subnet:
        name = f"{self._name}-{kind}-{zone}"
        return aws.ec2.Subnet(
            name,
            vpc_id=self.vpc_id,
            availability_zone=zone,
            cidr_block=str(cidr),
            map_public_ip_on_launch=False,
            tags={"Name": name, role: "1"},
            opts=self._below,
        )

    def _s3_endpoint(self, place: Place, public_routes: aws.ec2.RouteTable) -> None:
        aws.ec2.VpcEndpoint(
            f"{self._name}-s3",
            vpc_id=self.vpc_id,
            vpc_endpoint_type="Gateway",
            service_name=f"com.amazonaws.{place.region}.s3",
            route_table_ids=[public_routes.id, *(zone.private_route_table_id for zone in self.zones)],
            tags={"Name": f"{self._name}-s3"},
            opts=self._below,
        )

    def _endpoints(self, config: NetworkConfig, place: Place) -> None:
        if not config.endpoints:
            return
        group = aws.ec2.SecurityGroup(
            f"{self._name}-endpoints",
            vpc_id=self.vpc_id,
            description="HTTPS from the VPC to the endpoints of AWS services",
            tags={"Name": f"{self._name}-endpoints"},
            opts=self._below,
        )
        aws.vpc.SecurityGroupIngressRule(
            f"{self._name}-endpoints",
            security_group_id=group.id,
            description="HTTPS from the VPC",
            cidr_ipv4=str(self.cidr),
            ip_protocol="tcp",
            from_port=443,
            to_port=443,
            opts=self._below,
        )
        for endpoint in sorted(config.endpoints):
            name = f"{self._name}-{endpoint.replace('.', '-')}"
            aws.ec2.VpcEndpoint(
                name,
                vpc_id=self.vpc_id,
                vpc_endpoint_type="Interface",
                service_name=f"com.amazonaws.{place.region}.{endpoint}",
                subnet_ids=[zone.private_subnet_id for zone in self.zones],
                security_group_ids=[group.id],
                private_dns_enabled=True,
                tags={"Name": name},
                opts=self._below,
            )

    def _flow_log(self, config: NetworkConfig, place: Place) -> None:
        name = f"{self._name}-flow-log"
        group = log_group(
            "flow-log", place, path=f"/{self._name}/vpc-flow-log", days=config.flow_log_days, opts=self._below
        )
        writer = role(
            "flow-log",
            place,
            by_service("vpc-flow-logs.amazonaws.com", place),
            Allow(
                ["logs:CreateLogStream", "logs:PutLogEvents", "logs:DescribeLogStreams"],
                [group.arn, pulumi.Output.concat(group.arn, ":*")],
            ),
            description="Lets the VPC write its flow log",
            opts=self._below,
        )
        aws.ec2.FlowLog(
            name,
            vpc_id=self.vpc_id,
            traffic_type="ALL",
            log_destination_type="cloud-watch-logs",
            log_destination=group.arn,
            iam_role_arn=writer.arn,
            # The shorter of the two that there are, seconds: who connected where matters while it happens.
            max_aggregation_interval=60,
            tags={"Name": name},
            opts=self._below,
        )
