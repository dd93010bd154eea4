"""Records every storage that torch's operators allocate, from its allocation until it is freed.

Works on real tensors and on meta tensors, whose storages have sizes as well.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_service.planning.memory import Category
from qlora_service.planning.simulation.allocator import Event, reserved_bytes, rounded

Workspace = tuple[Category, Callable[[Sequence[Any]], int]]
"""An operator's temporary buffers: their category, and their bytes as a function of the operator's arguments"""
DEQUANTIZING = ("bitsandbytes::dequantize_4bit", "bitsandbytes::dequantize_blockwise")


class Tracker(TorchDispatchMode):
    """Records allocations while it is active. Earlier storages need to be registered."""

    def __init__(
        self, *, rounding: int = 1, vocabulary: int | None = None, workspaces: dict[str, Workspace] | None = None
    ) -> None:
        """Sizes are rounded up to `rounding`; a tensor with `vocabulary` columns counts as logits."""
        super().__init__()
        self.phase = Category.ACTIVATIONS
        """Category of new storages unless their operator decides it; ACTIVATIONS become RECOMPUTATION in a backward"""
        self._rounding, self._vocabulary, self._workspaces = rounding, vocabulary, workspaces or {}
        self._events: list[Event] = []
        self._categories: list[Category] = []
        self._live: dict[int, tuple[int, int, weakref.ref[Any]]] = {}
        """(number, bytes, reference) of each live storage, by its address"""

    def register(self, tensor: torch.Tensor, category: Category) -> None:
        """Assigns the tensor's storage to `category` since its allocation; records it if it is unknown."""
        storage = tensor.untyped_storage()
        live = self._live.get(storage._cdata)
        if live is None:
            self._record_storage(storage, category)
        else:
            self._categories[live[0]] = category

    @contextmanager
    def during(self, phase: Category) -> Iterator[None]:
        """Inside, new storages are assigned to `phase`."""
        previous, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = previous

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        for output in result if isinstance(result, tuple | list) else (result,):
            for tensor in output if isinstance(output, tuple | list) else (output,):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    if storage._cdata not in self._live:
                        self._record_storage(storage, self._category(name, args, tensor))
        if (workspace := self._workspaces.get(name)) is not None:
            category, size_of = workspace
            self._record_temporary(size_of(args), category)
        return result

    @property
    def peak(self) -> int:
        """The peak of live bytes."""
        return sum(self.at_peak().values())

    def at_peak(self) -> dict[Category, int]:
        """The live bytes of each category at the peak."""
        total, highest, moment = 0, 0, 0
        for index, (_, size) in enumerate(self._events):
            total += size
            if total > highest:
                highest, moment = total, index + 1
        categories = dict.fromkeys(Category, 0)
        for number, size in self._events[:moment]:
            categories[self._categories[number]] += size
        return categories

    def reserved(self) -> int:
        """The bytes that torch's CUDA allocator would hold after the recorded allocations."""
        return reserved_bytes(self._events)

    def _category(self, name: str, args: Sequence[Any], output: torch.Tensor) -> Category:
        if name in DEQUANTIZING or (name == "aten::_to_copy" and _is_dequantized_int8(args, output)):
            return Category.DEQUANTIZATION
        if self._vocabulary is not None and output.dim() > 0 and output.shape[-1] == self._vocabulary:
            return Category.LOGITS
        in_backward = torch._C._current_graph_task_id() != -1
        return Category.RECOMPUTATION if in_backward and self.phase is Category.ACTIVATIONS else self.phase

    def _record_storage(self, storage: torch.UntypedStorage, category: Category) -> None:
        size = rounded(storage.nbytes(), self._rounding)
        if size == 0:
            return
        address, number = storage._cdata, self._record_allocation(size, category)
        reference = weakref.ref(storage, lambda _: self._record_free(address, number))
        self._live[address] = (number, size, reference)

    def _record_free(self, address: int, number: int) -> None:
        live = self._live.get(address)
        # Another storage may have reused the address.
        if live is not None and live[0] == number:
            del self._live[address]
            self._events.append((number, -live[1]))

    def _record_temporary(self, size: int, category: Category) -> None:
        """Records bytes that are allocated and freed within one operator."""
        size = rounded(size, self._rounding)
        if size > 0:
            self._events.append((self._record_allocation(size, category), -size))

    def _record_allocation(self, size: int, category: Category) -> int:
        number = len(self._categories)
        self._categories.append(category)
        self._events.append((number, size))
        return number


def _is_dequantized_int8(args: Sequence[Any], output: torch.Tensor) -> bool:
    """Whether the operator converted int8 codes to floating-point numbers."""
    source = args[0] if args else None
    return isinstance(source, torch.Tensor) and source.dtype is torch.int8 and output.dtype.is_floating_point
