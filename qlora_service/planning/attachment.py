"""The result of attaching an adapter to a base: its size, and the weights that stay without an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qlora_service.errors import Finding

NOTABLE_SHARE = 0.01
"""Share of the base's weights; routers alone, which have less, are not worth a warning"""
NAMED_KINDS = 4

PLAIN_MODELS = frozenset({
    "apertus", "arcee", "bloom", "cohere", "cohere2", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
    "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "granite", "helium", "llama", "ministral3", "mistral", "mpt",
    "olmo", "olmo2", "olmo3", "opt", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2",
})  # fmt: skip
"""Model types in which every matrix is an embedding or an ordinary linear layer, which every method can adapt"""


@dataclass(frozen=True)
class Attachment:
    """An adapter on a base, or the reason why it cannot be attached. Counts are of numbers, packed or not."""

    base_parameters: int = 0
    trained_parameters: int = 0
    stored_parameters: int = 0
    """Numbers in the published file"""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Weights that target_modules selects and that get no adapter, by name with * for numbers"""
    linear_left_out: bool = False
    """Whether linear layers are among them"""
    refusal: str | None = None
    location: str | None = None
    findings: Sequence[Finding] = ()
    unchecked: str | None = None
    """The reason why none of this is known"""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Attachment:
        """Raises: TypeError, KeyError, when the values are not of `as_dict`."""
        return cls(**{**values, "findings": tuple(Finding(**finding) for finding in values["findings"])})

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @property
    def warning(self) -> str | None:
        """The share of the base's weights that gets no adapter; None if there is none to speak of."""
        if self.unchecked is not None:
            return f"it is not known whether every target module of this base can get an adapter: {self.unchecked}"
        share = sum(self.left_out.values()) / max(1, self.base_parameters)
        if not self.left_out or (share < NOTABLE_SHARE and not self.linear_left_out):
            return None
        kinds = sorted(self.left_out, key=lambda name: -self.left_out[name])
        listed = ", ".join(kinds[:NAMED_KINDS]) + (", …" if len(kinds) > NAMED_KINDS else "")
        experts = "the routed experts: " if "experts" in kinds[0].split(".") else ""
        percent = f"{share:.0%}" if share >= NOTABLE_SHARE else f"less than {NOTABLE_SHARE:.0%}"
        return (
            f"{percent} of the base's weights ({experts}{listed}) get no adapter: PEFT cannot adapt them in this model"
        )
