"""Helpers of the training tests: the tiny model with real weights, rows of random tokens, and short trainings."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from qlora_service.errors import Interrupted
from qlora_service.models.adapters import attach_adapter, trainable_parameters
from qlora_service.models.base.quantize import load_base
from qlora_service.specs import Adapter, Lora, Objective, Quantization, Supervised, Training
from qlora_service.training.checkpoint.checkpoints import Checkpoints
from qlora_service.training.checkpoint.state import TrainingState
from qlora_service.training.evaluation.held_out import EvaluationMetrics
from qlora_service.training.evaluation.row_losses import RowLosses
from qlora_service.training.loop import Control, Outcome, StepMetrics, Unattended, Workload, train
from qlora_service.training.network.isolation import Isolation, isolate_documents
from qlora_service.training.network.micro_batch import TokenRow, TrainingExample
from qlora_service.training.network.network import Network
from qlora_service.training.objectives import make_objective

CPU = torch.device("cpu")
FLOAT64 = Quantization(type="none", compute_dtype="float32")
NF4 = Quantization()
TRAINING = Training(batch_size=8, learning_rate=1e-2, warmup_ratio=0.0, optim="adamw_torch")
UNREPEATABLE = {"tokens_per_second", "peak_memory_bytes"}
"""Metrics that differ between two runs of the same job"""


def rows(count: int, seed: int = 0, low: int = 8, high: int = 60) -> list[TokenRow]:
    """Rows of `low` to `high` tokens; the first tokens of each are not trained, as those of a question."""
    generator = random.Random(seed)
    result = []
    for line in range(1, count + 1):
        length = generator.randint(low, high)
        question = generator.randint(1, length - 2)
        ids = [generator.randrange(3, 500) for _ in range(length)]
        result.append(TokenRow(line, ids, [index >= question for index in range(length)]))
    return result


def load(
    model_dir: Path,
    quantization: Quantization = NF4,
    dtype: torch.dtype = torch.float32,
    adapter: Adapter | None = None,
    perturb_b: float = 0.0,
    total_steps: int = 1000,
) -> PeftModel:
    """The tiny model with an adapter; `perturb_b` moves B off zero, where A has no gradient.

    `total_steps` determines AdaLoRA's schedule.
    """
    base = load_base(model_dir, quantization, torch.float32 if dtype is torch.float64 else dtype, CPU)
    isolate_documents(base)
    model = attach_adapter(base, adapter or Lora(r=4), seed=0, total_steps=total_steps)
    if dtype is torch.float64:
        model.double()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and perturb_b:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data.copy_(noise * perturb_b)
    return model


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the trainable parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def frozen_hash(model: PeftModel) -> str:
    """SHA-256 of every tensor that is not trained: weights, codes, scales of quantized weights, buffers."""
    trained = {parameter.data_ptr() for parameter in trainable_parameters(model)}
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.data_ptr() not in trained:
            digest.update(name.encode() + tensor.flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def network(model: PeftModel, isolation: Isolation = "per_document", **options: Any) -> Network:
    """The network of a model from `load`; the options are those of `Network`."""
    return Network(model, isolation, **options)


class Recorder:
    """An observer that keeps the metrics."""

    def __init__(self) -> None:
        self.steps: list[StepMetrics] = []
        self.evaluations: list[EvaluationMetrics] = []
        self.earlier = b""
        """Result of `lines` of an earlier attempt"""

    def lines(self) -> bytes:
        """The metrics as sorted JSON lines, without `UNREPEATABLE`."""
        records = [*map(asdict, self.steps), *map(asdict, self.evaluations)]
        text = [
            json.dumps({name: value for name, value in record.items() if name not in UNREPEATABLE})
            for record in records
        ]
        return b"\n".join(sorted([*self.earlier.splitlines(), *(line.encode() for line in text)]))

    def on_step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)

    def on_evaluation(self, metrics: EvaluationMetrics) -> None:
        self.evaluations.append(metrics)


class CheckpointingControl(Unattended):
    """A control that saves states in real checkpoints: when `is_due`, and when it interrupts at check `at_check`."""

    def __init__(self, checkpoints: Checkpoints, recorder: Recorder, at_check: int | None = None) -> None:
        self.checks = self.saves = 0
        self.is_due = False
        self.changes: list[dict[str, Any]] = []
        self._checkpoints, self._recorder, self._at_check = checkpoints, recorder, at_check

    def check(self) -> None:
        self.checks += 1
        if self.checks == self._at_check:
            raise Interrupted("enough")

    def checkpoint_is_due(self) -> bool:
        return self.is_due

    def save(self, state: TrainingState) -> None:
        self.saves += 1
        self._checkpoints.save(state, self._recorder.lines(), {"threads": torch.get_num_threads()})
        self._checkpoints.flush()

    def plan_changed(self, change: dict[str, Any]) -> None:
        self.changes.append(change)


def run(
    model: PeftModel,
    train_rows: Sequence[TrainingExample],
    training: Training,
    *,
    steps: int = 5,
    micro_batch_tokens: int | None = None,
    held_out: Sequence[TrainingExample] | None = None,
    evaluate_every: int = 1000,
    recorder: Recorder | None = None,
    row_losses: RowLosses | None = None,
    objective: Objective | None = None,
    start: TrainingState | None = None,
    control: Control | None = None,
    **options: Any,
) -> tuple[Outcome, Recorder]:
    """Trains on consecutive batches of the rows; the options are those of `Network`."""
    recorder = recorder or Recorder()
    size = training.batch_size
    if micro_batch_tokens is not None:
        training = training.model_copy(update={"micro_batch_tokens": micro_batch_tokens})
    outcome = train(
        network(model, neftune_noise_alpha=training.neftune_noise_alpha, **options),
        make_objective(objective or Supervised()),
        Workload(
            lambda step: [train_rows[(step * size + i) % len(train_rows)] for i in range(size)],
            held_out or rows(4, seed=99),
            steps,
            evaluate_every,
        ),
        training,
        recorder,
        RowLosses() if row_losses is None else row_losses,
        start=start,
        control=control,
    )
    return outcome, recorder
