"""the newest jobs that measured something, found without a look at all the others"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

IS_MEASURED = sa.text("measured IS NOT NULL")
INDEXES = {
    "ix_jobs_measured": ["status", "finished_at", "id"],
    "ix_jobs_measured_on_base": ["base_weights_sha256", "status", "finished_at", "id"],
}


def upgrade() -> None:
    for name, columns in INDEXES.items():
        op.create_index(name, "jobs", columns, sqlite_where=IS_MEASURED, postgresql_where=IS_MEASURED)


def downgrade() -> None:
    for name in INDEXES:
        op.drop_index(name, "jobs")
