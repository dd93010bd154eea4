"""The fastest settings with which a job fits on a device. Pure except for the `simulate` callback.

The settings of the user (batch size, lengths, rank) stay. The settings chosen here change only time and memory: tokens
per micro-batch, whether activations are recomputed, and where the optimizer state lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from qlora_service.planning.cards import Device
from qlora_service.planning.largest_step import largest_step
from qlora_service.planning.layer_cost import FAST_LAYERS
from qlora_service.planning.memory import Memory
from qlora_service.planning.memory_formula import estimated_memory
from qlora_service.planning.shapes import ModelShape
from qlora_service.specs import JobSpec, PrefixTuning

TOKEN_BUDGETS = (8192, 4096, 2048, 1024, 512)
"""Tokens per micro-batch. Each pass dequantizes every weight once: on an RTX 3090 (936 GB/s, 71 TFLOPS) that costs as
much as the products of about 100 tokens. Therefore more than 8,192 tokens gain nothing, and 512 without recomputation
(a fifth slower than the products alone) are faster than any number with it (a third slower, and dequantized once
more)."""
FORMULA_ERROR, SEGMENTS_BYTES = 0.05, 128 * 2**20
"""Error of the formula: a share of the prediction, plus bytes. Its allocated bytes are within 1 % of the simulation's;
the allocator reserves more in segments of 20 MiB and larger, which for a small model (135 M at 512 tokens, one row per
micro-batch) was 68 MB of 425."""
UNFITTED_ERROR = 0.5
"""Error for architectures that the formula was not fitted to: such a job is ruled out only if it is far too large"""

Verdict = Literal["fits", "fits_if", "does_not_fit"]
Source = Literal["simulation", "formula"]
Simulate = Callable[[JobSpec, int, bool], Memory | None]
"""(spec, tokens per micro-batch, recomputation) to the job's memory; None when it cannot be simulated (any more)"""


@dataclass(frozen=True)
class Choice:
    """Execution settings of a job; the mathematical result of a step is the same with each."""

    micro_batch_tokens: int
    gradient_checkpointing: bool
    optimizer: Literal["resident", "paged"] = "resident"
    """Location of the optimizer state during the rest of the step: on the device, or in host memory"""


@dataclass(frozen=True)
class FitQuestion:
    """A job on a model and a device."""

    shape: ModelShape
    spec: JobSpec
    device: Device
    longest_tokens: int
    """Tokens of the longest row, or an upper bound"""
    factor: float = 1.0
    """Factor on predicted bytes: observed over predicted memory on this device"""

    def estimated_memory(self, tokens: int, checkpointing: bool) -> Memory:
        """The memory by the formula."""
        return estimated_memory(
            self.shape,
            self.spec,
            micro_batch_tokens=tokens,
            checkpointing=checkpointing,
            cuda=self.device.cuda,
            longest_tokens=self.longest_tokens,
            compute_dtype=self.device.compute_dtype,
        )

    def needed_bytes(self, memory: Memory, choice: Choice) -> int:
        """Bytes that have to be free for the job, without context and workspace."""
        resident = memory.host if choice.optimizer == "resident" else 0
        return int((memory.reserved + resident) * self.factor)

    @property
    def formula_holds(self) -> bool:
        """Whether the formula was fitted to this architecture."""
        return self.shape.model_type in FAST_LAYERS and self.shape.experts == 1

    def settings(self) -> Iterator[tuple[int, bool]]:
        """(tokens per micro-batch, recomputation) from fastest to slowest; values set by the user are fixed."""
        checkpointing = self.spec.training.gradient_checkpointing
        recomputations = (False, True) if checkpointing == "auto" else (checkpointing,)
        if isinstance(self.spec.adapter, PrefixTuning):
            recomputations = (False,)  # its keys and values pass through a cache, which recomputation would lose
        for recomputed in recomputations:
            for tokens in self._budgets():
                yield tokens, recomputed

    def _budgets(self) -> list[int]:
        training = self.spec.training
        if training.micro_batch_tokens != "auto" or not self.device.cuda:
            return [training.resolved_micro_batch_tokens]
        # A row is never cut, so a budget below the longest gains nothing; neither does one above a whole step.
        example = longest_example_tokens(self.spec, self.longest_tokens)
        whole_step = example * training.batch_size
        return sorted({max(example, min(budget, whole_step)) for budget in TOKEN_BUDGETS}, reverse=True)


@dataclass(frozen=True)
class Fit:
    """The fastest setting that fits; if none fits, the one that needs least memory."""

    fits: bool
    choice: Choice
    memory: Memory
    needed_bytes: int
    source: Source
    is_sure: bool
    """The error of the prediction cannot change the verdict"""


def fastest_fit(question: FitQuestion, simulate: Simulate | None = None) -> Fit:
    """The fastest setting that fits, or the one that needs least memory.

    The formula decides at once. A setting that fits despite the formula's error is preferred to a faster one within
    that error; if there is none, the settings within the error are simulated.
    """
    by_formula = list(_fits(question))
    if (sure := next((fit for fit in by_formula if fit.fits and fit.is_sure), None)) is not None:
        return sure
    fits = by_formula if simulate is None else list(_simulated(question, by_formula, simulate))
    return next((fit for fit in fits if fit.fits), None) or min(fits, key=lambda fit: fit.needed_bytes)


def fitting_choices(question: FitQuestion) -> list[Choice]:
    """Every setting that fits by the formula, fastest first; settings that fit despite its error precede the others."""
    choices: dict[tuple[int, bool], Choice] = {}
    for fit in sorted(_fits(question), key=lambda fit: not fit.is_sure):
        if fit.fits:
            choices.setdefault((fit.choice.micro_batch_tokens, fit.choice.gradient_checkpointing), fit.choice)
    return list(choices.values())


def surely_fits(question: FitQuestion) -> bool:
    """Whether the job fits despite the formula's error, which is ignored if the formula was not fitted to the model."""
    return any(fit.fits and (fit.is_sure or not question.formula_holds) for fit in _fits(question))


def choose_settings(question: FitQuestion, holds: Callable[[int], bool]) -> Choice:
    """The execution settings of the job: the fastest that fit, or else the ones with the least memory.

    `holds(tokens)` measures whether the device holds the activations of that many tokens; with recomputation on "auto",
    a setting without it has to pass this measurement.
    """
    for choice in fitting_choices(question):
        largest_tokens = max(choice.micro_batch_tokens, longest_example_tokens(question.spec, question.longest_tokens))
        needs_no_measurement = choice.gradient_checkpointing or question.spec.training.gradient_checkpointing is False
        if needs_no_measurement or holds(largest_tokens):
            return choice
    return fastest_fit(question).choice


def longest_example_tokens(spec: JobSpec, longest_tokens: int) -> int:
    """Tokens of the largest example, which is never cut: a row, or both sides of a pair."""
    return largest_step(spec, micro_batch_tokens=1, longest_tokens=longest_tokens).tokens


def with_changes(spec: JobSpec, changes: dict[str, Any]) -> JobSpec:
    """The spec with new values at these dotted fields. Raises: ValidationError, when they contradict other fields."""
    document = spec.model_dump(mode="json", exclude_unset=True)
    for path, value in changes.items():
        group, _, name = path.partition(".")
        document.setdefault(group, {})[name] = value
    return JobSpec.model_validate(document)


def _fits(question: FitQuestion) -> Iterator[Fit]:
    """Every setting by the formula, fastest first."""
    for tokens, recomputed in question.settings():
        estimated = question.estimated_memory(tokens, recomputed)
        for choice in _choices(tokens, recomputed, estimated):
            needed = question.needed_bytes(estimated, choice)
            fits = needed <= question.device.usable_bytes
            yield Fit(fits, choice, estimated, needed, "formula", is_sure=not _is_doubtful(question, needed))


def _simulated(question: FitQuestion, by_formula: Sequence[Fit], simulate: Simulate) -> Iterator[Fit]:
    """The same settings, simulated where the formula cannot decide, up to the first that fits in a simulation."""
    for fit in by_formula:
        tokens, recomputed = fit.choice.micro_batch_tokens, fit.choice.gradient_checkpointing
        simulated = None if fit.is_sure else simulate(question.spec, tokens, recomputed)
        if simulated is None:
            yield fit
            continue
        needed = question.needed_bytes(simulated, fit.choice)
        fits = needed <= question.device.usable_bytes
        yield Fit(fits, fit.choice, simulated, needed, "simulation", is_sure=True)
        if fits:
            return


def _choices(tokens: int, recomputed: bool, memory: Memory) -> list[Choice]:
    resident = Choice(tokens, recomputed)
    return [resident, replace(resident, optimizer="paged")] if memory.host else [resident]


def _is_doubtful(question: FitQuestion, needed_bytes: int) -> bool:
    """Whether the formula's error could change the verdict."""
    usable = question.device.usable_bytes
    if question.formula_holds:
        return abs(needed_bytes - usable) <= FORMULA_ERROR * needed_bytes + SEGMENTS_BYTES
    return needed_bytes <= usable * (1 + UNFITTED_ERROR)
