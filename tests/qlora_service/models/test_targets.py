"""Adapters on mixtures of experts and on Mamba: what is adapted, what is refused, and files that PEFT loads again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from transformers import PreTrainedModel

from qlora_service.errors import InvalidSpec
from qlora_service.models.adapters import attach_adapter, save_adapter
from qlora_service.models.base.quantize import load_base
from qlora_service.models.peft_config import peft_config
from qlora_service.models.targets import HYBRID_MODELS, MAMBA_MODULES
from qlora_service.specs import IA3, AdaLora, Adapter, Lora, Quantization, Vera
from tests.qlora_service.models.adapter_cases import CPU, logits, train
from tests.tiny_families import FAMILIES, build_family

pytestmark = [
    pytest.mark.slow,
    # PEFT looks for its own pattern among modules only, and applies it to the parameter.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]
BASES: dict[str, Path] = {}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The directory of a family's tiny model, built once."""

    def build(family: str) -> Path:
        if family not in BASES:
            BASES[family] = build_family(tmp_path_factory.mktemp("families") / family, family)
        return BASES[family]

    return build


def load(directory: Path, kind: str = "nf4") -> PreTrainedModel:
    return load_base(directory, Quantization.model_validate({"type": kind}), torch.float32, CPU)


def adapted(model: PeftModel) -> set[str]:
    """Last parts of the names of the adapted modules, or of the adapted parameter."""
    return {
        getattr(module, "parameter_name", name.rpartition(".")[2])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_trains_and_peft_loads_the_files(directory: Any, family: str, tmp_path: Path) -> None:
    model = attach_adapter(load(directory(family)), Lora(r=2), seed=0)
    train(model, range(1, 3))
    save_adapter(model, tmp_path, "base", None)
    loaded = PeftModel.from_pretrained(load(directory(family)), str(tmp_path))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert not torch.equal(logits(loaded), logits(load(directory(family))))


@pytest.mark.parametrize(
    ("family", "left_out"), [("falcon_h1", {"out_proj", "conv1d"}), ("phimoe", {"router"}), ("llama4_text", {"router"})]
)
@pytest.mark.parametrize(
    "adapter",
    [Lora(r=2), AdaLora(method="adalora", init_r=2, target_r=1), IA3(method="ia3"), Vera(method="vera", r=8)],
    ids=lambda adapter: adapter.method,
)
def test_all_linear_leaves_out_what_cannot_be_adapted(
    directory: Any, family: str, left_out: set[str], adapter: Adapter
) -> None:
    config = attach_adapter(load(directory(family)), adapter, seed=0).active_peft_config
    names = {name.rpartition(".")[2] for name in config.target_modules}
    assert {"q_proj", "o_proj"} <= names
    assert not left_out & names


def test_plain_models_keep_the_selection_of_peft(tiny_model: Path) -> None:
    assert peft_config(Lora(), load(tiny_model)).target_modules == "all-linear"


@pytest.mark.parametrize(
    ("family", "adapter", "location", "reason"),
    [
        ("falcon_h1", {"target_modules": ["q_proj", "out_proj"]}, "target_modules",
         "PEFT cannot adapt out_proj of this base; it can adapt down_proj, gate_proj, in_proj, k_proj, o_proj"),
        ("phimoe", {"target_modules": ["router"]}, "target_modules",
         "PEFT cannot adapt router of this base; it can adapt k_proj, o_proj, q_proj, v_proj"),
        ("phimoe", {"target_modules": ["q_proj", "w1"]}, "target_modules", "cannot adapt w1 of this base"),
        ("gpt_oss", {"target_modules": ["router"]}, "target_modules", "cannot adapt router of this base"),
        ("mixtral", {"target_modules": ["w1"]}, "target_modules", "w1 without also targeting w3"),
        ("mixtral", {"lora_dropout": 0.1}, "lora_dropout", "set lora_dropout to 0"),
        ("mixtral", {"use_dora": True}, "use_dora", "set use_dora to false"),
        ("mixtral", {"init_lora_weights": "olora"}, "init_lora_weights", "set init_lora_weights to default"),
        ("deepseek_v3", {"target_modules": ["gate_proj"]}, "target_modules", "without also targeting up_proj"),
    ],
)  # fmt: skip
def test_targets_that_peft_cannot_adapt_are_refused(
    directory: Any, family: str, adapter: dict[str, Any], location: str, reason: str
) -> None:
    with pytest.raises(InvalidSpec) as refused:
        attach_adapter(load(directory(family)), Lora.model_validate(adapter), seed=0)
    assert refused.value.location == f"/adapter/{location}"
    assert reason in refused.value.message
    assert refused.value.findings[0].pointer == refused.value.location


def test_fused_experts_have_the_rank_of_both_halves_and_the_same_scale(directory: Any) -> None:
    model = attach_adapter(load(directory("mixtral")), Lora(r=2, lora_alpha=6), seed=0)
    ranks = {
        module.parameter_name: (module.r["default"], module.scaling["default"])
        for module in model.modules()
        if isinstance(module, ParamWrapper)
    }
    assert ranks == {"gate_up_proj": (4, 3.0), "down_proj": (2, 3.0), "weight": (2, 3.0)}


@pytest.mark.parametrize("names", [["w1", "w3"], ["w1", "w2", "w3"], ["q_proj", "w2"], ["gate"]])
def test_published_names_of_experts_are_accepted(directory: Any, names: list[str]) -> None:
    model = attach_adapter(load(directory("mixtral")), Lora(r=2, target_modules=names), seed=0)
    expected = {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj", "gate": "weight"}
    assert adapted(model) == {expected.get(name, name) for name in names}


@pytest.mark.parametrize("name", sorted(MAMBA_MODULES))
def test_modules_of_mamba_are_those_that_peft_refuses(directory: Any, name: str) -> None:
    base = load(directory("falcon_h1"))
    config = peft_config(Lora(target_modules=["q_proj"]), base)
    for model_type in HYBRID_MODELS:
        base.config.model_type = model_type
        with pytest.raises(ValueError, match="incompatible with Mamba"):
            _check_lora_target_modules_mamba(config, base, name)
