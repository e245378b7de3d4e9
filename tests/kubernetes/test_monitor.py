"""The monitor on a real cluster: every way in which a sandbox ends, told once and truly, whatever happens to those who watch.

Storage and the monitors are real processes of this machine, and the test is the dispatcher; see tests/support/watched.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from crucible import names
from crucible.evaluation import Reason, State
from crucible.kubernetes.api import JOBS
from tests.deployment.images import build
from tests.support.folders import scratch_dir
from tests.support.waits import wait_until_async
from tests.support.watched import WatchedCluster, describe, prepare, watched_cluster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from crucible import contracts as c
    from tests.cluster import Cluster

# The first test has the making of the images, where they are not there yet, and every end of the table in it.
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="module")]

Object = dict[str, Any]
# From a fact to its record. Half of it is the kubelet's, which looks at its containers once a second.
SECONDS = 15
MIB = 1024 * 1024


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(cluster: Cluster) -> AsyncIterator[WatchedCluster]:
    (image,) = build(["runner"])
    prepare(cluster, image.reference, image.archive)
    for folder in scratch_dir():
        async with watched_cluster(cluster, folder, image.reference) as bench:
            bench.start_monitor()
            bench.start_monitor()
            yield bench


# -- every end


@dataclass
class Case:
    """A program, what is done to it, and what must be recorded."""

    code: str
    state: State
    reason: Reason
    exit_code: int | None = None
    signal: int | None = None
    exception: str | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    fields: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Object], None] = lambda _: None
    then: Callable[[WatchedCluster, str], Awaitable[None]] | None = None


@dataclass
class Ended:
    """What came of a case."""

    record: c.EvaluationRecord
    output: tuple[bytes, bytes]
    events: str
    terminal_events: int
    fact_at: datetime | None


def pod_of(job: Object) -> Object:
    spec: Object = job["spec"]["template"]["spec"]
    return spec


def with_deadline(seconds: int) -> Callable[[Object], None]:
    """Have a runner that does not end by itself: it knows no time limit, and its node does."""

    def change(job: Object) -> None:
        pod = pod_of(job)
        pod["activeDeadlineSeconds"] = seconds
        (container,) = pod["containers"]
        container["args"] = [
            "timeout_ms=3600000" if each.startswith("timeout_ms=") else each for each in container["args"]
        ]

    return change


def with_storage(size: str) -> Callable[[Object], None]:
    def change(job: Object) -> None:
        resources = pod_of(job)["containers"][0]["resources"]
        for each in ("requests", "limits"):
            resources[each]["ephemeral-storage"] = size

    return change


def on_node(name: str) -> Callable[[Object], None]:
    def change(job: Object) -> None:
        pod_of(job)["nodeSelector"]["kubernetes.io/hostname"] = name

    return change


def with_request(cpu: str) -> Callable[[Object], None]:
    def change(job: Object) -> None:
        resources = pod_of(job)["containers"][0]["resources"]
        resources["requests"]["cpu"] = resources["limits"]["cpu"] = cpu

    return change


async def delete_by_hand(bench: WatchedCluster, evaluation_id: str) -> None:
    await bench.running(evaluation_id)
    await said(bench, evaluation_id, b"before")
    await bench.delete_pod(evaluation_id)


async def cancel(bench: WatchedCluster, evaluation_id: str) -> None:
    await bench.running(evaluation_id)
    await said(bench, evaluation_id, b"before")
    await bench.stop(evaluation_id, Reason.CANCELLED_BY_USER)


async def cancel_at_once(bench: WatchedCluster, evaluation_id: str) -> None:
    mark = {"metadata": {"annotations": {names.ANNOTATION_STOP: Reason.CANCELLED_BY_OPERATOR}}}
    await bench.call(bench.api.patch, JOBS, bench.name_of(evaluation_id), mark, names.EVALUATION_NAMESPACE)
    await bench.delete_pod(evaluation_id)


async def delete_everything(bench: WatchedCluster, evaluation_id: str) -> None:
    await bench.running(evaluation_id)
    await said(bench, evaluation_id, b"before")
    name = bench.name_of(evaluation_id)
    await bench.call(bench.api.delete, JOBS, name, names.EVALUATION_NAMESPACE, propagation="Background")


async def said(bench: WatchedCluster, evaluation_id: str, words: bytes) -> None:
    """Wait until storage has these words of it, while it runs."""

    async def heard() -> bool:
        return words in (await bench.client.output(evaluation_id, "stdout"))[0]

    await wait_until_async(heard, timeout=30, describe=f"{words!r} of {evaluation_id}", poll=0.1)


LINGER = "import time\nprint('before', flush=True)\ntime.sleep(600)\n"
HOG = "held = []\nprint('before', flush=True)\nwhile True: held.append(bytearray(b'x' * 1_000_000))\n"

CASES: dict[str, Case] = {
    "ends with 0": Case(
        "import sys\nprint('out')\nprint('err', file=sys.stderr)", State.COMPLETED, Reason.EXIT_ZERO, 0, stdout=b"out\n", stderr=b"err\n"
    ),
    "ends with 1": Case("import sys; sys.exit(1)", State.FAILED, Reason.EXIT_NONZERO, 1),
    "ends with 3": Case("print('x'); raise SystemExit(3)", State.FAILED, Reason.EXIT_NONZERO, 3, stdout=b"x\n"),
    "ends with 255": Case("import os; os._exit(255)", State.FAILED, Reason.EXIT_NONZERO, 255),
    "divides by zero": Case(
        "print('before')\n1/0", State.FAILED, Reason.EXCEPTION, 1, exception="ZeroDivisionError", stdout=b"before\n", stderr=b"ZeroDivisionError"
    ),
    "reads what is no memory": Case(
        "import ctypes\nprint('before', flush=True)\nctypes.string_at(0)", State.FAILED, Reason.SIGNAL, signal=signal.SIGSEGV, stdout=b"before\n"
    ),
    "aborts": Case("import os; os.abort()", State.FAILED, Reason.SIGNAL, signal=signal.SIGABRT),
    "uses too much memory": Case(HOG, State.FAILED, Reason.OOM_KILLED, stdout=b"before\n", fields={"memory_limit": "64Mi"}),
    "has a child that uses too much memory": Case(
        "import subprocess, sys\nprint('before', flush=True)\nsubprocess.run([sys.executable, '-c', 'x = bytearray(b\"x\" * 500_000_000)'])",
        State.FAILED,
        Reason.OOM_KILLED,
        stdout=b"before\n",
        fields={"memory_limit": "64Mi"},
    ),
    "runs for too long": Case(LINGER, State.TIMEOUT, Reason.WALL_CLOCK, stdout=b"before\n", fields={"timeout_seconds": 2}),
    "runs for too long and ignores every signal": Case(
        "import signal\nfor n in range(1, 65):\n  try: signal.signal(n, signal.SIG_IGN)\n  except (OSError, ValueError): pass\n" + LINGER,
        State.TIMEOUT,
        Reason.WALL_CLOCK,
        stdout=b"before\n",
        fields={"timeout_seconds": 2},
    ),
    "has a runner that does not end it": Case(
        LINGER, State.TIMEOUT, Reason.DEADLINE, stdout=b"before\n", change=with_deadline(12)
    ),
    "has an image that does not exist": Case("", State.FAILED, Reason.IMAGE_ERROR, fields={"image": "missing", "code": "1"}),
    "is cancelled, and ignores SIGTERM": Case(
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + LINGER,
        State.CANCELLED,
        Reason.CANCELLED_BY_USER,
        stdout=b"before\n",
        then=cancel,
    ),
    "is cancelled before it begins": Case(LINGER, State.CANCELLED, Reason.CANCELLED_BY_OPERATOR, then=cancel_at_once),
    "has its Pod deleted by hand": Case(
        LINGER, State.FAILED, Reason.SANDBOX_ERROR, stdout=b"before\n", then=delete_by_hand
    ),
    "has its Job deleted by hand": Case(
        LINGER, State.FAILED, Reason.SANDBOX_ERROR, stdout=b"before\n", then=delete_everything
    ),
    "fills its node's disk": Case(
        "import time\nprint('before', flush=True)\nfor n in range(30):\n  print('x' * 1_000_000, flush=True)\ntime.sleep(600)",
        State.FAILED,
        Reason.EVICTED,
        stdout=b"before\n",
        change=with_storage("8Mi"),
    ),
    "fits no node": Case("print(1)", State.TIMEOUT, Reason.SCHEDULING, change=with_request("4")),
}  # fmt: skip


async def go_through(bench: WatchedCluster, case: Case) -> Ended:
    code = case.code or "print(1)"
    fields = {"timeout_seconds": 120, "cpu_limit": "1", **case.fields}
    fields.pop("code", None)
    evaluation_id = await bench.run(code, case.change, **fields)
    if case.then:
        await case.then(bench, evaluation_id)
    record = await bench.ended(evaluation_id, 100)
    fact_at = await container_ended_at(bench, evaluation_id)
    await bench.collected(evaluation_id)
    events = await bench.events(evaluation_id)
    terminal = [event for event in events if event.state.terminal and event.type != "collected"]
    assert events[-1].type == "collected", describe(events)
    return Ended(record, await bench.output(evaluation_id), describe(events), len(terminal), fact_at)


async def container_ended_at(bench: WatchedCluster, evaluation_id: str) -> datetime | None:
    """When its node saw its container end; None if no container ever ran."""
    pod = await bench.pod(evaluation_id)
    for status in (pod or {}).get("status", {}).get("containerStatuses", []):
        if when := (status.get("state", {}).get("terminated") or {}).get("finishedAt"):
            return datetime.fromisoformat(when)
    return None


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ends(bench: WatchedCluster) -> dict[str, Ended | BaseException]:
    """All of them at once; what goes wrong with one is for its own test to tell."""
    found = await asyncio.gather(*(go_through(bench, case) for case in CASES.values()), return_exceptions=True)
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("name", CASES)
async def test_each_end_is_recorded_once_and_truly(
    name: str, ends: dict[str, Ended | BaseException], bench: WatchedCluster
) -> None:
    case, end = CASES[name], ends[name]
    assert isinstance(end, Ended), f"{end}\n{bench.logs()}"
    record = end.record
    assert (record.state, record.reason) == (case.state, case.reason), end.events
    assert (record.exit_code, record.signal, record.exception_type) == (case.exit_code, case.signal, case.exception)
    assert case.stdout in end.output[0]
    assert case.stderr in end.output[1]
    assert not case.stderr or case.stderr not in end.output[0]
    assert end.terminal_events == 1
    assert record.stdout.sha256 == hashlib.sha256(end.output[0]).hexdigest()
    assert record.stderr.sha256 == hashlib.sha256(end.output[1]).hexdigest()
    if end.fact_at:
        assert record.finished_at is not None
        assert (record.finished_at - end.fact_at).total_seconds() < SECONDS
