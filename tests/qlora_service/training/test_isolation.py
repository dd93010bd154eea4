from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from qlora_service.models.nf4 import load_base
from qlora_service.specs import Quantization
from qlora_service.training.isolation import isolates_documents
from tests.tiny_training import CPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_llama_isolates(tiny_model: Path, dtype: torch.dtype, quantization: str) -> None:
    base = load_base(tiny_model, Quantization(type=quantization), dtype, CPU)
    assert isolates_documents(base)


def test_a_recurrent_model_does_not_isolate() -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2, state_size=8, use_mambapy=False)
    model = MambaForCausalLM(config).requires_grad_(False)
    assert not isolates_documents(model)


def test_the_probe_leaves_the_mode_as_it_was() -> None:
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).train()
    isolates_documents(model)
    assert model.training
