"""What this machine has to train on, asked from the driver and the kernel without torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import structlog

from qlora_service.planning.cards import Device
from qlora_service.process.cgroup import memory_limit

AMPERE = (8, 0)
"""Compute capability from which bfloat16 runs in hardware"""
CPU_FACTS = Path("/proc/cpuinfo")

log = structlog.get_logger()


@dataclass(frozen=True)
class Gpu:
    """A card of this machine."""

    uuid: str
    device: Device
    free_now_bytes: int
    """While others may be using it"""


def gpus(visible: str | None) -> list[Gpu]:
    """The NVIDIA GPUs, in the driver's order; empty without a driver, its Python bindings or a card.

    `visible` is CUDA_VISIBLE_DEVICES as the operator set it: numbers or UUID prefixes; empty hides all; None shows
    all. A card that does not answer is left out and logged.
    """
    with _nvml() as nvml:
        found = [] if nvml is None else [_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    chosen = choose_visible([None if gpu is None else gpu.uuid for gpu in found], visible)
    by_uuid = {gpu.uuid: gpu for gpu in found if gpu is not None}
    return [by_uuid[uuid] for uuid in chosen]


def choose_visible(uuids: list[str | None], visible: str | None) -> list[str]:
    """The UUIDs that `visible` names; None among `uuids` is a card that does not answer."""
    if visible is None:
        return [uuid for uuid in uuids if uuid is not None]
    chosen = []
    for name in filter(None, (part.strip() for part in visible.split(","))):
        if name.isdigit():
            matches = uuids[int(name) : int(name) + 1]
        else:
            matches = [uuid for uuid in uuids if uuid is not None and uuid.startswith(name)]
        if not matches:
            break  # CUDA too ignores everything behind a name that it does not know
        chosen += [uuid for uuid in matches if uuid is not None]
    return chosen


def this_cpu() -> Device:
    """The CPU, with the machine's memory within the container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory_limit()
    return Device(
        f"{platform.machine()} CPU", total if limit is None else min(total, limit), cuda=False, bf16=_has_cpu_bf16()
    )


def trains_here() -> bool:
    """Whether trainers can run in this environment: an API in a container of its own has no torch."""
    return find_spec("torch") is not None


@contextmanager
def _nvml() -> Iterator[Any]:
    """The driver's interface; None without."""
    try:
        import pynvml
    except ModuleNotFoundError:
        yield None  # the SDK alone does not come with it
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> Gpu | None:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        total, free = _memory(nvml, handle)
        has_bf16 = tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)) >= AMPERE
        device = Device(str(nvml.nvmlDeviceGetName(handle)), total, bf16=has_bf16)
        return Gpu(str(nvml.nvmlDeviceGetUUID(handle)), device, free)
    except nvml.NVMLError as error:
        log.warning("gpu_does_not_answer", index=index, error=str(error))
        return None


def _memory(nvml: Any, handle: Any) -> tuple[int, int]:
    """Total and free bytes of a card; of one that shares the machine's memory, the machine's."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError_NotSupported:
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    return int(memory.total), int(memory.free)


def _has_cpu_bf16() -> bool:
    """What `training.device.has_bf16` asks torch."""
    try:
        return "avx512_bf16" in CPU_FACTS.read_text()
    except OSError:
        return False
