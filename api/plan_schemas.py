"""What is asked and answered about jobs before they run."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints

from qlora_service import wire
from qlora_service.planning.plan import Plan as DomainPlan

MAX_FREE_BYTES = 2**50


class PlanOptions(BaseModel):
    """A job that may not exist: the parts of a spec that memory depends on, and what to plan them for.

    `base_model` may be left out for a `config`. The rows are a stored dataset's (`dataset.id`), whose longest one then
    counts; without, there may be rows of `training.max_seq_len_tokens`.
    """

    model_config = ConfigDict(strict=True)

    config: dict[str, Any] | None = Field(
        None, description="The config.json of a model that is not here: a plan needs no weights."
    )
    device: Annotated[str, StringConstraints(min_length=1, max_length=100)] | None = Field(
        None,
        description="A card, such as RTX 3090, or a size, such as 24GB; absent, what this service's jobs run on.",
        examples=["RTX 3090"],
    )
    free_bytes: Annotated[int, Field(ge=0, le=MAX_FREE_BYTES)] | None = Field(
        None, description="Of the device's memory, what the job may have; absent, all."
    )
    probe: bool = Field(
        False,
        description="Have a step of the job timed when a slot is free, unless finished jobs say how long it takes: "
        "plan again a minute later, and `time` tells. Needs `base_model` and `dataset.id`.",
    )


class PlannedDevice(BaseModel):
    name: str
    total_bytes: int
    free_bytes: int | None = Field(description="What the request said.")
    cuda: bool
    bf16: bool = Field(description="bfloat16 in hardware: without, jobs compute in float32.")
    found_by: Literal["name", "nvml", "cpu", "setting"] = Field(
        description="Named in the request; asked from the driver; this machine's CPU; or QLORA_PLAN_DEVICE."
    )
    free_now_bytes: int | None = Field(description="Of a GPU here: free at the moment, while others may be using it.")


class ChosenSettings(BaseModel):
    """How the job would run. None of it changes the maths of a step."""

    micro_batch_tokens: int
    gradient_checkpointing: bool
    optimizer: Literal["resident", "paged"] = Field(description="Where its state is while a step is computed.")


class PlannedMemory(BaseModel):
    """Bytes of the device at the moment that needs most."""

    categories: dict[str, int] = Field(description="By what they are for; together `allocated`.")
    allocated: int
    reserved: int = Field(description="What torch's allocator holds to serve them.")
    optimizer_host: int = Field(description="Optimizer state that can page to host memory.")
    factor: float = Field(description="What predictions for this device are multiplied with.")
    needed: int = Field(description="With the optimizer's state where `settings` puts it, and the factor.")
    context: int = Field(description="What the process takes beside that.")
    usable: int = Field(description="What the job can have: the device's memory without context and workspace.")
    free: int = Field(description="`usable` without `needed`; below 0, what is missing.")


class Largest(BaseModel):
    """How far the job goes on the device, one thing changed at a time; null: not at all."""

    max_seq_len_tokens: int | None
    batch_size: int | None = Field(description="Examples are computed a few at a time: it hardly changes memory.")
    model: str | None = Field(description="The largest well-known model that takes the same job.")


class PlannedStorage(BaseModel):
    adapter_bytes: int = Field(description="The published weights.")
    checkpoint_bytes: int
    disk_bytes: int = Field(description="For all checkpoints that exist at a time, and what is published.")
    host_bytes: int = Field(description="The trainer's share of the host's memory.")


class Plan(wire.Plan):
    """Whether a job fits, how it would run, what it takes, and why."""

    object: Literal["plan"] = "plan"
    verdict: Literal["fits", "fits_if", "does_not_fit"]
    device: PlannedDevice
    settings: Annotated[ChosenSettings, wire.Plan.model_fields["settings"]]
    memory: PlannedMemory
    source: Literal["simulation", "formula"]
    alternatives: Annotated[list[dict[str, JsonValue]], wire.Plan.model_fields["alternatives"]]
    largest: Annotated[Largest | None, wire.Plan.model_fields["largest"]]
    storage: PlannedStorage

    @classmethod
    def of(cls, plan: DomainPlan) -> Self:
        return cls.model_validate(plan.as_dict())
