"""Isolation of packed documents: attention runs document by document or, where it cannot, under a block mask.

The mechanism is measured on the model when it is loaded: packed logits must equal those of the separate document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_service.errors import InvalidModel
from qlora_service.training.device import is_simulated
from qlora_service.training.network.micro_batch import DOCUMENT_LENGTHS, PER_DOCUMENT, TokenRow, collate, forward
from qlora_service.training.network.varlen_attention import AttentionShape, document_attention

SCORE_ARGUMENTS = ("softcap", "s_aux", "position_bias")
"""Arguments of transformers' attention functions, besides a mask, that change scores: Gemma 2's cap, gpt-oss's sinks,
T5's bias. `per_document_attention` implements none of them."""

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
"""transformers' names of layers without a recurrent state"""
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
    """Attention of each document with itself alone, (1, tokens, heads, head_dim); nothing is computed across documents.

    query, key and value are (1, heads, tokens, head_dim). The model's keyword argument DOCUMENT_LENGTHS carries the
    documents' lengths; without it, as in generation, this is transformers' own attention.

    Raises:
        ValueError: the architecture changes its scores, or brings a mask of its own.
    """
    lengths: Sequence[int] | None = kwargs.pop(DOCUMENT_LENGTHS, None)
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if attention_mask is not None:
        raise ValueError("attention with a mask of the architecture's own is not supported")
    if unsupported := [name for name in SCORE_ARGUMENTS if kwargs.get(name) is not None]:
        raise ValueError(f"attention with {', '.join(unsupported)} is not supported")
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
    """The isolation of packed documents, chosen by their logits; also sets the model's attention accordingly.

    "alone" means that no mechanism isolates packed documents (state-space and recurrent layers know no boundaries):
    each document needs a row of its own.

    Raises:
        InvalidModel: the model's forward does not accept the arguments of a packed row.
    """
    was_training = model.training
    model.eval()
    first, second = probe_documents(model)
    device = next(model.parameters()).device
    try:
        alone = forward(model, collate([second], device))  # (N, vocabulary)
    except TypeError as error:
        raise InvalidModel(
            f"{type(model).__name__} cannot be trained here: its forward pass does not accept the required arguments "
            f"({error})"
        ) from error
    chosen: Isolation = "alone"
    original = model.config._attn_implementation
    candidates: list[tuple[Isolation, str]] = [("per_document", PER_DOCUMENT), ("mask", original)]
    if _ignores_document_bounds(model):
        candidates = []
    elif not _causal_layers_only(model):
        candidates = candidates[1:]
    for isolation, implementation in candidates:
        try:
            model.set_attn_implementation(implementation)
            packed = forward(model, collate([first, second], device))[-alone.shape[0] :]  # (N, vocabulary)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, KeyError, RuntimeError):
            continue  # the architecture accepts neither the argument nor the implementation
        if logits_match(packed, alone, alone.dtype):
            chosen = isolation
            break
    else:
        model.set_attn_implementation(original)
    model.train(was_training)
    return chosen


def logits_match(logits: torch.Tensor, expected: torch.Tensor, computed_in: torch.dtype) -> bool:
    """Whether the logits differ by no more than two kernels of this precision do.

    Simulated logits have no values: equal shapes suffice.
    """
    if is_simulated(logits):
        return logits.shape == expected.shape
    tolerance = TOLERANCE.get(computed_in, LOW_PRECISION_TOLERANCE)
    return bool((logits - expected).abs().max() <= tolerance * expected.abs().max())


def use_default_attention(model: PreTrainedModel) -> None:
    """Sets transformers' default attention, for documents that run alone, possibly after trained keys and values."""
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")


def probe_documents(model: PreTrainedModel, tokens: int = PROBE_TOKENS) -> tuple[TokenRow, TokenRow]:
    """Two documents of arbitrary tokens, all of them trained."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = [(7 * index + 3) % min(vocabulary, 1000) for index in range(2 * tokens)]
    trained = [True] * tokens
    return TokenRow(0, ids[:tokens], trained), TokenRow(1, ids[tokens:], trained)


def _causal_layers_only(model: PreTrainedModel) -> bool:
    """Whether every layer's mask is causal or a causal window, the two masks of `per_document_attention`."""
    chunked = getattr(model.config.get_text_config(), "attention_chunk_size", None) is not None
    return _layer_types(model) <= {"full_attention", "sliding_attention"} and not chunked


def _ignores_document_bounds(model: PreTrainedModel) -> bool:
    """Whether the model has parts that are known to process the row as one document, whatever the mask.

    Recurrent layers do, and so do rotations that depend on the row's largest position (dynamic NTK, LongRoPE): a short
    document packed with a long one would be rotated like the long one.
    """
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]  # by layer type, as in Gemma 3
    kinds = {parameters.get("rope_type") for parameters in (nested or [rope])}
    return bool(kinds & {"dynamic", "longrope"}) or not _layer_types(model) <= ATTENTION_LAYERS


def _layer_types(model: PreTrainedModel) -> set[str]:
    return set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
