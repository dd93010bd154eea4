"""Gradients of a step, accumulated over micro-batches that shrink when memory runs out.

The objective divides the loss (`objectives`): a share of a micro-batch is already divided by the whole step's count.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qlora_service.data.batching import pack
from qlora_service.domain.jobs import FailureReason
from qlora_service.errors import JobFailed
from qlora_service.models.adapters import orthogonality_loss
from qlora_service.specs import Training
from qlora_service.training.device import is_out_of_memory, release_memory
from qlora_service.training.network.micro_batch import TrainingExample
from qlora_service.training.network.network import Network
from qlora_service.training.objectives import Share, TrainingObjective

PlanChanged = Callable[[dict[str, Any]], None]
"""Signature of `loop.Control.plan_changed`"""


@dataclass(frozen=True)
class StepLoss:
    """The loss of a whole step, and the loss of each of its examples."""

    total: float
    lines: list[int]
    """Line of each example in the dataset, in the order of the micro-batches"""
    example_losses: list[float]
    """Loss of each example, in the order of `lines`"""


class StepGradients:
    """Computes gradients; keeps the micro-batch size that fits into the device's memory."""

    def __init__(
        self, network: Network, objective: TrainingObjective, training: Training, plan_changed: PlanChanged
    ) -> None:
        self._network, self._objective, self._seed = network, objective, training.seed
        self._plan_changed = plan_changed
        self.micro_batch_tokens = training.resolved_micro_batch_tokens

    def compute(self, step: int, examples: Sequence[TrainingExample]) -> StepLoss:
        """The loss of step `step` (from 0); its gradients are in the parameters' `.grad`.

        When memory runs out, the step is repeated from its start: with micro-batches of half the size, down to one
        example each, and then with gradient checkpointing. Later steps keep the change.

        Raises:
            JobFailed: the step does not fit into memory even then.
        """
        while True:
            try:
                return self._accumulate(step, examples)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                why = str(error).partition("\n")[0] or type(error).__name__
            # Outside the except block, because the error's traceback holds the tensors of the failed pass.
            self._network.model.zero_grad(set_to_none=True)
            release_memory(self._network.device)
            self._reduce_memory(step, examples, why)

    def _accumulate(self, step: int, examples: Sequence[TrainingExample]) -> StepLoss:
        # Every step is seeded by (seed, step), so a resumed attempt draws the same dropout masks and noise.
        torch.manual_seed(step_seed(self._seed, step))
        shares = []
        micro_batches = pack(example_tokens(examples), self.micro_batch_tokens)
        for share in backward_passes(self._network, self._objective, examples, micro_batches):
            shares.append((share.total, share.example_losses))
        total = math.fsum(float(total) for total, _ in shares)
        example_losses = torch.cat([losses for _, losses in shares]).tolist()
        return StepLoss(total, [examples[index].line for indices in micro_batches for index in indices], example_losses)

    def _reduce_memory(self, step: int, examples: Sequence[TrainingExample], why: str) -> None:
        """Halves the micro-batches until the step is cut differently, or else turns gradient checkpointing on.

        Raises:
            JobFailed: every micro-batch is one example, and gradient checkpointing is on or not available.
        """
        lengths = example_tokens(examples)
        before, micro_batches = self.micro_batch_tokens, pack(lengths, self.micro_batch_tokens)
        if any(len(indices) > 1 for indices in micro_batches):
            while pack(lengths, self.micro_batch_tokens) == micro_batches:
                self.micro_batch_tokens //= 2
            change = {"what": "micro_batch_tokens", "from": before, "to": self.micro_batch_tokens}
        elif not self._network.checkpointing and self._network.checkpoint():
            change = {"what": "gradient_checkpointing", "from": False, "to": True}
        else:
            raise self._out_of_memory(step, examples, lengths)
        self._plan_changed({"step": step + 1} | change | {"why": why})

    def _out_of_memory(self, step: int, examples: Sequence[TrainingExample], lengths: Sequence[int]) -> JobFailed:
        tokens, example = max(zip(lengths, examples, strict=True), key=lambda pair: pair[0])
        recomputed = " and gradient checkpointing" if self._network.checkpointing else ""
        return JobFailed(
            f"step {step + 1} does not fit into the device's memory, even with one example at a time{recomputed}: its "
            f"longest row, line {example.line}, has {tokens} tokens. Lower training.max_seq_len_tokens below that, or "
            "use a smaller base model or adapter",
            reason=FailureReason.OUT_OF_MEMORY,
            step=step + 1,
            line=example.line,
            tokens=tokens,
        )


def backward_passes(
    network: Network,
    objective: TrainingObjective,
    examples: Sequence[TrainingExample],
    micro_batches: Sequence[Sequence[int]],
) -> Iterator[Share]:
    """Runs the forward and backward pass of each micro-batch of a step, and yields its detached share of the loss.

    `micro_batches` holds indices into `examples`.
    """
    compute_share = objective.prepare_step(network, examples, network.losses)
    for indices in micro_batches:
        share = compute_share([examples[index] for index in indices])
        share.total.backward()
        detached = replace(share, total=share.total.detach())
        # Frees the graph: bitsandbytes' int8 products keep their inputs while it exists.
        del share
        yield detached
    if (penalty := orthogonality_loss(network.model)) is not None:
        penalty.backward()


def example_tokens(examples: Sequence[TrainingExample]) -> list[int]:
    """Tokens of each example; of a preference pair, both answers with their prompts."""
    return [sum(len(document.input_ids) for document in example.documents) for example in examples]


def step_seed(seed: int, step: int) -> int:
    """The random generator's seed for one step."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step}".encode()).digest()[:8], "big") >> 1
