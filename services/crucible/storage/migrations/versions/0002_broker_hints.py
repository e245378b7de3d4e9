"""What a broker was told of each evaluation, when a lost attempt may be tried again, which broker is told; which events the bus has."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("evaluations", sa.Column("hint_priority", sa.SmallInteger(), nullable=True))
    op.add_column("evaluations", sa.Column("hint_broker", sa.Text(), nullable=True))
    op.add_column("evaluations", sa.Column("hinted_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("evaluations", sa.Column("retry_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("evaluations", sa.Column("claim_key", sa.Text(), nullable=True))
    op.create_index(
        "ix_evaluations_unhinted",
        "evaluations",
        [sa.literal_column("effective_priority DESC"), "number"],
        unique=False,
        postgresql_where=sa.text("state = 'queued' AND hint_priority IS DISTINCT FROM effective_priority"),
    )
    op.create_table(
        "broker_route",
        sa.Column("single", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("phase", sa.Text(), nullable=False),
        sa.Column("share", sa.SmallInteger(), nullable=False),
        sa.Column("changed_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("changed_by", sa.Text(), nullable=False),
        sa.CheckConstraint("single", name=op.f("ck_broker_route_single")),
        sa.CheckConstraint(
            "phase IN ('legacy', 'sharing', 'draining', 'finished')", name=op.f("ck_broker_route_phase")
        ),
        sa.CheckConstraint("share BETWEEN 0 AND 100", name=op.f("ck_broker_route_share")),
        sa.PrimaryKeyConstraint("single", name=op.f("pk_broker_route")),
    )
    op.add_column("outbox", sa.Column("told", sa.Boolean(), server_default=sa.text("false"), nullable=False))
    op.create_index("ix_outbox_untold", "outbox", ["event_id"], unique=False, postgresql_where=sa.text("NOT told"))


def downgrade() -> None:
    op.drop_index("ix_outbox_untold", table_name="outbox")
    op.drop_column("outbox", "told")
    op.drop_table("broker_route")
    op.drop_index("ix_evaluations_unhinted", table_name="evaluations")
    for column in ("claim_key", "retry_at", "hinted_at", "hint_broker", "hint_priority"):
        op.drop_column("evaluations", column)
