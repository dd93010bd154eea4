"""Packed documents never see each other, and the loss is that of the learned tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from qlora_service.training.micro_batch import TokenRow, collate, forward, loss_sum
from tests.tiny_training import CPU, gradients, load, rows


def test_collate_lays_documents_behind_each_other() -> None:
    batch = collate([TokenRow(1, [5, 6, 7], [True, False, True]), TokenRow(2, [8, 9], [True, True])], CPU)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.predictors.tolist() == [1, 3]
    assert batch.targets.tolist() == [7, 9]


def test_the_first_token_of_a_document_is_never_predicted_from_the_one_before() -> None:
    batch = collate([TokenRow(1, [5, 6], [True, True]), TokenRow(2, [7, 8], [True, True])], CPU)
    assert 7 not in batch.targets.tolist()
    assert sum(row.trained_tokens for row in rows(8)) == collate(rows(8), CPU).targets.numel()


@pytest.mark.parametrize("attention", ["per_document", "sdpa"])
@pytest.mark.parametrize("training_mode", [True, False])
def test_packed_logits_equal_the_lone_documents(tiny_model: Path, training_mode: bool, attention: str) -> None:
    model = load(tiny_model, perturb_b=0.05, attention=attention).train(training_mode)
    documents = rows(5)
    packed = forward(model, collate(documents, CPU))
    alone = torch.cat([forward(model, collate([document], CPU)) for document in documents])
    assert (packed - alone).abs().max() < 1e-5


def test_the_trap_is_real_with_a_mask_documents_leak(tiny_model: Path) -> None:
    """What `forward` guards against: if transformers ever isolates here too, the guard can go."""
    model = load(tiny_model, perturb_b=0.05, attention="sdpa").eval()
    documents = rows(5)
    batch = collate(documents, CPU)
    leaking = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=torch.ones_like(batch.input_ids),
        use_cache=False,
        logits_to_keep=batch.predictors,
    ).logits[0]
    alone = torch.cat([forward(model, collate([document], CPU)) for document in documents])
    assert (leaking - alone).abs().max() > 0.01


@pytest.mark.parametrize("attention", ["per_document", "sdpa"])
def test_gradients_of_a_packed_row_equal_the_sum_of_the_lone_ones(tiny_model: Path, attention: str) -> None:
    model = load(tiny_model, perturb_b=0.05, attention=attention).train()
    documents = rows(5)
    loss_sum(model, collate(documents, CPU)).backward()
    packed = gradients(model)
    model.zero_grad()
    for document in documents:
        loss_sum(model, collate([document], CPU)).backward()
    for name, gradient in gradients(model).items():
        assert (packed[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


def test_loss_and_gradients_equal_a_plain_transformers_loop(tiny_model: Path) -> None:
    """The reference pads, masks labels with -100, and takes the shifted cross-entropy of full logits, in float64."""
    model = load(tiny_model, dtype=torch.float64, perturb_b=0.05).train()
    documents = rows(6)
    width = max(len(document.input_ids) for document in documents)
    ids, labels, mask = (torch.zeros(len(documents), width, dtype=torch.long) for _ in range(3))
    labels.fill_(-100)
    for index, document in enumerate(documents):
        length = len(document.input_ids)
        ids[index, :length] = torch.tensor(document.input_ids)
        mask[index, :length] = 1
        trained = torch.tensor(document.trained)
        labels[index, :length] = torch.where(trained, ids[index, :length], -100)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    reference = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    reference.backward()
    expected = gradients(model)
    model.zero_grad()

    loss = loss_sum(model, collate(documents, CPU))
    loss.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-9)
    for name, gradient in gradients(model).items():
        assert (expected[name] - gradient).abs().max() <= 1e-9 * expected[name].abs().max(), name
