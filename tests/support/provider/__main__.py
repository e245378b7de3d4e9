"""`python -m tests.support.provider ENGINE`: serves until the engine ends it. ENGINE is where the engine listens."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pulumi.provider.experimental import provider as p
from pulumi.provider.experimental.property_value import PropertyValue
from pulumi.provider.experimental.server import main
from pulumi.runtime.rpc import UNKNOWN

FOLDER = Path(os.environ["STAND_IN_FOLDER"])
# Resources whose creation and deletion fail: names, separated by blanks.
FAILING = FOLDER / "failing"
# What AWS cannot change: the resource is replaced ("Update requires: Replacement" in the CloudFormation reference of each).
FIXED = {
    "aws:ec2/vpc:Vpc": {"cidrBlock"},
    "aws:ec2/subnet:Subnet": {"cidrBlock", "availabilityZone", "vpcId"},
    "aws:ec2/natGateway:NatGateway": {"subnetId", "allocationId"},
    "aws:iam/role:Role": {"name"},
    "aws:eks/cluster:Cluster": {"name", "roleArn"},
    "aws:ecr/repository:Repository": {"name", "imageTagMutability"},
    "aws:s3/bucket:Bucket": {"bucket"},
}
# What is known only once it is there. Every resource has an ARN here.
GIVEN = (
    "arn",
    "keyId",
    "publicIp",
    "networkInterfaceId",
    "dnsName",
    "endpoint",
    "url",
    "repositoryUrl",
    "certificateAuthority",
)


def plain(value: PropertyValue) -> Any:
    """Return a property as JSON has it. A secret is written down: what the folder shows is what AWS would see."""
    inner = value.value
    match inner:
        case None | str() | bool() | float():
            return inner
        case Mapping():
            return {key: plain(each) for key, each in inner.items()}
        case Sequence():
            return [plain(each) for each in inner]  # type: ignore[arg-type] # text, which is a sequence too, is above
    raise TypeError(f"{type(inner)} is nothing that AWS takes")


def property_of(value: Any) -> PropertyValue:
    """Return what JSON has as a property."""
    if isinstance(value, dict):
        return PropertyValue({key: property_of(each) for key, each in value.items()})
    if isinstance(value, list):
        return PropertyValue([property_of(each) for each in value])
    return PropertyValue(float(value) if isinstance(value, int) and not isinstance(value, bool) else value)


def own_type(qualified: str) -> str:
    """Return a resource's type without those of the components that it is part of."""
    return qualified.rpartition("$")[2]


def is_unknown(value: PropertyValue) -> bool:
    """Whether something in it is known only once what it belongs to is made."""
    return UNKNOWN in json.dumps(plain(value))


class StandIn(p.Provider):
    """Makes files."""

    async def check_config(self, request: p.CheckRequest) -> p.CheckResponse:
        return p.CheckResponse(inputs=dict(request.new_inputs))

    async def diff_config(self, request: p.DiffRequest) -> p.DiffResponse:
        return p.DiffResponse(changes=False)

    async def configure(self, request: p.ConfigureRequest) -> p.ConfigureResponse:
        return p.ConfigureResponse(accept_secrets=True, supports_preview=True)

    async def check(self, request: p.CheckRequest) -> p.CheckResponse:
        return p.CheckResponse(inputs=dict(request.new_inputs))

    async def diff(self, request: p.DiffRequest) -> p.DiffResponse:
        keys = {key for key in request.old_state if key not in GIVEN} | request.new_inputs.keys()
        keys -= set(request.ignore_changes)
        changed = [key for key in keys if not same(request.old_state.get(key), request.new_inputs.get(key))]
        replaces = [key for key in changed if key in FIXED.get(own_type(request.type), set())]
        return p.DiffResponse(changes=bool(changed), diffs=changed, replaces=replaces, delete_before_replace=False)

    async def create(self, request: p.CreateRequest) -> p.CreateResponse:
        given = {key: PropertyValue(UNKNOWN) for key in GIVEN if key not in request.properties}
        if request.preview:
            return p.CreateResponse(properties={**given, **request.properties})
        fail_if_told(request.name)
        kind = request.type.rpartition(":")[2]
        resource_id = f"{kind.lower()}-{hashlib.sha256(os.urandom(8)).hexdigest()[:12]}"
        made = {
            **{
                key: f"arn:aws:stand-in:::{kind}/{request.name}" if key == "arn" else f"{key}-of-{request.name}"
                for key in GIVEN
            },
            "certificateAuthority": {"data": "c3RhbmQtaW4="},
        }
        made |= {key: plain(value) for key, value in request.properties.items()}
        write(resource_id, {"type": own_type(request.type), "name": request.name, "properties": made})
        return p.CreateResponse(
            resource_id=resource_id, properties={k: property_of(v) for k, v in made.items()} | dict(request.properties)
        )

    async def read(self, request: p.ReadRequest) -> p.ReadResponse:
        path = FOLDER / f"{request.resource_id}.json"
        if not path.exists():
            return p.ReadResponse()
        made = {key: property_of(value) for key, value in json.loads(path.read_text())["properties"].items()}
        inputs = {key: made[key] for key in request.inputs if key in made}
        return p.ReadResponse(resource_id=request.resource_id, properties=made, inputs=inputs)

    async def update(self, request: p.UpdateRequest) -> p.UpdateResponse:
        merged = {**request.olds, **request.news}
        if not request.preview:
            fail_if_told(request.name)
            known = json.loads((FOLDER / f"{request.resource_id}.json").read_text())
            known["properties"] |= {key: plain(value) for key, value in request.news.items()}
            write(request.resource_id, known)
        return p.UpdateResponse(properties=merged)

    async def delete(self, request: p.DeleteRequest) -> None:
        fail_if_told(request.name)
        (FOLDER / f"{request.resource_id}.json").unlink()


def same(old: PropertyValue | None, new: PropertyValue | None) -> bool:
    """Whether two properties are one value; what is not known yet is another."""
    if old is None or new is None:
        return old is new
    if is_unknown(new):
        return False
    return bool(plain(old) == plain(new))


def fail_if_told(name: str) -> None:
    """Fail as AWS does when it has had enough.

    Raises:
        RuntimeError: the test said so.
    """
    if FAILING.exists() and name in FAILING.read_text().split():
        raise RuntimeError(f"ThrottlingException: Rate exceeded ({name})")


def write(resource_id: str, made: dict[str, Any]) -> None:
    """Keep what was made."""
    (FOLDER / f"{resource_id}.json").write_text(json.dumps(made, indent=1, sort_keys=True))


if __name__ == "__main__":
    main(sys.argv[1:], "7.51.1", StandIn())
