"""`platform/__main__.py` whole, for every environment: what `pulumi up` would register, held against what must be true of all of it."""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Any, get_args

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from crucible_platform.cli import app, component_edges, stack_values, tree
from crucible_platform.config_docs import reference
from crucible_platform.rehearsal import Rehearsal, rehearse_platform, unknown_properties
from crucible_platform.section import Section
from crucible_platform.stack import EXAMPLE_FILE, ORGANISATION_VARIABLE, REFERENCE, ROOT, StackConfig, problems_between

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.unit

STACKS = ("dev", "staging", "production")
# What each environment must have. A component that is no longer composed is named here by what is missing without it.
NEEDED = {
    "crucible:network:Network": "a VPC with subnets in each zone",
    "crucible:nat:Gateways": "a way out of the private subnets",
}
PROVIDER = "pulumi:providers:aws"

Reads = set[tuple[str, str]]


@pytest.fixture(scope="module")
def whole() -> Iterator[tuple[dict[str, Rehearsal], Reads]]:
    """Every stack, and which fields of its configuration the program read."""
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
        yield {stack: rehearse_platform(stack, stack_values(stack)) for stack in STACKS}, reads


@pytest.fixture
def stacks(whole: tuple[dict[str, Rehearsal], Reads]) -> dict[str, Rehearsal]:
    return whole[0]


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("component", NEEDED)
def test_an_environment_has_every_component(stacks: dict[str, Rehearsal], stack: str, component: str) -> None:
    assert len(stacks[stack].of(component)) == 1, f"{stack} has no {component}, and so not {NEEDED[component]}"


@pytest.mark.parametrize("stack", STACKS)
def test_no_component_is_unknown_here(stacks: dict[str, Rehearsal], stack: str) -> None:
    assert {each.type for each in stacks[stack].resources if not each.custom} == NEEDED.keys()


@pytest.mark.parametrize("stack", STACKS)
def test_every_resource_is_part_of_a_component(stacks: dict[str, Rehearsal], stack: str) -> None:
    own = {each.urn for each in stacks[stack].resources}
    lonely = [
        (each.type, each.name)
        for each in stacks[stack].resources
        if each.custom and each.type != PROVIDER and each.parent not in own
    ]
    assert lonely == []


@pytest.mark.parametrize("stack", STACKS)
def test_every_resource_is_made_by_the_provider_that_is_held_to_the_stacks_account(
    stacks: dict[str, Rehearsal], stack: str
) -> None:
    provider = stacks[stack].one(PROVIDER)
    assert '"aws:' not in str(provider.inputs)
    assert str(list(STACKS).index(stack) + 1) * 12 in str(provider.inputs["allowedAccountIds"])
    others = [
        each.name
        for each in stacks[stack].resources
        if each.custom and each.type.startswith("aws:") and each.provider != provider.urn
    ]
    assert others == []


@pytest.mark.parametrize("stack", STACKS)
def test_every_property_is_one_that_the_provider_knows(stacks: dict[str, Rehearsal], stack: str) -> None:
    assert [
        unknown
        for each in stacks[stack].resources
        if each.custom and each.type != PROVIDER
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
    keys = {(model.__name__, name) for model in sections(StackConfig) for name in model.model_fields}
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
    assert "dev, production, staging" in told.output
