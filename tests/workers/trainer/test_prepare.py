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
from tests.workers.trainer._attempts import AttemptRecorder, make_inputs, published_bytes, run, spy_on_loop
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


def test_rows_left_out_are_told_before_the_training_and_published(workspace: Workspace) -> None:
    rows = [*ROWS, {"instruction": "a", "output": ""}, {"instruction": 1, "output": "b"}]
    long = {"instruction": "a", "output": "b " * 300}
    spec = job_spec(max_steps=1, too_long="drop") | {"dataset": {"rows": [*rows, long, long]}}
    job_id = workspace.submit_spec(spec)
    recorder = AttemptRecorder()
    inputs = make_inputs(workspace, job_id)
    result = run(inputs, reporter=recorder)
    empty, number, too_long = result["warnings"]
    assert empty == "left out: 1 row (line 41 at /output): the answer is empty"
    assert number == "left out: 1 row (line 42 at /instruction): must be a string, is a number"
    assert too_long.startswith("left out: 2 rows (line 43, 44): ")
    assert recorder.warnings == workspace.service.jobs.get(job_id).warnings == result["warnings"]
    manifest = Manifest.model_validate_json(published_bytes(inputs, "manifest.json"))
    assert (manifest.dataset["left_out"], manifest.dataset["warnings"]) == (4, result["warnings"])
    card = published_bytes(inputs, "README.md").decode()
    assert "4 of the dataset's 44 rows were left out." in card
    assert all(warning in card.splitlines() for warning in result["warnings"])


def test_warnings_of_validation_rows_say_so(workspace: Workspace) -> None:
    path = workspace.settings.tmp_dir / "validation.jsonl"
    path.write_text("".join(json.dumps({"instruction": "a", "output": output}) + "\n" for output in ("b", "")))
    validation = workspace.service.datasets.upload(path, filename=None)
    job_id = workspace.submit_spec(job_spec(max_steps=1) | {"validation": {"dataset_id": validation.id}})
    prepared = prepare_rows(replace(make_inputs(workspace, job_id), validation=validation), lambda: None)
    assert prepared.warnings == workspace.service.jobs.get(job_id).warnings
    assert prepared.warnings == ["validation dataset: left out: 1 row (line 2 at /output): the answer is empty"]


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


def test_token_beyond_the_embedding_stops_the_attempt(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    # Rows that were not checked when the job was posted.
    inputs = make_inputs(workspace, workspace.submit())
    monkeypatch.setattr("workers.trainer.prepare.embedding_rows", lambda _: 100)
    with pytest.raises(JobFailed, match="40 rows have tokens that the base has no embedding for: line 1: ") as failure:
        run(inputs)
    assert failure.value.details["reason"] == FailureReason.INVALID_INPUT
