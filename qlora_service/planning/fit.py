"""Whether a job fits on a device, and the fastest setting with which it does. Pure, but for simulations handed in.

The job's own settings (batch size, lengths, rank) are its user's. Chosen here is what changes time and memory only: how
many tokens are computed at a time, whether activations are recomputed, where the optimizer's state lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from qlora_service.planning.cards import Device
from qlora_service.planning.formula import memory
from qlora_service.planning.largest_step import largest_step
from qlora_service.planning.layer_cost import FAST_LAYERS
from qlora_service.planning.memory import Memory
from qlora_service.planning.shapes import ModelShape
from qlora_service.specs import JobSpec, PrefixTuning

BUDGETS = (8192, 4096, 2048, 1024, 512)
"""Tokens computed at a time. Each pass unpacks every weight once: on an RTX 3090 (936 GB/s, 71 TFLOPS) that costs as
much as the products of about 100 tokens. So 8,192 have nothing left to gain, and 512 without recomputation (a fifth
more than the products alone) are faster than any number with it (a third more, and unpacked once more)."""
FORMULA_ERROR, SEGMENTS_BYTES = 0.05, 128 * 2**20
"""Share of the prediction, and bytes beside it, within which the formula cannot decide. Its allocated bytes are within
1 % of the simulation's; what the allocator holds beyond them comes in segments of 20 MiB and more, and of a small model
(135 M at 512 tokens, one row at a time) that was 68 MB of 425."""
UNFIT_ERROR = 0.5
"""The same where the formula was not fitted to the architecture, and is far off only if the job is far too large"""

Verdict = Literal["fits", "fits_if", "does_not_fit"]
Source = Literal["simulation", "formula"]
Simulate = Callable[[JobSpec, int, bool], Memory | None]
"""The memory of a job with so many tokens at a time, recomputed or not; None when it cannot be simulated (any more)"""


@dataclass(frozen=True)
class Choice:
    """A way to run the job; the maths of a step are the same with each."""

    micro_batch_tokens: int
    gradient_checkpointing: bool
    optimizer: Literal["resident", "paged"] = "resident"
    """Where its state is while the rest of the step runs: on the device, or in host memory"""


@dataclass(frozen=True)
class Question:
    """A job on a model and a device."""

    shape: ModelShape
    spec: JobSpec
    device: Device
    longest_tokens: int
    """The longest row that there is, or may be"""
    factor: float = 1.0
    """What predictions are multiplied with: by so much jobs on this device took more"""

    def estimated(self, tokens: int, checkpointing: bool) -> Memory:
        """By the formula."""
        return memory(
            self.shape,
            self.spec,
            micro_batch_tokens=tokens,
            checkpointing=checkpointing,
            cuda=self.device.cuda,
            longest_tokens=self.longest_tokens,
            compute_dtype=self.device.compute_dtype,
        )

    def needed_bytes(self, memory: Memory, choice: Choice) -> int:
        """What has to be free for it, beside context and workspace."""
        resident = memory.host if choice.optimizer == "resident" else 0
        return int((memory.reserved + resident) * self.factor)

    @property
    def formula_holds(self) -> bool:
        """Whether the formula was fitted to such models."""
        return self.shape.model_type in FAST_LAYERS and self.shape.experts == 1

    def settings(self) -> Iterator[tuple[int, bool]]:
        """Tokens at a time and recomputation, the fastest first; what the user set is all there is of it."""
        training = self.spec.training
        recomputed = training.gradient_checkpointing
        ways = (False, True) if recomputed == "auto" else (recomputed,)
        if isinstance(self.spec.adapter, PrefixTuning):
            ways = (False,)  # its keys and values pass through a cache, which recomputation would lose
        for way in ways:
            for tokens in self._budgets():
                yield tokens, way

    def _budgets(self) -> list[int]:
        training = self.spec.training
        if training.micro_batch_tokens != "auto" or not self.device.cuda:
            return [training.resolved_micro_batch_tokens]
        # A row is never cut: less than the longest gains nothing. Nor does more than a step holds.
        example = longest_example_tokens(self.spec, self.longest_tokens)
        whole_step = example * training.batch_size
        return sorted({max(example, min(budget, whole_step)) for budget in BUDGETS}, reverse=True)


@dataclass(frozen=True)
class Fit:
    """The fastest setting that fits; if none does, the one that needs least."""

    fits: bool
    choice: Choice
    memory: Memory
    needed_bytes: int
    source: Source
    is_sure: bool
    """Whether the prediction's error cannot change the verdict"""


def fastest_fit(question: Question, simulate: Simulate | None = None) -> Fit:
    """The fastest setting that fits, or the one that needs least.

    By the formula, which is instant. A setting that fits whatever the formula's error goes before a faster one about
    which it cannot decide; where there is none, `simulate` is asked about those.
    """
    by_formula = list(_fits(question))
    if (sure := next((fit for fit in by_formula if fit.fits and fit.is_sure), None)) is not None:
        return sure
    looked_at = by_formula if simulate is None else list(_simulated(question, by_formula, simulate))
    return next((fit for fit in looked_at if fit.fits), None) or min(looked_at, key=lambda fit: fit.needed_bytes)


def fitting_choices(question: Question) -> list[Choice]:
    """Every setting that fits by the formula: those that surely do first, then the others, each from the fastest on."""
    found: dict[tuple[int, bool], Choice] = {}
    for fit in sorted(_fits(question), key=lambda fit: not fit.is_sure):
        if fit.fits:
            found.setdefault((fit.choice.micro_batch_tokens, fit.choice.gradient_checkpointing), fit.choice)
    return list(found.values())


def chosen(question: Question, holds: Callable[[int], bool]) -> Choice:
    """How to run the job: the fastest setting that fits, or the one that needs least.

    `holds(tokens)` is whether the device was measured to hold the activations of so many tokens; where recomputation is
    left to "auto", it has the last word on doing without.
    """
    for choice in fitting_choices(question):
        together = max(choice.micro_batch_tokens, longest_example_tokens(question.spec, question.longest_tokens))
        if choice.gradient_checkpointing or question.spec.training.gradient_checkpointing is False or holds(together):
            return choice
    return fastest_fit(question).choice


def longest_example_tokens(spec: JobSpec, longest_tokens: int) -> int:
    """Of the largest example that is never cut: a row, or both sides of a pair."""
    return largest_step(spec, micro_batch_tokens=1, longest_tokens=longest_tokens).tokens


def _fits(question: Question) -> Iterator[Fit]:
    """Every setting by the formula, the fastest first."""
    for tokens, recomputed in question.settings():
        found = question.estimated(tokens, recomputed)
        for choice in _choices(tokens, recomputed, found):
            needed = question.needed_bytes(found, choice)
            fits = needed <= question.device.usable_bytes
            yield Fit(fits, choice, found, needed, "formula", is_sure=not _is_doubtful(question, needed))


def _simulated(question: Question, by_formula: Sequence[Fit], simulate: Simulate) -> Iterator[Fit]:
    """The same, those simulated about which the formula cannot decide, until one fits."""
    for fit in by_formula:
        tokens, recomputed = fit.choice.micro_batch_tokens, fit.choice.gradient_checkpointing
        found = None if fit.is_sure else simulate(question.spec, tokens, recomputed)
        if found is None:
            yield fit
            continue
        needed = question.needed_bytes(found, fit.choice)
        fits = needed <= question.device.usable_bytes
        yield Fit(fits, fit.choice, found, needed, "simulation", is_sure=True)
        if fits:
            return


def _choices(tokens: int, recomputed: bool, found: Memory) -> list[Choice]:
    resident = Choice(tokens, recomputed)
    return [resident, replace(resident, optimizer="paged")] if found.host else [resident]


def _is_doubtful(question: Question, needed_bytes: int) -> bool:
    """Whether the formula's error could change the verdict."""
    usable = question.device.usable_bytes
    if question.formula_holds:
        return abs(needed_bytes - usable) <= FORMULA_ERROR * needed_bytes + SEGMENTS_BYTES
    return needed_bytes <= usable * (1 + UNFIT_ERROR)


def surely_fits(question: Question) -> bool:
    """Whether the job fits whatever the formula's error; of models it was not fitted to, whether it fits by it."""
    return any(fit.fits and (fit.is_sure or not question.formula_holds) for fit in _fits(question))


def with_changes(spec: JobSpec, changes: dict[str, Any]) -> JobSpec:
    """The spec with other values at these dotted fields. Raises: ValidationError, when they contradict the rest."""
    document = spec.model_dump(mode="json", exclude_unset=True)
    for place, value in changes.items():
        group, _, name = place.partition(".")
        document.setdefault(group, {})[name] = value
    return JobSpec.model_validate(document)
