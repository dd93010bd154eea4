"""Observed over predicted memory and time, by device. Pure arithmetic on the measurements of jobs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_service.planning.cards import same_device
from qlora_service.planning.margins import Distribution, margin


@dataclass(frozen=True)
class Accuracy:
    """Distributions of observed over predicted, for the jobs on one device; None where no job has both values."""

    device: str
    jobs: int
    allocated: Distribution | None
    """Peak bytes of tensors"""
    reserved: Distribution | None
    """Peak bytes held by torch's allocator; on CUDA"""
    time: Distribution | None
    """Seconds of the whole job, for jobs that had an estimate at submission"""
    eta: Distribution | None
    """Seconds from the first step to the end, for jobs that had an estimate at their first step"""
    margin: float
    """Factor on predicted bytes for the next jobs"""


def accuracies(measured: Iterable[Mapping[str, Any]]) -> list[Accuracy]:
    """The accuracy on each device that jobs have run on, sorted by device name."""
    by_device: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for job in measured:
        if isinstance(job.get("device"), str):
            by_device[job["device"]].append(job)
    return [_accuracy(device, by_device[device]) for device in sorted(by_device)]


def learned_margin(device: str, measured: Iterable[Mapping[str, Any]]) -> float:
    """The factor on predicted bytes for the device."""
    return margin(_memory_ratios([job for job in measured if same_device(str(job.get("device")), device)]))


def _accuracy(device: str, jobs: list[Mapping[str, Any]]) -> Accuracy:
    return Accuracy(
        device=device,
        jobs=len(jobs),
        allocated=Distribution.of(_ratios(jobs, "memory", "allocated")),
        reserved=Distribution.of(_ratios(jobs, "memory", "reserved")),
        time=Distribution.of(_ratios(jobs, "time", "seconds")),
        eta=Distribution.of(_ratios(jobs, "eta", "seconds")),
        margin=round(margin(_memory_ratios(jobs)), 4),
    )


def _memory_ratios(jobs: list[Mapping[str, Any]]) -> list[float]:
    """Ratios of reserved bytes, which have to be free on a GPU; of allocated bytes on a CPU."""
    return _ratios(jobs, "memory", "reserved") or _ratios(jobs, "memory", "allocated")


def _ratios(jobs: list[Mapping[str, Any]], group: str, figure: str) -> list[float]:
    """Observed over predicted, for the jobs that have both."""
    groups = [
        ((job.get("actual") or {}).get(group) or {}, (job.get("predicted") or {}).get(group) or {}) for job in jobs
    ]
    pairs = [(actual.get(figure), predicted.get(figure)) for actual, predicted in groups]
    return [actual / predicted for actual, predicted in pairs if actual and predicted]
