"""The record of an attempt, on a clock that the test moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from workers.trainer.measurements import AttemptMeasurements

WORK = {"rows": 50, "examples": 80, "steps": 20, "tokens": 4000, "evaluations": 3, "held_out_tokens": 90, "answers": 2}
STEP_S, EVALUATION_S, TOKENS = 2.0, 5.0, 200


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Attempt:
    """An attempt whose phases take given times."""

    def __init__(
        self, attempt: int = 1, forecast: Mapping[str, Any] | None = None, earlier: Mapping[str, Any] | None = None
    ) -> None:
        self.clock = Clock()
        self.measurements = AttemptMeasurements(attempt, forecast, earlier, self.clock.now, self.clock)
        self.etas: dict[int, float] = {}

    def phase(self, name: str, seconds: float) -> None:
        self.measurements.enter_phase(name)
        self.clock.now += seconds

    def prepare(self, later: Mapping[str, float], steps: int = 20, every: int = 10) -> None:
        self.clock.now += 1
        self.phase("rendering", 2)
        self.phase("loading", 3)
        self.measurements.note(device="a CPU", kind={"method": "lora"}, work=WORK)
        self.measurements.expect(steps, every, later)
        self.measurements.enter_phase("training")

    def train(self, first: int = 1, last: int = 20, every: int = 10) -> None:
        if first == 1:
            self.evaluate()
        for step in range(first, last + 1):
            self.clock.now += STEP_S
            self.etas[step] = self.measurements.on_step(step, TOKENS)
            if step % every == 0:
                self.evaluate()

    def evaluate(self) -> None:
        self.clock.now += EVALUATION_S
        self.measurements.on_evaluation()

    def conclude(self) -> dict[str, Any]:
        self.phase("generating", 11)
        self.phase("publishing", 1)
        self.phase("certifying", 6)
        return self.measurements.finish()


LATER = {"generating": 11.0, "publishing": 1.0, "certifying": 6.0}


def test_eta_includes_the_remaining_evaluations_and_phases() -> None:
    attempt = Attempt()
    attempt.prepare(LATER)
    attempt.train()
    later = sum(LATER.values())
    assert attempt.etas[1] == pytest.approx(19 * STEP_S + 2 * EVALUATION_S + later)
    assert attempt.etas[10] == pytest.approx(10 * STEP_S + 2 * EVALUATION_S + later)
    assert attempt.etas[11] == pytest.approx(9 * STEP_S + EVALUATION_S + later)
    assert attempt.etas[20] == pytest.approx(EVALUATION_S + later)
    attempt.phase("generating", 11)
    assert attempt.measurements.later_s == 7
    attempt.phase("publishing", 1)
    assert attempt.measurements.later_s == 6


def test_without_a_history_the_certificate_counts_as_an_evaluation() -> None:
    attempt = Attempt()
    attempt.prepare({})
    attempt.train()
    assert attempt.etas[20] == pytest.approx(2 * EVALUATION_S)


def test_eta_follows_the_last_twenty_steps() -> None:
    attempt = Attempt()
    attempt.prepare({}, steps=1000, every=1000)
    attempt.train(last=20, every=1000)
    eta_before = attempt.etas[20]
    for step in range(21, 41):
        attempt.clock.now += STEP_S / 2
        attempt.etas[step] = attempt.measurements.on_step(step, TOKENS)
    assert eta_before == pytest.approx(980 * STEP_S + 2 * EVALUATION_S)
    assert attempt.etas[40] == pytest.approx(960 * STEP_S / 2 + 2 * EVALUATION_S)


def test_each_recorded_eta_is_compared_with_the_observed_time() -> None:
    attempt = Attempt(forecast={"time": {"seconds": 80.0}})
    attempt.prepare({"publishing": 1.0})  # without a history of generating and certifying
    attempt.train()
    record = attempt.conclude()
    first, tenth, half = record["promises"]
    assert [check["step"] for check in record["promises"]] == [1, 2, 10]
    assert first["took_s"] == 19 * STEP_S + 2 * EVALUATION_S + 18
    assert first["promised_s"] == 19 * STEP_S + 3 * EVALUATION_S + 1
    assert first["error"] == pytest.approx(54 / 66 - 1, abs=1e-3)
    assert tenth == {"step": 2, "promised_s": 52, "took_s": 64, "error": pytest.approx(52 / 64 - 1, abs=1e-3)}
    assert half == {"step": 10, "promised_s": 36, "took_s": 48, "error": -0.25}
    assert record["actual"]["eta"] == {"seconds": first["took_s"]}
    assert record["predicted"]["eta"] == {"seconds": first["promised_s"]}
    assert record["predicted"]["time"] == {"seconds": 80.0}
    assert record["actual"]["time"] == {"seconds": 6 + 3 * EVALUATION_S + 20 * STEP_S + 18}


def test_seconds_are_per_phase_and_tokens_per_second_of_training() -> None:
    attempt = Attempt()
    attempt.prepare(LATER)
    attempt.train()
    record = attempt.conclude()
    assert record["phases"] == {
        "starting": 1, "rendering": 2, "loading": 3, "evaluating": 3 * EVALUATION_S, "training": 20 * STEP_S,
        "generating": 11, "publishing": 1, "certifying": 6,
    }  # fmt: skip
    assert (record["steps"], record["tokens"], record["tokens_per_second"]) == (20, 20 * TOKENS, TOKENS / STEP_S)
    assert (record["device"], record["attempt"]) == ("a CPU", 1)


def test_work_is_the_completed_work_not_the_planned_work() -> None:
    attempt = Attempt()
    attempt.prepare(LATER)
    attempt.train(last=10)  # stopped early
    done = {"steps": 10, "tokens": 10 * TOKENS, "evaluations": 2}
    assert attempt.conclude()["work"] == WORK | done


def test_later_attempt_keeps_the_larger_memory_and_has_no_time_of_the_whole_job() -> None:
    earlier = {"actual": {"memory": {"allocated": 500}}, "phases": {"training": 1e9}}
    attempt = Attempt(2, {"time": {"seconds": 80.0}}, earlier)
    attempt.prepare(LATER)
    attempt.measurements.note(memory={"allocated": 400}, predicted={"allocated": 450})
    attempt.train(first=15)
    record = attempt.conclude()
    assert record["actual"]["memory"] == {"allocated": 500}
    assert record["predicted"] == {"memory": {"allocated": 450}, "eta": {"seconds": pytest.approx(5 * STEP_S + 18)}}
    assert "time" not in record["actual"]
    assert record["steps"] == 6


def test_record_is_complete_at_any_time() -> None:
    attempt = Attempt()
    assert attempt.measurements.record()["tokens_per_second"] is None
    attempt.phase("rendering", 2)
    attempt.measurements.enter_phase("loading")
    assert attempt.measurements.record()["phases"] == {"starting": 0, "rendering": 2}
    assert attempt.measurements.finish()["promises"] == []
