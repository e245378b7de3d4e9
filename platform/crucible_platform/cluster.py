"""The EKS cluster: who reaches it and what they may do there, what it encrypts and logs, and the add-ons without which no node works.

Access entries alone say who may do what: nobody is an administrator for having made the cluster, and there is no ConfigMap by which
one could become one. The add-ons come in two halves, for a reason that costs twenty minutes to find out: EKS waits until an add-on is
healthy, those that are Deployments are healthy once there are nodes, and nodes once the others are there.
"""

from __future__ import annotations

import json
import re
from ipaddress import IPv4Network
from typing import TYPE_CHECKING, Annotated, Any, Self

import pulumi
import pulumi_aws as aws
from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from crucible_platform.encryption import RetentionDays, key, log_group
from crucible_platform.iam import Allow, by_pod, by_service, role
from crucible_platform.section import Cidr, Section
from crucible_platform.upgrade.versions import EXTENDED_USD_PER_HOUR, OLDEST_OF_STACKS, RELEASES, STANDARD_USD_PER_HOUR

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from crucible_platform.iam import Role
    from crucible_platform.network import Network
    from crucible_platform.place import Place


VERSIONS = {str(minor): release for minor, release in RELEASES.items() if minor >= OLDEST_OF_STACKS}
# All that there are ("Amazon EKS control plane logging", Amazon EKS user guide).
LOGS = ("api", "audit", "authenticator", "controllerManager", "scheduler")
# EKS takes services' addresses from these, /12 to /24 ("KubernetesNetworkConfigRequest", Amazon EKS API reference).
_SERVICES = tuple(IPv4Network(each) for each in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"))
# Nobody comes from these over the internet, and EKS refuses them for its public endpoint; RFC 6598 has the last one.
_PRIVATE = (*_SERVICES, IPv4Network("100.64.0.0/10"))
_HTTPS = 443
_ROLE = re.compile(r"[\w+=,.@-]+(/[\w+=,.@-]+)*")

ADMIN_POLICY = "AmazonEKSClusterAdminPolicy"
# Not AmazonEKSAdminViewPolicy, which reads Secrets too ("Review access policy permissions", Amazon EKS user guide): who may look
# would then be whoever a Secret makes them.
VIEWER_POLICY = "AmazonEKSViewPolicy"


def _version(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("put it in quotes; without them, 1.40 is the number 1.4")  # noqa: TRY004 - pydantic takes ValueError
    if value not in VERSIONS:
        known = (f"{each} (standard support until {release.standard_until})" for each, release in VERSIONS.items())
        raise ValueError(f"the platform and its upgrades are for {', '.join(known)}")
    return value


def _services(network: IPv4Network) -> IPv4Network:
    if not 12 <= network.prefixlen <= 24 or not any(network.subnet_of(each) for each in _SERVICES):
        raise ValueError(f"EKS takes a /12 to a /24 in {', '.join(map(str, _SERVICES))}")
    return network


def _role_names(roles: tuple[str, ...]) -> tuple[str, ...]:
    if wrong := [each for each in roles if not _ROLE.fullmatch(each)]:
        raise ValueError(
            f"{wrong[0]!r} is no role's name; write that, with its path before it if it has one, and no ARN"
        )
    return roles


AddOnVersion = Annotated[str, Field(pattern=r"^v[0-9]+\.[0-9]+\.[0-9]+-eksbuild\.[0-9]+$")]
RoleNames = Annotated[tuple[str, ...], AfterValidator(_role_names)]


class AddOnVersions(Section):
    """Versions of the add-ons.

    The defaults are for Kubernetes 1.36. Several public configurations of September 2026 have pinned them, one all five of them
    together, and listings of running clusters name four; `aws eks describe-addon-versions` tells what there is today.
    """

    vpc_cni: AddOnVersion = Field(default="v1.22.4-eksbuild.3", description="`vpc-cni`, which gives Pods addresses")
    kube_proxy: AddOnVersion = Field(
        default="v1.36.0-eksbuild.25", description="`kube-proxy`, of the same minor version as Kubernetes"
    )
    pod_identity_agent: AddOnVersion = Field(
        default="v1.3.10-eksbuild.3", description="`eks-pod-identity-agent`, which gives Pods their IAM roles"
    )
    coredns: AddOnVersion = Field(default="v1.14.3-eksbuild.23", description="`coredns`")
    ebs_csi: AddOnVersion = Field(
        default="v1.66.0-eksbuild.1", description="`aws-ebs-csi-driver`, which gives Pods volumes"
    )


class ClusterConfig(Section):
    """The EKS cluster."""

    version: Annotated[str, BeforeValidator(_version), WithJsonSchema({"type": "string", "enum": [*VERSIONS]})] = Field(
        default="1.36", description="Kubernetes' minor version, in quotes. EKS goes up by one at a time"
    )
    extended_support: bool = Field(
        default=False,
        description=f"Stay at a version for 12 months beyond its standard support, for {EXTENDED_USD_PER_HOUR:.2f} USD an hour in place "
        f"of {STANDARD_USD_PER_HOUR:.2f}. "
        "Without it, EKS upgrades the cluster by itself once standard support ends",
    )
    service_cidr: Annotated[Cidr, AfterValidator(_services)] = Field(
        default=IPv4Network("172.20.0.0/16"),
        description="Addresses of Kubernetes' services, outside of the VPC and of all that is connected with it. Another one is another cluster",
    )
    log_days: RetentionDays = Field(
        default=90, description="How long the control plane's logs are kept, the audit log among them, days"
    )
    add_ons: AddOnVersions = AddOnVersions()

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if not self.add_ons.kube_proxy.startswith(f"v{self.version}."):
            raise ValueError(
                f"add_ons.kube_proxy {self.add_ons.kube_proxy} is not of Kubernetes {self.version}; take one of "
                f"`aws eks describe-addon-versions --addon-name kube-proxy --kubernetes-version {self.version}`"
            )
        return self


def _somebody(network: IPv4Network) -> IPv4Network:
    if network.prefixlen < 8:
        raise ValueError(f"{network} is most of the internet; name the networks that people come from")
    return network


class ClusterAccess(Section):
    """Who reaches the Kubernetes API besides the cluster's own nodes, and what they may do there."""

    networks: tuple[Annotated[Cidr, AfterValidator(_somebody)], ...] = Field(
        description="Networks that people come from. Public ones open the API's public endpoint, for them alone; private ones, which come by "
        "VPN or peering, are let through to the private one; without public ones there is no public endpoint",
    )
    admins: RoleNames = Field(
        min_length=1,
        description="IAM roles of the account that may do everything in the cluster, whoever runs `pulumi up` among them: names, with "
        "their path if they have one. One at least, since nobody else lets anybody in",
    )
    viewers: RoleNames = Field(
        default=(), description="IAM roles that may look at everything in namespaces but Secrets"
    )

    @model_validator(mode="after")
    def _one_entry_for_each(self) -> Self:
        if both := set(self.admins) & set(self.viewers):
            raise ValueError(f"{', '.join(sorted(both))}: in admins and in viewers; EKS has one entry for a role")
        return self


class Cluster(pulumi.ComponentResource):
    """The control plane, its access, and the add-ons that nodes need before they are of use.

    Attributes:
        name: of the cluster, once it is there.
        version: of Kubernetes.
        endpoint: of its API.
        kubeconfig: for programs; whoever uses it proves by `aws` who they are, so there is no secret in it.
        security_group_id: of the control plane's side in the VPC, and of every node.
        ready: what must be there before there are nodes.
    """

    def __init__(
        self,
        config: ClusterConfig,
        place: Place,
        network: Network,
        *,
        access: ClusterAccess,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        """Make it.

        Args:
            config: what the stack says of it.
            place: where.
            network: its VPC.
            access: who reaches it.
            opts: the provider.
        """
        super().__init__("crucible:cluster:Cluster", place.name, None, opts)
        self._place = place
        self._below = pulumi.ResourceOptions(parent=self)
        # A cluster without its key is lost, and so is all that only it knew.
        self._kept = pulumi.ResourceOptions(parent=self, protect=place.stack == "production")
        private = [each for each in access.networks if any(each.subnet_of(block) for block in _PRIVATE)]
        public = [each for each in access.networks if each not in private]

        cluster = self._control_plane(config, network, public)
        self.name = cluster.name
        self.version = config.version
        self.endpoint = cluster.endpoint
        self.kubeconfig = self._kubeconfig(cluster)
        self.security_group_id = cluster.vpc_config.cluster_security_group_id
        self._let_through(private)
        self._let_in(access.admins, ADMIN_POLICY)
        self._let_in(access.viewers, VIEWER_POLICY)
        self.ready: list[pulumi.Resource] = self._add_ons(config.add_ons)
        self.register_outputs({"name": self.name, "endpoint": self.endpoint})

    def _control_plane(self, config: ClusterConfig, network: Network, public: Sequence[IPv4Network]) -> aws.eks.Cluster:
        place = self._place
        secrets = key(
            "cluster", place, description="Encrypts what the cluster's API keeps, Secrets first", opts=self._kept
        )
        # EKS would make the group by itself, unencrypted and kept for ever.
        log = log_group("cluster", place, path=f"/aws/eks/{place.name}/cluster", days=config.log_days, opts=self._below)
        own = self._role(secrets)
        return aws.eks.Cluster(
            place.name,
            name=place.name,
            version=config.version,
            role_arn=own.arn,
            vpc_config=aws.eks.ClusterVpcConfigArgs(
                # Two are what EKS asks for, and it never takes one in a zone that the cluster did not begin with ("Amazon EKS networking
                # requirements for VPC and subnets", user guide): with all of them, no zone could be added later. Nodes may be in any.
                subnet_ids=[zone.private_subnet_id for zone in network.zones[:2]],
                endpoint_private_access=True,
                endpoint_public_access=bool(public),
                public_access_cidrs=[str(each) for each in public] or None,
            ),
            kubernetes_network_config=aws.eks.ClusterKubernetesNetworkConfigArgs(
                ip_family="ipv4", service_ipv4_cidr=str(config.service_cidr)
            ),
            access_config=aws.eks.ClusterAccessConfigArgs(
                authentication_mode="API", bootstrap_cluster_creator_admin_permissions=False
            ),
            encryption_config=aws.eks.ClusterEncryptionConfigArgs(
                provider=aws.eks.ClusterEncryptionConfigProviderArgs(key_arn=secrets.arn), resources=["secrets"]
            ),
            enabled_cluster_log_types=list(LOGS),
            upgrade_policy=aws.eks.ClusterUpgradePolicyArgs(
                support_type="EXTENDED" if config.extended_support else "STANDARD"
            ),
            deletion_protection=place.stack == "production",
            # They would be there unpinned, with more rights and another configuration, and belong to nobody.
            bootstrap_self_managed_addons=False,
            opts=pulumi.ResourceOptions.merge(
                self._kept,
                # A cluster that outlives its role's rights leaves network interfaces and security groups behind.
                pulumi.ResourceOptions(depends_on=[log, *own.policies]),
            ),
        )

    def _kubeconfig(self, cluster: aws.eks.Cluster) -> pulumi.Output[str]:
        name, region = self._place.name, self._place.region
        user = {
            "apiVersion": "client.authentication.k8s.io/v1beta1",
            "command": "aws",
            "args": ["eks", "get-token", "--cluster-name", cluster.name, "--region", region],
        }
        authority = cluster.certificate_authority.data
        return pulumi.Output.json_dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [
                    {"name": name, "cluster": {"server": cluster.endpoint, "certificate-authority-data": authority}}
                ],
                "users": [{"name": name, "user": {"exec": user}}],
                "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
                "current-context": name,
            }
        )

    def _role(self, secrets: aws.kms.Key) -> Role:
        place = self._place
        trust = by_service("eks.amazonaws.com", place)
        # As "Cross-service confused deputy prevention", Amazon EKS user guide, has it.
        trust["Condition"]["ArnLike"] = {"aws:SourceArn": place.arn("eks", f"cluster/{place.name}")}
        return role(
            "cluster",
            place,
            trust,
            Allow(["kms:Encrypt", "kms:Decrypt", "kms:DescribeKey", "kms:ListGrants"], [secrets.arn]),
            managed=["AmazonEKSClusterPolicy"],
            description="Lets EKS run the cluster",
            opts=self._below,
        )

    def _let_through(self, networks: Sequence[IPv4Network]) -> None:
        for each in networks:
            aws.vpc.SecurityGroupIngressRule(
                f"{self._place.name}-api-{each}",
                security_group_id=self.security_group_id,
                description="The Kubernetes API from a connected network",
                cidr_ipv4=str(each),
                ip_protocol="tcp",
                from_port=_HTTPS,
                to_port=_HTTPS,
                opts=self._below,
            )

    def _let_in(self, roles: Sequence[str], policy: str) -> None:
        for each in roles:
            name = f"{self._place.name}-{each}"
            entry = aws.eks.AccessEntry(
                name,
                cluster_name=self.name,
                principal_arn=f"arn:aws:iam::{self._place.account}:role/{each}",
                type="STANDARD",
                opts=self._below,
            )
            aws.eks.AccessPolicyAssociation(
                name,
                cluster_name=self.name,
                principal_arn=entry.principal_arn,
                policy_arn=f"arn:aws:eks::aws:cluster-access-policy/{policy}",
                access_scope=aws.eks.AccessPolicyAssociationAccessScopeArgs(type="cluster"),
                opts=self._below,
            )

    def _add_ons(self, versions: AddOnVersions) -> list[pulumi.Resource]:
        agent = add_on(
            "eks-pod-identity-agent",
            versions.pod_identity_agent,
            self._place,
            self,
            # The network of sandbox nodes comes up by its role, and so the agent must be there before any taint is lifted.
            configuration={"tolerations": [{"operator": "Exists"}]},
            opts=self._below,
        )
        network = add_on(
            "vpc-cni",
            versions.vpc_cni,
            self._place,
            self,
            # Calico enforces the policies, and two would be at odds. It learns of a Pod's address from this annotation, which comes before
            # the kubelet tells it ("Amazon Elastic Kubernetes Service", Calico 3.32); the add-on then has the right to patch Pods.
            configuration={"enableNetworkPolicy": "false", "env": {"ANNOTATE_POD_IP": "true"}},
            # Not a node's: whoever gets out of a Pod would have it.
            service_account="aws-node",
            own=role(
                "vpc-cni",
                self._place,
                by_pod(),
                managed=["AmazonEKS_CNI_Policy"],
                description="Lets the network plugin attach addresses to nodes",
                opts=self._below,
            ),
            opts=pulumi.ResourceOptions(parent=self, depends_on=[agent]),
        )
        return [agent, network, add_on("kube-proxy", versions.kube_proxy, self._place, self, opts=self._below)]


class AddOns(pulumi.ComponentResource):
    """The add-ons that run on nodes as Deployments: names inside the cluster, and volumes.

    Attributes:
        volume_key_arn: encrypts Pods' volumes, if their storage class names it.
    """

    def __init__(
        self,
        config: ClusterConfig,
        place: Place,
        cluster: Cluster,
        *,
        nodes: pulumi.Resource,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        super().__init__("crucible:cluster:AddOns", place.name, None, opts)
        below = pulumi.ResourceOptions(parent=self)
        on_nodes = pulumi.ResourceOptions(parent=self, depends_on=[nodes])
        volumes = key(
            "volumes",
            place,
            description="Encrypts the volumes of Pods",
            opts=pulumi.ResourceOptions(parent=self, protect=place.stack == "production"),
        )
        self.volume_key_arn = volumes.arn
        add_on("coredns", config.add_ons.coredns, place, cluster, opts=on_nodes)
        add_on(
            "aws-ebs-csi-driver",
            config.add_ons.ebs_csi,
            place,
            cluster,
            service_account="ebs-csi-controller-sa",
            own=role(
                "ebs-csi",
                place,
                by_pod(),
                # As "Store Kubernetes volumes with Amazon EBS", Amazon EKS user guide, has it for a key of one's own.
                Allow(
                    ["kms:CreateGrant", "kms:ListGrants", "kms:RevokeGrant"],
                    [volumes.arn],
                    conditions={"Bool": {"kms:GrantIsForAWSResource": "true"}},
                ),
                Allow(
                    ["kms:Encrypt", "kms:Decrypt", "kms:ReEncrypt*", "kms:GenerateDataKey*", "kms:DescribeKey"],
                    [volumes.arn],
                ),
                # Unlike the one before, which is for all of the account's volumes, it is for those that the driver made.
                managed=["AmazonEBSCSIDriverPolicyV2"],
                description="Lets the volume driver make and attach volumes",
                opts=below,
            ),
            opts=on_nodes,
        )
        self.register_outputs({"volume_key_arn": self.volume_key_arn})


def add_on(
    name: str,
    version: str,
    place: Place,
    cluster: Cluster,
    *,
    opts: pulumi.ResourceOptions,
    configuration: Mapping[str, Any] | None = None,
    service_account: str | None = None,
    own: Role | None = None,
) -> aws.eks.Addon:
    """Make an add-on whose configuration is here and nowhere else: what someone changed in the cluster is changed back.

    Args:
        name: EKS's for it.
        version: EKS's for it.
        place: where.
        cluster: which.
        opts: the parent, and what must be there first.
        configuration: by the schema that `aws eks describe-addon-configuration` shows.
        service_account: of its Pods, which take the role.
        own: what its Pods may do on AWS, through Pod Identity.
    """
    identities = None
    if service_account and own:
        identities = [aws.eks.AddonPodIdentityAssociationArgs(service_account=service_account, role_arn=own.arn)]
        opts = pulumi.ResourceOptions.merge(opts, pulumi.ResourceOptions(depends_on=list(own.policies)))
    return aws.eks.Addon(
        f"{place.name}-{name}",
        cluster_name=cluster.name,
        addon_name=name,
        addon_version=version,
        configuration_values=json.dumps(configuration) if configuration else None,
        pod_identity_associations=identities,
        resolve_conflicts_on_create="OVERWRITE",
        resolve_conflicts_on_update="OVERWRITE",
        opts=opts,
    )
