"""leases by clocks that do not jump, pauses, checkpoints, idempotency keys"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


# Column by column: rebuilding the table would drop it, and every event with it.
def _added() -> list[sa.Column[Any]]:
    return [
        sa.Column("owner", sa.String(length=40), nullable=False, server_default="local"),
        sa.Column("lease_until", sa.Float(), nullable=True),
        sa.Column("lease_clock", sa.String(length=64), nullable=True),
        sa.Column("stop_request", sa.String(length=16), nullable=True),
        sa.Column("hold", sa.JSON(), nullable=True),
        sa.Column("deaths", sa.JSON(), nullable=False, server_default="[]"),
        sa.Column("plan", sa.JSON(), nullable=True),
        sa.Column("checkpoint_step", sa.Integer(), nullable=False, server_default="0"),
    ]


def upgrade() -> None:
    for column in _added():
        op.add_column("jobs", column)
    op.execute("UPDATE jobs SET stop_request = 'cancel' WHERE cancel_requested AND status = 'running'")
    # No clock is called so: what was running is found lost, and goes back to the queue.
    op.execute("UPDATE jobs SET lease_until = 0, lease_clock = 'none' WHERE status = 'running'")
    op.drop_column("jobs", "lease_expires_at")
    op.drop_column("jobs", "cancel_requested")
    op.create_table(
        "idempotency_keys",
        sa.Column("owner", sa.String(length=40), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("answer", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("owner", "key", name=op.f("pk_idempotency_keys")),
    )
    op.create_index(op.f("ix_idempotency_keys_created_at"), "idempotency_keys", ["created_at"])


def downgrade() -> None:
    op.drop_index(op.f("ix_idempotency_keys_created_at"), "idempotency_keys")
    op.drop_table("idempotency_keys")
    op.add_column("jobs", sa.Column("lease_expires_at", sa.DateTime(), nullable=True))
    op.add_column("jobs", sa.Column("cancel_requested", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.execute("UPDATE jobs SET status = 'queued' WHERE status IN ('running', 'paused')")
    for column in reversed(_added()):
        op.drop_column("jobs", column.name)
