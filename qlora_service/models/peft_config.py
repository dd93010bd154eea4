"""PEFT's configuration of each adapter method."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    VeraConfig,
)
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_service import specs
from qlora_service.models.targets import all_linear, last_name_part
from qlora_service.specs.adapter import LLAMA_ADAPTER_SKIPPED_LAYERS

ADALORA_INITIAL_SHARE, ADALORA_FINAL_SHARE = 0.1, 0.5
"""Shares of the steps, at the start and at the end, in which AdaLoRA keeps the initial and the final rank.

Source: the tables of arXiv:2303.10512, appendix, with 9 to 15 % and 45 to 58 %.
"""
ADALORA_MIN_STEPS = 2
"""AdaLoRA must score importance at one step before it prunes at another."""


def peft_config(adapter: specs.Adapter, base: torch.nn.Module, *, total_steps: int = 1000) -> PeftConfig:
    """PEFT's configuration of the adapter for this base; `total_steps` sets AdaLoRA's schedule.

    OLoRA becomes a plain LoRA of twice the rank and the same scale, as in PEFT's own conversion: see
    `adapters.attach_adapter`.
    """
    config = _untargeted_config(adapter, base)
    if config is not None:
        return config
    assert isinstance(adapter, specs.TargetedAdapter)
    targets: str | list[str] = adapter.target_modules
    if isinstance(targets, str):
        targets = all_linear(base) or targets
    common: dict[str, Any] = {
        "task_type": TaskType.CAUSAL_LM,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        # Conv1D (GPT-2) stores its weight transposed; quantization replaces it by an ordinary linear layer.
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in base.modules()),
    }
    match adapter:
        case specs.Lora():
            return _lora_config(adapter, base, common)
        case specs.AdaLora():
            steps = max(total_steps, ADALORA_MIN_STEPS)
            return AdaLoraConfig(
                init_r=adapter.init_r,
                target_r=adapter.target_r,
                lora_alpha=adapter.lora_alpha,
                lora_dropout=adapter.lora_dropout,
                orth_reg_weight=adapter.orth_reg_weight,
                total_step=steps,
                tinit=int(steps * ADALORA_INITIAL_SHARE),
                tfinal=min(int(steps * ADALORA_FINAL_SHARE), steps - ADALORA_MIN_STEPS),
                # Every step, so that pruned ranks are zero whenever the adapter is evaluated or saved.
                deltaT=1,
                **common,
            )
        case specs.IA3():
            return IA3Config(feedforward_modules=list(adapter.feedforward_modules), **common)
        case specs.Vera():
            # Saved, because another version of torch may draw other projections from the same key.
            return VeraConfig(
                r=adapter.r,
                vera_dropout=adapter.vera_dropout,
                d_initial=adapter.d_initial,
                projection_prng_key=adapter.projection_prng_key,
                save_projection=True,
                **common,
            )
        case specs.Oft():
            block_size, dropout = adapter.oft_block_size, adapter.module_dropout
            return OFTConfig(r=0, oft_block_size=block_size, module_dropout=dropout, **common)
    raise AssertionError(f"no configuration for {adapter!r}")


def _untargeted_config(adapter: specs.Adapter, base: Any) -> PeftConfig | None:
    task = TaskType.CAUSAL_LM
    match adapter:
        case specs.PromptTuning():
            # Start from embeddings of real tokens (arXiv:2104.08691, section 3.2): random vectors lie far from them.
            tokens = adapter.num_virtual_tokens
            return PromptTuningConfig(task_type=task, num_virtual_tokens=tokens, prompt_tuning_init="SAMPLE_VOCAB")
        case specs.PrefixTuning():
            return PrefixTuningConfig(task_type=task, num_virtual_tokens=adapter.num_virtual_tokens)
        case specs.PTuning():
            tokens, hidden_size = adapter.num_virtual_tokens, adapter.encoder_hidden_size
            return PromptEncoderConfig(task_type=task, num_virtual_tokens=tokens, encoder_hidden_size=hidden_size)
        case specs.LlamaAdapter():
            layers = base.config.num_hidden_layers
            upper = adapter.adapter_layers or max(1, layers - LLAMA_ADAPTER_SKIPPED_LAYERS)
            return AdaptionPromptConfig(task_type=task, adapter_len=adapter.adapter_len, adapter_layers=upper)
    return None


def _lora_config(adapter: specs.Lora, base: torch.nn.Module, common: dict[str, Any]) -> LoraConfig:
    rank, alpha = adapter.r, adapter.lora_alpha
    if adapter.init_lora_weights == "olora":
        rank, alpha = 2 * rank, alpha * (math.sqrt(2) if adapter.use_rslora else 2)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=adapter.lora_dropout,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        init_lora_weights="gaussian" if adapter.init_lora_weights == "gaussian" else True,
        trainable_token_indices=adapter.trainable_token_indices,
        # One adapter for an embedding and the head that shares its weight: two could not be merged into one weight.
        ensure_weight_tying=_targets_tied_embedding(adapter, base),
        bias="none",
        **common,
    )


def _targets_tied_embedding(adapter: specs.Lora, base: torch.nn.Module) -> bool:
    if not isinstance(base, PreTrainedModel) or not getattr(
        base.config.get_text_config(), "tie_word_embeddings", False
    ):
        return False
    tied = [base.get_input_embeddings(), base.get_output_embeddings()]
    names = {last_name_part(name) for name, module in base.named_modules() if any(module is one for one in tied)}
    # PEFT ties adapters under these names only, and warns about other names.
    return not names.intersection(EMBEDDING_LAYER_NAMES).isdisjoint(adapter.target_modules)
