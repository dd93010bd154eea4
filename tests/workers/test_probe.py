"""One step that is timed, in this process."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from qlora_service.errors import InvalidModel
from qlora_service.models.base.quantized_cache import QuantizedCache
from qlora_service.planning.largest_step import largest_step
from qlora_service.planning.simulation.simulated_step import simulated_memory
from qlora_service.planning.time.duration import Work, estimate_from_probe
from qlora_service.planning.time.job_times import TimeQuestion
from qlora_service.specs import JobSpec
from tests.planning_tracked import make_triangles
from tests.workspace import Workspace
from workers.probe import timed_step

CPU = torch.device("cpu")
WORK = Work(rows=20, examples=40, steps=10, tokens=2000, evaluations=3, held_out_tokens=100, answers=0)


def question(workspace: Workspace, **parts: Any) -> TimeQuestion:
    spec = JobSpec.model_validate({"base_model": "tiny", "quantization": {"compute_dtype": "float32"}} | parts)
    return TimeQuestion(
        spec=spec,
        base_weights_sha256=workspace.catalog.get("tiny").weights_sha256,
        work=WORK,
        micro_batch_tokens=128,
        checkpointing=False,
        longest_tokens=48,
        device="x86_64 CPU",
        cuda=False,
    )


def timed(workspace: Workspace, asked: TimeQuestion) -> dict[str, Any]:
    request = json.loads(json.dumps(asked.probe_request()))  # as the database keeps it
    return timed_step(request, workspace.catalog, QuantizedCache(workspace.settings.cache_dir, 2**30), CPU)


@pytest.mark.parametrize("objective", ["supervised", "dpo"])
def test_step_is_timed_and_takes_the_memory_that_is_simulated(workspace: Workspace, objective: str) -> None:
    make_triangles()
    asked = question(workspace, objective={"type": objective})
    found = timed(workspace, asked)
    step = largest_step(asked.spec, micro_batch_tokens=128, longest_tokens=48)
    assert found["tokens_per_second"] == pytest.approx(step.tokens / found["seconds"])
    assert found["evaluated_tokens_per_second"] > 0
    assert 0 < found["loading_s"] < 60
    simulated = simulated_memory(
        json.loads((workspace.catalog.get("tiny").path / "config.json").read_text()),
        asked.spec,
        step,
        compute_dtype="float32",
        checkpointing=False,
        cuda=False,
    )
    assert found["memory"]["allocated"] == pytest.approx(simulated.allocated, rel=0.02)
    estimated = estimate_from_probe(WORK, found)
    assert estimated.phases["training"] == pytest.approx(2000 / found["tokens_per_second"])
    assert json.loads(json.dumps(found)) == found


def test_weights_that_have_changed_since_are_not_timed(workspace: Workspace) -> None:
    with pytest.raises(InvalidModel, match="other weights"):
        timed(workspace, replace(question(workspace), base_weights_sha256="0" * 64))


def test_key_is_of_what_is_timed_and_of_nothing_else(workspace: Workspace) -> None:
    plain = question(workspace)
    renamed = question(workspace, base_model="another name of the same weights", name="mine", metadata={"a": "b"})
    longer = question(workspace, training={"epochs": 9.0, "learning_rate": 1e-3})
    assert plain.probe_key() == renamed.probe_key() == longer.probe_key()
    assert plain.probe_key() == replace(plain, work=replace(WORK, rows=1), device="another CPU").probe_key()
    different = {
        question(workspace, adapter={"r": 64}).probe_key(),
        question(workspace, training={"batch_size": 2}).probe_key(),
        replace(plain, longest_tokens=49).probe_key(),
        replace(plain, micro_batch_tokens=127).probe_key(),
        replace(plain, checkpointing=True).probe_key(),
        replace(plain, cuda=True).probe_key(),
        replace(plain, base_weights_sha256="0" * 64).probe_key(),
    }
    assert len(different | {plain.probe_key()}) == 8
