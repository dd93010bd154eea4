"""Adapters attached to meta tensors: the same counts as on a real base, and the weights that stay without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from qlora_service.models.adapters import WEIGHTS, attach_adapter, save_adapter, trainable_parameters
from qlora_service.models.base.quantize import load_base
from qlora_service.planning.attachment import PLAIN_MODELS, Attachment
from qlora_service.planning.simulation.simulated_attachment import simulated_attachment
from qlora_service.planning.simulation.simulated_base import META, with_first_layers
from qlora_service.specs import JobSpec
from tests.tiny_families import build_family, family_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]
EXPERTS = {"model.layers.*.mlp.experts.gate_up_proj", "model.layers.*.mlp.experts.down_proj"}
DENSE = {f"model.layers.*.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
SHARED = {f"model.layers.*.mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")}


def attached(family: str, adapter: dict[str, Any], **sizes: Any) -> Attachment:
    job = JobSpec.model_validate({"base_model": "tiny", "adapter": adapter})
    return simulated_attachment(family_config(family, **sizes).to_dict(), job)


@pytest.mark.parametrize("adapter", [{"r": 2}, {"method": "adalora"}, {"method": "vera", "r": 8}], ids=str)
@pytest.mark.parametrize("family", ["falcon_h1", "mixtral", "glm4_moe", "phimoe"])
def test_counts_are_those_of_a_real_base(family: str, adapter: dict[str, Any], tmp_path: Path) -> None:
    found = attached(family, adapter)
    job = JobSpec.model_validate({"base_model": "tiny", "adapter": adapter})
    directory = build_family(tmp_path / "base", family)
    base = load_base(directory, job.quantization, torch.float32, torch.device("cpu"))
    model = attach_adapter(base, job.adapter, seed=0)
    save_adapter(model, tmp_path, "base", None)
    assert found.trained_parameters == sum(parameter.numel() for parameter in trainable_parameters(model))
    assert found.stored_parameters == sum(tensor.numel() for tensor in load_file(tmp_path / WEIGHTS).values())
    stored = {tensor.data_ptr(): tensor.numel() for tensor in load_file(directory / "model.safetensors").values()}
    # The file has buffers too, such as a router's bias.
    assert found.base_parameters == pytest.approx(sum(stored.values()), rel=1e-3)


@pytest.mark.parametrize(
    ("family", "adapter", "left_out", "linear"),
    [
        ("qwen2_moe", {}, EXPERTS | {"model.layers.*.mlp.gate.weight"}, False),
        ("qwen2_moe", {"target_modules": ["gate_proj", "up_proj"]}, {"model.layers.*.mlp.experts.gate_up_proj"}, False),
        ("qwen2_moe", {"target_modules": ["q_proj", "v_proj"]}, set(), False),
        ("gpt_oss", {}, EXPERTS | {"model.layers.*.mlp.router.weight"}, False),
        ("mixtral", {}, set(), False),
        ("mixtral", {"method": "adalora"}, EXPERTS | {"model.layers.*.mlp.gate.weight"}, False),
        ("glm4_moe", {}, DENSE | SHARED, True),
        ("deepseek_v3", {}, DENSE | SHARED, True),
        ("deepseek_v3", {"target_modules": ["down_proj"]},
         {name for name in DENSE | SHARED if "down" in name}, True),
        ("falcon_h1", {}, {"model.layers.*.mamba.out_proj.weight"}, True),
    ],
)  # fmt: skip
def test_weights_without_adapter_are_those_that_the_targets_select(
    family: str, adapter: dict[str, Any], left_out: set[str], linear: bool
) -> None:
    found = attached(family, adapter)
    assert (set(found.left_out), found.linear_left_out) == (left_out, linear)


def test_share_counts_packed_weights_as_weights() -> None:
    found = attached("gpt_oss", {}, intermediate_size=512)
    assert found.left_out["model.layers.*.mlp.experts.down_proj"] == 2 * 4 * 512 * 64
    assert (found.warning or "").startswith("89% of the base's weights (the routed experts: ")


def test_refused_adapter_has_its_findings() -> None:
    found = attached("mixtral", {"target_modules": ["w1"], "lora_dropout": 0.1})
    assert found.location == "/adapter/target_modules"
    assert "without also targeting w3" in (found.refusal or "")


@pytest.mark.parametrize("model_type", sorted(PLAIN_MODELS))
def test_every_matrix_of_a_plain_model_is_an_embedding_or_a_linear_layer(model_type: str) -> None:
    config = with_first_layers(CONFIG_MAPPING[model_type]().to_dict(), 2)
    with META:
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type].from_dict(config))
    for name, parameter in model.named_parameters():
        module_name, _, last = name.rpartition(".")
        if parameter.dim() > 1:
            module = model.get_submodule(module_name)
            assert last == "weight"
            assert type(module) in {torch.nn.Linear, Conv1D} or isinstance(module, torch.nn.Embedding), name


def test_infinity_of_a_config_file_is_read(tmp_path: Path) -> None:
    config = json.loads((build_family(tmp_path / "base", "falcon_h1") / "config.json").read_text())
    assert config["time_step_limit"][1] == {"__float__": "Infinity"}
    found = simulated_attachment(config, JobSpec(base_model="tiny"))
    assert found.trained_parameters == attached("falcon_h1", {}).trained_parameters
