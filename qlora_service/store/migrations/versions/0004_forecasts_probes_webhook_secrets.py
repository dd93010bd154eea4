"""what jobs were predicted to take and took; probes; who was overtaken; a webhook's secret of before"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("forecast", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("jobs", sa.Column("measured", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("jobs", sa.Column("overtaken", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("webhook_endpoints", sa.Column("old_secret", sa.String(length=128), nullable=True))
    op.add_column("webhook_endpoints", sa.Column("old_secret_until", sa.DateTime(), nullable=True))
    op.create_table(
        "probes",
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("worker", sa.String(length=200), nullable=True),
        sa.Column("result", sa.JSON(none_as_null=True), nullable=True),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_probes")),
    )
    op.create_index(op.f("ix_probes_created_at"), "probes", ["created_at"])


def downgrade() -> None:
    op.drop_table("probes")
    op.drop_column("webhook_endpoints", "old_secret_until")
    op.drop_column("webhook_endpoints", "old_secret")
    for column in ("overtaken", "measured", "forecast"):
        op.drop_column("jobs", column)
