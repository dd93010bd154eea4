"""The manifest: what an attempt published, from what, and how to check it. It is put last."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

NAME = "manifest.json"
CHUNK_BYTES = 1 << 20


class ManifestFile(BaseModel):
    model_config = ConfigDict(frozen=True)

    name: str
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """Everything needed to reproduce and to verify the adapter."""

    model_config = ConfigDict(frozen=True)

    version: int = 1
    job_id: str
    attempt: int
    base_model: dict[str, Any]
    """Name, hub id and revision where there are any, SHA-256 of the weights."""
    dataset: dict[str, Any]
    """Id, SHA-256 and counts."""
    spec: dict[str, Any]
    plan: dict[str, Any]
    """What the machine decided: compute dtype, device, threads, steps."""
    versions: dict[str, str]
    held_out: dict[str, Any]
    """Loss before and after, rows and tokens it was measured on; held_out.jsonl holds those rows."""
    files: tuple[ManifestFile, ...]

    @property
    def total_bytes(self) -> int:
        """Of all files, without the manifest."""
        return sum(file.bytes for file in self.files)


def describe_file(path: Path) -> ManifestFile:
    """Name, size and SHA-256 of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return ManifestFile(name=path.name, bytes=size, sha256=digest.hexdigest())
