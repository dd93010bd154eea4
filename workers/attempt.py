"""One attempt at one job, from the dataset's bytes to a certified adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from qlora_service.artifacts.manifest import Manifest
from qlora_service.artifacts.store import ArtifactStore, dataset_key
from qlora_service.data.batching import Split, split_rows, step_rows, total_steps
from qlora_service.data.checks import read_examples
from qlora_service.data.rendering import Renderer, RenderReport, RenderRules
from qlora_service.errors import Finding, JobFailed
from qlora_service.jobs import FailureReason, Job
from qlora_service.models.adapters import attach, detach, load_adapter
from qlora_service.models.catalog import BaseModel
from qlora_service.models.nf4 import base_fingerprint, load_base
from qlora_service.specs import JobSpec, Training
from qlora_service.store.datasets import Dataset
from qlora_service.training.attention import Isolation, isolate_documents
from qlora_service.training.device import choose_device, device_name, has_bf16, release_memory
from qlora_service.training.generation import evaluate_generation, question_ids
from qlora_service.training.loop import LossNotFinite, Observer, Outcome, train
from qlora_service.training.micro_batch import TrainingExample
from qlora_service.training.network import Network, Ways
from qlora_service.training.objectives import Evaluation, evaluate, make_objective
from qlora_service.training.row_losses import RowLosses
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
    def judged(self) -> list[TrainingExample]:
        """The held-out rows; without any, the first training rows."""
        positions = self.split.held_out or self.split.train[:TRAINING_ROWS_JUDGED]
        return [self.rows[position] for position in positions]

    @property
    def total_steps(self) -> int:
        training = self.training
        return total_steps(len(self.split.train), training.batch_size, training.epochs, training.max_steps)

    def examples_of_step(self, step: int) -> list[TrainingExample]:
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
    if questions := inputs.job.spec.evaluation.questions:
        tokenizer = load_tokenizer(inputs.base.path, prepared.chat_template)
        for question in questions:
            question_ids(tokenizer, question)  # a template that refuses one says so now, not after the training

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
    manifest, outcome, scores, ways = _train_and_publish(
        inputs, prepared, base, plan, observer, enter_phase, metrics_file
    )

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
    network = Network(load_adapter(base, published), isolation, ways=ways)
    measured = evaluate(network, make_objective(inputs.job.spec.objective), prepared.judged)
    certificate = certify(measured.loss, outcome.after.loss) | {"base_reused": reused}
    return {
        "attempt": inputs.token,
        "held_out": {"before": asdict(outcome.before), "after": asdict(outcome.after)},
        "generation": scores,
        "warnings": outcome_warnings(outcome, prepared.total_steps),
        "certificate": certificate,
        "held_out_rows": len(prepared.split.held_out),
        "steps": outcome.steps,
        "best_step": outcome.best_step,
        "skipped_steps": outcome.skipped_steps,
    }


def _train_and_publish(
    inputs: AttemptInputs,
    prepared: PreparedRows,
    base: PreTrainedModel,
    plan: dict[str, Any],
    observer: Observer,
    enter_phase: EnterPhase,
    metrics_file: Path,
) -> tuple[Manifest, Outcome, dict[str, Any] | None, Ways]:
    """What was published, and what was measured; `base` is without an adapter again. `plan` gains what is chosen.

    Raises:
        LossNotFinite: the adapter of the last finite step is published.
    """
    spec = inputs.job.spec
    network = make_network(base, spec, plan["isolation"], prepared)
    plan |= asdict(network.ways) | {
        "gradient_checkpointing": network.checkpointing,
        "micro_batch_tokens": spec.training.micro_batch_tokens,
    }
    row_losses = RowLosses()
    enter_phase("training", prepared.total_steps)
    failure: LossNotFinite | None = None
    try:
        outcome = train(
            network,
            make_objective(spec.objective),
            prepared.examples_of_step,
            prepared.judged,
            total_steps=prepared.total_steps,
            evaluate_every=spec.evaluation.every_steps or max(1, prepared.total_steps // EVALUATIONS),
            training=spec.training,
            observer=observer,
            row_losses=row_losses,
        )
    except LossNotFinite as error:
        if error.outcome is None:
            raise
        failure, outcome = error, error.outcome

    directory = inputs.scratch / "adapter"
    directory.mkdir()
    scores = None
    if failure is None and (spec.evaluation.generate_rows or spec.evaluation.questions):
        enter_phase("generating", prepared.total_steps)
        report = evaluate_generation(
            network,
            load_tokenizer(inputs.base.path, prepared.chat_template),
            prepared.judged,
            spec.evaluation,
            on_answer=lambda: enter_phase("generating", prepared.total_steps),
        )
        scores = report["scores"]
        (directory / "generation.json").write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")

    enter_phase("publishing", prepared.total_steps)
    row_losses.write(directory / "rows.jsonl")
    write_adapter(network.model, inputs.base, prepared.judged, prepared.chat_template, metrics_file, directory)
    detach(network.model)
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
        held_out=held_out_record(outcome, prepared),
    )
    if failure is not None:
        # What the last finite step left can be downloaded, though nobody certified it.
        failure.details |= {"kept_attempt": inputs.token, "kept_step": outcome.steps}
        raise failure
    return manifest, outcome, scores, network.ways


def make_network(base: PreTrainedModel, spec: JobSpec, isolation: Isolation, prepared: PreparedRows) -> Network:
    """The base with a new adapter, ready to be trained."""
    training = spec.training
    network = Network(
        attach(base, spec.adapter, training.seed, total_steps=prepared.total_steps),
        isolation,
        neftune_noise_alpha=training.neftune_noise_alpha,
    )
    # A row longer than a micro-batch is one of its own; of a pair, both sides are.
    longest = min(prepared.report.longest_tokens, training.max_seq_len_tokens)
    if spec.objective.type in {"dpo", "orpo"}:
        longest *= 2
    most_tokens = max(training.micro_batch_tokens, longest)
    asked = training.gradient_checkpointing
    if asked is True or (asked == "auto" and not network.fits(most_tokens)):
        network.checkpoint()
    return network


def held_out_record(outcome: Outcome, prepared: PreparedRows) -> dict[str, Any]:
    """The held-out figures as the manifest and the model card have them."""
    documents = [document for example in prepared.judged for document in example.documents]

    def named(when: str, evaluation: Evaluation) -> dict[str, Any]:
        return {f"{figure}_{when}": value for figure, value in asdict(evaluation).items() if value is not None}

    return (
        named("before", outcome.before)
        | named("after", outcome.after)
        | {
            "rows": len(prepared.judged),
            "trained_tokens": sum(document.trained_tokens for document in documents),
            "source": "held-out rows" if prepared.split.held_out else "training rows (none were held out)",
        }
    )


def outcome_warnings(outcome: Outcome, total_steps: int) -> list[str]:
    """What the user of a certified adapter should know all the same."""
    warnings = []
    before, after = outcome.before.loss, outcome.after.loss
    if after > before:
        warnings.append(
            f"the held-out loss rose from {before:.4f} to {after:.4f}: the adapter is worse than the base on "
            "these rows; lower training.learning_rate, or train on more rows"
        )
    if outcome.best_step == 0:
        warnings.append("no step lowered the held-out loss: the adapter is as it started; lower training.learning_rate")
    if outcome.steps < total_steps:
        warnings.append(f"stopped early after {outcome.steps} of {total_steps} steps: the held-out loss fell no more")
    if outcome.skipped_steps:
        warnings.append(
            f"{outcome.skipped_steps} of {outcome.steps} steps were skipped, because their loss or gradients were not "
            "finite: metrics.jsonl has which"
        )
    return warnings


def certify(loss: float, trained: float) -> dict[str, Any]:
    """The certificate of a reloaded adapter's held-out loss.

    Raises:
        JobFailed: it is not the loss that training ended with.
    """
    difference = abs(loss - trained)
    if not difference <= CERTIFICATE_TOLERANCE:  # also when it is not a number
        raise JobFailed(
            f"the published adapter gives a held-out loss of {loss:.6f}, the trained one gave {trained:.6f}: "
            "the files are not what was trained",
            reason=FailureReason.CERTIFICATE,
        )
    return {"held_out_loss": loss, "difference": difference}


def compute_dtype(asked: str, device: torch.device) -> torch.dtype:
    """The precision of the maths: what was asked for; "auto" is bfloat16 where the hardware has it."""
    if asked == "auto":
        return torch.bfloat16 if has_bf16(device) else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[asked]


def load_tokenizer(model_dir: Path, chat_template: str) -> PreTrainedTokenizerBase:
    """The base's tokenizer with the chat template that the rows were rendered with."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    tokenizer.chat_template = chat_template
    return tokenizer


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
