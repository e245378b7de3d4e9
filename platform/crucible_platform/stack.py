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
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import pulumi
import yaml
from pulumi.runtime.config import CONFIG, get_config_env
from pydantic import AfterValidator, Field, ValidationError

from crucible_platform.nat import NatConfig, NatMode
from crucible_platform.network import Endpoint, NetworkConfig, plan_subnets
from crucible_platform.place import PREFIX, Place
from crucible_platform.section import AccountId, Cidr, Region, Section

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).parents[2]
ORGANISATION_FILE, EXAMPLE_FILE = "organisation.yaml", "organisation.example.yaml"
# Names another file than the root's own.
ORGANISATION_VARIABLE = "CRUCIBLE_ORGANISATION"
REFERENCE = "docs/stack-configuration.md"

EnvironmentName = Literal["dev", "staging", "production"]
# A NAT-less VPC must reach by endpoints all that a node needs to join its cluster ("Deploy private clusters", Amazon EKS user guide).
NEEDED_WITHOUT_NAT = frozenset(
    {Endpoint.ECR_API, Endpoint.ECR_IMAGES, Endpoint.STS, Endpoint.EC2, Endpoint.LOGS, Endpoint.POD_IDENTITY}
)


class ConfigError(Exception):
    """A configuration that cannot be used: each line of the text names a key and what to do."""


def _somebody(network: Cidr) -> Cidr:
    if network.prefixlen < 8:
        raise ValueError(f"{network} is most of the internet; name the networks that people come from")
    return network


class Environment(Section):
    """What an organisation decides for one environment."""

    account: AccountId = Field(description="AWS account, twelve digits in quotes; nothing is made in any other")
    vpc_cidr: Cidr = Field(description="Addresses of its VPC, /16 to /20, that nothing connected with it uses")


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
        pattern=r"^[A-Za-z0-9-]+/[A-Za-z0-9._-]+$", description="GitHub repository that deploys, `owner/name`"
    )
    alarm_email: str = Field(pattern=r"^[^@\s]+@[^@\s]+$", description="Who is told of alarms of the infrastructure")
    api_access_cidrs: tuple[Annotated[Cidr, AfterValidator(_somebody)], ...] = Field(
        description="Networks from which the Kubernetes API may be reached besides the VPC; empty: from none"
    )
    environments: dict[EnvironmentName, Environment] = Field(min_length=1, description="One entry for each environment")


class StackConfig(Section):
    """`Pulumi.<stack>.yaml`, one field for each `crucible:` key."""

    region: Region = Field(description="AWS region")
    network: NetworkConfig
    nat: NatConfig


def problems_between(config: StackConfig, organisation: Organisation, stack: EnvironmentName) -> Iterator[str]:
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
    if not config.network.zones[0].startswith(config.region):
        yield f"Pulumi.{stack}.yaml: {PREFIX}:network.zones: {config.network.zones[0]} is not in {PREFIX}:region, {config.region}"
    if config.nat.mode is NatMode.NONE and (missing := NEEDED_WITHOUT_NAT - config.network.endpoints):
        yield (
            f"Pulumi.{stack}.yaml: {PREFIX}:network.endpoints: without NAT, nodes also need {', '.join(sorted(missing))}; "
            f"add them, or choose another {PREFIX}:nat.mode"
        )


@dataclass(frozen=True)
class Stack:
    """A stack whose configuration has been found right."""

    config: StackConfig
    organisation: Organisation
    place: Place

    @property
    def environment(self) -> Environment:
        """What the organisation decided for it."""
        return self.organisation.environments[self.place.stack]  # type: ignore[index]

    @property
    def tags(self) -> dict[str, str]:
        """What every resource on AWS carries: whose cost it is, and who made it."""
        return {"Project": PREFIX, "Environment": self.place.stack, "ManagedBy": "pulumi"}


def read() -> Stack:
    """Return the stack that Pulumi is at.

    Raises:
        pulumi.RunError: its configuration cannot be used. Pulumi shows the text and no traceback.
    """
    values = {**get_config_env(), **CONFIG.get()}
    path = Path(os.environ.get(ORGANISATION_VARIABLE) or ROOT / ORGANISATION_FILE)
    try:
        return load(pulumi.get_stack(), values, load_organisation(path))
    except ConfigError as error:
        raise pulumi.RunError(str(error)) from None


def load(stack: str, values: Mapping[str, str], organisation: Organisation) -> Stack:
    """Return a stack from what Pulumi has for it.

    Args:
        stack: its name, an environment's.
        values: `crucible:key` -> text, or JSON where it is more than text. Keys of others are left alone.
        organisation: what is not in the stack's file.

    Raises:
        ConfigError: a key is unknown, missing, or has a value that cannot be used.
    """
    if stack not in get_args(EnvironmentName):
        raise ConfigError(f"{stack}: there is no such stack; there are {', '.join(get_args(EnvironmentName))}")
    own = {key.removeprefix(f"{PREFIX}:"): value for key, value in values.items() if key.startswith(f"{PREFIX}:")}
    parts = {key: _parse(value) for key, value in own.items()}
    try:
        config = StackConfig.model_validate(parts)
    except ValidationError as error:
        raise ConfigError("\n".join(_told(error, f"Pulumi.{stack}.yaml: {PREFIX}:"))) from None
    if found := list(problems_between(config, organisation, stack)):  # type: ignore[arg-type]
        raise ConfigError("\n".join(found))
    account = organisation.environments[stack].account  # type: ignore[index]
    return Stack(config, organisation, Place(account, config.region, stack))


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
