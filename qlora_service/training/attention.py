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
from qlora_service.training.micro_batch import DOCUMENT_LENGTHS, PER_DOCUMENT, TokenRow, collate, forward

Isolation = Literal["per_document", "mask", "alone"]
PROBE_TOKENS = 12
# float32 kernels of different shapes differ by about 1e-6 of the largest logit, bfloat16 ones by 1e-2;
# a leak moves the probe's logits by about their own size.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
LOW_PRECISION_TOLERANCE = 0.1


def per_document_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each document with itself alone, (1, tokens, heads, head_dim); no work is done across documents.

    query, key and value are (1, heads, tokens, head_dim). The documents' lengths come as the model's keyword
    argument DOCUMENT_LENGTHS; without it, this is transformers' own attention.
    """
    lengths: Sequence[int] | None = kwargs.pop(DOCUMENT_LENGTHS, None)
    if lengths is None:
        lengths = [query.shape[2]]
    outputs = []
    # split, not slices: under autograd every slice makes a gradient of the full size.
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        mask = attention_mask
        if sliding_window is not None and q.shape[2] > sliding_window:
            mask = _window_mask(q.shape[2], sliding_window, q.device)
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0])
    return torch.cat(outputs, 1), None


AttentionInterface.register(PER_DOCUMENT, per_document_attention)


@torch.no_grad()
def isolate_documents(model: PreTrainedModel) -> Isolation:
    """Choose and set the model's attention, by what keeps a document's logits those of the lone document.

    "alone": nothing does (state-space and recurrent layers know no boundaries); each document needs a row of its own.
    """
    was_training = model.training
    model.eval()
    vocabulary = model.config.get_text_config().vocab_size
    ids = [(7 * index + 3) % min(vocabulary, 1000) for index in range(2 * PROBE_TOKENS)]
    device = next(model.parameters()).device
    learned = [True] * PROBE_TOKENS
    first, second = TokenRow(0, ids[:PROBE_TOKENS], learned), TokenRow(1, ids[PROBE_TOKENS:], learned)
    try:
        alone = forward(model, collate([second], device))
    except TypeError as error:
        raise InvalidModel(
            f"{type(model).__name__} cannot be trained here: its forward pass takes other arguments ({error})"
        ) from error
    chosen: Isolation = "alone"
    own = model.config._attn_implementation
    ways: tuple[tuple[Isolation, str], ...] = (("per_document", PER_DOCUMENT), ("mask", own))
    for isolation, implementation in ways[0 if _causal_layers_only(model) else 1 :]:
        try:
            model.set_attn_implementation(implementation)
            packed = forward(model, collate([first, second], device))[-alone.shape[0] :]
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, KeyError, RuntimeError):
            continue  # the architecture takes neither the argument nor the implementation
        tolerance = TOLERANCE.get(alone.dtype, LOW_PRECISION_TOLERANCE)
        if (alone - packed).abs().max() <= tolerance * alone.abs().max():
            chosen = isolation
            break
    else:
        model.set_attn_implementation(own)
    model.train(was_training)
    return chosen


def _causal_layers_only(model: PreTrainedModel) -> bool:
    """Whether every layer's mask is causal or a causal window: what `per_document_attention` knows to do."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    chunked = getattr(config, "attention_chunk_size", None) is not None
    return layers <= {"full_attention", "sliding_attention"} and not chunked


def _window_mask(tokens: int, window: int, device: torch.device) -> torch.Tensor:
    """(1, 1, tokens, tokens), True where a token may look: itself and the `window - 1` tokens before it."""
    position = torch.arange(tokens, device=device)
    distance = position[:, None] - position[None, :]
    return ((distance >= 0) & (distance < window))[None, None]
