# SPDX-License-Identifier: Apache-2.0
"""Machines found by name and by machine id without reading all; who of a provider is which user."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("devices_by_name", "devices", ["tenant", "name"], unique=False)
    op.create_index("devices_by_machine", "devices", ["machine_id"], unique=False)
    op.create_table(
        "sign_ins",
        sa.Column("issuer", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("user", sa.String(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("issuer", "subject"),
    )
    op.create_index("ix_sign_ins_user", "sign_ins", ["user"], unique=False)
