"""Held-out loss, by the same forward pass as training, one document at a time.

In bfloat16 a document's logits depend a little on the shape of the matrix products they come from: packed, the mean
loss of 158 tokens moved by 3e-3 (SmolLM2-135M, AVX512-BF16). Alone, it is exactly what anyone gets who loads the
published adapter and feeds it the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qlora_service.training.micro_batch import TokenRow, collate, loss_sum


@torch.no_grad()
def mean_loss(model: torch.nn.Module, rows: Sequence[TokenRow], device: torch.device) -> float:
    """Cross-entropy per learned token over all rows, in nats; the model's mode is left as it was."""
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for row in rows:
        total += float(loss_sum(model, collate([row], device)))
        tokens += row.trained_tokens
    model.train(was_training)
    return total / tokens
