"""The tables. Changing one needs a migration beside it; a test compares the two."""

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
)
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_N_label)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class UtcDateTime(TypeDecorator[datetime]):
    """A timestamp that is UTC on both sides; SQLite has no time zones of its own."""

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


# SQLite only counts up by itself on INTEGER keys.
_Sequence = BigInteger().with_variant(Integer(), "sqlite")

datasets = Table(
    "datasets",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("sha256", String(64), nullable=False),
    Column("filename", String(255)),
    Column("bytes", BigInteger, nullable=False),
    Column("container", String(16), nullable=False),
    Column("shape", String(32), nullable=False),
    Column("report", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("sha256", "container", "shape"),
)

# What rendering a dataset with one tokenizer and one set of length rules gave; a cache, safe to empty.
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
    Column("owner", String(40), nullable=False, server_default="local"),
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
    Column("checkpoint_step", Integer, nullable=False, server_default="0"),
    Column("phase", String(32)),
    Column("step", Integer, nullable=False, default=0),
    Column("total_steps", Integer),
    Column("eta_s", Float),
    Column("metrics", JSON, nullable=False),
    Column("error", JSON),
    Column("result", JSON),
    Index(None, "status", "priority", "id"),
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

# Answers to requests that carried an Idempotency-Key, each written with what the request wrote.
idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("owner", String(40), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("answer", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Index(None, "created_at"),
)
