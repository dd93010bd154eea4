"""Every difference between CUDA and CPU, in one place; the rest of the code is the same on both."""

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
"""Parts of messages of cuBLAS, bitsandbytes' managed memory and torch's CPU allocator, whose errors have no own type"""

_simulating_cpu: ContextVar[bool] = ContextVar("simulating_cpu", default=False)


def choose_device(needs_gpu: bool = False) -> torch.device:
    """The process's GPU (CUDA_VISIBLE_DEVICES), else the CPU.

    Raises:
        JobFailed: a GPU is needed, and torch cannot use one.
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
    """The hardware's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU"


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic runs in hardware: Ampere and later, or AVX512-BF16.

    The compute capability decides: `torch.cuda.is_bf16_supported` is also true for older GPUs, whose bfloat16 is
    emulated and slower than float32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_avx512_bf16_supported())


def compute_dtype(requested: str, device: torch.device) -> torch.dtype:
    """The compute dtype: bfloat16, float32, or for "auto" bfloat16 if it runs in hardware, else float32."""
    if requested == "auto":
        return torch.bfloat16 if has_bf16(device) else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[requested]


def can_page(device: torch.device) -> bool:
    """Whether optimizer state can page to host memory (CUDA managed memory)."""
    return device.type == "cuda"


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of allocated memory: the device's on CUDA, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_reserved_bytes(device: torch.device) -> int | None:
    """Peak of memory reserved by torch's CUDA allocator; None on a CPU, which has no such allocator."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def reset_peaks(device: torch.device) -> None:
    """Restarts the measurement of peaks on CUDA; a CPU process's peak is kept by the kernel and cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def synchronize(device: torch.device) -> None:
    """Waits for queued work, so that a clock measures finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory(device: torch.device) -> None:
    """Returns freed memory to the device, so that the next model can allocate it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that the device or host ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in OUT_OF_MEMORY_SIGNS)


def free_memory_bytes(device: torch.device) -> int:
    """Free memory: the device's, or on a CPU the machine's within the container's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = psutil.virtual_memory().available
    limit, used = memory_limit(), memory_used()
    return available if limit is None or used is None else min(available, limit - used)


def runs_cpu_kernels(x: torch.Tensor) -> bool:
    """Whether CPU kernels compute with the tensor. A simulated tensor counts as CUDA, except in `simulating_cpu`."""
    return x.device.type == "cpu" or (is_simulated(x) and _simulating_cpu.get())


def has_flash_attention(x: torch.Tensor) -> bool:
    """Whether torch's flash attention takes these heads (…, head_dim): half precision, from Ampere on, up to 256.

    The GPU of a simulated tensor counts as Ampere or later.

    Source: torch 2.13, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, `check_flash_attention_hardware_support`
    and `check_head_dim_size_flash`.
    """
    is_half = x.dtype in {torch.float16, torch.bfloat16}
    if not is_half or x.shape[-1] % 8 or x.shape[-1] > 256:
        return False
    return is_simulated(x) or torch.cuda.get_device_capability(x.device) >= (8, 0)


def prefers_block_attention(x: torch.Tensor) -> bool:
    """Whether a CPU computes attention faster by matrix products in blocks than by torch's flash forward.

    True for bfloat16 without AMX: documents of 95 to 512 tokens, 2,033 in all, take 7.6 ms in blocks and 14.9 in flash
    (SmolLM2's heads, 2 cores with AVX512-BF16). In float32 they take 12.5 and 13.8, but 2,048 tokens in one document
    53.9 and 38.7.
    """
    return x.dtype is torch.bfloat16 and not torch.cpu._is_amx_tile_supported()


def is_simulated(x: torch.Tensor) -> bool:
    """Whether the tensor has a shape but no values (device "meta"), as all tensors of the planner's simulation."""
    return x.is_meta


@contextmanager
def simulating_cpu() -> Iterator[None]:
    """Simulated tensors inside the block stand for tensors on a CPU."""
    token = _simulating_cpu.set(True)
    try:
        yield
    finally:
        _simulating_cpu.reset(token)
