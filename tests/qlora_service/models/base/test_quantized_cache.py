"""Entries of the cache: stored, found, damaged and evicted."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from qlora_service.models.base import quantized_cache
from qlora_service.models.base.quantized_cache import MANIFEST, BaseIdentity, QuantizedCache
from qlora_service.models.catalog.catalog import BaseModel, Catalog
from qlora_service.specs import Quantization

KIB = 1024
IDENTITY = BaseIdentity(
    weights_sha256="w",
    config_sha256="c",
    quantization="nf4",
    double_quant=True,
    compute_dtype="bfloat16",
    device="cpu",
    versions={"bitsandbytes": "1"},
)


def other_identity(name: str) -> BaseIdentity:
    return replace(IDENTITY, weights_sha256=name)


@pytest.fixture
def cache(tmp_path: Path) -> QuantizedCache:
    return QuantizedCache(tmp_path / "cache", 100 * KIB)


@pytest.fixture
def base(tmp_path: Path, tiny_model: Path) -> BaseModel:
    return Catalog(tmp_path / "models").import_model("tiny", tiny_model)


def write_weights(directory: Path, size_bytes: int = 20 * KIB) -> None:
    """Files like those of a quantized base; their content is random."""
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(os.urandom(size_bytes))


def store(
    cache: QuantizedCache,
    identity: BaseIdentity = IDENTITY,
    size_bytes: int = 20 * KIB,
    write: Callable[[Path], object] = write_weights,
) -> Path | None:
    """Stores an entry; returns its directory, or None if it was not stored."""
    with cache.open(identity) as entry:
        entry.lock_for_writing()
        entry.find()  # as every writer does, because it removes a damaged entry
        entry.store("tiny", size_bytes, write)
    return find(cache, identity)


def find(cache: QuantizedCache, identity: BaseIdentity = IDENTITY) -> Path | None:
    with cache.open(identity) as entry:
        return entry.find()


def set_last_used(path: Path, timestamp: int) -> None:
    os.utime(path / MANIFEST, (timestamp, timestamp))


def warning_events(logged: list[Any]) -> list[str]:
    return [line["event"] for line in logged if line["log_level"] == "warning"]


@pytest.mark.parametrize("field", [field.name for field in fields(BaseIdentity)])
def test_each_field_of_the_identity_changes_the_key(field: str, cache: QuantizedCache) -> None:
    values: dict[str, Any] = {"double_quant": False, "versions": {"bitsandbytes": "2"}, "layout": 0}
    changed = replace(IDENTITY, **{field: values.get(field, "another")})
    assert changed.key != IDENTITY.key
    assert store(cache) is not None
    assert find(cache, changed) is None


def test_identity_has_the_catalogs_hashes_and_the_package_versions(base: BaseModel) -> None:
    identity = BaseIdentity.of(base, Quantization(type="fp4", double_quant=False), "float32", "cuda")
    assert identity.weights_sha256 == base.weights_sha256
    assert (identity.quantization, identity.double_quant) == ("fp4", False)
    assert (identity.compute_dtype, identity.device) == ("float32", "cuda")
    assert {"bitsandbytes", "transformers", "torch"} == identity.versions.keys()
    assert BaseIdentity.of(base, Quantization(type="fp4", double_quant=False), "float32", "cuda").key == identity.key


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_changed_config_changes_the_key(base: BaseModel, name: str) -> None:
    before = BaseIdentity.of(base, Quantization(), "float32", "cpu")
    (base.path / name).write_text("{}")
    assert BaseIdentity.of(base, Quantization(), "float32", "cpu").key != before.key


def test_entry_is_found_by_another_cache_object_and_described(cache: QuantizedCache) -> None:
    path = store(cache)
    assert path is not None
    assert find(QuantizedCache(cache.directory, 0)) == path
    (entry,) = cache.entries()
    assert entry.size_bytes == sum(file.stat().st_size for file in path.iterdir()) > 20 * KIB
    described = entry.as_dict()
    assert (described["key"], described["base_model"], described["quantization"]) == (IDENTITY.key, "tiny", "nf4")


def cut_last_byte(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def change_identity(manifest: Path) -> None:
    manifest.write_text(manifest.read_text().replace('"bfloat16"', '"float32"'))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda path: flip_bit(path / "model.safetensors"),
    "a cut file": lambda path: cut_last_byte(path / "model.safetensors"),
    "a lost file": lambda path: (path / "config.json").unlink(),
    "an extra file": lambda path: (path / "adapter_config.json").write_text("{}"),
    "no manifest": lambda path: (path / MANIFEST).unlink(),
    "a cut manifest": lambda path: cut_last_byte(path / MANIFEST),
    "a manifest that is no object": lambda path: (path / MANIFEST).write_text("[]"),
    "the manifest of another base": lambda path: change_identity(path / MANIFEST),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_entry_is_not_found_and_is_written_again(cache: QuantizedCache, damage: str) -> None:
    path = store(cache)
    assert path is not None
    DAMAGE[damage](path)
    assert len(cache.entries()) == 1
    with capture_logs() as logged:
        assert find(cache) is None
    assert path.is_dir()  # others may be reading it
    assert logged == []
    with capture_logs() as logged:
        assert store(cache) == path
    assert warning_events(logged) == ["quantized_base_damaged"]


def test_least_recently_used_entries_are_evicted(cache: QuantizedCache) -> None:
    paths = [store(cache, other_identity(name)) for name in "abcd"]
    for order, path in enumerate(paths):
        assert path is not None
        set_last_used(path, order)
    assert find(cache, other_identity("a")) == paths[0]  # now the most recently used
    with capture_logs() as logged:
        assert store(cache, other_identity("e"), 50 * KIB, lambda to: write_weights(to, 50 * KIB))
    assert [line["entry"] for line in logged] == [other_identity(name).key for name in "bc"]
    assert {entry.path.name for entry in cache.entries()} == {other_identity(name).key for name in "ade"}
    assert sum(entry.size_bytes for entry in cache.entries()) <= cache.max_bytes


def test_entry_larger_than_the_cache_evicts_nothing(cache: QuantizedCache) -> None:
    assert store(cache)
    with capture_logs() as logged:
        assert store(cache, other_identity("large"), 101 * KIB) is None
    assert warning_events(logged) == ["quantized_base_not_cached"]
    assert find(cache) is not None


def test_entry_being_loaded_is_not_evicted(cache: QuantizedCache) -> None:
    paths = [store(cache, other_identity(name), 40 * KIB, lambda to: write_weights(to, 40 * KIB)) for name in "ab"]
    for order, path in enumerate(paths):
        assert path is not None
        set_last_used(path, order)
    with cache.open(other_identity("a")) as entry:
        loading = entry.find()
        assert loading is not None
        set_last_used(loading, 0)
        assert store(cache, other_identity("c"), 40 * KIB)
        assert {entry.path.name for entry in cache.entries()} == {other_identity(name).key for name in "ac"}
        assert [entry.path.name for entry in cache.clear()] == [other_identity("c").key]
    assert [entry.path.name for entry in cache.clear()] == [other_identity("a").key]
    assert cache.entries() == []


def test_full_disk_evicts_entries_then_stores_nothing(cache: QuantizedCache, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store(cache)
    monkeypatch.setattr(quantized_cache, "MIN_FREE_DISK_BYTES", 2**62)
    with capture_logs() as logged:
        assert store(cache, other_identity("b")) is None
    assert [line["event"] for line in logged] == ["quantized_base_evicted", "quantized_base_not_cached"]
    assert "stay free" in logged[-1]["error"]
    assert cache.entries() == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount_point)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("only root can mount a small disk")
    yield mount_point
    subprocess.run(["umount", str(mount_point)], check=True)


def test_write_error_on_a_full_disk_leaves_nothing(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_cache, "MIN_FREE_DISK_BYTES", 0)
    cache = QuantizedCache(small_disk / "cache", 2**30)
    with capture_logs() as logged:
        assert store(cache, write=lambda to: write_weights(to, 2 * 2**20)) is None
    assert warning_events(logged) == ["quantized_base_not_cached"]
    assert "No space left" in logged[-1]["error"]
    assert [path.suffix for path in cache.directory.iterdir()] == [".lock"]
    assert store(cache) is not None


def test_any_error_of_a_writer_is_logged_and_leaves_nothing(cache: QuantizedCache) -> None:
    def write_half(to: Path) -> None:
        write_weights(to)
        raise RuntimeError("this architecture cannot be saved")

    with capture_logs() as logged:
        assert store(cache, write=write_half) is None
    assert warning_events(logged) == ["quantized_base_not_cached"]
    assert [path.suffix for path in cache.directory.iterdir()] == [".lock"]


def test_readers_do_not_wait_for_each_other(cache: QuantizedCache) -> None:
    store(cache)
    with cache.open(IDENTITY) as first, cache.open(IDENTITY) as second:
        assert first.find() == second.find() is not None


def test_missing_cache_directory_has_no_entries_and_is_cleared(tmp_path: Path) -> None:
    cache = QuantizedCache(tmp_path / "nowhere", 1)
    assert cache.entries() == cache.clear() == []
    assert not cache.directory.exists()
