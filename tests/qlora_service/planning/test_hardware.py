from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_service.planning.hardware import choose_visible, gpus, this_cpu, trains_here
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
def test_what_the_operator_hid_stays_hidden(visible: str | None, chosen: list[str]) -> None:
    assert choose_visible(CARDS, visible) == chosen


def test_hidden_gpus_are_none() -> None:
    assert gpus("") == []


def test_a_containers_limit_is_all_the_memory_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(cgroup, "CGROUP", tmp_path)
    machine = this_cpu()
    assert not machine.cuda
    limit.write_text("max\n")
    assert this_cpu() == machine
    limit.write_text(f"{2**30}\n")
    assert this_cpu().total_bytes == 2**30 < machine.total_bytes


def test_bfloat16_is_where_torch_says_it_is() -> None:
    assert this_cpu().bf16 == has_bf16(torch.device("cpu"))


def test_trainers_run_where_torch_is() -> None:
    assert trains_here()
