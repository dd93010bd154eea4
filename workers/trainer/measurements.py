"""What an attempt takes of time and memory, beside what was predicted for it; how long it still takes. No torch."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from qlora_service.planning.time.duration import evaluations_left

ETA_STEPS = 20
"""The ETA follows the mean of so many steps."""
PROMISED_AT = (0.0, 0.1, 0.5)
"""Shares of the steps at which the ETA is held against what came; 0 is the first step"""


class Measuring:
    """One attempt's figures. A job's memory is kept over its attempts, its times are those of the last one."""

    def __init__(
        self,
        attempt: int,
        forecast: Mapping[str, Any] | None,
        earlier: Mapping[str, Any] | None,
        started_at: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`forecast` is the job's, `earlier` what its attempts before recorded; since `started_at` it is starting."""
        self._clock = clock
        self._attempt = attempt
        self._forecast_s = ((forecast or {}).get("time") or {}).get("seconds")
        self._memory = ((earlier or {}).get("actual") or {}).get("memory")
        self._figures: dict[str, Any] = {}
        self._predicted: dict[str, Any] = {}
        self._phase, self._mark = "starting", started_at
        self._phases: dict[str, float] = {}
        self._step_s: deque[float] = deque(maxlen=ETA_STEPS)
        self._evaluation_s: list[float] = []
        self._steps = self._tokens = 0
        self._total_steps, self._evaluate_every = 0, 1
        self._later: dict[str, float] = {}
        self._promises: list[tuple[int, float, float]] = []

    def enter_phase(self, phase: str) -> None:
        self._lap(self._phase)
        self._phase = phase
        self._later.pop(phase, None)

    def note(self, **figures: Any) -> None:
        """Put figures into the record as they are; `memory` is what was taken, `predicted` what was predicted of it."""
        self._memory = _larger(self._memory, figures.pop("memory", None))
        self._predicted |= {} if (predicted := figures.pop("predicted", None)) is None else {"memory": predicted}
        self._figures |= figures

    def expect(self, total_steps: int, evaluate_every: int, later: Mapping[str, float]) -> None:
        """What is to be done: steps with evaluations between them, and then phases of so many seconds."""
        self._total_steps, self._evaluate_every, self._later = total_steps, evaluate_every, dict(later)

    def on_step(self, step: int, tokens: int) -> float:
        """Seconds to go after so many steps."""
        self._step_s.append(self._lap("training"))
        self._steps, self._tokens = self._steps + 1, self._tokens + tokens
        eta = self._to_go(step)
        share = PROMISED_AT[len(self._promises)] if len(self._promises) < len(PROMISED_AT) else None
        if share is not None and step >= share * self._total_steps:
            self._promises.append((step, eta, self._mark))
        return eta

    def on_evaluation(self) -> None:
        self._evaluation_s.append(self._lap("evaluating"))

    @property
    def later_s(self) -> float:
        """Seconds that the phases behind this one are expected to take."""
        return sum(self._later.values())

    def record(self) -> dict[str, Any]:
        """What is known so far, as JSON values."""
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
        """The whole record, when everything is done."""
        self._lap(self._phase)
        record = self.record()
        if "work" in record:
            # What this attempt did of it: others may have done the rest, or it was enough.
            did = {"steps": self._steps, "tokens": self._tokens, "evaluations": len(self._evaluation_s)}
            record["work"] = record["work"] | did
        if self._attempt == 1:
            record["actual"]["time"] = {"seconds": round(sum(self._phases.values()), 3)}
            if self._forecast_s is not None:
                record["predicted"]["time"] = {"seconds": self._forecast_s}
        promises = [_kept(step, promised, self._mark - at) for step, promised, at in self._promises]
        if promises:
            record["actual"]["eta"] = {"seconds": promises[0]["took_s"]}
            record["predicted"]["eta"] = {"seconds": promises[0]["promised_s"]}
        return record | {"promises": promises}

    def _to_go(self, step: int) -> float:
        evaluations = evaluations_left(step, self._total_steps, self._evaluate_every)
        evaluating = statistics.fmean(self._evaluation_s) if self._evaluation_s else 0.0
        # The certificate evaluates once more; where no history says so, that is all that is known of it.
        later = self.later_s if "certifying" in self._later else self.later_s + evaluating
        return statistics.fmean(self._step_s) * (self._total_steps - step) + evaluations * evaluating + later

    def _tokens_per_second(self) -> float | None:
        seconds = self._phases.get("training", 0.0)
        return round(self._tokens / seconds, 1) if self._steps and seconds > 0 else None

    def _lap(self, phase: str) -> float:
        """Seconds since the last one, which count for `phase`."""
        before, self._mark = self._mark, self._clock()
        self._phases[phase] = self._phases.get(phase, 0.0) + self._mark - before
        return self._mark - before


def _kept(step: int, promised: float, took: float) -> dict[str, float]:
    return {
        "step": step,
        "promised_s": round(promised, 3),
        "took_s": round(took, 3),
        "error": round(promised / took - 1, 3) if took > 0 else 0.0,
    }


def _larger(one: dict[str, Any] | None, other: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of two attempts' peaks the one that counts."""
    if one is None or other is None:
        return one or other
    return max(one, other, key=lambda memory: memory["allocated"])
