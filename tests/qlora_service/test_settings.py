import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from qlora_service.artifacts.store import ArtifactStore
from qlora_service.settings import Settings, read_settings
from qlora_service.store.database import Database
from tests.settings_page import PAGE, settings_page

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"QLORA_{name.upper()}", raising=False)


def test_all_files_are_in_the_data_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_explicit_urls_override_the_data_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_DATABASE_URL", "postgresql://db/q")
    monkeypatch.setenv("QLORA_ARTIFACT_URL", "s3://bucket/prefix")
    monkeypatch.setenv("QLORA_URL", "https://gpu.example/")
    settings = Settings()
    assert settings.resolved_database_url == "postgresql://db/q"
    assert settings.resolved_artifact_url == "s3://bucket/prefix"
    assert settings.base_url == "https://gpu.example"


def test_service_listens_on_loopback_by_default() -> None:
    assert Settings().base_url == "http://127.0.0.1:8080"


@pytest.mark.parametrize(
    ("name", "value"), [("PORT", "70000"), ("SLOTS", "0"), ("LEASE_S", "1"), ("HEARTBEAT_S", "0"), ("PORT", "x")]
)
def test_invalid_value_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"QLORA_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        Settings()


def test_allowed_hosts_are_normalized_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().allowed_host_names == frozenset()
    monkeypatch.setenv("QLORA_ALLOWED_HOSTS", "GPU.example, 10.0.0.7,::2 ,")
    assert Settings().allowed_host_names == {"gpu.example", "10.0.0.7", "::2"}


@pytest.mark.parametrize("value", ["https://gpu.example", "gpu.example:8080", "gpu.example/x", "a b", "[::2]"])
def test_allowed_host_that_is_no_bare_name_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("QLORA_ALLOWED_HOSTS", f"ok.example,{value}")
    with pytest.raises(ValidationError, match="is not a host name"):
        Settings()


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.0.2.1", "gpu.example", "localhost.example", "", "127.0.0.1.example"]
)
def test_listening_on_the_network_requires_keys(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("QLORA_HOST", host)
    assert Settings().keys == "required"
    monkeypatch.setenv("QLORA_KEYS", "off")
    with pytest.raises(ValidationError, match="would give the whole network access"):
        Settings()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "localhost", "LOCALHOST"])
def test_listening_on_loopback_does_not_require_keys(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("QLORA_HOST", host)
    monkeypatch.setenv("QLORA_KEYS", "off")
    assert Settings().keys == "off"


def test_arguments_override_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_PORT", "9000")
    monkeypatch.setenv("QLORA_HOST", "::1")
    settings = read_settings(port=9001, host=None)
    assert (settings.port, settings.host) == (9001, "::1")


def test_invalid_settings_end_the_process_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QLORA_PORT", "eighty")
    monkeypatch.setenv("QLORA_SLOTS", "0")
    with pytest.raises(SystemExit) as caught:
        read_settings()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "QLORA_PORT: Input should be a valid integer" in line
    assert "QLORA_SLOTS: " in line


def test_error_of_inconsistent_settings_names_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QLORA_HEARTBEAT_S", "20")
    with pytest.raises(SystemExit):
        read_settings()
    assert "cannot be used: QLORA_HEARTBEAT_S is 20: " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("program", ["api", "workers", "qlora_service.cli"])
def test_every_program_reports_invalid_settings_in_one_line(program: str) -> None:
    arguments = ["jobs"] if program == "qlora_service.cli" else []
    result = subprocess.run(
        [sys.executable, "-m", program, *arguments],
        cwd=ROOT, env=os.environ | {"QLORA_LEASE_S": "x"}, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "QLORA_LEASE_S: " in line


def test_settings_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == settings_page(), "run `make docs`"


def test_every_setting_has_a_description() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []
