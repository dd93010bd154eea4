"""A timed step, in this process."""

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


def timed(workspace: Workspace, time_question: TimeQuestion) -> dict[str, Any]:
    request = json.loads(json.dumps(time_question.probe_request()))  # as stored in the database
    return timed_step(request, workspace.catalog, QuantizedCache(workspace.settings.cache_dir, 2**30), CPU)


@pytest.mark.parametrize("objective", ["supervised", "dpo"])
def test_timed_step_takes_the_simulated_memory(workspace: Workspace, objective: str) -> None:
    make_triangles()
    time_question = question(workspace, objective={"type": objective})
    result = timed(workspace, time_question)
    step = largest_step(time_question.spec, micro_batch_tokens=128, longest_tokens=48)
    assert result["tokens_per_second"] == pytest.approx(step.tokens / result["seconds"])
    assert result["evaluated_tokens_per_second"] > 0
    assert 0 < result["loading_s"] < 60
    simulated = simulated_memory(
        json.loads((workspace.catalog.get("tiny").path / "config.json").read_text()),
        time_question.spec,
        step,
        compute_dtype="float32",
        checkpointing=False,
        cuda=False,
    )
    assert result["memory"]["allocated"] == pytest.approx(simulated.allocated, rel=0.02)
    estimated = estimate_from_probe(WORK, result)
    assert estimated.phases["training"] == pytest.approx(2000 / result["tokens_per_second"])
    assert json.loads(json.dumps(result)) == result


def test_changed_weights_are_refused(workspace: Workspace) -> None:
    with pytest.raises(InvalidModel, match="other weights"):
        timed(workspace, replace(question(workspace), base_weights_sha256="0" * 64))


def test_key_depends_on_what_affects_the_step_only(workspace: Workspace) -> None:
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
