"""Modules whose forward is replaced, and the equality of its results."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from qlora_service.models.adapters import detach
from qlora_service.specs import Lora
from qlora_service.training.network.fused_modules import frozen_norm, fuse, is_silu, unfuse
from tests.judges import SMALL, adapted, build, make_norms_exact, plain_losses
from tests.network_cases import config_of
from tests.tiny_training import gradients, rows

DOCUMENTS = rows(3)


def model_of(kind: str, dtype: torch.dtype = torch.float64, adapter: Lora | None = None, **fields: Any) -> Any:
    return adapted(build(config_of(kind, **fields), dtype), adapter or Lora(r=4))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_fused_model_computes_the_same(kind: str) -> None:
    model = model_of(kind)
    plain = copy.deepcopy(model)
    make_norms_exact(plain)
    kinds = {type(module).__name__.removeprefix("Llama").removeprefix("Qwen3") for module in fuse(model)}
    assert kinds == {"Linear", "RMSNorm", "MLP"}
    losses, expected = plain_losses(model, DOCUMENTS), plain_losses(plain, DOCUMENTS)
    assert (losses - expected).abs().max() < 1e-11
    losses.sum().backward()
    expected.sum().backward()
    reference = gradients(plain)
    for name, gradient in gradients(model).items():
        assert (gradient - reference[name]).abs().max() <= 1e-10 * reference[name].abs().max(), name


def test_every_lora_layer_norm_and_gated_layer_is_fused() -> None:
    layers = SMALL["num_hidden_layers"]
    assert isinstance(layers, int)
    # Per decoder layer seven LoRA layers, two norms (Qwen 3: four) and one gated layer; after them the last norm.
    assert len(fuse(model_of("llama"))) == layers * (7 + 2 + 1) + 1
    assert len(fuse(model_of("qwen3"))) == layers * (7 + 4 + 1) + 1


def test_unfused_modules_have_their_own_forward_again() -> None:
    model = model_of("llama")
    fused = fuse(model)
    assert all("forward" in vars(module) for module in fused)
    unfuse(fused)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_detached_base_computes_the_same_as_before() -> None:
    base = build(config_of("llama"))
    before = plain_losses(base, DOCUMENTS)
    model = adapted(base, Lora(r=4))
    fuse(model)
    assert (plain_losses(model, DOCUMENTS) - before).abs().max() > 0.01
    assert (plain_losses(detach(model), DOCUMENTS) - before).abs().max() < 1e-5


def test_modules_that_compute_something_else_keep_their_results() -> None:
    """Gemma's norm multiplies by one plus its weight, and its gate is a GeLU; Phi-3's gate and up are one layer."""
    for kind in ("gemma2", "phi3", "gpt_neox"):
        model = model_of(kind, torch.float32, attn_implementation="eager")
        plain = copy.deepcopy(model)
        fuse(model)
        assert (plain_losses(model, DOCUMENTS) - plain_losses(plain, DOCUMENTS)).abs().max() < 1e-5, kind
    gemma = build(config_of("gemma2"))
    assert fuse(gemma) == []


def test_dora_is_left_to_peft_and_dropout_draws_the_same_masks() -> None:
    assert not any("lora" in type(module).__module__ for module in fuse(model_of("llama", adapter=Lora(use_dora=True))))
    model = model_of("llama", adapter=Lora(r=4, lora_dropout=0.3))
    plain = copy.deepcopy(model)
    make_norms_exact(plain)
    fuse(model)
    losses = []
    for peft_model in (model, plain):
        torch.manual_seed(5)
        losses.append(plain_losses(peft_model, DOCUMENTS))
    assert (losses[0] - losses[1]).abs().max() < 1e-11


def test_only_a_frozen_rms_norm_is_a_frozen_norm() -> None:
    frozen = LlamaRMSNorm(8, eps=0.25).requires_grad_(False)
    norm = frozen_norm(frozen)
    assert norm is not None
    assert (norm.eps, norm.weight.data_ptr()) == (0.25, frozen.weight.data_ptr())
    assert frozen_norm(LlamaRMSNorm(8)) is None
    assert frozen_norm(Gemma2RMSNorm(8).requires_grad_(False)) is None
    assert frozen_norm(torch.nn.LayerNorm(8).requires_grad_(False)) is None


def test_only_a_silu_makes_a_swiglu() -> None:
    config = config_of("llama")
    assert is_silu(LlamaMLP(config).act_fn)
    assert is_silu(torch.nn.SiLU())
    config.hidden_act = "gelu"
    assert not is_silu(LlamaMLP(config).act_fn)
    assert len(fuse(LlamaMLP(config))) == 0
