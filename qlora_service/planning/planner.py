"""Plans for jobs on this machine or on a named card: queries the hardware, and runs simulations."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from qlora_service.errors import Finding, InvalidModel, InvalidRequest, InvalidSpec
from qlora_service.planning.attachment import PLAIN_MODELS, Attachment
from qlora_service.planning.cards import Device, named_device
from qlora_service.planning.fit import FitQuestion
from qlora_service.planning.hardware import gpus, has_torch, this_cpu
from qlora_service.planning.memory import Memory
from qlora_service.planning.plan import FoundBy, Plan, make_plan, with_attachment, with_notes
from qlora_service.planning.shapes import ModelShape
from qlora_service.planning.simulation.run import CannotSimulate, Simulator
from qlora_service.specs import JobSpec, TargetedAdapter

log = structlog.get_logger(__name__)

AUTO, UNKNOWN = "auto", "unknown"
SIMULATION_TIMEOUT_S = 8.0
"""A simulation takes 4 to 7 s on one core; a longer one is not worth the wait"""
SIMULATIONS_PER_PLAN = 2
ATTACHMENT_TIMEOUT_S = 30.0
"""Attaching takes 6 to 8 s on one core; without the result, a job that cannot be attached is not refused"""
RETRY_S = 60.0
"""Age of an attachment that could not be found out, after which it is tried again"""
LOCK_TIMEOUT_S = 1.0
"""Wait of a plan for the simulation of another: two at once would slow down each other and the trainer"""


@dataclass(frozen=True)
class FoundDevice:
    """The device that a job is planned for, and its origin."""

    device: Device
    found_by: FoundBy
    free_now_bytes: int | None = None


class Planner:
    """Makes plans; safe to share between threads."""

    def __init__(self, machine: str = AUTO, cache_dir: Path | None = None) -> None:
        """`machine` is the device of the trainers: AUTO to query it, UNKNOWN, or a name for `cards.named_device`.

        Simulations are stored in `cache_dir`.

        Raises:
            InvalidRequest: there is no device of this name.
        """
        self._machine: FoundDevice | None = None
        self._queries_hardware = machine == AUTO
        if machine not in {AUTO, UNKNOWN}:
            self._machine = FoundDevice(named_device(machine), "setting")
        self._cache_dir = cache_dir
        self._simulation_lock = threading.Lock()
        self._last_attachment: tuple[str, Attachment, float] | None = None
        """Key, result and time of the newest one: a job asks for it twice"""

    def machine(self) -> FoundDevice | None:
        """The device of this service's trainers, the smallest of several GPUs; None when it is unknown.

        GPUs are queried once, because their size does not change.
        """
        if self._machine is None and self._queries_hardware:
            found = _query_hardware()
            if found is None or found.found_by == "cpu":
                return found
            self._machine = replace(found, free_now_bytes=None)
        return self._machine

    def device(self, name: str | None, free_bytes: int | None = None) -> FoundDevice:
        """The named card, or the device of this service's trainers, with at most `free_bytes` of its memory.

        Raises:
            InvalidRequest: there is no device of this name, or the trainers' device is unknown.
        """
        if name is not None:
            found: FoundDevice | None = FoundDevice(named_device(name), "name")
        else:
            found = _query_hardware() if self._queries_hardware else self._machine
        if found is None:
            raise InvalidRequest(
                "the device that jobs run on is unknown: name a device, such as RTX 3090 or 24GB, or start the API "
                "with QLORA_PLAN_DEVICE set to the device of the workers",
                location="/device",
            )
        return found if free_bytes is None else replace(found, device=replace(found.device, free_bytes=free_bytes))

    def attachment(self, config: Mapping[str, Any], spec: JobSpec) -> Attachment | None:
        """What the job's adapter changes in a base, and what stays without an adapter.

        None for bases of which every linear layer can be adapted, and for methods without target modules.

        Raises:
            InvalidSpec: the adapter cannot be attached to the base.
        """
        if config.get("model_type") in PLAIN_MODELS or not isinstance(spec.adapter, TargetedAdapter):
            return None
        key = f"{spec.adapter!r} {spec.quantization!r} {config!r}"
        last = self._last_attachment
        if last is None or last[0] != key or (last[1].unchecked and time.monotonic() > last[2] + RETRY_S):
            self._last_attachment = last = (key, self._attached(config, spec), time.monotonic())
        attachment = last[1]
        if attachment.refusal is not None:
            raise InvalidSpec(attachment.refusal, location=attachment.location, findings=attachment.findings)
        return attachment

    def plan(
        self,
        config: Mapping[str, Any],
        spec: JobSpec,
        found: FoundDevice,
        *,
        longest_tokens: int | None = None,
        factor: float = 1.0,
        rows: int = 0,
        total_steps: int = 0,
        simulates: bool = True,
    ) -> Plan:
        """The plan of a job on the model of a config.json; without `longest_tokens`, for rows of the maximum length.

        Raises:
            InvalidModel: the config lacks a size.
            InvalidSpec: the adapter cannot be attached to the model.
        """
        shape = shape_of(config)
        attachment = self.attachment(config, spec)
        question = FitQuestion(shape, spec, found.device, longest_tokens or shape.longest_tokens(spec), factor)
        simulations = _Simulations(
            config, found.device, question.longest_tokens, self._cache_dir, self._simulation_lock
        )
        plan = make_plan(
            question,
            found_by=found.found_by,
            free_now_bytes=found.free_now_bytes,
            simulate=simulations if simulates else None,
            rows=rows,
            total_steps=total_steps,
        )
        plan = with_notes(plan, [*simulations.notes, *_uncertainty_notes(plan, question)])
        return plan if attachment is None else with_attachment(plan, attachment)

    def _attached(self, config: Mapping[str, Any], spec: JobSpec) -> Attachment:
        if not has_torch():
            return Attachment(unchecked="torch is not installed here")
        try:
            return Simulator(ATTACHMENT_TIMEOUT_S, self._cache_dir).attach(config, spec)
        except CannotSimulate as error:
            log.warning("adapter_not_checked", model_type=config.get("model_type"), reason=error.reason)
            return Attachment(unchecked=error.reason)


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shapes in an untrusted config.json.

    Raises:
        InvalidModel: a size is missing, has the wrong type, or is out of range.
    """
    try:
        _Sizes.model_validate(config)
    except ValidationError as error:
        findings = [
            Finding(fault["msg"], pointer="/config/" + "/".join(map(str, fault["loc"]))) for fault in error.errors()
        ]
        raise InvalidModel(
            f"config.json cannot be used for a plan: {findings[0]}", location="/config", findings=findings
        ) from None
    shape = ModelShape.from_config(config)
    if shape.head_dim < 1:
        raise InvalidModel(
            f"config.json has {shape.heads} heads in {shape.hidden} features: every head needs at least one",
            location="/config",
        )
    return shape


class _Sizes(BaseModel):
    """The sizes in a config.json, with their types and with upper bounds above any real model."""

    model_config = ConfigDict(extra="ignore")

    model_type: str = Field("", max_length=100)
    hidden_size: StrictInt | None = Field(None, ge=1, le=1_000_000)
    n_embd: StrictInt | None = Field(None, ge=1, le=1_000_000)
    d_model: StrictInt | None = Field(None, ge=1, le=1_000_000)
    num_hidden_layers: StrictInt | None = Field(None, ge=1, le=1000)
    n_layer: StrictInt | None = Field(None, ge=1, le=1000)
    num_layers: StrictInt | None = Field(None, ge=1, le=1000)
    num_attention_heads: StrictInt | None = Field(None, ge=1, le=10_000)
    n_head: StrictInt | None = Field(None, ge=1, le=10_000)
    num_heads: StrictInt | None = Field(None, ge=1, le=10_000)
    num_key_value_heads: StrictInt | None = Field(None, ge=1, le=10_000)
    head_dim: StrictInt | None = Field(None, ge=1, le=100_000)
    intermediate_size: StrictInt | None = Field(None, ge=1, le=10_000_000)
    moe_intermediate_size: StrictInt | None = Field(None, ge=1, le=10_000_000)
    n_inner: StrictInt | None = Field(None, ge=1, le=10_000_000)
    ffn_dim: StrictInt | None = Field(None, ge=1, le=10_000_000)
    vocab_size: StrictInt | None = Field(None, ge=1, le=100_000_000)
    num_local_experts: StrictInt | None = Field(None, ge=0, le=10_000)
    num_experts: StrictInt | None = Field(None, ge=0, le=10_000)
    n_routed_experts: StrictInt | None = Field(None, ge=0, le=10_000)
    text_config: _Sizes | None = None


@dataclass
class _Simulations:
    """The simulations of one plan, up to a limit; `notes` has the reason when one is not run."""

    config: Mapping[str, Any]
    device: Device
    longest_tokens: int
    cache_dir: Path | None
    lock: threading.Lock
    remaining: int = SIMULATIONS_PER_PLAN
    notes: list[str] = field(default_factory=list)

    def __call__(self, spec: JobSpec, tokens: int, recomputed: bool) -> Memory | None:
        if self.remaining == 0:
            return None
        self.remaining -= 1
        if not has_torch():
            self._stop("torch is not installed here")
            return None
        if not self.lock.acquire(timeout=LOCK_TIMEOUT_S):
            self._stop("other plans are being simulated")
            return None
        try:
            return Simulator(SIMULATION_TIMEOUT_S, self.cache_dir).simulate(
                self.config,
                spec,
                micro_batch_tokens=tokens,
                checkpointing=recomputed,
                longest_tokens=self.longest_tokens,
                cuda=self.device.cuda,
                compute_dtype=self.device.compute_dtype,
            )
        except CannotSimulate as error:
            self._stop(error.reason)
            return None
        finally:
            self.lock.release()

    def _stop(self, reason: str) -> None:
        self.remaining = 0
        self.notes.append(f"not simulated: {reason}")


def _query_hardware() -> FoundDevice | None:
    visible_gpus = gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
    if visible_gpus:
        smallest = min(visible_gpus, key=lambda gpu: gpu.device.total_bytes)
        return FoundDevice(smallest.device, "nvml", smallest.free_now_bytes)
    return FoundDevice(this_cpu(), "cpu") if has_torch() else None


def _uncertainty_notes(plan: Plan, question: FitQuestion) -> list[str]:
    """Reasons why the verdict may be wrong."""
    notes = []
    if plan.source == "formula" and not question.formula_holds:
        notes.append(f"the formula treats {question.shape.model_type or 'the model'} as a Llama model")
    if not plan.is_sure:
        notes.append("the prediction's error is larger than the remaining memory: request a probe to be sure")
    elif notes:
        notes.append("request a probe to be sure")
    return notes
