"""Rows of an attempt: rendered, refused when too long, split into training and held-out rows."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qlora_service.artifacts.manifest import Manifest
from qlora_service.domain.jobs import FailureReason
from qlora_service.errors import JobFailed
from qlora_service.training.evaluation.generation import question_ids
from qlora_service.training.network.micro_batch import TokenRow
from tests.tiny_model import CHATML
from tests.workers.trainer._attempts import make_inputs, published_bytes, run, spy_on_loop
from tests.workspace import ROWS, Workspace, job_spec
from workers.trainer.context import AttemptInputs
from workers.trainer.prepare import load_tokenizer, prepare_rows


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


@pytest.mark.parametrize(("prompt_format", "is_plain"), [("auto", False), ("plain", True)])
def test_questions_are_rendered_as_the_rows_prompts(workspace: Workspace, prompt_format: str, is_plain: bool) -> None:
    rows = [{"prompt": f"Say {n}", "completion": f" The number is {n}."} for n in range(4)]
    for dataset in (rows, ROWS):
        spec = job_spec(prompt_format=prompt_format) | {"dataset": {"rows": dataset}}
        prepared = prepare_rows(make_inputs(workspace, workspace.submit_spec(spec)), lambda: None)
        plain = is_plain and dataset is rows
        assert prepared.question_template == (None if plain else CHATML)
        assert prepared.chat_template == CHATML
        tokenizer = load_tokenizer(workspace.catalog.get("tiny").path, prepared.question_template)
        question = tokenizer.decode(question_ids(tokenizer, "Say 0"))
        first = prepared.rows[0]
        assert isinstance(first, TokenRow)
        assert tokenizer.decode(first.input_ids).startswith(question)
        assert first.trained.index(True) == len(question_ids(tokenizer, "Say 0"))


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
