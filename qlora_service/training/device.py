"""What differs between CUDA and CPU, in one place; everything else runs the same code on both."""

from __future__ import annotations

import gc
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import psutil
import torch

from qlora_service.domain.jobs import FailureReason
from qlora_service.errors import JobFailed
from qlora_service.process.cgroup import memory_limit, memory_used

OUT_OF_MEMORY_SIGNS = ("out of memory", "can't allocate memory", "alloc_failed")
"""What cuBLAS, bitsandbytes' managed memory and torch's allocator on a CPU say, in errors of no type of their own."""


_stands_for_cpu: ContextVar[bool] = ContextVar("stands_for_cpu", default=False)


def computes_as_cpu(x: torch.Tensor) -> bool:
    """Whether a CPU's way is taken for it; tensors without values stand for a GPU's, but inside `standing_for_cpu`."""
    return x.device.type == "cpu" or (x.is_meta and _stands_for_cpu.get())


@contextmanager
def standing_for_cpu() -> Iterator[None]:
    """Tensors without values (device "meta") stand for a CPU's."""
    token = _stands_for_cpu.set(True)
    try:
        yield
    finally:
        _stands_for_cpu.reset(token)


def choose_device(needs_gpu: bool = False) -> torch.device:
    """The GPU this process was given (CUDA_VISIBLE_DEVICES), else the CPU.

    Raises:
        JobFailed: there has to be a GPU, and torch cannot use it.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if needs_gpu:
        raise JobFailed(
            f"the driver shows a GPU, but torch {torch.__version__} cannot use it: install a CUDA build of torch that "
            "fits the driver, and in a container the NVIDIA Container Toolkit; `python -c 'import torch; "
            "torch.cuda.init()'` says why",
            reason=FailureReason.DEVICE_UNAVAILABLE,
        )
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """What the hardware calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU"


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 maths runs in hardware: Ampere and later, or AVX512-BF16.

    torch answers for older cards too, whose bfloat16 is emulated and slower than float32: ask for the capability.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_avx512_bf16_supported())


def compute_dtype(requested: str, device: torch.device) -> torch.dtype:
    """The precision of the maths: "bfloat16", "float32", or for "auto" bfloat16 where it runs in hardware."""
    if requested == "auto":
        return torch.bfloat16 if has_bf16(device) else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[requested]


def can_page(device: torch.device) -> bool:
    """Whether optimizer state can page to host memory (CUDA managed memory)."""
    return device.type == "cuda"


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory allocated so far: the device's on CUDA, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_reserved_bytes(device: torch.device) -> int | None:
    """Most memory that torch's CUDA allocator held so far; None on a CPU, where there is no such thing."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def forget_peaks(device: torch.device) -> None:
    """Measure peaks from now on; the peak of a process on a CPU is the kernel's, and stays."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def synchronize(device: torch.device) -> None:
    """Wait for queued work, so that a clock reads true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory(device: torch.device) -> None:
    """Give freed memory back, so that the next model finds it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device had no memory left for what was asked of it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in OUT_OF_MEMORY_SIGNS)


def has_flash_attention(x: torch.Tensor) -> bool:
    """Whether torch's flash attention takes these heads (…, head_dim): half precision, from Ampere on, up to 256.

    Heads without values are taken to be on such a GPU.

    Source: torch 2.13, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, `check_flash_attention_hardware_support`
    and `check_head_dim_size_flash`.
    """
    halves = x.dtype in {torch.float16, torch.bfloat16}
    if not halves or x.shape[-1] % 8 or x.shape[-1] > 256:
        return False
    return x.is_meta or torch.cuda.get_device_capability(x.device) >= (8, 0)


def multiplies_faster(x: torch.Tensor) -> bool:
    """Whether a CPU takes longer for its flash attention's forward than for matrix products in blocks.

    In bfloat16 without AMX: documents of 95 to 512 tokens, 2,033 in all, take 14.9 and 7.6 ms (SmolLM2's heads, 2 cores
    with AVX512-BF16); in float32, 13.8 and 12.5, and 2,048 tokens in one document 38.7 and 53.9.
    """
    return x.dtype is torch.bfloat16 and not torch.cpu._is_amx_tile_supported()


def free_memory_bytes(device: torch.device) -> int:
    """Memory that can still be allocated: the device's, or on a CPU the machine's within the container's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = psutil.virtual_memory().available
    limit, used = memory_limit(), memory_used()
    return available if limit is None or used is None else min(available, limit - used)
