"""The manifest: the published files of an attempt, their inputs and their checksums. It is published last."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

MANIFEST_NAME = "manifest.json"
CHUNK_BYTES = 1 << 20


class ManifestFile(BaseModel):
    model_config = ConfigDict(frozen=True)

    name: str
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """All data for reproducing and verifying an adapter."""

    model_config = ConfigDict(frozen=True)

    version: int = 1
    job_id: str
    attempt: int
    base_model: dict[str, Any]
    """Name, hub id and revision if it has them, SHA-256 of the weights."""
    dataset: dict[str, Any]
    """Id, SHA-256, counts, and warnings about its rows."""
    spec: dict[str, Any]
    plan: dict[str, Any]
    """The choices for this machine: compute dtype, device, threads, steps."""
    versions: dict[str, str]
    held_out: dict[str, Any]
    """Losses before and after training, number of measured rows and tokens, source of the rows (in held_out.jsonl)."""
    stop_tokens: dict[str, Any] | None = None
    """Tokens that end an answer: `stop_tokens.StopTokens`; None in the manifests of earlier versions."""
    files: tuple[ManifestFile, ...]

    @property
    def total_bytes(self) -> int:
        """The size of all files, without the manifest."""
        return sum(file.bytes for file in self.files)


def describe_file(path: Path) -> ManifestFile:
    """The manifest entry of a file: name, size and SHA-256."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return ManifestFile(name=path.name, bytes=size, sha256=digest.hexdigest())
