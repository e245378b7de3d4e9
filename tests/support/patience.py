"""How long a test that waits for evaluations is patient: worked out from what the cluster can hold, and from what is seen to happen.

A fixed time limit is wrong twice: on a small cluster it fails a test whose work only had to queue, and on a large one it hides for
minutes that nothing moves. Four things decide instead:

- quota: so many evaluations fit at once, so the rest come in waves, each of which takes a while;
- progress: while evaluations go on ending, the wait goes on past its budget, up to a limit;
- calibration: where one trivial evaluation takes longer here than it should, everything does;
- profile: how a cluster of this size behaves when it is full (`CLUSTER_PROFILE`, by default judged by its memory).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crucible.quantity import GIB, MIB, parse_memory

log = logging.getLogger("tests.patience")

PROFILE_VARIABLE = "CLUSTER_PROFILE"
AUTO = "auto"

# What one evaluation asks for unless told, and how long a wave of them takes on a machine that is not in a hurry.
EVALUATION_BYTES = 512 * MIB
WAVE_SECONDS = 10.0
MARGIN_SECONDS = 10.0
# The budget where nothing is known of the cluster.
FALLBACK_SECONDS = 60.0
# Something must have ended within this time for the wait to outlive its budget.
PROGRESS_SECONDS = 10.0
# No wait outlives this, whatever moves.
LIMIT_SECONDS = 600.0
# What a trivial evaluation takes where all is well, and how much slower than that a cluster may be before patience stops growing.
BASELINE_SECONDS = 3.0
MOST_SLOWNESS = 3.0


@dataclass(frozen=True)
class ClusterProfile:
    """How a cluster of some size behaves: times are multiplied by `factor`, and so many evaluations run well together."""

    name: str
    factor: float
    concurrency: int


CONSTRAINED = ClusterProfile("constrained", 2.0, 5)
STANDARD = ClusterProfile("standard", 1.0, 10)
POWERFUL = ClusterProfile("powerful", 0.5, 20)
PROFILES = {profile.name: profile for profile in (CONSTRAINED, STANDARD, POWERFUL)}
CONSTRAINED_BELOW_BYTES = 8 * GIB
POWERFUL_FROM_BYTES = 32 * GIB


def profile_for(memory_bytes: int | None, chosen: str = AUTO) -> ClusterProfile:
    """Return the profile of this name, or for `auto` the one of a cluster with so much memory.

    Raises:
        LookupError: there is no profile of this name.
    """
    if chosen != AUTO:
        try:
            return PROFILES[chosen]
        except KeyError:
            raise LookupError(f"{PROFILE_VARIABLE}={chosen} is none of: {AUTO}, {', '.join(PROFILES)}") from None
    if memory_bytes is None:
        return STANDARD
    if memory_bytes < CONSTRAINED_BELOW_BYTES:
        return CONSTRAINED
    return POWERFUL if memory_bytes >= POWERFUL_FROM_BYTES else STANDARD


def memory_of_nodes(quantities: Sequence[str]) -> int:
    """Add up the memory of nodes as Kubernetes writes it, whatever the units: `["7936Mi", "16Gi", "4017152Ki"]`."""
    return sum(parse_memory(quantity) for quantity in quantities)


def free_in_quota(status: Mapping[str, Any], resource: str = "limits.memory") -> int | None:
    """Return the bytes that a ResourceQuota's status leaves of a resource; None where it does not limit that resource."""
    hard = status.get("hard", {}).get(resource)
    if hard is None:
        return None
    # Kubernetes writes nothing used as "0", which is no quantity that a request may ask for.
    used = status.get("used", {}).get(resource, "0")
    return max(0, (0 if hard == "0" else parse_memory(hard)) - (0 if used == "0" else parse_memory(used)))


@dataclass(frozen=True)
class Cluster:
    """What is known of where the evaluations run, bytes; None is not known."""

    memory_bytes: int | None = None
    free_bytes: int | None = None

    @classmethod
    def from_capacity(cls, capacity: Mapping[str, Any]) -> Cluster:
        """Read the API's answer to `GET /v1/capacity`."""
        nodes = capacity["nodes"]
        if not nodes:
            return cls()
        return cls(
            memory_bytes=memory_of_nodes([node["total"]["memory_limit"] for node in nodes]),
            free_bytes=sum(node["free"]["memory_limit_bytes"] for node in nodes),
        )


class Patience:
    """Decides when a wait has lasted long enough. One object serves one wait: `begin`, then `moved` and `left` as it goes on."""

    def __init__(
        self,
        cluster: Cluster | None = None,
        *,
        evaluation_bytes: int = EVALUATION_BYTES,
        baseline_seconds: float | None = None,
        profile: str | None = None,
        environ: Mapping[str, str] = os.environ,
        limit_seconds: float = LIMIT_SECONDS,
    ) -> None:
        """Judge a cluster.

        Args:
            cluster: what is known of it.
            evaluation_bytes: what each of the evaluations asks for.
            baseline_seconds: what a trivial evaluation took there just now; None where nobody measured.
            profile: name of the profile; by default what `CLUSTER_PROFILE` says, or `auto`.
            environ: where that variable is looked up.
            limit_seconds: no wait outlives this.
        """
        self._cluster = cluster or Cluster()
        self._evaluation_bytes = evaluation_bytes
        self.profile = profile_for(self._cluster.memory_bytes, profile or environ.get(PROFILE_VARIABLE, AUTO))
        self.slowness = (
            1.0 if baseline_seconds is None else min(MOST_SLOWNESS, max(1.0, baseline_seconds / BASELINE_SECONDS))
        )
        self._limit = limit_seconds
        self._started = self._moved = 0.0
        self._budget = 0.0

    def budget(self, count: int) -> float:
        """Return how many seconds so many evaluations may take, before anything is known of how they do."""
        factor = self.profile.factor * self.slowness
        if self._cluster.free_bytes is None:
            return min(self._limit, FALLBACK_SECONDS * factor)
        at_once = min(self.profile.concurrency, max(1, self._cluster.free_bytes // self._evaluation_bytes))
        return min(self._limit, (math.ceil(count / at_once) * WAVE_SECONDS + MARGIN_SECONDS) * factor)

    @property
    def progress_seconds(self) -> float:
        """How long after the last sign of progress the wait goes on once its budget is spent."""
        return PROGRESS_SECONDS * max(1.0, self.profile.factor * self.slowness)

    def begin(self, count: int, now: float) -> None:
        """Start the clock for so many evaluations."""
        self._started = self._moved = now
        self._budget = self.budget(count)
        log.info("%s", self.explain(count))

    def moved(self, now: float) -> None:
        """Note that something happened to one of the evaluations."""
        self._moved = now

    def left(self, now: float) -> float:
        """Return the seconds until the wait is over if nothing more happens; not positive once it is."""
        until = max(self._started + self._budget, self._moved + self.progress_seconds)
        return min(until, self._started + self._limit) - now

    def explain(self, count: int) -> str:
        """Say how the budget comes about."""
        free = self._cluster.free_bytes
        room = "unknown room" if free is None else f"room for {max(1, free // self._evaluation_bytes)}"
        return (
            f"waiting {self.budget(count):.0f} s for {count} evaluations: {room}, profile {self.profile.name} "
            f"(x{self.profile.factor:g}, {self.profile.concurrency} at once), slowness x{self.slowness:.2f}; "
            f"longer while something ends every {self.progress_seconds:.0f} s, never beyond {self._limit:.0f} s"
        )


class FixedPatience(Patience):
    """So many seconds and no more, whatever happens: for a single evaluation on a machine that the test knows."""

    def __init__(self, seconds: float) -> None:
        super().__init__(environ={}, limit_seconds=seconds)
        self._seconds = seconds

    def budget(self, count: int) -> float:
        """Return the seconds, however many evaluations there are."""
        return self._seconds

    @property
    def progress_seconds(self) -> float:
        """Progress changes nothing."""
        return 0.0

    def explain(self, count: int) -> str:
        """Say how the budget comes about."""
        return f"waiting {self._seconds:.0f} s for {count} evaluations, as the test says"
