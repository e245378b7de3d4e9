"""The schema of the database, as SQLAlchemy tables: what migrations are compared with and what lists are queried from.

PostgreSQL alone decides (constraints, row locks, sequences); nothing here holds behaviour. Statements that run for every
evaluation are written as SQL beside the code that runs them; this module is where their names are defined.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import UserDefinedType

from crucible.contracts import BrokerPhase
from crucible.evaluation import ACTIVE_STATES, HELD_STATES, State
from crucible.limits import PRIORITY_MAX, PRIORITY_MIN, SizeClass

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class TransactionId(UserDefinedType[int]):
    """PostgreSQL's `xid8`: a transaction's number, 64 bits wide, so that it never wraps."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        """Return the type's name in SQL."""
        return "XID8"


def _one_of(column: str, values: Iterable[str]) -> str:
    quoted = ", ".join(f"'{value}'" for value in values)
    return f"{column} IN ({quoted})"


def _in_order(states: Iterable[State]) -> list[State]:
    chosen = frozenset(states)
    return [state for state in State if state in chosen]


ACTIVE = _one_of("state", _in_order(ACTIVE_STATES))
HELD = _one_of("state", _in_order(HELD_STATES))
QUEUED = f"state = '{State.QUEUED}'"
# What waits and of which the broker has not been told at its present priority.
UNHINTED = f"{QUEUED} AND hint_priority IS DISTINCT FROM effective_priority"
# What was lost a moment ago is tried again after a pause.
DUE = "(retry_at IS NULL OR retry_at <= now())"
_MOMENT = DateTime(timezone=True)

evaluations = Table(
    "evaluations",
    metadata,
    Column("id", Text, primary_key=True),
    # Order of submission: what the queue and the lists order by among equals. A requeued evaluation keeps it, and so its place.
    Column("number", BigInteger, Identity(always=True), nullable=False),
    Column("owner", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("reason", Text),
    Column("detail", Text),
    Column("priority", SmallInteger, nullable=False),
    Column("effective_priority", SmallInteger, nullable=False),
    Column("size_class", Text, nullable=False),
    Column("cpu_millis", Integer, nullable=False),
    Column("memory_bytes", BigInteger, nullable=False),
    Column("image", Text, nullable=False),
    Column("labels", JSONB, nullable=False),
    Column("timeout_seconds", Integer, nullable=False),
    Column("queue_timeout_seconds", Integer),
    Column("code_sha256", LargeBinary, nullable=False),
    # Number of its last event. Every transition raises it, so it is the version that compare-and-set compares.
    Column("seq", Integer, nullable=False),
    # The fencing token: raised by every claim, never used twice, and carried by every write of whoever holds the evaluation.
    Column("attempt", Integer, nullable=False, server_default="0"),
    # Attempts that the platform lost; these are what `max_attempts` counts. A released attempt is not among them.
    Column("losses", Integer, nullable=False, server_default="0"),
    Column("submitted_at", _MOMENT, nullable=False, server_default=func.now()),
    Column("queued_at", _MOMENT, nullable=False, server_default=func.now()),
    Column("queue_deadline", _MOMENT),
    Column("provisioning_at", _MOMENT),
    Column("started_at", _MOMENT),
    Column("finished_at", _MOMENT),
    Column("worker", Text),
    Column("instance", Text),
    Column("lease_until", _MOMENT),
    Column("sandbox", Text),
    Column("cancel_reason", Text),
    Column("cancel_actor", Text),
    Column("exit_code", Integer),
    Column("signal", Integer),
    Column("exception_type", Text),
    Column("peak_memory_bytes", BigInteger),
    Column("cpu_seconds", Double),
    Column("run_seconds", Double),
    # Output of the present attempt. `inline_bytes` is the part of it that is still in this database.
    Column("output_frames", BigInteger, nullable=False, server_default="0"),
    Column("stdout_bytes", BigInteger, nullable=False, server_default="0"),
    Column("stderr_bytes", BigInteger, nullable=False, server_default="0"),
    Column("inline_bytes", BigInteger, nullable=False, server_default="0"),
    Column("stdout_sha256", LargeBinary),
    Column("stderr_sha256", LargeBinary),
    # It ended while the object store did not take its output; the upkeep moves it there later.
    Column("output_unsettled", Boolean, nullable=False, server_default=text("false")),
    Column("idempotency_key", Text),
    Column("request_sha256", Text, nullable=False),
    Column("traceparent", Text),
    Column("replay_of", Text),
    # The last message about it that a broker confirmed: its priority, which broker, and when. NULL: none that counts.
    Column("hint_priority", SmallInteger),
    Column("hint_broker", Text),
    Column("hinted_at", _MOMENT),
    # A lost attempt is not tried again before this.
    Column("retry_at", _MOMENT),
    # Names the one asking that led to the present claim, so that asking again finds it (claims by id only).
    Column("claim_key", Text),
    CheckConstraint(_one_of("state", State), "state"),
    CheckConstraint(_one_of("size_class", SizeClass), "size_class"),
    CheckConstraint(f"priority BETWEEN {PRIORITY_MIN} AND {PRIORITY_MAX}", "priority"),
    CheckConstraint(f"effective_priority BETWEEN priority AND {PRIORITY_MAX}", "effective_priority"),
    # Held means that someone holds it until a time; the reconciler finds by these what was lost.
    CheckConstraint(f"({HELD}) = (lease_until IS NOT NULL)", "lease"),
    Index("uq_evaluations_owner_idempotency_key", "owner", "idempotency_key", unique=True, postgresql_where=text("idempotency_key IS NOT NULL")),
    # The queue. Only what waits is in it, so that claiming costs the same however much has ended or waits behind.
    Index("ix_evaluations_queue", "size_class", text("effective_priority DESC"), "number", postgresql_where=text(QUEUED)),
    # What the publisher of hints looks for, in the order in which it publishes.
    Index("ix_evaluations_unhinted", text("effective_priority DESC"), "number", postgresql_where=text(UNHINTED)),
    Index("ix_evaluations_queue_deadline", "queue_deadline", postgresql_where=text(f"{QUEUED} AND queue_deadline IS NOT NULL")),
    # Not over lease_until: renewing a lease must not touch any index.
    Index("ix_evaluations_held", "worker", postgresql_where=text(HELD)),
    Index("ix_evaluations_active", "owner", postgresql_where=text(ACTIVE)),
    Index("ix_evaluations_submitted", "submitted_at", "number"),
    Index("ix_evaluations_owner_submitted", "owner", "submitted_at", "number"),
    Index("ix_evaluations_state_submitted", "state", "submitted_at", "number"),
    Index("ix_evaluations_finished", "finished_at", postgresql_where=text("finished_at IS NOT NULL")),
    Index("ix_evaluations_unsettled", "id", postgresql_where=text("output_unsettled")),
    Index(
        "ix_evaluations_labels",
        "labels",
        postgresql_using="gin",
        postgresql_ops={"labels": "jsonb_path_ops"},
        postgresql_where=text("labels <> '{}'::jsonb"),
    ),
)  # fmt: skip

payloads = Table(
    "payloads",
    metadata,
    Column("evaluation_id", Text, ForeignKey(evaluations.c.id), primary_key=True),
    Column("code", Text, nullable=False),
    Column("stdin", Text, nullable=False),
)

# Append-only: a trigger refuses UPDATE, and DELETE outside of retention (migrations/append_only.sql).
events = Table(
    "events",
    metadata,
    Column("evaluation_id", Text, ForeignKey(evaluations.c.id), primary_key=True),
    Column("seq", Integer, primary_key=True),
    Column("id", BigInteger, Identity(always=True), nullable=False),
    # With `id` it orders all events such that what is below the oldest open transaction can no longer gain a predecessor.
    Column("xact", TransactionId, nullable=False, server_default=func.pg_current_xact_id()),
    Column("type", Text, nullable=False),
    Column("at", _MOMENT, nullable=False),
    Column("owner", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("reason", Text),
    Column("detail", Text),
    Column("data", JSONB, nullable=False),
    Index("ix_events_stream", "xact", "id"),
)

# Events not yet handed over; written with the event, deleted once the bus and, where there is one, the event stream have taken it.
outbox = Table(
    "outbox",
    metadata,
    Column("event_id", BigInteger, primary_key=True, autoincrement=False),
    Column("evaluation_id", Text, nullable=False),
    Column("seq", Integer, nullable=False),
    # The bus has it; only the event stream, which is away, has not.
    Column("told", Boolean, nullable=False, server_default=text("false")),
    Index("ix_outbox_untold", "event_id", postgresql_where=text("NOT told")),
)

# The ledger of the object store: what is in it, where, and what it must hash to.
objects = Table(
    "objects",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("key", Text, nullable=False, unique=True),
    Column("backend", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("sha256", LargeBinary, nullable=False),
    Column("created_at", _MOMENT, nullable=False, server_default=func.now()),
    # Copies to another backend that did not match; those go last, so that they do not block a migration.
    Column("copy_failures", Integer, nullable=False, server_default="0"),
    Index("ix_objects_backend", "backend"),
)

# Copies in a backend that nothing refers to, or that nothing may come to refer to: an entry is written before each copy is,
# and taken out by the transaction that makes the copy count.
object_garbage = Table(
    "object_garbage",
    metadata,
    Column("backend", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("due_at", _MOMENT, nullable=False),
)

# Output in order of arrival, the streams apart. A chunk is one batch kept here, or many batches in one object; both hold
# standard output, then standard error, then one frame header per frame (crucible.frames.HEADER) to merge them again.
output_chunks = Table(
    "output_chunks",
    metadata,
    Column("evaluation_id", Text, ForeignKey(evaluations.c.id), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("first_frame", BigInteger, primary_key=True, autoincrement=False),
    Column("frames", Integer, nullable=False),
    Column("stdout_start", BigInteger, nullable=False),
    Column("stdout_length", BigInteger, nullable=False),
    Column("stderr_start", BigInteger, nullable=False),
    Column("stderr_length", BigInteger, nullable=False),
    Column("stdout", LargeBinary),
    Column("stderr", LargeBinary),
    Column("frame_index", LargeBinary),
    Column("object_id", BigInteger, ForeignKey(objects.c.id)),
    CheckConstraint("(object_id IS NULL) = (frame_index IS NOT NULL)", "place"),
    Index("ix_output_chunks_object_id", "object_id", postgresql_where=text("object_id IS NOT NULL")),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", Text, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("secret_sha256", Text, nullable=False),
    Column("created_at", _MOMENT, nullable=False, server_default=func.now()),
    Column("expires_at", _MOMENT),
    Column("revoked_at", _MOMENT),
)

dead_letters = Table(
    "dead_letters",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("evaluation_id", Text, ForeignKey(evaluations.c.id), nullable=False, unique=True),
    Column("owner", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("detail", Text),
    Column("attempts", Integer, nullable=False),
    Column("created_at", _MOMENT, nullable=False, server_default=func.now()),
    Column("replayed_as", Text),
)

# Which broker hints go to while one broker is being left for another; at most one row, none before the first migration.
broker_route = Table(
    "broker_route",
    metadata,
    Column("single", Boolean, primary_key=True, server_default=text("true")),
    Column("phase", Text, nullable=False),
    # Percent of what waits whose hints go to the new broker.
    Column("share", SmallInteger, nullable=False),
    Column("changed_at", _MOMENT, nullable=False, server_default=func.now()),
    Column("changed_by", Text, nullable=False),
    CheckConstraint("single", "single"),
    CheckConstraint(_one_of("phase", BrokerPhase), "phase"),
    CheckConstraint("share BETWEEN 0 AND 100", "share"),
)
