"""A stack's configuration: what is right is taken, and what is wrong is told by its key before anything is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from crucible_platform.section import ROOT
from crucible_platform.stack import (
    EXAMPLE_FILE,
    Cloud,
    ConfigError,
    Organisation,
    load,
    load_local,
    load_organisation,
)

pytestmark = pytest.mark.unit

STACKS = ("dev", "staging", "production")


def stack_file(stack: str) -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / f"Pulumi.{stack}.yaml").read_text())["config"])


def example() -> Organisation:
    return load_organisation(ROOT / EXAMPLE_FILE)


def loaded(stack: str = "dev", organisation: Organisation | None = None, **changed: Any) -> Cloud:
    """Load a tracked stack with some keys changed, `None` taking one away."""
    parts = {**stack_file(stack), **{f"crucible:{key}": value for key, value in changed.items()}}
    values = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in parts.items() if value is not None
    }
    return load(stack, values, organisation or example())


def organisation(**changed: Any) -> Organisation:
    return Organisation.model_validate({**example().model_dump(mode="json"), **changed})


@pytest.mark.parametrize("stack", STACKS)
def test_every_tracked_stack_is_right_with_the_example_of_an_organisation(stack: str) -> None:
    assert loaded(stack).place.name == f"crucible-{stack}"


@pytest.mark.parametrize("stack", STACKS)
def test_a_tracked_stack_names_every_key(stack: str) -> None:
    fields = {f"crucible:{name}" for name in type(loaded(stack).config).model_fields}
    assert stack_file(stack).keys() == fields


def test_production_is_in_three_zones() -> None:
    assert len(loaded("production").config.network.zones) == 3


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"netwrok": {}}, "Pulumi.dev.yaml: crucible:netwrok: there is no such key"),
        ({"network": None}, "Pulumi.dev.yaml: crucible:network: it is missing"),
        (
            {"network": {"zones": ["eu-central-1a", "eu-central-1b"], "zone": 1}},
            "Pulumi.dev.yaml: crucible:network.zone: there is no such key",
        ),
        ({"network": {"zones": ["eu-central-1a"]}}, "Pulumi.dev.yaml: crucible:network.zones: "),
        (
            {"network": {"zones": ["eu-west-1a", "eu-west-1b"]}},
            "crucible:network.zones: eu-west-1a is not in crucible:region, eu-central-1",
        ),
        (
            {"network": {"zones": ["eu-central-1a", "eu-central-1b"], "flow_log_days": 8}},
            "crucible:network.flow_log_days: ",
        ),
        ({"nat": {"mode": "gatway"}}, "crucible:nat.mode: Input should be"),
        ({"nat": {"mode": "none"}}, "crucible:network.endpoints: without NAT, nodes also need ec2, ecr.api"),
        ({"region": "Frankfurt"}, "crucible:region: "),
        ({"cluster": {"version": "1.33"}}, "crucible:cluster.version: the platform and its upgrades are for 1.34"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_mistake_is_told_by_its_key(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as told:
        loaded(**changed)
    assert says in str(told.value)
    assert len(str(told.value).splitlines()) == 1


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as told:
        loaded(region="x", nat={"mode": "y"}, other=1)
    assert [line.split(": ")[1] for line in str(told.value).splitlines()] == [
        "crucible:region",
        "crucible:nat.mode",
        "crucible:other",
    ]


def test_no_way_out_is_right_where_all_that_nodes_need_has_an_endpoint() -> None:
    zones = ["eu-central-1a", "eu-central-1b"]
    assert loaded(network={"zones": zones}, nat={"mode": "none"}).config.nat.mode == "none"


def test_keys_of_others_are_left_alone() -> None:
    values = {key: json.dumps(value) for key, value in stack_file("dev").items()}
    assert (
        load("dev", {**values, "aws:region": "us-east-1", "pulumi:tags": "{}"}, example()).config.region
        == "eu-central-1"
    )


def test_a_stack_of_another_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="prod: there is no such stack; there are dev, staging, production, local"):
        load("prod", {}, example())


def test_local_names_its_cluster_and_has_nothing_on_aws() -> None:
    values = {key: json.dumps(value) for key, value in stack_file("local").items()}
    assert load_local(values).config.kubernetes.context == "crucible"
    with pytest.raises(ConfigError, match=r"Pulumi.local.yaml: crucible:region: there is no such key"):
        load_local({**values, "crucible:region": "eu-central-1"})
    with pytest.raises(ConfigError, match=r"Pulumi.local.yaml: crucible:kubernetes: it is missing"):
        load_local({"crucible:policies": '{"images": {}}'})


def test_an_image_that_is_not_named_by_its_digest_may_not_run() -> None:
    digest = "sha256:" + "0" * 64
    assert loaded(policies={"images": {"python": f"registry.example.org/runner@{digest}"}})
    with pytest.raises(ConfigError, match=r"crucible:policies.images.python: "):
        loaded(policies={"images": {"python": "registry.example.org/runner:latest"}})


def environment(vpc_cidr: str, account: str = "1" * 12) -> dict[str, Any]:
    return {"account": account, "vpc_cidr": vpc_cidr, "cluster_access": {"networks": [], "admins": ["Admin"]}}


@pytest.mark.parametrize(
    ("environments", "says"),
    [
        (
            {"dev": environment("10.0.0.0/16"), "staging": environment("10.0.128.0/17", "2" * 12)},
            "organisation.yaml: environments.staging.vpc_cidr: 10.0.128.0/17 overlaps 10.0.0.0/16 of dev",
        ),
        (
            {"dev": environment("10.0.0.0/22")},
            "organisation.yaml: environments.dev.vpc_cidr: 10.0.0.0/22: a VPC is a /16 to a /20",
        ),
        (
            {"dev": environment("172.20.0.0/16")},
            "Pulumi.dev.yaml: crucible:cluster.service_cidr: 172.20.0.0/16 overlaps the VPC's 172.20.0.0/16",
        ),
        ({"staging": environment("10.0.0.0/16", "2" * 12)}, "organisation.yaml: environments: there is none called dev"),
    ],
)  # fmt: skip
def test_addresses_that_cannot_be_used_are_told(environments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as told:
        loaded(organisation=organisation(environments=environments))
    assert str(told.value).startswith(says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "organisation.yaml: there is none; copy organisation.example.yaml"),
        ("a: [", "organisation.yaml: it is no YAML"),
        ("name: example\n", "organisation.yaml: domain: it is missing"),
        ("accounts: {}\n", "organisation.yaml: accounts: there is no such key"),
        (
            "environments: {dev: {cluster_access: {networks: [0.0.0.0/0]}}}\n",
            "cluster_access.networks.0: 0.0.0.0/0 is most of the internet",
        ),
        (
            "environments: {dev: {cluster_access: {networks: [192.0.2.1/24]}}}\n",
            "write the network's first address and its length",
        ),
        ("environments: {dev: {account: '12', vpc_cidr: 10.0.0.0/16}}\n", "environments.dev.account: "),
    ],
)
def test_a_mistake_in_the_organisations_file_is_told(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "organisation.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as told:
        load_organisation(path)
    assert says in str(told.value)


def test_a_release_of_the_nodes_image_is_of_the_clusters_version() -> None:
    nodes = stack_file("dev")["crucible:nodes"]
    assert loaded(nodes={**nodes, "ami_release": "1.36.4-20260923"})
    with pytest.raises(
        ConfigError, match=r"crucible:nodes.ami_release: 1.35.1-20260923 is not of crucible:cluster.version, 1.36"
    ):
        loaded(nodes={**nodes, "ami_release": "1.35.1-20260923"})
