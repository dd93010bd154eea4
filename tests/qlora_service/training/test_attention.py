from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from qlora_service.models.nf4 import load_base
from qlora_service.specs import Quantization
from qlora_service.training.attention import _causal_layers_only, isolate_documents
from qlora_service.training.micro_batch import collate, forward
from tests.tiny_training import CPU, rows

SMALL = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


@torch.no_grad()
def largest_leak(model: PreTrainedModel) -> float:
    """How far packed logits are from the lone documents', at most."""
    documents = rows(5)
    packed = forward(model, collate(documents, CPU))
    alone = torch.cat([forward(model, collate([document], CPU)) for document in documents])
    return float((packed - alone).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_llama_runs_document_by_document(tiny_model: Path, dtype: torch.dtype, quantization: Any) -> None:
    base = load_base(tiny_model, Quantization(type=quantization), dtype, CPU)
    assert isolate_documents(base) == "per_document"


def test_a_sliding_window_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=8)).eval()
    long = collate(rows(1, low=50, high=60), CPU)
    expected = forward(model, long)
    assert isolate_documents(model) == "per_document"
    assert (forward(model, long) - expected).abs().max() < 1e-5
    assert largest_leak(model) < 1e-5


def test_an_architecture_that_takes_no_lengths_gets_the_block_mask() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4)
    model = GPT2LMHeadModel(config).eval()
    assert isolate_documents(model) in {"per_document", "mask"}
    assert largest_leak(model) < 1e-5


def test_chunked_layers_are_left_to_their_own_mask() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    model.config.attention_chunk_size = 16
    assert isolate_documents(model) == "mask"
    assert largest_leak(model) < 1e-5


def test_recurrent_layers_need_documents_alone() -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2, state_size=8, use_mambapy=False)
    assert isolate_documents(MambaForCausalLM(config).requires_grad_(False)) == "alone"


def test_the_probe_leaves_the_mode_as_it_was() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).train()
    isolate_documents(model)
    assert model.training


def test_the_probe_is_made_without_dropout() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4)).train()
    assert isolate_documents(model) != "alone"
    assert model.training


def test_layers_of_another_kind_are_not_run_per_document() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )
    assert _causal_layers_only(model)
    model.config.layer_types = ["full_attention", "chunked_attention"]
    assert not _causal_layers_only(model)
