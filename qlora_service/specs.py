"""What a user may ask for: `JobSpec` and its parts. Pure and frozen; unknown fields are errors.

Field names are PEFT's and transformers' where those have one. "Paper" in a
description is QLoRA (Dettmers et al. 2023, arXiv:2305.14314); defaults follow it where the description says so.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StrictBool,
    StrictInt,
    StringConstraints,
    ValidationError,
    model_validator,
)

from qlora_service.errors import Finding, InvalidSpec

Container = Literal["jsonl", "json", "csv", "parquet", "text"]
Shape = Literal["messages", "alpaca", "sharegpt", "prompt_completion", "dolly", "text"]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=200)]
ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=100)]
MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class SpecPart(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DatasetRef(SpecPart):
    """The rows to train on: a stored dataset by id, or a few rows inline."""

    id: str | None = Field(None, description="An id from POST /datasets.", examples=["ds_0199c0ffee"])
    rows: list[dict[str, JsonValue]] | None = Field(
        None, max_length=10_000, description="Rows sent inline; stored as a dataset of their own."
    )
    container: Container | None = Field(None, description="File format of an upload; detected if absent.")
    shape: Shape | None = Field(None, description="Row shape of `rows` or an upload; detected if absent.")

    @model_validator(mode="after")
    def _one_source(self) -> DatasetRef:
        if self.id is not None and self.rows is not None:
            raise ValueError("give either `id` or `rows`, not both")
        if self.rows is not None and self.container is not None:
            raise ValueError("`container` is the format of an uploaded file: leave it out beside `rows`")
        if self.id is not None and (self.container or self.shape):
            raise ValueError("a stored dataset has its container and shape: leave both out beside `id`")
        return self


class Validation(SpecPart):
    """Rows held out of training to measure the loss on."""

    fraction: float = Field(0.05, ge=0.0, le=0.5, description="Share of the rows held out; at least one if above 0.")
    max_rows: StrictInt = Field(256, ge=1, le=4096, description="Most rows held out.")


class Quantization(SpecPart):
    """How the frozen base is stored on the device."""

    type: Literal["nf4", "none"] = Field("nf4", description="4-bit NormalFloat (paper, section 3), or unquantized.")
    double_quant: StrictBool = Field(True, description="Quantize the quantization constants too (paper, section 3).")
    compute_dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="Precision of the maths. auto: bfloat16 where the hardware has it, else float32."
    )


class Adapter(SpecPart):
    """The trained part: LoRA, h = W x + (lora_alpha / r) B A x (arXiv:2106.09685)."""

    method: Literal["lora"] = Field("lora", description="How the adapter changes the base.")
    r: StrictInt = Field(
        16, ge=1, le=512, description="Rank. 16 with alpha 32 is common practice; the paper used 64 with alpha 16."
    )
    lora_alpha: float = Field(
        32.0, gt=0.0, le=4096.0, description="Scale numerator; the update is scaled by lora_alpha / r."
    )
    lora_dropout: float = Field(
        0.0, ge=0.0, lt=1.0, description="Dropout before A. Paper: 0.1 up to 13B, 0.05 above; 0 is fastest."
    )
    target_modules: Literal["all-linear"] | list[ModuleName] = Field(
        "all-linear",
        description="Layers that get an adapter: every linear layer (paper, section 4: needed to match full "
        "fine-tuning), or module names such as q_proj.",
    )

    @model_validator(mode="after")
    def _some_target(self) -> Adapter:
        if isinstance(self.target_modules, list) and not self.target_modules:
            raise ValueError('target_modules is empty: name at least one module or use "all-linear"')
        return self


class Training(SpecPart):
    """The optimization. A step is an optimizer step; its loss is divided by the trained tokens of the whole step."""

    batch_size: StrictInt = Field(16, ge=1, le=4096, description="Examples per optimizer step (paper: 16).")
    epochs: float = Field(1.0, gt=0.0, le=1000.0, description="Passes over the training rows; ignored with max_steps.")
    max_steps: StrictInt | None = Field(None, ge=1, le=10_000_000, description="Optimizer steps; overrides epochs.")
    learning_rate: float = Field(2e-4, gt=0.0, le=1.0, description="Paper, table 9: 2e-4; 1e-4 from 33B.")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field("constant", description="Paper: constant.")
    warmup_ratio: float = Field(
        0.03, ge=0.0, lt=1.0, description="Share of the steps with a rising rate (paper: 0.03)."
    )
    weight_decay: float = Field(0.0, ge=0.0, le=10.0, description="AdamW's decoupled weight decay.")
    max_grad_norm: float = Field(0.3, gt=0.0, le=1000.0, description="Paper, appendix B: 0.3.")
    optim: Literal["paged_adamw_32bit", "paged_adamw_8bit", "adamw_torch"] = Field(
        "paged_adamw_32bit",
        description="AdamW of bitsandbytes with state in 32 or 8 bits, pageable to host memory on CUDA (paper: paged, "
        "32 bits), or torch's.",
    )
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0, description="Decay of AdamW's first moment.")
    adam_beta2: float = Field(0.999, ge=0.0, lt=1.0, description="Paper, appendix B: 0.999.")
    max_seq_len_tokens: StrictInt = Field(
        1024,
        ge=8,
        le=1_048_576,
        description="Longest row, in tokens. Not given, it is also at most what the base model handles.",
    )
    too_long: Literal["refuse", "truncate", "drop"] = Field(
        "refuse",
        description="What happens to rows over max_seq_len_tokens: refuse the job with their lines, cut the "
        "row's end off, or leave the row out.",
    )
    train_on: Literal["assistant", "all"] = Field(
        "assistant", description="Tokens that are learned: the answers only, or every token."
    )
    micro_batch_tokens: StrictInt = Field(
        2048,
        ge=1,
        le=1_048_576,
        description="Tokens computed at a time. Changes speed and memory, never the maths of a step.",
    )
    gradient_checkpointing: StrictBool = Field(
        True,
        description="Recompute activations instead of storing them: less memory, about a third more work.",
    )
    seed: StrictInt = Field(0, ge=0, le=2**31 - 1, description="Decides split, order, the adapter's start and dropout.")


class Evaluation(SpecPart):
    """Held-out loss is always measured before the first step and at the end."""

    every_steps: StrictInt | None = Field(
        None, ge=1, description="Also every so many steps; default: about ten times a job."
    )


class JobSpec(SpecPart):
    """A fine-tuning job: base model, dataset and how to train."""

    base_model: ModelName = Field(description="A name from GET /models.", examples=["SmolLM2-135M-Instruct"])
    dataset: DatasetRef = Field(DatasetRef(), description="The rows to train on.")
    validation: Validation = Field(Validation(), description="Rows held out to measure the loss on.")
    quantization: Quantization = Field(Quantization(), description="How the frozen base is stored.")
    adapter: Adapter = Field(Adapter(), description="What is trained.")
    training: Training = Field(Training(), description="The optimization.")
    evaluation: Evaluation = Field(Evaluation(), description="When the held-out loss is measured.")
    name: Annotated[str, StringConstraints(min_length=1, max_length=100)] | None = Field(
        None, description="What to call the job; also the adapter's title."
    )
    metadata: dict[MetadataKey, MetadataValue] = Field(
        {}, max_length=16, description="Up to 16 words of your own, kept with the job."
    )
    priority: StrictInt = Field(0, ge=-100, le=100, description="Higher runs first.")


def parse_spec(value: Any) -> JobSpec:
    """The spec that `value` (decoded JSON or YAML) describes.

    Raises:
        InvalidSpec: every fault at once, each with its JSON pointer and, for a misspelt field, the nearest name.
    """
    try:
        return JobSpec.model_validate(value)
    except ValidationError as error:
        raise _invalid_spec(error, value) from None


def _invalid_spec(error: ValidationError, document: Any) -> InvalidSpec:
    """A pydantic error as ours: one finding per fault."""
    findings = []
    for fault in error.errors(include_url=False, include_context=False):
        path = _path(fault["loc"], document, ends_in_missing=fault["type"] == "missing")
        pointer = "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in path)
        reason = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            reason = _unknown_field(path)
        elif fault["type"] == "missing":
            reason = "this field is required"
        elif fault["type"] == "model_type":
            reason = "this must be an object with fields"
        findings.append(Finding(reason=reason, pointer=pointer or "/"))
    first = findings[0]
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    return InvalidSpec(f"{first.pointer}: {first.reason}{more}", location=first.pointer, findings=findings)


def _path(loc: Sequence[str | int], document: Any, *, ends_in_missing: bool) -> list[str | int]:
    """The parts of `loc` that are places in the document: pydantic mixes in the tried branches of unions."""
    path = []
    for part in loc:
        match document, part:
            case (dict(), _) if part in document:
                document = document[part]
            case list(), int():
                document = document[part]
            case _:
                continue
        path.append(part)
    return [*path, loc[-1]] if ends_in_missing else path


def _unknown_field(path: Sequence[str | int]) -> str:
    model: type[BaseModel] | None = JobSpec
    for part in path[:-1]:
        field = model.model_fields.get(str(part)) if model is not None else None
        annotation = field.annotation if field is not None else None
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    known = sorted(model.model_fields) if model is not None else []
    near = difflib.get_close_matches(str(path[-1]), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(known)}"
    return f"unknown field {path[-1]!r}: {hint}"
