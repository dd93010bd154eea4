"""The frozen base as `nf4.load_base` gives it, quantized in an earlier process where one did."""

from __future__ import annotations

import time
from typing import Literal, NamedTuple

import structlog
import torch
from transformers import PreTrainedModel

from qlora_service.errors import InvalidModel
from qlora_service.models.base.quantize import load_base, load_quantized
from qlora_service.models.base.quantized_cache import Ingredients, LockedEntry, QuantizedCache
from qlora_service.models.catalog.catalog import BaseModel
from qlora_service.specs import Quantization

SHARD = "1GB"
"""Files of an entry: they are hashed in parallel, and one at a time is copied from a GPU to be written."""

log = structlog.get_logger(__name__)


class LoadedBase(NamedTuple):
    """A base, and where its weights came from."""

    model: PreTrainedModel
    source: Literal["cached", "quantized", "unquantized"]


def load_cached_base(
    cache: QuantizedCache | None,
    base: BaseModel,
    quantization: Quantization,
    compute_dtype: torch.dtype,
    device: torch.device,
) -> LoadedBase:
    """The base, frozen, on `device`: from the cache, else quantized now and kept there for the next time.

    Bit for bit the same either way. Processes that ask at the same time quantize once. On a CPU the cached weights
    stay in the file, mapped into memory.

    Raises:
        InvalidModel: transformers cannot load the base.
    """
    started = time.monotonic()
    if quantization.type == "none":
        # Its files are mapped into memory as they are.
        return LoadedBase(load_base(base.path, quantization, compute_dtype, device), "unquantized")
    entry = None if cache is None else _open(cache, base, quantization, compute_dtype, device)
    if entry is None:
        return LoadedBase(load_base(base.path, quantization, compute_dtype, device), "quantized")
    with entry:
        model = _from(entry, base, compute_dtype, device)
        if model is None:
            entry.lock_for_writing()
            model = _from(entry, base, compute_dtype, device)
        if model is not None:
            log.info("base_loaded", base=base.name, source="cached", seconds=round(time.monotonic() - started, 2))
            return LoadedBase(model, "cached")
        made = load_base(base.path, quantization, compute_dtype, device)
        entry.store(base.name, _stored_bytes(made), lambda to: made.save_pretrained(to, max_shard_size=SHARD))
    log.info("base_loaded", base=base.name, source="quantized", seconds=round(time.monotonic() - started, 2))
    return LoadedBase(made, "quantized")


def _open(
    cache: QuantizedCache, base: BaseModel, quantization: Quantization, dtype: torch.dtype, device: torch.device
) -> LockedEntry | None:
    """The base's place; None where nothing may be kept, or nothing can be written."""
    if cache.max_bytes == 0:
        return None
    try:
        return cache.open(Ingredients.of(base, quantization, str(dtype).removeprefix("torch."), device.type))
    except OSError as error:
        log.warning("quantized_base_not_cached", base_model=base.name, error=str(error))
        return None


def _from(entry: LockedEntry, base: BaseModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel | None:
    """The base from the cache; None if it is not there, or no use."""
    directory = entry.find()
    if directory is None:
        return None
    try:
        model = load_quantized(directory, dtype, device)
    except (InvalidModel, RuntimeError) as error:
        # Its bytes are those that were written: an architecture that transformers cannot save and load quantized. Out
        # of memory looks the same, and quantizing will say so.
        log.warning("cached_base_unusable", base=base.name, error=str(error))
        return None
    model.name_or_path = model.config._name_or_path = str(base.path)
    return model


def _stored_bytes(model: PreTrainedModel) -> int:
    """Bytes of all weights with their quantization constants, tied ones once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())
