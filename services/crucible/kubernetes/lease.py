"""Leases: who leads, and who is there.

A holder is judged by whether its lease still changes, as seen on this process's own monotonic clock; two machines' wall clocks are
never compared. A holder that cannot renew gives up before anyone else may take over.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from crucible import logs
from crucible.kubernetes.api import LEASES, ApiError
from crucible.kubernetes.reflector import Change, ChangeKind, Reflector

if TYPE_CHECKING:
    from collections.abc import Callable

    from crucible.kubernetes.api import KubernetesApi, Object

log = logs.get_logger("lease")

# Of the lease's length: how often it is renewed, and after how long without success its holder stops to trust it.
_RENEW_SHARE = 1 / 3
_GIVE_UP_SHARE = 2 / 3
# A lease that is free and that we did not get is asked for again so much later.
_AGAIN_SECONDS = 0.2
# Leases of members that have been silent for so many lengths are deleted by whoever leads.
_FORGET_LENGTHS = 10


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Lease:
    """One lease that one holder at a time may have.

    Args:
        api: where it is kept.
        namespace: of the lease.
        name: of the lease.
        holder: who we are; unique per start.
        seconds: how long it lasts without being renewed.
        labels: labels of the lease object.
    """

    def __init__(
        self,
        api: KubernetesApi,
        namespace: str,
        name: str,
        *,
        holder: str,
        seconds: float,
        labels: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        self.holder = holder
        self.seconds = seconds
        self._api = api
        self._namespace = namespace
        self._labels = labels or {}
        self._held_until = float("-inf")
        # As last read or written, and since when it has been so.
        self._known: Object | None = None
        self._seen: tuple[object, ...] | None = None
        self._seen_at = 0.0

    @property
    def held(self) -> bool:
        """Whether it is ours beyond doubt: renewed recently enough that nobody else may have taken it."""
        return time.monotonic() < self._held_until

    async def try_hold(self) -> bool:
        """Acquire or renew it if we may.

        Raises:
            ApiError: the API server refused or did not answer; what was held stays held until it has run out.
        """
        # What has changed since is refused, so what is known need not be read again: on a busy cluster each question costs seconds.
        if self._known is not None and self._is_free(self._known) and await self._take(self._known, time.monotonic()):
            return True
        asked = time.monotonic()
        try:
            found = await self._api.get(LEASES, self.name, self._namespace)
        except ApiError as error:
            if not error.not_found:
                raise
            return await self._take(None, asked)
        self._note(found)
        if self._is_free(found):
            return await self._take(found, asked)
        self._held_until = float("-inf")
        return False

    def free_in(self) -> float:
        """Return in how many seconds we may take it if its holder stays silent: infinite where that is not known."""
        if self._known is None or self.held:
            return float("inf")
        if self._is_free(self._known):
            return 0.0
        return max(0.0, self._seen_at + self._length(self._known) - time.monotonic())

    def _note(self, found: Object) -> None:
        spec = found["spec"]
        self._known = found
        seen = (spec.get("holderIdentity"), spec.get("renewTime"), spec.get("leaseTransitions"))
        if seen != self._seen:
            self._seen, self._seen_at = seen, time.monotonic()

    def _length(self, found: Object) -> float:
        return float(found["spec"].get("leaseDurationSeconds") or self.seconds)

    def _is_free(self, found: Object) -> bool:
        if found["spec"].get("holderIdentity") in ("", None, self.holder):
            return True
        return time.monotonic() - self._seen_at > self._length(found)

    async def _take(self, found: Object | None, asked: float) -> bool:
        spec = (found or {}).get("spec", {})
        changes = spec.get("leaseTransitions") or 0
        if found is not None and spec.get("holderIdentity") != self.holder:
            changes += 1
        wanted = {
            "holderIdentity": self.holder,
            # The API has whole seconds; the longer one is safe.
            "leaseDurationSeconds": max(1, round(self.seconds + 0.49)),
            "renewTime": _now(),
            "leaseTransitions": changes,
        }
        if spec.get("holderIdentity") != self.holder:
            wanted["acquireTime"] = wanted["renewTime"]
        try:
            if found is None:
                body = {
                    "apiVersion": LEASES.api_version,
                    "kind": LEASES.kind,
                    "metadata": {"name": self.name, "labels": self._labels},
                    "spec": wanted,
                }
                taken = await self._api.create(LEASES, body, self._namespace)
            else:
                metadata = {"resourceVersion": found["metadata"]["resourceVersion"], "labels": self._labels}
                change = {"metadata": metadata, "spec": wanted}
                taken = await self._api.patch(LEASES, self.name, change, self._namespace)
        except ApiError as error:
            if error.status != 409 and not error.not_found:
                raise
            # Someone was faster, or has deleted it.
            self._held_until, self._known = float("-inf"), None
            return False
        self._note(taken)
        self._held_until = asked + self.seconds * _GIVE_UP_SHARE
        return True

    async def release(self) -> None:
        """Let someone else have it at once. Failing to say so is harmless: it runs out."""
        if not self.held:
            return
        self._held_until = float("-inf")
        with contextlib.suppress(ApiError):
            found = await self._api.get(LEASES, self.name, self._namespace)
            if found["spec"].get("holderIdentity") == self.holder:
                metadata = {"resourceVersion": found["metadata"]["resourceVersion"]}
                patch = {"metadata": metadata, "spec": {"holderIdentity": "", "renewTime": _now()}}
                await self._api.patch(LEASES, self.name, patch, self._namespace)

    async def remove(self) -> None:
        """Delete the lease, where it is one that nobody else will ever want."""
        self._held_until = float("-inf")
        with contextlib.suppress(ApiError):
            await self._api.delete(LEASES, self.name, self._namespace)


class LeaderElection:
    """One of several replicas leads. `is_leader` may be asked at any time, and is never true in two of them.

    Args:
        lease: what they compete for.
        on_change: told when this replica begins or ceases to lead.
    """

    def __init__(self, lease: Lease, on_change: Callable[[bool], None] = lambda _: None) -> None:
        self._lease = lease
        self._on_change = on_change
        self._told = False
        self._task: asyncio.Task[None] | None = None

    @property
    def is_leader(self) -> bool:
        """Whether this replica leads now."""
        return self._lease.held

    def start(self) -> None:
        """Begin to compete."""
        self._task = asyncio.create_task(self._run(), name="leader-election")

    async def aclose(self) -> None:
        """Compete no more, and hand over at once."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._lease.release()
        self._tell()

    async def _run(self) -> None:
        interval = self._lease.seconds * _RENEW_SHARE
        while True:
            pause = interval
            try:
                # An API server that is slow must not keep everyone from leading: what is held counts from when it was asked for.
                async with asyncio.timeout(self._lease.seconds):
                    await self._lease.try_hold()
                # A silent leader's lease is taken when it runs out, and not when we would have looked again.
                pause = min(interval, max(self._lease.free_in(), _AGAIN_SECONDS))
            except (ApiError, TimeoutError) as error:
                log.warning(
                    "the leader's lease could not be renewed", lease=self._lease.name, error=str(error) or "no answer"
                )
            self._tell()
            await asyncio.sleep(pause)
            self._tell()

    def _tell(self) -> None:
        if self.is_leader != self._told:
            self._told = not self._told
            log.info("leading" if self._told else "leading no more", lease=self._lease.name, holder=self._lease.holder)
            self._on_change(self._told)


class Membership:
    """Which replicas are there: each keeps a lease of its own, and sees those of the others.

    Args:
        api: where the leases are kept.
        namespace: of the leases.
        label: label that marks them all; its value is the group.
        group: which replicas belong together.
        member: who we are; unique per start, and a DNS label.
        seconds: a member silent for so long is gone.
        on_change: told the new members whenever they change.
    """

    def __init__(
        self,
        api: KubernetesApi,
        namespace: str,
        *,
        label: str,
        group: str,
        member: str,
        seconds: float,
        on_change: Callable[[frozenset[str]], None],
    ) -> None:
        self.member = member
        self.members: frozenset[str] = frozenset()
        self._api = api
        self._namespace = namespace
        self._group = group
        self._seconds = seconds
        self._on_change = on_change
        self._lease = Lease(api, namespace, f"{group}-{member}", holder=member, seconds=seconds, labels={label: group})
        self._changed_at: dict[str, float] = {}
        self._leases = Reflector(api, LEASES, namespace, labels=f"{label}={group}")
        self._leases.subscribe(self._note)
        self._task: asyncio.Task[None] | None = None

    @property
    def present(self) -> bool:
        """Whether the others still count on us: our own lease has been renewed in time."""
        return self._lease.held

    async def start(self) -> None:
        """Join. Returns once we are a member and know the others.

        Raises:
            ApiError: the lease was refused.
        """
        await self._lease.try_hold()
        self._leases.start()
        await self._leases.synced.wait()
        self._judge()
        self._task = asyncio.create_task(self._run(), name="membership")

    async def aclose(self) -> None:
        """Leave; the others take over at once."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._leases.aclose()
        await self._lease.remove()

    async def forget_the_dead(self) -> None:
        """Delete leases of members long gone. For the leader."""
        oldest = time.monotonic() - self._seconds * _FORGET_LENGTHS
        for (_, name), lease in list(self._leases.objects.items()):
            if (
                self._changed_at.get(name, time.monotonic()) < oldest
                and lease["spec"].get("holderIdentity") != self.member
            ):
                with contextlib.suppress(ApiError):
                    await self._api.delete(LEASES, name, self._namespace, uid=lease["metadata"]["uid"])

    def _note(self, change: Change) -> None:
        name = change.object["metadata"]["name"]
        if change.kind is ChangeKind.DELETED:
            self._changed_at.pop(name, None)
        else:
            self._changed_at[name] = time.monotonic()
        self._judge()

    def _judge(self) -> None:
        oldest = time.monotonic() - self._seconds
        members = {
            lease["spec"].get("holderIdentity") or ""
            for (_, name), lease in self._leases.objects.items()
            if self._changed_at.get(name, 0) > oldest
        } - {"", self.member}
        if self.present:
            members.add(self.member)
        if members != self.members:
            log.info("members", group=self._group, members=sorted(members))
            self.members = frozenset(members)
            self._on_change(self.members)

    async def _run(self) -> None:
        interval = self._seconds * _RENEW_SHARE
        while True:
            await asyncio.sleep(interval / 2)
            self._judge()
            await asyncio.sleep(interval / 2)
            try:
                async with asyncio.timeout(interval):
                    await self._lease.try_hold()
            except (ApiError, TimeoutError) as error:
                log.warning(
                    "the own lease could not be renewed", lease=self._lease.name, error=str(error) or "no answer"
                )
            self._judge()
