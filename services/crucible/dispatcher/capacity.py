"""What a node has for sandboxes, and who holds how much of it. Pure accounting: it creates and asks nothing.

What is promised is never more than what is there: CPU and memory limits of all live sandboxes together stay within the node's totals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crucible.contracts import CapacityAnswer, Fit, NodeCapacity
from crucible.evaluation import Resources
from crucible.quantity import format_cpu, format_memory

if TYPE_CHECKING:
    from collections.abc import Hashable

    from crucible.evaluation import Resources


class Ledger:
    """The books of one node.

    Args:
        name: the node's name.
        runtime: how it makes sandboxes.
        total: what it has for sandboxes.
    """

    def __init__(self, name: str, runtime: str, total: Resources) -> None:
        self._name = name
        self._runtime = runtime
        self._total = total
        self._held: dict[Hashable, Resources] = {}

    @property
    def free_cpu_millis(self) -> int:
        """CPU that no sandbox holds, millicores."""
        return self._total.cpu_millis - sum(held.cpu_millis for held in self._held.values())

    @property
    def free_memory_bytes(self) -> int:
        """Memory that no sandbox holds, bytes."""
        return self._total.memory_bytes - sum(held.memory_bytes for held in self._held.values())

    def check(self, wanted: Resources) -> CapacityAnswer:
        """Say whether a request has room now, later or never, and why."""
        total = self._total
        if wanted.cpu_millis > total.cpu_millis or wanted.memory_bytes > total.memory_bytes:
            reason = (
                f"asks for {format_cpu(wanted.cpu_millis)} CPU and {format_memory(wanted.memory_bytes)}; "
                f"the largest node has {format_cpu(total.cpu_millis)} CPU and {format_memory(total.memory_bytes)}"
            )
            return CapacityAnswer(fit=Fit.NEVER, reason=reason, largest=total)
        short = []
        if wanted.cpu_millis > self.free_cpu_millis:
            short.append(f"{format_cpu(self.free_cpu_millis)} of {format_cpu(total.cpu_millis)} CPU")
        if wanted.memory_bytes > self.free_memory_bytes:
            short.append(f"{format_memory(self.free_memory_bytes)} of {format_memory(total.memory_bytes)} memory")
        if short:
            reason = f"{' and '.join(short)} free now, held by {len(self._held)} running"
            return CapacityAnswer(fit=Fit.LATER, reason=reason, largest=total)
        return CapacityAnswer(fit=Fit.NOW, largest=total)

    def reserve(self, holder: Hashable, wanted: Resources) -> CapacityAnswer:
        """Take what is wanted if it has room now; the answer says whether it had. A holder that reserves twice holds once."""
        if holder in self._held:
            return CapacityAnswer(fit=Fit.NOW, largest=self._total)
        answer = self.check(wanted)
        if answer.fit is Fit.NOW:
            self._held[holder] = wanted
        return answer

    def release(self, holder: Hashable) -> None:
        """Give back what a holder has; giving back twice is harmless."""
        self._held.pop(holder, None)

    def report(self) -> NodeCapacity:
        """Return the node as it is now."""
        return NodeCapacity(
            name=self._name,
            runtime=self._runtime,
            total=self._total,
            free_cpu_millis=self.free_cpu_millis,
            free_memory_bytes=self.free_memory_bytes,
            sandboxes=len(self._held),
        )
