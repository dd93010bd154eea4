"""Which GPUs trainers may use, asked from the driver without torch."""

from __future__ import annotations

import pynvml
import structlog

log = structlog.get_logger()


def gpu_uuids(visible: str | None) -> list[str]:
    """UUIDs of the NVIDIA GPUs, in the driver's order; empty without a driver or a card.

    `visible` is CUDA_VISIBLE_DEVICES as the operator set it: numbers or UUID prefixes; empty hides all; None shows
    all. A card that does not answer is left out and logged.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return choose_visible([_uuid(index) for index in range(pynvml.nvmlDeviceGetCount())], visible)
    finally:
        pynvml.nvmlShutdown()


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


def _uuid(index: int) -> str | None:
    try:
        return str(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index)))
    except pynvml.NVMLError as error:
        log.warning("gpu_does_not_answer", index=index, error=str(error))
        return None
