"""Every storage that torch's operations make, from its first appearance until nothing refers to it.

Works on any tensors: real ones, and ones without values (device "meta"), whose storages have sizes all the same.
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
"""What an operator takes for itself beside its outputs: for what, and the bytes by its arguments"""
DEQUANTIZING = ("bitsandbytes::dequantize_4bit", "bitsandbytes::dequantize_blockwise")


class Tracker(TorchDispatchMode):
    """Records allocations while it is active. What was there before has to be shown to it: `own`."""

    def __init__(
        self, *, rounding: int = 1, vocabulary: int | None = None, workspaces: dict[str, Workspace] | None = None
    ) -> None:
        """Sizes are rounded up to `rounding`; what has `vocabulary` columns counts as logits."""
        super().__init__()
        self.phase = Category.ACTIVATIONS
        """What new storages are for, unless an operator says otherwise; in a backward pass, for recomputation"""
        self._rounding, self._vocabulary, self._workspaces = rounding, vocabulary, workspaces or {}
        self._events: list[Event] = []
        self._categories: list[Category] = []
        self._living: dict[int, tuple[int, int, weakref.ref[Any]]] = {}
        """By the storage's address: its number, its bytes"""

    def own(self, tensor: torch.Tensor, category: Category) -> None:
        """The tensor's storage is for `category`, and has been so since it appeared."""
        storage = tensor.untyped_storage()
        known = self._living.get(storage._cdata)
        if known is None:
            self._appeared(storage, category)
        else:
            self._categories[known[0]] = category

    @contextmanager
    def during(self, phase: Category) -> Iterator[None]:
        """New storages are for `phase`."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        for output in result if isinstance(result, tuple | list) else (result,):
            for tensor in output if isinstance(output, tuple | list) else (output,):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    if storage._cdata not in self._living:
                        self._appeared(storage, self._category(name, args, tensor))
        if (workspace := self._workspaces.get(name)) is not None:
            category, size_of = workspace
            self._passing(size_of(args), category)
        return result

    @property
    def peak(self) -> int:
        """Most bytes there were at one time."""
        return sum(self.at_peak().values())

    def at_peak(self) -> dict[Category, int]:
        """The bytes of each category at the moment when there were most."""
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
        """What torch's CUDA allocator would hold after all this."""
        return reserved_bytes(self._events)

    def _category(self, name: str, args: Sequence[Any], output: torch.Tensor) -> Category:
        if name in DEQUANTIZING or (name == "aten::_to_copy" and _is_unpacked_int8(args, output)):
            return Category.DEQUANTIZATION
        if self._vocabulary is not None and output.dim() > 0 and output.shape[-1] == self._vocabulary:
            return Category.LOGITS
        in_backward = torch._C._current_graph_task_id() != -1
        return Category.RECOMPUTATION if in_backward and self.phase is Category.ACTIVATIONS else self.phase

    def _appeared(self, storage: torch.UntypedStorage, category: Category) -> None:
        size = rounded(storage.nbytes(), self._rounding)
        if size == 0:
            return
        address, number = storage._cdata, self._record(size, category)
        gone = weakref.ref(storage, lambda _: self._disappeared(address, number))
        self._living[address] = (number, size, gone)

    def _disappeared(self, address: int, number: int) -> None:
        living = self._living.get(address)
        # Another storage may have taken the address.
        if living is not None and living[0] == number:
            del self._living[address]
            self._events.append((number, -living[1]))

    def _passing(self, size: int, category: Category) -> None:
        """Bytes that came and went within one operator."""
        size = rounded(size, self._rounding)
        if size > 0:
            self._events.append((self._record(size, category), -size))

    def _record(self, size: int, category: Category) -> int:
        number = len(self._categories)
        self._categories.append(category)
        self._events.append((number, size))
        return number


def _is_unpacked_int8(args: Sequence[Any], output: torch.Tensor) -> bool:
    """Whether int8 codes became numbers."""
    source = args[0] if args else None
    return isinstance(source, torch.Tensor) and source.dtype is torch.int8 and output.dtype.is_floating_point
