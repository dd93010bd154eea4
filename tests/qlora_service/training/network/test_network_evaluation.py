"""Evaluations, and losses of the base without its adapter, equal those of a plain script."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_service.models.adapters import attach_adapter, detach
from qlora_service.models.base.quantize import base_fingerprint, load_base
from qlora_service.specs import Lora
from qlora_service.training.network.isolation import isolate_documents
from qlora_service.training.network.micro_batch import TokenRow
from qlora_service.training.network.network import Network
from tests.network_cases import BOTH_PATHS, config_of
from tests.network_reference import pair, plain_losses
from tests.tiny_training import CPU, NF4, gradients, load, network, rows

DOCUMENTS = rows(6)


@BOTH_PATHS
@pytest.mark.parametrize("training", [True, False])
def test_without_the_adapter_losses_are_those_of_the_base(tiny_model: Path, fast: bool, training: bool) -> None:
    base = load_base(tiny_model, NF4, torch.float32, CPU)
    isolate_documents(base)
    expected = plain_losses(base, DOCUMENTS)
    net = network(load(tiny_model, perturb_b=0.3, adapter=Lora(r=4, lora_dropout=0.0 if fast else 0.5)), fast=fast)
    net.model.train(training)
    for compute in (net.losses, net.evaluate):
        nll = compute(DOCUMENTS, adapter=False).nll
        assert not nll.requires_grad
        assert (nll - expected).abs().max() < 1e-5
        assert (compute(DOCUMENTS).nll.detach() - expected).abs().max() > 1e-2
    assert net.model.training is training
    assert all(p.requires_grad is ("lora_" in name) for name, p in net.model.named_parameters())


def test_base_losses_before_the_backward_pass_leave_gradients_unchanged(tiny_model: Path) -> None:
    """DPO computes them before every backward pass."""
    net = network(load(tiny_model, perturb_b=0.05).train())
    net.losses(DOCUMENTS).nll.sum().backward()
    expected = gradients(net.model)
    net.model.zero_grad()
    losses = net.losses(DOCUMENTS)
    net.losses(DOCUMENTS, adapter=False)
    losses.nll.sum().backward()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(net.model).items())


@BOTH_PATHS
def test_a_detached_base_computes_the_same_as_before(tiny_model: Path, fast: bool) -> None:
    base = load_base(tiny_model, NF4, torch.bfloat16, CPU)
    isolate_documents(base)
    before = base_fingerprint(base)
    net = Network(attach_adapter(base, Lora(r=4), seed=0), "per_document", fast=fast)
    net.losses(DOCUMENTS).nll.sum().backward()
    assert base_fingerprint(detach(net.model)) == before


@BOTH_PATHS
def test_evaluation_equals_full_logits_of_each_row(tiny_model: Path, fast: bool) -> None:
    """In bfloat16, where packing would change it; the reference is a plain script, one row at a time."""
    plain = load(tiny_model, dtype=torch.bfloat16, perturb_b=0.05).eval()
    net = network(load(tiny_model, dtype=torch.bfloat16, perturb_b=0.05), fast=fast)
    with torch.no_grad():
        expected = torch.cat([plain_losses(plain, [document]) for document in DOCUMENTS])
    losses = net.evaluate(DOCUMENTS)
    assert losses.nll.dtype is torch.float32
    assert float(losses.nll.mean()) == pytest.approx(float(expected.mean()), rel=1e-3)
    assert (losses.nll - expected).abs().max() < 0.05


@BOTH_PATHS
@pytest.mark.parametrize("training", [True, False])
def test_evaluation_draws_no_random_numbers_and_restores_the_mode(tiny_model: Path, fast: bool, training: bool) -> None:
    adapter = Lora(r=4, lora_dropout=0.5)
    net = network(load(tiny_model, adapter=adapter, perturb_b=0.05), fast=fast, neftune_noise_alpha=50.0)
    net.model.train(training)
    first = net.evaluate(DOCUMENTS)
    assert not first.nll.requires_grad
    assert torch.equal(first.nll, net.evaluate(DOCUMENTS).nll)
    assert net.model.training is training
    with net.evaluating():
        for _ in range(2):
            assert torch.equal(first.nll, net.evaluate(DOCUMENTS).nll)
    assert net.model.training is training
    net.model.train()
    assert not torch.equal(net.losses(DOCUMENTS).nll, net.losses(DOCUMENTS).nll)


def test_hits_are_the_most_likely_tokens() -> None:
    net, plain = pair(config_of("llama"))
    document = TokenRow(1, DOCUMENTS[0].input_ids, [True] * len(DOCUMENTS[0].input_ids))
    with torch.no_grad():
        most_likely = plain(input_ids=torch.tensor([document.input_ids])).logits[0].argmax(-1)
    # One row continues with the model's prediction, the other does not.
    predicted = TokenRow(1, [document.input_ids[0], int(most_likely[0])], [False, True])
    wrong = TokenRow(2, [document.input_ids[0], int(most_likely[0]) ^ 1], [False, True])
    assert net.evaluate([predicted, wrong]).hits.tolist() == [True, False]
