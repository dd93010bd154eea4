from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_service.planning.hardware import choose_visible, gpus, has_torch, this_cpu
from qlora_service.process import cgroup
from qlora_service.training.device import has_bf16

CARDS: list[str | None] = ["GPU-aaa", None, "GPU-ccc", "GPU-cdd"]


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [
        (None, ["GPU-aaa", "GPU-ccc", "GPU-cdd"]),
        ("", []),
        ("0", ["GPU-aaa"]),
        ("2, 0", ["GPU-ccc", "GPU-aaa"]),
        ("GPU-cc", ["GPU-ccc"]),
        ("1", []),
        ("0,9,2", ["GPU-aaa"]),
        ("-1", []),
    ],
)
def test_gpus_are_selected_like_cuda_visible_devices(visible: str | None, chosen: list[str]) -> None:
    assert choose_visible(CARDS, visible) == chosen


def test_empty_selection_hides_all_gpus() -> None:
    assert gpus("") == []


def test_memory_of_the_cpu_is_limited_by_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(cgroup, "CGROUP", tmp_path)
    machine = this_cpu()
    assert not machine.cuda
    limit.write_text("max\n")
    assert this_cpu() == machine
    limit.write_text(f"{2**30}\n")
    assert this_cpu().total_bytes == 2**30 < machine.total_bytes


def test_bfloat16_support_equals_that_of_torch() -> None:
    assert this_cpu().bf16 == has_bf16(torch.device("cpu"))


def test_installed_torch_is_found() -> None:
    assert has_torch()
