import hashlib
from pathlib import Path

import pytest
from pydantic import ValidationError

from qlora_service.artifacts.manifest import CHUNK_BYTES, Manifest, ManifestFile, describe_file

MANIFEST = Manifest(
    job_id="job_1",
    attempt=2,
    base_model={"name": "tiny", "hub_id": None},
    dataset={"id": "ds_1"},
    spec={"training": {"seed": 0}},
    plan={"device": "cpu"},
    versions={"torch": "2"},
    held_out={"loss_after": 1.25},
    files=(ManifestFile(name="a", bytes=1, sha256="0" * 64),),
)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 1])
def test_file_is_described_by_name_size_and_hash(tmp_path: Path, size: int) -> None:
    path = tmp_path / "adapter.bin"
    path.write_bytes(bytes(range(256)) * (size // 256) + bytes(size % 256))
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert describe_file(path) == ManifestFile(name="adapter.bin", bytes=size, sha256=expected)


def test_manifest_survives_json() -> None:
    assert Manifest.model_validate_json(MANIFEST.model_dump_json(indent=2)) == MANIFEST


def test_manifest_contains_its_format_version() -> None:
    assert MANIFEST.model_dump()["version"] == 1


def test_manifest_is_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        MANIFEST.attempt = 3  # type: ignore[misc]


def test_manifest_without_its_files_is_refused() -> None:
    with pytest.raises(ValidationError, match="files"):
        Manifest.model_validate(MANIFEST.model_dump(exclude={"files"}))
