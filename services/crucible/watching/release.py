"""Letting the cluster have back what is recorded: the finalizer that kept its Pods, then the mark on the Job for the cleanup.

In this order the deletion of the Job finds a Pod that goes at once. The other way round it would only be marked as being deleted, and its
node would ask for its removal again and again.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from crucible import logs, names
from crucible.kubernetes.api import JOBS, PODS, ApiError
from crucible.watching.facts import holds_output

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from crucible.kubernetes.api import KubernetesApi, Object

log = logs.get_logger("release")

_RETRY_FIRST_S = 0.2
_RETRY_MAX_S = 5.0


async def mark_collected(api: KubernetesApi, namespace: str, sandbox: str) -> None:
    """Say on the Job that everything about it is recorded; tries until the API server has it. No Job, no mark."""
    mark = {"metadata": {"labels": {names.LABEL_COLLECTED: "true"}}}
    await _until_done(sandbox, lambda: api.patch(JOBS, sandbox, mark, namespace))


async def let_pods_go(api: KubernetesApi, namespace: str, sandbox: str, pods: Iterable[Object]) -> None:
    """Take our finalizer off Pods, so that deleting them works; tries until the API server has it."""
    for pod in pods:
        if holds_output(pod):
            await _until_done(sandbox, lambda pod=pod: take_finalizer_off(api, namespace, pod))  # type: ignore[misc]


async def take_finalizer_off(api: KubernetesApi, namespace: str, pod: Object) -> None:
    """Remove our finalizer from this very Pod, whatever else has changed about it; that it is gone is as good.

    Raises:
        ApiError: the API server did not take it.
    """
    metadata = pod["metadata"]
    patch = {"metadata": {"uid": metadata["uid"], "$deleteFromPrimitiveList/finalizers": [names.FINALIZER_OUTPUT]}}
    try:
        await api.patch(PODS, metadata["name"], patch, namespace, strategic=True)
    except ApiError as error:
        # A conflict is another Pod of the same name.
        if not error.conflict and not error.not_found:
            raise


async def _until_done(sandbox: str, call: Callable[[], Awaitable[object]]) -> None:
    pause = _RETRY_FIRST_S
    while True:
        try:
            await call()
        except ApiError as error:
            if error.not_found:
                return
            # Also what is refused: an operator can mend that, and nothing else may happen to the sandbox before.
            log.warning("the cluster did not take it; trying again", sandbox=sandbox, error=str(error))
            await asyncio.sleep(max(error.retry_after or 0, pause * (0.5 + random.random())))  # noqa: S311 - spreads load, no secret
            pause = min(pause * 2, _RETRY_MAX_S)
        else:
            return
