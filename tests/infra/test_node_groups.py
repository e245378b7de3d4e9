"""The nodes: a group for each zone and role, how closed they are, and what they are told at their first boot."""

from __future__ import annotations

import base64
import json
from email import message_from_string
from ipaddress import IPv4Network
from typing import Any

import pulumi
import pytest
import yaml
from pydantic import ValidationError

from crucible import names
from crucible_platform.cluster import Cluster, ClusterAccess, ClusterConfig
from crucible_platform.nat import NatGateways
from crucible_platform.network import Network, NetworkConfig
from crucible_platform.node_groups import (
    NODE_CONFIG,
    Architecture,
    NodeGroups,
    NodeRole,
    NodesConfig,
    architecture,
    user_data,
)
from crucible_platform.place import Place
from crucible_platform.rehearsal import Rehearsal, Rehearsed, rehearse, unknown_properties

pytestmark = pytest.mark.unit

PLACE = Place("111111111111", "eu-central-1", "dev")
ZONES = ("eu-central-1a", "eu-central-1b", "eu-central-1c")
GROUP, TEMPLATE = "aws:eks/nodeGroup:NodeGroup", "aws:ec2/launchTemplate:LaunchTemplate"
PLATFORM = {"instance_types": ["m7i.xlarge"], "minimum": 1, "desired": 2, "maximum": 4}
SANDBOX = {"instance_types": ["c7i.2xlarge", "c6i.2xlarge"], "minimum": 0, "desired": 1, "maximum": 20}
# As EKS calls them, and as Kubernetes does ("Prevent Pods from being scheduled on specific nodes", Amazon EKS user guide).
EFFECTS = {"NO_SCHEDULE": "NoSchedule", "PREFER_NO_SCHEDULE": "PreferNoSchedule", "NO_EXECUTE": "NoExecute"}


def configured(**changed: Any) -> NodesConfig:
    return NodesConfig.model_validate({"platform": PLATFORM, "sandbox": SANDBOX, **changed})


# What Pulumi leaves alone of a resource, by the resource's name.
LEFT_ALONE: dict[str, list[str]] = {}


def note(args: pulumi.ResourceTransformationArgs) -> None:
    LEFT_ALONE[args.name] = list(args.opts.ignore_changes or [])


def rehearsed(config: NodesConfig) -> Rehearsal:
    def program() -> None:
        network = Network(NetworkConfig(zones=ZONES, endpoints=frozenset()), PLACE, cidr=IPv4Network("10.16.0.0/16"))
        cluster = Cluster(ClusterConfig(), PLACE, network, access=ClusterAccess(networks=(), admins=("admin",)))
        opts = pulumi.ResourceOptions(transformations=[note])
        NodeGroups(config, PLACE, network, cluster, way_out=[NatGateways(PLACE, network)], opts=opts)

    return rehearse(program)


@pytest.fixture(scope="module")
def made() -> Rehearsal:
    return rehearsed(configured())


@pytest.fixture(scope="module")
def other() -> Rehearsal:
    return rehearsed(configured(ami_release="1.36.4-20260923", detailed_monitoring=True, max_unavailable=3))


def group(made: Rehearsal, role: str, zone: str = ZONES[0]) -> dict[str, Any]:
    return made.one(GROUP, f"crucible-dev-{role}-{zone}").inputs


def template(made: Rehearsal, role: str) -> dict[str, Any]:
    return made.one(TEMPLATE, f"crucible-dev-{role}").inputs


def node_config(role: str) -> dict[str, Any]:
    return dict(yaml.safe_load((NODE_CONFIG / f"{role}.yaml").read_text("utf-8")))


def kubelet(role: str) -> dict[str, Any]:
    return dict(node_config(role)["spec"]["kubelet"])


# -- what may be configured


def refused(**changed: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        configured(**changed)
    [only] = caught.value.errors()
    return f"{'.'.join(map(str, only['loc']))}: {only['msg']}"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"sandbox": {**SANDBOX, "minimum": 2}},
            "sandbox: Value error, minimum 2, desired 1 and maximum 20 are not in",
        ),
        (
            {"sandbox": {**SANDBOX, "desired": 21}},
            "sandbox: Value error, minimum 0, desired 21 and maximum 20 are not in",
        ),
        ({"sandbox": {**SANDBOX, "maximum": 0}}, "sandbox.maximum: "),
        ({"sandbox": {**SANDBOX, "maximum": 451}}, "sandbox.maximum: "),
        ({"platform": {**PLATFORM, "minimum": 0}}, "Value error, platform.minimum is 0; "),
        ({"platform": {**PLATFORM, "ami_type": "AL2_x86_64"}}, "platform.ami_type: "),
        ({"platform": {**PLATFORM, "ami_type": "BOTTLEROCKET_x86_64"}}, "platform.ami_type: "),
        ({"platform": {**PLATFORM, "instance_types": []}}, "platform.instance_types: "),
        ({"platform": {**PLATFORM, "instance_types": ["xlarge"]}}, "'xlarge' is no instance type"),
        ({"platform": {**PLATFORM, "instance_types": ["m7i.xlarge", "m7g.xlarge"]}}, "m7g.xlarge: not x86_64, which"),
        (
            {"platform": {**PLATFORM, "ami_type": "AL2023_ARM_64_STANDARD"}},
            "m7i.xlarge: not arm64, which ami_type AL2023",
        ),
        ({"platform": {**PLATFORM, "capacity_type": "RESERVED"}}, "platform.capacity_type: "),
        ({"platform": {**PLATFORM, "disk_gib": 8}}, "platform.disk_gib: "),
        ({"platform": {**PLATFORM, "disks": 1}}, "platform.disks: "),
        ({"max_unavailable": 0}, "max_unavailable: "),
        ({"ami_release": "latest"}, "ami_release: "),
    ],
)
def test_what_cannot_be_is_told_once_with_its_key(changed: dict[str, Any], says: str) -> None:
    assert says in refused(**changed)


def test_sandboxes_may_be_scaled_to_none() -> None:
    assert configured(sandbox={**SANDBOX, "desired": 0}).sandbox.desired == 0


@pytest.mark.parametrize(
    ("instance_type", "told"),
    [
        ("m7g.xlarge", "arm64"),
        ("c7gn.2xlarge", "arm64"),
        ("r8gd.large", "arm64"),
        ("t4g.nano", "arm64"),
        ("x2gd.medium", "arm64"),
        ("im4gn.large", "arm64"),
        ("is4gen.large", "arm64"),
        ("g5g.xlarge", "arm64"),
        ("a1.large", "arm64"),
        ("m7i.xlarge", "x86_64"),
        ("m7i-flex.large", "x86_64"),
        ("m7a.large", "x86_64"),
        ("t3.medium", "x86_64"),
        ("g5.xlarge", "x86_64"),
        ("g4dn.xlarge", "x86_64"),
        ("i4i.large", "x86_64"),
        ("u-6tb1.metal", None),
    ],
)
def test_a_family_tells_its_processors(instance_type: str, told: Architecture | None) -> None:
    assert architecture(instance_type) == told


def test_an_instance_type_that_tells_nothing_is_believed() -> None:
    assert configured(platform={**PLATFORM, "instance_types": ["u-6tb1.metal"]})


# -- a group for each zone and role


def test_each_zone_has_a_group_of_each_role_in_its_own_private_subnet(made: Rehearsal) -> None:
    assert {(each.inputs["labels"][f"{names.DOMAIN}/role"], *each.inputs["subnetIds"]) for each in made.of(GROUP)} == {
        (role, f"crucible-dev-private-{zone}-id") for role in ("platform", "sandbox") for zone in ZONES
    }
    assert len(made.of(GROUP)) == 2 * len(ZONES)


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("role", ["platform", "sandbox"])
def test_a_node_says_its_role_and_zone(made: Rehearsal, role: str, zone: str) -> None:
    labels = group(made, role, zone)["labels"]
    assert (labels["crucible.dev/role"], labels["crucible.dev/zone"]) == (role, zone)


def test_bounds_are_those_of_the_role_and_for_each_zone(made: Rehearsal) -> None:
    for zone in ZONES:
        assert group(made, "platform", zone)["scalingConfig"] == {"minSize": 1, "desiredSize": 2, "maxSize": 4}
        assert group(made, "sandbox", zone)["scalingConfig"] == {"minSize": 0, "desiredSize": 1, "maxSize": 20}
    assert group(made, "sandbox")["instanceTypes"] == SANDBOX["instance_types"]


def test_how_many_nodes_there_are_is_left_to_the_autoscaler_and_nothing_else_is(made: Rehearsal) -> None:
    left_alone = {name: said for name, said in LEFT_ALONE.items() if said}
    assert left_alone == {each.name: ["scalingConfig.desiredSize"] for each in made.of(GROUP)}


def test_a_change_reaches_one_zone_after_the_other_and_as_many_nodes_at_a_time_as_it_may(
    made: Rehearsal, other: Rehearsal
) -> None:
    for role in ("platform", "sandbox"):
        first, second, third = (made.one(GROUP, f"crucible-dev-{role}-{zone}") for zone in ZONES)
        groups = {each.urn for each in made.of(GROUP)}
        assert not first.depends_on & groups
        assert second.depends_on & groups == {first.urn}
        assert third.depends_on & groups == {second.urn}
        assert group(made, role)["updateConfig"] == {"maxUnavailable": 1}
        assert group(other, role)["updateConfig"] == {"maxUnavailable": 3}


def test_a_group_that_replaces_another_can_be_there_before_it_goes(made: Rehearsal) -> None:
    for each in made.of(GROUP):
        assert "nodeGroupName" not in each.inputs
        # The provider adds 26 characters, and EKS takes 63.
        assert len(each.inputs["nodeGroupNamePrefix"]) <= 63 - 26


def test_nodes_come_once_their_network_their_way_out_and_their_rights_are_there(made: Rehearsal) -> None:
    needed = {
        made.one("aws:eks/addon:Addon", f"crucible-dev-{name}").urn
        for name in ("vpc-cni", "kube-proxy", "eks-pod-identity-agent")
    } | {each.urn for each in made.of("aws:ec2/natGateway:NatGateway")}
    for each in made.of(GROUP):
        role = each.inputs["labels"]["crucible.dev/role"]
        rights = {
            attached.urn
            for attached in made.of("aws:iam/rolePolicyAttachment:RolePolicyAttachment")
            if attached.inputs["role"] == f"crucible-dev-node-{role}"
        }
        assert len(rights) == 3
        assert needed | rights <= each.depends_on


def test_nodes_have_the_clusters_version_and_the_release_that_is_asked_for(made: Rehearsal, other: Rehearsal) -> None:
    assert group(made, "platform")["version"] == "1.36"
    assert "releaseVersion" not in group(made, "platform")
    assert {each.inputs["releaseVersion"] for each in other.of(GROUP)} == {"1.36.4-20260923"}


# -- how closed they are


@pytest.mark.parametrize("role", ["platform", "sandbox"])
def test_no_pod_gets_an_answer_from_the_instances_metadata(made: Rehearsal, role: str) -> None:
    assert template(made, role)["metadataOptions"] == {
        "httpEndpoint": "enabled",
        "httpTokens": "required",
        "httpPutResponseHopLimit": 1,
        "instanceMetadataTags": "disabled",
    }


@pytest.mark.parametrize("role", ["platform", "sandbox"])
def test_nobody_logs_in_by_ssh_and_no_group_is_opened_for_it(made: Rehearsal, role: str) -> None:
    assert not template(made, role).keys() & {
        "keyName",
        "vpcSecurityGroupIds",
        "networkInterfaces",
        "iamInstanceProfile",
    }
    assert "remoteAccess" not in group(made, role)


@pytest.mark.parametrize("role", ["platform", "sandbox"])
def test_the_disk_is_encrypted_with_our_key(made: Rehearsal, role: str) -> None:
    [disk] = template(made, role)["blockDeviceMappings"]
    assert disk["deviceName"] == "/dev/xvda"
    assert (disk["ebs"]["encrypted"], disk["ebs"]["volumeType"]) == ("true", "gp3")
    assert disk["ebs"]["kmsKeyId"].endswith("kms/crucible-dev-nodes")
    assert disk["ebs"]["volumeSize"] == 100
    assert disk["ebs"]["deleteOnTermination"] == "true"


def test_of_all_principals_auto_scaling_alone_may_use_the_disks_key_and_lends_it_to_aws_alone(made: Rehearsal) -> None:
    policy = json.loads(made.one("aws:kms/key:Key", "crucible-dev-nodes").inputs["policy"])
    owner, uses, lends = policy["Statement"]
    assert owner["Principal"] == {"AWS": "arn:aws:iam::111111111111:root"}
    role = "arn:aws:iam::111111111111:role/aws-service-role/autoscaling.amazonaws.com/AWSServiceRoleForAutoScaling"
    who = {"kms:CallerAccount": "111111111111", "aws:PrincipalArn": role}
    assert uses["Condition"] == {"StringEquals": who}
    assert lends["Condition"] == {"StringEquals": who, "Bool": {"kms:GrantIsForAWSResource": "true"}}
    assert lends["Action"] == "kms:CreateGrant"
    assert "kms:CreateGrant" not in uses["Action"]


def test_a_node_may_pull_images_and_join_and_has_no_right_of_its_pods(made: Rehearsal) -> None:
    for role in ("platform", "sandbox"):
        own = made.one("aws:iam/role:Role", f"crucible-dev-node-{role}")
        [trust] = json.loads(own.inputs["assumeRolePolicy"])["Statement"]
        assert trust["Principal"] == {"Service": "ec2.amazonaws.com"}
        attached = [
            each.inputs["policyArn"].rpartition("/")[2]
            for each in made.of("aws:iam/rolePolicyAttachment:RolePolicyAttachment")
            if each.inputs["role"] == own.inputs["name"]
        ]
        assert sorted(attached) == [
            "AmazonEC2ContainerRegistryPullOnly",
            "AmazonEKSWorkerNodePolicy",
            "AmazonSSMManagedInstanceCore",
        ]
        assert group(made, role)["nodeRoleArn"].endswith(own.inputs["name"])


@pytest.mark.parametrize("role", ["platform", "sandbox"])
def test_what_auto_scaling_makes_is_tagged_like_all_else(made: Rehearsal, role: str) -> None:
    specifications = {each["resourceType"]: each["tags"] for each in template(made, role)["tagSpecifications"]}
    assert {"instance", "volume"} <= specifications.keys()
    everywhere = {"Project": "crucible", "Environment": "dev", "ManagedBy": "pulumi"}
    for tags in specifications.values():
        assert tags == {**everywhere, "Name": f"crucible-dev-{role}"}


def test_metrics_are_detailed_only_if_asked_for(made: Rehearsal, other: Rehearsal) -> None:
    assert template(made, "sandbox")["monitoring"] == {"enabled": False}
    assert template(other, "sandbox")["monitoring"] == {"enabled": True}


# -- what a node is told


@pytest.mark.parametrize("role", ["platform", "sandbox"])
def test_user_data_is_a_mime_document_whose_one_part_is_the_file(made: Rehearsal, role: str) -> None:
    document = message_from_string(base64.b64decode(template(made, role)["userData"]).decode("ascii"))
    assert document.get_content_type() == "multipart/mixed"
    [part] = document.get_payload()  # type: ignore[misc]
    assert part.get_content_type() == "application/node.eks.aws"  # type: ignore[union-attr]
    # nodeadm undoes no encoding.
    assert part["Content-Transfer-Encoding"] is None  # type: ignore[index]
    assert part.get_payload() == (NODE_CONFIG / f"{role}.yaml").read_text("utf-8")  # type: ignore[union-attr]


@pytest.mark.parametrize("role", NodeRole)
def test_user_data_of_the_same_file_is_the_same(role: NodeRole) -> None:
    assert user_data(role) == user_data(role)
    # EC2 takes 16 KB before it is encoded, and EKS merges its own in.
    assert len(user_data(role)) < 8 * 1024


@pytest.mark.parametrize("role", ["platform", "sandbox"])
def test_a_node_config_is_one_that_nodeadm_reads(role: str) -> None:
    found = node_config(role)
    assert (found["apiVersion"], found["kind"]) == ("node.eks.aws/v1alpha1", "NodeConfig")
    assert found.keys() == {"apiVersion", "kind", "spec"}
    # The cluster is EKS's to say.
    assert found["spec"].keys() <= {"containerd", "kubelet"}


def test_a_sandbox_node_has_the_same_taints_from_its_group_as_from_its_own_config(made: Rehearsal) -> None:
    told = [(each["key"], each["value"], each["effect"]) for each in kubelet("sandbox")["config"]["registerWithTaints"]]
    for zone in ZONES:
        taints = [
            (each["key"], each["value"], EFFECTS[each["effect"]]) for each in group(made, "sandbox", zone)["taints"]
        ]
        assert taints == told
    assert [key for key, _, _ in told] == [names.TAINT_SANDBOX, names.TAINT_NOT_READY]


def test_a_sandbox_node_has_the_same_labels_from_its_group_as_from_its_own_config(made: Rehearsal) -> None:
    [flag] = kubelet("sandbox")["flags"]
    told = dict(each.split("=") for each in flag.removeprefix("--node-labels=").split(","))
    assert told.items() <= group(made, "sandbox")["labels"].items()


def test_a_platform_node_has_no_taint_and_no_label_of_a_sandbox(made: Rehearsal) -> None:
    for zone in ZONES:
        assert not group(made, "platform", zone).get("taints")
        assert names.LABEL_SANDBOX_NODE not in group(made, "platform", zone)["labels"]
    assert not kubelet("platform").keys() & {"flags"}
    assert "registerWithTaints" not in kubelet("platform")["config"]


@pytest.mark.parametrize("role", ["platform", "sandbox"])
def test_logs_and_processes_of_a_container_are_bounded(role: str) -> None:
    config = kubelet(role)["config"]
    assert config["containerLogMaxSize"].endswith("Mi")
    assert config["containerLogMaxFiles"] >= 2
    assert config["podPidsLimit"] > 0


def test_every_property_is_one_that_the_provider_knows(made: Rehearsal) -> None:
    own: list[Rehearsed] = [each for each in made.resources if each.custom]
    assert [said for each in own for said in unknown_properties(each)] == []
