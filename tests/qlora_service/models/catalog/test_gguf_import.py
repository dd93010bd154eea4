"""Conversions in a real child process, as the catalog runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qlora_service.errors import InvalidModel, Unavailable
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.models.catalog.staging import reap_stale
from tests.tiny_model import CHATML

HEADS, KV_HEADS = 4, 2


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Query and key rows in the order of llama.cpp's converter, which its form of RoPE needs."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(model: Path, file: Path, architecture: str = "llama") -> Path:
    """A GGUF file of the tiny model in F32, like that of llama.cpp's converter."""
    config = json.loads((model / "config.json").read_bytes())
    tokenizer = json.loads((model / "tokenizer.json").read_bytes())
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in vocabulary]
    )
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_chat_template(CHATML)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(model / "model.safetensors").items():
        weight = tensor.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = interleave(weight, HEADS if "q_proj" in name else KV_HEADS)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_gguf_is_converted_back_to_the_original_model(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    other_config = tmp_path / "config.json"
    other_config.write_text('{"model_type": "another model, beside the GGUF file"}')
    model = Catalog(tmp_path / "models").import_model("tiny", write_gguf(tiny_model, tmp_path / "tiny.gguf"))
    assert model.source == "gguf"
    assert model.reference == "tiny"
    assert model.chat_template
    # Tied embeddings are stored once.
    original = load_file(tiny_model / "model.safetensors")
    converted = load_file(model.path / "model.safetensors")
    assert converted.keys() == original.keys()
    for name, weight in original.items():
        assert converted[name].dtype == torch.bfloat16
        assert torch.equal(converted[name], weight), name
    for name in ["config.json", "tokenizer_config.json", "generation_config.json"]:
        assert "local" not in (model.path / name).read_text()
        assert "_name_or_path" not in (model.path / name).read_text()
    expected, actual = (AutoTokenizer.from_pretrained(path) for path in (tiny_model, model.path))
    text = "<|im_start|>user\nThe river, 日本語 🙂<|im_end|>"
    assert actual(text)["input_ids"] == expected(text)["input_ids"]
    assert actual.chat_template == CHATML
    assert actual.eos_token == "<|im_end|>"


def test_gguf_of_an_unknown_architecture_is_refused_with_the_reason(tiny_model: Path, tmp_path: Path) -> None:
    file = write_gguf(tiny_model, tmp_path / "x.gguf", architecture="unheard-of")
    with pytest.raises(InvalidModel, match=r"x\.gguf could not be converted: .*unheard-of") as caught:
        Catalog(tmp_path / "models").import_model("x", file)
    assert "Traceback" in caught.value.details["stderr"]
    assert list((tmp_path / "models").iterdir()) == []


def test_slow_tokenizer_is_converted_to_an_equal_fast_one(model_directory: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(model_directory)
    fast = json.loads((model_directory / "tokenizer.json").read_bytes())["model"]
    (model_directory / "tokenizer.json").unlink()
    (model_directory / "vocab.json").write_text(json.dumps(fast["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in fast["merges"])
    (model_directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    settings |= {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (model_directory / "tokenizer_config.json").write_text(json.dumps(settings))
    model = Catalog(tmp_path / "models").import_model("tiny", model_directory)
    assert (model.path / "tokenizer.json").is_file()
    assert not {"is_local", "local_files_only"} & json.loads((model.path / "tokenizer_config.json").read_bytes()).keys()
    text = "<|im_start|>The river, 日本語 🙂<|im_end|>"
    assert AutoTokenizer.from_pretrained(model.path)(text)["input_ids"] == expected(text)["input_ids"]
    assert model.chat_template
    weights = "model.safetensors"
    assert (model.path / weights).read_bytes() == (model_directory / weights).read_bytes()
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny"]


def test_killed_conversion_names_the_signal_and_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    file = write_gguf(tiny_model, tmp_path / "tiny.gguf")
    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(Catalog(tmp_path / "models").import_model, "tiny", file)
        while not (children := conversions(file)) and not outcome.done():
            time.sleep(0.01)
        os.kill(children[0], signal.SIGKILL)
        with pytest.raises(Unavailable, match="ended by SIGKILL, as when memory runs out"):
            outcome.result()
    assert list((tmp_path / "models").iterdir()) == []


def test_conversion_keeps_its_directory_until_it_ends_after_the_importer_died(tiny_model: Path, tmp_path: Path) -> None:
    file = write_gguf(tiny_model, tmp_path / "tiny.gguf")
    program = (
        "import sys; from pathlib import Path; from qlora_service.models.catalog.catalog import Catalog\n"
        "Catalog(Path(sys.argv[1])).import_model('tiny', sys.argv[2])"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "models"), str(file)]) as importer:
        while not (children := conversions(file)) and importer.poll() is None:
            time.sleep(0.01)
        importer.kill()
    reap_stale(tmp_path / "models")
    assert len(list((tmp_path / "models").iterdir())) == 1
    assert conversions(file) == children, "the conversion ended before the check"
    os.kill(children[0], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while list((tmp_path / "models").iterdir()):  # the killed process releases its lock a moment later
        assert time.monotonic() < deadline
        reap_stale(tmp_path / "models")
        time.sleep(0.01)


def conversions(file: Path) -> list[int]:
    """Process ids of the running conversions of the file."""
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # the process has ended
        if b"qlora_service.models.catalog.gguf_import" in arguments and str(file).encode() in arguments:
            pids.append(int(process.name))
    return pids
