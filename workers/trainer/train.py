"""Third stage: run the training loop from the last checkpoint, then generate answers with base and adapter."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from qlora_service.planning.time.duration import Kind, Work, evaluation_interval, later_phases
from qlora_service.planning.time.job_times import parse_history
from qlora_service.training.checkpoint.checkpoints import Checkpoints, expected_bytes
from qlora_service.training.device import device_name
from qlora_service.training.evaluation.generation import evaluate_generation
from qlora_service.training.evaluation.row_losses import RowLosses
from qlora_service.training.loop import AroundStep, LossNotFinite, Outcome, Workload
from qlora_service.training.loop import train as run_loop
from qlora_service.training.objectives import make_objective
from qlora_service.training.sizes import DATABASE_BYTES, KEPT_CHECKPOINTS
from workers.trainer.checkpointing import Checkpointing
from workers.trainer.context import AttemptContext
from workers.trainer.environment import change_note, environment_changes
from workers.trainer.load import LoadedNetwork
from workers.trainer.prepare import PreparedRows, load_tokenizer
from workers.trainer.step_memory import TrackedStep, find_largest_step, predicted_memory


@dataclass(frozen=True)
class TrainingResult:
    """The result of the training."""

    outcome: Outcome
    row_losses: RowLosses
    failure: LossNotFinite | None
    """Why the training ended early; `outcome` is then that of the last finite step"""
    answers: dict[str, Any] | None
    """The content of generation.json; None if the evaluation generates nothing"""


def train(context: AttemptContext, rows: PreparedRows, loaded: LoadedNetwork) -> TrainingResult:
    """Trains the adapter on `loaded.network`; the result of the training.

    Raises:
        Interrupted: the attempt should stop; a checkpoint has the completed steps.
        LossNotFinite: there was no finite step.
        OSError: the disk is full (ENOSPC); the last checkpoint is intact.
    """
    spec, reporter, plan, steps = context.spec, context.reporter, loaded.plan, rows.total_steps
    training = spec.training.model_copy(update={"micro_batch_tokens": plan["micro_batch_tokens"]})
    checkpoints = Checkpoints(context.inputs.checkpoint_dir, context.inputs.token)
    start, metrics = None, b""
    if latest := checkpoints.latest():
        start, metrics, earlier_environment = latest
        plan["changes"] += environment_changes(earlier_environment, loaded.environment, start.step)
    first_step = start.step if start else 0
    control = _make_control(context, rows, loaded, checkpoints, first_step)
    # The base's source is not part of the plan: a job has the same plan with a cold and with a warm base.
    reporter.choose_plan(plan, f"base: {loaded.base_source}")
    if context.inputs.token > 1:
        reporter.resumed(first_step, metrics, [change_note(change) for change in plan["changes"]])
    evaluate_every = spec.evaluation.every_steps or evaluation_interval(steps)
    _report_expectations(context, rows, loaded, evaluate_every)
    row_losses = RowLosses()
    reporter.enter_phase("training", steps)
    failure: LossNotFinite | None = None
    try:
        outcome = run_loop(
            loaded.network,
            make_objective(spec.objective),
            Workload(rows.examples_of_step, rows.held_out, steps, evaluate_every),
            training,
            reporter,
            row_losses,
            start=start,
            control=control,
        )
    except LossNotFinite as error:
        if error.outcome is None:
            raise
        failure, outcome = error, error.outcome
    finally:
        control.flush()
    answers = None if failure is not None else _generate(context, rows, loaded)
    return TrainingResult(outcome, row_losses, failure, answers)


def _make_control(
    context: AttemptContext, rows: PreparedRows, loaded: LoadedNetwork, checkpoints: Checkpoints, first_step: int
) -> Checkpointing:
    """The loop's control, with disk space reserved for its checkpoints and for publishing. Raises: OSError (ENOSPC)."""
    training, steps = context.spec.training, rows.total_steps
    size = expected_bytes(loaded.network, training, rows=len(rows.split.train), total_steps=steps)
    # Space for the kept checkpoints, one being written, one more to publish, and the database.
    bytes_at_end = size + DATABASE_BYTES
    context.reserve.reserve(max(0, (KEPT_CHECKPOINTS + 1) * size - checkpoints.bytes_on_disk()) + bytes_at_end)
    around_step = _memory_tracking(context, rows, loaded, range(first_step, steps))
    return Checkpointing(context, checkpoints, loaded, around_step, checkpoint_bytes=size, bytes_at_end=bytes_at_end)


def _report_expectations(
    context: AttemptContext, rows: PreparedRows, loaded: LoadedNetwork, evaluate_every: int
) -> None:
    """Reports the predicted memory and time under the final plan, to be compared with the measurements."""
    inputs, spec, plan = context.inputs, context.spec, loaded.plan
    device = device_name(loaded.network.device)
    work = Work.of(spec, rows.report, dataset_rows=inputs.dataset.report.usable_rows, validation=rows.validation_report)
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
        longest_tokens=rows.longest_tokens,
        cuda=loaded.network.device.type == "cuda",
        cache_dir=inputs.plan_cache,
    )
    context.reporter.note(device=device, kind=asdict(kind), work=asdict(work), predicted=predicted)
    context.reporter.expect(rows.total_steps, evaluate_every, later_phases(work, parse_history(inputs.history, device)))


def _memory_tracking(context: AttemptContext, rows: PreparedRows, loaded: LoadedNetwork, steps: range) -> AroundStep:
    """On a CPU, a tracker of the tensors of the largest step; none on CUDA, whose allocator records the peak."""
    network = loaded.network
    if network.device.type == "cuda" or not steps:
        return lambda *_: nullcontext()
    step = find_largest_step(rows.rows.tokens(), rows.rows_of_step, loaded.plan["micro_batch_tokens"], steps)
    return TrackedStep(network, step, lambda memory: context.reporter.note(memory=memory))


def _generate(context: AttemptContext, rows: PreparedRows, loaded: LoadedNetwork) -> dict[str, Any] | None:
    """The answers of base and adapter, side by side; None if the evaluation generates nothing."""
    evaluation = context.spec.evaluation
    if not (evaluation.generate_rows or evaluation.questions):
        return None
    context.reporter.enter_phase("generating", rows.total_steps)
    tokenizer = load_tokenizer(context.inputs.base.path, rows.question_template)
    stop_ids = rows.stop_tokens.ids
    return evaluate_generation(loaded.network, tokenizer, rows.held_out, evaluation, stop_ids, on_answer=context.check)
