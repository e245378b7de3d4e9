"""All sandboxes of a cluster, watched by several replicas at once: each sandbox belongs to one of them, and none is ever without.

Jobs and Pods are the only state. Whoever is a member takes the sandboxes that rendezvous hashing gives it, and takes over those of a
member that falls silent; for a moment two may follow one, which storage makes harmless. One of them leads, and compares what
storage believes with what the cluster has.

The monitor service runs it, and where that is not used each dispatcher does; both kinds are members of one group, so that either
may be turned on or off at any time.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from typing import TYPE_CHECKING

from crucible import contracts as c
from crucible import logs, metrics, names
from crucible.kubernetes.api import JOBS, NODES, PODS, ApiError
from crucible.kubernetes.lease import LeaderElection, Lease, Membership
from crucible.kubernetes.reflector import ChangeKind, Reflector
from crucible.resilience import CallFailedError
from crucible.watching.facts import Patience, holds_output, is_collected, sandbox_of
from crucible.watching.follower import Follower, Sighting
from crucible.watching.reconcile import Reconciler

if TYPE_CHECKING:
    from collections.abc import Iterable

    from crucible.clients import StorageClient
    from crucible.health import Health
    from crucible.kubernetes.api import KubernetesApi, Object
    from crucible.kubernetes.reflector import Change
    from crucible.settings import Settings

log = logs.get_logger("watching")

_GROUP = "crucible-watcher"
# A follower that failed (a mistake of ours) is begun anew after this.
_AGAIN_SECONDS = 5.0
_HOUSE_SECONDS = 1.0
# What is followed is held, whatever became of its worker. Storage keeps a lease that has less than half of its length left, so with so
# many looks in one there is time for another replica to take over in between.
_LOOKS_PER_LEASE, _SUSTAIN_FIRST_SECONDS = 6, 1.0
# Windows of a watch last 10 s; a replica that has heard nothing for longer sees the cluster as it was.
_BEHIND_SECONDS = 30.0


def owner_of(sandbox: str, members: Iterable[str]) -> str | None:
    """Return which member a sandbox belongs to: the same for all who know the same members, and kept by most when one comes or goes."""

    def weight(member: str) -> bytes:
        return hashlib.blake2b(f"{member}/{sandbox}".encode(), digest_size=8).digest()

    return max(members, key=weight, default=None)


class Watching:
    """One replica's part in watching. `start` it once; `aclose` hands over to the others.

    Args:
        settings: of the installation.
        storage: where the stories of sandboxes go.
        api: the cluster.
        instance: who we are: unique per start, and a DNS label.
    """

    def __init__(self, settings: Settings, storage: StorageClient, api: KubernetesApi, instance: str) -> None:
        namespace, monitor = settings.kubernetes.namespace, settings.monitor
        self._storage = storage
        self._api = api
        self._namespace = namespace
        self._actor = f"monitor/{instance}"
        self._patience = Patience(
            scheduling=settings.kubernetes.scheduling_seconds, node_lost=settings.kubernetes.node_lost_seconds
        )
        self._jobs = Reflector(api, JOBS, namespace, labels=names.OWN_SELECTOR)
        self._pods = Reflector(api, PODS, namespace, labels=names.OWN_SELECTOR)
        self._nodes = Reflector(api, NODES)
        self._pods_of: dict[str, dict[str, Object]] = defaultdict(dict)
        self._nodes_by_name: dict[str, Object] = {}
        self._members = frozenset({instance.lower()})
        self._sightings: dict[str, Sighting] = {}
        self._followers: dict[str, tuple[Follower, asyncio.Task[None]]] = {}
        # What has become another's is followed on for a lease's length: on a machine that is short of time members come and go, and
        # to begin anew each time would get nothing done. Two who follow one sandbox do no harm.
        self._leaving: dict[str, float] = {}
        self._stay_seconds = monitor.lease_seconds
        # Sandboxes that this replica has seen through, with the Pods that it has let go; for as long as the cluster has any of it.
        self._done: dict[str, frozenset[str]] = {}
        self._ready = False
        self._tasks: list[asyncio.Task[None]] = []
        self._membership = Membership(
            api,
            monitor.lease_namespace,
            label=names.LABEL_WATCHER_LEASE,
            group=_GROUP,
            member=instance.lower(),
            seconds=monitor.lease_seconds,
            on_change=self._note_members,
        )
        leader = Lease(
            api, monitor.lease_namespace, names.LEASE_LEADER, holder=instance.lower(), seconds=monitor.lease_seconds
        )
        self._election = LeaderElection(leader, on_change=lambda leads: metrics.MONITOR_LEADER.set(int(leads)))
        self._reconciler = Reconciler(
            storage,
            api,
            namespace,
            jobs=self._jobs,
            pods=self._pods,
            leads=lambda: self._election.is_leader,
            forget_the_dead=self._membership.forget_the_dead,
            actor=self._actor,
            seconds=monitor.reconcile_seconds,
        )

    async def start(self) -> None:
        """Learn what there is, join the others, and take our share.

        Raises:
            ApiError: the API server refuses us a lease.
        """
        self._nodes.subscribe(self._note_node)
        self._pods.subscribe(self._note_pod)
        self._jobs.subscribe(self._note_job)
        for reflector in self._reflectors:
            reflector.start()
        for reflector in self._reflectors:
            await reflector.synced.wait()
        await self._join()
        self._ready = True
        self._consider_all()
        self._election.start()
        self._tasks = [
            asyncio.create_task(self._reconciler.run(), name="reconcile"),
            asyncio.create_task(self._keep_house(), name="watching-house"),
            asyncio.create_task(self._sustain(), name="watching-leases"),
        ]

    async def _join(self) -> None:
        while True:
            try:
                await self._membership.start()
            except ApiError as error:
                if not error.transient:
                    raise
                log.warning("the API server does not take our lease; trying again", error=str(error))
                await asyncio.sleep(_AGAIN_SECONDS)
            else:
                return

    async def aclose(self) -> None:
        """Let go of everything, for the others to take at once."""
        self._ready = False
        await self._election.aclose()
        for name in list(self._followers):
            self._drop(name)
        await self._membership.aclose()
        for task in self._tasks:
            task.cancel()
        for reflector in self._reflectors:
            await reflector.aclose()

    @property
    def _reflectors(self) -> tuple[Reflector, ...]:
        return self._nodes, self._pods, self._jobs

    def watch(self, health: Health) -> None:
        """Register what tells whether this replica does its part."""
        health.add("cluster", self._cluster_problem)
        health.add("lease", self._lease_problem)

    def _cluster_problem(self) -> str | None:
        if not self._ready:
            return "the cluster's objects are not known yet"
        behind = max(reflector.behind_seconds for reflector in self._reflectors)
        return f"the API server was last heard {behind:.0f} s ago" if behind > _BEHIND_SECONDS else None

    def _lease_problem(self) -> str | None:
        return None if self._membership.present else "the own lease is not held, so the others do not count on this one"

    # -- what changes

    def _note_job(self, change: Change) -> None:
        if name := sandbox_of(change.object):
            self._consider(name)

    def _note_pod(self, change: Change) -> None:
        name = sandbox_of(change.object)
        if name is None:
            return
        uid = change.object["metadata"]["uid"]
        if change.kind is ChangeKind.DELETED:
            self._pods_of[name].pop(uid, None)
        else:
            self._pods_of[name][uid] = change.object
        self._consider(name)

    def _note_node(self, change: Change) -> None:
        name = change.object["metadata"]["name"]
        if change.kind is ChangeKind.DELETED:
            self._nodes_by_name.pop(name, None)
        else:
            self._nodes_by_name[name] = change.object
        # Nodes tell that they are there every few seconds, and sandboxes only care whether they answer.
        if change.old is None or _readiness(change.old) != _readiness(change.object):
            for follower, _ in self._followers.values():
                follower.changed()

    # -- who follows what

    def _note_members(self, members: frozenset[str]) -> None:
        # Nobody at all: the API server answers none of us. What each had stays its own, or all would follow everything.
        self._members = members or self._members
        self._consider_all()

    def _consider_all(self) -> None:
        if self._ready:
            for name in {*self._sandboxes(), *self._followers}:
                self._consider(name)

    def _sandboxes(self) -> set[str]:
        return {name for job in self._jobs.objects.values() if (name := sandbox_of(job))} | set(self._pods_of)

    def _consider(self, name: str) -> None:
        """See what a sandbox is now, and follow it if it is ours and something is left to do."""
        if not self._ready:
            return
        job = self._jobs.objects.get((self._namespace, name))
        pods = list(self._pods_of[name].values())
        sighting = self._sightings.get(name) or Sighting(self._nodes_by_name)
        sighting.put(job, pods)
        mine = owner_of(name, self._members) == self._membership.member
        # The copy may be older than what we did ourselves.
        done = self._done.get(name)
        kept = any(holds_output(pod) and pod["metadata"]["uid"] not in (done or ()) for pod in pods)
        wanted = kept or (done is None and job is not None and not is_collected(job))
        if name in self._followers:
            self._followers[name][0].changed()
            if mine:
                self._leaving.pop(name, None)
            elif name not in self._leaving:
                self._leaving[name] = asyncio.get_running_loop().time() + self._stay_seconds
        elif mine and wanted:
            self._sightings[name] = sighting
            self._follow(name, sighting)
        if not pods:
            del self._pods_of[name]
            if job is None:
                self._done.pop(name, None)

    def _follow(self, name: str, sighting: Sighting) -> None:
        follower = Follower(
            name,
            sighting,
            api=self._api,
            namespace=self._namespace,
            storage=self._storage,
            actor=self._actor,
            patience=self._patience,
        )
        task = asyncio.create_task(follower.run(), name=f"follow-{name}")
        self._followers[name] = follower, task
        task.add_done_callback(lambda done: self._followed(name, done))

    def _followed(self, name: str, task: asyncio.Task[None]) -> None:
        if self._followers.get(name, (None, None))[1] is not task:
            return
        del self._followers[name]
        self._leaving.pop(name, None)
        sighting = self._sightings.pop(name)
        if task.cancelled():
            return
        if error := task.exception():
            log.error("following a sandbox failed; trying again", sandbox=name, exc_info=error)
            asyncio.get_running_loop().call_later(_AGAIN_SECONDS, self._consider, name)
        elif sighting.job or sighting.pods:
            self._done[name] = frozenset(pod["metadata"]["uid"] for pod in sighting.pods)

    def _drop(self, name: str) -> None:
        _, task = self._followers.pop(name)
        self._sightings.pop(name, None)
        self._leaving.pop(name, None)
        task.cancel()

    def _leave(self) -> None:
        """Let go of what has been another's for a while."""
        now = asyncio.get_running_loop().time()
        for name in [name for name, until in self._leaving.items() if until <= now]:
            self._drop(name)

    async def _keep_house(self) -> None:
        while True:
            self._leave()
            metrics.MONITOR_SANDBOXES.set(len(self._followers))
            for resource, reflector in zip((NODES, PODS, JOBS), self._reflectors, strict=True):
                metrics.MONITOR_WATCH_LAG.labels(resource.plural).set(reflector.behind_seconds)
            await asyncio.sleep(_HOUSE_SECONDS)

    async def _sustain(self) -> None:
        """Keep the leases of what is followed: each doubt about a sandbox is settled in its time, by its follower."""
        pause = _SUSTAIN_FIRST_SECONDS
        while True:
            await asyncio.sleep(pause)
            watched = [
                c.Held(evaluation_id=named[0], attempt=named[1])
                for name in self._followers
                if (named := names.parse_sandbox_name(name))
            ]
            try:
                answer = await self._storage.sustain(c.Sustaining(watched=watched))
            except CallFailedError as error:
                log.warning("leases could not be kept; trying again", error=str(error))
                pause = _SUSTAIN_FIRST_SECONDS
                continue
            metrics.MONITOR_SUSTAINED.inc(answer.leases)
            pause = answer.lease_seconds / _LOOKS_PER_LEASE


def _readiness(node: Object) -> object:
    conditions = node.get("status", {}).get("conditions") or []
    return [(each.get("status"), each.get("lastTransitionTime")) for each in conditions if each["type"] == "Ready"]
