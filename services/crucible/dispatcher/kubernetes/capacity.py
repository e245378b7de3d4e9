"""Whether the cluster has room for a sandbox: a view that follows its nodes, evaluation Pods and quotas, and asks nothing.

The scheduler and the quota have the last word, and another replica may take what this one saw as free. So this need not be exact: it
keeps Pods that could not start from piling up, says what could never start, and puts in words what is in the way. Sandboxes that
were just asked for count from that moment, since their Pods take a while to appear.

Starting a sandbox takes a node far more than most evaluations do afterwards. A node on which too many start at once is missed by
its control plane and loses all that it runs, so only so many start at a time; the rest have room, and wait for their turn.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from crucible import names
from crucible.contracts import CapacityAnswer, CapacityReport, Fit, NodeCapacity
from crucible.dispatcher.kubernetes.manifest import Demand, demand_of
from crucible.evaluation import Resources
from crucible.kubernetes.reflector import Change, ChangeKind, key_of
from crucible.quantity import QuantityError, format_cpu, format_memory, parse_cpu, parse_memory
from crucible.watching.facts import sandbox_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from crucible.kubernetes.api import Object
    from crucible.limits import Limits
    from crucible.settings import KubernetesSettings

RUNTIME = "kubernetes"
# A Pod appears within seconds of its Job. Later than this it has been refused, or its Job is gone, and the room is free again.
_RESERVED_SECONDS = 60.0
# A node that went away may come back, or another of its kind; until then what only it could hold waits.
_GONE_SECONDS = 1800.0
# A Pod that has not come up by now is stuck (`watching.facts` gives it up about then), and is in nobody's way.
_STARTING_SECONDS = 60.0
# What a container that is on its way up waits for; every other reason is trouble, which takes nothing of its node.
_COMING_UP = frozenset({None, "ContainerCreating", "PodInitializing"})
ENDED_PHASES = frozenset({"Succeeded", "Failed"})


class Amounts(NamedTuple):
    """What a node has, or a Pod holds."""

    cpu_millis: int
    memory_bytes: int
    storage_bytes: int
    pods: int

    def __add__(self, other: tuple[int, ...]) -> Amounts:  # type: ignore[override]
        return Amounts(*(mine + its for mine, its in zip(self, other, strict=True)))

    def __sub__(self, other: tuple[int, ...]) -> Amounts:
        return Amounts(*(mine - its for mine, its in zip(self, other, strict=True)))

    def covers(self, wanted: Amounts) -> bool:
        """Whether nothing of what is wanted is missing."""
        return all(mine >= its for mine, its in zip(self, wanted, strict=True))


NOTHING = Amounts(0, 0, 0, 0)


def _amount(text: str, parse: Callable[[str], int]) -> int:
    try:
        return parse(text)
    except QuantityError:  # "0", which no request may ask for
        return 0


def amounts_of(quantities: Object, pods: int = 0) -> Amounts:
    """Return a Kubernetes resource list (`{"cpu": "2", "memory": "4Gi", ...}`) in numbers; what it does not name is 0."""
    return Amounts(
        _amount(quantities.get("cpu", "0"), parse_cpu),
        _amount(quantities.get("memory", "0"), parse_memory),
        _amount(quantities.get("ephemeral-storage", "0"), parse_memory),
        pods or _amount(quantities.get("pods", "0"), parse_memory),
    )


def held_by(pod: Object) -> Amounts:
    """Return what a Pod takes of its node, as the scheduler counts it."""
    spec = pod["spec"]
    held = amounts_of(spec.get("overhead") or {}, pods=1)
    for container in spec["containers"]:
        held += amounts_of((container.get("resources") or {}).get("requests") or {})
    return held


def is_starting(pod: Object) -> bool:
    """Whether a Pod's sandbox is being made: a node has been or may be found for it, and its container has not begun to run."""
    status = pod.get("status") or {}
    if status.get("phase") != "Pending" or pod["metadata"].get("deletionTimestamp"):
        return False
    if any(each["type"] == "PodScheduled" and each["status"] == "False" for each in status.get("conditions") or []):
        return False
    states = [each.get("state") or {} for each in status.get("containerStatuses") or []]
    return all(
        not state.keys() - {"waiting"} and (state.get("waiting") or {}).get("reason") in _COMING_UP for state in states
    )


# --- nodes and quotas -----------------------------------------------------------------------------------------------------


def obstacle_of(node: Object) -> str | None:
    """Say why a node takes no sandboxes now, or None."""
    if node["metadata"].get("labels", {}).get(names.LABEL_GVISOR) != names.GVISOR_READY:
        return "gVisor is not ready"
    if node["spec"].get("unschedulable"):
        return "cordoned"
    for taint in node["spec"].get("taints") or []:
        if taint["effect"] != "PreferNoSchedule" and taint["key"] != names.TAINT_SANDBOX:
            return f"tainted {taint['key']}"
    conditions = {each["type"]: each["status"] for each in node["status"].get("conditions") or []}
    return None if conditions.get("Ready") == "True" else "not ready"


def _quota_demands(demand: Demand) -> Iterator[tuple[str, Callable[[str], int], int]]:
    """Yield each name under which a quota may count a sandbox: how its quantities are read, and how much this one takes."""
    for name in ("pods", "count/pods", "count/jobs.batch"):
        yield name, parse_memory, 1
    for name in ("configmaps", "count/configmaps"):
        yield name, parse_memory, demand.config_maps
    for name in ("cpu", "requests.cpu"):
        yield name, parse_cpu, demand.cpu_millis
    yield "limits.cpu", parse_cpu, demand.cpu_limit_millis
    for name in ("memory", "requests.memory", "limits.memory"):
        yield name, parse_memory, demand.memory_bytes
    for name in ("ephemeral-storage", "requests.ephemeral-storage", "limits.ephemeral-storage"):
        yield name, parse_memory, demand.storage_bytes


class QuotaCheck(NamedTuple):
    """What a quota says of a request: in words if there is no room, now or ever."""

    never: str | None = None
    later: str | None = None


def check_quota(quota: Object, demand: Demand, asked_for: Iterable[Demand]) -> QuotaCheck:
    """Hold a request against a quota. `asked_for`: sandboxes that the quota cannot have counted yet."""
    status, name = quota.get("status") or {}, quota["metadata"]["name"]
    hard, used = status.get("hard") or {}, status.get("used") or {}
    earlier = [dict(_amounts_by_name(each)) for each in asked_for]
    later = None
    for resource, parse, wanted in _quota_demands(demand):
        if resource not in hard:
            continue
        limit, taken = _amount(hard[resource], parse), _amount(used.get(resource, "0"), parse)
        if wanted > limit:
            return QuotaCheck(never=f"the quota {name} allows {hard[resource]} {resource} in all")
        if taken + sum(each[resource] for each in earlier) + wanted > limit:
            later = later or f"the quota {name} is used up: {used.get(resource, '0')} of {hard[resource]} {resource}"
    return QuotaCheck(later=later)


def _amounts_by_name(demand: Demand) -> Iterator[tuple[str, int]]:
    return ((name, amount) for name, _, amount in _quota_demands(demand))


# --- the view -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Node:
    name: str
    total: Amounts
    obstacle: str | None


@dataclass(frozen=True, slots=True)
class _Held:
    """A Pod that holds room; `node` is None until the scheduler has chosen one."""

    amounts: Amounts
    node: str | None
    starting_until: float
    """Until when it counts as starting; 0 once it has started."""


@dataclass(frozen=True, slots=True)
class _Reserved:
    demand: Demand
    until: float


class ClusterCapacity:
    """Nodes, quotas, and what holds how much of them, fed by changes.

    Args:
        settings: overhead of a sandbox, and what of each node is not for evaluations.
        limits: what a sandbox may use.
        clock: monotonic seconds.
    """

    def __init__(
        self, settings: KubernetesSettings, limits: Limits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._limits = limits
        self._clock = clock
        self._nodes: dict[str, _Node] = {}
        self._gone: dict[str, tuple[float, Amounts]] = {}
        self._pods: dict[str, _Held] = {}
        self._quotas: dict[str, Object] = {}
        self._reserved: dict[str, _Reserved] = {}

    # -- what happens in the cluster

    def on_node(self, change: Change) -> None:
        """Take in a change of a sandbox node."""
        _, name = key_of(change.object)
        known = self._nodes.pop(name, None)
        if change.kind is ChangeKind.DELETED:
            if known:
                self._gone[name] = (self._clock() + _GONE_SECONDS, known.total)
            return
        node = change.object
        mine = (self._settings.reserve_cpu_millis, self._settings.reserve_memory_bytes, 0, 0)
        total = amounts_of(node["status"].get("allocatable") or {}) - mine
        self._nodes[name] = _Node(name, total, obstacle_of(node))
        self._gone.pop(name, None)

    def on_pod(self, change: Change) -> None:
        """Take in a change of an evaluation's Pod."""
        pod = change.object
        _, name = key_of(pod)
        if change.kind is ChangeKind.DELETED or pod.get("status", {}).get("phase") in ENDED_PHASES:
            self._pods.pop(name, None)
        else:
            self._pods[name] = _Held(held_by(pod), pod["spec"].get("nodeName"), self._starting_until(name, pod))
        if sandbox := sandbox_of(pod):
            self._reserved.pop(sandbox, None)

    def _starting_until(self, name: str, pod: Object) -> float:
        if not is_starting(pod):
            return 0.0
        known = self._pods.get(name)
        return known.starting_until if known else self._clock() + _STARTING_SECONDS

    def on_quota(self, change: Change) -> None:
        """Take in a change of a quota of the namespace."""
        _, name = key_of(change.object)
        spec = change.object["spec"]
        if change.kind is ChangeKind.DELETED or spec.get("scopes") or spec.get("scopeSelector"):
            self._quotas.pop(name, None)
        else:
            self._quotas[name] = change.object

    # -- what others ask

    @property
    def sandboxes(self) -> int:
        """Sandboxes that hold room now."""
        return len(self._pods) + len(self._reserved)

    @property
    def starting(self) -> int:
        """Sandboxes that are being started now, those included that were just asked for."""
        now = self._clock()
        reserved = sum(each.until > now for each in self._reserved.values())
        return reserved + sum(held.starting_until > now for held in self._pods.values())

    @property
    def another_may_start(self) -> bool:
        """Whether fewer are starting than may; where no node takes sandboxes, that is what is in the way and not this."""
        nodes = self._open_nodes()
        return not nodes or self.starting < nodes * self._settings.starting_per_node

    def check(self, wanted: Resources, *, config_maps: int = 1) -> CapacityAnswer:
        """Say whether a request has room now, later or never, and why."""
        demand = demand_of(wanted, self._settings, self._limits, config_maps=config_maps)
        self._forget_old()
        fit, reason = self._fit(wanted, demand)
        return CapacityAnswer(fit=fit, reason=reason, largest=self._largest())

    def reserve(self, sandbox: str, wanted: Resources, *, config_maps: int = 1) -> CapacityAnswer:
        """Take what is wanted if it has room now, until its Pod appears; the answer says whether it had. Twice is once."""
        if sandbox in self._reserved:
            return CapacityAnswer(fit=Fit.NOW, largest=self._largest())
        answer = self.check(wanted, config_maps=config_maps)
        if answer.fit is Fit.NOW:
            demand = demand_of(wanted, self._settings, self._limits, config_maps=config_maps)
            self._reserved[sandbox] = _Reserved(demand, self._clock() + _RESERVED_SECONDS)
        return answer

    def release(self, sandbox: str) -> None:
        """Give back what was reserved; giving back twice is harmless."""
        self._reserved.pop(sandbox, None)

    def report(self) -> CapacityReport:
        """Return the nodes as they are now; one that takes no sandboxes has nothing free."""
        self._forget_old()
        free = self._free()
        return CapacityReport(nodes=[self._report(node, free) for _, node in sorted(self._nodes.items())])

    def _report(self, node: _Node, free: dict[str, Amounts]) -> NodeCapacity:
        left = free.get(node.name, NOTHING)
        return NodeCapacity(
            name=node.name,
            runtime=RUNTIME,
            total=Resources(cpu_millis=max(1, node.total.cpu_millis), memory_bytes=max(1, node.total.memory_bytes)),
            free_cpu_millis=max(0, left.cpu_millis),
            free_memory_bytes=max(0, left.memory_bytes),
            sandboxes=sum(held.node == node.name for held in self._pods.values()),
        )

    # -- how it is decided

    def _forget_old(self) -> None:
        now = self._clock()
        self._reserved = {name: each for name, each in self._reserved.items() if each.until > now}
        self._gone = {name: each for name, each in self._gone.items() if each[0] > now}

    def _fit(self, wanted: Resources, demand: Demand) -> tuple[Fit, str | None]:
        amounts = _amounts(demand)
        if never := self._never(wanted, amounts):
            return Fit.NEVER, never
        asked_for = [each.demand for each in self._reserved.values()]
        checks = [check_quota(quota, demand, asked_for) for quota in self._quotas.values()]
        for check in checks:
            if check.never:
                return Fit.NEVER, f"asks for {_words(wanted)}; {check.never}"
        free = self._free()
        if not any(left.covers(amounts) for left in free.values()):
            return Fit.LATER, self._why_not_now(free)
        later = next((check.later for check in checks if check.later), None)
        if not later and not self.another_may_start:
            later = f"{self.starting} sandboxes are starting, as many as {self._open_nodes()} nodes start at a time"
        return (Fit.LATER, later) if later else (Fit.NOW, None)

    def _open_nodes(self) -> int:
        return sum(not node.obstacle for node in self._nodes.values())

    def _never(self, wanted: Resources, amounts: Amounts) -> str | None:
        sizes = self._sizes()
        if not sizes or any(size.covers(amounts) for size in sizes):
            return None
        largest = max(sizes, key=lambda size: (size.memory_bytes, size.cpu_millis))
        room = f"{format_cpu(largest.cpu_millis)} CPU, {format_memory(largest.memory_bytes)} and "
        room += f"{format_memory(largest.storage_bytes)} of disk"
        return f"asks for {_words(wanted)}, which with its sandbox no node can hold; the largest has {room}"

    def _sizes(self) -> list[Amounts]:
        return [node.total for node in self._nodes.values()] + [size for _, size in self._gone.values()]

    def _largest(self) -> Resources:
        """Return the largest request that a node could take; without any node, what the limits allow."""
        sizes = self._sizes()
        if not sizes:
            return Resources(cpu_millis=self._limits.cpu_max_millis, memory_bytes=self._limits.memory_max_bytes)
        largest = max(sizes, key=lambda size: (size.memory_bytes, size.cpu_millis))
        cpu = (largest.cpu_millis - self._settings.overhead_cpu_millis) * 100 // self._settings.cpu_request_percent
        memory = largest.memory_bytes - self._settings.overhead_memory_bytes
        return Resources(cpu_millis=max(1, cpu), memory_bytes=max(1, memory))

    def _free(self) -> dict[str, Amounts]:
        """Return what is free on each node that takes sandboxes, once those without a node have got one, the largest first."""
        free = {node.name: node.total for node in self._nodes.values() if not node.obstacle}
        homeless = [_amounts(each.demand) for each in self._reserved.values()]
        for held in self._pods.values():
            if held.node is None:
                homeless.append(held.amounts)
            elif held.node in free:
                free[held.node] -= held.amounts
        for amounts in sorted(homeless, key=lambda each: each.memory_bytes, reverse=True):
            places = [name for name, left in free.items() if left.covers(amounts)]
            if places:
                # As the scheduler prefers it: where most is left.
                free[max(places, key=lambda name: free[name].memory_bytes)] -= amounts
        return free

    def _why_not_now(self, free: dict[str, Amounts]) -> str:
        if not free:
            obstacles = ", ".join(f"{node.name}: {node.obstacle}" for _, node in sorted(self._nodes.items()))
            return f"no node takes sandboxes now ({obstacles})" if obstacles else "there is no node for sandboxes now"
        most = max(free.values(), key=lambda left: (left.memory_bytes, left.cpu_millis))
        left = f"{format_cpu(max(0, most.cpu_millis))} CPU and {format_memory(max(0, most.memory_bytes))}"
        return f"{left} free now on the emptiest of {len(free)} nodes; {self.sandboxes} sandboxes hold the rest"


def _amounts(demand: Demand) -> Amounts:
    return Amounts(demand.cpu_millis, demand.memory_bytes, demand.storage_bytes, 1)


def _words(wanted: Resources) -> str:
    return f"{format_cpu(wanted.cpu_millis)} CPU and {format_memory(wanted.memory_bytes)}"
