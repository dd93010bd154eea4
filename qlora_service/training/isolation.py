"""Whether a model keeps packed documents apart: measured on the model itself, not believed."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from qlora_service.training.micro_batch import TokenRow, collate, forward

PROBE_TOKENS = 12
# float32 kernels of different shapes differ by about 1e-6 of the largest logit, bfloat16 ones by 1e-2;
# a leak moves the probe's logits by about their own size.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
LOW_PRECISION_TOLERANCE = 0.1


@torch.no_grad()
def isolates_documents(model: PreTrainedModel) -> bool:
    """True when a document's logits do not depend on the documents packed before it.

    Attention kernels differ by architecture, and some layers (state-space, recurrent) know no document boundaries:
    for such models every document gets a row of its own.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    vocabulary = model.config.get_text_config().vocab_size
    ids = [(7 * index + 3) % min(vocabulary, 1000) for index in range(2 * PROBE_TOKENS)]
    first = TokenRow(0, ids[:PROBE_TOKENS], [True] * PROBE_TOKENS)
    second = TokenRow(1, ids[PROBE_TOKENS:], [True] * PROBE_TOKENS)
    alone = forward(model, collate([second], device))
    packed = forward(model, collate([first, second], device))[-alone.shape[0] :]
    model.train(was_training)
    tolerance = TOLERANCE.get(alone.dtype, LOW_PRECISION_TOLERANCE)
    return bool((alone - packed).abs().max() <= tolerance * alone.abs().max())
