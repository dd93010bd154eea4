"""projects and their keys; deletion of datasets and adapters; uploads in parts; webhooks; chat"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE jobs RENAME COLUMN owner TO project")
    op.execute("ALTER TABLE idempotency_keys RENAME COLUMN owner TO project")
    op.add_column("jobs", sa.Column("withdrawn_at", sa.DateTime(), nullable=True))
    op.create_index(op.f("ix_jobs_project_jobs_id"), "jobs", ["project", "id"])
    if op.get_bind().dialect.name == "sqlite":
        _rebuild_datasets("project, sha256, container, shape", added=True)
    else:
        op.add_column("datasets", sa.Column("project", sa.String(length=40), nullable=False, server_default="local"))
        op.alter_column("datasets", "project", server_default=None)
        op.add_column("datasets", sa.Column("deleted_at", sa.DateTime(), nullable=True))
        op.drop_constraint(op.f("uq_datasets_sha256_container_shape"), "datasets")
        name = op.f("uq_datasets_project_sha256_container_shape")
        op.create_unique_constraint(name, "datasets", ["project", "sha256", "container", "shape"])
    _create_api_keys()
    _create_uploads()
    _create_webhooks()
    _create_inference()


def downgrade() -> None:
    for table in ("inference", "webhook_deliveries", "webhook_endpoints", "upload_parts", "uploads", "api_keys"):
        op.drop_table(table)
    if op.get_bind().dialect.name == "sqlite":
        _rebuild_datasets("sha256, container, shape", added=False)
    else:
        op.drop_constraint(op.f("uq_datasets_project_sha256_container_shape"), "datasets")
        name = op.f("uq_datasets_sha256_container_shape")
        op.create_unique_constraint(name, "datasets", ["sha256", "container", "shape"])
        op.drop_column("datasets", "deleted_at")
        op.drop_column("datasets", "project")
    op.drop_index(op.f("ix_jobs_project_jobs_id"), "jobs")
    op.drop_column("jobs", "withdrawn_at")
    op.execute("ALTER TABLE idempotency_keys RENAME COLUMN project TO owner")
    op.execute("ALTER TABLE jobs RENAME COLUMN project TO owner")


def _rebuild_datasets(unique: str, *, added: bool) -> None:
    """SQLite cannot change a constraint: the table is made anew, with `added` with its two new columns.

    Jobs name its rows, which are back before the transaction ends. Render reports, a cache, go with the old rows.
    """
    kept = "id, sha256, filename, bytes, container, shape, report, created_at"
    new = "project VARCHAR(40) NOT NULL, deleted_at DATETIME," if added else ""
    op.execute("PRAGMA defer_foreign_keys = ON")
    op.execute(f"CREATE TEMPORARY TABLE kept_datasets AS SELECT {kept} FROM datasets")  # noqa: S608  names from above
    op.execute("DROP TABLE datasets")
    op.execute(f"""
        CREATE TABLE datasets (
            id VARCHAR(40) NOT NULL,
            {new}
            sha256 VARCHAR(64) NOT NULL,
            filename VARCHAR(255),
            bytes BIGINT NOT NULL,
            container VARCHAR(16) NOT NULL,
            shape VARCHAR(32) NOT NULL,
            report JSON NOT NULL,
            created_at DATETIME NOT NULL,
            CONSTRAINT pk_datasets PRIMARY KEY (id),
            CONSTRAINT uq_datasets_{unique.replace(", ", "_")} UNIQUE ({unique})
        )
    """)
    columns, values = (f"{kept}, project", f"{kept}, 'local'") if added else (kept, kept)
    op.execute(f"INSERT INTO datasets ({columns}) SELECT {values} FROM kept_datasets")  # noqa: S608
    op.execute("DROP TABLE kept_datasets")


def _create_api_keys() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("revoked_at", sa.DateTime(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("sha256", name=op.f("uq_api_keys_sha256")),
    )


def _create_uploads() -> None:
    op.create_table(
        "uploads",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project", sa.String(length=40), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("filename", sa.String(length=255), nullable=False),
        sa.Column("purpose", sa.String(length=32), nullable=False),
        sa.Column("mime_type", sa.String(length=255), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("dataset_id", sa.String(length=40), nullable=True),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("expires_at", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.id"], name=op.f("fk_uploads_dataset_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_uploads")),
    )
    op.create_index(op.f("ix_uploads_project_uploads_id"), "uploads", ["project", "id"])
    op.create_index(op.f("ix_uploads_expires_at"), "uploads", ["expires_at"])
    op.create_table(
        "upload_parts",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("upload_id", sa.String(length=40), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["upload_id"], ["uploads.id"], name=op.f("fk_upload_parts_upload_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_upload_parts")),
    )
    op.create_index(op.f("ix_upload_parts_upload_id"), "upload_parts", ["upload_id"])


def _create_webhooks() -> None:
    op.create_table(
        "webhook_endpoints",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("url", sa.String(length=2048), nullable=False),
        sa.Column("event_types", sa.JSON(), nullable=False),
        sa.Column("secret", sa.String(length=128), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("disabled_at", sa.DateTime(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_endpoints")),
    )
    op.create_index(op.f("ix_webhook_endpoints_project_webhook_endpoints_id"), "webhook_endpoints", ["project", "id"])
    op.create_table(
        "webhook_deliveries",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("endpoint_id", sa.String(length=40), nullable=False),
        sa.Column("event_id", sa.String(length=40), nullable=False),
        sa.Column("type", sa.String(length=64), nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("due_at", sa.DateTime(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("delivered_at", sa.DateTime(), nullable=True),
        sa.Column("last_status", sa.Integer(), nullable=True),
        sa.Column("last_error", sa.String(length=500), nullable=True),
        sa.ForeignKeyConstraint(
            ["endpoint_id"],
            ["webhook_endpoints.id"],
            name=op.f("fk_webhook_deliveries_endpoint_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_deliveries")),
    )
    op.create_index(op.f("ix_webhook_deliveries_due_at"), "webhook_deliveries", ["due_at"])
    op.create_index(
        op.f("ix_webhook_deliveries_endpoint_id_webhook_deliveries_id"), "webhook_deliveries", ["endpoint_id", "id"]
    )


def _create_inference() -> None:
    op.create_table(
        "inference",
        sa.Column("base_model", sa.String(length=200), nullable=False),
        sa.Column("quantization", sa.String(length=200), nullable=False),
        sa.Column("asked_at", sa.Float(), nullable=False),
        sa.Column("asked_clock", sa.String(length=64), nullable=False),
        sa.Column("worker", sa.String(length=200), nullable=True),
        sa.Column("socket", sa.String(length=4096), nullable=True),
        sa.PrimaryKeyConstraint("base_model", "quantization", name=op.f("pk_inference")),
    )
