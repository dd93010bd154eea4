"""Losses and gradients against the papers' formulas in float64 over padded batches, and against TRL's own trainers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

from qlora_service.data.files.checks import read_examples
from qlora_service.data.rendering.renderer import RenderedRow, Renderer, RenderRules
from qlora_service.models.adapters import trainable
from qlora_service.specs import (
    Adapter,
    Dpo,
    Kto,
    Lora,
    Objective,
    Orpo,
    PromptTuning,
    Supervised,
    Training,
)
from qlora_service.training.network.cross_entropy import TokenLosses
from qlora_service.training.network.micro_batch import LabelledRow, PreferencePair, TokenRow, TrainingExample
from qlora_service.training.network.network import Network
from qlora_service.training.objectives import Share, _with_answer_of, evaluate, make_objective
from tests.judges import assert_close_gradients, make_norms_exact, plain_losses
from tests.tiny_training import FLOAT64, gradients, load, network, rows, run

DEMO = Path(__file__).parents[4] / "shared" / "data" / "dpo_en_demo.json"
ROWS = rows(8, high=40)
PAIRS = [PreferencePair(row, _with_answer_of(row, other)) for row, other in zip(ROWS[::2], ROWS[1::2], strict=True)]
LABELLED = [LabelledRow(row, desirable) for row, desirable in zip(ROWS, [True, False, True, True, False], strict=False)]
SUPERVISED = Supervised()
DPO = Dpo(type="dpo", beta=0.3)
CAUTIOUS_DPO = Dpo(type="dpo", beta=0.3, label_smoothing=0.2)
ORPO = Orpo(type="orpo", beta=0.3)
KTO = Kto(type="kto", beta=0.3, desirable_weight=1.3, undesirable_weight=0.7)
CASES: dict[str, tuple[Objective, Sequence[TrainingExample]]] = {
    "supervised": (SUPERVISED, ROWS[:4]),
    "dpo": (DPO, PAIRS),
    "dpo, smoothed": (CAUTIOUS_DPO, PAIRS),
    "orpo": (ORPO, PAIRS),
    "kto": (KTO, LABELLED),
    "kto, all desirable": (KTO, LABELLED[2:4]),
    "kto, all undesirable": (KTO, [LABELLED[1], LABELLED[4]]),
    "kto, one example": (KTO, LABELLED[:1]),
}
EACH_CASE = pytest.mark.parametrize("case", CASES)
PERTURBED: dict[str, Any] = {"dtype": torch.float64, "quantization": FLOAT64, "perturb_b": 0.3}


def whole_step(mine: Network, spec: Objective, examples: Sequence[TrainingExample]) -> Share:
    """The step in one micro-batch."""
    return make_objective(spec).of_step(mine, examples, mine.losses)(examples)


# --- the references


def of_losses(nll: torch.Tensor, base: torch.Tensor) -> Callable[..., TokenLosses]:
    """A computation whose result is known: of the policy and of the base."""
    hits = torch.zeros(len(nll), dtype=torch.bool)

    def compute(documents: Sequence[TokenRow], *, adapter: bool = True) -> TokenLosses:
        return TokenLosses(nll if adapter else base, hits)

    return compute


def by_document(losses: torch.Tensor, documents: Sequence[TokenRow]) -> tuple[torch.Tensor, ...]:
    parts: tuple[torch.Tensor, ...] = losses.split([sum(document.trained[1:]) for document in documents])
    return parts


def log_ratios(model: PeftModel, documents: Sequence[TokenRow]) -> torch.Tensor:
    """(documents,) log π(y|x) - log π_ref(y|x): each is a sum over the answer's tokens."""
    policy = torch.stack([-part.sum() for part in by_document(plain_losses(model, documents), documents)])
    with torch.no_grad(), model.disable_adapter():
        bare = torch.stack([-part.sum() for part in by_document(plain_losses(model, documents), documents)])
    return policy - bare


def mismatched(labelled: Sequence[LabelledRow]) -> list[TokenRow]:
    """The pairs (x1, y2), (x2, y3), … (xm, y1) of arXiv:2402.01306, section 4, cut at the longer of the two rows."""
    made = []
    for index, example in enumerate(labelled):
        row, other = example.answer, labelled[(index + 1) % len(labelled)].answer
        question, answer = row.trained.index(True), other.trained.index(True)
        longest = max(len(row.input_ids), len(other.input_ids))
        ids = [*row.input_ids[:question], *other.input_ids[answer:]][:longest]
        made.append(TokenRow(0, ids, [place >= question for place in range(len(ids))]))
    return made


def reference(model: PeftModel, spec: Objective, examples: Sequence[TrainingExample]) -> torch.Tensor:
    """(examples,) each one's loss; the step's is their mean, but for supervised rows that of their tokens."""
    documents = [document for example in examples for document in example.documents]
    match spec:
        case Dpo():  # arXiv:2305.18290, equation 7; smoothed as in its authors' conservative DPO
            ratio = log_ratios(model, documents)
            margin = spec.beta * (ratio[::2] - ratio[1::2])
            return (
                -(1 - spec.label_smoothing) * margin.sigmoid().log() - spec.label_smoothing * (-margin).sigmoid().log()
            )
        case Orpo():  # arXiv:2403.07691, equations 3 (mean), 4 (odds), 6 and 7
            mean = torch.stack([-part.mean() for part in by_document(plain_losses(model, documents), documents)])
            odds = mean.exp() / (1 - mean.exp())
            return -mean[::2] - spec.beta * (odds[::2] / odds[1::2]).log().sigmoid().log()
        case Kto():  # arXiv:2402.01306, equations 7 and 8
            labelled = [example for example in examples if isinstance(example, LabelledRow)]
            others = log_ratios(model, mismatched(labelled)).detach() if len(labelled) > 1 else torch.zeros(1)
            baseline = max(0.0, others.mean().item())
            values = []
            for ratio, example in zip(log_ratios(model, documents), labelled, strict=True):
                if example.desirable:
                    weight, value = spec.desirable_weight, (spec.beta * (ratio - baseline)).sigmoid()
                else:
                    weight, value = spec.undesirable_weight, (spec.beta * (baseline - ratio)).sigmoid()
                values.append(weight - weight * value)
            return torch.stack(values)
    return torch.stack([part.mean() for part in by_document(plain_losses(model, documents), documents)])


def reference_step(model: PeftModel, spec: Objective, examples: Sequence[TrainingExample]) -> torch.Tensor:
    if isinstance(spec, Supervised):
        return plain_losses(model, [document for example in examples for document in example.documents]).mean()
    return reference(model, spec, examples).mean()


def plain_model(directory: Path, **options: Any) -> PeftModel:
    """The same model with transformers' own attention and exact norms."""
    model = load(directory, **options).train()
    model.get_base_model().set_attn_implementation("sdpa")
    make_norms_exact(model)
    return model


# --- losses and gradients


@EACH_CASE
def test_losses_and_gradients_are_the_papers(tiny_model: Path, case: str) -> None:
    spec, examples = CASES[case]
    plain = plain_model(tiny_model, **PERTURBED)
    expected = reference_step(plain, spec, examples)
    expected.backward()
    mine = network(load(tiny_model, **PERTURBED).train())
    share = whole_step(mine, spec, examples)
    share.total.backward()
    assert share.total.item() == pytest.approx(expected.item(), rel=1e-9)
    assert share.each.tolist() == pytest.approx(reference(plain, spec, examples).tolist(), rel=1e-9)
    assert_close_gradients(gradients(mine.model), gradients(plain), 1e-9)


@pytest.mark.parametrize("case", ["supervised", "dpo", "orpo", "kto"])
def test_on_nf4_in_float32_they_are_as_close_as_float32_allows(tiny_model: Path, case: str) -> None:
    spec, examples = CASES[case]
    plain = plain_model(tiny_model, perturb_b=0.05)
    expected = reference_step(plain, spec, examples)
    expected.backward()
    mine = network(load(tiny_model, perturb_b=0.05).train())
    loss = whole_step(mine, spec, examples).total
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_close_gradients(gradients(mine.model), gradients(plain), 1e-3)


@EACH_CASE
@pytest.mark.parametrize("fast", [True, False])
def test_the_step_does_not_depend_on_how_it_is_cut(tiny_model: Path, case: str, fast: bool) -> None:
    spec, examples = CASES[case]
    found = []
    for size, checkpointing in [(len(examples), False), (len(examples), True), (1, False), (3, True)]:
        mine = network(load(tiny_model, **PERTURBED).train(), fast=fast, checkpointing=checkpointing)
        assert mine.layers == ("llama" if fast else "general")
        share_of = make_objective(spec).of_step(mine, examples, mine.losses)
        loss = 0.0
        for start in range(0, len(examples), size):
            share = share_of(examples[start : start + size])
            share.total.backward()
            loss += share.total.item()
        found.append((loss, gradients(mine.model)))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-9)
        assert_close_gradients(gradient, found[0][1], 1e-9)


def test_the_baseline_of_kto_is_above_zero_in_these_tests(tiny_model: Path) -> None:
    """At zero, as the bound leaves it, the tests above would not see a wrong one."""
    assert log_ratios(plain_model(tiny_model, **PERTURBED), mismatched(LABELLED)).mean() > 0.05


# --- TRL


def build_trl_trainer(kind: str, directory: Path, output: Path, **options: Any) -> Any:
    """TRL's trainer over the tiny model in float64; its log-probabilities are float32 all the same."""
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
    # TRL's reference is a copy of the adapter that it is given: with B = 0 it is the base.
    trainer.model.load_state_dict(load(directory, **PERTURBED).state_dict(), strict=False)
    return trainer


def halves(row: TokenRow) -> tuple[list[int], list[int]]:
    question = row.trained.index(True)
    return list(row.input_ids[:question]), list(row.input_ids[question:])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("case", ["dpo", "kto"])
def test_losses_and_gradients_are_those_of_trl(tiny_model: Path, tmp_path: Path, case: str) -> None:
    spec, examples = CASES[case]
    columns: list[dict[str, Any]] = []
    if isinstance(spec, Kto):
        weights = {"desirable_weight": spec.desirable_weight, "undesirable_weight": spec.undesirable_weight}
        trainer = build_trl_trainer("KTO", tiny_model, tmp_path, beta=spec.beta, max_length=None, **weights)
        for example, other in zip(LABELLED, mismatched(LABELLED), strict=True):
            (prompt, answer), kl = halves(example.answer), halves(other)[1]
            row = {"prompt_ids": prompt, "completion_ids": answer, "KL_completion_ids": kl}
            columns.append(row | {"label": example.desirable})
    else:
        trainer = build_trl_trainer("DPO", tiny_model, tmp_path, beta=DPO.beta, max_length=None)
        for pair in PAIRS:
            (prompt, chosen), rejected = halves(pair.chosen), halves(pair.rejected)[1]
            columns.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(columns))
    expected.backward()
    mine = network(load(tiny_model, **PERTURBED).train())
    loss = whole_step(mine, spec, examples).total
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_close_gradients(gradients(mine.model), gradients(trainer.model), 1e-4)


def test_the_odds_ratio_of_orpo_is_that_of_trl(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other term is not: TRL takes the loss of the question's tokens too, and one mean over all chosen tokens."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOTrainer

    documents = [document for pair in PAIRS for document in pair.documents]
    nll = plain_losses(plain_model(tiny_model, **PERTURBED), documents).detach()
    mean = torch.stack([-part.mean() for part in by_document(nll, documents)])
    loss: Any = ORPOTrainer.odds_ratio_loss
    settings = SimpleNamespace(beta=ORPO.beta, accelerator=SimpleNamespace(device="cpu"))
    odds_ratio = loss(settings, mean[::2], mean[1::2])[0]
    each = whole_step(network(load(tiny_model, **PERTURBED)), ORPO, PAIRS).each
    assert (each + mean[::2]).tolist() == pytest.approx((-odds_ratio).tolist(), rel=1e-5)


# --- the start, and the base as reference


@pytest.mark.parametrize("fast", [True, False])
def test_an_adapter_that_does_nothing_yet_has_the_losses_of_a_coin(tiny_model: Path, fast: bool) -> None:
    mine = network(load(tiny_model, dtype=torch.bfloat16, adapter=Lora(r=4, lora_dropout=0.0)).train(), fast=fast)
    for spec in (DPO, CAUTIOUS_DPO):
        share = whole_step(mine, spec, PAIRS)
        assert share.each.tolist() == pytest.approx([math.log(2)] * len(PAIRS), rel=1e-7)
        assert not share.hits.any()  # a tie is no hit
    share = whole_step(mine, KTO, LABELLED)
    assert share.each.tolist() == pytest.approx([0.65, 0.35, 0.65, 0.65, 0.35], rel=1e-7)
    assert not share.hits.any()


ADAPTERS: dict[str, Adapter] = {
    "lora": Lora(r=4),
    "lora with dropout": Lora(r=4, lora_dropout=0.5),
    "dora": Lora(r=4, use_dora=True),
    "prompt_tuning": PromptTuning(method="prompt_tuning", num_virtual_tokens=5),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_reference_is_the_base_of_the_same_model(tiny_model: Path, adapter: str) -> None:
    model = load(tiny_model, adapter=ADAPTERS[adapter], **PERTURBED).train()
    mine = network(model)
    plain = plain_model(tiny_model, dtype=torch.float64, quantization=FLOAT64)  # B = 0: the base
    documents = [document for pair in PAIRS for document in pair.documents]
    tensors = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    modules = sum(1 for _ in model.modules())

    torch.manual_seed(0)
    policy = mine.losses(documents).nll
    torch.manual_seed(0)
    share = whole_step(mine, DPO, PAIRS)

    ratio = [part.sum() for part in by_document(plain_losses(plain, documents) - policy, documents)]
    margins = DPO.beta * (torch.stack(ratio[::2]) - torch.stack(ratio[1::2]))
    assert share.total.item() == pytest.approx(-margins.sigmoid().log().mean().item(), rel=1e-7)
    assert tensors == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert modules == sum(1 for _ in model.modules())
    assert model.training
    torch.manual_seed(0)
    assert torch.equal(mine.losses(documents).nll, policy)  # the adapter is on again
    share.total.backward()
    assert gradients(model).keys() == learned


@pytest.mark.parametrize("training", [True, False])
def test_the_baseline_of_kto_has_neither_dropout_nor_gradient(tiny_model: Path, training: bool) -> None:
    model = load(tiny_model, adapter=Lora(r=4, lora_dropout=0.5), **PERTURBED).train(training)
    expected = log_ratios(plain_model(tiny_model, **PERTURBED), mismatched(LABELLED)).mean().item()
    unchanged = torch.zeros(sum(one.answer.trained_tokens for one in LABELLED), dtype=torch.float64)
    share = make_objective(KTO).of_step(network(model), LABELLED, of_losses(unchanged, unchanged))(LABELLED)
    assert not share.total.requires_grad
    baseline = torch.logit(share.each[0] / KTO.desirable_weight).item() / KTO.beta
    assert baseline == pytest.approx(expected, rel=1e-9)
    assert model.training is training


# --- numbers at the edge


ONE_TOKEN = TokenRow(1, [5, 6], [False, True])
EXTREMES = [0.0, 1e-30, 1e-8, 1e-3, 1.0, 90.0, 1e4, 1e6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", [DPO, CAUTIOUS_DPO, ORPO, KTO])
def test_no_answer_is_too_certain_or_too_unlikely(tiny_model: Path, spec: Objective, dtype: torch.dtype) -> None:
    mine = network(load(tiny_model))
    examples: list[TrainingExample] = [PreferencePair(ONE_TOKEN, ONE_TOKEN)]
    if isinstance(spec, Kto):
        examples = [LabelledRow(ONE_TOKEN, True)]
    count = len(examples[0].documents)
    for policy in EXTREMES:
        for other in EXTREMES:
            nll = torch.tensor([policy, other][:count], dtype=dtype, requires_grad=True)
            base = torch.tensor([other, policy][:count], dtype=dtype)
            share = make_objective(spec).of_step(mine, examples, of_losses(nll, base))(examples)
            share.total.backward()
            assert share.total.isfinite()
            assert nll.grad is not None
            assert nll.grad.isfinite().all()


def test_a_log_ratio_survives_a_long_answer_in_float32(tiny_model: Path) -> None:
    """20,000 tokens of 5 nats, each 1e-6 likelier than before: sums of 1e5 in float32 are 8e-3 apart."""
    long = TokenRow(1, [5] * 20_001, [False] + [True] * 20_000)
    nll = torch.full((20_000,), 5.0).double()
    mine = network(load(tiny_model))
    compute = of_losses((nll - 1e-6).float(), nll.float())
    examples = [LabelledRow(long, True)]
    loss = make_objective(Kto(type="kto", beta=1.0)).of_step(mine, examples, compute)(examples).total
    gained = (nll.float() - (nll - 1e-6).float()).double().sum()
    assert loss.item() == pytest.approx(torch.sigmoid(-gained).item(), abs=1e-6)


def test_a_baseline_that_is_not_a_number_is_not_taken_for_zero(tiny_model: Path) -> None:
    mine = network(load(tiny_model, perturb_b=0.05))
    with torch.no_grad():
        trainable(mine.model)[0].fill_(math.nan)
    assert math.isnan(whole_step(mine, KTO, LABELLED).total.item())


# --- documents


def test_only_learned_tokens_behind_the_first_count(tiny_model: Path) -> None:
    text = TokenRow(1, [5, 6, 7, 8], [True] * 4)
    turns = TokenRow(2, [9, 5, 6, 7, 8, 9], [False, True, True, False, False, True])
    model = load(tiny_model, **PERTURBED)
    share = whole_step(network(model), SUPERVISED, [text, turns])
    make_norms_exact(model)
    every = plain_losses(
        model, [TokenRow(0, row.input_ids, [True] * len(row.input_ids)) for row in (text, turns)]
    ).detach()
    learned = [*every[:3], every[3], every[4], every[7]]
    assert share.total.item() == pytest.approx(sum(map(float, learned)) / 6, rel=1e-9)
    assert share.each.tolist() == pytest.approx([float(every[:3].mean()), sum(map(float, learned[3:])) / 3], rel=1e-9)
    assert len(share.hits) == 6


def test_an_answer_of_several_turns_is_taken_whole() -> None:
    """A tool's result between two messages of the judged answer is part of it, and is still not learned."""
    asked = TokenRow(1, [1, 2, 3, 4], [False, False, True, True])
    tool_use = TokenRow(2, [5, 6, 7, 8, 9], [False, True, False, True, False])
    assert _with_answer_of(asked, tool_use) == TokenRow(1, [1, 2, 6, 7, 8], [False, False, True, False, True])


@st.composite
def token_rows(draw: st.DrawFn) -> TokenRow:
    trained = draw(st.lists(st.booleans(), min_size=2, max_size=12).filter(lambda flags: any(flags[1:])))
    return TokenRow(1, list(range(len(trained))), trained)


@given(row=token_rows(), other=token_rows())
def test_a_mismatched_row_is_no_longer_than_both_and_has_an_answer(row: TokenRow, other: TokenRow) -> None:
    made = _with_answer_of(row, other)
    assert len(made.input_ids) == len(made.trained) <= max(len(row.input_ids), len(other.input_ids))
    assert made.trained_tokens > 0
    assert made.input_ids[0] == row.input_ids[0]


# --- evaluation


@EACH_CASE
def test_held_out_examples_are_judged_as_one_step(tiny_model: Path, case: str) -> None:
    spec, examples = CASES[case]
    mine = network(load(tiny_model, **PERTURBED).train())
    step = whole_step(mine, spec, examples)
    found = evaluate(mine, make_objective(spec), examples)
    assert found.loss == pytest.approx(step.total.item(), rel=1e-9)
    assert found.accuracy == pytest.approx(step.hits.double().mean().item())
    assert found.perplexity == (pytest.approx(math.exp(found.loss)) if spec is SUPERVISED else None)
    assert mine.model.training


def test_accuracy_is_the_share_of_pairs_and_labels_told_right(tiny_model: Path) -> None:
    plain, mine = plain_model(tiny_model, **PERTURBED), network(load(tiny_model, **PERTURBED))
    pairs = [*PAIRS[:3], PreferencePair(PAIRS[3].rejected, PAIRS[3].chosen)]
    pair_ratio = log_ratios(plain, [document for pair in pairs for document in pair.documents])
    ranked = (pair_ratio[::2] > pair_ratio[1::2]).tolist()
    baseline = log_ratios(plain, mismatched(LABELLED)).mean().clamp(min=0)
    gains = (log_ratios(plain, [one.answer for one in LABELLED]) - baseline).tolist()
    told = [(gain > 0) is one.desirable for gain, one in zip(gains, LABELLED, strict=True)]
    cases: list[tuple[Objective, Sequence[TrainingExample], list[bool]]] = [(DPO, pairs, ranked), (KTO, LABELLED, told)]
    for spec, examples, right in cases:
        assert whole_step(mine, spec, examples).hits.tolist() == right
        assert evaluate(mine, make_objective(spec), examples).accuracy == pytest.approx(sum(right) / len(right))
        assert 0 < sum(right) < len(right)


@EACH_CASE
def test_held_out_documents_are_computed_one_at_a_time(tiny_model: Path, case: str) -> None:
    """In bfloat16, where a neighbour would move the loss; with dropout, which must be off."""
    spec, examples = CASES[case]
    model = load(tiny_model, dtype=torch.bfloat16, adapter=Lora(r=4, lora_dropout=0.5), perturb_b=0.3).train()
    mine, objective = network(model), make_objective(spec)
    share_of = objective.of_step(mine, examples, mine.evaluate)
    with torch.no_grad():
        alone = math.fsum(share_of([example]).total.item() for example in examples)
    assert evaluate(mine, objective, examples).loss == alone


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
def test_real_pairs_are_learned(
    tiny_model: Path, real_pairs: list[TrainingExample], spec: Objective, share: float
) -> None:
    assert len(real_pairs) == 8
    training = Training(batch_size=4, learning_rate=0.01, warmup_ratio=0.0)
    outcome, _ = run(load(tiny_model), real_pairs, training, steps=10, held_out=real_pairs, objective=spec)
    if isinstance(spec, Dpo):
        assert outcome.before.loss == pytest.approx(math.log(2), rel=1e-6)
    assert outcome.after.loss < share * outcome.before.loss
    assert outcome.after.accuracy >= 0.75
