"""What may be reached from the internet: nothing that this platform makes by itself."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_network

from crucible_policies.resource import Resource, is_on, texts
from crucible_policies.rule import ResourceRule

SECURITY_GROUPS = ("aws:ec2/securityGroup:SecurityGroup", "aws:ec2/defaultSecurityGroup:DefaultSecurityGroup")
SECURITY_GROUP_RULE = "aws:ec2/securityGroupRule:SecurityGroupRule"
INGRESS_RULE = "aws:vpc/securityGroupIngressRule:SecurityGroupIngressRule"
CLUSTER = "aws:eks/cluster:Cluster"
NODE_GROUP = "aws:eks/nodeGroup:NodeGroup"
SUBNET = "aws:ec2/subnet:Subnet"
FUNCTION_URL = "aws:lambda/functionUrl:FunctionUrl"
# Shorter ones are no network of anybody's: crucible_platform/stack.py has the same for IPv4, and a /12 of IPv6 is what IANA gives to a
# whole region of the world ("IPv6 Global Unicast Address Assignments").
SHORTEST_PREFIX = {4: 8, 6: 13}


def is_everybody(network: str) -> bool:
    """Whether a network is so large that it is the internet, such as 0.0.0.0/0, or half of it."""
    try:
        parsed = ip_network(network, strict=False)
    except ValueError:  # AWS refuses it
        return False
    return parsed.prefixlen < SHORTEST_PREFIX[parsed.version]


def open_ingress(found: Resource) -> Iterator[str]:
    """Tell which rules of security groups let everybody in."""
    for where, network in _let_in(found):
        if is_everybody(network):
            yield f"{where} is {network}, which is everybody; name the networks or the security groups that are meant"
    if found.type == NODE_GROUP and "remoteAccess" in found.properties:
        # Without them, EKS opens port 22 to 0.0.0.0/0 ("CreateNodegroup", Amazon EKS API reference).
        groups = found.properties["remoteAccess"].get("sourceSecurityGroupIds")
        if not groups:
            yield "remoteAccess has no sourceSecurityGroupIds, which opens SSH to 0.0.0.0/0; leave it out and use SSM"


def _let_in(found: Resource) -> Iterator[tuple[str, str]]:
    given, keys = found.properties, ("cidrBlocks", "ipv6CidrBlocks")
    if found.type in SECURITY_GROUPS:
        for number, rule in enumerate(given.get("ingress") or ()):
            yield from ((f"ingress[{number}].{key}", each) for key in keys for each in texts(rule.get(key)))
    elif found.type == SECURITY_GROUP_RULE and given.get("type") == "ingress":
        yield from ((key, each) for key in keys for each in texts(given.get(key)))
    elif found.type == INGRESS_RULE:
        yield from ((key, each) for key in ("cidrIpv4", "cidrIpv6") for each in texts(given.get(key)))


def cluster_endpoint(found: Resource) -> Iterator[str]:
    """Tell in which ways a cluster's API server is open."""
    if found.type != CLUSTER:
        return
    vpc = found.properties.get("vpcConfig") or {}
    if not is_on(vpc.get("endpointPrivateAccess")):
        yield "vpcConfig.endpointPrivateAccess is off, so nodes would reach the API server from outside; set it to true"
    # Left out, it is on, and from everywhere ("CreateCluster", Amazon EKS API reference).
    if vpc.get("endpointPublicAccess") is False:
        return
    networks = texts(vpc.get("publicAccessCidrs"))
    if not networks:
        yield "vpcConfig.publicAccessCidrs is not set, which means 0.0.0.0/0; name networks, or set endpointPublicAccess to false"
    for network in networks:
        if is_everybody(network):
            yield f"vpcConfig.publicAccessCidrs has {network}, which is everybody; name the networks that people come from"


def publicly_accessible(found: Resource) -> Iterator[str]:
    """Tell what AWS would give a public address or name."""
    given = found.properties
    if found.type.startswith("aws:") and "publiclyAccessible" in given and is_on(given["publiclyAccessible"]):
        yield "publiclyAccessible is true; set it to false and reach it from inside the VPC"
    if found.type == SUBNET and "mapPublicIpOnLaunch" in given and is_on(given["mapPublicIpOnLaunch"]):
        yield "mapPublicIpOnLaunch is true; set it to false: what needs a public address gets an elastic IP by name"
    if found.type == FUNCTION_URL and given.get("authorizationType") != "AWS_IAM":
        yield "authorizationType is not AWS_IAM, so anybody may call the function; set it to AWS_IAM"


RULES = (
    ResourceRule(
        "no-open-ingress",
        "a security group that lets in 0.0.0.0/0, ::/0 or another network that is most of the internet; SSH to nodes from everywhere",
        "what is open to everybody is tried by everybody within minutes; public traffic comes in through the cluster's load balancer alone",
        "name networks or security groups",
        open_ingress,
    ),
    ResourceRule(
        "cluster-endpoint-closed",
        "a Kubernetes API server without a private endpoint, or with a public one for everybody",
        "whoever reaches it may try stolen credentials and tomorrow's hole in it",
        "`endpointPrivateAccess: true`, and `endpointPublicAccess: false` or `publicAccessCidrs` of your own networks",
        cluster_endpoint,
    ),
    ResourceRule(
        "nothing-public",
        "a database or broker with a public address, a subnet that gives out public addresses, a function that anybody may call",
        "data is reached from inside the VPC; a public address that nobody asked for is noticed by nobody",
        "`publiclyAccessible: false`, `mapPublicIpOnLaunch: false`, `authorizationType: AWS_IAM`",
        publicly_accessible,
    ),
)
