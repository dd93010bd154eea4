"""The base that a trainer process has loaded, for one job after the other."""

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
    """Which base, how it is to be stored and computed with, and where."""

    base: BaseModel
    quantization: Quantization
    compute_dtype: torch.dtype
    device: torch.device
    cache: QuantizedCache | None

    @property
    def identity(self) -> BaseIdentity:
        """All that the loaded base depends on."""
        dtype = str(self.compute_dtype).removeprefix("torch.")
        return BaseIdentity.of(self.base, self.quantization, dtype, self.device.type)


@dataclass(frozen=True)
class ProbedAdapter:
    """Results of the probes with an adapter on the base."""

    paths: KernelPaths
    """How losses are computed"""
    activation_bytes_per_token: float | None
    """None where nobody has measured it yet"""


@dataclass(frozen=True)
class WarmBase:
    """A loaded base and what was found out about it; jobs come and go on it."""

    model: PreTrainedModel
    identity: BaseIdentity
    source: str
    """cached, quantized or unquantized: where its weights came from"""
    isolation: Isolation
    fingerprint: str
    """Of its logits when it was loaded"""
    state: BaseState
    probed: dict[str, ProbedAdapter] = field(default_factory=dict)
    """By the adapter's spec as JSON"""

    @classmethod
    def load(cls, wanted: BaseRequest) -> WarmBase:
        """Raises: InvalidModel, when transformers cannot load it."""
        loaded = load_cached_base(wanted.cache, wanted.base, wanted.quantization, wanted.compute_dtype, wanted.device)
        isolation = isolate_documents(loaded.model)
        fingerprint = base_fingerprint(loaded.model)
        # After the first forward passes: bitsandbytes moves int8 constants in the first one.
        state = BaseState(loaded.model)
        return cls(loaded.model, wanted.identity, loaded.source, isolation, fingerprint, state)

    def restore(self) -> bool:
        """Whether the base, freed of everything that was attached to it, is bit for bit the one that was loaded."""
        return self.state.restore() and base_fingerprint(self.model) == self.fingerprint


class BaseHolder:
    """At most one base at a time: another one is loaded where it was."""

    def __init__(self) -> None:
        self._held: WarmBase | None = None
        self._retired = False

    def get(self, wanted: BaseRequest) -> tuple[WarmBase, str]:
        """The base as it was loaded, and its source: "warm" when that was for an earlier job.

        Raises:
            InvalidModel: transformers cannot load it.
        """
        if self._held is not None and self._held.identity == wanted.identity:
            return self._held, "warm"
        self.drop(wanted.device)
        self._held = WarmBase.load(wanted)
        return self._held, self._held.source

    def replace_changed(self, wanted: BaseRequest) -> WarmBase:
        """The base loaded anew, for what is left of a job that changed it.

        The caller holds no reference to the changed one any more: it goes before the new one comes.
        """
        self.retire("the job changed its base")
        self.drop(wanted.device)
        self._held = WarmBase.load(wanted)
        return self._held

    def retire(self, why: str) -> None:
        """No other job is to come after this one."""
        log.info("base_retired", why=why)
        self._retired = True

    def drop(self, device: torch.device) -> None:
        self._held = None
        release_memory(device)

    def settle(self) -> bool:
        """Whether another job may come: the base, freed of what the last one left, is the one that was loaded."""
        if self._held is not None and not self._retired and not self._held.restore():
            self.retire("the job changed its base")
        return self._held is not None and not self._retired
