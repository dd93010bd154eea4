"""Losses and gradients of the objectives against the papers' formulas in float64, and against TRL's trainers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora_service.specs import Kto
from qlora_service.training.network.micro_batch import TokenRow
from qlora_service.training.objectives import make_objective
from tests.judges import assert_close_gradients, plain_losses
from tests.objective_references import (
    CASES,
    DPO,
    EACH_CASE,
    LABELLED,
    ORPO,
    PAIRS,
    PERTURBED,
    by_document,
    log_ratios,
    mismatched,
    plain_model,
    reference_losses,
    reference_step,
    whole_step,
)
from tests.tiny_training import gradients, load, network


@EACH_CASE
def test_losses_and_gradients_equal_those_of_the_papers(tiny_model: Path, case: str) -> None:
    spec, examples = CASES[case]
    plain = plain_model(tiny_model, **PERTURBED)
    expected = reference_step(plain, spec, examples)
    expected.backward()
    net = network(load(tiny_model, **PERTURBED).train())
    share = whole_step(net, spec, examples)
    share.total.backward()
    assert share.total.item() == pytest.approx(expected.item(), rel=1e-9)
    assert share.example_losses.tolist() == pytest.approx(reference_losses(plain, spec, examples).tolist(), rel=1e-9)
    assert_close_gradients(gradients(net.model), gradients(plain), 1e-9)


@pytest.mark.parametrize("case", ["supervised", "dpo", "orpo", "kto"])
def test_losses_and_gradients_on_nf4_are_as_close_as_float32_allows(tiny_model: Path, case: str) -> None:
    spec, examples = CASES[case]
    plain = plain_model(tiny_model, perturb_b=0.05)
    expected = reference_step(plain, spec, examples)
    expected.backward()
    net = network(load(tiny_model, perturb_b=0.05).train())
    loss = whole_step(net, spec, examples).total
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_close_gradients(gradients(net.model), gradients(plain), 1e-3)


@EACH_CASE
@pytest.mark.parametrize("fast", [True, False])
def test_the_step_does_not_depend_on_its_micro_batches(tiny_model: Path, case: str, fast: bool) -> None:
    spec, examples = CASES[case]
    results = []
    for size, checkpointing in [(len(examples), False), (len(examples), True), (1, False), (3, True)]:
        net = network(load(tiny_model, **PERTURBED).train(), fast=fast, checkpointing=checkpointing)
        assert net.layers == ("llama" if fast else "general")
        compute_share = make_objective(spec).prepare_step(net, examples, net.losses)
        loss = 0.0
        for start in range(0, len(examples), size):
            share = compute_share(examples[start : start + size])
            share.total.backward()
            loss += share.total.item()
        results.append((loss, gradients(net.model)))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-9)
        assert_close_gradients(gradient, results[0][1], 1e-9)


def test_the_baseline_of_kto_is_above_zero_in_these_tests(tiny_model: Path) -> None:
    """At zero, its lower bound, the tests above would not detect a wrong baseline."""
    assert log_ratios(plain_model(tiny_model, **PERTURBED), mismatched(LABELLED)).mean() > 0.05


# --- TRL


def build_trl_trainer(kind: str, directory: Path, output: Path, **options: Any) -> Any:
    """TRL's trainer of the tiny model in float64; its log-probabilities are float32 nevertheless."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    config = getattr(trl, f"{kind}Config")(
        output_dir=str(output), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, **options
    )
    columns = {"chosen": "b", "rejected": "c"} if kind == "DPO" else {"completion": "b", "label": True}
    trainer = getattr(trl, f"{kind}Trainer")(
        plain_model(directory, **(PERTURBED | {"perturb_b": 0.0})),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a"} | columns] * 8),
        processing_class=AutoTokenizer.from_pretrained(directory),
    )
    # TRL's reference is a copy of the initial adapter: with B = 0 it is the base.
    trainer.model.load_state_dict(load(directory, **PERTURBED).state_dict(), strict=False)
    return trainer


def prompt_and_answer(row: TokenRow) -> tuple[list[int], list[int]]:
    question = row.trained.index(True)
    return list(row.input_ids[:question]), list(row.input_ids[question:])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("case", ["dpo", "kto"])
def test_losses_and_gradients_equal_those_of_trl(tiny_model: Path, tmp_path: Path, case: str) -> None:
    spec, examples = CASES[case]
    columns: list[dict[str, Any]] = []
    if isinstance(spec, Kto):
        weights = {"desirable_weight": spec.desirable_weight, "undesirable_weight": spec.undesirable_weight}
        trainer = build_trl_trainer("KTO", tiny_model, tmp_path, beta=spec.beta, max_length=None, **weights)
        for example, other in zip(LABELLED, mismatched(LABELLED), strict=True):
            (prompt, answer), kl = prompt_and_answer(example.answer), prompt_and_answer(other)[1]
            row = {"prompt_ids": prompt, "completion_ids": answer, "KL_completion_ids": kl}
            columns.append(row | {"label": example.desirable})
    else:
        trainer = build_trl_trainer("DPO", tiny_model, tmp_path, beta=DPO.beta, max_length=None)
        for pair in PAIRS:
            (prompt, chosen), rejected = prompt_and_answer(pair.chosen), prompt_and_answer(pair.rejected)[1]
            columns.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(columns))
    expected.backward()
    net = network(load(tiny_model, **PERTURBED).train())
    loss = whole_step(net, spec, examples).total
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_close_gradients(gradients(net.model), gradients(trainer.model), 1e-4)


def test_the_odds_ratio_of_orpo_equals_that_of_trl(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other term differs: TRL includes the loss of the question's tokens, and one mean over all chosen tokens."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOTrainer

    documents = [document for pair in PAIRS for document in pair.documents]
    nll = plain_losses(plain_model(tiny_model, **PERTURBED), documents).detach()
    mean = torch.stack([-part.mean() for part in by_document(nll, documents)])
    loss: Any = ORPOTrainer.odds_ratio_loss
    settings = SimpleNamespace(beta=ORPO.beta, accelerator=SimpleNamespace(device="cpu"))
    odds_ratio = loss(settings, mean[::2], mean[1::2])[0]
    example_losses = whole_step(network(load(tiny_model, **PERTURBED)), ORPO, PAIRS).example_losses
    assert (example_losses + mean[::2]).tolist() == pytest.approx((-odds_ratio).tolist(), rel=1e-5)
