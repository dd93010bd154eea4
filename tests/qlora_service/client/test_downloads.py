"""Downloads from a real API; where a connection has to break, through a proxy of real sockets."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest

from qlora_service.artifacts.store import job_key
from qlora_service.client import Client, Unreachable
from qlora_service.errors import InvalidRequest, Unavailable
from qlora_service.queue.claim import Claim
from qlora_service.queue.queue import Queue
from tests.breaking_proxy import BreakingProxy
from tests.running_api import RunningApi, succeed

FILES = {"adapter_model.safetensors": os.urandom(300_000), "adapter_config.json": b"{}", "empty.txt": b""}


def test_download_has_every_file_and_the_manifest(
    api: RunningApi, client: Client, queue: Queue, claim: Claim, tmp_path: Path
) -> None:
    succeed(api.data_dir, queue, claim, FILES)
    paths = client.download(claim.job_id, tmp_path / "out")
    assert {path.name for path in paths} == {*FILES, "manifest.json"}
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in FILES.items())
    assert not list(tmp_path.glob("out/*.part"))
    inodes = [path.stat().st_ino for path in paths]
    assert [path.stat().st_ino for path in client.download(claim.job_id, tmp_path / "out")] == inodes


def test_interrupted_download_is_resumed(
    api: RunningApi, client: Client, queue: Queue, claim: Claim, tmp_path: Path
) -> None:
    succeed(api.data_dir, queue, claim, FILES)
    weights = FILES["adapter_model.safetensors"]
    (tmp_path / "adapter_model.safetensors.part").write_bytes(weights[:200_000])
    api.log.write_bytes(b"")
    client.download(claim.job_id, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == weights
    partial = [line for line in api.log.read_text().splitlines() if '"status": 206' in line]
    assert len(partial) == 1
    assert "adapter_model.safetensors" in partial[0]


def test_file_arrives_over_broken_connections(
    api: RunningApi, proxy: BreakingProxy, queue: Queue, claim: Claim, tmp_path: Path
) -> None:
    succeed(api.data_dir, queue, claim, FILES)
    proxy.cut_after = 80_000
    dropped: list[float] = []
    with Client(proxy.url, patience_s=20, on_drop=lambda _, patience_s: dropped.append(patience_s)) as client:
        client.download(claim.job_id, tmp_path)
    assert all((tmp_path / name).read_bytes() == content for name, content in FILES.items())
    assert len(dropped) >= 3
    assert max(proxy.brought) <= 80_000


def test_download_fails_when_no_more_bytes_arrive(
    api: RunningApi, proxy: BreakingProxy, queue: Queue, claim: Claim, tmp_path: Path
) -> None:
    succeed(api.data_dir, queue, claim, FILES)
    with Client(proxy.url, patience_s=0.5) as client:
        client.artifacts(claim.job_id)
        proxy.cut_after = 0
        with pytest.raises(Unreachable, match="broke"):
            client.download(claim.job_id, tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("stale", [b"of another file", b"x" * 300_000, b"x" * 400_000])
def test_part_of_another_file_is_replaced(
    api: RunningApi, client: Client, queue: Queue, claim: Claim, tmp_path: Path, stale: bytes
) -> None:
    succeed(api.data_dir, queue, claim, FILES)
    (tmp_path / "adapter_model.safetensors.part").write_bytes(stale)
    client.download(claim.job_id, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == FILES["adapter_model.safetensors"]


def test_damaged_file_never_gets_its_name(
    api: RunningApi, client: Client, queue: Queue, claim: Claim, tmp_path: Path
) -> None:
    succeed(api.data_dir, queue, claim, FILES)
    stored = api.data_dir / "artifacts" / job_key(claim.job_id, claim.token, "adapter_config.json")
    stored.write_bytes(b"[]")
    with pytest.raises(Unavailable, match=r"adapter_config\.json .* arrived with SHA-256"):
        client.download(claim.job_id, tmp_path)
    assert not list(tmp_path.glob("adapter_config.json*"))


def test_download_never_overwrites_other_files(
    api: RunningApi, client: Client, queue: Queue, claim: Claim, tmp_path: Path
) -> None:
    succeed(api.data_dir, queue, claim, FILES)
    existing = tmp_path / "out" / "adapter_config.json"
    existing.parent.mkdir()
    existing.write_text("other content")
    with pytest.raises(InvalidRequest, match=r"contains another adapter_config\.json"):
        client.download(claim.job_id, existing.parent)
    assert list(existing.parent.iterdir()) == [existing]
    assert existing.read_text() == "other content"


def test_download_into_a_file_is_refused(
    api: RunningApi, client: Client, queue: Queue, claim: Claim, tmp_path: Path
) -> None:
    succeed(api.data_dir, queue, claim, FILES)
    (tmp_path / "file").touch()
    with pytest.raises(InvalidRequest, match="choose another directory"):
        client.download(claim.job_id, tmp_path / "file")


def test_full_disk_is_an_error_and_keeps_the_received_bytes(
    api: RunningApi, client: Client, queue: Queue, claim: Claim, tmp_path: Path
) -> None:
    succeed(api.data_dir, queue, claim, FILES)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(InvalidRequest, match="cannot be written"):
            client.download(claim.job_id, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous_handler)
    assert 0 < (tmp_path / "out" / "adapter_model.safetensors.part").stat().st_size <= 100_000
    client.download(claim.job_id, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == FILES["adapter_model.safetensors"]
