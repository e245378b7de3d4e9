"""The monthly estimate: every resource is priced, free, or said to be neither."""

from __future__ import annotations

import re

import pulumi
import pulumi_aws as aws
import pulumi_kubernetes as kubernetes
import pytest

from crucible_platform.costs import estimate, load_prices
from crucible_platform.rehearsal import rehearse

pytestmark = pytest.mark.unit

PRICES = load_prices()


class Part(pulumi.ComponentResource):
    def __init__(self, name: str) -> None:
        super().__init__(f"crucible:{name}:Part", name)
        self.below = pulumi.ResourceOptions(parent=self)


def node_group(part: Part, instance_type: str, nodes: int, disk: int) -> None:
    mapping = aws.ec2.LaunchTemplateBlockDeviceMappingArgs(
        device_name="/dev/xvda", ebs=aws.ec2.LaunchTemplateBlockDeviceMappingEbsArgs(volume_size=disk)
    )
    template = aws.ec2.LaunchTemplate(f"{instance_type}-t", block_device_mappings=[mapping], opts=part.below)
    aws.eks.NodeGroup(
        f"{instance_type}-g",
        cluster_name="one",
        node_role_arn="arn",
        subnet_ids=["subnet"],
        instance_types=[instance_type],
        launch_template=aws.eks.NodeGroupLaunchTemplateArgs(id=template.id, version="1"),
        scaling_config=aws.eks.NodeGroupScalingConfigArgs(desired_size=nodes, min_size=1, max_size=9),
        opts=part.below,
    )


def test_a_part_costs_what_its_resources_cost_for_a_month() -> None:
    def program() -> None:
        part = Part("nat")
        aws.ec2.Eip("one", opts=part.below)
        aws.ec2.NatGateway("one", subnet_id="subnet", opts=part.below)
        for number in range(2):
            aws.kms.Key(f"key-{number}", opts=part.below)

    found = estimate(rehearse(program), PRICES)
    assert found.parts == {
        "nat": {
            "kms-key": (2, 2.0),
            "nat-gateway": (1, pytest.approx(0.045 * 730)),
            "public-ipv4": (1, pytest.approx(0.005 * 730)),
        }
    }
    assert found.total == pytest.approx(2 + 0.05 * 730)
    assert not found.unpriced


def test_an_endpoint_is_paid_for_in_each_zone_and_that_of_s3_not_at_all() -> None:
    def program() -> None:
        part = Part("network")
        for kind in ("Interface", "Gateway"):
            aws.ec2.VpcEndpoint(
                kind,
                vpc_id="vpc",
                service_name="s",
                vpc_endpoint_type=kind,
                subnet_ids=["a", "b", "c"],
                opts=part.below,
            )

    assert estimate(rehearse(program), PRICES).parts["network"].keys() == {"interface-endpoint"}
    assert estimate(rehearse(program), PRICES).parts["network"]["interface-endpoint"][0] == 3


def test_nodes_are_paid_for_with_the_disks_of_their_own_template() -> None:
    def program() -> None:
        part = Part("nodes")
        node_group(part, "m6i.large", 2, 100)
        node_group(part, "m7g.large", 1, 30)

    items = estimate(rehearse(program), PRICES).parts["nodes"]
    assert {item: count for item, (count, _) in items.items()} == {"gp3-gib": 230, "m6i.large": 2, "m7g.large": 1}


def test_what_has_no_price_is_said_and_not_taken_for_free() -> None:
    def program() -> None:
        part = Part("nodes")
        node_group(part, "x9.mega", 1, 10)
        aws.rds.Instance("database", instance_class="db.t4g.micro", opts=part.below)
        aws.ec2.Vpc("free", opts=part.below)
        kubernetes.core.v1.ConfigMap("free", opts=part.below)
        kubernetes.core.v1.Service("a load balancer, perhaps", opts=part.below)

    unpriced = estimate(rehearse(program), PRICES).unpriced
    assert unpriced == {"x9.mega", "aws:rds/instance:Instance", "kubernetes:core/v1:Service"}


def test_the_price_list_says_where_and_when_its_prices_held() -> None:
    assert PRICES.region == "us-east-1"
    assert re.fullmatch(r"20\d\d-\d\d", PRICES.as_of)
    assert all(usd > 0 for usd in PRICES.monthly.values())
