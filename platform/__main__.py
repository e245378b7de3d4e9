"""`pulumi up`: reads the stack's configuration, composes the platform from its components, and says where things are. No logic."""

from __future__ import annotations

import pulumi
import pulumi_aws as aws

from crucible_platform.nat import NatGateways, NatMode
from crucible_platform.network import Network
from crucible_platform.stack import read

stack = read()
place = stack.place
on_aws = pulumi.ResourceOptions(
    provider=aws.Provider(
        place.name,
        region=place.region,
        # Credentials of another account than the stack's own make nothing there.
        allowed_account_ids=[place.account],
        default_tags={"tags": stack.tags},
    )
)

network = Network(stack.config.network, place, cidr=stack.environment.vpc_cidr, opts=on_aws)
if stack.config.nat.mode is NatMode.GATEWAY:
    nat = NatGateways(place, network, opts=on_aws)
    pulumi.export("nat_addresses", nat.addresses)

pulumi.export("vpc_id", network.vpc_id)
