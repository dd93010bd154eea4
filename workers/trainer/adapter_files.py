"""The files of a published adapter, and their order of publication."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from qlora_service.artifacts.manifest import MANIFEST_NAME, Manifest, describe_file
from qlora_service.artifacts.model_card import model_card
from qlora_service.artifacts.store import ArtifactStore, job_key
from qlora_service.data.rendering.stop_tokens import StopTokens
from qlora_service.data.rendering.tokenizer_settings import (
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    TOKENS_MAP,
)
from qlora_service.models.adapters import save_adapter
from qlora_service.models.catalog.catalog import BaseModel
from qlora_service.training.network.micro_batch import LabeledRow, PreferencePair, TrainingExample

TOKENIZER_FILES = ("tokenizer.json", TOKENIZER_CONFIG, TOKENS_MAP)


def write_adapter(
    model: PeftModel,
    base: BaseModel,
    held_out: Sequence[TrainingExample],
    chat_template: str,
    stop_tokens: StopTokens,
    metrics_file: Path,
    to: Path,
) -> None:
    """The adapter, the settings for generation, the metrics and the held-out rows, as files in the directory `to`."""
    save_adapter(model, to, base.reference, base.revision)
    write_settings(base.path, chat_template, stop_tokens, to)
    shutil.copyfile(metrics_file, to / "metrics.jsonl")
    with (to / "held_out.jsonl").open("w", encoding="utf-8") as file:
        for example in held_out:
            file.write(json.dumps(_held_out_row(example)) + "\n")


def write_settings(base_dir: Path, chat_template: str, stop_tokens: StopTokens, to: Path) -> None:
    """The base's tokenizer and generation settings, with the tokens that end trained answers, and the chat template."""
    for name in TOKENIZER_FILES:
        if (base_dir / name).is_file():
            shutil.copyfile(base_dir / name, to / name)
    if stop_tokens.eos is not None:
        for name in (TOKENIZER_CONFIG, TOKENS_MAP):
            settings = _read_settings(to / name)
            if name == TOKENIZER_CONFIG or "eos_token" in settings:
                _write_settings(to / name, settings | {"eos_token": stop_tokens.eos})
    (to / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
    generation = _read_settings(base_dir / GENERATION_CONFIG)
    if stop_tokens.ids:
        generation["eos_token_id"] = list(stop_tokens.ids)
    if generation:
        _write_settings(to / GENERATION_CONFIG, generation)


def publish_directory(directory: Path, artifacts: ArtifactStore, draft: Manifest) -> Manifest:
    """Stores the files of `directory` and a model card, and last, create-only, the manifest that names them.

    `draft` is the manifest without files.
    """
    card = model_card(
        draft.job_id,
        draft.base_model,
        draft.dataset,
        draft.spec,
        draft.plan["compute_dtype"],
        draft.held_out,
        draft.stop_tokens,
        draft.versions,
    )
    (directory / "README.md").write_text(card, encoding="utf-8")
    files = sorted(directory.iterdir())
    manifest = draft.model_copy(update={"files": tuple(describe_file(path) for path in files)})
    for path in files:
        artifacts.put_file(job_key(manifest.job_id, manifest.attempt, path.name), path)
    content = manifest.model_dump_json(indent=2).encode() + b"\n"
    artifacts.create(job_key(manifest.job_id, manifest.attempt, MANIFEST_NAME), content)
    return manifest


def _read_settings(path: Path) -> dict[str, Any]:
    """The settings in the file; none without the file."""
    settings: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    return settings


def _write_settings(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _held_out_row(example: TrainingExample) -> dict[str, Any]:
    """A row of held_out.jsonl: enough to measure its loss again."""
    documents = [
        {"input_ids": list(document.input_ids), "trained": [int(flag) for flag in document.trained]}
        for document in example.documents
    ]
    record = {"line": example.line, **documents[0]}
    if isinstance(example, PreferencePair):
        record["rejected"] = documents[1]
    if isinstance(example, LabeledRow):
        record["desirable"] = example.desirable
    return record
