"""Settings of the service, read from environment variables.

Read once, at an entry point (`api`, `workers`, `cli`); all other code receives plain values. `docs/settings.md` is
generated from this file (`make docs`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from qlora_service.process.loopback import is_loopback

GIB = 2**30


class Settings(BaseSettings):
    """Every setting is an environment variable with the prefix QLORA_, e.g. `QLORA_DATA_DIR=/data`."""

    model_config = SettingsConfigDict(env_prefix="QLORA_", extra="ignore", frozen=True)

    data_dir: Path = Field(
        Path("data"),
        description="Directory of everything that the service stores: state.db, artifacts/, models/, cache/, "
        "checkpoints/, inference/, logs/, locks/, tmp/. It must be on a local disk.",
    )
    database_url: str | None = Field(None, description="SQLAlchemy URL; default: SQLite in the data directory.")
    artifact_url: str | None = Field(None, description="obstore URL; default: artifacts/ in the data directory.")
    host: str = Field("127.0.0.1", description="Address that the API listens on.")
    port: int = Field(8080, ge=0, le=65535, description="Port that the API listens on.")
    allowed_hosts: str = Field(
        "",
        description="Host names that requests may name besides `localhost`, loopback addresses and `QLORA_HOST`: "
        "without port, separated by commas. `*` accepts any, and with it requests from any web page.",
    )
    url: str | None = Field(None, description="Address of the service, for the command line.")
    api_key: SecretStr | None = Field(None, description="Key that the command line sends.")
    keys: Literal["required", "off"] = Field(
        "required",
        description="Whether every request needs a key. `off` lets everyone who reaches the API do everything, so "
        "`QLORA_HOST` must then be a loopback address.",
    )
    webhook_private: bool = Field(
        False,
        description="Allow webhooks to http URLs and to addresses that are not public. Every holder of a key can then "
        "send requests to every machine that this one reaches.",
    )
    max_upload_bytes: int = Field(20 * GIB, gt=0, description="Largest request body.")
    receipt_s: float = Field(
        10.0, ge=0.1, description="Seconds within which a request's head and the start of its body must arrive."
    )
    cache_bytes: int = Field(
        50 * GIB,
        ge=0,
        description="Bytes of quantized base models that are cached; the least recently used are deleted first. 0: no "
        "cache.",
    )
    max_queued_jobs: int | None = Field(None, ge=1, description="Queued jobs per project; default: no limit.")
    max_stored_bytes: int | None = Field(
        None, ge=1, description="Bytes of datasets, uploads and adapters per project; default: no limit."
    )
    max_requests_per_minute: int | None = Field(
        None, ge=1, description="Requests per key and minute, bursts included; default: no limit."
    )
    plan_device: str = Field(
        "auto",
        description="Device that jobs are planned for. `auto`: the smallest GPU visible to this process, else its CPU "
        "if torch is installed. A card's name or size, such as `RTX 3090` or `24GB`, if the workers run elsewhere. "
        "`unknown`: no job is refused for its memory.",
    )
    slots: int | None = Field(None, ge=1, description="Trainers at a time; default: one per GPU, or one on a CPU.")
    lease_s: float = Field(30.0, gt=1.0, description="Seconds without renewal after which a claim is lost.")
    heartbeat_s: float = Field(2.0, gt=0.0, description="Seconds between renewals of a trainer's claim.")
    cancel_grace_s: float = Field(
        30.0, gt=0.0, description="Seconds after which a trainer that ignores a cancel or a pause is killed."
    )
    checkpoint_s: float = Field(
        60.0, ge=0.0, description="Seconds between checkpoints of a running job: the most work that a power cut costs."
    )
    hang_s: float = Field(
        300.0,
        gt=0.0,
        description="Seconds without progress after which a trainer is killed, if they are also 20 times the longest "
        "interval so far. Its stacks are in its log.",
    )
    warm_s: float = Field(
        300.0,
        ge=0.0,
        description="Seconds that a base model stays loaded after a job, for the next job on it. 0: a new process for "
        "every job.",
    )
    max_running_jobs: int | None = Field(None, ge=1, description="Running jobs per project; default: no limit.")
    max_deaths: int = Field(
        3, ge=1, description="Trainers of one job that may die in a row without a new checkpoint before it fails."
    )
    chat_idle_s: float = Field(
        300.0, gt=0.0, description="Seconds without a chat after which a base model loaded for chats is unloaded."
    )
    chat_hold_s: float = Field(60.0, gt=0.0, description="Seconds that chats may keep a slot while a job waits for it.")
    chat_preempts: bool = Field(
        False,
        description="Whether a chat preempts a running job at its next step. Otherwise chats are refused while jobs "
        "occupy every slot.",
    )
    lock_dir: Path | None = Field(
        None,
        description="Directory of the slots' lock files; default: locks/ in the data directory. Services that share a "
        "GPU must share it.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least severe level logged.")

    @field_validator("allowed_hosts")
    @classmethod
    def _host_names(cls, value: str) -> str:
        wrong = [name for name in _names(value) if name.count(":") == 1 or set(name) & set("/[]@ ")]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not a host name: leave out scheme, port and path, as in gpu.example")
        return value

    @model_validator(mode="after")
    def _renew_in_time(self) -> Settings:
        if self.heartbeat_s > self.lease_s / 3:
            raise ValueError(
                f"QLORA_HEARTBEAT_S is {self.heartbeat_s:g}: a claim of QLORA_LEASE_S = {self.lease_s:g} s must be "
                "renewed at least three times before it expires"
            )
        return self

    @model_validator(mode="after")
    def _not_open_to_the_network(self) -> Settings:
        if self.keys == "off" and not is_loopback(self.host):
            raise ValueError(
                f"QLORA_KEYS=off with QLORA_HOST={self.host} would give the whole network access: leave QLORA_KEYS "
                "out, so that every request needs a key, or listen on 127.0.0.1"
            )
        return self

    @property
    def resolved_data_dir(self) -> Path:
        return self.data_dir.expanduser().resolve()

    @property
    def models_dir(self) -> Path:
        return self.resolved_data_dir / "models"

    @property
    def cache_dir(self) -> Path:
        """Quantized base models; may be deleted at any time."""
        return self.resolved_data_dir / "cache" / "quantized"

    @property
    def plan_cache_dir(self) -> Path:
        """Results of memory simulations; may be deleted at any time."""
        return self.resolved_data_dir / "cache" / "plans"

    @property
    def checkpoint_dir(self) -> Path:
        return self.resolved_data_dir / "checkpoints"

    @property
    def inference_dir(self) -> Path:
        """Unix sockets of the processes that answer chats."""
        return self.resolved_data_dir / "inference"

    @property
    def resolved_lock_dir(self) -> Path:
        return self.lock_dir or self.resolved_data_dir / "locks"

    @property
    def tmp_dir(self) -> Path:
        """Scratch space on the data disk: uploads and rendered rows may exceed a tmpfs /tmp."""
        return self.resolved_data_dir / "tmp"

    @property
    def resolved_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.resolved_data_dir / 'state.db'}"

    @property
    def resolved_artifact_url(self) -> str:
        return self.artifact_url or (self.resolved_data_dir / "artifacts").as_uri()

    @property
    def allowed_host_names(self) -> frozenset[str]:
        """`allowed_hosts` as a set of lower-case names."""
        return frozenset(_names(self.allowed_hosts))

    @property
    def base_url(self) -> str:
        return (self.url or f"http://{self.host}:{self.port}").rstrip("/")


def read_settings(**given: Any) -> Settings:
    """The settings: values in `given` that are not None, then the environment.

    Invalid settings end the process with one line on stderr and exit code 2.
    """
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            # A fault that concerns several settings names them in its message.
            name = "".join(f"QLORA_{str(part).upper()}: " for part in fault["loc"][:1])
            faults.append(name + fault["msg"].removeprefix("Value error, "))
        print(f"error: these settings cannot be used: {'; '.join(faults)}", file=sys.stderr)
        raise SystemExit(2) from None


def _names(listed: str) -> list[str]:
    return [name.strip().lower() for name in listed.split(",") if name.strip()]
