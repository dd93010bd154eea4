"""Fourth stage: write the adapter's files into the artifact store, the manifest last."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from qlora_service.artifacts.manifest import Manifest
from qlora_service.models.adapters import detach
from qlora_service.training.loop import Outcome
from qlora_service.training.objectives import Evaluation
from workers.trainer.adapter_files import publish_directory, write_adapter
from workers.trainer.context import AttemptContext, AttemptInputs
from workers.trainer.environment import package_versions
from workers.trainer.load import LoadedNetwork
from workers.trainer.prepare import PreparedRows
from workers.trainer.train import TrainingResult


def publish(context: AttemptContext, rows: PreparedRows, loaded: LoadedNetwork, trained: TrainingResult) -> Manifest:
    """The manifest of the published files. Detaches the adapter from the base.

    Raises:
        LossNotFinite: the training failed; the adapter of its last finite step is published, uncertified.
    """
    context.reporter.enter_phase("publishing", rows.total_steps)
    context.reserve.release()
    directory = context.inputs.scratch / "adapter"
    directory.mkdir()
    if trained.answers is not None:
        answers = json.dumps(trained.answers, indent=2, ensure_ascii=False)
        (directory / "generation.json").write_text(answers, encoding="utf-8")
    trained.row_losses.write(directory / "rows.jsonl")
    model, base = loaded.network.model, context.inputs.base
    write_adapter(model, base, rows.held_out, rows.chat_template, rows.stop_tokens, context.metrics_file, directory)
    detach(model)
    draft = _draft(context, rows, loaded, trained.outcome)
    manifest = publish_directory(directory, context.inputs.artifacts, draft)
    if trained.failure is not None:
        trained.failure.details |= {
            "kept_attempt": context.inputs.token,
            "kept_step": trained.outcome.steps,
            "kept_bytes": manifest.total_bytes,
        }
        raise trained.failure
    return manifest


def held_out_record(outcome: Outcome, rows: PreparedRows) -> dict[str, Any]:
    """The held-out figures for the manifest and the model card."""
    documents = [document for example in rows.held_out for document in example.documents]

    def figures(when: str, evaluation: Evaluation) -> dict[str, Any]:
        return {f"{figure}_{when}": value for figure, value in asdict(evaluation).items() if value is not None}

    return (
        figures("before", outcome.before)
        | figures("after", outcome.after)
        | {
            "rows": len(rows.held_out),
            "trained_tokens": sum(document.trained_tokens for document in documents),
            "source": "held-out rows" if rows.split.held_out else "training rows (none were held out)",
        }
    )


def _draft(context: AttemptContext, rows: PreparedRows, loaded: LoadedNetwork, outcome: Outcome) -> Manifest:
    """The manifest without files."""
    inputs, base = context.inputs, context.inputs.base
    return Manifest(
        job_id=context.job.id,
        attempt=inputs.token,
        base_model={
            "name": base.name,
            "hub_id": base.hub_id,
            "revision": base.revision,
            "weights_sha256": base.weights_sha256,
        },
        dataset=_dataset_record(inputs, rows),
        spec=context.spec.model_dump(mode="json"),
        plan=loaded.plan,
        versions=package_versions(),
        held_out=held_out_record(outcome, rows),
        stop_tokens=asdict(rows.stop_tokens),
        files=(),
    )


def _dataset_record(inputs: AttemptInputs, rows: PreparedRows) -> dict[str, Any]:
    return {
        "id": inputs.dataset.id,
        "sha256": inputs.dataset.sha256,
        "rows": inputs.dataset.report.rows,
        "trained_on": len(rows.split.train),
        "left_out": inputs.dataset.report.rows - rows.report.usable_rows,
        "warnings": rows.warnings,
        "validation_sha256": None if inputs.validation is None else inputs.validation.sha256,
    }
