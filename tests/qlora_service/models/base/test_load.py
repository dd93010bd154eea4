from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from structlog.testing import capture_logs
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from qlora_service.models.base import load as cached_base
from qlora_service.models.base.load import load_cached_base
from qlora_service.models.base.quantize import base_fingerprint, load_base
from qlora_service.models.base.quantized_cache import Ingredients, LockedEntry, QuantizedCache
from qlora_service.models.catalog.catalog import BaseModel, Catalog
from qlora_service.specs import Quantization

CPU = torch.device("cpu")
FORK = multiprocessing.get_context("fork")
SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture
def base(tmp_path: Path, tiny_model: Path) -> BaseModel:
    return Catalog(tmp_path / "models").import_model("tiny", tiny_model)


@pytest.fixture
def cache(tmp_path: Path) -> QuantizedCache:
    return QuantizedCache(tmp_path / "cache", 2**30)


def load(
    cache: QuantizedCache | None,
    base: BaseModel,
    quantization: Quantization | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[PreTrainedModel, str]:
    return load_cached_base(cache, base, quantization or Quantization(), dtype, CPU)


def everything(model: PreTrainedModel) -> dict[str, Any]:
    """Each tensor's class, dtype, shape and bytes, those that are not saved too; and how it is configured."""
    tensors = {**model.state_dict(keep_vars=True), **{f"buffer {name}": b for name, b in model.named_buffers()}}
    found: dict[str, Any] = {
        name: (type(t).__name__, t.dtype, t.shape, t.requires_grad, t.detach().reshape(-1).view(torch.uint8).tolist())
        for name, t in tensors.items()
    }
    for name, module in model.named_modules():
        found[f"module {name}"] = (type(module), getattr(module, "support_avx512bf16_for_cpu", None))
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            found[f"state {name}"] = (state.dtype, state.shape, state.blocksize, state.quant_type, state.nested)
    return found | {"config": model.config.to_dict(), "path": model.name_or_path, "training": model.training}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "quantization",
    [Quantization(), Quantization(double_quant=False), Quantization(type="fp4"), Quantization(type="int8")],
    ids=lambda quantization: f"{quantization.type}-{quantization.double_quant}",
)
def test_the_cached_base_is_the_quantized_one_bit_for_bit(
    cache: QuantizedCache, base: BaseModel, quantization: Quantization, dtype: torch.dtype
) -> None:
    made, source = load(cache, base, quantization, dtype)
    assert source == "quantized"
    expected = everything(made)
    cached, source = load(cache, base, quantization, dtype)
    assert source == "cached"
    assert everything(cached) == expected
    assert everything(load(None, base, quantization, dtype)[0]) == expected
    assert base_fingerprint(cached) == base_fingerprint(made)


ARCHITECTURES = {
    "transposed layers": CONFIG_MAPPING["gpt2"](vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "experts in one tensor": CONFIG_MAPPING["mixtral"](**SIZES, num_local_experts=4),
    "biases, untied head": CONFIG_MAPPING["llama"](**SIZES, attention_bias=True, tie_word_embeddings=False),
    "scaled embedding buffer": CONFIG_MAPPING["gemma3_text"](**SIZES, head_dim=16),
}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_come_back_the_same_from_many_files(
    cache: QuantizedCache,
    tiny_model: Path,
    tmp_path: Path,
    name: str,
    kind: Literal["nf4", "int8"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cached_base, "SHARD", "30KB")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(ARCHITECTURES[name]).save_pretrained(tmp_path / "source")
    for file in tiny_model.glob("tokenizer*"):
        (tmp_path / "source" / file.name).write_bytes(file.read_bytes())
    base = Catalog(tmp_path / "models").import_model("other", tmp_path / "source")
    expected = everything(load(cache, base, Quantization(type=kind))[0])
    cached, source = load(cache, base, Quantization(type=kind))
    assert source == "cached"
    assert len(list(cache.entries()[0].path.glob("*.safetensors"))) > 1
    assert everything(cached) == expected


def test_training_on_the_cached_base_does_not_change_the_cache(cache: QuantizedCache, base: BaseModel) -> None:
    load(cache, base)
    model, _ = load(cache, base)
    for tensor in model.state_dict().values():
        tensor.zero_()
    again, source = load(cache, base)
    assert source == "cached"
    assert everything(again) == everything(load(None, base)[0])


def test_what_is_mapped_survives_the_entrys_removal(cache: QuantizedCache, base: BaseModel) -> None:
    expected = everything(load(cache, base)[0])
    model, _ = load(cache, base)
    maps = Path("/proc/self/maps").read_text()
    assert str(cache.entries()[0].path / "model.safetensors") in maps
    assert len(cache.clear()) == 1
    assert everything(model) == expected


def test_without_quantization_or_without_room_nothing_is_kept(cache: QuantizedCache, base: BaseModel) -> None:
    assert load(cache, base, Quantization(type="none"))[1] == "unquantized"
    assert not cache.directory.exists()
    nothing = QuantizedCache(cache.directory, 0)
    assert [load(nothing, base)[1] for _ in range(2)] == ["quantized", "quantized"]
    assert not cache.directory.exists()


def test_a_cache_that_cannot_be_written_costs_no_job(tmp_path: Path, base: BaseModel) -> None:
    (tmp_path / "file").write_bytes(b"")
    with capture_logs() as logged:
        assert load(QuantizedCache(tmp_path / "file", 2**30), base)[1] == "quantized"
    assert [line["event"] for line in logged if line["log_level"] == "warning"] == ["quantized_base_not_cached"]


def test_an_entry_that_cannot_be_loaded_is_quantized_anew(cache: QuantizedCache, base: BaseModel) -> None:
    wanted = Ingredients.of(base, Quantization(), "bfloat16", "cpu")
    with cache.open(wanted) as entry:
        entry.lock_for_writing()
        # Whole, and of no use: what an architecture may leave that does not come back from the disk.
        entry.store("tiny", 0, lambda to: (to / "config.json").write_text("{}"))
    with capture_logs() as logged:
        model, source = load(cache, base)
    assert source == "quantized"
    assert {"cached_base_unusable"} == {line["event"] for line in logged if line["log_level"] == "warning"}
    assert everything(model) == everything(load(None, base)[0])


def in_process(action: Callable[[Connection], None]) -> tuple[Any, Connection]:
    """A process of its own that runs `action`, and the other end of its pipe."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=action, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def receive(pipe: Connection) -> Any:
    assert pipe.poll(60), "the other process says nothing"
    return pipe.recv()


def test_processes_that_ask_at_once_quantize_once(cache: QuantizedCache, base: BaseModel) -> None:
    def first(pipe: Connection) -> None:
        def slowly(*arguments: Any) -> PreTrainedModel:
            pipe.send("quantizing")
            pipe.recv()
            return load_base(*arguments)

        setattr(cached_base, "load_base", slowly)  # noqa: B010 - for good: this process ends
        model, source = load(cache, base)
        pipe.send((source, base_fingerprint(model)))

    def second(pipe: Connection) -> None:
        pipe.send("asking")
        model, source = load(cache, base)
        pipe.send((source, base_fingerprint(model)))

    maker, making = in_process(first)
    assert receive(making) == "quantizing"
    waiter, waiting = in_process(second)
    assert receive(waiting) == "asking"
    assert not waiting.poll(0.7), "the second did not wait"
    making.send("go on")
    source, fingerprint = receive(making)
    assert source == "quantized"
    assert receive(waiting) == ("cached", fingerprint)
    for process in (maker, waiter):
        process.join(30)
        assert process.exitcode == 0


def test_of_processes_that_found_nothing_one_quantizes(cache: QuantizedCache, base: BaseModel) -> None:
    def action(pipe: Connection) -> None:
        really = LockedEntry.lock_for_writing

        def at_once(entry: LockedEntry) -> None:
            pipe.send("found nothing")
            pipe.recv()
            really(entry)

        LockedEntry.lock_for_writing = at_once  # type: ignore[assignment, method-assign]
        pipe.send(load(cache, base)[1])

    started = [in_process(action) for _ in range(2)]
    for _, pipe in started:
        assert receive(pipe) == "found nothing"
    for _, pipe in started:
        pipe.send("go on")
    assert sorted(receive(pipe) for _, pipe in started) == ["cached", "quantized"]
    for process, _ in started:
        process.join(30)
        assert process.exitcode == 0


def test_who_waits_for_a_maker_that_is_killed_quantizes_itself(cache: QuantizedCache, base: BaseModel) -> None:
    def dying(pipe: Connection) -> None:
        really = PreTrainedModel.save_pretrained

        def half(model: PreTrainedModel, directory: Path, **options: Any) -> None:
            really(model, directory, **options)
            (directory / "model.safetensors").write_bytes(b"half of it")
            pipe.send("writing")
            threading.Event().wait()

        PreTrainedModel.save_pretrained = half
        load(cache, base)

    maker, pipe = in_process(dying)
    assert receive(pipe) == "writing"
    found: list[str] = []
    waiter = threading.Thread(target=lambda: found.append(load(cache, base)[1]))
    waiter.start()
    waiter.join(0.5)
    assert waiter.is_alive()
    maker.kill()
    maker.join(30)
    assert maker.exitcode == -signal.SIGKILL
    waiter.join(60)
    assert found == ["quantized"]
    assert load(cache, base)[1] == "cached"
    assert not list(cache.directory.glob(".staging-*"))
