"""The training objectives: one class for each loss."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from qlora_service.specs.part import SpecPart


class Supervised(SpecPart):
    """Cross-entropy of the trained tokens, divided by their number in the step; also for plain text."""

    type: Literal["supervised"] = Field("supervised", description="Train on the answers, or on the text, of the rows.")


class Dpo(SpecPart):
    """Direct preference optimization (arXiv:2305.18290); the reference is the base with the adapter off."""

    type: Literal["dpo"]
    beta: float = Field(
        0.1,
        gt=0.0,
        le=10.0,
        description="Strength of the pull toward the base: a larger value keeps the adapter closer (paper: 0.1).",
    )
    label_smoothing: float = Field(
        0.0, ge=0.0, lt=0.5, description="Expected share of pairs whose chosen and rejected answers are swapped."
    )


class Orpo(SpecPart):
    """Odds-ratio preference optimization (arXiv:2403.07691); has no reference model."""

    type: Literal["orpo"]
    beta: float = Field(0.1, gt=0.0, le=10.0, description="Weight of the odds-ratio term (paper: λ = 0.1).")


class Kto(SpecPart):
    """Kahneman-Tversky optimization (arXiv:2402.01306): answers labeled good or bad, without pairs."""

    type: Literal["kto"]
    beta: float = Field(
        0.1,
        gt=0.0,
        le=10.0,
        description="Strength of the pull toward the base: a larger value keeps the adapter closer (paper: 0.1).",
    )
    desirable_weight: float = Field(1.0, gt=0.0, le=100.0, description="Weight of good answers.")
    undesirable_weight: float = Field(1.0, gt=0.0, le=100.0, description="Weight of bad answers.")


def _type_of(value: Any) -> str:
    """The tag of the union: the type, supervised if absent."""
    kind = value.get("type", "supervised") if isinstance(value, dict) else getattr(value, "type", "supervised")
    return kind if isinstance(kind, str) else repr(kind)


Objective = Annotated[
    Annotated[Supervised, Tag("supervised")]
    | Annotated[Dpo, Tag("dpo")]
    | Annotated[Orpo, Tag("orpo")]
    | Annotated[Kto, Tag("kto")],
    Discriminator(_type_of),
]
