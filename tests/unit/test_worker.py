"""The worker's decisions, with stand-ins for storage and dispatcher that answer from a script.

The stand-ins show what the worker asks and in which order; that the real services answer so is shown in tests/integration.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from crucible import contracts as c
from crucible.evaluation import EvaluationRequest, Reason, State, resolve
from crucible.limits import Limits, SizeClass
from crucible.outcome import Outcome
from crucible.resilience import CallFailedError
from crucible.settings import TracingSettings, WorkerSettings
from crucible.tracing import Tracing
from crucible.worker.holding import Holding, slots_per_class
from crucible.worker.run import EvaluationRunner, Held
from crucible.worker.worker import Worker
from tests.support.waits import pass_time, wait_until_async

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.unit

NAME = "ev-00000000000000000000000001"
DONE = Outcome(state=State.COMPLETED, reason=Reason.EXIT_ZERO, detail="the code ran to its end", exit_code=0)


def claim(name: str = NAME, attempt: int = 1) -> c.Claim:
    spec = resolve(EvaluationRequest(code="pass"), Limits())
    return c.Claim(evaluation_id=name, attempt=attempt, owner="ada", spec=spec, lease_seconds=0.03)


def refusal(slug: str, status: int) -> CallFailedError:
    return CallFailedError(
        "peer", slug, status=status, problem={"type": f"/problems/{slug}", "detail": f"because {slug}"}
    )


class ScriptedStorage:
    """Stand-in for storage: hands out the given claims once, and remembers what it was told."""

    def __init__(self, *claims: c.Claim) -> None:
        self.waiting = list(claims)
        self.finished: list[c.Finish] = []
        self.released: list[c.Release] = []
        self.renewed: list[c.LeaseRenewal] = []
        self.answer = c.LeaseAnswer()

    async def claim(self, request: c.ClaimRequest) -> c.ClaimList:
        wanted = request.wanted.get(SizeClass.SMALL, 0)
        taken, self.waiting = self.waiting[:wanted], self.waiting[wanted:]
        if not taken:
            await asyncio.Event().wait()
        return c.ClaimList(claims=taken)

    async def finish(self, evaluation_id: str, finish: c.Finish) -> None:
        self.finished.append(finish)

    async def release(self, evaluation_id: str, release: c.Release) -> None:
        self.released.append(release)

    async def renew(self, renewal: c.LeaseRenewal) -> c.LeaseAnswer:
        self.renewed.append(renewal)
        return self.answer


class ScriptedDispatcher:
    """Stand-in for the dispatcher: refuses with the given errors first, then holds a sandbox until it is told to end it."""

    def __init__(self, *refusals: CallFailedError, ends_by_itself: bool = False, durable: bool = False) -> None:
        self.refusals = list(refusals)
        self.silences: list[CallFailedError] = []
        self.durable = durable
        self.created: list[str] = []
        self.stopped: list[Reason] = []
        self.end = asyncio.Event()
        if ends_by_itself:
            self.end.set()

    async def create(self, evaluation_id: str, request: c.SandboxRequest) -> c.SandboxStatus:
        if self.refusals:
            raise self.refusals.pop(0)
        self.created.append(evaluation_id)
        return self.status(evaluation_id, request.attempt, c.SandboxPhase.STARTING)

    async def wait(self, evaluation_id: str, *, attempt: int, wait_seconds: float) -> c.SandboxStatus:
        if self.silences:
            raise self.silences.pop(0)
        await self.end.wait()
        return self.status(evaluation_id, attempt, c.SandboxPhase.FINISHED)

    def status(self, evaluation_id: str, attempt: int, phase: c.SandboxPhase) -> c.SandboxStatus:
        ended = phase is c.SandboxPhase.FINISHED
        return c.SandboxStatus(
            evaluation_id=evaluation_id,
            attempt=attempt,
            runtime="scripted",
            phase=phase,
            outcome=DONE if ended else None,
            durable=self.durable,
        )

    async def stop(self, evaluation_id: str, reason: Reason, *, attempt: int) -> None:
        assert attempt == 1
        self.stopped.append(reason)
        self.end.set()


async def see_through(storage: Any, dispatcher: Any, prepare: Callable[[Held], None] | None = None) -> None:
    held = Held(claim())
    if prepare:
        prepare(held)
    await asyncio.wait_for(EvaluationRunner(storage, dispatcher, "w").see_through(held), 5)


async def test_a_full_dispatcher_makes_the_slot_wait_in_place() -> None:
    storage, dispatcher = ScriptedStorage(), ScriptedDispatcher(*[refusal("no-capacity", 409)] * 3, ends_by_itself=True)
    await see_through(storage, dispatcher)
    assert dispatcher.created == [NAME]
    assert storage.released == []
    assert storage.finished == []


async def test_a_cluster_that_is_away_makes_the_slot_wait_in_place() -> None:
    away = refusal("cluster-unavailable", 424)
    storage, dispatcher = ScriptedStorage(), ScriptedDispatcher(away, ends_by_itself=True)
    await see_through(storage, dispatcher)
    assert dispatcher.created == [NAME]
    assert (storage.released, storage.finished) == ([], [])


@pytest.mark.parametrize(("told", "reason"), [("image_error", Reason.IMAGE_ERROR), (None, Reason.SANDBOX_ERROR)])
async def test_a_sandbox_that_is_refused_ends_the_attempt_with_the_clusters_words(
    told: str | None, reason: Reason
) -> None:
    error = refusal("sandbox-refused", 422)
    if told:
        error.problem["reason"] = told
    storage = ScriptedStorage()
    await see_through(storage, ScriptedDispatcher(error))
    [finish] = storage.finished
    assert (finish.outcome.reason, finish.outcome.detail) == (reason, "because sandbox-refused")


NO_ANSWER = CallFailedError("dispatcher", "no connection")


SILENCES = [
    NO_ANSWER,
    refusal("unavailable", 503),
    refusal("cluster-unavailable", 424),
    CallFailedError("d", "x", status=502),
    # While calls are held back, no service has said anything.
    CallFailedError("d", "is not answering; calls are held back for a moment", status=503),
]


@pytest.mark.parametrize("silence", SILENCES)
async def test_a_dispatcher_that_is_replaced_while_it_makes_a_sandbox_is_asked_again(silence: CallFailedError) -> None:
    storage, dispatcher = ScriptedStorage(), ScriptedDispatcher(silence, silence, ends_by_itself=True)
    await see_through(storage, dispatcher)
    assert dispatcher.created == [NAME]
    assert (storage.finished, storage.released) == ([], [])


async def test_what_may_have_been_made_is_ended_when_it_is_cancelled_before_an_answer() -> None:
    class Mute(ScriptedDispatcher):
        async def create(self, *_: object) -> c.SandboxStatus:
            raise NO_ANSWER

    storage, dispatcher = ScriptedStorage(), Mute()
    await see_through(
        storage,
        dispatcher,
        lambda held: asyncio.get_running_loop().call_later(0.02, held.release, Reason.CANCELLED_BY_USER),
    )
    assert dispatcher.stopped == [Reason.CANCELLED_BY_USER]
    assert [finish.outcome.reason for finish in storage.finished] == [Reason.CANCELLED_BY_USER]


@pytest.mark.parametrize("silence", SILENCES)
async def test_a_dispatcher_that_is_replaced_is_no_news_of_a_sandbox_that_outlives_it(silence: CallFailedError) -> None:
    storage, dispatcher = ScriptedStorage(), ScriptedDispatcher(durable=True, ends_by_itself=True)
    dispatcher.silences = [silence]
    await see_through(storage, dispatcher)
    assert dispatcher.silences == []
    assert storage.finished == []


async def test_without_a_dispatcher_a_sandbox_of_its_own_node_is_given_up() -> None:
    dispatcher = ScriptedDispatcher(ends_by_itself=True)
    dispatcher.silences = [NO_ANSWER]
    with pytest.raises(CallFailedError):
        await see_through(ScriptedStorage(), dispatcher)


async def test_what_can_never_fit_ends_with_the_reason() -> None:
    storage = ScriptedStorage()
    await see_through(storage, ScriptedDispatcher(refusal("never-fits", 422)))
    [finish] = storage.finished
    assert (finish.outcome.state, finish.outcome.reason) == (State.TIMEOUT, Reason.SCHEDULING)
    assert finish.outcome.detail == "because never-fits"


async def test_a_cancel_while_waiting_for_room_ends_it_without_a_sandbox() -> None:
    storage, dispatcher = ScriptedStorage(), ScriptedDispatcher(*[refusal("no-capacity", 409)] * 1000)
    await see_through(
        storage,
        dispatcher,
        lambda held: asyncio.get_running_loop().call_later(0.02, held.release, Reason.CANCELLED_BY_USER),
    )
    assert dispatcher.created == []
    assert [finish.outcome.reason for finish in storage.finished] == [Reason.CANCELLED_BY_USER]


async def test_a_stale_attempt_is_dropped_without_a_word() -> None:
    storage = ScriptedStorage()
    await see_through(storage, ScriptedDispatcher(refusal("stale-attempt", 409)))
    assert storage.finished == []


async def test_a_sandbox_that_the_dispatcher_forgot_counts_as_lost() -> None:
    class Forgetful(ScriptedDispatcher):
        async def wait(self, *_: object, **__: object) -> c.SandboxStatus:
            raise refusal("not-found", 404)

    storage = ScriptedStorage()
    await see_through(storage, Forgetful())
    assert [finish.outcome.reason for finish in storage.finished] == [Reason.NODE_LOST]


def make_worker(storage: Any, dispatcher: Any, *, drain_seconds: float = 0.01) -> Worker:
    settings = WorkerSettings(slots=4, drain_seconds=drain_seconds)
    tracing = Tracing(TracingSettings(), "test")
    return Worker(storage, Holding(settings, storage, dispatcher, instance="w", tracing=tracing))


async def settle(condition: Callable[[], object]) -> None:
    await wait_until_async(condition, timeout=5, describe="the worker to act", poll=0)


async def test_never_more_are_held_than_there_are_slots() -> None:
    names = [f"ev-{n:026d}" for n in range(7)]
    storage, dispatcher = ScriptedStorage(*map(claim, names)), ScriptedDispatcher()
    worker = make_worker(storage, dispatcher, drain_seconds=5)
    await worker.start()
    await settle(lambda: len(dispatcher.created) == 4)
    await pass_time(0.01)
    assert dispatcher.created == names[:4]
    dispatcher.end.set()
    await settle(lambda: len(dispatcher.created) == 7)
    assert dispatcher.created == names
    await worker.drain()


async def test_a_drain_lets_what_runs_finish() -> None:
    storage, dispatcher = ScriptedStorage(claim()), ScriptedDispatcher()
    worker = make_worker(storage, dispatcher, drain_seconds=5)
    await worker.start()
    await settle(lambda: dispatcher.created)
    asyncio.get_running_loop().call_later(0.02, dispatcher.end.set)
    await worker.drain()
    assert dispatcher.stopped == []


async def test_a_drain_that_takes_too_long_gives_the_rest_back() -> None:
    storage, dispatcher = ScriptedStorage(claim()), ScriptedDispatcher()
    worker = make_worker(storage, dispatcher)
    await worker.start()
    await settle(lambda: dispatcher.created)
    await worker.drain()
    assert dispatcher.stopped == [Reason.PREEMPTED]


async def test_a_drain_gives_back_what_never_got_room() -> None:
    storage, dispatcher = ScriptedStorage(claim()), ScriptedDispatcher(*[refusal("no-capacity", 409)] * 1000)
    worker = make_worker(storage, dispatcher)
    await worker.start()
    await settle(lambda: not storage.waiting)
    await worker.drain()
    assert [release.attempt for release in storage.released] == [1]
    assert storage.finished == []


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (c.LeaseAnswer(lost=[NAME]), Reason.NODE_LOST),
        (c.LeaseAnswer(cancelled=[NAME]), Reason.CANCELLED_BY_USER),
    ],
)
async def test_a_lease_that_is_refused_ends_the_sandbox(answer: c.LeaseAnswer, reason: Reason) -> None:
    storage, dispatcher = ScriptedStorage(claim()), ScriptedDispatcher()
    storage.answer = answer
    worker = make_worker(storage, dispatcher, drain_seconds=5)
    await worker.start()
    await settle(lambda: dispatcher.stopped)
    assert dispatcher.stopped == [reason]
    assert storage.renewed[0].held == [c.Held(evaluation_id=NAME, attempt=1)]
    await worker.drain()


async def test_a_renewal_that_failed_does_not_wait_for_its_turn_again() -> None:
    tried: list[float] = []

    class Deaf(ScriptedStorage):
        async def renew(self, renewal: c.LeaseRenewal) -> c.LeaseAnswer:
            tried.append(asyncio.get_running_loop().time())
            raise CallFailedError("storage", "no connection")

    held = claim().model_copy(update={"lease_seconds": 0.6})
    worker = make_worker(Deaf(held), ScriptedDispatcher())
    await worker.start()
    await settle(lambda: len(tried) == 3)
    # A third of the lease is a renewal's turn.
    assert tried[2] - tried[0] < held.lease_seconds / 3
    await worker.drain()


async def test_a_drain_leaves_alone_what_outlives_the_worker() -> None:
    storage, dispatcher = ScriptedStorage(claim()), ScriptedDispatcher(durable=True)
    worker = make_worker(storage, dispatcher, drain_seconds=60)
    await worker.start()
    await settle(lambda: dispatcher.created)
    await asyncio.wait_for(worker.drain(), 5)
    assert (dispatcher.stopped, storage.released, storage.finished) == ([], [], [])


def test_slots_weigh_the_size_classes() -> None:
    assert slots_per_class(WorkerSettings(slots=8)) == {SizeClass.SMALL: 8, SizeClass.MEDIUM: 4, SizeClass.LARGE: 2}
    assert slots_per_class(WorkerSettings(slots=1)) == {SizeClass.SMALL: 1, SizeClass.MEDIUM: 1, SizeClass.LARGE: 1}
