"""The fast path: decoder layers of Llama's shape (Llama, Mistral, Qwen 2 and 3, …) as a few functions each.

Chosen by the layer's class and structure, and checked against the model's own forward (`network`). The general path
stays the reference. What it saves: q, k and v, and gate and up, share the product with their A; no normalized copy of
the hidden states and no intermediate of RMSNorm, rotary embedding or SwiGLU is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from qlora_service.training.network.elementwise import (
    FrozenNorm,
    Norm,
    rms_norm,
    rms_norm_again,
    rms_norm_backward,
    rotate_,
    swiglu,
    swiglu_backward,
)
from qlora_service.training.network.fused_modules import frozen_norm, is_silu
from qlora_service.training.network.lora_linear import (
    FusedLinear,
    Projection,
    add_through_lora,
    lora_weights,
    project,
    project_backward,
    projection_of,
)
from qlora_service.training.network.varlen_attention import AttentionShape, document_attention

LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
"""Classes of transformers whose forward was read (5.23). Others look alike from outside: Granite scales its residuals,
SmolLM3 leaves the rotation out of some layers, Ministral 3 scales queries by position."""
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = ["q_norm", "k_norm"]
MLP_PARTS = {"gate_proj", "up_proj", "down_proj"}
LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


@dataclass(frozen=True, eq=False)
class LlamaLayer:
    """What a layer is made of."""

    attention: AttentionShape
    before_attention: Norm
    qkv: tuple[Projection, ...]
    head_norms: tuple[Norm, Norm] | None
    """of queries and of keys, over head_dim"""
    output: Projection
    before_mlp: Norm
    gate_up: tuple[Projection, ...]
    down: Projection

    def __call__(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """(tokens, hidden) of (tokens, hidden); cos and sin are (tokens, 1, head_dim / 2)."""
        q, k, v = NormedProjections.apply(x, self, cos, sin, *lora_weights(self.qkv))
        mixed = document_attention(q, k, v, lengths, self.attention, in_blocks=True).flatten(1)
        x = FusedLinear.apply(mixed, None, x, self.output, *lora_weights((self.output,)))
        result: torch.Tensor = GatedMlp.apply(x, self, *lora_weights(self.gate_up), *lora_weights((self.down,)))
        return result


class NormedProjections(torch.autograd.Function):
    """RMSNorm, then rotated queries, keys and values (tokens, heads, head_dim), normed by head where the layer does."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: LlamaLayer, cos: torch.Tensor, sin: torch.Tensor, *lora: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        norm, shape = layer.before_attention, layer.attention
        normed, scale = rms_norm(x, norm.weight, norm.eps)
        outputs, inner = project(normed, layer.qkv, lora)
        counts = (shape.heads, shape.kv_heads, shape.kv_heads)
        q, k, v = (y.view(x.shape[0], heads, -1) for y, heads in zip(outputs, counts, strict=True))
        raw: list[torch.Tensor] = []
        if layer.head_norms is not None:
            raw += [q, k]
            (q, q_scale), (k, k_scale) = (
                rms_norm(heads, norm.weight, norm.eps) for heads, norm in zip((q, k), layer.head_norms, strict=True)
            )
            raw += [q_scale, k_scale]
        rotate_(q, cos, sin)
        rotate_(k, cos, sin)
        ctx.layer, ctx.count = layer, len(lora)
        ctx.save_for_backward(x, scale, inner, cos, sin, *lora, *raw)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_q: torch.Tensor, of_k: torch.Tensor, of_v: torch.Tensor) -> tuple[Any, ...]:
        x, scale, inner, cos, sin, *rest = ctx.saved_tensors
        lora, raw = rest[: ctx.count], rest[ctx.count :]
        layer: LlamaLayer = ctx.layer
        norm = layer.before_attention
        of_q, of_k = of_q.clone(), of_k.clone()
        rotate_(of_q, cos, sin, backward=True)
        rotate_(of_k, cos, sin, backward=True)
        if layer.head_norms is not None:
            q, k, q_scale, k_scale = raw
            of_q = rms_norm_backward(of_q, q, layer.head_norms[0].weight, q_scale)
            of_k = rms_norm_backward(of_k, k, layer.head_norms[1].weight, k_scale)
        gradients = [of_heads.flatten(1) for of_heads in (of_q, of_k, of_v)]
        normed = rms_norm_again(x, norm.weight, scale)
        of_normed, of_inner, of_lora = project_backward(
            gradients, normed, inner, layer.qkv, lora, ctx.needs_input_grad[0]
        )
        of_normed = add_through_lora(of_normed, of_inner, lora)
        of_x = None if of_normed is None else rms_norm_backward(of_normed, x, norm.weight, scale)
        return of_x, None, None, None, *of_lora


class GatedMlp(torch.autograd.Function):
    """x + down(silu(gate(norm(x))) * up(norm(x)))"""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: LlamaLayer, *lora: torch.Tensor | None) -> torch.Tensor:
        norm = layer.before_mlp
        normed, scale = rms_norm(x, norm.weight, norm.eps)
        (gate, up), inner = project(normed, layer.gate_up, lora[:4])
        (y,), inner_down = project(swiglu(gate, up), (layer.down,), lora[4:])
        ctx.layer = layer
        ctx.save_for_backward(x, scale, gate, up, inner, inner_down, *lora)
        return y.add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        x, scale, gate, up, inner, inner_down, *lora = ctx.saved_tensors
        layer: LlamaLayer = ctx.layer
        norm = layer.before_mlp
        silu = F.silu(gate)
        of_activated, of_inner_down, of_down = project_backward(
            (gradient,), silu * up, inner_down, (layer.down,), lora[4:]
        )
        of_activated = add_through_lora(of_activated, of_inner_down, lora[4:])
        assert of_activated is not None
        of_gate_up = swiglu_backward(of_activated, gate, up, silu)
        normed = rms_norm_again(x, norm.weight, scale)
        of_normed, of_inner, of_lora = project_backward(of_gate_up, normed, inner, layer.gate_up, lora[:4])
        of_normed = add_through_lora(of_normed, of_inner, lora[:4])
        assert of_normed is not None
        of_x = rms_norm_backward(of_normed, x, norm.weight, scale).add_(gradient)
        return of_x, None, *of_lora, *of_down


class LlamaDecoder:
    """A decoder of such layers: token embeddings in, normed hidden states out."""

    def __init__(self, layers: Sequence[LlamaLayer], rotary: Callable[..., Any], norm: Norm) -> None:
        self._layers, self._rotary, self._norm = layers, rotary, norm
        self.before_layer: Callable[[torch.Tensor], None] | None = None
        """Called with each layer's input"""

    def __call__(
        self,
        embedded: torch.Tensor,
        position_ids: torch.Tensor,
        lengths: Sequence[int],
        keep: torch.Tensor,
        checkpointing: bool,
    ) -> torch.Tensor:
        """(N, hidden) at the positions `keep`, of embeddings (tokens, hidden) and positions (1, tokens)."""
        cos, sin = self._rotary(embedded, position_ids)  # (1, tokens, head_dim), the halves alike
        half = cos.shape[-1] // 2
        cos, sin = cos[0, :, None, :half], sin[0, :, None, :half]
        x = embedded
        for layer in self._layers:
            if self.before_layer is not None:
                self.before_layer(x)
            x = (
                checkpoint(layer, x, cos, sin, lengths, use_reentrant=False)
                if checkpointing
                else layer(x, cos, sin, lengths)
            )
        normed: torch.Tensor = FrozenNorm.apply(x[keep], self._norm)
        return normed


def llama_decoder(base: PreTrainedModel) -> LlamaDecoder | None:
    """The model's decoder on the fast path; None where its structure is another, or the adapter is not plain LoRA."""
    decoder = base.get_decoder()
    children = dict(decoder.named_children())
    if children.keys() != {"embed_tokens", "layers", "norm", "rotary_emb"}:
        return None
    layers = [_layer(module) for module in children["layers"]]
    norm = frozen_norm(children["norm"])
    if norm is None or not all(layers):
        return None
    return LlamaDecoder([layer for layer in layers if layer is not None], children["rotary_emb"], norm)


def _layer(module: torch.nn.Module) -> LlamaLayer | None:
    children = dict(module.named_children())
    if type(module).__name__ not in LAYERS or children.keys() != LAYER_PARTS:
        return None
    own: Any = children["self_attn"]
    attention, mlp = dict(own.named_children()), dict(children["mlp"].named_children())
    head_norm_names = sorted(attention.keys() - ATTENTION_PARTS, reverse=True)  # q_norm, k_norm
    has_parts = attention.keys() >= ATTENTION_PARTS and mlp.keys() - {"act_fn"} == MLP_PARTS
    if (
        not has_parts
        or head_norm_names not in ([], HEAD_NORMS)
        or not is_silu(getattr(children["mlp"], "act_fn", None))
    ):
        return None
    parts = {name: _undropped(child) for name, child in (attention | mlp).items() if name.endswith("_proj")}
    norms = {name: frozen_norm(child) for name, child in (children | attention).items() if name.endswith("norm")}
    projections = {name: part for name, part in parts.items() if part is not None}
    frozen_norms = {name: norm for name, norm in norms.items() if norm is not None}
    head_norms = [frozen_norms[name] for name in head_norm_names if name in frozen_norms]
    # Some models norm all heads together: those have wider weights.
    per_head = all(norm.weight.numel() == own.head_dim for norm in head_norms)
    if len(projections) < len(parts) or len(frozen_norms) < len(norms) or not per_head:
        return None

    def together(*names: str) -> tuple[Projection, ...]:
        return tuple(projections[name] for name in names)

    return LlamaLayer(
        attention=AttentionShape(
            heads=projections["q_proj"].base.out_features // own.head_dim,
            kv_heads=projections["k_proj"].base.out_features // own.head_dim,
            scale=own.scaling,
            window=_window(own),
        ),
        before_attention=frozen_norms["input_layernorm"],
        qkv=together("q_proj", "k_proj", "v_proj"),
        head_norms=(head_norms[0], head_norms[1]) if head_norms else None,
        output=projections["o_proj"],
        before_mlp=frozen_norms["post_attention_layernorm"],
        gate_up=together("gate_proj", "up_proj"),
        down=projections["down_proj"],
    )


def _window(attention: Any) -> int | None:
    """Qwen keeps a window per layer; Mistral reads one for all layers from its configuration."""
    if type(attention).__name__ == "MistralAttention":
        return getattr(attention.config, "sliding_window", None)
    return getattr(attention, "sliding_window", None)


def _undropped(module: torch.nn.Module) -> Projection | None:
    """The layer as a projection, unless it has dropout: these functions draw none."""
    has_dropout = any(isinstance(child, torch.nn.Dropout) and child.p > 0 for child in module.modules())
    return None if has_dropout else projection_of(module)
