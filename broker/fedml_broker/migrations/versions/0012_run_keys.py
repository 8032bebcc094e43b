# SPDX-License-Identifier: Apache-2.0
"""Keys of jobs, each good for its own run."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tokens", sa.Column("run", sa.String(), nullable=True))
    op.create_index("ix_tokens_run", "tokens", ["run"], unique=False)
