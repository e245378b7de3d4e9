"""`platform/__main__.py` whole, for every environment: what `pulumi up` would register, held against what must be true of all of it."""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Any, get_args

import pytest
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

from crucible_platform.cli import app, component_edges, manifests, tree
from crucible_platform.config_docs import reference
from crucible_platform.delivery_rights import READS, WRITES
from crucible_platform.manifests import FIRST, name_of, read
from crucible_platform.rehearsal import Rehearsal, rehearse_platform, unknown_properties
from crucible_platform.section import ROOT, Section
from crucible_platform.stack import (
    EXAMPLE_FILE,
    LOCAL,
    ORGANISATION_VARIABLE,
    REFERENCE,
    CloudConfig,
    LocalConfig,
    problems_between,
)
from tests.support.stacks import whole_stack

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.unit

CLOUDS = ("dev", "staging", "production")
STACKS = (*CLOUDS, LOCAL)
# What each stack must have. A component that is no longer composed is named here by what is missing without it.
IN_CLOUD = {
    "crucible:network:Network": "a VPC with subnets in each zone",
    "crucible:nat:Gateways": "a way out of the private subnets",
    "crucible:cluster:Cluster": "a Kubernetes API",
    "crucible:node_groups:NodeGroups": "nodes in each zone, for the platform and for sandboxes",
    "crucible:cluster:AddOns": "names inside the cluster, and volumes",
    "crucible:registry:Registry": "a place for images",
    "crucible:outputs:Outputs": "buckets for outputs and backups",
    "crucible:delivery_access:DeliveryAccess": "roles for what delivers, and a way in for emergencies",
}
IN_CLUSTER = {
    "crucible:policies:Policies": "admission, network policies, rights and quota",
    "crucible:sandbox_runtime:SandboxRuntime": "gVisor on nodes that come without it",
    "crucible:servers:Servers": "RabbitMQ, Redis and PostgreSQL",
}
NEEDED = {**dict.fromkeys(CLOUDS, IN_CLOUD | IN_CLUSTER), LOCAL: IN_CLUSTER}
AWS, KUBERNETES = "pulumi:providers:aws", "pulumi:providers:kubernetes"

Reads = set[tuple[str, str]]


@pytest.fixture(scope="module")
def whole() -> Iterator[tuple[dict[str, Rehearsal], Reads]]:
    """Every stack once its images are there, and which fields of its configuration the program read."""
    reads: Reads = set()

    def noted(self: Section, name: str) -> Any:
        # That it was held against other keys is no effect.
        checked = sys._getframe(1).f_code is problems_between.__code__
        if not checked and not name.startswith("_") and name in type(self).model_fields:
            reads.add((type(self).__name__, name))
        return object.__getattribute__(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ORGANISATION_VARIABLE, str(ROOT / EXAMPLE_FILE))
        patch.setattr(Section, "__getattribute__", noted, raising=False)
        yield {stack: rehearse_platform(stack, whole_stack(stack)) for stack in STACKS}, reads


@pytest.fixture
def stacks(whole: tuple[dict[str, Rehearsal], Reads]) -> dict[str, Rehearsal]:
    return whole[0]


@pytest.mark.parametrize(("stack", "component"), [(stack, each) for stack in STACKS for each in NEEDED[stack]])
def test_a_stack_has_every_component(stacks: dict[str, Rehearsal], stack: str, component: str) -> None:
    assert len(stacks[stack].of(component)) == 1, f"{stack} has no {component}, and so not {NEEDED[stack][component]}"


@pytest.mark.parametrize("stack", STACKS)
def test_no_component_is_unknown_here(stacks: dict[str, Rehearsal], stack: str) -> None:
    assert {each.type for each in stacks[stack].resources if not each.custom} == NEEDED[stack].keys()


@pytest.mark.parametrize("stack", STACKS)
def test_every_resource_is_part_of_a_component(stacks: dict[str, Rehearsal], stack: str) -> None:
    own = {each.urn for each in stacks[stack].resources}
    lonely = [
        (each.type, each.name)
        for each in stacks[stack].resources
        if each.custom and not each.type.startswith("pulumi:") and each.parent not in own
    ]
    assert lonely == []


@pytest.mark.parametrize("stack", CLOUDS)
def test_nothing_is_made_in_another_account_than_the_stacks(stacks: dict[str, Rehearsal], stack: str) -> None:
    account = str(CLOUDS.index(stack) + 1) * 12
    assert stacks[stack].one(AWS).inputs["allowedAccountIds"] == f'["{account}"]'


def test_nothing_is_made_in_another_cluster_than_the_one_that_is_named(stacks: dict[str, Rehearsal]) -> None:
    assert stacks[LOCAL].one(KUBERNETES).inputs["context"] == "crucible"


@pytest.mark.parametrize("stack", STACKS)
def test_every_resource_is_made_by_the_stacks_own_provider(stacks: dict[str, Rehearsal], stack: str) -> None:
    own = {
        each.type.rpartition(":")[2]: each.urn
        for each in stacks[stack].resources
        if each.type.startswith("pulumi:providers:")
    }
    others = [
        each.name
        for each in stacks[stack].resources
        if each.custom and not each.type.startswith("pulumi:") and each.provider != own[each.type.partition(":")[0]]
    ]
    assert others == []


@pytest.mark.parametrize("stack", STACKS)
def test_every_property_is_one_that_the_provider_knows(stacks: dict[str, Rehearsal], stack: str) -> None:
    assert [
        unknown
        for each in stacks[stack].resources
        if each.custom and not each.type.startswith("pulumi:")
        for unknown in unknown_properties(each)
    ] == []


def test_a_property_that_the_provider_does_not_know_would_be_found(stacks: dict[str, Rehearsal]) -> None:
    vpc = stacks["dev"].one("aws:ec2/vpc:Vpc")
    vpc.inputs["cidrBlocks"] = vpc.inputs["cidrBlock"]
    try:
        assert list(unknown_properties(vpc)) == ["aws:ec2/vpc:Vpc crucible-dev.cidrBlocks"]
    finally:
        del vpc.inputs["cidrBlocks"]


@pytest.mark.parametrize("stack", STACKS)
def test_no_two_resources_have_one_name(stacks: dict[str, Rehearsal], stack: str) -> None:
    assert [urn for urn, count in Counter(each.urn for each in stacks[stack].resources).items() if count > 1] == []


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for each in (field.annotation, *get_args(field.annotation)):
            if isinstance(each, type) and issubclass(each, BaseModel):
                yield from sections(each)


def test_no_key_of_the_configuration_is_without_effect(whole: tuple[dict[str, Rehearsal], Reads]) -> None:
    keys = {
        (model.__name__, name)
        for whole_of in (CloudConfig, LocalConfig)
        for model in sections(whole_of)
        for name in model.model_fields
    }
    assert keys - whole[1] == set(), "the program never reads these; use them or take them away"


def test_the_reference_of_the_configuration_is_what_the_models_say() -> None:
    assert (ROOT / REFERENCE).read_text() == reference(), "run `make docs`"


def test_every_key_is_explained() -> None:
    unexplained = [line for line in reference().splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert unexplained == []


# -- the command line


def test_a_preview_shows_every_resource_below_its_component(stacks: dict[str, Rehearsal]) -> None:
    lines = tree(stacks["dev"])
    assert len(lines) == len(stacks["dev"].resources)
    at = lines.index("crucible:network:Network  crucible-dev")
    assert "  aws:ec2/vpc:Vpc  crucible-dev" in lines[at:]


def test_the_graph_knows_who_needs_whom(stacks: dict[str, Rehearsal]) -> None:
    assert "  nat_Gateways --> network_Network" in component_edges(stacks["dev"])


def test_a_preview_of_no_stack_names_those_that_there_are() -> None:
    told = CliRunner().invoke(app, ["preview", "-s", "prod"])
    assert told.exit_code == 2
    assert "dev, local, production, staging" in told.output


def test_what_is_rendered_is_in_an_order_that_can_be_applied_and_the_same_each_time(
    stacks: dict[str, Rehearsal],
) -> None:
    rendered = manifests(stacks[LOCAL])
    kinds = [each["kind"] for each in rendered]
    assert kinds[:3] == ["Namespace"] * 3
    assert kinds.index("Role") > max(at for at, kind in enumerate(kinds) if kind in FIRST)
    again = manifests(rehearse_platform(LOCAL, whole_stack(LOCAL)))
    assert yaml.safe_dump_all(rendered) == yaml.safe_dump_all(again)
    sources = ("policies", "gitops/base/gvisor", "platform/servers")
    assert {name_of(each) for each in rendered} == {name_of(each) for at in sources for each in read(ROOT / at)}
    (priority,) = (each for each in rendered if name_of(each) == "PriorityClass/crucible-evaluation")
    assert repr(priority["value"]) == "-1000"


def test_the_control_plane_is_in_the_zones_that_it_began_with_so_that_one_can_be_added(
    stacks: dict[str, Rehearsal],
) -> None:
    for stack in CLOUDS:
        subnets = stacks[stack].one("aws:eks/cluster:Cluster").inputs["vpcConfig"]["subnetIds"]
        assert subnets == [f"crucible-{stack}-private-eu-central-1{zone}-id" for zone in "ab"]


def test_what_up_makes_it_may_change_and_see(stacks: dict[str, Rehearsal]) -> None:
    """A service that a component comes to use must be in the tables of what delivers may do."""
    services = {
        each.type.split(":")[1].split("/")[0] for each in stacks["production"].resources if each.type.startswith("aws:")
    }
    # A security group's rules are EC2's, and roles and keys have rights of their own.
    named = {"vpc": "ec2", "cloudwatch": "logs"}
    apart = {"iam", "kms"}
    assert {named.get(each, each) for each in services} - apart <= WRITES.keys()
    assert {named.get(each, each) for each in services} <= READS.keys()
