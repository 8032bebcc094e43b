# SPDX-License-Identifier: Apache-2.0
"""Groups of clients that have rounds of their own."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("rounds", sa.Column("groups", sa.JSON(), nullable=False, server_default="{}"))
