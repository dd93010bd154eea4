"""Publishing an adapter: its files, then the manifest; and reading back what was published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from qlora_service.artifacts.manifest import NAME as MANIFEST
from qlora_service.artifacts.manifest import Manifest, describe_file
from qlora_service.artifacts.model_card import model_card
from qlora_service.artifacts.store import ArtifactStore, job_key
from qlora_service.models.adapters import save_adapter
from qlora_service.models.catalog.catalog import BaseModel
from qlora_service.training.network.micro_batch import LabelledRow, PreferencePair, TrainingExample
from workers.trainer.environment import package_versions

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def write_adapter(
    model: PeftModel,
    base: BaseModel,
    judged: Sequence[TrainingExample],
    chat_template: str,
    metrics_file: Path,
    to: Path,
) -> None:
    """Everything but the model card and the manifest, as files in the directory `to`."""
    save_adapter(model, to, base.reference, base.revision)
    for name in TOKENIZER_FILES:
        if (base.path / name).is_file():
            shutil.copyfile(base.path / name, to / name)
    (to / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    shutil.copyfile(metrics_file, to / "metrics.jsonl")
    with (to / "held_out.jsonl").open("w", encoding="utf-8") as file:
        for example in judged:
            file.write(json.dumps(_record(example)) + "\n")


def _record(example: TrainingExample) -> dict[str, Any]:
    """A row of held_out.jsonl: what is needed to measure its loss again."""
    documents = [
        {"input_ids": list(document.input_ids), "trained": [int(flag) for flag in document.trained]}
        for document in example.documents
    ]
    record = {"line": example.line, **documents[0]}
    if isinstance(example, PreferencePair):
        record["rejected"] = documents[1]
    if isinstance(example, LabelledRow):
        record["desirable"] = example.desirable
    return record


def publish(
    directory: Path,
    artifacts: ArtifactStore,
    *,
    job_id: str,
    token: int,
    base: BaseModel,
    dataset: dict[str, Any],
    spec: dict[str, Any],
    plan: dict[str, Any],
    held_out: dict[str, Any],
) -> Manifest:
    """Put the files of `directory`, and a model card, into the artifact store; the manifest last."""
    base_record = {
        "name": base.name,
        "hub_id": base.hub_id,
        "revision": base.revision,
        "weights_sha256": base.weights_sha256,
    }
    versions = package_versions()
    card = model_card(job_id, base_record, dataset, spec, plan["compute_dtype"], held_out, versions)
    (directory / "README.md").write_text(card, encoding="utf-8")
    files = sorted(directory.iterdir())
    manifest = Manifest(
        job_id=job_id,
        attempt=token,
        base_model=base_record,
        dataset=dataset,
        spec=spec,
        plan=plan,
        versions=versions,
        held_out=held_out,
        files=tuple(describe_file(path) for path in files),
    )
    for path in files:
        artifacts.put_file(job_key(job_id, token, path.name), path)
    artifacts.create(job_key(job_id, token, MANIFEST), manifest.model_dump_json(indent=2).encode() + b"\n")
    return manifest
