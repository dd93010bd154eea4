"""An attempt's record, on a clock that the test moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from workers.trainer.measurements import Measuring

WORK = {"rows": 50, "examples": 80, "steps": 20, "tokens": 4000, "evaluations": 3, "held_out_tokens": 90, "answers": 2}
STEP_S, EVALUATION_S, TOKENS = 2.0, 5.0, 200


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Attempt:
    """An attempt that takes the time it is told to."""

    def __init__(
        self, attempt: int = 1, forecast: Mapping[str, Any] | None = None, earlier: Mapping[str, Any] | None = None
    ) -> None:
        self.clock = Clock()
        self.measuring = Measuring(attempt, forecast, earlier, self.clock.now, self.clock)
        self.etas: dict[int, float] = {}

    def phase(self, name: str, seconds: float) -> None:
        self.measuring.enter_phase(name)
        self.clock.now += seconds

    def prepare(self, later: Mapping[str, float], steps: int = 20, every: int = 10) -> None:
        self.clock.now += 1
        self.phase("rendering", 2)
        self.phase("loading", 3)
        self.measuring.note(device="a CPU", kind={"method": "lora"}, work=WORK)
        self.measuring.expect(steps, every, later)
        self.measuring.enter_phase("training")

    def train(self, first: int = 1, last: int = 20, every: int = 10) -> None:
        if first == 1:
            self.evaluate()
        for step in range(first, last + 1):
            self.clock.now += STEP_S
            self.etas[step] = self.measuring.on_step(step, TOKENS)
            if step % every == 0:
                self.evaluate()

    def evaluate(self) -> None:
        self.clock.now += EVALUATION_S
        self.measuring.on_evaluation()

    def conclude(self) -> dict[str, Any]:
        self.phase("generating", 11)
        self.phase("publishing", 1)
        self.phase("certifying", 6)
        return self.measuring.finish()


LATER = {"generating": 11.0, "publishing": 1.0, "certifying": 6.0}


def test_eta_counts_the_evaluations_and_the_phases_that_are_still_to_come() -> None:
    attempt = Attempt()
    attempt.prepare(LATER)
    attempt.train()
    later = sum(LATER.values())
    assert attempt.etas[1] == pytest.approx(19 * STEP_S + 2 * EVALUATION_S + later)
    assert attempt.etas[10] == pytest.approx(10 * STEP_S + 2 * EVALUATION_S + later)
    assert attempt.etas[11] == pytest.approx(9 * STEP_S + EVALUATION_S + later)
    assert attempt.etas[20] == pytest.approx(EVALUATION_S + later)
    attempt.phase("generating", 11)
    assert attempt.measuring.later_s == 7
    attempt.phase("publishing", 1)
    assert attempt.measuring.later_s == 6


def test_without_a_history_the_certificate_takes_an_evaluation() -> None:
    attempt = Attempt()
    attempt.prepare({})
    attempt.train()
    assert attempt.etas[20] == pytest.approx(2 * EVALUATION_S)


def test_eta_follows_the_last_twenty_steps() -> None:
    attempt = Attempt()
    attempt.prepare({}, steps=1000, every=1000)
    attempt.train(last=20, every=1000)
    slow_until = attempt.etas[20]
    for step in range(21, 41):
        attempt.clock.now += STEP_S / 2
        attempt.etas[step] = attempt.measuring.on_step(step, TOKENS)
    assert slow_until == pytest.approx(980 * STEP_S + 2 * EVALUATION_S)
    assert attempt.etas[40] == pytest.approx(960 * STEP_S / 2 + 2 * EVALUATION_S)


def test_each_promise_is_held_against_what_came() -> None:
    attempt = Attempt(forecast={"time": {"seconds": 80.0}})
    attempt.prepare({"publishing": 1.0})  # nothing is known of the answers, nor of the certificate
    attempt.train()
    record = attempt.conclude()
    first, tenth, half = record["promises"]
    assert [promise["step"] for promise in record["promises"]] == [1, 2, 10]
    assert first["took_s"] == 19 * STEP_S + 2 * EVALUATION_S + 18
    assert first["promised_s"] == 19 * STEP_S + 3 * EVALUATION_S + 1
    assert first["error"] == pytest.approx(54 / 66 - 1, abs=1e-3)
    assert tenth == {"step": 2, "promised_s": 52, "took_s": 64, "error": pytest.approx(52 / 64 - 1, abs=1e-3)}
    assert half == {"step": 10, "promised_s": 36, "took_s": 48, "error": -0.25}
    assert record["actual"]["eta"] == {"seconds": first["took_s"]}
    assert record["predicted"]["eta"] == {"seconds": first["promised_s"]}
    assert record["predicted"]["time"] == {"seconds": 80.0}
    assert record["actual"]["time"] == {"seconds": 6 + 3 * EVALUATION_S + 20 * STEP_S + 18}


def test_seconds_are_those_of_each_phase_and_tokens_are_per_second_of_training() -> None:
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


def test_work_is_what_was_done_not_what_was_planned() -> None:
    attempt = Attempt()
    attempt.prepare(LATER)
    attempt.train(last=10)  # it was enough
    did = {"steps": 10, "tokens": 10 * TOKENS, "evaluations": 2}
    assert attempt.conclude()["work"] == WORK | did


def test_later_attempt_keeps_the_larger_memory_and_is_not_held_against_the_jobs_whole_time() -> None:
    earlier = {"actual": {"memory": {"allocated": 500}}, "phases": {"training": 1e9}}
    attempt = Attempt(2, {"time": {"seconds": 80.0}}, earlier)
    attempt.prepare(LATER)
    attempt.measuring.note(memory={"allocated": 400}, predicted={"allocated": 450})
    attempt.train(first=15)
    record = attempt.conclude()
    assert record["actual"]["memory"] == {"allocated": 500}
    assert record["predicted"] == {"memory": {"allocated": 450}, "eta": {"seconds": pytest.approx(5 * STEP_S + 18)}}
    assert "time" not in record["actual"]
    assert record["steps"] == 6


def test_record_is_whole_json_at_any_time() -> None:
    attempt = Attempt()
    assert attempt.measuring.record()["tokens_per_second"] is None
    attempt.phase("rendering", 2)
    attempt.measuring.enter_phase("loading")
    assert attempt.measuring.record()["phases"] == {"starting": 0, "rendering": 2}
    assert attempt.measuring.finish()["promises"] == []
