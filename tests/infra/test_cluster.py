"""The cluster: who reaches it and who may do what, what is encrypted and logged, and in what order its add-ons come."""

from __future__ import annotations

import json
from ipaddress import IPv4Network
from typing import Any

import pulumi
import pytest
from pydantic import ValidationError

from crucible_platform.cluster import VERSIONS, AddOns, AddOnVersions, Cluster, ClusterAccess, ClusterConfig
from crucible_platform.network import Network, NetworkConfig
from crucible_platform.place import Place
from crucible_platform.rehearsal import Rehearsal, Rehearsed, rehearse, unknown_properties
from crucible_platform.section import Section

pytestmark = pytest.mark.unit

ACCOUNT = "111111111111"
ZONES = ("eu-central-1a", "eu-central-1b")
VPC = IPv4Network("10.16.0.0/16")
OFFICE, VPN = IPv4Network("192.0.2.0/24"), IPv4Network("10.200.0.0/16")
CLUSTER, ADD_ON = "aws:eks/cluster:Cluster", "aws:eks/addon:Addon"
ADMIN = "aws-reserved/sso.amazonaws.com/AWSReservedSSO_Admin_0123456789abcdef"


def rehearsed(stack: str, config: ClusterConfig, access: ClusterAccess) -> Rehearsal:
    place = Place(ACCOUNT, "eu-central-1", stack)

    def program() -> None:
        network = Network(NetworkConfig(zones=ZONES, endpoints=frozenset()), place, cidr=VPC)
        cluster = Cluster(config, place, network, access=access)
        # The network stands in for the nodes: what is inside of it must be there first.
        AddOns(config, place, cluster, nodes=network)

    return rehearse(program, stack=stack)


@pytest.fixture(scope="module")
def made() -> Rehearsal:
    return rehearsed("dev", ClusterConfig(), ClusterAccess(networks=(OFFICE,), admins=(ADMIN,), viewers=("developer",)))


@pytest.fixture(scope="module")
def production() -> Rehearsal:
    return rehearsed(
        "production", ClusterConfig(extended_support=True), ClusterAccess(networks=(VPN,), admins=(ADMIN,))
    )


def add_on(made: Rehearsal, name: str) -> Rehearsed:
    return made.one(ADD_ON, f"crucible-dev-{name}")


def refused(model: type[Section] = ClusterConfig, **fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(fields)
    [only] = caught.value.errors()
    return f"{'.'.join(map(str, only['loc']))}: {only['msg']}"


# -- what may be configured


def test_the_default_version_is_one_that_eks_supports_and_its_add_ons_are_for_it() -> None:
    config = ClusterConfig()
    assert config.version == "1.36"
    assert config.version in VERSIONS


@pytest.mark.parametrize("version", ["1.29", "1.33", "1.99", "latest", "v1.36"])
def test_a_version_that_nobody_has_looked_at_is_answered_with_those_that_somebody_has(version: str) -> None:
    said = refused(version=version)
    assert said.startswith("version: Value error, the platform and its upgrades are for 1.34 (standard support until ")
    assert "1.36 (standard support until 2027-08-02)" in said


@pytest.mark.parametrize("version", [1.36, 1])
def test_a_version_without_quotes_is_a_number_and_refused(version: float) -> None:
    assert "put it in quotes" in refused(version=version)


@pytest.mark.parametrize("cidr", ["10.0.0.0/8", "10.0.0.0/25", "100.64.0.0/16", "192.0.2.0/24"])
def test_services_have_addresses_that_eks_takes(cidr: str) -> None:
    assert refused(service_cidr=cidr).startswith("service_cidr: Value error, EKS takes a /12 to a /24 in 10.0.0.0/8, ")


@pytest.mark.parametrize("cidr", ["10.96.0.0/12", "172.31.255.0/24", "192.168.0.0/16"])
def test_services_may_be_at_the_edges_of_what_eks_takes(cidr: str) -> None:
    assert str(ClusterConfig(service_cidr=IPv4Network(cidr)).service_cidr) == cidr


def test_a_cluster_that_nobody_could_enter_is_refused() -> None:
    assert refused(ClusterAccess, networks=[], admins=[]).startswith("admins: ")


@pytest.mark.parametrize("role", ["arn:aws:iam::111111111111:role/admin", "/admin", "two words", ""])
def test_a_role_is_given_by_its_name(role: str) -> None:
    assert f"admins: Value error, {role!r} is no role's name" in refused(ClusterAccess, networks=[], admins=[role])


def test_a_role_is_either_of_those_who_administer_or_of_those_who_look() -> None:
    assert "admin: in admins and in viewers" in refused(ClusterAccess, networks=[], admins=["admin"], viewers=["admin"])


def test_an_add_on_is_pinned_to_a_build() -> None:
    assert refused(add_ons={"coredns": "latest"}).startswith("add_ons.coredns: ")


def test_another_version_of_kubernetes_takes_its_own_kube_proxy() -> None:
    said = refused(version="1.35")
    assert "add_ons.kube_proxy v1.36.0-eksbuild.25 is not of Kubernetes 1.35" in said
    assert "--addon-name kube-proxy --kubernetes-version 1.35" in said
    versions = AddOnVersions(kube_proxy="v1.35.3-eksbuild.25")
    assert ClusterConfig(version="1.35", add_ons=versions).version == "1.35"


# -- who reaches it


def test_it_is_reached_inside_the_vpc_and_from_the_named_networks_alone(made: Rehearsal) -> None:
    vpc = made.one(CLUSTER).inputs["vpcConfig"]
    assert (vpc["endpointPrivateAccess"], vpc["endpointPublicAccess"]) == (True, True)
    assert vpc["publicAccessCidrs"] == [str(OFFICE)]
    assert vpc["subnetIds"] == [f"crucible-dev-private-{zone}-id" for zone in ZONES]
    assert not made.of("aws:vpc/securityGroupIngressRule:SecurityGroupIngressRule")


def test_without_public_networks_there_is_no_public_endpoint(production: Rehearsal) -> None:
    vpc = production.one(CLUSTER).inputs["vpcConfig"]
    assert (vpc["endpointPrivateAccess"], vpc["endpointPublicAccess"]) == (True, False)
    assert "publicAccessCidrs" not in vpc


def test_a_connected_network_is_let_through_to_the_private_endpoint_and_to_nothing_else(production: Rehearsal) -> None:
    rule = production.one("aws:vpc/securityGroupIngressRule:SecurityGroupIngressRule")
    assert rule.inputs["cidrIpv4"] == str(VPN)
    assert (rule.inputs["ipProtocol"], rule.inputs["fromPort"], rule.inputs["toPort"]) == ("tcp", 443, 443)


def test_nobody_is_let_in_but_by_an_access_entry(made: Rehearsal) -> None:
    access = made.one(CLUSTER).inputs["accessConfig"]
    assert access == {"authenticationMode": "API", "bootstrapClusterCreatorAdminPermissions": False}
    entries = made.of("aws:eks/accessEntry:AccessEntry")
    assert {each.inputs["principalArn"]: each.inputs["type"] for each in entries} == {
        f"arn:aws:iam::{ACCOUNT}:role/{ADMIN}": "STANDARD",
        f"arn:aws:iam::{ACCOUNT}:role/developer": "STANDARD",
    }
    assert not [each.name for each in entries if "kubernetesGroups" in each.inputs]


def test_admins_may_do_everything_and_viewers_see_no_secret(made: Rehearsal) -> None:
    policies = made.of("aws:eks/accessPolicyAssociation:AccessPolicyAssociation")
    assert {
        each.inputs["principalArn"].rpartition("/")[2]: each.inputs["policyArn"].rpartition("/")[2] for each in policies
    } == {ADMIN.rpartition("/")[2]: "AmazonEKSClusterAdminPolicy", "developer": "AmazonEKSViewPolicy"}
    entries = {each.urn for each in made.of("aws:eks/accessEntry:AccessEntry")}
    assert all(each.depends_on & entries for each in policies)


# -- what it keeps and tells


def test_what_the_api_keeps_is_encrypted_with_a_key_of_its_own(made: Rehearsal) -> None:
    [encryption] = [made.one(CLUSTER).inputs["encryptionConfig"]]
    key = made.one("aws:kms/key:Key", "crucible-dev-cluster")
    assert encryption["resources"] == ["secrets"]
    assert encryption["provider"]["keyArn"].endswith("crucible-dev-cluster")
    assert key.inputs["enableKeyRotation"] is True
    [own] = [each for each in made.of("aws:iam/rolePolicy:RolePolicy") if each.name == "crucible-dev-cluster"]
    [statement] = json.loads(own.inputs["policy"])["Statement"]
    assert statement["Resource"] == [encryption["provider"]["keyArn"]]


def test_every_log_of_the_control_plane_goes_to_an_encrypted_group_that_is_there_first(made: Rehearsal) -> None:
    cluster = made.one(CLUSTER)
    assert sorted(cluster.inputs["enabledClusterLogTypes"]) == [
        "api",
        "audit",
        "authenticator",
        "controllerManager",
        "scheduler",
    ]
    group = made.one("aws:cloudwatch/logGroup:LogGroup", "crucible-dev-cluster")
    assert group.inputs["name"] == f"/aws/eks/{cluster.inputs['name']}/cluster"
    assert group.inputs["kmsKeyId"]
    assert group.inputs["retentionInDays"] == 90
    assert group.urn in cluster.depends_on


def test_eks_takes_its_role_for_this_cluster_alone_and_keeps_its_rights_for_as_long_as_it_is_there(
    made: Rehearsal,
) -> None:
    role = made.one("aws:iam/role:Role", "crucible-dev-cluster")
    [trust] = json.loads(role.inputs["assumeRolePolicy"])["Statement"]
    assert trust["Principal"] == {"Service": "eks.amazonaws.com"}
    assert trust["Condition"] == {
        "StringEquals": {"aws:SourceAccount": ACCOUNT},
        "ArnLike": {"aws:SourceArn": f"arn:aws:eks:eu-central-1:{ACCOUNT}:cluster/crucible-dev"},
    }
    rights = {
        each.urn
        for type_ in ("aws:iam/rolePolicy:RolePolicy", "aws:iam/rolePolicyAttachment:RolePolicyAttachment")
        for each in made.of(type_)
        if each.inputs["role"] == role.inputs["name"]
    }
    assert len(rights) == 2
    assert rights <= made.one(CLUSTER).depends_on


def test_it_stays_beyond_standard_support_only_if_that_is_paid_for(made: Rehearsal, production: Rehearsal) -> None:
    assert made.one(CLUSTER).inputs["upgradePolicy"] == {"supportType": "STANDARD"}
    assert production.one(CLUSTER).inputs["upgradePolicy"] == {"supportType": "EXTENDED"}


def test_productions_cluster_and_what_it_cannot_be_read_without_are_deleted_by_no_mistake(
    made: Rehearsal, production: Rehearsal
) -> None:
    for stack, found, kept in (("dev", made, False), ("production", production, True)):
        keys = [found.one("aws:kms/key:Key", f"crucible-{stack}-{of}") for of in ("cluster", "volumes")]
        cluster = found.one(CLUSTER)
        assert cluster.inputs["deletionProtection"] is kept
        assert [each.protected for each in (cluster, *keys)] == [kept] * 3


# -- add-ons


def test_every_add_on_is_ours_pinned_and_put_back_as_configured(made: Rehearsal) -> None:
    assert made.one(CLUSTER).inputs["bootstrapSelfManagedAddons"] is False
    versions = AddOnVersions()
    assert {each.inputs["addonName"]: each.inputs["addonVersion"] for each in made.of(ADD_ON)} == {
        "vpc-cni": versions.vpc_cni,
        "kube-proxy": versions.kube_proxy,
        "eks-pod-identity-agent": versions.pod_identity_agent,
        "coredns": versions.coredns,
        "aws-ebs-csi-driver": versions.ebs_csi,
    }
    for each in made.of(ADD_ON):
        assert each.inputs["resolveConflictsOnCreate"] == each.inputs["resolveConflictsOnUpdate"] == "OVERWRITE"


def test_the_network_plugin_leaves_policies_to_calico_and_tells_it_addresses_at_once(made: Rehearsal) -> None:
    configured = json.loads(add_on(made, "vpc-cni").inputs["configurationValues"])
    assert configured["enableNetworkPolicy"] == "false"
    assert configured["env"]["ANNOTATE_POD_IP"] == "true"


def test_the_network_plugin_finds_its_role_on_tainted_nodes_too(made: Rehearsal) -> None:
    agent = add_on(made, "eks-pod-identity-agent")
    assert json.loads(agent.inputs["configurationValues"])["tolerations"] == [{"operator": "Exists"}]
    assert agent.urn in add_on(made, "vpc-cni").depends_on


@pytest.mark.parametrize(
    ("name", "account", "role", "policy"),
    [
        ("vpc-cni", "aws-node", "crucible-dev-vpc-cni", "AmazonEKS_CNI_Policy"),
        ("aws-ebs-csi-driver", "ebs-csi-controller-sa", "crucible-dev-ebs-csi", "AmazonEBSCSIDriverPolicyV2"),
    ],
)
def test_an_add_on_has_its_rights_by_pod_identity_before_it_runs(
    made: Rehearsal, name: str, account: str, role: str, policy: str
) -> None:
    [identity] = add_on(made, name).inputs["podIdentityAssociations"]
    assert identity["serviceAccount"] == account
    assert identity["roleArn"].endswith(role)
    [trust] = json.loads(made.one("aws:iam/role:Role", role).inputs["assumeRolePolicy"])["Statement"]
    assert trust["Principal"] == {"Service": "pods.eks.amazonaws.com"}
    attached = made.one("aws:iam/rolePolicyAttachment:RolePolicyAttachment", f"{role}-{policy}")
    assert attached.inputs["policyArn"] == f"arn:aws:iam::aws:policy/{policy}"
    assert attached.urn in add_on(made, name).depends_on


def test_add_ons_that_run_as_deployments_wait_for_nodes_and_those_that_nodes_wait_for_do_not(made: Rehearsal) -> None:
    nodes = {
        each.urn for each in made.below(made.one("crucible:network:Network")) if each.type == "aws:ec2/subnet:Subnet"
    }
    waiting = {each.inputs["addonName"] for each in made.of(ADD_ON) if nodes <= each.depends_on}
    assert waiting == {"coredns", "aws-ebs-csi-driver"}


def test_the_volume_driver_lends_its_key_to_aws_alone(made: Rehearsal) -> None:
    policy = made.one("aws:iam/rolePolicy:RolePolicy", "crucible-dev-ebs-csi").inputs["policy"]
    grants, uses = json.loads(policy)["Statement"]
    assert grants["Condition"] == {"Bool": {"kms:GrantIsForAWSResource": "true"}}
    assert grants["Resource"] == uses["Resource"]
    assert "kms:CreateGrant" not in uses["Action"]


def test_every_property_is_one_that_the_provider_knows(made: Rehearsal) -> None:
    assert [said for each in made.resources if each.custom for said in unknown_properties(each)] == []


def test_whoever_uses_the_kubeconfig_proves_who_they_are_and_there_is_no_secret_in_it(made: Rehearsal) -> None:
    def program() -> None:
        place = Place(ACCOUNT, "eu-central-1", "dev")
        network = Network(NetworkConfig(zones=ZONES, endpoints=frozenset()), place, cidr=VPC)
        cluster = Cluster(ClusterConfig(), place, network, access=ClusterAccess(networks=(), admins=("admin",)))
        pulumi.export("kubeconfig", cluster.kubeconfig)

    config = json.loads(rehearse(program).outputs["kubeconfig"])
    assert config["clusters"][0]["cluster"].keys() == {"server", "certificate-authority-data"}
    assert config["users"][0]["user"]["exec"]["args"] == [
        "eks",
        "get-token",
        "--cluster-name",
        "crucible-dev",
        "--region",
        "eu-central-1",
    ]
