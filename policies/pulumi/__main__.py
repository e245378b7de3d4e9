"""The policy pack: gives the rules of `crucible_policies` to Pulumi's engine. `pulumi preview --policy-pack policies/pulumi` runs it.

It has no rule of its own. What Pulumi does not know yet becomes `Unknown` on the way in, and on the way out the engine's own remark that a
rule cannot be decided in this preview.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from pulumi_policy import (
    EnforcementLevel,
    Policy,
    PolicyPack,
    PolicyProviderResource,
    PolicyResource,
    ReportViolation,
    ResourceValidationArgs,
    ResourceValidationPolicy,
    StackValidationArgs,
    StackValidationPolicy,
)
from pulumi_policy.proxy import UnknownValueError

from crucible_policies.resource import NotYetKnown, Resource, Unknown, resource
from crucible_policies.rule import ResourceRule, Rule, StackRule
from crucible_policies.rules import RULES

NAME = "crucible"
# Where nobody may choose.
PRODUCTION = "production"
# `advisory` shows violations and lets them through; for trying things out in other stacks.
LEVEL_VARIABLE = "CRUCIBLE_POLICY_LEVEL"
LEVELS = {each.value: each for each in (EnforcementLevel.MANDATORY, EnforcementLevel.ADVISORY)}
PAGE = "docs/policy-pack.md"


class ProductionError(Exception):
    """Somebody wants production's rules to be advice. Raised, it stops the update."""


def level(environment: Mapping[str, str]) -> EnforcementLevel:
    """Return what a violation does: it stops the update, unless the environment says otherwise.

    Raises:
        ValueError: the variable says neither `mandatory` nor `advisory`.
    """
    said = environment.get(LEVEL_VARIABLE) or EnforcementLevel.MANDATORY.value
    if said not in LEVELS:
        raise ValueError(f"{LEVEL_VARIABLE} is {said!r}; set it to mandatory or advisory, or not at all")
    return LEVELS[said]


def hold_production(urn: str) -> None:
    """See to it that rules are no advice in production.

    The stack is known by the URN alone: whether the engine puts its name into the environment depends on how it starts the pack.

    Raises:
        ProductionError: they are.
    """
    if urn.startswith(f"urn:pulumi:{PRODUCTION}::") and level(os.environ) is not EnforcementLevel.MANDATORY:
        raise ProductionError(f"{LEVEL_VARIABLE} is not for {PRODUCTION}, where every rule is mandatory; unset it")


def policies() -> list[Policy]:
    """Return every rule as Pulumi has it."""
    return [_policy(rule) for rule in RULES]


def _policy(rule: Rule) -> Policy:
    description, steps = f"Refused: {rule.refuses}.", f"{rule.instead}. {PAGE} says more."
    match rule:
        case ResourceRule():
            return ResourceValidationPolicy(rule.name, description, _of_resource(rule), remediation_steps=steps)
        case StackRule():
            return StackValidationPolicy(rule.name, description, _of_stack(rule), remediation_steps=steps)
    raise TypeError(f"{rule} is no rule")


def _of_resource(rule: ResourceRule) -> Any:
    def validate(args: ResourceValidationArgs, report: ReportViolation) -> None:
        hold_production(args.urn)
        found = resource(
            args.resource_type, plain(args.props), name=args.name, urn=args.urn, provider=_given(args.provider)
        )
        try:
            for said in rule.check(found):
                report(said, None)
        except NotYetKnown as error:
            raise UnknownValueError(error.unknown.kind, list(error.path)) from None

    return validate


def _of_stack(rule: StackRule) -> Any:
    def validate(args: StackValidationArgs, report: ReportViolation) -> None:
        for each in args.resources:
            hold_production(each.urn)
        try:
            for found, said in rule.check([_seen(each) for each in args.resources]):
                report(said, found.urn)
        except NotYetKnown as error:
            raise UnknownValueError(error.unknown.kind, list(error.path)) from None

    return validate


def _seen(made: PolicyResource) -> Resource:
    sources = {key: frozenset(each.urn for each in found) for key, found in made.property_dependencies.items()}
    return resource(
        made.resource_type,
        plain(made.props),
        name=made.name,
        urn=made.urn,
        provider=_given(made.provider),
        came_from=sources,
    )


def _given(provider: PolicyProviderResource | None) -> dict[str, Any]:
    return plain(provider.props) if provider else {}


def plain(value: Any) -> Any:
    """Return what pulumi_policy shows as plain values, and `Unknown` where it raises."""
    match value:
        case Mapping():
            return {key: _item(value, key) for key in value}
        case str() | bytes():
            return value
        case Sequence():
            return [_item(value, index) for index in range(len(value))]
    return value


def _item(holder: Any, key: Any) -> Any:
    try:
        return plain(holder[key])
    except UnknownValueError as error:
        return Unknown(error.unknown_type_sentinel)


if __name__ == "__main__":
    PolicyPack(NAME, policies(), enforcement_level=level(os.environ))
