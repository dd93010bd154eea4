"""The base model that a trainer process keeps loaded for consecutive jobs."""

from __future__ import annotations

from dataclasses import dataclass, field

import structlog
import torch
from transformers import PreTrainedModel

from qlora_service.models.base.base_state import BaseState
from qlora_service.models.base.load import load_cached_base
from qlora_service.models.base.quantize import base_fingerprint
from qlora_service.models.base.quantized_cache import BaseIdentity, QuantizedCache
from qlora_service.models.catalog.catalog import BaseModel
from qlora_service.specs import Quantization
from qlora_service.training.device import release_memory
from qlora_service.training.network.isolation import Isolation, isolate_documents
from qlora_service.training.network.network import KernelPaths

log = structlog.get_logger()


@dataclass(frozen=True)
class BaseRequest:
    """A base model with its storage format, compute dtype and device."""

    base: BaseModel
    quantization: Quantization
    compute_dtype: torch.dtype
    device: torch.device
    cache: QuantizedCache | None

    @property
    def identity(self) -> BaseIdentity:
        """Everything that the loaded base depends on."""
        dtype = str(self.compute_dtype).removeprefix("torch.")
        return BaseIdentity.of(self.base, self.quantization, dtype, self.device.type)


@dataclass(frozen=True)
class ProbedAdapter:
    """Results of the probes with an adapter on the base."""

    paths: KernelPaths
    """Kernels that compute the losses"""
    activation_bytes_per_token: float | None
    """None: not measured yet"""


@dataclass(frozen=True)
class WarmBase:
    """A loaded base and what was measured on it; serves any number of jobs."""

    model: PreTrainedModel
    identity: BaseIdentity
    source: str
    """cached, quantized or unquantized: where its weights came from"""
    isolation: Isolation
    fingerprint: str
    """Fingerprint of its logits right after loading"""
    state: BaseState
    probed: dict[str, ProbedAdapter] = field(default_factory=dict)
    """Probe results by the adapter's spec as JSON"""

    @classmethod
    def load(cls, request: BaseRequest) -> WarmBase:
        """Raises: InvalidModel, when transformers cannot load the base."""
        loaded = load_cached_base(
            request.cache, request.base, request.quantization, request.compute_dtype, request.device
        )
        isolation = isolate_documents(loaded.model)
        fingerprint = base_fingerprint(loaded.model)
        # Captured after the first forward passes: bitsandbytes moves int8 constants in the first one.
        state = BaseState(loaded.model)
        return cls(loaded.model, request.identity, loaded.source, isolation, fingerprint, state)

    def restore(self) -> bool:
        """Removes everything that was attached to the base; whether it equals the loaded one bit for bit."""
        return self.state.restore() and base_fingerprint(self.model) == self.fingerprint


class BaseHolder:
    """Holds at most one base: loading another one drops the first."""

    def __init__(self) -> None:
        self._held: WarmBase | None = None
        self._is_retired = False

    def get(self, request: BaseRequest) -> tuple[WarmBase, str]:
        """The requested base, and its source: "warm" when an earlier job loaded it.

        Raises:
            InvalidModel: transformers cannot load the base.
        """
        if self._held is not None and self._held.identity == request.identity:
            return self._held, "warm"
        self.drop(request.device)
        self._held = WarmBase.load(request)
        return self._held, self._held.source

    def replace_changed(self, request: BaseRequest) -> WarmBase:
        """The base loaded again, for the rest of a job that changed it.

        The caller holds no reference to the changed base any more: its memory is freed before the new one is loaded.
        """
        self.retire("the job changed its base")
        self.drop(request.device)
        self._held = WarmBase.load(request)
        return self._held

    def retire(self, why: str) -> None:
        """Marks the process as unfit for another job."""
        log.info("base_retired", why=why)
        self._is_retired = True

    def drop(self, device: torch.device) -> None:
        self._held = None
        release_memory(device)

    def restore(self) -> bool:
        """Restores the held base, unless it is retired; whether another job may run on it."""
        if self._held is not None and not self._is_retired and not self._held.restore():
            self.retire("the job changed its base")
        return self._held is not None and not self._is_retired
