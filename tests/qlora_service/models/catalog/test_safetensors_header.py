"""Headers of .safetensors files, valid and invalid."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_service.models.catalog.safetensors_header import read_header


def write(path: Path, header: object, buffer: bytes = b"") -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + buffer)
    return path


def test_header_equals_the_tensors_that_the_library_saved(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3, 5, dtype=torch.bfloat16), "b": torch.zeros(7), "scalar": torch.tensor(1)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    entries = read_header(tmp_path / "x.safetensors")
    assert {name: (entry.dtype, entry.shape, entry.parameters) for name, entry in entries.items()} == {
        "a": ("BF16", (3, 5), 15),
        "b": ("F32", (7,), 7),
        "scalar": ("I64", (), 1),
    }


@pytest.mark.parametrize("buffer", [b"", b"\0" * 7, b"\0" * 9], ids=["no weights", "truncated", "longer"])
def test_file_whose_length_differs_from_its_header_is_refused(tmp_path: Path, buffer: bytes) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    read_header(write(tmp_path / "whole", {"a": entry}, b"\0" * 8))
    with pytest.raises(ValueError, match="describes 8 bytes"):
        read_header(write(tmp_path / "broken", {"a": entry}, buffer))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"dtype": "F32", "shape": [2]}, "lacks"),
        ("F32", "lacks"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}, "lacks"),
        ({"dtype": "PICKLE", "shape": [2], "data_offsets": [0, 8]}, "dtype PICKLE"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "do not fit its shape"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}, "not a whole number"),
        ({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}, "not a whole number"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "leaves a gap"),
    ],
)
def test_inconsistent_entry_is_refused(tmp_path: Path, entry: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_header(write(tmp_path / "x", {"a": entry}, b"\0" * 8))


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    with pytest.raises(ValueError, match="overlaps"):
        read_header(write(tmp_path / "x", {"a": entry, "b": entry}, b"\0" * 8))


@pytest.mark.parametrize("header", [b"[]", b"not json", b"[" * 100_000], ids=["list", "text", "deep"])
def test_header_without_a_json_object_is_refused(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(ValueError, match="its header is not"):
        read_header(write(tmp_path / "x", header))


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 64], ids=["empty", "short", "huge length"])
def test_file_without_a_header_length_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="first eight bytes"):
        read_header(tmp_path / "x")
