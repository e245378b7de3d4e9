"""What the services say to each other over HTTP: the bodies of the internal calls, and the records that the API shows.

Internal paths begin with `/internal` and need the platform's own token; no one outside may reach them.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from crucible.evaluation import EvaluationSpec, Reason, Resources, State
from crucible.events import Event
from crucible.limits import SizeClass
from crucible.outcome import Outcome


class Frozen(BaseModel):
    """A message: immutable, and strict about what it holds."""

    model_config = ConfigDict(frozen=True)


# --- people ---------------------------------------------------------------------------------------------------------------


class Role(StrEnum):
    """What a key may do. Each role may do all that the one before it may."""

    SUBMITTER = "submitter"
    OPERATOR = "operator"
    ADMIN = "admin"

    def covers(self, needed: Role) -> bool:
        """Whether this role may do what `needed` may."""
        order = list(Role)
        return order.index(self) >= order.index(needed)


class ApiKey(Frozen):
    """A key as it is stored: its secret only as a hash."""

    key_id: str
    owner: str
    role: Role
    name: str = ""
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None


class NewApiKey(Frozen):
    """A key to be stored. `secret_sha256` is the hex digest of the secret, which storage never sees."""

    key_id: str
    owner: str
    role: Role
    name: str = ""
    secret_sha256: str
    expires_at: datetime | None = None


# --- evaluations ----------------------------------------------------------------------------------------------------------


class OutputInfo(Frozen):
    """What is known of one output stream. `sha256` is there once the evaluation has ended."""

    size: int = Field(0, ge=0, description="Bytes so far")
    sha256: str | None = None


class EvaluationRecord(Frozen):
    """An evaluation as storage knows it, without its code."""

    id: str
    owner: str
    state: State
    reason: Reason | None = None
    detail: str | None = None
    priority: int
    effective_priority: int = Field(description="Priority after aging; what the queue orders by")
    size_class: SizeClass
    resources: Resources
    image: str
    labels: dict[str, str]
    timeout_seconds: int
    queue_timeout_seconds: int | None
    code_sha256: str
    seq: int = Field(ge=1, description="Sequence number of its last event")
    attempt: int = Field(ge=0)
    submitted_at: datetime
    queued_at: datetime | None
    provisioning_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    cancel_requested: bool = False
    exit_code: int | None = None
    signal: int | None = None
    exception_type: str | None = None
    peak_memory_bytes: int | None = None
    cpu_seconds: float | None = None
    run_seconds: float | None = None
    stdout: OutputInfo = OutputInfo()
    stderr: OutputInfo = OutputInfo()
    replay_of: str | None = None
    retry_at: datetime | None = Field(None, description="It waits, was lost before, and is not tried again before this")


class Payload(Frozen):
    """What an evaluation runs."""

    code: str
    stdin: str


class NewEvaluation(Frozen):
    """An accepted request on its way into the table. Storing the same `id` twice is one evaluation."""

    id: str
    owner: str
    spec: EvaluationSpec
    idempotency_key: str | None = None
    request_sha256: str = Field(
        description="Hex digest of the canonical request, so that a reused key with another body is seen"
    )
    traceparent: str | None = None
    replay_of: str | None = None


class NewEvaluations(Frozen):
    """Several accepted requests, stored in one transaction."""

    items: list[NewEvaluation]
    max_active: int | None = Field(
        None, description="Most evaluations of this owner that may be under way, these included; None: no quota"
    )


class StoredStatus(StrEnum):
    """What became of a `NewEvaluation`."""

    CREATED = "created"
    EXISTING = "existing"
    KEY_CONFLICT = "key_conflict"
    OVER_QUOTA = "over_quota"


class Stored(Frozen):
    """The answer to one `NewEvaluation`. `evaluation` is the new or the earlier one; None if over quota."""

    status: StoredStatus
    evaluation: EvaluationRecord | None
    active: int | None = Field(None, description="The owner's evaluations under way, if that was the obstacle")


class StoredList(Frozen):
    """One answer per item, in their order."""

    results: list[Stored]


class EvaluationPage(Frozen):
    """A page of a filtered list, newest first."""

    items: list[EvaluationRecord]
    next_cursor: str | None = None


class EventList(Frozen):
    """Events in order; `cursor` resumes a stream over all evaluations."""

    events: list[Event]
    cursor: str | None = None


class CancelRequest(Frozen):
    """Who wants an evaluation stopped."""

    actor: str
    reason: Reason = Reason.CANCELLED_BY_USER


class CancelResult(Frozen):
    """After a cancel: the record, and whether a sandbox may exist that the dispatcher must end."""

    evaluation: EvaluationRecord
    sandbox: bool


# --- queue ----------------------------------------------------------------------------------------------------------------


class ClaimRequest(Frozen):
    """A worker asks for work: at most `wanted` per size class, waiting up to `wait_seconds` for the first."""

    worker: str
    wanted: dict[SizeClass, int]
    wait_seconds: float = Field(0.0, ge=0, le=60)


class Claim(Frozen):
    """Work handed to a worker: it is `provisioning` now, and the worker's for as long as it renews the lease."""

    evaluation_id: str
    attempt: int
    owner: str
    spec: EvaluationSpec
    lease_seconds: float
    traceparent: str | None = None


class ClaimList(Frozen):
    """Claims, highest priority first within a size class."""

    claims: list[Claim]


class ClaimOne(Frozen):
    """A worker that was told of an evaluation asks for it."""

    worker: str
    key: str = Field(description="Names this one asking, so that asking again after a lost answer gets the same claim")


class ClaimAnswer(Frozen):
    """The claim, or none: the evaluation does not wait any more, and whoever was told of it can forget it."""

    claim: Claim | None = None
    state: State | None = Field(
        None, description="State of the evaluation otherwise; None if there is no such evaluation"
    )


class Held(Frozen):
    """An attempt that a worker holds, or that someone watches."""

    evaluation_id: str
    attempt: int


class LeaseRenewal(Frozen):
    """A worker says that it lives and what it holds."""

    worker: str
    held: list[Held]


class LeaseAnswer(Frozen):
    """What a worker must let go of: cancelled ones, and ones that are no longer its own."""

    cancelled: list[str] = []
    lost: list[str] = []


class Sustaining(Frozen):
    """Someone who watches sandboxes says which attempts are seen through, whatever becomes of the workers that hold them."""

    watched: list[Held]


class Sustained(Frozen):
    """What came of it."""

    leases: int = Field(description="Leases that nobody else had renewed for half of their length")
    lease_seconds: float


class Release(Frozen):
    """A worker gives an attempt back unrun (drain, or no capacity): it is queued again at its old place."""

    worker: str
    attempt: int
    detail: str


class Running(Frozen):
    """The sandbox has started the code."""

    attempt: int
    actor: str
    sandbox: str = Field(description="Name of the sandbox, for people who look for it")


class Finish(Frozen):
    """The end of an attempt."""

    attempt: int
    actor: str
    outcome: Outcome
    started_at: datetime | None = None
    collected: bool = Field(
        False, description="All output is in storage, and a cluster keeps something of the sandbox that may go now"
    )


class OutputPosition(Frozen):
    """How much output storage has of an attempt."""

    frames: int


class HeldAttempt(Frozen):
    """An attempt under way."""

    evaluation_id: str
    attempt: int
    state: State
    since: datetime = Field(description="When it came into this state")


class HeldPage(Frozen):
    """Attempts under way, by id. `after` asks for the next page; None: this is the last."""

    items: list[HeldAttempt]
    after: str | None = None


class QueueBand(Frozen):
    """What waits at one priority of one size class."""

    size_class: SizeClass
    priority: int
    waiting: int
    oldest_seconds: float


class QueueReport(Frozen):
    """What waits, and how fast it moves."""

    bands: list[QueueBand]
    running: dict[SizeClass, int]
    mean_hold_seconds: dict[SizeClass, float] = Field(
        description="Mean time that recent evaluations held a slot, per size class"
    )


class QueuePosition(Frozen):
    """Where a queued evaluation stands among its size class; 1 is next. 0 when it is not queued."""

    position: int
    size_class: SizeClass
    mean_hold_seconds: float | None


class Statistics(Frozen):
    """Aggregates over evaluations submitted since a time."""

    total: int
    by_state: dict[State, int]
    by_reason: dict[Reason, int]
    by_priority: dict[int, int]
    success_rate: float | None
    wait_seconds_p50: float | None
    wait_seconds_p95: float | None
    run_seconds_p50: float | None
    run_seconds_p95: float | None
    cpu_seconds: float
    last_24h: int


class DeadLetter(Frozen):
    """An evaluation that the platform could not run within its attempts."""

    id: int
    evaluation_id: str
    owner: str
    reason: Reason
    detail: str | None
    attempts: int
    created_at: datetime
    replayed_as: str | None = None


class DeadLetterPage(Frozen):
    """Dead letters, newest first."""

    items: list[DeadLetter]
    total: int
    next_cursor: str | None = None


# --- storage upkeep -------------------------------------------------------------------------------------------------------


class BackendUsage(Frozen):
    """What one object backend holds."""

    backend: str
    objects: int
    bytes: int


class OwnerUsage(Frozen):
    """What one owner has stored and used."""

    owner: str
    evaluations: int
    output_bytes: int
    cpu_seconds: float


class StorageUsage(Frozen):
    """Where the bytes are."""

    primary: str
    database_bytes: int
    inline_output_bytes: int
    backends: list[BackendUsage]
    owners: list[OwnerUsage]


class MigrateRequest(Frozen):
    """Move up to `limit` objects to the named backend; call again until nothing remains."""

    target: str
    limit: int = Field(50, ge=1, le=1000)


class MigrateResult(Frozen):
    """What a step of the migration did. Each object moved was read back and its sha256 compared."""

    moved: int
    moved_bytes: int
    remaining: int
    failed: list[str] = Field(
        default_factory=list, description="Objects whose content did not match, left where they are"
    )


class CleanupRequest(Frozen):
    """Delete ended evaluations older than this."""

    older_than_days: float = Field(ge=0)
    limit: int = Field(1000, ge=1, le=10_000)
    dry_run: bool = False


class CleanupResult(Frozen):
    """What was, or would be, deleted."""

    evaluations: int
    objects: int
    bytes: int
    dry_run: bool
    remaining: int = 0


# --- broker -----------------------------------------------------------------------------------------------------------------


class BrokerPhase(StrEnum):
    """Where the move from one broker to another stands."""

    LEGACY = "legacy"
    SHARING = "sharing"
    DRAINING = "draining"
    FINISHED = "finished"


class BrokerAction(StrEnum):
    """A step of that move."""

    START = "start"
    DRAIN = "drain"
    FINISH = "finish"
    ROLLBACK = "rollback"


class BrokerMove(Frozen):
    """Take a step."""

    action: BrokerAction
    share: int | None = Field(None, ge=1, le=100, description="With start: percent of the work for the new broker")
    actor: str


class BrokerSide(Frozen):
    """One broker: what it holds, and what the table says of it."""

    role: str = Field(description="`new`, or `legacy` for the one that is being left")
    kind: str = Field(description="`rabbitmq` or `redis`")
    url: str = Field(description="Its URL without the password")
    up: bool
    problem: str | None = Field(None, description="Why it cannot be asked, and what to do about it")
    queued: dict[SizeClass, int] | None = Field(description="Messages that no worker holds; absent while it is not up")
    consumers: dict[SizeClass, int] | None = Field(None, description="Workers that consume; absent where it cannot say")
    waiting: int = Field(description="Waiting evaluations that it has been told of")
    in_flight: int = Field(description="Evaluations that workers hold and were told of through it")


class BrokerReport(Frozen):
    """The brokers of the installation, and where the move between two of them stands."""

    brokers: list[BrokerSide] = Field(description="Empty where the database itself is the queue")
    untold: int = Field(description="Waiting evaluations that no broker has been told of yet")
    phase: BrokerPhase | None = Field(None, description="Absent unless there are two brokers")
    share: int | None = Field(None, description="Percent of the work that goes to the new broker")
    changed_at: datetime | None = None
    changed_by: str | None = None
    drained: bool | None = Field(None, description="Whether the legacy broker holds nothing any more")
    next: str = Field(description="What is left to do, in words")
    notes: list[str] = Field(default_factory=list, description="What the last step could not do, and what that means")


# --- sandboxes ------------------------------------------------------------------------------------------------------------


class SandboxRequest(Frozen):
    """Make the sandbox of an attempt. Asking twice for one evaluation and attempt gives the one sandbox."""

    attempt: int
    worker: str
    owner: str
    spec: EvaluationSpec
    traceparent: str | None = None


class SandboxPhase(StrEnum):
    """Where a sandbox is."""

    STARTING = "starting"
    RUNNING = "running"
    FINISHED = "finished"


class SandboxStatus(Frozen):
    """A sandbox as the dispatcher knows it."""

    evaluation_id: str
    attempt: int
    runtime: str
    phase: SandboxPhase
    outcome: Outcome | None = None
    durable: bool = Field(
        False, description="It goes on without the dispatcher that made it, and another one answers for it"
    )


class Fit(StrEnum):
    """Whether a request has room."""

    NOW = "now"
    LATER = "later"
    NEVER = "never"


class CapacityCheck(Frozen):
    """Is there room for this?"""

    resources: Resources


class CapacityAnswer(Frozen):
    """The answer, with the reason in words where it is not `now`."""

    fit: Fit
    reason: str | None = None
    largest: Resources = Field(description="The largest request that any node could ever take")


class NodeCapacity(Frozen):
    """One node: what it has for sandboxes, and what is free now."""

    name: str
    runtime: str
    total: Resources
    free_cpu_millis: int
    free_memory_bytes: int
    sandboxes: int


class CapacityReport(Frozen):
    """All nodes."""

    nodes: list[NodeCapacity]
