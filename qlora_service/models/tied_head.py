"""One LoRA for an embedding and the head that shares its weight.

PEFT (0.21, `ensure_weight_tying`) gives the head parameters of its own, made as views of the embedding's. They are the
same memory only until something copies them: the cast to float32 over a bfloat16 base does, and bitsandbytes' first
step (`p.data.contiguous()`). From then on two adapters are trained where one was meant, which no merged weight can
hold; and while the memory is shared, an optimizer takes two steps with it. Here the head has no parameters, so the
gradients of both uses are summed, and one step is taken.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear


class Transposed(torch.nn.Module):
    """What PEFT has a linear layer without bias for: its weight is an embedding's A or B, transposed.

    In a state dict it has a copy of that weight, as PEFT's own layer does: the files load anywhere.
    """

    bias = None

    def __init__(self, parameters: torch.nn.ParameterDict, name: str) -> None:
        super().__init__()
        self._source = (parameters, name)  # in a tuple torch does not take it for a child

    @property
    def weight(self) -> torch.Tensor:
        parameters, name = self._source
        return parameters[name].t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()


def tie_head(model: PeftModel, name: str) -> None:
    """Let the head use the embedding's adapter of this name, where PEFT meant it to. Both hold the same values now."""
    base: Any = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if not isinstance(embedding, LoraEmbedding) or not isinstance(head, LoraLinear):
        return
    if embedding.get_base_layer().weight is not head.get_base_layer().weight:
        return
    head.lora_A[name] = Transposed(embedding.lora_embedding_B, name)
    head.lora_B[name] = Transposed(embedding.lora_embedding_A, name)
