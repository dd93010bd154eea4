"""The published files of an attempt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_service.artifacts.manifest import Manifest
from qlora_service.artifacts.store import ArtifactStore
from qlora_service.errors import NotFound
from qlora_service.specs import parse_spec
from tests.workers.trainer._attempts import make_inputs, published_bytes, run
from tests.workspace import ROWS, Workspace


def test_answers_are_published_side_by_side(workspace: Workspace) -> None:
    spec = {
        "base_model": "tiny",
        "dataset": {"rows": ROWS},
        "training": {"max_steps": 2, "batch_size": 4, "max_seq_len_tokens": 128},
        "evaluation": {"generate_rows": 2, "questions": ["How many days has a week?"], "max_new_tokens": 4},
    }
    inputs = make_inputs(workspace, workspace.service.jobs.submit(parse_spec(spec)).job.id)
    scores = run(inputs)["generation"]
    report = json.loads(published_bytes(inputs, "generation.json"))
    assert report["scores"] == scores
    assert isinstance(scores, dict)
    assert scores["base"].keys() == scores["adapter"].keys() >= {"exact_match", "bleu", "rougeL"}
    assert len(report["rows"]) == 2
    assert report["questions"][0]["question"] == "How many days has a week?"


def test_published_files_name_no_path_of_this_machine(workspace: Workspace) -> None:
    inputs = make_inputs(workspace, workspace.submit())
    run(inputs)
    config = json.loads(published_bytes(inputs, "adapter_config.json"))
    assert config["base_model_name_or_path"] == "tiny"
    data_dir = str(workspace.settings.data_dir).encode()
    manifest = Manifest.model_validate_json(published_bytes(inputs, "manifest.json"))
    for name in [*(file.name for file in manifest.files), "manifest.json"]:
        assert data_dir not in published_bytes(inputs, name), name


def test_no_manifest_is_published_unless_all_files_are(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(workspace, workspace.submit())
    put_file = ArtifactStore.put_file

    def full_disk(store: ArtifactStore, key: str, path: Path) -> None:
        if key.endswith("tokenizer.json"):
            raise OSError(28, "No space left on device")
        put_file(store, key, path)

    monkeypatch.setattr(ArtifactStore, "put_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        run(inputs)
    with pytest.raises(NotFound):
        published_bytes(inputs, "manifest.json")
