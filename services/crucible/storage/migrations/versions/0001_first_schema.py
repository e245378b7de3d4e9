"""The first schema: evaluations, their payloads, events, output and objects, keys, dead letters."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql
from sqlalchemy.types import UserDefinedType

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_APPEND_ONLY = Path(__file__).parents[1] / "append_only.sql"


class _TransactionId(UserDefinedType[int]):
    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        return "XID8"


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("secret_sha256", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_api_keys")),
    )
    op.create_table(
        "evaluations",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("number", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.Column("priority", sa.SmallInteger(), nullable=False),
        sa.Column("effective_priority", sa.SmallInteger(), nullable=False),
        sa.Column("size_class", sa.Text(), nullable=False),
        sa.Column("cpu_millis", sa.Integer(), nullable=False),
        sa.Column("memory_bytes", sa.BigInteger(), nullable=False),
        sa.Column("image", sa.Text(), nullable=False),
        sa.Column("labels", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("timeout_seconds", sa.Integer(), nullable=False),
        sa.Column("queue_timeout_seconds", sa.Integer(), nullable=True),
        sa.Column("code_sha256", sa.LargeBinary(), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), server_default="0", nullable=False),
        sa.Column("losses", sa.Integer(), server_default="0", nullable=False),
        sa.Column("submitted_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("queued_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("queue_deadline", sa.DateTime(timezone=True), nullable=True),
        sa.Column("provisioning_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("instance", sa.Text(), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("sandbox", sa.Text(), nullable=True),
        sa.Column("cancel_reason", sa.Text(), nullable=True),
        sa.Column("cancel_actor", sa.Text(), nullable=True),
        sa.Column("exit_code", sa.Integer(), nullable=True),
        sa.Column("signal", sa.Integer(), nullable=True),
        sa.Column("exception_type", sa.Text(), nullable=True),
        sa.Column("peak_memory_bytes", sa.BigInteger(), nullable=True),
        sa.Column("cpu_seconds", sa.Double(), nullable=True),
        sa.Column("run_seconds", sa.Double(), nullable=True),
        sa.Column("output_batches", sa.Integer(), server_default="0", nullable=False),
        sa.Column("output_frames", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("stdout_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("stderr_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("inline_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("stdout_sha256", sa.LargeBinary(), nullable=True),
        sa.Column("stderr_sha256", sa.LargeBinary(), nullable=True),
        sa.Column("output_unsettled", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column("request_sha256", sa.Text(), nullable=False),
        sa.Column("traceparent", sa.Text(), nullable=True),
        sa.Column("replay_of", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "(state IN ('provisioning', 'running')) = (lease_until IS NOT NULL)", name=op.f("ck_evaluations_lease")
        ),
        sa.CheckConstraint("size_class IN ('small', 'medium', 'large')", name=op.f("ck_evaluations_size_class")),
        sa.CheckConstraint(
            "state IN ('submitted', 'queued', 'provisioning', 'running', 'completed', 'failed', 'timeout', 'cancelled')",
            name=op.f("ck_evaluations_state"),
        ),
        sa.CheckConstraint(
            "effective_priority BETWEEN priority AND 10", name=op.f("ck_evaluations_effective_priority")
        ),
        sa.CheckConstraint("priority BETWEEN 0 AND 10", name=op.f("ck_evaluations_priority")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_evaluations")),
    )
    op.create_index(
        "ix_evaluations_active",
        "evaluations",
        ["owner"],
        unique=False,
        postgresql_where=sa.text("state IN ('submitted', 'queued', 'provisioning', 'running')"),
    )
    op.create_index(
        "ix_evaluations_finished",
        "evaluations",
        ["finished_at"],
        unique=False,
        postgresql_where=sa.text("finished_at IS NOT NULL"),
    )
    op.create_index(
        "ix_evaluations_held",
        "evaluations",
        ["worker"],
        unique=False,
        postgresql_where=sa.text("state IN ('provisioning', 'running')"),
    )
    op.create_index(
        "ix_evaluations_labels",
        "evaluations",
        ["labels"],
        unique=False,
        postgresql_using="gin",
        postgresql_ops={"labels": "jsonb_path_ops"},
        postgresql_where=sa.text("labels <> '{}'::jsonb"),
    )
    op.create_index("ix_evaluations_owner_submitted", "evaluations", ["owner", "submitted_at", "number"], unique=False)
    op.create_index(
        "ix_evaluations_queue",
        "evaluations",
        ["size_class", sa.literal_column("effective_priority DESC"), "number"],
        unique=False,
        postgresql_where=sa.text("state = 'queued'"),
    )
    op.create_index(
        "ix_evaluations_queue_deadline",
        "evaluations",
        ["queue_deadline"],
        unique=False,
        postgresql_where=sa.text("state = 'queued' AND queue_deadline IS NOT NULL"),
    )
    op.create_index("ix_evaluations_state_submitted", "evaluations", ["state", "submitted_at", "number"], unique=False)
    op.create_index("ix_evaluations_submitted", "evaluations", ["submitted_at", "number"], unique=False)
    op.create_index(
        "ix_evaluations_unsettled", "evaluations", ["id"], unique=False, postgresql_where=sa.text("output_unsettled")
    )
    op.create_index(
        "uq_evaluations_owner_idempotency_key",
        "evaluations",
        ["owner", "idempotency_key"],
        unique=True,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    )
    op.create_table(
        "object_garbage",
        sa.Column("backend", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("backend", "key", name=op.f("pk_object_garbage")),
    )
    op.create_table(
        "objects",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("backend", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("copy_failures", sa.Integer(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_objects")),
        sa.UniqueConstraint("key", name=op.f("uq_objects_key")),
    )
    op.create_index("ix_objects_backend", "objects", ["backend"], unique=False)
    op.create_table(
        "outbox",
        sa.Column("event_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("evaluation_id", sa.Text(), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("event_id", name=op.f("pk_outbox")),
    )
    op.create_table(
        "dead_letters",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("evaluation_id", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("replayed_as", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["evaluation_id"], ["evaluations.id"], name=op.f("fk_dead_letters_evaluation_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dead_letters")),
        sa.UniqueConstraint("evaluation_id", name=op.f("uq_dead_letters_evaluation_id")),
    )
    op.create_table(
        "events",
        sa.Column("evaluation_id", sa.Text(), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("xact", _TransactionId(), server_default=sa.text("pg_current_xact_id()"), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.Column("data", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.ForeignKeyConstraint(["evaluation_id"], ["evaluations.id"], name=op.f("fk_events_evaluation_id")),
        sa.PrimaryKeyConstraint("evaluation_id", "seq", name=op.f("pk_events")),
    )
    op.create_index("ix_events_stream", "events", ["xact", "id"], unique=False)
    op.create_table(
        "output_chunks",
        sa.Column("evaluation_id", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("first_batch", sa.Integer(), nullable=False),
        sa.Column("batches", sa.Integer(), nullable=False),
        sa.Column("first_frame", sa.BigInteger(), nullable=False),
        sa.Column("frames", sa.Integer(), nullable=False),
        sa.Column("stdout_start", sa.BigInteger(), nullable=False),
        sa.Column("stdout_length", sa.BigInteger(), nullable=False),
        sa.Column("stderr_start", sa.BigInteger(), nullable=False),
        sa.Column("stderr_length", sa.BigInteger(), nullable=False),
        sa.Column("stdout", sa.LargeBinary(), nullable=True),
        sa.Column("stderr", sa.LargeBinary(), nullable=True),
        sa.Column("frame_index", sa.LargeBinary(), nullable=True),
        sa.Column("object_id", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("(object_id IS NULL) = (frame_index IS NOT NULL)", name=op.f("ck_output_chunks_place")),
        sa.ForeignKeyConstraint(["evaluation_id"], ["evaluations.id"], name=op.f("fk_output_chunks_evaluation_id")),
        sa.ForeignKeyConstraint(["object_id"], ["objects.id"], name=op.f("fk_output_chunks_object_id")),
        sa.PrimaryKeyConstraint("evaluation_id", "attempt", "first_batch", name=op.f("pk_output_chunks")),
    )
    op.create_index(
        "ix_output_chunks_object_id",
        "output_chunks",
        ["object_id"],
        unique=False,
        postgresql_where=sa.text("object_id IS NOT NULL"),
    )
    op.create_table(
        "payloads",
        sa.Column("evaluation_id", sa.Text(), nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("stdin", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["evaluation_id"], ["evaluations.id"], name=op.f("fk_payloads_evaluation_id")),
        sa.PrimaryKeyConstraint("evaluation_id", name=op.f("pk_payloads")),
    )

    # Outputs are read by range: stored uncompressed, PostgreSQL can cut a piece out without reading the whole.
    for column in ("stdout", "stderr", "frame_index"):
        op.execute(f"ALTER TABLE output_chunks ALTER COLUMN {column} SET STORAGE EXTERNAL")
    # Rows that change or go soon: room for updates beside them, and vacuum by count rather than by share of the table.
    op.execute(
        "ALTER TABLE evaluations SET (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000)"
    )
    op.execute("ALTER TABLE outbox SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000)")
    op.execute(
        "ALTER TABLE output_chunks SET (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 1000)"
    )
    statements = "\n".join(line for line in _APPEND_ONLY.read_text().splitlines() if not line.startswith("--"))
    for statement in statements.split("\n\n"):
        op.execute(statement)


def downgrade() -> None:
    for table in (
        "payloads",
        "output_chunks",
        "events",
        "dead_letters",
        "outbox",
        "objects",
        "object_garbage",
        "evaluations",
        "api_keys",
    ):
        op.drop_table(table)
    op.execute("DROP FUNCTION refuse_to_change_events()")
