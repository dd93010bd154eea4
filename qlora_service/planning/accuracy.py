"""How near predictions came to what jobs took, by device. Pure arithmetic on what jobs recorded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_service.planning.cards import same_device
from qlora_service.planning.margins import Distribution, margin


@dataclass(frozen=True)
class Accuracy:
    """Of the jobs on one device: distributions of actual over predicted; None of what no job has both of."""

    device: str
    jobs: int
    allocated: Distribution | None
    """The most bytes of tensors"""
    reserved: Distribution | None
    """What torch's allocator held at most; on CUDA"""
    time: Distribution | None
    """Seconds, over those that were predicted when the job was posted"""
    eta: Distribution | None
    """Seconds from the first step to the end, over those that were promised then"""
    margin: float
    """What predicted bytes are multiplied with from now on"""


def accuracies(measured: Iterable[Mapping[str, Any]]) -> list[Accuracy]:
    """One for each device that jobs have run on, by name."""
    by_device: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for job in measured:
        if isinstance(job.get("device"), str):
            by_device[job["device"]].append(job)
    return [_of(device, by_device[device]) for device in sorted(by_device)]


def learned_margin(device: str, measured: Iterable[Mapping[str, Any]]) -> float:
    """What predicted bytes are multiplied with on the device."""
    return margin(_needed([job for job in measured if same_device(str(job.get("device")), device)]))


def _of(device: str, jobs: list[Mapping[str, Any]]) -> Accuracy:
    return Accuracy(
        device=device,
        jobs=len(jobs),
        allocated=Distribution.of(_ratios(jobs, "memory", "allocated")),
        reserved=Distribution.of(_ratios(jobs, "memory", "reserved")),
        time=Distribution.of(_ratios(jobs, "time", "seconds")),
        eta=Distribution.of(_ratios(jobs, "eta", "seconds")),
        margin=round(margin(_needed(jobs)), 4),
    )


def _needed(jobs: list[Mapping[str, Any]]) -> list[float]:
    """What has to be there is what the allocator reserves; on a CPU, what is allocated."""
    return _ratios(jobs, "memory", "reserved") or _ratios(jobs, "memory", "allocated")


def _ratios(jobs: list[Mapping[str, Any]], what: str, figure: str) -> list[float]:
    """Actual over predicted, of the jobs that have both."""
    pairs = [((job.get("actual") or {}).get(what) or {}, (job.get("predicted") or {}).get(what) or {}) for job in jobs]
    both = [(actual.get(figure), predicted.get(figure)) for actual, predicted in pairs]
    return [actual / predicted for actual, predicted in both if actual and predicted]
