"""A whole job: `JobSpec`, and the parts of it that are neither adapter, objective nor training."""

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
    """Rows that are not trained on, to measure the loss with."""

    dataset_id: str | None = Field(
        None,
        description="A stored dataset of such rows; then the job trains on all rows of its own, and `fraction` "
        "is ignored.",
    )
    fraction: float = Field(0.05, ge=0.0, le=0.5, description="Share of the rows held out; at least one if above 0.")
    max_rows: StrictInt = Field(256, ge=1, le=4096, description="Most rows held out.")

    @property
    def held_out_fraction(self) -> float:
        """The share of the job's own rows that is held out."""
        return self.fraction if self.dataset_id is None else 0.0

    @property
    def holds_out(self) -> bool:
        """Whether any rows are judged that are not trained on."""
        return self.dataset_id is not None or self.fraction > 0


class Quantization(SpecPart):
    """How the frozen base is stored on the device."""

    type: Literal["nf4", "fp4", "int8", "none"] = Field(
        "nf4",
        description="4-bit NormalFloat (paper, section 3), 4-bit float, 8-bit integers (arXiv:2208.07339), or "
        "unquantized.",
    )
    double_quant: StrictBool = Field(
        True, description="Quantize the quantization constants too (paper, section 3); nf4 and fp4 have them."
    )
    compute_dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="Precision of the maths. auto: bfloat16 where the hardware has it, else float32."
    )


class JobSpec(SpecPart):
    """A fine-tuning job: base model, dataset and how to train."""

    recipe: RecipeName | None = Field(
        None, description="A named set of values for what is not given here; GET /recipes shows them."
    )
    base_model: ModelName = Field(description="A name from GET /models.", examples=["SmolLM2-135M-Instruct"])
    dataset: DatasetRef = Field(DatasetRef(), description="The rows to train on.")
    validation: Validation = Field(Validation(), description="Rows held out to measure the loss on.")
    quantization: Quantization = Field(Quantization(), description="How the frozen base is stored.")
    adapter: Adapter = Field(Lora(), description="What is trained; `method` says which of these it is, lora if absent.")
    objective: Objective = Field(
        Supervised(), description="What the loss is made of; `type` says which, supervised if absent."
    )
    training: Training = Field(Training(), description="The optimization.")
    evaluation: Evaluation = Field(Evaluation(), description="What is measured besides the training loss.")
    name: Annotated[str, StringConstraints(min_length=1, max_length=100)] | None = Field(
        None, description="What to call the job; also the adapter's title."
    )
    metadata: dict[MetadataKey, MetadataValue] = Field(
        {}, max_length=16, description="Up to 16 names with values of your own, kept with the job."
    )
    priority: StrictInt = Field(0, ge=-100, le=100, description="Higher runs first.")

    @model_validator(mode="before")
    @classmethod
    def _fill_in_recipe(cls, value: Any) -> Any:
        return with_recipe(value)

    @model_validator(mode="after")
    def _goes_together(self) -> JobSpec:
        found = contradictions(
            quantization=self.quantization.type,
            adapter=self.adapter,
            objective=self.objective,
            training=self.training,
            evaluation=self.evaluation,
            holds_out=self.validation.holds_out,
        )
        # As pydantic's own errors, so that each has its place.
        errors = [
            InitErrorDetails(type=PydanticCustomError("contradiction", reason), loc=place, input=None)
            for place, reason in found
        ]
        if errors:
            raise ValidationError.from_exception_data(type(self).__name__, errors)
        return self
