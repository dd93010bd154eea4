"""`JobSpec`, and its parts other than adapter, objective, training and evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, StrictBool, StrictInt, StringConstraints, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from qlora_service.specs.adapter import Adapter, Lora
from qlora_service.specs.combinations import contradictions
from qlora_service.specs.objective import Objective, Supervised
from qlora_service.specs.part import SpecPart
from qlora_service.specs.recipes import RecipeName, with_recipe
from qlora_service.specs.training import Evaluation, Training

Container = Literal["jsonl", "json", "csv", "parquet", "text"]
Shape = Literal["messages", "alpaca", "sharegpt", "prompt_completion", "dolly", "text", "preference", "kto"]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=200)]
MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class DatasetRef(SpecPart):
    """The rows to train on: a stored dataset by id, or inline rows."""

    id: str | None = Field(None, description="An id from POST /datasets.", examples=["ds_0199c0ffee"])
    rows: list[dict[str, JsonValue]] | None = Field(
        None, max_length=10_000, description="Inline rows; stored as a separate dataset."
    )
    container: Container | None = Field(None, description="File format of an uploaded file; detected if absent.")
    shape: Shape | None = Field(None, description="Row shape of `rows` or of an uploaded file; detected if absent.")

    @model_validator(mode="after")
    def _require_one_source(self) -> DatasetRef:
        if self.id is not None and self.rows is not None:
            raise ValueError("give either `id` or `rows`, not both")
        if self.rows is not None and self.container is not None:
            raise ValueError("`container` is the format of an uploaded file: leave it out beside `rows`")
        if self.id is not None and (self.container or self.shape):
            raise ValueError("a stored dataset has its own container and shape: leave both out beside `id`")
        return self


class Validation(SpecPart):
    """The held-out rows: not trained on, used to measure the loss."""

    dataset_id: str | None = Field(
        None,
        description="Id of a stored dataset of held-out rows; the job then trains on all rows of its own dataset, and "
        "`fraction` is ignored.",
    )
    fraction: float = Field(
        0.05, ge=0.0, le=0.5, description="Share of the job's rows that is held out; at least one row if above 0."
    )
    max_rows: StrictInt = Field(256, ge=1, le=4096, description="Maximum number of held-out rows.")

    @property
    def held_out_fraction(self) -> float:
        """The share of the job's own dataset that is held out."""
        return self.fraction if self.dataset_id is None else 0.0

    @property
    def holds_out(self) -> bool:
        """Whether the job has held-out rows."""
        return self.dataset_id is not None or self.fraction > 0


class Quantization(SpecPart):
    """Storage of the frozen base on the device."""

    type: Literal["nf4", "fp4", "int8", "none"] = Field(
        "nf4",
        description="Format of the linear layers: 4-bit NormalFloat (paper, section 3), 4-bit float, 8-bit integers "
        "(arXiv:2208.07339), or unquantized.",
    )
    double_quant: StrictBool = Field(
        True, description="Quantize the quantization constants too (paper, section 3); only nf4 and fp4 have them."
    )
    compute_dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="Precision of computation. auto: bfloat16 where the hardware supports it, else float32."
    )


class JobSpec(SpecPart):
    """A fine-tuning job: base model, dataset and training settings."""

    recipe: RecipeName | None = Field(
        None, description="A named set of values for fields that the spec leaves out; GET /recipes lists them."
    )
    base_model: ModelName = Field(description="A name from GET /models.", examples=["SmolLM2-135M-Instruct"])
    dataset: DatasetRef = Field(DatasetRef(), description="The rows to train on.")
    validation: Validation = Field(Validation(), description="The held-out rows, on which the loss is measured.")
    quantization: Quantization = Field(Quantization(), description="Storage of the frozen base.")
    adapter: Adapter = Field(Lora(), description="The adapter; its `method` selects one of these, lora if absent.")
    objective: Objective = Field(
        Supervised(), description="The training objective; its `type` selects one of these, supervised if absent."
    )
    training: Training = Field(Training(), description="The optimization settings.")
    evaluation: Evaluation = Field(Evaluation(), description="Measurements in addition to the training loss.")
    name: Annotated[str, StringConstraints(min_length=1, max_length=100)] | None = Field(
        None, description="Name of the job, also used as the adapter's title."
    )
    metadata: dict[MetadataKey, MetadataValue] = Field(
        {}, max_length=16, description="Up to 16 custom names and values, stored with the job."
    )
    priority: StrictInt = Field(0, ge=-100, le=100, description="Jobs with a higher priority run first.")

    @model_validator(mode="before")
    @classmethod
    def _apply_recipe(cls, value: Any) -> Any:
        return with_recipe(value)

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> JobSpec:
        findings = contradictions(
            quantization=self.quantization.type,
            adapter=self.adapter,
            objective=self.objective,
            training=self.training,
            evaluation=self.evaluation,
            holds_out=self.validation.holds_out,
        )
        # As pydantic errors, so that each one has its location.
        errors = [
            InitErrorDetails(type=PydanticCustomError("contradiction", reason), loc=location, input=None)
            for location, reason in findings
        ]
        if errors:
            raise ValidationError.from_exception_data(type(self).__name__, errors)
        return self
