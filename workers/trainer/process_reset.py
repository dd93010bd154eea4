"""State of the process, besides its base, that a job must not pass on to the next one."""

from __future__ import annotations

import ctypes
import gc
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import torch
from transformers.utils import logging as transformers_logging


@contextmanager
def reset_process_state() -> Iterator[None]:
    """Context in which a job finds the state of a new process; the state that it sets is undone at the end.

    Warnings appear again, and random numbers restart. A new process takes its seeds from the system, so no published
    byte may depend on them; with a fixed seed, none can depend on earlier jobs either.
    """
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    transformers_logging.warning_once.cache_clear()
    with warnings.catch_warnings():
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
            torch.use_deterministic_algorithms(is_deterministic)


def release_freed_memory() -> None:
    """Returns freed memory to the device and to the system, for other processes on the machine.

    Adapters and their networks are reference cycles, which only a collection frees. glibc and Arrow's allocator keep
    freed blocks until they are told to release them.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    pa.default_memory_pool().release_unused()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # musl has none
        trim(0)
