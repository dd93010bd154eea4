"""Held-out loss, by the same forward pass as training."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qlora_service.data.batching import pack
from qlora_service.training.micro_batch import TokenRow, collate, loss_sum


@torch.no_grad()
def mean_loss(model: torch.nn.Module, rows: Sequence[TokenRow], micro_batch_tokens: int, device: torch.device) -> float:
    """Cross-entropy per learned token over all rows, in nats; the model's mode is left as it was."""
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for members in pack([len(row.input_ids) for row in rows], micro_batch_tokens):
        batch = collate([rows[index] for index in members], device)
        total += float(loss_sum(model, batch).double())
        tokens += batch.targets.numel()
    model.train(was_training)
    return total / tokens
