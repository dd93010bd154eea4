"""How long jobs take on this machine: from its history, from a probe that was timed, or not known yet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Connection

from qlora_service.planning.cards import same_device
from qlora_service.planning.time.duration import Kind, Measurement, Work, estimate, estimate_from_probe
from qlora_service.specs import JobSpec
from qlora_service.store.history import measured_on
from qlora_service.store.probes import ask_for, find_probe

PROBED_TRAINING = {"batch_size", "optim", "neftune_noise_alpha"}
"""Of `Training`, what a step's time and memory depend on; lengths and budgets are given apart"""


@dataclass(frozen=True)
class TimeQuestion:
    """A job, and what it is to run on: what its time is asked of."""

    spec: JobSpec
    base_weights_sha256: str
    work: Work
    micro_batch_tokens: int
    checkpointing: bool
    longest_tokens: int
    device: str
    """What the hardware calls itself"""
    cuda: bool

    @property
    def kind(self) -> Kind:
        return Kind.of(
            self.spec, self.work, micro_batch_tokens=self.micro_batch_tokens, checkpointing=self.checkpointing
        )

    def probe_request(self) -> dict[str, Any]:
        """What `workers.probe` has to know; in JSON."""
        spec = self.spec.model_dump(mode="json", include={"base_model", "quantization", "adapter", "objective"})
        spec["training"] = self.spec.training.model_dump(mode="json", include=PROBED_TRAINING)
        return {
            "spec": spec,
            "base_weights_sha256": self.base_weights_sha256,
            "micro_batch_tokens": self.micro_batch_tokens,
            "checkpointing": self.checkpointing,
            "longest_tokens": self.longest_tokens,
            "device": "cuda" if self.cuda else "cpu",
        }

    def probe_key(self) -> str:
        """The same for every job whose probe would be the same: the base by its weights, not by its name."""
        request = self.probe_request()
        request["spec"] = {**request["spec"], "base_model": None}
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def job_time(connection: Connection, question: TimeQuestion) -> dict[str, Any]:
    """An `Estimate` as JSON values; where nothing is known, `seconds` is null and `reason` says why.

    A job of the same kind on this device says most, then a probe of this very step, then any job on the same base.
    """
    history = measurements(connection, question.base_weights_sha256, question.device)
    found = estimate(question.work, question.kind, history)
    if found is None or found.basis == "similar":
        probe = find_probe(connection, question.probe_key())
        result = None if probe is None else probe.result
        if result is not None and same_device(str(result.get("device")), question.device):
            found = estimate_from_probe(question.work, result, history)
        elif found is None and result is not None and "error" in result:
            return _unknown(question.work, f"its step could not be timed: {result['error']}")
        elif found is None and probe is not None and result is None:
            return _unknown(question.work, "its step waits to be timed, as soon as a slot is free")
    if found is None:
        where = f"{question.spec.base_model} on {question.device}"
        return _unknown(question.work, f"no job on {where} has ended yet: ask for a probe to have a step timed")
    return found.as_dict()


def wants_probe(time: dict[str, Any]) -> bool:
    """Whether a probe would tell more than what `job_time` said."""
    return time.get("basis") not in ("history", "probe")


def ask_probe(connection: Connection, question: TimeQuestion, now: datetime) -> None:
    """Have the question's longest step timed when a slot is free; nothing changes where that was asked before."""
    ask_for(connection, question.probe_key(), question.probe_request(), now)


def measurements(connection: Connection, base_weights_sha256: str, device: str) -> list[Measurement]:
    """What the newest jobs on the base took on the device, newest first."""
    return readable(measured_on(connection, base_weights_sha256), device)


def readable(stored: Sequence[dict[str, Any]], device: str) -> list[Measurement]:
    """Of what jobs measured, all that was on the device and this version understands."""
    there = [measured for measured in stored if same_device(str(measured.get("device")), device)]
    return [found for found in map(Measurement.from_dict, there) if found is not None]


def _unknown(work: Work, reason: str) -> dict[str, Any]:
    return {"seconds": None, "reason": reason, "steps": work.steps, "tokens": work.tokens}
