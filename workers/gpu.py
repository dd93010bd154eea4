"""Which GPUs this machine has, asked from the driver without torch."""

from __future__ import annotations

import pynvml


def gpu_uuids() -> list[str]:
    """UUIDs of the NVIDIA GPUs, in the driver's order; empty without a driver or a card."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    finally:
        pynvml.nvmlShutdown()
