"""What the training tests share: the tiny model loaded for real, and rows of random tokens."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from peft import PeftModel

import qlora_service.training.attention  # noqa: F401 - registers the attention
from qlora_service.models.adapters import attach
from qlora_service.models.nf4 import load_base
from qlora_service.specs import Adapter, Quantization, Training
from qlora_service.training.loop import EvaluationMetrics, Losses, StepMetrics, train
from qlora_service.training.micro_batch import PER_DOCUMENT, TokenRow

CPU = torch.device("cpu")
FLOAT64 = Quantization(type="none", compute_dtype="float32")
NF4 = Quantization()


def rows(count: int, seed: int = 0, low: int = 8, high: int = 60) -> list[TokenRow]:
    """Rows of different lengths; a first part of each is untrained, as a question is."""
    chance = random.Random(seed)
    made = []
    for line in range(1, count + 1):
        length = chance.randint(low, high)
        question = chance.randint(1, length - 2)
        ids = [chance.randrange(3, 500) for _ in range(length)]
        made.append(TokenRow(line, ids, [index >= question for index in range(length)]))
    return made


def load(
    model_dir: Path,
    quantization: Quantization = NF4,
    dtype: torch.dtype = torch.float32,
    adapter: Adapter | None = None,
    perturb_b: float = 0.0,
    attention: str = PER_DOCUMENT,
) -> PeftModel:
    """The tiny model with an adapter; `perturb_b` moves B off zero, where A would have no gradient."""
    base = load_base(model_dir, quantization, torch.float32 if dtype is torch.float64 else dtype, CPU)
    base.set_attn_implementation(attention)
    model = attach(base, adapter or Adapter(r=4), seed=0)
    if dtype is torch.float64:
        model.double()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and perturb_b:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data.copy_(noise * perturb_b)
    return model


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Recorder:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[StepMetrics] = []
        self.evaluations: list[EvaluationMetrics] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)

    def on_evaluation(self, metrics: EvaluationMetrics) -> None:
        self.evaluations.append(metrics)


def run(
    model: torch.nn.Module,
    train_rows: list[TokenRow],
    training: Training,
    *,
    steps: int = 5,
    micro_batch_tokens: int = 10_000,
    held_out: list[TokenRow] | None = None,
    evaluate_every: int = 1000,
    recorder: Recorder | None = None,
) -> tuple[Losses, Recorder]:
    """Train for real on consecutive batches of the rows."""
    recorder = recorder or Recorder()
    size = training.batch_size
    losses = train(
        model,
        lambda step: [train_rows[(step * size + i) % len(train_rows)] for i in range(size)],
        held_out or rows(4, seed=99),
        total_steps=steps,
        evaluate_every=evaluate_every,
        training=training,
        device=CPU,
        observer=recorder,
        micro_batch_tokens=micro_batch_tokens,
    )
    return losses, recorder
