"""Packed documents kept apart: attention runs document by document, or, where that cannot be, under a mask.

Which way a model takes is measured on the model itself when it is loaded, not believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_service.errors import InvalidModel
from qlora_service.training.network.micro_batch import DOCUMENT_LENGTHS, PER_DOCUMENT, TokenRow, collate, forward
from qlora_service.training.network.varlen_attention import AttentionShape, document_attention

# Gemma 2's cap, gpt-oss's sinks, T5's bias: what transformers' attention functions take besides a mask.
SCORE_CHANGES = ("softcap", "s_aux", "position_bias")

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
"""transformers' names of layers without a state that runs through the row"""
Isolation = Literal["per_document", "mask", "alone"]
PROBE_TOKENS = 12
# float32 kernels of different shapes differ by about 1e-6 of the largest logit, bfloat16 ones by 1e-2, and float64 ones
# by 1e-6 too where transformers rounds to float32 on the way; a leak moves the probe's logits by about their own size.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-4}
LOW_PRECISION_TOLERANCE = 0.1


def per_document_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each document with itself alone, (1, tokens, heads, head_dim); no work is done across documents.

    query, key and value are (1, heads, tokens, head_dim). The documents' lengths come as the model's keyword
    argument DOCUMENT_LENGTHS; without it, as in generation, this is transformers' own attention.

    Raises:
        ValueError: the architecture does something else to its scores.
    """
    lengths: Sequence[int] | None = kwargs.pop(DOCUMENT_LENGTHS, None)
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if special := [name for name in SCORE_CHANGES if kwargs.get(name) is not None]:
        raise ValueError(f"attention with {', '.join(special)} is not known here")
    shape = AttentionShape(
        heads=query.shape[1],
        kv_heads=key.shape[1],
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
    )
    q, k, v = (heads[0].transpose(0, 1) for heads in (query, key, value))  # (tokens, heads, head_dim)
    return document_attention(q, k, v, lengths, shape)[None], None


AttentionInterface.register(PER_DOCUMENT, per_document_attention)


@torch.no_grad()
def isolate_documents(model: PreTrainedModel) -> Isolation:
    """Choose and set the model's attention, by what keeps a document's logits those of the lone document.

    "alone": nothing does (state-space and recurrent layers know no boundaries); each document needs a row of its own.
    """
    was_training = model.training
    model.eval()
    first, second = probe_documents(model)
    device = next(model.parameters()).device
    try:
        alone = forward(model, collate([second], device))
    except TypeError as error:
        raise InvalidModel(
            f"{type(model).__name__} cannot be trained here: its forward pass takes other arguments ({error})"
        ) from error
    chosen: Isolation = "alone"
    own = model.config._attn_implementation
    ways: list[tuple[Isolation, str]] = [("per_document", PER_DOCUMENT), ("mask", own)]
    if _sees_whole_row(model):
        ways = []
    elif not _causal_layers_only(model):
        ways = ways[1:]
    for isolation, implementation in ways:
        try:
            model.set_attn_implementation(implementation)
            packed = forward(model, collate([first, second], device))[-alone.shape[0] :]
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, KeyError, RuntimeError):
            continue  # the architecture takes neither the argument nor the implementation
        if are_same(packed, alone, alone.dtype):
            chosen = isolation
            break
    else:
        model.set_attn_implementation(own)
    model.train(was_training)
    return chosen


def are_same(logits: torch.Tensor, expected: torch.Tensor, computed_in: torch.dtype) -> bool:
    """Whether they differ by no more than two ways to compute them in this precision do.

    Without values (device "meta") nothing speaks against it.
    """
    if logits.is_meta:
        return logits.shape == expected.shape
    tolerance = TOLERANCE.get(computed_in, LOW_PRECISION_TOLERANCE)
    return bool((logits - expected).abs().max() <= tolerance * expected.abs().max())


def use_own_attention(model: PreTrainedModel) -> None:
    """Set what transformers would choose: for documents that run alone, perhaps behind learned keys and values."""
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")


def probe_documents(model: PreTrainedModel, tokens: int = PROBE_TOKENS) -> tuple[TokenRow, TokenRow]:
    """Two documents of any tokens, all of them learned."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = [(7 * index + 3) % min(vocabulary, 1000) for index in range(2 * tokens)]
    learned = [True] * tokens
    return TokenRow(0, ids[:tokens], learned), TokenRow(1, ids[tokens:], learned)


def _causal_layers_only(model: PreTrainedModel) -> bool:
    """Whether every layer's mask is causal or a causal window: what `per_document_attention` knows to do."""
    chunked = getattr(model.config.get_text_config(), "attention_chunk_size", None) is not None
    return _layer_types(model) <= {"full_attention", "sliding_attention"} and not chunked


def _sees_whole_row(model: PreTrainedModel) -> bool:
    """Whether something in it is known to look at the row as one, whatever masks say.

    Recurrent layers do, and rotations that follow the row's largest position (dynamic NTK, LongRoPE): a short document
    packed beside a long one would be rotated as the long one is.
    """
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]  # by layer type, as in Gemma 3
    kinds = {parameters.get("rope_type") for parameters in (nested or [rope])}
    return bool(kinds & {"dynamic", "longrope"}) or not _layer_types(model) <= ATTENTION_LAYERS


def _layer_types(model: PreTrainedModel) -> set[str]:
    return set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
