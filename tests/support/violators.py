"""A Pulumi program that makes what the policy pack refuses: every example of `tests/infra/test_policy_rules.py`, under the name RULE-NUMBER-NAME."""

from __future__ import annotations

from typing import Any

import pulumi

from tests.infra.test_policy_rules import REFUSES, Unknown


def program() -> None:
    """Register them all. What an example does not know yet is the id of a resource that is not there yet."""
    later = pulumi.CustomResource("aws:ec2/eip:Eip", "later", {})

    def known(value: Any) -> Any:
        if isinstance(value, Unknown):
            return later.id
        if isinstance(value, dict):
            return {key: known(each) for key, each in value.items()}
        return [known(each) for each in value] if isinstance(value, list | tuple) else value

    for rule, cases in REFUSES.items():
        for number, case in enumerate(cases):
            given = case.given if isinstance(case.given, dict) else {"it": case.given}
            made: dict[str, pulumi.CustomResource] = {}
            # Those that others come from are first.
            for name, (kind, properties) in sorted(
                given.items(), key=lambda each: each[0] not in case.sources.values()
            ):
                from_others = {key: made[of].id for (at, key), of in case.sources.items() if at == name}
                # "any" is the examples' own word for a group that does not matter.
                token = kind.replace(":any/", ":core/")
                made[name] = pulumi.CustomResource(
                    token, f"{rule}-{number}-{name}", {**known(properties), **from_others}
                )
