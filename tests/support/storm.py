"""A storm: everything that carries an evaluation fails in turn, in an order and for times that a seed decides.

The plan is pure, so that the same seed is the same storm; what it is done to comes in as objects that can be killed and brought
back.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from crucible.broker.topology import queue_name
from crucible.limits import SizeClass
from tests.servers.rabbitmq import Alarm, RabbitCluster, RabbitNode
from tests.support.waits import pass_time


class Blow(StrEnum):
    """What may happen. Each of them happens once in a storm."""

    LEADER_KILLED = "the leader of the small queue is killed"
    SECOND_NODE_KILLED = "a second node is killed"
    THIRD_NODE_KILLED = "the third node is killed"
    MINORITY_CUT_OFF = "one node is cut off from the others"
    MAJORITY_CUT_OFF = "every node is cut off from the others"
    BROKER_STOPPED = "the whole broker is killed"
    REDIS_KILLED = "Redis is killed"
    WORKER_KILLED = "the worker is killed in mid-run"
    RELAY_KILLED = "storage is killed, and the relay with it"
    DISK_ALARM = "a node raises a disk alarm"
    MEMORY_ALARM = "a node raises a memory alarm"


@dataclass(frozen=True)
class Strike:
    """One blow: how long the calm before it is, and how long it lasts, both in seconds."""

    blow: Blow
    calm: float
    lasts: float


def plan(seed: int) -> list[Strike]:
    """Return the storm of a seed: the nodes one after the other, the leader first; all else in any order between."""
    dice = random.Random(seed)
    nodes = [Blow.LEADER_KILLED, Blow.SECOND_NODE_KILLED, Blow.THIRD_NODE_KILLED]
    others = [blow for blow in Blow if blow not in nodes]
    dice.shuffle(others)
    order = [nodes[0]]
    places = sorted(dice.sample(range(len(others) + 1), 2))
    for place, blow in enumerate([*others, None]):
        order += [nodes[1 + number] for number, wanted in enumerate(places) if wanted == place]
        if blow is not None:
            order.append(blow)
    return [Strike(blow, calm=dice.uniform(0.5, 2.0), lasts=_length(blow, dice)) for blow in order]


def _length(blow: Blow, dice: random.Random) -> float:
    # Long enough for the nodes to give each other up, which is what makes a partition: NET_TICK_SECONDS in tests/servers.
    return dice.uniform(9.0, 12.0) if blow in (Blow.MINORITY_CUT_OFF, Blow.MAJORITY_CUT_OFF) else dice.uniform(1.0, 4.0)


class Killable(Protocol):
    """A process that can be killed with SIGKILL and started again over what it left."""

    def kill(self) -> None: ...
    def start(self) -> None: ...


@dataclass
class Scene:
    """What the storm strikes.

    Attributes:
        before: awaited right before each blow, for what it is to find.
    """

    cluster: RabbitCluster
    vhost: str
    redis: Killable
    worker: Killable
    storage: Killable
    before: Callable[[Blow], Awaitable[None]]
    tell: Callable[[str], None] = print

    async def strike(self, strike: Strike) -> None:
        """Deal one blow, let it last, and bring back what it took."""
        await pass_time(strike.calm)
        await self.before(strike.blow)
        began = time.monotonic()
        undo = await asyncio.to_thread(self._deal, strike.blow)
        await pass_time(strike.lasts)
        await asyncio.to_thread(undo)
        await asyncio.to_thread(self.cluster.await_healthy)
        self.tell(f"storm: {strike.blow} for {strike.lasts:.1f} s; all well {time.monotonic() - began:.1f} s after")

    def _deal(self, blow: Blow) -> Callable[[], None]:
        cluster, nodes = self.cluster, self.cluster.nodes
        deals: dict[Blow, Callable[[], Callable[[], None]]] = {
            Blow.LEADER_KILLED: lambda: _killed(cluster.leader_of(queue_name(SizeClass.SMALL), self.vhost)),
            Blow.SECOND_NODE_KILLED: lambda: _killed(nodes[1]),
            Blow.THIRD_NODE_KILLED: lambda: _killed(nodes[2]),
            Blow.MINORITY_CUT_OFF: lambda: self._cut_off(nodes[0]),
            Blow.MAJORITY_CUT_OFF: lambda: self._cut_off(*nodes),
            Blow.BROKER_STOPPED: self._all_killed,
            Blow.REDIS_KILLED: lambda: _killed(self.redis),
            Blow.WORKER_KILLED: lambda: _killed(self.worker),
            Blow.RELAY_KILLED: lambda: _killed(self.storage),
            Blow.DISK_ALARM: lambda: self._alarmed("disk"),
            Blow.MEMORY_ALARM: lambda: self._alarmed("memory"),
        }
        return deals[blow]()

    def _cut_off(self, *nodes: RabbitNode) -> Callable[[], None]:
        # Clients still reach them: the harder case, since nothing tells a client that its node is alone.
        self.cluster.cut_off(*nodes, clients=False)
        return self.cluster.heal

    def _all_killed(self) -> Callable[[], None]:
        for node in self.cluster.nodes:
            node.kill()
        return self.cluster.restore

    def _alarmed(self, alarm: Alarm) -> Callable[[], None]:
        self.cluster.set_alarm(alarm)
        return self.cluster.clear_alarms


def _killed(victim: Killable) -> Callable[[], None]:
    victim.kill()
    return victim.start
