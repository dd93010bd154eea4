"""The child process: its input, its errors, and the stored results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_service.planning.memory import Category, Memory
from qlora_service.planning.simulation.run import CannotSimulate, Simulator
from qlora_service.specs import JobSpec
from tests.planning_models import config
from tests.planning_published import ROWS, emulated_bytes

pytestmark = pytest.mark.slow

TINY = config(64, 128, 2, 4, 2, 512)
JOB = JobSpec(base_model="tiny")


def simulate(values: dict[str, Any], job: JobSpec = JOB, timeout_s: float = 240, **options: Any) -> Memory:
    simulator = Simulator(timeout_s, options.pop("cache_dir", None))
    return simulator.simulate(values, job, micro_batch_tokens=256, checkpointing=True, **options)


def test_config_is_enough_and_results_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = simulate(TINY, cache_dir=tmp_path)
    assert first.reserved >= first.allocated > first.categories[Category.WEIGHTS] > 0
    renamed = JobSpec(base_model="other", name="memory does not depend on it")
    assert simulate(TINY, renamed, timeout_s=0.001, cache_dir=tmp_path) == first
    with pytest.raises(CannotSimulate, match=r"did not finish within 0\.001 s"):
        simulate(TINY, JobSpec.model_validate({"base_model": "tiny", "adapter": {"r": 9}}), 0.001, cache_dir=tmp_path)
    with pytest.raises(CannotSimulate, match="did not finish"):
        simulate(TINY | {"num_hidden_layers": 3}, timeout_s=0.001, cache_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("qlora_service.planning.simulation.run.version", lambda _: "another")
        with pytest.raises(CannotSimulate, match="did not finish"):
            simulate(TINY, timeout_s=0.001, cache_dir=tmp_path)
    (stored,) = tmp_path.iterdir()
    stored.write_text("half a")
    with pytest.raises(CannotSimulate):
        simulate(TINY, timeout_s=0.001, cache_dir=tmp_path)


def test_unknown_architecture_is_named() -> None:
    with pytest.raises(CannotSimulate, match="does not know the architecture 'llama9'"):
        simulate(TINY | {"model_type": "llama9"})


@pytest.mark.parametrize("row", [ROWS[0], ROWS[2], ROWS[6]], ids=lambda row: row.name)
def test_published_gpu_measurements_are_reproduced_by_emulation(row: Any) -> None:
    assert emulated_bytes(row) == pytest.approx(row.bytes, rel=0.02)
