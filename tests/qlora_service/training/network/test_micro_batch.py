"""Packed documents never see each other, and the first token of a document is never a target."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING

from qlora_service.training.network.micro_batch import (
    PER_DOCUMENT,
    LabeledRow,
    PreferencePair,
    TokenRow,
    collate,
    forward,
)
from tests.network_reference import build
from tests.tiny_training import CPU, load, rows


def test_collate_concatenates_documents() -> None:
    batch = collate([TokenRow(1, [5, 6, 7], [True, False, True]), TokenRow(2, [8, 9], [True, True])], CPU)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.lengths == (3, 2)
    assert batch.predictors.tolist() == [1, 3]
    assert batch.targets.tolist() == [7, 9]


def test_the_first_token_of_a_document_is_never_predicted_from_the_one_before() -> None:
    batch = collate([TokenRow(1, [5, 6], [True, True]), TokenRow(2, [7, 8], [True, True])], CPU)
    assert 7 not in batch.targets.tolist()
    assert sum(row.trained_tokens for row in rows(8)) == collate(rows(8), CPU).targets.numel()


def test_an_example_knows_its_documents_and_its_line() -> None:
    first, second = rows(2)
    assert first.documents == (first,)
    assert PreferencePair(first, second).documents == (first, second)
    assert LabeledRow(second, True).documents == (second,)
    assert (PreferencePair(first, second).line, LabeledRow(second, False).line) == (1, 2)


@pytest.mark.parametrize("attention", [PER_DOCUMENT, "sdpa"])
@pytest.mark.parametrize("training_mode", [True, False])
def test_packed_logits_equal_the_lone_documents(tiny_model: Path, training_mode: bool, attention: str) -> None:
    model = load(tiny_model, perturb_b=0.05).train(training_mode)
    model.get_base_model().set_attn_implementation(attention)
    documents = rows(5)
    packed = forward(model, collate(documents, CPU))
    separate = torch.cat([forward(model, collate([document], CPU)) for document in documents])
    assert (packed - separate).abs().max() < 1e-5


def test_logits_are_those_of_the_model_at_the_predictors(tiny_model: Path) -> None:
    model = load(tiny_model, perturb_b=0.05).eval()
    (document,) = rows(1)
    whole = model(input_ids=torch.tensor([document.input_ids])).logits[0]
    trained = torch.tensor(document.trained[1:])
    assert (forward(model, collate([document], CPU)) - whole[:-1][trained]).abs().max() < 1e-5


def test_logits_of_an_architecture_that_returns_all_are_those_at_the_predictors() -> None:
    base = build(CONFIG_MAPPING["trocr"](vocab_size=512, d_model=32, decoder_layers=2, decoder_attention_heads=4))
    (document,) = rows(1)
    whole = base(input_ids=torch.tensor([document.input_ids]), logits_to_keep=torch.tensor([0])).logits[0]
    assert len(whole) == len(document.input_ids)
    trained = torch.tensor(document.trained[1:])
    assert torch.equal(forward(base, collate([document], CPU)), whole[:-1][trained])


def test_with_an_attention_mask_transformers_leaks_between_documents(tiny_model: Path) -> None:
    """The reason for `isolating_arguments`: if transformers ever isolates in this case too, they can be removed."""
    model = load(tiny_model, perturb_b=0.05).eval()
    model.get_base_model().set_attn_implementation("sdpa")
    documents = rows(5)
    batch = collate(documents, CPU)
    leaking = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=torch.ones_like(batch.input_ids),
        use_cache=False,
        logits_to_keep=batch.predictors,
    ).logits[0]
    separate = torch.cat([forward(model, collate([document], CPU)) for document in documents])
    assert (leaking - separate).abs().max() > 0.01
