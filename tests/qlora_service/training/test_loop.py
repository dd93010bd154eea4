"""Steps of the training loop: independent of the micro-batches, deterministic, reported, and under a control."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from qlora_service.errors import JobFailed
from qlora_service.models.adapters import trainable_parameters
from qlora_service.specs import Lora, Training
from qlora_service.training.checkpoint.state import TrainingState
from qlora_service.training.evaluation.row_losses import RowLosses
from qlora_service.training.loop import StepMetrics, Unattended
from qlora_service.training.network.micro_batch import TokenRow
from tests.network_reference import assert_close_gradients, make_norms_exact, plain_losses
from tests.tiny_training import (
    FLOAT64,
    NF4,
    TRAINING,
    Recorder,
    frozen_hash,
    gradients,
    load,
    network,
    rows,
    run,
    weights,
)

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
"""Some variants of every cut and path, for tests with wide bounds; the float64 test covers all with a narrow one"""


class GradientRecorder(Recorder):
    """An observer that also keeps the gradients of each step, as before clipping."""

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
    """Weights, gradients and losses of five steps of the tiny model."""

    def __init__(self, model: PeftModel, training: Training, **options: Any) -> None:
        recorder = GradientRecorder(model)
        run(model, rows(24), training, recorder=recorder, **options)
        self.weights, self.gradients = weights(model), recorder.gradients
        self.losses = [step.loss for step in recorder.steps]


@pytest.fixture(scope="module")
def float64(tiny_model: Path) -> Trained:
    """The reference: the whole step in one micro-batch, on the general path."""
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
def test_a_step_does_not_depend_on_its_micro_batches(tiny_model: Path, variant: str, float64: Trained) -> None:
    model = load(tiny_model, FLOAT64, torch.float64, perturb_b=0.05)
    trained = Trained(model, TRAINING, **VARIANTS[variant])
    for name, weight in trained.weights.items():
        assert (weight - float64.weights[name]).abs().max() <= 1e-9 * float64.weights[name].abs().max(), name
    assert trained.losses == pytest.approx(float64.losses, rel=1e-9)


@pytest.mark.parametrize("variant", FEWER)
def test_on_nf4_every_steps_gradients_stay_close(tiny_model: Path, variant: str, nf4: Trained) -> None:
    training = TRAINING.model_copy(update={"learning_rate": 2e-4})
    trained = Trained(load(tiny_model, NF4, perturb_b=0.05), training, **VARIANTS[variant])
    assert trained.losses == pytest.approx(nf4.losses, rel=1e-5)
    for gradient, expected in zip(trained.gradients, nf4.gradients, strict=True):
        assert_close_gradients(gradient, expected, 1e-4)


@pytest.mark.parametrize("variant", FEWER)
def test_in_bfloat16_the_loss_curve_stays_close(tiny_model: Path, variant: str, bfloat16: Trained) -> None:
    trained = Trained(load(tiny_model, NF4, torch.bfloat16, perturb_b=0.05), TRAINING, **VARIANTS[variant])
    assert trained.losses == pytest.approx(bfloat16.losses, rel=1e-2)


def test_loss_is_divided_by_the_trained_tokens_of_the_whole_step(tiny_model: Path) -> None:
    """One long and one short answer: a mean per micro-batch would give both the same weight."""
    long = TokenRow(1, list(range(3, 63)), [False] * 2 + [True] * 58)
    short = TokenRow(2, list(range(70, 80)), [False] * 8 + [True] * 2)
    total = float(network(load(tiny_model, FLOAT64)).losses([long, short]).nll.detach().sum())
    training = Training(batch_size=2, optim="adamw_torch")
    _, recorder = run(load(tiny_model, FLOAT64), [long, short], training, steps=1, micro_batch_tokens=1)
    assert recorder.steps[0].loss == pytest.approx(total / 60, rel=1e-6)
    assert recorder.steps[0].trained_tokens == 60


def test_the_steps_equal_those_of_a_plain_torch_loop(tiny_model: Path) -> None:
    """Clipping, schedule, betas, weight decay and the reset of gradients, against a loop written by hand."""
    training = Training(
        batch_size=4, learning_rate=1e-2, warmup_ratio=0.25, lr_scheduler_type="linear", max_grad_norm=0.05,
        weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9, optim="adamw_torch",
    )  # fmt: skip
    model, plain = (load(tiny_model, FLOAT64, torch.float64, perturb_b=0.05) for _ in range(2))
    plain.get_base_model().set_attn_implementation("sdpa")
    make_norms_exact(plain)
    _, recorder = run(model, rows(16), training, steps=4)
    parameters = trainable_parameters(plain.train())
    optimizer = torch.optim.AdamW(parameters, betas=(0.8, 0.9), weight_decay=0.1)
    for step, rate in enumerate([0.5e-2, 1e-2, 2e-2 / 3, 1e-2 / 3]):
        optimizer.zero_grad()
        loss = plain_losses(plain, rows(16)[4 * step : 4 * step + 4]).mean()
        loss.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in parameters))
        assert norm > 0.05  # otherwise nothing is clipped
        for parameter in parameters:
            parameter.grad *= 0.05 / (norm + 1e-6)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        metrics = recorder.steps[step]
        assert (metrics.loss, metrics.grad_norm) == pytest.approx((loss.item(), norm.item()), rel=1e-9)
        assert metrics.learning_rate == pytest.approx(rate)
    for weight, expected in zip(trainable_parameters(model), parameters, strict=True):
        assert (weight - expected).abs().max() <= 1e-9 * expected.abs().max()


# --- which weights change


def test_an_evaluation_does_not_change_later_gradients(tiny_model: Path) -> None:
    """On AVX512-BF16 CPUs bitsandbytes repacks NF4 weights in an evaluation, and gradients after it are wrong."""
    for fast in (True, False):
        net = network(load(tiny_model, dtype=torch.bfloat16, perturb_b=0.05).train(), fast=fast)
        net.losses(rows(4)).nll.sum().backward()
        before = gradients(net.model)
        net.model.zero_grad()
        net.evaluate(rows(4, seed=5))
        assert net.model.training
        net.losses(rows(4)).nll.sum().backward()
        for name, gradient in gradients(net.model).items():
            assert torch.equal(gradient, before[name]), name


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_every_lora_b_changes_and_no_weight_of_the_base_does(tiny_model: Path, fast: bool, checkpointing: bool) -> None:
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
    model = load(tiny_model, adapter=Lora(r=64))  # 64 x 64 elements: bitsandbytes keeps smaller state in 32 bits
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
    for parameter in trainable_parameters(model):
        parameter.register_hook(torch.zeros_like)
    with pytest.raises(JobFailed, match="no gradient reaches the adapter"):
        run(model, rows(8), TRAINING)


# --- determinism


def test_the_same_job_gives_the_same_bytes_with_dropout_and_noise(tiny_model: Path) -> None:
    adapter = Lora(r=4, lora_dropout=0.1)
    training = TRAINING.model_copy(update={"neftune_noise_alpha": 5.0})
    first, second = load(tiny_model, adapter=adapter), load(tiny_model, adapter=adapter)
    run(first, rows(16), training)
    torch.manual_seed(12345)
    run(second, rows(16), training)
    assert all(
        torch.equal(a, b) for a, b in zip(trainable_parameters(first), trainable_parameters(second), strict=True)
    )


@pytest.mark.parametrize(("dropout", "alpha"), [(0.5, None), (0.0, 20.0)], ids=["dropout", "noise"])
def test_masks_and_noise_follow_seed_and_step_and_nothing_else(
    tiny_model: Path, dropout: float, alpha: float | None
) -> None:
    """With a learning rate near zero, the same rows have the same loss only under the same masks and noise."""

    class Reseeding(Recorder):
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
    assert step_losses(0, Reseeding()) == first
    assert set(step_losses(1, Recorder())).isdisjoint(first)


# --- metrics


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


def test_the_loss_of_every_row_is_recorded_under_its_line(tiny_model: Path, tmp_path: Path) -> None:
    """The micro-batches hold the rows in another order than the step."""
    model, train_rows, row_losses = load(tiny_model), rows(8), RowLosses()
    expected = {row.line: float(network(model).evaluate([row]).nll.mean()) for row in train_rows}
    run(model, train_rows, TRAINING, steps=1, micro_batch_tokens=96, row_losses=row_losses)
    row_losses.write(tmp_path / "rows.jsonl")
    records = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {record["line"]: record["first_loss"] for record in records} == pytest.approx(expected, rel=1e-5)


def test_the_last_step_is_evaluated_at_any_interval(tiny_model: Path) -> None:
    outcome, recorder = run(load(tiny_model), rows(8), TRAINING, steps=5, evaluate_every=2)
    assert [evaluation.step for evaluation in recorder.evaluations] == [0, 2, 4, 5]
    losses = [evaluation.eval_loss for evaluation in recorder.evaluations]
    assert (outcome.before.loss, outcome.after.loss) == (losses[0], losses[-1])
    assert (outcome.steps, outcome.best_step, outcome.skipped_steps) == (5, 5, 0)
    assert outcome.before.loss != outcome.after.loss


# --- the control


class Scripted(Unattended):
    """A control that records its calls; checkpoints are due after the given steps."""

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


def test_control_is_checked_before_every_layer_of_every_micro_batch_and_held_out_document(tiny_model: Path) -> None:
    recorder = Recorder()
    control = Scripted(recorder, set())
    run(load(tiny_model), rows(8), TRAINING, steps=1, micro_batch_tokens=1, recorder=recorder, control=control)
    turn = ["check", "due?"]
    # Before each forward pass, before its two layers, and backward before the only layer whose input has a gradient.
    evaluation, step = turn + ["check"] * 4 * 3, turn + ["check"] * 8 * 4
    assert control.script == [*evaluation, *step, *evaluation, *turn, "save 1, measured 1"]
    model = load(tiny_model)
    run(model, rows(8), TRAINING, steps=1, control=control)
    calls = len(control.script)
    network(model).losses(rows(1))
    assert len(control.script) == calls  # no check after the training


def test_states_are_saved_when_due_and_at_the_end_and_none_twice(tiny_model: Path) -> None:
    def saves(due: set[int]) -> list[str]:
        recorder = Recorder()
        control = Scripted(recorder, due)
        run(load(tiny_model), rows(8), TRAINING, steps=3, evaluate_every=2, recorder=recorder, control=control)
        return [line for line in control.script if line.startswith("save")]

    assert saves(set()) == ["save 3, measured 3"]
    assert saves({1, 3}) == ["save 1, measured 0", "save 3, measured 2", "save 3, measured 3"]
    assert saves({2}) == ["save 2, measured 0", "save 2, measured 2", "save 3, measured 3"]
