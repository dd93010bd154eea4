"""Commands for datasets: the check without a service, the others against a running one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_service.client import Client
from qlora_service.domain.row_warnings import RowWarning
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.settings import Settings
from qlora_service.store.database import Database
from tests.control_plane import add_row_warning
from tests.running_api import RunningApi, write_rows
from tests.unknown_tokens import build_model_with_unknown_tokens

BAD = '{"prompt": 1, "completion": "b"}\n{"prompt": "a"\n{"prompt": "a", "completion": "c"}\n'
NO_SERVICE = "http://127.0.0.1:9"


@pytest.fixture
def bad_rows(tmp_path: Path) -> Path:
    path = tmp_path / "bad.jsonl"
    path.write_text(BAD)
    return path


def test_check_prints_file_line_and_reason_of_each_finding(
    run: Any, bad_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_URL", NO_SERVICE)
    outcome = run("datasets", "check", bad_rows)
    assert outcome.code == 1
    first, second = outcome.stdout.splitlines()
    assert first == f"{bad_rows}:1: /prompt: must be a string, is a number"
    assert second.startswith(f"{bad_rows}:2: not valid JSON: ")
    assert outcome.stderr == f"{bad_rows}: jsonl of prompt_completion rows; 1 of 3 rows can be used\n"


def test_check_of_a_file_without_findings_prints_nothing_on_stdout(run: Any, rows: Path) -> None:
    outcome = run("datasets", "check", rows)
    assert (outcome.code, outcome.stdout) == (0, "")
    assert "8 of 8 rows can be used" in outcome.stderr


def test_check_prints_json(run: Any, bad_rows: Path) -> None:
    outcome = run("datasets", "check", bad_rows, "--json")
    assert outcome.code == 1
    result = json.loads(outcome.stdout)
    assert (result["file"], result["rows"], result["usable_rows"]) == (str(bad_rows), 3, 1)
    assert [(finding["line"], finding["byte_offset"]) for finding in result["findings"]] == [(1, 0), (2, 33)]
    assert result["refusal"] is None


@pytest.mark.parametrize(
    ("name", "content", "refusal"),
    [
        ("empty.jsonl", "", "is empty"),
        ("rows.jsonl", '{"other": 1}\n', "fit no accepted shape"),
        ("rows.csv", "PK\x03\x04", "seems to be a ZIP archive"),
    ],
)
def test_check_prints_why_a_whole_file_is_refused(
    run: Any, tmp_path: Path, name: str, content: str, refusal: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    outcome = run("datasets", "check", path)
    assert outcome.code == 1
    assert refusal in outcome.stderr
    assert not any(line.partition(": ")[2] in outcome.stderr for line in outcome.stdout.splitlines())
    assert refusal in json.loads(run("datasets", "check", path, "--json").stdout)["refusal"]


def test_check_prints_every_finding_of_many(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": 1, "completion": "b"}\n' * 130 + '{"prompt": "a", "completion": "b"}\n')
    lines = run("datasets", "check", path).stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [f"{path}:{number}" for number in range(1, 131)]
    result = json.loads(run("datasets", "check", path, "--json").stdout)
    assert result["finding_count"] == len(result["findings"]) == 130


@pytest.mark.parametrize("arguments", [("absent.jsonl",), (".",), ("--shape", "haiku", "bad.jsonl"), ()])
def test_wrong_usage_of_check_is_exit_code_2(
    run: Any, bad_rows: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(bad_rows.parent)
    assert run("datasets", "check", *arguments).code == 2


def test_check_with_a_base_model_reports_lengths_and_too_long_rows(run: Any, tiny_model: Path, tmp_path: Path) -> None:
    Catalog(tmp_path / "data" / "models").import_model("tiny", tiny_model)
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "word " * 100, "completion": "b"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with_model = ("datasets", "check", path, "--base-model", "tiny", "--data-dir", tmp_path / "data")
    short = run(*with_model, "--max-seq-len-tokens", 64)
    assert short.code == 1
    assert f"{path}:2: " in short.stdout
    assert "max_seq_len_tokens is 64" in short.stdout
    assert "1 of 2 rows can be used; " in short.stderr
    both = write_rows(tmp_path / "both.jsonl", [*rows, {"prompt": "only"}])
    outcome = run("datasets", "check", both, *with_model[3:], "--max-seq-len-tokens", 64)
    assert [line.partition(": ")[0] for line in outcome.stdout.splitlines()] == [f"{both}:2", f"{both}:3"]
    whole = run(*with_model, "--json")
    assert whole.code == 0
    assert json.loads(whole.stdout)["lengths"]["longest_tokens"] > 100
    unknown = run("datasets", "check", path, "--base-model", "tinny", "--data-dir", tmp_path / "data")
    assert unknown.code == 1
    assert "did you mean 'tiny'?" in unknown.stderr


def test_check_needs_no_torch_and_names_the_extra_that_it_needs(bad_rows: Path, tmp_path: Path) -> None:
    def check(*arguments: str, without: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        # A module that is None cannot be imported, as in an installation with the base dependencies only.
        code = f"import sys; sys.modules.update(dict.fromkeys({without})); import qlora_service.cli as c; c.main()"
        command = [sys.executable, "-c", code, "datasets", "check", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "80"})

    server = ("torch", "transformers", "fastapi", "sqlalchemy", "obstore", "pyarrow", "tokenizers", "numpy")
    outcome = check(str(bad_rows), without=server)
    assert outcome.returncode == 1
    assert outcome.stdout.startswith(f"{bad_rows}:1: /prompt: ")
    table = tmp_path / "rows.parquet"
    table.write_bytes(b"PAR1" + bytes(100))
    outcome = check(str(table), without=server)
    assert outcome.returncode == 1
    assert "pip install 'qlora-service[server]'" in outcome.stderr


def test_dataset_is_uploaded_listed_shown_and_deleted(run: Any, client: Client, bad_rows: Path) -> None:
    uploaded = run("datasets", "upload", bad_rows)
    dataset_id = uploaded.stdout.strip()
    pointer, syntax = uploaded.stderr.splitlines()
    assert pointer == "warning: left out: 1 row (line 1 at /prompt): must be a string, is a number"
    assert syntax.startswith("warning: left out: 1 row (line 2): not valid JSON: ")
    assert client.dataset(dataset_id).filename == "bad.jsonl"
    assert dataset_id in run("datasets", "list").stdout
    listed = json.loads(run("datasets", "list", "--limit", 1, "--json").stdout)
    assert [dataset["id"] for dataset in listed] == [dataset_id]
    shown = run("datasets", "show", dataset_id, "--base-model", "tiny").stdout
    assert "1 of 3 rows" in shown
    assert "up to " in shown
    assert "line 1 at /prompt: must be a string" in shown
    assert json.loads(run("datasets", "show", dataset_id, "--json").stdout)["lengths"] is None
    assert json.loads(run("datasets", "delete", dataset_id, "--json").stdout) == {"id": dataset_id, "deleted": True}
    gone = run("datasets", "show", dataset_id)
    assert gone.code == 1
    assert dataset_id in gone.stderr


def test_each_kind_of_warning_is_printed_by_show(run: Any, client: Client, api: RunningApi, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "warned.jsonl", [{"prompt": "Is it", "completion": " so?"}] * 3)
    dataset_id = client.upload(rows).id
    database = Database(Settings(data_dir=api.data_dir).resolved_database_url)
    warning = RowWarning("`train` is false", "/train", 2, [1, 3])
    add_row_warning(database, dataset_id, warning)
    database.close()
    assert client.dataset(dataset_id).warnings == [warning]
    shown = run("datasets", "show", dataset_id, "--base-model", "tiny").stdout
    assert shown.splitlines()[-1] == f"warning: {warning}"
    uploaded = run("datasets", "upload", rows)
    assert uploaded.stdout == f"{dataset_id}\n"


def test_every_reason_is_shown_where_only_the_first_findings_are(run: Any, client: Client, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, *[{"prompt": 1, "completion": "b"}] * 130, {"prompt": 2}]
    dataset_id = client.upload(write_rows(tmp_path / "rows.jsonl", rows)).id
    number, unread = run("datasets", "show", dataset_id).stdout.splitlines()[-2:]
    assert number.startswith("warning: left out: 130 rows (line 2, 3, 4, 5, 6, … at /prompt): ")
    assert unread.startswith("warning: left out: 1 row (line 132): ")


def test_refused_upload_names_the_lines_of_the_file(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": 1, "completion": "b"}\n')
    outcome = run("datasets", "upload", path)
    assert (outcome.code, outcome.stdout) == (1, "")
    error, finding = outcome.stderr.splitlines()
    assert error.startswith("error: the dataset cannot be used: ")
    assert "First: line 1. " in error
    assert finding.startswith(f"{path}:1: /prompt: must be a string")
    assert outcome.stderr.count("must be a string") == 1


def test_check_for_a_model_finds_tokens_beyond_its_embedding(run: Any, tmp_path: Path) -> None:
    rows = build_model_with_unknown_tokens(tmp_path / "model")
    Catalog(tmp_path / "data" / "models").import_model("unknown", tmp_path / "model")
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Where?", "completion": text} for text in ("A", "<|seat|>")])
    outcome = run("datasets", "check", path, "--base-model", "unknown", "--data-dir", tmp_path / "data")
    assert outcome.code == 1
    assert f"{path}:2: it has token {rows + 1} (<|seat|>), and the base has embeddings for " in outcome.stdout
