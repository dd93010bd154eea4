from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from qlora_service.specs import Lora
from qlora_service.training.evaluation import mean_loss
from tests.tiny_training import CPU, load, rows


def test_the_mean_is_per_learned_token_over_all_rows(tiny_model: Path) -> None:
    """The reference takes full logits, as a plain script would; in bfloat16 the two agree bit for bit but the sum."""
    model = load(tiny_model, dtype=torch.bfloat16, perturb_b=0.05).eval()
    documents = rows(5)
    total, tokens = 0.0, 0
    for row in documents:
        ids = torch.tensor([row.input_ids])
        learned = torch.tensor(row.trained[1:])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1][learned].float()
        total += F.cross_entropy(logits, ids[0, 1:][learned], reduction="sum").item()
        tokens += int(learned.sum())
    assert mean_loss(model, documents, CPU) == pytest.approx(total / tokens, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_left_as_it_was_and_dropout_is_off(tiny_model: Path, training: bool) -> None:
    model = load(tiny_model, adapter=Lora(r=4, lora_dropout=0.5), perturb_b=0.05).train(training)
    assert mean_loss(model, rows(3), CPU) == mean_loss(model, rows(3), CPU)
    assert model.training is training
