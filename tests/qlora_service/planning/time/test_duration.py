"""Estimates against jobs with synthetic durations of known cost."""

from __future__ import annotations

import random
from dataclasses import asdict, replace

import pytest

from qlora_service.data.batching import split_rows, total_steps
from qlora_service.data.rendering.report import RenderReport
from qlora_service.planning.time.duration import (
    Kind,
    Measurement,
    Work,
    estimate,
    estimate_from_probe,
    evaluations_left,
    later_phases,
    linear_cost,
)
from qlora_service.specs import JobSpec

KIND = Kind("nf4", "auto", "lora", "all-linear", "supervised", False, 8, 11)
SETUP_S, PER_ROW_S, LOADING_S, RATE, EVALUATED_RATE = 0.3, 0.0005, 9.0, 800.0, 2500.0
NOISE = 0.05


def work(rows: int = 1000, epochs: int = 3) -> Work:
    return Work(
        rows=rows,
        examples=rows * epochs,
        steps=rows * epochs // 16,
        tokens=rows * epochs * 200,
        evaluations=11,
        held_out_tokens=rows * 10,
        answers=0,
    )


def durations(job: Work, rng: random.Random | None = None) -> dict[str, float]:
    """Seconds of each phase, with random noise if there is a generator."""

    def noisy(seconds: float) -> float:
        return seconds if rng is None else seconds * rng.uniform(1 - NOISE, 1 + NOISE)

    return {
        "starting": noisy(6.0),
        "rendering": noisy(SETUP_S + job.rows * PER_ROW_S),
        "loading": noisy(LOADING_S),
        "training": noisy(job.tokens / RATE),
        "evaluating": noisy(job.evaluations * job.held_out_tokens / EVALUATED_RATE),
        "publishing": noisy(1.0),
        "certifying": noisy(2.0 + job.held_out_tokens / EVALUATED_RATE),
    }


def history(*jobs: Work, kind: Kind = KIND) -> list[Measurement]:
    rng = random.Random(1)
    return [Measurement(kind, job, durations(job, rng)) for job in jobs]


@pytest.mark.parametrize("rows", [100, 2000, 20_000])
def test_estimate_is_within_its_stated_error_of_a_job_ten_times_smaller_or_larger(rows: int) -> None:
    estimated = estimate(work(rows), KIND, history(*(work(known) for known in (200, 500, 1000, 2000))))
    assert estimated is not None
    assert (estimated.basis, estimated.jobs) == ("history", 4)
    actual = sum(durations(work(rows)).values())
    assert estimated.error <= 0.2
    assert abs(estimated.seconds / actual - 1) <= estimated.error
    assert estimated.seconds == pytest.approx(sum(estimated.phases.values()))


def test_stated_error_grows_with_the_variance_of_jobs_of_the_kind() -> None:
    steady = history(*(work(known) for known in (200, 500, 1000, 2000)))
    varying = [
        replace(job, phases={**job.phases, "training": job.phases["training"] * factor})
        for job, factor in zip(steady, (1.0, 1.9, 0.8, 1.6), strict=True)
    ]
    low, high = estimate(work(), KIND, steady), estimate(work(), KIND, varying)
    assert low is not None
    assert high is not None
    assert low.error < 0.2 < 0.4 < high.error


def test_jobs_of_another_kind_are_used_only_without_any_of_the_same_kind() -> None:
    other = replace(KIND, checkpointing=True)
    slower = [
        replace(job, phases={**job.phases, "training": 1.4 * job.phases["training"]})
        for job in history(work(500), work(1000), kind=other)
    ]
    same_kind = history(work(1000))
    similar_only, both = estimate(work(), KIND, slower), estimate(work(), KIND, [*slower, *same_kind])
    assert similar_only is not None
    assert both is not None
    assert similar_only.basis == "similar"
    assert (both.basis, both.jobs) == ("history", 1)
    assert both.phases["training"] == pytest.approx(same_kind[0].phases["training"])
    assert similar_only.error > both.error
    assert estimate(work(), KIND, []) is None


def test_most_similar_kind_has_the_most_fields_in_common() -> None:
    near, far = replace(KIND, row_class=9), replace(KIND, row_class=3, method="ia3", checkpointing=True)
    estimated = estimate(work(), KIND, history(work(), kind=near) + history(work(), work(), kind=far))
    assert estimated is not None
    assert (estimated.basis, estimated.jobs) == ("similar", 1)


def test_probe_gives_the_rates_and_history_the_other_phases() -> None:
    probe = {"tokens_per_second": RATE, "evaluated_tokens_per_second": EVALUATED_RATE, "loading_s": LOADING_S}
    probe_only = estimate_from_probe(work(), probe)
    assert probe_only.phases["training"] == pytest.approx(work().tokens / RATE)
    assert probe_only.phases.keys() == {"training", "evaluating", "loading", "certifying"}
    with_history = estimate_from_probe(work(), probe, history(work(500), kind=replace(KIND, method="ia3")))
    assert with_history.phases.keys() > probe_only.phases.keys()
    assert with_history.basis == probe_only.basis == "probe"
    actual = sum(durations(work()).values())
    assert abs(with_history.seconds / actual - 1) < with_history.error


def test_later_phases_are_those_after_the_training() -> None:
    assert later_phases(work(), history(work())).keys() == {"publishing", "certifying"}
    assert later_phases(work(), []) == {}


def test_linear_cost_separates_fixed_cost_from_cost_per_unit() -> None:
    assert linear_cost([(10, 7.0), (100, 25.0), (1000, 205.0)]) == pytest.approx((5.0, 0.2))
    assert linear_cost([(1, 4.0), (1, 6.0), (1, 30.0)]) == (6.0, 0.0)
    assert linear_cost([(50, 5.0)]) == (0.0, 0.1)
    fixed, per_unit = linear_cost([(10, 1.0), (100, 30.0)])  # a line through both would have a negative fixed cost
    assert fixed == 0.0
    assert per_unit > 0


def test_measurement_is_read_from_this_versions_complete_records_only() -> None:
    stored = {"kind": asdict(KIND), "work": asdict(work()), "phases": durations(work())}
    measurement = Measurement.from_dict(stored)
    assert measurement is not None
    assert (measurement.kind, measurement.work) == (KIND, work())
    assert measurement.seconds == pytest.approx(sum(durations(work()).values()))
    assert Measurement.from_dict({**stored, "kind": {"method": "lora"}}) is None  # another version's format
    assert Measurement.from_dict({**stored, "phases": {"training": 1.0}}) is None  # an incomplete job
    assert Measurement.from_dict({}) is None


def spec(**parts: object) -> JobSpec:
    return JobSpec.model_validate({"base_model": "tiny", **parts})


REPORT = RenderReport(rows=100, usable_rows=90, tokens=9000, longest_tokens=150)


def test_work_counts_rows_and_steps_as_the_training_does() -> None:
    job = spec(training={"epochs": 2.0, "batch_size": 8}, validation={"fraction": 0.1})
    planned = Work.of(job, REPORT, dataset_rows=100)
    split = split_rows(90, 0.1, 256, 0)
    steps = total_steps(len(split.train), 8, 2.0, None)
    assert (planned.steps, planned.examples) == (steps, 2 * len(split.train))
    assert planned.tokens == 2 * len(split.train) * 100
    assert planned.held_out_tokens == len(split.held_out) * 100
    every = steps // 10
    assert planned.evaluations == len({0, steps, *range(every, steps, every)})


def test_work_with_max_steps_and_with_a_partial_report() -> None:
    job = spec(training={"max_steps": 5, "batch_size": 8}, validation={"fraction": 0})
    partial = replace(REPORT, complete=False)
    planned = Work.of(job, partial, dataset_rows=1000)
    assert (planned.rows, planned.steps, planned.examples, planned.tokens) == (1000, 5, 40, 4000)
    assert planned.held_out_tokens == 32 * 100  # training rows in place of held-out rows
    epochs = Work.of(spec(validation={"fraction": 0}), partial, dataset_rows=1000)
    assert epochs.examples == 900


def test_work_with_a_validation_dataset_and_answers() -> None:
    job = spec(validation={"dataset_id": "ds_x"}, evaluation={"generate_rows": 50, "questions": ["Why?"]})
    validation = RenderReport(rows=20, usable_rows=20, tokens=400)
    planned = Work.of(job, REPORT, dataset_rows=100, validation=validation)
    assert (planned.examples, planned.held_out_tokens, planned.answers, planned.rows) == (90, 400, 21, 120)


@pytest.mark.parametrize(("steps", "every"), [(12, 5), (10, 5), (3, 1), (7, 10)])
def test_evaluations_left_equal_those_of_the_loop(steps: int, every: int) -> None:
    due = [step for step in range(1, steps + 1) if step % every == 0 or step == steps]
    for done in range(1, steps + 1):
        assert evaluations_left(done, steps, every) == len([step for step in due if step >= done])


def test_kind_depends_on_what_determines_the_speed_of_a_step() -> None:
    def kind(checkpointing: bool = False, report: RenderReport = REPORT, **parts: object) -> Kind:
        job = spec(**parts)
        return Kind.of(
            job,
            Work.of(job, report, dataset_rows=100),
            micro_batch_tokens=2048,
            checkpointing=checkpointing,
        )

    assert kind() == kind(training={"epochs": 3.0, "learning_rate": 1e-3}, name="other", adapter={"r": 64})
    assert kind().row_class == kind(report=replace(REPORT, tokens=9500)).row_class == 7
    for different in (
        kind(checkpointing=True),
        kind(adapter={"target_modules": ["q_proj"]}),
        kind(adapter={"method": "ia3"}),
        kind(quantization={"type": "none"}),
        kind(report=replace(REPORT, tokens=90_000)),
        kind(training={"batch_size": 1}),
    ):
        assert different != kind()
