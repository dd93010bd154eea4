"""One LoRA for an embedding and the output head that shares its weight.

PEFT (0.21, `ensure_weight_tying`) gives the head parameters of its own, made as views of the embedding's. The views
share memory only until the parameters are copied: by the cast to float32 over a bfloat16 base, and by bitsandbytes'
first step (`p.data.contiguous()`). After a copy two different adapters are trained, which no merged weight can hold;
before it, an optimizer takes two steps on the shared memory. Here the head has no parameters, so the gradients of both
uses are summed, and the optimizer takes one step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear


class TransposedLinear(torch.nn.Module):
    """A linear layer without bias and parameters: its weight is an embedding's A or B, transposed.

    Its state dict contains a copy of that weight, as that of PEFT's linear layer does, so that plain PEFT loads the
    files.
    """

    bias = None

    def __init__(self, parameters: torch.nn.ParameterDict, name: str) -> None:
        super().__init__()
        self._source = (parameters, name)  # in a tuple, because torch would register a ParameterDict as a submodule

    @property
    def weight(self) -> torch.Tensor:
        parameters, name = self._source
        return parameters[name].t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()


def tie_head(model: PeftModel, name: str) -> None:
    """Makes the head use the embedding's adapter `name`, where both have a LoRA and share their base weight.

    Both hold the same values when this is called.
    """
    base: Any = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if not isinstance(embedding, LoraEmbedding) or not isinstance(head, LoraLinear):
        return
    if embedding.get_base_layer().weight is not head.get_base_layer().weight:
        return
    head.lora_A[name] = TransposedLinear(embedding.lora_embedding_B, name)
    head.lora_B[name] = TransposedLinear(embedding.lora_embedding_A, name)
