"""A copy of some of the cluster's objects that follows every change: list, then watch from there, and list again where that breaks.

What a reader sees is always a state that the cluster once had, in the order of its history; after an outage only the difference
is told, deletions included, so a subscriber misses no end and hears none twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from crucible import logs, metrics
from crucible.kubernetes.api import ApiError, Object

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from crucible.kubernetes.api import KubernetesApi, Resource

log = logs.get_logger("reflector")

_RETRY_FIRST_S = 0.2
_RETRY_MAX_S = 3.0
_WINDOW_SECONDS = 10

Key = tuple[str, str]


class ChangeKind(StrEnum):
    """What became of an object."""

    ADDED = "added"
    MODIFIED = "modified"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Change:
    """One change; `old` is the object as it was known before (None when added)."""

    kind: ChangeKind
    object: Object
    old: Object | None


def key_of(thing: Object) -> Key:
    """Return namespace and name of an object."""
    metadata = thing["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


class Reflector:
    """Follows the objects of one kind. `start` it; `synced` is set once the first list is in.

    Args:
        api: whom to ask.
        resource: which kind.
        namespace: where; None is everywhere.
        labels: label selector.
        fields: field selector.
    """

    def __init__(
        self,
        api: KubernetesApi,
        resource: Resource,
        namespace: str | None = None,
        *,
        labels: str | None = None,
        fields: str | None = None,
    ) -> None:
        self.objects: dict[Key, Object] = {}
        self.synced = asyncio.Event()
        self._api = api
        self._resource = resource
        self._namespace = namespace
        self._labels = labels
        self._fields = fields
        self._version = ""
        self._heard = time.monotonic()
        self._subscribers: list[Callable[[Change], None]] = []
        self._task: asyncio.Task[None] | None = None

    @property
    def behind_seconds(self) -> float:
        """How long ago the API server was last heard; a healthy watch hears it at least once per window (10 s)."""
        return time.monotonic() - self._heard

    def subscribe(self, tell: Callable[[Change], None]) -> None:
        """Have every change told, what exists already included. `tell` must be quick and must not raise."""
        self._subscribers.append(tell)
        for thing in list(self.objects.values()):
            tell(Change(ChangeKind.ADDED, thing, None))

    def start(self) -> None:
        """Begin to follow."""
        self._task = asyncio.create_task(self._run(), name=f"reflector-{self._resource.plural}")

    async def aclose(self) -> None:
        """Follow no more."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    # -- following

    async def _run(self) -> None:
        pause = _RETRY_FIRST_S
        while True:
            try:
                if not self._version:
                    await self._list()
                await self._watch()
                pause = _RETRY_FIRST_S
            except ApiError as error:
                if error.gone:
                    self._version = ""
                    continue
                log.warning("watching failed; trying again", kind=self._resource.kind, error=str(error))
                metrics.WATCH_RESTARTS.labels(self._resource.plural).inc()
                await asyncio.sleep(max(error.retry_after or 0, pause * (0.5 + random.random())))  # noqa: S311 - spreads load, no secret
                pause = min(pause * 2, _RETRY_MAX_S)

    async def _list(self) -> None:
        items, version = await self._api.list(self._resource, self._namespace, labels=self._labels, fields=self._fields)
        self._heard = time.monotonic()
        self._version = version
        self._replace(items)
        self.synced.set()

    def _replace(self, items: Iterable[Object]) -> None:
        """Take a fresh list, and tell how it differs from what was known."""
        found = {key_of(item): item for item in items}
        for key in [key for key in self.objects if key not in found]:
            self._remove(key, self.objects[key])
        for key, item in found.items():
            known = self.objects.get(key)
            if known is not None and known["metadata"]["uid"] != item["metadata"]["uid"]:
                self._remove(key, known)
            self._put(key, item)

    async def _watch(self) -> None:
        stream = self._api.watch(
            self._resource,
            self._namespace,
            resource_version=self._version,
            labels=self._labels,
            fields=self._fields,
            window_seconds=_WINDOW_SECONDS,
        )
        async with stream as changes:
            self._heard = time.monotonic()
            async for kind, thing in changes:
                self._heard = time.monotonic()
                self._version = thing["metadata"]["resourceVersion"]
                if kind == "DELETED":
                    self._remove(key_of(thing), thing)
                elif kind != "BOOKMARK":
                    self._put(key_of(thing), thing)
        # It ended as it was asked to, so the API server was there until now.
        self._heard = time.monotonic()

    # -- telling

    def _put(self, key: Key, thing: Object) -> None:
        old = self.objects.get(key)
        if old is not None and old["metadata"]["resourceVersion"] == thing["metadata"]["resourceVersion"]:
            return
        self.objects[key] = thing
        self._tell(Change(ChangeKind.MODIFIED if old is not None else ChangeKind.ADDED, thing, old))

    def _remove(self, key: Key, last: Object) -> None:
        old = self.objects.pop(key, None)
        if old is not None:
            self._tell(Change(ChangeKind.DELETED, last, old))

    def _tell(self, change: Change) -> None:
        for tell in self._subscribers:
            tell(change)
