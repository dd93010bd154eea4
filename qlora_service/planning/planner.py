"""Plans for jobs on this machine or on a named card: looks at the hardware, and has simulations made."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from qlora_service.errors import Finding, InvalidModel, InvalidRequest
from qlora_service.planning.cards import Device, named_device
from qlora_service.planning.fit import Question
from qlora_service.planning.hardware import Gpu, gpus, this_cpu, trains_here
from qlora_service.planning.memory import Memory
from qlora_service.planning.plan import FoundBy, Plan, make_plan, with_notes
from qlora_service.planning.shapes import ModelShape
from qlora_service.planning.simulation.run import CannotSimulate, Simulator
from qlora_service.specs import JobSpec

AUTO, UNKNOWN = "auto", "unknown"
SIMULATION_S = 8.0
"""A simulation takes 4 to 7 s on one core; what takes longer is not worth waiting for"""
SIMULATIONS = 2
"""For one plan"""
PATIENCE_S = 1.0
"""How long a plan waits for another's simulation: they would slow each other, and the trainer"""


@dataclass(frozen=True)
class FoundDevice:
    """What a job is planned for, and how it is known."""

    device: Device
    found_by: FoundBy
    free_now_bytes: int | None = None


class _Sizes(BaseModel):
    """The figures of a config.json that shapes are made of: of these kinds, and no larger than any model's."""

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
    """Those of one plan, up to so many; `notes` says why there are no more."""

    config: Mapping[str, Any]
    device: Device
    longest_tokens: int
    cache_dir: Path | None
    turn: threading.Lock
    left: int = SIMULATIONS
    notes: list[str] = field(default_factory=list)

    def __call__(self, spec: JobSpec, tokens: int, recomputed: bool) -> Memory | None:
        if self.left == 0:
            return None
        self.left -= 1
        if not trains_here():
            self._give_up("torch is not installed here")
            return None
        if not self.turn.acquire(timeout=PATIENCE_S):
            self._give_up("other plans are being simulated")
            return None
        try:
            return Simulator(SIMULATION_S, self.cache_dir).simulate(
                self.config,
                spec,
                micro_batch_tokens=tokens,
                checkpointing=recomputed,
                longest_tokens=self.longest_tokens,
                cuda=self.device.cuda,
                compute_dtype=self.device.compute_dtype,
            )
        except CannotSimulate as error:
            self._give_up(error.reason)
            return None
        finally:
            self.turn.release()

    def _give_up(self, why: str) -> None:
        self.left = 0
        self.notes.append(f"not simulated: {why}")


class Planner:
    """Makes plans; safe to share between threads."""

    def __init__(self, machine: str = AUTO, cache_dir: Path | None = None) -> None:
        """`machine` is what the trainers run on: AUTO to look, UNKNOWN, or a name as of `devices.named_device`.

        Simulations are kept in `cache_dir`.

        Raises:
            InvalidRequest: there is no such device.
        """
        self._machine: FoundDevice | None = None
        self._looks = machine == AUTO
        if machine not in {AUTO, UNKNOWN}:
            self._machine = FoundDevice(named_device(machine), "setting")
        self._cache_dir = cache_dir
        self._turn = threading.Lock()

    def machine(self) -> FoundDevice | None:
        """What a trainer of this service gets, the smallest of several GPUs; None when that is not known here.

        GPUs are looked at once: their size stays.
        """
        if self._machine is None and self._looks:
            found = self._look()
            if found is None or found.found_by == "cpu":
                return found
            self._machine = replace(found, free_now_bytes=None)
        return self._machine

    def device(self, name: str | None, free_bytes: int | None = None) -> FoundDevice:
        """The named card, or what this service's trainers get; of its memory no more than `free_bytes`.

        Raises:
            InvalidRequest: there is no such device, or none is known.
        """
        if name is not None:
            found: FoundDevice | None = FoundDevice(named_device(name), "name")
        else:
            found = self._look() if self._looks else self._machine
        if found is None:
            raise InvalidRequest(
                "it is not known here what the jobs run on: name a device, such as RTX 3090 or 24GB, or start the API "
                "with QLORA_PLAN_DEVICE set to what the workers have",
                location="/device",
            )
        return found if free_bytes is None else replace(found, device=replace(found.device, free_bytes=free_bytes))

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
        """The plan of a job on the model of a config.json, whose longest row may be known.

        Raises:
            InvalidModel: the config lacks a size.
        """
        shape = shape_of(config)
        question = Question(shape, spec, found.device, longest_tokens or shape.longest_tokens(spec), factor)
        simulations = _Simulations(config, found.device, question.longest_tokens, self._cache_dir, self._turn)
        plan = make_plan(
            question,
            found_by=found.found_by,
            free_now_bytes=found.free_now_bytes,
            simulate=simulations if simulates else None,
            rows=rows,
            total_steps=total_steps,
        )
        return with_notes(plan, [*simulations.notes, *_doubts(plan, question)])

    def _look(self) -> FoundDevice | None:
        found = gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
        if found:
            smallest: Gpu = min(found, key=lambda gpu: gpu.device.total_bytes)
            return FoundDevice(smallest.device, "nvml", smallest.free_now_bytes)
        return FoundDevice(this_cpu(), "cpu") if trains_here() else None


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shapes in a config.json that anybody may have made up.

    Raises:
        InvalidModel: a size is missing, is none, or is larger than any model's.
    """
    try:
        _Sizes.model_validate(config)
    except ValidationError as error:
        findings = [
            Finding(fault["msg"], pointer="/config/" + "/".join(map(str, fault["loc"]))) for fault in error.errors()
        ]
        raise InvalidModel(
            f"config.json cannot be planned with: {findings[0]}", location="/config", findings=findings
        ) from None
    shape = ModelShape.from_config(config)
    if shape.head_dim < 1:
        raise InvalidModel(
            f"config.json has {shape.heads} heads in {shape.hidden} features: neither can be", location="/config"
        )
    return shape


def _doubts(plan: Plan, question: Question) -> list[str]:
    """Why the verdict may be wrong."""
    notes = []
    if plan.source == "formula" and not question.formula_holds:
        notes.append(f"the formula counts {question.shape.model_type or 'the model'} as if it were a Llama")
    if not plan.is_sure:
        notes.append(
            "the prediction's error is larger than what is left of the memory: ask for a probe step to be sure"
        )
    elif notes:
        notes.append("ask for a probe step to be sure")
    return notes
