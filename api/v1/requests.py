"""Request bodies of the fine-tuning and upload endpoints, and their own error class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StrictInt,
    StringConstraints,
    ValidationError,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from api.v1.schemas import FILE_ID
from qlora_service.errors import InvalidRequest
from qlora_service.specs import RECIPES

MAX_SEED = 2**31 - 1


class UnsupportedMethod(InvalidRequest):
    """A fine-tuning method that OpenAI offers and this service does not."""

    code = "unsupported_method"


def described_as(expected: str) -> WrapValidator:
    """One message, `this must be <expected>`, in place of one for each branch of a union."""

    def validate(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("none_of_these", f"this must be {expected}") from None

    return WrapValidator(validate)


Auto = Literal["auto"]
Epochs = Annotated[
    Auto | Annotated[StrictInt, Field(ge=1, le=50)], described_as('"auto" or a whole number from 1 to 50')
]
BatchSize = Annotated[
    Auto | Annotated[StrictInt, Field(ge=1, le=256)], described_as('"auto" or a whole number from 1 to 256')
]
Multiplier = Annotated[
    Auto | Annotated[float, Field(strict=True, gt=0, le=5000, allow_inf_nan=False)],
    described_as('"auto" or a number above 0'),
]
Beta = Annotated[
    Auto | Annotated[float, Field(strict=True, gt=0, le=2, allow_inf_nan=False)],
    described_as('"auto" or a number above 0, up to 2'),
]


class StrictModel(BaseModel):
    """Base of request models: immutable, without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Hyperparameters(StrictModel):
    n_epochs: Epochs = Field(
        "auto",
        description="`auto`: 3 epochs; with fewer than 34 rows, as many epochs as give 100 examples, at most 25; with "
        "more than 8,333 rows, as many epochs as give 25,000 examples, at least 1.",
    )
    batch_size: BatchSize = Field("auto", description="`auto`: 16.")
    learning_rate_multiplier: Multiplier = Field(
        "auto", description="Multiple of the recipe's learning rate, or of 2e-4 without a recipe. `auto`: 1."
    )


class DpoHyperparameters(Hyperparameters):
    beta: Beta = Field(
        "auto", description="Strength of the constraint that keeps the adapter close to the base model. `auto`: 0.1."
    )


class SupervisedMethod(StrictModel):
    hyperparameters: Hyperparameters | None = None


class DpoMethod(StrictModel):
    hyperparameters: DpoHyperparameters | None = None


class Method(StrictModel):
    type: Literal["supervised", "dpo", "reinforcement"] = Field(description="`reinforcement` is not supported.")
    supervised: SupervisedMethod | None = None
    dpo: DpoMethod | None = None
    reinforcement: JsonValue = None


class CreateFineTuningJob(StrictModel):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "SmolLM2-135M-Instruct",
                    "training_file": FILE_ID,
                    "suffix": "orders",
                    "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}},
                    "qlora": {"recipe": "fast", "adapter": {"r": 8}},
                }
            ]
        }
    )

    model: Annotated[str, StringConstraints(min_length=1, max_length=200)] = Field(
        description="The id of a base model."
    )
    training_file: Annotated[str, StringConstraints(min_length=1, max_length=100)] = Field(
        description="The id of a file from POST /v1/files."
    )
    validation_file: Annotated[str, StringConstraints(min_length=1, max_length=100)] | None = Field(
        None,
        description="The id of a file with held-out rows to measure the loss on. Without it, no rows are held out, "
        "unless `qlora.validation` says so.",
    )
    suffix: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = Field(
        None, description="The name of the job, and part of the name of the fine-tuned model."
    )
    seed: Annotated[StrictInt, Field(ge=0, le=MAX_SEED)] | None = Field(
        None, description="Default: a random seed, which the response reports."
    )
    metadata: (
        dict[
            Annotated[str, StringConstraints(min_length=1, max_length=64)],
            Annotated[str, StringConstraints(max_length=512)],
        ]
        | None
    ) = Field(None, max_length=16)
    integrations: Annotated[
        Annotated[list[dict[str, JsonValue]], Field(max_length=0)] | None,
        described_as("left out: integrations are not supported"),
    ] = Field(None, description="Not supported.")
    method: Method | None = None
    hyperparameters: Hyperparameters | None = Field(None, description="Deprecated: use `method`.")
    qlora: dict[str, JsonValue] | None = Field(
        None,
        description=f"Any part of a JobSpec, in the format of POST /jobs, for example a recipe ({', '.join(RECIPES)}). "
        "OpenAI's client sends it with `extra_body`. `force` queues the job even if it is not predicted to fit the "
        "device. A setting that is given here and in another field is an error.",
    )


class CreateUpload(StrictModel):
    bytes: Annotated[StrictInt, Field(ge=1, le=2**63 - 1)] = Field(description="Size of the whole file.")
    filename: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    mime_type: Annotated[str, StringConstraints(min_length=1, max_length=255)] = Field(examples=["application/jsonl"])
    purpose: Literal["fine-tune"]
    expires_after: JsonValue = Field(None, description="Not supported: files are stored until they are deleted.")


class CompleteUpload(StrictModel):
    part_ids: list[Annotated[str, StringConstraints(max_length=100)]] = Field(
        min_length=1, max_length=10_000, description="Ids of the parts, in the order of the file."
    )
    md5: Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{32}$")] | None = Field(
        None, description="MD5 of the whole file, in hexadecimal."
    )
