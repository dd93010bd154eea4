"""What OpenAI's wire is asked: bodies, and the errors that only requests on it can have."""

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
    """A way of fine-tuning that exists elsewhere only."""

    code = "unsupported_method"


def saying(what: str) -> WrapValidator:
    """One message in place of one for each branch of a union."""

    def validate(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("none_of_these", f"this must be {what}") from None

    return WrapValidator(validate)


Auto = Literal["auto"]
Epochs = Annotated[Auto | Annotated[StrictInt, Field(ge=1, le=50)], saying('"auto" or a whole number from 1 to 50')]
BatchSize = Annotated[
    Auto | Annotated[StrictInt, Field(ge=1, le=256)], saying('"auto" or a whole number from 1 to 256')
]
Multiplier = Annotated[
    Auto | Annotated[float, Field(strict=True, gt=0, le=5000, allow_inf_nan=False)],
    saying('"auto" or a number above 0'),
]
Beta = Annotated[
    Auto | Annotated[float, Field(strict=True, gt=0, le=2, allow_inf_nan=False)],
    saying('"auto" or a number above 0, up to 2'),
]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Hyperparameters(Part):
    n_epochs: Epochs = Field(
        "auto",
        description="auto: 3; for fewer than 34 rows as many as make 100 examples, up to 25; for more than 8,333 as "
        "many as make 25,000 examples, at least 1.",
    )
    batch_size: BatchSize = Field("auto", description="auto: 16.")
    learning_rate_multiplier: Multiplier = Field("auto", description="Times 2e-4, or the recipe's rate. auto: 1.")


class DpoHyperparameters(Hyperparameters):
    beta: Beta = Field("auto", description="How close to the base the adapter stays. auto: 0.1.")


class SupervisedMethod(Part):
    hyperparameters: Hyperparameters | None = None


class DpoMethod(Part):
    hyperparameters: DpoHyperparameters | None = None


class Method(Part):
    type: Literal["supervised", "dpo", "reinforcement"] = Field(description="`reinforcement` is refused.")
    supervised: SupervisedMethod | None = None
    dpo: DpoMethod | None = None
    reinforcement: JsonValue = None


class CreateFineTuningJob(Part):
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

    model: Annotated[str, StringConstraints(min_length=1, max_length=200)] = Field(description="A base model's id.")
    training_file: Annotated[str, StringConstraints(min_length=1, max_length=100)] = Field(
        description="An id from POST /v1/files."
    )
    validation_file: Annotated[str, StringConstraints(min_length=1, max_length=100)] | None = Field(
        None,
        description="A file to measure the loss with. Without one, and unless `qlora` says so, no row is held out.",
    )
    suffix: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = Field(
        None, description="Part of the fine-tuned model's name, and the job's own name."
    )
    seed: Annotated[StrictInt, Field(ge=0, le=MAX_SEED)] | None = Field(
        None, description="Without one, a seed is chosen and reported."
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
        saying("left out: no integrations are supported"),
    ] = Field(None, description="None are supported.")
    method: Method | None = None
    hyperparameters: Hyperparameters | None = Field(None, description="Deprecated: say it in `method`.")
    qlora: dict[str, JsonValue] | None = Field(
        None,
        description=f"Any part of a JobSpec, as POST /jobs takes it, such as a recipe ({', '.join(RECIPES)}). The "
        "client sends it with `extra_body`. Its `force` queues a job that should not fit the device. What is said "
        "here and in another field is an error.",
    )


class CreateUpload(Part):
    bytes: Annotated[StrictInt, Field(ge=1, le=2**63 - 1)] = Field(description="Of the whole file.")
    filename: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    mime_type: Annotated[str, StringConstraints(min_length=1, max_length=255)] = Field(examples=["application/jsonl"])
    purpose: Literal["fine-tune"]
    expires_after: JsonValue = Field(None, description="Not supported: files stay until they are deleted.")


class CompleteUpload(Part):
    part_ids: list[Annotated[str, StringConstraints(max_length=100)]] = Field(
        min_length=1, max_length=10_000, description="In the file's order."
    )
    md5: Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{32}$")] | None = Field(
        None, description="Of the whole file."
    )
