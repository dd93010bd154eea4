"""A step's gradients, computed in micro-batches; when memory runs out, in smaller ones."""

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
from qlora_service.models.adapters import regularization
from qlora_service.specs import Training
from qlora_service.training.device import is_out_of_memory, release_memory
from qlora_service.training.network.micro_batch import TrainingExample
from qlora_service.training.network.network import Network
from qlora_service.training.objectives import Share, TrainingObjective

PlanChanged = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class StepLoss:
    """The loss of a whole step, and each of its examples' own: `of_example[i]` is of the example at `lines[i]`."""

    total: float
    lines: list[int]
    of_example: list[float]


class StepGradients:
    """Computes gradients, and remembers what the device had memory for."""

    def __init__(
        self, network: Network, objective: TrainingObjective, training: Training, plan_changed: PlanChanged
    ) -> None:
        self._network, self._objective, self._seed = network, objective, training.seed
        self._plan_changed = plan_changed
        self.micro_batch_tokens = training.resolved_micro_batch_tokens

    def compute(self, step: int, examples: Sequence[TrainingExample]) -> StepLoss:
        """The loss of step `step` (from 0), whose gradients the parameters hold from now on.

        When memory runs out, the step is done again from its start: with micro-batches of half the size, until each is
        one example, and then with activations computed again in the backward pass. It stays that way.

        Raises:
            JobFailed: even so there is not enough memory.
        """
        while True:
            try:
                return self._compute(step, examples)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                why = str(error).partition("\n")[0] or type(error).__name__
            # Outside the except block: the error's traceback holds the tensors of the pass that failed.
            self._network.model.zero_grad(set_to_none=True)
            release_memory(self._network.device)
            self._give_way(step, examples, why)

    def _compute(self, step: int, examples: Sequence[TrainingExample]) -> StepLoss:
        # Dropout masks follow (seed, step), so an attempt that starts in the middle draws the same ones.
        torch.manual_seed(step_seed(self._seed, step))
        shares = []
        cut = pack(example_tokens(examples), self.micro_batch_tokens)
        for share in backward_passes(self._network, self._objective, examples, cut):
            shares.append((share.total, share.each))
        total = math.fsum(float(total) for total, _ in shares)
        of_example = torch.cat([each for _, each in shares]).tolist()
        return StepLoss(total, [examples[index].line for members in cut for index in members], of_example)

    def _give_way(self, step: int, examples: Sequence[TrainingExample], why: str) -> None:
        """Take the next rung of the ladder. Raises: JobFailed, at its end."""
        lengths = example_tokens(examples)
        before, cut = self.micro_batch_tokens, pack(lengths, self.micro_batch_tokens)
        if any(len(members) > 1 for members in cut):
            while pack(lengths, self.micro_batch_tokens) == cut:
                self.micro_batch_tokens //= 2
            changed = {"what": "micro_batch_tokens", "from": before, "to": self.micro_batch_tokens}
        elif not self._network.checkpointing and self._network.checkpoint():
            changed = {"what": "gradient_checkpointing", "from": False, "to": True}
        else:
            raise self._out_of_memory(step, examples, lengths)
        self._plan_changed({"step": step + 1} | changed | {"why": why})

    def _out_of_memory(self, step: int, examples: Sequence[TrainingExample], lengths: Sequence[int]) -> JobFailed:
        tokens, example = max(zip(lengths, examples, strict=True), key=lambda pair: pair[0])
        recomputed = " and activations computed again" if self._network.checkpointing else ""
        return JobFailed(
            f"step {step + 1} does not fit into the device's memory, even with one example at a time{recomputed}: its "
            f"longest row, line {example.line}, has {tokens} tokens. Lower training.max_seq_len_tokens below that, or "
            "take a smaller base model or adapter",
            reason=FailureReason.OUT_OF_MEMORY,
            step=step + 1,
            line=example.line,
            tokens=tokens,
        )


def backward_passes(
    network: Network, objective: TrainingObjective, examples: Sequence[TrainingExample], cut: Sequence[Sequence[int]]
) -> Iterator[Share]:
    """A step's forward and backward passes, one for each micro-batch of `cut`; its shares of the loss, detached."""
    share_of = objective.of_step(network, examples, network.losses)
    for members in cut:
        share = share_of([examples[index] for index in members])
        share.total.backward()
        done = replace(share, total=share.total.detach())
        # bitsandbytes' int8 products keep their inputs as long as the graph is there.
        del share
        yield done
    if (penalty := regularization(network.model)) is not None:
        penalty.backward()


def example_tokens(examples: Sequence[TrainingExample]) -> list[int]:
    """Each example's length: of a pair, both sides."""
    return [sum(len(document.input_ids) for document in example.documents) for example in examples]


def step_seed(seed: int, step: int) -> int:
    """The random generator's seed for one step."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step}".encode()).digest()[:8], "big") >> 1
