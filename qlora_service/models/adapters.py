"""LoRA adapters: attach to a frozen base, save as files that PEFT loads anywhere, load them back."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel

from qlora_service.errors import InvalidSpec
from qlora_service.specs import Adapter

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def attach(base: PreTrainedModel, adapter: Adapter, seed: int) -> PeftModel:
    """The base with a new adapter: A random, B zero, so that the first outputs are the base's own.

    Adapter weights are float32 whatever the compute dtype; the base stays frozen and its own dropout off.

    Raises:
        InvalidSpec: a target module that the base does not have.
    """
    targets = adapter.target_modules
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    silence_dropout(base)
    torch.manual_seed(seed)
    try:
        model = get_peft_model(base, config, autocast_adapter_dtype=True)
    except ValueError as error:
        raise InvalidSpec(f"the adapter cannot be attached: {error}", location="/adapter") from error
    for parameter in trainable(model):
        parameter.data = parameter.data.float()
    return model


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that are learned, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def checkpoint_activations(model: PeftModel) -> bool:
    """Recompute each layer's activations in the backward pass; False where the architecture cannot.

    Non-reentrant, and switched on after the adapter is attached: gradients reach the adapters though the embeddings
    below are frozen, and none are computed for the embeddings.
    """
    base: PreTrainedModel = model.get_base_model()
    if not base.supports_gradient_checkpointing:
        return False
    base.activation_checkpointing_enable({"use_reentrant": False})
    return True


def silence_dropout(base: torch.nn.Module) -> None:
    """Turn off the base's own dropout: it is frozen, and only the adapter's dropout is asked for."""
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        # Many architectures keep a rate for F.dropout: dropout, attention_dropout, hidden_dropout, …
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def save_adapter(model: PeftModel, directory: Path, base_reference: str, revision: str | None) -> None:
    """Write the adapter's weights and config; the base is named by `base_reference`, never by a local path."""
    directory.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.items())}
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": base_reference, "revision": revision, "inference_mode": True}
    text = json.dumps(config, indent=2, sort_keys=True, default=_as_json)
    (directory / CONFIG).write_text(text + "\n", encoding="utf-8")


def load_adapter(base: PreTrainedModel, directory: Path) -> PeftModel:
    """The base with a saved adapter, for evaluation."""
    return PeftModel.from_pretrained(base, str(directory), local_files_only=True)


def _as_json(value: object) -> object:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)
