"""The GPUs and the CPU of this machine, queried from the driver and the kernel without torch."""

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
CPU_INFO = Path("/proc/cpuinfo")

log = structlog.get_logger()


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine."""

    uuid: str
    device: Device
    free_now_bytes: int
    """Free bytes at the moment; other processes may be using the card"""


def gpus(visible: str | None) -> list[Gpu]:
    """The NVIDIA GPUs, in the driver's order; empty without a driver, its Python bindings or a card.

    `visible` is the operator's CUDA_VISIBLE_DEVICES: indices or UUID prefixes; empty hides all cards, None shows all.
    A card that does not respond is omitted and logged.
    """
    with _nvml() as nvml:
        all_gpus = [] if nvml is None else [_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    visible_uuids = choose_visible([None if gpu is None else gpu.uuid for gpu in all_gpus], visible)
    by_uuid = {gpu.uuid: gpu for gpu in all_gpus if gpu is not None}
    return [by_uuid[uuid] for uuid in visible_uuids]


def choose_visible(uuids: list[str | None], visible: str | None) -> list[str]:
    """The UUIDs that `visible` selects; None among `uuids` is a card that does not respond."""
    if visible is None:
        return [uuid for uuid in uuids if uuid is not None]
    chosen = []
    for name in filter(None, (part.strip() for part in visible.split(","))):
        if name.isdigit():
            matches = uuids[int(name) : int(name) + 1]
        else:
            matches = [uuid for uuid in uuids if uuid is not None and uuid.startswith(name)]
        if not matches:
            break  # CUDA as well ignores all names after an unknown one
        chosen += [uuid for uuid in matches if uuid is not None]
    return chosen


def this_cpu() -> Device:
    """The CPU, with the machine's memory within the container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory_limit()
    return Device(
        f"{platform.machine()} CPU", total if limit is None else min(total, limit), cuda=False, bf16=_has_cpu_bf16()
    )


def has_torch() -> bool:
    """Whether torch is installed, so that trainers can run; the API's own container has no torch."""
    return find_spec("torch") is not None


@contextmanager
def _nvml() -> Iterator[Any]:
    """NVML, initialized; None without its Python bindings or a driver."""
    try:
        import pynvml
    except ModuleNotFoundError:
        yield None  # not among the dependencies of the SDK
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
        log.warning("gpu_not_responding", index=index, error=str(error))
        return None


def _memory(nvml: Any, handle: Any) -> tuple[int, int]:
    """(total, free) bytes of a card; those of the machine for a card that shares its memory."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError_NotSupported:
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    return int(memory.total), int(memory.free)


def _has_cpu_bf16() -> bool:
    """The same as `training.device.has_bf16`, without torch."""
    try:
        return "avx512_bf16" in CPU_INFO.read_text()
    except OSError:
        return False
