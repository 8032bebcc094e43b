# SPDX-License-Identifier: Apache-2.0
"""Machines found by name and by machine id, without reading all of them."""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("devices_by_name", "devices", ["tenant", "name"], unique=False)
    op.create_index("devices_by_machine", "devices", ["machine_id"], unique=False)
