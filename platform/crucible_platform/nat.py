"""The way out of the private subnets, in one of two ways behind one switch.

`gateway` is AWS's own, one in each zone. `none` leaves the private subnets without a way out; all that they need is then reached through the endpoints of `network`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

import pulumi
import pulumi_aws as aws
from pydantic import Field

from crucible_platform.section import Section

if TYPE_CHECKING:
    from crucible_platform.network import Network, ZoneNetwork
    from crucible_platform.place import Place


class NatMode(StrEnum):
    """How private subnets reach the internet."""

    GATEWAY = "gateway"
    NONE = "none"


class NatConfig(Section):
    """The way out of the private subnets."""

    mode: NatMode = Field(
        default=NatMode.GATEWAY,
        description="`gateway` costs about 33 USD a month and zone in us-east-1 and 0.045 USD a GB; `none` leaves no way out, and "
        "takes the endpoints of all that is needed",
    )


class NatGateways(pulumi.ComponentResource):
    """A NAT gateway in each zone, and the default route of the zone's private subnet to it.

    One for all would be cheaper, and the loss of its zone would be the loss of the way out for all.

    Attributes:
        addresses: from which the platform is seen in the internet.
    """

    def __init__(self, place: Place, network: Network, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("crucible:nat:Gateways", place.name, None, opts)
        self._place = place
        self.addresses = [self._gateway(zone, network) for zone in network.zones]
        self.register_outputs({"addresses": self.addresses})

    def _gateway(self, zone: ZoneNetwork, network: Network) -> pulumi.Output[str]:
        name = f"{self._place.name}-{zone.zone}"
        below = pulumi.ResourceOptions(parent=self, depends_on=[network.internet])
        address = aws.ec2.Eip(name, domain="vpc", tags={"Name": name}, opts=below)
        gateway = aws.ec2.NatGateway(
            name, subnet_id=zone.public_subnet_id, allocation_id=address.id, tags={"Name": name}, opts=below
        )
        aws.ec2.Route(
            name,
            route_table_id=zone.private_route_table_id,
            destination_cidr_block="0.0.0.0/0",
            nat_gateway_id=gateway.id,
            opts=below,
        )
        return address.public_ip
