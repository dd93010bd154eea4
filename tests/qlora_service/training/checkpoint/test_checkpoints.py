"""Checkpoints: loaded bit for bit if intact, never loaded if damaged."""

from __future__ import annotations

import math
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qlora_service.specs import AdaLora, Adapter, Lora, Training
from qlora_service.training.checkpoint.checkpoints import BEST, MANIFEST, METRICS, Checkpoints, expected_bytes
from qlora_service.training.checkpoint.state import (
    StepHistory,
    TrainingState,
    from_files,
    random_state,
    restore_random_state,
    to_files,
)
from qlora_service.training.evaluation.held_out import HeldOutState
from qlora_service.training.evaluation.row_losses import RowLosses
from qlora_service.training.objectives import Evaluation
from tests.tiny_training import CPU, CheckpointingControl, Recorder, load, network, rows, run

ROOT = Path(__file__).parents[4]
DAMAGES = 200


def state(step: int, best: float | None = None) -> TrainingState:
    """A state of arbitrary values; `best` is the value of its best weights."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn((8, 16), generator=generator)
    losses = RowLosses()
    losses.record(step, [1, 700], [0.1, math.nan])
    return TrainingState(
        history=StepHistory(step, 1, 0, (0.1 + 0.2, 5e-324, 1.7976931348623157e308), math.inf, math.nan),
        parameters={"a.lora_A.weight": weight, "a.lora_B.weight": weight.double() / 3},
        optimizer={
            "a.lora_A.weight": {
                "step": torch.tensor(step),
                "state1": torch.randint(256, (8, 16), generator=generator, dtype=torch.uint8),
                "absmax1": torch.tensor([-0.0, math.nan, 1e-45]),
            }
        },
        allocation={"ipt/a.lora_A": weight + 1, "rank_pattern/a.lora_E": torch.tensor([True, False])},
        held_out=HeldOutState(
            Evaluation(1 / 3, 2 / 3, math.pi), Evaluation(0.1, 0.2), Evaluation(0.1, 0.2), 4, 2, step,
            {} if best is None else {"a.lora_A.weight": torch.full((8, 16), best)},
        ),
        row_losses=losses.state(),
        random_state=random_state(CPU),
        micro_batch_tokens=96,
        gradient_checkpointing=True,
    )  # fmt: skip


def saved(directory: Path, *steps: int, token: int = 1, best: float | None = None) -> Checkpoints:
    checkpoints = Checkpoints(directory, token)
    for step in steps:
        checkpoints.save(state(step, best), f"metrics {step}\n".encode(), {"torch": torch.__version__})
        checkpoints.flush()
    return checkpoints


def loaded_step(directory: Path, token: int = 9) -> int | None:
    latest = Checkpoints(directory, token).latest()
    return latest and latest[0].step


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- writing


def test_a_state_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    saved(tmp_path, 7, best=0.5)
    latest = Checkpoints(tmp_path, 2).latest()
    assert latest is not None
    assert latest[1:] == (b"metrics 7\n", {"torch": torch.__version__})
    written, read = to_files(state(7, best=0.5)), to_files(latest[0])
    assert read == written
    history, held_out = latest[0].history, latest[0].held_out
    assert history.recent_losses == (0.1 + 0.2, 5e-324, 1.7976931348623157e308)
    assert math.isnan(history.grad_norm)
    assert replace(held_out, best_weights={}) == replace(state(7).held_out, best_weights={})
    assert torch.equal(held_out.best_weights["a.lora_A.weight"], torch.full((8, 16), 0.5))
    for part in ("parameters", "allocation"):
        for name, tensor in getattr(state(7), part).items():
            assert torch.equal(getattr(latest[0], part)[name], tensor)
    for name, tensor in state(7).optimizer["a.lora_A.weight"].items():
        loaded = latest[0].optimizer["a.lora_A.weight"][name]
        assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
        assert loaded.numpy().tobytes() == tensor.numpy().tobytes()


def test_restored_random_generators_continue_the_sequence() -> None:
    saved_state = from_files(to_files(state(1))).random_state
    drawn = random.random(), float(np.random.rand()), float(torch.rand(()))
    restore_random_state(saved_state, CPU)
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == drawn


def test_only_the_last_two_are_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2, 12)
    assert names(tmp_path) == ["step-00000002.a1", "step-00000012.a1"]
    assert checkpoints.durable_step == 12
    assert checkpoints.bytes_on_disk() == sum(file.stat().st_size for file in tmp_path.rglob("*.*") if file.is_file())


def test_leftovers_of_dead_attempts_are_deleted_and_those_of_newer_attempts_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1, 9, token=7)
    saved(tmp_path, 3, 4, token=2)
    for name in ("staging-step-00000005.a2", "removed-step-00000001.a1", "bad-step-00000002.a2"):
        (tmp_path / name).mkdir()
    staging_of_newer = tmp_path / "staging-step-00000010.a7"
    staging_of_newer.mkdir()
    saved(tmp_path, 5, 6, token=3)
    assert names(tmp_path) == [
        "staging-step-00000010.a7", "step-00000001.a7", "step-00000006.a3", "step-00000009.a7",
    ]  # fmt: skip
    assert loaded_step(tmp_path) == 9


def test_the_newest_is_kept_although_others_have_more_steps(tmp_path: Path) -> None:
    saved(tmp_path, 50, 51, token=1)
    saved(tmp_path, 30, token=2)
    assert names(tmp_path) == ["step-00000030.a2", "step-00000050.a1", "step-00000051.a1"]


def test_the_same_step_again_replaces_the_first(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 3, 4)
    checkpoints.save(state(4), b"metrics and an evaluation\n", {})
    checkpoints.flush()
    assert names(tmp_path) == ["step-00000003.a1", "step-00000004.a1"]
    latest = Checkpoints(tmp_path, 2).latest()
    assert latest is not None
    assert latest[1] == b"metrics and an evaluation\n"


def test_a_checkpoint_being_replaced_is_still_loaded(tmp_path: Path) -> None:
    """As after a kill between the two renames."""
    saved(tmp_path, 3, 4)
    (tmp_path / "step-00000004.a1").rename(tmp_path / "step-00000004.a1.old")
    assert loaded_step(tmp_path) == 4
    saved(tmp_path, 5, token=2)
    assert names(tmp_path) == ["step-00000003.a1", "step-00000005.a2"]


def test_best_weights_are_linked_and_never_shared_by_both_kept_checkpoints(tmp_path: Path) -> None:
    def inode(step: int) -> int:
        return (tmp_path / f"step-{step:08d}.a1" / BEST).stat().st_ino

    checkpoints = saved(tmp_path, 1, best=0.5)
    first = inode(1)
    for step in (2, 3):
        checkpoints.save(state(step, best=0.5), b"", {})
        checkpoints.flush()
    assert inode(3) == first
    assert inode(2) != first
    checkpoints.save(state(4, best=0.25), b"", {})
    checkpoints.flush()
    assert inode(4) not in {inode(3), first}
    (tmp_path / "step-00000003.a1" / BEST).write_bytes(b"damaged")
    checkpoints.save(state(5, best=0.5), b"", {})  # the file to link is damaged
    checkpoints.flush()
    assert loaded_step(tmp_path) == 5


# --- damage


def truncate(path: Path, generator: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: generator.randrange(path.stat().st_size)])


def flip(path: Path, generator: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(data)


def lengthen(path: Path, generator: random.Random) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def remove(path: Path, generator: random.Random) -> None:
    path.unlink()


def rename(path: Path, generator: random.Random) -> None:
    path.rename(path.with_name(path.name + "~"))


def exchange(path: Path, generator: random.Random) -> None:
    """Replaces the file by that of the previous checkpoint."""
    shutil.copyfile(path.parents[1] / "step-00000011.a1" / path.name, path)


def rename_checkpoint(path: Path, generator: random.Random) -> None:
    path.parent.rename(path.parents[1] / f"step-{generator.randrange(13, 99):08d}.a{generator.randrange(9)}")


DAMAGE: list[Callable[[Path, random.Random], None]] = [
    truncate, flip, flip, lengthen, remove, rename, exchange, rename_checkpoint,
]  # fmt: skip


def test_a_damaged_checkpoint_is_skipped_for_the_previous_one(tmp_path: Path) -> None:
    pristine, generator = tmp_path / "pristine", random.Random(4)
    saved(pristine, 11, 12, best=0.5)
    assert loaded_step(pristine) == 12
    same_in_both = {BEST, "environment.json"}
    for number in range(DAMAGES):
        directory = tmp_path / str(number)
        shutil.copytree(pristine, directory)
        files = sorted((directory / "step-00000012.a1").iterdir())
        damage, file = generator.choice(DAMAGE), generator.choice(files)
        if damage is exchange and file.name in same_in_both:
            file = file.with_name(METRICS)
        damage(file, generator)
        assert loaded_step(directory) == 11, (damage.__name__, file.name)
        assert [name[:4] for name in names(directory)] == ["bad-", "step"]
        shutil.rmtree(directory)


def test_without_an_intact_checkpoint_none_is_loaded(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", 1).latest() is None
    saved(tmp_path, 1, 2)
    for manifest in tmp_path.glob(f"*/{MANIFEST}"):
        manifest.write_text("[" * 100_000)
    assert loaded_step(tmp_path) is None
    saved(tmp_path, 3, token=9)
    assert names(tmp_path) == ["step-00000003.a9"]


def test_a_full_disk_raises_in_the_next_save_and_damages_nothing(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        checkpoints.save(state(2), b"", {})
        with pytest.raises(OSError, match="too large"):
            checkpoints.save(state(3), b"", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step-00000001.a1"]
    assert checkpoints.durable_step == 1
    checkpoints.save(state(4), b"", {})
    checkpoints.flush()
    assert loaded_step(tmp_path) == 4


def test_a_checkpoint_is_not_damaged_when_the_host_has_no_memory(tmp_path: Path) -> None:
    large = replace(state(2), parameters={"a.lora_A.weight": torch.zeros(64 * 2**20, dtype=torch.uint8)})
    checkpoints = saved(tmp_path, 1)
    checkpoints.save(large, b"", {})
    checkpoints.flush()
    # In a new process, because in this one memory that earlier tests freed could hold the file.
    script = """
import resource, sys
from pathlib import Path
from qlora_service.training.checkpoint.checkpoints import Checkpoints

pages = int(Path("/proc/self/statm").read_text().split()[0])
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**25, hard))
try:
    Checkpoints(Path(sys.argv[1]), 2).latest()
except MemoryError:
    print("no memory")
"""
    command = [sys.executable, "-c", script, tmp_path]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert process.stdout == "no memory\n", process.stderr
    assert names(tmp_path) == ["step-00000001.a1", "step-00000002.a1"]
    assert loaded_step(tmp_path) == 2


# --- size


@pytest.mark.parametrize("adapter", [Lora(r=256), AdaLora(method="adalora", init_r=8, target_r=2)])
@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit", "adamw_torch", "paged_lion_8bit"])
def test_expected_bytes_are_a_close_upper_bound(tiny_model: Path, tmp_path: Path, optim: str, adapter: Adapter) -> None:
    training = Training(batch_size=4, optim=optim, load_best_model_at_end=True)
    model, recorder, checkpoints = load(tiny_model, adapter=adapter), Recorder(), Checkpoints(tmp_path, 1)
    control = CheckpointingControl(checkpoints, recorder)
    control.is_due = True
    expected = expected_bytes(network(model), training, rows=12, total_steps=3)
    run(model, rows(12), training, steps=3, recorder=recorder, control=control)
    actual = max(sum(file.stat().st_blocks * 512 for file in path.iterdir()) for path in tmp_path.iterdir())
    assert actual <= expected <= actual + 700_000
