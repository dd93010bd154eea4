"""The fast path gives the numbers of plain transformers, and leaves lookalikes of Llama to the general path."""

from __future__ import annotations

import pytest
import torch

from qlora_service.specs import Lora
from qlora_service.training.network.llama_layers import llama_decoder
from tests.judges import adapted, assert_same_step, build, pair
from tests.network_cases import config_of
from tests.tiny_training import rows

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
MISTRAL3_ROPE = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
DOCUMENTS = rows(4, low=20, high=60)
FAST_CASES = {
    "llama": (config_of("llama"), Lora(r=4)),
    "llama, tied embeddings": (config_of("llama", tie_word_embeddings=True), Lora(r=4)),
    "llama, one key for all heads": (config_of("llama", num_key_value_heads=1), Lora(r=4)),
    "llama, biases": (config_of("llama", attention_bias=True, mlp_bias=True), Lora(r=4)),
    "llama, llama3 rope": (config_of("llama", rope_parameters=LLAMA3_ROPE), Lora(r=4)),
    "llama, yarn": (config_of("llama", rope_parameters=YARN_ROPE), Lora(r=4)),
    "llama, wide heads": (config_of("llama", head_dim=16), Lora(r=4)),
    "mistral, window shorter than documents": (config_of("mistral", sliding_window=14), Lora(r=4)),
    "qwen2, q/k/v biases": (config_of("qwen2"), Lora(r=4)),
    "qwen2, window on the upper layers": (
        config_of("qwen2", use_sliding_window=True, sliding_window=14, max_window_layers=2),
        Lora(r=4),
    ),
    "qwen3, q/k norms": (config_of("qwen3", head_dim=16), Lora(r=4)),
    "only q and v": (config_of("llama"), Lora(r=4, target_modules=["q_proj", "v_proj"])),
    "only down": (config_of("llama"), Lora(r=4, target_modules=["down_proj"])),
    "odd rank and alpha": (config_of("llama"), Lora(r=5, lora_alpha=7.0)),
    "rslora": (config_of("llama"), Lora(r=3, lora_alpha=5.0, use_rslora=True)),
    "olora": (config_of("llama"), Lora(r=4, init_lora_weights="olora")),
}
LOOKALIKES = {
    "granite": config_of("granite", residual_multiplier=0.5, logits_scaling=8.0, embedding_multiplier=2.0),
    "granite, nearly llama": config_of("granite", residual_multiplier=0.9),
    "smollm3, layers without rotation": config_of("smollm3"),
    "smollm3, half of them": config_of("smollm3", no_rope_layers=[1, 0, 1, 0]),
    "helium, interleaved rotation": config_of("helium", head_dim=8),
    "ernie 4.5, interleaved rotation": config_of("ernie4_5", head_dim=8),
    "ministral3, scale by position": config_of("ministral3", head_dim=8, rope_parameters=MISTRAL3_ROPE),
    "gemma2": config_of("gemma2", head_dim=8, sliding_window=14, attn_logit_softcapping=2.0),
    "gemma3": config_of("gemma3_text", head_dim=8, sliding_window=14),
    "olmo2": config_of("olmo2"),
    "exaone4": config_of("exaone4", sliding_window=14, sliding_window_pattern=2),
    "glm4": config_of("glm4", head_dim=8),
    "arcee": config_of("arcee"),
}


@pytest.mark.parametrize("case", FAST_CASES)
def test_the_fast_path_gives_the_numbers_of_transformers(case: str) -> None:
    """Documents are longer than the probe document that chooses the path, and than every window."""
    config, adapter = FAST_CASES[case]
    network, plain = pair(config, adapter, torch.float64)
    assert (network.layers, network.head) == ("llama", "fused")
    assert_same_step(network, plain, DOCUMENTS, 1e-9, 1e-9)


@pytest.mark.parametrize("case", FAST_CASES)
def test_the_general_path_gives_the_numbers_of_transformers(case: str) -> None:
    config, adapter = FAST_CASES[case]
    network, plain = pair(config, adapter, torch.float64, fast=False)
    assert (network.layers, network.head) == ("general", "fused")
    assert_same_step(network, plain, DOCUMENTS, 1e-9, 1e-9)


@pytest.mark.parametrize("case", ["llama", "qwen3, q/k norms", "only q and v"])
def test_recomputed_activations_give_the_same_numbers(case: str) -> None:
    config, adapter = FAST_CASES[case]
    network, plain = pair(config, adapter, torch.float64)
    assert network.checkpoint()
    assert network.layers == "llama"
    assert_same_step(network, plain, DOCUMENTS, 1e-9, 1e-9)


def test_a_gradient_reaches_no_base_weight_and_no_embedding() -> None:
    network, _ = pair(config_of("llama"))
    network.losses(DOCUMENTS).nll.sum().backward()
    with_gradient = {name for name, p in network.model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in network.model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("case", LOOKALIKES)
def test_lookalikes_of_llama_stay_on_the_general_path_with_correct_numbers(case: str) -> None:
    network, plain = pair(LOOKALIKES[case])
    assert network.layers == "general"
    assert_same_step(network, plain, DOCUMENTS, 1e-5, 1e-3)


@pytest.mark.parametrize("case", LOOKALIKES)
def test_lookalikes_of_llama_stay_on_the_general_path_in_bfloat16_too(case: str) -> None:
    """In bfloat16, rounding would hide the difference if only a few losses were compared."""
    network, _ = pair(LOOKALIKES[case], dtype=torch.bfloat16)
    assert network.layers == "general"


@pytest.mark.parametrize(
    "adapter",
    [Lora(r=4, lora_dropout=0.1), Lora(r=4, use_dora=True)],
    ids=["dropout", "dora"],
)
def test_adapters_that_are_not_plain_lora_stay_on_the_general_path(adapter: Lora) -> None:
    network, plain = pair(config_of("llama"), adapter)
    assert (network.layers, network.head) == ("general", "fused")
    network.model.eval(), plain.eval()
    assert_same_step(network, plain, DOCUMENTS, 1e-5, 1e-3)


def test_one_layer_of_another_kind_keeps_the_whole_model_on_the_general_path() -> None:
    base = build(config_of("llama"))
    base.model.layers[2].mlp.act_fn = torch.nn.GELU()
    model = adapted(base, Lora(r=4))
    assert llama_decoder(model.get_base_model()) is None
    base.model.layers[2].mlp.act_fn = torch.nn.SiLU()
    assert llama_decoder(model.get_base_model()) is not None


def test_a_trained_norm_keeps_the_model_on_the_general_path() -> None:
    base = build(config_of("llama"))
    model = adapted(base, Lora(r=4))
    base.model.layers[0].input_layernorm.weight.requires_grad_(True)
    assert llama_decoder(model.get_base_model()) is None
