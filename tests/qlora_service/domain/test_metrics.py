from __future__ import annotations

from typing import Any

from qlora_service.domain.jobs import JobEvent
from qlora_service.domain.metrics import metrics_csv, valid_metrics
from tests.control_plane import START


def make_events(*events: tuple[str, dict[str, Any]]) -> list[JobEvent]:
    return [JobEvent(seq, "job_1", START, kind, data) for seq, (kind, data) in enumerate(events)]


def test_metrics_after_the_checkpoint_of_a_resumed_attempt_are_left_out() -> None:
    events = make_events(
        ("metrics", {"step": 1, "loss": 3.0}),
        ("metrics", {"step": 2, "loss": 2.0}),
        ("evaluation", {"step": 2, "eval_loss": 2.5, "eval_accuracy": 0.5}),
        ("log", {"message": "resumed", "resumed_from_step": 1}),
        ("metrics", {"step": 2, "loss": 1.5}),
    )
    assert valid_metrics(events) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.5}]


def test_csv_has_one_line_per_step_with_empty_cells_for_missing_figures() -> None:
    records = [
        {"step": 0, "eval_loss": 3.5, "eval_accuracy": 0.25},
        {"step": 2, "loss": 2.0},
        {"step": 1, "loss": None},
        {"step": 2, "eval_loss": 2.5, "eval_accuracy": 0.5},
    ]
    header = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n"
    assert metrics_csv(records, holds_out=True) == f"{header}0,,,3.5,0.25\n1,,,,\n2,2.0,,2.5,0.5\n"
    # Without held-out rows, evaluations are on training rows.
    assert metrics_csv(records, holds_out=False) == f"{header}0,,,,\n1,,,,\n2,2.0,,,\n"
