"""Fourth stage: write the adapter's files into the artifact store, the manifest last."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora_service.artifacts.manifest import NAME as MANIFEST
from qlora_service.artifacts.manifest import Manifest, describe_file
from qlora_service.artifacts.model_card import model_card
from qlora_service.artifacts.store import job_key
from qlora_service.models.adapters import detach, save_adapter
from qlora_service.training.loop import Outcome
from qlora_service.training.network.micro_batch import LabelledRow, PreferencePair, TrainingExample
from qlora_service.training.objectives import Evaluation
from workers.trainer.context import AttemptContext, AttemptInputs
from workers.trainer.environment import package_versions
from workers.trainer.load import Loaded
from workers.trainer.prepare import PreparedRows
from workers.trainer.train import Trained

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def publish(context: AttemptContext, rows: PreparedRows, loaded: Loaded, trained: Trained) -> Manifest:
    """The manifest of the published files; the base is without an adapter again.

    Raises:
        LossNotFinite: the training failed; the adapter of its last finite step is published, uncertified.
    """
    context.reporter.enter_phase("publishing", rows.total_steps)
    context.reserve.release()
    directory = context.inputs.scratch / "adapter"
    directory.mkdir()
    _write_files(context, rows, loaded, trained, directory)
    detach(loaded.network.model)
    manifest = _put_files(context, rows, loaded, trained.outcome, directory)
    if trained.failure is not None:
        trained.failure.details |= {
            "kept_attempt": context.inputs.token,
            "kept_step": trained.outcome.steps,
            "kept_bytes": manifest.total_bytes,
        }
        raise trained.failure
    return manifest


def held_out_record(outcome: Outcome, rows: PreparedRows) -> dict[str, Any]:
    """The held-out figures as the manifest and the model card have them."""
    documents = [document for example in rows.held_out for document in example.documents]

    def named(when: str, evaluation: Evaluation) -> dict[str, Any]:
        return {f"{figure}_{when}": value for figure, value in asdict(evaluation).items() if value is not None}

    return (
        named("before", outcome.before)
        | named("after", outcome.after)
        | {
            "rows": len(rows.held_out),
            "trained_tokens": sum(document.trained_tokens for document in documents),
            "source": "held-out rows" if rows.split.held_out else "training rows (none were held out)",
        }
    )


def _write_files(context: AttemptContext, rows: PreparedRows, loaded: Loaded, trained: Trained, to: Path) -> None:
    """Every published file but the model card and the manifest, in the directory `to`."""
    base = context.inputs.base
    if trained.answers is not None:
        answers = json.dumps(trained.answers, indent=2, ensure_ascii=False)
        (to / "generation.json").write_text(answers, encoding="utf-8")
    trained.row_losses.write(to / "rows.jsonl")
    save_adapter(loaded.network.model, to, base.reference, base.revision)
    for name in TOKENIZER_FILES:
        if (base.path / name).is_file():
            shutil.copyfile(base.path / name, to / name)
    (to / "chat_template.jinja").write_text(rows.chat_template, encoding="utf-8")
    shutil.copyfile(context.metrics_file, to / "metrics.jsonl")
    with (to / "held_out.jsonl").open("w", encoding="utf-8") as file:
        for example in rows.held_out:
            file.write(json.dumps(_held_out_row(example)) + "\n")


def _held_out_row(example: TrainingExample) -> dict[str, Any]:
    """A row of held_out.jsonl: enough to measure its loss again."""
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


def _put_files(
    context: AttemptContext, rows: PreparedRows, loaded: Loaded, outcome: Outcome, directory: Path
) -> Manifest:
    """Adds the model card to the files of `directory` and stores them; the manifest is stored last, create-only."""
    inputs, base = context.inputs, context.inputs.base
    base_record = {
        "name": base.name,
        "hub_id": base.hub_id,
        "revision": base.revision,
        "weights_sha256": base.weights_sha256,
    }
    dataset, spec, versions = _dataset_record(inputs, rows), context.spec.model_dump(mode="json"), package_versions()
    held_out = held_out_record(outcome, rows)
    card = model_card(context.job.id, base_record, dataset, spec, loaded.plan["compute_dtype"], held_out, versions)
    (directory / "README.md").write_text(card, encoding="utf-8")
    files = sorted(directory.iterdir())
    manifest = Manifest(
        job_id=context.job.id,
        attempt=inputs.token,
        base_model=base_record,
        dataset=dataset,
        spec=spec,
        plan=loaded.plan,
        versions=versions,
        held_out=held_out,
        files=tuple(describe_file(path) for path in files),
    )
    for path in files:
        inputs.artifacts.put_file(job_key(context.job.id, inputs.token, path.name), path)
    content = manifest.model_dump_json(indent=2).encode() + b"\n"
    inputs.artifacts.create(job_key(context.job.id, inputs.token, MANIFEST), content)
    return manifest


def _dataset_record(inputs: AttemptInputs, rows: PreparedRows) -> dict[str, Any]:
    return {
        "id": inputs.dataset.id,
        "sha256": inputs.dataset.sha256,
        "rows": inputs.dataset.report.rows,
        "trained_on": len(rows.split.train),
        "left_out": inputs.dataset.report.rows - rows.report.usable_rows,
        "validation_sha256": None if inputs.validation is None else inputs.validation.sha256,
    }
