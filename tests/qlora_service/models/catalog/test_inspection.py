"""Findings about the files of a model directory."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from qlora_service.errors import InvalidModel
from qlora_service.models.catalog.inspection import inspect_model, inspect_settings
from qlora_service.specs import JobSpec


def findings(directory: Path) -> list[str]:
    with pytest.raises(InvalidModel) as caught:
        inspect_model(directory, "org/model")
    assert "org/model cannot be a base model" in caught.value.message
    return [finding.reason for finding in caught.value.findings]


def finding(directory: Path) -> str:
    (only,) = findings(directory)
    return only


def edit(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None removes one."""
    document = (json.loads(path.read_bytes()) if path.exists() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def test_facts_are_read_from_config_and_headers(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    facts = inspect_model(tiny_model, "tiny")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert facts.parameters == model.num_parameters()
    assert (facts.architecture, facts.model_type) == ("LlamaForCausalLM", "llama")
    assert (facts.vocab_size, facts.hidden_size, facts.num_layers, facts.max_positions) == (512, 64, 2, 512)
    assert facts.chat_template
    assert facts.weight_files == ("model.safetensors",)


def test_chat_template_is_read_from_tokenizer_config_too(model_directory: Path) -> None:
    (model_directory / "chat_template.jinja").unlink()
    assert not inspect_model(model_directory, "tiny").chat_template
    edit(model_directory / "tokenizer_config.json", chat_template="{{ messages }}")
    assert inspect_model(model_directory, "tiny").chat_template


def test_multimodal_config_has_the_sizes_of_its_language_model(model_directory: Path) -> None:
    edit(model_directory / "config.json", hidden_size=None, text_config={"hidden_size": 96})
    assert inspect_model(model_directory, "tiny").hidden_size == 96


def test_model_without_a_longest_sequence_has_the_largest_limit_of_a_job(model_directory: Path) -> None:
    edit(model_directory / "config.json", max_position_embeddings=None)
    assert finding(model_directory).startswith("config.json has no max_position_embeddings: add the longest sequence")
    edit(model_directory / "config.json", model_type="bloom")
    longest = inspect_model(model_directory, "tiny").max_positions
    JobSpec.model_validate({"base_model": "tiny", "training": {"max_seq_len_tokens": longest}})
    with pytest.raises(ValidationError):
        JobSpec.model_validate({"base_model": "tiny", "training": {"max_seq_len_tokens": longest + 1}})


def test_every_finding_is_gathered(model_directory: Path) -> None:
    (model_directory / "modeling.py").write_text("")
    (model_directory / "tokenizer.json").unlink()
    (model_directory / "model.safetensors").unlink()
    edit(model_directory / "config.json", auto_map={"AutoConfig": "x.Y"}, quantization_config={"quant_method": "awq"})
    reasons = findings(model_directory)
    assert len(reasons) == 5
    for words in ["/auto_map", "Python code", "quantized (awq)", "tokenizer is missing", "model.safetensors is"]:
        assert any(words in reason for reason in reasons), words


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "auto_map", {"AutoModel": "modeling.Model"}),
        ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["t.T", None]}),
        ("config.json", "custom_pipelines", {"p": {"impl": "p.P"}}),
        ("generation_config.json", "trust_remote_code", True),
        ("config.json", "vision_config", {"deep/er": [{"auto_map": {"AutoModel": "m.M"}}]}),
        ("anything.json", "auto_map", "m.M"),
    ],
)
def test_json_that_requests_remote_code_is_refused(model_directory: Path, file: str, key: str, value: Any) -> None:
    edit(model_directory / file, **{key: value})
    assert finding(model_directory).startswith(f"{file} has /{key}")


def test_auto_map_as_a_vocabulary_word_is_accepted(model_directory: Path) -> None:
    before = inspect_model(model_directory, "tiny")
    edit(model_directory / "vocab.json", auto_map=17)
    assert inspect_model(model_directory, "tiny") == before


def torch_zip(path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, path)


def torch_legacy(path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)


def zip_after_other_bytes(path: Path) -> None:
    torch_zip(path)
    path.write_bytes(b"GIF89a" + path.read_bytes())


def zip_with_damaged_directory(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data", "x")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"PK\x01\x02", b"PK\x01\x09"))


@pytest.mark.parametrize("name", ["weights.model", "README.md", "deep/er/notes.txt", "blob"])
@pytest.mark.parametrize(
    "write",
    [torch_zip, torch_legacy, zip_after_other_bytes, zip_with_damaged_directory]
    + [lambda path, protocol=protocol: path.write_bytes(pickle.dumps({}, protocol)) for protocol in (2, 3, 4, 5)],
)
def test_pickle_content_is_refused_under_any_name(
    model_directory: Path, name: str, write: Callable[[Path], None]
) -> None:
    (model_directory / name).parent.mkdir(parents=True, exist_ok=True)
    write(model_directory / name)
    assert finding(model_directory).startswith(f"{name} holds pickled weights")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "a.PTH", "a.ckpt", "sub/a.pkl"])
def test_pickle_names_are_refused_with_any_content(model_directory: Path, name: str) -> None:
    (model_directory / "sub").mkdir()
    (model_directory / name).write_bytes(b"")
    assert finding(model_directory).startswith(f"{name} holds pickled weights")


@pytest.mark.parametrize("write", [torch_zip, torch_legacy])
def test_pickle_named_safetensors_is_refused(model_directory: Path, write: Callable[[Path], None]) -> None:
    write(model_directory / "model.safetensors")
    assert finding(model_directory).startswith("model.safetensors is not valid safetensors")


def test_header_length_that_looks_like_pickle_magic_is_accepted(model_directory: Path) -> None:
    path = model_directory / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    padded = next(size for size in range(length, length + 70_000) if size % 65536 == 0x0280)
    header = content[8 : 8 + length].ljust(padded)
    path.write_bytes(padded.to_bytes(8, "little") + header + content[8 + length :])
    assert path.read_bytes()[:2] == b"\x80\x02"
    inspect_model(model_directory, "tiny")


def test_symlink_to_a_path_outside_the_directory_is_refused(model_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.txt").write_text("secret")
    (model_directory / "LICENSE").symlink_to("README.md")
    (model_directory / "README.md").write_text("inside")
    inspect_model(model_directory, "tiny")
    (model_directory / "NOTICE").symlink_to("../outside.txt")
    (model_directory / "folder").symlink_to(tmp_path)
    reasons = findings(model_directory)
    assert [reason.split(" is a symbolic link")[0] for reason in reasons] == ["folder", "NOTICE"]


def test_weights_that_are_a_symlink_to_the_outside_are_refused(model_directory: Path, tmp_path: Path) -> None:
    (model_directory / "model.safetensors").rename(tmp_path / "elsewhere")
    (model_directory / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert "model.safetensors is a symbolic link" in findings(model_directory)[0]


@pytest.mark.parametrize("name", ["dangling", "loop", "pipe"])
def test_irregular_file_is_refused(model_directory: Path, name: str) -> None:
    if name == "pipe":
        os.mkfifo(model_directory / name)
    else:
        (model_directory / name).symlink_to("loop" if name == "loop" else "nothing")
    assert finding(model_directory) == f"{name} is not a regular file"


def test_links_of_the_hub_cache_to_its_own_blobs_are_followed(model_directory: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(model_directory.iterdir())):
        path.rename(repository / "blobs" / f"{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    inspect_model(snapshot, "org/name")
    (repository / "other").write_text("")
    (snapshot / "README.md").symlink_to("../../other")
    assert "README.md is a symbolic link" in finding(snapshot)
    repository.rename(tmp_path / "not-a-cache")
    assert len(findings(tmp_path / "not-a-cache/snapshots/0123abcd")) > 5


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("config.json", "config.json is missing"),
        ("tokenizer.json", "the tokenizer is missing"),
        ("model.safetensors", "model.safetensors is missing"),
    ],
)
def test_missing_part_is_named(model_directory: Path, name: str, reason: str) -> None:
    (model_directory / name).unlink()
    assert finding(model_directory).startswith(reason)


def test_error_for_a_gguf_directory_says_how_to_import_it(model_directory: Path) -> None:
    (model_directory / "model.safetensors").rename(model_directory / "tiny.gguf")
    assert finding(model_directory).endswith("to import tiny.gguf, name that file")


def test_only_the_weights_named_by_the_index_count(model_directory: Path) -> None:
    tensors = load_file(model_directory / "model.safetensors")
    whole = inspect_model(model_directory, "tiny").parameters
    (model_directory / "model.safetensors").rename(model_directory / "consolidated.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, model_directory / shard)
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    index = model_directory / "model.safetensors.index.json"
    edit(index, weight_map=weight_map)
    facts = inspect_model(model_directory, "tiny")
    assert facts.weight_files == ("a.safetensors", "b.safetensors")
    assert facts.parameters == whole

    edit(index, weight_map=weight_map | {"extra.weight": "b.safetensors"})
    assert "b.safetensors lacks 1 tensors" in finding(model_directory)
    edit(index, weight_map=weight_map | {"x": "../secret.safetensors"})
    assert "names ../secret.safetensors, which is not in the directory" in finding(model_directory)
    edit(index, weight_map=["a.safetensors"])
    assert "no usable weight_map" in finding(model_directory)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized (gptq): import the original"),
        ({"model_type": None}, "has no model_type"),
        ({"architectures": None}, "has no architectures"),
        ({"architectures": ["BertModel"]}, "BertModel, which is no causal language model"),
        ({"is_encoder_decoder": True}, "which is no causal language model"),
        ({"hidden_size": "64"}, "has no hidden_size"),
        ({"vocab_size": True}, "has no vocab_size"),
    ],
)
def test_config_that_cannot_be_trained_is_refused(model_directory: Path, changes: dict[str, Any], reason: str) -> None:
    edit(model_directory / "config.json", **changes)
    assert reason in finding(model_directory)


def test_adapter_is_refused_as_a_base(model_directory: Path) -> None:
    edit(model_directory / "adapter_config.json", peft_type="LORA")
    assert "it is an adapter" in finding(model_directory)


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "\udcff"], ids=["cut", "deep", "not utf-8"])
def test_file_that_is_not_json_is_refused(model_directory: Path, content: str) -> None:
    (model_directory / "generation_config.json").write_text(content, errors="surrogateescape")
    assert finding(model_directory) == "generation_config.json is not valid JSON"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation_config.json", '{"eos_token_id": [[1]]}'),
        ("tokenizer_config.json", '{"eos_token": {"content": 5}}'),
        ("tokenizer_config.json", "[]"),
        ("chat_template.jinja", "\udcff"),
    ],
)
def test_settings_unusable_for_rendering_are_refused(model_directory: Path, name: str, content: str) -> None:
    (model_directory / name).write_text(content, errors="surrogateescape")
    assert finding(model_directory).startswith(name)


def test_tokenizer_json_without_a_tokenizer_is_refused(model_directory: Path) -> None:
    (model_directory / "tokenizer.json").write_text("{}")
    assert finding(model_directory).startswith("tokenizer.json is not a tokenizer")


def test_size_of_json_is_limited(model_directory: Path) -> None:
    with (model_directory / "tokenizer.json").open("a") as file:
        file.write(" " * 5 * 2**20)
    inspect_model(model_directory, "tiny")
    with (model_directory / "generation_config.json").open("a") as file:
        file.write(" " * 4 * 2**20)
    assert finding(model_directory) == "generation_config.json is larger than 4 MiB"


def test_settings_alone_are_enough_to_refuse(model_directory: Path) -> None:
    (model_directory / "model.safetensors").unlink()
    inspect_settings(model_directory, "tiny")
    edit(model_directory / "config.json", auto_map={"AutoModel": "m.M"})
    edit(model_directory / "generation_config.json", eos_token_id="2")
    with pytest.raises(InvalidModel, match=r"/auto_map.*eos_token_id"):
        inspect_settings(model_directory, "tiny")
