"""What the API shows: evaluations, capacity and keys in a form for people as well as programs.

Quantities appear as Kubernetes writes them and as numbers; durations are in seconds; links are paths of this API.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from crucible.contracts import ApiKey, BrokerAction, DeadLetter, EvaluationRecord, Fit, NodeCapacity, OutputInfo, Role
from crucible.evaluation import EvaluationId, EvaluationRequest, Reason, Resources, State
from crucible.events import Event
from crucible.limits import Limits, SizeClass
from crucible.problems import KINDS, ProblemDetails
from crucible.quantity import format_cpu, format_memory

if TYPE_CHECKING:
    from crucible.auth import Principal


class View(BaseModel):
    """A body that the API answers with."""

    model_config = ConfigDict(frozen=True)


class Body(BaseModel):
    """A body that the API reads. A member that it does not know is an error: a misspelt limit must not pass as no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# --- evaluations ----------------------------------------------------------------------------------------------------------


class WaitingReason(StrEnum):
    """Why an evaluation is not running (or not yet ended)."""

    POSITION = "position"
    CAPACITY = "capacity"
    STARTING = "starting"
    CANCELLING = "cancelling"


class Waiting(View):
    """Why an evaluation waits, in words, and for how long it is likely to."""

    reason: WaitingReason
    detail: str = Field(
        description="The reason for a person", examples=["2 ahead of it in the small queue; 4 are running"]
    )
    position: int | None = Field(None, ge=1, description="Place among its size class; 1 is next. Absent where unknown")
    ahead: int | None = Field(None, ge=0, description="Evaluations that go before it")
    estimated_wait_seconds: float | None = Field(
        None, ge=0, description="From the mean time that recent evaluations held a slot; absent before any has ended"
    )


class Links(View):
    """Where the rest of an evaluation is."""

    self: str
    code: str
    events: str
    output: str
    stdout: str
    stderr: str
    cancel: str | None = Field(None, description="Absent once it has ended")

    @classmethod
    def of(cls, record: EvaluationRecord) -> Self:
        """Return the links of an evaluation."""
        base = f"/v1/evaluations/{record.id}"
        return cls(
            self=base,
            code=f"{base}/code",
            events=f"{base}/events",
            output=f"{base}/output",
            stdout=f"{base}/output/stdout",
            stderr=f"{base}/output/stderr",
            cancel=None if record.state.terminal else f"{base}/cancel",
        )


class EvaluationView(View):
    """An evaluation: what was asked for, where it is, and how it ended."""

    id: EvaluationId
    owner: str
    state: State
    reason: Reason | None = Field(
        None, description="Why it ended; for one that is queued again, why its last attempt was void"
    )
    detail: str | None = Field(None, description="The reason in words")
    waiting: Waiting | None = Field(None, description="Why it waits; absent while it runs and once it has ended")
    priority: int = Field(ge=0, le=10)
    effective_priority: int = Field(description="Priority after aging, by which the queue is ordered")
    size_class: SizeClass = Field(description="Which queue it waits in")
    memory_limit: str = Field(description="As a Kubernetes quantity", examples=["256Mi"])
    memory_limit_bytes: int
    cpu_limit: str = Field(description="As a Kubernetes quantity", examples=["250m"])
    cpu_limit_millicores: int
    image: str
    labels: dict[str, str]
    timeout_seconds: int
    queue_timeout_seconds: int | None = None
    code_sha256: str = Field(description="Hex digest of the source text")
    seq: int = Field(description="Sequence number of its last event")
    attempt: int = Field(description="Which attempt at running it; 0 before the first")
    cancel_requested: bool
    submitted_at: datetime
    queued_at: datetime | None = None
    provisioning_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    queue_wait_seconds: float | None = Field(
        None, description="From queued to taken by a worker; absent while it waits"
    )
    run_seconds: float | None = Field(None, description="How long the code ran")
    exit_code: int | None = Field(None, description="Only if the code exited by itself; never guessed")
    signal: int | None = Field(None, description="Number of the signal that ended the code")
    exception_type: str | None = Field(
        None, description="Class of an uncaught exception, as the code's own process told it"
    )
    peak_memory_bytes: int | None = None
    cpu_seconds: float | None = None
    stdout: OutputInfo
    stderr: OutputInfo
    replay_of: str | None = Field(None, description="The evaluation that this one repeats")
    links: Links

    @classmethod
    def of(cls, record: EvaluationRecord, waiting: Waiting | None = None) -> Self:
        """Return the view of a record."""
        return cls(
            id=record.id,
            owner=record.owner,
            state=record.state,
            reason=record.reason,
            detail=record.detail,
            waiting=waiting,
            priority=record.priority,
            effective_priority=record.effective_priority,
            size_class=record.size_class,
            memory_limit=format_memory(record.resources.memory_bytes),
            memory_limit_bytes=record.resources.memory_bytes,
            cpu_limit=format_cpu(record.resources.cpu_millis),
            cpu_limit_millicores=record.resources.cpu_millis,
            image=record.image,
            labels=record.labels,
            timeout_seconds=record.timeout_seconds,
            queue_timeout_seconds=record.queue_timeout_seconds,
            code_sha256=record.code_sha256,
            seq=record.seq,
            attempt=record.attempt,
            cancel_requested=record.cancel_requested,
            submitted_at=record.submitted_at,
            queued_at=record.queued_at,
            provisioning_at=record.provisioning_at,
            started_at=record.started_at,
            finished_at=record.finished_at,
            queue_wait_seconds=_queue_wait(record),
            run_seconds=record.run_seconds,
            exit_code=record.exit_code,
            signal=record.signal,
            exception_type=record.exception_type,
            peak_memory_bytes=record.peak_memory_bytes,
            cpu_seconds=record.cpu_seconds,
            stdout=record.stdout,
            stderr=record.stderr,
            replay_of=record.replay_of,
            links=Links.of(record),
        )


def _queue_wait(record: EvaluationRecord) -> float | None:
    left = record.provisioning_at or record.finished_at
    if record.queued_at is None or left is None:
        return None
    return max(0.0, round((left - record.queued_at).total_seconds(), 6))


class EvaluationListView(View):
    """A page of evaluations, newest first."""

    items: list[EvaluationView]
    next: str | None = Field(None, description="Path of the next page; absent on the last")


class CodeView(View):
    """What an evaluation runs."""

    code: str
    stdin: str
    code_sha256: str = Field(description="Hex digest of the source text")


class EventsView(View):
    """The events of an evaluation so far, in order."""

    events: list[Event]


class EventPageView(View):
    """Events over all evaluations of the caller, in order."""

    events: list[Event]
    cursor: str | None = Field(None, description="Send it as `cursor` to read on")


# --- batches --------------------------------------------------------------------------------------------------------------


class BatchBody(Body):
    """Several requests at once."""

    evaluations: list[EvaluationRequest] = Field(
        min_length=1,
        description="At most `request.batch_items` of `/v1/limits`, 100 unless the installation says otherwise",
    )


class BatchStatus(StrEnum):
    """What became of an item."""

    ACCEPTED = "accepted"
    EXISTING = "existing"
    REJECTED = "rejected"


class BatchItem(View):
    """The outcome of one item: its evaluation, or the problem with it."""

    index: int = Field(ge=0, description="Place in the request, from 0")
    status: BatchStatus
    evaluation: EvaluationView | None = None
    problem: ProblemDetails | None = None


class BatchView(View):
    """The outcome of every item, in the order of the request."""

    items: list[BatchItem]
    accepted: int = Field(description="Items that have an evaluation now, new or existing")
    rejected: int


# --- capacity -------------------------------------------------------------------------------------------------------------


class ResourcesView(View):
    """Resources as quantities and as numbers."""

    memory_limit: str = Field(examples=["512Mi"])
    memory_limit_bytes: int
    cpu_limit: str = Field(examples=["500m"])
    cpu_limit_millicores: int

    @classmethod
    def of(cls, resources: Resources) -> Self:
        """Return the view of resources."""
        return cls(
            memory_limit=format_memory(resources.memory_bytes),
            memory_limit_bytes=resources.memory_bytes,
            cpu_limit=format_cpu(resources.cpu_millis),
            cpu_limit_millicores=resources.cpu_millis,
        )


class NodeView(View):
    """One node: what it has for sandboxes and what is free."""

    name: str
    runtime: str
    sandboxes: int = Field(description="Sandboxes on it now")
    total: ResourcesView
    free: ResourcesView

    @classmethod
    def of(cls, node: NodeCapacity) -> Self:
        """Return the view of a node."""
        free = ResourcesView(
            memory_limit=format_memory(node.free_memory_bytes),
            memory_limit_bytes=node.free_memory_bytes,
            cpu_limit=format_cpu(node.free_cpu_millis),
            cpu_limit_millicores=node.free_cpu_millis,
        )
        return cls(
            name=node.name,
            runtime=node.runtime,
            sandboxes=node.sandboxes,
            total=ResourcesView.of(node.total),
            free=free,
        )


class PriorityBand(View):
    """What waits at one priority."""

    priority: int
    waiting: int
    oldest_seconds: float = Field(description="How long the oldest has waited")


class QueueView(View):
    """The queue of one size class."""

    size_class: SizeClass
    waiting: int
    running: int
    estimated_wait_seconds: float | None = Field(
        None, description="For a request of the lowest priority made now; absent before any evaluation has ended"
    )
    priorities: list[PriorityBand] = Field(description="Highest first")


class CapacityView(View):
    """What is free and what waits."""

    nodes: list[NodeView]
    queues: list[QueueView]


class CapacityCheckBody(Body):
    """Resources to ask about; what is left out is that of the default profile."""

    profile: str | None = Field(None, description="Named CPU and memory limits", examples=["medium"])
    memory_limit: str | None = Field(None, description="A Kubernetes quantity", examples=["512Mi"])
    cpu_limit: str | None = Field(None, description="A Kubernetes quantity", examples=["500m"])


class CapacityCheckView(View):
    """Whether a request has room: now, later, or never."""

    fit: Fit
    reason: str | None = Field(None, description="Why not now, for a person")
    requested: ResourcesView
    largest: ResourcesView = Field(description="The largest request that can ever run here")


# --- the installation and its people --------------------------------------------------------------------------------------


class LimitsView(View):
    """What a request may ask for, and how much of it an owner may have."""

    request: Limits
    rate_per_second: float = Field(description="Submissions per second that an owner may make, averaged over a minute")
    max_active_per_owner: int = Field(description="Evaluations that an owner may have under way")


class MeView(View):
    """Whom the key belongs to."""

    owner: str
    role: Role
    key_id: str

    @classmethod
    def of(cls, who: Principal) -> Self:
        """Return the view of the caller."""
        return cls(owner=who.owner, role=who.role, key_id=who.key_id)


OWNER_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._@+-]{0,127}$"


class NewKeyBody(Body):
    """A key to be made."""

    owner: str = Field(pattern=OWNER_PATTERN, description="Whom the key's evaluations belong to", examples=["red-team"])
    role: Role = Role.SUBMITTER
    name: str = Field(
        "",
        max_length=200,
        pattern=r"^[^\x00-\x1f\x7f]*$",
        description="What the key is for",
        examples=["nightly suite"],
    )
    expires_in_days: float | None = Field(
        None,
        gt=0,
        le=3650,
        allow_inf_nan=False,
        strict=True,
        description="Days until the key stops working; absent: never",
    )


class NewKeyView(View):
    """A new key. The key itself is shown here and never again."""

    key: str = Field(examples=["crk_1a2b3c4d_..."])
    details: ApiKey


class KeyListView(View):
    """All keys, oldest first, without their secrets."""

    items: list[ApiKey]


# --- operation ------------------------------------------------------------------------------------------------------------


class DeadLetterListView(View):
    """A page of dead letters, newest first."""

    items: list[DeadLetter]
    total: int
    next: str | None = Field(None, description="Path of the next page; absent on the last")


class ReplayBody(Body):
    """Dead letters to run again."""

    ids: list[Annotated[int, Field(ge=1, le=2**63 - 1, strict=True)]] = Field(
        min_length=1, max_length=100, description="Ids of dead letters", examples=[[1, 2]]
    )


class ReplayItem(View):
    """The outcome of one dead letter."""

    id: int
    status: Literal["replayed", "rejected"]
    evaluation: EvaluationView | None = None
    problem: ProblemDetails | None = None


class ReplayView(View):
    """The outcome of every dead letter, in the order of the request."""

    items: list[ReplayItem]
    replayed: int
    rejected: int


class CleanupBody(Body):
    """Which ended evaluations to delete."""

    older_than_days: float = Field(
        ge=0, le=36_500, allow_inf_nan=False, strict=True, description="Ended at least this many days ago"
    )
    limit: int = Field(1000, ge=1, le=10_000, strict=True, description="Most evaluations to delete in this call")
    dry_run: bool = Field(False, strict=True, description="Only say what would be deleted")


class BrokerMoveBody(Body):
    """A step from one broker to the other."""

    action: BrokerAction = Field(description="`start`, `drain`, `finish` or `rollback`")
    share: int | None = Field(
        None, ge=1, le=100, strict=True, description="With `start`: percent of the work for the new broker"
    )


class MigrateBody(Body):
    """Where to move objects."""

    target: str = Field(
        max_length=200, pattern=r"^[\x21-\x7e]+$", description="Name of the object backend, from the usage report"
    )
    limit: int = Field(50, ge=1, le=1000, strict=True, description="Most objects to move in this call")


class ProblemPage(View):
    """What a problem means and what to do about it."""

    type: str
    title: str
    status: int
    advice: str
    retryable: bool = Field(description="Whether the same request may succeed later")

    @classmethod
    def of(cls, slug: str) -> Self:
        """Return the page of a problem of the catalogue."""
        kind = KINDS[slug]
        return cls(
            type=f"/problems/{slug}",
            title=kind.title,
            status=kind.status,
            advice=kind.advice,
            retryable=kind.retryable,
        )


def problem_details(body: dict[str, Any]) -> ProblemDetails:
    """Return a problem's body as the model that lists carry."""
    return ProblemDetails.model_validate(body)
