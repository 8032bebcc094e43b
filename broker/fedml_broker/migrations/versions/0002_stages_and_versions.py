# SPDX-License-Identifier: Apache-2.0
"""Rounds of several stages, and runs without rounds."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("rounds", sa.Column("stage", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("tasks", sa.Column("version", sa.Integer(), nullable=True))
    op.add_column("tasks", sa.Column("counted", sa.Integer(), nullable=True))
    op.create_index("tasks_by_count", "tasks", ["run", "counted"], unique=False)
