# SPDX-License-Identifier: Apache-2.0
"""What decides when a task goes, and clusters of reserved machines."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    zero = sa.Column("restarts_left", sa.Integer(), nullable=False, server_default="0")
    op.add_column("tasks", zero)
    op.add_column("tasks", sa.Column("terms", sa.JSON(), nullable=False, server_default="{}"))
    op.add_column("tasks", sa.Column("rank", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("tasks", sa.Column("recalled", sa.String(), nullable=False, server_default=""))
    op.create_table(
        "clusters",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("user", sa.String(), nullable=False),
        sa.Column("devices", sa.JSON(), nullable=False),
        sa.Column("up", sa.Boolean(), nullable=False),
        sa.Column("autostop_s", sa.Float(), nullable=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "name"),
    )
