"""Policies and roles of IAM, made in one way: statements as data, linted before anything is made.

What may change something names what it may change: an action that writes and a resource `*` do not go together, nor does an action
`*` with anything. The policy pack refuses the same for whatever did not come through here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pulumi
import pulumi_aws as aws

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from crucible_platform.place import Place

VERSION = "2012-10-17"
# What roles that `up` makes can do at most: everything but IAM, the organisation, and the account. It is AWS's own, so nobody here can change
# it, and it is there before any role.
BOUNDARY = "arn:aws:iam::aws:policy/PowerUserAccess"
# What only looks; with these, `*` as the resource is often the only one that AWS takes.
_READS = re.compile(r"^[a-z0-9-]+:(Get|List|Describe|BatchGet|BatchCheck|Check|Lookup|Head)[A-Za-z]*\*?$")


@dataclass(frozen=True)
class Allow:
    """A statement.

    Attributes:
        actions: such as `s3:GetObject`; at most their end is a `*`.
        resources: ARNs, known now or once they are made.
        conditions: operator -> key -> value.
        unscoped: why actions that write have no resource to name, where AWS knows none. It is the only way to have `*` there.
    """

    actions: Sequence[str]
    resources: Sequence[pulumi.Input[str]]
    conditions: Mapping[str, Mapping[str, pulumi.Input[str]]] = field(default_factory=dict)
    unscoped: str | None = None

    def __post_init__(self) -> None:
        """Refuse what allows too much.

        Raises:
            ValueError: it says which action, and what to do.
        """
        if bad := [action for action in self.actions if action == "*" or action.endswith(":*")]:
            raise ValueError(f"{', '.join(bad)}: name the actions")
        if "*" not in self.resources or self.unscoped:
            return
        if writes := [action for action in self.actions if not _READS.match(action)]:
            raise ValueError(
                f"{', '.join(writes)} on every resource: name the resources, or say in `unscoped` why AWS knows none"
            )

    def document(self) -> dict[str, Any]:
        """Return it as IAM has it."""
        statement: dict[str, Any] = {
            "Effect": "Allow",
            "Action": list(self.actions),
            "Resource": list(self.resources),
        }
        if self.conditions:
            statement["Condition"] = self.conditions
        return statement


@dataclass(frozen=True)
class Deny:
    """A statement that wins over all that allow, those of later days included. So it may be as wide as it likes.

    Attributes:
        actions: such as `iam:*AccessKey*`.
        resources: ARNs, known now or once they are made.
        conditions: operator -> key -> value.
        elsewhere: whether it is about all resources but these.
    """

    actions: Sequence[str]
    resources: Sequence[pulumi.Input[str]]
    conditions: Mapping[str, Mapping[str, pulumi.Input[str]]] = field(default_factory=dict)
    elsewhere: bool = False

    def document(self) -> dict[str, Any]:
        """Return it as IAM has it."""
        statement: dict[str, Any] = {
            "Effect": "Deny",
            "Action": list(self.actions),
            "NotResource" if self.elsewhere else "Resource": list(self.resources),
        }
        if self.conditions:
            statement["Condition"] = self.conditions
        return statement


def policy(*statements: Allow | Deny) -> pulumi.Output[str]:
    """Return a policy document."""
    return pulumi.Output.json_dumps({"Version": VERSION, "Statement": [each.document() for each in statements]})


class Role(aws.iam.Role):
    """A role that knows what gives it its rights.

    Attributes:
        policies: for what must not be made before the role has them, nor lose them while it is taken down.
    """

    policies: tuple[pulumi.Resource, ...] = ()


def role(
    name: str,
    place: Place,
    trust: Mapping[str, Any],
    *statements: Allow,
    managed: Sequence[str] = (),
    description: str,
    opts: pulumi.ResourceOptions,
) -> Role:
    """Make a role.

    Args:
        name: of the role, after the stack's own.
        place: where.
        trust: the one statement of who may take it, without its effect.
        statements: what it may do.
        managed: AWS's own policies, by name below `arn:aws:iam::aws:policy/`.
        description: for whoever finds it in the console.
        opts: the parent.
    """
    full = f"{place.name}-{name}"
    made = Role(
        full,
        name=full,
        description=description,
        assume_role_policy=pulumi.Output.json_dumps({"Version": VERSION, "Statement": [{"Effect": "Allow", **trust}]}),
        permissions_boundary=BOUNDARY,
        opts=opts,
    )
    policies: list[pulumi.Resource] = []
    if statements:
        policies.append(aws.iam.RolePolicy(full, name=full, role=made.name, policy=policy(*statements), opts=opts))
    for each in managed:
        attached = f"{full}-{each.rpartition('/')[2]}"
        arn = f"arn:aws:iam::aws:policy/{each}"
        policies.append(aws.iam.RolePolicyAttachment(attached, role=made.name, policy_arn=arn, opts=opts))
    made.policies = tuple(policies)
    return made


def by_service(service: str, place: Place | None = None) -> dict[str, Any]:
    """Return the trust in a service of AWS, on behalf of this account alone where the service says for whom it acts."""
    trust: dict[str, Any] = {"Principal": {"Service": service}, "Action": "sts:AssumeRole"}
    if place:
        trust["Condition"] = {"StringEquals": {"aws:SourceAccount": place.account}}
    return trust


def by_pod() -> dict[str, Any]:
    """Return the trust in EKS Pod Identity, which gives a role to the Pods of one service account."""
    return {"Principal": {"Service": "pods.eks.amazonaws.com"}, "Action": ["sts:AssumeRole", "sts:TagSession"]}
