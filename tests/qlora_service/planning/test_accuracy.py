from __future__ import annotations

from typing import Any

import pytest

from qlora_service.planning.accuracy import accuracies, learned_margin

GPU, CPU = "NVIDIA GeForce RTX 3090", "x86_64 CPU"


def measured(device: str, predicted: dict[str, Any], actual: dict[str, Any]) -> dict[str, Any]:
    return {"device": device, "predicted": predicted, "actual": actual}


JOBS = [
    measured(
        GPU,
        {"memory": {"allocated": 100, "reserved": 200}, "time": {"seconds": 10}, "eta": {"seconds": 5}},
        {"memory": {"allocated": 90, "reserved": 230}, "time": {"seconds": 12}, "eta": {"seconds": 5}},
    ),
    measured(GPU, {"memory": {"allocated": 100, "reserved": 200}}, {"memory": {"allocated": 99, "reserved": 201}}),
    measured(CPU, {"memory": {"allocated": 100}}, {"memory": {"allocated": 101}, "time": {"seconds": 3}}),
    measured(CPU, {}, {}),  # cancelled before its first step, or another version's format
]


def test_distributions_of_a_device_are_over_jobs_with_predicted_and_observed_values() -> None:
    gpu, cpu = accuracies(JOBS)
    assert (gpu.device, gpu.jobs, cpu.device, cpu.jobs) == (GPU, 2, CPU, 2)
    assert gpu.allocated is not None
    assert (gpu.allocated.jobs, gpu.allocated.min, gpu.allocated.max) == (2, 0.9, 0.99)
    assert gpu.time is not None
    assert (gpu.time.jobs, gpu.time.p50) == (1, 1.2)
    assert gpu.eta is not None
    assert gpu.eta.p50 == 1.0
    assert cpu.allocated is not None
    assert cpu.allocated.jobs == 1
    assert (cpu.reserved, cpu.time) == (None, None)
    assert accuracies([]) == []


def test_margin_is_learned_from_reserved_bytes_on_the_device() -> None:
    assert learned_margin(GPU, JOBS) == pytest.approx(1.15)
    assert learned_margin("RTX 3090", JOBS) == pytest.approx(1.15)  # a short name of the same card
    assert learned_margin(CPU, JOBS) == 1.03
    assert learned_margin("a new card", JOBS) == 1.03
