"""The training's own steps on real tensors under the tracker, as the reference for the simulation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_service.models.adapters import attach_adapter, prune_after_step, trainable_parameters
from qlora_service.models.base.quantize import load_base
from qlora_service.planning.largest_step import LargestStep, largest_step
from qlora_service.planning.memory import Category, Memory
from qlora_service.planning.simulation.simulated_device import workspaces
from qlora_service.planning.simulation.simulated_step import simulated_memory
from qlora_service.planning.simulation.tracked_step import examples_of, register_model
from qlora_service.planning.simulation.tracker import Tracker
from qlora_service.specs import JobSpec
from qlora_service.training.network.isolation import isolate_documents
from qlora_service.training.network.network import Network
from qlora_service.training.network.varlen_attention import BLOCK, _triangle
from qlora_service.training.objectives import evaluate, make_objective
from qlora_service.training.optimizer import managed_optimizer
from qlora_service.training.step import StepGradients

CPU = torch.device("cpu")
STEPS = 2
"""The second one has the optimizer state from its start"""


@dataclass(frozen=True)
class TrackedJob:
    """A job small enough to run in a test."""

    name: str
    spec: dict[str, Any]
    micro_batch_tokens: int = 256
    longest_tokens: int = 100
    checkpointing: bool = False
    compute_dtype: str = "float32"

    def job(self) -> JobSpec:
        return JobSpec.model_validate({"base_model": "small"} | self.spec)

    def step(self) -> LargestStep:
        return largest_step(self.job(), micro_batch_tokens=self.micro_batch_tokens, longest_tokens=self.longest_tokens)

    def simulated(self, model_dir: Path) -> Memory:
        """The memory simulated from the model's config.json."""
        make_triangles()
        return simulated_memory(
            json.loads((model_dir / "config.json").read_text()),
            self.job(),
            self.step(),
            compute_dtype=self.compute_dtype,
            checkpointing=self.checkpointing,
            cuda=False,
        )

    def off_by(self, model_dir: Path) -> float:
        """Relative error of the simulated bytes."""
        return self.simulated(model_dir).allocated / track_real_steps(self, model_dir).peak - 1


JOBS = [
    TrackedJob("LoRA", {}),
    TrackedJob("LoRA, recomputed", {}, checkpointing=True),
    TrackedJob("LoRA in bfloat16", {}, compute_dtype="bfloat16"),
    TrackedJob("one micro-batch a step", {"training": {"batch_size": 2}}),
    TrackedJob("one short row", {"training": {"batch_size": 1}}, 64, 32, checkpointing=True),
    TrackedJob("one long row", {"training": {"batch_size": 1}}, 64, 500),
    TrackedJob("dropout", {"adapter": {"lora_dropout": 0.1}}),
    TrackedJob("dropout, recomputed", {"adapter": {"lora_dropout": 0.1}}, checkpointing=True),
    TrackedJob("DoRA", {"adapter": {"use_dora": True}}),
    TrackedJob("int8", {"quantization": {"type": "int8"}}),
    TrackedJob("FP4", {"quantization": {"type": "fp4", "double_quant": False}}),
    TrackedJob("unquantized", {"quantization": {"type": "none"}}),
    TrackedJob("AdamW, 8 bits", {"training": {"optim": "adamw_8bit"}}),
    TrackedJob("torch's AdamW", {"adapter": {"r": 64}, "training": {"optim": "adamw_torch"}}),
    TrackedJob("Lion", {"training": {"optim": "paged_lion_32bit"}}),
    TrackedJob("AdaLoRA", {"adapter": {"method": "adalora"}}),
    TrackedJob("IA3 in bfloat16", {"adapter": {"method": "ia3"}}, compute_dtype="bfloat16"),
    TrackedJob("VeRA", {"adapter": {"method": "vera"}}, checkpointing=True),
    TrackedJob("prompt tuning", {"adapter": {"method": "prompt_tuning"}}),
    TrackedJob("OFT", {"adapter": {"method": "oft"}}),
    TrackedJob("prefix tuning", {"adapter": {"method": "prefix_tuning"}}),
    TrackedJob("trained tokens", {"adapter": {"trainable_token_indices": [5, 6]}}),
    TrackedJob("NEFTune", {"training": {"neftune_noise_alpha": 5.0}}),
    TrackedJob("DPO", {"objective": {"type": "dpo"}}),
    TrackedJob("KTO", {"objective": {"type": "kto"}}),
]


def make_triangles() -> None:
    """Creates the masks that attention's backward pass caches for the process, so that no job is charged for them."""
    for tokens in range(1, BLOCK + 1):
        for dtype in (torch.float32, torch.bfloat16):
            _triangle(tokens, dtype)


def track_real_steps(case: TrackedJob, model_dir: Path) -> Tracker:
    """The tracker after steps and evaluations with the model's real weights."""
    make_triangles()
    spec, step = case.job(), case.step()
    dtype = getattr(torch, case.compute_dtype)
    base = load_base(model_dir, spec.quantization, dtype, CPU)
    isolation = isolate_documents(base)
    network = Network(
        attach_adapter(base, spec.adapter, spec.training.seed),
        isolation,
        checkpointing=case.checkpointing,
        neftune_noise_alpha=spec.training.neftune_noise_alpha,
    )
    network.model.train()
    tracker = Tracker(vocabulary=base.config.vocab_size, workspaces=workspaces(cuda=False))
    register_model(tracker, network.model)
    objective, examples = make_objective(spec.objective), examples_of(step, spec.objective)
    training = spec.training.model_copy(update={"micro_batch_tokens": max(step.tokens, case.micro_batch_tokens)})
    gradients = StepGradients(network, objective, training, lambda _: None)
    step_examples = examples if step.is_whole_step else 2 * examples
    with tracker, managed_optimizer(network.model, training, CPU) as optimizer:
        for number in range(STEPS):
            gradients.compute(number, step_examples)
            with tracker.during(Category.OPTIMIZER):
                torch.nn.utils.clip_grad_norm_(trainable_parameters(network.model), training.max_grad_norm)
                optimizer.step()
                prune_after_step(network.model, number + 1)
            optimizer.zero_grad(set_to_none=True)
            evaluate(network, objective, examples[:1])
    return tracker
