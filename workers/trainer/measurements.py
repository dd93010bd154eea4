"""Time and memory of an attempt beside their predictions, and the time it still needs. No torch."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from qlora_service.planning.time.duration import evaluations_left

ETA_STEPS = 20
"""The ETA assumes the mean duration of this many last steps."""
ETA_CHECK_SHARES = (0.0, 0.1, 0.5)
"""Shares of the steps after which the ETA is kept, to be compared with the observed time; 0 is the first step"""


class AttemptMeasurements:
    """The figures of one attempt: memory is the peak over the job's attempts, times are those of this attempt."""

    def __init__(
        self,
        attempt: int,
        forecast: Mapping[str, Any] | None,
        earlier: Mapping[str, Any] | None,
        started_at: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`forecast` is the job's, `earlier` the record of its attempts before; the attempt began at `started_at`."""
        self._clock = clock
        self._attempt = attempt
        self._forecast_s = ((forecast or {}).get("time") or {}).get("seconds")
        self._memory = ((earlier or {}).get("actual") or {}).get("memory")
        self._figures: dict[str, Any] = {}
        self._predicted: dict[str, Any] = {}
        self._phase, self._lap_at = "starting", started_at
        self._phases: dict[str, float] = {}
        self._step_s: deque[float] = deque(maxlen=ETA_STEPS)
        self._evaluation_s: list[float] = []
        self._steps = self._tokens = 0
        self._total_steps, self._evaluate_every = 0, 1
        self._later: dict[str, float] = {}
        self._eta_checks: list[tuple[int, float, float]] = []

    def enter_phase(self, phase: str) -> None:
        self._lap(self._phase)
        self._phase = phase
        self._later.pop(phase, None)

    def note(self, **figures: Any) -> None:
        """Adds figures to the record; `memory` counts as observed memory, `predicted` as predicted memory."""
        self._memory = _larger_peak(self._memory, figures.pop("memory", None))
        self._predicted |= {} if (predicted := figures.pop("predicted", None)) is None else {"memory": predicted}
        self._figures |= figures

    def expect(self, total_steps: int, evaluate_every: int, later: Mapping[str, float]) -> None:
        """Sets the remaining work: steps with evaluations, then phases with their expected seconds."""
        self._total_steps, self._evaluate_every, self._later = total_steps, evaluate_every, dict(later)

    def on_step(self, step: int, tokens: int) -> float:
        """The ETA in seconds after `step` completed steps."""
        self._step_s.append(self._lap("training"))
        self._steps, self._tokens = self._steps + 1, self._tokens + tokens
        eta_s = self._eta_s(step)
        checks = len(self._eta_checks)
        share = ETA_CHECK_SHARES[checks] if checks < len(ETA_CHECK_SHARES) else None
        if share is not None and step >= share * self._total_steps:
            self._eta_checks.append((step, eta_s, self._lap_at))
        return eta_s

    def on_evaluation(self) -> None:
        self._evaluation_s.append(self._lap("evaluating"))

    @property
    def later_s(self) -> float:
        """Expected seconds of the phases after the current one."""
        return sum(self._later.values())

    def record(self) -> dict[str, Any]:
        """The figures so far, as JSON values."""
        actual = {} if self._memory is None else {"memory": self._memory}
        return self._figures | {
            "attempt": self._attempt,
            "predicted": dict(self._predicted),
            "actual": actual,
            "phases": {name: round(seconds, 3) for name, seconds in self._phases.items()},
            "steps": self._steps,
            "tokens": self._tokens,
            "tokens_per_second": self._tokens_per_second(),
        }

    def finish(self) -> dict[str, Any]:
        """The whole record, at the end of the attempt."""
        self._lap(self._phase)
        record = self.record()
        if "work" in record:
            # Only this attempt's part: an earlier attempt may have done the rest, or training stopped early.
            done = {"steps": self._steps, "tokens": self._tokens, "evaluations": len(self._evaluation_s)}
            record["work"] = record["work"] | done
        if self._attempt == 1:
            record["actual"]["time"] = {"seconds": round(sum(self._phases.values()), 3)}
            if self._forecast_s is not None:
                record["predicted"]["time"] = {"seconds": self._forecast_s}
        promises = [_eta_error(step, eta_s, self._lap_at - at) for step, eta_s, at in self._eta_checks]
        if promises:
            record["actual"]["eta"] = {"seconds": promises[0]["took_s"]}
            record["predicted"]["eta"] = {"seconds": promises[0]["promised_s"]}
        return record | {"promises": promises}

    def _eta_s(self, step: int) -> float:
        evaluations = evaluations_left(step, self._total_steps, self._evaluate_every)
        evaluation_s = statistics.fmean(self._evaluation_s) if self._evaluation_s else 0.0
        # The certificate evaluates once more; without a history, that evaluation is its expected time.
        later_s = self.later_s if "certifying" in self._later else self.later_s + evaluation_s
        return statistics.fmean(self._step_s) * (self._total_steps - step) + evaluations * evaluation_s + later_s

    def _tokens_per_second(self) -> float | None:
        seconds = self._phases.get("training", 0.0)
        return round(self._tokens / seconds, 1) if self._steps and seconds > 0 else None

    def _lap(self, phase: str) -> float:
        """Seconds since the last lap, which are added to `phase`."""
        before, self._lap_at = self._lap_at, self._clock()
        self._phases[phase] = self._phases.get(phase, 0.0) + self._lap_at - before
        return self._lap_at - before


def _eta_error(step: int, eta_s: float, took_s: float) -> dict[str, float]:
    """An ETA beside the observed time, and its relative error."""
    return {
        "step": step,
        "promised_s": round(eta_s, 3),
        "took_s": round(took_s, 3),
        "error": round(eta_s / took_s - 1, 3) if took_s > 0 else 0.0,
    }


def _larger_peak(one: dict[str, Any] | None, other: dict[str, Any] | None) -> dict[str, Any] | None:
    if one is None or other is None:
        return one or other
    return max(one, other, key=lambda memory: memory["allocated"])
