from pathlib import Path

import pytest
from pydantic import ValidationError

from qlora_service.artifacts.store import ArtifactStore
from qlora_service.settings import Settings
from qlora_service.store.database import Database


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"QLORA_{name.upper()}", raising=False)


def test_everything_lies_in_the_data_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "with space, 100% and ü"
    monkeypatch.setenv("QLORA_DATA_DIR", str(data))
    settings = Settings()
    database = Database(settings.resolved_database_url)
    database.migrate()
    database.close()
    ArtifactStore(settings.resolved_artifact_url).create("a", b"1")
    assert (data / "state.db").is_file()
    assert (data / "artifacts" / "a").read_bytes() == b"1"
    assert {settings.models_dir, settings.tmp_dir} == {data / "models", data / "tmp"}


def test_relative_data_directory_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings().resolved_data_dir == tmp_path / "data"
    assert Settings().resolved_artifact_url == (tmp_path / "data/artifacts").as_uri()


def test_explicit_urls_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_DATABASE_URL", "postgresql://db/q")
    monkeypatch.setenv("QLORA_ARTIFACT_URL", "s3://bucket/prefix")
    monkeypatch.setenv("QLORA_URL", "https://gpu.example/")
    settings = Settings()
    assert settings.resolved_database_url == "postgresql://db/q"
    assert settings.resolved_artifact_url == "s3://bucket/prefix"
    assert settings.base_url == "https://gpu.example"


def test_service_listens_on_this_machine_only_unless_told() -> None:
    assert Settings().base_url == "http://127.0.0.1:8080"


@pytest.mark.parametrize(
    ("name", "value"), [("PORT", "70000"), ("SLOTS", "0"), ("LEASE_S", "1"), ("HEARTBEAT_S", "0"), ("PORT", "x")]
)
def test_impossible_value_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"QLORA_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        Settings()
