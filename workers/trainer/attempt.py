"""One attempt at one job, from the dataset's bytes to a certified adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from qlora_service.artifacts.manifest import Manifest
from qlora_service.artifacts.published import fetch_published
from qlora_service.artifacts.store import ArtifactStore, dataset_key
from qlora_service.data.batching import Split, sample_rows, split_rows, step_rows, total_steps
from qlora_service.data.files.checks import read_examples
from qlora_service.data.rendering.renderer import Renderer, RenderReport, RenderRules
from qlora_service.domain.datasets import Dataset
from qlora_service.domain.jobs import FailureReason, Job
from qlora_service.domain.metrics import metrics_csv
from qlora_service.errors import Finding, JobFailed
from qlora_service.models.adapters import attach, detach, load_adapter
from qlora_service.models.base.needed_base import may_change_base
from qlora_service.models.base.quantized_cache import QuantizedCache
from qlora_service.models.catalog.catalog import BaseModel
from qlora_service.planning.time.duration import JUDGED_TRAINING_ROWS, Kind, Work, evaluation_interval, later_phases
from qlora_service.planning.time.job_times import readable
from qlora_service.specs import JobSpec, Training
from qlora_service.training.checkpoint.checkpoints import KEPT, Checkpoints, expected_bytes
from qlora_service.training.checkpoint.disk_reserve import Ballast
from qlora_service.training.device import choose_device, device_name, forget_peaks, has_bf16
from qlora_service.training.evaluation.generation import evaluate_generation, question_ids
from qlora_service.training.evaluation.row_losses import RowLosses
from qlora_service.training.loop import AroundStep, LossNotFinite, Outcome, checking, train
from qlora_service.training.network.isolation import Isolation
from qlora_service.training.network.micro_batch import TrainingExample
from qlora_service.training.network.network import Network, Ways
from qlora_service.training.objectives import Evaluation, evaluate, make_objective
from qlora_service.training.optimizer import leaves_paged_memory
from qlora_service.training.rows import RenderedRows, store_rendered
from workers.trainer.checkpointing import Checkpointing, Reporter
from workers.trainer.environment import change_note, describe_environment, environment_changes, take_over
from workers.trainer.execution_settings import starting_settings
from workers.trainer.publishing import publish, write_adapter
from workers.trainer.step_memory import TrackedStep, largest_step, peak_memory, predicted_memory
from workers.warm_base import BaseHolder, BaseRequest, Found

Rendered = TypeVar("Rendered")
CERTIFICATE_TOLERANCE = 1e-4
"""Nats. The same code on the same device gives the same loss; this leaves room for non-deterministic kernels."""
DATABASE_ROOM = 16 * 2**20
"""Bytes"""


@dataclass(frozen=True)
class AttemptInputs:
    """Everything an attempt is a function of, and where it may write."""

    job: Job
    token: int
    dataset: Dataset
    base: BaseModel
    artifacts: ArtifactStore
    scratch: Path
    checkpoint_dir: Path
    checkpoint_s: float
    """How often a checkpoint is made"""
    needs_gpu: bool
    """The slot is a GPU: never train on the CPU instead, for weeks."""
    validation: Dataset | None = None
    """Where the held-out rows are, if not in the dataset itself"""
    cache: QuantizedCache | None = None
    """Where quantized bases are kept for the next job; None for nowhere"""
    plan_cache: Path | None = None
    """Where simulated memory is kept"""
    history: Sequence[dict[str, Any]] = ()
    """What jobs on the same base measured"""


@dataclass(frozen=True)
class PreparedRows:
    """The job's rows: which are trained on in which step, which are judged."""

    rows: RenderedRows
    split: Split
    validation: RenderedRows | None
    """Rows of a dataset of their own, of which `split` says which are held out"""
    report: RenderReport
    validation_report: RenderReport | None
    training: Training
    chat_template: str

    @cached_property
    def judged(self) -> list[TrainingExample]:
        """The held-out rows; without any, the first training rows."""
        positions = self.split.held_out or self.split.train[:JUDGED_TRAINING_ROWS]
        rows = self.rows if self.validation is None else self.validation
        return [rows[position] for position in positions]

    @property
    def total_steps(self) -> int:
        training = self.training
        return total_steps(len(self.split.train), training.batch_size, training.epochs, training.max_steps)

    def rows_of_step(self, step: int) -> list[int]:
        """Where the examples of step `step` (from 0) are among the rows."""
        train, training = self.split.train, self.training
        size, seed = training.batch_size, training.seed
        return [train[i] for i in step_rows(step, len(train), size, training.epochs, training.max_steps, seed)]

    def examples_of_step(self, step: int) -> list[TrainingExample]:
        """The examples of step `step` (from 0)."""
        return [self.rows[row] for row in self.rows_of_step(step)]

    @property
    def longest_tokens(self) -> int:
        """Of the rows as they are trained on; of a pair, the longer side."""
        return min(self.report.longest_tokens, self.training.max_seq_len_tokens)


def run_attempt(
    inputs: AttemptInputs,
    reporter: Reporter,
    check: Callable[[], None],
    ballast: Ballast,
    metrics_file: Path,
    bases: BaseHolder,
) -> dict[str, Any]:
    """Train, publish and certify; the job's result. Goes on from the job's last whole checkpoint, if it has one.

    `check()` is asked often, and raises what ends the attempt; `ballast` holds disk space that nothing else may take;
    `bases` has the base that an earlier job left loaded, and may have an adapter on it afterwards.

    Raises:
        Interrupted: what was completed is in a checkpoint.
        JobFailed: with the reason.
        QLoRAError: the dataset or the model turned out unusable.
        OSError: the disk is full (ENOSPC); the last checkpoint is unharmed.
    """
    disable_progress_bar()  # a log is no terminal
    quantization = inputs.job.spec.quantization
    reporter.enter_phase("rendering", None)
    prepared = prepare_rows(inputs, check)
    if questions := inputs.job.spec.evaluation.questions:
        tokenizer = load_tokenizer(inputs.base.path, prepared.chat_template)
        for question in questions:
            question_ids(tokenizer, question)  # a template that refuses one says so now, not after the training

    reporter.enter_phase("loading", prepared.total_steps)
    device = choose_device(inputs.needs_gpu)
    forget_peaks(device)
    environment = describe_environment(device)
    plan = take_over(inputs.job.plan, environment)
    dtype = compute_dtype(plan.get("compute_dtype", quantization.compute_dtype), device)
    wanted = BaseRequest(inputs.base, quantization, dtype, device, inputs.cache)
    warm, base_source = bases.get(wanted)
    isolation = warm.isolation
    plan |= {
        **environment,
        "compute_dtype": str(dtype).removeprefix("torch."),
        "total_steps": prepared.total_steps,
        "base_fingerprint": warm.fingerprint,
    }
    adapter = inputs.job.spec.adapter.model_dump_json()
    found = warm.found.get(adapter)
    known_bytes = None
    if found is not None:
        # Of an attempt before, the plan has the ways too.
        plan, known_bytes = asdict(found.ways) | plan, found.activation_bytes_per_token
    network = make_network(warm.model, inputs.job.spec, isolation, prepared, plan, known_bytes)
    warm.found[adapter] = Found(network.ways, network.activation_bytes_per_token)
    if may_change_base(inputs.job.spec.adapter):
        bases.retire("the job's adapter may change its base")
    if leaves_paged_memory(network.model, inputs.job.spec.training, device):
        bases.retire("the job's optimizer pages")
    manifest, outcome, scores = _train_and_publish(
        inputs, prepared, network, plan, base_source, environment, reporter, check, ballast, metrics_file
    )

    reporter.enter_phase("certifying", prepared.total_steps)
    published = inputs.scratch / "published"
    fetch_published(manifest, inputs.artifacts, published)
    ways = network.ways
    reused = warm.restore()
    if not reused:
        # These are the only other references: the changed base goes before the new one comes.
        del warm, network
        warm = bases.replace_changed(wanted)
    reloaded = Network(load_adapter(warm.model, published), isolation, ways=ways)
    with checking(reloaded, check):
        measured = evaluate(reloaded, make_objective(inputs.job.spec.objective), prepared.judged)
    certificate = certify(measured.loss, outcome.after.loss) | {"base_reused": reused}
    reporter.note(memory=peak_memory(device))
    return {
        "attempt": inputs.token,
        "measured": reporter.finish(),
        "base": base_source,
        "published_bytes": manifest.total_bytes,
        "held_out": {"before": asdict(outcome.before), "after": asdict(outcome.after)},
        "generation": scores,
        "warnings": [*outcome_warnings(outcome, prepared.total_steps), *map(change_note, plan["changes"])],
        "certificate": certificate,
        "held_out_rows": len(prepared.split.held_out),
        "steps": outcome.steps,
        "best_step": outcome.best_step,
        "skipped_steps": outcome.skipped_steps,
        **totals(metrics_file, inputs.job.spec),
    }


def _train_and_publish(
    inputs: AttemptInputs,
    prepared: PreparedRows,
    network: Network,
    plan: dict[str, Any],
    base_source: str,
    environment: dict[str, Any],
    reporter: Reporter,
    check: Callable[[], None],
    ballast: Ballast,
    metrics_file: Path,
) -> tuple[Manifest, Outcome, dict[str, Any] | None]:
    """What was published, and what was measured; the base is without an adapter again.

    Raises:
        LossNotFinite: the adapter of the last finite step is published.
    """
    spec = inputs.job.spec
    training = spec.training.model_copy(update={"micro_batch_tokens": plan["micro_batch_tokens"]})
    checkpoints = Checkpoints(inputs.checkpoint_dir, inputs.token)
    start, metrics = None, b""
    if found := checkpoints.latest():
        start, metrics, then = found
        plan["changes"] += environment_changes(then, environment, start.step)
    rows, steps = len(prepared.split.train), prepared.total_steps
    checkpoint_bytes = expected_bytes(network, training, rows=rows, total_steps=steps)
    # Those that are kept, one in the making, and as much again for what is published; and something for the database,
    # which has to say so when the disk is full.
    room_at_end = checkpoint_bytes + DATABASE_ROOM
    ballast.reserve(max(0, (KEPT + 1) * checkpoint_bytes - checkpoints.bytes_on_disk()) + room_at_end)
    # Not a part of the plan, which is the same however fast its base came.
    reporter.choose_plan(plan, f"base: {base_source}")
    if inputs.token > 1:
        reporter.resumed(start.step if start else 0, metrics, [change_note(change) for change in plan["changes"]])
    control = Checkpointing(
        checkpoints,
        reporter,
        check,
        ballast,
        every_s=inputs.checkpoint_s,
        checkpoint_bytes=checkpoint_bytes,
        room_at_end=room_at_end,
        metrics_file=metrics_file,
        environment=environment,
        plan=plan,
    )
    row_losses = RowLosses()
    evaluate_every = spec.evaluation.every_steps or evaluation_interval(steps)
    _tell_what_is_expected(inputs, prepared, network, plan, reporter, evaluate_every)
    around_step = _around_step(prepared, network, plan, reporter, range(start.step if start else 0, steps))
    reporter.enter_phase("training", steps)
    failure: LossNotFinite | None = None
    try:
        outcome = train(
            network,
            make_objective(spec.objective),
            prepared.examples_of_step,
            prepared.judged,
            total_steps=steps,
            evaluate_every=evaluate_every,
            training=training,
            observer=reporter,
            row_losses=row_losses,
            start=start,
            control=control,
            around_step=around_step,
        )
    except LossNotFinite as error:
        if error.outcome is None:
            raise
        failure, outcome = error, error.outcome
    finally:
        control.flush()

    directory = inputs.scratch / "adapter"
    directory.mkdir()
    scores = None
    if failure is None and (spec.evaluation.generate_rows or spec.evaluation.questions):
        reporter.enter_phase("generating", steps)
        report = evaluate_generation(
            network,
            load_tokenizer(inputs.base.path, prepared.chat_template),
            prepared.judged,
            spec.evaluation,
            on_answer=check,
        )
        scores = report["scores"]
        (directory / "generation.json").write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")

    reporter.enter_phase("publishing", steps)
    ballast.release()
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
            "validation_sha256": None if inputs.validation is None else inputs.validation.sha256,
        },
        spec=spec.model_dump(mode="json"),
        plan=plan,
        held_out=held_out_record(outcome, prepared),
    )
    if failure is not None:
        # What the last finite step left can be downloaded, though nobody certified it.
        failure.details |= {
            "kept_attempt": inputs.token,
            "kept_step": outcome.steps,
            "kept_bytes": manifest.total_bytes,
        }
        raise failure
    return manifest, outcome, scores


def _tell_what_is_expected(
    inputs: AttemptInputs,
    prepared: PreparedRows,
    network: Network,
    plan: dict[str, Any],
    reporter: Reporter,
    evaluate_every: int,
) -> None:
    """What the job is to take with the settings that its plan has come to, for what it takes to be held against."""
    spec, device = inputs.job.spec, device_name(network.device)
    work = Work.of(
        spec, prepared.report, dataset_rows=inputs.dataset.report.usable_rows, validation=prepared.validation_report
    )
    kind = Kind.of(
        spec,
        work,
        micro_batch_tokens=plan["micro_batch_tokens"],
        checkpointing=plan["gradient_checkpointing"],
    )
    predicted = predicted_memory(
        inputs.base.path,
        spec,
        plan,
        longest_tokens=prepared.longest_tokens,
        cuda=network.device.type == "cuda",
        cache_dir=inputs.plan_cache,
    )
    reporter.note(device=device, kind=asdict(kind), work=asdict(work), predicted=predicted)
    later = later_phases(work, readable(inputs.history, device))
    reporter.expect(prepared.total_steps, evaluate_every, later)


def _around_step(
    prepared: PreparedRows, network: Network, plan: dict[str, Any], reporter: Reporter, steps: range
) -> AroundStep:
    """On a CPU, what tracks the bytes of the largest of the steps; CUDA's allocator counts by itself."""
    if network.device.type == "cuda" or not steps:
        return lambda *_: nullcontext()
    largest = largest_step(prepared.rows.tokens(), prepared.rows_of_step, plan["micro_batch_tokens"], steps)
    return TrackedStep(network, largest, lambda memory: reporter.note(memory=memory))


def make_network(
    base: PreTrainedModel,
    spec: JobSpec,
    isolation: Isolation,
    prepared: PreparedRows,
    plan: dict[str, Any],
    activation_bytes_per_token: float | None = None,
) -> Network:
    """The base with a new adapter, ready to be trained: as `plan` says, or, where it does not say, as fits best.

    What is chosen is put into the plan. Activations are measured, if it has to be chosen and they were not before.
    """
    training = spec.training
    known = {field.name: plan[field.name] for field in fields(Ways) if field.name in plan}
    network = Network(
        attach(base, spec.adapter, training.seed, total_steps=prepared.total_steps),
        isolation,
        ways=Ways(**known) if known else None,
        neftune_noise_alpha=training.neftune_noise_alpha,
        activation_bytes_per_token=activation_bytes_per_token,
    )
    if "micro_batch_tokens" not in plan:
        choice = starting_settings(network, spec, prepared.longest_tokens)
        plan["micro_batch_tokens"] = choice.micro_batch_tokens
        plan["gradient_checkpointing"] = choice.gradient_checkpointing
    if plan["gradient_checkpointing"]:
        network.checkpoint()
    plan |= asdict(network.ways) | {"gradient_checkpointing": network.checkpointing}
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


def totals(metrics_file: Path, spec: JobSpec) -> dict[str, Any]:
    """Of the job over all attempts: tokens that its steps went through, learned or not; the size of its results."""
    records = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    return {
        "tokens": sum(record.get("tokens", 0) for record in records),
        "results_bytes": len(metrics_csv(records, holds_out=spec.validation.holds_out)),
    }


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


def prepare_rows(inputs: AttemptInputs, check: Callable[[], None]) -> PreparedRows:
    """Render every row and split them; `check()` is asked before each.

    Raises:
        JobFailed: rows too long, none usable, or too few to hold any out.
    """
    training, validation = inputs.job.spec.training, inputs.job.spec.validation
    # The job's own time, not the clock's: every attempt renders the same text.
    with Renderer(inputs.base.path, RenderRules.of(training), inputs.job.created_at) as renderer:
        rows, rendered = _rendered(inputs, inputs.dataset, renderer, check)
        judged = None if inputs.validation is None else _rendered(inputs, inputs.validation, renderer, check)
        chat_template = renderer.chat_template
    findings = [Finding(**finding) for finding in rendered.findings]
    try:
        split = split_rows(len(rows), validation.held_out_fraction, validation.max_rows, training.seed)
        if judged is not None:
            split = replace(split, held_out=sample_rows(len(judged[0]), validation.max_rows, training.seed))
    except ValueError as error:
        raise JobFailed(str(error), reason=FailureReason.INVALID_INPUT, findings=findings) from None
    return PreparedRows(rows, split, judged and judged[0], rendered, judged and judged[1], training, chat_template)


def _rendered(
    inputs: AttemptInputs, dataset: Dataset, renderer: Renderer, check: Callable[[], None]
) -> tuple[RenderedRows, RenderReport]:
    """A dataset's usable rows, and what is wrong with the others. Raises: JobFailed."""
    training, report = inputs.job.spec.training, dataset.report
    path = inputs.artifacts.local_copy(dataset_key(dataset.sha256), inputs.scratch)
    results = _checked(renderer.render(read_examples(path, report.container, report.shape)), check)
    rows, rendered = store_rendered(results, inputs.scratch / f"{dataset.id}.arrow")
    if rendered.too_long_rows and training.too_long == "refuse":
        raise JobFailed(
            f"{rendered.too_long_rows} rows are longer than max_seq_len_tokens = {training.max_seq_len_tokens}; "
            f"the longest has {rendered.longest_tokens} tokens",
            reason=FailureReason.INVALID_INPUT,
            findings=[Finding(**finding) for finding in rendered.findings],
        )
    return rows, rendered


def _checked(results: Iterable[Rendered], check: Callable[[], None]) -> Iterator[Rendered]:
    for result in results:
        check()
        yield result
