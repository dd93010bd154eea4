"""Findings about specs on three model types, by the location of each finding."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from qlora_service.models.catalog.catalog import BaseModel
from qlora_service.models.compatibility import Modules, incompatibilities, positions_taken
from qlora_service.specs import Lora, PrefixTuning, parse_spec

LLAMA = BaseModel(
    name="tiny",
    path=Path("tiny"),
    source="directory",
    hub_id=None,
    revision=None,
    weights_sha256="",
    architecture="LlamaForCausalLM",
    model_type="llama",
    parameters=0,
    vocab_size=512,
    hidden_size=64,
    num_layers=4,
    max_positions=128,
    chat_template=True,
    imported_at=datetime(2026, 1, 1, tzinfo=UTC),
)
LLAMA_MODULES: Modules = {
    "embed_tokens": frozenset({(512, 64)}),
    "q_proj": frozenset({(64, 64)}),
    "k_proj": frozenset({(32, 64)}),
    "o_proj": frozenset({(64, 64)}),
    "up_proj": frozenset({(96, 64)}),
    "down_proj": frozenset({(64, 96)}),
}
UNTIED: Modules = {**LLAMA_MODULES, "lm_head": frozenset({(512, 64)})}
GPT2 = replace(LLAMA, model_type="gpt2")
GPT2_MODULES: Modules = {
    "wte": frozenset({(512, 64)}),
    "wpe": frozenset({(128, 64)}),
    "c_attn": frozenset({(64, 192)}),
    "c_proj": frozenset({(64, 64), (256, 64)}),
    "c_fc": frozenset({(64, 256)}),
}
QWEN = replace(LLAMA, model_type="qwen2")
WIDE_QUERIES: Modules = {**LLAMA_MODULES, "q_proj": frozenset({(128, 64)})}


def reasons(
    adapter: dict[str, Any], model: BaseModel = LLAMA, modules: Modules = LLAMA_MODULES, **groups: dict[str, Any]
) -> dict[str, str]:
    """The reasons of all findings, by pointer."""
    groups = {"training": {"max_seq_len_tokens": 64}} | groups
    findings = incompatibilities(parse_spec({"base_model": "tiny", "adapter": adapter, **groups}), model, modules)
    assert len({finding.pointer for finding in findings}) == len(findings)
    return {finding.pointer: finding.reason for finding in findings}


@pytest.mark.parametrize(
    ("adapter", "pointer", "reason"),
    [
        ({"target_modules": ["q_proj", "c_attn"]}, "/adapter/target_modules", "tiny has no c_attn; its modules are"),
        ({"target_modules": ["lm_head"]}, "/adapter/target_modules", "its output head is its embedding"),
        (
            {"method": "vera", "target_modules": ["embed_tokens"]},
            "/adapter/target_modules", "vera cannot adapt an embedding",
        ),
        ({"use_dora": True, "target_modules": ["embed_tokens"]}, "/adapter/target_modules", "DoRA divides"),
        (
            {"init_lora_weights": "olora", "target_modules": ["embed_tokens"]},
            "/adapter/target_modules", "OLoRA is for linear layers",
        ),
        (
            {"trainable_token_indices": [3], "target_modules": ["embed_tokens"]},
            "/adapter/target_modules", "choose one of the two",
        ),
        ({"trainable_token_indices": [3, 512]}, "/adapter/trainable_token_indices", "tokens 0 to 511, and no 512"),
        ({"init_lora_weights": "olora", "r": 33}, "/adapter/r", "set r to 32 or less"),
        ({"method": "ia3", "feedforward_modules": ["c_fc"]}, "/adapter/feedforward_modules", "c_fc is not among"),
        (
            {"method": "ia3", "feedforward_modules": ["embed_tokens"]},
            "/adapter/feedforward_modules", "embed_tokens is not among",
        ),
        ({"method": "oft", "oft_block_size": 64}, "/adapter/oft_block_size", "64 does not divide the inputs of down_p"),
        ({"method": "llama_adapter", "adapter_layers": 5}, "/adapter/adapter_layers", "set adapter_layers to 4"),
        (
            {"method": "prompt_tuning", "num_virtual_tokens": 65},
            "/training/max_seq_len_tokens", "set max_seq_len_tokens to 63 or less",
        ),
        ({"method": "prefix_tuning", "num_virtual_tokens": 128}, "/adapter/num_virtual_tokens", "128 virtual tokens"),
    ],
)  # fmt: skip
def test_incompatible_adapter_is_refused(adapter: dict[str, Any], pointer: str, reason: str) -> None:
    actual = reasons(adapter)
    assert list(actual) == [pointer]
    assert reason in actual[pointer]


def test_limits_of_one_model_type_apply_to_that_type_only() -> None:
    llama_adapter = {"method": "llama_adapter"}
    assert "of type qwen2" in reasons(llama_adapter, QWEN)["/adapter/method"]
    assert "query features" in reasons(llama_adapter, LLAMA, WIDE_QUERIES)["/adapter/method"]
    assert not reasons(llama_adapter)
    assert not reasons(llama_adapter, GPT2, GPT2_MODULES)
    dora_head = {"use_dora": True, "target_modules": ["lm_head"]}
    assert "leave out lm_head" in reasons(dora_head, LLAMA, UNTIED)["/adapter/target_modules"]


def test_transposed_shapes_of_gpt2_are_read_as_in_out() -> None:
    by_96 = {"method": "oft", "oft_block_size": 96}
    pointer = "/adapter/oft_block_size"
    assert "c_proj with 256" in reasons(by_96, GPT2, GPT2_MODULES)[pointer]
    assert "c_attn with 64" in reasons(by_96 | {"target_modules": ["c_attn"]}, GPT2, GPT2_MODULES)[pointer]
    assert not reasons({"method": "oft", "oft_block_size": 64}, GPT2, GPT2_MODULES)


def test_an_unquantized_gpt2_has_no_oft() -> None:
    unquantized = {"type": "none"}
    oft = {"method": "oft", "oft_block_size": 64}
    assert "unquantized gpt2" in reasons(oft, GPT2, GPT2_MODULES, quantization=unquantized)["/adapter/method"]
    assert not reasons({"method": "oft"}, quantization=unquantized)


def test_an_embedding_that_peft_cannot_tie_is_refused() -> None:
    wte = {"target_modules": ["wte", "c_attn"]}
    assert "wte is the output head too" in reasons(wte, GPT2, GPT2_MODULES)["/adapter/target_modules"]
    assert not reasons(wte, GPT2, {**GPT2_MODULES, "lm_head": frozenset({(512, 64)})})
    assert not reasons({"target_modules": ["wpe"]}, GPT2, GPT2_MODULES)


def test_weight_decay_is_refused_with_olora() -> None:
    decay = {"weight_decay": 0.1, "max_seq_len_tokens": 64}
    assert list(reasons({"init_lora_weights": "olora"}, training=decay)) == ["/training/weight_decay"]
    assert not reasons({}, training=decay)


def test_all_findings_are_reported_at_once() -> None:
    adapter = {
        "init_lora_weights": "olora", "r": 40, "target_modules": ["k_proj", "nowhere"],
        "trainable_token_indices": [600],
    }  # fmt: skip
    assert set(reasons(adapter)) == {"/adapter/target_modules", "/adapter/r", "/adapter/trainable_token_indices"}


@pytest.mark.parametrize(
    "adapter",
    [
        {},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"use_dora": True, "trainable_token_indices": [0, 511]},
        {"init_lora_weights": "olora", "r": 32},
        {"init_lora_weights": "gaussian", "target_modules": ["embed_tokens"]},
        {"method": "adalora"},
        {"method": "ia3", "feedforward_modules": ["down_proj"]},
        {"method": "ia3", "target_modules": ["q_proj"], "feedforward_modules": ["q_proj"]},
        {"method": "vera"},
        {"method": "oft"},
        {"method": "oft", "oft_block_size": 64, "target_modules": ["q_proj"]},
        {"method": "prompt_tuning", "num_virtual_tokens": 64},
        {"method": "prefix_tuning"},
        {"method": "p_tuning"},
        {"method": "llama_adapter", "adapter_layers": 4},
    ],
)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_compatible_adapter_is_accepted(adapter: dict[str, Any], quantization: str) -> None:
    assert not reasons(adapter, quantization={"type": quantization})


def test_an_untied_head_can_be_a_target() -> None:
    assert not reasons({"target_modules": ["lm_head"]}, LLAMA, UNTIED)
    assert not reasons({"method": "ia3", "target_modules": ["lm_head"]}, LLAMA, UNTIED)


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_prompt_tuning_is_accepted_with_preference_objectives(objective: str) -> None:
    assert not reasons({"method": "prompt_tuning"}, objective={"type": objective})


def test_virtual_tokens_take_positions() -> None:
    assert positions_taken(PrefixTuning(method="prefix_tuning", num_virtual_tokens=7)) == 7
    assert positions_taken(Lora()) == 0


def test_compatibility_is_checked_without_torch() -> None:
    program = (
        "import sys, qlora_service.models.compatibility\n"
        "assert not {'torch', 'transformers', 'peft', 'bitsandbytes'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
