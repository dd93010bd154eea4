"""Restoring a base after real training with every adapter method."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from transformers import PreTrainedModel

from qlora_service.models.adapters import attach_adapter, detach
from qlora_service.models.base.base_state import BaseState
from qlora_service.models.base.quantize import base_fingerprint, load_base
from qlora_service.specs import Adapter, Quantization, Training
from qlora_service.training.network.isolation import isolate_documents
from tests.tiny_training import CPU, network, rows, run

METHODS: list[dict[str, Any]] = [
    {"r": 4, "lora_dropout": 0.1},
    {"r": 4, "use_dora": True},
    {"r": 4, "init_lora_weights": "olora"},
    {"r": 4, "trainable_token_indices": [3, 4]},
    {"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    {"method": "adalora", "init_r": 4, "target_r": 2},
    {"method": "ia3"},
    {"method": "vera", "r": 8},
    {"method": "oft"},
    {"method": "prompt_tuning"},
    {"method": "prefix_tuning"},
    {"method": "p_tuning"},
    {"method": "llama_adapter", "adapter_layers": 2},
]


def load(tiny_model: Path, kind: str = "nf4") -> PreTrainedModel:
    base = load_base(tiny_model, Quantization.model_validate({"type": kind}), torch.bfloat16, CPU)
    isolate_documents(base)
    return base


def weight_hashes(base: PreTrainedModel) -> dict[str, str]:
    """A hash of every tensor, quantization constants included."""
    tensors: dict[str, torch.Tensor] = dict(base.named_parameters()) | dict(base.named_buffers())
    for name, weight in base.named_parameters():
        if (state := getattr(weight, "quant_state", None)) is not None:
            tensors |= {f"{name} absmax": state.absmax, f"{name} code": state.code}
    return {
        name: hashlib.sha256(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in tensors.items()
    }


def structure(base: PreTrainedModel) -> dict[str, Any]:
    """Modules, settings, hooks and parameter identities of the base, without the values of its weights."""
    parts: dict[str, Any] = {"config": repr(sorted(vars(base.config).items()))}
    for name, module in base.named_modules():
        hooks = [len(value) for key, value in vars(module).items() if key.endswith("hooks")]
        parts[name] = id(module), type(module), sorted(vars(module)), hooks, module.training
    return parts | {name: (id(p), p.requires_grad, p.grad) for name, p in base.named_parameters()}


def train(base: PreTrainedModel, method: dict[str, Any]) -> Any:
    """The base with an adapter trained on it, with activation checkpointing where supported."""
    adapter = TypeAdapter(Adapter).validate_python(method)
    model = attach_adapter(base, adapter, seed=0, total_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about tied embeddings
        network(model).checkpoint()
        run(model, rows(8), Training(batch_size=4, learning_rate=1e-2), steps=2)
    return model


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_base_is_restored_after_every_method_with_its_adapter_detached_or_not(
    tiny_model: Path, method: dict[str, Any]
) -> None:
    base = load(tiny_model)
    fingerprint, hashes_before = base_fingerprint(base), weight_hashes(base)
    structure_before, state = structure(base), BaseState(base)
    for unload in (True, False):
        model = train(base, method)
        if unload:
            detach(model)
        assert structure(base) != structure_before
        assert state.restore()
        assert structure(base) == structure_before
        assert weight_hashes(base) == hashes_before
        assert base_fingerprint(base) == fingerprint


def test_int8_base_is_restored(tiny_model: Path) -> None:
    base = load(tiny_model, "int8")
    fingerprint, hashes_before, state = base_fingerprint(base), weight_hashes(base), BaseState(base)
    train(base, METHODS[0])
    assert state.restore()
    assert (weight_hashes(base), base_fingerprint(base)) == (hashes_before, fingerprint)


def test_replaced_weight_is_detected(tiny_model: Path) -> None:
    base = load(tiny_model)
    state = BaseState(base)
    norm: Any = base.get_decoder().norm
    norm.weight.data = norm.weight.data.clone()
    assert not state.restore()


def test_overwritten_weight_changes_the_fingerprint(tiny_model: Path) -> None:
    base = load(tiny_model)
    fingerprint, state = base_fingerprint(base), BaseState(base)
    with torch.no_grad():
        base.get_decoder().norm.weight.mul_(1.5)
    assert state.restore()
    assert base_fingerprint(base) != fingerprint
