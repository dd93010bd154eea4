"""Fixtures every test may use, and an environment without surprises."""

from __future__ import annotations

import os

# Read when the libraries are first imported: no hub, one thread, no forked tokenizer pools.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Nor torch's compiler, as in trainers (`quick_start`).
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# Also of the services that tests start; those about keys say otherwise.
os.environ["QLORA_KEYS"] = "off"

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from tests.postgres import postgres, postgres_url
from tests.tiny_model import tiny_model
from tests.workspace import Workspace

__all__ = ["postgres", "postgres_url", "tiny_model"]


LONGEST = (
    "tests/chaos/test_random_kills.py",
    "tests/chaos",
    "tests/integration",
    "tests/workers",
    "tests/qlora_service/training/test_resume.py",
)
"""Where tests take longest: they begin first, so that no worker is left alone with them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        return next((rank for rank, start in enumerate(LONGEST) if item.nodeid.startswith(start)), len(LONGEST))

    items.sort(key=rank)


# As trainers do when they import torch (`quick_start`): the libraries' two million objects stay, and to look through
# them in each of the collections that jobs ask for would take longer than what is tested.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """What a test configures, such as an entry point run in this process, holds for that test alone."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def workspace(tmp_path: Path, tiny_model: Path) -> Workspace:
    return Workspace(tmp_path / "data", tiny_model)
