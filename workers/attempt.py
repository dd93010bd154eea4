"""One attempt at one job, from the dataset's bytes to a certified adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from qlora_service.artifacts.manifest import Manifest
from qlora_service.artifacts.store import ArtifactStore, dataset_key
from qlora_service.data.batching import Split, split_rows, step_rows, total_steps
from qlora_service.data.checks import read_examples
from qlora_service.data.rendering import Renderer, RenderReport, RenderRules
from qlora_service.errors import Finding, JobFailed
from qlora_service.jobs import FailureReason, Job
from qlora_service.models.adapters import attach, checkpoint_activations, load_adapter
from qlora_service.models.catalog import BaseModel
from qlora_service.models.nf4 import base_fingerprint, load_base
from qlora_service.specs import Training
from qlora_service.store.datasets import Dataset
from qlora_service.training.attention import isolate_documents
from qlora_service.training.device import choose_device, device_name, has_bf16, release_memory
from qlora_service.training.evaluation import mean_loss
from qlora_service.training.loop import Losses, Observer, train
from qlora_service.training.micro_batch import TokenRow
from qlora_service.training.rows import RenderedRows, store_rendered
from workers.publishing import fetch_published, publish, write_adapter

EnterPhase = Callable[[str, int | None], None]
EVALUATIONS = 10
"""Held-out evaluations over a job, where the spec names no interval."""
CERTIFICATE_TOLERANCE = 1e-4
"""Nats. The same code on the same device gives the same loss; this leaves room for non-deterministic kernels."""
TRAINING_ROWS_JUDGED = 32
"""Rows the loss is measured on when none are held out."""


@dataclass(frozen=True)
class AttemptInputs:
    """Everything an attempt is a function of, and where it may write."""

    job: Job
    token: int
    dataset: Dataset
    base: BaseModel
    artifacts: ArtifactStore
    scratch: Path
    needs_gpu: bool
    """The slot is a GPU: never train on the CPU instead, for weeks."""


@dataclass(frozen=True)
class PreparedRows:
    """The job's rows: which are trained on in which step, which are judged."""

    rows: RenderedRows
    split: Split
    report: RenderReport
    training: Training
    chat_template: str

    @cached_property
    def judged(self) -> list[TokenRow]:
        """The held-out rows; without any, the first training rows."""
        positions = self.split.held_out or self.split.train[:TRAINING_ROWS_JUDGED]
        return [self.rows[position] for position in positions]

    @property
    def total_steps(self) -> int:
        training = self.training
        return total_steps(len(self.split.train), training.batch_size, training.epochs, training.max_steps)

    def rows_of_step(self, step: int) -> list[TokenRow]:
        """The examples of step `step` (from 0)."""
        train, training = self.split.train, self.training
        size, seed = training.batch_size, training.seed
        return [
            self.rows[train[i]] for i in step_rows(step, len(train), size, training.epochs, training.max_steps, seed)
        ]


def run_attempt(
    inputs: AttemptInputs, observer: Observer, enter_phase: EnterPhase, metrics_file: Path
) -> dict[str, Any]:
    """Train, publish and certify; the job's result.

    `enter_phase(name, total_steps)` is told where the attempt stands, and may raise to stop it.

    Raises:
        JobFailed: with the reason.
        QLoRAError: the dataset or the model turned out unusable.
    """
    disable_progress_bar()  # a log is no terminal
    quantization = inputs.job.spec.quantization
    enter_phase("rendering", None)
    prepared = prepare_rows(inputs)

    enter_phase("loading", prepared.total_steps)
    device = choose_device(inputs.needs_gpu)
    dtype = compute_dtype(quantization.compute_dtype, device)
    base = load_base(inputs.base.path, quantization, dtype, device)
    isolation = isolate_documents(base)
    fingerprint = base_fingerprint(base)

    plan = {
        "device": device_name(device),
        "compute_dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "total_steps": prepared.total_steps,
        "isolation": isolation,
        "base_fingerprint": fingerprint,
    }
    manifest, losses = _train_and_publish(inputs, prepared, base, plan, observer, enter_phase, metrics_file)

    enter_phase("certifying", prepared.total_steps)
    published = inputs.scratch / "published"
    fetch_published(manifest, inputs.artifacts, published)
    reused = base_fingerprint(base) == fingerprint
    if not reused:
        # This frame holds the only reference: the changed base goes before the new one comes.
        del base
        release_memory(device)
        base = load_base(inputs.base.path, quantization, dtype, device)
        isolate_documents(base)
    loss = mean_loss(load_adapter(base, published), prepared.judged, device)
    certificate = certify(loss, losses) | {"base_reused": reused}
    return {
        "attempt": inputs.token,
        "losses": asdict(losses),
        "warnings": outcome_warnings(losses),
        "certificate": certificate,
        "held_out_rows": len(prepared.split.held_out),
        "steps": prepared.total_steps,
    }


def _train_and_publish(
    inputs: AttemptInputs,
    prepared: PreparedRows,
    base: PreTrainedModel,
    plan: dict[str, Any],
    observer: Observer,
    enter_phase: EnterPhase,
    metrics_file: Path,
) -> tuple[Manifest, Losses]:
    """What was published and the losses; `base` is without an adapter again. `plan` gains what is decided here."""
    spec = inputs.job.spec
    model = attach(base, spec.adapter, spec.training.seed)
    plan["gradient_checkpointing"] = spec.training.gradient_checkpointing and checkpoint_activations(model)
    plan["micro_batch_tokens"] = spec.training.micro_batch_tokens if plan["isolation"] != "alone" else 1
    enter_phase("training", prepared.total_steps)
    losses = train(
        model,
        prepared.rows_of_step,
        prepared.judged,
        total_steps=prepared.total_steps,
        evaluate_every=spec.evaluation.every_steps or max(1, prepared.total_steps // EVALUATIONS),
        training=spec.training,
        device=base.device,
        observer=observer,
        micro_batch_tokens=plan["micro_batch_tokens"],
    )

    enter_phase("publishing", prepared.total_steps)
    directory = inputs.scratch / "adapter"
    write_adapter(model, inputs.base, prepared.judged, prepared.chat_template, metrics_file, directory)
    model.unload()
    manifest = publish(
        directory,
        inputs.artifacts,
        job_id=inputs.job.id,
        token=inputs.token,
        base=inputs.base,
        dataset={
            "id": inputs.dataset.id,
            "sha256": inputs.dataset.sha256,
            "rows": inputs.dataset.report.rows,
            "trained_on": len(prepared.split.train),
            "left_out": inputs.dataset.report.rows - prepared.report.usable_rows,
        },
        spec=spec.model_dump(mode="json"),
        plan=plan,
        held_out={
            "loss_before": losses.before,
            "loss_after": losses.after,
            "rows": len(prepared.judged),
            "trained_tokens": sum(row.trained_tokens for row in prepared.judged),
            "source": "held-out rows" if prepared.split.held_out else "training rows (none were held out)",
        },
    )
    return manifest, losses


def outcome_warnings(losses: Losses) -> list[str]:
    """What the user of a certified adapter should know all the same."""
    if losses.after <= losses.before:
        return []
    return [
        f"the held-out loss rose from {losses.before:.4f} to {losses.after:.4f}: the adapter is worse than the base on "
        "these rows; lower training.learning_rate, or train on more rows"
    ]


def certify(loss: float, losses: Losses) -> dict[str, Any]:
    """The certificate of a reloaded adapter's held-out loss.

    Raises:
        JobFailed: it is not the loss that training ended with.
    """
    difference = abs(loss - losses.after)
    if not difference <= CERTIFICATE_TOLERANCE:  # also when it is not a number
        raise JobFailed(
            f"the published adapter gives a held-out loss of {loss:.6f}, the trained one gave {losses.after:.6f}: "
            "the files are not what was trained",
            reason=FailureReason.CERTIFICATE,
        )
    return {"held_out_loss": loss, "difference": difference}


def compute_dtype(asked: str, device: torch.device) -> torch.dtype:
    """The precision of the maths: what was asked for; "auto" is bfloat16 where the hardware has it."""
    if asked == "auto":
        return torch.bfloat16 if has_bf16(device) else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[asked]


def prepare_rows(inputs: AttemptInputs) -> PreparedRows:
    """Render every row and split them.

    Raises:
        JobFailed: rows too long, none usable, or too few to hold any out.
    """
    spec, report = inputs.job.spec, inputs.dataset.report
    training, validation = spec.training, spec.validation
    path = inputs.artifacts.local_copy(dataset_key(inputs.dataset.sha256), inputs.scratch)
    # The job's own time, not the clock's: every attempt renders the same text.
    with Renderer(inputs.base.path, RenderRules.of(training), inputs.job.created_at) as renderer:
        results = renderer.render(read_examples(path, report.container, report.shape))
        rows, rendered = store_rendered(results, inputs.scratch / "rows.arrow")
        chat_template = renderer.chat_template
    findings = [Finding(**finding) for finding in rendered.findings]
    if rendered.too_long_rows and training.too_long == "refuse":
        raise JobFailed(
            f"{rendered.too_long_rows} rows are longer than max_seq_len_tokens = {training.max_seq_len_tokens}; "
            f"the longest has {rendered.longest_tokens} tokens",
            reason=FailureReason.INVALID_INPUT,
            findings=findings,
        )
    try:
        split = split_rows(len(rows), validation.fraction, validation.max_rows, training.seed)
    except ValueError as error:
        raise JobFailed(str(error), reason=FailureReason.INVALID_INPUT, findings=findings) from None
    return PreparedRows(rows, split, rendered, training, chat_template)
