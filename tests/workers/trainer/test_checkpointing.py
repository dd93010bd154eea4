"""When checkpoints are saved and reported, with real checkpoints on a real disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from qlora_service.errors import Interrupted
from qlora_service.training.checkpoint.checkpoints import Checkpoints
from qlora_service.training.checkpoint.disk_reserve import RESERVE_FILE, DiskReserve
from tests.qlora_service.training.checkpoint.test_checkpoints import loaded_step, state
from tests.workers.trainer._attempts import AttemptRecorder
from workers.trainer.checkpointing import Checkpointing
from workers.trainer.context import AttemptContext, AttemptInputs
from workers.trainer.load import LoadedNetwork
from workers.warm_base import BaseHolder

MIB = 2**20


class Bench:
    """A control over real checkpoints and a real reserve, with a recording reporter."""

    def __init__(
        self,
        directory: Path,
        *,
        token: int = 1,
        every_s: float = 60.0,
        check: Callable[[], None] = lambda: None,
        checkpoint_bytes: int = 2 * MIB,
        bytes_at_end: int = 2 * MIB,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.reporter, self.reserve = AttemptRecorder(), DiskReserve(directory / RESERVE_FILE)
        self.checkpoints = Checkpoints(directory / "checkpoints", token)
        self.checkpoints.latest()
        metrics_file = directory / "metrics.jsonl"
        metrics_file.write_text("metrics\n")
        self.plan: dict[str, Any] = {"micro_batch_tokens": 512, "changes": []}
        unused: Any = None
        inputs = AttemptInputs(unused, token, unused, unused, unused, unused, unused, every_s, needs_gpu=False)
        loaded = LoadedNetwork(unused, unused, unused, self.plan, environment={"threads": 1}, base_source="cached")
        self.control = Checkpointing(
            AttemptContext(inputs, self.reporter, check, self.reserve, metrics_file, BaseHolder()),
            self.checkpoints,
            loaded,
            lambda *_: nullcontext(),
            checkpoint_bytes=checkpoint_bytes,
            bytes_at_end=bytes_at_end,
        )

    def save(self, step: int) -> None:
        """Saves a durable checkpoint that is not reported yet."""
        self.control.save(state(step))
        self.checkpoints.flush()


def test_a_checkpoint_is_due_after_the_interval(tmp_path: Path) -> None:
    bench = Bench(tmp_path, every_s=2)
    assert not bench.control.checkpoint_is_due()
    time.sleep(2.05)
    assert bench.control.checkpoint_is_due()
    bench.save(1)
    assert not bench.control.checkpoint_is_due()
    assert Bench(tmp_path / "always", every_s=0.0).control.checkpoint_is_due()


def test_a_durable_checkpoint_is_reported_once_even_if_the_check_ends_the_attempt(tmp_path: Path) -> None:
    def stop() -> None:
        raise Interrupted("enough")

    bench = Bench(tmp_path, check=stop)
    with pytest.raises(Interrupted):
        bench.control.check()
    assert bench.reporter.saved_steps == []
    bench.save(3)
    for _ in range(2):
        with pytest.raises(Interrupted):
            bench.control.check()
    assert bench.reporter.saved_steps == [3]
    bench.control.save(state(4))
    bench.control.flush()
    assert bench.reporter.saved_steps == [3, 4]
    assert loaded_step(tmp_path / "checkpoints") == 4
    # The checkpoint that an attempt resumes from was reported by the attempt before.
    following = Bench(tmp_path, token=2)
    following.control.check()
    assert following.reporter.saved_steps == []


def test_checkpoints_take_space_from_the_reserve_except_what_publishing_needs(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.reserve.reserve(5 * MIB)
    held_bytes = []
    for step in (1, 2, 3, 4):
        bench.save(step)
        held_bytes.append(bench.reserve.held_bytes)
    assert held_bytes == [3 * MIB, 2 * MIB, 2 * MIB, 2 * MIB]


def test_every_change_of_the_plan_is_stored_in_it_and_reported(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    changes = [
        {"step": 1, "what": "micro_batch_tokens", "from": 512, "to": 256, "why": "memory"},
        {"step": 4, "what": "micro_batch_tokens", "from": 256, "to": 128, "why": "memory"},
    ]
    for change in changes:
        bench.control.plan_changed(change)
    assert bench.plan == bench.reporter.plan == {"micro_batch_tokens": 128, "changes": changes}
    assert [message and "micro_batch_tokens is" in message for message in bench.reporter.messages] == [True, True]
