"""Properties of the objectives: initial losses, the reference model, extreme numbers, and the evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_service.data.files.checks import read_examples
from qlora_service.data.rendering.renderer import RenderedRow, Renderer, RenderRules
from qlora_service.models.adapters import trainable_parameters
from qlora_service.specs import Adapter, Dpo, Kto, Lora, Objective, PromptTuning, Training
from qlora_service.training.network.micro_batch import LabeledRow, PreferencePair, TokenRow, TrainingExample
from qlora_service.training.objectives import _with_answer_of, evaluate, make_objective
from tests.network_reference import make_norms_exact, plain_losses
from tests.objective_references import (
    CASES,
    DPO,
    EACH_CASE,
    KTO,
    LABELLED,
    ORPO,
    PAIRS,
    PERTURBED,
    SMOOTHED_DPO,
    SUPERVISED,
    by_document,
    fixed_losses,
    log_ratios,
    mismatched,
    plain_model,
    whole_step,
)
from tests.tiny_training import FLOAT64, gradients, load, network, run

DEMO = Path(__file__).parents[4] / "shared" / "data" / "dpo_en_demo.json"


# --- the initial adapter, and the base as reference


@pytest.mark.parametrize("fast", [True, False])
def test_the_initial_adapter_has_the_losses_of_a_tie(tiny_model: Path, fast: bool) -> None:
    net = network(load(tiny_model, dtype=torch.bfloat16, adapter=Lora(r=4, lora_dropout=0.0)).train(), fast=fast)
    for spec in (DPO, SMOOTHED_DPO):
        share = whole_step(net, spec, PAIRS)
        assert share.example_losses.tolist() == pytest.approx([math.log(2)] * len(PAIRS), rel=1e-7)
        assert not share.hits.any()  # a tie is not a hit
    share = whole_step(net, KTO, LABELLED)
    assert share.example_losses.tolist() == pytest.approx([0.65, 0.35, 0.65, 0.65, 0.35], rel=1e-7)
    assert not share.hits.any()


ADAPTERS: dict[str, Adapter] = {
    "lora": Lora(r=4),
    "lora with dropout": Lora(r=4, lora_dropout=0.5),
    "dora": Lora(r=4, use_dora=True),
    "prompt_tuning": PromptTuning(method="prompt_tuning", num_virtual_tokens=5),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_reference_is_the_base_within_the_same_model(tiny_model: Path, adapter: str) -> None:
    model = load(tiny_model, adapter=ADAPTERS[adapter], **PERTURBED).train()
    net = network(model)
    plain = plain_model(tiny_model, dtype=torch.float64, quantization=FLOAT64)  # B = 0: the base
    documents = [document for pair in PAIRS for document in pair.documents]
    tensors = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    trainable_names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    modules = sum(1 for _ in model.modules())

    torch.manual_seed(0)
    policy = net.losses(documents).nll
    torch.manual_seed(0)
    share = whole_step(net, DPO, PAIRS)

    ratio = [part.sum() for part in by_document(plain_losses(plain, documents) - policy, documents)]
    margins = DPO.beta * (torch.stack(ratio[::2]) - torch.stack(ratio[1::2]))
    assert share.total.item() == pytest.approx(-margins.sigmoid().log().mean().item(), rel=1e-7)
    assert tensors == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert modules == sum(1 for _ in model.modules())
    assert model.training
    torch.manual_seed(0)
    assert torch.equal(net.losses(documents).nll, policy)  # the adapter is on again
    share.total.backward()
    assert gradients(model).keys() == trainable_names


@pytest.mark.parametrize("training", [True, False])
def test_the_baseline_of_kto_has_neither_dropout_nor_gradient(tiny_model: Path, training: bool) -> None:
    model = load(tiny_model, adapter=Lora(r=4, lora_dropout=0.5), **PERTURBED).train(training)
    expected = log_ratios(plain_model(tiny_model, **PERTURBED), mismatched(LABELLED)).mean().item()
    zeros = torch.zeros(sum(one.answer.trained_tokens for one in LABELLED), dtype=torch.float64)
    share = make_objective(KTO).prepare_step(network(model), LABELLED, fixed_losses(zeros, zeros))(LABELLED)
    assert not share.total.requires_grad
    baseline = torch.logit(share.example_losses[0] / KTO.desirable_weight).item() / KTO.beta
    assert baseline == pytest.approx(expected, rel=1e-9)
    assert model.training is training


# --- extreme numbers


ONE_TOKEN = TokenRow(1, [5, 6], [False, True])
EXTREMES = [0.0, 1e-30, 1e-8, 1e-3, 1.0, 90.0, 1e4, 1e6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", [DPO, SMOOTHED_DPO, ORPO, KTO])
def test_losses_and_gradients_are_finite_at_extremes(tiny_model: Path, spec: Objective, dtype: torch.dtype) -> None:
    net = network(load(tiny_model))
    examples: list[TrainingExample] = [PreferencePair(ONE_TOKEN, ONE_TOKEN)]
    if isinstance(spec, Kto):
        examples = [LabeledRow(ONE_TOKEN, True)]
    count = len(examples[0].documents)
    for policy in EXTREMES:
        for other in EXTREMES:
            nll = torch.tensor([policy, other][:count], dtype=dtype, requires_grad=True)
            base = torch.tensor([other, policy][:count], dtype=dtype)
            share = make_objective(spec).prepare_step(net, examples, fixed_losses(nll, base))(examples)
            share.total.backward()
            assert share.total.isfinite()
            assert nll.grad is not None
            assert nll.grad.isfinite().all()


def test_a_log_ratio_survives_a_long_answer_in_float32(tiny_model: Path) -> None:
    """20,000 tokens of 5 nats, each 1e-6 more likely than before: float32 sums near 1e5 are 8e-3 apart."""
    long = TokenRow(1, [5] * 20_001, [False] + [True] * 20_000)
    nll = torch.full((20_000,), 5.0).double()
    net = network(load(tiny_model))
    compute = fixed_losses((nll - 1e-6).float(), nll.float())
    examples = [LabeledRow(long, True)]
    loss = make_objective(Kto(type="kto", beta=1.0)).prepare_step(net, examples, compute)(examples).total
    gain = (nll.float() - (nll - 1e-6).float()).double().sum()
    assert loss.item() == pytest.approx(torch.sigmoid(-gain).item(), abs=1e-6)


def test_a_baseline_of_nan_does_not_become_zero(tiny_model: Path) -> None:
    net = network(load(tiny_model, perturb_b=0.05))
    with torch.no_grad():
        trainable_parameters(net.model)[0].fill_(math.nan)
    assert math.isnan(whole_step(net, KTO, LABELLED).total.item())


# --- documents


def test_only_trained_tokens_after_the_first_count(tiny_model: Path) -> None:
    text = TokenRow(1, [5, 6, 7, 8], [True] * 4)
    turns = TokenRow(2, [9, 5, 6, 7, 8, 9], [False, True, True, False, False, True])
    model = load(tiny_model, **PERTURBED)
    share = whole_step(network(model), SUPERVISED, [text, turns])
    make_norms_exact(model)
    every = plain_losses(
        model, [TokenRow(0, row.input_ids, [True] * len(row.input_ids)) for row in (text, turns)]
    ).detach()
    trained = [*every[:3], every[3], every[4], every[7]]
    assert share.total.item() == pytest.approx(sum(map(float, trained)) / 6, rel=1e-9)
    expected = [float(every[:3].mean()), sum(map(float, trained[3:])) / 3]
    assert share.example_losses.tolist() == pytest.approx(expected, rel=1e-9)
    assert len(share.hits) == 6


def test_an_answer_of_several_turns_is_used_whole() -> None:
    """A tool's result between two messages of the answer is part of it, and is still not trained."""
    row = TokenRow(1, [1, 2, 3, 4], [False, False, True, True])
    tool_use = TokenRow(2, [5, 6, 7, 8, 9], [False, True, False, True, False])
    assert _with_answer_of(row, tool_use) == TokenRow(1, [1, 2, 6, 7, 8], [False, False, True, False, True])


@st.composite
def token_rows(draw: st.DrawFn) -> TokenRow:
    trained = draw(st.lists(st.booleans(), min_size=2, max_size=12).filter(lambda flags: any(flags[1:])))
    return TokenRow(1, list(range(len(trained))), trained)


@given(row=token_rows(), other=token_rows())
def test_a_mismatched_row_is_no_longer_than_both_and_has_an_answer(row: TokenRow, other: TokenRow) -> None:
    result = _with_answer_of(row, other)
    assert len(result.input_ids) == len(result.trained) <= max(len(row.input_ids), len(other.input_ids))
    assert result.trained_tokens > 0
    assert result.input_ids[0] == row.input_ids[0]


# --- evaluation


@EACH_CASE
def test_held_out_examples_are_evaluated_as_one_step(tiny_model: Path, case: str) -> None:
    spec, examples = CASES[case]
    net = network(load(tiny_model, **PERTURBED).train())
    step = whole_step(net, spec, examples)
    evaluation = evaluate(net, make_objective(spec), examples)
    assert evaluation.loss == pytest.approx(step.total.item(), rel=1e-9)
    assert evaluation.accuracy == pytest.approx(step.hits.double().mean().item())
    assert evaluation.perplexity == (pytest.approx(math.exp(evaluation.loss)) if spec is SUPERVISED else None)
    assert net.model.training


def test_accuracy_is_the_share_of_correct_rankings_and_labels(tiny_model: Path) -> None:
    plain, net = plain_model(tiny_model, **PERTURBED), network(load(tiny_model, **PERTURBED))
    pairs = [*PAIRS[:3], PreferencePair(PAIRS[3].rejected, PAIRS[3].chosen)]
    pair_ratio = log_ratios(plain, [document for pair in pairs for document in pair.documents])
    ranked_right = (pair_ratio[::2] > pair_ratio[1::2]).tolist()
    baseline = log_ratios(plain, mismatched(LABELLED)).mean().clamp(min=0)
    gains = (log_ratios(plain, [one.answer for one in LABELLED]) - baseline).tolist()
    labelled_right = [(gain > 0) is one.desirable for gain, one in zip(gains, LABELLED, strict=True)]
    cases: list[tuple[Objective, Sequence[TrainingExample], list[bool]]] = [
        (DPO, pairs, ranked_right),
        (KTO, LABELLED, labelled_right),
    ]
    for spec, examples, is_right in cases:
        assert whole_step(net, spec, examples).hits.tolist() == is_right
        assert evaluate(net, make_objective(spec), examples).accuracy == pytest.approx(sum(is_right) / len(is_right))
        assert 0 < sum(is_right) < len(is_right)


@EACH_CASE
def test_held_out_documents_are_computed_one_at_a_time(tiny_model: Path, case: str) -> None:
    """In bfloat16, where another document in the row would change the loss; with dropout, which must be off."""
    spec, examples = CASES[case]
    model = load(tiny_model, dtype=torch.bfloat16, adapter=Lora(r=4, lora_dropout=0.5), perturb_b=0.3).train()
    net, objective = network(model), make_objective(spec)
    compute_share = objective.prepare_step(net, examples, net.evaluate)
    with torch.no_grad():
        alone = math.fsum(compute_share([example]).total.item() for example in examples)
    assert evaluate(net, objective, examples).loss == alone


# --- real pairs


@pytest.fixture(scope="module")
def real_pairs(tiny_model: Path) -> list[TrainingExample]:
    rules, now = RenderRules(96, too_long="truncate"), datetime(2026, 3, 1, tzinfo=UTC)
    pairs: list[TrainingExample] = []
    with Renderer(tiny_model, rules, now) as renderer:
        for row in renderer.render(islice(read_examples(DEMO, "json", "preference"), 40)):
            if isinstance(row, RenderedRow) and row.rejected is not None and len(pairs) < 8:
                sides = [TokenRow(side.line, side.input_ids, side.trained) for side in (row, row.rejected)]
                pairs.append(PreferencePair(*sides))
    return pairs


@pytest.mark.skipif(not DEMO.is_file(), reason=f"no {DEMO.name} in ../shared/data")
@pytest.mark.parametrize(("spec", "share"), [(Dpo(type="dpo"), 0.8), (ORPO, 0.97)])
def test_training_on_real_pairs_lowers_their_loss(
    tiny_model: Path, real_pairs: list[TrainingExample], spec: Objective, share: float
) -> None:
    assert len(real_pairs) == 8
    training = Training(batch_size=4, learning_rate=0.01, warmup_ratio=0.0)
    outcome, _ = run(load(tiny_model), real_pairs, training, steps=10, held_out=real_pairs, objective=spec)
    if isinstance(spec, Dpo):
        assert outcome.before.loss == pytest.approx(math.log(2), rel=1e-6)
    assert outcome.after.loss < share * outcome.before.loss
    assert outcome.after.accuracy >= 0.75
