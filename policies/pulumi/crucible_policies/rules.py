"""Every rule there is."""

from __future__ import annotations

from crucible_policies import identity, network, nodes, registry, sandbox, secrets, storage, tags, workloads
from crucible_policies.rule import Rule

RULES: tuple[Rule, ...] = (
    *storage.RULES,
    *network.RULES,
    *identity.RULES,
    *nodes.RULES,
    *registry.RULES,
    *workloads.RULES,
    *sandbox.RULES,
    *secrets.RULES,
    *tags.RULES,
)
