"""The fast path: decoder layers of Llama's structure (Llama, Mistral, Qwen 2 and 3, …) as a few functions each.

It is chosen by the layer's class and structure, and checked against the model's own forward (`network`). The general
path stays the reference. Its savings: q, k and v share one product with their A, and so do gate and up; no normalized
copy of the hidden states and no intermediate of RMSNorm, rotary embedding or SwiGLU is kept for the backward pass.
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
    rms_norm_backward,
    rms_norm_from_scale,
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

LAYER_CLASSES = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
"""Classes of transformers whose forward was read (5.23). Other classes have the same modules and compute something
else: Granite scales its residuals, SmolLM3 omits the rotation in some layers, Ministral 3 scales queries by position.
"""
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = ["q_norm", "k_norm"]
MLP_PARTS = {"gate_proj", "up_proj", "down_proj"}
LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


@dataclass(frozen=True, eq=False)
class LlamaLayer:
    """The parts of a decoder layer, callable as the layer."""

    attention: AttentionShape
    before_attention: Norm
    qkv: tuple[Projection, ...]
    head_norms: tuple[Norm, Norm] | None
    """norms of the queries and of the keys, over head_dim"""
    output: Projection
    before_mlp: Norm
    gate_up: tuple[Projection, ...]
    down: Projection

    def __call__(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """The layer's output (tokens, hidden) for x (tokens, hidden); cos and sin are (tokens, 1, head_dim / 2)."""
        # q: (tokens, heads, head_dim); k, v: (tokens, kv_heads, head_dim)
        q, k, v = NormedProjections.apply(x, self, cos, sin, *lora_weights(self.qkv))
        # (tokens, heads * head_dim)
        attended = document_attention(q, k, v, lengths, self.attention, allow_blocks=True).flatten(1)
        x = FusedLinear.apply(attended, None, x, self.output, *lora_weights((self.output,)))  # (tokens, hidden)
        result: torch.Tensor = GatedMlp.apply(x, self, *lora_weights(self.gate_up), *lora_weights((self.down,)))
        return result


class NormedProjections(torch.autograd.Function):
    """Queries, keys and values of RMSNorm(x), (tokens, heads, head_dim) each; queries and keys are rotated.

    A layer with head norms applies them to queries and keys before the rotation.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: LlamaLayer, cos: torch.Tensor, sin: torch.Tensor, *lora: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        norm, shape = layer.before_attention, layer.attention
        normed, scale = rms_norm(x, norm.weight, norm.eps)  # (tokens, hidden), (tokens, 1)
        outputs, inner = project(normed, layer.qkv, lora)  # 3 × (tokens, heads * head_dim), (tokens, sum of r)
        counts = (shape.heads, shape.kv_heads, shape.kv_heads)
        # (tokens, heads, head_dim)
        q, k, v = (y.view(x.shape[0], heads, -1) for y, heads in zip(outputs, counts, strict=True))
        head_norm_saved: list[torch.Tensor] = []
        if layer.head_norms is not None:
            head_norm_saved += [q, k]
            (q, q_scale), (k, k_scale) = (
                rms_norm(heads, norm.weight, norm.eps) for heads, norm in zip((q, k), layer.head_norms, strict=True)
            )
            head_norm_saved += [q_scale, k_scale]  # (tokens, heads, 1)
        rotate_(q, cos, sin)
        rotate_(k, cos, sin)
        ctx.layer, ctx.lora_count = layer, len(lora)
        ctx.save_for_backward(x, scale, inner, cos, sin, *lora, *head_norm_saved)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor, grad_v: torch.Tensor) -> tuple[Any, ...]:
        x, scale, inner, cos, sin, *rest = ctx.saved_tensors
        lora, head_norm_saved = rest[: ctx.lora_count], rest[ctx.lora_count :]
        layer: LlamaLayer = ctx.layer
        norm = layer.before_attention
        grad_q, grad_k = grad_q.clone(), grad_k.clone()  # (tokens, heads, head_dim)
        rotate_(grad_q, cos, sin, backward=True)
        rotate_(grad_k, cos, sin, backward=True)
        if layer.head_norms is not None:
            q, k, q_scale, k_scale = head_norm_saved
            grad_q = rms_norm_backward(grad_q, q, layer.head_norms[0].weight, q_scale)  # (tokens, heads, head_dim)
            grad_k = rms_norm_backward(grad_k, k, layer.head_norms[1].weight, k_scale)  # (tokens, kv_heads, head_dim)
        grad_outputs = [grad_heads.flatten(1) for grad_heads in (grad_q, grad_k, grad_v)]  # (tokens, heads * head_dim)
        normed = rms_norm_from_scale(x, norm.weight, scale)  # (tokens, hidden)
        grad_normed, grad_inner, grad_lora = project_backward(
            grad_outputs, normed, inner, layer.qkv, lora, ctx.needs_input_grad[0]
        )  # (tokens, hidden), (tokens, sum of r), [(r, hidden), (out, r), …]
        grad_normed = add_through_lora(grad_normed, grad_inner, lora)
        grad_x = None if grad_normed is None else rms_norm_backward(grad_normed, x, norm.weight, scale)
        return grad_x, None, None, None, *grad_lora


class GatedMlp(torch.autograd.Function):
    """x + down(silu(gate(norm(x))) * up(norm(x)))"""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: LlamaLayer, *lora: torch.Tensor | None) -> torch.Tensor:
        norm = layer.before_mlp
        normed, scale = rms_norm(x, norm.weight, norm.eps)  # (tokens, hidden), (tokens, 1)
        # gate, up: (tokens, intermediate); inner: (tokens, sum of r)
        (gate, up), inner = project(normed, layer.gate_up, lora[:4])
        (y,), inner_down = project(swiglu(gate, up), (layer.down,), lora[4:])  # (tokens, hidden), (tokens, r)
        ctx.layer = layer
        ctx.save_for_backward(x, scale, gate, up, inner, inner_down, *lora)
        return y.add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        x, scale, gate, up, inner, inner_down, *lora = ctx.saved_tensors
        layer: LlamaLayer = ctx.layer
        norm = layer.before_mlp
        silu = F.silu(gate)  # (tokens, intermediate)
        grad_activated, grad_inner_down, grad_lora_down = project_backward(
            (grad_output,), silu * up, inner_down, (layer.down,), lora[4:]
        )  # (tokens, intermediate), (tokens, r), [(r, intermediate), (hidden, r)]
        grad_activated = add_through_lora(grad_activated, grad_inner_down, lora[4:])
        assert grad_activated is not None
        grad_gate_up = swiglu_backward(grad_activated, gate, up, silu)  # 2 × (tokens, intermediate)
        normed = rms_norm_from_scale(x, norm.weight, scale)  # (tokens, hidden)
        grad_normed, grad_inner, grad_lora = project_backward(grad_gate_up, normed, inner, layer.gate_up, lora[:4])
        grad_normed = add_through_lora(grad_normed, grad_inner, lora[:4])  # (tokens, hidden)
        assert grad_normed is not None
        # Through the residual, grad_output reaches x unchanged.
        grad_x = rms_norm_backward(grad_normed, x, norm.weight, scale).add_(grad_output)  # (tokens, hidden)
        return grad_x, None, *grad_lora, *grad_lora_down


class LlamaDecoder:
    """A decoder of `LlamaLayer`s: token embeddings in, normed hidden states out."""

    def __init__(self, layers: Sequence[LlamaLayer], rotary: Callable[..., Any], norm: Norm) -> None:
        self._layers, self._rotary, self._norm = layers, rotary, norm
        self.before_layer: Callable[[torch.Tensor], None] | None = None
        """Called before each layer with the layer's input"""

    def __call__(
        self,
        embedded: torch.Tensor,
        position_ids: torch.Tensor,
        lengths: Sequence[int],
        keep: torch.Tensor,
        checkpointing: bool,
    ) -> torch.Tensor:
        """(N, hidden) states at the positions `keep`, from embeddings (tokens, hidden) and positions (1, tokens)."""
        cos, sin = self._rotary(embedded, position_ids)  # (1, tokens, head_dim), both halves equal
        half = cos.shape[-1] // 2
        cos, sin = cos[0, :, None, :half], sin[0, :, None, :half]  # (tokens, 1, head_dim / 2)
        x = embedded  # (tokens, hidden)
        for layer in self._layers:
            if self.before_layer is not None:
                self.before_layer(x)
            x = (
                checkpoint(layer, x, cos, sin, lengths, use_reentrant=False)
                if checkpointing
                else layer(x, cos, sin, lengths)
            )
        normed: torch.Tensor = FrozenNorm.apply(x[keep], self._norm)  # (N, hidden)
        return normed


def llama_decoder(base: PreTrainedModel) -> LlamaDecoder | None:
    """The model's decoder on the fast path; None if its structure differs or the adapter is not plain LoRA."""
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
    if type(module).__name__ not in LAYER_CLASSES or children.keys() != LAYER_PARTS:
        return None
    self_attention: Any = children["self_attn"]
    attention, mlp = dict(self_attention.named_children()), dict(children["mlp"].named_children())
    head_norm_names = sorted(attention.keys() - ATTENTION_PARTS, reverse=True)  # q_norm, k_norm
    has_parts = attention.keys() >= ATTENTION_PARTS and mlp.keys() - {"act_fn"} == MLP_PARTS
    if (
        not has_parts
        or head_norm_names not in ([], HEAD_NORMS)
        or not is_silu(getattr(children["mlp"], "act_fn", None))
    ):
        return None
    parts = {name: _plain_projection(child) for name, child in (attention | mlp).items() if name.endswith("_proj")}
    norms = {name: frozen_norm(child) for name, child in (children | attention).items() if name.endswith("norm")}
    projections = {name: part for name, part in parts.items() if part is not None}
    frozen_norms = {name: norm for name, norm in norms.items() if norm is not None}
    head_norms = [frozen_norms[name] for name in head_norm_names if name in frozen_norms]
    # Some models norm all heads together, with wider weights.
    per_head = all(norm.weight.numel() == self_attention.head_dim for norm in head_norms)
    if len(projections) < len(parts) or len(frozen_norms) < len(norms) or not per_head:
        return None

    def select(*names: str) -> tuple[Projection, ...]:
        return tuple(projections[name] for name in names)

    return LlamaLayer(
        attention=AttentionShape(
            heads=projections["q_proj"].base.out_features // self_attention.head_dim,
            kv_heads=projections["k_proj"].base.out_features // self_attention.head_dim,
            scale=self_attention.scaling,
            window=_window(self_attention),
        ),
        before_attention=frozen_norms["input_layernorm"],
        qkv=select("q_proj", "k_proj", "v_proj"),
        head_norms=(head_norms[0], head_norms[1]) if head_norms else None,
        output=projections["o_proj"],
        before_mlp=frozen_norms["post_attention_layernorm"],
        gate_up=select("gate_proj", "up_proj"),
        down=projections["down_proj"],
    )


def _window(attention: Any) -> int | None:
    """The sliding window: Qwen has one per layer, Mistral one for all layers in its configuration."""
    if type(attention).__name__ == "MistralAttention":
        return getattr(attention.config, "sliding_window", None)
    return getattr(attention, "sliding_window", None)


def _plain_projection(module: torch.nn.Module) -> Projection | None:
    """The layer as a projection; None if it has dropout, which the fast path does not compute."""
    has_dropout = any(isinstance(child, torch.nn.Dropout) and child.p > 0 for child in module.modules())
    return None if has_dropout else projection_of(module)
