"""Content checks on a directory before it becomes a base model; they execute and unpickle nothing."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_service.data.rendering.tokenizer_settings import (
    CHAT_TEMPLATE,
    MAX_SETTINGS_BYTES,
    read_json,
    tokenizer_settings,
)
from qlora_service.errors import Finding, InvalidModel
from qlora_service.models.catalog.architecture import architecture_findings, model_sizes
from qlora_service.models.catalog.causality import causality_findings
from qlora_service.models.catalog.safetensors_header import TensorEntry, read_header

CONFIG = "config.json"
TOKENIZER_JSON = "tokenizer.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
MAX_TOKENIZER_JSON_BYTES = 32 << 20
"""The largest file in use, Gemma 3's, has 31.8 MiB."""

# The files of slow tokenizers: any one of these sets is enough to build tokenizer.json.
SLOW_TOKENIZERS = ({"tokenizer.model"}, {"spiece.model"}, {"vocab.json", "merges.txt"}, {"vocab.txt"})
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
CODE_KEYS = {"auto_map", "custom_pipelines", "trust_remote_code"}
# Left by `git clone` and the hub client; nothing in these directories is read or copied.
IGNORED_DIRECTORIES = {".git", ".cache"}


@dataclass(frozen=True)
class ModelFacts:
    """Facts from config.json and the weights' headers; `weight_files` are the files that transformers loads."""

    architecture: str
    model_type: str
    parameters: int
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    chat_template: bool
    weight_files: tuple[str, ...]


def inspect_model(directory: Path, label: str) -> ModelFacts:
    """The facts of a safe and complete Hugging Face directory; `label` names the directory in the error.

    Raises:
        InvalidModel: the directory is unsafe or incomplete; the error has every finding.
    """
    root = directory.resolve()
    findings: list[str] = []
    documents: dict[str, Any] = {}
    headers: dict[str, dict[str, TensorEntry]] = {}
    names: set[str] = set()  # of the top level; files in subdirectories are checked; only TOOL_TEMPLATE is used
    for path in _regular_files(root, findings):
        name = path.relative_to(root).as_posix()
        if path.parent == root:
            names.add(name)
        if path.suffix == ".safetensors":
            try:
                headers[name] = read_header(path)
            except ValueError as error:
                findings.append(f"{name} is not valid safetensors: {error}")
            continue
        findings += _executable_content(path, name)
        if path.suffix == ".json":
            documents[name] = _read_object(path, name, findings)
    config_findings = _config_findings(names, documents)
    findings += config_findings
    findings += _tokenizer_findings(root, names)
    settings = tokenizer_settings(documents, root / CHAT_TEMPLATE, findings)
    # The sizes of an unsupported architecture have other names.
    sizes = {} if config_findings else model_sizes(documents["config.json"], findings)
    weight_files = _weight_files(names, documents, headers, findings)
    _raise_if_any(findings, label)
    config = documents["config.json"]
    return ModelFacts(
        architecture=config["architectures"][0],
        model_type=config["model_type"],
        parameters=sum(entry.parameters for name in weight_files for entry in headers[name].values()),
        chat_template=settings.has_own_template,
        weight_files=weight_files,
        **sizes,
    )


def inspect_settings(directory: Path, label: str) -> None:
    """Checks a model by its JSON files alone, before its weights are downloaded.

    Raises:
        InvalidModel: a JSON file names code to run or has settings that rendering cannot use, or the model is
            quantized, an adapter, or no causal language model.
    """
    findings: list[str] = []
    paths = sorted(directory.glob("*.json"))
    documents = {path.name: _read_object(path, path.name, findings) for path in paths}
    findings += _config_findings(set(documents), documents)
    tokenizer_settings(documents, directory / CHAT_TEMPLATE, findings)
    _raise_if_any(findings, label)
    check_causality(directory, label)


def check_causality(directory: Path, label: str) -> None:
    """Raises: InvalidModel, when the model of the directory's config.json is no causal language model in fact."""
    _raise_if_any(causality_findings((directory / CONFIG).read_bytes()), label)


def _raise_if_any(findings: list[str], label: str) -> None:
    if findings:
        raise InvalidModel(
            f"{label} cannot be a base model: {'; '.join(findings[:5])}"
            + (f"; and {len(findings) - 5} more" if len(findings) > 5 else ""),
            findings=[Finding(reason) for reason in findings],
        )


def _regular_files(root: Path, findings: list[str]) -> Iterator[Path]:
    blobs = _hub_cache_blobs(root)
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - IGNORED_DIRECTORIES)
        for entry in [*folders, *sorted(files)]:
            path = Path(folder, entry)
            name = path.relative_to(root).as_posix()
            target = Path(os.path.realpath(path))  # unlike resolve(), accepts a link that points to itself
            if path.is_symlink() and not target.is_relative_to(root) and target.parent != blobs:
                findings.append(f"{name} is a symbolic link to a path outside the directory")
            elif path.is_file():
                yield path
            elif not path.is_dir():
                findings.append(f"{name} is not a regular file")


def _hub_cache_blobs(root: Path) -> Path | None:
    """The directory that links in a hub cache's `models--org--name/snapshots/<revision>` point to."""
    repository = root.parent.parent
    if root.parent.name == "snapshots" and repository.name.startswith("models--"):
        return repository / "blobs"
    return None


def _executable_content(path: Path, name: str) -> list[str]:
    if path.suffix.lower() == ".py":
        return [f"{name} is Python code, which this service never runs"]
    if path.suffix.lower() in PICKLE_SUFFIXES or _is_pickle(path):
        return [f"{name} holds pickled weights, which can run code when read: use *.safetensors instead"]
    return []


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        magic = file.read(2)
    if len(magic) == 2 and magic[0] == 0x80 and 2 <= magic[1] <= 5:
        return True
    # torch.save writes a zip archive around data.pkl; other bytes may precede a zip archive.
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(member.endswith((".pkl", ".pickle")) for member in archive.namelist())
    except zipfile.BadZipFile:
        return True  # an unreadable archive is treated as a pickle


def _read_object(path: Path, name: str, findings: list[str]) -> dict[str, Any]:
    """The JSON object, or an empty dict for any other content; adds the file's problems to `findings`."""
    limit_bytes = MAX_TOKENIZER_JSON_BYTES if path.name == TOKENIZER_JSON else MAX_SETTINGS_BYTES
    document = read_json(path, name, findings, limit_bytes)
    findings += [
        f"{name} has {pointer}: code from the model's repository is never run" for pointer in _code_keys(document)
    ]
    # Only files that transformers reads as objects are accessed by key.
    return document if isinstance(document, dict) else {}


def _code_keys(document: Any) -> Iterator[str]:
    """JSON pointers to the keys that request remote code."""
    pending = [("", document)]
    while pending:
        pointer, node = pending.pop()
        if isinstance(node, dict):
            for key, value in node.items():
                # In a vocabulary any word may be a key, with its token id as the value.
                is_token_id = isinstance(value, int) and not isinstance(value, bool)
                if key in CODE_KEYS and value and not is_token_id:
                    yield f"{pointer}/{key}"
                elif isinstance(value, (dict, list)):
                    escaped = key.replace("~", "~0").replace("/", "~1")
                    pending.append((f"{pointer}/{escaped}", value))
        elif isinstance(node, list):
            pending += [(f"{pointer}/{i}", value) for i, value in enumerate(node) if isinstance(value, (dict, list))]


def _config_findings(names: set[str], documents: dict[str, Any]) -> list[str]:
    if "adapter_config.json" in names:
        return ["adapter_config.json says it is an adapter: import the base model it was trained on"]
    if "config.json" not in names:
        return ["config.json is missing"]
    config = documents.get("config.json", {})
    findings = architecture_findings(config)
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        findings.append(
            f"config.json says the weights are already quantized ({method or 'unknown method'}): "
            "import the original, which this service quantizes itself"
        )
    return findings


def _tokenizer_findings(root: Path, names: set[str]) -> list[str]:
    if TOKENIZER_JSON not in names:
        if any(files <= names for files in SLOW_TOKENIZERS):
            return []
        return ["the tokenizer is missing: tokenizer.json, tokenizer.model, or vocab.json with merges.txt"]
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(root / TOKENIZER_JSON))
    except Exception as error:  # noqa: BLE001 - tokenizers raises nothing narrower
        return [f"tokenizer.json is not a tokenizer: {error}"]
    return []


def _weight_files(
    names: set[str],
    documents: dict[str, Any],
    headers: dict[str, dict[str, TensorEntry]],
    findings: list[str],
) -> tuple[str, ...]:
    """The files that transformers would load: model.safetensors if it exists, else the files that the index names."""
    if WEIGHTS_INDEX in names:
        weight_map = documents.get(WEIGHTS_INDEX, {}).get("weight_map")
        shards = set(weight_map.values()) if _is_weight_map(weight_map) else set()
        if not shards:
            findings.append(f"{WEIGHTS_INDEX} has no usable weight_map")
        for shard in sorted(shards - names):
            findings.append(f"{WEIGHTS_INDEX} names {shard}, which is not in the directory")
        for shard in sorted(shards & headers.keys()):
            missing = [key for key, file in weight_map.items() if file == shard and key not in headers[shard]]
            if missing:
                findings.append(f"{shard} lacks {len(missing)} tensors of {WEIGHTS_INDEX}, first {missing[0]}")
        if WEIGHTS not in names:
            return tuple(sorted(shards))
    if WEIGHTS in names:
        return (WEIGHTS,)
    hint = next((f": to import {name}, name that file" for name in sorted(names) if name.endswith(".gguf")), "")
    findings.append(f"{WEIGHTS} is missing, and so is {WEIGHTS_INDEX}{hint}")
    return ()


def _is_weight_map(weight_map: Any) -> bool:
    return isinstance(weight_map, dict) and all(
        isinstance(file, str) and file.endswith(".safetensors") for file in weight_map.values()
    )
