"""`pulumi up`: reads the stack's configuration, composes the platform from its components, and says where things are. No logic."""

from __future__ import annotations

import pulumi
import pulumi_aws as aws
import pulumi_kubernetes as kubernetes

from crucible_platform.cluster import AddOns, Cluster
from crucible_platform.delivery_access import DeliveryAccess
from crucible_platform.nat import NatGateways, NatMode
from crucible_platform.network import Network
from crucible_platform.node_groups import NodeGroups
from crucible_platform.outputs import Outputs
from crucible_platform.policies import Policies
from crucible_platform.registry import Registry
from crucible_platform.sandbox_runtime import SandboxRuntime
from crucible_platform.servers import Servers
from crucible_platform.stack import LOCAL, Local, read

stack = read()
config = stack.config

if isinstance(stack, Local):
    environment = LOCAL
    in_cluster = kubernetes.Provider(LOCAL, context=stack.config.kubernetes.context)
    volume_key_arn: pulumi.Output[str] | None = None
else:
    place = stack.place
    environment = place.stack
    on_aws = pulumi.ResourceOptions(
        provider=aws.Provider(
            place.name,
            region=place.region,
            # Credentials of another account than the stack's own make nothing there.
            allowed_account_ids=[place.account],
            default_tags={"tags": place.tags},
        )
    )
    network = Network(stack.config.network, place, cidr=stack.environment.vpc_cidr, opts=on_aws)
    way_out = []
    if stack.config.nat.mode is NatMode.GATEWAY:
        nat = NatGateways(place, network, opts=on_aws)
        way_out = [nat]
        pulumi.export("nat_addresses", nat.addresses)
    cluster = Cluster(stack.config.cluster, place, network, access=stack.environment.cluster_access, opts=on_aws)
    nodes = NodeGroups(stack.config.nodes, place, network, cluster, way_out=way_out, opts=on_aws)
    add_ons = AddOns(stack.config.cluster, place, cluster, nodes=nodes, opts=on_aws)
    registry = Registry(stack.config.registry, place, opts=on_aws)
    outputs = Outputs(stack.config.outputs, place, organisation=stack.organisation.name, opts=on_aws)
    delivery = DeliveryAccess(
        stack.config.delivery,
        place,
        organisation=stack.organisation.name,
        repository=stack.organisation.repository,
        alarm_email=stack.organisation.alarm_email,
        registry=registry,
        cluster_name=cluster.name,
        break_glass=stack.environment.break_glass,
        state=stack.environment.state,
        opts=on_aws,
    )
    in_cluster = kubernetes.Provider(
        place.name, kubeconfig=cluster.kubeconfig, opts=pulumi.ResourceOptions(depends_on=[cluster])
    )
    pulumi.export("vpc_id", network.vpc_id)
    pulumi.export("cluster_name", cluster.name)
    pulumi.export("cluster_endpoint", cluster.endpoint)
    volume_key_arn = add_ons.volume_key_arn
    pulumi.export("image_repositories", registry.urls)
    pulumi.export("outputs_url", outputs.outputs_url)
    pulumi.export("backups_bucket", outputs.backups_bucket)
    pulumi.export("storage_role_arn", outputs.storage_role_arn)
    pulumi.export("plan_role_arn", delivery.plan_role_arn)
    pulumi.export("up_role_arn", delivery.up_role_arn)
    pulumi.export("images_role_arn", delivery.images_role_arn)
    pulumi.export("break_glass_role_arn", delivery.break_glass_role_arn)
    pulumi.export("alarm_topic_arn", delivery.alarm_topic_arn)

by_cluster = pulumi.ResourceOptions(provider=in_cluster)
policies = Policies(config.policies, environment=environment, opts=by_cluster)
if installer := config.sandbox_runtime.installer:
    SandboxRuntime(installer, environment=environment, after=policies, opts=by_cluster)
if config.servers.images:
    Servers(config.servers, environment=environment, after=policies, volume_key_arn=volume_key_arn, opts=by_cluster)
