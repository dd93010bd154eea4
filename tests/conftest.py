"""Fixtures of all tests, and the environment in which they run."""

from __future__ import annotations

import os

# Read when the libraries are first imported: no hub, one thread, no forked tokenizer pools.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No torch compiler, as in trainers (`process.startup.importing_torch`).
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# Applies to the services that tests start, too; tests of keys override it.
os.environ["QLORA_KEYS"] = "off"

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from qlora_service.process.signals import restore_stop_signals
from tests.postgres import postgres, postgres_url
from tests.tiny_model import tiny_model
from tests.workspace import Workspace

__all__ = ["postgres", "postgres_url", "tiny_model"]


SLOWEST = (
    "tests/chaos/test_random_kills.py",
    "tests/chaos",
    "tests/integration",
    "tests/workers",
    "tests/qlora_service/training/test_resume.py",
)
"""Paths of the slowest tests, which run first, so that pytest's workers end at about the same time."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        return next((rank for rank, path in enumerate(SLOWEST) if item.nodeid.startswith(path)), len(SLOWEST))

    items.sort(key=rank)
    for item in items:
        if "postgres" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")


# A shell's background processes ignore SIGINT, and so would all processes that tests start and interrupt.
restore_stop_signals()

# As in trainers when they import torch (`process.startup`): the libraries' two million objects stay alive, and
# traversing them in every collection that a job runs would take longer than the tested code.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    """Undoes a test's logging configuration, such as that of an entry point run in this process."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def workspace(tmp_path: Path, tiny_model: Path) -> Workspace:
    return Workspace(tmp_path / "data", tiny_model)
