"""Published measurements of peak memory, and an emulation of their code on meta tensors.

The published steps differ from those of this service: PEFT's preparation for k-bit training, autocast, float32 logits
of every token, older bitsandbytes. Each is emulated under the service's tracker, to compare the tracker with a GPU.

Sources: foundation-model-stack/fms-acceleration, scripts/benchmarks/refs (one A100 80 GB; LoRA r=16 on q, k, v and o,
dropout 0.1, NF4 with double quantization, reentrant checkpointing, FlashAttention 2, transformers 4.48.1, bitsandbytes
0.43.3; rows of 4,096 tokens; GiB of max_memory_allocated). AnswerDotAI/fsdp_qlora, nbs/00-profile_lora_qlora.ipynb
(NF4, r=8 on q and v, batch 1, no optimizer step; GB).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.autograd._functions import MatMul4Bit
from peft import LoraConfig, get_peft_model

from qlora_service.models.adapters import trainable_parameters
from qlora_service.planning.memory import Category
from qlora_service.planning.simulation.allocator import CUBLAS_WORKSPACE_BYTES
from qlora_service.planning.simulation.simulated_base import META, simulated_base
from qlora_service.planning.simulation.simulated_device import patched_attribute, simulated_device, workspaces
from qlora_service.planning.simulation.tracked_step import register_model
from qlora_service.planning.simulation.tracker import Tracker
from qlora_service.specs import Quantization

MISTRAL_7B = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "sliding_window": None,
}  # fmt: skip
ANSWER_1B = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 32000,
}  # fmt: skip


@dataclass(frozen=True)
class PublishedRow:
    """A measured peak and the settings of its run."""

    name: str
    config: dict[str, Any]
    batch: int
    tokens: int
    bytes: float
    nf4: bool = True
    kbit_preparation: bool = False
    """PEFT's preparation as in TRL: norms in float32; embeddings, head and LoRA in bfloat16; products under autocast"""
    notebook: bool = False
    """The run is from Answer.ai's notebook"""


def _fms(kind: str, batch: int, gib: float, **settings: bool) -> PublishedRow:
    return PublishedRow(f"Mistral-7B {kind}, batch {batch}", MISTRAL_7B, batch, 4096, gib * 2**30, **settings)


ROWS = [
    _fms("accelerated", 4, 15.249),
    _fms("accelerated", 8, 26.461),
    _fms("baseline", 4, 19.250, kbit_preparation=True),
    _fms("baseline", 8, 34.461, kbit_preparation=True),
    _fms("bf16 LoRA", 4, 24.871, nf4=False),
    _fms("bf16 LoRA", 8, 36.082, nf4=False),
    *(
        PublishedRow(f"answer.ai 1B, {tokens} tokens", ANSWER_1B, 1, tokens, gb * 1e9, notebook=True)
        for tokens, gb in ((512, 1.360), (1024, 1.844), (2048, 2.792), (3072, 3.733))
    ),
]


def emulated_bytes(row: PublishedRow) -> int:
    """The peak of a step of the row's run."""
    return emulate(row).peak


def emulate(row: PublishedRow) -> Tracker:
    """The tracker after a step of the row's run."""
    quantization = Quantization(type="nf4" if row.nf4 else "none", double_quant=not row.notebook)
    adapter = LoraConfig(
        r=8 if row.notebook else 16,
        lora_dropout=0.0 if row.notebook else 0.1,
        target_modules=["q_proj", "v_proj"] if row.notebook else ["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    )
    with ExitStack() as stack:
        stack.enter_context(simulated_device(cuda=True))
        base = simulated_base(row.config, quantization, torch.bfloat16)
        if row.kbit_preparation:
            _cast(base, ("norm",), torch.float32)
            stack.enter_context(_autocast())
        base.activation_checkpointing_enable({"use_reentrant": not row.notebook, "preserve_rng_state": False})
        base.enable_input_require_grads()
        with META:
            model = get_peft_model(base, adapter)
        if row.kbit_preparation:
            _cast(model, ("lora_A", "lora_B"), torch.bfloat16)
        model.train()
        if row.notebook:
            forward = staticmethod(partial(_forward_keeping_input, MatMul4Bit.forward))
            stack.enter_context(patched_attribute(MatMul4Bit, "forward", forward))
        tracker = Tracker(rounding=512, workspaces=workspaces(cuda=True))
        register_model(tracker, model)
        resident = [torch.empty(CUBLAS_WORKSPACE_BYTES, dtype=torch.uint8, device=META)]
        if row.notebook:
            resident += _rotation_caches(row)
        else:
            resident += [torch.zeros_like(p) for p in trainable_parameters(model) for _ in range(2)]  # AdamW's moments
        for tensor in resident:
            tracker.register(tensor, Category.OPTIMIZER)
        ids = torch.empty(row.batch, row.tokens, dtype=torch.long, device=META)
        with tracker:
            if row.notebook:
                output = model(input_ids=ids)
                logits = output.logits = output.logits.float()
                logits.mean().backward()
            else:
                _loss(model, ids).backward()
    return tracker


def _loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """transformers 4.48: all logits in float32, shifted by a copy, while the model's forward pass is still active."""
    hidden = model.get_decoder()(input_ids=ids).last_hidden_state
    logits = model.get_output_embeddings()(hidden)
    wide = logits.float()
    shifted = wide[..., :-1, :].contiguous()
    return F.cross_entropy(shifted.view(-1, shifted.shape[-1]), ids[..., 1:].contiguous().view(-1))


def _cast(model: torch.nn.Module, names: tuple[str, ...], dtype: torch.dtype) -> None:
    for path, module in model.named_modules():
        if any(name in path for name in names):
            for name, parameter in module.named_parameters(recurse=False):
                module._parameters[name] = torch.nn.Parameter(parameter.data.to(dtype), parameter.requires_grad)


@contextmanager
def _autocast() -> Iterator[None]:
    """The effect of autocast on this model's products; autocast does not act on meta tensors."""
    with ExitStack() as stack:
        for name in ("linear", "scaled_dot_product_attention"):
            stack.enter_context(patched_attribute(F, name, partial(_in_low_precision, getattr(F, name))))
        yield


def _in_low_precision(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*map(_lowered, args), **{name: _lowered(value) for name, value in kwargs.items()})


def _lowered(value: Any) -> Any:
    is_wide = isinstance(value, torch.Tensor) and value.dtype is torch.float32
    return value.to(torch.bfloat16) if is_wide else value


def _rotation_caches(row: PublishedRow) -> list[torch.Tensor]:
    """transformers before 4.39 kept float32 cosines and sines in every layer, of 2,048 positions at least."""
    head_dim = row.config["hidden_size"] // row.config["num_attention_heads"]
    positions = max(2048, row.tokens)
    return [torch.empty(positions, head_dim, device=META) for _ in range(2 * row.config["num_hidden_layers"])]


def _forward_keeping_input(original: Callable[..., Any], ctx: Any, x: torch.Tensor, *rest: Any) -> Any:
    """bitsandbytes before 0.43 kept each product's input as an attribute, which checkpointing does not free."""
    ctx.kept = x if any(ctx.needs_input_grad[:2]) else None
    return original(ctx, x, *rest)
