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
from qlora_service.models.base.quantized_cache import MANIFEST, Ingredients, QuantizedCache
from qlora_service.models.catalog.catalog import BaseModel, Catalog
from qlora_service.specs import Quantization

KIB = 1024
WANTED = Ingredients(
    weights_sha256="w",
    config_sha256="c",
    quantization="nf4",
    double_quant=True,
    compute_dtype="bfloat16",
    device="cpu",
    versions={"bitsandbytes": "1"},
)


def other(name: str) -> Ingredients:
    return replace(WANTED, weights_sha256=name)


@pytest.fixture
def cache(tmp_path: Path) -> QuantizedCache:
    return QuantizedCache(tmp_path / "cache", 100 * KIB)


@pytest.fixture
def base(tmp_path: Path, tiny_model: Path) -> BaseModel:
    return Catalog(tmp_path / "models").import_model("tiny", tiny_model)


def weights(directory: Path, size_bytes: int = 20 * KIB) -> None:
    """What a base may look like; only the names count here."""
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(os.urandom(size_bytes))


def store(
    cache: QuantizedCache,
    wanted: Ingredients = WANTED,
    size_bytes: int = 20 * KIB,
    write: Callable[[Path], object] = weights,
) -> Path | None:
    """The entry, if it is there afterwards."""
    with cache.open(wanted) as entry:
        entry.lock_for_writing()
        entry.find()  # as every writer does: it takes away what is damaged
        entry.store("tiny", size_bytes, write)
    return find(cache, wanted)


def find(cache: QuantizedCache, wanted: Ingredients = WANTED) -> Path | None:
    with cache.open(wanted) as entry:
        return entry.find()


def use_long_ago(path: Path, order: int) -> None:
    os.utime(path / MANIFEST, (order, order))


def warnings(logged: list[Any]) -> list[str]:
    return [line["event"] for line in logged if line["log_level"] == "warning"]


@pytest.mark.parametrize("field", [field.name for field in fields(Ingredients)])
def test_each_ingredient_changes_the_key(field: str, cache: QuantizedCache) -> None:
    values: dict[str, Any] = {"double_quant": False, "versions": {"bitsandbytes": "2"}, "layout": 0}
    changed = replace(WANTED, **{field: values.get(field, "another")})
    assert changed.key != WANTED.key
    assert store(cache) is not None
    assert find(cache, changed) is None


def test_ingredients_are_those_of_the_catalog_and_of_the_packages(base: BaseModel) -> None:
    made_of = Ingredients.of(base, Quantization(type="fp4", double_quant=False), "float32", "cuda")
    assert made_of.weights_sha256 == base.weights_sha256
    assert (made_of.quantization, made_of.double_quant) == ("fp4", False)
    assert (made_of.compute_dtype, made_of.device) == ("float32", "cuda")
    assert {"bitsandbytes", "transformers", "torch"} == made_of.versions.keys()
    assert Ingredients.of(base, Quantization(type="fp4", double_quant=False), "float32", "cuda").key == made_of.key


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_another_config_is_another_base(base: BaseModel, name: str) -> None:
    before = Ingredients.of(base, Quantization(), "float32", "cpu")
    (base.path / name).write_text("{}")
    assert Ingredients.of(base, Quantization(), "float32", "cpu").key != before.key


def test_an_entry_can_be_found_by_another_process_and_says_what_it_is(cache: QuantizedCache) -> None:
    path = store(cache)
    assert path is not None
    assert find(QuantizedCache(cache.directory, 0)) == path
    (entry,) = cache.entries()
    assert entry.size_bytes == sum(file.stat().st_size for file in path.iterdir()) > 20 * KIB
    told = entry.as_dict()
    assert (told["key"], told["base_model"], told["quantization"]) == (WANTED.key, "tiny", "nf4")


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def from_elsewhere(manifest: Path) -> None:
    manifest.write_text(manifest.read_text().replace('"bfloat16"', '"float32"'))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda path: flip(path / "model.safetensors"),
    "a cut file": lambda path: cut(path / "model.safetensors"),
    "a lost file": lambda path: (path / "config.json").unlink(),
    "a file too many": lambda path: (path / "adapter_config.json").write_text("{}"),
    "no manifest": lambda path: (path / MANIFEST).unlink(),
    "a cut manifest": lambda path: cut(path / MANIFEST),
    "another manifest": lambda path: (path / MANIFEST).write_text("[]"),
    "another's manifest": lambda path: from_elsewhere(path / MANIFEST),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_not_found_and_is_made_anew(cache: QuantizedCache, damage: str) -> None:
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
    assert warnings(logged) == ["quantized_base_damaged"]


def test_the_least_recently_used_make_room(cache: QuantizedCache) -> None:
    paths = [store(cache, other(name)) for name in "abcd"]
    for order, path in enumerate(paths):
        assert path is not None
        use_long_ago(path, order)
    assert find(cache, other("a")) == paths[0]  # now the last used
    with capture_logs() as logged:
        assert store(cache, other("e"), 50 * KIB, lambda to: weights(to, 50 * KIB))
    assert [line["entry"] for line in logged] == [other(name).key for name in "bc"]
    assert {entry.path.name for entry in cache.entries()} == {other(name).key for name in "ade"}
    assert sum(entry.size_bytes for entry in cache.entries()) <= cache.max_bytes


def test_what_is_larger_than_the_cache_evicts_nothing(cache: QuantizedCache) -> None:
    assert store(cache)
    with capture_logs() as logged:
        assert store(cache, other("large"), 101 * KIB) is None
    assert warnings(logged) == ["quantized_base_not_cached"]
    assert find(cache) is not None


def test_an_entry_that_is_being_loaded_is_not_evicted(cache: QuantizedCache) -> None:
    paths = [store(cache, other(name), 40 * KIB, lambda to: weights(to, 40 * KIB)) for name in "ab"]
    for order, path in enumerate(paths):
        assert path is not None
        use_long_ago(path, order)
    with cache.open(other("a")) as entry:
        loading = entry.find()
        assert loading is not None
        use_long_ago(loading, 0)
        assert store(cache, other("c"), 40 * KIB)
        assert {entry.path.name for entry in cache.entries()} == {other(name).key for name in "ac"}
        assert [entry.path.name for entry in cache.clear()] == [other("c").key]
    assert [entry.path.name for entry in cache.clear()] == [other("a").key]
    assert cache.entries() == []


def test_a_disk_that_would_run_full_makes_evictions_then_no_entry(
    cache: QuantizedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store(cache)
    monkeypatch.setattr(quantized_cache, "ROOM_LEFT", 2**62)
    with capture_logs() as logged:
        assert store(cache, other("b")) is None
    assert [line["event"] for line in logged] == ["quantized_base_evicted", "quantized_base_not_cached"]
    assert "stay free" in logged[-1]["error"]
    assert cache.entries() == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("only root can mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_only_means_no_cache(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_cache, "ROOM_LEFT", 0)
    cache = QuantizedCache(small_disk / "cache", 2**30)
    with capture_logs() as logged:
        assert store(cache, write=lambda to: weights(to, 2 * 2**20)) is None
    assert warnings(logged) == ["quantized_base_not_cached"]
    assert "No space left" in logged[-1]["error"]
    assert [path.suffix for path in cache.directory.iterdir()] == [".lock"]
    assert store(cache) is not None


def test_whatever_a_writer_raises_leaves_nothing(cache: QuantizedCache) -> None:
    def half(to: Path) -> None:
        weights(to)
        raise RuntimeError("this architecture cannot be saved")

    with capture_logs() as logged:
        assert store(cache, write=half) is None
    assert warnings(logged) == ["quantized_base_not_cached"]
    assert [path.suffix for path in cache.directory.iterdir()] == [".lock"]


def test_readers_do_not_wait_for_each_other(cache: QuantizedCache) -> None:
    store(cache)
    with cache.open(WANTED) as one, cache.open(WANTED) as another:
        assert one.find() == another.find() is not None


def test_an_empty_cache_has_no_entries_and_is_cleared(tmp_path: Path) -> None:
    cache = QuantizedCache(tmp_path / "nowhere", 1)
    assert cache.entries() == cache.clear() == []
    assert not cache.directory.exists()
