"""Cleanup removes what is recorded and what nobody owns, nothing else, and says what it could not remove.

The cluster is real. Storage, whose word cleanup goes by, is a stand-in that says what a test wants said; no Pod here needs to run.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from crucible import names
from crucible.cleanup import cleanup as cleanup_module
from crucible.cleanup import rules
from crucible.cleanup.cleanup import Cleanup
from crucible.cleanup.rules import Attempt, Why
from crucible.evaluation import State
from crucible.health import Health
from crucible.kubernetes.api import (
    CONFIG_MAPS,
    JOBS,
    NODES,
    PODS,
    ApiError,
    KubernetesApi,
    Object,
    Resource,
    from_kubeconfig,
)
from crucible.resilience import CallFailedError
from crucible.settings import CleanupSettings, KubernetesSettings
from tests.support.policies import LISTED_IMAGE, allow_image, changed, make_objects
from tests.support.waits import wait_until_async

if TYPE_CHECKING:
    from crucible.clients import StorageClient
    from tests.cluster import Cluster

pytestmark = pytest.mark.cluster

NAMESPACE = names.EVALUATION_NAMESPACE
FOREIGN = "example.dev/keep"


@dataclass
class Judge:
    """A stand-in for storage: knows the state and attempt of some evaluations, or does not answer at all."""

    known: dict[str, tuple[State, int]] = field(default_factory=dict)
    down: bool = False

    async def get(self, evaluation_id: str) -> SimpleNamespace:
        await self.queue()
        if evaluation_id not in self.known:
            raise CallFailedError("storage", "no such evaluation", status=404)
        state, attempt = self.known[evaluation_id]
        return SimpleNamespace(state=state, attempt=attempt)

    async def queue(self) -> None:
        if self.down:
            raise CallFailedError("storage", "does not answer")


@dataclass
class Bench:
    """What a test works with."""

    api: KubernetesApi
    judge: Judge

    async def make(self, *, job: bool = True, stdin: str = "", finalizer: str = "") -> Attempt:
        """Create an attempt as the dispatcher does, its Pod one that no node takes, or only its ConfigMaps."""
        objects = make_objects(stdin=stdin)
        for thing in objects.config_maps:
            await self.api.create(CONFIG_MAPS, thing, NAMESPACE)
        attempt = rules.attempt_of(objects.job)
        assert attempt
        if job:
            body = changed(objects.job, ("spec", "template", "spec", "nodeSelector"), {"no": "node"})
            if finalizer:
                body = changed(body, ("spec", "template", "metadata", "finalizers"), [finalizer])
            await self.api.create(JOBS, body, NAMESPACE)
            await wait_until_async(lambda: self.there(PODS, attempt), timeout=20, describe="the Job's Pod")
        return attempt

    async def there(self, resource: Resource, attempt: Attempt) -> list[Object]:
        return (await self.api.list(resource, NAMESPACE, labels=attempt.selector))[0]

    async def left(self, attempt: Attempt) -> list[str]:
        """Name all that there is of an attempt."""
        found = [(resource.kind, await self.there(resource, attempt)) for resource in (JOBS, PODS, CONFIG_MAPS)]
        return [f"{kind} {thing['metadata']['name']}" for kind, things in found for thing in things]

    async def collect(self, attempt: Attempt, *, release: bool = True) -> None:
        """Do what the watcher does once everything is recorded: mark the Job, then let the Pod go."""
        label = {"metadata": {"labels": {names.LABEL_COLLECTED: "true"}}}
        await self.api.patch(JOBS, str(attempt), label, NAMESPACE)
        if release:
            await self.release(attempt, names.FINALIZER_OUTPUT)

    async def release(self, attempt: Attempt, finalizer: str) -> None:
        """Take a finalizer off the attempt's Pods."""

        async def released() -> bool:
            for pod in await self.there(PODS, attempt):
                metadata = pod["metadata"]
                kept = [other for other in metadata.get("finalizers", ()) if other != finalizer]
                patch = {"metadata": {"finalizers": kept, "resourceVersion": metadata["resourceVersion"]}}
                await self.api.patch(PODS, metadata["name"], patch, NAMESPACE)
            return True

        # The Job controller takes its own finalizer off at the same time.
        await wait_until_async(released, timeout=20, describe=f"{finalizer} to be taken off", tolerate=(ApiError,))

    async def gone(self, attempt: Attempt) -> None:
        """Wait until nothing of an attempt is left."""

        async def nothing_left() -> bool:
            return not await self.left(attempt)

        await wait_until_async(nothing_left, timeout=30, describe=f"nothing to be left of {attempt}")

    def cleanup(self, **settings: Any) -> Cleanup:
        given = CleanupSettings(**{"orphan_seconds": 3600.0, **settings})
        kubernetes = KubernetesSettings(node_lost_seconds=1)
        return Cleanup(self.api, cast("StorageClient", self.judge), given, kubernetes)

    @asynccontextmanager
    async def running(self, **settings: Any) -> AsyncIterator[Cleanup]:
        cleanup = self.cleanup(**settings)
        await cleanup.start()
        try:
            yield cleanup
        finally:
            await cleanup.aclose()


@pytest.fixture(scope="module")
def guarded(guarded_cluster: Cluster) -> Cluster:
    allow_image(guarded_cluster, "admission-test", LISTED_IMAGE)
    return guarded_cluster


@pytest.fixture
async def bench(guarded: Cluster) -> AsyncIterator[Bench]:
    async with KubernetesApi(from_kubeconfig(guarded.kubeconfig)) as api:
        bench = Bench(api, Judge())
        yield bench
        for resource in (JOBS, CONFIG_MAPS, PODS):
            for thing in (await api.list(resource, NAMESPACE, labels=names.OWN_SELECTOR))[0]:
                await discard(api, resource, thing["metadata"]["name"])


async def discard(api: KubernetesApi, resource: Resource, name: str) -> None:
    """Remove what a test has left, whatever keeps it."""
    try:
        if resource is PODS:
            await api.patch(PODS, name, {"metadata": {"finalizers": None}}, NAMESPACE)
        await api.delete(resource, name, NAMESPACE, propagation="Background", grace_seconds=0)
    except ApiError as error:
        if not error.not_found:
            raise


# --- what is recorded -----------------------------------------------------------------------------------------------------


async def test_a_collected_attempt_goes_at_once_with_everything_and_its_neighbour_stays(bench: Bench) -> None:
    attempt, neighbour = await bench.make(stdin="some input"), await bench.make()
    assert len(await bench.left(attempt)) == 4
    before = await bench.left(neighbour)
    async with bench.running():
        await bench.collect(attempt)
        await bench.gone(attempt)
    assert await bench.left(neighbour) == before


async def test_what_was_collected_while_nobody_looked_goes_when_cleanup_starts(bench: Bench) -> None:
    attempt = await bench.make()
    await bench.collect(attempt)
    async with bench.running():
        await bench.gone(attempt)


async def test_two_replicas_do_the_work_of_one(bench: Bench) -> None:
    attempts = [await bench.make() for _ in range(5)]
    async with bench.running() as one, bench.running() as other:
        await asyncio.gather(*(bench.collect(attempt) for attempt in attempts))
        for attempt in attempts:
            await bench.gone(attempt)
        for cleanup in (one, other):
            await wait_until_async(lambda cleanup=cleanup: not cleanup._removals, timeout=20, describe="it to be done")
            assert not cleanup._stuck


async def test_a_pod_whose_output_is_not_recorded_is_not_taken_from_its_watcher(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "RELEASE_AFTER_S", 3600.0)
    attempt = await bench.make()
    async with bench.running() as cleanup:
        await bench.collect(attempt, release=False)

        async def the_job_is_gone() -> bool:
            return not await bench.there(JOBS, attempt)

        await wait_until_async(the_job_is_gone, timeout=20, describe="the Job to be gone")
        tried = cleanup._queue._pauses
        await wait_until_async(lambda: tried.get(attempt, 0) > 1, timeout=20, describe="the Pod to be looked at again")
        (pod,) = await bench.there(PODS, attempt)
        assert names.FINALIZER_OUTPUT in pod["metadata"]["finalizers"]
        await bench.release(attempt, names.FINALIZER_OUTPUT)
        await bench.gone(attempt)
        assert not cleanup._stuck


async def test_a_pod_whose_watcher_died_after_recording_is_let_go(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "RELEASE_AFTER_S", 1.0)
    attempt = await bench.make()
    async with bench.running():
        await bench.collect(attempt, release=False)
        await bench.gone(attempt)


# --- what nobody owns -----------------------------------------------------------------------------------------------------


JUDGED: list[tuple[tuple[State, int] | None, Why | None]] = [
    (None, Why.UNKNOWN),
    ((State.COMPLETED, 1), Why.ENDED),
    ((State.RUNNING, 2), Why.VOID),
    ((State.QUEUED, 1), Why.VOID),
    ((State.RUNNING, 1), None),
    ((State.PROVISIONING, 1), None),
]


async def test_an_orphan_is_what_storage_does_not_hold(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs, and ConfigMaps without one, under every judgement at once."""
    monkeypatch.setattr(rules, "RELEASE_AFTER_S", 0.2)
    cases = [(job, known, why) for job in (True, False) for known, why in JUDGED]
    attempts = await asyncio.gather(*(bench.make(job=job) for job, _, _ in cases))
    for attempt, (_, known, _) in zip(attempts, cases, strict=True):
        if known:
            bench.judge.known[attempt.evaluation_id] = known
    kept = [attempt for attempt, (_, _, why) in zip(attempts, cases, strict=True) if why is None]
    before = [await bench.left(attempt) for attempt in kept]
    report = await sweep(bench.cleanup(orphan_seconds=0.001), 30)
    assert report.stuck == {}
    assert report.removed == {str(attempt): why for attempt, (_, _, why) in zip(attempts, cases, strict=True) if why}
    assert sorted(report.kept) == sorted(map(str, kept))
    assert [await bench.left(attempt) for attempt in kept] == before
    assert [await bench.left(attempt) for attempt in attempts if attempt not in kept] == [[]] * 8


async def sweep(cleanup: Cleanup, limit: float = 20) -> Any:
    try:
        return await cleanup.sweep_once(limit)
    finally:
        await cleanup.aclose()


async def test_what_is_young_is_left_alone_since_it_may_be_in_the_making(bench: Bench) -> None:
    attempt = await bench.make(job=False)
    report = await sweep(bench.cleanup(orphan_seconds=600))
    assert (report.removed, report.kept) == ({}, [])
    assert await bench.left(attempt)


async def test_without_storages_word_nothing_is_removed(bench: Bench) -> None:
    attempt = await bench.make(job=False)
    bench.judge.down = True
    with pytest.raises(CallFailedError):
        await sweep(bench.cleanup(orphan_seconds=0.001))
    async with bench.running(orphan_seconds=0.05) as cleanup:
        looked = cleanup._queue._pauses
        await wait_until_async(lambda: attempt in looked, timeout=20, describe="cleanup to have asked storage in vain")
        assert await bench.left(attempt)
        assert not cleanup._stuck
        bench.judge.down = False
        await bench.gone(attempt)


async def test_what_does_not_carry_the_dispatchers_labels_is_never_touched(bench: Bench) -> None:
    mine = await bench.make(job=False)
    theirs = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{mine}-notes", "labels": {names.LABEL_EVALUATION: mine.evaluation_id}},
    }
    await bench.api.create(CONFIG_MAPS, theirs, NAMESPACE)
    try:
        await sweep(bench.cleanup(orphan_seconds=0.001))
        assert await bench.left(mine) == []
        assert await bench.api.get(CONFIG_MAPS, f"{mine}-notes", NAMESPACE)
    finally:
        await bench.api.delete(CONFIG_MAPS, f"{mine}-notes", NAMESPACE)


async def test_a_dry_run_says_what_would_go_and_removes_nothing(bench: Bench) -> None:
    recorded, orphan = await bench.make(), await bench.make(job=False)
    await bench.collect(recorded)
    before = [await bench.left(attempt) for attempt in (recorded, orphan)]
    report = await sweep(bench.cleanup(orphan_seconds=0.001, dry_run=True))
    assert report.would_remove == {str(recorded): Why.COLLECTED, str(orphan): Why.UNKNOWN}
    assert report.removed == {}
    assert [await bench.left(attempt) for attempt in (recorded, orphan)] == before


# --- what cannot be removed -----------------------------------------------------------------------------------------------


async def test_what_cannot_be_removed_is_named_and_makes_cleanup_unready_until_it_is_gone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleanup_module, "_STUCK_AFTER_S", 0.5)
    attempt = await bench.make(finalizer=FOREIGN)
    async with bench.running() as cleanup:
        health = Health("cleanup", "test")
        cleanup.watch(health)
        await bench.collect(attempt)
        await wait_until_async(lambda: "removal" in health.problems(), timeout=20, describe="the obstacle to be named")
        (pod,) = await bench.there(PODS, attempt)
        assert f"Pod {pod['metadata']['name']} is kept by the finalizers {FOREIGN}" in health.problems()["removal"]
        await bench.release(attempt, FOREIGN)
        await wait_until_async(lambda: not health.problems(), timeout=20, describe="all to be well")
        assert await bench.left(attempt) == []


def test_the_command_names_what_it_could_not_remove_and_fails(
    guarded: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def with_bench(act: Callable[[Bench], Any]) -> Any:
        async with KubernetesApi(from_kubeconfig(guarded.kubeconfig)) as api:
            return await act(Bench(api, Judge()))

    async def arrange(bench: Bench) -> Attempt:
        attempt = await bench.make(finalizer=FOREIGN)
        await bench.collect(attempt)
        return attempt

    async def tidy(bench: Bench) -> None:
        for resource in (JOBS, CONFIG_MAPS, PODS):
            for thing in await bench.there(resource, attempt):
                await discard(bench.api, resource, thing["metadata"]["name"])

    attempt = asyncio.run(with_bench(arrange))
    monkeypatch.setenv("CRUCIBLE_KUBERNETES__KUBECONFIG", str(guarded.kubeconfig))
    monkeypatch.setenv("CRUCIBLE_STORAGE_URL", "http://storage.invalid")
    monkeypatch.setenv("CRUCIBLE_INTERNAL_TOKEN", "token")
    monkeypatch.setattr("crucible.clients.StorageClient", lambda _: Judge())
    from typer.testing import CliRunner

    from crucible.cli.main import app

    done = CliRunner().invoke(app, ["cleanup-cluster", "--limit", "3", "--json"])
    try:
        assert done.exit_code == 1
        (problem,) = json.loads(done.stdout)["stuck"][str(attempt)]
        assert str(attempt) in problem
    finally:
        asyncio.run(with_bench(tidy))


# --- lost nodes -----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def bound_to_a_node_of_paper(bench: Bench, attempt: Attempt, *, ready: bool) -> AsyncIterator[None]:
    """Bind the attempt's Pod to a node that has no kubelet, so that nobody ever says that its processes have ended."""
    name = f"paper-{attempt.evaluation_id[-8:]}"
    status = {"conditions": [{"type": "Ready", "status": "True" if ready else "Unknown"}]}
    await bench.api.create(NODES, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
    try:
        await bench.api.patch(NODES, name, {"status": status}, subresource="status")
        (pod,) = await bench.there(PODS, attempt)
        target = {"apiVersion": "v1", "kind": "Node", "name": name}
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": pod["metadata"]["name"]},
            "target": target,
        }
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod['metadata']['name']}/binding"
        await bench.api.review(path, binding)
        yield
    finally:
        await bench.api.delete(NODES, name)


async def test_a_pod_of_a_lost_node_is_removed_without_its_word_once_recorded(bench: Bench) -> None:
    attempt = await bench.make()
    async with bench.running(), bound_to_a_node_of_paper(bench, attempt, ready=False):
        await bench.collect(attempt)
        await bench.gone(attempt)


async def test_a_pod_of_a_node_that_answers_is_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleanup_module, "_STUCK_AFTER_S", 2.0)
    attempt = await bench.make()
    async with bench.running() as cleanup, bound_to_a_node_of_paper(bench, attempt, ready=True):
        await bench.collect(attempt)
        said = "to say that its processes have ended"
        await wait_until_async(lambda: said in str(cleanup._stuck), timeout=20, describe="it to be named as stuck")
        assert await bench.there(PODS, attempt)
