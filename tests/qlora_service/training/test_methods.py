"""Every adapter method on every quantization: trained, saved, and loaded onto a fresh base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from qlora_service.errors import InvalidSpec
from qlora_service.models.adapters import (
    attach_adapter,
    checkpoint_activations,
    load_adapter,
    save_adapter,
)
from qlora_service.models.base.quantize import base_fingerprint, load_base
from qlora_service.models.catalog.catalog import BaseModel, Catalog
from qlora_service.models.compatibility import Modules, incompatibilities
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
    Training,
    Vera,
    parse_spec,
)
from qlora_service.training.network.isolation import isolate_documents
from tests.tiny_training import CPU, frozen_hash, network, rows, run, weights

METHODS: dict[str, Adapter] = {
    "lora": Lora(r=4),
    "rslora": Lora(r=4, use_rslora=True),
    "dora": Lora(r=4, use_dora=True),
    "gaussian": Lora(r=4, init_lora_weights="gaussian"),
    "olora": Lora(r=4, init_lora_weights="olora"),
    "lora+": Lora(r=4, lora_dropout=0.1),
    "tokens": Lora(r=4, trainable_token_indices=[3, 7]),
    "embedding": Lora(r=4, target_modules=["embed_tokens", "q_proj"]),
    "adalora": AdaLora(method="adalora", init_r=4, target_r=2),
    "ia3": IA3(method="ia3", feedforward_modules=["down_proj"]),
    "vera": Vera(method="vera", r=16),
    "oft": Oft(method="oft"),
    "prompt_tuning": PromptTuning(method="prompt_tuning", num_virtual_tokens=5),
    "prefix_tuning": PrefixTuning(method="prefix_tuning", num_virtual_tokens=5),
    "p_tuning": PTuning(method="p_tuning", num_virtual_tokens=5, encoder_hidden_size=32),
    "llama_adapter": LlamaAdapter(method="llama_adapter", adapter_len=4, adapter_layers=2),
}
QUANTIZATIONS = {
    "nf4": Quantization(),
    "nf4-single": Quantization(double_quant=False),
    "fp4": Quantization(type="fp4"),
    "fp4-single": Quantization(type="fp4", double_quant=False),
    "int8": Quantization(type="int8"),
    "none": Quantization(type="none"),
}
IDENTITY_AT_START = ["lora", "rslora", "gaussian", "adalora", "ia3", "vera", "oft", "llama_adapter"]
STEPS = 2
HELD_OUT = rows(3, seed=5)


@pytest.fixture(scope="module")
def catalogued_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[BaseModel, Modules]:
    catalog = Catalog(tmp_path_factory.mktemp("models"))
    model = catalog.import_model("tiny", tiny_model)
    return model, catalog.module_shapes(model)


def training(method: str) -> Training:
    ratio = 16.0 if method == "lora+" else None
    return Training(batch_size=2, learning_rate=0.01, loraplus_lr_ratio=ratio, max_seq_len_tokens=64)


def refused(method: str, quantization: str, catalogued_model: tuple[BaseModel, Modules]) -> bool:
    """Whether the API refuses a job with this method and quantization."""
    parts = {"quantization": QUANTIZATIONS[quantization], "adapter": METHODS[method], "training": training(method)}
    try:
        spec = parse_spec({"base_model": "tiny"} | {name: part.model_dump() for name, part in parts.items()})
    except InvalidSpec:
        return True
    return bool(incompatibilities(spec, *catalogued_model))


def load_attached(directory: Path, method: str, quantization: str) -> PeftModel:
    base = load_base(directory, QUANTIZATIONS[quantization], torch.bfloat16, CPU)
    isolate_documents(base)
    return attach_adapter(base, METHODS[method], seed=0, total_steps=STEPS)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_and_reloads_on_a_quantization(
    method: str, quantization: str, tiny_model: Path, tmp_path: Path, catalogued_model: tuple[BaseModel, Modules]
) -> None:
    if refused(method, quantization, catalogued_model):
        with pytest.raises(AttributeError):  # PEFT reads scales that bitsandbytes has moved
            run(load_attached(tiny_model, method, quantization), rows(4), training(method), steps=STEPS)
        return
    model = load_attached(tiny_model, method, quantization)
    before = weights(model)
    frozen = frozen_hash(model)

    run(model, rows(4), training(method), steps=STEPS)

    assert frozen_hash(model) == frozen
    after = dict(model.named_parameters())
    assert [name for name, start in before.items() if torch.equal(after[name], start)] == []
    assert {after[name].dtype for name in before} == {torch.float32}

    net = network(model)
    expected = net.evaluate(HELD_OUT).nll
    save_adapter(model, tmp_path, "tiny", None)
    fresh = load_base(tiny_model, QUANTIZATIONS[quantization], torch.bfloat16, CPU)
    isolate_documents(fresh)
    reloaded = network(load_adapter(fresh, tmp_path), paths=net.paths)
    assert torch.equal(reloaded.evaluate(HELD_OUT).nll, expected)


def test_only_dora_on_int8_is_refused(catalogued_model: tuple[BaseModel, Modules]) -> None:
    refusals = {(m, q) for m in METHODS for q in QUANTIZATIONS if refused(m, q, catalogued_model)}
    assert refusals == {("dora", "int8")}


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("method", IDENTITY_AT_START)
def test_initial_outputs_equal_those_of_the_base_bit_for_bit(method: str, quantization: str, tiny_model: Path) -> None:
    base = load_base(tiny_model, QUANTIZATIONS[quantization], torch.bfloat16, CPU)
    before = base_fingerprint(base)
    assert base_fingerprint(attach_adapter(base, METHODS[method], seed=0)) == before


@pytest.mark.parametrize("method", METHODS)
def test_recomputed_activations_give_the_same_gradients(method: str, tiny_model: Path) -> None:
    gradients = []
    for recompute in (False, True):
        model = load_attached(tiny_model, method, "nf4").train()
        if recompute:
            assert checkpoint_activations(model) is (method != "prefix_tuning")
        batch = torch.arange(5, 25)[None]
        model(batch).logits.float().square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
