"""A service over the tiny model, with its files in the test's directory; a running and a succeeded job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_service.actions.service import Service, Stores
from qlora_service.artifacts.manifest import Manifest, describe_file
from qlora_service.artifacts.store import ArtifactStore, job_key
from qlora_service.domain.jobs import Job
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.queue.claim import Claim
from qlora_service.queue.queue import Queue
from qlora_service.store.database import Database
from tests.control_plane import SteppedClock, claim_next, stored_rows
from tests.qlora_service.actions._submissions import ROWS, jsonl, submit


@pytest.fixture(scope="module")
def catalog(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    catalog = Catalog(tmp_path_factory.mktemp("models"))
    catalog.import_model("tiny", tiny_model)
    return catalog


@pytest.fixture
def make_service(database: Database, catalog: Catalog, clock: SteppedClock, tmp_path: Path) -> Callable[..., Service]:
    """Services with different limits over the same database and files."""

    def make(**limits: int) -> Service:
        stores = Stores(
            database=database,
            artifacts=ArtifactStore((tmp_path / "artifacts").as_uri()),
            catalog=catalog,
            tmp_dir=tmp_path / "tmp",
            clock=clock,
            **limits,
        )
        return Service.of(stores)

    return make


@pytest.fixture
def service(make_service: Callable[..., Service]) -> Service:
    return make_service()


@pytest.fixture
def upload(tmp_path: Path) -> Callable[[Any, str], Path]:
    """Writes an uploaded file of rows, or of the given bytes, as the API does."""

    def write(content: Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else jsonl(content))
        return path

    return write


@pytest.fixture
def stored_state(database: Database, tmp_path: Path) -> Callable[[], Any]:
    """Reads all database rows, and the paths of all objects and scratch files."""

    def read() -> Any:
        files = {path for name in ("artifacts", "tmp") for path in (tmp_path / name).rglob("*")}
        return stored_rows(database), files

    return read


@pytest.fixture
def running(service: Service, queue: Queue) -> Claim:
    """The claim of a running job."""
    submit(service, dataset={"rows": ROWS})
    return claim_next(queue)


@pytest.fixture
def published(running: Claim, service: Service, queue: Queue, tmp_path: Path) -> Job:
    """A job whose second attempt published two files; its first was stopped after it stored one of the same name."""
    artifacts = ArtifactStore((tmp_path / "artifacts").as_uri())
    artifacts.create(job_key(running.job_id, running.token, "adapter_model.safetensors"), b"of the first attempt")
    queue.release(running, "the worker was stopped")
    claim = claim_next(queue)
    files = []
    for name, content in {"adapter_model.safetensors": b"weights" * 100, "README.md": b"# card"}.items():
        path = tmp_path / name
        path.write_bytes(content)
        artifacts.put_file(job_key(claim.job_id, claim.token, name), path)
        files.append(describe_file(path))
    manifest = Manifest(
        job_id=claim.job_id, attempt=claim.token, base_model={}, dataset={}, spec={}, plan={}, versions={},
        held_out={}, files=tuple(files),
    )  # fmt: skip
    artifacts.create(job_key(claim.job_id, claim.token, "manifest.json"), manifest.model_dump_json().encode())
    queue.succeed(claim, {"attempt": claim.token})
    return service.jobs.get(claim.job_id)
