"""A plan: whether a job fits, its execution settings, its cost, and the reason. Pure except for `simulate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from qlora_service.planning.attachment import Attachment
from qlora_service.planning.cards import Device
from qlora_service.planning.fit import Choice, Fit, FitQuestion, Simulate, Source, Verdict, fastest_fit
from qlora_service.planning.memory import FLOAT32_BYTES, GIB, MIB, Category, Memory
from qlora_service.planning.remedies import Changes, Limits, alternatives, limits
from qlora_service.planning.storage import Storage, storage
from qlora_service.specs import Quantization

FoundBy = Literal["name", "nvml", "cpu", "setting"]
"""Origin of the device: named in the request, reported by the driver, this machine's CPU, or QLORA_PLAN_DEVICE"""
FULL_BYTES_PER_PARAMETER = 16
"""Weights and gradients in 16 bits; AdamW's moments and master weights in 32 (arXiv:1910.02054, section 3.1)"""
STEP_CATEGORIES = (Category.ACTIVATIONS, Category.RECOMPUTATION, Category.LOGITS, Category.WORKSPACE)


@dataclass(frozen=True)
class Plan:
    """The forecast of a job. Bytes are bytes reserved by torch's allocator, unless stated otherwise."""

    verdict: Verdict
    reason: str
    device: Device
    found_by: FoundBy
    free_now_bytes: int | None
    """Free bytes of the device at the moment; other processes may be using it"""
    settings: Choice
    """The fastest settings that fit; if none fit, the ones with the least memory"""
    longest_tokens: int
    memory: Memory
    factor: float
    """Factor on predicted bytes: observed over predicted memory on this device"""
    needed_bytes: int
    usable_bytes: int
    source: Source
    is_sure: bool
    """The error of the prediction cannot change the verdict"""
    alternatives: Sequence[Changes]
    largest: Limits | None
    """Limits of a job that does not fit unchanged"""
    storage: Storage
    bf16_lora_bytes: int
    """The same job on an unquantized base"""
    full_fine_tuning_bytes: int
    """The same steps with every weight trained"""
    notes: Sequence[str] = ()
    time: Mapping[str, Any] | None = field(default=None)
    """The job's duration; None when it was not estimated"""

    @property
    def free_bytes(self) -> int:
        """Usable bytes that remain; negative: bytes that are missing."""
        return self.usable_bytes - self.needed_bytes

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = asdict(self)
        for name in ("found_by", "free_now_bytes", "factor", "needed_bytes", "usable_bytes"):
            del values[name]  # part of `device` or `memory`
        return values | {
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
    question: FitQuestion,
    *,
    found_by: FoundBy,
    free_now_bytes: int | None = None,
    simulate: Simulate | None = None,
    rows: int = 0,
    total_steps: int = 0,
) -> Plan:
    """The plan of a job; `rows` and `total_steps` are 0 where they are unknown."""
    fit = fastest_fit(question, simulate)
    changes = [] if fit.fits else alternatives(question)
    verdict: Verdict = "fits" if fit.fits else "fits_if" if changes else "does_not_fit"
    largest = None if fit.fits else limits(question)
    return Plan(
        verdict=verdict,
        reason=_reason(question, fit, changes, largest),
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
        largest=largest,
        storage=storage(question, fit, rows=rows, total_steps=total_steps),
        bf16_lora_bytes=_unquantized_memory(question, fit.choice).reserved,
        full_fine_tuning_bytes=_full_fine_tuning_bytes(question, fit.choice),
    )


def with_attachment(plan: Plan, attachment: Attachment) -> Plan:
    """The plan with the counts of an adapter that was attached, and with a note on what it leaves out."""
    notes = [*([attachment.warning] if attachment.warning else []), *plan.notes]
    if attachment.unchecked:
        return replace(plan, notes=notes)
    adapter_bytes = FLOAT32_BYTES * attachment.stored_parameters
    return replace(
        plan,
        memory=replace(plan.memory, trained_parameters=attachment.trained_parameters),
        storage=replace(plan.storage, adapter_bytes=adapter_bytes),
        notes=notes,
    )


def with_notes(plan: Plan, notes: Sequence[str]) -> Plan:
    """The plan with additional notes."""
    return replace(plan, notes=(*plan.notes, *notes))


def _unquantized_memory(question: FitQuestion, choice: Choice) -> Memory:
    """Memory with an unquantized base in bfloat16, which is the usual comparison even for devices without bfloat16."""
    spec = question.spec.model_copy(update={"quantization": Quantization(type="none")})
    device = replace(question.device, bf16=True)
    return replace(question, spec=spec, device=device).estimated_memory(
        choice.micro_batch_tokens, choice.gradient_checkpointing
    )


def _full_fine_tuning_bytes(question: FitQuestion, choice: Choice) -> int:
    categories = _unquantized_memory(question, choice).categories
    step_bytes = sum(categories[category] for category in STEP_CATEGORIES)
    return question.shape.parameters * FULL_BYTES_PER_PARAMETER + step_bytes


def _reason(question: FitQuestion, fit: Fit, changes: Sequence[Changes], largest: Limits | None) -> str:
    """The verdict in words, with the remedy where the job does not fit."""
    needed = _readable_size(fit.needed_bytes)
    available = f"{question.device.name} has {_readable_size(question.device.usable_bytes)} available"
    if fit.fits:
        return f"the job needs {needed}, {available}: {_readable_choice(fit.choice)}"
    category = fit.memory.largest_category
    largest_term = f"{category} alone take {_readable_size(fit.memory.categories[category])}"
    if changes:
        options = "; or ".join(_readable_changes(change) for change in changes)
        return f"the job needs {needed}, {available}, and {largest_term}: set {options}"
    assert largest is not None
    remedy = f"choose a smaller base model, {largest.model} at most" if largest.model else "choose a larger device"
    return (
        f"the job needs at least {needed}, {available}, and {largest_term}. No other settings and no shorter rows make "
        f"it fit, and a smaller batch_size does not help, because batches are split into micro-batches: {remedy}"
    )


def _readable_choice(choice: Choice) -> str:
    activations = "recomputed" if choice.gradient_checkpointing else "kept"
    paged = ", optimizer state in host memory" if choice.optimizer == "paged" else ""
    return f"micro-batches of {choice.micro_batch_tokens} tokens, activations {activations}{paged}"


def _readable_changes(changes: Changes) -> str:
    return " and ".join(f"{field} to {value}{' or less' * (field.endswith('tokens') and value != 'auto')}"
                        for field, value in changes.items())  # fmt: skip


def _readable_size(size: int) -> str:
    """The size with a unit, such as 17.5 GiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"
