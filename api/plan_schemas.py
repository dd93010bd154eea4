"""Request and response of POST /plans: memory and time of a job before it runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints

from qlora_service import wire
from qlora_service.planning.plan import Plan as DomainPlan

MAX_FREE_BYTES = 2**50


class PlanOptions(BaseModel):
    """The fields of a job's spec that memory depends on, plus the device and options to plan for.

    `config` may replace `base_model`. With a stored dataset (`dataset.id`), the plan uses the length of its longest
    row; without one, it assumes rows of `training.max_seq_len_tokens`.
    """

    model_config = ConfigDict(strict=True)

    config: dict[str, Any] | None = Field(
        None, description="The config.json of a model that is not in the catalog: a plan needs no weights."
    )
    device: Annotated[str, StringConstraints(min_length=1, max_length=100)] | None = Field(
        None,
        description="A card, such as RTX 3090, or a memory size, such as 24GB; default: the device that runs this "
        "service's jobs.",
        examples=["RTX 3090"],
    )
    free_bytes: Annotated[int, Field(ge=0, le=MAX_FREE_BYTES)] | None = Field(
        None, description="Bytes of the device's memory that the job may use; default: all."
    )
    probe: bool = Field(
        False,
        description="Measure the time of one step when a slot is free, unless finished jobs already give an estimate: "
        "request the plan again a minute later, and `time` has the result. Needs `base_model` and `dataset.id`.",
    )


class PlannedDevice(BaseModel):
    name: str
    total_bytes: int
    free_bytes: int | None = Field(description="The `free_bytes` of the request.")
    cuda: bool
    bf16: bool = Field(description="Whether the hardware supports bfloat16; without it, jobs compute in float32.")
    found_by: Literal["name", "nvml", "cpu", "setting"] = Field(
        description="Source of the device: named in the request, reported by the driver (NVML), this machine's CPU, "
        "or QLORA_PLAN_DEVICE."
    )
    free_now_bytes: int | None = Field(
        description="Memory of this machine's GPU that is free at the moment; other processes may be using the rest."
    )


class ChosenSettings(BaseModel):
    """Settings the job would run with. They do not change the math of a step."""

    micro_batch_tokens: int
    gradient_checkpointing: bool
    optimizer: Literal["resident", "paged"] = Field(
        description="Where the optimizer state is while a step is computed."
    )


class PlannedMemory(BaseModel):
    """Bytes of device memory at the peak."""

    categories: dict[str, int] = Field(description="By purpose; the sum is `allocated`.")
    allocated: int
    reserved: int = Field(description="Held by torch's allocator to serve `allocated`.")
    optimizer_host: int = Field(description="Optimizer state that can be paged to host memory.")
    factor: float = Field(description="Factor that predictions for this device are multiplied by.")
    needed: int = Field(description="Peak with the optimizer state placed as in `settings`, times `factor`.")
    context: int = Field(description="Memory of the process itself, such as the CUDA context, in addition to `needed`.")
    usable: int = Field(description="Memory available to the job: the device's memory minus context and workspace.")
    free: int = Field(description="`usable` minus `needed`; negative if memory is missing.")


class Largest(BaseModel):
    """The largest value of each field, changed one at a time, with which the job fits; null: none fits."""

    max_seq_len_tokens: int | None
    batch_size: int | None = Field(
        description="Hardly changes memory, because the examples of a batch are computed a few at a time."
    )
    model: str | None = Field(description="The largest well-known model that fits with the same job.")


class PlannedStorage(BaseModel):
    adapter_bytes: int = Field(description="The published weights.")
    checkpoint_bytes: int
    disk_bytes: int = Field(description="All checkpoints that exist at the same time, plus the published files.")
    host_bytes: int = Field(description="Host memory of the trainer.")


class Plan(wire.Plan):
    """Whether a job fits, its settings, its memory, storage and time, and the reason for the verdict."""

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
