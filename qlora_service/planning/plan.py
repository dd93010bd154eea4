"""A plan: whether a job fits, how it would run, what it takes, and why. Pure, but for simulations handed in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from qlora_service.planning.cards import Device
from qlora_service.planning.fit import Choice, Fit, Question, Simulate, Source, Verdict, fastest_fit
from qlora_service.planning.memory import GIB, MIB, Category, Memory
from qlora_service.planning.remedies import Changes, Largest, alternatives, largest
from qlora_service.planning.storage import Storage, storage
from qlora_service.specs import Quantization

FoundBy = Literal["name", "nvml", "cpu", "setting"]
"""How the device is known: named in the request, asked from the driver, this machine's CPU, or QLORA_PLAN_DEVICE"""
FULL_BYTES_PER_PARAMETER = 16
"""Weights and gradients in 16 bits; AdamW's moments and master weights in 32 (arXiv:1910.02054, section 3.1)"""
OF_A_STEP = (Category.ACTIVATIONS, Category.RECOMPUTATION, Category.LOGITS, Category.WORKSPACE)


@dataclass(frozen=True)
class Plan:
    """What is known of a job before it runs. Bytes are what torch's allocator needs, where nothing else is said."""

    verdict: Verdict
    reason: str
    device: Device
    found_by: FoundBy
    free_now_bytes: int | None
    """Of the device, while others may be using it"""
    settings: Choice
    """The fastest that fits; if none does, the one that needs least"""
    longest_tokens: int
    memory: Memory
    factor: float
    """What this is multiplied with: by so much jobs on this device took more"""
    needed_bytes: int
    usable_bytes: int
    source: Source
    is_sure: bool
    """Whether the prediction's error cannot change the verdict"""
    alternatives: Sequence[Changes]
    largest: Largest | None
    """Of a job that does not fit as it is"""
    storage: Storage
    bf16_lora_bytes: int
    """The same job on a base that is not quantized"""
    full_fine_tuning_bytes: int
    """The same steps, with every weight trained"""
    notes: Sequence[str] = ()
    time: Mapping[str, Any] | None = field(default=None)
    """How long it takes; None when nothing is known of this base on this device"""

    @property
    def free_bytes(self) -> int:
        """What is left of the device's memory; below 0, what is missing."""
        return self.usable_bytes - self.needed_bytes

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        told = asdict(self)
        for name in ("found_by", "free_now_bytes", "factor", "needed_bytes", "usable_bytes"):
            del told[name]  # they stand beside what they are of
        return told | {
            "device": self.device.as_dict() | {"found_by": self.found_by, "free_now_bytes": self.free_now_bytes},
            "memory": {
                "categories": {str(category): size for category, size in self.memory.categories.items()},
                "allocated": self.memory.allocated,
                "reserved": self.memory.reserved,
                "optimizer_host": self.memory.host,
                "factor": self.factor,
                "needed": self.needed_bytes,
                "context": self.device.context_bytes,
                "usable": self.usable_bytes,
                "free": self.free_bytes,
            },
            "trained_parameters": self.memory.trained_parameters,
            "alternatives": list(self.alternatives),
            "notes": list(self.notes),
        }


def make_plan(
    question: Question,
    *,
    found_by: FoundBy,
    free_now_bytes: int | None = None,
    simulate: Simulate | None = None,
    rows: int = 0,
    total_steps: int = 0,
) -> Plan:
    """The plan of a job over so many rows and steps, as far as they are known."""
    fit = fastest_fit(question, simulate)
    changes = [] if fit.fits else alternatives(question)
    verdict: Verdict = "fits" if fit.fits else "fits_if" if changes else "does_not_fit"
    limits = None if fit.fits else largest(question)
    return Plan(
        verdict=verdict,
        reason=_reason(question, fit, changes, limits),
        device=question.device,
        found_by=found_by,
        free_now_bytes=free_now_bytes,
        settings=fit.choice,
        longest_tokens=question.longest_tokens,
        memory=fit.memory,
        factor=question.factor,
        needed_bytes=fit.needed_bytes,
        usable_bytes=question.device.usable_bytes,
        source=fit.source,
        is_sure=fit.is_sure,
        alternatives=changes,
        largest=limits,
        storage=storage(question, fit, rows=rows, total_steps=total_steps),
        bf16_lora_bytes=_unquantized(question, fit.choice).reserved,
        full_fine_tuning_bytes=_full_fine_tuning_bytes(question, fit.choice),
    )


def with_notes(plan: Plan, notes: Sequence[str]) -> Plan:
    """The plan, with what else there is to say about it."""
    return replace(plan, notes=(*plan.notes, *notes))


def _unquantized(question: Question, choice: Choice) -> Memory:
    """In bfloat16, also where the device has none: that is what such a job is compared with."""
    spec = question.spec.model_copy(update={"quantization": Quantization(type="none")})
    device = replace(question.device, bf16=True)
    return replace(question, spec=spec, device=device).estimated(
        choice.micro_batch_tokens, choice.gradient_checkpointing
    )


def _full_fine_tuning_bytes(question: Question, choice: Choice) -> int:
    categories = _unquantized(question, choice).categories
    passing = sum(categories[category] for category in OF_A_STEP)
    return question.shape.parameters * FULL_BYTES_PER_PARAMETER + passing


def _reason(question: Question, fit: Fit, changes: Sequence[Changes], limits: Largest | None) -> str:
    needs = in_words(fit.needed_bytes)
    has = f"{question.device.name} has {in_words(question.device.usable_bytes)} for it"
    if fit.fits:
        return f"the job needs {needs}, {has}: {_way(fit.choice)}"
    largest_term = f"{fit.memory.largest} alone take {in_words(fit.memory.categories[fit.memory.largest])}"
    if changes:
        offers = "; or ".join(_words(change) for change in changes)
        return f"the job needs {needs}, {has}, and {largest_term}: set {offers}"
    assert limits is not None
    model = f"take a smaller base model, {limits.model} at most" if limits.model else "take a larger device"
    return (
        f"the job needs {needs} at least, {has}, and {largest_term}. No length and no setting changes that, nor does "
        f"batch_size, whose examples are computed a few at a time: {model}"
    )


def _way(choice: Choice) -> str:
    """The settings in words."""
    recomputed = "recomputed" if choice.gradient_checkpointing else "kept"
    paged = "; the optimizer's state in host memory" if choice.optimizer == "paged" else ""
    return f"{choice.micro_batch_tokens} tokens at a time, activations {recomputed}{paged}"


def _words(changes: Changes) -> str:
    return " and ".join(f"{field} to {value}{' or less' * (field.endswith('tokens') and value != 'auto')}"
                        for field, value in changes.items())  # fmt: skip


def in_words(size: int) -> str:
    """Such as 17.5 GiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"
