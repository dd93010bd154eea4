"""Rows of an attempt: rendered, refused when too long, split into training and held-out rows."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qlora_service.artifacts.manifest import Manifest
from qlora_service.domain.jobs import FailureReason
from qlora_service.errors import JobFailed
from tests.workers.trainer._attempts import make_inputs, published_bytes, run, spy_on_loop
from tests.workspace import Workspace, job_spec
from workers.trainer.context import AttemptInputs


def test_rows_over_the_limit_stop_the_attempt_before_the_model_is_loaded(workspace: Workspace) -> None:
    inputs = make_inputs(workspace, workspace.submit())
    tight = inputs.job.spec.training.model_copy(update={"max_seq_len_tokens": 9})
    job = inputs.job.__class__(**{**vars(inputs.job), "spec": inputs.job.spec.model_copy(update={"training": tight})})
    phases: list[str] = []
    with pytest.raises(JobFailed, match="40 rows are longer") as failure:
        run(AttemptInputs(**{**vars(inputs), "job": job}), phases.append)
    assert failure.value.details["reason"] == FailureReason.INVALID_INPUT
    assert failure.value.findings[0].line == 1
    assert phases == ["rendering"]


def test_held_out_rows_are_never_trained_on(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = spy_on_loop(monkeypatch)
    run(make_inputs(workspace, workspace.submit()))
    assert len(arguments["held_out"]) == 2
    assert arguments["trained"] == set(range(1, 41)) - arguments["held_out"]


def test_validation_rows_come_from_the_dataset_that_the_job_names(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = spy_on_loop(monkeypatch)
    rows = workspace.settings.tmp_dir / "validation.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"Ask {n}", "output": "Yes."}) + "\n" for n in range(5)))
    validation = workspace.service.datasets.upload(rows, filename=None)
    spec = job_spec(max_steps=1) | {"validation": {"dataset_id": validation.id, "max_rows": 3}}
    inputs = replace(make_inputs(workspace, workspace.submit_spec(spec)), validation=validation)
    result = run(inputs)
    assert result["held_out_rows"] == len(arguments["held_out"]) == 3
    assert arguments["held_out"] <= set(range(1, 6))
    assert arguments["trained"] == set(range(1, 41))
    manifest = Manifest.model_validate_json(published_bytes(inputs, "manifest.json"))
    assert (manifest.dataset["trained_on"], manifest.dataset["validation_sha256"]) == (40, validation.sha256)
    assert len(published_bytes(inputs, "held_out.jsonl").splitlines()) == 3


def test_token_beyond_the_embedding_stops_the_attempt(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    # Rows that were not checked when the job was posted.
    inputs = make_inputs(workspace, workspace.submit())
    monkeypatch.setattr("workers.trainer.prepare.embedding_rows", lambda _: 100)
    with pytest.raises(JobFailed, match="40 rows have tokens that the base has no embedding for: line 1: ") as failure:
        run(inputs)
    assert failure.value.details["reason"] == FailureReason.INVALID_INPUT
