"""One adapter of every method, and a training loop of a few steps, for the tests of adapters."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

import torch
from peft import PeftModel

from qlora_service.models.adapters import attach_adapter, prune_after_step, trainable_parameters
from qlora_service.models.base.quantize import load_base
from qlora_service.specs import (
    IA3,
    AdaLora,
    Adapter,
    LlamaAdapter,
    Lora,
    Oft,
    PrefixTuning,
    PromptTuning,
    PTuning,
    Quantization,
    Vera,
)

CPU = torch.device("cpu")
IDS = torch.arange(5, 25)[None]  # (1, tokens)
ADALORA = AdaLora(method="adalora", init_r=4, target_r=2)
OLORA = Lora(r=4, init_lora_weights="olora")
METHODS: list[Adapter] = [
    Lora(r=4),
    Lora(r=4, trainable_token_indices=[3, 7]),
    Lora(r=4, target_modules=["embed_tokens", "q_proj"]),
    Lora(r=4, use_dora=True),
    OLORA,
    ADALORA,
    IA3(method="ia3", feedforward_modules=["down_proj"]),
    Vera(method="vera", r=8),
    Oft(method="oft"),
    PromptTuning(method="prompt_tuning", num_virtual_tokens=4),
    PrefixTuning(method="prefix_tuning", num_virtual_tokens=4),
    PTuning(method="p_tuning", num_virtual_tokens=4, encoder_hidden_size=16),
    LlamaAdapter(method="llama_adapter", adapter_len=4, adapter_layers=2),
]


def load(
    directory: Path,
    adapter: Adapter | None = None,
    kind: str = "nf4",
    dtype: torch.dtype = torch.float32,
    steps: int = 0,
    total_steps: int = 1000,
) -> PeftModel:
    """The model with an adapter, trained for `steps` steps."""
    base = load_base(directory, Quantization.model_validate({"type": kind}), dtype, CPU)
    model = attach_adapter(base, adapter or Lora(r=4), seed=0, total_steps=total_steps)
    train(model, range(1, steps + 1))
    return model


def train(model: PeftModel, steps: range, skipped: Collection[int] = ()) -> None:
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=0.01, weight_decay=0.0)
    for step in steps:
        loss = model(IDS, labels=IDS).loss  # PEFT adds AdaLoRA's regularization itself
        (loss * (math.nan if step in skipped else 1)).backward()
        if step not in skipped:
            optimizer.step()
        prune_after_step(model, step, skipped=step in skipped)
        optimizer.zero_grad()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """The logits of `IDS`, without those of virtual tokens."""
    return model.eval()(IDS).logits[:, -IDS.shape[1] :]
