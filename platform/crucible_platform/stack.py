"""A stack's whole configuration: what `Pulumi.<stack>.yaml` and the organisation's own file say, checked before anything is made.

Each component's part is a model in the component's module; here they are put together, and held against each other. What is an
organisation's own (accounts, addresses, who may reach the API server) is in `organisation.yaml`, which is not in git;
`organisation.example.yaml` is, and says what belongs there.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import pulumi
import yaml
from pulumi.runtime.config import CONFIG, get_config_env
from pydantic import Field, ValidationError

from crucible_platform.cluster import ClusterAccess, ClusterConfig
from crucible_platform.delivery_access import BreakGlass, DeliveryConfig, StateBackend
from crucible_platform.nat import NatConfig, NatMode
from crucible_platform.network import Endpoint, NetworkConfig, plan_subnets
from crucible_platform.node_groups import NodesConfig
from crucible_platform.outputs import OutputsConfig
from crucible_platform.place import PREFIX, Place
from crucible_platform.policies import PoliciesConfig
from crucible_platform.registry import RegistryConfig
from crucible_platform.sandbox_runtime import SandboxRuntimeConfig
from crucible_platform.section import ROOT, AccountId, Cidr, Region, Section
from crucible_platform.servers import ServersConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ORGANISATION_FILE, EXAMPLE_FILE = "organisation.yaml", "organisation.example.yaml"
# Names another file than the root's own.
ORGANISATION_VARIABLE = "CRUCIBLE_ORGANISATION"
REFERENCE = "docs/stack-configuration.md"

EnvironmentName = Literal["dev", "staging", "production"]
LOCAL = "local"
# A NAT-less VPC must reach by endpoints all that a node needs to join its cluster ("Deploy private clusters", Amazon EKS user guide).
NEEDED_WITHOUT_NAT = frozenset(
    {Endpoint.ECR_API, Endpoint.ECR_IMAGES, Endpoint.STS, Endpoint.EC2, Endpoint.LOGS, Endpoint.POD_IDENTITY}
)


Config = TypeVar("Config", bound=Section)


class ConfigError(Exception):
    """A configuration that cannot be used: each line of the text names a key and what to do."""


class Environment(Section):
    """What an organisation decides for one environment."""

    account: AccountId = Field(description="AWS account, twelve digits in quotes; nothing is made in any other")
    vpc_cidr: Cidr = Field(description="Addresses of its VPC, /16 to /20, that nothing connected with it uses")
    cluster_access: ClusterAccess
    break_glass: BreakGlass = BreakGlass()
    state: StateBackend | None = Field(
        default=None, description="Where Pulumi keeps this environment's state, if that is a bucket of its account"
    )


class Organisation(Section):
    """`organisation.yaml`: what is your own and nobody else's."""

    name: str = Field(
        pattern=r"^[a-z][a-z0-9-]{1,19}$",
        description="Short name; what must be unique in the world, such as buckets, begins with it",
    )
    domain: str = Field(
        pattern=r"^([a-z0-9-]+\.)+[a-z]{2,}$", description="DNS domain below which the platform is reached"
    )
    repository: str = Field(
        pattern=r"^[A-Za-z0-9-]+(@[0-9]+)?/[A-Za-z0-9._-]+(@[0-9]+)?$",
        description="GitHub repository that deploys, `owner/name`, or `owner@1/name@2` if its OIDC settings show it with numbers",
    )
    alarm_email: str = Field(pattern=r"^[^@\s]+@[^@\s]+$", description="Who is told of alarms of the infrastructure")
    environments: dict[EnvironmentName, Environment] = Field(min_length=1, description="One entry for each environment")


class KubernetesConfig(Section):
    """The cluster of the stack `local`."""

    context: str = Field(
        min_length=1, description="Context of your kubeconfig; named, so that no other cluster is changed by mistake"
    )


class InCluster(Section):
    """What every stack has in its cluster."""

    policies: PoliciesConfig
    sandbox_runtime: SandboxRuntimeConfig
    servers: ServersConfig


class LocalConfig(InCluster):
    """`Pulumi.local.yaml`, one field for each `crucible:` key: a cluster that is there, and nothing on AWS."""

    kubernetes: KubernetesConfig


class CloudConfig(InCluster):
    """`Pulumi.<stack>.yaml` of an environment on AWS, one field for each `crucible:` key."""

    region: Region = Field(description="AWS region")
    network: NetworkConfig
    nat: NatConfig
    cluster: ClusterConfig
    nodes: NodesConfig
    registry: RegistryConfig
    outputs: OutputsConfig
    delivery: DeliveryConfig


def problems_between(config: CloudConfig, organisation: Organisation, stack: EnvironmentName) -> Iterator[str]:
    """Tell what is wrong between parts that are each right by themselves."""
    environments = organisation.environments
    for (one, its), (other, others) in combinations(environments.items(), 2):
        if its.vpc_cidr.overlaps(others.vpc_cidr):
            yield (
                f"organisation.yaml: environments.{other}.vpc_cidr: {others.vpc_cidr} overlaps {its.vpc_cidr} of {one}; "
                "choose addresses that are in no other environment"
            )
    if stack not in environments:
        yield f"organisation.yaml: environments: there is none called {stack}; add it"
        return
    try:
        plan_subnets(environments[stack].vpc_cidr, config.network.zones)
    except ValueError as error:
        yield f"organisation.yaml: environments.{stack}.vpc_cidr: {error}"
    if environments[stack].vpc_cidr.overlaps(config.cluster.service_cidr):
        yield (
            f"Pulumi.{stack}.yaml: {PREFIX}:cluster.service_cidr: {config.cluster.service_cidr} overlaps the VPC's "
            f"{environments[stack].vpc_cidr}; choose addresses outside of it"
        )
    release, version = config.nodes.ami_release, config.cluster.version
    if release and not release.startswith(f"{version}."):
        yield f"Pulumi.{stack}.yaml: {PREFIX}:nodes.ami_release: {release} is not of {PREFIX}:cluster.version, {version}"
    if not config.network.zones[0].startswith(config.region):
        yield f"Pulumi.{stack}.yaml: {PREFIX}:network.zones: {config.network.zones[0]} is not in {PREFIX}:region, {config.region}"
    if config.nat.mode is NatMode.NONE and (missing := NEEDED_WITHOUT_NAT - config.network.endpoints):
        yield (
            f"Pulumi.{stack}.yaml: {PREFIX}:network.endpoints: without NAT, nodes also need {', '.join(sorted(missing))}; "
            f"add them, or choose another {PREFIX}:nat.mode"
        )


@dataclass(frozen=True)
class Cloud:
    """What a stack has on AWS, found right."""

    config: CloudConfig
    organisation: Organisation
    place: Place

    @property
    def environment(self) -> Environment:
        """What the organisation decided for it."""
        return self.organisation.environments[self.place.stack]  # type: ignore[index]


@dataclass(frozen=True)
class Local:
    """A stack in a cluster that is there."""

    config: LocalConfig


def read() -> Cloud | Local:
    """Return the stack that Pulumi is at.

    Raises:
        pulumi.RunError: its configuration cannot be used. Pulumi shows the text and no traceback.
    """
    stack, values = pulumi.get_stack(), {**get_config_env(), **CONFIG.get()}
    try:
        if stack == LOCAL:
            return load_local(values)
        path = Path(os.environ.get(ORGANISATION_VARIABLE) or ROOT / ORGANISATION_FILE)
        return load(stack, values, load_organisation(path))
    except ConfigError as error:
        raise pulumi.RunError(str(error)) from None


def load(stack: str, values: Mapping[str, str], organisation: Organisation) -> Cloud:
    """Return a stack on AWS from what Pulumi has for it.

    Args:
        stack: its name, an environment's.
        values: `crucible:key` -> text, or JSON where it is more than text. Keys of others are left alone.
        organisation: what is not in the stack's file.

    Raises:
        ConfigError: a key is unknown, missing, or has a value that cannot be used.
    """
    if stack not in get_args(EnvironmentName):
        known = ", ".join((*get_args(EnvironmentName), LOCAL))
        raise ConfigError(f"{stack}: there is no such stack; there are {known}")
    config = _validated(CloudConfig, stack, values)
    if found := list(problems_between(config, organisation, stack)):  # type: ignore[arg-type]
        raise ConfigError("\n".join(found))
    account = organisation.environments[stack].account  # type: ignore[index]
    return Cloud(config, organisation, Place(account, config.region, stack))


def load_local(values: Mapping[str, str]) -> Local:
    """Return the stack `local` from what Pulumi has for it.

    Raises:
        ConfigError: a key is unknown, missing, or has a value that cannot be used.
    """
    return Local(_validated(LocalConfig, LOCAL, values))


def _validated(model: type[Config], stack: str, values: Mapping[str, str]) -> Config:
    own = {key.removeprefix(f"{PREFIX}:"): value for key, value in values.items() if key.startswith(f"{PREFIX}:")}
    try:
        return model.model_validate({key: _parse(value) for key, value in own.items()})
    except ValidationError as error:
        raise ConfigError("\n".join(_told(error, f"Pulumi.{stack}.yaml: {PREFIX}:"))) from None


def load_organisation(path: Path) -> Organisation:
    """Return what the organisation's own file says.

    Raises:
        ConfigError: there is none, or it cannot be used.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path.name}: there is none; copy {EXAMPLE_FILE} and put your own values in") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path.name}: it is no YAML: {error}") from None
    try:
        return Organisation.model_validate(found)
    except ValidationError as error:
        raise ConfigError("\n".join(_told(error, f"{path.name}: "))) from None


def _parse(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _told(error: ValidationError, where: str) -> Iterator[str]:
    for each in error.errors(include_url=False):
        key = ".".join(str(part) for part in each["loc"])
        if each["type"] == "extra_forbidden":
            yield f"{where}{key}: there is no such key; {REFERENCE} names those that there are"
        elif each["type"] == "missing":
            yield f"{where}{key}: it is missing; {REFERENCE} says what it means"
        else:
            said = each["msg"].removeprefix("Value error, ")
            yield f"{where}{key}: {said} (it is {each['input']!r})"
