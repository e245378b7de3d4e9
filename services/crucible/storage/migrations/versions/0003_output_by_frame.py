"""Output is placed by the number of its first frame, whoever ships it; batches are not counted any more."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_KEY = "pk_output_chunks"


def upgrade() -> None:
    # An empty batch left a chunk that holds no frame, and so has no place of its own.
    op.execute("DELETE FROM output_chunks WHERE frames = 0")
    op.drop_constraint(_KEY, "output_chunks")
    op.drop_column("output_chunks", "first_batch")
    op.drop_column("output_chunks", "batches")
    op.create_primary_key(_KEY, "output_chunks", ["evaluation_id", "attempt", "first_frame"])
    op.drop_column("evaluations", "output_batches")


def downgrade() -> None:
    op.add_column("evaluations", sa.Column("output_batches", sa.Integer(), server_default="0", nullable=False))
    # Any numbering in order will do: each chunk counts as one batch.
    op.execute(
        """UPDATE evaluations AS e SET output_batches = c.n
             FROM (SELECT evaluation_id, attempt, count(*) AS n FROM output_chunks GROUP BY 1, 2) AS c
            WHERE c.evaluation_id = e.id AND c.attempt = e.attempt"""
    )
    op.drop_constraint(_KEY, "output_chunks")
    op.add_column("output_chunks", sa.Column("first_batch", sa.Integer(), nullable=True))
    op.add_column("output_chunks", sa.Column("batches", sa.Integer(), server_default="1", nullable=False))
    op.alter_column("output_chunks", "batches", server_default=None)
    op.execute(
        """UPDATE output_chunks AS c SET first_batch = n.place
             FROM (SELECT evaluation_id, attempt, first_frame,
                          row_number() OVER (PARTITION BY evaluation_id, attempt ORDER BY first_frame) - 1 AS place
                     FROM output_chunks) AS n
            WHERE n.evaluation_id = c.evaluation_id AND n.attempt = c.attempt AND n.first_frame = c.first_frame"""
    )
    op.alter_column("output_chunks", "first_batch", nullable=False)
    op.create_primary_key(_KEY, "output_chunks", ["evaluation_id", "attempt", "first_batch"])
