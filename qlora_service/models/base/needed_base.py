"""Which base a job needs to find loaded, and whether it may share the process with other jobs. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Self

from qlora_service.specs import Adapter, JobSpec, Lora, Quantization


@dataclass(frozen=True)
class NeededBase:
    """What jobs have in common that may follow each other on one loaded base: its weights, and how they are stored."""

    weights_sha256: str
    quantization: Quantization
    """With the compute dtype as it was asked for: on one device the same word is the same precision"""

    @classmethod
    def of(cls, spec: JobSpec, weights_sha256: str) -> Self:
        return cls(weights_sha256, spec.quantization)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        values = json.loads(text)
        return cls(values["weights_sha256"], Quantization.model_validate(values["quantization"]))

    def as_json(self) -> str:
        quantization = self.quantization.model_dump(mode="json")
        return json.dumps({"weights_sha256": self.weights_sha256, "quantization": quantization})


def may_change_base(adapter: Adapter) -> bool:
    """Whether the adapter might leave the base with other weights than it found, unnoticed: its job runs by itself.

    Trained tokens lie in the embedding, of which the fingerprint sees the rows of a few tokens only; PEFT's OLoRA
    rewrites every weight it starts from. As both are attached here neither changes a byte of the base (peft 0.21,
    tests/qlora_service/models/base/test_base_state.py); another version of PEFT may do otherwise.
    """
    if not isinstance(adapter, Lora):
        return False
    return adapter.trainable_token_indices is not None or adapter.init_lora_weights == "olora"
