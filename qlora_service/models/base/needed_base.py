"""The base that a job needs, and whether its job may share the process with other jobs. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Self

from qlora_service.specs import Adapter, JobSpec, Lora, Quantization


@dataclass(frozen=True)
class NeededBase:
    """The loaded base that a job needs: its weights and their quantization. Jobs with equal ones may share it."""

    weights_sha256: str
    quantization: Quantization
    """With the compute dtype as in the spec: on one device, "auto" is always the same precision."""

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
    """Whether training the adapter might change the base's weights unnoticed, so that its job needs its own process.

    Trained tokens lie in the embedding, and the fingerprint covers the embedding rows of a few tokens only; PEFT's
    OLoRA rewrites every weight that it starts from. As `adapters.attach_adapter` attaches them, neither changes a byte
    of the base (peft 0.21, tests/qlora_service/models/base/test_base_state.py); another version of PEFT may.
    """
    if not isinstance(adapter, Lora):
        return False
    return adapter.trainable_token_indices is not None or adapter.init_lora_weights == "olora"
