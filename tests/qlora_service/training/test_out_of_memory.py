"""Out of memory: the same step in smaller micro-batches, then with gradient checkpointing, then a typed failure."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_service.data.batching import pack
from qlora_service.domain.jobs import FailureReason
from qlora_service.errors import JobFailed
from qlora_service.specs import Adapter, Kto, Lora, PrefixTuning, Supervised, Training
from qlora_service.training.checkpoint.checkpoints import Checkpoints
from qlora_service.training.device import is_out_of_memory
from qlora_service.training.evaluation.held_out import trainable_copies
from qlora_service.training.evaluation.row_losses import RowLosses
from qlora_service.training.loop import Interrupted, Workload, train
from qlora_service.training.network.micro_batch import LabeledRow, TokenRow
from qlora_service.training.network.network import Network
from qlora_service.training.objectives import evaluate, make_objective
from tests.tiny_training import FLOAT64, NF4, CheckpointingControl, Recorder, load, network, rows

TRAINING = Training(batch_size=8, learning_rate=1e-2, warmup_ratio=0.0, optim="adamw_torch", micro_batch_tokens=10_000)
ROWS = rows(24)
CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate"


def cuda_error() -> RuntimeError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def cpu_error() -> RuntimeError:
    return RuntimeError(CPU_MESSAGE)


@dataclass
class SmallDevice:
    """A network whose training forward passes run out of memory if `is_too_large(documents, network)`."""

    network: Network
    is_too_large: Callable[[Sequence[TokenRow], Network], bool]
    error: Callable[[], Exception] = cuda_error
    tokens: list[int] = field(default_factory=list)
    """Tokens of each attempted forward pass in training"""

    def __post_init__(self) -> None:
        losses = self.network.losses

        def limited(documents: Sequence[TokenRow], **options: Any) -> Any:
            if torch.is_grad_enabled():
                self.tokens.append(sum(len(document.input_ids) for document in documents))
                result = losses(documents, **options)  # its activations exist when memory runs out
                if self.is_too_large(documents, self.network):
                    raise self.error()
                return result
            return losses(documents, **options)

        self.network.losses = limited  # type: ignore[method-assign]


def over(tokens: int) -> Callable[[Sequence[TokenRow], Network], bool]:
    return lambda documents, _: sum(len(document.input_ids) for document in documents) > tokens


def float64_network(tiny_model: Path) -> Network:
    return network(load(tiny_model, FLOAT64, torch.float64, perturb_b=0.05))


def train_network(
    net: Network, tmp_path: Path, steps: int = 3, training: Training = TRAINING, **options: Any
) -> tuple[dict[str, torch.Tensor], CheckpointingControl]:
    recorder = Recorder()
    control = options.pop("control", None) or CheckpointingControl(Checkpoints(tmp_path, 1), recorder)
    examples = options.pop("examples", ROWS)
    size = training.batch_size
    train(
        net,
        make_objective(options.pop("objective", Supervised())),
        Workload(
            lambda step: examples[step * size : (step + 1) * size],
            options.pop("held_out", rows(2, seed=99)),
            total_steps=steps,
            evaluate_every=1000,
        ),
        training,
        recorder,
        RowLosses(),
        control=control,
        **options,
    )
    return trainable_copies(net.model), control


def assert_close(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, weight in expected.items():
        assert (weights[name] - weight).abs().max() <= 1e-9 * weight.abs().max(), name


@pytest.mark.parametrize("error", [cuda_error, cpu_error])
def test_the_step_is_repeated_in_smaller_micro_batches_with_the_same_result(
    tiny_model: Path, tmp_path: Path, error: Callable[[], Exception]
) -> None:
    expected, _ = train_network(float64_network(tiny_model), tmp_path / "whole")
    device = SmallDevice(float64_network(tiny_model), over(150), error)
    weights, control = train_network(device.network, tmp_path / "small")
    assert_close(weights, expected)
    changes = control.changes
    assert {(change["step"], change["what"], change["why"]) for change in changes} == {
        (1, "micro_batch_tokens", str(error()))
    }
    assert changes[0]["from"] == 10_000
    assert [change["to"] for change in changes[:-1]] == [change["from"] for change in changes[1:]]
    assert 75 <= changes[-1]["to"] <= 150
    # Sizes that give the same micro-batches are not tried: every failure has other micro-batches.
    failed = [tokens for tokens in device.tokens if tokens > 150]
    assert len(failed) == len(changes) == len(set(failed))


def test_a_failure_in_the_third_micro_batch_repeats_the_step(tiny_model: Path, tmp_path: Path) -> None:
    """Gradients of the first two are dropped, not accumulated twice."""
    training = TRAINING.model_copy(update={"micro_batch_tokens": 96})
    expected, _ = train_network(float64_network(tiny_model), tmp_path / "whole", training=training)
    calls: list[int] = []

    def third_of_the_second_step(documents: Sequence[TokenRow], _: Network) -> bool:
        calls.append(1)
        return len(calls) == len(pack([len(row.input_ids) for row in ROWS[:8]], 96)) + 3

    net = SmallDevice(float64_network(tiny_model), third_of_the_second_step).network
    weights, control = train_network(net, tmp_path / "small", training=training)
    assert_close(weights, expected)
    assert [(change["step"], change["from"], change["to"]) for change in control.changes] == [(2, 96, 48)]


def test_gradient_checkpointing_follows_single_example_micro_batches(tiny_model: Path, tmp_path: Path) -> None:
    expected, _ = train_network(float64_network(tiny_model), tmp_path / "whole", steps=1)
    device = SmallDevice(
        float64_network(tiny_model), lambda documents, net: len(documents) > 1 or not net.checkpointing
    )
    weights, control = train_network(device.network, tmp_path / "small", steps=1)
    assert_close(weights, expected)
    assert device.network.checkpointing
    changed = [change["what"] for change in control.changes]
    assert changed == ["micro_batch_tokens"] * (len(changed) - 1) + ["gradient_checkpointing"]
    assert (control.changes[-1]["from"], control.changes[-1]["to"]) == (False, True)
    longest = max(len(row.input_ids) for row in ROWS[:8])
    assert sorted(set(device.tokens))[-1] > longest
    assert len([tokens for tokens in device.tokens if tokens == longest]) >= 2


PREFIX = PrefixTuning(method="prefix_tuning", num_virtual_tokens=4)


@pytest.mark.parametrize("adapter", [Lora(r=4), PREFIX], ids=["recomputing", "cannot recompute"])
def test_an_example_that_does_not_fit_is_named(tiny_model: Path, tmp_path: Path, adapter: Adapter) -> None:
    longest = max(ROWS[:8], key=lambda row: len(row.input_ids))
    net = network(load(tiny_model, NF4, adapter=adapter), "alone" if adapter is PREFIX else "per_document")
    control = CheckpointingControl(Checkpoints(tmp_path, 1), Recorder())
    device = SmallDevice(net, over(len(longest.input_ids) - 1))
    with pytest.raises(JobFailed) as failure:
        train_network(device.network, tmp_path, control=control)
    details = failure.value.details
    assert details["reason"] == FailureReason.OUT_OF_MEMORY
    assert (details["step"], details["line"], details["tokens"]) == (1, longest.line, len(longest.input_ids))
    assert f"line {longest.line}, has {len(longest.input_ids)} tokens" in failure.value.message
    assert "training.max_seq_len_tokens" in failure.value.message
    recomputed = "gradient_checkpointing" in {change["what"] for change in control.changes}
    assert recomputed == (adapter is not PREFIX) == ("gradient checkpointing" in failure.value.message)
    assert control.saves == 0


@pytest.mark.parametrize("fails", [1, 2])
@pytest.mark.parametrize("error", [cuda_error, cpu_error])
def test_a_held_out_row_that_does_not_fit_is_retried_and_named(
    tiny_model: Path, fails: int, error: Callable[[], Exception]
) -> None:
    net = network(load(tiny_model))
    evaluate_documents, failed = net.evaluate, []

    def limited(documents: Sequence[TokenRow], **options: Any) -> Any:
        if documents[0].line == ROWS[3].line and len(failed) < fails:
            failed.append(documents[0])
            raise error()
        return evaluate_documents(documents, **options)

    expected = evaluate(net, make_objective(Supervised()), ROWS[:5])
    net.evaluate = limited  # type: ignore[method-assign]
    if fails == 1:
        assert evaluate(net, make_objective(Supervised()), ROWS[:5]) == expected
        return
    with pytest.raises(
        JobFailed, match=f"the row of line {ROWS[3].line} has {len(ROWS[3].input_ids)} tokens"
    ) as caught:
        evaluate(net, make_objective(Supervised()), ROWS[:5])
    assert caught.value.details["reason"] == FailureReason.OUT_OF_MEMORY


def test_losses_that_the_objective_computes_once_per_step_are_repeated_too(tiny_model: Path, tmp_path: Path) -> None:
    examples = [LabeledRow(row, row.line % 2 == 0) for row in ROWS]
    kto = {"examples": examples, "objective": Kto(type="kto"), "held_out": examples[:2]}
    expected, _ = train_network(float64_network(tiny_model), tmp_path / "whole", **kto)
    net, failed = float64_network(tiny_model), []
    evaluate = net.evaluate

    def failing_once(documents: Sequence[TokenRow], **options: Any) -> Any:
        if len(documents) == 8 and not failed:
            failed.append(True)
            raise cuda_error()
        return evaluate(documents, **options)

    net.evaluate = failing_once  # type: ignore[method-assign]
    weights, control = train_network(net, tmp_path / "small", **kto)
    assert_close(weights, expected)
    assert len(control.changes) == 1


def test_the_change_persists_and_is_part_of_the_state(tiny_model: Path, tmp_path: Path) -> None:
    def limited() -> SmallDevice:
        return SmallDevice(
            network(load(tiny_model, adapter=Lora(r=4, lora_dropout=0.1))),
            lambda documents, net: over(150)(documents, net) or not net.checkpointing,
        )

    expected, uninterrupted = train_network(limited().network, tmp_path / "whole")
    assert {change["step"] for change in uninterrupted.changes} == {1}
    control = CheckpointingControl(Checkpoints(tmp_path / "stopped", 1), Recorder(), at_check=uninterrupted.checks - 10)
    with pytest.raises(Interrupted):
        train_network(limited().network, tmp_path, control=control)
    latest = Checkpoints(tmp_path / "stopped", 2).latest()
    assert latest is not None
    assert 0 < latest[0].step < 3
    assert (latest[0].micro_batch_tokens, latest[0].gradient_checkpointing) == (uninterrupted.changes[-2]["to"], True)
    weights, resumed = train_network(limited().network, tmp_path / "resumed", start=latest[0])
    assert resumed.changes == []
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


def test_a_change_is_saved_although_its_step_was_not_completed(tiny_model: Path, tmp_path: Path) -> None:
    class StoppedByTheChange(CheckpointingControl):
        def check(self) -> None:
            if self.changes:
                raise Interrupted("enough")

    control = StoppedByTheChange(Checkpoints(tmp_path, 1), Recorder())
    control.is_due = True
    # The first step fits, the second does not: by then states are saved before and after the first evaluation, and
    # after the first step.
    device = SmallDevice(
        network(load(tiny_model)), lambda documents, net: control.saves == 3 and over(150)(documents, net)
    )
    with pytest.raises(Interrupted):
        train_network(device.network, tmp_path, control=control)
    (change,) = control.changes
    latest = Checkpoints(tmp_path, 2).latest()
    assert latest is not None
    assert (latest[0].step, latest[0].micro_batch_tokens) == (1, change["to"])


def test_a_repeated_step_draws_the_masks_of_a_step_with_small_micro_batches(tiny_model: Path, tmp_path: Path) -> None:
    """The attempt after a killed one starts with its plan, and has to end with the same bytes."""

    def with_dropout() -> Network:
        return network(load(tiny_model, adapter=Lora(r=4, lora_dropout=0.1)))

    weights, control = train_network(SmallDevice(with_dropout(), over(150)).network, tmp_path / "repeated", steps=1)
    training = TRAINING.model_copy(update={"micro_batch_tokens": control.changes[-1]["to"]})
    expected, direct = train_network(with_dropout(), tmp_path / "direct", steps=1, training=training)
    assert direct.changes == []
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


def test_a_failed_pass_leaves_nothing_in_memory(tiny_model: Path, tmp_path: Path) -> None:
    """Otherwise its traceback holds the activations, and the next try has no more memory than the last."""
    alive: list[int] = []
    results: list[weakref.ref[torch.Tensor]] = []
    net = float64_network(tiny_model)
    losses = net.losses

    def limited(documents: Sequence[TokenRow], **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return losses(documents, **options)
        gc.disable()
        alive.append(sum(reference() is not None for reference in results))
        result = losses(documents, **options)
        results.append(weakref.ref(result.nll))
        if len(results) < 3:
            raise cuda_error()
        return result

    net.losses = limited  # type: ignore[method-assign]
    try:
        train_network(net, tmp_path, steps=1)
    finally:
        gc.enable()
    assert alive[:3] == [0, 0, 0]


def test_other_errors_are_not_treated_as_out_of_memory(tiny_model: Path, tmp_path: Path) -> None:
    device = SmallDevice(float64_network(tiny_model), over(0), lambda: RuntimeError("mat1 and mat2 shapes"))
    with pytest.raises(RuntimeError, match="mat1"):
        train_network(device.network, tmp_path)
    assert len(device.tokens) == 1
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(OSError("out of memory"))


def test_an_out_of_memory_error_of_torch_on_a_cpu_is_recognized() -> None:
    with pytest.raises(RuntimeError) as failure:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(failure.value)
