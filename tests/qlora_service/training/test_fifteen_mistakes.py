"""Fifteen known mistakes of training engines: those of the training step (2, 3, 4, 5, 9, 14: test_mistakes_in_files).

Each test measures a property twice: it holds for the product, and fails with the mistake put in.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from transformers import CONFIG_MAPPING, BitsAndBytesConfig

from qlora_service.errors import JobFailed
from qlora_service.models.adapters import trainable_parameters
from qlora_service.models.base.quantize import load_base
from qlora_service.specs import Lora, Quantization, Training
from qlora_service.training import optimizer
from qlora_service.training.checkpoint.state import TrainingState
from qlora_service.training.loop import Unattended
from qlora_service.training.network import llama_layers
from qlora_service.training.network.micro_batch import MicroBatch, TokenRow, TrainingExample, collate
from qlora_service.training.network.network import Network
from qlora_service.training.objectives import ComputeLosses, ComputeShare, Share, SupervisedObjective
from qlora_service.training.sizes import HEAD_CHUNK
from qlora_service.training.step import StepGradients, StepLoss
from tests.network_reference import SMALL, LargestTensor, pair
from tests.tiny_training import CPU, FLOAT64, TRAINING, load, network, rows, run

Patch = pytest.MonkeyPatch


def adapter_after(tiny_model: Path, training: Training, steps: int = 2, **options: Any) -> list[torch.Tensor]:
    model = load(tiny_model, FLOAT64, torch.float64, perturb_b=0.05)
    run(model, rows(24), training, steps=steps, **options)
    return trainable_parameters(model)


def are_close(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return all((a - b).abs().max() <= 1e-9 * b.abs().max() for a, b in zip(one, other, strict=True))


def test_1_loss_averaged_per_micro_batch(tiny_model: Path, monkeypatch: Patch) -> None:
    """The mistake: the loss of a micro-batch is its own mean, and that of the step the mean of those."""

    def is_independent_of_micro_batches() -> bool:
        whole = adapter_after(tiny_model, TRAINING, micro_batch_tokens=10_000)
        return are_close(adapter_after(tiny_model, TRAINING, micro_batch_tokens=96), whole)

    assert is_independent_of_micro_batches()

    def averaging(
        self: SupervisedObjective, network: Network, examples: Sequence[TrainingExample], compute_losses: ComputeLosses
    ) -> ComputeShare:
        def share(micro_batch: Sequence[TrainingExample]) -> Share:
            documents = [document for example in micro_batch for document in example.documents]
            losses = compute_losses(documents)
            return Share(losses.nll.mean(), torch.zeros(len(micro_batch)), losses.hits)

        return share

    monkeypatch.setattr(SupervisedObjective, "prepare_step", averaging)
    assert not is_independent_of_micro_batches()


def test_6_packed_documents_see_each_other(tiny_model: Path, monkeypatch: Patch) -> None:
    """The mistake: one causal attention over all documents of the row."""

    def largest_leak(fast: bool) -> float:
        net = network(load(tiny_model, perturb_b=0.05), fast=fast)
        with torch.no_grad():
            packed = net.losses(rows(5)).nll
            alone = torch.cat([net.losses([row]).nll for row in rows(5)])
        return float((packed - alone).abs().max())

    assert max(largest_leak(True), largest_leak(False)) < 1e-5

    def as_one_document(documents: Sequence[TokenRow], device: torch.device) -> MicroBatch:
        batch = collate(documents, device)
        return replace(batch, lengths=(sum(batch.lengths),))

    monkeypatch.setattr("qlora_service.training.network.network.collate", as_one_document)
    assert min(largest_leak(True), largest_leak(False)) > 1e-3


def test_7_random_numbers_that_depend_on_what_ran_before(tiny_model: Path, monkeypatch: Patch) -> None:
    """The mistake: a resumed job fetches its batches, which draws random numbers, before it restores the generators.

    Right: masks and noise of a step depend on (seed, step) alone, so step 3 is the same after any other computation.
    """
    training = Training(batch_size=4, learning_rate=1e-2, optim="adamw_torch", neftune_noise_alpha=5.0)

    class Fetching(list[TokenRow]):
        """Rows that draw random numbers on every access."""

        def __getitem__(self, index: Any) -> Any:
            torch.rand(index + 1)
            return super().__getitem__(index)

    class AfterStep3(Unattended):
        """A control that keeps the state after the third step."""

        state: TrainingState | None = None

        def checkpoint_is_due(self) -> bool:
            return self.state is None or self.state.step < 3

        def save(self, state: TrainingState) -> None:
            if state.step <= 3:
                self.state = state

    def last_loss(train_rows: list[TokenRow], control: Unattended, start: TrainingState | None = None) -> float:
        """Loss of the last of four steps."""
        model = load(tiny_model, adapter=Lora(r=4, lora_dropout=0.5), perturb_b=0.05)
        torch.manual_seed(123)
        return run(model, train_rows, training, steps=4, control=control, start=start)[1].steps[-1].loss

    def uninterrupted_and_resumed() -> tuple[float, float]:
        control = AfterStep3()
        uninterrupted = last_loss(rows(4), control)
        assert control.state is not None
        assert control.state.step == 3
        return uninterrupted, last_loss(Fetching(rows(4)), Unattended(), control.state)

    uninterrupted, resumed = uninterrupted_and_resumed()
    assert resumed == uninterrupted
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    uninterrupted, resumed = uninterrupted_and_resumed()
    assert resumed != uninterrupted


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]], ids=["frozen head", "trained head"])
def test_8_evaluation_makes_full_logits(targets: Any, fast: bool) -> None:
    """The mistake: held-out rows go through the model's own forward, whose logits are (tokens, vocabulary)."""
    vocabulary, length = 8_000, 2 * HEAD_CHUNK
    config = CONFIG_MAPPING["llama"](**(SMALL | {"vocab_size": vocabulary}))
    net, _ = pair(config, Lora(r=4, target_modules=targets), fast=fast)
    (document,) = rows(1, low=length, high=length)
    document = replace(document, trained=[True] * length)

    def largest() -> int:
        with LargestTensor() as tensor:
            net.evaluate([document])
        return tensor.elements

    assert largest() <= HEAD_CHUNK * vocabulary
    net.paths = replace(net.paths, head="logits")
    assert largest() == (length - 1) * vocabulary


@pytest.mark.parametrize("fast", [True, False])
def test_10_recomputed_layers_without_gradients(tiny_model: Path, fast: bool, monkeypatch: Patch) -> None:
    """The mistake: reentrant checkpointing of layers whose input, a frozen embedding, has no gradient."""

    def moved() -> list[bool]:
        model = load(tiny_model, dtype=torch.bfloat16)
        run(model, rows(8), TRAINING, steps=2, checkpointing=True, fast=fast)
        return [bool(p.abs().max() > 0) for name, p in model.named_parameters() if "lora_B" in name]

    assert moved() == [True] * 14

    def reentrant(model: PeftModel) -> bool:
        base = model.get_base_model()
        base.activation_checkpointing_enable({"use_reentrant": True})
        base.disable_input_require_grads()
        return True

    recompute = llama_layers.checkpoint
    monkeypatch.setattr(llama_layers, "checkpoint", lambda *a, **k: recompute(*a, **(k | {"use_reentrant": True})))
    monkeypatch.setattr("qlora_service.training.network.network.checkpoint_activations", reentrant)
    with pytest.raises((JobFailed, RuntimeError, UserWarning), match="grad"):
        moved()


def test_11_dora_magnitudes_frozen_by_bfloat16(tiny_model: Path) -> None:
    """The mistake: magnitudes in bfloat16, which near 1 are 0.008 apart, so a rate of 1e-4 never changes them."""

    def moved(dtype: torch.dtype) -> list[bool]:
        model = load(tiny_model, dtype=torch.bfloat16, adapter=Lora(r=4, use_dora=True))
        magnitudes = [p for name, p in model.named_parameters() if "lora_magnitude" in name]
        assert {magnitude.dtype for magnitude in magnitudes} == {torch.float32}
        for magnitude in magnitudes:
            magnitude.data = (1.0 + magnitude.data.abs()).to(dtype)
        before = [magnitude.detach().clone() for magnitude in magnitudes]
        run(model, rows(8), TRAINING.model_copy(update={"learning_rate": 1e-4}), steps=2)
        return [not torch.equal(old, new) for old, new in zip(before, magnitudes, strict=True)]

    assert moved(torch.float32) == [True] * 14
    assert moved(torch.bfloat16) == [False] * 14


def test_12_a_retry_with_a_smaller_batch_changes_the_step(tiny_model: Path, monkeypatch: Patch) -> None:
    """The mistake: when memory runs out, a step has half its examples. Right: only the micro-batches are smaller."""
    expected = adapter_after(tiny_model, TRAINING, micro_batch_tokens=400)
    losses, failures = Network.losses, []

    def on_a_small_device(self: Network, documents: Sequence[TokenRow], **options: Any) -> Any:
        if torch.is_grad_enabled() and sum(len(document.input_ids) for document in documents) > 150:
            failures.append(len(documents))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(self, documents, **options)

    monkeypatch.setattr(Network, "losses", on_a_small_device)
    assert are_close(adapter_after(tiny_model, TRAINING, micro_batch_tokens=400), expected)
    assert failures

    def with_fewer_examples(self: StepGradients, step: int, examples: Sequence[TrainingExample]) -> StepLoss:
        try:
            return self._accumulate(step, examples)
        except torch.OutOfMemoryError:
            self._network.model.zero_grad()
        return with_fewer_examples(self, step, examples[: len(examples) // 2])

    monkeypatch.setattr(StepGradients, "compute", with_fewer_examples)
    assert not are_close(adapter_after(tiny_model, TRAINING, micro_batch_tokens=400), expected)


@pytest.mark.parametrize("optim", ["adamw_torch", "paged_adamw_32bit"])
def test_13_memory_that_is_not_freed_between_runs(tiny_model: Path, optim: str, monkeypatch: Patch) -> None:
    """The mistake: a reference to the model, adapter or optimizer state of a finished job is left."""
    held: list[Any] = []

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(tracked), torch.Tensor) for tracked in gc.get_objects())

    def left_by_a_run(hold: Callable[[PeftModel], None] = lambda model: None) -> int:
        before = tensors()
        model = load(tiny_model, adapter=Lora(r=4, lora_dropout=0.1))
        run(model, rows(8), TRAINING.model_copy(update={"optim": optim}), steps=1, checkpointing=True)
        hold(model)
        del model
        return tensors() - before

    left_by_a_run()  # the first run leaves tensors that later ones share, such as masks
    assert left_by_a_run() == 0
    assert left_by_a_run(lambda model: held.append(model.get_base_model().get_decoder().layers[0])) > 0
    monkeypatch.setattr(optimizer, "release_optimizer", lambda ended: held.append(ended.state))
    assert left_by_a_run() > 0


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_15_compute_dtype_left_at_float32(
    tiny_model: Path, dtype: torch.dtype, quant_type: Any, monkeypatch: Patch
) -> None:
    """The mistake: `bnb_4bit_compute_dtype` is not set, so bitsandbytes multiplies in float32, slowly."""

    def compute_dtypes() -> set[tuple[torch.dtype, torch.dtype]]:
        base = load_base(tiny_model, Quantization(type=quant_type), dtype, CPU)
        layers = [module for module in base.modules() if isinstance(module, bnb.nn.Linear4bit)]
        assert len(layers) == 14
        return {(layer.compute_dtype, layer.weight.quant_state.dtype) for layer in layers}

    assert compute_dtypes() == {(dtype, dtype)}
    forgotten = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quant_type)
    monkeypatch.setattr("qlora_service.models.base.quantize.bitsandbytes_config", lambda *_: forgotten)
    assert compute_dtypes() == {(torch.float32, dtype)}
