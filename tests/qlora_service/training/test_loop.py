"""The step is a set of examples, however it is cut; evaluation changes nothing; trouble is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_service.errors import JobFailed
from qlora_service.jobs import FailureReason
from qlora_service.models.adapters import checkpoint_activations, trainable
from qlora_service.specs import Adapter, Training
from qlora_service.training.evaluation import mean_loss
from qlora_service.training.loop import StepMetrics
from qlora_service.training.micro_batch import TokenRow, collate, loss_sum
from tests.tiny_training import CPU, FLOAT64, Recorder, gradients, load, rows, run

TRAINING = Training(batch_size=8, learning_rate=1e-2, warmup_ratio=0.0, optim="adamw_torch")


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro_batch_tokens", [1, 96, 10_000])
def test_a_step_does_not_depend_on_how_it_is_cut(
    tiny_model: Path, micro_batch_tokens: int, checkpointing: bool
) -> None:
    reference = load(tiny_model, FLOAT64, torch.float64, perturb_b=0.05)
    run(reference, rows(24), TRAINING, micro_batch_tokens=10_000)
    model = load(tiny_model, FLOAT64, torch.float64, perturb_b=0.05)
    if checkpointing:
        assert checkpoint_activations(model)
        assert model.get_base_model().is_activation_checkpointing
    run(model, rows(24), TRAINING, micro_batch_tokens=micro_batch_tokens)
    expected = weights(reference)
    for name, weight in weights(model).items():
        assert (weight - expected[name]).abs().max() <= 1e-9 * expected[name].abs().max(), name


def test_loss_is_divided_by_the_trained_tokens_of_the_whole_step(tiny_model: Path) -> None:
    """One long and one short answer: averaging per micro-batch would weigh them the same."""
    long = TokenRow(1, list(range(3, 63)), [False] * 2 + [True] * 58)
    short = TokenRow(2, list(range(70, 80)), [False] * 8 + [True] * 2)
    model = load(tiny_model, FLOAT64)
    total = sum(float(loss_sum(model, collate([row], CPU)).detach()) for row in (long, short))
    training = Training(batch_size=2, optim="adamw_torch")
    _, recorder = run(load(tiny_model, FLOAT64), [long, short], training, steps=1, micro_batch_tokens=1)
    assert recorder.steps[0].loss == pytest.approx(total / 60, rel=1e-6)
    assert recorder.steps[0].trained_tokens == 60


def test_the_gradient_trap_evaluation_leaves_gradients_as_they_were(tiny_model: Path) -> None:
    """On AVX512-BF16 CPUs bitsandbytes repacks NF4 weights in an evaluation, and gradients after it are wrong."""
    model = load(tiny_model, dtype=torch.bfloat16, perturb_b=0.05).train()
    batch = collate(rows(4), CPU)
    loss_sum(model, batch).backward()
    before = gradients(model)
    model.zero_grad()
    mean_loss(model, rows(4, seed=5), CPU)
    assert model.training
    loss_sum(model, batch).backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, before[name]), name


def test_every_lora_b_moves_and_nothing_of_the_base_does(tiny_model: Path) -> None:
    model = load(tiny_model, dtype=torch.bfloat16)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    run(model, rows(24), TRAINING, steps=2)
    moved = [bool(p.abs().max() > 0) for name, p in model.named_parameters() if "lora_B" in name]
    assert len(moved) == 14
    assert all(moved)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, frozen[name]), name


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit", "adamw_torch"])
def test_the_loss_falls(tiny_model: Path, optim: str) -> None:
    training = Training(batch_size=8, learning_rate=1e-2, optim=optim)
    train_rows = rows(8)
    model = load(tiny_model, adapter=Adapter(r=64))  # 64 x 64 elements: bitsandbytes keeps smaller states in 32 bits
    losses, recorder = run(model, train_rows, training, steps=40, held_out=train_rows, evaluate_every=8)
    assert losses.after < 0.9 * losses.before
    assert [evaluation.step for evaluation in recorder.evaluations] == [0, 8, 16, 24, 32, 40]
    assert losses.after == recorder.evaluations[-1].eval_loss


def test_the_same_job_gives_the_same_bytes_with_dropout(tiny_model: Path) -> None:
    adapter = Adapter(r=4, lora_dropout=0.1)
    first, second = load(tiny_model, adapter=adapter), load(tiny_model, adapter=adapter)
    run(first, rows(16), TRAINING)
    torch.manual_seed(12345)
    run(second, rows(16), TRAINING)
    assert all(torch.equal(a, b) for a, b in zip(trainable(first), trainable(second), strict=True))


def test_a_loss_that_is_not_finite_names_the_step_and_its_lines(tiny_model: Path) -> None:
    model = load(tiny_model)

    class Poisoner(Recorder):
        def on_step(self, metrics: StepMetrics) -> None:
            super().on_step(metrics)
            if metrics.step == 2:
                trainable(model)[0].data.fill_(float("nan"))

    with pytest.raises(JobFailed, match="step 3") as failure:
        run(model, rows(24), TRAINING, recorder=Poisoner())
    assert failure.value.details["reason"] == FailureReason.NOT_FINITE
    assert failure.value.details["lines"] == [row.line for row in rows(24)[16:24]]


def test_metrics_count_tokens(tiny_model: Path) -> None:
    train_rows = rows(8)
    _, recorder = run(load(tiny_model), train_rows, TRAINING, steps=1)
    metrics = recorder.steps[0]
    assert metrics.tokens == sum(len(row.input_ids) for row in train_rows)
    assert metrics.trained_tokens == sum(row.trained_tokens for row in train_rows)
    assert metrics.step == 1
    assert metrics.grad_norm > 0
    assert metrics.peak_memory_bytes > 0


def test_a_held_out_loss_that_is_not_finite_is_called_that(tiny_model: Path) -> None:
    model = load(tiny_model)

    class Poisoner(Recorder):
        def on_step(self, metrics: StepMetrics) -> None:
            trainable(model)[0].data.fill_(float("inf"))

    with pytest.raises(JobFailed, match="held-out loss after step 1") as failure:
        run(model, rows(24), TRAINING, steps=1, recorder=Poisoner())
    assert failure.value.details["reason"] == FailureReason.NOT_FINITE


def test_adapter_weights_that_no_gradient_reaches_are_named(tiny_model: Path) -> None:
    model = load(tiny_model)
    model.register_parameter("lora_B_unused", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(JobFailed, match="lora_B_unused"):
        run(model, rows(24), TRAINING, steps=1)


def test_the_steps_are_those_of_a_plain_torch_loop(tiny_model: Path) -> None:
    """Clipping, schedule, betas, decay and gradients that start at zero, against a loop written out by hand."""
    training = Training(
        batch_size=4, learning_rate=1e-2, warmup_ratio=0.25, lr_scheduler_type="linear", max_grad_norm=0.05,
        weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9, optim="adamw_torch",
    )  # fmt: skip
    model, plain = (load(tiny_model, FLOAT64, torch.float64, perturb_b=0.05) for _ in range(2))
    _, recorder = run(model, rows(16), training, steps=4)
    parameters = trainable(plain.train())
    optimizer = torch.optim.AdamW(parameters, betas=(0.8, 0.9), weight_decay=0.1)
    for step, rate in enumerate([0.5e-2, 1e-2, 2e-2 / 3, 1e-2 / 3]):
        batch = rows(16)[4 * step : 4 * step + 4]
        optimizer.zero_grad()
        loss = loss_sum(plain, collate(batch, CPU)) / sum(row.trained_tokens for row in batch)
        loss.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in parameters))
        assert norm > 0.05  # else nothing is clipped
        for parameter in parameters:
            parameter.grad *= 0.05 / (norm + 1e-6)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        metrics = recorder.steps[step]
        assert (metrics.loss, metrics.grad_norm) == pytest.approx((loss.item(), norm.item()), rel=1e-5)
        assert metrics.learning_rate == pytest.approx(rate)
    for mine, theirs in zip(trainable(model), parameters, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_dropout_masks_follow_seed_and_step_and_nothing_else(tiny_model: Path) -> None:
    """With hardly any learning rate, the same rows lose the same only under the same masks."""

    class Disturber(Recorder):
        def on_step(self, metrics: StepMetrics) -> None:
            super().on_step(metrics)
            torch.manual_seed(99)

    def step_losses(seed: int, recorder: Recorder) -> list[float]:
        training = Training(batch_size=4, learning_rate=1e-12, seed=seed, optim="adamw_torch")
        model = load(tiny_model, adapter=Adapter(r=4, lora_dropout=0.5), perturb_b=0.05).eval()
        run(model, rows(4), training, steps=3, recorder=recorder)
        return [step.loss for step in recorder.steps]

    first = step_losses(0, Recorder())
    assert len(set(first)) == 3
    assert step_losses(0, Disturber()) == first
    assert set(step_losses(1, Recorder())).isdisjoint(first)


def test_the_last_step_is_evaluated_whatever_the_interval(tiny_model: Path) -> None:
    training = Training(batch_size=8, optim="adamw_torch")
    losses, recorder = run(load(tiny_model), rows(8), training, steps=5, evaluate_every=2)
    assert [evaluation.step for evaluation in recorder.evaluations] == [0, 2, 4, 5]
    assert (losses.before, losses.after) == (recorder.evaluations[0].eval_loss, recorder.evaluations[-1].eval_loss)
    assert losses.before != losses.after


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(tiny_model: Path) -> None:
    model = load(tiny_model)
    before = [p.detach().clone() for p in trainable(model)]
    trainable(model)[1].register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(JobFailed, match="step 1") as failure:
        run(model, rows(8), Training(batch_size=8, optim="adamw_torch"))
    assert failure.value.details["reason"] == FailureReason.NOT_FINITE
    assert all(torch.equal(p, old) for p, old in zip(trainable(model), before, strict=True))


def test_an_adapter_without_a_gradient_is_an_error(tiny_model: Path) -> None:
    model = load(tiny_model)
    for parameter in trainable(model):
        parameter.register_hook(torch.zeros_like)
    with pytest.raises(JobFailed, match="no gradient reaches the adapter"):
        run(model, rows(8), Training(batch_size=8, optim="adamw_torch"))
