"""Settings of the service: the only reader of the environment.

Built once, at an entry point (`api`, `workers`, `cli`); everything below gets plain values.
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
        description="Everything the service owns: state.db, artifacts/, models/, cache/, checkpoints/, "
        "inference/, logs/, locks/, tmp/. Local disk only.",
    )
    database_url: str | None = Field(None, description="SQLAlchemy URL; default: SQLite in the data directory.")
    artifact_url: str | None = Field(None, description="obstore URL; default: artifacts/ in the data directory.")
    host: str = Field("127.0.0.1", description="Address the API listens on.")
    port: int = Field(8080, ge=0, le=65535, description="Port the API listens on.")
    allowed_hosts: str = Field(
        "",
        description="Host names under which the API is asked, beside this machine's loopback and `host`: without port, "
        "separated by commas; * for any, which lets every web page in.",
    )
    url: str | None = Field(None, description="Service address the command line talks to.")
    api_key: SecretStr | None = Field(None, description="Key the command line sends.")
    keys: Literal["required", "off"] = Field(
        "required",
        description="Whether every request needs a key; off: whoever reaches the API may do everything, which is why "
        "`host` must then be this machine's loopback.",
    )
    webhook_private: bool = Field(
        False,
        description="Whether webhooks may go to http URLs and to addresses that are not on the internet: only where "
        "everybody with a key may ask every machine that this one reaches.",
    )
    max_upload_bytes: int = Field(20 * GIB, gt=0, description="Largest request body.")
    receipt_s: float = Field(
        10.0,
        ge=0.1,
        description="A request's head, and the beginning of its body, must arrive within this many seconds.",
    )
    cache_bytes: int = Field(
        50 * GIB,
        ge=0,
        description="Most bytes of quantized base models kept for the next job; the least recently used go first. "
        "0: every job quantizes its own.",
    )
    max_queued_jobs: int | None = Field(None, ge=1, description="Most queued jobs of one project; default: no limit.")
    max_stored_bytes: int | None = Field(
        None, ge=1, description="Most bytes of one project's datasets, uploads and adapters; default: no limit."
    )
    max_requests_per_minute: int | None = Field(
        None, ge=1, description="Most requests of one key in a minute, which may come all at once; default: no limit."
    )
    plan_device: str = Field(
        "auto",
        description="What jobs are planned for. auto: the smallest GPU that this process sees, else its CPU if torch "
        "is installed here; a card's name or size, such as RTX 3090 or 24GB, where the workers are elsewhere; unknown: "
        "no job is refused for its memory.",
    )
    slots: int | None = Field(None, ge=1, description="Most trainers at a time; default: one per GPU, one on a CPU.")
    lease_s: float = Field(30.0, gt=1.0, description="A claim not renewed for this long is lost.")
    heartbeat_s: float = Field(2.0, gt=0.0, description="How often a trainer renews its claim.")
    cancel_grace_s: float = Field(
        30.0, gt=0.0, description="A trainer that ignores a cancel or a pause this long is killed."
    )
    checkpoint_s: float = Field(
        60.0, ge=0.0, description="How often a running job is made durable: the most work that a power cut costs."
    )
    hang_s: float = Field(
        300.0,
        gt=0.0,
        description="A trainer without a sign of progress for this long, and for 20 times what one took so far, is "
        "ended with its stacks in its log.",
    )
    warm_s: float = Field(
        300.0,
        ge=0.0,
        description="How long a base model stays loaded after a job, for the next one on it; 0: every job loads its "
        "own, in a new process.",
    )
    max_running_jobs: int | None = Field(None, ge=1, description="Most jobs of one project that run at a time.")
    max_deaths: int = Field(
        3, ge=1, description="A job whose trainers died so often without getting further is failed."
    )
    chat_idle_s: float = Field(
        300.0, gt=0.0, description="A base model that nobody has chatted with for this long is unloaded."
    )
    chat_hold_s: float = Field(
        60.0, gt=0.0, description="How long chats may keep a slot that a job waits for; then the job has it."
    )
    chat_preempts: bool = Field(
        False,
        description="Whether a chat makes a running job give its slot up at its next step, to go on afterwards; "
        "without it, chats are refused while jobs have every slot.",
    )
    lock_dir: Path | None = Field(
        None,
        description="Where slots are locked; default: locks/ in the data directory. Several services that share a "
        "GPU have to name the same one.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @field_validator("allowed_hosts")
    @classmethod
    def _host_names(cls, value: str) -> str:
        wrong = [name for name in _names(value) if name.count(":") == 1 or set(name) & set("/[]@ ")]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is no host name: leave out scheme, port and path, as in gpu.example")
        return value

    @model_validator(mode="after")
    def _renew_in_time(self) -> Settings:
        if self.heartbeat_s > self.lease_s / 3:
            raise ValueError(
                f"QLORA_HEARTBEAT_S is {self.heartbeat_s:g}: a claim of QLORA_LEASE_S = {self.lease_s:g} s has to be "
                "renewed at least three times before it ends"
            )
        return self

    @model_validator(mode="after")
    def _not_open_to_the_network(self) -> Settings:
        if self.keys == "off" and not is_loopback(self.host):
            raise ValueError(
                f"QLORA_KEYS=off with QLORA_HOST={self.host} would let the whole network in: leave QLORA_KEYS out, so "
                "that every request needs a key, or listen on 127.0.0.1"
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
        """Quantized base models: all of it may be deleted at any time."""
        return self.resolved_data_dir / "cache" / "quantized"

    @property
    def plan_cache_dir(self) -> Path:
        """Simulations of jobs' memory: all of it may be deleted at any time."""
        return self.resolved_data_dir / "cache" / "plans"

    @property
    def checkpoint_dir(self) -> Path:
        return self.resolved_data_dir / "checkpoints"

    @property
    def inference_dir(self) -> Path:
        """Sockets of the processes that answer chats."""
        return self.resolved_data_dir / "inference"

    @property
    def resolved_lock_dir(self) -> Path:
        return self.lock_dir or self.resolved_data_dir / "locks"

    @property
    def tmp_dir(self) -> Path:
        """Scratch on the data disk: uploads and rendered rows may be larger than a tmpfs /tmp."""
        return self.resolved_data_dir / "tmp"

    @property
    def resolved_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.resolved_data_dir / 'state.db'}"

    @property
    def resolved_artifact_url(self) -> str:
        return self.artifact_url or (self.resolved_data_dir / "artifacts").as_uri()

    @property
    def allowed_host_names(self) -> frozenset[str]:
        """`allowed_hosts` one by one, lower-case."""
        return frozenset(_names(self.allowed_hosts))

    @property
    def base_url(self) -> str:
        return (self.url or f"http://{self.host}:{self.port}").rstrip("/")


def read_settings(**given: Any) -> Settings:
    """The settings: what is `given` and not None, then the environment.

    What cannot be used ends the process with one line on stderr and exit code 2.
    """
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            # A fault of several settings together names them itself.
            name = "".join(f"QLORA_{str(part).upper()}: " for part in fault["loc"][:1])
            faults.append(name + fault["msg"].removeprefix("Value error, "))
        print(f"error: these settings cannot be used: {'; '.join(faults)}", file=sys.stderr)
        raise SystemExit(2) from None


def _names(listed: str) -> list[str]:
    return [name.strip().lower() for name in listed.split(",") if name.strip()]
