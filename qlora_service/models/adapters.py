"""Adapters of every method: attach to a frozen base, save as files that PEFT loads, load again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.adaption_prompt.layer import _BaseAdaptedAttention as AdaptedAttention
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qlora_service.errors import InvalidSpec
from qlora_service.models.base.quantize import dequantized_weight
from qlora_service.models.peft_config import peft_config
from qlora_service.models.targets import check_targets, last_name_part
from qlora_service.models.tied_head import tie_head
from qlora_service.specs import (
    IA3,
    Adapter,
    Lora,
    TargetedAdapter,
)

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
NAME = "default"
"""PEFT's name of an adapter without a name."""

LLAMA_ADAPTER_WEIGHTS = {"adaption_prompt", "adaption_gate"}


def attach_adapter(base: PreTrainedModel, adapter: Adapter, seed: int, *, total_steps: int = 1000) -> PeftModel:
    """The base with a new adapter.

    Adapter weights are float32 for every compute dtype. The base stays frozen and unchanged, its own dropout off.

    OLoRA, h = (W - s B₀A₀) x + s B A x, is computed as h = W x + s [B B₀] [A; -A₀] x with a constant second half.
    PEFT changes W instead: on a quantized base this quantizes the residual again, and the files give the right
    outputs only where a loader repeats the decomposition on the same W.

    Raises:
        InvalidSpec: PEFT or this base does not support the adapter.
    """
    disable_dropout(base)
    torch.manual_seed(seed)
    config = peft_config(adapter, base, total_steps=total_steps)
    if isinstance(adapter, TargetedAdapter):
        check_targets(adapter, base, config)
    try:
        model = get_peft_model(base, config, autocast_adapter_dtype=True)
    except (ValueError, TypeError) as error:
        raise InvalidSpec(f"the adapter cannot be attached: {error}", location="/adapter") from error
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad = False  # AdaLoRA's scale: PEFT 0.21 trains it and does not save it
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    _cast_adapter_outputs(model)
    if isinstance(adapter, IA3):
        # PEFT has expanded "all-linear" to full names, and at loading requires the feed-forward modules among them.
        config = model.active_peft_config
        config.feedforward_modules = {
            name for name in config.target_modules if last_name_part(name) in config.feedforward_modules
        }
    if isinstance(adapter, Lora) and adapter.init_lora_weights == "olora":
        _init_olora(model, adapter.r)
    tie_head(model, NAME)
    return model


def detach(model: PeftModel) -> PreTrainedModel:
    """The base, without the adapter."""
    base: PreTrainedModel = model.get_base_model()
    config = model.active_peft_config
    if config.is_adaption_prompt:
        model.base_model.disable_adapter_layers()
    elif isinstance(config, IA3Config):
        # PEFT's unload refuses quantized bases, as if it had to merge.
        for name, module in list(base.named_modules()):
            if isinstance(module, IA3Layer):
                base.set_submodule(name, module.get_base_layer())
    elif not config.is_prompt_learning:
        model.unload()
    return base


@contextmanager
def adapter_disabled(model: PeftModel) -> Iterator[None]:
    """Context in which the model computes the outputs of its base.

    Same as PEFT's `disable_adapter`, which first checks every layer for partly enabled adapters: 0.2 s a call for the
    210 layers of SmolLM2-135M. Here the single adapter is on or off as a whole.
    """
    config = model.active_peft_config
    if config.is_prompt_learning or config.is_adaption_prompt:
        with model.disable_adapter():
            yield
        return
    model.base_model.disable_adapter_layers()
    try:
        yield
    finally:
        model.base_model.enable_adapter_layers()


def trainable_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The trained parameters, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def needs_own_row(model: PeftModel) -> bool:
    """Whether every document needs a row of its own, because virtual tokens belong to one document."""
    return bool(model.active_peft_config.is_prompt_learning)


def checkpoint_activations(model: PeftModel) -> bool:
    """Turns on recomputation of each layer's activations in the backward pass; False where this is impossible.

    Impossible without support by the architecture, and with prefix tuning: transformers treats its trained keys and
    values as a cache and drops them.

    Non-reentrant: gradients reach the adapters although the embeddings below are frozen. transformers' hooks, which
    would compute gradients for the embeddings' output too, are therefore removed.
    """
    base: PreTrainedModel = model.get_base_model()
    if not base.supports_gradient_checkpointing or isinstance(model.active_peft_config, PrefixTuningConfig):
        return False
    base.activation_checkpointing_enable({"use_reentrant": False})
    base.disable_input_require_grads()
    return True


def disable_dropout(base: torch.nn.Module) -> None:
    """Turns off the base's own dropout: the base is frozen, and a spec sets the dropout of the adapter only."""
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        # Many architectures keep a rate for F.dropout: dropout, attention_dropout, hidden_dropout, …
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def orthogonality_loss(model: PeftModel) -> torch.Tensor | None:
    """AdaLoRA's weighted orthogonality loss, to be added once per step; None for other methods.

    The mean over all A and B of ‖A Aᵀ - I‖ and ‖Bᵀ B - I‖ (arXiv:2303.10512, equation 4), as PEFT's
    `AdaLoraModel.forward` adds it to the loss that it computes.
    """
    if not isinstance(model.active_peft_config, AdaLoraConfig):
        return None
    distances = []
    for module in model.modules():
        if isinstance(module, AdaLoraLayer):
            a, b = module.lora_A[NAME], module.lora_B[NAME]  # (r, in), (out, r)
            identity = torch.eye(len(a), dtype=a.dtype, device=a.device)
            distances += [torch.linalg.norm(a @ a.T - identity), torch.linalg.norm(b.T @ b - identity)]
    return model.active_peft_config.orth_reg_weight * torch.stack(distances).mean()


def prune_after_step(model: PeftModel, step: int, *, skipped: bool = False) -> None:
    """Prunes AdaLoRA's ranks; does nothing for other methods.

    Call it after the optimizer's `step` (counted from 1) and before the gradients are cleared. The gradients of a
    `skipped` step carry no importance and are not scored. The final pruning needs no gradients of its own step, but
    at least one scored step before it: without one, it is delayed to the first step that is not skipped.
    """
    config = model.active_peft_config
    if not isinstance(config, AdaLoraConfig):
        return
    tuner, last_pruning = model.base_model, config.total_step - config.tfinal
    if skipped and step < last_pruning:
        return
    if step >= last_pruning and not (tuner.rankallocator.ipt or config.rank_pattern):
        if skipped:
            return
        tuner.rankallocator.update_ipt(tuner.model)
        step = last_pruning
    tuner.update_and_allocate(step)


def allocation_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """AdaLoRA's importance scores and ranks, which a checkpoint stores beside the weights; empty for other methods."""
    if not isinstance(model.active_peft_config, AdaLoraConfig):
        return {}
    allocator = model.base_model.rankallocator
    state = {
        f"{kind}/{name}": value
        for kind in ("ipt", "exp_avg_ipt", "exp_avg_unc")
        for name, value in getattr(allocator, kind).items()
    }
    pattern = model.active_peft_config.rank_pattern or {}
    return state | {f"rank_pattern/{name}": torch.tensor(ranks) for name, ranks in pattern.items()}


def restore_allocation(model: PeftModel, state: dict[str, torch.Tensor]) -> None:
    """Resets AdaLoRA's importance scores and ranks to a `state` of `allocation_state`."""
    if not isinstance(model.active_peft_config, AdaLoraConfig):
        return
    allocator, device = model.base_model.rankallocator, model.get_base_model().device
    allocator.reset_ipt()
    pattern: dict[str, list[bool]] = {}
    for key, value in state.items():
        kind, _, name = key.partition("/")
        if kind == "rank_pattern":
            pattern[name] = value.tolist()
        else:
            getattr(allocator, kind)[name] = value.to(device)
    model.active_peft_config.rank_pattern = pattern or None


def save_adapter(model: PeftModel, directory: Path, base_reference: str, revision: str | None) -> None:
    """Writes the adapter's weights and config. The config names the base `base_reference`, never a local path.

    The weights contain no embedding matrix: of trained tokens only their rows, of a targeted embedding only its LoRA.
    AdaLoRA keeps pruned rows as zeros, because without them the products would be rounded differently.
    """
    directory.mkdir(parents=True, exist_ok=True)
    adapter = model.active_peft_config
    pattern = getattr(adapter, "rank_pattern", None)
    if isinstance(adapter, AdaLoraConfig):
        adapter.rank_pattern = None
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    config = adapter.to_dict() | {"base_model_name_or_path": base_reference, "revision": revision}
    if isinstance(adapter, AdaLoraConfig):
        adapter.rank_pattern = pattern
    weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in sorted(state.items())}
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(config | {"inference_mode": True}, indent=2, sort_keys=True, default=_json_value)
    (directory / CONFIG).write_text(text + "\n", encoding="utf-8")


def load_adapter(base: PreTrainedModel, directory: Path) -> PeftModel:
    """The base with a saved adapter, for evaluation."""
    model = PeftModel.from_pretrained(base, str(directory), local_files_only=True)
    _cast_adapter_outputs(model)
    if model.active_peft_config.is_adaption_prompt:
        # PEFT has rounded these weights to the base's dtype.
        for name, parameter in model.named_parameters():
            if last_name_part(name) in LLAMA_ADAPTER_WEIGHTS:
                parameter.data = parameter.data.float()
        set_peft_model_state_dict(model, load_file(directory / WEIGHTS))
    tie_head(model, NAME)
    return model


def _cast_adapter_outputs(model: PeftModel) -> None:
    """Lets float32 adapters work in a base of a lower compute dtype, for the methods where PEFT relies on autocast.

    The training loop runs without autocast. Without it, IA³ on 4 and 8 bits and AdaLoRA on 8 bits return float32,
    which the next layer refuses; IA³ computes the base's product in float32; LLaMA-Adapter feeds its float32 prompt
    to the base.
    """
    dtype = model.get_base_model().dtype
    for module in model.modules():
        device = next(module.parameters(), torch.empty(0)).device.type
        # Tensors without values ("meta") do not support autocast: the simulation casts by itself.
        if isinstance(module, IA3Layer | AdaptedAttention) and dtype is torch.bfloat16 and device != "meta":
            setattr(module, "forward", torch.autocast(device, dtype)(module.forward))  # noqa: B010 - a method
        if isinstance(module, IA3Layer | AdaLoraLayer):
            module.register_forward_hook(lambda _, inputs, output: output.to(inputs[0].dtype))


@torch.no_grad()
def _init_olora(model: PeftModel, rank: int) -> None:
    """Sets A and B of every layer to [A₀; -A₀] and [B₀ B₀], from its weight's QR decomposition (arXiv:2406.01775).

    Only the first half is trained; the second half stays constant.

    Raises:
        InvalidSpec: a layer with fewer inputs or outputs than `rank`.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or NAME not in layer.lora_A:
            continue
        weight = dequantized_weight(layer.get_base_layer())  # (out, in)
        if rank > min(weight.shape):
            raise InvalidSpec(
                f"r = {rank} exceeds the largest OLoRA rank for {name}, whose weight is {tuple(weight.shape)}: lower r",
                location="/adapter/r",
            )
        q, r = torch.linalg.qr(weight)
        a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight  # (2 rank, in), (out, 2 rank)
        a.copy_(torch.cat([r[:rank], -r[:rank]]))
        b.copy_(torch.cat([q[:, :rank], q[:, :rank]], 1))
        is_trained = torch.arange(2 * rank, device=a.device) < rank
        a.register_hook(lambda grad, is_trained=is_trained: grad * is_trained[:, None])
        b.register_hook(lambda grad, is_trained=is_trained: grad * is_trained)


def _json_value(value: object) -> object:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)
