"""Estimates against jobs whose times are made up by a known law."""

from __future__ import annotations

import random
from dataclasses import asdict, replace

import pytest

from qlora_service.data.batching import split_rows, total_steps
from qlora_service.data.rendering.renderer import RenderReport
from qlora_service.planning.time.duration import (
    Kind,
    Measurement,
    Work,
    cost,
    estimate,
    estimate_from_probe,
    evaluations_left,
    later_phases,
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


def really(job: Work, chance: random.Random | None = None) -> dict[str, float]:
    """Seconds of each phase, with a machine's own unrest where there is any."""

    def about(seconds: float) -> float:
        return seconds if chance is None else seconds * chance.uniform(1 - NOISE, 1 + NOISE)

    return {
        "starting": about(6.0),
        "rendering": about(SETUP_S + job.rows * PER_ROW_S),
        "loading": about(LOADING_S),
        "training": about(job.tokens / RATE),
        "evaluating": about(job.evaluations * job.held_out_tokens / EVALUATED_RATE),
        "publishing": about(1.0),
        "certifying": about(2.0 + job.held_out_tokens / EVALUATED_RATE),
    }


def history(*jobs: Work, kind: Kind = KIND) -> list[Measurement]:
    chance = random.Random(1)
    return [Measurement(kind, job, really(job, chance)) for job in jobs]


@pytest.mark.parametrize("rows", [100, 2000, 20_000])
def test_estimate_is_within_its_stated_error_of_a_job_ten_times_smaller_or_larger(rows: int) -> None:
    found = estimate(work(rows), KIND, history(*(work(known) for known in (200, 500, 1000, 2000))))
    assert found is not None
    assert (found.basis, found.jobs) == ("history", 4)
    actual = sum(really(work(rows)).values())
    assert found.error <= 0.2
    assert abs(found.seconds / actual - 1) <= found.error
    assert found.seconds == pytest.approx(sum(found.phases.values()))


def test_stated_error_grows_with_what_jobs_of_the_kind_differ_by() -> None:
    steady = history(*(work(known) for known in (200, 500, 1000, 2000)))
    restless = [
        replace(job, phases={**job.phases, "training": job.phases["training"] * factor})
        for job, factor in zip(steady, (1.0, 1.9, 0.8, 1.6), strict=True)
    ]
    calm, unsure = estimate(work(), KIND, steady), estimate(work(), KIND, restless)
    assert calm is not None
    assert unsure is not None
    assert calm.error < 0.2 < 0.4 < unsure.error


def test_jobs_of_another_kind_are_used_only_when_there_is_none_of_it_and_marked() -> None:
    other = replace(KIND, checkpointing=True)
    slower = [
        replace(job, phases={**job.phases, "training": 1.4 * job.phases["training"]})
        for job in history(work(500), work(1000), kind=other)
    ]
    own = history(work(1000))
    alone, both = estimate(work(), KIND, slower), estimate(work(), KIND, [*slower, *own])
    assert alone is not None
    assert both is not None
    assert alone.basis == "similar"
    assert (both.basis, both.jobs) == ("history", 1)
    assert both.phases["training"] == pytest.approx(own[0].phases["training"])
    assert alone.error > both.error
    assert estimate(work(), KIND, []) is None


def test_the_nearest_kind_is_the_one_that_shares_most() -> None:
    near, far = replace(KIND, row_class=9), replace(KIND, row_class=3, method="ia3", checkpointing=True)
    found = estimate(work(), KIND, history(work(), kind=near) + history(work(), work(), kind=far))
    assert found is not None
    assert (found.basis, found.jobs) == ("similar", 1)


def test_probe_gives_the_rate_and_history_of_the_base_the_rest() -> None:
    probe = {"tokens_per_second": RATE, "evaluated_tokens_per_second": EVALUATED_RATE, "loading_s": LOADING_S}
    alone = estimate_from_probe(work(), probe)
    assert alone.phases["training"] == pytest.approx(work().tokens / RATE)
    assert alone.phases.keys() == {"training", "evaluating", "loading", "certifying"}
    beside = estimate_from_probe(work(), probe, history(work(500), kind=replace(KIND, method="ia3")))
    assert beside.phases.keys() > alone.phases.keys()
    assert beside.basis == alone.basis == "probe"
    actual = sum(really(work()).values())
    assert abs(beside.seconds / actual - 1) < beside.error


def test_only_phases_behind_the_training_are_told_as_later_ones() -> None:
    assert later_phases(work(), history(work())).keys() == {"publishing", "certifying"}
    assert later_phases(work(), []) == {}


def test_cost_separates_what_is_spent_once_from_what_each_unit_takes() -> None:
    assert cost([(10, 7.0), (100, 25.0), (1000, 205.0)]) == pytest.approx((5.0, 0.2))
    assert cost([(1, 4.0), (1, 6.0), (1, 30.0)]) == (6.0, 0.0)
    assert cost([(50, 5.0)]) == (0.0, 0.1)
    once, each = cost([(10, 1.0), (100, 30.0)])  # a line through both would start below nothing
    assert once == 0.0
    assert each > 0


def test_measurement_reads_what_was_recorded_and_nothing_else() -> None:
    stored = {"kind": asdict(KIND), "work": asdict(work()), "phases": really(work())}
    found = Measurement.from_dict(stored)
    assert found is not None
    assert (found.kind, found.work) == (KIND, work())
    assert found.seconds == pytest.approx(sum(really(work()).values()))
    assert Measurement.from_dict({**stored, "kind": {"method": "lora"}}) is None  # another version's
    assert Measurement.from_dict({**stored, "phases": {"training": 1.0}}) is None  # it never got to the end
    assert Measurement.from_dict({}) is None


def spec(**parts: object) -> JobSpec:
    return JobSpec.model_validate({"base_model": "tiny", **parts})


REPORT = RenderReport(rows=100, usable_rows=90, tokens=9000, longest_tokens=150)


def test_work_counts_what_splitting_and_stepping_will_make() -> None:
    asked = spec(training={"epochs": 2.0, "batch_size": 8}, validation={"fraction": 0.1})
    found = Work.of(asked, REPORT, dataset_rows=100)
    split = split_rows(90, 0.1, 256, 0)
    steps = total_steps(len(split.train), 8, 2.0, None)
    assert (found.steps, found.examples) == (steps, 2 * len(split.train))
    assert found.tokens == 2 * len(split.train) * 100
    assert found.held_out_tokens == len(split.held_out) * 100
    every = steps // 10
    assert found.evaluations == len({0, steps, *range(every, steps, every)})


def test_work_of_steps_and_of_rows_that_were_not_all_rendered() -> None:
    asked = spec(training={"max_steps": 5, "batch_size": 8}, validation={"fraction": 0})
    partly = replace(REPORT, complete=False)
    found = Work.of(asked, partly, dataset_rows=1000)
    assert (found.rows, found.steps, found.examples, found.tokens) == (1000, 5, 40, 4000)
    assert found.held_out_tokens == 32 * 100  # training rows stand in
    epochs = Work.of(spec(validation={"fraction": 0}), partly, dataset_rows=1000)
    assert epochs.examples == 900


def test_work_with_held_out_rows_of_their_own_and_answers() -> None:
    asked = spec(validation={"dataset_id": "ds_x"}, evaluation={"generate_rows": 50, "questions": ["Why?"]})
    judged = RenderReport(rows=20, usable_rows=20, tokens=400)
    found = Work.of(asked, REPORT, dataset_rows=100, validation=judged)
    assert (found.examples, found.held_out_tokens, found.answers, found.rows) == (90, 400, 21, 120)


@pytest.mark.parametrize(("steps", "every"), [(12, 5), (10, 5), (3, 1), (7, 10)])
def test_evaluations_left_are_those_that_the_loop_still_makes(steps: int, every: int) -> None:
    due = [step for step in range(1, steps + 1) if step % every == 0 or step == steps]
    for done in range(1, steps + 1):
        assert evaluations_left(done, steps, every) == len([step for step in due if step >= done])


def test_kind_tells_jobs_apart_by_what_slows_a_step() -> None:
    def kind(checkpointing: bool = False, report: RenderReport = REPORT, **parts: object) -> Kind:
        asked = spec(**parts)
        return Kind.of(
            asked,
            Work.of(asked, report, dataset_rows=100),
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
