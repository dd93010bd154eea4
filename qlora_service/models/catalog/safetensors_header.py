"""Strictly checked header of a .safetensors file.

Format: https://huggingface.co/docs/safetensors — eight bytes of header length (little-endian), a JSON header,
then one buffer that the tensors fill without gaps.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation."""

# The dtypes of weights. Formats that pack two values into a byte are missing: they are quantized, so no base model.
_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the header; `begin` and `end` are byte offsets in the buffer after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a .safetensors file by name, without reading the weights.

    Raises:
        ValueError: the file is not valid safetensors; the text says why.
    """
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if file_bytes < 8 or not 0 < length <= min(file_bytes - 8, MAX_HEADER_BYTES):
            raise ValueError("its first eight bytes are not the length of a header")
        header = file.read(length)
    try:
        document = json.loads(header)
    except (ValueError, RecursionError):
        raise ValueError("its header is not JSON") from None
    if not isinstance(document, dict):
        raise ValueError("its header is not a JSON object")
    document.pop("__metadata__", None)
    entries = {name: _entry(name, fields) for name, fields in document.items()}
    _check_buffer(entries, file_bytes - 8 - length)
    return entries


def _entry(name: str, fields: Any) -> TensorEntry:
    try:
        entry = TensorEntry(fields["dtype"], tuple(fields["shape"]), *fields["data_offsets"])
        sizes = (*entry.shape, entry.begin, entry.end)
    except (KeyError, TypeError):
        raise ValueError(f"the header's entry for {name} lacks dtype, shape or data_offsets") from None
    if any(type(size) is not int or size < 0 for size in sizes):
        raise ValueError(f"the header's entry for {name} has a size that is not a whole number")
    if entry.dtype not in _DTYPE_BYTES:
        raise ValueError(f"tensor {name} has the unsupported dtype {entry.dtype}")
    if entry.end - entry.begin != entry.parameters * _DTYPE_BYTES[entry.dtype]:
        raise ValueError(f"tensor {name} has offsets that do not fit its shape")
    return entry


def _check_buffer(entries: dict[str, TensorEntry], buffer_bytes: int) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise ValueError(f"tensor {name} overlaps another or leaves a gap before it")
        end = entry.end
    if end != buffer_bytes:
        raise ValueError(f"its header describes {end} bytes of weights, the file holds {buffer_bytes}")
