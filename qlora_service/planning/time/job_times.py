"""Durations of jobs on this machine, from finished jobs or from a probe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Connection

from qlora_service.planning.cards import same_device
from qlora_service.planning.largest_step import STEP_FIELDS
from qlora_service.planning.time.duration import Kind, Measurement, Work, estimate, estimate_from_probe
from qlora_service.specs import JobSpec
from qlora_service.store.history import measured_on
from qlora_service.store.probes import find_probe, insert_probe


@dataclass(frozen=True)
class TimeQuestion:
    """A job on a device, whose duration is to be estimated."""

    spec: JobSpec
    base_weights_sha256: str
    work: Work
    micro_batch_tokens: int
    checkpointing: bool
    longest_tokens: int
    device: str
    """Name reported by the hardware"""
    cuda: bool

    @property
    def kind(self) -> Kind:
        return Kind.of(
            self.spec, self.work, micro_batch_tokens=self.micro_batch_tokens, checkpointing=self.checkpointing
        )

    def probe_request(self) -> dict[str, Any]:
        """The request for `workers.probe`, as JSON values."""
        spec = self.spec.model_dump(mode="json", include={"base_model", "quantization", "adapter", "objective"})
        spec["training"] = self.spec.training.model_dump(mode="json", include=STEP_FIELDS)
        return {
            "spec": spec,
            "base_weights_sha256": self.base_weights_sha256,
            "micro_batch_tokens": self.micro_batch_tokens,
            "checkpointing": self.checkpointing,
            "longest_tokens": self.longest_tokens,
            "device": "cuda" if self.cuda else "cpu",
        }

    def probe_key(self) -> str:
        """The same key for all jobs with the same probe; the base counts by its weights, not by its name."""
        request = self.probe_request()
        request["spec"] = {**request["spec"], "base_model": None}
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def job_time(connection: Connection, question: TimeQuestion) -> dict[str, Any]:
    """An `Estimate` as JSON values; without a basis, `seconds` is null and `reason` tells why.

    The best basis is a job of the same kind on this device, then a probe of the same step, then any job on the base.
    """
    history = measurements(connection, question.base_weights_sha256, question.device)
    estimated = estimate(question.work, question.kind, history)
    if estimated is None or estimated.basis == "similar":
        probe = find_probe(connection, question.probe_key())
        result = None if probe is None else probe.result
        if result is not None and same_device(str(result.get("device")), question.device):
            estimated = estimate_from_probe(question.work, result, history)
        elif estimated is None and result is not None and "error" in result:
            return _unknown(question.work, f"its step could not be timed: {result['error']}")
        elif estimated is None and probe is not None and result is None:
            return _unknown(question.work, "its step will be timed when a slot is free")
    if estimated is None:
        reason = f"no job on {question.spec.base_model} has ended on {question.device} yet"
        return _unknown(question.work, f"{reason}: request a probe to time a step")
    return estimated.as_dict()


def wants_probe(time: dict[str, Any]) -> bool:
    """Whether a probe would improve on the answer of `job_time`."""
    return time.get("basis") not in ("history", "probe")


def request_probe(connection: Connection, question: TimeQuestion, now: datetime) -> None:
    """Requests a timing of the question's largest step on a free slot; no effect if it was requested before."""
    insert_probe(connection, question.probe_key(), question.probe_request(), now)


def measurements(connection: Connection, base_weights_sha256: str, device: str) -> list[Measurement]:
    """The measurements of the newest jobs on the base and the device, newest first."""
    return parse_history(measured_on(connection, base_weights_sha256), device)


def parse_history(stored: Sequence[dict[str, Any]], device: str) -> list[Measurement]:
    """The stored measurements from the device in this version's format."""
    on_device = [measured for measured in stored if same_device(str(measured.get("device")), device)]
    return [parsed for parsed in map(Measurement.from_dict, on_device) if parsed is not None]


def _unknown(work: Work, reason: str) -> dict[str, Any]:
    return {"seconds": None, "reason": reason, "steps": work.steps, "tokens": work.tokens}
