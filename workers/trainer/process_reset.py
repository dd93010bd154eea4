"""What one job may leave in its process besides its base, and the next one must not find."""

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
def clean_slate() -> Iterator[None]:
    """Inside, a job finds what the first job of a process finds; what it sets holds for itself alone.

    Warnings come again, and random numbers are the same: a new process draws its seeds from the system, so nothing
    that a job publishes may depend on them, and if it did, it would not depend on the jobs before.
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


def release_all() -> None:
    """Give back what is freed, to the device and to the system.

    Adapters and their networks refer to themselves, so they go with a collection only. glibc keeps freed blocks for
    itself, and Arrow's allocator does: other processes on the machine would find that much less.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    pa.default_memory_pool().release_unused()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # musl has none
        trim(0)
