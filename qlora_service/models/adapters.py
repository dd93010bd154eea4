"""Adapters of every method: attach to a frozen base, save as files that PEFT loads anywhere, load them back."""

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
from qlora_service.models.peft_config import last_part, peft_config
from qlora_service.models.tied_head import tie_head
from qlora_service.specs import (
    IA3,
    Adapter,
    Lora,
)

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
NAME = "default"
"""What PEFT calls an adapter that was given no name."""

LLAMA_ADAPTER_WEIGHTS = {"adaption_prompt", "adaption_gate"}


def attach(base: PreTrainedModel, adapter: Adapter, seed: int, *, total_steps: int = 1000) -> PeftModel:
    """The base with a new adapter.

    Adapter weights are float32 whatever the compute dtype; the base stays as it is, frozen, its own dropout off.

    OLoRA, h = (W - s B₀A₀) x + s B A x, is computed as h = W x + s [B B₀] [A; -A₀] x with a constant second half.
    PEFT changes W instead: on a quantized base that quantizes the rest anew, and the files give right outputs only
    where a loader repeats the decomposition on the same W.

    Raises:
        InvalidSpec: PEFT or this base cannot do what the adapter asks for.
    """
    silence_dropout(base)
    torch.manual_seed(seed)
    try:
        model = get_peft_model(base, peft_config(adapter, base, total_steps=total_steps), autocast_adapter_dtype=True)
    except (ValueError, TypeError) as error:
        raise InvalidSpec(f"the adapter cannot be attached: {error}", location="/adapter") from error
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad = False  # AdaLoRA's scale: PEFT 0.21 trains it and does not save it
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    _keep_dtypes(model)
    if isinstance(adapter, IA3):
        # "all-linear" has become full names, of which PEFT wants the feed-forward modules to be some when it loads.
        config = model.active_peft_config
        config.feedforward_modules = {
            name for name in config.target_modules if last_part(name) in config.feedforward_modules
        }
    if isinstance(adapter, Lora) and adapter.init_lora_weights == "olora":
        _start_from_qr(model, adapter.r)
    tie_head(model, NAME)
    return model


def detach(model: PeftModel) -> PreTrainedModel:
    """The base, without the adapter."""
    base: PreTrainedModel = model.get_base_model()
    config = model.active_peft_config
    if config.is_adaption_prompt:
        model.base_model.disable_adapter_layers()
    elif isinstance(config, IA3Config):
        # PEFT's own unload refuses quantized bases, as if it had to merge.
        for name, module in list(base.named_modules()):
            if isinstance(module, IA3Layer):
                base.set_submodule(name, module.get_base_layer())
    elif not config.is_prompt_learning:
        model.unload()
    return base


@contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """Inside, the model computes what its base does.

    As PEFT's `disable_adapter`, which first looks at every layer for adapters that are on in part: 0.2 s for the 210
    layers of SmolLM2-135M, each time. Here there is one adapter, which is on or off.
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


def _keep_dtypes(model: PeftModel) -> None:
    """Let float32 adapters work in a base that computes in less, where PEFT relies on autocast for it.

    The loop runs without autocast. Without it, IA³ on 4 and 8 bits and AdaLoRA on 8 return float32, which the next
    layer refuses; IA³ computes the base's product in float32; LLaMA-Adapter feeds its float32 prompt to the base.
    """
    dtype = model.get_base_model().dtype
    for module in model.modules():
        device = next(module.parameters(), torch.empty(0)).device.type
        # Tensors without values ("meta") know no autocast; whoever simulates with them casts for it.
        if isinstance(module, IA3Layer | AdaptedAttention) and dtype is torch.bfloat16 and device != "meta":
            setattr(module, "forward", torch.autocast(device, dtype)(module.forward))  # noqa: B010 - a method
        if isinstance(module, IA3Layer | AdaLoraLayer):
            module.register_forward_hook(lambda _, inputs, output: output.to(inputs[0].dtype))


@torch.no_grad()
def _start_from_qr(model: PeftModel, rank: int) -> None:
    """Start every layer at A₀, B₀ of its weight's QR decomposition (arXiv:2406.01775); the second half stays there.

    Raises:
        InvalidSpec: a layer with fewer inputs or outputs than `rank`.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or NAME not in layer.lora_A:
            continue
        weight = dequantized_weight(layer.get_base_layer())  # (out, in)
        if rank > min(weight.shape):
            raise InvalidSpec(
                f"r = {rank} is more than OLoRA finds in {name}, whose weight is {tuple(weight.shape)}: lower r",
                location="/adapter/r",
            )
        q, r = torch.linalg.qr(weight)
        a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight  # (2 rank, in), (out, 2 rank)
        a.copy_(torch.cat([r[:rank], -r[:rank]]))
        b.copy_(torch.cat([q[:, :rank], q[:, :rank]], 1))
        kept = torch.arange(2 * rank, device=a.device) < rank
        a.register_hook(lambda gradient, kept=kept: gradient * kept[:, None])
        b.register_hook(lambda gradient, kept=kept: gradient * kept)


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that are learned, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def runs_alone(model: PeftModel) -> bool:
    """Whether every document needs a row of its own: virtual tokens belong to one document."""
    return bool(model.active_peft_config.is_prompt_learning)


def checkpoint_activations(model: PeftModel) -> bool:
    """Recompute each layer's activations in the backward pass; False where it cannot be.

    That is where the architecture has no support for it, and with prefix tuning, whose learned keys and values
    transformers takes for a cache and drops.

    Non-reentrant: gradients reach the adapters though the embeddings below are frozen, so transformers' hooks, which
    would make it compute some for the embeddings' output, are taken off again.
    """
    base: PreTrainedModel = model.get_base_model()
    if not base.supports_gradient_checkpointing or isinstance(model.active_peft_config, PrefixTuningConfig):
        return False
    base.activation_checkpointing_enable({"use_reentrant": False})
    base.disable_input_require_grads()
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


def regularization(model: PeftModel) -> torch.Tensor | None:
    """AdaLoRA's orthogonality loss, weighted, to be added once per step; None for other methods.

    The mean over all A and B of ‖A Aᵀ - I‖ and ‖Bᵀ B - I‖ (arXiv:2303.10512, equation 4), as PEFT's
    `AdaLoraModel.forward` adds it to a loss that it computed itself.
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


def after_step(model: PeftModel, step: int, *, skipped: bool = False) -> None:
    """AdaLoRA's pruning; nothing for other methods.

    To be called after the optimizer's `step` (counted from 1), while the gradients are still there; those of a
    `skipped` step say nothing about what is important. The last pruning needs none, but it needs earlier ones: where
    no step has had any yet, it waits for the first that has.
    """
    config = model.active_peft_config
    if not isinstance(config, AdaLoraConfig):
        return
    tuner, last = model.base_model, config.total_step - config.tfinal
    if skipped and step < last:
        return
    if step >= last and not (tuner.rankallocator.ipt or config.rank_pattern):
        if skipped:
            return
        tuner.rankallocator.update_ipt(tuner.model)
        step = last
    tuner.update_and_allocate(step)


def allocation_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """What AdaLoRA remembers between steps besides its weights, for a checkpoint; empty for other methods."""
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
    """Undo what happened to AdaLoRA's memory since `allocation_state` gave `state`."""
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
    """Write the adapter's weights and config; the base is named by `base_reference`, never by a local path.

    An embedding matrix is never among them: of trained tokens their rows are, of a targeted embedding its LoRA is.
    AdaLoRA keeps the pruned rows, as zeros: without them the products would be rounded differently.
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
    text = json.dumps(config | {"inference_mode": True}, indent=2, sort_keys=True, default=_as_json)
    (directory / CONFIG).write_text(text + "\n", encoding="utf-8")


def load_adapter(base: PreTrainedModel, directory: Path) -> PeftModel:
    """The base with a saved adapter, for evaluation."""
    model = PeftModel.from_pretrained(base, str(directory), local_files_only=True)
    _keep_dtypes(model)
    if model.active_peft_config.is_adaption_prompt:
        # PEFT has rounded these to the base's dtype.
        for name, parameter in model.named_parameters():
            if last_part(name) in LLAMA_ADAPTER_WEIGHTS:
                parameter.data = parameter.data.float()
        set_peft_model_state_dict(model, load_file(directory / WEIGHTS))
    tie_head(model, NAME)
    return model


def _as_json(value: object) -> object:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)
