"""A packed document has the logits of the separate document, or the architecture is reported as not packable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qlora_service.errors import InvalidModel
from qlora_service.models.base.quantize import load_base
from qlora_service.specs import Quantization
from qlora_service.training.network.isolation import (
    _causal_layers_only,
    isolate_documents,
    probe_documents,
    use_default_attention,
)
from qlora_service.training.network.micro_batch import PER_DOCUMENT, collate, forward
from tests.network_cases import MAMBA, config_of
from tests.network_reference import GAIN, SMALL, build
from tests.tiny_training import CPU, rows

LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_llama_runs_document_by_document(tiny_model: Path, dtype: torch.dtype, quantization: Any) -> None:
    base = load_base(tiny_model, Quantization(type=quantization), dtype, CPU)
    assert isolate_documents(base) == "per_document"
    assert base.config._attn_implementation == PER_DOCUMENT


@pytest.mark.parametrize("window", [8, 14, 40])
def test_a_sliding_window_is_respected(window: int) -> None:
    model = small("mistral", sliding_window=window)
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


@pytest.mark.parametrize(("dtype", "gain"), [(torch.float32, GAIN), (torch.bfloat16, 1.0)])
@pytest.mark.parametrize("kind", ["mamba", "qwen3_next"])
def test_recurrent_layers_need_documents_alone(kind: str, dtype: torch.dtype, gain: float) -> None:
    """Also with small weights, where bfloat16's rounding nearly hides the leak."""
    fields = MAMBA if kind == "mamba" else SMALL | {"head_dim": 8, "layer_types": ["linear_attention"] * 4}
    assert isolate_documents(build(CONFIG_MAPPING[kind](**fields), dtype, gain)) == "alone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_with_a_mask_of_its_own_is_not_run_per_document(dtype: torch.dtype) -> None:
    # Doge adds learned weights of its keys to the mask; the tolerance of bfloat16 would hide them.
    model = build(config_of("doge"), dtype, gain=1.0)
    assert isolate_documents(model) == "mask"
    assert largest_leak(model) < (1e-5 if dtype is torch.float32 else 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softcapped_scores_are_left_to_the_models_own_attention(dtype: torch.dtype) -> None:
    """No kernel of this service caps scores. Near zero a cap changes little, too little for a comparison of logits."""
    model = small("gemma2", dtype, head_dim=8, attn_logit_softcapping=5.0)
    assert isolate_documents(model) == "mask"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_sinks_are_left_to_the_models_own_attention(dtype: torch.dtype) -> None:
    model = small("gpt_oss", dtype, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    assert isolate_documents(model) != "per_document"


def test_a_rotation_that_follows_the_longest_document_keeps_them_alone() -> None:
    """LongRoPE and dynamic NTK rotate a row by its largest position: packed, a short document like the longest one."""
    long = {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 32, "max_position_embeddings": 128}
    dynamic = {"rope_parameters": DYNAMIC_ROPE, "max_position_embeddings": 32}
    for model in (small("phi3", **long), small("llama", **dynamic)):
        assert isolate_documents(model) == "alone" or largest_leak(model) < 1e-5


def test_without_lengths_attention_is_transformers_own() -> None:
    """As in generation: a mask and a cache."""
    model = small("llama")
    ids = torch.tensor([rows(1, low=20)[0].input_ids, rows(2, low=20)[1].input_ids[:20] + [0] * 40][:1])
    expected = model(input_ids=ids).logits
    generated = model.generate(ids[:, :8], max_new_tokens=5, do_sample=False)
    isolate_documents(model)
    assert (model(input_ids=ids).logits - expected).abs().max() < 1e-5
    assert torch.equal(model.generate(ids[:, :8], max_new_tokens=5, do_sample=False), generated)


def test_an_architecture_without_the_required_arguments_is_refused() -> None:
    class Odd(LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor) -> Any:  # type: ignore[override]
            return super().forward(input_ids)

    with pytest.raises(InvalidModel, match="Odd cannot be trained here"):
        isolate_documents(Odd(LlamaConfig(**SMALL)))


def test_the_probe_leaves_the_mode_as_it_was() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).train()
    isolate_documents(model)
    assert model.training
    isolate_documents(model.eval())
    assert not model.training


def test_the_probe_runs_without_dropout() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4)).train()
    assert isolate_documents(model) != "alone"
    assert model.training


def test_probe_documents_differ_and_stay_in_a_small_vocabulary() -> None:
    model = LlamaForCausalLM(LlamaConfig(**(SMALL | {"vocab_size": 20})))
    first, second = probe_documents(model)
    assert first.input_ids != second.input_ids
    assert max([*first.input_ids, *second.input_ids]) < 20
    assert isolate_documents(model) == "per_document"


def test_layers_of_another_kind_are_not_run_per_document() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    assert _causal_layers_only(model)
    model.config.layer_types = ["full_attention", "chunked_attention"]
    assert not _causal_layers_only(model)


def test_default_attention_is_the_choice_of_transformers() -> None:
    for kind, default in (("llama", "sdpa"), ("gemma2", "eager")):
        model = small(kind)
        model.set_attn_implementation(PER_DOCUMENT)
        use_default_attention(model)
        assert model.config._attn_implementation == default


@torch.no_grad()
def largest_leak(model: PreTrainedModel) -> float:
    """The largest difference between packed logits and those of separate documents."""
    documents = rows(5)
    packed = forward(model, collate(documents, CPU))
    separate = torch.cat([forward(model, collate([document], CPU)) for document in documents])
    return float((packed - separate).abs().max())


def small(kind: str, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    return build(config_of(kind, **fields), dtype)
