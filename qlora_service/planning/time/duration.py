"""How long a job takes, from what earlier jobs on the same base and device took. Pure arithmetic.

A job's time is that of its phases. Each costs something once and something for each unit of its work (rows to render,
tokens to train on, …); both are fitted to the jobs that were measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from qlora_service.data.batching import total_steps
from qlora_service.data.rendering.renderer import RenderReport
from qlora_service.specs import JobSpec

TRAINED_PHASES = ("evaluating", "training")
"""What these cost depends on the kind of job, what the others cost on base and device alone"""
PRIOR_ERROR: dict[str, float] = {"history": 0.3, "similar": 0.6, "probe": 0.4}
"""Of an estimate that too few jobs stand behind to judge it by them"""
JUDGED_JOBS = 3
"""With so many of a kind each is estimated from the others, and the worst of those errors is the one stated"""
LEAST_ERROR = 0.1
"""Another process on the machine costs as much at any time"""
EVALUATIONS = 10
"""Held-out evaluations over a job, where the spec names no interval"""
JUDGED_TRAINING_ROWS = 32
"""Rows the loss is measured on when none are held out"""

Basis = Literal["history", "similar", "probe"]


@dataclass(frozen=True)
class Kind:
    """What the speed of a step depends on, beside base and device."""

    quantization: str
    compute_dtype: str
    """As asked: on one device "auto" is always the same"""
    method: str
    targets: str
    objective: str
    checkpointing: bool
    row_class: int
    """Mean tokens of an example, as the power of two above"""
    pass_class: int
    """Tokens of a full forward pass, likewise"""

    @classmethod
    def of(cls, spec: JobSpec, work: Work, *, micro_batch_tokens: int, checkpointing: bool) -> Self:
        adapter = spec.adapter.model_dump(mode="json")
        row = max(1, round(work.tokens / max(1, work.examples)))
        return cls(
            quantization=spec.quantization.type,
            compute_dtype=spec.quantization.compute_dtype,
            method=spec.adapter.method,
            targets=str(adapter.get("target_modules")),
            objective=spec.objective.type,
            checkpointing=checkpointing,
            row_class=(row - 1).bit_length(),
            pass_class=(min(micro_batch_tokens, row * spec.training.batch_size) - 1).bit_length(),
        )


@dataclass(frozen=True)
class Work:
    """What a job has to do, in units of its phases."""

    rows: int
    """To be rendered"""
    examples: int
    """Over all steps"""
    steps: int
    tokens: int
    """Over all steps; of a pair, both sides"""
    evaluations: int
    held_out_tokens: int
    """Of one evaluation"""
    answers: int
    """That base and adapter generate at the end"""

    @classmethod
    def of(
        cls, spec: JobSpec, report: RenderReport, *, dataset_rows: int, validation: RenderReport | None = None
    ) -> Self:
        """`report` is of the dataset's `dataset_rows` usable rows, or of the first of them; `validation` is of a
        dataset of held-out rows.
        """
        share = report.usable_rows / max(1, report.rows)
        usable = report.usable_rows if report.complete else round(dataset_rows * share)
        mean = report.tokens / max(1, report.usable_rows)
        judged, judged_mean, train = _judged(spec, usable, mean, validation)
        training, evaluation = spec.training, spec.evaluation
        steps = total_steps(train, training.batch_size, training.epochs, training.max_steps)
        counted = training.max_steps is not None
        examples = steps * training.batch_size if counted else max(1, round(train * training.epochs))
        every = evaluation.every_steps or evaluation_interval(steps)
        return cls(
            rows=dataset_rows + (0 if validation is None else validation.rows),
            examples=examples,
            steps=steps,
            tokens=round(examples * mean),
            evaluations=1 + evaluations_left(1, steps, every),
            held_out_tokens=round(judged * judged_mean),
            answers=min(evaluation.generate_rows, judged) + len(evaluation.questions),
        )

    def units(self, phase: str) -> int:
        """How much of the phase's work there is."""
        return {
            "rendering": self.rows,
            "training": self.tokens,
            "evaluating": self.evaluations * self.held_out_tokens,
            "generating": self.answers,
            "certifying": self.held_out_tokens,
        }.get(phase, 1)


def evaluation_interval(steps: int) -> int:
    """Steps from one held-out evaluation to the next, where the spec says nothing."""
    return max(1, steps // EVALUATIONS)


def evaluations_left(step: int, steps: int, every: int) -> int:
    """Evaluations that are still to come when `step` steps are done, and none was made since."""
    return steps // every - (step - 1) // every + (1 if steps % every else 0)


def _judged(spec: JobSpec, usable: int, mean: float, validation: RenderReport | None) -> tuple[int, float, int]:
    """Rows that are judged, their mean tokens, and rows that are trained on: as `data.batching` will split them."""
    limit = spec.validation.max_rows
    if validation is not None:
        return min(validation.usable_rows, limit), validation.tokens / max(1, validation.usable_rows), max(1, usable)
    fraction = spec.validation.held_out_fraction
    held = min(limit, max(1, round(usable * fraction)), max(0, usable - 1)) if fraction > 0 else 0
    return held or min(usable, JUDGED_TRAINING_ROWS), mean, max(1, usable - held)


@dataclass(frozen=True)
class Measurement:
    """What a job on the same base and device took."""

    kind: Kind
    work: Work
    phases: Mapping[str, float]
    """Seconds"""

    @classmethod
    def from_dict(cls, measured: Mapping[str, Any]) -> Self | None:
        """Of a job's `measured`; None when another version wrote it, or it does not have the whole job."""
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
    """How long a job will take."""

    seconds: float
    error: float
    """It may be off by this share of itself"""
    basis: Basis
    """history: jobs of its kind; similar: other jobs on its base, on the same device; probe: a step that was timed"""
    jobs: int
    """That it is made from"""
    steps: int
    tokens: int
    phases: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        phases = {name: round(seconds, 2) for name, seconds in self.phases.items()}
        return asdict(self) | {"seconds": round(self.seconds, 1), "error": round(self.error, 3), "phases": phases}


def estimate(work: Work, kind: Kind, history: Sequence[Measurement]) -> Estimate | None:
    """The time of a job of this kind, from jobs on its base and device; None without any."""
    alike = [measurement for measurement in history if measurement.kind == kind]
    of_steps = alike or _nearest(kind, history)
    if not of_steps:
        return None
    phases = _phases(work, of_steps, history)
    basis: Basis = "history" if alike else "similar"
    error = PRIOR_ERROR[basis] if len(alike) < JUDGED_JOBS else _worst_error(alike, history)
    return Estimate(
        seconds=sum(phases.values()),
        error=error,
        basis=basis,
        jobs=len(of_steps),
        steps=work.steps,
        tokens=work.tokens,
        phases=phases,
    )


def estimate_from_probe(work: Work, probe: Mapping[str, Any], history: Sequence[Measurement] = ()) -> Estimate:
    """The time of a job whose longest pack was timed: `probe` is `workers.probe`'s result.

    What the probe did not do is taken from jobs on the same base where there are any.
    """
    evaluated = work.held_out_tokens / probe["evaluated_tokens_per_second"]
    phases = _phases(work, [], history) | {
        "training": work.tokens / probe["tokens_per_second"],
        "evaluating": work.evaluations * evaluated,
    }
    for phase, seconds in (("loading", probe["loading_s"]), ("certifying", evaluated)):
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
    """Seconds of what comes after the training, as far as jobs on the same base and device tell."""
    wanted = ("generating", "publishing", "certifying") if work.answers else ("publishing", "certifying")
    phases = _phases(work, [], history)
    return {phase: phases[phase] for phase in wanted if phase in phases}


def _nearest(kind: Kind, history: Sequence[Measurement]) -> list[Measurement]:
    """The jobs that share most of the kind's fields."""

    def shared(measurement: Measurement) -> int:
        return sum(value == getattr(kind, name) for name, value in vars(measurement.kind).items())

    most = max(map(shared, history), default=0)
    return [measurement for measurement in history if shared(measurement) == most]


def _phases(work: Work, of_steps: Sequence[Measurement], history: Sequence[Measurement]) -> dict[str, float]:
    """Seconds of each phase that was measured, and has work to do."""
    phases = {}
    for name in dict.fromkeys(phase for measurement in history for phase in measurement.phases):
        jobs = of_steps if name in TRAINED_PHASES else history
        points = [(job.work.units(name), job.phases.get(name, 0.0)) for job in jobs]
        points = [(units, seconds) for units, seconds in points if units and seconds > 0]
        if points and (units := work.units(name)):
            once, each = cost(points)
            phases[name] = once + each * units
    return phases


def cost(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(seconds once, seconds for each unit) that fit jobs of (units, seconds) best, relative to their seconds.

    Where all have the same units, nothing tells the two apart: then it is all in the units, or of one unit, in none.
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
    spread = math.fsum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    both = math.fsum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True))
    each = max(0.0, both / spread)
    once = mean_y - each * mean_x
    if once >= 0:
        return once, each
    # Less than nothing cannot be: a line through the origin.
    squares = math.fsum(w * x * x for w, (x, _) in zip(weights, points, strict=True))
    return 0.0, math.fsum(w * x * y for w, (x, y) in zip(weights, points, strict=True)) / squares


def _worst_error(alike: Sequence[Measurement], history: Sequence[Measurement]) -> float:
    """How far off the estimate of any of these jobs is that is made from the others."""
    errors = [LEAST_ERROR]
    for job in alike:
        others = [other for other in alike if other is not job]
        expected = sum(_phases(job.work, others, [other for other in history if other is not job]).values())
        errors.append(abs(expected / job.seconds - 1))
    return max(errors)
