"""Duration of a job, estimated from earlier jobs on the same base and device. Pure arithmetic.

A job's duration is the sum of its phases. Each phase has a fixed cost and a cost per unit of its work (rows to render,
tokens to train on, …); both are fitted to measured jobs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from qlora_service.data.batching import total_steps
from qlora_service.data.rendering.report import RenderReport
from qlora_service.specs import JobSpec

KIND_PHASES = ("evaluating", "training")
"""Phases whose cost depends on the kind of job; the cost of the others depends on base and device alone"""
PRIOR_ERROR: dict[str, float] = {"history": 0.3, "similar": 0.6, "probe": 0.4}
"""Stated error of an estimate from too few jobs to measure it"""
MIN_JOBS_FOR_ERROR = 3
"""With this many jobs of a kind, each is estimated from the others, and the worst error is stated"""
MIN_ERROR = 0.1
"""Lower bound of the stated error: another process on the machine can slow a job down by this share at any time"""
EVALUATIONS = 10
"""Held-out evaluations per job, unless the spec sets an interval"""
FALLBACK_TRAINING_ROWS = 32
"""Training rows for the held-out loss when no rows are held out"""

Basis = Literal["history", "similar", "probe"]


@dataclass(frozen=True)
class Kind:
    """The properties of a job that determine the speed of a step, on one base and device."""

    quantization: str
    compute_dtype: str
    """As in the spec; "auto" is always the same dtype on one device"""
    method: str
    targets: str
    objective: str
    checkpointing: bool
    row_class: int
    """Mean tokens of an example, as the exponent of the next power of two"""
    pass_class: int
    """Tokens of a full forward pass, as the exponent of the next power of two"""

    @classmethod
    def of(cls, spec: JobSpec, work: Work, *, micro_batch_tokens: int, checkpointing: bool) -> Self:
        adapter = spec.adapter.model_dump(mode="json")
        mean_tokens = max(1, round(work.tokens / max(1, work.examples)))
        return cls(
            quantization=spec.quantization.type,
            compute_dtype=spec.quantization.compute_dtype,
            method=spec.adapter.method,
            targets=str(adapter.get("target_modules")),
            objective=spec.objective.type,
            checkpointing=checkpointing,
            row_class=(mean_tokens - 1).bit_length(),
            pass_class=(min(micro_batch_tokens, mean_tokens * spec.training.batch_size) - 1).bit_length(),
        )


@dataclass(frozen=True)
class Work:
    """The amount of work of a job, in units of its phases."""

    rows: int
    """Rows to render"""
    examples: int
    """Over all steps"""
    steps: int
    tokens: int
    """Over all steps; of a pair, both sides"""
    evaluations: int
    held_out_tokens: int
    """Per evaluation"""
    answers: int
    """Answers generated at the end, each by the base and by the adapter"""

    @classmethod
    def of(
        cls, spec: JobSpec, report: RenderReport, *, dataset_rows: int, validation: RenderReport | None = None
    ) -> Self:
        """`report` covers the dataset's `dataset_rows` usable rows, or the first of them.

        `validation` covers a separate dataset of held-out rows.
        """
        usable_share = report.usable_rows / max(1, report.rows)
        usable = report.usable_rows if report.complete else round(dataset_rows * usable_share)
        mean_tokens = report.tokens / max(1, report.usable_rows)
        held_out, held_out_mean_tokens, train = _split(spec, usable, mean_tokens, validation)
        training, evaluation = spec.training, spec.evaluation
        steps = total_steps(train, training.batch_size, training.epochs, training.max_steps)
        is_limited = training.max_steps is not None
        examples = steps * training.batch_size if is_limited else max(1, round(train * training.epochs))
        every = evaluation.every_steps or evaluation_interval(steps)
        return cls(
            rows=dataset_rows + (0 if validation is None else validation.rows),
            examples=examples,
            steps=steps,
            tokens=round(examples * mean_tokens),
            evaluations=1 + evaluations_left(1, steps, every),
            held_out_tokens=round(held_out * held_out_mean_tokens),
            answers=min(evaluation.generate_rows, held_out) + len(evaluation.questions),
        )

    def units(self, phase: str) -> int:
        """The units of work of the phase; 1 for a phase with a fixed cost only."""
        return {
            "rendering": self.rows,
            "training": self.tokens,
            "evaluating": self.evaluations * self.held_out_tokens,
            "generating": self.answers,
            "certifying": self.held_out_tokens,
        }.get(phase, 1)


@dataclass(frozen=True)
class Measurement:
    """The measured phases of a finished job."""

    kind: Kind
    work: Work
    phases: Mapping[str, float]
    """Seconds"""

    @classmethod
    def from_dict(cls, measured: Mapping[str, Any]) -> Self | None:
        """The measurement in a job's `measured`; None for another version's format or for an incomplete job."""
        try:
            kind, work = Kind(**measured["kind"]), Work(**measured["work"])
            phases = {name: float(seconds) for name, seconds in measured["phases"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            return None
        return cls(kind, work, phases) if {"training", "certifying"} <= phases.keys() else None

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())


@dataclass(frozen=True)
class Estimate:
    """The estimated duration of a job."""

    seconds: float
    error: float
    """Expected deviation, as a share of `seconds`"""
    basis: Basis
    """history: jobs of the same kind; similar: other jobs on the same base and device; probe: a timed step"""
    jobs: int
    """Jobs that the estimate is based on"""
    steps: int
    tokens: int
    phases: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        phases = {name: round(seconds, 2) for name, seconds in self.phases.items()}
        return asdict(self) | {"seconds": round(self.seconds, 1), "error": round(self.error, 3), "phases": phases}


def evaluation_interval(steps: int) -> int:
    """Steps between two held-out evaluations, unless the spec sets an interval."""
    return max(1, steps // EVALUATIONS)


def evaluations_left(step: int, steps: int, every: int) -> int:
    """Evaluations that remain when `step` steps are done, including one that is due at this step."""
    return steps // every - (step - 1) // every + (1 if steps % every else 0)


def estimate(work: Work, kind: Kind, history: Sequence[Measurement]) -> Estimate | None:
    """The duration of a job of this kind, from jobs on its base and device; None without any."""
    same_kind = [measurement for measurement in history if measurement.kind == kind]
    closest = same_kind or _most_similar(kind, history)
    if not closest:
        return None
    phases = _phases(work, closest, history)
    basis: Basis = "history" if same_kind else "similar"
    error = PRIOR_ERROR[basis] if len(same_kind) < MIN_JOBS_FOR_ERROR else _worst_error(same_kind, history)
    return Estimate(
        seconds=sum(phases.values()),
        error=error,
        basis=basis,
        jobs=len(closest),
        steps=work.steps,
        tokens=work.tokens,
        phases=phases,
    )


def estimate_from_probe(work: Work, probe: Mapping[str, Any], history: Sequence[Measurement] = ()) -> Estimate:
    """The duration of a job whose largest micro-batch was timed; `probe` is the result of `workers.probe`.

    Phases that the probe did not run are estimated from jobs on the same base, if there are any.
    """
    evaluation_s = work.held_out_tokens / probe["evaluated_tokens_per_second"]
    phases = _phases(work, [], history) | {
        "training": work.tokens / probe["tokens_per_second"],
        "evaluating": work.evaluations * evaluation_s,
    }
    for phase, seconds in (("loading", probe["loading_s"]), ("certifying", evaluation_s)):
        phases.setdefault(phase, seconds)
    return Estimate(
        seconds=sum(phases.values()),
        error=PRIOR_ERROR["probe"],
        basis="probe",
        jobs=len(history),
        steps=work.steps,
        tokens=work.tokens,
        phases=phases,
    )


def later_phases(work: Work, history: Sequence[Measurement]) -> dict[str, float]:
    """Seconds of each phase after the training that jobs on the same base and device have measured."""
    names = ("generating", "publishing", "certifying") if work.answers else ("publishing", "certifying")
    phases = _phases(work, [], history)
    return {name: phases[name] for name in names if name in phases}


def linear_cost(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(fixed seconds, seconds per unit) of jobs with (units, seconds), by least squares of the relative error.

    With equal units in all jobs, fixed cost and cost per unit cannot be separated: the cost is all per unit, or all
    fixed if every job has one unit.
    """
    units = {x for x, _ in points}
    if len(units) == 1:
        (x,) = units
        seconds = statistics.median(y for _, y in points)
        return (seconds, 0.0) if x == 1 else (0.0, seconds / x)
    weights = [1 / (y * y) for _, y in points]
    total = math.fsum(weights)
    mean_x = math.fsum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = math.fsum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    variance = math.fsum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    covariance = math.fsum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True))
    per_unit = max(0.0, covariance / variance)
    fixed = mean_y - per_unit * mean_x
    if fixed >= 0:
        return fixed, per_unit
    # A negative fixed cost is impossible: fit a line through the origin instead.
    squares = math.fsum(w * x * x for w, (x, _) in zip(weights, points, strict=True))
    return 0.0, math.fsum(w * x * y for w, (x, y) in zip(weights, points, strict=True)) / squares


def _split(spec: JobSpec, usable: int, mean_tokens: float, validation: RenderReport | None) -> tuple[int, float, int]:
    """(held-out rows, their mean tokens, training rows), as `data.batching` will split the rows."""
    limit = spec.validation.max_rows
    if validation is not None:
        validation_mean_tokens = validation.tokens / max(1, validation.usable_rows)
        return min(validation.usable_rows, limit), validation_mean_tokens, max(1, usable)
    fraction = spec.validation.held_out_fraction
    held_out = min(limit, max(1, round(usable * fraction)), max(0, usable - 1)) if fraction > 0 else 0
    return held_out or min(usable, FALLBACK_TRAINING_ROWS), mean_tokens, max(1, usable - held_out)


def _most_similar(kind: Kind, history: Sequence[Measurement]) -> list[Measurement]:
    """The jobs with the most fields in common with the kind."""

    def common_fields(measurement: Measurement) -> int:
        return sum(value == getattr(kind, name) for name, value in vars(measurement.kind).items())

    most = max(map(common_fields, history), default=0)
    return [measurement for measurement in history if common_fields(measurement) == most]


def _phases(work: Work, closest: Sequence[Measurement], history: Sequence[Measurement]) -> dict[str, float]:
    """Seconds of each phase with measurements and work: KIND_PHASES from `closest`, the others from `history`."""
    phases = {}
    for name in dict.fromkeys(phase for measurement in history for phase in measurement.phases):
        jobs = closest if name in KIND_PHASES else history
        points = [(job.work.units(name), job.phases.get(name, 0.0)) for job in jobs]
        points = [(units, seconds) for units, seconds in points if units and seconds > 0]
        if points and (units := work.units(name)):
            fixed, per_unit = linear_cost(points)
            phases[name] = fixed + per_unit * units
    return phases


def _worst_error(same_kind: Sequence[Measurement], history: Sequence[Measurement]) -> float:
    """The largest error of estimating one of these jobs from the others."""
    errors = [MIN_ERROR]
    for job in same_kind:
        others = [other for other in same_kind if other is not job]
        expected = sum(_phases(job.work, others, [other for other in history if other is not job]).values())
        errors.append(abs(expected / job.seconds - 1))
    return max(errors)
