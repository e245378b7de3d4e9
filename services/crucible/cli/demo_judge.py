"""Whether the demo went as it must: every outcome the expected one, every byte as written, priority strictly kept.

Pure: from what was read back to a verdict in words.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crucible.cli.client import Document
    from crucible.cli.demo_plan import Program


@dataclass(frozen=True, slots=True)
class Result:
    """A program, the evaluation that it became, and its standard output as downloaded."""

    program: Program
    evaluation: Document
    stdout: bytes


@dataclass(slots=True)
class Verdict:
    """What was not as expected: per program, and in the order of the queue."""

    differences: dict[str, list[str]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether everything was as expected."""
        return not self.differences and not self.order


def judge(queued: Sequence[Result], others: Sequence[Result] = ()) -> Verdict:
    """Compare what became of the programs with what had to.

    Args:
        queued: the batch that was submitted at once, among which the order counts.
        others: what was submitted before and after.
    """
    differences = {result.program.name: found for result in (*queued, *others) if (found := _differences(result))}
    return Verdict(differences, _overtaken(queued))


def taken_order(evaluation: Document) -> tuple[datetime, int]:
    """Sort evaluations as the queue gave them out; those that it never gave out come last."""
    taken = evaluation.get("provisioning_at")
    return (datetime.fromisoformat(taken) if taken else datetime.max.replace(tzinfo=UTC), -evaluation["priority"])


def _differences(result: Result) -> list[str]:
    program, evaluation = result.program, result.evaluation
    # Of several right endings, the one that it came closest to.
    per_ending = [ending.differences(evaluation) for ending in program.endings]
    found = min(per_ending, key=len)
    if program.stdout is not None and result.stdout != program.stdout.encode():
        found.append(f"its output is {result.stdout[:60]!r} and not {program.stdout.encode()[:60]!r}")
    digest = hashlib.sha256(result.stdout).hexdigest()
    if program.stdout_sha256 is not None and digest != program.stdout_sha256:
        found.append(f"its output of {len(result.stdout)} bytes has SHA-256 {digest} and not {program.stdout_sha256}")
    recorded = evaluation["stdout"].get("sha256")
    if recorded != digest:
        found.append(f"the platform recorded SHA-256 {recorded} for output that has {digest}")
    if evaluation["attempt"] != 1:
        found.append(f"it took {evaluation['attempt']} attempts")
    return found


def _overtaken(results: Sequence[Result]) -> list[str]:
    """Name each evaluation that was taken before one of higher priority in the same queue.

    All were queued in one transaction, so at every moment the queue had to give the highest priority that was left.
    """
    queues: defaultdict[str, list[Document]] = defaultdict(list)
    names = {}
    for result in results:
        names[result.evaluation["id"]] = result.program.name
        if result.evaluation.get("provisioning_at"):
            queues[result.evaluation["size_class"]].append(result.evaluation)
    found = []
    for size_class, queue in sorted(queues.items()):
        # Those taken in one claim have the same time, and no order among themselves.
        queue.sort(key=taken_order)
        for first, second in pairwise(queue):
            if second["priority"] > first["priority"]:
                found.append(
                    f"in the {size_class} queue {names[first['id']]} (priority {first['priority']}) was taken before "
                    f"{names[second['id']]} (priority {second['priority']})"
                )
    return found
