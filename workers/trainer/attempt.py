"""One attempt at one job, in five stages: prepare, load, train, publish, certify."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from qlora_service.domain.metrics import metrics_csv
from qlora_service.specs import JobSpec
from qlora_service.training.loop import Outcome
from workers.trainer.certify import certify
from workers.trainer.context import AttemptContext
from workers.trainer.environment import change_note
from workers.trainer.load import load
from workers.trainer.prepare import prepare
from workers.trainer.publish import publish
from workers.trainer.step_memory import peak_memory
from workers.trainer.train import train


def run_attempt(context: AttemptContext) -> dict[str, Any]:
    """The job's result, after training from its last checkpoint, publication and certification.

    Raises:
        Interrupted: the attempt should stop; a checkpoint has the completed steps.
        JobFailed: the job failed; `details["reason"]` says why.
        QLoRAError: the dataset or the model is unusable.
        OSError: the disk is full (ENOSPC); the last checkpoint is intact.
    """
    disable_progress_bar()  # the log is not a terminal
    rows = prepare(context)
    loaded = load(context, rows)
    trained = train(context, rows, loaded)
    manifest = publish(context, rows, loaded, trained)
    outcome = trained.outcome
    certificate = certify(context, rows, loaded, outcome, manifest)
    warnings = [
        *outcome_warnings(outcome, rows.total_steps),
        *rows.warnings,
        *map(change_note, loaded.plan["changes"]),
    ]
    context.reporter.warn(warnings)
    context.reporter.note(memory=peak_memory(loaded.request.device))
    return {
        "attempt": context.inputs.token,
        "measured": context.reporter.finish(),
        "base": loaded.base_source,
        "published_bytes": manifest.total_bytes,
        "held_out": {"before": asdict(outcome.before), "after": asdict(outcome.after)},
        "generation": None if trained.answers is None else trained.answers["scores"],
        "warnings": warnings,
        "certificate": certificate,
        "held_out_rows": len(rows.split.held_out),
        "steps": outcome.steps,
        "best_step": outcome.best_step,
        "skipped_steps": outcome.skipped_steps,
        **totals(context.metrics_file, context.spec),
    }


def outcome_warnings(outcome: Outcome, total_steps: int) -> list[str]:
    """Warnings for the user of a certified adapter."""
    warnings = []
    before, after = outcome.before.loss, outcome.after.loss
    if after > before:
        warnings.append(
            f"the held-out loss rose from {before:.4f} to {after:.4f}: the adapter is worse than the base on "
            "these rows; lower training.learning_rate, or train on more rows"
        )
    if outcome.best_step == 0:
        warnings.append(
            "no step lowered the held-out loss: the adapter is in its initial state; lower training.learning_rate"
        )
    if outcome.steps < total_steps:
        warnings.append(
            f"stopped early after {outcome.steps} of {total_steps} steps: the held-out loss stopped improving"
        )
    if outcome.skipped_steps:
        warnings.append(
            f"{outcome.skipped_steps} of {outcome.steps} steps were skipped, because their loss or gradients were not "
            "finite: metrics.jsonl lists them"
        )
    return warnings


def totals(metrics_file: Path, spec: JobSpec) -> dict[str, Any]:
    """Tokens of the job's steps over all attempts, trained or not, and the size of its metrics.csv in bytes."""
    records = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    return {
        "tokens": sum(record.get("tokens", 0) for record in records),
        "results_bytes": len(metrics_csv(records, holds_out=spec.validation.holds_out)),
    }
