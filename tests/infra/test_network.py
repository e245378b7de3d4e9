"""The VPC: what a zone has of its own, what reaches what, and how addresses are shared out."""

from __future__ import annotations

from ipaddress import IPv4Network
from itertools import combinations

import pytest
from pydantic import ValidationError

from crucible_platform.nat import NatGateways
from crucible_platform.network import Endpoint, Network, NetworkConfig, plan_subnets
from crucible_platform.place import Place
from crucible_platform.rehearsal import Rehearsal, rehearse

pytestmark = pytest.mark.unit

PLACE = Place("111111111111", "eu-central-1", "dev")
ZONES = ("eu-central-1a", "eu-central-1b", "eu-central-1c")
VPC = IPv4Network("10.16.0.0/16")


def rehearsed(config: NetworkConfig) -> Rehearsal:
    def program() -> None:
        NatGateways(PLACE, Network(config, PLACE, cidr=VPC))

    return rehearse(program)


@pytest.fixture(scope="module")
def made() -> Rehearsal:
    return rehearsed(NetworkConfig(zones=ZONES))


@pytest.mark.parametrize("length", range(16, 21))
@pytest.mark.parametrize("zones", [2, 3])
def test_every_zone_has_a_quarter_for_pods_and_no_two_subnets_share_an_address(length: int, zones: int) -> None:
    vpc = IPv4Network(f"10.16.0.0/{length}")
    plans = plan_subnets(vpc, ZONES[:zones])
    assert [plan.zone for plan in plans] == list(ZONES[:zones])
    assert all(plan.private.prefixlen == length + 2 for plan in plans)
    subnets = [subnet for plan in plans for subnet in (plan.public, plan.private)]
    assert all(subnet.subnet_of(vpc) for subnet in subnets)
    assert not [pair for pair in combinations(subnets, 2) if pair[0].overlaps(pair[1])]


def test_a_zone_that_is_added_moves_no_other() -> None:
    assert plan_subnets(VPC, ZONES)[:2] == plan_subnets(VPC, ZONES[:2])


@pytest.mark.parametrize("cidr", ["10.0.0.0/15", "10.0.0.0/21"])
def test_a_vpc_that_aws_or_the_pods_would_not_fit_is_refused(cidr: str) -> None:
    with pytest.raises(ValueError, match=r"a VPC is a /16 to a /20, and /\d+ has \d+ addresses"):
        plan_subnets(IPv4Network(cidr), ZONES)


@pytest.mark.parametrize(
    ("zones", "says"),
    [
        (ZONES[:1], "at least 2"),
        ((*ZONES, "eu-central-1d"), "at most 3"),
        ((ZONES[0], ZONES[0]), "names a zone twice"),
        ((ZONES[0], "eu-west-1a"), "more than one region"),
        (("eu-central-1", ZONES[0]), "pattern"),
    ],
)
def test_zones_that_are_no_two_or_three_of_one_region_are_refused(zones: tuple[str, ...], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        NetworkConfig(zones=zones)


def test_each_private_subnet_has_its_own_way_out_through_its_own_zone(made: Rehearsal) -> None:
    subnets = {each.name: each.inputs["availabilityZone"] for each in made.of("aws:ec2/subnet:Subnet")}
    gateways = {each.name: each.inputs["subnetId"] for each in made.of("aws:ec2/natGateway:NatGateway")}
    tables = {
        each.inputs["routeTableId"]: subnets[each.inputs["subnetId"].removesuffix("-id")]
        for each in made.of("aws:ec2/routeTableAssociation:RouteTableAssociation")
        if "-private-" in each.name
    }
    assert sorted(tables.values()) == list(ZONES)
    ways_out = [route for route in made.of("aws:ec2/route:Route") if "natGatewayId" in route.inputs]
    assert len(ways_out) == len(ZONES)
    for route in ways_out:
        assert route.inputs["destinationCidrBlock"] == "0.0.0.0/0"
        subnet = gateways[route.inputs["natGatewayId"].removesuffix("-id")].removesuffix("-id")
        assert "-public-" in subnet
        assert subnets[subnet] == tables[route.inputs["routeTableId"]]


def test_a_gateway_is_made_once_its_subnet_reaches_the_internet(made: Rehearsal) -> None:
    way_out = made.one("aws:ec2/route:Route", "crucible-dev-public")
    assert all(way_out.urn in each.depends_on for each in made.of("aws:ec2/natGateway:NatGateway"))


def test_nothing_gets_a_public_address_by_being_in_a_public_subnet(made: Rehearsal) -> None:
    assert not [each.name for each in made.of("aws:ec2/subnet:Subnet") if each.inputs["mapPublicIpOnLaunch"]]


def test_the_default_security_group_lets_nothing_through(made: Rehearsal) -> None:
    group = made.one("aws:ec2/defaultSecurityGroup:DefaultSecurityGroup")
    assert not group.inputs.keys() & {"ingress", "egress"}


def test_endpoints_answer_by_the_services_own_names_in_every_zone_and_to_the_vpc_alone(made: Rehearsal) -> None:
    interfaces = [
        each for each in made.of("aws:ec2/vpcEndpoint:VpcEndpoint") if each.inputs["vpcEndpointType"] == "Interface"
    ]
    assert {each.inputs["serviceName"] for each in interfaces} == {
        f"com.amazonaws.eu-central-1.{endpoint}" for endpoint in Endpoint
    }
    for each in interfaces:
        assert each.inputs["privateDnsEnabled"] is True
        assert [name for name in each.inputs["subnetIds"] if "-private-" in name] == each.inputs["subnetIds"]
        assert len(each.inputs["subnetIds"]) == len(ZONES)
    rule = made.one("aws:vpc/securityGroupIngressRule:SecurityGroupIngressRule")
    assert (rule.inputs["cidrIpv4"], rule.inputs["fromPort"], rule.inputs["toPort"]) == (str(VPC), 443, 443)
    assert not made.of("aws:vpc/securityGroupEgressRule:SecurityGroupEgressRule")


def test_s3_is_reached_from_every_route_table_with_or_without_other_endpoints() -> None:
    made = rehearsed(NetworkConfig(zones=ZONES[:2], endpoints=frozenset()))
    endpoint = made.one("aws:ec2/vpcEndpoint:VpcEndpoint")
    assert endpoint.inputs["vpcEndpointType"] == "Gateway"
    assert set(endpoint.inputs["routeTableIds"]) == {
        f"{each.name}-id" for each in made.of("aws:ec2/routeTable:RouteTable")
    }
    assert not made.of("aws:ec2/securityGroup:SecurityGroup")


def test_every_connection_is_logged_under_a_key_that_only_the_log_may_use(made: Rehearsal) -> None:
    log = made.one("aws:ec2/flowLog:FlowLog")
    assert log.inputs["trafficType"] == "ALL"
    group = made.one("aws:cloudwatch/logGroup:LogGroup")
    assert log.inputs["logDestination"] == made_arn(group.inputs["name"])
    key = made.one("aws:kms/key:Key")
    assert key.inputs["enableKeyRotation"] is True
    assert f"log-group:{group.inputs['name']}" in key.inputs["policy"]
    role = made.one("aws:iam/role:Role")
    assert '"aws:SourceAccount": "111111111111"' in role.inputs["assumeRolePolicy"]


def made_arn(name: str) -> str:
    return f"arn:aws:rehearsal:::cloudwatch/{name}"
