"""Database tables. A change needs a migration; a test compares the two."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    null,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator

from qlora_service.domain.keys import LOCAL_PROJECT

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_N_label)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class UtcDateTime(TypeDecorator[datetime]):
    """A timezone-aware timestamp, stored as UTC without a zone: SQLite has no time zones."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value} has no time zone: pass an aware datetime")
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


# SQLite autoincrements INTEGER keys only.
_Sequence = BigInteger().with_variant(Integer(), "sqlite")


def _project(**options: Any) -> Column[str]:
    """The project that owns the row."""
    return Column("project", String(40), nullable=False, **options)


datasets = Table(
    "datasets",
    metadata,
    Column("id", String(40), primary_key=True),
    _project(),
    Column("sha256", String(64), nullable=False),
    Column("filename", String(255)),
    Column("bytes", BigInteger, nullable=False),
    Column("container", String(16), nullable=False),
    Column("shape", String(32), nullable=False),
    Column("report", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    # The row stays for the jobs that refer to it; uploading the same bytes again restores it.
    Column("deleted_at", UtcDateTime),
    UniqueConstraint("project", "sha256", "container", "shape"),
)

# Render reports by dataset, tokenizer and length rules: a cache, safe to empty.
render_reports = Table(
    "render_reports",
    metadata,
    Column("dataset_id", String(40), ForeignKey("datasets.id", ondelete="CASCADE"), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("report", JSON, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("status", String(16), nullable=False),
    _project(server_default=LOCAL_PROJECT),
    Column("spec", JSON, nullable=False),
    Column("base_model", String(200), nullable=False),
    Column("base_weights_sha256", String(64), nullable=False),
    Column("dataset_id", String(40), ForeignKey("datasets.id"), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("started_at", UtcDateTime),
    Column("finished_at", UtcDateTime),
    Column("attempt", Integer, nullable=False, default=0),
    Column("worker", String(200)),
    # Seconds of the clock that `lease_clock` names; see store/lease_clock.py.
    Column("lease_until", Float),
    Column("lease_clock", String(64)),
    Column("stop_request", String(16)),
    Column("hold", JSON(none_as_null=True)),
    Column("deaths", JSON, nullable=False, server_default="[]"),
    Column("plan", JSON(none_as_null=True)),
    # Prediction when the job was posted; measurements of its attempts.
    Column("forecast", JSON(none_as_null=True)),
    Column("measured", JSON(none_as_null=True)),
    # Younger jobs claimed before it because their base was loaded.
    Column("overtaken", Integer, nullable=False, server_default="0"),
    Column("checkpoint_step", Integer, nullable=False, server_default="0"),
    Column("phase", String(32)),
    Column("step", Integer, nullable=False, default=0),
    Column("total_steps", Integer),
    Column("eta_s", Float),
    Column("metrics", JSON, nullable=False),
    Column("warnings", JSON, nullable=False, server_default="[]"),
    Column("error", JSON),
    Column("result", JSON),
    # When its adapter was deleted.
    Column("withdrawn_at", UtcDateTime),
    Index(None, "status", "priority", "id"),
    Index(None, "project", "id"),
)
# Read by every posted job, for the newest measurements.
_measured = jobs.c.measured.is_not(null())
_newest = (jobs.c.status, jobs.c.finished_at, jobs.c.id)
Index("ix_jobs_measured", *_newest, sqlite_where=_measured, postgresql_where=_measured)
Index(
    "ix_jobs_measured_on_base",
    jobs.c.base_weights_sha256,
    *_newest,
    sqlite_where=_measured,
    postgresql_where=_measured,
)

events = Table(
    "events",
    metadata,
    Column("seq", _Sequence, primary_key=True, autoincrement=True),
    Column("job_id", String(40), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("at", UtcDateTime, nullable=False),
    Column("type", String(32), nullable=False),
    Column("data", JSON, nullable=False),
    Index(None, "job_id", "seq"),
    sqlite_autoincrement=True,
)

# Answers to requests with an Idempotency-Key, written in the transaction of the request.
idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("project", String(40), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("answer", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Index(None, "created_at"),
)

# API keys; the secrets are not stored.
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(40), primary_key=True),
    _project(),
    Column("name", String(64), nullable=False),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("scopes", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("revoked_at", UtcDateTime),
)

# Uploads in parts; the bytes of the parts are in the artifact store until the upload is completed.
uploads = Table(
    "uploads",
    metadata,
    Column("id", String(40), primary_key=True),
    _project(),
    Column("status", String(16), nullable=False),
    Column("filename", String(255), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("mime_type", String(255), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("dataset_id", String(40), ForeignKey("datasets.id")),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    Index(None, "project", "id"),
    Index(None, "expires_at"),
)

upload_parts = Table(
    "upload_parts",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("upload_id", String(40), ForeignKey("uploads.id", ondelete="CASCADE"), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Index(None, "upload_id"),
)

# Webhook endpoints. The secret signs deliveries, so it is stored in plain text.
webhook_endpoints = Table(
    "webhook_endpoints",
    metadata,
    Column("id", String(40), primary_key=True),
    _project(),
    Column("name", String(64), nullable=False),
    Column("url", String(2048), nullable=False),
    Column("event_types", JSON, nullable=False),
    Column("secret", String(128), nullable=False),
    # The previous secret signs too until this time.
    Column("old_secret", String(128)),
    Column("old_secret_until", UtcDateTime),
    Column("created_at", UtcDateTime, nullable=False),
    Column("disabled_at", UtcDateTime),
    Index(None, "project", "id"),
)

# Deliveries, written in the transaction of their event; `due_at` is null once delivered or given up.
webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("endpoint_id", String(40), ForeignKey("webhook_endpoints.id", ondelete="CASCADE"), nullable=False),
    Column("event_id", String(40), nullable=False),
    Column("type", String(64), nullable=False),
    Column("body", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("due_at", UtcDateTime),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("delivered_at", UtcDateTime),
    Column("last_status", Integer),
    Column("last_error", String(500)),
    Index(None, "due_at"),
    Index(None, "endpoint_id", "id"),
)

# Base models requested for chats, and the processes that have them loaded.
inference = Table(
    "inference",
    metadata,
    Column("base_model", String(200), primary_key=True),
    Column("quantization", String(200), primary_key=True),
    # Seconds of the clock that `asked_clock` names; see store/lease_clock.py.
    Column("asked_at", Float, nullable=False),
    Column("asked_clock", String(64), nullable=False),
    # The process's worker, and its socket; null while no process has the base.
    Column("worker", String(200)),
    Column("socket", String(4096)),
)

# Steps to be timed for plans when a slot is free; results serve later plans.
probes = Table(
    "probes",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("request", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("worker", String(200)),
    Column("result", JSON(none_as_null=True)),
    Index(None, "created_at"),
)
