"""Loading a base through the cache, by one process and by several at once."""

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

from qlora_service.models.base import load as load_module
from qlora_service.models.base.load import load_cached_base
from qlora_service.models.base.quantize import base_fingerprint, load_base
from qlora_service.models.base.quantized_cache import BaseIdentity, LockedEntry, QuantizedCache
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


def full_state(model: PreTrainedModel) -> dict[str, Any]:
    """Class, dtype, shape and bytes of every tensor, unsaved buffers included, and the model's configuration."""
    tensors = {**model.state_dict(keep_vars=True), **{f"buffer {name}": b for name, b in model.named_buffers()}}
    state: dict[str, Any] = {
        name: (type(t).__name__, t.dtype, t.shape, t.requires_grad, t.detach().reshape(-1).view(torch.uint8).tolist())
        for name, t in tensors.items()
    }
    for name, module in model.named_modules():
        state[f"module {name}"] = (type(module), getattr(module, "support_avx512bf16_for_cpu", None))
        if (quant := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            state[f"state {name}"] = (quant.dtype, quant.shape, quant.blocksize, quant.quant_type, quant.nested)
    return state | {"config": model.config.to_dict(), "path": model.name_or_path, "training": model.training}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "quantization",
    [Quantization(), Quantization(double_quant=False), Quantization(type="fp4"), Quantization(type="int8")],
    ids=lambda quantization: f"{quantization.type}-{quantization.double_quant}",
)
def test_cached_base_equals_the_quantized_base_bit_for_bit(
    cache: QuantizedCache, base: BaseModel, quantization: Quantization, dtype: torch.dtype
) -> None:
    quantized, source = load(cache, base, quantization, dtype)
    assert source == "quantized"
    expected = full_state(quantized)
    cached, source = load(cache, base, quantization, dtype)
    assert source == "cached"
    assert full_state(cached) == expected
    assert full_state(load(None, base, quantization, dtype)[0]) == expected
    assert base_fingerprint(cached) == base_fingerprint(quantized)


ARCHITECTURES = {
    "transposed layers": CONFIG_MAPPING["gpt2"](vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "experts in one tensor": CONFIG_MAPPING["mixtral"](**SIZES, num_local_experts=4),
    "biases, untied head": CONFIG_MAPPING["llama"](**SIZES, attention_bias=True, tie_word_embeddings=False),
    "scaled embedding buffer": CONFIG_MAPPING["gemma3_text"](**SIZES, head_dim=16),
}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_are_cached_in_several_files_without_change(
    cache: QuantizedCache,
    tiny_model: Path,
    tmp_path: Path,
    name: str,
    kind: Literal["nf4", "int8"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load_module, "MAX_SHARD_SIZE", "30KB")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(ARCHITECTURES[name]).save_pretrained(tmp_path / "source")
    for file in tiny_model.glob("tokenizer*"):
        (tmp_path / "source" / file.name).write_bytes(file.read_bytes())
    base = Catalog(tmp_path / "models").import_model("other", tmp_path / "source")
    expected = full_state(load(cache, base, Quantization(type=kind))[0])
    cached, source = load(cache, base, Quantization(type=kind))
    assert source == "cached"
    assert len(list(cache.entries()[0].path.glob("*.safetensors"))) > 1
    assert full_state(cached) == expected


def test_training_on_the_cached_base_does_not_change_the_cache(cache: QuantizedCache, base: BaseModel) -> None:
    load(cache, base)
    model, _ = load(cache, base)
    for tensor in model.state_dict().values():
        tensor.zero_()
    again, source = load(cache, base)
    assert source == "cached"
    assert full_state(again) == full_state(load(None, base)[0])


def test_mapped_weights_survive_the_removal_of_the_entry(cache: QuantizedCache, base: BaseModel) -> None:
    expected = full_state(load(cache, base)[0])
    model, _ = load(cache, base)
    maps = Path("/proc/self/maps").read_text()
    assert str(cache.entries()[0].path / "model.safetensors") in maps
    assert len(cache.clear()) == 1
    assert full_state(model) == expected


def test_nothing_is_cached_without_quantization_or_with_a_limit_of_zero(cache: QuantizedCache, base: BaseModel) -> None:
    assert load(cache, base, Quantization(type="none"))[1] == "unquantized"
    assert not cache.directory.exists()
    disabled = QuantizedCache(cache.directory, 0)
    assert [load(disabled, base)[1] for _ in range(2)] == ["quantized", "quantized"]
    assert not cache.directory.exists()


def test_base_is_loaded_although_the_cache_cannot_be_written(tmp_path: Path, base: BaseModel) -> None:
    (tmp_path / "file").write_bytes(b"")
    with capture_logs() as logged:
        assert load(QuantizedCache(tmp_path / "file", 2**30), base)[1] == "quantized"
    assert [line["event"] for line in logged if line["log_level"] == "warning"] == ["quantized_base_not_cached"]


def test_base_is_quantized_again_if_its_entry_cannot_be_loaded(cache: QuantizedCache, base: BaseModel) -> None:
    identity = BaseIdentity.of(base, Quantization(), "bfloat16", "cpu")
    with cache.open(identity) as entry:
        entry.lock_for_writing()
        # Undamaged but useless, as for an architecture that transformers cannot load after saving it.
        entry.store("tiny", 0, lambda to: (to / "config.json").write_text("{}"))
    with capture_logs() as logged:
        model, source = load(cache, base)
    assert source == "quantized"
    assert {"cached_base_unusable"} == {line["event"] for line in logged if line["log_level"] == "warning"}
    assert full_state(model) == full_state(load(None, base)[0])


def in_process(action: Callable[[Connection], None]) -> tuple[Any, Connection]:
    """A new process that runs `action`, and this process's end of their pipe."""
    parent_end, child_end = FORK.Pipe()
    process = FORK.Process(target=action, args=(child_end,), daemon=True)
    process.start()
    child_end.close()
    return process, parent_end


def receive(pipe: Connection) -> Any:
    assert pipe.poll(60), "no message from the other process"
    return pipe.recv()


def test_concurrent_processes_quantize_once(cache: QuantizedCache, base: BaseModel) -> None:
    def first(pipe: Connection) -> None:
        def slowly(*arguments: Any) -> PreTrainedModel:
            pipe.send("quantizing")
            pipe.recv()
            return load_base(*arguments)

        setattr(load_module, "load_base", slowly)  # noqa: B010 - not undone: this process ends
        model, source = load(cache, base)
        pipe.send((source, base_fingerprint(model)))

    def second(pipe: Connection) -> None:
        pipe.send("loading")
        model, source = load(cache, base)
        pipe.send((source, base_fingerprint(model)))

    writer, writer_pipe = in_process(first)
    assert receive(writer_pipe) == "quantizing"
    waiter, waiter_pipe = in_process(second)
    assert receive(waiter_pipe) == "loading"
    assert not waiter_pipe.poll(0.7), "the second did not wait"
    writer_pipe.send("continue")
    source, fingerprint = receive(writer_pipe)
    assert source == "quantized"
    assert receive(waiter_pipe) == ("cached", fingerprint)
    for process in (writer, waiter):
        process.join(30)
        assert process.exitcode == 0


def test_one_of_two_processes_without_an_entry_quantizes(cache: QuantizedCache, base: BaseModel) -> None:
    def action(pipe: Connection) -> None:
        original = LockedEntry.lock_for_writing

        def lock_after_signal(entry: LockedEntry) -> None:
            pipe.send("no entry")
            pipe.recv()
            original(entry)

        LockedEntry.lock_for_writing = lock_after_signal  # type: ignore[assignment, method-assign]
        pipe.send(load(cache, base)[1])

    started = [in_process(action) for _ in range(2)]
    for _, pipe in started:
        assert receive(pipe) == "no entry"
    for _, pipe in started:
        pipe.send("continue")
    assert sorted(receive(pipe) for _, pipe in started) == ["cached", "quantized"]
    for process, _ in started:
        process.join(30)
        assert process.exitcode == 0


def test_waiting_process_quantizes_after_the_writer_is_killed(cache: QuantizedCache, base: BaseModel) -> None:
    def write_until_killed(pipe: Connection) -> None:
        original = PreTrainedModel.save_pretrained

        def write_half(model: PreTrainedModel, directory: Path, **options: Any) -> None:
            original(model, directory, **options)
            (directory / "model.safetensors").write_bytes(b"half of it")
            pipe.send("writing")
            threading.Event().wait()

        PreTrainedModel.save_pretrained = write_half
        load(cache, base)

    writer, pipe = in_process(write_until_killed)
    assert receive(pipe) == "writing"
    sources: list[str] = []
    waiter = threading.Thread(target=lambda: sources.append(load(cache, base)[1]))
    waiter.start()
    waiter.join(0.5)
    assert waiter.is_alive()
    writer.kill()
    writer.join(30)
    assert writer.exitcode == -signal.SIGKILL
    waiter.join(60)
    assert sources == ["quantized"]
    assert load(cache, base)[1] == "cached"
    assert not list(cache.directory.glob(".staging-*"))
