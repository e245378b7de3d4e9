"""The platform's own program under Pulumi's real engine: what an operator does to an environment, and what may happen meanwhile.

The providers are stand-ins (tests/support/provider): plugins come from no package index. So nothing here shows that AWS takes the values; it shows
what the engine makes of the program: what is created, changed, replaced, kept and deleted, and in which order.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crucible_platform.rehearsal import rehearse_platform
from crucible_platform.section import ROOT
from crucible_platform.stack import EXAMPLE_FILE, ORGANISATION_VARIABLE
from tests.infra.test_policy_rules import REFUSES
from tests.support.capabilities import needs
from tests.support.folders import scratch_dir
from tests.support.pulumi_engine import STAND_IN, Engine, EngineError, open_stack
from tests.support.stacks import whole_stack

pytestmark = [pytest.mark.integration, needs("pulumi engine"), pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def pulumi() -> Path:
    done = subprocess.run([ROOT / "scripts" / "pulumi-engine"], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


@pytest.fixture
def engine(pulumi: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    print(STAND_IN)
    monkeypatch.setenv(ORGANISATION_VARIABLE, str(ROOT / EXAMPLE_FILE))
    for folder in scratch_dir():
        yield open_stack(folder, pulumi, "dev", whole_stack("dev"), {ORGANISATION_VARIABLE: str(ROOT / EXAMPLE_FILE)})


def expected() -> Counter[str]:
    """What the rehearsal says that there will be, by type."""
    found = rehearse_platform("dev", whole_stack("dev"))
    return Counter(each.type for each in found.resources if each.custom and not each.type.startswith("pulumi:"))


def made(engine: Engine) -> Counter[str]:
    return Counter(each["type"] for each in engine.objects())


def set_config(engine: Engine, **values: Any) -> None:
    engine.configure({f"crucible:{key}": json.dumps(value) for key, value in values.items()})


def change_behind_the_engines_back(engine: Engine, type_: str, key: str, value: Any) -> None:
    path = next(path for path in sorted(engine.made.glob("*.json")) if json.loads(path.read_text())["type"] == type_)
    found = json.loads(path.read_text())
    assert found["properties"][key] != value
    found["properties"][key] = value
    path.write_text(json.dumps(found))


def test_the_life_of_an_environment_from_a_preview_to_its_end(engine: Engine) -> None:
    """One after the other on one stack, as an operator has it: each act takes the engine seconds."""
    foreseen = engine.act("preview")
    assert foreseen["create"] > expected().total()
    assert engine.objects() == [], "a preview makes nothing"

    # AWS has had enough half way.
    engine.fail_at("crucible-dev-private-eu-central-1b")
    with pytest.raises(EngineError, match="ThrottlingException"):
        engine.act("up")
    half = engine.ids()
    assert Counter() < made(engine) < expected()
    engine.fail_at()
    engine.act("up")
    assert made(engine) == expected()
    assert half <= engine.ids(), "what is there is not made again"

    # Someone has been at the console, and a third zone is wanted. The endpoint of S3 learns of its route table; nothing else of the others changes.
    before = engine.objects()
    change_behind_the_engines_back(engine, "aws:ec2/subnet:Subnet", "mapPublicIpOnLaunch", True)
    assert engine.act("refresh")["update"] == 1
    network = json.loads(whole_stack("dev")["crucible:network"])
    set_config(engine, network={**network, "zones": [*network["zones"], "eu-central-1c"]})
    done = engine.act("up")
    assert done.keys() == {"same", "create", "update"}
    assert done["update"] == 2
    assert not any(each["properties"].get("mapPublicIpOnLaunch") for each in engine.objects())
    assert [each["type"] for each in before if each not in engine.objects()] == ["aws:ec2/vpcEndpoint:VpcEndpoint"]

    engine.act("destroy")
    assert engine.objects() == []


def test_a_mistake_in_the_configuration_is_told_and_nothing_is_made_of_it(engine: Engine) -> None:
    set_config(engine, nat={"mode": "gatway"})
    with pytest.raises(EngineError) as told:
        engine.act("up")
    assert "Pulumi.dev.yaml: crucible:nat.mode: Input should be 'gateway' or 'none'" in str(told.value)
    assert "Traceback" not in str(told.value)
    assert engine.objects() == []


# -- with the policy pack


@pytest.fixture
def pack() -> Path:
    subprocess.run([ROOT / "scripts" / "policy-pack"], check=True)
    return ROOT / "policies" / "pulumi"


def test_the_platform_passes_the_policy_pack(engine: Engine, pack: Path) -> None:
    assert engine.act("preview", pack=pack)["create"] > 0


def test_each_rule_of_the_policy_pack_denies_what_it_is_for(engine: Engine, pack: Path) -> None:
    with pytest.raises(EngineError) as denied:
        engine.act("preview", program="tests.support.violators:program", pack=pack)
    found = re.findall(r"\[mandatory\]\s+([a-z0-9-]+)\s+\([^)]*: ([^)\s]+)\)", str(denied.value))
    own = {rule for rule, name in found if name.startswith(f"{rule}-")}
    assert own == REFUSES.keys(), "a rule that denied none of its own examples"
