from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_service.models.base.quantized_cache import BaseIdentity, QuantizedCache
from tests.workspace import Workspace


def qlora(data_dir: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qlora_service.cli", *(str(argument) for argument in arguments)]
    environment = {**os.environ, "QLORA_DATA_DIR": str(data_dir)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_model_is_imported_listed_and_removed_without_a_service(tiny_model: Path, tmp_path: Path) -> None:
    assert "no base models yet" in qlora(tmp_path, "models", "list").stderr
    imported = qlora(tmp_path, "models", "import", "org/tiny", tiny_model, "--json")
    assert imported.returncode == 0, imported.stderr
    assert json.loads(imported.stdout)["name"] == "org/tiny"
    assert "org/tiny  LlamaForCausalLM" in qlora(tmp_path, "models", "list").stdout
    assert qlora(tmp_path, "models", "remove", "org/tiny").returncode == 0
    assert json.loads(qlora(tmp_path, "models", "list", "--json").stdout) == []


def test_refused_model_lists_every_finding(tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"auto_map": {"AutoModel": "code.Model"}}')
    (source / "code.py").write_text("")
    outcome = qlora(tmp_path, "models", "import", "bad", source)
    assert outcome.returncode == 1
    assert outcome.stderr.startswith("error: ")
    assert "auto_map" in outcome.stderr
    assert "code.py" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_cached_quantized_models_are_listed_and_cleared(run: Any, tmp_path: Path) -> None:
    def cache(*arguments: object) -> Any:
        return run("models", "cache", *arguments, "--data-dir", tmp_path)

    assert "nothing is cached" in cache("list").stderr
    identity = BaseIdentity("w", "c", "nf4", True, "bfloat16", "cpu", {})
    with QuantizedCache(tmp_path / "cache" / "quantized", 2**30).open(identity) as entry:
        entry.lock_for_writing()
        entry.store("org/tiny", 0, lambda directory: (directory / "config.json").write_text("{}"))
    (cached,) = json.loads(cache("list", "--json").stdout)
    assert (cached["base_model"], cached["quantization"], cached["compute_dtype"]) == ("org/tiny", "nf4", "bfloat16")
    assert "org/tiny  nf4" in cache("list").stdout
    assert "removed 1" in cache("clear").stderr
    assert json.loads(cache("list", "--json").stdout) == []


def test_models_of_a_running_service_are_listed(
    run: Any, api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed(*arguments: object) -> list[str]:
        return [model["name"] for model in json.loads(run("models", "list", *arguments, "--json").stdout)]

    monkeypatch.setenv("QLORA_DATA_DIR", str(tmp_path))
    assert listed("--url", api.url) == ["tiny"]
    assert listed() == ["tiny"]  # from QLORA_URL
    assert listed("--data-dir", tmp_path) == []
    monkeypatch.delenv("QLORA_URL")
    assert listed() == []


def test_model_that_jobs_still_need_is_removed_only_by_force(run: Any, workspace: Workspace, tiny_model: Path) -> None:
    def remove(*flags: str) -> Any:
        return run("models", "remove", "tiny", "--data-dir", workspace.settings.data_dir, *flags)

    ended, first, second = workspace.submit(), workspace.submit(), workspace.submit()
    workspace.service.jobs.cancel(ended)
    refused = remove()
    assert refused.code == 1
    assert f"tiny is still needed by {first} and 1 more: let" in refused.stderr
    assert workspace.catalog.get("tiny")
    workspace.service.jobs.cancel(second)
    assert f"needed by {first}: let" in remove().stderr
    assert remove("--force").code == 0
    assert workspace.catalog.list() == []
    workspace.catalog.import_model("tiny", tiny_model)
    workspace.service.jobs.cancel(first)
    assert remove().code == 0
