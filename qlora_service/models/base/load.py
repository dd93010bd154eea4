"""Loads the frozen base, quantized now or in an earlier process."""

from __future__ import annotations

import time
from typing import Literal, NamedTuple

import structlog
import torch
from transformers import PreTrainedModel

from qlora_service.errors import InvalidModel
from qlora_service.models.base.quantize import load_base, load_quantized
from qlora_service.models.base.quantized_cache import BaseIdentity, LockedEntry, QuantizedCache
from qlora_service.models.catalog.catalog import BaseModel
from qlora_service.specs import Quantization

MAX_SHARD_SIZE = "1GB"
"""Largest weight file of a cache entry: files are hashed in parallel, and copied from a GPU one at a time."""

log = structlog.get_logger(__name__)


class LoadedBase(NamedTuple):
    """A base, and the source of its weights."""

    model: PreTrainedModel
    source: Literal["cached", "quantized", "unquantized"]


def load_cached_base(
    cache: QuantizedCache | None,
    base: BaseModel,
    quantization: Quantization,
    compute_dtype: torch.dtype,
    device: torch.device,
) -> LoadedBase:
    """The base, frozen, on `device`: from the cache, else quantized now and stored in the cache.

    The weights are bit for bit the same either way. Concurrent processes quantize a base once. On a CPU, cached
    weights stay in the file, mapped into memory.

    Raises:
        InvalidModel: transformers cannot load the base.
    """
    started = time.monotonic()
    if quantization.type == "none":
        # Needs no cache: the catalog's files are mapped into memory.
        return LoadedBase(load_base(base.path, quantization, compute_dtype, device), "unquantized")
    entry = None if cache is None else _open_entry(cache, base, quantization, compute_dtype, device)
    if entry is None:
        return LoadedBase(load_base(base.path, quantization, compute_dtype, device), "quantized")
    with entry:
        model = _load_entry(entry, base, compute_dtype, device)
        if model is None:
            entry.lock_for_writing()
            model = _load_entry(entry, base, compute_dtype, device)
        if model is not None:
            log.info("base_loaded", base=base.name, source="cached", seconds=round(time.monotonic() - started, 2))
            return LoadedBase(model, "cached")
        quantized = load_base(base.path, quantization, compute_dtype, device)
        entry.store(
            base.name,
            _stored_bytes(quantized),
            lambda directory: quantized.save_pretrained(directory, max_shard_size=MAX_SHARD_SIZE),
        )
    log.info("base_loaded", base=base.name, source="quantized", seconds=round(time.monotonic() - started, 2))
    return LoadedBase(quantized, "quantized")


def _open_entry(
    cache: QuantizedCache, base: BaseModel, quantization: Quantization, dtype: torch.dtype, device: torch.device
) -> LockedEntry | None:
    """The base's cache entry, locked; None if the cache has a limit of 0 bytes or cannot be written."""
    if cache.max_bytes == 0:
        return None
    try:
        return cache.open(BaseIdentity.of(base, quantization, str(dtype).removeprefix("torch."), device.type))
    except OSError as error:
        log.warning("quantized_base_not_cached", base_model=base.name, error=str(error))
        return None


def _load_entry(
    entry: LockedEntry, base: BaseModel, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel | None:
    """The base from the cache; None if the entry is missing, damaged or cannot be loaded."""
    directory = entry.find()
    if directory is None:
        return None
    try:
        model = load_quantized(directory, dtype, device)
    except (InvalidModel, RuntimeError) as error:
        # The entry is undamaged: transformers cannot save and load this architecture quantized. An out-of-memory
        # error takes this path too, and is raised by the quantization that follows.
        log.warning("cached_base_unusable", base=base.name, error=str(error))
        return None
    model.name_or_path = model.config._name_or_path = str(base.path)
    return model


def _stored_bytes(model: PreTrainedModel) -> int:
    """Bytes of all weights with their quantization constants; tied weights count once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())
