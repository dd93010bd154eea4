"""The step is a set of examples, however it is cut; trouble is named; the adapter asked for is the one that is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from qlora_service.domain.jobs import FailureReason
from qlora_service.errors import JobFailed
from qlora_service.models.adapters import trainable
from qlora_service.specs import Lora, Training
from qlora_service.training.checkpoint.state import TrainingState
from qlora_service.training.evaluation.row_losses import RowLosses
from qlora_service.training.loop import Outcome, StepMetrics, Unattended
from qlora_service.training.network.micro_batch import TokenRow
from qlora_service.training.optimizer import make_optimizer, optimizer_state
from tests.judges import assert_close_gradients, make_norms_exact, plain_losses
from tests.tiny_training import FLOAT64, NF4, Recorder, gradients, load, network, rows, run

TRAINING = Training(batch_size=8, learning_rate=1e-2, warmup_ratio=0.0, optim="adamw_torch")
CUTS: dict[str, dict[str, Any]] = {
    "one by one": {"micro_batch_tokens": 1},
    "two or three": {"micro_batch_tokens": 96},
    "all at once": {"micro_batch_tokens": 10_000},
    "each document alone": {"micro_batch_tokens": 10_000, "isolation": "alone"},
}
VARIANTS = {
    f"{cut}, {'llama' if fast else 'general'}{', recomputed' if checkpointing else ''}": options
    | {"fast": fast, "checkpointing": checkpointing}
    for cut, options in CUTS.items()
    for fast in (True, False)
    for checkpointing in (False, True)
}


FEWER = [*[name for name in VARIANTS if not name.startswith("two or three")][::3], "two or three, llama, recomputed"]
"""Of every cut and path some: where bounds are wide, the float64 test is the sharper one."""


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class GradientRecorder(Recorder):
    """Also keeps each step's gradients, as they were before clipping."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.gradients: list[dict[str, torch.Tensor]] = []
        self._latest: dict[str, torch.Tensor] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p, name=name: self._keep(name, p))

    def _keep(self, name: str, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self._latest[name] = parameter.grad.clone()

    def on_step(self, metrics: StepMetrics) -> None:
        super().on_step(metrics)
        self.gradients.append(self._latest)
        self._latest = {}


class Trained:
    """Five steps of the tiny model."""

    def __init__(self, model: PeftModel, training: Training, **options: Any) -> None:
        recorder = GradientRecorder(model)
        run(model, rows(24), training, recorder=recorder, **options)
        self.weights, self.gradients = weights(model), recorder.gradients
        self.losses = [step.loss for step in recorder.steps]


@pytest.fixture(scope="module")
def float64(tiny_model: Path) -> Trained:
    """All at once, by transformers' own modules where there is a choice."""
    return Trained(
        load(tiny_model, FLOAT64, torch.float64, perturb_b=0.05), TRAINING, micro_batch_tokens=10_000, fast=False
    )


@pytest.fixture(scope="module")
def nf4(tiny_model: Path) -> Trained:
    training = TRAINING.model_copy(update={"learning_rate": 2e-4})
    return Trained(load(tiny_model, NF4, perturb_b=0.05), training, micro_batch_tokens=10_000, fast=False)


@pytest.fixture(scope="module")
def bfloat16(tiny_model: Path) -> Trained:
    model = load(tiny_model, NF4, torch.bfloat16, perturb_b=0.05)
    return Trained(model, TRAINING, micro_batch_tokens=10_000, fast=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_does_not_depend_on_how_it_is_cut(tiny_model: Path, variant: str, float64: Trained) -> None:
    model = load(tiny_model, FLOAT64, torch.float64, perturb_b=0.05)
    found = Trained(model, TRAINING, **VARIANTS[variant])
    for name, weight in found.weights.items():
        assert (weight - float64.weights[name]).abs().max() <= 1e-9 * float64.weights[name].abs().max(), name
    assert found.losses == pytest.approx(float64.losses, rel=1e-9)


@pytest.mark.parametrize("variant", FEWER)
def test_on_nf4_every_steps_gradients_stay_close(tiny_model: Path, variant: str, nf4: Trained) -> None:
    training = TRAINING.model_copy(update={"learning_rate": 2e-4})
    found = Trained(load(tiny_model, NF4, perturb_b=0.05), training, **VARIANTS[variant])
    assert found.losses == pytest.approx(nf4.losses, rel=1e-5)
    for mine, expected in zip(found.gradients, nf4.gradients, strict=True):
        assert_close_gradients(mine, expected, 1e-4)


@pytest.mark.parametrize("variant", FEWER)
def test_in_bfloat16_the_loss_curve_stays_close(tiny_model: Path, variant: str, bfloat16: Trained) -> None:
    found = Trained(load(tiny_model, NF4, torch.bfloat16, perturb_b=0.05), TRAINING, **VARIANTS[variant])
    assert found.losses == pytest.approx(bfloat16.losses, rel=1e-2)


def test_loss_is_divided_by_the_trained_tokens_of_the_whole_step(tiny_model: Path) -> None:
    """One long and one short answer: averaging per micro-batch would weigh them the same."""
    long = TokenRow(1, list(range(3, 63)), [False] * 2 + [True] * 58)
    short = TokenRow(2, list(range(70, 80)), [False] * 8 + [True] * 2)
    total = float(network(load(tiny_model, FLOAT64)).losses([long, short]).nll.detach().sum())
    training = Training(batch_size=2, optim="adamw_torch")
    _, recorder = run(load(tiny_model, FLOAT64), [long, short], training, steps=1, micro_batch_tokens=1)
    assert recorder.steps[0].loss == pytest.approx(total / 60, rel=1e-6)
    assert recorder.steps[0].trained_tokens == 60


def test_the_steps_are_those_of_a_plain_torch_loop(tiny_model: Path) -> None:
    """Clipping, schedule, betas, decay and gradients that start at zero, against a loop written out by hand."""
    training = Training(
        batch_size=4, learning_rate=1e-2, warmup_ratio=0.25, lr_scheduler_type="linear", max_grad_norm=0.05,
        weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9, optim="adamw_torch",
    )  # fmt: skip
    model, plain = (load(tiny_model, FLOAT64, torch.float64, perturb_b=0.05) for _ in range(2))
    plain.get_base_model().set_attn_implementation("sdpa")
    make_norms_exact(plain)
    _, recorder = run(model, rows(16), training, steps=4)
    parameters = trainable(plain.train())
    optimizer = torch.optim.AdamW(parameters, betas=(0.8, 0.9), weight_decay=0.1)
    for step, rate in enumerate([0.5e-2, 1e-2, 2e-2 / 3, 1e-2 / 3]):
        optimizer.zero_grad()
        loss = plain_losses(plain, rows(16)[4 * step : 4 * step + 4]).mean()
        loss.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in parameters))
        assert norm > 0.05  # else nothing is clipped
        for parameter in parameters:
            parameter.grad *= 0.05 / (norm + 1e-6)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        metrics = recorder.steps[step]
        assert (metrics.loss, metrics.grad_norm) == pytest.approx((loss.item(), norm.item()), rel=1e-9)
        assert metrics.learning_rate == pytest.approx(rate)
    for mine, theirs in zip(trainable(model), parameters, strict=True):
        assert (mine - theirs).abs().max() <= 1e-9 * theirs.abs().max()


# --- what moves


def test_the_gradient_trap_evaluation_leaves_gradients_as_they_were(tiny_model: Path) -> None:
    """On AVX512-BF16 CPUs bitsandbytes repacks NF4 weights in an evaluation, and gradients after it are wrong."""
    for fast in (True, False):
        mine = network(load(tiny_model, dtype=torch.bfloat16, perturb_b=0.05).train(), fast=fast)
        mine.losses(rows(4)).nll.sum().backward()
        before = gradients(mine.model)
        mine.model.zero_grad()
        mine.evaluate(rows(4, seed=5))
        assert mine.model.training
        mine.losses(rows(4)).nll.sum().backward()
        for name, gradient in gradients(mine.model).items():
            assert torch.equal(gradient, before[name]), name


def frozen_hash(model: PeftModel) -> str:
    """Of every tensor that is not learned: weights, codes, scales, buffers."""
    learned = {parameter.data_ptr() for parameter in trainable(model)}
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.data_ptr() not in learned:
            digest.update(name.encode() + tensor.flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_every_lora_b_moves_and_nothing_of_the_base_does(tiny_model: Path, fast: bool, checkpointing: bool) -> None:
    model = load(tiny_model, dtype=torch.bfloat16)
    before = frozen_hash(model)
    run(model, rows(24), TRAINING, steps=2, fast=fast, checkpointing=checkpointing)
    moved = [bool(p.abs().max() > 0) for name, p in model.named_parameters() if "lora_B" in name]
    assert len(moved) == 14
    assert all(moved)
    assert frozen_hash(model) == before


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit", "adamw_torch"])
def test_the_loss_falls(tiny_model: Path, optim: str) -> None:
    training = Training(batch_size=8, learning_rate=1e-2, optim=optim)
    train_rows = rows(8)
    model = load(tiny_model, adapter=Lora(r=64))  # 64 x 64 elements: bitsandbytes keeps smaller states in 32 bits
    outcome, recorder = run(model, train_rows, training, steps=24, held_out=train_rows, evaluate_every=8)
    assert outcome.after.loss < 0.9 * outcome.before.loss
    assert [evaluation.step for evaluation in recorder.evaluations] == [0, 8, 16, 24]
    assert outcome.after.loss == recorder.evaluations[-1].eval_loss


def test_adapter_weights_that_no_gradient_reaches_are_named(tiny_model: Path) -> None:
    model = load(tiny_model)
    model.register_parameter("lora_B_unused", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(JobFailed, match="lora_B_unused"):
        run(model, rows(24), TRAINING, steps=1)


def test_an_adapter_without_a_gradient_is_an_error(tiny_model: Path) -> None:
    model = load(tiny_model)
    for parameter in trainable(model):
        parameter.register_hook(torch.zeros_like)
    with pytest.raises(JobFailed, match="no gradient reaches the adapter"):
        run(model, rows(8), TRAINING)


# --- chance


def test_the_same_job_gives_the_same_bytes_with_dropout_and_noise(tiny_model: Path) -> None:
    adapter = Lora(r=4, lora_dropout=0.1)
    training = TRAINING.model_copy(update={"neftune_noise_alpha": 5.0})
    first, second = load(tiny_model, adapter=adapter), load(tiny_model, adapter=adapter)
    run(first, rows(16), training)
    torch.manual_seed(12345)
    run(second, rows(16), training)
    assert all(torch.equal(a, b) for a, b in zip(trainable(first), trainable(second), strict=True))


@pytest.mark.parametrize(("dropout", "alpha"), [(0.5, None), (0.0, 20.0)], ids=["dropout", "noise"])
def test_masks_and_noise_follow_seed_and_step_and_nothing_else(
    tiny_model: Path, dropout: float, alpha: float | None
) -> None:
    """With hardly any learning rate, the same rows lose the same only under the same masks."""

    class Disturber(Recorder):
        def on_step(self, metrics: StepMetrics) -> None:
            super().on_step(metrics)
            torch.manual_seed(99)

    def step_losses(seed: int, recorder: Recorder) -> list[float]:
        training = Training(
            batch_size=4, learning_rate=1e-12, seed=seed, optim="adamw_torch", neftune_noise_alpha=alpha
        )
        model = load(tiny_model, adapter=Lora(r=4, lora_dropout=dropout), perturb_b=0.05).eval()
        run(model, rows(4), training, steps=3, recorder=recorder)
        return [step.loss for step in recorder.steps]

    first = step_losses(0, Recorder())
    assert len(set(first)) == 3
    assert step_losses(0, Disturber()) == first
    assert set(step_losses(1, Recorder())).isdisjoint(first)


# --- what is told


def test_metrics_count_tokens(tiny_model: Path) -> None:
    train_rows = rows(8)
    _, recorder = run(load(tiny_model), train_rows, TRAINING, steps=1)
    metrics = recorder.steps[0]
    assert metrics.tokens == sum(len(row.input_ids) for row in train_rows)
    assert metrics.trained_tokens == sum(row.trained_tokens for row in train_rows)
    assert (metrics.step, metrics.skipped) == (1, False)
    assert metrics.grad_norm > 0
    assert metrics.tokens_per_second > 0
    assert metrics.peak_memory_bytes > 0


def test_every_rows_loss_is_told_by_its_line(tiny_model: Path, tmp_path: Path) -> None:
    """The cut puts the rows in another order than the step's."""
    model, train_rows, row_losses = load(tiny_model), rows(8), RowLosses()
    expected = {row.line: float(network(model).evaluate([row]).nll.mean()) for row in train_rows}
    run(model, train_rows, TRAINING, steps=1, micro_batch_tokens=96, row_losses=row_losses)
    row_losses.write(tmp_path / "rows.jsonl")
    records = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {record["line"]: record["first_loss"] for record in records} == pytest.approx(expected, rel=1e-5)


def test_the_last_step_is_evaluated_whatever_the_interval(tiny_model: Path) -> None:
    outcome, recorder = run(load(tiny_model), rows(8), TRAINING, steps=5, evaluate_every=2)
    assert [evaluation.step for evaluation in recorder.evaluations] == [0, 2, 4, 5]
    losses = [evaluation.eval_loss for evaluation in recorder.evaluations]
    assert (outcome.before.loss, outcome.after.loss) == (losses[0], losses[-1])
    assert (outcome.steps, outcome.best_step, outcome.skipped_steps) == (5, 5, 0)
    assert outcome.before.loss != outcome.after.loss


# --- who decides whether it goes on


class Scripted(Unattended):
    """A control that writes down what it is asked and given; checkpoints are due after the given steps."""

    def __init__(self, recorder: Recorder, due: set[int]) -> None:
        self.script: list[str] = []
        self._recorder, self._due = recorder, due

    def check(self) -> None:
        self.script.append("check")

    def checkpoint_is_due(self) -> bool:
        self.script.append("due?")
        return len(self._recorder.steps) in self._due

    def save(self, state: TrainingState) -> None:
        self.script.append(f"save {state.step}, measured {state.held_out.measured_step}")


def test_it_asks_before_every_layer_of_every_micro_batch_and_held_out_document(tiny_model: Path) -> None:
    recorder = Recorder()
    control = Scripted(recorder, set())
    run(load(tiny_model), rows(8), TRAINING, steps=1, micro_batch_tokens=1, recorder=recorder, control=control)
    turn = ["check", "due?"]
    # Before each forward pass, before both layers of it, and before the only layer whose input has a gradient.
    evaluation, step = turn + ["check"] * 4 * 3, turn + ["check"] * 8 * 4
    assert control.script == [*evaluation, *step, *evaluation, *turn, "save 1, measured 1"]
    model = load(tiny_model)
    run(model, rows(8), TRAINING, steps=1, control=control)
    asked = len(control.script)
    network(model).losses(rows(1))
    assert len(control.script) == asked  # no one is asked after the training


def test_states_are_saved_when_due_and_at_the_end_but_none_twice(tiny_model: Path) -> None:
    def saves(due: set[int]) -> list[str]:
        recorder = Recorder()
        control = Scripted(recorder, due)
        run(load(tiny_model), rows(8), TRAINING, steps=3, evaluate_every=2, recorder=recorder, control=control)
        return [line for line in control.script if line.startswith("save")]

    assert saves(set()) == ["save 3, measured 3"]
    assert saves({1, 3}) == ["save 1, measured 0", "save 3, measured 2", "save 3, measured 3"]
    assert saves({2}) == ["save 2, measured 0", "save 2, measured 2", "save 3, measured 3"]


# --- numbers that are not finite


def poisoning(model: PeftModel, steps: set[int], value: float = float("nan")) -> Recorder:
    """An observer under which the gradients of the given steps (from 1) are `value`; keeps the weights of each step."""

    class Poisoner(Recorder):
        def __init__(self) -> None:
            super().__init__()
            self.weights = [weights(model)]

        def on_step(self, metrics: StepMetrics) -> None:
            super().on_step(metrics)
            self.weights.append(weights(model))

    recorder = Poisoner()

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gradient, value) if len(recorder.steps) + 1 in steps else gradient

    trainable(model)[3].register_hook(poison)
    return recorder


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped_and_counted(tiny_model: Path, value: float) -> None:
    model = load(tiny_model)
    recorder: Any = poisoning(model, {2, 3, 5}, value)
    outcome, _ = run(model, rows(24), TRAINING, steps=6, recorder=recorder)
    assert [step.skipped for step in recorder.steps] == [False, True, True, False, True, False]
    assert outcome.skipped_steps == 3
    kept = [same(after, before) for before, after in zip(recorder.weights, recorder.weights[1:], strict=False)]
    assert kept == [False, True, True, False, True, False]


@pytest.mark.parametrize("optim", ["adamw_torch", "paged_adamw_32bit"])
def test_a_skipped_step_leaves_the_optimizer_as_it_was(
    tiny_model: Path, optim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a constant rate, skipping a step is the same as never having had it."""
    training = TRAINING.model_copy(update={"optim": optim})
    states = []

    def remembering(*arguments: Any) -> torch.optim.Optimizer:
        states.append(make_optimizer(*arguments))
        return states[-1]

    monkeypatch.setattr("qlora_service.training.optimizer.make_optimizer", remembering)
    monkeypatch.setattr("qlora_service.training.optimizer.release_optimizer", lambda optimizer: None)
    skipping, plain = load(tiny_model), load(tiny_model)
    train_rows = rows(24)
    run(skipping, train_rows, training, steps=3, recorder=poisoning(skipping, {2}))
    run(plain, train_rows[:8] + train_rows[16:], training, steps=2)
    assert same(weights(skipping), weights(plain))
    one, other = (optimizer_state(optimizer) for optimizer in states)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name][key]) for name, state in one.items() for key, value in state.items())


def failing(tiny_model: Path, prepare: Callable[[PeftModel], Recorder], training: Training = TRAINING) -> JobFailed:
    model = load(tiny_model)
    with pytest.raises(JobFailed) as failure:
        run(model, rows(40), training, steps=8, recorder=prepare(model))
    assert all(weight.isfinite().all() for weight in weights(model).values())
    return failure.value


def test_three_in_a_row_end_the_job_with_the_step_and_its_lines(tiny_model: Path) -> None:
    failure = failing(tiny_model, lambda model: poisoning(model, {1, 3, 4, 5}))
    assert failure.details["reason"] == FailureReason.NOT_FINITE
    assert failure.details["step"] == 5
    assert failure.details["lines"] == [row.line for row in rows(40)[32:40]]
    assert failure.message.startswith("step 5, and the 2 before it")
    assert "lines 33, 34" in failure.message


def test_a_job_that_fails_keeps_the_adapter_of_its_last_finite_step(tiny_model: Path) -> None:
    model = load(tiny_model)
    recorder: Any = poisoning(model, {3, 4, 5})
    with pytest.raises(JobFailed) as failure:
        run(model, rows(40), TRAINING, steps=8, recorder=recorder)
    assert same(weights(model), recorder.weights[2])
    outcome: Outcome | None = getattr(failure.value, "outcome", None)
    assert outcome is not None
    assert (outcome.steps, outcome.best_step, outcome.skipped_steps) == (2, 2, 3)
    measured = network(model).evaluate(rows(4, seed=99)).nll.mean()
    assert outcome.after.loss == pytest.approx(float(measured), rel=1e-6)


def test_a_job_without_a_finite_step_has_nothing_to_keep(tiny_model: Path) -> None:
    failure = failing(tiny_model, lambda model: poisoning(model, {1, 2, 3}))
    assert failure.details["step"] == 3
    assert getattr(failure, "outcome", None) is None


def test_a_learning_rate_that_blew_the_loss_up_is_named(tiny_model: Path) -> None:
    """What a rate that overshoots does: what was learned is lost again, then the loss is not finite."""
    training = TRAINING.model_copy(update={"learning_rate": 0.05})

    def prepare(model: PeftModel, overshoots: bool) -> Recorder:
        model.get_input_embeddings().weight.data *= 20  # tied to the head: losses start far above chance
        recorder = poisoning(model, {6, 7, 8})
        on_step = recorder.on_step

        def overshooting(metrics: StepMetrics) -> None:
            on_step(metrics)
            if overshoots and metrics.step == 4:
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.data.zero_()

        recorder.on_step = overshooting  # type: ignore[method-assign]
        return recorder

    failure = failing(tiny_model, lambda model: prepare(model, True), training)
    assert "learning rate of 0.05 makes it blow up" in failure.message
    assert "Lower training.learning_rate" in failure.message
    steady = failing(tiny_model, lambda model: prepare(model, False), training)
    assert "blow up" not in steady.message


def test_a_loss_that_is_not_finite_is_skipped_too(tiny_model: Path) -> None:
    """One row of the second step overflows on its way in."""
    model, overflowing = load(tiny_model), 501
    train_rows = rows(24)
    train_rows[10] = TokenRow(11, [overflowing, *train_rows[10].input_ids], [False, *train_rows[10].trained])
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output * float("inf") if overflowing in inputs[0] else output
    )
    outcome, recorder = run(model, train_rows, TRAINING, steps=3)
    assert [step.skipped for step in recorder.steps] == [False, True, False]
    assert recorder.steps[1].loss != recorder.steps[1].loss
    assert outcome.skipped_steps == 1


def test_a_held_out_loss_that_is_not_finite_is_called_that(tiny_model: Path) -> None:
    model = load(tiny_model)

    class Poisoner(Recorder):
        def on_step(self, metrics: StepMetrics) -> None:
            trainable(model)[0].data.fill_(float("inf"))

    with pytest.raises(JobFailed, match="held-out loss after step 1") as failure:
        run(model, rows(24), TRAINING, steps=1, recorder=Poisoner())
    assert failure.value.details["reason"] == FailureReason.NOT_FINITE


# --- the adapter that training ends with


def test_training_stops_when_the_held_out_loss_falls_no_more(tiny_model: Path) -> None:
    """Unrelated rows, a high rate: the held-out loss rises from some step on."""
    training = TRAINING.model_copy(update={"learning_rate": 0.05, "early_stopping_patience": 2})
    outcome, recorder = run(load(tiny_model), rows(8), training, steps=40, evaluate_every=1)
    losses = [evaluation.eval_loss for evaluation in recorder.evaluations]
    assert outcome.steps < 40
    assert len(recorder.steps) == outcome.steps
    best = losses.index(min(losses))
    assert len(losses) - 1 - best == 2
    assert min(losses[-2:]) >= losses[best]
    assert (outcome.best_step, outcome.after.loss) == (outcome.steps, losses[-1])


@pytest.mark.parametrize("patience", [None, 3])
def test_the_best_adapter_is_kept_exactly(tiny_model: Path, patience: int | None) -> None:
    training = TRAINING.model_copy(
        update={"learning_rate": 0.05, "load_best_model_at_end": True, "early_stopping_patience": patience}
    )
    model = load(tiny_model)
    recorder: Any = poisoning(model, set())
    outcome, _ = run(model, rows(8), training, steps=20, evaluate_every=1, recorder=recorder)
    losses = [evaluation.eval_loss for evaluation in recorder.evaluations]
    best = losses.index(min(losses))
    assert 0 < best < len(losses) - 1
    assert (outcome.best_step, outcome.after.loss) == (best, losses[best])
    assert same(weights(model), recorder.weights[best])
    assert float(network(model).evaluate(rows(4, seed=99)).nll.mean()) == pytest.approx(losses[best], rel=1e-6)


def test_without_being_asked_the_last_adapter_is_kept(tiny_model: Path) -> None:
    training = TRAINING.model_copy(update={"learning_rate": 0.02})
    model = load(tiny_model)
    recorder: Any = poisoning(model, set())
    outcome, _ = run(model, rows(8), training, steps=12, evaluate_every=1, recorder=recorder)
    assert outcome.best_step == 12
    assert same(weights(model), recorder.weights[12])
