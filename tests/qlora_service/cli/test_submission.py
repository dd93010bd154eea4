from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from qlora_service.client import Client
from tests.breaking_proxy import BreakingProxy
from tests.running_api import RunningApi

SHORT = ("--max-seq-len-tokens", 64)


def newest_job_id(client: Client) -> str:
    return next((job.id for job in islice(client.jobs(), 1)), "none")


def spec_of(client: Client, job_id: str) -> dict[str, Any]:
    spec: dict[str, Any] = client.get(job_id).model_dump()["spec"]
    return spec


def test_submit_prints_only_the_id_without_a_terminal(run: Any, client: Client, rows: Path) -> None:
    outcome = run("submit", rows, "--base-model", "tiny", *SHORT)
    assert outcome.code == 0
    assert client.get(outcome.stdout.strip()).status == "queued"
    assert outcome.stderr == ""


def test_submit_prints_the_job_as_json(run: Any, rows: Path) -> None:
    outcome = run("submit", rows, "--base-model", "tiny", *SHORT, "--json")
    assert json.loads(outcome.stdout)["base_model"] == "tiny"


def test_stored_dataset_is_used(run: Any, client: Client, rows: Path) -> None:
    dataset = client.upload(rows)
    outcome = run("submit", "--dataset-id", dataset.id, "--base-model", "tiny", *SHORT)
    assert client.get(outcome.stdout.strip()).dataset_id == dataset.id


def test_flags_override_the_file(run: Any, client: Client, rows: Path, tmp_path: Path) -> None:
    config = tmp_path / "spec.yaml"
    config.write_text(
        "base_model: other\nname: from file\n"
        "training: {max_steps: 9, batch_size: 2, learning_rate: 1e-3, max_seq_len_tokens: 64}\n"
    )
    outcome = run(
        *("submit", rows, "--config", config, "--base-model", "tiny", "--epochs", 2, "--batch-size", 4, "--seed", 7),
        *(
            "--r",
            8,
            "--lora-alpha",
            16,
            "--set",
            "training.optim=adamw_torch",
            "--set",
            "adapter.target_modules=[q_proj]",
        ),
    )
    spec = spec_of(client, outcome.stdout.strip())
    assert (spec["base_model"], spec["name"]) == ("tiny", "from file")
    assert spec["adapter"]["r"] == 8
    assert spec["adapter"]["lora_alpha"] == 16
    assert spec["adapter"]["target_modules"] == ["q_proj"]
    training = spec["training"]
    assert (training["epochs"], training["max_steps"]) == (2, None)
    assert (training["batch_size"], training["learning_rate"], training["seed"]) == (4, 0.001, 7)
    assert training["optim"] == "adamw_torch"


@pytest.mark.parametrize(
    ("flags", "steps", "epochs"),
    [
        (("--epochs", 2), None, 2),
        (("--set", "training.epochs=2"), None, 2),
        (("--epochs", 2, "--max-steps", 5), 5, 2),
        (("--epochs", 2, "--set", "training.max_steps=5"), 5, 2),
        ((), 9, 1),
    ],
)
def test_typed_epochs_override_the_steps_of_the_file(
    run: Any, client: Client, rows: Path, tmp_path: Path, flags: tuple[object, ...], steps: int | None, epochs: float
) -> None:
    config = tmp_path / "spec.yaml"
    config.write_text("base_model: tiny\ntraining: {max_steps: 9, max_seq_len_tokens: 64}\n")
    training = spec_of(client, run("submit", rows, "--config", config, *flags).stdout.strip())["training"]
    assert (training["max_steps"], training["epochs"]) == (steps, epochs)


def test_json_file_is_a_configuration_too(run: Any, client: Client, rows: Path, tmp_path: Path) -> None:
    config = tmp_path / "spec.json"
    config.write_text(json.dumps({"base_model": "tiny", "training": {"max_steps": 3, "max_seq_len_tokens": 64}}))
    outcome = run("submit", rows, "--config", config)
    assert spec_of(client, outcome.stdout.strip())["training"]["max_steps"] == 3


def test_misspelled_field_is_reported_with_line_and_nearest_name(
    run: Any, client: Client, rows: Path, tmp_path: Path
) -> None:
    config = tmp_path / "spec.yaml"
    config.write_text("base_model: tiny\ntraining:\n  max_steps: 5\n  learnin_rate: 1e-3\n  batch_size: 0\n")
    before = newest_job_id(client)
    outcome = run("submit", rows, "--config", config)
    assert outcome.code == 1
    assert f"{config}:4: /training/learnin_rate: unknown field 'learnin_rate': did you mean 'learning_rate'?" in (
        outcome.stderr
    )
    assert f"{config}:5: /training/batch_size: " in outcome.stderr
    assert outcome.stdout == ""
    assert newest_job_id(client) == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base_model: tiny\nbase_model: two\n", "spec.yaml:2: /base_model: already set in line 1"),
        ("base_model: [tiny\n", "spec.yaml:2: "),
        ("- tiny\n", "spec.yaml:1: expected fields"),
        ("", "spec.yaml:1: expected fields"),
        ("base_model: tiny\ntraining: &t {optim: *t}\n", "alias"),
        ("[" * 2000, "nested too deeply"),
    ],
)
def test_file_that_is_not_a_configuration_is_refused(
    run: Any, rows: Path, tmp_path: Path, text: str, expected: str
) -> None:
    config = tmp_path / "spec.yaml"
    config.write_text(text)
    outcome = run("submit", rows, "--config", config)
    assert outcome.code == 1
    assert expected in outcome.stderr


def test_unusable_rows_are_reported_with_file_and_line(run: Any, client: Client, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": 1, "completion": "b"}\n{"prompt": "a"\n')
    before = newest_job_id(client)
    outcome = run("submit", rows, "--base-model", "tiny", *SHORT)
    assert outcome.code == 1
    assert f"{rows}:1: " in outcome.stderr
    assert f"{rows}:2: " in outcome.stderr
    assert outcome.stderr.count("must be a string") == 1
    assert newest_job_id(client) == before


def test_warnings_go_to_stderr(run: Any, client: Client, rows: Path) -> None:
    with rows.open("a") as file:
        file.write('{"prompt": 1}\n')
    outcome = run("submit", rows, "--base-model", "tiny", *SHORT)
    assert outcome.code == 0
    assert "warning: left out: 1 row (line 9): " in outcome.stderr
    assert client.get(outcome.stdout.strip()).status == "queued"


def test_unknown_base_model_is_refused_by_the_service(run: Any, rows: Path) -> None:
    outcome = run("submit", rows, "--base-model", "tinny", *SHORT)
    assert outcome.code == 1
    assert "error: there is no base model 'tinny': did you mean 'tiny'?" in outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "expected", "code"),
    [
        ((), "no dataset: give a FILE", 2),
        (("rows.jsonl", "--dataset-id", "ds_1"), "two datasets", 2),
        (("absent.jsonl",), "absent.jsonl is not a file", 2),
        (("rows.jsonl", "--set", "training.optim"), "write FIELD=VALUE", 2),
        (("rows.jsonl", "--set", "name.first=a", "--set", "base_model.x=1"), "cannot be set: base_model has no", 2),
        (("rows.jsonl", "--set", "base_model="), "no base model: give --base-model;", 2),
        (("rows.jsonl", "--set", "training.max_steps=many"), "/training/max_steps", 1),
        (("rows.jsonl", "--epochs", 2, "--set", "training=5"), "/training", 1),
        (("--set", "dataset.rows=&x [*x]"), "/dataset/rows", 1),
    ],
)
def test_command_that_cannot_work_is_refused_without_a_request(
    run: Any, rows: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], expected: str, code: int
) -> None:
    monkeypatch.chdir(rows.parent)
    outcome = run("submit", *arguments, "--base-model", "tiny", "--url", "http://127.0.0.1:9")
    assert outcome.code == code
    assert outcome.stderr.startswith("error: ")
    assert expected in outcome.stderr


def test_missing_base_model_is_reported_as_option_or_as_field_of_the_file(run: Any, rows: Path, tmp_path: Path) -> None:
    config = tmp_path / "spec.yaml"
    config.write_text("name: none\n")
    outcome = run("submit", rows)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith("error: no base model: give --base-model;")
    assert f"{config}: /base_model: this field is required" in run("submit", rows, "--config", config).stderr


def test_waiting_for_a_busy_service_is_reported_once(run: Any, api: RunningApi, client: Client, rows: Path) -> None:
    with BreakingProxy(api.port) as proxy:
        proxy.refusals = 2
        outcome = run("submit", rows, "--base-model", "tiny", *SHORT, "--url", proxy.url)
    assert outcome.code == 0
    assert client.get(outcome.stdout.strip()).status == "queued"
    assert outcome.stderr.startswith("the service is not answering (")
    assert outcome.stderr.endswith("): trying again for up to 60 s\n")
    assert outcome.stderr.count("\n") == 1


def test_absent_service_is_one_message(run: Any, rows: Path) -> None:
    outcome = run("submit", rows, "--base-model", "tiny", "--url", "http://127.0.0.1:9")
    assert outcome.code == 3
    assert outcome.stderr.count("\n") == 1
    assert "no service answers at http://127.0.0.1:9" in outcome.stderr
    assert "qlora serve" in outcome.stderr
