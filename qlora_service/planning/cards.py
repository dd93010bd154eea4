"""Devices that a job may be planned for, and the memory of each that a training can use. Pure: queries no hardware."""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict, dataclass
from typing import Any

from qlora_service.errors import InvalidRequest
from qlora_service.planning.memory import GIB, MIB
from qlora_service.specs import JobSpec

CUDA_SHARE = 0.98
"""Share of the total reported by NVML that CUDA can allocate; the driver keeps the rest. In its errors, torch reports a
"total capacity" of 23.69 of an RTX 3090's 24.00 GiB, 11.76 of an RTX 3060's 12.00 and 79.25 of an A100's 80.00."""
CUDA_CONTEXT_BYTES = 512 * MIB
"""The CUDA context with torch's kernels, and the handles of cuBLAS and bitsandbytes: about 300 to 400 MB depending on
the card, since CUDA 11.7, which loads kernels lazily (pytorch/pytorch#107667, #109888)"""
CUDA_WORKSPACE_BYTES = 512 * MIB
"""Allocations of libraries outside torch's allocator. Together with the context, this is the mean of nvidia-smi minus
simulated reserved bytes over the runs of fms-acceleration on an A100, 1.0 GiB (range 0.03 to 2.1)."""
CPU_CONTEXT_BYTES = 512 * MIB
"""The interpreter with torch, transformers, peft and bitsandbytes: 473 MiB resident (torch 2.13, x86-64 Linux)"""
CPU_WORKSPACE_BYTES = 512 * MIB
"""For the rest of the service and the operating system"""
SMALLEST_GB, LARGEST_GB = 1, 1024


@dataclass(frozen=True)
class Device:
    """A GPU, or a machine's CPU with its memory."""

    name: str
    total_bytes: int
    """As reported by NVML; of a CPU, the machine's memory within the container's limit"""
    free_bytes: int | None = None
    """Bytes free for the job; None: the whole device"""
    cuda: bool = True
    bf16: bool = True
    """Supports bfloat16 in hardware"""

    @property
    def context_bytes(self) -> int:
        """Bytes that a process takes before its first tensor."""
        return CUDA_CONTEXT_BYTES if self.cuda else CPU_CONTEXT_BYTES

    @property
    def usable_bytes(self) -> int:
        """Bytes that torch's allocator can reserve."""
        available = int(self.total_bytes * CUDA_SHARE) if self.cuda else self.total_bytes
        if self.free_bytes is not None:
            available = min(available, self.free_bytes)
        workspace = CUDA_WORKSPACE_BYTES if self.cuda else CPU_WORKSPACE_BYTES
        return max(0, available - self.context_bytes - workspace)

    @property
    def compute_dtype(self) -> str:
        """The compute dtype that "auto" selects on this device."""
        return "bfloat16" if self.bf16 else "float32"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def resolved_dtype(spec: JobSpec, *, cuda: bool, auto: str | None = None) -> str:
    """The job's compute dtype; "auto" selects `auto`, or without it the dtype of recent hardware."""
    requested = spec.quantization.compute_dtype
    return requested if requested != "auto" else auto or ("bfloat16" if cuda else "float32")


def _card(name: str, mib: int, *, bf16: bool = True) -> Device:
    return Device(name, mib * MIB, bf16=bf16)


CARDS: tuple[Device, ...] = (
    _card("GTX 1080", 8192, bf16=False),
    _card("GTX 1080 Ti", 11264, bf16=False),
    _card("RTX 2070", 8192, bf16=False),
    _card("RTX 2080", 8192, bf16=False),
    _card("RTX 2080 Ti", 11264, bf16=False),
    _card("RTX 3060", 12288),
    _card("RTX 3060 Ti", 8192),
    _card("RTX 3070", 8192),
    _card("RTX 3080", 10240),
    _card("RTX 3080 Ti", 12288),
    _card("RTX 3090", 24576),
    _card("RTX 3090 Ti", 24564),
    _card("RTX 4060", 8188),
    _card("RTX 4060 Ti 16GB", 16380),
    _card("RTX 4070", 12282),
    _card("RTX 4070 Ti SUPER", 16376),
    _card("RTX 4080", 16376),
    _card("RTX 4090", 24564),
    _card("RTX 5060 Ti 16GB", 16311),
    _card("RTX 5070", 12227),
    _card("RTX 5070 Ti", 16303),
    _card("RTX 5080", 16303),
    _card("RTX 5090", 32607),
    _card("Tesla T4", 15360, bf16=False),
    _card("Tesla V100 16GB", 16384, bf16=False),
    _card("Tesla V100 32GB", 32768, bf16=False),
    _card("L4", 23034),
    _card("A10G", 23028),
    _card("A10", 23028),
    _card("A40", 46068),
    _card("RTX A6000", 49140),
    _card("RTX 6000 Ada", 49140),
    _card("L40S", 46068),
    _card("A100 40GB", 40960),
    _card("A100 80GB", 81920),
    _card("H100 80GB", 81559),
)
"""Cards of 8 to 80 GB, with the total reported by NVML (nvidia-smi); bfloat16 runs in hardware from Ampere on"""

_NAME_NOISE = re.compile(r"nvidia|geforce|tesla|rtx|gtx|[^a-z0-9]")
_SIZE = re.compile(r"(\d{1,4})\s*(?:gb|gib|g)", re.IGNORECASE)
_ALIASES = {"4060ti": "4060ti16gb", "5060ti": "5060ti16gb", "v100": "v10016gb", "a100": "a10040gb", "h100": "h10080gb",
            "306012gb": "3060", "309024gb": "3090", "409024gb": "4090"}  # fmt: skip
"""Short names of cards with several memory sizes, and names with a size of cards that the table lists without one"""


def same_device(name: str, other: str) -> bool:
    """Whether two names denote the same hardware: "NVIDIA GeForce RTX 3090" of the driver is "RTX 3090"."""
    return _NAME_NOISE.sub("", name.lower()) == _NAME_NOISE.sub("", other.lower())


def named_device(name: str) -> Device:
    """The card of this name, ignoring brand words and spaces; or a generic card of a size such as "24GB".

    Raises:
        InvalidRequest: no card has this name; the message lists the closest names.
    """
    if size := _SIZE.fullmatch(name.strip()):
        gigabytes = int(size[1])
        if SMALLEST_GB <= gigabytes <= LARGEST_GB:
            return Device(f"a card of {gigabytes} GB", gigabytes * GIB)
    cards = {_NAME_NOISE.sub("", card.name.lower()): card for card in CARDS}
    short_name = _NAME_NOISE.sub("", name.lower())
    if (card := cards.get(_ALIASES.get(short_name, short_name))) is not None:
        return card
    close = [cards[match].name for match in difflib.get_close_matches(short_name, cards, n=3, cutoff=0.5)]
    known = ", ".join(card.name for card in CARDS)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known devices: {known}."
    raise InvalidRequest(
        f"there is no device {name[:100]!r}: {hint} Or give its size, such as 24GB", location="/device"
    )
