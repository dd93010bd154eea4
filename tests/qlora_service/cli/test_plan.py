from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_service.cli import main
from qlora_service.cli.plan import _time_line
from qlora_service.client import Client
from tests.planning_models import MODELS

GB24 = ("--device", "24GB")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODELS["Llama-2-7B"]))
    return path


def test_config_is_planned_without_a_service(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_URL", "http://127.0.0.1:9")  # no service listens there
    with pytest.raises(SystemExit) as exited:
        main(["plan", "--config", str(config), *GB24, "--set", "training.batch_size=1"])
    assert exited.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith("fits: the job needs ")
    assert "trained parameters  39,976,960" in output


def test_figures_are_aligned(run: Any, config: Path) -> None:
    lines = run("plan", "--config", config, *GB24).stdout.splitlines()
    figures = [line for line in lines if line.startswith("  ")]
    assert len(figures) > 12
    assert len({len(line) for line in figures}) == 1
    assert all(line[-3] == "." for line in figures)


def test_job_that_does_not_fit_has_its_own_exit_code(run: Any, config: Path) -> None:
    outcome = run("plan", "--config", config, "--device", "4GB")
    assert outcome.code == 6
    assert outcome.stdout.startswith("does not fit: ")
    fits_if = run("plan", "--config", config, "--device", "8GB", "--set", "quantization.type=int8", "--json")
    assert fits_if.code == 6
    assert json.loads(fits_if.stdout)["verdict"] == "fits_if"


def test_plan_is_for_the_spec_file_and_the_flags(run: Any, config: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("base_model: other\ntraining: {max_seq_len_tokens: 4096, micro_batch_tokens: 512}\n")
    outcome = run("plan", spec, "--config", config, *GB24, "--set", "training.micro_batch_tokens=1024", "--json")
    plan = json.loads(outcome.stdout)
    assert (plan["longest_tokens"], plan["settings"]["micro_batch_tokens"]) == (4096, 1024)


def test_service_plans_for_a_model_of_its_catalog_and_a_stored_dataset(run: Any, client: Client, rows: Path) -> None:
    dataset = client.upload(rows)
    command = ("plan", "--base-model", "tiny", "--dataset-id", dataset.id, "--set", "training.max_seq_len_tokens=64")
    plan = json.loads(run(*command, *GB24, "--json").stdout)
    assert plan["verdict"] == "fits"
    assert plan["longest_tokens"] < 64
    assert plan["device"]["name"] == "a card of 24 GB"


def test_time_is_printed_or_why_it_is_not_known(run: Any, client: Client, rows: Path) -> None:
    dataset = client.upload(rows)
    command = ("plan", "--base-model", "tiny", "--dataset-id", dataset.id, "--set", "training.max_seq_len_tokens=64")
    assert "time                not known: no job on tiny" in run(*command).stdout
    assert "not known: its step will be timed" in run(*command, "--probe").stdout


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ({"seconds": 40.2, "error": 0.3, "basis": "history"}, "about 40 s ± 30% (from earlier jobs of the same kind)"),
        ({"seconds": 5400, "error": 0.4, "basis": "probe"}, "about 90 min ± 40% (from a timed step)"),
    ],
)
def test_time_is_printed_with_its_error_and_source(time: dict[str, Any], expected: str) -> None:
    assert expected in _time_line(time)


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        ((), 2, "no base model"),
        (("--base-model", "absent"), 1, "no base model 'absent'"),
        (("--base-model", "tiny", "--device", "RTX 3091"), 1, "did you mean RTX 3090"),
    ],
)
def test_refused_plan_has_a_reason(run: Any, arguments: tuple[str, ...], code: int, reason: str) -> None:
    outcome = run("plan", *arguments)
    assert outcome.code == code
    assert reason in outcome.stderr


def test_unusable_config_is_refused(run: Any, config: Path, rows: Path) -> None:
    assert run("plan", "--config", config, "--base-model", "tiny").code == 2
    assert run("plan", "--config", config, "--probe").code == 2
    assert "is not JSON" in run("plan", "--config", rows).stderr
    config.write_text("[]")
    assert "is not a JSON object" in run("plan", "--config", config).stderr
    config.write_text("{}")
    assert "no hidden_size" in run("plan", "--config", config, *GB24).stderr


def test_submit_can_be_forced(run: Any, client: Client, rows: Path) -> None:
    outcome = run("submit", rows, "--base-model", "tiny", "--set", "training.max_seq_len_tokens=64", "--force")
    assert client.get(outcome.stdout.strip()).status == "queued"


def test_client_plans_as_the_command_does(client: Client) -> None:
    plan = client.plan({"training": {"max_seq_len_tokens": 512}}, config=MODELS["LLaMA-33B"], device="RTX 3090")
    assert (plan.verdict, plan.settings["gradient_checkpointing"]) == ("fits", True)
    assert client.plan({"base_model": "tiny"}, free_bytes=0).verdict == "does_not_fit"
