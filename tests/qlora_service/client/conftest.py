"""Fixtures: a running API with one base model, a client of it, and a proxy that breaks connections to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_service.client import Client
from qlora_service.queue.claim import Claim
from qlora_service.queue.queue import Queue
from tests.breaking_proxy import BreakingProxy
from tests.running_api import RunningApi, api, queue, rows

__all__ = ["api", "queue", "rows"]


@pytest.fixture
def client(api: RunningApi) -> Iterator[Client]:
    with Client(api.url, patience_s=20) as client:
        yield client


@pytest.fixture
def proxy(api: RunningApi) -> Iterator[BreakingProxy]:
    with BreakingProxy(api.port) as proxy:
        yield proxy


@pytest.fixture
def claim(client: Client, queue: Queue, rows: Path) -> Claim:
    """The claim of a running job, which was queued with the highest priority."""
    spec = {"base_model": "tiny", "training": {"max_seq_len_tokens": 64}, "priority": 100}
    job = client.submit(spec, rows)
    claimed = queue.claim("test")
    assert claimed is not None
    assert claimed[1].id == job.id
    return claimed[0]
